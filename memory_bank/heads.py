"""What memory bank has beside the segmentation network: two heads on rows of features, and a selector for each class.

A row is the feature of one pixel. Which rows count is known on the device alone, so all of them pass, and those that do
not count are left out of sums: nothing has to wait for their number.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import IGNORE
from memory_bank.processes import summed

EPSILON, MOMENTUM, SLOPE = 1e-5, 0.1, 0.2
BLOCK = 256  # rows; a smaller one wastes fewer of them on classes with few rows, a larger one copies fewer weights


def rows_of(feature: Tensor) -> Tensor:
    """[B,D,h,w] -> rows [B*h*w,D]; a view where the feature is stored pixel by pixel."""
    return feature.permute(0, 2, 3, 1).flatten(0, 2)


class RowNorm(nn.Module):
    """Batch norm over the rows that count, of all processes. With fewer than two it learns no statistics.

    Args:
        dims: Length F of a row.
    """

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dims)), nn.Parameter(torch.zeros(dims))
        self.register_buffer("running_mean", torch.zeros(dims))
        self.register_buffer("running_var", torch.ones(dims))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, rows: Tensor, counted: Tensor) -> Tensor:
        """Rows [M,F], `counted` bool [M] -> [M,F], in float32."""
        rows = rows.float()
        if not self.training:
            mean, variance = self.running_mean, self.running_var
        else:
            mean, variance, number = _statistics(rows, counted.float())
            _remember(self, mean, variance, number, number > 1)
        scale = self.weight * torch.rsqrt(variance + EPSILON)
        return torch.addcmul(self.bias - mean * scale, rows, scale)


class Head(nn.Module):
    """Linear map, batch norm, ReLU, linear map.

    Args:
        in_dims: Length of the rows.
        dims: Length F of the result's.
    """

    def __init__(self, in_dims: int, dims: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(in_dims, dims), RowNorm(dims), nn.Linear(dims, dims)

    def forward(self, rows: Tensor, counted: Tensor) -> Tensor:
        """Rows [M,in_dims], `counted` bool [M]: whose statistics the norm takes -> [M,F]."""
        return self.last(F.relu(self.norm(self.first(rows), counted)))


@dataclass(frozen=True)
class Blocks:
    """Rows sorted by class and cut into N blocks of `BLOCK` places, each of one class; some places stay empty.

    Attributes:
        row: int64 [N,BLOCK], the row at a place (0 where there is none).
        filled: bool [N,BLOCK].
        place: int64 [M], where a row is in the flattened blocks.
        owner: int64 [N], the class of a block.
    """

    row: Tensor
    filled: Tensor
    place: Tensor
    owner: Tensor


def count_rows(label: Tensor, num_classes: int) -> Tensor:
    """int64 [C], rows of each class on this process; `label` [M], C and above count for none."""
    counts = label.new_zeros(num_classes + 1)
    return counts.scatter_add_(0, label.clamp(max=num_classes), torch.ones_like(label))[:num_classes]


def in_blocks(label: Tensor, num_classes: int) -> Blocks:
    """The blocks of rows with classes `label` int64 [M]. As many as any labels could need: nothing waits for sizes."""
    label = label.clamp(max=num_classes)
    order = label.argsort(stable=True)
    counts = count_rows(label, num_classes + 1)
    blocks = (counts + BLOCK - 1) // BLOCK
    shift = (blocks.cumsum(0) - blocks) * BLOCK - (counts.cumsum(0) - counts)
    slot = torch.arange(len(label), device=label.device) + shift[label[order]]
    number = len(label) // BLOCK + num_classes + 1
    row = label.new_zeros(number * BLOCK).scatter_(0, slot, order)
    filled = torch.zeros_like(row, dtype=torch.bool).scatter_(0, slot, True)
    owner = torch.searchsorted(blocks.cumsum(0), torch.arange(number, device=label.device), right=True)
    place = torch.empty_like(label).scatter_(0, order, slot)
    filled = filled.view(number, BLOCK) & (owner < num_classes)[:, None]
    return Blocks(row.view(number, BLOCK), filled, place, owner.clamp(max=num_classes - 1))


class Selectors(nn.Module):
    """One small network a class that says how much a row counts: linear map, batch norm, leaky ReLU, linear, sigmoid.

    All classes pass together: the weights of their own class meet each block of rows. Gradients reach the weights
    alone.

    Args:
        num_classes: C.
        dims: Length F of a row.
    """

    def __init__(self, num_classes: int, dims: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        bound = 1 / math.sqrt(dims)  # torch's for linear maps
        shapes = {
            "first_weight": (num_classes, dims, dims),
            "first_bias": (num_classes, dims),
            "last_weight": (num_classes, dims),
            "last_bias": (num_classes,),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))
        self.weight = nn.Parameter(torch.ones(num_classes, dims))
        self.bias = nn.Parameter(torch.zeros(num_classes, dims))
        self.register_buffer("running_mean", torch.zeros(num_classes, dims))
        self.register_buffer("running_var", torch.ones(num_classes, dims))
        self.register_buffer("num_batches_tracked", torch.zeros(num_classes, dtype=torch.int64))

    def forward(self, rows: Tensor, label: Tensor, active: Tensor) -> Tensor:
        """How much each row counts.

        Args:
            rows: [M,F].
            label: int64 [M]; rows of class C and above get numbers without a meaning.
            active: bool [C], classes that learn statistics from these rows.

        Returns:
            [M], in (0,1).
        """
        blocks = in_blocks(label, self.num_classes)
        # Rows are constants here. Less their mean, the map's result has mean zero and needs no bias: it is as if the
        # norm had taken the mean off, with a pass less forward and two less backward.
        values = rows.detach().float().index_select(0, blocks.row.flatten()).view(*blocks.row.shape, -1)
        share = blocks.filled.float().unsqueeze(1)
        mean, number = self._means(values, share, blocks.owner)
        values -= mean.index_select(0, blocks.owner).unsqueeze(1)
        hidden = values @ self.first_weight.index_select(0, blocks.owner).transpose(1, 2)
        scale, shift = self._scale_and_shift(hidden, share, blocks.owner, mean, number, active)
        of_block = (values.index_select(0, blocks.owner).unsqueeze(1) for values in (shift, scale))
        hidden = F.leaky_relu(torch.addcmul(next(of_block), hidden, next(of_block)), SLOPE, inplace=True)
        logit = (hidden @ self.last_weight.index_select(0, blocks.owner).unsqueeze(2)).squeeze(2)
        logit = logit + self.last_bias.index_select(0, blocks.owner).unsqueeze(1)
        return torch.sigmoid(logit.flatten().index_select(0, blocks.place))

    def _means(self, values: Tensor, share: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [C,F] of the rows of each class, and their number [C,1], over all processes."""
        number = summed(self._by_class(share.sum(2), owner))
        return summed(self._by_class((share @ values).squeeze(1), owner)) / number.clamp(min=1), number

    def _by_class(self, sums: Tensor, owner: Tensor) -> Tensor:
        """Sums of blocks [N,K] -> of classes [C,K]."""
        return sums.new_zeros(self.num_classes, sums.shape[1]).index_add(0, owner, sums)

    def _scale_and_shift(
        self, hidden: Tensor, share: Tensor, owner: Tensor, mean: Tensor, number: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[C,F] each: what normalizes the map's results, from which its result for the mean row is already off."""
        own_mean = (self.first_weight @ mean.unsqueeze(2)).squeeze(2) + self.first_bias
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + EPSILON)
            return scale, self.bias + (own_mean - self.running_mean) * scale
        squares = (share @ hidden.square()).squeeze(1)
        variance = summed(self._by_class(squares, owner)) / number.clamp(min=1)
        _remember(self, own_mean, variance, number, active.unsqueeze(1) & (number > 1))
        # The bias of the map is lost in the norm; it stays part of the graph, from which processes expect gradients.
        return self.weight * torch.rsqrt(variance + EPSILON), self.bias + 0.0 * self.first_bias


class Heads(nn.Module):
    """All that a network of memory bank has beside the segmenter.

    Args:
        in_dims: Channels of the segmenter's features.
        num_classes: C.
        dims: Length F of a row in the bank.

    Attributes:
        memory_selectors: Meant to weigh the bank's rows. The release gives all of them the weight 1, whatever these
            say, so that they never learn; they are here because its checkpoints have them.
    """

    def __init__(self, in_dims: int, num_classes: int, dims: int) -> None:
        super().__init__()
        self.projection, self.prediction = Head(in_dims, dims), Head(dims, dims)
        self.selectors = Selectors(num_classes, dims)
        self.memory_selectors = Selectors(num_classes, dims).requires_grad_(False)

    def forward(self, feature: Tensor, label: Tensor) -> Tensor:
        """Feature [B,D,h,w], label int64 [B,h,w] (255: does not count) -> rows [B*h*w,F] for the contrastive loss."""
        counted = (label != IGNORE).flatten()
        return self.prediction(self.projection(rows_of(feature), counted), counted)


def _statistics(rows: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance [F] of the rows [M,F] that `share` [M] counts, and their number, over all processes."""
    # Half precision is too coarse for sums of so many rows. Meta tensors, which have none, know no autocast.
    with nullcontext() if rows.is_meta else torch.autocast(rows.device.type, enabled=False):
        number = summed(share.sum())
        mean = summed(share @ rows) / number.clamp(min=1)
        return mean, summed(share @ (rows - mean).square()) / number.clamp(min=1), number


@torch.no_grad()
def _remember(norm: nn.Module, mean: Tensor, variance: Tensor, number: Tensor, active: Tensor) -> None:
    """Running statistics of a batch norm, where it is `active`; variances are remembered unbiased."""
    unbiased = variance * (number / (number - 1).clamp(min=1))
    momentum = MOMENTUM * active.float()
    norm.running_mean.lerp_(mean, momentum.expand_as(mean))
    norm.running_var.lerp_(unbiased, momentum.expand_as(mean))
    norm.num_batches_tracked += active.view_as(norm.num_batches_tracked)
