"""Equations of UniMatch (Yang et al., CVPR 2023) and UniMatch V2 (TPAMI 2025), computed in float32.

The losses are 0 (with a graph) where no pixel counts.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor

from common import IGNORE
from common.images import to_device
from common.seeding import generator


def consistency_loss(logits: Tensor, pseudo_label: Tensor, confidence: Tensor, threshold: float) -> Tensor:
    """Cross-entropy summed over confident pixels, divided by the number of all pixels that are not padding.

    Args:
        logits: [B,C,H,W] of a strong view.
        pseudo_label: int64 [B,H,W], 255 = padding.
        confidence: float32 [B,H,W].
        threshold: Smallest confidence of a confident pixel, compared in float32 (`conf_thresh`).
    """
    loss = F.cross_entropy(logits.float(), pseudo_label, ignore_index=IGNORE, reduction="none")
    return (loss * (confidence >= threshold)).sum() / (pseudo_label != IGNORE).sum().clamp(min=1)


def unimatch_loss(supervised: Tensor, strong1: Tensor, strong2: Tensor, perturbed: Tensor) -> Tensor:
    """Loss of UniMatch: half from labels; of the rest a quarter from each strong view, half from dropped features."""
    return (supervised + 0.25 * strong1 + 0.25 * strong2 + 0.5 * perturbed) / 2


def unimatch_v2_loss(supervised: Tensor, strong1: Tensor, strong2: Tensor) -> Tensor:
    """Loss of UniMatch V2: half from labels, a quarter from each strong view."""
    return (supervised + (strong1 + strong2) / 2) / 2


def fixmatch_loss(supervised: Tensor, strong: Tensor) -> Tensor:
    """Loss of FixMatch: half from labels, half from the strong view."""
    return (supervised + strong) / 2


def draw_kept(rngs: Sequence[Generator], channels: Sequence[int], device: torch.device) -> list[Tensor]:
    """Draw the channels that survive a dropout of half of them: a bool [B,C] for each number C of `channels`."""
    drawn = [[rng.random(number) < 0.5 for number in channels] for rng in rngs]
    return [to_device(np.stack(rows), device) for rows in zip(*drawn, strict=True)]


def draw_spared(seed: int, positions: Sequence[int], images: int, share: float) -> list[bool]:
    """Draw the images whose features stay whole in complementary dropout: a fixed number of the whole batch.

    Departure: the release rounds `share` of the batch of each process down, so one image per process is never spared.

    Args:
        seed: Seed of the run.
        positions: Positions of this process's images in the stream.
        images: Images of the whole batch, over all processes.
        share: Share of them that is spared, rounded down.
    """
    order = generator(seed, "spared images", positions[0] // images).permutation(images)
    chosen = set(order[: int(share * images)].tolist())
    return [position % images in chosen for position in positions]


def first_view_factors(kept: Tensor, spared: Tensor) -> Tensor:
    """Factors [B,C] of complementary dropout in the first view: 2 or 0, and 1 in spared images.

    Args:
        kept: Bool [B,C], channels that the first view keeps.
        spared: Bool [B].
    """
    return torch.where(spared[:, None], 1.0, 2.0 * kept)


def with_complement(first: Tensor) -> Tensor:
    """Factors [2B,C] of both views, which sum to 2, from those of the first view [B,C]."""
    return torch.cat([first, 2.0 - first])


def drop_channels(taps: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """Multiply taps [B,C,h,w] by factors [B,C], one per tap."""
    return [tap * factor.to(tap.dtype)[:, :, None, None] for tap, factor in zip(taps, factors, strict=True)]
