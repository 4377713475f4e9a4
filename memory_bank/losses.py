"""Equations of memory bank (Alonso et al., ICCV 2021), computed in float32; 0 (with a graph) on empty inputs."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import IGNORE
from memory_bank.bank import Bank
from memory_bank.heads import Selectors, count_classes
from memory_bank.processes import summed


def contrastive_loss(embeddings: Tensor, classes: Tensor, bank: Bank, selectors: Selectors) -> Tensor:
    """Mean over the C classes of sum_i r_i (1 - x_i mu_c) / M_c, r_i = s_i / mean(s), s_i from the class's selector.

    The release compares each of the M_c embeddings x_i of a class with each of the N embeddings m_j of its bank (paper,
    equation 5). The latter have equal weights (the release normalizes theirs over an axis of length 1), so the mean
    over j of the distances 1 - x_i m_j is the distance to mu_c, the mean of the m_j: the same value and gradients,
    without an [M_c,N] matrix. Classes with fewer than two embeddings on either side add 0. Sums are over all processes.

    Args:
        embeddings: [M,F], results of the prediction head; x_i is an embedding scaled to length 1.
        classes: int64 [M]; C and above are left out.
        bank: Bank of C classes.
        selectors: Selectors, which learn from this loss; `embeddings` get no gradient through them.
    """
    num_classes = len(bank.filled)
    embeddings, classes = embeddings.float(), classes.clamp(max=num_classes)
    active = (summed(count_classes(classes, num_classes)) > 1) & (bank.filled > 1)
    score = selectors(embeddings, classes, active)
    means = F.pad(bank.means(), (0, 0, 0, 1))
    product = (embeddings @ means.T).gather(1, classes.unsqueeze(1)).squeeze(1)
    cosine = product / embeddings.norm(dim=1).clamp(min=1e-12)
    sums = embeddings.new_zeros(2, num_classes + 1).index_add(1, classes, torch.stack([score * (1 - cosine), score]))
    distance, weight = summed(sums[:, :-1])
    per_class = distance / weight.clamp(min=torch.finfo(weight.dtype).tiny)
    return torch.where(active, per_class, 0.0).sum() / num_classes


def supervised_loss(logits: Tensor, label: Tensor, class_weight: Tensor) -> Tensor:
    """Mean cross-entropy weighted by class; 0 (with a graph) if all pixels are ignored.

    Args:
        logits: [B,C,H,W].
        label: int64 [B,H,W], 255 = ignore.
        class_weight: [C].
    """
    class_weight = class_weight.float()
    total = F.cross_entropy(logits.float(), label, class_weight, ignore_index=IGNORE, reduction="sum")
    weight = F.pad(class_weight, (0, 1))[label.clamp(max=len(class_weight))].sum()
    return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)


def pseudo_label_loss(
    logits: Tensor, pseudo_label: Tensor, confidence: Tensor, class_weight: Tensor, power: float
) -> Tensor:
    """Cross-entropy with pseudo-labels, weighted by class and by a power of their confidence.

    The mean is over all pixels, including ignored ones (paper, equation 3).

    Args:
        logits: [B,C,H,W].
        pseudo_label: int64 [B,H,W], 255 = ignore.
        confidence: [B,H,W].
        class_weight: [C].
        power: Exponent of the confidence; s of the paper.
    """
    per_pixel = F.cross_entropy(
        logits.float(), pseudo_label, class_weight.float(), ignore_index=IGNORE, reduction="none"
    )
    return (per_pixel * confidence.float() ** power).mean()


def entropy_loss(logits: Tensor, pseudo_label: Tensor, broadcast: bool = False) -> Tensor:
    """Mean entropy of the pixels with a pseudo-label, divided by log(C): 0 to 1 (paper, equation 4).

    0 (with a graph) if no pixel has a pseudo-label.

    Args:
        logits: [B,C,H,W].
        pseudo_label: int64 [B,H,W], 255 = ignore.
        broadcast: Apply every image's mask to every image's entropies, as in the release before October 2021, which
            gives about B times the mean.
    """
    log_probability = logits.float().log_softmax(1)
    entropy = -(log_probability.exp() * log_probability).sum(1) / math.log(logits.shape[1])
    counted = (pseudo_label != IGNORE).float()
    masked = entropy.sum(0) * counted.sum(0) if broadcast else entropy * counted
    return masked.sum() / counted.sum().clamp(min=1)


def ramp(step: int, steps: int) -> float:
    """Weight of the pseudo-label loss: exp(-5 (1 - step / steps)^2), 1 from step `steps` on."""
    return math.exp(-5 * max(0.0, 1 - step / steps) ** 2)


def teacher_decay(step: int, total: int, alpha: float, warm_up: int = 10) -> float:
    """Decay of the teacher in step `step`: from `alpha` to 1 along a cosine, at most 1 - 1/(warm_up * step + 1).

    Args:
        step: Number of the step, from 0; the first update copies the student.
        total: Number of steps of the training.
        alpha: Decay at the start of the cosine.
        warm_up: 10; 1 in the release's other two scripts.
    """
    decay = 1 - (1 - alpha) * (math.cos(math.pi * step / total) + 1) / 2
    return min(1 - 1 / (warm_up * step + 1), decay)


class ClassBalance(nn.Module):
    """Class weights from the frequencies of classes in labels and pseudo-labels of past steps (curriculum, 4.2).

    Labels are counted in the first steps, until every labeled image was seen once; pseudo-labels are counted in a
    window as long as one pass over the unlabeled images. The tables are saved with a checkpoint.

    Args:
        num_classes: Number of classes C.
        labeled_steps: Number of steps whose labels are counted.
        unlabeled_steps: Number of steps in the window.
    """

    def __init__(self, num_classes: int, labeled_steps: int, unlabeled_steps: int) -> None:
        super().__init__()
        self.register_buffer("labeled", torch.zeros(labeled_steps, num_classes, dtype=torch.int64))
        self.register_buffer("unlabeled", torch.zeros(unlabeled_steps, num_classes, dtype=torch.int64))

    def add_labeled(self, step: int, label: Tensor, part: int = 0) -> None:
        """Count `label` int64 [B,H,W] of step `step` (from 0); a step may come in parts, numbered from 0."""
        if step < len(self.labeled):
            self.labeled[step] = self._count(label) + (self.labeled[step] if part else 0)

    def add_unlabeled(self, step: int, pseudo_label: Tensor, part: int = 0) -> None:
        """Count `pseudo_label` int64 [B,H,W] of step `step` in place of the oldest step; parts as in `add_labeled`."""
        row = step % len(self.unlabeled)
        self.unlabeled[row] = self._count(pseudo_label) + (self.unlabeled[row] if part else 0)

    def weights(self, steps: int) -> Tensor:
        """sqrt(median frequency / frequency) [C] after `steps` counted steps; ones until the tables are full.

        A class that never occurred gets the largest weight of the others, and at least 1. All weights are 1 if most
        classes never occurred, since the median frequency is then 0.
        """
        frequency = (self.labeled.sum(0) + self.unlabeled.sum(0)).double()
        if steps < max(len(self.labeled), len(self.unlabeled)):
            return torch.ones_like(frequency)
        median = frequency.quantile(0.5)
        ratio = median / frequency.clamp(min=1)
        ratio = torch.where(frequency == 0, ratio.masked_fill(frequency == 0, 0).amax().clamp(min=1), ratio)
        return torch.where(median > 0, ratio, 1.0).sqrt()

    def ones(self) -> Tensor:
        """Equal class weights, ones [C]."""
        return torch.ones(self.labeled.shape[1], device=self.labeled.device)

    def _count(self, label: Tensor) -> Tensor:
        return summed(count_classes(label.flatten(), self.labeled.shape[1]))


def embeddings_per_image(size: int, labeled_images: int, factor: float) -> int:
    """Embeddings per class and image of the batch in an update of the bank, which fills the bank in one pass.

    Args:
        size: Embeddings kept per class.
        labeled_images: Number of labeled images.
        factor: Multiple for data whose images show few of the classes: 1 on Cityscapes, 7 on VOC.
    """
    return max(1, int(factor * round(size / labeled_images)))
