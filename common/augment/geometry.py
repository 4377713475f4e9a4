"""Scale, pad, crop and flip: geometric changes, applied to image, label and confidence alike.

Padding is at the bottom and right: the image reflected, the label 255 (ignore), the confidence 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torchvision.transforms.v2 import functional

from common import IGNORE

# Image, label and confidence; the last two may be missing.
Maps = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class CropGeometry:
    """Resize to (`height`, `width`), then crop with the upper left corner at (`top`, `left`); all in pixels."""

    height: int
    width: int
    top: int
    left: int


def draw_geometry(
    rng: Generator, size: Sequence[int], crop_size: Sequence[int], scale_range: Sequence[float]
) -> CropGeometry:
    """Draw a scale uniform in `scale_range` and a uniform position. `size` and `crop_size` are (height, width)."""
    scale = rng.uniform(scale_range[0], scale_range[1])
    height, width = (max(1, int(side * scale)) for side in size)
    top, left = (
        int(rng.integers(0, max(side - crop, 0), endpoint=True))
        for side, crop in zip((height, width), crop_size, strict=True)
    )
    return CropGeometry(height, width, top, left)


def apply_geometry(
    image: Tensor, label: Tensor | None, confidence: Tensor | None, geometry: CropGeometry, crop_size: Sequence[int]
) -> Maps:
    """Resize (image: bilinear with antialiasing, the others: nearest), pad to the crop, crop.

    The inputs are not changed; the results may share their memory.

    Args:
        image: [3,H,W], uint8 or float.
        label, confidence: [...,H,W] of any type, or None.
        geometry: The drawn crop.
        crop_size: Height and width of the results, pixels.
    """
    maps = []
    for values, fill in ((label, IGNORE), (confidence, 0)):
        maps.append(None if values is None else nearest_crop(values, geometry, crop_size, fill))
    return _image_crop(image, geometry, crop_size), *maps


def apply_geometry_batch(
    image: Tensor,
    label: Tensor | None,
    confidence: Tensor | None,
    geometries: Sequence[CropGeometry],
    crop_size: Sequence[int],
) -> Maps:
    """`apply_geometry` with a geometry per image: `image` [B,3,H,W], `label` and `confidence` [B,...,H,W] or None."""
    images = [_image_crop(one, geometry, crop_size) for one, geometry in zip(image, geometries, strict=True)]
    maps = []
    for values, fill in ((label, IGNORE), (confidence, 0)):
        if values is not None:
            crops = [nearest_crop(v, g, crop_size, fill) for v, g in zip(values, geometries, strict=True)]
            values = torch.stack(crops)
        maps.append(values)
    return torch.stack(images), *maps


def draw_flip(rng: Generator, probability: float = 0.5) -> bool:
    """Draw whether to mirror an image."""
    return bool(rng.random() < probability)


def flip(image: Tensor, label: Tensor | None, confidence: Tensor | None, flipped: bool) -> Maps:
    """Exchange left and right if `flipped`; all are [...,H,W], label and confidence may be None."""
    if not flipped:
        return image, label, confidence
    return tuple(None if values is None else values.flip(-1) for values in (image, label, confidence))


def flip_batch(image: Tensor, label: Tensor | None, confidence: Tensor | None, flipped: Sequence[bool]) -> Maps:
    """`flip` with a choice per image; all are [B,...,H,W], label and confidence may be None."""

    def each(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return torch.stack([v.flip(-1) if f else v for v, f in zip(values, flipped, strict=True)])

    return each(image), each(label), each(confidence)


def _image_crop(image: Tensor, geometry: CropGeometry, crop_size: Sequence[int]) -> Tensor:
    if image.shape[-2:] != (geometry.height, geometry.width):
        if image.dtype == torch.uint8:
            # Decoders interleave channels, and in that order uint8 is resized 3 to 5 times faster.
            image = image.unsqueeze(0).contiguous(memory_format=torch.channels_last).squeeze(0)
        image = functional.resize(image, [geometry.height, geometry.width], antialias=True)
    # Images stored pixel by pixel stay so: sorting them into planes takes longer than cropping.
    channels = -1 if image.stride(0) == 1 else 0
    image = image.movedim(0, channels)
    # Cropping first leaves less to pad.
    for dim, side, start, crop in sorted(_axes(geometry, crop_size), key=lambda axis: axis[1] < axis[3]):
        dim = dim if channels == 0 else dim - 1
        if side < crop:
            image = torch.cat([image, image.index_select(dim, _reflected(side, crop, image.device))], dim)
        else:
            image = image.narrow(dim, start, crop)
    return image.movedim(channels, 0)


def nearest_crop(values: Tensor, geometry: CropGeometry, crop_size: Sequence[int], fill: int) -> Tensor:
    """Crop of `values` [...,H,W] after nearest-neighbor resizing, padded with `fill` at the bottom and right.

    Only the pixels of the crop are read. The nearest pixel is that of torch's `nearest-exact`, in integers.
    """
    # On the CPU NumPy indexes columns 6 times as fast as torch.
    on_cpu = values.device.type == "cpu"
    arange = np.arange if on_cpu else partial(torch.arange, device=values.device)
    rows, columns = (
        (2 * arange(start, min(start + crop, side)) + 1) * values.shape[dim] // (2 * side)
        for dim, side, start, crop in _axes(geometry, crop_size)
    )
    if on_cpu:
        inside = torch.from_numpy(values.numpy()[..., rows, :][..., columns])
    else:
        inside = values.index_select(-2, rows).index_select(-1, columns)
    height, width = inside.shape[-2:]
    if (height, width) == tuple(crop_size):
        return inside
    crop = inside.new_full((*inside.shape[:-2], *crop_size), fill)
    crop[..., :height, :width] = inside
    return crop


def _axes(geometry: CropGeometry, crop_size: Sequence[int]) -> tuple[tuple[int, int, int, int], ...]:
    """(dimension, resized side, start of the crop, side of the crop) of rows and columns."""
    return (-2, geometry.height, geometry.top, crop_size[0]), (-1, geometry.width, geometry.left, crop_size[1])


def _reflected(side: int, padded: int, device: torch.device) -> Tensor:
    """Source pixels of the padding `side` to `padded` of a side: reflected as often as needed, edges not repeated."""
    period = max(2 * (side - 1), 1)
    position = torch.arange(side, padded, device=device) % period
    return torch.minimum(position, period - position)
