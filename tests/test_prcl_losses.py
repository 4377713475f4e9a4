"""PRCL's loss and schedule where the recorded outputs do not reach: nothing to learn from, and the paper's rules."""

import pytest
import torch

from prcl.losses import (
    Samples,
    contrastive_labels,
    contrastive_loss,
    mutual_likelihood_score,
    prototypes,
    sample,
    unsupervised_loss,
)
from prcl.train import main, steps_per_epoch

CLASSES, DIMS = 4, 8


@pytest.fixture
def maps():
    """mu and sigma [2,8,6,7] with graph, and probability [2,4,6,7] so that every pixel is hard."""
    torch.manual_seed(0)
    mu = torch.randn(2, DIMS, 6, 7, requires_grad=True)
    sigma = torch.rand(2, DIMS, 6, 7).add(0.1).requires_grad_()
    return mu, sigma, torch.full((2, CLASSES, 6, 7), 0.25)


def loss_of(mu, sigma, probability, label) -> torch.Tensor:
    means = prototypes(mu, sigma, label, CLASSES, lambda total: total)
    picked = sample(label, probability, means, 0.8, 0.5, num_queries=16, num_negatives=12)
    return contrastive_loss(mu, sigma, means, picked, 0.5)


@pytest.mark.parametrize("present", [[], [2]])
def test_fewer_than_two_classes_give_zero_with_a_graph(maps, present):
    label = torch.full((2, 6, 7), 255)
    label[:, :3] = present[0] if present else 255
    loss = loss_of(*maps, label)
    loss.backward()
    assert loss == 0
    assert maps[0].grad.eq(0).all() and maps[1].grad.eq(0).all()


def test_a_class_without_hard_pixels_adds_nothing_but_counts(maps):
    mu, sigma, probability = maps
    label = torch.zeros(2, 6, 7, dtype=torch.int64)
    label[:, 3:] = 1
    easy = probability.clone()
    easy[:, 0] = 0.9
    loss_of(mu, sigma, easy, label).backward()
    assert mu.grad[:, :, :3].eq(0).all()
    assert mu.grad[:, :, 3:].ne(0).any()
    torch.manual_seed(1)
    only_second = loss_of(mu, sigma, easy, label)
    torch.manual_seed(1)
    both = loss_of(mu, sigma, probability, label)
    assert 0.3 < only_second / both < 0.7


def test_the_gradient_found_in_the_sweep_is_that_of_the_plain_formula(maps):
    mu, sigma, probability = maps
    label = torch.arange(2 * 6 * 7).view(2, 6, 7) % CLASSES
    means = prototypes(mu, sigma, label, CLASSES, lambda total: total)
    picked = sample(label, probability, means, 0.8, 0.5, num_queries=16, num_negatives=12)
    contrastive_loss(mu, sigma, means, picked, 0.5).backward()
    rows = [tensor.detach().permute(0, 2, 3, 1).reshape(-1, DIMS) for tensor in (mu, sigma)]
    free = [tensor.clone().requires_grad_() for tensor in rows]
    total = 0.0
    for row, own in enumerate(picked.classes):
        anchor = [tensor[picked.anchors[row]][:, None] for tensor in free]
        proto = [tensor[own].expand(16, 1, DIMS) for tensor in (means.mu, means.sigma)]
        other = [torch.cat([p, tensor[picked.negatives[row]]], dim=1) for p, tensor in zip(proto, rows)]
        logits = mutual_likelihood_score(*anchor, *other) / 0.5
        total = total + torch.nn.functional.cross_entropy(logits, torch.zeros(16, dtype=torch.int64))
    (total / len(picked.classes)).backward()
    for ours, plain in zip((mu.grad, sigma.grad), (tensor.grad for tensor in free)):
        torch.testing.assert_close(ours.permute(0, 2, 3, 1).reshape(-1, DIMS), plain, rtol=1e-4, atol=1e-7)


def test_rows_for_absent_classes_change_nothing(maps):
    mu, sigma, probability = maps
    label = torch.full((2, 6, 7), 1)
    label[:, 3:] = 3
    means = prototypes(mu, sigma, label, CLASSES, lambda total: total)
    picked = sample(label, probability, means, 0.8, 0.5, num_queries=16, num_negatives=12)
    assert picked.classes.tolist() == [1, 3]
    # As on a GPU, which is not asked which classes there are.
    everywhere = Samples(
        torch.arange(CLASSES),
        torch.zeros(CLASSES, 16, dtype=torch.int64).index_copy(0, picked.classes, picked.anchors),
        torch.zeros(CLASSES, 16, 12, dtype=torch.int64).index_copy(0, picked.classes, picked.negatives),
        torch.tensor([False, True, False, True]),
    )
    few, all_rows = (contrastive_loss(mu, sigma, means, samples, 0.5) for samples in (picked, everywhere))
    torch.testing.assert_close(few, all_rows)
    torch.testing.assert_close(*(torch.autograd.grad(loss, mu)[0] for loss in (few, all_rows)))


def test_nothing_waits_for_a_device():
    # Tensors of this device hold no values: whatever asks for one fails.
    mu, sigma = (torch.rand(4, DIMS, 6, 7, device="meta", requires_grad=True) for _ in range(2))
    logits = torch.rand(2, CLASSES, 12, 14, device="meta", requires_grad=True)
    label = torch.zeros(2, 12, 14, dtype=torch.int64, device="meta")
    confidence = torch.rand(2, 12, 14, device="meta")
    classes = contrastive_labels(label, label, confidence, 0.7, (6, 7))
    probability = torch.rand(4, CLASSES, 6, 7, device="meta")
    total = unsupervised_loss(logits, label, confidence, 0.97) + loss_of(mu, sigma, probability, classes)
    total.backward()
    assert mu.grad.shape == mu.shape and logits.grad.shape == logits.shape


def test_unsupervised_loss_without_a_confident_or_valid_pixel_is_zero():
    logits = torch.randn(2, CLASSES, 6, 7, requires_grad=True)
    label = torch.zeros(2, 6, 7, dtype=torch.int64)
    assert unsupervised_loss(logits, label, torch.zeros(2, 6, 7), 0.97) == 0
    nothing = unsupervised_loss(logits, torch.full_like(label, 255), torch.ones(2, 6, 7), 0.97)
    nothing.backward()
    assert nothing == 0 and logits.grad.isfinite().all()


def test_weak_pixels_are_left_out_of_the_contrastive_labels():
    label = torch.ones(1, 4, 4, dtype=torch.int64)
    confidence = torch.full((1, 4, 4), 0.9)
    confidence[:, :2] = 0.6
    classes = contrastive_labels(label, label, confidence, 0.7, (2, 2))
    assert classes.tolist() == [[[1, 1], [1, 1]], [[255, 255], [1, 1]]]


@pytest.mark.parametrize(("labels", "batch", "steps"), [(662, 16, 84), (662, 2, 993), (150, 48, 40), (5000, 16, 313)])
def test_steps_per_epoch(labels, batch, steps):
    assert steps_per_epoch(labels, batch) == steps


def test_a_collapsed_probability_head_is_reported_once(tiny, capsys):
    main(tiny("prcl/train.py", "--method.uncer_lr", "100"))
    assert capsys.readouterr().out.count("lower method.uncer_lr (now 100)") == 1


def test_a_healthy_probability_head_is_not(tiny, capsys):
    main(tiny("prcl/train.py"))
    assert "uncer_lr" not in capsys.readouterr().out
