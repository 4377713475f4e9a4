"""CAC's training crops: single crops, pairs of overlapping crops, and the color changes of their views.

Random numbers come from a `numpy.random.Generator`, in the order of the released code.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from common import IGNORE
from common.augment import (
    CropGeometry,
    Photometric,
    PhotometricRanges,
    apply_photometric_batch,
    draw_photometric,
    nearest_crop,
)
from common.augment.crops import cut, draw_start, mirror
from common.augment.resample import filter_rows_and_columns, filter_taps, reflected
from common.images import normalize, to_device
from common.seeding import generators

CELL = 8  # pixels of an image per cell of CAC's feature maps, along a side
TRIALS = 50
JITTER = PhotometricRanges(1.0, (0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), blur_probability=0.0)
BLUR_KERNEL, BLUR_SIGMA = 5, 1.1  # OpenCV derives the sigma from a kernel of 5 pixels


@dataclass(frozen=True)
class LongerSideCrop:
    """CAC's crop of a labeled image: resize the longer side to a random length, crop, mirror with probability 0.5.

    Attributes:
        crop_size: Height and width of the result, pixels.
        base: Length of the longer side at scale 1, pixels.
        scale_range: Smallest and largest random factor on that length.
    """

    crop_size: tuple[int, int]
    base: int
    scale_range: tuple[float, float]

    def __call__(self, image: Tensor, label: Tensor | None, rng: Generator) -> tuple[Tensor, Tensor | None]:
        height, width = draw_size(rng, image.shape[-2:], self.base, self.scale_range)
        top, left = (draw_start(rng, side, crop) for side, crop in zip((height, width), self.crop_size))
        image = cut(resize(image, height, width), [(top, left)], self.crop_size)[0]
        if label is not None:
            label = nearest_crop(label, CropGeometry(height, width, top, left), self.crop_size, IGNORE)
        return mirror(image, label, rng.random() > 0.5)


@dataclass(frozen=True)
class Pair:
    """Two crops of one resized image whose displacement is a whole number of cells.

    Attributes:
        height, width: Size to which the image is resized, pixels.
        corners: (top, left) of each crop, pixels.
        overlaps: (top, left, bottom, right) of the common area in each crop, pixels, before any mirroring.
        flips: True for a crop that is mirrored.
    """

    height: int
    width: int
    corners: tuple[tuple[int, int], tuple[int, int]]
    overlaps: tuple[tuple[int, int, int, int], tuple[int, int, int, int]]
    flips: tuple[bool, bool]


def draw_pair(
    rng: Generator,
    size: Sequence[int],
    crop_size: Sequence[int],
    base: int,
    scale_range: Sequence[float],
    iou_bound: Sequence[float],
) -> Pair:
    """Draw size, first crop, second crop and mirroring; if no second crop fits in 50 trials it is the first one.

    Args:
        size: (height, width) of the image.
        crop_size: (height, width) of both crops, multiples of `CELL`.
        base, scale_range: As for `LongerSideCrop`.
        iou_bound: Smallest and largest intersection over union of the crops.
    """
    height, width = draw_size(rng, size, base, scale_range)
    sides = (max(height, crop_size[0]), max(width, crop_size[1]))
    left, top = draw_start(rng, sides[1], crop_size[1]), draw_start(rng, sides[0], crop_size[0])
    first = second = (top, left)
    for _ in range(TRIALS):
        x, y = draw_start(rng, sides[1], crop_size[1]), draw_start(rng, sides[0], crop_size[0])
        drawn = (_snapped(y, top), _snapped(x, left))
        if iou_bound[0] <= _iou(first, drawn, crop_size) <= iou_bound[1]:
            second = drawn
            break
    flips = (bool(rng.random() < 0.5), bool(rng.random() < 0.5))
    # Whole cells of the image itself, without the padding.
    limits = tuple(min(crop, side // CELL * CELL) for crop, side in zip(crop_size, (height, width)))
    overlaps = (_overlap(first, second, crop_size, limits), _overlap(second, first, crop_size, limits))
    return Pair(height, width, (first, second), overlaps, flips)


def cut_pair(image: Tensor, pair: Pair, crop_size: Sequence[int]) -> Tensor:
    """Cut both crops [2,3,h,w] of `image` uint8 [3,H,W], mirrored as the pair requires."""
    crops = cut(resize(image, pair.height, pair.width), pair.corners, crop_size)
    return torch.stack([crop.flip(-1) if flipped else crop for crop, flipped in zip(crops, pair.flips)])


def overlap_cells(pairs: Sequence[Pair], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the cells that both crops show, in the maps of view 1 and of view 2: int64 [n] for the same places.

    Args:
        pairs: Pairs of the batch.
        height, width: Size of the maps, cells.
    """
    views = []
    for view in (0, 1):
        numbers = [_cells(pair, view, height, width) + index * height * width for index, pair in enumerate(pairs)]
        views.append(np.concatenate(numbers))
    return views[0], views[1]


def draw_size(rng: Generator, size: Sequence[int], base: int, scale_range: Sequence[float]) -> tuple[int, int]:
    """Draw (height, width): the longer side gets a random whole length in `scale_range` times `base`."""
    height, width = size
    longer = max(1, int(rng.integers(int(scale_range[0] * base), int(scale_range[1] * base), endpoint=True)))
    other = max(1, int(longer * min(size) / max(size) + 0.5))
    return (longer, other) if height > width else (other, longer)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize `image` uint8 [3,H,W] by bicubic interpolation with antialiasing, as Pillow does."""
    # Decoders deliver pixels channel by channel, and in that order uint8 is resized several times faster.
    image = image.unsqueeze(0).contiguous(memory_format=torch.channels_last).squeeze(0)
    return functional.resize(image, [height, width], InterpolationMode.BICUBIC, antialias=True)


@dataclass(frozen=True)
class PairCrop:
    """Cut a random pair of crops from an unlabeled image. Attributes are the arguments of `draw_pair`."""

    crop_size: tuple[int, int]
    base: int
    scale_range: tuple[float, float]
    iou_bound: tuple[float, float]

    def draw(self, size: Sequence[int], rng: Generator) -> Pair:
        """Draw a pair for an image of `size` (height, width)."""
        return draw_pair(rng, size, self.crop_size, self.base, self.scale_range, self.iou_bound)

    def __call__(self, image: Tensor, label: None, rng: Generator) -> tuple[Tensor, None, Pair]:
        pair = self.draw(image.shape[-2:], rng)
        return cut_pair(image, pair, self.crop_size), None, pair


def augment_views(views: Tensor, positions: Sequence[int], seed: int) -> Tensor:
    """Blur, color changes and gray, drawn separately for each view: uint8 [B,2,3,H,W] -> normalized."""
    rngs = zip(*(generators(seed, f"view {number}, on the device", positions) for number in (1, 2)))
    choices = [draw_changes(rng) for pair in rngs for rng in pair]
    image = views.flatten(0, 1) / 255
    blurred = to_device(np.flatnonzero([is_blurred for is_blurred, _ in choices]), image.device)
    if len(blurred):
        image.index_copy_(0, blurred, blur(image.index_select(0, blurred)))
    return normalize(apply_photometric_batch(image, [colors for _, colors in choices])).view_as(views)


def blur(image: Tensor) -> Tensor:
    """Blur `image` [B,3,H,W], float, by a Gaussian of 5 x 5 pixels; edges are reflected."""
    weights = np.exp(-((np.arange(BLUR_KERNEL // 2 + 1) / BLUR_SIGMA) ** 2) / 2)
    weights /= weights[0] + 2 * weights[1:].sum()
    rows, columns = (
        filter_taps(side, np.tile(weights, (len(image), 1)), times=1, edge=reflected) for side in image.shape[-2:]
    )
    return filter_rows_and_columns(image, rows, columns)


def draw_changes(rng: Generator) -> tuple[bool, Photometric]:
    """Draw the changes of a view: a blur with probability 0.5; then other colors with 0.8, and gray with 0.2."""
    blurred, colored, gray = rng.random(3)
    jitter = draw_photometric(rng, JITTER).jitter if colored < 0.8 else ()
    return blurred < 0.5, Photometric(jitter, None, gray < 0.2)


def _snapped(position: int, origin: int) -> int:
    """Move `position` to a whole number of cells from `origin`, and not below 0."""
    snapped = (position - origin) // CELL * CELL + origin
    return snapped + CELL if snapped < 0 else snapped


def _iou(first: tuple[int, int], second: tuple[int, int], crop_size: Sequence[int]) -> float:
    rows, columns = (crop - abs(a - b) for a, b, crop in zip(first, second, crop_size))
    common = max(rows, 0) * max(columns, 0)
    return common / (2 * crop_size[0] * crop_size[1] - common)


def _overlap(
    own: tuple[int, int], other: tuple[int, int], crop_size: Sequence[int], limits: Sequence[int]
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the other crop's area within this crop."""
    moved = [b - a for a, b in zip(own, other)]
    start = [max(0, move) for move in moved]
    end = [min(crop, crop + move, limit) for crop, move, limit in zip(crop_size, moved, limits)]
    return (*start, *end)


def _cells(pair: Pair, view: int, height: int, width: int) -> np.ndarray:
    top, left, bottom, right = (side // CELL for side in pair.overlaps[view])
    columns = np.arange(left, right)
    if pair.flips[view]:
        columns = width - 1 - columns
    return (np.arange(top, bottom)[:, None] * width + columns).ravel()
