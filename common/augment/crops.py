"""The crop of CPS and CPCL, and parts of other crops.

Random numbers come from a `numpy.random.Generator`, in the order of the released code.
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
from common.images import IMAGENET_MEAN

MEAN_COLOR = tuple(round(255 * mean) for mean in IMAGENET_MEAN)  # uint8; about 0 after normalization


@dataclass(frozen=True)
class ScaleChoiceCrop:
    """Crop of original CPS and CPCL: mirror with probability 0.5, resize by one of few scales, crop, pad all around.

    Attributes:
        crop_size: Height and width of the result, pixels.
        scales: Scales, drawn with equal probability.
        beyond: Pixels by which a crop may extend beyond the end of a side that is longer than the crop.
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
            label = label.roll((above, before), (-2, -1))  # the pixels that wrap around are padding
        return image, label


def cut(image: Tensor, corners: Sequence[tuple[int, int]], crop_size: Sequence[int]) -> list[Tensor]:
    """Cut crops from `image` uint8 [3,H,W] at (top, left), which may be negative; padding has the mean color."""
    color = torch.tensor(MEAN_COLOR, dtype=torch.uint8).view(3, 1, 1)
    crops = []
    for top, left in corners:
        inside = image[:, max(top, 0) : max(top + crop_size[0], 0), max(left, 0) : max(left + crop_size[1], 0)]
        crop = color.expand(3, *crop_size).clone()
        below, right = max(-top, 0), max(-left, 0)
        crop[:, below : below + inside.shape[1], right : right + inside.shape[2]] = inside
        crops.append(crop)
    return crops


def mirror(image: Tensor, label: Tensor | None, mirrored: bool) -> tuple[Tensor, Tensor | None]:
    """Exchange left and right if `mirrored`."""
    if not mirrored:
        return image, label
    return image.flip(-1), None if label is None else label.flip(-1)


def draw_start(rng: Generator, side: int, crop: int) -> int:
    """Draw the first pixel of a crop within a side; 0 if the side is shorter than the crop."""
    return int(rng.integers(0, max(side - crop, 0), endpoint=True))
