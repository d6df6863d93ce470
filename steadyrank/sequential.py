"""Sequential training with progressive validation: every row is scored as in serving before it is learned.

Each part's own config is beside it; `steadyrank.config` puts them together.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from .data.logs import Cursor, Reader
from .errors import CheckpointError, ConfigError, DataError, DivergenceError, SteadyRankError
from .instruments import Instruments
from .monitors.watch import WatchConfig
from .report.page import write_report
from .runs import RunFolder
from .schema import Batch, Schema
from .scoreboard import Scoreboard
from .settings import Settings
from .trackers import Trackers, TrackersConfig, open_trackers
from .train import Readings, Step, fit


class TrainConfig(Settings):
    """The training loop."""

    device: str = "auto"
    """`auto` (a GPU when there is one), `cpu`, `cuda` or `cuda:N`."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; its own choice when left out. With other work on the machine fewer are much faster."""
    log_every: int = Field(default=20, ge=1)
    """Steps between two readings; they cross to the host together."""
    window_steps: int = Field(default=100, ge=1)
    """Steps of a progressive window: metrics are given for each."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints; only at the end when left out."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints kept, the newest."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """After a step whose loss or gradient is not finite (its update is left out): stop the run, or count and go on."""


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
    trackers: TrackersConfig = field(default_factory=TrackersConfig)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The whole configuration, for the trackers."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More for the summary: sizes of the model, names of the optimizers."""


class Progress(NamedTuple):
    """How far a run is, for a progress bar."""

    step: int
    rows: int
    total_rows: int
    rows_per_s: float
    losses: Mapping[str, float]
    """Mean loss by task since the last reading."""
    auc: Mapping[str, float]
    """Progressive AUC by binary task so far: the mean over windows, weighted by their rows."""


OnProgress = Callable[[Progress], None]


def run(
    parts: Parts, folder: RunFolder, *, on_progress: OnProgress | None = None, resume: bool = False
) -> dict[str, Any]:
    """Train over the whole log in time order and leave everything in the run folder.

    Ctrl-C ends after the step in progress, with a checkpoint. Whatever ends the run early, the run up to there is kept.

    Args:
        parts: What to train, on what.
        folder: An open run folder with its configuration written.
        on_progress: Called at each reading.
        resume: Go on from the newest checkpoint.

    Returns:
        The summary, as in summary.json.

    Raises:
        DataError: The log cannot be read to its end.
        DivergenceError: A step was not finite and `on_bad_step` is "stop".
        CheckpointError: The run folder cannot be written.
    """
    if parts.config.threads is not None:
        torch.set_num_threads(parts.config.threads)
    session = _Session(parts, folder, on_progress)
    if resume:
        session.resume()
    else:
        for part, line in parts.facts.get("bound", {}).items():
            folder.event(0, "bound", f"optimizer.{part}: {line}")
    status, message = "finished", ""
    failure: SteadyRankError | None = None
    with _stop_on_interrupt() as stop:
        try:
            session.loop(stop)
        except DataError as error:
            status, message, failure = "data_error", str(error), error
        except DivergenceError as error:
            status, message, failure = "diverged", str(error), error
        if stop.is_set() and failure is None:
            status, message = "interrupted", f"stopped by the user at step {session.step}"
        summary = session.finish(status, message)
    if failure is not None:
        raise failure
    return summary


class _Session:
    """The state of one run: everything that a resume needs is in `state_dict`."""

    def __init__(self, parts: Parts, folder: RunFolder, on_progress: OnProgress | None) -> None:
        self.parts, self.folder, self.on_progress = parts, folder, on_progress
        parts.model.to(parts.device)
        for optimizer in parts.optimizers.values():  # state that was made with the weights moves with them
            optimizer.load_state_dict(optimizer.state_dict())
        self.step, self.rows, self.seconds = 0, 0, 0.0
        self.first_time: int | None = None
        self.last_time: int | None = None
        self.cursor = Cursor()
        self.board = Scoreboard(parts.schema, truth=parts.reader.encoder.truth)
        self.readings = Readings(
            list(parts.schema.tasks), parts.model.named_parameters(), list(parts.optimizers.values())
        )
        self.trackers = Trackers([])
        self._pending: list[tuple[Batch, Tensor]] = []
        self._next = self.cursor
        self._mark = (time.perf_counter(), 0)
        self.instruments: Instruments | None = None
        if parts.watch.enabled:
            optimizers = list(parts.optimizers.values())
            self.instruments = Instruments(parts.model, optimizers, parts.reader, parts.watch, folder, self._write)

    def loop(self, stop: threading.Event) -> None:
        """Score and learn every batch from the cursor on, until the log ends or `stop` is set."""
        config = self.parts.config
        self.trackers = open_trackers(
            self.parts.trackers, self.folder, self.parts.name, self.parts.settings, resumed_at=self.step or None
        )
        self._mark = (time.perf_counter(), self.rows)
        steps = fit(
            self.parts.model,
            self.parts.optimizers,
            self._batches(),
            self.parts.schema.tasks,
            device=self.parts.device,
            watch=self.instruments.watch if self.instruments else None,
        )
        for batch, outcome in steps:
            self._note(batch, outcome)
            if self.step % config.log_every == 0:
                self._flush()
            if self.step % config.window_steps == 0:
                self._close_window()
            if config.checkpoint_every is not None and self.step % config.checkpoint_every == 0:
                self.checkpoint()
            if stop.is_set():
                break
        self._flush()

    def finish(self, status: str, message: str) -> dict[str, Any]:
        """Write what is left: readings, the last window, a checkpoint, the summary and the report."""
        try:
            self._flush()
        except DivergenceError as error:  # among the last steps before the log failed
            message = f"{message}; {error}"
        if status != "interrupted":  # a resume goes on with the window as it stands
            self._close_window()
        if self.step:
            self.checkpoint()
        if self.instruments is not None and status != "interrupted":
            self.instruments.watch.finish(stopped=status == "diverged")
        if status != "finished":
            self.folder.event(self.step, status, message)
        summary = self._summary(status, message)
        self.folder.write_summary(summary)
        self.folder.flush()
        self.trackers.close(ok=status == "finished")
        write_report(self.folder)
        return summary

    def resume(self) -> None:
        """Take up the newest checkpoint.

        Raises:
            CheckpointError: There is none, or it belongs to another model.
        """
        state = self.folder.load_checkpoint()
        try:
            self.parts.model.load_state_dict(state["model"])
            for name, optimizer in self.parts.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
            self.board.load_state_dict(state["board"])
            self.cursor = Cursor(**state["cursor"])
            missing = state["missing"]
            for kind in ("null", "non_finite"):
                getattr(self.parts.reader.missing, kind).update(missing[kind])
            self.parts.reader.missing.rows = missing["rows"]
            self.step, self.rows, self.seconds = state["step"], state["rows"], state["seconds"]
            self.first_time, self.last_time = state["first_time"], state["last_time"]
            self.readings.bad_steps = state["bad_steps"]
            if self.instruments is not None:
                self.instruments.load_state_dict(state["instruments"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder.path}: the checkpoint belongs to another model or version ({error}); start anew"
            ) from error
        self.folder.truncate_readings(self.step)

    def checkpoint(self) -> None:
        """Save everything that a resume needs."""
        self._flush()
        self.folder.save_checkpoint(self.step, self.state_dict())
        self.folder.prune_checkpoints(self.parts.config.keep_checkpoints)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the loop remembers, as tensors and plain values."""
        missing = self.parts.reader.missing
        return {
            "step": self.step,
            "rows": self.rows,
            "seconds": self.seconds,
            "first_time": self.first_time,
            "last_time": self.last_time,
            "bad_steps": self.readings.bad_steps,
            "cursor": self.cursor.state_dict(),
            "missing": {"rows": missing.rows, "null": dict(missing.null), "non_finite": dict(missing.non_finite)},
            "model": self.parts.model.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.parts.optimizers.items()},
            "board": self.board.state_dict(),
            "instruments": {} if self.instruments is None else self.instruments.state_dict(),
        }

    def _batches(self) -> Iterator[Batch]:
        reader, window = self.parts.reader, self.cursor.window
        for batch, cursor in reader.batches(self.cursor):
            self._next = cursor
            if self.instruments is not None:
                if cursor.window != window:
                    self.instruments.begin_window(batch)
                self.instruments.expect(last_of_window=reader.left == 0)
            window = cursor.window
            yield batch

    def _note(self, batch: Batch, outcome: Step) -> None:
        """Count a step; nothing here waits for the device."""
        self.step += 1
        self.rows += len(batch)
        self.cursor = self._next
        low, high = int(batch.time.min()), int(batch.time.max())
        self.first_time = low if self.first_time is None else min(low, self.first_time)
        self.last_time = high if self.last_time is None else max(high, self.last_time)
        self.readings.add(self.step, outcome)
        self._pending.append((batch, outcome.scores))
        if self.instruments is not None:
            self.instruments.note(batch)

    def _flush(self) -> None:
        """Fetch what the steps since the last flush left on the device, and write it down."""
        row = self.readings.fetch()
        if not row:
            return
        if self.instruments is not None:
            row |= self.instruments.flush()
        now = time.perf_counter()
        elapsed = now - self._mark[0]
        speed = (self.rows - self._mark[1]) / elapsed if elapsed > 0 else math.nan
        self.seconds += elapsed
        scores = torch.cat([scores for _, scores in self._pending]).float().cpu()
        for (batch, _), scores_BK in zip(self._pending, scores.split([len(b) for b, _ in self._pending]), strict=True):
            self.board.add(batch, scores_BK)
        self._pending.clear()
        self._mark = (now, self.rows)
        self._write("steps", self.step, {**row, "speed/rows_per_s": speed, "log/rows": float(self.rows)})
        if self.on_progress is not None:
            losses = {name: row[f"loss/{name}"] for name in self.parts.schema.tasks}
            self.on_progress(
                Progress(self.step, self.rows, self.parts.reader.rows, speed, losses, self.board.auc_so_far())
            )
        if self.readings.first_bad is not None:
            self._judge()

    def _judge(self) -> None:
        """Say which step was bad; stop unless the config says to go on."""
        bad = self.readings.first_bad
        self.folder.event(bad.step if bad else self.step, "bad_step", f"{bad}; its update was left out")
        if self.parts.config.on_bad_step == "stop":
            raise DivergenceError(
                f"{bad}. No weight was touched by it, and the run up to there is kept in {self.folder.path}. "
                "Look at the report; lower the learning rate or use Clippy, or set train.on_bad_step = 'skip' to count "
                "such steps and go on"
            )

    def _close_window(self) -> None:
        """Write the metrics of the progressive window that ends here."""
        self._flush()
        row = self.board.close_window()
        if row:
            row |= {"log/rows": float(self.rows), "log/time_s": (self.last_time or 0) / 1e6}
            self._write("windows", self.step, row)
            if self.instruments is not None:
                self.instruments.watch.window(row)
            self.folder.flush()

    def _write(self, table: str, step: int, row: Mapping[str, float]) -> None:
        self.folder.append(table, step, row)
        self.trackers.log(table, step, row)

    def _summary(self, status: str, message: str) -> dict[str, Any]:
        missing = self.parts.reader.missing
        return {
            "name": self.parts.name,
            "status": status,
            "message": message,
            "steps": self.step,
            "rows": self.rows,
            "seconds": round(self.seconds, 3),
            "rows_per_s": round(self.rows / self.seconds, 1) if self.seconds else 0.0,
            "bad_steps": self.readings.bad_steps,
            "first_time_s": None if self.first_time is None else self.first_time / 1e6,
            "last_time_s": None if self.last_time is None else self.last_time / 1e6,
            "missing": missing.as_dict(),
            **self.parts.facts,
            "tasks": self._outcomes(),
        }

    def _outcomes(self) -> dict[str, Any]:
        """Return what each task reached, with its verdict."""
        tasks = self.board.summary()
        if self.instruments is not None:
            for name, verdict in self.instruments.watch.verdicts.summary().items():
                tasks[name]["verdict"] = verdict
        return tasks


def find_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is a GPU when there is one.

    Raises:
        ConfigError: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"train.device = '{name}' is not to be had here: {error}; 'auto' takes what there is"
        ) from error
    return device


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Let the first Ctrl-C set an event, so that no step is cut in two; the second one interrupts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
