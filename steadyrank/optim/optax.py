"""Clippy for optax, under JAX: `clip_by_reference`, which ends a chain, and `clippy_adagrad`, which is one.

Needs the extra `optax`: `pip install 'steadyrank[optax]'`. Import it by its full name; `import steadyrank` does not.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple, get_args

from jaxtyping import Bool, Float, Int

try:
    import jax
    import jax.numpy as jnp
    import optax
    from jax import Array
    from jax.typing import ArrayLike
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"steadyrank.optim.optax needs optax and JAX, and found no '{error.name}'; pip install 'steadyrank[optax]'",
        name=error.name,
    ) from error

from ..errors import ConfigError, check_known
from .clippy import AccumulatorForm
from .guarded import check_not_negative


class ClipByReferenceState(NamedTuple):
    """Two trees of the parameters' structure, with one number for each leaf."""

    clip_factor: Any
    """sigma of the last step, in [0, 1]: 0 if refused, 1 if nothing was clipped."""
    bad_steps: Any
    """How many of the steps were refused because a number was not finite."""


class ClippyAdagradState(NamedTuple):
    """The number of steps, and three trees of the parameters' structure."""

    count: Any
    """How many steps were made, refused ones too; what a schedule is asked with."""
    sum: Any
    """The accumulator G, of the parameter's shape; float32 at least."""
    clip_factor: Any
    """sigma of the last step, in [0, 1]: 0 if refused, 1 if nothing was clipped."""
    bad_steps: Any
    """How many of the steps were refused because of the gradient."""


def clip_factor(delta: Float[Array, "*shape"], bound: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Return the largest sigma in [0, 1] that keeps sigma * |delta| within `bound` everywhere.

        sigma = min(1, min_i bound_i / |delta_i|)

    The edges are those of `kernels.clip_factor`: a zero delta and a NaN set no limit; a zero bound with a non-zero
    delta gives 0, and so does an infinite delta; 1 for an empty array.

    >>> float(clip_factor(jnp.array([0.4, 0.0]), jnp.array([0.1, 0.0])))
    0.25
    """
    size = jnp.abs(delta)
    over = size > bound
    # Divided only where it is selected, so that jax_debug_nans meets no 0 / 0.
    return jnp.min(bound / jnp.where(over, size, 1), initial=1, where=over)


def clip_by_reference(
    variable_relative_threshold: ArrayLike = 0.5, absolute_threshold: ArrayLike = 0.01
) -> optax.GradientTransformation:
    """Scale each leaf of the updates by one factor, so that no weight changes by more than its bound.

        u <- sigma * u,    sigma = min(1, min_i (lambda_rel * |w_i| + lambda_abs) / |u_i|)    one scalar for each leaf

    The updates must be those that `optax.apply_updates` adds, learning rate included: it comes last in a chain.

    A leaf with a NaN or an infinity becomes zeros, is counted in `bad_steps`, and has a `clip_factor` of 0. What
    stands before in the chain has seen the bad gradient all the same, and Adagrad's accumulator never recovers from
    one: put `optax.apply_if_finite` around the chain, or use `clippy_adagrad`.

    Args:
        variable_relative_threshold: lambda_rel, 0 or more.
        absolute_threshold: lambda_abs, 0 or more, may be infinite.

    Returns:
        A transformation whose `update` needs the parameters; its state is a `ClipByReferenceState`.

    Raises:
        ConfigError: a threshold is out of range.
        ValueError: from `update`, when it is not given the parameters.

    Source: Tang et al., KDD 2023, arXiv 2302.09178, Algorithm 1.

    >>> optimizer = optax.chain(optax.sgd(1.0), clip_by_reference())
    >>> params = {"bias": jnp.zeros(2)}
    >>> updates, state = optimizer.update({"bias": jnp.array([0.04, 0.01])}, optimizer.init(params), params)
    >>> print(updates["bias"], state[1].clip_factor["bias"])
    [-0.01   -0.0025] 0.25
    """
    _check_thresholds(variable_relative_threshold, absolute_threshold)

    def init(params: Any) -> ClipByReferenceState:
        return ClipByReferenceState(jax.tree.map(_one, params), jax.tree.map(_no_count, params))

    def clip(update: Array, weight: Array, last: Array, bad: Array) -> tuple[Array, Array, Array]:
        finite = jnp.all(jnp.isfinite(update))
        # Minus zero, since a weight of minus zero plus zero would change its sign.
        delta = jnp.where(finite, update, -0.0).astype(_wide(update))
        bound = variable_relative_threshold * jnp.abs(weight.astype(_wide(weight))) + absolute_threshold
        factor = clip_factor(delta, jnp.asarray(bound, delta.dtype))
        clipped = (factor * delta).astype(update.dtype)
        return clipped, jnp.where(finite, factor, 0).astype(last.dtype), bad + ~finite

    def update(updates: Any, state: ClipByReferenceState, params: Any = None) -> tuple[Any, ClipByReferenceState]:
        _check_given(params, "clip_by_reference")
        clipped, factors, bad_steps = _map(clip, 3, updates, params, state.clip_factor, state.bad_steps)
        return clipped, ClipByReferenceState(factors, bad_steps)

    return optax.GradientTransformation(init, update)


def clippy_adagrad(
    learning_rate: optax.ScalarOrSchedule = 0.1,
    *,
    variable_relative_threshold: ArrayLike = 0.5,
    absolute_threshold: ArrayLike = 0.01,
    accumulator_relative_threshold: ArrayLike = 0.0,
    initial_accumulator_value: ArrayLike = 0.1,
    eps: ArrayLike = 1e-7,
    accumulator: AccumulatorForm = "standard",
) -> optax.GradientTransformation:
    """Clippy on Adagrad, in the three forms of `steadyrank.ClippyAdagrad`; see there for the formula.

    The standard form without its refusals is `optax.chain(optax.adagrad(rate), clip_by_reference())`. The delayed
    forms step before the accumulator grows, which no chain of optax's own parts does.

    A gradient with a NaN or an infinity, or so large that the accumulator would overflow (float32: from 1.8e19 on),
    changes nothing but the counts: weights and accumulator of that leaf stay as they were, `bad_steps` grows,
    `clip_factor` is 0.

    Args:
        learning_rate: eta, 0 or more; a number, or a schedule that is asked with the number of steps made.
        variable_relative_threshold: lambda_rel, 0 or more.
        absolute_threshold: lambda_abs, 0 or more, may be infinite.
        accumulator_relative_threshold: lambda_acc, 0 or more; not in the paper.
        initial_accumulator_value: G before the first step, 0 or more.
        eps: added to G under the root, 0 or more.
        accumulator: when the accumulator takes in the gradient: "standard" (before the step), "delayed" (after it),
            or "delayed_clipped" (after it, the gradient times sigma).

    Returns:
        A transformation whose `update` needs the parameters; its state is a `ClippyAdagradState`.

    Raises:
        ConfigError: an option is out of range.
        ValueError: from `update`, when it is not given the parameters.

    Source: Tang et al., KDD 2023, arXiv 2302.09178, Algorithm 1, and TensorFlow Recommenders 0.7.7, `ClippyAdagrad`.

    >>> optimizer = clippy_adagrad(optax.linear_schedule(0.1, 1.0, 10), accumulator="delayed")
    >>> weight = jnp.array([1.0, -2.0])
    >>> updates, state = jax.jit(optimizer.update)(jnp.array([30.0, 0.1]), optimizer.init(weight), weight)
    >>> print(optax.apply_updates(weight, updates).round(3), f"{state.clip_factor:.4f}")
    [ 0.49  -2.002] 0.0538
    """
    _check_thresholds(variable_relative_threshold, absolute_threshold, accumulator_relative_threshold)
    _check_adagrad(learning_rate, initial_accumulator_value, eps)
    check_known(accumulator, get_args(AccumulatorForm), "accumulator form")
    floor = initial_accumulator_value + eps

    def init(params: Any) -> ClippyAdagradState:
        total = jax.tree.map(lambda p: jnp.full_like(p, initial_accumulator_value, dtype=_wide(p)), params)
        factors, bad_steps = jax.tree.map(_one, params), jax.tree.map(_no_count, params)
        return ClippyAdagradState(jnp.zeros((), jnp.int32), total, factors, bad_steps)

    def update(grads: Any, state: ClippyAdagradState, params: Any = None) -> tuple[Any, ClippyAdagradState]:
        _check_given(params, "clippy_adagrad")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def step(raw: Array, weight: Array, total: Array, bad: Array) -> tuple[Array, Array, Array, Array]:
            grad, lr = raw.astype(total.dtype), jnp.asarray(rate, total.dtype)
            usable = _is_usable(grad, total, lr, floor)
            grad, lr = jnp.where(usable, grad, 0), jnp.where(usable, lr, 0)
            if accumulator == "standard":
                total = total + jnp.square(grad)
            scale = jax.lax.rsqrt(total + eps)
            delta = scale * grad * lr
            bound = variable_relative_threshold * jnp.abs(weight.astype(total.dtype)) + absolute_threshold
            bound = bound + accumulator_relative_threshold * scale
            factor = clip_factor(delta, jnp.asarray(bound, total.dtype))
            if accumulator != "standard":
                total = total + jnp.square(grad * factor if accumulator == "delayed_clipped" else grad)
            return (-factor * delta).astype(raw.dtype), total, jnp.where(usable, factor, 0), bad + ~usable

        updates, *rest = _map(step, 4, grads, params, state.sum, state.bad_steps)
        return updates, ClippyAdagradState(optax.safe_increment(state.count), *rest)

    return optax.GradientTransformation(init, update)


def _is_usable(
    grad: Float[Array, "*shape"], total: Float[Array, "*shape"], lr: Float[Array, ""], floor: ArrayLike
) -> Bool[Array, ""]:
    """Say whether a gradient can be taken in without any number leaving the finite range.

    Sums stand in for the largest coordinate, which errs on the safe side.
    """
    squares = jnp.sum(jnp.square(grad))
    return jnp.isfinite(jnp.sum(total) + squares) & jnp.isfinite(jnp.sqrt(squares) * lr / jnp.sqrt(floor))


def _wide(x: ArrayLike) -> Any:
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def _one(param: ArrayLike) -> Float[Array, ""]:
    return jnp.ones((), _wide(param))


def _no_count(_: ArrayLike) -> Int[Array, ""]:
    return jnp.zeros((), jnp.int32)


class _Row(tuple[Array, ...]):
    """Several outputs for one leaf. JAX would take a plain tuple for a branch of the tree."""


def _map(function: Callable[..., tuple[Array, ...]], outputs: int, *trees: Any) -> list[Any]:
    """Map a function of several outputs over the leaves, and return one tree for each output."""
    rows = jax.tree.map(lambda *leaves: _Row(function(*map(jnp.asarray, leaves))), *trees)
    return [jax.tree.map(itemgetter(output), rows) for output in range(outputs)]


def _check_given(params: Any, name: str) -> None:
    if params is None:
        raise ValueError(
            f"{name} bounds each update relative to its weight: expected the parameters, came None; call "
            "update(updates, state, params)"
        )


def _check_number(option: str, value: Any, infinite: bool = False) -> None:
    # optax.inject_hyperparams gives arrays, whose values nobody can look at under jit.
    if isinstance(value, int | float):
        check_not_negative(option, float(value), infinite)


def _check_thresholds(variable_relative: Any, absolute: Any, accumulator_relative: Any = 0.0) -> None:
    _check_number("variable_relative_threshold", variable_relative)
    _check_number("absolute_threshold", absolute, infinite=True)
    _check_number("accumulator_relative_threshold", accumulator_relative)


def _check_adagrad(learning_rate: Any, initial: Any, eps: Any) -> None:
    _check_number("learning_rate", learning_rate)
    _check_number("initial_accumulator_value", initial)
    _check_number("eps", eps)
    if isinstance(initial + eps, int | float) and initial + eps == 0:
        raise ConfigError("initial_accumulator_value and eps: one must be above 0, or the first step is 0 / 0")
