"""Published lists of images: files that make a split, and the ids in their lines.

Supported, with any folder names:

- a folder of {labeled,unlabeled,valid}_filename.txt, one id per line: this project's own layout, which is that of PRCL
  and CSS;
- a folder of {labeled,unlabeled}.txt, with val.txt beside the folder (UniMatch, U2PL); without unlabeled.txt, all other
  training images of the dataset are unlabeled;
- <folder>/<n>, for <n>_train_supervised.txt, <n>_train_unsupervised.txt and val.txt in that folder (CAC);
- a file with `labeled_` in its name beside a file with `unlabeled_`; optionally val.txt beside them or one folder up
  (CPS and CPCL, also PseudoSeg's lists).

In all but the first, a line is an id, or the paths of an image and of its label, separated by spaces or a tab. Paths
may contain the backslashes of Windows.
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
        paths: Path by kind; without `valid` if no such list was published, without `unlabeled` if all other training
            images are unlabeled.
        read: Function that reads the ids of a list, given its path and a function from an image's path to its id.
    """

    paths: dict[str, Path]
    read: Callable[[Path, Callable[[str], str]], list[str]]

    def names(self, id_of: Callable[[str], str]) -> dict[str, list[str]]:
        """Ids by kind. Raises UserError for a missing list, a line that is not an id, or a repeated id."""
        return {kind: self.read(path, id_of) for kind, path in self.paths.items()}


def find_lists(path: Path) -> ListFiles | None:
    """Find the files of the split at `path`; None if there are none. Some files of a split may be missing."""
    if (path / "labeled.txt").is_file():
        unlabeled = path / "unlabeled.txt"
        return _files(path / "labeled.txt", unlabeled if unlabeled.is_file() else None, path.parent / "val.txt")
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


def _files(labeled: Path, unlabeled: Path | None, *valid: Path) -> ListFiles:
    """Lists of ids or of paths; for validation the first of `valid` that exists, if any."""
    paths = {"labeled": labeled} | ({} if unlabeled is None else {"unlabeled": unlabeled})
    found = next((path for path in valid if path.is_file()), None)
    return ListFiles(paths if found is None else paths | {"valid": found}, read_ids)


def published_id(path: str) -> str:
    """Id of the image at `path`, without access to the dataset: Cityscapes frames get the ending that CPS omits."""
    stem = Path(path).stem
    return f"{stem}_leftImg8bit" if CITYSCAPES_FRAME.fullmatch(stem) else stem


def read_ids(path: Path, id_of: Callable[[str], str]) -> list[str]:
    """Read a list in which a line is an id, or the paths of an image and of its label.

    Raises:
        UserError: the list is missing, or an id is repeated.
    """
    if not path.is_file():
        raise UserError(f"no list {path}: the labeled and the unlabeled list go together")
    lines = [line.replace("\\", "/") for line in read_lines(path)]
    is_path = [bool(set(line) & set("/\t")) and id_of(line) != line for line in lines]
    return _once([id_of(line.split()[0]) if listed else line for line, listed in zip(lines, is_path)], path)


def _read_own(path: Path, id_of: Callable[[str], str]) -> list[str]:
    if not path.is_file():
        raise UserError(f"no list {path}: a split has labeled_, unlabeled_ and valid_filename.txt")
    names = read_lines(path)
    for name in names:
        if set(name) & set("/\\\t") and id_of(name) != name:
            raise UserError(f"{path} contains the line {name!r}: lists must have one id per line")
    return _once(names, path)


def _read_pairs(path: Path, id_of: Callable[[str], str]) -> list[str]:
    if not path.is_file():
        raise UserError(
            f"no list {path}: CAC's splits have *_train_supervised.txt, *_train_unsupervised.txt and val.txt"
        )
    for line in read_lines(path):
        if len(line.split()) != 2:
            raise UserError(f"{path} contains the line {line!r}: lines must have the paths of an image and its label")
    return read_ids(path, id_of)


def _once(names: list[str], path: Path) -> list[str]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path}: {len(twice)} ids occur more than once, e.g. {twice[0]}: remove the repetitions")
    return names
