"""Score Batches with a frozen model, and the baselines that a model has to beat.

Shapes: B rows of a batch, K tasks, R rows of a feature's table.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from .errors import CheckpointError, ConfigError, check_known
from .metrics import CAPACITY, DAY_US, TaskMetrics, as_scores, iso_day
from .schema import Batch, Schema

Metrics = dict[str, dict[str, float]]
"""`{task: {metric: value}}`, as from `TaskMetrics.compute`."""

GLOBAL = "global"
"""Name of the baseline that knows no feature: the running mean of each label over all rows."""
SCORE_ROWS = 1024
"""Rows that a CPU scores at once: what the layers leave of them fits its caches, and that of a whole piece does not."""
_MAX_SLICES = 10_000  # each holds metrics of its own


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    tasks: Metrics
    """Metrics by task, over all rows."""
    days: dict[str, Metrics]
    """The same by UTC day (ISO date), in order."""
    rows: int
    """Rows scored, masked ones too."""
    slices: dict[int, Metrics] = field(default_factory=dict)
    """The same by the value of `slice_by`: the row in the feature's own table, 0 for the null id."""
    attainable: Metrics | None = None
    """Generated streams only: the metrics of the true values themselves."""


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    schema: Schema,
    device: torch.device | str = "cpu",
    slice_by: str | None = None,
    capacity: int = CAPACITY,
) -> Evaluation:
    """Score `batches` with the model as it is; its weights and its mode (training or not) stay as they were.

    Args:
        model: called as `model(batch)` in evaluation mode; returns raw outputs [B, K].
        batches: rows in any order, also none.
        schema: of the batches.
        device: where the model lies; batches are moved to it.
        slice_by: an id feature by whose values the metrics are split too.
        capacity: rows kept exactly by each day, slice and the whole; see `TaskMetrics`.

    Raises:
        ConfigError: `slice_by` is no id feature or has too many values, or the model's output is not [B, K].
    """
    first, column = _slicing(schema, slice_by)
    whole, truth = (_task_metrics(schema, capacity) for _ in range(2))
    days: dict[int, TaskMetrics] = {}
    slices: dict[int, TaskMetrics] = {}
    rows, with_truth = 0, False
    for batch in batches:
        scores_BK = score(model, batch, len(schema.tasks), device)
        rows += len(batch)
        parts = (scores_BK, batch.labels, batch.weights, batch.group)
        whole.update(*parts)
        if batch.truth is not None:
            with_truth = True
            truth.update(as_scores(batch.truth, [task.kind for task in schema.tasks.values()]), *parts[1:])
        for day, its_rows in _split(batch.time.div(DAY_US, rounding_mode="floor")):
            days.setdefault(day, _task_metrics(schema, capacity)).update(*(part[its_rows] for part in parts))
        if slice_by is not None:
            for value, its_rows in _split(batch.ids[:, column] - first):
                slices.setdefault(value, _task_metrics(schema, capacity)).update(*(part[its_rows] for part in parts))
    return Evaluation(
        tasks=whole.compute(),
        days={iso_day(day): days[day].compute() for day in sorted(days)},
        rows=rows,
        slices={value: slices[value].compute() for value in sorted(slices)},
        attainable=truth.compute() if with_truth else None,
    )


class RunningMean:
    """The baseline to beat: each id's running mean label, shrunk towards that of all rows.

    `m_r = (sum_r w y + prior * m) / (sum_r w + prior)`, over the rows learned so far whose id is r; `m` is the same
    over all rows, with one pseudo-row of 1/2 (binary) or 0 (regression), so that it is defined from the start.
    Memory is one float64 table [R, 2 K] for each feature, sums beside weights: 16 R K bytes.

    Args:
        schema: of the batches.
        features: id features that each give a baseline; `schema.baseline` when left out.
        prior: pseudo-rows, above 0: an id seen in as many rows is trusted as much as the mean of all. The best value is
            the variance of a label given its id over the variance of the ids' means, about 9 for rates of 0.3 that
            spread by 0.15 and about 50 for rates of 0.05 that spread by 0.03; the default lies between.

    Raises:
        ConfigError: a feature is not a one-valued id feature, is called "global", or the prior is not positive.
    """

    def __init__(self, schema: Schema, features: Sequence[str] | None = None, prior: float = 20.0) -> None:
        if not prior > 0:
            raise ConfigError(f"expected a prior above 0 pseudo-rows, got {prior}; 20 is the default")
        self._columns: dict[str, tuple[int, int]] = {}
        for name in schema.baseline if features is None else features:
            check_known(name, schema.id_features, "id feature")
            if name == GLOBAL:
                raise ConfigError(f"baseline: '{GLOBAL}' names the mean of all rows; rename that feature")
            self._columns[name] = (list(schema.id_features).index(name), schema.slot(name).start)
        self._prior = prior
        self._binary_K = torch.tensor([task.kind == "binary" for task in schema.tasks.values()])
        self._pseudo_K = 0.5 * self._binary_K.double().numpy()
        rows = {GLOBAL: 1, **{name: schema.slot(name).rows for name in self._columns}}
        # NumPy's, since half of what so few numbers take is the overhead of a call, and torch has four times as much.
        self._tables = {name: np.zeros((count, 2 * len(schema.tasks))) for name, count in rows.items()}

    def score(self, batch: Batch) -> dict[str, Float[Tensor, "batch tasks"]]:
        """Return the scores of each feature's means and of the `"global"` one, from the rows learned before.

        Binary tasks as logits of the mean (kept 1e-7 away from 0 and 1), regressions as the mean.
        """
        tasks = len(self._pseudo_K)
        (global_2K,) = self._tables[GLOBAL]
        mean_K = (global_2K[:tasks] + self._pseudo_K) / (global_2K[tasks:] + 1)
        scores = {GLOBAL: self._as_scores(mean_K[None]).expand(len(batch), -1)}
        for name in self._columns:
            known_B2K = self._tables[name].take(self._row_of(name, batch), axis=0)
            mean_BK = (known_B2K[:, :tasks] + self._prior * mean_K) / (known_B2K[:, tasks:] + self._prior)
            scores[name] = self._as_scores(mean_BK)
        return scores

    def learn(self, batch: Batch) -> None:
        """Add the labels of a batch to the means."""
        weights_BK, labels_BK = batch.weights.numpy(), batch.labels.numpy()
        kept_BK = weights_BK > 0
        counts_BK = np.where(kept_BK, weights_BK, 0).astype(np.float64)
        sums_BK = np.multiply(counts_BK, labels_BK, where=kept_BK, out=np.zeros_like(counts_BK))
        added_B2K = np.concatenate([sums_BK, counts_BK], axis=1)
        for name, table_R2K in self._tables.items():
            if name == GLOBAL:
                table_R2K += added_B2K.sum(0)
                continue
            # Flat, since NumPy adds the rows of a matrix one by one but the elements of a vector in one loop.
            cell_B2K = self._row_of(name, batch)[:, None] * table_R2K.shape[1] + np.arange(table_R2K.shape[1])
            np.add.at(table_R2K.reshape(-1), cell_B2K.reshape(-1), added_B2K.reshape(-1))

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and the weights of every baseline, `{name: [R, 2 K]}`."""
        return {name: torch.from_numpy(table_R2K.copy()) for name, table_R2K in self._tables.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            CheckpointError: the state has other features, tables or tasks.
        """
        expected, found = ({n: tuple(t.shape) for n, t in tables.items()} for tables in (self._tables, state))
        if found != expected:
            raise CheckpointError(
                f"expected running means of {expected} (name: rows, twice the tasks), found {found}; resume with the "
                f"schema that the run was started with"
            )
        for name, table_R2K in self._tables.items():
            table_R2K[:] = state[name].numpy()

    def _row_of(self, name: str, batch: Batch) -> Any:
        column, start = self._columns[name]
        return batch.ids.numpy()[:, column] - start

    def _as_scores(self, mean: Any) -> Float[Tensor, "batch tasks"]:
        mean_BK = torch.from_numpy(mean)
        return torch.where(self._binary_K, torch.logit(mean_BK, eps=1e-7), mean_BK).float()


def best(baselines: Mapping[str, Metrics]) -> dict[str, str]:
    """Return the name of the best baseline for each task: highest AUC if binary, lowest RMSE if a regression.

    A NaN never wins against a number; of equals the first named does.

    >>> best({"user": {"click": {"auc": 0.6}}, "item": {"click": {"auc": 0.7}}})
    {'click': 'item'}
    """
    found: dict[str, str] = {}
    for task in next(iter(baselines.values()), {}):
        values = {name: _goodness(metrics[task]) for name, metrics in baselines.items()}
        found[task] = max(values, key=lambda name: values[name])
    return found


def _goodness(values: Mapping[str, float]) -> float:
    value = values["auc"] if "auc" in values else -values["rmse"]
    return value if value == value else -float("inf")


def _task_metrics(schema: Schema, capacity: int) -> TaskMetrics:
    kinds = {name: task.kind for name, task in schema.tasks.items()}
    return TaskMetrics(kinds, grouped=schema.group is not None, capacity=capacity)


def _slicing(schema: Schema, slice_by: str | None) -> tuple[int, int]:
    """Return the first table row and the column in `Batch.ids` of the feature to slice by."""
    if slice_by is None:
        return 0, 0
    check_known(slice_by, schema.id_features, "id feature to slice by")
    slot = schema.slot(slice_by)
    if slot.rows > _MAX_SLICES:
        raise ConfigError(
            f"slice_by: expected a feature of at most {_MAX_SLICES - 1:,} rows, '{slice_by}' has {slot.rows - 1:,}; "
            f"choose one with fewer values"
        )
    return slot.start, list(schema.id_features).index(slice_by)


def score(
    model: nn.Module, batch: Batch, tasks: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "batch tasks"]:
    """Return the raw outputs [B, K] of a model in evaluation mode, on the host; its mode stays as it was.

    This is the one place where a frozen model is called. On a CPU it gets `SCORE_ROWS` at a time.

    Raises:
        ConfigError: the model's output is not [B, K].
    """
    modes = [(module, module.training) for module in model.modules()]
    rows = SCORE_ROWS if torch.device(device).type == "cpu" else max(len(batch), 1)
    model.eval()
    try:
        # Only the model runs in here: batches made in inference mode could not be trained on.
        with torch.inference_mode():
            found = [_logits(model, part.to(device), tasks) for part in _cut(batch, rows)]
            return torch.cat(found).float().cpu()
    finally:
        for module, mode in modes:
            module.training = mode


def _cut(batch: Batch, rows: int) -> Iterator[Batch]:
    if len(batch) <= rows:
        yield batch
        return
    for part in torch.arange(len(batch)).split(rows):
        yield batch.take(part)


def _logits(model: nn.Module, batch: Batch, tasks: int) -> Tensor:
    logits_BK: Tensor = model(batch)
    if logits_BK.shape != (len(batch), tasks):
        raise ConfigError(
            f"expected outputs of shape [{len(batch)}, {tasks}] (rows, tasks) from {type(model).__name__}, got "
            f"{list(logits_BK.shape)}; the schema has {tasks} tasks, build the model from it"
        )
    return logits_BK


def _split(key_B: Int64[Tensor, " batch"]) -> Iterator[tuple[int, Int64[Tensor, " taken"]]]:
    """Yield each value of the key with the indices of its rows, in their order."""
    order_B = torch.argsort(key_B, stable=True)
    values, counts = torch.unique_consecutive(key_B[order_B], return_counts=True)
    yield from zip(values.tolist(), order_B.split(counts.tolist()), strict=True)
