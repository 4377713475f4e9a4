"""Compare CPCL with the outputs of its released functions, file by file.

Every number (classes, thresholds, sizes) is read from the file. Where ours departs from the released code on purpose,
the check names the departure.
"""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from augmentation import Replay, check_crop
from checks import (
    OWN,
    Golden,
    cases_of,
    check_golden,
    check_scores,
    close,
    close_gradient,
    close_loss,
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
    read_json,
    read_keys,
    two_branches,
    unfilled,
    upsampled,
    v3plus_cps,
)
from torch import Tensor, nn
from torch.testing import assert_close

from common.augment import ScaleChoiceCrop, draw_cutmix_box_masks, mix
from common.config import load_config
from common.config.sections import OptimConfig
from common.datasets.cityscapes import LABEL_IDS, Cityscapes
from common.datasets.voc import CLASSES as VOC_CLASSES
from common.datasets.voc import VOC
from common.images import normalize
from common.losses import cross_entropy, ohem_cross_entropy
from common.metrics import ConfusionMatrix
from common.models.two_networks import TwoNetworks, predict_mixture
from common.optim import build_optimizer, decay_groups, poly
from common.released.weights import CPS, deeplab_from_cps
from common.visual import Sample, compare
from cpcl.losses import (
    Prediction,
    count_pairs,
    disagreement,
    intersect,
    predict_pixels,
    reweighted_loss,
    unite,
)
from cpcl.train import BEYOND, Config, Method

CONFIGS = Path(__file__).parents[2] / "cpcl" / "configs"


def test_golden(golden: Path) -> None:
    check_golden(golden, ADAPTERS)


def test_every_adapter_has_a_golden_of_our_own() -> None:
    assert without_golden("cpcl", ADAPTERS) == set()


# ---- a training step of recorded logits


class Recorded(nn.Module):
    """Network that returns recorded logits, one after the other."""

    align_corners = True

    def __init__(self, *logits: Tensor) -> None:
        super().__init__()
        self.logits = list(logits)

    def forward(self, image: Tensor) -> Tensor:
        return self.logits.pop(0)


def check_step(path: Path) -> None:
    g = read(path)
    mask, num_classes = g["mask"][:, 0].bool(), g["logits_mix_1"].shape[1]
    assert_close(mix(g["imgs_u1"], g["imgs_u0"], mask), g["imgs_mixed"])
    first, second = (mixture(g, number, mask) for number in (1, 2))
    for ours, number in ((first, 1), (second, 2)):
        assert_close(ours.label, g[f"ps_label_{number}"].long())
        close(ours.confidence, g[f"conf_{number}"])

    counts = count_pairs(first.label, second.label, num_classes)
    close(counts, g["confusion"], rtol=0, atol=0)
    assert float(counts.diagonal().sum() / counts.sum()) == pytest.approx(float(g["overlap"]), rel=1e-6)
    indicator = disagreement(counts)
    close(indicator, g["class_w"], rtol=0, atol=1e-12)
    shared, joined = intersect(first, second), unite(first, second, indicator)
    assert_close(shared.label, g["ps_label_inter"].long())
    assert_close(joined.label, g["ps_label_union"].long())

    logits = {name: g[f"logits_{name}"].requires_grad_() for name in ("sup_1", "sup_2", "mix_1", "mix_2")}
    supervised = [supervised_loss(logits[f"sup_{number}"], number, g) for number in (1, 2)]
    intersection, union = reweighted_loss(logits["mix_1"], shared), reweighted_loss(logits["mix_2"], joined)
    unsupervised = float(g["unsup_weight"]) * (intersection + union)
    total = supervised[0] + supervised[1] + unsupervised
    named = {"loss_sup_1": supervised[0], "loss_sup_2": supervised[1], "loss_sup": supervised[0] + supervised[1]}
    named |= {"loss_unsup_inter": intersection, "loss_unsup_union": union, "loss_unsup": unsupervised, "loss": total}
    for name, ours in named.items():
        if g[name].isnan():  # all labels are ignored; ours has 0 in the place of that term
            assert ours.isfinite()
        else:
            close(ours, g[name])
    total.backward()
    for name, values in logits.items():
        close(values.grad, g[f"grad_{name}"].nan_to_num(0.0), rtol=1e-4, atol=1e-6)


def mixture(g: Golden, number: int, mask: Tensor) -> Prediction:
    """Predict the mixture as training does, from a network's logits for both streams."""
    network = Recorded(g[f"logits_u0_{number}"], g[f"logits_u1_{number}"])
    images = (g["imgs_u0"], g["imgs_u1"])
    return Prediction(*predict_mixture(network, images, mask, nullcontext, predict_pixels))


def supervised_loss(logits: Tensor, number: int, g: Golden) -> Tensor:
    """Return the plain loss if the file has its gradient, else the one with mining.

    Files do not state how many pixels are mined; only those have a gradient.
    """
    label = to_label(g["gts"])
    plain, recorded = cross_entropy(logits, label), g[f"grad_sup_{number}"].nan_to_num(0.0)
    (gradient,) = torch.autograd.grad(plain, logits, retain_graph=True)
    if torch.allclose(gradient, recorded, rtol=1e-4, atol=1e-6):
        return plain
    mined, method = int(recorded.ne(0).any(1).sum()), city_method()
    return ohem_cross_entropy(
        logits, label, method.ohem_threshold, max(mined, 1), torch.tensor(method.ohem_class_weight)
    )


def city_method() -> Method:
    """Load the setting with mining, which is that of Cityscapes."""
    return load_config(Config, CONFIGS / "city_resnet50_1over8.json").method


def check_ohem(path: Path) -> None:
    """Compare the loss with mining; `min_kept` 0 means no mining there, like a number above that of the pixels."""
    g = read(path)
    threshold, names = city_method().ohem_threshold, cases_of(g, "_min_kept")
    assert names
    for case in names:
        logits, label = g[f"{case}_pred"].requires_grad_(), to_label(g[f"{case}_target"])
        kept = int(g[f"{case}_min_kept"]) or label.numel() + 1
        ours = ohem_cross_entropy(logits, label, threshold, kept, g["class_weight"])
        close_loss(ours, g[f"{case}_loss"])
        ours.backward()
        if g[f"{case}_loss"].isnan():
            assert logits.grad.eq(0).all()
        else:
            close_gradient(logits.grad, g[f"{case}_grad"])


# ---- masks, data


def check_masks(path: Path) -> None:
    """Compare masks exactly (legacy generator) and by distribution; of the variants we have the number of boxes."""
    g = read(path)
    for name in (name for name in cases_of(g, "_packed") if name.startswith("masks_")):
        shape, seed = g[f"{name}_shape"].tolist(), int(g[f"seed_{name.removeprefix('masks_')}"])
        ours = draw_cutmix_box_masks(np.random.RandomState(seed), shape[0], *shape[2:])
        np.testing.assert_array_equal(ours, unpacked(g[f"{name}_packed"], shape))
    if "variant_n1" in g:
        shape = g["variant_shape"].tolist()
        one = draw_cutmix_box_masks(np.random.RandomState(int(g["variant_seed"])), shape[0], *shape[2:], boxes=1)
        np.testing.assert_array_equal(one, unpacked(g["variant_n1"], shape))
    means = next((g[key] for key in g if key.startswith("pixmean_")), None)
    for name in (key for key in g if key.startswith("area_")):
        check_mask_statistics(means, g[name].numpy(), int(g[f"seed_{name.removeprefix('area_')}"]))


def check_mask_statistics(means: Tensor, areas: np.ndarray, seed: int) -> None:
    legacy = draw_cutmix_box_masks(np.random.RandomState(seed), len(areas), *means.shape)
    np.testing.assert_allclose(legacy.mean((1, 2)), areas, rtol=0, atol=1e-6)
    masks = draw_cutmix_box_masks(np.random.default_rng(0), 4 * len(areas), *means.shape)
    np.testing.assert_allclose(masks.mean(0), means.numpy(), rtol=0, atol=0.08 * max(1, 1000 / len(areas)) ** 0.5)
    # p > 0.001
    assert kolmogorov_smirnov(masks.mean((1, 2)), areas) < 1.95 * np.sqrt(1 / len(areas) + 1 / len(masks))


def unpacked(bits: Tensor, shape: list[int]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.unpackbits(bits.numpy())[:count].reshape(shape)[:, 0].astype(bool)


def kolmogorov_smirnov(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the largest distance between two empirical distributions."""
    where = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(values), where, side="right") / len(values) for values in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def check_augmentation(path: Path) -> None:
    """Compare crops by recorded draws. Padding is 0 once normalized; ours is that color in whole gray levels."""
    g = read(path)
    draws = json.loads(path.with_name(path.stem + "_draws.json").read_text())
    for case, drawn in enumerate(draws):
        transform = ScaleChoiceCrop(tuple(g["crop"].tolist()), (drawn["scale"],), BEYOND)
        rows = torch.tensor(recorded_draws(drawn["mirror"], drawn["scale"], drawn["randints_in_order"]))
        check_crop(transform, g[f"c{case}_img"], g[f"c{case}_gt"], rows, g[f"c{case}_out"], g[f"c{case}_out_gt"])
    if "over_img" in g:
        check_crop_beyond(g)


def recorded_draws(mirrors: bool, scale: float, starts: list[int]) -> list[tuple[float, ...]]:
    """Convert draws to the rows of `Replay`. Bounds are not recorded: a start is drawn only if there are several."""
    return [(1, 0, 0, 0.75 * mirrors), (2, 0, 0, scale), *((0, -math.inf, math.inf, start) for start in starts)]


def check_crop_beyond(g: Golden) -> None:
    """Compare a crop that starts one past the end, only inside the image: it was padded before normalization."""
    crop = tuple(g["crop"].tolist())
    draws = Replay(torch.tensor(recorded_draws(False, 1.0, g["over_pos"].tolist())), bounded=False)
    image, label = ScaleChoiceCrop(crop, (1.0,), BEYOND)(g["over_img"].permute(2, 0, 1), g["over_gt"], draws)
    above, below, before, after = g["over_margin"].numpy().astype(int).tolist()
    inside = (..., slice(above, crop[0] - below), slice(before, crop[1] - after))
    assert_close(image[inside], g["over_out"].permute(2, 0, 1)[inside])
    assert_close(label, g["over_out_gt"])


def check_normalization(path: Path) -> None:
    g = read(path)
    close(normalize(g["img"].permute(2, 0, 1)[None])[0].permute(1, 2, 0), g["norm"].float(), rtol=0, atol=1e-6)
    close(torch.tensor(LABEL_IDS), g["trans_labels"], rtol=0, atol=0)
    close(torch.tensor(LABEL_IDS)[g["pred"].long()], g["ids"], rtol=0, atol=0)


# ---- networks


def check_network(path: Path) -> None:
    g = read(path)
    model = v3plus_cps(g["pred1_sub4"].shape[1], backbone_named(path, "resnet50"))
    network = unfilled(lambda: TwoNetworks(model))
    load_branches(network, fill_small(two_branches(network, CPS), int(g["offset"])), path)
    image = input_of(g)
    for number, one in ((1, network.first), (2, network.second)):
        check_evaluated(number, one, image[:1], g)
    check_trained(network, image, g)


def check_evaluated(number: int, network: nn.Module, image: Tensor, g: Golden) -> None:
    same = {"rtol": 1e-4, "atol": 1e-6}
    stages = {f"block{number}_{index}": network.encoder[f"layer{index + 1}"] for index in range(4)}
    caught = Caught(decoder=network.decoder, **stages)
    with torch.no_grad():
        logits = upsampled(network, image)
    close(logits[..., ::4, ::4], g[f"pred{number}_sub4"], **same)
    close(logits.double().mean((0, 2, 3)), g[f"pred{number}_mean_c"].double(), **same)
    close(logits.double().std((0, 2, 3), correction=0), g[f"pred{number}_std_c"].double(), **same)
    best = logits.topk(2, 1).values
    clear = best[:, 0] - best[:, 1] > 1e-6
    assert_close(logits.argmax(1)[clear], g[f"argmax{number}"].long()[clear])
    for name, stage in stages.items():
        assert list(caught[name].shape) == g[f"{name}_shape"].tolist(), stage
        close(caught[name][:, :4], g[f"{name}_c0_4"], rtol=1e-4, atol=1e-5)
    assert list(caught["decoder"].shape) == g[f"feat{number}_shape"].tolist()
    close(caught["decoder"][:, :8], g[f"feat{number}_c0_8"], **same)


def check_trained(network: TwoNetworks, image: Tensor, g: Golden) -> None:
    """Compare network 1 in training mode, which updates its running statistics and not those of network 2.

    Ours in float64, where its result is the same on every machine. The recorded features of ResNet-101, in float32, are
    3e-3 off where the largest is 2.9.
    """
    first = network.first.train().double()
    caught = Caught(decoder=first.decoder)
    with torch.no_grad():
        logits = upsampled(first, image.double())
    close(logits[..., ::4, ::4], g["train_pred1_sub4"], rtol=0, atol=2e-3)
    feature = g["train_feat1_c0_8_sub2"]
    close(caught["decoder"][:, :8, ::2, ::2], feature, rtol=0, atol=2e-3 * max(1.0, float(feature.abs().max())))
    for key in [key.removeprefix("after_") for key in g if key.startswith("after_")]:
        number = int(key.removeprefix("branch")[0])
        ((ours, want),) = deeplab_from_cps({key: g[f"after_{key}"]}, number).items()
        close((network.first, network.second)[number - 1].state_dict()[ours], want, rtol=0, atol=2e-4)


def check_key_list(path: Path) -> None:
    keys = read_keys(path)
    model = v3plus_cps(keys["branch1.classifier.bias"][0], backbone_of(keys))
    network = outline(lambda: TwoNetworks(model))
    assert two_branches(network, CPS) == keys


def check_architecture(path: Path) -> None:
    """Compare convolutions, batch norms, and the learning rate and weight decay of each parameter."""
    g = read_json(path)
    groups, convolutions = g["optimizer_groups_in_order"], g["branch1_conv_kernel_stride_pad_dil"]
    num_classes = 21  # of no consequence for what is listed
    model = v3plus_cps(num_classes, backbone_of(f"{name}." for name in convolutions))
    network = outline(lambda: TwoNetworks(model))
    modules = dict(network.first.named_modules())
    for official, want in convolutions.items():
        conv = modules[ours_of(official)]
        assert [list(v) for v in (conv.kernel_size, conv.stride, conv.padding, conv.dilation)] == want, official
    for official, want in g["branch1_bn_eps_momentum"].items():
        assert [modules[ours_of(official)].eps, modules[ours_of(official)].momentum] == want, official
    optim = OptimConfig(lr=groups[0]["lr"], weight_decay=groups[0]["weight_decay"], momentum=groups[0]["momentum"])
    optimizer = build_optimizer(optim, network, decay_groups(network.parameters()))
    given = {
        id(parameter): (group["lr"], group["weight_decay"], group["momentum"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    parameters = dict(network.first.named_parameters())
    for group in groups:
        for official in group["names"]:
            name, kind = official.rsplit(".", 1)
            want = (group["lr"], group["weight_decay"], group["momentum"])
            assert given[id(parameters[f"{ours_of(name)}.{kind}"])] == want, official
    assert sum(len(group["names"]) for group in groups) == len(parameters)


def ours_of(module: str) -> str:
    """Convert the official name of a module to ours."""
    (key,) = deeplab_from_cps({f"branch1.{module}.weight": torch.zeros(1)})
    return key.removesuffix(".weight")


# ---- schedule, metrics, evaluation


def check_poly(path: Path) -> None:
    """Compare rates without warm-up, and after its end with one: no released run has a warm-up."""
    g = read(path)
    total, power, steps = int(g["total"]), float(g["power"]), g["iters"]
    ours = torch.tensor([float(g["base"]) * poly(step, total, power) for step in steps.tolist()], dtype=torch.float64)
    close(ours, g["lr"], rtol=0, atol=1e-12)
    if "lr_warm" in g:
        after = steps >= int(g["warm"])
        close(ours[after], g["lr_warm"][after], rtol=0, atol=1e-12)


def check_metrics(path: Path) -> None:
    g = read(path)
    names = cases_of(g, "_hist")
    assert names
    for case in names:
        confusion = ConfusionMatrix(len(g[f"{case}_iou"]))
        confusion.update(g[f"{case}_pred"], to_label(g[f"{case}_gt"]))
        close(confusion.matrix, g[f"{case}_hist"], rtol=0, atol=0)
        assert int(confusion.matrix.sum()) == g[f"{case}_labeled"]
        assert int(confusion.matrix.diagonal().sum()) == g[f"{case}_correct"]
        scores = confusion.scores()
        assert scores.per_class_iou == pytest.approx(g[f"{case}_iou"].tolist(), abs=1e-12, nan_ok=True)
        ours = (scores.miou, scores.miou_without_first, scores.pixel_accuracy)
        wanted = [float(g[f"{case}_{name}"]) for name in ("miou", "miou_noback", "acc")]
        assert ours == pytest.approx(wanted, abs=1e-12, nan_ok=True)


class Toy(nn.Module):
    """Network of the file: one convolution."""

    align_corners = True

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.conv2d(image, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


def check_evaluation(path: Path) -> None:
    g = read(path)
    check_scores(Toy(g["weight"], g["bias"]), g["weight"], g["img"], g)


def check_picture(path: Path) -> None:
    """Compare pictures side by side; the released one has red and blue of labels exchanged, which is mended."""
    g = read(path)
    sample = Sample("", g["img_rgb"].permute(2, 0, 1), g["pred"], g["gt"])
    ours = np.asarray(compare(sample, Cityscapes.palette))
    written = g["out_written_as_bgr"].numpy()
    width = g["img_rgb"].shape[1]
    np.testing.assert_array_equal(ours[:, :width], written[:, :width, ::-1])
    np.testing.assert_array_equal(ours[:, width:], written[:, width:])


# ---- configs


@pytest.mark.parametrize(("name", "config"), [("city", "city_resnet50_1over8"), ("voc", "voc_resnet50_1over8")])
def test_our_configs_hold_the_released_values(name, config):
    g = json.loads((OWN / "cpcl" / f"config_{name}.json").read_text())
    ours = load_config(Config, CONFIGS / f"{config}.json")
    optim, method, run = ours.optim, ours.method, ours.run
    assert (optim.lr, optim.momentum, optim.weight_decay) == (g["lr"], g["momentum"], g["weight_decay"])
    assert (optim.batch_size, optim.poly_power, optim.nesterov) == (g["batch_size"], g["lr_power"], False)
    assert list(method.cutmix_mask_prop_range) == g["cutmix_mask_prop_range"]
    assert method.cutmix_boxmask_n_boxes == g["cutmix_boxmask_n_boxes"]
    assert list(method.train_scale_array) == g["train_scale_array"]
    assert (method.unsup_weight, ours.model.num_classes) == (g["unsup_weight"], g["num_classes"])
    assert list(ours.data.crop_size) == [g["image_height"], g["image_width"]] == [g["eval_crop_size"]] * 2
    assert (run.epochs, run.steps_per_epoch, run.seed) == (g["nepochs"], g["niters_per_epoch"], g["seed"])
    for path, key in ((ours.data.labeled_list, "train_source"), (ours.data.unlabeled_list, "unsup_source")):
        assert g[key].endswith("/" + path.removeprefix("data/"))


@pytest.mark.parametrize(("name", "source"), [("city", Cityscapes), ("voc", VOC)])
def test_colors_and_names_of_classes(name, source):
    g = json.loads((OWN / "cpcl" / f"{name}_colors.json").read_text())
    classes = VOC_CLASSES if source is VOC else Cityscapes.classes
    assert source.palette[: len(classes)].tolist() == g["class_colors"]
    assert list(classes) == [each.replace("/", "") for each in g["names"]]


ADAPTERS: dict[str, Callable[[Path], None]] = {
    "arch_": check_architecture,
    "augment_": check_augmentation,
    "cutmix": check_masks,
    "eval_": check_evaluation,
    "lr_": check_poly,
    "metric": check_metrics,
    "network_": check_network,
    "normalize_": check_normalization,
    "ohem": check_ohem,
    "show_": check_picture,
    "state_dict_": check_key_list,
    "step_": check_step,
}
