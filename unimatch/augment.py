"""Views of UniMatch and UniMatch V2: the weak crop in a worker, strong views and CutMix on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.random import Generator
from torch import Tensor
from torchvision.transforms.v2 import functional

from common import IGNORE
from common.augment import PhotometricRanges, apply_photometric_batch, draw_flip, draw_photometric, mix
from common.augment.crops import draw_start, mirror
from common.augment.geometry import CropGeometry, nearest_crop
from common.augment.mixing import Box, box_mask
from common.engine.run import Run
from common.seeding import generators

STRONG = PhotometricRanges(
    jitter_probability=0.8,
    brightness=(0.5, 1.5),
    contrast=(0.5, 1.5),
    saturation=(0.5, 1.5),
    hue=(-0.25, 0.25),
    gray_probability=0.2,
    blur_probability=0.5,
    blur_sigma=(0.1, 2.0),
)


@dataclass(frozen=True)
class LongSideCrop:
    """Weak view: resize to a random length of the long side, pad with black, crop, mirror with probability 0.5.

    A labeled image gets no other augmentation. For an unlabeled image the label is 0, and 255 in the padding.

    Attributes:
        crop_size: Height and width of the result, pixels.
        scale_range: Bounds of the long side's length, as factors of the image's.
    """

    crop_size: tuple[int, int]
    scale_range: tuple[float, float] = (0.5, 2.0)

    def __call__(self, image: Tensor, label: Tensor | None, rng: Generator) -> tuple[Tensor, Tensor]:
        label = torch.zeros(image.shape[-2:], dtype=torch.uint8) if label is None else label
        geometry = draw_long_side(rng, image.shape[-2:], self.crop_size, self.scale_range)
        resized = functional.resize(image, [geometry.height, geometry.width], antialias=True)
        image = functional.crop(resized, geometry.top, geometry.left, *self.crop_size)
        return mirror(image, nearest_crop(label, geometry, self.crop_size, IGNORE), draw_flip(rng))


def draw_long_side(
    rng: Generator, size: Sequence[int], crop_size: Sequence[int], scale_range: Sequence[float]
) -> CropGeometry:
    """Draw a whole length of the long side, the other side rounded half up, and a uniform position."""
    longest = max(size)
    length = int(rng.integers(*(int(scale * longest) for scale in scale_range), endpoint=True))
    height, width = (max(1, int(side * length / longest + 0.5)) for side in size)
    left, top = draw_start(rng, width, crop_size[1]), draw_start(rng, height, crop_size[0])
    return CropGeometry(height, width, top, left)


def draw_cutmix_box(rng: Generator, height: int, width: int) -> Box:
    """Draw the box of a strong view: none (empty) with probability 0.5, else 2 to 40 % of the area.

    As released, height / width is uniform between 0.3 and 1 / 0.3, and drawn again with the corner until the box fits;
    boxes are on average taller than wide.
    """
    if rng.random() > 0.5:
        return Box(0, 0, 0, 0)
    area = rng.uniform(0.02, 0.4) * height * width
    while True:
        ratio = rng.uniform(0.3, 1 / 0.3)
        box_width, box_height = int((area / ratio) ** 0.5), int((area * ratio) ** 0.5)
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        if left + box_width <= width and top + box_height <= height:
            return Box(top, left, top + box_height, left + box_width)


def strong_views(weak: Tensor, positions: Sequence[int], seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Draw strong views of the same crops, independent of each other: colors, and the pixels that keep their own.

    Args:
        weak: float [B,3,H,W] in [0,1].
        positions: Position of each image in the run, from which its random numbers follow.
        seed: Seed of the run.
        count: Number of views.

    Returns:
        Image [B,3,H,W] and bool mask [B,H,W], False inside the CutMix box, for each view.
    """
    rngs = generators(seed, "strong views, on the device", positions)
    height, width = weak.shape[-2:]
    colors, boxes = [], []
    for _ in range(count):
        colors += [draw_photometric(rng, STRONG) for rng in rngs]
        boxes += [draw_cutmix_box(rng, height, width) for rng in rngs]
    images = apply_photometric_batch(weak.repeat(count, 1, 1, 1), colors)  # all views at once
    masks = box_mask(boxes, height, width, weak.device)
    return list(zip(images.chunk(count), masks.chunk(count)))


def partners(run: Run, *maps: Tensor) -> tuple[Tensor, ...]:
    """Shift maps [B,...] by one: the partner of an image is the next one of the whole batch, over all processes."""
    following = run.from_next_process(*(values[0] for values in maps))
    return tuple(torch.cat([own[1:], first[None]]) for own, first in zip(maps, following, strict=True))


def mix_maps(maps: Sequence[Tensor], partner: Sequence[Tensor], mask: Tensor) -> tuple[Tensor, ...]:
    """CutMix: every map keeps its own pixels where `mask` is True and takes the partner's elsewhere.

    Args:
        maps: [B,H,W] or [B,C,H,W], e.g. image, pseudo-label and confidence.
        partner: The same maps of the partners.
        mask: Bool [B,H,W].
    """
    return tuple(mix(own, other, mask) for own, other in zip(maps, partner, strict=True))
