"""What two processes gain, what they send one another, and what that says of many GPUs.

    python benchmarks/scale.py [--parts time bytes plans] [--rounds N] [--quick] [--first] [--write]

Without `--parts` the tables of the newest results file are shown, and nothing is measured. The parts: `time` (rows a
second of whole runs, one process on one core beside two on two cores), `bytes` (what crosses the network in a step,
counted at the collectives and at the interface; needs root, for two network namespaces) and `plans` (TorchRec's planner
asked for worlds that are not there, and how fast a core does what more ranks do not make less). `--write` puts what was
measured into a results file beside this script, named after the machine, and into docs/scale.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from scale_tables import HARDWARE, ROWS, WIDTHS, WORLDS, Job, fill, tables

from steadyrank import __version__
from steadyrank.config import RunConfig, demo
from steadyrank.distributed.planning import describe, plan_for
from steadyrank.errors import ConfigError
from steadyrank.models.layers import fill_uniform
from steadyrank.scoreboard import Scoreboard

HERE = Path(__file__).resolve().parent
RANK = HERE / "scale_rank.py"
PAGE = HERE.parent / "docs" / "scale.md"

LARGE = (
    "name=large",
    "data.features=40",
    "data.users=1_000_000",
    "data.items=200_000",
    "model.cross={layers=1}",
    "model.trunk={kind='mmoe', experts=4, widths=[1024, 512]}",
    "model.tower=[64]",
)
SIZES = {"small": (), "large": LARGE}
HOW = {
    "ddp, replicated": ("distributed.dense=ddp", "distributed.tables=replicated"),
    "fsdp2, replicated": ("distributed.dense=fsdp2", "distributed.tables=replicated"),
    "ddp, torchrec": ("distributed.dense=ddp", "distributed.tables=torchrec"),
    "fsdp2, torchrec": ("distributed.dense=fsdp2", "distributed.tables=torchrec"),
}
ALONE = {"one core": 1, "one process, both cores": 2}
STEPS = {("small", 1024): (10, 50), ("small", 8192): (4, 14), ("large", 1024): (10, 40), ("large", 8192): (3, 9)}
"""Between which steps is timed."""
FIRST: list[bool] = []
"""Not empty when the processes come before all others of the machine."""
COUNTED = 8
"""Steps of a window, and of a reading, where bytes are counted."""


def config(size: str, batch: int, rows: int, *more: str) -> RunConfig:
    """Return the configuration of a run."""
    return demo([
        *SIZES[size], f"data.rows={rows}", "data.block_rows=16384", "reader.window_rows=65536",
        f"reader.batch_size={batch}", "train.report=false", *more,
    ])  # fmt: skip


def start(size: int, jobs: list[dict[str, Any]], spaces: Sequence[str] = ()) -> list[list[Any]]:
    """Do the jobs in so many processes, each in its network namespace; return what each process found."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "jobs.json"
        path.write_text(json.dumps([{**job, "folder": f"{name}/{i}"} for i, job in enumerate(jobs)]))
        host = "10.77.0.1" if spaces else "127.0.0.1"
        port = str(29_000 + os.getpid() % 10_000)
        processes = []
        for rank in range(size):
            command = [sys.executable, str(RANK), str(rank), str(size), host, port, str(path), f"{name}/{rank}.json"]
            threads = {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "2000"}
            space = {"GLOO_SOCKET_IFNAME": "scale0"} if spaces else {}
            inside = ["ip", "netns", "exec", spaces[rank]] if spaces else []
            each = subprocess.Popen([*inside, *command], env={**os.environ, **threads, **space}, start_new_session=True)
            processes.append(each)
            if FIRST:  # the kernel weighs sessions before it weighs processes
                Path(f"/proc/{each.pid}/autogroup").write_text("-19", encoding="utf-8")
        try:
            while all(process.poll() is None for process in processes):
                time.sleep(0.2)
            codes = [process.wait(timeout=20) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise SystemExit(f"a process failed: {codes}")
        return [json.loads(Path(f"{name}/{rank}.json").read_text()) for rank in range(size)]


@contextmanager
def two_machines() -> Iterator[list[str]]:
    """Give two network namespaces with one cable between them, `scale0` at either end."""
    spaces = [f"scale_{os.getpid()}_{rank}" for rank in range(2)]

    def do(words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True)

    try:
        for space in spaces:
            do(f"netns add {space}")
        one, two = spaces
        do(f"link add scale0 netns {one} type veth peer name scale0 netns {two}")
        for rank, space in enumerate(spaces):
            do(f"-n {space} addr add 10.77.0.{rank + 1}/24 dev scale0")
            do(f"-n {space} link set lo up")
            do(f"-n {space} link set scale0 up gso_max_segs 1")  # a packet is what goes over a cable
        yield spaces
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], check=False)


def measure_time(rounds: int, quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows a second of every way, round by round, and where the time of some runs' steps goes."""
    jobs: list[dict[str, Any]] = []
    for (size, batch), (_, last) in STEPS.items():
        if quick and batch > 1024:
            continue
        rows = batch * (last + 1)
        for name, threads in ALONE.items():
            text = config(size, batch, rows).to_toml()
            jobs.append({"name": name, "size": size, "batch": batch, "toml": text, "alone": True, "threads": threads})
        for name, sets in HOW.items():
            job = {"name": name, "size": size, "batch": batch, "toml": config(size, batch, rows, *sets).to_toml()}
            jobs += [job, {**job, "counts": True}] if batch == 1024 else [job]
    found, waits = [], []
    for number, (job, *each) in enumerate(zip(jobs * rounds, *start(2, jobs * rounds), strict=True)):
        first, last = STEPS[job["size"], job["batch"]]
        made = each[0]
        if job.get("counts"):
            waits.append({key: job[key] for key in ("name", "size", "batch")} | waited(each, first, last))
            continue
        seconds = made["marks"][last]["s"] - made["marks"][first]["s"]
        found.append({key: job[key] for key in ("name", "size", "batch")} | {
            "round": number // len(jobs), "rows_per_s": round(job["batch"] * (last - first) / seconds),
            "dense": sum_dense(made), "precision": made["precision"].split(":")[0],
        })  # fmt: skip
    return found, waits


def waited(ranks: list[dict[str, Any]], first: int, last: int) -> dict[str, Any]:
    """Return what a step's time goes into, in milliseconds: means over ranks."""
    steps, n = last - first, len(ranks)
    parts = {part for made in ranks for part in made["marks"][last]["waited"]}

    def mean(values: Iterable[float]) -> float:
        return round(sum(values) / n / steps * 1e3, 3)

    ends = [(made["marks"][first], made["marks"][last]) for made in ranks]
    return {
        "step_ms": mean(b["s"] - a["s"] for a, b in ends),
        "batches_ms": mean(b["batches_s"] - a["batches_s"] for a, b in ends),
        "waited_ms": {part: mean(b["waited"].get(part, 0) - a["waited"].get(part, 0) for a, b in ends)
                      for part in sorted(parts)},
    }  # fmt: skip


def sum_dense(made: dict[str, Any]) -> int:
    """Return the number of dense parameters."""
    return sum(int(torch.Size(shape).numel()) for shape in made["dense"].values())


def measure_bytes(quick: bool) -> list[dict[str, Any]]:
    """Return what is sent in a step, by part, and what the interfaces saw."""
    jobs = []
    for size, batch in [("small", 1024)] if quick else [("small", 1024), ("small", 8192), ("large", 1024)]:
        counted = (
            f"reader.window_rows={COUNTED * batch}", f"data.block_rows={COUNTED * batch}", "train.window_steps=1000",
            f"train.log_every={COUNTED}", f"watch.look_every={COUNTED}", "watch.dynamics_every=1000",
        )  # fmt: skip
        for name, sets in HOW.items():
            for kinds in ("table_wise", "row_wise") if "torchrec" in name else ("",):
                if size == "large" and (kinds == "row_wise" or name == "fsdp2, torchrec"):
                    continue
                if batch > 1024 and name.startswith("fsdp2"):
                    continue
                made = config(size, batch, (5 * COUNTED + 1) * batch, *sets, *counted)
                jobs.append({"name": f"{name} {kinds}".strip(), "size": size,
                             "batch": batch, "kinds": kinds, "toml": made.to_toml(), "counts": True})  # fmt: skip
    with two_machines() as spaces:
        each = start(2, jobs, spaces)
    return [one_count(job, [each[rank][i] for rank in range(2)]) for i, job in enumerate(jobs)]


def one_count(job: dict[str, Any], ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over ranks and steps between two windows' ends."""
    first, last, n = COUNTED - 1, 3 * COUNTED - 1, len(ranks)  # where the next window was dealt, and none is being
    steps, schema = last - first, RunConfig.from_toml(job["toml"]).schema_

    def grown(made: dict[str, Any], key: str, end: int = last, begin: int = first) -> dict[str, float]:
        a, b = made["marks"][begin][key], made["marks"][end][key]
        return {part: b[part] - a.get(part, 0) for part in b if b[part] != a.get(part, 0)}

    def mean(key: str) -> dict[str, float]:
        each = [grown(made, key) for made in ranks]
        return {part: round(sum(one.get(part, 0) for one in each) / n / steps, 3) for one in each for part in one}

    # Bytes sent and received, packets likewise, and packets sent again.
    network = [[b - a for a, b in zip(made["marks"][first]["network"], made["marks"][last]["network"], strict=True)]
               for made in ranks]  # fmt: skip
    marks = [made["marks"][first + 1 : last + 1] for made in ranks]
    ends = [grown(made, "sent", -1, -2) for made in ranks]
    return {
        "name": job["name"], "size": job["size"], "batch": job["batch"], "ranks": n, "kinds": ranks[0]["kinds"],
        "sent": mean("sent"), "calls": mean("calls"),
        "network": round(sum(each[0] for each in network) / n / steps, 1),
        "packets": round(sum(each[2] for each in network) / n / steps, 1),
        "again": round(sum(each[4] for each in network) / n / steps, 2),
        "checkpoint": sum(each.get("checkpoint", 0) for each in ends) / n,
        "touched": statistics.mean(max(m["touched"] for m in each) for each in zip(*marks, strict=True)),
        "elements": sum(m["elements"] for each in marks for m in each) / steps / job["batch"],
        "pairs": sum(made["marks"][last]["pairs"] - made["marks"][first]["pairs"] for made in ranks) / n / steps,
        "bases": len(schema.baseline),
        "dense": sum_dense(ranks[0]), "tensors": ranks[0]["tensors"],
        "ids": len(schema.id_features), "lists": len(schema.list_features), "numbers": len(schema.number_features),
        "positions": len(schema.position_features), "tasks": len(schema.tasks), "width": schema.embedding_width,
    }  # fmt: skip


def ask_planner() -> list[dict[str, Any]]:
    """Return what TorchRec's planner says of worlds that are not there."""
    found = []
    for rows in ROWS:
        for width in WIDTHS:
            for ranks in WORLDS:
                job = Job(rows, width, ranks)
                asked = {"rows": rows, "width": width, "ranks": ranks}
                try:
                    plan = describe(plan_for(
                        job.schema(), ranks, HARDWARE.budget, ranks_per_host=min(ranks, HARDWARE.per_host),
                        batch_rows=job.batch, dense_bytes=job.dense_bytes, state_bytes=lambda width: 4.0,
                    ))  # fmt: skip
                except ConfigError as error:
                    found.append({**asked, "refused": str(error)})
                    continue
                kinds: dict[str, list[int]] = {}
                for table in plan["tables"]:
                    kinds.setdefault(table["sharding"], []).append(table["rows"])
                found.append({**asked, "kinds": kinds, "bytes": max(plan["bytes"]), "ms": max(plan["time_ms"]),
                              "least_ms": min(plan["time_ms"])})  # fmt: skip
    return found


def measure_ranks() -> dict[str, float]:
    """Return how fast one core does what does not become less with more ranks: drawing weights, counting metrics."""
    torch.set_num_threads(1)
    block, generator = torch.empty(1 << 24), torch.Generator().manual_seed(0)
    drawn, judged = [], []
    made = config("small", 8192, 20 * 8192)
    board, batches = Scoreboard(made.schema_, truth=True), [batch for batch, _ in made.build_reader().batches()]
    for _ in range(3):
        begun = time.perf_counter()
        fill_uniform(block, 0.01, generator)
        drawn.append(block.numel() / (time.perf_counter() - begun))
        begun = time.perf_counter()
        for batch in batches:
            board.add(batch, torch.randn(batch.labels.shape, generator=generator))
        board.close_window()
        judged.append(sum(map(len, batches)) / (time.perf_counter() - begun))
    return {"drawn_per_s": round(statistics.median(drawn)), "judged_per_s": round(statistics.median(judged))}


def newest() -> Path:
    """Return the newest results file."""
    return max(HERE.glob("scale_*.json"), key=lambda path: path.stem[-10:])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is asked for, and show all tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parts", nargs="*", default=[], choices=["time", "bytes", "plans"])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument(
        "--quick", action="store_true", help="one round, batches of 1,024 alone, the small model's bytes"
    )
    options.add_argument("--first", action="store_true", help="come before all other processes of the machine (root)")
    options.add_argument("--write", action="store_true", help="write the results file and the page's tables")
    arguments = options.parse_args(argv)
    FIRST.extend([True] * arguments.first)
    machine = f"{platform.machine()}_cpu"
    path = HERE / f"scale_{machine}_{date.today().isoformat()}.json"
    kept = newest() if list(HERE.glob("scale_*.json")) else None
    found: dict[str, Any] = json.loads(kept.read_text()) if kept else {}
    if arguments.parts:
        found |= {"machine": f"{platform.machine()} CPU", "date": date.today().isoformat(), "steadyrank": __version__,
                  "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip
    if "plans" in arguments.parts:
        found["plans"], found["ranks"] = ask_planner(), measure_ranks()
    if "bytes" in arguments.parts:
        found["bytes"] = measure_bytes(arguments.quick)
    if "time" in arguments.parts:
        found["rounds"] = 1 if arguments.quick else arguments.rounds
        found["time"], found["waits"] = measure_time(found["rounds"], arguments.quick)
    if arguments.write:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path}")
        versions = f"steadyrank {found['steadyrank']}, torch {found['torch']}, Python {found['python']}"
        command = "python benchmarks/scale.py --parts bytes plans time --first --write"
        head = (
            f"# Past one machine, {found['machine']}, {found['date']}\n\n`{command}`, {versions}. What it shows: "
            "docs/scale.md. A shared machine of two cores: read the ratios."
        )
        parts = [f"## {name}\n\n{text}" for name, text in tables(found).items()]
        path.with_suffix(".md").write_text("\n\n".join([head, *parts]) + "\n", encoding="utf-8")
    else:
        Path(tempfile.gettempdir(), "scale_last.json").write_text(json.dumps(found, indent=1))
    made = tables(found)
    if arguments.write:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    for name, text in made.items():
        print(f"\n## {name}\n\n{text}")


if __name__ == "__main__":
    main()
