"""What the guard costs: a guarded training step over a plain one, in one run, and by part.

    python benchmarks/guard_cost.py [--steps N] [--rounds N] [--jobs demo mmoe] [--write]

Models that are the same learn the same batches in this process, step by step in turn: by PyTorch's own forward,
backward and step, by `train_step`, and both again with the instruments, as a run has them: these need the largest
coordinate of each gradient anyway, which the guard gives them. Then the guard's parts alone are timed on the gradients
of a step. One thread of torch and the process's own time (CPU), so that other work on the
machine counts less; on a GPU the clock's, waiting for the device after each step. `--write` puts the tables into a
results file beside this script, named after the hardware.
"""

import argparse
import copy
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from steadyrank import __version__
from steadyrank.config import demo
from steadyrank.data.logs import Cursor
from steadyrank.guard import Before, judge, step_where_ok
from steadyrank.losses import multitask_loss
from steadyrank.models.ranker import ModelConfig, Ranker
from steadyrank.monitors.watch import Watch
from steadyrank.optim import ClippyAdagrad, RowWiseAdagrad, split_parameters
from steadyrank.schema import Batch, Schema, Task
from steadyrank.train import train_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARM_UP = 10  # steps that are not counted
JOBS = {
    "demo": "the demo's model, batch 256",
    "mmoe": "26 ids, 13 numbers, MMoE of 4 experts of 256 and 128, two towers of 64, batch 1024",
}
PLAIN, GUARDED, QUARANTINE = "plain", "`train_step`", "`train_step` with quarantine"
WATCHED, BOTH = "plain, watched", "`train_step`, watched"
AGAINST = {PLAIN: PLAIN, GUARDED: PLAIN, QUARANTINE: PLAIN, WATCHED: WATCHED, BOTH: WATCHED}


@dataclass
class Job:
    """A model, its optimizers, and batches to learn."""

    model: nn.Module
    optimizers: list[Optimizer]
    tasks: list[Task]
    batches: list[Batch]
    watch: Watch | None = None


def build_demo(steps: int) -> Job:
    parts = demo([f"data.rows={steps * 256}"]).build()
    batches = [batch.to(DEVICE) for batch, _ in islice(parts.reader.batches(Cursor()), steps)]
    return Job(parts.model, list(parts.optimizers.values()), list(parts.schema.tasks.values()), batches)


def build_mmoe(steps: int) -> Job:
    features: dict[str, Any] = {f"id_{i}": {"kind": "id", "rows": 20_000} for i in range(26)}
    features |= {f"number_{i}": {"kind": "number"} for i in range(13)}
    tasks = {name: {"kind": "binary"} for name in ("click", "like")}
    schema = Schema(features=features, tasks=tasks)
    config = ModelConfig(trunk={"kind": "mmoe", "experts": 4, "widths": [256, 128]}, tower=[64])
    model = Ranker(schema, config, torch.Generator().manual_seed(0))
    dense, tables = split_parameters(model, model.table_names())
    optimizers: list[Optimizer] = [ClippyAdagrad(dense, lr=0.1), RowWiseAdagrad(tables, lr=0.05)]
    return Job(model, optimizers, list(schema.tasks.values()), [draw(schema, seed) for seed in range(min(steps, 20))])


def draw(schema: Schema, seed: int, rows: int = 1024) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    # Popular ids as logs have them: squared, so that a few rows come up often.
    shares = torch.rand(rows, len(schema.id_features), generator=generator) ** 3
    slots = [schema.slot(name) for name in schema.id_features]
    ids = torch.stack([s.start + (shares[:, i] * s.rows).long() for i, s in enumerate(slots)], 1)
    numbers = torch.randn(rows, len(schema.number_features), generator=generator)
    labels = (torch.rand(rows, len(schema.tasks), generator=generator) < 0.2).float()
    none, zero = torch.zeros(rows, 0, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    return Batch(ids, (), numbers, none, labels, torch.ones_like(labels), zero, zero).to(DEVICE)


def twin_of(job: Job, watched: bool = False) -> Job:
    """Return a copy whose optimizers hold the copied parameters."""
    model, optimizers = copy.deepcopy((job.model, job.optimizers))
    names = [f"task {i}" for i in range(len(job.tasks))]
    return Job(model, optimizers, job.tasks, job.batches, Watch(model, optimizers, names) if watched else None)


def plain_step(job: Job, batch: Batch) -> None:
    """Learn a batch as one writes it down in PyTorch, with the serving scores of the same forward pass."""
    _, logits_BK = job.model.forward_both(batch)
    total, parts_K = multitask_loss(logits_BK, batch.labels, batch.weights, job.tasks)
    for optimizer in job.optimizers:
        optimizer.zero_grad(set_to_none=True)
    if job.watch is not None:
        job.watch.losses(parts_K, logits=logits_BK)
    total.backward()
    for optimizer in job.optimizers:
        optimizer.step()


def guarded_step(job: Job, batch: Batch) -> None:
    train_step(job.model, job.optimizers, batch, job.tasks, job.watch)


def quarantine_step(job: Job, batch: Batch) -> None:
    train_step(job.model, job.optimizers, batch, job.tasks, quarantine_rows=True)


def take(work: Callable[[], Any]) -> float:
    """Return the seconds that `work` takes."""
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time
    start = clock()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(job: Job, steps: int, rounds: int) -> dict[str, list[list[float]]]:
    """Return the seconds of each kind of step, by round; which comes first changes from step to step."""
    kinds = {
        PLAIN: plain_step,
        GUARDED: guarded_step,
        QUARANTINE: quarantine_step,
        WATCHED: plain_step,
        BOTH: guarded_step,
    }
    twins = {name: twin_of(job, watched=name in (WATCHED, BOTH)) for name in kinds}
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(rounds)] for name in kinds}
    gc.collect()
    gc.freeze()
    for number in range(WARM_UP + rounds * steps):
        batch = job.batches[number % len(job.batches)]
        names = list(kinds)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            spent = take(lambda name=name, batch=batch: kinds[name](twins[name], batch))  # type: ignore[misc]
            if number >= WARM_UP:
                seconds[name][(number - WARM_UP) // steps].append(spent)
    return seconds


def measure_parts(job: Job, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of the guard's parts: on the gradients of a real step, straight after its backward pass."""
    found: dict[str, list[float]] = {"keep the statistics": [], "form the verdict": [], "ask, and put nothing back": []}
    parameters = [p for optimizer in job.optimizers for group in optimizer.param_groups for p in group["params"]]
    for number in range(WARM_UP + repeats):
        batch, before = job.batches[number % len(job.batches)], Before()
        kept = take(lambda before=before: before.keep_statistics(job.model))  # type: ignore[misc]
        _, logits_BK = job.model.forward_both(batch)
        total, parts_K = multitask_loss(logits_BK, batch.labels, batch.weights, job.tasks)
        for optimizer in job.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        losses_K, verdicts = parts_K.detach(), []

        def form(before: Before = before, losses_K: torch.Tensor = losses_K, verdicts: list[Any] = verdicts) -> None:
            verdicts.append(judge(parameters, losses_K, None, before.statistics()))

        judged = take(form)
        asked = take(lambda v=verdicts, b=before: step_where_ok([], v[0], b))  # type: ignore[misc]
        for optimizer in job.optimizers:
            optimizer.step()
        if number >= WARM_UP:
            for name, spent in zip(found, (kept, judged, asked), strict=True):
                found[name].append(spent)
    return found


def report(title: str, job: Job, steps: int, rounds: int) -> list[str]:
    seconds, parts = measure(twin_of(job), steps, rounds), measure_parts(twin_of(job), steps)
    dense = sum(p.numel() for o in job.optimizers for g in o.param_groups for p in g["params"] if p.numel() < 1e6)
    lines = [f"## {title[0].upper()}{title[1:]}", ""]
    lines += [f"{dense:,} dense coordinates, {len(list(job.model.parameters()))} parameters.", ""]
    lines += ["| step | ms, median | ratio: median of rounds | lowest | highest | to |", "|---|---|---|---|---|---|"]
    for name, by_round in seconds.items():
        # Within each batch, then the median of the round: what struck one step alone falls away.
        other = AGAINST[name]
        pairs = [zip(mine, theirs, strict=True) for mine, theirs in zip(by_round, seconds[other], strict=True)]
        ratios = [statistics.median(a / b for a, b in pair) for pair in pairs]
        ms = 1e3 * statistics.median(s for one in by_round for s in one)
        cells = f"{statistics.median(ratios):.4f} | {min(ratios):.4f} | {max(ratios):.4f} | {other}"
        lines.append(f"| {name} | {ms:.2f} | {cells} |")
    plain = statistics.median(s for one in seconds[PLAIN] for s in one)
    lines += ["", "| part of the guard | µs: median (quartiles) | of a plain step |", "|---|---|---|"]
    whole = [sum(each) for each in zip(*parts.values(), strict=True)]
    for name, spent in [*parts.items(), ("**together**", whole)]:
        low, middle, high = (1e6 * q for q in statistics.quantiles(spent, n=4))
        lines.append(f"| {name} | {middle:.0f} ({low:.0f} to {high:.0f}) | {1e-6 * middle / plain:.2%} |")
    print("\n".join(lines), flush=True)
    return [*lines, ""]


def hardware() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{platform.machine()} CPU"


def head(arguments: argparse.Namespace) -> list[str]:
    asked = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return [
        f"# Cost of the guard, {hardware()}, {date.today().isoformat()}",
        "",
        f"`python benchmarks/guard_cost.py --steps {arguments.steps} --rounds {arguments.rounds} --write`, steadyrank "
        f"{__version__} at {commit or 'no commit'}, torch {torch.__version__}, 1 thread, Python "
        f"{platform.python_version()}.",
        "",
        f"{arguments.rounds} rounds of {arguments.steps} steps, models that are the same in turn on each batch. A "
        "plain step is forward, losses, backward and the optimizers' steps; `train_step` is the same with the guard. "
        "Watched: with the instruments, as every run has them at their defaults; they need the largest coordinate of "
        "each gradient anyway, which the guard gives them. A shared machine: read the ratios, not the milliseconds.",
        "",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=100, help="counted steps of a round")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    options.add_argument("--write", action="store_true", help="write the results file")
    arguments = options.parse_args(argv)
    torch.set_num_threads(1)
    lines = head(arguments)
    for name in arguments.jobs:
        steps = WARM_UP + arguments.steps
        job = build_demo(steps) if name == "demo" else build_mmoe(steps)
        job.model.to(DEVICE).train()
        lines += report(JOBS[name], job, arguments.steps, arguments.rounds)
    if arguments.write:
        named = hardware().lower().replace(" ", "_")
        path = Path(__file__).parent / f"guard_cost_{named}_{date.today().isoformat()}.md"
        path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
