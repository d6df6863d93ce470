"""Who and what a generated stream is about: users with tastes that turn, items that are born, trend and die.

A user's taste and an item's are vectors; their product, the affinity, is what both of their ids are needed for. What is
done with it stands in the heads: click, like, share (logits), watch time and rating. Nothing here depends on rows that
came before: all is closed-form in time.

Shapes: B rows of a block, D latent dimensions, K heads, U users, N items that ever live, S slots, X pairs of user group
and category.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ..settings import Settings

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

LATENT, GROUPS, CATEGORIES, TAGS = 8, 32, 64, 1000

HEADS = np.array(
    [
        # intercept, then the spread of user biases, item qualities, tastes and crosses
        [-0.75, 0.40, 0.45, 1.00, 0.65],  # click, a logit
        [-2.30, 0.50, 0.50, 0.50, 0.50],  # like after a click, a logit
        [-4.20, 0.50, 0.60, 0.50, 0.50],  # share after a click, a logit
        [3.10, 0.20, 0.25, 0.35, 0.25],  # watch time, log(1 + s)
        [3.50, 0.30, 0.30, 0.40, 0.25],  # rating
    ],
    np.float32,
)
_MOST_ITEMS = 100_000_000
_MOST_DAYS = 36_500


class WorldConfig(Settings):
    """The users and items of a generated stream, and how time passes among them."""

    rows: int = Field(default=1_000_000, ge=1)
    """Rows in all."""
    rows_per_day: int = Field(default=100_000, ge=100)
    """Rows a day, which is what ties rows to time."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides everything that is random."""
    users: int = Field(default=20_000, ge=100, le=10_000_000)
    """Users; the n-th most active sends a share of the rows that falls as 1 / sqrt(n)."""
    items: int = Field(default=10_000, ge=100, le=10_000_000)
    """Items alive at any moment; more than that live in the course of the stream."""
    item_life_days: float = Field(default=14.0, gt=0, le=1_000_000)
    """Median life of an item, in days; single lives are from a seventh to seven times as long."""
    popularity: float = Field(default=0.9, ge=0, le=3)
    """Exponent of the power law of items' popularity; 0 makes all alike."""
    drift: float = Field(default=1.0, ge=0, le=100)
    """Pace at which tastes turn and categories rise and fall: the typical angle in 30 days, in radians."""
    signal: float = Field(default=1.0, ge=0, le=5)
    """Factor on all that there is to learn about users and items; 0 leaves only rates, positions and incidents."""

    @model_validator(mode="after")
    def _bounded(self) -> "WorldConfig":
        if self.days > _MOST_DAYS:
            raise ValueError(
                f"rows_per_day: {self.rows} rows at {self.rows_per_day} a day last {self.days:,.0f} days; "
                f"expected at most {_MOST_DAYS}: raise rows_per_day"
            )
        lives = self.items * (1 + self.days / self.item_life_days)
        if lives > _MOST_ITEMS:
            raise ValueError(
                f"items: about {lives:,.0f} items would live in {self.days:,.0f} days; expected at most "
                f"{_MOST_ITEMS:,}: lower items, or raise item_life_days or rows_per_day"
            )
        return self

    @property
    def days(self) -> float:
        """Length of the stream, in days."""
        return self.rows / self.rows_per_day


class World(NamedTuple):
    """All that a block needs and that does not change with time."""

    taste_DU: Float32
    bias_KU: Float32
    pace_U: Float32
    """Angle by which a user's taste turns, in radians a day."""
    group_U: Int64
    taste_DN: Float32
    quality_KN: Float32
    log_seconds_N: Float32
    """Logarithm of an item's own length, in seconds."""
    birth_N: Float32
    """Days since the start of the stream; negative for the items that were there before."""
    life_N: Float32
    """Days."""
    cell_N: NDArray[np.uint8]
    """Which dimensions of its taste are positive, one bit each; the first six are the category."""
    tags_N4: Int64
    tag_count_N: NDArray[np.int8]
    first_S: Int64
    """Where the items of a slot begin in `id_N`."""
    rate_S: NDArray[np.float64]
    """Lives a day."""
    phase_S: NDArray[np.float64]
    """Share of its life that a slot's first item has behind it when the stream starts."""
    id_N: Int64
    """Ids by slot and generation; they are given in the order of birth."""
    zipf_S: NDArray[np.float64]
    cross_KX: Float32
    appeal_2C: Float32
    hour_H: Float32


def keyed_rng(*key: int) -> np.random.Generator:
    """Return the generator that belongs to a key: the seed, a purpose, and what it is for.

    The purposes: 0 world, 1 rows, 2 labels and features, 3 one block of an incident, 4 an incident as a whole.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def make_world(config: WorldConfig) -> World:
    """Draw the users and items of a stream."""
    rng = keyed_rng(config.seed, 0)
    slots = _make_slots(config, rng)
    users, items, heads = config.users, len(slots["id_N"]), len(HEADS)

    def normal(*shape: int) -> Float32:
        return rng.standard_normal(shape, dtype=np.float32)

    group_U = rng.integers(GROUPS, size=users)
    sign_DN = rng.integers(2, size=(LATENT, items), dtype=np.uint8)
    cell_N = np.packbits(sign_DN, axis=0)[0]
    # Most of a taste is shared, by group or cell, so that a ranker knows much of a user or an item after few rows.
    size_DN = (np.float32(0.7) + np.float32(0.35) * np.abs(normal(LATENT, items))) / np.float32(LATENT**0.5)
    signal = np.float32(config.signal)
    bias, quality, cross = signal * HEADS[:, 1:2], signal * HEADS[:, 2:3], signal * HEADS[:, 4:5]
    return World(
        taste_DU=np.float32(0.8) * normal(LATENT, GROUPS)[:, group_U] + np.float32(0.6) * normal(LATENT, users),
        bias_KU=bias * normal(heads, users),
        pace_U=np.float32(config.drift / 30) * (normal(GROUPS)[group_U] + np.float32(0.3) * normal(users)),
        group_U=group_U,
        taste_DN=np.where(sign_DN, size_DN, -size_DN),
        quality_KN=quality * normal(heads, items),
        log_seconds_N=np.float32(3.7) + np.float32(0.8) * normal(items),
        cell_N=cell_N,
        # Four of the forty tags of its cell, the ranges of neighbouring cells overlapping: tags tell tastes.
        tags_N4=(cell_N[:, None].astype(np.int64) * 4 + rng.integers(40, size=(items, 4))) % TAGS,
        tag_count_N=rng.integers(1, 5, size=items, dtype=np.int8),
        cross_KX=cross * normal(heads, GROUPS * CATEGORIES),
        appeal_2C=np.float32(0.4) * signal * normal(2, CATEGORIES),
        hour_H=np.float32(0.2) * signal * normal(24),
        **slots,
    )


def _make_slots(config: WorldConfig, rng: np.random.Generator) -> dict[str, Any]:
    """Lay out which item lives in which slot, and when."""
    life_S = config.item_life_days * np.exp(np.clip(0.8 * rng.standard_normal(config.items), -2, 2))
    rate_S, phase_S = 1 / life_S, rng.random(config.items)
    count_S = np.floor(config.days * rate_S + phase_S).astype(np.int64) + 1
    first_S = np.cumsum(count_S) - count_S
    slot_N = np.repeat(np.arange(config.items), count_S)
    birth_N = (np.arange(len(slot_N)) - first_S[slot_N] - phase_S[slot_N]) * life_S[slot_N]
    order = np.argsort(birth_N, kind="stable")
    id_N = np.empty(len(order), np.int64)
    id_N[order] = np.arange(len(order))
    return {
        "first_S": first_S,
        "rate_S": rate_S,
        "phase_S": phase_S,
        "id_N": id_N,
        "birth_N": birth_N[order].astype(np.float32),
        "life_N": life_S[slot_N[order]].astype(np.float32),
        "zipf_S": np.arange(1.0, config.items + 1) ** -config.popularity,
    }


def find_items(world: World, slot_B: Int64, day_B: NDArray[np.float64]) -> Int64:
    """Return the item that lives in each slot at each time (days since the start)."""
    generation = (day_B * world.rate_S.take(slot_B) + world.phase_S.take(slot_B)).astype(np.int64)
    return world.id_N.take(world.first_S.take(slot_B) + generation)


def find_categories(world: World, item_B: Int64) -> Int64:
    """Return the category of each item."""
    return (world.cell_N.take(item_B) >> 2).astype(np.int64)


def rank_slots(world: World, day: float, dither: float) -> Int64:
    """Return a table of slots: an entry picked evenly is a slot picked by its popularity on that day.

    popularity = rank^-exponent * trend(age), the trend rising from birth to a peak at a fifth of the life.

    Args:
        day: days since the start of the stream.
        dither: in [0, 1); moves the rounding, so that over many tables even the rarest slot gets its share.
    """
    age_S = (day * world.rate_S + world.phase_S) % 1.0
    trend_S = 5 * age_S * np.exp(1 - 5 * age_S) + 0.05
    weight_S = np.cumsum(world.zipf_S * trend_S)
    size = max(2**18, 1 << (4 * len(age_S) - 1).bit_length())
    ends_S = np.floor(weight_S * (size / weight_S[-1]) + dither).astype(np.int64)
    ends_S[-1] = size
    return np.repeat(np.arange(len(ends_S)), np.diff(np.minimum(ends_S, size), prepend=0))


def turn_tastes(taste_DB: Float32, angle_B: Float32) -> Float32:
    """Turn each taste by its angle (radians), in the planes of dimensions d and d + D/2."""
    cos_B, sin_B = np.cos(angle_B), np.sin(angle_B)
    x_DB, y_DB = taste_DB[: LATENT // 2], taste_DB[LATENT // 2 :]
    return np.concatenate([x_DB * cos_B - y_DB * sin_B, x_DB * sin_B + y_DB * cos_B])


def still_heads(
    signal: float, world: World, user_B: Int64, item_B: Int64, cross_B: Int64, affinity_B: Float32
) -> Float32:
    """Return the part of the heads that only tastes move: intercept, user, item, affinity, and group by category."""
    head_KB: Float32 = np.float32(signal) * HEADS[:, 3:4] * affinity_B + HEADS[:, :1]
    head_KB += world.bias_KU.take(user_B, axis=1)
    head_KB += world.quality_KN.take(item_B, axis=1)
    head_KB += world.cross_KX.take(cross_B, axis=1)
    head_KB[3] += np.float32(0.3) * (world.log_seconds_N.take(item_B) - np.float32(3.7))
    return head_KB


def moving_click(
    config: WorldConfig, world: World, day_B: NDArray[np.float64], category_B: Int64, item_B: Int64, age_B: Float32
) -> Float32:
    """Return the part of the click head that time moves: the category's season, the hour, and the item's age."""
    season_B = (day_B * (config.drift / 30)).astype(np.float32)
    click_B: Float32 = np.cos(season_B) * world.appeal_2C[0].take(category_B)
    click_B += np.sin(season_B) * world.appeal_2C[1].take(category_B)
    click_B += world.hour_H.take((day_B % 1.0 * 24).astype(np.int64))
    click_B -= np.float32(0.5 * config.signal) * np.minimum(age_B / world.life_N.take(item_B), 1)
    return click_B
