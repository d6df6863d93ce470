"""The encoder against a slow twin in plain Python, row by row; what is missing counted, what is wrong named."""

import datetime as dt
import hashlib
import itertools
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steadyrank.data.columns import Encoder, Missing, Place, mix, stable_hash, to_rows
from steadyrank.errors import DataError
from steadyrank.schema import Batch, Schema

PLACE = Place("log.parquet", 3, 1000)
NAN, INF = math.nan, math.inf
TEXT = ["a", "b", None, "a", "", "ünï", "x" * 300]
WHOLE = [0, 1, 7, None, 7, 120]


def encode(columns: dict[str, Any], schema: dict[str, Any], **options: Any) -> tuple[Batch, Missing]:
    """Encode some columns, a time and a label added where the test is about neither."""
    columns = {name: value if isinstance(value, pa.Array) else pa.array(value) for name, value in columns.items()}
    rows = len(next(iter(columns.values())))
    full = {"features": {"k": {"kind": "id"}}, "tasks": {"y": {"kind": "binary"}}, **schema}
    zeros = pa.array([0] * rows, pa.int64())
    table = pa.table({"time": zeros, "y": zeros, "k": zeros, **columns})
    encoder = Encoder(Schema(**full), **options)
    return encoder.encode(table.select(encoder.columns), PLACE)


def refused(columns: dict[str, Any], schema: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        encode(columns, schema)
    return str(caught.value)


def twin_hash(value: Any) -> int:
    if isinstance(value, str | bytes):
        raw = value.encode() if isinstance(value, str) else value
        return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
    word = (1 << 64) - 1
    x = (int(value) + 0x9E3779B97F4A7C15) & word
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
    return x ^ (x >> 31)


def twin_row(value: Any, rows: int, hashed: bool) -> int:
    """Row 0 for a missing id, else 1 + its row."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return 0
    return 1 + (((twin_hash(value) >> 32) * rows) >> 32 if hashed else int(value))


def lists_of(batch: Batch, feature: int = 0) -> list[list[int]]:
    values, offsets = batch.lists[feature]
    return [values[low:high].tolist() for low, high in itertools.pairwise(offsets)]


def test_hashes_are_pinned() -> None:
    """Trained tables depend on these numbers: no version may ever change them."""
    texts = pa.array(["", "a", "user_1", "ünï", "漢字"])
    assert stable_hash(texts).tolist() == STRINGS
    assert mix(np.array([0, 1, -1, 42, 2**62])).tolist() == NUMBERS
    assert to_rows(stable_hash(texts), 1000).tolist() == STRING_ROWS
    assert to_rows(mix(np.array([0, 1, -1, 42, 2**62])), 1000).tolist() == NUMBER_ROWS


STRINGS = [13020603013274838756, 3405396810240292928, 16111986843964857040, 10938549402560586072, 5337853739564262900]
NUMBERS = [16294208416658607535, 10451216379200822465, 16490336266968443936, 13679457532755275413, 47939714376772075]
STRING_ROWS = [705, 184, 873, 592, 289]
NUMBER_ROWS = [883, 566, 893, 741, 2]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20), st.integers(1, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_integer_hashes_equal_the_twin(values: list[int], rows: int) -> None:
    before = np.array(values, dtype=np.int64)
    hashes = mix(before)
    assert before.tolist() == values
    assert hashes.tolist() == [twin_hash(v) for v in values]
    assert to_rows(hashes, rows).tolist() == [((h >> 32) * rows) >> 32 for h in hashes.tolist()]


def test_hashed_rows_are_even() -> None:
    counts = np.bincount(to_rows(mix(np.arange(100_000)), 100), minlength=100)
    assert 850 < counts.min() < counts.max() < 1150


ID_ARRAYS = {
    "string": pa.array(TEXT),
    "large_string": pa.array(TEXT, pa.large_string()),
    "string_view": pa.array(TEXT, pa.string_view()),
    "binary": pa.array([None if t is None else t.encode() for t in TEXT], pa.binary()),
    "fixed binary": pa.array([b"abc", None, b"xyz"], pa.binary(3)),
    "dictionary": pa.array(TEXT).dictionary_encode(),
    "dictionary with a null": pa.DictionaryArray.from_arrays(
        pa.array([0, 1, None, 0], pa.int8()), pa.array([None, "b"])
    ),
    "dictionary of integers": pa.array(WHOLE).dictionary_encode(),
    "int64": pa.array(WHOLE),
    "negative": pa.array([-1, -(2**63), 2**63 - 1]),
    "uint8": pa.array(WHOLE, pa.uint8()),
    "uint64": pa.array([2**64 - 1, 2**63, None, 5], pa.uint64()),
    "float with nulls": pa.array([3.0, None, -0.0, 7.0, -4.0]),
    "float with NaN": pa.array([3.0, NAN, INF, None]),
    "float16": pa.array(np.array([1, 2], np.float16)),
    "bool": pa.array([True, False, None]),
    "all null": pa.nulls(3),
    "all null strings": pa.nulls(3, pa.string()),
    "slice": pa.array(["skipped", *TEXT]).slice(1),
    "sliced dictionary": pa.array(["skipped", *TEXT]).dictionary_encode().slice(1),
    "chunks": pa.chunked_array([TEXT[:2], TEXT[2:]]).combine_chunks(),
    "empty": pa.array([], pa.string()),
}


@pytest.mark.parametrize("name", ID_ARRAYS)
def test_hashed_ids_equal_the_twin(name: str) -> None:
    array = ID_ARRAYS[name]
    features = {"first": {"kind": "id", "rows": 9}, "u": {"kind": "id", "rows": 50}}
    batch, missing = encode({"u": array, "first": pa.nulls(len(array), pa.int64())}, {"features": features})
    values = array.to_pylist()
    assert batch.ids[:, 1].tolist() == [10 + twin_row(v, 50, True) for v in values]
    assert batch.ids[:, 0].tolist() == [0] * len(values)
    expected = {
        "null": values.count(None),
        "non_finite": sum(isinstance(v, float) and not math.isfinite(v) for v in values),
    }
    assert missing.as_dict().get("u", {"null": 0, "non_finite": 0}) == expected
    assert missing.rows == len(values)


@pytest.mark.parametrize("kind", [pa.int32(), pa.uint64(), pa.float64(), pa.float32(), pa.uint8()])
def test_plain_ids_equal_the_twin(kind: pa.DataType) -> None:
    batch, _ = encode({"u": pa.array(WHOLE, kind)}, {"features": {"u": {"kind": "id", "rows": 121, "hashed": False}}})
    assert batch.ids[:, 0].tolist() == [twin_row(v, 121, False) for v in WHOLE]


def test_an_id_hashes_alike_in_every_type_that_holds_it() -> None:
    features = {"features": {"u": {"kind": "id", "rows": 1 << 20}}}
    texts = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
    rows = [encode({"u": pa.array(["x1", "y2"]).cast(kind)}, features)[0].ids for kind in texts]
    assert all(torch.equal(rows[0], other) for other in rows)
    numbers = [pa.int64(), pa.int8(), pa.uint64(), pa.float64(), pa.float32()]
    rows = [encode({"u": pa.array([1, 100], kind)}, features)[0].ids for kind in numbers]
    assert all(torch.equal(rows[0], other) for other in rows)


@pytest.mark.parametrize(
    ("values", "feature", "words"),
    [
        (
            [5, 10],
            {"hashed": False, "rows": 10},
            "row 1,001, column 'u': id 10 is outside 0 to 9; raise rows or set hashed",
        ),
        ([5, -1], {"hashed": False, "rows": 10}, "row 1,001, column 'u': id -1 is outside 0 to 9"),
        (["a"], {"hashed": False}, "expected integers, as hashed = false asks, found string; set hashed = true"),
        ([1.0, 2.0, 2.5], {}, "row 1,002, column 'u': expected an id (an integer or a string), found 2.5"),
        ([1.0, 1e300], {}, "row 1,001, column 'u': expected an id (an integer or a string), found 1e+300"),
        ([[1]], {}, "expected an id (an integer or a string), found list<item: int64>"),
        ([dt.date(2024, 1, 1)], {}, "expected an id (an integer or a string), found date32[day]"),
    ],
)
def test_bad_ids_are_named(values: list[Any], feature: dict[str, Any], words: str) -> None:
    message = refused({"u": values}, {"features": {"u": {"kind": "id", **feature}}})
    assert words in message
    assert message.startswith("log.parquet")
    assert ("row group 3" in message) == ("row 1," in message)


HISTORY = [[1, 2, 3], [], None, [4, None], [5, 6, 7, 8, 9]]
LIST_ARRAYS = {
    "list": pa.array(HISTORY),
    "large_list": pa.array(HISTORY, pa.large_list(pa.int32())),
    "fixed_size_list": pa.array([[1, 2], None, [3, None]], pa.list_(pa.int64(), 2)),
    "strings": pa.array([["a", "b"], None, ["a", None, ""]]),
    "dictionary": pa.array([["a", "b"], None, ["a", None]], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
    "dictionary of integers": pa.array([[1, 2], [2]], pa.list_(pa.dictionary(pa.int8(), pa.int64()))),
    "floats": pa.array([[1.0, NAN], [2.0]]),
    "slice": pa.array([[77], *HISTORY, [88]]).slice(1, len(HISTORY)),
    "masked": pa.ListArray.from_arrays(
        pa.array([0, 2, 4, 5]), pa.array([1, 2, 3, 4, 5]), mask=pa.array([False, True, False])
    ),
    "only empty": pa.array([[], []], pa.list_(pa.null())),
    "only null": pa.nulls(2),
    "no row": pa.array([], pa.list_(pa.int64())),
}


@pytest.mark.parametrize("max_length", [None, 1, 2, 100])
@pytest.mark.parametrize("name", LIST_ARRAYS)
def test_lists_equal_the_twin(name: str, max_length: int | None) -> None:
    array = LIST_ARRAYS[name]
    feature = {"kind": "ids", "rows": 30, "max_length": max_length}
    batch, missing = encode(
        {"u": array}, {"features": {"first": {"kind": "id", "rows": 9, "column": "time"}, "u": feature}}
    )
    values = [[] if one is None else one for one in array.to_pylist()]
    kept = [one if max_length is None else one[-max_length:] for one in values]
    assert lists_of(batch) == [[10 + twin_row(v, 30, True) for v in one] for one in kept]
    assert batch.lists[0].offsets.dtype == batch.lists[0].values.dtype == torch.int64
    if name in ("list", "masked", "only null"):
        assert missing.null["u"] == array.null_count


def test_lists_share_the_rows_of_the_ids_they_name() -> None:
    features = {"item": {"kind": "id", "rows": 64}, "seen": {"kind": "ids", "rows": 64, "table": "item"}}
    batch, _ = encode({"item": ["a", "b"], "seen": [["b"], ["a", "b"]]}, {"features": features})
    a, b = batch.ids[:, 0].tolist()
    assert lists_of(batch) == [[b], [a, b]]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_text_is_a_bag_of_its_words(kind: pa.DataType) -> None:
    texts = ["Red  Lamp", " red\tlamp\n", "", "   ", None, "ÜBER lamp lamp"]
    batch, missing = encode({"u": pa.array(texts).cast(kind)}, {"features": {"u": {"kind": "ids", "rows": 1 << 20}}})
    twin = [[twin_row(w, 1 << 20, True) for w in (text or "").lower().split()] for text in texts]
    assert lists_of(batch) == twin
    assert missing.null["u"] == 1


@pytest.mark.parametrize(
    ("array", "feature", "words"),
    [
        (pa.array([[1], [2, 99]]), {"hashed": False, "rows": 9}, "row 1,001, column 'u': id 99 is outside 0 to 8"),
        (
            pa.array([[1.0], [], [2.0, 2.5]]),
            {},
            "row 1,002, column 'u': expected an id (an integer or a string), found 2.5",
        ),
        (
            pa.array([1, 2]),
            {},
            'expected a list of ids, or a text (a bag of its words), found int64; kind = "id" takes',
        ),
        (pa.array([b"\xff\xfe"]), {}, "expected text in UTF-8"),
    ],
)
def test_bad_lists_are_named(array: pa.Array, feature: dict[str, Any], words: str) -> None:
    assert words in refused({"u": array}, {"features": {"u": {"kind": "ids", **feature}}})


@pytest.mark.parametrize("kind", [pa.float64(), pa.int32(), pa.uint64(), pa.bool_(), pa.decimal128(21, 2), pa.null()])
def test_numbers_of_every_type(kind: pa.DataType) -> None:
    values = [None, None] if pa.types.is_null(kind) else [1, None, 0]
    batch, missing = encode({"x": pa.array(values).cast(kind)}, {"features": {"x": {"kind": "number"}}})
    assert [None if v != v else v for v in batch.numbers[:, 0].tolist()] == values
    assert missing.as_dict() == {"x": {"null": values.count(None), "non_finite": 0}}


def test_numbers_that_are_not_finite_in_float32_are_missing_and_counted() -> None:
    values = [1.5, NAN, INF, -INF, 1e39, -1e39, None, 3.4028234e38]
    features = {"x": {"kind": "number"}, "again": {"kind": "number", "column": "x", "transform": "log1p"}}
    batch, missing = encode({"x": values}, {"features": features})
    assert batch.numbers[:, 0].isnan().tolist() == [False, True, True, True, True, True, True, False]
    assert torch.equal(batch.numbers[:, 0].nan_to_num(7), batch.numbers[:, 1].nan_to_num(7))
    assert missing.as_dict() == {"x": {"null": 1, "non_finite": 5}}


def test_a_number_column_of_text_is_refused() -> None:
    words = "log.parquet, column 'x': expected a number, found string; an id feature takes strings"
    assert words in refused({"x": ["1"]}, {"features": {"x": {"kind": "number"}}})


def test_positions_are_clipped() -> None:
    batch, missing = encode({"p": [0, 4, 5, 900, -3, None]}, {"features": {"p": {"kind": "position", "rows": 5}}})
    assert batch.positions[:, 0].tolist() == [0, 4, 4, 4, 0, 0]
    assert missing.as_dict() == {"p": {"null": 1, "non_finite": 0}}
    words = "row 1,001, column 'p': expected a whole number, found 1.5"
    assert words in refused({"p": [1.0, 1.5]}, {"features": {"p": {"kind": "position"}}})


def twin_label(task: dict[str, Any], row: dict[str, Any]) -> tuple[float, float]:
    """Return the encoded label and the weight of one row, before `only_where`."""

    def missing(value: Any) -> bool:
        return value is None or (isinstance(value, float) and not math.isfinite(value))

    weight = 1.0 if "weight" not in task else 0.0 if missing(row["w"]) else float(row["w"])
    if "mask" in task and (missing(row["m"]) or row["m"] != 0):
        weight = 0.0
    if missing(row["y"]) or weight == 0.0:
        return 0.0, 0.0
    raw = float(row["y"])
    return (math.log1p(raw) if task.get("transform") == "log1p" else raw) / task.get("scale", 1.0), weight


@given(st.data(), st.booleans(), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_labels_equal_the_twin(data: st.DataObject, binary: bool, log1p: bool, mask: bool, weight: bool) -> None:
    bad = st.sampled_from([None, NAN, INF])
    label = st.sampled_from([0.0, 1.0]) if binary else st.floats(0, 1e6, width=32)
    row = st.fixed_dictionaries(
        {"y": label | bad, "w": st.sampled_from([0.0, 0.5, 2.0]) | bad, "m": st.sampled_from([0, 1, None])}
    )
    rows = data.draw(st.lists(row, min_size=1, max_size=12))
    task: dict[str, Any] = {"kind": "binary"} if binary else {"kind": "regression", "scale": 2.5}
    task |= {"transform": "log1p"} if log1p and not binary else {}
    task |= ({"mask": "m"} if mask else {}) | ({"weight": "w"} if weight else {})
    columns = {name: pa.array([r[name] for r in rows], pa.int64() if name == "m" else pa.float64()) for name in "ywm"}
    batch, missing = encode(columns, {"tasks": {"y": task}})
    twin = torch.tensor([twin_label(task, r) for r in rows])
    torch.testing.assert_close(batch.labels[:, 0], twin[:, 0], rtol=1e-6, atol=0)
    assert torch.equal(batch.weights[:, 0], twin[:, 1])
    assert missing.null["y"] == sum(r["y"] is None for r in rows)
    assert missing.non_finite["y"] == sum(r["y"] is not None and not math.isfinite(r["y"]) for r in rows)


def test_only_where_counts_rows_whose_other_label_is_a_present_one() -> None:
    tasks = {"watch": {"kind": "regression", "only_where": "y", "weight": "w"}, "y": {"kind": "binary", "mask": "m"}}
    columns = {"watch": [5.0, 6.0, 7.0, None, 8.0], "y": [1, 0, 1, 1, None], "m": [0, 0, 1, 0, 0], "w": [2.0] * 5}
    batch, _ = encode(columns, {"tasks": tasks})
    assert batch.weights.tolist() == [[2.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    assert batch.labels.tolist() == [[5.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    "values", [[True, False, None], pa.array([1, 0, None], pa.uint8()), [1.0, 0.0, None], pa.nulls(3)]
)
def test_binary_labels_of_every_type(values: Any) -> None:
    batch, _ = encode({"y": values}, {})
    present = not (isinstance(values, pa.Array) and pa.types.is_null(values.type))
    assert batch.labels[:, 0].tolist() == ([1.0, 0.0, 0.0] if present else [0.0] * 3)
    assert batch.weights[:, 0].tolist() == ([1.0, 1.0, 0.0] if present else [0.0] * 3)


@pytest.mark.parametrize(
    ("columns", "task", "words"),
    [
        (
            {"y": [0, 1, 2]},
            {"kind": "binary"},
            "row 1,002, column 'y': expected a binary label, 0 or 1 (or null), found 2",
        ),
        (
            {"y": [0.5]},
            {"kind": "binary"},
            "row 1,000, column 'y': expected a binary label, 0 or 1 (or null), found 0.5",
        ),
        (
            {"y": [None, -1.0]},
            {"kind": "regression", "transform": "log1p"},
            "row 1,001, column 'y': transform = 'log1p' expects a label of 0 or more, found -1",
        ),
        ({"y": [1e31]}, {"kind": "regression"}, "expected a label below 1e30, found 1e+31"),
        ({"y": ["a"]}, {"kind": "regression"}, "column 'y': expected a label (a number), found string"),
        (
            {"w": [1.0, -0.5]},
            {"kind": "binary", "weight": "w"},
            "row 1,001, column 'w': expected a weight from 0 to 1e30",
        ),
        ({"w": [1.0, 1e31]}, {"kind": "binary", "weight": "w"}, "found 1e+31"),
        ({"m": ["a"]}, {"kind": "binary", "mask": "m"}, "column 'm': expected a mask, found string"),
    ],
)
def test_bad_labels_are_named(columns: dict[str, Any], task: dict[str, Any], words: str) -> None:
    assert words in refused(columns, {"tasks": {"y": task}})


def test_a_bad_label_that_is_masked_does_no_harm() -> None:
    batch, _ = encode({"y": [2, 1], "m": [True, False]}, {"tasks": {"y": {"kind": "binary", "mask": "m"}}})
    assert batch.labels[:, 0].tolist() == [0.0, 1.0]


def test_serving_reads_no_label() -> None:
    schema = {"tasks": {"y": {"kind": "binary", "mask": "m", "weight": "w"}}, "features": {"u": {"kind": "id"}}}
    encoder = Encoder(Schema(**schema), labels=False)
    assert encoder.columns == ["time", "u"]
    batch, _ = encoder.encode(pa.table({"time": [1, 2], "u": [1, 2]}), PLACE)
    assert batch.weights.sum() == 0
    assert batch.labels.shape == (2, 1)


def test_the_truth_of_a_generated_stream_is_read() -> None:
    batch, _ = encode({"truth/y": [0.25, 0.75]}, {}, truth=True)
    assert batch.truth is not None
    assert batch.truth[:, 0].tolist() == [0.25, 0.75]


AT = dt.datetime(2024, 2, 29, 12, 30, 15, tzinfo=dt.UTC)
AT_S = int(AT.timestamp())


@pytest.mark.parametrize(
    ("array", "unit", "expected"),
    [
        (pa.array([AT_S]), "s", AT_S * 10**6),
        (pa.array([AT_S], pa.uint32()), "s", AT_S * 10**6),
        (pa.array([AT_S + 0.25]), "s", AT_S * 10**6 + 250_000),
        (pa.array([AT_S * 1000 + 7]), "ms", AT_S * 10**6 + 7000),
        (pa.array([AT_S * 10**6 + 7]), "us", AT_S * 10**6 + 7),
        (pa.array([AT_S * 10**9 + 1_999]), "ns", AT_S * 10**6 + 1),
        (pa.array([-1]), "ns", -1),
        (pa.array([AT.replace(tzinfo=None)], pa.timestamp("s")), "ns", AT_S * 10**6),
        (pa.array([AT.replace(tzinfo=None)], pa.timestamp("ms")), "s", AT_S * 10**6),
        (pa.array([AT_S * 10**9 + 1_999], pa.timestamp("ns")), "s", AT_S * 10**6 + 1),
        (pa.array([-1], pa.timestamp("ns")), "s", -1),
        (pa.array([AT], pa.timestamp("us", "America/New_York")), "s", AT_S * 10**6),
        (pa.array([dt.date(2024, 2, 29)]), "s", 1_709_164_800_000_000),
        (pa.array([dt.date(2024, 2, 29)], pa.date64()), "s", 1_709_164_800_000_000),
        (pa.array([AT_S]).dictionary_encode(), "s", AT_S * 10**6),
    ],
)
def test_times_of_every_type_become_microseconds(array: pa.Array, unit: str, expected: int) -> None:
    batch, _ = encode({"time": array, "y": [0]}, {"time_unit": unit})
    assert batch.time.tolist() == [expected]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (pa.array([1, None, 2]), "row 1,001, column 'time': the time is null; every row needs one"),
        (pa.array([None, AT], pa.timestamp("us", "UTC")), "row 1,000, column 'time': the time is null"),
        (pa.array([1.0, NAN]), "row 1,001, column 'time': nan is no time in 's' since 1970"),
        (
            pa.array([1, AT_S * 1000]),
            "row 1,001, column 'time': 1709209815000.0 is no time in 's' since 1970; set schema.time_unit",
        ),
        (pa.array([2**62], pa.timestamp("s")), "row 1,000, column 'time': 4.611686018427388e+18 is no time in 's'"),
        (pa.array(["2024-01-01"]), "column 'time': expected a timestamp, a date or a number, found string"),
        (pa.array([True]), "expected a timestamp, a date or a number, found bool"),
    ],
)
def test_bad_times_are_named(array: pa.Array, words: str) -> None:
    assert words in refused({"time": array, "y": [0] * len(array)}, {})


def test_unsigned_nanoseconds_past_every_calendar_are_refused() -> None:
    with pytest.raises(DataError, match="is no time in 'ns' since 1970"):
        encode({"time": pa.array([2**64 - 1], pa.uint64()), "y": [0]}, {"time_unit": "ns"})


def test_groups_keep_integers_and_hash_strings() -> None:
    features = {"group": "g"}
    assert encode({"g": [5, None, -7]}, features)[0].group.tolist() == [5, 0, -7]
    signed = [h - (1 << 64) if h >= 1 << 63 else h for h in (twin_hash("s1"), twin_hash("s2"))]
    assert encode({"g": ["s1", None, "s2", "s1"]}, features)[0].group.tolist() == [signed[0], 0, signed[1], signed[0]]
    assert encode({"y": [0, 1]}, {})[0].group.tolist() == [0, 0]


def test_a_column_that_serves_twice_is_counted_once() -> None:
    schema = {
        "features": {"x": {"kind": "number"}, "bucket": {"kind": "id", "column": "x"}},
        "tasks": {"y": {"kind": "regression", "column": "x"}},
        "group": "x",
    }
    _, missing = encode({"x": [1.0, None, NAN, INF]}, schema)
    assert missing.as_dict() == {"x": {"null": 1, "non_finite": 2}}


def test_missing_counts_add_up() -> None:
    total = Missing()
    for values in ([1.0, None], [NAN, NAN, 3.0], [4.0]):
        total.add(encode({"x": values}, {"features": {"x": {"kind": "number"}}})[1])
    assert total.rows == 6
    assert total.as_dict() == {"x": {"null": 1, "non_finite": 2}}


def test_a_table_in_chunks_equals_the_table_in_one() -> None:
    whole = pa.table(
        {"time": range(7), "y": [0, 1] * 3 + [0], "u": TEXT, "h": pa.array([[1], None, [2, 3], [], [4], [5], []])}
    )
    schema = Schema(features={"u": {"kind": "id"}, "h": {"kind": "ids"}}, tasks={"y": {"kind": "binary"}})
    parts = pa.concat_tables([whole.slice(0, 3), whole.slice(3, 1), whole.slice(4)])
    one, _ = Encoder(schema).encode(whole, PLACE)
    other, _ = Encoder(schema).encode(parts, PLACE)
    assert torch.equal(one.ids, other.ids)
    assert lists_of(one) == lists_of(other)
    encoded = parts.set_column(2, "u", pa.chunked_array([c.dictionary_encode() for c in parts.column("u").chunks]))
    assert torch.equal(Encoder(schema).encode(encoded, PLACE)[0].ids, one.ids)


def test_no_row_gives_an_empty_batch() -> None:
    schema = Schema(
        features={"u": {"kind": "id"}, "h": {"kind": "ids"}, "x": {"kind": "number"}, "p": {"kind": "position"}},
        tasks={"y": {"kind": "binary"}},
        group="u",
    )
    kinds = {
        "time": pa.int64(),
        "y": pa.int8(),
        "u": pa.string(),
        "h": pa.list_(pa.string()),
        "x": pa.float32(),
        "p": pa.int8(),
    }
    batch, missing = Encoder(schema).encode(pa.table({n: pa.chunked_array([], k) for n, k in kinds.items()}), PLACE)
    assert len(batch) == 0
    assert batch.lists[0].offsets.tolist() == [0]
    assert missing.as_dict() == {}
