"""Commands of a page or of a user, run in this process."""

import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
from accelerate.state import AcceleratorState

from tests.conftest import module_of
from tests.helpers.narrow import NARROW

LAUNCHER = re.compile(r"^(accelerate launch|torchrun|python)( --\S+( [\w.]+)?)*? (?=\S+\.py|-m )")
SMALL_MODEL = ["--model.backbone", NARROW, "--model.channels", "8", "--model.pretrained", "false"]
SMALL_MODEL += ["--model.dinov2_positions", "false"]


@dataclass(frozen=True)
class Ended:
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


def run_python(arguments: list[str], folder: Path) -> Ended:
    """Run a script (`x.py ...`) or a module (`-m x ...`) in `folder`, as `python` would."""
    is_module = arguments[0] == "-m"
    out, err, status = io.StringIO(), io.StringIO(), 0
    environment = {"OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    with contextlib.ExitStack() as stack:
        for change in (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            patch.dict(os.environ, environment),
            patch.object(sys, "argv", arguments[is_module:]),
        ):
            stack.enter_context(change)
        try:
            if is_module:
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    return Ended(status, out.getvalue(), err.getvalue())


def without_launcher(command: str) -> list[str]:
    """Arguments of a command after `python`, `accelerate launch` or `torchrun` and the launcher's own options."""
    match = LAUNCHER.match(command)
    assert match, f"no launcher in: {command}"
    return shlex.split(command[match.end() :])


def train(script: str, arguments: list[str]) -> None:
    """Run a training script."""
    importlib.import_module(module_of(script)).main(arguments)


def refused(script: str, arguments: list[str], capsys) -> str:
    """Error of a training script that ends with status 2 and an error of one or two lines."""
    with pytest.raises(SystemExit) as stop:
        train(script, arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert len(message.splitlines()) <= 2
    return message
