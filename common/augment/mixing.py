"""CutMix, CutOut and ClassMix: replace part of every image (PRCL 4.4: boxes of half the area, half of the classes).

A mask is boolean [B,H,W], True where an image keeps its own pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from common import IGNORE
from common.errors import UserError
from common.images import imagenet_statistics, to_device

MODES = ("none", "cutout", "cutmix", "classmix")


@dataclass(frozen=True)
class Box:
    """A box in pixels; `top` and `left` are inside, `bottom` and `right` are not."""

    top: int
    left: int
    bottom: int
    right: int


def draw_box(rng: Generator, height: int, width: int) -> Box:
    """Draw a box of half the image's area, in the order width, left, top."""
    box_width = int(rng.integers(width // 2 + 1, width))
    box_height = round(height * width / 2 / box_width)
    left = int(rng.integers(0, width - box_width + 1))
    top = int(rng.integers(0, height - box_height + 1))
    return Box(top, left, top + box_height, left + box_width)


def box_mask(boxes: Sequence[Box], height: int, width: int, device: torch.device) -> Tensor:
    """Bool mask [B,H,W] from a box per image: False inside the box."""
    edges = np.array([(box.top, box.bottom, box.left, box.right) for box in boxes])
    top, bottom, left, right = to_device(edges, device).T[:, :, None]
    row, column = torch.arange(height, device=device), torch.arange(width, device=device)
    inside = ((row >= top) & (row < bottom)).unsqueeze(2) & ((column >= left) & (column < right)).unsqueeze(1)
    return inside.logical_not_()


def draw_cutmix_box_masks(
    rng: Generator,
    count: int,
    height: int,
    width: int,
    proportions: tuple[float, float] = (0.25, 0.5),
    boxes: int = 3,
) -> np.ndarray:
    """Draw masks of CPS and CPCL, bool [count,H,W]: True inside an odd number of random boxes.

    Without overlap the boxes of a mask would cover a share of the area within `proportions`; they have any shape that
    fits. Every box toggles the pixels it covers, as in French et al., "Semi-supervised semantic segmentation needs
    strong, varied perturbations", 2020.
    """
    share = rng.uniform(*proportions, size=(count, boxes))
    tall = np.exp(rng.uniform(0.0, 1.0, size=(count, boxes)) * np.log(share))
    sizes = np.round(np.stack([tall, share / tall], axis=2) * np.sqrt(1 / boxes) * (height, width))
    starts = np.round(((height, width) - sizes) * rng.uniform(0.0, 1.0, size=sizes.shape))
    masks = np.zeros((count, height, width), dtype=bool)
    for mask, corners, ends in zip(masks, starts.astype(int), (starts + sizes).astype(int)):
        for (top, left), (bottom, right) in zip(corners, ends):
            mask[top:bottom, left:right] ^= True
    return masks


def cutmix_box_masks(
    rngs: Sequence[Generator],
    size: Sequence[int],
    device: torch.device,
    proportions: tuple[float, float] = (0.25, 0.5),
    boxes: int = 3,
) -> Tensor:
    """Draw a mask per generator, see `draw_cutmix_box_masks`: bool [B,*size] on `device`."""
    masks = [draw_cutmix_box_masks(rng, 1, *size, proportions, boxes) for rng in rngs]
    return to_device(np.concatenate(masks), device)


def draw_class_keys(rng: Generator) -> np.ndarray:
    """Draw a random rank for each of the 256 values of a label, since those that occur are on the device only."""
    return rng.permutation(256)


def class_mask(label: Tensor, keys: np.ndarray) -> Tensor:
    """Bool mask [B,H,W]: True on half (rounded down) of the values in an image's label, those of the lowest keys.

    This is the rule of PRCL and CSS: ignored pixels count as a class like any other, and an image with one value is
    replaced completely. Memory bank's rule differs in both, see memory_bank/augment.py.

    Args:
        label: int64 [B,H,W].
        keys: int64 [B,256] from `draw_class_keys`.
    """
    values = label.flatten(1)
    present = torch.zeros(len(label), 256, dtype=torch.bool, device=label.device).scatter_(1, values, True)
    order = to_device(keys, label.device).masked_fill(~present, 256)
    rank = order.argsort(1).argsort(1)
    kept = rank < present.sum(1, keepdim=True) // 2
    return kept.gather(1, values).view_as(label)


def mix(own: Tensor, partner: Tensor | int, mask: Tensor) -> Tensor:
    """Take `own` where `mask` is True, else `partner`.

    Args:
        own: [B,H,W], or [B,C,H,W] with the same mask for every channel.
        partner: Tensor of the same shape, or a number.
        mask: Bool [B,H,W].
    """
    return torch.where(mask if own.dim() == mask.dim() else mask.unsqueeze(1), own, partner)


def cut_out(image: Tensor, label: Tensor, confidence: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outside `mask`, set the image to ImageNet's mean color (0 after `normalize`), label to 255, confidence to 0."""
    mean, _ = imagenet_statistics(image.device)
    return mix(image, mean, mask), mix(label, IGNORE, mask), mix(confidence, 0, mask)


def mix_batch(
    mode: str,
    image: Tensor,
    label: Tensor,
    confidence: Tensor,
    rngs: Sequence[Generator],
    partner_of_last: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix every image of a batch with the next one; the last with `partner_of_last`, or with the first if that is None.

    Args:
        mode: "none", "cutout" (a box is emptied, there is no partner), "cutmix" (a box comes from the partner) or
            "classmix" (half of the image's own classes stay, the rest comes from the partner).
        image: float in [0, 1] [B,3,H,W].
        label: int64 [B,H,W], or several labels [B,K,H,W], of which "classmix" uses the first.
        confidence: [B,H,W] or [B,K,H,W].
        rngs: A generator per image, so that the result does not depend on how the batch is split over processes.
        partner_of_last: image [3,H,W], label and confidence [H,W] or [K,H,W] that follow this batch, the first of the
            next process: all processes together mix as one process with the whole batch.

    Raises:
        UserError: unknown mode.
        ValueError: the numbers of generators and images differ.
    """
    if mode not in MODES:
        raise UserError(f"mixing mode is {mode!r}; it must be one of {', '.join(MODES)}")
    if len(rngs) != len(image):
        raise ValueError(f"{len(rngs)} generators for {len(image)} images")
    if mode == "none":
        return image, label, confidence
    if mode == "classmix":
        classes = label if label.dim() == 3 else label[:, 0]
        mask = class_mask(classes, np.stack([draw_class_keys(rng) for rng in rngs]))
    else:
        height, width = label.shape[-2:]
        mask = box_mask([draw_box(rng, height, width) for rng in rngs], height, width, label.device)
    if mode == "cutout":
        return cut_out(image, label, confidence, mask)
    own = (image, label, confidence)
    following = [one[0] for one in own] if partner_of_last is None else partner_of_last
    return tuple(mix(o, torch.cat((o[1:], f.unsqueeze(0))), mask) for o, f in zip(own, following, strict=True))
