"""Scale, pad, crop and flip: geometric changes, applied to image, label and confidence alike.

Padding is at the bottom and right: the image reflected, the label 255 (ignore), the confidence 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torchvision.transforms.v2 import functional

from common import IGNORE
from common.augment.resample import reflected, resample, triangle_taps
from common.images import to_device

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
    """`apply_geometry` with a geometry per image, on any device, in a fixed number of operators.

    Args:
        image: [B,3,H,W], uint8 or float.
        label, confidence: [B,...,H,W] of any type, or None.
        geometries: The drawn crop of each image.
        crop_size: Height and width of the results, pixels.
    """
    axes = _batch_axes(geometries, image.shape[-2:], crop_size)
    rows, columns = (triangle_taps(axis.side, axis.resized, reflected(axis.wanted, axis.resized)) for axis in axes)
    cropped = resample(image.float(), rows, columns)
    if image.dtype == torch.uint8:
        cropped = cropped.round_().to(torch.uint8)
    if label is None and confidence is None:
        return cropped, None, None
    pixels = _nearest_pixels(axes, image.device)
    return cropped, *(
        None if values is None else _take(values, pixels, fill) for values, fill in ((label, IGNORE), (confidence, 0))
    )


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
    chosen = to_device(np.array(flipped), image.device)

    def each(values: Tensor | None) -> Tensor | None:
        return (
            None if values is None else torch.where(chosen.view(-1, *[1] * (values.dim() - 1)), values.flip(-1), values)
        )

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
            padding = torch.from_numpy(reflected(np.arange(side, crop), side))
            image = torch.cat([image, image.index_select(dim, padding)], dim)
        else:
            image = image.narrow(dim, start, crop)
    return image.movedim(channels, 0)


def nearest_crop(values: Tensor, geometry: CropGeometry, crop_size: Sequence[int], fill: int) -> Tensor:
    """Crop of `values` [...,H,W] after nearest-neighbor resizing, padded with `fill` at the bottom and right; on a CPU.

    Only the pixels of the crop are read. The nearest pixel is that of torch's `nearest-exact`, in integers.
    """
    rows, columns = (
        _nearest(np.arange(start, min(start + crop, side)), values.shape[dim], side)
        for dim, side, start, crop in _axes(geometry, crop_size)
    )
    # NumPy indexes columns 6 times as fast as torch.
    inside = torch.from_numpy(values.numpy()[..., rows, :][..., columns])
    height, width = inside.shape[-2:]
    if (height, width) == tuple(crop_size):
        return inside
    crop = inside.new_full((*inside.shape[:-2], *crop_size), fill)
    crop[..., :height, :width] = inside
    return crop


def _axes(geometry: CropGeometry, crop_size: Sequence[int]) -> tuple[tuple[int, int, int, int], ...]:
    """(dimension, resized side, start of the crop, side of the crop) of rows and columns."""
    return (-2, geometry.height, geometry.top, crop_size[0]), (-1, geometry.width, geometry.left, crop_size[1])


def _nearest(position: np.ndarray, side: int, resized: int | np.ndarray) -> np.ndarray:
    """Pixels of a side that are nearest to those at `position` of the resized side."""
    return (2 * position + 1) * side // (2 * resized)


# ---- a batch


@dataclass(frozen=True)
class _BatchAxis:
    """Rows or columns of the crops of a batch.

    Attributes:
        side: Side of the images, pixels.
        resized: Side of each resized image, int [B,1].
        wanted: Pixels of the resized images in the crops, [B,crop]; those from `resized` on are padding.
    """

    side: int
    resized: np.ndarray
    wanted: np.ndarray


def _batch_axes(
    geometries: Sequence[CropGeometry], size: Sequence[int], crop_size: Sequence[int]
) -> tuple[_BatchAxis, _BatchAxis]:
    of_rows = np.array([(one.height, one.top) for one in geometries])
    of_columns = np.array([(one.width, one.left) for one in geometries])
    return tuple(
        _BatchAxis(side, own[:, :1], own[:, 1:] + np.arange(crop))
        for own, side, crop in zip((of_rows, of_columns), size, crop_size)
    )


def _nearest_pixels(axes: tuple[_BatchAxis, _BatchAxis], device: torch.device) -> Tensor:
    """Numbers of the source pixels nearest to those of the crops, int64 [B,rows,columns]; negative in the padding."""
    rows, columns = axes
    outside = -rows.side * columns.side
    nearest = (
        np.where(axis.wanted < axis.resized, _nearest(axis.wanted, axis.side, axis.resized), outside) for axis in axes
    )
    row, column = (to_device(each, device) for each in nearest)
    return torch.add(column.unsqueeze(1), row.unsqueeze(2), alpha=columns.side)


def _take(values: Tensor, pixels: Tensor, fill: int) -> Tensor:
    """Take `pixels` of `_nearest_pixels` from `values` [B,...,H,W], with `fill` where their number is negative."""
    wanted = pixels.view(len(pixels), *[1] * (values.dim() - 3), -1).expand(*values.shape[:-2], -1)
    taken = values.flatten(-2).gather(-1, wanted.clamp(min=0)).masked_fill_(wanted < 0, fill)
    return taken.unflatten(-1, pixels.shape[-2:])
