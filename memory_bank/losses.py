"""The equations of memory bank (Alonso et al., ICCV 2021). In float32, finite whatever is empty."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import IGNORE
from memory_bank.bank import Bank
from memory_bank.heads import Selectors, count_rows
from memory_bank.processes import summed


def contrastive_loss(rows: Tensor, label: Tensor, bank: Bank, selectors: Selectors) -> Tensor:
    """Mean over the C classes of sum_i r_i (1 - x_i mu_c) / M_c, r_i = s_i / mean(s), s_i of the class's selector.

    The release compares each of the M_c rows x_i of a class with each of the N rows of its bank (paper, equation 5).
    The bank's rows have equal weights (the release normalizes theirs over an axis of length 1), so that the mean of
    the distances 1 - x_i m_j over j is the distance to mu_c, the mean of the bank's rows m_j: the same value and
    gradients, without a matrix of rows by rows. Classes with fewer than two rows on either side add 0. Rows and means
    of all processes are taken together.

    Args:
        rows: [M,F], results of the prediction head; x_i is a row scaled to length 1.
        label: int64 [M]; C and above take no part.
        bank: Holds C classes.
        selectors: Learn from this loss, without a gradient to `rows`.
    """
    num_classes = len(bank.filled)
    rows, label = rows.float(), label.clamp(max=num_classes)
    active = (summed(count_rows(label, num_classes)) > 1) & (bank.filled > 1)
    score = selectors(rows, label, active)
    means = F.pad(bank.means(), (0, 0, 0, 1))
    cosine = (rows @ means.T).gather(1, label.unsqueeze(1)).squeeze(1) / rows.norm(dim=1).clamp(min=1e-12)
    sums = rows.new_zeros(2, num_classes + 1).index_add(1, label, torch.stack([score * (1 - cosine), score]))
    distance, weight = summed(sums[:, :-1])
    per_class = distance / weight.clamp(min=torch.finfo(weight.dtype).tiny)
    return torch.where(active, per_class, 0.0).sum() / num_classes


def supervised_loss(logits: Tensor, label: Tensor, class_weight: Tensor) -> Tensor:
    """Cross-entropy, a mean weighted by class; 0, with its graph, where all pixels are ignored.

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

    The mean is over all pixels, ignored ones too (paper, equation 3).

    Args:
        logits: [B,C,H,W].
        pseudo_label: int64 [B,H,W], 255 = ignore.
        confidence: [B,H,W].
        class_weight: [C].
        power: Of the confidence; s of the paper.
    """
    per_pixel = F.cross_entropy(
        logits.float(), pseudo_label, class_weight.float(), ignore_index=IGNORE, reduction="none"
    )
    return (per_pixel * confidence.float() ** power).mean()


def entropy_loss(logits: Tensor, pseudo_label: Tensor, broadcast: bool = False) -> Tensor:
    """Mean entropy of the pixels with a pseudo-label, by the largest there can be: 0 to 1 (paper, equation 4).

    0, with its graph, where no pixel has one.

    Args:
        logits: [B,C,H,W].
        pseudo_label: int64 [B,H,W], 255 = ignore.
        broadcast: Every image's mask on every image's entropies, as in the release before October 2021: about B times
            the mean.
    """
    log_probability = logits.float().log_softmax(1)
    entropy = -(log_probability.exp() * log_probability).sum(1) / math.log(logits.shape[1])
    counted = (pseudo_label != IGNORE).float()
    masked = entropy.sum(0) * counted.sum(0) if broadcast else entropy * counted
    return masked.sum() / counted.sum().clamp(min=1)


def ramp(step: int, steps: int) -> float:
    """Weight of the pseudo-labels: exp(-5 (1 - step / steps)^2), 1 from step number `steps` on."""
    return math.exp(-5 * max(0.0, 1 - step / steps) ** 2)


def teacher_decay(step: int, total: int, alpha: float, warm_up: int = 10) -> float:
    """Decay of the teacher after step `step`: from `alpha` to 1 along a cosine, at first at most 1 - 1/(10 step + 1).

    Args:
        step: From 0; the first update copies the student.
        total: Steps of the training.
        alpha: First decay.
        warm_up: 10; 1 in the release's other two scripts.
    """
    decay = 1 - (1 - alpha) * (math.cos(math.pi * step / total) + 1) / 2
    return min(1 - 1 / (warm_up * step + 1), decay)


class ClassBalance(nn.Module):
    """Class weights from how often classes occurred in labels and pseudo-labels of past steps (curriculum, 4.2).

    Labels are counted in the first steps, until every labeled image was seen once; pseudo-labels in a window that is as
    long as one pass over the unlabeled images. The tables are saved with a checkpoint.

    Args:
        num_classes: C.
        labeled_steps: Steps whose labels are counted.
        unlabeled_steps: Steps in the window.
    """

    def __init__(self, num_classes: int, labeled_steps: int, unlabeled_steps: int) -> None:
        super().__init__()
        self.register_buffer("labeled", torch.zeros(labeled_steps, num_classes, dtype=torch.int64))
        self.register_buffer("unlabeled", torch.zeros(unlabeled_steps, num_classes, dtype=torch.int64))

    def add_labeled(self, step: int, label: Tensor, part: int = 0) -> None:
        """Count `label` int64 [B,H,W] of step number `step`, from 0; it may come in parts."""
        if step < len(self.labeled):
            self.labeled[step] = self._count(label) + (self.labeled[step] if part else 0)

    def add_unlabeled(self, step: int, pseudo_label: Tensor, part: int = 0) -> None:
        """Count `pseudo_label` int64 [B,H,W] of step number `step`, in place of the oldest; it may come in parts."""
        row = step % len(self.unlabeled)
        self.unlabeled[row] = self._count(pseudo_label) + (self.unlabeled[row] if part else 0)

    def weights(self, steps: int) -> Tensor:
        """sqrt(median frequency / frequency) [C] after `steps` counted steps; ones until the tables are full.

        A class that never occurred gets the largest weight of the others, and 1 at least. Where most classes never
        occurred there is no frequency to compare with, and all weights are 1.
        """
        frequency = (self.labeled.sum(0) + self.unlabeled.sum(0)).double()
        if steps < max(len(self.labeled), len(self.unlabeled)):
            return torch.ones_like(frequency)
        median = frequency.quantile(0.5)
        ratio = median / frequency.clamp(min=1)
        ratio = torch.where(frequency == 0, ratio.masked_fill(frequency == 0, 0).amax().clamp(min=1), ratio)
        return torch.where(median > 0, ratio, 1.0).sqrt()

    def ones(self) -> Tensor:
        """[C]: no class counts more than another."""
        return torch.ones(self.labeled.shape[1], device=self.labeled.device)

    def _count(self, label: Tensor) -> Tensor:
        return summed(count_rows(label.flatten(), self.labeled.shape[1]))


def rows_per_image(size: int, labeled_images: int, factor: float) -> int:
    """Rows of a class that one image of the batch stands for in an update of the bank: full after one pass.

    Args:
        size: Rows kept of a class.
        labeled_images: How many there are.
        factor: More rows for data whose images show few of the classes: 1 on Cityscapes, 7 on VOC.
    """
    return max(1, int(factor * round(size / labeled_images)))
