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

A run is *hopeless* once every task that had learned has diverged and stays so, or where none has, once all tasks are
far worse than a constant for long (`Verdicts.hopeless`): slow learning is no divergence.

Values that are not finite count at once, and none is ever remembered, so that they blind nothing.

Shapes: T steps, K tasks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Shaped

from ..errors import CheckpointError, ConfigError, check_known
from .band import RobustBand, Usual
from .episodes import FAR, TaskState, task_of
from .episodes import Change as Change
from .episodes import VerdictConfig as VerdictConfig

Kind = Literal["binary", "regression"]
METRIC: dict[Kind, str] = {"binary": "normalised_entropy", "regression": "normalised_rmse"}
"""The area of the readings by which a task of each kind is judged: 1 or above is no better than a constant."""
_PLAIN: dict[Kind, str] = {"binary": "log_loss", "regression": "rmse"}  # not finite only where a score is not
_WORDS: dict[Kind, str] = {"binary": "normalised entropy", "regression": "RMSE over that of the running mean"}
_LONGER = 3  # times as many windows as of a divergence show that a run has never learned, and will not
_REFRESH = 10  # steps between two looks at a band: the median of 200 steps hardly moves in fewer


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
        self._tasks = {name: TaskState(name) for name in self.kinds}
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
            judged = math.nan if passed_over else value
            if not math.isnan(judged):
                event = task.windows.note(first, step, judged, _WORDS[self.kinds[name]], usual[k], self.config)
                changes += task.note(step, task.windows, event)
            # Where the newest loss is not finite either, it is not one odd batch in each window.
            task.count(value if value == math.inf and task.losses.bad else judged)
            kept.append(judged if task.windows.started else math.nan)
        self._window_band.add(np.array([kept]))
        return changes

    def hopeless(self, windows: int) -> str:
        """Say why a run will not come back, in words; "" while it may.

        Every task that had learned, and there is one, has an open episode and is at 1 or above, or not finite, in each
        of the last `windows` windows. Where no task has learned: every task is above 1.1, or not finite, in each of the
        last 3 times as many. A task without a window to judge has no say, and a window that was passed over neither
        counts nor breaks the row.

        >>> verdicts = Verdicts({"click": "binary"})
        >>> for step, value in enumerate([0.9] * 10 + [30.0] * 4, start=1):
        ...     _ = verdicts.add_window(step, {"normalised_entropy/click": value})
        >>> verdicts.hopeless(4)
        'every task that had learned (click) has diverged: ... in each of the last 4 windows'
        >>> verdicts.hopeless(5)
        ''
        """
        seen = {name: task.windows for name, task in self._tasks.items() if task.windows.seen}
        learned = {name: of for name, of in seen.items() if of.learned}
        names, needed = ", ".join(learned or seen), windows if learned else _LONGER * windows
        if min((of.lost if learned else of.far for of in (learned or seen).values()), default=0) < needed:
            return ""
        what = f"every task that had learned ({names}) has diverged" if learned else f"no task has learned ({names})"
        level = "at 1 or above" if learned else f"above {FAR}"
        metric = "normalised entropy, or RMSE over that of the running mean"
        return f"{what}: {metric}, {level}, or not finite, in each of the last {needed} windows"

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

    def suspected(self) -> dict[str, int]:
        """Return the tasks whose episode is open, with its first step."""
        found = self.summary()
        return {name: int(of["since"]) for name, of in found.items() if of["verdict"] == "suspected"}

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
        self._tasks = {name: task_of(saved) for name, saved in state["tasks"].items()}
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


def find_kinds(tasks: Sequence[str] | Mapping[str, Kind]) -> dict[str, Kind]:
    """Return the kind of each task: of names alone "binary".

    Raises:
        ConfigError: There is no task, one twice, or an unknown kind.
    """
    if not tasks or isinstance(tasks, str):
        raise ConfigError(f"Watch: expected at least one task, found {tasks!r}; name the losses: tasks=('click',)")
    kinds: dict[str, Kind] = dict(tasks) if isinstance(tasks, Mapping) else dict.fromkeys(tasks, "binary")
    if len(kinds) != len(tasks):
        raise ConfigError(f"Watch: expected tasks of different names, found {list(tasks)}")
    for kind in kinds.values():
        check_known(kind, get_args(Kind), "kind of task")
    return kinds
