"""Make a split: choose which images of a dataset are labeled.

    python splits/make.py --dataset voc --data-root data/VOC2012 --labels 662 --seed 0 --out splits/voc

writes splits/voc/662/0/{labeled,unlabeled,valid}_filename.txt. The same dataset, labels and seed give the same lists.
Labeled images are chosen among the training images that have a label (with --among FILE, among those in a list); all
other training images are unlabeled; validation images are the dataset's own. An existing split is never overwritten.

Your own data (--dataset folder, docs/your_data.md) may have no validation images: --valid 1/5 draws a fifth of those
with a label, independent of seed and number of labels. All labels are read and checked first.

Methods:
  random          each image with equal probability; for one seed, fewer labels are part of more
  class-covering  random, but every class that occurs in the dataset occurs in the labeled images
  every-rth       every r-th of the sorted ids, for any seed: with 1/16 .. 1/2 these are the lists of CPS and CPCL
                  for VOC (those for Cityscapes follow another order)
"""

import argparse
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np

from common.config.sections import DataConfig
from common.datasets import open_reader
from common.datasets.folder import Folder
from common.datasets.reader import Reader, read_lines
from common.errors import UserError, report_errors
from common.splits.split import (
    candidates,
    choose_class_covering,
    choose_every,
    choose_random,
    classes_in,
    complete,
    write_split,
)

DATASETS = ("voc", "cityscapes", "ade20k", "coco", "coco_stuff", "folder", "shapes")
METHOD_HELP = "class-covering by default for the built-in data, else random"


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    folder_only = {"image_dir": args.image_dir, "label_dir": args.label_dir, "classes": args.classes}
    reader = open_reader(DataConfig(args.dataset, args.data_root, split="", **folder_only))
    names = candidates(reader)
    if args.among:
        names = _among(names, args.among)
    if args.dataset == "folder":
        check_labels(reader, names)
    valid = None
    if args.valid:
        valid = _draw_valid(reader, names, args.valid)
        names = sorted(set(names) - set(valid))
    count = _count(args.labels, len(names))
    method = args.method or ("class-covering" if args.dataset == "shapes" else "random")
    if method == "random":
        labeled = choose_random(names, count, args.seed)
    elif method == "class-covering":
        labeled = choose_class_covering(reader, names, count, args.seed)
    else:
        labeled = choose_every(names, _step(args.labels, len(names)))
    split = complete(reader, labeled, valid)
    folder = Path(args.out, str(len(split.labeled)), str(args.seed))
    write_split(folder, split)
    print(
        f"{folder}: {len(split.labeled)} labeled, {len(split.unlabeled)} unlabeled, {len(split.valid)} for validation"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--data-root", required=True, help="folder of the dataset")
    parser.add_argument(
        "--labels", required=True, help="number of labeled images, or their share of those with a label: 1/8"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--among",
        type=Path,
        help="list of ids, one per line: only these become labeled (VOC's own train.txt: the classic protocol)",
    )
    parser.add_argument(
        "--valid",
        help="of --dataset folder: number of images for validation, or their share of those with a label: 1/5",
    )
    parser.add_argument("--out", required=True, help="the split is written to OUT/<labels>/<seed>")
    parser.add_argument("--method", choices=("random", "class-covering", "every-rth"), help=METHOD_HELP)
    parser.add_argument("--image-dir", default=DataConfig.image_dir, help="of --dataset folder, as data.image_dir")
    parser.add_argument("--label-dir", default=DataConfig.label_dir, help="of --dataset folder, as data.label_dir")
    parser.add_argument("--classes", default=DataConfig.classes, help="of --dataset folder, as data.classes")
    return parser


def _among(names: Sequence[str], path: Path) -> list[str]:
    """Those of `names` that are in the list at `path`. Raises UserError if the list has other ids."""
    wanted = set(read_lines(path))
    if unknown := sorted(wanted - set(names)):
        raise UserError(f"--among {path} contains {unknown[0]}, which is not a training image with a label")
    return [name for name in names if name in wanted]


def check_labels(reader: Folder, names: Sequence[str]) -> None:
    """Read the labels of `names` and print the classes that do not occur.

    Raises:
        UserError: there are no labels; or a label is damaged, has another size than its image, or contains a value or a
            color that is neither a class nor ignored.
    """
    strays = reader.stray_labels()
    if not names:
        hint = f"; e.g. {strays[0]} belongs to no image" if strays else ""
        raise UserError(
            f"{reader.layout}: no image has a label: a mask has the name of its image; for other names set patterns,"
            f" --image-dir 'images/{{name}}_image.png' --label-dir 'masks/{{name}}_mask.png'{hint}"
        )
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: reader.check_size(name, with_label=True), names))
        occurs = np.stack(list(pool.map(lambda name: classes_in(reader, name), names))).any(0)
    print(f"{len(names)} images have a label; {len(reader.names('train')) - len(names)} have none")
    if strays:
        print(f"note: {len(strays)} labels belong to no image, e.g. {strays[0]}")
    if absent := [name for name, seen in zip(reader.classes, occurs) if not seen]:
        print(f"note: no label contains {', '.join(absent)}")


def _draw_valid(reader: Reader, names: Sequence[str], share: str) -> list[str]:
    if not isinstance(reader, Folder) or reader.has_validation:
        raise UserError(f"--valid {share}: {reader.layout} has its own images for validation")
    count = _count(share, len(names), "--valid")
    if count >= len(names):
        raise UserError(f"--valid {share}: of {len(names)} images with a label none is left to learn from")
    return sorted(choose_random(names, count, seed=0))


def _count(labels: str, total: int, flag: str = "--labels") -> int:
    """Number of images of `total`; a share is rounded up, as in the published lists."""
    share = _number(labels, flag)
    return math.ceil(share * total) if "/" in labels else int(share)


def _step(labels: str, total: int) -> int:
    """The r of every-rth. Raises UserError if no r gives the requested number."""
    share = _number(labels)
    if "/" in labels:
        if share.numerator != 1:
            raise UserError(f"--labels {labels}: every-rth takes shares such as 1/8")
        return share.denominator
    step = math.ceil(total / share)
    given = math.ceil(total / step)
    if given != share:
        raise UserError(f"--labels {labels}: there is no r for {total} images; every {step}th gives {given}")
    return step


def _number(labels: str, flag: str = "--labels") -> Fraction:
    try:
        number = Fraction(labels)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{flag} {labels}: give a number of images or a share such as 1/8") from None
    if number <= 0 or ("/" in labels and number > 1) or ("/" not in labels and number.denominator != 1):
        raise UserError(f"{flag} {labels}: give a number of images or a share such as 1/8")
    return number


if __name__ == "__main__":
    main()
