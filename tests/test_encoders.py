"""Encoders of timm: taps, heads, weights from files, learning rates, frozen and recomputed encoders, runs with them."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cac_cps.config import Config as CACConfig
from cac_cps.config import Method as CACMethod
from common.config.sections import DataConfig, ModelConfig, OptimConfig, RunConfig
from common.encoders import matching, row
from common.errors import UserError
from common.models import Segmenter, build_network
from common.models.encoders import describe_encoder, resize_to_multiple
from common.models.positions import dinov2_positions
from common.optim import build_optimizer, set_lr
from tests.conftest import ROOT, flags
from tests.helpers.commands import train
from tests.helpers.kill_runs import draw_points, kill_and_continue, run_whole

LITE = ROOT / "data" / "weights" / "tf_efficientnet_lite0.safetensors"
PLAIN, BOTH = ("dpt",), ("v3plus", "dpt")
# timm name -> strides of the taps, multiple of the sides, heads that fit. The first ones are in the default suite.
FAMILIES = {
    "tf_efficientnet_lite0": ((2, 4, 8, 16, 32), 1, BOTH),
    "swin_tiny_patch4_window7_224": ((4, 8, 16, 32), 4, BOTH),
    "vit_small_patch14_reg4_dinov2": ((14,), 14, PLAIN),
    "convnext_atto": ((4, 8, 16, 32), 1, BOTH),
    "vit_tiny_patch16_224": ((16,), 16, PLAIN),
    "resnet18": ((2, 4, 8, 16, 32), 1, BOTH),
    "seresnet50": ((2, 4, 8, 16, 32), 1, BOTH),
    "resnetv2_50": ((2, 4, 8, 16, 32), 1, BOTH),
    "regnety_016": ((2, 4, 8, 16, 32), 1, BOTH),
    "mobilenetv3_large_100": ((2, 4, 8, 16, 32), 1, BOTH),
    "tf_efficientnetv2_s": ((2, 4, 8, 16, 32), 1, BOTH),
    "swinv2_tiny_window8_256": ((4, 8, 16, 32), 4, BOTH),
    "pvt_v2_b0": ((4, 8, 16, 32), 1, BOTH),
    "hrnet_w18_small": ((2, 4, 8, 16, 32), 32, BOTH),
    "densenet121": ((2, 4, 8, 16, 32), 1, BOTH),
    "mambaout_femto": ((4, 8, 16, 32), 1, BOTH),
    "edgenext_xx_small": ((4, 8, 16, 32), 1, BOTH),
    "repvgg_a0": ((2, 4, 8, 16, 32), 1, BOTH),
    "davit_tiny": ((4, 8, 16, 32), 1, BOTH),
    "poolformer_s12": ((4, 8, 16, 32), 1, BOTH),
    "vgg11_bn": ((1, 2, 4, 8, 16, 32), 1, BOTH),
    "vit_small_patch14_dinov2": ((14,), 14, PLAIN),
    "vit_small_patch16_dinov3": ((16,), 16, PLAIN),
    "deit3_small_patch16_224": ((16,), 16, PLAIN),
    "vit_base_patch16_clip_224": ((16,), 16, PLAIN),
    "samvit_base_patch16": ((16,), 16, PLAIN),
}
FEW_FAMILIES = 3


def model_config(backbone: str, head: str = "v3plus", **changes) -> ModelConfig:
    return ModelConfig(**{"num_classes": 5, "channels": 8, "pretrained": False} | changes, backbone=backbone, head=head)


def test_families_have_the_listed_taps_and_heads(request) -> None:
    every = request.config.getoption("--every-script")
    for name in list(FAMILIES)[: None if every else FEW_FAMILIES]:
        strides, multiple, heads = FAMILIES[name]
        info = describe_encoder(name)
        assert (info.strides, info.multiple, info.heads) == (strides, multiple, heads), name
        for head in heads:
            with torch.device("meta"):
                network = build_network(model_config(name, head, output_stride=32))
                taps = network.encode(torch.empty(2, 3, 97, 130))
                feature = network.decode(taps)
            assert len(taps) == (4 if head == "dpt" else 2)
            assert feature.shape[1] == network.feature_channels
            # Sides round up or down by family, and the image is resized first where sides must be multiples.
            first = info.strides[0] if info.is_plain else 4
            assert all(
                abs(side - full / first) <= max(1, multiple / first / 2)
                for side, full in zip(taps[0].shape[-2:], (97, 130))
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone": "vit_tiny_patch16_224"},
            "has taps at stride 16, but this model.head needs .* model.head dpt fits",
        ),
        ({"backbone": "levit_128s", "output_stride": 32}, "takes images of its native size alone"),
        ({"backbone": "pvt_v2_b0"}, "cannot be dilated to model.output_stride 16; set model.output_stride to 32"),
        ({"backbone": "convnext_atto", "stem": "deep"}, "model.stem deep is for DeepLabs on resnet18"),
        ({"backbone": "convnext_atto", "head": "v2_coco"}, "is for weights of ResNets"),
        ({"backbone": "convnext_atto", "dinov2_positions": True}, "needs a ViT with a position table"),
        ({"backbone": "resnet18", "dinov2_positions": True}, "needs a ViT with a position table"),
        ({"backbone": "convnext_ato"}, "is not a timm network; did you mean convnext_atto"),
    ],
)
def test_combinations_that_do_not_fit_say_why(changes, message) -> None:
    with pytest.raises(UserError, match=message):
        build_network(model_config(**changes))


def test_dilation_where_the_family_has_it() -> None:
    with torch.device("meta"):
        low, high = build_network(model_config("convnext_atto", output_stride=8)).encode(torch.empty(1, 3, 64, 64))
    assert (low.shape[-1], high.shape[-1]) == (16, 8)


def test_the_image_reaches_the_encoder_as_its_weights_expect() -> None:
    network = build_network(model_config("tf_efficientnet_lite0"))
    black = -torch.tensor((0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225)).view(1, 3, 1, 1)
    torch.testing.assert_close(network.input(black), torch.full((1, 3, 1, 1), -1.0))
    assert isinstance(build_network(model_config("convnext_atto")).input, nn.Identity)


def test_sides_go_to_the_nearest_multiple() -> None:
    assert resize_to_multiple(torch.zeros(1, 1, 20, 22), 14).shape[-2:] == (14, 28)
    image = torch.rand(1, 1, 28, 14)
    assert resize_to_multiple(image, 14) is image


def test_positions_of_dinov2_are_those_of_the_table_at_the_native_grid() -> None:
    table = torch.rand(1, 1 + 9, 4)
    assert dinov2_positions(table, (3, 3), (3, 3)) is table
    assert dinov2_positions(table, (3, 3), (5, 4)).shape == (1, 1 + 20, 4)


def test_norms_start_at_one_from_scratch() -> None:
    network = build_network(model_config("regnety_002"))
    assert all(module.weight.any() for module in network.modules() if isinstance(module, nn.BatchNorm2d))


# ---- weights from files


def test_files_of_timm_and_of_dinov2s_makers_load_strictly(tmp_path, capsys) -> None:
    state = timm.create_model("vit_small_patch14_dinov2").state_dict()
    save_file(state | {"mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2.safetensors")
    path = str(tmp_path / "dinov2.safetensors")
    network = build_network(model_config("vit_small_patch14_dinov2", "dpt", pretrained=path))
    loaded = network.encoder.body.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)
    del state["blocks.3.mlp.fc1.bias"]
    save_file(state, path)
    with pytest.raises(UserError, match=r"does not fit .*; missing: blocks\.3\.mlp\.fc1\.bias"):
        build_network(model_config("vit_small_patch14_dinov2", "dpt", pretrained=path))


def test_unused_weights_of_a_hierarchical_encoder_are_printed(tmp_path, capsys) -> None:
    state = timm.create_model("convnext_atto").state_dict()
    path = str(tmp_path / "convnext.safetensors")
    save_file(state, path)
    network = build_network(model_config("convnext_atto", pretrained=path))
    assert torch.equal(
        network.encoder.body.state_dict()["stages_1.blocks.0.norm.weight"], state["stages.1.blocks.0.norm.weight"]
    )
    assert "unused weights" in capsys.readouterr().out
    save_file(state | {"extra.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"unexpected: extra\.weight"):
        build_network(model_config("convnext_atto", pretrained=path))


@pytest.mark.skipif(not LITE.exists(), reason="no pretrained weights")
def test_real_weights_load() -> None:
    network = build_network(model_config("tf_efficientnet_lite0", pretrained=str(LITE)))
    given = load_file(LITE)
    assert all(torch.equal(value, given[key]) for key, value in network.encoder.body.state_dict().items())


# ---- learning rates


def test_the_encoder_has_its_own_rate_and_frozen_parameters_are_left_out() -> None:
    network = build_network(model_config("resnet18"))
    (group,) = build_optimizer(OptimConfig(), network).param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in network.parameters()]
    optimizer = build_optimizer(OptimConfig(lr=0.1, encoder_lr_scale=0.1), network)
    rest, encoder = optimizer.param_groups
    assert (rest["lr"], encoder["lr"]) == (0.1, pytest.approx(0.01))
    assert len(encoder["params"]) == len(list(network.encoder.parameters()))
    set_lr(optimizer, 0.0, floor=0.05)
    assert (rest["lr"], encoder["lr"]) == (0.05, pytest.approx(0.005))
    network.freeze_encoder()
    (rest,) = build_optimizer(OptimConfig(encoder_lr_scale=0.1), network).param_groups
    assert not {id(parameter) for parameter in rest["params"]} & {id(one) for one in network.encoder.parameters()}


def test_the_former_key_of_cac_moves_to_the_shared_one() -> None:
    def config(optim: OptimConfig, method: CACMethod) -> CACConfig:
        return CACConfig(DataConfig("voc", ""), ModelConfig(21), optim, RunConfig(), method)

    assert config(OptimConfig(), CACMethod()).optim.encoder_lr_scale == 0.1
    moved = config(OptimConfig(), CACMethod(backbone_lr_scale=1.0))
    assert (moved.optim.encoder_lr_scale, moved.method.backbone_lr_scale) == (1.0, None)
    with pytest.raises(UserError, match="are one setting"):
        config(OptimConfig(encoder_lr_scale=0.5), CACMethod(backbone_lr_scale=1.0))


# ---- memory


def kept_bytes(network: Segmenter, image: Tensor) -> int:
    """Bytes of the activations that a forward keeps for its backward pass; parameters do not count."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(image)
    return sum(kept.values())


def test_frozen_and_recomputed_encoders_keep_less() -> None:
    image = torch.randn(2, 3, 64, 64)
    settings = ({}, {"grad_checkpointing": True}, {"freeze_encoder": True})
    full, recomputed, frozen = (
        kept_bytes(build_network(model_config("vit_tiny_patch16_224", "dpt", **setting)), image) for setting in settings
    )
    assert frozen < recomputed < full


def trained(**changes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State before and after two steps of a narrow network."""
    torch.manual_seed(0)
    network = build_network(model_config("tf_efficientnet_lite0", **changes)).train()
    network.hold_statistics()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = build_optimizer(OptimConfig(), network)
    for _ in range(2):
        image = torch.randn(2, 3, 32, 32)
        (network(image).square().mean() + network(2 * image).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, network.state_dict()


def test_a_frozen_encoder_stays_as_it_is() -> None:
    before, after = trained(freeze_encoder=True)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and not any(key.startswith("encoder.") for key in changed)


def test_recomputed_activations_change_no_bit() -> None:
    (_, kept), (_, recomputed) = trained(), trained(grad_checkpointing=True)
    assert all(torch.equal(kept[key], recomputed[key]) for key in kept)


# ---- runs

RUNS = {
    "convnext": {"model.backbone": "convnext_atto", "optim.encoder_lr_scale": 0.1, "model.drop_path": 0.1},
    "lite0": {"model.backbone": "tf_efficientnet_lite0", "model.pretrained": LITE},
    "vit": {
        "model.backbone": "vit_small_patch14_dinov2",
        "model.head": "dpt",
        "data.crop_size": "[56, 56]",
        "model.freeze_encoder": "true",
    },
    "resnet18": {"model.backbone": "resnet18", "model.grad_checkpointing": "true"},
}


def settings_of(script: str, name: str) -> list[str]:
    """Arguments of a run on an encoder; the demo configs of some papers state a stem or a rate of their own."""
    own = {"model.stem": "plain", "model.output_stride": 16, "optim.encoder_lr_scale": 1}
    own |= {"method.backbone_lr_scale": "null"} if script.startswith("cac_cps") else {}
    return flags(own | RUNS[name])


@pytest.mark.parametrize("name", RUNS)
def test_scripts_train_on_other_encoders(some_script, name, tiny, tmp_path, request) -> None:
    if name != "convnext" and not request.config.getoption("--every-script"):
        pytest.skip("with --every-script")
    if name == "lite0" and not LITE.exists():
        pytest.skip("no pretrained weights")
    steps = {"run.steps": 4, "run.eval_every": 4, "run.save_every": 4}
    train(some_script, tiny(some_script, *flags(steps), *settings_of(some_script, name)))
    assert (tmp_path / "run" / "checkpoints" / "last").exists()


@pytest.mark.parametrize("name", ["convnext", "resnet18"])
def test_killed_and_continued_on_another_encoder(name, tiny, tmp_path, request) -> None:
    if not request.config.getoption("--every-script"):
        pytest.skip("with --every-script")
    script = "supervised/train.py"

    def arguments(script: str, *more: str) -> list[str]:
        return tiny(script, *settings_of(script, name), *more)

    whole = run_whole(script, arguments, tmp_path)
    for point in draw_points(whole, saving=0, writing=0, step=1, seed=2):
        kill_and_continue(script, arguments, whole, point, tmp_path)


def test_the_list_of_encoders_names_heads_and_licenses() -> None:
    assert row("vit_small_patch16_dinov3")[2:] == ("dpt", "21.6 M, 86 MB", "16", "dinov3-license")
    assert "native size" in row("levit_128s")[-1]
    assert "resnet50" in matching("resnet5*")
    with pytest.raises(UserError, match="no timm network matches"):
        matching("resnett*")
