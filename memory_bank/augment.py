"""Crop, and weak and strong augmentation: ClassMix, scale, mirror, colors, blur (paper, section 4.2, and its release).

Color factors and mixed classes are drawn per image, everything else per batch. Images are float in [0, 1]; padding is
black.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor

from common import IGNORE
from common.augment import apply_geometry, draw_geometry, mix
from common.augment.mixing import draw_class_keys
from common.augment.photometric import adjust_hue
from common.engine.run import Run
from common.images import to_device
from common.loaders import Batch
from common.seeding import generator, generators
from memory_bank.config import Config

Maps = tuple[Tensor, Tensor, Tensor]
BLUR_SIGMA, BLUR_TAPS = 1.5, 23


@dataclass(frozen=True)
class AugmentRanges:
    """Probabilities and ranges of a view.

    Attributes:
        mix_probability: Probability of ClassMix.
        jitter_probability: Probability of color changes.
        jitter: Largest change of brightness and contrast; saturation changes by half of it, hue by a third of it, in
            turns.
        blur_probability: Probability of a blur.
        scale_probability: Probability of another scale.
        scale: Smallest and largest scale.
    """

    mix_probability: float
    jitter_probability: float
    jitter: float
    blur_probability: float
    scale_probability: float
    scale: tuple[float, float] = (0.75, 1.75)


WEAK = AugmentRanges(
    mix_probability=0.2, jitter_probability=0.2, jitter=0.125, blur_probability=0.0, scale_probability=0.5
)
STRONG = AugmentRanges(
    mix_probability=0.75, jitter_probability=0.8, jitter=0.25, blur_probability=0.2, scale_probability=0.8
)


@dataclass(frozen=True)
class BatchAugment:
    """Augmentation parameters shared by the whole batch.

    Attributes:
        is_mixed: ClassMix is applied.
        scale: Factor of the size; 1 leaves everything unchanged.
        corner: Start (row, column) of the crop of enlarged images, each as a share in [0, 1) of the possible starts.
        is_flipped: The images are mirrored.
        colors: Order of the four color changes; empty for none.
        is_blurred: The images are blurred.
    """

    is_mixed: bool = False
    scale: float = 1.0
    corner: tuple[float, float] = (0.0, 0.0)
    is_flipped: bool = False
    colors: tuple[str, ...] = ()
    is_blurred: bool = False


def draw_batch_augment(rng: Generator, ranges: AugmentRanges) -> BatchAugment:
    """Draw the parameters of a batch.

    Always makes the same number of draws, so changing one probability does not shift the others.
    """
    mix_chance, scale_chance, flip_chance, jitter_chance, blur_chance, *corner = rng.random(7)
    scale = float(rng.uniform(*ranges.scale))
    order = tuple(list(_COLOR_CHANGES)[i] for i in rng.permutation(len(_COLOR_CHANGES)))
    return BatchAugment(
        mix_chance < ranges.mix_probability,
        scale if scale_chance < ranges.scale_probability else 1.0,
        tuple(corner),
        flip_chance < 0.5,
        order if jitter_chance < ranges.jitter_probability else (),
        blur_chance < ranges.blur_probability,
    )


def draw_factors(rng: Generator, jitter: float) -> dict[str, float]:
    """Draw the amounts of an image's color changes, by name. Brightness is an offset, hue is in turns."""
    widths = {"brightness": jitter, "contrast": jitter, "saturation": jitter / 2, "hue": jitter / 3}
    middle = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    return {name: float(rng.uniform(middle[name] - width, middle[name] + width)) for name, width in widths.items()}


# ---- views


def augment_labeled(
    batch: Batch, ranges: AugmentRanges, purpose: str, config: Config, run: Run
) -> tuple[Tensor, Tensor]:
    """Weak view of a labeled batch: image float [B,3,H,W] in [0,1] and label int64 [B,H,W].

    Args:
        batch: Images uint8 with labels.
        ranges: Probabilities and ranges of the view.
        purpose: Name of the view, part of the seed.
    """
    maps = (batch.image / 255, batch.label, torch.ones_like(batch.image[:, 0], dtype=torch.float32))
    return _draw_view(maps, batch.positions, purpose, ranges, config, run)[:2]


def augment_unlabeled(maps: Maps, positions: Sequence[int], use_classmix: bool, config: Config, run: Run) -> Maps:
    """Two independent strong views of each image, next to each other: [2B,...].

    Args:
        maps: Image float [B,3,H,W] in [0,1], pseudo-label int64 [B,H,W] and confidence [B,H,W].
        positions: Positions of the images in their stream, which seed the random numbers.
        use_classmix: ClassMix has started.
    """
    ranges = STRONG if use_classmix else replace(STRONG, mix_probability=0.0)
    views = [_draw_view(maps, positions, f"strong view {number}", ranges, config, run) for number in (1, 2)]
    return tuple(torch.stack(pair, dim=1).flatten(0, 1) for pair in zip(*views))


def _draw_view(
    maps: Maps, positions: Sequence[int], purpose: str, ranges: AugmentRanges, config: Config, run: Run
) -> Maps:
    seed = config.run.seed
    # Position of the first image over all processes: those of lower rank hold the positions before this one's.
    start = positions[0] - run.rank * len(positions)
    parameters = draw_batch_augment(generator(seed, f"{purpose}, the batch", start), ranges)
    rngs = generators(seed, purpose, positions)
    return apply_view(maps, parameters, ranges, rngs, config.method.mix_background, run.from_next_process)


def apply_view(
    maps: Maps,
    parameters: BatchAugment,
    ranges: AugmentRanges,
    rngs: Sequence[Generator],
    with_background: bool,
    from_next: Callable[..., tuple[Tensor, ...]],
) -> Maps:
    """Apply one view to a batch; shapes stay the same.

    Args:
        maps: Image float [B,3,H,W] in [0, 1], label int64 [B,H,W] and confidence [B,H,W].
        parameters: Parameters of the whole batch, over all processes.
        ranges: Range of the color changes.
        rngs: One generator per image.
        with_background: ClassMix pastes class 0 like any other.
        from_next: Returns the tensors with which the next process calls it, because ClassMix pastes the next image of
            the whole batch.
    """
    keys = np.stack([draw_class_keys(rng) for rng in rngs])
    factors = [draw_factors(rng, ranges.jitter) for rng in rngs]
    if parameters.is_mixed:
        mask = class_mask(maps[1], to_device(keys, maps[1].device), with_background)
        maps = class_mix(*maps, mask, from_next(*(values[0] for values in (*maps, mask))))
    if parameters.scale != 1:
        maps = rescale(*maps, parameters)
    image, label, confidence = (values.flip(-1) for values in maps) if parameters.is_flipped else maps
    for name in parameters.colors:
        image = _COLOR_CHANGES[name](image, [own[name] for own in factors])
    return (blur(image) if parameters.is_blurred else image), label, confidence


# ---- ClassMix


def class_mask(label: Tensor, keys: Tensor, with_background: bool) -> Tensor:
    """Select n // 2 + 1 of the n classes in each image, those with the lowest keys; a bool mask [B,H,W].

    `common.augment.mixing.class_mask` takes n // 2, ignored pixels and background included. Here ignored pixels count
    as a class only in images without any other, and class 0 only in images with nothing else besides ignored pixels.

    Args:
        label: int64 [B,H,W].
        keys: int64 [B,256], a random rank per label value.
        with_background: Class 0 counts like any other.
    """
    values = label.flatten(1)
    present = torch.zeros_like(keys, dtype=torch.bool).scatter_(1, values, True)
    for value in (IGNORE,) if with_background else (IGNORE, 0):
        others = present.sum(1) > present[:, value]
        present[:, value] &= ~others
    rank = keys.masked_fill(~present, 256).argsort(1).argsort(1)
    chosen = present & (rank < number_chosen(present.sum(1, keepdim=True)))
    return chosen.gather(1, values).view_as(label)


def number_chosen(candidates):
    """Number of classes to paste, from the number of candidates."""
    return candidates // 2 + 1


def class_mix(image: Tensor, label: Tensor, confidence: Tensor, mask: Tensor, following: tuple[Tensor, ...]) -> Maps:
    """Paste the pixels of each image inside `mask` into the image before it.

    Args:
        image, label, confidence: [B,...,H,W].
        mask: bool [B,H,W].
        following: Image, label, confidence and mask [...,H,W] that follow the last image: those of the next process's
            first image, with one process of this batch's.
    """
    own = (image, label, confidence, mask)
    partners = [torch.cat((values[1:], first.unsqueeze(0))) for values, first in zip(own, following, strict=True)]
    return tuple(mix(partner, values, partners[3]) for partner, values in zip(partners[:3], own[:3]))


# ---- scale and crop


def rescale(image: Tensor, label: Tensor, confidence: Tensor, parameters: BatchAugment) -> Maps:
    """Resize by `parameters.scale`, then crop at `parameters.corner` or pad (black, ignored, confidence 0) to the size.

    An odd pixel of padding goes to the right and to the top, as released.
    """
    height, width = image.shape[-2:]
    size = (int(height * parameters.scale), int(width * parameters.scale))
    resize = {"size": size, "mode": "bilinear", "align_corners": True}
    image = F.interpolate(image, **resize)
    confidence = F.interpolate(confidence.unsqueeze(1), **resize).squeeze(1)
    label = F.interpolate(label.unsqueeze(1).float(), size, mode="nearest").squeeze(1).long()
    if parameters.scale > 1:
        top, left = (int(s * (big - side + 1)) for s, big, side in zip(parameters.corner, size, (height, width)))
        inside = (..., slice(top, top + height), slice(left, left + width))
        return image[inside], label[inside], confidence[inside]
    down, right = height - size[0], width - size[1]
    padding = (right // 2, right - right // 2, down - down // 2, down // 2)
    return F.pad(image, padding), F.pad(label, padding, value=IGNORE), F.pad(confidence, padding)


# ---- colors and blur, of images in [0, 1]


def _brightness(image: Tensor, amounts: Sequence[float]) -> Tensor:
    """Add the amount, as Kornia does; torchvision multiplies."""
    return (image + _column(amounts, image)).clamp(0, 1)


def _contrast(image: Tensor, amounts: Sequence[float]) -> Tensor:
    """Multiply by the amount, as Kornia does; torchvision stretches around the mean."""
    return (image * _column(amounts, image)).clamp(0, 1)


def _saturation(image: Tensor, amounts: Sequence[float]) -> Tensor:
    """Multiply HSV saturation by the amount, clamped to 1; hue and value stay the same."""
    highest, lowest = image.amax(1, keepdim=True), image.amin(1, keepdim=True)
    spread = (highest - lowest).clamp(min=torch.finfo(image.dtype).tiny)
    factor = torch.minimum(_column(amounts, image), highest / spread)
    return highest - (highest - image) * factor


def _hue(image: Tensor, amounts: Sequence[float]) -> Tensor:
    return adjust_hue(image, _column(amounts, image))


_COLOR_CHANGES = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}


def _column(amounts: Sequence[float], image: Tensor) -> Tensor:
    """Amounts per image as a tensor [B,1,1,1]."""
    return to_device(np.array(amounts, np.float32), image.device).to(image.dtype).view(-1, 1, 1, 1)


def blur(image: Tensor) -> Tensor:
    """Blur [B,3,H,W] horizontally, sigma 1.5.

    The release passes the sigma range (0.1, 1.5) to Kornia, which reads it as the sigmas of the two axes; vertically
    0.1 blurs nothing.
    """
    reach = BLUR_TAPS // 2
    offset = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
    taps = torch.exp(-(offset / BLUR_SIGMA).square() / 2)
    kernel = (taps / taps.sum()).view(1, 1, 1, -1)
    channels = image.flatten(0, 1).unsqueeze(1)
    return F.conv2d(F.pad(channels, (reach, reach, 0, 0), mode="reflect"), kernel).view_as(image)


# ---- crop, before the device


@dataclass(frozen=True)
class BlackCrop:
    """A random crop; images that are too small are padded with black, ignored pixels.

    Attributes:
        crop_size: Height and width of the result, pixels.
        scale_range: Range of the uniform random scale.
    """

    crop_size: tuple[int, int]
    scale_range: tuple[float, float]

    def __call__(self, image: Tensor, label: Tensor | None, rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
        """Crop uint8 image [3,H,W] and label [H,W]."""
        geometry = draw_geometry(rng, image.shape[-2:], self.crop_size, self.scale_range)
        image, label, _ = apply_geometry(image, label, None, geometry, self.crop_size)
        # Where there is padding the crop is a copy, so this does not write to the source.
        image[:, geometry.height :] = 0
        image[:, :, geometry.width :] = 0
        return image, label


def crop_of(config: Config) -> BlackCrop:
    """Build the crop of labeled and unlabeled images."""
    factor = 0.5 if config.method.half_size else 1.0
    low, high = config.data.scale_range
    return BlackCrop(config.data.crop_size, (factor * low, factor * high))
