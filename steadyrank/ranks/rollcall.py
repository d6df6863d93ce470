"""Which rank is to blame, when the ranks of a run have lost one another: what they say beside their collectives.

A collective fails on every rank, and says on none which one died, or why. So each rank has a thread with a line of its
own to the launcher's memory, over which it shows twice a second that it lives, and says what ended it. Whoever has lost
the others waits some seconds for what they say:

    failed    its own error, which the others repeat
    lost      it has lost the others, too
    stopped   a signal came
    nothing   and no sign of life: it is dead, or cut off

A rank that lives and says nothing is stuck. Where the memory itself does not answer, the machine that holds it is gone,
that of rank 0, or the network. Where packets vanish, torch's client may wait for its answer for ever: so the thread
asks, and what counts is when it was last answered. gloo itself keeps to its timeout there.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch.distributed as dist

from ..errors import RankError
from .group import Ranks
from .roster import STORE_S, Roster, Store, beat_key

BEAT_S = 0.5
"""Seconds between two signs of life."""
PATIENCE_S = 4.0
"""Seconds for which a rank that has lost the others waits for what they say."""
DEAD_S = 3.0
"""Seconds without a sign of life after which a rank is taken for dead, once the ranks have lost one another."""
LINGER_S = 2.0
"""Seconds for which a rank that ends lets the others hear why."""
GRACE_S = 10.0
"""Seconds in which a rank must have noticed by itself that another one is at its end; NCCL may never."""
_SLOW_LOOK_S = 20.0
_OF_NETWORK = ("gloo", "nccl", "connection", "timed out", "timeout", "socket")


class Word(NamedTuple):
    """What a rank said last."""

    kind: str
    text: str


class RollCall:
    """One rank's part in it.

    Args:
        rank: Which one this is.
        roster: Who came.
        timeout_s: Seconds without a sign of life after which a rank is taken for dead while all seems well.
        end: Called from the thread, with the reason, where this process does not notice by itself that others have
            failed; it does not return.
    """

    def __init__(self, rank: int, roster: Roster, timeout_s: float, end: Callable[[RankError], None]) -> None:
        self.rank, self.roster = rank, roster
        self.words: dict[int, Word] = {}
        """What the ranks said, by rank."""
        self.closing = False
        """Whether this rank is at its end, and knows it."""
        self.kept = ""
        """Where the run is kept."""
        self._others = [other for other in range(len(roster.names)) if other != rank]
        self._timeout_s, self._end = timeout_s, end
        self._mine: Word | None = None
        self._excused: BaseException | None = None
        self._over = self._asks = False
        self._wake, self._told = threading.Event(), threading.Event()
        now = time.monotonic()
        self._answered, self._heard = now, dict.fromkeys(self._others, now)
        self._beats: dict[int, bytes] = {}
        self._thread = threading.Thread(target=self._live, name="roll call", daemon=True)

    def __enter__(self) -> "RollCall":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._wake.set()
        self._thread.join(2 * BEAT_S)

    def tell(self, kind: str, text: str) -> None:
        """Let the others know; the first thing that is not "lost" counts."""
        if self._mine is None or self._mine.kind == "lost":
            self._told.clear()
            self._mine = Word(kind, text)
            self._wake.set()
            self._told.wait(2.0)

    def linger(self) -> None:
        """Wait until all have said what ended them, or some seconds."""
        end = time.monotonic() + LINGER_S
        while time.monotonic() < end and len(self.words) - len(self._of("lost")) < len(self._others):
            time.sleep(0.05)

    def have_failed_alike(self, error: Exception) -> bool:
        """Say whether all ranks have failed, with errors of one kind: then they can still do things together."""
        kind = type(error).__name__
        self.tell("failed", f"{kind}: {error}")
        end = time.monotonic() + 2 * PATIENCE_S
        while time.monotonic() < end and len(self.words) < len(self._others):
            time.sleep(0.05)
        alike = [word.kind == "failed" and word.text.startswith(f"{kind}: ") for word in self.words.values()]
        self.closing = len(alike) == len(self._others) and all(alike)
        return self.closing

    def ask(self, error: BaseException) -> RankError | None:
        """Wait for what the others say; return what has become of them, or None where they are well.

        Args:
            error: Why this rank asks.
        """
        if error is self._excused:
            return None
        self.closing = self._asks = True
        self._heard = dict.fromkeys(self._others, time.monotonic())  # it was not looked at often
        mine = f"{type(error).__name__}: {error}"
        self.tell("lost", mine)
        of_network, begun = _is_of_network(error), time.monotonic()
        patience_s = PATIENCE_S if of_network or isinstance(error, KeyboardInterrupt) else 1.0
        while not self._of("failed") and not self._is_cut_off():
            now = time.monotonic()
            if now - self._answered < 2.0 and (now - begun > patience_s or len(self.words) == len(self._others)):
                break
            time.sleep(0.05)
        # What befalls all alike is nobody's fault: each has its own error.
        alike = not of_network and Word("failed", mine) in self.words.values()
        found = None if alike else self._verdict(of_network, str(error), DEAD_S)
        self.closing = found is not None
        self._excused = error if found is None else None
        return found

    def is_told_by_another(self, error: BaseException) -> bool:
        """Say whether another rank of this machine, before this one, tells what this one would."""
        machine = self._machine(self.rank)
        before = [word for rank, word in self.words.items() if rank < self.rank and self._machine(rank) == machine]
        if isinstance(error, RankError):
            return any(word.kind in ("lost", "failed", "stopped") for word in before)
        return any(word == self._mine for word in before)

    def _machine(self, rank: int) -> str:
        return self.roster.names[rank].partition(", ")[0]

    def _of(self, kind: str) -> list[int]:
        return sorted(rank for rank, word in self.words.items() if word.kind == kind)

    def _is_cut_off(self) -> bool:
        return time.monotonic() - self._answered > STORE_S

    def _verdict(self, of_network: bool, text: str, dead_s: float) -> RankError | None:
        """Return who is to blame, as far as is known."""
        names, silent = self.roster.name, [rank for rank in self._others if rank not in self.words]
        if failed := self._of("failed"):
            first = failed[0]
            more = f"; so did {len(failed) - 1} more" if len(failed) > 1 else ""
            return RankError(f"{names(first)} failed: {self.words[first].text}{more}. {self._advice()}")
        if self._is_cut_off():
            return RankError(
                f"the launcher's memory does not answer any more: the machine of {names(0)}, or the network to it, is "
                f"gone. {self._advice()}"
            )
        now = time.monotonic()
        if dead := [rank for rank in silent if now - self._heard[rank] > dead_s]:
            more = f", and {len(dead) - 1} more ranks" if len(dead) > 1 else ""
            waited = now - self._heard[dead[0]]
            return RankError(
                f"{names(dead[0])}{more} is gone: no sign of life for {waited:.0f} s; it was killed, perhaps for want "
                f"of memory, or its machine or the network is down. {self._advice()}"
            )
        if not of_network:
            return None
        if silent:
            return RankError(
                f"{names(silent[0])} lives, but did not come to what all do together ({text}). {self._advice()}"
            )
        return RankError(f"the ranks have lost one another, though all live: {text}. {self._advice()}")

    def _advice(self) -> str:
        if not self.kept:
            return "Start the same command again"
        return (
            f"The run up to there is kept in {self.kept}. Go on from its newest checkpoint with steadyrank train "
            f"--resume {self.kept} under torchrun, which does so by itself with --max-restarts"
        )

    def _live(self) -> None:
        """Show signs of life, and take in what the others say, until the end."""
        try:
            store = self.roster.open()
            self._answered = looked = well = time.monotonic()
            count = spoken = 0
            while not self._over:
                count += 1
                store.set(beat_key(self.rank), str(count))
                if self._mine is not None and not self._told.is_set():
                    store.set(f"word/{self.rank}", "\n".join(self._mine))
                    store.add("spoken", 1)
                    self._told.set()
                if (now_spoken := store.add("spoken", 0)) != spoken:
                    spoken = now_spoken
                    self._read_words(store)
                self._answered = now = time.monotonic()
                if self._asks or now - looked > min(_SLOW_LOOK_S, self._timeout_s / 4):
                    looked = now
                    self._read_beats(store)
                if not self._of("failed") and not self._of("lost") and not self._gone():
                    well = now
                elif now - well > GRACE_S and not self.closing:
                    self._end_here()
                self._wake.wait(BEAT_S)
                self._wake.clear()
        except RuntimeError:  # the memory is gone
            self._answered = -math.inf
            self._told.set()

    def _gone(self) -> bool:
        now = time.monotonic()
        silent = (heard for rank, heard in self._heard.items() if rank not in self.words)
        return any(now - heard > self._timeout_s for heard in silent)

    def _end_here(self) -> None:
        """End the process from this thread: the other one hangs where no exception reaches it."""
        found = self._verdict(True, "this one hangs", self._timeout_s)
        if found is not None:
            self._end(found)

    def _read_words(self, store: Store) -> None:
        for other in self._others:
            if store.check([f"word/{other}"]):
                kind, _, text = store.get(f"word/{other}").decode(errors="replace").partition("\n")
                self.words[other] = Word(kind, text)

    def _read_beats(self, store: Store) -> None:
        now = time.monotonic()
        for other, beat in zip(self._others, store.multi_get([beat_key(o) for o in self._others]), strict=True):
            if self._beats.get(other) != beat:
                self._beats[other], self._heard[other] = beat, now


_current: RollCall | None = None
"""That of this process, as torch's process group is the process's."""


def current() -> RollCall | None:
    """Return this process's roll call; None where it is alone."""
    return _current


@contextmanager
def calling(ranks: Ranks, timeout_s: float, end: Callable[[RankError], None]) -> Iterator[RollCall]:
    """Hold a roll call while the block lasts; options as in `RollCall`."""
    global _current
    assert ranks.roster is not None, "they met by `ranks.join`"
    with RollCall(ranks.rank, ranks.roster, timeout_s, end) as call:
        _current = call
        try:
            yield call
        finally:
            _current = None


@contextmanager
def watched(kept: str | os.PathLike[str] = "", note: Callable[[str], object] = str) -> Iterator[None]:
    """Raise RankError in place of torch's errors where other ranks are to blame; other errors pass.

    Args:
        kept: Where the run is kept that the block makes.
        note: Called with the words of such an error.
    """
    call = _current
    if call is None:
        yield
        return
    call.kept = str(kept) or call.kept
    try:
        yield
    except RuntimeError as error:
        found = call.ask(error)
        if found is None:
            raise
        note(str(found))
        raise found from error


def fail_alike(error: Exception) -> None:
    """Raise the error at once unless all ranks have failed alike, and can go on to write down how."""
    if _current is not None and not _current.have_failed_alike(error):
        raise error


def _is_of_network(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _OF_NETWORK)
