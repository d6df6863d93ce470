"""The run folder: configuration, readings, events, summary and checkpoints of one run, written and read here alone.

config.toml         the resolved configuration
environment.json    format, versions, machine, start
readings/T.jsonl    one line for each row of table T, append-only, after a line with the names of its values
events.jsonl        what the guard and the recovery did, and why
summary.json        how it ended
checkpoints/step_N/ see checkpoints.py
causes/step_N.json  what stood behind a warning or verdict at that step
report.html, tensorboard/, .lock

Readings and events are journals (journal.py): where their size is bounded they go on in T.1.jsonl, T.2.jsonl, ...
"""

import itertools
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Shaped

from .checkpoints import Checkpoints, version_of
from .errors import CheckpointError, ConfigError
from .files import decode, read_lines, read_object, read_text, refuse_link, replace, to_json, writing
from .journal import Journal, Mark

FORMAT = 3
"""Version of the folder's layout. 1 spelt the names out in each row of readings, 2 had other checkpoints; readings and
events of both are still read."""
_READABLE = (1, 2, FORMAT)
_ENVIRONMENT = "environment.json"
_CONFIG = "config.toml"
_EVENTS = "events"
_SUMMARY = "summary.json"
_READINGS = "readings"
_CHECKPOINTS = "checkpoints"
_CAUSES = "causes"
_TENSORBOARD = "tensorboard"
_REPORT = "report.html"
_LOCK = ".lock"
_MOST_EMPTY = 64
"""Cells of a table of readings for each value that it holds; a run's have one to ten."""
_BEGUN = frozenset({_LOCK, f".{_ENVIRONMENT}.tmp"})
"""What a folder may hold and still be empty: a run was killed before it had made it."""
# The environment comes last: a folder stays a run folder, which overwrite may delete, until all else is gone.
_OWN = (_CONFIG, _READINGS, _SUMMARY, _CHECKPOINTS, _CAUSES, _REPORT, _TENSORBOARD, _ENVIRONMENT)


class RunFolder:
    """One run's folder. A writer creates it, a reader opens it; only one process may write at a time.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, RunFolder.create(folder + "/demo") as run:
    ...     run.append("steps", 10, {"loss/total": 0.7})
    ...     run.append("steps", 20, {"loss/total": float("inf")})
    ...     run.readings("steps")["loss/total"]
    array([0.7, inf])
    """

    def __init__(self, path: str | Path) -> None:
        """Point at a folder without touching it; callers use `create` or `open`."""
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / _CHECKPOINTS)
        """All that a resume needs, at some steps."""
        self._events = Journal(self.path, _EVENTS)
        self._tables: dict[str, Journal] = {}
        self._buffers: dict[str, list[str]] = {}
        self._names: dict[str, list[str]] = {}

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool = False) -> "RunFolder":
        """Make a new run folder, with its environment.json.

        Args:
            path: Where; parents are made too.
            overwrite: Delete what an earlier run wrote there. Files that no run writes stay.

        Raises:
            ConfigError: The folder is not empty (without `overwrite`) or is no run folder, or cannot be written.
        """
        run = cls(path)
        with writing(run.path, ConfigError, "choose another --out"):
            if run.path.is_dir() and any(path.name not in _BEGUN for path in run.path.iterdir()):
                run._clear(overwrite)
            new = next((p for p in (*reversed(run.path.parents), run.path) if not p.exists()), None)
            try:
                run.path.mkdir(parents=True, exist_ok=True)
                replace(run.path / _ENVIRONMENT, to_json(_environment()))
                for name in (_READINGS, _CHECKPOINTS):
                    (run.path / name).mkdir()
            except OSError:
                for path in [new] if new else [run.path / name for name in (_READINGS, _CHECKPOINTS, _ENVIRONMENT)]:
                    with suppress(OSError):
                        _delete(path)
                raise
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Open an existing run folder for reading, or to go on with it.

        Raises:
            CheckpointError: It is no run folder, or its format is not the one that this version reads.
        """
        run = cls(path)
        _check_format(run.path / _ENVIRONMENT, run.environment())
        for name in (_READINGS, _CHECKPOINTS, _CAUSES, _TENSORBOARD):
            refuse_link(run.path / name)
        return run

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def environment(self) -> dict[str, Any]:
        """Return the versions, machine and start time that were recorded when the run was created."""
        path = self.path / _ENVIRONMENT
        if not path.is_file():
            raise CheckpointError(f"{self.path} is no run folder: {_ENVIRONMENT} was expected in it; check the path")
        return read_object(path)

    def write_config(self, toml_text: str) -> None:
        """Write config.toml."""
        with writing(self.path / _CONFIG):
            replace(self.path / _CONFIG, toml_text)

    def config_text(self) -> str:
        """Return config.toml as it stands."""
        return read_text(self.path / _CONFIG)

    def append(self, table: str, step: int, values: Mapping[str, float | int]) -> None:
        """Add a row of readings by name (`area/name`), NaN and infinite ones too, to a table; `flush` writes it."""
        if clash := {"step", "time"} & values.keys():
            raise ValueError(f"readings may not be called {sorted(clash)}: the row has these columns already")
        lines = self._buffers.setdefault(table, [])
        if self._names.get(table) != (names := list(values)):
            self._names[table] = names
            lines.append(to_json({"names": names}, indent=None))
        numbers = [float(v) for v in values.values()]
        row = {"step": int(step), "time": time.time(), "values": numbers}
        # Hundreds of numbers a row: the plain way is five times as fast where they are finite.
        lines.append(json.dumps(row) if all(map(math.isfinite, numbers)) else to_json(row, indent=None))

    def flush(self) -> None:
        """Write the buffered rows and events, each table in one write, and hand them to the operating system."""
        for table, lines in self._buffers.items():
            if lines:
                (self._events if table == _EVENTS else self._table(table)).append(lines)
                lines.clear()

    close = flush

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from writing here; a process that is killed lets go of it.

        Raises:
            ConfigError: Another process does.
        """
        lock = FileLock(self.path / _LOCK)
        refuse_link(self.path / _LOCK)
        with writing(self.path / _LOCK), suppress(NotImplementedError):  # a file system without locks
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise ConfigError(
                    f"another process is training in {self.path}; wait until it has ended, stop it, or choose another "
                    "--out"
                ) from error
        try:
            yield
        finally:
            lock.release()

    def readings(self, table: str) -> dict[str, Shaped[np.ndarray, " rows"]]:
        """Return a table's columns: "step" (int64), "time" (when written, seconds since 1970) and each name.

        NaN stands where a row lacks a name. A table that was never written has no rows; a torn last line is left out.

        Raises:
            CheckpointError: A line is none that a run writes.
        """
        self.flush()
        try:
            return _columns(self._table(table).rows())
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{self.path}: the table of readings '{table}' is damaged: {type(error).__name__}: {error}; delete "
                f"{_READINGS}/{table}.jsonl to read the others"
            ) from error

    def mark(self) -> dict[str, Mark]:
        """Bring everything to the disk itself, and return how far readings and events go, for `rewind`."""
        self.flush()
        return {_EVENTS: self._events.mark()} | {
            f"{_READINGS}/{t}": self._table(t).mark() for t in self._known_tables()
        }

    def rewind(self, marks: Mapping[str, Mark]) -> None:
        """Cut readings and events back to where they stood: nothing is there twice when the steps after are made again.

        Events that tell of the process and not of the training (`process=True`) stay; `flush` writes them anew. The
        summary goes: the run has not ended.
        """
        self._buffers.clear()
        self._names.clear()
        kept = [row for row in self._events.tail(marks.get(_EVENTS, [])) if row.get("process")]
        self._events.rewind(marks.get(_EVENTS, []))
        for table in self._known_tables():
            self._table(table).rewind(marks.get(f"{_READINGS}/{table}", []))
        self._buffers[_EVENTS] = [to_json(row, indent=None) for row in kept]
        with writing(self.path / _SUMMARY):
            (self.path / _SUMMARY).unlink(missing_ok=True)

    def turn_over(self, most_bytes: int | float) -> None:
        """Begin new files for readings and events of which half of `most_bytes` is full, right before a checkpoint."""
        self.flush()
        for name in self._known_tables():
            if self._table(name).turn_over(most_bytes):
                self._names.pop(name, None)
        self._events.turn_over(most_bytes)

    def drop_old(self) -> None:
        """Delete what `turn_over` has left behind, right after a checkpoint."""
        for journal in (self._events, *map(self._table, self._known_tables())):
            journal.drop_old()

    def truncate_readings(self, step: int) -> None:
        """Drop the rows after `step` from every table, as a user's own loop does that resumes there. Events stay."""
        self.flush()
        for path in sorted((self.path / _READINGS).glob("*.jsonl")):
            kept = [to_json(row, indent=None) + "\n" for row in read_lines(path) if row.get("step", 0) <= step]
            with writing(path):
                replace(path, "".join(kept))

    def event(self, step: int, kind: str, message: str, **detail: Any) -> None:
        """Record what happened at `step`: its kind (one word), a sentence, and details by name; `flush` writes it."""
        row = {**detail, "step": int(step), "time": time.time(), "kind": kind, "message": message}
        self._buffers.setdefault(_EVENTS, []).append(to_json(row, indent=None))

    def events(self) -> list[dict[str, Any]]:
        """Return the events, first to last: step, time, kind, message and details (those not finite as words)."""
        self.flush()
        return self._events.rows()

    def write_cause(self, step: int, cause: Mapping[str, Any]) -> Path:
        """Write causes/step_N.json: what stood behind a warning or verdict at `step`."""
        path = self.path / _CAUSES / f"step_{step}.json"
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            replace(path, to_json({**cause, "step": int(step)}))
        return path

    def causes(self) -> list[dict[str, Any]]:
        """Return the cause reports in the order of their steps."""
        found = [decode(read_object(path)) for path in (self.path / _CAUSES).glob("step_*.json")]
        return sorted(found, key=lambda cause: cause["step"] if isinstance(cause.get("step"), int) else 0)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json: how the run ended."""
        with writing(self.path / _SUMMARY):
            replace(self.path / _SUMMARY, to_json(dict(summary)))

    def summary(self) -> dict[str, Any] | None:
        """Return the summary, or None while the run goes on or when it was killed."""
        path = self.path / _SUMMARY
        return decode(read_object(path)) if path.exists() else None

    def tensorboard_path(self) -> Path:
        """Return where TensorBoard event files belong."""
        return self.path / _TENSORBOARD

    def report_path(self) -> Path:
        """Return where the report belongs."""
        return self.path / _REPORT

    def write_report(self, page: str) -> Path:
        """Write report.html and return its path."""
        with writing(self.report_path()):
            replace(self.report_path(), page)
        return self.report_path()

    def _table(self, table: str) -> Journal:
        return self._tables.setdefault(table, Journal(self.path / _READINGS, table))

    def _known_tables(self) -> list[str]:
        return sorted({path.name.partition(".")[0] for path in (self.path / _READINGS).glob("*.jsonl")})

    def _clear(self, overwrite: bool) -> None:
        """Delete what an earlier run left in the folder, or refuse to."""
        if not overwrite:
            raise ConfigError(f"{self.path} is not empty; give another --out, or --overwrite to replace the run in it")
        try:
            known = "format" in self.environment() and "steadyrank" in self.environment()
        except CheckpointError:
            known = False
        if not known:
            raise ConfigError(
                f"{self.path} is not empty and was not written by a run (no {_ENVIRONMENT} of ours), so --overwrite "
                "leaves it alone; give another --out"
            )
        with self.locked():
            for path in (*map(self._events.path, self._events.parts()), *(self.path / name for name in _OWN)):
                _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class OthersFolder(RunFolder):
    """A run's folder as those ranks see it that do not write it: what they would write is dropped."""

    def append(self, table: str, step: int, values: Mapping[str, float | int]) -> None:
        """Drop a row."""

    def event(self, step: int, kind: str, message: str, **detail: Any) -> None:
        """Drop an event."""

    def flush(self) -> None:
        """Do nothing."""

    def mark(self) -> dict[str, Mark]:
        """Return nothing."""
        return {}

    def rewind(self, marks: Mapping[str, Mark]) -> None:
        """Do nothing."""

    def turn_over(self, most_bytes: int | float) -> None:
        """Do nothing."""

    def drop_old(self) -> None:
        """Do nothing."""

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Drop the summary."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Leave the lock to the first rank."""
        yield


def next_folder(name: str, parent: str | Path = "runs") -> Path:
    """Return the first of `parent`/`name`-1, -2, ... that does not exist yet.

    >>> next_folder("demo", "/nowhere").as_posix()
    '/nowhere/demo-1'
    """
    return next(path for n in itertools.count(1) if not (path := Path(parent) / f"{name}-{n}").exists())


def _columns(lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return a table of readings by column; a line of names stands before the rows that it is for."""
    rows: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    names: list[str] = []
    for line in lines:
        if "names" in line:
            names = line["names"]
            continue
        given = line["values"]
        rows.append(line)
        values.append(given if isinstance(given, dict) else dict(zip(names, given, strict=True)))
    kinds = (("step", np.int64), ("time", np.float64))
    columns: dict[str, np.ndarray] = {key: np.array([row[key] for row in rows], dtype=kind) for key, kind in kinds}
    known = dict.fromkeys(name for row in values for name in row)
    if strange := [name for name in known if not isinstance(name, str) or name in columns]:
        raise ValueError(f"{strange[0]!r} is no name of a reading")
    held = sum(map(len, values))
    if len(known) * len(rows) > max(_MOST_EMPTY * held, 1_000_000):  # a small file could else ask for any memory
        raise ValueError(f"{len(known)} names in {len(rows)} rows, but {held} values")
    columns |= {name: np.full(len(rows), np.nan) for name in known}
    for i, row in enumerate(values):
        for name, value in row.items():
            columns[name][i] = float(value)
    return columns


def _check_format(path: Path, facts: Mapping[str, Any]) -> None:
    if facts.get("format") not in _READABLE:
        raise CheckpointError(
            f"{path}: format {FORMAT} was expected, but it says format {facts.get('format')} (written by steadyrank "
            f"{facts.get('steadyrank')}, this is {version_of('steadyrank')}); use the version that wrote it, or upgrade"
        )


def _environment() -> dict[str, Any]:
    return {
        "format": FORMAT,
        **{name: version_of(name) for name in ("steadyrank", "torch", "numpy", "pyarrow")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
