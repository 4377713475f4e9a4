"""Compare CSS with the outputs of its released functions, file by file.

Every number (classes, thresholds, temperatures, sizes) is read from the file. Where ours departs from the released code
on purpose, the check names the departure.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from augmentation import (
    check_batch_transform,
    check_box_statistics,
    check_boxes,
    check_class_masks,
    check_mix,
)
from checks import (
    Golden,
    cases_of,
    check_golden,
    check_loss,
    check_mean_of_draws,
    check_miou,
    check_poly,
    check_ramp_down,
    check_supervised,
    check_teacher,
    close,
    close_loss,
    local_label,
    one_hot,
    read,
    to_label,
    without_golden,
)
from networks import (
    catch_stages,
    check_listed_networks,
    input_of,
    load_filled,
    model_config,
    unfilled,
)
from torch import Tensor
from torch.testing import assert_close

from common.losses import ohem_cross_entropy, upsample
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
    check_golden(golden, ADAPTERS)


def test_every_adapter_has_a_golden_of_our_own() -> None:
    assert without_golden("css", ADAPTERS) == set()


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
    """Compare labels, confidences, indicator and unsupervised loss of every variant."""
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
        close_loss(loss, g[f"unsup_loss_{name}"])


def check_contrastive(path: Path) -> None:
    g = read(path)
    torch.manual_seed(0)
    if cases_of(g, "_label_onehot"):
        check_processes(g)
    elif "mean" in g:
        check_random_choices(g)
    else:
        check_recorded_choices(g)


def memory_before(g: Golden) -> Prototypes:
    """Build the memory as stored before the step; a class that was never seen has zeros."""
    memory = Prototypes(*g["prototypes_before"].shape)
    memory.mean.copy_(g["prototypes_before"])
    memory.seen.copy_(g["prototypes_before"].ne(0).any(1))
    return memory


def check_random_choices(g: Golden) -> None:
    memory, label = memory_before(g), local_label(g)
    present = memory.update(g["rep"], label, float(g["alpha"]), lambda sums: sums)
    close(memory.mean, g["prototypes_after"])
    temp, numbers = float(g["temp"]), (int(g["num_queries"]), int(g["num_negatives"]))

    def draw() -> float:
        samples = sample(label, g["prob"], memory.mean, present, float(g["strong_threshold"]), temp, *numbers)
        return float(contrastive_loss(g["rep"], memory.mean, samples, temp))

    check_mean_of_draws(draw, g)


def check_recorded_choices(g: Golden) -> None:
    temp, threshold = float(g["temp"]), float(g["strong_threshold"])
    memory, label, representation = memory_before(g), local_label(g), g["rep"].requires_grad_()
    present = memory.update(representation, label, float(g["alpha"]), lambda sums: sums)
    close(memory.mean, g["prototypes_after"])
    if not g.get("has_graph", True):  # no two classes, or no hard pixel: a constant 0 in the release
        samples = sample(label, g["prob"], memory.mean, present, threshold, temp, 4, 4)
        check_loss(contrastive_loss(representation, memory.mean, samples, temp), {"rep": representation}, g)
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
    """Compare and return the probabilities with which negatives of each class are drawn."""
    ids, stored = g[f"{prefix}valid_classes"].long(), g[f"{prefix}neg_class_prob"]
    available = torch.ones(len(ids), dtype=torch.bool)
    chance = negative_class_probability(memory.mean[ids], available, float(g["temp"]))
    close(chance[~stored.isnan()], stored[~stored.isnan()])
    return chance


def check_draws(g: Golden, memory: Prototypes, present: Tensor, chance: Tensor) -> None:
    """Draw so many that every pixel occurs: anchors of the hard ones, negatives by the probability of their class."""
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


def check_processes(g: Golden) -> None:
    """Compare processes. There each updates the prototypes of its own classes; here all are updated on each."""
    ranks = [f"{name}_" for name in cases_of(g, "_label_onehot")]
    alpha, num_classes = float(g["alpha"]), len(g["prototypes_before"])
    parts: list[Tensor] = []
    for prefix in ranks:
        Prototypes(num_classes, g[f"{prefix}rep"].shape[1]).update(
            g[f"{prefix}rep"], local_label(g, prefix), alpha, lambda sums: parts.append(sums) or sums
        )
    for prefix in ranks:
        memory = memory_before(g)
        memory.update(g[f"{prefix}rep"], local_label(g, prefix), alpha, lambda _: sum(parts))
        if f"{prefix}valid_classes" not in g:  # no two classes in this process
            close_loss(torch.zeros(()), g[f"{prefix}loss"])
            continue
        ids = g[f"{prefix}valid_classes"].long()
        close(memory.mean[ids], g[f"{prefix}prototypes_after"][ids])
        check_chances(g, memory, prefix)
        loss = contrastive_loss(g[f"{prefix}rep"], memory.mean, recorded(g, prefix), float(g["temp"]))
        close(loss, g[f"{prefix}loss"])


# ---- networks


def check_network(path: Path) -> None:
    g = read(path)
    network = unfilled(lambda: CSSNetwork(model_config(path, g), g["rep_shape"][1].item()))
    load_filled(network.segmenter, network.representation)
    caught, image = catch_stages(network.segmenter), input_of(g)
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
    check_listed_networks(path, CSSNetwork)


# ---- schedule


def check_ramp(path: Path) -> None:
    method = Method()
    released = (method.begin_epoch, method.max_epoch, method.max_value, method.min_value)
    check_ramp_down(path, released, method.ramp_mult)


ADAPTERS: dict[str, Callable[[Path], None]] = {
    "batch_transform": check_batch_transform,
    "classmix": check_class_masks,
    "contrast": check_contrastive,
    "cutmix_box_stats": check_box_statistics,
    "cutmix_boxes": check_boxes,
    "ema": check_teacher,
    "label_prep": check_label_preparation,
    "miou": check_miou,
    "mix_": check_mix,
    "net_keys": check_key_lists,
    "net_": check_network,
    "ohem": check_ohem,
    "poly_lr": check_poly,
    "pseudo_": check_pseudo_labels,
    "ramp": check_ramp,
    "sup_ce": check_supervised,
    "unsup": check_unsupervised,
}
