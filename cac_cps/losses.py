"""Equations of CAC (Lai et al., CVPR 2021) and CPS (Chen et al., CVPR 2021), computed in float32.

Losses are 0 (with a graph) on empty inputs. CAC's maps have a cell for every 8 x 8 pixels; cells of a batch are
numbered b*h*w + y*w + x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses import cross_entropy

# Elements of the [anchors, bank rows] block that exists at once: it stays in a CPU's cache; a GPU wants more at a time.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
EPSILON = 1e-8  # caps the loss of an anchor at 18.42, as released
SAME_CLASS = 1e4  # subtracted from the scores of an anchor with rows of its own class, whose exponential becomes 0


# ---- CAC


def directional_loss(
    anchor: Tensor,
    positive: Tensor,
    label: Tensor,
    bank: Tensor,
    bank_label: Tensor,
    temp: float,
    num_classes: int,
) -> Tensor:
    """-log(exp(p) / (exp(p) + sum_j exp(a k_j / temp)) + 1e-8) [n] of each anchor, p = a b / temp (CAC, equation 2).

    The sum is over bank rows whose pseudo-class is not that of the anchor. Gradients reach the anchors only.

    Args:
        anchor, positive: [n,D], of length 1.
        label: int64 [n], pseudo-classes of the anchors.
        bank: [M,D], of length 1.
        bank_label: int64 [M].
        temp: Temperature.
        num_classes: Number of classes C.
    """
    shift = 1.0 / temp  # no score is larger
    attraction = (anchor * positive.detach()).sum(1) / temp - shift
    total = _NegativeSum.apply(anchor, label, bank.detach(), bank_label, temp, num_classes)
    # exp(p) / (exp(p) + total) from logarithms: neither term can vanish before the quotient is taken.
    share = torch.sigmoid(attraction - total.clamp(min=torch.finfo(total.dtype).tiny).log())
    return -torch.log(share + EPSILON)


class _NegativeSum(torch.autograd.Function):
    """sum_j [l_j != y_i] exp((a_i k_j - 1) / temp) [n] for anchors a against all rows k of the bank, in one sweep.

    The rows are constants, so the gradient of sum i is sum_j exp(...) k_j / temp: found together with the sum itself,
    block after block of rows, and all that is kept for the backward pass. Class filter, temperature and shift are
    extra columns of the product: a block costs a product, an exponential in place and another product.
    """

    @staticmethod
    def forward(ctx, anchor, label, bank, bank_label, temp, num_classes):
        dims = anchor.shape[1]
        filtered = -SAME_CLASS * F.one_hot(label, num_classes).to(anchor.dtype)
        left = torch.cat([anchor / temp, filtered, anchor.new_full((len(anchor), 1), -1.0 / temp)], dim=1)
        ones = bank.new_ones(len(bank), 1)
        right = torch.cat([bank, F.one_hot(bank_label, num_classes).to(bank.dtype), ones], dim=1)
        sums = left.new_zeros(len(anchor), right.shape[1])
        limit = BLOCK_ELEMENTS.get(anchor.device.type, BLOCK_ELEMENTS["cpu"])
        rows = max(1, limit // max(1, len(anchor)))
        for part in right.split(rows):
            sums.addmm_((left @ part.T).exp_(), part)
        ctx.save_for_backward(sums[:, :dims] / temp)
        return sums[:, -1]

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return grad[:, None] * gradient, None, None, None, None, None


@torch.no_grad()
def directions(confidence: tuple[Tensor, Tensor], threshold: float) -> tuple[Tensor, Tensor]:
    """Select the cells that learn, bool [n] for each view: the other view is more confident, and above the threshold.

    Args:
        confidence: Confidence [n] of view 1 and of view 2, at the same places.
        threshold: Confidence that the teaching view must exceed (`pos_thresh_value`).
    """
    first, second = confidence
    return (second > threshold) & (first < second), (first > threshold) & (second < first)


def context_loss(
    embedding: tuple[Tensor, Tensor],
    confidence: tuple[Tensor, Tensor],
    label: tuple[Tensor, Tensor],
    bank: tuple[Tensor, Tensor],
    threshold: float,
    temp: float,
    num_classes: int,
    mean_over_processes=lambda count: count,
) -> tuple[Tensor, Tensor]:
    """Directional contrastive losses of view 1 and of view 2, each the mean over its learning cells (CAC, 3.2).

    Cells that do not learn add nothing and are dropped before the product with the bank. As no cell learns in both
    directions, one product with the others serves both.

    Args:
        embedding: Embeddings [n,D] of the overlap in view 1 and in view 2, of length 1, for the same places.
        confidence, label: [n] for each view, highest class probability and its class.
        bank: Features [M,D] and int64 classes [M].
        threshold, temp: As for `directions` and `directional_loss`.
        num_classes: Number of classes C.
        mean_over_processes: Function that averages a tensor over processes, so that the mean is over the cells of all.

    Returns:
        Two scalars, 0 (with a graph) if no cell learns.
    """
    embedding = tuple(values.float() for values in embedding)
    learns = directions(confidence, threshold)
    counts = mean_over_processes(torch.stack([mask.sum() for mask in learns]).float()).clamp(min=1e-12)
    # The only synchronization; it saves the product with all anchors that would get the weight 0.
    first, second = (mask.nonzero().squeeze(1) for mask in learns)
    losses = directional_loss(
        torch.cat([embedding[0][first], embedding[1][second]]),
        torch.cat([embedding[1][first], embedding[0][second]]),
        torch.cat([label[0][first], label[1][second]]),
        *bank,
        temp,
        num_classes,
    )
    nothing = 0.0 * (embedding[0].sum() + embedding[1].sum())
    parts = losses.split([len(first), len(second)])
    return tuple(nothing + part.sum() / count for part, count in zip(parts, counts))


# ---- CPS


def pseudo_label(logits: Tensor) -> Tensor:
    """Hard pseudo-label of every pixel: logits [B,C,H,W] -> int64 [B,H,W]."""
    return logits.detach().argmax(1)


def cross_pseudo_loss(first: Tensor, second: Tensor, first_label: Tensor, second_label: Tensor) -> Tensor:
    """Sum of the losses of two networks that learn from each other's pseudo-labels (CPS, equations 2 to 4).

    There is no threshold: all pixels count.

    Args:
        first, second: Logits [B,C,H,W] of network 1 and 2.
        first_label, second_label: int64 [B,H,W], pseudo-labels of network 1 and 2.
    """
    return cross_entropy(first, second_label) + cross_entropy(second, first_label)
