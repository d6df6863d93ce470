"""Parquet to Batches: a log of files that may grow, and be read on.

Memory is bounded by the window: a log is read in pieces of at most `PIECE_ROWS` rows.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import Field

from ..errors import ConfigError, DataError, check_known
from ..settings import Settings
from .columns import Place
from .parquet import Folder, LogFile, arrow_errors, check_indices, in_time_order, join_schemas, key_type, open_file
from .reader import Cursor as Cursor
from .reader import Reader as Reader
from .reader import ReaderConfig as ReaderConfig
from .source import FileNote as FileNote
from .source import Piece as Piece
from .source import Source as Source
from .source import Unit

PIECE_ROWS = 65_536
# A column's chunk of a large file is read through a buffer: Arrow would else hold a whole row group. Not so that of a
# small file: through a buffer Arrow takes all that a page is said to need, up to 2 GB, before it finds it missing.
_SMALL_BYTES, _BUFFER_BYTES = 16 << 20, 1 << 20


class LogsConfig(Settings):
    """Where the log is."""

    source: Literal["logs"] = "logs"
    path: str
    """A Parquet file, a folder of them (date-partitioned or not) or a glob (`*` inside a name, `**` across folders);
    local, `s3://` or `gs://`."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read at most so many rows, from the start."""


class _Part(NamedTuple):
    """One row group of one file; of a file that is gone, all its rows."""

    file: LogFile
    row_group: int
    first_row: int
    rows: int


class _LeftOut(NamedTuple):
    """A file that is not read, as it was when that was reported."""

    kind: str
    size: int
    mark: str


class ParquetLog:
    """A log in Parquet files, ordered by the first time that their statistics give, else by path.

    Args:
        config: Where the log is.
        time: Name of the time column, for the order of the files.
        lenient: Pass over files that are no Parquet or do not fit the others, until `refresh` reports them: for a run
            that follows a growing log, or goes on with one.

    Raises:
        ConfigError: The path names nothing.
        DataError: A file cannot be read as Parquet, or files disagree about a column's type.
    """

    schema: pa.Schema
    rows: int
    columns: list[str]

    def __init__(self, config: LogsConfig, time: str, *, lenient: bool = False) -> None:
        self._config, self._time, self._lenient = config, time, lenient
        self._folder = Folder(config.path)
        # Over a network few large reads are quicker, at the price of one compressed row group in memory.
        self._remote = not isinstance(self._folder.filesystem, pafs.LocalFileSystem)
        self._needed: list[str] = []
        self._left_out: dict[str, _LeftOut] = {}
        self._unreadable: dict[str, int] = {}  # bytes, at the last look, of files that could not be read
        sizes = self._folder.look()
        if not sizes:
            raise ConfigError(
                f"data.path: no Parquet file (*.parquet, *.pq) under '{config.path}'; `steadyrank convert` makes them"
            )
        self._set_files(in_time_order(self._open_fitting(sizes)))
        if not self.rows:
            raise DataError(f"{config.path}: the log is empty (0 rows in {len(self._files)} file(s))")

    def check(self, columns: list[str]) -> None:
        """Raise DataError unless every file has all of `columns`; the message gives the nearest name."""
        fitting: list[LogFile] = []
        for file in self._files:
            try:
                self._check_columns(file, columns)
                fitting.append(file)
            except DataError:
                if not self._lenient or (not fitting and file is self._files[-1]):
                    raise
        self._needed = columns
        if len(fitting) < len(self._files):
            self._set_files(fitting)

    def pieces(self, start: int = 0, columns: list[str] | None = None) -> Iterator[Piece]:
        """Yield the rows from row `start` on, at most PIECE_ROWS at a time.

        Raises:
            DataError: A row group cannot be decoded, or its file is gone; the message names file and row group.
        """
        before = 0
        for part in self._parts:
            end = min(before + part.rows, self.rows)
            if end > start:
                yield from self._read(part, max(start - before, 0), end - before, columns)
            before += part.rows
            if before >= self.rows:
                return

    def units(self) -> list[Unit]:
        """Return the row groups of all files, as far as the log goes."""
        found, first = list[Unit](), 0
        for part in self._parts:
            rows = min(part.rows, self.rows - first)
            if rows > 0:
                found.append(Unit(first, rows))
            first += rows
        return found

    def refresh(self) -> list[FileNote]:
        """Look again under the path and take what is new: after all known files, in time order among themselves.

        A file that is left out is reported once. One that cannot be read may still be being written: it is tried again
        each time, and reported when it has not grown since the look before.

        Returns:
            A note for each file that was taken or left out.

        Raises:
            ConfigError: The path cannot be read at all.
        """
        if self._config.max_rows is not None and self.rows >= self._config.max_rows:
            return []
        found, notes = self._look_for_new()
        ended = max((file.last_time for file in self._files if file.last_time is not None), default=None)
        files = list(self._files)
        for file in in_time_order(found):
            note = self._judge(file, files, ended)
            if note.kind == "new":
                files.append(file)
                self.schema = join_schemas(self.schema, file)
            else:
                self._left_out[file.name] = _LeftOut(note.kind, file.size, file.mark)
            notes.append(note)
        if len(files) > len(self._files):
            self._set_files(files)
        return notes

    def state_dict(self) -> dict[str, Any]:
        """Return the files in their order and those that were left out, as plain lists."""
        return {
            "files": [[file.name, file.rows, file.mark, file.last_time] for file in self._files],
            "left_out": [[name, *left_out] for name, left_out in self._left_out.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any], rows_done: int, rows_read: int | None) -> list[FileNote]:
        """Take the files in the order in which they were known, then new ones as `refresh` does.

        Args:
            state: What `state_dict` returned.
            rows_done: Rows from the start that will not be read again: their files may be gone.
            rows_read: Rows that were read: a file after them may have changed, and is then taken as a new one. None to
                have just what another process has.

        Returns:
            A note for each file that is new, or left out.

        Raises:
            DataError: A file that is needed changed or is gone.
        """
        there = {file.name: file for file in self._files}
        for name in self._folder.look().keys() & {name for name, *_ in state["files"]} - there.keys():
            with suppress(DataError):
                there[name] = open_file(self._folder, name, self._time)
        files, first = list[LogFile](), 0
        for name, rows, mark, last_time in state["files"]:
            file = there.get(name)
            if file is not None and (file.rows, file.mark) == (rows, mark):
                files.append(file)
            elif rows_read is not None and first >= rows_read:
                continue  # nothing was learned from it: what is there now will do
            elif file is None and first + rows <= rows_done:
                files.append(LogFile(name, self._folder.path(name), rows, mark, last_time))
            else:
                what = "is gone, or no Parquet any more" if file is None else "has changed"
                raise DataError(
                    f"{self._folder.path(name)}: {what} since the run read it (rows {first:,} to {first + rows - 1:,} "
                    "of its log), so that it cannot go on where it was; put it back as it was, or start a new run"
                )
            first += rows
        self._left_out = {name: _LeftOut(*rest) for name, *rest in state["left_out"]}
        self._set_files(files)
        return [] if rows_read is None else self.refresh()

    def _open_fitting(self, sizes: Mapping[str, int]) -> list[LogFile]:
        """Open files; pass over those that cannot be read or joined with the others, where the log is lenient."""
        files: list[LogFile] = []
        schema, refusal = pa.schema([]), None
        for name, size in sizes.items():
            try:
                file = open_file(self._folder, name, self._time)
                schema = join_schemas(schema, file)
                files.append(file)
            except DataError as error:
                if not self._lenient:
                    raise
                self._unreadable[name] = size  # or a misfit, which is seen at the next look
                refusal = refusal or error
        if refusal is not None and not files:
            raise refusal
        return files

    def _set_files(self, files: list[LogFile]) -> None:
        """Make these the log, in this order."""
        self._files = files
        there = [file for file in files if file.footer is not None]
        self.schema = pa.schema([])
        for file in there:
            self.schema = join_schemas(self.schema, file)
        keys = {key for file in there for key in file.keys}.difference(self.schema.names)
        self._keys = {key: key_type(key, there) for key in sorted(keys)}
        for key, kind in self._keys.items():
            self.schema = self.schema.append(pa.field(key, kind))
        self.columns = list(self.schema.names)
        self._parts = [part for file in files for part in _parts(file)]
        self.rows = sum(part.rows for part in self._parts)
        if self._config.max_rows is not None:
            self.rows = min(self.rows, self._config.max_rows)

    def _check_columns(self, file: LogFile, columns: list[str]) -> None:
        stored = set(self.schema.names) - self._keys.keys()  # a column of any file hides the key of its name
        names = {*file.schema.names, *(file.keys.keys() - stored)} if file.footer is not None else columns
        for column in columns:
            check_known(column, sorted(names), f"column in {file.path}, where the schema expects", DataError)

    def _look_for_new(self) -> tuple[list[LogFile], list[FileNote]]:
        """Open the files that are neither known nor left out; note those that cannot be read."""
        found, notes = list[LogFile](), list[FileNote]()
        known, unreadable = {file.name for file in self._files}, self._unreadable
        self._unreadable = {}
        for name, size in self._folder.look().items():
            before = self._left_out.get(name)
            if name in known or (before is not None and before.kind != "unreadable" and before.size == size):
                continue
            try:
                file = open_file(self._folder, name, self._time)
            except DataError as error:
                self._unreadable[name] = size
                now = _LeftOut("unreadable", size, "")
                if unreadable.get(name) == size and before != now:
                    self._left_out[name] = now
                    notes.append(FileNote("unreadable", self._folder.path(name), str(error), 0))
                continue
            if before is None or before.mark != file.mark:
                self._left_out.pop(name, None)
                found.append(file)
        return found, notes

    def _judge(self, file: LogFile, files: list[LogFile], ended: int | float | None) -> FileNote:
        """Say whether a file can be appended to `files`, whose last time before this look was `ended`."""

        def note(kind: Literal["new", "duplicate", "late", "misfit"], message: str) -> FileNote:
            return FileNote(kind, file.path, message, file.rows)

        twin = next((known for known in files if _are_twins(known, file)), None)
        if twin is not None:
            return note("duplicate", f"{file.path}: left out, the same as {twin.path}; delete one of the two")
        try:
            self._check_fit(file)
        except DataError as error:
            return note("misfit", f"{error}. It was left out; write it again")
        if file.first_time is not None and ended is not None and file.first_time < ended:
            return note(
                "late",
                f"{file.path}: left out, since it begins at {self._show(file, file.first_time)}, and the log was known "
                f"up to {self._show(file, ended)} before it came; a new run reads it in its place",
            )
        return note("new", f"{file.path}: {file.rows:,} new rows")

    def _check_fit(self, file: LogFile) -> None:
        """Raise DataError unless the columns of a file can be read beside those of the log."""
        self._check_columns(file, self._needed)
        join_schemas(self.schema, file)
        for key, kind in self._keys.items():
            try:
                pa.scalar(file.keys.get(key)).cast(kind)
            except pa.ArrowInvalid as error:
                raise DataError(f"{file.path}: the folders' key '{key}' is {kind} in other files ({error})") from error

    def _show(self, file: LogFile, time: int | float) -> str:
        kind = file.schema.field(self._time).type
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            return str(np.datetime64(int(time), "ns"))
        return f"{self._time} = {time}"

    def _read(self, part: _Part, skip: int, stop: int, columns: list[str] | None) -> Iterator[Piece]:
        path, footer = part.file.path, part.file.footer
        if footer is None:
            raise DataError(f"{path}: is gone, and {part.rows:,} rows of the log with it; put it back to read them")
        names = self.columns if columns is None else columns
        stored = set(part.file.schema.names).intersection(names)
        with arrow_errors(path, part.row_group):
            stream = self._folder.filesystem.open_input_file(path)
        with stream:
            with arrow_errors(path, part.row_group):
                if stream.size() != part.file.size:
                    raise ValueError(f"{part.file.size:,} bytes when the log was opened, {stream.size():,} now")
                file = pq.ParquetFile(
                    stream,
                    metadata=footer,
                    page_checksum_verification=True,
                    buffer_size=_BUFFER_BYTES if part.file.size > _SMALL_BYTES else 0,
                    pre_buffer=self._remote,
                )
                batches = file.iter_batches(PIECE_ROWS, row_groups=[part.row_group], columns=sorted(stored))
            row = 0
            while row < stop:
                with arrow_errors(path, part.row_group):
                    batch = next(batches, None)
                    if batch is not None:
                        check_indices(batch)
                if batch is None:
                    raise DataError(f"{path}, row group {part.row_group}: {part.rows} rows promised, {row} found")
                low, high = max(skip - row, 0), min(stop - row, len(batch))
                if low < high:
                    place = Place(path, part.row_group, part.first_row + row + low)
                    yield Piece(self._complete(batch.slice(low, high - low), names, part.file, place), place)
                row += len(batch)

    def _complete(self, batch: pa.RecordBatch, names: list[str], file: LogFile, place: Place) -> pa.Table:
        """Give a batch the log's types, and the columns that its file lacks: folder keys, else nulls."""
        columns: dict[str, pa.Array] = {}
        for name in names:
            kind = self.schema.field(name).type
            if name not in batch.schema.names:
                value = file.keys.get(name) if name in self._keys else None
                columns[name] = pa.repeat(pa.scalar(value).cast(kind), len(batch))
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


def _parts(file: LogFile) -> Iterator[_Part]:
    if file.footer is None:
        yield _Part(file, 0, 0, file.rows)
        return
    first = 0
    for group in range(file.footer.num_row_groups):
        rows = file.footer.row_group(group).num_rows
        yield _Part(file, group, first, rows)
        first += rows


def _are_twins(known: LogFile, file: LogFile) -> bool:
    """Return whether two files hold the same; of one that is gone the folders' keys are not known."""
    return known.mark == file.mark and (known.footer is None or known.keys == file.keys)
