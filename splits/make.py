"""Make a split: choose which images of a dataset are labeled.

    python splits/make.py --dataset voc --data-root data/VOC2012 --labels 662 --seed 0 --out splits/voc

writes splits/voc/662/0/{labeled,unlabeled,valid}_filename.txt. The same dataset, labels and seed give the same lists.
Labeled images are chosen among those for training that have a label (with --among FILE, of them those of a list); all
others for training are unlabeled; the dataset's own validation images are for validation. A split that exists is never
written over.

Methods:
  random          each image alike; of one seed, fewer labels are part of more
  class-covering  random, but every class that occurs in the dataset occurs in the labeled images
  every-rth       every r-th of the sorted ids, whatever the seed: with 1/16 .. 1/2 these are the lists of CPS and CPCL
                  for VOC (theirs for Cityscapes follow another order)
"""

import argparse
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from common.config import DataConfig
from common.datasets import open_source
from common.datasets.source import read_lines
from common.datasets.splits import (
    candidates,
    choose_class_covering,
    choose_every,
    choose_random,
    complete,
    write_split,
)
from common.errors import UserError, told

METHOD_HELP = "class-covering by default for the built-in data, else random"


@told
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    folder_only = {"image_dir": args.image_dir, "label_dir": args.label_dir, "classes": args.classes}
    source = open_source(DataConfig(args.dataset, args.data_root, split="", **folder_only))
    names = candidates(source)
    if args.among:
        names = _among(names, args.among)
    count = _count(args.labels, len(names))
    method = args.method or ("class-covering" if args.dataset == "shapes" else "random")
    if method == "random":
        labeled = choose_random(names, count, args.seed)
    elif method == "class-covering":
        labeled = choose_class_covering(source, names, count, args.seed)
    else:
        labeled = choose_every(names, _step(args.labels, len(names)))
    split = complete(source, labeled)
    folder = Path(args.out, str(len(split.labeled)), str(args.seed))
    write_split(folder, split)
    print(
        f"{folder}: {len(split.labeled)} labeled, {len(split.unlabeled)} unlabeled, {len(split.valid)} for validation"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, choices=("voc", "cityscapes", "folder", "shapes"))
    parser.add_argument("--data-root", required=True, help="folder of the dataset")
    parser.add_argument(
        "--labels", required=True, help="number of labeled images, or their share of those with a label: 1/8"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--among",
        type=Path,
        help="list of ids, one a line: only these become labeled (VOC's own train.txt: the classic protocol)",
    )
    parser.add_argument("--out", required=True, help="the split is written to OUT/<labels>/<seed>")
    parser.add_argument("--method", choices=("random", "class-covering", "every-rth"), help=METHOD_HELP)
    parser.add_argument("--image-dir", default=DataConfig.image_dir, help="of --dataset folder, as data.image_dir")
    parser.add_argument("--label-dir", default=DataConfig.label_dir, help="of --dataset folder, as data.label_dir")
    parser.add_argument("--classes", default=DataConfig.classes, help="of --dataset folder, as data.classes")
    return parser


def _among(names: Sequence[str], path: Path) -> list[str]:
    """Those of `names` that the list at `path` names. Raises UserError where it names something else."""
    wanted = set(read_lines(path))
    if unknown := sorted(wanted - set(names)):
        raise UserError(f"--among {path} names {unknown[0]}, which is no image for training with a label")
    return [name for name in names if name in wanted]


def _count(labels: str, total: int) -> int:
    """The number of labeled images of `total`; a share is rounded up, as in the published lists."""
    share = _number(labels)
    return math.ceil(share * total) if "/" in labels else int(share)


def _step(labels: str, total: int) -> int:
    """The r of every-rth. Raises UserError where no r gives the number asked for."""
    share = _number(labels)
    if "/" in labels:
        if share.numerator != 1:
            raise UserError(f"--labels {labels}: every-rth takes shares such as 1/8")
        return share.denominator
    step = math.ceil(total / share)
    given = math.ceil(total / step)
    if given != share:
        raise UserError(f"--labels {labels}: no every-rth of {total} images has so many; every {step}th are {given}")
    return step


def _number(labels: str) -> Fraction:
    try:
        number = Fraction(labels)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--labels {labels}: give a number of images or a share such as 1/8") from None
    if number <= 0 or ("/" in labels and number > 1) or ("/" not in labels and number.denominator != 1):
        raise UserError(f"--labels {labels}: give a number of images or a share such as 1/8")
    return number


if __name__ == "__main__":
    main()
