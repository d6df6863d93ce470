"""ClippyAdagrad against the authors' code, a float64 twin and torch's Adagrad, and the properties that it promises."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from steadyrank.errors import ConfigError
from steadyrank.optim import ClippyAdagrad, RowWiseAdagrad, kernels
from steadyrank.testing import check_optimizer, step_clippy_twin

from .shared import shared

FORMS = ("standard", "delayed", "delayed_clipped")
CASES = [
    "defaults",
    "paper_thresholds",
    "paper_thresholds_delayed",
    "clipped_accumulator",
    "accumulator_relative",
    "zero_weights",
    "zero_weights_no_absolute",
    "zero_gradients",
    "spike",
    "spike_clipped_accumulator",
    "spike_standard",
    "sparse_rows",
    "sparse_rows_standard",
    "sparse_rows_clipped_accumulator",
    "float64",
    "scalar",
    "zero_initial_accumulator_standard",
    "long",
]
PAPER = {"variable_relative_threshold": 0.5, "absolute_threshold": 0.01, "accumulator_relative_threshold": 0.0}


def golden(name: str) -> dict[str, Any]:
    cases = json.loads(shared("golden/clippy_adagrad.json").read_text())["cases"]
    assert {case["name"] for case in cases} == set(CASES)
    return next(case for case in cases if case["name"] == name)


def options(case: dict[str, Any]) -> dict[str, Any]:
    given_options = case["hyperparameters"]
    clipped = "delayed_clipped" if given_options["clip_accumulator_update"] else "delayed"
    return {
        "lr": given_options["learning_rate"],
        "initial_accumulator_value": given_options["initial_accumulator_value"],
        "eps": given_options["epsilon"],
        "accumulator": "standard" if given_options["use_standard_accumulator_update"] else clipped,
        **{name: given_options[name] for name in PAPER},
    }


def as_gradient(step: dict[str, Any], like: Tensor) -> Tensor:
    values = torch.tensor(step["grad"], dtype=like.dtype)
    return rows_gradient(step["rows"], values, like) if "rows" in step else values


def rows_gradient(rows: list[int], values: Tensor, like: Tensor) -> Tensor:
    index = torch.tensor([rows], dtype=torch.int64)
    return torch.sparse_coo_tensor(index, values, like.shape, check_invariants=True)


def param(values: Any, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.as_tensor(values, dtype=dtype))


def assert_near(found: Tensor, expected: Any, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=rtol)


# The second run replays a float32 recording in float64. Same tolerance: what is left is the recording's own rounding.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_authors_code(name: str, dtype: torch.dtype) -> None:
    case = golden(name)
    exact = case["dtype"] == "float64"
    if exact and dtype == torch.float32:
        pytest.skip("recorded in float64")
    weight = param(case["initial_weight"], dtype)
    optimizer = ClippyAdagrad([weight], **options(case))
    moved, grown = 0.0, 0.0
    last, first_sum = np.array(case["initial_weight"]), case["hyperparameters"]["initial_accumulator_value"]
    for number, step in enumerate(case["steps"], start=1):
        weight.grad = as_gradient(step, weight)
        optimizer.step()
        moved += np.abs(np.array(step["weight"]) - last).max()
        grown = np.abs(np.array(step["accumulator"]) - first_sum).max()
        last = np.array(step["weight"])
        state = optimizer.state[weight]
        # Besides the distance moved: float32 rounds what it stores by half a unit in the last place, once a step.
        ulp = 0.0 if exact else number * 2**-24
        close = 1e-12 if exact else 1e-5
        assert_near(weight.detach(), step["weight"], close * moved + ulp * np.abs(last).max())
        assert_near(state["sum"], step["accumulator"], close * grown + ulp * np.abs(step["accumulator"]).max())
        # The authors keep the factor in float32 always. A weight near 0 has a small bound and a large relative error.
        assert_near(state["clip_factor"], step["clipping_factor"], 1e-12, 1e-7 if exact else 3e-5)
    assert int(state["step"]) == len(case["steps"])
    assert int(state["bad_steps"]) == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_its_twin_step_by_step(form: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    limits = {**PAPER, "accumulator_relative_threshold": 1e-3}
    weight = param(torch.randn(5, 4, generator=draw), dtype)
    optimizer = ClippyAdagrad([weight], lr=0.3, eps=1e-7, accumulator=form, **limits)
    twin_weight, twin_sum = weight.detach().double().numpy().copy(), np.full((5, 4), 0.1)
    moved, clipped = 0.0, 0
    for _ in range(30):
        grad = torch.randn(5, 4, generator=draw).to(dtype) * 10 ** torch.randn((), generator=draw)
        weight.grad = grad
        optimizer.step()
        twin = step_clippy_twin(twin_weight, twin_sum, grad.double().numpy(), lr=0.3, eps=1e-7, form=form, **limits)
        moved += np.abs(twin.weight - twin_weight).max()
        twin_weight, twin_sum = twin.weight, twin.accumulator
        clipped += twin.factor < 1
        close, ulp = (1e-12, 0.0) if dtype == torch.float64 else (1e-5, 2**-23)
        assert_near(weight.detach(), twin_weight, close * moved + ulp * np.abs(twin_weight).max())
        assert_near(optimizer.state[weight]["sum"], twin_sum, 0.0, close)
        # A factor near 0 comes from a weight near 0, whose float32 rounding is large beside the weight itself.
        assert_near(optimizer.state[weight]["clip_factor"], twin.factor, 1e-12, 1e-12 if close == 1e-12 else 1e-4)
    assert 0 < clipped <= 30


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_without_a_bound_it_is_torchs_adagrad(eps: float) -> None:
    # torch adds its eps to the root, we add ours to the accumulator. Without either the two are equal; with ours, they
    # are equal when torch starts from an accumulator larger by eps.
    draw = torch.Generator().manual_seed(4)
    ours = param(torch.randn(6, 3, generator=draw), torch.float64)
    theirs = param(ours.detach().clone(), torch.float64)
    clippy = ClippyAdagrad([ours], lr=0.3, absolute_threshold=float("inf"), eps=eps)
    adagrad = torch.optim.Adagrad([theirs], lr=0.3, initial_accumulator_value=0.1 + eps, eps=0.0)
    for _ in range(20):
        ours.grad = torch.randn(6, 3, generator=draw).double()
        theirs.grad = ours.grad.clone()
        clippy.step()
        adagrad.step()
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        torch.testing.assert_close(clippy.state[ours]["sum"] + eps, adagrad.state[theirs]["sum"], atol=0, rtol=1e-12)
        assert clippy.state[ours]["clip_factor"] == 1


@pytest.mark.parametrize("form", ["delayed", "delayed_clipped"])
def test_delayed_divides_by_the_accumulator_before_the_step(form: str) -> None:
    # So its first step without a bound is plain gradient descent at the rate eta / sqrt(G_0 + eps).
    ours, theirs = param([1.0, -2.0], torch.float64), param([1.0, -2.0], torch.float64)
    ours.grad = theirs.grad = torch.tensor([30.0, -0.1], dtype=torch.float64)
    ClippyAdagrad([ours], lr=0.3, absolute_threshold=1e9, eps=0.0, accumulator=form).step()
    torch.optim.SGD([theirs], lr=0.3 / 0.1**0.5).step()
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 6))
vectors = st.lists(st.tuples(numbers, numbers, st.floats(0, 1e3)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(
    vectors=vectors,
    form=st.sampled_from(FORMS),
    lr=st.floats(0, 10),
    relative=st.floats(0, 2),
    absolute=st.floats(0, 1),
    maximize=st.booleans(),
)
def test_no_coordinate_leaves_its_bound(
    vectors: list[Any], form: str, lr: float, relative: float, absolute: float, maximize: bool
) -> None:
    before, grad, total = torch.tensor(vectors, dtype=torch.float64).T.contiguous()
    limits = {"variable_relative_threshold": relative, "absolute_threshold": absolute}
    weight = param(before.clone(), torch.float64)
    weight.grad = grad
    optimizer = ClippyAdagrad([weight], lr=lr, accumulator=form, maximize=maximize, **limits)
    optimizer.load_state_dict(_with_sum(optimizer, total))
    optimizer.step()
    factor = optimizer.state[weight]["clip_factor"]
    change = weight.detach() - before
    assert 0 <= factor <= 1
    assert torch.all(change.abs() <= (relative * before.abs() + absolute) * (1 + 1e-12) + before.abs() * 2**-52)
    full = (1 if maximize else -1) * lr * grad * torch.rsqrt(total + (grad**2 if form == "standard" else 0) + 1e-7)
    torch.testing.assert_close(change, factor * full, atol=1e-12, rtol=1e-9)
    if torch.all(full.abs() <= relative * before.abs() + absolute):
        assert factor == pytest.approx(1, abs=1e-12)


def _with_sum(optimizer: ClippyAdagrad, total: Tensor) -> dict[str, Any]:
    state = optimizer.state_dict()
    zero = torch.zeros(())
    state["state"] = {0: {"sum": total.clone(), "step": zero, "bad_steps": zero.long(), "clip_factor": zero.double()}}
    return state


# Zero, or far enough from it that no quotient is subnormal and loses digits.
sizes = st.just(0.0) | st.floats(1e-30, 1e30)


@settings(deadline=None, max_examples=40)
@given(pairs=st.lists(st.tuples(sizes, sizes), max_size=9))
def test_the_kernel_gives_the_largest_factor(pairs: list[tuple[float, float]]) -> None:
    delta, bound = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).T
    factor = kernels.clip_factor(-delta, bound)
    assert factor.shape == ()
    assert 0 <= factor <= 1
    assert torch.all(factor * delta.abs() <= bound * (1 + 1e-12))
    if factor < 1:
        assert torch.any(factor * delta.abs() >= bound * (1 - 1e-12))


@pytest.mark.parametrize(
    ("delta", "bound", "expected"),
    [
        ([0.0, 1.0], [0.0, 2.0], 1.0),
        ([1e-30, 1.0], [0.0, 2.0], 0.0),
        ([float("inf"), 1.0], [1.0, 2.0], 0.0),
        ([float("nan"), 4.0], [1.0, 2.0], 0.5),
        ([3.0, 4.0], [float("inf"), 2.0], 0.5),
        ([], [], 1.0),
    ],
)
def test_the_kernel_at_the_edges(delta: list[float], bound: list[float], expected: float) -> None:
    assert kernels.clip_factor(torch.tensor(delta), torch.tensor(bound)) == expected


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2e19, -3e38])
def test_a_bad_gradient_changes_nothing_and_is_counted(bad: float, form: str, sparse: bool, maximize: bool) -> None:
    weight, other = param([[-0.0, 1.0], [0.0, -2.0], [0.5, 0.5]]), param([1.0])
    optimizer = ClippyAdagrad([weight, other], lr=0.1, accumulator=form, maximize=maximize)

    def step(value: float) -> None:
        values = torch.tensor([[0.0, value], [-0.5, 0.25]])
        weight.grad = rows_gradient([0, 1], values, weight) if sparse else torch.cat([values, torch.ones(1, 2)])
        other.grad = torch.ones(1)
        optimizer.step()

    step(0.1)
    held, total, last = weight.detach().clone(), optimizer.state[weight]["sum"].clone(), other.detach().clone()
    step(bad)
    state = optimizer.state[weight]
    assert torch.equal(weight, held)
    assert torch.equal(weight.signbit(), held.signbit())
    assert torch.equal(state["sum"], total)
    assert (state["bad_steps"], state["clip_factor"], state["step"]) == (1, 0, 2)
    assert not torch.equal(other, last)
    assert optimizer.state[other]["bad_steps"] == 0
    step(0.1)
    assert not torch.equal(weight, held)
    assert weight.isfinite().all()
    assert (state["bad_steps"], state["step"]) == (1, 3)


@pytest.mark.parametrize("form", FORMS)
def test_a_huge_gradient_that_fits_is_taken_in(form: str) -> None:
    weight = param([0.5, 0.5])
    weight.grad = torch.tensor([1e19, 0.1])
    optimizer = ClippyAdagrad([weight], lr=10.0, accumulator=form)
    optimizer.step()
    state = optimizer.state[weight]
    assert state["bad_steps"] == 0
    assert weight.isfinite().all()
    assert state["sum"].isfinite().all()
    # It used its whole bound, downwards.
    assert weight[0].item() == pytest.approx(0.5 - 0.26)


@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_rate_that_is_not_finite_changes_nothing(rate: float, as_tensor: bool) -> None:
    weight = param([0.5])
    weight.grad = torch.ones(1)
    optimizer = ClippyAdagrad([weight], lr=0.1)
    optimizer.param_groups[0]["lr"] = torch.tensor(rate) if as_tensor else rate
    optimizer.step()
    assert weight == 0.5
    assert optimizer.state[weight]["sum"] == torch.tensor(0.1)
    assert optimizer.state[weight]["bad_steps"] == 1


@pytest.mark.parametrize("form", FORMS)
def test_sparse_equals_dense_on_the_touched_rows(form: str) -> None:
    draw = torch.Generator().manual_seed(5)
    sparse = param(torch.randn(20, 4, generator=draw), torch.float64)
    dense = param(sparse.detach().clone(), torch.float64)
    optimizers = [ClippyAdagrad([p], lr=0.2, accumulator=form) for p in (sparse, dense)]
    start = sparse.detach().clone()
    for _ in range(6):
        rows = torch.randint(0, 10, (7,), generator=draw)  # duplicates, which are summed once
        values = torch.randn(7, 4, generator=draw).double()
        sparse.grad = rows_gradient(rows.tolist(), values, sparse)
        dense.grad = torch.zeros_like(dense).index_add_(0, rows, values)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(sparse, dense, atol=1e-14, rtol=0)
        for key in ("sum", "clip_factor"):
            found, expected = (o.state[p][key] for o, p in zip(optimizers, (sparse, dense), strict=True))
            torch.testing.assert_close(found, expected, atol=0, rtol=1e-13)
    assert torch.equal(sparse[10:], start[10:])
    assert torch.all(optimizers[0].state[sparse]["sum"][10:] == 0.1)


def test_a_sparse_gradient_without_rows_changes_nothing() -> None:
    table = param(torch.ones(3, 2))
    optimizer = ClippyAdagrad([table], lr=0.2)
    table.grad = rows_gradient([], torch.zeros(0, 2), table)
    optimizer.step()
    state = optimizer.state[table]
    assert torch.equal(table, torch.ones(3, 2))
    assert (state["step"], state["bad_steps"], state["clip_factor"]) == (1, 0, 1)


class _Largest(TorchDispatchMode):
    """Remembers the largest dense tensor that an operation made, in elements."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.layout == torch.strided and not func._schema.is_mutable:
            self.largest = max(self.largest, made.numel())
        return made


@pytest.mark.parametrize("make", [ClippyAdagrad, RowWiseAdagrad])
def test_a_sparse_step_costs_what_the_touched_rows_cost(make: Any) -> None:
    table = param(torch.zeros(100_000, 4))
    optimizer = make([table], lr=0.1)
    for _ in range(2):
        table.grad = rows_gradient([5, 9, 5], torch.ones(3, 4), table)
        with _Largest() as seen:
            optimizer.step()
    assert seen.largest <= 3 * 4


@pytest.mark.parametrize("form", FORMS)
def test_a_dense_step_needs_no_values_on_the_host(form: str) -> None:
    # Fake tensors have shapes but no values: whatever asks for one raises.
    with FakeTensorMode():
        weight, bias = nn.Parameter(torch.empty(4, 3)), nn.Parameter(torch.empty(()))
        optimizer = ClippyAdagrad([weight, bias], lr=0.1, accumulator=form, accumulator_relative_threshold=0.1)
        for _ in range(2):
            weight.grad, bias.grad = torch.empty(4, 3), torch.empty(())
            optimizer.step()
        assert optimizer.state[weight]["clip_factor"].shape == ()


@pytest.mark.parametrize("form", ["delayed", "delayed_clipped"])  # test_optim_build has the default form
def test_holds_every_promise_of_an_optimizer(form: str) -> None:
    check_optimizer(lambda params: ClippyAdagrad(params, lr=0.1, accumulator=form), sparse=True)


def test_maximize_is_descent_on_the_negated_gradient() -> None:
    up, down = param([0.5, -1.0]), param([0.5, -1.0])
    up.grad = torch.tensor([0.3, -0.2])
    down.grad = -up.grad
    ClippyAdagrad([up], lr=0.1, maximize=True).step()
    ClippyAdagrad([down], lr=0.1).step()
    assert torch.equal(up, down)
    assert up[0] > 0.5


def test_a_tensor_rate_counts_as_its_number_and_may_change_in_place() -> None:
    one, two = param([0.5, -1.0], torch.float64), param([0.5, -1.0], torch.float64)
    rate = torch.tensor([0.1], dtype=torch.float64)
    by_tensor, by_number = ClippyAdagrad([one], lr=rate), ClippyAdagrad([two], lr=0.1)
    for value in (0.1, 0.3):
        rate.fill_(value)
        by_number.param_groups[0]["lr"] = value
        one.grad = two.grad = torch.tensor([0.3, -0.2], dtype=torch.float64)
        by_tensor.step()
        by_number.step()
        assert torch.equal(one, two)


def test_half_precision_parameters_have_a_float32_accumulator_that_a_resume_keeps() -> None:
    weight = param([1.0, 2.0], torch.bfloat16)
    optimizer = ClippyAdagrad([weight], lr=0.1)
    for _ in range(3):
        weight.grad = torch.tensor([0.01, 0.02], dtype=torch.bfloat16)
        optimizer.step()
    optimizer.state[weight]["bad_steps"].fill_(1001)  # not a bfloat16 number, as 0.1003 is not
    saved = optimizer.state_dict()
    fresh = ClippyAdagrad([weight], lr=0.1)
    fresh.register_load_state_dict_pre_hook(lambda _, state: {**state, "param_groups": [*state["param_groups"]]})
    seen: list[torch.dtype] = []
    fresh.register_load_state_dict_post_hook(lambda o: seen.append(o.state[weight]["sum"].dtype))
    fresh.load_state_dict(saved)
    assert seen == [torch.float32]
    assert torch.equal(fresh.state[weight]["sum"], optimizer.state[weight]["sum"])
    assert fresh.state[weight]["bad_steps"] == 1001
    assert fresh.state[weight]["bad_steps"].dtype == torch.int64


def test_every_option_comes_back_from_the_state() -> None:
    given_options = {"lr": 0.3, "accumulator": "delayed_clipped", "eps": 1e-5, "maximize": True, **PAPER}
    given_options |= {"granularity": "row", "weight_decay": 0.1, "quantile": 0.01, "calibration_steps": 5}
    given_options |= {"calibration_headroom": 3.0, "telemetry": True, "half_life": 10.0, "foreach": True}
    saved = ClippyAdagrad([("w", param([1.0]))], initial_accumulator_value=0.2, **given_options).state_dict()
    fresh = ClippyAdagrad([("w", param([1.0]))])
    fresh.load_state_dict(saved)
    group = fresh.param_groups[0]
    assert {**group, **given_options, "initial_accumulator_value": 0.2} == group


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -0.1}, "lr: expected a finite number, 0 or more, came -0.1"),
        ({"lr": float("nan")}, "lr: expected"),
        ({"lr": torch.ones(2)}, r"lr: expected a number or a tensor of one element, came shape \(2,\)"),
        ({"absolute_threshold": -1.0}, "absolute_threshold: expected a number, 0 or more"),
        ({"variable_relative_threshold": float("inf")}, "variable_relative_threshold: expected a finite"),
        ({"accumulator_relative_threshold": -1.0}, "accumulator_relative_threshold"),
        ({"initial_accumulator_value": -1.0}, "initial_accumulator_value"),
        ({"eps": 0.0, "initial_accumulator_value": 0.0}, "one must be above 0"),
        ({"accumulator": "delay"}, r"no accumulator form 'delay'; did you mean 'delayed'\?"),
    ],
)
def test_refuses_options_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClippyAdagrad([{"params": [param([1.0])], **wrong}])
    optimizer = ClippyAdagrad([param([1.0])])
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group({"params": [param([2.0])], **wrong})
    assert len(optimizer.param_groups) == 1


def test_refuses_parameters_and_gradients_that_it_cannot_treat() -> None:
    with pytest.raises(ConfigError, match="parameter 'spectrum' has dtype"):
        ClippyAdagrad([("spectrum", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))])
    weight = param(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(ConfigError, match=r"parameter 'top\.weight' has a gradient of layout torch\.sparse_coo"):
        ClippyAdagrad([("top.weight", weight)]).step()
    with pytest.raises(ConfigError, match=r"parameter 0 of its group, of shape \(2, 2\), has a gradient"):
        ClippyAdagrad([weight]).step()
