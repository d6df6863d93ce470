"""One training step, guarded, and a loop over batches; for any module and any optimizer.

Shapes: B rows, K tasks, P parameters.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Optimizer

from .losses import multitask_loss
from .monitors.dynamics import ClipFactors
from .monitors.watch import Watch
from .schema import Batch, Task


class Verdict(NamedTuple):
    """What the guard found, on the device."""

    ok: Bool[Tensor, ""]
    """True when every loss and every gradient is finite."""
    bad_tasks: Bool[Tensor, " tasks"]
    """Tasks whose loss is not finite."""
    bad_parameters: Bool[Tensor, " parameters"]
    """Parameters whose gradient is not finite, in the order of those that have one."""
    largest: Float[Tensor, " parameters"]
    """The largest coordinate of each gradient, in the same order; infinite where it is not finite."""


class Step(NamedTuple):
    """One step's outcome, on the device."""

    scores: Float[Tensor, "batch tasks"]
    """Logits as serving gives them, from before the step."""
    losses: Float[Tensor, " tasks"]
    """Mean loss by task."""
    total: Float[Tensor, ""]
    """Weighted sum of the losses."""
    verdict: Verdict


def train_step(
    model: nn.Module,
    optimizers: Iterable[Optimizer],
    batch: Batch,
    tasks: Sequence[Task],
    watch: Watch | None = None,
) -> Step:
    """Score a batch as serving would, then learn it, unless a loss or gradient is not finite.

    Args:
        model: Maps a Batch to logits [B, K]. With a `forward_both(batch)` that returns (serving, training) logits, one
            forward serves both; otherwise the batch is first scored in eval mode.
        optimizers: All take a step, or none does.
        batch: On the model's device.
        tasks: In the order of the logits' columns.
        watch: Instruments, of this model and these optimizers.
    """
    scores_BK, logits_BK = _forward(model, batch)
    total, parts_K = multitask_loss(logits_BK, batch.labels, batch.weights, tasks)
    optimizers = list(optimizers)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    if watch is not None:
        watch.losses(parts_K, logits=logits_BK)
    total.backward()
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    verdict = guard(parameters, parts_K.detach())
    if watch is not None:
        watch.gradients(verdict.largest)
    # On a CPU asking is free, and no step at all leaves any optimizer as it was. On a GPU asking would be a host sync:
    # the guard has put zeros in place of the gradients, which the Adagrad family answers by staying where it is.
    if verdict.ok.device.type != "cpu" or bool(verdict.ok):
        for optimizer in optimizers:
            optimizer.step()
    return Step(scores_BK.detach(), parts_K.detach(), total.detach(), verdict)


def guard(parameters: Iterable[nn.Parameter], losses_K: Float[Tensor, " tasks"]) -> Verdict:
    """Form one verdict on losses and gradients; where it is bad, put zeros in place of every gradient.

    Gradients are selected, never multiplied: 0 * inf is NaN. There is no host sync.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    values = [g._values() if g.is_sparse else g for g in gradients]
    bad_tasks_K = ~torch.isfinite(losses_K)
    filled = [value for value in values if value.numel()]
    # The largest coordinate, not the L2 norm: finite gradients must not overflow to a bad verdict.
    largest = iter(torch._foreach_norm(filled, ord=float("inf")) if filled else ())
    norms = [next(largest).to(losses_K) if value.numel() else losses_K.new_zeros(()) for value in values]
    norms_P = torch.stack(norms) if norms else losses_K.new_zeros(0)
    bad_parameters_P = ~torch.isfinite(norms_P)
    ok = ~(bad_tasks_K.any() | bad_parameters_P.any())
    if ok.device.type != "cpu" or not bool(ok):
        for value in values:
            value.copy_(torch.where(ok, value, torch.zeros((), dtype=value.dtype, device=value.device)))
    return Verdict(ok, bad_tasks_K, bad_parameters_P, norms_P.nan_to_num(nan=math.inf, posinf=math.inf))


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
    """The first step whose loss or gradient was not finite: what it was, for people."""

    step: int
    tasks: tuple[str, ...]
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        losses = f"loss of {', '.join(self.tasks)}" if self.tasks else ""
        shown = ", ".join(self.parameters[:3]) + (", ..." if len(self.parameters) > 3 else "")
        gradients = f"gradient of {shown}" if self.parameters else ""
        return f"step {self.step}: not finite: {' and '.join(p for p in (losses, gradients) if p)}"


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
        self._parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        self._names = [names.get(id(p), "an unnamed parameter") for p in self._parameters]
        self._clip = ClipFactors(named, optimizers)
        self._reset()
        self.bad_steps = 0
        """Bad steps of the run so far."""
        self.first_bad: BadStep | None = None
        """The first bad step since the last fetch."""

    def _reset(self) -> None:
        self._losses: Tensor | None = None
        self._steps = 0
        self._bad: Tensor | None = None
        self._verdicts: list[tuple[int, Verdict, list[int]]] = []

    def add(self, step: int, outcome: Step) -> None:
        """Note one step. No host sync."""
        losses = torch.cat([outcome.total[None], outcome.losses])
        ok = outcome.verdict.ok
        good = torch.where(ok, losses, torch.zeros_like(losses))
        self._losses = good if self._losses is None else self._losses + good
        bad = (~ok).float()[None]
        self._bad = bad if self._bad is None else torch.cat([self._bad, bad])
        with_gradient = [i for i, p in enumerate(self._parameters) if p.grad is not None]
        self._verdicts.append((step, outcome.verdict, with_gradient))
        self._steps += 1

    def fetch(self) -> dict[str, float]:
        """Return the means since the last fetch: `loss/*`, `clip_factor/*`, `bad_steps/total`; one copy to the host."""
        if self._losses is None or self._bad is None:
            return {}
        factors = self._clip.read()
        packed = torch.cat(
            [self._losses, self._bad, *(f.detach().to(self._losses).reshape(1) for f in factors.values())]
        )
        values = packed.tolist()
        losses, bad, clip = self._cut(values)
        good = self._steps - sum(bad)
        self.bad_steps += int(sum(bad))
        self.first_bad = self._name(bad.index(1.0)) if any(bad) else None
        named = zip(["total", *self._tasks], losses, strict=True)
        row = {f"loss/{name}": value / good if good else float("nan") for name, value in named}
        row |= {f"clip_factor/{name}": value for name, value in zip(factors, clip, strict=True)}
        row["bad_steps/total"] = float(self.bad_steps)
        self._reset()
        return row

    def _cut(self, values: list[float]) -> tuple[list[float], list[float], list[float]]:
        first = len(self._tasks) + 1
        return values[:first], values[first : first + self._steps], values[first + self._steps :]

    def _name(self, index: int) -> BadStep:
        """Name the task and parameters of a bad step; only a bad step costs this copy."""
        step, verdict, with_gradient = self._verdicts[index]
        tasks = tuple(name for name, bad in zip(self._tasks, verdict.bad_tasks.tolist(), strict=True) if bad)
        flags = zip(with_gradient, verdict.bad_parameters.tolist(), strict=True)
        return BadStep(step, tasks, tuple(self._names[i] for i, bad in flags if bad))


def fit(
    model: nn.Module,
    optimizers: Mapping[str, Optimizer] | Sequence[Optimizer],
    batches: Iterable[Batch],
    tasks: Mapping[str, Task],
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
) -> Iterator[tuple[Batch, Step]]:
    """Learn batches one by one, yielding each (where it lay) with its step's outcome.

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
    ordered = list(tasks.values())
    model.train()
    for batch in batches:
        yield batch, train_step(model, held, batch.to(device, non_blocking=True), ordered, watch)
