"""Optimizer and learning-rate schedules of a config's `optim` section, and ramps of loss weights."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from common.config.sections import OptimConfig


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Split parameters into groups for `build_optimizer`: convolution weights; norms and biases, without decay."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[parameter.dim() > 1].append(parameter)
    return [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}]


def build_optimizer(optim: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build one optimizer for all trained parameters.

    Args:
        optim: The config's `optim` section.
        groups: Parameter groups of `torch.optim`; a group may set its own `lr`.

    Returns:
        The optimizer; every group keeps its starting rate as `initial_lr`, which `set_lr` scales.
    """
    if optim.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)
    else:
        optimizer = torch.optim.SGD(
            groups,
            lr=optim.lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            nesterov=optim.nesterov and optim.momentum > 0,
            # Not fused: that version fails if some parameters get their first gradient later than others.
        )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def poly(step: int, total: int, power: float = 0.9, floor: float = 0.0) -> float:
    """Factor of the polynomial decay, (1 - step / total) ** power, but at least `floor`."""
    return max(max(1.0 - step / total, 0.0) ** power, floor)


def exponential_ramp(time: float, begin: float, end: float, max_value: float, min_value: float, mult: float) -> float:
    """Ramp of a loss weight (PRCL, section "Training").

    max_value * exp(mult * t ** 2) with t = 0..1 between `begin` and `end`, but at least `min_value`; 0 before `begin`
    (or `min_value`, if that is positive); `min_value` from `end` on.
    """
    if time >= end:
        return min_value
    if time < begin:
        return max(0.0, min_value)
    progress = (time - begin) / (end - begin)
    return max(max_value * math.exp(mult * progress**2), min_value)


def set_lr(optimizer: torch.optim.Optimizer, factor: float, floor: float = 0.0) -> None:
    """Set each group's rate to its `initial_lr` times `factor`, but at least `floor` (or `initial_lr`, if lower)."""
    for group in optimizer.param_groups:
        group["lr"] = max(group["initial_lr"] * factor, min(floor, group["initial_lr"]))
