"""A log dealt to several processes: each decodes its own part of it, and learns its own part of every batch.

**Who reads what.** Unit j of the log (a row group; a block of a generated stream) belongs to rank j mod N, which alone
decodes it, ahead of its use. Its pieces then go by in the log's order: the owner tells all a piece's head (its place
and times, what is missing in it, or its error), by which every rank cuts, checks, sorts and shuffles windows as one
process would. The rows stay with their owner until their window closes, and then cross once, to those who learn them.

**Who learns what.** A batch is the one that a single process would have made; rank r of N gets its rows
[n r // N, n (r + 1) // N), which may be none of the last batch of a window.

**In step.** A collective waits for all ranks, and training may leave a window anywhere: it stops, or rolls back and
reads from elsewhere. Had a rank's thread then begun a collective more than another's, all would wait for ever, or,
worse, rows of one window would be taken for those of another. What is ahead here is therefore of two kinds. Decoding
needs nobody, and each rank is as far ahead with it as it likes. What needs all (the heads and the exchange of one
window) is one job, and jobs begin with what all ranks do alike: the first with the first batch that is asked for, the
next when a window's first batch is handed out. It is done while that window is learned. Whoever leaves a window has
begun as many jobs as the others; each is done to its end, and dropped. One thread does all jobs of a reader, so that
one that was left behind is done before the next begins, on every rank.

Shapes: W rows of a window in the log's order, B rows of a batch, K tasks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64
from torch import Tensor

from ..errors import ConfigError, DataError, SteadyRankError
from ..ranks import Ranks
from ..schema import Batch, Ragged, Schema, Share
from .ahead import Worker, make_ahead
from .columns import Encoder, Ints, Missing, Place
from .source import Source, Unit

Key = tuple[str, int]
"""A window: its file, where windows end with their file, and its number."""


class Slice(NamedTuple):
    """The rows `low` to `high - 1` of a piece, which lie in one window."""

    key: Key
    low: int
    high: int


Cut = Callable[[Place, int, int, Ints | None], list[Slice]]
"""Cuts a piece where a window ends: its place, number of its first row, rows, and times where windows are hours. It is
called with one piece after another."""


class Part(NamedTuple):
    """A slice, as a window holds it."""

    time: Tensor
    place: Place
    missing: Missing
    rows: Batch | None
    """None where they lie with another rank."""
    owner: int = 0


Open = Callable[[], Part]
"""Gives a slice, or raises what is wrong with it, when its window has begun and those before it were given."""


class _Failure(NamedTuple):
    kind: type[SteadyRankError] | None
    """None for what is not of this package: a bug, or memory that ran out."""
    text: str


class _Head(NamedTuple):
    """What all ranks learn of a piece."""

    place: Place
    rows: int
    times: Ints
    """Of all its rows where windows are hours, else of those before its error."""
    lows: list[int]
    """First row of each slice that its owner made of it; none where it could not be read at all."""
    missing: list[Missing]
    """In each slice before its error."""
    failure: _Failure | None


class _Own(NamedTuple):
    """A piece, with its owner."""

    head: _Head
    rows: list[Batch]
    table: pa.Table | None
    """Kept where it may have to be cut in another way."""
    error: Exception | None


def share_of(rows: int, rank: int, size: int) -> tuple[int, int]:
    """Return the first row of a batch of `rows` rows that belongs to a rank, and the one after the last.

    >>> [share_of(7, rank, 3) for rank in range(3)]
    [(0, 2), (2, 4), (4, 7)]
    """
    return rows * rank // size, rows * (rank + 1) // size


def check_enough(ranks: Ranks, batch_size: int, rows: int) -> None:
    """Raise ConfigError where ranks would be left without rows.

    >>> check_enough(Ranks(0, 4), batch_size=3, rows=100)
    Traceback (most recent call last):
    ...
    steadyrank.errors.ConfigError: reader.batch_size = 3 rows a step are fewer than the 4 ranks that share them; start \
at most 3 ranks, or make batches larger
    """
    if batch_size < ranks.size:
        raise ConfigError(
            f"reader.batch_size = {batch_size} rows a step are fewer than the {ranks.size} ranks that share them; "
            f"start at most {batch_size} ranks, or make batches larger"
        )
    if rows < ranks.size:
        raise ConfigError(
            f"the log's {rows} row(s) are fewer than the {ranks.size} ranks that share it; "
            f"start at most {rows} rank(s), or read a larger log"
        )


def check_same_log(ranks: Ranks, units: Sequence[Unit]) -> None:
    """Raise DataError, on all ranks the same, unless all see as many units with as many rows each."""
    first: list[int] = []
    for rank, sizes in enumerate(ranks.gather_objects([unit.rows for unit in units])):
        if rank == 0:
            first = sizes
        if sizes == first:
            continue
        what = f"rank {rank} sees a log of {sum(sizes):,} rows in {len(sizes):,} row groups or blocks"
        what += f", and rank 0 one of {sum(first):,} in {len(first):,}"
        if (sum(sizes), len(sizes)) == (sum(first), len(first)):
            j = next(j for j, (one, other) in enumerate(zip(sizes, first, strict=True)) if one != other)
            what += f"; number {j} has {sizes[j]:,} rows there, and {first[j]:,} here"
        raise DataError(f"{what}; give all ranks the same files, and let none be written while they start")


class Dealer:
    """Reads a log together with the other ranks; for one pass from `start` on.

    It is made by the thread of the steps; what it yields is asked for by all ranks alike, in any one thread.

    Args:
        ranks: Who reads, with a process group that nobody else uses meanwhile.
        source: The log.
        encoder: Makes batches of its tables.
        start: The first row that is read.
        make_cut: Gives what cuts pieces into windows, from `start` on.
        by_time: Windows are hours.
        read_ahead: Rows of its own units that this rank decodes ahead, or a unit where those are larger; 0: none.
    """

    def __init__(
        self,
        ranks: Ranks,
        source: Source,
        encoder: Encoder,
        start: int,
        make_cut: Callable[[], Cut],
        *,
        by_time: bool,
        read_ahead: int,
    ) -> None:
        self._ranks, self._source, self._encoder = ranks, source, encoder
        self._start, self._make_cut, self._by_time = start, make_cut, by_time
        self._units = source.units()
        largest = max((unit.rows for unit in self._units), default=1)
        self._own = make_ahead(self._decode(), -(-read_ahead // largest), Worker() if read_ahead else None)

    def slices(self) -> Iterator[tuple[Key, Open]]:
        """Yield the slices of all ranks' pieces in the log's order, each with its window. A collective.

        Raises:
            DataError: A piece cannot be read by its owner; all ranks raise it.
        """
        check_same_log(self._ranks, self._units)
        cut = self._make_cut()
        for number, unit in enumerate(self._units):
            row, end = max(self._start, unit.first_row), unit.first_row + unit.rows
            owner = number % self._ranks.size
            while row < end:
                own = self._next_own() if owner == self._ranks.rank else None
                head = self._tell(own, owner)
                if not head.lows:
                    raise self._error(head, own, owner)
                slices = cut(head.place, row, head.rows, head.times if self._by_time else None)
                if [each.low for each in slices] != head.lows:
                    # Rare: the owner did not know of a later hour in the piece before, which another rank has.
                    own = own and self._encode(own.table, head.place, row, slices, head.times)
                    head = self._tell(own, owner)
                for i, each in enumerate(slices):
                    yield each.key, partial(self._open, head, own, i, each, owner)
                row += head.rows
                del own

    def hand_out(self, parts: Sequence[Part], first_row: int, batches: Sequence[Tensor]) -> list[Batch]:
        """Bring every rank its share of a window's batches. A collective.

        Args:
            parts: The window in the log's order.
            first_row: Number of its first row.
            batches: Rows of each whole batch, counted from the window's first.
        """
        size, rank = self._ranks.size, self._ranks.rank
        time_W = torch.cat([part.time for part in parts])
        owner_W, place_W = find_owners([len(part.time) for part in parts], [part.owner for part in parts], size)
        bounds = [[share_of(len(batch), r, size) for batch in batches] for r in range(size)]
        wanted = [
            torch.cat([batch[low:high] for batch, (low, high) in zip(batches, bound, strict=True)]) for bound in bounds
        ]
        plan = plan_exchange(wanted, owner_W, place_W, rank)
        held = [part.rows for part in parts if part.rows is not None]
        held = [Batch.cat(held).take(torch.cat(plan.send))] if held else [_no_rows(self._encoder)]
        rows = exchange(self._ranks, held[0], [len(index) for index in plan.send], plan.received)
        came = wanted[rank][plan.order]
        rows = replace(rows, time=time_W[came], row=came + first_row).take(plan.order.argsort())
        return self._cut(rows, [high - low for low, high in bounds[rank]], [time_W[batch] for batch in batches])

    def _cut(self, rows: Batch, counts: Sequence[int], times: Sequence[Tensor]) -> list[Batch]:
        """Cut this rank's rows of a window into batches, and say what each is a share of."""
        found, low = list[Batch](), 0
        for count in counts:
            found.append(rows.take(torch.arange(low, low + count)))
            low += count
        sums = torch.stack([batch.weights.double().sum(0) for batch in found])
        weights = self._ranks.gather(sums).sum(0).to(rows.weights.dtype)
        return [
            replace(batch, share=Share(len(time_B), int(time_B.min()), int(time_B.max()), weights_K))
            for batch, time_B, weights_K in zip(found, times, weights.unbind(), strict=True)
        ]

    def _decode(self) -> Iterator[_Own]:
        """Yield the pieces of this rank's units, to the first that cannot be read."""
        for unit in self._units[self._ranks.rank :: self._ranks.size]:
            row, end = max(self._start, unit.first_row), unit.first_row + unit.rows
            if row >= end:
                continue
            pieces = self._source.pieces(row, self._encoder.columns)
            while row < end:
                table, place = next(pieces)
                times = self._encoder.times(table, place) if self._by_time else None
                yield self._encode(table, place, row, self._make_cut()(place, row, len(table), times), times)
                row += len(table)
                del table

    def _encode(self, table: pa.Table, place: Place, row: int, slices: list[Slice], times: Ints | None) -> _Own:
        rows, missing, error = list[Batch](), list[Missing](), None
        for each in slices:
            piece = table.slice(each.low, each.high - each.low)
            try:
                batch, counted = self._encoder.encode(piece, place.after(each.low), row + each.low)
            except Exception as found:  # whatever it is: the others wait for it
                error = found
                break
            rows.append(batch)
            missing.append(counted)
        if times is None:
            times = np.concatenate([np.empty(0, np.int64), *(batch.time.numpy() for batch in rows)])
        head = _Head(place, len(table), times, [each.low for each in slices], missing, _failure(error))
        return _Own(head, rows, table if self._by_time and len(slices) > 1 else None, error)

    def _next_own(self) -> _Own:
        try:
            return next(self._own)
        except Exception as error:  # whatever it is: the others wait for it
            return _Own(_Head(Place("", None, 0), 0, np.empty(0, np.int64), [], [], _failure(error)), [], None, error)

    def _tell(self, own: _Own | None, owner: int) -> _Head:
        head = self._ranks.broadcast(own and own.head, owner)
        assert head is not None
        return head

    def _open(self, head: _Head, own: _Own | None, i: int, piece: Slice, owner: int) -> Part:
        if i == len(head.missing):
            raise self._error(head, own, owner)
        time = torch.from_numpy(head.times[piece.low : piece.high])
        return Part(time, head.place.after(piece.low), head.missing[i], own.rows[i] if own else None, owner)

    def _error(self, head: _Head, own: _Own | None, owner: int) -> Exception:
        """Return the error of a piece: with its owner, the one that was raised."""
        if own is not None and own.error is not None:
            return own.error
        assert head.failure is not None
        if head.failure.kind is not None:
            return head.failure.kind(head.failure.text)
        return RuntimeError(f"rank {owner} failed while it read the log, and all stop with it: {head.failure.text}")


def _failure(error: Exception | None) -> _Failure | None:
    if error is None:
        return None
    if isinstance(error, SteadyRankError):
        return _Failure(type(error), str(error))
    return _Failure(None, f"{type(error).__name__}: {error}")


class Plan(NamedTuple):
    """What a rank sends and gets when a window is dealt."""

    send: list[Tensor]
    """For each rank, which of the own rows it gets, in its order."""
    received: list[int]
    """How many rows come from each rank."""
    order: Tensor
    """The place, among the rows that this rank wants, of each one that comes: rank by rank."""


def find_owners(
    lengths: Sequence[int], owners: Sequence[int], size: int
) -> tuple[Int64[Tensor, " window"], Int64[Tensor, " window"]]:
    """Return the owner of each row of a window, and the row's number among its owner's own.

    Args:
        lengths: Rows of each part of the window.
        owners: Who holds it.
        size: Number of ranks.

    >>> find_owners([2, 1, 2], [0, 1, 0], 2)
    (tensor([0, 0, 1, 0, 0]), tensor([0, 1, 0, 2, 3]))
    """
    owner_W = torch.tensor(owners).repeat_interleave(torch.tensor(lengths))
    place_W = torch.empty_like(owner_W)
    for rank in range(size):
        own = owner_W == rank
        place_W[own] = torch.arange(int(own.sum()))
    return owner_W, place_W


def plan_exchange(
    wanted: Sequence[Int64[Tensor, " _"]],
    owner_W: Int64[Tensor, " window"],
    place_W: Int64[Tensor, " window"],
    rank: int,
) -> Plan:
    """Say who sends what to whom.

    Args:
        wanted: The rows of the window that each rank is to have, in its order.
        owner_W: As `find_owners` gives it.
        place_W: Likewise.
        rank: Whose plan this is.

    >>> plan_exchange([torch.tensor([3, 0]), torch.tensor([1, 2])], *find_owners([2, 2], [0, 1], 2), rank=0)
    Plan(send=[tensor([0]), tensor([1])], received=[1, 1], order=tensor([1, 0]))
    """
    send = [place_W[index[owner_W[index] == rank]] for index in wanted]
    owners = owner_W[wanted[rank]]
    return Plan(send, owners.bincount(minlength=len(wanted)).tolist(), owners.argsort(stable=True))


def exchange(ranks: Ranks, rows: Batch, send: list[int], received: list[int]) -> Batch:
    """Send rows to the other ranks, and return those that come, rank by rank. A collective.

    Args:
        ranks: Who takes part.
        rows: The rows for rank 0, then those for rank 1, and so on; times and numbers of rows stay behind.
        send: How many go to each rank.
        received: How many come from each.
    """
    moved: dict[str, Any] = {f.name: getattr(rows, f.name) for f in fields(rows)}
    for name, value in moved.items():
        if isinstance(value, Tensor) and name not in ("time", "row"):
            moved[name] = ranks.swap(value, send, received)
    lists = []
    for ragged in rows.lists:
        lengths = ragged.offsets.diff()
        found = ranks.swap(lengths, send, received)
        sums = [[int(part.sum()) for part in x.split(n)] for x, n in ((lengths, send), (found, received))]
        lists.append(Ragged(ranks.swap(ragged.values, *sums), torch.cat([found.new_zeros(1), found.cumsum(0)])))
    return Batch(**{**moved, "lists": tuple(lists)})


def _no_rows(encoder: Encoder) -> Batch:
    """Return the batch of a rank that holds nothing of a window."""
    schema: Schema = encoder.schema
    none, tasks = torch.zeros(0, dtype=torch.int64), torch.zeros(0, len(schema.tasks))
    return Batch(
        ids=none.new_zeros(0, len(schema.id_features)),
        lists=tuple(Ragged(none, none.new_zeros(1)) for _ in schema.list_features),
        numbers=torch.zeros(0, len(schema.number_features), dtype=torch.float32),
        positions=none.new_zeros(0, len(schema.position_features)),
        labels=tasks,
        weights=tasks,
        time=none,
        group=none,
        truth=tasks.float() if encoder.truth else None,
        row=none,
    )
