"""What test_sharded_checkpoints.py runs in two processes: python -m tests.checkpoint_processes RANK SIZE PORT FOLDER.

They save one state together, then try to save others, and each writes what it saw as JSON.
"""

import errno
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from steadyrank.checkpoints import Checkpoints, Rows, RowShards
from steadyrank.errors import CheckpointError
from steadyrank.ranks import Ranks

from .test_runs import files, small_disk

FULL = errno.EFBIG
"""What `small_disk` makes of a full one."""
TABLES = (("user", 0, 7), ("item", 7, 5), ("tiny", 12, 1), ("none", 13, 0), ("page", 13, 4))
"""Table, its first row in the matrix, its rows."""
HELD: tuple[dict[str, tuple[int, int]], ...] = (
    {"user": (0, 7), "item": (0, 2), "tiny": (0, 0), "none": (0, 0), "page": (0, 4)},
    {"user": (0, 0), "item": (2, 3), "tiny": (0, 1), "none": (0, 0), "page": (0, 0)},
)
"""By rank and table the first row held, and how many: whole tables, uneven blocks of rows, and nothing."""


def whole() -> dict[str, torch.Tensor]:
    """Return what no rank has whole."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(17, 3, generator=draw)
    return {
        "weight": matrix,
        "moment": matrix.to(torch.bfloat16) * 2,
        "sum": torch.arange(17, dtype=torch.float64) + 0.5,
        "cube": torch.arange(17 * 4).reshape(17, 2, 2),
        "seen": torch.arange(17) % 3 == 0,
        "dense": torch.randn(5, 4, generator=draw),
        "columns": torch.randn(3, 5, generator=draw).to(torch.bfloat16),
        "row": torch.randn(1, 2, generator=draw),
        "scalar": torch.tensor(3.5),
        "copied": torch.arange(4),
    }


def rows_of(matrix: torch.Tensor, held: dict[str, tuple[int, int]]) -> torch.Tensor:
    """Return the rows of a matrix that are held."""
    parts = [matrix[start + held[table][0] :][: held[table][1]] for table, start, _ in TABLES if table in held]
    return torch.cat(parts)


def plain() -> dict[str, Any]:
    """Return what every rank has alike, some of which looks like what stands for a shard."""
    looks = {"rows": {"name": "x", "shape": [1], "dtype": "float32", "tables": []}}
    return {"w": torch.ones(2, 2), "again": [torch.arange(3)], "looks": looks, "too": {"shards": 3}, "step": (7, None)}


def state_of(rank: int, mesh: Any) -> dict[str, Any]:
    """Return a rank's part of the state."""
    here = tuple(Rows(table, start, n, *HELD[rank][table]) for table, start, n in TABLES)
    rows = ("weight", "moment", "sum", "cube", "seen")
    tensors = whole()
    tables: dict[str, Any] = {name: RowShards(rows_of(tensors[name], HELD[rank]), here) for name in rows}
    tables["again"] = tables["weight"]  # the same memory twice
    tables["turned"] = RowShards(rows_of(tensors["weight"].T.contiguous().T, HELD[rank]), here)
    placed = {"dense": Shard(0), "columns": Shard(1), "row": Shard(0), "scalar": Replicate(), "copied": Replicate()}
    dense = {name: distribute_tensor(tensors[name], mesh, [place]) for name, place in placed.items()}
    rest = plain() if rank == 0 else dict.fromkeys(plain(), object())
    return {**rest, "tables": tables, "optimizer": [{"state": dense}, (tables["sum"],)]}


def refused(save: Any) -> list[Any]:
    """Return the message and the errno of the error that saving raises."""
    try:
        save()
    except CheckpointError as error:
        return [str(error), getattr(error.__cause__, "errno", None)]
    return []


def fails(kept: Checkpoints, ranks: Ranks, mesh: Any) -> dict[str, Any]:
    """Try what cannot be saved."""
    rank, found = ranks.rank, {}
    before = files(kept.path)
    big = torch.zeros(10_000)
    rows = (Rows("big", 0, 20_000, 10_000 * rank, 10_000),)
    for where in (0, 1):
        with small_disk(20_000 if rank == where else 10**9):
            found[f"full_{where}"] = refused(lambda: kept.save(1, {"big": RowShards(big, rows)}, ranks=ranks))
    with small_disk(20_000 if rank == 0 else 10**9):
        small = RowShards(torch.zeros(2), (Rows("small", 0, 4, 2 * rank, 2),))
        found["full_plain"] = refused(lambda: kept.save(1, {"small": small, "plain": big}, ranks=ranks))

    def attempt(name: str, state: Any) -> None:
        found[name] = refused(lambda: kept.save(2, state, ranks=ranks))

    attempt("odd", {"a": RowShards(torch.zeros(2), (Rows("a", 0, 4, 2 * rank, 2),)), "b": {1} if rank == 0 else None})
    attempt("shape", {"a": RowShards(torch.zeros(2 + rank), (Rows("a", 0, 4, 2 * rank, 2),))})
    attempt("start", {"a": RowShards(torch.zeros(2), (Rows("a", 1, 4, 2 * rank, 2),))})
    attempt("missing", {"a": RowShards(torch.zeros(1), (Rows("a", 0, 4, 2 * rank, 1),))})
    attempt("twice", {"a": RowShards(torch.zeros(2), (Rows("a", 0, 3, rank, 2),))})
    attempt("differ", {"a": RowShards(torch.zeros(2, 1 + rank), (Rows("a", 0, 4, 2 * rank, 2),))})
    attempt("fewer", {"a": RowShards(torch.zeros(4), (Rows("a", 0, 4, 0, 4),))} if rank == 0 else {})
    attempt("partial", {"a": DTensor.from_local(torch.ones(2), mesh, [Partial()])})
    return {**found, "unchanged": files(kept.path) == before}


def main(rank: int, port: str, path: Path) -> None:
    warnings.simplefilter("error")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, dist.group.WORLD, dist.group.WORLD)
    mesh = init_device_mesh("cpu", (2,))
    kept = Checkpoints(path / "checkpoints")
    state = state_of(rank, mesh)
    kept.save(1, {**state, "step": 1}, ranks=ranks)
    kept.save(1, state, day="2026-01-02", ranks=ranks)
    found = fails(kept, ranks, mesh)
    kept.save(3, {"only": torch.ones(2) if rank == 0 else None}, ranks=ranks)  # nothing in parts
    kept.save(5, state, ranks=ranks)
    if rank == 0:
        shard = kept.folder(5) / "shard-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    said: list[str] = []
    newest = kept.load_newest(said.append, lambda step, facts: step != 3, rows=HELD[rank], ranks=ranks)
    assert newest is not None
    tables, tensors = newest[1]["tables"], whole()
    found["newest"] = newest[0]
    found["said"] = said
    found["same"] = [
        name for name in ("weight", "moment", "sum") if torch.equal(tables[name], rows_of(tensors[name], HELD[rank]))
    ]
    found["dense"] = torch.equal(newest[1]["optimizer"][0]["state"]["dense"], tensors["dense"])
    (path / f"found_{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort an interpreter that winds down by itself


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[3], Path(sys.argv[4]))
