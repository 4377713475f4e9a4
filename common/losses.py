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


def ohem_cross_entropy(
    logits: torch.Tensor,
    label: torch.Tensor,
    threshold: float,
    min_kept: int,
    class_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross-entropy over the hard pixels: the probability of their class is at most `threshold`.

    Where fewer than `min_kept` pixels are hard, the `min_kept` hardest are taken, and all where there are not so many.
    0, with its graph, where all are ignored.

    Args:
        logits: [B,C,H,W].
        label: int64 [B,H,W], 255 = ignore.
        threshold: Probability in [0,1].
        min_kept: Pixels of the batch, at least 1.
        class_weight: [C], of each class's pixels in the mean; by default all alike.
    """
    valid = label != IGNORE
    loss = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="none")
    probability = torch.exp(-loss.detach()).masked_fill(~valid, 1.0).flatten()
    hardest = probability.topk(min(min_kept, len(probability)), largest=False, sorted=False).values
    limit = hardest.amax().clamp(min=threshold)
    kept = valid & ((probability.view_as(loss) <= limit) | (valid.sum() < min_kept))
    if class_weight is None:
        return loss.masked_fill(~kept, 0.0).sum() / kept.sum().clamp(min=1)
    weight = class_weight[label.masked_fill(~kept, 0)] * kept
    return (weight * loss).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
