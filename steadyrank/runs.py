"""The run folder: configuration, readings, events, summary and checkpoints of one run, written and read here alone.

config.toml         the resolved configuration
environment.json    format, versions, machine, start
readings/T.jsonl    one line for each row of table T, append-only
events.jsonl        what the guard and the recovery did, and why
summary.json        how it ended
checkpoints/step_N/ state.pt and manifest.json
report.html, tensorboard/
"""

import errno
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from .errors import CheckpointError, ConfigError, SteadyRankError

FORMAT = 1
"""Version of the folder's layout; a reader refuses any other."""
_ENVIRONMENT = "environment.json"
_CONFIG = "config.toml"
_EVENTS = "events.jsonl"
_SUMMARY = "summary.json"
_READINGS = "readings"
_CHECKPOINTS = "checkpoints"
_MANIFEST = "manifest.json"
_TENSORBOARD = "tensorboard"
_REPORT = "report.html"
# The environment comes last: a folder stays a run folder, which overwrite may delete, until all else is gone.
_OWN = (_CONFIG, _READINGS, _EVENTS, _SUMMARY, _CHECKPOINTS, _REPORT, _TENSORBOARD, _ENVIRONMENT)

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# Words, never numbers, under these keys: a run that is called "nan" keeps its name.
_WORDS = frozenset({"name", "status", "message", "kind", "feature"})
# Half a surrogate, as in a file name that is no UTF-8, becomes an escape that JSON reads back.
_ODD = "backslashreplace"
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
        with _writing(run.path, ConfigError, "choose another --out"):
            if run.path.is_dir() and any(run.path.iterdir()):
                run._clear(overwrite)
            new = next((p for p in (*reversed(run.path.parents), run.path) if not p.exists()), None)
            try:
                (run.path / _READINGS).mkdir(parents=True)
                (run.path / _CHECKPOINTS).mkdir()
                _replace(run.path / _ENVIRONMENT, _json(_environment()))
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
        return _read_object(path)

    def write_config(self, toml_text: str) -> None:
        """Write config.toml."""
        with _writing(self.path / _CONFIG):
            _replace(self.path / _CONFIG, toml_text)

    def config_text(self) -> str:
        """Return config.toml as it stands."""
        return _read_text(self.path / _CONFIG)

    def append(self, table: str, step: int, values: Mapping[str, float | int]) -> None:
        """Add a row of readings by name (`area/name`), NaN and infinite ones too, to a table; `flush` writes it."""
        if clash := {"step", "time"} & values.keys():
            raise ValueError(f"readings may not be called {sorted(clash)}: the row has these columns already")
        row = {"step": int(step), "time": time.time(), "values": {k: float(v) for k, v in values.items()}}
        self._buffers.setdefault(table, []).append(_json(row, indent=None))

    def flush(self) -> None:
        """Write the buffered rows, each table in one write, and hand them to the operating system."""
        for table, lines in self._buffers.items():
            if lines:
                _append_lines(self._table(table), lines)
                lines.clear()

    close = flush

    def readings(self, table: str) -> dict[str, Shaped[np.ndarray, " rows"]]:
        """Return a table's columns: "step" (int64), "time" (when written, seconds since 1970) and each name.

        NaN stands where a row lacks a name. A table that was never written has no rows; a torn last line is left out.
        """
        self.flush()
        rows = _read_lines(self._table(table))
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
            kept = [_json(row, indent=None) + "\n" for row in _read_lines(path) if row["step"] <= step]
            with _writing(path):
                _replace(path, "".join(kept))

    def event(self, step: int, kind: str, message: str, **detail: Any) -> None:
        """Record at once what happened at `step`: its kind (one word), a sentence, and details by name."""
        row = {**detail, "step": int(step), "time": time.time(), "kind": kind, "message": message}
        _append_lines(self.path / _EVENTS, [_json(row, indent=None)])

    def events(self) -> list[dict[str, Any]]:
        """Return the events, first to last: step, time, kind, message and details (those not finite as words)."""
        return _read_lines(self.path / _EVENTS)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json: how the run ended."""
        with _writing(self.path / _SUMMARY):
            _replace(self.path / _SUMMARY, _json(dict(summary)))

    def summary(self) -> dict[str, Any] | None:
        """Return the summary, or None while the run goes on or when it was killed."""
        path = self.path / _SUMMARY
        return _decode(_read_object(path)) if path.exists() else None

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
            with _writing(final):
                shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed here
                draft.mkdir(parents=True)
                _save_state(draft, step, state)
                _swap(draft, final)
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
        manifest, path = _read_object(folder / _MANIFEST), folder / "state.pt"
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
            with _writing(folder):  # first out of sight, so that half a checkpoint is never seen
                shutil.rmtree(folder.rename(folder.with_name(f".step_{step}.old")))

    def tensorboard_path(self) -> Path:
        """Return where TensorBoard event files belong."""
        return self.path / _TENSORBOARD

    def report_path(self) -> Path:
        """Return where the report belongs."""
        return self.path / _REPORT

    def write_report(self, page: str) -> Path:
        """Write report.html and return its path."""
        with _writing(self.report_path()):
            _replace(self.report_path(), page)
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


@contextmanager
def _writing(
    path: Path, error: type[SteadyRankError] = CheckpointError, advice: str = "check space and permissions"
) -> Iterator[None]:
    """Turn the operating system's refusals into ours."""
    try:
        yield
    except OSError as refusal:
        where = f" ({refusal.filename})" if refusal.filename not in (None, str(path), path) else ""
        raise error(f"cannot write {path}: {refusal.strerror or refusal}{where}; {advice}") from refusal


def _save_state(folder: Path, step: int, state: dict[str, Any]) -> None:
    with (folder / "state.pt").open("w+b") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.seek(0, os.SEEK_END)
    facts = {"format": FORMAT, "steadyrank": _version("steadyrank"), "step": step, "sha256": digest, "bytes": size}
    _replace(folder / _MANIFEST, _json(facts))
    _sync(folder)


def _check_format(path: Path, facts: Mapping[str, Any]) -> None:
    if facts.get("format") != FORMAT:
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


def _append_lines(path: Path, lines: list[str]) -> None:
    """Append whole lines in one write; where that fails, the file is as long as before."""
    data = "".join(line + "\n" for line in lines).encode(errors=_ODD)
    with _writing(path), path.open("a+b", buffering=0) as file:
        size = _whole_lines(path)
        file.truncate(size)  # a line that a crash tore would spoil the next one
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def _whole_lines(path: Path) -> int:
    """Return the length of the file in bytes up to its last line break."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(end - 65536, 0)
            file.seek(start)
            if (found := file.read(end - start).rfind(b"\n")) >= 0:
                return start + found + 1
            end = start
    return 0


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, none when it is absent; a torn last line is left out."""
    if not path.exists():
        return []
    # Only "\n" ends a row: str.splitlines would also break at U+2028, which a task's name may hold.
    lines = _read_text(path, errors="replace").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise CheckpointError(
                f"{path}, line {number}: a JSON object was expected ({error}); delete that line to read the rest"
            ) from error
    return rows


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: JSON was expected ({error}); the file is damaged") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, not a {type(found).__name__}; the file is damaged")
    return found


def _read_text(path: Path, errors: str = "strict") -> str:
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; check the path and its permissions") from error


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with draft.open("w", encoding="utf-8", errors=_ODD, newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _swap(draft: Path, final: Path) -> None:
    """Rename a folder, in the place of an older one if there is one."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    try:
        draft.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make a rename in the folder survive a power cut, where the system can do that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _json(value: Any, indent: int | None = 2) -> str:
    return json.dumps(_encode(value), indent=indent, allow_nan=False, ensure_ascii=False, default=str)


def _encode(value: Any) -> Any:
    """Return what JSON can hold: non-finite numbers as words, numpy's and torch's scalars as Python's."""
    if isinstance(value, Mapping):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return _encode(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _decode(value: Any) -> Any:
    """Turn the words that stand for non-finite numbers back into them."""
    if isinstance(value, dict):
        return {k: v if k in _WORDS and isinstance(v, str) else _decode(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_decode(v) for v in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


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
