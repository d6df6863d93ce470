"""Training dynamics by parameter: gradients, weights, updates, and what each clipping method would have done.

Symbols: w weight before the step, g gradient as it comes to the optimizer, u = w_before - w_after the update, eta
learning rate, sigma the factor by which the optimizer in use scaled the step (1 where it scales none), r = u / (eta *
sigma) the direction; P parameters.

What is not finite shows in the readings of its own step, and nothing is remembered from it: norms of gradient, weight
and update, and what is made of them, are NaN or infinite; of a largest coordinate a NaN counts as infinite. Over a
weight of norm 0 a norm is infinite, or NaN if it is 0 too. A step that the optimizer refused (sigma 0), or made at a
rate of 0, has no direction: `direction_max`, `factor_lamb` and `factor_clippy` are NaN. A parameter without elements
has no readings.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim import kernels
from ..optim.guarded import wide_dtype
from ..optim.rivals import TRUST_RATIO, overall_norm
from ..optim.rules import factor_within, smallest, unit_norms
from ..ranks import Ranks
from .readings import Reading

CLIP_FACTOR = "clip_factor"  # the state key under which an optimizer keeps the factor of its last step
SQUARES = ("sum", "exp_avg_sq")
"""State keys of what the family of Adagrad, and that of Adam, divides by the root of."""

PAPER_RELATIVE, PAPER_ABSOLUTE = 0.5, 0.01
"""Clippy's thresholds (Tang et al., section 5.1): no coordinate moves by more than 0.5 |w| + 0.01."""
GC_NORM, AGC_SHARE, AGC_FLOOR = 0.1, 0.01, 1e-3
"""What the paper clips a layer's gradient norm to, a unit's gradient over its weight, and the least weight norm."""
WEIGHT_FLOOR = 1e-3
"""The least |w| by which a coordinate's update is divided."""
_SMALL = 1 << 20  # coordinates up to which torch's own norm is exact to 1e-5 on a CPU
_SAMPLE = 256  # coordinates of an accumulator that its quantiles are read from


class ClipFactors:
    """The clip factors of the last step, of every named parameter whose optimizer keeps one.

    Args:
        named_parameters: Names and parameters, as `module.named_parameters()` gives them.
        optimizers: Any optimizers; those without the state key are passed over.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], optimizers: Iterable[Optimizer]) -> None:
        self._parameters = list(named_parameters)
        self._optimizers = [inner for optimizer in optimizers for inner in with_inner(optimizer)]

    def read(self) -> dict[str, Float[Tensor, ""]]:
        """Return each parameter's factor as a 0-d tensor where it lies, by the parameter's name.

        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight])
        >>> optimizer.state[weight]["clip_factor"] = torch.tensor(0.5)
        >>> ClipFactors([("weight", weight)], [optimizer]).read()
        {'weight': tensor(0.5000)}
        """
        found = {}
        for name, parameter in self._parameters:
            for optimizer in self._optimizers:
                factor = optimizer.state.get(parameter, {}).get(CLIP_FACTOR)
                if factor is not None:
                    found[name] = factor
        return found


def with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those that it is wrapped around."""
    inner = getattr(optimizer, "optimizer", None)
    return [optimizer, *(with_inner(inner) if isinstance(inner, Optimizer) else [])]


class Dynamics:
    """Gradient, weight and update of every dense parameter, around one optimizer step.

    `before` goes right before the step and keeps a copy of the weights; `after` goes right after it and returns the
    readings, on the device. A parameter without a gradient, or with a sparse one (see `tables`), is passed over.

    Args:
        named_parameters: Names and parameters.
        optimizers: The optimizers that hold them.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> sgd = torch.optim.SGD([weight], lr=0.5)
    >>> dynamics = Dynamics([("weight", weight)], [sgd])
    >>> weight.grad = torch.tensor([0.0, 2.0])
    >>> dynamics.before()
    >>> sgd.step()
    >>> found = {reading.area: reading.values.tolist() for reading in dynamics.after()}
    >>> found["weight_norm"], found["gradient_norm"], found["update_norm"], found["update_max"]
    ([5.0], [2.0], [1.0], [1.0])
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], optimizers: Sequence[Optimizer]) -> None:
        self._named = [(name, p) for name, p in named_parameters if p.numel()]
        self._optimizers = [inner for optimizer in optimizers for inner in with_inner(optimizer)]
        self._before: list[_Held] = []
        self._gradients: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def before(self, matrices: bool = False) -> None:
        """Keep the weights, and read the gradients, as they are before the step.

        Args:
            matrices: Keep weights of more than one dimension only, and read no gradients: enough for `look`.
        """
        self._before = [
            _hold(name, p, p.grad)
            for name, p in self._named
            if p.grad is not None and not p.grad.is_sparse and (p.dim() > 1 or not matrices)
        ]
        # Now, since an optimizer may clip gradients in place.
        self._gradients = [] if matrices else [_read_gradients(here) for here in _by_device(self._before)]

    @torch.no_grad()
    def look(self) -> list[Reading]:
        """Return `update_over_bound` only: at a fraction of the cost of `after`."""
        held, self._before = self._before, []
        found: list[Reading] = []
        for here in _by_device(held):
            found.append(Reading("update_over_bound", [each.name for each in here], _over_bound(*_updates(here))))
        return found

    @torch.no_grad()
    def after(self) -> list[Reading]:
        """Return what the step did; empty when `before` was not called, or no parameter had a gradient."""
        held, self._before = self._before, []
        gradients, self._gradients = self._gradients, []
        return [
            reading
            for here, found in zip(_by_device(held), gradients, strict=True)
            for reading in self._read(here, found)
        ]

    def _read(self, held: "list[_Held]", gradients: dict[str, Tensor]) -> list[Reading]:
        weights, updates, shards = _updates(held)
        rates_P, factors_P = self._rates_and_factors([each.parameter for each in held])
        w_P, u_P, largest_P = gradients["weight_norm"], _norms(updates, shards), _largest(updates, shards)
        floors = torch._foreach_abs(weights)
        torch._foreach_clamp_min_(floors, WEIGHT_FLOOR)
        over_P, step_P = _over_bound(weights, updates, shards), rates_P * factors_P
        r_P = u_P / step_P
        by_area = {
            **gradients,
            "update_norm": u_P,
            "gradient_over_weight": gradients["gradient_norm"] / w_P,
            "update_over_weight": u_P / w_P,
            "update_max": largest_P,
            "update_over_weight_max": _largest(kernels.bound_ratios(updates, list(floors), positive=True), shards),
            "update_over_bound": over_P,
            "direction_max": largest_P / step_P,
            # LAMB's own rule: 1 where the weights are 0, or the step is.
            "factor_lamb": torch.where((r_P == 0) | ((w_P == 0) & (r_P > 0)), 1.0, w_P / r_P),
            # What the ratio would have been without the factor of the optimizer in use.
            "factor_clippy": kernels.factor_of(over_P / factors_P),
        }
        names = [each.name for each in held]
        return [Reading(area, names, values) for area, values in by_area.items()] + self._accumulators(held)

    def _rates_and_factors(self, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Return eta and sigma of each parameter; NaN for eta where no optimizer holds it."""
        rates: dict[int, float | Tensor] = {}
        factors: dict[int, Tensor] = {}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    rates[id(p)] = group["lr"]
                    state = optimizer.state.get(p, {})
                    factors |= {id(p): state[key] for key in (TRUST_RATIO, CLIP_FACTOR) if key in state}
        one = torch.ones((), device=parameters[0].device)
        eta = [rates.get(id(p), math.nan) for p in parameters]
        if any(isinstance(rate, Tensor) for rate in eta):
            eta_P = torch.stack([torch.as_tensor(rate).reshape(()).to(one, non_blocking=True) for rate in eta])
        else:
            eta_P = torch.tensor(eta, dtype=one.dtype).to(one.device, non_blocking=True)
        return eta_P, torch.stack([factors.get(id(p), one).to(one).reshape(()) for p in parameters])

    def _accumulators(self, held: "list[_Held]") -> list[Reading]:
        """Return three quantiles of each accumulator, from an even sample of its coordinates: one sort for all."""
        names, samples, shards = [], [], []
        for each in held:
            for optimizer in self._optimizers:
                state = optimizer.state.get(each.parameter, {})
                squares = next((state[key] for key in SQUARES if isinstance(state.get(key), Tensor)), None)
                if squares is not None and squares.numel():
                    sample_S, ranks = _sample(squares)
                    names.append(each.name)
                    samples.append(sample_S)
                    shards.append(ranks)
        if not names:
            return []
        samples_PS = kernels.over_shards(torch.stack(samples), shards, lambda each: each.sum(0))
        sorted_PS = samples_PS.sort(dim=1).values
        return [
            Reading(f"accumulator_{area}", names, sorted_PS[:, round(q * (_SAMPLE - 1))])
            for area, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99))
        ]


class _Held(NamedTuple):
    """A parameter before the step; of a DTensor in shards, this rank's part of it."""

    name: str
    parameter: nn.Parameter
    before: Tensor
    grad: Tensor
    shards: Ranks | None
    """Who holds the other parts; None where this is all of it."""
    in_parts: bool
    """Whether `before` and `grad` are the plain tensors within DTensors."""


def _hold(name: str, p: nn.Parameter, grad: Tensor) -> _Held:
    parts = kernels.parts_of([p.detach(), grad])
    if parts is None or parts.dim:  # the units that AGC looks at have to lie on one rank
        return _Held(name, p, p.detach().clone(), grad, None, False)
    return _Held(name, p, parts.tensors[0].clone(), parts.tensors[1], parts.ranks, True)


@cache
def _spread(count: int, device: torch.device) -> Int64[Tensor, " sample"]:
    """Return places spread evenly over so many coordinates."""
    return torch.arange(_SAMPLE, device=device) * count // _SAMPLE


def _sample(x: Tensor) -> tuple[Float[Tensor, " sample"], Ranks | None]:
    """Return values from all over a tensor; if it is in shards those that lie here, zeros for others, and the ranks."""
    parts = kernels.parts_of([x])
    if parts is None or parts.ranks is None or parts.dim:
        flat = kernels.whole(x).reshape(-1)
        return flat[_spread(flat.numel(), flat.device)].float(), None
    flat, ranks = parts.tensors[0].reshape(-1), parts.ranks
    if not flat.numel():
        return flat.new_zeros(_SAMPLE).float(), ranks
    before = (
        -(-len(x) // ranks.size) * ranks.rank * x.shape[1:].numel()
    )  # all but the last have the same number of rows
    here_S = _spread(x.numel(), flat.device) - before
    mine_S = (here_S >= 0) & (here_S < flat.numel())
    return torch.where(mine_S, flat[here_S.clamp(0, flat.numel() - 1)].float(), 0.0), ranks


def _by_device(held: list[_Held]) -> list[list[_Held]]:
    devices = dict.fromkeys(each.parameter.device for each in held)
    return [[each for each in held if each.parameter.device == device] for device in devices]


def _read_gradients(held: list[_Held]) -> dict[str, Float[Tensor, " tensors"]]:
    """Return the norms of each gradient and weight, and what GC and AGC would make of the gradient."""
    weights = [each.before.to(wide_dtype(each.before.dtype)) for each in held]
    grads = [each.grad.to(w.dtype) for each, w in zip(held, weights, strict=True)]
    shards = [each.shards for each in held]
    g_P, w_P = _norms(grads, shards), _norms(weights, shards)
    whole_P = factor_within(g_P, AGC_SHARE * w_P.clamp(min=AGC_FLOOR))
    units = [
        agc_factor(g, w).to(g_P) if g.dim() > 1 else one for g, w, one in zip(grads, weights, whole_P, strict=True)
    ]
    agc_P = kernels.over_shards(torch.stack(units), shards, lambda each: each.amin(0))
    return {
        "gradient_norm": g_P,
        # A NaN sets no limit, so that it would show as a factor of 1.
        "factor_gc": torch.where(g_P.isnan(), torch.nan, factor_within(g_P, torch.full_like(g_P, GC_NORM))),
        "factor_agc": torch.where(g_P.isnan(), torch.nan, agc_P),
        "weight_norm": w_P,
    }


def _updates(held: list[_Held]) -> tuple[list[Tensor], list[Tensor], list[Ranks | None]]:
    """Return the weights before the step, how far it moved them, in float32 or wider; and who holds other parts."""
    # Norms of bfloat16 would be good for two digits.
    weights = [each.before.to(wide_dtype(each.before.dtype)) for each in held]
    values = [kernels.local(each.parameter) if each.in_parts else each.parameter.detach() for each in held]
    now = [value.to(w.dtype) for value, w in zip(values, weights, strict=True)]
    return weights, list(torch._foreach_sub(weights, now)), [each.shards for each in held]


def _over_bound(weights: list[Tensor], updates: list[Tensor], shards: list[Ranks | None]) -> Float[Tensor, " tensors"]:
    """Return max_i |u_i| / (0.5 |w_i| + 0.01) of each tensor: above 1, Clippy would have shortened the step."""
    bounds = kernels.update_bounds(weights, PAPER_RELATIVE, PAPER_ABSOLUTE, 0.0, [], 0.0)
    return _largest(kernels.bound_ratios(updates, bounds, positive=True), shards)


def agc_factor(grad: Tensor, weight: Tensor) -> Float[Tensor, ""]:
    """Return the least factor that `optim.AGC` would give a unit of this gradient, of more than one dimension.

    >>> agc_factor(torch.tensor([[0.0, 0.1], [0.0, 0.001]]), torch.tensor([[0.0, 2.0], [0.0, 2.0]]))
    tensor(0.2000)
    """
    return smallest(factor_within(unit_norms(grad, True), AGC_SHARE * unit_norms(weight, True).clamp(min=AGC_FLOOR)))


def _largest(tensors: list[Tensor], shards: list[Ranks | None]) -> Float[Tensor, " tensors"]:
    return kernels.over_shards(kernels.largest(tensors), shards)


def _norms(tensors: list[Tensor], shards: list[Ranks | None]) -> Float[Tensor, " tensors"]:
    if all(type(x) in (Tensor, nn.Parameter) and x.numel() <= _SMALL for x in tensors):
        found_P = torch.stack(torch._foreach_norm(tensors)).float()
    else:
        found_P = torch.stack([overall_norm(x).float() for x in tensors])
    return kernels.over_shards(found_P, shards, kernels.joint_norm)
