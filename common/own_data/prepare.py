"""Describe a folder of images and masks: patterns, class list and split, as the `data` section of a config."""

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.sections import DataConfig
from common.datasets import open_reader
from common.datasets.folder import Folder
from common.errors import UserError
from common.own_data.classes import propose_classes
from common.own_data.discover import Layout, discover
from common.splits.split import Split, candidates, choose_random, complete, write_split

CLASS_FILE = "classes.txt"
PLACEHOLDER = re.compile(r"class_\d+")
VALID_SHARE = 5  # one of so many images with a mask is for validation


@dataclass(frozen=True)
class Choices:
    """Choices of the user; None for what is in the folder.

    Attributes:
        images, labels: Patterns, as in `data.image_dir` and `data.label_dir`.
        classes: Class list.
        value_range: As `data.image_range`.
        out: Folder of the files that are written; by default `<folder>-training` beside the folder.
    """

    images: str | None = None
    labels: str | None = None
    classes: Path | None = None
    value_range: tuple[float, float] | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """A folder of one's own, described.

    Attributes:
        reader: Its reader.
        data: Values of the config's `data` section, without sizes.
        split: The split, not written yet.
        out: Folder of the files that are written.
    """

    reader: Folder
    data: dict[str, Any]
    split: Split
    out: Path

    @property
    def has_placeholders(self) -> bool:
        """Does the class list still have names that were made from the masks?"""
        return any(PLACEHOLDER.fullmatch(name) for name in self.reader.classes)

    @property
    def config_path(self) -> Path:
        """Path of the config, named like the folder, which names the run."""
        return self.out / f"{Path(self.data['root']).resolve().name}.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder and the user's choices to a command line."""
    parser.add_argument("folder", type=Path, help="folder with images and masks, in any folders below it")
    parser.add_argument("--images", metavar="PATTERN", help="names of the images, e.g. 'images/{name}_image.png'")
    parser.add_argument("--labels", metavar="PATTERN", help="names of the masks, or a COCO file")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class list; by default classes.txt in the folder")
    parser.add_argument(
        "--image-range", type=float, nargs=2, metavar=("BLACK", "WHITE"), help="values of images of more than 8 bits"
    )
    parser.add_argument("--out", type=Path, help="folder of the written files; by default FOLDER-training")


def choices_from(args: argparse.Namespace) -> Choices:
    """The user's choices on a command line of `add_arguments`."""
    value_range = tuple(args.image_range) if args.image_range else None
    return Choices(args.images, args.labels, args.classes, value_range, args.out)


def prepare(root: Path, choices: Choices) -> Prepared:
    """Describe the folder `root`. Only a class list is written, if there is none.

    A class list is `classes.txt` in the folder or, from an earlier call, in the folder of written files.

    Raises:
        UserError: no images or masks, several patterns that fit, masks that cannot be read, fewer than two images with
            a mask; see also `propose_classes` and `Folder`.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give the folder that contains images and masks")
    out = choices.out or Path(f"{str(root).rstrip('/')}-training" if root.name else f"{root.resolve()}-training")
    layout = _layout(root, choices)
    class_path = _class_list(root, layout, out, choices.classes)
    data = {"dataset": "folder", "root": str(root), "image_dir": layout.images, "label_dir": layout.labels}
    data["classes"] = os.path.relpath(class_path, root)
    if choices.value_range is not None:
        data["image_range"] = list(choices.value_range)
    reader = open_reader(DataConfig(**data))
    split = _split(reader, root)
    data["split"] = str(out / "splits" / str(len(split.labeled)) / "0")
    return Prepared(reader, data, split, out)


def write(prepared: Prepared, config: dict[str, Any]) -> None:
    """Write split and config. Raises UserError where files with other content are in their places."""
    path, text = prepared.config_path, _in_lines(config)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path} exists with other values: remove it to have it written again, or give another --out")
    write_split(prepared.data["split"], prepared.split)
    _write_text(path, text)


def _layout(root: Path, choices: Choices) -> Layout:
    if choices.images and choices.labels:
        return Layout(choices.images, choices.labels, 0)
    return discover(root, choices.images, choices.labels)


def _class_list(root: Path, layout: Layout, out: Path, given: Path | None) -> Path:
    """Path of the class list, which is made from the masks if there is none."""
    for path in [given] if given else [root / CLASS_FILE, out / CLASS_FILE]:
        if path.is_file():
            return path
    if given:
        raise UserError(f"--classes {given} does not exist")
    _write_text(out / CLASS_FILE, "\n".join(propose_classes(root, layout.images, layout.labels)) + "\n")
    return out / CLASS_FILE


def _split(reader: Folder, root: Path) -> Split:
    """All masks are used: a fifth for validation unless the folder names validation images, the rest for training."""
    names = candidates(reader)
    if reader.has_validation:
        valid: Sequence[str] = [name for name in reader.names("val") if reader.has_label(name)]
    else:
        if len(names) < 2:
            raise UserError(
                f"{len(names)} images in {root} have a mask: at least 2 are needed, one of them for validation"
            )
        valid = sorted(choose_random(names, -(-len(names) // VALID_SHARE), seed=0))
    labeled = sorted({*names} - {*valid})
    if not labeled or not valid:
        raise UserError(f"{reader.layout}: no image with a mask for {'validation' if labeled else 'training'}")
    return complete(reader, labeled, valid)


def _in_lines(config: dict[str, Any]) -> str:
    """JSON with one key per line; lists stay on theirs."""
    text = json.dumps(config, indent=2) + "\n"
    return re.sub(
        r"\[[^\]{}]*\]", lambda match: re.sub(r"\s*\n\s*", " ", match[0]).replace("[ ", "[").replace(" ]", "]"), text
    )


def _write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another folder with --out") from None
