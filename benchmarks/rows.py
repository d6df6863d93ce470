"""What rows of an embedding table cost in C, and in torch's operations.

    python benchmarks/rows.py [--rows N] [--ids N] [--width N] [--rounds N] [--write]

A step looks ids up, sums the gradient by their rows, and steps these by row-wise Adagrad. One thread, the process's own
time, both ways in turn on the same ids, of which a few come up often, as in logs. `--write` puts the table into a
results file beside this script, named after the hardware.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from steadyrank import RowWiseAdagrad, __version__
from steadyrank.native import available, rows

Work = Callable[[torch.Tensor], Any]


def take(work: Work, ids: Sequence[torch.Tensor]) -> float:
    """Return milliseconds for each."""
    start = time.process_time()
    for each in ids:
        work(each)
    return 1e3 * (time.process_time() - start) / len(ids)


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--ids", type=int, default=26 * 1024)
    options.add_argument("--width", type=int, default=16)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--write", action="store_true", help="write the results file")
    arguments = options.parse_args(argv)
    torch.set_num_threads(1)
    if not available():
        raise SystemExit("there is no C compiler here, and so nothing to compare")
    generator = torch.Generator().manual_seed(0)
    table = torch.nn.Parameter(torch.randn(arguments.rows, arguments.width, generator=generator))
    optimizer = RowWiseAdagrad([table], lr=1e-3)
    ids = [(torch.rand(arguments.ids, generator=generator) ** 3 * arguments.rows).long() for _ in range(20)]
    values = torch.randn(arguments.ids, arguments.width, generator=generator)

    def raw(each: torch.Tensor) -> torch.Tensor:
        return torch.sparse_coo_tensor(each[None], values, table.shape, check_invariants=False)

    def step(each: torch.Tensor) -> None:
        table.grad = raw(each)
        optimizer.step()

    jobs: dict[str, Work] = {
        "look up": lambda each: rows.gather(table.detach(), each),
        "sum by rows": lambda each: rows.coalesce(raw(each)),
        "sum and step": step,
    }
    spent: dict[tuple[str, bool], list[float]] = {(name, c): [] for name in jobs for c in (True, False)}
    for _ in range(arguments.rounds):
        for (name, c), found in spent.items():
            rows.available = lambda c=c: c  # type: ignore[assignment]
            take(jobs[name], ids[:3])
            found.append(take(jobs[name], ids))
    lines = ["| | C, ms | torch, ms | ratio: median (lowest to highest) |", "|---|---|---|---|"]
    for name in jobs:
        ratios = [b / a for a, b in zip(spent[name, True], spent[name, False], strict=True)]
        mine, torchs = (statistics.median(spent[name, c]) for c in (True, False))
        shown = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        lines.append(f"| {name} | {mine:.2f} | {torchs:.2f} | {shown} |")
    print("\n".join(lines))
    if arguments.write:
        path = Path(__file__).parent / f"rows_{platform.machine()}_cpu_{date.today().isoformat()}.md"
        title = f"# Rows of tables, {platform.machine()} CPU, {date.today().isoformat()}"
        ran = f"`python benchmarks/rows.py --write`, steadyrank {__version__}, torch {torch.__version__}, 1 thread."
        said = f"{arguments.ids:,} ids of width {arguments.width}, {arguments.rows:,} rows."
        path.write_text("\n".join([title, "", ran, said, "", *lines]) + "\n", encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
