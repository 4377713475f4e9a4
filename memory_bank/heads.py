"""Heads of memory bank beside the segmentation network: projection, prediction, and a selector for each class.

Heads work on flattened maps, a vector for each pixel. The pixels that count are known on the device only, so all pixels
pass and those that do not count are left out of sums: nothing waits for their number.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import IGNORE
from common.images import flatten_pixels
from memory_bank.processes import summed

EPSILON, MOMENTUM, SLOPE = 1e-5, 0.1, 0.2
BLOCK = 256  # embeddings; a smaller block wastes less on classes with few of them, a larger one copies fewer weights


class MaskedBatchNorm(nn.Module):
    """Batch norm over the vectors that count, of all processes. With fewer than two it learns no statistics.

    Args:
        dims: Length F of a vector.
    """

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dims)), nn.Parameter(torch.zeros(dims))
        self.register_buffer("running_mean", torch.zeros(dims))
        self.register_buffer("running_var", torch.ones(dims))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, values: Tensor, counted: Tensor) -> Tensor:
        """Vectors [M,F], `counted` bool [M] -> [M,F], in float32."""
        values = values.float()
        if not self.training:
            mean, variance = self.running_mean, self.running_var
        else:
            mean, variance, number = _statistics(values, counted.float())
            _remember(self, mean, variance, number, number > 1)
        scale = self.weight * torch.rsqrt(variance + EPSILON)
        return torch.addcmul(self.bias - mean * scale, values, scale)


class Head(nn.Module):
    """Linear map, batch norm, ReLU, linear map.

    Args:
        in_dims: Length of the input vectors.
        dims: Length F of the result's vectors.
    """

    def __init__(self, in_dims: int, dims: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(in_dims, dims), MaskedBatchNorm(dims), nn.Linear(dims, dims)

    def forward(self, values: Tensor, counted: Tensor) -> Tensor:
        """Vectors [M,in_dims], `counted` bool [M] (part of the norm's statistics) -> [M,F]."""
        return self.last(F.relu(self.norm(self.first(values), counted)))


@dataclass(frozen=True)
class Blocks:
    """M embeddings sorted by class and cut into N blocks of `BLOCK` places, each of one class.

    Attributes:
        index: int64 [N,BLOCK], number of the embedding at each place (0 at an empty place).
        filled: bool [N,BLOCK], False at an empty place.
        place: int64 [M], place of each embedding in the flattened blocks.
        owner: int64 [N], class of each block.
    """

    index: Tensor
    filled: Tensor
    place: Tensor
    owner: Tensor


def count_classes(classes: Tensor, num_classes: int) -> Tensor:
    """int64 [C], how often each class occurs in `classes` int64 [M] on this process; C and above are not counted."""
    counts = classes.new_zeros(num_classes + 1)
    return counts.scatter_add_(0, classes.clamp(max=num_classes), torch.ones_like(classes))[:num_classes]


def in_blocks(classes: Tensor, num_classes: int) -> Blocks:
    """Cut embeddings of `classes` int64 [M] into blocks.

        for c in range(num_classes + 1):
            own = (classes == c).nonzero().squeeze(1)
            for part in own.split(BLOCK):
                index.append(pad(part, BLOCK)); owner.append(c)

    There are always as many blocks as any classes could need, so that nothing waits for sizes; spare blocks are empty.
    """
    classes = classes.clamp(max=num_classes)
    order = classes.argsort(stable=True)
    counts = count_classes(classes, num_classes + 1)
    blocks = (counts + BLOCK - 1) // BLOCK
    shift = (blocks.cumsum(0) - blocks) * BLOCK - (counts.cumsum(0) - counts)
    slot = torch.arange(len(classes), device=classes.device) + shift[classes[order]]
    number = len(classes) // BLOCK + num_classes + 1
    index = classes.new_zeros(number * BLOCK).scatter_(0, slot, order)
    filled = torch.zeros_like(index, dtype=torch.bool).scatter_(0, slot, True)
    owner = torch.searchsorted(blocks.cumsum(0), torch.arange(number, device=classes.device), right=True)
    place = torch.empty_like(classes).scatter_(0, order, slot)
    filled = filled.view(number, BLOCK) & (owner < num_classes)[:, None]
    return Blocks(index.view(number, BLOCK), filled, place, owner.clamp(max=num_classes - 1))


class Selectors(nn.Module):
    """A small network per class that scores embeddings: linear map, batch norm, leaky ReLU, linear map, sigmoid.

    In training mode, on one process, the result is that of

        for c in range(num_classes):
            own = embeddings[classes == c].detach()
            hidden = F.linear(own, first_weight[c], first_bias[c])
            hidden = F.batch_norm(hidden, None, None, weight[c], bias[c], training=True)
            hidden = F.leaky_relu(hidden, SLOPE)
            score[classes == c] = torch.sigmoid(hidden @ last_weight[c] + last_bias[c])

    Here all classes pass together, in blocks that meet the weights of their own class, since the number of embeddings
    of a class is on the device only. Gradients reach the weights, not the embeddings.

    Args:
        num_classes: Number of classes C.
        dims: Length F of an embedding.
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

    def forward(self, embeddings: Tensor, classes: Tensor, active: Tensor) -> Tensor:
        """Score each embedding.

        Args:
            embeddings: [M,F].
            classes: int64 [M]; scores of class C and above have no meaning.
            active: bool [C], classes whose running statistics are updated.

        Returns:
            Scores [M] in (0,1).
        """
        blocks = in_blocks(classes, self.num_classes)
        # Embeddings are constants here. With their mean subtracted first, the map's result has mean zero and needs no
        # bias: the same as subtracting the mean in the norm, with one pass less forward and two less backward.
        values = embeddings.detach().float().index_select(0, blocks.index.flatten()).view(*blocks.index.shape, -1)
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
        """Mean [C,F] of the embeddings of each class, and their number [C,1], over all processes."""
        number = summed(self._by_class(share.sum(2), owner))
        return summed(self._by_class((share @ values).squeeze(1), owner)) / number.clamp(min=1), number

    def _by_class(self, sums: Tensor, owner: Tensor) -> Tensor:
        """Sums over blocks [N,K] -> sums over classes [C,K]."""
        return sums.new_zeros(self.num_classes, sums.shape[1]).index_add(0, owner, sums)

    def _scale_and_shift(
        self, hidden: Tensor, share: Tensor, owner: Tensor, mean: Tensor, number: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scale and shift [C,F] that normalize the map's results, after its result for the mean was subtracted."""
        own_mean = (self.first_weight @ mean.unsqueeze(2)).squeeze(2) + self.first_bias
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + EPSILON)
            return scale, self.bias + (own_mean - self.running_mean) * scale
        squares = (share @ hidden.square()).squeeze(1)
        variance = summed(self._by_class(squares, owner)) / number.clamp(min=1)
        _remember(self, own_mean, variance, number, active.unsqueeze(1) & (number > 1))
        # The norm cancels the bias of the map, which stays part of the graph: processes expect its gradient.
        return self.weight * torch.rsqrt(variance + EPSILON), self.bias + 0.0 * self.first_bias


class Heads(nn.Module):
    """Projection, prediction and selectors beside the segmenter.

    Args:
        in_dims: Channels of the segmenter's features.
        num_classes: Number of classes C.
        dims: Length F of an embedding in the bank.

    Attributes:
        memory_selectors: Selectors of the bank's embeddings, which the release does not use: it gives all embeddings
            the weight 1. They do not learn and exist because released checkpoints contain them.
    """

    def __init__(self, in_dims: int, num_classes: int, dims: int) -> None:
        super().__init__()
        self.projection, self.prediction = Head(in_dims, dims), Head(dims, dims)
        self.selectors = Selectors(num_classes, dims)
        self.memory_selectors = Selectors(num_classes, dims).requires_grad_(False)

    def forward(self, feature: Tensor, label: Tensor) -> Tensor:
        """Feature [B,D,h,w], label int64 [B,h,w] (255: left out) -> embeddings [B*h*w,F] for the contrastive loss."""
        counted = (label != IGNORE).flatten()
        return self.prediction(self.projection(flatten_pixels(feature), counted), counted)


def _statistics(values: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance [F] of the vectors [M,F] whose `share` [M] is 1, and their number, over all processes."""
    # Half precision is too coarse for sums of so many vectors. There is no autocast for meta tensors.
    with nullcontext() if values.is_meta else torch.autocast(values.device.type, enabled=False):
        number = summed(share.sum())
        mean = summed(share @ values) / number.clamp(min=1)
        return mean, summed(share @ (values - mean).square()) / number.clamp(min=1), number


@torch.no_grad()
def _remember(norm: nn.Module, mean: Tensor, variance: Tensor, number: Tensor, active: Tensor) -> None:
    """Update the running statistics of a batch norm where it is `active`; running variances are unbiased."""
    unbiased = variance * (number / (number - 1).clamp(min=1))
    momentum = MOMENTUM * active.float()
    norm.running_mean.lerp_(mean, momentum.expand_as(mean))
    norm.running_var.lerp_(unbiased, momentum.expand_as(mean))
    norm.num_batches_tracked += active.view_as(norm.num_batches_tracked)
