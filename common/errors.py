"""User errors, reported in one or two lines instead of a traceback."""

import functools
import os
import sys
import time
from collections.abc import Callable

# Parts of the messages of gloo and NCCL when another process has ended or does not answer.
LOST_PROCESS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "imed out",
    "NCCL communicator was aborted",
)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
LAUNCHER_SECONDS = 10.0


class UserError(Exception):
    """A mistake that the user can correct. The message states the problem, its place, and the remedy."""


def report_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a script's `main`: print a short message in place of a traceback, and exit with a status.

    Status 2: a `UserError`, or too little memory. Status 1: another process of the run ended or does not answer.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            _exit(str(error), 2)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
                _exit("not enough memory: lower optim.batch_size (or raise optim.accumulation) or data.crop_size", 2)
            several = int(os.environ.get("WORLD_SIZE", 1)) > 1
            if several and any(words in str(error) for words in LOST_PROCESS):
                _print_error(
                    f"process {os.environ.get('RANK', 0)}: another process of this run ended or does not answer; "
                    "the same command continues the run from its last checkpoint"
                )
                os._exit(1)  # a regular exit would wait for the other process once more
            raise

    return wrapper


def _exit(message: str, status: int) -> None:
    if int(os.environ.get("RANK", 0)) > 0:
        # Usually all processes fail with the same message. The first prints it and exits; the launcher then ends the
        # others while they wait here.
        time.sleep(LAUNCHER_SECONDS)
    _print_error(message)
    sys.exit(status)


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
