"""A run in plain words: numbers, the sentence of each task, the events, and the tables under them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeGuard

from ..metrics import share_attainable
from .records import LONGEST_TEXT, shorten_name

TITLES = {
    "auc": "AUC",
    "gauc": "GAUC",
    "log_loss": "Log loss",
    "normalised_entropy": "Normalised entropy",
    "rmse": "RMSE",
    "normalised_rmse": "Normalised RMSE",
    "mae": "MAE",
    "calibration": "Calibration",
}
"""Metrics in the order in which they are shown."""
COLUMNS = ("run", "last_day", "baseline", "attainable")
VERDICTS = {
    "full_divergence": ("bad", "Full divergence"),
    "micro_divergence": ("warn", "Micro-divergence"),
    "never_learned": ("warn", "Never learned"),
    "no_verdict": ("", "No verdict"),
    "healthy": ("good", "Healthy"),
}
"""The verdicts from the worst to the best: their mark and their name."""
_TOLD = (
    *("step", "time", "kind", "message", "quantities", "task", "layer", "level", "file", "reason", "verdict", "since"),
    *("done", "then", "action", "process"),
)


class Sentence(NamedTuple):
    """What became of a task; `mark` is "good", "warn", "bad", or "" where nothing can be said, `state` its verdict."""

    task: str
    result: str
    verdict: str
    mark: str
    state: str = ""
    state_mark: str = ""


@dataclass(frozen=True)
class Event:
    """What happened at a step, or `count` times from `step` to `last`; `symbol` is its kind of mark, "" for none."""

    step: int
    last: int
    count: int
    kind: str
    symbol: str
    task: str
    layer: str
    message: str
    detail: str


def task_sentence(name: str, task: Mapping[str, Any]) -> Sentence:
    """Say what a task reached over the run, whether it beats the baseline, and how it went.

    >>> task = {"kind": "binary", "run": {"auc": 0.731}, "baseline": {"feature": "item", "auc": 0.7}}
    >>> task_sentence("click", task)[1:3]
    ('AUC 0.7310 over the run', 'beats the running mean by item by 0.0310')
    >>> task_sentence("click", task | {"verdict": {"verdict": "healthy", "since": None, "episodes": []}}).state
    'Healthy throughout'
    """
    state, state_mark = verdict_words(task.get("verdict"))
    return _reached(name, task)._replace(state=state, state_mark=state_mark)


def verdict_words(verdict: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return a task's verdict as a phrase, and its mark; empty where the run kept none.

    >>> episode = {"first": 1200, "last": None, "reason": "the loss is inf"}
    >>> verdict_words({"verdict": "full_divergence", "since": 1200, "episodes": [episode]})
    ('Full divergence since step 1,200: the loss is inf', 'bad')
    """
    if not verdict:
        return "", ""
    kind = verdict.get("verdict", "no_verdict")
    mark, name = VERDICTS.get(kind, ("", str(kind)))
    episodes = verdict.get("episodes") or []
    last = episodes[-1] if episodes else {}
    reason = f": {last['reason']}" if last.get("reason") else ""
    if kind == "full_divergence":
        since = verdict.get("since") if verdict.get("since") is not None else last.get("first")
        return name + (f" since step {since:,}" if since is not None else "") + reason, mark
    if kind == "micro_divergence" and len(episodes) == 1:
        until = f" to {last['last']:,}" if last.get("last") is not None else ""
        return f"{name} from step {last['first']:,}{until}{reason}", mark
    if kind == "micro_divergence" and episodes:
        return f"{len(episodes)} micro-divergences, the first at step {episodes[0]['first']:,}", mark
    endings = {"healthy": " throughout", "never_learned": ": never better than a constant"}
    return name + endings.get(kind, ""), mark


def headline(verdicts: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the run's verdict in one sentence over all tasks, and its mark; empty where no task has a verdict.

    >>> headline([{"verdict": "healthy"}, {"verdict": "full_divergence"}, {"verdict": "healthy"}])
    ('Of 3 tasks 1 diverged for good, 2 were healthy.', 'bad')
    """
    counts = Counter(str(verdict.get("verdict")) for verdict in verdicts)
    if not counts:
        return "", ""
    worst = next((kind for kind in VERDICTS if counts[kind]), "no_verdict")
    mark = VERDICTS[worst][0]
    total = sum(counts.values())
    if counts["healthy"] == total:
        return ("The task was healthy." if total == 1 else f"All {total} tasks were healthy."), mark
    words = {
        "full_divergence": "diverged for good",
        "micro_divergence": "diverged and came back",
        "never_learned": "never learned",
        "no_verdict": "had too few readings for a verdict",
        "healthy": "was healthy" if counts["healthy"] == 1 else "were healthy",
    }
    parts = [f"{counts[kind]} {said}" for kind, said in words.items() if counts[kind]]
    return f"Of {total} task{'s' if total > 1 else ''} {', '.join(parts)}.", mark


_RECOVERY = ("recovery", "damped", "returned", "quarantine")


def tell_event(event: Mapping[str, Any]) -> Event:
    """Return an event of the run as the page tells it.

    >>> event = {"step": 9, "kind": "warning", "level": "alarm", "message": "it grows", "quantities": {"x": 0.5}}
    >>> told = tell_event(event)
    >>> told.kind, told.symbol, told.message, told.detail
    ('alarm', 'alarm', 'it grows', 'x = 0.5000')
    """
    kind, level = str(event.get("kind")), event.get("level")
    symbols = {"verdict": "", "cause": "cause", "bad_step": "bad step"} | dict.fromkeys(_RECOVERY, "recovery")
    symbol = ("alarm" if level == "alarm" else "notice") if kind == "warning" else symbols.get(kind, "other")
    shown = str(level) if kind == "warning" and level else kind.replace("_", " ")
    if kind == "verdict":
        shown = VERDICTS.get(str(event.get("verdict")), ("", str(event.get("verdict"))))[1].lower()
    named = {name: event[name] for name in ("task", "layer") if event.get(name)}
    others = {name: value for name, value in event.items() if name not in _TOLD and value not in ("", None)}
    pairs = named | dict(event.get("quantities") or {}) | others
    detail = ", ".join(f"{k} = {format_number(v) if is_number(v) else v}" for k, v in pairs.items())
    detail = shorten_name(detail, LONGEST_TEXT)
    message, reason = str(event.get("message") or ""), str(event.get("reason") or "")
    if reason and reason not in message:
        message = f"{message}: {reason}" if message else reason
    step = int(event.get("step", 0))
    task, layer = str(event.get("task") or ""), str(event.get("layer") or "")
    return Event(step, step, 1, shown, symbol, task, layer, message, detail)


def fold_events(events: Sequence[Event]) -> list[Event]:
    """Return the events for a list: what repeats since the last verdict or cause is counted with its first."""
    found: list[Event] = []
    places: dict[tuple[str, str, str], int] = {}
    for event in events:
        key = (event.kind, event.task, event.layer)
        if event.symbol in ("", "cause"):
            places.clear()
        elif key in places:
            first = found[places[key]]
            found[places[key]] = replace(first, last=event.last, count=first.count + event.count)
            continue
        else:
            places[key] = len(found)
        found.append(event)
    return found


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
    if size >= 1e7:
        return f"{value:.3g}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 1:
        return f"{value:.2f}" if size >= 10 else f"{value:.3f}"
    return f"{value:.4f}" if size >= 0.001 or size == 0 else f"{value:.2g}"


def format_count(value: Any) -> str:
    """Return a whole number with separators, a dash for None."""
    return f"{value:,.0f}" if is_number(value) else "–"


def is_number(value: Any) -> TypeGuard[float]:
    """Say whether it is a finite number."""
    return isinstance(value, int | float) and abs(value) < math.inf


def facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of the header: label and value."""
    sizes, optimizer = summary.get("parameters", {}), summary.get("optimizer", {})
    recovery = summary.get("recovery", {})
    first, last = _date(summary.get("first_time_s")), _date(summary.get("last_time_s"))
    found = [
        ("Steps", format_count(summary.get("steps"))),
        ("Rows", format_count(summary.get("rows"))),
        ("Rows per second", format_count(summary.get("rows_per_s"))),
        ("Duration", _duration(summary.get("seconds"))),
        ("Ranks", summary.get("ranks", {}).get("words", "–")),
        ("A slow rank", summary.get("slow_rank") or "–"),
        ("Log from", first),
        ("Log to", last),
        ("Dense parameters", format_count(sizes.get("dense"))),
        ("Embedding parameters", format_count(sizes.get("embedding"))),
        ("Optimizer, dense", optimizer.get("dense", "–")),
        ("Optimizer, tables", optimizer.get("tables", "–")),
        ("Steps left out", format_count(summary.get("bad_steps"))),
        ("Recovery", ", ".join(f"{count} x {rung}" for rung, count in recovery.get("actions", {}).items()) or "–"),
        ("Rows left out", format_count(recovery.get("rows_skipped") or None)),
    ]
    return [(label, value) for label, value in found if value != "–"]


def task_table(name: str, task: Mapping[str, Any]) -> dict[str, Any]:
    """Return one task's metrics: a row of cells for each metric that any column has."""
    columns = [task.get(column) or {} for column in COLUMNS]
    rows = []
    for metric, title in TITLES.items():
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


def missing_words(counts: Mapping[str, int], summary: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return how many values of a column were null, how many not finite, and their share of all rows."""
    null, broken, rows = counts.get("null", 0), counts.get("non_finite", 0), summary.get("rows") or 0
    share = (null + broken) / rows if rows else math.nan
    shown = "–" if not rows else f"{share:.2%}" if share >= 0.0001 else "< 0.01%"
    return format_count(null), format_count(broken), shown


def _reached(name: str, task: Mapping[str, Any]) -> Sentence:
    binary = task.get("kind") == "binary"
    metric, sign = ("auc", 1.0) if binary else ("rmse", -1.0)
    run, base = task.get("run", {}), task.get("baseline") or {}
    reached, rival = run.get(metric), base.get(metric)
    if "run" not in task:
        return Sentence(name, "no metrics", "the loop that trained it gave losses only", "")
    if not is_number(reached):
        return Sentence(name, f"no {TITLES[metric]} over the run", "it was never a finite number", "bad")
    result = f"{TITLES[metric]} {format_number(reached)} over the run"
    share = run.get("normalised_rmse")
    if not binary and is_number(share):
        result += f", {share:.3f} of a constant's"
    if not is_number(rival):
        return Sentence(name, result, "no baseline to compare with", "")
    feature = base.get("feature")
    known = "the running mean of all rows" if feature in (None, "global") else f"the running mean by {feature}"
    gap = sign * (reached - rival)
    if gap > 0:
        return Sentence(name, result, f"beats {known} by {format_number(gap)}", "good")
    return Sentence(name, result, f"does not beat {known}, by {format_number(-gap)}", "bad")


def _share(metric: str, reached: Any, best: Any) -> float | None:
    if not is_number(reached) or not is_number(best):
        return None
    share = share_attainable(metric, float(reached), float(best))
    return None if math.isnan(share) else share


def _date(seconds: Any) -> str:
    try:
        return "–" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return str(seconds)


def _duration(seconds: Any) -> str:
    if not is_number(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
