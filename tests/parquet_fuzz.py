"""Parquet files whose footer and page headers lie, each read in a child: what that does to a process then shows.

`python -m tests.parquet_fuzz FOLDER FIRST LAST` reads those of LIES, then those that the seeds from FIRST to LAST - 1
give. A child reads one after the other; where it dies, the next one goes on behind that.
"""

import faulthandler
import json
import os
import random
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from steadyrank.data.convert import convert
from steadyrank.data.logs import LogsConfig, ParquetLog, Reader, ReaderConfig
from steadyrank.data.rows import find_rows
from steadyrank.errors import SteadyRankError
from steadyrank.schema import Schema
from steadyrank.start import start_config

from .thrift import (
    BINARY,
    BYTE,
    FALSE,
    I16,
    I32,
    I64,
    LIST,
    SET,
    STRUCT,
    TRUE,
    Tree,
    leaves,
    pack_struct,
    unpack_struct,
)

ROWS, LIMIT_S, LIMIT_MB = 60, 10.0, 300.0
SCHEMA = Schema(
    time="time",
    features={
        "user": {"kind": "id", "rows": 64},
        "item": {"kind": "id", "rows": 64},
        "tags": {"kind": "ids", "rows": 64},
        "seen": {"kind": "ids", "rows": 64},
        "price": {"kind": "number"},
    },
    tasks={"click": {"kind": "binary"}},
    group="user",
)


def make_table(draw: random.Random) -> pa.Table:
    """Return a log with a time of some type, nulls, lists, strings, dictionaries, decimals and a struct."""
    row = np.arange(ROWS)
    seconds = pa.array(1_700_000_000 + row * 7200)
    times = {
        "s": seconds,
        "us": seconds.cast(pa.timestamp("s")).cast(pa.timestamp("us", "UTC")),
        "ns": seconds.cast(pa.timestamp("s")).cast(pa.timestamp("ns")),
        "day": seconds.cast(pa.timestamp("s")).cast(pa.date32()),
        "float": seconds.cast(pa.float64()),
    }
    words = pa.array([None if i % 9 == 4 else f"user {i % 7}" for i in row])
    return pa.table(
        {
            "time": times[draw.choice(sorted(times))],
            "user": words.dictionary_encode() if draw.random() < 0.5 else words,
            "item": pa.array(row % 11, pa.int32()),
            "tags": pa.array([None if i % 5 == 0 else [f"t{j}" for j in range(i % 4)] for i in row]),
            "seen": pa.array([list(range(i % 3)) for i in row], pa.list_(pa.int64())),
            "price": pa.array([None if i % 8 == 3 else i * 0.5 for i in row]),
            "cost": pa.array(row).cast(pa.decimal128(21, 2)),
            "pair": pa.array([{"a": int(i), "b": None if i % 3 else "x"} for i in row]),
            "flag": pa.array(row % 2 == 0),
            "click": pa.array(row % 2),
        }
    )


def make_file(path: Path, draw: random.Random) -> bytes:
    """Write a good file in one of many ways, and return its bytes."""
    pq.write_table(
        make_table(draw),
        path,
        row_group_size=draw.choice((25, 60)),
        compression=draw.choice(("zstd", "snappy", "none", "gzip")),
        use_dictionary=draw.random() < 0.6,
        data_page_version=draw.choice(("1.0", "2.0")),
        write_page_checksum=draw.random() < 0.3,
        write_page_index=draw.random() < 0.3,
        store_schema=draw.random() < 0.7,
    )
    return path.read_bytes()


NUMBERS = (0, 1, -1, 7, 2**15, 2**31 - 1, -(2**31), 2**31, 2**40, 2**60, 2**63 - 1, -(2**63))


def unpack_footer(raw: bytes) -> tuple[bytes, Tree]:
    """Return what comes before the footer, and the footer."""
    end = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    return raw[:end], unpack_struct(raw, end)[0]


def join(body: bytes, footer: bytes) -> bytes:
    return body + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def lie(tree: Tree, draw: random.Random) -> None:
    """Change one value of a tree, or leave one out or in twice."""
    container, key = draw.choice(list(leaves(tree)))
    kind, value = container[key]
    if draw.random() < 0.15:
        if isinstance(container, list) and draw.random() < 0.5:
            container.insert(key, container[key])
        else:
            del container[key]
    elif kind in (I16, I32, I64):
        container[key] = (kind, draw.choice((*NUMBERS, value + 1, value - 1, value * 2, draw.randrange(40))))
    elif kind == BINARY:
        junk = (b"", b"\xff" * 8, bytes(100_000), value[:-1], value + b"\0", draw.randbytes(draw.randrange(20)))
        container[key] = (kind, draw.choice(junk))
    elif kind in (TRUE, FALSE):
        container[key] = (TRUE + FALSE - kind, value)
    elif kind == BYTE:
        container[key] = (kind, draw.randrange(256))
    elif kind == STRUCT and isinstance(container, dict):
        del container[key]
    elif kind in (LIST, SET) and value:
        container[key] = (kind, value * draw.choice((0, 2, 100)))


def pages(raw: bytes, footer: Tree) -> Iterator[tuple[int, int, Tree]]:
    """Yield the start, the end and the tree of every page header, by column chunk."""
    for _, group in footer[4][1]:
        for _, chunk in group[1][1]:
            meta = chunk[3][1]
            at = meta.get(11, meta[9])[1]
            end = at + meta[7][1]
            while at < end:
                header, body = unpack_struct(raw, at)
                yield at, body, header
                at = body + header[3][1]


def lie_in_page(raw: bytes, draw: random.Random) -> bytes:
    start, end, header = draw.choice(list(pages(raw, unpack_footer(raw)[1])))
    lie(header, draw)
    return replace_header(raw, start, end, header)


def replace_header(raw: bytes, start: int, end: int, header: Tree) -> bytes:
    """Put a page header in the place of another, and move what lies behind it."""
    body, footer = unpack_footer(raw)
    packed = pack_struct(header)
    move = start + len(packed) - end
    for _, group in footer[4][1]:
        for _, chunk in group[1][1]:
            meta = chunk[3][1]
            first, size = meta.get(11, meta[9])[1], meta[7][1]
            if first <= start < first + size:
                meta[7] = (I64, size + move)
            for number in {9, 11} & meta.keys():
                if meta[number][1] > start:
                    meta[number] = (I64, meta[number][1] + move)
    return join(body[:start] + packed + body[end:], pack_struct(footer))


def lie_in_footer(raw: bytes, draw: random.Random) -> bytes:
    body, footer = unpack_footer(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        lie(footer, draw)
    return join(body, pack_struct(footer))


def flip(raw: bytes, draw: random.Random, low: int, high: int) -> bytes:
    """Flip bits of some bytes, or put others in their place."""
    spoiled = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        at = draw.randrange(low, high)
        spoiled[at] = spoiled[at] ^ 1 << draw.randrange(8) if draw.random() < 0.7 else draw.randrange(256)
    return bytes(spoiled)


def flip_anywhere(raw: bytes, draw: random.Random) -> bytes:
    return flip(raw, draw, 0, len(raw))


def flip_footer(raw: bytes, draw: random.Random) -> bytes:
    return flip(raw, draw, len(raw) - 8 - int.from_bytes(raw[-8:-4], "little"), len(raw))


def flip_page(raw: bytes, draw: random.Random) -> bytes:
    """Flip a page header, or the first bytes of its values."""
    start, end, _ = draw.choice(list(pages(raw, unpack_footer(raw)[1])))
    return flip(raw, draw, start, min(end + 12, len(raw)))


def cut(raw: bytes, draw: random.Random) -> bytes:
    """Cut the file short, or some of it out, or put some of it in twice."""
    low, high = sorted((draw.randrange(len(raw)), draw.randrange(len(raw))))
    return draw.choice((raw[:low], raw[:low] + raw[high:], raw[:high] + raw[low:]))


SPOILERS = (
    flip_anywhere,
    flip_footer,
    flip_footer,
    flip_page,
    flip_page,
    cut,
    lie_in_footer,
    lie_in_footer,
    lie_in_page,
    lie_in_page,
)


def spoil(folder: Path, case: str) -> bytes:
    """Return a spoiled file, the same for the same case: a seed, or one of LIES."""
    draw = random.Random(case)
    if case in LIES:
        pq.write_table(make_table(draw), folder / "good.parquet", compression="none")
        return LIES[case]((folder / "good.parquet").read_bytes())
    raw = make_file(folder / "good.parquet", draw)
    return draw.choice(SPOILERS)(raw, draw)


def lie_everywhere(value: int | bytes, *path: int) -> Callable[[bytes], bytes]:
    """Return what sets a number in every row group, chunk or schema element; the footer's field numbers lead there."""

    def set_at(tree: Any, fields: tuple[int, ...]) -> None:
        for _, item in tree if isinstance(tree, list) else [(STRUCT, tree)]:
            kind, inner = item.get(fields[0], (I64, None))
            if len(fields) > 1:
                set_at(inner, fields[1:])
            else:
                item[fields[0]] = (kind, value)

    def spoil(raw: bytes) -> bytes:
        body, footer = unpack_footer(raw)
        for one in (path, (3,)) if path == (4, 3) else (path,):  # the rows of the groups and of the file agree
            set_at(footer, one)
        return join(body, pack_struct(footer))

    return spoil


def lie_in_pages(value: int, kind: int, *path: int) -> Callable[[bytes], bytes]:
    """Return what sets a number in the first header of that kind (0 data, 2 dictionary) of each chunk."""

    def spoil(raw: bytes) -> bytes:
        for i in range(len(list(pages(raw, unpack_footer(raw)[1])))):
            start, end, header = list(pages(raw, unpack_footer(raw)[1]))[i]
            tree = header
            if header[1][1] == kind:
                for number in path[:-1]:
                    tree = tree[number][1]
                tree[path[-1]] = (I32, value)
                return replace_header(raw, start, end, header)
        raise AssertionError("no such page")

    return spoil


def footer_of(head: bytes) -> Callable[[bytes], bytes]:
    """Return what puts bytes in the place of a footer's beginning."""
    return lambda raw: join(unpack_footer(raw)[0], head + bytes(64))


MOST = 2**31 - 1
LIES: dict[str, Callable[[bytes], bytes]] = {
    "rows": lie_everywhere(2**60, 4, 3),
    "values in a chunk": lie_everywhere(2**60, 4, 1, 3, 5),
    "bytes of a chunk": lie_everywhere(2**60, 4, 1, 3, 7),
    "2 GB in a chunk": lie_everywhere(MOST, 4, 1, 3, 7),
    "where values begin": lie_everywhere(2**60, 4, 1, 3, 9),
    "width of a statistic": lie_everywhere(b"\1", 4, 1, 3, 12, 6),
    "columns": lie_everywhere(MOST, 2, 5),
    "width of a value": lie_everywhere(MOST, 2, 2),
    "page, plain": lie_in_pages(MOST, 0, 2),
    "page, compressed": lie_in_pages(MOST, 0, 3),
    "values in a page": lie_in_pages(MOST, 0, 5, 1),
    "dictionary, plain": lie_in_pages(MOST, 2, 2),
    "dictionary, compressed": lie_in_pages(MOST, 2, 3),
    "values in a dictionary": lie_in_pages(MOST, 2, 7, 1),
    "length of a string": lambda raw: raw.replace(b"\6\0\0\0user ", b"\xff\xff\xff\x7fuser "),
    "length of the footer": lambda raw: raw[:-8] + b"\xff\xff\xff\xff" + raw[-4:],
    "list in the footer": footer_of(b"\x15\4\x19\xfc\xff\xff\xff\xff\7"),
    "string in the footer": footer_of(b"\x15\4\x19\x1c\x48\xff\xff\xff\xff\7"),
    "structs within structs": footer_of(b"\x1c" * 500_000),
}


def refresh(path: Path) -> None:
    """Let the file come to a log that is open."""
    folder = path.parent / "growing"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / "first.parquet").write_bytes((path.parent / "good.parquet").read_bytes())
    log = ParquetLog(LogsConfig(path=str(folder)), "time")
    (folder / "second.parquet").write_bytes(path.read_bytes())
    for _ in range(3):
        log.refresh()
    for _ in log.pieces():
        pass


def learn(path: Path) -> None:
    reader = Reader(ParquetLog(LogsConfig(path=str(path)), "time"), SCHEMA, ReaderConfig(batch_size=16, window_rows=40))
    for batch, _ in reader.batches():
        batch.ids.sum(), batch.row


def look_up(path: Path) -> None:
    """Read single rows, as from a remote store."""
    log = ParquetLog(LogsConfig(path=str(path)), "time")
    log._remote = True
    find_rows(log, [0, log.rows // 2, log.rows - 1])


WAYS: tuple[Callable[[Path], object], ...] = (
    learn,
    look_up,
    refresh,
    lambda path: start_config(str(path), path.with_suffix(".toml"), overwrite=True),
    lambda path: convert(path, path.with_name("out.parquet"), overwrite=True),
    lambda path: convert(path, path.with_name("out.parquet"), overwrite=True, sort="time"),
)


def read(path: Path) -> tuple[int, list[str]]:
    """Read a file in every way that there is; return how many of them refused it, and the foreign errors."""
    refused, foreign = 0, []
    for way in WAYS:
        try:
            way(path)
        except SteadyRankError:
            refused += 1
        except Exception:
            foreign.append(traceback.format_exc())
    return refused, foreign


class Report(NamedTuple):
    """What became of spoiled files."""

    refused: list[int]
    """How many were refused in no way, in one, in two, ..."""
    wrong: dict[str, str]
    """What went wrong, by case."""


def read_all(folder: Path, cases: Sequence[str]) -> Report:
    """Read the file of each case in a child; one that ends it, or takes too long or too much memory, is wrong."""
    report, done = Report([0] * (len(WAYS) + 1), {}), 0
    while done < len(cases):
        hear, say = os.pipe()
        pid = os.fork()
        if pid == 0:
            be_child(folder, cases[done:], say)
        os.close(say)
        with open(hear, "rb", buffering=0) as answers:
            line, grown_mb = b"-", 0.0
            while line and done < len(cases) and grown_mb < LIMIT_MB:  # a peak would hide those after it
                line = answers.readline() if select.select([answers], [], [], LIMIT_S)[0] else b""
                refused, foreign, grown_mb = json.loads(line or "[0, [], 0]")
                foreign += [f"took {grown_mb:.0f} MB"] * (grown_mb >= LIMIT_MB)
                if line:
                    report.refused[refused] += 1
                if foreign:
                    report.wrong[cases[done]] = "\n".join(foreign)
                done += 1
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not line:
            code = os.waitstatus_to_exitcode(status)
            report.wrong[cases[done - 1]] = f"ended with {code}: {(folder / 'stderr').read_text()}"
    return report


def be_child(folder: Path, cases: Sequence[str], say: int) -> None:
    """Read one file after the other and say how each ended; end this process."""
    try:
        os.dup2(os.open(folder / "stderr", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
        faulthandler.enable(2)
        path, before = folder / "bad.parquet", peak_mb()
        for case in cases:
            path.write_bytes(spoil(folder, case))
            os.write(say, json.dumps([*read(path), peak_mb() - before]).encode() + b"\n")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(read_all(Path(sys.argv[1]), [*LIES, *map(str, range(int(sys.argv[2]), int(sys.argv[3])))])))
