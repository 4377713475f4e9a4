"""Compare memory bank with the outputs of its released functions, file by file.

Every number (classes, thresholds, sizes) is read from the file. Where ours departs from the released code on purpose,
the check names the departure.
"""

import hashlib
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import (
    Golden,
    Weights,
    cases_of,
    check_golden,
    close,
    close_loss,
    part,
    read,
    to_label,
    without_golden,
)
from networks import backbone_named, input_of, official_keys, outline, read_json, unfilled
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from common import IGNORE
from common.config.sections import DataConfig, ModelConfig, OptimConfig, RunConfig
from common.datasets.cityscapes import COLORS, LABEL_ID_TABLE
from common.datasets.gta5 import class_ids
from common.evaluation.inference import Protocol, sum_logits
from common.images import flatten_pixels, normalize
from common.losses import upsample
from common.mean_teacher import make_teacher, update_teacher
from common.metrics import ConfusionMatrix
from common.models.segmenter import InputNormalization
from common.models.weights import UNREACHED, load_state
from common.optim import poly
from common.released.weights import MEMORY_BANK, MEMORY_BANK_HEADS, deeplab_from_memory_bank
from common.splits.orders import random_order, read_order
from memory_bank import augment as views
from memory_bank.augment import BlackCrop
from memory_bank.bank import Bank, nearest_labels
from memory_bank.config import Config, Method
from memory_bank.heads import Heads, Selectors
from memory_bank.losses import (
    ClassBalance,
    contrastive_loss,
    embeddings_per_image,
    entropy_loss,
    pseudo_label_loss,
    ramp,
    supervised_loss,
    teacher_decay,
)
from memory_bank.network import MemoryBankNetwork, bank_candidates, labeling_network
from memory_bank.released import HEADS, MEANS, SELECTORS, STACKED, heads_from_released
from memory_bank.training import contrastive_term


def test_golden(golden: Path) -> None:
    check_golden(golden, ADAPTERS)


def test_every_adapter_has_a_golden_of_our_own() -> None:
    assert without_golden("memory_bank", ADAPTERS) == PUBLISHED_LISTS


# ---- selectors, contrastive loss, bank


def load_selectors(state: Golden, num_classes: int, dims: int) -> Selectors:
    selectors = Selectors(num_classes, dims)
    selectors.load_state_dict(part(heads_from_released(state), "selectors."))
    return selectors


def check_contrastive(path: Path) -> None:
    """Compare loss, gradients and statistics, except of memory selectors: those have no effect and do not run here."""
    g = read(path)
    num_classes, dims = int(g["num_classes"]), g["features"].shape[1]
    bank = bank_of(g, "memory/", num_classes, 1, dims)
    for mode in ("train", "eval"):
        selectors = load_selectors(part(g, "net/"), num_classes, dims).train(mode == "train")
        rows = g["features"].clone().requires_grad_()
        loss = contrastive_loss(rows, g["labels"].long(), bank, selectors)
        loss.backward()
        want = part(g, f"{mode}/")
        close_loss(loss, want["loss"])
        # With no bank to compare with, the release has a number in place of a loss: no gradients.
        close(rows.grad, want.get("grad_features", torch.zeros_like(rows)).nan_to_num(0.0))
        for key, value in want.items():
            if key.startswith("grad_selector_"):
                owner, name = key.removeprefix("grad_selector_").split(".", 1)
                ours = getattr(selectors, STACKED[name]).grad[int(owner)]
                close(ours, value.nan_to_num(0.0).view_as(ours))
            elif key.startswith("running_mean_after/selector_") and "memory" not in key:
                close(selectors.running_mean[int(key.rsplit("_", 1)[1])], value)
            elif key.startswith("batches_tracked_after/selector_") and "memory" not in key:
                assert selectors.num_batches_tracked[int(key.rsplit("_", 1)[1])] == value


def bank_of(g: Golden, prefix: str, num_classes: int, size: int, dims: int) -> Bank:
    """Build a bank with the rows that the file has per class (none for some), of `size` or as many rows."""
    stored = [g.get(f"{prefix}{index}", torch.empty(0, dims)) for index in range(num_classes)]
    bank = Bank(num_classes, max(size, *map(len, stored)), dims)
    for index, rows in enumerate(stored):
        bank.rows[index, : len(rows)] = rows
        bank.filled[index] = len(rows)
    return bank


def close_bank(bank: Bank, g: Golden, prefix: str, same: dict | None = None) -> None:
    """Compare banks. In the release the first rows of a class may exceed the size; ours are cut."""
    for index in range(len(bank.filled)):
        want = g.get(f"{prefix}{index}", bank.rows[index, :0])[: bank.rows.shape[1]]
        assert bank.filled[index] == len(want)
        close(bank.rows[index, : len(want)], want, **(same or {"rtol": 0, "atol": 0}))


def most_rows(g: Golden, images: int) -> int:
    """Compute the most rows per class that enter the bank; VOC counts a third of its classes, Cityscapes one."""
    factor = int(g["num_classes"]) / 3 if str(g["dataset"]) == "pascal_voc" else 1
    return images * embeddings_per_image(int(g["memory_per_class"]), int(g["num_samples"]), factor)


def check_feature_memory(path: Path) -> None:
    g = read(path)
    num_classes = int(g["num_classes"])
    dims = g["step0/features"].shape[1]
    for mode in ("train", "eval"):
        selectors = load_selectors(part(g, "net/"), num_classes, dims).train(mode == "train")
        bank = Bank(num_classes, int(g["memory_per_class"]), dims)
        most = most_rows(g, int(g["batch_size"]))
        assert most == int(g["batch_size"]) * int(g["per_class_samples_per_image"])
        for step in range(int(g["steps"])):
            rows, label = g[f"step{step}/features"], g[f"step{step}/labels"].long()
            if mode == "eval":
                scores = selectors(rows, label, torch.zeros(num_classes, dtype=torch.bool))
                for index, want in part(g, f"eval/step{step}/scores/").items():
                    close(scores[label == int(index)], want)
            bank.update(rows, label, selectors, most)
            close_bank(bank, g, f"{mode}/step{step}/memory/")


def check_embeddings_per_image(path: Path) -> None:
    """Compare the table, which is of a bank of 256 rows and 19 (Cityscapes) or 21 classes (VOC)."""
    for is_voc, labeled, want in read(path)["table"].tolist():
        assert embeddings_per_image(256, labeled, 21 / 3 if is_voc else 1) == want


# ---- losses, class weights, schedules


def check_losses(path: Path) -> None:
    """Compare losses and gradients; where the released ones are NaN, ours are 0."""
    g = read(path)
    label, confidence, method = to_label(g["labels"], g["ignore_label"]), g["max_probs"], Method()
    weighings = {"unweighted": torch.ones(g["logits"].shape[1]), "weighted": g["class_weights"]}

    def check(loss: Callable[[Tensor], Tensor], value: str, gradient: str) -> None:
        logits = g["logits"].clone().requires_grad_()
        ours = loss(logits)
        close_loss(ours, g[value])
        ours.backward()
        assert logits.grad.isfinite().all()
        if gradient in g:
            close(logits.grad, g[gradient].nan_to_num(0.0))

    for name, weight in weighings.items():
        check(lambda x, w=weight: supervised_loss(x, label, w), f"sup_ce/{name}", f"sup_ce/grad_{name}")
        for key in part(g, f"pseudo_ce/{name}/iter"):
            check(
                lambda x, w=weight, step=int(key): (
                    ramp(step, method.ramp_steps) * pseudo_label_loss(x, label, confidence, w, method.confidence_power)
                ),
                f"pseudo_ce/{name}/iter{key}",
                f"pseudo_ce/grad_{name}/iter{key}",
            )
    check(lambda x: entropy_loss(x, label), "entropy/current", "entropy/grad_current")
    for name in (key for key in part(g, "entropy/") if key.startswith("broadcast")):
        check(lambda x: entropy_loss(x, label, broadcast=True), f"entropy/{name}", f"entropy/grad_{name}")
    size = g["pseudo/labels"].shape[-2:]
    ours, predicted = upsample(g["pseudo/coarse_logits"], size, True).softmax(1).max(1)
    close(ours, g["pseudo/max_probs"])
    assert_close(predicted, g["pseudo/labels"].long())


def check_class_balance(path: Path) -> None:
    g = read(path)
    sizes = int(g["num_classes"]), int(g["labeled_iters"]), int(g["unlabeled_iters"])
    joint, labeled_only, split = (ClassBalance(*sizes) for _ in range(3))
    halves = []
    for step in range(int(g["steps"])):
        label, pseudo = to_label(g["labels"][step]), to_label(g["pseudo"][step])
        joint.add_labeled(step, label)
        joint.add_unlabeled(step, pseudo)
        close(joint.weights(step + 1), g["weights"][step], rtol=1e-9, atol=0)
        # A step without unlabeled images counts none: the window is that of the labeled table alone.
        labeled_only.add_labeled(step, label)
        close(labeled_only.weights(step + 1), g["weights_only_labeled"][step], rtol=1e-9, atol=0)
        split.add_labeled(step, label)
        halves.append(split.weights(step))
        split.add_unlabeled(step, pseudo)
        halves.append(split.weights(step + 1))
    close(torch.stack(halves), g["weights_split_calls"], rtol=1e-9, atol=0)
    for ours, want in ((joint.labeled, "final_labeled_frequencies"), (joint.unlabeled, "final_unlabeled_frequencies")):
        assert sorted(ours.tolist()) == sorted(g[want].long().tolist())


WARM_UPS = {"ssl": 10, "less_memory": 1, "da": 1}  # of the teacher, by script


def check_schedules(path: Path) -> None:
    g = read(path)
    names = cases_of(g, "/iters")
    assert names
    for name in names:
        own = part(g, f"{name}/")
        total, lr = int(own["num_iterations"]), float(own["base_lr"])
        for row, step in enumerate(own["iters"].tolist()):
            same = {"rel": 1e-9, "abs": 0}
            assert lr * poly(step, total, float(own["power"])) == pytest.approx(float(own["lr"][row]), **same)
            first = Method().alpha
            for kind, warm_up in WARM_UPS.items():
                ours = teacher_decay(step, total, first, warm_up)
                assert ours == pytest.approx(float(own[f"effective_alpha_{kind}"][row]), **same)
            for length, want in part(own, "ramp").items():
                assert ramp(step, int(length)) == pytest.approx(float(want[row]), **same)
    for kind in (name.removeprefix("ema/") for name in cases_of(g, "/init_w")):
        check_teacher(part(g, f"ema/{kind}/"), WARM_UPS[kind])


def check_teacher(g: Golden, warm_up: int) -> None:
    """Compare updates with constant alpha 0.8: at the first steps of a long run the cosine is constant."""
    student = Weights(g["init_w"].numel() + g["init_bn"].numel(), g["teacher_running_mean_after"].numel())
    student.flat.data.copy_(torch.cat([g["init_w"].flatten(), g["init_bn"]]))
    teacher = make_teacher(student)
    for step in range(sum(key.startswith("teacher_w/") for key in g)):
        student.flat.data.copy_(torch.cat([g[f"student_w/{step}"].flatten(), g[f"student_bn/{step}"]]))
        update_teacher(teacher, student, min(teacher_decay(step, 10**12, 0.8, warm_up), 0.8))
        want = torch.cat([g[f"teacher_w/{step}"].flatten(), g[f"teacher_bn/{step}"]])
        close(teacher.flat, want, rtol=1e-6, atol=1e-6)
    assert_close(teacher.running_mean, g["teacher_running_mean_after"])


def check_metric(path: Path) -> None:
    """Compare counts and IoU. With a class absent, the released mean is NaN and ours over the classes that occur."""
    g = read(path)
    confusion = ConfusionMatrix(int(g["num_classes"]))
    for index in range(int(g["images"])):
        confusion.update(g[f"pred/{index}"], g[f"gt/{index}"])
    close(confusion.matrix, g["confusion"], rtol=0, atol=0)
    scores = confusion.scores()
    assert scores.per_class_iou == pytest.approx(g["iou"].tolist(), abs=1e-12, nan_ok=True)
    assert scores.miou == pytest.approx(float(g["iou"].nanmean()), abs=1e-12, nan_ok=True)
    if not g["miou"].isnan():
        assert scores.miou == pytest.approx(float(g["miou"]), abs=1e-12)


# ---- views


RELEASED_IGNORE = 250  # on Cityscapes; 255 on VOC


def check_classmix(path: Path) -> None:
    g = read(path)
    label = to_label(g["labels"], RELEASED_IGNORE)
    chosen = g["chosen_classes"]
    mask = (label[:, None] == chosen.view(*chosen.shape, 1, 1)).any(1)
    assert_close(mask, g["masks"].bool())
    maps = g["data"].float(), label, g["probs"]
    image, mixed, confidence = views.class_mix(*maps, mask, tuple(values[0] for values in (*maps, mask)))
    assert_close(image, g["out_data"])
    assert_close(mixed, to_label(g["out_labels"], RELEASED_IGNORE))
    assert_close(confidence, g["out_probs"])
    for candidates, want in g["number_chosen_for_n_candidates"].tolist():
        assert views.number_chosen(candidates) == want
    for case in range(int(g["candidates/num_cases"])):
        check_candidates(part(g, f"candidates/{case}/"), int(g["candidates/draws"]), int(g["candidates/ignore_label"]))


def check_candidates(own: Golden, draws: int, ignore: int) -> None:
    """Compare how often each class that is present is chosen, within four standard errors of a difference."""
    present = to_label(own["present"], ignore)
    label = present.view(1, 1, -1).expand(draws, -1, -1)
    rng = np.random.default_rng(0)
    keys = torch.from_numpy(np.stack([views.draw_class_keys(rng) for _ in range(draws)]))
    chosen = views.class_mask(label, keys, str(own["dataset"]) != "pascal_voc")[:, 0]
    assert (chosen.sum(1) == own["number_selected"]).all()
    for ours, want in zip(chosen.double().mean(0).tolist(), own["frequency"].tolist()):
        assert abs(ours - want) <= 4 * math.sqrt(2 * want * (1 - want) / draws) + 1e-12


def check_geometry(path: Path) -> None:
    g = read(path)
    label = to_label(g["labels"], RELEASED_IGNORE)
    maps = g["data"].float(), label, g["probs"]
    for case in range(int(g["n"])):
        own = part(g, f"{case}/")
        choice = views.BatchAugment(scale=float(own["scale"]))
        drawn = own["randint_first_is_column_second_is_row"].tolist()
        if drawn:
            # A share in the middle of the place that was drawn.
            column, row = ((value + 0.5) / (int(most) + 1) for value, (_, most) in zip(drawn, own["randint_ranges"]))
            choice = views.BatchAugment(scale=float(own["scale"]), corner=(row, column))
        image, ours, confidence = views.rescale(*maps, choice) if choice.scale != 1 else maps
        close(image[:, :1], own["data"], rtol=0, atol=1e-3)
        assert_close(ours, to_label(own["labels"], RELEASED_IGNORE))
        close(confidence, own["probs"], rtol=0, atol=1e-5)
    rngs = [np.random.default_rng(0)] * len(label)
    flipped = views.apply_view(maps, views.BatchAugment(is_flipped=True), views.WEAK, rngs, True, None)
    close(flipped[0][:, :1], g["flip/data"], rtol=0, atol=1e-3)
    assert_close(flipped[1], to_label(g["flip/labels"], RELEASED_IGNORE))
    close(flipped[2], g["flip/probs"], rtol=0, atol=1e-5)


def check_photometric(path: Path) -> None:
    g = read(path)
    names = ("brightness", "contrast", "saturation", "hue")
    for number in cases_of(g, "/order"):
        own, image = part(g, f"{number}/"), g["data"].float() / 255
        for index in own["order"].tolist():
            amounts = own[f"{names[index]}_factor"]
            amounts = amounts - 1 if names[index] == "brightness" else amounts
            image = views._COLOR_CHANGES[names[index]](image, amounts.tolist())
        close(image * 255, own["out"], rtol=0, atol=2e-3)
    for key in (key for key in g if key.startswith("jitter_ranges_s")):
        check_jitter_ranges(float(key.split("/")[0].removeprefix("jitter_ranges_s")), g[key])
    close(views.blur(g["blur/in"].float() / 255) * 255, g["blur/out"], rtol=0, atol=2e-3)
    for order in ("rgb", "bgr"):
        for dataset, want in part(g, f"normalize_{order}/").items():
            image = g["data"][:, :, :4, :4]
            # The release reads BGR in the first place; ours is RGB until the network turns it.
            image = image.flip(1) if order == "bgr" else image
            ours = input_normalization(dataset, order == "bgr")(normalize(image))
            close(ours, want, rtol=0, atol=1e-6)


def input_normalization(dataset: str, bgr: bool) -> InputNormalization:
    """Return the released normalization of a dataset; those without a mean of their own share one."""
    return InputNormalization(MEANS.get(dataset, MEANS["other"]), bgr)


def check_jitter_ranges(jitter: float, want: Tensor) -> None:
    """Compare the extremes of many draws; our brightness is the amount that is added."""
    draws = [views.draw_factors(np.random.default_rng(seed), jitter) for seed in range(2000)]
    for name, (low, high) in zip(("brightness", "contrast", "saturation", "hue"), want.tolist()):
        values = np.array([draw[name] for draw in draws]) + (name == "brightness")
        assert low <= values.min() and values.max() <= high
        assert [values.min(), values.max()] == pytest.approx([low, high], abs=0.01 * (high - low))


STATISTICS_DRAWS = 100


def check_augment_statistics(path: Path) -> None:
    """Compare means over many draws of the whole view, within four standard errors of both."""
    g = read(path)
    for name in cases_of(g, "/mean"):
        rows = [statistics_of_view(g, name, draw) for draw in range(STATISTICS_DRAWS)]
        ours = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)
        mean, error = (dict(zip(rows[0], values)) for values in (ours.mean(0), ours.var(0) / len(ours)))
        wanted = zip(g["columns"].tolist(), g[f"{name}/mean"], g[f"{name}/stderr"], strict=True)
        for column, want, stderr in wanted:
            if column == "scale":
                continue  # a mean over the scaled draws or over all: the file does not state it
            assert (mean[column] - want).abs() <= 4 * (error[column] + stderr**2).sqrt() + 1e-6, (name, column)


def statistics_of_view(g: Golden, name: str, draw: int) -> dict[str, float]:
    """Draw the view `<dataset>/<strength>/<mixing>` once, and return its statistics by the columns of the file."""
    dataset, strength, mixing = name.split("/")
    image, label = g["data"] / 255, to_label(g["labels"], g["ignore_label"])
    ranges = views.WEAK if strength == "weak" else views.STRONG
    rngs = [np.random.default_rng([draw, index]) for index in range(len(image))]
    drawn = views.draw_batch_augment(np.random.default_rng([draw, 99]), ranges)
    # The file's own gate: all batches are mixed, or none.
    choice = views.BatchAugment(**{**vars(drawn), "is_mixed": mixing == "mix"})
    maps = image, label, g["probs"]
    maps = views.apply_view(maps, choice, ranges, rngs, dataset != "pascal_voc", lambda *first: first)
    image, label, confidence = maps
    image = image * 255
    statistics = {
        "mean image": image.mean(),
        "std channel0": image[:, 0].std(),
        "fraction ignore": (label == IGNORE).float().mean(),
        "mean probs": confidence.mean(),
        "fraction label 0": (label == 0).float().mean(),
        "mean channel 1": image[:, 1].mean(),
        "flip": choice.is_flipped,
        "jitter": bool(choice.colors),
        "blur": choice.is_blurred,
        "scaled": choice.scale != 1,
        "mean abs dx of channels 1,2": (image[:, 1:, :, 1:] - image[:, 1:, :, :-1]).abs().mean(),
    }
    return {column: float(value) for column, value in statistics.items()}


# ---- data


def check_datasets(path: Path) -> None:
    g = read(path)
    city = part(g, "city/")
    for name in cases_of(city, "/mask_out"):
        size = city[f"{name}/size"].tolist()
        factor = 0.5 if name == "half" else 1.0
        transform = BlackCrop((size[0], size[1]), (factor, factor))
        x, y = next(value for key, value in city.items() if key.startswith(f"{name}/x")).tolist()
        image, label = transform(city["image"].permute(2, 0, 1), city["mask"], Fixed(factor, y, x))
        assert (image.permute(1, 2, 0).int() - city[f"{name}/out"].int()).abs().max() <= 1
        # Of the two middle pixels the release's nearest may be the one before.
        assert_close(label, city[f"{name}/mask_out"])
    known = city["labelid_in"] < 34
    ours = torch.from_numpy(LABEL_ID_TABLE)[city["labelid_in"].long()].long()
    assert_close(ours[known], to_label(city["trainid_out"], RELEASED_IGNORE)[known])
    check_half_size_evaluation(city)
    rgb = g["gta5/rgb_in"].numpy()
    assert_close(torch.from_numpy(np.array(COLORS, dtype=np.uint8)), g["gta5/palette_rgb"])
    ours, _ = class_ids(Image.fromarray(rgb), path)
    assert_close(torch.from_numpy(ours).long(), to_label(g["gta5/trainid_out"], RELEASED_IGNORE))
    voc = part(g, "voc/")
    for case in cases_of(voc, "/bgr_in"):
        check_voc(part(voc, f"{case}/"), voc["crop"].tolist())


class Fixed:
    """Generator of one given scale and corner."""

    def __init__(self, scale: float, top: int, left: int) -> None:
        self.scale, self.corner = scale, [top, left]

    def uniform(self, low: float, high: float) -> float:
        return self.scale

    def integers(self, low: int, high: int, endpoint: bool) -> int:
        value = self.corner.pop(0)
        assert low <= value <= high and endpoint
        return value


def check_half_size_evaluation(city: Golden) -> None:
    seen = []

    class Seen(nn.Module):
        align_corners = True

        def forward(self, image: Tensor) -> Tensor:
            seen.append(image)
            return image

    image = city["image"].permute(2, 0, 1)[None]
    logits, _ = sum_logits(Seen(), image, tuple(city["mask"].shape), Protocol(reduce=2))
    assert logits.shape[-2:] == tuple(city["eval_half/mask_out_shape"].tolist())
    want = normalize(city["eval_half/out"].permute(2, 0, 1))
    assert ((seen[0][0] - want).abs() <= 1.001 / 255 / 0.22).all()


def check_voc(own: Golden, crop: list[int]) -> None:
    image = own["bgr_in"].flip(-1).permute(2, 0, 1)
    top, left = own["hoff_woff"].tolist()
    ours, label = BlackCrop((crop[0], crop[1]), (1.0, 1.0))(image, own["label_in"], Fixed(1.0, top, left))
    for name in cases_of(own, "/image"):
        assert_close(ours.flip(0) if name == "COCO" else ours, own[f"{name}/image"])  # BGR for weights from COCO
        assert_close(label.long(), to_label(own[f"{name}/label"], RELEASED_IGNORE))


def check_random_split(path: Path) -> None:
    for key, want in read(path).items():
        seed, count = (int(text[4 if index == 0 else 1 :]) for index, text in enumerate(key.split("_")))
        assert random_order(seed, 3, count)[: len(want)].tolist() == want.tolist()


def check_splits(path: Path) -> None:
    """Read pickles written from the file's numbers: of the published form, some equal to the byte."""
    g, exact = read(path), []
    for key in [key for key in g if not key.endswith("_of_pickle")]:
        order = g[key].numpy().astype(np.int64)
        stored = pickle.dumps(order, protocol=3).replace(b"numpy._core", b"numpy.core")
        digest = next(str(g[other]) for other in g if other.startswith(f"{key}_sha"))
        exact.append(hashlib.sha256(stored).hexdigest() == digest)
        assert read_order_of(stored).tolist() == order.tolist()
    assert any(exact)


def read_order_of(stored: bytes) -> np.ndarray:
    with NamedTemporaryFile(suffix=".pkl") as file:
        file.write(stored)
        file.flush()
        return read_order(file.name)


def check_voc_lists(path: Path) -> None:
    """Compare lists, which are sorted like the names of our reader: split ids are positions in that order."""
    g = read_bytes(path)
    for subset in sorted(key.removesuffix("/ids") for key in g if key.endswith("/ids")):
        ids = [name.decode() for name in g[f"{subset}/ids"].tolist()]
        assert ids == sorted(set(ids)) and len(ids) == g[f"{subset}/count"] and g[f"{subset}/is_sorted"]
        digest = next(str(g[key]) for key in g if key.startswith(f"{subset}/sha") and "ids" in key)
        assert hashlib.sha256("\n".join(ids).encode()).hexdigest() == digest


def read_bytes(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays.items())


# ---- networks


EMBEDDING_DIM = 256  # of the released networks


def model_of(path: Path, num_classes: int) -> ModelConfig:
    """Configure the network that a file name states."""
    if "v3plus" in path.name:
        backbone, head, stride = backbone_named(path, "resnet101"), "v3plus_memory_bank", 16
    else:
        backbone, head, stride = "resnet101", "v2_coco" if "coco" in path.name else "v2", 8
    return ModelConfig(num_classes, backbone, head=head, output_stride=stride, pretrained=False)


def released_keys(network: MemoryBankNetwork) -> dict[str, tuple[int, ...]]:
    """Derive the official key list (key -> shape) of our network from our own maps."""
    keys = official_keys(network.segmenter, MEMORY_BANK)
    first = "layer5.conv2d_list.0."
    for unreached in UNREACHED if f"{first}weight" in keys else ():
        keys |= {unreached + name: keys[first + name] for name in ("weight", "bias")}
    for key, value in network.heads.state_dict().items():
        prefix = next((prefix for prefix, ours in HEADS.items() if key.startswith(ours)), None)
        if prefix is not None:
            keys[prefix + key.removeprefix(HEADS[prefix])] = tuple(value.shape)
            continue
        official, ours = next((official, ours) for official, ours in SELECTORS.items() if key.startswith(ours))
        name = next(name for name, stacked in STACKED.items() if stacked == key.removeprefix(ours))
        shape = (1, *value.shape[1:]) if name.startswith("3.") else tuple(value.shape[1:])
        keys |= {f"{official}{index}.{name}": shape for index in range(len(value))}
    return keys


def fill(shapes: dict[str, tuple[int, ...]], offset: int, strong: bool) -> dict[str, Tensor]:
    """Draw weights by the two rules of the goldens, seeded by the rank of the sorted key."""
    state = {}
    for index, key in enumerate(sorted(shapes)):
        shape = shapes[key]
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.int64)
            continue
        noise = np.random.RandomState(index + offset).standard_normal(shape)
        small = noise * (0.1 if strong else 0.02)
        if key.endswith("running_var"):
            value = 1 + np.abs(small)
        elif strong and len(shape) >= 2:
            value = noise * math.sqrt(2 / math.prod(shape[1:]))
        elif len(shape) == 1 and key.endswith(".weight"):
            value = (1 + small) * (0.5 if strong and ".bn3." in key else 1)
        else:
            value = small
        state[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return state


def filled_network(path: Path, g: Golden, strong: bool) -> MemoryBankNetwork:
    model = model_of(path, int(g["num_classes"]))
    dims = g["projected_first8"].shape[1] if "projected_first8" in g else EMBEDDING_DIM
    network = unfilled(lambda: MemoryBankNetwork(model, dims, freeze_norms=True))
    state = fill(released_keys(network), int(g["fill_offset"]), strong)
    load_state(network.segmenter, deeplab_from_memory_bank(state), path.name, "the segmenter")
    load_state(network.heads, heads_from_released(state), path.name, "heads and selectors")
    return network


def check_network(path: Path) -> None:
    if path.name.endswith(".json.gz"):
        check_key_list(path)
        return
    g = read(path)
    network = filled_network(path, g, strong=False)
    segmenter, image = network.segmenter, input_of(g)
    with torch.no_grad():
        feature = segmenter.features(image)
        logits = segmenter.classifier(feature)
        rows = flatten_pixels(feature)
        everything = torch.ones(len(rows), dtype=torch.bool)
        projected = network.heads.projection(rows, everything)
        predicted = network.heads.prediction(projected, everything)
        first = [values[:8] for values in (projected, predicted)]
        last = int(g["num_classes"]) - 1
        none = torch.zeros(last + 1, dtype=torch.bool)
        selected = network.heads.selectors(first[1], torch.zeros(8, dtype=torch.int64), none)
        of_memory = network.heads.memory_selectors(first[0], torch.full((8,), last), none)
    step = int(g["logits_subsample"])
    same = {"rtol": 1e-4, "atol": 1e-6}
    assert list(logits.shape) == g["logits_shape"].tolist()
    assert list(feature.shape) == g["features_shape"].tolist()
    close(logits[..., ::step, ::step], g["logits"], **same)
    close(feature.flatten()[:: int(g["features_stride_flat"])], g["features_every_64th_flat"], **same)
    close(first[0], g["projected_first8"], **same)
    close(first[1], g["predicted_first8"], **same)
    # The files have what comes before the sigmoid.
    close(selected.logit(), g["selector0_first8"][:, 0], rtol=1e-4, atol=1e-5)
    close(of_memory.logit(), g["selector_memory_last_first8"][:, 0], rtol=1e-4, atol=1e-5)


def check_strong_network(path: Path) -> None:
    """Compare networks with a second filling, under which the two DeepLabV2 differ."""
    g = read(path)
    network = filled_network(path, g, strong=True).segmenter
    with torch.no_grad():
        feature = network.features(input_of(g))
        logits = network.classifier(feature)
    assert (logits - g["logits"]).abs().max() < 1e-3 * g["logits"].std()
    assert list(feature.shape) == g["features_shape"].tolist()
    want = g["features_every_kth_flat"]
    ours = feature.flatten()[:: int(g["features_stride_flat"])]
    assert (ours - want).abs().max() < 1e-3 * want.std()


def check_key_list(path: Path) -> None:
    """Compare all keys, and how many learn. Memory selectors do not here: the release gives them no gradient."""
    listed = read_json(path)
    model = model_of(path, int(listed["num_classes"]))
    network = outline(lambda: MemoryBankNetwork(model, EMBEDDING_DIM, freeze_norms=True))
    assert released_keys(network) == {key: tuple(shape) for key, shape, _ in listed["state_dict"]}
    frozen = [name for name, parameter in network.segmenter.named_parameters() if not parameter.requires_grad]
    names = {key: tuple(value.shape) for key, value in network.segmenter.named_parameters()}
    theirs = {key for key in listed["trainable"] if not key.startswith((*MEMORY_BANK_HEADS, *UNREACHED))}
    assert len(names) - len(frozen) == len(theirs)
    assert all(name.startswith("encoder.") for name in frozen)


# ---- a whole step


class Stem(nn.Module):
    """Segmenter of the fixture: a strided convolution, batch norm, ReLU; a 1x1 classifier."""

    def __init__(self, channels: int, num_classes: int, stride: int) -> None:
        super().__init__()
        self.align_corners, self.feature_channels = True, channels
        self.stem, self.stem_bn = nn.Conv2d(3, channels, 3, stride, 1), nn.BatchNorm2d(channels)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def features(self, image: Tensor) -> Tensor:
        return F.relu(self.stem_bn(self.stem(image)))

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image))


def step_network(state: Golden, g: Golden) -> MemoryBankNetwork:
    num_classes, dims = int(g["num_classes"]), int(g["F"])
    model = ModelConfig(num_classes, "resnet18", head="v3plus_memory_bank", channels=8, pretrained=False)
    network = unfilled(lambda: MemoryBankNetwork(model, dims, freeze_norms=True))
    network.segmenter = Stem(int(g["D"]), num_classes, int(g["stride"]))
    network.heads = Heads(int(g["D"]), num_classes, dims)
    own = {key.replace("cls.", "classifier."): value for key, value in state.items() if key.startswith(("stem", "cls"))}
    load_state(network.segmenter, own, "the golden", "the stem")
    load_state(network.heads, heads_from_released(state), "the golden", "heads and selectors")
    return network.train()


def check_train_step(path: Path) -> None:
    """Compare steps that each begin from the same state. Gradients that the release lacks are zero or None here."""
    g = read(path)
    for step in g["iters"].tolist():
        check_one_step(g, part(g, f"iter{step}/"), step)


def step_config(g: Golden) -> Config:
    """Configure a step: weights and thresholds of the method, and the values of the file that depend on the data."""
    method = Method(
        bank_size=int(g["memory_per_class"]),
        class_balance=str(g["dataset"]) == "cityscapes",
        use_teacher_train=bool(g["use_teacher"]),
        embedding_dim=int(g["F"]),
    )
    model = ModelConfig(int(g["num_classes"]), "resnet18", pretrained=False)
    return Config(DataConfig("voc", "", ""), model, OptimConfig(batch_size=len(g["images_aug"])), RunConfig(), method)


def check_one_step(g: Golden, want: Golden, step: int) -> None:
    config, num_classes = step_config(g), int(g["num_classes"])
    student, teacher = step_network(part(g, "student/"), g), step_network(part(g, "teacher/"), g)
    teacher.requires_grad_(False)
    bank = bank_of(g, "memory_before/", num_classes, int(g["memory_per_class"]), int(g["F"]))
    own = input_normalization(str(g["dataset"]), bgr=False)
    labeled, unlabeled = (own(normalize(g[name])) for name in ("images_aug", "joined_unlabeled"))
    label = to_label(g["labels_aug"], g["ignore_label"])
    pseudo_label = to_label(g["joined_pseudolabels"], g["ignore_label"])
    # The weights of the file are those of its balancer, which counts after step 2000 on Cityscapes only.
    weighs = config.method.class_balance and step > config.method.contrast_start
    class_weight = g["class_weights"] if weighs else torch.ones(num_classes)

    contrasts = step > config.method.contrast_start
    labels = {"labeled": label, "unlabeled": pseudo_label} if contrasts else None
    before = {name: values.clone() for name, values in student.heads.named_buffers()}
    output = student({"unlabeled": unlabeled, "labeled": labeled}, labels)
    if step > config.method.bank_start:
        # If the rows come from the student, its heads here have statistics of this step's rows already, which the
        # release computes later.
        with labeling_network(student, teacher, config) as network, swapped_buffers(student.heads, before):
            rows, classes = bank_candidates(network, labeled, label, config.method.bank_threshold, nullcontext)
        if "mask_correct_confident" in want:
            assert_close((classes != IGNORE).view_as(want["mask_correct_confident"]), want["mask_correct_confident"])
            assert_close(
                nearest_labels(label, want["labels_down"].shape[-2:]), to_label(want["labels_down"], g["ignore_label"])
            )
            entered = rows[classes != IGNORE]
            close(entered, want.get("projected", entered[:0]), rtol=1e-4, atol=1e-5)
        bank.update(rows, classes, teacher.heads.selectors, most_rows(g, len(labeled)))
    close_bank(bank, want, "memory_after/", {"rtol": 1e-4, "atol": 1e-5})

    size, corners, method = label.shape[-2:], student.segmenter.align_corners, config.method
    unlabeled_logits = upsample(output["unlabeled"], size, corners)
    pseudo = pseudo_label_loss(
        unlabeled_logits, pseudo_label, g["joined_maxprobs"], class_weight, method.confidence_power
    )
    losses = {
        "loss_supervised": supervised_loss(upsample(output["labeled"], size, corners), label, class_weight),
        "loss_pseudo": ramp(step, method.ramp_steps) * pseudo,
        "entropy": entropy_loss(unlabeled_logits, pseudo_label, method.entropy_broadcast),
    }
    contrast = {f"contrast_{name}": contrastive_term(name, output, bank, student) for name in ("labeled", "unlabeled")}
    weights = {"entropy": method.entropy_weight} | dict.fromkeys(contrast, method.contrast_weight)
    losses["loss"] = sum(weights.get(name, 1.0) * loss for name, loss in (losses | contrast).items())
    losses |= contrast if contrasts else {}
    names = {
        "labeled_loss": "loss_supervised",
        "loss_ce_unlabeled": "loss_pseudo",
        "entropy_loss_unscaled": "entropy",
        "loss_contr_labeled": "contrast_labeled",
        "loss_contr_unlabeled": "contrast_unlabeled",
        "total_loss": "loss",
    }
    for theirs, ours in names.items():
        if theirs == "total_loss" and want[theirs].isnan():
            assert losses[ours].isfinite()  # the sum with 0 in the place of what has nothing valid
        elif theirs in want:
            close_loss(losses[ours], want[theirs], rtol=1e-5, atol=1e-6)
    losses["loss"].backward()
    check_step_gradients(student, want)
    check_step_buffers(student, part(want, "student_after/"))
    check_step_buffers(teacher, part(want, "teacher_after/"))


@contextmanager
def swapped_buffers(module: nn.Module, given: dict[str, Tensor]) -> Iterator[None]:
    """Swap in other buffers within the block."""
    own = {name: values.clone() for name, values in module.named_buffers()}
    module.load_state_dict(given, strict=False)
    yield
    module.load_state_dict(own, strict=False)


def ours_of(network: MemoryBankNetwork, key: str) -> tuple[dict[str, Tensor], str, int | None]:
    """Return our tensors, our name for a released key, and the index of its class if classes are stacked."""
    if key.startswith(("stem", "cls")):
        key = key.replace("cls.", "classifier.")
        return dict(network.segmenter.named_parameters()) | dict(network.segmenter.named_buffers()), key, None
    everything = dict(network.heads.named_parameters()) | dict(network.heads.named_buffers())
    if prefix := next((prefix for prefix in HEADS if key.startswith(prefix)), None):
        return everything, HEADS[prefix] + key.removeprefix(prefix), None
    prefix = next(prefix for prefix in SELECTORS if key.startswith(prefix))
    index, name = key.removeprefix(prefix).split(".", 1)
    return everything, SELECTORS[prefix] + STACKED[name], int(index)


def check_step_gradients(network: MemoryBankNetwork, want: Golden) -> None:
    for key, flag in part(want, "grad_is_none/").items():
        if flag and "selector_memory" not in key:
            values, name, index = ours_of(network, key)
            gradient = values[name].grad
            gradient = gradient if gradient is None or index is None else gradient[index]
            assert gradient is None or not gradient.any(), key
    for key, value in part(want, "grad/").items():
        if want.get(f"grad_is_none/{key}"):
            continue
        values, name, index = ours_of(network, key)
        gradient = torch.zeros_like(values[name]) if values[name].grad is None else values[name].grad
        gradient = gradient if index is None else gradient[index]
        value, known = value.view_as(gradient), ~value.view_as(gradient).isnan()
        assert gradient.isfinite().all()
        close(gradient[known], value[known], rtol=1e-3, atol=1e-6)


def check_step_buffers(network: MemoryBankNetwork, want: Golden) -> None:
    for key, value in want.items():
        if "selector_memory" in key:
            continue  # without a consequence: we do not run them
        values, name, index = ours_of(network, key)
        buffer = values[name] if index is None else values[name][index]
        close(buffer, value, rtol=1e-4, atol=1e-5)


ADAPTERS: dict[str, Callable[[Path], None]] = {
    "augment_statistics": check_augment_statistics,
    "class_balance": check_class_balance,
    "classmix": check_classmix,
    "contrastive_loss": check_contrastive,
    "datasets": check_datasets,
    "feature_memory": check_feature_memory,
    "geometry": check_geometry,
    "losses": check_losses,
    "metric": check_metric,
    "net_": check_network,
    "per_class_samples": check_embeddings_per_image,
    "photometric": check_photometric,
    "random_split": check_random_split,
    "schedules": check_schedules,
    "splits": check_splits,
    "strongnet_": check_strong_network,
    "train_step": check_train_step,
    "voc_lists": check_voc_lists,
}
PUBLISHED_LISTS = {"splits", "voc_lists"}  # compared with where their folder is given; not ours to copy
