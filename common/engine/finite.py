"""Detect non-finite steps, and roll buffers back to their state before the step."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from common.engine.gloo import GlooGroup


class BufferSnapshot:
    """Copy of all buffers of some modules (batch-norm statistics, banks, counters), to undo a skipped step.

    A forward changes buffers before its loss is available, so leaving the optimizer step out does not undo it.

    Args:
        modules: The modules whose buffers are copied.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._saved: dict[torch.dtype, Tensor] = {}

    def save(self) -> None:
        """Copy the buffers: one flat tensor per dtype."""
        self._saved = {dtype: _flat(buffers) for dtype, buffers in self._by_dtype().items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Set the buffers to their values at the last `save`."""
        for dtype, buffers in self._by_dtype().items():
            parts = self._saved[dtype].split([buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts):
                buffer.copy_(part.view(buffer.shape))

    def are_finite(self) -> list[Tensor]:
        """Check the floating-point buffers as they are now: one bool [] per dtype."""
        return [
            _flat(buffers).isfinite().all() for dtype, buffers in self._by_dtype().items() if dtype.is_floating_point
        ]

    def _by_dtype(self) -> dict[torch.dtype, list[Tensor]]:
        found: dict[torch.dtype, list[Tensor]] = {}
        for module in self._modules:
            for buffer in module.buffers():
                found.setdefault(buffer.dtype, []).append(buffer)
        return found


def find_non_finite(
    losses: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, buffers: BufferSnapshot, gloo: GlooGroup
) -> list[str]:
    """List what is not finite on any process: names of losses, `gradient`, `running statistics`.

    All processes get the same list. Costs one synchronization with the device.
    """
    finite = {name: loss.detach().isfinite().all() for name, loss in losses.items()}
    finite["gradient"] = gradients_are_finite(optimizer)
    if statistics := buffers.are_finite():
        finite["running statistics"] = torch.stack(statistics).all()
    flags = gloo.gather_ints(*torch.stack(list(finite.values())).int().tolist())
    return [name for name, of_processes in zip(finite, zip(*flags)) if not all(of_processes)]


def gradients_are_finite(optimizer: torch.optim.Optimizer) -> Tensor:
    """Check all gradients: bool []. Takes the maximum, because a sum of squares overflows long before a gradient."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return get_total_norm(gradients, norm_type=float("inf")).isfinite()


def non_finite_tensors(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of a state dict that contain NaN or infinity."""
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    if not floats:
        return []
    finite = torch.stack([tensor.isfinite().all() for tensor in floats.values()]).tolist()
    return [name for name, is_finite in zip(floats, finite) if not is_finite]


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
