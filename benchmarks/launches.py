"""Operators that augmentation dispatches per training step, and its seconds.

    python benchmarks/launches.py
    python benchmarks/launches.py --scripts prcl/train.py css/train.py --data.crop_size [321,321]

Trains the demo config of every script (or of `--scripts`; with overrides) for a few steps in a temporary folder, with 4
and with 16 images per batch. On a GPU every operator is launched by itself and takes about ten microseconds however
small it is, so their number must not grow with the batch. Views are not counted. Every step draws its augmentation at
random, so the table has the largest count and the median time of an optimizer step. The first half of the run is not
measured: some scripts begin without unlabeled images.
"""

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step import Enough, wait, watch
from common.errors import UserError, report_errors

SECTION = "augmentation"
BATCH_SIZES = (4, 16)
PAPERS = ("cac_cps", "cpcl", "css", "memory_bank", "prcl", "supervised", "unimatch")


class Operators(TorchDispatchMode):
    """Count the operators dispatched while active, in `count`; views do no work and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class Augmentation:
    """Recorder for `benchmarks.step.watch` that measures the sections "augmentation" of each optimizer step.

    Args:
        steps: Number of optimizer steps to measure, after as many that are not measured.
        begin: Called where a section begins.
        end: Called where it ends, returns its measurement.

    Attributes:
        measured: Sum over the sections of each step, from the first one on.
    """

    def __init__(self, steps: int, begin: Callable[[], None], end: Callable[[], float]) -> None:
        self.steps, self.measured = steps, []
        self._begin, self._end, self._now = begin, end, 0

    def before_forward(self, *_: Any) -> None:
        pass

    after_forward = before_forward

    def after_step(self, *_: Any) -> None:
        self.measured.append(self._now)
        self._now = 0
        if len(self.measured) == 2 * self.steps:
            raise Enough

    def watch(self, train: Callable[[list[str]], None], arguments: list[str]) -> list[float]:
        """Train, and return the measurements of the last `steps` steps."""
        enter, leave = record_function.__enter__, record_function.__exit__

        def entered(section: record_function) -> Any:
            if section.name == SECTION:
                self._begin()
            return enter(section)

        def left(section: record_function, *error: Any) -> None:
            leave(section, *error)
            if section.name == SECTION:
                self._now += self._end()

        with mock.patch.multiple(record_function, __enter__=entered, __exit__=left):
            watch(train, [*arguments, "--run.steps", str(2 * self.steps + 1)], self)
        return self.measured[self.steps :]


def count_operators(train: Callable[[list[str]], None], arguments: list[str], steps: int) -> list[int]:
    """Count the operators of the augmentation in some steps of a training script."""
    stack, active = ExitStack(), []

    def begin() -> None:
        active.append(stack.enter_context(Operators()))

    def end() -> int:
        stack.close()
        return active.pop().count

    return Augmentation(steps, begin, end).watch(train, arguments)


def time_augmentation(train: Callable[[list[str]], None], arguments: list[str], steps: int) -> list[float]:
    """Measure the seconds of the augmentation in some steps of a training script; processor seconds on a CPU.

    Other load on the machine does not count in processor seconds.
    """
    device, started = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []

    def clock() -> float:
        wait(device)
        return time.perf_counter() if device.type == "cuda" else time.process_time()

    recorder = Augmentation(steps, lambda: started.append(clock()), lambda: clock() - started.pop())
    return recorder.watch(train, arguments)


def demo_config(script: Path) -> Path:
    """Demo config of a training script; `train_<name>.py` may have its own, `demo_<name>.json`."""
    own = script.parent / "configs" / f"demo{script.stem.removeprefix('train')}.json"
    return own if own.is_file() else script.parent / "configs" / "demo.json"


def every_script() -> list[Path]:
    """Training scripts of all papers."""
    return sorted(path for paper in PAPERS for path in Path(paper).glob("train*.py") if "def main" in path.read_text())


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", type=Path, help="training scripts, e.g. prcl/train.py; default: all")
    parser.add_argument("--steps", type=int, default=6, help="number of optimizer steps to count and to time")
    options, arguments = parser.parse_known_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    columns = [f"{what}, batch {size}" for what in ("operators", "seconds") for size in BATCH_SIZES]
    table = Table("script", *columns, title=f"augmentation per step on {where}, {options.steps} steps")
    for script in options.scripts or every_script():
        if not script.is_file():
            raise UserError(f"{script} does not exist; give training scripts, e.g. prcl/train.py")
        train = importlib.import_module(f"{script.parent.name}.{script.stem}").main
        config = [] if "--config" in arguments else ["--config", str(demo_config(script))]
        counts, seconds = [], []
        for size in BATCH_SIZES:
            given = [*config, *arguments, "--optim.batch_size", str(size)]
            counts.append(max(count_operators(train, given, options.steps)))
            seconds.append(statistics.median(time_augmentation(train, given, options.steps)))
        table.add_row(str(script), *map(str, counts), *(f"{value:.4f}" for value in seconds))
    Console().print(table)


if __name__ == "__main__":
    main()
