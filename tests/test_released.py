"""Checkpoints in the formats of seven repositories: evaluated, converted to runs, and used without the original."""

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor

from common.config.sections import ModelConfig
from common.evaluation.cli import main_eval
from common.evaluation.metainfo import read_metainfo
from common.evaluation.networks import PaperNetworks
from common.models import build_network
from common.models.weights import UNREACHED, read_state
from common.predict import main as predict_main
from common.released.weights import CAC, CPS, MEMORY_BANK, PRCL_CSS, UNIMATCH, UNIMATCH_V2
from memory_bank.eval import RELEASE
from tests.conftest import ROOT


@dataclass(frozen=True)
class ReleaseFormat:
    """Checkpoint format of one repository.

    Attributes:
        names: Key prefixes of the release -> those of this project.
        heads: Weights without a counterpart in this project.
    """

    paper: str
    model: dict[str, Any]
    names: Mapping[str, str]
    file: Any
    heads: tuple[str, ...] = ()
    before: tuple[str, ...] = ("",)
    second: dict[str, Any] = field(default_factory=dict)


NOTHING = {"epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}}
FORMATS = {
    "prcl": ReleaseFormat(
        "prcl", {"head": "v3plus"}, PRCL_CSS,
        lambda state: NOTHING | {"model": other(state), "ema": state, "uncer_head": {"gamma": torch.ones(1)}},
        ("representation.3.bias",),
    ),
    "css": ReleaseFormat(
        "css", {"head": "v3plus", "output_stride": 8, "stem": "deep"}, PRCL_CSS,
        lambda state: NOTHING
        | {"model": other(state), "ema_model": state, "prototypes": np.ones((21, 256), np.float32)},
        ("representation.3.bias",),
    ),
    "cac": ReleaseFormat(
        "cac_cps", {"head": "v3plus_cac"}, CAC,
        lambda state: {"arch": "DDP", "epoch": 3, "monitor_best": np.float64(0.7), "state_dict": state, "config": {}},
        ("module.project.0.bias",), ("module.",),
    ),
    "cps": ReleaseFormat(
        "cac_cps", {"head": "v3plus_cps", "stem": "deep"}, CPS,
        lambda state: NOTHING | {"model": state, "iteration": 9}, (), ("branch1.", "branch2."),
    ),
    "cpcl": ReleaseFormat(
        "cpcl", {"head": "v3plus_cps", "stem": "deep"}, CPS,
        lambda state: NOTHING | {"model": state}, (), ("module.branch1.", "module.branch2."),
    ),
    "memory_bank": ReleaseFormat(
        "memory_bank", {"head": "v3plus_memory_bank"}, MEMORY_BANK,
        lambda state: {"iteration": 9, "model": state, "optimizer": {}}, ("projection_head.0.bias",),
    ),
    "unimatch": ReleaseFormat(
        "unimatch", {"head": "v3plus_unimatch", "stem": "deep"}, UNIMATCH,
        lambda state: NOTHING | {"model": state, "previous_best": 70.0}, (), ("module.",),
    ),
}  # fmt: skip


def other(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that are not to be evaluated."""
    return {key: torch.zeros_like(value) for key, value in state.items()}


def published(form: ReleaseFormat, networks: list[torch.nn.Module]) -> dict[str, Tensor]:
    """State dict of the networks with the released names and the released order of the decoder's channels."""
    state = {}
    for before, network in zip(form.before, networks):
        for key, value in network.state_dict().items():
            official, own = next((official, own) for official, own in form.names.items() if key.startswith(own))
            if key == "decoder.0.weight" and form.names is not UNIMATCH:
                value = torch.cat([value[:, 48:], value[:, :48]], dim=1)
            state[before + official + key.removeprefix(own)] = value
    return state | {head: torch.zeros(4) for head in form.heads}


def write_released(name: str, path: Path, num_classes: int = 21) -> list[torch.nn.Module]:
    form = FORMATS[name]
    torch.manual_seed(0)
    model = ModelConfig(num_classes, "resnet18", channels=8, pretrained=False, **form.model)
    networks = [build_network(model) for _ in form.before]
    torch.save(form.file(published(form, networks)), path)
    return networks


def evaluate(paper: str, *arguments: object) -> None:
    """As `python <paper>/eval.py` does."""
    module = importlib.import_module(f"{paper}.eval")
    options = {name: getattr(module, name) for name in ("protocol_of",) if hasattr(module, name)}
    second = {"second": "second"} if paper in ("cac_cps", "cpcl") else {}
    main_eval(paper, module.Config, [*map(str, arguments)], release=module.RELEASE, **options, **second)
    AcceleratorState._reset_state(reset_partial_state=True)


def small_config(name: str, shapes_root: Path, path: Path) -> Path:
    """The paper's demo config for its network of one's own and the built-in data."""
    form = FORMATS[name]
    content = json.loads((ROOT / form.paper / "configs" / "demo.json").read_text())
    content["data"] |= {"root": str(shapes_root), "split": str(shapes_root / "splits" / "6" / "0"), "workers": 0}
    content["model"] |= {"channels": 8, "output_stride": 16} | form.model
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_written_as_ours_and_used_without_the_original(name, tmp_path, capsys):
    paper, file, run = FORMATS[name].paper, tmp_path / "original.pth", tmp_path / "run"
    networks = write_released(name, file)
    evaluate(paper, "-e", file, "--convert", run)
    output = capsys.readouterr().out
    assert f"note: no --config given; using {paper}/configs/" in output and "unused in" in output
    assert all(head.split(".")[-3] in output for head in FORMATS[name].heads)
    file.unlink()
    written = read_state(run / "checkpoints" / "last" / "model.safetensors")
    want = networks[0].state_dict()
    assert written.keys() == want.keys() and all(torch.equal(written[key], want[key]) for key in want)
    if len(networks) == 2:
        extra = read_state(run / "checkpoints" / "last" / "extra.safetensors")
        assert torch.equal(extra["second/low.0.weight"], networks[1].state_dict()["low.0.weight"])
    metainfo = read_metainfo(run, 21)
    assert metainfo.classes[15] == "person" and (metainfo.protocol.crop is None) == (
        "v3plus_cps" not in FORMATS[name].model["head"]
    )
    Image.new("RGB", (40, 30)).save(tmp_path / "image.png")
    predict_main([str(run), str(tmp_path / "image.png"), "--out", str(tmp_path / "out"), "-d", "cpu", "--whole"])
    assert (tmp_path / "out" / "mask" / "image.png").exists()
    with pytest.raises(SystemExit):
        evaluate(paper, "-e", tmp_path / "image.png", "--convert", run)


@pytest.mark.parametrize("name", FORMATS)
def test_evaluated_as_it_is(name, shapes_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_released(name, tmp_path / "original.pth", num_classes=7)
    config = small_config(name, shapes_root, tmp_path / "small.json")
    paper = FORMATS[name].paper
    evaluate(paper, "-e", tmp_path / "original.pth", "--config", config, "-d", "cpu")
    assert "unused in" in capsys.readouterr().out
    (scores,) = tmp_path.glob(f"runs/{paper}/*/eval/*.json")
    # The same by way of a run of this project.
    evaluate(paper, "-e", tmp_path / "original.pth", "--config", config, "--convert", tmp_path / "own")
    evaluate(paper, tmp_path / "own", "-d", "cpu")
    again = json.loads((tmp_path / "own" / "eval" / "last.json").read_text())
    assert again["per_class_iou"] == json.loads(scores.read_text())["per_class_iou"]


class Runs:
    """Unpickling it would call print."""

    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("name", ["prcl", "cpcl", "memory_bank"])
def test_what_cannot_be_converted_is_reported(name, tmp_path, capsys):
    file, paper = tmp_path / "original.pth", FORMATS[name].paper

    def refused(words: str, *arguments: object) -> None:
        with pytest.raises(SystemExit) as ended:
            evaluate(paper, *arguments)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and re.search(words, error) and len(error.splitlines()) <= 2, error

    refused("goes with -e FILE", "-e", "last", "--convert", tmp_path / "run")
    torch.save({"model": {"weight": torch.zeros(1)}, "callback": Runs()}, file)
    refused(r"original\.pth: refused, .* print", "-e", file, "--convert", tmp_path / "run")
    torch.save({"model": {"weight": torch.zeros(1)}}, file)
    refused(r"original\.pth: not a published network", "-e", file, "--convert", tmp_path / "run")
    write_released(name, file, num_classes=7)
    refused("7 classes .* give one with --config", "-e", file, "--convert", tmp_path / "run")
    write_released(name, file)
    refused("is not empty", "-e", file, "--convert", tmp_path)
    assert "executed" not in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_files_of_unimatch_v2_hold_teacher_and_student(tmp_path):
    model = ModelConfig(21, "vit_small_patch14_dinov2", head="dpt", pretrained=False)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in build_network(model).state_dict().items()}
    names = {own: official for official, own in UNIMATCH_V2.items()}
    file = tmp_path / "best.pth"

    def state(value: float) -> dict[str, Tensor]:
        official = {}
        for key, shape in shapes.items():
            own = next(own for own in names if key.startswith(own))
            official["module." + names[own] + key.removeprefix(own)] = torch.full(shape, value)
        return official | {"module.backbone.mask_token": torch.zeros(1, 384)}

    torch.save(NOTHING | {"model": state(1.0), "model_ema": state(2.0), "best_epoch_ema": 3}, file)
    release = importlib.import_module("unimatch.released").RELEASE
    networks = PaperNetworks(None, ("student", "teacher"), release)
    for name, value in ((None, 2.0), ("teacher", 2.0), ("student", 1.0)):
        read = networks.read(file, name)
        assert read.keys() == shapes.keys()
        assert all((values == value).all() for values in read.values())
    assert "mask_token" in release.unused(file)
    config, path = release.infer_config(importlib.import_module("unimatch.config").Config, file)
    assert (config.model.backbone, config.model.head) == (model.backbone, "dpt")
    assert path == "unimatch/configs/pascal_unimatch_v2_dinov2_base.json"


def test_classifiers_that_are_never_reached_are_named(tmp_path):
    network = build_network(ModelConfig(21, "resnet18", head="v2", output_stride=8, pretrained=False))
    form = ReleaseFormat("memory_bank", {}, MEMORY_BANK, None)
    state = published(form, [network]) | {f"{prefix}weight": torch.zeros(1) for prefix in UNREACHED}
    torch.save({"model": state, "iteration": 9}, tmp_path / "original.pth")
    assert RELEASE.unused(tmp_path / "original.pth") == (
        "iteration, layer5.conv2d_list.2.* (1 weights), layer5.conv2d_list.3.* (1 weights)"
    )
