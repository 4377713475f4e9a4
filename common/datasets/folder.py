"""A dataset of one's own: images and masks of many kinds in any folders, with any names."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import IGNORE
from common.datasets.class_list import read_classes
from common.datasets.label_colors import ids_of_colors
from common.datasets.mask_files import ARRAY_SUFFIX, ids_of_numbers, mask_size, open_mask
from common.datasets.patterns import NAME_FIELD, SUBSET_FIELD, find_files
from common.datasets.pixels import TIFF_SUFFIXES, ValueRange
from common.datasets.polygons import DrawnMasks, read_coco
from common.datasets.reader import (
    Reader,
    Subset,
    apply_table,
    existing_root,
    picture_size,
    read_lines,
    stored_ids,
    table_of,
    voc_palette,
)
from common.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", *TIFF_SUFFIXES)
POLYGON_SUFFIX = ".json"
MASK_SUFFIXES = (".png", ".bmp", *TIFF_SUFFIXES, ARRAY_SUFFIX)
SUBSETS: tuple[Subset, ...] = ("train", "val")


class Folder(Reader):
    """Reader of any dataset with images and masks in folders.

    Ids are the stems of the image files, or the text at `{name}` in the pattern of the images. Masks are pictures of
    class ids or, if the class list has colors, of colors; NumPy arrays of class ids; or polygons of LabelMe or COCO.

    Args:
        root: Folder of the dataset.
        images: Folder of the images, absolute or below `root`, or a pattern of them such as `images/{name}_image.png`.
            `{subset}` in it stands for `train` and `val`. Without it, `val.txt` below `root` lists the ids for
            validation, and all others are for training; without both, a split is needed.
        labels: Folder or pattern of the masks, in the same way, or a COCO file. Names in a folder are those of the
            images, optionally followed by the same ending in all of them (`0001TP_L.png`). Images for training may lack
            a mask.
        classes: Class list below `root`, see `read_classes`.
        value_range: Values of black and white in images of more than 8 bits; by default 16 bits are divided by 257.

    Raises:
        UserError: a folder, a file or the class list is missing or wrong, or an id occurs twice.
    """

    def __init__(
        self, root: str | Path, images: str, labels: str, classes: str, value_range: ValueRange | None = None
    ) -> None:
        root = existing_root(root)
        self._root, self._image_pattern, self._label_pattern = root, images, labels
        # Without `..`, which would leave the target of a link instead of the folder that holds the link.
        self._list_path = Path(os.path.normpath(root / classes))
        self._list = read_classes(self._list_path)
        self.classes = self._list.names
        self.palette = voc_palette()
        if self._list.colors:
            self.palette[: len(self.classes)] = self._list.colors
        self._table = table_of(range(len(self.classes)), (IGNORE, *self._list.ignored_ids))
        if value_range is not None and value_range[0] == value_range[1]:
            raise UserError(f"data.image_range is {list(value_range)}: give the values of black and of white")
        self.value_range = value_range
        self._coco = read_coco(root / labels) if is_coco(root, labels) else None
        self._labels = {} if self._coco else find_masks(root, labels)
        self._images, self._subsets = find_images(root, images, set(self._labels.values()))
        if not self._images:
            raise UserError(
                f"no images in {root / images}: set data.image_dir to their folder, or to a pattern such as"
                f" images/{NAME_FIELD}_image.png; file endings are {', '.join(IMAGE_SUFFIXES)}"
            )
        self._by_stem = {path.stem: name for name, path in self._images.items()}
        self._drawn = DrawnMasks(root, self.classes, str(self._list_path), self._coco)
        self._ending = "" if NAME_FIELD in labels else _common_ending(self._images, self._labels)
        self.layout = f"{root}: {images}, {labels}" + (f"/*{self._ending}.*" if self._ending else "")

    def names(self, subset: Subset) -> list[str]:
        if self.has_subsets:
            return sorted(name for name, own in self._subsets.items() if own == subset)
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
    def class_file(self) -> Path:
        """The class list."""
        return self._list_path

    @property
    def has_subsets(self) -> bool:
        """Do the folders separate images for training and validation?"""
        return SUBSET_FIELD in self._image_pattern

    @property
    def has_validation(self) -> bool:
        """Do the folders or `val.txt` define the images for validation?"""
        return self.has_subsets or (self._root / "val.txt").is_file()

    def id_of(self, path: str) -> str:
        stem = Path(path).stem
        return path if path in self._images else self._by_stem.get(stem, stem)

    def stray_labels(self) -> list[str]:
        """Sorted names of the label files that belong to no image."""
        owned = {name + self._ending for name in self._images}
        return sorted(path.name for name, path in self._labels.items() if name not in owned)

    def has_label(self, name: str) -> bool:
        return self._entry(name) is not None if self._coco else super().has_label(name)

    def label_path(self, name: str) -> Path:
        """Path of the label of `name`; in a COCO file, that file followed by the image. Raises UserError if missing."""
        if self._coco is None:
            return super().label_path(name)
        entry = self._entry(name)
        if entry is None:
            raise UserError(f"no label of {name}: {self._coco.path} has no polygons of {self.image_path(name)}")
        return self._coco.path / entry

    def _entry(self, name: str) -> str | None:
        return self._coco.entry(self.image_path(name))

    def _drawn_label(self, path: Path) -> Path | None:
        """PNG drawn from polygons; None if the label at `path` has none."""
        if self._coco:
            return self._drawn.drawn(path, path.relative_to(self._coco.path).as_posix())
        return self._drawn.drawn(path) if path.suffix.lower() == POLYGON_SUFFIX else None

    def _label_size(self, path: Path) -> tuple[int, int]:
        if drawn := self._drawn_label(path):
            return picture_size(drawn, "drawn label")
        return mask_size(path) if path.suffix.lower() == ARRAY_SUFFIX else picture_size(path, "label")

    def _decode_label(self, path: Path) -> Tensor:
        if drawn := self._drawn_label(path):
            return torch.from_numpy(stored_ids(open_mask(drawn), drawn))
        mask = open_mask(path)
        ids = self._ids_of_picture(mask, path) if isinstance(mask, Image.Image) else None
        return torch.from_numpy(ids_of_numbers(mask, self._table, path) if ids is None else ids)

    def _ids_of_picture(self, picture: Image.Image, path: Path) -> np.ndarray:
        if self._list.colors:
            if picture.mode in ("1", "L"):
                picture = picture.convert("RGB")
            known = str(self._list_path)
            return ids_of_colors(picture, path, self._list.colors, self._list.ignored_colors, known)
        if picture.mode in ("RGB", "RGBA"):
            raise UserError(
                f"label {path} is a picture of colors: add the colors of the classes to {self._list_path}, "
                "e.g. `road 128 64 128`"
            )
        return apply_table(self._table, stored_ids(picture, path), path)

    def _image_candidates(self, name: str) -> list[Path]:
        return [self._images.get(name, self._root / _path_of(self._image_pattern, name))]

    def _label_candidates(self, name: str) -> list[Path]:
        file = name + self._ending
        return [self._labels.get(file, self._root / _path_of(self._label_pattern, file))]

    def _label_table(self, path: Path) -> np.ndarray:
        return self._table


def is_coco(root: Path, labels: str) -> bool:
    """Does `data.label_dir` name one file of polygons for all images?"""
    return labels.lower().endswith(POLYGON_SUFFIX) and NAME_FIELD not in labels and not (root / labels).is_dir()


def find_masks(root: Path, pattern: str) -> dict[str, Path]:
    """Masks by id. Files of polygons count where the pattern names them or no other mask is there.

    Raises:
        UserError: see `find_files`.
    """
    every = {}
    for part in _of_subsets(pattern):
        suffixes = (*MASK_SUFFIXES, POLYGON_SUFFIX) if NAME_FIELD in pattern else MASK_SUFFIXES
        found = find_files(root, part, suffixes, "data.label_dir")
        every |= found or find_files(root, part, (*MASK_SUFFIXES, POLYGON_SUFFIX), "data.label_dir")
    return every


def find_images(root: Path, pattern: str, masks: set[Path]) -> tuple[dict[str, Path], dict[str, Subset]]:
    """Images by id, and their subsets if the pattern names subsets. Files that are `masks` are left out.

    Raises:
        UserError: see `find_files`; an id is in both subsets.
    """
    images: dict[str, Path] = {}
    subsets: dict[str, Subset] = {}
    for subset, part in zip(SUBSETS, _of_subsets(pattern)):
        found = find_files(root, part, IMAGE_SUFFIXES, "data.image_dir")
        for name, path in found.items():
            if path in masks:
                continue
            if name in images:
                raise UserError(f"{images[name]} and {path} have the same id {name}: rename one")
            images[name] = path
            if SUBSET_FIELD in pattern:
                subsets[name] = subset
    return images, subsets


def _of_subsets(pattern: str) -> list[str]:
    """The pattern for training and for validation; one if they are the same."""
    return list(dict.fromkeys(pattern.replace(SUBSET_FIELD, subset) for subset in SUBSETS))


def _path_of(pattern: str, name: str) -> str:
    """Path of a file that is missing, for messages."""
    return pattern.replace(NAME_FIELD, name) if NAME_FIELD in pattern else f"{pattern}/{name}.*"


def _common_ending(images: dict[str, Path], labels: dict[str, Path]) -> str:
    """Text after the image's stem in the names of the labels; empty if any label has the stem of an image."""
    if images.keys() & labels.keys():
        return ""
    for label in sorted(labels):
        owners = [label[:end] for end in range(len(label), 0, -1) if label[:end] in images]
        if owners:
            return label.removeprefix(owners[0])
    return ""
