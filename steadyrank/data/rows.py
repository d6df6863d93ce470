"""Single rows of a log read again, by their number (`Batch.row`), with every column: for a person to look at."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa

from ..errors import DataError
from .source import Source


def find_rows(source: Source, rows: Sequence[int]) -> pa.Table:
    """Read rows of a log again, with all its columns, also those that the schema does not name.

    Only the row groups (of a generated stream: the blocks) that hold them are read, each but once where the rows lie
    near one another, as those of a batch do.

    Args:
        source: The log.
        rows: Numbers of rows, in any order, also twice.

    Returns:
        The rows in the order in which they were asked for.

    Raises:
        DataError: The log has no such row, or cannot be read any more.

    >>> from steadyrank.data.stream import Stream, StreamConfig
    >>> stream = Stream(StreamConfig(rows=1000, users=100, items=100, block_rows=256, tasks=("click",)))
    >>> find_rows(stream, [700, 3]).equals(pa.concat_tables(stream.tables()).take([700, 3]))
    True
    """
    wrong = next((row for row in rows if not 0 <= row < source.rows), None)
    if wrong is not None:
        raise DataError(f"row {wrong:,} is not in the log, which has {source.rows:,} rows; is it the log of this run?")
    wanted = sorted(set(rows))
    found: list[pa.Table] = []
    while len(found) < len(wanted):
        first = wanted[len(found)]
        table, _ = next(source.pieces(first, None))
        here = [row - first for row in wanted[len(found) :] if row - first < len(table)]
        found += [table.slice(offset, 1) for offset in here]
    if not found:
        return pa.table({name: pa.nulls(0) for name in source.columns})
    place = {row: i for i, row in enumerate(wanted)}
    return pa.concat_tables(found).take([place[row] for row in rows])


def show_rows(source: Source, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Read rows of a log again as `find_rows` does, each as a dictionary of plain values.

    What Python has no value for (a text that is no UTF-8, a date before the year 1) becomes a text that says so.

    Raises:
        DataError: The log has no such row, or cannot be read any more.
    """
    table = find_rows(source, rows)
    return [{name: _plain(table[name][i]) for name in table.column_names} for i in range(len(table))]


def _plain(value: pa.Scalar) -> Any:
    with suppress(ValueError, OverflowError):
        return value.as_py()
    with suppress(ValueError, OverflowError, pa.ArrowException):  # a nanosecond, for one
        return value.cast(pa.string()).as_py()
    return f"(no readable {value.type})"
