"""Clippy for Keras 3, on whichever backend Keras runs.

Needs the extra `keras`: `pip install 'steadyrank[keras]'`, and a backend; torch is there, but Keras takes TensorFlow
unless the environment has KERAS_BACKEND=torch. Import it by its full name; `import steadyrank` does not.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

try:
    import keras
    from keras import ops
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"steadyrank.optim.keras needs Keras 3 and a backend, and found no '{error.name}'; pip install "
        "'steadyrank[keras]', and set KERAS_BACKEND to torch or jax, since Keras alone takes tensorflow",
        name=error.name,
    ) from error

from ..errors import ConfigError, check_known
from .clippy import AccumulatorForm
from .guarded import check_not_negative

_FINITE = ("variable_relative_threshold", "accumulator_relative_threshold", "initial_accumulator_value", "epsilon")
"""Options that are finite numbers, 0 or more."""


def is_usable(grad: Any, total: Any, lr: Any, floor: float) -> Any:
    """Say whether a gradient can be taken in without any number leaving the finite range.

        finite(sum G + sum g^2)  and  finite(eta * ||g|| / sqrt(floor)),      ||g|| the L2 norm

    The first keeps the accumulator finite, the second the update. Sums stand in for the largest coordinate, which errs
    on the safe side. `floor` is a number above 0 that G plus epsilon never goes below.

    >>> one = ops.ones(2)
    >>> [bool(is_usable(ops.array([g, 0.0]), one, ops.array(0.1), 1e-7)) for g in (1e20, 1e18, math.nan)]
    [False, True, False]
    """
    squares = ops.sum(ops.square(grad))
    return ops.logical_and(
        ops.isfinite(ops.sum(total) + squares), ops.isfinite(ops.sqrt(squares) * lr / math.sqrt(floor))
    )


def clip_factor(delta: Any, bound: Any) -> Any:
    """Return the largest sigma in [0, 1] that keeps sigma * |delta| within `bound` everywhere.

        sigma = min(1, min_i bound_i / |delta_i|)

    The edges are those of `kernels.clip_factor`: a zero delta and a NaN set no limit; a zero bound with a non-zero
    delta gives 0, and so does an infinite delta; 1 for an empty tensor.

    >>> float(clip_factor(ops.array([0.4, 0.0]), ops.array([0.1, 0.0])))
    0.25
    """
    size = ops.abs(delta)
    over = size > bound
    # The inner selection keeps 0 / 0 away, which JAX can be told to stop at.
    ratio = ops.where(over, bound / ops.where(over, size, 1.0), 1.0)
    return ops.min(ratio, initial=1.0)


@keras.saving.register_keras_serializable(package="steadyrank")
class ClippyAdagrad(keras.optimizers.Optimizer):  # type: ignore[misc]  # Keras has no types
    """Clippy on Adagrad: each coordinate of the *actual update* stays within a bound relative to its weight.

        standard          G <- G + g^2, then the step                              (the paper)
        delayed           the step, then G <- G + g^2                              (the authors' default)
        delayed_clipped   the step, then G <- G + (sigma * g)^2                    (a spike leaves the rate as it was)

        p     = 1 / sqrt(G + epsilon)
        bound = lambda_rel * |w| + lambda_acc * p + lambda_abs
        sigma = min(1, min_i bound_i / (eta * |g_i| * p_i))                        one scalar for each variable
        w     <- w - sigma * eta * g * p

    In the standard form |g| * p is below 1, so nothing is ever clipped while the rate is at most `absolute_threshold`.

    A sparse gradient is taken as a dense one: its untouched rows are zeros, which move nothing and set no limit.

    A gradient with a NaN or an infinity, or so large that the accumulator would overflow (float32: from 1.8e19 on),
    changes nothing but the counts: weight and accumulator of that variable stay as they were, `bad_steps` grows, and
    its clip factor is 0. What Keras itself does before the step is not ours to undo: `weight_decay` shrinks the weight
    all the same, and `global_clipnorm` spreads one bad gradient over all variables, so that all are refused.

    Args:
        learning_rate: eta, 0 or more; a float, a Keras schedule or a callable.
        variable_relative_threshold: lambda_rel, 0 or more; 0.5 in the paper, 0.1 in the authors' code.
        absolute_threshold: lambda_abs, 0 or more, may be infinite; 0.01 in the paper, 1e-7 in the authors' code.
        accumulator_relative_threshold: lambda_acc, 0 or more; not in the paper.
        initial_accumulator_value: G before the first step, 0 or more.
        epsilon: added to G under the root, 0 or more.
        accumulator: when the accumulator takes in the gradient.
        kwargs: what every Keras optimizer takes: name, weight_decay, clipnorm, gradient_accumulation_steps, ...

    Raises:
        ConfigError: an option is out of range.

    Source: Tang et al., KDD 2023, arXiv 2302.09178, Algorithm 1, and TensorFlow Recommenders 0.7.7, `ClippyAdagrad`.
    We default to the paper's form and thresholds, with the code's epsilon; the paper has none.

    >>> weight = keras.Variable([1.0, -2.0], name="weight")
    >>> optimizer = ClippyAdagrad(accumulator="delayed")
    >>> optimizer.apply([ops.array([30.0, 0.1])], [weight])
    >>> {path: round(float(factor), 4) for path, factor in optimizer.clip_factors.items()}
    {'weight': 0.0538}
    """

    def __init__(
        self,
        learning_rate: float | Callable[..., Any] = 0.1,
        *,
        variable_relative_threshold: float = 0.5,
        absolute_threshold: float = 0.01,
        accumulator_relative_threshold: float = 0.0,
        initial_accumulator_value: float = 0.1,
        epsilon: float = 1e-7,
        accumulator: AccumulatorForm = "standard",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.variable_relative_threshold = variable_relative_threshold
        self.absolute_threshold = absolute_threshold
        self.accumulator_relative_threshold = accumulator_relative_threshold
        self.initial_accumulator_value = initial_accumulator_value
        self.epsilon = epsilon
        self.accumulator = accumulator
        self._check(learning_rate)

    @property
    def accumulators(self) -> dict[str, Any]:
        """G by the variable's path; variables of its shape, of float32 at least. Empty before the first step."""
        return self._by_path(self._sums) if self.built else {}

    @property
    def clip_factors(self) -> dict[str, Any]:
        """sigma of the last step by the variable's path: 0 if refused, 1 if nothing was clipped; 0-d variables."""
        return self._by_path(self._clip_factors) if self.built else {}

    @property
    def bad_steps(self) -> dict[str, Any]:
        """How many steps were refused because of the gradient, by the variable's path; 0-d variables."""
        return self._by_path(self._bad_steps) if self.built else {}

    def build(self, variables: list[Any]) -> None:
        """Make the accumulators, clip factors and counts; Keras calls it before the first step."""
        if self.built:
            return
        super().build(variables)
        scalar = {"shape": (), "layout": None}
        self._sums = [self._new(v, "accumulator", self.initial_accumulator_value) for v in variables]
        self._clip_factors = [self._new(v, "clip_factor", 1.0, **scalar) for v in variables]
        self._bad_steps = [self._new(v, "bad_steps", 0.0, dtype="int32", **scalar) for v in variables]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Make one step of one variable."""
        index = self._get_variable_index(variable)
        total = self._sums[index]
        grad = ops.cast(ops.convert_to_tensor(gradient, sparse=False), total.dtype)
        lr = ops.cast(learning_rate, total.dtype)
        usable = is_usable(grad, total, lr, self.initial_accumulator_value + self.epsilon)
        # Selected, since 0 * inf would be NaN.
        grad, lr = ops.where(usable, grad, 0.0), ops.where(usable, lr, 0.0)
        if self.accumulator == "standard":
            self.assign_add(total, ops.square(grad))
        scale = ops.rsqrt(total + self.epsilon)
        delta = scale * grad * lr
        bound = self.variable_relative_threshold * ops.abs(ops.cast(variable, total.dtype)) + self.absolute_threshold
        factor = clip_factor(delta, bound + self.accumulator_relative_threshold * scale)
        self.assign_sub(variable, factor * delta)
        if self.accumulator == "delayed":
            self.assign_add(total, ops.square(grad))
        elif self.accumulator == "delayed_clipped":
            self.assign_add(total, ops.square(grad * factor))
        self.assign(self._clip_factors[index], ops.where(usable, factor, 0.0))
        self.assign_add(self._bad_steps[index], ops.cast(ops.logical_not(usable), "int32"))

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make an equal optimizer."""
        names = ("absolute_threshold", "accumulator", *_FINITE)
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}

    def _check(self, learning_rate: Any) -> None:
        check_known(self.accumulator, get_args(AccumulatorForm), "accumulator form")
        check_not_negative("absolute_threshold", float(self.absolute_threshold), infinite=True)
        for option in _FINITE:
            check_not_negative(option, float(getattr(self, option)))
        if not callable(learning_rate):
            check_not_negative("learning_rate", float(learning_rate))
        if self.initial_accumulator_value + self.epsilon == 0:
            raise ConfigError("initial_accumulator_value and epsilon: one must be above 0, or the first step is 0 / 0")

    def _new(self, variable: Any, name: str, value: float, **kind: Any) -> Any:
        # At least float32, whatever the variable has: a bfloat16 sum soon stops growing. Keras's own result_type
        # would make float32 of float64.
        dtype = keras.backend.standardize_dtype(variable.dtype)
        wide = dtype if dtype == "float64" else "float32"
        kind = {"shape": variable.shape, "dtype": wide, "layout": getattr(variable, "_layout", None), **kind}
        path = _path(variable).replace("/", "_")
        # Not Keras's Constant, which under TensorFlow rounds to float32 on its way to float64.
        return self.add_variable(initializer=partial(ops.full, fill_value=value), name=f"{path}_{name}", **kind)

    def _by_path(self, values: list[Any]) -> dict[str, Any]:
        paths = [_path(variable) for variable in self._trainable_variables]
        # Keras lets two variables have one path; then the path alone would lose one of them.
        names = [path if paths.count(path) == 1 else f"{path}:{index}" for index, path in enumerate(paths)]
        return dict(zip(names, values, strict=True))


def _path(variable: Any) -> str:
    # A bare tf.Variable has only a name.
    return str(getattr(variable, "path", variable.name))
