"""Pictures of a ladder: what a reading becomes as the rate grows, a line for each optimizer, and how the runs ended.

They take the scores of `score_ladder`, and so draw a ladder that still runs, or one that was read from outcomes.csv. An
optimizer keeps its colour throughout; a run is a point whose marker is its verdict, as in the terminal.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ..report.figures import Section
from ..report.plots import GREY, PALETTE, Panel, choose_scale, new_figure, shorten, text
from ..report.png import draw_files
from .outcomes import Ending, Outcome
from .scores import Rung, Score, choose
from .tables import place_of

Read = Callable[[Outcome], float]


@dataclass(frozen=True)
class Mark:
    """How the verdict on a run is drawn."""

    words: str
    letter: str
    symbol: str
    colour: str
    """At least 3:1 against a white and a dark page, and white on it as well."""


MARKS: Mapping[Ending, Mark] = {
    "full_divergence": Mark("diverged", "×", "x", "#C0203F"),
    "never_learned": Mark("never learned", "○", "circle-open", "#8A6FD0"),
    "miscalibrated": Mark("miscalibrated", "▲", "triangle-up", "#4A78C8"),
    "micro_divergence": Mark("micro-divergence", "◆", "diamond", "#A86E00"),
    "healthy": Mark("healthy", "●", "circle", "#008F68"),
}
"""The verdicts, from the worst to the best."""
_TICKS = 12
"""Of more rates than this, plotly chooses those that are written on the axis."""
_CROWDED = 6
_SYMBOLS = "A point is a run: ● healthy, ◆ micro-divergence, ▲ miscalibrated, ○ never learned, × diverged."


def draw_ladder(scores: Sequence[Score], rate: str = "learning rate") -> list[Section]:
    """Return all pictures of each model and incident.

    Args:
        scores: Of the whole ladder.
        rate: What the ladder varies, as the axis calls it.
    """
    colours = colours_of(scores)
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(place_of(score), []).append(score)
    sections = []
    for number, (place, group) in enumerate(groups.items()):
        drawers = (quality_panel, endings_panel, nrmse_panel, moved_panel, headroom_panel)
        panels = [draw(group, colours, rate) for draw in drawers]
        named = [_named(panel, number, place) for panel in panels]
        sections.append(Section(place or "Over the ladder", named))
    _share_axis([panel.figure for section in sections for panel in section.panels if panel.figure is not None], scores)
    return sections


def colours_of(scores: Sequence[Score]) -> dict[str, tuple[str, str]]:
    """Return the colour and the dash of each optimizer, in the order of the ladder."""
    names = dict.fromkeys(score.optimizer for score in scores)
    dashes = ("solid", "dash", "dot")
    return {name: (PALETTE[i % len(PALETTE)], dashes[i // len(PALETTE) % 3]) for i, name in enumerate(names)}


def quality_panel(
    scores: Sequence[Score], colours: Mapping[str, tuple[str, str]] | None = None, rate: str = "learning rate"
) -> Panel:
    """The quality of the test windows against the rate, with a band over seeds; runs that diverged below it."""
    measure = scores[0].measure if scores else "AUC"
    name = "AUC" if measure == "AUC" else "1 − NRMSE"
    panel = Panel(
        "quality",
        f"{name} by rate",
        "Test windows, each scored before it was learned from. The line is the mean over seeds, the band one standard "
        f"deviation to either side. {_SYMBOLS}",
        wide=True,
    )
    figure = new_figure(height=420)
    lanes = [score for score in scores if score.cells.diverged]
    drawn = _draw_lines(
        figure, scores, colours or colours_of(scores), lambda o: o.quality("test"), name, banded=True, lanes=bool(lanes)
    )
    if not drawn:
        return replace(panel, missing="no run has a quality yet")
    if lanes:
        _draw_lanes(figure, lanes, colours or colours_of(scores), _spread(scores))
        panel = replace(panel, how=f"{panel.how} What diverged stands below, in its optimizer's colour.")
    figure.update_layout(yaxis_title={"text": name, "standoff": 8})
    return _finished(panel, figure, scores, rate)


def endings_panel(
    scores: Sequence[Score], colours: Mapping[str, tuple[str, str]] | None = None, rate: str = "learning rate"
) -> Panel:
    """How the runs of each optimizer ended at each rate: a tile, split by the shares of the verdicts."""
    panel = Panel(
        "endings",
        "How the runs ended",
        "A tile holds the runs of all seeds, the worst first.",
        wide=True,
    )
    if not any(score.cells.tried for score in scores):
        return replace(panel, missing="no run has ended yet")
    figure = new_figure(height=84 + 30 * len(scores))
    for ending, mark in MARKS.items():
        tiles = [tile for row, score in enumerate(scores) for tile in _tiles(row, score, ending)]
        if tiles:
            figure.add_traces(_tile_traces(tiles, mark))
    rows = list(range(len(scores)))
    names = [text(shorten(score.optimizer, 24)) for score in scores]
    figure.update_yaxes(
        tickvals=rows, ticktext=names, range=[len(scores) - 0.45, -0.55], automargin=True, showgrid=False
    )
    return _finished(panel, figure, scores, rate)


def nrmse_panel(
    scores: Sequence[Score], colours: Mapping[str, tuple[str, str]] | None = None, rate: str = "learning rate"
) -> Panel:
    """Mean NRMSE of the regressions in the test windows."""
    panel = Panel(
        "nrmse",
        "NRMSE by rate",
        "Mean over the regressions and the test windows: 1 is no better than a constant, lower is better.",
    )
    of = lambda o: o.nrmse("test")  # noqa: E731
    return _reading_panel(panel, scores, colours, rate, of, "NRMSE", "no run has a regression", rule=1.0, banded=True)


def moved_panel(
    scores: Sequence[Score], colours: Mapping[str, tuple[str, str]] | None = None, rate: str = "learning rate"
) -> Panel:
    """The effective rate: how far a step really moved the weights."""
    panel = Panel(
        "moved",
        "Effective rate by rate",
        "How far a step moved a weight matrix relative to its size, median over the second half. Where the line goes "
        "flat, a bound on the step has taken over, and the rate that was set no longer matters. The line is the median "
        "over seeds.",
    )
    missing = "no run has readings of it (watch.dynamics_every)"
    return _reading_panel(panel, scores, colours, rate, lambda o: o.moved, "step / weight", missing, log=True)


def headroom_panel(
    scores: Sequence[Score], colours: Mapping[str, tuple[str, str]] | None = None, rate: str = "learning rate"
) -> Panel:
    """How much larger a step could have been."""
    panel = Panel(
        "headroom",
        "Headroom by rate",
        "How many times larger a step could have been before the loss rises, median over the second half; below 1 it "
        "already overshoots. The line is the median over seeds.",
    )
    missing = "no run has readings of it (watch.curvature_every)"
    return _reading_panel(panel, scores, colours, rate, lambda o: o.headroom, "times", missing, rule=1.0)


def write_png(figure: go.Figure, path: str | Path, width: int = 900, height: int = 420, *, dark: bool = False) -> Path:
    """Write a figure as a PNG, with plotly's own legend, on a light or a dark ground.

    Args:
        figure: Stays as it is.
        path: Of the file; one that is there is replaced.
        width, height: In pixels of a page; the file has twice as many.
        dark: On a dark page.

    Raises:
        ConfigError: kaleido is not installed, finds no browser, or the file cannot be written.
    """
    drawn, path = go.Figure(figure), Path(path)
    paper, ink, grid = ("#14171c", "#e4e8ee", "#2a3038") if dark else ("#ffffff", "#1d232b", "#e6e9ee")
    drawn.update_layout(paper_bgcolor=paper, font_color=ink, margin={"t": 48, "r": 20})
    drawn.update_xaxes(gridcolor=grid)
    drawn.update_yaxes(gridcolor=grid)
    draw_files([drawn], [path], width, [height])
    return path


def _reading_panel(
    panel: Panel,
    scores: Sequence[Score],
    colours: Mapping[str, tuple[str, str]] | None,
    rate: str,
    read: Read,
    unit: str,
    missing: str,
    *,
    rule: float | None = None,
    banded: bool = False,
    log: bool = False,
) -> Panel:
    figure = new_figure(height=320)
    drawn = _draw_lines(figure, scores, colours or colours_of(scores), read, unit, banded=banded)
    if not drawn:
        return replace(panel, missing=missing)
    if rule is not None:
        figure.add_hline(y=rule, line={"color": GREY, "width": 1})
    if log and min(drawn) > 0:
        figure.update_yaxes(type="log", tickformat="~g", dtick="D2")
    choose_scale(figure, np.array(drawn))
    figure.update_yaxes(title={"text": unit, "standoff": 8})
    return _finished(panel, figure, scores, rate)


def _draw_lines(
    figure: go.Figure,
    scores: Sequence[Score],
    colours: Mapping[str, tuple[str, str]],
    read: Read,
    unit: str,
    *,
    banded: bool,
    lanes: bool = False,
) -> list[float]:
    """Draw a reading of every optimizer; returns all values.

    Args:
        figure: To draw in.
        scores: A line each.
        colours: By optimizer.
        read: The reading of a run.
        unit: What its values are called.
        banded: The line is the mean, with a band of a standard deviation; else it is the median.
        lanes: Runs that diverged are drawn elsewhere.
    """
    chosen = choose(scores) if len(scores) > _CROWDED else scores
    values: list[float] = []
    for score in scores:
        rates, found = _by_rate(score, read)
        if not rates:
            continue
        colour, dash = colours[score.optimizer]
        name = text(score.optimizer)
        shared: dict[str, Any] = {"legendgroup": name, "meta": [score.optimizer], "name": name}
        shared["visible"] = True if score in chosen else "legendonly"
        middle = [float(np.mean(of) if banded else np.median(of)) for of in found]
        line = {"color": colour, "width": 2, "dash": dash}
        kind = "mean" if banded else "median"
        hover = f"{name}<br>%{{y:.4~g}} {text(unit)}<br>rate %{{x:.4~g}}, {kind} of %{{customdata}} runs<extra></extra>"
        counts = [len(of) for of in found]
        trace = go.Scatter(x=rates, y=middle, mode="lines", line=line, customdata=counts, hovertemplate=hover, **shared)
        figure.add_trace(trace)
        if banded and any(len(of) > 1 for of in found):
            figure.add_trace(_band(rates, middle, found, colour, 0.13 if chosen is scores else 0.06, shared))
        if (points := _points(score, read, unit, colour, lanes, shared)) is not None:
            figure.add_trace(points)
        values += [value for of in found for value in of]
    return values


def _by_rate(score: Score, read: Read) -> tuple[list[float], list[list[float]]]:
    """Return the rates at which a reading is known, and its values there."""
    known = [(rung.rate, [v for v in map(read, rung.outcomes) if math.isfinite(v)]) for rung in score.rungs]
    return [rate for rate, of in known if of], [of for _, of in known if of]


def _band(
    rates: Sequence[float],
    middle: Sequence[float],
    found: Sequence[Sequence[float]],
    colour: str,
    opacity: float,
    shared: Mapping[str, Any],
) -> go.Scatter:
    reach = [float(np.std(of, ddof=1)) if len(of) > 1 else 0.0 for of in found]
    above = [m + r for m, r in zip(middle, reach, strict=True)]
    below = [m - r for m, r in zip(middle, reach, strict=True)]
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return go.Scatter(
        x=[*rates, *reversed(rates)],
        y=[*above, *reversed(below)],
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},{opacity})",
        line={"color": colour, "width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        **shared,
    )


def _points(
    score: Score, read: Read, unit: str, colour: str, lanes: bool, shared: Mapping[str, Any]
) -> go.Scatter | None:
    """Return a marker for each run, its verdict in its shape."""
    runs = [(o, ending) for o, ending in zip(score.cells.outcomes, score.cells.endings, strict=True)]
    runs = [(o, ending) for o, ending in runs if math.isfinite(read(o)) and not (lanes and ending == "full_divergence")]
    if not runs:
        return None
    return go.Scatter(
        x=[o.rate for o, _ in runs],
        y=[read(o) for o, _ in runs],
        mode="markers",
        marker={
            "symbol": [MARKS[ending].symbol for _, ending in runs],
            "size": [5 if ending == "healthy" else 8 for _, ending in runs],
            "color": colour,
            "line": {"color": colour, "width": 1.5},
        },
        line={"color": colour},  # for the page's legend
        customdata=[f"seed {o.seed}, {MARKS[ending].words}" for o, ending in runs],
        hovertemplate=f"{shared['name']}<br>%{{y:.4~g}} {text(unit)}<br>rate %{{x:.4~g}}, %{{customdata}}"
        "<extra></extra>",
        showlegend=False,
        **shared,
    )


def _draw_lanes(
    figure: go.Figure, scores: Sequence[Score], colours: Mapping[str, tuple[str, str]], spread: float
) -> None:
    """Draw the runs that diverged below the picture: a lane for each optimizer, a cross for each run."""
    chosen = choose(scores) if len(scores) > _CROWDED else scores
    for lane, score in enumerate(scores):
        where = [(rung, place) for rung in score.rungs for place in _side_by_side(rung, spread)]
        colour, name = colours[score.optimizer][0], text(score.optimizer)
        told = [f"{rung.counts['full_divergence']} of {rung.tried} diverged" for rung, _ in where]
        figure.add_trace(
            go.Scatter(
                x=[place for _, place in where],
                y=[lane] * len(where),
                yaxis="y2",
                mode="markers",
                marker={"symbol": "x", "size": 7, "color": colour},
                line={"color": colour},
                customdata=[f"{rung.rate:g}: {words}" for (rung, _), words in zip(where, told, strict=True)],
                hovertemplate=f"{name} at %{{customdata}}<extra></extra>",
                legendgroup=name,
                meta=[score.optimizer],
                name=name,
                showlegend=False,
                visible=True if score in chosen else "legendonly",
            )
        )
    height = min(0.04 + 0.03 * len(scores), 0.4)
    figure.update_layout(yaxis={"domain": [height + 0.03, 1]})
    figure.update_layout(
        yaxis2={
            "domain": [0, height],
            "range": [len(scores) - 0.4, -0.6],
            "tickvals": [(len(scores) - 1) / 2],
            "ticktext": ["diverged"],
            "anchor": "x",
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        }
    )
    figure.update_xaxes(anchor="y2")


def _side_by_side(rung: Rung, spread: float) -> list[float]:
    """Return where the crosses of a rate's runs stand, around it on the logarithmic axis."""
    count = rung.counts["full_divergence"]
    apart = min(0.015 * spread, 0.25 * spread / max(count, 1))
    return [rung.rate * 10 ** (apart * (i - (count - 1) / 2)) for i in range(count)]


@dataclass(frozen=True)
class _Tile:
    """The part of a tile that one verdict takes; x in rates, y in rows."""

    left: float
    right: float
    row: int
    words: str
    wide: bool
    """There is room for its mark."""


def _tiles(row: int, score: Score, ending: Ending) -> list[_Tile]:
    """Return the parts of an optimizer's tiles that runs with an ending take."""
    half = 0.46 * _least_gap(score)
    least = 0.2 if len(score.rungs) <= 6 else 0.4
    tiles = []
    for rung in score.rungs:
        count, before = rung.counts[ending], 0
        for worse in MARKS:
            if worse == ending:
                break
            before += rung.counts[worse]
        if count:
            low, high = (-half + 2 * half * n / rung.tried for n in (before, before + count))
            words = f"{text(score.optimizer)} at {rung.rate:g}<br>{count} of {rung.tried} {MARKS[ending].words}"
            sides = rung.rate * 10**low, rung.rate * 10**high
            tiles.append(_Tile(*sides, row, words, count / rung.tried >= least))
    return tiles


def _tile_traces(tiles: Sequence[_Tile], mark: Mark) -> list[go.Scatter]:
    """Return the tiles of one verdict as one shape, and the marks in them."""
    x: list[float | None] = []
    y: list[float | None] = []
    for tile in tiles:
        x += [tile.left, tile.right, tile.right, tile.left, tile.left, None]
        y += [tile.row - 0.4, tile.row - 0.4, tile.row + 0.4, tile.row + 0.4, tile.row - 0.4, None]
    shared = {"legendgroup": mark.words, "meta": [mark.words], "name": mark.words}
    shape = go.Scatter(
        x=x, y=y, fill="toself", fillcolor=mark.colour, mode="lines", line={"color": mark.colour, "width": 0},
        hoverinfo="skip", **shared,
    )  # fmt: skip
    signs = go.Scatter(
        x=[math.sqrt(tile.left * tile.right) for tile in tiles],
        y=[tile.row for tile in tiles],
        mode="text",
        text=[mark.letter if tile.wide else " " for tile in tiles],
        textfont={"color": "#ffffff", "size": 13},
        line={"color": mark.colour},
        customdata=[tile.words for tile in tiles],
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
        **shared,
    )
    return [shape, signs]


def _finished(panel: Panel, figure: go.Figure, scores: Sequence[Score], rate: str) -> Panel:
    """Return the panel with its axis of rates."""
    rates = sorted({rung.rate for score in scores for rung in score.rungs})
    figure.update_xaxes(type="log", title={"text": text(rate), "standoff": 6}, tickformat="~g", automargin=True)
    if len(rates) <= _TICKS:
        figure.update_xaxes(tickvals=rates, ticktext=[f"{value:g}" for value in rates])
    _share_axis([figure], scores)
    return replace(panel, figure=figure)


def _share_axis(figures: Sequence[go.Figure], scores: Sequence[Score]) -> None:
    """Give figures the same range of rates, with room for a tile at both ends."""
    rates = [rung.rate for score in scores for rung in score.rungs]
    room = max([0.55 * _least_gap(score) for score in scores], default=0.15)
    for figure in figures:
        ends = math.log10(min(rates)) - room, math.log10(max(rates)) + room
        figure.update_layout(xaxis_range=[round(end, 4) for end in ends])


def _spread(scores: Sequence[Score]) -> float:
    """Return the decades that the axis of rates covers."""
    rates = [rung.rate for score in scores for rung in score.rungs]
    return math.log10(max(rates) / min(rates)) + max(_least_gap(score) for score in scores)


def _least_gap(score: Score) -> float:
    """Return the decades between the nearest two rates."""
    logs = np.log10([rung.rate for rung in score.rungs])
    return min(float(np.diff(logs).min()) if len(logs) > 1 else 0.3, 0.7)


def _named(panel: Panel, number: int, place: str) -> Panel:
    """Return a panel of one of several models; where it is not drawn no heading says of which."""
    title = f"{panel.title}, {place}" if place and panel.figure is None else panel.title
    return replace(panel, key=f"{panel.key}_{number}", title=title)
