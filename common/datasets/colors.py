"""Labels that are pictures of colours: RGB files, and palette files of which the palette's colours count."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from common import IGNORE
from common.datasets.source import UNKNOWN, apply_table, stored_ids
from common.errors import UserError

Color = tuple[int, int, int]


def ids_of_colors(
    picture: Image.Image, path: Path, colors: tuple[Color, ...], ignored: tuple[Color, ...], known: str
) -> np.ndarray:
    """Class ids uint8 [H, W] of a picture of colours.

    Args:
        picture: RGB, RGBA (of which alpha is left out) or palette.
        path: its file, for messages.
        colors: of the classes, in the order of their ids.
        ignored: of pixels that become 255.
        known: who says which colours there are, for messages.

    Raises UserError naming a colour that is neither, and for other kinds of pictures.
    """
    table = _color_table(colors, ignored)
    if picture.mode not in ("RGB", "RGBA"):
        stored = stored_ids(picture, path)
        palette = np.array(picture.getpalette("RGB"), np.uint32).reshape(-1, 3)
        of_palette = np.full(256, UNKNOWN, np.uint8)
        of_palette[: len(palette)] = table[_packed(palette)]
        return apply_table(of_palette, stored, path)
    pixels = np.asarray(picture)[..., :3]
    label = table[_packed(pixels)]
    unknown = label == UNKNOWN
    if unknown.any():
        color = tuple(map(int, pixels[unknown][0]))
        raise UserError(
            f"label {path} holds the colour {color}, which {known} does not define: mend it, or add it there"
        )
    return label


def _packed(colors: np.ndarray) -> np.ndarray:
    """One number for a colour [..., 3]: red, green and blue from the highest byte down."""
    wide = colors.astype(np.uint32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


@lru_cache(maxsize=4)
def _color_table(colors: tuple[Color, ...], ignored: tuple[Color, ...]) -> np.ndarray:
    """uint8 [2**24]: class id, 255 or `UNKNOWN` of every colour. 16 MB that make reading a label one look-up."""
    table = np.full(1 << 24, UNKNOWN, np.uint8)
    table[_packed(np.array(colors))] = np.arange(len(colors))
    if ignored:
        table[_packed(np.array(ignored))] = IGNORE
    return table
