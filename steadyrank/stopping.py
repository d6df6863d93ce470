"""Ctrl-C and SIGTERM as a flag, so that no step is cut in two."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE_S = 2.0
"""Seconds after the signal in which a run may still go on to a place where it stops without a trace."""


class Stop:
    """A flag that a signal sets. No lock, which a handler could find taken by the very thread it interrupts."""

    def __init__(self) -> None:
        self.signal = 0
        """The signal's number; 0 before it came."""
        self._since = 0.0

    def set(self, signum: int) -> None:
        """Note that the signal came."""
        self.signal, self._since = signum, time.monotonic()

    def is_set(self) -> bool:
        """Whether it came."""
        return self.signal != 0

    def is_late(self) -> bool:
        """Whether it is time to stop wherever the run is."""
        return self.is_set() and time.monotonic() - self._since > PATIENCE_S

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until it comes; says whether it came."""
        end = time.monotonic() + seconds
        while not self.is_set() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        return self.is_set()


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Let the first Ctrl-C or SIGTERM set the flag; a second one ends the process as usual.

    In another thread than the main one signals cannot be caught, and the flag stays unset.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        stop.set(signum)
        signal.signal(signum, before[signal.Signals(signum)])

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
