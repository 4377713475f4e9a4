"""Stop a run after its current step on SIGTERM or SIGINT, on all processes after the same step."""

import os
import signal
import time
from typing import Any

from common.engine.gloo import GlooGroup

# Launchers forward a signal that the whole process group has already received: only a later one exits at once.
REPEAT_SECONDS = 2.0


class Stopped(SystemExit):
    """A signal stopped the run, and its checkpoint is written. The exit status is a shell's: 143 or 130."""


class StopSignal:
    """Handler of SIGTERM and SIGINT: the first signal requests a stop, a later one exits at once.

    Args:
        gloo: Connects the processes of the run.

    Attributes:
        received: Number of the signal this process received; 0 for none.
        agreed: Number of the signal that any process had received at the last exchange; 0 for none.
    """

    def __init__(self, gloo: GlooGroup) -> None:
        self._gloo = gloo
        self.received = self.agreed = 0

    def install(self) -> None:
        """Replace the handlers of both signals."""
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def uninstall(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def exchange(self) -> None:
        """Agree with the other processes on whether to stop; all of them must call it."""
        self.agreed = max(received for (received,) in self._gloo.gather_ints(self.received))

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
        elif now - self._received_at > REPEAT_SECONDS:
            os._exit(128 + number)
