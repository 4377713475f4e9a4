"""CAC's loss where the recorded outputs do not reach: the streamed gradient, nothing to learn from, the bank."""

import pytest
import torch
import torch.nn.functional as F

from cac_cps import losses
from cac_cps.losses import context_loss, cross_pseudo_loss, directional_loss, directions, pseudo_label
from cac_cps.train import Bank
from common.engine.finite import BufferSnapshot

CLASSES, DIMS, TEMP = 5, 8, 0.1


def unit(count: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, DIMS), dim=1)


@pytest.fixture
def places():
    """70 places in two views, and a bank of 900 rows."""
    torch.manual_seed(0)
    embedding = tuple(unit(70).requires_grad_() for _ in range(2))
    confidence = (torch.rand(70), torch.rand(70))
    label = tuple(torch.randint(0, CLASSES, (70,)) for _ in range(2))
    return embedding, confidence, label, (unit(900), torch.randint(0, CLASSES, (900,)))


def plain(anchor, positive, label, bank, bank_label) -> torch.Tensor:
    score = torch.exp((anchor * positive.detach()).sum(1) / TEMP)
    others = torch.exp(anchor @ bank.T / TEMP) * (bank_label[None] != label[:, None])
    return -torch.log(score / (score + others.sum(1)) + 1e-8)


@pytest.mark.parametrize("block", [1, 64, 1 << 20])
def test_the_gradient_found_in_the_sweep_is_that_of_the_plain_formula(places, block, monkeypatch):
    monkeypatch.setitem(losses.BLOCK_ELEMENTS, "cpu", block * 70)
    (anchor, positive), _, (label, _), (bank, bank_label) = places
    ours = directional_loss(anchor, positive, label, bank, bank_label, TEMP, CLASSES)
    want = plain(anchor.double(), positive.double(), label, bank.double(), bank_label)
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-6)
    weight = torch.rand(70)
    gradient, wanted = (torch.autograd.grad((weight * loss).sum(), anchor)[0] for loss in (ours, want))
    assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_loss_in_both_directions_is_that_of_all_places_weighted(places):
    embedding, confidence, label, bank = places
    ours = context_loss(embedding, confidence, label, bank, 0.5, TEMP, CLASSES)
    for own, learns in enumerate(directions(confidence, 0.5)):
        want = (plain(embedding[own], embedding[1 - own], label[own], *bank) * learns).sum() / learns.sum()
        torch.testing.assert_close(ours[own], want, rtol=1e-5, atol=1e-6)
    sum(ours).backward()
    assert all(values.grad.norm() > 0 for values in embedding)


def test_where_no_place_is_confident_the_loss_is_zero_with_a_graph(places):
    embedding, confidence, label, bank = places
    loss = sum(context_loss(embedding, confidence, label, bank, 1.0, TEMP, CLASSES))
    loss.backward()
    assert loss == 0
    assert all(values.grad.eq(0).all() for values in embedding)


def test_crops_without_a_common_cell_give_zero(places):
    embedding, confidence, label, bank = places
    nothing = tuple(tuple(side[:0] for side in values) for values in (embedding, confidence, label))
    loss = sum(context_loss(*nothing, bank, 0.5, TEMP, CLASSES))
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("rows", ["of the anchors' class alone", "none"])
def test_without_a_negative_nothing_is_pushed_away(places, rows):
    (anchor, positive), _, _, (bank, _) = places
    kept = bank if rows != "none" else bank[:0]
    label, bank_label = torch.full((70,), 3), torch.full((len(kept),), 3)
    loss = directional_loss(anchor, positive, label, kept, bank_label, TEMP, CLASSES)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.zeros(70))
    assert anchor.grad.isfinite().all() and anchor.grad.abs().max() < 1e-6


@pytest.mark.parametrize("temp", [0.005, 10.0])
def test_any_temperature_gives_finite_losses_and_gradients(places, temp):
    (anchor, positive), _, (label, _), (bank, bank_label) = places
    loss = directional_loss(anchor, positive, label, bank, bank_label, temp, CLASSES)
    loss.sum().backward()
    assert loss.isfinite().all() and anchor.grad.isfinite().all()


def test_the_bank_forgets_the_oldest_pass_and_is_restored_as_full_as_it_was():
    bank = Bank(passes=2, rows=3, dims=DIMS)
    passes = [(unit(3), torch.full((3,), number)) for number in range(3)]
    for number, given in enumerate(passes):
        embedding, label = bank.push(*given)
        assert len(label) == 3 * min(number + 1, 2)
        assert label[-1] == number and embedding[-3:].equal(given[0])
        restored = Bank(passes=2, rows=3, dims=DIMS)
        restored.load_state_dict(bank.state_dict())
        assert restored.filled == bank.filled
    assert label.tolist() == [1, 1, 1, 2, 2, 2]


def test_the_bank_of_an_undone_step_is_as_full_as_before():
    bank = Bank(passes=2, rows=3, dims=DIMS)
    bank.push(unit(3), torch.zeros(3))
    buffers = BufferSnapshot([bank])
    buffers.save()
    bank.push(unit(3), torch.ones(3))
    buffers.restore()
    bank.recount()
    assert bank.filled == 1
    _, label = bank.push(unit(3), torch.full((3,), 2))
    assert label.tolist() == [0, 0, 0, 2, 2, 2]


def test_either_network_learns_from_the_other_one_only():
    torch.manual_seed(0)
    first, second = (torch.randn(2, CLASSES, 4, 5, requires_grad=True) for _ in range(2))
    cross_pseudo_loss(first, second, pseudo_label(first), pseudo_label(second)).backward()
    alone = F.cross_entropy(first, second.argmax(1))
    torch.testing.assert_close(first.grad, torch.autograd.grad(alone, first)[0])
