"""What test_deal.py runs in each of three processes: python -m tests.deal_processes RANK SIZE PORT FOLDER.

Every check reads a log with all ranks and with one process, and the first rank writes what differs as JSON.
"""

import concurrent.futures.thread
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from steadyrank.data import deal
from steadyrank.data.logs import Cursor, LogsConfig, ParquetLog, Piece, Reader, ReaderConfig
from steadyrank.data.stream import Stream, StreamConfig
from steadyrank.ranks import ALONE, Ranks
from steadyrank.schema import Batch, Schema

SIZE = 3
SCHEMA = Schema(
    features={
        "user": {"kind": "id", "rows": 64},
        "seen": {"kind": "ids", "rows": 64},
        "words": {"kind": "ids", "rows": 32, "max_length": 2},
        "x": {"kind": "number"},
        "place": {"kind": "position"},
    },
    tasks={
        "click": {"kind": "binary", "weight": "weight"},
        "watch": {"kind": "regression", "transform": "log1p", "only_where": "click"},
    },
    group="user",
)
Given = tuple[Batch, Cursor, int, bool, dict[str, Any]]


def make_table(rows: int, first: int, seed: int) -> pa.Table:
    """Rows a minute apart, out of order inside tens, with something missing in every column that may lack it."""
    rng = np.random.default_rng(seed)
    minute = np.concatenate([first + low + rng.permutation(min(10, rows - low)) for low in range(0, rows, 10)])
    gone = rng.random((6, rows)) < 0.2

    def column(values: list[Any], number: int, kind: pa.DataType) -> pa.Array:
        return pa.array([None if lost else value for value, lost in zip(values, gone[number], strict=True)], kind)

    return pa.table(
        {
            "time": pa.array(minute * 60),
            "user": column([f"user {i % 7}" for i in minute], 0, pa.string()),
            "seen": column(
                [[None if j == 3 else int(j) for j in range(i % 5)] for i in minute], 1, pa.list_(pa.int64())
            ),
            "words": column(["a fine  day" if i % 2 else "" for i in minute], 2, pa.string()),
            "x": column([float("nan") if i % 9 == 0 else i * 0.5 for i in minute], 3, pa.float64()),
            "place": pa.array(minute % 20),
            "click": column([int(i % 2) for i in minute], 4, pa.int64()),
            "weight": pa.array(rng.random(rows)),
            "watch": column([float(i % 50) for i in minute], 5, pa.float64()),
        }
    )


def write_groups(table: pa.Table, path: Path, groups: Sequence[int]) -> None:
    """Write a table with row groups of these sizes."""
    with pq.ParquetWriter(path, table.schema) as writer:
        for low, high in itertools.pairwise(itertools.accumulate(groups, initial=0)):
            writer.write_table(table.slice(low, high - low))


def write_log(folder: Path) -> Path:
    """Write four files of which none has the same row groups as another, and one an empty row group."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, groups in enumerate(((13, 13, 13, 11), (37, 0, 3), (20, 20, 20, 20), (10,))):
        write_groups(make_table(sum(groups), first, number), folder / f"{number}.parquet", groups)
        first += sum(groups)
    return folder


def write_late_hours(folder: Path) -> Path:
    """A piece that begins in an earlier hour than the one before ended in, and yet no row is late."""
    minutes = [0, 30, 59, 61, 59.5, 59.7, 59.8, 62, 90, 119, 125, 119.5, 121, 119.6, 126, 180]
    table = make_table(16, 0, 5).set_column(0, "time", pa.array([60 * minute for minute in minutes]))
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "log.parquet", row_group_size=5)
    return folder


class Counting:
    """A log that counts the rows that were read, and may fail, or take its time."""

    def __init__(self, source: Any, fails_at: int | None = None) -> None:
        self.source, self.read, self.fails_at = source, 0, fails_at

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def pieces(self, start: int, columns: list[str] | None) -> Iterator[Piece]:
        for piece in self.source.pieces(start, columns):
            if self.fails_at is not None and self.read >= self.fails_at:
                raise ValueError("the disk is tired")
            self.read += len(piece.table)
            time.sleep(random.random() * 0.002)
            yield piece


def logs(path: Path, limit: int | None = None, schema: Schema = SCHEMA) -> ParquetLog:
    return ParquetLog(LogsConfig(path=str(path), max_rows=limit), schema.time)


def collect(reader: Reader, cursor: Cursor | None = None, stop: int | None = None) -> tuple[list[Given], str | None]:
    """Return what a reader gives, with all that it says of it, and the error that ended it."""
    given: list[Given] = []
    batches = reader.batches(cursor)
    try:
        for batch, after in itertools.islice(batches, stop):
            time.sleep(random.random() * 0.002)  # ranks learn at their own pace
            given.append((batch, after, reader.left, reader.file_ends, reader.state_dict()))
    except Exception as error:
        return given, f"{type(error).__name__}: {error}"
    finally:
        batches.close()  # type: ignore[attr-defined]
    return given, None


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Compare bits, so that NaN equals NaN."""
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def differ(whole: Batch, slices: list[Batch]) -> list[str]:
    """Say where slices do not make the whole, or where their share does not describe it."""
    joined = Batch.cat(slices)
    names = [f.name for f in fields(Batch) if f.name not in ("lists", "share")]
    found = [name for name in names if not same(getattr(whole, name), getattr(joined, name))]
    for i, (one, other) in enumerate(zip(whole.lists, joined.lists, strict=True)):
        found += [f"list {i}"] * (not (same(one.values, other.values) and same(one.offsets, other.offsets)))
    n = len(whole)
    sizes = [n * (r + 1) // SIZE - n * r // SIZE for r in range(SIZE)]
    found += ["sizes"] * ([len(part) for part in slices] != sizes)
    weights = whole.weights.double().sum(0).float()
    for part in slices:
        assert part.share is not None
        about = (part.share.rows, part.share.first_time, part.share.last_time)
        found += ["share"] * (about != (n, int(whole.time.min()), int(whole.time.max())))
        found += ["weights"] * (not torch.allclose(part.share.weights, weights, rtol=2e-7, atol=0))
        found += ["weights differ"] * (not same(part.share.weights, slices[0].share.weights))  # type: ignore[union-attr]
    return found


def compare(
    ranks: Ranks, make: Callable[[Ranks], Reader], cursor: Cursor | None = None, stop: int | None = None
) -> Any:
    """Read with all, and with one; return what differs, the error that both ended with, and how many batches came."""
    given, error = collect(make(ranks), cursor, stop)
    everyone = gather(ranks, (given, error))
    if not ranks.is_first:
        return None
    expected, expected_error = collect(make(ALONE), cursor, stop)
    wrong = [f"rank {r}: {e} and not {expected_error}" for r, (_, e) in enumerate(everyone) if e != expected_error]
    wrong += [f"{len(g)} batches and not {len(expected)}" for g, _ in everyone if len(g) != len(expected)]
    for i, (one, *slices) in enumerate(zip(expected, *(g for g, _ in everyone), strict=False)):
        wrong += [f"batch {i}: {what}" for what in differ(one[0], [part[0] for part in slices])]
        wrong += [f"batch {i}, rank {r}: {part[1:]}" for r, part in enumerate(slices) if part[1:] != one[1:]]
    return {"wrong": wrong[:5], "error": expected_error, "batches": len(expected)}


def gather(ranks: Ranks, value: Any) -> list[Any]:
    """Gather over the group of the steps: that of the reader belongs to its thread."""
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, value)
    return found


CONFIGS: dict[str, dict[str, Any]] = {
    "rows": {"window_rows": 60, "batch_size": 16, "read_ahead": 20},
    "rows_in_order": {"window_rows": 40, "batch_size": 13, "shuffle": False},
    "between": {"window_rows": 60, "batch_size": 7, "read_ahead": 0},
    "hours": {"window_hours": 0.5, "batch_size": 29},
    "file": {"window_rows": 30, "window_per_file": True, "batch_size": 9},
    "file_hours": {"window_hours": 1.0, "window_per_file": True, "batch_size": 16, "shuffle": False, "read_ahead": 0},
    "whole": {"batch_size": 64},
    "small": {"window_rows": 10, "batch_size": 3, "read_ahead": 1},
}


def check_batches(ranks: Ranks, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, config in CONFIGS.items():

        def make(who: Ranks, config: dict[str, Any] = config) -> Reader:
            return Reader(logs(path / "log"), SCHEMA, ReaderConfig(**config), 3, ranks=who)

        found[name] = compare(ranks, make)
    late = {"window_hours": 1.0, "batch_size": 4}
    told = count_calls(deal.Dealer, "_tell")
    found["late_hours"] = compare(
        ranks, lambda who: Reader(logs(path / "late"), SCHEMA, ReaderConfig(**late), 3, ranks=who)
    )
    found["late_hours"] = found["late_hours"] and {**found["late_hours"], "told": len(told)}
    found["cut"] = compare(  # the log grew since the window was cut
        ranks,
        lambda who: Reader(logs(path / "log"), SCHEMA, ReaderConfig(window_rows=60, batch_size=16), 3, ranks=who),
        Cursor(rows=60, window=1, batches=1, window_rows=30),
    )
    stream = Stream(StreamConfig(rows=1500, users=100, items=100, block_rows=256, features=16))
    found["stream"] = compare(
        ranks,
        lambda who: Reader(stream, stream.schema(), ReaderConfig(window_rows=400, batch_size=64), 1, ranks=who),
    )
    return found


def count_calls(owner: type, name: str) -> list[Any]:
    """Count the calls of a method from now on, in a list."""
    calls: list[Any] = []
    method = getattr(owner, name)

    def counted(*given: Any) -> Any:
        calls.append(None)
        return method(*given)

    setattr(owner, name, counted)
    return calls


def check_rows(ranks: Ranks, path: Path) -> dict[str, Any]:
    """Count who decodes what."""
    source = Counting(logs(path / "log"))
    reader = Reader(source, SCHEMA, ReaderConfig(**CONFIGS["rows"]), ranks=ranks)
    batches = sum(1 for _ in reader.batches())
    one = Reader(logs(path / "log", limit=13), SCHEMA, ReaderConfig(batch_size=6), ranks=ranks)
    idle = compare(ranks, lambda who: Reader(logs(path / "log", 13), SCHEMA, ReaderConfig(batch_size=6), ranks=who))
    return {"read": gather(ranks, source.read), "batches": batches, "idle": [reader.idle_ranks, one.idle_ranks, idle]}


def check_resume(ranks: Ranks, path: Path) -> list[Any]:
    """Go on from every cursor for a few batches, with one reader, that is left in the middle each time."""
    found = []
    for name in ("rows", "between", "hours", "small"):
        config = ReaderConfig(**CONFIGS[name])
        cursors = [Cursor(), *(after for _, after in Reader(logs(path / "log"), SCHEMA, config, 3).batches())]
        reader = Reader(logs(path / "log"), SCHEMA, config, 3, ranks=ranks)
        order = random.Random(1).sample(range(len(cursors)), len(cursors))[:10]
        kept: list[Any] = []
        for i in order:
            batches = reader.batches(cursors[i])
            taken = list(itertools.islice(batches, i % 4))
            if i % 3 == 0:
                kept.append(batches)  # left behind, and never closed before the next begins
            del batches
            everyone = gather(ranks, taken)
            whole = list(itertools.islice(Reader(logs(path / "log"), SCHEMA, config, 3).batches(cursors[i]), i % 4))
            for (batch, after), *slices in zip(whole, *everyone, strict=True):
                found += [f"{name} {i}: {what}" for what in differ(batch, [part for part, _ in slices])]
                found += [f"{name} {i}: cursor"] * any(other != after for _, other in slices)
        reader.close()
    return found


def spoil(path: Path, folder: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """Copy the log with its third file changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted((path / "log").iterdir()):
        groups = pq.ParquetFile(file)
        sizes = [groups.metadata.row_group(j).num_rows for j in range(groups.num_row_groups)]
        table = groups.read()
        write_groups(change(table) if file.name == "2.parquet" else table, folder / file.name, sizes)
    return folder


def set_value(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    at = table.schema.get_field_index(column)
    return table.set_column(at, column, pa.array(values, table.schema.field(column).type))


SPOILT: dict[str, tuple[Callable[[pa.Table], pa.Table], dict[str, Any]]] = {
    "value": (lambda t: set_value(t, "click", 5, 7), CONFIGS["rows"]),
    "value_later": (lambda t: set_value(t, "click", 45, 7), CONFIGS["rows_in_order"]),
    "value_hours": (lambda t: set_value(t, "weight", 25, -1.0), CONFIGS["hours"]),
    "time_null": (lambda t: set_value(t, "time", 25, None), CONFIGS["hours"]),
    "time_null_rows": (lambda t: set_value(t, "time", 25, None), CONFIGS["between"]),
    "back": (lambda t: set_value(t, "time", 65, 60), CONFIGS["small"]),
    "refuse": (lambda t: t, {**CONFIGS["rows"], "unsorted": "refuse"}),
    "missing": (lambda t: t, {**CONFIGS["rows"], "max_missing_frac": 0.05}),
}


def check_errors(ranks: Ranks, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (change, config) in SPOILT.items():
        if ranks.is_first:
            spoil(path, path / name, change)
        dist.barrier()
        found[name] = compare(
            ranks,
            lambda who, n=name, c=config: Reader(  # type: ignore[misc]
                logs(path / n), SCHEMA, ReaderConfig(**c), 3, ranks=who
            ),
        )
    source = logs(path / "refuse")
    with (path / "refuse" / "2.parquet").open("r+b") as file:
        if ranks.is_first:
            file.seek(300)
            file.write(b"\xff" * 400)
            file.flush()
        dist.barrier()
    found["bytes"] = compare(ranks, lambda who: Reader(source, SCHEMA, ReaderConfig(**CONFIGS["rows"]), 3, ranks=who))
    tired = Counting(logs(path / "log"), fails_at=20 if ranks.rank == 1 else None)
    given, error = collect(Reader(tired, SCHEMA, ReaderConfig(**CONFIGS["rows"]), 3, ranks=ranks))
    found["tired"] = gather(ranks, [len(given), error])
    return found


def check_refusals(ranks: Ranks, path: Path) -> dict[str, Any]:
    def refusal(limit: int | None, batch_size: int) -> list[str]:
        try:
            Reader(logs(path / "log", limit), SCHEMA, ReaderConfig(batch_size=batch_size), ranks=ranks)
        except Exception as error:
            return gather(ranks, f"{type(error).__name__}: {error}")
        return gather(ranks, "none")

    other = path / "other" if ranks.rank == 2 else path / "log"
    if ranks.is_first:
        spoil(path, path / "other", lambda table: table)
        write_groups(pq.read_table(path / "log" / "2.parquet"), path / "other" / "2.parquet", (16, 24, 20, 20))
    dist.barrier()
    found = {
        "batch": refusal(None, 2),
        "rows": refusal(2, 16),
        "log": refusal(100 if ranks.rank == 2 else None, 16),
    }
    try:
        Reader(logs(other), SCHEMA, ReaderConfig(batch_size=8), ranks=ranks)
    except Exception as error:
        found["units"] = gather(ranks, f"{type(error).__name__}: {error}")
    return found


def check_exit(ranks: Ranks, path: Path) -> float:
    """Leave a reader in the middle, as a process that ends does, and join threads as the interpreter then does."""
    reader = Reader(logs(path / "log"), SCHEMA, ReaderConfig(**CONFIGS["small"]), ranks=ranks)
    batches = reader.batches()
    next(batches)
    began = time.monotonic()
    concurrent.futures.thread._python_exit()  # type: ignore[attr-defined]
    assert batches is not None
    return time.monotonic() - began


def main(rank: int, port: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(SIZE))
    torch.set_num_threads(1)
    random.seed(rank)
    dist.init_process_group("gloo", rank=rank, world_size=SIZE)
    world, path = dist.group.WORLD, Path(folder)
    ranks = Ranks(rank, SIZE, world, world).another()
    if rank == 0:
        write_log(path / "log")
        write_late_hours(path / "late")
    dist.barrier()
    found = {
        "batches": check_batches(ranks, path),
        "rows": check_rows(ranks, path),
        "resume": check_resume(ranks, path),
        "errors": check_errors(ranks, path),
        "refusals": check_refusals(ranks, path),
        "exit_s": check_exit(ranks, path),  # the last one: no thread can be started after it
    }
    if rank == 0:
        (path / "found.json").write_text(json.dumps(found, default=asdict))
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that winds down by itself


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[3], sys.argv[4])
