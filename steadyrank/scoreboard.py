"""Progressive metrics of the model, beside the baselines to beat and, on a generated stream, what is attainable.

On several ranks each counts an N-th of the rows: those of a group lie with one of them, and what is read is that of
all rows.

Shapes: B rows, S steps, K tasks, F features of baselines.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .baselines import GLOBAL, Labelled, RunningMean, best, deal_means
from .data.ahead import Worker
from .metrics import (
    DAY_US,
    Metrics,
    ProgressiveMetrics,
    ScoredRows,
    Whole,
    as_scores,
    compute_all,
    deal_states,
    rank_of,
)
from .ranks import ALONE, Ranks
from .schema import Batch, Schema

CAPACITY = 2**18
"""Rows of the model's metrics that are kept exactly; earlier ones are in sums and histograms."""
_OTHERS_CAPACITY = 2**14  # baselines and truth: AUC to 1e-6 is enough, and a checkpoint holds these rows
CPU = torch.device("cpu")
_MODEL, _TRUTH = "model", "truth"


class Scoreboard:
    """Who ranks how well, by task: over the run, the window and the last day.

    Args:
        schema: What is scored.
        truth: Batches bring their true expectations (`Batch.truth`).
        ranks: Who trains together. All but `auc_so_far` is then a collective, and gives the same on all of them.
    """

    def __init__(self, schema: Schema, *, truth: bool = False, ranks: Ranks = ALONE) -> None:
        self._kinds = {name: task.kind for name, task in schema.tasks.items()}
        self._baseline, self._ranks, self._grouped = RunningMean(schema, ranks=ranks), ranks, schema.group is not None
        self._bases = (*schema.baseline, GLOBAL)
        others = [*([_TRUTH] if truth else []), *self._bases]
        self._metrics = {_MODEL: ProgressiveMetrics(self._kinds, self._grouped, CAPACITY)}
        self._metrics |= {name: ProgressiveMetrics(self._kinds, False, _OTHERS_CAPACITY) for name in others}
        self._rows = 0
        self._sums = {name: {task: [0.0, 0.0] for task in self._kinds} for name in self._metrics}

    def add(self, batch: Batch, scores_BK: Float[Tensor, "batch tasks"]) -> None:
        """Count a batch (on the host) with the scores it was given before it was learned."""
        self.add_steps([batch], [scores_BK])

    def add_steps(self, batches: Sequence[Batch], scores: Sequence[Float[Tensor, "_ tasks"]]) -> None:
        """Count batches, one after the other, each with the scores that it was given before it was learned."""
        steps = [self._step(batch, scores_BK) for batch, scores_BK in zip(batches, scores, strict=True)]
        wholes, sums_S2K = self._agree(steps)
        if self._grouped:
            steps = _by_group(steps, self._ranks)
        of_bases = self._baseline.meet([each.labelled for each in steps], sums_S2K)
        for each, whole, of_base in zip(steps, wholes, of_bases, strict=True):
            labels_BK, weights_BK = each.labelled.labels_BK, each.labelled.weights_BK
            rows = ScoredRows.copy_of(each.scores, labels_BK, weights_BK, each.group, len(self._kinds))
            day_B = each.time.numpy() // DAY_US
            others = of_base | ({} if each.truth is None else {_TRUTH: each.truth})
            self._metrics[_MODEL].add(rows, day_B, whole)
            for name in self._metrics.keys() & others.keys():
                self._metrics[name].add(rows.rescored(others[name]), day_B, whole)
            self._rows += whole.rows

    def _step(self, batch: Batch, scores_BK: Tensor) -> "_Step":
        truth = None if batch.truth is None or _TRUTH not in self._metrics else batch.truth
        return _Step(
            scores=scores_BK,
            labelled=self._baseline.labelled(batch),
            truth=None if truth is None else as_scores(truth, list(self._kinds.values())),
            group=batch.group,
            time=batch.time,
        )

    def _agree(self, steps: Sequence["_Step"]) -> tuple[list[Whole], Any]:
        """Return what each step's batch is as a whole, and the sums of its labels and weights [S, 2 K]."""
        here = torch.tensor([Whole.of(step.time.numpy() // DAY_US) for step in steps])
        rows_RS, last_RS, last_rows_RS = self._ranks.gather(here).unbind(2)
        last_S = last_RS.amax(0)
        last_rows_S = torch.where(last_RS == last_S, last_rows_RS, 0).sum(0)
        wholes = [Whole(*each) for each in torch.stack([rows_RS.sum(0), last_S, last_rows_S], 1).tolist()]
        sums_S2K = torch.from_numpy(np.array([step.labelled.sums.sum(0) for step in steps]))
        return wholes, self._ranks.gather(sums_S2K).numpy().sum(0)

    def close_window(self) -> dict[str, float]:
        """Return the readings of the window that ends here, `auc/click` and so on; empty when it has no rows."""
        if not self._rows:
            return {}
        windows = self._compute("window")
        for metrics in self._metrics.values():
            metrics.parts()["window"].reset()
        row = {f"{metric}/{task}": value for task, of in windows[_MODEL].items() for metric, value in of.items()}
        self._add_window(windows)
        means = {name: self._means(name) for name in self._bases}
        for task, base in best(means).items():
            metric = self._metric(task)
            row[f"baseline_{metric}/{task}"] = windows[base][task][metric]
            if _TRUTH in windows:
                row[f"attainable_{metric}/{task}"] = windows[_TRUTH][task][metric]
        self._rows = 0
        return row

    def auc_so_far(self) -> dict[str, float]:
        """Return each binary task's mean AUC over the closed windows, weighted by their rows; NaN before the first."""
        return {task: of["auc"] for task, of in self._means(_MODEL).items() if "auc" in of}

    def _metric(self, task: str) -> str:
        return "auc" if self._kinds[task] == "binary" else "rmse"

    def _add_window(self, windows: dict[str, Metrics]) -> None:
        for name, of in windows.items():
            for task in self._kinds:
                value = of[task][self._metric(task)]
                if not math.isnan(value):  # one class only says nothing of the ranking
                    self._sums[name][task][0] += value * self._rows
                    self._sums[name][task][1] += self._rows

    def _means(self, name: str) -> Metrics:
        sums = self._sums[name]
        return {task: {self._metric(task): total / rows if rows else math.nan} for task, (total, rows) in sums.items()}

    def summary(self) -> dict[str, Any]:
        """Return, by task: its kind and the metrics of run, last day, best baseline and, if known, the truth."""
        runs, last_days = self._compute("run"), self._compute("last_day")
        bases: dict[str, Metrics] = {name: runs[name] for name in self._bases}
        chosen = best(bases)
        found: dict[str, Any] = {}
        for task, kind in self._kinds.items():
            name = chosen[task]
            found[task] = {
                "kind": kind,
                "run": runs[_MODEL][task],
                "last_day": last_days[_MODEL][task],
                "baseline": {"feature": name, **bases[name][task]},
                "baseline_last_day": last_days[name][task],
            }
            if _TRUTH in runs:
                found[task]["attainable"] = runs[_TRUTH][task]
        return found

    def _compute(self, part: str) -> dict[str, Metrics]:
        return compute_all({name: metrics.parts()[part] for name, metrics in self._metrics.items()}, self._ranks)

    def state_dict(self) -> dict[str, Any]:
        """Return all that was counted, as tensors and plain values; on several ranks the first has that of all."""
        own = {
            "metrics": {name: metrics.state_dict() for name, metrics in self._metrics.items()},
            "baseline": self._baseline.state_dict(),
            "rows": self._rows,
            "sums": {name: {task: list(pair) for task, pair in of.items()} for name, of in self._sums.items()},
        }
        return own if self._ranks.is_alone else {"ranks": self._ranks.collect(own)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, which the first rank has; it may come from another number of ranks."""
        states: list[Mapping[str, Any]] = []
        if self._ranks.is_first:
            states = state.get("ranks", [state])
            states = states if len(states) == self._ranks.size else _deal(states, self._ranks.size)
        own = self._ranks.hand_out(states)
        for name, metrics in self._metrics.items():
            metrics.load_state_dict(own["metrics"][name])
        self._baseline.load_state_dict(own["baseline"])
        self._rows = own["rows"]
        self._sums = {name: {task: list(pair) for task, pair in of.items()} for name, of in own["sums"].items()}


class _Step(NamedTuple):
    """Rows of a step as they are counted."""

    scores: Tensor
    labelled: Labelled
    truth: Tensor | None
    group: Tensor
    time: Tensor


def _by_group(steps: list[_Step], ranks: Ranks) -> list[_Step]:
    """Bring all rows of a group to one rank; within each step they lie in the order of the batch as a whole."""
    if ranks.is_alone:
        return steps
    owner_N = rank_of(torch.cat([step.group for step in steps]), ranks.size)
    floats, integers = [], []
    for number, step in enumerate(steps):
        held = step.labelled
        columns = (step.scores, held.labels_BK, held.weights_BK, step.truth)
        floats.append(torch.cat([column for column in columns if column is not None], 1))
        marks_B3 = torch.stack([torch.full_like(step.time, number), step.group, step.time], 1)
        integers.append(torch.cat([marks_B3, held.rows_BF], 1))
    floats_N, integers_N = ranks.route([torch.cat(floats), torch.cat(integers)], owner_N)
    step_N = integers_N[:, 0]
    order, counts = step_N.argsort(stable=True), step_N.bincount(minlength=len(steps)).tolist()
    found = []
    for here in order.split(counts):
        scores_BK, labels_BK, weights_BK, *truth = floats_N[here].split(steps[0].scores.shape[1], 1)
        _, group_B, time_B = integers_N[here, :3].unbind(1)
        labelled = Labelled(integers_N[here, 3:], labels_BK, weights_BK)
        found.append(_Step(scores_BK, labelled, truth[0] if truth else None, group_B, time_B))
    return found


def _deal(states: Sequence[Mapping[str, Any]], size: int) -> list[Mapping[str, Any]]:
    """Return what each of `size` ranks goes on from, of the states of another number of them."""
    metrics = {name: deal_states([state["metrics"][name] for state in states], size) for name in states[0]["metrics"]}
    means = deal_means([state["baseline"] for state in states], size)
    return [
        {
            **states[0],
            "metrics": {name: dealt[rank] for name, dealt in metrics.items()},
            "baseline": means[rank],
        }
        for rank in range(size)
    ]


def counts_beside(device: torch.device) -> bool:
    """Say whether metrics are counted in a thread beside the steps: on a CPU it would take a core from them."""
    return device.type != "cpu"


class Pending:
    """Steps whose scores are still on the device, or are being counted.

    Args:
        schema: What is scored.
        truth: As for `Scoreboard`.
        ranks: Who trains together.
        device: Where the scores are made.
    """

    def __init__(self, schema: Schema, *, truth: bool = False, ranks: Ranks = ALONE,
                 device: torch.device = CPU) -> None:  # fmt: skip
        beside = counts_beside(device)
        self._worker = Worker("metrics") if beside else None
        # What a thread exchanges must not meet the exchange of the steps.
        self.board = Scoreboard(schema, truth=truth, ranks=ranks.another() if beside else ranks)
        """What is counted, perhaps not all of it yet: see `settle`."""
        self._held: list[tuple[Batch, Tensor]] = []
        self._wait: Callable[[], None] = lambda: None

    def add(self, batch: Batch, scores_BK: Float[Tensor, "batch tasks"]) -> None:
        """Keep a step: its rows as the reader gave them, and their scores where they lie. No host sync."""
        self._held.append((batch, scores_BK))

    def flush(self) -> None:
        """Bring the scores to the host in one copy, and count them; in a thread, begin to."""
        if not self._held:
            return
        batches = [batch for batch, _ in self._held]
        scores_NK = torch.cat([scores_BK for _, scores_BK in self._held]).float().cpu()
        self._held = []
        count = partial(self.board.add_steps, batches, scores_NK.split([len(batch) for batch in batches]))
        if self._worker is None:
            return count()
        self.settle()  # no more than one flush is kept
        self._wait = self._worker.begin(count)

    def settle(self) -> Scoreboard:
        """Return the board once all that was flushed is counted."""
        wait, self._wait = self._wait, lambda: None
        wait()
        return self.board

    def close(self) -> None:
        """End the thread."""
        if self._worker is not None:
            self._worker.close()
