"""Every training script on a fake GPU (`benchmarks.fake_cuda`): one device, and no wait that is not listed here.

Three steps with their backward passes, optimizer, teacher, bank and log; an evaluation, its pictures and a checkpoint.
The shapes of all results are computed, their values are not.
"""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import supervised.train as example
from benchmarks.fake_cuda import FakeCuda, Graph, Wait
from prcl.losses import _AnchorLoss as AnchorLoss
from tests.conftest import SCRIPTS
from tests.helpers.commands import train

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # as there is no GPU
STEPS = 3
# Scripts of the default run: a bank and data-dependent sizes, a custom backward pass, a ViT's teacher, labels alone.
SOME = ("cac_cps/train.py", "prcl/train.py", "supervised/train.py", "unimatch/train_v2.py")
FIRST_USE = Wait("common/images.py imagenet_statistics", "aten._to_copy.default", "step")
FIRST_HUE = Wait("common/augment/photometric.py hue_constants", "aten._to_copy.default", "step")
WITHOUT_HUE = ("cac_cps/train_semiseg.py", "cac_cps/train_semiseg_cutmix.py", "cpcl/train.py")
FINITE = Wait("common/engine/finite.py find_non_finite", "numpy", "step")
# All waits of the three steps, by script, if there are more than the check of losses, gradients and buffers.
IN_STEPS = {
    # The cells that learn: fewer anchors in the product with the bank.
    "cac_cps/train.py": {Wait("cac_cps/losses.py context_loss", "aten.nonzero.default", "step"): 2 * STEPS},
    # Each step is two optimizer steps here.
    "memory_bank/train_less_memory.py": {FINITE: STEPS},
}
# Where a line of the log is written, and between steps: building, evaluating, drawing and saving.
ELSEWHERE = {
    "log": {"common/engine/log.py RunLog._average", "common/engine/monitor.py Monitor._added_up"},
    "between": {
        "common/engine/devices.py prepare_layout",
        "common/engine/monitor.py Monitor.__init__",
        "common/engine/monitor.py Monitor._added_up",
        "common/engine/run.py Run.to_device",
        "common/engine/run.py Run.prepare",
        "common/engine/finite.py non_finite_tensors",
        "common/evaluation/evaluate.py evaluate",  # once, at its end
        "common/evaluation/evaluate.py sample_predictions",
        "common/metrics.py ConfusionMatrix.scores",
        "memory_bank/training.py build",
        "memory_bank/training.py Restart.schedule",
        *(f"memory_bank/{name}.py train" for name in ("train", "train_less_memory", "train_domain_adaptation")),
        "cac_cps/panels.py _shown_pairs",
        "cac_cps/panels.py _cell_predictions",
    },
}


def pytest_generate_tests(metafunc) -> None:
    if "script" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every-script")
        metafunc.parametrize("script", SCRIPTS if every else SOME)


@pytest.fixture
def rehearse(tiny):
    """Run three steps of a script on a fake GPU."""

    def run(script: str, *more: str) -> FakeCuda:
        length = ["--run.steps", STEPS, "--run.eval_every", STEPS, "--run.save_every", STEPS, "--run.log_every", STEPS]
        contrast = ["--method.cac.epoch_start_unsup", "0"] if script == "cac_cps/train.py" else []
        with FakeCuda() as fake:
            train(script, tiny(script, *map(str, length), "--run.precision", "bf16", *contrast, *more))
        return fake

    return run


def waits_in_steps(fake: FakeCuda) -> Counter:
    return Counter(wait for wait in fake.waits if wait.phase == "step")


def test_a_step_on_a_gpu_waits_for_nothing_but_the_listed(script, rehearse):
    fake = rehearse(script)
    allowed = Counter({FIRST_USE: 2, FIRST_HUE: 0 if script in WITHOUT_HUE else 3, FINITE: STEPS}) + Counter(
        IN_STEPS.get(script, {})
    )
    assert waits_in_steps(fake) == allowed
    for phase, places in ELSEWHERE.items():
        assert {wait.place for wait in fake.waits if wait.phase == phase} <= places

    assert len(fake.logged) == STEPS
    values = {name: value for line in fake.logged for name, value in line.items()}
    assert "loss" in values
    assert all(values[name].device.type == "cuda" and values[name].dim() == 0 for name in values if "loss" in name)
    assert {value.device.type for value in values.values() if isinstance(value, Tensor)} == {"cuda"}
    assert {tensor.device.type for tensor in fake.saved} == {"cuda"}
    (optimizer,) = fake.optimizers
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {parameter.device.type for parameter in trained} == {"cuda"}
    assert len(optimizer.state) == len(trained)  # each had a gradient


def test_a_network_without_batch_norm_waits_no_more(rehearse):
    encoder = ("--model.backbone", "vit_tiny_patch16_224", "--model.head", "dpt", "--model.pretrained", "false")
    fake = rehearse("supervised/train.py", *encoder)
    assert waits_in_steps(fake) == Counter({FIRST_USE: 2, FIRST_HUE: 3, FINITE: STEPS})


def test_a_tensor_on_the_cpu_is_found(rehearse, monkeypatch):
    normalize = example.normalize
    monkeypatch.setattr(example, "normalize", lambda image: normalize(image) + torch.zeros(3)[:, None, None])
    with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
        rehearse("supervised/train.py")


@pytest.mark.parametrize(
    "read",
    [
        lambda logits: logits.mean().item(),
        lambda logits: logits[logits > 0],
        lambda logits: logits.cpu(),
        lambda logits: logits.new_tensor(1.0),
        lambda logits: torch.ones(3).to(logits.device, non_blocking=True),
    ],
    ids=["item", "mask", "to the host", "from the host", "pageable memory"],
)
def test_a_wait_is_found(read, rehearse, monkeypatch):
    upsample = example.upsample

    def planted(logits, *settings):
        read(logits)
        return upsample(logits, *settings)

    monkeypatch.setattr(example, "upsample", planted)
    found = waits_in_steps(rehearse("supervised/train.py")) - Counter({FIRST_USE: 2, FIRST_HUE: 3, FINITE: STEPS})
    assert found.total() == STEPS
    assert all("test_gpu_rehearsal.py" in wait.place for wait in found)


def test_a_gradient_on_the_cpu_is_found(rehearse, monkeypatch):
    backward = AnchorLoss.backward
    monkeypatch.setattr(
        AnchorLoss, "backward", lambda ctx, gradient: (backward(ctx, gradient)[0].cpu(), *backward(ctx, gradient)[1:])
    )
    with pytest.raises(RuntimeError, match="gradient on cpu for cuda:0"):
        rehearse("prcl/train.py")


class Squared(torch.autograd.Function):
    """Square of each element, with a backward pass of its own."""

    @staticmethod
    def forward(ctx, values):
        ctx.save_for_backward(values)
        return values.square()

    @staticmethod
    def backward(ctx, gradient):
        (values,) = ctx.saved_tensors
        return 2 * values * gradient


def test_the_backward_pass_of_a_fake_gpu_is_autograds():
    """With real tensors: convolution, batch norm, a broadcast, recomputed activations, a custom function."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    scale, image = nn.Parameter(torch.ones(1)), torch.randn(2, 3, 8, 8)
    parameters = [*network.parameters(), scale]

    def loss() -> Tensor:
        feature = scale * checkpoint(network, image, use_reentrant=False)
        return Squared.apply(feature).mean() + feature.sum()

    loss().backward()
    expected = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    graph = Graph()
    with graph.keep_saved():
        graph.backward(loss())
    for parameter, gradient in zip(parameters, expected):
        torch.testing.assert_close(parameter.grad, gradient)
