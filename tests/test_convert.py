"""Text to Parquet: the same values, in bounded memory, and a target that is complete or absent."""

import bz2
import datetime as dt
import errno
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steadyrank.data import convert as module
from steadyrank.data.convert import convert
from steadyrank.errors import ConfigError, DataError


def source(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def converted(folder: Path, name: str, text: str | bytes, **options: Any) -> pa.Table:
    """Convert a text and return what was written, checking that nothing else lies in the folder."""
    rows = convert(source(folder, name, text), folder / "out.parquet", overwrite=True, **options)
    table = pq.read_table(folder / "out.parquet")
    assert rows == len(table)
    assert {path.name for path in folder.iterdir()} == {name, "out.parquet"}
    return table


def refused(folder: Path, name: str, text: str | bytes, **options: Any) -> str:
    """Return the message, checking that nothing was written."""
    path = source(folder, name, text)
    with pytest.raises(DataError) as caught:
        convert(path, folder / "out.parquet", **options)
    assert {path.name for path in folder.iterdir()} == {name}
    message = str(caught.value)
    assert message.startswith(str(path))
    return message


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)


def csv(*values: str) -> str:
    """A column of values whose first block holds the first one only, thirty times."""
    return "a,b\n" + "".join(f"{value},x\n" for value in [values[0]] * 30 + list(values[1:]))


def test_csv_keeps_types_quotes_and_newlines(tmp_path: Path) -> None:
    text = (
        "time,user,note,ok,day,gone\n"
        '2024-01-01 10:00:00,1,"a ""quoted"", note",true,2024-01-01,\n'
        '2024-01-01 11:00:00,2,"two\nlines",false,2024-01-02,NA\n'
        "2024-01-01 12:00:00,,ünï 漢字,,,\n"
    )
    table = converted(tmp_path, "log.csv", text)
    kinds = ["timestamp[ms]", "int64", "string", "bool", "date32[day]", "int64"]
    assert [str(kind) for kind in table.schema.types] == kinds
    assert table.column("note").to_pylist() == ['a "quoted", note', "two\nlines", "ünï 漢字"]
    assert table.column("user").to_pylist() == [1, 2, None]
    assert table.column("gone").null_count == 3


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("log.csv", lambda raw: raw),
        ("log.CSV", lambda raw: raw),
        ("log.tsv", lambda raw: raw.replace(b",", b"\t")),
        ("log.v1.csv.gz", gzip.compress),
        ("log.csv.GZ", gzip.compress),
        ("log.csv.gz", lambda raw: gzip.compress(raw[:20]) + gzip.compress(raw[20:])),
        ("log.csv.bz2", bz2.compress),
        ("log.csv.zst", lambda raw: pa.compress(raw, "zstd", asbytes=True)),
        ("log.csv", lambda raw: b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n").rstrip()),
    ],
)
def test_delimiters_and_compressions(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    raw = b"time,user\n" + b"".join(b"%d,u%d\n" % (i, i % 3) for i in range(50))
    table = converted(tmp_path, name, pack(raw))
    assert table.to_pydict() == {"time": list(range(50)), "user": [f"u{i % 3}" for i in range(50)]}


@pytest.mark.parametrize("name", ["log.jsonl", "log.ndjson", "log.json", "log.jsonl.gz"])
@pytest.mark.parametrize("small", [False, True])
def test_json_lines(tmp_path: Path, name: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small:
        monkeypatch.setattr(module, "BLOCK_BYTES", 50)
    rows = [
        {"time": i, "seen": [f"ü{j}" for j in range(i % 3)], "note": 'a "b"\n' * (i % 9), "x": i / 2} for i in range(60)
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)) + "\n\n"
    raw = text.encode()
    table = converted(tmp_path, name, gzip.compress(raw) if name.endswith("gz") else b"\xef\xbb\xbf" + raw)
    assert table.to_pylist() == rows


def test_parquet_is_copied_and_sorted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"t": [3, 1, 2], "u": ["c", "a", "b"]}), tmp_path / "in.parquet")
    calls: list[tuple[int, int]] = []
    convert(tmp_path / "in.parquet", tmp_path / "out.parquet", sort="t", progress=lambda *c: calls.append(c))
    assert pq.read_table(tmp_path / "out.parquet").to_pydict() == {"t": [1, 2, 3], "u": ["a", "b", "c"]}
    assert calls == [((tmp_path / "in.parquet").stat().st_size,) * 2]


NOON = dt.datetime(2024, 1, 1, 12)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("values", "kind", "last"),
    [
        (["1", "2.5"], "double", 2.5),
        (["1", "2", "word"], "string", "word"),
        (["1.5", "word"], "string", "word"),
        (["true", "maybe"], "string", "maybe"),
        (["2024-01-01", "2024-01-01 12:00:00"], "timestamp[us]", NOON),
        (["2024-01-01", "never"], "string", "never"),
        (["2024-01-01 11:00:00", "2024-01-01 12:00:00.5"], "timestamp[us]", NOON.replace(microsecond=500_000)),
        (["2024-01-01T11:00:00Z", "2024-01-01T12:00:00.5Z"], "timestamp[ns, tz=UTC]", None),
        (["", "7"], "int64", 7),
        (["", str(2**53 + 1)], "int64", 2**53 + 1),
        (["", "7", "7.5"], "double", 7.5),
        (["", "true"], "bool", True),
        (["", "2024-01-01 12:00:00"], "timestamp[us]", NOON),
        (["", "word"], "string", "word"),
        (["NA", "null", "N/A"], "int64", None),
        (["", "true", "5", "word"], "string", "word"),
    ],
)
def test_a_csv_column_is_widened_after_the_first_block(tmp_path: Path, values: list[str], kind: str, last: Any) -> None:
    table = converted(tmp_path, "log.csv", csv(*values))
    assert str(table.schema.field("a").type) == kind
    assert len(table) == 29 + len(values)
    nulls = sum(value in ("", "NA", "null", "N/A") for value in [values[0]] * 29 + values)
    assert table.column("a").null_count == nulls
    if last is not None:
        assert table.column("a")[-1].as_py() == last


@pytest.mark.usefixtures("small_blocks")
def test_columns_widen_independently_and_quoted_newlines_survive_it(tmp_path: Path) -> None:
    rows = [f'{i},,"two\nlines {i}",{i}\n' for i in range(30)] + ['0.5,word,"x\n\ny",zzz\n']
    table = converted(tmp_path, "log.csv", "a,b,c,d\n" + "".join(rows))
    assert [str(kind) for kind in table.schema.types] == ["double", "string", "string", "string"]
    assert table.slice(30).to_pylist() == [{"a": 0.5, "b": "word", "c": "x\n\ny", "d": "zzz"}]
    assert table.column("d").to_pylist()[:30] == [str(i) for i in range(30)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("first", "later", "kind"),
    [
        (1, 2.5, "double"),
        (None, 3, "int64"),
        (None, "word", "string"),
        (None, True, "bool"),
        ([], [1, 2], "list<element: int64>"),
        ([1], [2.5], "list<element: double>"),
        ("2024-01-01 00:00:00", "2024-01-01 00:00:00.5", "timestamp[us]"),
        ("2024-01-01 00:00:00.5", "2024-01-01 00:00:00", "timestamp[us]"),
        ("2024-01-01 00:00:00.5", "2024-01-01 00:00:00.123456789", "timestamp[ns]"),
        ("2024-01-01T00:00:00.5Z", "2024-01-01T00:00:00Z", "timestamp[ns, tz=UTC]"),
        ("2024-01-01 00:00:00.5", "never", "string"),
        ("word", "2024-01-01 00:00:00.5", "string"),
        (None, "2024-01-01 00:00:00.5", "timestamp[us]"),
        ("2024-01-01", "never", "string"),
        ({"p": 1}, {"p": 1, "q": 2}, "struct<p: int64, q: int64>"),
    ],
)
def test_a_json_column_is_widened_after_the_first_block(tmp_path: Path, first: Any, later: Any, kind: str) -> None:
    lines = [json.dumps({"n": i, "a": first if i < 20 else later}) for i in range(25)]
    table = converted(tmp_path, "log.jsonl", "\n".join(lines))
    assert str(table.schema.field("a").type) == kind
    assert table.column("n").to_pylist() == list(range(25))
    if not kind.startswith(("timestamp", "struct")):
        assert table.column("a").to_pylist() == [first] * 20 + [later] * 5


@pytest.mark.usefixtures("small_blocks")
def test_json_keys_may_come_late_go_and_change_places(tmp_path: Path) -> None:
    rows = [{"a": i} for i in range(20)] + [{"b": "x", "a": 1}, {"b": "y"}, {}]
    table = converted(tmp_path, "log.jsonl", "\n".join(map(json.dumps, rows)))
    assert table.select(["a", "b"]).to_pylist()[18:] == [
        {"a": 18, "b": None},
        {"a": 19, "b": None},
        {"a": 1, "b": "x"},
        {"a": None, "b": "y"},
        {"a": None, "b": None},
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("log.csv", "", "Empty CSV file"),
        ("log.csv", "a,b\n", "the file holds no row"),
        ("log.csv", "a,b,a\n1,2,3\n", "the header names column 'a' twice"),
        ("log.csv", "a,b\n1,2\n3\n", "Row #3: Expected 2 columns, got 1: 3"),
        ("log.csv", "a,b\n1,2\n3,4,5\n", "Row #3: Expected 2 columns, got 3: 3,4,5"),
        ("log.csv", b"\xff\xfe,b\n1,2\n", "'utf-8' codec can't decode"),
        # A test's name holds these bytes: without a time, they are the same in every process that collects it.
        ("log.csv.gz", gzip.compress(b"a\n" + b"1\n" * 999, mtime=0)[:-9], "Truncated compressed stream"),
        ("log.csv.gz", "a,b\n1,2\n", "incorrect header check"),
        ("log.jsonl", "", "the file holds no row"),
        ("log.jsonl", "\n\n", "the file holds no row"),
        ("log.jsonl", '{"a": 1}\n{"a": 2\n{"a": 3}\n', "in the part that begins at line 1: JSON parse error"),
        ("log.jsonl", '[{"a": 1}]\n', "line 1: expected one JSON object a line"),
        ("log.jsonl", '{"a": 1}\n\nnull\n', "line 3: expected one JSON object a line"),
        ("log.jsonl", '{"a": 1}\n{"a": "x"}\n', "Column(/a) changed from number to string in row 1"),
        ("log.jsonl", '{"a": {}}\n', "a"),
        ("log.parquet", "PAR1", "Parquet"),
    ],
)
@pytest.mark.parametrize("sort", [None, "a"])
def test_a_text_that_cannot_be_parsed_is_named(
    tmp_path: Path, name: str, text: str | bytes, words: str, sort: Any
) -> None:
    message = refused(tmp_path, name, text, sort=sort)
    assert words in message
    assert "\n" not in message


@pytest.mark.usefixtures("small_blocks")
def test_later_blocks_are_named_by_line_and_column(tmp_path: Path) -> None:
    lines = [json.dumps({"a": i}) for i in range(50)]
    assert "line 51: expected one JSON object a line" in refused(tmp_path, "log.jsonl", "\n".join([*lines, "null"]))
    message = refused(tmp_path, "log.jsonl", "\n".join([*lines, '{"a": "x"}']))
    assert "column 'a' changes from int64 to string; write it with one type" in message
    message = refused(tmp_path, "log.jsonl", "\n".join([*lines, '{"a": }', *lines]))
    assert "in the part that begins at line 46" in message
    (tmp_path / "log.jsonl").unlink()
    assert "Row #41: Expected 2 columns, got 1: 3" in refused(tmp_path, "log.csv", "a,b\n" + "1,2\n" * 39 + "3\n")


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("lgo.csv", "out.parquet", "there is no file '{}/lgo.csv'; did you mean 'log.csv'?"),
        ("log.xlsx", "out.parquet", "no reader for files ending in '.xlsx'"),
        ("log", "out.parquet", "no reader for files ending in ''"),
        ("log.csv", "none/out.parquet", "there is no folder '{}/none' to write 'out.parquet' into"),
        ("log.csv", "there.parquet", "'{}/there.parquet' exists; give --overwrite to replace it, or another name"),
    ],
)
def test_wrong_paths_are_config_errors(tmp_path: Path, name: str, target: str, words: str) -> None:
    for there in ("log.csv", "log.xlsx", "log", "there.parquet"):
        source(tmp_path, there, "a\n1\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path / name, tmp_path / target)
    assert words.replace("{}", str(tmp_path)) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.parquet").read_text() == "a\n1\n"


@pytest.mark.parametrize("moment", ["open", "write", "close", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_write_that_fails_leaves_the_old_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, code: int
) -> None:
    class Failing(pq.ParquetWriter):
        def __init__(self, *args: Any, **options: Any) -> None:
            fail("open")
            super().__init__(*args, **options)

        def write_table(self, *args: Any, **options: Any) -> None:
            super().write_table(*args, **options)
            fail("write")

        def close(self) -> None:
            super().close()
            fail("close")

    def fail(now: str, *_: Any) -> None:
        if now == moment:
            raise OSError(code, "the disk says no")

    monkeypatch.setattr(module.pq, "ParquetWriter", Failing)
    if moment == "replace":
        monkeypatch.setattr(module.os, "replace", lambda *_: fail("replace"))
    old = source(tmp_path, "out.parquet", "old")
    path = source(tmp_path, "log.csv", "a\n1\n")
    with pytest.raises(DataError) as caught:
        convert(path, old, overwrite=True)
    assert str(caught.value) == f"{path} to {old}: the disk says no"
    assert old.read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"log.csv", "out.parquet"}


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    path = source(tmp_path, "log.csv", "a\n1\n")

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "out.parquet", progress=interrupt)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
def test_progress_goes_from_block_to_block_to_the_end(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    raw = ("a,b\n" + "".join(f"{i},{i * 7919 % 1000}\n" for i in range(2000))).encode()
    raw = gzip.compress(raw) if name.endswith("gz") else raw
    calls: list[tuple[int, int]] = []
    converted(tmp_path, name, raw, progress=lambda *call: calls.append(call))
    assert len(calls) > 10
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {len(raw)}
    assert calls[-1] == (len(raw), len(raw))


@pytest.mark.usefixtures("small_blocks")
def test_rows_are_sorted_over_all_blocks_and_stay_in_place_where_equal(tmp_path: Path) -> None:
    text = "t,n\n" + "".join(f"{-i % 10},{i}\n" for i in range(100))
    table = converted(tmp_path, "log.csv", text, sort="t")
    assert table.to_pylist() == sorted(({"t": -i % 10, "n": i} for i in range(100)), key=lambda row: row["t"])
    message = refused(tmp_path / "other", "log.csv", text, sort="tt") if (tmp_path / "other").mkdir() is None else ""
    assert "no column to sort by 'tt'; did you mean 't'?" in message


def test_only_a_block_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 16)
    text = "a,b\n" + "".join(f"{i},some words that take room {i}\n" for i in range(200_000))
    path = source(tmp_path, "log.csv", text)
    del text
    before, peak = pa.total_allocated_bytes(), 0

    def watch(done: int, total: int) -> None:
        nonlocal peak
        peak = max(peak, pa.total_allocated_bytes() - before)

    assert convert(path, tmp_path / "out.parquet", progress=watch) == 200_000
    assert 0 < peak < path.stat().st_size / 3
