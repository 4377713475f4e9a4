"""What keeps a bad step out of a model: is everything finite, and what was there before the step."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


class BufferSnapshot:
    """All buffers of some modules (batch-norm statistics, banks, counters), to undo a step that must not count.

    A forward changes them before its loss is known, so leaving the optimizer out does not undo it.

    Args:
        modules: Whose buffers.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._saved: dict[torch.dtype, Tensor] = {}

    def save(self) -> None:
        """Remember them as they are: one copy for each type of number."""
        self._saved = {dtype: _flat(buffers) for dtype, buffers in self._by_dtype().items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Make them again what they were at the last `keep`."""
        for dtype, buffers in self._by_dtype().items():
            parts = self._saved[dtype].split([buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts):
                buffer.copy_(part.view(buffer.shape))

    def are_finite(self) -> Tensor:
        """bool []."""
        flat = [_flat(buffers) for dtype, buffers in self._by_dtype().items() if dtype.is_floating_point]
        return torch.stack([part.isfinite().all() for part in flat]).all() if flat else torch.tensor(True)

    def _by_dtype(self) -> dict[torch.dtype, list[Tensor]]:
        found: dict[torch.dtype, list[Tensor]] = {}
        for module in self._modules:
            for buffer in module.buffers():
                found.setdefault(buffer.dtype, []).append(buffer)
        return found


def gradients_are_finite(optimizer: torch.optim.Optimizer) -> Tensor:
    """bool []. The largest number decides: sums of squares overflow long before a number does."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return get_total_norm(gradients, norm_type=float("inf")).isfinite()


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of a state dict that hold NaN or infinity."""
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    if not floats:
        return []
    finite = torch.stack([tensor.isfinite().all() for tensor in floats.values()]).tolist()
    return [name for name, fine in zip(floats, finite) if not fine]


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
