"""The run folder: configuration, readings, events, summary and checkpoints of one run, written and read here alone.

config.toml         the resolved configuration
environment.json    format, versions, machine, start
readings/T.jsonl    one line for each row of table T, append-only, after a line with the names of its values
events.jsonl        what the guard and the recovery did, and why
summary.json        how it ended
checkpoints/step_N/ state.pt and manifest.json
causes/step_N.json  what stood behind a warning or verdict at that step
report.html, tensorboard/
"""

import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import pickle
import platform
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from .errors import CheckpointError, ConfigError
from .files import append_lines, decode, read_lines, read_object, read_text, replace, swap, sync, to_json, writing

FORMAT = 2
"""Version of the folder's layout. 1 spelt the names out in each row of readings and is still read."""
_READABLE = (1, FORMAT)
_ENVIRONMENT = "environment.json"
_CONFIG = "config.toml"
_EVENTS = "events.jsonl"
_SUMMARY = "summary.json"
_READINGS = "readings"
_CHECKPOINTS = "checkpoints"
_CAUSES = "causes"
_MANIFEST = "manifest.json"
_TENSORBOARD = "tensorboard"
_REPORT = "report.html"
# The environment comes last: a folder stays a run folder, which overwrite may delete, until all else is gone.
_OWN = (_CONFIG, _READINGS, _EVENTS, _SUMMARY, _CHECKPOINTS, _CAUSES, _REPORT, _TENSORBOARD, _ENVIRONMENT)

_PLAIN = (str, bytes, int, float, bool, type(None), torch.dtype, torch.device, torch.Size)


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
            if run.path.is_dir() and any(run.path.iterdir()):
                run._clear(overwrite)
            new = next((p for p in (*reversed(run.path.parents), run.path) if not p.exists()), None)
            try:
                (run.path / _READINGS).mkdir(parents=True)
                (run.path / _CHECKPOINTS).mkdir()
                replace(run.path / _ENVIRONMENT, to_json(_environment()))
            except OSError:
                for path in [new] if new else [run.path / _READINGS, run.path / _CHECKPOINTS]:
                    shutil.rmtree(path, ignore_errors=True)
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
        """Write the buffered rows, each table in one write, and hand them to the operating system."""
        for table, lines in self._buffers.items():
            if lines:
                append_lines(self._table(table), lines)
                lines.clear()

    close = flush

    def readings(self, table: str) -> dict[str, Shaped[np.ndarray, " rows"]]:
        """Return a table's columns: "step" (int64), "time" (when written, seconds since 1970) and each name.

        NaN stands where a row lacks a name. A table that was never written has no rows; a torn last line is left out.
        """
        self.flush()
        rows = _read_rows(self._table(table))
        kinds = (("step", np.int64), ("time", np.float64))
        columns: dict[str, np.ndarray] = {key: np.array([row[key] for row in rows], dtype=kind) for key, kind in kinds}
        for i, row in enumerate(rows):
            for name, value in row["values"].items():
                if name not in columns:
                    columns[name] = np.full(len(rows), np.nan)
                columns[name][i] = float(value)
        return columns

    def truncate_readings(self, step: int) -> None:
        """Drop the rows after `step` from every table, as a run does that resumes there. Events stay."""
        self.flush()
        for path in sorted((self.path / _READINGS).glob("*.jsonl")):
            kept = [to_json(row, indent=None) + "\n" for row in read_lines(path) if row.get("step", 0) <= step]
            with writing(path):
                replace(path, "".join(kept))

    def event(self, step: int, kind: str, message: str, **detail: Any) -> None:
        """Record at once what happened at `step`: its kind (one word), a sentence, and details by name."""
        row = {**detail, "step": int(step), "time": time.time(), "kind": kind, "message": message}
        append_lines(self.path / _EVENTS, [to_json(row, indent=None)])

    def events(self) -> list[dict[str, Any]]:
        """Return the events, first to last: step, time, kind, message and details (those not finite as words)."""
        return read_lines(self.path / _EVENTS)

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
        return sorted(found, key=lambda cause: int(cause["step"]))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json: how the run ended."""
        with writing(self.path / _SUMMARY):
            replace(self.path / _SUMMARY, to_json(dict(summary)))

    def summary(self) -> dict[str, Any] | None:
        """Return the summary, or None while the run goes on or when it was killed."""
        path = self.path / _SUMMARY
        return decode(read_object(path)) if path.exists() else None

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> Path:
        """Save all that a resume needs as checkpoints/step_N, whole or not at all, and return that folder.

        Args:
            step: Steps done; a checkpoint of the same step is replaced.
            state: Tensors, numbers, strings, None, and dicts, lists and tuples of these, so that loading runs no code.

        Raises:
            CheckpointError: `state` holds something else, or the disk is full or not writable.
        """
        _check_plain(state, "state")
        final = self._checkpoint(step)
        draft = final.with_name(f".step_{step}.tmp")
        try:
            with writing(final):
                shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed here
                draft.mkdir(parents=True)
                _save_state(draft, step, state)
                swap(draft, final)
        except RuntimeError as error:  # torch's own writer, when the disk is full
            raise CheckpointError(f"cannot write {final}: {error}; check space and permissions") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return final

    def load_checkpoint(self, step: int | None = None) -> dict[str, Any]:
        """Return the state saved at `step`, the newest when None, on CPU.

        Raises:
            CheckpointError: There is none, its bytes are not those that were saved, or it holds more than plain data.
        """
        steps = self.checkpoints()
        if step not in steps and (step is not None or not steps):
            raise CheckpointError(f"{self.path}: no checkpoint {'' if step is None else step} (there are: {steps})")
        folder = self._checkpoint(steps[-1] if step is None else step)
        manifest, path = read_object(folder / _MANIFEST), folder / "state.pt"
        _check_format(folder / _MANIFEST, manifest)
        others = f"start from another checkpoint (there are: {steps})"
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != manifest.get("sha256"):
                raise CheckpointError(
                    f"{path} is damaged: sha256 {manifest.get('sha256')} was saved, but the file has {found}; {others}"
                )
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path} holds more than plain data and was not loaded: {error}; {others}") from error
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; {others}") from error
        return state

    def checkpoints(self) -> list[int]:
        """Return the steps that have a checkpoint, in rising order."""
        names = [p.parent.name for p in (self.path / _CHECKPOINTS).glob(f"step_*/{_MANIFEST}")]
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d+", name))

    def prune_checkpoints(self, keep: int) -> None:
        """Delete all checkpoints but the newest `keep` (0 or more)."""
        steps = self.checkpoints()
        for step in steps[: max(len(steps) - keep, 0)]:
            folder = self._checkpoint(step)
            with writing(folder):  # first out of sight, so that half a checkpoint is never seen
                shutil.rmtree(folder.rename(folder.with_name(f".step_{step}.old")))

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

    def _table(self, table: str) -> Path:
        return self.path / _READINGS / f"{table}.jsonl"

    def _checkpoint(self, step: int) -> Path:
        return self.path / _CHECKPOINTS / f"step_{step}"

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
        for path in (self.path / name for name in _OWN):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def next_folder(name: str, parent: str | Path = "runs") -> Path:
    """Return the first of `parent`/`name`-1, -2, ... that does not exist yet.

    >>> next_folder("demo", "/nowhere").as_posix()
    '/nowhere/demo-1'
    """
    return next(path for n in itertools.count(1) if not (path := Path(parent) / f"{name}-{n}").exists())


def _save_state(folder: Path, step: int, state: dict[str, Any]) -> None:
    with (folder / "state.pt").open("w+b") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.seek(0, os.SEEK_END)
    facts = {"format": FORMAT, "steadyrank": _version("steadyrank"), "step": step, "sha256": digest, "bytes": size}
    replace(folder / _MANIFEST, to_json(facts))
    sync(folder)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table of readings, each with its values by name."""
    rows, names = [], []
    for row in read_lines(path):
        if "names" in row:
            names = row["names"]
        else:
            values = row["values"]
            rows.append(row if isinstance(values, dict) else {**row, "values": dict(zip(names, values, strict=True))})
    return rows


def _check_format(path: Path, facts: Mapping[str, Any]) -> None:
    if facts.get("format") not in _READABLE:
        raise CheckpointError(
            f"{path}: format {FORMAT} was expected, but it says format {facts.get('format')} (written by steadyrank "
            f"{facts.get('steadyrank')}, this is {_version('steadyrank')}); use the version that wrote it, or upgrade"
        )


def _check_plain(value: Any, where: str) -> None:
    """Refuse on saving what `torch.load(weights_only=True)` would refuse when it is too late."""
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return
    if type(value) in (dict, OrderedDict):
        for key, entry in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(entry, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, entry in enumerate(value):
            _check_plain(entry, f"{where}[{i}]")
    else:
        raise CheckpointError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold; "
            "turn it into tensors, numbers, strings, None, or dicts, lists and tuples of these"
        )


def _environment() -> dict[str, Any]:
    return {
        "format": FORMAT,
        **{name: _version(name) for name in ("steadyrank", "torch", "numpy", "pyarrow")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(package: str) -> str:
    # Read from the metadata, since importing pyarrow only to ask takes a while.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
