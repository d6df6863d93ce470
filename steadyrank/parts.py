"""What a run is made of, and how far it is."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from .data.logs import FileNote, Reader
from .distributed.engine import Engine
from .errors import ConfigError
from .monitors.watch import WatchConfig
from .precision import Precision, PrecisionName
from .ranks import ALONE, Ranks, local_rank, started_together
from .ranks.pace import Pace
from .recovery import RecoveryConfig
from .schema import Batch, Schema
from .settings import Settings
from .stopping import Stop, wait_until
from .trackers import TrackersConfig


class TrainConfig(Settings):
    """The training loop."""

    device: str = "auto"
    """`auto` (a GPU when there is one), `cpu`, `cuda` or `cuda:N`."""
    threads: int | None = Field(default=None, ge=1, le=4096)
    """CPU threads of torch; its own choice when left out. With other work on the machine fewer are much faster."""
    precision: PrecisionName = "auto"
    """In which layers compute: `float32`, `tf32` (GPUs), `bfloat16`, or `auto`: bfloat16 where the processor has it and
    the model is large enough to gain. Weights, optimizers, losses, logits and metrics stay in float32."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which all learning rates rise, by the same amount in each; bounds do not. 0 for none."""
    log_every: int = Field(default=20, ge=1)
    """Steps between two readings; they cross to the host together."""
    window_steps: int = Field(default=100, ge=1)
    """Steps of a progressive window: metrics are given for each."""
    checkpoint_every: int = Field(default=1000, ge=0)
    """Steps between two checkpoints, from which a killed run goes on; 0 leaves the one at the end alone."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints kept, the newest; the newest healthy one is kept in any case."""
    keep_days: int | None = Field(default=None, ge=0)
    """Days of the log of which the last checkpoint is kept besides: one is made at the end of each. When left out, 7
    in a run that follows its log, else none."""
    max_readings_mb: float = Field(default=1000.0, gt=0)
    """Most megabytes of each table of readings, and of the events; beyond it the oldest half is dropped."""
    wait_for_disk_s: float = Field(default=600.0, ge=0)
    """Seconds to wait for space on a full disk before the run ends."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """After a step whose loss or gradient is not finite (its update is left out): stop the run, or count and go on."""
    max_bad_steps: int = Field(default=100, ge=1)
    """Bad steps in a row after which the run stops in any case."""
    give_up_windows: int | None = Field(default=None, ge=1)
    """Progressive windows after which a run that has fully diverged ends: every task that had learned is worse than a
    constant in each of them. Where none had, after three times as many in which all are far worse. Never when left
    out."""
    quarantine_rows: bool = False
    """Leave out a row of an embedding's gradient that is not finite alone, and go on with the rest of the step."""
    report: bool = True
    """Draw the report, report.html, at the end: some seconds. `steadyrank report` draws it later."""
    follow: bool = False
    """At the end of the log, wait for new files and go on: `--follow`. A window then ends where its file ends."""
    follow_every_s: float = Field(default=10.0, gt=0)
    """Seconds between two looks for new files."""
    follow_idle_s: float | None = Field(default=None, ge=0)
    """Seconds without a new file after which a run that follows ends; never when left out."""

    @property
    def days_kept(self) -> int:
        """Days of which a checkpoint is kept."""
        return self.keep_days if self.keep_days is not None else 7 if self.follow else 0


@dataclass
class Parts:
    """What a run is made of."""

    name: str
    schema: Schema
    reader: Reader
    model: nn.Module
    optimizers: dict[str, Optimizer]
    config: TrainConfig
    device: torch.device
    watch: WatchConfig = field(default_factory=WatchConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    trackers: TrackersConfig = field(default_factory=TrackersConfig)
    engine: Engine | None = None
    """Trains the model together with other ranks; None in one process."""
    precision: Precision | None = None
    """How the process multiplies; left as it is when None."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The whole configuration, for the trackers."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More for the summary: sizes of the model, names of the optimizers."""

    @property
    def ranks(self) -> Ranks:
        """Who trains together."""
        return ALONE if self.engine is None else self.engine.ranks

    def set_up(self) -> None:
        """Set this process's threads and precision as the run has them."""
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        if self.precision is not None:
            self.precision.apply()

    def state_dict(self) -> dict[str, Any]:
        """Return what training changes: model, optimizers, what was read, and torch's generators."""
        generators = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "reader": self.reader.state_dict(),
            "model": self.model.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "generators": generators,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the reader is told by whoever knows how far it has read."""
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        torch.set_rng_state(state["generators"]["torch"])
        if "cuda" in state["generators"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["generators"]["cuda"], self.device)

    def pack(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state in which is marked what is this rank's part of a table, for a checkpoint."""
        return dict(state) if self.engine is None else self.engine.pack(state, self.optimizers)

    def unpack(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state, of a checkpoint of any number of ranks, as this rank holds it."""
        return dict(state) if self.engine is None else self.engine.unpack(state, self.optimizers)

    def merge(self, row: dict[str, float]) -> dict[str, float]:
        """Return the readings of some steps as they are over all ranks; a collective."""
        return row if self.engine is None else self.engine.merge(row)

    def held_rows(self) -> dict[str, tuple[int, int]] | None:
        """Return which rows of sharded tables this rank has, as `Checkpoints.load` takes them."""
        return None if self.engine is None else self.engine.held_rows()


def wait_for_files(
    parts: Parts, stop: Stop, say: Callable[[str, str], None], take: Callable[[list[FileNote]], None]
) -> bool:
    """Wait at the end of a log for new files; says whether there are some.

    Args:
        parts: The run that follows its log.
        stop: Ends the waiting.
        say: Takes the kind and the words of what is not written down.
        take: Takes what was found at each look.
    """
    config = parts.config

    def find() -> bool:
        try:
            notes = parts.reader.refresh()
        except ConfigError as error:  # a folder that cannot be read just now
            say("waiting", f"{error}; looking again later")
            return False
        take(notes)
        return any(note.kind == "new" for note in notes)

    words = "the log is at its end; waiting for new files (Ctrl-C stops)"
    return wait_until(find, stop, config.follow_every_s, config.follow_idle_s, lambda: say("waiting", words))


class Clock:
    """How long a run has trained, how fast, and over which stretch of the log's time.

    Args:
        pace: How fast the ranks are; None in one process.

    >>> clock = Clock()
    >>> clock.load_state_dict({"seconds": 8.0, "first_time": 0, "last_time": 86_400_000_000})
    >>> clock.summary(rows=100)
    {'seconds': 8.0, 'rows_per_s': 12.5, 'first_time_s': 0.0, 'last_time_s': 86400.0}
    """

    def __init__(self, pace: Pace | None = None) -> None:
        self.pace = pace or Pace()
        self.seconds = 0.0
        """Seconds of training, in all processes that had a part in the run."""
        self.first_time: int | None = None
        """Earliest time that was learned, in microseconds since 1970; None before the first step."""
        self.last_time: int | None = None
        """The latest."""
        self.start(0)

    def start(self, rows: int) -> None:
        """Begin to count, with so many rows learned; what lies before is not."""
        self._since, self._rows = time.perf_counter(), rows

    def lap(self, rows: int) -> float:
        """Count the time since the start or the last lap, and return the rows learned in a second of it."""
        since, learned = self._since, rows - self._rows
        self.start(rows)
        self.seconds += self._since - since
        return learned / (self._since - since) if self._since > since else math.nan

    def note(self, batch: Batch) -> None:
        """Note of when the rows are that were learned."""
        low, high = batch.times
        self.first_time = low if self.first_time is None else min(low, self.first_time)
        self.last_time = high if self.last_time is None else max(high, self.last_time)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from; plain values."""
        times = {"seconds": self.seconds, "first_time": self.first_time, "last_time": self.last_time}
        return {**times, "pace": self.pace.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the rest of what it holds is passed over."""
        self.seconds, self.first_time, self.last_time = state["seconds"], state["first_time"], state["last_time"]
        if "pace" in state:
            self.pace.load_state_dict(state["pace"])

    def summary(self, rows: int) -> dict[str, Any]:
        """Return what the run's summary says of its times."""
        return {
            "seconds": round(self.seconds, 3),
            "rows_per_s": round(rows / self.seconds, 1) if self.seconds else 0.0,
            "first_time_s": None if self.first_time is None else self.first_time / 1e6,
            "last_time_s": None if self.last_time is None else self.last_time / 1e6,
            **self.pace.summary(),
        }


class Progress(NamedTuple):
    """How far a run is, for a progress bar."""

    step: int
    rows: int
    """Rows of the log that are done: learned, or left out."""
    total_rows: int
    rows_per_s: float
    losses: Mapping[str, float]
    """Mean loss by task since the last reading."""
    auc: Mapping[str, float]
    """Progressive AUC by binary task so far: the mean over windows, weighted by their rows."""


OnProgress = Callable[[Progress], None]
OnEvent = Callable[[int, str, str], None]
"""Called with the step, the kind and the words of what a user should see at once."""


def find_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is a GPU when there is one, and each process on a machine has its own.

    Raises:
        ConfigError: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and started_together():
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"train.device = '{name}' is not to be had here: {error}; 'auto' takes what there is"
        ) from error
    return device
