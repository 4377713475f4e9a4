"""Made-up photos of a field, with masks: soil, rows of a crop, and a few weeds."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SOIL, CROP, WEED = 0, 1, 2
COLORS = np.array([(0, 0, 0), (0, 128, 0), (200, 40, 40)], np.uint8)  # as in the masks
GROUND = np.array([(120, 90, 60), (70, 140, 60), (150, 170, 40)], np.int64)  # as in the photos


def draw_field(number: int, size: tuple[int, int] = (96, 64)) -> tuple[np.ndarray, np.ndarray]:
    """Photo uint8 [H,W,3] and class ids uint8 [H,W] of the field's part `number`; `size` is width and height."""
    rng = np.random.RandomState(number)
    mask = Image.new("L", size, SOIL)
    brush = ImageDraw.Draw(mask)
    for row in range(size[0] // 24 + 1):
        x = 24 * row + int(rng.randint(0, 10))
        brush.polygon([(x, 0), (x + 9, 0), (x + 15, size[1]), (x + 5, size[1])], fill=CROP)
    for _ in range(2):
        x, y = rng.randint(0, size[0] - 6), rng.randint(0, size[1] - 6)
        brush.ellipse((x, y, x + 5, y + 5), fill=WEED)
    ids = np.array(mask)
    image = GROUND[ids] + rng.randint(-25, 25, (*ids.shape, 3)) + rng.randint(-20, 20)
    return image.clip(0, 255).astype(np.uint8), ids


def write_field(folder: Path, images: int, masks: int) -> Path:
    """Write `images/001_image.png`, ... and, for the first `masks` of them, `annotations/001_annotation.png`, ..."""
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(1, images + 1):
        image, ids = draw_field(number)
        Image.fromarray(image).save(folder / "images" / f"{number:03d}_image.png")
        if number <= masks:
            Image.fromarray(COLORS[ids]).save(folder / "annotations" / f"{number:03d}_annotation.png")
    return folder
