"""Memory bank's loss, selectors and bank against plain loops, at their limits, and on a device that knows no values."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import IGNORE
from memory_bank.augment import STRONG, BatchAugment, apply_view, draw_batch_augment, rescale
from memory_bank.bank import Bank, correct_and_confident
from memory_bank.heads import BLOCK, SLOPE, Head, MaskedBatchNorm, Selectors
from memory_bank.losses import ClassBalance, contrastive_loss, entropy_loss, pseudo_label_loss, supervised_loss

CLASSES, DIMS, SIZE = 4, 8, 6


def full_bank() -> Bank:
    bank = Bank(CLASSES, SIZE, DIMS)
    bank.rows.normal_()
    bank.filled.fill_(SIZE)
    return bank


def plain_loss(embeddings: Tensor, label: Tensor, bank: Bank, selectors: Selectors) -> Tensor:
    """The formula, class by class and pair by pair."""
    total = embeddings.new_zeros(())
    for c in range(CLASSES):
        own, stored = embeddings[label == c], bank.rows[c, : bank.filled[c]].to(embeddings.dtype)
        if len(own) < 2 or len(stored) < 2:
            continue
        distance = 1 - F.normalize(own, dim=1) @ F.normalize(stored, dim=1).T
        hidden = F.linear(own.detach(), selectors.first_weight[c], selectors.first_bias[c])
        hidden = F.batch_norm(hidden, None, None, selectors.weight[c], selectors.bias[c], training=True)
        score = torch.sigmoid(F.leaky_relu(hidden, SLOPE) @ selectors.last_weight[c] + selectors.last_bias[c])
        total = total + (score / score.mean() * distance.mean(1)).mean()
    return total / CLASSES


@pytest.mark.parametrize("count", [1, 50, 3 * BLOCK + 5])
def test_value_and_gradients_are_those_of_the_formula(count):
    torch.manual_seed(0)
    embeddings = torch.randn(count, DIMS, dtype=torch.double, requires_grad=True)
    label = torch.randint(0, CLASSES + 1, (count,))
    label[label == CLASSES] = IGNORE
    bank, selectors = full_bank(), Selectors(CLASSES, DIMS)
    ours = contrastive_loss(embeddings, label, bank, selectors)
    leaves = [embeddings, selectors.first_weight, selectors.weight, selectors.bias, selectors.last_weight]
    found = torch.autograd.grad(ours, leaves)
    exact = Selectors(CLASSES, DIMS).double()
    exact.load_state_dict(selectors.state_dict())
    want = plain_loss(embeddings, label, bank, exact)
    assert ours.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
    if want.requires_grad:
        leaves = [embeddings, exact.first_weight, exact.weight, exact.bias, exact.last_weight]
        for gradient, wanted in zip(found, torch.autograd.grad(want, leaves)):
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-7)
    else:
        assert all(gradient.isfinite().all() and not gradient.any() for gradient in found)


@pytest.mark.parametrize("empty", ["bank", "labels", "embeddings of zeros"])
def test_what_is_empty_gives_a_finite_loss_with_a_graph(empty):
    torch.manual_seed(0)
    bank = Bank(CLASSES, SIZE, DIMS) if empty == "bank" else full_bank()
    embeddings = torch.zeros(20, DIMS) if empty == "embeddings of zeros" else torch.randn(20, DIMS)
    label = torch.full((20,), IGNORE) if empty == "labels" else torch.randint(0, CLASSES, (20,))
    embeddings.requires_grad_()
    selectors = Selectors(CLASSES, DIMS)
    loss = contrastive_loss(embeddings, label, bank, selectors)
    loss.backward()
    assert loss.isfinite() and (loss == 0 or empty == "embeddings of zeros")
    assert all(value.grad.isfinite().all() for value in (embeddings, *selectors.parameters()))


@pytest.mark.parametrize("lowest", [True, False])
def test_the_bank_keeps_the_newest_embeddings_and_ranks_them_if_there_are_too_many(lowest):
    torch.manual_seed(0)
    bank, selectors, stored = Bank(CLASSES, SIZE, DIMS), Selectors(CLASSES, DIMS), {c: [] for c in range(CLASSES)}
    for _ in range(5):
        embeddings, label = torch.randn(30, DIMS), torch.randint(0, CLASSES + 1, (30,))
        label[label == 0] = IGNORE  # a class that never occurs
        score = selectors(embeddings, label, torch.zeros(CLASSES, dtype=torch.bool))
        bank.update(embeddings, label, selectors, 4, lowest)
        for c in range(CLASSES):
            own = (label == c).nonzero().squeeze(1)
            if len(own) > 4:
                own = own[score[own].argsort(descending=not lowest)[:4]]
            stored[c] = [*embeddings[own], *stored[c]][:SIZE]
    for c in range(CLASSES):
        assert bank.filled[c] == len(stored[c])
        if stored[c]:
            torch.testing.assert_close(bank.rows[c, : len(stored[c])], torch.stack(stored[c]), rtol=0, atol=0)
    means = torch.stack([F.normalize(torch.stack(own), dim=1).mean(0) for own in list(stored.values())[1:]])
    torch.testing.assert_close(bank.means()[1:], means)
    assert not bank.means()[0].any()


def test_the_masked_norm_is_batch_norm_of_the_embeddings_that_count():
    torch.manual_seed(0)
    ours, theirs, embeddings = MaskedBatchNorm(DIMS), nn.BatchNorm1d(DIMS), torch.randn(40, DIMS)
    counted = torch.rand(40) > 0.5
    torch.testing.assert_close(ours(embeddings, counted)[counted], theirs(embeddings[counted]))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    before = ours.running_mean.clone()
    for few in (torch.zeros(40, dtype=torch.bool), torch.arange(40) == 3):
        assert ours(embeddings, few).isfinite().all() and ours.running_mean.equal(before)
    torch.testing.assert_close(ours.eval()(embeddings, counted), theirs.eval()(embeddings))


def test_the_other_losses_are_finite_where_nothing_is_labeled():
    logits = torch.randn(2, CLASSES, 5, 5, requires_grad=True)
    nothing, weight = torch.full((2, 5, 5), IGNORE), torch.ones(CLASSES)
    losses = [
        supervised_loss(logits, nothing, weight),
        entropy_loss(logits, nothing),
        entropy_loss(logits, nothing, True),
    ]
    losses.append(pseudo_label_loss(logits, nothing, torch.ones(2, 5, 5), weight, 6))
    sum(losses).backward()
    assert all(loss == 0 for loss in losses) and not logits.grad.any()


def test_class_weights_are_finite_where_most_classes_never_occur():
    balance = ClassBalance(CLASSES, 1, 1)
    balance.add_labeled(0, torch.full((1, 3, 3), 2))
    assert balance.weights(1).tolist() == [1.0] * CLASSES


def test_class_weights_do_not_depend_on_the_parts_a_step_comes_in():
    whole, parts = ClassBalance(CLASSES, 2, 1), ClassBalance(CLASSES, 2, 1)
    for step in range(3):  # the last one is not counted among labels, and takes another's place among pseudo-labels
        label, pseudo_label = torch.randint(CLASSES, (2, 4, 5, 5), generator=torch.Generator().manual_seed(step))
        whole.add_labeled(step, label)
        whole.add_unlabeled(step, pseudo_label)
        for part in range(2):
            parts.add_labeled(step, label[2 * part : 2 * part + 2], part)
            parts.add_unlabeled(step, pseudo_label[2 * part : 2 * part + 2], part)
    assert whole.weights(3).unique().numel() > 1
    assert parts.weights(3).equal(whole.weights(3))


def test_nothing_waits_for_the_device():
    """Meta tensors have no values: reading one would fail."""
    with torch.device("meta"):
        bank, selectors, head = Bank(CLASSES, SIZE, DIMS), Selectors(CLASSES, DIMS), Head(12, DIMS)
        features, label = torch.empty(50, 12, requires_grad=True), torch.empty(50, dtype=torch.int64)
        image, full = torch.empty(2, CLASSES, 5, 5, requires_grad=True), torch.empty(2, 20, 20, dtype=torch.int64)
        balance = ClassBalance(CLASSES, 2, 2)
        embeddings = head(features, label != IGNORE)
        classes = correct_and_confident(image, full, 0.95, True)
        bank.update(embeddings.detach(), label, selectors, 3)
        balance.add_labeled(0, full)
        balance.add_unlabeled(0, full)
        logits = F.interpolate(image, (20, 20))
        losses = [
            contrastive_loss(embeddings, label, bank, selectors),
            supervised_loss(logits, full, balance.weights(2)),
            pseudo_label_loss(logits, full, torch.empty(2, 20, 20), balance.weights(2), 6),
            entropy_loss(logits, full),
        ]
        sum(losses).backward()
    assert classes.shape == (2, 5, 5) and features.grad.is_meta


class BlockingCopies(TorchDispatchMode):
    """Notes where the copies come from that wait for the device they are to go to."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        waits = function is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking")
        if waits and str(kwargs.get("device")) == "meta" and args[0].device.type == "cpu":
            self.found.append(args[0].shape)
        return function(*args, **kwargs)


def test_no_view_waits_for_the_device():
    maps = (torch.empty(2, 3, 32, 32), torch.empty(2, 32, 32, dtype=torch.int64), torch.empty(2, 32, 32))
    maps = tuple(values.to("meta") for values in maps)
    everything = BatchAugment(True, 1.3, (0.2, 0.4), True, ("hue", "contrast", "saturation", "brightness"), True)
    with BlockingCopies() as copies:
        found = apply_view(
            maps, everything, STRONG, [np.random.default_rng(i) for i in range(2)], False, lambda *own: own
        )
    assert not copies.found
    assert [values.shape for values in found] == [values.shape for values in maps]


def test_any_scale_and_corner_keep_the_size():
    image, label, confidence = (
        torch.rand(1, 3, 20, 30),
        torch.zeros(1, 20, 30, dtype=torch.int64),
        torch.ones(1, 20, 30),
    )
    for scale in (0.75, 0.81, 0.999, 1.001, 1.75):
        for corner in (0.0, 0.999999):
            maps = rescale(image, label, confidence, BatchAugment(scale=scale, corner=(corner, corner)))
            assert [tuple(values.shape[-2:]) for values in maps] == [(20, 30)] * 3
            assert (maps[1] == IGNORE).equal(maps[2] == 0)


def test_choices_have_the_stated_probabilities():
    drawn = [draw_batch_augment(np.random.default_rng(seed), STRONG) for seed in range(2000)]
    shares = {
        "is_mixed": STRONG.mix_probability,
        "is_flipped": 0.5,
        "is_blurred": STRONG.blur_probability,
    }
    for name, want in shares.items():
        assert sum(getattr(parameters, name) for parameters in drawn) / 2000 == pytest.approx(want, abs=0.05)
    assert sum(bool(parameters.colors) for parameters in drawn) / 2000 == pytest.approx(
        STRONG.jitter_probability, abs=0.05
    )
