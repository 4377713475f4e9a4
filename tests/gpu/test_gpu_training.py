"""Every training script on the GPU: each precision, exact resuming, compiled, and two processes with NCCL."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from common.engine.run import Run
from tests.conftest import SCRIPTS
from tests.helpers.commands import train
from tests.helpers.kill_runs import assert_same_run, everything
from tests.helpers.subprocess_runs import start_two

PRECISIONS = ("fp32", "bf16", "fp16")
SHORT = ("--run.steps", "4", "--run.eval_every", "4", "--run.save_every", "2", "--run.keep", "9")


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_twenty_steps(script, precision, device, tiny, tmp_path):
    if device.type == "cpu" and precision == "fp16":
        pytest.skip("the CPU has no fp16")
    length = ("--run.steps", "20", "--run.eval_every", "10", "--run.save_every", "10")
    train(script, tiny(script, *length, "--run.precision", precision))
    found = lines(tmp_path / "run")
    assert found[-1]["step"] == 20
    # fp16 leaves steps out until it has found its scale; none may be left out for another reason.
    assert len(losses(tmp_path / "run")) >= (15 if precision == "fp16" else 20)
    assert all(math.isfinite(value) for line in found for value in line.values())
    assert not any(line.get("skipped_steps") for line in found)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_resumes_to_the_bit(script, precision, device, tiny, tmp_path):
    if device.type == "cpu" and precision == "fp16":
        pytest.skip("the CPU has no fp16")
    run = tmp_path / "run"
    arguments = tiny(script, *SHORT, "--run.precision", precision, "--run.deterministic", "true")
    try:
        train(script, arguments)
        shutil.copytree(run, tmp_path / "whole", symlinks=True)
        shutil.rmtree(run / "checkpoints" / "step_00000004")
        for link in ("last", "best"):
            (run / "checkpoints" / link).unlink()
        AcceleratorState._reset_state(reset_partial_state=True)
        train(script, arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_compiled_run_learns_the_same(script, tiny, tmp_path):
    found = {}
    for compiled in ("false", "true"):
        folder = tmp_path / compiled
        train(script, tiny(script, *SHORT, "--run.compile", compiled, "--run.dir", str(folder)))
        AcceleratorState._reset_state(reset_partial_state=True)
        found[compiled] = losses(folder)
    assert found["true"][:2] == pytest.approx(found["false"][:2], rel=0.05)


@pytest.mark.gpus(2)
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_end_with_the_same_weights(script, tiny, tmp_path):
    """Each process stores its student; SyncBatchNorm gives both the statistics of the whole batch."""
    arguments = tiny(script, *SHORT, "--optim.batch_size", "4")
    befores = tuple(partial(keep_network, tmp_path / f"{rank}.pt") for rank in (0, 1))
    for child in start_two(script, arguments, tmp_path / "log", befores):
        child.finish()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0)


@pytest.mark.gpus(2)
def test_two_processes_compute_the_loss_of_one(tiny, tmp_path):
    script, batch = "supervised/train.py", ("--optim.batch_size", "4")
    train(script, tiny(script, *SHORT, *batch, "--run.dir", str(tmp_path / "one")))
    for child in start_two(script, tiny(script, *SHORT, *batch, "--run.dir", str(tmp_path / "two")), tmp_path / "log"):
        child.finish()
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 4
    assert two[:2] == pytest.approx(one[:2], rel=0.05)
    weights = everything(tmp_path / "two")
    assert all(value.isfinite().all() for value in weights.values() if isinstance(value, torch.Tensor))


def keep_network(path: Path):
    """Store the weights of this process's student when the run has ended; check how its batch norm is computed."""
    prepare, networks = Run.prepare, []

    def watched(run, network, optimizer):
        wrapped, prepared = prepare(run, network, optimizer)
        networks.append(network)
        if run.device.type == "cuda":
            norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
            assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
        return wrapped, prepared

    Run.prepare = watched
    return lambda: torch.save({name: value.cpu() for name, value in networks[-1].state_dict().items()}, path)
