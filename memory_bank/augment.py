"""Weak and strong views: ClassMix, scale and crop, mirror, colors, blur (section 4.2 of the paper and its release).

Apart from the factors of the colors and the mixed classes every choice is one for a whole batch. Images are float in
[0, 1], padding is black.
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
from common.seeding import generator, generators
from memory_bank.config import Config

Maps = tuple[Tensor, Tensor, Tensor]
BLUR_SIGMA, BLUR_TAPS = 1.5, 23


@dataclass(frozen=True)
class Ranges:
    """What a view is drawn from.

    Attributes:
        mix_probability: Of ClassMix.
        jitter_probability: Of changed colors.
        jitter: Largest change of brightness and contrast; saturation changes by half of it, hue by a third of a turn
            times it.
        blur_probability: Of a blur.
        scale_probability: Of another scale.
        scale: Smallest and largest.
    """

    mix_probability: float
    jitter_probability: float
    jitter: float
    blur_probability: float
    scale_probability: float
    scale: tuple[float, float] = (0.75, 1.75)


WEAK = Ranges(mix_probability=0.2, jitter_probability=0.2, jitter=0.125, blur_probability=0.0, scale_probability=0.5)
STRONG = Ranges(mix_probability=0.75, jitter_probability=0.8, jitter=0.25, blur_probability=0.2, scale_probability=0.8)


@dataclass(frozen=True)
class Choice:
    """One for a whole batch.

    Attributes:
        mixes: Whether images are mixed.
        scale: Factor of the size; 1 leaves everything as it is.
        corner: Where a crop of the enlarged images begins, as shares (row, column) of the places there are.
        flips: Whether the images are mirrored.
        colors: The order of the four changes of color; empty: none.
        blurs: Whether the images are blurred.
    """

    mixes: bool = False
    scale: float = 1.0
    corner: tuple[float, float] = (0.0, 0.0)
    flips: bool = False
    colors: tuple[str, ...] = ()
    blurs: bool = False


def draw_choice(rng: Generator, ranges: Ranges) -> Choice:
    """As many draws whatever they give, so that a change of one probability leaves the other draws alone."""
    mix_chance, scale_chance, flip_chance, jitter_chance, blur_chance, *corner = rng.random(7)
    scale = float(rng.uniform(*ranges.scale))
    order = tuple(list(_COLOR_CHANGES)[i] for i in rng.permutation(len(_COLOR_CHANGES)))
    return Choice(
        mix_chance < ranges.mix_probability,
        scale if scale_chance < ranges.scale_probability else 1.0,
        tuple(corner),
        flip_chance < 0.5,
        order if jitter_chance < ranges.jitter_probability else (),
        blur_chance < ranges.blur_probability,
    )


def draw_factors(rng: Generator, jitter: float) -> dict[str, float]:
    """Amounts of an image's changes of color, by name. Brightness is added to, hue is in turns."""
    widths = {"brightness": jitter, "contrast": jitter, "saturation": jitter / 2, "hue": jitter / 3}
    middle = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    return {name: float(rng.uniform(middle[name] - width, middle[name] + width)) for name, width in widths.items()}


def view(
    image: Tensor,
    label: Tensor,
    confidence: Tensor,
    choice: Choice,
    ranges: Ranges,
    rngs: Sequence[Generator],
    with_background: bool,
    from_next: Callable[..., tuple[Tensor, ...]],
) -> Maps:
    """One view of a batch, all of [B,...,H,W].

    Args:
        image: float in [0, 1], [B,3,H,W].
        label: int64 [B,H,W].
        confidence: [B,H,W].
        choice: Of the whole batch, over all processes.
        ranges: Of the colors.
        rngs: One generator an image.
        with_background: Whether class 0 is mixed like any other.
        from_next: The tensors with which the next process calls it: images mix with the next one of all processes.
    """
    keys = np.stack([draw_class_keys(rng) for rng in rngs])
    factors = [draw_factors(rng, ranges.jitter) for rng in rngs]
    if choice.mixes:
        mask = class_mask(label, to_device(keys, label.device), with_background)
        following = from_next(*(values[0] for values in (image, label, confidence, mask)))
        image, label, confidence = class_mix(image, label, confidence, mask, following)
    if choice.scale != 1:
        image, label, confidence = rescale(image, label, confidence, choice)
    if choice.flips:
        image, label, confidence = (values.flip(-1) for values in (image, label, confidence))
    for name in choice.colors:
        image = _COLOR_CHANGES[name](image, [own[name] for own in factors])
    return (blur(image) if choice.blurs else image), label, confidence


# ---- ClassMix


def class_mask(label: Tensor, keys: Tensor, with_background: bool) -> Tensor:
    """bool [B,H,W]: True on n // 2 + 1 of the n classes of each image, those of the lowest keys.

    Ignored pixels are a class only where there is no other, the background (0) only where there is none besides these
    two or `with_background`.

    Args:
        label: int64 [B,H,W].
        keys: int64 [B,256], ranks of all values.
        with_background: See above.
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
    """How many classes of so many are pasted."""
    return candidates // 2 + 1


def class_mix(image: Tensor, label: Tensor, confidence: Tensor, mask: Tensor, following: tuple[Tensor, ...]) -> Maps:
    """Paste what `mask` [B,H,W] shows of each image into the one before it.

    Args:
        image, label, confidence: [B,...,H,W].
        mask: bool [B,H,W].
        following: Image, label, confidence and mask [...,H,W] that come after this batch: those of its first image, or
            of the next process's.
    """
    own = (image, label, confidence, mask)
    partners = [torch.cat((values[1:], first.unsqueeze(0))) for values, first in zip(own, following, strict=True)]
    return tuple(mix(partner, values, partners[3]) for partner, values in zip(partners[:3], own[:3]))


# ---- scale and crop


def rescale(image: Tensor, label: Tensor, confidence: Tensor, choice: Choice) -> Maps:
    """Another scale at the same size: what is smaller is padded (black, ignored, confidence 0), what is larger cropped.

    The crop begins at `choice.corner`. The odd pixel of the padding is at the right, but at the top, as released.
    """
    height, width = image.shape[-2:]
    size = (int(height * choice.scale), int(width * choice.scale))
    resize = {"size": size, "mode": "bilinear", "align_corners": True}
    image = F.interpolate(image, **resize)
    confidence = F.interpolate(confidence.unsqueeze(1), **resize).squeeze(1)
    label = F.interpolate(label.unsqueeze(1).float(), size, mode="nearest").squeeze(1).long()
    if choice.scale > 1:
        top, left = (int(s * (big - side + 1)) for s, big, side in zip(choice.corner, size, (height, width)))
        inside = (..., slice(top, top + height), slice(left, left + width))
        return image[inside], label[inside], confidence[inside]
    down, right = height - size[0], width - size[1]
    padding = (right // 2, right - right // 2, down - down // 2, down // 2)
    return F.pad(image, padding), F.pad(label, padding, value=IGNORE), F.pad(confidence, padding)


# ---- colors and blur, of images in [0, 1]


def _brightness(image: Tensor, amounts: Sequence[float]) -> Tensor:
    """Added, as Kornia does: torchvision multiplies."""
    return (image + _column(amounts, image)).clamp(0, 1)


def _contrast(image: Tensor, amounts: Sequence[float]) -> Tensor:
    """Multiplied, as Kornia does: torchvision stretches about the mean."""
    return (image * _column(amounts, image)).clamp(0, 1)


def _saturation(image: Tensor, amounts: Sequence[float]) -> Tensor:
    """The lowest channel's distance from the highest one times the factor, at most the highest; hue and value stay."""
    highest, lowest = image.amax(1, keepdim=True), image.amin(1, keepdim=True)
    spread = (highest - lowest).clamp(min=torch.finfo(image.dtype).tiny)
    factor = torch.minimum(_column(amounts, image), highest / spread)
    return highest - (highest - image) * factor


def _hue(image: Tensor, amounts: Sequence[float]) -> Tensor:
    return torch.stack([adjust_hue(one, amount) for one, amount in zip(image, amounts, strict=True)])


_COLOR_CHANGES = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}


def _column(amounts: Sequence[float], image: Tensor) -> Tensor:
    """[B,1,1,1]."""
    return to_device(np.array(amounts, np.float32), image.device).to(image.dtype).view(-1, 1, 1, 1)


def blur(image: Tensor) -> Tensor:
    """Along the rows alone, sigma 1.5: the release gives Kornia its two sigmas as those of the axes, 0.1 and 1.5."""
    reach = BLUR_TAPS // 2
    place = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
    taps = torch.exp(-(place / BLUR_SIGMA).square() / 2)
    kernel = (taps / taps.sum()).view(1, 1, 1, -1)
    channels = image.flatten(0, 1).unsqueeze(1)
    return F.conv2d(F.pad(channels, (reach, reach, 0, 0), mode="reflect"), kernel).view_as(image)


@dataclass(frozen=True)
class BlackCrop:
    """A random crop; what an image is too small for is black and ignored.

    Attributes:
        crop_size: Height and width of the result, pixels.
        scale_range: Of the uniform random scale.
    """

    crop_size: tuple[int, int]
    scale_range: tuple[float, float]

    def __call__(self, image: Tensor, label: Tensor | None, rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
        """uint8 [3,H,W] and [H,W] -> the same at the size of the crop."""
        geometry = draw_geometry(rng, image.shape[-2:], self.crop_size, self.scale_range)
        image, label, _ = apply_geometry(image, label, None, geometry, self.crop_size)
        # Nothing of the source is written to: where there is padding, the crop is a copy.
        image[:, geometry.height :] = 0
        image[:, :, geometry.width :] = 0
        return image, label


def crop_of(config: Config) -> BlackCrop:
    """The crop of labeled and unlabeled images."""
    factor = 0.5 if config.method.half_size else 1.0
    low, high = config.data.scale_range
    return BlackCrop(config.data.crop_size, (factor * low, factor * high))


def draw_view(
    image: Tensor,
    label: Tensor,
    confidence: Tensor | None,
    positions: list[int],
    purpose: str,
    ranges: Ranges,
    config: Config,
    run: Run,
) -> Maps:
    """A view of a batch; what is common to its images is also common to those of other processes.

    Args:
        image: uint8, or float in [0, 1], [B,3,H,W].
        label: int64 [B,H,W].
        confidence: [B,H,W]; None counts as 1 everywhere.
        positions: What the random numbers of each image follow from.
        purpose: Name of the view.
        ranges: What is drawn from.
    """
    seed = config.run.seed
    # The first position of the whole batch: this process's first one, less those of the processes before it.
    start = positions[0] - run.rank * len(positions)
    choice = draw_choice(generator(seed, f"{purpose}, the batch", start), ranges)
    image = image if image.is_floating_point() else image / 255
    confidence = torch.ones_like(image[:, 0]) if confidence is None else confidence
    rngs = generators(seed, purpose, positions)
    background = config.method.mix_background
    return view(image, label, confidence, choice, ranges, rngs, background, run.from_next_process)


def strong_views(
    image: Tensor, label: Tensor, confidence: Tensor, positions: list[int], mixes: bool, config: Config, run: Run
) -> Maps:
    """Two independent strong views of each image, next to each other: [2B,...]; arguments as `draw_view`.

    Args:
        mixes: Whether ClassMix has begun.
    """
    ranges = STRONG if mixes else replace(STRONG, mix_probability=0.0)
    views = [
        draw_view(image, label, confidence, positions, f"strong view {number}", ranges, config, run)
        for number in (1, 2)
    ]
    return tuple(torch.stack(maps, dim=1).flatten(0, 1) for maps in zip(*views))
