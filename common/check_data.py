"""Check the dataset of a config before training on it, or describe a folder of images and masks.

    python -m common.check_data --config prcl/configs/voc.json --data.root data/VOC2012
    python -m common.check_data data/mine

Every image of the three lists is decoded, and every label of the labeled and the validation list. The report names the
layout of the dataset, the lists and the published split they belong to, missing and broken files, image sizes, and the
share of pixels per class. The last line is the result; the exit status is 2 if there are problems.

With a folder, patterns of the names, classes and split are found, checked as above, and written with a config to the
folder `<folder>-training` (docs/your_data.md), with a picture of images and masks.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from common import IGNORE
from common.config.parsing import config_of, read_arguments
from common.config.sections import BaseConfig, DataConfig
from common.datasets import Reader, open_reader
from common.datasets.folder import Folder
from common.datasets.pixels import has_more_than_8_bits
from common.datasets.reader import picture_size
from common.errors import UserError
from common.own_data.plan import choose_config, this_machine
from common.own_data.prepare import Prepared, add_arguments, choices_from, prepare, write
from common.own_data.sheet import FILE as SHEET
from common.own_data.sheet import save_sheet
from common.splits.published import said_of
from common.splits.split import Split, split_of

ABOUT = "Check the dataset of a config before training on it; --data.KEY and --model.KEY override the config file."
ABOUT_FOLDER = "Find images, masks and classes in a folder, check them, and write a config, a split and a picture."
SHOWN_FAULTS = 5
LARGE_IMAGE = 4  # shorter side of an image, in crops
RARE = 0.01  # share of the labeled pixels


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


def check(config: BaseConfig, console: Console, split: Split | None = None) -> tuple[list[str], list[str]]:
    """Print a report on the data of `config`, and return its problems and further notes, one line each.

    Args:
        config: The config.
        console: Where the report is printed.
        split: The split, if it is not written yet.

    Raises:
        UserError: no dataset or no split to report on.
    """
    _print(console, f"dataset: {config.data.dataset}")
    reader = open_reader(config.data)
    _print(console, f"layout: {reader.layout}")
    split = split or split_of(config.data, reader, allow_overlap=True)
    _print(console, f"split: {config.data.lists}")
    _print(console, said_of(split.labeled, split.unlabeled))
    found = {}
    watch = partial(track, console=console, transient=True, disable=not console.is_terminal)
    for name, names in (("labeled", split.labeled), ("unlabeled", split.unlabeled), ("valid", split.valid)):
        progress = partial(watch, description=name, total=len(names))
        found[name] = inspect(reader, names, name != "unlabeled", progress)
    report(console, reader, found)
    notes = _notes(reader, config.data, split, found)
    for line in notes:
        _print(console, f"note: {line}")
    return problems(config, reader, split, found), notes


def _notes(reader: Reader, data: DataConfig, split: Split, found: dict[str, Findings]) -> list[str]:
    """Further findings, which are not problems, one line each."""
    lines = []
    labeled, valid = found["labeled"].pixels[:IGNORE], found["valid"].pixels[:IGNORE]
    unseen = [name for name, here, there in zip(reader.classes, labeled, valid) if there and not here]
    if unseen:
        lines.append(f"no labeled image contains {', '.join(unseen)}")
    shares = labeled / max(1, labeled.sum())
    rare = [f"{name} ({100 * share:.2f} %)" for name, share in zip(reader.classes, shares) if 0 < share < RARE]
    if rare:
        lines.append(
            f"rare in the labeled pixels: {', '.join(rare)}; data.class_balanced true draws them more often, and"
            " optim.supervised_loss ce+dice counts every class equally"
        )
    if isinstance(reader, Folder):
        lines += _folder_notes(reader, split, found)
    if data.allow_overlap:
        both = _overlap("labeled", split.labeled, "unlabeled", split.unlabeled, "")
        lines += [f"{line}, accepted by data.allow_overlap" for line in both]
    return lines


def _folder_notes(reader: Folder, split: Split, found: dict[str, Findings]) -> list[str]:
    lines = []
    if strays := reader.stray_labels():
        lines.append(f"{len(strays)} masks belong to no image, e.g. {strays[0]}")
    if not found["labeled"].faults and has_more_than_8_bits(reader.image_path(split.labeled[0])):
        low, high = reader.value_range or (0, 65535)
        lines.append(f"images have more than 8 bits: {low:g} to {high:g} become 0 to 255 (data.image_range)")
    return lines


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def describe(prepared: Prepared, console: Console) -> tuple[dict[str, Any], list[str], list[str]]:
    """Check a folder, and if it is sound write its config, split and contact sheet.

    Returns:
        The config, and problems and notes, one line each.

    Raises:
        UserError: files with other content are in the way.
    """
    reader, split = prepared.reader, prepared.split
    sides = shorter_sides(reader, [*split.labeled, *split.unlabeled])
    config = choose_config(prepared.data, split, len(reader.classes), sides, this_machine())
    found, notes = check(config_of(BaseConfig, config, prepared.config_path), console, split)
    if not found:
        save_sheet(reader, sorted([*split.labeled, *split.valid]), prepared.out / SHEET)
        write(prepared, config)
    if sides and sorted(sides)[len(sides) // 2] > LARGE_IMAGE * config["data"]["crop_size"][0]:
        notes.append(
            "images are much larger than the crops, of which training sees one at a time;"
            " smaller copies of images and masks show it more, and are evaluated faster"
        )
    return config, found, notes


def shorter_sides(reader: Reader, names: Sequence[str]) -> list[int]:
    """Shorter side of each image in pixels. Images that cannot be read are left out.

    Raises:
        UserError: none can be read.
    """
    sides, fault = [], None
    for name in names:
        try:
            sides.append(min(picture_size(reader.image_path(name), "image")))
        except UserError as error:
            fault = error
    if not sides:
        raise fault
    return sides


def _describe_folder(argv: Sequence[str], console: Console) -> list[str]:
    parser = argparse.ArgumentParser(prog="python -m common.check_data", description=ABOUT_FOLDER)
    add_arguments(parser)
    args = parser.parse_args(argv)
    prepared = prepare(args.folder, choices_from(args))
    _, found, _ = describe(prepared, console)
    classes = prepared.reader.class_file
    _print(console, f"classes: {classes}" + (": rename them there" if prepared.has_placeholders else ""))
    if not found:
        _print(console, f"picture: {prepared.out / SHEET}: do the colors lie where they should?")
        _print(console, f"config: {prepared.config_path}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    console, argv = Console(), list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and not argv[0].startswith("-"):
            found = _describe_folder(argv, console)
        else:
            config, _ = read_arguments(BaseConfig, "python -m common.check_data", argv, description=ABOUT)
            found, _ = check(config, console)
    except UserError as error:
        found = [str(error)]
    for line in found:
        _print(console, f"problem: {line}")
    _print(console, "result: problems found, see above" if found else "result: the data can be used")
    if found:
        sys.exit(2)


if __name__ == "__main__":
    main()
