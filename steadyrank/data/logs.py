"""Parquet to Batches: in time order, window by window, shuffled inside a window, with a cursor to resume from.

Memory is bounded by the window: a log is read in pieces of at most `PIECE_ROWS` rows.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch
from pydantic import Field

from ..errors import ConfigError, DataError, check_known, near_path
from ..schema import Batch, Schema
from ..settings import Settings
from .columns import TRUTH, US_PER_DAY, Encoder, Missing, Place

PIECE_ROWS = 65_536
US_PER_HOUR = US_PER_DAY // 24
_BUFFER_BYTES = 1 << 20  # of a column's chunk: Arrow would else hold a whole row group
_NS_PER_UNIT = {"milliseconds": 1_000_000, "microseconds": 1_000, "nanoseconds": 1}
_MIN_ROWS_FOR_SHARE = 1_000  # below so many rows a share of missing values says little


class LogsConfig(Settings):
    """Where the log is."""

    source: Literal["logs"] = "logs"
    path: str
    """A Parquet file, a folder of them (date-partitioned or not) or a glob (`*` inside a name, `**` across folders);
    local, `s3://` or `gs://`."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read at most so many rows, from the start."""


class ReaderConfig(Settings):
    """How a log is cut into windows and batches."""

    batch_size: int = Field(default=1024, ge=1)
    """Rows of a step."""
    window_rows: int = Field(default=65_536, ge=1)
    """Rows of a window: sorted by time, then shuffled, then learned."""
    window_hours: float | None = Field(default=None, gt=0)
    """Hours of a window, instead of rows."""
    shuffle: bool = True
    """Shuffle rows inside a window, by the run's seed; a row may then be scored after later ones were learned."""
    unsorted: Literal["sort", "refuse"] = "sort"
    """`sort`: rows out of order inside a window are sorted. `refuse`: an error, as it always is across windows."""
    max_missing_frac: float = Field(default=0.5, ge=0, le=1)
    """Largest share of NaN or infinite values of one column in a window; above it the log is refused."""


class Piece(NamedTuple):
    """Some consecutive rows of a log as a table, and where they come from."""

    table: pa.Table
    place: Place


@runtime_checkable
class Source(Protocol):
    """Anything that gives the rows of a log piece by piece, in the order of its files."""

    @property
    def rows(self) -> int:
        """Rows in all."""
        ...

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        ...

    def check(self, columns: list[str]) -> None:
        """Raise DataError unless every file has all of `columns`."""
        ...

    def pieces(self, start: int, columns: list[str] | None) -> Iterator[Piece]:
        """Yield the rows from row `start` on, with `columns` only (None: all)."""
        ...


class Part(NamedTuple):
    """One row group of one file."""

    file: str
    footer: pq.FileMetaData
    row_group: int
    first_row: int
    rows: int


class ParquetLog:
    """A log in Parquet files, ordered by the first time that their statistics give, else by path.

    Args:
        config: Where the log is.
        time: Name of the time column, for the order of the files.

    Raises:
        ConfigError: The path names nothing.
        DataError: A file cannot be read as Parquet, or files disagree about a column's type.
    """

    def __init__(self, config: LogsConfig, time: str) -> None:
        self._filesystem, files = _find_files(config.path)
        # Over a network few large reads are quicker, at the price of one compressed row group in memory.
        self._remote = not isinstance(self._filesystem, pafs.LocalFileSystem)
        footers = {file: _footer(self._filesystem, file) for file in files}
        physical = _one_schema(footers)
        self._constants = _partitions(files, physical)
        self.schema: pa.Schema = physical
        for key in sorted({key for constants in self._constants.values() for key in constants}):
            self.schema = self.schema.append(pa.field(key, _partition_type(key, self._constants)))
        self.columns: list[str] = list(self.schema.names)
        self._names = [(file, {*_names(footer), *self._constants[file]}) for file, footer in footers.items()]
        self._parts: list[Part] = []
        for file in _in_time_order(footers, time):
            first = 0
            for group in range(footers[file].num_row_groups):
                rows = footers[file].row_group(group).num_rows
                self._parts.append(Part(file, footers[file], group, first, rows))
                first += rows
        self.rows = sum(part.rows for part in self._parts)
        if config.max_rows is not None:
            self.rows = min(self.rows, config.max_rows)
        if not self.rows:
            raise DataError(f"{config.path}: the log is empty (0 rows in {len(files)} file(s))")

    def check(self, columns: list[str]) -> None:
        """Raise DataError unless every file has all of `columns`; the message gives the nearest name."""
        for file, names in self._names:
            for column in columns:
                check_known(column, sorted(names), f"column in {file}, where the schema expects", DataError)

    def pieces(self, start: int = 0, columns: list[str] | None = None) -> Iterator[Piece]:
        """Yield the rows from row `start` on, at most PIECE_ROWS at a time.

        Raises:
            DataError: A row group cannot be decoded; the message names file and row group.
        """
        before = 0
        for part in self._parts:
            end = min(before + part.rows, self.rows)
            if end > start:
                yield from self._read(part, max(start - before, 0), end - before, columns)
            before += part.rows
            if before >= self.rows:
                return

    def _read(self, part: Part, skip: int, stop: int, columns: list[str] | None) -> Iterator[Piece]:
        names = self.columns if columns is None else columns
        stored = set(_names(part.footer)).intersection(names)
        with _arrow_errors(part.file, part.row_group):
            stream = self._filesystem.open_input_file(part.file)
        with stream:
            with _arrow_errors(part.file, part.row_group):
                file = pq.ParquetFile(stream, metadata=part.footer, buffer_size=_BUFFER_BYTES, pre_buffer=self._remote)
                batches = file.iter_batches(PIECE_ROWS, row_groups=[part.row_group], columns=sorted(stored))
            row = 0
            while row < stop:
                with _arrow_errors(part.file, part.row_group):
                    batch = next(batches, None)
                if batch is None:
                    raise DataError(f"{part.file}, row group {part.row_group}: {part.rows} rows promised, {row} found")
                low, high = max(skip - row, 0), min(stop - row, len(batch))
                if low < high:
                    place = Place(part.file, part.row_group, part.first_row + row + low)
                    yield Piece(self._complete(batch.slice(low, high - low), names, place), place)
                row += len(batch)

    def _complete(self, batch: pa.RecordBatch, names: list[str], place: Place) -> pa.Table:
        """Give a batch the log's types, and the columns that its file lacks: partition keys, else nulls."""
        columns: dict[str, pa.Array] = {}
        for name in names:
            kind = self.schema.field(name).type
            if name not in batch.schema.names:
                columns[name] = pa.repeat(pa.scalar(self._constants[place.file].get(name)).cast(kind), len(batch))
                continue
            own = batch.column(name)
            try:
                columns[name] = own if own.type == kind else own.cast(kind)
            except pa.ArrowInvalid as error:
                raise DataError(
                    f"{place.row(0)} and after, column '{name}': {own.type} here, {kind} in other files, and a value "
                    f"does not fit ({error}); write all with one type"
                ) from error
        return pa.table(columns)


@dataclass(frozen=True)
class Cursor:
    """How far a log has been read: everything before `rows`, and `batches` of the window that starts there."""

    rows: int = 0
    window: int = 0
    batches: int = 0
    last_time: int | None = None
    """Time of the last row before the window, in microseconds."""

    def state_dict(self) -> dict[str, int | None]:
        """Return plain numbers for a checkpoint."""
        return {"rows": self.rows, "window": self.window, "batches": self.batches, "last_time": self.last_time}


class Reader:
    """Cuts a source into windows in time order, and windows into batches.

    Args:
        source: Where rows come from.
        schema: What the columns mean.
        config: Windows and batches.
        seed: Seed of the shuffle; the same seed gives the same batches.

    Raises:
        DataError: A column of the schema is not in the log (with the nearest name).
    """

    def __init__(self, source: Source, schema: Schema, config: ReaderConfig, seed: int = 0) -> None:
        truth = all(TRUTH + task in source.columns for task in schema.tasks)
        self.source, self.schema, self.config, self.seed = source, schema, config, seed
        self.encoder = Encoder(schema, truth=truth)
        self.missing = Missing()
        self.left = 0  # batches of the window after the one that was yielded last
        source.check(self.encoder.columns)

    @property
    def rows(self) -> int:
        """Rows of the log."""
        return self.source.rows

    def batches(self, cursor: Cursor | None = None) -> Iterator[tuple[Batch, Cursor]]:
        """Yield each batch with the cursor that resumes after it.

        Raises:
            DataError: A bad value, a row that goes back in time, or too many missing values.
        """
        cursor = cursor or Cursor()
        skip = cursor.batches
        for window, at in self._windows(cursor):
            order = torch.arange(len(window))
            if self.config.shuffle:
                order = torch.randperm(len(window), generator=_generator(self.seed, at.window))
            pieces = order.split(self.config.batch_size)
            for i in range(skip, len(pieces)):
                self.left = len(pieces) - i - 1
                yield window.take(pieces[i]), Cursor(at.rows, at.window, i + 1, at.last_time)
            skip = 0

    def in_order(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Batch]:
        """Yield the log as it lies in its files, a piece at a time, to score; `progress` gets rows done, and all."""
        rows = 0
        for table, place in self.source.pieces(0, self.encoder.columns):
            batch, counted = self.encoder.encode(table, place, rows)
            self.missing.add(counted)
            yield batch
            rows += len(batch)
            if progress is not None:
                progress(rows, self.rows)

    def _windows(self, cursor: Cursor) -> Iterator[tuple[Batch, Cursor]]:
        """Yield windows sorted by time, each with the cursor of its own start."""
        held: list[tuple[Batch, Place]] = []
        missing, current = Missing(), None
        for key, piece in self._slices(cursor.rows):
            if held and key != current:
                self._check_missing(missing, held)
                yield self._ordered(held, cursor), cursor
                self.missing.add(missing)  # after the window, which a resumed run may read, and count, again
                cursor = self._after(held, cursor)
                held, missing = [], Missing()
            first = cursor.rows + sum(len(batch) for batch, _ in held)
            batch, counted = self.encoder.encode(piece.table, piece.place, first)
            held.append((batch, piece.place))
            missing.add(counted)
            current = key
        if held:
            self._check_missing(missing, held)
            yield self._ordered(held, cursor), cursor
            self.missing.add(missing)

    def _slices(self, row: int) -> Iterator[tuple[int, Piece]]:
        """Yield the pieces from row `row` on, cut where a window ends, each with the number of its window."""
        span = int((self.config.window_hours or 0) * US_PER_HOUR)
        latest = None
        for table, place in self.source.pieces(row, self.encoder.columns):
            if span:
                hours = self.encoder.times(table, place) // span
                latest = hours[0] if latest is None else latest
                # A row from an earlier hour stays in the window that has begun; `_ordered` judges it.
                keys = np.maximum.accumulate(np.maximum(hours, latest))
                latest = keys[-1]
            else:
                keys = np.arange(row, row + len(table)) // self.config.window_rows
            starts = [0, *(np.flatnonzero(np.diff(keys)) + 1).tolist(), len(table)]
            for low, high in itertools.pairwise(starts):
                yield int(keys[low]), Piece(table.slice(low, high - low), place.after(low))
            row += len(table)

    def _ordered(self, window: list[tuple[Batch, Place]], cursor: Cursor) -> Batch:
        """Join the pieces of a window in time order, or say which row goes back in time."""
        batch = Batch.cat([b for b, _ in window])
        if cursor.last_time is not None:
            back = batch.time < cursor.last_time
            if bool(back.any()):
                raise DataError(
                    f"{_place_of(window, int(back.int().argmax()))}: time goes back to "
                    f"{_show(int(batch.time[back][0]))}, after a window that ended at {_show(cursor.last_time)}; "
                    "sort the log by its time column, or make the window (reader.window_rows, window_hours) larger"
                )
        falls = batch.time.diff() < 0
        if not bool(falls.any()):
            return batch
        if self.config.unsorted == "refuse":
            row = int(falls.int().argmax()) + 1
            raise DataError(
                f"{_place_of(window, row)}: time goes back from {_show(int(batch.time[row - 1]))} to "
                f"{_show(int(batch.time[row]))}; sort the log, or set reader.unsorted = 'sort'"
            )
        return batch.take(torch.argsort(batch.time, stable=True))

    def _after(self, window: list[tuple[Batch, Place]], cursor: Cursor) -> Cursor:
        rows = sum(len(batch) for batch, _ in window)
        last = max(int(batch.time.max()) for batch, _ in window)
        return Cursor(cursor.rows + rows, cursor.window + 1, 0, last)

    def _check_missing(self, missing: Missing, window: list[tuple[Batch, Place]]) -> None:
        """Refuse a window with too many non-finite values, unless it is a short one amid longer ones."""
        if missing.rows < min(_MIN_ROWS_FOR_SHARE, self.config.window_rows, self.rows):
            return
        for column, count in missing.non_finite.items():
            share = min(1.0, count / missing.rows)  # a list may hold several in one row
            if share > self.config.max_missing_frac:
                raise DataError(
                    f"{window[0][1].row(0)} and after, column '{column}': {share:.0%} of {missing.rows:,} values are "
                    f"NaN or infinite, more than reader.max_missing_frac = {self.config.max_missing_frac}"
                )


def _generator(seed: int, window: int) -> torch.Generator:
    """A generator for one window, so that a resumed run shuffles it as the first one did."""
    state = np.random.SeedSequence([seed, window]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


def _place_of(window: list[tuple[Batch, Place]], row: int) -> str:
    """Name a row of a window that has not been sorted."""
    for batch, place in window:
        if row < len(batch):
            return place.row(row)
        row -= len(batch)
    return window[-1][1].file


def _show(time_us: int) -> str:
    return str(np.datetime64(time_us, "us")).removesuffix(".000000")


def _find_files(path: str) -> tuple[pafs.FileSystem, list[str]]:
    """Return the file system of a path and the Parquet files under it, sorted."""
    folder, pattern = path, ""
    if "://" not in path:
        folder = str(Path(path).expanduser().absolute())
    if "*" in path:
        folder, pattern = _split_glob(folder)
    try:
        filesystem, root = (pafs.LocalFileSystem(), folder) if "://" not in path else pafs.FileSystem.from_uri(folder)
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.NotFound:
            raise ConfigError(f"data.path: there is no file or folder '{path}'{near_path(path)}")
        if info.type == pafs.FileType.File:
            return filesystem, [root]
        found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"data.path: '{path}' cannot be read: {error}") from error
    inside = {f.path: f.path[len(root) :].strip("/") for f in found if f.type == pafs.FileType.File}
    wanted = _glob(pattern)
    files = sorted(file for file, name in inside.items() if _is_data(name) and wanted.fullmatch(name))
    if not files:
        raise ConfigError(
            f"data.path: no Parquet file (*.parquet, *.pq) under '{path}'; `steadyrank convert` makes them"
        )
    return filesystem, files


def _split_glob(path: str) -> tuple[str, str]:
    """Split a path before the first name with a star; a URI's options stay with the folder."""
    path, mark, options = path.partition("?") if "://" in path else (path, "", "")
    folder = path[: path.index("*")].rpartition("/")[0]
    return (folder or "/") + mark + options, path[len(folder) + 1 :]


def _glob(pattern: str) -> re.Pattern[str]:
    """Return what matches the files of a glob, and all files in a folder that it names; "" matches every file."""
    if not pattern:
        return re.compile(".*", re.DOTALL)
    regex = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
    return re.compile(regex + "(?:/.*)?", re.DOTALL)


def _is_data(name: str) -> bool:
    return name.endswith((".parquet", ".pq")) and not any(part.startswith((".", "_")) for part in name.split("/"))


def _names(footer: pq.FileMetaData) -> list[str]:
    return list(footer.schema.to_arrow_schema().names)


def _one_schema(footers: dict[str, pq.FileMetaData]) -> pa.Schema:
    """Return the columns of all files, each with a type that holds what every file has."""
    schemas = {file: footer.schema.to_arrow_schema().remove_metadata() for file, footer in footers.items()}
    joined: pa.Schema | None = None
    for file, schema in schemas.items():
        doubled = next((name for name in schema.names if schema.names.count(name) > 1), None)
        if doubled is not None:
            raise DataError(f"{file}: two columns are named '{doubled}'; rename one")
        try:
            joined = schema if joined is None else pa.unify_schemas([joined, schema], promote_options="permissive")
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise DataError(
                f"{file}: a column has another type than in the files before it ({error}); write all with one type"
            ) from error
    assert joined is not None, "a log has at least one file"
    return joined


def _partitions(files: list[str], physical: pa.Schema) -> dict[str, dict[str, str | None]]:
    """Return the keys in each file's folders (`date=2024-01-01`) that are no column of the files."""
    folders = {part.partition("=")[0] for file in files for part in file.split("/")[:-1] if "=" in part}
    keys = sorted(folders.difference(physical.names))
    parse = ds.partitioning(pa.schema([(key, pa.string()) for key in keys]), flavor="hive").parse
    return {file: ds.get_partition_keys(parse(file)) for file in files}


def _partition_type(key: str, constants: dict[str, dict[str, str | None]]) -> pa.DataType:
    """Return the first type that every value of a partition key can take."""
    values = pa.array([own.get(key) for own in constants.values()], pa.string())
    for kind in (pa.int64(), pa.date32()):
        with suppress(pa.ArrowInvalid):
            values.cast(kind)
            return kind
    return pa.string()


def _footer(filesystem: pafs.FileSystem, file: str) -> pq.FileMetaData:
    with _arrow_errors(file, None), filesystem.open_input_file(file) as stream:
        footer = pq.read_metadata(stream)
        _names(footer)  # a spoiled name shows here
        return footer


def _in_time_order(footers: dict[str, pq.FileMetaData], time: str) -> list[str]:
    """Return the files with rows by their first time, or by name where a file does not tell its own."""
    files = sorted(file for file, footer in footers.items() if footer.num_rows)
    starts: dict[str, Any] = {}
    for file in files if len(files) > 1 else []:
        with _arrow_errors(file, None):
            starts[file] = _first_time(footers[file], time)
    return files if None in starts.values() else sorted(files, key=starts.get)  # type: ignore[arg-type]  # one type


def _first_time(footer: pq.FileMetaData, time: str) -> Any | None:
    """Return the smallest time of a file as its statistics give it, None where a row group has none."""
    index = next((i for i in range(footer.num_columns) if footer.schema.column(i).path == time), None)
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    lows: list[Any] = []
    for group in (group for group in groups if group.num_rows):
        found = group.column(index).statistics if index is not None else None
        if found is None or not found.has_min_max:
            return None
        # Raw, as the next file may hold another unit, and `min` needs pandas for nanoseconds.
        ticks = _NS_PER_UNIT.get(json.loads(found.logical_type.to_json()).get("timeUnit"))
        lows.append(found.min if ticks is None else found.min_raw * ticks)
    return min(lows)


@contextmanager
def _arrow_errors(file: str, row_group: int | None) -> Iterator[None]:
    """Turn Arrow's errors into a DataError that names the file and the row group."""
    where = file if row_group is None else f"{file}, row group {row_group}"
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{where}: not readable as Parquet, perhaps truncated or corrupt ({reason}); "
            "write it again, or leave it out of data.path"
        ) from error
