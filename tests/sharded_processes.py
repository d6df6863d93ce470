"""What test_sharded.py runs in each of N processes: python -m tests.sharded_processes RANK RANKS PORT FILE.

Every check trains tables that TorchRec has cut over the processes beside `EmbeddingTables` that see all rows, and
writes the largest difference as JSON.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from steadyrank.distributed.planning import describe
from steadyrank.distributed.sharded import ShardedTables
from steadyrank.distributed.unfused import empty_gradient
from steadyrank.errors import ConfigError
from steadyrank.models import embeddings
from steadyrank.models.embeddings import EmbeddingTables
from steadyrank.optim import (
    AGC,
    AdaGC,
    ClipGlobalNorm,
    ClipGradients,
    ClippyAdagrad,
    ClippyAdam,
    ClipTensorNorm,
    ClipUpdates,
    ClipValue,
    CowClip,
    Lamb,
    LambAdagrad,
    RowWiseAdagrad,
    SkipSpikes,
    SpikeClip,
    StableAdamW,
)
from steadyrank.ranks import Ranks
from steadyrank.schema import Batch, Ragged, Schema, Share

from . import own_tables
from .own_tables import adagrad, gap, scalars

FEATURES: dict[str, dict[str, Any]] = {
    "user": {"kind": "id", "rows": 40},
    "item.id": {"kind": "id", "rows": 30},
    "history": {"kind": "ids", "rows": 30, "table": "item.id", "pooling": "mean"},
    "tiny": {"kind": "id", "rows": 1},
    "country": {"kind": "id", "rows": 11, "width": 8},
    "tags": {"kind": "ids", "rows": 13, "width": 8, "pooling": "sum"},
    "phone": {"kind": "id", "rows": 5, "width": 2},
}
SCHEMA = Schema(features=FEATURES, tasks={"click": {"kind": "binary"}}, embedding_width=4)
FORCED = {"user": ["row_wise"], "item.id": ["table_wise"], "tiny": ["row_wise"], "country": ["table_wise"],
          "tags": ["row_wise"], "phone": ["table_wise"]}  # fmt: skip
ROWS = [9, 1, 12, 7]


CASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "rowwise": lambda params: RowWiseAdagrad(params, lr=0.5),
    "torch_adagrad": adagrad,
    "adagrad_row": lambda params: ClippyAdagrad(params, lr=0.5, granularity="row"),
    "adagrad_tensor": lambda params: ClippyAdagrad(params, lr=0.5, telemetry=True),
    "adagrad_unit": lambda params: ClippyAdagrad(params, lr=0.5, granularity="unit", telemetry=True),
    "adagrad_row_quantile": lambda params: ClippyAdagrad(params, lr=0.5, granularity="row", quantile=0.3),
    "adagrad_clipped": lambda params: ClippyAdagrad(params, lr=0.5, accumulator="delayed_clipped", half_life=5.0),
    "adam_tensor": lambda params: ClippyAdam(params, lr=0.05),
    "adam_calibrated": lambda params: ClippyAdam(params, lr=0.05, clip_moments=True, calibration_steps=3),
    "lamb": lambda params: Lamb(params, lr=0.05),
    "lamb_adagrad": lambda params: LambAdagrad(params, lr=0.05),
    "stable_adamw": lambda params: StableAdamW(params, lr=0.05),
    "clip_updates": lambda params: ClipUpdates(adagrad(params)),
    "clip_updates_row": lambda params: ClipUpdates(adagrad(params), granularity="row"),
    "global_norm": lambda params: ClipGradients(ClippyAdagrad(params, lr=0.5), ClipGlobalNorm(0.1)),
    "tensor_norm": lambda params: ClipGradients(RowWiseAdagrad(params, lr=0.5), ClipTensorNorm(0.02)),
    "agc": lambda params: ClipGradients(adagrad(params), AGC(clipping=0.05)),
    "ada_gc": lambda params: ClipGradients(adagrad(params), AdaGC(warmup=3)),
    "clip_value": lambda params: ClipGradients(adagrad(params), ClipValue(0.02)),
    "cow_clip": lambda params: ClipGradients(adagrad(params), CowClip(ratio=0.1)),
    "spike_clip": lambda params: ClipGradients(adagrad(params), SpikeClip(2.0, warmup=3)),
    "skip_spikes": lambda params: ClipGradients(adagrad(params), SkipSpikes(2.0, window=4)),
}

MAIN = ("rowwise", "adagrad_row", "adagrad_tensor", "adam_tensor")
BY_ITSELF = ("adagrad_row", "adagrad_row_quantile")
"""Need no communication: a row's factor is its own, and a NaN is refused by the rank that holds it."""
UNGUARDED = ("rowwise", "torch_adagrad", *BY_ITSELF)
"""Take no NaN, or refuse it in the rows of one rank only."""


def make_batch(seed: int, rows: int) -> Batch:
    """A batch of the schema; popular ids, so that several ranks touch the same rows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, count: int) -> torch.Tensor:
        slot = SCHEMA.slot(name)
        return slot.start + (torch.rand(count, generator=generator).square() * slot.rows).long()

    lists = []
    for name in SCHEMA.list_features:
        lengths = torch.randint(0, 4, (rows,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        lists.append(Ragged(draw(name, int(offsets[-1])), offsets))
    empty = torch.zeros(rows, 0)
    labels = torch.randn(rows, 1, generator=generator)
    ids = torch.stack([draw(name, rows) for name in SCHEMA.id_features], 1)
    ones, zeros = torch.ones(rows, 1), torch.zeros(rows, dtype=torch.int64)
    return Batch(ids, tuple(lists), empty, empty.long(), labels, ones, zeros, zeros)


def slice_of(batch: Batch, ranks: Ranks) -> Batch:
    """Return this rank's rows."""
    cuts = [len(batch) * i // ranks.size for i in range(ranks.size + 1)][::-1]
    cuts = [len(batch) - cut for cut in cuts]  # the first ranks have more
    mine = batch.take(torch.arange(cuts[ranks.rank], cuts[ranks.rank + 1]))
    return Batch(**{**mine.__dict__, "share": Share(len(batch), 0, 0, batch.weights.sum(0))})


def fill_gradients(tables: ShardedTables) -> None:
    """Give an empty gradient to weights that have none, as a run's engine does."""
    for weight in tables.weights.values():
        if weight.grad is None:
            weight.grad = empty_gradient(weight)


def loss_of(x_BD: torch.Tensor, batch: Batch, rows: int, spike: float = 1.0) -> torch.Tensor:
    """A sum over rows, divided by those of the whole batch; with a third power, so that embeddings matter."""
    v = torch.linspace(-1, 1, x_BD.shape[1]) * spike
    y = x_BD @ v + x_BD.square().sum(1)
    return (y - batch.labels[:, 0]).square().sum() / rows


def whole(x: torch.Tensor, rows: Any, ranks: Ranks, columns: tuple[int, ...]) -> torch.Tensor:
    """Put the rows that the ranks hold together again; a row that nobody or two of them hold gives NaN."""
    found = torch.zeros(sum(each.rows for each in rows), *columns)
    held = torch.zeros(len(found))
    place = 0
    for each in rows:
        first = each.start + each.first
        found[first : first + each.count] = x[place : place + each.count]
        held[first : first + each.count] += 1
        place += each.count
    assert place == len(x)
    times = ranks.gather(held).sum(0)
    total = ranks.gather(found).sum(0)
    total[times != 1] = torch.nan
    return total


def pair(ranks: Ranks, sharding: Any = None) -> tuple[EmbeddingTables, ShardedTables, bool]:
    """Both kinds of tables; and whether their generators are left in the same state."""
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    one = EmbeddingTables(SCHEMA, 0.3, generators[0])
    many = ShardedTables(
        SCHEMA, 0.3, generators[1], ranks=ranks, device=torch.device("cpu"), batch_rows=8, sharding=sharding
    )
    return one, many, torch.equal(generators[0].get_state(), generators[1].get_state())


def apart(one: EmbeddingTables, many: ShardedTables, ranks: Ranks) -> float:
    """The largest difference of a weight."""
    return max(
        gap(p, whole(q.detach(), many.rows[f"weights.{key}"], ranks, p.shape[1:]))
        for (key, p), q in zip(one.weights.items(), many.weights.values(), strict=True)
    )


def check_once(ranks: Ranks, sharding: Any) -> dict[str, Any]:
    """Names, weights at the start, outputs and gradients, for batches of several sizes."""
    one, many, same_state = pair(ranks, sharding)
    found: dict[str, Any] = {
        "same_state": same_state,
        "names": [name for name, _ in many.named_parameters()],
        "state_dict": list(many.state_dict()),
        "modules": len(list(many.modules())),
        "table_names": many.table_names(),
        "empty": ranks.any(any(len(w) == 0 for w in many.weights.values())),
        "plan": {each["table"]: each["sharding"] for each in describe(many.plan)["tables"]},
        "start": apart(one, many, ranks),
        "forward": 0.0,
        "gradient": 0.0,
        "dense": False,
    }
    for seed, rows in enumerate(ROWS):
        batch = make_batch(seed, rows)
        mine = slice_of(batch, ranks)
        x_one, x_many = one(batch), many(mine)
        first = ranks.gather(torch.tensor(len(mine)))[: ranks.rank].sum().item()
        found["forward"] = max(found["forward"], gap(x_one[first : first + len(mine)], x_many) if len(mine) else 0.0)
        one.zero_grad()
        many.zero_grad()
        loss_of(x_one, batch, rows).backward()
        (loss_of(x_many, mine, rows) * ranks.size).backward()
        fill_gradients(many)
        for (key, p), q in zip(one.weights.items(), many.weights.values(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            found["dense"] |= not q.grad.is_sparse
            grad = whole(q.grad.to_dense(), many.rows[f"weights.{key}"], ranks, p.shape[1:])
            found["gradient"] = max(found["gradient"], gap(p.grad.to_dense(), grad))
    with torch.no_grad():  # an evaluation's batch, the same on every rank, is no slice
        found["forward"] = max(found["forward"], gap(one(make_batch(9, 5)), many(make_batch(9, 5))))
        with torch.autocast("cpu", torch.bfloat16):
            x_one, x_many = one(make_batch(9, 5)), many(make_batch(9, 5))
            found["half"] = [str(x_many.dtype), (x_one - x_many).abs().amax().item()]
    found["forward"] = max(ranks.gather_objects(found["forward"]))
    return found


def spoil(one: EmbeddingTables, many: ShardedTables, ranks: Ranks) -> None:
    """Put a NaN into one touched row of one table: on one rank only, where the tables are cut."""
    p, q = one.weights["width_8"], many.weights["width_8"]
    p.grad, q.grad = p.grad.coalesce(), q.grad.coalesce()
    row = int(p.grad.indices()[0, 0])
    p.grad.values()[0, 0] = torch.nan
    ends, shifts = q.sharded_rows
    for i, mine in enumerate(q.grad.indices()[0].tolist()):
        if mine + int(shifts[torch.searchsorted(ends, mine, right=True)]) == row:
            q.grad.values()[i, 0] = torch.nan
    assert ranks.gather(q.grad.values().isnan().sum()).sum() == 1


def train(name: str, one: EmbeddingTables, many: ShardedTables, ranks: Ranks) -> dict[str, Any]:
    """Twenty steps or fewer, with a spike in one and a NaN in one rank's rows in another; then put the weights back."""
    start = [w.detach().clone() for w in (*one.parameters(), *many.parameters())]
    made = CASES[name](one.parameters()), CASES[name](many.parameters())
    for step in range(20 if name in MAIN else 8):
        batch = make_batch(100 + step, ROWS[step % len(ROWS)])
        mine, spike = slice_of(batch, ranks), 30.0 if step == 4 else 1.0
        for optimizer in made:
            optimizer.zero_grad()
        loss_of(one(batch), batch, len(batch), spike).backward()
        (loss_of(many(mine), mine, len(batch), spike) * ranks.size).backward()
        fill_gradients(many)
        if step == 6 and name not in UNGUARDED:
            spoil(one, many, ranks)
        for optimizer in made:
            optimizer.step()
    found = [scalars(optimizer) for optimizer in made]
    if name in BY_ITSELF:
        each = ranks.gather_objects(found[1])
        found[1] = {key: min(of[key] for of in each) for key in found[1]}
    result = {
        "gap": apart(one, many, ranks),
        "moved": max((w - v).abs().amax().item() for w, v in zip(one.weights.values(), start, strict=False)),
        "scalars": found,
        "alike": len({json.dumps(each) for each in ranks.gather_objects(found[1])}) == 1,
    }
    with torch.no_grad():
        for w, before in zip((*one.parameters(), *many.parameters()), start, strict=True):
            w.copy_(before)
    return result


def refusals(many: ShardedTables, ranks: Ranks) -> dict[str, str]:
    """What is said where something cannot be done."""
    mine = slice_of(make_batch(0, 8), ranks)
    loss_of(many(mine), mine, 8).backward()
    fill_gradients(many)

    def overfull() -> None:
        ShardedTables(
            SCHEMA, 0.3, torch.Generator(), ranks=ranks, device=torch.device("cpu"), batch_rows=8,
            budget_bytes=1500, dense_bytes=500, state_bytes=lambda width: 4.0,
        )  # fmt: skip

    found = {}
    for name, do in {
        "quantile": lambda: ClippyAdagrad(many.parameters(), quantile=0.1).step(),
        "fused": lambda: ClippyAdagrad(many.parameters(), fused=True).step(),
        "memory": overfull,
    }.items():
        try:
            do()
            found[name] = ""
        except ConfigError as error:
            found[name] = str(error)
    return found


def main(rank: int, size: int, port: str, path: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")  # four are on two machines
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    ranks = Ranks(rank, size, dist.group.WORLD, dist.group.WORLD)
    forced = FORCED if size == 2 else {**FORCED, "user": ["table_row_wise"]}
    kept, embeddings.BLOCK = embeddings.BLOCK, 64  # matrices of 5, 4 and 1 blocks
    found: dict[str, Any] = {"once/forced": check_once(ranks, forced)}
    embeddings.BLOCK = kept
    if size == 2:
        found["once/planned"] = check_once(ranks, None)
        found |= own_tables.check(ranks)
    one, many, _ = pair(ranks, forced)
    for name in CASES if size == 2 else ("adagrad_tensor", "adam_tensor", "global_norm"):
        found[f"train/{name}"] = train(name, one, many, ranks)
    found["refused"] = refusals(many, ranks)
    if rank == 0:
        with open(path, "w") as file:
            json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort an interpreter that winds down by itself


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
