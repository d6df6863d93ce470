"""What test_optim_distributed.py runs in each of two processes: python -m tests.two_processes RANK SIZE PORT FILE.

Every check trains a model with sharded or replicated parameters beside the same model in one process, and writes the
largest difference as JSON.
"""

import copy
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from steadyrank.guard import Before, Totals, forget_step, judge_together, step_where_ok
from steadyrank.optim import (
    AGC,
    ClipGlobalNorm,
    ClipGradients,
    ClippyAdagrad,
    ClippyAdam,
    ClippyAdamW,
    ClipUpdates,
    Lamb,
    LambAdagrad,
    RowWiseAdagrad,
    StableAdamW,
)
from steadyrank.ranks import Ranks

CASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adagrad": lambda params: ClippyAdagrad(params, lr=0.5),
    "adagrad_delayed_clipped": lambda params: ClippyAdagrad(params, lr=0.5, accumulator="delayed_clipped"),
    "adagrad_row": lambda params: ClippyAdagrad(params, lr=0.5, granularity="row"),
    "adagrad_unit_decay": lambda params: ClippyAdagrad(params, lr=0.5, granularity="unit", weight_decay=0.1),
    "adagrad_quantile": lambda params: ClippyAdagrad(params, lr=0.5, quantile=0.2),
    "adagrad_foreach": lambda params: ClippyAdagrad(params, lr=0.5, foreach=True, telemetry=True),
    "adagrad_half_life": lambda params: ClippyAdagrad(params, lr=0.5, half_life=3.0),
    "adam": lambda params: ClippyAdam(params, lr=0.05),
    "adam_clip_moments": lambda params: ClippyAdam(params, lr=0.05, clip_moments=True, calibration_steps=2),
    "adamw": lambda params: ClippyAdamW(params, lr=0.05, weight_decay=0.1),
    "lamb_adagrad": lambda params: LambAdagrad(params, lr=0.1, weight_decay=0.1),
    "lamb": lambda params: Lamb(params, lr=0.1, trust_clip=5.0),
    "stable_adamw": lambda params: StableAdamW(params, lr=0.05, weight_decay=0.1),
    "clip_updates": lambda params: ClipUpdates(torch.optim.Adam(params, lr=0.05), absolute_threshold=0.001),
    "agc": lambda params: ClipGradients(torch.optim.Adagrad(params, lr=0.5), AGC(clipping=0.05)),
    "global_norm": lambda params: ClipGradients(ClippyAdagrad(params, lr=0.5), ClipGlobalNorm(0.5)),
    "rowwise": lambda params: RowWiseAdagrad(params, lr=0.5),
}


UNASKED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": CASES["adam"],
    "torch_adam": lambda params: torch.optim.Adam(params, lr=0.05),
    "torch_sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
}


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def difference(one: list[nn.Parameter], many: list[nn.Parameter]) -> float:
    """Return the largest difference of two models in any weight; the weights are of the order of 1."""
    return max((p - whole(q)).abs().amax().item() for p, q in zip(one, many, strict=True))


def shards(make: Callable[[Any], torch.optim.Optimizer], mesh: DeviceMesh, dim: int) -> dict[str, Any]:
    """DTensor parameters of uneven, single and scalar-like shapes; a spike, and a NaN in one shard only."""
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(1, 4), torch.randn(7), torch.randn(3, 2).double()]
    one = [nn.Parameter(w.clone()) for w in start]
    many = [nn.Parameter(distribute_tensor(w.clone(), mesh, [Shard(min(dim, w.dim() - 1))])) for w in start]
    made = make(one), make(many)
    for step in range(7):
        for p, q in zip(one, many, strict=True):
            grad = torch.randn_like(p) * (10 if step == 3 else 1)
            if step == 4:
                grad.view(-1)[-1] = torch.nan
            p.grad, q.grad = grad, distribute_tensor(grad.clone(), mesh, q.placements)
        for optimizer in made:
            optimizer.step()
    states = [made[1].state[q] for q in many]
    bad = [int(whole(next(state[key] for key in ("bad_steps", "grad_bad_steps") if key in state))) for state in states]
    factors = [[float(whole(o.state[p].get("clip_factor", torch.ones(())))) for p in ps]
               for o, ps in zip(made, (one, many), strict=True)]  # fmt: skip
    saved = copy.deepcopy(made[1].state_dict())
    made[1].load_state_dict(saved)
    return {"gap": difference(one, many), "bad": bad, "factors": factors}


def modules(make: Callable[[Any], torch.optim.Optimizer], wrap: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """A module under DDP or FSDP2, each process with its half of the batch, beside one that sees all of it."""
    torch.manual_seed(1)
    alone = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 1))
    together = wrap(copy.deepcopy(alone))
    made = make(alone.parameters()), make(together.parameters())
    rank, half = dist.get_rank(), 8
    for step in range(6):
        x = torch.randn(2 * half, 6, generator=torch.Generator().manual_seed(step)) * (5 if step == 3 else 1)
        for model, rows, optimizer in (
            (alone, x, made[0]),
            (together, x[rank * half : (rank + 1) * half], made[1]),
        ):
            optimizer.zero_grad()
            (model(rows) - rows.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
    return {"gap": difference(list(alone.parameters()), list(together.parameters()))}


def unasked(make: Callable[[Any], torch.optim.Optimizer], mesh: DeviceMesh) -> dict[str, Any]:
    """FSDP2 with a bad step that the host does not ask for, as on a GPU, beside the same model that never saw it."""
    torch.manual_seed(2)
    start = nn.Linear(6, 3)
    models = [fully_shard(copy.deepcopy(start), mesh=mesh) for _ in range(2)]
    made = [make(model.parameters()) for model in models]
    ranks = Ranks(dist.get_rank(), 2, dist.group.WORLD, dist.group.WORLD)
    verdicts = []
    for step in range(5):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + ranks.rank))
        bad = step == 2
        for model, optimizer in list(zip(models, made, strict=True))[: 1 if bad else 2]:
            before = Before()
            before.keep_statistics(model)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if bad and ranks.rank == 1:
                next(model.parameters()).grad.to_local().view(-1)[0] = torch.nan
            totals = Totals(torch.ones(()), torch.ones(1), torch.zeros(1))
            verdict, _ = judge_together(ranks, model.parameters(), totals, statistics=before.statistics())
            asked = step_where_ok([optimizer], verdict, before, ask=False)
            if not asked and bad:
                forget_step([optimizer], list(model.parameters()))
            verdicts.append(bool(verdict.ok))
    gap = difference([nn.Parameter(whole(p.detach())) for p in models[0].parameters()], list(models[1].parameters()))
    return {"gap": gap, "bad": verdicts.count(False)}


def main(rank: int, port: str, path: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for name, make in CASES.items():
        for dim in (0, 1):
            if (name, dim) != ("rowwise", 1):  # its accumulator has no columns to shard
                found[f"shards_{dim}/{name}"] = shards(make, mesh, dim)
    for name in ("adagrad", "adam", "adagrad_row"):
        found[f"ddp/{name}"] = modules(CASES[name], DistributedDataParallel)
        found[f"fsdp2/{name}"] = modules(CASES[name], lambda module: fully_shard(module, mesh=mesh))
    for name in ("adam", "torch_adam", "torch_sgd"):
        found[f"unasked/{name}"] = unasked(UNASKED[name], mesh)
    if rank == 0:
        with open(path, "w") as file:
            json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort an interpreter that winds down by itself


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[3], sys.argv[4])
