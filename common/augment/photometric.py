"""Color jitter, grayscale and blur."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from common.augment.resample import filter_rows_and_columns, filter_taps, repeated
from common.images import to_device

COLOR_CHANGES = ("brightness", "contrast", "saturation", "hue")  # in the order in which they are drawn
_SAME, _NONE = np.eye(3), np.zeros((3, 3))
_GRAY = np.tile([0.2989, 0.587, 0.114], (3, 1))  # torchvision's weights of red, green and blue


@dataclass(frozen=True)
class PhotometricRanges:
    """Probabilities and ranges of random color changes; the defaults are those of PRCL and CSS.

    Attributes:
        jitter_probability: Probability of the color jitter.
        brightness, contrast, saturation: Smallest and largest factor; 1 = unchanged.
        hue: Smallest and largest change, in turns of the color circle; 0 = unchanged.
        gray_probability: Probability of the conversion to gray; 0 draws nothing for it.
        blur_probability: Probability of the blur.
        blur_sigma: Smallest and largest standard deviation of the blur, pixels.
    """

    jitter_probability: float = 0.8
    brightness: tuple[float, float] = (0.75, 1.25)
    contrast: tuple[float, float] = (0.75, 1.25)
    saturation: tuple[float, float] = (0.75, 1.25)
    hue: tuple[float, float] = (-0.25, 0.25)
    gray_probability: float = 0.0
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.15, 1.15)


@dataclass(frozen=True)
class Photometric:
    """Drawn color changes of an image.

    Attributes:
        jitter: (name, amount) of the changes, in the order in which they are made; empty for none.
        blur_sigma: Standard deviation of the blur that follows, pixels; None for no blur.
        gray: Convert to gray between the two.
    """

    jitter: tuple[tuple[str, float], ...] = ()
    blur_sigma: float | None = None
    gray: bool = False


def draw_photometric(rng: Generator, ranges: PhotometricRanges = PhotometricRanges()) -> Photometric:
    """Draw color changes.

    The number of draws is always the same, so changing one probability does not shift the others.
    """
    jitter_chance, blur_chance = rng.random(2)
    amounts = [(name, float(rng.uniform(*getattr(ranges, name)))) for name in COLOR_CHANGES]
    jitter = tuple(amounts[i] for i in rng.permutation(len(amounts)))
    sigma = float(rng.uniform(*ranges.blur_sigma))
    gray = ranges.gray_probability > 0 and bool(rng.random() < ranges.gray_probability)
    return Photometric(
        jitter if jitter_chance < ranges.jitter_probability else (),
        sigma if blur_chance < ranges.blur_probability else None,
        gray,
    )


def apply_photometric_batch(image: Tensor, photometrics: Sequence[Photometric]) -> Tensor:
    """Jitter, convert to gray and blur each image of a batch by its own choice, in a fixed number of operators.

    Args:
        image: [B,3,H,W], uint8 or float in [0, 1]; not changed.
        photometrics: Drawn changes per image; brightness, contrast, saturation and hue at most once each.
    """
    colored = [i for i, one in enumerate(photometrics) if one.jitter or one.gray]
    blurred = [i for i, one in enumerate(photometrics) if one.blur_sigma is not None]
    if not colored and not blurred:
        return image
    # uint8 is converted to float, on which color changes are faster and only one rounding is needed.
    result = image / 255 if image.dtype == torch.uint8 else image.clone()
    if colored:
        sequences = [_color_sequence(photometrics[i]) for i in colored]
        order = sorted(range(len(colored)), key=lambda i: (-len(sequences[i].before), len(sequences[i].after)))
        chosen = to_device(np.array([colored[i] for i in order]), image.device)
        result.index_copy_(0, chosen, _change_colors(result.index_select(0, chosen), [sequences[i] for i in order]))
    reaches = {i: _whole_reach(photometrics[i].blur_sigma) for i in blurred}
    for reach in sorted(set(reaches.values())):  # few, e.g. 2 up to a sigma of 2.4; a wide blur takes twice as long
        group = [i for i in blurred if reaches[i] == reach]
        chosen = to_device(np.array(group), image.device)
        sigma = np.array([photometrics[i].blur_sigma for i in group])
        result.index_copy_(0, chosen, _blur(result.index_select(0, chosen), sigma, reach))
    return (result * 255).round_().to(torch.uint8) if image.dtype == torch.uint8 else result


# ---- colors


@dataclass(frozen=True)
class _ColorSequence:
    """Color changes of an image: turn of the hue, and the changes (name, factor) before and after it, in order."""

    before: list[tuple[str, float]]
    turns: float
    after: list[tuple[str, float]]


def _color_sequence(photometric: Photometric) -> _ColorSequence:
    changes = [*photometric.jitter, *([("saturation", 0.0)] if photometric.gray else [])]
    names = [name for name, _ in changes]
    if "hue" not in names:
        return _ColorSequence(changes, 0.0, [])
    place = names.index("hue")
    return _ColorSequence(changes[:place], changes[place][1], changes[place + 1 :])


def _change_colors(image: Tensor, sequences: Sequence[_ColorSequence]) -> Tensor:
    """Make the color changes of each image of `image` float [B,3,H,W], which is changed too.

    Hue is turned once for all images. The other changes of all images are made together: first those before the hue,
    each in the images that have so many, then those after it. Sorting by the number of changes makes these images
    neighbors, e.g. for three changes per image in orders that differ:

        changes before the hue   3 3 2 2 1 0 0      the first one is made in 5 images, the second in 4, the third in 2
        changes after it         0 0 1 1 2 3 3      the first one is made in 5 images, the second in 3, the third in 2

    Args:
        image: In the order of `sequences`.
        sequences: Sorted by the number of changes before the hue, most first, then by the number after it.
    """
    rounds = _rounds([one.before for one in sequences]), _rounds([one.after for one in sequences])
    numbers = [np.array([one.turns for one in sequences], np.float32)]
    numbers += [matrices for part in rounds for _, matrices in part]
    sent = to_device(np.concatenate([part.ravel() for part in numbers]), image.device)  # one copy for all
    turns, *matrices = sent.split([part.size for part in numbers])
    for (images, _), own in zip(rounds[0], matrices):
        _blend(image[images], own)
    image = adjust_hue(image, turns.view(-1, 1, 1, 1))
    for (images, _), own in zip(rounds[1], matrices[len(rounds[0]) :]):
        _blend(image[images], own)
    return image


def _rounds(changes: Sequence[Sequence[tuple[str, float]]]) -> list[tuple[slice, np.ndarray]]:
    """Changes number 1, 2, ... of all images: the images from the first to the last that has one, and their matrices.

    Returns:
        For each number the images, and float32 [2,n,3,3] for `_blend`; images without such a change stay as they are.
    """
    rounds = []
    for number in range(max(map(len, changes), default=0)):
        having = [i for i, own in enumerate(changes) if len(own) > number]
        images = slice(having[0], having[-1] + 1)
        pairs = [_matrices(*own[number]) if len(own) > number else (_SAME, _NONE) for own in changes[images]]
        rounds.append((images, np.stack(pairs, axis=1).astype(np.float32)))
    return rounds


def _matrices(name: str, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Matrices [3,3] that map the color of a pixel, and the mean color of the image, to parts of the new color.

    As in torchvision, brightness blends with black, contrast with the mean gray, saturation with the gray of the pixel.
    """
    scaled, gray = factor * _SAME, (1 - factor) * _GRAY
    return {"brightness": (scaled, _NONE), "contrast": (scaled, gray), "saturation": (scaled + gray, _NONE)}[name]


def _blend(image: Tensor, matrices: Tensor) -> None:
    """Change the colors of `image` [n,3,H,W] in place by `matrices` of `_rounds`, flattened."""
    of_pixel, of_mean = matrices.view(2, -1, 3, 3)
    pixels = image.flatten(2)
    offset = torch.bmm(of_mean, pixels.mean(2, keepdim=True))
    torch.clamp(torch.baddbmm(offset, of_pixel, pixels), 0, 1, out=pixels)


def adjust_hue(image: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of `image` [B,3,H,W], float, by `turns` [B,1,1,1], as torchvision's `adjust_hue` does.

    The hue h is in sixths of a turn, from 0 (red) over 2 (green) and 4 (blue) to 6. A channel is 1 within a distance of
    1 from its own h, 0 from a distance of 2 on, and linear between; the result is stretched to the range between the
    pixel's lowest and highest channel. 3 to 4 times as fast as torchvision on the CPU.
    """
    red, green, blue = image.split(1, dim=1)
    highest, lowest = image.amax(1, keepdim=True), image.amin(1, keepdim=True)
    spread = highest - lowest
    # `lerp` chooses by a weight of 0 or 1, on the CPU several times as fast as `where`.
    hue = (red - green).add_(spread, alpha=4)
    hue.lerp_((blue - red).add_(spread, alpha=2), (highest == green).to(hue.dtype))
    hue.lerp_(green - blue, (highest == red).to(hue.dtype))
    # Gray has no hue: 0 / tiny = 0 keeps it gray.
    hue.div_(spread.clamp(min=torch.finfo(spread.dtype).tiny)).add_(turns, alpha=6)
    hue.sub_((hue / 6).floor_(), alpha=6)
    own, start, slope = hue_constants(image.device)
    return torch.addcmul(start, (hue - own).abs_(), slope).clamp_(0, 1).mul_(spread).add_(lowest)


@cache
def hue_constants(device: torch.device) -> tuple[Tensor, ...]:
    """Per channel, [3,1,1]: the h from which distances count, the value there, and its change per sixth of a turn."""
    return tuple(
        torch.tensor(values, device=device).view(3, 1, 1)
        for values in ((3.0, 2.0, 4.0), (-1.0, 2.0, 2.0), (1.0, -1.0, -1.0))
    )


# ---- blur


def _whole_reach(sigma: float) -> int:
    """Pixels on each side that a box of variance sigma^2 / 3 covers as a whole."""
    return int((math.sqrt(4 * sigma**2 + 1) - 1) / 2)


def _blur(image: Tensor, sigma: np.ndarray, whole: int) -> Tensor:
    """Blur `image` [B,3,H,W], float, by `sigma` [B] as Pillow's `GaussianBlur(sigma)` does, without its rounding.

    Three box filters along the columns and three along the rows, each of variance sigma^2 / 3, for which the outermost
    weights of a box are fractions. Edges are repeated. Faster than torchvision's Gaussian on the CPU.
    Source: Gwosdek et al., "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering", 2011.

    Args:
        whole: `_whole_reach` of every sigma.
    """
    variance = sigma[:, None] ** 2 / 3
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    covered = (whole + 1 + fraction - np.arange(whole + 2)).clip(0, 1)
    weights = covered / (2 * whole + 1 + 2 * fraction)
    rows, columns = (filter_taps(side, weights, times=3, edge=repeated) for side in image.shape[-2:])
    return filter_rows_and_columns(image, rows, columns)
