"""Networks: shapes, dilations, sizes, names of heads, weights from files."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.config import parse
from common.config.sections import ModelConfig
from common.engine.run_folder import check_folder, open_folder
from common.errors import UserError
from common.models import DeepLabV3Plus, build_network
from common.models import resnet as resnet_module
from common.models.deeplab import conv_head
from common.models.weights import load_state, read_state
from common.released.weights import deeplab_from_prcl_css
from supervised.train import Config


def model_config(**changes) -> ModelConfig:
    return ModelConfig(**({"num_classes": 5, "backbone": "resnet18", "pretrained": False} | changes))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def encoder_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return build_network(model_config()).encoder.state_dict()


@pytest.mark.parametrize(
    ("stem", "output_stride", "size", "low", "high"),
    [
        ("plain", 16, 64, 16, 4),
        ("plain", 8, 64, 16, 8),
        ("plain", 16, 65, 17, 5),
        ("deep", 16, 65, 17, 9),
        ("deep", 8, 64, 17, 9),  # the deep stem's pool rounds up: an even input gives one pixel more
    ],
)
def test_shapes(stem: str, output_stride: int, size: int, low: int, high: int) -> None:
    network = build_network(model_config(stem=stem, output_stride=output_stride)).eval()
    image = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert [tuple(feature.shape) for feature in network.encoder(image)] == [
            (2, 64, low, low),
            (2, 512, high, high),
        ]
        feature = network.features(image)
        logits = network(image)
        assert feature.shape == (2, network.feature_channels, low, low)
        assert network.feature_channels == 304
        assert logits.shape == (2, 5, low, low)
        assert torch.equal(network.classifier(feature), logits)


def test_features_are_low_level_first() -> None:
    network = build_network(model_config()).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        low = network.low(network.encoder(image)[0])
        assert torch.equal(network.features(image)[:, :48], low)


@pytest.mark.parametrize("backbone", ["resnet34", "resnet50", "resnet152"])
def test_other_depths(backbone: str) -> None:
    with torch.device("meta"):
        network = build_network(model_config(backbone=backbone)).eval()
    assert network(torch.empty(1, 3, 65, 65, device="meta")).shape == (1, 5, 17, 17)


def dilations(network: DeepLabV3Plus, stage: str) -> list[int]:
    return [block.conv2.dilation[0] for block in network.encoder[stage]]


@pytest.mark.parametrize(
    ("stem", "output_stride", "layer3", "layer4", "rates"),
    [
        ("plain", 16, [1, 1, 1, 1, 1, 1], [1, 2, 2], [6, 12, 18]),
        ("plain", 8, [1, 2, 2, 2, 2, 2], [2, 4, 4], [12, 24, 36]),
        ("deep", 16, [1, 2, 2, 2, 2, 2], [2, 2, 2], [6, 12, 18]),
        ("deep", 8, [2, 2, 2, 2, 2, 2], [4, 4, 4], [12, 24, 36]),
    ],
)
def test_dilations(stem: str, output_stride: int, layer3: list[int], layer4: list[int], rates: list[int]) -> None:
    with torch.device("meta"):
        network = build_network(model_config(backbone="resnet50", stem=stem, output_stride=output_stride))
    assert dilations(network, "layer3") == layer3
    assert dilations(network, "layer4") == layer4
    assert [branch[0].dilation[0] for branch in network.aspp.branches[1:]] == rates


@pytest.mark.parametrize(
    ("head", "aspp", "decoder", "classifier"),
    [
        ("v3plus", 0, None, 0),
        ("v3plus_cac", 0.5, 0.5, 0.1),
        ("v3plus_cps", 0, 0, 0),
        ("v3plus_memory_bank", 0.5, 0, 0.1),
    ],
)
def test_dropout_of_the_variants(head: str, aspp: float, decoder: float | None, classifier: float) -> None:
    def dropout(module: nn.Module) -> float:
        return sum(part.p for part in module.modules() if isinstance(part, nn.Dropout))

    with torch.device("meta"):
        network = build_network(model_config(head=head, channels=8))
    assert (dropout(network.aspp), dropout(network.classifier)) == (aspp, classifier)
    assert dropout(network.decoder) == (decoder or 0)
    assert isinstance(network.decoder, nn.Identity) == (decoder is None)
    assert network.feature_channels == (56 if decoder is None else 8)
    assert network.features(torch.empty(2, 3, 33, 33, device="meta")).shape == (2, network.feature_channels, 9, 9)


FORMER = [
    ("short", "v3plus"),
    ("deeplab", "v3plus_cac"),
    ("cps", "v3plus_cps"),
    ("v3", "v3plus_memory_bank"),
    ("v2", "v2"),
    ("v2_coco", "v2_coco"),
]


@pytest.mark.parametrize(("former", "head"), FORMER)
def test_former_words_for_heads_are_accepted(tmp_path, former: str, head: str) -> None:
    def config_with(word: str) -> Config:
        arguments = ["--config", "supervised/configs/demo.json", "--model.head", word, "--run.dir", str(tmp_path)]
        return parse(Config, "supervised/train.py", arguments)

    config = config_with(former)
    assert config.model.head == head and config == config_with(head)
    open_folder(tmp_path, "supervised/train.py", config)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model"]["head"] == head
    stored["model"]["head"] = former
    (tmp_path / "config.json").write_text(json.dumps(stored))
    check_folder(tmp_path, "supervised/train.py", config)  # the run that the former word started goes on
    other = config_with("v2" if head == "v3plus" else "v3plus")
    with pytest.raises(UserError, match=rf"another config: model\.head \({head} there, {other.model.head} now\)"):
        check_folder(tmp_path, "supervised/train.py", other)


def test_size_of_the_papers_network() -> None:
    # The published network of PRCL and CSS, representation head included: 59.52 M parameters in 343 tensors, 682 with
    # the buffers.
    with torch.device("meta"):
        network = build_network(model_config(backbone="resnet101", num_classes=21))
        representation = conv_head(network.feature_channels, 256, 256)
    assert count(network) == 58_753_973
    assert count(network) + count(representation) == 59_520_693
    assert len(list(network.parameters())) + len(list(representation.parameters())) == 343
    assert len(network.state_dict()) + len(representation.state_dict()) == 682


def test_seed_decides_the_weights() -> None:
    def build(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build_network(model_config()).state_dict()

    one, same, other = build(3), build(3), build(4)
    assert all(torch.equal(one[key], same[key]) for key in one)
    for key in ("encoder.conv1.weight", "aspp.project.0.weight", "classifier.3.bias"):
        assert not torch.equal(one[key], other[key])


def test_every_parameter_gets_a_gradient() -> None:
    network = build_network(model_config(stem="deep"))
    network(torch.randn(2, 3, 33, 33)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_torch_file(tmp_path, encoder_state, wrapper) -> None:
    state = encoder_state | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}  # as old files
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "backbone.pth")
    network = build_network(model_config(pretrained=str(tmp_path / "backbone.pth")))
    assert all(torch.equal(value, encoder_state[key]) for key, value in network.encoder.state_dict().items())


def test_safetensors_file(tmp_path, encoder_state) -> None:
    save_file(encoder_state, tmp_path / "backbone.safetensors")
    network = build_network(model_config(pretrained=str(tmp_path / "backbone.safetensors"), output_stride=8))
    assert all(torch.equal(value, encoder_state[key]) for key, value in network.encoder.state_dict().items())


def test_deep_stem_file(tmp_path) -> None:
    state = build_network(model_config(stem="deep")).encoder.state_dict()
    assert {f"conv1.{index}.weight" for index in (0, 1, 3, 4, 6)} <= set(state)
    assert state["bn1.weight"].shape == (128,)
    torch.save(state, tmp_path / "deep.pth")
    network = build_network(model_config(stem="deep", pretrained=str(tmp_path / "deep.pth")))
    assert torch.equal(network.encoder.state_dict()["conv1.6.weight"], state["conv1.6.weight"])
    with pytest.raises(
        UserError,
        match=r"deep\.pth does not fit resnet18 with the plain stem: the file holds a .*deep stem",
    ):
        build_network(model_config(pretrained=str(tmp_path / "deep.pth")))


@pytest.mark.parametrize(
    ("head", "num_classes", "unused"), [("v2_coco", 5, ""), ("v2", 7, ", the classifiers of 5 classes")]
)
def test_a_whole_deeplab_v2_from_coco(tmp_path, capsys, head: str, num_classes: int, unused: str) -> None:
    published = build_network(model_config(head="v2_coco", output_stride=8))
    state = published.encoder.state_dict()
    branches = {f"layer5.conv2d_list.{key}": value for key, value in published.classifier.branches.state_dict().items()}
    unreached = {key.replace("list.1", "list.3"): value for key, value in branches.items() if ".1." in key}
    torch.save(state | branches | unreached, tmp_path / "coco.pth")
    config = model_config(head=head, output_stride=8, num_classes=num_classes, pretrained=str(tmp_path / "coco.pth"))
    network = build_network(config)
    assert all(torch.equal(value, state[key]) for key, value in network.encoder.state_dict().items())
    same = [torch.equal(a, b) for a, b in zip(network.classifier.parameters(), published.classifier.parameters())]
    assert same == [not unused] * 4
    expected = f"coco.pth: layer5.conv2d_list.3.weight, layer5.conv2d_list.3.bias{unused}\n"
    assert capsys.readouterr().out.endswith(expected)


def test_unused_weights_of_a_backbone_are_named(tmp_path, encoder_state, capsys) -> None:
    torch.save({f"module.{k}": v for k, v in encoder_state.items()} | {"fc.bias": torch.zeros(9)}, tmp_path / "a.pth")
    build_network(model_config(pretrained=str(tmp_path / "a.pth")))
    printed = capsys.readouterr().out
    assert "unused weights in model.pretrained" in printed and printed.endswith("a.pth: fc.bias\n")


def test_file_that_does_not_fit_is_refused(tmp_path, encoder_state) -> None:
    path = tmp_path / "backbone.pth"
    torch.save(encoder_state, path)
    with pytest.raises(UserError, match=r"does not fit resnet34 .*: the file holds a resnet18"):
        build_network(model_config(backbone="resnet34", pretrained=str(path)))
    torch.save(encoder_state | {"extra.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"unexpected: extra\.weight"):
        build_network(model_config(pretrained=str(path)))
    torch.save(encoder_state | {"bn1.weight": torch.zeros(32)}, path)
    with pytest.raises(UserError, match=r"wrong shape: bn1\.weight \[32\] instead of \[64\]"):
        build_network(model_config(pretrained=str(path)))


class Runs:
    """Unpickling it would call print."""

    def __reduce__(self):
        return print, ("executed",)


def test_file_with_code_is_refused(tmp_path, capsys) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"weight": torch.zeros(1), "more": Runs()}, path)
    with pytest.raises(UserError, match=r"evil\.pth: refused, .* print"):
        read_state(path)
    path.write_bytes(pickle.dumps(Runs(), protocol=2))
    with pytest.raises(UserError, match=r"evil\.pth"):
        read_state(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["damaged.pth", "damaged.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut short"])
def test_damaged_file(tmp_path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        read_state(tmp_path / name)


def test_absent_file_and_no_state_dict(tmp_path) -> None:
    with pytest.raises(UserError, match=r"absent\.pth: there is no such file"):
        build_network(model_config(pretrained=str(tmp_path / "absent.pth")))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list\.pth: the file holds no state dict"):
        read_state(tmp_path / "list.pth")


def test_unknown_values_are_named() -> None:
    with pytest.raises(UserError, match=r"model\.backbone resnet99 is not a timm network; did you mean resnet50\?"):
        build_network(model_config(backbone="resnet99"))
    with pytest.raises(UserError, match=r"model\.stem is 'wide' with model\.output_stride 16"):
        build_network(model_config(stem="wide"))
    with pytest.raises(UserError, match=r"model\.output_stride 32"):
        build_network(model_config(stem="deep", output_stride=32))


def test_download_that_fails_names_the_way_out(monkeypatch) -> None:
    def no_network(*args, **kwargs):
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(resnet_module.timm, "create_model", no_network)
    with pytest.raises(
        UserError, match=r"resnet18\.tv_in1k could not be downloaded \(no route to host\); set model\.pre"
    ):
        build_network(model_config(pretrained=True))
    with pytest.raises(UserError, match=r"no ImageNet weights to download for resnet18 with model\.stem 'deep'"):
        build_network(model_config(pretrained=True, stem="deep"))


def test_published_prcl_and_css_keys() -> None:
    ours = build_network(model_config()).state_dict()
    published = {
        "resnet_layer1.0.conv1.weight": "encoder.layer1.0.conv1.weight",
        "ASPP.convs.3.0.weight": "aspp.branches.3.0.weight",
        "ASPP.convs.4.1.weight": "aspp.pooled.1.weight",
        "ASPP.project.1.running_mean": "aspp.project.1.running_mean",
        "project.0.weight": "low.0.weight",
        "classifier.3.bias": "classifier.3.bias",
    }
    state = {theirs: ours[own] for theirs, own in published.items()} | {"representation.3.bias": torch.zeros(256)}
    converted = deeplab_from_prcl_css(state)
    assert set(converted) == set(published.values())
    assert all(converted[own] is state[theirs] for theirs, own in published.items())
    with pytest.raises(UserError, match=r"not encoder\.backbone\.conv1\.weight"):
        deeplab_from_prcl_css({"encoder.backbone.conv1.weight": torch.zeros(1)})


def test_load_state_names_source_and_target() -> None:
    with pytest.raises(UserError, match=r"file a does not fit network b; missing: weight, bias; unexpected: scale"):
        load_state(nn.Linear(2, 2), {"scale": torch.zeros(1)}, "file a", "network b")
