"""A step of a run done again, exactly, from the nearest checkpoint, to find what stood behind it."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .checkpoints import Checkpoints
from .config import RunConfig
from .data.logs import Cursor
from .data.rows import show_rows
from .errors import CheckpointError, DataError
from .losses import multitask_loss
from .monitors.cause import Cause, Earlier, Trail, find_cause
from .monitors.unusual import Reference
from .parts import Parts
from .report.records import read_causes
from .rescue import Rescue
from .runs import RunFolder
from .schema import Batch
from .train import Readings, Step, fit

EARLIER = 100
"""Steps by which the state is older on which the batch is tried again."""
LONGEST = 2_000
"""Steps that are worth making again for the sake of that older state."""
TRAIL = 100
"""Steps before the one in question whose losses, gradients and updates are compared with its own."""


@dataclass(frozen=True)
class Replayed:
    """A step done again."""

    cause: Cause
    start: int
    """Step of the checkpoint from which it was reached; 0 is the beginning of the run."""
    compared: int
    """Readings of the run that were compared with those of the replay."""
    difference: float
    """Largest relative difference of a loss; 0 when all are the same, bit for bit."""

    @property
    def exact(self) -> bool:
        """Whether something was compared, and all of it was the same."""
        return self.compared > 0 and self.difference == 0

    def __str__(self) -> str:
        way = f"replayed from {f'the checkpoint of step {self.start}' if self.start else 'the beginning'}"
        if not self.compared:
            return f"{way}; the run left no reading to compare it with"
        if self.exact:
            return f"{way}, exactly: all {self.compared} losses that the run wrote down there came out the same"
        return (
            f"{way}, but not exactly: a loss differs by {self.difference:.2g} of itself; another machine, version, "
            "number of threads or of ranks, or log, or a GPU, can do that"
        )


def replay(run: str | Path, step: int, on_progress: Callable[[int, int], None] | None = None) -> Replayed:
    """Do a step of a run again and find what stood behind it; causes/step_N.json is written, nothing else is touched.

    The way begins at the newest checkpoint that leaves room for the state of 100 steps earlier, or where that makes it
    longer than 2,000 steps, at the newest one before the step. The beginning of the run counts as a checkpoint.

    Args:
        run: The run's folder.
        step: The step, counted from 1.
        on_progress: Called with the steps done and in all.

    Returns:
        The cause, and whether the replay is the same run.

    Raises:
        CheckpointError: No run folder, no configuration, a damaged checkpoint, or no such step.
        ConfigError, DataError: The log is gone, or is not the one that the run read.
    """
    folder = RunFolder.open(run)
    config = RunConfig.from_toml(folder.config_text(), where=str(folder.path))
    recorded = folder.readings("steps")
    last = max([0, *recorded["step"].tolist(), *folder.checkpoints.steps()])
    if not 1 <= step <= last:
        known = f"a step from 1 to {last}" if last else "a run that has made a step"
        raise CheckpointError(f"{folder.path}: expected {known}, got step {step}")
    parts = config.build(resume=True)
    parts.set_up()
    walk = _Walk(parts, step, folder.checkpoints)
    start = walk.start(folder)
    ends = {int(each): i for i, each in enumerate(recorded["step"]) if each > start}
    stop = min((end for end in ends if end >= step), default=step)
    compared, difference = 0, 0.0
    for now, row in walk.go(start, stop, set(ends)):
        if on_progress is not None:
            on_progress(now - start, stop - start)
        for name in ("total", *parts.schema.tasks) if row else ():
            column = recorded.get(f"loss/{name}")
            if column is not None:
                compared += 1
                difference = max(difference, _differ(row[f"loss/{name}"], float(column[ends[now]])))
    before = next((cause for cause in read_causes(folder) if cause["step"] == step), {})
    found = Replayed(walk.find_cause(str(before.get("why", "asked for"))), start, compared, difference)
    facts = {"start": start, "exact": found.exact, "compared": compared, "difference": difference, "words": str(found)}
    folder.write_cause(step, {**before, **found.cause.as_dict(), "replayed": facts})
    return found


class _Walk:
    """The way to a step, and what is kept of it."""

    def __init__(self, parts: Parts, step: int, kept: Checkpoints) -> None:
        self.parts, self.step = parts, step
        self.reference = Reference()
        self._cursor = Cursor()
        tasks, warmup = list(parts.schema.tasks), parts.config.warmup_steps
        self._rescue = Rescue(parts.recovery, parts.optimizers, tasks, parts.device, kept, warmup)
        self._damped: dict[int, str] = {}
        self._states: dict[int, dict[str, Tensor]] = {}
        self._batch: Batch | None = None
        optimizers = list(parts.optimizers.values())
        names = {id(p): name for name, p in parts.model.named_parameters()}
        self._parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        self._names = [names[id(p)] for p in self._parameters]
        self._tables = set(getattr(parts.model, "table_names", list)())
        self._before: list[Tensor | None] = []
        self._steps: list[int] = []
        self._losses: list[list[float]] = []
        self._gradients: list[list[float]] = []
        self._updates: list[list[float]] = []

    def start(self, folder: RunFolder) -> int:
        """Take up a checkpoint, and return its step."""
        parts, kept = self.parts, folder.checkpoints.steps()
        events = [event for event in folder.events() if event["step"] < self.step]
        returned = max((event["step"] for event in events if event["kind"] == "returned"), default=0)
        steps = [each for each in (0, *kept) if returned <= each < self.step]
        if not steps:
            raise CheckpointError(
                f"{folder.path}: at step {returned} the run went back to an earlier state, and no checkpoint is kept "
                f"between there and step {self.step} to replay from; keep more (train.keep_checkpoints)"
            )
        parts.model.to(parts.device)
        for optimizer in parts.optimizers.values():  # state that was made with the weights moves with them
            optimizer.load_state_dict(optimizer.state_dict())
        start = max((each for each in steps if each <= max(0, self.step - 1 - EARLIER)), default=steps[0])
        if self.step - start > LONGEST:
            start = steps[-1]
        self._damped = {event["step"]: event["task"] for event in events if event["kind"] == "damped"}
        if kept:  # with none, the log is taken as it lies
            self._load(folder, start, folder.checkpoints.load(start or kept[-1]))
        self._keep_state(start)
        return start

    def _load(self, folder: RunFolder, start: int, state: dict[str, Any]) -> None:
        """Take up a checkpoint; of a later one than the start only the order of the log's files."""
        parts = self.parts
        try:
            if start:
                parts.load_state_dict(state)
                self._cursor = Cursor(**state["cursor"])
                self._rescue.load_state_dict(state["rescue"])
                if "reference" in state["instruments"]:
                    self.reference.load_state_dict(state["instruments"]["reference"])
            parts.reader.load_state_dict(state["reader"], self._cursor.next_row)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{folder.path}: checkpoint {state.get('step')} belongs to another model or version ({error})"
            ) from error

    def go(self, start: int, stop: int, ends: set[int]) -> Iterator[tuple[int, dict[str, float]]]:
        """Make the steps up to `stop`, yielding each with the run's readings where it has some (`ends`), else none."""
        parts = self.parts
        optimizers = list(parts.optimizers.values())
        readings = Readings(list(parts.schema.tasks), parts.model.named_parameters(), optimizers)
        read = parts.reader.batches(self._cursor)
        leaves_out = self._rescue.leaves_out
        batches = (batch for batch, at in read if not leaves_out(at.window, at.batches, len(batch)))
        steps = fit(
            parts.model,
            parts.optimizers,
            self._noting(itertools.islice(batches, stop - start), start),
            parts.schema.tasks,
            device=parts.device,
            quarantine_rows=parts.config.quarantine_rows,
            scales_K=self._rescue.scales_K,
        )
        now = start
        for now, (batch, outcome) in enumerate(steps, start=start + 1):
            self._note(now, batch, outcome)
            readings.add(now, outcome)
            yield now, readings.fetch() if now in ends else {}
        if now < stop:
            raise DataError(
                f"the log ends after {now} steps, but the run went on to step {stop}; it is not the log that it read"
            )

    def find_cause(self, why: str) -> Cause:
        """Find what stood behind the step, on the state before it."""
        parts, source, step = self.parts, self.parts.reader.source, self.step
        assert self._batch is not None, "the way leads to the step"
        parts.model.load_state_dict(self._states[step - 1])
        then, state = next(iter(self._states.items()))
        earlier = Earlier(step - 1 - then, state) if then < step - 1 else None
        steps_T = np.array(self._steps)
        trails = [
            Trail(measure, self._names, steps_T, np.array(values))
            for measure, values in (("gradient", self._gradients), ("update over weight", self._updates))
        ]
        return find_cause(
            step,
            parts.model.train(),
            self._batch,
            parts.schema,
            multitask_loss,
            self.reference,
            losses_TK=np.array(self._losses)[steps_T < step],
            trails=trails,
            earlier=earlier,
            why=why,
            look_up=lambda rows: show_rows(source, rows),
        )

    def _keep_state(self, now: int) -> None:
        """Keep the state after `now` steps where it is wanted: the first, that of 100 steps earlier, and the last."""
        if now > self.step - 1 or (self._states and now not in (self.step - 1 - EARLIER, self.step - 1)):
            return
        if now == self.step - 1 - EARLIER:
            self._states.clear()
        self._states[now] = {name: value.clone() for name, value in self.parts.model.state_dict().items()}

    def _noting(self, batches: Iterator[Batch], start: int) -> Iterator[Batch]:
        """Keep the weights from before each step for the length of it; no copy of tables, which may be large."""
        for now, batch in enumerate(batches, start=start + 1):
            if now - 1 > start and now - 1 in self._damped:
                self._rescue.damper.begin(now - 1, self._damped[now - 1])
            self._rescue.damper.apply(now)
            if self._on_trail(now):
                named = zip(self._names, self._parameters, strict=True)
                self._before = [None if name in self._tables else p.detach().clone() for name, p in named]
            yield batch

    def _on_trail(self, now: int) -> bool:
        return self.step - TRAIL <= now <= self.step

    def _note(self, now: int, batch: Batch, outcome: Step) -> None:
        if now == self.step:
            self._batch = batch
        if now < self.step:
            self.reference.add(now, batch)
            self._keep_state(now)
        if not self._on_trail(now):
            return
        largest = iter(outcome.verdict.largest.tolist())
        self._steps.append(now)
        self._losses.append(outcome.losses.tolist())
        self._gradients.append([math.nan if p.grad is None else next(largest) for p in self._parameters])
        self._updates.append([_ratio(p, old) for p, old in zip(self._parameters, self._before, strict=True)])


def _ratio(parameter: Tensor, before: Tensor | None) -> float:
    """Return ||w - w_before|| / ||w_before||; NaN of a table, of which no copy is kept, and of a weight that is 0."""
    if before is None or not bool(size := before.norm()):
        return math.nan
    return float((parameter.detach() - before).norm() / size)


def _differ(mine: float, recorded: float) -> float:
    """Return the relative difference of two readings; two that are not a number are the same."""
    if mine == recorded or (math.isnan(mine) and math.isnan(recorded)):
        return 0.0
    difference = abs(mine - recorded) / max(abs(recorded), 1e-30)
    return difference if math.isfinite(difference) else math.inf
