"""Lists of images as they were published: which files make a split, and what a line of them names.

Known by their files, whatever they are called:

- a folder of {labeled,unlabeled,valid}_filename.txt, an id a line: this project's own layout, which is that of PRCL and
  CSS;
- a folder of {labeled,unlabeled}.txt, with val.txt beside the folder (UniMatch, U2PL);
- <folder>/<n>, which stands for <n>_train_supervised.txt, <n>_train_unsupervised.txt and val.txt in that folder (CAC);
- a file with `labeled_` in its name, beside which is one with `unlabeled_`; val.txt beside them or one folder up if
  there is one (CPS and CPCL, also PseudoSeg's lists).

In all but the first a line is an id or the paths of an image and of its label, between which are spaces or a tab. Paths
may have the backslashes of Windows.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.datasets.reader import read_lines
from common.errors import UserError

KINDS = ("labeled", "unlabeled", "valid")
CITYSCAPES_FRAME = re.compile(r"[a-z-]+_\d{6}_\d{6}")


@dataclass(frozen=True)
class ListFiles:
    """Files of a split.

    Attributes:
        paths: by kind; without `valid` where no such list was published.
        read: the ids of one of them, from its path and what makes an id of an image's path.
    """

    paths: dict[str, Path]
    read: Callable[[Path, Callable[[str], str]], list[str]]

    def names(self, id_of: Callable[[str], str]) -> dict[str, list[str]]:
        """Ids by kind. Raises UserError for a missing list, a line that is no id, an id that is twice in a list."""
        return {kind: self.read(path, id_of) for kind, path in self.paths.items()}


def find_lists(path: Path) -> ListFiles | None:
    """The files that `path` stands for; None where there are none. The files of a split need not all exist."""
    if (path / "labeled.txt").is_file():
        return _files(path / "labeled.txt", path / "unlabeled.txt", path.parent / "val.txt")
    if path.is_dir():
        return ListFiles({kind: path / f"{kind}_filename.txt" for kind in KINDS}, _read_own)
    if path.name.endswith("_train_supervised.txt"):
        path = path.with_name(path.name.removesuffix("_train_supervised.txt"))
    if path.with_name(f"{path.name}_train_supervised.txt").is_file():
        names = (f"{path.name}_train_supervised.txt", f"{path.name}_train_unsupervised.txt", "val.txt")
        return ListFiles({kind: path.with_name(name) for kind, name in zip(KINDS, names)}, _read_pairs)
    if path.is_file() and "labeled_" in path.name and "unlabeled_" not in path.name:
        unlabeled = path.with_name(path.name.replace("labeled_", "unlabeled_"))
        return _files(path, unlabeled, path.parent / "val.txt", path.parent.parent / "val.txt")
    return None


def _files(labeled: Path, unlabeled: Path, *valid: Path) -> ListFiles:
    """Lists of ids or of paths; for validation the first of `valid` that is there, if any is."""
    paths = {"labeled": labeled, "unlabeled": unlabeled}
    found = next((path for path in valid if path.is_file()), None)
    return ListFiles(paths if found is None else paths | {"valid": found}, read_ids)


def published_id(path: str) -> str:
    """The id of the image at `path`, with no dataset to ask: frames of Cityscapes have their ending, which CPS leaves
    away."""
    stem = Path(path).stem
    return f"{stem}_leftImg8bit" if CITYSCAPES_FRAME.fullmatch(stem) else stem


def read_ids(path: Path, id_of: Callable[[str], str]) -> list[str]:
    """Ids of a list where a line is an id, or the paths of an image and of its label.

    Raises UserError for a missing list and for an id that occurs twice.
    """
    if not path.is_file():
        raise UserError(f"no list {path}: the labeled and the unlabeled list go together")
    lines = [line.replace("\\", "/") for line in read_lines(path)]
    return _once([id_of(line.split()[0]) if set(line) & set("/\t") else line for line in lines], path)


def _read_own(path: Path, id_of: Callable[[str], str]) -> list[str]:
    if not path.is_file():
        raise UserError(f"no list {path}: a split has labeled_, unlabeled_ and valid_filename.txt")
    names = read_lines(path)
    for name in names:
        if set(name) & set("/\\\t"):
            raise UserError(f"{path} holds the line {name!r}: lists have one id a line")
    return _once(names, path)


def _read_pairs(path: Path, id_of: Callable[[str], str]) -> list[str]:
    if not path.is_file():
        raise UserError(
            f"no list {path}: CAC's splits have *_train_supervised.txt, *_train_unsupervised.txt and val.txt"
        )
    for line in read_lines(path):
        if len(line.split()) != 2:
            raise UserError(f"{path} holds the line {line!r}: lines have the paths of an image and its label")
    return read_ids(path, id_of)


def _once(names: list[str], path: Path) -> list[str]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path}: {len(twice)} ids occur more than once, {twice[0]} for one: remove the repetitions")
    return names
