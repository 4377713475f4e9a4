"""Compare CAC with the outputs of its released functions, file by file.

Every number (classes, thresholds, sizes) is read from the file. Where ours departs from the released code on purpose,
the check names the departure.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from augmentation import Replay, check_crop
from checks import (
    Golden,
    cases_of,
    check_golden,
    close,
    close_gradient,
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
    official_keys,
    outline,
    read_keys,
    shapes_of,
    unfilled,
    v3plus,
)
from torch import Tensor, nn
from torch.testing import assert_close

from cac_cps.config import CAC, Config, Method
from cac_cps.crops import LongerSideCrop, Pair, draw_pair, overlap_cells
from cac_cps.train import Bank, CACNetwork, context_term
from cac_cps.training import make_optimizer
from common import IGNORE
from common.config.sections import DataConfig, ModelConfig, OptimConfig, RunConfig
from common.evaluation.inference import Protocol, sum_logits
from common.losses import cross_entropy, upsample
from common.metrics import ConfusionMatrix
from common.models.weights import load_state
from common.optim import poly, set_lr
from common.released.weights import CAC as CAC_KEYS
from common.released.weights import deeplab_from_cac

UNUSED = "nothing that a script of ours runs"


def test_golden(golden: Path) -> None:
    check_golden(golden, ADAPTERS)


def test_every_adapter_has_a_golden_of_our_own() -> None:
    assert without_golden("cac", ADAPTERS) == set()


# ---- the contrastive step


def check_contrast(path: Path) -> None:
    """Compare consecutive steps, so that the bank fills; recorded decoder features stand in for the encoder."""
    g = read(path)
    network, bank, config = stub_network(g), None, config_of(g)
    for step in range(int(g["steps"])):
        own = part(g, f"s{step}_")
        if bank is None:
            bank = Bank(int(g["step_save"]) + 1, 2 * len(own["sel1"]), g["proj2_bias"].numel())
        check_contrast_step(network, bank, own, config, g)


def stub_network(g: Golden) -> CACNetwork:
    """Build our network with the file's classifier and projector."""
    network = CACNetwork(config_of(g).model, g["proj2_bias"].numel())
    network.segmenter.classifier = nn.Conv2d(*g["cls_weight"].shape[1::-1], 1)
    state = {"weight": g["cls_weight"], "bias": g["cls_bias"]}
    network.segmenter.classifier.load_state_dict(state)
    for index in (0, 2):
        weight = g[f"proj{index}_weight"]
        network.projector[index] = nn.Conv2d(*weight.shape[1::-1], 1)
        network.projector[index].load_state_dict({"weight": weight, "bias": g[f"proj{index}_bias"]})
    return network


def config_of(g: Golden) -> Config:
    method = CAC(
        pos_thresh_value=float(g["pos_thresh"]),
        temp=float(g["temp"]),
        weight_unsup=float(g["weight_unsup"]),
        step_save=int(g["step_save"]),
    )
    model = ModelConfig(
        int(g["num_classes"]), "resnet18", head="v3plus_cac", channels=g["cls_weight"].shape[1], pretrained=False
    )
    return Config(DataConfig("voc", "", ""), model, OptimConfig(), RunConfig(), Method(cac=method))


def check_contrast_step(network: CACNetwork, bank: Bank, own: Golden, config: Config, g: Golden) -> None:
    features = [own[f"feat{number}"].requires_grad_() for number in (1, 2)]
    network.zero_grad()
    given = iter([own["feat_l"], *features])
    network.segmenter.features = lambda image: next(given)
    height, width = (4 * side for side in features[0].shape[-2:])  # of the images of these features
    output = network(torch.empty(1), torch.empty(1, 2, 3, height, width))
    label = to_label(own["target_l"])
    supervised = cross_entropy(upsample(output["labeled"], label.shape[-2:], True), label)
    same = {"rtol": 1e-4, "atol": 1e-5}
    close_loss(supervised, own["loss_sup"], **same)

    size = output["embedding1"].shape[-2:]
    overlap = tuple(torch.from_numpy(cells) for cells in overlap_cells(pairs_of(own), *size))
    alone = SimpleNamespace(
        accelerator=SimpleNamespace(gather=lambda values: values, reduce=lambda values, how: values),
        monitor=SimpleNamespace(count_pseudo_labels=lambda *counted: None),
    )
    losses = context_term(output, overlap, (own["sel1"], own["sel2"]), bank, config, alone)
    for number in (1, 2):
        close_loss(losses[f"loss{number}"], own[f"loss{number}"], **same)
    unsupervised = config.method.cac.weight_unsup * (losses["loss1"] + losses["loss2"])
    close_loss(unsupervised, own["loss_unsup"], **same)
    total = supervised + unsupervised
    if not own["total"].isnan():  # NaN where all labels are ignored; ours is the sum with 0 in its place
        close(total, own["total"], **same)
    total.backward()
    check_contrast_gradients(network, features, own)
    assert bank.filled == own["bank_len"]
    kept = bank.label[len(bank.label) - bank.filled :].flatten()
    assert len(kept) == own["bank_rows"]
    assert_close(kept, own["bank_labels"].to(torch.uint8))


def check_contrast_gradients(network: CACNetwork, features: list[Tensor], own: Golden) -> None:
    for number, feature in enumerate(features, start=1):
        want = own[f"grad_feat{number}"]
        gradient = torch.zeros_like(feature) if feature.grad is None else feature.grad
        if gradient.shape != want.shape:  # a part is stored: every second cell of the last rows
            gradient = gradient[..., ::2, ::2][..., -want.shape[-2] :, :]
        close_to_largest(gradient, want)
    for i in (0, 2):
        close_to_largest(network.projector[i].weight.grad, own[f"grad_proj{i}_weight"])


def pairs_of(own: Golden) -> list[Pair]:
    def area(number: int, index: int) -> tuple[int, ...]:
        return (*own[f"ul{number}"][index].tolist(), *own[f"br{number}"][index].tolist())

    flips = own["flip"].tolist()
    return [Pair(0, 0, ((0, 0), (0, 0)), (area(1, i), area(2, i)), tuple(flips[i])) for i in range(len(flips))]


# ---- crops


def check_crop_geometry(path: Path) -> None:
    """Compare crops by recorded draws, with the bounds of scale and overlap of the config files."""
    g = read(path)
    released = CAC()
    for (crop, base, height, width, draws), rows, want in zip(g["meta"].tolist(), g["draws"], g["out"].tolist()):
        replay = Replay(rows[:draws])
        pair = draw_pair(replay, (height, width), (crop, crop), base, released.scale_range, released.iou_bound)
        ours = [*pair.overlaps[0], *pair.overlaps[1], *map(int, pair.flips)]
        assert ours == want
        assert not replay.rows


def check_augmentation(path: Path) -> None:
    """Compare images within a gray level, and labels up to a row or column: OpenCV rounds down."""
    g = read(path)
    for name in cases_of(g, "_draws"):
        base, crop = g[f"{name.split('_')[0]}_base_crop"].tolist()
        _, shortest, longest, _ = g[f"{name}_draws"][0].tolist()
        transform = LongerSideCrop((crop, crop), base, (shortest / base, longest / base))
        check_crop(transform, g["image"], g["label"], g[f"{name}_draws"], g[f"{name}_image"], g[f"{name}_label"])


# ---- networks


def check_network(path: Path) -> None:
    g = read(path)
    model = v3plus(g["logits_shape"][1].item(), backbone_named(path, "resnet50"))
    network = unfilled(lambda: CACNetwork(model, 4 * g["projector_sub"].shape[1]))
    state = fill_small(official_keys(network.segmenter, CAC_KEYS) | shapes_of(network.projector, "project."))
    load_state(network.segmenter, deeplab_from_cac(state), path.name, "the segmenter")
    network.projector.load_state_dict(part(state, "project."))

    assert sum(p.numel() for p in network.parameters()) == g["n_params"]
    backbone = len(list(network.segmenter.encoder.parameters()))
    assert backbone == g["n_backbone"]
    assert len(list(network.parameters())) - backbone == g["n_other"]

    segmenter, image = network.segmenter, input_of(g)
    caught = Caught(encoder=segmenter.encoder, aspp=segmenter.aspp, decoder=segmenter.decoder)
    with torch.no_grad():
        logits = upsample(segmenter(image), image.shape[-2:], segmenter.align_corners)
        cells = F.avg_pool2d(caught["decoder"], 2)
        projected = F.normalize(network.projector(cells), dim=1)
    same = {"rtol": 1e-4, "atol": 2e-6}
    assert list(logits.shape) == g["logits_shape"].tolist()
    close(logits[..., ::4, ::4], g["logits_sub"], **same)
    close(logits.double().sum((2, 3)), g["logits_sum"], rtol=1e-4, atol=2e-6 * logits[0, 0].numel())
    low, high = caught["encoder"]
    close(high[:, ::16], g["backbone_sub"], **same)
    close(low[:, ::16, ::2, ::2], g["low_sub"], **same)
    close(caught["aspp"][:, ::4], g["aspp_sub"], **same)
    close(caught["decoder"][:, ::8, ::2, ::2], g["decoder_sub"], **same)
    close(projected[:, ::4], g["projector_sub"], **same)


def check_key_list(path: Path) -> None:
    keys = read_keys(path)
    model = v3plus(keys["classifier.1.bias"][0], backbone_of(keys))
    network = outline(lambda: CACNetwork(model, keys["project.2.bias"][0]))
    assert official_keys(network.segmenter, CAC_KEYS) | shapes_of(network.projector, "project.") == keys


# ---- schedule, supervised loss, metrics, evaluation


def check_poly(path: Path) -> None:
    """Compare the rates of our optimizer: of everything but the backbone, then of the backbone."""
    g = read(path)
    names = cases_of(g, "_cfg")
    assert names
    for name in names:
        lr, epochs, steps = g[f"{name}_cfg"].tolist()
        total, used = int(epochs * steps), g[f"{name}_lr_used"].tolist()
        model = ModelConfig(3, "resnet18", head="v3plus_cac", channels=8, pretrained=False)
        config = Config(DataConfig("voc", "", ""), model, OptimConfig(lr=lr), RunConfig(), Method())
        optimizer = make_optimizer(config, outline(partial(CACNetwork, model, 8)))
        for step, rates in [*enumerate(used), (total, g[f"{name}_after_last"].tolist())]:
            set_lr(optimizer, poly(step, total, config.optim.poly_power))
            ours = {group["initial_lr"]: group["lr"] for group in optimizer.param_groups}
            assert [ours[first] for first in sorted(ours, reverse=True)] == pytest.approx(rates, rel=0, abs=1e-9)


def check_supervised(path: Path) -> None:
    """Compare the cross-entropy. The release never calls the other losses of the file, and ours has none of them."""
    g = read(path)
    logits, label = g["logits"].requires_grad_(), to_label(g["target"])
    same = {"rtol": 1e-4, "atol": 1e-5}
    loss = cross_entropy(logits, label)
    close_loss(loss, g["ce"], **same)
    loss.backward()
    if g["ce"].isnan():
        assert logits.grad.eq(0).all()
    else:
        close_gradient(logits.grad, g["ce_grad"])
    close_loss(cross_entropy(logits.detach() / 2, label), g["ce_temp2"], **same)
    close_loss(cross_entropy(logits.detach(), torch.full_like(label, IGNORE)), g["ce_all_ignored"], **same)


def check_metrics(path: Path) -> None:
    """Compare counts and IoU. Our mean is over classes that occur; the released one counts an absent class as 0."""
    g = read(path)
    confusion = ConfusionMatrix(g["logits"].shape[1])
    confusion.update(g["logits"].argmax(1), g["target"])
    counts = confusion.matrix.double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    close(counts.diagonal(), g["inter"], rtol=0, atol=0)
    close(union, g["union"], rtol=0, atol=0)
    assert int(counts.sum()) == g["labeled"]
    assert int(counts.diagonal().sum()) == g["correct"]
    scores = confusion.scores()
    assert np.nan_to_num(scores.per_class_iou) == pytest.approx(g["iou"].nan_to_num().numpy(), abs=1e-6)
    assert np.nan_to_num(scores.pixel_accuracy) == pytest.approx(float(g["pixacc"].nan_to_num()), abs=1e-6)
    if (union > 0).all():
        assert scores.miou == pytest.approx(float(g["miou"]), abs=1e-6)
    empty = ConfusionMatrix(g["logits"].shape[1])
    empty.update(g["logits"].argmax(1), torch.full_like(g["target"], IGNORE))
    assert int(empty.matrix.sum()) == g["ign_labeled"]
    assert int(empty.matrix.diagonal().sum()) == g["ign_correct"]


def check_validation(path: Path) -> None:
    g = read(path)
    height, width = g["x"].shape[-2:]
    multiple = 8
    assert g["padded_shape"][-2:].tolist() == [height + -height % multiple, width + -width % multiple]
    convolution = nn.Conv2d(*g["weight"].shape[1::-1], g["weight"].shape[-1], stride=multiple, padding=1)
    convolution.load_state_dict({"weight": g["weight"], "bias": g["bias"]})
    convolution.align_corners = True
    # Our evaluation takes images in [0,1]; the file has what is already normalized.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.evaluation.inference.normalize", lambda image: image)
        ours, _ = sum_logits(convolution, g["x"], (height, width), Protocol(multiple=multiple))
    close(ours, g["out"], rtol=1e-4, atol=1e-5)


def skip_unused(path: Path) -> None:
    pytest.skip(f"{path.name}: {UNUSED}")


ADAPTERS: dict[str, Callable[[Path], None]] = {
    "augment": check_augmentation,
    "cac_": check_key_list,
    "contrast_": check_contrast,
    "crop_": check_crop_geometry,
    "metric": check_metrics,
    "network_": check_network,
    "poly_lr": check_poly,
    "rampup": skip_unused,
    "supervised": check_supervised,
    "val_": check_validation,
}
