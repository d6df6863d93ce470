"""Read the series of the page's single runs off their run folders, into figure_*.csv beside this script.

    python benchmarks/stability/dynamics.py --from runs/paper/figures

The ladder is recipes/stability/figures.toml; paper.py trains it. page.py draws what this writes.
"""

import argparse
import csv
import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from steadyrank.errors import SteadyRankError
from steadyrank.ladder import Cell, load_ladder
from steadyrank.ladder.laboratory import CELLS, LADDER
from steadyrank.report.plots import merge_steps
from steadyrank.runs import RunFolder

HERE = Path(__file__).resolve().parent
TASK = "click"
AVERAGED, MEDIAN = 4, 10
"""Readings of the loss, and of a factor, of which one point is made."""
AREAS = (
    *("gradient_norm", "gradient_over_weight", "direction_max"),
    *("factor_gc", "factor_agc", "factor_lamb", "factor_clippy"),
)
PARTS = (*(f"cross {i}" for i in range(2)), *(f"trunk {i}" for i in range(4)), "towers")
VERDICTS = ("healthy", "micro_divergence", "full_divergence", "never_learned")
Columns = Mapping[str, np.ndarray]


def loss_points(steps: Columns) -> Iterable[Sequence[object]]:
    """Return step and loss, each the mean of a few readings."""
    step_N, loss_N = steps["step"], steps[f"loss/{TASK}"]
    for first in range(0, len(step_N) - AVERAGED + 1, AVERAGED):
        part = slice(first, first + AVERAGED)
        yield int(step_N[part][-1]), float(loss_N[part].mean())


def auc_points(windows: Columns) -> Iterable[Sequence[object]]:
    """Return step and AUC of each window."""
    yield from ((int(s), float(v)) for s, v in zip(windows["step"], windows[f"auc/{TASK}"], strict=True))


def top_layer(dynamics: Columns) -> str:
    """Return the weight matrix of the last layer that all tasks share.

    >>> top_layer({"weight_norm/trunk.layers.linear_0.weight": 0, "weight_norm/trunk.layers.linear_1.weight": 0})
    'trunk.layers.linear_1.weight'
    """
    names = [name.partition("/")[2] for name in dynamics if name.startswith("weight_norm/trunk.")]
    return [name for name in names if name.endswith(".weight")][-1]


def layer_points(dynamics: Columns) -> Iterable[Sequence[object]]:
    """Return step and what is read of the top shared layer."""
    layer = top_layer(dynamics)
    read = [dynamics[f"{area}/{layer}"] for area in AREAS]
    for at in np.flatnonzero(~np.isnan(read[0])):
        yield int(dynamics["step"][at]), *(float(values[at]) for values in read)


def factor_points(steps: Columns) -> Iterable[tuple[str, int, float]]:
    """Return layer, step and clip factor of each shared weight matrix and of the towers, the median of a few readings.

    From the input up.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in PARTS}
    for name, values in steps.items():
        layer = name.removeprefix("clip_factor/")
        if layer != name and layer.endswith(".weight") and (part := part_of(layer)):
            parts.setdefault(part, []).append(values)
    for name, of in parts.items():
        for first in range(0, (len(steps["step"]) - MEDIAN + 1) * bool(of), MEDIAN):
            part = slice(first, first + MEDIAN)
            yield name, int(steps["step"][part][-1]), float(np.median([values[part] for values in of]))


def part_of(layer: str) -> str:
    """Return what a weight matrix is called on the page; empty where it is not shown.

    >>> [part_of(f"{name}.weight") for name in ("cross.layers.0", "trunk.layers.linear_3", "towers.like", "norm")]
    ['cross 0', 'trunk 3', 'towers', '']
    """
    if layer.startswith("towers."):
        return "towers"
    found = re.fullmatch(r"(cross|trunk)\.layers\.(?:linear_)?(\d+)\.weight", layer)
    return f"{found[1]} {found[2]}" if found else ""


def read_runs(folder: Path) -> dict[str, tuple[Cell, RunFolder]]:
    """Return the cells of a ladder by the name of their optimizer, with their run folders."""
    cells = load_ladder(folder / LADDER).cells()
    return {cell.optimizer: (cell, RunFolder.open(folder / CELLS / cell.name)) for cell in cells}


def run_row(name: str, cell: Cell, run: RunFolder) -> list[object]:
    """Return a run's optimizer and rate, and its tasks by their verdict."""
    tasks = (run.summary() or {}).get("tasks", {})
    found = {name: task.get("verdict", {}).get("verdict") for name, task in tasks.items()}
    told = [" ".join(task for task, verdict in found.items() if verdict == kind) for kind in VERDICTS]
    return [name, cell.config.optimizer.dense.name, cell.rate, *told]


def make_tables(runs: Mapping[str, tuple[Cell, RunFolder]]) -> dict[str, tuple[list[str], list[Sequence[object]]]]:
    """Return each file's header and rows."""
    tables: dict[str, tuple[list[str], list[Sequence[object]]]] = {
        "runs": (["run", "optimizer", "rate", *VERDICTS], []),
        "loss": (["run", "step", "loss"], []),
        "auc": (["run", "step", "auc"], []),
        "layer": (["run", "step", *AREAS], []),
        "factors": (["layer", "step", "factor"], []),
    }
    for name, (cell, run) in runs.items():
        tables["runs"][1].append(run_row(name, cell, run))
        steps, dynamics = (merge_steps(run.readings(table)) for table in ("steps", "dynamics"))
        tables["loss"][1].extend((name, *point) for point in loss_points(steps))
        tables["auc"][1].extend((name, *point) for point in auc_points(run.readings("windows")))
        if name == "full":
            tables["layer"][1].extend((name, *point) for point in layer_points(dynamics))
        if name == "clippy":
            tables["factors"][1].extend(factor_points(steps))
    return tables


def to_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a CSV file with four digits."""
    out = io.StringIO()
    told = [[f"{value:.4g}" if isinstance(value, float) else value for value in row] for row in rows]
    csv.writer(out, lineterminator="\n").writerows([header, *told])
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", type=Path, default=HERE.parents[1] / "runs" / "paper" / "figures")
    parser.add_argument("--out", type=Path, default=HERE, help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        found = make_tables(read_runs(given.folder))
    except SteadyRankError as error:
        sys.exit(str(error))
    for name, (header, rows) in found.items():
        (given.out / f"figure_{name}.csv").write_text(to_text(header, rows))


if __name__ == "__main__":
    main()
