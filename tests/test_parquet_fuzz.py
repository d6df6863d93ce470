"""Spoiled Parquet files, in a child process: a clear error or a good run; no foreign error, no hang, no dead process.

`python tests/test_parquet_fuzz.py JOB FOLDER ...` is the child; it writes what it does line by line, so that the
last line tells where it died.
"""

import datetime
import decimal
import io
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steadyrank.data.convert import convert
from steadyrank.data.guess import guess_schema
from steadyrank.data.logs import LogsConfig, ParquetLog, Reader, ReaderConfig
from steadyrank.data.rows import show_rows
from steadyrank.errors import DataError, SteadyRankError
from steadyrank.schema import Schema
from steadyrank.start import start_config

SCHEMA = Schema(
    features={
        "user": {"kind": "id", "rows": 64},
        "category": {"kind": "id", "rows": 16},
        "seen": {"kind": "ids", "rows": 64},
        "x": {"kind": "number"},
    },
    tasks={"click": {"kind": "binary"}},
)
WAYS = ("footer", "data", "anywhere", "cut")
OPTIONS = (
    {"compression": "zstd"},
    {"compression": "snappy", "version": "1.0"},
    {"compression": "none", "use_dictionary": False},
    {"compression": "gzip", "data_page_version": "2.0", "store_schema": False},
    {"compression": "zstd", "write_page_checksum": True},
    {"compression": "lz4", "write_page_index": True, "write_statistics": False},
    {
        "compression": "zstd",
        "use_dictionary": False,
        "column_encoding": {"row": "DELTA_BINARY_PACKED", "user": "DELTA_BYTE_ARRAY", "x": "BYTE_STREAM_SPLIT"},
    },
)


def make_table(rows: int = 300) -> pa.Table:
    """Return columns of many types, with nulls, empty lists and dictionaries."""
    row = np.arange(rows)
    day = datetime.date(2026, 1, 1)
    return pa.table(
        {
            "time": pa.array(1_767_225_600_000_000 + row * 60_000_000, pa.timestamp("us")),
            "row": row,
            "user": [None if i % 11 == 0 else f"user {i % 7}" for i in row],
            "category": pa.array([f"c{i % 3}" for i in row]).dictionary_encode(),
            "seen": [None if i % 13 == 0 else list(range(i % 4)) for i in row],
            "words": [[f"w{j}" for j in range(i % 3)] for i in row],
            "x": [None if i % 5 == 0 else i * 0.5 for i in row],
            "date": [day + datetime.timedelta(int(i)) for i in row],
            "flag": row % 2 == 0,
            "price": [decimal.Decimal(int(i)) / 100 for i in row],
            "click": pa.array(row % 2, pa.int8()),
        }
    )


def to_bytes(table: pa.Table, **options: object) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, **options)
    return stream.getvalue()


def spoil(raw: bytes, way: str, generator: np.random.Generator) -> bytes:
    """Change one to three bytes, or cut the file."""
    footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    low, high = {"footer": (footer, len(raw)), "data": (4, footer)}.get(way, (0, len(raw)))
    if way == "cut":
        return raw[: generator.integers(low, high)]
    spoiled = bytearray(raw)
    for at in generator.integers(low, high, size=generator.integers(1, 4)):
        spoiled[at] = generator.integers(256) if generator.random() < 0.5 else spoiled[at] ^ 1 << generator.integers(8)
    return bytes(spoiled)


def uses(path: Path) -> Iterator[Callable[[], object]]:
    """Yield all that is done with a Parquet file from elsewhere."""

    def read() -> None:
        reader = Reader(ParquetLog(LogsConfig(path=str(path)), "time"), SCHEMA, ReaderConfig(max_missing_frac=1.0))
        assert sum(len(batch) for batch, _ in reader.batches()) == reader.rows

    def show() -> None:
        log = ParquetLog(LogsConfig(path=str(path)), "time")
        show_rows(log, [0, log.rows // 2, log.rows - 1])

    yield read
    yield show
    yield lambda: guess_schema(ParquetLog(LogsConfig(path=str(path)), ""))
    yield lambda: start_config(str(path), path.with_suffix(".toml"), overwrite=True)
    yield lambda: convert(path, path.with_name("copy.parquet"), overwrite=True)


def fuzz(folder: Path, first: int, last: int) -> None:
    files = [to_bytes(make_table(), row_group_size=100, **options) for options in OPTIONS]
    path = folder / "log.parquet"
    for i in range(first, last):
        way = WAYS[i // len(OPTIONS) % len(WAYS)]
        path.write_bytes(spoil(files[i % len(OPTIONS)], way, np.random.default_rng(i)))
        for number, use in enumerate(uses(path)):
            print(f"case {i}, {way}, use {number}", end=": ", flush=True)
            try:
                use()
                print("good", flush=True)
            except SteadyRankError:
                print("refused", flush=True)


def run_child(folder: Path, job: str, *cases: int, limit_s: float = 60) -> list[str]:
    """Return the lines that the child wrote; it must come to its end."""
    command = [sys.executable, "-W", "error", __file__, job, str(folder), *map(str, cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]} ended with {done.returncode}: {done.stderr[-2000:]}"
    return lines


def count(lines: list[str], outcome: str, way: str = "") -> int:
    return sum(line.endswith(outcome) and way in line for line in lines)


def test_a_spoiled_file_is_refused_or_read_and_ends_no_process(tmp_path: Path) -> None:
    lines = run_child(tmp_path, "fuzz", 0, 112)
    assert len(lines) == 5 * 112
    assert count(lines, "good") + count(lines, "refused") == len(lines)
    assert count(lines, "good", "data") > 20  # bytes that no use looks at, or values that are as good as others
    assert count(lines, "good", "cut") == 0
    assert count(lines, "refused", "footer") > 50


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 21_000, 2000))
def test_many_spoiled_files(tmp_path: Path, first: int) -> None:
    assert len(run_child(tmp_path, "fuzz", first, first + 2000, limit_s=600)) == 5 * 2000


def flip_bits(folder: Path) -> None:
    """Flip every bit of a small footer, and of a column of dictionary indices."""
    path = folder / "log.parquet"
    time = pa.table({"time": [1, None, 3]})
    words = pa.table({"time": [1, 2, 3], "c": pa.array(["a", "b", "c"]).dictionary_encode()})
    for table, options in ((time, {}), (words, {"compression": "none"})):
        raw = to_bytes(table, store_schema=table is words, **options)
        footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
        path.write_bytes(raw)
        for at in range(footer, len(raw)) if table is time else range(4, footer):
            for bit in range(8):
                with path.open("r+b") as stream:  # truncating the file would take longer than all else
                    stream.write(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
                print(f"byte {at}, bit {bit}", end=": ", flush=True)
                try:
                    log = ParquetLog(LogsConfig(path=str(path)), "time")
                    if table is words:
                        to_bytes(pa.concat_tables(piece.table for piece in log.pieces()))
                    print("good", flush=True)
                except SteadyRankError:
                    print("refused", flush=True)


def test_every_bit_of_a_footer_and_of_indices(tmp_path: Path) -> None:
    """Among them those that ended the process: a column chunk without its histogram, one of another type than its
    column, an index past its dictionary."""
    lines = run_child(tmp_path, "bits")
    assert len(lines) > 2500
    assert count(lines, "refused") > 1000


def zigzag(number: int) -> bytes:
    """Return an integer as a footer or a page header holds it."""
    number = number << 1 ^ number >> 63
    found = b""
    while number > 127:
        found += bytes([number & 127 | 128])
        number >>= 7
    return found + bytes([number])


def lie_in_footer(raw: bytes, told: int, lie: int) -> bytes:
    length = int.from_bytes(raw[-8:-4], "little")
    footer = raw[-8 - length : -8].replace(zigzag(told), zigzag(lie))
    assert len(footer) > length
    return raw[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def numbers_in_page(raw: bytes, page: int) -> list[tuple[int, int]]:
    """Return place and value of the first numbers in a page header: its type, its bytes unpacked, its bytes."""
    found, at = [], page
    for _ in range(3):
        assert raw[at] == 0x15  # the next field, a 32-bit integer
        at, start, value = at + 1, at + 1, 0
        while raw[at] & 128:
            value, at = value | (raw[at] & 127) << 7 * (at - start), at + 1
        value, at = value | raw[at] << 7 * (at - start), at + 1
        found.append((start, value >> 1))
    return found


def lie_in_page(raw: bytes, at: int, told: int, lie: int) -> bytes:
    """Change a number in the header of a page of the last column, and let the footer know that it got longer."""
    chunk = pq.read_metadata(io.BytesIO(raw)).row_group(0).column(1)
    longer = len(zigzag(lie)) - len(zigzag(told))
    assert raw[at:].startswith(zigzag(told))
    raw = raw[:at] + zigzag(lie) + raw[at + len(zigzag(told)) :]
    length = int.from_bytes(raw[-8:-4], "little")
    footer = raw[-8 - length : -8]
    size, page = chunk.total_compressed_size, chunk.data_page_offset
    footer = footer.replace(zigzag(size), zigzag(size + longer))
    if at < page:
        footer = footer.replace(zigzag(page), zigzag(page + longer))
    return raw[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def lying_files() -> Iterator[tuple[str, bytes]]:
    """Yield files that promise more than there is: rows, bytes of a chunk, of a page, values of a page, a text."""
    rows, distinct, much, page_limit = 12_345, 4321, 1 << 60, (1 << 31) - 1
    row = np.arange(rows)
    values = [f"user {i % distinct}" for i in row]
    for codec in ("none", "zstd"):
        table = pa.table({"time": row, "c": values})
        raw = to_bytes(table, compression=codec)
        chunk = pq.read_metadata(io.BytesIO(raw)).row_group(0).column(1)
        yield f"{codec}: rows", lie_in_footer(raw, rows, much)
        yield f"{codec}: bytes of a chunk", lie_in_footer(raw, chunk.total_compressed_size, much)
        first = chunk.dictionary_page_offset
        for name, page in (("dictionary", first), ("data page", chunk.data_page_offset)):
            _, unpacked, packed = numbers_in_page(raw, page)
            yield f"{codec}: bytes of the {name}, unpacked", lie_in_page(raw, *unpacked, page_limit)
            yield f"{codec}: bytes of the {name}", lie_in_page(raw, *packed, page_limit)
        yield (
            f"{codec}: values of the dictionary",
            lie_in_page(raw, raw.index(zigzag(distinct), first), distinct, page_limit),
        )
    plain = to_bytes(table, compression="none", use_dictionary=False)
    yield "the length of a text", plain.replace(b"\x08\0\0\0user 100", b"\xff\xff\xff\x7fuser 100", 1)


def read_lies(folder: Path) -> None:
    """Read lying files with 1 GiB of memory more than there is now."""
    (folder / "warm.parquet").write_bytes(to_bytes(pa.table({"time": [1, 2], "c": ["a", "b"]})))
    list(ParquetLog(LogsConfig(path=str(folder)), "time").pieces())  # opens Arrow's threads
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
    path = folder / "log.parquet"
    for what, raw in lying_files():
        path.write_bytes(raw)
        print(what, end=": ", flush=True)
        try:
            log = ParquetLog(LogsConfig(path=str(path)), "time")
            print("good", sum(len(piece.table) for piece in log.pieces()), flush=True)
        except SteadyRankError as error:
            print("refused", error, flush=True)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="a limit on memory as Linux has it")
def test_a_lying_header_takes_no_memory(tmp_path: Path) -> None:
    lines = run_child(tmp_path, "lies")
    assert len(lines) == 15
    good = [line for line in lines if ": refused " not in line]
    # Where nothing is packed, Arrow does not look at the size unpacked.
    assert [line.partition(":")[0] for line in good] == ["none", "none"]
    assert all(line.endswith("unpacked: good 12345") for line in good)


def test_row_groups_that_do_not_add_up_are_refused_when_the_log_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    raw = to_bytes(pa.table({"time": np.arange(300)}), row_group_size=100)
    path.write_bytes(lie_in_footer(raw, 300, 1 << 20))
    with pytest.raises(DataError, match="1,048,576 rows in all, but 300 in its row groups"):
        ParquetLog(LogsConfig(path=str(path)), "time")


if __name__ == "__main__":
    job = {"fuzz": fuzz, "bits": flip_bits, "lies": read_lies}[sys.argv[1]]
    job(Path(sys.argv[2]), *map(int, sys.argv[3:]))
