"""What every monitor must hold (`check_monitor`)."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .optimizers import TinyProblem, forbid_host_sync, same, train_tiny


class Monitor(Protocol):
    """What watches a training loop as `Watch` does."""

    def losses(self, losses_K: Tensor) -> None:
        """Begin a step, between forward and backward."""

    def flush(self) -> Any:
        """Bring what was read to the host, and write it."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered between flushes."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""


Write = Callable[[str, int, Mapping[str, float]], None]


def check_monitor(make: Callable[[nn.Module, Optimizer, Write], Monitor]) -> None:
    """Check that a monitor changes nothing, waits for nothing, names what it reads, and resumes.

    Args:
        make: builds the monitor around a module with one task and its optimizer; it hands its rows to the third
            argument: a table, a step, and the readings by name.

    Raises:
        AssertionError: a promise is broken; the message says which.

    >>> from steadyrank import Watch
    >>> check_monitor(lambda model, optimizer, write: Watch(model, optimizer, ("click",), flush_every=0, write=write))
    """
    plain, watched = TinyProblem(), TinyProblem()
    train_tiny(plain, torch.optim.Adagrad(plain.named_parameters(), lr=0.1), range(40))
    rows = _watch(watched, make, [40])
    assert rows, "reads: nothing was written in 40 steps"
    assert same(plain.state_dict(), watched.state_dict()), "changes nothing: the weights differ without it"
    for table, _, row in rows:
        bad = [name for name in row if not (name.partition("/")[0] and name.partition("/")[2])]
        assert not bad, f"names: expected area/label in table '{table}', found {bad[:3]}"
    resumed = _watch(TinyProblem(), make, [20, 20])
    assert repr(resumed) == repr(rows), "resumes: the rows differ from those of a run that was not stopped"


def _watch(problem: TinyProblem, make: Any, parts: Iterable[int]) -> list[Any]:
    """Train with a monitor, a new one for each part, and return what it wrote."""
    optimizer = torch.optim.Adagrad(problem.named_parameters(), lr=0.1)
    rows: list[Any] = []
    state: dict[str, Any] = {}
    step = 0
    for steps in parts:
        now = len(rows)
        monitor = make(problem, optimizer, lambda table, at, row: rows.append((table, at, dict(row))))
        if state:
            monitor.load_state_dict(copy.deepcopy(state))
        for _ in range(steps):
            problem.zero_grad()
            loss = problem.loss(step)
            with forbid_host_sync():
                monitor.losses(loss[None])
            loss.backward()
            optimizer.step()
            step += 1
        monitor.flush()
        state = monitor.state_dict()
        optimizer._optimizer_step_pre_hooks.clear()
        optimizer._optimizer_step_post_hooks.clear()
        assert len(rows) > now, "reads: a part of the run left no row"
    return rows
