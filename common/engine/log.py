"""What a run tells: `metrics.jsonl`, progress in the terminal (plain lines elsewhere), and Accelerate's trackers."""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunLog:
    """Writes and prints for the main process; on the others it does nothing.

    Args:
        path: The `metrics.jsonl`.
        active: Whether this process writes.
    """

    def __init__(self, path: Path, active: bool) -> None:
        self._path, self._active = path, active
        self._console = Console(quiet=not active, soft_wrap=True, highlight=False)
        self._progress: Progress | None = None
        self._said: set[str] = set()
        self._clock = (time.perf_counter(), 0)

    def truncate_after(self, step: int, scored: bool) -> None:
        """Drop what a killed run wrote after its checkpoint of `step`, and a torn last line.

        Args:
            step: The last step that counts.
            scored: Whether its evaluation counts, too.
        """
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        if not scored:
            kept = [line for line in kept if _step(line) < step or '"valid/' not in line]
        replace_file(self._path, "".join(line + "\n" for line in kept))

    def start(self, step: int, total: int) -> None:
        """Begin to show progress from `step` on."""
        self._total = total
        self._clock = self._begin = (time.perf_counter(), step)
        if self._active and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._progress = Progress(*columns, *times, console=self._console)
            self._task = self._progress.add_task("training", total=total, completed=step)
            self._progress.start()

    def advance(self, step: int) -> None:
        """Show that `step` steps are done."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def log_step(self, step: int, numbers: dict[str, float], images_per_step: int) -> dict[str, float]:
        """Write a training line, and show it. Returns it with `images_per_second` added."""
        now = time.perf_counter()
        then, done = self._clock
        self._clock = (now, step)
        seconds = (now - then) / max(step - done, 1)
        numbers = numbers | {"images_per_second": round(images_per_step / seconds, 2)}
        self.write({"step": step} | numbers)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._progress:
            self._progress.update(self._task, description=shown)
        else:
            # Over the whole time since the start, evaluations included: a slow moment must not shake it.
            begun, first = self._begin
            left = timedelta(seconds=round((now - begun) / max(step - first, 1) * (self._total - step)))
            self.print(f"step {step}/{self._total}  {shown}  left {left}")
        return numbers

    def restart_clock(self, step: int) -> None:
        """Do not count what came since the last line (an evaluation) as training time."""
        self._clock = (time.perf_counter(), step)

    def write(self, line: dict[str, float]) -> None:
        """Append a line to `metrics.jsonl`."""
        if not self._active:
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            # A full disk must not end a run of days.
            self.print(f"warning: {self._path} could not be written ({error.strerror}); going on")

    def sync(self) -> None:
        """Bring `metrics.jsonl` to the disk: it must not be older than a checkpoint."""
        if self._path.exists():
            sync_file(self._path)

    def print(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False)
        sys.stdout.flush()

    def print_once(self, text: str) -> None:
        """Print a line, but not the same one again."""
        if text not in self._said:
            self._said.add(text)
            self.print(text)

    def stop(self) -> None:
        """End the progress display; it may be called twice."""
        if self._progress:
            self._progress.stop()
            self._progress = None


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader, or a restart, sees the old one or the new one, never half."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    sync_file(temporary)
    temporary.replace(path)


def sync_file(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
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
