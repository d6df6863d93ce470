"""Wrapped optimizers are plain torch optimizers: states, hooks, schedulers, scalers, copies, shards."""

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steadyrank.optim import RowWiseAdagrad
from steadyrank.optim.rules import AGC, ClipGlobalNorm
from steadyrank.optim.wrap import ClipGradients, ClipUpdates
from steadyrank.testing import TinyProblem, check_optimizer

from .test_clippy import param
from .test_optim_wrap import BASES, INF, gradients, two


@pytest.fixture(autouse=True)
def _sparse_checks_chosen() -> Any:
    with torch.sparse.check_sparse_tensor_invariants(enable=True):
        yield


@pytest.mark.parametrize(
    ("make", "guarded", "sparse"),
    [
        (lambda params: ClipUpdates(BASES["sgd"](params)), True, False),
        (lambda params: ClipUpdates(torch.optim.SGD(params, lr=0.1), granularity="row"), True, True),
        (lambda params: ClipUpdates(BASES["adam"](params), granularity="unit"), True, False),
        (lambda params: ClipUpdates(torch.optim.AdamW(params, lr=0.1)), False, False),
        (lambda params: ClipUpdates(BASES["adagrad"](params)), False, True),  # it reads its steps on the host
        (lambda params: ClipUpdates(RowWiseAdagrad(params, lr=0.1)), True, True),
        (lambda params: ClipGradients(ClipUpdates(BASES["sgd"](params)), AGC(0.1)), True, False),
        (lambda params: ClipUpdates(ClipGradients(BASES["sgd"](params), AGC(0.1))), True, False),
    ],
)
def test_holds_every_promise_of_an_optimizer(make: Any, guarded: bool, sparse: bool) -> None:
    check_optimizer(make, guarded=guarded, sparse=sparse)


def test_the_state_of_a_plain_optimizer_loads_and_the_other_way_round() -> None:
    plain, wrapped, back = two(torch.bfloat16), two(torch.bfloat16), two(torch.bfloat16)
    adam = torch.optim.Adam(plain, lr=0.1)
    for step in range(3):
        gradients(plain, step)
        adam.step()
    optimizer = ClipUpdates(torch.optim.Adam(wrapped, lr=0.7), absolute_threshold=INF)
    optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["absolute_threshold"] == INF
    for p, q in zip(plain, wrapped, strict=True):
        q.data.copy_(p)
    for params, each in ((plain, adam), (wrapped, optimizer)):
        gradients(params, 4)
        each.step()
    again = torch.optim.Adam(back, lr=0.7)
    again.load_state_dict(optimizer.state_dict())
    for p, q, r in zip(plain, wrapped, back, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[q]["clip_factor"] == 1
        for key, value in adam.state[p].items():
            torch.testing.assert_close(again.state[r][key], value, rtol=0, atol=0)


def test_own_states_keep_their_dtype_and_hooks_see_the_whole_state() -> None:
    params = two(torch.bfloat16)
    optimizer = ClipUpdates(BASES["sgd"](params))
    gradients(params, 0, scale=50.0)
    optimizer.step()
    optimizer.state[params[0]]["bad_steps"].fill_(1001)  # not a bfloat16 number
    seen: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(set(state["state"][0])))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = ClipUpdates(BASES["sgd"](two(torch.bfloat16)))
    fresh.register_load_state_dict_pre_hook(lambda _, state: {**state, "note": seen.append("before")})
    fresh.register_load_state_dict_post_hook(lambda o: seen.append(set(o.state_dict()["state"][0])))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    whole = {"momentum_buffer", "clip_factor", "bad_steps"}
    assert seen == [whole, "before", whole]
    state = fresh.state[fresh.param_groups[0]["params"][0]]
    assert (int(state["bad_steps"]), state["clip_factor"].dtype) == (1001, torch.float32)
    assert torch.equal(state["clip_factor"], optimizer.state[params[0]]["clip_factor"])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        fresh.load_state_dict({"state": {}, "param_groups": []})


def test_schedulers_reach_the_inner_and_know_its_defaults() -> None:
    params = two()
    optimizer = ClipUpdates(torch.optim.Adam(params, lr=0.1), absolute_threshold=INF)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for step in range(3):
        gradients(params, step)
        optimizer.step()
        scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)  # wants to find betas or momentum
    inner = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, step_size=1)
    assert inner.optimizer.param_groups is optimizer.param_groups


def test_hooks_and_closure_run_once_in_order() -> None:
    problem, called = TinyProblem(), []
    inner = torch.optim.SGD(problem.parameters(), lr=0.1)
    optimizer = ClipUpdates(inner)
    for who, each in (("outer", optimizer), ("inner", inner)):
        each.register_step_pre_hook(lambda *_, who=who: called.append(f"{who} before"))
        each.register_step_post_hook(lambda *_, who=who: called.append(f"{who} after"))

    def closure() -> float:
        called.append("closure")
        assert torch.is_grad_enabled()
        problem.backward(0)
        return 3.5

    assert optimizer.step(closure) == 3.5
    assert called == ["outer before", "closure", "inner before", "inner after", "outer after"]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_hold_together(again: Any) -> None:
    params = two()
    optimizer = ClipGradients(ClipUpdates(torch.optim.Adam(params, lr=0.1)), ClipGlobalNorm(0.5))
    gradients(params, 0)
    optimizer.step()
    others, other = again((params, optimizer))
    assert other.param_groups is other.optimizer.optimizer.param_groups
    assert other.param_groups[0]["params"][0] is others[0]
    assert other.rule == optimizer.rule
    for each, made in ((params, optimizer), (others, other)):
        gradients(each, 1)
        made.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("wrap", [ClipUpdates, lambda inner: ClipGradients(inner, ClipGlobalNorm(1.0))])
def test_works_with_a_grad_scaler(wrap: Any) -> None:
    plain, scaled = two(), two()
    made = wrap(torch.optim.SGD(plain, lr=0.1)), wrap(torch.optim.SGD(scaled, lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        for params in (plain, scaled):
            gradients(params, step)
        for p in scaled:
            assert p.grad is not None
            p.grad *= 1024.0
        made[0].step()
        scaler.scale(torch.ones(()))  # tells it the device
        scaler.step(made[1])
        scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(plain, scaled, strict=True))
    assert made[1].param_groups is made[1].optimizer.param_groups


def test_named_parameters_keep_their_names() -> None:
    weight = param([1.0])
    optimizer = ClipUpdates(torch.optim.SGD([("top.weight", weight)], lr=0.1))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["top.weight"]
    optimizer.param_groups = optimizer.param_groups[:]  # some tools set them
    assert optimizer.optimizer.param_groups is optimizer.param_groups


def test_zero_grad_and_parameters_without_gradients_or_elements() -> None:
    weight, empty = param([1.0]), param(torch.zeros(0, 3))
    for granularity in ("tensor", "row"):
        optimizer = ClipUpdates(torch.optim.SGD([weight, empty], lr=0.1), granularity=granularity)
        optimizer.step()
        assert weight == 1
        empty.grad = torch.zeros(0, 3)
        optimizer.step()
        assert optimizer.state[empty]["clip_factor"] == 1
        optimizer.zero_grad()
        assert empty.grad is None


@pytest.fixture
def mesh() -> Iterator[Any]:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch has no gloo here")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("granularity", ["tensor", "row", "unit"])
def test_takes_sharded_parameters(mesh: Any, granularity: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    def sharded(x: Tensor, dim: int) -> Any:
        return distribute_tensor(x, mesh, [Shard(dim)])

    plain, starts = two(), two()
    shards = [nn.Parameter(sharded(p.detach(), p.dim() - 1)) for p in starts]
    made = [
        ClipGradients(ClipUpdates(BASES["sgd"](params), granularity=granularity), AGC(0.1))
        for params in (plain, shards)
    ]
    for step in range(4):
        gradients(plain, step, scale=10.0)
        for p, q in zip(plain, shards, strict=True):
            assert p.grad is not None
            if step == 2:
                p.grad.view(-1)[0] = torch.nan
            q.grad = sharded(p.grad, p.dim() - 1)
        for optimizer in made:
            optimizer.step()
    for p, q in zip(plain, shards, strict=True):
        torch.testing.assert_close(q.full_tensor(), p.detach())
        assert torch.equal(made[0].state[p]["grad_factor"], made[1].state[q]["grad_factor"])
        assert int(made[1].state[q]["grad_bad_steps"]) == 1
