"""ClipUpdates around torch's optimizers and a user's own: the bound, the guard, sparse rows."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from steadyrank.errors import ConfigError
from steadyrank.optim import ClippyAdagrad, RowWiseAdagrad
from steadyrank.optim.rules import AGC, ClipGlobalNorm
from steadyrank.optim.wrap import ClipGradients, ClipUpdates
from steadyrank.testing import forbid_host_sync

from .test_clippy import _Largest, param, rows_gradient

INF = float("inf")


@pytest.fixture(autouse=True)
def _sparse_checks_chosen() -> Any:
    with torch.sparse.check_sparse_tensor_invariants(enable=True):
        yield


class Lion(torch.optim.Optimizer):
    """A user's own: replaces its state instead of writing into it, and keeps a count of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    mean = state.get("mean", torch.zeros_like(p))
                    state["calls"] = state.get("calls", 0) + 1
                    p.sub_(group["lr"] * torch.sign(0.9 * mean + 0.1 * p.grad))
                    state["mean"] = 0.99 * mean + 0.01 * p.grad


BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.1, fused=True),  # the others read their steps on the host
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, initial_accumulator_value=0.1),
    "lion": Lion,
}


def two(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(12)
    return [param(torch.randn(shape, generator=draw), dtype) for shape in ((4, 3), (5,))]


def gradients(params: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = scale * torch.randn(p.shape, generator=draw).to(p.dtype)


# --- The bound ---


@pytest.mark.parametrize("granularity", ["tensor", "row", "unit"])
def test_around_adagrad_it_is_clippy(granularity: Any) -> None:
    ours, theirs = two(torch.float64), two(torch.float64)
    adagrad = torch.optim.Adagrad(ours, lr=0.3, initial_accumulator_value=0.1, eps=0.0)
    made = (
        ClipUpdates(adagrad, granularity=granularity),
        ClippyAdagrad(theirs, lr=0.3, eps=0.0, granularity=granularity),
    )
    clipped = 0
    for step in range(30):
        for params, optimizer in zip((ours, theirs), made, strict=True):
            gradients(params, step, scale=10.0 ** (step % 3))
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
            factors = made[0].state[a]["clip_factor"], made[1].state[b]["clip_factor"]
            torch.testing.assert_close(*factors, atol=1e-12, rtol=1e-12)
            clipped += int(factors[0] < 1)
    assert clipped > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_without_a_bound_it_is_the_inner_bit_for_bit(base: str, dtype: torch.dtype) -> None:
    ours, theirs = two(dtype), two(dtype)
    made = ClipUpdates(BASES[base](ours), absolute_threshold=INF), BASES[base](theirs)
    for step in range(10):
        for params, optimizer in zip((ours, theirs), made, strict=True):
            gradients(params, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == dtype
        assert made[0].state[a]["clip_factor"] == 1
        inner = made[0].optimizer.state[a]
        for key, value in made[1].state[b].items():
            torch.testing.assert_close(inner[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("granularity", ["tensor", "row", "unit"])
def test_large_tensors_in_pieces_step_as_in_one(granularity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (1 << 18, 2):
        monkeypatch.setattr("steadyrank.optim.wrapped.CHUNK", chunk)
        params = [*two(), *two(torch.bfloat16), param(torch.zeros(0, 2)), param(1.0)]
        groups = [{"params": params[:3]}, {"params": params[3:], "absolute_threshold": 0.1}]
        optimizer = ClipUpdates(torch.optim.SGD(groups, lr=1.0, momentum=0.9), granularity=granularity)
        for step in range(4):
            gradients(params, step)
            assert params[2].grad is not None
            params[2].grad[0, 0] = torch.nan if step == 2 else 0.0
            optimizer.step()
        found.append((params, optimizer.state_dict()["state"]))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert any(state["clip_factor"] < 1 for state in found[0][1].values())


@pytest.mark.parametrize("wrap", [ClipUpdates, lambda inner: ClipGradients(inner, ClipGlobalNorm(1.0))])
def test_a_step_needs_no_values_on_the_host(wrap: Any) -> None:
    # Fake tensors have shapes but no values: whatever asks for one raises.
    with FakeTensorMode():
        weight, bias = nn.Parameter(torch.empty(4, 3)), nn.Parameter(torch.empty(()))
        optimizer = wrap(torch.optim.SGD([weight, bias], lr=0.1, momentum=0.9))
        for _ in range(2):
            weight.grad, bias.grad = torch.empty(4, 3), torch.empty(())
            optimizer.step()
        assert all(value.shape == () for key, value in optimizer.state[weight].items() if key.endswith("factor"))


coordinates = st.floats(-1e3, 1e3).map(lambda x: round(x, 6))


@settings(deadline=None, max_examples=60)
@given(
    pairs=st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=6),
    base=st.sampled_from(sorted(BASES)),
    relative=st.floats(0, 2),
    absolute=st.floats(0, 1),
)
def test_no_coordinate_leaves_its_bound(pairs: list[Any], base: str, relative: float, absolute: float) -> None:
    before, grad = torch.tensor(pairs, dtype=torch.float64).T.contiguous()
    ours, theirs = param(before.clone(), torch.float64), param(before.clone(), torch.float64)
    limits = {"variable_relative_threshold": relative, "absolute_threshold": absolute}
    made = ClipUpdates(BASES[base]([ours]), **limits), BASES[base]([theirs])
    for p, optimizer in zip((ours, theirs), made, strict=True):
        p.grad = grad.clone()
        optimizer.step()
    factor, bound = made[0].state[ours]["clip_factor"], relative * before.abs() + absolute
    change, full = ours.detach() - before, theirs.detach() - before
    assert 0 <= factor <= 1
    assert torch.all(change.abs() <= bound * (1 + 1e-12) + before.abs() * 2**-52)
    torch.testing.assert_close(change, factor * full, atol=1e-12, rtol=1e-9)
    if torch.all(full.abs() <= bound):
        assert torch.equal(ours, theirs)
        assert factor == 1


def test_granularity_says_what_shares_a_factor() -> None:
    start, update = torch.ones(2, 2), torch.tensor([[4.0, 0.1], [0.1, 0.1]])
    moved = {}
    for granularity in ("tensor", "row", "unit"):
        weight, bias = param(start.clone()), param(start[0].clone())
        weight.grad, bias.grad = update.clone(), update[0].clone()
        inner = torch.optim.SGD([weight, bias], lr=1.0)
        optimizer = ClipUpdates(inner, granularity=granularity, variable_relative_threshold=1.0, absolute_threshold=0.0)
        optimizer.step()
        moved[granularity] = (1 - weight.detach()).flatten().tolist() + (1 - bias.detach()).tolist()
        assert optimizer.state[weight]["clip_factor"] == 0.25
    one, row = [1.0, 0.025, 0.025, 0.025], [1.0, 0.025, 0.1, 0.1]
    assert moved["tensor"] == pytest.approx([*one, 1.0, 0.025])
    assert moved["unit"] == pytest.approx([*row, 1.0, 0.025])
    assert moved["row"] == pytest.approx([*row, 1.0, 0.1])


def test_groups_may_have_thresholds_of_their_own_and_keep_them() -> None:
    def make(*own: float) -> tuple[list[nn.Parameter], ClipUpdates]:
        params = [param([0.0]) for _ in own]
        groups = [{"params": [p], **({"absolute_threshold": x} if x else {})} for p, x in zip(params, own, strict=True)]
        return params, ClipUpdates(torch.optim.SGD(groups, lr=1.0), absolute_threshold=0.5)

    params, optimizer = make(0.0, 0.25)
    added = param([0.0])
    optimizer.add_param_group({"params": [added], "absolute_threshold": 0.125, "lr": 2.0})
    for p in [*params, added]:
        p.grad = torch.full((1,), -1.0)
    optimizer.step()
    assert [p.item() for p in [*params, added]] == [0.5, 0.25, 0.125]
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    _, fresh = make(0.0, 0.0, 0.0)
    fresh.load_state_dict(optimizer.state_dict())
    assert [group["absolute_threshold"] for group in fresh.param_groups] == [0.5, 0.25, 0.125]
    assert [group["lr"] for group in fresh.param_groups] == [1.0, 1.0, 2.0]
    # A plain optimizer's groups have none: they keep those that they had, or if the inner loaded them, get the default.
    _, other = make(0.0, 0.25)
    other.load_state_dict(_plain_state(2))
    assert [group["lr"] for group in other.optimizer.param_groups] == [3.0, 3.0]
    assert [group["absolute_threshold"] for group in other.param_groups] == [0.5, 0.25]
    other.optimizer.load_state_dict(_plain_state(2))
    other.step()
    assert [group["absolute_threshold"] for group in other.param_groups] == [0.5, 0.5]


def _plain_state(groups: int) -> dict[str, Any]:
    return torch.optim.SGD([{"params": [param([0.0])]} for _ in range(groups)], lr=3.0).state_dict()


# --- The guard ---


def assert_kept(after: dict[str, Any], before: dict[str, Any], *but: str) -> None:
    for key in before.keys() - {"step", "clip_factor", "bad_steps", *but}:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF, 1e17])
@pytest.mark.parametrize("base", BASES)
def test_a_bad_gradient_leaves_weights_and_inner_state(base: str, bad: float) -> None:
    params = two()
    optimizer = ClipUpdates(BASES[base](params))
    for step in range(2):
        gradients(params, step)
        optimizer.step()
    before, weights = copy.deepcopy(optimizer.state_dict()["state"]), [p.detach().clone() for p in params]
    gradients(params, 3)
    assert params[0].grad is not None
    params[0].grad[2, 1] = bad
    seen = params[0].grad.clone()
    optimizer.step()
    after = optimizer.state_dict()["state"]
    assert torch.equal(params[0], weights[0])
    assert not torch.equal(params[1], weights[1])
    torch.testing.assert_close(params[0].grad, seen, rtol=0, atol=0, equal_nan=True)  # the user's, untouched
    assert_kept(after[0], before[0], "calls")
    assert [int(after[i]["bad_steps"]) for i in (0, 1)] == [1, 0]
    assert after[0]["clip_factor"] == 0
    if base == "lion":
        assert after[0]["calls"] == 3  # a python number goes on counting
    gradients(params, 4)
    optimizer.step()
    assert not torch.equal(params[0], weights[0])
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("base", BASES)
def test_what_the_inner_makes_in_a_bad_first_step_is_finite(base: str) -> None:
    params = two()
    start = params[0].detach().clone()
    optimizer = ClipUpdates(BASES[base](params))
    gradients(params, 0)
    assert params[0].grad is not None
    params[0].grad[0, 0] = torch.nan
    optimizer.step()
    assert torch.equal(params[0], start)
    for value in optimizer.optimizer.state[params[0]].values():
        assert torch.as_tensor(value).isfinite().all()


@pytest.mark.parametrize("guard", [True, False])
def test_an_update_that_overflows_is_undone(guard: bool) -> None:
    weight, other = param([1.0, 2.0]), param([1.0])
    inner = torch.optim.SGD([{"params": [weight], "lr": 1e30}, {"params": [other], "lr": 0.1}], lr=0.1, momentum=0.5)
    optimizer = ClipUpdates(inner, guard=guard)
    for step in range(2):
        weight.grad, other.grad = torch.tensor([1e10, 1.0]), torch.ones(1)
        optimizer.step()
        assert weight.tolist() == [1.0, 2.0]
        assert int(optimizer.state[weight]["bad_steps"]) == step + 1
    assert other.item() < 1
    # The state that the first step made is kept; the second step's is undone by the guard.
    buffer = inner.state[weight]["momentum_buffer"][0].item()
    assert buffer == pytest.approx(1e10 if guard else 1.5e10)


def test_without_guard_the_weights_alone_are_looked_after() -> None:
    weight = param([1.0])
    optimizer = ClipUpdates(torch.optim.SGD([weight], lr=0.1, momentum=0.5), guard=False)
    for value in (1.0, torch.nan):
        weight.grad = torch.tensor([value])
        optimizer.step()
    assert weight.item() == pytest.approx(0.9)
    assert int(optimizer.state[weight]["bad_steps"]) == 1
    assert optimizer.optimizer.state[weight]["momentum_buffer"].isnan()


def test_our_own_optimizers_guard_and_count_by_themselves() -> None:
    table = param(torch.ones(3, 2))
    optimizer = ClipUpdates(RowWiseAdagrad([table], lr=100.0))
    for value in (1.0, torch.nan, 1.0):
        table.grad = torch.full((3, 2), value)
        optimizer.step()
    state = optimizer.state_dict()["state"][0]
    assert set(state) == {"sum", "step", "bad_steps", "clip_factor"}
    assert (int(state["step"]), int(state["bad_steps"])) == (3, 1)
    assert state["clip_factor"] < 1
    again = RowWiseAdagrad([param(torch.ones(3, 2))], lr=1.0)
    again.load_state_dict(optimizer.state_dict())
    assert int(again.state_dict()["state"][0]["bad_steps"]) == 1


# --- Sparse gradients ---


@pytest.mark.parametrize(
    "base",
    [
        lambda params: torch.optim.SGD(params, lr=0.3),
        lambda params: torch.optim.Adagrad(params, lr=0.3),
        lambda params: RowWiseAdagrad(params, lr=3.0),
    ],
    ids=["sgd", "adagrad", "rowwise"],
)
@pytest.mark.parametrize("granularity", ["tensor", "row", "unit"])
def test_sparse_equals_dense_on_the_touched_rows(base: Any, granularity: Any) -> None:
    draw = torch.Generator().manual_seed(13)
    sparse = param(torch.randn(20, 4, generator=draw), torch.float64)
    dense = param(sparse.detach().clone(), torch.float64)
    made = [ClipUpdates(base([p]), granularity=granularity) for p in (sparse, dense)]
    start = sparse.detach().clone()
    for step in range(6):
        rows = torch.randint(0, 10, (7,), generator=draw)  # duplicates, which are summed once
        values = 3 * torch.randn(7, 4, generator=draw).double()
        if step == 3:
            values[2, 1] = torch.nan
        sparse.grad = rows_gradient(rows.tolist(), values, sparse)
        dense.grad = torch.zeros_like(dense).index_add_(0, rows, values)
        held = sparse.grad
        for optimizer in made:
            optimizer.step()
        assert sparse.grad is held
        torch.testing.assert_close(sparse, dense, atol=1e-14, rtol=0)
        states = [optimizer.state_dict()["state"][0] for optimizer in made]
        for key in states[0].keys() - {"step"}:
            torch.testing.assert_close(states[0][key], states[1][key], atol=0, rtol=1e-12)
        assert int(states[0]["bad_steps"]) == int(step >= 3)
        assert states[0]["clip_factor"] < 1 or step == 3
    assert torch.equal(sparse[10:], start[10:])


def test_sparse_adam_keeps_its_moments_where_a_gradient_is_bad() -> None:
    table = param(torch.ones(4, 2))
    optimizer = ClipUpdates(torch.optim.SparseAdam([table], lr=0.1))
    for bad in (1.0, torch.nan):
        before, held = copy.deepcopy(optimizer.state_dict()["state"]), table.detach().clone()
        table.grad = rows_gradient([1, 3], torch.tensor([[1.0, 1.0], [1.0, bad]]), table)
        optimizer.step()
    assert torch.equal(table, held)
    assert_kept(optimizer.state_dict()["state"][0], before[0])


def test_a_sparse_gradient_without_rows_changes_nothing() -> None:
    table = param(torch.ones(3, 2))
    for optimizer in (
        ClipUpdates(torch.optim.SGD([table], lr=0.2), granularity="row"),
        ClipGradients(torch.optim.SGD([table], lr=0.2), AGC()),
    ):
        table.grad = rows_gradient([], torch.zeros(0, 2), table)
        optimizer.step()
        assert torch.equal(table, torch.ones(3, 2))
        assert set(map(float, optimizer.state[table].values())) == {0.0, 1.0}  # no bad step, a factor of 1


@pytest.mark.parametrize("base", [torch.optim.SGD, RowWiseAdagrad])
def test_a_sparse_step_costs_what_the_touched_rows_cost(base: Any) -> None:
    table = param(torch.zeros(100_000, 4))
    optimizer = ClipUpdates(base([table], lr=0.1))
    for _ in range(2):
        table.grad = rows_gradient([5, 9, 5], torch.ones(3, 4), table)
        with _Largest() as seen, forbid_host_sync():
            optimizer.step()
    assert seen.largest == 2 * 4


def test_refuses_inner_optimizers_that_it_cannot_bound() -> None:
    table = param(torch.zeros(4, 2))
    table.grad = rows_gradient([1], torch.ones(1, 2), table)
    named = [("tables.w16", table)]
    for option in ("momentum", "weight_decay"):
        inner = torch.optim.SGD(named, lr=0.1, **{option: 0.9})
        for optimizer in (ClipUpdates(inner), ClipGradients(inner, AGC())):
            with pytest.raises(
                ConfigError, match=rf"parameter 'tables\.w16' has a sparse .* SGD with {option} 0\.9 moves"
            ):
                optimizer.step()
    with pytest.raises(ConfigError, match=r"parameter 'tables\.w16' has a sparse gradient, which Adam does not take"):
        ClipUpdates(torch.optim.Adam(named)).step()
    assert torch.equal(table, torch.zeros(4, 2))
    assert table.grad.is_sparse
    table.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(ConfigError, match=r"'tables\.w16' has a gradient of layout torch\.sparse_coo; expected"):
        ClipUpdates(torch.optim.SGD(named)).step()
    with pytest.raises(ConfigError, match="ClippyAdagrad bounds its updates already"):
        ClipUpdates(ClippyAdagrad([table]))
    with pytest.raises(ConfigError, match="ClipUpdates bounds its updates already"):
        ClipUpdates(ClipGradients(ClipUpdates(torch.optim.SGD([table])), AGC()))
    with pytest.raises(ConfigError, match="has a rule already"):
        ClipGradients(ClipGradients(torch.optim.SGD([table]), AGC()), AGC())
    with pytest.raises(ConfigError, match="LBFGS makes several steps in one"):
        ClipUpdates(torch.optim.LBFGS([table]))


def test_an_error_of_the_inner_comes_through_and_leaves_the_gradients() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("no sparse luck")

    weight = param([1.0])
    weight.grad = torch.ones(1)
    held = weight.grad
    with pytest.raises(RuntimeError, match="no sparse luck"):
        ClipUpdates(Broken([weight])).step()
    assert weight.grad is held


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"absolute_threshold": -1.0}, "absolute_threshold: expected a number, 0 or more"),
        ({"variable_relative_threshold": INF}, "variable_relative_threshold: expected a finite"),
        ({"granularity": "rows"}, r"no granularity 'rows'; did you mean 'row'\?"),
    ],
)
def test_refuses_options_out_of_range_and_leaves_the_inner_as_it_was(wrong: dict[str, Any], message: str) -> None:
    inner = torch.optim.SGD([{"params": [param([1.0])], **wrong}])
    with pytest.raises(ConfigError, match=message):
        ClipUpdates(inner)
    assert "guard" not in inner.param_groups[0]
    optimizer = ClipUpdates(torch.optim.SGD([param([1.0])]))
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group({"params": [param([2.0])], **wrong})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ConfigError, match=r"parameter 0 of its group, of shape \(2,\), has dtype torch\.complex64"):
        ClipUpdates(torch.optim.SGD([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]))
