"""The generated stream: pure, true to the probabilities that it states, and wrong only where it was told to be."""

from collections.abc import Sequence
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from steadyrank.data.columns import Encoder, Place
from steadyrank.data.stream import TRUTH, Stream, StreamConfig
from steadyrank.errors import ConfigError
from steadyrank.schema import IdFeature, IdsFeature, NumberFeature, PositionFeature

TASKS = ("click", "long_view", "like", "share", "watch_time", "rating")
SMALL = {"rows": 40_000, "rows_per_day": 4_000, "users": 500, "items": 300, "block_rows": 8192}


def generate(**settings: Any) -> pa.Table:
    return pa.concat_tables(Stream(StreamConfig(**settings)).tables())


def values(table: pa.Table, name: str) -> np.ndarray:
    """A column as numpy; NaN where null."""
    column = table[name].combine_chunks()
    return column.to_numpy(zero_copy_only=False)


def deviations(table: pa.Table, task: str, parts: int = 1) -> np.ndarray:
    """By parts of equal size, from low truth to high: mean of (label - truth), in its own standard errors."""
    label, truth = values(table, task).astype(float), values(table, TRUTH + task).astype(float)
    known = ~np.isnan(label)
    label, truth = label[known], truth[known]
    if task == "watch_time":
        label = np.log1p(label)
    found = []
    for part in np.array_split(np.argsort(truth, kind="stable"), parts):
        error = (label - truth)[part]
        spread = np.sqrt((truth[part] * (1 - truth[part])).mean()) if task in TASKS[:4] else error.std()
        found.append(error.mean() / spread * np.sqrt(len(part)))
    return np.array(found)


@pytest.fixture(scope="module")
def plain() -> pa.Table:
    return generate(rows=400_000, rows_per_day=40_000)


def test_two_runs_are_equal_and_seeds_differ() -> None:
    assert generate(**SMALL, features=25).equals(generate(**SMALL, features=25))
    other = generate(**SMALL, seed=1)
    assert not generate(**SMALL)["user"].equals(other["user"])


@settings(deadline=None, max_examples=5)
@given(block=st.integers(0, 4), seed=st.integers(0, 2**32 - 1))
def test_a_start_equals_skipping(block: int, seed: int) -> None:
    stream = Stream(
        StreamConfig(**SMALL, seed=seed, features=16, incidents=[{"kind": "bots", "at": 0.4, "length": 0.5}])
    )
    tables = list(stream.tables())
    assert [len(table) for table in tables] == [8192, 8192, 8192, 8192, 7232]
    resumed = list(stream.tables(start=block * 8192))
    assert len(resumed) == len(tables) - block
    assert all(a.equals(b) for a, b in zip(resumed, tables[block:], strict=True))


def test_pieces_resume_within_a_block() -> None:
    stream = Stream(StreamConfig(**SMALL))
    whole = generate(**SMALL)
    pieces = list(stream.pieces(10_000, ["user", "click"]))
    assert pa.concat_tables(p.table for p in pieces).equals(whole.slice(10_000).select(["user", "click"]))
    assert pieces[0].place.first_row == 10_000


def test_other_features_and_tasks_leave_the_rest_as_it_was() -> None:
    few, many = generate(**SMALL), generate(**SMALL, features=40)
    assert many.select(few.column_names).equals(few)
    part = generate(**SMALL, tasks=("rating", "like"))
    assert set(few.column_names) - set(part.column_names) == {
        prefix + task for prefix in ("", TRUTH) for task in ("click", "long_view", "share", "watch_time")
    }
    assert few.select(part.column_names).equals(part)
    assert Stream(StreamConfig(**SMALL, tasks=("rating",))).schema().tasks["rating"].only_where is None


def test_time_is_sorted_and_starts_on_its_day() -> None:
    time = values(generate(**SMALL, start="2025-12-31"), "time")
    assert time.dtype == "datetime64[us]"
    assert (np.diff(time) >= np.timedelta64(0)).all()
    days, counts = np.unique(time.astype("datetime64[D]"), return_counts=True)
    assert str(days[0]) == "2025-12-31"
    assert list(counts) == [4000] * 10


@pytest.mark.parametrize("task", TASKS)
def test_truth_is_the_expectation(plain: pa.Table, task: str) -> None:
    assert np.abs(deviations(plain, task)).max() < 4
    assert np.abs(deviations(plain, task, parts=10)).max() < 4.5


def test_truth_by_item_and_position(plain: pa.Table) -> None:
    """Truth must hold in every slice, not only by its own size."""
    error = values(plain, "click") - values(plain, TRUTH + "click")
    for name in ("position", "category", "group", "hour"):
        key = values(plain, name)
        count = np.bincount(key)
        z = np.bincount(key, error) / np.sqrt(np.maximum(count, 1) * error.var())
        assert np.abs(z).max() < 4.5, name


def test_rates_and_scales(plain: pa.Table) -> None:
    rate = {task: values(plain, task).astype(float) for task in TASKS}
    assert 0.2 < rate["click"].mean() < 0.3
    assert 0.07 < rate["long_view"].mean() < 0.14
    assert 0.02 < rate["like"].mean() < 0.05
    assert 0.004 < rate["share"].mean() < 0.012
    watch, rating = (rate[task][~np.isnan(rate[task])] for task in ("watch_time", "rating"))
    assert watch.min() >= 0
    assert watch.max() > 50 * np.median(watch)  # heavy tail
    assert 3 < np.median(rating) < 4.5
    assert np.abs(rating - rating.mean()).max() > 8 * rating.std()
    for task in ("watch_time", "rating"):
        spread = (np.log1p(watch) if task == "watch_time" else rating).std()
        assert 0.5 < spread < 2, task


def test_labels_fit_together(plain: pa.Table) -> None:
    click = values(plain, "click") == 1
    for task in ("long_view", "like", "share"):
        assert not values(plain, task)[~click].any()
    watch, rating = values(plain, "watch_time"), values(plain, "rating")
    assert (np.isnan(watch) == ~click).all()
    assert np.isnan(rating[~click]).all()
    assert 0.45 < np.isnan(rating[click]).mean() < 0.55
    assert ((watch > 30) == (values(plain, "long_view") == 1)).all()


def test_attainable_auc_and_the_running_mean_baseline() -> None:
    table = generate(rows=200_000)
    click = values(table, "click")
    attainable = roc_auc_score(click, values(table, TRUTH + "click"))
    assert 0.75 <= attainable <= 0.82
    half, scores = len(click) // 2, []
    for name in ("user", "item"):
        key = values(table, name)
        count = np.bincount(key[:half], minlength=key.max() + 1)
        clicks = np.bincount(key[:half], click[:half], minlength=key.max() + 1)
        mean = ((clicks + 5 * click[:half].mean()) / (count + 5))[key[half:]]
        scores.append(np.log(mean / (1 - mean)))
    baseline = roc_auc_score(click[half:], sum(scores))
    assert 0.51 < baseline < attainable - 0.1


def test_signal_zero_leaves_nothing_but_position() -> None:
    table = generate(**SMALL, signal=0)
    truth, position = values(table, TRUTH + "click"), values(table, "position")
    assert max(np.ptp(truth[position == place]) for place in range(20)) < 1e-6
    assert np.ptp(truth) > 0.1


def test_group_and_category_cross(plain: pa.Table) -> None:
    """Group by category tells more of the click than the best sum of the two."""
    truth = values(plain, TRUTH + "click").astype(float)
    group, category = values(plain, "group"), values(plain, "category")
    count, total = np.zeros((32, 64)), np.zeros((32, 64))
    np.add.at(count, (group, category), 1)
    np.add.at(total, (group, category), truth)
    cell = total / np.maximum(count, 1)
    rest = cell - cell.mean(0) - cell.mean(1, keepdims=True) + cell.mean()
    assert rest.std() > 1.5 * cell.mean(0).std()


def test_popularity_follows_a_power_law(plain: pa.Table) -> None:
    flat = generate(**SMALL, popularity=0)
    steep = np.sort(np.bincount(values(plain, "item")))[::-1].astype(float)
    rank = np.arange(10, 1000)
    slope = np.polyfit(np.log(rank), np.log(steep[rank]), 1)[0]
    assert -1.3 < slope < -0.6
    assert np.bincount(values(flat, "item")).max() < 0.03 * len(flat)
    users = np.sort(np.bincount(values(plain, "user")))[::-1]
    assert users[:200].sum() > 5 * users[-10_000:-9_800].sum()


def test_items_are_born_trend_and_die() -> None:
    table = generate(**(SMALL | {"rows": 120_000, "block_rows": 512}), item_life_days=5)
    item, day = values(table, "item"), np.arange(120_000) / 4000
    age_days = values(table, "item_age") / 24
    assert (age_days >= 0).all()
    early, late = np.unique(item[day < 3]), np.unique(item[day > 27])
    assert len(np.intersect1d(early, late)) < 0.3 * len(early)
    born = (day - age_days)[np.unique(item, return_index=True)[1]]
    assert (np.diff(born) > -1e-3).all()  # ids count births
    assert (born > 1).sum() > 300
    # Of the items born in the stream, few rows come at birth, most soon after it, and few late.
    young = (day - age_days > 0) & (day - age_days < 15)
    counts = np.histogram(age_days[young], bins=[0, 0.05, 1, 2, 5, 10, 15])[0] / [0.05, 1, 1, 3, 5, 5]
    assert counts[1] > counts[0]
    assert counts[1:].argmax() <= 1
    assert counts[-1] < 0.25 * counts.max()


def test_tastes_drift() -> None:
    def agreement(drift: float) -> float:
        table = generate(rows=240_000, rows_per_day=4000, users=500, items=300, drift=drift)
        truth = values(table, TRUTH + "rating")  # no season in it, only tastes and qualities
        key = values(table, "group") * 64 + values(table, "category")
        halves = []
        for part in (slice(0, 80_000), slice(160_000, 240_000)):
            count = np.bincount(key[part], minlength=2048)
            halves.append((np.bincount(key[part], truth[part], minlength=2048) / np.maximum(count, 1), count > 20))
        both = halves[0][1] & halves[1][1]
        return float(np.corrcoef(halves[0][0][both], halves[1][0][both])[0, 1])

    assert agreement(0) > agreement(2) + 0.2


def test_histories_tell_tastes(plain: pa.Table) -> None:
    """The items of a history resemble each other, and clicked items resemble the history."""
    item, category, click = (values(plain, name) for name in ("item", "category", "click"))
    of_item = np.zeros(item.max() + 1, np.int64)
    of_item[item] = category
    history = plain["history"].combine_chunks()
    length = np.diff(history.offsets.to_numpy())
    assert length.max() == 20
    assert 0.02 < (length == 0).mean() < 0.2
    element = of_item[np.minimum(history.values.to_numpy(), item.max())]
    row = np.repeat(np.arange(len(length)), length)
    same = np.bincount(row, element == category[row], minlength=len(length)) / np.maximum(length, 1)
    assert click[same > 0.3].mean() > click[same == 0].mean() + 0.1


def test_clicks_fall_with_position(plain: pa.Table) -> None:
    position, click = values(plain, "position"), values(plain, "click")
    rate = np.bincount(position, click) / np.bincount(position)
    assert len(rate) == 20
    assert rate[0] > 1.8 * rate[19]
    assert all(a > b for a, b in pairwise(rate.reshape(5, 4).mean(1)))


INCIDENTS = {
    "shift": {"kind": "shift", "length": 0.3},
    "viral": {"kind": "viral", "length": 0.3},
    "bots": {"kind": "bots", "length": 0.3},
    "watch": {"kind": "units", "length": 0.3, "target": "watch_time"},
    "rating": {"kind": "units", "length": 0.3, "target": "rating", "strength": 10},
    "duration": {"kind": "units", "length": 0.3, "target": "duration"},
    "garbage": {"kind": "garbage", "length": 0.3, "strength": 0.5},
}
STRUCK = slice(60_000, 78_000)
WIDE = {"rows": 100_000, "rows_per_day": 10_000, "users": 1000, "items": 500, "block_rows": 8192, "features": 22}


@pytest.fixture(scope="module")
def calm() -> pa.Table:
    return generate(**WIDE)


def hit(name: str) -> pa.Table:
    return generate(**WIDE, incidents=[INCIDENTS[name] | {"at": 0.6, "length": 0.18}])


def same_rows(a: pa.Table, b: pa.Table, part: slice, skip: Sequence[str] = ()) -> bool:
    names = [name for name in a.column_names if name not in skip]
    a, b = (t.select(names).slice(part.start, part.stop - part.start).combine_chunks() for t in (a, b))
    return a.equals(b)


@pytest.mark.parametrize("name", INCIDENTS)
def test_incidents_change_their_span_alone(calm: pa.Table, name: str) -> None:
    struck = hit(name)
    assert same_rows(calm, struck, slice(0, 60_000))
    assert not same_rows(calm, struck, STRUCK)
    # A history is a day old, so for one day (10,000 rows) it still knows a shift that is over.
    assert same_rows(calm, struck, slice(78_000, 100_000), skip=["history"] if name == "shift" else [])
    for task in TASKS:
        assert np.abs(deviations(struck.slice(60_000, 18_000), task, parts=2)).max() < 4.5, task
        if task in TASKS[:4]:
            assert set(np.unique(values(struck, task))) == {0, 1}


def test_shift_turns_tastes_and_rates(calm: pa.Table) -> None:
    struck = hit("shift")
    before, after = values(calm, TRUTH + "click")[STRUCK], values(struck, TRUTH + "click")[STRUCK]
    assert after.mean() > before.mean() + 0.04
    assert np.corrcoef(before, after)[0, 1] < 0.8
    assert values(struck, TRUTH + "like")[STRUCK].sum() / after.sum() < 0.9 * (
        values(calm, TRUTH + "like")[STRUCK].sum() / before.sum()
    )
    lasting = generate(**WIDE, incidents=[{"kind": "shift", "at": 0.6}])
    assert not same_rows(calm, lasting, slice(99_000, 100_000))


def test_viral_item_takes_its_share(calm: pa.Table) -> None:
    struck = hit("viral")
    item, count = np.unique(values(struck, "item")[STRUCK], return_counts=True)
    top = item[count.argmax()]
    assert 0.47 < count.max() / 18_000 < 0.53
    assert (values(calm, "item") == top).mean() < 0.01
    viral = values(struck, "item")[STRUCK] == top
    share = values(struck, "share")[STRUCK]
    assert share[viral].mean() > 3 * share[~viral].mean()


def test_bots_click_on_everything(calm: pa.Table) -> None:
    struck = hit("bots")
    bot = values(struck, "user")[STRUCK] != values(calm, "user")[STRUCK]
    assert 0.27 < bot.mean() < 0.33
    assert len(np.unique(values(struck, "user")[STRUCK][bot])) <= 20
    # Bots that hide behind the same user as before are few; all others click with probability one half.
    assert np.allclose(values(struck, TRUTH + "click")[STRUCK][bot], 0.5)
    assert abs(values(struck, "click")[STRUCK][bot].mean() - 0.5) < 0.03


def test_units_change_one_column(calm: pa.Table) -> None:
    watch, rating, duration = hit("watch"), hit("rating"), hit("duration")
    for struck, column, factor in ((watch, "watch_time", 1000), (rating, "rating", 10), (duration, "duration", 1000)):
        old, new = values(calm, column)[STRUCK], values(struck, column)[STRUCK]
        np.testing.assert_allclose(new, old * factor, rtol=1e-6)
        assert same_rows(calm, struck, STRUCK, skip=[column, TRUTH + column])
    gain = values(watch, TRUTH + "watch_time")[STRUCK] - values(calm, TRUTH + "watch_time")[STRUCK]
    assert 6.5 < np.median(gain) < np.log(1000)  # less than log(1000), and least where watch times are near 0
    assert gain.min() > 4


def test_garbage_spoils_features_only(calm: pa.Table) -> None:
    struck = hit("garbage")
    assert same_rows(calm.select(_labels()), struck.select(_labels()), STRUCK)
    number = values(struck, "duration")[STRUCK]
    assert np.isnan(number).any()
    assert np.isinf(number).any()
    assert np.nanmax(number[np.isfinite(number)]) > 1e29
    spoiled = values(struck, "group")[STRUCK] != values(calm, "group")[STRUCK]
    assert 0.45 < spoiled.mean() < 0.52
    lists = [t["history"].combine_chunks()[STRUCK.start : STRUCK.stop] for t in (calm, struck)]
    assert lists[0].value_lengths().equals(lists[1].value_lengths())
    # What the encoder makes of it is in range, whatever it was.
    schema = Stream(StreamConfig(**WIDE)).schema()
    batch, _ = Encoder(schema, truth=True).encode(struck, Place("stream", None, 0))
    assert torch.isfinite(batch.labels).all()


def _labels() -> list[str]:
    return [prefix + task for prefix in ("", TRUTH) for task in TASKS]


@pytest.mark.parametrize("features", [10, 11, 37, 200])
def test_schema_names_every_column(features: int) -> None:
    stream = Stream(StreamConfig(**(SMALL | {"rows": 3000, "block_rows": 2048}), features=features))
    schema, table = stream.schema(), pa.concat_tables(stream.tables())
    assert len(schema.features) == features
    assert set(table.column_names) == {*schema.columns, *(TRUTH + task for task in TASKS)}
    assert stream.columns == [*schema.columns, *(TRUTH + task for task in TASKS)]
    assert schema == type(schema).model_validate(schema.model_dump())
    for name, feature in schema.features.items():
        column = table[name].combine_chunks()
        if isinstance(feature, NumberFeature):
            assert pa.types.is_float32(column.type), name
            continue
        flat = column.flatten() if isinstance(feature, IdsFeature) else column
        low, high = flat.to_numpy().min(), flat.to_numpy().max()
        assert low >= 0, name
        if isinstance(feature, PositionFeature) or not feature.hashed:
            assert high < feature.rows, name
        else:
            assert high > 1000, name
    if features == 200:
        kinds = [type(feature) for feature in schema.features.values()]
        assert min(kinds.count(kind) for kind in (IdFeature, IdsFeature, NumberFeature)) > 30
        assert sum(table[name].null_count > 0 for name in schema.number_features) > 20


def test_extra_numbers_have_heavy_tails_and_say_something(plain: pa.Table) -> None:
    table = generate(rows=100_000, features=40)
    tails = [np.nanmax(values(table, n)) / np.nanmedian(values(table, n)) for n in ("lognormal_11", "pareto_12")]
    assert tails[0] > 100
    assert tails[1] > 1000
    user = values(table, "user")
    noisy = values(table, "noisy_16"), values(table, "noisy_22")
    of_user = [np.bincount(user, n) / np.maximum(np.bincount(user), 1) for n in noisy]
    often = np.bincount(user) > 20
    assert max(mean[often].std() / n.std() for mean, n in zip(of_user, noisy, strict=True)) > 0.7


def test_encoder_and_parquet_take_it(tmp_path: Any) -> None:
    stream = Stream(StreamConfig(**SMALL, features=20))
    table = next(stream.tables())
    pq.write_table(table, tmp_path / "log.parquet")
    back = pq.read_table(tmp_path / "log.parquet")
    encoder = Encoder(stream.schema(), truth=True)
    batch, _ = encoder.encode(table, Place("stream", None, 0))
    again, _ = encoder.encode(back, Place("log.parquet", 0, 0))
    for name in ("ids", "positions", "labels", "weights", "time", "truth", "group"):
        assert torch.equal(getattr(batch, name), getattr(again, name)), name
    torch.testing.assert_close(batch.numbers, again.numbers, rtol=0, atol=0, equal_nan=True)
    # The truth is in the unit of the encoded label.
    known = batch.weights > 0
    error = ((batch.labels - batch.truth) * known).sum(0) / known.sum(0)
    assert error.abs().max() < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": 9}, "greater than or equal to 10"),
        ({"features": 201}, "less than or equal to 200"),
        ({"block_rows": 1000}, "block_rows: expected a power of two such as 65536, got 1000"),
        ({"tasks": ()}, "at least 1 item"),
        ({"tasks": ("click", "click")}, "tasks: each may be named once, got click, click"),
        ({"tasks": ("clicks",)}, "'click', 'long_view'"),
        ({"rows": 10**9, "rows_per_day": 100}, "expected at most 36500: raise rows_per_day"),
        ({"rows": 10**7, "item_life_days": 0.001}, "lower items, or raise item_life_days or rows_per_day"),
        ({"incidents": [{"kind": "units", "at": 0.5, "target": "watchtime"}]}, "did you mean 'watch_time'?"),
        ({"incidents": [{"kind": "units", "at": 0.5, "target": "rating"}], "tasks": ("click",)}, "'rating' is neither"),
        ({"incidents": [{"kind": "units", "at": 0.5}]}, "needs the name of a regression task or number feature"),
        ({"incidents": [{"kind": "bots", "at": 0.5, "target": "click"}]}, "takes none, got 'click'"),
        (
            {"incidents": [{"kind": "viral", "at": 0.5, "strength": 1.5}]},
            "above 0 and at most 1, got 1.5",
        ),
        ({"incidents": [{"kind": "units", "at": 0.5, "target": "rating", "strength": 0}]}, "a factor above 0"),
        ({"incidents": [{"kind": "shift", "at": 0.5, "strength": 99}]}, "an angle in radians, -10 to 10, got 99"),
        ({"incidents": [{"kind": "shift", "at": 1.0}]}, "less than 1"),
        ({"incidents": [{"kind": "flood", "at": 0.1}]}, "'shift', 'viral', 'bots', 'units' or 'garbage'"),
        ({"start": "soon"}, "date"),
        ({"colour": 1}, "Extra inputs are not permitted"),
    ],
)
def test_messages(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        StreamConfig(**settings)
    assert message in str(caught.value)


def test_start_must_begin_a_block() -> None:
    stream = Stream(StreamConfig(**SMALL))
    for start in (100, -8192, 81_920):
        with pytest.raises(ConfigError, match=r"multiple of block_rows \(8192\) from 0 to 40000, got"):
            stream.tables(start)


def test_config_loads_what_it_dumps() -> None:
    config = StreamConfig(**SMALL, start="2026-03-01", tasks=("click",), incidents=[{"kind": "viral", "at": 0.25}])
    assert StreamConfig.model_validate(config.model_dump()) == config
    assert StreamConfig.model_validate_json(config.model_dump_json()) == config


def test_columns_share_memory_with_no_second_copy() -> None:
    """One block costs little more memory than its own bytes: the arrays are numpy's."""
    before = pa.total_allocated_bytes()
    table = next(Stream(StreamConfig(**SMALL, features=30)).tables())
    assert pa.total_allocated_bytes() - before < 0.05 * table.nbytes


@pytest.mark.slow
def test_speed_on_one_core() -> None:
    stream = Stream(StreamConfig(rows=1_048_576))
    next(stream.tables())
    seconds = []
    for _ in range(3):
        begin = perf_counter()
        assert sum(len(table) for table in stream.tables()) == 1_048_576
        seconds.append(perf_counter() - begin)
    assert 1_048_576 / min(seconds) > 300_000
