"""Processes that start at once: forked from a server that has imported torch and every training script already."""

import importlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.conftest import SCRIPTS, module_of

SAVING = ("common/engine/checkpoint_files.py", "common/engine/checkpointer.py")
ENGINE = tuple(f"common/engine/{name}.py" for name in ("run", "optimizer_step", "finite", "progress"))
STEP = (*ENGINE, "common/evaluation/evaluate.py", *SCRIPTS)
SECONDS = 120

_context = get_context("forkserver")
_context.set_forkserver_preload([*map(module_of, SCRIPTS), "tests.helpers.narrow", "tests.helpers.subprocess_runs"])

# Called in the child before the script; the function that it returns is called after it.
Before = Callable[[], Callable[[], None] | None]


@dataclass
class Child:
    """A process and the file that holds its output."""

    process: BaseProcess
    log: Path

    def status(self) -> int:
        """Exit status once it has ended (negative: by that signal). A process that hangs is killed and reported."""
        self.process.join(SECONDS)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"no end after {SECONDS} seconds:\n{self.log.read_text()}")
        return self.process.exitcode

    def finish(self) -> str:
        """Output of the process, which must end with status 0."""
        assert self.status() == 0, self.log.read_text()
        return self.log.read_text()


def start(script: str, arguments: list[str], log: Path, before: Before | None = None) -> Child:
    """Start `script` with `arguments` in a process of its own."""
    return _fork(partial(run_script, script, arguments, before), log, {})


def start_two(
    script: str, arguments: list[str], log: Path, before: tuple[Before | None, Before | None] = (None, None)
) -> list[Child]:
    """Start both processes of one run, as a launcher does, but without a watch over them."""
    return call_in_two([partial(run_script, script, arguments, before[rank]) for rank in (0, 1)], log)


def call_in_two(functions: list[Callable[[], None]], log: Path) -> list[Child]:
    """Call one function in each of two processes that find each other as those of one run do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        _fork(function, log.with_suffix(f".{rank}"), shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, function in enumerate(functions)
    ]


def run_script(script: str, arguments: list[str], before: Before | None) -> None:
    """Run `script` in this process."""
    after = before() if before else None
    importlib.import_module(module_of(script)).main(arguments)
    if after:
        after()


def kill_at_line(files: tuple[str, ...], number: int) -> None:
    """End this process by SIGKILL when it comes to the `number`-th line of `files`."""

    def reached(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    _trace(files, reached)


def kill_when_writing(size: int) -> None:
    """End this process, unasked, in the middle of writing a file, at byte `size`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def count_lines(out: Path) -> Callable[[], None]:
    """Write to `out` how many lines of `SAVING` and of `STEP` a run comes to."""
    counts = {SAVING: 0, STEP: 0}
    files = SAVING + STEP

    def reached(count: int) -> None:
        name = sys._getframe(1).f_back.f_code.co_filename
        counts[SAVING if name.endswith(SAVING) else STEP] += 1

    _trace(files, reached)
    return lambda: out.write_text(f"{counts[SAVING]} {counts[STEP]}")


def _trace(files: tuple[str, ...], reached: Callable[[int], None]) -> None:
    count = 0

    def line(frame, event, argument):
        nonlocal count
        if event == "line":
            count += 1
            reached(count)
        return line

    sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename.endswith(files) else None)


def _fork(function: Callable[[], None], log: Path, environment: dict[str, str]) -> Child:
    process = _context.Process(target=_call, args=(function, log, environment))
    process.start()
    return Child(process, log)


def _call(function: Callable[[], None], log: Path, environment: dict[str, str]) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.modules["matplotlib.figure"] = None  # curves take longer than the runs
    function()
