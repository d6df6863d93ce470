"""How the processes of one attempt find one another in the launcher's memory, and leave word there for the next.

The memory is a store of torch's, which torchrun keeps alive while it starts its processes anew. What the dead ones
wrote is still there then, so that gloo would call at their doors; and the count of the attempts is not the same on all
machines. Hence the processes shake hands, and each attempt has a room of its own.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import ConfigError

Store = Any
"""A store of torch's; its stubs do not name the type."""
STORE_S = 10.0
"""Seconds in which the launcher's memory answers, or is taken for gone."""
_LOOK_S = 0.02
_KEPT: list[Store] = []  # the launcher's memory lives as long as this, where it is in this process
_LIST, _BEAT = "steadyrank/roster", "beat"


@dataclass(frozen=True)
class Roster:
    """Who came."""

    room: str
    """Under which the keys of this attempt lie."""
    names: tuple[str, ...]
    """Of each rank: its machine and process."""
    timeout_s: float = 0.0
    """How long they wait for one another."""

    def open(self) -> Store:
        """Return a connection of one's own to this attempt's room."""
        return vars(dist)["PrefixStore"](self.room, open_store())

    def name(self, rank: int) -> str:
        """Return how a message names a rank.

        >>> Roster("", ("a, process 7", "b, process 9")).name(1)
        'rank 1 of 2 (b, process 9)'
        """
        return f"rank {rank} of {len(self.names)} ({self.names[rank]})"


def beat_key(rank: int) -> str:
    """Return under which key a rank shows that it lives."""
    return f"{_BEAT}/{rank}"


def open_store(timeout_s: float = STORE_S) -> Store:
    """Return a new connection to the launcher's memory; started by hand, rank 0 is the launcher."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and os.environ["RANK"] == "0"
    wait = timedelta(seconds=timeout_s)
    make = vars(dist)["TCPStore"]
    store = make(host, port, is_master=keeps, timeout=wait, wait_for_workers=False, multi_tenant=True)
    if keeps and not _KEPT:
        _KEPT.append(store)
    return store


def meet(rank: int, size: int, timeout_s: float) -> Roster:
    """Wait for the other processes of this attempt.

    Each says hello with a mark that no other process has. Rank 0 hangs out a list of those that it has heard, until
    each has found itself on a list with rank 0's own mark, and said so under it.

    Args:
        rank: Which one this is.
        size: How many are expected.
        timeout_s: Seconds to wait.

    Raises:
        ConfigError: Not all came.
        RuntimeError: The launcher's memory does not answer.
    """
    store, mine = open_store(timeout_s), [uuid.uuid4().hex, f"{socket.gethostname()}, process {os.getpid()}"]
    store.set_timeout(timedelta(seconds=STORE_S))
    until = time.monotonic() + timeout_s
    if rank:
        return _follow(store, rank, size, mine, until, timeout_s)
    hellos = [_hello(other) for other in range(1, size)]
    heard: list[list[str]] | None = None
    while time.monotonic() < until:
        found = _read(store, hellos)
        if found != heard:
            heard = found
            store.set(_LIST, json.dumps([mine, *heard]))
        if all(heard) and store.check([_here(mine, each) for each in heard]):
            store.set(f"{mine[0]}/{_BEAT}/0", "0")
            store.set(f"{mine[0]}/go", "")
            return Roster(mine[0], tuple(name for _, name in [mine, *heard]), timeout_s)
        time.sleep(_LOOK_S)
    came = [bool(each) and store.check([_here(mine, each)]) for each in heard or []]
    missing = [rank for rank, is_there in enumerate(came, 1) if not is_there]
    words = f"{size - len(missing)} of {size} ranks came within {timeout_s:g} s, not rank {_some(missing)}"
    store.set(f"{mine[0]}/failed", words)
    raise ConfigError(_advise(words))


def _follow(store: Store, rank: int, size: int, mine: list[str], until: float, timeout_s: float) -> Roster:
    """Come as another rank than 0."""
    store.set(_hello(rank), json.dumps(mine))
    lead = ""
    while time.monotonic() < until + 2.0:  # rank 0 may have come a little later, and says who is missing
        ranks = json.loads(store.get(_LIST)) if store.check([_LIST]) else []
        if len(ranks) == size and ranks[rank] == mine:
            if ranks[0][0] != lead:
                lead = ranks[0][0]
                store.set(f"{lead}/{beat_key(rank)}", "0")
                store.set(_here(ranks[0], mine), "")
            if store.check([f"{lead}/go"]):
                names = json.loads(store.get(_LIST))  # the last one
                return Roster(lead, tuple(name for _, name in names), timeout_s)
            if store.check([f"{lead}/failed"]):
                raise ConfigError(_advise(store.get(f"{lead}/failed").decode()))
        time.sleep(_LOOK_S)
    raise ConfigError(_advise(f"rank {rank} of {size} met no others within {timeout_s:g} s: rank 0 did not come"))


def _hello(rank: int) -> str:
    return f"steadyrank/hello/{rank}"


def _here(lead: Sequence[str], other: Sequence[str]) -> str:
    return f"{lead[0]}/here/{other[0]}"


def _read(store: Store, keys: list[str]) -> list[list[str]]:
    """Return the hellos under some keys, empty where there is none."""
    if keys and store.check(keys):
        return [json.loads(value) for value in store.multi_get(keys)]
    return [json.loads(store.get(key)) if store.check([key]) else [] for key in keys]


def _some(ranks: Sequence[int]) -> str:
    """Return some numbers as words.

    >>> _some([1, 3]), _some(range(9))
    ('1, 3', '0, 1, 2, 3, 4, ...')
    """
    return ", ".join(map(str, ranks[:5])) + (", ..." if len(ranks) > 5 else "")


def _advise(words: str) -> str:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return f"{words} (at {where}); start them with torchrun, on every machine the same command"


def remember(key: str, value: str) -> None:
    """Tell something to those that the launcher may start in the place of these."""
    open_store().set(key, value)


def recall(key: str) -> str | None:
    """Return what was to be remembered; None where nothing was."""
    store = open_store()
    return store.get(key).decode() if store.check([key]) else None


def forget(key: str) -> None:
    """Let nothing be remembered."""
    open_store().delete_key(key)


def is_first_to_say(text: str) -> bool:
    """Say whether no other process of this machine has said the same yet: for what goes wrong before they meet."""
    machine = [os.environ.get(name, "") for name in ("GROUP_RANK", "TORCHELASTIC_RESTART_COUNT")]
    try:
        return bool(open_store().add("/".join(["steadyrank/said", *machine, text]), 1) == 1)
    except (RuntimeError, KeyError):
        return True
