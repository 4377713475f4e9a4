"""Identification of published splits by the checksums and origins in `splits/published.json`.

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
CLONES = "published"  # folder of the clones in printed commands


@cache
def record() -> dict[str, Any]:
    """Content of `splits/published.json`, which `splits/record.py` writes."""
    return json.loads(resources.files("splits").joinpath("published.json").read_text(encoding="utf-8"))


def checksum(ids: Sequence[str]) -> str:
    """SHA-256 (hexadecimal) of ids in any order: sorted, one per line, Cityscapes' without `_leftImg8bit`."""
    lines = sorted(name.removesuffix("_leftImg8bit") for name in ids)
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def entry_at(path: str | Path, labels: int | None = None) -> dict[str, Any] | None:
    """Entry of the published split or list for `path`: its path in a repository, or the place that configs expect.

    Args:
        path: Path of a folder or file, which need not exist.
        labels: Number of labeled images, for an order of images.
    """
    for entry in record()["splits"]:
        at = _ends(path, entry["place"]) or _ends(path, entry["name"])
        if at and entry.get("labels") == labels:
            return entry
    lists = record()["lists"]
    return next((entry for entry in lists if "place" in entry and _ends(path, entry["place"])), None)


def same_as(labeled: Sequence[str], unlabeled: Sequence[str]) -> list[dict[str, Any]]:
    """Published splits with exactly these ids; some are shared by several papers."""
    lists = [(kind, len(ids), checksum(ids)) for kind, ids in (("labeled", labeled), ("unlabeled", unlabeled))]
    return [entry for entry in record()["splits"] if all(_is(entry[kind], *summary) for kind, *summary in lists)]


def equals(published: dict[str, Any], ids: Sequence[str]) -> bool:
    """Are these the ids of a published list? A list whose checksum is not recorded is compared by their number."""
    return _is(published, len(ids), checksum(ids))


def _is(published: dict[str, Any], count: int, sha256: str) -> bool:
    return published["count"] == count and published["sha256"] in (sha256, None)


def said_of(labeled: Sequence[str], unlabeled: Sequence[str]) -> str:
    """Describe the published splits that equal lists of ids, or the absence of any."""
    if same := same_as(labeled, unlabeled):
        return f"published split: {' = '.join(map(full_name, same))}"
    found = checksum(labeled)
    half = [full_name(entry) for entry in record()["splits"] if entry["labeled"]["sha256"] == found]
    also = f"; the labeled images equal those of {' = '.join(half)}" if half else ""
    return f"published split: none{also}"


def full_name(entry: dict[str, Any]) -> str:
    """Repository, path in it and, for an order of images, the number of labels, as arguments of splits/adopt.py."""
    return entry["name"] + (f" --labels {entry['labels']}" if "labels" in entry else "")


def commands(entry: dict[str, Any], root: str, place: str | Path) -> str:
    """Shell commands that download a published split from its repository, verify it, and put it at `place`.

    Args:
        entry: Entry of `record`: a split, or a list with a place.
        root: Folder of the dataset.
        place: Path that configs expect: a split, a list inside the dataset's folder, or an order of images.
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
        if TEST_LIST in entry["defects"] or entry["unlabeled"]["sha256"] is None:
            lines[-1] += dataset
    return "\n".join(f"  {line}" for line in lines)


def _ends(path: str | Path, tail: str) -> bool:
    parts = Path(tail).parts
    return Path(path).parts[-len(parts) :] == parts
