"""Messages between processes over the CPU (gloo): sent through NCCL, they would make the CPU wait for the GPU."""

from datetime import timedelta

import torch
from torch import distributed


class GlooGroup:
    """Gathers small integers and strings from all processes of a run, also from a single one.

    Args:
        processes: Number of processes of the run.
        timeout: Seconds after which a process that does not answer ends the run.
    """

    def __init__(self, processes: int, timeout: float) -> None:
        self._processes = processes
        self._group = (
            distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if processes > 1 else None
        )

    def gather_ints(self, *numbers: int) -> list[list[int]]:
        """Gather the numbers of every process: one list per process, in rank order."""
        if self._group is None:
            return [list(numbers)]
        found = [torch.empty(len(numbers), dtype=torch.int64) for _ in range(self._processes)]
        distributed.all_gather(found, torch.tensor(numbers), group=self._group)
        return [tensor.tolist() for tensor in found]

    def gather_strings(self, strings: list[str]) -> list[str]:
        """Gather the strings of all processes, de-duplicated, in rank order. Slow; for rare events."""
        found: list[list[str]] = [[] for _ in range(self._processes)]
        if self._group is None:
            found = [strings]
        else:
            distributed.all_gather_object(found, strings, group=self._group)
        return list(dict.fromkeys(string for part in found for string in part))
