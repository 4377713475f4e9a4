"""Supervised losses and predictions that papers share, computed in float32. Pixels with the label 255 are ignored."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import IGNORE


def upsample(logits: torch.Tensor, size: tuple[int, int], align_corners: bool) -> torch.Tensor:
    """Resize logits [B,C,h,w] bilinearly to `size` (H, W), in float32."""
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners)


def label_and_confidence(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict the label int64 and its softmax probability, the confidence, in float32; of equal classes the first.

    Args:
        logits: [B,C,...]; the results are [B,...].
    """
    confidence, label = logits.float().softmax(1).max(1)
    return label, confidence


@dataclass(frozen=True)
class OHEM:
    """Settings of online hard example mining, see `ohem_cross_entropy`.

    Attributes:
        threshold: Probability in [0,1] of its class up to which a pixel is hard.
        min_kept: Pixels kept per image of the batch at least.
        class_weight: float [C], weight of the pixels of each class in the mean; None for equal weights.
    """

    threshold: float = 0.7
    min_kept: int = 50_000
    class_weight: torch.Tensor | None = None


def supervised_loss(logits: torch.Tensor, label: torch.Tensor, ohem: OHEM | None = None) -> torch.Tensor:
    """Mean cross-entropy over all labeled pixels, or over the hard ones.

    Args:
        logits: [B,C,H,W].
        label: int64 [B,H,W], 255 = ignore.
        ohem: Settings of the mining; None for the mean over all.
    """
    if ohem is None:
        return cross_entropy(logits, label)
    return ohem_cross_entropy(logits, label, ohem.threshold, ohem.min_kept * len(label), ohem.class_weight)


def cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the pixels that are not ignored; 0 (with a graph) if all are ignored.

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
    """Mean cross-entropy over the hard pixels, whose class has a probability of at most `threshold`.

    If fewer than `min_kept` pixels are hard, the `min_kept` hardest are kept, or all if there are fewer. The loss is 0
    (with a graph) if all pixels are ignored.

    Args:
        logits: [B,C,H,W].
        label: int64 [B,H,W], 255 = ignore.
        threshold: Probability in [0,1].
        min_kept: Pixels kept of the whole batch, at least 1.
        class_weight: float [C], weight of the pixels of each class in the mean; None for equal weights.
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
