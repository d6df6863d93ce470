"""Optimizers step the shards of DTensors by plain operations, few collectives, and with the numbers of one process.

`python -m tests.test_optim_shards RANK SIZE PORT FILE` is what goes in each of two processes.
"""

import copy
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from steadyrank.monitors.dynamics import Dynamics
from steadyrank.optim import (
    AGC,
    AdaGC,
    ClipGlobalNorm,
    ClipGradients,
    ClippyAdagrad,
    ClippyAdam,
    ClipUpdates,
    ClipValue,
    CowClip,
    Lamb,
    LambAdagrad,
    RowWiseAdagrad,
    SpikeClip,
    StableAdamW,
    read_binding,
)
from steadyrank.optim.rules import Clipped, Gradient, Rule, scaled

from .together import needs_gloo, run_together

SHAPES = ((5, 3), (1, 4), (7,), (4, 2, 3), (3, 2))


class Plain(torch.optim.Optimizer):
    """Someone's optimizer that steps the parts of DTensors by itself."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in (p for group in self.param_groups for p in group["params"]):
            here, grad = (x.to_local() if isinstance(x, DTensor) else x for x in (param, param.grad))
            here.sub_(0.5 * grad)


class BySize(Rule):
    """Someone's rule, which looks at more than coordinates and rows."""

    def clip(self, gradients: Sequence[Gradient], shared: dict[str, torch.Tensor]) -> Clipped:
        return scaled(gradients, [1 / (1 + whole(each.values.abs().sum())) for each in gradients])


Make = Callable[[Any], torch.optim.Optimizer]
CASES: dict[str, tuple[Make, int]] = {  # and how many collectives a step takes
    "adagrad": (lambda params: ClippyAdagrad(params, lr=0.5, weight_decay=0.1), 2),
    "adagrad_row": (lambda params: ClippyAdagrad(params, lr=0.5, granularity="row"), 2),
    "adagrad_unit": (lambda params: ClippyAdagrad(params, lr=0.5, granularity="unit", calibration_steps=2), 2),
    "adagrad_told": (lambda params: ClippyAdagrad(params, lr=0.5, telemetry=True), 4),
    "adam": (lambda params: ClippyAdam(params, lr=0.05, foreach=False), 2),
    "rowwise": (lambda params: RowWiseAdagrad(params, lr=0.5), 1),
    "lamb_adagrad": (lambda params: LambAdagrad(params, lr=0.1, weight_decay=0.1), 2),
    "lamb": (lambda params: Lamb(params, lr=0.1, trust_clip=5.0), 2),
    "stable_adamw": (lambda params: StableAdamW(params, lr=0.05, weight_decay=0.1), 2),
    "updates": (lambda params: ClipUpdates(Plain(params), absolute_threshold=0.001), 2),
    "updates_unguarded": (lambda params: ClipUpdates(Plain(params), granularity="row", guard=False), 1),
    "value": (lambda params: ClipGradients(Plain(params), ClipValue(0.5)), 2),
    "global_norm": (lambda params: ClipGradients(Plain(params), ClipGlobalNorm(0.5)), 2),
    "cowclip": (lambda params: ClipGradients(Plain(params), CowClip(ratio=0.1)), 2),
    "adagc": (lambda params: ClipGradients(Plain(params), AdaGC(warmup=2)), 2),
    "spikes": (lambda params: ClipGradients(Plain(params), SpikeClip(threshold=2.0, warmup=2)), 2),
}
LEFT_TO_DTENSOR: dict[str, Make] = {
    "quantile": lambda params: ClippyAdagrad(params, lr=0.5, quantile=0.2),
    "agc": lambda params: ClipGradients(ClippyAdagrad(params, lr=0.5), AGC(clipping=0.05)),
    "own_rule": lambda params: ClipGradients(ClippyAdagrad(params, lr=0.5), BySize()),
}


LOOKS = ("__get__", "__set__", "dim", "numel", "stride", "detach")


class Seen(TorchFunctionMode):
    """Notes the functions that are given DTensors, but for those that only look at what one is."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name not in LOOKS and any(isinstance(x, DTensor) for x in tree_leaves((args, kwargs or {}))):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def collectives() -> Iterator[list[int]]:
    """Count what is gathered, as our optimizers do all of it."""
    theirs, count = dist.all_gather, [0]

    def gather(*args: Any, **options: Any) -> Any:
        count[0] += 1
        return theirs(*args, **options)

    with mock.patch.object(dist, "all_gather", gather):
        yield count


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gap_of(one: torch.Tensor, many: torch.Tensor) -> float:
    return float((one - whole(many)).abs().nan_to_num(nan=math.inf).amax())


def gaps(one: Any, many: Any, params: list[tuple[nn.Parameter, nn.Parameter]]) -> dict[str, float]:
    """Return the largest differences of weights, and of each state, of two optimizers."""
    found = {"weight": max(gap_of(p.detach(), q.detach()) for p, q in params)}
    for p, q in params:
        assert one.state[p].keys() == many.state[q].keys()
        for key, value in one.state[p].items():
            there = many.state[q][key]
            assert there.shape == value.shape, key
            if value.dim() and hasattr(there, "placements"):
                assert there.placements == q.placements, key
            found[key] = max(found.get(key, 0.0), gap_of(value.double(), whole(there).double()))
    return found


def train(make: Make, mesh: DeviceMesh, places: list[Placement], with_plain: bool = False) -> dict[str, Any]:
    """Train parameters that lie in such a way beside plain ones; a spike, and a NaN in one rank's part only."""
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) for shape in SHAPES]
    one = [nn.Parameter(w.clone()) for w in start]
    many = [nn.Parameter(distribute_tensor(w.clone(), mesh, places)) for w in start]
    if with_plain:
        many[1] = nn.Parameter(start[1].clone())
    made, params = [make(one), make(many)], list(zip(one, many, strict=True))
    seen, counted, versions = Seen(), 0, 0
    for step in range(6):
        for p, q in params:
            grad = torch.randn(p.shape, generator=draw) * (10 if step == 2 else 1)
            if step == 3:
                grad.view(-1)[-1] = math.nan
            p.grad = grad
            q.grad = distribute_tensor(grad.clone(), mesh, places) if hasattr(q, "placements") else grad.clone()
        made[0].step()
        before = many[0]._version
        if step == 4:
            with seen, collectives() as count:
                made[1].step()
            counted = count[0]
        else:
            made[1].step()
        versions += many[0]._version > before
        if step == 1:  # and all of it is saved and loaded
            saved = copy.deepcopy(made[1].state_dict())
            made[1] = make(many)
            made[1].load_state_dict(saved)
    told = [[list(each) for each in read_binding(each)] for each in made]
    found = {"gaps": gaps(*made, params), "seen": seen.names, "collectives": counted, "versions": versions}
    return found | {"told": told}


def dynamics(mesh: DeviceMesh, places: list[Placement]) -> dict[str, Any]:
    """Read a step of sharded parameters beside that of whole ones."""
    found: list[dict[str, list[float]]] = []
    for cut in (False, True):
        draw = torch.Generator().manual_seed(1)
        params = []
        for shape in SHAPES:
            w, grad = torch.randn(2, *shape, generator=draw).unbind()
            if cut:
                w, grad = (distribute_tensor(x.clone(), mesh, places) for x in (w, grad))
            params.append(nn.Parameter(w.clone()))
            params[-1].grad = grad
        optimizer = ClippyAdagrad(params, lr=0.5)
        watched = Dynamics([(str(i), p) for i, p in enumerate(params)], [optimizer])
        with Seen() as seen:
            watched.before()
        optimizer.step()
        read = {each.area: each.values.tolist() for each in watched.after()}
        watched.before(matrices=True)
        optimizer.step()
        read["look"] = watched.look()[0].values.tolist()
        found.append(read)
    return {"one": found[0], "many": found[1], "seen": seen.names}


def main(rank: int, size: int, port: str, path: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    mesh, flat = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (size, 1), mesh_dim_names=("all", "one"))
    found: dict[str, Any] = {"dynamics": dynamics(mesh, [Shard(0)])}
    for name, (make, _) in CASES.items():
        found[f"shards/{name}"] = train(make, mesh, [Shard(0)])
    for name in ("adagrad", "adam", "lamb", "updates", "value"):
        found[f"copies/{name}"] = train(CASES[name][0], mesh, [Replicate()])
    found["alone/adam"] = train(CASES["adam"][0], flat["one"], [Shard(0)])
    for name, make in LEFT_TO_DTENSOR.items():
        found[f"left/{name}"] = train(make, mesh, [Shard(0)])
    for name in ("adagrad_row", "adam", "lamb", "stable_adamw", "updates"):
        found[f"left/2d/{name}"] = train(CASES[name][0], flat, [Shard(0), Replicate()])
    for name in ("adam", "stable_adamw", "updates"):
        found[f"mixed/{name}"] = train(CASES[name][0], mesh, [Shard(0)], with_plain=True)
    found["dynamics/2d"] = dynamics(flat, [Shard(0), Replicate()])
    if rank == 0:
        Path(path).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort an interpreter that winds down by itself


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("shards") / "found.json"
    run_together("test_optim_shards", 2, path)
    read: dict[str, Any] = json.loads(path.read_text())
    return read


@needs_gloo
@pytest.mark.parametrize("how", ["shards", "copies", "alone", "left", "mixed"])
def test_parts_take_the_step_of_the_whole(how: str, found: dict[str, Any]) -> None:
    cases = {name: case for name, case in found.items() if name.startswith(f"{how}/")}
    assert cases
    for name, case in cases.items():
        assert max(case["gaps"].values()) <= 2e-6, f"{name}: {case['gaps']}"
        assert case["versions"] == 6 or how == "left", f"{name}: autograd was not told"


@needs_gloo
def test_a_step_of_shards_dispatches_nothing_on_dtensors_and_gathers_for_all_tensors_at_once(
    found: dict[str, Any],
) -> None:
    for name, (_, collectives) in CASES.items():
        case = found[f"shards/{name}"]
        assert case["seen"] == [], name
        assert case["collectives"] == collectives, name
    for name in ("adagrad", "adam", "lamb"):
        assert found[f"copies/{name}"]["seen"] == []
        assert found[f"copies/{name}"]["collectives"] == 0
    assert found["alone/adam"]["collectives"] == 0
    assert found["left/2d/adam"]["seen"], "this test would not see them"


@needs_gloo
def test_what_is_told_of_shards_is_that_of_the_whole(found: dict[str, Any]) -> None:
    one, many = found["shards/adagrad_told"]["told"]
    assert len(one) == len(SHAPES)
    assert max(share for _, _, share, _ in one) > 0
    for (_, factor, share, place), (_, their_factor, their_share, their_place) in zip(one, many, strict=True):
        assert (their_factor, their_share) == pytest.approx((factor, share), rel=1e-6)
        assert their_place == place


@needs_gloo
@pytest.mark.parametrize("name", ["dynamics", "dynamics/2d"])
def test_dynamics_read_shards_as_the_whole(name: str, found: dict[str, Any]) -> None:
    case = found[name]
    assert case["one"].keys() == case["many"].keys()
    for area, values in case["one"].items():
        assert case["many"][area] == pytest.approx(values, rel=1e-5), area
    assert (case["seen"] == []) == (name == "dynamics")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
