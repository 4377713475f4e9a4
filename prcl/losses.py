"""Equations of PRCL (Xie et al., AAAI 2023), one function each, computed in float32; 0 (with a graph) on empty inputs.

sigma is always a variance, never a standard deviation. Pixels of the embedding maps are numbered b*h*w + y*w + x.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from common import IGNORE
from common.images import flatten_pixels

# Elements of the [anchors, negatives, dimensions] block that is scored at once: small enough for the cache of a CPU,
# large enough to keep a GPU busy.
BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25}


@dataclass
class Prototypes:
    """A Gaussian per class.

    Attributes:
        mu: [C,D], not normalized.
        sigma: [C,D], variances.
        present: bool [C], True if any process has a valid pixel of the class.
    """

    mu: Tensor
    sigma: Tensor
    present: Tensor


@dataclass
class Samples:
    """Anchors and negatives of one step; row r belongs to class `classes[r]`.

    Attributes:
        classes: int64 [n], ascending; on the CPU the present ones, on a GPU all.
        anchors: int64 [n,Q], pixels; any value where `used` is False.
        negatives: int64 [n,Q,K], pixels of other classes.
        used: bool [n], True if the class has a hard pixel and a negative in this process.
    """

    classes: Tensor
    anchors: Tensor
    negatives: Tensor
    used: Tensor


def unsupervised_loss(logits: Tensor, pseudo_label: Tensor, confidence: Tensor, threshold: float) -> Tensor:
    """Cross-entropy with pseudo-labels, each image weighted by its share of confident pixels; mean over losses > 0.

    Same as css/losses.py.

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
    """Classes of the pixels in the contrastive loss, at the size of the embedding maps. Same as css/losses.py.

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
def prototypes(
    mu: Tensor, sigma: Tensor, label: Tensor, num_classes: int, reduce: Callable[[Tensor], Tensor]
) -> Prototypes:
    """Precision-weighted mean of each class: 1/sigma_c = sum 1/sigma_i, mu_c = sum (sigma_c / sigma_i) mu_i.

    Args:
        mu, sigma: [B,D,h,w].
        label: int64 [B,h,w], 255 = left out.
        reduce: Function that sums a tensor over all processes.
    """
    one_hot = (label.flatten() == torch.arange(num_classes, device=label.device)[:, None]).float()
    precision = 1.0 / flatten_pixels(sigma)
    sums = torch.cat([precision, precision * flatten_pixels(mu), torch.ones_like(precision[:, :1])], dim=1)
    total = reduce(one_hot @ sums)
    total_precision, weighted, count = total.split([mu.shape[1], mu.shape[1], 1], dim=1)
    present = count.squeeze(1) > 0
    class_sigma = 1.0 / total_precision.masked_fill(~present[:, None], 1.0)
    return Prototypes(weighted * class_sigma, class_sigma, present)


def mutual_likelihood_score(mu_a: Tensor, sigma_a: Tensor, mu_b: Tensor, sigma_b: Tensor) -> Tensor:
    """-1/2 mean_d [(a_d - b_d)^2 / (sigma_a + sigma_b) + ln(sigma_a + sigma_b)] of normalized means.

    As released: the mean over the D dimensions (last) instead of the paper's sum, without the constant.
    """
    variance = sigma_a + sigma_b
    difference = F.normalize(mu_a, dim=-1) - F.normalize(mu_b, dim=-1)
    return -0.5 * (difference.square() / variance + variance.log()).mean(-1)


@torch.no_grad()
def negative_class_probability(classes: Prototypes, available: Tensor, temp: float) -> Tensor:
    """Probability [n,n] of a negative of class j (column) for an anchor of class i (row), higher for similar classes.

    Args:
        classes: The n present prototypes.
        available: bool [n], True for classes with a pixel in this process.
    """
    mu, sigma = classes.mu, classes.sigma
    score = mutual_likelihood_score(mu[:, None], sigma[:, None], mu[None], sigma[None]) / temp
    own = torch.eye(len(mu), dtype=torch.bool, device=mu.device)
    forbidden = own | ~available[None]
    probability = torch.softmax(score.masked_fill(forbidden, -torch.inf), dim=1)
    return probability.nan_to_num(0.0)


@torch.no_grad()
def sample(
    label: Tensor,
    probability: Tensor,
    classes: Prototypes,
    strong_threshold: float,
    temp: float,
    num_queries: int,
    num_negatives: int,
) -> Samples:
    """Draw hard anchors of each class, and negatives from similar classes, with the device's random numbers.

    Args:
        label: int64 [B,h,w], 255 = left out.
        probability: [B,C,h,w] of the student; a pixel is hard if the value of its class is below `strong_threshold`.
        classes: Prototypes of all classes.
        num_queries, num_negatives: Q anchors per class, K negatives per anchor, drawn with replacement.
    """
    # Leaving out absent classes saves more than half of the work, but on a GPU it would require a synchronization.
    everywhere = torch.arange(len(classes.present), device=label.device)
    candidates = classes.present.nonzero().squeeze(1) if label.device.type == "cpu" else everywhere
    n = len(candidates)
    pixels = label.flatten()
    own = flatten_pixels(probability).gather(1, pixels.clamp(max=probability.shape[1] - 1)[:, None]).squeeze(1)
    order, start, count = _group(pixels, candidates)
    hard_order, hard_start, hard_count = _group(pixels.masked_fill(own >= strong_threshold, IGNORE), candidates)
    subset = Prototypes(classes.mu[candidates], classes.sigma[candidates], classes.present[candidates])
    chance = negative_class_probability(subset, count > 0, temp)
    anchors = _pick(hard_order, hard_start[:, None], hard_count[:, None], (n, num_queries))
    drawn = torch.rand(n, num_queries * num_negatives, device=label.device)
    drawn = drawn * chance.sum(1, keepdim=True)
    other = torch.searchsorted(chance.cumsum(1), drawn, right=True).clamp(max=max(n - 1, 0))
    negatives = _pick(order, start[other], count[other], tuple(other.shape)).view(n, num_queries, num_negatives)
    used = (hard_count > 0) & (chance.sum(1) > 0)
    return Samples(candidates, anchors, negatives, used)


def contrastive_loss(
    mu: Tensor, sigma: Tensor, classes: Prototypes, samples: Samples, temp: float, compile: bool = False
) -> Tensor:
    """Mean over the present classes of the cross-entropy of anchors with their prototype against their negatives.

    Gradients reach the anchors only; prototypes and negatives are constants. A class without a hard pixel adds 0 and is
    counted. The loss is 0 (with a graph) if fewer than two classes are present. Does not wait for a GPU.

    Args:
        mu, sigma: [B,D,h,w] of the student.
        classes: Prototypes of all classes.
        samples: Result of `sample`.
        compile: Score with a compiled kernel; results differ by rounding only.
    """
    nothing = 0.0 * (mu.sum() + sigma.sum())
    if len(samples.classes) < 2:  # a shape, which needs no synchronization
        return nothing
    mu, sigma = flatten_pixels(mu.float()), flatten_pixels(sigma.float())
    n, queries, negatives = samples.negatives.shape
    anchors = samples.anchors.clamp(min=0).flatten()
    proto = samples.classes.repeat_interleave(queries)
    losses = _AnchorLoss.apply(
        F.normalize(mu[anchors], dim=1),
        sigma[anchors],
        F.normalize(mu.detach(), dim=1),
        sigma.detach(),
        F.normalize(classes.mu, dim=1)[proto],
        classes.sigma[proto],
        samples.negatives.clamp(min=0).view(n * queries, negatives),
        temp,
        _compiled_score() if compile else _score_block,
    )
    class_losses = losses.view(n, queries).mean(1).masked_fill(~samples.used, 0.0)
    return nothing + class_losses.sum() / classes.present.sum().clamp(min=1)


class _AnchorLoss(torch.autograd.Function):
    """Cross-entropy [R] of each anchor, with the gradient computed in the same pass.

    Blocks of anchors are scored one after the other, so mu and sigma [R,K,D] of the negatives are never stored
    together. Softmax and target of a block are enough for the gradient of its anchors, the only gradient there is. The
    memory needed is that of a block, independent of the number of classes.
    """

    @staticmethod
    def forward(ctx, mu, sigma, all_mu, all_sigma, proto_mu, proto_sigma, negatives, temp, score):
        rows, dims = mu.shape
        block = max(1, BLOCK_ELEMENTS.get(mu.device.type, BLOCK_ELEMENTS["cpu"]) // (negatives.shape[1] * dims))
        losses = mu.new_empty(rows)
        grad_mu, grad_sigma = torch.empty_like(mu), torch.empty_like(sigma)
        for first in range(0, rows, block):
            part = slice(first, first + block)
            picked = negatives[part]
            other_mu = torch.cat([proto_mu[part, None], all_mu[picked]], dim=1)
            other_sigma = torch.cat([proto_sigma[part, None], all_sigma[picked]], dim=1)
            losses[part], grad_mu[part], grad_sigma[part] = score(
                mu[part, None], sigma[part, None], other_mu, other_sigma, temp
            )
        ctx.save_for_backward(grad_mu, grad_sigma)
        return losses

    @staticmethod
    def backward(ctx, grad):
        grad_mu, grad_sigma = ctx.saved_tensors
        return grad[:, None] * grad_mu, grad[:, None] * grad_sigma, None, None, None, None, None, None, None


def _score_block(mu: Tensor, sigma: Tensor, other_mu: Tensor, other_sigma: Tensor, temp: float) -> tuple[Tensor, ...]:
    """Loss [r] of anchors [r,1,D] against others [r,1+K,D], first the own prototype, and its gradients [r,D]."""
    dims = mu.shape[-1]
    variance = sigma + other_sigma
    inverse = 1.0 / variance
    difference = other_mu - mu
    scaled = difference * inverse
    quadratic = (difference * scaled).sum(-1)
    logits = (quadratic + variance.log().sum(-1)) * (-0.5 / (dims * temp))
    log_probability = torch.log_softmax(logits, dim=1)
    pull = log_probability.exp()
    pull[:, 0] -= 1.0
    pull = (pull / (dims * temp)).unsqueeze(1)
    grad_mu = (pull @ scaled).squeeze(1)
    grad_sigma = 0.5 * (pull @ (scaled.square() - inverse)).squeeze(1)
    return -log_probability[:, 0], grad_mu, grad_sigma


@cache
def _compiled_score() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(_score_block)


def _group(pixels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel numbers grouped by class; start and size of the group of each of `classes`. Same as css/losses.py."""
    count = torch.zeros(256, dtype=torch.int64, device=pixels.device).scatter_add_(0, pixels, torch.ones_like(pixels))
    start = count.cumsum(0) - count
    return pixels.argsort(stable=True), start[classes], count[classes]


def _pick(order: Tensor, start: Tensor, count: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw pixels uniformly, with replacement, from groups; any pixel if a group is empty. Same as css/losses.py."""
    offset = (torch.rand(shape, device=order.device) * count).long().minimum((count - 1).clamp(min=0))
    return order[(start + offset).clamp(max=len(order) - 1)]
