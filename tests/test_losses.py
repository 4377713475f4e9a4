"""Dice and focal loss against the formulas in plain NumPy, and where nothing is labeled."""

import numpy as np
import pytest
import torch

from common.losses import added_loss, cross_entropy, dice_loss, focal_loss, supervised_loss


def case(classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [2,C,5,6], and labels [2,5,6] with ignored pixels and without the last class."""
    numbers = torch.Generator().manual_seed(0)
    label = torch.randint(0, classes - 1, (2, 5, 6), generator=numbers)
    label[0, 1:3] = 255
    return torch.randn(2, classes, 5, 6, generator=numbers, requires_grad=True), label


def probabilities(logits: torch.Tensor, label: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [N,C] and labels [N] of the pixels that are not ignored."""
    values = np.moveaxis(logits.detach().double().numpy(), 1, -1).reshape(-1, logits.shape[1])
    shares = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    labeled = label.numpy().ravel() != 255
    return shares[labeled], label.numpy().ravel()[labeled]


def test_dice_is_the_mean_over_the_classes_that_labels_show():
    logits, label = case()
    shares, classes = probabilities(logits, label)
    wanted = []
    for number in np.unique(classes):
        mask = classes == number
        wanted.append(1 - 2 * shares[mask, number].sum() / (shares[:, number].sum() + mask.sum()))
    assert len(wanted) == 3  # the fourth class is absent
    assert dice_loss(logits, label).item() == pytest.approx(np.mean(wanted), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_is_the_weighted_mean_over_labeled_pixels(gamma):
    logits, label = case()
    shares, classes = probabilities(logits, label)
    right = shares[np.arange(len(classes)), classes]
    assert focal_loss(logits, label, gamma).item() == pytest.approx(
        -((1 - right) ** gamma * np.log(right)).mean(), 1e-5
    )


@pytest.mark.parametrize("loss", [dice_loss, focal_loss])
def test_the_loss_is_zero_with_a_graph_where_all_is_ignored_and_finite_for_extreme_logits(loss):
    logits, label = case()
    value = loss(logits, torch.full_like(label, 255))
    value.backward()
    assert value == 0 and not logits.grad.any()
    extreme = (1e4 * case()[0]).detach().requires_grad_()
    loss(extreme, label).backward()
    assert extreme.grad.isfinite().all()


def test_kinds_add_to_the_cross_entropy():
    logits, label = case()
    plain = cross_entropy(logits, label)
    assert supervised_loss(logits, label).equal(plain) and added_loss(logits, label, "ce") == 0
    assert supervised_loss(logits, label, kind="ce+dice").equal(plain + dice_loss(logits, label))
    assert supervised_loss(logits, label, kind="ce+focal").equal(plain + focal_loss(logits, label))
