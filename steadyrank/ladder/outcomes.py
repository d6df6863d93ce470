"""What came of one cell of a ladder: one flat record, read off the cell's run folder, written to outcomes.csv.

Shapes: W windows.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import CheckpointError, ConfigError
from ..files import replace, writing
from ..monitors.verdict import METRIC
from ..runs import RunFolder
from .grid import Cell, LadderConfig
from .numbers import LEAST, spike_share

Ending = Literal["healthy", "micro_divergence", "miscalibrated", "full_divergence", "never_learned"]
"""The verdict on a cell: on the worst of its tasks, where never learned means half of the tasks that can be learned.

A binary task whose log loss ends worse than a constant's while it still ranks is miscalibrated and no full divergence.
"""
RANKS = 0.55
"""The AUC above which a task still ranks."""
LEARNED = ("healthy", "micro_divergence", "full_divergence")
SCORED = {"binary": "auc", "regression": "normalised_rmse"}
"""The reading by which a task of each kind is scored."""
_PLAIN = {"auc": "log_loss", "normalised_entropy": "log_loss", "normalised_rmse": "rmse"}
"""The reading that is not finite only where a score is not; NaN also where there is no label."""
_CONSTANT = {"auc": 0.5, "normalised_rmse": 1.0, "normalised_entropy": 1.0}
Stretch = tuple[float, float]


@dataclass(frozen=True)
class Outcome:
    """One cell: where it stands on the ladder, and what came of it.

    By task are `verdicts` and, as means over the windows of a stretch of the log, `valid` and `test`: AUC of a binary
    task, RMSE over that of a constant (NRMSE) of a regression. Where a run ended early since it had diverged, the
    windows that it never reached count as a constant's: AUC 0.5, NRMSE 1.
    """

    cell: str
    """The run folder's name below `cells/`."""
    optimizer: str
    family: str
    """Settings of one method have one family: the best of them stands for it."""
    model: str
    incident: str
    rate: float
    seed: int
    status: str
    """How the run ended: finished, diverged, ..."""
    steps: int
    rows: int
    seconds: float
    precision: str = ""
    loss: float = math.nan
    """Mean over tasks of the test windows' normalised entropy, or squared NRMSE: a constant has 1, the most counted."""
    spikes: float = math.nan
    """Share of steps whose loss lies more than 7 standard deviations above the mean of the last 1000 (OLMo 2)."""
    headroom: float = math.nan
    """Median of the second half: how many times larger the step could have been before the loss rises."""
    moved: float = math.nan
    """The effective rate: median over looks and weight matrices of the norm of a step over that of the weights."""
    factor: float = math.nan
    """Median clip factor of the dense tensors over the run; NaN where nothing has one."""
    episodes: int = 0
    """Micro-divergences, those of several tasks at one time counted once."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    verdicts: Mapping[str, str] = field(default_factory=dict)
    valid: Mapping[str, float] = field(default_factory=dict)
    test: Mapping[str, float] = field(default_factory=dict)

    def quality(self, part: Literal["valid", "test"] = "test") -> float:
        """Return the mean AUC of the binary tasks, or where there are none 1 - the mean NRMSE: higher is better."""
        scores = getattr(self, part)
        aucs = [scores[task] for task, kind in self.kinds.items() if kind == "binary"]
        return _mean(aucs) if aucs else 1 - self.nrmse(part)

    def nrmse(self, part: Literal["valid", "test"] = "test") -> float:
        """Return the mean NRMSE of the regressions; NaN where there are none."""
        return _mean([getattr(self, part)[task] for task, kind in self.kinds.items() if kind == "regression"])

    def ending(self, learnable: Iterable[str]) -> Ending:
        """Return the verdict on the cell.

        Args:
            learnable: The tasks that some cell on the same data learned.
        """
        of = [self._told(task) for task in self.verdicts]
        tasks = [task for task in learnable if task in self.verdicts] or list(self.verdicts)
        if self.status == "diverged" or "full_divergence" in of:
            return "full_divergence"
        if sum(self.verdicts[task] == "never_learned" for task in tasks) * 2 >= max(len(tasks), 1):
            return "never_learned"
        return next((kind for kind in ("miscalibrated", "micro_divergence") if kind in of), "healthy")

    def _told(self, task: str) -> str:
        """Return a task's verdict, with a look at whether it still ranks."""
        ranks = self.kinds.get(task) == "binary" and self.test.get(task, 0.0) > RANKS
        verdict = self.verdicts[task]
        return "miscalibrated" if verdict == "full_divergence" and ranks else verdict


def find_learnable(outcomes: Iterable[Outcome]) -> list[str]:
    """Return the tasks that any of the cells learned, for `Outcome.ending` of cells on the same data."""
    tasks: dict[str, bool] = {}
    for outcome in outcomes:
        for task, verdict in outcome.verdicts.items():
            tasks[task] = tasks.get(task, False) or verdict in LEARNED
    return [task for task, learned in tasks.items() if learned]


def read_outcome(folder: RunFolder, cell: Cell, config: LadderConfig) -> Outcome:
    """Return what came of a cell whose run has ended.

    Raises:
        CheckpointError: Its run folder is damaged, or the run has not ended.
    """
    summary = folder.summary()
    if summary is None:
        raise CheckpointError(f"{folder.path}: the run has not ended; go on with the ladder")
    try:
        return _gather_outcome(folder, summary, cell, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder.path}: summary.json or a table of readings is none that a run writes ({type(error).__name__}: "
            f"{error}); delete the folder, and go on with the ladder"
        ) from error


def _gather_outcome(folder: RunFolder, summary: Mapping[str, Any], cell: Cell, config: LadderConfig) -> Outcome:
    tables = {name: folder.readings(name) for name in ("steps", "windows", "dynamics", "curvature")}
    tasks, steps = summary["tasks"], max(int(summary["steps"]), 1)
    kinds = {name: task["kind"] for name, task in tasks.items()}
    window_rows = summary["rows"] / steps * cell.config.train.window_steps
    ended = _Ends(tables["windows"], int(summary["log_rows"]), window_rows, summary["status"] == "finished")
    return Outcome(
        cell=cell.name,
        optimizer=cell.optimizer,
        family=cell.family,
        model=cell.model,
        incident=cell.incident,
        rate=cell.rate,
        seed=cell.seed,
        status=summary["status"],
        steps=summary["steps"],
        rows=summary["rows"],
        seconds=summary["seconds"],
        precision=str(summary["precision"]).partition(":")[0].rpartition(" ")[2],
        loss=_mean([_relative_loss(ended, task, kind, config.test) for task, kind in kinds.items()]),
        spikes=_count_spikes(tables["steps"].get("loss/total", np.zeros(0))),
        headroom=_middle(tables["curvature"], "headroom/total", steps // 2),
        moved=_middle(tables["dynamics"], "update_over_weight/", steps // 2),
        factor=_middle(tables["steps"], "clip_factor/", steps // 2),
        episodes=_count_episodes(tasks),
        kinds=kinds,
        verdicts={name: task.get("verdict", {}).get("verdict", "no_verdict") for name, task in tasks.items()},
        valid={task: ended.mean(f"{SCORED[kind]}/{task}", config.valid) for task, kind in kinds.items()},
        test={task: ended.mean(f"{SCORED[kind]}/{task}", config.test) for task, kind in kinds.items()},
    )


class _Ends:
    """The windows of a run by where in the log they end; those that it never reached count as a constant's."""

    def __init__(self, windows: Mapping[str, np.ndarray], log_rows: int, window_rows: float, whole: bool) -> None:
        self.windows = windows
        self.seen_W = windows.get("log/rows", np.zeros(0)) / log_rows
        last = float(self.seen_W[-1]) if len(self.seen_W) else 0.0
        missing = np.arange(last, 1 - 1e-9, max(window_rows / log_rows, 1e-6))[1:]
        missing = np.append(missing, 1.0) if last < 1 - 1e-9 else missing
        self.missing = np.zeros(0) if whole else missing  # a run that left rows out ends before them

    def mean(self, reading: str, stretch: Stretch) -> float:
        """Return the mean of a reading over the windows that end in a stretch of the log.

        A window of one class only is left out. One with a score that is NaN counts as a constant's.
        """
        low, high = stretch
        area, _, task = reading.partition("/")
        inside_W = (self.seen_W > low + 1e-9) & (self.seen_W <= high + 1e-9)
        values = self._column(reading)[inside_W]
        lost_W = (self._column(f"rows/{task}") > 0) & ~np.isfinite(self._column(f"{_PLAIN[area]}/{task}"))
        lost = int((np.isnan(values) & lost_W[inside_W]).sum())
        absent = int(((self.missing > low + 1e-9) & (self.missing <= high + 1e-9)).sum())
        return _mean([*values[~np.isnan(values)], *[_CONSTANT[area]] * (lost + absent)])

    def _column(self, reading: str) -> np.ndarray:
        return self.windows.get(reading, np.full(len(self.seen_W), np.nan))


def _relative_loss(ended: _Ends, task: str, kind: str, stretch: Stretch) -> float:
    value = ended.mean(f"{METRIC[kind]}/{task}", stretch)  # type: ignore[index]  # kinds come from a schema
    return min(value if kind == "binary" else value**2, 1.0) if not math.isnan(value) else value


def _middle(columns: Mapping[str, np.ndarray], prefix: str, after: int) -> float:
    """Return the median over the readings of that name, or whose names begin so, and the steps after one."""
    late = columns["step"] > after
    found = [values[late] for name, values in columns.items() if name.startswith(prefix)]
    values = np.concatenate(found) if found else np.zeros(0)
    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else math.nan


def _count_spikes(losses: np.ndarray) -> float:
    """Return the share of spikes; of a short run the first quarter is its history."""
    return spike_share(losses, least=min(LEAST, len(losses) // 4))


def _count_episodes(tasks: Mapping[str, Any]) -> int:
    """Count the divergences that came back; those of several tasks that overlap are one."""
    spans = sorted(
        (episode["first"], episode["last"])
        for task in tasks.values()
        for episode in task.get("verdict", {}).get("episodes", [])
        if episode.get("last") is not None
    )
    count, end = 0, -1
    for first, last in spans:
        count += first > end
        end = max(end, last)
    return count


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(sum(known) / len(known)) if known else math.nan


_BY_TASK = ("kinds", "verdicts", "valid", "test")


def write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write outcomes.csv: a row for each cell, with columns `verdicts/click`, `test/click`, ... for its tasks."""
    rows = [_flatten(outcome) for outcome in outcomes]
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines: list[str] = []
    for row in (dict(zip(names, names, strict=True)), *rows):
        lines.append(_line([row.get(name, "") for name in names]))
    with writing(path, ConfigError, "choose another --out"):
        replace(path, "".join(lines))


def read_outcomes(path: Path) -> list[Outcome]:
    """Return what `write_outcomes` wrote, to its six digits.

    Raises:
        ConfigError: There is no such file, or it is another one.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_gather(row) for row in csv.DictReader(file)]
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file '{path}'; steadyrank ladder writes it") from error
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"'{path}' is no table of outcomes: {error}") from error


def _flatten(outcome: Outcome) -> dict[str, Any]:
    flat = {name: value for name, value in asdict(outcome).items() if name not in _BY_TASK}
    return flat | {f"{part}/{task}": value for part in _BY_TASK for task, value in getattr(outcome, part).items()}


def _gather(row: Mapping[str, str]) -> Outcome:
    """Make an outcome of a line; a cell that says nothing of a task has empty columns for it."""
    if None in row or None in row.values():
        raise ValueError("a line has not as many values as there are columns")
    values: dict[str, Any] = {part: {} for part in _BY_TASK}
    for spec in fields(Outcome):
        if spec.name not in _BY_TASK:
            text = row[spec.name]
            values[spec.name] = int(text) if spec.type is int else float(text) if spec.type is float else text
    for name, text in row.items():
        part, slash, task = name.partition("/")
        if slash and text:
            values[part][task] = float(text) if part in ("valid", "test") else text
    return Outcome(**values)


def _line(values: Sequence[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])
    return out.getvalue()
