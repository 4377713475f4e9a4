"""A dataset from a folder of images and a folder of labels."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import IGNORE
from common.datasets.label_colors import Color, ids_of_colors
from common.datasets.reader import (
    UNKNOWN,
    Reader,
    Subset,
    apply_table,
    existing_root,
    open_label,
    read_lines,
    stored_ids,
    table_of,
    voc_palette,
)
from common.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LABEL_SUFFIXES = (".png",)
SUBSET_FIELD = "{subset}"
IGNORED = "ignore"


@dataclass(frozen=True)
class ClassList:
    """Content of a class list.

    Attributes:
        names: Names of the classes, in the order of their ids.
        colors: Colors of the classes in label pictures; empty if labels contain ids.
        ignored_ids, ignored_colors: Label values and colors that become 255; the value 255 is always ignored.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignored_ids: tuple[int, ...]
    ignored_colors: tuple[Color, ...]


class Folder(Reader):
    """Reader of any dataset with a folder of images and a folder of labels.

    Ids are the stems of the image files. Labels are PNGs: palette or 8-bit gray pictures with values 0..C-1 and 255, or
    pictures of any kind if the class list has colors.

    Args:
        root: Folder of the dataset.
        image_dir: Folder of the images (.jpg, .png, .webp), absolute or below `root`. `{subset}` in it stands for
            `train` and `val`: `images/{subset}`, or `{subset}` beside `{subset}annot`. Without it, `val.txt` below
            `root` lists the ids for validation, and all others are for training; without both, a split is needed.
        label_dir: Folder of the labels, in the same way. Files have the stem of their image, optionally followed by the
            same ending in all of them (`0001TP_L.png`). Images for training may lack a label.
        classes: Text file below `root` with a class per line, in the order of the ids: `road`, or `road 128 64 128`
            with its color. Lines such as `ignore 250` and `ignore 0 0 0` name ids and colors to be ignored.

    Raises:
        UserError: a folder or the class list is missing, the list has a wrong line, or an id occurs twice.
    """

    def __init__(self, root: str | Path, image_dir: str, label_dir: str, classes: str) -> None:
        root = existing_root(root)
        self._root = root
        self._image_dir, self._label_dir = image_dir, label_dir
        self._list_path = root / classes
        self._list = read_classes(self._list_path)
        self.classes = self._list.names
        self.palette = voc_palette()
        if self._list.colors:
            self.palette[: len(self.classes)] = self._list.colors
        self._table = table_of(range(len(self.classes)), (IGNORE, *self._list.ignored_ids))
        self._by_subset = SUBSET_FIELD in image_dir
        self._images = _files(root, image_dir, IMAGE_SUFFIXES)
        if not self._images:
            raise UserError(
                f"no images in {root / image_dir}: set data.image_dir; file endings are {', '.join(IMAGE_SUFFIXES)}"
            )
        self._labels = _files(root, label_dir, LABEL_SUFFIXES)
        self._ending = _common_ending(self._images, self._labels)
        self.layout = f"{root}: {image_dir}, {label_dir}" + (f"/*{self._ending}.png" if self._ending else "")

    def names(self, subset: Subset) -> list[str]:
        if self._by_subset:
            folder = self._root / self._image_dir.replace(SUBSET_FIELD, subset)
            return sorted(name for name, path in self._images.items() if path.parent == folder)
        listed = self._root / "val.txt"
        val = set(read_lines(listed)) if listed.is_file() else set()
        if subset == "train":
            return sorted(set(self._images) - val)
        if not val:
            raise UserError(
                f"no images for validation: draw some with splits/make.py --valid 1/5, list their ids in {listed},"
                f" or put {SUBSET_FIELD} in data.image_dir"
            )
        return sorted(val)

    @property
    def has_validation(self) -> bool:
        """Do the folders or `val.txt` define the images for validation?"""
        return self._by_subset or (self._root / "val.txt").is_file()

    def stray_labels(self) -> list[str]:
        """Sorted stems of the label files that belong to no image."""
        return sorted(self._labels.keys() - {name + self._ending for name in self._images})

    def _decode_label(self, path: Path) -> Tensor:
        picture = open_label(path)
        if self._list.colors:
            if picture.mode in ("1", "L"):
                picture = picture.convert("RGB")
            known = str(self._list_path)
            ids = ids_of_colors(picture, path, self._list.colors, self._list.ignored_colors, known)
            return torch.from_numpy(ids)
        if picture.mode in ("RGB", "RGBA"):
            raise UserError(
                f"label {path} is a picture of colors: add the colors of the classes to {self._list_path}, "
                "e.g. `road 128 64 128`"
            )
        return torch.from_numpy(apply_table(self._label_table(path), stored_ids(picture, path), path))

    def _image_candidates(self, name: str) -> list[Path]:
        return [self._images.get(name, self._root / self._image_dir / f"{name}.*")]

    def _label_candidates(self, name: str) -> list[Path]:
        file = name + self._ending
        return [self._labels.get(file, self._root / self._label_dir / f"{file}.png")]

    def _label_table(self, path: Path) -> np.ndarray:
        return self._table


def read_classes(path: Path) -> ClassList:
    """Read a class list. Raises UserError if it is missing or wrong."""
    if not path.is_file():
        raise UserError(f"no class list {path}: write one name per line, in the order of the ids, and set data.classes")
    lines = [_class_line(line) for line in read_lines(path)]
    classes = [(name, values) for name, values in lines if name != IGNORED or not values]
    ignored = [values for name, values in lines if name == IGNORED and values]
    found = ClassList(
        tuple(name for name, _ in classes),
        tuple(values for _, values in classes if values),
        tuple(values[0] for values in ignored if len(values) == 1),
        tuple(values for values in ignored if len(values) == 3),
    )
    if wrong := _wrong_classes(found, [name for name, values in classes if not values]):
        raise UserError(f"class list {path}: {wrong}")
    return found


def _class_line(line: str) -> tuple[str, tuple[int, ...]]:
    """Name in a line, and the numbers after it: a color, an ignored value, or nothing."""
    words = line.replace(",", " ").split()
    count = 1 if words[0] == IGNORED and len(words) == 2 else 3
    values = words[-count:]
    if len(words) > count and all(value.isdecimal() for value in values):
        return " ".join(words[:-count]), tuple(map(int, values))
    return line, ()


def _wrong_classes(found: ClassList, colorless: list[str]) -> str | None:
    """Description of the first problem of a class list; None if there is none."""
    count = len(found.names)
    if not 1 < count <= UNKNOWN:
        return f"it has {count} names; it must have 2 to {UNKNOWN}"
    if IGNORED in found.names:
        return f"the line {IGNORED!r} has no value: write `{IGNORED} 250` or `{IGNORED} 0 0 0`"
    if found.colors and colorless:
        return f"{colorless[0]} has no color, but other classes have one"
    if any(max(color) > IGNORE for color in (*found.colors, *found.ignored_colors, found.ignored_ids or (0,))):
        return f"a value is above {IGNORE}"
    for values in (found.names, (*found.colors, *found.ignored_colors)):
        value, times = Counter(values).most_common(1)[0] if values else (None, 1)
        if times > 1:
            return f"{value} occurs {times} times"
    if taken := [value for value in found.ignored_ids if value < count]:
        return f"{taken[0]} is to be ignored, but is the id of {found.names[taken[0]]}: ids are 0 to {count - 1}"
    return None


def _files(root: Path, pattern: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files by stem, in the folders of `pattern`. Raises UserError if a stem occurs twice."""
    found: dict[str, Path] = {}
    for folder in sorted({root / pattern.replace(SUBSET_FIELD, subset) for subset in ("train", "val")}):
        for path in sorted(folder.glob("*")):
            if path.suffix.lower() not in suffixes:
                continue
            if path.stem in found:
                raise UserError(f"{found[path.stem]} and {path} have the same id {path.stem}: rename one")
            found[path.stem] = path
    return found


def _common_ending(images: dict[str, Path], labels: dict[str, Path]) -> str:
    """Text after the image's stem in the names of the labels; empty if any label has the stem of an image."""
    if images.keys() & labels.keys():
        return ""
    for label in sorted(labels):
        owners = [label[:end] for end in range(len(label), 0, -1) if label[:end] in images]
        if owners:
            return label.removeprefix(owners[0])
    return ""
