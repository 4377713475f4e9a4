"""CSS's losses, memory and schedule where the recorded outputs do not reach: nothing to learn from, and the rules."""

import re

import pytest
import torch
from torch.nn import functional as F

from common.losses import ohem_cross_entropy
from css.losses import (
    Prototypes,
    Samples,
    contrastive_labels,
    contrastive_loss,
    largest_similarity_softmax,
    pseudo_labels,
    sample,
    similarity,
    unsupervised_loss,
)
from css.train import Method, contrastive_weight, main, steps_per_epoch, unreachable_thresholds

CLASSES, DIMS = 4, 8


@pytest.fixture
def maps():
    """Representation [2,8,6,7] with graph, and an indicator [2,4,6,7] by which every pixel is hard."""
    torch.manual_seed(0)
    return torch.randn(2, DIMS, 6, 7, requires_grad=True), torch.full((2, CLASSES, 6, 7), 0.25)


def stripes(*classes: int) -> torch.Tensor:
    """[2,6,7]: as many rows of each class."""
    return torch.tensor(classes).repeat_interleave(6 // len(classes))[None, :, None].expand(2, 6, 7).contiguous()


def drawn(representation, indicator, label) -> tuple[Prototypes, Samples]:
    memory = Prototypes(CLASSES, DIMS).to(representation.device)
    present = memory.update(representation, label, 0.99, lambda sums: sums)
    return memory, sample(label, indicator, memory.mean, present, 0.8, 0.5, num_queries=16, num_negatives=12)


def loss_of(representation, indicator, label) -> torch.Tensor:
    memory, samples = drawn(representation, indicator, label)
    return contrastive_loss(representation, memory.mean, samples, 0.5)


@pytest.mark.parametrize("label", [stripes(255), stripes(2), stripes(255, 2)])
def test_fewer_than_two_classes_give_zero_with_a_graph(maps, label):
    loss = loss_of(*maps, label)
    loss.backward()
    assert loss == 0
    assert maps[0].grad.eq(0).all()


def test_a_class_without_hard_pixels_adds_nothing_but_counts(maps):
    representation, indicator = maps
    easy = indicator.clone()
    easy[:, 0] = 0.9
    loss_of(representation, easy, stripes(0, 1)).backward()
    assert representation.grad[:, :, :3].eq(0).all()
    assert representation.grad[:, :, 3:].ne(0).any()
    torch.manual_seed(1)
    only_second = loss_of(representation, easy, stripes(0, 1))
    torch.manual_seed(1)
    both = loss_of(representation, indicator, stripes(0, 1))
    assert 0.3 < only_second / both < 0.7


def test_the_gradient_found_in_the_sweep_is_that_of_the_plain_formula(maps):
    representation, indicator = maps
    memory, picked = drawn(representation, indicator, stripes(0, 1, 3))
    contrastive_loss(representation, memory.mean, picked, 0.5).backward()
    rows = representation.detach().permute(0, 2, 3, 1).reshape(-1, DIMS)
    free = rows.clone().requires_grad_()
    total = 0.0
    for row, own in enumerate(picked.classes):
        others = torch.cat([memory.mean[own].expand(16, 1, DIMS), rows[picked.negatives[row]]], dim=1)
        logits = F.cosine_similarity(free[picked.anchors[row]][:, None], others, dim=2) / 0.5
        total = total + F.cross_entropy(logits, torch.zeros(16, dtype=torch.int64))
    (total / len(picked.classes)).backward()
    ours = representation.grad.permute(0, 2, 3, 1).reshape(-1, DIMS)
    torch.testing.assert_close(ours, free.grad, rtol=1e-4, atol=1e-7)


def test_rows_for_absent_classes_change_nothing(maps):
    representation, indicator = maps
    memory, picked = drawn(representation, indicator, stripes(1, 3))
    assert picked.classes.tolist() == [1, 3]
    # As on a GPU, which is not asked which classes there are.
    there = torch.tensor([False, True, False, True])
    everywhere = Samples(
        torch.arange(CLASSES),
        there,
        torch.zeros(CLASSES, 16, dtype=torch.int64).index_copy(0, picked.classes, picked.anchors),
        torch.zeros(CLASSES, 16, 12, dtype=torch.int64).index_copy(0, picked.classes, picked.negatives),
        there,
    )
    few, rows = (contrastive_loss(representation, memory.mean, samples, 0.5) for samples in (picked, everywhere))
    torch.testing.assert_close(few, rows)
    torch.testing.assert_close(*(torch.autograd.grad(loss, representation)[0] for loss in (few, rows)))


@pytest.mark.parametrize("kind", ["mix", "cross", "ori"])
def test_nothing_waits_for_a_device(kind):
    # Tensors of this device hold no values: whatever asks for one fails.
    representation = torch.rand(4, DIMS, 6, 7, device="meta", requires_grad=True)
    logits = torch.rand(2, CLASSES, 12, 14, device="meta", requires_grad=True)
    label = torch.zeros(2, 12, 14, dtype=torch.int64, device="meta")
    prototypes = torch.rand(CLASSES, DIMS, device="meta")
    small = torch.rand(2, CLASSES, 6, 7, device="meta"), torch.rand(2, DIMS, 6, 7, device="meta")
    pseudo, confidence = pseudo_labels(kind, *small, prototypes, 0.25, (12, 14), True)
    classes = contrastive_labels(label, pseudo[:, 0], confidence[:, 0], 0.7, (6, 7))
    indicator = similarity(representation, prototypes).softmax(1)
    total = unsupervised_loss(logits, pseudo[:, -1], confidence[:, -1], 0.97)
    total = total + loss_of(representation, indicator, classes) + ohem_cross_entropy(logits, label, 0.7, 50)
    total.backward()
    assert representation.grad.shape == representation.shape and logits.grad.shape == logits.shape


def test_prototypes_start_with_the_mean_and_then_follow_it():
    memory, label = Prototypes(CLASSES, DIMS), stripes(0, 2)
    first, second = torch.randn(2, 2, DIMS, 6, 7)
    assert memory.update(first, label, 0.9, lambda sums: sums).tolist() == [True, False, True, False]
    mean = first[:, :, :3].mean((0, 2, 3))
    torch.testing.assert_close(memory.mean[0], mean)
    assert memory.seen.tolist() == [True, False, True, False] and memory.mean[1].eq(0).all()
    memory.update(second, stripes(0), 0.9, lambda sums: sums)
    torch.testing.assert_close(memory.mean[0], 0.9 * mean + 0.1 * second.mean((0, 2, 3)))
    torch.testing.assert_close(memory.mean[2], first[:, :, 3:].mean((0, 2, 3)))


def test_a_representation_that_overflowed_does_not_enter_the_memory():
    memory = Prototypes(CLASSES, DIMS)
    representation = torch.randn(2, DIMS, 6, 7)
    memory.update(representation, stripes(0, 1), 0.9, lambda sums: sums)
    before = memory.mean.clone()
    representation[0, 0, 0, 0] = float("inf")
    assert not memory.update(representation, stripes(0, 1), 0.9, lambda sums: sums).any()
    assert memory.mean.equal(before)


def test_without_prototypes_the_first_class_is_nearest():
    labels, confidences = pseudo_labels(
        "cross",
        torch.randn(1, CLASSES, 3, 3),
        torch.randn(1, DIMS, 3, 3),
        torch.zeros(CLASSES, DIMS),
        0.1,
        (5, 5),
        True,
    )
    assert labels[:, 1].eq(0).all()
    torch.testing.assert_close(confidences[:, 1], torch.full((1, 5, 5), 1 / CLASSES))


def test_unsupervised_loss_without_a_confident_or_valid_pixel_is_zero():
    logits = torch.randn(2, CLASSES, 6, 7, requires_grad=True)
    assert unsupervised_loss(logits, stripes(0), torch.zeros(2, 6, 7), 0.97) == 0
    nothing = unsupervised_loss(logits, stripes(255), torch.ones(2, 6, 7), 0.97)
    nothing.backward()
    assert nothing == 0 and logits.grad.isfinite().all()


def test_hard_pixels_of_ignored_labels_give_zero_with_a_graph():
    logits = torch.randn(2, CLASSES, 6, 7, requires_grad=True)
    nothing = ohem_cross_entropy(logits, stripes(255), 0.7, 10)
    nothing.backward()
    assert nothing == 0 and logits.grad.eq(0).all()


@pytest.mark.parametrize(("labels", "batch", "steps"), [(92, 32, 2), (20, 32, 1), (372, 16, 23)])
def test_steps_per_epoch(labels, batch, steps):
    assert steps_per_epoch(labels, batch) == steps


def test_only_the_baseline_has_no_ramp():
    assert contrastive_weight(200.0, Method()) == 0
    assert contrastive_weight(200.0, Method(pseudo_label="ori", max_value=0.5)) == 0.5


def test_the_largest_softmax_is_that_of_one_and_minus_one():
    scores = torch.tensor([1.0] + [-1.0] * 20) / 0.5
    assert largest_similarity_softmax(0.5, 21) == pytest.approx(float(scores.softmax(0).max()), rel=1e-5)
    assert largest_similarity_softmax(1e-4, 21) == 1


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Method(similarity_temp=0.5), ["0.732", "strong_threshold 0.8"]),
        (Method(pseudo_label="cross", similarity_temp=0.5), ["0.732", "strong_threshold 0.8", "un_threshold 0.97"]),
        (Method(pseudo_label="cross", similarity_temp=0.3, un_threshold=0.98), ["0.975", "un_threshold 0.98"]),
        (Method(), None),
        (Method(pseudo_label="cross"), None),
        (Method(pseudo_label="ori", similarity_temp=0.5), None),
    ],
)
def test_thresholds_that_no_similarity_reaches_are_reported_with_the_bound(method, expected):
    warning = unreachable_thresholds(method, 21)
    assert (warning is None) == (expected is None)
    assert all(part in warning for part in expected or [])


def test_the_warning_is_printed_once(tiny, capsys):
    main(tiny("css/train.py", "--method.similarity_temp", "1"))
    assert len(re.findall("similarity is at most", capsys.readouterr().out)) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method.pseudo_label", "cross", "--method.warm_up", "100"],
        ["--method.pseudo_label", "ori", "--method.mix_mode", "cutout"],
        ["--method.ohem", "true", "--method.ramp_unit", "released", "--method.max_value", "0"],
        ["--optim.batch_size", "4", "--optim.accumulation", "2"],
    ],
)
def test_every_variant_trains(arguments, tiny, tmp_path):
    main(tiny("css/train.py", *arguments))
    assert (tmp_path / "run" / "checkpoints" / "step_00000006").exists()
