"""Metrics of all tasks over a stream of batches: whole run, window and day.

On several ranks each counts rows of its own: `compute_all` gives the metrics of all of them.

Shapes: B rows of a batch, N rows kept, K tasks, S sums, M streams.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..ranks import ALONE, Ranks
from .functions import (
    BINS,
    SUMS,
    TaskKind,
    add_to_bins,
    auc_sums,
    binary_values,
    iso_day,
    merge_sums,
    number_groups,
    ratio,
    regression_values,
    task_sums,
)
from .several import Column, aucs

Metrics = dict[str, dict[str, float]]
"""`{task: {metric: value}}`, as from `TaskMetrics.compute`."""
CAPACITY = 2**20
"""Rows that `TaskMetrics` keeps exactly before it folds them into sums and histograms."""
DAY_US = 86_400_000_000
"""Microseconds of a day."""
_NO_DAY = -(2**62)
_SAVED = ("scores", "labels", "weights", "groups")
"""Names of the kept rows' columns in a state, [N, K] and [N]."""


class Whole(NamedTuple):
    """What is known of a batch as a whole, whichever rows of it lie here."""

    rows: int
    last_day: int
    """In days since 1970."""
    last_day_rows: int

    @staticmethod
    def of(day_B: Any) -> "Whole":
        """Return it for a batch of which all rows lie here; without any, its day is before all others."""
        last = int(day_B.max(initial=_NO_DAY))
        return Whole(len(day_B), last, int((day_B == last).sum()))


class ScoredRows(NamedTuple):
    """Rows as they came, never written to, so that several `TaskMetrics` may share them."""

    scores_KN: Any
    labels_KN: Any
    weights_KN: Any
    groups_N: Any

    @staticmethod
    def copy_of(scores_BK: Tensor, labels_BK: Tensor, weights_BK: Tensor, groups_B: Tensor, tasks: int) -> "ScoredRows":
        """Return a copy on the host.

        Raises:
            ConfigError: The shapes do not fit each other or the number of tasks.
        """
        shapes = [tuple(t.shape) for t in (scores_BK, labels_BK, weights_BK, groups_B)]
        expected = (len(groups_B), tasks)
        if shapes != [expected, expected, expected, expected[:1]]:
            raise ConfigError(
                f"expected scores, labels and weights of shape [rows, {tasks}] and groups of shape [rows], got "
                f"{shapes}; give the model's output for the very batch that the labels belong to"
            )
        groups_N = groups_B.to("cpu", torch.int64, copy=True).numpy()
        return ScoredRows(_copy(scores_BK), _copy(labels_BK), _copy(weights_BK), groups_N)

    def rescored(self, scores_BK: Tensor) -> "ScoredRows":
        """Return the same rows with other scores."""
        if tuple(scores_BK.shape) != self.scores_KN.shape[::-1]:
            raise ConfigError(f"expected scores of shape {self.scores_KN.shape[::-1]}, got {tuple(scores_BK.shape)}")
        return self._replace(scores_KN=_copy(scores_BK))

    @staticmethod
    def cat(chunks: Sequence["ScoredRows"], tasks: int) -> "ScoredRows":
        """Return the rows of all chunks, perhaps none."""
        empty = np.empty((tasks, 0), np.float32)
        chunks = [ScoredRows(empty, empty, empty, np.empty(0, np.int64)), *chunks]
        return ScoredRows(*(np.concatenate(parts, axis=-1) for parts in zip(*chunks, strict=True)))

    def take(self, index: Any) -> "ScoredRows":
        """Return the rows in `index`, or those marked in it."""
        return ScoredRows(*(part[..., index] for part in self))

    def by_task(self) -> list[tuple[Any, Any, Any]]:
        """Return scores, labels and weights of each task."""
        return list(zip(self.scores_KN, self.labels_KN, self.weights_KN, strict=True))


def _copy(part_BK: Tensor) -> Any:
    """Return a copy whose tasks lie one after the other: they are looked at one by one."""
    return np.array(part_BK.detach().cpu().float().numpy().T, order="C")


class TaskMetrics:
    """The metrics of all tasks over the batches seen since the last reset.

    A call of `update` copies the batch and no more. The rows are kept as they are (float32) up to `capacity`, so that
    every metric is exact until then. When that many are there, they are folded: log loss, normalised entropy,
    calibration, RMSE and MAE into float64 sums [S, K], which loses nothing; AUC into a histogram of 2**18 bins of the
    score, whose scores of one bin (relative width 1/4096, for magnitudes from 2**-12 to 2**20) count as tied; GAUC into
    a weighted running mean, so that a group's rows are ranked only against those of the same `capacity` rows. Memory is
    `capacity * (12 K + 8)` bytes, and 4 MiB for each binary task after the first fold.

    Args:
        kinds: the tasks in the order of the columns, `{name: "binary" or "regression"}`.
        grouped: whether groups mean something; without, GAUC is left out.
        capacity: rows kept exactly, 1 or more.

    >>> metrics = TaskMetrics({"click": "binary"}, grouped=False)
    >>> one = torch.ones(4, 1)
    >>> metrics.update(torch.tensor([[-1.0], [0.0], [0.0], [2.0]]), torch.tensor([[0.0], [0], [1], [1]]), one,
    ...                torch.zeros(4, dtype=torch.int64))
    >>> metrics.compute()["click"]["auc"]
    0.875
    """

    def __init__(self, kinds: Mapping[str, TaskKind], grouped: bool = True, capacity: int = CAPACITY) -> None:
        if capacity < 1:
            raise ConfigError(f"expected a capacity of 1 row or more, got {capacity}")
        self.kinds = dict(kinds)
        self.grouped = grouped
        self.capacity = capacity
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self._chunks: list[ScoredRows] = []
        self._kept = 0
        self._sums_SK = np.zeros((len(SUMS), len(self.kinds)))
        self._gauc_2K = np.zeros((2, len(self.kinds)))
        self._bins: dict[str, Any] = {}

    def update(
        self,
        scores_BK: Float[Tensor, "batch tasks"],
        labels_BK: Float[Tensor, "batch tasks"],
        weights_BK: Float[Tensor, "batch tasks"],
        groups_B: Int64[Tensor, " batch"],
    ) -> None:
        """Add the rows of a batch.

        Args:
            scores_BK: the model's raw output: logits of binary tasks, regressions in the units that it learns.
            labels_BK: as in `Batch.labels`.
            weights_BK: as in `Batch.weights`; 0 masks.
            groups_B: as in `Batch.group`.

        Raises:
            ConfigError: the shapes do not fit each other or the number of tasks.
        """
        self.add(ScoredRows.copy_of(scores_BK, labels_BK, weights_BK, groups_B, len(self.kinds)))

    def add(self, rows: ScoredRows, whole: int | None = None) -> None:
        """Add rows that are not copied again; `whole` says how many they are with those of other ranks."""
        self._chunks.append(rows)
        self._kept += len(rows.groups_N) if whole is None else whole
        if self._kept >= self.capacity:
            self._fold()

    def merge(self, other: "TaskMetrics") -> None:
        """Add the rows that `other`, of the same tasks, has seen.

        Raises:
            ConfigError: the tasks differ.
        """
        if other._columns() != self._columns():
            raise ConfigError(
                f"expected metrics of {self._columns()}, got metrics of {other._columns()}; merge those of one schema"
            )
        self._sums_SK = merge_sums(self._sums_SK, other._sums_SK)
        self._gauc_2K = self._gauc_2K + other._gauc_2K
        for name, bins in other._bins.items():
            self._bins[name] = self._bins[name] + bins if name in self._bins else bins.copy()
        for rows in list(other._chunks):
            self.add(rows)

    def compute(self) -> Metrics:
        """Return `{task: {metric: value}}`.

        A binary task has `auc`, `gauc` (if grouped), `log_loss` and `normalised_entropy`; a regression `rmse`,
        `normalised_rmse` and `mae`; both `calibration`, `rows` (that are not masked) and `weight`; a binary task also
        `positives`, the weight of its labels of 1.
        """
        return compute_all({"": self})[""]

    def state_dict(self) -> dict[str, Any]:
        """Return all that was seen, as tensors and plain values."""
        rows = ScoredRows.cat(self._chunks, len(self.kinds))
        return {
            "columns": self._columns(),
            "sums": torch.from_numpy(self._sums_SK.copy()),
            "gauc": torch.from_numpy(self._gauc_2K.copy()),
            "bins": {name: _pack_bins(bins) for name, bins in self._bins.items()},
            "kept": self._kept,
            "rows": {name: torch.from_numpy(part.T.copy()) for name, part in zip(_SAVED, rows, strict=True)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; with the same capacity as where it was saved, every later value is the same too.

        Raises:
            CheckpointError: the state belongs to other tasks.
        """
        if state["columns"] != self._columns():
            raise CheckpointError(
                f"expected saved metrics of {self._columns()}, found those of {state['columns']}; resume with the "
                f"schema that the run was started with"
            )
        self._sums_SK = state["sums"].numpy().copy()
        self._gauc_2K = state["gauc"].numpy().copy()
        self._bins = {name: _unpack_bins(packed) for name, packed in state["bins"].items()}
        rows = ScoredRows(*(np.array(state["rows"][name].numpy().T, order="C") for name in _SAVED))
        self._chunks, self._kept = [rows], state.get("kept", len(rows.groups_N))

    def _columns(self) -> list[str]:
        """Return what each column means, for comparison with another's."""
        return [f"{name} ({kind}{', grouped' if self.grouped else ''})" for name, kind in self.kinds.items()]

    def _fold(self) -> None:
        tasks, self._sums_SK, self._gauc_2K = self._joined()
        for (name, kind), columns in zip(self.kinds.items(), tasks, strict=True):
            if kind == "binary":
                add_to_bins(self._bins.setdefault(name, np.zeros((2, BINS))), *columns)
        self._chunks, self._kept = [], 0

    def _joined(self) -> tuple[list[tuple[Any, Any, Any]], Any, Any]:
        """Return the columns of each task, and the sums [S, K] and those behind GAUC [2, K] with their rows."""
        rows = ScoredRows.cat(self._chunks, len(self.kinds))
        tasks = rows.by_task()
        sums = [task_sums(kind, *columns) for kind, columns in zip(self.kinds.values(), tasks, strict=True)]
        found_2K = np.zeros_like(self._gauc_2K)
        if self.grouped:
            groups = number_groups(rows.groups_N)  # once, rather than for each task
            for k, kind in enumerate(self.kinds.values()):
                if kind == "binary":
                    found_2K[:, k] = auc_sums(*tasks[k], groups)
        return tasks, merge_sums(self._sums_SK, np.stack(sums, axis=1)), self._gauc_2K + found_2K

    def _columns_of(self, tasks: list[tuple[Any, Any, Any]]) -> dict[str, Column]:
        """Return what AUC is made of, by binary task."""
        named = zip(self.kinds.items(), tasks, strict=True)
        return {name: Column(*rows, self._bins.get(name)) for (name, kind), rows in named if kind == "binary"}

    def _values(self, sums_SK: Any, gauc_2K: Any, auc: Mapping[str, float]) -> Metrics:
        found: Metrics = {}
        for k, (name, kind) in enumerate(self.kinds.items()):
            if kind == "regression":
                found[name] = regression_values(sums_SK[:, k])
                continue
            order = {"auc": auc[name]}
            if self.grouped:
                order["gauc"] = ratio(float(gauc_2K[0, k]), float(gauc_2K[1, k]))
            found[name] = {**order, **binary_values(sums_SK[:, k])}
        return found


def compute_all(metrics: Mapping[str, TaskMetrics], ranks: Ranks = ALONE) -> dict[str, Metrics]:
    """Return what each of several metrics computes, over the rows of all ranks. A collective.

    On several ranks the rows of one group lie on one of them, and all were told of the same whole batches. GAUC and all
    that follows from sums is then that of one process, but for the order of float64 sums; AUC is exactly that.

    Args:
        metrics: by name; of any tasks.
        ranks: who has counted rows.
    """
    if not metrics:
        return {}
    joined = {name: each._joined() for name, each in metrics.items()}
    columns = {
        (name, task): column
        for name, each in metrics.items()
        for task, column in each._columns_of(joined[name][0]).items()
    }
    auc = dict(zip(columns, aucs(list(columns.values()), ranks), strict=True))
    found = {}
    for (name, each), parts in zip(metrics.items(), _gather_sums([x[1:] for x in joined.values()], ranks), strict=True):
        found[name] = each._values(*parts, {task: auc[name, task] for task in each.kinds if (name, task) in auc})
    return found


def _gather_sums(parts: Sequence[tuple[Any, Any]], ranks: Ranks) -> list[tuple[Any, Any]]:
    """Return the sums [S, K] and those behind GAUC [2, K] of all ranks."""
    flat = torch.cat([torch.from_numpy(np.concatenate(pair).reshape(-1)) for pair in parts])
    sizes = [sum(x.size for x in pair) for pair in parts]
    found = []
    for (sums_SK, _), each in zip(parts, ranks.gather(flat).split(sizes, 1), strict=True):
        by_rank = each.numpy().reshape(ranks.size, -1, sums_SK.shape[1])
        sums, gauc = by_rank[:, : len(SUMS)], by_rank[:, len(SUMS) :]
        found.append((reduce(merge_sums, sums), gauc.sum(0)))
    return found


def _pack_bins(bins_2N: Any) -> dict[str, Tensor]:
    """Keep the bins that are not empty: a few per cent of them, in a checkpoint that is written often."""
    filled = np.flatnonzero(bins_2N.any(axis=0))
    return {"filled": torch.from_numpy(filled), "weights": torch.from_numpy(bins_2N[:, filled])}


def _unpack_bins(packed: Mapping[str, Tensor]) -> Any:
    bins_2N = np.zeros((2, BINS))
    bins_2N[:, packed["filled"].numpy()] = packed["weights"].numpy()
    return bins_2N


class ProgressiveMetrics:
    """The metrics of the whole run, of the window since the last reading, and of the last UTC day.

    A day is `time_us // 86_400_000_000`. The last day is the latest that any row so far belonged to; when a later one
    comes it starts anew, and rows of earlier days (a shuffled log) no longer count there.

    Args:
        kinds, grouped, capacity: as for `TaskMetrics`, of which this holds three; they share the rows they keep.
    """

    def __init__(self, kinds: Mapping[str, TaskKind], grouped: bool = True, capacity: int = CAPACITY) -> None:
        self.kinds = dict(kinds)
        self._run, self._window, self._last_day = (TaskMetrics(kinds, grouped, capacity) for _ in range(3))
        self._day: int | None = None

    @property
    def day(self) -> str | None:
        """The last day, as an ISO date; None before the first row."""
        return None if self._day is None else iso_day(self._day)

    def update(
        self,
        scores_BK: Float[Tensor, "batch tasks"],
        labels_BK: Float[Tensor, "batch tasks"],
        weights_BK: Float[Tensor, "batch tasks"],
        groups_B: Int64[Tensor, " batch"],
        time_us_B: Int64[Tensor, " batch"],
    ) -> None:
        """Add the rows of a batch; its days may differ from row to row.

        Args:
            scores_BK, labels_BK, weights_BK, groups_B: as for `TaskMetrics.update`.
            time_us_B: microseconds since 1970, UTC.
        """
        rows = ScoredRows.copy_of(scores_BK, labels_BK, weights_BK, groups_B, len(self.kinds))
        day_B = time_us_B.cpu().numpy() // DAY_US
        if len(day_B):
            self.add(rows, day_B, Whole.of(day_B))

    def add(self, rows: ScoredRows, day_B: Any, whole: Whole) -> None:
        """Add rows that are not copied again.

        Args:
            rows: those of a batch that lie here, perhaps none.
            day_B: the day of each.
            whole: what the batch is with those on other ranks.
        """
        self._run.add(rows, whole.rows)
        self._window.add(rows, whole.rows)
        if self._day is None or whole.last_day > self._day:
            self._day = whole.last_day
            self._last_day.reset()
        if whole.last_day == self._day:
            today_B = day_B == self._day
            self._last_day.add(rows if today_B.all() else rows.take(today_B), whole.last_day_rows)

    def parts(self) -> dict[str, TaskMetrics]:
        """Return the metrics of the `run`, the `window` and the `last_day`, which go on counting."""
        return {"run": self._run, "window": self._window, "last_day": self._last_day}

    def window(self) -> Metrics:
        """Return the metrics of the rows since the last call, and begin the next window."""
        found = self._window.compute()
        self._window.reset()
        return found

    def run(self) -> Metrics:
        """Return the metrics of all rows."""
        return self._run.compute()

    def last_day(self) -> Metrics:
        """Return the metrics of the rows of the last day seen so far (`day`)."""
        return self._last_day.compute()

    def state_dict(self) -> dict[str, Any]:
        """Return all that was seen, as tensors and plain values."""
        return {"day": self._day, **{name: part.state_dict() for name, part in self.parts().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            CheckpointError: the state belongs to other tasks.
        """
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self._day = state["day"]


def deal_states(states: Sequence[Mapping[str, Any]], size: int) -> list[dict[str, Any]]:
    """Return what each of `size` ranks goes on from, of the states of `ProgressiveMetrics` on another number of them.

    Kept rows go to the rank of their group, as they would have come; all sums to the first.
    """
    names = [name for name in states[0] if name != "day"]
    dealt = {name: _deal_task_states([state[name] for state in states], size) for name in names}
    return [{"day": states[0]["day"], **{name: dealt[name][rank] for name in names}} for rank in range(size)]


def _deal_task_states(states: Sequence[Mapping[str, Any]], size: int) -> list[dict[str, Any]]:
    sums_SK = reduce(merge_sums, [state["sums"].numpy() for state in states])
    gauc_2K = sum(state["gauc"] for state in states)
    bins = {name: sum(_unpack_bins(state["bins"][name]) for state in states) for name in states[0]["bins"]}
    rows = {name: torch.cat([state["rows"][name] for state in states]) for name in _SAVED}
    owner_N = rank_of(rows["groups"], size)
    kept = states[0].get("kept", len(owner_N))  # of all ranks; states of before know of one process only
    found = []
    for rank in range(size):
        first = 1.0 if rank == 0 else 0.0
        found.append(
            {
                **states[0],
                "kept": kept,
                "sums": torch.from_numpy(sums_SK * first),
                "gauc": gauc_2K * first,
                # Bins say on every rank that the rows were folded.
                "bins": {name: _pack_bins(held * first) for name, held in bins.items()},
                "rows": {name: part[owner_N == rank] for name, part in rows.items()},
            }
        )
    return found


def rank_of(group_B: Int64[Tensor, " batch"], size: int) -> Int64[Tensor, " batch"]:
    """Return which rank counts the rows of each group.

    Where ids are taken as they are, id i has row i + 1 of its table: a group's mean then lies with its rows.

    >>> rank_of(torch.tensor([7, -1, 4]), 4)
    tensor([0, 0, 1])
    """
    return (group_B + 1).remainder(size)
