"""Comparison with goldens, and the checks that several papers share. A golden is one file of arrays.

Every input, size, threshold and case name is read from the file. Where the released code departs from ours on purpose,
the check names the departure.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from common import IGNORE
from common.evaluation import inference
from common.evaluation.inference import Protocol, sum_logits
from common.images import IMAGENET_MEAN, IMAGENET_STD
from common.losses import cross_entropy
from common.mean_teacher import ema_decay, make_teacher, update_teacher
from common.metrics import ConfusionMatrix
from common.optim import exponential_ramp, poly, set_lr

OWN = Path(__file__).parent / "goldens"

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
GRAY_LEVEL = 1.001 / 255 / STD  # in a normalized image

Golden = dict[str, Tensor | np.ndarray]
Adapters = Mapping[str, Callable[[Path], None]]


# ---- files and their adapters


def check_golden(path: Path, adapters: Adapters) -> None:
    """Run the adapter with the longest prefix that fits the file name; a name that none fits fails."""
    fitting = [prefix for prefix in adapters if path.name.startswith(prefix)]
    if not fitting:
        pytest.fail(f"no adapter for {path.name}: its prefix is none of {', '.join(sorted(adapters))}")
    adapters[max(fitting, key=len)](path)


def without_golden(paper: str, adapters: Adapters) -> set[str]:
    """List the prefixes for which `goldens/<paper>` has no file."""
    names = [path.name for path in (OWN / paper).iterdir()]
    return {prefix for prefix in adapters if not any(name.startswith(prefix) for name in names)}


def read(path: Path) -> Golden:
    """Read the arrays of a golden as tensors; texts stay NumPy arrays."""
    with np.load(path) as arrays:
        return {key: array if array.dtype.kind == "U" else torch.from_numpy(array) for key, array in arrays.items()}


def part(g: Golden, prefix: str) -> Golden:
    """Select the arrays whose keys begin with `prefix`, which is removed."""
    return {key.removeprefix(prefix): value for key, value in g.items() if key.startswith(prefix)}


def cases_of(g: Golden, suffix: str) -> list[str]:
    """List the case names of a file: every key that ends with `suffix`, which is removed."""
    return sorted(key.removesuffix(suffix) for key in g if key.endswith(suffix))


def to_label(stored: Tensor, ignore: Tensor | int = IGNORE) -> Tensor:
    """Convert stored labels to int64 with 255 = ignore, which files store as `ignore`, 255 or a negative number."""
    stored = stored.long()
    return stored.masked_fill((stored == int(ignore)) | (stored < 0), IGNORE)


# ---- comparing


def close(ours: Tensor, want: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert_close(ours.detach(), want, rtol=rtol, atol=atol, check_dtype=False)


def close_loss(ours: Tensor, want: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Compare a loss; where the released one is NaN (nothing valid), ours is 0."""
    close(ours, want.nan_to_num(0.0), rtol, atol)


def close_gradient(ours: Tensor, want: Tensor) -> None:
    close(ours, want, rtol=1e-4, atol=1e-7)
    # The absolute tolerance alone would pass anything where gradients are tiny.
    assert (ours - want).norm() <= 1e-3 * want.norm() + 1e-10 * want.numel() ** 0.5


def close_to_largest(ours: Tensor | None, want: Tensor) -> None:
    """Compare a gradient within 1e-4 of the largest; where the released one is NaN (as its total), ours is finite."""
    ours = torch.zeros_like(want) if ours is None else ours
    assert ours.isfinite().all()
    known = ~want.isnan()
    largest = float(want[known].abs().max()) if known.any() else 0.0
    close(ours[known], want[known], rtol=0, atol=1e-4 * largest + 1e-12)


def check_loss(loss: Tensor, inputs: dict[str, Tensor], g: Golden) -> None:
    """Compare value and gradients. Where the released loss is NaN, or has no graph, our gradient is zero."""
    loss.backward()
    close_loss(loss, g["loss"])
    constant = bool(g["loss"].isnan()) or not g.get("has_graph", True)
    for name, values in inputs.items():
        want = g.get(f"grad_{name}")
        if constant:
            assert values.grad.eq(0).all()
        elif want is not None:
            close_gradient(values.grad, want)


def local_label(g: Golden, prefix: str = "") -> Tensor:
    """Return the classes [B,h,w] of the pixels that take part, 255 for the others."""
    valid = g[f"{prefix}label_onehot"] * g[f"{prefix}mask"]
    return valid.argmax(1).masked_fill(valid.sum(1) == 0, IGNORE)


def one_hot(label: Tensor, num_classes: int) -> Tensor:
    """Convert classes [B,h,w], 255 = none, to bool [B,C,h,w]."""
    return label[:, None] == torch.arange(num_classes).view(-1, 1, 1)


def check_mean_of_draws(draw: Callable[[], float], g: Golden, count: int = 200) -> None:
    """Compare mean and deviation of a random loss over `count` draws, within four standard errors of both means."""
    losses = np.array([draw() for _ in range(count)])
    mean, rounding = float(g["mean"]), 1e-6 * abs(float(g["mean"]))
    stderr = np.hypot(losses.std() / np.sqrt(count), float(g["stderr"]))
    assert abs(losses.mean() - mean) < 4 * stderr + rounding
    assert losses.std() == pytest.approx(float(g["std"]), rel=0.3, abs=rounding)


# ---- losses, schedules, teacher, metrics


def check_supervised(path: Path) -> None:
    g = read(path)
    logits = g["pred"].requires_grad_()
    check_loss(cross_entropy(logits, to_label(g["label"])), {"pred": logits}, g)


def check_poly(path: Path) -> None:
    """Compare every schedule of the file, whatever its name; its steps are `<name>_iter`, or 0, 1, 2, ..."""
    g = read(path)
    power, floor = float(g["power"]), float(g["min_lr"])
    arrays = {key: values for key, values in g.items() if isinstance(values, Tensor) and values.dim()}
    names = [key for key, values in arrays.items() if values.is_floating_point()]
    assert names
    for name in names:
        want = g[name].tolist()
        steps = g.get(f"{name}_iter", torch.arange(len(want))).tolist()
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=want[0])
        optimizer.param_groups[0]["initial_lr"] = want[0]
        total = total_steps(steps, want, power, floor)
        for step, rate in zip(steps, want, strict=True):
            set_lr(optimizer, poly(step, total, power), floor=floor)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=0, abs=1e-9)


def total_steps(steps: list[int], rates: list[float], power: float, floor: float) -> int:
    """Compute the length of a polynomial decay, which no file states, from the last rate above the floor."""
    above = [(step, rate) for step, rate in zip(steps, rates) if rate > floor and step > 0]
    step, rate = max(above, default=(steps[-1], 0.0))
    return max(1, round(step / (1 - (rate / rates[0]) ** (1 / power))))


class Weights(nn.Module):
    """Network of flat parameters and one buffer, as goldens of the teacher store them; zeros at first."""

    def __init__(self, parameters: int, buffer: int) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.zeros(parameters))
        self.register_buffer("running_mean", torch.zeros(buffer))


def check_teacher(path: Path) -> None:
    g = read(path)
    student = Weights(g["student"].shape[1], len(g["student_running_mean"]))
    teacher = make_teacher(student)
    student.running_mean.copy_(g["student_running_mean"])
    teacher.running_mean.copy_(g["teacher_running_mean"])  # its own statistics, which updates leave alone
    for step, (weights, want) in enumerate(zip(g["student"], g["teacher"], strict=True)):
        student.flat.data.copy_(weights)
        update_teacher(teacher, student, ema_decay(step, float(g["alpha"])))
        close(teacher.flat, want, rtol=1e-6, atol=1e-6)
    assert_close(teacher.running_mean, g["teacher_running_mean"])


def check_miou(path: Path) -> None:
    """Compare counts and IoU. With a class absent, the released mean is NaN and ours over the classes that occur."""
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


def check_ramp_down(path: Path, default: tuple[float, ...], mult: float) -> None:
    """Compare the released ramp, whose `default` (begin, end, highest, lowest) no file states, and all others."""
    g = read(path)
    states = "begin_max_maxv_minv"
    settings = {"": default} | {name: tuple(g[name + states].tolist()) for name in cases_of(g, states)}
    for name, setting in settings.items():
        want = g[f"{name}value"].tolist()
        times = g.get(f"{name}epoch", torch.arange(len(want))).tolist()
        ours = [exponential_ramp(time, *setting, mult) for time in times]
        assert ours == pytest.approx(want, rel=0, abs=1e-9)


# ---- scores of an evaluation


def check_scores(network: nn.Module, weight: Tensor, image: Tensor, own: Golden) -> None:
    """Compare summed logits and classes of sliding windows, and classes of whole images where `own` has them.

    Args:
        network: Network of the file.
        weight: Weight [C,3,k,k] of its convolution, which bounds how far a gray level moves a logit.
        image: uint8 [H,W,3].
        own: `crop`, `stride_rate`, `scales`, `flip`; `score` [H,W,C], or `score_<j>` of each scale; classes `pred`, and
            `whole` or `whole_eval_pred` of the whole image.

    OpenCV rounds some pixels of resized images to another gray level. Then no pixel is more than a gray level off in
    any pass, scores differ little on average, and near ties may be decided either way.
    """
    size, batch = tuple(image.shape[:2]), image.permute(2, 0, 1)[None]
    scales, flip = tuple(map(float, own["scales"].flatten().tolist())), bool(own["flip"])
    window = tuple(own["crop"].expand(2).tolist())
    a_level = float((weight.abs().sum((2, 3)) * GRAY_LEVEL.flatten()).sum(1).max())

    def slide(*scales: float) -> tuple[Tensor, Tensor]:
        """Return scores [C,H,W], and the largest difference that gray levels explain at each pixel."""
        score, passes = sum_logits(network, batch, size, Protocol(window, scales, flip))
        return score[0], a_level * passes * any(scale != 1 for scale in scales)

    def whole(scale: float) -> Tensor:
        """Resize scores as the release does: to the size of the scaled image, then to that of the image."""
        inner = tuple(round(side * scale) for side in size)
        score, _ = sum_logits(network, batch, inner, Protocol(None, (scale,), flip))
        return nn.functional.interpolate(score, size, mode="bilinear", align_corners=False)[0]

    with windows_move_by(float(own["stride_rate"])):
        for index, scale in enumerate(scales):
            if f"score_{index}" in own:
                close_scores(*slide(scale), own[f"score_{index}"])
        score, moved = slide(*scales)
    if "score" in own:
        close_scores(score, moved, own["score"])
    close_classes(score, moved, own["pred"])
    for name in ("whole", "whole_eval_pred"):
        if name in own:
            moved = torch.tensor(a_level * (1 + flip) * sum(scale != 1 for scale in scales))
            close_classes(sum(whole(scale) for scale in scales), moved, own[name])


def close_scores(ours: Tensor, moved: Tensor, want: Tensor) -> None:
    """Compare [C,H,W] with [H,W,C]: each score within what gray levels explain, and close on average."""
    difference, want = (ours - want.permute(2, 0, 1)).abs(), want.permute(2, 0, 1)
    assert (difference <= moved + 1e-4 + 1e-4 * want.abs()).all(), f"scores differ by {difference.max():.2g}"
    assert difference.mean() < 0.01 * want.std()


def close_classes(ours: Tensor, moved: Tensor, want: Tensor) -> None:
    """Compare the argmax of [C,H,W] with [H,W]: equal except for near ties, and those are few."""
    best, wrong = ours.topk(2, 0).values, ours.argmax(0) != want
    assert not (wrong & (best[0] - best[1] > 2 * moved + 2e-4)).any()
    assert wrong.float().mean() <= 0.02


@contextmanager
def windows_move_by(rate: float) -> Iterator[None]:
    """Move sliding windows within the block by this share of their side, in place of the 2/3 of all papers."""
    with mock.patch.object(inference, "_stride", lambda side: math.ceil(side * rate)):
        yield
