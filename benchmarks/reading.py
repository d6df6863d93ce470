"""Does reading ever keep the training waiting, and how soon and how fast do the commands work?

    python benchmarks/reading.py [--write] [PART ...]

The parts: `columns` (Parquet to batches by kind of column, and the generated stream, on one core), `waiting` (how long
a step waits for its batch, with and without reading ahead), `start` (from the command to the first step), `scoring`
(`predict` and `evaluate` beside training and the model alone). All of them when none is named.
`--write` puts the tables into a results file beside this script.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from steadyrank import __version__
from steadyrank.config import RunConfig
from steadyrank.data.logs import LogsConfig, ParquetLog, Reader, ReaderConfig
from steadyrank.data.stream import Stream, StreamConfig
from steadyrank.evaluate import evaluate
from steadyrank.predict import predict
from steadyrank.schema import Batch, Schema
from steadyrank.train import fit

ROWS, RUNS = 131_072, 3
INCIDENTS = tuple(
    {"kind": kind, "at": at} for kind, at in (("bots", 0.3), ("viral", 0.5), ("shift", 0.6), ("garbage", 0.7))
)


def table(head: str, rows: list[tuple[str, ...]]) -> str:
    """Return Markdown; `head` names the columns."""
    names = head.split(" | ")
    return "\n".join(["| " + " | ".join(row) + " |" for row in (names, ["---"] * len(names), *rows)])


def median_rate(work: Callable[[], int]) -> float:
    """Return the median rows a second of several runs, after one to warm up."""
    work()
    rates = []
    for _ in range(RUNS):
        start = time.perf_counter()
        rows = work()
        rates.append(rows / (time.perf_counter() - start))
    return statistics.median(rates)


def columns_of(kind: str, rng: np.random.Generator) -> tuple[pa.Array, dict[str, Any]]:
    """Return a column of that kind, and what the schema says of it."""
    ids = rng.zipf(1.3, ROWS) % 100_000
    numbers, holes = rng.normal(size=ROWS).astype(np.float32), rng.random(ROWS) < 0.1
    lengths = rng.integers(0, 20, ROWS)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    elements = rng.zipf(1.3, int(lengths.sum())) % 100_000
    match kind:
        case "hashed ids":
            return pa.array(ids), {"kind": "id", "rows": 100_000}
        case "ids as they are":
            return pa.array(ids), {"kind": "id", "rows": 100_000, "hashed": False}
        case "ids with nulls":
            return pa.array(ids, mask=holes), {"kind": "id", "rows": 100_000}
        case "strings":
            return pa.array(ids.astype(str)), {"kind": "id", "rows": 100_000}
        case "numbers":
            return pa.array(numbers), {"kind": "number"}
        case "numbers with nulls":
            return pa.array(numbers, mask=holes), {"kind": "number"}
        case "histories of 10":
            return pa.ListArray.from_arrays(offsets, pa.array(elements)), {"kind": "ids", "rows": 100_000}
        case "histories of 10 strings":
            return pa.ListArray.from_arrays(offsets, pa.array(elements.astype(str))), {"kind": "ids", "rows": 100_000}
    raise ValueError(kind)


def read(folder: Path, time_kind: str = "number", **kinds: int) -> Callable[[], int]:
    """Read so many columns of each kind, a time and a label."""
    rng = np.random.default_rng(0)
    clock = pa.array(np.arange(ROWS))
    columns: dict[str, Any] = {"time": clock if time_kind == "number" else clock.cast(pa.timestamp("us", "UTC"))}
    columns["click"] = rng.integers(0, 2, ROWS).astype(np.int8)
    features: dict[str, Any] = {}
    for kind, count in kinds.items():
        for i in range(count):
            columns[f"{kind} {i}"], features[f"{kind} {i}"] = columns_of(kind, rng)
    path = folder / "log.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=65_536)
    schema = Schema.model_validate({"features": features, "tasks": {"click": {"kind": "binary"}}})

    def work() -> int:
        reader = Reader(ParquetLog(LogsConfig(path=str(path)), "time"), schema, ReaderConfig(read_ahead=0))
        return sum(len(batch) for batch, _ in reader.batches())

    return work


def generate(**config: Any) -> Callable[[], int]:
    stream = Stream(StreamConfig.model_validate({"rows": ROWS, **config}))
    return lambda: sum(len(block) for block in stream.tables())


def columns() -> str:
    """Parquet to batches, by kind of column, on one core: in a process of its own, which may use no other."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, kinds in {
            "10 hashed ids, 10 numbers": {"hashed ids": 10, "numbers": 10},
            "the same, the time a timestamp": {"time_kind": "timestamp", "hashed ids": 10, "numbers": 10},
            "26 hashed ids, 13 numbers": {"hashed ids": 26, "numbers": 13},
            "26 ids as they are, 13 numbers": {"ids as they are": 26, "numbers": 13},
            "26 ids and 13 numbers, a tenth null": {"ids with nulls": 26, "numbers with nulls": 13},
            "10 strings": {"strings": 10},
            "1 history of 10 ids": {"histories of 10": 1},
            "1 history of 10 strings": {"histories of 10 strings": 1},
        }.items():
            rows.append((title, f"{median_rate(read(folder, **kinds)):,.0f}"))  # type: ignore[arg-type]
            print(*rows[-1], flush=True)
    for title, config in {
        "generated stream, 10 features": {},
        "generated stream, 50 features": {"features": 50},
        "generated stream, 50 features, four incidents": {"features": 50, "incidents": INCIDENTS},
    }.items():
        rows.append((title, f"{median_rate(generate(**config)):,.0f}"))
        print(*rows[-1], flush=True)
    return table("read or generated | rows a second on one core", rows)


def job(folder: Path, *sets: str) -> RunConfig:
    """The common job, fewer rows of it: 26 ids with a million table rows, 13 numbers, MMoE 4 x 256-128, two towers."""
    rng = np.random.default_rng(0)
    path = folder / "job.parquet"
    sizes = [200_000] * 4 + [20_000] * 8 + [2_000] * 14
    if not path.exists():
        columns: dict[str, Any] = {"time": np.arange(ROWS), "user": rng.integers(0, 20_000, ROWS)}
        columns |= {f"id_{i}": rng.zipf(1.2, ROWS) % size for i, size in enumerate(sizes)}
        columns |= {f"number_{i}": rng.lognormal(size=ROWS).astype(np.float32) for i in range(13)}
        columns |= {task: rng.integers(0, 2, ROWS).astype(np.int8) for task in ("click", "like")}
        pq.write_table(pa.table(columns), path, row_group_size=65_536)
    lines = [
        f'[data]\npath = "{path}"',
        '[model]\ntower = [64]\ntrunk = {kind = "mmoe", experts = 4, widths = [256, 128]}',
    ]
    lines += ['[schema]\ngroup = "user"\nbaseline = ["id_0"]']
    lines += [f'[schema.features.id_{i}]\nkind = "id"\nrows = {size}' for i, size in enumerate(sizes)]
    lines += [f'[schema.features.number_{i}]\nkind = "number"\ntransform = "log1p"' for i in range(13)]
    lines += [f'[schema.tasks.{task}]\nkind = "binary"' for task in ("click", "like")]
    (folder / "job.toml").write_text("\n".join(lines) + "\n")
    return RunConfig.from_toml("\n".join(lines), sets)


def steps(config: RunConfig, steps: int) -> tuple[float, float, float]:
    """Train; return rows a second, the share of the time that was waited for a batch, and the longest wait in ms."""
    parts, waits = config.build(), list[float]()

    def waited_for() -> Iterator[Batch]:
        batches = parts.reader.batches()
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            waits.append(time.perf_counter() - start)
            if batch is None:
                return
            yield batch[0]

    start, rows = 0.0, 0
    for step, (batch, _) in enumerate(fit(parts.model, parts.optimizers, waited_for(), config.schema_.tasks)):
        if not step:  # which warms up, and for whose window every run waits
            start = time.perf_counter()
            waits.clear()
            continue
        rows += len(batch)
        if step == steps:
            break
    elapsed = time.perf_counter() - start
    return rows / elapsed, sum(waits) / elapsed, max(waits) * 1e3


def waiting(folder: Path) -> str:
    """How long a step waits for its batch."""
    found: dict[int, list[tuple[float, float, float]]] = {0: [], 65_536: []}
    for _ in range(RUNS):  # in turn, so that other work on the machine meets both
        for ahead, results in found.items():
            config = job(folder, "reader.window_rows=16384", f"reader.read_ahead={ahead}")
            results.append(steps(config, 64))
            print(ahead, results[-1], flush=True)
    rows = []
    for ahead, results in found.items():
        rate, share, longest = (statistics.median(column) for column in zip(*results, strict=True))
        rows.append((f"{ahead:,}", f"{rate:,.0f}", f"{share:.2%}", f"{longest:.1f} ms"))
    return table("rows read ahead | rows a second | time waited for batches | longest wait", rows)


_TO_FIRST_STEP = """
import os, sys, time
begun = float(os.environ["BEGUN"])
marks = []
def mark(name): marks.append((name, time.time() - begun))
mark("Python")
import torch; mark("import torch")
import steadyrank.cli, steadyrank.config, steadyrank.console, steadyrank.sequential
from steadyrank import session
mark("the other imports")
init, note = session.Session.__init__, session.Session._note
def timed_init(self, *arguments): mark("log, model and optimizers"); init(self, *arguments)
def timed_note(self, *arguments):
    mark("first window, first step")
    print("MARKS", marks, flush=True)
    os._exit(0)
session.Session.__init__, session.Session._note = timed_init, timed_note
sys.argv = ["steadyrank", "train", sys.argv[1], "--out", sys.argv[2], "--overwrite"]
steadyrank.cli.main()
"""


def start(folder: Path) -> str:
    """From the command to the first step, by part; and a help page."""
    job(folder)
    runs: dict[str, list[float]] = {}
    for _ in range(RUNS + 1):  # the first one warms the disk's cache
        command = [sys.executable, "-c", _TO_FIRST_STEP, str(folder / "job.toml"), str(folder / "run")]
        environment = {**os.environ, "BEGUN": repr(time.time())}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        marks = eval(done.stdout.rpartition("MARKS ")[2])
        before = 0.0
        for name, at in marks:
            runs.setdefault(name, []).append(at - before)
            before = at
        runs.setdefault("in all", []).append(before)
    for arguments in (["--version"], ["train", "--help"]):
        for _ in range(RUNS + 1):
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-m", "steadyrank", *arguments], capture_output=True, check=True)
            runs.setdefault(f"`steadyrank {' '.join(arguments)}`", []).append(time.perf_counter() - begun)
    rows = [(name, f"{statistics.median(values[1:]):.2f}") for name, values in runs.items()]
    return table("from the command to the first step | seconds", rows)


def scoring(folder: Path) -> str:
    """`predict` and `evaluate` beside training and the model alone, all in the run's precision, in turn."""
    config = job(folder)
    parts, model = config.build(), config.build_model().eval()
    batches = [batch for batch, _ in parts.reader.batches()][:48]

    def train() -> int:
        return sum(len(batch) for batch, _ in fit(parts.model, parts.optimizers, batches, config.schema_.tasks))

    def score() -> int:
        with torch.inference_mode():
            return sum(len(model(batch)) for batch in batches)

    jobs: dict[str, Callable[[], int]] = {
        "training step": train,
        "the model's outputs alone": score,
        "predict": lambda: predict(model, config.schema_, config.source(), folder / "out.parquet", overwrite=True),
        "evaluate": lambda: evaluate(model, config.build_reader().in_order(), config.schema_).rows,
    }
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(RUNS + 1):
        for name, work in jobs.items():
            begun = time.perf_counter()
            rows = work()
            rates[name].append(rows / (time.perf_counter() - begun))
    middle = {name: statistics.median(values[1:]) for name, values in rates.items()}
    found = [(name, f"{rate:,.0f}", f"{rate / middle['training step']:.1f}") for name, rate in middle.items()]
    return table("scoring | rows a second | over training", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="columns, waiting, start, scoring")
    parser.add_argument("--write", action="store_true", help="write the results file")
    arguments = parser.parse_args()
    if arguments.parts == ["columns"] and not arguments.write:
        print(columns())
        return
    parts: dict[str, Callable[[Path], str]] = {"waiting": waiting, "start": start, "scoring": scoring}
    tables = []
    for part in arguments.parts or ["columns", *parts]:
        if part == "columns":  # which ties its process to one core
            done = subprocess.run([sys.executable, __file__, part], capture_output=True, text=True, check=True)
            found = done.stdout[done.stdout.index("| read or") :].strip()
        else:
            with tempfile.TemporaryDirectory() as folder:
                found = parts[part](Path(folder))
        print(found, flush=True)
        tables.append(found)
    if arguments.write:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        head = (
            f"# Reading and starting, {date.today().isoformat()}\n\n`python benchmarks/reading.py --write`, steadyrank "
            f"{__version__}, torch {torch.__version__}, pyarrow {pa.__version__}, {machine}, Python "
            f"{platform.python_version()}. Medians of {RUNS} runs on a shared machine: read the ratios.\n"
        )
        path = Path(__file__).parent / f"reading_{platform.machine()}_cpu_{date.today().isoformat()}.md"
        path.write_text("\n\n".join([head.rstrip(), *tables]) + "\n", encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
