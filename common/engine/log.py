"""Logging: `metrics.jsonl`, terminal progress (plain lines without a tty) and trackers."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.metrics import Scores


class RunLog:
    """Log of a run. The main process writes and prints; on the others, these methods do nothing.

    Args:
        path: Path of `metrics.jsonl`.
        accelerator: The run's Accelerator.
    """

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self._path, self._accelerator, self._is_main = path, accelerator, accelerator.is_main_process
        self._console = Console(quiet=not self._is_main, soft_wrap=True, highlight=False)
        self._progress: Progress | None = None
        self._printed: set[str] = set()
        self._last_line = (time.perf_counter(), 0)  # time and step at the last training line
        self._step_end = self._paused = 0.0  # end of the last step, and seconds since the last line that were not steps

    def truncate_after(self, step: int, scored: bool) -> None:
        """Drop the lines that a killed run wrote after its checkpoint of `step`, and an incomplete last line.

        Args:
            step: Last step to keep.
            scored: Keep the scores of that step, too.
        """
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        if not scored:
            kept = [line for line in kept if _step(line) < step or '"valid/' not in line]
        replace_file(self._path, "".join(line + "\n" for line in kept))

    def start_trackers(self, project: str, config: Mapping[str, Any]) -> None:
        """Start the trackers of `run.trackers`, if any; every process must call it."""
        if self._accelerator.log_with:
            self._accelerator.init_trackers(project, config={key: str(value) for key, value in config.items()})

    def start(self, step: int, total: int) -> None:
        """Show progress, from `step` of `total` on."""
        self._total = total
        self._last_line = self._first_line = (time.perf_counter(), step)
        if self._is_main and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._progress = Progress(*columns, *times, console=self._console)
            self._task = self._progress.add_task("training", total=total, completed=step)
            self._progress.start()

    def advance(self, step: int) -> None:
        """Show that `step` steps are done."""
        self._step_end = time.perf_counter()
        if self._progress:
            self._progress.update(self._task, completed=step)

    def log_step(self, step: int, values: Mapping[str, Any], images_per_step: int) -> dict[str, float]:
        """Write, track and show a training line; every process must call it.

        Args:
            step: Steps done.
            values: Numbers or 0-d tensors by name, averaged over processes here.
            images_per_step: Images of one step over all processes.

        Returns:
            The numbers of the line, with `images_per_second` added and values that are not finite left out.
        """
        now = self._step_end
        numbers = self._average(values) | {"images_per_second": self._speed(now, step, images_per_step)}
        self._last_line, self._paused = (now, step), 0.0
        self._write_and_track(step, numbers)
        # Numbers per class, `<name>/<class>`, are written only.
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items() if "/" not in name)
        if self._progress:
            self._progress.update(self._task, description=shown)
        else:
            # Averaged over the whole time since the start, evaluations included, so that a slow moment hardly shows.
            started, first = self._first_line
            left = timedelta(seconds=round((now - started) / max(step - first, 1) * (self._total - step)))
            self.print(f"step {step}/{self._total}  {shown}  left {left}")
        return numbers

    def log_scores(self, step: int, scores: Scores, signs: dict[str, float], is_best: bool) -> None:
        """Write, track and show the scores of an evaluation, with signs counted since the last one."""
        names = ("miou", "pixel_accuracy", "classes_counted")
        self._write_and_track(step, {f"valid/{name}": getattr(scores, name) for name in names} | signs)
        mark = ", the best so far" if is_best else ""
        self.print(f"step {step}: mIoU {100 * scores.miou:.2f} over {scores.classes_counted} classes{mark}")

    def exclude_pause(self) -> None:
        """Exclude the time since the last step (evaluation, checkpoint) from the training speed."""
        self._paused += time.perf_counter() - self._step_end

    def write(self, line: dict[str, float]) -> None:
        """Append a line to `metrics.jsonl`."""
        if not self._is_main:
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            # A full disk must not end a run of days.
            self.print(f"warning: {self._path} could not be written ({error.strerror}); going on")

    def sync(self) -> None:
        """Flush `metrics.jsonl` to the disk: it must not be older than a checkpoint."""
        if self._path.exists():
            sync_file(self._path)

    def print(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False)
        sys.stdout.flush()

    def print_once(self, text: str) -> None:
        """Print a line unless the same line was printed by this method before."""
        if text not in self._printed:
            self._printed.add(text)
            self.print(text)

    def stop(self) -> None:
        """End the progress display; safe to call twice."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _average(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Average over processes. Leaves out NaN and infinity, which JSON does not have; the losses are finite."""
        device = self._accelerator.device
        scalars = [torch.as_tensor(value, dtype=torch.float32, device=device) for value in values.values()]
        means = self._accelerator.reduce(torch.stack(scalars).detach(), "mean").tolist()
        return {name: mean for name, mean in zip(values, means) if math.isfinite(mean)}

    def _speed(self, now: float, step: int, images_per_step: int) -> float:
        then, done = self._last_line
        return round(images_per_step * max(step - done, 1) / (now - then - self._paused), 2)

    def _write_and_track(self, step: int, numbers: dict[str, float]) -> None:
        self.write({"step": step} | numbers)
        if self._accelerator.log_with:
            self._accelerator.log(numbers, step=step)


def replace_file(path: Path, text: str) -> None:
    """Write a file atomically: a reader, or a restart, sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    sync_file(temporary)
    temporary.replace(path)


def sync_file(path: Path) -> None:
    """fsync a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
