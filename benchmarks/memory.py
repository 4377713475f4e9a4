"""Peak memory that a training script keeps for its backward passes.

    python benchmarks/memory.py memory_bank/train.py memory_bank/train_less_memory.py

Trains the demo config of the paper (or --config, with overrides) for a few steps in a temporary folder, and counts the
bytes of all tensors that autograd keeps for backward passes: each storage once, without parameters. The number is the
same on any machine.
"""

import argparse
import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.step import Enough, watch
from common.errors import UserError, report_errors


class Kept:
    """A tensor kept by autograd; its bytes are in the `Count` for as long as it is kept."""

    def __init__(self, tensor: Tensor, count: "Count") -> None:
        self.tensor, self._count = tensor, count
        count.add(tensor.untyped_storage())

    def __del__(self) -> None:
        self._count.remove(self.tensor.untyped_storage())


class Count:
    """Recorder for `benchmarks.step.watch` that counts the bytes kept by autograd.

    Args:
        steps: Number of optimizer steps to watch.

    Attributes:
        most: Peak number of bytes kept.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.most = steps, 0
        self._now, self._done = 0, 0
        self._users: Counter[int] = Counter()
        self._parameters: set[int] = set()

    def add(self, storage: torch.UntypedStorage) -> None:
        self._users[storage.data_ptr()] += 1
        if self._users[storage.data_ptr()] == 1:
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)

    def remove(self, storage: torch.UntypedStorage) -> None:
        self._users[storage.data_ptr()] -= 1
        if not self._users[storage.data_ptr()]:
            self._now -= storage.nbytes()

    def pack(self, tensor: Tensor) -> Tensor | Kept:
        return tensor if tensor.untyped_storage().data_ptr() in self._parameters else Kept(tensor, self)

    @staticmethod
    def unpack(kept: Tensor | Kept) -> Tensor:
        return kept.tensor if isinstance(kept, Kept) else kept

    def before_forward(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._parameters |= {parameter.untyped_storage().data_ptr() for parameter in network.parameters(recurse=False)}

    def after_forward(self, network: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._done += 1
        if self._done == self.steps:
            raise Enough


def measure(script: Path, arguments: list[str], steps: int) -> int:
    """Measure the peak bytes kept by autograd in the first optimizer steps of a training script."""
    count, train = Count(steps), importlib.import_module(f"{script.parent.name}.{script.stem}").main
    if "--config" not in arguments:
        arguments = ["--config", f"{script.parent}/configs/demo.json", *arguments]
    with torch.autograd.graph.saved_tensors_hooks(count.pack, count.unpack):
        watch(train, arguments, count)
    return count.most


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="+", type=Path, help="training scripts, e.g. prcl/train.py")
    parser.add_argument("--steps", type=int, default=6, help="number of optimizer steps to watch")
    options, arguments = parser.parse_known_args()
    table = Table("script", "MB kept for backward", "relative to the first")
    kept: list[int] = []
    for script in options.scripts:
        if not script.is_file():
            raise UserError(f"{script} does not exist; give training scripts, e.g. prcl/train.py")
        kept.append(measure(script, arguments, options.steps))
        table.add_row(str(script), f"{kept[-1] / 1e6:.1f}", f"{kept[-1] / kept[0]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
