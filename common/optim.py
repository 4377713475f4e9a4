"""The optimizer of a config's `optim` section."""

from typing import Any

import torch

from common.config import OptimConfig


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
