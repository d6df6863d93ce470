"""What is unusual about a batch: the formulas against slow twins, and planted changes found in streams that drift."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from steadyrank.monitors import unusual
from steadyrank.monitors.unusual import LABEL, UNUSUAL, Column, Reference, columns_of, find_unusual, thin
from steadyrank.schema import Batch, Ragged, Schema

from .batches import make_batch, make_schema

SCHEMA = make_schema()


def column(values: list[float]) -> Column:
    array = np.array(values)
    return Column(array, array, np.arange(len(array)), len(array))


def usual_batches(count: int = 20, rows: int = 200, schema: Schema = SCHEMA) -> list[Batch]:
    return [make_batch(schema, rows, seed=seed) for seed in range(count)]


def with_number(batch: Batch, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    numbers = batch.numbers.clone()
    at = list(SCHEMA.number_features).index(name)
    numbers[:, at] = change(numbers[:, at])
    return replace(batch, numbers=numbers)


# --- formulas ---------------------------------------------------------------------------------------------------------


def excess(count: float, expected: float) -> float:
    return count**0.5 + (count + 1) ** 0.5 - (4 * expected + 1) ** 0.5


@pytest.mark.parametrize("expected", [1.0, 3.0, 20.0, 500.0])
def test_the_excess_of_a_count_is_about_standard_normal(expected: float) -> None:
    z = unusual._excess(np.random.default_rng(0).poisson(expected, 100_000), expected)
    tolerance = 0.1 if expected < 3 else 0.05  # counts near 0 are coarse
    assert abs(z.mean()) < tolerance
    assert abs(z.std() - 1) < tolerance


def test_shares_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.zipf(1.5, size).clip(max=40) for size in (30, 50, 1, 40)]
    view = unusual._shares([column(part.tolist()) for part in parts])
    for r in range(1, 4):
        before = np.concatenate(parts[:r]).tolist()
        counts, earlier = Counter(parts[r].tolist()), Counter(before)
        z = [excess(n, earlier[v] / len(before) * len(parts[r])) for v, n in counts.items()]
        assert view.scores[r] == pytest.approx(sum(x * x for x in z if x > 2.5) ** 0.5)
    assert view.scores[0] >= 0
    assert view.now == Counter(parts[3].tolist())[view.value] / 40
    assert view.usual == Counter(np.concatenate(parts[:3]).tolist())[view.value] / 81


def test_the_shift_of_the_middle_equals_a_loop() -> None:
    rng = np.random.default_rng(1)
    now, before = rng.integers(0, 9, 23).astype(float), np.sort(rng.integers(0, 9, 70).astype(float))
    wins = sum((a > b) + 0.5 * (a == b) for a in now for b in before)
    expected = (wins / (23 * 70) - 0.5) * (12 / (1 / 23 + 1 / 70)) ** 0.5
    assert unusual._shift(now, before) == pytest.approx(expected)
    z = [unusual._shift(rng.normal(size=50), np.sort(rng.normal(size=500))) for _ in range(2000)]
    assert abs(np.std(z) - 1) < 0.05


def test_values_outside_the_range_weigh_by_how_far() -> None:
    before = np.arange(100.0)
    spread = 49.5 / 1.349
    assert unusual._outside(np.arange(100.0), before) == pytest.approx(excess(0, 200 / 101))
    expected = excess(2 + np.log1p(5 / spread) + np.log1p(1000 / spread), 4 * 2 / 101)
    assert unusual._outside(np.array([3.0, -5.0, 1099.0, 50.0]), before) == pytest.approx(expected)
    assert np.isfinite(unusual._outside(np.array([8.0]), np.full(9, 7.0)))  # no spread at all


def test_the_score_is_measured_by_the_usual_ones() -> None:
    usual = np.array([9.0, 9.0, 9.0, 1.0, 5.0, 3.0, 4.0, 2.0, 3.0])
    scores = np.append(usual, 20.0)
    kept = usual[2:]
    spread = 1.4826 * np.median(np.abs(kept - np.median(kept)))
    assert unusual._standardise(scores, 0.5) == pytest.approx((10.0 - np.quantile(kept, 0.9)) / spread)
    flat = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 6.0])
    assert unusual._standardise(flat, 1.0) == 6.0


# --- columns ----------------------------------------------------------------------------------------------------------


def test_columns_hold_every_value_of_every_row_once() -> None:
    batch = make_batch(SCHEMA, 50)
    columns = columns_of(batch, SCHEMA)
    assert set(columns) == {*SCHEMA.features, *(LABEL + task for task in SCHEMA.tasks)}
    for i, name in enumerate(SCHEMA.list_features):
        ends = batch.lists[i].offsets.tolist()
        pairs = {(b, v) for b in range(50) for v in batch.lists[i].values[ends[b] : ends[b + 1]].tolist()}
        found = columns[name]
        assert sorted(zip(found.rows.tolist(), found.values.tolist(), strict=True)) == sorted(pairs)
    watch = columns[LABEL + "watch"]
    at = batch.weights[:, 2].nonzero()[:, 0]
    assert watch.rows.tolist() == at.tolist()
    assert watch.values.tolist() == batch.labels[at, 2].double().tolist()
    price = columns["price"]
    np.testing.assert_allclose(price.learned, np.sign(price.values) * np.log1p(np.abs(price.values)))


# --- finding ----------------------------------------------------------------------------------------------------------


def test_nothing_is_found_where_nothing_happens() -> None:
    usual = usual_batches()
    for seed in range(100, 130):
        found = find_unusual(make_batch(SCHEMA, 200, seed=seed), usual, SCHEMA)
        assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)
        assert not [f for f in found if f.score >= UNUSUAL]


def struck(rows: int, share: float) -> torch.Tensor:
    return torch.arange(rows) < share * rows


HALF = struck(200, 0.5)


def plant_item(batch: Batch) -> Batch:
    ids = batch.ids.clone()
    ids[HALF, list(SCHEMA.id_features).index("item")] = SCHEMA.slot("item").start + 7
    return replace(batch, ids=ids)


def plant_tag(batch: Batch) -> Batch:
    at = list(SCHEMA.list_features).index("tags")
    value = SCHEMA.slot("tags").start + 5
    lists = list(batch.lists)
    ends = lists[at].offsets.tolist()
    rows = [[value] if HALF[b] else lists[at].values[ends[b] : ends[b + 1]].tolist() for b in range(len(batch))]
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    lists[at] = Ragged(torch.tensor([v for row in rows for v in row]), offsets)
    return replace(batch, lists=tuple(lists))


def plant_click(batch: Batch) -> Batch:
    labels = batch.labels.clone()
    labels[:, 0] = batch.weights[:, 0]
    return replace(batch, labels=labels)


def plant_watch(batch: Batch) -> Batch:
    labels = batch.labels.clone()
    labels[:, 2] = labels[:, 2] + 3 * batch.weights[:, 2]
    return replace(batch, labels=labels)


PLANTS = {
    "item": ("share", plant_item),
    "tags": ("share", plant_tag),
    "place": ("share", lambda b: replace(b, positions=torch.where(HALF[:, None], 3, b.positions))),
    "age": ("extremes", lambda b: with_number(b, "age", lambda x: 1000 * x)),
    "price": ("missing", lambda b: with_number(b, "price", lambda x: torch.where(HALF, torch.inf, x))),
    LABEL + "click": ("share", plant_click),
    LABEL + "watch": ("middle", plant_watch),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_change_is_found_with_its_rows(name: str) -> None:
    view, plant = PLANTS[name]
    before = make_batch(SCHEMA, 200, seed=99)
    batch = plant(before)
    first = find_unusual(batch, usual_batches(), SCHEMA)[0]
    assert first.feature == name
    assert first.score > UNUSUAL
    if view != "middle":  # that or `extremes`: both are true of labels that all grew
        assert first.view == view
    if name in ("item", "tags", "place", "price"):
        assert first.held_B[HALF].all()
        assert first.held_B[~HALF].mean() < 0.3
        assert first.now >= 0.5
        assert first.usual < 0.2
        assert first.held_B[first.example]
    if name == "item":
        assert first.value == SCHEMA.slot("item").start + 7
        assert batch.ids[first.example, list(SCHEMA.id_features).index("item")] == first.value
    if name == "age":
        furthest = batch.numbers[:, list(SCHEMA.number_features).index("age")].double()
        assert first.now == furthest[first.example]
        assert abs(first.now) > 1000 > abs(first.usual)


def test_a_feature_that_always_changes_is_not_unusual_until_it_changes_more() -> None:
    """Like the hour: each batch has a value that none before it had."""
    schema = make_schema("id", "number")
    at = list(schema.id_features).index("user")

    def at_hour(hour: int, seed: int, rows: int = 200) -> Batch:
        batch = make_batch(schema, rows, seed=seed)
        ids = batch.ids.clone()
        ids[:, at] = hour
        return replace(batch, ids=ids)

    usual = [at_hour(r // 2, r) for r in range(24)]
    assert not [f for f in find_unusual(at_hour(12, 50), usual, schema) if f.score >= UNUSUAL]
    # A larger batch shows the same, and more clearly; that makes it no more unusual.
    assert not [f for f in find_unusual(at_hour(12, 51, rows=3000), usual, schema) if f.score >= UNUSUAL]
    flat = [at_hour(0, r) for r in range(24)]
    assert find_unusual(at_hour(1, 50), flat, schema)[0].feature == "user"


def test_features_that_are_odd_in_the_same_rows_go_under_one_name() -> None:
    schema = Schema(
        features={"user": {"kind": "id", "rows": 500}, "hash": {"kind": "id", "rows": 100}, "age": {"kind": "number"}},
        tasks={"click": {"kind": "binary"}},
    )

    def draw(seed: int, user: int | None = None) -> Batch:
        batch = make_batch(schema.model_copy(update={"tasks": make_schema().tasks}), 200, seed=seed)
        batch = replace(batch, labels=batch.labels[:, :1], weights=batch.weights[:, :1])
        users = batch.ids[:, 0].clone()
        if user is not None:
            users[HALF] = user
        return replace(batch, ids=torch.stack([users, users % 50 + schema.slot("hash").start], 1))

    (first, *others) = find_unusual(draw(99, user=7), [draw(seed) for seed in range(20)], schema)
    assert first.feature == "user"
    assert first.same_as == ("hash",)
    assert "hash" not in [f.feature for f in others]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_short_history_finds_nothing(count: int) -> None:
    assert find_unusual(PLANTS["age"][1](make_batch(SCHEMA, 200)), usual_batches(count), SCHEMA) == []


def test_what_is_empty_flat_or_not_finite_is_no_trouble() -> None:
    usual = usual_batches()
    nothing = [with_number(each, "age", lambda x: torch.full_like(x, torch.nan)) for each in usual]
    flat = [with_number(each, "age", lambda x: torch.full_like(x, 3.0)) for each in usual]
    unlabelled = replace(usual[0], weights=torch.zeros_like(usual[0].weights))
    assert find_unusual(make_batch(SCHEMA, 0), usual, SCHEMA) == []
    for before in (nothing, flat, [unlabelled] * 9, [make_batch(SCHEMA, 0), *usual]):
        for batch in (usual[3], nothing[0], flat[0], unlabelled, make_batch(SCHEMA, 1)):
            assert all(np.isfinite(f.score) for f in find_unusual(batch, before, SCHEMA))
    first = find_unusual(nothing[0], usual, SCHEMA)[0]
    assert (first.feature, first.view, first.now) == ("age", "missing", 1.0)
    assert find_unusual(usual[0], flat, SCHEMA)[0].feature == "age"


# --- the memory -------------------------------------------------------------------------------------------------------


def test_a_reference_keeps_some_batches_thinned_and_resumes() -> None:
    reference = Reference(every=5, keep=3, rows=20)
    batches = [make_batch(SCHEMA, 50, seed=step) for step in range(23)]
    for step, batch in enumerate(batches):
        reference.add(step, batch)
    kept = reference.before(20)
    assert [int(batch.row[0]) // 1000 for batch in kept] == [10, 15]
    assert [len(batch) for batch in kept] == [20, 20]
    other = Reference(every=5, keep=3, rows=20)
    other.load_state_dict(reference.state_dict())
    for one, two in zip(reference.before(99), other.before(99), strict=True):
        assert all(torch.equal(one.__dict__[key], two.__dict__[key]) for key in ("ids", "row", "weights", "time"))
        assert all(
            torch.equal(a, b) for x, y in zip(one.lists, two.lists, strict=True) for a, b in zip(x, y, strict=True)
        )
        assert one.truth is two.truth is None


def test_thinned_rows_are_evenly_spread() -> None:
    batch = make_batch(SCHEMA, 10)
    assert thin(batch, 10) is batch
    assert thin(batch, 4).row.tolist() == [0, 2, 5, 7]
