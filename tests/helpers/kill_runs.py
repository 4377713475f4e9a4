"""Runs that are killed somewhere and started again, compared with one that was never killed."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.helpers.subprocess_runs import (
    SAVING,
    STEP,
    Child,
    count_lines,
    kill_at_line,
    kill_when_writing,
    start,
    start_two,
)

UNREPEATABLE = ("images_per_second",)
LENGTH = ["--run.steps", "6", "--run.save_every", "2", "--run.eval_every", "3", "--optim.batch_size", "4"]

Tiny = Callable[..., list[str]]


@dataclass(frozen=True)
class Whole:
    """A run that was never killed, and where others can be: lines of the code that saves, lines of a step, bytes."""

    folder: Path
    lines: dict[tuple[str, ...], int]
    bytes: int


@dataclass(frozen=True)
class Point:
    """Where a run is killed."""

    name: str
    kill: Callable[[], None]


def run_whole(script: str, tiny: Tiny, folder: Path, processes: int = 1) -> Whole:
    """Train without interruption."""
    counts, arguments = folder / "lines.txt", [*tiny(script, *LENGTH), "--run.dir", str(folder / "whole")]
    children = _start(script, arguments, folder / "whole.log", partial(count_lines, counts), processes)
    for child in children:
        child.finish()
    saving, step = map(int, counts.read_text().split())
    size = max(path.stat().st_size for path in (folder / "whole").rglob("*") if path.is_file())
    return Whole(folder / "whole", {SAVING: saving, STEP: step}, size)


def draw_points(whole: Whole, saving: int, writing: int, step: int, seed: int) -> list[Point]:
    """So many random points inside saving, inside the writing of a file, and anywhere in a step."""
    rng = np.random.default_rng(seed)
    points = []
    for name, files, count in (("saving", SAVING, saving), ("step", STEP, step)):
        numbers = sorted(rng.integers(1, whole.lines[files], count, endpoint=True).tolist())
        points += [
            Point(f"{name}, line {number} of {whole.lines[files]}", partial(kill_at_line, files, number))
            for number in numbers
        ]
    for size in sorted(rng.integers(2**16, whole.bytes, writing).tolist()):
        points.append(Point(f"writing a file, byte {size}", partial(kill_when_writing, size)))
    return points


def kill_and_continue(script: str, tiny: Tiny, whole: Whole, point: Point, folder: Path, victim: int = -1) -> str:
    """Kill a run at `point`, continue it, and compare it with `whole`; says what happened.

    Args:
        victim: Which of two processes is killed; -1 for a run of one.
    """
    run = folder / "killed"
    arguments = [*tiny(script, *LENGTH), "--run.dir", str(run)]
    processes = 1 if victim < 0 else 2
    killed = _start(script, arguments, folder / "killed.log", point.kill, processes, max(victim, 0))
    statuses = [child.status() for child in killed]
    assert statuses[max(victim, 0)] < 0, f"not killed at {point.name}: {killed[0].log.read_text()}"
    if processes == 2:
        output = killed[1 - victim].log.read_text()
        assert statuses[1 - victim] == 1 and "another process of this run ended" in output, output
        assert "Traceback" not in output, output
    again = [child.finish() for child in _start(script, arguments, folder / "again.log", None, processes)]
    assert_same_run(run, whole.folder)
    shutil.rmtree(run)
    continued = [line for line in again[0].splitlines() if line.startswith("continuing")]
    return f"{'from step ' + continued[0].split()[-3] if continued else 'from the start'}, same bits"


def assert_same_run(one: Path, other: Path) -> None:
    """Everything that a run leaves is the same: weights, optimizer, counters, log, links, names of checkpoints."""
    assert _names(one) == _names(other)
    assert metrics(one) == metrics(other)
    first, second = everything(one), everything(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not same(first[name], second[name])]
    assert not different, different


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's log without what no run repeats."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in UNREPEATABLE} for line in lines]


def everything(folder: Path) -> dict[str, Any]:
    """What the last checkpoint of a run holds."""
    last = folder / "checkpoints" / "last"
    mapped = load_file(last / "model.safetensors") | load_file(last / "extra.safetensors")
    # Copied: the file may be truncated later.
    return {name: tensor.clone() for name, tensor in mapped.items()} | torch.load(last / "state.pt", weights_only=True)


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def _names(folder: Path) -> dict[str, str]:
    checkpoints = folder / "checkpoints"
    return {path.name: os.readlink(path) if path.is_symlink() else "" for path in checkpoints.iterdir()}


def _start(
    script: str, arguments: list[str], log: Path, before: Callable | None, processes: int, rank: int = 0
) -> list[Child]:
    if processes == 1:
        return [start(script, arguments, log, before)]
    return start_two(script, arguments, log, (before, None) if rank == 0 else (None, before))
