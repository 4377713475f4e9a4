"""Comparing with goldens, and the checks of what papers share. A golden is one file of arrays.

Every number (classes, thresholds, sizes) is read from the file. Departures of ours from the released code are named
where they are allowed for.
"""

import itertools
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from common import IGNORE
from common.augment import (
    CropGeometry,
    Photometric,
    apply_geometry_batch,
    apply_photometric_batch,
    flip_batch,
    mix_batch,
    mixing,
)
from common.images import IMAGENET_MEAN, IMAGENET_STD, normalize
from common.loaders import Transform
from common.losses import cross_entropy
from common.mean_teacher import ema_decay, make_teacher, update_teacher
from common.metrics import ConfusionMatrix
from common.optim import poly, set_lr

Golden = dict[str, Tensor | np.ndarray]

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
GREY_LEVEL = 1.001 / 255 / STD  # in a normalized image


# ---- reading and comparing


def read(path: Path) -> Golden:
    """The arrays of a golden as tensors; texts as they are."""
    with np.load(path) as arrays:
        return {key: array if array.dtype.kind == "U" else torch.from_numpy(array) for key, array in arrays.items()}


def to_label(stored: Tensor) -> Tensor:
    """Goldens ignore -1, we ignore 255."""
    return stored.long().masked_fill(stored < 0, IGNORE)


def close(ours: Tensor, want: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert_close(ours.detach(), want, rtol=rtol, atol=atol, check_dtype=False)


def close_gradient(ours: Tensor, want: Tensor) -> None:
    close(ours, want, rtol=1e-4, atol=1e-7)
    # The absolute tolerance alone would pass anything where gradients are tiny.
    assert (ours - want).norm() <= 1e-3 * want.norm()


def check_loss(loss: Tensor, inputs: dict[str, Tensor], g: Golden) -> None:
    """Value and gradients. Where the released loss is NaN ours is 0, with a gradient of zeros."""
    loss.backward()
    close(loss, g["loss"].nan_to_num(0.0))
    for name, values in inputs.items():
        close_gradient(values.grad, g[f"grad_{name}"].nan_to_num(0.0))


def local_label(g: Golden, prefix: str = "") -> Tensor:
    """Classes [B,h,w] of the pixels that take part, 255 for the others."""
    valid = g[f"{prefix}label_onehot"] * g[f"{prefix}mask"]
    return valid.argmax(1).masked_fill(valid.sum(1) == 0, IGNORE)


def one_hot(label: Tensor, num_classes: int) -> Tensor:
    """[B,h,w], 255 = none -> bool [B,C,h,w]."""
    return label[:, None] == torch.arange(num_classes).view(-1, 1, 1)


# ---- losses, schedules, teacher, metrics


def check_supervised(path: Path) -> None:
    g = read(path)
    logits = g["pred"].requires_grad_()
    check_loss(cross_entropy(logits, to_label(g["label"])), {"pred": logits}, g)


def check_poly(path: Path) -> None:
    """Every schedule of the file starts at its own rate and ends at the floor."""
    g = read(path)
    rates = [
        values
        for values in g.values()
        if isinstance(values, Tensor) and values.dim() == 1 and values.is_floating_point()
    ]
    assert rates
    for want in rates:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=want[0].item())
        optimizer.param_groups[0]["initial_lr"] = want[0].item()
        for step, rate in enumerate(want.tolist()):
            set_lr(optimizer, poly(step, len(want) - 1, float(g["power"])), floor=float(g["min_lr"]))
            assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=0, abs=1e-9)


class Weights(nn.Module):
    """Parameters and a buffer as goldens of the teacher store them: flat. Zeros at first."""

    def __init__(self, parameters: int, buffer: int) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.zeros(parameters))
        self.register_buffer("running_mean", torch.zeros(buffer))


def check_teacher(path: Path) -> None:
    g = read(path)
    student = Weights(g["student"].shape[1], len(g["student_running_mean"]))
    teacher = make_teacher(student)
    student.running_mean.copy_(g["student_running_mean"])
    for step, (weights, want) in enumerate(zip(g["student"], g["teacher"], strict=True)):
        student.flat.data.copy_(weights)
        update_teacher(teacher, student, ema_decay(step, float(g["alpha"])))
        close(teacher.flat, want, rtol=1e-6, atol=1e-6)
    assert_close(teacher.running_mean, g["teacher_running_mean"])


def check_miou(path: Path) -> None:
    """Where a class is absent the released mean is NaN and ours is over the classes that occur."""
    g = read(path)
    confusion = ConfusionMatrix(int(g["num_classes"]))
    for prediction, label in zip(g["pred"], g["target"], strict=True):
        confusion.update(prediction, label)
    close(confusion.matrix, g["confusion"], rtol=0, atol=0)
    scores, counts = confusion.scores(), g["confusion"].double()
    iou = counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
    assert scores.per_class_iou == pytest.approx(iou.tolist(), abs=1e-6, nan_ok=True)
    assert scores.miou == pytest.approx(float(iou.nanmean()), abs=1e-6, nan_ok=True)
    if not g["miou"].isnan():
        assert scores.miou == pytest.approx(float(g["miou"]), abs=1e-6)


def check_poly_rates(optimizer: torch.optim.Optimizer, want: Tensor, total: int, power: float = 0.9) -> None:
    """Rates `want` [steps,groups] of a schedule over `total` steps; groups of the optimizer with the same rate are one.

    Larger rates come first.
    """
    for step, rates in enumerate(want.tolist()):
        set_lr(optimizer, poly(step, total, power))
        ours = {group["initial_lr"]: group["lr"] for group in optimizer.param_groups}
        assert [ours[first] for first in sorted(ours, reverse=True)] == pytest.approx(rates, rel=0, abs=1e-9)


# ---- augmentation


class Replay:
    """Recorded draws in place of random ones.

    Args:
        rows: [n,4] of (kind, low, high, value): 0 an integer from low to high, 1 a number in [0,1), 2 one of a list.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows.tolist()

    def integers(self, low: int, high: int, endpoint: bool) -> int:
        if low == high and not (self.rows and self.rows[0][0] == 0):
            return low  # no draw was made
        kind, _, _, value = self.rows.pop(0)
        assert kind == 0 and endpoint
        return int(value)

    def random(self) -> float:
        kind, *_, value = self.rows.pop(0)
        assert kind == 1
        return value

    def choice(self, values) -> float:
        kind, *_, value = self.rows.pop(0)
        assert kind == 2 and value in values
        return value


def check_crop(
    transform: Transform, image: Tensor, label: Tensor, draws: Tensor, want_image: Tensor, want_label: Tensor
) -> None:
    """A crop of `image` [H,W,3] and `label` [H,W] by recorded draws: images within a gray level.

    OpenCV rounds to the pixel above and before, also of a mirrored image: labels are the wanted ones, or would be, were
    the label moved by a row, a column or both.
    """
    image, label = image.permute(2, 0, 1), label.to(torch.uint8)
    allowed = torch.zeros_like(want_label, dtype=torch.bool)
    for down, right in itertools.product((0, 1, -1), repeat=2):
        rows, columns = (torch.arange(side) for side in label.shape)
        moved = label[(rows - down).clamp(0, len(rows) - 1)][:, (columns - right).clamp(0, len(columns) - 1)]
        ours, our_label = transform(image, moved, Replay(draws))
        allowed |= our_label == want_label
    error = (normalize(ours) - want_image).abs()
    assert (error <= GREY_LEVEL).all(), f"{(error / GREY_LEVEL).max():.2f} gray levels"
    assert allowed.all(), f"{(~allowed).sum()} labels differ"


def check_batch_transform(path: Path) -> None:
    """Images within a gray level, as Pillow rounds after rows and after columns; labels exact; confidences to 1/255.

    Where the centre of a pixel falls between two source pixels, labels may be of the one before: Pillow sums up steps.
    """
    g = read(path)
    crop, scale, case = g["crop_size"].tolist(), float(g["scale_ratio"]), str(g["case"])
    height, width = (int(side * scale) for side in g["image_u8"].shape[-2:])
    geometries = [CropGeometry(height, width, top, left) for top, left, _, _ in g["crop_ijhw"].tolist()]

    def stacked(name: str) -> Tensor:
        """The one map of the file, or all of its numbered ones: [B,K,H,W]."""
        return torch.stack([g[key] for key in sorted(g) if key.rstrip("0123456789") == name], dim=1)

    def transform(image: Tensor, label: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = apply_geometry_batch(image, label, confidence, geometries, crop)
        if "blur" in case:
            blurred = apply_photometric_batch(maps[0], [Photometric((), float(g["blur_sigma"]))] * len(image))
            maps = (blurred, *maps[1:])
        return flip_batch(*maps, ["flip" in case] * len(image))

    label, want_label, confidence = to_label(stacked("label")), to_label(stacked("out_label")), stacked("conf")
    stored = released_copy(g["image_u8"])
    for image, levels in ((stored / 255, 1), (stored, 2)):  # training has floats; uint8 rounds as often as Pillow
        levels += 3 * ("blur" in case)  # six more roundings
        error = (normalize(transform(image, label, confidence)[0]) - g["out_image"]).abs()
        assert (error <= levels * GREY_LEVEL).all(), f"{(error / GREY_LEVEL).max():.2f} gray levels"

    between = [between_pixels(geometry, label.shape[-2:], crop) for geometry in geometries]
    rows, columns = (torch.stack(each) for each in zip(*between))
    columns = flip_batch(columns, None, None, ["flip" in case] * len(columns))[0]
    allowed = torch.zeros_like(want_label[:, 0], dtype=torch.bool)
    for down, right in itertools.product((False, True), repeat=2):
        moved = (values.roll((int(down), int(right)), (-2, -1)) for values in (label, confidence))
        _, our_label, our_confidence = transform(stored, *moved)
        same = (our_label == want_label).all(1)
        same &= ((our_confidence - stacked("out_conf")).abs() <= 1 / 255 + 1e-6).all(1)
        allowed |= same & (rows if down else True) & (columns if right else True)
    assert allowed.all(), f"{(~allowed).sum()} labels or confidences differ"


def released_copy(image: Tensor) -> Tensor:
    """The 8-bit copy that the released code makes of the normalized `image`; its roundings cost pixels a gray level."""
    inverse = torch.tensor([1 / std for std in IMAGENET_STD]).view(3, 1, 1)
    return ((normalize(image) / inverse + MEAN) * 255).to(torch.uint8)


def between_pixels(geometry: CropGeometry, size: tuple[int, int], crop: list[int]) -> tuple[Tensor, Tensor]:
    """Bool [h,1] and [1,w]: rows and columns of the crop whose centre falls exactly between two of `size`."""
    axes = zip(size, (geometry.height, geometry.width), (geometry.top, geometry.left), crop)
    rows, columns = (
        (2 * torch.arange(start, start + length) + 1) * source % (2 * resized) == 0
        for source, resized, start, length in axes
    )
    return rows[:, None], columns[None]


def check_mix(path: Path) -> None:
    """Recorded masks take the place of drawn ones."""
    g = read(path)
    mode = "cutout" if "cutout" in path.name else "cutmix"
    ranks = sum(key.endswith("_masks") for key in g)
    total = len(g["image"])
    if not ranks:
        close_mix(mode, g, slice(total), g["mask"], "", [True] * total)
    for rank in range(ranks):
        own, size = slice(rank * total // ranks, (rank + 1) * total // ranks), total // ranks
        # Image i of the whole batch gets partner i + 1, there modulo one process's batch: compared where that is equal.
        same = [(i + 1) % size == (i + 1) % total for i in range(total)][own]
        close_mix(mode, g, own, g[f"rank{rank}_masks"][own], f"rank{rank}_", same)


def close_mix(mode: str, g: Golden, own: slice, mask: Tensor, prefix: str, same: list[bool]) -> None:
    """Mix the part `own` of the whole batch; its last image with the first of the next part."""
    image = g["image"] * STD + MEAN  # the golden is normalized
    maps = image, to_label(g["label"]), g["conf"]
    following = None if len(mask) == len(image) else tuple(values[own.stop % len(values)] for values in maps)
    rngs = [np.random.default_rng(i) for i in range(len(mask))]
    with mock.patch.object(mixing, "box_mask", lambda *_: mask.bool()):
        image, label, confidence = mix_batch(mode, *(values[own] for values in maps), rngs, following)
    close(normalize(image)[same], g[f"{prefix}out_image"][same])
    assert_close(label[same], to_label(g[f"{prefix}out_label"])[same])
    assert_close(confidence[same], g[f"{prefix}out_conf"][same], rtol=0, atol=0)


def check_class_masks(path: Path) -> None:
    """How many classes stay, and of how many; a class stays whole or not at all."""
    g = read(path)
    label = to_label(g["label"])[None]
    for seed, (selected, total) in enumerate(g["selected_and_total"].tolist()):
        mask = mixing.class_mask(label, mixing.draw_class_keys(np.random.default_rng(seed))[None])
        kept, replaced = set(label[mask].tolist()), set(label[~mask].tolist())
        assert (len(kept), len(kept | replaced)) == (selected, total)
        assert not kept & replaced


class LegacyRandom:
    """The released draws: those of `numpy.random` after `numpy.random.seed`."""

    def __init__(self, seed: int) -> None:
        self.state = np.random.RandomState(seed)

    def integers(self, low: int, high: int) -> int:
        return self.state.randint(low, high)


def check_boxes(path: Path) -> None:
    g = read(path)
    for row in g["rows"].tolist():
        r = dict(zip(g["columns"].tolist(), row, strict=True))
        box = mixing.draw_box(LegacyRandom(r["np_seed"]), r["H"], r["W"])
        assert box == mixing.Box(r["y0"], r["x0"], r["y1"], r["x1"]), r


def check_box_statistics(path: Path) -> None:
    g = read(path)
    size, draws, rng = int(g["size"]), int(g["draws"]), np.random.default_rng(0)
    boxes = [mixing.draw_box(rng, size, size) for _ in range(draws)]
    drawn = {
        "h": [box.bottom - box.top for box in boxes],
        "w": [box.right - box.left for box in boxes],
        "y0": [box.top for box in boxes],
        "x0": [box.left for box in boxes],
    }
    for i, column in enumerate(g["columns"].tolist()):
        ours, mean, std = np.array(drawn[column]), float(g["mean"][i]), float(g["std"][i])
        assert abs(ours.mean() - mean) < 5 * np.hypot(std, ours.std()) / np.sqrt(draws)
        assert ours.std() == pytest.approx(std, rel=5 / np.sqrt(draws))
        assert [ours.min(), ours.max()] == pytest.approx([float(g["min"][i]), float(g["max"][i])], abs=std / 2)
