"""A first schema read off the columns of a log: a starting point to correct, made to train as it is."""

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..errors import DataError
from ..schema import Feature, IdFeature, IdsFeature, NumberFeature, PositionFeature, Schema, Task
from .columns import MAX_LABEL
from .source import Source

SAMPLE_ROWS = 200_000
_TIME = re.compile(
    r"^(t|ts|time|timestamp|date|datetime|event_?time|created(_at)?)$|(_|^)(time|timestamp|ts|date)(_|$)", re.I
)
_USER = re.compile(r"user|customer|person|member|visitor|uid|account|client", re.I)
_GROUP = re.compile(r"session|request|query|search|impression_?id|page_?view", re.I)
_ITEM = re.compile(r"item|video|product|article|content|stock|movie|song|track|creative|(^|_)ad(_|$)|doc|post", re.I)
_ID = re.compile(r"(^|_)(id|code|key|uid|sku|zip|type|category|cat\d*|bucket)$|onehot|[a-z](Id|ID|Code|No)$")
_POSITION = re.compile(r"^(pos|position|slot|display_?rank)$", re.I)
_BINARY = re.compile(
    r"(^|_|is)(click|like|follow|share|comment|forward|view|buy|purchase|order|conver|label|target|y|return|cancel|"
    r"bookmark|save|rebuy|late|install|profile|hate|subscri|skip|finish|complete)",
    re.I,
)
_AMOUNT = re.compile(
    r"(watch|play|dwell|stay|view|read|listen)\w*(time|_s|_ms|sec|duration)|^(watch|play|dwell)(_|$)|rating|stars|score$|"
    r"revenue|spend|qty|quantity|delay",
    re.I,
)


def guess_schema(source: Source) -> tuple[Schema, dict[str, str]]:
    """Guess what the columns of a log mean from their names, types and first rows.

    Returns:
        The schema, and a note for each column: what it was taken for, and why.

    Raises:
        DataError: No column can be the time, or none can be a label.
    """
    sample = _sample(source)
    notes: dict[str, str] = {}
    time, unit = _find_time(sample)
    notes[time] = f"the time ({unit})" if unit else "the time"
    tasks = _find_tasks(sample, exclude={time})
    for name, task in tasks.items():
        notes[name] = f"label, {task.kind}: never an input"
    features: dict[str, Feature] = {}
    for name in sample.schema.names:
        if name in notes or name.startswith("truth/"):
            continue
        feature, note = _find_feature(name, sample.column(name))
        notes[name] = note
        if feature is not None:
            features[name] = feature
    if not features:
        raise DataError("no column is left to serve as a feature; write [schema.features] by hand")
    ids = [name for name, feature in features.items() if isinstance(feature, IdFeature)]
    user = next((name for name in ids if _USER.search(name)), None)
    item = next((name for name in ids if _ITEM.search(name) and name != user), None)
    group = user or next((name for name in sample.schema.names if _GROUP.search(name) and name in ids), None)
    return (
        Schema(
            time=time,
            time_unit=unit or "s",
            group=group,
            baseline=tuple(name for name in (user, item) if name) or _largest(features),
            features=features,
            tasks=tasks,
        ),
        notes,
    )


def _largest(features: dict[str, Feature]) -> tuple[str, ...]:
    """Return the two id features with the most rows: where no name says user or item, they say most about a row."""
    ids = [name for name, feature in features.items() if isinstance(feature, IdFeature)]
    rows = {name: feature.rows for name, feature in features.items() if isinstance(feature, IdFeature)}
    return tuple(sorted(ids, key=lambda name: -rows[name])[:2])


def _sample(source: Source) -> pa.Table:
    tables: list[pa.Table] = []
    rows = 0
    for piece in source.pieces(0, None):
        tables.append(piece.table)
        rows += len(piece.table)
        if rows >= SAMPLE_ROWS:
            break
    sample = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    for i, field in enumerate(sample.schema):  # plain strings and numbers, which Arrow can count
        if pa.types.is_dictionary(field.type):
            sample = sample.set_column(i, field.name, sample.column(i).cast(field.type.value_type))
        elif pa.types.is_string_view(field.type):
            sample = sample.set_column(i, field.name, sample.column(i).cast(pa.string()))
    return sample


def _find_time(sample: pa.Table) -> tuple[str, str | None]:
    """Return the time column and its unit (None for a timestamp or date)."""
    best: tuple[float, str, str | None] | None = None
    for field in sample.schema:
        column = sample.column(field.name)
        if column.null_count:
            continue
        unit: str | None = None
        score = 2.0 * bool(_TIME.search(field.name))
        if pa.types.is_timestamp(field.type) or pa.types.is_date(field.type):
            score += 3
        elif pa.types.is_integer(field.type) or pa.types.is_floating(field.type):
            unit = _epoch_unit(column)
            score = score + 1 if unit else -1
            unit = unit or "s"
        else:
            continue
        values = (column if unit else column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())).to_numpy()
        falls = float(np.mean(values[1:] < values[:-1])) if len(values) > 1 else 0.0
        constant = len(values) > 1 and values.min() == values.max()  # sorted, but orders nothing
        score += -2 if constant else 2 if falls == 0 else -4 * falls
        if score > 1 and (best is None or score > best[0]):
            best = (score, field.name, unit)
    if best is None:
        raise DataError(
            "no column looks like a time (a timestamp, or a number counted since 1970); the log needs one to be read "
            "in order. CSV dates in an unusual format can be converted beforehand"
        )
    return best[1], best[2]


def _epoch_unit(column: pa.ChunkedArray) -> str | None:
    """Return the unit in which a number would lie between 1990 and 2100, if any."""
    low, high = (float(value.as_py() or 0) for value in pc.min_max(column).values())
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6), ("ns", 1e9)):
        if 6.3e8 * scale <= low and high <= 4.1e9 * scale:
            return unit
    return None


def _find_tasks(sample: pa.Table, exclude: set[str]) -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    others: list[str] = []
    for field in sample.schema:
        name = field.name
        if name in exclude or name.startswith("truth/") or not _is_number(field.type):
            continue
        values = _numbers(sample.column(name))
        if _is_binary(values):
            if _BINARY.search(name):
                tasks[name] = Task(kind="binary", column=name, start=_rate(values))
            else:
                others.append(name)
        elif _AMOUNT.search(name) and len(values) and np.abs(values).max() <= MAX_LABEL:
            tasks[name] = _regression(name, values)
    if not tasks and others:  # no name says so: the last column of zeros and ones, as data sets have it
        tasks[others[-1]] = Task(kind="binary", column=others[-1], start=_rate(_numbers(sample.column(others[-1]))))
    if not tasks:
        raise DataError(
            "no column looks like a label (0 and 1 under a name such as click, or a watch time, rating or quantity); "
            "write [schema.tasks] by hand"
        )
    return tasks


def _regression(name: str, values: NDArray[np.float64]) -> Task:
    heavy = bool(values.min() >= 0 and values.max() > 20 * (np.median(values) + 1))
    spread = float(np.std(np.log1p(values) if heavy else values)) or 1.0
    mean = float(np.expm1(np.log1p(values).mean()) if heavy else values.mean())
    return Task(
        kind="regression",
        column=name,
        transform="log1p" if heavy else "none",
        scale=float(f"{spread:.2g}") or 1.0,
        start=float(f"{mean:.2g}"),
    )


def _rate(values: NDArray[np.float64]) -> float:
    """Return the base rate, rounded: a starting point, not a measurement."""
    return min(max(float(f"{values.mean():.1g}"), 0.001), 0.99)


def _find_feature(name: str, column: pa.ChunkedArray) -> tuple[Feature | None, str]:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if not (pa.types.is_integer(kind.value_type) or _is_string(kind.value_type)):
            return None, f"left out: type {kind}"
        inner = pc.count_distinct(pc.list_flatten(column)).as_py()
        return IdsFeature(column=name, table=name, rows=_rows(inner)), f"list of ids, {inner:,} distinct"
    if not (_is_string(kind) or _is_number(kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
        return None, f"left out: type {kind}"
    distinct = pc.count_distinct(column).as_py()
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return None, "left out: a second time"
    if _is_string(kind):
        return IdFeature(column=name, table=name, rows=_rows(distinct)), f"id, {distinct:,} distinct strings"
    if distinct <= 1:
        return None, "left out: one value only"
    if _TIME.search(name) and not _ID.search(name):
        return None, "left out: a second time"
    values = _numbers(column)
    if not len(values):
        return None, "left out: no finite value"
    whole = bool(np.all((values == np.floor(values)) & (np.abs(values) < 2.0**63)))
    if whole and _POSITION.search(name):
        return PositionFeature(column=name, rows=int(np.clip(values.max() + 1, 1, 1000))), "place on the page"
    if whole and (_ID.search(name) or distinct <= 50 or _USER.fullmatch(name) or _ITEM.fullmatch(name)):
        return IdFeature(column=name, table=name, rows=_rows(distinct)), f"id, {distinct:,} distinct numbers"
    heavy = bool(values.min() >= 0 and values.max() > 20 * (np.median(values) + 1))
    return NumberFeature(column=name, transform="log1p" if heavy else "none"), "number" + (", heavy tail" * heavy)


def _rows(distinct: int) -> int:
    """Twice the distinct values of the sample, to the next power of two: few collisions, room for new ones."""
    return int(max(16, 2 ** int(np.ceil(np.log2(max(2 * distinct, 1))))))


def _is_string(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    values: NDArray[np.float64] = column.drop_null().cast(pa.float64(), safe=False).to_numpy()
    return values[np.isfinite(values)]


def _is_binary(values: NDArray[np.float64]) -> bool:
    return len(values) > 0 and bool(np.isin(values, (0.0, 1.0)).all()) and bool(values.min() != values.max())
