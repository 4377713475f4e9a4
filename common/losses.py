"""Supervised losses and predictions that papers share, computed in float32. Pixels with the label 255 are ignored."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

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


def supervised_loss(
    logits: torch.Tensor, label: torch.Tensor, ohem: OHEM | None = None, kind: str = "ce"
) -> torch.Tensor:
    """Mean cross-entropy over all labeled pixels, or over the hard ones, and what `kind` adds to it.

    Args:
        logits: [B,C,H,W].
        label: int64 [B,H,W], 255 = ignore.
        ohem: Settings of the mining; None for the mean over all.
        kind: `optim.supervised_loss`: `ce`, `ce+dice` or `ce+focal`.
    """
    if ohem is None:
        loss = cross_entropy(logits, label)
    else:
        loss = ohem_cross_entropy(logits, label, ohem.threshold, ohem.min_kept * len(label), ohem.class_weight)
    return loss if kind == "ce" else loss + added_loss(logits, label, kind)


def added_loss(logits: torch.Tensor, label: torch.Tensor, kind: str) -> torch.Tensor:
    """Loss [] that `optim.supervised_loss` adds to the cross-entropy: 0 for `ce`, `dice_loss` or `focal_loss`."""
    return {"ce": lambda *_: logits.new_zeros(()), "ce+dice": dice_loss, "ce+focal": focal_loss}[kind](logits, label)


def dice_loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - Dice over the classes that the batch's labels show; 0 (with a graph) if all pixels are ignored.

    Every class counts the same, however few pixels it has (Milletari et al., "V-Net", 3DV 2016, for several classes).

    Args:
        logits: [B,C,H,W].
        label: int64 [B,H,W], 255 = ignore.
    """
    valid = (label != IGNORE).unsqueeze(1)
    probability = logits.float().softmax(1) * valid
    target = torch.zeros_like(probability).scatter_(1, label.unsqueeze(1).clamp(max=logits.shape[1] - 1), 1.0) * valid
    overlap, size, shown = ((part).sum((0, 2, 3)) for part in (probability * target, probability + target, target))
    dice = 2 * overlap / size.clamp(min=1e-6)
    return ((1 - dice) * (shown > 0)).sum() / (shown > 0).sum().clamp(min=1)


def focal_loss(logits: torch.Tensor, label: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """Mean of (1 - p)^gamma * cross-entropy, p the probability of the labeled class (Lin et al., ICCV 2017).

    0 (with a graph) if all pixels are ignored.

    Args:
        logits: [B,C,H,W].
        label: int64 [B,H,W], 255 = ignore.
        gamma: Exponent; the larger, the less pixels count that are right already.
    """
    loss = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="none")
    return ((1 - torch.exp(-loss)) ** gamma * loss).sum() / (label != IGNORE).sum().clamp(min=1)


def zero_loss(module: nn.Module) -> torch.Tensor:
    """Zero [] that depends on every trained parameter of `module`, because DDP waits for the gradients of all."""
    return 0.0 * torch.stack([parameter.sum() for parameter in module.parameters() if parameter.requires_grad]).sum()


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
