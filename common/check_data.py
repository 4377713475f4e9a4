"""Check the dataset of a config before training on it.

    python -m common.check_data --config prcl/configs/voc.json --data.root data/VOC2012

Every image of the three lists is decoded, and every label of the labeled and the validation list. The report names the
layout of the dataset, the lists and the published split they belong to, missing and broken files, image sizes, and the
share of pixels per class. The last line is the result; the exit status is 2 if there are problems.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from common import IGNORE
from common.config.parsing import read_arguments
from common.config.sections import BaseConfig, DataConfig
from common.datasets import Reader, open_reader
from common.errors import UserError
from common.splits.published import said_of
from common.splits.split import Split, split_of

ABOUT = "Check the dataset of a config before training on it; --data.KEY and --model.KEY override the config file."
SHOWN_FAULTS = 5


@dataclass
class Findings:
    """Findings in the files of one list.

    Attributes:
        images: Number of images in the list.
        missing: Images without an image or label file.
        broken: Images with a file that cannot be read.
        sizes: Number of images per (width, height).
        pixels: int64 [256], number of pixels per class id and of the ignored value 255.
        faults: One line per missing or broken file.
    """

    images: int = 0
    missing: int = 0
    broken: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(IGNORE + 1, np.int64))
    faults: list[str] = field(default_factory=list)


def inspect(
    reader: Reader, names: Sequence[str], with_labels: bool, progress: Callable[[Iterable], Iterable]
) -> Findings:
    """Decode all images of `names`, and their labels if `with_labels`; `progress` wraps the iterable of results."""
    findings = Findings(images=len(names))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in progress(pool.map(lambda name: _inspect_one(reader, name, with_labels), names)):
            findings.missing += part.missing
            findings.broken += part.broken
            findings.sizes += part.sizes
            findings.pixels += part.pixels
            findings.faults += part.faults
    return findings


def _inspect_one(reader: Reader, name: str, with_labels: bool) -> Findings:
    try:
        reader.image_path(name)
        if with_labels:
            reader.label_path(name)
    except UserError as error:
        return Findings(missing=1, faults=[str(error)])
    try:
        image, label = reader.read_pair(name) if with_labels else (reader.read_image(name), None)
    except UserError as error:
        return Findings(broken=1, faults=[str(error)])
    found = Findings(sizes=Counter([(image.shape[2], image.shape[1])]))
    if label is not None:
        found.pixels += np.bincount(label.numpy().ravel(), minlength=IGNORE + 1)
    return found


def problems(config: BaseConfig, reader: Reader, split: Split, found: dict[str, Findings]) -> list[str]:
    """List the problems of the lists and of their files, one line each."""
    lines = []
    for name, findings in found.items():
        lines += [f"{name}: {fault}" for fault in findings.faults[:SHOWN_FAULTS]]
        if len(findings.faults) > SHOWN_FAULTS:
            lines.append(f"{name}: {len(findings.faults) - SHOWN_FAULTS} more files are missing or broken")
    if not config.data.allow_overlap:
        lines += _overlap("labeled", split.labeled, "unlabeled", split.unlabeled, ", and data.allow_overlap is not set")
    for name, names in (("labeled", split.labeled), ("unlabeled", split.unlabeled)):
        lines += _overlap(name, names, "valid", split.valid, "")
    for name in ("labeled", "valid"):
        if not found[name].pixels[:IGNORE].any():
            lines.append(f"{name}: no pixel of any class")
    if len(reader.classes) != config.model.num_classes:
        lines.append(f"model.num_classes is {config.model.num_classes}, but the data has {len(reader.classes)} classes")
    return lines


def _overlap(first: str, names: list[str], second: str, others: list[str], ending: str) -> list[str]:
    both = sorted(set(names) & set(others))
    return [f"{len(both)} images are both {first} and {second}{ending}, e.g. {both[0]}"] if both else []


def report(console: Console, reader: Reader, found: dict[str, Findings]) -> None:
    """Print the tables of the lists and of the classes."""
    lists = Table("list", "images", "missing", "broken", "sizes (width x height)", title="Lists")
    for name, findings in found.items():
        lists.add_row(name, *map(str, (findings.images, findings.missing, findings.broken)), _sizes(findings.sizes))
    console.print(lists)

    classes = Table("id", "class", title="Share of pixels, %")
    for name in ("labeled", "valid"):
        classes.add_column(name, justify="right")
    for class_id, name in [*enumerate(reader.classes), (IGNORE, "(ignore)")]:
        shares = (_share(found[kind].pixels, class_id) for kind in ("labeled", "valid"))
        classes.add_row(str(class_id), name, *shares)
    console.print(classes)


def _sizes(sizes: Counter[tuple[int, int]]) -> str:
    if not sizes:
        return "-"
    if len(sizes) == 1:
        return "{}x{}".format(*next(iter(sizes)))
    widths, heights = zip(*sizes)
    return f"{len(sizes)} sizes, {min(widths)}-{max(widths)} x {min(heights)}-{max(heights)}"


def _share(pixels: np.ndarray, class_id: int) -> str:
    return f"{100 * pixels[class_id] / pixels.sum():.2f}" if pixels[class_id] else "-"


def check(config: BaseConfig, console: Console) -> list[str]:
    """Print a report on the data of `config`, and return its problems, one line each.

    Raises:
        UserError: no dataset or no split to report on.
    """
    _print(console, f"dataset: {config.data.dataset}")
    reader = open_reader(config.data)
    _print(console, f"layout: {reader.layout}")
    split = split_of(config.data, reader, allow_overlap=True)
    _print(console, f"split: {config.data.lists}")
    _print(console, said_of(split.labeled, split.unlabeled))
    found = {}
    watch = partial(track, console=console, transient=True, disable=not console.is_terminal)
    for name, names in (("labeled", split.labeled), ("unlabeled", split.unlabeled), ("valid", split.valid)):
        progress = partial(watch, description=name, total=len(names))
        found[name] = inspect(reader, names, name != "unlabeled", progress)
    report(console, reader, found)
    _notes(console, reader, config.data, split, found)
    return problems(config, reader, split, found)


def _notes(console: Console, reader: Reader, data: DataConfig, split: Split, found: dict[str, Findings]) -> None:
    unseen = [
        name
        for class_id, name in enumerate(reader.classes)
        if found["valid"].pixels[class_id] and not found["labeled"].pixels[class_id]
    ]
    if unseen:
        _print(console, f"note: no labeled image contains {', '.join(unseen)}")
    if data.allow_overlap:
        for line in _overlap("labeled", split.labeled, "unlabeled", split.unlabeled, ""):
            _print(console, f"note: {line}, accepted by data.allow_overlap")


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    console = Console()
    try:
        config, _ = read_arguments(BaseConfig, "python -m common.check_data", argv, description=ABOUT)
        found = check(config, console)
    except UserError as error:
        found = [str(error)]
    for line in found:
        _print(console, f"problem: {line}")
    _print(console, "result: problems found, see above" if found else "result: the data can be used")
    if found:
        sys.exit(2)


if __name__ == "__main__":
    main()
