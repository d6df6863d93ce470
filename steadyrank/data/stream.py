"""The generated stream: the log of a recommender that never was, a pure function of its config.

**World** (world.py). Users and items have latent tastes; a user's taste turns slowly, at a pace of its own. Traffic
goes to slots by a power law; an item lives in its slot for a while, trends, fades, dies, and the next is born there.
Beside tastes, five heads (click, like, share, watch time, rating) have biases of users, qualities of items, and a table
of crosses, user group by category, that no sum of the two can hold. All is closed-form in time, so that a block of rows
depends on nothing but the config and its own first row; popularity alone is held for the length of a block.

**Labels.** seen(position) is the probability of examination, sigma the logistic function, L logistic noise:

    click        p = seen * sigma(head_click)
    like, share  p = p(click) * sigma(head): no click, no like
    watch_time   seconds, expm1(max(0, head_watch + 0.5 L)); null without a click
    long_view    clicked, and watched for more than 30 s
    rating       head_rating + 0.3 t, t Student's with 2 degrees of freedom, held to +-50; null without a click, and
                 after half of the clicks

**Truth.** Column `truth/<task>` is the probability of a binary label, or the expectation of a regression's as the
model learns it (`Task.encode`), given all that the generator knew, position included: it bounds what can be attained.
It is exact. For a label that exists after a click only, it holds given the click, and stands in every row. It follows
what is generated: viral items, bots and changed units (for watch time by 32-point quadrature) are in it. Garbage spoils
features only, so there labels and truth are those of the row that was meant, and no model can attain them.

The same config gives the same rows, bit for bit, on one machine with one version of numpy.

Shapes: B rows of a block, K heads, N items that ever live, S slots.
"""

import datetime
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ..errors import ConfigError, DataError, check_known, nearest
from ..schema import Feature, IdFeature, IdsFeature, NumberFeature, PositionFeature, Schema, Task
from .columns import TRUTH, Place
from .incidents import Column, Incident, Strike, bend_heads, find_strikes, shift_angle, spoil_features, take_over
from .source import FileNote, Piece, Unit
from .world import (
    CATEGORIES,
    GROUPS,
    HEADS,
    LATENT,
    TAGS,
    Float32,
    Int64,
    World,
    WorldConfig,
    find_categories,
    find_items,
    keyed_rng,
    make_world,
    moving_click,
    rank_slots,
    still_heads,
    turn_tastes,
)

TaskName = Literal["click", "long_view", "like", "share", "watch_time", "rating"]

POSITIONS, MAX_HISTORY = 20, 20
LONG_VIEW_S, WATCH_SPREAD, RATING_SPREAD = 30.0, np.float32(0.5), np.float32(0.3)

_FIRST_NUMBERS = ("duration", "item_age")
_FIRST = 10
_EXTRA_NUMBERS = ("noisy", "lognormal", "pareto")
_EXTRAS = (*_EXTRA_NUMBERS, "bucket", "cross", "bag")
_DAY_US = 86_400_000_000


class StreamConfig(WorldConfig):
    """A generated stream.

    >>> StreamConfig(rows=1000, incidents=({"kind": "bots", "at": 0.5},)).incidents[0].kind
    'bots'
    """

    source: Literal["stream"] = "stream"
    """Says that the log is generated."""
    features: int = Field(default=10, ge=10, le=200)
    """Input features in all; those past the tenth are noisy copies, hashes, crosses, heavy-tailed numbers and bags."""
    tasks: tuple[TaskName, ...] = Field(
        default=("click", "long_view", "like", "share", "watch_time", "rating"), min_length=1
    )
    """Tasks whose labels and truth the stream shows."""
    start: datetime.date = datetime.date(2026, 1, 1)
    """Date of the first row, such as 2026-01-01; days are UTC's."""
    block_rows: int = Field(default=65_536, ge=256, le=1_048_576)
    """Rows generated at once, a power of two. Another value gives another stream of the same world."""
    incidents: tuple[Incident, ...] = Field(default=(), max_length=100)
    """What goes wrong, and when."""

    @model_validator(mode="after")
    def _consistent(self) -> "StreamConfig":
        if self.block_rows & (self.block_rows - 1):
            raise ValueError(f"block_rows: expected a power of two such as 65536, got {self.block_rows}")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks: each may be named once, got {', '.join(self.tasks)}")
        known = [task for task in self.tasks if task in ("watch_time", "rating")] + _number_names(self.features)
        for number, incident in enumerate(self.incidents):
            if incident.target is not None and incident.target not in known:
                raise ValueError(
                    f"incidents[{number}].target: '{incident.target}' is neither a regression task nor a number "
                    f"feature of this stream{nearest(incident.target, known)} (there are: {', '.join(known[:20])})"
                )
        return self


def _extras(features: int) -> dict[str, int]:
    """Return the features past the tenth by name, with their numbers."""
    return {f"{_EXTRAS[(i - _FIRST) % len(_EXTRAS)]}_{i}": i for i in range(_FIRST, features)}


def _number_names(features: int) -> list[str]:
    return [*_FIRST_NUMBERS, *(n for n in _extras(features) if n.startswith(_EXTRA_NUMBERS))]


def _first_features(config: StreamConfig, items: int) -> dict[str, Feature]:
    return {
        "user": IdFeature(rows=config.users, hashed=False),
        "item": IdFeature(rows=items, hashed=False),
        "position": PositionFeature(rows=POSITIONS),
        "history": IdsFeature(rows=items, hashed=False, table="item", max_length=MAX_HISTORY),
        "group": IdFeature(rows=GROUPS, hashed=False),
        "category": IdFeature(rows=CATEGORIES, hashed=False),
        "tags": IdsFeature(rows=TAGS, hashed=False),
        "duration": NumberFeature(transform="log1p"),
        "item_age": NumberFeature(transform="log1p"),
        "hour": IdFeature(rows=24, hashed=False),
    }


def _bits(number: int) -> int:
    """Return the size of a hashed extra's id space, in bits: from 3 to 16."""
    return 3 + number * 5 % 14


def _extra_feature(name: str, number: int) -> Feature:
    kind = name.split("_")[0]
    if kind in _EXTRA_NUMBERS:
        return NumberFeature(transform="none" if kind == "noisy" else "log1p")
    if kind == "bucket":
        return IdFeature(rows=2 ** _bits(number), hashed=False)
    return IdFeature(rows=10_000) if kind == "cross" else IdsFeature(rows=512, hashed=False, pooling="sum")


@cache
def _positions() -> Int64:
    """Return a table of positions: an entry picked evenly is a position picked by how often it is shown."""
    weight = np.cumsum(np.arange(1.0, POSITIONS + 1) ** -0.7)
    table: Int64 = np.searchsorted(weight / weight[-1], (np.arange(1024) + 0.5) / 1024)
    return table


@cache
def _lengths() -> Int64:
    """Return history lengths: one in twenty is empty, most are short, the longest `MAX_HISTORY`."""
    share = (np.arange(1024) + 0.5) / 1024
    return np.clip(np.floor(-6 * np.log1p(-share) + 0.7), 0, MAX_HISTORY).astype(np.int64)


@cache
def _seen_by_position() -> Float32:
    return (1 / (1 + 0.07 * np.arange(POSITIONS))).astype(np.float32)


def _hours(day_B: NDArray[np.float64]) -> Int64:
    return (day_B % 1.0 * 24).astype(np.int64)


def _sigmoid(x: Float32) -> Float32:
    with np.errstate(over="ignore"):  # exp gives inf, and the answer 0 is right
        return (1 / (1 + np.exp(-x))).astype(np.float32, copy=False)


def _offsets(lengths: NDArray[Any]) -> NDArray[np.int32]:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _histories(world: World, day: float, cell_B: NDArray[np.uint8], u_B: Float32, rng: np.random.Generator) -> Column:
    """Draw items of the user's cell of tastes, or of one beside it; in a cell, the popular more often.

    Only items that lived when the block began are drawn: a history lies in the past.
    """
    slots = len(world.first_S)
    alive_S = find_items(world, np.arange(slots), np.full(slots, day))
    cell_S = world.cell_N.take(alive_S)
    alive_S = alive_S.take(np.argsort(cell_S, kind="stable"))
    count = np.bincount(cell_S, minlength=256)
    start = np.minimum(np.cumsum(count) - count, slots - 1)
    width = np.maximum(count, 1).astype(np.float32)  # an empty cell gives the first item of the next one
    lengths_B = _lengths().take((u_B * 1024).astype(np.int64))
    flips = np.array([0] * 8 + [1 << bit for bit in range(8)], np.uint8)
    bits = rng.integers(2**32, size=int(lengths_B.sum()), dtype=np.uint32)
    cell = np.repeat(cell_B, lengths_B) ^ flips.take(bits & 15)
    share = (bits >> 8).astype(np.float32) * np.float32(2**-24)
    place = start.take(cell) + (share * share * width.take(cell)).astype(np.int64)
    return Column(alive_S.take(np.minimum(place, slots - 1)), _offsets(lengths_B))


class _Rows(NamedTuple):
    """A block before it becomes columns."""

    day_B: NDArray[np.float64]
    user_B: Int64
    item_B: Int64
    category_B: Int64
    cross_B: Int64  # group times category
    position_B: Int64
    age_B: Float32  # of the item, in days
    past_B: NDArray[np.uint8]  # cell of the user's taste a day ago
    head_KB: Float32
    seen_B: Float32


def _draw_rows(
    config: StreamConfig, world: World, first: int, day_B: NDArray[np.float64], found: list[Strike]
) -> _Rows:
    """Draw who sees what, where; and how much of it they like."""
    count, rng = len(day_B), keyed_rng(config.seed, 1, first)
    u_user, u_position = rng.random((2, count), dtype=np.float32)
    user_B = np.minimum((u_user * u_user * config.users).astype(np.int64), config.users - 1)
    slot_B = rank_slots(world, float(day_B[count // 2]), rng.random())
    slot_B = slot_B.take(rng.integers(len(slot_B), size=count))
    item_B = take_over(found, config, world, user_B, slot_B, day_B)

    taste_DB, pace_B = world.taste_DU.take(user_B, axis=1), world.pace_U.take(user_B)

    def taste(days_ago: int) -> Float32:
        shift_B = shift_angle(config.incidents, config.rows, first - days_ago * config.rows_per_day, count)
        return turn_tastes(taste_DB, pace_B * (day_B - days_ago).astype(np.float32) + shift_B)

    affinity_B: Float32 = np.einsum("db,db->b", taste(0), world.taste_DN.take(item_B, axis=1))
    # The page was ranked by someone who knew a little of the affinity.
    place_B = u_position / (u_position + (1 - u_position) * np.exp(np.float32(0.25) * affinity_B))
    position_B = _positions().take((np.minimum(place_B, np.float32(0.999)) * 1024).astype(np.int64))
    category_B = find_categories(world, item_B)
    cross_B = world.group_U.take(user_B) * CATEGORIES + category_B
    age_B = (day_B - world.birth_N.take(item_B)).astype(np.float32)
    head_KB = still_heads(config.signal, world, user_B, item_B, cross_B, affinity_B)
    head_KB[0] += moving_click(config, world, day_B, category_B, item_B, age_B)
    seen_B = _seen_by_position().take(position_B)
    bend_heads(found, head_KB, seen_B)
    past_B = np.packbits(taste(1) > 0, axis=0)[0]
    return _Rows(day_B, user_B, item_B, category_B, cross_B, position_B, age_B, past_B, head_KB, seen_B)


def _logistic(u_B: Float32) -> Float32:
    """Return logistic noise; half a step added on both sides keeps it finite and symmetric."""
    half = np.float32(2**-25)
    return np.log((u_B + half) / (1 - u_B + half))


def _student(u_B: Float32) -> Float32:
    """Return Student's t noise with 2 degrees of freedom, held to +-50: its mean is 0, its variance finite."""
    half = np.float32(2**-25)
    low, high = u_B + half, 1 - u_B + half
    return np.clip((low - high) / np.sqrt(2 * low * high), -50, 50)


def _watch_truth(mean_B: Float32, factor_B: Float32 | None) -> Float32:
    """Return E[log1p(factor * seconds)], the seconds being expm1(max(0, mean + s L)) with logistic L.

    Without a factor it is s log(1 + exp(mean / s)). With one it is Gauss-Legendre quadrature over L's quantiles.
    """
    truth_B: Float32 = WATCH_SPREAD * np.logaddexp(np.float32(0), mean_B / WATCH_SPREAD)
    if factor_B is not None:
        changed = np.flatnonzero(factor_B != 1)
        at, weight = np.polynomial.legendre.leggauss(32)
        noise = WATCH_SPREAD * _logistic((at / 2 + 0.5).astype(np.float32))
        seconds = np.expm1(np.maximum(mean_B[changed, None] + noise, 0))
        learned = np.log1p(factor_B[changed, None] * seconds)
        truth_B[changed] = (learned * (weight / 2).astype(np.float32)).sum(axis=1)
    return truth_B


def _draw_labels(rows: _Rows, units: dict[str, Float32], rng: np.random.Generator) -> dict[str, Column]:
    """Draw all labels, with their truth; `units` are the factors of the labels that an incident changed."""
    u_click, u_like, u_share, u_watch, u_rating, u_rated = rng.random((6, len(rows.seen_B)), dtype=np.float32)
    click_B, like_B, share_B = _sigmoid(rows.head_KB[:3])
    log_watch_B, rating_B = rows.head_KB[3:]
    click_B *= rows.seen_B
    clicked = u_click < click_B
    watch = np.expm1(np.maximum(log_watch_B + WATCH_SPREAD * _logistic(u_watch), 0))
    long_B = _sigmoid((log_watch_B - np.float32(np.log1p(LONG_VIEW_S))) / WATCH_SPREAD)
    rating = rating_B + RATING_SPREAD * _student(u_rating)
    one = np.float32(1)
    return {
        "click": Column(clicked.view(np.int8)),
        "long_view": Column((clicked & (watch > LONG_VIEW_S)).view(np.int8)),
        "like": Column((clicked & (u_like < like_B)).view(np.int8)),
        "share": Column((clicked & (u_share < share_B)).view(np.int8)),
        "watch_time": Column(watch * units.get("watch_time", one), valid=clicked),
        "rating": Column(rating * units.get("rating", one), valid=clicked & (u_rated < 0.5)),
        TRUTH + "click": Column(click_B),
        TRUTH + "long_view": Column(click_B * long_B),
        TRUTH + "like": Column(click_B * like_B),
        TRUTH + "share": Column(click_B * share_B),
        TRUTH + "watch_time": Column(_watch_truth(log_watch_B, units.get("watch_time"))),
        TRUTH + "rating": Column(rating_B * units.get("rating", one)),
    }


def _hash(key_B: Int64, number: int, bits: int) -> Int64:
    """Return the top bits of key times an odd constant, modulo 2^32 (Fibonacci hashing)."""
    odd = np.uint32(2_654_435_769 * (2 * number + 1) % 2**32)
    return (((key_B + 1).astype(np.uint32) * odd) >> np.uint32(32 - bits)).astype(np.int64)


def _extra_column(world: World, rows: _Rows, name: str, number: int, rng: np.random.Generator) -> Column:
    """Draw one of the features past the tenth: what its name says, of this row's user, item or both."""
    kind, count, head = name.split("_")[0], len(rows.user_B), number % len(HEADS)
    if kind == "noisy":
        of_user = number // len(_EXTRAS) % 2 == 0
        table, at = (world.taste_DU, rows.user_B) if of_user else (world.taste_DN, rows.item_B)
        return Column(table[number % LATENT].take(at) + np.float32(0.5) * rng.standard_normal(count, dtype=np.float32))
    if kind == "lognormal":
        noise = rng.standard_normal(count, dtype=np.float32)
        return Column(np.exp(4 * world.quality_KN[head].take(rows.item_B) + noise), valid=rng.random(count) < 0.95)
    if kind == "pareto":
        tail = (1 - rng.random(count, dtype=np.float32)) ** np.float32(-1 / 1.2)
        return Column(tail * np.exp(2 * world.bias_KU[head].take(rows.user_B)))
    if kind == "bucket":
        key = (rows.user_B, rows.item_B, rows.cross_B)[number // len(_EXTRAS) % 3]
        return Column(_hash(key, number, _bits(number)))
    if kind == "cross":
        of_user = number // len(_EXTRAS) % 2 == 0
        return Column(rows.user_B * CATEGORIES + rows.category_B if of_user else rows.item_B * 24 + _hours(rows.day_B))
    lengths = rng.integers(5, size=count, dtype=np.uint8)
    cells = np.repeat(world.cell_N.take(rows.item_B), lengths).astype(np.int64)
    return Column(cells * 2 + rng.integers(2, size=len(cells), dtype=np.uint8), _offsets(lengths))


def _arrow(column: Column) -> pa.Array:
    """Turn a column into an Arrow array over the same memory."""
    if column.offsets is not None:
        return pa.ListArray.from_arrays(pa.array(column.offsets), pa.array(column.values))
    if column.valid is None:
        return pa.array(column.values)
    bitmap = pa.py_buffer(np.packbits(column.valid, bitorder="little"))
    kind = pa.from_numpy_dtype(column.values.dtype)
    return pa.Array.from_buffers(kind, len(column.values), [bitmap, pa.py_buffer(column.values)])


@lru_cache(maxsize=1)
def _hold_world(config: StreamConfig) -> World:
    """Make a stream's world once for all who ask for the same one in turn, as the cells of a ladder do."""
    return make_world(config)


class Stream:
    """The log of a recommender that never was, block by block.

    >>> stream = Stream(StreamConfig(rows=1000, users=100, items=100, block_rows=512, tasks=("click",)))
    >>> [table.num_rows for table in stream.tables()]
    [512, 488]
    >>> next(stream.tables(start=512)).column_names[-2:]
    ['click', 'truth/click']
    """

    def __init__(self, config: StreamConfig) -> None:
        self.config = config
        self._world = _hold_world(config)
        self._schema = self._make_schema()

    def schema(self) -> Schema:
        """Return what the columns mean."""
        return self._schema

    def tables(self, start: int = 0) -> Iterator[pa.Table]:
        """Yield the rows from `start` on, in time order, one table a block.

        Args:
            start: first row, a multiple of `block_rows`; the blocks before it cost nothing.

        Raises:
            ConfigError: `start` is no multiple of `block_rows`, or lies outside the stream.
        """
        size, rows = self.config.block_rows, self.config.rows
        if start % size or not 0 <= start <= rows:
            raise ConfigError(f"start: expected a multiple of block_rows ({size}) from 0 to {rows}, got {start}")
        return (self._block(first) for first in range(start, rows, size))

    @property
    def rows(self) -> int:
        """Rows of the stream."""
        return self.config.rows

    @property
    def columns(self) -> list[str]:
        """Names of the columns, those of the truth included."""
        return [*self._schema.columns, *(TRUTH + task for task in self.config.tasks)]

    def check(self, columns: list[str]) -> None:
        """Raise DataError unless the stream has all of `columns`; the message gives the nearest name."""
        for column in columns:
            check_known(column, self.columns, "column of the generated stream", DataError)

    def pieces(self, start: int = 0, columns: list[str] | None = None) -> Iterator[Piece]:
        """Yield the rows from row `start` on, at most a block at a time, as a log in Parquet would."""
        first = start - start % self.config.block_rows
        for table in self.tables(first):
            skip = max(start - first, 0)
            piece = table.slice(skip) if columns is None else table.slice(skip).select(columns)
            yield Piece(piece, Place("the generated stream", None, first + skip))
            first += len(table)

    def units(self) -> list[Unit]:
        """Return the blocks."""
        size = self.config.block_rows
        return [Unit(first, min(size, self.rows - first)) for first in range(0, self.rows, size)]

    def refresh(self) -> list[FileNote]:
        """Return nothing: the stream does not grow."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the config says it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], rows_done: int, rows_read: int | None) -> list[FileNote]:
        """Do nothing: the rows are the same ones."""
        return []

    def _make_schema(self) -> Schema:
        config = self.config
        features = _first_features(config, len(self._world.birth_N))
        features |= {name: _extra_feature(name, number) for name, number in _extras(config.features).items()}
        tasks = {name: _task(name, "click" in config.tasks) for name in config.tasks}
        return Schema(group="user", baseline=("user", "item"), features=features, tasks=tasks)

    def _block(self, first: int) -> pa.Table:
        config = self.config
        count = min(config.block_rows, config.rows - first)
        found = find_strikes(config.incidents, config.seed, config.rows, first, count)
        labels_rng = keyed_rng(config.seed, 2, first, 0)
        since_B = (np.arange(count) + labels_rng.random(count)) * (_DAY_US / config.rows_per_day)
        time_B = since_B.astype(np.int64) + first * _DAY_US // config.rows_per_day
        rows = _draw_rows(config, self._world, first, time_B / _DAY_US, found)
        columns = {"time": Column((time_B + _start_us(config)).view("datetime64[us]"))}
        columns |= self._feature_columns(rows, first)
        spoil_features(found, self._schema, columns)
        labels = _draw_labels(rows, _units(found, count), labels_rng)
        columns |= {name: labels[name] for prefix in ("", TRUTH) for name in (prefix + t for t in config.tasks)}
        return pa.table({name: _arrow(column) for name, column in columns.items()})

    def _feature_columns(self, rows: _Rows, first: int) -> dict[str, Column]:
        world, seed, count = self._world, self.config.seed, len(rows.user_B)
        rng = keyed_rng(seed, 2, first, 1)
        tag_count_B = world.tag_count_N.take(rows.item_B)
        tags = world.tags_N4.take(rows.item_B, axis=0)[np.arange(4) < tag_count_B[:, None]]
        columns = {
            "user": Column(rows.user_B),
            "item": Column(rows.item_B),
            "position": Column(rows.position_B),
            "history": _histories(world, float(rows.day_B[0]), rows.past_B, rng.random(count, dtype=np.float32), rng),
            "group": Column(world.group_U.take(rows.user_B)),
            "category": Column(rows.category_B),
            "tags": Column(tags, _offsets(tag_count_B)),
            "duration": Column(np.exp(world.log_seconds_N.take(rows.item_B))),
            "item_age": Column(rows.age_B * np.float32(24)),
            "hour": Column(_hours(rows.day_B)),
        }
        for name, number in _extras(self.config.features).items():
            columns[name] = _extra_column(world, rows, name, number, keyed_rng(seed, 2, first, number))
        return columns


def _start_us(config: StreamConfig) -> int:
    return (config.start - datetime.date(1970, 1, 1)).days * _DAY_US


def _units(found: list[Strike], count: int) -> dict[str, Float32]:
    """Return the factor of each row, for each target that an incident multiplies in this block."""
    units: dict[str, Float32] = {}
    for strike in found:
        if strike.incident.kind == "units" and strike.incident.target is not None:
            factor_B = units.setdefault(strike.incident.target, np.ones(count, np.float32))
            factor_B[strike.rows] *= np.float32(strike.strength)
    return units


# What an untrained model predicts: round numbers near the means of the stream as it is by default.
_START = {"click": 0.25, "long_view": 0.12, "like": 0.04, "share": 0.008, "watch_time": 25.0, "rating": 3.7}


def _task(name: str, click: bool) -> Task:
    if name not in ("watch_time", "rating"):
        return Task(kind="binary", start=_START[name])
    transform: Literal["none", "log1p"] = "log1p" if name == "watch_time" else "none"
    only_where = "click" if click else None
    return Task(kind="regression", transform=transform, only_where=only_where, start=_START[name])
