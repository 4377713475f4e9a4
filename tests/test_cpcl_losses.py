"""CPCL's losses where the recorded outputs do not reach: nothing to learn from, ties, and nothing that waits."""

from unittest import mock

import pytest
import torch

from common.losses import ohem_cross_entropy
from cpcl.losses import Prediction, count_pairs, disagreement, intersect, predict_pixels, reweighted_loss, unite
from cpcl.train import steps_per_epoch

CLASSES = 4


def predictions(first: list, second: list) -> tuple[Prediction, Prediction]:
    """Of a row of pixels, of confidence 0.9 and 0.5."""
    labels = [torch.tensor([[row]]) for row in (first, second)]
    return tuple(Prediction(label, torch.full(label.shape, value)) for label, value in zip(labels, (0.9, 0.5)))


def test_the_indicator_is_the_share_that_the_other_network_calls_something_else():
    first, second = predictions([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2])
    indicator = disagreement(count_pairs(first.label, second.label, CLASSES))
    # One pixel more on the diagonal: class 0 has 4 and 3 pixels of which 3 are agreed on, and so on; class 3 has none.
    shares = torch.tensor([1 / 4 + 0 / 3, 1 / 3 + 1 / 3, 0 / 2 + 1 / 3, 0.0], dtype=torch.float64)
    torch.testing.assert_close(indicator, shares / (shares.sum() + 1e-6))


def test_counts_of_processes_are_added_up_before_the_diagonal():
    first, second = predictions([0, 1], [0, 2])
    counts = count_pairs(first.label, second.label, CLASSES, lambda own: 2 * own)
    assert counts.diagonal().tolist() == [3, 1, 1, 1] and counts[1, 2] == 2


def test_the_class_disputed_more_wins_and_brings_its_confidence():
    first, second = predictions([0, 1, 1, 3], [0, 2, 3, 1])
    indicator = torch.tensor([0.1, 0.3, 0.2, 0.3], dtype=torch.float64)
    union, intersection = unite(first, second, indicator), intersect(first, second)
    assert union.label.tolist() == [[[0, 1, 3, 1]]]  # on a tie what network 2 says
    torch.testing.assert_close(union.weight, torch.tensor([[[0.7, 0.9, 0.5, 0.5]]]))
    assert intersection.label.tolist() == [[[0, 255, 255, 255]]]
    torch.testing.assert_close(intersection.weight, torch.full((1, 1, 4), 0.7))


def test_pixels_without_a_label_count_in_the_mean():
    first, second = predictions([0, 1, 1, 3], [0, 2, 3, 1])
    logits = torch.zeros(1, CLASSES, 1, 4)
    torch.testing.assert_close(reweighted_loss(logits, intersect(first, second)), 0.7 * torch.tensor(4.0).log() / 4)


def test_nothing_agreed_on_and_nothing_labeled_give_zero_with_a_graph():
    logits = torch.randn(1, CLASSES, 1, 2, requires_grad=True)
    nothing = reweighted_loss(logits, intersect(*predictions([0, 1], [1, 0])))
    weight = torch.tensor([1.0, 0.5, 2.0, 1.5])
    nothing = nothing + ohem_cross_entropy(logits, torch.full((1, 1, 2), 255), 0.7, 1, weight)
    nothing.backward()
    assert nothing == 0 and logits.grad.eq(0).all()


def test_confidence_of_large_logits_is_that_of_the_softmax():
    logits = 1e4 * torch.randn(2, CLASSES, 3, 5)
    label, confidence = predict_pixels(logits).label, predict_pixels(logits).confidence
    torch.testing.assert_close(confidence, logits.softmax(1).amax(1))
    assert label.equal(logits.argmax(1))


def test_class_weights_are_those_of_the_plain_formula():
    torch.manual_seed(0)
    logits, label = torch.randn(2, CLASSES, 6, 7), torch.randint(0, CLASSES, (2, 6, 7))
    weight = torch.tensor([1.0, 0.5, 2.0, 1.5])
    label[0, 0] = 255
    ours = ohem_cross_entropy(logits, label, 0.7, 1000, weight)  # more than there are: all are taken
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, label, weight, ignore_index=255))


def test_mining_does_not_sort_all_pixels():
    logits, label = torch.randn(2, CLASSES, 6, 7), torch.randint(0, CLASSES, (2, 6, 7))
    refused = mock.Mock(side_effect=AssertionError("sorted"))
    with mock.patch.multiple(torch.Tensor, sort=refused, argsort=refused, topk=mock.DEFAULT) as patched:
        patched["topk"].return_value.values = torch.ones(1)
        ohem_cross_entropy(logits, label, 0.7, 5)
    assert patched["topk"].call_args.kwargs["sorted"] is False


def test_nothing_waits_for_a_device():
    # Tensors of this device hold no values: whatever asks for one fails.
    logits = [torch.rand(2, CLASSES, 6, 7, device="meta", requires_grad=True) for _ in range(2)]
    first, second = (predict_pixels(each) for each in logits)
    indicator = disagreement(count_pairs(first.label, second.label, CLASSES))
    total = reweighted_loss(logits[0], intersect(first, second))
    total = total + reweighted_loss(logits[1], unite(first, second, indicator))
    label, weight = torch.zeros(2, 6, 7, dtype=torch.int64, device="meta"), torch.rand(CLASSES, device="meta")
    total = total + ohem_cross_entropy(logits[0], label, 0.7, 5, weight)
    total.backward()
    assert all(each.grad.shape == each.shape for each in logits)


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "batch", "steps"),
    [(662, 9920, 8, 1240), (1323, 9259, 8, 1157), (2646, 7936, 8, 992), (5291, 5291, 8, 661)]
    + [(186, 2789, 16, 174), (372, 2603, 16, 162), (744, 2231, 16, 139), (1488, 1487, 16, 93), (3, 4, 8, 1)],
)
def test_steps_per_epoch_are_the_released_ones(labeled, unlabeled, batch, steps):
    assert steps_per_epoch(labeled, unlabeled, batch) == steps
