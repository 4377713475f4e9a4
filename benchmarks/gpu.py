"""Speed and memory of every published setting on a GPU, after the tests that need one.

    python benchmarks/gpu.py                                   # everything, hours
    python benchmarks/gpu.py prcl/configs/voc.json unimatch    # some settings
    python benchmarks/gpu.py --variants fp32 bf16 --no-tests

Prints a table and writes it to benchmarks/results/gpu_<name of the GPU>.json. Images are made up in memory, and a few
batches are loaded beforehand and repeated, so that neither data nor its loading counts; benchmarks/loader.py measures
loading. Each setting runs on one GPU in several variants:

    fp32, bf16, fp16    precisions
    contiguous          bf16 without the channels-last layout
    cudnn_benchmark     bf16 with the convolution kernels chosen by measuring
    compile             bf16 with run.compile
    prefetch            bf16 with the next batch copied to the GPU during the step, on a stream of its own
"""

import argparse
import contextlib
import importlib
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from benchmarks.settings import ROOT, Setting, made_up_data, settings_named
from benchmarks.step import PHASES, WARM_UP, Enough, Recorder, by_step, wait, watch
from common import loaders
from common.engine import run as engine
from common.engine.run import Run
from common.errors import UserError, report_errors
from common.loaders import Batch, StepBatches

BATCHES = 4  # loaded beforehand, and repeated
ENDLESS = 1_000_000  # steps of a run that ends earlier
# Calls by which the CPU waits for the GPU.
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
GIB = 2**30


@dataclass(frozen=True)
class Measured:
    """One setting in one variant.

    Attributes:
        seconds: Seconds per step: the mean over the measured steps, without waits between them.
        images: Images per second, labeled and unlabeled.
        memory: Peak of allocated memory in GiB; None on a CPU.
        outside: Share of the step outside the networks: 1 - time of their forward and backward passes alone.
        waits: Times per step that the CPU waits for the GPU.
        phases: Milliseconds per step of each phase, on the device's clock.
    """

    seconds: float
    images: float
    memory: float | None
    outside: float
    waits: float
    phases: dict[str, float]


class Steps:
    """Recorder for `benchmarks.step.watch` that ends a run after the warm-up and some more steps.

    Args:
        steps: Number of steps after the warm-up.
        device: Device of the run.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps, self.device = WARM_UP + steps, device
        self.done = 0

    def before_forward(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        pass

    def after_forward(self, network: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.done += 1
        if self.done == self.steps:
            raise Enough


class Timer(Steps):
    """Times the steps after the warm-up together, without a wait between them.

    Attributes:
        seconds: Mean seconds per step.
    """

    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self.done + 1 == WARM_UP:
            wait(self.device)
            reset_peak(self.device)
            self._begin = time.perf_counter()
        if self.done + 1 == self.steps:
            wait(self.device)
            self.seconds = (time.perf_counter() - self._begin) / (self.steps - WARM_UP)
        super().after_step(optimizer)


class Cycle:
    """A loader that loads `BATCHES` batches and repeats them forever."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        batches = [batch for batch, _ in zip(self._loader, range(BATCHES))]
        while True:
            yield from batches


class Prefetch:
    """`StepBatches.__next__` that copies the following batch to the device on a stream of its own.

    Args:
        following: The original method.
    """

    def __init__(self, following: Callable[[StepBatches], Batch]) -> None:
        self._following, self._next, self._streams = following, {}, {}

    def __call__(self, batches: StepBatches) -> Batch:
        batch = self._next.get(batches) or self._copy(batches)
        if stream := self._streams.get(batches):
            torch.cuda.current_stream().wait_stream(stream)
            for tensor in (batch.image, batch.label):
                if tensor is not None:
                    tensor.record_stream(torch.cuda.current_stream())
        self._next[batches] = self._copy(batches)
        return batch

    def _copy(self, batches: StepBatches) -> Batch:
        if not torch.cuda.is_available():
            return self._following(batches)
        stream = self._streams.setdefault(batches, torch.cuda.Stream())
        with torch.cuda.stream(stream):
            return self._following(batches)


@contextlib.contextmanager
def _contiguous() -> Iterator[None]:
    prepare = engine.prepare_layout

    def without(network: nn.Module, accelerator: Any) -> nn.Module:
        return prepare(network, accelerator).to(memory_format=torch.contiguous_format)

    with patch.object(engine, "prepare_layout", without):
        yield


@contextlib.contextmanager
def _prefetch() -> Iterator[None]:
    prefetch = Prefetch(StepBatches.__next__)
    with patch.object(StepBatches, "__next__", lambda batches: prefetch(batches)):
        yield


@contextlib.contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield


def _plain() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


BF16 = ("--run.precision", "bf16")
VARIANTS: dict[str, tuple[tuple[str, ...], Callable[[], contextlib.AbstractContextManager[None]]]] = {
    "fp32": (("--run.precision", "fp32"), _plain),
    "bf16": (BF16, _plain),
    "fp16": (("--run.precision", "fp16"), _plain),
    "contiguous": (BF16, _contiguous),
    "cudnn_benchmark": (BF16, _cudnn_benchmark),
    "compile": ((*BF16, "--run.compile", "true"), _plain),
    "prefetch": (BF16, _prefetch),
}


def measure(setting: Setting, variant: str, steps: int, device: torch.device, more: Sequence[str] = ()) -> Measured:
    """Measure a setting, on the device that its training script takes.

    Args:
        setting: The published setting.
        variant: A key of `VARIANTS`.
        steps: Number of steps to measure, after a warm-up.
        device: That device.
        more: Arguments that change the setting.

    Raises:
        torch.OutOfMemoryError: the setting does not fit.
    """
    arguments, context = VARIANTS[variant]
    train = importlib.import_module(setting.script.removesuffix(".py").replace("/", ".")).main
    images: list[int] = []
    finish = Run.finish_step

    def counted(run: Run, values: dict[str, Any], images_per_step: int = 0, **named: int) -> dict[str, float]:
        images.append(named.get("images", images_per_step))
        return finish(run, values, images[-1])

    def observe(recorder: Recorder | Steps) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [*setting.arguments(Path(folder), ENDLESS), *arguments, *more]
            watch(train, command, recorder)
        AcceleratorState._reset_state(reset_partial_state=True)

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(made_up_data())
        stack.enter_context(patch.object(loaders, "DataLoader", lambda *a, **named: Cycle(DataLoader(*a, **named))))
        stack.enter_context(patch.object(Run, "finish_step", counted))
        stack.enter_context(context())
        timer = Timer(steps, device)
        observe(timer)
        memory = peak(device)
        bare = Recorder(WARM_UP + steps, device, with_bare=True)
        observe(bare)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        with profile(activities=activities) as session:
            observe(Steps(steps, device))
    whole, alone = (statistics.median(times[WARM_UP:]) for times in (bare.whole, bare.bare))
    waits, phases = read_profile(session.events(), WARM_UP + steps, device)
    outside = max(0.0, 1 - alone / whole)
    return Measured(timer.seconds, images[-1] / timer.seconds, memory, outside, waits, phases)


def read_profile(events: Sequence[Any], steps: int, device: torch.device) -> tuple[float, dict[str, float]]:
    """Waits per step, and milliseconds per step of each phase (median after the warm-up), of profiled steps.

    Args:
        events: Events of the profiler.
        steps: Number of steps, including the warm-up; the last one is cut off within its optimizer phase.
        device: Its clock counts.
    """
    waits, times = Counter(), {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        waits[event.name] += 1
        if event.name in PHASES and event.device_type.name == device.type.upper():
            times.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1000)
    phases = {}
    for name in PHASES:
        if per_step := by_step(times.get(name, []), steps)[WARM_UP : steps - 1] if name in times else []:
            phases[name] = statistics.median(per_step)
    return sum(waits[name] for name in WAITING) / steps, phases


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> float | None:
    """Most memory that was allocated since `reset_peak`, in GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None


def row(setting: Setting, variant: str, result: Measured | str) -> dict[str, Any]:
    """Entry of the results file: names, and what was measured or `error`."""
    names = {"paper": setting.paper, "dataset": setting.dataset, "config": setting.config, "variant": variant}
    return names | ({"error": result} if isinstance(result, str) else asdict(result))


def table_of(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The rows as a table; the time in `phases` is in the file only."""
    names = ("paper", "config", "variant")
    table = Table(*names, "s / step", "images / s", "peak, GiB", "outside networks", "waits", title=title)
    for entry in rows:
        cells = [entry[name] for name in names]
        cells[1] = Path(cells[1]).stem
        if "error" in entry:
            table.add_row(*cells, entry["error"])
            continue
        memory = "" if entry["memory"] is None else f"{entry['memory']:.1f}"
        speed = (f"{entry['seconds']:.3f}", f"{entry['images']:.1f}")
        table.add_row(*cells, *speed, memory, f"{entry['outside']:.0%}", f"{entry['waits']:.1f}")
    return table


def results_path(name: str) -> Path:
    """Path of the results of a GPU, e.g. benchmarks/results/gpu_nvidia_a100.json."""
    return ROOT / "benchmarks" / "results" / f"gpu_{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}.json"


def run_tests() -> None:
    """Run the tests that need a GPU.

    Raises:
        UserError: one fails.
    """
    if subprocess.run([sys.executable, "-m", "pytest", "tests/gpu"], cwd=ROOT).returncode:
        raise UserError("the tests of tests/gpu fail on this GPU; --no-tests measures all the same")


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "settings", nargs="*", help="words in a paper's name, script or config; by default all settings"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=20, help="number of steps to measure after the warm-up")
    parser.add_argument("--no-tests", action="store_true", help="measure without running the tests first")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("no GPU: these tests and measurements need one; docs/hardware.md has the computed memory")
    chosen, device, console = settings_named(options.settings), torch.device("cuda"), Console()
    if not options.no_tests:
        run_tests()
    name = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    rows: list[dict[str, Any]] = []
    for setting in chosen:
        for variant in options.variants:
            try:
                result: Measured | str = measure(setting, variant, options.steps, device)
            except torch.OutOfMemoryError:
                result = "does not fit"
            torch.cuda.empty_cache()
            rows.append(row(setting, variant, result))
            console.print(f"{setting.config} {variant}: {result}", highlight=False, soft_wrap=True)
            results_path(name).write_text(json.dumps({"gpu": name} | versions | {"rows": rows}, indent=1) + "\n")
    console.print(table_of(rows, name))


if __name__ == "__main__":
    main()
