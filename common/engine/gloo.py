"""What the processes of a run tell each other on the side: over the CPU, since asking on the GPU would wait for it."""

from datetime import timedelta

import torch
from torch import distributed


class GlooGroup:
    """A channel of small numbers and words between all processes; with one process it answers at once.

    Args:
        processes: How many processes the run has.
        timeout: Seconds after which a process that does not answer ends the run.
    """

    def __init__(self, processes: int, timeout: float) -> None:
        self._processes = processes
        self._group = (
            distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if processes > 1 else None
        )

    def gather_ints(self, *numbers: int) -> list[list[int]]:
        """The numbers of every process, a list a process, in the order of ranks."""
        if self._group is None:
            return [list(numbers)]
        found = [torch.empty(len(numbers), dtype=torch.int64) for _ in range(self._processes)]
        distributed.all_gather(found, torch.tensor(numbers), group=self._group)
        return [tensor.tolist() for tensor in found]

    def gather_strings(self, words: list[str]) -> list[str]:
        """The words of all processes, each once, in the order of ranks. Slow: for what seldom happens."""
        found: list[list[str]] = [[] for _ in range(self._processes)]
        if self._group is None:
            found = [words]
        else:
            distributed.all_gather_object(found, words, group=self._group)
        return list(dict.fromkeys(word for part in found for word in part))
