"""Equations of CPCL (Fan et al., IEEE TIP 2023), computed in float32 and without waiting for a device.

Network 1 is the conservative one, network 2 the progressive one. There are C classes; labels are
int64 [B,H,W], confidences float [B,H,W].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import IGNORE
from common.metrics import ConfusionMatrix

EPSILON = 1e-6  # keeps the disagreement of networks that agree everywhere at 0, as released


class Prediction(NamedTuple):
    """Label and confidence of every pixel, predicted by a network."""

    label: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class Supervision:
    """Pseudo-label of unlabeled pixels (255 = none), and its weight in the loss."""

    label: Tensor
    weight: Tensor


@torch.no_grad()
def predict_pixels(logits: Tensor) -> Prediction:
    """Predict hard labels and confidences from logits [B,C,H,W].

    `common.losses.label_and_confidence` gives the same up to rounding; here the map of all probabilities is not stored.
    """
    logits = logits.float()
    highest, label = logits.max(1)
    return Prediction(label, torch.exp(highest - logits.logsumexp(1)))


@torch.no_grad()
def count_pairs(
    first: Tensor, second: Tensor, num_classes: int, reduce: Callable[[Tensor], Tensor] = lambda counts: counts
) -> Tensor:
    """Count pixels by the labels of network 1 (row) and of network 2 (column), plus one on the diagonal.

    Args:
        first, second: Labels of network 1 and 2.
        num_classes: C.
        reduce: Function that sums a tensor over processes.

    Returns:
        int64 [C,C].
    """
    confusion = ConfusionMatrix(num_classes, first.device)
    confusion.update(second, first)
    # The additional pixel prevents a division by 0 for a class that neither network predicts.
    return reduce(confusion.matrix) + torch.eye(num_classes, dtype=torch.int64, device=first.device)


@torch.no_grad()
def disagreement(counts: Tensor) -> Tensor:
    """Class-wise disagreement indicator, float64 [C]: share of a class on which the two networks disagree.

    The share of each network's pixels of a class to which the other network gives another class; the two shares are
    added, and the sum over all classes is normalized to 1.

    Args:
        counts: Result of `count_pairs`.
    """
    # Counts of many images exceed the integers that float32 represents exactly, and ties between classes matter.
    counts = counts.double()
    agreed = counts.diagonal()
    by_first, by_second = counts.sum(1), counts.sum(0)
    share = (by_second - agreed) / by_second + (by_first - agreed) / by_first
    return share / (share.sum() + EPSILON)


@torch.no_grad()
def intersect(first: Prediction, second: Prediction) -> Supervision:
    """Supervision of the conservative network: the label on which both networks agree, 255 where they differ."""
    label = first.label.masked_fill(first.label != second.label, IGNORE)
    return Supervision(label, _mean_confidence(first, second))


@torch.no_grad()
def unite(first: Prediction, second: Prediction, indicator: Tensor) -> Supervision:
    """Supervision of the progressive network: a label for every pixel; of two labels, the one with more disagreement.

    On a tie it is the label of network 2. The weight is the mean confidence where the networks agree, else the
    confidence of the network whose label is taken.

    Args:
        first, second: Predictions of network 1 and 2.
        indicator: [C], result of `disagreement`.
    """
    takes_first = indicator[first.label] > indicator[second.label]
    label = torch.where(takes_first, first.label, second.label)
    winner = torch.where(takes_first, first.confidence, second.confidence)
    agreed = first.label == second.label
    return Supervision(label, torch.where(agreed, _mean_confidence(first, second), winner))


def reweighted_loss(logits: Tensor, target: Supervision) -> Tensor:
    """Cross-entropy of every pixel times its weight, averaged over all pixels; pixels without a label count as 0.

    Args:
        logits: [B,C,H,W].
        target: Label and weight.
    """
    loss = F.cross_entropy(logits.float(), target.label, ignore_index=IGNORE, reduction="none")
    return (target.weight * loss).mean()


def _mean_confidence(first: Prediction, second: Prediction) -> Tensor:
    return (first.confidence + second.confidence) / 2
