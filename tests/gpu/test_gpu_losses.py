"""Each paper's losses on the GPU in float32: values and gradients are those of the CPU in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cac_cps.losses as cac
import cpcl.losses as cpcl
import css.losses as css
import memory_bank.losses as memory_bank
import prcl.losses as prcl
import unimatch.losses as unimatch
from common.losses import dice_loss, focal_loss, ohem_cross_entropy
from memory_bank.bank import Bank
from memory_bank.heads import Selectors

CLASSES, DIMS, SIZE, TEMP = 5, 8, (12, 14), 0.5
Move = Callable[[Tensor], Tensor]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def labels(*shape: int, ignored: bool = True) -> Tensor:
    drawn = torch.randint(CLASSES, shape)
    return drawn.masked_fill(torch.rand(shape) < 0.1, 255) if ignored else drawn


def maps() -> dict[str, Tensor]:
    return {"logits": numbers(2, CLASSES, *SIZE), "label": labels(2, *SIZE), "confidence": numbers(2, *SIZE).sigmoid()}


def indices() -> dict[str, Tensor]:
    pixels = 2 * SIZE[0] * SIZE[1]
    return {"anchors": torch.randint(pixels, (CLASSES, 16)), "negatives": torch.randint(pixels, (CLASSES, 16, 12))}


def of_prcl(mu, sigma, label, anchors, negatives) -> Tensor:
    sigma = sigma.sigmoid()
    means = prcl.prototypes(mu.detach(), sigma.detach(), label, CLASSES, lambda total: total)
    everywhere = torch.arange(CLASSES, device=mu.device)
    samples = prcl.Samples(everywhere, anchors, negatives, everywhere > 0)
    return prcl.contrastive_loss(mu, sigma, means, samples, TEMP)


def of_css(representation, prototypes, anchors, negatives) -> Tensor:
    everywhere = torch.arange(CLASSES, device=prototypes.device)
    samples = css.Samples(everywhere, everywhere >= 0, anchors, negatives, everywhere > 0)
    return css.contrastive_loss(representation, prototypes.detach(), samples, TEMP)


def of_cac(first, second, confidence1, confidence2, label1, label2, bank, bank_label) -> Tensor:
    embedding = tuple(F.normalize(part, dim=1) for part in (first, second))
    held = (F.normalize(bank, dim=1).detach(), bank_label)
    return sum(cac.context_loss(embedding, (confidence1, confidence2), (label1, label2), held, 0.3, TEMP, CLASSES))


def of_cpcl(logits1, logits2) -> Tensor:
    first, second = cpcl.predict_pixels(logits1), cpcl.predict_pixels(logits2)
    indicator = cpcl.disagreement(cpcl.count_pairs(first.label, second.label, CLASSES))
    return cpcl.reweighted_loss(logits1, cpcl.intersect(first, second)) + cpcl.reweighted_loss(
        logits2, cpcl.unite(first, second, indicator)
    )


def of_memory_bank(embeddings, classes, rows, logits, label, confidence) -> Tensor:
    torch.manual_seed(1)
    bank, selectors = Bank(CLASSES, 6, DIMS), Selectors(CLASSES, DIMS)
    bank.rows.copy_(rows)
    bank.filled.fill_(6)
    bank, selectors = (module.to(embeddings.device, embeddings.dtype) for module in (bank, selectors))
    weight = torch.linspace(0.5, 2, CLASSES, device=logits.device)
    loss = memory_bank.contrastive_loss(embeddings, classes, bank, selectors)
    loss = loss + memory_bank.supervised_loss(logits, label, weight) + memory_bank.entropy_loss(logits, label)
    return loss + memory_bank.pseudo_label_loss(logits, label, confidence, weight, 6.0)


def of_supervised(logits, label) -> Tensor:
    return dice_loss(logits, label) + focal_loss(logits, label) + ohem_cross_entropy(logits, label, 0.2, 50)


def inputs() -> dict[str, tuple[Callable[..., Tensor], dict[str, Tensor], tuple[str, ...]]]:
    """For each case its loss, its inputs, and those that get gradients."""
    torch.manual_seed(0)
    feature = {"mu": numbers(2, DIMS, *SIZE), "sigma": numbers(2, DIMS, *SIZE)}
    cells = {"first": numbers(70, DIMS), "second": numbers(70, DIMS)}
    cells |= {f"confidence{view}": torch.rand(70, dtype=torch.float64) for view in (1, 2)}
    cells |= {f"label{view}": labels(70, ignored=False) for view in (1, 2)}
    cells |= {"bank": numbers(900, DIMS), "bank_label": labels(900, ignored=False)}
    held = {"embeddings": numbers(300, DIMS), "classes": labels(300), "rows": numbers(CLASSES, 6, DIMS)}
    two = {"logits1": numbers(2, CLASSES, *SIZE), "logits2": numbers(2, CLASSES, *SIZE)}
    return {
        "PRCL": (of_prcl, feature | {"label": labels(2, *SIZE)} | indices(), ("mu", "sigma")),
        "PRCL and CSS, pixels": (lambda **all: prcl.unsupervised_loss(*all.values(), 0.5), maps(), ("logits",)),
        "CSS": (
            of_css,
            {"representation": feature["mu"], "prototypes": numbers(CLASSES, DIMS)} | indices(),
            ("representation",),
        ),
        "CAC": (of_cac, cells, ("first", "second")),
        "CPS": (
            lambda logits1, logits2: cac.cross_pseudo_loss(
                logits1, logits2, cac.pseudo_label(logits1), cac.pseudo_label(logits2)
            ),
            two,
            ("logits1", "logits2"),
        ),
        "CPCL": (of_cpcl, two, ("logits1", "logits2")),
        "memory bank": (of_memory_bank, held | maps(), ("embeddings", "logits")),
        "UniMatch": (lambda **all: unimatch.consistency_loss(*all.values(), 0.5), maps(), ("logits",)),
        "labels": (of_supervised, {key: maps()[key] for key in ("logits", "label")}, ("logits",)),
    }


CASES = inputs()


def value_and_gradients(name: str, move: Move) -> list[Tensor]:
    loss, values, learned = CASES[name]
    moved = {key: move(value.clone()) for key, value in values.items()}
    leaves = [moved[key].requires_grad_() for key in learned]
    value = loss(**moved)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_cpu_in_float64(name, device, monkeypatch):
    found = value_and_gradients(name, lambda t: t.to(device, torch.float32 if t.is_floating_point() else t.dtype))
    with monkeypatch.context() as exact:
        exact.setattr(Tensor, "float", Tensor.double)  # the losses compute in float32 whatever they are given
        wanted = value_and_gradients(name, lambda t: t)
    assert found[0].device.type == device.type and wanted[0].dtype == torch.float64
    for one, other in zip(found, wanted):
        assert other.any()
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-4, atol=1e-6)
