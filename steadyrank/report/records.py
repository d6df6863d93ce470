"""What the pages read from a run folder, its types checked once: a folder from elsewhere may hold anything.

Names are cut where they are longer than any page could show: a page repeats each of them in every figure.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Required

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from ..errors import CheckpointError, visible
from ..runs import RunFolder

LONGEST = 200
"""Letters of a name."""
LONGEST_TEXT = 10_000
"""Letters of a sentence."""
MOST_STEPS = 2**53
"""Beyond it the browser's numbers, and numpy's float64, would no longer tell steps apart."""


def shorten_name(name: str, longest: int = LONGEST) -> str:
    """Return a name as pages use it: at most so many letters, its middle left out, and none that is not to be seen.

    >>> shorten_name("click"), len(shorten_name("x" * 1_000_000)), shorten_name(chr(0xD800) + "x")
    ('click', 200, '\\\\ud800x')
    """
    if len(name) > longest:
        name = f"{name[: longest // 2]}…{name[1 - longest // 2 :]}"
    return visible(name)


def _plain(value: Any, longest: int = LONGEST_TEXT) -> Any:
    """A word that stands for a number that is not finite may also be a task's name; what is left out is empty."""
    plain = "" if value is None else str(value) if isinstance(value, int | float) else value
    return shorten_name(plain, longest) if isinstance(plain, str) else plain


def _name(value: Any) -> Any:
    return _plain(value, LONGEST)


Text = Annotated[str, BeforeValidator(_plain)]
Name = Annotated[str, BeforeValidator(_name)]
Step = Annotated[int, Field(ge=-MOST_STEPS, le=MOST_STEPS)]
Number = int | float | None
_open = with_config(ConfigDict(extra="allow", strict=True))  # later versions may write more


@_open
class Episode(TypedDict, total=False):
    first: Required[Step]
    last: Step | None
    reason: Text


@_open
class Verdict(TypedDict, total=False):
    verdict: Text
    since: Step | None
    episodes: list[Episode] | None


@_open
class Task(TypedDict, total=False):
    kind: Required[Literal["binary", "regression"]]
    run: dict[str, Number | str]
    last_day: dict[str, Number | str] | None
    baseline: dict[str, Number | str] | None
    attainable: dict[str, Number | str] | None
    verdict: Verdict | None


@_open
class Spread(TypedDict, total=False):
    words: Text


@_open
class Summary(TypedDict, total=False):
    name: Text
    status: Text
    message: Text
    steps: Step | None
    rows: Number
    seconds: Number
    rows_per_s: Number
    ranks: Spread
    slow_rank: Text
    bad_steps: Number
    first_time_s: Number
    last_time_s: Number
    parameters: dict[str, Number]
    optimizer: dict[str, Text]
    missing: dict[Name, dict[str, Number]]
    tasks: dict[Name, Task]


@_open
class Layer(TypedDict, total=False):
    name: Name


@_open
class Event(TypedDict, total=False):
    step: Required[Step]
    kind: Text
    message: Text
    task: Name
    layer: Layer | Name
    level: Text
    reason: Text
    verdict: Text
    since: Step | None
    quantities: dict[str, Any] | None


@_open
class Cause(TypedDict, total=False):
    step: Required[Step]
    sentence: Text
    why: Text
    task: Name
    layer: Layer | Name
    state_or_data: Text
    tasks: dict[Name, dict[str, Any]] | None
    rows: list[dict[str, Any]] | None
    odd_rows: list[dict[str, Any]] | None
    features: list[dict[str, Any]] | None


_SUMMARY, _EVENTS, _CAUSES = TypeAdapter(Summary), TypeAdapter(list[Event]), TypeAdapter(list[Cause])


def read_summary(folder: RunFolder) -> dict[str, Any]:
    """Return the summary, empty while there is none.

    Raises:
        CheckpointError: It is damaged, or a value has another type than the one that a run writes.
    """
    found: dict[str, Any] = _check(_SUMMARY, folder.summary() or {}, folder.path / "summary.json")
    return found


def read_events(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the events in the order of their steps: a flush tells of several steps at once.

    Raises:
        CheckpointError: They are damaged, or a value has another type than the one that a run writes.
    """
    found: list[dict[str, Any]] = _check(_EVENTS, folder.events(), folder.path / "events.jsonl")
    return sorted(found, key=lambda event: int(event["step"]))


def read_causes(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the cause reports in the order of their steps.

    Raises:
        CheckpointError: One is damaged, or a value has another type than the one that a run writes.
    """
    found: list[dict[str, Any]] = _check(_CAUSES, folder.causes(), folder.path / "causes")
    return found


def read_readings(folder: RunFolder, table: str) -> dict[str, np.ndarray]:
    """Return a table of readings, its names cut after their area.

    Raises:
        CheckpointError: It is damaged, or a step is none.
    """
    columns = folder.readings(table)
    steps = columns["step"]
    if len(steps) and max(-steps.min(), steps.max()) > MOST_STEPS:
        raise CheckpointError(
            f"{folder.path}: the table {table} says steps {steps.min()} to {steps.max()}, but none is beyond "
            f"{MOST_STEPS}; the file is damaged"
        )
    return {_shorten_reading(name): values for name, values in columns.items()}


def _shorten_reading(name: str) -> str:
    area, slash, rest = name.partition("/")
    return shorten_name(area) + slash + shorten_name(rest)


def _check(of: Any, found: Any, path: Path) -> Any:  # of: a TypeAdapter
    try:
        return of.validate_python(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(shorten_name(str(part)) for part in first["loc"])
        shown = shorten_name(repr(first["input"]))
        raise CheckpointError(f"{path}, {where}: {first['msg']}, found {shown}; the file is damaged") from error
