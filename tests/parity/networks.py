"""Networks of the goldens: official key lists, and weights and inputs by the rules of the goldens."""

import gzip
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from checks import Golden
from torch import Tensor, nn

from common.config.sections import ModelConfig
from common.models.deeplab import RATES
from common.models.two_networks import TwoNetworks
from common.models.weights import load_state
from common.released.weights import PRCL_CSS, deeplab_from_cps, deeplab_from_prcl_css

Shapes = dict[str, tuple[int, ...]]


def backbone_named(path: Path, default: str) -> str:
    """Return the ResNet in a file name, e.g. `resnet101` for `network_r101.npz`."""
    found = re.search(r"r(?:esnet)?(\d+)", path.name)
    return f"resnet{found[1]}" if found else default


def backbone_of(keys: Iterable[str]) -> str:
    """Return the ResNet of a key list: ResNet-101 has 23 blocks in its third stage."""
    return "resnet101" if any("layer3.22." in key for key in keys) else "resnet50"


@contextmanager
def no_draws() -> Iterator[None]:
    """Build networks within the block without initial weights, which take longer to draw than a forward pass."""

    def keep(values: Tensor, *_: Any, **__: Any) -> Tensor:
        return values

    with mock.patch.object(torch.Tensor, "normal_", keep), mock.patch.object(torch.Tensor, "uniform_", keep):
        yield


def unfilled(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network in evaluation mode, whose weights come from a state dict afterwards."""
    with no_draws():
        return build().eval()


def outline(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network on the meta device, which has shapes but no values."""
    with torch.device("meta"):
        return unfilled(build)


def input_of(g: Golden) -> Tensor:
    """Return the input of a network's golden: stored as `x`, or drawn by the seed and shape in the file."""
    if "x" in g:
        return g["x"]
    seed = g["x_seed"] if "x_seed" in g else g["input_seed"]
    shape = next((g[name].tolist() for name in ("x_shape", "input_shape") if name in g), None)
    shape = shape or [2, 3, *g["hw"].tolist()]
    return torch.from_numpy(np.random.RandomState(int(seed)).standard_normal(shape).astype(np.float32))


class Caught(dict):
    """Outputs of the given modules, by name, from the next forward on."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            module.register_forward_hook(lambda _, __, output, name=name: self.update({name: output}))


def shapes_of(module: nn.Module, prefix: str = "") -> Shapes:
    """Return key -> shape of a module's state dict, with `prefix` before each key."""
    return {prefix + key: tuple(value.shape) for key, value in module.state_dict().items()}


def official_keys(network: nn.Module, names: Mapping[str, str], before: str = "") -> Shapes:
    """Derive the official key list (key -> shape) of our network from a map of prefixes, official -> ours."""
    shapes = {}
    for key, shape in shapes_of(network).items():
        official, ours = next((official, ours) for official, ours in names.items() if key.startswith(ours))
        shapes[before + official + key.removeprefix(ours)] = shape
    return shapes


def read_json(path: Path) -> Any:
    """Read a `.json.gz`."""
    with gzip.open(path, "rt") as file:
        return json.load(file)


# ---- PRCL, CSS


def prcl_css_keys(segmenter: nn.Module, representation: nn.Module) -> Shapes:
    """Derive the official key list (key -> shape) of our segmenter and representation head from our own map."""
    return official_keys(segmenter, PRCL_CSS) | shapes_of(representation, "representation.")


def conv_geometry(network: nn.Module) -> dict[str, list[list[int]]]:
    """Return official name -> [stride, dilation, padding] of convolutions where stride or dilation is not 1."""
    convolutions = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    return {
        prcl_css_name(name): [list(conv.stride), list(conv.dilation), list(conv.padding)]
        for name, conv in convolutions.items()
        if conv.stride != (1, 1) or conv.dilation != (1, 1)
    }


def prcl_css_name(key: str) -> str:
    """Convert our name of a tensor or module of the segmenter to the official one."""
    official, ours = next((official, ours) for official, ours in PRCL_CSS.items() if key.startswith(ours))
    return official + key.removeprefix(ours)


def model_config(path: Path, g: Golden) -> ModelConfig:
    """Configure the network of a golden of PRCL or CSS."""
    stem = "deep" if g["shape_maxpool"][1] == 128 else "plain"  # 64 channels
    backbone, stride = backbone_named(path, "resnet101"), int(g["dilate_scale"])
    return ModelConfig(int(g["num_classes"]), backbone, stem, output_stride=stride, pretrained=False)


def listed_networks(path: Path) -> dict[str, ModelConfig]:
    """Configure the segmentation networks of a `net_keys.json.gz`, by their names in it."""
    listed, strides = read_json(path), {rates[0]: stride for stride, rates in RATES.items()}
    configs = {}
    for name in (key.removeprefix("conv_geometry_") for key in listed if key.startswith("conv_geometry_")):
        shapes = {key: shape for key, (shape, _) in listed[name].items()}
        stem = "deep" if shapes["resnet_bn1.weight"] == [128] else "plain"
        stride = strides[listed[f"conv_geometry_{name}"]["ASPP.convs.1.0"][1][0]]
        num_classes = shapes["classifier.3.bias"][0]
        configs[name] = ModelConfig(num_classes, backbone_of(shapes), stem, output_stride=stride, pretrained=False)
    return configs


def listed_keys(path: Path, name: str) -> Shapes:
    """Read key -> shape of one network of a `net_keys.json.gz`."""
    return {key: tuple(shape) for key, (shape, _) in read_json(path)[name].items()}


def check_listed_networks(path: Path, build: Callable[[ModelConfig, int], nn.Module]) -> None:
    """Compare keys, strides, dilations and paddings of every segmentation network in the file."""
    configs = listed_networks(path)
    assert configs
    for name, config in configs.items():
        theirs = listed_keys(path, name)
        dims = theirs["representation.3.bias"][0]
        network = outline(partial(build, config, dims))
        assert prcl_css_keys(network.segmenter, network.representation) == theirs
        assert conv_geometry(network.segmenter) == read_json(path)[f"conv_geometry_{name}"]


def load_filled(segmenter: nn.Module, representation: nn.Module) -> None:
    """Load the weights of the goldens, under official names, into a segmenter and its representation head."""
    state, head = fill(prcl_css_keys(segmenter, representation)), "representation."
    load_state(segmenter, deeplab_from_prcl_css(state), "the golden's rule", "the segmenter")
    representation.load_state_dict({k.removeprefix(head): v for k, v in state.items() if k.startswith(head)})


def catch_stages(segmenter: nn.Module) -> Caught:
    """Catch the outputs of the segmenter's stages, by the names of the goldens."""
    stages = {name: segmenter.encoder[name] for name in ("maxpool", "layer1", "layer2", "layer3", "layer4")}
    return Caught(aspp=segmenter.aspp, **stages)


def fill(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Draw weights by the rule of the PRCL, CSS and UniMatch goldens, seeded by the rank of the sorted key."""
    return {key: _fill_one(index, key, tuple(shapes[key])) for index, key in enumerate(sorted(shapes))}


def _fill_one(index: int, key: str, shape: tuple[int, ...]) -> Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    noise = np.random.RandomState(index).standard_normal(shape)
    if key.endswith(("pos_embed", "cls_token")):
        value = 0.5 * noise
    elif len(shape) >= 2:
        value = noise * math.sqrt(1 / math.prod(shape[1:]))
    elif key.endswith("running_var"):
        value = 1 + np.abs(0.02 * noise)
    elif key.endswith(("running_mean", "bias")) or key == "beta":
        value = 0.02 * noise
    else:
        value = 1 + 0.02 * noise
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


# ---- CAC, CPS, CPCL


def read_keys(path: Path) -> Shapes:
    """Read key -> shape of a golden that lists (key, shape, type)."""
    return {key: tuple(shape) for key, shape, _ in read_json(path)}


def fill_small(shapes: Mapping[str, Sequence[int]], offset: int = 0) -> dict[str, Tensor]:
    """Draw weights by the rule of the CAC, CPS and CPCL goldens: deviation 0.02, seeded by the sorted key's rank."""
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


def v3plus(num_classes: int, backbone: str) -> ModelConfig:
    """Configure the DeepLabV3+ of CAC, and of CPS in the code of CAC."""
    return ModelConfig(num_classes, backbone, head="v3plus_cac", pretrained=False)


def v3plus_cps(num_classes: int, backbone: str) -> ModelConfig:
    """Configure the DeepLabV3+ of the original CPS and of CPCL."""
    return ModelConfig(num_classes, backbone, "deep", "v3plus_cps", pretrained=False)


def upsampled(network: nn.Module, image: Tensor) -> Tensor:
    logits = network(image)
    return nn.functional.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=network.align_corners)


def two_branches(network: TwoNetworks, names: Mapping[str, str]) -> Shapes:
    """Derive the official key list of both networks."""
    return official_keys(network.first, names, "branch1.") | official_keys(network.second, names, "branch2.")


def load_branches(network: TwoNetworks, state: dict[str, Tensor], path: Path) -> None:
    for number, one in ((1, network.first), (2, network.second)):
        load_state(one, deeplab_from_cps(state, number), path.name, f"network {number}")
