"""What becomes of one task: its losses and its windows, each with an excursion of its own, and the episodes they make.

How that is judged, and why, the module `verdict` says.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pydantic import Field

from ..settings import Settings
from .band import Usual

_IN_A_ROW = 3  # windows below 1 that show that a task has learned, or is back
FAR = 1.1
"""The metric of a task that is far worse than a constant, which has 1."""


class VerdictConfig(Settings):
    """When a task counts as diverged."""

    sigmas: float = Field(default=7.0, gt=0)
    """Robust standard deviations above the trailing windows or steps from which a value is outside."""
    windows: int = Field(default=20, ge=4, le=100_000)
    """Trailing windows remembered."""
    least_windows: int = Field(default=6, ge=1)
    """Windows that must be remembered before one can be outside."""
    window_chance: float = Field(default=1e-4, gt=0, lt=1)
    """A run of windows at 1 or above counts once it would come by chance this rarely."""
    steps: int = Field(default=200, ge=4, le=100_000)
    """Trailing steps remembered. An excursion that outlasts half of the memory and stays below 1 is a new level."""
    least_steps: int = Field(default=50, ge=2)
    """Steps that must be remembered before one can be outside."""
    step_chance: float = Field(default=1e-6, gt=0, lt=1)
    """A run of steps outside counts once it would come by chance this rarely."""
    calm_steps: int = Field(default=10, ge=1)
    """Steps inside in a row after which a loss is back."""


class Change(NamedTuple):
    """What became of a task just now."""

    task: str
    verdict: Literal["suspected", "recovered", "dismissed", "micro_divergence", "full_divergence"]
    """`suspected`: a divergence began, and is still to become micro or full. `recovered`: it was a micro-divergence.
    `dismissed`: it was a lasting change of level below 1. At the end of the run, of what has not come back:
    `full_divergence`, or `micro_divergence` where it stayed below 1."""
    step: int
    """When this was seen."""
    since: int
    """The first step of the divergence."""
    reason: str
    """What was seen, in words."""


_Event = Literal["", "began", "back", "new_level"]


@dataclass
class Losses:
    """A task's losses, step by step."""

    usual: Usual = field(default_factory=Usual)
    seen: bool = False
    open: bool = False
    run: int = 0
    """Steps outside: in a row, or while open all of them."""
    first: int = 0
    """The first of them."""
    last: int = 0
    """The last of them."""
    calm: int = 0
    """Steps inside in a row since."""
    bad: bool = False
    """The last loss was not finite."""
    bad_step: int = -1
    """The last step whose loss was not."""
    reason: str = ""

    def note(self, step: int, loss: float, usual: Usual, config: VerdictConfig) -> _Event:
        """Take in the loss of a step."""
        self.bad = not math.isfinite(loss)
        if not self.run:
            self.usual, self.first = usual, step
        if not self.bad and loss <= self.usual.limit:
            self.calm += 1
            self.run = self.run if self.open else 0
            return "back" if self.open and self.calm >= config.calm_steps else ""
        self.run, self.last, self.calm = self.run + 1, step, 0
        self.bad_step = step if self.bad else self.bad_step
        if self.open:
            return "new_level" if self.run > config.steps // 2 and not self.bad else ""
        if self.bad or self.usual.share**self.run < config.step_chance:
            self.reason = "the loss is not finite" if self.bad else self.usual.describe("loss", loss)
            return "began"
        return ""


@dataclass
class Windows:
    """A task's metric, window by window."""

    usual: Usual = field(default_factory=Usual)
    seen: bool = False
    started: bool = False
    """A window has been below 1: they are remembered from there."""
    learned: bool = False
    open: bool = False
    below: int = 0
    """Windows below 1 in a row."""
    above: int = 0
    """Windows at 1 or above in a row; the first of them began at step `above_first`."""
    above_first: int = 0
    run: int = 0
    """Windows since it opened."""
    reached_one: bool = False
    """One of these was at 1 or above."""
    first: int = 0
    """The first step outside."""
    last: int = 0
    """The last step outside."""
    end: int = 0
    """The last step of the newest window."""
    bad: bool = False
    """The newest window's scores were not finite."""
    lost: int = 0
    """Windows in a row, up to the newest, at 1 or above or not finite while an episode of the task was open."""
    far: int = 0
    """Windows in a row, up to the newest, far above 1 or not finite."""
    reason: str = ""

    def note(self, first: int, end: int, value: float, name: str, usual: Usual, config: VerdictConfig) -> _Event:
        """Take in the metric, called `name`, of a window; infinite where a score is not finite."""
        self.seen, self.bad, self.end = True, not math.isfinite(value), end
        if not self.open and (value < 1 or not self.above or not (self.learned or self.usual.limit < math.inf)):
            self.usual = usual
        if not self.bad:
            self.above_first = self.above_first if self.above else first
            self.above, self.below = (0, self.below + 1) if value < 1 else (self.above + 1, 0)
        self.started |= self.below > 0
        self.learned |= self.below >= _IN_A_ROW
        event = self._went_on(value, config) if self.open else self._began(first, value, name, config)
        self.run, self.reached_one = self.run + 1, self.reached_one or value >= 1
        if value >= 1 if self.reached_one else value > self.usual.limit:
            self.last = end
        return event

    def _began(self, first: int, value: float, name: str, config: VerdictConfig) -> _Event:
        usual, self.first = self.usual, first
        if self.bad:
            self.reason = "scores are not finite"
        elif self.learned and value > usual.limit:
            self.reason = usual.describe(name, value)
        elif self.learned and usual.median < 1 and usual.share**self.above < config.window_chance:
            self.first = self.above_first
            self.reason = f"{name} at 1 or above for {self.above} windows, the last {value:.4g}"
        else:
            return ""
        self.run, self.reached_one = 0, False
        return "began"

    def _went_on(self, value: float, config: VerdictConfig) -> _Event:
        """Say whether the task is back: as good as usual, or below 1 for three windows."""
        if self.bad:
            return ""
        if not self.learned:
            return "back"
        if self.reached_one:
            return "back" if value < 1 and (value <= self.usual.median or self.below >= _IN_A_ROW) else ""
        if value < 1 and value <= self.usual.limit:
            return "back"
        return "new_level" if self.run > config.windows // 2 else ""


@dataclass
class TaskState:
    """A task's two sources, and its episodes."""

    name: str
    losses: Losses = field(default_factory=Losses)
    windows: Windows = field(default_factory=Windows)
    windowed: bool = False
    """There are windows, whether or not this task had a value in them."""
    episodes: list[dict[str, Any]] = field(default_factory=list)
    open: bool = False
    """The last of the episodes is still open."""
    last: int = 0
    """The last step that was seen outside."""
    returned: bool = False
    """The open episode has come back, in one of its sources."""
    ended: bool = False
    full: bool = False

    def note(self, step: int, source: Losses | Windows, event: _Event) -> list[Change]:
        """Take in what became of a source; open or close the episode."""
        below_one = self.windows.seen and not (self.windows.learned and self.windows.above)
        if event == "began":
            source.open = True
        elif event == "back" or (event == "new_level" and below_one):
            source.open, source.run = False, 0
            self.returned |= event == "back"
        if source.open:
            self.last = max(self.last, source.last)
        if event == "began" and not self.open:
            self.open, self.returned = True, False
            del self.episodes[1:-998]  # the first and the newest ones: a run without an end must not grow
            self.episodes.append({"first": source.first, "last": None, "reason": source.reason})
            return [self._change("suspected", step)]
        return self._close(step) if self.open and not source.open else []

    def count(self, value: float) -> None:
        """Count a window for `Verdicts.hopeless`, once it was noted; one of NaN says nothing."""
        if not math.isnan(value):
            windows = self.windows
            windows.lost = windows.lost + 1 if self.open and value >= 1 else 0
            windows.far = windows.far + 1 if value > FAR else 0

    def _change(self, verdict: Any, step: int) -> Change:
        return Change(self.name, verdict, step, self.episodes[-1]["first"], self.episodes[-1]["reason"])

    def _close(self, step: int) -> list[Change]:
        """Close the episode if both sources have come back, a window after the last odd loss included."""
        windows = self.windows
        waits = windows.learned and (windows.above > 0 or windows.end < self.losses.last)
        return [] if self.losses.open or windows.open or waits else [self._closed(step)]

    def _closed(self, step: int) -> Change:
        self.open = False
        if not self.returned:
            change = self._change("dismissed", step)
            self.episodes.pop()
            return change._replace(reason=f"a lasting change of level below 1: {change.reason}")
        self.episodes[-1]["last"] = self.last
        return self._change("recovered", step)

    def end(self, step: int, bad: bool) -> list[Change]:
        """Close what is open; `bad` where a loss that is not finite has ended the run."""
        windows, self.ended = self.windows, True
        if bad:  # the steps after the bad one may have come back
            self.open, self.episodes[-1]["last"] = True, None
        self.full = self.open and (bad or self._stays())
        if self.full:
            return [self._change("full_divergence", step)]
        if self.losses.open or (windows.open and not windows.reached_one):
            return [self._change("micro_divergence", step)]
        self.returned |= windows.open
        return [self._closed(step)] if self.open else []

    def _stays(self) -> bool:
        """Say whether the open episode lasts to the end: not finite, or at 1 or above."""
        losses, windows = self.losses, self.windows
        if losses.bad or windows.bad:
            return True
        if windows.learned:
            # The window in which the loss came back still holds the excursion; a second one does not.
            return windows.above >= (1 if losses.open or windows.open else 2)
        return losses.open and not self.windowed

    def summary(self) -> dict[str, Any]:
        """Return the verdict, or how it stands, since when, and all episodes."""
        word = "micro_divergence" if self.episodes else "healthy"
        if self.full:
            word = "full_divergence"
        elif self.open and not self.ended:
            word = "suspected"
        elif self.windows.seen and not self.windows.learned:
            word = "never_learned"
        elif not self.windows.seen and (self.windowed or not self.losses.seen):
            word = "no_verdict"
        at = {"micro_divergence": 0, "full_divergence": -1, "suspected": -1}.get(word)
        since = None if at is None else self.episodes[at]["first"]
        return {"verdict": word, "since": since, "episodes": [dict(episode) for episode in self.episodes]}


def task_of(saved: Mapping[str, Any]) -> TaskState:
    """Make a task from what `asdict` made of it."""
    losses, windows = ({**saved[part], "usual": Usual(**saved[part]["usual"])} for part in ("losses", "windows"))
    episodes = [dict(episode) for episode in saved["episodes"]]
    return TaskState(**{**saved, "losses": Losses(**losses), "windows": Windows(**windows), "episodes": episodes})
