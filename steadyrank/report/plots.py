"""How every figure is drawn: lines by task and heat maps by layer, in one look, on one axis of steps.

A figure that has no readings skips itself, saying so. A task keeps its colour and its marker throughout; rows seen and
log time are in the hover text. Shapes: P parameters (or other rows of a map), T steps with a reading.
"""

import html
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int64, Shaped

Columns = Mapping[str, np.ndarray]
"""A table of readings: "step", "time" and each name, as `RunFolder.readings` returns it."""

# Okabe and Ito's first four, then six that keep 3:1 against a white and a dark page alike.
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A3FFC", "#C0203F"),
    *("#7C8500", "#6A7FDB", "#A0622D", "#0E8A92"),
)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "triangle-down", "pentagon", "hexagon")
GREY = "#808894"
DASHES = {"baseline": "dash", "attainable": "dot", "largest": "dot", "next window": "dash", "lowest": "solid"}
"""How the companions of a task's line are drawn, by their kind."""
LEGEND_ONLY = "legend"
"""The mark of a trace that is only an entry of plotly's own legend."""

POINTS = 800
"""At most so many points a line; extremes are kept, so that no spike is thinned away."""
POINTS_IN_ALL = 8_000
"""At most so many points a figure (but 200 a line), so that twenty tasks make no heavier page than ten."""
CELLS = 160
"""At most so many time bins in a heat map."""
ROWS = 50
"""At most so many rows in a heat map, those that went furthest."""
LINES = 100
"""At most so many names a figure, the first; nobody could tell more apart, and a browser would not draw them."""
CROWDED = 6
"""Of more tasks than this, the companions of each line are hidden until asked for."""
LARGEST = float(np.finfo(np.float32).max)
"""Figures are in float32, to be half as large."""
WIDE_SCALE = 30.0
"""A span of values beyond this factor is drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Readings:
    """What the figures are drawn from: the tables of readings by name, and the tasks in order."""

    tables: Mapping[str, Columns]
    tasks: Sequence[str]

    def table(self, name: str) -> Columns:
        """Return a table, one without rows where the run has none of that name."""
        return self.tables.get(name, {"step": np.zeros(0, np.int64), "time": np.zeros(0)})

    def series(self, table: str, reading: str) -> dict[str, np.ndarray]:
        """Return one reading's columns by what stands after its slash, those with any finite value."""
        columns = self.table(table)
        found = {n[len(reading) + 1 :]: v for n, v in columns.items() if n.startswith(reading + "/")}
        return {name: values for name, values in found.items() if np.isfinite(values).any()}

    def last_step(self) -> int:
        """Return the last step of any table, 0 when there is none."""
        return max((int(t["step"][-1]) for t in self.tables.values() if len(t["step"])), default=0)


@dataclass(frozen=True)
class Panel:
    """A figure with its title and how to read it, or no figure and the reason why; `wide` takes the page's width."""

    key: str
    title: str
    how: str
    figure: go.Figure | None = None
    missing: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Heat:
    """How a heat map is coloured.

    Args:
        light, dark: Colours from the lowest to the highest value, on a light and on a dark page.
        unit: What a cell's number is called.
        least: The least value of a stretch of steps is the one to be seen; the greatest otherwise.
        ends: The values at both ends of the scale; from the readings when None.
        scale: "log", "linear", or "auto": logarithmic where the values span more than a factor of 30.
        floor: On a logarithmic scale, what lies below counts as this.
        relative: Of too many rows, those are kept that strayed furthest from their own median, not those with the
            greatest values.
    """

    light: Sequence[str]
    dark: Sequence[str]
    unit: str
    least: bool = False
    ends: tuple[float, float] | None = None
    scale: Literal["linear", "log", "auto"] = "linear"
    floor: float = 1e-6
    relative: bool = False


def merge_steps(columns: Columns) -> Columns:
    """Return the columns with one row for each step: instruments that read at the same step write a row each.

    >>> nan = np.nan
    >>> columns = {"step": np.array([1, 1, 2]), "a/x": np.array([5.0, nan, 6.0]), "a/y": np.array([nan, 7.0, 8.0])}
    >>> {name: values.tolist() for name, values in merge_steps(columns).items()}
    {'step': [1, 2], 'a/x': [5.0, 6.0], 'a/y': [7.0, 8.0]}
    """
    steps, place = np.unique(columns["step"], return_inverse=True)
    if len(steps) == len(place):
        return columns
    merged = {name: np.full(len(steps), np.nan) for name in columns}
    for name, values in columns.items():
        known = ~np.isnan(values)
        merged[name][place[known]] = values[known]
    return {**merged, "step": steps}


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


def curves(
    panel: Panel,
    readings: Readings,
    table: str,
    reading: str,
    *,
    companions: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    rule: float | None = None,
    reason: str = "",
) -> Panel:
    """Draw one reading of every task (or gate, or table) over the steps.

    Args:
        panel: Title and caption.
        readings: Where the columns are.
        table: The table, as "windows".
        reading: The reading, as "auc"; its columns are `auc/<name>`.
        companions: By kind (a key of DASHES): what is drawn beside each name's line, in its colour.
        rule: A value that means something: a thin line across.
        reason: Why a run may not have the reading, where that is known.
    """
    series = readings.series(table, reading)
    if not series:
        return skip(panel, readings.table(table), table, reading, reason)
    if len(series) > LINES:
        panel = replace(panel, how=f"{panel.how} Shown are the first {LINES} of {len(series)}.")
        series = dict(itertools.islice(series.items(), LINES))
    figure = new_figure()
    steps = readings.table(table)["step"]
    places = {name: i for i, name in enumerate([*readings.tasks, *(n for n in series if n not in readings.tasks)])}
    drawn = {kind: {n: v for n, v in found.items() if n in series} for kind, found in (companions or {}).items()}
    count = len(series) + sum(map(len, drawn.values()))
    for name in sorted(series, key=lambda n: (n != "total", places[n])):
        colour, symbol = (GREY, "circle") if name == "total" else look(places[name])
        figure.add_trace(line(readings, steps, series[name], [name], colour, symbol=symbol, of=count))
        for kind, values in ((kind, found[name]) for kind, found in drawn.items() if name in found):
            other = line(readings, steps, values, [name, kind], colour, dash=DASHES[kind], of=count)
            figure.add_trace(other.update(visible="legendonly" if len(series) > CROWDED else True))
    for kind in (kind for kind, found in drawn.items() if found):
        # For plotly's own legend, which a PNG has: one entry for each kind of companion. The page makes its own.
        key = {"color": GREY, "dash": DASHES[kind], "width": 1.5}
        entry = go.Scatter(x=[None], y=[None], mode="lines", name=kind, line=key, legendrank=2000, meta=LEGEND_ONLY)
        figure.add_trace(entry)
    if rule is not None:
        figure.add_hline(y=rule, line={"color": GREY, "width": 1})
    figure.update_layout(showlegend=list(series) != ["total"] or count > 1)
    choose_scale(figure, np.concatenate([*series.values(), *(v for found in drawn.values() for v in found.values())]))
    return replace(panel, figure=figure)


def heat_map(panel: Panel, readings: Readings, table: str, reading: str, heat: Heat, reason: str = "") -> Panel:
    """Draw one reading of every layer (or pair, expert, table) over the steps: one row each, in the model's order."""
    series = readings.series(table, reading)
    if not series:
        return skip(panel, readings.table(table), table, reading, reason)
    value_PT = np.stack(list(series.values()))
    kept_T = np.isfinite(value_PT).any(axis=0)
    steps, value_PT = readings.table(table)["step"][kept_T], _fill(value_PT[:, kept_T], heat)
    worst = np.fmin if heat.least else np.fmax
    names, value_PT, note = _furthest(list(series), value_PT, heat)
    edges = np.unique(np.linspace(0, len(steps), min(len(steps), CELLS) + 1).astype(np.int64))[:-1]
    cell_PT = worst.reduceat(value_PT, edges, axis=1)
    depth_PT, scale = _coloured(cell_PT, heat)
    gap = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
    rows = [text(name) for name in names]
    figure = new_figure()
    figure.add_trace(
        go.Heatmap(
            x=np.append(steps[edges], steps[-1] + gap),
            y=rows,
            z=depth_PT.astype(np.float32).round(3),
            customdata=cell_PT.astype(np.float32),
            coloraxis="coloraxis",
            hovertemplate=f"%{{y}}<br>{heat.unit} %{{customdata:.3~g}}, step %{{x:,}}<extra></extra>",
        )
    )
    labels = [text(shorten(name, 42)) for name in names]
    narrow = [text(shorten(name, 20)) for name in names]
    figure.update_yaxes(
        type="category", tickvals=rows, ticktext=labels, autorange="reversed", automargin=True, showgrid=False
    )
    figure.update_layout(height=70 + max(18 * len(names), 36), coloraxis=scale, showlegend=False)
    meta = {"light": _stops(heat.light), "dark": _stops(heat.dark), "unit": heat.unit, "narrow": narrow}
    figure.update_layout(meta=meta)  # what the page needs in a narrow window or on a dark page
    return replace(panel, figure=figure, how=panel.how + note, wide=True)


def new_figure(figure: go.Figure | None = None, height: int = 300) -> go.Figure:
    """Return an empty figure (or the one given) in the house style; the page sets ink and grid for light and dark."""
    figure = go.Figure() if figure is None else figure
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 12, "t": 8, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": GREY},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left"},
        hoverlabel={"namelength": -1},
        showlegend=True,
    )
    axis = {"gridcolor": "rgba(128,136,148,0.25)", "zeroline": False, "showline": False, "ticks": ""}
    figure.update_xaxes(title={"text": "step", "standoff": 6}, showgrid=False, tickformat=",", **axis)
    figure.update_yaxes(**axis)
    return figure


def line(
    readings: Readings,
    steps: Shaped[np.ndarray, " rows"],
    values: Float[np.ndarray, " rows"],
    keys: Sequence[str],
    colour: str,
    *,
    symbol: str = "circle",
    dash: str = "solid",
    of: int = 1,
) -> go.Scatter:
    """Return one line; what is not finite in float32 is a gap.

    Args:
        readings: Whose windows tell rows and log time, for the hover text.
        steps: Where.
        values: What.
        keys: The names in the legend that show and hide it: its own, and that of its kind.
        colour: Of line and markers.
        symbol: Of the markers, which are drawn where the points are few.
        dash: Of the line.
        of: How many lines share the figure's points.
    """
    values = np.where(np.abs(values) <= LARGEST, values, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    if len(known) > 1 and np.median(np.diff(known)) > 1:  # read more seldom than its table has rows: these are no gaps
        steps, values = steps[known], values[known]
    kept = thin(values, min(POINTS, max(200, POINTS_IN_ALL // of)))
    own = len(keys) == 1
    return go.Scatter(
        x=steps[kept],
        y=values[kept].astype(np.float32),
        customdata=_when(readings.table("windows"), steps[kept]),
        mode="lines+markers" if own and len(kept) <= 60 else "lines",
        marker={"symbol": symbol, "size": 5, "color": colour},
        name=text(", ".join(keys)),
        legendgroup=text(keys[0]),
        showlegend=own,
        meta=list(keys),
        line={"color": colour, "width": 2 if own else 1.5, "dash": dash},
        hovertemplate="%{y:.4~g}<br>step %{x:,}%{customdata}",
    )


def look(place: int) -> tuple[str, str]:
    """Return the colour and the marker of the task (or run, or gate) at a place."""
    return PALETTE[place % len(PALETTE)], SYMBOLS[place % len(SYMBOLS)]


def choose_scale(figure: go.Figure, values: Float[np.ndarray, " n"], **where: Any) -> None:
    """Make the y axis logarithmic where all is positive and the range is wide; one of zeros alone begins at 0."""
    finite = values[np.isfinite(values)]
    if len(finite) and not finite.any():
        figure.update_yaxes(range=[0, 1], **where)
    if len(finite) and finite.min() > 0 and finite.max() > WIDE_SCALE * finite.min():
        decades = finite.max() > 300 * finite.min()
        figure.update_yaxes(type="log", tickformat="~g", dtick=1 if decades else "D2", **where)


def share_axis(panels: Sequence[Panel], tables: Sequence[Columns]) -> None:
    """Give all figures the same x range: from the first to the last step of the tables."""
    ends = [int(table["step"][i]) for table in tables if len(table["step"]) for i in (0, -1)]
    pad = 0.01 * max(max(ends) - min(ends), 1) if ends else 0.0
    for panel in panels:
        if panel.figure is not None:
            panel.figure.update_layout(xaxis_range=[min(ends) - pad, max(ends) + pad])


def skip(panel: Panel, table: Columns, name: str, reading: str, reason: str = "") -> Panel:
    """Return the panel without a figure, and why."""
    why = f"no reading {reading} in the table {name}" if len(table["step"]) else f"the table {name} has no rows"
    return replace(panel, missing=why + (f" ({reason})" if reason else ""))


def shorten(name: str, limit: int) -> str:
    """Return a name with its first words as letters, as many as it takes; the end, which tells layers apart, is kept.

    >>> shorten("trunk.experts.3.layers.linear_0.weight", limit=24)
    't.e.3.l.linear_0.weight'
    """
    excess = len(name) - limit

    def shorten_word(word: re.Match[str]) -> str:
        nonlocal excess
        if excess <= 0:
            return word[0]
        excess -= len(word[0]) - 1
        return word[0][0]

    name = re.sub(r"[^\W\d_]{2,}", shorten_word, name)
    return name if len(name) <= limit else "…" + name[-limit + 1 :]


def text(name: Any) -> str:
    """Return a name as plotly shows it literally: it reads tags and entities in any text."""
    return html.escape(str(name), quote=False)


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


def _fill(value_PT: np.ndarray, heat: Heat) -> np.ndarray:
    """Make an infinite value the strongest colour, where the greatest is to be seen; otherwise a gap."""
    finite_PT = np.isfinite(value_PT)
    top = np.max(value_PT, where=finite_PT, initial=-np.inf)
    strongest = np.where(value_PT == np.inf, np.nan if heat.least else top, np.nan)
    filled: np.ndarray = np.clip(np.where(finite_PT, value_PT, strongest), -LARGEST, LARGEST)
    return filled


def _furthest(names: list[str], value_PT: np.ndarray, heat: Heat) -> tuple[list[str], np.ndarray, str]:
    """Keep the rows that went furthest, in their order, and say what the others did."""
    if len(names) <= ROWS:
        return names, value_PT, ""
    if heat.relative:  # the first steps apart: a bias that starts at zero moves infinitely far in the first one
        usual_P = np.maximum(np.nanmedian(value_PT, axis=1), heat.floor)
        reach_P = np.fmax.reduce(value_PT[:, value_PT.shape[1] // 10 :], axis=1) / usual_P
        word, unit = "above", " times its own median"
    else:
        reach_P = (np.fmin if heat.least else np.fmax).reduce(value_PT, axis=1)
        word, unit = "below" if heat.least else "above", ""
    ranked = np.argsort(reach_P if heat.least else -reach_P, kind="stable")
    kept = np.sort(ranked[:ROWS])
    note = f" Shown are the {ROWS} of {len(names)} that went furthest; no other went {word} "
    return [names[i] for i in kept], value_PT[kept], note + f"{reach_P[ranked[ROWS]]:.2g}{unit}."


def _coloured(cell_PT: np.ndarray, heat: Heat) -> tuple[np.ndarray, dict[str, Any]]:
    """Return what is coloured (the logarithm where the span is wide) and plotly's colour axis."""
    positive = cell_PT[cell_PT > 0]
    low, high = heat.ends or (float(np.nanmin(cell_PT)), float(np.nanmax(cell_PT)))
    wide = len(positive) > 0 and high > WIDE_SCALE * max(float(np.nanmin(cell_PT)), heat.floor)
    if len(positive) and (heat.scale == "log" or (heat.scale == "auto" and wide)):
        floor = max(low, float(positive.min()), heat.floor)
        depth_PT = np.log10(np.maximum(cell_PT, floor))
        low = float(np.floor(np.log10(low if heat.ends and low > 0 else floor)))
        high = max(float(np.ceil(np.log10(max(high, floor)))), low + 1)
        ticks = np.arange(low, high + 0.5)
        shown = [f"{10**t:g}" for t in ticks]
    else:
        depth_PT, high = cell_PT, high if high > low else low + 1
        ticks = np.linspace(low, high, 3)
        shown = [f"{t:.3g}" for t in ticks]
    bar = {"tickvals": ticks, "ticktext": shown, "thickness": 10, "outlinewidth": 0, "len": 1, "xpad": 4}
    return depth_PT, {"cmin": low, "cmax": high, "colorscale": _stops(heat.light), "colorbar": bar}


def _stops(colours: Sequence[str]) -> list[list[Any]]:
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]
