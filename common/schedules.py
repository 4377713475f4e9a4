"""Everything that changes during training, as a pure function of the optimizer step."""

import math

import torch


def poly(step: int, total: int, power: float = 0.9, floor: float = 0.0) -> float:
    """Factor of the polynomial decay (1 - step / total) ** power, never below `floor`."""
    return max(max(1.0 - step / total, 0.0) ** power, floor)


def ema_decay(step: int, alpha: float) -> float:
    """Decay of the teacher after update number `step` (from 0): min(1 - 1 / (step + 1), alpha).

    The first update copies the student; the decay then grows until it reaches `alpha` (Tarvainen & Valpola, 2017).
    """
    return min(1.0 - 1.0 / (step + 1), alpha)


def exponential_ramp(time: float, begin: float, end: float, max_value: float, min_value: float, mult: float) -> float:
    """Ramp max_value * exp(mult * t ** 2), t = 0..1 between `begin` and `end`; never below `min_value`.

    0 before `begin` (raised to `min_value`), `min_value` from `end` on (PRCL, section "Training").
    """
    if time >= end:
        return min_value
    if time < begin:
        return max(0.0, min_value)
    progress = (time - begin) / (end - begin)
    return max(max_value * math.exp(mult * progress**2), min_value)


def set_lr(optimizer: torch.optim.Optimizer, factor: float, floor: float = 0.0) -> None:
    """Set each group's rate to its own first rate times `factor`, never below `floor` (unless it starts there)."""
    for group in optimizer.param_groups:
        group["lr"] = max(group["initial_lr"] * factor, min(floor, group["initial_lr"]))
