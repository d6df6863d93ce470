"""A first schema from the columns: it reads the log as it is, and no label is among its features."""

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steadyrank.data import guess as module
from steadyrank.data.guess import guess_schema
from steadyrank.data.logs import LogsConfig, ParquetLog, Reader, ReaderConfig
from steadyrank.errors import DataError
from steadyrank.schema import IdFeature, NumberFeature, PositionFeature, Schema

from .shared import shared

ROWS = 400
GENERATOR = np.random.default_rng(0)
EPOCH = 1_700_000_000
BASE: dict[str, Any] = {
    "time": np.arange(ROWS) + EPOCH,
    "user_id": GENERATOR.integers(0, 50, ROWS),
    "item_id": [f"item {i}" for i in GENERATOR.integers(0, 30, ROWS)],
    "click": GENERATOR.integers(0, 2, ROWS),
}


def guess(folder: Path, columns: dict[str, Any], without: tuple[str, ...] = ()) -> tuple[Schema, dict[str, str]]:
    """Guess a schema, and read the whole log with it."""
    table = pa.table({name: value for name, value in {**BASE, **columns}.items() if name not in without})
    pq.write_table(table, folder / "log.parquet", row_group_size=150)
    return trained(folder / "log.parquet", len(table))


def trained(path: Path, rows: int | None = None) -> tuple[Schema, dict[str, str]]:
    source = ParquetLog(LogsConfig(path=str(path), max_rows=rows and min(rows, 20_000)), "time")
    schema, notes = guess_schema(source)
    reader = Reader(source, schema, ReaderConfig())
    assert sum(len(batch) for batch, _ in reader.batches()) == source.rows
    labels = {task.column for task in schema.tasks.values()}
    inputs = {feature.column for feature in schema.features.values()}
    assert not labels & inputs
    assert schema.time not in labels | inputs
    assert set(notes) == {name for name in source.columns if not name.startswith("truth/")}
    for name in schema.baseline:
        assert isinstance(schema.features[name], IdFeature)
    return schema, notes


@pytest.mark.parametrize(
    ("file", "time", "unit", "baseline", "labels", "never"),
    [
        (
            "kuairand",
            "time_ms",
            "ms",
            ("user_id", "video_id"),
            {"is_click": "binary", "long_view": "binary", "is_profile_enter": "binary", "play_time_ms": "regression"},
            set(),
        ),
        (
            "deskdrop",
            "timestamp",
            "s",
            ("personId", "contentId"),
            {"like": "binary", "bookmark": "binary", "comment": "binary", "follow": "binary", "dwell_s": "regression"},
            set(),
        ),
        (
            "flights",
            "time",
            "s",
            ("tailnum", "dest"),  # no user and no item: the ids with the most values
            {"cancelled": "binary", "late15": "binary", "arr_delay": "regression"},
            {"air_time"},  # known after the landing only
        ),
        (
            "online_retail",
            "t",
            "s",
            ("CustomerID", "StockCode"),
            {"returned_60d": "binary", "rebuy_60d": "binary", "qty": "regression"},
            {"log_qty"},
        ),
    ],
)
def test_real_logs(
    file: str, time: str, unit: str, baseline: tuple[str, ...], labels: dict[str, str], never: set[str]
) -> None:
    schema, _ = trained(shared(f"data/{file}.parquet"), 20_000)
    assert (schema.time, schema.time_unit, schema.baseline) == (time, unit, baseline)
    assert {name: schema.tasks[name].kind for name in labels} == labels
    assert not never & set(schema.features)
    assert schema.group == (None if file == "flights" else baseline[0])


def test_a_plain_log(tmp_path: Path) -> None:
    heavy = np.exp(GENERATOR.normal(0, 3, ROWS))
    schema, notes = guess(
        tmp_path,
        {
            "position": GENERATOR.integers(0, 12, ROWS),
            "watch_time": heavy,
            "price": heavy + 0.5,
            "age": GENERATOR.normal(40, 5, ROWS),
            "hour": GENERATOR.integers(0, 24, ROWS),
            "constant": [7] * ROWS,
            "created_at": [dt.datetime(2020, 1, 1)] * ROWS,
            "truth/click": [0.5] * ROWS,
        },
    )
    assert (schema.time, schema.time_unit, schema.group, schema.baseline) == (
        "time",
        "s",
        "user_id",
        ("user_id", "item_id"),
    )
    assert {name: task.kind for name, task in schema.tasks.items()} == {"click": "binary", "watch_time": "regression"}
    assert schema.tasks["watch_time"].transform == "log1p"
    assert isinstance(schema.features["position"], PositionFeature)
    assert schema.features["position"].rows == 12
    assert schema.number_features["price"].transform == "log1p"
    assert schema.number_features["age"] == NumberFeature(column="age")
    assert set(schema.id_features) == {"user_id", "item_id", "hour"}
    assert schema.id_features["user_id"].rows == 128  # room for twice the 50 users, to the next power of two
    assert notes["constant"] == "left out: one value only"
    assert notes["created_at"] == "left out: a second time"


@pytest.mark.parametrize(
    ("time", "name", "unit"),
    [
        ((np.arange(ROWS) + EPOCH) * 1000, "ts", "ms"),
        ((np.arange(ROWS) + EPOCH) * 10**6, "when", "us"),
        (np.arange(ROWS) + EPOCH + 0.5, "event_time", "s"),
        (pa.array((np.arange(ROWS) + EPOCH) * 10**9, pa.timestamp("ns", "Asia/Tokyo")), "x", "s"),
        (pa.array(np.arange(ROWS) // 50, pa.int32()).cast(pa.date32()), "day", "s"),
    ],
)
def test_times_of_every_type(tmp_path: Path, time: Any, name: str, unit: str) -> None:
    schema, _ = guess(tmp_path, {name: time}, without=("time",))
    assert (schema.time, schema.time_unit) == (name, unit)


@pytest.mark.parametrize("kind", [np.int64, np.uint32, np.uint64])
def test_the_column_that_rises_is_the_time(tmp_path: Path, kind: Any) -> None:
    """Unsigned differences wrap around: a shuffled column must not look sorted."""
    shuffled = GENERATOR.permutation(ROWS).astype(kind) + kind(EPOCH)
    columns = {"signup_time": shuffled, "shown_time": (np.arange(ROWS) + EPOCH).astype(kind)}
    schema, notes = guess(tmp_path, columns, without=("time",))
    assert schema.time == "shown_time"
    assert notes["signup_time"] == "left out: a second time"


def test_no_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column looks like a time"):
        guess(tmp_path, {}, without=("time",))
    with pytest.raises(DataError, match="no column looks like a time"):
        guess(tmp_path, {"time": pa.array([None, *range(EPOCH, EPOCH + ROWS - 1)])})


def test_no_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column looks like a label .* write \[schema.tasks\] by hand"):
        guess(tmp_path, {}, without=("click",))
    with pytest.raises(DataError, match="no column looks like a label"):
        guess(tmp_path, {"click": [1] * ROWS})  # one value: nothing to learn


def test_the_last_column_of_zeros_and_ones_serves_where_no_name_tells(tmp_path: Path) -> None:
    columns = {"flag": np.arange(ROWS) % 2, "outcome": np.arange(ROWS) % 3 == 0}
    schema, _ = guess(tmp_path, columns, without=("click",))
    assert list(schema.tasks) == ["outcome"]
    assert "flag" in schema.id_features


def test_no_feature_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column is left to serve as a feature"):
        guess(tmp_path, {}, without=("user_id", "item_id"))


def test_booleans(tmp_path: Path) -> None:
    schema, _ = guess(
        tmp_path, {"is_new": np.arange(ROWS) % 3 == 0, "like": pa.array([True, False, None, False] * 100)}
    )
    assert {name: task.kind for name, task in schema.tasks.items()} == {"click": "binary", "like": "binary"}
    assert "is_new" in schema.id_features


def test_lists_of_ids_are_features_and_other_lists_are_not(tmp_path: Path) -> None:
    schema, notes = guess(
        tmp_path,
        {
            "seen": [[i % 5, 3] if i % 2 else None for i in range(ROWS)],
            "tags": pa.array([["a", None], []] * 200, pa.large_list(pa.large_string())),
            "vector": [[0.25, 1.5]] * ROWS,
            "nested": [[[1], [2]]] * ROWS,
            "events": [[{"a": 1}]] * ROWS,
            "empty": pa.array([[]] * ROWS, pa.list_(pa.null())),
        },
    )
    assert set(schema.list_features) == {"seen", "tags"}
    assert all(notes[name].startswith("left out: type list") for name in ("vector", "nested", "events", "empty"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array(["a", None] * 200).dictionary_encode(), "id, 1 distinct strings"),
        (pa.array(["a", "b"] * 200, pa.string_view()), "id, 2 distinct strings"),
        (pa.array([1, 2] * 200).dictionary_encode(), "id, 2 distinct numbers"),
        (pa.nulls(ROWS), "left out: type null"),
        (pa.nulls(ROWS, pa.float64()), "left out: one value only"),
        ([np.nan, np.inf] * 200, "left out: no finite value"),
        ([{"a": 1}] * ROWS, "left out: type struct<a: int64>"),
        ([b"x", b"y"] * 200, "left out: type binary"),
        (pa.array([1, 2] * 200, pa.duration("s")), "left out: type duration[s]"),
        ([0.5, 2.5, np.inf, 1e300] * 100, "number, heavy tail"),
    ],
)
def test_a_column_of_any_type_is_placed_or_left_out(tmp_path: Path, values: Any, expected: str) -> None:
    assert guess(tmp_path, {"thing": values})[1]["thing"] == expected


def test_an_amount_that_no_label_can_hold_is_a_feature(tmp_path: Path) -> None:
    schema, _ = guess(tmp_path, {"rating": [1.0, 2.0, 3.0, 1e31] * 100, "dwell": [1.0, 2.5, np.nan, np.inf] * 100})
    assert set(schema.tasks) == {"click", "dwell"}
    assert set(schema.number_features) == {"rating"}


def test_a_constant_time_serves_where_there_is_no_other(tmp_path: Path) -> None:
    schema, _ = guess(tmp_path, {"date": [dt.date(2024, 1, 1)] * ROWS}, without=("time",))
    assert schema.time == "date"


def test_positions_may_be_odd(tmp_path: Path) -> None:
    schema, _ = guess(tmp_path, {"pos": [-1, -2] * 200, "slot": [0, 10**6] * 200})
    assert {name: feature.rows for name, feature in schema.position_features.items()} == {"pos": 1, "slot": 1000}


def test_a_sample_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_ROWS", 200)
    schema, _ = guess(tmp_path, {"late_kind": ["a"] * 300 + ["b"] * 100})
    assert schema.id_features["late_kind"].rows == 16


def test_one_row_tells_no_label(tmp_path: Path) -> None:
    pq.write_table(pa.table({"time": [EPOCH], "user": [1], "click": [1]}), tmp_path / "log.parquet")
    with pytest.raises(DataError, match="no column looks like a label"):
        trained(tmp_path / "log.parquet")
