"""The mean teacher: a copy of a network whose parameters are a moving average of the student's."""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def make_teacher(network: nn.Module) -> nn.Module:
    """Copy `network` without gradients. The copy keeps its own batch-norm statistics."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float, buffers: bool = False) -> None:
    """Set theta_T = decay * theta_T + (1 - decay) * theta_S for all parameters.

    Args:
        teacher, student: Networks of the same architecture.
        decay: Share that the teacher keeps.
        buffers: Average floating-point buffers too and copy the others (UniMatch V2, and teachers that see no image);
            by default the teacher keeps its own batch-norm statistics.
    """
    get_ema_multi_avg_fn(decay)(list(teacher.parameters()), list(student.parameters()), None)
    for own, other in zip(teacher.buffers(), student.buffers()) if buffers else ():
        own.lerp_(other, 1 - decay) if own.is_floating_point() else own.copy_(other)


def ema_decay(step: int, alpha: float) -> float:
    """Decay of the teacher's update number `step` (from 0): min(1 - 1 / (step + 1), alpha).

    The first update copies the student; the decay then grows until it reaches `alpha` (Tarvainen & Valpola, 2017).
    """
    return min(1.0 - 1.0 / (step + 1), alpha)
