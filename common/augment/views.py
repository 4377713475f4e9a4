"""Training views: the random crop in a worker, and color jitter, blur and mirroring of a batch on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from common.augment.geometry import Maps, apply_geometry, draw_flip, draw_geometry, flip_batch
from common.augment.photometric import PhotometricRanges, apply_photometric_batch, draw_photometric
from common.seeding import generators


def color_jitter_blur_flip(
    image: Tensor,
    label: Tensor | None,
    confidence: Tensor | None,
    rngs: Sequence[Generator],
    ranges: PhotometricRanges = PhotometricRanges(),
) -> Maps:
    """Jitter colors, blur and mirror each image at random.

    Args:
        image: [B,3,H,W], uint8 or float in [0, 1].
        label, confidence: [B,...,H,W] or None.
        rngs: A generator per image.
        ranges: Probabilities and ranges of the color changes.

    Returns:
        The image as float in [0, 1], label and confidence.
    """
    colors = [draw_photometric(rng, ranges) for rng in rngs]
    flips = [draw_flip(rng) for rng in rngs]
    # Mirroring first is the same, and faster for uint8.
    image, label, confidence = flip_batch(image, label, confidence, flips)
    image = image if image.is_floating_point() else image / 255
    return apply_photometric_batch(image, colors), label, confidence


@dataclass(frozen=True)
class CropTransform:
    """Random scale, padding and random crop; colors change and images are mirrored later, on the device.

    Attributes:
        crop_size: Height and width of the result, pixels.
        scale_range: Smallest and largest scale, drawn uniformly.
    """

    crop_size: tuple[int, int]
    scale_range: tuple[float, float] = (1.0, 1.0)

    def __call__(
        self, image: torch.Tensor, label: torch.Tensor | None, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        geometry = draw_geometry(rng, image.shape[-2:], self.crop_size, self.scale_range)
        return apply_geometry(image, label, None, geometry, self.crop_size)[:2]


def augment_labeled(
    image: torch.Tensor, label: torch.Tensor, positions: Sequence[int], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Color jitter, blur and mirroring of a labeled batch on the device, determined by seed and positions.

    Args:
        image: uint8 [B,3,H,W].
        label: int64 [B,H,W].
        positions: Positions of the images in the stream.
        seed: Seed of the run.

    Returns:
        Image float [B,3,H,W] in [0, 1], and label.
    """
    rngs = generators(seed, "labeled, on the device", positions)
    image, label, _ = color_jitter_blur_flip(image, label, None, rngs)
    return image, label
