"""Accumulators over months, states that come from torch's optimizers and go back, and advice on thresholds."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from steadyrank.errors import CheckpointError, ConfigError
from steadyrank.optim import (
    PRESETS,
    ClipGradients,
    ClippyAdagrad,
    ClippyAdam,
    ClippyAdamW,
    ClipUpdates,
    ClipValue,
    Frozen,
    Lamb,
    LambAdagrad,
    RowWiseAdagrad,
    StableAdamW,
    advice,
    find_frozen,
    read_binding,
    repair_frozen,
    warm_start,
)
from steadyrank.testing import TinyProblem

# Warm starts and frozen coordinates


def trained(make: Any, **options: Any) -> tuple[TinyProblem, Any]:
    problem = TinyProblem()
    optimizer = make(problem.named_parameters(), lr=0.1, **options)
    for step in range(4):
        problem.backward(step)
        optimizer.step()
    return problem, optimizer


@pytest.mark.parametrize("make", [ClippyAdagrad, RowWiseAdagrad, torch.optim.Adagrad])
def test_a_warm_start_keeps_resets_or_fades_adagrad(make: Any) -> None:
    problem, optimizer = trained(make, initial_accumulator_value=0.1)
    state = optimizer.state[problem.table]
    before = state["sum"].clone()
    warm_start(optimizer, "keep")
    assert torch.equal(state["sum"], before)
    warm_start(optimizer, "decay", 0.25)
    torch.testing.assert_close(state["sum"], 0.1 + 0.25 * (before - 0.1))
    warm_start(optimizer, "reset")
    assert torch.equal(state["sum"], torch.full_like(before, 0.1))
    assert state["step"] == 4


def test_a_warm_start_resets_adam_to_what_a_fresh_one_does() -> None:
    problem, optimizer = trained(ClippyAdam)
    warm_start(optimizer, "decay")
    assert optimizer.state[problem.table]["step"] == 4
    warm_start(optimizer, "reset")
    other = copy.deepcopy(problem)
    fresh = ClippyAdam(other.named_parameters(), lr=0.1)
    for p, o in ((problem, optimizer), (other, fresh)):
        p.backward(9)
        o.step()
    assert torch.equal(problem.table, other.table)


def test_a_warm_start_refuses_what_it_does_not_know() -> None:
    _, optimizer = trained(ClippyAdagrad)
    with pytest.raises(ConfigError, match=r"no way of warm starting 'restart'; did you mean 'reset'\?"):
        warm_start(optimizer, "restart")
    with pytest.raises(ConfigError, match=r"factor: expected a share in \[0, 1\], came 2"):
        warm_start(optimizer, "decay", 2.0)


@pytest.mark.parametrize("make", [ClippyAdagrad, torch.optim.Adagrad, ClippyAdam, torch.optim.Adam])
def test_frozen_coordinates_are_found_counted_and_repaired(make: Any) -> None:
    problem, optimizer = trained(make)
    assert find_frozen(optimizer) == []
    key = "sum" if "Adagrad" in make.__name__ else "exp_avg_sq"
    total = optimizer.state[problem.table][key]
    total[0, 0], total[1, 1], total[2, 2] = math.inf, math.nan, 1e15
    optimizer.state[problem.bias][key].fill_(math.inf)
    expected = [Frozen("table", 3, 48), Frozen("bias", 2, 2)]
    assert find_frozen(optimizer) == expected
    assert find_frozen(optimizer, above=1e20)[0].frozen == 2
    healthy = total[3:].clone()
    assert repair_frozen(optimizer) == expected
    assert torch.equal(total[3:], healthy)
    known = total[torch.isfinite(total)].clone()
    assert total[0, 0] == total[1, 1] == total[2, 2]
    assert known.amin() <= total[0, 0] <= known.amax()
    assert torch.equal(optimizer.state[problem.bias][key], torch.full((2,), 0.1 if make is ClippyAdagrad else 0.0))
    assert find_frozen(optimizer) == []


def test_a_frozen_coordinate_moves_again_after_the_repair() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = ClippyAdagrad([weight], lr=0.1)
    for size in (1.0, 1.3e19, 1.0):
        weight.grad = torch.tensor([size, 1.0, 1.0, 1.0])
        optimizer.step()
    held = weight.detach().clone()
    weight.grad = torch.ones(4)
    optimizer.step()
    assert weight[0] == held[0]
    assert [each.frozen for each in repair_frozen(optimizer)] == [1]
    optimizer.step()
    assert (held[0] - weight[0]).item() == pytest.approx((held[1] - weight[1]).item() / 2, rel=0.1)


# States from torch's optimizers, and back


@pytest.mark.parametrize(
    ("ours", "theirs", "key"),
    [
        (ClippyAdagrad, torch.optim.Adagrad, "sum"),
        (ClippyAdam, torch.optim.Adam, "exp_avg"),
        (ClippyAdamW, torch.optim.AdamW, "exp_avg_sq"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_torchs_optimizer_loads_and_ours_loads_there(
    ours: Any, theirs: Any, key: str, dtype: torch.dtype
) -> None:
    problem = TinyProblem(dtype)
    before = theirs(problem.named_parameters(), lr=0.05)
    for step in range(3):
        problem.backward(step)
        before.step()
    eps = before.param_groups[0]["eps"]
    moved = ours(problem.named_parameters(), lr=0.9, absolute_threshold=0.02, eps=1e-7)
    moved.load_state_dict(before.state_dict())
    group, state = moved.param_groups[0], moved.state[problem.table]
    assert (group["lr"], group["absolute_threshold"]) == (0.05, 0.02)
    # Adagrad's eps stands elsewhere there, Adam's is the same thing.
    assert group["eps"] == (1e-7 if ours is ClippyAdagrad else eps)
    assert (state["step"], state["bad_steps"], state["clip_factor"]) == (3, 0, 1)
    torch.testing.assert_close(state[key], before.state[problem.table][key].float(), atol=0, rtol=0)
    assert state[key].dtype == torch.float32
    problem.backward(3)
    moved.step()
    assert state["step"] == 4

    back = theirs(problem.named_parameters(), lr=0.5)
    back.load_state_dict(moved.state_dict())
    assert back.param_groups[0]["lr"] == 0.05
    torch.testing.assert_close(back.state[problem.table][key].float(), state[key], atol=0, rtol=2**-8)
    held = problem.table.detach().clone()
    problem.backward(4)
    back.step()
    assert not torch.equal(problem.table, held)


def test_going_on_from_torchs_adam_is_going_on_with_it() -> None:
    problems = [TinyProblem(torch.float64) for _ in range(2)]
    made: list[Any] = [torch.optim.Adam(p.named_parameters(), lr=0.01) for p in problems]
    for step in range(8):
        for problem, optimizer in zip(problems, made, strict=True):
            problem.backward(step)
            optimizer.step()
        if step == 3:
            free = ClippyAdam(problems[1].named_parameters(), absolute_threshold=math.inf)
            free.load_state_dict(made[1].state_dict())
            made[1] = free
    torch.testing.assert_close(problems[0].table, problems[1].table, atol=1e-12, rtol=0)


def test_a_state_of_another_model_or_optimizer_is_refused_by_name() -> None:
    _, other = trained(torch.optim.Adam)
    fresh = ClippyAdagrad(TinyProblem().named_parameters())
    with pytest.raises(CheckpointError, match="parameter 'table' has the state of another optimizer: expected 'sum'"):
        fresh.load_state_dict(other.state_dict())
    wide = nn.Linear(4, 3)
    optimizer = ClippyAdagrad(wide.named_parameters())
    wide(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    narrow = ClippyAdagrad(nn.Linear(2, 3).named_parameters())
    message = r"parameter 'weight' is of another model: expected 'sum' of shape \(3, 2\), came \(3, 4\)"
    with pytest.raises(CheckpointError, match=message):
        narrow.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        fresh.load_state_dict(optimizer.state_dict())


def test_a_state_that_is_refused_leaves_the_optimizer_as_it_was() -> None:
    weights = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))]
    optimizer = ClippyAdagrad(weights, lr=0.5)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    wrong["param_groups"][0]["lr"] = 9.0
    wrong["state"][0]["sum"] += 1
    wrong["state"][1]["sum"] = torch.ones(7)
    with pytest.raises(CheckpointError, match="is of another model"):
        optimizer.load_state_dict(wrong)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][i]["sum"], before["state"][i]["sum"]) for i in (0, 1))
    optimizer.step()
    assert all(weight.isfinite().all() for weight in weights)


@pytest.mark.parametrize("make", [ClippyAdagrad, ClippyAdam, RowWiseAdagrad, LambAdagrad, Lamb, StableAdamW])
@pytest.mark.parametrize("saved", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float64, torch.float32, torch.bfloat16])
def test_a_state_loads_in_another_precision(make: Any, saved: torch.dtype, loaded: torch.dtype) -> None:
    before, after = TinyProblem(saved), TinyProblem(loaded)
    first, second = make(before.named_parameters(), lr=0.1), make(after.named_parameters(), lr=0.1)
    before.backward(0)
    first.step()
    second.load_state_dict(first.state_dict())
    after.backward(1)
    second.step()
    assert all(p.isfinite().all() for p in after.parameters())
    floats = {v.dtype for v in second.state[after.table].values() if v.is_floating_point() and v.dim()}
    assert floats == {torch.promote_types(loaded, torch.float32)}


def test_the_decay_of_adamw_is_taken_over_and_that_of_adam_is_not() -> None:
    for theirs, expected in ((torch.optim.AdamW, 0.3), (torch.optim.Adam, 0.05)):
        before = theirs([nn.Parameter(torch.ones(2))], weight_decay=0.3)
        after = ClippyAdamW([nn.Parameter(torch.ones(2))], weight_decay=0.05)
        after.load_state_dict(before.state_dict())
        assert after.param_groups[0]["weight_decay"] == expected


def test_helpers_see_through_wrappers() -> None:
    weight = nn.Parameter(torch.ones(5))
    inner = torch.optim.Adagrad([("w", weight)], lr=0.5, initial_accumulator_value=0.1)
    optimizer = ClipGradients(ClipUpdates(inner), ClipValue(100.0))
    weight.grad = torch.ones(5)
    optimizer.step()
    assert find_frozen(optimizer, above=0.0) == [Frozen("w", 5, 5)]
    warm_start(optimizer, "reset")
    assert torch.equal(inner.state[weight]["sum"], torch.full((5,), 0.1))
    told = ClippyAdagrad([("w", weight)], lr=9.0, telemetry=True)
    wrapped = ClipGradients(told, ClipValue(100.0))
    wrapped.step()
    assert [binding.name for binding in read_binding(wrapped)] == ["w"]
    slow = ClipGradients(ClipUpdates(torch.optim.Adam([weight], lr=1e-4)), ClipValue(1.0))
    assert [found.kind for found in advice.check(slow)] == ["inert"]
    slow.step()
    assert [found.kind for found in advice.check(slow)] == ["inert"]

    class Mine(ClippyAdagrad):
        """A subclass of a user's own."""

    assert [found.kind for found in advice.check(Mine([weight], lr=0.01))] == ["inert"]


def test_wrapping_anew_takes_the_new_options() -> None:
    inner = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    ClipUpdates(inner, absolute_threshold=0.01)
    assert ClipUpdates(inner, absolute_threshold=0.5).param_groups[0]["absolute_threshold"] == 0.5


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", None),
        ("lr", "0.1"),
        ("eps", None),
        ("absolute_threshold", None),
        ("variable_relative_threshold", "0.5"),
        ("weight_decay", "0.1"),
        ("quantile", None),
        ("half_life", "3"),
        ("calibration_steps", None),
        ("granularity", None),
        ("accumulator", 3),
    ],
)
def test_an_option_of_the_wrong_type_is_named(option: str, value: Any) -> None:
    what = {"granularity": "no granularity", "accumulator": "no accumulator form"}.get(option, f"{option}: expected")
    with pytest.raises(ConfigError, match=what):
        ClippyAdagrad([{"params": [nn.Parameter(torch.ones(1))], option: value}])


def test_betas_of_the_wrong_type_are_named() -> None:
    for wrong in (None, 0.9, "ab", (0.9,)):
        with pytest.raises(ConfigError, match="betas: expected two numbers"):
            ClippyAdam([{"params": [nn.Parameter(torch.ones(1))], "betas": wrong}])


# Advice


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False), nn.Linear(64, 1, bias=False))


@pytest.mark.parametrize(
    ("make", "options", "kind"),
    [
        (ClippyAdagrad, {"lr": 0.01}, "inert"),
        (ClippyAdagrad, {"lr": 0.011}, None),
        (ClippyAdagrad, {"lr": 0.1}, None),
        (ClippyAdagrad, {"lr": 0.01, "accumulator": "delayed"}, None),
        (ClippyAdagrad, {"lr": 0.01, "weight_decay": 60.0}, None),
        (ClippyAdagrad, PRESETS["authors_code"], "strangling"),
        (ClippyAdagrad, {**PRESETS["authors_code"], "quantile": 0.1}, None),
        (ClippyAdagrad, {"lr": 10.0}, "out_of_reach"),
        (ClippyAdam, {"lr": 3e-3, **PRESETS["paper"]}, "inert"),
        (ClippyAdam, {"lr": 3.3e-3, **PRESETS["paper"]}, None),
        (ClippyAdam, {"lr": 0.032}, None),
        (ClippyAdam, {"lr": 0.5}, "out_of_reach"),
        (ClippyAdam, {"lr": 0.5, "calibration_steps": 9}, None),
        (torch.optim.Adam, {"lr": 0.5}, None),
    ],
)
def test_advice_on_an_untrained_model(make: Any, options: dict[str, Any], kind: str | None) -> None:
    model = layers()
    found = advice.check(make(model.parameters(), **options), model)
    assert [each.kind for each in found] == ([kind] if kind else [])


def test_what_is_called_inert_never_clips_and_what_is_not_does() -> None:
    for rate, clips in ((0.01, False), (0.02, True)):
        weight = nn.Parameter(torch.zeros(3))
        optimizer = ClippyAdagrad([weight], lr=rate)
        weight.grad = torch.tensor([1e9, 1.0, 0.0])
        optimizer.step()
        assert bool(optimizer.state[weight]["clip_factor"] < 1) is clips
        assert bool(advice.check(optimizer)) is not clips
    spiked, rate = nn.Parameter(torch.zeros(1)), 0.0099 / 3.1623
    adam = ClippyAdam([spiked], lr=rate, **PRESETS["paper"])
    assert [each.kind for each in advice.check(adam)] == ["inert"]
    largest = 0.0
    for step in range(3000):  # a quiet stretch, then the largest step that Adam can take
        held = spiked.item()
        spiked.grad = torch.full((1,), 1e9 if step == 2999 else 0.0)
        adam.step()
        largest = max(largest, abs(spiked.item() - held))
    assert adam.state[spiked]["clip_factor"] == 1
    assert 0.9 * 0.01 < largest <= 0.01


def test_messages_name_the_numbers_and_what_to_set() -> None:
    model = layers()
    message = advice.check(ClippyAdagrad(model.parameters(), **PRESETS["authors_code"]), model)[0].message
    assert message.startswith("strangling: the median tensor's rate would be cut ")
    assert ".weight' " in message
    assert "set absolute_threshold to about 0.0001" in message
    numbers = advice.check(ClippyAdam(model.parameters(), lr=0.5), model)[0]
    assert numbers.numbers["typical_ratio"] > 30
    assert "set lr to " in numbers.message


def test_advice_on_a_trained_optimizer_reads_what_it_did() -> None:
    problem, optimizer = trained(ClippyAdagrad)
    assert advice.check(optimizer) == []
    for state in optimizer.state.values():
        state["clip_factor"].fill_(1e-3)
    [found] = advice.check(optimizer, problem)
    assert found.kind == "strangling"
    assert found.numbers["median_cut"] == pytest.approx(1000)
