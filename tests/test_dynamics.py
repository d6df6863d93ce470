"""Every reading of the training dynamics against a twin in float64, and what is read where there is nothing to read."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from steadyrank import ClipGradients, ClippyAdagrad, ClippyAdam, ClipUpdates, LambAdagrad, StableAdamW
from steadyrank.monitors.dynamics import ClipFactors, Dynamics
from steadyrank.monitors.readings import fetch
from steadyrank.optim import AGC, ClipTensorNorm
from steadyrank.testing import forbid_host_sync

Make = Callable[[Iterable[Any]], Optimizer]
MAKE: dict[str, Make] = {
    "sgd": lambda named: torch.optim.SGD(named, lr=0.3),
    "sgd_tensor_rate": lambda named: torch.optim.SGD(named, lr=torch.tensor([0.3])),
    "adagrad": lambda named: torch.optim.Adagrad(named, lr=0.3, initial_accumulator_value=0.1),
    "adam": lambda named: torch.optim.Adam(named, lr=torch.tensor(0.05)),
    "clippy": lambda named: ClippyAdagrad(named, lr=0.9),
    "clip_updates": lambda named: ClipUpdates(torch.optim.Adam(named, lr=0.2)),
    "lamb": lambda named: LambAdagrad(named, lr=0.1),
    "stable_adamw": lambda named: StableAdamW(named, lr=0.1),
}
SHAPES = {
    "matrix": (6, 4),
    "vector": (5,),
    "scalar": (),
    "cube": (2, 3, 4),
    "zero_weight": (3, 4),
    "zero_gradient": (7,),
}


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    made = {name: nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for name, shape in SHAPES.items()}
    made["zero_weight"].data.zero_()
    return made | {"empty": nn.Parameter(torch.zeros(0, 4, dtype=dtype)), "idle": nn.Parameter(torch.ones(3))}


def give_gradients(held: dict[str, nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for name, p in held.items():
        drawn = torch.randn(p.shape, generator=draw) * 10.0 ** (step % 3 - 1)
        p.grad = None if name == "idle" else (0 * drawn if name == "zero_gradient" else drawn).to(p.dtype)


def read_step(held: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, float]:
    dynamics = Dynamics(held.items(), [optimizer])
    with forbid_host_sync():
        dynamics.before()
    optimizer.step()
    with forbid_host_sync():
        found = dynamics.after()
    return fetch(found)


def state_of(optimizer: Optimizer, p: Tensor) -> dict[str, Any]:
    inner = getattr(optimizer, "optimizer", optimizer)
    return {**inner.state.get(p, {}), **optimizer.state.get(p, {})}


def twin(w: np.ndarray, g: np.ndarray, now: np.ndarray, lr: float, sigma: float) -> dict[str, float]:
    """What is read of one parameter that took a step at the rate `lr`, scaled by `sigma`."""
    norm, u = np.linalg.norm, w - now
    over = np.max(abs(u) / (0.5 * abs(w) + 0.01))
    with np.errstate(divide="ignore", invalid="ignore"):
        units = zip(g, w, strict=True) if g.ndim > 1 else [(g, w)]
        agc = [0.01 * max(norm(wu), 1e-3) / norm(gu) for gu, wu in units if norm(gu) > 0]
        return {
            "gradient_norm": norm(g),
            "weight_norm": norm(w),
            "update_norm": norm(u),
            "gradient_over_weight": np.float64(norm(g)) / norm(w),
            "update_over_weight": np.float64(norm(u)) / norm(w),
            "update_max": np.max(abs(u)),
            "update_over_weight_max": np.max(abs(u) / np.maximum(abs(w), 1e-3)),
            "update_over_bound": over,
            "direction_max": np.max(abs(u)) / (lr * sigma),
            "factor_gc": min(1.0, 0.1 / norm(g)) if norm(g) else 1.0,
            "factor_agc": min([1.0, *agc]),
            "factor_lamb": norm(w) / norm(u / (lr * sigma)) if norm(w) and norm(u) else 1.0,
            "factor_clippy": min(1.0, sigma / over) if over else 1.0,
        }


def quantiles(accumulator: np.ndarray) -> dict[str, float]:
    flat = accumulator.ravel()
    even = np.sort(flat[np.arange(256) * flat.size // 256])
    return {f"accumulator_q{round(100 * q):02d}": even[round(q * 255)] for q in (0.01, 0.5, 0.99)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_every_reading_is_that_of_the_twin(name: str, dtype: torch.dtype) -> None:
    held = parameters(dtype)
    optimizer = MAKE[name](held.items())
    for step in range(6):
        give_gradients(held, step)
        before = {key: (p.detach().double().numpy().copy(), p.grad) for key, p in held.items()}
        found = read_step(held, optimizer)
        labels = {reading.split("/")[1] for reading in found}
        assert labels == held.keys() - {"empty", "idle"}
        for key in labels:
            p, (w, grad) = held[key], before[key]
            state = state_of(optimizer, p)
            sigma = float(state.get("clip_factor", state.get("trust_ratio", 1.0)))
            lr = float(optimizer.param_groups[0]["lr"])
            expected = twin(w, grad.double().numpy(), p.detach().double().numpy(), lr, sigma)
            squares = state.get("sum", state.get("exp_avg_sq"))
            expected |= {} if squares is None else quantiles(squares.double().numpy())
            mine = {reading.split("/")[0]: value for reading, value in found.items() if reading.endswith("/" + key)}
            assert mine == pytest.approx(expected, rel=1e-5), (step, key)


def test_groups_have_their_own_rates_and_a_parameter_that_nobody_holds_has_none() -> None:
    held = parameters()
    slow, fast = held["matrix"], held["cube"]
    sgd = torch.optim.SGD([{"params": [slow], "lr": 0.1}, {"params": [fast], "lr": torch.tensor(0.4)}], lr=1.0)
    give_gradients(held, 1)
    found = read_step(held, sgd)
    for name, p in (("matrix", slow), ("cube", fast)):
        assert found[f"direction_max/{name}"] == pytest.approx(float(p.grad.abs().max()), rel=1e-6)
    assert found["update_norm/vector"] == 0
    assert math.isnan(found["direction_max/vector"])
    assert math.isnan(found["factor_lamb/vector"])


def test_weights_of_different_dtypes_lie_side_by_side() -> None:
    held = {"wide": parameters()["matrix"], "narrow": parameters(torch.bfloat16)["cube"]}
    optimizer = ClippyAdagrad(held.items(), lr=0.5)
    give_gradients(held, 0)
    expected = {name: float(torch.linalg.vector_norm(p.detach().double())) for name, p in held.items()}
    found = read_step(held, optimizer)
    assert {name: found[f"weight_norm/{name}"] for name in held} == pytest.approx(expected, rel=1e-6)


def test_the_norm_of_a_large_matrix_is_exact() -> None:
    held = {"large": nn.Parameter(torch.full((2048, 1024), 0.1))}
    optimizer = torch.optim.SGD(held.values(), lr=0.1)
    held["large"].grad = torch.full((2048, 1024), 0.01)
    found = read_step(held, optimizer)
    root = math.sqrt(2048 * 1024)
    assert found["weight_norm/large"] == pytest.approx(0.1 * root, rel=1e-5)
    assert found["gradient_norm/large"] == pytest.approx(0.01 * root, rel=1e-5)
    assert found["update_norm/large"] == pytest.approx(0.001 * root, rel=1e-4)


def test_the_factor_of_clippy_is_the_one_that_clippy_used() -> None:
    held = parameters()
    optimizer = ClippyAdagrad(held.items(), lr=0.9)  # the paper's thresholds, in standard form
    seen = []
    for step in range(6):
        give_gradients(held, step)
        found = read_step(held, optimizer)
        used = fetch_factors(held, optimizer)
        for name in SHAPES:
            assert found[f"factor_clippy/{name}"] == pytest.approx(used[name], rel=1e-6)
            seen.append(used[name])
    assert min(seen) < 0.1
    assert max(seen) == 1


def fetch_factors(held: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, float]:
    return {name: float(factor) for name, factor in ClipFactors(held.items(), [optimizer]).read().items()}


@pytest.mark.parametrize(("rule", "area"), [(AGC(), "factor_agc"), (ClipTensorNorm(0.1), "factor_gc")], ids=str)
def test_the_factors_of_gradient_clipping_are_those_that_it_used(rule: Any, area: str) -> None:
    held = parameters(torch.float32)
    optimizer = ClipGradients(torch.optim.Adagrad(held.items(), lr=0.1), rule)
    for step in range(6):
        give_gradients(held, step)
        norms = {name: float(torch.linalg.vector_norm(held[name].grad)) for name in SHAPES}
        found = read_step(held, optimizer)
        for name in SHAPES:
            assert found[f"{area}/{name}"] == pytest.approx(float(optimizer.state[held[name]]["grad_factor"]), rel=1e-6)
            # As it came to the optimizer, which then clipped it in place.
            assert found[f"gradient_norm/{name}"] == pytest.approx(norms[name], rel=1e-6)


def test_the_factor_of_lamb_is_its_trust_ratio_under_adagrad_and_under_lamb() -> None:
    plain, scaled = parameters(), parameters()
    adagrad = torch.optim.Adagrad(plain.items(), lr=0.3, initial_accumulator_value=0.1, eps=0.0)
    lamb = LambAdagrad(scaled.items(), lr=0.01, initial_accumulator_value=0.1, eps=0.0)
    give_gradients(plain, 2)
    give_gradients(scaled, 2)
    found, under_lamb = read_step(plain, adagrad), read_step(scaled, lamb)
    for name in SHAPES:
        ratio = float(lamb.state[scaled[name]]["trust_ratio"])
        assert found[f"factor_lamb/{name}"] == pytest.approx(ratio, rel=1e-6)
        assert under_lamb[f"factor_lamb/{name}"] == pytest.approx(ratio, rel=1e-6)


UNKNOWN = ("direction_max", "factor_lamb", "factor_clippy")


@pytest.mark.parametrize("make", [MAKE["clippy"], lambda named: ClippyAdam(named, lr=0.1), MAKE["clip_updates"]])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_refused_gradient_shows_and_the_step_that_was_not_made_has_no_direction(make: Make, bad: float) -> None:
    held = parameters()
    optimizer = make(held.items())
    for step in range(2):
        give_gradients(held, step)
        optimizer.step()
    give_gradients(held, 2)
    held["matrix"].grad[1, 2] = bad
    found = read_step(held, optimizer)
    shown = found["gradient_norm/matrix"]
    assert math.isnan(shown) if math.isnan(bad) else shown == math.inf
    for area in ("factor_gc", "factor_agc"):
        value = found[f"{area}/matrix"]
        assert math.isnan(value) if math.isnan(bad) else value == 0
    assert all(found[f"{area}/matrix"] == 0 for area in ("update_norm", "update_max", "update_over_bound"))
    assert all(math.isnan(found[f"{area}/matrix"]) for area in UNKNOWN)
    assert found["weight_norm/matrix"] > 0
    others = [value for name, value in found.items() if name.endswith(("/vector", "/cube"))]
    assert np.isfinite(others).all()


def test_without_a_guard_what_is_lost_shows_in_the_update() -> None:
    held = parameters()
    optimizer = torch.optim.SGD(held.values(), lr=0.1)
    give_gradients(held, 0)
    held["matrix"].grad[1, 2] = math.nan
    found = read_step(held, optimizer)
    assert math.isnan(found["update_norm/matrix"])
    assert found["update_max/matrix"] == found["update_over_bound/matrix"] == math.inf
    assert found["factor_clippy/matrix"] == 0
    give_gradients(held, 1)
    assert math.isnan(read_step(held, optimizer)["weight_norm/matrix"])


def test_a_rate_of_zero_has_no_direction() -> None:
    held = parameters()
    give_gradients(held, 0)
    found = read_step(held, torch.optim.SGD(held.values(), lr=0.0))
    assert math.isnan(found["direction_max/matrix"])
    assert math.isnan(found["factor_lamb/matrix"])
    assert found["factor_clippy/matrix"] == 1


def test_a_quick_look_is_the_same_ratio_of_the_matrices_alone() -> None:
    held = parameters()
    optimizer = MAKE["adam"](held.items())
    give_gradients(held, 0)
    full, quick = (Dynamics(held.items(), [optimizer]) for _ in range(2))
    full.before()
    quick.before(matrices=True)
    optimizer.step()
    found, expected = fetch(quick.look()), fetch(full.after())
    assert found == {
        f"update_over_bound/{n}": expected[f"update_over_bound/{n}"] for n in ("matrix", "cube", "zero_weight")
    }
    assert quick.look() == full.after() == []


def test_nothing_is_read_without_a_gradient_or_of_a_sparse_one() -> None:
    table = nn.Parameter(torch.ones(4, 2))
    dynamics = Dynamics([("table", table)], [torch.optim.SGD([table], lr=0.1)])
    dynamics.before()
    assert dynamics.after() == []
    table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2), check_invariants=True)
    dynamics.before()
    assert dynamics.after() == []


@given(order=st.permutations(list(SHAPES)), seed=st.integers(0, 5), name=st.sampled_from(["adagrad", "clippy"]))
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_parameters_is_irrelevant_and_factors_lie_between_0_and_1(
    order: list[str], seed: int, name: str
) -> None:
    found = []
    for names in (list(SHAPES), order):
        held = parameters()
        held = {each: held[each] for each in names}
        optimizer = MAKE[name](held.items())
        draw = {each: np.random.default_rng([seed, len(each)]) for each in names}
        for _ in range(2):
            for each, p in held.items():
                p.grad = torch.from_numpy(np.asarray(draw[each].normal(size=p.shape)))
            found_now = read_step(held, optimizer)
        found.append(found_now)
    assert found[0] == found[1]
    for reading, value in found[0].items():
        assert not reading.startswith(("factor_gc", "factor_agc", "factor_clippy")) or 0 <= value <= 1
