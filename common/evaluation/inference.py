"""Inference from images to class probabilities: whole image or sliding window, several scales, flip.

Logits are summed over windows, scales and flips, as CPS and CPCL evaluate (CPCL section 5), or probabilities, as
UniMatch does.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.images import normalize
from common.models.encoders import resize_to_multiple

WINDOWS_AT_ONCE = 8


@dataclass(frozen=True)
class Protocol:
    """Inference protocol, printed with every score.

    Args:
        crop: Height and width of the sliding window, in pixels of the scaled image; None for the whole image at once.
        scales: Factors the image is resized by before the network sees it.
        flip: Also predict the mirrored image.
        multiple: Number of pixels of which the sides of a whole image become multiples.
        reduce: Factor by which images are made smaller first, as in training.
        fit: Way to the multiples: `pad` reflects the image at its bottom and right; `resize` takes the nearest multiple
            for each side and resizes image and logits with aligned corners (UniMatch V2).
        summed: Scores that are summed over windows, scales and flips.

    Raises:
        UserError: a scale or a side of the window is not above 0.
    """

    crop: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    multiple: int = 1
    reduce: int = 1
    fit: Literal["pad", "resize"] = "pad"
    summed: Literal["logits", "probabilities"] = "logits"

    def __post_init__(self) -> None:
        if not self.scales or not all(math.isfinite(scale) and scale > 0 for scale in self.scales):
            raise UserError(f"evaluation scales are {list(self.scales)}; give one or more numbers above 0")
        if self.crop is not None and min(self.crop) < 1:
            raise UserError(f"the sliding window is {self.crop}; both sides must be above 0")

    def describe(self) -> str:
        """Describe the protocol in one line, e.g. `sliding window 512x512 stride 342x342, scales 0.5 1, flip`."""
        fitted = "padded to" if self.fit == "pad" else "resized to the nearest"
        area = "whole image" + (f" {fitted} multiples of {self.multiple}" if self.multiple > 1 else "")
        if self.crop is not None:
            strides = [_stride(side) for side in self.crop]
            area = f"sliding window {self.crop[0]}x{self.crop[1]} stride {strides[0]}x{strides[1]}"
        area += f" at 1/{self.reduce} of its size" if self.reduce > 1 else ""
        scales = ("scale " if len(self.scales) == 1 else "scales ") + " ".join(f"{scale:g}" for scale in self.scales)
        summed = ", probabilities summed" if self.summed == "probabilities" else ""
        return f"{area}, {scales}, {'flip' if self.flip else 'no flip'}{summed}"


class MeanOfNetworks(nn.Module):
    """Several networks as one: the mean of their logits.

    Args:
        networks: At least one network; all have the same architecture.
    """

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.align_corners = networks[0].align_corners

    def forward(self, image: Tensor) -> Tensor:
        """[B,3,H,W], normalized -> logits [B,C,h,w]."""
        return torch.stack([network(image) for network in self.networks]).mean(0)


def predict(network: nn.Module, image: Tensor, size: tuple[int, int], protocol: Protocol = Protocol()) -> Tensor:
    """Predict the class probabilities of a batch of images.

    Args:
        network: Maps a normalized image [B,3,H,W] to logits [B,C,h,w], which are up-sampled with
            `network.align_corners`. It runs in evaluation mode and is left as it was.
        image: [B,3,H,W] uint8, or float in [0,1].
        size: Height and width of the result, that of the label.
        protocol: Window, scales and flip.

    Returns:
        probability [B,C,*size]: softmax of the mean logits, or the mean of the probabilities if those are summed.
    """
    total, passes = sum_logits(network, image, size, protocol)
    return total / passes if protocol.summed == "probabilities" else (total / passes).softmax(1)


@torch.no_grad()
def sum_logits(
    network: nn.Module, image: Tensor, size: tuple[int, int], protocol: Protocol = Protocol()
) -> tuple[Tensor, Tensor]:
    """Sum the logits over windows, scales and flips; the argmax is the prediction. Arguments as for `predict`.

    Returns:
        The sum [B,C,*size], and the number of passes in each pixel's sum [*size] (fractions where window borders were
        resized). Sums are not divided by the overlap of windows before scales are added. With
        `protocol.summed == "probabilities"` the sum is that of the softmax.
    """
    accumulate = _whole if protocol.crop is None else _slide
    if protocol.reduce > 1:
        # In float: torchvision's resize of uint8 rounds twice, and branches on the sides, which cannot be exported.
        image = image / 255 if image.dtype == torch.uint8 else image
        reduced = [side // protocol.reduce for side in image.shape[-2:]]
        image = F.interpolate(image, reduced, mode="bilinear", antialias=True)
    with evaluation_mode(network):
        results = [accumulate(network, _scaled(image, scale), size, protocol) for scale in protocol.scales]
    totals, passes = zip(*results)
    return sum(totals[1:], totals[0]), sum(passes[1:], passes[0])


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Set evaluation mode within the block, and restore the mode of every submodule (frozen batch norms too)."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _whole(network: nn.Module, image: Tensor, size: tuple[int, int], protocol: Protocol) -> tuple[Tensor, Tensor]:
    image = normalize(image)
    if protocol.multiple == 1:
        logits = _forward(network, image, size, protocol)
    elif protocol.fit == "resize":
        fitted = resize_to_multiple(image, protocol.multiple)
        logits = _resized(_forward(network, fitted, fitted.shape[-2:], protocol), size, True)
    else:
        height, width = image.shape[-2:]
        margins = (0, -width % protocol.multiple, 0, -height % protocol.multiple)
        # A side that is not longer than its margin cannot be reflected.
        mode = "reflect" if margins[1] < width and margins[3] < height else "replicate"
        padded = F.pad(image, margins, mode=mode)
        logits = _forward(network, padded, padded.shape[-2:], protocol)
        # Not a slice: `torch.export` cannot follow strides that depend on the padding.
        for dim, side in ((-2, height), (-1, width)):
            logits = logits.index_select(dim, torch.arange(side, device=logits.device))
        logits = _resized(logits, size, False)
    return logits, logits.new_full(size, 1 + protocol.flip)


def _slide(network: nn.Module, image: Tensor, size: tuple[int, int], protocol: Protocol) -> tuple[Tensor, Tensor]:
    crop, (height, width) = protocol.crop, image.shape[-2:]
    left, right = _margins(width, crop[1])
    top, bottom = _margins(height, crop[0])
    margins = (left, right, top, bottom)
    # As released: an image that fits is padded with the mean color (0 once normalized), one that slides with black.
    fits = max(height, width) <= min(crop)
    padded = F.pad(normalize(image), margins) if fits else normalize(F.pad(image, margins))

    corners = [(y, x) for y in _starts(padded.shape[-2], crop[0]) for x in _starts(padded.shape[-1], crop[1])]
    windows = [(b, y, x) for b in range(len(image)) for y, x in corners]
    total, passes = None, padded.new_zeros(padded.shape[-2:])
    for start in range(0, len(windows), WINDOWS_AT_ONCE):
        part = windows[start : start + WINDOWS_AT_ONCE]
        stack = torch.stack([padded[b, :, y : y + crop[0], x : x + crop[1]] for b, y, x in part])
        logits = _forward(network, stack, crop, protocol)
        if total is None:
            total = logits.new_zeros(len(image), logits.shape[1], *padded.shape[-2:])
        for (b, y, x), window in zip(part, logits):
            total[b, :, y : y + crop[0], x : x + crop[1]] += window
    for y, x in corners:
        passes[y : y + crop[0], x : x + crop[1]] += 1 + protocol.flip

    inside = (..., slice(top, top + height), slice(left, left + width))
    return _resized(total[inside], size, False), _resized(passes[inside][None, None], size, False)[0, 0]


def _forward(network: nn.Module, image: Tensor, size: Sequence[int], protocol: Protocol) -> Tensor:
    """Compute the scores of normalized images at `size`; with `flip`, add those of the mirrored images."""
    scores = _scores(network, image, size, protocol)
    if protocol.flip:
        scores = scores + _scores(network, image.flip(-1), size, protocol).flip(-1)
    return scores


def _scores(network: nn.Module, image: Tensor, size: Sequence[int], protocol: Protocol) -> Tensor:
    logits = _resized(network(image), size, network.align_corners)
    return logits.softmax(1) if protocol.summed == "probabilities" else logits


def _scaled(image: Tensor, scale: float) -> Tensor:
    """Resize an image by a factor, to the nearest whole size; uint8 is rounded back to uint8.

    Pixels are sampled at exactly the factor, as OpenCV does in the released evaluations. `interpolate` does so too but
    rounds the size down: one repeated border pixel (more below half size) lets it reach the whole size.
    """
    if scale == 1:
        return image
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    margin = math.ceil(1 / scale)
    longer = F.pad(image.float(), (0, margin, 0, margin), mode="replicate")
    resized = F.interpolate(longer, scale_factor=scale, mode="bilinear", align_corners=False)
    resized = resized[..., : size[0], : size[1]]
    return resized if image.is_floating_point() else (resized + 0.5).to(image.dtype)


def _resized(scores: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    scores = scores.float()  # in half precision sums over windows would lose digits
    if scores.shape[-2:] == tuple(size):
        return scores
    return F.interpolate(scores, size, mode="bilinear", align_corners=align_corners)


def _margins(side: int, crop: int) -> tuple[int, int]:
    """Compute the centered padding of a side to the window, the odd pixel at the end."""
    missing = max(0, crop - side)
    return missing // 2, missing - missing // 2


def _stride(crop: int) -> int:
    # ceil(2/3 * crop), in integers
    return -(-2 * crop // 3)


def _starts(side: int, crop: int) -> list[int]:
    """List the first pixels of the windows along a side; the last window ends at the border."""
    count = math.ceil((side - crop) / _stride(crop)) + 1
    return [min(index * _stride(crop), side - crop) for index in range(count)]
