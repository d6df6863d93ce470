"""Score Batches with a frozen model.

Shapes: B rows of a batch, K tasks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from .errors import ConfigError, check_known
from .metrics import CAPACITY, DAY_US, Metrics, TaskMetrics, as_scores, iso_day
from .schema import Batch, Schema

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
