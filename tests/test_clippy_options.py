"""The options of Clippy beyond the paper: granularity, quantile, calibration, fading accumulators, telemetry."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from steadyrank.errors import ConfigError
from steadyrank.optim import PRESETS, ClippyAdagrad, ClippyAdam, ClippyAdamW, read_binding
from steadyrank.testing import check_optimizer, find_factor_twin

from .test_clippy import FORMS, param, rows_gradient

INERT = {"variable_relative_threshold": 0.0, "absolute_threshold": math.inf}


def a_step(optimizer: Any, *grads: Tensor) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.to(p.dtype)
    optimizer.step()


# Reductions to known optimizers


def test_adam_without_a_bound_is_torchs_adam() -> None:
    draw = torch.Generator().manual_seed(4)
    ours, theirs = (param(torch.linspace(-1, 1, 18).view(6, 3), torch.float64) for _ in range(2))
    made = ClippyAdam([ours], lr=0.03, **INERT), torch.optim.Adam([theirs], lr=0.03)
    for _ in range(20):
        grad = torch.randn(6, 3, generator=draw)
        for optimizer in made:
            a_step(optimizer, grad)
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(made[0].state[ours][key], made[1].state[theirs][key], atol=0, rtol=1e-12)


def test_adamw_without_a_bound_is_torchs_adamw() -> None:
    # torch shrinks the weight before it takes Adam's step, we do both at once: the same numbers.
    draw = torch.Generator().manual_seed(4)
    ours, theirs = (param(torch.linspace(-1, 1, 18).view(6, 3), torch.float64) for _ in range(2))
    made = ClippyAdamW([ours], lr=0.03, **INERT), torch.optim.AdamW([theirs], lr=0.03)
    assert made[0].param_groups[0]["weight_decay"] == made[1].param_groups[0]["weight_decay"] == 0.01
    for _ in range(20):
        grad = torch.randn(6, 3, generator=draw)
        for optimizer in made:
            a_step(optimizer, grad)
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_on_rows_is_torchs_sparse_adam(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(4)
    ours, theirs = (param(torch.linspace(-1, 1, 60).view(20, 3), dtype) for _ in range(2))
    # The two put eps at different places of the bias correction; a negligible one makes them comparable.
    made = ClippyAdam([ours], lr=0.03, eps=1e-30, **INERT), torch.optim.SparseAdam([theirs], lr=0.03, eps=1e-30)
    for _ in range(12):
        rows, values = torch.randint(0, 9, (5,), generator=draw).tolist(), torch.randn(5, 3, generator=draw).to(dtype)
        for p, optimizer in zip((ours, theirs), made, strict=True):
            p.grad = rows_gradient(rows, values, p)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-13 if dtype == torch.float64 else 2e-6, rtol=0)


# The paper's claims about its bound


def test_weight_decay_is_inside_the_bound() -> None:
    weight = param([1.0, -2.0], torch.float64)
    optimizer = ClippyAdagrad([weight], lr=1.0, weight_decay=10.0)
    a_step(optimizer, torch.zeros(2))
    torch.testing.assert_close(weight.detach(), torch.tensor([0.495, -0.99]).double(), atol=1e-7, rtol=0)
    # One factor for both: 1.01 / 20, from the second coordinate; the first alone would have moved by 0.51 of its 10.


def test_decay_is_decoupled_from_the_accumulator() -> None:
    weight = param([1.0], torch.float64)
    optimizer = ClippyAdagrad([weight], lr=0.001, weight_decay=0.1)
    a_step(optimizer, torch.zeros(1))
    assert weight.item() == pytest.approx(1 - 0.001 * 0.1, abs=1e-15)
    assert optimizer.state[weight]["sum"].item() == 0.1


def test_a_clipped_spike_does_not_live_on_in_moments_that_take_in_what_was_clipped() -> None:
    plain, clipped = (param([0.5], torch.float64) for _ in range(2))
    made = ClippyAdam([plain], lr=0.01), ClippyAdam([clipped], lr=0.01, clip_moments=True)
    for optimizer in made:
        for size in (0.1, 0.1, 1e4):
            a_step(optimizer, torch.tensor([size]))
    sigma = made[1].state[clipped]["clip_factor"].item()
    assert made[0].state[plain]["clip_factor"].item() == pytest.approx(sigma)
    ratio = made[1].state[clipped]["exp_avg_sq"] / made[0].state[plain]["exp_avg_sq"]
    assert ratio.item() == pytest.approx(sigma**2, rel=1e-6)


# Granularity


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("make", [ClippyAdagrad, ClippyAdam])
def test_a_bad_row_does_not_throttle_the_others(make: Any, sparse: bool) -> None:
    table, whole = (param(torch.ones(6, 4), torch.float64) for _ in range(2))
    with torch.no_grad():
        for each in (table, whole):
            each[2] = 1e-6  # nearly no bound of its own but the absolute one
    values = torch.ones(3, 4).double()
    for each, granularity in ((table, "row"), (whole, "tensor")):
        optimizer = make([each], lr=0.1, absolute_threshold=1e-4, granularity=granularity)
        grad = rows_gradient([1, 2, 3], values, each)
        each.grad = grad if sparse else grad.to_dense()
        optimizer.step()
        least = optimizer.state[each]["clip_factor"]
        assert least < 2e-3  # the smallest of the factors, in both cases
    assert torch.all(whole[1] > 0.999)
    assert torch.all(table[[1, 3]] < 0.96)
    assert torch.all((table[2] - 1e-6).abs() <= 1.01e-4)
    assert torch.equal(table[[0, 4, 5]], torch.ones(3, 4).double())


@pytest.mark.parametrize("form", FORMS)
def test_each_row_has_the_factor_of_a_tensor_of_its_own(form: str) -> None:
    draw = torch.Generator().manual_seed(5)
    table = param(torch.randn(7, 3, generator=draw), torch.float64)
    rows = [param(row.detach().clone(), torch.float64) for row in table]
    made = [ClippyAdagrad(p, lr=0.4, accumulator=form, granularity=g) for p, g in (([table], "row"), (rows, "tensor"))]
    for _ in range(5):
        grad = torch.randn(7, 3, generator=draw) * 3
        a_step(made[0], grad)
        a_step(made[1], *grad)
        torch.testing.assert_close(table.detach(), torch.stack([r.detach() for r in rows]), atol=1e-14, rtol=0)
        least = min(made[1].state[row]["clip_factor"] for row in rows)
        torch.testing.assert_close(made[0].state[table]["clip_factor"], least, atol=0, rtol=1e-12)


def test_output_units_have_a_factor_each_and_a_bias_one_as_a_whole() -> None:
    weight, bias, scale = param(torch.ones(3, 2), torch.float64), param(torch.zeros(3), torch.float64), param(1.0)
    optimizer = ClippyAdagrad([weight, bias, scale], lr=0.1, granularity="unit")
    grads = torch.tensor([[9.0, 9.0], [0.125, 0.125], [0.0, 0.0]]), torch.tensor([9.0, 0.125, 0.0]), torch.tensor(0.0)
    a_step(optimizer, *grads)
    by_tensor = param(torch.zeros(3), torch.float64)
    a_step(ClippyAdagrad([by_tensor], lr=0.1), grads[1])
    assert torch.equal(bias, by_tensor)
    unclipped = 0.1 * 0.125 / math.sqrt(0.1 + 0.125**2 + 1e-7)
    assert (1 - weight[1]).tolist() == pytest.approx([unclipped] * 2, rel=1e-9)
    by_row = param(torch.zeros(3), torch.float64)
    a_step(ClippyAdagrad([by_row], lr=0.1, granularity="row"), grads[1])
    assert not torch.equal(by_row, by_tensor)


# A quantile in place of the minimum


@settings(deadline=None, max_examples=50)
@given(
    ratios=st.lists(st.floats(0, 1e4), min_size=1, max_size=30),
    share=st.floats(0, 0.99),
    granularity=st.sampled_from(["tensor", "row", "unit"]),
)
def test_the_factor_overlooks_a_share_and_yet_every_bound_holds(
    ratios: list[float], share: float, granularity: str
) -> None:
    weight = param(torch.zeros(1, len(ratios)), torch.float64)
    limits = {"variable_relative_threshold": 0.0, "absolute_threshold": 0.01}
    # The delayed form with G + eps = 1 makes the step the gradient itself.
    optimizer = ClippyAdagrad(
        [weight], lr=1.0, accumulator="delayed", initial_accumulator_value=1.0, eps=0.0, quantile=share,
        granularity=granularity, **limits,
    )  # fmt: skip
    step = torch.tensor([ratios], dtype=torch.float64) * 0.01
    a_step(optimizer, step)
    kth = sorted(ratios, reverse=True)[math.floor(share * len(ratios))]
    sigma = min(1.0, 1.0 / kth) if kth > 0 else 1.0
    assert optimizer.state[weight]["clip_factor"].item() == pytest.approx(sigma, rel=1e-9)
    expected = torch.clamp(sigma * step, max=0.01)
    torch.testing.assert_close(-weight.detach(), expected, atol=1e-12, rtol=1e-9)


def test_a_quantile_does_not_shrink_with_width_where_the_minimum_does() -> None:
    found: dict[float, list[float]] = {0.0: [], 0.01: []}
    for width in (64, 1024):
        draw = torch.Generator().manual_seed(0)
        weight = torch.randn(width, width, generator=draw) / math.sqrt(width)
        for share, factors in found.items():
            p = param(weight)
            # Weights that shrink with width as He's rule has it, an absolute threshold that shrinks with them.
            optimizer = ClippyAdagrad([p], lr=0.1, quantile=share, absolute_threshold=0.02 / math.sqrt(width))
            a_step(optimizer, 0.1 * torch.randn(width, width, generator=draw))
            factors.append(optimizer.state[p]["clip_factor"].item() * math.sqrt(width))
    assert found[0.01][1] == pytest.approx(found[0.01][0], rel=0.1)
    assert found[0.0][1] < 0.95 * found[0.0][0]


# Calibrated bounds


def test_the_bound_is_scaled_to_what_the_healthy_stretch_needed() -> None:
    weight = param([0.2, -0.4, 0.0], torch.float64)
    optimizer = ClippyAdam([weight], lr=1e-3, calibration_steps=20, calibration_headroom=3.0)
    logs = []
    draw = torch.Generator().manual_seed(0)
    state: dict[str, Any] = {}
    for step in range(21):
        grad = torch.randn(3, generator=draw).double()
        twin, before = copy.deepcopy((weight, optimizer)), weight.detach().clone()
        a_step(optimizer, grad)
        state = optimizer.state[weight]
        if step < 20:  # the whole step by a twin without a bound
            free = param(before.clone(), torch.float64)
            adam = ClippyAdam([free], lr=1e-3, **INERT)
            adam.load_state_dict({**twin[1].state_dict(), "param_groups": adam.state_dict()["param_groups"]})
            a_step(adam, grad)
            bound = 0.1 * before.abs() + 0.001
            logs.append(math.log(((free.detach() - before).abs() / bound).amax()))
    assert state["pressure_steps"] == 20
    assert state["pressure_log_mean"].item() == pytest.approx(np.mean(logs), rel=1e-9)
    scale = 3.0 * math.exp(np.mean(logs))
    before = weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 10.0  # far too high: from here on the bound sets the step
    a_step(optimizer, torch.tensor([1.0, -1.0, 1.0]))
    moved = (weight.detach() - before).abs() / (scale * (0.1 * before.abs() + 0.001))
    assert moved.amax().item() == pytest.approx(1.0, rel=1e-6)


def test_one_spike_and_refused_steps_hardly_move_the_calibration() -> None:
    weights = [param(torch.linspace(-1, 1, 50)) for _ in range(2)]
    made = [ClippyAdagrad([w], lr=0.02, calibration_steps=100) for w in weights]
    draw = torch.Generator().manual_seed(0)
    for step in range(101):
        grad = torch.randn(50, generator=draw) * 1e-3
        a_step(made[0], grad)
        a_step(made[1], grad * (1e3 if step == 50 else 1))
        if step == 20:
            a_step(made[1], torch.full((50,), torch.nan))
    plain, spiked = (o.state[w]["pressure_log_mean"].item() for o, w in zip(made, weights, strict=True))
    assert spiked != plain
    assert abs(spiked - plain) < math.log(1.2)


# Accumulators that fade


def fading_twin(total: float, grads: list[float], start: float, keep: Any) -> float:
    for t, g in enumerate(grads, start=1):
        total = max(min(total, start), total * keep(t)) + g * g
    return total


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        ({"half_life": 3.0}, lambda t: 0.5 ** (1 / 3)),
        ({"decay_every": 4, "decay_factor": 0.25}, lambda t: 0.25 if t % 4 == 0 else 1.0),
    ],
)
@pytest.mark.parametrize("form", ["standard", "delayed"])
def test_the_accumulator_fades_to_its_start(options: dict[str, Any], keep: Any, form: str) -> None:
    weight = param([1.0], torch.float64)
    optimizer = ClippyAdagrad([weight], lr=0.01, accumulator=form, **options)
    grads = [3.0, 0.5, 0.0, 0.0, 2.0, *[0.0] * 30]
    for number, g in enumerate(grads, start=1):
        a_step(optimizer, torch.tensor([g]))
        if number == 3:
            a_step(optimizer, torch.tensor([math.nan]))  # refused: no time passes
        expected = fading_twin(0.1, grads[:number], 0.1, keep)
        assert optimizer.state[weight]["sum"].item() == pytest.approx(expected, rel=1e-12)
    assert optimizer.state[weight]["sum"].item() < 0.3


@pytest.mark.parametrize("options", [{"half_life": 3.0}, {"decay_every": 4, "decay_factor": 0.25}])
@pytest.mark.parametrize("form", FORMS)
def test_rows_fade_for_the_steps_in_which_they_rested(options: dict[str, Any], form: str) -> None:
    draw = torch.Generator().manual_seed(9)
    sparse, dense = (param(torch.linspace(-1, 1, 40).view(10, 4), torch.float64) for _ in range(2))
    made = [ClippyAdagrad([p], lr=0.3, accumulator=form, **options) for p in (sparse, dense)]
    for step in range(12):
        rows = torch.randint(0, 8, (3,), generator=draw)
        values = torch.randn(3, 4, generator=draw).double()
        if step == 5:
            values[0, 0] = math.inf
        sparse.grad = rows_gradient(rows.tolist(), values, sparse)
        dense.grad = torch.zeros_like(dense).index_add_(0, rows, values)
        for optimizer in made:
            optimizer.step()
        torch.testing.assert_close(sparse, dense, atol=1e-13, rtol=0)
    every = rows_gradient(list(range(10)), torch.zeros(10, 4).double(), sparse)
    sparse.grad, dense.grad = every, every.to_dense()
    for optimizer in made:
        optimizer.step()
    torch.testing.assert_close(made[0].state[sparse]["sum"], made[1].state[dense]["sum"], atol=0, rtol=1e-12)


# Telemetry


@pytest.mark.parametrize("path", [{}, {"fused": False}])
def test_what_binds_is_named(path: dict[str, Any]) -> None:
    table, layer, quiet = param(torch.ones(300, 8)), param(torch.ones(40, 50)), param(torch.ones(3))
    groups = [{"params": [("table", table)]}, {"params": [("layer", layer), ("quiet", quiet)]}]
    optimizer = ClippyAdagrad(groups, lr=1.0, telemetry=True, **path)
    assert read_binding(optimizer) == []
    values = torch.full((3, 8), 1e-3)
    values[1, 5] = 7.0
    table.grad = rows_gradient([250, 17, 99], values, table)
    layer.grad = torch.full((40, 50), 1e-3)
    layer.grad[31, 7], layer.grad[2, 2] = 2.0, 1.0
    quiet.grad = torch.full((3,), 1e-3)
    optimizer.step()
    first, second, third = read_binding(optimizer)
    assert (first.name, first.place) == ("table", (17, 5))
    assert first.bind_frac == pytest.approx(1 / 24)
    assert (second.name, second.place) == ("layer", (31, 7))
    assert second.bind_frac == pytest.approx(2 / 2000)
    assert (third.name, third.place, third.bind_frac, third.clip_factor) == ("quiet", None, 0.0, 1.0)


def test_telemetry_of_a_step_without_rows_is_of_that_step() -> None:
    for path in ({}, {"fused": False}, {"granularity": "row"}):
        table = param(torch.ones(5, 2))
        optimizer = ClippyAdagrad([("table", table)], lr=9.0, telemetry=True, **path)
        for rows in ([3], []):
            table.grad = rows_gradient(rows, torch.ones(len(rows), 2), table)
            optimizer.step()
        [binding] = read_binding(optimizer)
        assert (binding.clip_factor, binding.bind_frac, binding.place) == (1.0, 0.0, None)


def test_telemetry_costs_no_state_unless_it_is_asked_for() -> None:
    weight = param([1.0])
    optimizer = ClippyAdagrad([weight])
    a_step(optimizer, torch.ones(1))
    assert optimizer.state[weight].keys() == {"step", "bad_steps", "sum", "clip_factor"}


# Presets, and the promises


def test_presets_are_what_they_are_named_after() -> None:
    weight = param([1.0])
    assert ClippyAdagrad([weight]).defaults.items() >= PRESETS["paper"].items()
    assert ClippyAdam([weight]).defaults.items() >= PRESETS["adam"].items()
    authors = ClippyAdagrad([weight], **PRESETS["authors_code"]).param_groups[0]
    names = ("lr", "variable_relative_threshold", "absolute_threshold", "accumulator", "eps")
    assert [authors[name] for name in names] == [0.001, 0.1, 1e-7, "delayed", 1e-7]


@pytest.mark.parametrize(
    "make",
    [
        lambda params: ClippyAdam(params, lr=0.05),
        lambda params: ClippyAdamW(params, lr=0.05, clip_moments=True),
        lambda params: ClippyAdagrad(params, lr=0.3, granularity="row", quantile=0.1),
        lambda params: ClippyAdagrad(params, lr=0.3, granularity="unit", weight_decay=0.01, fused=False),
        lambda params: ClippyAdam(params, lr=0.05, calibration_steps=3, telemetry=True),
        lambda params: ClippyAdagrad(params, lr=0.3, half_life=5.0, telemetry=True),
        lambda params: ClippyAdagrad(params, lr=0.3, foreach=True, fused=False),
    ],
)
def test_every_option_holds_every_promise(make: Any) -> None:
    check_optimizer(make, sparse=True)


def test_thresholds_may_differ_by_group() -> None:
    one, two = param([1.0]), param([1.0])
    optimizer = ClippyAdagrad([{"params": [one]}, {"params": [two], "absolute_threshold": 0.001}], lr=1.0,
                              variable_relative_threshold=0.0)  # fmt: skip
    a_step(optimizer, torch.ones(1), torch.ones(1))
    assert [1 - one.item(), 1 - two.item()] == pytest.approx([0.01, 0.001], rel=1e-4)


@pytest.mark.parametrize(
    ("make", "wrong", "message"),
    [
        (ClippyAdagrad, {"granularity": "rows"}, r"no granularity 'rows'; did you mean 'row'\?"),
        (ClippyAdagrad, {"quantile": 1.0}, r"quantile: expected a share of coordinates in \[0, 1\), came 1.0"),
        (ClippyAdagrad, {"weight_decay": -1.0}, "weight_decay: expected a finite number, 0 or more"),
        (ClippyAdagrad, {"half_life": 0.0}, "half_life: expected steps above 0"),
        (ClippyAdagrad, {"half_life": 9.0, "decay_every": 9}, "set one of them"),
        (ClippyAdagrad, {"decay_every": 9, "decay_factor": 0.0}, r"decay_factor: expected in \(0, 1\]"),
        (ClippyAdagrad, {"calibration_headroom": 0.0}, "calibration_headroom: expected above 0"),
        (ClippyAdam, {"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\)"),
        (ClippyAdam, {"calibration_steps": -1}, "calibration_steps: expected"),
    ],
)
def test_refuses_what_cannot_be(make: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make([{"params": [param([1.0])], **wrong}])


def test_a_parameter_in_two_groups_is_named() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match="parameter 'w' is in another group already"):
        ClippyAdagrad([{"params": [("w", weight)]}, {"params": [("w", weight)]}])
    with pytest.raises(ConfigError, match=r"parameter 0 of its group, of shape \(2,\), is in another group"):
        ClippyAdam([{"params": [weight]}, {"params": [weight]}])


def test_the_factor_is_the_twins() -> None:
    assert find_factor_twin(np.array([0.0, 2.0]), np.array([0.0, 1.0])) == 0.5
