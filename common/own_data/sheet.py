"""A contact sheet: images beside the same images under the colors of their masks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common.datasets.reader import Reader
from common.errors import UserError
from common.visual import FAINT, GAP, INK, MARGIN, PAGE, class_entries, legend, overlay

FILE = "contact_sheet.png"
WIDTH = 300  # of a picture, in pixels
PER_ROW, MOST = 2, 12
CAPTION = 22


def save_sheet(reader: Reader, names: Sequence[str], path: Path) -> None:
    """Draw up to twelve of `names`, spread evenly, in pairs: the image, and the image under its label.

    Raises:
        UserError: a file cannot be read, or the picture cannot be written.
    """
    chosen = [names[index * len(names) // min(MOST, len(names))] for index in range(min(MOST, len(names)))]
    pairs = [_small(*reader.read_pair(name)) for name in chosen]
    pictures = [(Image.fromarray(image), overlay(_tensor(image), label, reader.palette)) for image, label in pairs]
    rows = [range(start, min(start + PER_ROW, len(chosen))) for start in range(0, len(chosen), PER_ROW)]
    heights = [max(pictures[index][0].height for index in row) + CAPTION for row in rows]
    width = 2 * MARGIN + PER_ROW * 2 * WIDTH + (2 * PER_ROW - 1) * GAP
    entries = class_entries([label for _, label in pairs], reader.palette, reader.classes)
    key = legend(entries, width - 2 * MARGIN)
    page = Image.new("RGB", (width, 2 * MARGIN + 20 + sum(heights) + key.height), PAGE)
    brush = ImageDraw.Draw(page)
    brush.text((MARGIN, MARGIN - 6), f"{len(chosen)} of {len(names)} images and their masks", INK, _font(16))
    y = MARGIN + 20
    for row, height in zip(rows, heights):
        for column, index in enumerate(row):
            for half, picture in enumerate(pictures[index]):
                page.paste(picture, (MARGIN + (2 * column + half) * (WIDTH + GAP), y))
            brush.text((MARGIN + 2 * column * (WIDTH + GAP), y + height - CAPTION + 3), chosen[index], FAINT, _font(12))
        y += height
    page.paste(key, (MARGIN, y))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        page.save(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _small(image: torch.Tensor, label: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [h,w,3] and label [h,w] of the sheet's width."""
    size = (WIDTH, max(1, round(WIDTH * image.shape[1] / image.shape[2])))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.LANCZOS)
    return np.array(picture), np.array(Image.fromarray(label.numpy()).resize(size, Image.Resampling.NEAREST))


def _tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)
