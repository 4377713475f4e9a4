"""CPCL against what its released functions returned, file by file.

Every number (classes, thresholds, sizes) is read from the file. Departures of ours from the released code are named
where they are allowed for.
"""

import gzip
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checks import GREY_LEVEL, Golden, check_crop, close, close_gradient, read
from networks import Caught, draw_input, fill_small, load_branches, read_keys, two_branches, upsampled
from torch import Tensor, nn
from torch.testing import assert_close

from common.augment import ScaleChoiceCrop, draw_cutmix_box_masks, mix
from common.config import load_config
from common.config.sections import ModelConfig, OptimConfig
from common.datasets.cityscapes import LABEL_IDS, Cityscapes
from common.datasets.voc import CLASSES as VOC_CLASSES
from common.datasets.voc import VOC
from common.evaluation.inference import Protocol, sum_logits
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

OWN = Path(__file__).parent / "goldens" / "cpcl"
CONFIGS = Path(__file__).parents[2] / "cpcl" / "configs"


def test_golden(golden: Path) -> None:
    adapter_of(golden.name)(golden)


def test_every_adapter_has_a_golden_of_our_own() -> None:
    names = [path.name for path in OWN.iterdir()]
    assert {prefix for prefix in ADAPTERS if not any(name.startswith(prefix) for name in names)} == set()


def adapter_of(name: str) -> Callable[[Path], None]:
    """The check that belongs to a file name."""
    for prefix, adapter in ADAPTERS.items():
        if name.startswith(prefix):
            return adapter
    pytest.fail(f"no adapter for {name}: its prefix is none of {', '.join(ADAPTERS)}")


# ---- a training step of recorded logits


class Recorded(nn.Module):
    """Returns recorded logits, one after the other."""

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
    assert_close(counts, g["confusion"])
    assert float(counts.diagonal().sum() / counts.sum()) == pytest.approx(float(g["overlap"]), rel=1e-6)
    indicator = disagreement(counts)
    close(indicator, g["class_w"], rtol=0, atol=1e-12)
    shared, joined = intersect(first, second), unite(first, second, indicator)
    assert_close(shared.label, g["ps_label_inter"].long())
    assert_close(joined.label, g["ps_label_union"].long())

    logits = {name: g[f"logits_{name}"].requires_grad_() for name in ("sup_1", "sup_2", "mix_1", "mix_2")}
    supervised = [supervised_loss(logits[f"sup_{number}"], number, g, path) for number in (1, 2)]
    intersection, union = reweighted_loss(logits["mix_1"], shared), reweighted_loss(logits["mix_2"], joined)
    unsupervised = float(g["unsup_weight"]) * (intersection + union)
    total = supervised[0] + supervised[1] + unsupervised
    named = {"loss_sup_1": supervised[0], "loss_sup_2": supervised[1], "loss_sup": supervised[0] + supervised[1]}
    named |= {"loss_unsup_inter": intersection, "loss_unsup_union": union, "loss_unsup": unsupervised, "loss": total}
    for name, ours in named.items():
        if not g[name].isnan():
            close(ours, g[name])
        else:  # all labels ignored
            assert ours.isfinite()
    total.backward()
    for name, values in logits.items():
        close(values.grad, g[f"grad_{name}"].nan_to_num(0.0), rtol=1e-4, atol=1e-6)


def mixture(g: Golden, number: int, mask: Tensor) -> Prediction:
    """What training makes of a network's logits for both streams."""
    network = Recorded(g[f"logits_u0_{number}"], g[f"logits_u1_{number}"])
    images = (g["imgs_u0"], g["imgs_u1"])
    return Prediction(*predict_mixture(network, images, mask, nullcontext, predict_pixels))


def supervised_loss(logits: Tensor, number: int, g: Golden, path: Path) -> Tensor:
    """On Cityscapes with mining, whose number of pixels the file tells by the gradient: only those mined have one."""
    label = g["gts"].long()
    if "city" not in path.name:
        return cross_entropy(logits, label)
    mined = int(g[f"grad_sup_{number}"].nan_to_num(0.0).ne(0).any(1).sum())
    config = load_config(Config, CONFIGS / "city_resnet50_1over8.json")
    weight = torch.tensor(config.method.ohem_class_weight)
    return ohem_cross_entropy(logits, label, config.method.ohem_threshold, max(mined, 1), weight)


def check_ohem(path: Path) -> None:
    """`min_kept` 0 means no mining there, as more than there are does."""
    g = read(path)
    threshold = load_config(Config, CONFIGS / "city_resnet50_1over8.json").method.ohem_threshold
    for case in sorted({key.split("_")[0] for key in g if key.endswith("_min_kept")}):
        logits, label = g[f"{case}_pred"].requires_grad_(), g[f"{case}_target"].long()
        kept = int(g[f"{case}_min_kept"]) or label.numel() + 1
        ours = ohem_cross_entropy(logits, label, threshold, kept, g["class_weight"])
        close(ours, g[f"{case}_loss"].nan_to_num(0.0))
        ours.backward()
        if g[f"{case}_loss"].isnan():
            assert logits.grad.eq(0).all()
        else:
            close_gradient(logits.grad, g[f"{case}_grad"])


# ---- masks, data


def check_masks(path: Path) -> None:
    """Exact for a legacy generator, and by distribution. Of the variants, one is ours: another number of boxes."""
    g = read(path)
    shape, packed = g["masks_8_shape"].tolist(), g["masks_8_packed"]
    ours = draw_cutmix_box_masks(np.random.RandomState(int(g["seed_8"])), shape[0], *shape[2:])
    np.testing.assert_array_equal(ours, unpacked(packed, shape))
    shape = g["variant_shape"].tolist()
    one = draw_cutmix_box_masks(np.random.RandomState(int(g["variant_seed"])), shape[0], *shape[2:], boxes=1)
    np.testing.assert_array_equal(one, unpacked(g["variant_n1"], shape))

    size, areas = g["pixmean_64x64"].shape, g["area_1000"].numpy()
    legacy = draw_cutmix_box_masks(np.random.RandomState(int(g["seed_1000"])), len(areas), *size)
    np.testing.assert_allclose(legacy.mean((1, 2)), areas, rtol=0, atol=1e-6)
    rng = np.random.default_rng(0)
    masks = np.concatenate([draw_cutmix_box_masks(rng, 1, *size) for _ in range(len(areas))])
    np.testing.assert_allclose(masks.mean(0), g["pixmean_64x64"].numpy(), rtol=0, atol=0.08)
    assert kolmogorov_smirnov(masks.mean((1, 2)), areas) < 1.95 * np.sqrt(2 / len(areas))  # p > 0.001


def unpacked(bits: Tensor, shape: list[int]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.unpackbits(bits.numpy())[:count].reshape(shape)[:, 0].astype(bool)


def kolmogorov_smirnov(first: np.ndarray, second: np.ndarray) -> float:
    """Largest distance of two empirical distributions of as many values."""
    where = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(values), where, side="right") / len(values) for values in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def check_augmentation(path: Path) -> None:
    """By recorded draws. Beyond an image there are 0s once it is normalized; ours is that color in whole gray levels.

    `over_` was padded before it was normalized: only what shows the image is compared.
    """
    g = read(path)
    crop = tuple(g["crop"].tolist())
    transform = ScaleChoiceCrop(crop, Method().train_scale_array, BEYOND)
    draws = json.loads(path.with_name(path.stem + "_draws.json").read_text())
    for case, drawn in enumerate(draws):
        starts = [(0, 0, 0, start) for start in drawn["randints_in_order"]]
        rows = torch.tensor([(1, 0, 0, 0.75 * drawn["mirror"]), (2, 0, 0, drawn["scale"]), *starts])
        image, label = g[f"c{case}_img"], g[f"c{case}_gt"]
        check_crop(transform, image, label, rows, g[f"c{case}_out"], g[f"c{case}_out_gt"])
    starts = iter(g["over_pos"].tolist())
    fixed = SimpleNamespace(random=lambda: 0.0, choice=lambda _: 1.0, integers=lambda *_, **__: next(starts))
    image, label = transform(g["over_img"].permute(2, 0, 1), g["over_gt"], fixed)
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
    network = TwoNetworks(model_of(path, g["pred1_sub4"].shape[1])).eval()
    state = fill_small(two_branches(network, CPS), int(g["offset"]))
    load_branches(network, state, path)
    image = draw_input(int(g["x_seed"]), (2, 3, *g["hw"].tolist()))
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
    """Network 1 in training mode, which moves its running statistics and leaves those of network 2 alone.

    Features are recorded in float32: those of ResNet-101 are 3e-3 off ours in float64 too, where the largest is 2.9.
    """
    first = network.first.train()
    caught = Caught(decoder=first.decoder)
    with torch.no_grad():
        logits = upsampled(first, image)
    close(logits[..., ::4, ::4], g["train_pred1_sub4"], rtol=0, atol=2e-3)
    feature = g["train_feat1_c0_8_sub2"]
    close(caught["decoder"][:, :8, ::2, ::2], feature, rtol=0, atol=2e-3 * max(1.0, float(feature.max())))
    for key in [key.removeprefix("after_") for key in g if key.startswith("after_")]:
        number = int(key.removeprefix("branch")[0])
        ((ours, want),) = deeplab_from_cps({key: g[f"after_{key}"]}, number).items()
        close((network.first, network.second)[number - 1].state_dict()[ours], want, rtol=0, atol=2e-4)


def model_of(path: Path, num_classes: int) -> ModelConfig:
    backbone = "resnet101" if "101" in path.name else "resnet50"
    return ModelConfig(num_classes, backbone, "deep", "v3plus_cps", pretrained=False)


def check_key_list(path: Path) -> None:
    keys = read_keys(path)
    with torch.device("meta"):
        network = TwoNetworks(model_of(path, keys["branch1.classifier.bias"][0]))
    assert two_branches(network, CPS) == keys


def check_architecture(path: Path) -> None:
    """Convolutions, batch norms, and what each parameter's rate and decay are."""
    with gzip.open(path, "rt") as file:
        g = json.load(file)
    groups = g["optimizer_groups_in_order"]
    with torch.device("meta"):
        network = TwoNetworks(model_of(path, 21))
    modules = dict(network.first.named_modules())
    for official, want in g["branch1_conv_kernel_stride_pad_dil"].items():
        conv = modules[ours_of(official)]
        assert [list(v) for v in (conv.kernel_size, conv.stride, conv.padding, conv.dilation)] == want, official
    for official, want in g["branch1_bn_eps_momentum"].items():
        assert [modules[ours_of(official)].eps, modules[ours_of(official)].momentum] == want, official
    optim = OptimConfig(lr=groups[0]["lr"], weight_decay=groups[0]["weight_decay"], momentum=groups[0]["momentum"])
    optimizer = build_optimizer(optim, decay_groups(network.parameters()))
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
    """The name of a module of ours, from the official one."""
    (key,) = deeplab_from_cps({f"branch1.{module}.weight": torch.zeros(1)})
    return key.removesuffix(".weight")


# ---- schedule, metrics, evaluation


def check_poly(path: Path) -> None:
    """Without warm-up, which no released run has."""
    g = read(path)
    ours = [float(g["base"]) * poly(step, int(g["total"]), float(g["power"])) for step in g["iters"].tolist()]
    assert ours == pytest.approx(g["lr"].tolist(), rel=0, abs=1e-12)


def check_metrics(path: Path) -> None:
    g = read(path)
    for case in sorted({key.split("_")[0] for key in g}):
        confusion = ConfusionMatrix(len(g[f"{case}_iou"]))
        confusion.update(g[f"{case}_pred"], g[f"{case}_gt"])
        assert_close(confusion.matrix, g[f"{case}_hist"])
        assert int(confusion.matrix.sum()) == g[f"{case}_labeled"]
        assert int(confusion.matrix.diagonal().sum()) == g[f"{case}_correct"]
        scores = confusion.scores()
        assert scores.per_class_iou == pytest.approx(g[f"{case}_iou"].tolist(), abs=1e-12, nan_ok=True)
        assert scores.miou == pytest.approx(float(g[f"{case}_miou"]), abs=1e-12)
        assert scores.miou_without_first == pytest.approx(float(g[f"{case}_miou_noback"]), abs=1e-12)
        assert scores.pixel_accuracy == pytest.approx(float(g[f"{case}_acc"]), abs=1e-12)


class Toy(nn.Module):
    """The network of the file: one convolution."""

    align_corners = True

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.conv2d(image, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


def check_evaluation(path: Path) -> None:
    """Of resized images OpenCV rounds gray levels otherwise: there scores differ a little, and near ties may too."""
    g = read(path)
    assert float(g["stride_rate"]) == pytest.approx(2 / 3)
    network, image, size = Toy(g["weight"], g["bias"]), g["img"].permute(2, 0, 1)[None], tuple(g["img"].shape[:2])
    crop, scales, flip = (int(g["crop"]),) * 2, tuple(map(float, g["scales"].tolist())), bool(g["flip"])
    for index, scale in enumerate(scales):
        score, _ = sum_logits(network, image, size, Protocol(crop, (scale,), flip))
        score, want = score[0].permute(1, 2, 0), g[f"score_{index}"]
        if scale == 1:
            close(score, want, rtol=1e-4, atol=1e-4)
        else:  # no pixel is more than a gray level off, in no pass
            most = (g["weight"].abs().sum((2, 3)) * GREY_LEVEL.flatten()).sum(1) * (1 + flip)
            assert ((score - want).abs() <= most).all()
            assert (score - want).abs().mean() < 0.01 * want.std()
    resized = any(scale != 1 for scale in scales)
    for name, window in (("pred", crop), ("whole_eval_pred", None)):
        if name in g:
            total, _ = sum_logits(network, image, size, Protocol(window, scales, flip))
            assert (total[0].argmax(0) == g[name]).float().mean() >= (0.98 if resized else 1.0)


def check_picture(path: Path) -> None:
    """Side by side; the released file shows labels with red and blue exchanged, which is mended."""
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
    g, ours = json.loads((OWN / f"config_{name}.json").read_text()), load_config(Config, CONFIGS / f"{config}.json")
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
    g = json.loads((OWN / f"{name}_colors.json").read_text())
    classes = VOC_CLASSES if source is VOC else Cityscapes.classes
    assert source.palette[: len(classes)].tolist() == g["class_colors"]
    assert list(classes) == [each.replace("/", "") for each in g["names"]]


# The first prefix that fits counts.
ADAPTERS: dict[str, Callable[[Path], None]] = {
    "arch_": check_architecture,
    "augment_": check_augmentation,
    "cutmix_masks": check_masks,
    "eval_": check_evaluation,
    "lr_": check_poly,
    "metrics": check_metrics,
    "network_": check_network,
    "normalize_": check_normalization,
    "ohem": check_ohem,
    "show_img": check_picture,
    "state_dict_": check_key_list,
    "step_": check_step,
}
