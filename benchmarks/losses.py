"""Seconds and memory of a paper's own loss, forward and backward, compared with its plain formula.

    python benchmarks/losses.py prcl
    python benchmarks/losses.py css
    python benchmarks/losses.py prcl --rows ours --scale 0.25 --repeats 1
    python benchmarks/losses.py cac
    python benchmarks/losses.py memory_bank

Every row runs in its own process. Memory is the peak of the process beyond its inputs.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cac_cps import losses as cac
from common.engine.devices import check_compiler
from common.errors import UserError, report_errors
from css import losses as css
from memory_bank import losses as memory_bank
from memory_bank.bank import Bank
from memory_bank.heads import SLOPE, Selectors
from prcl import losses as prcl

Loss = Callable[[], Tensor]
MEGABYTE = 2**20


def prcl_inputs(scale: float, device: torch.device) -> tuple[Tensor, ...]:
    """mu, sigma [4,256,h,w], label [4,h,w] of 8 classes, probability [4,8,h,w]; `scale` 1 is h = w = 81."""
    side = max(9, round(81 * scale))
    mu = torch.randn(4, 256, side, side, device=device, requires_grad=True)
    sigma = torch.rand(4, 256, side, side, device=device).mul_(0.8).add_(0.1).requires_grad_()
    label = torch.randint(0, 8, (4, side, side), device=device)
    return mu, sigma, label, torch.rand(4, 8, side, side, device=device)


def prcl_loss(inputs: tuple[Tensor, ...], scale: float, compile: bool = False) -> Tensor:
    """Prototypes, sampling and loss as in training: 256 anchors per class, 512 negatives per anchor."""
    mu, sigma, label, probability = inputs
    queries, negatives = max(8, round(256 * scale)), max(8, round(512 * scale))
    classes = prcl.prototypes(mu, sigma, label, 8, reduce=lambda total: total)
    samples = prcl.sample(label, probability, classes, 0.8, 100.0, queries, negatives)
    return prcl.contrastive_loss(mu, sigma, classes, samples, 100.0, compile)


def prcl_plain(inputs: tuple[Tensor, ...], scale: float) -> Tensor:
    """The same loss with the scores written as in the formula, class by class, and autograd."""
    mu, sigma, label, probability = inputs
    queries, negatives = max(8, round(256 * scale)), max(8, round(512 * scale))
    classes = prcl.prototypes(mu, sigma, label, 8, reduce=lambda total: total)
    samples = prcl.sample(label, probability, classes, 0.8, 100.0, queries, negatives)
    mu, sigma = (values.permute(0, 2, 3, 1).flatten(0, 2) for values in (mu, sigma))
    total = mu.new_zeros(())
    for row, c in enumerate(samples.classes):
        anchor_mu, anchor_sigma = (values[samples.anchors[row]].unsqueeze(1) for values in (mu, sigma))
        others = samples.negatives[row]
        other_mu, other_sigma = (
            torch.cat([own.expand(queries, 1, -1), values.detach()[others]], dim=1)
            for own, values in ((classes.mu[c], mu), (classes.sigma[c], sigma))
        )
        logits = prcl.mutual_likelihood_score(anchor_mu, anchor_sigma, other_mu, other_sigma) / 100.0
        total = total + F.cross_entropy(logits, torch.zeros_like(samples.anchors[row]))
    return total / len(samples.classes)


def css_inputs(scale: float, device: torch.device) -> tuple[Tensor, ...]:
    """Representation [4,256,h,w], label [4,h,w] of 8 classes, indicator [4,8,h,w]; `scale` 1 is h = w = 128."""
    side = max(9, round(128 * scale))
    representation = torch.randn(4, 256, side, side, device=device, requires_grad=True)
    label = torch.randint(0, 8, (4, side, side), device=device)
    return representation, label, torch.rand(4, 8, side, side, device=device)


def css_samples(inputs: tuple[Tensor, ...], scale: float) -> tuple[Tensor, css.Samples]:
    """Prototypes and samples as in training: 256 anchors per class, 512 negatives per anchor."""
    representation, label, indicator = inputs
    queries, negatives = max(8, round(256 * scale)), max(8, round(512 * scale))
    memory = css.Prototypes(8, representation.shape[1]).to(label.device)
    present = memory.update(representation, label, 0.99, reduce=lambda total: total)
    return memory.mean, css.sample(label, indicator, memory.mean, present, 0.8, 0.5, queries, negatives)


def css_loss(inputs: tuple[Tensor, ...], scale: float) -> Tensor:
    """Prototypes, sampling and loss as in training."""
    prototypes, samples = css_samples(inputs, scale)
    return css.contrastive_loss(inputs[0], prototypes, samples, 0.5)


def css_plain(inputs: tuple[Tensor, ...], scale: float) -> Tensor:
    """The same loss with cosines written as in the formula, class by class, and autograd."""
    prototypes, samples = css_samples(inputs, scale)
    pixels = inputs[0].permute(0, 2, 3, 1).flatten(0, 2)
    total = pixels.new_zeros(())
    for row, c in enumerate(samples.classes):
        anchors, negatives = pixels[samples.anchors[row]].unsqueeze(1), pixels.detach()[samples.negatives[row]]
        others = torch.cat([prototypes[c].expand(len(anchors), 1, -1), negatives], dim=1)
        logits = F.cosine_similarity(anchors, others, dim=2) / 0.5
        total = total + F.cross_entropy(logits, torch.zeros_like(samples.anchors[row]))
    return total / len(samples.classes)


CAC_CLASSES, CAC_THRESHOLD, CAC_TEMP = 21, 0.75, 0.1


def cac_inputs(scale: float, device: torch.device) -> tuple[Tensor, ...]:
    """Embedding, confidence and class of 6400 cells per view, all of them anchors, and a bank of 51,200 embeddings."""
    anchors, rows = round(6400 * scale), round(51200 * scale)
    bank, *embedding = (
        F.normalize(torch.randn(count, 128, device=device), dim=1) for count in (rows, anchors, anchors)
    )
    even = torch.arange(anchors, device=device) % 2 == 0
    confidence = (torch.where(side, 0.9, 0.5) for side in (even, ~even))
    labels = (torch.randint(0, CAC_CLASSES, (count,), device=device) for count in (anchors, anchors, rows))
    return *(values.requires_grad_() for values in embedding), *confidence, *labels, bank


def cac_loss(inputs: tuple[Tensor, ...], scale: float) -> Tensor:
    """Loss of both directions as in training."""
    first, second, confidence1, confidence2, label1, label2, bank_label, bank = inputs
    sides = (first, second), (confidence1, confidence2), (label1, label2), (bank, bank_label)
    return sum(cac.context_loss(*sides, CAC_THRESHOLD, CAC_TEMP, CAC_CLASSES))


def cac_plain(inputs: tuple[Tensor, ...], scale: float) -> Tensor:
    """The formula for every cell in both directions, with the bank in checkpointed chunks of 8000 rows, as released."""
    first, second, confidence1, confidence2, label1, label2, bank_label, bank = inputs
    weights = cac.directions((confidence1, confidence2), CAC_THRESHOLD)
    total = bank.new_zeros(())
    for anchor, positive, label, weight in ((first, second, label1, weights[0]), (second, first, label2, weights[1])):

        def chunk_sum(anchor: Tensor, rows: Tensor, classes: Tensor, label: Tensor = label) -> Tensor:
            mask = (classes[None] != label[:, None]).float()
            return (mask * torch.exp(anchor @ rows.T / CAC_TEMP - 1 / CAC_TEMP)).sum(1)

        attraction = torch.exp((anchor * positive.detach()).sum(1) / CAC_TEMP - 1 / CAC_TEMP)
        denominator = attraction
        for rows, classes in zip(bank.split(8000), bank_label.split(8000)):
            denominator = denominator + checkpoint(chunk_sum, anchor, rows, classes, use_reentrant=False)
        loss = -torch.log(attraction / denominator + cac.EPSILON)
        total = total + (weight * loss).sum() / (weight.sum() + 1e-12)
    return total


def memory_bank_inputs(scale: float, device: torch.device) -> tuple[Tensor | torch.nn.Module, ...]:
    """21,000 embeddings of 256 dimensions and 19 classes, a full bank of 256 embeddings per class, and selectors."""
    count = round(21_000 * scale)
    rows = torch.randn(count, 256, device=device, requires_grad=True)
    bank, selectors = Bank(19, 256, 256).to(device), Selectors(19, 256).to(device)
    bank.rows.normal_()
    bank.filled.fill_(256)
    return rows, torch.randint(0, 19, (count,), device=device), bank, selectors


def memory_bank_loss(inputs: tuple, scale: float) -> Tensor:
    """Selectors and loss as in training."""
    return memory_bank.contrastive_loss(*inputs)


def memory_bank_plain(inputs: tuple, scale: float, distances: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The formula class by class: distances of all embeddings to all embeddings of the bank."""
    rows, label, bank, selectors = inputs
    total = rows.new_zeros(())
    for c in range(selectors.num_classes):
        own = rows[label == c]
        hidden = F.linear(own.detach(), selectors.first_weight[c], selectors.first_bias[c])
        hidden = F.batch_norm(hidden, None, None, selectors.weight[c], selectors.bias[c], training=True)
        score = torch.sigmoid(F.leaky_relu(hidden, SLOPE) @ selectors.last_weight[c] + selectors.last_bias[c])
        share = score / score.mean()
        # One class at a time: all classes together would take gigabytes.
        distance = checkpoint(distances, own, bank.rows[c], use_reentrant=False)
        total = total + (distance * share[:, None]).mean()
    return total / selectors.num_classes


def pairwise_distances(rows: Tensor, stored: Tensor) -> Tensor:
    """Cosine distances [M,N] of rows [M,F] and [N,F], pair by pair."""
    return 1 - F.cosine_similarity(rows[:, None], stored[None], dim=2)


def distances_by_product(rows: Tensor, stored: Tensor) -> Tensor:
    """The same distances by a matrix product."""
    return 1 - F.normalize(rows, dim=1) @ F.normalize(stored, dim=1).T


# Per paper: the function that makes its inputs, and the rows to measure.
PAPERS: dict[str, tuple[Callable, dict[str, Callable]]] = {
    "css": (css_inputs, {"ours": css_loss, "plain formula": css_plain}),
    "cac": (cac_inputs, {"ours": cac_loss, "plain formula": cac_plain}),
    "memory_bank": (
        memory_bank_inputs,
        {
            "ours": memory_bank_loss,
            "matrix product": partial(memory_bank_plain, distances=distances_by_product),
            "plain formula": partial(memory_bank_plain, distances=pairwise_distances),
        },
    ),
    "prcl": (
        prcl_inputs,
        {"ours": prcl_loss, "ours, compiled": partial(prcl_loss, compile=True), "plain formula": prcl_plain},
    ),
}


def peak_memory(device: torch.device) -> float:
    """Peak memory so far in MB, of the GPU or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / MEGABYTE
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if platform.system() == "Darwin" else 1)
    return kilobytes / 1024


def measure(paper: str, row: str, scale: float, repeats: int, results) -> None:
    """Put (seconds of each repeat, MB beyond the inputs, value of the loss) into the queue `results`."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_inputs, rows = PAPERS[paper]
    inputs = make_inputs(scale, device)
    modules = [value for value in inputs if isinstance(value, torch.nn.Module)]
    leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    leaves += [parameter for module in modules for parameter in module.parameters()]
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)  # memory of the gradients counts as input
    before, seconds = peak_memory(device), []
    for _ in range(repeats + 1):  # the first one warms up and compiles
        torch.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        loss = rows[row](inputs, scale)
        torch.autograd.backward(loss, inputs=leaves)
        value = loss.item()
        seconds.append(time.perf_counter() - started)
    results.put((seconds[1:], peak_memory(device) - before, value))


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", choices=sorted(PAPERS))
    parser.add_argument("--rows", nargs="*", help="run these rows only, e.g. 'ours'")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the maps and numbers of samples, 1 = full")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    known = PAPERS[options.paper][1]
    rows = options.rows or list(known)
    if unknown := set(rows) - known.keys():
        raise UserError(f"no row {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if any("compiled" in row for row in rows):
        check_compiler()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    table = Table("row", "seconds, median", "MB beyond the inputs", "loss", title=f"{options.paper} on {where}")
    context = multiprocessing.get_context("spawn")
    for row in rows:
        results = context.SimpleQueue()
        arguments = (options.paper, row, options.scale, options.repeats, results)
        process = context.Process(target=measure, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)
        seconds, memory, value = results.get()
        table.add_row(row, f"{statistics.median(seconds):.2f}", f"{memory:.0f}", f"{value:.5f}")
    Console().print(table)


if __name__ == "__main__":
    main()
