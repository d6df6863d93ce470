"""Checkpoints: a nested state as tensors and JSON, whole or not at all, verified when read; loading executes nothing.

step_N/manifest.json           format, version, step, whether the run was healthy, SHA-256 and size of the others
step_N/state.json              the state as JSON; {"tensor": NAME} stands for a tensor (`_Packer.pack` has all marks)
step_N/tensors.safetensors     its tensors by name: model/trunk.weight, optimizers/dense/state/0/sum, ...
step_N/shard-00001.safetensors of what lies in parts on several ranks those of the first one; and so on (shards.py)

Any safetensors and JSON reader opens them; docs/survival.md has the layout.
"""

import hashlib
import importlib.metadata
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from .errors import CheckpointError
from .files import read_object, replace, swap, sync, to_json, writing
from .ranks import ALONE, Ranks
from .shards import Parts, ShardFiles, dense, facts_of, is_dtensor, is_shard, save_tensors
from .shards import Rows as Rows
from .shards import RowShards as RowShards

FORMAT = 4
"""Version of a checkpoint's layout. 1 and 2 were a file of torch.save; 3 has no shards, as those without still say."""
_WITHOUT_SHARDS = 3
Kind = Literal["regular", "aside"]
_MANIFEST, _STATE, _TENSORS = "manifest.json", "state.json", "tensors.safetensors"
_MARKS = frozenset({"tensor", "float", "tuple", "items", "bytes", "dtype"})
_SHARD_MARKS = _MARKS | {"rows", "shards"}


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
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        kind: Kind = "regular",
        healthy: bool = True,
        day: str = "",
        ranks: Ranks = ALONE,
    ) -> Path:
        """Save a state as step_N, whole or not at all, and return its folder. All ranks call it together.

        Args:
            step: Steps done; a checkpoint of the same step is replaced.
            state: Tensors, numbers, strings, None, and dicts, lists and tuples of these: the first rank's are saved.
                And `RowShards` and DTensors, of which each rank saves its part: the same ones in the same order on all.
            kind: `aside`: made because the run was interrupted or waits, and gone with the next one.
            healthy: Nothing was wrong when it was made.
            day: The day of the log that ended here, as an ISO date; "" for none.
            ranks: Who saves it.

        Raises:
            CheckpointError: `state` holds something else, or the disk is full or not writable; on all ranks.
        """
        final = self.folder(step)
        draft = final.with_name(f".step_{step}.tmp")
        facts = {"step": step, "kind": kind, "healthy": healthy, "day": day}
        parts = ranks.together(lambda: Parts(state))
        parts.check_alike(ranks)

        def begin() -> _Packed | None:
            packed = _pack(state, parts.marks) if ranks.is_first else None
            if packed:
                with writing(final):
                    shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed here
                    draft.mkdir(parents=True)
            return packed

        try:
            packed = ranks.together(begin)
            shards = parts.write(draft, final, ranks) if parts.marks else None
            ranks.together(lambda: _finish(draft, final, packed, shards, facts) if packed else None)
        except CheckpointError:  # on all ranks, which leave when nothing is left of it
            ranks.on_first(lambda: shutil.rmtree(draft, ignore_errors=True))
            raise
        except BaseException:  # whatever ends this process does not wait for the others
            if ranks.is_first:
                shutil.rmtree(draft, ignore_errors=True)
            raise
        return final

    def manifest(self, step: int) -> dict[str, Any]:
        """Return what is written about the checkpoint of that step.

        Raises:
            CheckpointError: It is damaged, or of another format.
        """
        path = self.folder(step) / _MANIFEST
        facts = read_object(path)
        if facts.get("format") not in (_WITHOUT_SHARDS, FORMAT):
            raise CheckpointError(
                f"{path}: format {FORMAT} was expected, but it says format {facts.get('format')} (written by "
                f"steadyrank {facts.get('steadyrank')}, this is {version_of('steadyrank')}); use the version that "
                "wrote it, or train anew"
            )
        if facts.get("sha256") != digest_of(facts):
            raise CheckpointError(f"{path} is damaged: its sha256 is not that of what it says")
        return facts

    def load(
        self,
        step: int | None = None,
        *,
        rows: Mapping[str, tuple[int, int]] | None = None,
        ranks: Ranks = ALONE,
    ) -> dict[str, Any]:
        """Return the state saved at `step`, the newest when None, on CPU.

        Args:
            step: Steps done.
            rows: By table the first of its rows that is wanted here, and how many are: `RowShards` come back as a
                tensor of these, the tables in their order; of a table without an entry none. None for all rows.
                Whatever else was saved comes back whole.
            ranks: Who loads it, together, each its own rows: so every file of shards is verified by one of them.

        Raises:
            CheckpointError: There is none, or its bytes are not those that were saved; on all ranks.
        """
        steps = ranks.broadcast(self.steps())
        if step not in steps and (step is not None or not steps):
            raise CheckpointError(f"{self.path.parent}: no checkpoint {_name(step)} (there are: {steps})")
        found, others = steps[-1] if step is None else step, f"start from another checkpoint (there are: {steps})"
        shards = ranks.together(lambda: self._verify(found, others, ranks))
        return ranks.together(lambda: self._read(self.folder(found), shards, rows, others))

    def _verify(self, step: int, others: str, ranks: Ranks) -> list[str] | None:
        """Verify the files of a checkpoint, of the shards this rank's share, and return the names of those, if any."""
        facts, folder = self.manifest(step), self.folder(step)
        files = facts["files"] if isinstance(facts.get("files"), dict) else {}
        shards = sorted(files.keys() - {_STATE, _TENSORS})
        for name in shards:
            if not is_shard(name):
                raise CheckpointError(
                    f"{folder / _MANIFEST} names {name!r}, which is no file of a checkpoint; {others}"
                )
        for name in (_STATE, _TENSORS, *shards[ranks.rank :: ranks.size]):
            _verify(folder / name, files.get(name), others)
        return shards if facts["format"] == FORMAT else None

    def _read(
        self, folder: Path, shards: list[str] | None, rows: Mapping[str, tuple[int, int]] | None, others: str
    ) -> dict[str, Any]:
        try:
            files = None if shards is None else ShardFiles([folder / name for name in shards])
            state = _Unpacked(load_file(folder / _TENSORS), files, rows).unpack(read_object(folder / _STATE))
            if not isinstance(state, dict):
                raise TypeError(f"a dict was expected, not a {type(state).__name__}")
        except (safetensors.SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError,
                OverflowError) as error:  # fmt: skip
            raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {error}; {others}") from error
        return state

    def load_newest(
        self,
        say: Callable[[str], None],
        fits: Callable[[int, dict[str, Any]], bool] = lambda step, facts: True,
        *,
        rows: Mapping[str, tuple[int, int]] | None = None,
        ranks: Ranks = ALONE,
    ) -> tuple[int, dict[str, Any]] | None:
        """Return the newest checkpoint that is whole, with its step, the same on all ranks; None when there is none.

        Args:
            say: Called with what is wrong with each newer one, on all ranks.
            fits: Says of a step and its manifest whether it will do; the first rank asks.
            rows: As for `load`.
            ranks: As for `load`.
        """
        for step in reversed(ranks.broadcast(self.steps())):
            try:
                if self._will_do(step, fits, ranks):
                    return step, self.load(step, rows=rows, ranks=ranks)
            except CheckpointError as error:
                say(str(error))
        return None

    def _will_do(self, step: int, fits: Callable[[int, dict[str, Any]], bool], ranks: Ranks) -> bool:
        return ranks.on_first(lambda: fits(step, self.manifest(step)))

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
    """A state as JSON can hold it, and the tensors taken out of it."""

    plain: Any
    tensors: dict[str, Tensor]


def _pack(state: Mapping[str, Any], shards: list[dict[str, Any]]) -> _Packed:
    packer = _Packer({}, set(), iter(shards), _SHARD_MARKS if shards else _MARKS)
    return _Packed(packer.pack(state, ""), packer.tensors)


def _finish(
    draft: Path,
    final: Path,
    packed: _Packed,
    shards: Mapping[str, dict[str, Any]] | None,
    facts: Mapping[str, Any],
) -> None:
    """Write what one rank writes for all, and put the draft in its place."""
    with writing(final):
        save_tensors(packed.tensors, draft / _TENSORS)
        replace(draft / _STATE, to_json(packed.plain, indent=None))
        files = {name: facts_of(draft / name) for name in (_STATE, _TENSORS)} | dict(shards or {})
        version = {"format": _WITHOUT_SHARDS if shards is None else FORMAT, "steadyrank": version_of("steadyrank")}
        saved = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        facts = {**version, **facts, "saved": saved, "files": files}
        replace(draft / _MANIFEST, to_json({**facts, "sha256": digest_of(facts)}))
        sync(draft)
        swap(draft, final)


class _Packer(NamedTuple):
    """Takes the tensors out of a state."""

    tensors: dict[str, Tensor]
    storages: set[int]
    """Where their bytes lie: no two may share them."""
    shards: Iterator[dict[str, Any]]
    """The marks of the leaves that lie in parts on several ranks, in their order."""
    marks: frozenset[str]

    def pack(self, value: Any, path: str) -> Any:
        """Return what JSON can hold; tensors are kept under their path.

        Marks: {"tensor": name}, {"float": "nan"}, {"tuple": [...]}, {"items": [[key, value], ...]} for a dict with keys
        that are no strings or that looks like a mark, {"bytes": hex}, {"dtype": "float32"}. With shards among them also
        {"rows": {name, shape, dtype, tables: [[table, first row, rows], ...]}} for `RowShards`, each table of which is
        kept as name#table, and {"shards": {name, shape, dtype}} for a DTensor.
        """
        if isinstance(value, RowShards) or is_dtensor(value):
            return next(self.shards)
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
            if all(type(key) is str for key in value) and not (len(value) == 1 and self.marks & value.keys()):
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
        self.tensors[name] = dense(value, self.storages)
        return name


class _Unpacked(NamedTuple):
    """What a packed state is put together from."""

    tensors: Mapping[str, Tensor]
    shards: ShardFiles | None
    """None where there are none: then their marks are none either."""
    rows: Mapping[str, tuple[int, int]] | None

    def unpack(self, value: Any) -> Any:
        """Return the state that `_Packer.pack` was given."""
        if isinstance(value, list):
            return [self.unpack(each) for each in value]
        if not isinstance(value, dict):
            return value
        mark = next(iter(value)) if len(value) == 1 else ""
        if self.shards is not None and mark == "rows":
            return self.shards.rows(value[mark], self.rows)
        if self.shards is not None and mark == "shards":
            return self.shards.whole(value[mark])
        if mark not in _MARKS:
            return {key: self.unpack(each) for key, each in value.items()}
        held = value[mark]
        if mark == "tensor":
            return self.tensors[held]
        if mark == "float":
            return float(held)
        if mark == "tuple":
            return tuple(self.unpack(each) for each in held)
        if mark == "items":
            return {self.unpack(key): self.unpack(each) for key, each in held}
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
