"""`make gpu-check` as far as it runs without a GPU: its refusal, and its measurements on the CPU."""

from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import gpu
from benchmarks.settings import SETTINGS, settings_named
from common.engine.run import Run
from common.errors import UserError
from tests.conftest import ROOT, flags
from tests.helpers.commands import run_python
from tests.helpers.narrow import NARROW

CPU = torch.device("cpu")
SMALL = {"model.backbone": NARROW, "model.channels": 8, "data.crop_size": "[48,48]", "optim.batch_size": 2}
SMALL |= {"run.device": "cpu", "run.threads": 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_one_line(tmp_path):
    ended = run_python(["benchmarks/gpu.py"], ROOT)
    assert ended.status == 2
    assert ended.err.startswith("error: no GPU") and ended.err.count("\n") == 1
    assert not ended.out


@pytest.mark.parametrize("variant", ["contiguous", "prefetch"])
def test_a_setting_is_measured(variant, monkeypatch):
    layouts, batches = set(), []
    prepare, register = Run.prepare, Run.register_batch

    def prepared(run, network, optimizer):
        wrapped = prepare(run, network, optimizer)
        weights = [weight for weight in network.parameters() if weight.dim() == 4 and min(weight.shape) > 1]
        layouts.update(weight.is_contiguous() for weight in weights)
        return wrapped

    monkeypatch.setattr(Run, "prepare", prepared)
    monkeypatch.setattr(Run, "register_batch", lambda run, batch: (batches.append(batch), register(run, batch)))
    (setting,) = settings_named(["supervised/configs/voc.json"])
    found = gpu.measure(setting, variant, 2, CPU, [*flags(SMALL), "--run.precision", "fp32"])
    assert layouts == {variant == "contiguous"}
    assert len({id(batch) for batch in batches}) <= 3 * gpu.BATCHES  # loaded once for each of three runs
    assert found.seconds > 0 and found.images == pytest.approx(2 / found.seconds)
    assert 0 <= found.outside < 1
    assert found.memory is None and found.waits == 0
    assert {"student", "losses", "backward", "optimizer"} <= found.phases.keys()


def test_waits_are_counted_per_step():
    def event(name: str, start: float, end: float, device: str = "CUDA") -> SimpleNamespace:
        span = SimpleNamespace(start=start, elapsed_us=lambda: end - start)
        return SimpleNamespace(name=name, time_range=span, device_type=SimpleNamespace(name=device))

    events = [event("student", 100 * step, 100 * step + 5 * step) for step in range(6)]
    events += [event("cudaStreamSynchronize", 100 * step + 50, 100 * step + 51, "CPU") for step in range(6)]
    events += [event("cudaLaunchKernel", 10, 11, "CPU")]
    waits, phases = gpu.read_profile(events, 6, torch.device("cuda"))
    assert waits == 1
    assert phases == {"student": pytest.approx(0.0175)}  # the fourth and fifth of six: 15 and 20 microseconds


def test_the_table_has_a_row_for_what_does_not_fit():
    measured = gpu.Measured(0.25, 64.0, 10.5, 0.3, 1.0, {"student": 100.0})
    rows = [gpu.row(SETTINGS[0], "bf16", measured), gpu.row(SETTINGS[1], "fp32", "does not fit")]
    console = Console(record=True, width=150)
    console.print(gpu.table_of(rows, "a GPU"))
    text = console.export_text()
    assert all(cell in text for cell in ("0.250", "64.0", "10.5", "30%", "does not fit"))
    assert gpu.results_path("NVIDIA A100-SXM4-80GB").name == "gpu_nvidia_a100_sxm4_80gb.json"


def test_settings_exist_and_an_unknown_one_is_refused():
    assert all((ROOT / setting.config).is_file() and (ROOT / setting.script).is_file() for setting in SETTINGS)
    assert {setting.dataset for setting in settings_named(["memory_bank"])} == {"VOC", "Cityscapes"}
    with pytest.raises(UserError, match="no setting is named resnext"):
        settings_named(["resnext"])
