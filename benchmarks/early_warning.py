"""How often the early warning and the verdicts are right, and how many steps ahead, beside two plain baselines.

    python benchmarks/early_warning.py [--cache FOLDER] [--processes N] [--quick] [--write]

Every run trains a small model on the generated stream with a real `Watch` around it. What truly happened is worked out
apart from it, from the probabilities that the stream's labels were drawn with. Thresholds come from the development
seeds 0 to 5 (docs/log.md); the seeds, rates, widths and incidents here were used for none of them. Each run is kept in
the cache, so that this can be stopped and gone on with; a cache belongs to one version of the code. `--quick` makes 8
runs only, `--write` puts the tables into early_warning.md beside this script.
"""

import argparse
import json
import platform
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from numpy.typing import NDArray
from torch import Tensor

from steadyrank import __version__
from steadyrank.config import RunConfig, demo
from steadyrank.data.incidents import find_strikes
from steadyrank.data.stream import StreamConfig
from steadyrank.instruments import find_fields
from steadyrank.monitors.verdict import Verdicts
from steadyrank.monitors.watch import Watch
from steadyrank.schema import Batch, Task
from steadyrank.scoreboard import Scoreboard
from steadyrank.train import Step, train_step

ROWS, BATCH, FLUSH_STEPS = 200_000, 256, 20
WINDOW_STEPS, WINDOWS = 50, (20, 50, 100)
SEEDS, WIDTHS = (10, 11, 12, 13, 14, 15), (96, 192, 128)
MODEL = "trunk of three layers as wide as said, two cross layers without LayerNorm, towers of 16"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One run: its family, the dense optimizer with its rate over time, and what happens to the data."""

    family: str
    optimizer: str
    seed: int
    rates: tuple[float, float]
    """At the start and at the end."""
    jump_at: float | None = None
    """Share of the run at which the second rate takes over; with None it grows evenly in logarithms."""
    incident: str = ""
    in_order: bool = False
    """Rows in the order of the log, so that an incident strikes few batches fully; else shuffled in 65,536 rows."""

    @property
    def name(self) -> str:
        first, last = self.rates
        rate = f"{first:g}" if first == last else f"{first:g} to {last:g}"
        parts = [self.optimizer, rate, f"width {self.width}", f"seed {self.seed}", self.incident]
        order = "in order" if self.in_order else "shuffled" if self.incident else ""
        return ", ".join(part for part in (*parts, order) if part)

    @property
    def width(self) -> int:
        return WIDTHS[self.seed % len(WIDTHS)]

    def rate(self, done: float) -> float:
        first, last = self.rates
        if self.jump_at is not None:
            return last if done >= self.jump_at else first
        return first * float((last / first) ** done)

    def configure(self) -> RunConfig:
        accumulator = ", initial_accumulator_value=1e-5" if "adagrad" in self.optimizer else ""
        return demo(
            [
                f"data.rows={ROWS}",
                f"data.seed={self.seed}",
                f"seed={self.seed}",
                "data.features=13",
                "data.signal=2.0",
                "data.users=5000",
                "data.items=3000",
                f"data.incidents=[{self.incident and '{' + self.incident + '}'}]",
                f"reader.shuffle={str(not self.in_order).lower()}",
                f"model.trunk.widths={[self.width] * 3}",
                "model.tower=[16]",
                "model.cross={layers=2}",
                f"optimizer.dense={{name='{self.optimizer}', lr={self.rates[0]}{accumulator}}}",
            ]
        )


INCIDENTS = {
    "units of a label": (
        "kind='units', target='rating', strength=50.0, at=0.4",
        "kind='units', target='rating', strength=300.0, at=0.6",
        "kind='units', target='watch_time', strength=100.0, at=0.5",
        "kind='units', target='watch_time', strength=1e6, at=0.6",
    ),
    "units of a number": (
        "kind='units', target='noisy_10', strength=100.0, at=0.4",
        "kind='units', target='noisy_10', strength=1e4, at=0.6",
        "kind='units', target='lognormal_11', strength=1e4, at=0.5",
        "kind='units', target='pareto_12', strength=1e4, at=0.7",
    ),
    "garbage": ("kind='garbage', strength=0.03, at=0.5", "kind='garbage', strength=0.3, at=0.7"),
    "viral, bots, shift": (
        "kind='viral', strength=0.8, at=0.4, length=0.15",
        "kind='bots', strength=0.6, at=0.6, length=0.1",
        "kind='shift', strength=2.0, at=0.5",
    ),
}


def list_cases() -> list[Case]:
    """Return all runs. Written down before the first of them was made, and not changed after."""
    cases = []
    for seed in SEEDS:
        for optimizer, start, ends in (("adam", 1e-3, (0.05, 0.1, 0.3)), ("adagrad", 5e-3, (0.5, 2.0))):
            cases += [Case("ramp", optimizer, seed, (start, end)) for end in ends]
        cases += [Case("ramp, Clippy", "clippy_adagrad", seed, (5e-3, 2.0))]
        cases += [Case("ramp, Clippy", "clippy_adam", seed, (1e-3, 0.3))]
        for optimizer, rate, places in (("adam", 3e-3, (0.5, 0.6)), ("adagrad", 0.03, (0.6, 0.4))):
            cases += [
                Case("jump", optimizer, seed, (rate, rate * by), at) for by, at in zip((4, 8), places, strict=True)
            ]
        cases += [Case("jump, Clippy", "clippy_adagrad", seed, (0.03, 0.24), 0.4)]
        cases += [Case("constant", optimizer, seed, (r, r)) for optimizer, r in (("adam", 2e-3), ("adagrad", 0.015))]
        cases += [Case("constant, hot", "adam", seed, (0.03, 0.03))]
    kinds = [(family, incident) for family, incidents in INCIDENTS.items() for incident in incidents]
    for i, (family, incident) in enumerate(kinds):
        for j, (optimizer, rate) in enumerate((("adam", 3e-3), ("adagrad", 0.03), ("clippy_adagrad", 0.05))):
            seed = SEEDS[(i + 2 * j) % len(SEEDS)]
            cases.append(Case(family, optimizer, seed, (rate, rate), None, incident, (i + j) % 2 == 1))
    return cases


ARRAYS = ("losses", "gradients", "by_task", "excess", "clean")


@dataclass
class Record:
    """What one run left behind."""

    case: Case
    losses: Floats
    """The total loss of each step."""
    gradients: Floats
    """L2 norm of all dense gradients of each step; infinite where one is not finite."""
    by_task: Floats
    """[T, K]: the loss of each task."""
    excess: Floats
    """[T, K, 2]: the model's excess over the truth, and a constant's; sums over the rows of each step."""
    clean: Floats
    """The same of the rows whose columns no incident spoiled."""
    meta: dict[str, Any]
    """Alerts, metrics of the windows by their size, the middle update of each look, kinds of the tasks, and the first
    step of what brings the divergence about, a jump or an incident."""


def find_spoiled(config: StreamConfig) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which rows an incident strikes, and in which it puts wrong values (units, garbage)."""
    struck, spoiled = np.zeros(config.rows, bool), np.zeros(config.rows, bool)
    for first in range(0, config.rows, config.block_rows):
        count = min(config.block_rows, config.rows - first)
        for strike in find_strikes(config.incidents, config.seed, config.rows, first, count):
            struck[first + strike.rows] = True
            if strike.incident.kind in ("units", "garbage"):
                spoiled[first + strike.rows] = True
    return struck, spoiled


def measure_excess(scores_BK: Tensor, batch: Batch, tasks: Sequence[Task], rows_B: Tensor) -> Floats:
    """Return, for each task, the model's expected loss above that of the truth, and a constant's; summed over rows.

    Binary: cross-entropy under the true probability, less its entropy. Regression: the squared distance from the true
    expectation. The constant is the best one for this batch.
    """
    assert batch.truth is not None
    found = np.zeros((len(tasks), 2))
    for k, task in enumerate(tasks):
        rows = rows_B & (batch.weights[:, k] > 0)
        p, z = batch.truth[rows, k].double(), scores_BK[rows, k].double()
        if len(p) < 2:
            continue
        if task.kind == "regression":
            found[k] = float((z - p).square().sum()), float(p.var() * len(p))
            continue
        p = p.clamp(1e-6, 1 - 1e-6)
        entropy = -(p * p.log() + (1 - p) * (1 - p).log())
        base = p.mean()
        constant = -(p * base.log() + (1 - p) * (1 - base).log())
        mine = F.binary_cross_entropy_with_logits(z, p, reduction="none")
        found[k] = float((mine - entropy).sum()), float((constant - entropy).sum())
    return found


class Run:
    """A run under way."""

    def __init__(self, case: Case) -> None:
        config = case.configure()
        assert isinstance(config.data, StreamConfig)
        self.case, self.parts = case, config.build()
        schema, model = self.parts.schema, self.parts.model
        self.tasks, self.optimizers = list(schema.tasks.values()), list(self.parts.optimizers.values())
        self.matrices = [name for name, p in model.named_parameters() if p.dim() > 1]
        self.watch = Watch(
            model,
            self.optimizers,
            {name: task.kind for name, task in schema.tasks.items()},
            flush_every=0,
            fields=find_fields(model, schema),
            loss_weights=[task.loss_weight for task in self.tasks],
            write=self.take,
        )
        self.updates: list[tuple[int, float]] = []
        self.boards = {size: Scoreboard(schema, truth=False) for size in WINDOWS}
        self.windows: dict[str, list[tuple[int, dict[str, float]]]] = {str(size): [] for size in WINDOWS}
        self.struck, self.spoiled = find_spoiled(config.data)
        self.known: list[int] = []
        self.cause = 1
        if case.jump_at is not None:
            self.cause = round(case.jump_at * ROWS / BATCH) + 1
        elif case.incident:
            self.cause = 0  # still to come

    def take(self, table: str, step: int, row: Mapping[str, float]) -> None:
        """Keep the middle one of the weight matrices' updates over Clippy's bound, as the warning takes it."""
        found = [row[f"update_over_bound/{name}"] for name in self.matrices if f"update_over_bound/{name}" in row]
        if table == "dynamics" and found:
            self.updates.append((step, float(np.median(found))))

    def make(self) -> Record:
        """Learn the whole stream."""
        losses, gradients, by_task, excess, clean = [], [], [], [], []
        group = self.parts.optimizers["dense"].param_groups[0]
        self.parts.model.train()
        for step, (batch, _) in enumerate(self.parts.reader.batches(), start=1):
            assert batch.row is not None
            group["lr"] = self.case.rate((step - 1) * BATCH / ROWS)
            outcome = train_step(self.parts.model, self.optimizers, batch, self.tasks, self.watch)
            if not self.cause and self.struck[batch.row.numpy()].any():
                self.cause = step
            self.note(step, batch, outcome)
            losses.append(float(outcome.total))
            gradients.append(_gradient_norm(group["params"]) if outcome.verdict.ok else np.inf)
            by_task.append(outcome.losses.double().numpy())
            spoiled_B = torch.from_numpy(self.spoiled[batch.row.numpy()])
            excess.append(measure_excess(outcome.scores, batch, self.tasks, torch.ones_like(spoiled_B)))
            clean.append(measure_excess(outcome.scores, batch, self.tasks, ~spoiled_B))
        arrays = map(np.array, (losses, gradients, by_task, excess, clean))
        return Record(self.case, **dict(zip(ARRAYS, arrays, strict=True)), meta=self.finish(step))

    def note(self, step: int, batch: Batch, outcome: Step) -> None:
        """Do what the trainer does after a step: flush, and close windows."""
        for board in self.boards.values():
            board.add(batch, outcome.scores.float())
        if step % FLUSH_STEPS == 0 or step % WINDOW_STEPS == 0:
            self.flush(step)
        for size in WINDOWS:
            if step % size == 0:
                self.close_window(step, size)

    def close_window(self, step: int, size: int) -> None:
        row = self.boards[size].close_window()
        self.windows[str(size)].append((step, row))
        if size == WINDOW_STEPS:
            self.watch.window(row)

    def flush(self, step: int) -> None:
        self.watch.flush()
        self.known += [step] * (len(self.watch.alerts) - len(self.known))

    def finish(self, steps: int) -> dict[str, Any]:
        self.flush(steps)
        for size in WINDOWS:
            if steps % size:
                self.close_window(steps, size)
        self.watch.finish()
        alerts = [
            {"step": a.step, "known": known, "level": a.level, "sign": a.sign, "reason": a.reason}
            for a, known in zip(self.watch.alerts, self.known, strict=True)
        ]
        kinds = {name: task.kind for name, task in self.parts.schema.tasks.items()}
        return {
            "alerts": alerts,
            "windows": self.windows,
            "updates": self.updates,
            "kinds": kinds,
            "cause": self.cause,
        }


def _gradient_norm(parameters: Sequence[Tensor]) -> float:
    return float(torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None])).norm())


def make_record(case: Case, cache: Path) -> Record:
    """Return the record of a run: from the cache, or by making it."""
    path = cache / f"{case.name.replace(' ', '_').replace(chr(39), '')}.npz"
    if not path.exists():
        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rates that are far too high are what this is about
            record = Run(case).make()
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            meta = json.dumps(record.meta)
            np.savez_compressed(file, **{name: getattr(record, name) for name in ARRAYS}, meta=np.array(meta))
        unfinished.rename(path)
    with np.load(path) as saved:
        return Record(case=case, **{name: saved[name] for name in ARRAYS}, meta=json.loads(str(saved["meta"])))


# What truly happened.

BLOCK = 10  # steps over which the excess is summed
LEARNED = 0.95
"""A task has learned once the model's excess over five blocks is below this share of a constant's."""


class Episode(NamedTuple):
    """A stretch in which a task that had learned is no better than a constant."""

    task: str
    first: int
    """The first step."""
    full: bool
    """It lasts to the end of the run."""


@dataclass
class Truth:
    """What became of a run."""

    tasks: dict[str, str]
    """`healthy`, `micro`, `full` or `never learned`."""
    episodes: list[Episode] = field(default_factory=list)

    def onset(self, tasks: int = 1) -> int | None:
        """Return the step by which so many tasks have begun to diverge."""
        first = sorted({e.task: e.first for e in sorted(self.episodes, key=lambda e: -e.first)}.values())
        return first[tasks - 1] if len(first) >= tasks else None

    @property
    def run(self) -> str:
        """The worst of the tasks; `never learned` only where none did."""
        kinds = set(self.tasks.values())
        return next(kind for kind in ("full", "micro", "healthy", "never learned") if kind in kinds)


def find_truth(excess_TK2: Floats, tasks: Sequence[str]) -> Truth:
    """Work out what became of each task, from the excess of the model and of a constant."""
    truth = Truth({})
    for k, task in enumerate(tasks):
        learned, episodes = find_episodes(excess_TK2[:, k], task)
        worst = "full" if any(e.full for e in episodes) else "micro" if episodes else "healthy"
        truth.tasks[task] = worst if learned else "never learned"
        truth.episodes += episodes
    return truth


def find_episodes(excess_T2: Floats, task: str) -> tuple[bool, list[Episode]]:
    """Return whether a task ever learned, and its divergences: 1.5 times a constant's excess in one block, or as much
    as a constant's in two blocks in a row."""
    blocks = len(excess_T2) // BLOCK
    sums_N2 = excess_T2[: blocks * BLOCK].reshape(blocks, BLOCK, 2).sum(1)
    with np.errstate(all="ignore"):
        ratio_N = sums_N2[:, 0] / sums_N2[:, 1]
        ratio_T = excess_T2[:, 0] / excess_T2[:, 1]
    ratio_N = np.where((sums_N2 == 0).all(1), 0.0, np.nan_to_num(ratio_N, nan=np.inf, posinf=np.inf))
    means = np.lib.stride_tricks.sliding_window_view(ratio_N, 5).mean(1)
    best_N = np.minimum.accumulate(np.concatenate([np.full(4, np.inf), means]))
    over_N = np.append((ratio_N >= 1) & (best_N < LEARNED), [False, False])
    episodes, i = [], 0
    while i < blocks:
        if not (over_N[i] and (ratio_N[i] > 1.5 or over_N[i + 1])):
            i += 1
            continue
        end = i + 1
        while over_N[end] or over_N[min(end + 1, blocks)]:  # one block below does not end it
            end += 1
        full = end >= blocks - 2
        if full or ratio_N[i:end].max() > 1.05:
            limit = 1.5 if not ratio_N[i] < 1.5 else 1.0
            odd = ~(ratio_T[i * BLOCK : end * BLOCK] < limit)
            episodes.append(Episode(task, i * BLOCK + int(odd.argmax()) + 1, full))
        i = end
    return bool(best_N[-1] < LEARNED), episodes


# Who warns, and when.

QUIET, HISTORY, WARM_UP, SIGMAS = 200, 200, 40, 7.0


def keep_apart(steps: Sequence[int]) -> list[int]:
    """Return the first step, and each that comes more than 200 after the last one kept, as `Watch` does."""
    kept: list[int] = []
    for step in steps:
        if not kept or step - kept[-1] > QUIET:
            kept.append(step)
    return kept


def leave_band(values_T: Floats, robust: bool) -> list[int]:
    """Return the steps at which a series lies over mean + 7 sd of its last 200 steps.

    Args:
        values_T: What is not finite lies over any band, and does not enter one.
        robust: Median and 1.4826 times the median absolute deviation, in place of mean and standard deviation.
    """
    steps = []
    for t in range(WARM_UP, len(values_T)):
        past = values_T[max(0, t - HISTORY) : t]
        past = past[np.isfinite(past)]
        if robust:
            middle = np.median(past)
            spread = 1.4826 * np.median(np.abs(past - middle))
        else:
            middle, spread = past.mean(), past.std()
        if not values_T[t] <= middle + SIGMAS * spread:
            steps.append(t + 1)
    return keep_apart(steps)


def alarms(record: Record, sign: str = "", when: str = "step") -> list[int]:
    """Return the steps of the alarms of `Watch`, in order."""
    found = [a for a in record.meta["alerts"] if a["level"] == "alarm" and sign in ("", a["sign"])]
    return sorted(a[when] for a in found)


Detector = Callable[[Record], list[int]]
DETECTORS: dict[str, Detector] = {
    "early warning": alarms,
    "- told at the next flush": lambda r: alarms(r, when="known"),
    "- sign `update` alone": lambda r: alarms(r, "update"),
    "- sign `gradient` alone": lambda r: alarms(r, "gradient"),
    "- sign `logit` alone": lambda r: alarms(r, "logit"),
    "loss, mean + 7 sd": lambda r: leave_band(r.losses, robust=False),
    "loss, median + 7 robust sd": lambda r: leave_band(r.losses, robust=True),
    "gradient norm, mean + 7 sd": lambda r: leave_band(r.gradients, robust=False),
    "gradient norm, median + 7 robust sd": lambda r: leave_band(r.gradients, robust=True),
}


@dataclass
class Score:
    """How a detector did on some runs."""

    hits: int = 0
    missed: int = 0
    """No alarm by the onset."""
    late: list[int] = field(default_factory=list)
    """Of those missed: steps from the onset to the first alarm."""
    false: int = 0
    """Runs with an alarm, and no divergence."""
    healthy: int = 0
    early: int = 0
    """Of the hits: the first alarm came before the jump or the incident, so that another reason raised it."""
    events: int = 0
    """Alarms in runs that never diverge."""
    healthy_steps: int = 0
    leads: list[int] = field(default_factory=list)

    def add(self, record: Record, onset: int | None, steps: Sequence[int]) -> None:
        first = min(steps, default=None)
        if onset is None:
            self.healthy += 1
            self.false += first is not None
            self.events += len(steps)
            self.healthy_steps += len(record.losses)
        elif first is not None and first <= onset:
            self.hits += 1
            self.early += first < record.meta["cause"]
            self.leads.append(onset - first)
        else:
            self.missed += 1
            self.late += [] if first is None else [first - onset]


def count_score(records: Sequence[Record], truths: Sequence[Truth], detector: Detector, tasks: int = 1) -> Score:
    """Score a detector on the runs in which some task learned: against the step by which so many had diverged.

    Runs in which only fewer did are neither healthy nor diverged, and left out.
    """
    score = Score()
    for record, truth in zip(records, truths, strict=True):
        onset = truth.onset(tasks)
        if truth.run != "never learned" and (onset is not None or not truth.episodes):
            score.add(record, onset, detector(record))
    return score


def share(part: int, whole: int) -> str:
    """Return a share with Wilson's 95 % interval.

    >>> share(9, 10)
    '0.90 (0.60 to 0.98)'
    """
    if not whole:
        return "-"
    p, z2 = part / whole, 1.96**2
    middle, half = p + z2 / (2 * whole), 1.96 * (p * (1 - p) / whole + z2 / (4 * whole**2)) ** 0.5
    low, high = ((middle + side * half) / (1 + z2 / whole) for side in (-1, 1))
    return f"{p:.2f} ({max(low, 0):.2f} to {min(high, 1):.2f})"


def quartiles(values: Sequence[int]) -> str:
    """Return the median, and the quartiles in brackets."""
    if not values:
        return "-"
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    return [*lines, *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows), ""]


def report_detectors(
    records: Sequence[Record], truths: Sequence[Truth], detectors: Mapping[str, Detector], tasks: int = 1
) -> list[str]:
    rows = []
    for name, detector in detectors.items():
        s = count_score(records, truths, detector, tasks)
        per_1000 = f"{1000 * s.events / s.healthy_steps:.2f}" if s.healthy_steps else "-"
        precision, recall = share(s.hits, s.hits + s.false), share(s.hits, s.hits + s.missed)
        late = f"{s.missed}, {sum(x <= SOON for x in s.late)}, {len(s.late)}"
        rows.append((name, precision, recall, quartiles(s.leads), s.hits, s.early, late, s.false, per_1000))
    headings = ["detector", "precision", "recall", "lead in steps", "hits", "of them before the cause"]
    return table(
        [*headings, f"missed, alarm within {SOON} steps, alarm later", "false", "alarms in 1,000 healthy steps"], rows
    )


SOON = 20


def exceed(threshold: float, looks: int = 3) -> Detector:
    """Return the sign `update` at another threshold."""

    def find(record: Record) -> list[int]:
        steps, values = [step for step, _ in record.meta["updates"]], [value for _, value in record.meta["updates"]]
        over = [np.median(values[max(0, i - looks + 1) : i + 1]) > threshold for i in range(len(values))]
        return keep_apart([s for s, yes in zip(steps, over, strict=True) if yes and s > 100])

    return find


THRESHOLDS = (0.4, 0.6, 0.8, 1.0, 1.1, 1.5, 2.0)


def report_families(records: Sequence[Record], truths: Sequence[Truth], tasks: int = 1) -> list[str]:
    rows = []
    for family in dict.fromkeys(record.case.family for record in records):
        held = [(r, t) for r, t in zip(records, truths, strict=True) if r.case.family == family]
        mine, theirs = [r for r, _ in held], [t for _, t in held]
        s = count_score(mine, theirs, alarms, tasks)
        within = Counter("0" if x == 0 else "1-19" if x < 20 else "20-99" if x < 100 else "100+" for x in s.leads)
        spread = ", ".join(f"{name}: {within[name]}" for name in ("0", "1-19", "20-99", "100+") if within[name])
        cells = (family, s.hits + s.missed, s.healthy, s.hits, s.missed, s.false, quartiles(s.leads), spread or "-")
        others = [count_score(mine, theirs, DETECTORS[name], tasks) for name in ROBUST]
        rows.append((*cells, *(f"{other.hits}, {other.false}; {quartiles(other.leads)}" for other in others)))
    headings = ["family", "diverged", "did not", "hits", "missed", "false", "lead", "leads"]
    return table([*headings, *(f"{name}: hits, false; lead" for name in ROBUST)], rows)


ROBUST = ("loss, median + 7 robust sd", "gradient norm, median + 7 robust sd")


VERDICTS = {"micro_divergence": "micro", "full_divergence": "full", "never_learned": "never learned"}


def report_verdicts(records: Sequence[Record], truths: Sequence[Truth]) -> list[str]:
    """Return the tables on the final verdicts, by window size; then what was taken for what, at that of `Watch`."""
    rows, met = [], Counter[tuple[str, str]]()
    for size in WINDOWS:
        counts, since, pairs = count_verdicts(records, truths, size)
        for name, c in counts.items():
            precision, recall = share(c["hit"], c["hit"] + c["false"]), share(c["hit"], c["hit"] + c["missed"])
            when = quartiles(since) if name == "by task" else ""
            rows.append((size, name, precision, recall, c["hit"], c["missed"], c["false"], c["right"], when))
        met = pairs if size == WINDOW_STEPS else met
    headings = ["steps of a window", "diverged or not", "precision", "recall", "hits", "missed", "false", "rightly not"]
    lines = table([*headings, "first step named less the onset"], rows)
    words = ["healthy", "micro", "full", "never learned", "no verdict"]
    cells = [(true, *(met[true, word] for word in words)) for true in words[:4]]
    return lines + table([f"truth, by task; verdict by windows of {WINDOW_STEPS}:", *words], cells)


def judge(record: Record, size: int) -> dict[str, dict[str, Any]]:
    """Return the final verdict on each task, as `Watch` gives it with windows of that size."""
    verdicts, seen = Verdicts(record.meta["kinds"]), 0
    for step, row in record.meta["windows"][str(size)]:
        losses_TK = record.by_task[seen:step]
        verdicts.add_losses(seen + 1, losses_TK, losses_TK != 0)
        verdicts.add_window(step, row)
        seen = step
    verdicts.final(seen)
    return verdicts.summary()


def in_words(verdict: str) -> str:
    return VERDICTS.get(verdict, verdict.replace("_", " "))


def count_verdicts(
    records: Sequence[Record], truths: Sequence[Truth], size: int
) -> tuple[dict[str, Counter[str]], list[int], Counter[tuple[str, str]]]:
    """Count right and wrong verdicts by run, by task, and of full against micro where both say diverged.

    Returns:
        The counts; the first step that each verdict names less the true onset; how often each verdict met each truth.
    """
    runs, tasks, full, since = Counter[str](), Counter[str](), Counter[str](), []
    pairs = Counter[tuple[str, str]]()
    for record, truth in zip(records, truths, strict=True):
        found = judge(record, size)
        said = {task: in_words(found[task]["verdict"]) for task in truth.tasks}
        pairs.update((true, said[task]) for task, true in truth.tasks.items())
        if truth.run != "never learned":
            runs[_outcome(truth.run in _DIVERGED, any(word in _DIVERGED for word in said.values()))] += 1
        for task, true in truth.tasks.items():
            if true != "never learned":
                tasks[_outcome(true in _DIVERGED, said[task] in _DIVERGED)] += 1
            if true in _DIVERGED and said[task] in _DIVERGED:
                full[_outcome(true == "full", said[task] == "full")] += 1
                since.append(found[task]["since"] - min(e.first for e in truth.episodes if e.task == task))
    return {"by run": runs, "by task": tasks, "full, not micro, by task (where both say diverged)": full}, since, pairs


_DIVERGED = ("micro", "full")


def _outcome(true: bool, said: bool) -> str:
    return ("hit" if said else "missed") if true else ("false" if said else "right")


def report_errors(records: Sequence[Record], truths: Sequence[Truth]) -> list[str]:
    """Name the runs in which the early warning was wrong, and those that never learned."""
    lines: dict[str, list[str]] = {"Missed": [], "False alarms": [], "Never learned, and in no score": []}
    for record, truth in zip(records, truths, strict=True):
        found = [f"{a['sign']} at {a['step']}" for a in record.meta["alerts"] if a["level"] == "alarm"]
        said, first = ", ".join(found[:3]) or "no alarm", min(alarms(record), default=None)
        line = f"- {record.case.family}: {record.case.name}: "
        onset = truth.onset()
        if truth.run == "never learned":
            lines["Never learned, and in no score"].append(line + said)
        elif onset is None and first is not None:
            lines["False alarms"].append(line + said)
        elif onset is not None and (first is None or first > onset):
            tasks = ", ".join(dict.fromkeys(e.task for e in sorted(truth.episodes, key=lambda e: e.first)))
            lines["Missed"].append(f"{line}diverged at {onset} ({truth.run}: {tasks}); {said}")
    return [text for title, held in lines.items() if held for text in (f"{title} ({len(held)}):", "", *held, "")]


def report(records: Sequence[Record]) -> list[str]:
    truths = [find_truth(r.excess, list(r.meta["kinds"])) for r in records]
    cleaned = [find_truth(r.clean, list(r.meta["kinds"])) for r in records]
    kinds = Counter(truth.run for truth in truths)
    seen = ", ".join(f"{kinds[k]} {w}" for k, w in (("full", "to the end"), ("micro", "for a while")))
    notices = sum(a["level"] == "notice" for r in records for a in r.meta["alerts"])
    return [
        f"{len(records)} runs of {len(records[0].losses)} steps: {kinds['full'] + kinds['micro']} diverged ({seen}), "
        f"{kinds['healthy']} did not, {kinds['never learned']} never learned and are in no score. "
        f"{notices} notices were given, which count as no alarm.",
        "",
        "## Early warning",
        "",
        *report_detectors(records, truths, DETECTORS),
        "## By family",
        "",
        *report_families(records, truths),
        "## Where only rows that no incident spoiled are looked at",
        "",
        "A model may score spoiled rows badly and be none the worse; here it has diverged when it is harmed itself.",
        "",
        *report_detectors(records, cleaned, DETECTORS),
        "## Where a run has diverged once half of its tasks have",
        "",
        "Rare tasks (shares, likes) slip past a constant long before the model breaks. Added after the first results.",
        "",
        *report_detectors(records, truths, DETECTORS, tasks=3),
        *report_families(records, truths, tasks=3),
        "## The sign `update` at other thresholds",
        "",
        "To show what another threshold would give or take; none is chosen by it.",
        "",
        *report_detectors(records, truths, {f"above {x}": exceed(x) for x in THRESHOLDS}),
        "## Verdicts",
        "",
        *report_verdicts(records, truths),
        "## Where the early warning was wrong",
        "",
        *report_errors(records, truths),
    ]


def describe(arguments: argparse.Namespace) -> list[str]:
    here = Path(__file__).parent
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return [
        f"# Early warning and verdicts, {date.today().isoformat()}",
        "",
        f"`python benchmarks/early_warning.py{' --quick' if arguments.quick else ''} --write`, steadyrank "
        f"{__version__} at {asked.stdout.strip() or 'no commit'}, torch {torch.__version__}, {platform.machine()} CPU, "
        f"one thread a run, Python {platform.python_version()}.",
        "",
        f"Each run: {ROWS:,} rows in batches of {BATCH}, six tasks, {MODEL} (widths {', '.join(map(str, WIDTHS))}), "
        f"seeds {SEEDS[0]} to {SEEDS[-1]}; `Watch` at its defaults, flushed every {FLUSH_STEPS} steps, windows of "
        f"{WINDOW_STEPS}. The script lists the runs.",
        "",
        *NOTES,
        "",
    ]


NOTES = [
    "**Thresholds** come from seeds 0 to 5 with other widths, rates and incidents (docs/log.md). The list of runs here "
    "was fixed before the first was made.",
    "",
    "**Truth.** For each task and step, the expected loss above that of the true probability, as a share of what the "
    "best constant has: below 0.95 over 50 steps a task has learned; at 1.5 in ten steps or at 1 in twenty it has "
    "diverged from then on. No label, no window and no reading of `Watch` is in it.",
    "",
    "**Score.** An alarm at or before the onset is a hit, whenever it came; *before the cause* counts those that came "
    "before the jump or the incident. An alarm in a run that never diverges is false. The first alarm counts. "
    "**Lead**: onset less the step that showed the sign, median (quartiles). In brackets behind a share: Wilson's 95 % "
    "interval; runs of one seed share a stream, so the true ones are wider. The baselines look at every step, over the "
    "last 200; the total loss, and the L2 norm of all dense gradients.",
]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "steadyrank_early_warning")
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--quick", action="store_true", help="8 runs only")
    options.add_argument("--write", action="store_true", help="write the results file")
    arguments = options.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    cases = list_cases()
    cases = cases[:: len(cases) // 7][:8] if arguments.quick else cases
    with ProcessPoolExecutor(arguments.processes) as pool:
        waiting = [pool.submit(make_record, case, arguments.cache) for case in cases]
        for done, future in enumerate(as_completed(waiting), start=1):
            future.result()
            print(f"\r{done} of {len(cases)} runs", end="", flush=True)
    lines = [*describe(arguments), *report([make_record(case, arguments.cache) for case in cases])]
    print("\n" + "\n".join(lines))
    if arguments.write:
        path = Path(__file__).with_suffix(".md")
        path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
