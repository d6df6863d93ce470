"""CSV and JSON lines to Parquet, block by block; nothing is held but the block, unless the rows must be sorted."""

import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from ..errors import ConfigError, DataError, check_known, near_path
from .parquet import check_indices

BLOCK_BYTES = 16 << 20
_SUFFIXES = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": "", ".json": "", ".parquet": ""}
# What a CSV column may become when a value does not fit; never back up, so that re-reading ends.
_LADDER = (
    pa.int64(),
    pa.float64(),
    pa.bool_(),
    pa.timestamp("us"),
    pa.timestamp("ns"),
    pa.timestamp("ns", "UTC"),
    pa.string(),
)
_MISFIT = re.compile(r"In CSV column #(\d+): .*?CSV conversion error to (.+?): invalid value '(.*)'", re.DOTALL)
_BOM = b"\xef\xbb\xbf"
_NULLS = ["", "NULL", "null", "NA", "N/A", "NaN", "nan", "None", "\\N"]

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and in all."""


class _WiderTypeError(Exception):
    """A column needs a wider type: read the file again."""


def convert(
    source: str | Path,
    target: str | Path,
    *,
    sort: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a CSV, TSV or JSON-lines file (gzip, bz2 or zstd, too) as Parquet, and return its rows.

    The target appears only when it is complete. Column types come from the first block; a column that later holds
    something wider (a number with a point, a text) is widened and the file read again.

    Args:
        source: `.csv`, `.tsv`, `.jsonl`, `.ndjson`, `.json` (one object a line) or `.parquet`, perhaps compressed.
        target: The Parquet file to write.
        sort: A column to sort by, in memory; the trainer wants logs in time order.
        overwrite: Replace an existing target.
        progress: Called after each block.

    Raises:
        ConfigError: A path that is wrong, or a target that exists.
        DataError: The source cannot be parsed; the message names the row or column.
    """
    source, target = Path(source), Path(target)
    kind = _kind(source)
    if target.exists() and not overwrite:
        raise ConfigError(f"'{target}' exists; give --overwrite to replace it, or another name")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder '{target.parent}' to write '{target.name}' into")
    part = target.with_name(f".{target.name}.part")
    types: dict[str, pa.DataType] = {}
    rows = -1
    try:
        while rows < 0:
            try:
                rows = _write(_blocks(source, kind, types, progress), part, sort)
            except _WiderTypeError:
                continue
            except pa.ArrowInvalid as error:
                if not _widen(str(error), source, types):
                    raise
        if rows == 0:
            raise DataError("the file holds no row")
        os.replace(part, target)
    except (DataError, pa.ArrowException, UnicodeError) as error:
        raise DataError(f"{source}: {_first_line(error)}") from error
    except OSError as error:
        raise DataError(f"{source} to {target}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return rows


def _kind(source: Path) -> str:
    """Return the suffix that says how to parse, compression left aside."""
    if not source.is_file():
        raise ConfigError(f"there is no file '{source}'{near_path(source)}")
    suffixes = [s for s in map(str.lower, source.suffixes) if s not in (".gz", ".bz2", ".zst")]
    suffix = suffixes[-1] if suffixes else ""
    check_known(suffix, _SUFFIXES, "reader for files ending in")
    return suffix


def _write(blocks: Iterator[pa.Table], part: Path, sort: str | None) -> int:
    if sort is not None:
        tables = list(blocks)
        if not tables:
            return 0
        table = pa.concat_tables(tables, promote_options="permissive")
        check_known(sort, table.schema.names, "column to sort by", DataError)
        if pa.types.is_nested(table.schema.field(sort).type):  # an empty struct even crashes Arrow
            raise DataError(f"column '{sort}' holds {table.schema.field(sort).type}; sort by a time, number or text")
        blocks = iter([table.sort_by(sort)])
    rows, writer = 0, None
    try:
        for table in blocks:
            if writer is None:
                writer = pq.ParquetWriter(part, table.schema, compression="zstd", write_page_checksum=True)
            writer.write_table(table.cast(writer.schema) if table.schema != writer.schema else table)
            rows += len(table)
    finally:
        if writer is not None:
            writer.close()
    return rows


def _blocks(source: Path, kind: str, types: dict[str, pa.DataType], progress: Progress | None) -> Iterator[pa.Table]:
    """Yield the file as tables of one schema, telling `progress` how far it is."""
    total = source.stat().st_size
    if kind == ".parquet":
        for batch in pq.ParquetFile(source, page_checksum_verification=True).iter_batches():
            check_indices(batch)
            yield pa.Table.from_batches([batch])
        if progress is not None:
            progress(total, total)
        return
    with source.open("rb") as raw:
        stream = _decompressed(raw, source)
        tables = _json_blocks(stream, types) if not _SUFFIXES[kind] else _csv_blocks(stream, _SUFFIXES[kind], types)
        for table in tables:
            yield table
            if progress is not None:
                progress(min(raw.tell() if not raw.closed else total, total), total)


def _decompressed(raw: io.BufferedReader, source: Path) -> pa.NativeFile:
    compression = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}.get(source.suffix.lower())
    return pa.input_stream(raw, compression=compression)


def _open_csv(stream: pa.NativeFile, delimiter: str, types: dict[str, pa.DataType]) -> pacsv.CSVStreamingReader:
    return pacsv.open_csv(
        stream,
        read_options=pacsv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False),  # threads lose the rows' numbers
        parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pacsv.ConvertOptions(column_types=types, null_values=_NULLS, strings_can_be_null=True),
    )


def _csv_blocks(stream: pa.NativeFile, delimiter: str, types: dict[str, pa.DataType]) -> Iterator[pa.Table]:
    reader = _open_csv(stream, delimiter, types)
    names = reader.schema.names
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise DataError(f"the header names column '{doubled}' twice")
    for batch in reader:
        for column in batch.schema:  # a column null in the whole first block: its type is unknown
            if pa.types.is_null(column.type):
                types[column.name] = _LADDER[0]
        if any(pa.types.is_null(column.type) for column in batch.schema):
            raise _WiderTypeError
        yield pa.Table.from_batches([batch])


def _widen(message: str, source: Path, types: dict[str, pa.DataType]) -> bool:
    """Note a wider type for the CSV column that a conversion failed in; False where none helps."""
    found = _MISFIT.search(message)
    if not found:
        return False
    with source.open("rb") as raw:
        name = _open_csv(_decompressed(raw, source), _SUFFIXES[_kind(source)], {}).schema.names[int(found[1])]
    start = [str(kind) for kind in _LADDER].index(found[2]) + 1 if found[2] in map(str, _LADDER) else 0
    types[name] = next(kind for kind in _LADDER[start:] if _takes(kind, pa.array([found[3]])))
    return True


def _takes(kind: pa.DataType, texts: pa.Array | pa.ChunkedArray) -> bool:
    try:
        texts.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _json_blocks(stream: pa.NativeFile, types: dict[str, pa.DataType]) -> Iterator[pa.Table]:
    schema: pa.Schema | None = None
    rest, line = b"", 1
    while True:
        block = stream.read(BLOCK_BYTES)
        data, newline, rest = (rest + block).rpartition(b"\n") if block else (rest, b"", b"")
        if line == 1:
            data = data.removeprefix(_BOM)
        if data.strip():
            wanted = pa.schema(list(types.items())) if schema is None else schema
            try:
                table = _parse_json(data, wanted, line)
            except DataError:
                _note_wider(types, wanted, _parse_json(data, pa.schema([]), line))
                raise
            if schema is None:
                schema = table.schema
                _set_wider(types, _times_in(table.drop_columns(list(types))))
            elif table.schema != schema:
                _note_wider(types, schema, table)
            yield table.select(schema.names)
        line += _lines(data + newline)
        if not block:
            return


def _parse_json(data: bytes, schema: pa.Schema, line: int) -> pa.Table:
    odd = re.search(rb"^[ \t\r]*[^{\s]", data, re.MULTILINE)  # a bare null even crashes Arrow
    if odd is not None:
        raise DataError(f"line {line + _lines(data[: odd.start()]):,}: expected one JSON object a line")
    try:
        return pajson.read_json(
            io.BytesIO(data + b"\n"),
            read_options=pajson.ReadOptions(block_size=max(len(data) + 1, 1 << 20)),
            parse_options=pajson.ParseOptions(explicit_schema=schema if len(schema) else None),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"in the part that begins at line {line:,}: {_first_line(error)}") from error


def _lines(data: bytes) -> int:
    return data.count(b"\n")


def _times_in(table: pa.Table) -> dict[str, pa.DataType]:
    """Return the texts whose every value is a time: Arrow's JSON reader knows whole seconds only."""
    found: dict[str, pa.DataType] = {}
    for name in (field.name for field in table.schema if pa.types.is_string(field.type)):
        kinds = [kind for kind in _LADDER if pa.types.is_timestamp(kind) and _takes(kind, table.column(name))]
        if kinds and table.column(name).null_count < len(table):
            found[name] = kinds[0]
    return found


def _note_wider(types: dict[str, pa.DataType], known: pa.Schema, table: pa.Table) -> None:
    """Note the columns of a block that need a wider type than is known, or are new."""
    wider: dict[str, pa.DataType] = {}
    found = {field.name: field.type for field in table.schema} | _times_in(table)
    for name, kind in found.items():
        own = known.field(name).type if name in known.names else kind
        joined = _join_types(name, own, kind)
        if name not in known.names or joined != own:
            wider[name] = joined
    _set_wider(types, wider)


def _set_wider(types: dict[str, pa.DataType], wider: dict[str, pa.DataType]) -> None:
    """Note wider types, and ask for the file to be read again if there are any."""
    if wider:
        types.update(wider)
        raise _WiderTypeError


def _join_types(name: str, one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return the type that holds two; what only looked like a time is a text."""
    schemas = [pa.schema([(name, kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowTypeError as error:
        if all(pa.types.is_string(kind) or pa.types.is_timestamp(kind) for kind in (one, other)):
            return pa.string()
        raise DataError(f"column '{name}' changes from {one} to {other}; write it with one type") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
