"""Gradient rules against float64 twins, torch's own clips, optax and Adam; sparse rows; properties."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from steadyrank.optim.rules import AGC, ClipGlobalNorm, ClipTensorNorm, ClipValue, CowClip, Rule
from steadyrank.optim.spikes import AdaGC, SkipSpikes, SpikeClip, ZClip
from steadyrank.optim.wrap import ClipGradients
from steadyrank.testing import forbid_host_sync

from .test_clippy import _Largest, param, rows_gradient

# Sharp enough that each of them acts on the problems below.
RULES: tuple[Rule, ...] = (
    ClipValue(0.5),
    ClipGlobalNorm(1.0),
    ClipTensorNorm(1.0),
    AGC(0.1),
    CowClip(0.3),
    AdaGC(warmup=3),
    ZClip(warmup=3, threshold=1.0),
    SpikeClip(warmup=3, threshold=50.0),
    SkipSpikes(window=4, sigmas=2.0),
)


@pytest.fixture(autouse=True)
def _sparse_checks_chosen() -> Any:
    with torch.sparse.check_sparse_tensor_invariants(enable=True):
        yield


def name_of(rule: Rule) -> str:
    return type(rule).__name__


def by_rule(rules: Sequence[Rule]) -> Any:
    return pytest.mark.parametrize("rule", rules, ids=name_of)


def sgd(params: Any, rule: Rule, **options: Any) -> ClipGradients:
    return ClipGradients(torch.optim.SGD(params, lr=0.1), rule, **options)


# --- The twins: one function for each rule, numpy, float64; `memory` is what it keeps from step to step. ---

Arrays = list[np.ndarray]
Twin = Callable[[Any, Arrays, Arrays, dict[str, Any]], Arrays]


def norm_of(gs: Arrays) -> float:
    return float(np.sqrt(sum((g**2).sum() for g in gs)))


def twin_value(rule: ClipValue, ws: Arrays, gs: Arrays, memory: dict[str, Any]) -> Arrays:
    return [np.clip(g, -rule.limit, rule.limit) for g in gs]


def twin_global(rule: ClipGlobalNorm, ws: Arrays, gs: Arrays, memory: dict[str, Any]) -> Arrays:
    return [g * min(1.0, rule.max_norm / (norm_of(gs) + 1e-6)) for g in gs]


def twin_tensor(rule: ClipTensorNorm, ws: Arrays, gs: Arrays, memory: dict[str, Any]) -> Arrays:
    return [g * min(1.0, rule.max_norm / norm_of([g])) for g in gs]


def twin_agc(rule: AGC, ws: Arrays, gs: Arrays, memory: dict[str, Any]) -> Arrays:
    def unit(w: np.ndarray, g: np.ndarray) -> np.ndarray:
        limit = rule.clipping * max(norm_of([w]), rule.floor)
        return g * limit / norm_of([g]) if norm_of([g]) > limit else g

    return [
        np.stack([unit(*row) for row in zip(w, g, strict=True)]) if g.ndim > 1 else unit(w, g)
        for w, g in zip(ws, gs, strict=True)
    ]


def twin_cow(rule: CowClip, ws: Arrays, gs: Arrays, memory: dict[str, Any]) -> Arrays:
    def row(w: np.ndarray, g: np.ndarray) -> np.ndarray:
        return g * min(1.0, max(rule.ratio * norm_of([w]), rule.floor) / norm_of([g]))

    return [np.stack([row(*pair) for pair in zip(w, g, strict=True)]) for w, g in zip(ws, gs, strict=True)]


def twin_adagc(rule: AdaGC, ws: Arrays, gs: Arrays, memory: dict[str, Any]) -> Arrays:
    step = memory["step"] = memory.get("step", 0) + 1
    clipped = []
    for i, g in enumerate(gs):
        level = memory.get(i, np.inf)
        if step <= rule.warmup:
            g = g * min(1.0, rule.max_norm / norm_of(gs))
            memory[i] = min(level, norm_of([g]))
        else:
            g = g * min(1.0, rule.relative * level / norm_of([g]))
            memory[i] = rule.decay * level + (1 - rule.decay) * norm_of([g])
        clipped.append(g)
    return clipped


def twin_zclip(rule: ZClip, ws: Arrays, gs: Arrays, memory: dict[str, Any]) -> Arrays:
    norm, first = norm_of(gs), memory.setdefault("first", [])
    if len(first) < rule.warmup:
        first.append(norm)
        memory["mean"], memory["var"] = np.mean(first), np.var(first)
        return gs
    mean, std = memory["mean"], np.sqrt(memory["var"])
    z = (norm - mean) / (std + 1e-6)
    kept = mean + rule.threshold**2 * std / z if z > rule.threshold else norm
    memory["mean"] = rule.decay * mean + (1 - rule.decay) * kept
    memory["var"] = rule.decay * memory["var"] + (1 - rule.decay) * (kept - memory["mean"]) ** 2
    return [g * kept / norm for g in gs]


def twin_spike(rule: SpikeClip, ws: Arrays, gs: Arrays, memory: dict[str, Any]) -> Arrays:
    step = memory["step"] = memory.get("step", 0) + 1
    clipped = []
    for i, g in enumerate(gs):
        square = memory.get(i, np.zeros_like(g))
        if step > rule.warmup:
            g = np.where(g**2 > rule.threshold * square, np.sign(g) * np.sqrt(rule.threshold * square), g)
        memory[i] = rule.decay * square + (1 - rule.decay) * g**2
        clipped.append(g)
    return clipped


def twin_skip(rule: SkipSpikes, ws: Arrays, gs: Arrays, memory: dict[str, Any]) -> Arrays:
    norm, norms = norm_of(gs), memory.setdefault("norms", [])
    last = norms[-rule.window :]
    skip = len(last) >= min(rule.window, max(20, rule.window // 2)) and (
        norm > np.mean(last) + rule.sigmas * np.std(last, ddof=1)
    )
    norms.append(norm)
    return [np.zeros_like(g) if skip else g for g in gs]


TWINS: dict[str, Twin] = {
    "ClipValue": twin_value,
    "ClipGlobalNorm": twin_global,
    "ClipTensorNorm": twin_tensor,
    "AGC": twin_agc,
    "CowClip": twin_cow,
    "AdaGC": twin_adagc,
    "ZClip": twin_zclip,
    "SpikeClip": twin_spike,
    "SkipSpikes": twin_skip,
}


@by_rule(RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_its_twin_step_by_step(rule: Rule, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(7)
    params = [param(torch.randn(shape, generator=draw), dtype) for shape in ((4, 3), (5,), (2, 2, 2))]
    optimizer = sgd(params, rule)
    weights = [p.detach().double().numpy().copy() for p in params]
    memory: dict[str, Any] = {}
    close, acted = (1e-12 if dtype == torch.float64 else 1e-5), 0
    for _ in range(40):
        scale = 10 ** (0.7 * torch.randn((), generator=draw))
        grads = [torch.randn(p.shape, generator=draw).to(dtype) * scale for p in params]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        expected = TWINS[name_of(rule)](rule, weights, [g.double().numpy() for g in grads], memory)
        for p, w, g, before in zip(params, weights, expected, grads, strict=True):
            w -= 0.1 * g
            assert p.grad is not None
            np.testing.assert_allclose(p.grad, g, rtol=close, atol=close * np.abs(g).max())
            np.testing.assert_allclose(p.detach(), w, rtol=close, atol=close * np.abs(w).max())
            factor, size = float(optimizer.state[p]["grad_factor"]), before.abs().double().numpy()
            assert 0 <= factor <= 1
            np.testing.assert_allclose(factor, (np.abs(g) / size).min(), rtol=1e-4, atol=1e-12)
            acted += factor < 1
    assert 0 < acted < 3 * 40


# --- What is trusted ---


def grads_of(shapes: Sequence[tuple[int, ...]], scale: float, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(8)
    params = [param(torch.randn(shape, generator=draw), dtype) for shape in shapes]
    for p in params:
        p.grad = scale * torch.randn(p.shape, generator=draw).to(dtype)
    return params


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_equals_torchs_clips(scale: float) -> None:
    shapes = [(4, 3), (5,), (), (0, 3)]
    for rule, clip in (
        (ClipValue(0.5), lambda ps: torch.nn.utils.clip_grad_value_(ps, 0.5)),
        (ClipGlobalNorm(1.0), lambda ps: torch.nn.utils.clip_grad_norm_(ps, 1.0)),
        (ClipTensorNorm(1.0), lambda ps: [torch.nn.utils.clip_grad_norm_([p], 1.0) for p in ps]),
    ):
        ours, theirs = grads_of(shapes, scale), grads_of(shapes, scale)
        sgd(ours, rule).step()
        clip(theirs)
        for a, b in zip(ours, theirs, strict=True):
            # Torch adds 1e-6 to the norm; for one tensor we do not.
            torch.testing.assert_close(a.grad, b.grad, rtol=2e-6 if isinstance(rule, ClipTensorNorm) else 3e-7, atol=0)


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_agc_equals_optax(scale: float) -> None:
    optax = pytest.importorskip("optax")
    ours = grads_of([(4, 3), (5,)], scale)
    # Their weights are [in, out].
    grads = [np.asarray(p.grad).T for p in ours]
    clip = optax.adaptive_grad_clip(0.1)
    weights = [p.detach().numpy().T.copy() for p in ours]
    theirs, _ = clip.update(grads, clip.init(weights), weights)
    sgd(ours, AGC(0.1)).step()
    for p, g in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(p.grad, np.asarray(g).T, rtol=1e-6)


def test_torchs_clip_takes_no_sparse_gradients_and_ours_sums_duplicates_first() -> None:
    table = param(torch.zeros(9, 1), torch.float64)
    table.grad = rows_gradient([5, 2, 5], torch.tensor([[3.0], [8.0], [3.0]], dtype=torch.float64), table)
    with pytest.raises(NotImplementedError, match="backend"):
        torch.nn.utils.clip_grad_norm_([table], 1.0)
    sgd([table], ClipGlobalNorm(1.0)).step()
    # 10 is the norm of (8, 3 + 3); that of the stored values is 9.06.
    assert table.grad.is_coalesced()
    expected = torch.tensor([[0.8], [0.6]], dtype=torch.float64)
    torch.testing.assert_close(table.grad.values(), expected, rtol=2e-7, atol=0)


def test_torchs_clip_spreads_nan_and_ours_refuses_the_step() -> None:
    ours, theirs = grads_of([(3,), (2,)], 1.0), grads_of([(3,), (2,)], 1.0)
    for params in (ours, theirs):
        assert params[0].grad is not None
        params[0].grad[1] = torch.nan
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert theirs[1].grad is not None
    assert theirs[1].grad.isnan().all()
    before = [p.detach().clone() for p in ours]
    sgd(ours, ClipGlobalNorm(1.0)).step()
    for p, held in zip(ours, before, strict=True):
        assert torch.equal(p, held)
        assert torch.equal(p.grad, torch.zeros_like(p))


def test_the_norm_of_bfloat16_gradients_is_computed_in_float32() -> None:
    ours, theirs = param(torch.ones(1000), torch.bfloat16), param(torch.ones(1000), torch.bfloat16)
    ours.grad = theirs.grad = torch.full((1000,), 0.1, dtype=torch.bfloat16)
    optimizer = sgd([ours], ClipGlobalNorm(1.0))
    exact = float(ours.grad.double().norm())
    optimizer.step()
    assert optimizer.state[ours]["grad_factor"].item() == pytest.approx(1 / exact, rel=1e-5)
    assert ours.grad.dtype == torch.bfloat16
    assert float(torch.nn.utils.get_total_norm([theirs.grad])) != pytest.approx(exact, rel=1e-5)


def test_spike_clip_remembers_what_adam_remembers() -> None:
    weight = param(torch.ones(4, 3), torch.float64)
    adam = torch.optim.Adam([weight], lr=0.01, betas=(0.9, 0.99))
    optimizer = ClipGradients(adam, SpikeClip(threshold=30.0, decay=0.99, warmup=2))
    draw, acted = torch.Generator().manual_seed(9), 0
    for _ in range(30):
        weight.grad = torch.randn(4, 3, generator=draw).double() ** 3
        optimizer.step()
        acted += int(optimizer.state[weight]["grad_factor"] < 1)
        square = optimizer.state[weight]["grad_square_mean"]
        torch.testing.assert_close(square, adam.state[weight]["exp_avg_sq"], rtol=1e-12, atol=0)
    assert acted > 3


def test_spike_clip_has_effect() -> None:
    # In neighbouring libraries it writes to a copy, `g[mask].div_()`, and changes nothing.
    weight = param(torch.zeros(2))
    optimizer = sgd([weight], SpikeClip(threshold=10.0, decay=0.9, warmup=1))
    weight.grad = torch.tensor([1.0, 1.0])
    optimizer.step()
    weight.grad = torch.tensor([-1000.0, 0.5])
    optimizer.step()
    torch.testing.assert_close(weight.grad, torch.tensor([-1.0, 0.5]))
    torch.testing.assert_close(weight.detach(), torch.tensor([0.0, -0.15]))
    assert optimizer.state[weight]["grad_factor"].item() == pytest.approx(1e-3)


def test_a_coordinate_that_never_had_a_gradient_is_not_a_spike() -> None:
    weight = param(torch.zeros(2))
    optimizer = sgd([weight], SpikeClip(warmup=2))
    for _ in range(4):
        weight.grad = torch.tensor([1.0, 0.0])
        optimizer.step()
    weight.grad = torch.tensor([1.0, 3.0])
    optimizer.step()
    assert weight.grad.tolist() == [1.0, 3.0]


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_gradient_of_zeros_does_not_freeze_a_tensor_under_adagc(warmup: int) -> None:
    weight = param(torch.zeros(2))
    optimizer = sgd([weight], AdaGC(warmup=warmup))
    for value in (0.0, 1.0, 0.0, 1.0, 1.0, 1.0):
        weight.grad = torch.full((2,), value)
        optimizer.step()
        assert torch.equal(weight.grad > 0, torch.full((2,), value > 0))
    assert int(optimizer.state[weight]["grad_norm_count"]) == 4


def test_cowclip_counts_how_often_an_id_came_up() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = sgd(table.parameters(), CowClip(ratio=0.01))
    ids = torch.tensor([7, 1, 7, 7, 3])
    table(ids).sum().mul(100.0).backward()
    before = table.weight.detach().clone()
    optimizer.step()
    grad = table.weight.grad
    assert grad is not None
    norms = 0.01 * before.norm(dim=1) * torch.bincount(ids, minlength=10)
    torch.testing.assert_close(grad.to_dense().norm(dim=1), norms)
    # Summed before it comes here, and dense: once each.
    for summed in (True, False):
        table.zero_grad()
        table(ids).sum().mul(100.0).backward()
        assert table.weight.grad is not None
        table.weight.grad = table.weight.grad.coalesce() if summed else table.weight.grad.to_dense()
        before = table.weight.detach().clone()
        optimizer.step()
        grad = table.weight.grad.to_dense()
        torch.testing.assert_close(grad.norm(dim=1)[[1, 3, 7]], 0.01 * before.norm(dim=1)[[1, 3, 7]])


# --- Sparse gradients ---


@by_rule(RULES)
def test_sparse_equals_dense_on_the_touched_rows(rule: Rule) -> None:
    draw = torch.Generator().manual_seed(10)
    sparse = param(torch.randn(20, 4, generator=draw), torch.float64)
    dense = param(sparse.detach().clone(), torch.float64)
    optimizers = sgd([sparse], rule), sgd([dense], rule)
    start, rows = sparse.detach().clone(), torch.tensor([3, 11, 5])
    acted = 0
    for _ in range(12):
        values = torch.randn(3, 4, generator=draw).double() * 10 ** torch.randn((), generator=draw)
        sparse.grad = rows_gradient(rows.tolist(), values, sparse)
        dense.grad = torch.zeros_like(dense).index_add_(0, rows, values)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(sparse, dense, atol=1e-14, rtol=1e-14)
        torch.testing.assert_close(sparse.grad.to_dense(), dense.grad, atol=0, rtol=1e-13)
        factors = [o.state[p]["grad_factor"] for o, p in zip(optimizers, (sparse, dense), strict=True)]
        torch.testing.assert_close(*factors, atol=0, rtol=1e-13)
        acted += int(factors[0] < 1)
    assert acted
    others = [i for i in range(20) if i not in rows.tolist()]
    assert torch.equal(sparse[others], start[others])


@by_rule(RULES)
def test_a_sparse_step_costs_what_the_touched_rows_cost(rule: Rule) -> None:
    table = param(torch.zeros(100_000, 4))
    optimizer = sgd([table], rule)
    for _ in range(2):
        table.grad = rows_gradient([5, 9, 5], torch.ones(3, 4), table)
        with _Largest() as seen, forbid_host_sync():
            optimizer.step()
    assert seen.largest == 2 * 4


def test_spike_clip_warms_up_each_row_by_itself() -> None:
    table = param(torch.zeros(3, 1))
    optimizer = sgd([table], SpikeClip(threshold=4.0, decay=0.5, warmup=2))
    for rows, value in (([0, 1], 1.0), ([0], 1.0), ([0, 1], 100.0)):
        table.grad = rows_gradient(rows, torch.full((len(rows), 1), value), table)
        optimizer.step()
    # Row 0 had its two steps, row 1 did not. v of row 0 was 0.75.
    torch.testing.assert_close(table.grad.to_dense(), torch.tensor([[3.0**0.5], [100.0], [0.0]]))
    assert optimizer.state[table]["grad_square_count"].tolist() == [3.0, 2.0, 0.0]


# --- Properties ---

sizes = st.floats(-1e3, 1e3).map(lambda x: round(x, 6))


@by_rule([ClipValue(0.5), ClipGlobalNorm(1.0), ClipTensorNorm(1.0), AGC(0.1), CowClip(0.3)])
@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.tuples(sizes, sizes, sizes, sizes), min_size=1, max_size=5))
def test_a_gradient_never_grows_nor_turns_and_clipping_twice_is_clipping_once(rule: Rule, rows: list[Any]) -> None:
    weight, grad = torch.tensor(rows, dtype=torch.float64).chunk(2, dim=1)
    p = param(weight, torch.float64)
    p.grad = grad.clone()
    optimizer = ClipGradients(torch.optim.SGD([p], lr=0.0), rule)
    optimizer.step()
    once = p.grad.clone()
    factor = optimizer.state[p]["grad_factor"]
    assert 0 <= factor <= 1
    assert torch.all(once.abs() <= grad.abs())
    assert torch.all(once * grad >= 0)
    if factor == 1:
        assert torch.equal(once, grad)
    optimizer.step()
    torch.testing.assert_close(p.grad, once, rtol=2e-6, atol=0)
