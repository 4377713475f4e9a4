"""Memory computed on a fake GPU against memory measured on the CPU."""

import json
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from benchmarks import hardware
from benchmarks.fake_cuda import Graph, Memory, Watch
from common.config.sections import ModelConfig
from common.losses import cross_entropy, upsample
from common.models import build_network

SIZE = (96, 96)


def step(network: nn.Module, optimizer: torch.optim.Optimizer, image: Tensor, label: Tensor, backward) -> None:
    network.train()
    loss = cross_entropy(upsample(network(image), SIZE, True), label)
    backward(loss)
    optimizer.step()
    optimizer.zero_grad()


def start(**model: bool) -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]:
    torch.manual_seed(0)
    network = build_network(ModelConfig(num_classes=21, backbone="resnet18", channels=64, pretrained=False, **model))
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1, momentum=0.9, foreach=True)
    return network, optimizer, torch.randn(4, 3, *SIZE), torch.randint(21, (4, *SIZE))


def measured(**model: bool) -> int:
    """Most bytes in the second of two steps, by PyTorch's own record of allocations."""
    network, optimizer, image, label = start(**model)
    step(network, optimizer, image, label, Tensor.backward)
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    kept = [*network.parameters(), *network.buffers(), *state, image, label]
    before = sum(tensor.untyped_storage().nbytes() for tensor in kept)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
        step(network, optimizer, image, label, Tensor.backward)
    now = peak = 0
    for event in session.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return before + peak


def computed(**model: bool) -> int:
    graph, memory = Graph(), Memory("cpu")
    with ExitStack() as stack:
        for context in (FakeTensorMode(), Watch(memory), graph.keep_saved()):
            stack.enter_context(context)
        contents = start(**model)
        for _ in range(2):
            step(*contents, graph.backward)
    return memory.peaks["between"]


@pytest.mark.parametrize("model", [{}, {"grad_checkpointing": True}, {"freeze_encoder": True}], ids=str)
def test_computed_memory_is_that_of_a_real_step(model):
    assert computed(**model) == pytest.approx(measured(**model), rel=0.02)


def test_the_page_shows_the_stored_results():
    results, page = json.loads(hardware.RESULTS.read_text()), hardware.PAGE.read_text()
    assert hardware.markdown(results["settings"]) in page
    assert hardware.effects_markdown(results["changes"]) in page


@pytest.mark.parametrize(("size", "card"), [(6.3, "8 GB"), (6.5, "12 GB"), (64.0, "80 GB"), (120.0, "several")])
def test_a_card_keeps_a_fifth_free(size, card):
    assert hardware.card(round(size * hardware.GIB)) == card
