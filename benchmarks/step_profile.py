"""Where the time of one training step goes, by part.

    python benchmarks/step_profile.py [--steps N] [--precision auto|float32|bfloat16] [--write]

The common job (26 ids in tables of 1M rows together, 13 numbers, MMoE of 4 experts of 256 and 128, two towers of 64,
batches of 1024, the optimizers of a fresh configuration), guarded, without instruments. Times are what torch's profiler
attributes to each operation itself; "the rest" is what no operation accounts for: Python, autograd's bookkeeping, and
waiting for threads. The profiler slows small operations. `--write` puts the table into a results file beside this
script, named after the hardware.
"""

import argparse
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import growth
import torch
from torch.profiler import ProfilerActivity, profile

from steadyrank import __version__
from steadyrank.train import fit

PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "tables: look up, sum, step": ("LookUp", "LookUpBackward", "Optimizer.step#RowWiseAdagrad"),
    "dense optimizer": ("Optimizer.step#Clippy", "Optimizer.zero_grad"),
    "casts and copies": ("aten::copy_", "aten::_to_copy", "aten::to", "aten::cat", "aten::contiguous", "aten::clone"),
    "activations, forward and back": ("aten::clamp_min", "aten::relu", "aten::threshold_backward"),
    "mixing and adding gradients": ("aten::mul", "aten::add", "aten::addcmul", "aten::sum", "aten::_softmax"),
    "guard's look at gradients": ("aten::aminmax",),
}


def part_of(operation: str) -> str:
    names = ((part, name) for part, names in PARTS.items() for name in names)
    found = [part for part, name in names if operation.startswith(name)]
    return found[0] if found else "other operations"


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--precision", default="auto")
    options.add_argument("--write", action="store_true", help="write the results file")
    arguments = options.parse_args(argv)
    growth.PRECISION = arguments.precision
    device = torch.device("cpu")
    job = growth.Trained(growth.BASE, device)
    job.rate(device, arguments.steps)
    stream = [job.batches[i % len(job.batches)] for i in range(arguments.steps)]
    start = time.perf_counter()
    for _ in fit(job.model, job.optimizers, stream, job.schema.tasks):
        pass
    plain = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        for _ in fit(job.model, job.optimizers, stream, job.schema.tasks):
            pass
        whole = time.perf_counter() - start
    parts: dict[str, float] = {}
    for event in found.key_averages():
        part = part_of(event.key)
        parts[part] = parts.get(part, 0.0) + event.self_cpu_time_total * 1e-6
    parts["the rest"] = whole - sum(parts.values())
    head = f"{1e3 * plain / arguments.steps:.1f} ms a step, {1e3 * whole / arguments.steps:.1f} ms under the profiler"
    lines = [
        f"{head}; {job.precision.name}, {torch.get_num_threads()} threads.",
        "",
        "| part | ms | share |",
        "|---|---|---|",
    ]
    for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        lines.append(f"| {part} | {1e3 * seconds / arguments.steps:.2f} | {seconds / whole:.0%} |")
    print("\n".join(lines))
    if arguments.write:
        named = growth.hardware(device).lower().replace(" ", "_")
        path = Path(__file__).parent / f"step_profile_{named}_{date.today().isoformat()}.md"
        title = f"# Where a step's time goes, {growth.hardware(device)}, {date.today().isoformat()}"
        ran = f"`python benchmarks/step_profile.py --write`, steadyrank {__version__}, torch {torch.__version__}."
        path.write_text("\n".join([title, "", ran, "", *lines]) + "\n", encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
