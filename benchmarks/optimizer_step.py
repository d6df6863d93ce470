"""What an optimizer's step costs: ours, torch's, and a straightforward port of Clippy, side by side.

    python benchmarks/optimizer_step.py [--rounds N] [--sizes 0.2M 14M 57M] [--tables 1M 10M] [--write]

Everything is measured in this process, interleaved: one step of each, round by round. A ratio is taken within a round,
so that a machine that slows down slows both; the table gives its median and its quartiles. On a GPU the clock waits for
the device. `--write` puts the tables into a results file beside this script, named after the hardware.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steadyrank import ClippyAdagrad, ClippyAdam, RowWiseAdagrad, __version__, native

Step = Callable[[], Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Dense layers as rankers have them: an input from embeddings, cross layers, a trunk, towers; weights and biases.
LAYERS: dict[str, list[tuple[int, int]]] = {
    "0.2M": [(256, 400), (256, 256), (64, 256), (64, 256), (1, 64), (1, 64)],
    "14M": [(1024, 1024), (1024, 1024), (4096, 1024), (1024, 4096), (1024, 2048), (1024, 1024), (512, 1024), (1, 512)],
    "57M": [(512, 512), (512, 512), (4096, 512), (4096, 4096), (4096, 4096), (4096, 4096), (1, 4096), (1, 4096)],
}
TABLES = {"1M": 1_000_000, "10M": 10_000_000}
WIDTH, TOUCHED = 16, 50_000
QUIET, LOUD = 1e-3, 1e3
"""Rates at which nothing clips and everything does. Steps are of the same size in memory, whatever the rate."""


class StraightforwardPort(torch.optim.Optimizer):
    """Clippy as one writes it down: eight operations a parameter, each with a tensor of its own."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["sum"] = torch.full_like(p, 0.1)
                state["sum"] = state["sum"] + p.grad * p.grad
                delta = group["lr"] * p.grad / (state["sum"] + 1e-7).sqrt()
                bound = 0.5 * p.abs() + 0.01
                ratio = torch.where(delta == 0, torch.ones_like(delta), bound / delta.abs())
                p.sub_(ratio.min().clamp(max=1.0) * delta)


def dense_model(size: str) -> list[nn.Parameter]:
    """Make the parameters of a ranker of that size, with gradients."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for out, width in LAYERS[size]:
        for shape in ((out, width), (out,)):
            p = nn.Parameter((torch.randn(shape, generator=draw) * 0.05).to(DEVICE))
            p.grad = (torch.randn(shape, generator=draw) * 1e-3).to(DEVICE)
            made.append(p)
    return made


def dense_jobs(size: str) -> dict[str, Step]:
    """Return the steps to compare on dense parameters; the first is what the ratios are taken against."""

    def adagrad(**options: Any) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(dense_model(size), lr=1e-3, initial_accumulator_value=0.1, **options)

    clipped = dense_model(size)
    fused_adagrad = torch.optim.Adagrad(clipped, lr=1e-3, initial_accumulator_value=0.1, fused=True)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        fused_adagrad.step()

    jobs: dict[str, Step] = {
        "torch Adagrad, fused": adagrad(fused=True).step,
        "torch Adagrad, foreach": adagrad(foreach=True).step,
        "clip_grad_norm_ + Adagrad, fused": clip_and_step,
        "ClippyAdagrad, nothing clips": ClippyAdagrad(dense_model(size), lr=QUIET, absolute_threshold=1e-4).step,
        "ClippyAdagrad, everything clips": ClippyAdagrad(dense_model(size), lr=LOUD).step,
        "ClippyAdagrad, no compiler, nothing clips": ClippyAdagrad(dense_model(size), lr=QUIET, fused=False).step,
        "straightforward port": StraightforwardPort(dense_model(size), lr=QUIET).step,
        "torch Adam, fused": torch.optim.Adam(dense_model(size), lr=QUIET, fused=True).step,
        "ClippyAdam, nothing clips": ClippyAdam(dense_model(size), lr=QUIET, absolute_threshold=0.1).step,
        "ClippyAdam, everything clips": ClippyAdam(dense_model(size), lr=1.0).step,
    }
    return jobs


def table(rows: int) -> nn.Parameter:
    """Make an embedding table whose sparse gradient touches some rows, each once, as backward leaves it."""
    p = nn.Parameter(torch.zeros(rows, WIDTH, device=DEVICE).normal_(std=0.05, generator=_on_device(0)))
    touched = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:TOUCHED].to(DEVICE)
    values = torch.full((TOUCHED, WIDTH), 1e-3, device=DEVICE)
    p.grad = torch.sparse_coo_tensor(touched[None], values, p.shape, check_invariants=False)
    return p


def _on_device(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def table_jobs(sizes: list[str]) -> dict[str, Step]:
    """Return the steps to compare on tables."""
    torch.sparse.check_sparse_tensor_invariants.disable()
    jobs: dict[str, Step] = {}
    for size in sizes:
        rows = TABLES[size]
        jobs[f"torch Adagrad, {size} rows"] = torch.optim.Adagrad(
            [table(rows)], lr=QUIET, initial_accumulator_value=0.1
        ).step
        jobs[f"ClippyAdagrad, {size} rows"] = ClippyAdagrad([table(rows)], lr=LOUD).step
        jobs[f"ClippyAdagrad by row, {size} rows"] = ClippyAdagrad([table(rows)], lr=LOUD, granularity="row").step
        jobs[f"RowWiseAdagrad, {size} rows"] = RowWiseAdagrad([table(rows)], lr=QUIET).step
    return jobs


def measure(jobs: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return each job's seconds, round by round, after two rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 2):
        for name, step in jobs.items():
            start = time.perf_counter()
            step()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, seconds: dict[str, list[float]], against: dict[str, str]) -> list[str]:
    """Return a table: median milliseconds, and the ratio to another job within each round."""
    lines = [f"## {title}", "", "| step | ms, median | ratio | quartiles | to |", "|---|---|---|---|---|"]
    for name, mine in seconds.items():
        other = against.get(name) or next(iter(seconds))
        ratios = [a / b for a, b in zip(mine, seconds[other], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ms = statistics.median(mine) * 1e3
        lines.append(f"| {name} | {ms:,.2f} | {middle:.2f} | {low:.2f} to {high:.2f} | {other} |")
    print("\n".join(lines), flush=True)
    return [*lines, ""]


def check_no_sync() -> str:
    """Step under torch's sync-debug mode "error", which raises where the host waits for the GPU."""
    model = dense_model("0.2M")
    made = [ClippyAdagrad(model, lr=0.1), ClippyAdam(dense_model("0.2M"), lr=0.1)]
    for optimizer in made:
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for optimizer in made:
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 'No host sync in a step: `torch.cuda.set_sync_debug_mode("error")` raised nothing.'


def hardware() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{platform.machine()} CPU"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=25, help="measured steps of each")
    options.add_argument("--sizes", nargs="*", default=list(LAYERS), choices=list(LAYERS), help="dense models")
    options.add_argument("--tables", nargs="*", default=list(TABLES), choices=list(TABLES), help="embedding tables")
    options.add_argument("--write", action="store_true", help="write the results file")
    arguments = options.parse_args()
    head = [
        f"# Cost of an optimizer's step, {hardware()}, {date.today().isoformat()}",
        "",
        f"`python benchmarks/optimizer_step.py --rounds {arguments.rounds} --write`, steadyrank {__version__}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads, Python {platform.python_version()}, C kernel "
        f"{'built' if native.available() else 'not built'}.",
        "A shared machine: read the ratios, not the milliseconds. Ratios are taken within each round.",
        "",
    ]
    lines: list[str] = []
    if DEVICE.type == "cuda":
        lines += [check_no_sync(), ""]
    for size in arguments.sizes:
        count = sum(out * width + out for out, width in LAYERS[size])
        adam = dict.fromkeys(("ClippyAdam, nothing clips", "ClippyAdam, everything clips"), "torch Adam, fused")
        lines += report(f"{count / 1e6:.1f}M dense parameters", measure(dense_jobs(size), arguments.rounds), adam)
    if arguments.tables:
        first = arguments.tables[0]
        names = ("torch Adagrad", "ClippyAdagrad", "ClippyAdagrad by row", "RowWiseAdagrad")
        smaller = {f"{name}, {size} rows": f"{name}, {first} rows" for name in names for size in arguments.tables[1:]}
        lines += report(
            f"Tables of width {WIDTH}, {TOUCHED:,} rows touched",
            measure(table_jobs(arguments.tables), arguments.rounds),
            smaller,
        )
    if arguments.write:
        named = hardware().lower().replace(" ", "_")
        path = Path(__file__).parent / f"optimizer_step_{named}_{date.today().isoformat()}.md"
        path.write_text("\n".join([*head, *lines]).rstrip() + "\n", encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
