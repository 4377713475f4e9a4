"""Compare UniMatch, UniMatch V2 and FixMatch with the outputs of their released functions, file by file.

Every number (classes, thresholds, sizes, draws) is read from the file. Where ours departs from the released code on
purpose, the check names the departure.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from augmentation import Replay
from checks import (
    MEAN,
    STD,
    Golden,
    check_golden,
    check_supervised,
    close,
    close_gradient,
    close_loss,
    part,
    read,
    to_label,
    without_golden,
)
from networks import Caught, backbone_named, fill, listed_keys, official_keys, outline, read_json, unfilled
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from common import IGNORE
from common.augment import Photometric, apply_photometric_batch, draw_photometric
from common.augment.geometry import nearest_crop
from common.augment.mixing import box_mask
from common.config.sections import ModelConfig, OptimConfig
from common.engine.monitor import Monitor
from common.evaluation import inference
from common.evaluation.inference import Protocol, sum_logits
from common.images import normalize
from common.losses import cross_entropy, label_and_confidence, ohem_cross_entropy, upsample
from common.mean_teacher import ema_decay, make_teacher, update_teacher
from common.metrics import ConfusionMatrix
from common.models import Segmenter, build_network
from common.models.encoders import resize_to_multiple
from common.models.positions import dinov2_positions
from common.models.weights import load_state
from common.optim import build_optimizer, poly, set_lr
from common.released.weights import UNIMATCH, UNIMATCH_V2, UNIMATCH_V2_UNUSED, segmenter_from_unimatch
from unimatch import train, train_fixmatch, train_v2
from unimatch.augment import STRONG, LongSideCrop, draw_cutmix_box, mix_maps
from unimatch.losses import (
    consistency_loss,
    draw_kept,
    draw_spared,
    drop_channels,
    first_view_factors,
    fixmatch_loss,
    unimatch_loss,
    unimatch_v2_loss,
    with_complement,
)

COLORS = ("brightness", "contrast", "saturation", "hue")  # numbers 0 to 3 of the files
# Largest and mean difference in gray levels between ours, in float, and Pillow's 8 bits.
SINGLE, HUE, BLUR, TOGETHER = (1.2, 0.5), (10, 0.9), (12, 2.1), (16, 2.5)
RUN = SimpleNamespace(autocast=nullcontext)


def test_golden(golden: Path) -> None:
    check_golden(golden, ADAPTERS)


def test_every_adapter_has_a_golden_of_our_own() -> None:
    assert without_golden("unimatch", ADAPTERS) == set(OPTIONAL)


# ---- augmentation


def check_normalize(path: Path) -> None:
    g = read(path)
    close(normalize(g["image_u8"].permute(2, 0, 1)), g["out_image"])


def check_geometry(path: Path) -> None:
    g = read(path)
    flip = float(g["flip_draw"])
    draws = [(0, *g["long_side_range"].tolist(), int(g["long_side"]))]
    draws += [(0, *g[f"{name}_range"].tolist(), int(g[name])) for name in ("left", "top")]
    label = None if int(g["ignore_value"]) != IGNORE else g["mask"]
    close_crop(g, torch.tensor([*draws, (1, 0, 1, flip)]), label, g["out_image_u8"], g["out_mask"], g["ignore_value"])


def close_crop(
    g: Golden, draws: Tensor, label: Tensor | None, want_image: Tensor, want_label: Tensor, ignore: int = IGNORE
) -> None:
    """Compare a crop: images within a gray level, labels exactly, or those of a neighbor in a row or column.

    An unlabeled image has no label here; then the padding is compared, which files store as `ignore`.
    """
    crop, image = LongSideCrop((int(g["crop_size"]),) * 2), g["image_u8"].permute(2, 0, 1)
    ours, our_label = crop(image, label, Replay(draws.double()))
    assert (ours.int() - want_image.permute(2, 0, 1).int()).abs().max() <= 1
    if label is None:
        assert_close(our_label == IGNORE, want_label == ignore)
        return
    allowed = our_label == want_label
    for down, right in ((0, 1), (1, 0), (1, 1)):
        moved = label.roll((down, right), (0, 1))
        allowed |= crop(image, moved, Replay(draws.double()))[1] == want_label
    assert allowed.all()
    assert (our_label != want_label).float().mean() < 0.1


def strong_photometric(order: Tensor, factors: Tensor, gray: bool, sigma: float) -> Photometric:
    """Color changes of a file; a hue factor is a change in turns."""
    jitter = tuple((COLORS[index], float(factors[index])) for index in order.tolist() if index >= 0)
    return Photometric(jitter, sigma if sigma > 0 else None, gray)


def changed(image: Tensor, photometric: Photometric) -> Tensor:
    """Make color changes of an image [H,W,3] of 8 bits: floats [3,H,W] in [0,1]."""
    return apply_photometric_batch(image.permute(2, 0, 1)[None] / 255, [photometric])[0]


def close_colors(ours: Tensor, want: Tensor, photometric: Photometric) -> None:
    """Compare floats [3,H,W] in [0,1] with 8 bits [H,W,3] within what rounding and Pillow's approximations explain."""
    error = (ours * 255 - want.permute(2, 0, 1).float()).abs()
    names = [name for name, _ in photometric.jitter] + ["gray"] * photometric.gray
    names += ["blur"] * (photometric.blur_sigma is not None)
    most, mean = TOGETHER if len(names) > 1 else {"hue": HUE, "blur": BLUR}.get("".join(names), SINGLE)
    assert error.max() <= most and error.mean() <= mean, f"{error.max():.2f}, {error.mean():.2f} gray levels"


def check_colors(path: Path) -> None:
    g = read(path)
    photometric = strong_photometric(g["order"], g["factors"], bool(g["gray"]), float(g["sigma"]))
    close_colors(changed(g["image_u8"], photometric), g["out_u8"], photometric)


def check_item(path: Path) -> None:
    g = read(path)
    if "out_label" in g:
        close_crop(g, g["draws"][:4], g["mask"], g["out_image_u8"], g["out_label"])
        return
    close_crop(g, g["draws"][:4], None, g["out_weak_u8"], g["out_ignore"])
    side = int(g["crop_size"])
    for view in ("1", "2"):
        order = g[f"order{view}"] if g[f"jitter{view}"] else torch.full((4,), -1)
        photometric = strong_photometric(order, g[f"factors{view}"], bool(g[f"gray{view}"]), float(g[f"sigma{view}"]))
        ours = changed(g["out_weak_u8"], photometric)
        close_colors(ours, g[f"out_strong{view}_u8"], photometric)
        box = drawn_box(side, *box_draws_of_item(g, view))
        assert [box.top, box.left, box.bottom - box.top, box.right - box.left] == g[f"box_yxhw{view}"].tolist()
        assert_close(~box_mask([box], side, side, torch.device("cpu"))[0], g[f"out_box{view}"].bool())


def box_draws_of_item(g: Golden, view: str) -> tuple[float, float, list[tuple[float, int, int]]]:
    """First draw, area and the accepted attempt of a view's box."""
    top, left, *_ = g[f"box_yxhw{view}"].tolist()
    area = float(g[f"box_area{view}"])
    return (0.0 if area else 1.0), area, [(float(g[f"box_ratio{view}"]), left, top)]


class BoxDraws:
    """Recorded draws of a box in place of random ones."""

    def __init__(self, first: float, area: float, attempts: Sequence[tuple[float, int, int]]) -> None:
        self.first, self.values = first, [area, *(value for attempt in attempts for value in attempt)]

    def random(self) -> float:
        return self.first

    def uniform(self, low: float, high: float) -> float:
        assert low <= self.values[0] <= high
        return self.values.pop(0)

    def integers(self, low: int, high: int) -> int:
        assert low <= self.values[0] < high
        return int(self.values.pop(0))


def drawn_box(side: int, first: float, area: float, attempts: Sequence[tuple[float, int, int]]):
    draws = BoxDraws(first, area, attempts)
    box = draw_cutmix_box(draws, side, side)
    assert not area or not draws.values
    return box


def check_boxes(path: Path) -> None:
    g = read(path)
    columns, attempt_columns = g["columns"].tolist(), g["attempt_columns"].tolist()
    attempts = [dict(zip(attempt_columns, row, strict=True)) for row in g["attempts"].tolist()]
    for number, row in enumerate(g["rows"].tolist()):
        r = dict(zip(columns, row, strict=True))
        tried = [(a["ratio_draw"], int(a["x_draw"]), int(a["y_draw"])) for a in attempts if a["row"] == number]
        assert len(tried) == r["attempts"]
        box = drawn_box(int(r["size"]), r["first_draw"], r["area_draw"], tried)
        assert (box.top, box.left, box.bottom - box.top, box.right - box.left) == (r["y"], r["x"], r["h"], r["w"]), r


def check_box_statistics(path: Path) -> None:
    """Compare means and deviations within five standard errors."""
    g = read(path)
    size, draws, rng = int(g["size"]), int(g["draws"]), np.random.default_rng(0)
    boxes = [draw_cutmix_box(rng, size, size) for _ in range(draws)]
    empty = sum(box.bottom == 0 for box in boxes)
    assert abs(empty - int(g["none"])) < 5 * math.sqrt(draws / 2)
    boxes = [box for box in boxes if box.bottom]
    corners = np.array([(b.top, b.left, b.bottom, b.right) for b in boxes], float)
    y, x, bottom, right = corners.T
    height, width = bottom - y, right - x
    ours = {"y": y, "x": x, "h": height, "w": width, "area_fraction": height * width / size**2}
    ours |= {"h_over_w": height / width, "log_h_over_w": np.log(height / width)}
    ours |= {"gap_bottom": size - bottom, "gap_right": size - right}
    for index, column in enumerate(g["columns"].tolist()):
        close_statistics(ours[column], float(g["mean"][index]), float(g["std"][index]), draws - int(g["none"]))


def close_statistics(ours: np.ndarray, mean: float, std: float, count: int) -> None:
    """Compare mean and deviation with recorded ones of `count` draws."""
    assert abs(ours.mean() - mean) <= 5 * math.hypot(std / math.sqrt(count), ours.std() / math.sqrt(len(ours))) + 1e-12
    assert ours.std() == pytest.approx(std, rel=0.1, abs=1e-9)


def check_statistics(path: Path) -> None:
    """Compare how often each operation is drawn, its range, and the independence of the two views."""
    g = read(path)
    items = int(g["items"])
    rngs = [np.random.default_rng(index) for index in range(items)]
    views = [[(draw_photometric(rng, STRONG), draw_cutmix_box(rng, 64, 64)) for rng in rngs] for _ in range(2)]
    flat = [*views[0], *views[1]]
    ours = {"jitter": [bool(p.jitter) for p, _ in flat], "gray": [p.gray for p, _ in flat]}
    ours |= {"blur": [p.blur_sigma is not None for p, _ in flat], "box": [box.bottom > 0 for _, box in flat]}
    ours |= {name: [dict(p.jitter)[name] for p, _ in flat if p.jitter] for name in COLORS}
    ours["sigma"] = [p.blur_sigma for p, _ in flat if p.blur_sigma is not None]
    ours["first_operation"] = [COLORS.index(p.jitter[0][0]) for p, _ in flat if p.jitter]
    side = int(g["image_long_side"])
    image = torch.zeros(3, side, side // 2, dtype=torch.uint8)
    with mock.patch("unimatch.augment.nearest_crop", side_effect=nearest_crop) as crop:
        flips = []
        with mock.patch("unimatch.augment.mirror", side_effect=lambda *args: flips.append(args[2]) or args[:2]):
            for rng in rngs:
                LongSideCrop((side, side))(image, None, rng)
    ours["flip"] = flips
    for index, column in enumerate(g["columns"].tolist()):
        values = np.array(ours[column], float)
        close_statistics(values, float(g["mean"][index]), float(g["std"][index]), min(len(values), 2 * items))
        spread = float(g["std"][index])
        assert values.min() >= float(g["min"][index]) - 0.1 * spread
        assert values.max() <= float(g["max"][index]) + 0.1 * spread
    named = [np.array(ours[name], float).reshape(2, -1) for name in ("jitter", "gray", "blur", "box")]
    for one in named:
        assert abs(np.corrcoef(one)[0, 1]) < 5 / math.sqrt(items)
    first = np.bincount(ours["first_operation"], minlength=4) / sum(ours["jitter"])
    np.testing.assert_allclose(first, g["first_operation_share"], atol=5 * math.sqrt(0.25 * 0.75 / items))
    lengths = [max(call.args[1].height, call.args[1].width) for call in crop.call_args_list]
    counts = np.array([lengths.count(length) for length in g["long_sides"].tolist()])
    assert counts.sum() == items
    spread = np.sqrt(counts + g["long_side_count"].numpy() + 1)
    assert (np.abs(counts - g["long_side_count"].numpy() * items / int(g["long_side_count"].sum())) < 5 * spread).all()


# ---- mixing


def check_mix(path: Path) -> None:
    """Compare mixed images, labels, confidences and padding, with the partner of the file."""
    g = read(path)

    def partner(name: str) -> Tensor:
        return g[name][g["partner"]] if "partner" in g else g[f"partner_{name}"]

    for view in ("1", "2"):
        names = (f"image{view}", "label", "conf", "ignore")
        mixed = mix_maps([g[name] for name in names], [partner(name) for name in names], g[f"box{view}"] == 0)
        for name, ours in zip(("image", "label", "conf", "ignore"), mixed):
            assert_close(ours, g[f"out_{name}{view}"], rtol=0, atol=0)


# ---- losses


def check_pseudo(path: Path) -> None:
    g = read(path)
    label, confidence = label_and_confidence(g["logits"])
    assert_close(label, g["label"].long())
    close(confidence, g["conf"])


def supervised(logits: Tensor, label: Tensor, thresh: float, min_kept: int) -> Tensor:
    """Supervised loss of a file; without pixels to keep, the release drops none."""
    return cross_entropy(logits, label) if min_kept <= 0 else ohem_cross_entropy(logits, label, thresh, min_kept)


def check_ohem(path: Path) -> None:
    g = read(path)
    logits = g["pred"].requires_grad_()
    loss = supervised(logits, to_label(g["label"]), float(g["thresh"]), int(g["min_kept"]))
    loss.backward()
    close_loss(loss, g["loss"])
    close_gradient(logits.grad, g["grad_pred"].nan_to_num(0.0))


def view_loss(g: Golden, view: str, logits: Tensor) -> Tensor:
    label = g[f"{view}_label"].long().masked_fill(g[f"{view}_ignore"] == IGNORE, IGNORE)
    return consistency_loss(logits, label, g[f"{view}_conf"], float(g["conf_thresh"]))


def check_losses(path: Path, views: Sequence[str], total: Callable[..., Tensor]) -> None:
    """Compare the loss of each view, their sum and its gradients; a part that is NaN in the release is 0 here."""
    g = read(path)
    logits = {view: g[f"{view}_logits"].requires_grad_() for view in ("x", *views)}
    labeled = supervised(logits["x"], to_label(g["x_label"]), float(g["ohem_thresh"]), int(g["ohem_min_kept"]))
    parts = {"x": labeled} | {view: view_loss(g, view, logits[view]) for view in views}
    loss = total(*parts.values())
    loss.backward()
    for view, ours in parts.items():
        if f"loss_{view}" in g:
            close_loss(ours, g[f"loss_{view}"])
        assert logits[view].grad.isfinite().all()
        want = g[f"grad_{view}"]
        close_gradient(logits[view].grad, want.nan_to_num(0.0))
    if not g["loss"].isnan():
        close(loss, g["loss"])
    if "mask_ratio" in g and not g["mask_ratio"].isnan():
        label = g["fp_label"].long().masked_fill(g["fp_ignore"] == IGNORE, IGNORE)
        close(confident_share(label, g["fp_conf"], float(g["conf_thresh"])), g["mask_ratio"])


def confident_share(pseudo_label: Tensor, confidence: Tensor, threshold: float) -> Tensor:
    """The `confident` that a run logs, which is `mask_ratio` in the release."""
    alone = SimpleNamespace(device=torch.device("cpu"), reduce=lambda counts, how: counts, is_main_process=True)
    classes = int(pseudo_label[pseudo_label != IGNORE].max()) + 1
    monitor = Monitor(range(classes), 1, alone, None)
    monitor.count_pseudo_labels(pseudo_label, confidence >= threshold)
    return torch.tensor(monitor.read(step=0)["confident"])


# ---- complementary dropout


def complementary_masks(kept: Tensor, spared: Tensor) -> Tensor:
    """Factors [2B,C] of both views."""
    return with_complement(first_view_factors(kept, spared))


def check_complementary(path: Path) -> None:
    g = read(path)
    taps = [g[f"tap{index}"].transpose(1, 2).unsqueeze(3) for index in range(4)]
    factors = complementary_masks(g["bernoulli"].bool(), g["spared"].bool())
    for index, ours in enumerate(drop_channels(taps, [factors] * len(taps))):
        assert_close(ours.squeeze(3).transpose(1, 2), g[f"out_tap{index}"], rtol=0, atol=0)


def check_complementary_statistics(path: Path) -> None:
    """Compare frequencies. In a batch of one, half an image is spared in the release and here: none."""
    g = read(path)
    draws, batch, channels = int(g["draws"]), int(g["batch_per_view"]), int(g["channels"])
    spared = torch.tensor([draw_spared(0, range(batch * i, batch * (i + 1)), batch, 0.5) for i in range(draws)])
    assert spared.sum(1).unique().tolist() == g["spared_per_draw"].tolist()
    error = 5 * math.sqrt(0.25 / draws) * 2
    assert_close(spared.float().mean(0), g["spared_frequency_per_image"].float(), rtol=0, atol=error)
    rngs = [np.random.default_rng(index) for index in range(draws)]
    (kept,) = draw_kept(rngs, [channels], torch.device("cpu"))
    assert abs(float(kept.float().mean()) - float(g["kept_fraction_of_view1"])) < 5 * math.sqrt(0.5 / draws / channels)
    masks = complementary_masks(kept, torch.zeros(draws, dtype=torch.bool))
    assert masks.unique().tolist() == g["values_when_dropped"].tolist()
    assert (sum(masks.chunk(2)) == 2).all()


# ---- teacher, learning rate


class Weights(nn.Module):
    """Flat parameters, a float buffer and an integer one."""

    def __init__(self, parameters: Tensor, buffer: Tensor) -> None:
        super().__init__()
        self.flat = nn.Parameter(parameters.clone())
        self.register_buffer("running_mean", buffer.clone())
        self.register_buffer("counter", torch.tensor(0))


def check_ema(path: Path) -> None:
    """Compare parameters, float buffers and decays. Integers are copied here, and averaged in the release."""
    g = read(path)
    teacher = make_teacher(Weights(g["teacher_first"], g["teacher_running_mean_first"]))
    cap = float(g["cap"])
    for step, (weights, mean) in enumerate(zip(g["student"], g["student_running_mean"], strict=True)):
        student = Weights(weights, mean)
        student.counter.fill_(step)
        decay = ema_decay(step, cap)
        assert decay == pytest.approx(float(g["decay"][step]), abs=1e-12)
        update_teacher(teacher, student, decay, buffers=True)
        close(teacher.flat, g["teacher"][step])
        close(teacher.running_mean, g["teacher_running_mean"][step])
        assert int(teacher.counter) == step
    nothing = torch.zeros(1)
    for index, step in enumerate(g["single_step"].tolist()):
        teacher = make_teacher(Weights(g["single_before"][index], nothing))
        decay = ema_decay(step, cap)
        assert decay == pytest.approx(float(g["single_decay"][index]), abs=1e-12)
        update_teacher(teacher, Weights(g["single_student"][index], nothing), decay, buffers=True)
        close(teacher.flat, g["single_after"][index])


def check_lr(path: Path) -> None:
    """Compare the rates of encoder and rest; the release sets them after the step, one step late."""
    g = read(path)
    optimizer = make_optimizer(g, OneLayer(), "sgd")
    schedules = [(int(g["total_steps"]), range(len(g["set_after_step"])), g["set_after_step"])]
    schedules.append((int(g["sampled_total"]), g["sampled_step"].tolist(), g["sampled_set_after_step"]))
    for total, steps, rates in schedules:
        for step, (encoder, rest) in zip(steps, rates.tolist(), strict=True):
            set_lr(optimizer, poly(step, total, float(g["power"])))
            found = group_rates(optimizer)
            assert found == pytest.approx({"encoder": encoder, "rest": rest}, rel=1e-9)


class OneLayer(Segmenter):
    """The smallest network with an encoder."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 1, 1), True)
        self.classifier = nn.Conv2d(1, 1, 1)


def make_optimizer(g: Golden, network: nn.Module, name: str) -> torch.optim.Optimizer:
    """Build the optimizer of a file that states the encoder's rate and the factor of the rest."""
    factor = float(g["lr_multi"])
    optim = OptimConfig(name, float(g["base_lr"]) * factor, nesterov=False, encoder_lr_scale=1 / factor)
    optim.weight_decay = float(g.get("weight_decay", optim.weight_decay))
    optim.momentum = float(g.get("momentum", optim.momentum))
    return build_optimizer(optim, network)


def group_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Rates of encoder and rest; without a group of its own the encoder has the rate of all."""
    rest, *encoder = optimizer.param_groups
    return {"encoder": (encoder[0] if encoder else rest)["lr"], "rest": rest["lr"]}


# ---- evaluation


class WindowConvolution(nn.Module):
    """Network of the files: a 3x3 convolution, plus its own mean over the window."""

    align_corners = True

    def __init__(self, g: Golden) -> None:
        super().__init__()
        self.weight, self.bias = g["weight"], g["bias"]

    def forward(self, image: Tensor) -> Tensor:
        logits = F.conv2d(image, self.weight, self.bias, padding=1)
        return logits + logits.mean((2, 3), keepdim=True)


def check_sliding(path: Path) -> None:
    """Compare summed probabilities where the release shifts windows back; there, a side has a window at least.

    Departures: a side below the window gets one window here, a second one at a negative start in the release.
    """
    g = read(path)
    window, size = int(g["window"]), tuple(g["image"].shape[-2:])
    if min(size) < window:
        pytest.skip("optional: the release counts parts of a side below the window twice")
    protocol = Protocol(crop=(window, window), summed="probabilities")
    image = g["image"] * STD + MEAN  # the golden is normalized
    ours, _ = sum_logits(WindowConvolution(g), image, size, protocol)
    assert windows_of(size, window) == [tuple(row) for row in g["windows"].tolist()]
    close(ours, g["summed"], rtol=1e-4, atol=1e-5)
    check_prediction(ours.argmax(1), ours, g, "", g["label"])


def check_prediction(prediction: Tensor, scores: Tensor, g: Golden, prefix: str, label: Tensor) -> None:
    """Compare predictions except for near ties, and counts and IoU of the file's own predictions."""
    best = scores.topk(2, 1).values
    assert not ((prediction != g[f"{prefix}prediction"]) & (best[:, 0] - best[:, 1] > 5e-5)).any()
    confusion = ConfusionMatrix(scores.shape[1])
    confusion.update(g[f"{prefix}prediction"].long(), to_label(label))
    intersection, union = counts(confusion)
    assert_close(intersection, g[f"{prefix}intersection"].flatten())
    assert_close(union, g[f"{prefix}union"].flatten())


def counts(confusion: ConfusionMatrix) -> tuple[Tensor, Tensor]:
    """Intersection and union of each class."""
    matrix = confusion.matrix.long()
    return matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()


def check_windows(path: Path) -> None:
    g = read(path)
    names, window = g["columns"].tolist(), int(g["window"])
    rows = [dict(zip(names, row, strict=True)) for row in g["windows"].tolist()]
    sizes = sorted({(row[names[0]], row[names[1]]) for row in rows})
    for height, width in sizes:
        want = [tuple(row.values())[2:] for row in rows if (row[names[0]], row[names[1]]) == (height, width)]
        assert windows_of((height, width), window) == want


def windows_of(size: Sequence[int], window: int) -> list[tuple[int, int, int, int]]:
    """(row, column, height, width) of the windows over an image."""
    rows, columns = (inference._starts(side, window) for side in size)
    return [(row, column, window, window) for row in rows for column in columns]


def check_multiple(path: Path) -> None:
    g = read(path)
    network, multiple = WindowConvolution(g), int(g["multiple"])
    protocol = Protocol(multiple=multiple, fit="resize")
    for index in range(int(g["images"])):
        own = part(g, f"i{index}_")
        image = own["image"] * STD + MEAN
        seen = []
        hook = network.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        ours, _ = sum_logits(network, image, tuple(image.shape[-2:]), protocol)
        hook.remove()
        assert list(seen[0].shape[-2:]) == own["model_size"].tolist()
        close(seen[0], own["resized"], rtol=1e-4, atol=2e-5)
        close(ours, own["logits"], rtol=1e-4, atol=2e-5)
        check_prediction(ours.argmax(1), ours, own, "", own["label"])


def check_sizes(path: Path) -> None:
    """Compare sizes; a side whose nearest multiple is 0 becomes one multiple here."""
    g = read(path)
    multiple = int(g.get("multiple", 14))
    for side, want in zip(g["side"].tolist(), g["resized"].tolist(), strict=True):
        resized = resize_to_multiple(torch.zeros(1, 1, side, multiple), multiple)
        assert tuple(resized.shape[-2:]) == (max(want, multiple), multiple)


def check_miou(path: Path) -> None:
    """Compare counts and IoU. The released mean counts an absent class as 0; ours leaves it out."""
    g = read(path)
    confusion, start = ConfusionMatrix(int(g["num_classes"])), 0
    for height, width in g["sizes"].tolist():
        image = slice(start, start := start + height * width)
        confusion.update(g["pred"][image].long(), to_label(g["target"][image]))
    intersection, union = counts(confusion)
    assert_close(intersection, g["intersection"].sum(0))
    assert_close(union, g["union"].sum(0))
    assert_close(confusion.matrix.long().sum(1), g["target_area"].sum(0))
    occurs = (union > 0).numpy()
    scores, want = confusion.scores(), g["iou"].numpy()
    np.testing.assert_allclose(100 * np.array(scores.per_class_iou)[occurs], want[occurs], rtol=0, atol=1e-9)
    if occurs.any():
        assert 100 * scores.miou == pytest.approx(want[occurs].mean(), abs=1e-9)
        assert want.mean() == pytest.approx(float(g["miou"]), abs=1e-9)


# ---- lists


def check_lists(path: Path) -> None:
    pytest.skip("optional: lists are not repeated here, streams are endless")


def skip_smaller_windows(path: Path) -> None:
    pytest.skip("optional: windows at the border are shifted back here and smaller in UniMatch V1")


# ---- networks


def official(network: Segmenter) -> dict[str, tuple[int, ...]]:
    """Key list of the release, by which files fill weights: from ours, plus what the release never uses."""
    names = UNIMATCH_V2 if hasattr(network.encoder, "body") else UNIMATCH
    shapes = official_keys(network, names)
    if names is UNIMATCH_V2:
        if network.encoder.info.name.startswith("vit_giant"):  # its gated MLP, whose layers timm names otherwise
            names_of = {".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."}
            for ours, theirs in names_of.items():
                shapes = {key.replace(ours, theirs): shape for key, shape in shapes.items()}
        shapes["backbone.mask_token"] = (1, network.encoder.channels[0])
        unit = {key: shape for key, shape in shapes.items() if ".refinenet4.resConfUnit2." in key}
        shapes |= {key.replace("resConfUnit2", "resConfUnit1"): shape for key, shape in unit.items()}
    return shapes


def filled(model: ModelConfig) -> Segmenter:
    network = unfilled(lambda: build_network(model))
    state = segmenter_from_unimatch(fill(official(network)))
    load_state(network, state, "the golden's rule", "the segmenter")
    return network


def resnet_config(path: Path, num_classes: int, rates: Sequence[int] | None = None) -> ModelConfig:
    backbone = backbone_named(path, "resnet50")
    return ModelConfig(num_classes, backbone, "deep", "v3plus_unimatch", rates=rates, pretrained=False)


def dinov2_config(size: str, num_classes: int) -> ModelConfig:
    name = f"vit_{size}_patch14_dinov2"
    return ModelConfig(num_classes, name, head="dpt", pretrained=False, dinov2_positions=True)


SAME = {"rtol": 1e-3, "atol": 1e-4}


def check_resnet(path: Path) -> None:
    g = read(path)
    assert int(g["output_stride"]) == 16
    model = resnet_config(path, int(g["num_classes"]), tuple(g["aspp_rates"].tolist()))
    with mock.patch.object(train, "build_network", filled):
        network = train.UniMatchNetwork(model)
    segmenter, image = network.segmenter, g["x"]
    stages = {name: segmenter.encoder[name] for name in ("maxpool", "layer1", "layer2", "layer3", "layer4")}
    caught = Caught(aspp=segmenter.aspp, low=segmenter.low, fuse=segmenter.decoder, **stages)

    def logits_of(one: Tensor) -> Tensor:
        return upsample(one, image.shape[-2:], segmenter.align_corners)

    with torch.no_grad():
        logits = logits_of(segmenter(image))
        for name, values in caught.items():
            assert list(values.shape) == g[f"shape_{name}"].tolist()
            close(values.abs().double().mean(), g[f"{name}_absmean"], **SAME)
        close(caught["layer1"][:, ::32, ::4, ::4], g["layer1_sub"], **SAME)
        close(caught["layer4"][:, ::64], g["layer4_sub"], **SAME)
        close(caught["aspp"][:, ::16], g["aspp_sub"], **SAME)
        close(caught["fuse"][:, ::32, ::2, ::2], g["fuse_sub"], **SAME)
        close(logits[:, :, ::4, ::4], g["logits_sub"], **SAME)
        close(logits.double().sum((2, 3)), g["logits_sum"], rtol=1e-3, atol=1e-2)
        check_perturbed(network, g, "", logits_of, SAME)
        if "train_drop_low" in g:
            network.train()
            # Batch norm over four pooled values: in float64 ours is 6e-4 from the recorded float32, as in float32.
            check_perturbed(network, g, "train_", logits_of, {"rtol": 1e-3, "atol": 2e-3})
            ours, state = network.segmenter.state_dict(), segmenter_from_unimatch(part(g, "train_after/"))
            for key, want in state.items():
                if want.is_floating_point():
                    close(ours[key], want, **SAME)


def check_perturbed(
    network: nn.Module, g: Golden, prefix: str, logits_of: Callable[[Tensor], Tensor], same: dict[str, float]
) -> None:
    """Compare clean and perturbed logits of the file's images."""
    kept = [g[f"{prefix}drop_low"].bool(), g[f"{prefix}drop_high"].bool()]
    clean, perturbed = (logits_of(logits) for logits in network.whole_and_dropped(g["x"], kept))
    if f"{prefix}logits_sub" in g:
        close(clean[:, :, ::4, ::4], g[f"{prefix}logits_sub"], **same)
    close(perturbed[:, :, ::4, ::4], g[f"{prefix}fp_logits_sub"], **same)


def size_of(path: Path) -> str:
    return next(size for size in ("small", "base", "large", "giant") if size in path.name)


def check_dpt_head(path: Path) -> None:
    """Compare the decoder and the classifier on taps of a file; their weights are filled without the encoder's keys."""
    g = read(path)
    network = unfilled(lambda: build_network(dinov2_config(size_of(path), int(g["num_classes"]))))
    before = "head."
    shapes = {key.removeprefix(before): shape for key, shape in official(network).items() if key.startswith(before)}
    state = {before + key: value for key, value in fill(shapes).items()}
    state = segmenter_from_unimatch(state | {"backbone.cls_token": torch.zeros(1)})
    encoder = {f"encoder.{key}": value for key, value in network.encoder.state_dict().items()}
    load_state(network, {**state, **encoder}, "the golden's rule", "the segmenter")
    taps = [maps_of(g[f"tap{index}"] / 4, g["grid"]) for index in range(4)]
    decoder = network.decoder
    caught = Caught(**{f"layer{i + 1}": decoder.layers[i] for i in range(4)})
    fused = Caught(**{f"fusion{i + 1}": decoder.fusions[i] for i in range(4)})
    with torch.no_grad():
        out = network.classifier(network.decode(taps))
    assert list(out.shape) == g["out_shape"].tolist()
    stride = int(g["out_stride"])
    close(out[:, :, ::stride, ::stride], g["out_sub"], **SAME)
    close(out.double().sum((2, 3)), g["out_sum"], rtol=1e-3, atol=1e-2)
    check_stages(caught | fused, g)


def check_stages(caught: dict[str, Tensor], g: Golden) -> None:
    for name, values in caught.items():
        if f"shape_{name}" in g:
            assert list(values.shape) == g[f"shape_{name}"].tolist()
            close(values.abs().double().mean(), g[f"{name}_absmean"], **SAME)


def maps_of(tokens: Tensor, grid: Tensor) -> Tensor:
    """[B,h*w,C] -> [B,C,h,w]."""
    return tokens.transpose(1, 2).unflatten(2, grid.tolist()).contiguous()


def image_of(g: Golden) -> Tensor:
    if "x_times_16" in g:
        return g["x_times_16"] / 16
    coarse = g["x_coarse"].repeat_interleave(14, 2).repeat_interleave(14, 3)
    return coarse + g["x_tile"].repeat(1, *g["x_coarse"].shape[-2:])


def check_dpt(path: Path) -> None:
    g = read(path)
    network, image = filled(dinov2_config(size_of(path), int(g["num_classes"]))), image_of(g)
    assert list(image.shape) == g["shape"].tolist()
    caught = Caught(**{f"layer{i + 1}": network.decoder.layers[i] for i in range(4)})
    fused = Caught(**{f"fusion{i + 1}": network.decoder.fusions[i] for i in range(4)})
    with torch.no_grad():
        taps = network.encode(image)
        strides = int(g["token_stride"]), int(g["channel_stride"])
        for index, tap in enumerate(taps):
            tokens = tap.flatten(2).transpose(1, 2)
            assert list(tokens.shape) == g[f"tap{index}_shape"].tolist()
            close(tokens[:, :: strides[0], :: strides[1]], g[f"tap{index}_sub"], rtol=1e-4, atol=1e-4)
        if "bernoulli" in g:
            factors = complementary_masks(g["bernoulli"].bool(), g["spared"].bool())
            taps = drop_channels(taps, [factors] * len(taps))
        logits = upsample(network.classifier(network.decode(taps)), image.shape[-2:], network.align_corners)
    body = network.encoder.body
    positions = dinov2_positions(body.pos_embed, body.patch_embed.grid_size, tuple(g["grid"].tolist()))[0].detach()
    close(positions[1:][:: strides[0], :: strides[1]], g["pos_sub"], rtol=1e-4, atol=1e-5)
    close(positions[0, :: strides[1]], g["pos_class_sub"])
    stride = int(g["logits_stride"])
    assert list(logits.shape) == g["logits_shape"].tolist()
    close(logits[:, :, ::stride, ::stride], g["logits_sub"], rtol=1e-3, atol=1e-3)
    check_stages(caught | fused, g)


def check_resnet_keys(path: Path) -> None:
    """Compare keys, shapes, numbers of parameters, strides and dilations of the listed networks with ours."""
    listed = read_json(path)
    for name in (name for name in listed if not name.startswith(("conv_geometry", "parameters"))):
        backbone, num_classes = name.split("_")
        network = outline(partial(build_network, resnet_config(Path(backbone), int(num_classes))))
        assert official(network) == listed_keys(path, name)
        assert sum(p.numel() for p in network.parameters()) == listed[f"parameters_{name}"]
        check_convolutions(network, listed[f"conv_geometry_{name}"], UNIMATCH)


def check_convolutions(network: nn.Module, listed: dict, names: dict[str, str]) -> None:
    """Compare stride, dilation and padding of convolutions where stride or dilation is not 1."""
    ours = {}
    for key, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and (module.stride, module.dilation) != ((1, 1), (1, 1)):
            theirs, own = next((a, b) for a, b in names.items() if f"{key}.".startswith(b))
            ours[(theirs + f"{key}.".removeprefix(own)).rstrip(".")] = [
                list(module.stride),
                list(module.dilation),
                list(module.padding),
            ]
    assert ours == listed


def check_dpt_keys(path: Path) -> None:
    listed = read_json(path)
    for name in (name for name in listed if name.split("_")[-1].isdigit()):
        size, num_classes = name.split("_")
        network = outline(partial(build_network, dinov2_config(size, int(num_classes))))
        theirs = listed_keys(path, name)
        assert official(network) == theirs
        unused = {key: shape for key, shape in theirs.items() if key.startswith(UNIMATCH_V2_UNUSED)}
        numbers = [sum(p.numel() for p in network.encoder.parameters()), 0]
        numbers[1] = sum(p.numel() for p in network.parameters()) - numbers[0]
        for key, shape in unused.items():
            numbers[not key.startswith("backbone.")] += math.prod(shape)
        assert numbers == listed[f"parameters_{size}"]
        assert list(network.encoder.taps) == listed[f"tapped_blocks_{size}"]
        check_convolutions(network, listed[f"conv_geometry_{size}"], UNIMATCH_V2)


# ---- whole steps


class BackboneA(nn.Module):
    """Stand-in encoder of the V1 steps: two convolutions with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, image: Tensor) -> list[Tensor]:
        low = F.relu(self.bn1(self.conv1(image)))
        return [low, F.relu(self.bn2(self.conv2(low)))]


class StandInA(Segmenter):
    """Stand-in network A of the goldens' README."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(BackboneA(), True)
        self.head = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.reduce = nn.Sequential(nn.Conv2d(6, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
        self.fuse = nn.Sequential(nn.Conv2d(7, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.classifier = nn.Conv2d(8, num_classes, 1)

    def decode(self, taps: Sequence[Tensor]) -> Tensor:
        low, high = taps
        high = F.interpolate(self.head(high), low.shape[-2:], mode="bilinear", align_corners=True)
        return self.fuse(torch.cat([self.reduce(low), high], 1))


class BackboneB(nn.Module):
    """Stand-in encoder of the V2 steps: patches, and four linear maps with a tap each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 10, 14, stride=14)
        self.mix = nn.ModuleList(nn.Linear(10, 10) for _ in range(4))

    def forward(self, image: Tensor) -> list[Tensor]:
        tokens, taps = self.embed(image), []
        for mix in self.mix:
            tokens = tokens + torch.tanh(mix(tokens.movedim(1, -1))).movedim(-1, 1)
            taps.append(tokens)
        return taps


class StandInB(Segmenter):
    """Stand-in network B of the goldens' README."""

    def __init__(self, num_classes: int, has_bn: bool) -> None:
        super().__init__(BackboneB(), True)
        self.head = nn.Module()
        self.head.proj = nn.ModuleList(nn.Linear(10, 6, bias=not has_bn) for _ in range(4))
        if has_bn:
            self.head.bn = nn.BatchNorm2d(6)
        self.head.cls = nn.Conv2d(6, num_classes, 1)
        self.has_bn = has_bn

    def decode(self, taps: Sequence[Tensor]) -> Tensor:
        y = sum(proj(tap.movedim(1, -1)) for proj, tap in zip(self.head.proj, taps)).movedim(-1, 1)
        return F.relu(self.head.bn(y) if self.has_bn else y)

    def classifier(self, feature: Tensor) -> Tensor:
        return self.head.cls(feature)


def own_keys(state: Golden) -> Golden:
    return {key.replace("backbone.", "encoder.", 1): value for key, value in state.items()}


def in_range(image: Tensor) -> Tensor:
    """Undo the normalization that training applies right before a network."""
    return image * STD + MEAN


def trained(module, network_class: str, stand_in: Segmenter, g: Golden) -> nn.Module:
    """Build the network of a script around a stand-in with the file's weights."""
    stand_in.load_state_dict(own_keys(part(g, "before/")))
    with mock.patch.object(module, "build_network", lambda _: stand_in):
        network = getattr(module, network_class)(None)
    if g.get("encoder_frozen", False):
        stand_in.freeze_encoder()
    return network.train()


def close_sub(ours: Tensor, own: Golden, key: str, rtol: float, atol: float) -> None:
    """Compare with a stored array, or with every 16th value of it."""
    if f"{key}_sub16" in own:
        close(ours.flatten()[::16], own[f"{key}_sub16"], rtol, atol)
    elif key in own:
        close(ours, own[key], rtol, atol)


def close_state(network: nn.Module, own: Golden, atol: float) -> None:
    """Compare parameters and buffers; integers of teachers are averaged in the release and copied here."""
    ours = network.state_dict()
    known = {key.removesuffix("_sub16") for key in own_keys(own)}
    assert known == set(ours)
    for key, values in ours.items():
        if values.is_floating_point():
            close_sub(values, own_keys(own), key, 1e-4, atol)


def finish(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, own: Golden, atol: float) -> None:
    """Backward, compare gradients, step with the file's rates (one step late in the release), compare weights."""
    optimizer.zero_grad()
    loss.backward()
    gradients = own_keys(part(own, "grad/"))
    for key, parameter in network.segmenter.named_parameters():
        if parameter.grad is None:
            assert (key not in gradients and f"{key}_sub16" not in gradients) or not gradients[key].any()
        else:
            close_sub(parameter.grad, gradients, key, 1e-3, 1e-5)
    encoder, rest = own["lr"].tolist()
    groups = optimizer.param_groups
    groups[0]["lr"] = rest
    for group in groups[1:]:
        group["lr"] = encoder
    optimizer.step()
    close_state(network.segmenter, part(own, "after/"), atol)


def close_targets(own: Golden, suffix: str, label: Tensor, confidence: Tensor, padding: Tensor) -> None:
    """Compare labels where nothing is padded, and confidences."""
    assert_close(label, own[f"label_{suffix}"].long().masked_fill(padding == IGNORE, IGNORE))
    close(confidence, own[f"conf_{suffix}"], rtol=1e-5, atol=2e-5)


def mixed_targets(own: Golden, view: int, weak: Sequence[Tensor], partner: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Mix labels and confidences as the step does, and compare."""
    label, confidence = mix_maps(weak, partner, own[f"u_box{view}"] == 0)
    assert_close(label, own[f"mixed_label{view}"].long().masked_fill(own[f"mixed_ignore{view}"] == IGNORE, IGNORE))
    if f"mixed_conf{view}" in own:
        close(confidence, own[f"mixed_conf{view}"], rtol=1e-5, atol=2e-5)
    else:
        close(confidence[:, ::3, ::3], own[f"mixed_conf{view}_sub"], rtol=1e-5, atol=2e-5)
    return label, confidence


def mixed_image(own: Golden, view: int, partner: Tensor) -> Tensor:
    (image,) = mix_maps([own[f"u_strong{view}"]], [partner], own[f"u_box{view}"] == 0)
    assert_close(image, own[f"mixed_image{view}"], rtol=0, atol=0)
    return image


def labeled_loss(own: Golden, g: Golden, logits: Tensor) -> Tensor:
    return supervised(logits, to_label(own["x_label"]), float(g["ohem_thresh"]), int(g["ohem_min_kept"]))


def close_logits(own: Golden, names: dict[str, Tensor], stride: int) -> None:
    for name, ours in names.items():
        close(ours[:, :, ::stride, ::stride], own[f"logits_{name}_sub"], rtol=1e-5, atol=2e-5)


def check_step_v1(path: Path) -> None:
    check_steps_v1(path, train, "UniMatchNetwork")


def check_step_fixmatch_v1(path: Path) -> None:
    check_steps_v1(path, train_fixmatch, "FixMatchNetwork")


def check_steps_v1(path: Path, module, network_class: str) -> None:
    """Compare whole steps of V1: labels of the partner in evaluation mode, own labels from the forward that trains."""
    g = read(path)
    network = trained(module, network_class, StandInA(int(g["num_classes"])), g)
    optimizer = make_optimizer(g, network, "sgd")
    for step in range(int(g["steps"])):
        own = part(g, f"s{step}_")
        views = (1, 2) if "drop_low" in own else (1,)
        padding = own["u_ignore"]
        partner = module.pseudo_labels(network.segmenter, in_range(own["p_weak"]), own["p_ignore"], RUN)
        assert network.segmenter.training
        close_targets(own, "p", *partner, own["p_ignore"])
        strong = [mixed_image(own, view, own[f"p_strong{view}"]) for view in views]
        if "drop_low" in own:
            kept = zip(*(own[name].bool().chunk(2) for name in ("drop_low", "drop_high")))
            output = network(own["x_image"], own["u_weak"], strong, *kept)
        else:
            output = network(own["x_image"], own["u_weak"], *strong)
        logits = {name: upsample(values, padding.shape[-2:], True) for name, values in output.items()}
        weak = module.targets(output["weak"], padding, True)
        close_targets(own, "w", *weak, padding)
        threshold = float(g["conf_thresh"])
        parts = {"x": labeled_loss(own, g, logits["labeled"])}
        names = ("s1", "s2") if len(views) == 2 else ("s",)
        keys = ("strong1", "strong2") if len(views) == 2 else ("strong",)
        for view, name, key in zip(views, names, keys):
            parts[name] = consistency_loss(logits[key], *mixed_targets(own, view, weak, partner), threshold)
        if "drop_low" in own:
            parts["fp"] = consistency_loss(logits["perturbed"], *weak, threshold)
        loss = (unimatch_loss if "fp" in parts else fixmatch_loss)(*parts.values())
        for name, ours in parts.items():
            close(ours, own[f"loss_{name}"], rtol=1e-5, atol=1e-6)
        close(loss, own["loss"], rtol=1e-5, atol=1e-6)
        close(confident_share(*weak, threshold), own["mask_ratio"], rtol=1e-5)
        named = {"x": "labeled", "w": "weak", "fp": "perturbed"} | {f"s{view}": key for view, key in zip(views, keys)}
        close_logits(own, {name: logits[key] for name, key in named.items() if key in logits}, 3)
        finish(network, optimizer, loss, own, 1e-5)


def check_step_v2(path: Path) -> None:
    check_steps_v2(path, train_v2, "UniMatchV2Network")


def check_step_fixmatch_v2(path: Path) -> None:
    check_steps_v2(path, train_fixmatch, "FixMatchNetwork")


def check_steps_v2(path: Path, module, network_class: str) -> None:
    """Compare whole steps of V2: the partner is the reversed batch in the release, and the next image here."""
    g = read(path)
    stand_in = StandInB(int(g["num_classes"]), bool(g["has_bn"]))
    network = trained(module, network_class, stand_in, g)
    teacher = make_teacher(network.segmenter).eval()
    optimizer = make_optimizer(g, network, "adamw")
    for step in range(int(g["steps"])):
        own = part(g, f"s{step}_")
        views, padding = ((1, 2) if "bernoulli" in own else (1,)), own["u_ignore"]
        weak = module.pseudo_labels(teacher, in_range(own["u_weak"]), padding, RUN)
        close_targets(own, "w", *weak, padding)
        partner = [values.flip(0) for values in weak]
        strong = [mixed_image(own, view, own[f"u_strong{view}"].flip(0)) for view in views]
        if "bernoulli" in own:
            factors = first_view_factors(own["bernoulli"].bool(), own["spared"].bool())
            output = network(own["x_image"], strong, [factors] * 4)
        else:
            output = network(own["x_image"], None, *strong)
        logits = {name: upsample(values, padding.shape[-2:], True) for name, values in output.items()}
        keys = ("strong1", "strong2") if len(views) == 2 else ("strong",)
        threshold = float(g["conf_thresh"])
        parts = [labeled_loss(own, g, logits["labeled"])]
        for view, key in zip(views, keys):
            parts.append(consistency_loss(logits[key], *mixed_targets(own, view, weak, partner), threshold))
        loss = (unimatch_v2_loss if len(views) == 2 else fixmatch_loss)(*parts)
        close(parts[0], own["loss_x"], rtol=1e-5, atol=1e-6)
        close(sum(parts[1:]) / len(views), own["loss_s"], rtol=1e-5, atol=1e-6)
        close(loss, own["loss"], rtol=1e-5, atol=1e-6)
        close(confident_share(*weak, threshold), own["mask_ratio"], rtol=1e-5)
        close_logits(own, {"x": logits["labeled"]} | {f"s{view}": logits[key] for view, key in zip(views, keys)}, 5)
        finish(network, optimizer, loss, own, 2e-5)
        decay = ema_decay(step, 0.996)
        assert decay == pytest.approx(float(own["ema_decay"]), abs=1e-12)
        update_teacher(teacher, network.segmenter, decay, buffers=True)
        close_state(teacher, part(own, "teacher/"), 2e-5)


OPTIONAL = ("lists_", "eval_sliding_v1", "eval_windows_v1")
ADAPTERS: dict[str, Callable[[Path], None]] = {
    "comp_drop_b": check_complementary,
    "comp_drop_stats": check_complementary_statistics,
    "cutmix_box_draws": check_boxes,
    "cutmix_box_stats": check_box_statistics,
    "cutmix_v": check_mix,
    "ema_": check_ema,
    "eval_miou": check_miou,
    "eval_multiple_sizes": check_sizes,
    "eval_multiple_v2": check_multiple,
    "eval_sliding_v1": skip_smaller_windows,
    "eval_sliding_v2": check_sliding,
    "eval_windows_v1": skip_smaller_windows,
    "eval_windows_v2": check_windows,
    "lists_": check_lists,
    "loss_fixmatch": partial(check_losses, views=("s",), total=fixmatch_loss),
    "loss_sup_ce": check_supervised,
    "loss_sup_ohem": check_ohem,
    "loss_v1": partial(check_losses, views=("s1", "s2", "fp"), total=unimatch_loss),
    "loss_v2": partial(check_losses, views=("s1", "s2"), total=unimatch_v2_loss),
    "lr_": check_lr,
    "net_dpt_": check_dpt,
    "net_dpt_head": check_dpt_head,
    "net_dpt_keys": check_dpt_keys,
    "net_v1_keys": check_resnet_keys,
    "net_v1_resnet": check_resnet,
    "pseudo": check_pseudo,
    "step_fixmatch_v1": check_step_fixmatch_v1,
    "step_fixmatch_v2": check_step_fixmatch_v2,
    "step_v1": check_step_v1,
    "step_v2": check_step_v2,
    "strong_aug_colour": check_colors,
    "strong_aug_geometry": check_geometry,
    "strong_aug_item": check_item,
    "strong_aug_normalize": check_normalize,
    "strong_aug_stats": check_statistics,
}
