"""Equations of CSS (Wang et al., ICCV 2023), one function each, computed in float32; 0 (with a graph) on empty inputs.

A pixel is classified in two spaces: by its logits, and by the similarity of its representation to class prototypes.
Pixels of the representation maps are numbered b*h*w + y*w + x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import IGNORE
from common.images import flatten_pixels
from common.losses import label_and_confidence, upsample

# Elements of the [anchors, negatives, dimensions] block that is scored at once: small enough for the cache of a CPU,
# large enough to keep a GPU busy.
BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25}

Space = Literal["mix", "cross", "ori"]


class Prototypes(nn.Module):
    """Running mean of the representations of each class, equal on all processes.

    Attributes:
        mean: [C,D], not normalized; zeros for a class that was never seen.
        seen: bool [C], True for classes that were present before.
    """

    def __init__(self, num_classes: int, dims: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_classes, dims))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    @torch.no_grad()
    def update(self, representation: Tensor, label: Tensor, alpha: float, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """P_c = alpha * P_c + (1 - alpha) * mean of the pixels of c on all processes; the first time, P_c is the mean.

        Args:
            representation: [B,D,h,w].
            label: int64 [B,h,w], 255 = left out.
            alpha: Weight of the old prototypes (`alpha_p`).
            reduce: Function that sums a tensor over all processes.

        Returns:
            present: bool [C], classes with a pixel in any process; the others keep their prototypes.
        """
        one_hot = (label.flatten() == torch.arange(len(self.mean), device=label.device)[:, None]).float()
        sums = torch.cat([one_hot @ flatten_pixels(representation.float()), one_hot.sum(1, keepdim=True)], dim=1)
        total, count = reduce(sums).split([self.mean.shape[1], 1], dim=1)
        mean = total / count.clamp(min=1)
        # A representation that overflowed in half precision must not stay in the memory forever.
        present = (count.squeeze(1) > 0) & mean.isfinite().all(1)
        kept = alpha * self.seen.float().unsqueeze(1)
        self.mean.copy_(torch.where(present[:, None], kept * self.mean + (1 - kept) * mean, self.mean))
        self.seen.logical_or_(present)
        return present


@dataclass
class Samples:
    """Anchors and negatives of one step; row r belongs to class `classes[r]`.

    Attributes:
        classes: int64 [n], ascending; on the CPU the present ones, on a GPU all.
        present: bool [n], True if any process has a pixel of the class.
        anchors: int64 [n,Q], pixels; any value where `used` is False.
        negatives: int64 [n,Q,K], pixels of other classes.
        used: bool [n], True if the class has a hard pixel and a negative in this process.
    """

    classes: Tensor
    present: Tensor
    anchors: Tensor
    negatives: Tensor
    used: Tensor


def similarity(representation: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine similarity [B,C,h,w] of representations [B,D,h,w] and prototypes [C,D]; 0 for a prototype of zeros."""
    representation = representation.float()
    scores = torch.einsum("bdhw,cd->bchw", representation, F.normalize(prototypes, dim=1))
    return scores / representation.norm(dim=1, keepdim=True).clamp(min=1e-12)


def largest_similarity_softmax(temp: float, num_classes: int) -> float:
    """Largest possible softmax(cosines / temp) over the classes: one cosine is 1, all others are -1."""
    return 1 / (1 + (num_classes - 1) * math.exp(-2 / temp))


@torch.no_grad()
def pseudo_labels(
    kind: Space,
    logits: Tensor,
    representation: Tensor,
    prototypes: Tensor,
    temp: float,
    size: tuple[int, int],
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """Pseudo-labels by logits and by similarity to the prototypes, for the two unsupervised losses.

    `ori`: the logits' labels for both losses. `cross`: the logits' labels for the contrastive loss, the
    representations' labels for the cross-entropy. `mix`: labels on which both spaces agree, with the logits'
    confidence, for both losses.

    Args:
        kind: One of the rules above.
        logits: [B,C,h,w].
        representation: [B,D,h,w].
        prototypes: [C,D].
        temp: Temperature of the similarities.
        size: (H, W) of the result.
        align_corners: How the maps are enlarged before the softmax.

    Returns:
        Labels int64 [B,K,H,W], 255 where the spaces disagree, and confidences [B,K,H,W]. The first of K is for the
        contrastive loss, the last for the cross-entropy; K is 2 for `cross`, else 1.
    """
    label, confidence = _decide(logits, size, align_corners)
    if kind == "ori":
        return label.unsqueeze(1), confidence.unsqueeze(1)
    near_label, near_confidence = _decide(similarity(representation, prototypes) / temp, size, align_corners)
    if kind == "mix":
        return agreed(label, near_label).unsqueeze(1), confidence.unsqueeze(1)
    return torch.stack([label, near_label], dim=1), torch.stack([confidence, near_confidence], dim=1)


def agreed(one: Tensor, other: Tensor) -> Tensor:
    """Labels of two maps where they agree, 255 elsewhere."""
    return one.masked_fill(one != other, IGNORE)


def unsupervised_loss(logits: Tensor, pseudo_label: Tensor, confidence: Tensor, threshold: float) -> Tensor:
    """Cross-entropy with pseudo-labels, each image weighted by its share of confident pixels; mean over losses > 0.

    Same as prcl/losses.py.

    Where the spaces disagree, a pixel can be confident without a label, so the weight can exceed 1, as released.

    Args:
        logits: [B,C,H,W].
        pseudo_label: int64 [B,H,W], 255 = ignore.
        confidence: [B,H,W].
        threshold: Smallest confidence of a confident pixel (`un_threshold`).
    """
    valid = (pseudo_label != IGNORE).sum((1, 2)).clamp(min=1)
    weight = (confidence >= threshold).sum((1, 2)) / valid
    pixel_loss = F.cross_entropy(logits.float(), pseudo_label, ignore_index=IGNORE, reduction="none")
    return (weight[:, None, None] * pixel_loss).sum() / (pixel_loss > 0).sum().clamp(min=1)


@torch.no_grad()
def contrastive_labels(
    label: Tensor, pseudo_label: Tensor, confidence: Tensor, weak_threshold: float, size: tuple[int, int]
) -> Tensor:
    """Classes of the pixels in the contrastive loss, at the size of the representation maps. Same as prcl/losses.py.

    Args:
        label: int64 [B_l,H,W] of the labeled batch.
        pseudo_label: int64 [B_u,H,W].
        confidence: [B_u,H,W]; pixels below `weak_threshold` are left out.
        size: (h, w) of the maps.

    Returns:
        int64 [B_l+B_u,h,w], labeled first, 255 = left out.
    """
    weak = pseudo_label.masked_fill(confidence < weak_threshold, IGNORE)
    both = torch.cat([label, weak]).unsqueeze(1).float()
    return F.interpolate(both, size, mode="nearest").squeeze(1).long()


@torch.no_grad()
def negative_class_probability(prototypes: Tensor, available: Tensor, temp: float) -> Tensor:
    """Probability [n,n] of a negative of class j (column) for an anchor of class i (row), higher for similar classes.

    Args:
        prototypes: [n,D].
        available: bool [n], True for classes with a pixel in this process.
    """
    direction = F.normalize(prototypes, dim=1)
    own = torch.eye(len(prototypes), dtype=torch.bool, device=prototypes.device)
    score = (direction @ direction.T / temp).masked_fill(own | ~available[None], -torch.inf)
    return torch.softmax(score, dim=1).nan_to_num(0.0)


@torch.no_grad()
def sample(
    label: Tensor,
    indicator: Tensor,
    prototypes: Tensor,
    present: Tensor,
    strong_threshold: float,
    temp: float,
    num_queries: int,
    num_negatives: int,
) -> Samples:
    """Draw hard anchors of each class, and negatives from similar classes, with the device's random numbers.

    Args:
        label: int64 [B,h,w], 255 = left out.
        indicator: [B,C,h,w] of the student; a pixel is hard if the value of its class is below `strong_threshold`.
        prototypes: [C,D].
        present: bool [C], result of `Prototypes.update`.
        num_queries, num_negatives: Q anchors per class, K negatives per anchor, drawn with replacement.
    """
    # Leaving out absent classes saves more than half of the work, but on a GPU it would require a synchronization.
    everywhere = torch.arange(len(present), device=label.device)
    classes = present.nonzero().squeeze(1) if label.device.type == "cpu" else everywhere
    n = len(classes)
    pixels = label.flatten()
    own = flatten_pixels(indicator).gather(1, pixels.clamp(max=indicator.shape[1] - 1)[:, None]).squeeze(1)
    order, start, count = _group(pixels, classes)
    hard_order, hard_start, hard_count = _group(pixels.masked_fill(own >= strong_threshold, IGNORE), classes)
    chance = negative_class_probability(prototypes[classes], count > 0, temp)
    anchors = _pick(hard_order, hard_start[:, None], hard_count[:, None], (n, num_queries))
    drawn = torch.rand(n, num_queries * num_negatives, device=label.device)
    drawn = drawn * chance.sum(1, keepdim=True)
    other = torch.searchsorted(chance.cumsum(1), drawn, right=True).clamp(max=max(n - 1, 0))
    negatives = _pick(order, start[other], count[other], tuple(other.shape)).view(n, num_queries, num_negatives)
    used = (hard_count > 0) & (chance.sum(1) > 0) & present[classes]
    return Samples(classes, present[classes], anchors, negatives, used)


def contrastive_loss(representation: Tensor, prototypes: Tensor, samples: Samples, temp: float) -> Tensor:
    """Mean over the present classes of the cross-entropy of anchors with their prototype against their negatives.

    Gradients reach the anchors only; prototypes and negatives are constants. A class without a hard pixel adds 0 and is
    counted. The loss is 0 (with a graph) if fewer than two classes are present. Does not wait for a GPU.

    Args:
        representation: [B,D,h,w] of the student.
        prototypes: [C,D].
        samples: Result of `sample`.
    """
    rows = flatten_pixels(representation.float())
    n, queries, negatives = samples.negatives.shape
    losses = _AnchorLoss.apply(
        F.normalize(rows[samples.anchors.clamp(min=0).flatten()], dim=1),
        F.normalize(rows.detach(), dim=1),
        F.normalize(prototypes, dim=1)[samples.classes.repeat_interleave(queries)],
        samples.negatives.clamp(min=0).view(n * queries, negatives),
        temp,
    )
    total = losses.view(n, queries).mean(1).masked_fill(~samples.used, 0.0).sum()
    return total / samples.present.sum().clamp(min=1)


class _AnchorLoss(torch.autograd.Function):
    """Cross-entropy [R] of each anchor, with the gradient computed in the same pass.

    Blocks of anchors are scored one after the other, so the [R,K,D] negatives are never stored together. Softmax and
    target of a block are enough for the gradient of its anchors, the only gradient there is.
    """

    @staticmethod
    def forward(ctx, anchors, pixels, prototypes, negatives, temp):
        rows, dims = anchors.shape
        block = max(1, BLOCK_ELEMENTS.get(anchors.device.type, BLOCK_ELEMENTS["cpu"]) // (negatives.shape[1] * dims))
        losses, gradients = anchors.new_empty(rows), torch.empty_like(anchors)
        for first in range(0, rows, block):
            part = slice(first, first + block)
            picked = negatives[part]
            others = pixels.index_select(0, picked.flatten()).view(*picked.shape, dims)
            losses[part], gradients[part] = _score_block(anchors[part], prototypes[part], others, temp)
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx, grad):
        (gradients,) = ctx.saved_tensors
        return grad[:, None] * gradients, None, None, None, None


def _score_block(anchors: Tensor, prototypes: Tensor, others: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """Loss [r] of anchors [r,D] with their prototypes [r,D] against others [r,K,D], and its gradients [r,D]."""
    right = (anchors * prototypes).sum(1, keepdim=True)
    wrong = torch.bmm(others, anchors.unsqueeze(2)).squeeze(2)
    log_probability = torch.log_softmax(torch.cat([right, wrong], dim=1) / temp, dim=1)
    pull = log_probability.exp()
    gradient = torch.bmm(pull[:, None, 1:], others).squeeze(1) + (pull[:, :1] - 1) * prototypes
    return -log_probability[:, 0], gradient / temp


def _decide(scores: Tensor, size: tuple[int, int], align_corners: bool) -> tuple[Tensor, Tensor]:
    """Label int64 and confidence [B,H,W] of scores [B,C,h,w], enlarged before the softmax."""
    return label_and_confidence(upsample(scores, size, align_corners))


def _group(pixels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel numbers grouped by class; start and size of the group of each of `classes`. Same as prcl/losses.py."""
    count = torch.zeros(256, dtype=torch.int64, device=pixels.device).scatter_add_(0, pixels, torch.ones_like(pixels))
    start = count.cumsum(0) - count
    return pixels.argsort(stable=True), start[classes], count[classes]


def _pick(order: Tensor, start: Tensor, count: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw pixels uniformly, with replacement, from groups; any pixel if a group is empty. Same as prcl/losses.py."""
    offset = (torch.rand(shape, device=order.device) * count).long().minimum((count - 1).clamp(min=0))
    return order[(start + offset).clamp(max=len(order) - 1)]
