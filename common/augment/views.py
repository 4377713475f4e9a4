"""The last step of a training view: what is done to a whole batch on the device."""

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
    """Color jitter, blur and a random mirror image, as each image's generator says.

    Args:
        image: [B,3,H,W], uint8 or float in [0, 1].
        label, confidence: [B,...,H,W] or None.

    Returns:
        The image as float in [0, 1], label and confidence.
    """
    colors = [draw_photometric(rng, ranges) for rng in rngs]
    flips = [draw_flip(rng) for rng in rngs]
    image = image if image.is_floating_point() else image / 255
    return flip_batch(apply_photometric_batch(image, colors), label, confidence, flips)


@dataclass(frozen=True)
class CropTransform:
    """Scale, pad, random crop; colors change and images are mirrored later, on the device.

    Attributes:
        crop_size: Height and width of the result, pixels.
        scale_range: Of the uniform random scale.
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
    """What is left to do on the device to a labeled batch: colors, blur and mirror, as seed and positions say.

    Returns:
        Image float [B,3,H,W] in [0,1], and label.
    """
    rngs = generators(seed, "labeled, on the device", positions)
    image, label, _ = color_jitter_blur_flip(image, label, None, rngs)
    return image, label
