"""Optimizer and learning-rate schedules of a config's `optim` section, and ramps of loss weights."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from common.config.sections import OptimConfig
from common.models.segmenter import Segmenter


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Split parameters into groups for `build_optimizer`: convolution weights; norms and biases, without decay."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[parameter.dim() > 1].append(parameter)
    return [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}]


def build_optimizer(
    optim: OptimConfig, network: nn.Module, groups: list[dict[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """Build one optimizer for all trained parameters.

    Args:
        optim: The config's `optim` section.
        network: Module with all trained parameters, and with the segmenters among its modules.
        groups: Parameter groups of `torch.optim`; a group may set its own `lr`. By default one group of all parameters.
            Parameters without gradient are left out, and the encoder's get the rate of their group times
            `optim.encoder_lr_scale`, in a group of their own where that is not 1.

    Returns:
        The optimizer; every group keeps its starting rate as `initial_lr`, which `set_lr` scales.
    """
    groups = _scale_encoder(optim, network, groups or [{"params": list(network.parameters())}])
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
    """Set each group's rate to its `initial_lr` times `factor`, but at least `floor` (or `initial_lr`, if lower).

    The floor of an encoder whose rate is scaled is scaled too.
    """
    for group in optimizer.param_groups:
        least = floor * group.get("floor_scale", 1.0)
        group["lr"] = max(group["initial_lr"] * factor, min(least, group["initial_lr"]))


def _scale_encoder(optim: OptimConfig, network: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    scale = 1.0 if optim.encoder_lr_scale is None else optim.encoder_lr_scale
    segmenters = [module for module in network.modules() if isinstance(module, Segmenter)]
    encoder = {id(parameter) for segmenter in segmenters for parameter in segmenter.encoder.parameters()}
    result = []
    for group in groups:
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        if scale == 1:
            result.append(group | {"params": trained})
            continue
        scaled = {"lr": group.get("lr", optim.lr) * scale, "floor_scale": scale}
        result.append(group | {"params": [parameter for parameter in trained if id(parameter) not in encoder]})
        result.append(group | {"params": [parameter for parameter in trained if id(parameter) in encoder]} | scaled)
    return [group for group in result if group["params"]]
