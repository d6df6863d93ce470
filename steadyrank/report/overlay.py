"""The curves of several runs over one another: one figure for each task and metric, one colour for each run."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..runs import RunFolder
from .figures import Section, find_tasks, read_tables
from .plots import GREY, PALETTE, Columns, Panel, Readings, choose_scale, line, look, new_figure, share_axis

Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""A line for each run: where, and what."""

_BY_TASK = {
    "auc": ("AUC of", "By window, scored before learning: 0.5 is chance, higher is better."),
    "normalised_entropy": ("Normalised entropy of", "1 is no better than a constant, lower is better."),
    "normalised_rmse": ("Normalised RMSE of", "1 is no better than a constant, lower is better."),
}


def draw_runs(folders: Mapping[str, RunFolder]) -> list[Section]:
    """Return the panels that compare runs; those for which no run has readings say so.

    The x axis holds steps where the runs see as many rows in a step, rows where they do not.
    """
    runs = {}
    for name, folder in folders.items():
        tables = read_tables(folder)
        runs[name] = Readings(tables, find_tasks(tables["steps"], tables["windows"]))
    if by_rows := _differ([_rows_per_step(run.table("windows")) for run in runs.values()]):
        runs = {name: _in_rows(run) for name, run in runs.items()}
    draw = lambda panel, curves, rule=None: _overlay(panel, curves, runs, by_rows, rule)  # noqa: E731
    tasks = dict.fromkeys(task for run in runs.values() for task in run.tasks)
    learned: list[Panel] = []
    for task in tasks:
        for metric, (title, how) in _BY_TASK.items():
            curves = {name: _column(run, "windows", f"{metric}/{task}") for name, run in runs.items()}
            if any(len(steps) for steps, _ in curves.values()):
                key = f"{metric}_{len(learned)}"
                learned.append(draw(Panel(key, f"{title} {task}", how), curves, None if metric == "auc" else 1.0))
    others = [draw(panel, curves, rule) for panel, curves, rule in _over_all(runs)]
    share_axis([*learned, *others], [table for run in runs.values() for table in run.tables.values()])
    return [Section("What was learned", learned), Section("How it went", others)]


def _over_all(runs: Mapping[str, Readings]) -> list[tuple[Panel, Curves, float | None]]:
    """Return what is not by task: title and caption, lines, and where a thin line helps."""
    loss = Panel("loss", "Training loss, all tasks", "A jump shows where a disturbance began.")
    clip = Panel(
        "clip",
        "Least clip factor",
        "That of the layer that was clipped most: 1 is unclipped. A run that clips nothing has no line.",
    )
    worst = Panel(
        "update",
        "Update over weight, worst layer",
        "How far one step moved the layer that moved furthest, relative to its size. Steady training lies flat.",
    )
    room = Panel(
        "headroom",
        "Headroom",
        "How many times larger the step could have been before the loss rises; below 1 it already overshoots.",
    )
    return [
        (loss, {name: _column(run, "steps", "loss/total") for name, run in runs.items()}, None),
        (clip, {name: _extreme(run, "steps", "clip_factor", np.fmin) for name, run in runs.items()}, None),
        (worst, {name: _extreme(run, "dynamics", "update_over_weight", np.fmax) for name, run in runs.items()}, None),
        (room, {name: _column(run, "curvature", "headroom/total") for name, run in runs.items()}, 1.0),
    ]


def _overlay(panel: Panel, curves: Curves, runs: Mapping[str, Readings], by_rows: bool, rule: float | None) -> Panel:
    """Draw one line for each run that has readings, in the run's colour; further runs than colours are dashed."""
    figure = new_figure()
    drawn = []
    for place, (name, (steps, values)) in enumerate(curves.items()):
        if np.isfinite(values).any():
            colour, symbol = look(place)
            dash = ("solid", "dash", "dot")[place // len(PALETTE) % 3]
            figure.add_trace(line(runs[name], steps, values, [name], colour, symbol=symbol, dash=dash, of=len(runs)))
            drawn.append(values)
    if not drawn:
        return replace(panel, missing="no run has readings of it")
    if by_rows:
        figure.update_traces(hovertemplate="%{y:.4~g}<br>%{x:,} rows", customdata=None)
        figure.update_xaxes(title_text="rows")
    if rule is not None:
        figure.add_hline(y=rule, line={"color": GREY, "width": 1})
    choose_scale(figure, np.concatenate(drawn))
    return replace(panel, figure=figure)


def _column(run: Readings, table: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    columns = run.table(table)
    return (columns["step"], columns[name]) if name in columns else (np.zeros(0, np.int64), np.zeros(0))


def _extreme(run: Readings, table: str, reading: str, of: np.ufunc) -> tuple[np.ndarray, np.ndarray]:
    """Return the least or the greatest over all layers at each step."""
    series = run.series(table, reading)
    if not series:
        return np.zeros(0, np.int64), np.zeros(0)
    worst: np.ndarray = of.reduce(np.stack(list(series.values())))
    return run.table(table)["step"], worst


def _rows_per_step(windows: Columns) -> float:
    if "log/rows" not in windows or not len(windows["step"]):
        return np.nan
    return float(windows["log/rows"][-1] / windows["step"][-1])


def _differ(sizes: list[float]) -> bool:
    """Whether runs see more than a tenth more rows in a step than others; not where any does not say."""
    return bool(np.isfinite(sizes).all() and max(sizes) > 1.1 * min(sizes))


def _in_rows(run: Readings) -> Readings:
    """Return the readings with the rows seen in the place of the steps."""
    windows = run.table("windows")
    at, seen = [0, *windows["step"]], [0.0, *windows["log/rows"]]
    tables = {
        name: {**columns, "step": np.interp(columns["step"], at, seen).astype(np.int64)}
        for name, columns in run.tables.items()
    }
    return Readings(tables, run.tasks)
