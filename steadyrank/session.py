"""The state of a run, from its first step to its last: everything that a resume needs is in `state_dict`."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from .checkpoints import Kind
from .data.logs import Cursor, FileNote
from .errors import CheckpointError, DivergenceError
from .instruments import Instruments
from .metrics import DAY_US, iso_day
from .optim.kernels import local
from .parts import Clock, OnEvent, OnProgress, Parts, Progress, wait_for_files
from .recovery import Action, Trouble
from .rescue import Rescue
from .runs import RunFolder
from .schema import Batch
from .scoreboard import Pending
from .stopping import AgreedStop, Stop, write_patiently
from .trackers import Trackers, open_trackers
from .train import Readings, Step, fit

T = TypeVar("T")


class Session:
    """One run, or what a resumed run takes up.

    Args:
        parts: What to train, on what.
        folder: Takes what the run leaves.
        stop: Ends the run early.
        on_progress: Called at each reading.
        on_event: Called with what a user should see at once.
    """

    def __init__(
        self,
        parts: Parts,
        folder: RunFolder,
        stop: Stop,
        on_progress: OnProgress | None = None,
        on_event: OnEvent | None = None,
    ) -> None:
        self.parts, self.folder, self.ranks = parts, folder, parts.ranks
        self._own_stop = stop
        self.stop = stop if self.ranks.is_alone else AgreedStop(stop, self.ranks)
        self.on_progress = on_progress
        self.on_event: OnEvent = on_event or (lambda step, kind, message: None)
        parts.model.to(parts.device)
        optimizers, tasks = list(parts.optimizers.values()), list(parts.schema.tasks)
        for optimizer in optimizers:  # state that was made with the weights moves with them
            optimizer.load_state_dict(optimizer.state_dict())
        self.step = self.rows = 0
        self.clock = Clock(parts.engine.pace if parts.engine else None)
        self.cursor = Cursor()
        self._pending = Pending(parts.schema, truth=parts.reader.encoder.truth, ranks=self.ranks, device=parts.device)
        self.readings = Readings(tasks, parts.model.named_parameters(), optimizers)
        self.trackers = Trackers([])
        self.instruments: Instruments | None = None
        if parts.watch.enabled:
            reader, engine = parts.reader, parts.engine
            self.instruments = Instruments(parts.model, optimizers, reader, parts.watch, folder, self._write, engine)
        kept, warmup_steps = folder.checkpoints, parts.config.warmup_steps
        self.rescue = Rescue(parts.recovery, parts.optimizers, tasks, parts.device, kept, warmup_steps, self.ranks)
        self._troubles: list[Trouble] = []
        self._resumed = self._returned = False
        self._day: int | None = None
        self._next = self.cursor

    def loop(self) -> None:
        """Score and learn every batch from the cursor on, until the log ends or the run is stopped."""
        parts, since = self.parts, self.step if self._resumed else None
        if self.ranks.is_first:
            self.trackers = open_trackers(parts.trackers, self.folder, parts.name, parts.settings, resumed_at=since)
        self.clock.start(self.rows)
        self._give_up_where_hopeless()  # it may have been killed there
        while self._train():  # again after each return to an earlier state
            pass
        if not self.stop.is_set():
            self._flush()

    def finish(self, status: str, message: str) -> dict[str, Any]:
        """Write what is left: readings, the last window, a checkpoint, the summary, and perhaps the report."""
        try:
            self._flush()
        except DivergenceError as error:  # among the last steps before the log failed
            message = f"{message}; {error}"
        if status != "interrupted":  # a resume goes on with the window as it stands
            self._close_window()
        self.event(status, message, process=True) if status != "finished" else None
        if self.step:
            self.checkpoint("aside" if status == "interrupted" else "regular")
        if self.instruments is not None and status != "interrupted":
            self.instruments.watch.finish(stopped=status == "diverged")
        summary = self._summary(status, message)
        self.persist(lambda: self.folder.write_summary(summary))
        self.persist(self.folder.flush)
        self.trackers.close(ok=status == "finished")
        self._pending.close()
        if self.parts.config.report and self.ranks.is_first:
            from .report.page import write_report  # plotly and jinja2, which a run needs at its end alone

            self.persist(lambda: write_report(self.folder))
        return summary

    def checkpoint(self, kind: Kind = "regular", day: str = "") -> None:
        """Save everything that a resume needs; one that is made `aside` leaves no trace in what the run does later."""
        config, regular = self.parts.config, kind == "regular"
        self._flush()
        if not regular and self.ranks.on_first(lambda: self.step in self.folder.checkpoints.steps()):
            return
        self._gather_troubles()
        healthy = self._is_healthy()
        if regular:
            self.persist(lambda: self.folder.turn_over(config.max_readings_mb * 1e6))
            self.rescue.ring.clear()  # from here on the checkpoint is what one returns to: the same after a resume
        state = self.parts.pack(self.state_dict())
        if not regular:
            state["ring"] = [[step, self.parts.pack(held)] for step, held in self.rescue.ring_state()]
        save = partial(self.folder.checkpoints.save, self.step, state, kind=kind, healthy=healthy, day=day)
        self._persist(partial(save, ranks=self.ranks), self.stop)
        self.persist(self.prune)
        if regular:
            self.persist(self.folder.drop_old)
            self._remember(healthy)

    def prune(self) -> None:
        """Delete the checkpoints that are not to be kept."""
        if not self.ranks.is_first:
            return
        self.folder.checkpoints.prune(self.parts.config.keep_checkpoints, self.parts.config.days_kept)

    def resume(self) -> None:
        """Take up the newest checkpoint that is whole; with none, begin at the beginning.

        Raises:
            CheckpointError: It belongs to another model or version.
            DataError: The log is not the one that the run read.
        """
        damaged, notes, kept = list[str](), list[FileNote](), self.folder.checkpoints
        self.ranks.on_first(kept.mend)
        found = kept.load_newest(damaged.append, rows=self.parts.held_rows(), ranks=self.ranks)
        if found is None and kept.steps():
            raise CheckpointError(f"{self.folder.path}: no checkpoint can be used: {damaged[0]}")
        if found is None:
            self.folder.rewind({})
        else:
            try:
                notes = self.load_state_dict(found[1])
                self.rescue.load_ring([[step, self.parts.unpack(held)] for step, held in found[1].get("ring", ())])
            except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
                raise CheckpointError(
                    f"{self.folder.path}: the checkpoint belongs to another model or version ({error}); start anew"
                ) from error
            self.folder.rewind(found[1]["marks"])
            self.prune()
            if "ring" not in found[1]:
                self._remember(self._is_healthy())
        for message in damaged:
            self._say_damaged(message)
        self._note_files(notes)
        self.event("resumed", f"goes on at step {self.step}", process=True)
        self.persist(self.folder.flush)
        self._resumed = True

    def state_dict(self) -> dict[str, Any]:
        """Return all that the run remembers, as tensors and plain values."""
        return {
            "step": self.step,
            "rows": self.rows,
            **self.clock.state_dict(),
            "marks": self.persist(self.folder.mark),
            "readings": self.readings.state_dict(),
            "rescue": self.rescue.state_dict(),
            "troubles": [list(trouble) for trouble in self._troubles],
            "day": self._day,
            "board": self._pending.settle().state_dict(),
            **self._trained_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[FileNote]:
        """Go on from `state`; returns what has become of the log since."""
        self._load_trained_state(self.parts.unpack(state))
        self._pending.settle().load_state_dict(state["board"])
        notes = self.parts.reader.load_state_dict(state["reader"], self.cursor.next_row)
        self.step, self.rows = state["step"], state["rows"]
        self.clock.load_state_dict(state)
        self.readings.load_state_dict(state["readings"])
        self.rescue.load_state_dict(state["rescue"])
        self._troubles = [Trouble(*trouble) for trouble in state["troubles"]]
        self._day = state["day"]
        return notes

    def event(self, kind: str, message: str, **detail: Any) -> None:
        """Write an event down, and show it."""
        self.folder.event(self.step, kind, message, **detail)
        self.say(kind, message)

    def say(self, kind: str, message: str) -> None:
        """Show what is not written down."""
        self.on_event(self.step, kind, message)

    def persist(self, write: Callable[[], T]) -> T:
        """Write, on this rank alone; where the disk is full, wait for space."""
        return self._persist(write, self._own_stop)

    def _persist(self, write: Callable[[], T], stop: Stop) -> T:
        return write_patiently(write, stop, self.parts.config.wait_for_disk_s, partial(self.say, "disk_full"))

    def _trained_state(self) -> dict[str, Any]:
        """Return what training has made, and where it stands in the log: what one returns to."""
        with self.rescue.damper.undamped():
            parts = self.parts.state_dict()
        instruments = {} if self.instruments is None else self.instruments.state_dict()
        return {"rows": self.rows, "cursor": self.cursor.state_dict(), "instruments": instruments, **parts}

    def _load_trained_state(self, state: Mapping[str, Any]) -> None:
        with self.rescue.damper.undamped():
            self.parts.load_state_dict(state)
        self.cursor = Cursor(**state["cursor"])
        if self.instruments is not None:
            self.instruments.load_state_dict(state["instruments"])

    def _train(self) -> bool:
        """Go through the log from the cursor on; says whether the run has returned to an earlier state."""
        parts = self.parts
        steps = fit(
            parts.model,
            parts.optimizers,
            self._batches(),
            parts.schema.tasks,
            device=parts.device,
            watch=self.instruments.watch if self.instruments else None,
            quarantine_rows=parts.config.quarantine_rows,
            scales_K=self.rescue.scales_K,
            engine=parts.engine,
        )
        for batch, outcome in steps:
            self._note(batch, outcome)
            at_rest = self._keep_house()
            if self._returned:
                self._returned = False
                return True
            if self.stop.is_set() and (at_rest or self.stop.is_late()):
                break
        return False

    def _keep_house(self) -> bool:
        """Do what is due after a step; says whether everything that the steps left was written down."""
        config, step = self.parts.config, self.step
        ends_window = step % config.window_steps == 0
        saves = config.checkpoint_every > 0 and step % config.checkpoint_every == 0
        if not (ends_window or saves or step % config.log_every == 0 or self.parts.reader.file_ends):
            return False
        self.stop.agree()
        self._flush()
        if ends_window:
            self._close_window()
        self._recover()
        if self._returned:
            return True
        self._give_up_where_hopeless()
        if saves:
            self.checkpoint()
        elif self.rescue.is_due(step):
            self._remember(self._is_healthy())
        return True

    def _batches(self) -> Iterator[Batch]:
        yield from self._read()
        while self.parts.config.follow and not self.stop.is_set() and self._wait_for_files():
            yield from self._read()

    def _read(self) -> Iterator[Batch]:
        reader = self.parts.reader
        for batch, cursor in reader.batches(self.cursor):
            if self.rescue.leaves_out(cursor.window, cursor.batches, batch.whole_rows):
                self.cursor = cursor
                if self.stop.is_set():
                    return
                continue
            if cursor.window != self.cursor.window:
                self._end_day(batch, cursor)
                if self.instruments is not None:
                    self.instruments.begin_window(batch)
            if self.instruments is not None:
                self.instruments.expect(last_of_window=reader.left == 0)
            self._next = cursor
            self.rescue.damper.apply(self.step + 1)
            yield batch

    def _end_day(self, batch: Batch, cursor: Cursor) -> None:
        """Save a checkpoint where the window that begins with `batch` is the first to begin in a new day."""
        first = self.clock.first_time
        if not self.parts.config.days_kept or cursor.last_time is None or first is None:
            return
        day, before = batch.times[0] // DAY_US, cursor.last_time // DAY_US
        known = first // DAY_US if self._day is None else self._day
        self._day = max(known, day)
        if day > known:
            self.parts.reader.left, left = 0, self.parts.reader.left  # as where the window ended: this one is met anew
            self.checkpoint(day=iso_day(before if before < day else known))
            self.parts.reader.left = left

    def _wait_for_files(self) -> bool:
        """Wait for new files at the end of the log; says whether there are some."""
        self.checkpoint("aside")
        found = wait_for_files(self.parts, self.stop, self.say, self._note_files)
        self.clock.start(self.rows)
        return found

    def _note_files(self, notes: list[FileNote]) -> None:
        for note in notes:
            self.event("file", f"{note.kind} file {note.file}: {note.message}", process=True, file=note.file)
        self.persist(self.folder.flush)

    def _note(self, batch: Batch, outcome: Step) -> None:
        """Count a step; nothing here waits for the device."""
        self.step += 1
        self.rows += batch.whole_rows
        self.cursor = self._next
        self.clock.note(batch)
        self.rescue.note_window(self.step, self.cursor.window)
        self.readings.add(self.step, outcome)
        self._pending.add(batch, outcome.scores)
        if self.instruments is not None:
            self.instruments.note(batch)

    def _flush(self) -> None:
        """Fetch what the steps since the last flush left on the device, and write it down."""
        row = self.parts.merge(self.readings.fetch())
        if not row:
            return
        if self.instruments is not None:
            row |= self.instruments.flush()
        speed = self.clock.lap(self.rows)
        self._pending.flush()
        row |= self.clock.pace.read() | {"speed/rows_per_s": speed, "log/rows": float(self.rows)}
        self._write("steps", self.step, row)
        if self.on_progress is not None:
            losses = {name: row[f"loss/{name}"] for name in self.parts.schema.tasks}
            rows = self.rows + self.rescue.rows_skipped
            auc = self._pending.board.auc_so_far()
            self.on_progress(Progress(self.step, rows, self.parts.reader.rows, speed, losses, auc))
        self._judge()
        self.persist(self.folder.flush)

    def _judge(self) -> None:
        """Say which steps were bad; stop where nothing else deals with them."""
        readings, config = self.readings, self.parts.config
        for rows in readings.quarantined:
            self.event("quarantine", f"{rows}: left out, and the rest of the step learned")
        bad = readings.first_bad
        if bad is None:
            return
        others = f", as were {readings.bad_since - 1} more" if readings.bad_since > 1 else ""
        task = bad.tasks[0] if bad.tasks else ""
        self.event("bad_step", f"{bad}; its update was left out{others}", task=task, count=readings.bad_since)
        self._troubles.append(Trouble("bad_steps", self.step, bad.step, task, str(bad), readings.bad_since))
        endless = readings.in_a_row >= config.max_bad_steps
        if endless or (config.on_bad_step == "stop" and not self.rescue.takes("bad_steps")):
            many = f"{readings.in_a_row} steps in a row were bad, the last reading's first one is " if endless else ""
            raise DivergenceError(
                f"{many}{bad}. No weight was touched by it, and the run up to there is kept in {self.folder.path}. "
                "Look at the report; lower the learning rate or use Clippy, set recovery.mode = 'on', or set "
                "train.on_bad_step = 'skip' to count such steps and go on"
            )

    def _close_window(self) -> None:
        """Write the metrics of the progressive window that ends here."""
        self._flush()
        row = self._pending.settle().close_window()
        if row:
            row |= {"log/rows": float(self.rows), "log/time_s": (self.clock.last_time or 0) / 1e6}
            self._write("windows", self.step, row)
            if self.instruments is not None:
                self.instruments.watch.window(row)
            self.persist(self.folder.flush)

    def _give_up_where_hopeless(self) -> None:
        windows = self.parts.config.give_up_windows
        if windows is None or self.instruments is None:
            return
        verdicts = self.instruments.watch.verdicts
        reason = self.ranks.on_first(lambda: verdicts.hopeless(windows))
        if reason:
            raise DivergenceError(
                f"{reason} (train.give_up_windows). The run up to there is kept in {self.folder.path}. Lower the "
                "learning rate or use Clippy, set recovery.mode = 'on', or leave train.give_up_windows out to see "
                "whether it comes back"
            )

    def _recover(self) -> None:
        """Take the next rung of the ladder where something is wrong."""
        self._gather_troubles()
        troubles, self._troubles = self._troubles, []
        action = self.rescue.decide(self.step, troubles, self._suspected(), self.rescue.can_go_back)
        if action is None:
            return
        done = self.rescue.mode == "on"
        words = action.reason if done else f"advice only (recovery.mode = 'advise'): {action.reason}"
        detail = {"action": action.rung, "task": action.task, "since": action.since, "done": done}
        self.event("recovery", words, **detail)
        if not done:
            return
        if action.rung == "damp":
            self._damp(action)
        elif action.rung == "rollback":
            self._go_back(action)
        elif action.rung == "stop":
            raise DivergenceError(
                f"{action.reason}. The run up to there is kept in {self.folder.path}; look at the report, lower the "
                "learning rate, or change [recovery]"
            )

    def _gather_troubles(self) -> None:
        if self.instruments is not None:
            self._troubles += self.instruments.take_troubles()

    def _damp(self, action: Action) -> None:
        self.event("damped", self.rescue.damper.begin(self.step, action.task), task=action.task)

    def _suspected(self) -> dict[str, int]:
        return {} if self.instruments is None else self.instruments.watch.verdicts.suspected()

    def _is_healthy(self) -> bool:
        held = [x for p in self.parts.model.parameters() if (x := local(p.detach())).numel()]
        finite = all(bool(torch.isfinite(torch.stack(x.aminmax())).all()) for x in held)  # no copy of a table
        return not self.ranks.any(not finite or self.readings.in_a_row > 0 or bool(self._suspected()))

    def _remember(self, healthy: bool) -> None:
        """Keep the state as it is in memory, to return to."""
        if healthy and self.rescue.mode == "on":
            refusal = self.rescue.ring.add(
                self.step, {**self._trained_state(), "board": self._pending.settle().state_dict()}
            )
            if refusal:
                self.event("recovery", refusal)

    def _go_back(self, action: Action) -> None:
        """Return to the newest state from before the trouble, and go on from there as the configuration says.

        Steps go on being counted; what the abandoned ones left in readings and events stays.
        """
        here = self.cursor.window
        then, state = self.rescue.find_earlier(action.since, self._say_damaged, self.parts.held_rows())
        state = self.parts.unpack(state)
        instruments = None if self.instruments is None else self.instruments.go_back(state["instruments"])
        self._load_trained_state({**state, "instruments": instruments})
        self._pending.settle().load_state_dict(state["board"])
        reader = self.parts.reader
        state["reader"]["source"] = reader.source.state_dict()
        self._note_files(reader.load_state_dict(state["reader"], self.cursor.next_row))
        self._gather_troubles()
        self._troubles.clear()  # they are answered
        self.rows = state["rows"]
        self.readings.in_a_row = 0
        self.event("returned", f"went back to the state of step {then}", then=then)
        if action.windows_to_skip:  # what came before the trouble is learned again, at the full rate
            self.rescue.leave_out(action.since, here, action.windows_to_skip)
        if action.damp:
            self._damp(action)
        self._returned, self.rescue.returned_at = True, self.step
        self.checkpoint()  # `replay` starts here: no earlier step leads to the next one

    def _say_damaged(self, message: str) -> None:
        self.event("damaged_checkpoint", f"{message}; the one before was used", process=True)

    def _write(self, table: str, step: int, row: Mapping[str, float]) -> None:
        self.folder.append(table, step, row)
        self.trackers.log(table, step, row)

    def _summary(self, status: str, message: str) -> dict[str, Any]:
        return {
            "name": self.parts.name,
            "status": status,
            "message": message,
            "steps": self.step,
            "rows": self.rows,
            "log_rows": self.parts.reader.rows,
            **self.clock.summary(self.rows),
            "bad_steps": self.readings.bad_steps,
            "recovery": self.rescue.summary(),
            "missing": self.parts.reader.missing.as_dict(),
            **self.parts.facts,
            "tasks": self._outcomes(),
        }

    def _outcomes(self) -> dict[str, Any]:
        """Return what each task reached, with its verdict."""
        tasks = self._pending.settle().summary()
        if self.instruments is not None:
            for name, verdict in self.instruments.watch.verdicts.summary().items():
                tasks[name]["verdict"] = verdict
        return tasks
