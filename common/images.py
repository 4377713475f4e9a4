"""Normalize images, flatten maps to pixels, and copy arrays to the device asynchronously."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(image: Tensor) -> Tensor:
    """Subtract ImageNet's mean from `image` [...,3,H,W], uint8 or float in [0,1], and divide by its deviation."""
    mean, std = imagenet_statistics(image.device)
    image = image / 255 if image.dtype == torch.uint8 else image
    return (image - mean) / std


def denormalize(image: Tensor) -> Tensor:
    """Invert `normalize`: float [...,3,H,W], clamped to [0,1]. `image` is not changed."""
    mean, std = imagenet_statistics(image.device)
    return (image * std + mean).clamp_(0, 1)


@cache
def imagenet_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float [3,1,1] each. Cached, because a copy to the device synchronizes with it."""
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))


def flatten_pixels(maps: Tensor) -> Tensor:
    """[B,D,h,w] -> [B*h*w,D], pixel b*h*w + y*w + x; a view if the maps are stored pixel by pixel."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to the device without synchronizing, which requires page-locked memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
