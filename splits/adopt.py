"""Adopt a published split: identify lists, and convert them to this project's layout.

    python splits/adopt.py published/PRCL/VOC_split/662/3407 --out splits/voc/662/3407

PATH is a published folder, a labeled list beside its unlabeled one, or an order of images (`split_<id>.pkl`, with
--labels); common/splits/lists.py describes the supported layouts. The ids are compared with the checksums in
splits/published.json: lists at the path of a published split that differ from it are refused; others are identified by
name or as none. With --out the split is written there, as labeled_, unlabeled_ and valid_filename.txt.

--dataset and --data-root are needed for lists published without validation images, which are then the dataset's own,
for lists without unlabeled images, which are then all its other training images, and for orders of images, which number
its sorted training images.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config.sections import DataConfig
from common.datasets import open_reader
from common.datasets.reader import Reader
from common.errors import UserError, report_errors
from common.splits.lists import KINDS, find_lists, published_id, read_ids
from common.splits.orders import read_order
from common.splits.published import TEST_LIST, checksum, commands, entry_at, equals, record, said_of, same_as
from common.splits.split import Split, complete, no_unlabeled, write_split

NEEDS_DATASET = "give the dataset with --dataset and --data-root"


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if (args.dataset is None) != (args.data_root is None):
        raise UserError("--dataset and --data-root go together")
    reader = open_reader(DataConfig(args.dataset, args.data_root)) if args.dataset else None
    path = Path(args.path).expanduser()
    if path.is_file() and path.suffix != ".pkl" and find_lists(path) is None:
        _identify_list(path, args.out)
        return
    split = read_order_split(path, args.labels, reader) if path.suffix == ".pkl" else read_lists(path, reader)
    _check_published(path, args.labels, split)
    print(f"{path}: {len(split.labeled)} labeled, {len(split.unlabeled)} unlabeled, {len(split.valid)} for validation")
    print(said_of(split.labeled, split.unlabeled))
    known = same_as(split.labeled, split.unlabeled)
    for defect in sorted({defect for entry in known for defect in entry["defects"]}):
        print(f"known defect: {defect}")
    if args.out:
        split = _completed(path, split, reader)
        write_split(args.out, split)
        print(f"{args.out}: written, {len(split.valid)} for validation; use it with --data.split {args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="published lists")
    parser.add_argument("--out", help="folder of the split that is written")
    parser.add_argument("--labels", type=int, help="number of labeled images in an order of images")
    parser.add_argument("--dataset", choices=("voc", "cityscapes", "ade20k", "coco", "coco_stuff"))
    parser.add_argument("--data-root", help="folder of the dataset")
    return parser


def read_lists(path: Path, reader: Reader | None) -> Split:
    """Read the lists at `path`, without validation images if none were published.

    Raises:
        UserError: there are no lists, a line or an id is wrong, or the unlabeled images depend on a missing dataset.
    """
    files = find_lists(path)
    if files is None:
        entry = entry_at(path)
        how = (
            f": get them with\n{commands(entry, 'ROOT', entry['place'])}"
            if entry
            else ", see splits/README.md for the supported ones"
        )
        raise UserError(f"no published lists at {path}{how}")
    names = {"valid": []} | files.names(published_id)
    if "unlabeled" not in names:
        if reader is None:
            raise UserError(f"{no_unlabeled(path)}: {NEEDS_DATASET}")
        names["unlabeled"] = complete(reader, names["labeled"], names["valid"] or None).unlabeled
    return Split(**names)


def read_order_split(path: Path, labels: int | None, reader: Reader | None) -> Split:
    """Split a stored order into the first `labels` images and the others.

    memory_bank's release numbers Cityscapes in the unknown order of its disk: here paths are sorted.

    Raises:
        UserError: the dataset has another number of training images, or an argument is missing or wrong.
    """
    order = read_order(path)
    if labels is None or not 0 < labels <= len(order):
        raise UserError(f"{path} is an order of {len(order)} images: give --labels, from 1 to {len(order)}")
    if reader is None:
        raise UserError(f"{path} is an order of images: {NEEDS_DATASET}")
    names = reader.names("train")
    if len(names) != len(order):
        raise UserError(f"{path} is an order of {len(order)} images, but {reader.layout} has {len(names)} for training")
    ordered = [names[index] for index in order]
    return Split(ordered[:labels], ordered[labels:], [])


def _identify_list(path: Path, out: str | None) -> None:
    """Print the published list that a single list equals. Raises UserError with --out, and as `_refuse_other`."""
    if out:
        raise UserError(f"{path} is a single list, not a labeled list beside an unlabeled one: see splits/README.md")
    ids = read_ids(path, published_id)
    _refuse_other(path, entry_at(path), "", ids)
    same = [entry["name"] for entry in record()["lists"] if entry["sha256"] == checksum(ids)]
    print(f"{path}: {len(ids)} images\npublished list: {' = '.join(same) or 'none'}")


def _check_published(path: Path, labels: int | None, split: Split) -> None:
    """Raise UserError if the path is that of a published split, but the ids differ."""
    entry = entry_at(path, labels)
    for kind in KINDS if entry else ():
        if kind != "valid" or split.valid:  # a copy may lack the validation list
            _refuse_other(path, entry[kind], f"{kind} ", getattr(split, kind))


def _refuse_other(path: Path, summary: dict[str, Any] | None, kind: str, ids: list[str]) -> None:
    """Raise UserError if `ids` differ from those of `summary`, which may be None."""
    if summary is None or equals(summary, ids):
        return
    if summary["sha256"] is None:
        raise UserError(
            f"{path}: {len(ids)} {kind}images, published: {summary['count']}; they are all other training images, so "
            "those below --data-root must be complete"
        )
    raise UserError(
        f"{path}: the {kind}list is not the published one ({len(ids)} ids, published: {summary['count']}; the"
        " checksum differs): download it again, or move it to use it as your own"
    )


def _completed(path: Path, split: Split, reader: Reader | None) -> Split:
    """Add missing validation images. Raises UserError for an overlap that is not in a published split."""
    known = same_as(split.labeled, split.unlabeled)
    both = sorted(set(split.labeled) & set(split.unlabeled))
    if both and not known:
        raise UserError(f"{path}: {len(both)} images are both labeled and unlabeled, e.g. {both[0]}: correct the lists")
    listed = {checksum(split.valid)} & {entry["valid"]["sha256"] for entry in known if TEST_LIST in entry["defects"]}
    if split.valid and not listed:
        return split
    if reader is None:
        why = TEST_LIST if listed else "no list for validation was published with it"
        raise UserError(f"{path}: {why}; {NEEDS_DATASET}")
    valid = reader.names("val")
    if not valid:
        raise UserError(f"{reader.layout}: no images for validation")
    return Split(split.labeled, split.unlabeled, valid)


if __name__ == "__main__":
    main()
