"""Gradient rules in use: refused and skipped steps, states that are saved and loaded, options."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steadyrank.errors import CheckpointError, ConfigError
from steadyrank.optim import ClippyAdagrad
from steadyrank.optim.rules import AGC, ClipGlobalNorm, ClipTensorNorm, ClipValue, CowClip, Rule
from steadyrank.optim.spikes import AdaGC, SkipSpikes, SpikeClip, ZClip
from steadyrank.optim.wrap import ClipGradients
from steadyrank.testing import check_optimizer, forbid_host_sync

from .test_clippy import param, rows_gradient
from .test_optim_rules import RULES, by_rule, grads_of, sgd

JOINT = tuple(rule for rule in RULES if rule.joint)


@pytest.fixture(autouse=True)
def _sparse_checks_chosen() -> Any:
    with torch.sparse.check_sparse_tensor_invariants(enable=True):
        yield


# --- Refused and skipped steps ---


def saved(optimizer: Any) -> Any:
    return copy.deepcopy(optimizer.state_dict())


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@by_rule(RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e17])
def test_a_bad_gradient_leaves_weights_and_both_states_as_they_were(rule: Rule, bad: float) -> None:
    params = grads_of([(3, 2), (2,)], 1.0)
    adam = torch.optim.Adam(params, lr=0.1)
    optimizer = ClipGradients(adam, rule)
    for _ in range(2):
        optimizer.step()
    before, weights = saved(optimizer), [p.detach().clone() for p in params]
    assert params[0].grad is not None
    params[0].grad[1, 0] = bad
    optimizer.step()
    after = saved(optimizer)
    assert torch.equal(params[0], weights[0])
    assert torch.equal(params[0].grad, torch.zeros(3, 2))
    assert torch.equal(params[1], weights[1]) == rule.joint
    assert [int(optimizer.state[p]["grad_bad_steps"]) for p in params] == [1, 0]
    assert_same(after["rule"]["state"], before["rule"]["state"])
    for i in (0, 1) if rule.joint else (0,):
        for key in before["state"][i].keys() - {"step", "grad_factor", "grad_bad_steps"}:
            assert_same(after["state"][i][key], before["state"][i][key])
        assert after["state"][i]["grad_factor"] == 0
    params[0].grad = torch.ones(3, 2)
    optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert optimizer.state[params[0]]["grad_factor"] > 0


def test_a_bad_sparse_gradient_leaves_rows_and_states_as_they_were() -> None:
    table = param(torch.ones(4, 2))
    optimizer = ClipGradients(torch.optim.SparseAdam([table], lr=0.1), SpikeClip())
    for bad in (1.0, torch.nan):
        before, weight = saved(optimizer), table.detach().clone()
        table.grad = rows_gradient([1, 3], torch.tensor([[1.0, 1.0], [1.0, bad]]), table)
        optimizer.step()
    assert torch.equal(table, weight)
    after = saved(optimizer)
    for key in ("exp_avg", "exp_avg_sq", "grad_square_mean", "grad_square_count"):
        assert_same(after["state"][0][key], before["state"][0][key])


def test_without_guard_momentum_goes_on() -> None:
    weight = param([1.0])
    optimizer = ClipGradients(torch.optim.SGD([weight], lr=0.1, momentum=0.5), ClipValue(1.0), guard=False)
    for value in (1.0, torch.nan):
        weight.grad = torch.tensor([value])
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([1 - 0.1 - 0.05]))
    assert int(optimizer.state[weight]["grad_bad_steps"]) == 1


def skipping(sigmas: float = 4.0) -> tuple[nn.Parameter, ClipGradients]:
    weight = param(torch.ones(2), torch.float64)
    return weight, ClipGradients(torch.optim.Adam([weight], lr=0.1), SkipSpikes(sigmas=sigmas, window=20))


def test_a_spike_is_skipped_and_leaves_weights_and_moments() -> None:
    weight, optimizer = skipping()
    draw = torch.Generator().manual_seed(11)
    for step in range(30):
        before, held = saved(optimizer), weight.detach().clone()
        weight.grad = torch.rand(2, generator=draw).double() + 0.5
        if step == 25:
            weight.grad *= 100
        optimizer.step()
        assert torch.equal(weight, held) == (step == 25)
        if step == 25:
            after = saved(optimizer)
            for key in ("exp_avg", "exp_avg_sq"):
                assert_same(after["state"][0][key], before["state"][0][key])
            assert after["state"][0]["grad_factor"] == 0
    assert int(optimizer.shared["skipped"]) == 1
    assert int(optimizer.state[weight]["grad_bad_steps"]) == 0


def test_a_lasting_rise_is_not_skipped_for_ever_and_a_flat_history_never() -> None:
    weight, optimizer = skipping()
    for step in range(60):
        weight.grad = torch.full((2,), 1.1 if step < 30 else 50.0, dtype=torch.float64)
        optimizer.step()
        if step == 29:
            assert int(optimizer.shared["skipped"]) == 0
    assert 1 <= int(optimizer.shared["skipped"]) < 5


def test_composes_with_an_optimizer_that_guards_itself() -> None:
    params, twins = grads_of([(3, 2)], 5.0), grads_of([(3, 2)], 5.0)
    optimizer = ClipGradients(ClippyAdagrad(params, lr=0.5), AGC(0.1))
    plain = ClippyAdagrad(twins, lr=0.5)
    for _ in range(3):
        optimizer.step()
        assert twins[0].grad is not None
        limit = 0.1 * twins[0].detach().norm(dim=1, keepdim=True)
        twins[0].grad /= (twins[0].grad.norm(dim=1, keepdim=True) / limit).clamp(min=1)
        plain.step()
        torch.testing.assert_close(params[0], twins[0], rtol=0, atol=1e-6)
    state = optimizer.state_dict()["state"][0]
    assert {"sum", "step", "bad_steps", "clip_factor", "grad_factor", "grad_bad_steps"} == state.keys()
    assert state["grad_factor"] < 1
    assert params[0].grad is not None
    params[0].grad[0, 0] = torch.nan
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], before)
    assert int(optimizer.state[params[0]]["grad_bad_steps"]) == 1


# --- What users of torch rely on ---


@by_rule(RULES)
def test_holds_every_promise_of_an_optimizer(rule: Rule) -> None:
    joint = rule.joint  # then a bad gradient stops the other parameters too, which the check does not expect
    check_optimizer(lambda params: sgd(params, rule), guarded=not joint, sparse=True)
    check_optimizer(lambda params: ClipGradients(torch.optim.Adam(params, lr=0.1), rule), guarded=False)


@by_rule(JOINT)
def test_joint_rules_need_nothing_on_the_host(rule: Rule) -> None:
    params = grads_of([(3, 2), (2,), (0, 2)], 1.0)
    optimizer = sgd(params, rule)
    with forbid_host_sync():
        for _ in range(6):
            optimizer.step()
    assert all(p.isfinite().all() for p in params)


def test_a_saved_rule_overrules_the_options_and_another_is_refused() -> None:
    params = grads_of([(3,)], 1.0)
    optimizer = sgd(params, ZClip(warmup=7))
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = sgd(grads_of([(3,)], 1.0), ZClip())
    fresh.load_state_dict(state)
    assert fresh.rule == ZClip(warmup=7)
    assert_same(fresh.shared, optimizer.shared)
    assert fresh.shared["mean"] is not state["rule"]["state"]["mean"]
    other = sgd(grads_of([(3,)], 1.0), AGC())
    with pytest.raises(CheckpointError, match="saved with the rule ZClip; expected AGC"):
        other.load_state_dict(state)
    state["rule"]["options"]["warmdown"] = 3
    with pytest.raises(CheckpointError, match=r"no option of ZClip 'warmdown'; did you mean 'warmup'\?"):
        fresh.load_state_dict(state)


def test_the_state_of_a_plain_optimizer_loads_and_the_other_way_round() -> None:
    params, plain = grads_of([(3,)], 1.0), grads_of([(3,)], 1.0)
    optimizer = ClipGradients(torch.optim.Adam(params, lr=0.1), ZClip())
    optimizer.step()
    adam = torch.optim.Adam(plain, lr=0.5)
    adam.load_state_dict(optimizer.state_dict())
    assert adam.param_groups[0]["lr"] == 0.1
    assert_same(adam.state[plain[0]]["exp_avg"], optimizer.optimizer.state[params[0]]["exp_avg"])
    saved_plain = torch.optim.Adam(plain, lr=0.5).state_dict()
    optimizer.load_state_dict(saved_plain)
    assert optimizer.shared == {}
    assert optimizer.rule == ZClip()
    assert not optimizer.state[params[0]]
    optimizer.step()
    assert int(optimizer.shared["count"]) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClipValue(0.0), "limit: expected a number above 0, came 0.0"),
        (lambda: ClipGlobalNorm(-1.0), "max_norm: expected"),
        (lambda: ClipTensorNorm(float("nan")), "max_norm: expected"),
        (lambda: AGC(clipping=-0.1), "clipping: expected a finite number, 0 or more"),
        (lambda: AGC(floor=float("inf")), "floor: expected"),
        (lambda: CowClip(ratio=-1.0), "ratio: expected"),
        (lambda: AdaGC(decay=1.0), r"decay: expected a number in \[0, 1\), came 1.0"),
        (lambda: AdaGC(warmup=-1), "warmup: expected a whole number, 0 or more, came -1"),
        (lambda: AdaGC(relative=0.0), "relative: expected"),
        (lambda: ZClip(warmup=0), "warmup: expected a whole number, 1 or more, came 0"),
        (lambda: ZClip(threshold=0.0), "threshold: expected"),
        (lambda: SpikeClip(threshold=0.0), "threshold: expected"),
        (lambda: SkipSpikes(window=1), "window: expected a whole number, 2 or more"),
        (lambda: SkipSpikes(sigmas=0.0), "sigmas: expected"),
    ],
)
def test_refuses_options_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_an_infinite_limit_changes_no_bit() -> None:
    for rule in (ClipGlobalNorm(float("inf")), ClipValue(float("inf")), ClipTensorNorm(float("inf"))):
        params = grads_of([(4, 3), (2,), (0,), ()], 5.0)
        before = [p.grad.clone() for p in params if p.grad is not None]
        optimizer = sgd(params, rule)
        optimizer.step()
        for p, g in zip(params, before, strict=True):
            assert isinstance(p.grad, Tensor)
            assert torch.equal(p.grad, g)
            assert optimizer.state[p]["grad_factor"] == 1
