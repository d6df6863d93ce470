"""Checkpoints: a nested state as tensors and JSON, whole or not at all, verified when read; loading executes nothing.

step_N/manifest.json       format, version, step, whether the run was healthy, and the SHA-256 and size of the other two
step_N/state.json          the state as JSON; {"tensor": NAME} stands for a tensor (`_Packed.pack` has the other marks)
step_N/tensors.safetensors its tensors by name: model/trunk.weight, optimizers/dense/state/0/sum, ...

Any safetensors and JSON reader opens them; docs/survival.md has the layout.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import CheckpointError
from .files import read_object, replace, swap, sync, to_json, writing

FORMAT = 3
"""Version of a checkpoint's layout. 1 and 2 were a file of torch.save."""
Kind = Literal["regular", "aside"]
_MANIFEST, _STATE, _TENSORS = "manifest.json", "state.json", "tensors.safetensors"
_MARKS = frozenset({"tensor", "float", "tuple", "items", "bytes", "dtype"})


class Checkpoints:
    """The checkpoints in one folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     kept = Checkpoints(Path(folder))
    ...     path = kept.save(7, {"model": {"weight": torch.ones(2)}, "rows": 512})
    ...     kept.steps(), kept.load(7)
    ([7], {'model': {'weight': tensor([1., 1.])}, 'rows': 512})
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in rising order."""
        names = [p.parent.name for p in self.path.glob(f"step_*/{_MANIFEST}")]
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d{1,18}", name))

    def folder(self, step: int) -> Path:
        """Return where the checkpoint of that step lies."""
        return self.path / f"step_{step}"

    def save(
        self, step: int, state: Mapping[str, Any], *, kind: Kind = "regular", healthy: bool = True, day: str = ""
    ) -> Path:
        """Save a state as step_N, whole or not at all, and return its folder.

        Args:
            step: Steps done; a checkpoint of the same step is replaced.
            state: Tensors, numbers, strings, None, and dicts, lists and tuples of these.
            kind: `aside`: made because the run was interrupted or waits, and gone with the next one.
            healthy: Nothing was wrong when it was made.
            day: The day of the log that ended here, as an ISO date; "" for none.

        Raises:
            CheckpointError: `state` holds something else, or the disk is full or not writable.
        """
        final = self.folder(step)
        draft = final.with_name(f".step_{step}.tmp")
        packed = _Packed({}, set())
        plain = packed.pack(state, "")
        try:
            with writing(final):
                shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed here
                draft.mkdir(parents=True)
                files = _write(draft, plain, packed.tensors)
                facts = {"format": FORMAT, "steadyrank": version_of("steadyrank"), "step": step, "kind": kind}
                saved = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                facts |= {"healthy": healthy, "day": day, "saved": saved, "files": files}
                replace(draft / _MANIFEST, to_json({**facts, "sha256": digest_of(facts)}))
                sync(draft)
                swap(draft, final)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return final

    def manifest(self, step: int) -> dict[str, Any]:
        """Return what is written about the checkpoint of that step.

        Raises:
            CheckpointError: It is damaged, or of another format.
        """
        path = self.folder(step) / _MANIFEST
        facts = read_object(path)
        if facts.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: format {FORMAT} was expected, but it says format {facts.get('format')} (written by "
                f"steadyrank {facts.get('steadyrank')}, this is {version_of('steadyrank')}); use the version that "
                "wrote it, or train anew"
            )
        if facts.get("sha256") != digest_of(facts):
            raise CheckpointError(f"{path} is damaged: its sha256 is not that of what it says")
        return facts

    def load(self, step: int | None = None) -> dict[str, Any]:
        """Return the state saved at `step`, the newest when None, on CPU.

        Raises:
            CheckpointError: There is none, or its bytes are not those that were saved.
        """
        steps = self.steps()
        if step not in steps and (step is not None or not steps):
            raise CheckpointError(f"{self.path.parent}: no checkpoint {_name(step)} (there are: {steps})")
        folder = self.folder(steps[-1] if step is None else step)
        others = f"start from another checkpoint (there are: {steps})"
        files = self.manifest(steps[-1] if step is None else step).get("files")
        for name in (_STATE, _TENSORS):
            _verify(folder / name, files.get(name) if isinstance(files, dict) else None, others)
        try:
            tensors = load_file(folder / _TENSORS)
            state = _from_plain(read_object(folder / _STATE), tensors)
            if not isinstance(state, dict):
                raise TypeError(f"a dict was expected, not a {type(state).__name__}")
        except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {error}; {others}") from error
        return state

    def load_newest(
        self, say: Callable[[str], None], fits: Callable[[int, dict[str, Any]], bool] = lambda step, facts: True
    ) -> tuple[int, dict[str, Any]] | None:
        """Return the newest checkpoint that is whole, with its step; None when there is none.

        Args:
            say: Called with what is wrong with each newer one.
            fits: Says of a step and its manifest whether it will do.
        """
        for step in reversed(self.steps()):
            try:
                if fits(step, self.manifest(step)):
                    return step, self.load(step)
            except CheckpointError as error:
                say(str(error))
        return None

    def mend(self) -> None:
        """Tidy up after a writer that was killed: what it was about to replace is put back, what is half is deleted."""
        for path in self.path.glob(".step_*"):
            final = self.path / path.stem[1:]
            with writing(path):
                if path.suffix == ".old" and not final.exists():
                    path.rename(final)
                else:
                    shutil.rmtree(path, ignore_errors=True)

    def prune(self, keep: int, keep_days: int = 0) -> None:
        """Delete all but the newest.

        Kept are the newest `keep`, the newest healthy one, and the last one of each of the newest `keep_days` days of
        the log. One that was made aside is kept only while it is the newest of all.
        """
        facts = {step: self.facts(step) for step in self.steps()}
        regular = [step for step, of in facts.items() if of.get("kind") != "aside"]
        daily = [step for step in regular if facts[step].get("day")]
        kept = {*regular[len(regular) - keep :]} if keep else set()
        if keep or keep_days:
            kept |= {*daily[max(len(daily) - keep_days, 0) :]}
            kept |= {*[step for step in regular if facts[step].get("healthy")][-1:], *list(facts)[-1:]}
        self._delete([step for step in facts if step not in kept])

    def facts(self, step: int) -> dict[str, Any]:
        """Return the manifest; of one that cannot be read nothing is known."""
        try:
            return self.manifest(step)
        except CheckpointError:
            return {}

    def _delete(self, steps: Collection[int]) -> None:
        for step in steps:
            folder = self.folder(step)
            with writing(folder):  # first out of sight, so that half a checkpoint is never seen
                gone = folder.with_name(f".step_{step}.gone")
                shutil.rmtree(gone, ignore_errors=True)
                shutil.rmtree(folder.rename(gone))


def digest_of(facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a manifest says, but for this: of its JSON with sorted keys."""
    rest = {key: value for key, value in facts.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _write(folder: Path, plain: Any, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Write both files to the disk itself, and return the facts about them."""
    try:
        save_file(dict(tensors), folder / _TENSORS)
    except safetensors.SafetensorError as error:
        raise OSError(_errno_of(error), str(error)) from error
    replace(folder / _STATE, to_json(plain, indent=None))
    found = {}
    for name in (_STATE, _TENSORS):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[name] = {"sha256": digest, "bytes": file.seek(0, os.SEEK_END)}
    return found


def _errno_of(error: Exception) -> int:
    """Return the system's number from a message such as "I/O error: ... (os error 28)"."""
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else 5  # EIO


def _verify(path: Path, facts: Any, others: str) -> None:
    expected = facts if isinstance(facts, dict) else {}
    try:
        size = path.stat().st_size
        if not path.is_file() or size != expected.get("bytes"):  # from a pipe one would read for ever
            raise CheckpointError(
                f"{path} is damaged: {expected.get('bytes')} bytes were saved, it has {size}; {others}"
            )
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; {others}") from error
    if found != expected.get("sha256"):
        raise CheckpointError(
            f"{path} is damaged: sha256 {expected.get('sha256')} was saved, but the file has {found}; {others}"
        )


class _Packed(NamedTuple):
    """The tensors of a state, taken out of it."""

    tensors: dict[str, Tensor]
    storages: set[int]
    """Where their bytes lie: no two may share them."""

    def pack(self, value: Any, path: str) -> Any:
        """Return what JSON can hold; tensors are kept under their path.

        Marks: {"tensor": name}, {"float": "nan"}, {"tuple": [...]}, {"items": [[key, value], ...]} for a dict with keys
        that are no strings or that looks like a mark, {"bytes": hex}, {"dtype": "float32"}.
        """
        if isinstance(value, Tensor):
            return {"tensor": self.keep(value, path)}
        if value is None or type(value) in (str, int, bool):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if type(value) in (list, tuple, torch.Size):
            found = [self.pack(each, f"{path}/{i}") for i, each in enumerate(value)]
            return found if type(value) is list else {"tuple": found}
        if isinstance(value, dict):
            if all(type(key) is str for key in value) and not (len(value) == 1 and _MARKS & value.keys()):
                return {key: self.pack(each, f"{path}/{key}") for key, each in value.items()}
            return {"items": [[self.pack(k, path), self.pack(v, f"{path}/{k}")] for k, v in value.items()]}
        if type(value) is bytes:
            return {"bytes": value.hex()}
        if type(value) is torch.dtype:
            return {"dtype": str(value).removeprefix("torch.")}
        raise CheckpointError(
            f"state{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold; "
            "turn it into tensors, numbers, strings, None, or dicts, lists and tuples of these"
        )

    def keep(self, value: Tensor, path: str) -> str:
        """Put a tensor with the others, and return its name."""
        if value.layout != torch.strided:
            raise CheckpointError(f"state{path} is a tensor of layout {value.layout}; save its parts, each a dense one")
        name = path.removeprefix("/") or "value"
        while name in self.tensors:
            name += "'"
        held = value.detach().cpu().contiguous()
        if held.untyped_storage().data_ptr() in self.storages:
            held = held.clone()
        if held.numel():
            self.storages.add(held.untyped_storage().data_ptr())
        self.tensors[name] = held
        return name


def _from_plain(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the state that `_Packed.pack` was given."""
    if isinstance(value, list):
        return [_from_plain(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    mark = next(iter(value)) if len(value) == 1 else ""
    if mark not in _MARKS:
        return {key: _from_plain(each, tensors) for key, each in value.items()}
    held = value[mark]
    if mark == "tensor":
        return tensors[held]
    if mark == "float":
        return float(held)
    if mark == "tuple":
        return tuple(_from_plain(each, tensors) for each in held)
    if mark == "items":
        return {_from_plain(key, tensors): _from_plain(each, tensors) for key, each in held}
    if mark == "bytes":
        return bytes.fromhex(held)
    dtype = getattr(torch, held)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{held!r} is no dtype")
    return dtype


def _name(step: int | None) -> str:
    return "" if step is None else str(step)


def version_of(package: str) -> str:
    """Return the version of an installed package, from its metadata: importing pyarrow only to ask takes a while."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
