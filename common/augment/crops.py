"""The crop of CPS and CPCL, and what other crops of papers are made of.

Draws come from a `numpy.random.Generator`, in the order of the released code.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.random import Generator
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from common import IGNORE
from common.augment.geometry import CropGeometry, nearest_crop

MEAN_COLOUR = (124, 116, 104)  # ImageNet's, in gray levels: about 0 once normalized


@dataclass(frozen=True)
class ScaleChoiceCrop:
    """Original CPS's crop, and CPCL's: half are mirrored, one of few scales, a crop with the padding all around.

    Attributes:
        crop_size: Height and width of the result, pixels.
        scales: The scales, each as likely.
        beyond: Pixels that a crop may reach beyond the end of a side that is longer.
    """

    crop_size: tuple[int, int]
    scales: tuple[float, ...]
    beyond: int = 0

    def __call__(self, image: Tensor, label: Tensor | None, rng: Generator) -> tuple[Tensor, Tensor | None]:
        image, label = mirror(image, label, rng.random() >= 0.5)
        scale = float(rng.choice(self.scales))
        height, width = (max(1, int(side * scale)) for side in image.shape[-2:])
        sides = tuple(zip((height, width), self.crop_size))
        top, left = (draw_start(rng, side + self.beyond, crop) if side > crop else 0 for side, crop in sides)
        above, before = (max(0, crop - side) // 2 for side, crop in sides)
        resized = functional.resize(image, [height, width], InterpolationMode.BILINEAR, antialias=False)
        image = cut(resized, [(top - above, left - before)], self.crop_size)[0]
        if label is not None:
            label = nearest_crop(label, CropGeometry(height, width, top, left), self.crop_size, IGNORE)
            label = label.roll((above, before), (-2, -1))  # what it is rolled over is padding
        return image, label


def cut(image: Tensor, corners: Sequence[tuple[int, int]], crop_size: Sequence[int]) -> list[Tensor]:
    """Crops of `image` uint8 [3,H,W] at (top, left), which may be negative; the mean color around the image."""
    color = torch.tensor(MEAN_COLOUR, dtype=torch.uint8).view(3, 1, 1)
    crops = []
    for top, left in corners:
        inside = image[:, max(top, 0) : max(top + crop_size[0], 0), max(left, 0) : max(left + crop_size[1], 0)]
        crop = color.expand(3, *crop_size).clone()
        below, right = max(-top, 0), max(-left, 0)
        crop[:, below : below + inside.shape[1], right : right + inside.shape[2]] = inside
        crops.append(crop)
    return crops


def mirror(image: Tensor, label: Tensor | None, mirrored: bool) -> tuple[Tensor, Tensor | None]:
    """Left and right exchanged where `mirrored`."""
    if not mirrored:
        return image, label
    return image.flip(-1), None if label is None else label.flip(-1)


def draw_start(rng: Generator, side: int, crop: int) -> int:
    """First pixel of a crop within a side; 0 where the side is shorter."""
    return int(rng.integers(0, max(side - crop, 0), endpoint=True))
