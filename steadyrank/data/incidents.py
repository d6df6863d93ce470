"""What can go wrong in a generated stream at a given time: a shift, a viral item, bots, wrong units, garbage.

An incident draws from a generator of its own, so the rows that it does not strike are those of the stream without it.

Shapes: B rows of a block, K heads (click, like, share, watch time, rating).
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ..schema import IdFeature, IdsFeature, NumberFeature, Schema
from ..settings import Settings
from .world import Float32, Int64, World, WorldConfig, find_items, keyed_rng

BOTS = 20
"""Users that a burst of bots speaks through."""
RATES_SHIFT = np.array([0.5, -0.5, 0.5, 0.3, 0.0], np.float32)
"""What a shift of strength 1 adds to the heads."""
RATES_VIRAL = np.array([1.5, -1.0, 2.5, -0.5, 0.5], np.float32)
"""What the viral item adds to the heads: clicked and shared far more, liked less, left early."""
RATES_BOTS = np.array([0.0, -1.0, -1.0, 0.5, 5.0], np.float32)
"""The heads of a bot's row: half of all is clicked, whatever it is and wherever it stands."""

_STRENGTHS = {"shift": 1.0, "viral": 0.5, "bots": 0.3, "units": 1000.0, "garbage": 0.1}
_SHARES = ("viral", "bots", "garbage")
_EXTREMES = np.array([1e30, -1e30, np.inf, -np.inf, np.nan, 1e10, -1e10, 0.0], np.float32)


class Incident(Settings):
    """One incident of a generated stream.

    >>> Incident(kind="units", at=0.5, target="watch_time").strength_or_default
    1000.0
    """

    kind: Literal["shift", "viral", "bots", "units", "garbage"]
    """`shift`: tastes turn and rates jump. `viral`: one item takes a share of the traffic, at odd rates. `bots`: a few
    users click at random on everything. `units`: one label or number is multiplied. `garbage`: random ids and extreme
    numbers (up to 1e30, infinite or not a number) in a share of the rows, whose labels stay right."""
    at: float = Field(ge=0, lt=1)
    """When it begins, as a share of the stream's rows."""
    length: float | None = Field(default=None, gt=0, le=1)
    """How long it lasts, as a share of the stream's rows. When left out, a shift lasts to the end, all else 0.02."""
    strength: float | None = None
    """`shift`: angle by which tastes turn, in radians, -10 to 10 (default 1). `viral`, `bots`, `garbage`: share of the
    rows struck, above 0 and at most 1 (0.5, 0.3, 0.1). `units`: the factor, above 0 (1000)."""
    target: str | None = None
    """`units` only: the regression task or number feature whose column is multiplied."""

    @model_validator(mode="after")
    def _fits_kind(self) -> "Incident":
        if (self.target is None) == (self.kind == "units"):
            wanted = "needs the name of a regression task or number feature" if self.target is None else "takes none"
            raise ValueError(f"target: an incident of kind '{self.kind}' {wanted}, got {self.target!r}")
        strength = self.strength_or_default
        if self.kind in _SHARES and not 0 < strength <= 1:
            raise ValueError(f"strength: of '{self.kind}' is a share of rows, above 0 and at most 1, got {strength}")
        if self.kind == "units" and strength <= 0:
            raise ValueError(f"strength: of 'units' is a factor above 0, got {strength}")
        if self.kind == "shift" and not -10 <= strength <= 10:
            raise ValueError(f"strength: of 'shift' is an angle in radians, -10 to 10, got {strength}")
        return self

    @property
    def strength_or_default(self) -> float:
        """The strength, or its kind's default when left out."""
        return _STRENGTHS[self.kind] if self.strength is None else self.strength

    def span(self, rows: int) -> tuple[int, int]:
        """Return the first row struck and the one after the last, in a stream of so many rows.

        >>> Incident(kind="bots", at=0.5, length=0.1).span(1000)
        (500, 600)
        """
        length = self.length or (1.0 if self.kind == "shift" else 0.02)
        return round(self.at * rows), min(rows, round((self.at + length) * rows))


class Column(NamedTuple):
    """One column of a block: plain values, or lists (offsets), or values with nulls (valid is False)."""

    values: NDArray[Any]
    offsets: NDArray[np.int32] | None = None
    valid: NDArray[np.bool_] | None = None


class Strike(NamedTuple):
    """One incident within one block: the rows of the block that it strikes, and the generator that it draws from."""

    incident: Incident
    number: int
    """The incident's place in the config."""
    rows: NDArray[np.int64]
    rng: np.random.Generator

    @property
    def strength(self) -> float:
        """The incident's strength."""
        return self.incident.strength_or_default


def find_strikes(incidents: Sequence[Incident], seed: int, rows: int, first: int, count: int) -> list[Strike]:
    """Return what strikes the `count` rows from `first` on, in a stream of `rows` rows."""
    found = []
    for number, incident in enumerate(incidents):
        start, end = incident.span(rows)
        low, high = max(start - first, 0), min(end - first, count)
        if low >= high:
            continue
        rng = keyed_rng(seed, 3, first, number)
        struck = np.arange(low, high)
        if incident.kind in _SHARES:
            struck = struck[rng.random(high - low) < incident.strength_or_default]
        found.append(Strike(incident, number, struck, rng))
    return found


def shift_angle(incidents: Sequence[Incident], rows: int, first: int, count: int) -> Float32:
    """Return the angle by which shifts turn the tastes of the `count` rows from `first` (which may be negative) on."""
    angle_B = np.zeros(count, np.float32)
    for incident in incidents:
        if incident.kind == "shift":
            start, end = incident.span(rows)
            angle_B[max(start - first, 0) : max(end - first, 0)] += np.float32(incident.strength_or_default)
    return angle_B


def take_over(
    found: Sequence[Strike], config: WorldConfig, world: World, user_B: Int64, slot_B: Int64, day_B: NDArray[np.float64]
) -> Int64:
    """Let bots take over users and slots, in place, and viral items the rest; return the items that are shown."""
    for strike in found:
        if strike.incident.kind == "bots":
            crowd = keyed_rng(config.seed, 4, strike.number).integers(config.users, size=BOTS)
            user_B[strike.rows] = strike.rng.choice(crowd, size=len(strike.rows))
            slot_B[strike.rows] = strike.rng.integers(config.items, size=len(strike.rows))
    item_B = find_items(world, slot_B, day_B)
    for strike in found:
        if strike.incident.kind == "viral":
            # An item from the tail, whichever lives there when it all begins.
            day = strike.incident.span(config.rows)[0] / config.rows_per_day
            item_B[strike.rows] = find_items(world, np.array([config.items - 1 - strike.number]), np.array([day]))
    return item_B


def bend_heads(found: Sequence[Strike], head_KB: Float32, seen_B: Float32) -> None:
    """Let shifts, viral items and bots change the heads; a bot examines every place (`seen_B` is 1)."""
    for strike in found:
        if strike.incident.kind == "viral":
            head_KB[:, strike.rows] += RATES_VIRAL[:, None]
        elif strike.incident.kind == "shift":
            head_KB[:, strike.rows] += np.float32(strike.strength) * RATES_SHIFT[:, None]
    for strike in found:
        if strike.incident.kind == "bots":
            head_KB[:, strike.rows] = RATES_BOTS[:, None]
            seen_B[strike.rows] = 1.0


def spoil_features(found: Sequence[Strike], schema: Schema, columns: dict[str, Column]) -> None:
    """Let units and garbage change the features' columns, in place."""
    for strike in found:
        if strike.incident.kind == "units" and strike.incident.target in schema.number_features:
            columns[strike.incident.target].values[strike.rows] *= np.float32(strike.strength)
        elif strike.incident.kind == "garbage":
            for name, feature in schema.features.items():
                column = columns[name]
                if isinstance(feature, NumberFeature):
                    column.values[strike.rows] = strike.rng.choice(_EXTREMES, size=len(strike.rows))
                elif isinstance(feature, IdFeature | IdsFeature):
                    at = strike.rows if column.offsets is None else _elements(column.offsets, strike.rows)
                    column.values[at] = strike.rng.integers(feature.rows, size=len(at))


def _elements(offsets: NDArray[np.int32], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the elements of the lists of `rows` lie."""
    struck = np.zeros(len(offsets) - 1, bool)
    struck[rows] = True
    return np.flatnonzero(np.repeat(struck, np.diff(offsets)))
