"""Shards: tensors of which each rank has a part, written by all ranks at once and read back whole or in other parts.

Writing goes through torch.distributed.checkpoint in its safetensors form, one file for each rank, in which the metadata
entry DCP_SHARDING_INFO tells where in the whole tensor each part begins. Nothing is pickled to the disk.
"""

import hashlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError
from .files import writing
from .ranks import Ranks

_NAME = re.compile(r"shard-\d{5,}\.safetensors")
_INFO = "DCP_SHARDING_INFO"
"""The metadata entry that torch.distributed.checkpoint reads."""


class Rows(NamedTuple):
    """Where the rows of one table lie: in a matrix of several tables, and on this rank."""

    table: str
    start: int
    """Its first row in the whole matrix."""
    rows: int
    """Its rows."""
    first: int
    """The first one that is held here, counted in the table."""
    count: int  # type: ignore[assignment]  # no one counts equal fields
    """How many are held here, from there on; 0 for none."""


class RowShards(NamedTuple):
    """A leaf of a state: this rank's rows of a matrix, or its entries of a row-wise vector, that no rank has whole.

    >>> rows = (Rows("user", 0, 4, first=2, count=2), Rows("item", 4, 3, first=0, count=0))
    >>> RowShards(torch.zeros(2, 8), rows).tensor.shape  # the lower half of the table `user`, nothing of `item`
    torch.Size([2, 8])
    """

    tensor: Tensor
    """The rows held here, those of one table under those of the other [sum of counts, ...]."""
    rows: tuple[Rows, ...]
    """Of every table in the matrix, in order; the same tables on all ranks."""


class Part(NamedTuple):
    """This rank's part of a tensor, in the form that torch.distributed.checkpoint asks for."""

    tensor: Tensor
    shape: torch.Size
    """Of the whole."""
    first: int
    """The row of the whole with which the part begins."""

    def __create_write_items__(self, name: str, part: object) -> list[Any]:
        """Return what is to be written: nothing for no rows, which would lie within the rows of others."""
        from torch.distributed.checkpoint import metadata, planner  # heavy: only for those who have shards

        if not len(self.tensor):
            return []
        offsets = torch.Size((self.first, *[0] * (self.tensor.dim() - 1)))
        chunk = metadata.ChunkStorageMetadata(offsets=offsets, sizes=self.tensor.shape)
        facts = metadata.TensorProperties.create_from_tensor(self.tensor)
        data = planner.TensorWriteData(chunk=chunk, properties=facts, size=self.shape)
        return [planner.WriteItem(metadata.MetadataIndex(name, offsets), planner.WriteItemType.SHARD, tensor_data=data)]


class Parts:
    """The leaves of a state of which this rank has a part.

    >>> rows = (Rows("user", 0, 2, 0, 2), Rows("item", 2, 1, 0, 1))
    >>> parts = Parts({"model": {"tables": RowShards(torch.zeros(3, 8), rows), "bias": torch.zeros(1)}})
    >>> list(parts.tensors), parts.marks[0]["rows"]["shape"]
    (['model/tables#user', 'model/tables#item'], [3, 8])
    """

    def __init__(self, state: Any) -> None:
        self.tensors: dict[str, Part | Tensor] = {}
        """By the name that they have in the files: of DTensors themselves, of `RowShards` the part of each table."""
        self.marks = [
            self._keep_rows(leaf, path) if isinstance(leaf, RowShards) else self._keep_tensor(leaf, path)
            for path, leaf in _leaves(state, "")
        ]
        """What stands for each leaf in state.json, in the order of the state."""

    def _keep_rows(self, leaf: RowShards, path: str) -> dict[str, Any]:
        x, name, tables = leaf.tensor, path, [each.table for each in leaf.rows]
        held, starts = sum(each.count for each in leaf.rows), [0]
        for each in leaf.rows:
            starts.append(starts[-1] + each.rows)
        if x.dim() == 0 or len(x) != held or len({*tables}) != len(tables):
            raise CheckpointError(
                f"state/{path}: {held} rows of {len({*tables})} tables were expected, not a tensor {list(x.shape)} for "
                f"{len(tables)} tables"
            )
        if [each.start for each in leaf.rows] != starts[:-1]:
            raise CheckpointError(
                f"state/{path}: tables one under the other were expected, which begin at {starts[:-1]}; but they begin "
                f"at {[each.start for each in leaf.rows]}"
            )
        while any(f"{name}#{table}" in self.tensors for table in tables):
            name += "'"
        for each, part in zip(leaf.rows, x.split([each.count for each in leaf.rows]), strict=True):
            whole = torch.Size((each.rows, *x.shape[1:]))
            self.tensors[f"{name}#{each.table}"] = Part(part, whole, each.first)
        shape, lie = [starts[-1], *x.shape[1:]], [[each.table, each.start, each.rows] for each in leaf.rows]
        return {"rows": {"name": name, "shape": shape, "dtype": _dtype_name(x), "tables": lie}}

    def _keep_tensor(self, leaf: Tensor, path: str) -> dict[str, Any]:
        name = path
        while name in self.tensors:
            name += "'"
        self.tensors[name] = leaf
        return {"shards": {"name": name, "shape": list(leaf.shape), "dtype": _dtype_name(leaf)}}

    def check_alike(self, ranks: Ranks) -> None:
        """Compare with the other ranks: the same leaves on all, and every row on one.

        Raises:
            CheckpointError: They differ, or rows are missing or held twice.
        """
        parts = {name: part for name, part in self.tensors.items() if isinstance(part, Part)}
        held = {name: (part.first, len(part.tensor)) for name, part in parts.items()}
        found = ranks.gather_objects((self.marks, held))
        for rank, (marks, _) in enumerate(found):
            if marks != found[0][0]:
                differ = next((pair for pair in zip(found[0][0], marks, strict=False) if pair[0] != pair[1]), None)
                raise CheckpointError(
                    f"all ranks were expected to save shards of the same tensors; rank 0 has {len(found[0][0])} of "
                    f"them and rank {rank} has {len(marks)}, and they differ in {differ}"
                )
        for name, part in parts.items():
            # Rows that several ranks hold alike are written once.
            spans, end = sorted({each[name] for _, each in found if each[name][1]}), 0
            for first, count in [*spans, (part.shape[0], 0)]:
                if first != end:
                    raise CheckpointError(
                        f"state/{name}: {part.shape[0]} rows, each on one rank, were expected; but the ranks hold "
                        f"{', '.join(f'{a} to {a + n - 1}' for a, n in spans) or 'none'}"
                    )
                end += count

    def write(self, folder: Path, final: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
        """Let every rank write its parts into a file of the folder, and return the facts about all these files.

        Args:
            folder: A draft, which is there already.
            final: What it is to become, for messages.
            ranks: Who writes.

        Raises:
            CheckpointError: On all ranks, where one cannot write; its cause is the system's error.
        """
        name = f"shard-{ranks.rank + 1:05}.safetensors"

        def save() -> dict[str, dict[str, Any]]:
            with writing(final):
                _save(self.tensors, folder / name, final, ranks)
                return {name: facts_of(folder / name)} if (folder / name).exists() else {}

        files = {key: facts for each in ranks.gather_objects(ranks.together(save)) for key, facts in each.items()}
        ranks.together(lambda: _check_seen(folder, files) if ranks.is_first else None)
        return files


def _leaves(value: Any, path: str) -> Iterator[tuple[str, RowShards | Tensor]]:
    """Yield the leaves of which each rank has a part, with their paths, in the order in which a state is packed."""
    if isinstance(value, RowShards) or is_dtensor(value):
        yield path.removeprefix("/") or "value", value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from _leaves(each, f"{path}/{i}")


def is_dtensor(value: object) -> bool:
    """Say whether a value is a DTensor, without loading what makes them."""
    return isinstance(value, Tensor) and hasattr(value, "to_local")


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _save(tensors: Mapping[str, Part | Tensor], path: Path, final: Path, ranks: Ranks) -> None:
    """Write this rank's parts through torch.distributed.checkpoint; all ranks together."""
    # Heavy: only for those who have shards.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.futures import Future

    seen: set[int] = set()

    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Tensor:
            each = tensors[write_item.index.fqn]
            return dense(each.tensor if isinstance(each, Part) else each.to_local(), seen)  # type: ignore[attr-defined]

    class Writer(HuggingFaceStorageWriter):
        def write_data(self, plan: Any, planner: Any) -> Future[Any]:
            """Write straight to the disk; torch's own would first make the whole file in memory."""
            if plan.items:
                held = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
                lie = {item.index.fqn: {"saved_offsets": item.tensor_data.chunk.offsets} for item in plan.items}
                save_tensors(held, path, {_INFO: json.dumps(lie), "DCP_VERSION": "1.0", "format": "pt"})
            done: Future[Any] = Future()
            done.set_result([])
            return done

    planner = Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = Writer(str(path.parent), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant to be in one process
            group, alone = ranks.host, ranks.is_alone
            save(dict(tensors), storage_writer=writer, planner=planner, process_group=group, no_dist=alone)
    except CheckpointException as failed:
        causes = {rank: error for rank, (error, _) in failed.failures.items()}
        for cause in causes.values():
            if isinstance(cause, OSError) or not isinstance(cause, Exception):
                raise cause from None
        told = "; ".join(f"rank {rank}: {type(error).__name__}: {error}" for rank, error in causes.items())
        raise CheckpointError(f"cannot write {final}: {told}") from failed


def can_save() -> bool:
    """Say whether this version of torch saves what lies in parts on several ranks as safetensors."""
    try:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    except ImportError:
        return False
    return "save_distributed" in inspect.signature(HuggingFaceStorageWriter.__init__).parameters


def dense(value: Tensor, storages: set[int]) -> Tensor:
    """Return a tensor on the host, contiguous and with bytes of its own, as safetensors wants them.

    Args:
        value: Any strided tensor.
        storages: Where the bytes of others lie; this one's are added.
    """
    held = value.detach().cpu().contiguous()
    if held.untyped_storage().data_ptr() in storages:
        held = held.clone()
    if held.numel():
        storages.add(held.untyped_storage().data_ptr())
    return held


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; what the system refuses is an OSError."""
    try:
        save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))  # in "I/O error: ... (os error 28)"
        raise OSError(int(found[1]) if found else 5, str(error)) from error  # 5 is EIO


def facts_of(path: Path) -> dict[str, Any]:
    """Bring a file to the disk itself, and return its SHA-256 and size."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "bytes": file.seek(0, os.SEEK_END)}


def _check_seen(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a folder that is another one on another machine."""
    for name, facts in files.items():
        if not (folder / name).exists() or (folder / name).stat().st_size != facts["bytes"]:
            raise CheckpointError(
                f"{folder / name} was written by another rank, and is not seen by rank 0; put the run folder on a disk "
                "that all machines share"
            )


def is_shard(name: str) -> bool:
    """Say whether a file of a checkpoint has such a name."""
    return _NAME.fullmatch(name) is not None


class ShardFiles:
    """The shards of one checkpoint, out of which any part is read; opening reads no more than headers."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._chunks: dict[str, list[tuple[Any, list[int], list[int]]]] = {}
        for path in paths:
            file = safetensors.safe_open(path, framework="pt")
            lie = json.loads(file.metadata()[_INFO])
            for name in file.keys():  # noqa: SIM118  # it is no dict
                chunk = file, lie[name]["saved_offsets"], file.get_slice(name).get_shape()
                self._chunks.setdefault(name, []).append(chunk)

    def fill(self, out: Tensor, name: str, start: Sequence[int]) -> None:
        """Fill a tensor with the part of its shape that begins at `start` of the whole.

        Raises:
            ValueError: The files do not have all of it.
        """
        filled = 0
        for file, offset, shape in self._chunks.get(name, ()):
            end = [a + n for a, n in zip(start, out.shape, strict=True)]
            first = [max(a, b) for a, b in zip(offset, start, strict=True)]
            last = [min(a + n, b) for a, n, b in zip(offset, shape, end, strict=True)]
            if any(a >= b for a, b in zip(first, last, strict=True)):
                continue
            here = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, offset, strict=True))
            there = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, start, strict=True))
            part = file.get_slice(name)[here] if here else file.get_tensor(name)
            if part.dtype != out.dtype:
                raise ValueError(f"{name} has {part.dtype}, not {out.dtype}")
            out[there] = part
            filled += part.numel()
        if filled != out.numel():
            raise ValueError(f"{name}: {out.numel()} numbers were expected in the shards, {filled} are there")

    def whole(self, mark: Mapping[str, Any]) -> Tensor:
        """Return a tensor that was saved in parts of any form."""
        out = torch.empty(mark["shape"], dtype=_dtype_of(mark))
        self.fill(out, mark["name"], [0] * out.dim())
        return out

    def rows(self, mark: Mapping[str, Any], wanted: Mapping[str, tuple[int, int]] | None) -> Tensor:
        """Return the wanted rows (first, count) of each table, one table under the other; None for all."""
        spans = []
        for table, _, rows in mark["tables"]:
            first, count = (0, rows) if wanted is None else wanted.get(table, (0, 0))
            if min(first, count) < 0 or first + count > rows:
                raise ValueError(f"rows {first} to {first + count - 1} of table '{table}' were wanted, it has {rows}")
            spans.append((table, first, count))
        rest = mark["shape"][1:]
        out = torch.empty([sum(count for _, _, count in spans), *rest], dtype=_dtype_of(mark))
        for (table, first, count), part in zip(spans, out.split([count for _, _, count in spans]), strict=True):
            if count:
                self.fill(part, f"{mark['name']}#{table}", [first, *[0] * len(rest)])
        return out


def _dtype_of(mark: Mapping[str, Any]) -> torch.dtype:
    dtype = getattr(torch, mark["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{mark['dtype']!r} is no dtype")
    return dtype
