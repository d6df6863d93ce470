"""The processes of a run: which one this is, and what they tell one another. One process alone needs none of torch's.

Everybody calls what is a collective (all but the properties), in the same order. Objects cross as pickles: between the
processes of one run, which are one user's.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, SteadyRankError
from .roster import Roster, meet

T = TypeVar("T")


class Waits:
    """Seconds that a process has spent in what all of them do at once."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Count the time until the end of the block."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begun


@dataclass(frozen=True)
class Ranks:
    """One of N processes that train together; alone by itself.

    >>> ALONE.is_first, ALONE.gather(torch.ones(2)), ALONE.on_first(lambda: "said once")
    (True, tensor([[1., 1.]]), 'said once')
    """

    rank: int = 0
    """Which one this is, from 0 on."""
    size: int = 1
    """How many there are."""
    group: Any = None
    """Torch's process group for tensors on the model's device; None alone."""
    host: Any = None
    """One for what lies on the host: a gloo group."""
    roster: Roster | None = field(default=None, repr=False)
    """Who they are; None alone, or where others than `join` made the group."""
    waits: Waits = field(default_factory=Waits, repr=False, compare=False)
    """How long this one has waited for the others."""

    @property
    def is_first(self) -> bool:
        """Whether this one writes, shows and decides for all."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no process group."""
        return self.group is None

    def gather(self, x: Tensor) -> Tensor:
        """Return a tensor of every rank, one under the other [size, *shape]; all have the same shape and dtype."""
        if self.is_alone:
            return x[None]
        found = x.new_empty((self.size, *x.shape))
        group = self.host if x.device.type == "cpu" else self.group
        with self.waits.noted():
            dist.all_gather(list(found.unbind()), x.contiguous(), group=group)
        return found

    def gather_objects(self, value: T) -> list[T]:
        """Return a value of every rank, in their order."""
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * self.size
        with self.waits.noted():
            dist.all_gather_object(found, value, group=self.host)
        return found

    def collect(self, value: T) -> list[T]:
        """Return a value of every rank on the first; elsewhere nothing."""
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * self.size if self.is_first else []
        with self.waits.noted():
            dist.gather_object(value, found if self.is_first else None, dst=0, group=self.host)
        return found

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return what rank `source` gave."""
        if self.is_alone:
            return value
        held = [value if self.rank == source else None]
        with self.waits.noted():
            dist.broadcast_object_list(held, src=source, group=self.host)
        return held[0]  # type: ignore[return-value]  # of the source, which gave a T

    def hand_out(self, values: Sequence[T]) -> T:
        """Return the value that the first rank has for this one; what others give is not looked at."""
        if self.is_alone:
            return values[0]
        found: list[Any] = [None]
        with self.waits.noted():
            dist.scatter_object_list(found, list(values) if self.is_first else None, src=0, group=self.host)
        return found[0]  # type: ignore[no-any-return]  # of the first rank, which gave Ts

    def swap(self, x: Tensor, send: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send rows of a tensor on the host: so many to each rank in turn; return those that come, rank by rank."""
        if self.is_alone:
            return x
        found = x.new_empty((sum(received), *x.shape[1:]))
        if 0 not in x.shape[1:]:  # else no column, with any rank
            with self.waits.noted():
                dist.all_to_all_single(found, x.contiguous(), list(received), list(send), group=self.host)
        return found

    def route(self, columns: Sequence[Tensor], owner_B: Tensor) -> list[Tensor]:
        """Send each row of some tensors on the host to its owner; return those that come, rank by rank.

        >>> ALONE.route([torch.tensor([5, 6])], torch.tensor([0, 0]))
        [tensor([5, 6])]
        """
        if self.is_alone:
            return list(columns)
        order, send, received = self._by_owner(owner_B)
        return [self.swap(column[order], send, received) for column in columns]

    def ask(self, columns: Sequence[Tensor], owner_B: Tensor, answer: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Send each row of some tensors to its owner, and return what it answers: for each row that came, a row."""
        if self.is_alone:
            return answer(list(columns))
        order, send, received = self._by_owner(owner_B)
        came = answer([self.swap(column[order], send, received) for column in columns])
        back = self.swap(came, received, send)
        found = torch.empty_like(back)
        found[order] = back
        return found

    def _by_owner(self, owner_B: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Return the rows in the order of their owners, how many go to each rank, and how many come from each."""
        send = owner_B.bincount(minlength=self.size)
        return owner_B.argsort(stable=True), send.tolist(), self.gather(send)[:, self.rank].tolist()

    def on_first(self, do: Callable[[], T]) -> T:
        """Let the first rank do something; all return what it returned, or raise what it raised."""
        if self.is_alone:
            return do()
        found: tuple[Any, ...] = ()
        if self.is_first:
            try:
                found = (True, do())
            except SteadyRankError as error:
                found = (False, error, _system_error(error))
        done, value, *cause = self.broadcast(found)
        if not done:
            raise value from cause[0]
        return value  # type: ignore[no-any-return]  # what `do` returned there

    def together(self, do: Callable[[], T]) -> T:
        """Let every rank do something; where it fails on one, all raise that error, the first rank's first."""
        if self.is_alone:
            return do()
        failed: tuple[SteadyRankError, OSError | None] | None = None
        try:
            value = do()
        except SteadyRankError as error:
            failed = error, _system_error(error)
        for each in self.gather_objects(failed):
            if each is not None:
                raise each[0] from each[1]
        return value

    def any(self, flag: bool) -> bool:
        """Say whether the flag is set on any rank."""
        return bool(self.gather(torch.tensor(flag)).any())

    def another(self) -> "Ranks":
        """Return the same ranks with a process group of their own for the host: for a thread beside this one."""
        if self.is_alone:
            return self
        wait = None if self.roster is None else timedelta(seconds=self.roster.timeout_s)
        return replace(self, host=dist.new_group(backend="gloo", timeout=wait), waits=Waits())


ALONE = Ranks()
"""One process, without a process group."""


def _system_error(error: Exception) -> OSError | None:
    """Return the system's error behind one of ours, which its pickle would lose, and with it whether a disk is full."""
    return error.__cause__ if isinstance(error.__cause__, OSError) else None


def started_together() -> bool:
    """Say whether torchrun, or another launcher that speaks as it does, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def local_rank() -> int:
    """Return the number of this process on its machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """Return how many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join(device: torch.device, timeout_s: float) -> Ranks:
    """Meet the other processes that the launcher started, and return who is who.

    gloo honours the timeout at every collective, also where packets vanish without a word; NCCL has a thread for that.

    Args:
        device: Where the model is: gloo serves a CPU, and NCCL a GPU.
        timeout_s: Seconds that one waits for another, here and at every collective.

    Raises:
        ConfigError: They do not meet.
    """
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    rank, size, wait = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=timeout_s)
    try:
        roster = meet(rank, size, timeout_s)
        dist.init_process_group(backend, store=roster.open(), rank=rank, world_size=size, timeout=wait)
        world = dist.group.WORLD
        host = world if device.type == "cpu" else dist.new_group(backend="gloo", timeout=wait)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"rank {rank} of {size} met no others at {where}: {error}; start them with torchrun, on every machine the "
            "same command"
        ) from error
    return Ranks(rank, size, world, host, roster)


def leave() -> None:
    """Say goodbye to the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
