"""Verdicts by task: healthy, micro-divergence, full divergence, never learned; online, or for a run that has ended.

Two sources speak of a task.

**Windows** (normalised entropy, or RMSE over that of the running mean; below, *the metric*). At 1 or above the task is
worse than a constant, and a model that has collapsed to a constant lies at 1 or above in every window, since each is
measured by its own mean. But a rare task hovers at 1 by noise alone. So a task has *learned* once three windows in a
row lay below 1, and from then on a run of r windows at 1 or above counts once chance would hardly make it:

    share^r < window_chance,    share = (windows at 1 or above + 1) / (windows + 2)

where the share is taken over the trailing windows before the run, whose median must lie below 1. A task that lies well
below 1 needs three or four windows, one that is above every third window needs nine. A window far above the trailing
ones (`sigmas` robust standard deviations, more with fewer than 20 of them: see `RobustBand.usual`) counts at once. The
task is back with the first window as good as the trailing median, or after three windows in a row below 1: a lucky
window of a dead model lies below 1 as well.

**Losses**, step by step: they see what is over between two windows. A step is outside when its loss lies more than
`sigmas` robust standard deviations above the trailing steps, and again a run of such steps counts once

    share^r < step_chance

so that the outliers of a heavy-tailed or rare task, which its own share of outside steps tells of, are none, and a
single odd batch never is. The task is back after `calm_steps` inside in a row, once a window that ended later agrees.

An excursion that does not come back, but stays below 1, is a new level (the stream has shifted) and is dismissed. In a
loop without windows nothing tells a new level from a divergence, and what stays to the end is taken for a divergence.

Values that are not finite count at once, and none is ever remembered, so that they blind nothing.

Shapes: T steps, K tasks.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped
from pydantic import Field

from ..errors import CheckpointError, ConfigError
from ..settings import Settings
from .band import RobustBand, Usual

Kind = Literal["binary", "regression"]
METRIC: dict[Kind, str] = {"binary": "normalised_entropy", "regression": "normalised_rmse"}
"""The area of the readings by which a task of each kind is judged: 1 or above is no better than a constant."""
_PLAIN: dict[Kind, str] = {"binary": "log_loss", "regression": "rmse"}  # not finite only where a score is not
_WORDS: dict[Kind, str] = {"binary": "normalised entropy", "regression": "RMSE over that of the running mean"}
_IN_A_ROW = 3  # windows below 1 that show that a task has learned, or is back
_REFRESH = 10  # steps between two looks at a band: the median of 200 steps hardly moves in fewer


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
class _Losses:
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
class _Windows:
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
    reason: str = ""

    def note(self, first: int, end: int, value: float, name: str, usual: Usual, config: VerdictConfig) -> _Event:
        """Take in the metric, called `name`, of a window; infinite where a score is not finite."""
        self.seen, self.bad, self.end = True, not math.isfinite(value), end
        if not self.open and (value < 1 or not self.above or self.usual.limit == math.inf):
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
        known = self.learned and usual.limit < math.inf
        if self.bad:
            self.reason = "scores are not finite"
        elif known and value > usual.limit:
            self.reason = usual.describe(name, value)
        elif known and usual.median < 1 and usual.share**self.above < config.window_chance:
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
class _Task:
    """A task's two sources, and its episodes."""

    name: str
    losses: _Losses = field(default_factory=_Losses)
    windows: _Windows = field(default_factory=_Windows)
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

    def note(self, step: int, source: _Losses | _Windows, event: _Event) -> list[Change]:
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


class Verdicts:
    """What became of each task, online; the module says how that is judged.

    Args:
        tasks: Each task's kind, by name.
        config: Thresholds.

    >>> verdicts = Verdicts({"click": "binary"})
    >>> losses = 0.6 + 0.01 * np.sin(np.arange(120.0))[:, None]
    >>> losses[100:105] = 9.0
    >>> [(c.verdict, c.step, c.since) for c in verdicts.add_losses(1, losses)]
    [('suspected', 103, 101), ('recovered', 115, 101)]
    >>> verdicts.final(120)
    []
    >>> verdicts.summary()["click"]["verdict"], verdicts.summary()["click"]["episodes"][0]["last"]
    ('micro_divergence', 105)
    """

    def __init__(self, tasks: Mapping[str, Kind], config: VerdictConfig | None = None) -> None:
        self.config = config or VerdictConfig()
        self.kinds = dict(tasks)
        self._tasks = {name: _Task(name) for name in self.kinds}
        self._loss_band = RobustBand(len(self.kinds), self.config.steps, self.config.least_steps)
        self._window_band = RobustBand(len(self.kinds), self.config.windows, self.config.least_windows)
        self._usual = [Usual() for _ in self.kinds]
        self._limit_K = np.full(len(self.kinds), np.inf)
        self._count = self._newest = 0
        self._window_end: int | None = None
        self._window_steps = 0

    def add_losses(
        self,
        first_step: int,
        losses_TK: Float[np.ndarray, "steps tasks"],
        labelled_TK: Bool[np.ndarray, "steps tasks"] | None = None,
    ) -> list[Change]:
        """Take in the losses of the steps since the last call; how they are cut into calls changes nothing.

        Args:
            first_step: The number of the first of them.
            losses_TK: The mean loss of each step and task.
            labelled_TK: Where a row had a label: other losses say nothing. Everywhere when left out. A labelled loss
                that is not finite counts as such.

        Raises:
            ConfigError: There are not as many tasks as columns.
        """
        if losses_TK.shape[1] != len(self.kinds):
            raise ConfigError(f"add_losses: {losses_TK.shape[1]} columns for {len(self.kinds)} tasks; pass one each")
        labelled_TK = np.ones(losses_TK.shape, bool) if labelled_TK is None else labelled_TK
        changes: list[Change] = []
        values_TK = np.where(labelled_TK, losses_TK, np.nan).astype(np.float64)
        self._newest, start = first_step if len(values_TK) else self._newest, 0
        while start < len(values_TK):
            if self._count % _REFRESH == 0:
                self._usual = self._loss_band.usual(self.config.sigmas)
                self._limit_K = np.array([usual.limit for usual in self._usual])
            part = slice(start, start := min(len(values_TK), start + _REFRESH - self._count % _REFRESH))
            changes += self._look(first_step + part.start, values_TK[part], labelled_TK[part])
            self._loss_band.add(values_TK[part])
            self._count += part.stop - part.start
        return changes

    def _look(
        self,
        first_step: int,
        values_TK: Float[np.ndarray, "steps tasks"],
        labelled_TK: Bool[np.ndarray, "steps tasks"],
    ) -> list[Change]:
        """Look at a few steps at once; one by one only at the tasks in which something is odd."""
        fine_TK = np.isfinite(values_TK) & (values_TK <= self._limit_K)
        odd_K = np.logical_or.reduce(labelled_TK & ~fine_TK)
        found = []
        for k, task in enumerate(self._tasks.values()):
            seen_T = labelled_TK[:, k]
            task.losses.seen, task.ended, task.full = task.losses.seen or bool(seen_T.any()), False, False
            if not (odd_K[k] or task.losses.run):
                continue
            for t in np.flatnonzero(seen_T).tolist():
                event = task.losses.note(first_step + t, float(values_TK[t, k]), self._usual[k], self.config)
                found += task.note(first_step + t, task.losses, event)
        return sorted(found, key=lambda change: change.step)

    def add_window(self, step: int, row: Mapping[str, float]) -> list[Change]:
        """Take in the readings of the window that ends at `step`, a row of the table `windows`.

        Passed over is a task whose metric is absent or undefined there (no label, one class), a window cut short by the
        end of the run (less than half as long as others, it is noisier), and a window whose score is not finite where
        that step's loss has said so already.
        """
        first = 1 if self._window_end is None else self._window_end + 1
        short = 2 * (step + 1 - first) < self._window_steps
        self._window_steps = 0 if self._window_end is None else max(self._window_steps, step + 1 - first)
        self._window_end = step
        usual = self._window_band.usual(self.config.sigmas, count_from=1.0)
        changes, kept = [], []
        for k, (name, task) in enumerate(self._tasks.items()):
            task.windowed, task.ended, task.full = True, False, False
            value = _read_metric(row, name, self.kinds[name])
            passed_over = task.losses.bad_step >= first if value == math.inf else short
            value = math.nan if passed_over else value
            if not math.isnan(value):
                event = task.windows.note(first, step, value, _WORDS[self.kinds[name]], usual[k], self.config)
                changes += task.note(step, task.windows, event)
            kept.append(value if task.windows.started else math.nan)
        self._window_band.add(np.array([kept]))
        return changes

    def final(self, step: int, *, stopped: bool = False) -> list[Change]:
        """Close what is open, the run having ended at `step`.

        Args:
            step: The last step.
            stopped: The run was stopped because a loss or gradient was not finite.
        """
        ends = (task.end(step, stopped and task.losses.bad_step >= self._newest) for task in self._tasks.values())
        return [change for changes in ends for change in changes]

    def current(self) -> dict[str, str]:
        """Return each task's verdict as it stands; "suspected" while an episode is open."""
        return {name: of["verdict"] for name, of in self.summary().items()}

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return by task `verdict`, `since` and `episodes`.

        The verdict is "healthy", "micro_divergence", "full_divergence", "never_learned" or "no_verdict" (no window had
        both classes, or no label at all); `since` the first step of what it is about, or None. An episode has `first`
        and `last` step (None where it did not come back), and a `reason` in words.
        """
        return {name: task.summary() for name, task in self._tasks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return all that is remembered, as tensors and plain values."""
        return {
            "tasks": {name: asdict(task) for name, task in self._tasks.items()},
            "loss_band": self._loss_band.state_dict(),
            "window_band": self._window_band.state_dict(),
            "usual": [asdict(usual) for usual in self._usual],
            "count": self._count,
            "newest": self._newest,
            "window_end": self._window_end,
            "window_steps": self._window_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            CheckpointError: It belongs to other tasks, or to a memory of another length.
        """
        if list(state["tasks"]) != list(self.kinds):
            raise CheckpointError(
                f"expected saved verdicts on {list(self.kinds)}, found those on {list(state['tasks'])}; resume with "
                "the schema that the run was started with"
            )
        self._loss_band.load_state_dict(state["loss_band"])
        self._window_band.load_state_dict(state["window_band"])
        self._tasks = {name: _task_of(saved) for name, saved in state["tasks"].items()}
        self._usual = [Usual(**usual) for usual in state["usual"]]
        self._limit_K = np.array([usual.limit for usual in self._usual])
        self._count, self._newest = state["count"], state["newest"]
        self._window_end, self._window_steps = state["window_end"], state["window_steps"]


def judge(windows: Mapping[str, Shaped[np.ndarray, " rows"]], config: VerdictConfig | None = None) -> Verdicts:
    """Return the verdicts on a run that has ended, from the windows of its folder: what lay between them is lost.

    Args:
        windows: `RunFolder.readings("windows")`.
        config: Thresholds.

    >>> windows = {"step": np.arange(100, 1000, 100), "normalised_entropy/click": np.array([1.1, *[0.9] * 6, 5.0, 0.9])}
    >>> judge(windows).summary()["click"]["verdict"]
    'micro_divergence'
    """
    areas = {area: kind for kind, area in METRIC.items()}
    named = [name.partition("/") for name in windows]
    verdicts = Verdicts({task: areas[area] for area, _, task in named if area in areas}, config)
    steps = windows["step"].tolist()
    for i, step in enumerate(steps):
        verdicts.add_window(step, {name: float(column[i]) for name, column in windows.items()})
    verdicts.final(steps[-1] if steps else 0)
    return verdicts


def _read_metric(row: Mapping[str, float], task: str, kind: Kind) -> float:
    """Return a task's metric: infinite where a score is not finite, NaN where there is nothing to judge."""
    value = float(row.get(f"{METRIC[kind]}/{task}", math.nan))
    if not math.isnan(value):
        return abs(value)
    plain = float(row.get(f"{_PLAIN[kind]}/{task}", 0.0))
    return math.inf if row.get(f"rows/{task}", 0.0) > 0 and not math.isfinite(plain) else math.nan


def _task_of(saved: Mapping[str, Any]) -> _Task:
    """Make a task from what `asdict` made of it."""
    losses, windows = ({**saved[part], "usual": Usual(**saved[part]["usual"])} for part in ("losses", "windows"))
    episodes = [dict(episode) for episode in saved["episodes"]]
    return _Task(**{**saved, "losses": _Losses(**losses), "windows": _Windows(**windows), "episodes": episodes})
