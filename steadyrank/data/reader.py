"""Rows to Batches: in time order, window by window, shuffled inside a window, with a cursor to resume from."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import Field

from ..errors import DataError
from ..ranks import ALONE, Ranks
from ..schema import Batch, Schema
from ..settings import Settings
from .ahead import Worker, make_ahead
from .columns import TRUTH, US_PER_DAY, Encoder, Ints, Missing, Place
from .deal import Dealer, Key, Open, Part, Slice, check_enough, check_same_log
from .source import FileNote, Source

T = TypeVar("T")

US_PER_HOUR = US_PER_DAY // 24
_TRIES, _PAUSE_S = 20, 0.5  # until a file that another rank sees is there
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
    """The rows of a window."""

    parts: list[Part]
    """As they lie in the log."""
    order: torch.Tensor
    """In which they are learned."""
    start: Cursor
    last_time: int
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


class _Hand(NamedTuple):
    """A window that was dealt: what it was, and this rank's shares of its batches from the cursor on."""

    window: _Window
    batches: list[Batch]


class _Cutter:
    """Finds where windows end, piece by piece."""

    def __init__(self, config: ReaderConfig, cursor: Cursor) -> None:
        self._config, self._begun = config, cursor.rows + cursor.window_rows
        self._latest: int | None = None  # hour

    def __call__(self, place: Place, row: int, rows: int, times: Ints | None) -> list[Slice]:
        """Cut the piece that begins at a row; `times` are its own where windows are hours."""
        if not rows:
            return []
        if times is not None:
            hours = times // _span(self._config)
            # A row from an earlier hour stays in the window that has begun; `_in_time_order` judges it.
            latest = hours[0] if self._latest is None else self._latest
            keys = np.maximum.accumulate(np.maximum(hours, latest))
            self._latest = int(keys[-1])
        else:
            first = place.first_row if self._config.window_per_file else row
            keys = np.arange(first, first + rows) // self._config.window_rows
        keys[: max(self._begun - row, 0)] = _BEGUN
        file = place.file if self._config.window_per_file else ""
        starts = [0, *(np.flatnonzero(np.diff(keys)) + 1).tolist(), rows]
        return [Slice((file, int(keys[low])), low, high) for low, high in itertools.pairwise(starts)]


class Reader:
    """Cuts a source into windows in time order, and windows into batches.

    Args:
        source: Where rows come from.
        schema: What the columns mean.
        config: Windows and batches.
        seed: Seed of the shuffle; the same seed gives the same batches.
        pin_memory: Put batches into page-locked memory, from which they go to a GPU while it computes.
        ranks: The processes that share every batch, with a process group that nobody else uses: their reader's thread
            talks over it. Each rank gets its slice, and `Batch.share` says of what; all else is as in one process.

    Raises:
        ConfigError: Batches, or the log, have fewer rows than there are ranks.
        DataError: A column of the schema is not in the log (with the nearest name), or ranks see different logs.
    """

    def __init__(
        self,
        source: Source,
        schema: Schema,
        config: ReaderConfig,
        seed: int = 0,
        *,
        pin_memory: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        truth = all(TRUTH + task in source.columns for task in schema.tasks)
        self.source, self.schema, self.config, self.seed = source, schema, config, seed
        self.pin_memory, self.ranks = pin_memory, ranks
        self.encoder = Encoder(schema, truth=truth)
        self.missing = Missing()
        self.left = 0  # batches of the window after the one that was yielded last
        self.file_ends = False  # that one is the last of its file, where windows end with their file
        self._windows_counted, self._rows_read = 0, 0
        self._worker: Worker | None = None  # does what needs all ranks
        ranks.together(lambda: source.check(self.encoder.columns))
        if ranks.size > 1:
            check_same_log(ranks, source.units())
            check_enough(ranks, config.batch_size, source.rows)

    @property
    def rows(self) -> int:
        """Rows of the log."""
        return self.source.rows

    @property
    def idle_ranks(self) -> int:
        """Ranks that decode nothing, since the log has fewer row groups (or blocks) than there are ranks."""
        return max(self.ranks.size - len(self.source.units()), 0) if self.ranks.size > 1 else 0

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
        if self.ranks.size > 1:
            cuts = self._deal(cursor)
        else:
            cuts = make_ahead(self._cut(cursor), -(-self.config.read_ahead // self.config.batch_size))
        # What the reader knows follows the batches that were given, not those that were read: checkpoints hold it.
        for cut in cuts:
            self.left, self.file_ends = cut.left, cut.ends_file and not cut.left
            self._rows_read = max(self._rows_read, cut.cursor.rows + cut.cursor.window_rows)
            if not cut.left:
                self._count(cut.cursor.window, cut.missing)
            yield cut.batch, cut.cursor

    def close(self) -> None:
        """Wait for what was begun with the other ranks: before their process group goes."""
        if self._worker is not None:
            self._worker.settle()
            self._worker.close()
            self._worker = None

    def _cut(self, cursor: Cursor) -> Iterator[_Cut]:
        """Yield the batches from `cursor` on: of the first window those that it does not count."""
        skip = cursor.batches
        for window in self._windows(cursor, self._slices(cursor)):
            rows = Batch.cat([part.rows for part in window.parts if part.rows is not None])
            window.parts.clear()
            pieces = window.order.split(self.config.batch_size)
            for i in range(skip, len(pieces)):
                yield self._give(window, rows.take(pieces[i]), i + 1, len(pieces) - i - 1)
            skip = 0
            del rows, window, pieces  # before the next window is read

    def _deal(self, cursor: Cursor) -> Iterator[_Cut]:
        """Yield this rank's shares of the batches from `cursor` on; `deal.py` says what is begun when, and why."""
        dealer = Dealer(
            self.ranks,
            self.source,
            self.encoder,
            cursor.rows,
            partial(_Cutter, self.config, cursor),
            by_time=_span(self.config) > 0,
            read_ahead=self.config.read_ahead,
        )
        windows = self._windows(cursor, dealer.slices())

        def deal_next(skip: int) -> _Hand | None:
            window = next(windows, None)
            if window is None:
                return None
            batches = window.order.split(self.config.batch_size)[skip:]
            dealt = dealer.hand_out(window.parts, window.start.rows, batches)
            window.parts.clear()
            return _Hand(window, dealt)

        consumer, skip = threading.get_ident(), cursor.batches
        coming = self._begin(partial(deal_next, skip))
        try:
            while (hand := coming()) is not None:
                coming = self._begin(partial(deal_next, 0))
                hand.batches.reverse()
                while hand.batches:
                    skip += 1
                    yield self._give(hand.window, hand.batches.pop(), skip, len(hand.batches))
                skip = 0
                del hand
        finally:
            # Dropped in a cycle, this may be collected by any thread, also by one that the job waits for.
            if self._worker is not None and threading.get_ident() == consumer:
                self._worker.settle()

    def _begin(self, job: Callable[[], T]) -> Callable[[], T]:
        """Begin a job that needs all ranks, and return what waits for it; without reading ahead it begins then."""
        if not self.config.read_ahead:
            return job
        if self._worker is None:
            self._worker = Worker()
        return self._worker.begin(job)

    def _give(self, window: _Window, batch: Batch, number: int, left: int) -> _Cut:
        """Return batch `number` of a window, counted from 1, after which `left` more come."""
        end = None if left else window.last_time
        if self.pin_memory:
            batch = batch._map(_pin)
        cursor = replace(window.start, batches=number, window_time=end)
        return _Cut(batch, cursor, left, window.ends_file, window.missing)

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
        """Take what has been added to the log, and say what it is; the next call of `batches` reads it.

        Several ranks take what the first one sees: a file may be there for one of them sooner than for another.
        """
        return self._look_together(self.source.refresh, self.rows)

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
        load = partial(self.source.load_state_dict, state["source"], rows_done, self._rows_read)
        return self._look_together(load, rows_done)

    def _look_together(self, look: Callable[[], list[FileNote]], rows_done: int) -> list[FileNote]:
        """Let the first rank look for files, and give the others the log that it has then."""
        ranks = self.ranks
        if ranks.size == 1:
            return look()

        def share() -> list[FileNote]:
            notes, state = ranks.on_first(lambda: (look(), self.source.state_dict()))
            ranks.together(lambda: None if ranks.is_first else self._take_over(state, rows_done))
            return notes

        return self._begin(share)()

    def _take_over(self, state: Mapping[str, Any], rows_done: int) -> None:
        """Have the log that the first rank has; on a disk of the network a new file may come in sight later here."""
        for tries_left in reversed(range(_TRIES)):
            try:
                self.source.load_state_dict(state, rows_done, None)
                return
            except DataError:
                if not tries_left:
                    raise
                time.sleep(_PAUSE_S)

    def _count(self, window: int, missing: Missing) -> None:
        """Count what is missing in a window with its last batch, and only once when it is read again."""
        if window >= self._windows_counted:
            self.missing.add(missing)
            self._windows_counted = window + 1

    def _slices(self, cursor: Cursor) -> Iterator[tuple[Key, Open]]:
        """Yield the pieces from the cursor on, cut where a window ends, each with its window."""

        def encode() -> Part:
            low, high = piece.low, piece.high
            batch, counted = self.encoder.encode(table.slice(low, high - low), place.after(low), row + low)
            return Part(batch.time, place.after(low), counted, batch)

        row, cut = cursor.rows, _Cutter(self.config, cursor)
        for table, place in self.source.pieces(row, self.encoder.columns):
            times = self.encoder.times(table, place) if _span(self.config) else None
            for piece in cut(place, row, len(table), times):
                yield piece.key, encode
            row += len(table)

    def _windows(self, cursor: Cursor, slices: Iterator[tuple[Key, Open]]) -> Iterator[_Window]:
        """Yield the windows from the one that begins at `cursor` on."""
        held: list[Part] = []
        current = ("", 0)
        for key, open_slice in slices:
            if held and key != current:
                window = self._close(held, cursor, ends_file=key[0] != current[0])
                held = []
                cursor = _after(replace(window.start, window_time=window.last_time))
                yield window
                del window
            held.append(open_slice())
            current = key
        if held:
            yield self._close(held, cursor, ends_file=self.config.window_per_file)

    def _close(self, held: list[Part], cursor: Cursor, ends_file: bool) -> _Window:
        missing = Missing()
        for part in held:
            missing.add(part.missing)
        self._check_missing(missing, held[0].place)
        time = torch.cat([part.time for part in held])
        order = self._in_time_order(time, held, cursor)
        if self.config.shuffle:
            shuffled = torch.randperm(len(time), generator=_generator(self.seed, cursor.window))
            order = shuffled if order is None else order[shuffled]
        elif order is None:
            order = torch.arange(len(time))
        start = replace(cursor, window_rows=len(time))
        return _Window(held, order, start, int(time.max()), missing, ends_file)

    def _in_time_order(self, time: torch.Tensor, window: list[Part], cursor: Cursor) -> torch.Tensor | None:
        """Return the order of rows by time, None where they are in it, or say which row goes back in time."""
        if cursor.last_time is not None:
            back = time < cursor.last_time
            if bool(back.any()):
                raise DataError(
                    f"{_place_of(window, int(back.int().argmax()))}: time goes back to "
                    f"{_show(int(time[back][0]))}, after a window that ended at {_show(cursor.last_time)}; "
                    "sort the log by its time column, or make the window (reader.window_rows, window_hours) larger"
                )
        falls = time.diff() < 0
        if not bool(falls.any()):
            return None
        if self.config.unsorted == "refuse":
            row = int(falls.int().argmax()) + 1
            raise DataError(
                f"{_place_of(window, row)}: time goes back from {_show(int(time[row - 1]))} to "
                f"{_show(int(time[row]))}; sort the log, or set reader.unsorted = 'sort'"
            )
        return torch.argsort(time, stable=True)

    def _check_missing(self, missing: Missing, first: Place) -> None:
        """Refuse a window with too many non-finite values, unless it is a short one amid longer ones."""
        enough = min(_MIN_ROWS_FOR_SHARE, self.config.window_rows)
        if missing.rows < (enough if self.config.window_per_file else min(enough, self.rows)):
            return
        for column, count in missing.non_finite.items():
            share = min(1.0, count / missing.rows)  # a list may hold several in one row
            if share > self.config.max_missing_frac:
                raise DataError(
                    f"{first.row(0)} and after, column '{column}': {share:.0%} of {missing.rows:,} values are "
                    f"NaN or infinite, more than reader.max_missing_frac = {self.config.max_missing_frac}"
                )


def _span(config: ReaderConfig) -> int:
    """Return the length of a window in microseconds, 0 where it is one of rows."""
    return int((config.window_hours or 0) * US_PER_HOUR)


def _pin(part: torch.Tensor) -> torch.Tensor:
    return part.pin_memory()


def _after(cursor: Cursor) -> Cursor:
    """Return the start of the next window."""
    return Cursor(cursor.next_row, cursor.window + 1, 0, cursor.window_time)


def _generator(seed: int, window: int) -> torch.Generator:
    """A generator for one window, so that a resumed run shuffles it as the first one did."""
    state = np.random.SeedSequence([seed, window]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


def _place_of(window: list[Part], row: int) -> str:
    """Name a row of a window."""
    for part in window:
        if row < len(part.time):
            return part.place.row(row)
        row -= len(part.time)
    return window[-1].place.file


def _show(time_us: int) -> str:
    return str(np.datetime64(time_us, "us")).removesuffix(".000000")
