"""Look at the data a config names, before a long run does.

    python -m common.check_data --config prcl/configs/voc.json --data.root data/VOC2012

The config may also be one that a paper's own repository released.
Every image of the three lists is decoded, and every label of the labeled and the validation list. Reported are the tree
that was found, the lists and which published ones they are, missing and broken files, sizes, and the share of pixels of
each class. The last line is the verdict; the exit status is 2 when something is wrong.
"""

import argparse
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.progress import track
from rich.table import Table

from common import IGNORE
from common.config import load_config, to_dict
from common.config.files import Translation, flatten
from common.config.parsing import override_split_source, seed_split
from common.config.sections import DataConfig, SharedConfig
from common.datasets import Reader, open_reader
from common.errors import UserError
from common.splits.published import said_of
from common.splits.split import Split, split_of

SHOWN_FAULTS = 5
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Findings:
    """What the files of one list hold: `sizes` counts (width, height), `pixels` int64 [256] class ids and 255."""

    images: int = 0
    missing: int = 0
    broken: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(IGNORE + 1, np.int64))
    faults: list[str] = field(default_factory=list)


def inspect(
    reader: Reader, names: Sequence[str], with_labels: bool, progress: Callable[[Iterable], Iterable]
) -> Findings:
    """Read the images of `names`, and their labels if `with_labels`; `progress` wraps the iterable of results."""
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


def problems(config: SharedConfig, reader: Reader, split: Split, found: dict[str, Findings]) -> list[str]:
    """What is wrong with the lists and with what was found in their files, a line each."""
    told = []
    for name, findings in found.items():
        told += [f"{name}: {fault}" for fault in findings.faults[:SHOWN_FAULTS]]
        if len(findings.faults) > SHOWN_FAULTS:
            told.append(f"{name}: {len(findings.faults) - SHOWN_FAULTS} more files are missing or broken")
    if not config.data.allow_overlap:
        told += _overlap("labeled", split.labeled, "unlabeled", split.unlabeled, ", without data.allow_overlap")
    for name, names in (("labeled", split.labeled), ("unlabeled", split.unlabeled)):
        told += _overlap(name, names, "valid", split.valid, "")
    for name in ("labeled", "valid"):
        if not found[name].pixels[:IGNORE].any():
            told.append(f"{name}: no pixel of any class")
    if len(reader.classes) != config.model.num_classes:
        told.append(f"model.num_classes is {config.model.num_classes}, but the data have {len(reader.classes)} classes")
    return told


def _overlap(first: str, names: list[str], second: str, others: list[str], unless: str) -> list[str]:
    both = sorted(set(names) & set(others))
    return [f"{len(both)} images are both {first} and {second}{unless}, {both[0]} for one"] if both else []


def report(console: Console, reader: Reader, found: dict[str, Findings]) -> None:
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


def check(config: SharedConfig, console: Console) -> list[str]:
    """Report on the data of `config`; what is wrong comes back, a line each.

    Raises UserError when there is no tree or no split to report on.
    """
    _say(console, f"dataset: {config.data.dataset}")
    reader = open_reader(config.data)
    _say(console, f"layout: {reader.layout}")
    split = split_of(config.data, reader, allow_overlap=True)
    _say(console, f"split: {config.data.lists}")
    _say(console, said_of(split.labeled, split.unlabeled))
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
        _say(console, f"note: no labeled image shows {', '.join(unseen)}")
    if data.allow_overlap:
        for line in _overlap("labeled", split.labeled, "unlabeled", split.unlabeled, ""):
            _say(console, f"note: {line}, as data.allow_overlap accepts")


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def translate(text: str) -> Translation | None:
    """A config file that any paper's repository released, in our words; None where `text` is none.

    Papers are asked by the file that each keeps for this, `released.py`: none is named here.

    Raises:
        UserError: those that know the kind of file do not know what is in it; each is named with what it lacks.
    """
    wrong: dict[str, list[str]] = {}
    for path in sorted(ROOT.glob("*/released.py")):
        paper = path.parent.name
        try:
            found = importlib.import_module(f"{paper}.released").translate(text)
        except UserError as error:  # the releases of two papers have files of one kind
            wrong.setdefault(str(error), []).append(paper)
            continue
        if found is not None:
            return found
    if wrong:
        raise UserError("\n".join(f"as a config of {' or '.join(papers)}: {told}" for told, papers in wrong.items()))
    return None


class AnyConfig(SharedConfig):
    """The shared sections of our configs and of released ones."""

    from_released = staticmethod(translate)


def read_config(argv: Sequence[str]) -> SharedConfig:
    """Sections `data`, `model` and `run` of the file after `--config`, with `--dotted.overrides`; no others.

    Raises UserError as `common.config.load_config`.
    """
    files = argparse.ArgumentParser(prog="python -m common.check_data", description=__doc__, allow_abbrev=False)
    files.formatter_class = argparse.RawDescriptionHelpFormatter
    files.add_argument(
        "--config", required=True, help="config of any paper, also as released; --data.KEY and --model.KEY override it"
    )
    args, overrides = files.parse_known_args(argv)
    config = load_config(AnyConfig, args.config, only_known=True)
    parser = ArgumentParser(exit_on_error=False, parser_mode="json")
    parser.add_class_arguments(SharedConfig)
    parser.set_defaults(flatten(to_dict(config)))
    try:
        sections = parser.instantiate(parser.parse_args(overrides))
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from None
    config = SharedConfig(sections.data, sections.model, sections.run)
    override_split_source(config.data, {argument.split("=")[0] for argument in overrides})
    seed_split(config)
    return config


def main(argv: Sequence[str] | None = None) -> None:
    console = Console()
    try:
        wrong = check(read_config(sys.argv[1:] if argv is None else argv), console)
    except UserError as error:
        wrong = [str(error)]
    for line in wrong:
        _say(console, f"wrong: {line}")
    _say(console, "verdict: something is wrong, see above" if wrong else "verdict: the data can be used")
    if wrong:
        sys.exit(2)


if __name__ == "__main__":
    main()
