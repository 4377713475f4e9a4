"""Mask files as people have them: PNG, TIFF and BMP pictures, and arrays of NumPy."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.datasets.pixels import TIFF_SUFFIXES, size_of, tiff_values
from common.datasets.reader import apply_table, open_label
from common.errors import UserError

ARRAY_SUFFIX = ".npy"


def open_mask(path: Path) -> Image.Image | np.ndarray:
    """Decode a mask: a picture of 8 bits in its own mode, or whole numbers [H,W] where the file has more bits.

    Raises:
        UserError: damaged, not one number per pixel, or fractions.
    """
    if path.suffix.lower() == ARRAY_SUFFIX:
        return _whole_numbers(_array(path), path)
    if path.suffix.lower() in TIFF_SUFFIXES and not _pillow_reads(path):
        values = _tiff(path)
        is_color = values.ndim == 3 and values.dtype == np.uint8
        return Image.fromarray(values) if is_color else _whole_numbers(values, path)
    picture = open_label(path)
    return _whole_numbers(np.array(picture), path) if picture.mode.startswith(("I", "F")) else picture


def mask_size(path: Path) -> tuple[int, int]:
    """Width and height in the header of a mask. Raises UserError, or the errors of Pillow, if unreadable."""
    if path.suffix.lower() == ARRAY_SUFFIX:
        height, width = _array(path).shape
        return width, height
    return size_of(path)


def ids_of_numbers(numbers: np.ndarray, table: np.ndarray, path: Path) -> np.ndarray:
    """Look up whole numbers [H,W] in a table of the values 0 to 255. Raises UserError for values it does not define."""
    if numbers.size and (numbers.min() < 0 or numbers.max() > 255):
        wrong = numbers[(numbers < 0) | (numbers > 255)]
        raise UserError(
            f"label {path} holds {', '.join(map(str, np.unique(wrong)[:5]))}: ids are 0 to 253, and 255 to ignore"
        )
    return apply_table(table, numbers.astype(np.uint8), path)


def _array(path: Path) -> np.ndarray:
    """Array [H,W] of a file, which is not read before its values are used."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"label {path} cannot be read as a NumPy array ({type(error).__name__}): restore it") from None
    shape = values.shape
    if values.ndim == 3 and 1 in (shape[0], shape[2]):
        values = values[0] if shape[0] == 1 else values[..., 0]
    if values.ndim != 2:
        raise UserError(f"label {path} has the shape {shape}: save one class id per pixel, [height, width]")
    return values


def _whole_numbers(values: np.ndarray, path: Path) -> np.ndarray:
    if values.ndim != 2:
        raise UserError(f"label {path} has the shape {values.shape}: save one class id per pixel, [height, width]")
    if values.dtype.kind not in "biu":
        raise UserError(f"label {path} holds {values.dtype} numbers: save class ids as whole numbers")
    return np.array(values, np.uint8 if values.dtype.kind == "b" else values.dtype)


def _pillow_reads(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except UnidentifiedImageError:
        return False
    except OSError:
        return True  # its own message is as good


def _tiff(path: Path) -> np.ndarray:
    try:
        return tiff_values(path)
    except UserError:
        raise
    except Exception as error:  # tifffile raises nearly anything on damaged bytes
        raise UserError(f"label {path} cannot be decoded ({str(error).splitlines()[0]}): restore it") from None
