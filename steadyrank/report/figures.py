"""Pictures of a run: from its readings to plotly figures, each of which skips itself, saying so, when it has none.

Every figure has the step on its x axis, so that a dip in one can be looked up in the next; rows seen and log time are
in the hover text. A task keeps its colour and its marker throughout.
"""

import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int64, Shaped

Columns = Mapping[str, np.ndarray]
"""A table of readings: "step", "time" and each name, as `RunFolder.readings` returns it."""

# Okabe and Ito's first four, a violet and a red: told apart with any kind of colour blindness, and at 3:1 or more
# against a white and a dark page alike.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A3FFC", "#C0203F")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
GREY = "#808894"
CLIPPED = "#B85C0A"
# A clip factor of 1 is the page's own colour, so that only clipping is seen; the dark page brings its own scale.
CLIP_SCALE = ((0.0, "#7a1f05"), (0.35, "#d55e00"), (0.75, "#f3c38b"), (1.0, "#eceff3"))

POINTS = 800
"""At most so many points a line; extremes are kept, so that no spike is thinned away."""
CELLS = 160
"""At most so many time bins in the heat map."""
_LOG_FROM = 30.0
_LEAST_FACTOR = 1e-6


@dataclass(frozen=True)
class Readings:
    """What the figures are drawn from: the tables "steps" and "windows", and the tasks in order."""

    steps: Columns
    windows: Columns
    tasks: Sequence[str]


@dataclass(frozen=True)
class Panel:
    """A figure with its title and how to read it, or no figure and the reason why."""

    key: str
    title: str
    how: str
    figure: go.Figure | None = None
    missing: str = ""


def find_tasks(steps: Columns, windows: Columns) -> list[str]:
    """Return the tasks that the readings name, in the order of their first reading.

    >>> find_tasks({"loss/total": np.ones(1), "loss/like": np.ones(1)}, {"auc/click": np.ones(1)})
    ['like', 'click']
    """
    prefixes = ("loss/", "auc/", "rmse/", "log_loss/", "calibration/")
    names = [n.partition("/")[2] for table in (steps, windows) for n in table if n.startswith(prefixes)]
    return [name for name in dict.fromkeys(names) if name != "total"]


def thin(values: Float[np.ndarray, " rows"], limit: int = POINTS) -> Int64[np.ndarray, " kept"]:
    """Return the indices of at most `limit` values (2 or more): the least and the greatest of each stretch.

    >>> thin(np.array([0.0, 9.0, 0.0, 0.0, -5.0, 0.0]), limit=2)
    array([1, 4])
    """
    if len(values) <= limit:
        return np.arange(len(values))
    low, high = np.where(np.isfinite(values), values, np.inf), np.where(np.isfinite(values), values, -np.inf)
    edges = np.linspace(0, len(values), limit // 2 + 1).astype(np.int64)
    kept = [a + part[a:b].argmin() for a, b in itertools.pairwise(edges) for part in (low, -high)]
    return np.unique(np.array(kept))


def auc_panel(readings: Readings) -> Panel:
    """AUC by window of each binary task, with the baseline dashed and what is attainable dotted."""
    panel = Panel(
        "auc",
        "AUC, scored before learning",
        "Each window is scored first and learned from afterwards. 0.5 is chance; higher is better. "
        "A fall to 0.5 that stays is a full divergence, a dip that recovers a micro-divergence.",
    )
    return _task_panel(panel, readings, "auc", twins=True)


def error_panel(readings: Readings) -> Panel:
    """RMSE of each regression over that of a constant (or RMSE as it is), with baseline and attainable."""
    panel = Panel(
        "error",
        "Normalised RMSE, scored before learning",
        "RMSE divided by that of the window's own mean: 1 is no better than a constant, lower is better.",
    )
    if _by_task(readings.windows, "normalised_rmse"):
        return _task_panel(panel, readings, "normalised_rmse", line=1.0, twins=True)
    plain = replace(panel, title="RMSE, scored before learning", how="In the unit that is learned; lower is better.")
    return _task_panel(plain, readings, "rmse", twins=True)


def entropy_panel(readings: Readings) -> Panel:
    """Normalised entropy by window of each binary task."""
    panel = Panel(
        "entropy",
        "Normalised entropy",
        "Log loss divided by that of the window's own rate: 1 is no better than a constant, lower is better. "
        "It shows over-confidence, which AUC does not see.",
    )
    return _task_panel(panel, readings, "normalised_entropy", line=1.0)


def calibration_panel(readings: Readings) -> Panel:
    """Calibration by window of each binary task."""
    panel = Panel(
        "calibration",
        "Calibration",
        "Sum of predictions over sum of labels: 1 is right, above 1 predicts too much.",
    )
    return _task_panel(panel, readings, "calibration", line=1.0)


def loss_panel(readings: Readings) -> Panel:
    """Loss of each task over the steps, and the total; steps whose loss was not finite are marked."""
    panel = Panel(
        "loss",
        "Training loss",
        "Loss of each batch before its update, weighted by task in the total. A jump shows where a disturbance began.",
    )
    series = {name: values for name, values in _by_task(readings.steps, "loss").items() if np.isfinite(values).any()}
    if not series:
        return _skip(panel, readings.steps, "steps", "loss")
    figure = _figure()
    for name in sorted(series, key=lambda n: n != "total"):
        colour, symbol = (GREY, "circle") if name == "total" else _look(readings, name)
        figure.add_trace(_line(readings, readings.steps["step"], series[name], name, colour, symbol))
    values = np.concatenate(list(series.values()))
    _choose_scale(figure, values)
    broken = ~np.all([np.isfinite(v) for v in series.values()], axis=0) & ~np.isnan(readings.steps["step"])
    if broken.any():
        at = np.flatnonzero(broken)
        top = np.full(len(at), values[np.isfinite(values)].max())
        marks = _line(readings, readings.steps["step"][at], top, "not finite", PALETTE[-1], "x")
        figure.add_trace(marks.update(mode="markers", marker_size=9))
    return replace(panel, figure=figure)


def clip_panel(readings: Readings) -> Panel:
    """Median and minimum of the clip factors over the parameters."""
    panel = Panel(
        "clip",
        "Clip factors",
        "What share of its step a parameter was allowed: 1 is unclipped. A minimum that dives while the median stays "
        "says that few layers are held back; both low says that the setting strangles the run.",
    )
    names, steps, factor_PT = _factors(readings)
    if not names:
        return _skip(panel, readings.steps, "steps", "clip_factor", "the optimizer clips nothing")
    log = bool(factor_PT[factor_PT >= 0].min(initial=1.0) < 1 / _LOG_FROM)
    floor = _LEAST_FACTOR if log else 0.0
    figure = _figure()
    for name, values, colour, symbol in (
        ("median", np.nanmedian(factor_PT, axis=0), GREY, SYMBOLS[0]),
        ("minimum", np.nanmin(factor_PT, axis=0), CLIPPED, SYMBOLS[1]),
    ):
        figure.add_trace(_line(readings, steps, np.maximum(values, floor), name, colour, symbol))
    figure.update_yaxes(type="log" if log else "linear", tickformat="~g", range=None if log else [0, 1.05])
    return replace(panel, figure=figure)


def clip_map_panel(readings: Readings) -> Panel:
    """Clip factors of every parameter over the steps, as a heat map."""
    panel = Panel(
        "clip_map",
        "Clip factors by parameter",
        "One row for each parameter, in the order of the model. The stronger the colour, the more it was clipped; each "
        "cell holds the least factor of a stretch of steps, and without colour it is 1.",
    )
    names, steps, factor_PT = _factors(readings)
    if not names:
        return _skip(panel, readings.steps, "steps", "clip_factor", "the optimizer clips nothing")
    edges = np.unique(np.linspace(0, len(steps), min(len(steps), CELLS) + 1).astype(np.int64))[:-1]
    cells_PT = np.fmin.reduceat(factor_PT, edges, axis=1)
    log = bool(cells_PT[cells_PT >= 0].min(initial=1.0) < 1 / _LOG_FROM)
    depth = np.log10(np.maximum(cells_PT, _LEAST_FACTOR)) if log else cells_PT
    low = float(np.floor(np.nanmin(depth))) if log else 0.0
    ticks = np.arange(low, 1) if log else np.array([0.0, 0.5, 1.0])
    shown = [f"{10**t if log else t:g}" for t in ticks]
    rows = [_text(name) for name in names]
    figure = _figure()
    figure.add_trace(
        go.Heatmap(
            x=steps[edges],
            y=rows,
            z=depth.round(3),
            customdata=cells_PT,
            coloraxis="coloraxis",
            hovertemplate="%{y}<br>factor %{customdata:.3~g}, step %{x:,}<extra></extra>",
        )
    )
    labels = [_text(_short(name)) for name in names]
    figure.update_yaxes(
        type="category", tickvals=rows, ticktext=labels, autorange="reversed", automargin=True, showgrid=False
    )
    bar = {"tickvals": ticks, "ticktext": shown, "thickness": 10, "outlinewidth": 0, "len": 1, "xpad": 4}
    scale = [list(stop) for stop in CLIP_SCALE]
    figure.update_layout(
        height=min(120 + 18 * len(names), 1800),
        coloraxis={"cmin": low, "cmax": 0.0 if log else 1.0, "colorscale": scale, "colorbar": bar},
    )
    return replace(panel, figure=figure)


def speed_panel(readings: Readings) -> Panel:
    """Rows per second over the steps."""
    panel = Panel("speed", "Rows per second", "Rows trained on per second of wall time, from one reading to the next.")
    values = readings.steps.get("speed/rows_per_s")
    if values is None or not np.isfinite(values).any():
        return _skip(panel, readings.steps, "steps", "speed/rows_per_s")
    figure = _figure()
    figure.add_trace(_line(readings, readings.steps["step"], values, "rows per second", GREY, "circle"))
    figure.update_layout(showlegend=False)
    figure.update_yaxes(rangemode="tozero")
    return replace(panel, figure=figure)


PANELS: tuple[Callable[[Readings], Panel], ...] = (
    auc_panel,
    error_panel,
    loss_panel,
    entropy_panel,
    calibration_panel,
    clip_panel,
    clip_map_panel,
    speed_panel,
)


def draw(readings: Readings, events: Sequence[int] = ()) -> list[Panel]:
    """Return every panel, on one common x range, with a thin line at the steps of `events`."""
    panels = [make(readings) for make in PANELS]
    ends = [int(t["step"][i]) for t in (readings.steps, readings.windows) if len(t["step"]) for i in (0, -1)]
    lines = [
        {"type": "line", "x0": step, "x1": step, "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 1, "dash": "dot"}}
        for step in dict.fromkeys(events)
    ]
    pad = 0.01 * max(max(ends) - min(ends), 1) if ends else 0.0
    for panel in panels:
        if panel.figure is not None:
            panel.figure.update_layout(
                shapes=[*panel.figure.layout.shapes, *lines], xaxis_range=[min(ends) - pad, max(ends) + pad]
            )
    return panels


def _task_panel(
    panel: Panel, readings: Readings, metric: str, *, line: float | None = None, twins: bool = False
) -> Panel:
    """Draw one metric of every task over the windows; `line` is where it is no better than nothing."""
    series = {n: v for n, v in _by_task(readings.windows, metric).items() if np.isfinite(v).any()}
    if not series:
        return _skip(panel, readings.windows, "windows", metric, "no task of that kind, or no window was finished")
    figure = _figure()
    for name, values in series.items():
        figure.add_trace(_line(readings, readings.windows["step"], values, name, *_look(readings, name)))
    drawn = list(series.values())
    for kind, dash in (("baseline", "dash"), ("attainable", "dot")) if twins else ():
        drawn += _add_twins(figure, readings, metric, kind, dash)
    if line is not None:
        figure.add_hline(y=line, line={"color": GREY, "width": 1})
    _choose_scale(figure, np.concatenate(drawn))
    return replace(panel, figure=figure)


def _add_twins(figure: go.Figure, readings: Readings, metric: str, kind: str, dash: str) -> list[np.ndarray]:
    """Draw what the baseline reaches, or what is attainable, beside each task's line; the legend explains the dash."""
    found = {name: _twin(readings.windows, kind, metric, name) for name in _by_task(readings.windows, metric)}
    drawn = {name: values for name, values in found.items() if values is not None}
    for name, values in drawn.items():
        colour, symbol = _look(readings, name)
        trace = _line(readings, readings.windows["step"], values, f"{name}, {kind}", colour, symbol)
        trace.update(mode="lines", line_dash=dash, line_width=1.5, showlegend=False, legendgroup=_text(name))
        figure.add_trace(trace)
    if drawn:
        key = {"color": GREY, "dash": dash, "width": 1.5}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", name=kind, line=key, legendrank=2000))
    return list(drawn.values())


def _twin(windows: Columns, kind: str, metric: str, task: str) -> np.ndarray | None:
    """Return the baseline's or attainable metric of a task; a normalised RMSE is had from the plain ones."""
    if metric != "normalised_rmse":
        found = windows.get(f"{kind}_{metric}/{task}")
    else:
        columns = [windows.get(f"{n}/{task}") for n in (f"{kind}_rmse", "rmse", "normalised_rmse")]
        found = _rescale(*columns) if all(c is not None for c in columns) else None  # type: ignore[arg-type]  # all are there
    return found if found is not None and np.isfinite(found).any() else None


def _rescale(
    other: Float[np.ndarray, " rows"], rmse: Float[np.ndarray, " rows"], normalised: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """Return `other * normalised / rmse`: another RMSE over that of the same constant; NaN where rmse is 0."""
    rescaled: np.ndarray = other * normalised / np.where(rmse > 0, rmse, np.nan)
    return rescaled


def _by_task(table: Columns, metric: str) -> dict[str, np.ndarray]:
    return {name[len(metric) + 1 :]: values for name, values in table.items() if name.startswith(metric + "/")}


def _factors(
    readings: Readings,
) -> tuple[list[str], Shaped[np.ndarray, " kept"], Float[np.ndarray, "parameters kept"]]:
    """Return the clipped parameters' names, the steps with a reading, and the factors (P parameters, T steps)."""
    series = {n: v for n, v in _by_task(readings.steps, "clip_factor").items() if np.isfinite(v).any()}
    if not series:
        return [], np.zeros(0, np.int64), np.zeros((0, 0))
    factor_PT = np.stack([np.where(np.isfinite(v), v, np.nan) for v in series.values()])
    kept = np.isfinite(factor_PT).any(axis=0)
    return list(series), readings.steps["step"][kept], factor_PT[:, kept]


def _figure() -> go.Figure:
    """Return an empty figure in the house style; the page sets ink and grid for light and dark."""
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=300,
        margin={"l": 56, "r": 12, "t": 8, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": GREY},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left"},
        hoverlabel={"namelength": -1},
        showlegend=True,
    )
    axis = {"gridcolor": "rgba(128,136,148,0.25)", "zeroline": False, "showline": False, "ticks": ""}
    figure.update_xaxes(title={"text": "step", "standoff": 6}, showgrid=False, **axis)
    figure.update_yaxes(**axis)
    return figure


def _line(readings: Readings, steps: np.ndarray, values: np.ndarray, name: str, colour: str, symbol: str) -> go.Scatter:
    values = np.where(np.isfinite(values), values, np.nan)
    kept = thin(values)
    few = len(kept) <= 60
    return go.Scatter(
        x=steps[kept],
        y=values[kept],
        customdata=_when(readings.windows, steps[kept]),
        mode="lines+markers" if few else "lines",
        marker={"symbol": symbol, "size": 5, "color": colour},
        name=_text(name),
        legendgroup=_text(name),
        line={"color": colour, "width": 2},
        hovertemplate="%{y:.4~g}<br>step %{x:,}%{customdata}",
    )


def _when(windows: Columns, steps: np.ndarray) -> list[str]:
    """Return rows seen and log time at each step, read off the windows; empty when they do not say."""
    if not {"log/rows", "log/time_s"} <= windows.keys() or not len(windows["step"]):
        return [""] * len(steps)
    rows = np.interp(steps, windows["step"], windows["log/rows"])
    seconds = np.interp(steps, windows["step"], windows["log/time_s"])
    known = np.isfinite(rows) & np.isfinite(seconds) & (np.abs(seconds) < 1e11)
    stamps = np.where(known, seconds, 0).astype("datetime64[s]").astype("datetime64[m]").astype(str)
    return [
        f"<br>{row:,.0f} rows, log time {stamp.replace('T', ' ')}" if good else ""
        for row, stamp, good in zip(rows, stamps, known, strict=True)
    ]


def _look(readings: Readings, task: str) -> tuple[str, str]:
    place = list(readings.tasks).index(task) if task in readings.tasks else len(readings.tasks)
    return PALETTE[place % len(PALETTE)], SYMBOLS[place % len(SYMBOLS)]


def _choose_scale(figure: go.Figure, values: np.ndarray) -> None:
    """Make the y axis logarithmic where all is positive and the range is wide."""
    finite = values[np.isfinite(values)]
    if finite.min() > 0 and finite.max() > _LOG_FROM * finite.min():
        figure.update_yaxes(type="log", tickformat="~g", dtick=1 if finite.max() > 300 * finite.min() else None)


def _skip(panel: Panel, table: Columns, name: str, metric: str, reason: str = "") -> Panel:
    why = f"no reading {metric} in the table {name}" if len(table["step"]) else f"the table {name} has no rows"
    return replace(panel, missing=why + (f" ({reason})" if reason else ""))


def _short(name: str, limit: int = 28) -> str:
    return name if len(name) <= limit else "…" + name[-limit + 1 :]


def _text(name: Any) -> str:
    """Return a name as plotly shows it literally: it reads tags and entities in any text."""
    return html.escape(str(name), quote=False)
