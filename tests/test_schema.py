"""What a schema accepts, what it says when it does not, and how batches are cut and joined."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from steadyrank.schema import Batch, IdFeature, NumberFeature, Ragged, Schema, Task

from .batches import make_batch, make_schema

CLICK = {"click": {"kind": "binary"}}
USER = {"user": {"kind": "id"}}


def bare(**changes: Any) -> dict[str, Any]:
    return {"features": USER, "tasks": CLICK, **changes}


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "place", "words"),
    [
        (bare(features={}), ("features",), "at least 1 item"),
        (bare(tasks={}), ("tasks",), "at least 1 item"),
        (bare(feature={}), ("feature",), "Extra inputs are not permitted"),
        (bare(features={"user": {"kind": "idd"}}), ("features", "user"), "'id', 'ids', 'number', 'position'"),
        (bare(features={"user": {}}), ("features", "user"), "kind"),
        (bare(features={"user": {"kind": "id", "rwos": 5}}), ("features", "user", "id", "rwos"), "Extra inputs"),
        (
            bare(features={"user": {"kind": "id", "rows": 0}}),
            ("features", "user", "id", "rows"),
            "greater than or equal",
        ),
        (bare(features={"x": {"kind": "number", "rows": 9}}), ("features", "x", "number", "rows"), "Extra inputs"),
        (
            bare(tasks={"y": {"kind": "binary", "scale": 2}}),
            ("tasks", "y"),
            "transform and scale belong to regressions",
        ),
        (bare(tasks={"y": {"kind": "binary", "transform": "log1p"}}), ("tasks", "y"), "a binary label is 0 or 1"),
        (bare(tasks={"y": {"kind": "binary", "loss": "mse"}}), ("tasks", "y"), "loss 'mse' belongs to regressions"),
        (
            bare(tasks={"y": {"kind": "regression", "loss": "bce"}}),
            ("tasks", "y"),
            "a regression takes 'mse' or 'huber'",
        ),
        (bare(tasks={"y": {"kind": "regression", "scale": 0}}), ("tasks", "y", "scale"), "greater than 0"),
        (bare(tasks={"y": {"kind": "binary", "loss_weight": float("nan")}}), ("tasks", "y", "loss_weight"), "finite"),
        (
            bare(tasks={"y": {"kind": "binary", "only_where": "z"}}),
            (),
            "tasks.y.only_where: 'z' is not another binary task",
        ),
        (
            bare(tasks={"y": {"kind": "binary", "only_where": "y"}}),
            (),
            "tasks.y.only_where: 'y' is not another binary task",
        ),
        (
            bare(tasks={"y": {"kind": "binary", "only_where": "z"}, "z": {"kind": "regression"}}),
            (),
            "'z' is not another binary task",
        ),
        (bare(baseline=["item"]), (), "baseline: 'item' is not an id feature"),
        (bare(baseline=["age"], features={**USER, "age": {"kind": "number"}}), (), "'age' is not an id feature"),
        (
            bare(features={"user": {"kind": "id", "rows": 5}, "other": {"kind": "ids", "rows": 6, "table": "user"}}),
            (),
            "features.other: shares table 'user' with 'user', but its (rows, width, hashed) are (6, 16, True) and not "
            "(5, 16, True)",
        ),
        (bare(time_unit="h"), ("time_unit",), "'s', 'ms', 'us' or 'ns'"),
    ],
)
def test_a_wrong_schema_says_where_and_what(config: dict[str, Any], place: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Schema.model_validate(config)
    (error,) = caught.value.errors()
    assert error["loc"] == place
    assert words in error["msg"]


def test_names_fill_in_columns_and_tables() -> None:
    schema = Schema(
        features={
            "user": IdFeature(),
            "item": {"kind": "id", "column": "video_id"},
            "age": NumberFeature(column="years"),
        },
        tasks={"click": Task(kind="binary"), "watch": {"kind": "regression", "column": "watch_ms", "weight": "w"}},
        group="session",
    )
    assert schema.id_features["user"] == IdFeature(column="user", table="user")
    assert schema.id_features["item"].table == "item"
    assert schema.columns == ["time", "session", "user", "video_id", "years", "click", "watch_ms", "w"]


def test_a_column_that_serves_twice_is_read_once() -> None:
    schema = Schema(
        group="user",
        features={"user": {"kind": "id"}, "again": {"kind": "number", "column": "user"}},
        tasks={"a": {"kind": "binary", "mask": "m"}, "b": {"kind": "binary", "mask": "m", "column": "a"}},
    )
    assert schema.columns == ["time", "user", "a", "m"]


def test_config_equality_survives_a_dump_and_a_load() -> None:
    schema = make_schema().model_copy(update={"baseline": ("user",), "group": "user"})
    assert schema.tables  # a cached property must not disturb equality
    again = Schema.model_validate(json.loads(json.dumps(schema.model_dump(mode="json"))))
    assert again == schema
    assert again != schema.model_copy(update={"group": None})


def test_a_schema_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_schema().group = "x"


def test_slots_of_one_width_lie_end_to_end() -> None:
    schema = make_schema()
    by_width: dict[int, int] = {}
    for slot in schema.tables.values():
        assert slot.start == by_width.get(slot.width, 0)
        by_width[slot.width] = slot.start + slot.rows
    assert by_width == {4: 41 + 31 + 13, 3: 25}
    assert schema.slot("history") == schema.slot("item")
    with pytest.raises(KeyError, match="'age' has no embedding table: it is a number feature"):
        schema.slot("age")


@given(st.floats(0, 1e6), st.sampled_from(["none", "log1p"]), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_decode_undoes_encode(raw: float, transform: str, scale: float) -> None:
    task = Task(kind="regression", transform=transform, scale=scale)
    value = torch.tensor([raw], dtype=torch.float64)
    torch.testing.assert_close(task.decode(task.encode(value)), value, rtol=1e-9, atol=1e-9)


def test_a_binary_logit_becomes_a_probability() -> None:
    assert Task(kind="binary").decode(torch.tensor([0.0])).item() == 0.5


# --- take and cat against slow twins ----------------------------------------------------------------------------------


def lists_of(ragged: Ragged) -> list[list[int]]:
    ends = ragged.offsets.tolist()
    return [ragged.values[ends[i] : ends[i + 1]].tolist() for i in range(len(ends) - 1)]


def rows_of(batch: Batch) -> list[tuple[Any, ...]]:
    """Take a batch apart, one tuple a row, NaN shown as None."""
    dense = [batch.ids, batch.numbers, batch.positions, batch.labels, batch.weights, batch.time, batch.group, batch.row]
    if batch.truth is not None:
        dense.append(batch.truth)
    columns = [[[None if v != v else v for v in row.reshape(-1).tolist()] for row in part] for part in dense]
    return list(zip(*columns, *(lists_of(r) for r in batch.lists), strict=True))


def with_truth(batch: Batch) -> Batch:
    return Batch(**{**batch.__dict__, "truth": torch.rand(len(batch), batch.labels.shape[1])})


@given(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=8), st.data())
@settings(max_examples=30, deadline=None)
def test_ragged_take_equals_a_loop(lists: list[list[int]], data: st.DataObject) -> None:
    values = torch.tensor([v for one in lists for v in one], dtype=torch.int64)
    offsets = torch.tensor([0, *(len(one) for one in lists)]).cumsum(0)
    index = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=12)) if lists else []
    taken = Ragged(values, offsets).take(torch.tensor(index, dtype=torch.int64))
    assert lists_of(taken) == [lists[i] for i in index]
    assert taken.offsets[0] == 0
    assert taken.offsets[-1] == len(taken.values)


@given(st.integers(1, 9), st.data(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_batch_take_equals_a_loop(rows: int, data: st.DataObject, truth: bool) -> None:
    batch = make_batch(make_schema(), rows, seed=rows)
    batch = with_truth(batch) if truth else batch
    index = data.draw(st.lists(st.integers(0, rows - 1), max_size=12))
    whole = rows_of(batch)
    assert rows_of(batch.take(torch.tensor(index, dtype=torch.int64))) == [whole[i] for i in index]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.booleans())
@settings(max_examples=30, deadline=None)
def test_batch_cat_equals_a_loop(sizes: list[int], truth: bool) -> None:
    batches = [make_batch(make_schema(), rows, seed=i) for i, rows in enumerate(sizes)]
    batches = [with_truth(b) for b in batches] if truth else batches
    joined = Batch.cat(batches)
    assert rows_of(joined) == [row for batch in batches for row in rows_of(batch)]
    assert (joined.truth is not None) is truth
    assert len(joined) == sum(sizes)


def test_to_moves_every_part() -> None:
    batch = with_truth(make_batch(make_schema(), 5))
    moved = batch.to("meta")
    parts = [value for value in moved.__dict__.values() if isinstance(value, torch.Tensor)]
    assert len(parts) == 9
    assert all(part.is_meta for part in (*parts, *(t for ragged in moved.lists for t in ragged)))
    assert rows_of(batch.to("cpu")) == rows_of(batch)
