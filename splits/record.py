"""A maintainer's tool: write splits/published.json (counts, checksums and defects) from the published lists.

    python splits/record.py published

expects clones below `published`, or only their folders with lists, each in a folder with its repository's name in the
table below. It stops at an incomplete list or an unknown defect.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError, report_errors
from common.splits.lists import KINDS, find_lists, published_id, read_ids
from common.splits.orders import read_order
from common.splits.published import SAME_LIST, SHARED_ID, TEST_LIST, checksum

RECORD = Path(__file__).parent / "published.json"

REPOSITORIES = {
    "PRCL": "https://github.com/Haoyu-Xie/PRCL",
    "CAC": "https://github.com/dvlab-research/Context-Aware-Consistency",
    "TorchSemiSeg": "https://github.com/charlesCXK/TorchSemiSeg",
    "SemiSeg-Contrastive": "https://github.com/Shathe/SemiSeg-Contrastive",
    "UniMatch": "https://github.com/LiheYoung/UniMatch",
    "UniMatch-V2": "https://github.com/LiheYoung/UniMatch-V2",
    "reco": "https://github.com/lorenmt/reco",
}


@dataclass(frozen=True)
class Splits:
    """Splits of one repository in one layout.

    Attributes:
        repository: Name of the repository.
        path: Pattern of the paths given to splits/adopt.py.
        dataset: As in `data.dataset`.
        whole: Name of the list that labeled and unlabeled images make together; the number of its images if it is not
            at hand, where the unlabeled images are all that are not labeled.
        place: Folder where configs expect the splits; it replaces `fixed` in their paths.
        fixed: First part of the paths.
        known: Defects that the splits may have; others are an error.
        labels: For orders of images, numbers of labeled images in the paper's configs.
    """

    repository: str
    path: str
    dataset: str
    whole: str | int
    place: str
    fixed: str
    known: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()


SPLITS = (
    Splits("PRCL", "VOC_split/*/*", "voc", "train_aug", "splits/voc", "VOC_split"),
    Splits(
        "PRCL", "CityScapes_split/*/*", "cityscapes", "train", "splits/cityscapes", "CityScapes_split", (TEST_LIST,)
    ),
    Splits("CAC", "dataloaders/voc_splits*/*_train_supervised.txt", "voc", "train_aug", "splits", "dataloaders"),
    Splits(
        "CAC",
        "dataloaders/city_splits*/*_train_supervised.txt",
        "cityscapes",
        "train",
        "splits",
        "dataloaders",
        (SAME_LIST,),
    ),
    Splits(
        "TorchSemiSeg", "DATA/pascal_voc/subset_train_aug/train_aug_labeled_*.txt", "voc", "train_aug", "data", "DATA"
    ),
    Splits(
        "TorchSemiSeg",
        "DATA/pascal_voc/subset_train_aug/pseudoseg_labeled_*.txt",
        "voc",
        "train",
        "data",
        "DATA",
        (SHARED_ID,),
    ),
    Splits("TorchSemiSeg", "DATA/city/config_new/subset_train/*_labeled_*.txt", "cityscapes", "train", "data", "DATA"),
    Splits("UniMatch", "splits/pascal/*/labeled.txt", "voc", "train_aug", "splits/unimatch", "splits"),
    Splits("UniMatch", "splits/cityscapes/*/labeled.txt", "cityscapes", "train", "splits/unimatch", "splits"),
    Splits("UniMatch", "splits/coco/*/labeled.txt", "coco", 118_287, "splits/unimatch", "splits"),
    Splits("UniMatch-V2", "splits/ade20k/*/labeled.txt", "ade20k", "train", "splits/unimatch", "splits"),
    Splits(
        "SemiSeg-Contrastive",
        "splits/voc/*.pkl",
        "voc",
        "train_aug",
        "splits",
        "splits",
        labels=(212, 530, 1323),
    ),
    Splits(
        "SemiSeg-Contrastive",
        "splits/city/*.pkl",
        "cityscapes",
        "train",
        "splits",
        "splits",
        labels=(100, 372, 744),
    ),
)

# Lists that are not splits. All lists of a name must equal the first.
LISTS = {
    "voc": {
        "train_aug": (
            "SemiSeg-Contrastive/data/voc_list/train_aug.txt",
            "UniMatch/splits/pascal/train_aug.txt",
            "reco/dataset/pascal/train_aug.txt",
        ),
        "train": ("UniMatch/splits/pascal/1464/labeled.txt", "CAC/dataloaders/voc_splits0/1464_train_supervised.txt"),
        "val": (
            "SemiSeg-Contrastive/data/voc_list/val.txt",
            "UniMatch/splits/pascal/val.txt",
            "reco/dataset/pascal/val.txt",
            *(f"CAC/dataloaders/voc_splits{number}/val.txt" for number in range(3)),
        ),
    },
    "cityscapes": {
        "train": ("TorchSemiSeg/DATA/city/config_new/train.txt",),
        "val": (
            "TorchSemiSeg/DATA/city/config_new/val.txt",
            "UniMatch/splits/cityscapes/val.txt",
            *(f"CAC/dataloaders/city_splits{number}/val.txt" for number in range(3)),
        ),
        "test": ("TorchSemiSeg/DATA/city/config_new/test.txt",),
        "train_val": ("TorchSemiSeg/DATA/city/config_new/train_val.txt",),
        **{
            f"train_extra_{count}": (f"TorchSemiSeg/DATA/city/config_new/coarse_split/train_extra_{count}.txt",)
            for count in (3000, 6000, 9000)
        },
    },
    "ade20k": {"val": ("UniMatch-V2/splits/ade20k/val.txt",)},
    "coco": {"val": ("UniMatch/splits/coco/val.txt",)},
}

# Ids that are numbered from 1: their pattern and number.
NUMBERED = {"ade20k": {"train": ("ADE_train_{:08d}", 20_210), "val": ("ADE_val_{:08d}", 2_000)}}

# Where configs expect the first of these.
PLACES = {"voc": {name: f"data/pascal_voc/{name}.txt" for name in ("train_aug", "train")}}


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the repositories")
    made = record_of(parser.parse_args(argv).folder)
    RECORD.write_text(as_text(made), encoding="utf-8")
    print(f"{RECORD}: {len(made['splits'])} splits, {len(made['lists'])} lists")


def record_of(folder: Path) -> dict[str, Any]:
    """Content of splits/published.json, from the lists below `folder`.

    Raises:
        UserError: a missing file, an incomplete list, or an unknown defect.
    """
    wholes: dict[str, dict[str, list[str]]] = {}
    lists = []
    for dataset, named in LISTS.items():
        numbered = NUMBERED.get(dataset, {})
        wholes[dataset] = {
            name: [pattern.format(number + 1) for number in range(count)] for name, (pattern, count) in numbered.items()
        }
        for name, paths in named.items():
            for path in paths:
                ids = read_ids(files_of(folder, path)[path], published_id)
                if set(ids) != set(wholes[dataset].setdefault(name, ids)):
                    raise UserError(f"{path} does not contain the images of {dataset}'s {name} list")
                lists.append({"name": path, "dataset": dataset, "list": name, **_summary(ids)})
            if name in PLACES.get(dataset, ()):
                lists[-len(paths)]["place"] = PLACES[dataset][name]
    splits = [entry for kept in SPLITS for entry in _entries(folder, kept, wholes[kept.dataset])]
    return {"repositories": REPOSITORIES, "lists": lists, "splits": splits}


def files_of(folder: Path, pattern: str) -> dict[str, Path]:
    """Files of a pattern by <repository>/<path in it>; the first folders of a path may be missing.

    Raises:
        UserError: there are none.
    """
    repository, *parts = pattern.split("/")
    for start in range(len(parts)):
        root = Path(folder, repository)
        if found := sorted(root.glob("/".join(parts[start:]))):
            left = "/".join([repository, *parts[:start]])
            return {f"{left}/{path.relative_to(root).as_posix()}": path for path in found}
    raise UserError(f"no {pattern} below {folder}")


def as_text(record: dict[str, Any]) -> str:
    """JSON with a line per list, so that a diff shows the list that changed."""
    parts = [f' "repositories": {json.dumps(record["repositories"], indent=2)}']
    for key in ("lists", "splits"):
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in record[key])
        parts.append(f' "{key}": [\n{lines}\n ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _entries(folder: Path, kept: Splits, wholes: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    """Entries of all splits of a pattern."""
    for path, file in files_of(folder, f"{kept.repository}/{kept.path}").items():
        name = path.removesuffix("_train_supervised.txt").removesuffix("/labeled.txt")
        place = f"{kept.place}/{name.removeprefix(f'{kept.repository}/{kept.fixed}/')}"
        if kept.labels:
            names, order = sorted(wholes[kept.whole]), read_order(file)
            for labels in kept.labels:
                split = [names[index] for index in order[:labels]], [names[index] for index in order[labels:]], None
                yield _entry(name, kept, wholes, *split) | {"labels": labels, "place": place}
            continue
        lists = find_lists(file.parent if file.name == "labeled.txt" else file).names(published_id)
        yield _entry(name, kept, wholes, *(lists.get(kind) for kind in KINDS)) | {"place": place}


def _entry(
    name: str,
    kept: Splits,
    wholes: dict[str, list[str]],
    labeled: list[str],
    unlabeled: list[str] | None,
    valid: list[str] | None,
) -> dict[str, Any]:
    defects = [*_overlap(labeled, unlabeled or ()), *_gaps(kept.whole, wholes, labeled, unlabeled)]
    if valid is not None and set(valid) != set(wholes["val"]):
        defects.append(TEST_LIST if set(valid) == set(wholes.get("test", ())) else "not the validation images")
    if unknown := set(defects) - set(kept.known):
        raise UserError(f"{name}: {', '.join(sorted(unknown))}: not a known defect of these lists")
    others = {"count": kept.whole - len(labeled), "sha256": None} if isinstance(kept.whole, int) else None
    return {
        "name": name,
        "dataset": kept.dataset,
        "whole": kept.whole,
        "labeled": _summary(labeled),
        "unlabeled": others or _summary(unlabeled),
        "valid": None if valid is None else _summary(valid),
        "defects": defects,
    }


def _overlap(labeled: Sequence[str], unlabeled: Sequence[str]) -> list[str]:
    """Defect of lists that share images."""
    both = set(labeled) & set(unlabeled)
    if not both:
        return []
    if set(labeled) == set(unlabeled):
        return [SAME_LIST]
    return [SHARED_ID if len(both) == 1 else f"{len(both)} images are labeled and unlabeled"]


def _gaps(
    whole: str | int, wholes: dict[str, list[str]], labeled: Sequence[str], unlabeled: Sequence[str] | None
) -> list[str]:
    """Defect of lists that are not together the training images."""
    if unlabeled is None:
        return [] if isinstance(whole, int) else ["no unlabeled list"]
    together = set(labeled) | set(unlabeled)
    if isinstance(whole, int):
        return [] if len(together) == whole else [f"not the {whole} training images"]
    return [] if together == set(wholes[whole]) else [f"not the {len(wholes[whole])} images of {whole}"]


def _summary(ids: Sequence[str]) -> dict[str, Any]:
    return {"count": len(ids), "sha256": checksum(ids)}


if __name__ == "__main__":
    main()
