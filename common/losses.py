"""Supervised losses that papers share. All in float32, over labels in which 255 is ignored."""

import torch
import torch.nn.functional as F

from common import IGNORE


def upsample(logits: torch.Tensor, size: tuple[int, int], align_corners: bool) -> torch.Tensor:
    """Logits [B,C,h,w] bilinearly at `size` (H, W), in float32."""
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners)


def cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the pixels that are not ignored; 0, with its graph, where all are.

    Args:
        logits: [B,C,H,W].
        label: int64 [B,H,W], 255 = ignore.
    """
    total = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="sum")
    return total / (label != IGNORE).sum().clamp(min=1)
