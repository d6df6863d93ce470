"""Arrow columns to tensors: no Python loop over rows, every missing value counted, every bad one named.

A null id is row 0 of its table; an id is hashed into the rows after it, or stands there as it is.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from ..errors import DataError
from ..schema import Batch, IdFeature, IdsFeature, Ragged, Schema, Task

US_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 0.001}
US_PER_DAY = 86_400_000_000
TRUTH = "truth/"  # prefix of the columns in which a generated stream gives its true expectations
MAX_LABEL = 1e30  # the largest label or weight: a few more would not fit float32
_EPOCH_LIMIT_US = 4_102_444_800_000_000 * 5  # the year 2620; later times are a wrong unit

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Place(NamedTuple):
    """Where a piece of a log comes from, for messages: its file, row group and first row in the file."""

    file: str
    row_group: int | None
    first_row: int

    def row(self, offset: int) -> str:
        """Name one row, `offset` rows after the first."""
        group = "" if self.row_group is None else f", row group {self.row_group}"
        return f"{self.file}{group}, row {self.first_row + offset:,}"

    def after(self, rows: int) -> "Place":
        """Return the place `rows` rows further on."""
        return self._replace(first_row=self.first_row + rows)


@dataclass
class Missing:
    """How many values of each column were missing: null, or not finite (NaN, infinity)."""

    rows: int = 0
    null: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    non_finite: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, other: "Missing") -> None:
        """Add the counts of another part of the log."""
        self.rows += other.rows
        for mine, theirs in ((self.null, other.null), (self.non_finite, other.non_finite)):
            for column, count in theirs.items():
                mine[column] += count

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Return the counts by column, columns without a missing value left out."""
        columns = sorted(c for c in {*self.null, *self.non_finite} if self.null.get(c) or self.non_finite.get(c))
        return {c: {"null": self.null.get(c, 0), "non_finite": self.non_finite.get(c, 0)} for c in columns}


def stable_hash(values: pa.Array) -> NDArray[np.uint64]:
    """Hash strings to 64 bits, the same on every machine and in every version (BLAKE2b, 8 bytes, little-endian).

    One Python call a value: give it the distinct values of a dictionary, not the rows.
    """
    digest = hashlib.blake2b
    raw = b"".join(digest(v, digest_size=8).digest() for v in values.cast(pa.large_binary()).to_pylist())
    return np.frombuffer(raw, dtype="<u8").astype(np.uint64)


def mix(values: Ints) -> NDArray[np.uint64]:
    """Hash integers to 64 bits: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = values.astype(np.uint64)  # a copy, changed in place below; wraps around on purpose
    x += np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def to_rows(hashes: NDArray[np.uint64], rows: int) -> Ints:
    """Spread 64-bit hashes over 0 to rows - 1 (rows below 2**32), by multiply and shift: quicker than modulo."""
    high = hashes >> np.uint64(32)
    high *= np.uint64(rows)
    high >>= np.uint64(32)
    return high.astype(np.int64)


class Encoder:
    """Turns tables with a schema's columns into Batches.

    Args:
        schema: What the columns mean.
        labels: False leaves the label, mask and weight columns unread (serving): labels and weights are then 0.
        truth: True reads the `truth/<task>` columns of a generated stream as well.
    """

    def __init__(self, schema: Schema, *, labels: bool = True, truth: bool = False) -> None:
        self.schema, self.labels, self.truth = schema, labels, truth

    @property
    def columns(self) -> list[str]:
        """The columns that `encode` reads."""
        schema = self.schema
        columns = schema.columns
        if not self.labels:
            columns = list(
                dict.fromkeys([schema.time, *([schema.group] if schema.group else []), *self._feature_columns()])
            )
        return columns + ([TRUTH + task for task in schema.tasks] if self.truth else [])

    def _feature_columns(self) -> list[str]:
        return [feature.column for feature in self.schema.features.values()]

    def times(self, table: pa.Table, place: Place) -> Ints:
        """Return the time column alone, in microseconds since 1970."""
        return _Reader(table, place, Missing()).time(self.schema.time, self.schema.time_unit)

    def encode(self, table: pa.Table, place: Place, first_row: int | None = None) -> tuple[Batch, Missing]:
        """Turn a table into a Batch and the counts of its missing values.

        Args:
            table: Rows that follow one another in the log.
            place: Where they come from, for messages.
            first_row: Number of the first of them in the log, where that is known.

        Raises:
            DataError: A wrong type or value; the message names file, row group, column and row.
        """
        schema, rows, missing = self.schema, len(table), Missing(len(table))
        read = _Reader(table, place, missing)
        ids = np.empty((rows, len(schema.id_features)), dtype=np.int64)
        for j, (name, id_feature) in enumerate(schema.id_features.items()):
            ids[:, j] = read.ids(id_feature, schema.slot(name).start)
        lists = tuple(read.lists(f, schema.slot(name).start) for name, f in schema.list_features.items())
        numbers = np.empty((rows, len(schema.number_features)), dtype=np.float32)
        for j, number in enumerate(schema.number_features.values()):
            numbers[:, j] = read.number(number.column)
        positions = np.empty((rows, len(schema.position_features)), dtype=np.int64)
        for j, position in enumerate(schema.position_features.values()):
            positions[:, j] = np.clip(read.integer(position.column), 0, position.rows - 1)
        labels, weights = self._labels(read, rows)
        truth = None
        if self.truth:
            columns = [read.number(TRUTH + task) for task in schema.tasks]
            truth = torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))
        group = read.key(schema.group) if schema.group else np.zeros(rows, dtype=np.int64)
        return (
            Batch(
                ids=torch.from_numpy(ids),
                lists=lists,
                numbers=torch.from_numpy(numbers),
                positions=torch.from_numpy(positions),
                labels=labels,
                weights=weights,
                time=torch.from_numpy(np.array(read.time(schema.time, schema.time_unit))),
                group=torch.from_numpy(np.array(group)),
                truth=truth,
                row=None if first_row is None else torch.arange(first_row, first_row + rows),
            ),
            missing,
        )

    def _labels(self, read: "_Reader", rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        tasks = self.schema.tasks
        labels = torch.zeros(rows, len(tasks))
        weights = torch.zeros(rows, len(tasks))
        if not self.labels:
            return labels, weights
        positive: dict[str, NDArray[np.bool_]] = {}
        for k, (name, task) in enumerate(tasks.items()):
            raw, weight = read.label(task)
            positive[name] = (raw == 1) & (weight > 0)
            labels[:, k] = task.encode(torch.from_numpy(raw)).float()
            weights[:, k] = torch.from_numpy(weight).float()
        for k, task in enumerate(tasks.values()):
            if task.only_where is not None:
                weights[:, k] *= torch.from_numpy(positive[task.only_where])
        labels.masked_fill_(weights == 0, 0.0)
        return labels, weights


class _Reader:
    """Reads single columns of one table, counting what is missing and naming what is wrong."""

    def __init__(self, table: pa.Table, place: Place, missing: Missing) -> None:
        self.table, self.place, self.missing = table, place, missing

    def _column(self, name: str) -> pa.Array:
        column = self.table.column(name)
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if isinstance(array, pa.ChunkedArray):  # combine_chunks keeps a chunked array when there is no chunk
            array = array.chunk(0) if array.num_chunks else pa.array([], type=array.type)
        return _plain(array)

    def _fail(self, column: str, what: str, offset: int | None = None) -> DataError:
        where = self.place.file if offset is None else self.place.row(offset)
        return DataError(f"{where}, column '{column}': {what}")

    def _wrong_type(self, column: str, array: pa.Array, expected: str, hint: str = "") -> DataError:
        return self._fail(column, f"expected {expected}, found {array.type}" + (f"; {hint}" if hint else ""))

    def floats(self, column: str, array: pa.Array, expected: str = "a number") -> Floats:
        """Return a numeric column as float64, NaN where missing; nulls, NaN and infinity are counted."""
        if not _is_numeric(array.type):
            raise self._wrong_type(column, array, expected, "an id feature takes strings")
        values = np.array(array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))  # writable
        values[~np.isfinite(values)] = np.nan
        self._count(column, array.null_count, int(np.isnan(values).sum()) - array.null_count)
        return values

    def _count(self, column: str, null: int, non_finite: int = 0) -> None:
        # The largest and not the sum: one column may serve as a feature, a label and a key.
        self.missing.null[column] = max(self.missing.null[column], null)
        self.missing.non_finite[column] = max(self.missing.non_finite[column], non_finite)

    def number(self, column: str) -> Floats:
        """Return a number feature; what does not fit float32 is missing too."""
        array = self._column(column)
        values = self.floats(column, array)
        too_large = np.abs(values) > np.finfo(np.float32).max
        if too_large.any():
            values[too_large] = np.nan
            self._count(column, array.null_count, int(np.isnan(values).sum()) - array.null_count)
        return values

    def integers(
        self, column: str, array: pa.Array, what: str, owner: Ints | None = None
    ) -> tuple[Ints, NDArray[np.bool_] | None]:
        """Return whole numbers and where they are null (None: nowhere). Whole floats count as integers."""
        if pa.types.is_null(array.type):
            array = array.cast(pa.int64())
        if pa.types.is_floating(array.type):
            values = self.floats(column, array, what)
            null = np.isnan(values)
            whole = np.where(null, 0.0, values)
            wrong = (whole != np.floor(whole)) | (np.abs(whole) >= 2.0**63)
            if wrong.any():
                offset = int(wrong.argmax())
                raise self._fail(column, f"expected {what}, found {values[offset]}", _row(offset, owner))
            return whole.astype(np.int64), null if null.any() else None
        if not (pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)):
            raise self._wrong_type(column, array, what)
        self._count(column, array.null_count)
        mask = None
        if array.null_count:
            mask = array.is_null().to_numpy(zero_copy_only=False)
            array = array.fill_null(False if pa.types.is_boolean(array.type) else 0)
        if pa.types.is_uint64(array.type):  # the upper half wraps around, which a hash does not mind
            return array.to_numpy(zero_copy_only=False).view(np.int64), mask
        return _int64(array), mask

    def integer(self, column: str) -> Ints:
        """Return a column of whole numbers, null as 0."""
        return self.integers(column, self._column(column), "a whole number")[0]

    def ids(self, feature: IdFeature, start: int) -> Ints:
        """Return the table rows of an id feature."""
        return self._table_rows(feature, self._column(feature.column), start)

    def _table_rows(
        self, feature: IdFeature | IdsFeature, array: pa.Array, start: int, owner: Ints | None = None
    ) -> Ints:
        """Return `start` for a null id, `start + 1 + row` for any other; `owner` maps elements to rows of the log."""
        column = feature.column
        if _is_string(array.type):
            if not feature.hashed:
                raise self._wrong_type(column, array, "integers, as hashed = false asks", "set hashed = true")
            self._count(column, array.null_count)
            return _by_distinct(array, lambda distinct: to_rows(stable_hash(distinct), feature.rows) + 1) + start
        values, null = self.integers(column, array, "an id (an integer or a string)", owner)
        if feature.hashed:
            rows = to_rows(mix(values), feature.rows)
        else:
            rows = values
            wrong = (values < 0) | (values >= feature.rows)
            if wrong.any():
                offset = int(wrong.argmax())
                raise self._fail(
                    column,
                    f"id {values[offset]} is outside 0 to {feature.rows - 1}; raise rows or set hashed = true",
                    _row(offset, owner),
                )
        rows = rows + (start + 1)
        if null is not None:
            rows[null] = start
        return rows

    def lists(self, feature: IdsFeature, start: int) -> Ragged:
        """Return a list feature; a string column is a bag of its words, in lower case."""
        array = self._column(feature.column)
        self._count(feature.column, array.null_count)
        if _is_string(array.type):
            try:
                array = _words(array)
            except pa.ArrowInvalid as error:
                raise self._fail(feature.column, f"expected text in UTF-8: {error}") from error
        elif pa.types.is_null(array.type) or pa.types.is_fixed_size_list(array.type):
            array = array.cast(pa.list_(pa.int64() if pa.types.is_null(array.type) else array.type.value_type))
        if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
            raise self._wrong_type(
                feature.column, array, "a list of ids, or a text (a bag of its words)", 'kind = "id" takes single ids'
            )
        lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        values = self._table_rows(feature, _plain(array.flatten()), start, owner)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        if feature.max_length is not None and len(lengths) and lengths.max() > feature.max_length:
            keep = (offsets[1:][owner] - np.arange(len(values))) <= feature.max_length
            values = values[keep]
            offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, feature.max_length))])
        return Ragged(torch.from_numpy(values), torch.from_numpy(offsets))

    def key(self, column: str) -> Ints:
        """Return a grouping key: an integer as it is, the 64-bit hash of a string; null is 0."""
        array = self._column(column)
        if _is_string(array.type):
            self._count(column, array.null_count)
            return _by_distinct(array, lambda distinct: stable_hash(distinct).view(np.int64))
        return self.integers(column, array, "a group key (an integer or a string)")[0]

    def time(self, column: str, unit: str) -> Ints:
        """Return the time in microseconds since 1970; a null, or a time past any calendar, is an error."""
        array = self._column(column)
        if array.null_count:
            offset = int(array.is_null().to_numpy(zero_copy_only=False).argmax())
            raise self._fail(column, "the time is null; every row needs one", offset)
        hint = "set schema.time_unit"
        if pa.types.is_date(array.type):
            array = array.cast(pa.timestamp("s" if pa.types.is_date32(array.type) else "ms"))
        if pa.types.is_timestamp(array.type):
            hint, unit, array = "write the column again", array.type.unit, array.cast(pa.int64())
        if not _is_numeric(array.type) or pa.types.is_boolean(array.type):
            raise self._wrong_type(column, array, "a timestamp, a date or a number")
        limit = min(_EPOCH_LIMIT_US / US_PER_UNIT[unit], 2.0**63)
        values: NDArray[Any] = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        wrong = ~(np.abs(values) < limit)  # NaN is wrong too
        if wrong.any():
            offset = int(wrong.argmax())
            raise self._fail(column, f"{values[offset]} is no time in '{unit}' since 1970; {hint}", offset)
        if pa.types.is_integer(array.type):  # float64 would round nanoseconds
            exact = _int64(array)
            return exact // 1000 if unit == "ns" else exact * int(US_PER_UNIT[unit])
        return np.rint(values * US_PER_UNIT[unit]).astype(np.int64)

    def label(self, task: Task) -> tuple[Floats, Floats]:
        """Return raw labels (0 where masked) and weights (0 where masked)."""
        array = self._column(task.column)
        raw = self.floats(task.column, array, "a label (a number)")
        weight = np.ones(len(raw))
        if task.weight is not None:
            weight = self.floats(task.weight, self._column(task.weight), "a weight (a number)")
            self._check(task.weight, weight, (weight < 0) | (weight > MAX_LABEL), "expected a weight from 0 to 1e30")
            weight = np.nan_to_num(weight)
        if task.mask is not None:
            weight[np.nan_to_num(self.floats(task.mask, self._column(task.mask), "a mask"), nan=1.0) != 0] = 0
        weight[np.isnan(raw)] = 0
        raw[weight == 0] = 0
        if task.kind == "binary":
            wrong = (raw != 0) & (raw != 1)
            self._check(task.column, raw, wrong, "expected a binary label, 0 or 1 (or null)")
        elif task.transform == "log1p":
            self._check(task.column, raw, raw < 0, "transform = 'log1p' expects a label of 0 or more")
        self._check(task.column, raw, np.abs(raw) > MAX_LABEL, "expected a label below 1e30")
        return raw, weight

    def _check(self, column: str, values: Floats, wrong: NDArray[np.bool_], expected: str) -> None:
        if wrong.any():
            offset = int(wrong.argmax())
            raise self._fail(column, f"{expected}, found {values[offset]:g}", offset)


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_string(kind.value_type)
    checks: tuple[Callable[[Any], bool], ...] = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
        pa.types.is_string_view,
        pa.types.is_binary_view,
    )
    return any(check(kind) for check in checks)


def _is_numeric(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)  # a column in which every value is missing
    )


def _plain(array: pa.Array) -> pa.Array:
    """Decode a dictionary of anything but strings, or with a null among its values."""
    if not pa.types.is_dictionary(array.type) or (_is_string(array.type) and not array.dictionary.null_count):
        return array
    return array.dictionary_decode()


def _row(offset: int, owner: Ints | None) -> int:
    """Return the row of the log that an element lies in."""
    return offset if owner is None else int(owner[offset])


def _words(text: pa.Array) -> pa.Array:
    """Split texts at white space, in lower case; a blank text is null, as Arrow would make it one empty word."""
    text = pc.utf8_trim_whitespace(pc.utf8_lower(text.cast(pa.large_string())))
    return pc.utf8_split_whitespace(pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text))


def _by_distinct(array: pa.Array, compute: Callable[[pa.Array], NDArray[Any]]) -> Ints:
    """Compute a value for each distinct string and spread it over the rows; null gives 0."""
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    if encoded.null_count:
        indices = encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)
    else:
        indices = encoded.indices.to_numpy(zero_copy_only=False)
    by_value = np.zeros(len(encoded.dictionary) + 1, dtype=np.int64)
    if len(encoded.dictionary):
        by_value[:-1] = compute(encoded.dictionary)
    spread: Ints = by_value[indices]
    return spread


def _int64(array: pa.Array) -> Ints:
    values: Ints = array.cast(pa.int64()).to_numpy(zero_copy_only=False)
    return values
