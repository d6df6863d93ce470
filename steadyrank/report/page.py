"""One self-contained HTML page from a run folder: what came out, what happened, and the figures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runs import RunFolder
from . import markup
from .causes import cause_block
from .figures import Section, draw, find_tasks, read_tables
from .moment import find_moment
from .plots import Readings
from .records import read_causes, read_events, read_summary
from .tables import last_of_tables
from .timeline import NAMES, SYMBOLS, Timeline, draw_timeline, find_episodes, lead_sentence, notable_steps
from .words import (
    Event,
    facts,
    fold_events,
    headline,
    missing_words,
    task_sentence,
    task_table,
    tell_event,
)

_STATUS = {
    "finished": ("good", "Finished: the log was read to its end."),
    "interrupted": ("warn", "Interrupted: stopped by the user."),
    "diverged": ("bad", "Diverged: training left the finite numbers."),
    "data_error": ("bad", "Data error: the log could not be read to its end."),
}
_UNKNOWN = ("warn", "No summary yet: the run goes on, or it was killed.")
_EVENTS_SHOWN = 200
_EVENTS_OPEN = 12
_CAUSES_SHOWN = 20


@dataclass(frozen=True)
class Story:
    """What a run folder tells: its readings, figures by section, timeline and events."""

    readings: Readings
    sections: list[Section]
    timeline: Timeline
    lead: str
    events: list[Event]
    causes: list[dict[str, Any]]


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
    summary, story = read_summary(folder), tell(folder)
    outcomes = summary.get("tasks", {})
    verdicts = [task["verdict"] for task in outcomes.values() if task.get("verdict")]
    events = fold_events(story.events)
    mark, status = _STATUS.get(summary.get("status", ""), _UNKNOWN)
    return markup.fill(
        "page.html.j2",
        story.sections,
        name=summary.get("name") or folder.path.name,
        mark=mark,
        status=status,
        message=summary.get("message", ""),
        headline=headline(verdicts),
        sentences=[task_sentence(name, task) for name, task in outcomes.items()],
        timeline=story.timeline,
        lead=story.lead,
        symbols=SYMBOLS,
        names=NAMES,
        facts=facts(summary),
        tasks=[task_table(name, task) for name, task in outcomes.items()],
        knows_attainable=any(task.get("attainable") for task in outcomes.values()),
        events=events[:_EVENTS_SHOWN],
        events_open=_EVENTS_OPEN,
        events_left_out=max(len(events) - _EVENTS_SHOWN, 0),
        causes=[cause_block(cause) for cause in story.causes[:_CAUSES_SHOWN]],
        causes_left_out=max(len(story.causes) - _CAUSES_SHOWN, 0),
        folder=folder.path.name,
        tables=last_of_tables(story.readings),
        missing=[(column, *missing_words(counts, summary)) for column, counts in summary.get("missing", {}).items()],
        knows_missing="missing" in summary,
        config=folder.config_text() if (folder.path / "config.toml").exists() else "",
        environment=folder.environment(),
    )


def tell(folder: RunFolder) -> Story:
    """Return what a run folder tells, with its figures drawn."""
    summary, causes, happened = read_summary(folder), read_causes(folder), read_events(folder)
    tables = read_tables(folder)
    outcomes = summary.get("tasks", {})
    tasks = list(outcomes or find_tasks(tables["steps"], tables["windows"]))
    readings = Readings(tables, tasks)
    verdicts = {name: task["verdict"] for name, task in outcomes.items() if task.get("verdict")}
    episodes = find_episodes(tasks, verdicts, happened)
    events = [tell_event(event) for event in happened]
    return Story(
        readings,
        draw(
            readings,
            marks=notable_steps(fold_events(events)),
            episodes=episodes,
            moment=find_moment(happened, causes, readings),
        ),
        draw_timeline(tasks, verdicts, episodes, events, max(readings.last_step(), summary.get("steps") or 0)),
        lead_sentence(episodes, happened),
        events,
        causes,
    )
