"""Compare DINOv2 with the DPT head with the outputs of the released UniMatch V2, file by file."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import Golden, close, read
from torch import Tensor
from torch.nn import functional as F

from common.config.sections import ModelConfig
from common.models import Segmenter, build_network

SAME = {"rtol": 1e-4, "atol": 1e-5}
RENAMED = (
    (r"^backbone\.", "encoder.body."),
    (r"^head\.projects\.", "decoder.projects."),
    (r"^head\.resize_layers\.", "decoder.resizes."),
    (r"^head\.scratch\.output_conv\.", "classifier."),
    (r"resConfUnit1", "skip_unit"),
    (r"resConfUnit2", "unit"),
    (r"out_conv", "out"),
)
NUMBERED = ((r"^head\.scratch\.layer(\d)_rn", "layers"), (r"^head\.scratch\.refinenet(\d)", "fusions"))


def our_name(key: str) -> str | None:
    """Our name of a released weight; None for those that the released forward never uses."""
    if key == "backbone.mask_token" or ".refinenet4.resConfUnit1." in key:
        return None
    for pattern, name in NUMBERED:
        key = re.sub(pattern, lambda found, name=name: f"decoder.{name}.{int(found[1]) - 1}", key)
    for pattern, name in RENAMED:
        key = re.sub(pattern, name, key)
    return key


def filled(index: int, key: str, shape: list[int]) -> Tensor:
    """The weight at `index` of the sorted names."""
    values = np.random.RandomState(index).standard_normal(shape)
    if key.endswith(("pos_embed", "cls_token")):
        values = 0.5 * values
    elif len(shape) >= 2:
        values = values * np.sqrt(1 / np.prod(shape[1:]))
    elif key.endswith("bias"):
        values = 0.02 * values
    else:
        values = 1 + 0.02 * values
    return torch.tensor(values, dtype=torch.float32)


def network_of(folder: Path, size: str, num_classes: int, prefix: str = "") -> Segmenter:
    """Our network with the released weights; those with another prefix keep their initial values."""
    listed = json.loads(gzip.decompress((folder / "net_dpt_keys.json.gz").read_bytes()))[f"{size}_21"]
    shapes = {key.removeprefix(prefix): list(entry[0]) for key, entry in listed.items() if key.startswith(prefix)}
    backbone = f"vit_{size}_patch14_dinov2"
    model = ModelConfig(num_classes, backbone, head="dpt", pretrained=False, dinov2_positions=True)
    network = build_network(model).eval()
    state = {}
    for index, key in enumerate(sorted(shapes)):
        shape = [num_classes, *shapes[key][1:]] if "output_conv.2" in key else shapes[key]
        if name := our_name(prefix + key):
            state[name] = filled(index, key, shape)
    given = network.load_state_dict(state, strict=False)
    assert not given.unexpected_keys
    assert all(prefix and key.startswith("encoder.") for key in given.missing_keys)
    return network


def check_head(path: Path, g: Golden) -> None:
    network = network_of(path.parent, path.stem.split("_")[-1], int(g["num_classes"]), "head.")
    grid = g["grid"].tolist()
    taps = [(g[f"tap{index}"].float() / 4).transpose(1, 2).unflatten(2, grid) for index in range(4)]
    logits = network.classifier(network.decode(taps))
    stride = int(g["out_stride"])
    assert list(logits.shape) == g["out_shape"].tolist()
    close(logits[:, :, ::stride, ::stride], g["out_sub"], **SAME)


def check_network(path: Path, g: Golden) -> None:
    network = network_of(path.parent, path.stem.split("_")[-2], int(g["num_classes"]))
    image = g["x_times_16"].float() / 16
    taps = network.encode(image)
    step, channels, stride = (int(g[f"{name}_stride"]) for name in ("token", "channel", "logits"))
    for index, tap in enumerate(taps):
        close(tap.flatten(2).transpose(1, 2)[:, ::step, ::channels], g[f"tap{index}_sub"], **SAME)
    logits = network.classifier(network.decode(taps))
    logits = F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=True)
    close(logits[:, :, ::stride, ::stride], g["logits_sub"], **SAME)


@torch.no_grad()
def test_golden(golden: Path) -> None:
    if golden.suffix == ".gz":
        pytest.skip("read by the other files")
    (check_head if "_head_" in golden.stem else check_network)(golden, read(golden))
