"""Clippy for optax against the authors' code and optax's own parts, and the properties that it promises."""

import doctest
import functools
import inspect
import io
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steadyrank.errors import ConfigError

from .test_clippy import CASES, FORMS, assert_near, golden, options

optax = pytest.importorskip("optax")

import jax  # noqa: E402  # as what follows: only where optax is
import jax.numpy as jnp  # noqa: E402

from steadyrank.optim import optax as ours  # noqa: E402


def x64(dtype: Any) -> Any:
    return jax.enable_x64(True) if dtype == np.float64 else nullcontext()


SIZE = 36  # of the largest recorded weight


def padded(values: Any, dtype: Any) -> Any:
    """Return values as a vector with zeros behind: they move nothing and set no limit, and one program serves all."""
    flat = np.ravel(np.asarray(values, dtype))
    return jnp.asarray(np.pad(flat, (0, SIZE - flat.size)))


def dense(step: dict[str, Any], like: Any) -> Any:
    """Return a recorded gradient; a sparse one gets zeros in the rows that it leaves out, for the same reason."""
    if "rows" not in step:
        return step["grad"]
    full = np.zeros_like(like)
    np.add.at(full, step["rows"], step["grad"])
    return full


def near(found: Any, expected: Any, atol: float, rtol: float = 0.0) -> None:
    assert_near(torch.tensor(np.asarray(found)), np.asarray(expected).tolist(), atol, rtol)


@functools.partial(jax.jit, static_argnums=0)
def recorded_step(form: str, given_options: Any, grad: Any, state: Any, weight: Any) -> Any:
    optimizer = ours.clippy_adagrad(given_options.pop("lr"), accumulator=form, **given_options)
    updates, state = optimizer.update(grad, state, weight)
    return optax.apply_updates(weight, updates), state


@pytest.mark.parametrize("name", CASES)
def test_equals_the_authors_code(name: str) -> None:
    case, given_options = golden(name), options(golden(name))
    dtype, exact, form = np.dtype(case["dtype"]), case["dtype"] == "float64", given_options.pop("accumulator")
    last, first = np.asarray(case["initial_weight"]), given_options["initial_accumulator_value"]
    moved, size = 0.0, last.size
    with x64(dtype):
        weight = padded(last, dtype)
        state = ours.clippy_adagrad(initial_accumulator_value=first).init(weight)
        for number, step in enumerate(case["steps"], start=1):
            weight, state = recorded_step(form, given_options, padded(dense(step, last), dtype), state, weight)
            moved += np.abs(np.array(step["weight"]) - last).max()
            last, total = np.array(step["weight"]), np.array(step["accumulator"])
            # As in test_clippy, where the tolerances are explained.
            close, ulp = (1e-12, 0.0) if exact else (1e-5, number * 2**-24)
            near(np.asarray(weight)[:size], last.ravel(), close * moved + ulp * np.abs(last).max())
            grown = np.abs(total - first).max()
            near(np.asarray(state.sum)[:size], total.ravel(), close * grown + ulp * np.abs(total).max())
            near(state.clip_factor, step["clipping_factor"], 1e-12, 1e-7 if exact else 3e-5)
        assert weight.dtype == state.sum.dtype == dtype
        assert not np.asarray(weight)[size:].any()
    assert (int(state.count), int(state.bad_steps)) == (len(case["steps"]), 0)


def some_params(dtype: Any = np.float32) -> Any:
    draw = np.random.default_rng(3)
    shapes = {"dense": (5, 4), "bias": (4,), "scale": (), "empty": (0, 3)}
    return {name: jnp.asarray(draw.normal(size=shape) * 0.1, dtype) for name, shape in shapes.items()}


def some_grads(params: Any, seed: int) -> Any:
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape) * 10 ** draw.normal(), p.dtype), params)


def run(optimizer: Any, dtype: Any = np.float32, steps: int = 10) -> Any:
    """Return parameters and state after some steps, on the host."""
    with x64(dtype):
        params, update = some_params(dtype), jax.jit(optimizer.update)
        state = optimizer.init(params)
        for seed in range(steps):
            updates, state = update(some_grads(params, seed), state, params)
            params = optax.apply_updates(params, updates)
    return jax.device_get((params, state))


def test_the_standard_form_is_a_chain_of_optaxs_parts() -> None:
    rate = optax.linear_schedule(0.5, 0.2, 8)
    chain = optax.chain(
        optax.scale_by_rss(0.1, 1e-7), optax.scale_by_learning_rate(rate), ours.clip_by_reference(0.5, 0.01)
    )
    params, state = run(ours.clippy_adagrad(rate), np.float64)
    chained, (rss, _, clip) = run(chain, np.float64)
    for one, two in ((params, chained), (state.sum, rss.sum_of_squares), (state.clip_factor, clip.clip_factor)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12, rtol=0), one, two)
    assert 0 < state.clip_factor["dense"] < 1
    assert state.clip_factor["empty"] == 1


def test_without_a_bound_it_is_optaxs_adagrad() -> None:
    params, state = run(ours.clippy_adagrad(0.3, absolute_threshold=np.inf), np.float64)
    plain, _ = run(optax.adagrad(0.3), np.float64)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12, rtol=0), params, plain)
    assert all(factor == 1 for factor in jax.tree.leaves(state.clip_factor))


@jax.jit
def one_step(weight: Any, grad: Any, total: Any, lr: Any, relative: Any, absolute: Any) -> Any:
    """Return change and factor of each form, and of `clip_by_reference` on plain descent."""
    limits = {"variable_relative_threshold": relative, "absolute_threshold": absolute}
    found = []
    for form in FORMS:
        optimizer = ours.clippy_adagrad(lr, accumulator=form, **limits)
        state = optimizer.init(weight)._replace(sum=total)
        change, state = optimizer.update(grad, state, weight)
        full = -lr * grad * jax.lax.rsqrt(total + (grad**2 if form == "standard" else 0) + 1e-7)
        found.append((change, full, state.clip_factor))
    clip = ours.clip_by_reference(**limits)
    change, state = clip.update(-lr * grad, clip.init(weight), weight)
    return [*found, (change, -lr * grad, state.clip_factor)]


# Rounded, so that nothing is subnormal: XLA may take such a number for zero.
numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 6))
vectors = st.lists(st.tuples(numbers, numbers, st.floats(0, 1e3)), min_size=5, max_size=5)


@settings(deadline=None, max_examples=60)
@given(vectors=vectors, lr=numbers.map(abs), relative=numbers.map(abs), absolute=numbers.map(abs))
def test_no_coordinate_leaves_its_bound(vectors: list[Any], lr: float, relative: float, absolute: float) -> None:
    weight, grad, total = np.array(vectors).T
    with x64(np.float64):
        found = jax.device_get(one_step(weight, grad, total, lr, relative, absolute))
    bound = relative * np.abs(weight) + absolute
    for change, full, factor in found:
        assert 0 <= factor <= 1
        assert np.all(np.abs(change) <= bound * (1 + 1e-12))
        np.testing.assert_allclose(change, factor * full, atol=1e-12, rtol=1e-9)
        if np.all(np.abs(full) <= bound):
            assert factor == pytest.approx(1, abs=1e-12)
        else:
            assert np.any(np.abs(change) >= bound * (1 - 1e-9))


@pytest.mark.parametrize(
    ("delta", "bound", "expected"),
    [
        ([0.0, 1.0], [0.0, 2.0], 1.0),
        ([1e-30, 1.0], [0.0, 2.0], 0.0),
        ([np.inf, 1.0], [1.0, 2.0], 0.0),
        ([np.nan, 4.0], [1.0, 2.0], 0.5),
        ([3.0, 4.0], [np.inf, 2.0], 0.5),
        ([], [], 1.0),
    ],
)
def test_the_factor_at_the_edges(delta: list[float], bound: list[float], expected: float) -> None:
    assert ours.clip_factor(jnp.array(delta), jnp.array(bound)) == expected


def test_zero_by_zero_does_not_stop_a_run_that_stops_at_nan() -> None:
    with jax.debug_nans(True):
        assert ours.clip_factor(jnp.array([0.0, 4.0]), jnp.array([0.0, 2.0])) == 0.5


@functools.cache
def adagrad(form: str) -> Any:
    """Return init and update; cached, since compiling takes longer than all the rest."""
    optimizer = ours.clippy_adagrad(0.1, accumulator=form)
    return optimizer.init, jax.jit(optimizer.update)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e19, -3e38])
def test_a_bad_gradient_changes_nothing_and_is_counted(bad: float, form: str) -> None:
    init, update = adagrad(form)
    params = {"bad": jnp.array([[-0.0, 1.0], [0.0, -2.0]]), "good": jnp.array([1.0])}
    state = init(params)
    for step, value in enumerate((0.1, bad, 0.1)):
        grads = {"bad": jnp.array([[0.0, value], [-0.5, 0.25]]), "good": jnp.ones(1)}
        updates, new = update(grads, state, params)
        stepped = optax.apply_updates(params, updates)
        refused = step == 1
        assert stepped["good"] != params["good"]
        assert np.isfinite(stepped["bad"]).all()
        assert (stepped["bad"].tobytes() == params["bad"].tobytes()) == refused  # the sign of zero included
        assert (new.sum["bad"].tobytes() == state.sum["bad"].tobytes()) == refused
        assert (new.clip_factor["bad"] == 0) == refused
        assert (new.bad_steps["bad"], new.bad_steps["good"], new.count) == (min(step, 1), 0, step + 1)
        params, state = stepped, new


@pytest.mark.parametrize("form", FORMS)
def test_a_huge_gradient_that_fits_is_taken_in(form: str) -> None:
    init, update = adagrad(form)
    weight = jnp.array([0.02, 0.02])
    updates, state = update(jnp.array([1e18, 0.1]), init(weight), weight)
    assert state.bad_steps == 0
    assert np.isfinite(state.sum).all()
    assert updates[0] == pytest.approx(-0.02)  # its whole bound, downwards


def test_a_gradient_that_fits_alone_is_refused_where_the_sum_would_overflow() -> None:
    init, update = adagrad("standard")
    weight = jnp.array([0.5, 0.5])
    state = init(weight)
    for refused in (0, 1):
        _, state = update(jnp.array([1.5e19, 0.1]), state, weight)
        assert state.bad_steps == refused
        assert np.isfinite(state.sum).all()


def test_a_rate_that_is_not_finite_changes_nothing() -> None:
    optimizer = ours.clippy_adagrad(lambda count: jnp.where(count == 0, jnp.nan, 0.1))
    weight, update = jnp.array([0.5]), jax.jit(optimizer.update)
    state = optimizer.init(weight)
    for refused in (True, False):
        updates, state = update(jnp.ones(1), state, weight)
        assert (updates == 0) == (state.sum == jnp.float32(0.1)) == refused
    assert state.bad_steps == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_update_becomes_zero_and_is_counted(bad: float) -> None:
    clip = ours.clip_by_reference()
    params = {"bad": jnp.array([-0.0, 1.0]), "good": jnp.array([1.0])}
    state, update = clip.init(params), jax.jit(clip.update)
    for step, value in enumerate((0.1, bad, 0.1)):
        updates, state = update({"bad": jnp.array([0.0, value]), "good": jnp.array([0.1])}, state, params)
        assert (updates["bad"].tolist() == [0, 0]) == (state.clip_factor["bad"] == 0) == (step == 1)
        assert step != 1 or np.signbit(optax.apply_updates(params, updates)["bad"][0])
        assert (state.bad_steps["bad"], state.bad_steps["good"]) == (min(step, 1), 0)
        assert updates["good"] == np.float32(0.1)


@pytest.mark.parametrize("make", [ours.clippy_adagrad, ours.clip_by_reference])
def test_says_that_it_needs_the_parameters(make: Any) -> None:
    optimizer = optax.chain(make())
    state = optimizer.init(jnp.ones(2))
    with pytest.raises(ValueError, match=rf"{make.__name__} bounds .* came None; call update\(updates, state, params"):
        optimizer.update(jnp.ones(2), state)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": -0.1}, "learning_rate: expected a finite number, 0 or more, came -0.1"),
        ({"variable_relative_threshold": np.inf}, "variable_relative_threshold: expected a finite"),
        ({"absolute_threshold": -1.0}, "absolute_threshold: expected a number, 0 or more"),
        ({"accumulator_relative_threshold": np.nan}, "accumulator_relative_threshold"),
        ({"initial_accumulator_value": -1.0}, "initial_accumulator_value"),
        ({"eps": 0.0, "initial_accumulator_value": 0}, "one must be above 0"),
        ({"accumulator": "delayed_clip"}, r"no accumulator form 'delayed_clip'; did you mean 'delayed_clipped'\?"),
    ],
)
def test_refuses_options_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inspect.unwrap(ours.clippy_adagrad)(**wrong)  # without the tests' own type check, which would come first


def test_a_saved_state_goes_on_as_if_nothing_had_been() -> None:
    optimizer = ours.clippy_adagrad(optax.linear_schedule(0.5, 0.1, 6), accumulator="delayed_clipped")
    params, state = run(optimizer, steps=3)
    file = io.BytesIO()
    np.savez(file, *jax.tree.leaves((params, state)))
    file.seek(0)
    with np.load(file) as saved:
        leaves = [jnp.asarray(saved[name]) for name in saved.files]
    loaded = jax.tree.unflatten(jax.tree.structure((params, state)), leaves)
    update = jax.jit(optimizer.update)
    once, twice = (update(some_grads(params, 9), s, p) for p, s in ((params, state), loaded))
    assert jax.tree.map(lambda x: x.tobytes(), once) == jax.tree.map(lambda x: x.tobytes(), twice)


def test_the_state_keeps_its_shape_in_a_loop_on_the_device() -> None:
    for optimizer in (ours.clippy_adagrad(0.1), ours.clip_by_reference()):
        params = some_params(jnp.bfloat16)

        def step(carry: Any, _: None, optimizer: Any = optimizer) -> Any:
            params, state = carry
            updates, state = optimizer.update(some_grads(params, 1), state, params)
            return (optax.apply_updates(params, updates), state), state.clip_factor["dense"]

        (params, _), factors = jax.lax.scan(step, (params, optimizer.init(params)), length=3)
        assert factors.dtype == jnp.float32
        assert params["dense"].dtype == jnp.bfloat16
        assert np.isfinite(params["dense"].astype(jnp.float32)).all()


def test_clips_some_parameters_and_leaves_others_to_another_optimizer() -> None:
    parts = {"clippy": ours.clippy_adagrad(0.5), "sgd": optax.sgd(0.1), "none": ours.clip_by_reference()}
    labels = {"dense": "clippy", "bias": "sgd", "scale": "sgd", "empty": "sgd"}
    after, state = run(optax.multi_transform(parts, labels))
    alone, _ = run(ours.clippy_adagrad(0.5))
    np.testing.assert_allclose(after["dense"], alone["dense"], atol=1e-6)
    assert 0 < state.inner_states["clippy"].inner_state.clip_factor["dense"] < 1


def test_options_may_be_injected_and_changed_between_steps() -> None:
    optimizer = optax.inject_hyperparams(ours.clippy_adagrad)(learning_rate=0.1, absolute_threshold=1.0)
    weight, update = jnp.array([0.5]), jax.jit(optimizer.update)
    state = optimizer.init(weight)
    updates, _ = update(jnp.ones(1), state, weight)
    state.hyperparams["learning_rate"] = jnp.array(0.2)
    doubled, _ = update(jnp.ones(1), state, weight)
    np.testing.assert_allclose(doubled, 2 * updates, rtol=1e-6)


def test_its_examples_run() -> None:
    found = doctest.testmod(ours)
    assert found.attempted > 0
    assert found.failed == 0
