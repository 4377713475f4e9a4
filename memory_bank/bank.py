"""The memory bank: embeddings per class, from labeled pixels that the teacher classifies correctly and confidently."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import IGNORE
from common.losses import label_and_confidence, upsample
from memory_bank.heads import Selectors, count_classes
from memory_bank.processes import gathered, summed


class Bank(nn.Module):
    """The newest embeddings of each class, equal on all processes and saved with a checkpoint.

    Args:
        num_classes: Number of classes C.
        size: Embeddings Q kept per class.
        dims: Length F of an embedding.

    Attributes:
        rows: [C,Q,F], the embeddings, the newest first; 0 where a class has fewer. Named as in checkpoints.
        filled: int64 [C], embeddings stored of each class.
    """

    def __init__(self, num_classes: int, size: int, dims: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(num_classes, size, dims))
        self.register_buffer("filled", torch.zeros(num_classes, dtype=torch.int64))

    def means(self) -> Tensor:
        """[C,F]: mean of the embeddings of each class, scaled to length 1 before; 0 for a class without any."""
        # Places that are not filled hold zeros, and zeros stay zeros.
        return F.normalize(self.rows, dim=2).sum(1) / self.filled.clamp(min=1).unsqueeze(1)

    @torch.no_grad()
    def update(
        self, embeddings: Tensor, classes: Tensor, selectors: Selectors, max_new_per_class: int, lowest: bool = True
    ) -> None:
        """Store new embeddings before the old ones, and drop those beyond the size. Does not wait for the device.

        If a class has more than `max_new_per_class` embeddings over all processes, those with the lowest scores enter,
        in the order of their scores; otherwise all enter, in the order of the pixels. On one process this is

            for c in range(num_classes):
                new, score = embeddings[classes == c], scores[classes == c]
                if len(new) > max_new_per_class:
                    new = new[score.argsort(stable=True)[:max_new_per_class]]
                stored[c] = torch.cat([new, stored[c]])[:size]

        Here all classes are done together, since the number of embeddings of a class is on the device only.

        Args:
            embeddings: [M,F].
            classes: int64 [M]; C and above are left out.
            selectors: Selectors that score the embeddings.
            max_new_per_class: Embeddings E per class that enter in one update at most.
            lowest: Prefer the lowest scores, as released; the paper's text prefers the highest.
        """
        num_classes = len(self.filled)
        counts = summed(count_classes(classes, num_classes))
        score = selectors(embeddings, classes, counts > max_new_per_class)
        score = score if lowest else -score
        candidates = _lowest(embeddings.float(), classes, score, max_new_per_class, num_classes)
        new, score, order = map(gathered, candidates)
        # Pixels of one process come before those of the next.
        order += torch.arange(len(order), device=classes.device).view(-1, 1, 1) * len(classes)
        new, score, order = (values.transpose(0, 1).flatten(1, 2) for values in (new, score, order))
        key = torch.where((counts > max_new_per_class).unsqueeze(1), score, order)
        index = key.argsort(dim=1, stable=True)[:, :max_new_per_class]
        new = new.gather(1, index.unsqueeze(2).expand(-1, -1, new.shape[2]))
        self._push(new, counts.clamp(max=max_new_per_class))

    def _push(self, new: Tensor, number: Tensor) -> None:
        """Store the first `number` [C] of the embeddings `new` [C,E,F] of each class before the old ones.

        for c in range(num_classes):
            stored[c] = torch.cat([new[c, : number[c]], stored[c]])[:size]
        """
        size, most = self.rows.shape[1], new.shape[1]
        place = torch.arange(size, device=new.device).expand(len(number), -1)
        number = number.unsqueeze(1)
        source = torch.where(place < number, place, most + place - number)
        both = torch.cat([new, self.rows], dim=1)
        kept = (self.filled.unsqueeze(1) + number).clamp(max=size)
        embeddings = both.gather(1, source.clamp(max=most + size - 1).unsqueeze(2).expand(-1, -1, both.shape[2]))
        self.rows.copy_(embeddings.masked_fill((place >= kept).unsqueeze(2), 0.0))
        self.filled.copy_(kept.squeeze(1))


def _lowest(
    embeddings: Tensor, classes: Tensor, score: Tensor, count: int, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` embeddings of the lowest scores of each class: [C,E,F], their scores and their numbers [C,E].

        for c in range(num_classes):
            own = (classes == c).nonzero().squeeze(1)
            index[c] = own[score[own].argsort(stable=True)[:count]]
        return embeddings[index], score[index], index

    Scores and numbers (float, exact up to 2^24) are infinite where a class has fewer.
    """
    classes = classes.clamp(max=num_classes)
    by_score = score.argsort(stable=True)
    by_class = by_score[classes[by_score].argsort(stable=True)]
    counts = count_classes(classes, num_classes + 1)
    first = counts.cumsum(0) - counts
    own = classes[by_class]
    rank = torch.arange(len(classes), device=classes.device) - first[own]
    nowhere = num_classes * count
    slot = torch.where((rank < count) & (own < num_classes), own * count + rank, nowhere)
    index = classes.new_full((nowhere + 1,), -1).scatter_(0, slot, by_class)[:-1].view(num_classes, count)
    empty, known = index < 0, index.clamp(min=0).flatten()
    lowest = embeddings.index_select(0, known).view(num_classes, count, -1)
    scores = score.index_select(0, known).view(num_classes, count).masked_fill(empty, torch.inf)
    return lowest, scores, index.float().masked_fill(empty, torch.inf)


@torch.no_grad()
def correct_and_confident(logits: Tensor, label: Tensor, threshold: float, align_corners: bool) -> Tensor:
    """Classes of the pixels that may enter the bank: int64 [B,h,w], 255 for the others.

    A pixel of the feature map corresponds to the nearest pixel of the image (by torch's legacy rule): there the class
    of the logits must be the label, with a probability above the threshold.

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
    predicted, confidence = label_and_confidence(full.index_select(2, rows).index_select(3, columns))
    label = nearest_labels(label, size)
    return torch.where((predicted == label) & (confidence > threshold), label, IGNORE)


def nearest_labels(label: Tensor, size: tuple[int, int]) -> Tensor:
    """int64 [B,H,W] -> [B,*size]: the pixel at floor(i * H / h), torch's legacy `nearest`."""
    return F.interpolate(label.unsqueeze(1).float(), size, mode="nearest").squeeze(1).long()
