"""One self-contained HTML page from a run folder: what came out, what happened, and the figures.

The page needs no network: plotly's script lies in it, compressed, and the browser inflates it. All text from the log
(names of tasks, columns and files, messages) is escaped by jinja2; the figures are JSON without a `<`.
"""

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import plotly.offline
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..metrics import share_attainable
from ..runs import RunFolder
from .figures import Panel, Readings, draw, find_tasks

_TITLES = {
    "auc": "AUC",
    "gauc": "GAUC",
    "log_loss": "Log loss",
    "normalised_entropy": "Normalised entropy",
    "rmse": "RMSE",
    "normalised_rmse": "Normalised RMSE",
    "mae": "MAE",
    "calibration": "Calibration",
}
_COLUMNS = ("run", "last_day", "baseline", "attainable")
_STATUS = {
    "finished": ("good", "Finished: the log was read to its end."),
    "interrupted": ("warn", "Interrupted: stopped by the user."),
    "diverged": ("bad", "Diverged: training left the finite numbers."),
    "data_error": ("bad", "Data error: the log could not be read to its end."),
}
_UNKNOWN = ("warn", "No summary yet: the run goes on, or it was killed.")
_EVENTS_SHOWN = 200
_EVENTS_OPEN = 12


def write_report(run: RunFolder | str | Path) -> Path:
    """Write report.html into a run folder, from what the folder holds.

    Args:
        run: The folder, finished or not; readings, summary or configuration may be missing.

    Returns:
        The page's path.

    Raises:
        CheckpointError: It is no run folder, is damaged, or cannot be written.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    return folder.write_report(render(folder))


def render(folder: RunFolder) -> str:
    """Return the page as text."""
    summary, events = folder.summary() or {}, folder.events()
    steps, windows = folder.readings("steps"), folder.readings("windows")
    tasks = list(summary.get("tasks") or find_tasks(steps, windows))
    panels = draw(Readings(steps, windows, tasks), [event["step"] for event in events[:_EVENTS_SHOWN]])
    shown = [panel for panel in panels if panel.figure is not None]
    outcomes = summary.get("tasks", {})
    mark, status = _STATUS.get(summary.get("status", ""), _UNKNOWN)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=format_number, count=format_count)
    return environment.get_template("page.html.j2").render(
        name=summary.get("name") or folder.path.name,
        mark=mark,
        status=status,
        message=summary.get("message", ""),
        sentences=[task_sentence(name, task) for name, task in outcomes.items()],
        facts=_facts(summary),
        tasks=[_task_table(name, task) for name, task in outcomes.items()],
        knows_attainable=any(task.get("attainable") for task in outcomes.values()),
        events=[_event(event) for event in events[:_EVENTS_SHOWN]],
        events_open=_EVENTS_OPEN,
        events_left_out=max(len(events) - _EVENTS_SHOWN, 0),
        missing=[(column, *_missing(counts, summary)) for column, counts in summary.get("missing", {}).items()],
        knows_missing="missing" in summary,
        panels=shown,
        skipped=[panel for panel in panels if panel.figure is None],
        config=folder.config_text() if (folder.path / "config.toml").exists() else "",
        environment=folder.environment(),
        figures=_figures_json(shown),
        plotly=_plotly_packed() if shown else "",
    )


class Sentence(NamedTuple):
    """What became of a task, in plain words; `mark` is "good", "bad", or "" where nothing can be said."""

    task: str
    result: str
    verdict: str
    mark: str


def task_sentence(name: str, task: Mapping[str, Any]) -> Sentence:
    """Say what a task reached over the run, and whether it beats the baseline.

    >>> task = {"kind": "binary", "run": {"auc": 0.731}, "baseline": {"feature": "item", "auc": 0.7}}
    >>> task_sentence("click", task)[1:3]
    ('AUC 0.7310 over the run', 'beats the running mean by item by 0.0310')
    """
    binary = task.get("kind") == "binary"
    metric, sign = ("auc", 1.0) if binary else ("rmse", -1.0)
    run, base = task.get("run", {}), task.get("baseline") or {}
    reached, rival = run.get(metric), base.get(metric)
    if not _is_number(reached):
        return Sentence(name, f"no {_TITLES[metric]} over the run", "it was never a finite number", "bad")
    result = f"{_TITLES[metric]} {format_number(reached)} over the run"
    share = run.get("normalised_rmse")
    if not binary and _is_number(share):
        result += f", {share:.3f} of a constant's"
    if not _is_number(rival):
        return Sentence(name, result, "no baseline to compare with", "")
    feature = base.get("feature")
    known = "the running mean of all rows" if feature in (None, "global") else f"the running mean by {feature}"
    gap = sign * (reached - rival)
    if gap > 0:
        return Sentence(name, result, f"beats {known} by {format_number(gap)}", "good")
    return Sentence(name, result, f"does not beat {known}, by {format_number(-gap)}", "bad")


def format_number(value: Any) -> str:
    """Return a number with four decimals, or four digits where it is large or tiny; a dash for None.

    >>> [format_number(v) for v in (0.73125, 12345.6, 0.000012, float("nan"), None)]
    ['0.7312', '12,346', '1.2e-05', 'not finite', '–']
    """
    if value is None or isinstance(value, str):
        return value or "–"
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 1:
        return f"{value:.2f}" if size >= 10 else f"{value:.3f}"
    return f"{value:.4f}" if size >= 0.001 or size == 0 else f"{value:.2g}"


def format_count(value: Any) -> str:
    """Return a whole number with separators, a dash for None."""
    return f"{value:,.0f}" if _is_number(value) else "–"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of the header: label and value."""
    sizes, optimizer = summary.get("parameters", {}), summary.get("optimizer", {})
    first, last = _date(summary.get("first_time_s")), _date(summary.get("last_time_s"))
    facts = [
        ("Steps", format_count(summary.get("steps"))),
        ("Rows", format_count(summary.get("rows"))),
        ("Rows per second", format_count(summary.get("rows_per_s"))),
        ("Duration", _duration(summary.get("seconds"))),
        ("Log from", first),
        ("Log to", last),
        ("Dense parameters", format_count(sizes.get("dense"))),
        ("Embedding parameters", format_count(sizes.get("embedding"))),
        ("Optimizer, dense", optimizer.get("dense", "–")),
        ("Optimizer, tables", optimizer.get("tables", "–")),
        ("Steps left out", format_count(summary.get("bad_steps"))),
    ]
    return [(label, value) for label, value in facts if value != "–"]


def _share(metric: str, reached: Any, best: Any) -> float | None:
    if not _is_number(reached) or not _is_number(best):
        return None
    share = share_attainable(metric, float(reached), float(best))
    return None if math.isnan(share) else share


def _task_table(name: str, task: Mapping[str, Any]) -> dict[str, Any]:
    """Return one task's metrics: a row of cells for each metric that any column has."""
    columns = [task.get(column) or {} for column in _COLUMNS]
    rows = []
    for metric, title in _TITLES.items():
        if any(metric in column for column in columns):
            share = _share(metric, columns[0].get(metric), columns[3].get(metric))
            cells = [format_number(column.get(metric)) for column in columns]
            rows.append((title, [*cells, "–" if share is None else f"{share:.0%}"]))
    return {
        "name": name,
        "kind": task.get("kind", ""),
        "baseline": columns[2].get("feature"),
        "labelled": columns[0].get("rows"),
        "rows": rows,
    }


def _event(event: Mapping[str, Any]) -> dict[str, Any]:
    detail = {k: v for k, v in event.items() if k not in ("step", "time", "kind", "message")}
    text = ", ".join(f"{k} = {format_number(v) if _is_number(v) else v}" for k, v in detail.items())
    return {"step": event.get("step"), "kind": event.get("kind"), "message": event.get("message"), "detail": text}


def _missing(counts: Mapping[str, int], summary: Mapping[str, Any]) -> tuple[str, str, str]:
    null, broken, rows = counts.get("null", 0), counts.get("non_finite", 0), summary.get("rows") or 0
    share = (null + broken) / rows if rows else math.nan
    shown = "–" if not rows else f"{share:.2%}" if share >= 0.0001 else "< 0.01%"
    return format_count(null), format_count(broken), shown


def _date(seconds: Any) -> str:
    try:
        return "–" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return str(seconds)


def _duration(seconds: Any) -> str:
    if not _is_number(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _figures_json(panels: Sequence[Panel]) -> str:
    """Return the figures as JSON that can stand in a script element: no `<`, `>` or `&` is left in it."""
    figures = {panel.key: json.loads(panel.figure.to_json()) for panel in panels if panel.figure is not None}
    text = json.dumps(figures, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plotly_packed() -> str:
    """Return plotly's script, compressed, in base64: 2 MB instead of 5."""
    script: str = plotly.offline.get_plotlyjs()
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()
