"""Augmentation on tensors: the same functions in a worker (uint8, CPU) and in the training step (float, device).

Random choices are first drawn on the CPU from a `numpy.random.Generator` of the caller (`draw_*`), then applied
(`apply_*`, `flip`; `mix_batch` does both), so the augmentation of an image depends on its generator only. Applying
never waits for the device. Images are uint8 or float in [0, 1] until `normalize`, which is called right before a
network.
"""

from common.augment.crops import ScaleChoiceCrop
from common.augment.geometry import (
    CropGeometry,
    apply_geometry,
    apply_geometry_batch,
    draw_flip,
    draw_geometry,
    flip,
    flip_batch,
    nearest_crop,
)
from common.augment.mixing import cutmix_box_masks, draw_cutmix_box_masks, mix, mix_batch
from common.augment.photometric import (
    Photometric,
    PhotometricRanges,
    apply_photometric_batch,
    draw_photometric,
)
from common.augment.views import color_jitter_blur_flip
from common.images import denormalize, normalize

__all__ = [
    "CropGeometry",
    "Photometric",
    "PhotometricRanges",
    "ScaleChoiceCrop",
    "apply_geometry",
    "apply_geometry_batch",
    "apply_photometric_batch",
    "color_jitter_blur_flip",
    "cutmix_box_masks",
    "denormalize",
    "draw_cutmix_box_masks",
    "draw_flip",
    "draw_geometry",
    "draw_photometric",
    "flip",
    "flip_batch",
    "mix",
    "mix_batch",
    "nearest_crop",
    "normalize",
]
