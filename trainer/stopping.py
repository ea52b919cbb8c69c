"""Ending early with everything kept: when the time is up (`max_wall`), or at a signal (Ctrl-C, SIGTERM, and Slurm's USR1 and USR2)."""
from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from trainer.lease import process_start

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
RESERVE, MAX_RESERVE_S = 0.1, 20.0  # of max_wall, for the last checkpoints


def _age() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    ticks = process_start(os.getpid())
    return 0.0 if ticks is None else time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")


class Stop:
    """Why training should end now; the loop asks after every dispatch."""

    def __init__(self, max_wall: float | None = None, since_start: bool = True):
        """max_wall: seconds after the start of this process by which it wants to be over, or, without `since_start`, after now."""
        self.signal: signal.Signals | None = None
        self.max_wall = max_wall
        self._deadline = None if max_wall is None else time.monotonic() - (_age() if since_start else 0.0) + max_wall - min(RESERVE * max_wall, MAX_RESERVE_S)

    @property
    def reason(self) -> str | None:
        """None to go on."""
        if self.signal is not None:
            return self.signal.name
        if self.seconds_left() <= 0:
            return f"max_wall={self.max_wall:g}s"
        return None

    def seconds_left(self) -> float:
        """Until the time is up; infinity without a limit."""
        return float("inf") if self._deadline is None else self._deadline - time.monotonic()

    @contextlib.contextmanager
    def catching(self) -> Iterator[Stop]:
        """Signals set `signal` while the context lasts; a second Ctrl-C interrupts as always. Main thread only."""

        def note(number, frame) -> None:
            del frame
            if self.signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = signal.Signals(number)

        before = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
