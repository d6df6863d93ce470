"""A log whose folder changes: new files are taken, others told apart, and a resume goes on where it was."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steadyrank.data.logs import Cursor, FileNote, LogsConfig, ParquetLog, Reader, ReaderConfig, Source
from steadyrank.data.rows import find_rows
from steadyrank.data.stream import Stream, StreamConfig
from steadyrank.errors import ConfigError, DataError
from steadyrank.schema import Schema

SCHEMA = Schema(
    features={"user": {"kind": "id", "rows": 64}, "x": {"kind": "number"}},
    tasks={"click": {"kind": "binary"}},
    group="row",
)


def make_table(first: int, last: int) -> pa.Table:
    """Return rows numbered from `first` to `last` - 1 (column `row`), one a minute, every fifth without an `x`."""
    row = np.arange(first, last)
    x = [None if i % 5 == 0 else float(i) for i in row]
    return pa.table({"time": row * 60, "row": row, "user": row % 7, "x": pa.array(x, pa.float64()), "click": row % 2})


def write(folder: Path, name: str, first: int, last: int, **options: Any) -> Path:
    path = folder / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(make_table(first, last), path, row_group_size=9, **options)
    return path


def open_reader(path: Path | str, limit: int | None = None, **config: Any) -> Reader:
    log = ParquetLog(LogsConfig(path=str(path), max_rows=limit), SCHEMA.time, lenient=True)
    return Reader(log, SCHEMA, ReaderConfig(batch_size=4, **config), seed=3)


def read_on(reader: Reader, cursor: Cursor, batches: int | None = None) -> tuple[list[tuple[Any, ...]], Cursor]:
    """Return the rows of each batch, its window and whether a file ends there; and the last cursor."""
    given_batches = []
    for batch, cursor in reader.batches(cursor):  # noqa: B020  # it begins at the first
        given_batches.append((batch.group.tolist(), batch.row.tolist(), cursor, reader.left, reader.file_ends))
        if len(given_batches) == batches:
            break
    return given_batches, cursor


def rows_in(batches: list[tuple[Any, ...]]) -> list[int]:
    return [row for rows, *_ in batches for row in rows]


def kinds(notes: list[FileNote]) -> list[tuple[str, str]]:
    return [(note.kind, Path(note.file).stem) for note in notes]


CONFIGS = st.sampled_from(
    [{"window_rows": 10}, {"window_rows": 1000}, {"window_hours": 0.2}, {"window_rows": 10, "shuffle": False}]
)
SLOW_FOLDER = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10), CONFIGS, st.booleans())
@SLOW_FOLDER
def test_a_window_that_the_end_of_the_log_cut_short_is_finished_as_it_was(
    tmp_path: Path, before: int, after: int, stop: int, config: dict[str, Any], per_file: bool
) -> None:
    """Stopped after any batch, and resumed when the log has grown: every row once."""
    (tmp_path / "b.parquet").unlink(missing_ok=True)
    write(tmp_path, "a", 0, before)
    config = {**config, "window_per_file": per_file}
    first = open_reader(tmp_path, **config)
    done, cursor = read_on(first, Cursor(), stop) if stop else ([], Cursor())
    whole, _ = read_on(open_reader(tmp_path, **config), Cursor())
    state = first.state_dict()
    write(tmp_path, "b", before, before + after)
    second = open_reader(tmp_path, **config)
    assert kinds(second.load_state_dict(state, cursor.next_row)) == [("new", "b")]
    rest, end = read_on(second, Cursor(**cursor.state_dict()))
    assert sorted(rows_in(done + rest)) == list(range(before + after))
    if done:
        in_its_window = [batch for batch in whole if batch[2].window == cursor.window]
        assert [batch[0] for batch in (done + rest) if batch[2].window == cursor.window] == [
            b[0] for b in in_its_window
        ]
    assert second.missing.rows == end.next_row == before + after
    assert second.missing.as_dict()["x"]["null"] == sum(i % 5 == 0 for i in range(before + after))


@given(st.lists(st.integers(1, 25), min_size=1, max_size=5), st.integers(0, 31), CONFIGS, st.integers(1, 5))
@SLOW_FOLDER
def test_with_a_window_per_file_a_run_is_the_same_however_the_files_came(
    tmp_path: Path, sizes: list[int], looks: int, config: dict[str, Any], resume_after: int
) -> None:
    for path in tmp_path.glob("*"):
        path.unlink()
    edges = np.cumsum([0, *sizes]).tolist()
    config = {**config, "window_per_file": True}
    followed, cursor, reader = [], Cursor(), None
    for i, (first, last) in enumerate(itertools.pairwise(edges)):
        write(tmp_path, f"{i}", first, last)
        if i < len(sizes) - 1 and not looks >> i & 1:
            continue  # the next file comes before anyone looks
        if reader is None:
            reader = open_reader(tmp_path, **config)
        else:
            reader.refresh()
        new, cursor = read_on(reader, cursor, resume_after)
        state, reader = reader.state_dict(), open_reader(tmp_path, **config)
        assert reader.load_state_dict(state, cursor.next_row) == []
        followed += new
        new, cursor = read_on(reader, cursor)
        followed += new
        assert read_on(reader, cursor) == ([], cursor)
    at_once = open_reader(tmp_path, **config)
    assert followed == read_on(at_once, Cursor())[0]
    assert reader is not None
    assert reader.missing == at_once.missing
    ends = [max(rows) for rows, _, _, _, ends in followed if ends]
    assert len(ends) == len(sizes)
    assert [row + 1 for *_, cursor, _, ends in followed if ends for row in [cursor.next_row - 1]] == edges[1:]


def test_reading_a_window_again_counts_what_is_missing_once(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, 30)
    reader = open_reader(tmp_path, window_rows=10)
    read_on(reader, Cursor())
    read_on(reader, Cursor())
    assert (reader.missing.rows, reader.missing.null["x"]) == (30, 6)


def test_a_finished_window_is_not_read_again(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, 10)
    reader = open_reader(tmp_path)
    _, cursor = read_on(reader, Cursor())
    write(tmp_path, "b", 10, 20)
    reader.refresh()
    (tmp_path / "a.parquet").unlink()
    assert sorted(rows_in(read_on(reader, cursor)[0])) == list(range(10, 20))


def test_what_comes_is_told_apart_and_reported_once(tmp_path: Path) -> None:
    known = write(tmp_path, "known", 10, 20)
    reader = open_reader(tmp_path)
    assert reader.refresh() == []
    write(tmp_path, "new2", 30, 40)
    write(tmp_path, "new1", 20, 30)
    write(tmp_path, "late", 5, 15)
    write(tmp_path, "empty", 0, 0)
    (tmp_path / "twin.parquet").write_bytes(known.read_bytes())
    pq.write_table(make_table(20, 30).drop_columns(["x"]), tmp_path / "lacks.parquet")
    texts = pa.array(["text"] * 10)
    pq.write_table(make_table(20, 30).set_column(3, "x", texts), tmp_path / "type.parquet")
    pq.write_table(make_table(20, 30).append_column("x", texts), tmp_path / "double.parquet")
    (tmp_path / "spoiled.parquet").write_bytes(b"nothing")
    notes = {Path(note.file).stem: note for note in reader.refresh()}
    assert {name: note.kind for name, note in notes.items()} == {
        "late": "late",
        "twin": "duplicate",
        "lacks": "misfit",
        "type": "misfit",
        "double": "misfit",
        "new1": "new",
        "new2": "new",
        "empty": "new",
    }
    assert [name for name in notes if name.startswith("new")] == ["new1", "new2"]
    assert (notes["new1"].rows, reader.rows) == (10, 30)
    assert f"twin.parquet: left out, the same as {known}; delete one of the two" in notes["twin"].message
    assert "it begins at time = 300, and the log was known up to time = 1140" in notes["late"].message
    assert "a new run reads it in its place" in notes["late"].message
    assert "where the schema expects 'x'" in notes["lacks"].message
    assert "x has incompatible types" in notes["type"].message
    assert "two columns are named 'x'; rename one. It was left out; write it again" in notes["double"].message
    (spoiled,) = reader.refresh()
    assert (spoiled.kind, spoiled.rows) == ("unreadable", 0)
    assert "spoiled.parquet: not readable as Parquet" in spoiled.message
    assert reader.refresh() == []
    again = open_reader(tmp_path)
    assert again.load_state_dict(reader.state_dict(), 0) == []
    assert again.state_dict() == reader.state_dict()
    assert sorted(rows_in(read_on(again, Cursor())[0])) == list(range(10, 40))
    pq.write_table(make_table(40, 60), tmp_path / "lacks.parquet")
    assert kinds(again.refresh()) == [("new", "lacks")]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns", "date"])
def test_a_late_file_is_seen_in_every_unit(tmp_path: Path, unit: str) -> None:
    def write_days(name: str, first: int, last: int) -> None:
        table = make_table(first, last)
        days = pa.array(np.arange(first, last).astype(np.int32)).cast(pa.date32())
        time = days if unit == "date" else days.cast(pa.timestamp(unit))
        pq.write_table(table.set_column(0, "time", time), tmp_path / f"{name}.parquet")

    write_days("b", 10, 20)
    reader = open_reader(tmp_path)
    write_days("a", 3, 5)
    write_days("c", 19, 22)
    (late, new) = reader.refresh()
    assert (late.kind, new.kind) == ("late", "new")
    assert "begins at 1970-01-04T00:00:00.000000000" in late.message


def test_a_file_that_is_still_being_written_is_taken_when_it_is_whole(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, 10)
    whole = write(tmp_path / "other", "b", 10, 200).read_bytes()
    (tmp_path / "other/b.parquet").unlink()
    reader = open_reader(tmp_path)
    for size in (0, 4, 1000, 1100):
        (tmp_path / "b.parquet").write_bytes(whole[:size])
        assert reader.refresh() == []
    assert kinds(reader.refresh()) == [("unreadable", "b")]
    assert reader.refresh() == []
    (tmp_path / "b.parquet").write_bytes(whole[:1200])
    assert reader.refresh() == []
    (tmp_path / "b.parquet").write_bytes(whole)
    assert kinds(reader.refresh()) == [("new", "b")]
    assert reader.state_dict()["source"]["left_out"] == []


def test_a_resume_looks_twice_at_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, 10)
    state = open_reader(tmp_path).state_dict()
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    reader = open_reader(tmp_path)
    assert kinds(reader.load_state_dict(state, 0)) == [("unreadable", "b")]
    assert open_reader(tmp_path).load_state_dict(reader.state_dict(), 0) == []


def test_a_lenient_log_passes_over_what_does_not_fit_and_a_strict_one_refuses_it(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, 10)
    pq.write_table(make_table(10, 20).drop_columns(["x"]), tmp_path / "b.parquet")
    pq.write_table(make_table(10, 20).set_column(2, "user", pa.array(["u"] * 10)), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"nothing")
    reader = open_reader(tmp_path)
    assert reader.rows == 10
    assert kinds(reader.refresh()) == [("unreadable", "d"), ("misfit", "b"), ("misfit", "c")]
    with pytest.raises(DataError, match=r"d\.parquet: not readable|c\.parquet: a column has another type"):
        ParquetLog(LogsConfig(path=str(tmp_path)), "time")
    with pytest.raises(DataError, match=r"d\.parquet: not readable"):
        open_reader(tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"no column in .*b\.parquet"):
        open_reader(tmp_path / "b.parquet")


@pytest.mark.parametrize("path", ["log", "log/*.parquet", "file://{}/log", "file://{}/log/*.parquet"])
def test_folders_globs_and_uris_grow(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "log", "a", 0, 10)
    reader = open_reader(path.format(tmp_path))
    write(tmp_path / "log", "b", 10, 20)
    assert kinds(reader.refresh()) == [("new", "b")]
    assert reader.state_dict()["source"]["files"][1][:2] == ["b.parquet", 10]


def test_a_log_of_one_file_may_become_a_folder(tmp_path: Path) -> None:
    path = write(tmp_path, "a", 0, 10)
    one = open_reader(path)
    assert one.refresh() == []
    write(tmp_path, "b", 10, 20)
    assert one.refresh() == []
    assert kinds(open_reader(tmp_path).load_state_dict(one.state_dict(), 0)) == [("new", "b")]


def test_max_rows_holds_and_ends_the_looking(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, 10)
    reader = open_reader(tmp_path, limit=15)
    write(tmp_path, "b", 10, 20)
    assert kinds(reader.refresh()) == [("new", "b")]
    write(tmp_path, "c", 20, 30)
    assert reader.refresh() == []
    assert sorted(rows_in(read_on(reader, Cursor())[0])) == list(range(15))


def test_a_column_that_was_null_so_far_takes_the_type_of_the_new_file(tmp_path: Path) -> None:
    pq.write_table(make_table(0, 10).set_column(3, "x", pa.nulls(10)), tmp_path / "a.parquet")
    reader = open_reader(tmp_path)
    _, cursor = read_on(reader, Cursor())
    write(tmp_path, "b", 10, 20)
    reader.refresh()
    assert reader.missing.null["x"] == 10
    values = [x for batch, _ in reader.batches(cursor) for x in batch.numbers[:, 0].tolist() if x == x]
    assert sorted(values) == [11, 12, 13, 14, 16, 17, 18, 19]


def test_keys_of_folders(tmp_path: Path) -> None:
    write(tmp_path / "hour=1", "a", 0, 10)
    log = ParquetLog(LogsConfig(path=str(tmp_path)), "time")
    log.check(["hour"])
    (tmp_path / "hour=2").mkdir()
    (tmp_path / "hour=2/a.parquet").write_bytes((tmp_path / "hour=1/a.parquet").read_bytes())
    write(tmp_path / "hour=2", "b", 10, 20)
    write(tmp_path / "hour=x", "c", 10, 20)
    write(tmp_path, "d", 10, 20)
    notes = log.refresh()
    assert [(note.kind, note.file.removeprefix(str(tmp_path))) for note in notes] == [
        ("late", "/hour=2/a.parquet"),  # its rows are not those of hour=1
        ("misfit", "/d.parquet"),
        ("new", "/hour=2/b.parquet"),
        ("misfit", "/hour=x/c.parquet"),
    ]
    assert "the folders' key 'hour' is int64 in other files" in notes[3].message
    assert find_rows(log, [0, 19])["hour"].to_pylist() == [1, 2]


def test_a_folder_that_was_moved_goes_on(tmp_path: Path) -> None:
    write(tmp_path / "old", "day=1/a", 0, 10)
    write(tmp_path / "old", "day=2/a", 10, 20)
    state = open_reader(tmp_path / "old").state_dict()
    (tmp_path / "old").rename(tmp_path / "new")
    write(tmp_path / "new", "day=0/a", 20, 30)
    reader = open_reader(tmp_path / "new", shuffle=False)
    assert kinds(reader.load_state_dict(state, 15)) == [("new", "a")]
    assert rows_in(read_on(reader, Cursor())[0]) == list(range(30))


def read_half(folder: Path) -> tuple[dict[str, Any], Cursor]:
    """Write four files of ten rows, read fifteen rows in windows of five, and return the state."""
    for i in range(4):
        write(folder, f"{i}", 10 * i, 10 * i + 10)
    reader = open_reader(folder, window_rows=5)
    _, cursor = read_on(reader, Cursor(), 6)
    return reader.state_dict(), cursor


def test_a_file_that_was_rotated_away_still_counts(tmp_path: Path) -> None:
    state, cursor = read_half(tmp_path)
    assert (cursor.rows, cursor.next_row) == (10, 15)
    (tmp_path / "0.parquet").unlink()
    reader = open_reader(tmp_path, window_rows=5)
    assert reader.load_state_dict(state, cursor.next_row) == []
    assert reader.rows == 40
    assert sorted(rows_in(read_on(reader, cursor)[0])) == list(range(15, 40))
    assert find_rows(reader.source, [12])["row"].to_pylist() == [12]
    with pytest.raises(DataError, match=r"0\.parquet: is gone, and 10 rows of the log with it"):
        find_rows(reader.source, [3])
    again = open_reader(tmp_path, window_rows=5)
    assert again.load_state_dict(reader.state_dict(), cursor.next_row) == []
    assert again.state_dict() == reader.state_dict()
    write(tmp_path, "5", 0, 10)  # the rotated file under another name
    assert kinds(again.refresh()) == [("duplicate", "5")]


def test_all_files_that_were_read_may_be_gone(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, 10)
    first = open_reader(tmp_path)
    _, cursor = read_on(first, Cursor())
    (tmp_path / "a.parquet").unlink()
    assert first.refresh() == []
    with pytest.raises(ConfigError, match="no Parquet file"):
        open_reader(tmp_path)
    for name, start in (("b", 10), ("c", 20), ("d", 5)):
        write(tmp_path, name, start, start + 10)
    reader = open_reader(tmp_path)
    notes = reader.load_state_dict(first.state_dict(), cursor.next_row)
    assert kinds(notes) == [("late", "d"), ("new", "b"), ("new", "c")]
    assert sorted(rows_in(read_on(reader, cursor)[0])) == list(range(10, 30))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "1.parquet").unlink(), r"1\.parquet: is gone, or no Parquet any more"),
        (lambda folder: (folder / "1.parquet").write_bytes(b"text"), r"1\.parquet: is gone, or no Parquet any more"),
        (lambda folder: write(folder, "1", 10, 19), r"1\.parquet: has changed since the run read it \(rows 10 to 19"),
        (lambda folder: write(folder, "0", 1, 11), r"0\.parquet: has changed .*start a new run"),
    ],
)
def test_a_file_that_is_needed_and_changed_is_refused(tmp_path: Path, spoil: Any, words: str) -> None:
    state, cursor = read_half(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=words):
        open_reader(tmp_path, window_rows=5).load_state_dict(state, cursor.next_row)


def test_a_file_that_was_not_begun_may_be_repaired_or_taken_away(tmp_path: Path) -> None:
    """What stopped a run may be put right, and the run go on."""
    state, cursor = read_half(tmp_path)
    (tmp_path / "2.parquet").unlink()
    write(tmp_path, "3", 30, 35)
    reader = open_reader(tmp_path, window_rows=5)
    assert kinds(reader.load_state_dict(state, cursor.next_row)) == [("new", "3")]
    assert sorted(rows_in(read_on(reader, cursor)[0])) == [*range(15, 20), *range(30, 35)]


def test_a_file_that_changes_under_the_reader_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, 10)
    reader = open_reader(tmp_path)
    write(tmp_path, "a", 0, 11)
    with pytest.raises(DataError, match=r"a\.parquet, row group 0: .*bytes when the log was opened"):
        read_on(reader, Cursor())


def test_a_generated_stream_does_not_grow() -> None:
    stream = Stream(StreamConfig(rows=1000, users=100, items=100, block_rows=256))
    reader = Reader(stream, stream.schema(), ReaderConfig(window_rows=300, window_per_file=True))
    assert isinstance(stream, Source)
    assert (reader.refresh(), reader.state_dict()["source"]) == ([], {})
    ends = [(reader.left, reader.file_ends) for _ in reader.batches()]
    assert ends[-1] == (0, True)
    assert not any(ends for _, ends in ends[:-1])
    assert reader.load_state_dict(reader.state_dict(), 1000) == []
    assert reader.missing.rows == 1000
