"""What a user did wrong, told in one or two lines instead of a traceback."""

import functools
import os
import sys
import time
from collections.abc import Callable

# What a process without an answer from another one says, in gloo's words and NCCL's.
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "imed out",
    "NCCL communicator was aborted",
)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
LAUNCHER_SECONDS = 10.0


class UserError(Exception):
    """A mistake the user can mend. The message says what is wrong, where, and what to do."""


def report_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a script's `main`: what a user can mend is told in plain words, and the process ends with a status.

    2: a `UserError`, or too little memory. 1: another process of the run ended or does not answer.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            _end(str(error), 2)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
                _end("not enough memory: lower optim.batch_size (or raise optim.accumulation) or data.crop_size", 2)
            several = int(os.environ.get("WORLD_SIZE", 1)) > 1
            if several and any(words in str(error) for words in LOST):
                _say(
                    f"process {os.environ.get('RANK', 0)}: another process of this run ended or does not answer; "
                    "the same command continues the run from its last checkpoint"
                )
                os._exit(1)  # an orderly end would wait for the other process once more
            raise

    return wrapper


def _end(message: str, status: int) -> None:
    if int(os.environ.get("RANK", 0)) > 0:
        # Mostly all processes have the same to say. The first says it and ends, on which the launcher ends the rest.
        time.sleep(LAUNCHER_SECONDS)
    _say(message)
    sys.exit(status)


def _say(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
