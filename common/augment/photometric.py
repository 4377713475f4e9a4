"""Color jitter, grayscale and blur."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.random import Generator
from torch import Tensor
from torchvision.transforms.v2 import functional


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
    amounts = [(name, float(rng.uniform(*getattr(ranges, name)))) for name in _COLOR_CHANGES]
    jitter = tuple(amounts[i] for i in rng.permutation(len(amounts)))
    sigma = float(rng.uniform(*ranges.blur_sigma))
    gray = ranges.gray_probability > 0 and bool(rng.random() < ranges.gray_probability)
    return Photometric(
        jitter if jitter_chance < ranges.jitter_probability else (),
        sigma if blur_chance < ranges.blur_probability else None,
        gray,
    )


def apply_photometric(image: Tensor, photometric: Photometric) -> Tensor:
    """Jitter, convert to gray and blur `image` [3,H,W], uint8 or float in [0, 1]; `image` is not changed."""
    if not photometric.jitter and not photometric.gray and photometric.blur_sigma is None:
        return image
    # uint8 is converted to float, on which color changes are faster and only one rounding is needed.
    result = image / 255 if image.dtype == torch.uint8 else image
    for name, amount in photometric.jitter:
        result = _COLOR_CHANGES[name](result, amount)
    if photometric.gray:
        result = functional.rgb_to_grayscale(result, num_output_channels=3)
    if photometric.blur_sigma is not None:
        result = _blur(result, photometric.blur_sigma)
    return (result * 255).round_().to(torch.uint8) if image.dtype == torch.uint8 else result


def apply_photometric_batch(image: Tensor, photometrics: Sequence[Photometric]) -> Tensor:
    """`apply_photometric` with a choice per image: `image` [B,3,H,W]."""
    return torch.stack([apply_photometric(one, choice) for one, choice in zip(image, photometrics, strict=True)])


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Blur `image` [3,H,W], float, as Pillow's `GaussianBlur(sigma)` does, without its rounding.

    Three box filters along the columns and three along the rows, each of variance sigma^2 / 3, for which the outermost
    weights of a box are fractions. Edges are repeated. 4 times as fast as torchvision's Gaussian on the CPU.
    Source: Gwosdek et al., "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering", 2011.
    """
    variance = sigma**2 / 3
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    weight = 1 / (2 * whole + 1 + 2 * fraction)
    reach = whole + 1
    for dim, padding in ((-2, (0, 0, reach, reach)), (-1, (reach, reach, 0, 0))):
        side = image.shape[dim]
        for _ in range(3):
            padded = torch.nn.functional.pad(image, padding, mode="replicate")
            image = (padded.narrow(dim, 0, side) + padded.narrow(dim, 2 * reach, side)).mul_(fraction * weight)
            for start in range(1, 2 * reach):
                image.add_(padded.narrow(dim, start, side), alpha=weight)
    return image


def adjust_hue(image: Tensor, turns: float) -> Tensor:
    """Turn the hue of `image` [3,H,W], float, as torchvision's `adjust_hue` does, 3 to 4 times as fast.

    The hue h is in sixths of a turn, from 0 (red) over 2 (green) and 4 (blue) to 6. A channel is 1 within a distance of
    1 from its own h, 0 from a distance of 2 on, and linear between; the result is stretched to the range between the
    pixel's lowest and highest channel.
    """
    red, green, blue = image.unbind(-3)
    highest = torch.maximum(torch.maximum(red, green), blue)
    lowest = torch.minimum(torch.minimum(red, green), blue)
    spread = highest - lowest
    not_red = torch.where(highest == green, (blue - red).add_(spread, alpha=2), (red - green).add_(spread, alpha=4))
    hue = torch.where(highest == red, green - blue, not_red)
    # Gray has no hue: 0 / tiny = 0 keeps it gray.
    hue.div_(spread.clamp(min=torch.finfo(spread.dtype).tiny)).add_(6 * turns).remainder_(6)
    channels = [(hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()]
    return torch.stack(channels, -3).clamp_(0, 1).mul_(spread.unsqueeze(-3)).add_(lowest.unsqueeze(-3))


_COLOR_CHANGES = {
    "brightness": functional.adjust_brightness,
    "contrast": functional.adjust_contrast,
    "saturation": functional.adjust_saturation,
    "hue": adjust_hue,
}
