"""Progressive metrics of the model, beside the baselines to beat and, on a generated stream, what is attainable.

Shapes: B rows, K tasks.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .evaluate import GLOBAL, Metrics, RunningMean, best
from .metrics import ProgressiveMetrics, as_scores, update_all
from .ranks import ALONE, Ranks
from .schema import Batch, Schema

CAPACITY = 2**18
"""Rows of the model's metrics that are kept exactly; earlier ones are in sums and histograms."""
_OTHERS_CAPACITY = 2**14  # baselines and truth: AUC to 1e-6 is enough, and a checkpoint holds these rows
_MODEL, _TRUTH = "model", "truth"


class Scoreboard:
    """Who ranks how well, by task: over the run, the window and the last day.

    Args:
        schema: What is scored.
        truth: Batches bring their true expectations (`Batch.truth`).
    """

    def __init__(self, schema: Schema, *, truth: bool = False) -> None:
        self._kinds = {name: task.kind for name, task in schema.tasks.items()}
        self._baseline = RunningMean(schema)
        self._bases = (*schema.baseline, GLOBAL)
        others = [*([_TRUTH] if truth else []), *self._bases]
        self._metrics = {_MODEL: ProgressiveMetrics(self._kinds, schema.group is not None, CAPACITY)}
        self._metrics |= {name: ProgressiveMetrics(self._kinds, False, _OTHERS_CAPACITY) for name in others}
        self._rows = 0
        self._sums = {name: {task: [0.0, 0.0] for task in self._kinds} for name in self._metrics}

    def add(self, batch: Batch, scores_BK: Float[Tensor, "batch tasks"]) -> None:
        """Count a batch (on the host) with the scores it was given before it was learned."""
        scores = self._baseline.score(batch) | {_MODEL: scores_BK}
        if _TRUTH in self._metrics and batch.truth is not None:
            scores[_TRUTH] = as_scores(batch.truth, list(self._kinds.values()))
        update_all(self._metrics, scores, batch.labels, batch.weights, batch.group, batch.time)
        self._baseline.learn(batch)
        self._rows += len(batch)

    def close_window(self) -> dict[str, float]:
        """Return the readings of the window that ends here, `auc/click` and so on; empty when it has no rows."""
        if not self._rows:
            return {}
        windows = {name: metrics.window() for name, metrics in self._metrics.items()}
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
        runs = {name: metrics.run() for name, metrics in self._metrics.items()}
        last_day = self._metrics[_MODEL].last_day()
        bases: dict[str, Metrics] = {name: runs[name] for name in self._bases}
        chosen = best(bases)
        found: dict[str, Any] = {}
        for task, kind in self._kinds.items():
            name = chosen[task]
            found[task] = {
                "kind": kind,
                "run": runs[_MODEL][task],
                "last_day": last_day[task],
                "baseline": {"feature": name, **bases[name][task]},
                "baseline_last_day": self._metrics[name].last_day()[task],
            }
            if _TRUTH in runs:
                found[task]["attainable"] = runs[_TRUTH][task]
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return all that was counted, as tensors and plain values."""
        return {
            "metrics": {name: metrics.state_dict() for name, metrics in self._metrics.items()},
            "baseline": self._baseline.state_dict(),
            "rows": self._rows,
            "sums": {name: {task: list(pair) for task, pair in of.items()} for name, of in self._sums.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for name, metrics in self._metrics.items():
            metrics.load_state_dict(state["metrics"][name])
        self._baseline.load_state_dict(state["baseline"])
        self._rows = state["rows"]
        self._sums = {name: {task: list(pair) for task, pair in of.items()} for name, of in state["sums"].items()}


class Pending:
    """Steps whose scores are still on the device, and with several ranks on each of them its rows of a batch.

    Args:
        board: Takes the scores of whole batches; on the first rank alone.
        ranks: Who trains together.
    """

    def __init__(self, board: Scoreboard, ranks: Ranks = ALONE) -> None:
        self._board, self._ranks = board, ranks
        self._held: list[tuple[Batch, Tensor]] = []

    def add(self, batch: Batch, scores_BK: Float[Tensor, "batch tasks"]) -> None:
        """Keep a step: its rows as the reader gave them, and their scores where they lie. No host sync."""
        self._held.append((batch, scores_BK))

    def flush(self) -> None:
        """Bring the scores to the host in one copy, and count them with those of the other ranks' rows."""
        if not self._held:
            return
        batches = [batch if self._ranks.is_alone else _without_inputs(batch) for batch, _ in self._held]
        scores = torch.cat([scores_BK for _, scores_BK in self._held]).float().cpu()
        self._held = []
        each = self._ranks.collect((batches, scores))
        parts = [scores.split([len(batch) for batch in batches]) for batches, scores in each]
        for step in range(len(batches) if each else 0):
            whole = Batch.cat([batches[step] for batches, _ in each])
            self._board.add(whole, torch.cat([scores[step] for scores in parts]))


def _without_inputs(batch: Batch) -> Batch:
    """Return what metrics need of a batch: labels, weights, groups, times, and the ids that baselines go by."""
    none = batch.numbers.new_empty(len(batch), 0)
    return replace(batch, lists=(), numbers=none, positions=none.long(), row=None, share=None)
