"""One training step, guarded, and a loop over batches; for any module and any optimizer.

Shapes: B rows, K tasks, P parameters.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from .guard import Before, Totals, Verdict, forget_step, judge, judge_together, may_ask, quarantine, step_where_ok
from .guard import guard as guard
from .losses import multitask_loss
from .monitors.dynamics import ClipFactors
from .monitors.watch import Watch
from .ranks import ALONE, Ranks
from .ranks.pace import Pace
from .schema import Batch, Task

NAMED = 5
"""Steps and tables of which rows in quarantine are named at a fetch."""


@runtime_checkable
class Engine(Protocol):
    """Trains one model on several ranks (`distributed.engine`)."""

    ranks: Ranks
    pace: Pace
    """How long this rank works in its steps."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (serving, training) logits of this rank's rows."""

    def backward(self, total: Tensor) -> None:
        """Leave the gradient of the whole batch's loss, of which `total` is this rank's part."""


class Step(NamedTuple):
    """One step's outcome, on the device; of several ranks, over the rows of all, but for the scores."""

    scores: Float[Tensor, "batch tasks"]
    """Logits as serving gives them, from before the step."""
    losses: Float[Tensor, " tasks"]
    """Mean loss by task."""
    total: Float[Tensor, ""]
    """Weighted sum of the losses."""
    verdict: Verdict
    asked: bool = True
    """Whether the host asked for the verdict; if not, a bad step was made and selected away."""


def train_step(
    model: nn.Module,
    optimizers: Iterable[Optimizer],
    batch: Batch,
    tasks: Sequence[Task],
    watch: Watch | None = None,
    *,
    quarantine_rows: bool = False,
    scales_K: Float[Tensor, " tasks"] | None = None,
    engine: Engine | None = None,
) -> Step:
    """Score a batch as serving would, then learn it, unless a loss or gradient is not finite (`guard.judge`).

    A bad step leaves weights, the optimizers' states and the model's running statistics (buffers of up to a million
    numbers) as they were.

    Args:
        model: Maps a Batch to logits [B, K]. With a `forward_both(batch)` that returns (serving, training) logits, one
            forward serves both; otherwise the batch is first scored in eval mode.
        optimizers: All take a step, or none does.
        batch: On the model's device.
        tasks: In the order of the logits' columns.
        watch: Instruments, of this model and these optimizers.
        quarantine_rows: Leave a row of a sparse gradient that is not finite out alone, and learn the rest of the step.
        scales_K: By how much each task is damped for now, on the device; it may change between steps.
        engine: Trains the model together with other ranks, of which each has its part of the batch (`Batch.share`).
    """
    before = Before()
    before.keep_statistics(model)
    scores_BK, logits_BK = _forward(model, batch) if engine is None else engine.forward(batch)
    sums_K = None if batch.share is None else batch.share.weights
    total, parts_K = multitask_loss(logits_BK, batch.labels, batch.weights, tasks, scales_K, sums_K)
    optimizers = list(optimizers)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    if watch is not None:
        watch.losses(parts_K, logits=logits_BK, ranks=ALONE if engine is None else engine.ranks)
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    ask = may_ask(parts_K.device)
    if engine is None:
        total.backward()
        bad_rows = quarantine(parameters, ask) if quarantine_rows else None
        verdict = judge(parameters, parts_K.detach(), bad_rows, before.statistics())
        if watch is not None:
            watch.gradients(verdict.largest)
    else:
        engine.backward(total)
        bad_rows = quarantine(parameters, ask) if quarantine_rows else None
        here = Totals(total.detach(), parts_K.detach(), _largest(logits_BK.detach()))
        verdict, whole = judge_together(engine.ranks, parameters, here, bad_rows, before.statistics())
        total, parts_K = whole.total, whole.losses
        if watch is not None:
            watch.whole(parts_K, whole.logits)
            watch.gradients(verdict.largest)
    with nullcontext() if engine is None else engine.pace.working(ends_step=True):
        asked = step_where_ok(optimizers, verdict, before, bad_rows, ask)
    return Step(scores_BK.detach(), parts_K.detach(), total.detach(), verdict, asked)


def _largest(logits_BK: Tensor) -> Tensor:
    """Return the largest |logit| of each task; 0 where there is no row."""
    return logits_BK.abs().amax(0) if len(logits_BK) else logits_BK.new_zeros(logits_BK.shape[1])


def _forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (serving, training) logits."""
    both = getattr(model, "forward_both", None)
    if both is not None:
        serving, training = both(batch)
        return serving, training
    mode = model.training
    model.eval()
    with torch.no_grad():
        serving = model(batch)
    model.train(mode)
    return serving, model(batch)


@dataclass(frozen=True)
class BadStep:
    """The first step whose loss or gradient was not finite, or whose gradient too large: what it was, for people."""

    step: int
    tasks: tuple[str, ...]
    parameters: tuple[str, ...]
    """Parameters whose gradient was not finite."""
    too_large: tuple[str, ...] = ()
    """Parameters whose gradient was finite, but above `guard.gradient_limit`."""
    statistics: bool = False
    """A running statistic of the model was not finite."""

    def __str__(self) -> str:
        losses = f"loss of {', '.join(self.tasks)}" if self.tasks else ""
        statistics = "running statistics of the model" if self.statistics else ""
        not_finite = " and ".join(part for part in (losses, _gradients_of(self.parameters), statistics) if part)
        found = [f"not finite: {not_finite}"] if not_finite else []
        if self.too_large:
            found.append(f"too large to be squared: {_gradients_of(self.too_large)}")
        return f"step {self.step}: {'; '.join(found)}"


def _gradients_of(names: Sequence[str]) -> str:
    return f"gradient of {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""


@dataclass(frozen=True)
class QuarantinedRows:
    """Rows of one table whose gradient was not finite in one step, and that were left out of it."""

    step: int
    parameter: str
    count: int
    rows: tuple[int, ...]
    """The first of them."""

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.rows)) + (", ..." if self.count > len(self.rows) else "")
        rows = "row" if self.count == 1 else f"{self.count} rows"
        return f"step {self.step}: gradient not finite: {rows} of {self.parameter} left out ({shown})"


class Readings:
    """Sums over steps that stay on the device until they are fetched together, in one copy.

    Args:
        tasks: Names of the tasks.
        named_parameters: Names and parameters that the optimizers hold.
        optimizers: The optimizers.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        optimizers: Sequence[Optimizer],
    ) -> None:
        named = list(named_parameters)
        names = {id(parameter): name for name, parameter in named}
        self._tasks = list(tasks)
        self._optimizers = list(optimizers)
        self._parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        self._names = [names.get(id(p), "an unnamed parameter") for p in self._parameters]
        self._clip = ClipFactors(named, optimizers)
        self._reset()
        self.bad_steps = 0
        """Bad steps of the run so far."""
        self.in_a_row = 0
        """Bad steps in a row, up to the newest that was fetched."""
        self.bad_since = 0
        """Bad steps between the last two fetches."""
        self.first_bad: BadStep | None = None
        """The first of them."""
        self.quarantined_rows = 0
        """Rows left out of steps so far; a row counts in each step."""
        self.quarantined: list[QuarantinedRows] = []
        """The first few of them between the last two fetches."""

    def _reset(self) -> None:
        self._losses: Tensor | None = None
        self._marks: list[Tensor] = []  # of each step: whether it was bad, and how many rows were left out
        self._verdicts: list[tuple[int, Verdict, list[int], bool]] = []

    def add(self, step: int, outcome: Step) -> None:
        """Note one step. No host sync."""
        losses = torch.cat([outcome.total[None], outcome.losses])
        verdict = outcome.verdict
        good = torch.where(verdict.ok, losses, torch.zeros_like(losses))
        self._losses = good if self._losses is None else self._losses + good
        self._marks.append((~verdict.ok).to(losses))
        if verdict.quarantined is not None:
            self._marks.append(verdict.quarantined[:, 1].sum().to(losses))
        with_gradient = [i for i, p in enumerate(self._parameters) if p.grad is not None]
        self._verdicts.append((step, verdict, with_gradient, outcome.asked))

    def fetch(self) -> dict[str, float]:
        """Return the means since the last fetch: `loss/*`, `clip_factor/*`, `bad_steps/total`; one copy to the host.

        With quarantine also `quarantined_rows/total`.
        """
        if self._losses is None:
            return {}
        factors = self._clip.read()
        packed = torch.cat(
            [
                self._losses,
                torch.stack(self._marks),
                *(f.detach().to(self._losses).reshape(1) for f in factors.values()),
            ]
        )
        values = iter(packed.tolist())
        losses = [next(values) for _ in range(1 + len(self._tasks))]
        bad, rows = [], []
        for _, verdict, _, _ in self._verdicts:
            bad.append(bool(next(values)))
            rows.append(0 if verdict.quarantined is None else int(next(values)))
        self._count(bad, rows)
        good = len(bad) - sum(bad)
        named = zip(["total", *self._tasks], losses, strict=True)
        row = {f"loss/{name}": value / good if good else float("nan") for name, value in named}
        row |= {f"clip_factor/{name}": value for name, value in zip(factors, values, strict=True)}
        row["bad_steps/total"] = float(self.bad_steps)
        if self._verdicts[-1][1].quarantined is not None:
            row["quarantined_rows/total"] = float(self.quarantined_rows)
        self._reset()
        return row

    def state_dict(self) -> dict[str, int]:
        """Return the counts, as plain values; fetch first, since steps that are not fetched are not in it."""
        return {
            "bad_steps": self.bad_steps,
            "in_a_row": self.in_a_row,
            "quarantined_rows": self.quarantined_rows,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take up saved counts."""
        self.bad_steps, self.in_a_row = state["bad_steps"], state["in_a_row"]
        self.quarantined_rows = state["quarantined_rows"]
        self.bad_since, self.first_bad, self.quarantined = 0, None, []
        self._reset()

    def _count(self, bad: Sequence[bool], rows: Sequence[int]) -> None:
        """Take in what the host has just learned of the steps since the last fetch."""
        self.bad_since = sum(bad)
        self.bad_steps += self.bad_since
        self.in_a_row = next(
            (i for i, was_bad in enumerate(reversed(bad)) if was_bad is False), self.in_a_row + len(bad)
        )
        self.first_bad = self._name(bad.index(True)) if self.bad_since else None
        self.quarantined_rows += sum(rows)
        with_rows = [index for index, count in enumerate(rows) if count][:NAMED]
        self.quarantined = [found for index in with_rows for found in self._name_rows(index)][:NAMED]
        for was_bad, (_, _, with_gradient, asked) in zip(bad, self._verdicts, strict=True):
            if was_bad and not asked:
                forget_step(self._optimizers, [self._parameters[i] for i in with_gradient])

    def _name(self, index: int) -> BadStep:
        """Name the task and parameters of a bad step; only a bad step costs this copy."""
        step, verdict, with_gradient, _ = self._verdicts[index]
        tasks = tuple(name for name, bad in zip(self._tasks, verdict.bad_tasks.tolist(), strict=True) if bad)
        flags = zip(with_gradient, verdict.bad_parameters.tolist(), verdict.largest.isfinite().tolist(), strict=True)
        found = [(self._names[i], finite) for i, bad, finite in flags if bad]
        not_finite, too_large = ([name for name, is_finite in found if is_finite is kind] for kind in (False, True))
        statistics = verdict.bad_statistics is not None and bool(verdict.bad_statistics)
        return BadStep(step, tasks, tuple(not_finite), tuple(too_large), statistics)

    def _name_rows(self, index: int) -> list[QuarantinedRows]:
        """Name the rows that were left out of a step; only such a step costs this copy."""
        step, verdict, with_gradient, _ = self._verdicts[index]
        lines = [] if verdict.quarantined is None else verdict.quarantined.tolist()
        return [
            QuarantinedRows(step, self._names[with_gradient[place]], count, tuple(row for row in rows if row >= 0))
            for place, count, *rows in lines
            if count
        ]


def fit(
    model: nn.Module,
    optimizers: Mapping[str, Optimizer] | Sequence[Optimizer],
    batches: Iterable[Batch],
    tasks: Mapping[str, Task],
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
    *,
    quarantine_rows: bool = False,
    scales_K: Float[Tensor, " tasks"] | None = None,
    engine: Engine | None = None,
) -> Iterator[tuple[Batch, Step]]:
    """Learn batches one by one, yielding each (where it lay) with its step's outcome; options as in `train_step`.

    Example:
        >>> from steadyrank.schema import NumberFeature, Schema, Task
        >>> schema = Schema(features={"x": NumberFeature()}, tasks={"click": Task(kind="binary")})
        >>> class Linear(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.zeros(1, 1))
        ...
        ...     def forward(self, batch):
        ...         return batch.numbers @ self.weight
        >>> model = Linear()
        >>> x = torch.tensor([[1.0], [-1.0]])
        >>> none = torch.zeros(2, 0, dtype=torch.int64)
        >>> zero = torch.zeros(2, dtype=torch.int64)
        >>> batch = Batch(none, (), x, none, labels=(x > 0).float(), weights=torch.ones(2, 1), time=zero, group=zero)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> [round(step.total.item(), 3) for _, step in fit(model, [sgd], [batch] * 3, schema.tasks)]
        [0.693, 0.474, 0.348]
    """
    held = list(optimizers.values() if isinstance(optimizers, Mapping) else optimizers)
    ordered, device = list(tasks.values()), torch.device(device)
    copying = torch.cuda.Stream(device) if device.type == "cuda" else None
    model.train()
    for batch in batches:
        here = batch.to(device) if copying is None else _copy_beside(batch, device, copying)
        options: dict[str, Any] = {"quarantine_rows": quarantine_rows, "scales_K": scales_K, "engine": engine}
        yield batch, train_step(model, held, here, ordered, watch, **options)


def _copy_beside(batch: Batch, device: torch.device, copying: torch.cuda.Stream) -> Batch:
    """Copy a batch to a GPU while that still computes the step before; from page-locked memory nothing waits."""
    computing = torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        here = batch.to(device, non_blocking=True)
    computing.wait_stream(copying)
    for part in here.tensors():
        part.record_stream(computing)  # its memory is not given to a later copy before the step is done
    return here
