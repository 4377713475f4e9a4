"""Which published split some lists are: `splits/published.json` holds a checksum of every one, and where it is from.

The lists themselves are not part of this project.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

SHARED_ID = "one id is labeled and unlabeled"
SAME_LIST = "the labeled and the unlabeled list are the same"
TEST_LIST = "the validation list names test images, which have no labels"
CLONES = "published"  # folder of the clones in the commands that are told


@cache
def record() -> dict[str, Any]:
    """`splits/published.json`, which `splits/record.py` writes."""
    return json.loads(resources.files("splits").joinpath("published.json").read_text(encoding="utf-8"))


def checksum(ids: Sequence[str]) -> str:
    """SHA-256 of ids as hexadecimal: sorted, one a line, Cityscapes' without `_leftImg8bit`. Order does not matter."""
    lines = sorted(name.removesuffix("_leftImg8bit") for name in ids)
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def entry_at(path: str | Path, labels: int | None = None) -> dict[str, Any] | None:
    """What was published and belongs at `path`: at a repository's path below its name, or where configs expect it.

    Args:
        path: of a folder or file, which need not exist.
        labels: of an order of images, how many are labeled.
    """
    for entry in record()["splits"]:
        at = _ends(path, entry["place"]) or _ends(path, entry["name"])
        if at and entry.get("labels") == labels:
            return entry
    lists = record()["lists"]
    return next((entry for entry in lists if "place" in entry and _ends(path, entry["place"])), None)


def same_as(labeled: Sequence[str], unlabeled: Sequence[str]) -> list[dict[str, Any]]:
    """The published splits that consist of these very ids; several papers share some."""
    sums = (checksum(labeled), checksum(unlabeled))
    return [each for each in record()["splits"] if (each["labeled"]["sha256"], each["unlabeled"]["sha256"]) == sums]


def said_of(labeled: Sequence[str], unlabeled: Sequence[str]) -> str:
    """Which published split lists of ids are, or that they are none, in words."""
    if same := same_as(labeled, unlabeled):
        return f"published split: {' = '.join(map(full_name, same))}"
    found = checksum(labeled)
    half = [full_name(entry) for entry in record()["splits"] if entry["labeled"]["sha256"] == found]
    also = f"; the labeled images are those of {' = '.join(half)}" if half else ""
    return f"published split: none{also}"


def full_name(entry: dict[str, Any]) -> str:
    """Repository, path in it and, of an order of images, how many are labeled, as splits/adopt.py takes them."""
    return entry["name"] + (f" --labels {entry['labels']}" if "labels" in entry else "")


def commands(entry: dict[str, Any], root: str, place: str | Path) -> str:
    """Shell commands that get a published split from its repository, verify it, and put it at `place`.

    Args:
        entry: of `record`, a split or a list with a place.
        root: folder of the dataset.
        place: where configs expect it: a split, a list inside the dataset's folder, or an order of images.
    """
    repository, path = entry["name"].split("/", 1)
    lines = [f"git clone --depth 1 {record()['repositories'][repository]} {CLONES}/{repository}"]
    dataset = f" --dataset {entry['dataset']} --data-root {root}"
    if entry["place"].startswith("data/") or "labels" in entry:  # read as they are
        folder, suffix = Path(place).parent, Path(path).suffix
        copied = f"{path} {place}" if "list" in entry else f"{Path(path).parent}/*{suffix} {folder}"
        lines += [f"mkdir -p {folder}", f"cp {CLONES}/{repository}/{copied}", f"python splits/adopt.py {place}"]
        if "labels" in entry:
            lines[-1] += f" --labels {entry['labels']}{dataset}"
    else:
        lines += [f"python splits/adopt.py {CLONES}/{entry['name']} --out {place}"]
        if TEST_LIST in entry["defects"]:
            lines[-1] += dataset
    return "\n".join(f"  {line}" for line in lines)


def _ends(path: str | Path, tail: str) -> bool:
    parts = Path(tail).parts
    return Path(path).parts[-len(parts) :] == parts
