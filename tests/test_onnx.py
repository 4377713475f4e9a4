"""Networks as .onnx files: run by onnxruntime, they predict what the trained network does."""

import builtins
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from common.config.sections import ModelConfig
from common.errors import UserError
from common.evaluation import export
from common.evaluation.export import MIN_SIDE, OPSET, Deployed, export_network
from common.evaluation.inference import Protocol
from common.evaluation.metainfo import default_metainfo
from common.models import build_network
from tests.helpers.narrow import NARROW

CLASSES = 5
NETWORKS = {
    "deeplab": (ModelConfig(CLASSES, NARROW, channels=8, pretrained=False), Protocol(multiple=8)),
    "efficientnet": (ModelConfig(CLASSES, "test_efficientnet", channels=8, pretrained=False), Protocol(reduce=2)),
    # A plain ViT: positions are resampled, and images resized to multiples of its patch.
    "vit_dpt": (ModelConfig(CLASSES, "test_vit2", head="dpt", pretrained=False), Protocol(multiple=14, fit="resize")),
}
SIZES = ((1, 3, MIN_SIDE, MIN_SIDE), (2, 3, 81, 95), (3, 3, 101, 160), (1, 3, 128, 97))


def network_of(model: ModelConfig) -> nn.Module:
    """Random network whose predictions are as sharp as those of a trained one."""
    torch.manual_seed(0)
    network = build_network(model).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        image = torch.randn(1, 3, 96, 96)
        last = [module for module in network.classifier.modules() if isinstance(module, nn.Conv2d)][-1]
        last.bias = nn.Parameter(torch.zeros(CLASSES))
        logits = network(image)
        last.weight *= (scale := 3 / logits.std((2, 3)).mean())
        last.bias -= scale * logits.mean((0, 2, 3))
    return network


@pytest.mark.parametrize(("name", "half"), [*((name, False) for name in NETWORKS), ("deeplab", True)])
def test_onnx_predicts_what_the_network_does(name, half, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, protocol = NETWORKS[name]
    network, file = network_of(model), tmp_path / "network.onnx"
    export_network(network, replace(default_metainfo(CLASSES), protocol=protocol), file, half)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape) == ("image", "tensor(uint8)", ["batch", 3, "height", "width"])
    assert (given.name, given.type, given.shape[1]) == ("probability", "tensor(float)", CLASSES)
    content = json.loads(session.get_modelmeta().custom_metadata_map["metainfo.json"])
    assert content["classes"] == list(default_metainfo(CLASSES).classes)
    assert content["protocol"] == protocol.describe()
    assert onnx.load(file).opset_import[0].version == OPSET
    for size in SIZES:
        image = torch.randint(0, 256, size, dtype=torch.uint8)
        (found,) = session.run(None, {"image": image.numpy()})
        expected = Deployed(network, protocol)(image).numpy()
        assert expected.max(1).std() > 0.05  # not the same everywhere
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2 if half else 1e-4)


def test_half_precision_for_pytorch(tmp_path):
    network, file = network_of(NETWORKS["deeplab"][0]), tmp_path / "half.pt2"
    export_network(network, default_metainfo(CLASSES), file, half=True)
    program, image = torch.export.load(file), torch.randint(0, 256, (1, 3, 97, 88), dtype=torch.uint8)
    dtypes = {weight.dtype for name, weight in program.state_dict.items() if "num_batches" not in name}
    assert dtypes == {torch.float16}
    assert all(weight.dtype == torch.float32 for weight in network.parameters())
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image), Deployed(network, Protocol())(image), rtol=0, atol=2e-2)


def test_a_different_onnx_program_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "_run_onnx", lambda data, image: np.zeros((1, CLASSES, *image.shape[-2:]), np.float32))
    with pytest.raises(UserError, match="not the trained one"):
        export_network(network_of(NETWORKS["deeplab"][0]), default_metainfo(CLASSES), tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name != "onnx" else builtins)
    with pytest.raises(UserError, match=r"needs onnxscript, onnxruntime: pip install -e '\.\[onnx\]'"):
        export_network(nn.Identity(), default_metainfo(CLASSES), tmp_path / "network.onnx")


def test_networks_above_the_limit_of_the_format_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: builtins)
    with torch.device("meta"):
        network = nn.Linear(2**15, 2**14)
    with pytest.raises(UserError, match=r"has 2\.0 GB, but an \.onnx file at most 2: use --half"):
        export_network(network, default_metainfo(CLASSES), tmp_path / "network.onnx")
