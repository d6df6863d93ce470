"""How the rate of training grows or falls: with batch size, features, tasks, width, table rows and the log's length.

    python benchmarks/growth.py [--quick] [--rounds N] [--axes batch tables ...] [--write]

One axis is changed at a time, the rest is the common job: 26 ids in tables of 1M rows together, 13 numbers, MMoE of 4
experts of 256 and 128, two towers of 64, batches of 1024. Counted are guarded steps on batches that lie in memory, the
points of an axis in turn, round by round; the log's length is that of whole runs, from Parquet, with all that a run
has by default. Beside the rate stands the work of a row: multiply-adds of the dense layers and table rows looked up.
`--write` puts the tables into a results file beside this script, named after the hardware.
"""

import argparse
import gc
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
import torch

from steadyrank import __version__
from steadyrank.config import RunConfig
from steadyrank.models.memory import list_layers
from steadyrank.parts import Parts, find_device
from steadyrank.runs import RunFolder
from steadyrank.schema import Batch, Schema
from steadyrank.sequential import run
from steadyrank.train import fit

STEPS, WARM_UP = 24, 4  # of a round
PRECISION = "auto"


@dataclass(frozen=True)
class Point:
    """One place on an axis."""

    batch: int = 1024
    ids: int = 26
    numbers: int = 13
    tasks: int = 2
    width: int = 256
    """Of an expert's first layer; the second and the towers follow."""
    table_rows: int = 1_000_000

    def config(self, path: str = "nowhere", rows: int = 1) -> RunConfig:
        """Return a run's configuration."""
        features: dict[str, Any] = {
            f"id_{i}": {"kind": "id", "rows": self.table_rows // self.ids, "hashed": False} for i in range(self.ids)
        }
        features |= {f"number_{i}": {"kind": "number"} for i in range(self.numbers)}
        text = {
            "data": {"path": path, "max_rows": rows},
            "reader": {"batch_size": self.batch},
            "train": {"precision": PRECISION},
            "model": {
                "trunk": {"kind": "mmoe", "experts": 4, "widths": [self.width, self.width // 2]},
                "tower": [self.width // 4],
            },
            "schema": {"features": features, "tasks": {f"task_{k}": {"kind": "binary"} for k in range(self.tasks)}},
        }
        return RunConfig.from_toml(tomli_w.dumps(text))


BASE = Point()
AXES: dict[str, tuple[str, list[Point]]] = {
    "batch": ("rows of a batch", [replace(BASE, batch=n) for n in (256, 512, 1024, 2048, 4096, 8192)]),
    "features": (
        "features, two thirds of them ids",
        [replace(BASE, ids=n - n // 3, numbers=n // 3) for n in (10, 20, 39, 80, 120, 200)],
    ),
    "tasks": ("tasks", [replace(BASE, tasks=n) for n in (1, 2, 5, 10, 20)]),
    "width": ("units of an expert's first layer", [replace(BASE, width=n) for n in (64, 128, 256, 512, 1024)]),
    "tables": ("rows of all tables", [replace(BASE, table_rows=n) for n in (1_000_000, 10_000_000, 50_000_000)]),
}
LENGTHS = (50_000, 100_000, 200_000, 400_000, 800_000)
QUICK = {"batch": (0, 2, 5), "features": (0, 2, 5), "tasks": (0, 1, 4), "width": (0, 2, 4), "tables": (0, 1)}


class Trained:
    """A point's model, and batches to learn."""

    def __init__(self, point: Point, device: torch.device) -> None:
        config = point.config()
        self.point, self.schema = point, config.schema_
        self.model = config.build_model()
        self.precision = config.choose_precision(self.model, device)
        self.model.precision = self.precision.dtype
        self.model.to(device)
        self.optimizers = config.build_optimizers(self.model)
        self.batches = [draw(self.schema, point.batch, seed) for seed in range(8)]
        self.work = sum(
            layer.copies * layer.width_in * layer.width_out
            for layers in list_layers(self.schema, config.model).values()
            for layer in layers
        )

    def rate(self, device: torch.device, steps: int) -> float:
        """Return rows a second over some steps."""
        self.precision.apply()
        start = 0.0
        stream = (self.batches[i % len(self.batches)] for i in range(WARM_UP + steps))
        for number, _ in enumerate(fit(self.model, self.optimizers, stream, self.schema.tasks, device=device), start=1):
            if number == WARM_UP:
                wait(device)
                start = time.perf_counter()
        wait(device)
        return steps * self.point.batch / (time.perf_counter() - start)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw(schema: Schema, rows: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(rows, len(schema.id_features), generator=generator) ** 3  # a few ids come up often, as in logs
    slots = [schema.slot(name) for name in schema.id_features]
    ids = torch.stack([s.start + (shares[:, i] * s.rows).long() for i, s in enumerate(slots)], 1)
    numbers = torch.randn(rows, len(schema.number_features), generator=generator)
    labels = (torch.rand(rows, len(schema.tasks), generator=generator) < 0.2).float()
    none, zero = torch.zeros(rows, 0, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    return Batch(ids, (), numbers, none, labels, torch.ones_like(labels), zero, zero)


def measure(name: str, points: Sequence[Point], rounds: int, device: torch.device) -> list[str]:
    """Return the table of one axis."""
    title, field = AXES[name][0], {"features": "ids", "tables": "table_rows"}.get(name, name)
    alone = name == "tables"  # the large ones do not fit side by side
    trained = [] if alone else [Trained(point, device) for point in points]
    rates: list[list[float]] = [[] for _ in points]
    for index, point in enumerate(points if alone else ()):
        one = Trained(point, device)
        rates[index] = [one.rate(device, STEPS) for _ in range(rounds)]
        work = one.work
        del one
        gc.collect()
    for _ in range(0 if alone else rounds):
        for index, one in enumerate(trained):
            rates[index].append(one.rate(device, max(4, STEPS * 1024 // one.point.batch)))
    lines = [
        f"| {title} | rows/s: median | lowest | highest | thousand multiply-adds a row | GFLOP/s | precision |",
        "|---|---|---|---|---|---|---|",
    ]
    for index, point in enumerate(points):
        middle = statistics.median(rates[index])
        macs = work if alone else trained[index].work
        dtype = PRECISION if alone else trained[index].precision.name
        at = point.ids + point.numbers if name == "features" else getattr(point, field)
        lines.append(
            f"| {at:,} | {middle:,.0f} | {min(rates[index]):,.0f} | {max(rates[index]):,.0f} | {macs / 1e3:,.0f} | "
            f"{6e-9 * macs * middle:,.0f} | {dtype} |"
        )
    return lines


def measure_lengths(lengths: Sequence[int]) -> list[str]:
    """Return the table of whole runs."""
    lines = [
        "| rows of the log | rows/s of the run | seconds before the first step and after the last | memory at most |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "log.parquet"
        write_log(path, max(lengths))
        for rows in lengths:
            config = BASE.config(str(path), rows)
            start = time.perf_counter()
            parts: Parts = config.build()
            with RunFolder.create(Path(name) / "run", overwrite=True) as folder:
                folder.write_config(config.to_toml())
                summary = run(parts, folder)
            rest = time.perf_counter() - start - summary["seconds"]
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            lines.append(f"| {rows:,} | {summary['rows_per_s']:,.0f} | {rest:.1f} | {most:.2f} GB |")
            del parts
            gc.collect()
    return lines


def write_log(path: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    each = BASE.table_rows // BASE.ids
    columns: dict[str, Any] = {"time": np.arange(rows)}
    columns |= {f"id_{i}": (rng.random(rows) ** 3 * each).astype(np.int64) for i in range(BASE.ids)}
    columns |= {f"number_{i}": rng.normal(size=rows).astype(np.float32) for i in range(BASE.numbers)}
    columns |= {f"task_{k}": (rng.random(rows) < 0.2).astype(np.int8) for k in range(BASE.tasks)}
    pq.write_table(pa.table(columns), path, row_group_size=65_536)


def hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    # The log's length first: the memory that a process held at most does not fall again.
    options.add_argument("--axes", nargs="*", default=["length", *AXES], choices=["length", *AXES])
    options.add_argument("--quick", action="store_true", help="fewer points and rounds")
    options.add_argument("--device", default="auto")
    options.add_argument("--write", action="store_true", help="write the results file")
    arguments = options.parse_args(argv)
    device = find_device(arguments.device)
    rounds = 2 if arguments.quick else arguments.rounds
    lines: list[str] = []
    for axis in arguments.axes:
        if axis == "length":
            lines += ["", "## Length of the log", "", *measure_lengths(LENGTHS[:3] if arguments.quick else LENGTHS)]
        else:
            title, points = AXES[axis]
            chosen = [points[i] for i in QUICK[axis]] if arguments.quick else points
            lines += ["", f"## {title.capitalize()}", "", *measure(axis, chosen, rounds, device)]
        print("\n".join(lines[-10:]), flush=True)
    if arguments.write:
        head = [
            f"# Growth, {hardware(device)}, {date.today().isoformat()}",
            "",
            f"`python benchmarks/growth.py --rounds {rounds} --write`, steadyrank {__version__}, torch "
            f"{torch.__version__}, {torch.get_num_threads()} threads, Python {platform.python_version()}. A shared "
            "machine: read the ratios.",
        ]
        named = hardware(device).lower().replace(" ", "_")
        path = Path(__file__).parent / f"growth_{named}_{date.today().isoformat()}.md"
        path.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
