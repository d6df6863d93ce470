"""What the columns of a log mean (Feature, Task, Schema), and what flows from them (Batch).

Shapes: B rows, F id features, N elements of one list feature, X number features, P position features, K tasks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor

from .settings import Settings


class _Column(Settings):
    column: str = ""
    """Column of the log; the feature's own name when left out."""


class _Embedded(_Column):
    rows: int = Field(default=10_000, ge=1)
    """Rows of the embedding table, one more being added for the null id."""
    width: int | None = Field(default=None, ge=1)
    """Width of an embedding; the schema's `embedding_width` when left out."""
    hashed: bool = True
    """True: ids are hashed into the rows. False: ids are integers from 0 to rows - 1."""
    table: str = ""
    """Name of the table; features that name the same table share its rows. The feature's own name when left out."""


class IdFeature(_Embedded):
    """One id, an integer or a string. A null id has a row of its own."""

    kind: Literal["id"] = "id"


class IdsFeature(_Embedded):
    """A list of ids: a bag or a history. An empty or null list pools to zeros."""

    kind: Literal["ids"] = "ids"
    pooling: Literal["mean", "sum"] = "mean"
    """How the embeddings of the list become one."""
    max_length: int | None = Field(default=None, ge=1)
    """Keep only the last so many elements (the most recent of a history)."""


class NumberFeature(_Column):
    """A number. Null, NaN and infinity become the feature's running mean, with a flag beside it."""

    kind: Literal["number"] = "number"
    transform: Literal["none", "log1p"] = "none"
    """`log1p` is sign(x) * log(1 + |x|), for heavy tails."""
    standardise: bool = True
    """Subtract the running mean and divide by the running standard deviation."""


class PositionFeature(_Column):
    """A place on the page, counted from 0; it feeds the position tower only, which serving leaves out."""

    kind: Literal["position"] = "position"
    rows: int = Field(default=100, ge=1)
    """Places told apart; later ones count as the last."""


Feature = Annotated[IdFeature | IdsFeature | NumberFeature | PositionFeature, Field(discriminator="kind")]


class Task(Settings):
    """One objective: a binary label or a regression."""

    kind: Literal["binary", "regression"]
    """Binary labels are 0 or 1; a regression's label is any number its transform can take."""
    column: str = ""
    """Column of the label; the task's own name when left out. A null label is masked."""
    transform: Literal["none", "log1p"] = "none"
    """Regression only: learn log(1 + label); the label must not be negative."""
    scale: float = Field(default=1.0, gt=0)
    """Regression only: the transformed label is divided by it, best so that its spread is near 1."""
    mask: str | None = None
    """Column that is true (not 0) where the label is missing."""
    weight: str | None = None
    """Column with the weight of each row, 0 or more."""
    only_where: str | None = None
    """A binary task: only rows whose label there is 1 count (watch time only where clicked)."""
    loss: Literal["bce", "mse", "huber", "auto"] = "auto"
    """`auto` is bce for binary tasks and mse for regressions."""
    start: float | None = None
    """What an untrained model predicts: the expected rate (binary, 0 to 1) or label, in the label's own unit."""
    loss_weight: float = Field(default=1.0, ge=0)
    """Weight of this task's loss in the total."""
    huber_delta: float = Field(default=1.0, gt=0)
    """Where Huber's loss turns from square to linear, in units of the scaled label."""

    @model_validator(mode="after")
    def _kind_fits(self) -> "Task":
        if self.kind == "binary":
            if self.transform != "none" or self.scale != 1.0:
                raise ValueError("transform and scale belong to regressions; a binary label is 0 or 1")
            if self.loss not in ("bce", "auto"):
                raise ValueError(f"loss '{self.loss}' belongs to regressions; a binary task takes 'bce'")
        elif self.loss == "bce":
            raise ValueError("loss 'bce' belongs to binary tasks; a regression takes 'mse' or 'huber'")
        if self.start is not None:
            if self.kind == "binary" and not 0 < self.start < 1:
                raise ValueError(f"start is the expected rate of a binary label, between 0 and 1, not {self.start:g}")
            if self.transform == "log1p" and self.start < 0:
                raise ValueError(f"start is the expected label, 0 or more under log1p, not {self.start:g}")
        return self

    @property
    def start_logit(self) -> float:
        """The model's output that stands for `start`; 0 without one."""
        if self.start is None:
            return 0.0
        if self.kind == "binary":
            return math.log(self.start / (1 - self.start))
        return (math.log1p(self.start) if self.transform == "log1p" else self.start) / self.scale

    def encode(self, raw: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Turn raw labels into what the model learns: `log1p(raw) / scale`, or `raw / scale`."""
        return (torch.log1p(raw) if self.transform == "log1p" else raw) / self.scale

    def decode(self, logit: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Turn the model's output into a probability (binary) or the label's own unit (regression)."""
        if self.kind == "binary":
            return torch.sigmoid(logit)
        raw = logit * self.scale
        return torch.expm1(raw) if self.transform == "log1p" else raw


class TableSlot(NamedTuple):
    """Where an embedding table lies in the weight matrix of its width: rows `start` to `start + rows - 1`.

    Row `start` belongs to the null id, so `rows` is one more than the feature's own.
    """

    width: int
    start: int
    rows: int


class Schema(Settings):
    """The meaning of a log's columns: features, tasks, time and group."""

    time: str = "time"
    """Column that orders the log: a timestamp, a date, or a number in `time_unit`."""
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of a numeric time column, since 1970 in UTC."""
    group: str | None = None
    """Column (user or request) whose rows are ranked among themselves, for GAUC."""
    embedding_width: int = Field(default=16, ge=1)
    """Width of every embedding that does not set its own."""
    baseline: tuple[str, ...] = ()
    """Id features (the user, the item) whose running mean of each label is the baseline to beat."""
    features: dict[str, Feature] = Field(min_length=1)
    """The model's inputs, by name."""
    tasks: dict[str, Task] = Field(min_length=1)
    """The objectives, by name."""

    @model_validator(mode="before")
    @classmethod
    def _fill_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for part in ("features", "tasks"):
            if isinstance(data.get(part), dict):
                data[part] = {name: _named(entry, name) for name, entry in data[part].items()}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "Schema":
        for name, task in self.tasks.items():
            if task.only_where is not None:
                other = self.tasks.get(task.only_where)
                if other is None or other.kind != "binary" or task.only_where == name:
                    raise ValueError(f"tasks.{name}.only_where: '{task.only_where}' is not another binary task")
        tables: dict[str, tuple[str, tuple[int, int, bool]]] = {}
        for name, feature in self.features.items():
            if not isinstance(feature, IdFeature | IdsFeature):
                continue
            facts = (feature.rows, feature.width or self.embedding_width, feature.hashed)
            first, expected = tables.setdefault(feature.table, (name, facts))
            if facts != expected:
                raise ValueError(
                    f"features.{name}: shares table '{feature.table}' with '{first}', but its (rows, width, hashed) "
                    f"are {facts} and not {expected}"
                )
        for name in self.baseline:
            if name not in self.id_features:
                raise ValueError(f"baseline: '{name}' is not an id feature")
        return self

    @cached_property
    def id_features(self) -> dict[str, IdFeature]:
        """The one-valued id features, in the order of `Batch.ids`' columns."""
        return {n: f for n, f in self.features.items() if isinstance(f, IdFeature)}

    @cached_property
    def list_features(self) -> dict[str, IdsFeature]:
        """The list features, in the order of `Batch.lists`."""
        return {n: f for n, f in self.features.items() if isinstance(f, IdsFeature)}

    @cached_property
    def number_features(self) -> dict[str, NumberFeature]:
        """The number features, in the order of `Batch.numbers`' columns."""
        return {n: f for n, f in self.features.items() if isinstance(f, NumberFeature)}

    @cached_property
    def position_features(self) -> dict[str, PositionFeature]:
        """The position features, in the order of `Batch.positions`' columns."""
        return {n: f for n, f in self.features.items() if isinstance(f, PositionFeature)}

    @cached_property
    def tables(self) -> dict[str, TableSlot]:
        """Each embedding table's place in the one weight matrix of its width, by table name."""
        slots: dict[str, TableSlot] = {}
        ends: dict[int, int] = {}  # by width
        for feature in (*self.id_features.values(), *self.list_features.values()):
            if feature.table not in slots:
                width = feature.width or self.embedding_width
                slots[feature.table] = TableSlot(width, ends.get(width, 0), feature.rows + 1)
                ends[width] = ends.get(width, 0) + feature.rows + 1
        return slots

    def slot(self, feature: str) -> TableSlot:
        """Return the place of an id or list feature's table in the weight matrix of its width."""
        entry = self.features[feature]
        if not isinstance(entry, IdFeature | IdsFeature):
            raise KeyError(f"'{feature}' has no embedding table: it is a {entry.kind} feature")
        return self.tables[entry.table]

    @property
    def columns(self) -> list[str]:
        """Every column of the log that training reads, each once."""
        found = [self.time, self.group, *(f.column for f in self.features.values())]
        for task in self.tasks.values():
            found += [task.column, task.mask, task.weight]
        return list(dict.fromkeys(c for c in found if c is not None))


def _named(entry: Any, name: str) -> Any:
    """Fill in the column (and the table of an id feature) from the entry's own name."""
    if isinstance(entry, Settings):
        absent = [key for key in ("column", "table") if getattr(entry, key, None) == ""]
        return entry.model_copy(update=dict.fromkeys(absent, name))
    if not isinstance(entry, dict):
        return entry
    keys = ["column", "table"] if entry.get("kind") in ("id", "ids") else ["column"]
    return {**entry, **{key: name for key in keys if not entry.get(key)}}


class Ragged(NamedTuple):
    """One list feature of B rows: row i owns `values[offsets[i]:offsets[i + 1]]`."""

    values: Int64[Tensor, " elements"]
    offsets: Int64[Tensor, " rows_and_one"]

    def take(self, index: Int64[Tensor, " taken"]) -> "Ragged":
        """Return the lists of the rows in `index`, in that order."""
        lengths = self.offsets.diff()[index]
        offsets = torch.zeros(len(index) + 1, dtype=torch.int64, device=lengths.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        source = torch.arange(int(offsets[-1]), device=lengths.device)
        source += (self.offsets[index] - offsets[:-1]).repeat_interleave(lengths, output_size=len(source))
        return Ragged(self.values[source], offsets)


class Share(NamedTuple):
    """What a batch is a part of, where several processes learn one batch together."""

    rows: int
    """Rows of the whole batch."""
    first_time: int
    """Earliest time in it, in microseconds since 1970."""
    last_time: int
    """The latest."""
    weights: Float[Tensor, " tasks"]
    """Sum of the row weights by task, over the whole batch."""


@dataclass(frozen=True)
class Batch:
    """Rows of a log as tensors. An id is a row of the weight matrix of its feature's width (`Schema.slot`)."""

    ids: Int64[Tensor, "batch id_features"]
    """Table rows of the one-valued id features."""
    lists: tuple[Ragged, ...]
    """Table rows of each list feature: values and offsets, no padding."""
    numbers: Float[Tensor, "batch number_features"]
    """As they stand in the log; NaN where missing."""
    positions: Int64[Tensor, "batch position_features"]
    """Places on the page, counted from 0."""
    labels: Float[Tensor, "batch tasks"]
    """What the model learns (transformed and scaled); 0 where masked."""
    weights: Float[Tensor, "batch tasks"]
    """Row weights by task; 0 where the label is masked."""
    time: Int64[Tensor, " batch"]
    """Microseconds since 1970, UTC."""
    group: Int64[Tensor, " batch"]
    """The group's key, or a hash of it; 0 for all without a group column."""
    truth: Float[Tensor, "batch tasks"] | None = None
    """Generated streams only: true probability, or expectation of the label as the model learns it."""
    row: Int64[Tensor, " batch"] | None = None
    """Number of each row in its log, counted from 0 in reading order; None in a batch that a Reader did not make."""
    share: Share | None = None
    """The batch that this is a part of; None where it is whole."""

    def __len__(self) -> int:
        return len(self.time)

    @property
    def whole_rows(self) -> int:
        """Rows of the whole batch, over all processes."""
        return len(self) if self.share is None else self.share.rows

    @property
    def times(self) -> tuple[int, int]:
        """Earliest and latest time of the whole batch, in microseconds since 1970."""
        if self.share is not None:
            return self.share.first_time, self.share.last_time
        return int(self.time.min()), int(self.time.max())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch on `device`."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def tensors(self) -> list[Tensor]:
        """Return all tensors that it is made of."""
        values = [getattr(self, f.name) for f in fields(self)]
        lists = [part for ragged in self.lists for part in (ragged.values, ragged.offsets)]
        shared = [] if self.share is None else [self.share.weights]
        return [value for value in values if isinstance(value, Tensor)] + lists + shared

    def take(self, index: Int64[Tensor, " taken"]) -> "Batch":
        """Return the rows in `index`, in that order."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.index_select(0, index)
        moved["lists"] = tuple(ragged.take(index) for ragged in self.lists)
        moved["share"] = None
        return Batch(**moved)

    @staticmethod
    def cat(batches: Sequence["Batch"]) -> "Batch":
        """Return the rows of all `batches` (of one schema, at least one) one after the other."""
        if len(batches) == 1:
            return batches[0]
        joined: dict[str, Any] = {}
        for f in fields(Batch):
            parts = [getattr(batch, f.name) for batch in batches]
            if isinstance(parts[0], Tensor):
                joined[f.name] = torch.cat(parts)
        joined["lists"] = tuple(_cat_ragged([b.lists[i] for b in batches]) for i in range(len(batches[0].lists)))
        return Batch(**joined)

    def _map(self, move: Any) -> "Batch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = move(value)
        moved["lists"] = tuple(Ragged(move(r.values), move(r.offsets)) for r in self.lists)
        moved["share"] = None if self.share is None else self.share._replace(weights=move(self.share.weights))
        return Batch(**moved)


def _cat_ragged(parts: Sequence[Ragged]) -> Ragged:
    offsets, end = [parts[0].offsets], int(parts[0].offsets[-1])
    for part in parts[1:]:
        offsets.append(part.offsets[1:] + end)
        end += int(part.offsets[-1])
    return Ragged(torch.cat([part.values for part in parts]), torch.cat(offsets))
