"""Decode images of 8 and 16 bits, gray or color, with Pillow and, where it cannot, with tifffile.

Networks receive three channels of 8 bits. Gray becomes three equal channels, transparency is dropped, and 16 bits are
divided by 257, so that 65535 becomes 255, or stretched from a stated range of values.
"""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.errors import UserError

TIFF_SUFFIXES = (".tif", ".tiff")
SAMPLES_PER_PIXEL, EXTRA_SAMPLES = 277, 338  # tags of TIFF
TRANSPARENCY = (1, 2)  # values of EXTRA_SAMPLES: alpha, multiplied into the colors or not
ValueRange = tuple[float, float]


def decode_image(path: Path, value_range: ValueRange | None = None) -> np.ndarray:
    """Decode an image: uint8 [H,W,3].

    Args:
        path: Image of any kind that Pillow or tifffile reads.
        value_range: Values that become 0 and 255; used for images of more than 8 bits.

    Raises:
        UserError: more than three channels, or numbers without a stated range that are neither 8 nor 16 bits.
        Exception: errors of the decoders, which have no common base class.
    """
    try:
        with Image.open(path) as picture:
            if _is_deep(picture):
                return to_8_bits(np.array(picture), path, value_range)
            if not (value_range and _loses_bits(picture)):
                _check_channels(picture, path)
                return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except UnidentifiedImageError:
        if path.suffix.lower() not in TIFF_SUFFIXES:
            raise
    if path.suffix.lower() not in TIFF_SUFFIXES:
        raise UserError(f"image {path} is a PNG of 16-bit colors: save it as TIFF, or leave data.image_range out")
    return to_8_bits(tiff_values(path), path, value_range)


def size_of(path: Path) -> tuple[int, int]:
    """Width and height in the header of a picture. Raises the errors of the decoders."""
    try:
        with Image.open(path) as header:
            return header.size
    except UnidentifiedImageError:
        if path.suffix.lower() not in TIFF_SUFFIXES:
            raise
    with _tifffile(path).TiffFile(path) as file:
        page = file.pages[0]
        return page.imagewidth, page.imagelength


def tiff_values(path: Path) -> np.ndarray:
    """Values of the first page of a TIFF: [H,W], or [H,W,3] without transparency.

    Raises:
        UserError: more channels; tifffile is not installed.
    """
    with _tifffile(path).TiffFile(path) as file:
        page = file.pages[0]
        values, extra = page.asarray().squeeze(), tuple(page.extrasamples)
        if values.ndim == 3 and page.axes.startswith("S"):
            values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and values.shape[-1] == 4 and extra[:1] and extra[0] in TRANSPARENCY:
        values = values[..., :3]
    if values.ndim != 2 and values.shape[2:] != (3,):
        raise _channels_error(path, values.shape[-1])
    return values


def to_8_bits(values: np.ndarray, path: Path, value_range: ValueRange | None) -> np.ndarray:
    """Scale values [H,W] or [H,W,3] to uint8 [H,W,3]. See `decode_image`."""
    if value_range is not None and values.dtype != np.uint8:
        low, high = value_range
        stretched = (np.nan_to_num(values.astype(np.float32), nan=low) - low) * (255 / (high - low))
        values = stretched.round().clip(0, 255).astype(np.uint8)
    elif values.dtype == np.uint16:
        values = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise UserError(
            f"image {path} holds {values.dtype} numbers:"
            " state the values of black and white, e.g. data.image_range [0, 1]"
        )
    return values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)


def _is_deep(picture: Image.Image) -> bool:
    return picture.mode == "F" or picture.mode.startswith("I")


def has_more_than_8_bits(path: Path) -> bool:
    """Does the header of an image promise more than 8 bits per channel? Raises the errors of Pillow."""
    try:
        with Image.open(path) as picture:
            return _is_deep(picture) or _loses_bits(picture)
    except UnidentifiedImageError:
        return path.suffix.lower() in TIFF_SUFFIXES  # tifffile reads those that Pillow does not


def _loses_bits(picture: Image.Image) -> bool:
    """Does Pillow decode 16-bit colors to 8 bits?"""
    return ";16" in raw_mode(picture)


def raw_mode(picture: Image.Image) -> str:
    """Layout of the pixels in the file, as Pillow names it; must be called before they are loaded."""
    arguments = picture.tile[0][3] if picture.tile else ""
    return arguments if isinstance(arguments, str) else str(arguments[0])


def _check_channels(picture: Image.Image, path: Path) -> None:
    """Raise UserError for a TIFF whose fourth channel is not transparency, e.g. near infrared."""
    tags = getattr(picture, "tag_v2", {})
    samples, extra = tags.get(SAMPLES_PER_PIXEL, 1), tuple(tags.get(EXTRA_SAMPLES, ()))
    if samples > 3 and picture.mode != "CMYK" and not (samples == 4 and extra[:1] and extra[0] in TRANSPARENCY):
        raise _channels_error(path, samples)


def _channels_error(path: Path, channels: int) -> UserError:
    return UserError(
        f"image {path} has {channels} channels: networks here take 3; save the three to use as RGB, or one as gray"
    )


def _tifffile(path: Path):
    try:
        import tifffile
    except ImportError:
        raise UserError(f"{path} is a TIFF that Pillow cannot read: pip install tifffile, or save it as PNG") from None
    return tifffile
