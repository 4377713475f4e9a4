"""CPS, the original and in CAC's code base, against what their released functions returned, file by file.

Every number (classes, thresholds, sizes) is read from the file. Departures of ours from the released code are named
where they are allowed for.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checks import Golden, check_crop, close, close_gradient, read
from networks import Caught, draw_input, fill_small, load_branches, read_keys, two_branches, upsampled
from torch import Tensor, nn
from torch.testing import assert_close

from cac_cps.config import Config, Method
from cac_cps.losses import cross_pseudo_loss, pseudo_label
from cac_cps.training import CPS_OHEM, make_optimizer
from common import IGNORE
from common.augment import ScaleChoiceCrop, draw_cutmix_box_masks, mix
from common.config.sections import DataConfig, ModelConfig, OptimConfig, RunConfig
from common.evaluation.inference import Protocol, sum_logits
from common.loaders import StepSampler
from common.losses import cross_entropy, ohem_cross_entropy
from common.metrics import ConfusionMatrix
from common.models.two_networks import TwoNetworks, predict_mixture
from common.optim import poly
from common.released.weights import CPS, CPS_IN_CAC


def test_golden(golden: Path) -> None:
    adapter_of(golden.name)(golden)


def test_every_adapter_has_a_golden_of_our_own() -> None:
    names = [path.name for path in (Path(__file__).parent / "goldens" / "cps").iterdir()]
    assert {prefix for prefix in ADAPTERS if not any(name.startswith(prefix) for name in names)} == set()


def adapter_of(name: str) -> Callable[[Path], None]:
    """The check that belongs to a file name."""
    for prefix, adapter in ADAPTERS.items():
        if name.startswith(prefix):
            return adapter
    pytest.fail(f"no adapter for {name}: its prefix is none of {', '.join(ADAPTERS)}")


# ---- a training step of two convolutions


def check_step(path: Path) -> None:
    g = read(path)
    networks = [convolution(g, number) for number in (1, 2)]
    label = g["target"].long()
    labeled = [network(g["x"]) for network in networks]
    if "mask" in g and "mixed" in g:
        logits, labels = cutmix_predictions(networks, g)
    else:
        logits = [torch.cat([own, network(g["u0"])]) for own, network in zip(labeled, networks)]
        labels = [pseudo_label(both) for both in logits]
    for number, ours in enumerate(labels, start=1):
        assert_close(ours, g[f"pseudo{number}"].long())
    supervised = [supervised_loss(own, label, g) for own in labeled]
    cps = float(g["cps_weight"]) * cross_pseudo_loss(*logits, *labels)
    total = supervised[0] + supervised[1] + cps
    for ours, name in zip((*supervised, cps), ("loss_sup", "loss_sup_r", "cps_loss_weighted")):
        close(ours, g[name].nan_to_num(0.0), rtol=1e-4, atol=1e-5)
    if not g["total"].isnan():  # NaN where all labels are ignored; ours is the guarded sum
        close(total, g["total"], rtol=1e-4, atol=1e-5)
    total.backward()
    for number, network in enumerate(networks, start=1):
        for name, parameter in (("gw", network.weight), ("gb", network.bias)):
            want = g[f"{name}{number}"]
            if not want.isnan().any():
                close(parameter.grad, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def convolution(g: Golden, number: int) -> nn.Conv2d:
    weight = g[f"w{number}"]
    network = nn.Conv2d(*weight.shape[1::-1], weight.shape[-1], padding=weight.shape[-1] // 2)
    network.load_state_dict({"weight": weight, "bias": g[f"b{number}"]})
    network.align_corners = True
    return network


def cutmix_predictions(networks: list[nn.Module], g: Golden) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of the mixture and the pseudo-labels, of either network."""
    mask = g["mask"][:, 0].bool()
    mixed = mix(g["u1"], g["u0"], mask)
    assert_close(mixed, g["mixed"])
    images = (g["u0"], g["u1"])
    found = [
        predict_mixture(network, images, mask, nullcontext, lambda logits: (pseudo_label(logits),))
        for network in networks
    ]
    return [network(mixed) for network in networks], [label for (label,) in found]


def supervised_loss(logits: Tensor, label: Tensor, g: Golden) -> Tensor:
    """With hard pixels mined where the file states how many: the threshold it does not state is original CPS's."""
    kept = int(g.get("ohem_min_kept", -1))
    return cross_entropy(logits, label) if kept < 0 else ohem_cross_entropy(logits, label, CPS_OHEM.threshold, kept)


def check_ohem(path: Path) -> None:
    """`min_kept` 0 means no mining there, which our scripts call cross-entropy."""
    g = read(path)
    for case in range(int(g["n"])):
        own = {key.removeprefix(f"{case}_"): value for key, value in g.items() if key.startswith(f"{case}_")}
        logits, label = own["logits"].requires_grad_(), own["target"].long()
        kept = int(own["min_kept"])
        ours = ohem_cross_entropy(logits, label, float(own["thresh"]), kept) if kept else cross_entropy(logits, label)
        close(ours, own["loss"].nan_to_num(0.0), rtol=1e-4, atol=1e-5)
        ours.backward()
        if own["loss"].isnan():
            assert logits.grad.eq(0).all()
        else:
            close_gradient(logits.grad, own["grad"])


# ---- masks, data


def check_masks(path: Path) -> None:
    """Exact for a legacy generator, and by distribution. The `alt_` switches are none of ours: no paper turns them."""
    g = read(path)
    for name in [key for key in g if key.startswith("exact") and not key.endswith("_seed")]:
        count, _, height, width = g[name].shape
        masks = draw_cutmix_box_masks(np.random.RandomState(int(g[f"{name}_seed"])), count, height, width)
        np.testing.assert_array_equal(masks, g[name][:, 0].numpy())
    size, count = g["stat_shape"].tolist(), int(g["stat_n"])
    rng = np.random.default_rng(0)
    masks = np.concatenate([draw_cutmix_box_masks(rng, 1, *size) for _ in range(count)])
    areas = masks.mean((1, 2))
    tolerance = 3 * float(g["area_std"]) * np.sqrt(2 / count)
    assert areas.mean() == pytest.approx(float(g["area_mean"]), abs=tolerance)
    assert areas.std() == pytest.approx(float(g["area_std"]), abs=tolerance)
    for axis, name in ((2, "row"), (1, "col")):
        extents = masks.any(axis).mean(1)
        spread = 3 * float(g[f"{name}_extent_std"]) * np.sqrt(2 / count)
        assert extents.mean() == pytest.approx(float(g[f"{name}_extent_mean"]), abs=spread)
    tiles = len(g["prob_map_16"])
    chances = masks.mean(0).reshape(tiles, size[0] // tiles, tiles, size[1] // tiles).mean((1, 3))
    np.testing.assert_allclose(chances, g["prob_map_16"].numpy(), rtol=0, atol=0.07)


def check_transform(path: Path) -> None:
    """`off_` (a crop that starts one past the end) is a defect of the released draws; `pad_` is filled with 7 there."""
    g = read(path)
    for case in [key.removesuffix("_draws") for key in g if key.endswith("_draws")]:
        want = g[f"{case}_image"]
        transform = ScaleChoiceCrop(tuple(want.shape[-2:]), Method().scales)
        check_crop(transform, g["image_rgb"], g["label"], g[f"{case}_draws"], want, g[f"{case}_label"])
    above, below, before, after = g["pad_margin"].tolist()
    padded = ScaleChoiceCrop(tuple(g["pad_shape"].tolist()), (1.0,))
    inside = g["pad_label"][above : -below or None, before : -after or None].to(torch.uint8)
    label = nn.functional.pad(inside, (before, after, above, below), value=IGNORE)
    not_mirrored = SimpleNamespace(random=lambda: 0.0, choice=lambda values: values[0])
    _, ours = padded(torch.zeros(3, *inside.shape, dtype=torch.uint8), inside, not_mirrored)
    assert_close(ours, label)


def check_epoch_list(path: Path) -> None:
    """Ours runs through shuffled passes: whole ones, then a part of one without repetition, as the released list."""
    g = read(path)
    for name, want in g.items():
        length, wanted = map(int, name.split("_"))
        sampler = iter(StepSampler(length, 1, 1, 0, 0, seed=0, stream="unlabeled"))
        ours = torch.tensor([next(sampler)[0][0] for _ in range(wanted)])
        counts = ours.bincount(minlength=length).sort().values
        assert_close(counts, want.bincount(minlength=length).sort().values)


# ---- networks


def check_network(path: Path) -> None:
    """The original: two networks in one file of weights."""
    g = read(path)
    model = model_of(path, g["logits_sum"].shape[1], "v3plus_cps")
    network = TwoNetworks(model).eval()
    state = fill_small(two_branches(network, CPS))
    load_branches(network, state, path)
    assert sum(p.numel() for p in network.parameters()) == g["n_params"]
    check_groups(network.first, model, g)

    first, image = network.first, draw_input(7, g["x"].shape)
    assert_close(image, g["x"])
    caught = Caught(encoder=first.encoder, aspp=first.aspp, decoder=first.decoder)
    same = {"rtol": 1e-4, "atol": 2e-6}
    with torch.no_grad():
        logits, other = (upsampled(one, image) for one in (first, network.second))
    close(logits[..., ::4, ::4], g["logits_sub"], **same)
    close(other[..., ::8, ::8], g["branch2_sub"], **same)
    close(logits.double().sum((2, 3)), g["logits_sum"], rtol=1e-4, atol=2e-6 * logits[0, 0].numel())
    low, high = caught["encoder"]
    close(high[:, ::16], g["backbone_sub"], **same)
    close(low[:, ::16, ::2, ::2], g["low_sub"], **same)
    close(caught["aspp"][:, ::4], g["aspp_sub"], **same)
    close(caught["decoder"][:, ::8, ::2, ::2], g["head_sub"], **same)


def check_groups(network: nn.Module, model: ModelConfig, g: Golden) -> None:
    """What has weight decay and what has none: elements, over the groups of the file."""
    optim = OptimConfig(weight_decay=1e-4)
    method = Method(backbone_lr_scale=1.0, decay_norms=False)
    optimizer = make_optimizer(Config(DataConfig("voc", "", ""), model, optim, RunConfig(), method), network)
    for decays in (True, False):
        groups = [group for group in optimizer.param_groups if (group["weight_decay"] > 0) == decays]
        own = [parameter for group in groups for parameter in group["params"]]
        chosen = g["group_has_wd"] == decays
        assert len(own) == g["group_tensors"][chosen].sum()
        assert sum(parameter.numel() for parameter in own) == g["group_numel"][chosen].sum()
    assert {group["lr"] for group in optimizer.param_groups} == {optim.lr}


def check_fork_network(path: Path) -> None:
    """In CAC's code base."""
    g = read(path)
    network = TwoNetworks(model_of(path, g["logits_sum"].shape[1], "v3plus_cac")).eval()
    load_branches(network, fill_small(two_branches(network, CPS_IN_CAC)), path)
    backbone = len(list(network.first.encoder.parameters()))
    assert backbone == g["n_backbone1"]
    assert len(list(network.first.parameters())) - backbone == g["n_other1"]
    image = draw_input(7, g["x"].shape)
    with torch.no_grad():
        logits, other = (upsampled(one, image) for one in (network.first, network.second))
    close(logits[..., ::8, ::8], g["logits_sub"], rtol=1e-4, atol=2e-6)
    close(other[..., ::8, ::8], g["branch2_sub"], rtol=1e-4, atol=2e-6)
    close(logits.double().sum((2, 3)), g["logits_sum"], rtol=1e-4, atol=2e-6 * logits[0, 0].numel())


def model_of(path: Path, num_classes: int, head: str) -> ModelConfig:
    backbone = "resnet101" if "101" in path.name else "resnet50"
    return ModelConfig(num_classes, backbone, "deep" if head == "v3plus_cps" else "plain", head, pretrained=False)


def check_key_list(path: Path) -> None:
    keys = read_keys(path)
    in_cac_code = any(key.startswith("branch1.backbone.backbone.") for key in keys)
    num_classes = next(shape[0] for key, shape in keys.items() if "classifier" in key)
    with torch.device("meta"):
        network = TwoNetworks(model_of(path, num_classes, "v3plus_cac" if in_cac_code else "v3plus_cps"))
    assert two_branches(network, CPS_IN_CAC if in_cac_code else CPS) == keys


# ---- schedule, metrics, evaluation


def check_poly(path: Path) -> None:
    """Those without warm-up: no script of ours, and none of the released runs, has one."""
    g = read(path)
    for name in [key.removesuffix("_args") for key in g if key.endswith("_args")]:
        base, power, total, warm_up = g[f"{name}_args"].tolist()
        if not warm_up:
            ours = [base * poly(step, int(total), power) for step in g[f"{name}_iters"].tolist()]
            assert ours == pytest.approx(g[f"{name}_lr"].tolist(), rel=0, abs=1e-9)


def check_metric(path: Path) -> None:
    g = read(path)
    confusion = ConfusionMatrix(int(g["num_classes"]))
    confusion.update(g["pred"], g["gt"].masked_fill(g["gt"] < 0, IGNORE))
    close(confusion.matrix, g["hist"], rtol=0, atol=0)
    scores = confusion.scores()
    assert scores.per_class_iou == pytest.approx(g["iou"].tolist(), abs=1e-9, nan_ok=True)
    assert scores.miou == pytest.approx(float(g["miou"]), abs=1e-9)
    assert scores.pixel_accuracy == pytest.approx(float(g["pixacc"]), abs=1e-9)
    assert int(confusion.matrix.sum()) == g["labeled"]
    nothing = ConfusionMatrix(int(g["num_classes"]))
    nothing.update(g["pred"], torch.full_like(g["gt"], IGNORE))
    close(nothing.matrix, g["ignored_hist"], rtol=0, atol=0)


class Toy(nn.Module):
    """The network of the file: convolution, mean over 4 x 4 pixels."""

    align_corners = True

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, image: Tensor) -> Tensor:
        scores = nn.functional.conv2d(image, self.weight, self.bias, padding=1)
        return nn.functional.avg_pool2d(scores, 4, 4, ceil_mode=True)


def check_evaluator(path: Path) -> None:
    """Scores of sliding windows, and classes of both protocols.

    With several scales OpenCV rounds the resized images to other gray levels, and the released whole-image mode, which
    nothing there calls, resizes scores twice: near ties may fall either way.
    """
    g = read(path)
    network = Toy(g["w"], g["b"])
    for case in range(int(g["n"])):
        own = {key.removeprefix(f"{case}_"): value for key, value in g.items() if key.startswith(f"{case}_")}
        image, size = own["img"].permute(2, 0, 1)[None], tuple(own["img"].shape[:2])
        scales, crop = tuple(own["scales"].tolist()), int(own["crop"])
        sliding, _ = sum_logits(network, image, size, Protocol((crop, crop), scales, bool(own["flip"])))
        resized = any(scale != 1 for scale in scales)
        atol = 0.02 * float(own["score"].std()) if resized else 1e-4
        close(sliding[0].permute(1, 2, 0), own["score"], rtol=1e-4, atol=atol)
        whole, _ = sum_logits(network, image, size, Protocol(None, scales, bool(own["flip"])))
        for ours, name in ((sliding, "pred"), (whole, "whole")):
            assert (ours[0].argmax(0) == own[name]).float().mean() >= (0.98 if resized else 1.0)


def skip_optional(path: Path) -> None:
    pytest.skip(f"{path.name}: validation on centre crops is a defect; ours is on whole images")


# The first prefix that fits counts.
ADAPTERS: dict[str, Callable[[Path], None]] = {
    "city_": check_step,
    "cps_": check_key_list,
    "cutmix_masks": check_masks,
    "epoch_list": check_epoch_list,
    "evaluator": check_evaluator,
    "fork_network": check_fork_network,
    "fork_sgs": check_key_list,
    "fork_val": skip_optional,
    "fork_": check_step,
    "metric": check_metric,
    "network_": check_network,
    "ohem": check_ohem,
    "poly_lr": check_poly,
    "train_transform": check_transform,
    "voc_": check_step,
}
