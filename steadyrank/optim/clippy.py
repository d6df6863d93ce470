"""Clippy on Adagrad and on Adam: the base's step, scaled down until no coordinate changes by more than its bound."""

import math
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..errors import ConfigError, check_known
from . import fused, kernels
from .bounded import BoundedOptimizer, Granularity
from .guarded import BAD_STEPS, STEP, SUM, Touched, check_not_negative, wide_dtype

ROW_CLOCK = "row_clock"
"""State key, of tables whose accumulator decays: at which accepted step each row was last touched."""
EXP_AVG = "exp_avg"
"""State key: Adam's running mean of the gradient, as in torch."""
EXP_AVG_SQ = "exp_avg_sq"
"""State key: Adam's running mean of the squared gradient, as in torch."""

AccumulatorForm = Literal["standard", "delayed", "delayed_clipped"]
"""When the accumulator takes in the gradient: before the step, after it, or after it with the gradient times sigma."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"variable_relative_threshold": 0.5, "absolute_threshold": 0.01},
    "authors_code": {
        "lr": 0.001,
        "variable_relative_threshold": 0.1,
        "absolute_threshold": 1e-7,
        "accumulator": "delayed",
    },
    "adam": {"variable_relative_threshold": 0.1, "absolute_threshold": 0.001},
}
"""Thresholds by name: the paper's (the default on Adagrad), all defaults of the authors' code (for `ClippyAdagrad`),
and the default on Adam, where the paper's do nothing below a rate of about 3e-3. Pass on: `**PRESETS["paper"]`."""


class ClippyAdagrad(BoundedOptimizer):
    """Clippy on Adagrad: each coordinate of the *actual update* stays within a bound relative to its weight.

        standard          G <- G + g^2, then the step                              (the paper)
        delayed           the step, then G <- G + g^2                              (the authors' default)
        delayed_clipped   the step, then G <- G + (sigma * g)^2                    (a spike leaves the rate as it was)

        p     = 1 / sqrt(G + eps)
        delta = eta * (g * p + decay * w)
        bound = lambda_rel * |w| + lambda_acc * p + lambda_abs
        sigma = min(1, min_i bound_i / |delta_i|)                                  one scalar for each tensor
        w     <- w - sigma * delta

    In the standard form |g| * p is below 1, so nothing is ever clipped while lr is at most `absolute_threshold`.

    Sparse gradients: duplicates of a row are summed, only the touched rows count (for weight decay too), and one sigma
    holds for the whole table, unless `granularity="row"`.

    A NaN among weights or accumulators stops its tensor: sigma is 0. Neither it nor an infinity spreads.

    A gradient with a NaN or an infinity, or with a coordinate so large that its square would near the accumulator's
    range (float32: from 1.4e19 on), changes nothing but the counts: weights and accumulator of that tensor stay as they
    were, `state["bad_steps"]` grows, `state["clip_factor"]` is 0.

    Args:
        params: parameters, groups, or (name, parameter) pairs.
        lr: learning rate eta, 0 or more; a number or a tensor of one element.
        variable_relative_threshold: lambda_rel, 0 or more; 0.5 in the paper, 0.1 in the authors' code.
        absolute_threshold: lambda_abs, 0 or more, may be infinite; 0.01 in the paper, 1e-7 in the authors' code.
        accumulator_relative_threshold: lambda_acc, 0 or more; not in the paper.
        initial_accumulator_value: G before the first step, 0 or more.
        eps: added to G under the root, 0 or more.
        accumulator: when the accumulator takes in the gradient.
        granularity: what shares one factor: "tensor"; "row", for tables, so that one bad row does not throttle the
            others; "unit", one factor for each output unit of a matrix, so that one does not throttle its layer.
        weight_decay: decay, 0 or more; decoupled from the gradient as in AdamW, and inside the bound.
        maximize: go up the gradient instead of down.
        foreach: step all tensors together, a few launches for a whole model; None does so on a GPU. It needs memory for
            several copies of the gradients.
        fused: True for compiled kernels (C on a CPU with a compiler, `torch.compile` on a GPU), False for none; None
            takes the C kernel where it fits.
        quantile: the share of coordinates, in [0, 1), whose ratio of step to bound the factor overlooks; those
            coordinates stop at their own bound. Use it (1e-3, say) on wide layers, where the minimum over millions of
            coordinates shrinks the factor with width.
        calibration_steps: if above 0, the bound of each tensor is scaled after this many steps by what a healthy step
            needed (`BoundedOptimizer`): start at a low rate that is surely healthy, and raise it afterwards. Use it
            where you know neither rate nor thresholds.
        calibration_headroom: how far above the typical healthy step the calibrated bound lies, above 0.
        telemetry: also keep `bind_frac` and `binding` in the state (see `read_binding`).
        half_life: steps in which the accumulator fades to a half, but never below its initial value; above 0, infinite
            keeps everything, as Adagrad does. For training that goes on for months.
        decay_every: multiply the accumulator by `decay_factor` every so many steps; 0 never does. Instead of half_life.
        decay_factor: in (0, 1].

    Raises:
        ConfigError: an option is out of range, or a parameter is not of a real floating-point type.

    Source: Tang et al., KDD 2023, arXiv 2302.09178, Algorithm 1, and TensorFlow Recommenders 0.7.7, `ClippyAdagrad`.
    We default to the paper's form and thresholds, with the code's eps; the paper has none.

    >>> layer = torch.nn.Linear(4, 1)
    >>> optimizer = ClippyAdagrad(layer.named_parameters(), lr=0.1)
    >>> layer(torch.ones(2, 4)).sum().backward()
    >>> optimizer.step()
    >>> 0 < optimizer.state[layer.weight]["clip_factor"] <= 1
    tensor(True)
    """

    row_states: ClassVar[tuple[str, ...]] = (SUM, ROW_CLOCK)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        variable_relative_threshold: float = 0.5,
        absolute_threshold: float = 0.01,
        accumulator_relative_threshold: float = 0.0,
        initial_accumulator_value: float = 0.1,
        eps: float = 1e-7,
        accumulator: AccumulatorForm = "standard",
        granularity: Granularity = "tensor",
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        quantile: float = 0.0,
        calibration_steps: int = 0,
        calibration_headroom: float = 2.0,
        telemetry: bool = False,
        half_life: float = math.inf,
        decay_every: int = 0,
        decay_factor: float = 0.5,
    ) -> None:
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        # What torch.optim.Adagrad looks for in its groups, so that it can load what this class saves.
        super().__init__(params, {**defaults, "lr_decay": 0.0, "differentiable": False})

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_known(group["accumulator"], get_args(AccumulatorForm), "accumulator form")
        check_not_negative("accumulator_relative_threshold", group["accumulator_relative_threshold"])
        check_not_negative("half_life", group["half_life"], infinite=True)
        if not group["half_life"] > 0:
            raise ConfigError(f"half_life: expected steps above 0, or infinity, came {group['half_life']}")
        check_not_negative("decay_factor", group["decay_factor"])
        if not 0 < group["decay_factor"] <= 1:
            raise ConfigError(f"decay_factor: expected in (0, 1], came {group['decay_factor']}")
        check_not_negative("decay_every", group["decay_every"])
        if group["decay_every"] and not math.isinf(group["half_life"]):
            raise ConfigError("half_life and decay_every: set one of them, not both")

    def _fresh_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        total = torch.full_like(param, group["initial_accumulator_value"], dtype=wide_dtype(param.dtype))
        return {**super()._fresh_state(param, group), SUM: total}

    def _kind(self, group: dict[str, Any]) -> int:
        return fused.ADAGRAD_KINDS[group["accumulator"]]

    def _plain(self, group: dict[str, Any]) -> bool:
        return super()._plain(group) and not _ages(group)

    def _floor(self, group: dict[str, Any]) -> float:
        return float(group["eps"] or group["initial_accumulator_value"])

    def _touch(self, param: Tensor, index: int, group: dict[str, Any]) -> Touched:
        state = self.state[param]
        if _ages(group) and param.grad is not None and param.grad.is_sparse and ROW_CLOCK not in state:
            state.update(state or self._fresh_state(param, group))
            state[ROW_CLOCK] = torch.zeros(len(param), device=param.device) + _accepted(state)
        return super()._touch(param, index, group)

    def _before(self, touched: list[Touched], grads: list[Tensor], usable: list[Tensor], group: dict[str, Any]) -> None:
        if _ages(group):
            for each, ok in zip(touched, usable, strict=True):
                _catch_up(each, ok, group)
        if group["accumulator"] == "standard":
            self._accumulate(touched, grads, usable, group)

    def _deltas(
        self, touched: list[Touched], grads: list[Tensor], group: dict[str, Any], lr: Float[Tensor, ""]
    ) -> list[Tensor]:
        return kernels.adagrad_deltas(grads, [each.state[SUM] for each in touched], lr, group["eps"])

    def _bounds(self, touched: list[Touched], weights: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        return kernels.update_bounds(
            weights,
            group["variable_relative_threshold"],
            group["absolute_threshold"],
            group["accumulator_relative_threshold"],
            [each.state[SUM] for each in touched],
            group["eps"],
        )

    def _after(
        self,
        touched: list[Touched],
        grads: list[Tensor],
        factors: list[Tensor],
        usable: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        if group["accumulator"] == "delayed_clipped":
            grads = list(torch._foreach_mul(grads, factors))
        if group["accumulator"] != "standard":
            self._accumulate(touched, grads, usable, group)

    def _accumulate(
        self, touched: list[Touched], grads: list[Tensor], usable: list[Tensor], group: dict[str, Any]
    ) -> None:
        if _ages(group):
            for each, ok in zip(touched, usable, strict=True):
                now = _accepted(each.state)
                _fade(each, ok, now - 1, group)
                if ROW_CLOCK in each.state:
                    each.state[ROW_CLOCK].copy_(torch.where(ok, now, each.state[ROW_CLOCK]))
        kernels.accumulate_squares([each.state[SUM] for each in touched], grads)


def _ages(group: dict[str, Any]) -> bool:
    return bool(group["decay_every"] or group["half_life"] < math.inf)


def _accepted(state: dict[str, Tensor]) -> Float[Tensor, ""]:
    """Return how many steps a parameter took in, counting the one under way once it is counted in STEP."""
    return state[STEP] - state[BAD_STEPS]


def _catch_up(each: Touched, usable: Tensor, group: dict[str, Any]) -> None:
    """Let the rows of a table fade for the steps in which they were not touched."""
    if ROW_CLOCK in each.state:
        before = _accepted(each.state) - 1
        _fade(each, usable, each.state[ROW_CLOCK], group, until=before)
        each.state[ROW_CLOCK].copy_(torch.where(usable, before, each.state[ROW_CLOCK]))


def _fade(each: Touched, usable: Tensor, since: Tensor, group: dict[str, Any], until: Tensor | None = None) -> None:
    """Let an accumulator fade from one accepted step to another (by default the one under way), not below its start.

    G <- max(min(G, G_0), G * 2^(-(until - since) / half_life))              or with decay_every
    G <- max(min(G, G_0), G * factor^(until // every - since // every))
    """
    total = each.state[SUM]
    until = (_accepted(each.state) if until is None else until).to(total.device, total.dtype)
    since = since.to(total.device, total.dtype)
    if group["decay_every"]:
        every = group["decay_every"]
        keep = group["decay_factor"] ** (torch.floor(until / every) - torch.floor(since / every))
    else:
        keep = 0.5 ** ((until - since) / group["half_life"])
    keep = keep.view(-1, *[1] * (total.dim() - 1)) if keep.dim() else keep
    floor = total.clamp(max=group["initial_accumulator_value"])
    total.copy_(torch.where(usable, torch.maximum(floor, total * keep), total))


class ClippyAdam(BoundedOptimizer):
    """Clippy on Adam: each coordinate of the *actual update* stays within a bound relative to its weight.

        m     <- m + (1 - b1) (g - m),    v <- v + (1 - b2) (g^2 - v)
        delta = eta * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay * w)
        bound = lambda_rel * |w| + lambda_abs
        sigma = min(1, min_i bound_i / |delta_i|)                                  one scalar for each tensor
        w     <- w - sigma * delta

    Weight decay is decoupled, as in AdamW. t counts the steps that were taken in. Where sigma is well below 1, the
    bound and no longer the rate sets the step: a wide range of rates then trains alike.

    Sparse gradients: moments and weights of the touched rows only, as in `torch.optim.SparseAdam`.

    A gradient that is not usable (see `ClippyAdagrad`) leaves weights and moments as they were.

    Args:
        params: parameters, groups, or (name, parameter) pairs.
        lr: learning rate eta, 0 or more; a number or a tensor of one element.
        betas: b1 and b2, each in [0, 1).
        eps: added to the root of v, 0 or more.
        variable_relative_threshold: lambda_rel, 0 or more. The default is for Adam: with the paper's thresholds nothing
            is clipped below a rate of about 3e-3, since Adam's |delta| is at most about 3.2 * eta.
        absolute_threshold: lambda_abs, 0 or more, may be infinite.
        clip_moments: after the step, let the moments take in sigma * g instead of g, so that a spike that was clipped
            does not live on in them. (The step itself is made with g.)
        granularity: see `ClippyAdagrad`, as for all that follow.
        weight_decay: decay, 0 or more.
        maximize: go up the gradient instead of down.
        foreach: step all tensors together; None does so on a GPU.
        fused: compiled kernels; None takes the C kernel where it fits.
        quantile: share of coordinates that the factor overlooks, in [0, 1).
        calibration_steps: steps from which the bound's scale is found; 0 for none.
        calibration_headroom: how far above the typical healthy step the calibrated bound lies.
        telemetry: also keep `bind_frac` and `binding` in the state.

    Raises:
        ConfigError: an option is out of range, or a parameter is not of a real floating-point type.

    Source: Kingma and Ba, arXiv 1412.6980, Algorithm 1; Loshchilov and Hutter, arXiv 1711.05101, for the decay; the
    bound as in Tang et al., KDD 2023, arXiv 2302.09178, Algorithm 1, whose authors report it on Adam without figures.

    >>> layer = torch.nn.Linear(4, 1)
    >>> optimizer = ClippyAdam(layer.named_parameters(), lr=0.1)
    >>> layer(torch.ones(2, 4)).sum().backward()
    >>> optimizer.step()
    >>> bool(optimizer.state[layer.weight]["clip_factor"] < 1)
    True
    """

    row_states: ClassVar[tuple[str, ...]] = (EXP_AVG, EXP_AVG_SQ)
    rests_on_zero: ClassVar[bool] = False
    decoupled_decay: ClassVar[bool] = True
    shared_options: ClassVar[tuple[str, ...]] = ("lr", "betas", "eps", "maximize")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        variable_relative_threshold: float = 0.1,
        absolute_threshold: float = 0.001,
        clip_moments: bool = False,
        granularity: Granularity = "tensor",
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        quantile: float = 0.0,
        calibration_steps: int = 0,
        calibration_headroom: float = 2.0,
        telemetry: bool = False,
    ) -> None:
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        # What torch.optim.Adam looks for in its groups, so that it can load what this class saves.
        torchs = {"amsgrad": False, "capturable": False, "differentiable": False, "decoupled_weight_decay": True}
        super().__init__(params, {**defaults, **torchs})

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        betas = group["betas"]
        numbers = isinstance(betas, tuple | list) and all(isinstance(beta, int | float) for beta in betas)
        if not numbers or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas: expected two numbers in [0, 1), came {betas!r}")

    def _fresh_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        moments = {k: torch.zeros_like(param, dtype=wide_dtype(param.dtype)) for k in (EXP_AVG, EXP_AVG_SQ)}
        return {**super()._fresh_state(param, group), **moments}

    def _kind(self, group: dict[str, Any]) -> int:
        return fused.ADAM_CLIPPED if group["clip_moments"] else fused.ADAM

    def _floor(self, group: dict[str, Any]) -> float:
        return float(group["eps"] or 1.0)  # |m| / sqrt(v) is bounded by the betas alone

    def _before(self, touched: list[Touched], grads: list[Tensor], usable: list[Tensor], group: dict[str, Any]) -> None:
        if not group["clip_moments"]:
            self._take_in(touched, grads, usable, group)

    def _deltas(
        self, touched: list[Touched], grads: list[Tensor], group: dict[str, Any], lr: Float[Tensor, ""]
    ) -> list[Tensor]:
        means, squares = _moments_of(touched)
        if group["clip_moments"]:  # they take in the gradient after the step, scaled
            means, squares = kernels.adam_moments(means, squares, grads, group["betas"])
        # At least 1, for a refused first step: its delta is zero, and must not be 0 / 0.
        steps = [_accepted(each.state).to(lr.device, lr.dtype).clamp(min=1) for each in touched]
        return kernels.adam_deltas(means, squares, steps, lr, group["betas"], group["eps"])

    def _after(
        self,
        touched: list[Touched],
        grads: list[Tensor],
        factors: list[Tensor],
        usable: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        if group["clip_moments"]:
            self._take_in(touched, list(torch._foreach_mul(grads, factors)), usable, group)

    def _take_in(
        self, touched: list[Touched], grads: list[Tensor], usable: list[Tensor], group: dict[str, Any]
    ) -> None:
        """Let the moments take in gradients, where they are usable: a zero in its place would still make them decay."""
        new = kernels.adam_moments(*_moments_of(touched), grads, group["betas"])
        for each, ok, mean, square in zip(touched, usable, *new, strict=True):
            each.state[EXP_AVG].copy_(torch.where(ok, mean, each.state[EXP_AVG]))
            each.state[EXP_AVG_SQ].copy_(torch.where(ok, square, each.state[EXP_AVG_SQ]))


def _moments_of(touched: list[Touched]) -> tuple[list[Tensor], list[Tensor]]:
    return [each.state[EXP_AVG] for each in touched], [each.state[EXP_AVG_SQ] for each in touched]


class ClippyAdamW(ClippyAdam):
    """`ClippyAdam` with the weight decay that `torch.optim.AdamW` has by default.

    >>> ClippyAdamW([torch.nn.Parameter(torch.ones(1))]).param_groups[0]["weight_decay"]
    0.01
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, *, weight_decay: float = 1e-2, **options: Any
    ) -> None:
        super().__init__(params, lr, weight_decay=weight_decay, **options)
