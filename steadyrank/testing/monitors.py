"""What every monitor must hold (`check_monitor`)."""

import io
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim import ClippyAdagrad
from .optimizers import forbid_host_sync, same

Write = Callable[[str, int, Mapping[str, float]], None]
_STEPS = 24


@runtime_checkable
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

    def close(self) -> Any:
        """Take away the hooks on module and optimizer."""


Make = Callable[[nn.Module, Optimizer, Write], Monitor]


class _Gate(nn.Sequential):
    is_gate = True


class TinyTasks(nn.Module):
    """Two tasks over a table with a sparse gradient, a shared `trunk`, a gate and heads; `losses(step)` gives both.

    A parameter without elements and one without a gradient are there too.

    >>> model = TinyTasks()
    >>> model.losses(0).shape, [name for name, _ in model.named_parameters()][:3]
    (torch.Size([2]), ['empty', 'unused', 'table.weight'])
    """

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.empty, self.unused = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.ones(2))
            self.table = nn.Embedding(12, 4, sparse=True)
            self.trunk = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
            self.gate = _Gate(nn.Linear(6, 2), nn.Softmax(1))
            self.heads = nn.Linear(6, 2)

    def losses(self, step: int) -> Float[Tensor, " tasks"]:
        """Return the mean square errors on the batch that belongs to `step`; rows of the table come up repeatedly."""
        draw = torch.Generator().manual_seed(1000 + step)
        rows, target_BK = torch.randint(0, 8, (10,), generator=draw), torch.randn(10, 2, generator=draw)
        h_BH = self.trunk(self.table(rows))
        logits_BK: Tensor = self.heads(h_BH) * self.gate(h_BH)
        return (logits_BK - target_BK).square().mean(0) + self.empty.sum()


def check_monitor(make: Make) -> None:
    """Check that a monitor changes nothing, waits for nothing, names what it reads, forgets NaN, resumes, and goes.

    Args:
        make: builds the monitor around a module with the tasks "click" and "like" and its optimizer; it hands its rows
            to the third argument: a table, a step, and the readings by name.

    Raises:
        AssertionError: a promise is broken; the message says which.

    >>> from steadyrank import Watch
    >>> tasks = ("click", "like")
    >>> check_monitor(lambda model, optimizer, write: Watch(model, optimizer, tasks, flush_every=0, write=write))
    """
    plain, watched = TinyTasks(), TinyTasks()
    _train(plain, None)
    rows = _train(watched, make)
    assert rows, f"reads: nothing was written in {_STEPS} steps"
    assert same(plain.state_dict(), watched.state_dict()), "changes nothing: the weights differ without it"
    for table, _, row in rows:
        bad = [name for name in row if not all(name.partition("/")[::2]) or not isinstance(row[name], float)]
        assert not bad, f"names: expected area/label and a number in table '{table}', found {bad[:3]}"
    assert repr(_train(TinyTasks(), make)) == repr(rows), "deterministic: the rows of a second run differ"
    resumed = _train(TinyTasks(), make, resume=True)
    assert repr(resumed) == repr(rows), "resumes: the rows differ from those of a run that was not stopped"
    # Gradients of 0 leave this optimizer where it was, as those that it refuses do.
    half = _STEPS // 2
    without, spoilt = (
        [row for row in _train(TinyTasks(), make, spoil=spoil) if row[1] > half] for spoil in (0.0, torch.nan)
    )
    assert repr(without) == repr(spoilt), "forgets NaN: one step that was not finite changes what is read later"
    _train(TinyTasks(), make, waits=False)


def _train(
    model: TinyTasks, make: Make | None, *, resume: bool = False, spoil: float = 1.0, waits: bool = True
) -> list[Any]:
    """Train, and return the rows that a monitor wrote.

    Args:
        model: What is trained.
        make: Builds the monitor, if there is one.
        resume: Put another monitor in its place halfway.
        spoil: What the losses of one step are multiplied by, some steps before half of them are done.
        waits: Let the monitor wait for the device, with an optimizer that does.
    """
    named = list(model.named_parameters())
    optimizer: Optimizer = ClippyAdagrad(named, lr=0.3) if waits else torch.optim.SGD(named, lr=0.1)
    rows: list[Any] = []

    def build() -> Monitor | None:
        return make(model, optimizer, lambda table, at, row: rows.append((table, at, dict(row)))) if make else None

    monitor = build()
    for step in range(_STEPS):
        optimizer.zero_grad()
        with nullcontext() if waits else forbid_host_sync():
            losses_K = model.losses(step) * (spoil if step == _STEPS // 2 - 3 else 1.0)
            if monitor is not None:
                monitor.losses(losses_K)
            losses_K.sum().backward()
            optimizer.step()
        if monitor is not None and step + 1 in (_STEPS // 2, _STEPS):
            monitor.flush()
            if resume and step + 1 < _STEPS:
                monitor = _replace(monitor, build)
    if monitor is not None:
        monitor.close()
        hooks = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
        hooks += [found for module in model.modules() for found in (module._forward_hooks, module._forward_pre_hooks)]
        assert not any(hooks), "goes: close left hooks behind"
    return rows


def _replace(monitor: Monitor, build: Callable[[], Monitor | None]) -> Monitor | None:
    """Return a new monitor that goes on from the state of another, by way of a file."""
    file = io.BytesIO()
    torch.save(monitor.state_dict(), file)
    monitor.close()
    file.seek(0)
    fresh = build()
    if fresh is not None:
        fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh
