"""Ctrl-C and SIGTERM as a flag, so that no step is cut in two; and patience until the flag is set."""

import errno
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from .errors import CheckpointError
from .ranks import Ranks

T = TypeVar("T")
PAUSE_S = 5.0
"""Seconds between two tries to write on a full disk."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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

    def agree(self) -> bool:
        """Say whether it came, to whoever stops together: here to itself."""
        return self.is_set()

    def is_late(self) -> bool:
        """Whether it is time to stop wherever the run is."""
        return self.is_set() and time.monotonic() - self._since > PATIENCE_S

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until it comes; says whether it came."""
        end = time.monotonic() + seconds
        while not self.is_set() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        return self.is_set()


class AgreedStop(Stop):
    """The flag of several ranks, which they agree on now and then: set for all once it is set for one.

    It is never late: between two agreements the ranks could not stop together.

    Args:
        own: That of this process.
        ranks: Who agrees.
    """

    def __init__(self, own: Stop, ranks: Ranks) -> None:
        super().__init__()
        self._own, self._ranks = own, ranks

    def agree(self) -> bool:
        """Take in what has come to any rank; a collective. Says whether the flag is set."""
        if not self.signal and self._ranks.any(self._own.is_set()):
            self.signal = self._own.signal or signal.SIGTERM
        return self.is_set()

    def is_late(self) -> bool:
        """Say no."""
        return False

    def wait(self, seconds: float) -> bool:
        """Wait so long, and agree; a collective."""
        time.sleep(seconds)
        return self.agree()


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Let the first Ctrl-C or SIGTERM set the flag; a second one ends the process as usual.

    Both are counted together. In another thread than the main one signals cannot be caught: the flag stays unset.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    before = {signum: signal.getsignal(signum) or signal.SIG_DFL for signum in (signal.SIGINT, signal.SIGTERM)}

    def put_back() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def handle(signum: int, frame: FrameType | None) -> None:
        stop.set(signum)
        put_back()

    for signum in before:
        signal.signal(signum, handle)
    try:
        yield stop
    finally:
        put_back()


def write_patiently(write: Callable[[], T], stop: Stop, seconds: float, say: Callable[[str], None]) -> T:
    """Write; where the disk is full, try again until there is space, it was too long, or the run is to stop.

    Args:
        write: Writes all or nothing.
        stop: Ends the waiting.
        seconds: How long to wait at most.
        say: Called once, with what is waited for.

    Raises:
        CheckpointError: What `write` raised last.
    """
    waited = 0.0
    while True:
        try:
            return write()
        except CheckpointError as error:
            full = isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL
            if not full or waited >= seconds or stop.is_set():
                raise
            if not waited:
                say(f"{error}; waiting for space")
            waited += PAUSE_S
            stop.wait(PAUSE_S)


def wait_until(
    there: Callable[[], bool], stop: Stop, every_s: float, most_s: float | None, say: Callable[[], None]
) -> bool:
    """Look for something until it is there; says whether it is.

    Args:
        there: Says whether it is there.
        stop: Ends the waiting.
        every_s: Seconds between two looks.
        most_s: Seconds to wait at most; None for ever.
        say: Called once, when the waiting begins.
    """
    waited = 0.0
    while not there():
        if most_s is not None and waited >= most_s:
            return False
        if not waited:
            say()
        waited += every_s
        if stop.wait(every_s):
            return False
    return True
