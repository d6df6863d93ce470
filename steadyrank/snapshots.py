"""Snapshots of a run's state in memory: the newest ones, within a budget in bytes, for rolling back without a disk."""

import copy
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ranks import ALONE, Ranks


class _Snapshot(NamedTuple):
    step: int
    size: int
    """In bytes."""
    state: Any


class SnapshotRing:
    """The newest snapshots that fit into a budget; where a new one does not fit, the oldest go.

    A snapshot is a copy on the CPU, wherever its tensors lay: a GPU's memory is what a run has least of. On a GPU
    taking one waits for the device, so take them where the host waits anyway. What a loop does while something is
    suspected should not be kept: it would push out what a rollback is for.

    Args:
        budget_bytes: what all snapshots may take together; 0 for none.
        ranks: who takes snapshots together, each of its part: all keep those of the same steps.

    >>> import torch
    >>> ring = SnapshotRing(10_000)
    >>> weight = torch.ones(1000)
    >>> [ring.add(step, {"weight": weight, "step": step}) for step in (10, 20, 30)]
    ['', '', '']
    >>> _ = weight.fill_(torch.nan)
    >>> step, state = ring.newest_before(30)
    >>> ring.steps, step, state["weight"].sum()
    ([20, 30], 20, tensor(1000.))
    """

    def __init__(self, budget_bytes: int, ranks: Ranks = ALONE) -> None:
        self.budget_bytes, self._ranks = budget_bytes, ranks
        self._held: list[_Snapshot] = []
        self._refused = False

    @property
    def steps(self) -> list[int]:
        """The steps that have a snapshot, in rising order."""
        return [snapshot.step for snapshot in self._held]

    @property
    def bytes(self) -> int:
        """What all snapshots take together."""
        return sum(snapshot.size for snapshot in self._held)

    def add(self, step: int, state: Any) -> str:
        """Keep a copy of a state; return "", or the first time that it does not fit at all, a sentence to report.

        Args:
            step: Steps done. Snapshots of this step and of later ones, which a rollback has undone, are dropped.
            state: Tensors and plain values in dicts, lists and tuples.
        """
        size = int(self._ranks.gather(torch.tensor(size_of(state))).max())
        if size > self.budget_bytes:
            told, self._refused = self._refused, True
            return (
                ""
                if told
                else (
                    f"a snapshot takes {size / 1e6:,.1f} MB, more than the {self.budget_bytes / 1e6:,.1f} MB of "
                    "recovery.snapshot_budget_mb: none is kept in memory, and a rollback goes to a checkpoint on disk; "
                    "raise the budget, or set train.checkpoint_every"
                )
            )
        self.drop_after(step - 1)
        while self._held and self.bytes + size > self.budget_bytes:  # before copying: the budget bounds the peak too
            del self._held[0]
        self._held.append(_Snapshot(step, size, copy_state(state)))
        return ""

    def newest_before(self, step: int) -> tuple[int, Any] | None:
        """Return the newest snapshot of a step below `step`, and its step; None where there is none.

        What is returned is a copy: an optimizer that loads it may keep the very tensors and change them in place.
        """
        for snapshot in reversed(self._held):
            if snapshot.step < step:
                return snapshot.step, copy_state(snapshot.state)
        return None

    def drop_after(self, step: int) -> None:
        """Drop the snapshots of steps above `step`, after rolling back to it."""
        self._held = [snapshot for snapshot in self._held if snapshot.step <= step]

    def clear(self) -> None:
        """Drop all."""
        self._held = []


def size_of(state: Any) -> int:
    """Return about how many bytes a state takes.

    >>> import torch
    >>> size_of({"weight": torch.zeros(1000), "step": 3}) // 1000
    4
    """
    if isinstance(state, Tensor):
        here = state.to_local() if hasattr(state, "to_local") else state
        return here.numel() * here.element_size()
    if isinstance(state, dict):
        return sys.getsizeof(state) + sum(size_of(key) + size_of(value) for key, value in state.items())
    if isinstance(state, list | tuple):
        return sys.getsizeof(state) + sum(size_of(value) for value in state)
    return sys.getsizeof(state) + (size_of(vars(state)) if hasattr(state, "__dict__") else 0)


def copy_state(state: Any) -> Any:
    """Return a copy of a state that shares nothing with it, its tensors on the CPU and without a gradient's history.

    >>> import torch
    >>> copy_state({"a": [torch.ones(1, requires_grad=True) * 2, "b"]})
    {'a': [tensor([2.]), 'b']}
    """
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copy_state(value) for key, value in state.items()}
    if isinstance(state, list):
        return [copy_state(value) for value in state]
    if isinstance(state, tuple):
        return tuple(copy_state(value) for value in state)
    return copy.deepcopy(state)
