"""Compare PRCL with the outputs of its released functions, file by file.

Every number (classes, thresholds, temperatures, sizes) is read from the file. Where ours departs from the released code
on purpose, the check names the departure.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
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
    check_golden,
    check_loss,
    check_mean_of_draws,
    check_miou,
    check_poly,
    check_ramp_down,
    check_supervised,
    check_teacher,
    close,
    close_gradient,
    local_label,
    one_hot,
    part,
    read,
    to_label,
    without_golden,
)
from networks import (
    catch_stages,
    check_listed_networks,
    fill,
    input_of,
    listed_keys,
    load_filled,
    model_config,
    read_json,
    shapes_of,
    unfilled,
)
from torch import Tensor
from torch.testing import assert_close

from common import IGNORE
from common.datasets.cityscapes import LABEL_ID_TABLE
from common.datasets.reader import UNKNOWN
from prcl.losses import (
    Prototypes,
    Samples,
    contrastive_labels,
    contrastive_loss,
    mutual_likelihood_score,
    negative_class_probability,
    prototypes,
    sample,
    unsupervised_loss,
)
from prcl.train import Method, PRCLNetwork, ProbabilityHead


def test_golden(golden: Path) -> None:
    check_golden(golden, ADAPTERS)


def test_every_adapter_has_a_golden_of_our_own() -> None:
    assert without_golden("prcl", ADAPTERS) == set()


# ---- losses


def check_unsupervised(path: Path) -> None:
    g = read(path)
    logits = g["pred"].requires_grad_()
    loss = unsupervised_loss(logits, to_label(g["pseudo_label"]), g["conf"], float(g["threshold"]))
    check_loss(loss, {"pred": logits}, g)


def check_label_preparation(path: Path) -> None:
    g = read(path)
    labels = to_label(g["label_l"]), to_label(g["label_u"]), g["conf_u"]
    ours = contrastive_labels(*labels, float(g["weak_threshold"]), tuple(g["mask_all"].shape[-2:]))
    assert_close(one_hot(ours, int(g["num_classes"])), (g["label_all"] * g["mask_all"]).bool())


def check_score(path: Path) -> None:
    g = read(path)
    close(mutual_likelihood_score(g["mu_0"], g["sigma_0"], g["mu_1"], g["sigma_1"]), g["score"])


def check_contrastive(path: Path) -> None:
    g = read(path)
    torch.manual_seed(0)
    if "mean" in g:
        check_random_choices(g)
    else:
        check_recorded_choices(g)


def check_random_choices(g: Golden) -> None:
    label, classes = local_label(g), local_prototypes(g)
    temp, numbers = float(g["temp"]), (int(g["num_queries"]), int(g["num_negatives"]))

    def draw() -> float:
        samples = sample(label, g["prob"], classes, float(g["strong_threshold"]), temp, *numbers)
        return float(contrastive_loss(g["mu"], g["sigma"], classes, samples, temp))

    check_mean_of_draws(draw, g)


def check_recorded_choices(g: Golden) -> None:
    temp, classes = float(g["temp"]), local_prototypes(g)
    inputs = {"mu": g["mu"].requires_grad_(), "sigma": g["sigma"].requires_grad_()}
    if not g.get("has_graph", True):  # no two classes, or no hard pixel: a constant 0 in the release
        samples = sample(local_label(g), g["prob"], classes, float(g["strong_threshold"]), temp, 4, 4)
        check_loss(contrastive_loss(*inputs.values(), classes, samples, temp), inputs, g)
        return

    ids = g["valid_classes"].long()
    own = Prototypes(classes.mu[ids], classes.sigma[ids], classes.present[ids])
    assert own.present.all()
    close(own.mu, g["proto_mu"])
    close(own.sigma, g["proto_sigma"])
    chance = negative_class_probability(own, torch.ones(len(ids), dtype=torch.bool), temp)
    recorded = ~g["neg_class_prob"].isnan()
    close(chance[recorded], g["neg_class_prob"][recorded])
    samples = Samples(ids, g["anchor_idx"].long(), g["neg_idx"].long(), g["num_hard"] > 0)
    check_loss(contrastive_loss(*inputs.values(), classes, samples, temp), inputs, g)
    # A class that only the second process has takes part here and not in the release: nothing to compare.
    if "other_mu" not in g:
        check_draws(g, classes, chance)


def check_draws(g: Golden, classes: Prototypes, chance: Tensor) -> None:
    """Draw so many that every pixel occurs: anchors of the hard ones, negatives by the probability of their class."""
    ids, pixels = g["valid_classes"].long(), local_label(g).flatten()
    queries = 40 * max([1, *g["num_hard"].tolist()])
    drawn = sample(local_label(g), g["prob"], classes, float(g["strong_threshold"]), float(g["temp"]), queries, 20)
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


def local_prototypes(g: Golden) -> Prototypes:
    """Compute the prototypes of this process, with those of a second one if the file has it."""
    num_classes, others = g["label_onehot"].shape[1], []
    if "other_mu" in g:
        label = local_label(g, "other_")
        prototypes(g["other_mu"], g["other_sigma"], label, num_classes, lambda sums: others.append(sums) or sums)
    return prototypes(g["mu"], g["sigma"], local_label(g), num_classes, lambda sums: sum(others, sums))


# ---- networks


def check_network(path: Path) -> None:
    g = read(path)
    network = unfilled(lambda: PRCLNetwork(model_config(path, g), g["rep_shape"][1].item()))
    load_filled(network.segmenter, network.representation)
    network.probability.load_state_dict(fill(shapes_of(network.probability)))
    caught = catch_stages(network.segmenter)
    features = []
    network.probability.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    image = input_of(g)
    with torch.no_grad():
        output = network(image, image)

    same = {"rtol": 1e-3, "atol": 1e-3}
    for name in ("labeled", "unlabeled"):
        close(output[name], g["pred"], **same)
    both = output | {"feat": features[0]}
    for name, ours in (("rep", "mu"), ("feat", "feat"), ("sigma", "sigma")):
        for half in both[ours].chunk(2):
            assert name == "sigma" or list(half.shape) == g[f"{name}_shape"].tolist()
            close(half[:, ::16], g[f"{name}_sub16"], **same)
    for name, ours in (
        ("rep_mean", output["mu"]),
        ("rep_absmean", output["mu"].abs()),
        ("sigma_mean", output["sigma"]),
    ):
        close(ours.double().mean(), g[name], **same)
    for name in caught:
        assert list(caught[name].shape) == g[f"shape_{name}"].tolist()
        if name != "maxpool":
            close(caught[name].abs().double().mean(), g[f"{name}_absmean"], **same)
    close(caught["aspp"][:, ::32], g["aspp_sub32"], **same)


def check_key_lists(path: Path) -> None:
    check_listed_networks(path, PRCLNetwork)
    if "uncer_head" in read_json(path):
        theirs = listed_keys(path, "uncer_head")
        channels, in_channels = theirs["fc1"]
        assert shapes_of(ProbabilityHead(in_channels, channels)) == theirs


def check_probability_head(path: Path) -> None:
    g = read(path)
    channels, in_channels = g["sd.fc1"].shape
    head = ProbabilityHead(in_channels, channels)
    head.load_state_dict(part(g, "sd."))
    feature = g["x"].requires_grad_()
    close(head.eval()(feature), g["out_eval"])
    output = head.train()(feature)
    close(output, g["out_train"])
    output.sum().backward()
    close_gradient(feature.grad, g["grad_x_train_sum"])
    for key, value in head.state_dict().items():
        close(value, g[f"after.{key}"])


# ---- schedule, data


def check_ramp(path: Path) -> None:
    method = Method()
    released = (method.begin_epoch, method.max_epoch, method.max_value, method.min_value)
    check_ramp_down(path, released, method.ramp_mult)


def check_cityscapes(path: Path) -> None:
    """Compare only ids that Cityscapes defines: the released map makes all others road, ours void or an error."""
    g = read(path)
    ids, mapped = g["ids"].numpy(), g["mapped"].numpy()
    defined = ids <= 33
    assert defined.any()
    np.testing.assert_array_equal(LABEL_ID_TABLE[ids[defined]], mapped[defined])
    assert np.isin(LABEL_ID_TABLE[ids[~defined]], (IGNORE, UNKNOWN)).all()


ADAPTERS: dict[str, Callable[[Path], None]] = {
    "batch_transform": check_batch_transform,
    "cityscapes": check_cityscapes,
    "classmix": check_class_masks,
    "cutmix_box_stats": check_box_statistics,
    "cutmix_boxes": check_boxes,
    "ema": check_teacher,
    "label_prep": check_label_preparation,
    "miou": check_miou,
    "mix_": check_mix,
    "mls": check_score,
    "net_keys": check_key_lists,
    "net_": check_network,
    "poly_lr": check_poly,
    "prcl_loss": check_contrastive,
    "ramp": check_ramp,
    "sup_ce": check_supervised,
    "uncer_head": check_probability_head,
    "unsup": check_unsupervised,
}
