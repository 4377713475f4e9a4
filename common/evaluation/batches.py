"""Batches of same-size images and progress over them, for evaluation and prediction."""

import sys
import time
from collections.abc import Iterable

from rich.progress import Progress

MAX_BATCH_PIXELS = 2**20  # per batch, unless a batch size is given
PROGRESS_SECONDS = 5.0  # between progress lines where no bar is drawn


def same_size_batches(sizes: Iterable[tuple[str, tuple[int, int]]], batch_size: int | None = None) -> list[list[str]]:
    """Group images by size and divide each group into batches.

    Args:
        sizes: Name and (width, height) of each image.
        batch_size: Most images per batch; None for as many as fit into `MAX_BATCH_PIXELS`, at least one.

    Returns:
        Names of the images in each batch; within a size they keep their order.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    for name, size in sizes:
        groups.setdefault(size, []).append(name)
    batches = []
    for (width, height), names in groups.items():
        count = batch_size or max(1, MAX_BATCH_PIXELS // (width * height))
        batches += [names[start : start + count] for start in range(0, len(names), count)]
    return batches


class ProgressReport:
    """Progress over images: a bar in a terminal, otherwise a plain line every `PROGRESS_SECONDS`.

    Args:
        title: Word in front, e.g. `evaluating`.
        total: Number of images.
        enabled: False for processes other than the main one.
        bar: Draw a bar where the output is a terminal.
    """

    def __init__(self, title: str, total: int, enabled: bool, bar: bool = True) -> None:
        self._title, self._total, self._done, self._enabled = title, total, 0, enabled
        self._progress = Progress(disable=not (enabled and bar and sys.stdout.isatty()), transient=True)
        self._last_line = time.monotonic()

    def __enter__(self) -> "ProgressReport":
        self._progress.start()
        self._task = self._progress.add_task(self._title, total=self._total)
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        """Count `count` more images as done."""
        self._done += count
        self._progress.update(self._task, completed=self._done)
        plain = self._enabled and self._progress.disable and self._done < self._total
        if plain and time.monotonic() - self._last_line > PROGRESS_SECONDS:
            self._last_line = time.monotonic()
            print(f"{self._title}: {100 * self._done // self._total} % done", flush=True)

    def print(self, line: str) -> None:
        """Print a line above the bar, also from processes that show no progress."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
