"""A contact sheet: some runs drawn small beside their verdicts, so that a person can check the verdicts by eye."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import numpy as np

from ..errors import CheckpointError
from ..monitors.verdict import METRIC
from ..report.plots import look, thin
from ..report.records import read_readings, read_summary
from ..report.timeline import Episode, find_episodes
from ..report.words import VERDICTS, verdict_words
from ..runs import RunFolder

MOST = 20
"""Runs on a sheet."""
WIDTH, HEIGHT = 320.0, 110.0
"""Of a run's picture, in pixels where the page is wide enough."""
_LEAST_OF_EACH = 3  # of every ending, where there are so many: a rare one is what is to be checked
_POINTS = 160
_LOWEST, _HIGHEST = 0.7, 0.97
_TASKS_SHOWN = 8
_SAID_SHORT = ("healthy", "never_learned")  # of the others it is said when and why


ENDINGS = {
    "full_divergence": VERDICTS["full_divergence"],
    "miscalibrated": ("warn", "Miscalibrated"),
    **VERDICTS,
}
"""The verdicts on a cell from the worst to the best: their mark and their name."""


@dataclass(frozen=True)
class Trace:
    """A task of a run: its line, and the verdict on it."""

    task: str
    colour: str
    path: str
    """Of an SVG path; empty where there are no windows."""
    words: str
    mark: str
    """One of good, warn and bad, or empty where nothing can be said."""


@dataclass(frozen=True)
class Card:
    """A run on the sheet; positions are in the picture's own units."""

    name: str
    href: str
    verdict: str
    mark: str
    traces: Sequence[Trace] = ()
    shades: Sequence[tuple[float, float, str]] = ()
    """Left, width and mark of the disturbed stretches."""
    end: float | None = None
    """Where the run ended, if before the end of its log."""
    missing: str = ""
    """Why there is no picture."""

    @property
    def shown(self) -> Sequence[Trace]:
        """Return the tasks whose verdicts are listed: of many, those that are not healthy."""
        if len(self.traces) <= _TASKS_SHOWN:
            return self.traces
        return sorted(self.traces, key=lambda trace: trace.mark == "good")[:_TASKS_SHOWN]


@dataclass(frozen=True)
class Sheet:
    """Cards on one scale: the windows' metric between `low` and `high`, 1 in the middle."""

    cards: Sequence[Card]
    low: float
    high: float
    runs: int
    """Of which the cards were drawn."""
    width: float = field(default=WIDTH, init=False)
    height: float = field(default=HEIGHT, init=False)


@dataclass(frozen=True)
class _Run:
    """What is read of a run folder."""

    tasks: Mapping[str, Mapping[str, Any]]
    place_W: np.ndarray
    """Where each window ends, as a share of the log."""
    step_W: np.ndarray
    lines: Mapping[str, np.ndarray]
    """By task: the metric by which it is judged."""


def contact_sheet(
    folders: Sequence[RunFolder], endings: Mapping[str, str] | None = None, *, most: int = MOST, base: str = ""
) -> Sheet:
    """Draw runs by lot, each beside its verdicts.

    Of every ending at least three are drawn if there are so many, the others evenly; the lot hangs on the runs' names
    alone, so that a sheet that is drawn again, or of more runs, shows the same ones as far as it can.

    Args:
        folders: Of runs, ended or not.
        endings: By the folder's name, a key of `ENDINGS`; that of the run's worst task when left out.
        most: So many runs are drawn.
        base: What stands before a folder's name in the link to it.
    """
    named = {folder.path.name: folder for folder in folders}
    endings = endings if endings is not None else {name: find_ending(folder) for name, folder in named.items()}
    known = {name: endings.get(name, "no_verdict") for name in named}
    names = draw_lot(known, most)
    read: dict[str, _Run | str] = {name: _read(named[name]) for name in names}
    runs = [run for run in read.values() if isinstance(run, _Run)]
    low, high = _common_range([line for run in runs for line in run.lines.values()])
    cards = [_card(name, read[name], known[name], f"{base}{quote(name)}/", low, high) for name in names]
    return Sheet(cards, low, high, len(named))


def draw_lot(endings: Mapping[str, str], most: int) -> list[str]:
    """Return at most so many names, some of every ending, the worst endings first.

    >>> drawn = draw_lot({f"run{i}": "full_divergence" if i < 2 else "healthy" for i in range(100)}, most=5)
    >>> drawn[:2], len(drawn)
    (['run0', 'run1'], 5)
    """
    by_lot = sorted(endings, key=lambda name: hashlib.sha256(name.encode(errors="backslashreplace")).digest())
    ranked: list[tuple[int, int, str]] = []
    seen: dict[str, int] = {}
    for name in by_lot:
        place = seen[endings[name]] = seen.get(endings[name], 0) + 1
        ranked.append((place if place <= _LEAST_OF_EACH else _LEAST_OF_EACH + 1, len(ranked), name))
    order = list(ENDINGS)
    worst_first = lambda name: (order.index(endings[name]) if endings[name] in order else len(order), name)  # noqa: E731
    return sorted((name for _, _, name in sorted(ranked)[:most]), key=worst_first)


def find_ending(folder: RunFolder) -> str:
    """Return the worst verdict on a run's tasks, "no_verdict" where it has none or cannot be read."""
    try:
        tasks = read_summary(folder).get("tasks", {})
    except CheckpointError:
        return "no_verdict"
    kinds = {(task.get("verdict") or {}).get("verdict") for task in tasks.values()}
    return next((kind for kind in VERDICTS if kind in kinds), "no_verdict")


def _read(folder: RunFolder) -> _Run | str:
    """Return what a run's picture shows, or why it shows nothing."""
    try:
        summary, windows = read_summary(folder), read_readings(folder, "windows")
    except CheckpointError as error:
        return str(error).replace(str(folder.path), folder.path.name)  # a page names no path of the machine
    tasks = summary.get("tasks", {})
    steps, rows = windows["step"], windows.get("log/rows")
    if not len(steps):
        return "no window was scored"
    total = summary.get("log_rows")
    if rows is not None and isinstance(total, int | float) and total > 0:
        places = rows / total
    else:
        places = steps / max(int(steps[-1]), int(summary.get("steps") or 0), 1)
    areas = {name: METRIC[task["kind"]] for name, task in tasks.items()}
    if not areas:
        found = {name.partition("/")[2]: name for area in METRIC.values() for name in windows if name.startswith(area)}
        return _Run({task: {} for task in found}, places, steps, {t: windows[name] for t, name in found.items()})
    lines = {task: windows[f"{area}/{task}"] for task, area in areas.items() if f"{area}/{task}" in windows}
    return _Run(tasks, places, steps, lines)


def _common_range(lines: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the range of all pictures: 1 in its middle, as narrow as the runs that learned allow."""
    values = np.concatenate([np.zeros(0), *lines])
    below = values[np.isfinite(values) & (values < 1)]
    low = float(np.clip(np.quantile(below, 0.02), _LOWEST, _HIGHEST)) if len(below) else _LOWEST
    low = np.floor(low * 50) / 50
    return float(low), float(2 - low)


def _card(name: str, run: _Run | str, ending: str, href: str, low: float, high: float) -> Card:
    mark, verdict = ENDINGS.get(ending, ("", "No verdict"))
    if isinstance(run, str):
        return Card(name, href, verdict, mark, missing=run)
    verdicts = {task: of["verdict"] for task, of in run.tasks.items() if of.get("verdict")}
    traces = []
    for place, task in enumerate(run.tasks):
        path = _path(run.place_W, run.lines[task], low, high) if task in run.lines else ""
        words, task_mark = verdict_words(verdicts.get(task))
        if (kind := verdicts.get(task, {}).get("verdict")) in _SAID_SHORT:
            words = VERDICTS[kind][1]
        traces.append(Trace(task, look(place)[0], path, words or "No verdict", task_mark))
    shades = [_shade(episode, run) for episode in find_episodes(list(run.tasks), verdicts, [])]
    last = float(run.place_W[-1])
    return Card(name, href, verdict, mark, traces, shades, round(last * WIDTH, 1) if last < 0.99 else None)


def _path(places: np.ndarray, values: np.ndarray, low: float, high: float) -> str:
    """Return a line as an SVG path: what lies beyond the range runs along its edge, what is not known is a gap.

    >>> _path(np.array([0.0, 0.5, 0.75, 1.0]), np.array([1.0, np.inf, np.nan, 0.0]), low=0.9, high=1.1)
    'M0 55L160 1M320 109'
    """
    kept = thin(values, _POINTS)
    parts, pen = [], "M"
    for place, value in zip(places[kept], values[kept], strict=True):
        if np.isnan(value):
            pen = "M"
            continue
        share = (high - min(max(value, low), high)) / (high - low)
        y = 1 + share * (HEIGHT - 2)
        parts.append(f"{pen}{_short(place * WIDTH)} {_short(y)}")
        pen = "L"
    return "".join(parts)


def _shade(episode: Episode, run: _Run) -> tuple[float, float, str]:
    """Return where an episode lies in the picture."""
    steps, places = [0, *run.step_W], [0.0, *run.place_W]
    last = episode.last if episode.last is not None else int(run.step_W[-1])
    left, right = (float(np.interp(step, steps, places)) * WIDTH for step in (episode.first, last))
    return round(left, 1), round(max(right - left, 1.5), 1), "bad" if episode.verdict == "full_divergence" else "warn"


def _short(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
