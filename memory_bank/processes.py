"""Sums and gathers over processes, for batch norm over embeddings and for the bank."""

import torch
import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """Number of training processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """Sum over processes, the same on each. Differentiable: the gradient is the sum of all processes' gradients."""
    return values if count() == 1 else _Sum.apply(values)


def gathered(values: Tensor) -> Tensor:
    """Stack the tensors of all P processes: [P,...]. Not differentiable."""
    if count() == 1:
        return values.unsqueeze(0)
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(count())]
    dist.all_gather(parts, values.contiguous())
    return torch.stack(parts)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.forward(None, gradient)
