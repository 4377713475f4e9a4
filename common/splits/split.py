"""Splits of a dataset into labeled, unlabeled and validation images.

A split is a folder `<root>/<labels>/<seed>` of three lists with one id per line: labeled_filename.txt,
unlabeled_filename.txt and valid_filename.txt. `splits/make.py` makes splits, `splits/adopt.py` converts published
lists, which can also be read directly (see common/splits/lists.py).

A config may instead name a list of labeled and a list of unlabeled images, with an id per line or the paths of an image
and its label; or the id of an order of all training images, as published by memory bank, and the number of labeled
images at its start.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from common import IGNORE
from common.config.sections import DataConfig
from common.datasets.reader import Reader, read_lines
from common.errors import UserError
from common.splits.lists import find_lists, published_id, read_ids
from common.splits.orders import order_of
from common.splits.published import commands, entry_at


@dataclass(frozen=True)
class Split:
    """Ids of images, in the order of their lists."""

    labeled: list[str]
    unlabeled: list[str]
    valid: list[str]


def split_of(data: DataConfig, reader: Reader, allow_overlap: bool | None = None) -> Split:
    """Read the split of a config: `split`, `labeled_list` with `unlabeled_list`, or `split_id`.

    With the last two, validation images are the dataset's own. A missing split <data.root>/splits/<labels>/<seed> of
    the built-in data is drawn, class-covering.

    Args:
        data: The config's section.
        reader: Reader of the dataset.
        allow_overlap: Replaces `data.allow_overlap`.

    Raises:
        UserError: not exactly one kind is given; see also `read_split` and `order_of`.
    """
    allow_overlap = data.allow_overlap if allow_overlap is None else allow_overlap
    if sum(kind is not None for kind in (data.split, data.labeled_list, data.split_id)) != 1:
        raise UserError(
            "a config states one of data.split, data.labeled_list and data.split_id; set the others to null"
        )
    if data.unlabeled_list is not None and data.labeled_list is None:
        raise UserError("data.unlabeled_list requires data.labeled_list: set both, or remove data.unlabeled_list")
    if (data.labeled_samples is None) != (data.split_id is None):
        raise UserError("data.split_id and data.labeled_samples, the number of labeled images, go together")
    if data.split_id is not None:
        return _first_of_order(data, reader)
    if data.split is not None:
        if data.dataset == "shapes":
            _make_built_in_split(Path(data.split).expanduser(), Path(data.root).expanduser(), reader)
        return read_split(data.split, allow_overlap, data.dataset, data.root, reader)
    paths = {"labeled": Path(data.labeled_list).expanduser()}
    labeled = _read_list(paths["labeled"], reader, data)
    split = replace(complete(reader, labeled), labeled=labeled)
    if data.unlabeled_list is not None:
        paths["unlabeled"] = Path(data.unlabeled_list).expanduser()
        split = replace(split, unlabeled=_read_list(paths["unlabeled"], reader, data))
    return _checked(split, data.lists, lambda kind: paths.get(kind, reader.layout), allow_overlap)


def valid_of(data: DataConfig, reader: Reader) -> list[str]:
    """Ids of the validation images. Unlike `split_of` it does not need a stored order, which does not affect them."""
    return _own_valid(reader) if data.split_id is not None else split_of(data, reader).valid


def read_split(
    folder: str | Path,
    allow_overlap: bool = False,
    dataset: str = "DATASET",
    root: str = "ROOT",
    reader: Reader | None = None,
) -> Split:
    """Read a split.

    Args:
        folder: A split, or published lists, see common/splits/lists.py.
        allow_overlap: Accept images that are labeled and unlabeled; labels of the unlabeled list are never opened.
        dataset: Kind of the dataset, for the commands that are printed if the split is missing.
        root: Folder of the dataset, for the same commands.
        reader: Reader of the dataset, whose own validation images and whose other training images replace a list for
            validation and an unlabeled list that were not published.

    Raises:
        UserError: a list is missing or empty (an empty unlabeled list is accepted), a line is not an id, an id is
            repeated, or labeled images are in the unlabeled list.
    """
    folder = Path(folder).expanduser()
    files = find_lists(folder)
    if files is None:
        raise UserError(_no_split(folder, dataset, root))
    names = files.names(reader.id_of if reader else published_id)
    if "valid" not in names:
        if reader is None:
            raise UserError(f"{folder}: no list for validation was published with it: give --dataset and --data-root")
        names["valid"] = reader.names("val")
    if "unlabeled" not in names:
        if reader is None:
            raise UserError(f"{no_unlabeled(folder)}: give --dataset and --data-root")
        names["unlabeled"] = complete(reader, names["labeled"], names["valid"]).unlabeled
    return _checked(Split(**names), folder, lambda kind: files.paths.get(kind, folder), allow_overlap)


def _checked(split: Split, origin: str | Path, path_of: Callable[[str], str | Path], allow_overlap: bool) -> Split:
    for kind in ("labeled", "valid"):
        if not getattr(split, kind):
            raise UserError(f"{path_of(kind)} is empty")
    both = sorted(set(split.labeled) & set(split.unlabeled))
    if both and not allow_overlap:
        raise UserError(
            f"{origin}: {len(both)} images are both labeled and unlabeled, e.g. {both[0]}:"
            " correct the lists, or accept the overlap with data.allow_overlap"
        )
    return split


def write_split(folder: str | Path, split: Split) -> None:
    """Write the three lists. They appear together or not at all.

    Raises:
        UserError: `folder` contains anything but this split: nothing is overwritten.
    """
    folder = Path(folder).expanduser()
    if _holds(folder, split):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"split {folder} cannot be written: {error.strerror}") from None
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workshop:
        made = Path(workshop) / "split"
        made.mkdir()
        for kind, names in asdict(split).items():
            _list_path(made, kind).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        try:
            os.rename(made, folder)
        except OSError:
            # Another process was faster; its lists must be the same.
            if not _holds(folder, split):
                raise


def no_unlabeled(folder: Path) -> str:
    """Explanation for a published split without an unlabeled list."""
    return f"no list {folder / 'unlabeled.txt'}, so all other training images of the dataset are unlabeled"


def complete(reader: Reader, labeled: Sequence[str], valid: Sequence[str] | None = None) -> Split:
    """Complete `labeled` to a split in which all other training images are unlabeled.

    Args:
        reader: Reader of the dataset.
        labeled: Ids of the labeled images.
        valid: Ids of the validation images; by default the dataset's own.

    Raises:
        UserError: there are no validation images.
    """
    valid = _own_valid(reader) if valid is None else list(valid)
    taken = {*labeled, *valid}
    return Split(sorted(set(labeled)), [name for name in reader.names("train") if name not in taken], valid)


def _own_valid(reader: Reader) -> list[str]:
    valid = reader.names("val")
    if not valid:
        raise UserError(f"{reader.layout}: no images for validation")
    return valid


def _make_built_in_split(split: Path, root: Path, reader: Reader) -> None:
    if split.exists() or split.parent.parent.resolve() != (root / "splits").resolve():
        return
    labels, seed = split.parent.name, split.name
    if not (labels.isdigit() and seed.isdigit()):
        raise UserError(f"split {split} of the built-in data: give {root}/splits/<labels>/<seed>, both numbers")
    write_split(split, complete(reader, choose_class_covering(reader, candidates(reader), int(labels), int(seed))))


def _first_of_order(data: DataConfig, reader: Reader) -> Split:
    names = reader.names("train")
    if data.labeled_samples > len(names):
        raise UserError(
            f"data.labeled_samples is {data.labeled_samples}, but {data.root} has {len(names)} for training"
        )
    ordered = [names[index] for index in order_of(data, len(names))]
    return Split(ordered[: data.labeled_samples], ordered[data.labeled_samples :], _own_valid(reader))


def candidates(reader: Reader) -> list[str]:
    """Sorted ids of the training images that have a label."""
    return [name for name in reader.names("train") if reader.has_label(name)]


def choose_random(names: Sequence[str], count: int, seed: int) -> list[str]:
    """Draw `count` of `names` reproducibly.

    Names are ranked by a hash of seed and name, so the result does not depend on a random generator, the order of files
    or the version of a library; for one seed, a smaller draw is part of a larger one.

    Raises:
        UserError: there are fewer names.
    """
    return _ranked(names, count, seed)[:count]


def choose_class_covering(reader: Reader, names: Sequence[str], count: int, seed: int) -> list[str]:
    """Draw as `choose_random`, but so that every class of the dataset occurs in the chosen labels.

    As few of the random images as possible are replaced: the last ranked, by those that show most of the missing
    classes. All labels are read.

    Raises:
        UserError: `count` images do not suffice.
    """
    ranked = _ranked(names, count, seed)
    with ThreadPoolExecutor() as pool:
        occurs = np.stack(list(pool.map(lambda name: classes_in(reader, name), ranked)))
    wanted = occurs.any(0)
    for replaced in range(count + 1):
        kept = count - replaced
        covering = _cover(occurs[kept:], wanted & ~occurs[:kept].any(0))
        if len(covering) <= replaced:
            added = [ranked[kept + index] for index in covering]
            # The cover may need fewer images than were replaced: the best ranked of them are kept.
            rest = [name for name in ranked[kept:] if name not in added]
            return ranked[:kept] + added + rest[: replaced - len(added)]
    raise UserError(f"{count} images cannot show all {wanted.sum()} classes that occur: label more")


def choose_every(names: Sequence[str], step: int) -> list[str]:
    """Every `step`-th of the sorted names, from the first.

    These are the lists that CPS published for VOC and CPCL uses (662, 1323, 2646 and 5291 of 10,582 for 1/16 to 1/2).
    Those for Cityscapes follow an unsorted list and cannot be made.
    """
    return sorted(names)[::step]


def _ranked(names: Sequence[str], count: int, seed: int) -> list[str]:
    if not 0 < count <= len(names):
        raise UserError(
            f"{count} labeled images of {len(names)} that have a label: give a number from 1 to {len(names)}"
        )
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())


def classes_in(reader: Reader, name: str) -> np.ndarray:
    """bool [C]: True for classes that occur in the label of `name`."""
    counts = np.bincount(reader.read_label(name).numpy().ravel(), minlength=IGNORE + 1)
    return counts[: len(reader.classes)] > 0


def _cover(occurs: np.ndarray, missing: np.ndarray) -> list[int]:
    """Choose rows of bool [N, C] that cover all `missing` classes [C], greedily: the row that covers most first."""
    chosen = []
    while missing.any():
        chosen.append(int((occurs & missing).sum(1).argmax()))
        missing = missing & ~occurs[chosen[-1]]
    return chosen


def _list_path(folder: Path, kind: str) -> Path:
    return folder / f"{kind}_filename.txt"


def _read_list(path: Path, reader: Reader, data: DataConfig) -> list[str]:
    if not path.is_file():
        how = "set data.labeled_list and data.unlabeled_list to files that are there"
        raise UserError(f"no list {path}: {how}{_published(path, data.root)}")
    return read_ids(path, reader.id_of)


def _holds(folder: Path, split: Split) -> bool:
    """Does `folder` contain `split`? False if it is missing or empty; UserError for anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    lists = {kind: _list_path(folder, kind) for kind in asdict(split)}
    if any(not path.is_file() or read_lines(path) != getattr(split, kind) for kind, path in lists.items()):
        raise UserError(
            f"{folder} exists and is not this split: remove it or give another folder, nothing is overwritten"
        )
    return True


def _no_split(folder: Path, dataset: str, root: str) -> str:
    """Message for a missing split, with the commands that download or make it, as far as its path allows."""
    if folder.is_file():
        return f"split {folder} is not a labeled list: convert published lists of other kinds with splits/adopt.py"
    labels, seed = folder.parent.name, folder.name
    if not (labels.isdigit() and seed.isdigit()):
        labels, seed = "N", "SEED"
    out = folder.parent.parent if labels != "N" else "SPLITS"
    flags = f"--dataset {dataset} --data-root {root} --labels {labels} --seed {seed} --out {out}"
    how = f"point data.split at published lists{_published(folder, root)}, or make it"
    return f"no split {folder}: {how}:\n  python splits/make.py {flags}"


def _published(path: Path, root: str) -> str:
    """Commands that put a published list at `path`; empty if there is none for it."""
    entry = entry_at(path)
    return f", those of {entry['name']} with\n{commands(entry, root, path)}\n" if entry else ""
