"""Networks of the goldens: official key lists, and weights and inputs by the goldens' rule."""

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.config.sections import ModelConfig
from common.models.deeplab import RATES
from common.models.two_networks import TwoNetworks
from common.models.weights import load_state
from common.released.weights import PRCL_CSS, deeplab_from_cps, deeplab_from_prcl_css

# What the segmentation networks of PRCL and CSS have besides ours: name -> shape of its 304 -> 256 -> 256 head.
REPRESENTATION = {
    "representation.0.weight": (256, 304, 3, 3),
    "representation.1.weight": (256,),
    "representation.1.bias": (256,),
    "representation.1.running_mean": (256,),
    "representation.1.running_var": (256,),
    "representation.1.num_batches_tracked": (),
    "representation.3.weight": (256, 256, 1, 1),
    "representation.3.bias": (256,),
}


def read_key_list(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape from a golden `net_keys.json.gz`; `name` is `plain`, `stem` or `uncer_head`."""
    with gzip.open(path, "rt") as file:
        return {key: tuple(shape) for key, (shape, _) in json.load(file)[name].items()}


def read_conv_geometry(path: Path, name: str) -> dict[str, list[list[int]]]:
    """Official name -> [stride, dilation, padding] of the convolutions where stride or dilation is not 1."""
    with gzip.open(path, "rt") as file:
        return json.load(file)[f"conv_geometry_{name}"]


def prcl_css_keys(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The official key list (key -> shape) that belongs to our `DeepLabV3Plus`, from our own key map."""
    shapes = {prcl_css_name(key): tuple(value.shape) for key, value in network.state_dict().items()}
    return shapes | REPRESENTATION


def prcl_css_name(key: str) -> str:
    """Our name of a tensor or module of the segmenter -> the official one."""
    official, ours = next((official, ours) for official, ours in PRCL_CSS.items() if key.startswith(ours))
    return official + key.removeprefix(ours)


def conv_geometry(network: nn.Module) -> dict[str, list[list[int]]]:
    """As `read_conv_geometry`, of our network."""
    convolutions = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    return {
        prcl_css_name(name): [list(conv.stride), list(conv.dilation), list(conv.padding)]
        for name, conv in convolutions.items()
        if conv.stride != (1, 1) or conv.dilation != (1, 1)
    }


def model_config(g: Mapping[str, Any]) -> ModelConfig:
    """The network of a golden of PRCL or CSS."""
    stem = "deep" if g["shape_maxpool"][1] == 128 else "plain"  # 64 channels
    return ModelConfig(int(g["num_classes"]), "resnet101", stem, output_stride=int(g["dilate_scale"]), pretrained=False)


def listed_config(path: Path, name: str, stem: str) -> ModelConfig:
    """The network of a key list, `plain` or `stem`, in `net_keys.json.gz`."""
    rates = {rates[0]: stride for stride, rates in RATES.items()}
    stride = rates[read_conv_geometry(path, name)["ASPP.convs.1.0"][1][0]]
    num_classes = read_key_list(path, name)["classifier.3.bias"][0]
    return ModelConfig(num_classes, "resnet101", stem, output_stride=stride, pretrained=False)


def load_filled(segmenter: nn.Module, representation: nn.Module) -> None:
    """The goldens' weights, converted from the official names, into a segmenter and its representation head."""
    state, head = fill(prcl_css_keys(segmenter)), "representation."
    load_state(segmenter, deeplab_from_prcl_css(state), "the golden's rule", "the segmenter")
    representation.load_state_dict({k.removeprefix(head): v for k, v in state.items() if k.startswith(head)})


def catch_stages(segmenter: nn.Module) -> dict[str, Tensor]:
    """What the segmenter's stages return from now on, by the goldens' names."""
    stages = {name: segmenter.encoder[name] for name in ("maxpool", "layer1", "layer2", "layer3", "layer4")}
    caught = {}
    for name, module in (stages | {"aspp": segmenter.aspp}).items():
        module.register_forward_hook(lambda _, __, output, name=name: caught.update({name: output}))
    return caught


def fill(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Weights by the rule of the PRCL and CSS goldens: draws seeded by the rank of the sorted key."""
    return {key: _fill_one(index, key, tuple(shapes[key])) for index, key in enumerate(sorted(shapes))}


def _fill_one(index: int, key: str, shape: tuple[int, ...]) -> Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    noise = np.random.RandomState(index).standard_normal(shape)
    if len(shape) >= 2:
        value = noise * math.sqrt(1 / math.prod(shape[1:]))
    elif key.endswith("running_var"):
        value = 1 + np.abs(0.02 * noise)
    elif key.endswith(("running_mean", "bias")) or key == "beta":
        value = 0.02 * noise
    else:
        value = 1 + 0.02 * noise
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def draw_input(seed: int, shape: Sequence[int]) -> Tensor:
    """The input of a network golden."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32))


# ---- CAC, CPS

# The projector, which is no part of the segmenter: the released name -> shape.
CAC_PROJECTOR = {
    "project.0.weight": (256, 256, 1, 1),
    "project.0.bias": (256,),
    "project.2.weight": (128, 256, 1, 1),
    "project.2.bias": (128,),
}


def read_keys(path: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a golden that lists (key, shape, type)."""
    with gzip.open(path, "rt") as file:
        return {key: tuple(shape) for key, shape, _ in json.load(file)}


def official_keys(network: nn.Module, names: Mapping[str, str], before: str = "") -> dict[str, tuple[int, ...]]:
    """The official key list (key -> shape) of our network from a map of prefixes, official -> ours."""
    shapes = {}
    for key, value in network.state_dict().items():
        official, ours = next((official, ours) for official, ours in names.items() if key.startswith(ours))
        shapes[before + official + key.removeprefix(ours)] = tuple(value.shape)
    return shapes


def fill_small(shapes: Mapping[str, Sequence[int]], offset: int = 0) -> dict[str, Tensor]:
    """Weights by the rule of the CAC, CPS and CPCL goldens: draws of 0.02 seeded by the rank of the sorted key."""
    state = {}
    for index, key in enumerate(sorted(shapes)):
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.int64)
            continue
        value = np.random.RandomState(index + offset).standard_normal(tuple(shapes[key])) * 0.02
        is_norm = key.removesuffix("weight") + "running_mean" in shapes
        if key.endswith("running_var"):
            value = 1 + np.abs(value)
        elif key.endswith("weight") and is_norm:
            value = 1 + value
        state[key] = torch.from_numpy(value.astype(np.float32))
    return state


class Caught(dict):
    """What the given modules return, by name, from the next forward on."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            module.register_forward_hook(lambda _, __, output, name=name: self.update({name: output}))


def upsampled(network: nn.Module, image: Tensor) -> Tensor:
    logits = network(image)
    return nn.functional.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=network.align_corners)


def two_branches(network: TwoNetworks, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The official key list of both networks."""
    return official_keys(network.first, names, "branch1.") | official_keys(network.second, names, "branch2.")


def load_branches(network: TwoNetworks, state: dict[str, Tensor], path: Path) -> None:
    for number, one in ((1, network.first), (2, network.second)):
        load_state(one, deeplab_from_cps(state, number), path.name, f"network {number}")
