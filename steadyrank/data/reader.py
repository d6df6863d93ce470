"""Rows to Batches: in time order, window by window, shuffled inside a window, with a cursor to resume from."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from ..errors import DataError
from ..schema import Batch, Schema
from ..settings import Settings
from .ahead import make_ahead
from .columns import TRUTH, US_PER_DAY, Encoder, Missing, Place
from .source import FileNote, Piece, Source

US_PER_HOUR = US_PER_DAY // 24
_MIN_ROWS_FOR_SHARE = 1_000  # below so many rows a share of missing values says little
_BEGUN = np.iinfo(np.int64).min  # the number of a window that is finished as it was cut


class ReaderConfig(Settings):
    """How a log is cut into windows and batches."""

    batch_size: int = Field(default=1024, ge=1)
    """Rows of a step."""
    window_rows: int = Field(default=65_536, ge=1)
    """Rows of a window: sorted by time, then shuffled, then learned."""
    window_hours: float | None = Field(default=None, gt=0, le=100_000)
    """Hours of a window, instead of rows."""
    window_per_file: bool = False
    """A window also ends where its file ends, so that windows do not depend on which files were there when the log was
    opened: a run that follows a growing log is then the same to the bit however the files came."""
    shuffle: bool = True
    """Shuffle rows inside a window, by the run's seed; a row may then be scored after later ones were learned."""
    unsorted: Literal["sort", "refuse"] = "sort"
    """`sort`: rows out of order inside a window are sorted. `refuse`: an error, as it always is across windows."""
    max_missing_frac: float = Field(default=0.5, ge=0, le=1)
    """Largest share of NaN or infinite values of one column in a window; above it the log is refused."""
    read_ahead: int = Field(default=65_536, ge=0)
    """Rows that a thread of its own reads and cuts into batches while the steps before them are made; 0 reads between
    the steps instead. The batches are the same. Memory grows by those rows, and by a window that is begun."""


@dataclass(frozen=True)
class Cursor:
    """How far a log has been read: everything before `rows`, and `batches` of the window that starts there.

    >>> Cursor(rows=100, batches=2, window_rows=50, window_time=0).next_row
    150
    """

    rows: int = 0
    window: int = 0
    batches: int = 0
    last_time: int | None = None
    """Time of the last row before the window, in microseconds."""
    window_rows: int = 0
    """Rows of the window as it was cut, 0 before its first batch: though the log grows, it is finished as it is."""
    window_time: int | None = None
    """Time of the last row of the window, once its last batch was given."""

    @property
    def next_row(self) -> int:
        """The first row that is read from here on: no row before it is needed any more."""
        return self.rows if self.window_time is None else self.rows + self.window_rows

    def state_dict(self) -> dict[str, int | None]:
        """Return plain numbers for a checkpoint."""
        return dict(vars(self))


class _Window(NamedTuple):
    """The rows of a window in time order."""

    rows: Batch
    start: Cursor
    missing: Missing
    ends_file: bool


class _Cut(NamedTuple):
    """A batch, and what the reader knows once it was given."""

    batch: Batch
    cursor: Cursor
    left: int
    ends_file: bool
    """Of its window."""
    missing: Missing
    """In its window."""


class Reader:
    """Cuts a source into windows in time order, and windows into batches.

    Args:
        source: Where rows come from.
        schema: What the columns mean.
        config: Windows and batches.
        seed: Seed of the shuffle; the same seed gives the same batches.
        pin_memory: Put batches into page-locked memory, from which they go to a GPU while it computes.

    Raises:
        DataError: A column of the schema is not in the log (with the nearest name).
    """

    def __init__(
        self, source: Source, schema: Schema, config: ReaderConfig, seed: int = 0, *, pin_memory: bool = False
    ) -> None:
        truth = all(TRUTH + task in source.columns for task in schema.tasks)
        self.source, self.schema, self.config, self.seed = source, schema, config, seed
        self.pin_memory = pin_memory
        self.encoder = Encoder(schema, truth=truth)
        self.missing = Missing()
        self.left = 0  # batches of the window after the one that was yielded last
        self.file_ends = False  # that one is the last of its file, where windows end with their file
        self._windows_counted, self._rows_read = 0, 0
        source.check(self.encoder.columns)

    @property
    def rows(self) -> int:
        """Rows of the log."""
        return self.source.rows

    def batches(self, cursor: Cursor | None = None) -> Iterator[tuple[Batch, Cursor]]:
        """Yield each batch with the cursor that resumes after it.

        When the log has grown, `batches` with the last cursor goes on with the new rows; it yields nothing when there
        are none.

        Raises:
            DataError: A bad value, a row that goes back in time, or too many missing values.
        """
        cursor = cursor or Cursor()
        if cursor.window_time is not None:
            cursor = _after(cursor)
        # What the reader knows follows the batches that were given, not those that were read: checkpoints hold it.
        for cut in make_ahead(self._cut(cursor), -(-self.config.read_ahead // self.config.batch_size)):
            self.left, self.file_ends = cut.left, cut.ends_file and not cut.left
            self._rows_read = max(self._rows_read, cut.cursor.rows + cut.cursor.window_rows)
            if not cut.left:
                self._count(cut.cursor.window, cut.missing)
            yield cut.batch, cut.cursor

    def _cut(self, cursor: Cursor) -> Iterator[_Cut]:
        """Yield the batches from `cursor` on: of the first window those that it does not count."""
        skip = cursor.batches
        for rows, start, missing, ends_file in self._windows(cursor):
            order = torch.arange(len(rows))
            if self.config.shuffle:
                order = torch.randperm(len(rows), generator=_generator(self.seed, start.window))
            pieces = order.split(self.config.batch_size)
            for i in range(skip, len(pieces)):
                left = len(pieces) - i - 1
                end = None if left else int(rows.time[-1])
                batch = rows.take(pieces[i])
                if self.pin_memory:
                    batch = batch._map(_pin)
                yield _Cut(batch, replace(start, batches=i + 1, window_time=end), left, ends_file, missing)
            skip = 0
            del rows  # before the next window is read

    def in_order(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Batch]:
        """Yield the log as it lies in its files, a piece at a time, to score; `progress` gets rows done, and all."""
        rows = 0
        for batch, counted in make_ahead(self._encoded(), int(self.config.read_ahead > 0)):
            self.missing.add(counted)
            yield batch
            rows += len(batch)
            if progress is not None:
                progress(rows, self.rows)

    def _encoded(self) -> Iterator[tuple[Batch, Missing]]:
        rows = 0
        for table, place in self.source.pieces(0, self.encoder.columns):
            yield self.encoder.encode(table, place, rows)
            rows += len(table)

    def refresh(self) -> list[FileNote]:
        """Take what has been added to the log, and say what it is; the next call of `batches` reads it."""
        return self.source.refresh()

    def state_dict(self) -> dict[str, Any]:
        """Return plain values: what was missing so far, and what the log is made of."""
        missing = self.missing
        return {
            "missing": {"rows": missing.rows, "null": dict(missing.null), "non_finite": dict(missing.non_finite)},
            "windows_counted": self._windows_counted,
            "rows_read": self._rows_read,
            "source": self.source.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], rows_done: int) -> list[FileNote]:
        """Go on from `state`, and take what has been added to the log since.

        Args:
            state: What `state_dict` returned.
            rows_done: `Cursor.next_row` of the cursor to go on from: files before it may be gone.

        Raises:
            DataError: A file that is needed changed or is gone.
        """
        self.missing = Missing()
        self.missing.rows = state["missing"]["rows"]
        for kind in ("null", "non_finite"):
            getattr(self.missing, kind).update(state["missing"][kind])
        self._windows_counted, self._rows_read = state["windows_counted"], state["rows_read"]
        return self.source.load_state_dict(state["source"], rows_done, self._rows_read)

    def _count(self, window: int, missing: Missing) -> None:
        """Count what is missing in a window with its last batch, and only once when it is read again."""
        if window >= self._windows_counted:
            self.missing.add(missing)
            self._windows_counted = window + 1

    def _windows(self, cursor: Cursor) -> Iterator[_Window]:
        """Yield the windows from the one that begins at `cursor` on."""
        held: list[tuple[Batch, Place]] = []
        missing, current = Missing(), ("", 0)
        for key, piece in self._slices(cursor):
            if held and key != current:
                window = self._close(held, missing, cursor, ends_file=key[0] != current[0])
                held, missing = [], Missing()
                cursor = _after(replace(window.start, window_time=int(window.rows.time[-1])))
                yield window
                del window
            first = cursor.rows + sum(len(batch) for batch, _ in held)
            batch, counted = self.encoder.encode(piece.table, piece.place, first)
            held.append((batch, piece.place))
            missing.add(counted)
            current = key
        if held:
            yield self._close(held, missing, cursor, ends_file=self.config.window_per_file)

    def _close(self, held: list[tuple[Batch, Place]], missing: Missing, cursor: Cursor, ends_file: bool) -> _Window:
        self._check_missing(missing, held)
        rows = self._ordered(held, cursor)
        return _Window(rows, replace(cursor, window_rows=len(rows)), missing, ends_file)

    def _slices(self, cursor: Cursor) -> Iterator[tuple[tuple[str, int], Piece]]:
        """Yield the pieces from the cursor on, cut where a window ends, each with its window: file, and number."""
        span = int((self.config.window_hours or 0) * US_PER_HOUR)
        row, begun, latest = cursor.rows, cursor.rows + cursor.window_rows, None
        for table, place in self.source.pieces(row, self.encoder.columns):
            if span:
                hours = self.encoder.times(table, place) // span
                latest = hours[0] if latest is None else latest
                # A row from an earlier hour stays in the window that has begun; `_ordered` judges it.
                keys = np.maximum.accumulate(np.maximum(hours, latest))
                latest = keys[-1]
            else:
                first = place.first_row if self.config.window_per_file else row
                keys = np.arange(first, first + len(table)) // self.config.window_rows
            keys[: max(begun - row, 0)] = _BEGUN
            if not len(table):
                continue
            starts = [0, *(np.flatnonzero(np.diff(keys)) + 1).tolist(), len(table)]
            for low, high in itertools.pairwise(starts):
                key = (place.file if self.config.window_per_file else "", int(keys[low]))
                yield key, Piece(table.slice(low, high - low), place.after(low))
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

    def _check_missing(self, missing: Missing, window: list[tuple[Batch, Place]]) -> None:
        """Refuse a window with too many non-finite values, unless it is a short one amid longer ones."""
        enough = min(_MIN_ROWS_FOR_SHARE, self.config.window_rows)
        if missing.rows < (enough if self.config.window_per_file else min(enough, self.rows)):
            return
        for column, count in missing.non_finite.items():
            share = min(1.0, count / missing.rows)  # a list may hold several in one row
            if share > self.config.max_missing_frac:
                raise DataError(
                    f"{window[0][1].row(0)} and after, column '{column}': {share:.0%} of {missing.rows:,} values are "
                    f"NaN or infinite, more than reader.max_missing_frac = {self.config.max_missing_frac}"
                )


def _pin(part: torch.Tensor) -> torch.Tensor:
    return part.pin_memory()


def _after(cursor: Cursor) -> Cursor:
    """Return the start of the next window."""
    return Cursor(cursor.next_row, cursor.window + 1, 0, cursor.window_time)


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
