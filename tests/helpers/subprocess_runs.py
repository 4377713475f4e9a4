"""Training runs in processes of their own that start at once, forked from one that has everything imported already."""

import importlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.conftest import SCRIPTS, module_of

SAVING = ("common/engine/checkpoints.py", "common/engine/checkpointer.py")
ENGINE = tuple(f"common/engine/{name}.py" for name in ("run", "optimizer_step", "finite", "progress"))
STEP = (*ENGINE, "common/evaluation/evaluate.py", *SCRIPTS)
SECONDS = 120

_context = get_context("forkserver")
_context.set_forkserver_preload([*map(module_of, SCRIPTS), "tests.helpers.subprocess_runs"])

# Called in the child before the script; what it returns is called after it.
Before = Callable[[], Callable[[], None] | None]


@dataclass
class Child:
    """A run in a process; `log` holds what it printed."""

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
        """What it printed, after it has ended well."""
        assert self.status() == 0, self.log.read_text()
        return self.log.read_text()


def start(script: str, arguments: list[str], log: Path, before: Before | None = None) -> Child:
    """Start `script` with `arguments` in a process of its own."""
    return _start(script, arguments, log, before, {})


def start_two(script: str, arguments: list[str], log: Path, before: tuple[Before | None, Before | None]) -> list[Child]:
    """Start both processes of one run, as a launcher does. Nobody watches over them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        _start(script, arguments, log.with_suffix(f".{rank}"), before[rank], shared | _rank(rank)) for rank in (0, 1)
    ]


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


def _rank(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _start(script: str, arguments: list[str], log: Path, before: Before | None, environment: dict[str, str]) -> Child:
    process = _context.Process(target=_run, args=(script, arguments, log, before, environment))
    process.start()
    return Child(process, log)


def _run(script: str, arguments: list[str], log: Path, before: Before | None, environment: dict[str, str]) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    after = before() if before else None
    importlib.import_module(module_of(script)).main(arguments)
    if after:
        after()
