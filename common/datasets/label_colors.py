"""Labels stored as colors, in RGB files or in palette files whose palette colors count."""

from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from common import IGNORE
from common.datasets.reader import UNKNOWN, stored_ids
from common.errors import UserError

Color = tuple[int, int, int]


def ids_of_colors(
    picture: Image.Image, path: Path, colors: tuple[Color, ...], ignored: tuple[Color, ...], known: str
) -> np.ndarray:
    """Class ids uint8 [H, W] of a picture of colors.

    Args:
        picture, path, colors, ignored: As for `map_colors`.
        known: Source of the list of colors, for messages.

    Raises:
        UserError: a color that is not listed (it is named), or another kind of picture.
    """
    label, unknown = map_colors(picture, path, colors, ignored)
    if unknown:
        color = next(iter(unknown))
        raise UserError(
            f"label {path} contains the color {color}, which {known} does not define: correct it, or add it there"
        )
    return label


def map_colors(
    picture: Image.Image, path: Path, colors: tuple[Color, ...], ignored: tuple[Color, ...]
) -> tuple[np.ndarray, Counter[Color]]:
    """Class ids of a picture of colors, and the colors that are not listed.

    Args:
        picture: RGB, RGBA (alpha is not used) or palette picture.
        path: File of the picture, for messages.
        colors: Colors of the classes, in the order of their ids.
        ignored: Colors of pixels that become 255.

    Returns:
        uint8 [H, W], 255 also for colors that are not listed; and the number of pixels of each such color.

    Raises:
        UserError: another kind of picture, or an index that the palette lacks.
    """
    table = _color_table(colors, ignored)
    if picture.mode in ("RGB", "RGBA"):
        packed = _packed(np.asarray(picture)[..., :3])
        label = table[packed]
        packed = packed[label == UNKNOWN]
    else:
        stored = stored_ids(picture, path)
        palette = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
        if stored.max() >= len(palette):
            raise UserError(f"label {path} holds {stored.max()}, which its palette does not: restore it")
        packed = _packed(palette)
        label = table[packed].take(stored)
        packed = packed.take(stored[label == UNKNOWN])
    label[label == UNKNOWN] = IGNORE
    unknown, pixels = np.unique(packed, return_counts=True)
    names = ((int(color) >> 16, int(color) >> 8 & 255, int(color) & 255) for color in unknown)
    return label, Counter(dict(zip(names, pixels.tolist())))


def _packed(colors: np.ndarray) -> np.ndarray:
    """A number per color [..., 3]: red, green and blue from the highest byte down."""
    wide = colors.astype(np.uint32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


@lru_cache(maxsize=4)
def _color_table(colors: tuple[Color, ...], ignored: tuple[Color, ...]) -> np.ndarray:
    """Table uint8 [2**24]: class id, 255 or `UNKNOWN` for each color. 16 MB, so that each pixel is one look-up."""
    table = np.full(1 << 24, UNKNOWN, np.uint8)
    table[_packed(np.array(colors))] = np.arange(len(colors))
    if ignored:
        table[_packed(np.array(ignored))] = IGNORE
    return table
