"""Clippy for Keras against the authors' code and Keras's own Adagrad, and the properties that it promises.

Runs under the backend that KERAS_BACKEND names, else under torch; the last test, a slow one, runs the others under jax.
"""

import doctest
import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steadyrank.errors import ConfigError

from .test_clippy import CASES, FORMS, assert_near, golden, options

with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as home:
    patch.setenv("KERAS_HOME", home)  # where Keras writes a file when it is imported
    patch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "torch"))
    keras = pytest.importorskip("keras")

from steadyrank.optim import keras as ours  # only where Keras is

BACKEND = keras.backend.backend()
# Keras 3.15 itself does not yet speak NumPy 2's __array__.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture
def float64() -> Iterator[None]:
    """Let new variables, the learning rate's included, be of float64."""
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    try:
        if BACKEND == "jax":
            import jax

            with jax.enable_x64(True):
                yield
        else:
            yield
    finally:
        keras.config.set_floatx(before)


def host(x: Any) -> Any:
    return keras.ops.convert_to_numpy(x)


def near(found: Any, expected: Any, atol: float, rtol: float = 0.0) -> None:
    assert_near(torch.tensor(host(found)), np.asarray(expected).tolist(), atol, rtol)


def dense(step: dict[str, Any], like: Any) -> Any:
    """Return a recorded gradient, a sparse one with zeros in the rows that it leaves out."""
    values = np.asarray(step["grad"], like.dtype)
    if "rows" in step:
        full = np.zeros(like.shape, like.dtype)
        np.add.at(full, step["rows"], values)
        values = full
    return keras.ops.convert_to_tensor(values)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_authors_code(name: str, request: pytest.FixtureRequest) -> None:
    case = golden(name)
    exact = case["dtype"] == "float64"
    if exact:
        request.getfixturevalue("float64")
    given_options = options(case)
    rate, epsilon = given_options.pop("lr"), given_options.pop("eps")
    optimizer = ours.ClippyAdagrad(rate, epsilon=epsilon, **given_options)
    weight = keras.Variable(case["initial_weight"], dtype=case["dtype"], name="weight")
    moved, last, first = 0.0, np.asarray(case["initial_weight"]), given_options["initial_accumulator_value"]
    for number, step in enumerate(case["steps"], start=1):
        optimizer.apply([dense(step, weight)], [weight])
        moved += np.abs(np.array(step["weight"]) - last).max()
        last, total = np.array(step["weight"]), np.array(step["accumulator"])
        # As in test_clippy, where the tolerances are explained.
        close, ulp = (1e-12, 0.0) if exact else (1e-5, number * 2**-24)
        near(weight, last, close * moved + ulp * np.abs(last).max())
        near(optimizer.accumulators["weight"], total, close * np.abs(total - first).max() + ulp * np.abs(total).max())
        near(optimizer.clip_factors["weight"], step["clipping_factor"], 1e-12, 1e-7 if exact else 3e-5)
    assert host(optimizer.bad_steps["weight"]) == 0
    assert host(optimizer.iterations) == len(case["steps"])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("wrapped", [{}, {"weight_decay": 0.1}, {"clipnorm": 0.5}, {"clipvalue": 0.1}])
def test_without_a_bound_it_is_kerass_adagrad(wrapped: dict[str, float]) -> None:
    draw = np.random.default_rng(4)
    start, grads = draw.normal(size=(6, 3)), draw.normal(size=(5, 6, 3))
    one, two = keras.Variable(start), keras.Variable(start)
    clippy = ours.ClippyAdagrad(0.3, absolute_threshold=float("inf"), initial_accumulator_value=0.125, **wrapped)
    adagrad = keras.optimizers.Adagrad(0.3, initial_accumulator_value=0.125, **wrapped)
    for grad in grads:
        for optimizer, weight in ((clippy, one), (adagrad, two)):
            optimizer.apply([keras.ops.convert_to_tensor(grad)], [weight])
        np.testing.assert_allclose(host(one), host(two), atol=1e-12, rtol=0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", FORMS)
def test_no_coordinate_leaves_its_bound(form: str) -> None:
    draw = np.random.default_rng(5)
    clipped = 0
    weight = keras.Variable(np.zeros(5))
    for _ in range(40):
        before, grad = draw.normal(size=(2, 5)) * 10 ** draw.normal(size=(2, 1)) * (draw.random((2, 5)) < 0.8)
        relative, absolute, lr = (float(x) for x in draw.random(3))
        limits = {"variable_relative_threshold": relative, "absolute_threshold": absolute}
        optimizer = ours.ClippyAdagrad(lr, accumulator=form, **limits)
        weight.assign(before)
        optimizer.apply([keras.ops.convert_to_tensor(grad)], [weight])
        change, bound = host(weight) - before, relative * np.abs(before) + absolute
        full = -lr * grad / np.sqrt(0.1 + 1e-7 + (grad**2 if form == "standard" else 0))
        (factor,) = (float(factor) for factor in optimizer.clip_factors.values())
        assert np.all(np.abs(change) <= bound * (1 + 1e-12) + np.abs(before) * 2**-52)
        np.testing.assert_allclose(change, factor * full, atol=1e-12)
        assert factor == pytest.approx(min(1, *(bound / np.maximum(np.abs(full), 1e-300))), rel=1e-12)
        clipped += factor < 1
    assert 0 < clipped < 40


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
    delta, bound = (keras.ops.convert_to_tensor(np.array(x, np.float32)) for x in (delta, bound))
    assert host(ours.clip_factor(delta, bound)) == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e19, -3e38])
def test_a_bad_gradient_changes_nothing_and_is_counted(bad: float, form: str) -> None:
    optimizer = ours.ClippyAdagrad(accumulator=form)
    weight, other = keras.Variable([[-0.0, 1.0], [0.0, -2.0]], name="w"), keras.Variable([1.0], name="other")

    def step(value: float) -> tuple[bool, ...]:
        optimizer.build([weight, other])
        kept = (weight, optimizer.accumulators["w"], other)
        before = [host(x).tobytes() for x in kept]  # the sign of zero included
        grads = [np.array([[0.0, value], [-0.5, 0.25]], np.float32), np.ones(1, np.float32)]
        optimizer.apply([keras.ops.convert_to_tensor(grad) for grad in grads], [weight, other])
        return tuple(host(x).tobytes() == old for x, old in zip(kept, before, strict=True))

    assert step(0.1) == (False, False, False)
    assert step(bad) == (True, True, False)
    assert host(optimizer.clip_factors["w"]) == 0
    assert step(0.1) == (False, False, False)
    assert np.isfinite(host(weight)).all()
    assert {path: int(host(count)) for path, count in optimizer.bad_steps.items()} == {"w": 1, "other": 0}


def test_a_gradient_that_fits_alone_is_refused_where_the_sum_would_overflow() -> None:
    optimizer, weight = ours.ClippyAdagrad(), keras.Variable([0.5], name="w")
    for refused in (0, 1):
        optimizer.apply([keras.ops.convert_to_tensor(np.float32([1.5e19]))], [weight])
        assert host(optimizer.bad_steps["w"]) == refused
        assert np.isfinite(host(optimizer.accumulators["w"])).all()


def test_a_rate_that_is_not_finite_changes_nothing() -> None:
    rates = iter((float("nan"), 0.1))
    optimizer, weight = ours.ClippyAdagrad(lambda: next(rates)), keras.Variable([0.5], name="w")
    for refused in (True, False):
        optimizer.apply([keras.ops.ones(1)], [weight])
        assert (host(weight)[0] == 0.5) == refused
    assert host(optimizer.bad_steps["w"]) == 1


def test_half_precision_variables_have_float32_states() -> None:
    weight = keras.Variable([1.0, 2.0], dtype="bfloat16", name="w")
    optimizer = ours.ClippyAdagrad()
    optimizer.apply([keras.ops.ones(2, dtype="bfloat16")], [weight])
    assert weight.dtype == "bfloat16"
    assert optimizer.accumulators["w"].dtype == optimizer.clip_factors["w"].dtype == "float32"
    near(optimizer.accumulators["w"], [1.1, 1.1], 1e-6)
    assert np.all(host(keras.ops.cast(weight, "float32")) < [1, 2])


def test_variables_of_one_path_are_told_apart_by_their_number() -> None:
    optimizer = ours.ClippyAdagrad()
    assert optimizer.clip_factors == optimizer.bad_steps == optimizer.accumulators == {}
    optimizer.build([keras.Variable([1.0], name=name) for name in ("twin", "only", "twin")])
    assert list(optimizer.clip_factors) == ["twin:0", "only", "twin:2"]


def test_its_configuration_comes_back() -> None:
    given_options = {
        "learning_rate": 0.25,
        "variable_relative_threshold": 0.25,
        "absolute_threshold": 0.5,
        "accumulator_relative_threshold": 0.125,
        "initial_accumulator_value": 0.0,
        "epsilon": 1e-5,
        "accumulator": "delayed_clipped",
        "weight_decay": 0.01,
        "clipnorm": 2.0,
        "name": "clippy",
    }
    optimizer = ours.ClippyAdagrad(**given_options)
    config = optimizer.get_config()
    assert {key: config[key] for key in given_options} == given_options
    assert ours.ClippyAdagrad.from_config(optimizer.get_config()).get_config() == config
    scheduled = ours.ClippyAdagrad(keras.optimizers.schedules.CosineDecay(0.1, 10))
    again = keras.optimizers.deserialize(keras.optimizers.serialize(scheduled))
    assert isinstance(again, ours.ClippyAdagrad)
    assert keras.optimizers.serialize(again) == keras.optimizers.serialize(scheduled)


def test_a_saved_model_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    draw = np.random.default_rng(6)
    x, y = draw.normal(size=(64, 4)).astype("float32"), draw.normal(size=(64, 1)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    # Keras's own choice is to compile, which takes seconds.
    model.compile(ours.ClippyAdagrad(0.3), loss="mse", jit_compile=BACKEND == "jax")
    first, *_, last = model.fit(x, y, epochs=3, batch_size=32, shuffle=False, verbose=0).history["loss"]
    assert last < first
    assert min(float(host(factor)) for factor in model.optimizer.clip_factors.values()) < 1
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    for one in (model, again):
        one.fit(x, y, epochs=1, batch_size=32, shuffle=False, verbose=0)
    for kept in ("accumulators", "clip_factors", "bad_steps"):
        # Keras gives the variables of a loaded model other paths, in the same order.
        pairs = zip(getattr(model.optimizer, kept).values(), getattr(again.optimizer, kept).values(), strict=True)
        for value, value_again in pairs:
            np.testing.assert_array_equal(host(value), host(value_again))
    np.testing.assert_array_equal(model.predict(x, verbose=0), again.predict(x, verbose=0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": -0.1}, "learning_rate: expected a finite number, 0 or more, came -0.1"),
        ({"variable_relative_threshold": float("inf")}, "variable_relative_threshold: expected a finite"),
        ({"absolute_threshold": -1.0}, "absolute_threshold: expected a number, 0 or more"),
        ({"accumulator_relative_threshold": float("nan")}, "accumulator_relative_threshold"),
        ({"initial_accumulator_value": -1.0}, "initial_accumulator_value"),
        ({"epsilon": 0.0, "initial_accumulator_value": 0.0}, "one must be above 0"),
        ({"accumulator": "delayed_clip"}, r"no accumulator form 'delayed_clip'; did you mean 'delayed_clipped'\?"),
    ],
)
def test_refuses_options_out_of_range(wrong: dict[str, Any], message: str) -> None:
    optimizer = ours.ClippyAdagrad()
    with pytest.raises(ConfigError, match=message):
        # Without the tests' own type check, which would come first.
        inspect.unwrap(ours.ClippyAdagrad.__init__)(optimizer, **wrong)


def test_its_examples_run() -> None:
    found = doctest.testmod(ours)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.slow  # JAX compiles each operation anew for each shape
@pytest.mark.skipif(BACKEND == "jax", reason="this is the run under jax")
def test_all_of_this_holds_under_jax_too(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    # Without our own options: the type check of the whole package takes longer to load than these tests to run.
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    env = {**os.environ, "KERAS_BACKEND": "jax", "KERAS_HOME": str(tmp_path)}
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
