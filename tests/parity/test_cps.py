"""Compare CPS, the original and in the code of CAC, with the outputs of released functions, file by file.

Every number (classes, thresholds, sizes) is read from the file. Where ours departs from the released code on purpose,
the check names the departure.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from augmentation import Replay, check_crop
from checks import (
    Golden,
    cases_of,
    check_golden,
    check_scores,
    close,
    close_loss,
    close_to_largest,
    part,
    read,
    to_label,
    without_golden,
)
from networks import (
    Caught,
    backbone_named,
    backbone_of,
    fill_small,
    input_of,
    load_branches,
    outline,
    read_keys,
    two_branches,
    unfilled,
    upsampled,
    v3plus,
    v3plus_cps,
)
from torch import Tensor, nn
from torch.testing import assert_close

from cac_cps.config import Config, Method
from cac_cps.losses import cross_pseudo_loss, pseudo_label
from cac_cps.training import CPS_OHEM, make_optimizer
from common import IGNORE
from common.augment import ScaleChoiceCrop, draw_cutmix_box_masks, mix
from common.config.sections import DataConfig, ModelConfig, OptimConfig, RunConfig
from common.loaders import StepSampler
from common.losses import cross_entropy, ohem_cross_entropy
from common.metrics import ConfusionMatrix
from common.models.two_networks import TwoNetworks, predict_mixture
from common.optim import poly
from common.released.weights import CPS, CPS_IN_CAC


def test_golden(golden: Path) -> None:
    check_golden(golden, ADAPTERS)


def test_every_adapter_has_a_golden_of_our_own() -> None:
    assert without_golden("cps", ADAPTERS) == set()


# ---- a training step of two convolutions


def check_step(path: Path) -> None:
    g = read(path)
    networks = [convolution(g, number) for number in (1, 2)]
    label = to_label(g["target"])
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
    same = {"rtol": 1e-4, "atol": 1e-5}
    for ours, name in zip((*supervised, cps), ("loss_sup", "loss_sup_r", "cps_loss_weighted")):
        close_loss(ours, g[name], **same)
    if not g["total"].isnan():  # NaN where all labels are ignored; ours is the sum with 0 in its place
        close(total, g["total"], **same)
    total.backward()
    for number, network in enumerate(networks, start=1):
        close_to_largest(network.weight.grad, g[f"gw{number}"])
        close_to_largest(network.bias.grad, g[f"gb{number}"])


def convolution(g: Golden, number: int) -> nn.Conv2d:
    weight = g[f"w{number}"]
    network = nn.Conv2d(*weight.shape[1::-1], weight.shape[-1], padding=weight.shape[-1] // 2)
    network.load_state_dict({"weight": weight, "bias": g[f"b{number}"]})
    network.align_corners = True
    return network


def cutmix_predictions(networks: list[nn.Module], g: Golden) -> tuple[list[Tensor], list[Tensor]]:
    """Compute the logits of the mixture and the pseudo-labels of either network."""
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
    """Mine hard pixels if the file states how many; the threshold, which it does not state, is that of CPS."""
    return mined_loss(logits, label, CPS_OHEM.threshold, int(g.get("ohem_min_kept", -1)))


def mined_loss(logits: Tensor, label: Tensor, threshold: float, min_kept: int) -> Tensor:
    """Compute the loss with mining; in the release, `min_kept` of 0 and below mean plain cross-entropy."""
    mines = min_kept > 0
    return ohem_cross_entropy(logits, label, threshold, min_kept) if mines else cross_entropy(logits, label)


def check_ohem(path: Path) -> None:
    g = read(path)
    for case in range(int(g["n"])):
        own = part(g, f"{case}_")
        logits, label = own["logits"].requires_grad_(), to_label(own["target"])
        ours = mined_loss(logits, label, float(own["thresh"]), int(own["min_kept"]))
        close_loss(ours, own["loss"], rtol=1e-4, atol=1e-5)
        ours.backward()
        if own["loss"].isnan():
            assert logits.grad.eq(0).all()
        else:
            close_to_largest(logits.grad, own["grad"])


# ---- masks, data


def check_masks(path: Path) -> None:
    """Compare masks exactly (legacy generator) and by distribution; no paper uses the variants `alt_`."""
    g = read(path)
    for name in (name for name in cases_of(g, "_seed") if name.startswith("exact")):
        count, _, height, width = g[name].shape
        masks = draw_cutmix_box_masks(np.random.RandomState(int(g[f"{name}_seed"])), count, height, width)
        np.testing.assert_array_equal(masks, g[name][:, 0].numpy())
    if "stat_n" in g:
        check_mask_statistics(g)


def check_mask_statistics(g: Golden) -> None:
    """Compare within three standard errors of a difference of as many masks; more masks of ours reduce its noise."""
    size, count = g["stat_shape"].tolist(), int(g["stat_n"])
    masks = draw_cutmix_box_masks(np.random.default_rng(0), 4 * count, *size)

    def compare(ours: np.ndarray, name: str) -> None:
        spread = 3 * float(g[f"{name}_std"]) * np.sqrt(2 / count)
        assert ours.mean() == pytest.approx(float(g[f"{name}_mean"]), abs=spread)
        assert ours.std() == pytest.approx(float(g[f"{name}_std"]), abs=spread)

    compare(masks.mean((1, 2)), "area")
    compare(masks.any(2).mean(1), "row_extent")
    compare(masks.any(1).mean(1), "col_extent")
    for name in (key for key in g if key.startswith("prob_map")):
        chances = nn.functional.adaptive_avg_pool2d(torch.from_numpy(masks.mean(0))[None], g[name].shape)[0]
        close(chances, g[name], rtol=0, atol=0.07)


def check_transform(path: Path) -> None:
    """Compare crops by recorded draws. `off_` (a start one past the end) is a defect; `pad_` is filled with 7."""
    g = read(path)
    for case in cases_of(g, "_draws"):
        want, draws = g[f"{case}_image"], g[f"{case}_draws"]
        transform = ScaleChoiceCrop(tuple(want.shape[-2:]), tuple(draws[draws[:, 0] == 2, 3].tolist()))
        check_crop(transform, g["image_rgb"], g["label"], draws, want, g[f"{case}_label"])
    if "pad_shape" in g:
        check_padding(g)


def check_padding(g: Golden) -> None:
    above, below, before, after = g["pad_margin"].tolist()
    padded = ScaleChoiceCrop(tuple(g["pad_shape"].tolist()), (1.0,))
    inside = g["pad_label"][above : -below or None, before : -after or None].to(torch.uint8)
    label = nn.functional.pad(inside, (before, after, above, below), value=IGNORE)
    draws = torch.tensor([(1, 0, 0, 0.0), (2, 0, 0, 1.0)])  # not mirrored, at its size
    _, ours = padded(torch.zeros(3, *inside.shape, dtype=torch.uint8), inside, Replay(draws))
    assert_close(ours, label)


def check_epoch_list(path: Path) -> None:
    """Compare how often images occur: in whole passes, then once in a part of one, as in the released list."""
    g = read(path)
    for name, want in g.items():
        length, wanted = map(int, name.split("_"))
        sampler = iter(StepSampler(length, 1, 1, 0, 0, seed=0, stream="unlabeled"))
        ours = torch.tensor([next(sampler)[0][0] for _ in range(wanted)])
        counts = ours.bincount(minlength=length).sort().values
        assert_close(counts, want.bincount(minlength=length).sort().values)


# ---- networks


def check_network(path: Path) -> None:
    """Compare the original: two networks in one file of weights."""
    g = read(path)
    model = v3plus_cps(g["logits_sum"].shape[1], backbone_named(path, "resnet50"))
    network = unfilled(lambda: TwoNetworks(model))
    load_branches(network, fill_small(two_branches(network, CPS)), path)
    assert sum(p.numel() for p in network.parameters()) == g["n_params"]
    check_groups(network.first, model, g)

    first, image = network.first, input_of(g)
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
    """Compare tensors and elements with and without weight decay, over the groups of the file."""
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
    """Compare the networks of CPS in the code of CAC."""
    g = read(path)
    model = v3plus(g["logits_sum"].shape[1], backbone_named(path, "resnet50"))
    network = unfilled(lambda: TwoNetworks(model))
    load_branches(network, fill_small(two_branches(network, CPS_IN_CAC)), path)
    backbone = len(list(network.first.encoder.parameters()))
    assert backbone == g["n_backbone1"]
    assert len(list(network.first.parameters())) - backbone == g["n_other1"]
    image = input_of(g)
    with torch.no_grad():
        logits, other = (upsampled(one, image) for one in (network.first, network.second))
    close(logits[..., ::8, ::8], g["logits_sub"], rtol=1e-4, atol=2e-6)
    close(other[..., ::8, ::8], g["branch2_sub"], rtol=1e-4, atol=2e-6)
    close(logits.double().sum((2, 3)), g["logits_sum"], rtol=1e-4, atol=2e-6 * logits[0, 0].numel())


def check_key_list(path: Path) -> None:
    keys = read_keys(path)
    in_cac_code = any(key.startswith("branch1.backbone.backbone.") for key in keys)
    num_classes = next(shape[0] for key, shape in keys.items() if "classifier" in key)
    model = (v3plus if in_cac_code else v3plus_cps)(num_classes, backbone_of(keys))
    network = outline(lambda: TwoNetworks(model))
    assert two_branches(network, CPS_IN_CAC if in_cac_code else CPS) == keys


# ---- schedule, metrics, evaluation


def check_poly(path: Path) -> None:
    """Compare rates after the end of the warm-up: no script of ours, and no released run, has a warm-up."""
    g = read(path)
    names = cases_of(g, "_args")
    assert names
    for name in names:
        base, power, total, warm_up = g[f"{name}_args"].tolist()
        steps, rates = g[f"{name}_iters"].tolist(), g[f"{name}_lr"].tolist()
        decays = [(step, rate) for step, rate in zip(steps, rates, strict=True) if step >= warm_up]
        ours = [base * poly(step, int(total), power) for step, _ in decays]
        assert ours == pytest.approx([rate for _, rate in decays], rel=0, abs=1e-9)


def check_metric(path: Path) -> None:
    g = read(path)
    confusion = ConfusionMatrix(int(g["num_classes"]))
    confusion.update(g["pred"], to_label(g["gt"]))
    close(confusion.matrix, g["hist"], rtol=0, atol=0)
    scores = confusion.scores()
    assert scores.per_class_iou == pytest.approx(g["iou"].tolist(), abs=1e-9, nan_ok=True)
    ours = (scores.miou, scores.miou_without_first, scores.pixel_accuracy)
    wanted = [float(g[name]) for name in ("miou", "miou_no_back", "pixacc")]
    assert ours == pytest.approx(wanted, abs=1e-9, nan_ok=True)
    assert int(confusion.matrix.sum()) == g["labeled"]
    assert int(confusion.matrix.diagonal().sum()) == g["correct"]
    nothing = ConfusionMatrix(int(g["num_classes"]))
    nothing.update(g["pred"], torch.full_like(g["gt"], IGNORE))
    close(nothing.matrix, g["ignored_hist"], rtol=0, atol=0)


class Toy(nn.Module):
    """Network of the file: convolution, mean over 4 x 4 pixels."""

    align_corners = True

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, image: Tensor) -> Tensor:
        scores = nn.functional.conv2d(image, self.weight, self.bias, padding=self.weight.shape[-1] // 2)
        return nn.functional.avg_pool2d(scores, 4, 4, ceil_mode=True)


def check_evaluator(path: Path) -> None:
    g = read(path)
    for case in range(int(g["n"])):
        own = part(g, f"{case}_")
        check_scores(Toy(g["w"], g["b"]), g["w"], own["img"], own)


def skip_optional(path: Path) -> None:
    pytest.skip(f"{path.name}: validation on center crops is a defect; ours is on whole images")


ADAPTERS: dict[str, Callable[[Path], None]] = {
    "city_": check_step,
    "cps_": check_key_list,
    "cutmix": check_masks,
    "epoch_": check_epoch_list,
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
