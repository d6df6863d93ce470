"""What gives the rows of a log: one face for Parquet files and for the generated stream."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import pyarrow as pa

from .columns import Place


class Piece(NamedTuple):
    """Some consecutive rows of a log as a table, and where they come from."""

    table: pa.Table
    place: Place


class Unit(NamedTuple):
    """Consecutive rows of a log that one process decodes: a row group, or a block of the generated stream."""

    first_row: int
    rows: int


class FileNote(NamedTuple):
    """What became of a file that was found in a log's folder after the log was opened."""

    kind: Literal["new", "duplicate", "late", "unreadable", "misfit"]
    """`new`: its rows were appended. Left out: `duplicate` (a known file under another name), `late` (it begins before
    what is known ends), `unreadable` (no Parquet, at least not yet), `misfit` (a column is missing or of another type).
    """
    file: str
    message: str
    """What came, and what to do."""
    rows: int
    """Rows of the file, 0 where they are not known."""


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

    def units(self) -> list[Unit]:
        """Return what is decoded at once, in order and without reading it; none is empty, and no piece lies in two."""
        ...

    def refresh(self) -> list[FileNote]:
        """Take what has been added to the log, and say what it is."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what the log is made of, as plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], rows_done: int, rows_read: int | None) -> list[FileNote]:
        """Give every row the number that it had when the state was taken, then `refresh`.

        Args:
            state: What `state_dict` returned.
            rows_done: Rows from the start that will not be read again: their files may be gone.
            rows_read: Rows that were read: only a file after them may be another one than it was. None to have just
                what another process has: no file is another one, and nothing new is looked for.

        Raises:
            DataError: A file that is needed changed or is gone.
        """
        ...
