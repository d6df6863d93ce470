"""What happened when: a band for each task, marks for warnings and all else, and the events as a short list.

Positions are shares of the run in per cent, so that the page needs no script to draw them.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .words import Event, format_count

BINS = 90
"""Marks of one kind in the same 90th of the run are drawn as one."""
_GOOD, _WARN, _BAD = "good", "warn", "bad"
_BANDS = {"healthy": _GOOD, "micro_divergence": _GOOD, "full_divergence": _GOOD, "never_learned": _WARN}
_SEGMENTS = {"micro_divergence": _WARN, "full_divergence": _BAD}
NAMES = {
    "notice": "notice",
    "alarm": "alarm",
    "bad step": "step left out",
    "recovery": "done by the recovery",
    "cause": "cause report",
    "other": "other event",
}
"""What each kind of mark is called."""
SYMBOLS = {"notice": "△", "alarm": "▲", "bad step": "✕", "recovery": "↺", "cause": "◆", "other": "●"}
"""How each kind of mark is drawn."""
EVERYTHING = "the run"
"""The name of the band of what concerns no single task."""


@dataclass(frozen=True)
class Episode:
    """A stretch of the run in which a task was disturbed; `last` is None where it lasts to the end."""

    task: str
    first: int
    last: int | None
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class Segment:
    """A coloured stretch of a band: position and width in per cent."""

    left: float
    width: float
    mark: str
    title: str


@dataclass(frozen=True)
class Mark:
    """A symbol on a band; `title` says what it stands for."""

    left: float
    kind: str
    title: str

    @property
    def symbol(self) -> str:
        """What is drawn."""
        return SYMBOLS[self.kind]


@dataclass(frozen=True)
class Band:
    """One task's time: its name, the colour of calm stretches, what is coloured, and marks."""

    name: str
    mark: str
    segments: Sequence[Segment]
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Timeline:
    """All bands over the same steps, and the numbers on the axis: position in per cent and text."""

    bands: Sequence[Band]
    ticks: Sequence[tuple[float, str]]

    @property
    def judged(self) -> bool:
        """Whether any task has a verdict."""
        return any(band.mark or band.segments for band in self.bands)

    @property
    def kinds(self) -> list[str]:
        """The kinds of marks that it has."""
        found = {mark.kind for band in self.bands for mark in band.marks}
        return [kind for kind in SYMBOLS if kind in found]


def find_episodes(
    tasks: Sequence[str], verdicts: Mapping[str, Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> list[Episode]:
    """Return the disturbed stretches of every task: from its verdict, or from the events of a run that was cut short.

    Args:
        tasks: In order.
        verdicts: `tasks.<task>.verdict` of the summary, by task; those without one are read off the events.
        events: Of the run, first to last.

    >>> event = {"kind": "verdict", "task": "a", "verdict": "full_divergence", "step": 9, "since": 7}
    >>> find_episodes(["a"], {}, [event])
    [Episode(task='a', first=7, last=None, verdict='full_divergence', reason='')]
    """
    found = []
    told: dict[str, list[Mapping[str, Any]]] = {task: [] for task in tasks}
    for event in events:
        if event.get("kind") == "verdict" and event.get("task") in told:
            told[event["task"]].append(event)
    for task in tasks:
        verdict = verdicts.get(task)
        found += _from_events(task, told[task]) if verdict is None else _from_verdict(task, verdict)
    return found


def draw_timeline(
    tasks: Sequence[str],
    verdicts: Mapping[str, Mapping[str, Any]],
    episodes: Sequence[Episode],
    events: Sequence[Event],
    last_step: int,
) -> Timeline:
    """Return the bands of all tasks, and one more for what concerns no single task, where there is such a thing."""
    end = max([last_step, 1, *(event.last for event in events)])
    marked: dict[str, list[Event]] = {"": [], **{task: [] for task in tasks}}
    for event in events:
        if event.symbol:
            marked[event.task if event.task in marked else ""].append(event)
    disturbed: dict[str, list[Segment]] = {task: [] for task in marked}
    for episode in episodes:
        disturbed[episode.task].append(_segment(episode, end))
    bands = []
    for task in [*([""] if marked[""] else []), *tasks]:
        known = verdicts.get(task, {}).get("verdict", "")
        calm = _BANDS.get(known, _GOOD if disturbed[task] else "")
        bands.append(Band(task or EVERYTHING, calm, disturbed[task], _marks(marked[task], end)))
    return Timeline(bands, _ticks(end))


def lead_sentence(episodes: Sequence[Episode], events: Sequence[Mapping[str, Any]]) -> str:
    """Say how long before the first disturbance the first warning came; empty where there was none of either.

    >>> warning = {"kind": "warning", "step": 900}
    >>> lead_sentence([Episode("click", 960, None, "full_divergence")], [warning])
    'The first warning came at step 900, 60 steps before click was first disturbed.'
    """
    first = min(episodes, key=lambda episode: episode.first, default=None)
    warned = min((int(event["step"]) for event in events if event.get("kind") == "warning"), default=None)
    if first is None or warned is None:
        return ""
    ahead = first.first - warned
    when = f"{ahead:,} steps before" if ahead > 0 else f"{-ahead:,} steps after" if ahead < 0 else "just when"
    return f"The first warning came at step {warned:,}, {when} {first.task} was first disturbed."


def notable_steps(events: Sequence[Event], limit: int = 25) -> list[int]:
    """Return the steps at which a line in the figures helps: all but notices; alarms last, where there are many."""
    ranked = sorted((e for e in events if e.symbol != "notice"), key=lambda e: e.symbol == "alarm")
    return sorted({event.step for event in ranked[:limit]})


def _from_verdict(task: str, verdict: Mapping[str, Any]) -> list[Episode]:
    found = []
    for episode in verdict.get("episodes") or []:
        last = episode.get("last")
        full = verdict.get("verdict") == "full_divergence" and last is None
        kind = "full_divergence" if full else "micro_divergence"
        found.append(Episode(task, int(episode["first"]), last, kind, str(episode.get("reason", ""))))
    if not found and verdict.get("verdict") in _SEGMENTS and verdict.get("since") is not None:
        found.append(Episode(task, int(verdict["since"]), None, str(verdict["verdict"])))
    return found


def _from_events(task: str, events: Sequence[Mapping[str, Any]]) -> list[Episode]:
    found: list[Episode] = []
    opened: Episode | None = None
    for event in events:
        step = int(event.get("since") or event["step"])
        if event.get("verdict") in _SEGMENTS:
            first = step if opened is None else opened.first
            opened = Episode(task, first, None, str(event["verdict"]), str(event.get("reason", "")))
        elif opened is not None:
            found.append(Episode(task, opened.first, int(event["step"]), "micro_divergence", opened.reason))
            opened = None
    return found if opened is None else [*found, opened]


def _segment(episode: Episode, end: int) -> Segment:
    last = end if episode.last is None else episode.last
    left = 100 * min(max(episode.first / end, 0.0), 1.0)
    words = "to the end" if episode.last is None else f"to {last:,}"
    name = "full divergence" if episode.verdict == "full_divergence" else "micro-divergence"
    title = f"{name}, step {episode.first:,} {words}" + (f": {episode.reason}" if episode.reason else "")
    return Segment(round(left, 3), round(max(100 * last / end - left, 0.0), 3), _SEGMENTS[episode.verdict], title)


def _marks(events: Sequence[Event], end: int) -> list[Mark]:
    """Return the marks of a band; those of a kind that would lie on one another are one, with their count."""
    where = lambda event: (list(SYMBOLS).index(event.symbol), event.step * BINS // end)  # noqa: E731
    marks = []
    for _, group in itertools.groupby(sorted(events, key=where), key=where):
        near = list(group)
        first, count = near[0], sum(event.count for event in near)
        last = max(event.last for event in near)
        title = f"step {first.step:,}: {first.message}"
        if count > 1:
            title = f"{count:,} times from step {first.step:,} to {last:,}; first: {first.message}"
        marks.append(Mark(round(100 * max(first.step / end, 0.0), 3), first.symbol, title))
    return marks


def _ticks(end: int) -> list[tuple[float, str]]:
    """Return round numbers from 0 to the end, at most seven."""
    unit = 10 ** (len(str(end)) - 1)
    step = next(size for size in (unit // 5 or 1, unit // 2 or 1, unit, 2 * unit) if end // size <= 5)
    return [(round(100 * at / end, 3), format_count(at)) for at in range(0, end + 1, step)]
