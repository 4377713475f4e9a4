"""The last step of a training view: what is done to a whole batch on the device."""

from collections.abc import Sequence

from numpy.random import Generator
from torch import Tensor

from common.augment.geometry import Maps, draw_flip, flip_batch
from common.augment.photometric import PhotometricRanges, apply_photometric_batch, draw_photometric


def recolor_and_flip(
    image: Tensor,
    label: Tensor | None,
    confidence: Tensor | None,
    rngs: Sequence[Generator],
    ranges: PhotometricRanges = PhotometricRanges(),
) -> Maps:
    """Colour jitter, blur and a random mirror image, as each image's generator says.

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
