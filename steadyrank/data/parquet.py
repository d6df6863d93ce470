"""Parquet files: found under a path, their footers read and told apart, their columns joined.

What Arrow raises over a file becomes a DataError that names it.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ..errors import ConfigError, DataError, near_path

_TAIL_BYTES = 1 << 16
_NS_PER_UNIT = {"milliseconds": 1_000_000, "microseconds": 1_000, "nanoseconds": 1}
_NS_PER_DAY = 86_400_000_000_000
_WIDTHS = {"INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8}


class Folder:
    """The Parquet files under a path, which may change between two looks.

    Args:
        path: A file, a folder or a glob; local or a URI.

    Raises:
        ConfigError: There is no such file system.
    """

    def __init__(self, path: str) -> None:
        self._path, self._target, pattern = path, path, ""
        if "://" not in path:
            self._target = str(Path(path).expanduser().absolute())
        if "*" in path:
            self._target, pattern = _split_glob(self._target)
        self._wanted = _glob(pattern)
        self.filesystem: pafs.FileSystem = pafs.LocalFileSystem()
        with self._config_errors():
            if "://" in path:
                self.filesystem, self._target = pafs.FileSystem.from_uri(self._target)
        self._root = f"{self._target.rstrip('/')}/"

    def look(self) -> dict[str, int]:
        """Return the bytes of each Parquet file by its name below the folder, in the order of names.

        Raises:
            ConfigError: The path names nothing, or cannot be read.
        """
        with self._config_errors():
            info = self.filesystem.get_file_info(self._target)
            if info.type == pafs.FileType.NotFound:
                raise ConfigError(f"data.path: there is no file or folder '{self._path}'{near_path(self._path)}")
            if info.type == pafs.FileType.File:
                name = self._target.rpartition("/")[2]
                self._root = self._target.removesuffix(name)
                return {name: info.size}
            found = self.filesystem.get_file_info(pafs.FileSelector(self._target, recursive=True))
        sizes = {f.path.removeprefix(self._root): f.size for f in found if f.type == pafs.FileType.File}
        return {name: sizes[name] for name in sorted(sizes) if _is_data(name) and self._wanted.fullmatch(name)}

    def path(self, name: str) -> str:
        """Return where the file of that name lies."""
        return self._root + name

    @contextmanager
    def _config_errors(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ConfigError(f"data.path: '{self._path}' cannot be read: {error}") from error


@dataclass(frozen=True)
class LogFile:
    """One file of a log, as its footer describes it."""

    name: str
    """Below the log's folder, so that the folder may be moved."""
    path: str
    rows: int
    mark: str
    """The same for files with the same content."""
    last_time: int | float | None = None
    """Time of its last row, where the statistics tell: nanoseconds since 1970, or as the column counts."""
    first_time: int | float | None = None
    size: int = 0
    footer: pq.FileMetaData | None = None
    """None for a file that is gone, and whose rows are counted still."""
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    keys: dict[str, str | None] = field(default_factory=dict)
    """Values that the names of its folders give: `date=2026-01-31`."""


def open_file(folder: Folder, name: str, time: str) -> LogFile:
    """Read the footer of a file.

    Args:
        folder: Where the file lies.
        name: Its name below the folder.
        time: Name of the time column.

    Raises:
        DataError: It is no Parquet file, or a spoiled one.
    """
    path = folder.path(name)
    with arrow_errors(path, None):
        with folder.filesystem.open_input_file(path) as stream:
            size = stream.size()
            tail = _tail(stream, size, _TAIL_BYTES)
            length = int.from_bytes(tail[-8:-4], "little") + 8
            if len(tail) < length <= size:
                tail = _tail(stream, size, length)
        footer = pq.read_metadata(pa.BufferReader(tail))
        counts = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        if sum(counts) != footer.num_rows or min(counts, default=0) < 0:
            raise ValueError(f"{footer.num_rows:,} rows in all, but {sum(counts):,} in its row groups")
        schema = footer.schema.to_arrow_schema().remove_metadata()  # a spoiled name shows here
        first, last = _time_span(footer, time, size) or (None, None)
    # Sizes, offsets, statistics and the last values: the whole file need not be read to tell it from others.
    mark = hashlib.blake2b(tail, digest_size=16).hexdigest()
    keys = _folder_keys(path, schema)
    return LogFile(name, path, footer.num_rows, mark, last, first, size, footer, schema, keys)


def _tail(stream: pa.NativeFile, size: int, length: int) -> bytes:
    stream.seek(max(size - length, 0))
    return bytes(stream.read(min(size, length)))


def in_time_order(files: Iterable[LogFile]) -> list[LogFile]:
    """Order files by their first time, or by name where one of them does not tell its own; the empty ones last."""
    files = sorted(files, key=lambda file: (not file.rows, file.name))
    if any(file.first_time is None for file in files if file.rows):
        return files
    return sorted(files, key=lambda file: (not file.rows, file.first_time or 0))


def join_schemas(known: pa.Schema, file: LogFile) -> pa.Schema:
    """Return the columns of the files so far and of one more, each with a type that holds both.

    Raises:
        DataError: Two columns have one name, or no type holds both.
    """
    names = file.schema.names
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise DataError(f"{file.path}: two columns are named '{doubled}'; rename one")
    try:
        return pa.unify_schemas([known, file.schema], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{file.path}: a column has another type than in the files before it ({error}); write all with one type"
        ) from error


def key_type(name: str, files: Iterable[LogFile]) -> pa.DataType:
    """Return the first type that every value of a folder key can take."""
    values = pa.array([file.keys.get(name) for file in files], pa.string())
    for kind in (pa.int64(), pa.date32()):
        with suppress(pa.ArrowInvalid):
            values.cast(kind)
            return kind
    return pa.string()


def check_indices(batch: pa.RecordBatch) -> None:
    """Raise ArrowInvalid where an index points past its dictionary, as Arrow lets spoiled files have it.

    Most of what Arrow does with such a column would end the process.
    """
    arrays = list(batch.columns)
    while arrays:
        array = arrays.pop()
        if pa.types.is_dictionary(array.type):
            low, high = (end.as_py() for end in pc.min_max(array.indices).values())
            if high is not None and not 0 <= low <= high < len(array.dictionary):
                raise pa.ArrowInvalid(f"index {high:,} of a dictionary that holds {len(array.dictionary):,} values")
        elif pa.types.is_struct(array.type):
            arrays += array.flatten()
        elif pa.types.is_nested(array.type):
            arrays.append(array.values)


@contextmanager
def arrow_errors(file: str, row_group: int | None) -> Iterator[None]:
    """Turn Arrow's errors into a DataError that names the file and the row group."""
    where = file if row_group is None else f"{file}, row group {row_group}"
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, ArithmeticError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{where}: not readable as Parquet, perhaps truncated or corrupt ({reason}); "
            "write it again, or leave it out of data.path"
        ) from error


class _OnePage(io.RawIOBase):
    """Stands for a file of that size: wherever it is read first, there is `page`, and then nothing more."""

    def __init__(self, size: int, page: bytes) -> None:
        self.size, self.at, self.page, self.left = size, 0, page, page

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int = -1, /) -> bytes:
        given, self.left = self.left[:size], self.left[size:]
        self.at += len(given)
        return given


def _page(width: int, nullable: bool) -> bytes:
    """Return a data page of one row, null where it may be, that suits every codec (Parquet's DataPageHeaderV2)."""
    values = b"\2\0" if nullable else bytes(width)  # a run of one level, 0; or one value, 0
    size, nulls, levels = 2 * len(values), 2 * nullable, 4 * nullable  # Thrift's compact protocol doubles them
    head = [0x15, 6, 0x15, size, 0x15, size, 0x5C, 0x15, 2, 0x15, nulls, 0x15, 2, 0x15, 0, 0x15, levels, 0x15, 0, 0x12]
    return bytes([*head, 0, 0]) + values


def _check_column(footer: pq.FileMetaData, index: int, size: int) -> bool:
    """Raise Arrow's error where the footer tells nonsense about a column; return whether that could be seen.

    Asked for the statistics of a spoiled footer, Arrow would not raise but end the process. When it reads values, it
    takes up the same parts of the footer, and raises: it is given a made-up page, so that nothing need be read.
    """
    column = footer.schema.column(index)
    page = _page(_WIDTHS[column.physical_type], column.max_definition_level > 0)
    file = _OnePage(size, page)
    reader = pq.ParquetFile(pa.PythonFile(file, "r"), metadata=footer, buffer_size=len(page), pre_buffer=False)
    for i in range(footer.num_row_groups):
        file.left = page
        reader.read_row_group(i, columns=[column.path], use_threads=False)
        chunk = footer.row_group(i).column(index)
        if chunk.physical_type != column.physical_type:  # this ends the process, too
            raise ValueError(f"column '{column.path}' is {chunk.physical_type} in a row group only")
        if chunk.total_compressed_size < len(page):
            return False
    return True


def _time_span(footer: pq.FileMetaData, time: str, size: int) -> tuple[int | float, int | float] | None:
    """Return the first and the last time of a file as its statistics give them, None where a row group has none."""
    index = next((i for i in range(footer.num_columns) if footer.schema.column(i).path == time), None)
    if index is None or not _is_plain(footer.schema.column(index)) or not _check_column(footer, index, size):
        return None
    times: list[int | float] = []
    for group in (footer.row_group(i) for i in range(footer.num_row_groups)):
        if not group.num_rows:
            continue
        found = group.column(index).statistics
        if found is None or not found.has_min_max:
            return None
        # Raw, as the next file may hold another unit, and `min` needs pandas for nanoseconds.
        kind = json.loads(found.logical_type.to_json())
        ticks = _NS_PER_DAY if kind.get("Type") == "Date" else _NS_PER_UNIT.get(kind.get("timeUnit"))
        span = (found.min, found.max) if ticks is None else (found.min_raw * ticks, found.max_raw * ticks)
        if not all(isinstance(end, int | float) for end in span):
            return None
        times += span
    return (min(times), max(times)) if times else None


def _is_plain(column: pq.ColumnSchema) -> bool:
    """Return whether a column holds one number a row."""
    return column.physical_type in _WIDTHS and column.max_repetition_level == 0 and column.max_definition_level < 2


def _folder_keys(path: str, physical: pa.Schema) -> dict[str, str | None]:
    """Return the keys in a file's folders (`date=2024-01-01`) that are no column of it."""
    keys = {part.partition("=")[0] for part in path.split("/")[:-1] if "=" in part}.difference(physical.names)
    parse = ds.partitioning(pa.schema([(key, pa.string()) for key in sorted(keys)]), flavor="hive").parse
    found: dict[str, str | None] = ds.get_partition_keys(parse(path))
    return found


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
