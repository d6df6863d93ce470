"""The whole study of docs/stability.md, or a part of it: every ladder of recipes/stability/, one after the other.

    python benchmarks/stability/paper.py [--quick] [--data FOLDER] [--out FOLDER] [--only NAME ...] [--write]

Stopped or killed, it goes on where it was. `--data` names the folder with kuairand.parquet, online_retail.parquet and
flights.parquet; a log that is not there is left out, which is said. `--quick` trains a small part of the study on
shorter streams, in under ten minutes. `--write` puts the results beside this script, each with its settings, commit and
hardware, and makes docs/stability.md anew.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from steadyrank import __version__
from steadyrank.ladder import Board, Found, Ladder, climb, load_ladder, print_found, showing, write_page
from steadyrank.ladder.laboratory import CELLS, OUTCOMES
from steadyrank.ladder.scores import choose, score_ladder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECIPES = ROOT / "recipes" / "stability"
LOGS = ("kuairand", "online_retail", "flights")
ORDER = (
    *("tune", "paper_large_dcn", "kuairand", "ablation", "modern", "online_retail", "paper_large", "paper_small"),
    *("flights", "bound", "thresholds", "incidents", "figures"),
)
FULL_SIZE = "paper_full_size"
"""On a GPU, and only when it is asked for."""
TUNED = {"gc": ("max_norm", 0.1), "agc": ("clipping", 0.01), "agc_adam": ("clipping", 0.01)}
"""What tune.toml chooses, by family: the option of its clip, and its value in the paper_*.toml."""


class Part(NamedTuple):
    """One ladder of the study."""

    name: str
    overrides: list[str]


def plan(name: str, out: Path, data: Path | None, quick: bool) -> Part | None:
    """Return how a ladder is trained; None where its log is not there."""
    overrides = list(QUICK.get(name, ())) if quick else []
    if name in LOGS:
        log = data / f"{name}.parquet" if data else None
        if log is None or not log.exists():
            print(f"{name}: left out, since there is no {name}.parquet; give its folder as --data")
            return None
        overrides.append(f"data.path={json.dumps(str(log))}")
    if name.startswith("paper_") and name != FULL_SIZE:
        overrides += tuned(name.removeprefix("paper_"), out)
    return Part(name, overrides)


QUICK: Mapping[str, Sequence[str]] = {
    "paper_large_dcn": [
        "data.rows=76_800",
        "data.rows_per_day=7_680",
        "ladder.seeds=2",
        *(f"ladder.optimizers.{name}.rates={rates}" for name, rates in {
            "adagrad": [0.0125, 0.05, 0.2],
            "gc": [0.05, 0.2, 0.8],
            "agc": [0.1, 0.4, 1.6],
            "lamb": [0.005, 0.02],
            "clippy": [0.2, 0.8, 3.2],
            "clippy_delayed": [0.05, 0.2],
            "clippy_tight": [0.2, 0.8, 3.2],
            "adam": [0.0005, 0.002, 0.008],
            "agc_adam": [0.0005, 0.002, 0.008],
            "clippy_adam": [0.002, 0.016, 0.128],
        }.items()),
    ],
}  # fmt: skip


def tuned(model: str, out: Path) -> list[str]:
    """Return what the tuning chose for a model, as overrides; the rates move with the limit, as the gradients do."""
    path = out / "tune" / "chosen.json"
    if not path.exists():
        return []
    found = []
    for family, value in json.loads(path.read_text())[model].items():
        option, usual = TUNED[family]
        place = f"ladder.optimizers.{family}"
        found.append(f"{place}.set.optimizer.dense.clip.{option}={value}")
        if value != usual and family != "agc_adam":
            rates = load_ladder(RECIPES / f"paper_{model}.toml").config.optimizers[family].rates or ()
            found.append(f"{place}.rates={[float(f'{rate * usual / value:g}') for rate in rates]}")
    return found


def choose_settings(found: Found) -> dict[str, dict[str, float]]:
    """Return the limit of each tuned family with the best validation quality, by model."""
    chosen: dict[str, dict[str, float]] = {}
    for score in choose(score_ladder(found.outcomes)):
        chosen.setdefault(score.model, {})[score.family] = float(score.optimizer.split()[-1])
    return chosen


def run_part(part: Part, out: Path) -> tuple[Ladder, Found]:
    """Train one ladder, and write its page."""
    ladder, board, folder = load_ladder(RECIPES / f"{part.name}.toml", part.overrides), Board(), out / part.name
    # The cells that modern.toml has from paper_large_dcn.toml are the same runs.
    cells = out / "paper_large_dcn" / CELLS if part.name == "modern" else None
    with showing(board):
        found = climb(ladder, folder, board=board, cells_in=cells)
    if part.name == "tune":
        (folder / "chosen.json").write_text(json.dumps(choose_settings(found), indent=1) + "\n")
    if not found.whole:
        print("stopped; go on with the same command")
        sys.exit(130)
    print_found(found, folder)
    print(f"page: {write_page(ladder, found, folder)}")
    return ladder, found


def facts(part: Part, ladder: Ladder) -> dict[str, Any]:
    """Return what the results are of."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "command": f"python benchmarks/stability/paper.py --only {part.name}",
        "overrides": [each for each in part.overrides if not each.startswith("data.path=")],
        "commit": commit,
        "steadyrank": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "date": time.strftime("%Y-%m-%d"),
        "cells": len(ladder.cells()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", choices=(*ORDER, FULL_SIZE))
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    out = given.out or ROOT / "runs" / ("paper-quick" if given.quick else "paper")
    names = given.only or (tuple(QUICK) if given.quick else ORDER)
    for name in names:
        part = plan(name, out, given.data, given.quick)
        if part is None:
            continue
        begun = time.monotonic()
        print(f"--- {name}", flush=True)
        ladder, found = run_part(part, out)
        seconds = time.monotonic() - begun
        print(f"--- {name}: {len(found.outcomes)} cells, {seconds:.0f} s", flush=True)
        if given.write and not given.quick:
            (HERE / f"{name}.csv").write_text((out / name / OUTCOMES).read_text())
            (HERE / f"{name}.json").write_text(json.dumps(facts(part, ladder), indent=1) + "\n")
            if name == "figures":
                subprocess.run([sys.executable, HERE / "dynamics.py", "--from", out / name], check=True)
    if given.write and not given.quick:
        subprocess.run([sys.executable, HERE / "page.py"], check=True)


if __name__ == "__main__":
    main()
