"""Time of a training step by phase, compared with its bare networks.

    python benchmarks/step.py prcl
    python benchmarks/step.py prcl/train.py --steps 5 --config prcl/configs/demo.json --data.crop_size [321,321]

Trains the demo config (or --config, with overrides) for a few steps in a temporary folder. The bare networks are the
same forward passes on the same tensors, and one backward pass of the outputs that need gradients, nothing else.
"""

import argparse
import importlib
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

from common.errors import UserError, report_errors

PHASES = ("data", "teacher", "augmentation", "pseudo-labels", "student", "losses", "backward", "optimizer")
PHASES += ("teacher update",)
WARM_UP = 3


class Enough(Exception):
    """Raised when all measured steps are done."""


@dataclass
class Call:
    """A forward pass of an outermost network during training."""

    network: nn.Module
    inputs: tuple[Any, ...]
    gradients: bool
    autocast: torch.dtype | None


@dataclass
class Recorder:
    """Times every training step, and the forward and backward passes of its networks alone.

    The two are timed in turn, so that other load on the machine affects both.

    Args:
        steps: Number of steps to watch, including warm-up.
        device: Device to synchronize with at the end of a step.
        with_bare: Run the bare networks after each step.
    """

    steps: int
    device: torch.device
    with_bare: bool
    whole: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    _calls: list[Call] = field(default_factory=list)
    _depth: int = 0
    _begin: float = 0.0

    def before_forward(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._depth == 0 and network.training:  # not the forward passes of an evaluation
            dtype = torch.get_autocast_dtype(self.device.type) if torch.is_autocast_enabled(self.device.type) else None
            self._calls.append(Call(network, inputs, torch.is_grad_enabled(), dtype))
        self._depth += 1

    def after_forward(self, network: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1

    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.whole.append(self._clock())
        if self.with_bare:
            self._depth = 1  # do not record the forward passes of the replay
            replay(self._calls, self.device)
            self._depth = 0
            self.bare.append(self._clock())
        self._calls = []
        if len(self.whole) == self.steps:
            raise Enough

    def _clock(self) -> float:
        """Milliseconds since the last call."""
        wait(self.device)
        begin, self._begin = self._begin, time.perf_counter()
        return 1000 * (self._begin - begin)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def watch(train: Callable[[list[str]], None], arguments: list[str], recorder: Recorder) -> None:
    """Train for the number of steps of `recorder`.

    Raises:
        UserError: the run has fewer steps.
    """
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for hook in (
            register_module_forward_pre_hook(recorder.before_forward),
            register_module_forward_hook(recorder.after_forward),
            register_optimizer_step_post_hook(recorder.after_step),
        ):
            stack.callback(hook.remove)
        try:
            train([*arguments, "--run.dir", str(Path(folder) / "run")])
        except Enough:
            return
    raise UserError(f"the run has fewer than {recorder.steps} steps; lower --steps or raise run.steps")


def phase_times(train: Callable[[list[str]], None], arguments: list[str], steps: int, device: torch.device):
    """Measure the milliseconds of each phase in each step after the warm-up."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as session:
        watch(train, arguments, Recorder(steps, device, with_bare=False))
    times = defaultdict(list)
    for event in sorted(session.events(), key=lambda event: event.time_range.start):
        # A GPU runs asynchronously: its own clock counts.
        if event.name in PHASES and event.device_type.name == device.type.upper():
            times[event.name].append(event.time_range.elapsed_us() / 1000)
    return {phase: by_step(times[phase], steps)[WARM_UP : steps - 1] for phase in PHASES if times[phase]}


def by_step(times: list[float], steps: int) -> list[float]:
    """Sum the times of a phase per step; every step enters the phase equally often."""
    often = round(len(times) / steps)
    return [sum(times[first : first + often]) for first in range(0, len(times), often)]


def replay(calls: list[Call], device: torch.device) -> None:
    """Repeat the forward passes of a step, and one backward pass of the sum of their outputs."""
    outputs = []
    for call in calls:
        precision = torch.autocast(device.type, call.autocast, enabled=call.autocast is not None)
        with torch.set_grad_enabled(call.gradients), precision:
            outputs.append((call, call.network(*call.inputs)))
    heads = [value for call, output in outputs if call.gradients for value in tensors(output)]
    torch.autograd.backward([head.sum() for head in heads])
    for call in calls:
        call.network.zero_grad()


def tensors(output: Any) -> list[torch.Tensor]:
    """Collect all tensors of a network output that need gradients."""
    if isinstance(output, torch.Tensor):
        return [output] if output.requires_grad else []
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors(value)]


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="a paper (prcl), or one of its training scripts (prcl/train.py)")
    parser.add_argument("--steps", type=int, default=10, help="number of steps to measure after the warm-up")
    options, arguments = parser.parse_known_args()
    script = Path(options.script if options.script.endswith(".py") else f"{options.script}/train.py")
    if not script.is_file():
        raise UserError(f"{script} does not exist; give a paper's folder or one of its training scripts")
    if "--config" not in arguments:
        arguments = ["--config", f"{script.parent}/configs/demo.json", *arguments]
    train = partial(importlib.import_module(f"{script.parent.name}.{script.stem}").main)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = WARM_UP + options.steps + 1  # the last step is cut off within its optimizer phase

    phases = phase_times(train, arguments, steps, device)
    recorder = Recorder(steps, device, with_bare=True)
    watch(train, arguments, recorder)
    whole, bare = (statistics.median(times[WARM_UP:]) for times in (recorder.whole, recorder.bare))

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    table = Table("", "ms, median", "share", title=f"{script} on {where}, {options.steps} steps")
    for phase, times in phases.items():
        table.add_row(phase, f"{statistics.median(times):.1f}", f"{statistics.median(times) / whole:.1%}")
    table.add_section()
    table.add_row("whole step, not profiled", f"{whole:.1f}", "")
    table.add_row("bare networks", f"{bare:.1f}", f"{bare / whole:.1%}")
    table.add_row("whole step / bare networks", f"{whole / bare:.2f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
