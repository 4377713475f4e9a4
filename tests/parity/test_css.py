"""CSS against what its released functions returned, file by file.

Every number (classes, thresholds, temperatures, sizes) is read from the file. Departures of ours from the released code
are named where they are allowed for.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import (
    Golden,
    check_batch_transform,
    check_box_statistics,
    check_boxes,
    check_class_masks,
    check_loss,
    check_miou,
    check_mix,
    check_poly,
    check_supervised,
    check_teacher,
    close,
    local_label,
    one_hot,
    read,
    to_label,
)
from networks import (
    catch_stages,
    conv_geometry,
    draw_input,
    listed_config,
    load_filled,
    model_config,
    prcl_css_keys,
    read_conv_geometry,
    read_key_list,
)
from torch import Tensor
from torch.testing import assert_close

from common.losses import ohem_cross_entropy, upsample
from common.optim import exponential_ramp
from css.losses import (
    Prototypes,
    Samples,
    contrastive_labels,
    contrastive_loss,
    negative_class_probability,
    pseudo_labels,
    sample,
    similarity,
    unsupervised_loss,
)
from css.train import CSSNetwork, Method


def test_golden(golden: Path) -> None:
    adapter_of(golden.name)(golden)


def test_every_adapter_has_a_golden_of_our_own() -> None:
    names = [path.name for path in (Path(__file__).parent / "goldens" / "css").iterdir()]
    assert {prefix for prefix in ADAPTERS if not any(name.startswith(prefix) for name in names)} == set()


def adapter_of(name: str) -> Callable[[Path], None]:
    """The check that belongs to a file name."""
    for prefix, adapter in ADAPTERS.items():
        if name.startswith(prefix):
            return adapter
    pytest.fail(f"no adapter for {name}: its prefix is none of {', '.join(ADAPTERS)}")


# ---- losses


def check_unsupervised(path: Path) -> None:
    g = read(path)
    logits = g["pred"].requires_grad_()
    loss = unsupervised_loss(logits, to_label(g["pseudo_label"]), g["conf"], float(g["threshold"]))
    check_loss(loss, {"pred": logits}, g)


def check_ohem(path: Path) -> None:
    g = read(path)
    logits = g["pred"].requires_grad_()
    loss = ohem_cross_entropy(logits, to_label(g["label"]), float(g["thresh"]), int(g["min_kept"]))
    check_loss(loss, {"pred": logits}, g)


def check_label_preparation(path: Path) -> None:
    g = read(path)
    labels = to_label(g["label_l"]), to_label(g["label_u"]), g["conf_u"]
    ours = contrastive_labels(*labels, float(g["weak_threshold"]), tuple(g["mask_all"].shape[-2:]))
    assert_close(one_hot(ours, int(g["num_classes"])), (g["label_all"] * g["mask_all"]).bool())


def check_pseudo_labels(path: Path) -> None:
    """Labels, confidences, indicator and unsupervised loss of every variant."""
    g = read(path)
    size, temp, corners = tuple(g["out_size"].tolist()), float(g["temp"]), True
    given = g["teacher_pred_u"], g["teacher_rep_u"], g["prototypes"], temp, size, corners
    close(upsample(g["student_pred_l"], size, corners), g["pred_l_large"])
    student = upsample(g["student_pred_u"], size, corners)
    close(student, g["pred_u_large"])

    ori, cross, mix = (pseudo_labels(kind, *given) for kind in ("ori", "cross", "mix"))
    wanted = (
        (ori, "ori_label", "ori_conf", "valid_u_ori"),
        (cross, "cross_label_cls", "cross_conf_cls", "valid_u_cross"),
        (mix, "mix_label", "mix_conf_cls", "valid_u_mix"),
    )
    for (label, confidence), want_label, want_confidence, want_valid in wanted:
        assert_close(label[:, 0], g[want_label].long())
        close(confidence[:, 0], g[want_confidence])
        valid, weak_threshold = g[want_valid].bool(), float(g["weak_threshold"])
        none = torch.empty(0, *size, dtype=torch.int64)
        classes = contrastive_labels(none, label[:, 0], confidence[:, 0], weak_threshold, valid.shape[-2:])
        assert_close(one_hot(classes, valid.shape[1]), valid)
    assert_close(cross[0][:, 1], g["cross_label_rep"].long())
    close(cross[1][:, 1], g["cross_conf_rep"])
    close(cross[1][:, 1], g["mix_conf_rep"])
    assert_close(mix[0][:, 0], to_label(g["mix_label_ignore"]))

    scores = torch.cat([g["student_pred_l"], g["student_pred_u"]])
    representation = torch.cat([g["student_rep_l"], g["student_rep_u"]])
    close(scores.softmax(1), g["ori_prob_all"])
    close(representation, g["rep_all"])
    indicator = (similarity(representation, g["prototypes"]) / temp).softmax(1)
    for name in ("cross", "mix"):
        close(indicator, g[f"{name}_prob_all"])

    for name, (label, confidence) in (("ori", ori), ("cross", cross), ("cross_warmup", ori), ("mix", mix)):
        loss = unsupervised_loss(student, label[:, -1], confidence[:, -1], float(g["un_threshold"]))
        close(loss, g[f"unsup_loss_{name}"].nan_to_num(0.0))


def check_contrastive(path: Path) -> None:
    g = read(path)
    torch.manual_seed(0)
    if "rank0_rep" in g:
        check_two_processes(g)
    elif "draws" in g:
        check_mean_of_draws(g)
    else:
        check_recorded_choices(g)


def memory_before(g: Golden) -> Prototypes:
    """The memory as stored before the step; a class that was never seen has zeros."""
    memory = Prototypes(*g["prototypes_before"].shape)
    memory.mean.copy_(g["prototypes_before"])
    memory.seen.copy_(g["prototypes_before"].ne(0).any(1))
    return memory


def check_mean_of_draws(g: Golden) -> None:
    memory, label = memory_before(g), local_label(g)
    present = memory.update(g["rep"], label, float(g["alpha"]), lambda sums: sums)
    close(memory.mean, g["prototypes_after"])
    temp, numbers = float(g["temp"]), (int(g["num_queries"]), int(g["num_negatives"]))

    def draw() -> float:
        samples = sample(label, g["prob"], memory.mean, present, float(g["strong_threshold"]), temp, *numbers)
        return float(contrastive_loss(g["rep"], memory.mean, samples, temp))

    losses = np.array([draw() for _ in range(300)])
    stderr = losses.std() / np.sqrt(len(losses))
    assert abs(losses.mean() - float(g["mean"])) < 4 * np.hypot(stderr, float(g["stderr"]))
    assert losses.std() == pytest.approx(float(g["std"]), rel=0.3)


def check_recorded_choices(g: Golden) -> None:
    temp, threshold = float(g["temp"]), float(g["strong_threshold"])
    memory, label, representation = memory_before(g), local_label(g), g["rep"].requires_grad_()
    present = memory.update(representation, label, float(g["alpha"]), lambda sums: sums)
    close(memory.mean, g["prototypes_after"])
    if present.sum() < 2:  # the loss is 0
        samples = sample(label, g["prob"], memory.mean, present, threshold, temp, 4, 4)
        nothing = {"grad_rep": torch.zeros_like(representation)}
        check_loss(contrastive_loss(representation, memory.mean, samples, temp), {"rep": representation}, g | nothing)
        return
    assert_close(present.nonzero().flatten(), g["valid_classes"].long())
    chance = check_chances(g, memory)
    samples = recorded(g)
    check_loss(contrastive_loss(representation, memory.mean, samples, temp), {"rep": representation}, g)
    check_draws(g, memory, present, chance)


def recorded(g: Golden, prefix: str = "") -> Samples:
    ids, hard = g[f"{prefix}valid_classes"].long(), g[f"{prefix}num_hard"] > 0
    choices = (g[f"{prefix}{name}"].long() for name in ("anchor_idx", "neg_idx"))
    return Samples(ids, torch.ones_like(hard), *choices, hard)


def check_chances(g: Golden, memory: Prototypes, prefix: str = "") -> Tensor:
    """The probabilities with which negatives of a class are drawn, which are returned."""
    ids, stored = g[f"{prefix}valid_classes"].long(), g[f"{prefix}neg_class_prob"]
    available = torch.ones(len(ids), dtype=torch.bool)
    chance = negative_class_probability(memory.mean[ids], available, float(g["temp"]))
    close(chance[~stored.isnan()], stored[~stored.isnan()])
    return chance


def check_draws(g: Golden, memory: Prototypes, present: Tensor, chance: Tensor) -> None:
    """Draw so many that every pixel comes: anchors from the hard ones, negatives from all, by chances of classes."""
    label, ids = local_label(g), g["valid_classes"].long()
    pixels = label.flatten()
    queries = 40 * max([1, *g["num_hard"].tolist()])
    settings = float(g["strong_threshold"]), float(g["temp"])
    drawn = sample(label, g["prob"], memory.mean, present, *settings, queries, 20)
    assert_close(drawn.classes, ids)
    assert_close(drawn.used, g["num_hard"] > 0)
    total = queries * 20
    for row in drawn.used.nonzero().flatten():
        anchors, negatives = drawn.anchors[row].unique(), drawn.negatives[row].flatten()
        assert len(anchors) == g["num_hard"][row]
        assert (pixels[anchors] == ids[row]).all()
        frequency = pixels[negatives].bincount(minlength=256)[ids] / total
        spread = (chance[row] * (1 - chance[row]) / total).sqrt()
        assert ((frequency - chance[row]).abs() <= 5 * spread + 10 / total).all()
        seen = pixels[negatives.unique()].bincount(minlength=256)[ids]
        often = chance[row] * total > 40 * g["num_valid"]
        assert_close(seen[often], g["num_valid"][often])


def check_two_processes(g: Golden) -> None:
    """There each process moves only the prototypes of its own classes; ours move those of both, alike on both."""
    ranks = [f"rank{rank}_" for rank in range(sum(key.endswith("_rep") for key in g))]
    alpha, num_classes = float(g["alpha"]), len(g["prototypes_before"])
    parts: list[Tensor] = []
    for prefix in ranks:
        Prototypes(num_classes, g[f"{prefix}rep"].shape[1]).update(
            g[f"{prefix}rep"], local_label(g, prefix), alpha, lambda sums: parts.append(sums) or sums
        )
    for prefix in ranks:
        memory = memory_before(g)
        memory.update(g[f"{prefix}rep"], local_label(g, prefix), alpha, lambda _: sum(parts))
        ids = g[f"{prefix}valid_classes"].long()
        close(memory.mean[ids], g[f"{prefix}prototypes_after"][ids])
        check_chances(g, memory, prefix)
        loss = contrastive_loss(g[f"{prefix}rep"], memory.mean, recorded(g, prefix), float(g["temp"]))
        close(loss, g[f"{prefix}loss"])


# ---- networks


def check_network(path: Path) -> None:
    g = read(path)
    network = CSSNetwork(model_config(g), g["rep_shape"][1].item()).eval()
    load_filled(network.segmenter, network.representation)
    caught = catch_stages(network.segmenter)
    image = draw_input(int(g["x_seed"]), g["x_shape"].tolist())
    with torch.no_grad():
        output = network(image, image)

    same = {"rtol": 1e-3, "atol": 1e-3}
    for name in ("labeled", "unlabeled"):
        close(output[name], g["pred"], **same)
    representation = output["representation"]
    for half in representation.chunk(2):
        assert list(half.shape) == g["rep_shape"].tolist()
        close(half[:, ::16], g["rep_sub16"], **same)
    close(representation.double().mean(), g["rep_mean"], **same)
    close(representation.abs().double().mean(), g["rep_absmean"], **same)
    for name in caught:
        assert list(caught[name].shape) == g[f"shape_{name}"].tolist()
        if name != "maxpool":
            close(caught[name].abs().double().mean(), g[f"{name}_absmean"], **same)
    close(caught["aspp"][:, ::32], g["aspp_sub32"], **same)


def check_key_lists(path: Path) -> None:
    for name, stem in (("plain", "plain"), ("stem", "deep")):
        with torch.device("meta"):
            segmenter = CSSNetwork(listed_config(path, name, stem), 256).segmenter
        assert prcl_css_keys(segmenter) == read_key_list(path, name)
        assert conv_geometry(segmenter) == read_conv_geometry(path, name)


# ---- schedule


def check_ramp(path: Path) -> None:
    """The released setting, which the file does not state and our config has as default, and another one."""
    g, method = read(path), Method()
    released = (method.begin_epoch, method.max_epoch, method.max_value, method.min_value)
    alternative = g["alt_begin_max_maxv_minv"].tolist()
    for epochs, want, ramp in (
        (g["epoch"].tolist(), g["value"].tolist(), released),
        (range(len(g["alt_value"])), g["alt_value"].tolist(), alternative),
    ):
        ours = [exponential_ramp(epoch, *ramp, method.ramp_mult) for epoch in epochs]
        assert ours == pytest.approx(want, rel=0, abs=1e-9)


# The first prefix that fits counts.
ADAPTERS: dict[str, Callable[[Path], None]] = {
    "batch_transform_": check_batch_transform,
    "classmix_count": check_class_masks,
    "contrast_": check_contrastive,
    "cutmix_box_stats": check_box_statistics,
    "cutmix_boxes": check_boxes,
    "ema": check_teacher,
    "label_prep_": check_label_preparation,
    "miou_": check_miou,
    "mix_": check_mix,
    "net_keys": check_key_lists,
    "net_": check_network,
    "ohem": check_ohem,
    "poly_lr": check_poly,
    "pseudo_": check_pseudo_labels,
    "ramp": check_ramp,
    "sup_ce_": check_supervised,
    "unsup_": check_unsupervised,
}
