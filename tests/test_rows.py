"""Single rows of a log read again by their number, with every column."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steadyrank.data.logs import LogsConfig, ParquetLog, Reader, ReaderConfig
from steadyrank.data.rows import find_rows, show_rows
from steadyrank.data.stream import Stream, StreamConfig
from steadyrank.errors import DataError


def write(folder: Path) -> pa.Table:
    """Write 100 rows into two files, in row groups of 10, with a key that no schema names."""
    table = pa.table({"time": range(100), "key": [f"request {i}" for i in range(100)]})
    pq.write_table(table.slice(0, 60), folder / "a.parquet", row_group_size=10)
    pq.write_table(table.slice(60), folder / "b.parquet", row_group_size=10)
    return table


@pytest.mark.parametrize("rows", [[], [0], [99], [59, 60], [70, 3, 71, 3, 12], list(range(99, -1, -1))])
def test_rows_come_in_the_order_asked_for_with_all_columns(tmp_path: Path, rows: list[int]) -> None:
    table = write(tmp_path)
    found = find_rows(ParquetLog(LogsConfig(path=str(tmp_path)), "time"), rows)
    assert found.column_names == ["time", "key"]
    assert found.to_pylist() == [table.slice(row, 1).to_pylist()[0] for row in rows]


def test_only_row_groups_that_hold_them_are_read(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "a.parquet"
    raw, chunk = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(2).column(1)
    raw[chunk.data_page_offset : chunk.data_page_offset + 20] = b"\xff" * 20
    path.write_bytes(raw)
    log = ParquetLog(LogsConfig(path=str(tmp_path)), "time")
    assert find_rows(log, [5, 85])["time"].to_pylist() == [5, 85]
    with pytest.raises(DataError, match=r"a\.parquet, row group 2: not readable as Parquet"):
        find_rows(log, [5, 25])


@pytest.mark.parametrize("row", [-1, 100, 50])
def test_a_row_outside_the_log_is_refused(tmp_path: Path, row: int) -> None:
    write(tmp_path)
    log = ParquetLog(LogsConfig(path=str(tmp_path), max_rows=50 if row == 50 else None), "time")
    with pytest.raises(DataError, match=f"row {row} is not in the log, which has"):
        find_rows(log, [0, row])


def test_the_rows_of_a_shuffled_batch_are_found_in_the_stream_that_gave_them() -> None:
    stream = Stream(StreamConfig(rows=3000, users=100, items=100, block_rows=512))
    reader = Reader(stream, stream.schema(), ReaderConfig(batch_size=64, window_rows=700))
    for batch, _ in reader.batches():
        found = find_rows(stream, batch.row.tolist())
        assert found["user"].to_pylist() == (batch.group).tolist()
        micros = found["time"].cast(pa.int64()).to_pylist()
        assert micros == batch.time.tolist()


def test_what_python_has_no_value_for_is_shown_as_a_text(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"\xff\xfeok")]
    )
    days = pa.array([-(2**31), 0], pa.int32()).cast(pa.date32())
    ticks = pa.array([1, 2], pa.timestamp("ns"))
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"time": [1, 2], "name": bad, "day": days, "at": ticks}), path)
    first, second = show_rows(ParquetLog(LogsConfig(path=str(path)), "time"), [0, 1])
    assert (first["time"], first["name"]) == (1, "(no readable string)")
    assert (second["name"], second["day"].isoformat()) == ("ok", "1970-01-01")
    assert isinstance(first["day"], str)
    assert str(first["at"]) == "1970-01-01 00:00:00.000000001"
