"""The optimizer of a config's `optim` section."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from common.config import OptimConfig


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups for `build_optimizer`: weights of convolutions, then norms and biases, which do not decay."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[parameter.dim() > 1].append(parameter)
    return [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}]


def build_optimizer(optim: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """One optimizer for everything that is trained; a group may state an `lr` of its own.

    Every group remembers the rate it starts from as `initial_lr`, which `schedules.set_lr` scales.
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
            # Not fused: that form fails where some parameters get their first gradient later than others.
        )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer
