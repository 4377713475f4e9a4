"""Readers find and decode a dataset tree. Splits, crops and training are elsewhere."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import IGNORE
from common.datasets.pixels import ValueRange, decode_image, raw_mode, size_of
from common.errors import UserError

# Entry of a label table for undefined values. It is not a class id: a dataset has at most 254 classes, 0 to 253.
UNKNOWN = 254

Subset = Literal["train", "val"]


class Reader(ABC):
    """Reader of one dataset tree.

    Attributes:
        classes: Names of the classes; the index is the class id inside the project.
        palette: uint8 [256, 3], colors of class ids in pictures.
        layout: Description of the tree that was found.
        skip_bad_files: Continue training without files that cannot be read.
        value_range: Values of black and white in images of more than 8 bits; None for those of 16 bits.
    """

    classes: tuple[str, ...]
    palette: np.ndarray
    layout: str
    skip_bad_files = False
    value_range: ValueRange | None = None

    @abstractmethod
    def names(self, subset: Subset) -> list[str]:
        """Sorted ids of all images for training or validation, from which splits are made."""

    @abstractmethod
    def _image_candidates(self, name: str) -> list[Path]:
        """Possible paths of the image of `name`, in order of preference."""

    @abstractmethod
    def _label_candidates(self, name: str) -> list[Path]:
        """Possible paths of the label of `name`, in order of preference."""

    @abstractmethod
    def _label_table(self, path: Path) -> np.ndarray:
        """uint8 [256]: class id, 255 or `UNKNOWN` for each value in the label file at `path`."""

    def id_of(self, path: str) -> str:
        """Id of the image at `path` in a list of paths: the file name without folder and suffix."""
        return Path(path).stem

    def image_path(self, name: str) -> Path:
        """Path of the image of `name`. Raises UserError naming the path if the file is missing."""
        return _first_file("image", name, self._image_candidates(name))

    def label_path(self, name: str) -> Path:
        """Path of the label of `name`. Raises UserError naming the path if the file is missing."""
        return _first_file("label", name, self._label_candidates(name))

    def has_label(self, name: str) -> bool:
        """Does `name` have a label file?"""
        return any(path.is_file() for path in self._label_candidates(name))

    def check_size(self, name: str, with_label: bool) -> None:
        """Compare the sizes in the headers of image and label. Raises UserError if they differ or cannot be read."""
        image = self.image_path(name)
        size = picture_size(image, "image")
        if with_label:
            label = self.label_path(name)
            _same_size(image, size, label, self._label_size(label))

    def read_image(self, name: str) -> Tensor:
        """uint8 [3, H, W] RGB. Raises UserError for a missing or damaged file."""
        return read_picture(self.image_path(name), self.value_range)

    def read_label(self, name: str) -> Tensor:
        """uint8 [H, W]: class ids, 255 = ignore. Raises UserError if missing, damaged, or with other values."""
        return self._decode_label(self.label_path(name))

    def read_pair(self, name: str) -> tuple[Tensor, Tensor]:
        """`read_image` and `read_label`. Raises UserError naming both sizes if they differ."""
        image_path, label_path = self.image_path(name), self.label_path(name)
        image, label = read_picture(image_path, self.value_range), self._decode_label(label_path)
        sizes = [(tensor.shape[-1], tensor.shape[-2]) for tensor in (image, label)]
        _same_size(image_path, sizes[0], label_path, sizes[1])
        return image, label

    def _label_size(self, path: Path) -> tuple[int, int]:
        """Width and height of the label at `path`, without decoding it. Raises UserError if unreadable."""
        return picture_size(path, "label")

    def _decode_label(self, path: Path) -> Tensor:
        """`read_label` of the file at `path`."""
        stored = stored_ids(open_label(path), path)
        return torch.from_numpy(apply_table(self._label_table(path), stored, path))


def read_picture(path: Path, value_range: ValueRange | None = None) -> Tensor:
    """Read a picture: uint8 [3, H, W] RGB, see `decode_image`. Raises UserError for a damaged file."""
    try:
        pixels = decode_image(path, value_range)
    except UserError:
        raise
    except Exception as error:  # the errors of the decoders on damaged bytes have no common base class
        raise UserError(f"image {path} cannot be decoded ({_reason(error)}): restore or remove it") from None
    # Not made contiguous: resizing is faster on this layout than on planes.
    return torch.from_numpy(pixels).permute(2, 0, 1)


def picture_size(path: Path, what: str) -> tuple[int, int]:
    """Width and height in the header of a picture. Raises UserError, naming `what` it is, if unreadable."""
    try:
        return size_of(path)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{what} {path} cannot be decoded ({_reason(error)}): restore or remove it") from None


def _same_size(image: Path, image_size: tuple[int, int], label: Path, label_size: tuple[int, int]) -> None:
    if image_size != label_size:
        is_turned = image_size == label_size[::-1]
        hint = "; a camera's rotation tag (EXIF) is not applied: save the image turned" if is_turned else ""
        raise UserError(
            f"{image} is {'{}x{}'.format(*image_size)} but its label {label} is {'{}x{}'.format(*label_size)}"
            f" (width x height): they must be the same{hint}"
        )


def open_label(path: Path) -> Image.Image:
    """Decode a label in its own mode, so that palette pictures keep their indices. Raises UserError if damaged."""
    try:
        with Image.open(path) as picture:
            # Pillow stretches gray of 2 and 4 bits to 0..255, which would silently change the ids.
            stretched = picture.mode == "L" and raw_mode(picture) in ("L;2", "L;4")
            picture.load()
    except Exception as error:  # as above
        raise UserError(f"label {path} cannot be decoded ({_reason(error)}): restore it") from None
    if stretched:
        raise UserError(f"label {path} has fewer than 8 bits of gray: save it as an 8-bit gray or palette PNG")
    return picture


def stored_ids(picture: Image.Image, path: Path) -> np.ndarray:
    """Values of a palette or 8-bit gray picture, uint8 [H, W]. Raises UserError for any other picture."""
    if picture.mode not in ("P", "L"):
        raise UserError(f"label {path} has mode {picture.mode}: save it as an 8-bit gray or palette PNG of class ids")
    return np.array(picture)


def apply_table(table: np.ndarray, stored: np.ndarray, path: Path) -> np.ndarray:
    """Look up each value of `stored` (uint8) in `table` (uint8 [256]); the result may be `stored` itself.

    Raises:
        UserError: values that the table does not define; they are named.
    """
    if _is_mapped(table, stored):
        return stored
    label = table.take(stored)  # twice as fast as an index
    unknown = label == UNKNOWN
    if unknown.any():
        values = ", ".join(map(str, np.unique(stored[unknown])[:5]))
        raise UserError(
            f"label {path} holds {values}, which this dataset does not define: mend it, or set 255 to ignore"
        )
    return label


def _is_mapped(table: np.ndarray, stored: np.ndarray) -> bool:
    """Are all values in `stored` either 255 or values that the table maps to themselves?

    Most datasets store class ids; finding the largest takes a twentieth of the time of looking up every pixel.
    """
    if table[IGNORE] != IGNORE:
        return False
    same = int(np.argmax(table != np.arange(256)))
    return stored.size > 0 and (stored + np.uint8(1)).max() <= same  # 255 + 1 is 0


def table_of(ids: Iterable[int], ignored: Iterable[int] = (IGNORE,)) -> np.ndarray:
    """Label table uint8 [256]: the i-th of `ids` becomes class i, `ignored` become 255, all else `UNKNOWN`."""
    table = np.full(256, UNKNOWN, np.uint8)
    for class_id, stored in enumerate(ids):
        table[stored] = class_id
    table[list(ignored)] = IGNORE
    return table


def existing_root(root: str | Path) -> Path:
    """`root` as a path. Raises UserError if it is not a folder."""
    path = Path(root).expanduser()
    if not path.is_dir():
        raise UserError(f"data root {path} is not a folder: set data.root to the folder of the dataset")
    return path


def no_layout(dataset: str, root: Path, wanted: Iterable[str]) -> UserError:
    """Error for a root without any of the supported trees."""
    return UserError(f"no {dataset} tree under {root}: looked for {', '.join(wanted)}")


def read_lines(path: Path) -> list[str]:
    """Lines of a text file that are not blank, without surrounding white space. Raises UserError if unreadable."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"list {path} is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"list {path} cannot be read: {error.strerror}") from None
    return [line.strip() for line in lines if line.strip()]


def voc_palette() -> np.ndarray:
    """VOC's color map uint8 [256, 3]: bits of the id, three at a time, are the high bits of red, green and blue."""
    ids = np.arange(256)[:, None] >> np.arange(0, 24, 3)
    return np.stack([((ids >> channel & 1) << np.arange(7, -1, -1)).sum(1) for channel in range(3)], 1).astype(np.uint8)


def _first_file(kind: str, name: str, candidates: list[Path]) -> Path:
    for path in candidates:
        if path.is_file():
            return path
    if not candidates:
        raise UserError(f"no {kind} of {name}: the tree has no folder of {kind}s")
    if len(candidates) == 1:
        raise UserError(f"no {kind} of {name}: {candidates[0]} does not exist")
    base = Path(os.path.commonpath(candidates))
    tried = ", ".join(path.relative_to(base).as_posix() for path in candidates)
    raise UserError(f"no {kind} of {name} below {base}: looked for {tried}")


def _reason(error: Exception) -> str:
    """Message of a decoder's error, without the location in its C++ source."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.rsplit(".cpp:", 1)[-1].split(", ", 1)[-1].split(". ", 1)[0]
