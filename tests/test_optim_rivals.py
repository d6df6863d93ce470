"""LAMB on Adagrad and on Adam, and StableAdamW, against float64 twins, torch's optimizers and optax."""

import copy
import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steadyrank.errors import CheckpointError, ConfigError
from steadyrank.optim.rivals import Lamb, LambAdagrad, StableAdamW, over_roots, overall_norm, trust_ratio
from steadyrank.testing import check_optimizer

Array = np.ndarray
RIVALS = (LambAdagrad, Lamb, StableAdamW)
MOMENTS = (Lamb, StableAdamW)
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _sparse_checks_chosen() -> Any:
    # torch's own optimizers build sparse tensors and warn unless somebody chose whether they are to be checked.
    with torch.sparse.check_sparse_tensor_invariants(enable=True):
        yield


class Twin(NamedTuple):
    """What one step leaves: weights, both moments (or the accumulator as `square`), and what scaled the step."""

    weight: Array
    mean: Array
    square: Array
    factor: float


def scale_twin(weight: Array, update: Array, trust_clip: float) -> float:
    sizes = math.sqrt((weight**2).sum()), math.sqrt((update**2).sum())
    return min(trust_clip, sizes[0] / sizes[1] if min(sizes) > 0 else 1.0)


def lamb_adagrad_twin(
    at: Twin, g: Array, t: int, lr: float, eps: float = 1e-7, weight_decay: float = 0.0, trust_clip: float = math.inf
) -> Twin:
    total = at.square + g**2
    update = g / np.sqrt(total + eps) + weight_decay * at.weight
    sigma = scale_twin(at.weight, update, trust_clip)
    return Twin(at.weight - lr * sigma * update, at.mean, total, sigma)


def lamb_twin(
    at: Twin, g: Array, t: int, lr: float, eps: float = 1e-6, weight_decay: float = 0.0, trust_clip: float = math.inf
) -> Twin:
    b1, b2 = 0.9, 0.999
    m, v = b1 * at.mean + (1 - b1) * g, b2 * at.square + (1 - b2) * g**2
    update = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + weight_decay * at.weight
    sigma = scale_twin(at.weight, update, trust_clip)
    return Twin(at.weight - lr * sigma * update, m, v, sigma)


def stable_twin(at: Twin, g: Array, t: int, lr: float, eps: float = 1e-6, weight_decay: float = 0.0) -> Twin:
    """Algorithm 2 of the paper to the letter: the moments in it are corrected, by way of the betas."""
    b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (0.9, 0.99))
    m, v = b1 * at.mean + (1 - b1) * g, b2 * at.square + (1 - b2) * g**2
    rms = math.sqrt(np.mean(g**2 / np.maximum(v, eps**2)))
    rate = lr / max(1.0, rms)
    return Twin(at.weight - rate * weight_decay * at.weight - rate * m / (np.sqrt(v) + eps), m, v, 1 / max(1.0, rms))


TWINS: dict[Any, Any] = {LambAdagrad: lamb_adagrad_twin, Lamb: lamb_twin, StableAdamW: stable_twin}


def start_of(kind: Any, weight: Tensor) -> Twin:
    first = np.full(weight.shape, 0.1 if kind is LambAdagrad else 0.0)
    return Twin(weight.detach().double().numpy().copy(), np.zeros(weight.shape), first, 1.0)


def param(values: Any, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.as_tensor(values, dtype=dtype).clone())


def rows_gradient(rows: Tensor, values: Tensor, like: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(rows[None], values, like.shape, check_invariants=True)


def factor_of(state: dict[str, Tensor]) -> Tensor:
    return state["trust_ratio"] if "trust_ratio" in state else state["clip_factor"]


def states_of(kind: Any, state: dict[str, Tensor], betas: tuple[float, float]) -> tuple[Tensor | None, Tensor]:
    """Return both moments as the twin has them."""
    if kind is LambAdagrad:
        return None, state["sum"]
    steps = int(state["step"] - state["bad_steps"])
    correct = [1 - beta**steps if kind is StableAdamW else 1.0 for beta in betas]
    return state["exp_avg"] / correct[0], state["exp_avg_sq"] / correct[1]


OPTIONS: tuple[dict[str, float], ...] = ({}, {"weight_decay": 0.3, "eps": 1e-3}, {"trust_clip": 0.7})
CASES = [(k, o) for k in RIVALS for o in OPTIONS if k is not StableAdamW or "trust_clip" not in o]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_equals_its_twin_step_by_step(kind: Any, dtype: torch.dtype, options: dict[str, float]) -> None:
    draw = torch.Generator().manual_seed(3)
    weight = param(torch.randn(5, 4, generator=draw), dtype)
    optimizer = kind([weight], lr=0.1, **options)
    betas = optimizer.param_groups[0].get("betas", (0.0, 0.0))
    twin, moved, scaled = start_of(kind, weight), 0.0, 0
    for t in range(1, 31):
        weight.grad = torch.randn(5, 4, generator=draw).to(dtype) * 10 ** torch.randn((), generator=draw)
        optimizer.step()
        before, twin = twin, TWINS[kind](twin, weight.grad.double().numpy(), t, 0.1, **options)
        moved += np.abs(twin.weight - before.weight).max()
        close, ulp = (1e-12, 0.0) if dtype == torch.float64 else (1e-5, 2**-23)
        np.testing.assert_allclose(weight.detach(), twin.weight, 0, close * moved + ulp * np.abs(twin.weight).max())
        state = optimizer.state[weight]
        mean, square = states_of(kind, state, betas)
        np.testing.assert_allclose(square, twin.square, close, 0)
        if mean is not None:  # gradients of both signs: of the largest, what cancelled has lost digits
            np.testing.assert_allclose(mean, twin.mean, 0, close * np.abs(twin.mean).max())
        # The norm of weights that are off by what they may be off.
        np.testing.assert_allclose(factor_of(state), twin.factor, 10 * close, 0)
        assert (int(state["step"]), int(state["bad_steps"])) == (t, 0)
        if kind is StableAdamW:  # v has (1 - b2') g^2 in it
            assert twin.factor >= math.sqrt((1 - betas[1]) / (1 - betas[1] ** t)) - 1e-12
        scaled += twin.factor != 1
    assert scaled > 3


def shadow(weight: nn.Parameter, make: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    other = nn.Parameter(weight.detach().clone())
    return other, make([other])


# A ratio that is always above its ceiling is a constant, which the rate takes back: LAMB without its scale.
CEILING = 1e-3


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_without_its_scale_is_adamw(weight_decay: float) -> None:
    draw = torch.Generator().manual_seed(4)
    ours = param(torch.randn(6, 3, generator=draw))
    options = {"betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": weight_decay}
    lamb = Lamb([ours], lr=0.1 / CEILING, trust_clip=CEILING, **options)
    theirs, adam = shadow(ours, lambda p: torch.optim.AdamW(p, lr=0.1, **options))
    for _ in range(20):
        ours.grad = torch.randn(6, 3, generator=draw).double()
        theirs.grad = ours.grad.clone()
        lamb.step()
        adam.step()
        assert lamb.state[ours]["trust_ratio"] == CEILING
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(lamb.state[ours][key], adam.state[theirs][key], atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_lamb_adagrad_without_its_scale_is_adagrad(eps: float) -> None:
    # torch adds its eps to the root, we add ours to the accumulator: equal when torch starts from one larger by eps.
    draw = torch.Generator().manual_seed(5)
    ours = param(torch.randn(6, 3, generator=draw))
    lamb = LambAdagrad([ours], lr=0.3 / CEILING, trust_clip=CEILING, eps=eps)
    theirs, adagrad = shadow(
        ours, lambda p: torch.optim.Adagrad(p, lr=0.3, initial_accumulator_value=0.1 + eps, eps=0.0)
    )
    for _ in range(20):
        ours.grad = torch.randn(6, 3, generator=draw).double()
        theirs.grad = ours.grad.clone()
        lamb.step()
        adagrad.step()
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        torch.testing.assert_close(lamb.state[ours]["sum"] + eps, adagrad.state[theirs]["sum"], atol=0, rtol=1e-12)


def test_weights_of_zero_make_one_plain_step_and_then_grow_in_proportion() -> None:
    ours = param(torch.zeros(4))
    lamb = Lamb([ours], lr=0.1)
    theirs, adam = shadow(ours, lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-6))
    ours.grad = theirs.grad = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    lamb.step()
    adam.step()
    torch.testing.assert_close(ours, theirs, atol=1e-15, rtol=0)
    assert lamb.state[ours]["trust_ratio"] == 1
    before = ours.detach().clone()
    lamb.step()
    assert (ours - before).norm().item() == pytest.approx(0.1 * before.norm().item())


# RMS is at most 1, and StableAdamW is AdamW, where no gradient is larger than the mean of its squares so far: it never
# grows in any coordinate, or it is nowhere above eps.
@pytest.mark.parametrize("sizes", [[0.9**t for t in range(30)], [1.0] * 30, [1e-7 * (1 + t % 7) for t in range(30)]])
def test_stable_adamw_is_adamw_where_the_second_moment_does_not_lag(sizes: list[float]) -> None:
    draw = torch.Generator().manual_seed(6)
    ours = param(torch.randn(6, 3, generator=draw))
    options = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    stable = StableAdamW([ours], lr=0.1, **options)
    theirs, adamw = shadow(ours, lambda p: torch.optim.AdamW(p, lr=0.1, **options))
    shape = 1 - torch.rand(6, 3, generator=draw).double()
    for size in sizes:
        sign = torch.rand(6, 3, generator=draw).sub(0.5).sign()
        ours.grad = shape * sign * size
        theirs.grad = ours.grad.clone()
        stable.step()
        adamw.step()
        assert stable.state[ours]["clip_factor"] == pytest.approx(1, abs=1e-15)
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(stable.state[ours][key], adamw.state[theirs][key], atol=0, rtol=1e-12)
    ours.grad = shape * 100
    stable.step()
    assert stable.state[ours]["clip_factor"] < 0.2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lamb_is_optaxs(dtype: Any) -> None:
    optax, jax = pytest.importorskip("optax"), pytest.importorskip("jax")
    draw = np.random.default_rng(7)
    first = draw.standard_normal((5, 4)).astype(dtype)
    with jax.enable_x64(True) if dtype == np.float64 else nullcontext():
        theirs = optax.lamb(0.1, weight_decay=0.1)
        update = jax.jit(theirs.update)
        weight, ours = jax.numpy.asarray(first), nn.Parameter(torch.tensor(first))
        state, optimizer = theirs.init(weight), Lamb([ours], lr=0.1, weight_decay=0.1)
        for step in range(20):
            grad = (draw.standard_normal((5, 4)) * 10.0 ** (step % 4 - 2)).astype(dtype)
            changes, state = update(jax.numpy.asarray(grad), state, weight)
            weight = optax.apply_updates(weight, changes)
            ours.grad = torch.tensor(grad)
            optimizer.step()
            close = 1e-12 if dtype == np.float64 else 1e-5
            np.testing.assert_allclose(ours.detach(), np.asarray(weight), 0, close * np.abs(first).max())
            for key, values in (("exp_avg", state[0].mu), ("exp_avg_sq", state[0].nu)):
                values = np.asarray(values)
                np.testing.assert_allclose(optimizer.state[ours][key], values, close, close * np.abs(values).max())


@pytest.mark.parametrize(
    ("weight", "update", "ceiling", "expected"),
    [
        ([3.0, 4.0], [0.0, 10.0], INF, 0.5),
        ([3.0, 4.0], [0.0, 0.1], 2.0, 2.0),
        ([0.0, 0.0], [1.0, 2.0], INF, 1.0),
        ([0.0, 0.0], [1.0, 2.0], 0.5, 0.5),
        ([1.0, 2.0], [0.0, 0.0], INF, 1.0),
        ([0.0, 0.0], [0.0, 0.0], INF, 1.0),
        ([], [], INF, 1.0),
        (3.0, -2.0, INF, 1.5),
        ([NAN, 1.0], [1.0, 1.0], INF, 1.0),
        ([INF, 1.0], [1.0, 1.0], INF, 1.0),
        ([3e38, 1.0], [1.0, 1.0], INF, 1.0),  # its square is no float32
        ([1.0, 1.0], [3e38, 1.0], INF, 0.0),
        ([1.0, 1.0], [1e-30, 0.0], INF, 1.0),  # its square is 0 in float32
    ],
)
def test_the_trust_ratio_at_the_edges(weight: Any, update: Any, ceiling: float, expected: float) -> None:
    norms = (overall_norm(torch.tensor(x)) for x in (weight, update))
    assert trust_ratio(*norms, ceiling) == expected


@pytest.mark.parametrize(
    ("grad", "square", "eps", "expected"),
    [
        ([2.0, 2.0], [1.0, 4.0], 0.0, math.sqrt(2.5)),
        ([2.0, 2.0], [1.0, 1.0], 4.0, 0.5),
        ([0.0, 0.0], [0.0, 0.0], 0.0, 0.0),
        ([], [], 1e-6, 0.0),
        (3.0, 1.0, 0.0, 3.0),
        ([1e19, 1e19], [1e38, 1e38], 1e-6, 1.0),
        ([1e-19, 1e-19], [1e-38, 1e-38], 0.0, 1.0),
    ],
)
def test_the_rms_at_the_edges(grad: Any, square: Any, eps: float, expected: float) -> None:
    g = torch.tensor(grad)
    rms = overall_norm(over_roots(g, torch.tensor(square), eps)) / math.sqrt(max(1, g.numel()))  # as the step has it
    assert rms == pytest.approx(expected, rel=1e-6)


def test_the_norm_of_a_large_layer_keeps_its_digits() -> None:
    x = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(8)) * 0.02
    assert overall_norm(x).item() == pytest.approx(x.double().norm().item(), rel=1e-6)
    assert overall_norm(torch.zeros(3, 0)) == 0


@pytest.mark.parametrize("kind", [LambAdagrad, Lamb])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e15])
def test_lamb_moves_by_its_rate_whatever_the_gradient(kind: Any, size: float) -> None:
    draw = torch.Generator().manual_seed(9)
    weight = param(torch.randn(8, 4, generator=draw), torch.float32)
    optimizer = kind([weight], lr=0.01, eps=0.0)
    for _ in range(4):
        before = weight.detach().clone()
        weight.grad = torch.randn(8, 4, generator=draw) * size
        optimizer.step()
        assert ((weight - before).norm() / before.norm()).item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", RIVALS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 2e19, -3e38])
def test_a_bad_gradient_leaves_no_trace(bad: float, kind: Any, sparse: bool) -> None:
    """A run with refused steps, the first among them, is bit for bit the run without them: the bias correction too."""
    start = [[-0.0, 1.0], [0.0, -2.0], [0.5, 0.5]]
    runs = []
    for values in ([bad, 0.1, bad, bad, 0.2, -0.3], [0.1, 0.2, -0.3]):
        weight, other = param(start, torch.float32), param([1.0], torch.float32)
        optimizer = kind([weight, other], lr=0.1, weight_decay=0.1)
        for value in values:
            before, last = weight.detach().clone(), other.detach().clone()
            rows = torch.tensor([[0.0, value], [-0.5, 0.25]])
            dense = torch.cat([rows, torch.ones(1, 2)])
            weight.grad = rows_gradient(torch.tensor([0, 1]), rows, weight) if sparse else dense
            other.grad = torch.ones(1)
            optimizer.step()
            assert not torch.equal(other, last)
            refused = value == bad or math.isnan(value)
            assert refused == torch.equal(weight, before)
            assert refused == (factor_of(optimizer.state[weight]) == 0)
            if refused:
                assert torch.equal(weight.signbit(), before.signbit())
        runs.append((weight, optimizer.state[weight]))
        assert optimizer.state[other]["bad_steps"] == 0
    (weight, state), (clean, clean_state) = runs
    assert torch.equal(weight, clean)
    assert (state["step"], state["bad_steps"], clean_state["step"]) == (6, 3, 3)
    for key in state.keys() - {"step", "bad_steps"}:
        assert torch.equal(state[key], clean_state[key]), key


@pytest.mark.parametrize("kind", RIVALS)
def test_huge_gradients_that_fit_and_lost_weights(kind: Any) -> None:
    weight = param([0.5, 0.5, NAN], torch.float32)
    optimizer = kind([weight], lr=0.1)
    for _ in range(3):
        weight.grad = torch.tensor([1e18, -0.1, 1.0])
        optimizer.step()
    assert optimizer.state[weight]["bad_steps"] == 0
    assert weight.isnan().tolist() == [False, False, True]  # a lost coordinate does not take the others along
    assert 0.1 < weight[0] < 0.5
    assert all(value.isfinite().all() for value in optimizer.state[weight].values())
    lost = param([INF, 1.0], torch.float32)
    lost.grad = torch.tensor([1.0, NAN])
    kind([lost], lr=0.1, weight_decay=0.1).step()
    assert lost.tolist() == [INF, 1.0]


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("kind", RIVALS)
def test_zero_gradients_scalars_and_empty_tensors(kind: Any, eps: float) -> None:
    zero, scalar, empty = param([1.0, -2.0]), param(3.0), param(torch.zeros(0, 4))
    optimizer = kind([zero, scalar, empty], lr=0.1, eps=eps)
    for _ in range(2):
        zero.grad, scalar.grad, empty.grad = torch.zeros_like(zero), torch.ones_like(scalar), torch.zeros_like(empty)
        optimizer.step()
        assert zero.tolist() == [1.0, -2.0]
        assert [int(optimizer.state[p]["bad_steps"]) for p in (zero, scalar, empty)] == [0, 0, 0]
        assert factor_of(optimizer.state[zero]) == factor_of(optimizer.state[empty]) == 1
    if kind is not StableAdamW:
        assert scalar.item() == pytest.approx(3.0 * 0.9**2)


@pytest.mark.parametrize("kind", RIVALS)
def test_a_sparse_step_is_the_step_of_its_rows_alone(kind: Any) -> None:
    """Weights, states and norms: rows that are not touched neither change nor count."""
    draw = torch.Generator().manual_seed(10)
    table = param(torch.randn(12, 3, generator=draw))
    optimizer = kind([table], lr=0.1, weight_decay=0.1)
    betas = optimizer.param_groups[0].get("betas", (0.0, 0.0))
    whole = start_of(kind, table)
    for t in range(1, 9):
        rows = torch.randint(0, 9, (5,), generator=draw)  # duplicates, which are summed, and rows left out for long
        values = torch.randn(5, 3, generator=draw).double() * 10 ** torch.randn((), generator=draw)
        table.grad = rows_gradient(rows, values, table)
        optimizer.step()
        seen = rows.unique().numpy()
        grad = np.zeros((12, 3))
        np.add.at(grad, rows.numpy(), values.numpy())
        # A row left out for a while is corrected by the table's count, as in SparseAdam; the paper has no such rows.
        correct = [1 - beta ** (t - 1) if kind is StableAdamW and t > 1 else 1.0 for beta in betas]
        part = Twin(whole.weight[seen], whole.mean[seen] / correct[0], whole.square[seen] / correct[1], 1.0)
        part = TWINS[kind](part, grad[seen], t, 0.1, weight_decay=0.1)
        correct = [1 - beta**t if kind is StableAdamW else 1.0 for beta in betas]
        found = (part.weight, part.mean * correct[0], part.square * correct[1])
        for array, new in zip(whole[:3], found, strict=True):
            array[seen] = new
        state = optimizer.state[table]
        np.testing.assert_allclose(table.detach(), whole.weight, 0, 1e-12)
        np.testing.assert_allclose(factor_of(state), part.factor, 1e-12, 0)
        if kind is not LambAdagrad:
            np.testing.assert_allclose(state["exp_avg"], whole.mean, 1e-12, 1e-14)
        np.testing.assert_allclose(state["sum" if kind is LambAdagrad else "exp_avg_sq"], whole.square, 1e-12, 1e-14)
    table.grad = rows_gradient(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3).double(), table)
    before = table.detach().clone()
    optimizer.step()
    assert torch.equal(table, before)
    assert (optimizer.state[table]["bad_steps"], factor_of(optimizer.state[table])) == (0, 1)


def test_stable_adamw_on_rows_is_sparse_adam_where_the_second_moment_does_not_lag() -> None:
    ours = param(torch.linspace(-1, 1, 12).reshape(4, 3))
    stable = StableAdamW([ours], lr=0.1, eps=0.0)
    theirs, adam = shadow(ours, lambda p: torch.optim.SparseAdam(p, lr=0.1, betas=(0.9, 0.99), eps=1e-300))
    values = torch.tensor([[1.0, -2.0, 0.5], [0.1, 3.0, -1.0]]).double()
    for t in range(6):
        for weight in (ours, theirs):
            weight.grad = rows_gradient(torch.tensor([0, 2]), values * 0.9**t, weight)
        stable.step()
        adam.step()
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", RIVALS)
def test_half_precision_has_wide_states_and_rounds_the_weights_only(kind: Any, dtype: torch.dtype) -> None:
    half = param([1.0, -2.0, 0.25], dtype)
    wide = param(half.detach(), torch.float32)
    optimizers = kind([half], lr=0.1), kind([wide], lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            wide.copy_(half)  # so that each step starts from the same weights
        half.grad = torch.tensor([0.3, -20.0, 0.001], dtype=dtype)
        wide.grad = half.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(half, wide.to(dtype))
        states = optimizers[0].state[half], optimizers[1].state[wide]
        for key in states[0]:
            assert states[0][key].dtype == states[1][key].dtype
            assert torch.equal(states[0][key], states[1][key]), key


@pytest.mark.parametrize("kind", RIVALS)
def test_maximize_and_rates_in_tensors(kind: Any) -> None:
    up, down, late = (param([0.5, -1.0]) for _ in range(3))
    rate = torch.tensor([0.1])
    optimizers = kind([up], lr=rate, maximize=True), kind([down], lr=0.1), kind([late], lr=rate)
    for value in (0.1, 0.25):
        rate.fill_(value)
        optimizers[1].param_groups[0]["lr"] = float(rate)
        down.grad = late.grad = torch.tensor([0.3, -0.2], dtype=torch.float64)
        up.grad = -down.grad
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(up, down)
    assert torch.equal(late, down)
    for bad in (NAN, INF):
        rate.fill_(bad)
        optimizers[2].step()
    assert torch.equal(late, down)
    assert optimizers[2].state[late]["bad_steps"] == 2


def test_a_state_of_torchs_is_taken_up_where_it_stands() -> None:
    draw = torch.Generator().manual_seed(11)
    theirs = param(torch.randn(4, 3, generator=draw))
    adamw = torch.optim.AdamW([theirs], lr=0.05, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.2)
    ours = copy.deepcopy(theirs)
    stable, lamb = StableAdamW([ours], lr=1.0), Lamb([copy.deepcopy(theirs)], lr=0.01, weight_decay=0.3)
    for step in range(8):
        theirs.grad = torch.linspace(2, 1, 12).double().reshape(4, 3) * 0.8**step
        adamw.step()
        if step == 3:
            for optimizer in (stable, lamb):
                optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
            ours.data.copy_(theirs)
        elif step > 3:
            ours.grad = theirs.grad.clone()
            stable.step()
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    group = lamb.param_groups[0]
    # A rate of LAMB is relative, and decay inside its norm: neither is what AdamW has under these names.
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.01, 0.3, (0.9, 0.99))
    with pytest.raises(CheckpointError, match="expected 'exp_avg' for Lamb"):
        lamb.load_state_dict(torch.optim.SGD([theirs], lr=0.1).state_dict() | {"state": {0: {"sum": theirs}}})


@pytest.mark.parametrize("kind", RIVALS)
def test_holds_every_promise_of_an_optimizer(kind: Any) -> None:
    check_optimizer(lambda params: kind(params, lr=0.05, weight_decay=0.01), sparse=True)


@pytest.mark.parametrize(
    ("kinds", "wrong", "message"),
    [
        (RIVALS, {"lr": -0.1}, "lr: expected a finite number, 0 or more, came -0.1"),
        (RIVALS, {"eps": NAN}, "eps: expected a finite number, 0 or more, came nan"),
        (RIVALS, {"weight_decay": -1.0}, "weight_decay: expected a finite number, 0 or more"),
        (MOMENTS, {"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\), came \(0.9, 1.0\)"),
        (MOMENTS, {"betas": (0.9,)}, "betas: expected two numbers"),
        (RIVALS[:2], {"trust_clip": 0.0}, "trust_clip: expected a number above 0, or infinity, came 0.0"),
        (RIVALS[:2], {"trust_clip": NAN}, "trust_clip: expected a number above 0"),
        (RIVALS[:1], {"initial_accumulator_value": -1.0}, "initial_accumulator_value: expected"),
        (RIVALS[:1], {"initial_accumulator_value": 0.0, "eps": 0.0}, "one must be above 0"),
    ],
)
def test_refuses_options_out_of_range(kinds: tuple[Any, ...], wrong: dict[str, Any], message: str) -> None:
    for kind in kinds:
        with pytest.raises(ConfigError, match=message):
            kind([{"params": [param([1.0])], **wrong}], lr=0.1)
