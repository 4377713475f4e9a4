"""The memory: some rows of features a class, taken from labeled pixels that the teacher gets right and is sure of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.losses import upsample
from memory_bank.heads import Selectors, count_rows
from memory_bank.processes import gathered, summed


class Bank(nn.Module):
    """The newest rows of each class, the same on every process; they are saved with a checkpoint.

    Args:
        num_classes: C.
        size: Rows Q kept of a class.
        dims: Length F of a row.
    """

    def __init__(self, num_classes: int, size: int, dims: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(num_classes, size, dims))
        self.register_buffer("filled", torch.zeros(num_classes, dtype=torch.int64))

    def means(self) -> Tensor:
        """[C,F]: mean of each class's rows, each row scaled to length 1; 0 where there is none."""
        # Places that are not filled hold zeros, and zeros stay zeros.
        return F.normalize(self.rows, dim=2).sum(1) / self.filled.clamp(min=1).unsqueeze(1)

    @torch.no_grad()
    def update(self, rows: Tensor, label: Tensor, selectors: Selectors, most: int, lowest: bool = True) -> None:
        """Put new rows before those that are there; what is beyond the size is forgotten.

        Where a class has more than `most` rows over all processes, those of the lowest scores enter, in that order;
        else all do, in the order of the pixels. Nothing waits for the device.

        Args:
            rows: [M,F].
            label: int64 [M]; C and above offer nothing.
            selectors: Score the rows.
            most: Rows a class and update.
            lowest: The lowest scores enter, as released; the paper's text says the highest.
        """
        num_classes = len(self.filled)
        counts = summed(count_rows(label, num_classes))
        score = selectors(rows, label, counts > most)
        score = score if lowest else -score
        parts = [gathered(values) for values in _lowest(rows.float(), label, score, most, num_classes)]
        # Pixels of one process come before those of the next.
        parts[2] += torch.arange(len(parts[2]), device=label.device).view(-1, 1, 1) * len(label)
        picked, score, order = (values.transpose(0, 1).flatten(1, 2) for values in parts)
        index = torch.where((counts > most).unsqueeze(1), score, order).argsort(dim=1, stable=True)[:, :most]
        self._push(picked.gather(1, index.unsqueeze(2).expand(-1, -1, picked.shape[2])), counts.clamp(max=most))

    def _push(self, new: Tensor, number: Tensor) -> None:
        """`new` [C,E,F], of which the first `number` [C] of each class count, then what was there."""
        size, most = self.rows.shape[1], new.shape[1]
        place = torch.arange(size, device=new.device).expand(len(number), -1)
        number = number.unsqueeze(1)
        source = torch.where(place < number, place, most + place - number)
        both = torch.cat([new, self.rows], dim=1)
        kept = (self.filled.unsqueeze(1) + number).clamp(max=size)
        rows = both.gather(1, source.clamp(max=most + size - 1).unsqueeze(2).expand(-1, -1, both.shape[2]))
        self.rows.copy_(rows.masked_fill((place >= kept).unsqueeze(2), 0.0))
        self.filled.copy_(kept.squeeze(1))


def _lowest(rows: Tensor, label: Tensor, score: Tensor, most: int, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `most` rows [C,E,F] of the lowest scores of each class, their scores and their numbers [C,E].

    Scores and numbers (of rows, exact up to 2^24) are infinite where a class has fewer.
    """
    label = label.clamp(max=num_classes)
    by_score = score.argsort(stable=True)
    by_class = by_score[label[by_score].argsort(stable=True)]
    counts = count_rows(label, num_classes + 1)
    first = counts.cumsum(0) - counts
    own = label[by_class]
    rank = torch.arange(len(label), device=label.device) - first[own]
    nowhere = num_classes * most
    slot = torch.where((rank < most) & (own < num_classes), own * most + rank, nowhere)
    index = label.new_full((nowhere + 1,), -1).scatter_(0, slot, by_class)[:-1].view(num_classes, most)
    empty, known = index < 0, index.clamp(min=0).flatten()
    picked = rows.index_select(0, known).view(num_classes, most, -1)
    scores = score.index_select(0, known).view(num_classes, most).masked_fill(empty, torch.inf)
    return picked, scores, index.float().masked_fill(empty, torch.inf)


@torch.no_grad()
def correct_and_confident(logits: Tensor, label: Tensor, threshold: float, align_corners: bool) -> Tensor:
    """Classes of the pixels that may enter the bank: int64 [B,h,w], 255 for the others.

    A pixel of the feature grid stands for one of the image (the nearest, by torch's legacy rule): there the class of
    the logits must be the label, with a probability above the threshold.

    Args:
        logits: [B,C,h,w].
        label: int64 [B,H,W].
        threshold: Probability in [0,1].
        align_corners: How logits are enlarged.
    """
    size = logits.shape[-2:]
    full = upsample(logits, label.shape[-2:], align_corners)
    rows, columns = (
        nearest_labels(torch.arange(side, device=label.device).view(1, 1, -1), (1, small))[0, 0]
        for side, small in zip(label.shape[-2:], size)
    )
    confidence, predicted = full.index_select(2, rows).index_select(3, columns).softmax(1).max(1)
    label = nearest_labels(label, size)
    return torch.where((predicted == label) & (confidence > threshold), label, 255)


def nearest_labels(label: Tensor, size: tuple[int, int]) -> Tensor:
    """int64 [B,H,W] -> [B,*size]: the pixel at floor(i * H / h), torch's legacy `nearest`."""
    return F.interpolate(label.unsqueeze(1).float(), size, mode="nearest").squeeze(1).long()
