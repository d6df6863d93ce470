"""The reader: every row once, in time order, resumable, in bounded memory, and clear about what is wrong where."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steadyrank.data import logs, parquet
from steadyrank.data.logs import Cursor, LogsConfig, ParquetLog, Reader, ReaderConfig
from steadyrank.errors import ConfigError, DataError
from steadyrank.schema import Batch, Schema

SCHEMA = Schema(
    features={"user": {"kind": "id", "rows": 64}, "seen": {"kind": "ids", "rows": 64}, "x": {"kind": "number"}},
    tasks={"click": {"kind": "binary"}},
    group="row",
)


def make_table(rows: int, start: int = 0, step: int = 60) -> pa.Table:
    """Return rows numbered from `start` (column `row`), one each `step` seconds."""
    row = np.arange(start, start + rows)
    return pa.table(
        {
            "time": pa.array(row * step),
            "row": pa.array(row),
            "user": pa.array([f"user {i % 7}" for i in row]),
            "seen": pa.array([list(range(i % 4)) for i in row], pa.list_(pa.int64())),
            "x": pa.array(row * 0.5),
            "click": pa.array(row % 2),
        }
    )


def change(table: pa.Table, column: str, values: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(column), column, pa.array(values))


def in_unit(table: pa.Table, unit: str) -> pa.ChunkedArray:
    return table.column("time").cast(pa.timestamp("s", "UTC")).cast(pa.timestamp(unit, "UTC"))


def write(path: Path, table: pa.Table, group: int = 1 << 20, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group, compression="zstd", **options)
    return path


def read(path: Path | str, schema: Schema = SCHEMA, seed: int = 0, limit: int | None = None, **config: Any) -> Reader:
    source = ParquetLog(LogsConfig(path=str(path), max_rows=limit), schema.time)
    return Reader(source, schema, ReaderConfig(**config), seed)


def rows_of(reader: Reader, cursor: Cursor | None = None) -> list[int]:
    """Return the row numbers in the order in which they are given; `group` carries them."""
    return [row for batch, _ in reader.batches(cursor) for row in batch.group.tolist()]


def refused(path: Path | str, schema: Schema = SCHEMA, **config: Any) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(read(path, schema, **config))
    return str(caught.value)


def bits(batch: Batch) -> list[bytes]:
    parts = [getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name not in ("lists", "truth", "share")]
    return [part.numpy().tobytes() for part in (*parts, *(t for ragged in batch.lists for t in ragged))]


SIZES = st.integers(1, 90)


@given(SIZES, SIZES, SIZES, SIZES, st.sampled_from([None, 0.1, 0.5, 100.0]), st.integers(0, 2**31))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_row_once_and_only_within_its_window(
    tmp_path: Path, rows: int, group: int, window: int, batch: int, hours: float | None, seed: int
) -> None:
    path = write(tmp_path / "log.parquet", make_table(rows), group)
    config = {"window_rows": window, "batch_size": batch, "window_hours": hours}
    given_rows = rows_of(read(path, seed=seed, **config))
    assert sorted(given_rows) == list(range(rows))
    windows = [row // window if hours is None else row * 60 // (hours * 3600) for row in given_rows]
    assert windows == sorted(windows)
    assert rows_of(read(path, seed=seed, **config)) == given_rows
    assert rows_of(read(path, seed=seed, shuffle=False, **config)) == list(range(rows))


def test_the_shuffle_depends_on_the_seed_and_the_window(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", make_table(200))
    one, other = (rows_of(read(path, seed=seed, window_rows=100)) for seed in (0, 1))
    first, second = one[:100], [row - 100 for row in one[100:]]
    assert sorted(first) == sorted(second) == list(range(100))
    assert len({str(order) for order in (one, other, first, second, sorted(first))}) == 5


def test_batches_are_full_but_for_the_last_of_a_window_and_hold_what_the_file_says(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", make_table(100), group=7)
    batches = [batch for batch, _ in read(path, window_rows=40, batch_size=16).batches()]
    assert [len(batch) for batch in batches] == [16, 16, 8, 16, 16, 8, 16, 4]
    for batch in batches:
        assert torch.equal(batch.time, batch.group * 60_000_000)
        assert torch.equal(batch.numbers[:, 0], batch.group * 0.5)
        assert torch.equal(batch.labels[:, 0], (batch.group % 2).float())
        assert torch.equal(batch.lists[0].offsets.diff(), batch.group % 4)


@pytest.mark.parametrize("config", [{}, {"shuffle": False}, {"window_hours": 0.3}])
def test_every_row_carries_its_number_in_the_log(tmp_path: Path, config: dict[str, Any]) -> None:
    """Through sorting, shuffling and resuming; over files and row groups; `group` holds where the row was written."""
    time = np.arange(90) * 60
    time[[33, 37]] = time[[37, 33]]
    table = change(make_table(90), "time", time)
    write(tmp_path / "a.parquet", table.slice(0, 50), group=7)
    write(tmp_path / "b.parquet", table.slice(50), group=9)
    reader = read(tmp_path, window_rows=40, batch_size=16, **config)
    given_batches = list(reader.batches())
    for batch, _ in given_batches:
        assert torch.equal(batch.row, batch.group)
    for i, (_, cursor) in enumerate(given_batches[:-1]):
        batch, _ = next(reader.batches(cursor))
        assert torch.equal(batch.row, given_batches[i + 1][0].row)
    for batch in reader.in_order():
        assert torch.equal(batch.row, batch.group)


def test_in_order_gives_the_log_as_it_lies(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", make_table(50), group=9)
    calls: list[tuple[int, int]] = []
    reader = read(path)
    given_rows = torch.cat([b.group for b in reader.in_order(lambda done, rows: calls.append((done, rows)))])
    assert given_rows.tolist() == list(range(50))
    assert (calls[-1], reader.missing.rows) == ((50, 50), 50)


def test_max_rows_ends_the_log(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", make_table(50), group=9)
    for limit in (1, 9, 10, 50, 60):
        reader = read(path, limit=limit, window_rows=7)
        assert reader.rows == min(limit, 50)
        assert sorted(rows_of(reader)) == list(range(min(limit, 50)))


def test_one_row(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", make_table(1))
    ((batch, cursor),) = read(path).batches()
    assert (len(batch), list(read(path).batches(cursor))) == (1, [])


@pytest.mark.parametrize("config", [{"window_rows": 12}, {"window_hours": 0.15}, {"window_rows": 8, "shuffle": False}])
def test_a_resume_from_every_cursor_gives_the_same_rest(tmp_path: Path, config: dict[str, Any]) -> None:
    for day in range(3):
        table = make_table(10, start=10 * day)
        write(tmp_path / f"{day}.parquet", change(table, "x", [None, np.nan] * 5), group=3)

    def reader() -> Reader:
        return read(tmp_path, batch_size=5, seed=5, max_missing_frac=1.0, **config)

    whole_reader = reader()
    whole = list(whole_reader.batches())
    for done, (_, cursor) in enumerate(whole, start=1):
        again = Cursor(**cursor.state_dict())  # as a checkpoint gives it back
        assert again == cursor
        first = reader()
        batches = first.batches()
        for _ in range(done):
            next(batches)
        second = reader()
        second.missing.add(first.missing)
        rest = list(second.batches(again))
        assert [c for _, c in rest] == [c for _, c in whole[done:]]
        assert [bits(batch) for batch, _ in rest] == [bits(batch) for batch, _ in whole[done:]]
        assert second.missing.as_dict() == whole_reader.missing.as_dict() == {"x": {"null": 15, "non_finite": 15}}
        assert second.missing.rows == 30


def test_a_resume_still_sees_that_time_went_back(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", change(make_table(20), "time", [*range(100, 110), *range(50, 60)]))
    batches = read(path, window_rows=10).batches()
    _, cursor = next(batches)
    with pytest.raises(DataError, match="row 10: time goes back"):
        list(read(path, window_rows=10).batches(cursor))


@pytest.mark.parametrize("kind", ["int64", "int32", "double", "timestamp[s]", "timestamp[ns]", "date32"])
def test_files_are_ordered_by_time_and_not_by_name(tmp_path: Path, kind: str) -> None:
    step = 86_400 if kind == "date32" else 60
    for name, start in (("a", 20), ("b", 0), ("c", 10)):
        table = make_table(10, start, step)
        time = table.column("time") if kind in ("int64", "int32", "double") else in_unit(table, "s")
        write(tmp_path / f"{name}.parquet", change(table, "time", time.cast(kind).combine_chunks()), group=4)
    assert rows_of(read(tmp_path, shuffle=False, unsorted="refuse")) == list(range(30))


def test_units_of_time_may_differ_between_files(tmp_path: Path) -> None:
    for name, start, unit in (("a", 10, "ns"), ("b", 0, "ms"), ("c", 20, "us")):
        table = make_table(10, start)
        write(tmp_path / f"{name}.parquet", change(table, "time", in_unit(table, unit).combine_chunks()))
    assert rows_of(read(tmp_path, shuffle=False, unsorted="refuse")) == list(range(30))


def test_nanosecond_statistics_are_read_without_pandas(tmp_path: Path) -> None:
    for name, start in (("a", 10), ("b", 0)):
        table = make_table(10, start)
        write(tmp_path / f"{name}.parquet", change(table, "time", in_unit(table, "ns").combine_chunks()))
    code = """if True:
        import sys
        from types import SimpleNamespace

        def find_spec(name, *_):
            if name == "pandas":
                raise ImportError(name)

        sys.meta_path.insert(0, SimpleNamespace(find_spec=find_spec))
        from steadyrank.data.logs import LogsConfig, ParquetLog

        log = ParquetLog(LogsConfig(path=sys.argv[1]), "time")
        print([piece.place.file[-9] for piece in log.pieces()])"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "['b', 'a']\n", done.stderr


def test_an_empty_file_among_others_changes_nothing(tmp_path: Path) -> None:
    for name, start, rows in (("a", 10, 10), ("b", 0, 10), ("c", 5, 0)):
        write(tmp_path / f"{name}.parquet", make_table(rows, start))
    assert rows_of(read(tmp_path, shuffle=False)) == list(range(20))


def test_files_without_statistics_are_read_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", make_table(10), write_statistics=False)
    write(tmp_path / "b.parquet", make_table(10, 10), write_statistics=False)
    assert rows_of(read(tmp_path, shuffle=False)) == list(range(20))


def test_date_folders(tmp_path: Path) -> None:
    for day in (2, 1, 3):
        write(tmp_path / f"log/date=2024-01-0{day}/hour={day}/part.parquet", make_table(10, 10 * day))
    write(tmp_path / "log/_temporary/part.parquet", make_table(10, 99))
    write(tmp_path / "log/date=2024-01-01/.part.parquet", make_table(10, 99))
    (tmp_path / "log/_SUCCESS").touch()
    assert rows_of(read(tmp_path / "log", shuffle=False)) == list(range(10, 40))
    features = {"user": {"kind": "id"}, "hour": {"kind": "id", "hashed": False, "rows": 24}}
    by_date = Schema(time="date", features=features, tasks=SCHEMA.tasks, group="row")
    (batch,) = [b for b, _ in read(tmp_path / "log", by_date, shuffle=False).batches()]
    assert batch.time.unique().tolist() == [(19_723 + day) * 86_400_000_000 for day in range(3)]
    assert torch.equal(batch.ids[:, 1] - by_date.slot("hour").start - 1, batch.group // 10)
    assert sorted(rows_of(read(f"{tmp_path}/log/date=2024-01-0*"))) == list(range(10, 40))
    assert sorted(rows_of(read(tmp_path / "log/date=2024-01-02"))) == list(range(20, 30))


def test_a_folder_key_that_is_a_column_too_yields_to_the_column(tmp_path: Path) -> None:
    write(tmp_path / "x=7/row=5/log.parquet", make_table(10))
    assert rows_of(read(tmp_path, shuffle=False)) == list(range(10))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.parquet", ["a", "b"]),
        ("a*", ["a"]),
        ("sub*", ["sub", "deep"]),
        ("*/*.parquet", ["sub", "other"]),
        ("**/*.parquet", ["a", "b", "sub", "deep", "other"]),
        ("**/deep.parquet", ["deep"]),
        ("*", ["a", "b", "sub", "deep", "other"]),
    ],
)
@pytest.mark.parametrize("uri", [False, True])
def test_globs(tmp_path: Path, pattern: str, expected: list[str], uri: bool) -> None:
    files = ["a.parquet", "b.parquet", "sub/sub.parquet", "sub/in/deep.parquet", "other/other.parquet"]
    for i, name in enumerate(files):
        write(tmp_path / f"log/{name}", make_table(2, 2 * i))
    write(tmp_path / "logbook.parquet", make_table(2, 99))
    path = f"file://{tmp_path}/log/{pattern}" if uri else f"{tmp_path}/log/{pattern}"
    log = ParquetLog(LogsConfig(path=path), "time")
    assert [Path(piece.place.file).stem for piece in log.pieces()] == expected


def test_a_uri_is_read_through_its_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for day in (1, 2):
        write(tmp_path / f"bucket/log/date=2024-01-0{day}/p.parquet", make_table(10, 10 * day))
    assert sorted(rows_of(read(f"file://{tmp_path}/bucket/log"))) == list(range(10, 30))
    seen: list[str] = []

    def from_uri(uri: str) -> tuple[pafs.FileSystem, str]:
        seen.append(uri)
        path = uri.removeprefix("s3://").partition("?")[0]
        return pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), path

    monkeypatch.setattr(parquet.pafs, "FileSystem", SimpleNamespace(from_uri=from_uri))
    assert sorted(rows_of(read("s3://bucket/log?region=x"))) == list(range(10, 30))
    assert rows_of(read("s3://bucket/log/*-02/*.parquet?region=x", shuffle=False)) == list(range(20, 30))
    assert seen == ["s3://bucket/log?region=x", "s3://bucket/log?region=x"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("{}/lgo.parquet", "data.path: there is no file or folder '{}/lgo.parquet'; did you mean 'log.parquet'?"),
        ("{}/none/*.parquet", "there is no file or folder"),
        ("{}/*.pq", "no Parquet file (*.parquet, *.pq) under '{}/*.pq'; `steadyrank convert` makes them"),
        ("{}/empty", "no Parquet file"),
        ("foo://bucket/log", "data.path: 'foo://bucket/log' cannot be read: Unrecognized filesystem type"),
        ("foo://bucket/*.parquet", "data.path: 'foo://bucket/*.parquet' cannot be read"),
        ("file://log.parquet", "data.path: 'file://log.parquet' cannot be read: File URI cannot be relative"),
        ("file:///no/such/file.parquet", "there is no file or folder"),
    ],
)
def test_a_wrong_path_is_a_config_error(tmp_path: Path, path: str, words: str) -> None:
    write(tmp_path / "log.parquet", make_table(1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        read(path.replace("{}", str(tmp_path)))
    assert words.replace("{}", str(tmp_path)) in str(caught.value)


def test_rows_out_of_order_in_a_window_are_sorted_or_refused(tmp_path: Path) -> None:
    time = np.arange(40) * 60
    time[[13, 17]] = time[[17, 13]]
    path = write(tmp_path / "log.parquet", change(make_table(40), "time", time), group=6)
    in_order = rows_of(read(path, shuffle=False, window_rows=20))
    assert in_order == [17 if r == 13 else 13 if r == 17 else r for r in range(40)]
    message = refused(path, unsorted="refuse", window_rows=20)
    assert f"{path}, row group 2, row 14: time goes back from 1970-01-01T00:17:00 to 1970-01-01T00:14:00" in message
    assert "reader.unsorted = 'sort'" in message


def test_equal_times_keep_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", change(make_table(30), "time", [2] * 10 + [1] * 10 + [2] * 10))
    assert rows_of(read(path, shuffle=False)) == [*range(10, 20), *range(10), *range(20, 30)]


@pytest.mark.parametrize("config", [{"window_rows": 20}, {"window_rows": 20, "unsorted": "refuse"}])
def test_rows_that_go_back_across_windows_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    time = np.arange(40) * 60
    time[33] = 60
    table = change(make_table(40), "time", time)
    write(tmp_path / "a.parquet", table.slice(0, 30))
    second = write(tmp_path / "b.parquet", table.slice(30), group=2)
    message = refused(tmp_path, **config)
    # b.parquet holds the earlier time, but a.parquet begins earlier still.
    assert f"{second}, row group 1, row 3: time goes back to 1970-01-01T00:01:00" in message
    assert "after a window that ended at 1970-01-01T00:19:00" in message


def test_hour_windows_never_split_a_row_off_backwards(tmp_path: Path) -> None:
    time = np.array([0, 10, 3600, 5, 3700, 7200])
    path = write(tmp_path / "log.parquet", change(make_table(6), "time", time))
    assert "row 3: time goes back to 1970-01-01T00:00:05" in refused(path, window_hours=1.0)
    assert rows_of(read(path, window_hours=2.0, shuffle=False)) == [0, 3, 1, 2, 4, 5]


def test_missing_values_are_counted(tmp_path: Path) -> None:
    table = change(make_table(100), "x", [None] * 10 + [np.nan] * 5 + [np.inf] * 2 + [1e300] + [1.0] * 82)
    path = write(tmp_path / "log.parquet", change(table, "user", [None] * 3 + ["u"] * 97), group=11)
    reader = read(path, window_rows=30)
    rows_of(reader)
    assert reader.missing.as_dict() == {"user": {"null": 3, "non_finite": 0}, "x": {"null": 10, "non_finite": 8}}


@pytest.mark.parametrize("window", [100, 1500, 1 << 16])
def test_too_many_missing_values_are_refused_before_they_are_learned(tmp_path: Path, window: int) -> None:
    rows = 2000 if window < 1 << 16 else 100
    x = np.ones(rows)
    x[:: 2 if window > 1500 else 1][: rows // 2] = np.nan
    path = write(tmp_path / "log.parquet", change(make_table(rows), "x", x))
    config = {"window_rows": window, "max_missing_frac": 0.3}
    with pytest.raises(DataError, match=r"log.parquet, row group 0, row 0 and after, column 'x': \d+%") as caught:
        next(read(path, **config).batches())
    assert "more than reader.max_missing_frac = 0.3" in str(caught.value)
    assert len(rows_of(read(path, window_rows=window, max_missing_frac=1.0))) == rows


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw[:-10],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: b"PAR1",
        lambda raw: b"time,user\n1,2\n",
        lambda raw: raw[:-1000] + b"\xff" * 992 + raw[-8:],
    ],
    ids=["footer cut", "half", "no byte", "magic only", "text", "footer spoiled"],
)
def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    good = write(tmp_path / "a.parquet", make_table(50))
    bad = tmp_path / "b.parquet"
    bad.write_bytes(spoil(good.read_bytes()))
    for path in (tmp_path, bad):
        message = refused(path)
        assert message.startswith(f"{bad}: not readable as Parquet, perhaps truncated or corrupt (")
        assert "\n" not in message


def test_flipped_bytes_give_a_data_error_or_data(tmp_path: Path) -> None:
    """Never a foreign traceback: Arrow's own errors are turned into ours, with the file's name."""
    path = write(tmp_path / "log.parquet", make_table(300), group=100)
    raw = path.read_bytes()
    end = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    bad = tmp_path / "bad.parquet"
    generator = np.random.default_rng(0)
    errors = []
    for _ in range(40):
        spoiled = bytearray(raw)
        for at in generator.integers(4, end, size=generator.integers(1, 4)):
            spoiled[at] ^= 1 << generator.integers(8)
        bad.write_bytes(spoiled)
        try:
            assert len(rows_of(read(bad, window_rows=50))) == 300
        except DataError as error:
            errors.append(str(error))
    assert len(errors) > 5
    assert all(str(bad) in message for message in errors)


def test_the_row_group_that_cannot_be_decoded_and_the_file_that_vanishes_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", make_table(300), group=100, use_dictionary=False)
    chunk = pq.read_metadata(path).row_group(2).column(0)
    raw = bytearray(path.read_bytes())
    low, size = chunk.data_page_offset, chunk.total_compressed_size
    raw[low : low + size] = b"\xff" * size
    path.write_bytes(raw)
    reader = read(path, window_rows=100)
    batches = reader.batches()
    next(batches)
    with pytest.raises(DataError, match=rf"{path}, row group 2: not readable as Parquet"):
        list(batches)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path}, row group 0: not readable"):
        rows_of(reader)


def test_a_column_that_is_missing_is_named_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", make_table(10))
    bad = write(tmp_path / "b.parquet", make_table(10, 10).rename_columns(["time", "row", "usr", "seen", "x", "click"]))
    assert refused(tmp_path).startswith(f"no column in {bad}, where the schema expects 'user'; did you mean 'usr'?")
    schema = Schema(time="tme", features=SCHEMA.features, tasks=SCHEMA.tasks)
    assert "'tme'; did you mean 'time'?" in refused(tmp_path / "a.parquet", schema)


def test_files_that_disagree_about_a_type(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", make_table(10))
    bad = write(tmp_path / "b.parquet", change(make_table(10, 10), "x", ["text"] * 10))
    words = f"{bad}: a column has another type than in the files before it (Unable to merge: Field x has incompatible"
    assert refused(tmp_path).startswith(words)


@pytest.mark.parametrize("swap", [False, True])
def test_files_whose_types_can_be_joined_are_joined(tmp_path: Path, swap: bool) -> None:
    """The first file is no judge: 0.5 in the second must not become 0, nor a null column in it hide values."""
    one, other = make_table(10), make_table(10, 10)
    for name, values in (("x", range(10)), ("user", pa.nulls(10)), ("click", pa.array([1] * 10, pa.int8()))):
        one = change(one, name, values)
    other = change(other, "x", [0.5] * 10)
    other = change(other, "seen", other.column("seen").cast(pa.large_list(pa.int64())).combine_chunks())
    write(tmp_path / ("b.parquet" if swap else "a.parquet"), one)
    write(tmp_path / ("a.parquet" if swap else "b.parquet"), other)
    (batch,) = [b for b, _ in read(tmp_path, shuffle=False).batches()]
    assert batch.numbers[:, 0].tolist() == [*map(float, range(10)), *[0.5] * 10]
    assert batch.ids[:10, 0].tolist() == [0] * 10
    assert batch.ids[10:, 0].min() > 0
    assert batch.labels[:, 0].tolist() == [1.0] * 10 + [0.0, 1.0] * 5


def test_an_integer_that_no_float_holds_is_refused_and_not_rounded(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", change(make_table(10), "user", pa.array([2.0] * 10)))
    bad = write(tmp_path / "b.parquet", change(make_table(10, 10), "user", pa.array([2**53 + 1] * 10)))
    assert f"{bad}, row group 0, row 0 and after, column 'user': int64 here, double in other files" in refused(tmp_path)


def test_two_columns_of_one_name_and_an_empty_log_are_refused(tmp_path: Path) -> None:
    table = make_table(5)
    path = write(tmp_path / "log.parquet", table.append_column("x", table.column("x")))
    assert refused(path) == f"{path}: two columns are named 'x'; rename one"
    path = write(tmp_path / "log.parquet", make_table(0))
    assert refused(path) == f"{path}: the log is empty (0 rows in 1 file(s))"


def test_a_bad_value_is_named_by_file_and_row(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", make_table(50))
    bad = write(tmp_path / "b.parquet", change(make_table(50, 50), "click", [0] * 37 + [2] + [1] * 12), group=10)
    assert refused(tmp_path, window_rows=17).startswith(f"{bad}, row group 3, row 37, column 'click': expected a bin")
    null = change(make_table(50), "time", [*range(20), None, *range(21, 50)])
    path = write(tmp_path / "null/log.parquet", null, group=8)
    for config in ({"window_rows": 7}, {"window_hours": 1.0}):
        assert refused(path, **config).startswith(f"{path}, row group 2, row 20, column 'time': the time is null")


def test_memory_is_bounded_by_the_window_and_not_by_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 2_000_000
    generator = np.random.default_rng(0)
    table = pa.table({"time": np.arange(rows), "user": generator.integers(1 << 40, size=rows)})
    table = table.append_column("x", [generator.normal(size=rows)]).append_column("click", [np.zeros(rows)])
    path, size = write(tmp_path / "log.parquet", table, group=rows), table.nbytes
    del table
    schema = Schema(features={"user": {"kind": "id"}, "x": {"kind": "number"}}, tasks={"click": {"kind": "binary"}})
    reader = read(path, schema, window_rows=20_000, batch_size=20_000)
    sizes: list[int] = []
    encode = reader.encoder.encode
    monkeypatch.setattr(reader.encoder, "encode", lambda table, *at: sizes.append(len(table)) or encode(table, *at))
    before, peak, count = pa.total_allocated_bytes(), 0, 0
    for batch, _ in reader.batches():
        count += len(batch)
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert count == sum(sizes) == rows
    assert max(sizes) <= 20_000 <= logs.PIECE_ROWS
    assert peak < size / 4  # one row group holds the whole log, and is not loaded whole
