"""The equations of CPCL (Fan et al., IEEE TIP 2023). In float32, finite whatever is empty; nothing waits for a device.

Network 1 is the conservative one, network 2 the progressive one. C classes, labels int64 [B,H,W], confidences [B,H,W].
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
    """What a network says of every pixel: its class and that class's probability."""

    label: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class Supervision:
    """What a network learns from unlabeled pixels: a label, 255 where there is none, and its weight in the loss."""

    label: Tensor
    weight: Tensor


@torch.no_grad()
def predict_pixels(logits: Tensor) -> Prediction:
    """Logits [B,C,H,W] to hard labels and confidences."""
    logits = logits.float()
    highest, label = logits.max(1)
    # The largest softmax probability, without the map of all of them.
    return Prediction(label, torch.exp(highest - logits.logsumexp(1)))


@torch.no_grad()
def count_pairs(
    first: Tensor, second: Tensor, num_classes: int, reduce: Callable[[Tensor], Tensor] = lambda counts: counts
) -> Tensor:
    """Pixels by the class network 1 says (row) and the class network 2 says (column), and one more on the diagonal.

    Args:
        first, second: Labels of network 1 and 2.
        num_classes: C.
        reduce: Sums a tensor over processes.

    Returns:
        int64 [C,C].
    """
    confusion = ConfusionMatrix(num_classes, first.device)
    confusion.update(second, first)
    # The pixel more keeps a class that nobody predicts from dividing by 0.
    return reduce(confusion.matrix) + torch.eye(num_classes, dtype=torch.int64, device=first.device)


@torch.no_grad()
def disagreement(counts: Tensor) -> Tensor:
    """The class-wise disagreement indicator, float64 [C]: which share of a class the two networks see differently.

    Of either network's pixels of a class, the share that the other one calls something else; the two shares are added,
    and all classes sum to 1.

    Args:
        counts: Of `count_pairs`.
    """
    # Counts of many images go beyond the integers float32 can tell apart, and ties between classes matter.
    counts = counts.double()
    agreed = counts.diagonal()
    by_first, by_second = counts.sum(1), counts.sum(0)
    share = (by_second - agreed) / by_second + (by_first - agreed) / by_first
    return share / (share.sum() + EPSILON)


@torch.no_grad()
def intersect(first: Prediction, second: Prediction) -> Supervision:
    """The conservative network's: the class that both say; where they differ there is none."""
    label = first.label.masked_fill(first.label != second.label, IGNORE)
    return Supervision(label, _mean_confidence(first, second))


@torch.no_grad()
def unite(first: Prediction, second: Prediction, indicator: Tensor) -> Supervision:
    """The progressive network's: every pixel has a class. Where the two differ it is the one that is disputed more.

    Of two classes disputed alike, network 2's. Where both say the same the weight is their mean confidence, elsewhere
    the confidence of the network that says the class.

    Args:
        first, second: Of network 1 and 2.
        indicator: [C], of `disagreement`.
    """
    takes_first = indicator[first.label] > indicator[second.label]
    label = torch.where(takes_first, first.label, second.label)
    winner = torch.where(takes_first, first.confidence, second.confidence)
    agreed = first.label == second.label
    return Supervision(label, torch.where(agreed, _mean_confidence(first, second), winner))


def reweighted_loss(logits: Tensor, target: Supervision) -> Tensor:
    """Cross-entropy of every pixel times its weight, as a mean over all pixels: those without a label count as 0.

    Args:
        logits: [B,C,H,W].
        target: Label and weight.
    """
    loss = F.cross_entropy(logits.float(), target.label, ignore_index=IGNORE, reduction="none")
    return (target.weight * loss).mean()


def _mean_confidence(first: Prediction, second: Prediction) -> Tensor:
    return (first.confidence + second.confidence) / 2
