"""How fast the main job's parts are on this machine: the stream, reading, and training.

    python benchmarks/foundation.py [--write]

Each figure is the median of five runs in this process. `--write` puts the table into a results file beside this script.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from steadyrank import __version__
from steadyrank.config import demo
from steadyrank.data.logs import LogsConfig, ParquetLog, Reader, ReaderConfig
from steadyrank.data.stream import Stream, StreamConfig
from steadyrank.schema import Schema
from steadyrank.train import fit

ROWS = 262_144


def median_rate(work: Callable[[], int], runs: int = 5) -> tuple[float, float, float]:
    """Return the lowest, median and highest rows a second of several runs, after one to warm up."""
    work()
    rates = []
    for _ in range(runs):
        start = time.perf_counter()
        rows = work()
        rates.append(rows / (time.perf_counter() - start))
    return min(rates), statistics.median(rates), max(rates)


def generate(features: int) -> Callable[[], int]:
    stream = Stream(StreamConfig(rows=ROWS, features=features))
    return lambda: sum(len(table) for table in stream.tables())


def read(folder: Path, strings: bool) -> Callable[[], int]:
    """Read ten id columns and ten numbers, or ten columns of strings, from Parquet to batches of 1024."""
    rng = np.random.default_rng(0)
    columns: dict[str, object] = {"time": np.arange(ROWS), "click": rng.integers(0, 2, ROWS).astype(np.int8)}
    features: dict[str, dict[str, object]] = {}
    for i in range(10):
        ids = rng.zipf(1.3, ROWS) % 100_000
        columns[f"id_{i}"] = ids.astype(str) if strings else ids
        features[f"id_{i}"] = {"kind": "id", "rows": 100_000}
        if not strings:
            columns[f"number_{i}"] = rng.normal(size=ROWS).astype(np.float32)
            features[f"number_{i}"] = {"kind": "number"}
    path = folder / f"{strings}.parquet"
    pq.write_table(pa.table(columns), path)
    schema = Schema.model_validate({"features": features, "tasks": {"click": {"kind": "binary"}}})

    def work() -> int:
        reader = Reader(ParquetLog(LogsConfig(path=str(path)), "time"), schema, ReaderConfig())
        return sum(len(batch) for batch, _ in reader.batches())

    return work


def train(optimizer: str) -> Callable[[], int]:
    """Learn the demo's batches, without metrics: the trainer's step alone."""
    config = demo(["data.rows=32768", f"optimizer.dense.name={optimizer}"])
    parts = config.build()
    batches = [batch for batch, _ in parts.reader.batches()]

    def work() -> int:
        return sum(len(b) for b, _ in fit(parts.model, parts.optimizers, batches, config.schema_.tasks))

    return work


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--write", action="store_true", help="write the results file")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = {
            "generated stream, 10 features": generate(10),
            "generated stream, 50 features": generate(50),
            "Parquet to batches, 10 ids and 10 numbers": read(folder, strings=False),
            "Parquet to batches, 10 strings": read(folder, strings=True),
            "training step of the demo, ClippyAdagrad": train("clippy_adagrad"),
            "training step of the demo, torch Adagrad": train("adagrad"),
        }
        lines = ["| job | rows a second: median | lowest | highest |", "|---|---|---|---|"]
        for title, work in jobs.items():
            low, middle, high = median_rate(work)
            lines.append(f"| {title} | {middle:,.0f} | {low:,.0f} | {high:,.0f} |")
            print(f"{title}: {middle:,.0f} rows/s ({low:,.0f} to {high:,.0f})", flush=True)
    if arguments.write:
        head = [
            f"# The foundation's parts, {date.today().isoformat()}",
            "",
            f"`python benchmarks/foundation.py --write`, steadyrank {__version__}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, {platform.machine()}, Python {platform.python_version()}.",
            "A shared machine: read the ratios, not the seconds.",
            "",
        ]
        path = Path(__file__).parent / f"foundation_cpu_{date.today().isoformat()}.md"
        path.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
