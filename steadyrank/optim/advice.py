"""Is a bound inert, strangling, or out of the rate's reach? Said with the numbers, before a run is wasted on it."""

import math
import statistics
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import kernels
from .bounded import CLIP_FACTOR
from .clippy import ClippyAdagrad, ClippyAdam
from .guarded import innermost

Kind = Literal["inert", "strangling", "out_of_reach"]

STRANGLED = 100.0
"""A rate that is cut by this or more is strangled. At the best settings found so far cuts were 1 to 30."""
OUT_OF_REACH = 30.0
"""A step this many times the bound of a typical coordinate is nothing but the bound. Adam's best rates were up to 6."""
SAMPLE = 1 << 16
"""Weights of a tensor that are looked at, evenly spread."""


class Advice(NamedTuple):
    """One finding about one parameter group."""

    kind: Kind
    group: int
    message: str
    numbers: dict[str, float]


def check(optimizer: Optimizer, model: nn.Module | None = None) -> list[Advice]:
    """Look at the bound of each group, at its rate and at its weights; return what is wrong, or nothing.

        inert         lr * R <= lambda_abs:   no update can exceed the bound, R the largest |delta| / lr there is
        strangling    the median tensor's cut max_i lr / bound_i (or, once there were steps, 1 / clip_factor) is 100 or
                      more: the smallest weights of a layer hold back all the others
        out_of_reach  the median tensor's median_i lr / bound_i is 30 or more: even typical coordinates would go far
                      beyond their bound, so the bound sets the step and the rate does not

    R is 1 for Adagrad, max(1, (1 - b1) / sqrt(1 - b2)) for Adam, infinite for a delayed accumulator or an unknown base.
    Cuts are worked out for steps of the size of the rate in every coordinate, which Adam takes and Adagrad comes near
    at its start. Reads weights on the host: call it before a run, not in its loop.

    Args:
        optimizer: any; groups without a bound are passed over.
        model: names the tensors in messages, where the optimizer does not know their names.

    >>> from steadyrank.optim import ClippyAdagrad
    >>> layer = nn.Linear(8, 8)
    >>> print(check(ClippyAdagrad(layer.parameters(), lr=0.01))[0].message)
    inert: no update can exceed the bound at this rate: lr 0.01 * 1 <= absolute_threshold 0.01, so this is the base
    optimizer unchanged; set lr above 0.01, or absolute_threshold below it
    >>> check(ClippyAdagrad(layer.parameters(), lr=0.1))
    []
    """
    return [found for _, found in _look(optimizer, model) if isinstance(found, Advice)]


def lines(optimizer: Optimizer, model: nn.Module | None = None) -> list[str]:
    """Return a line for each group that has a bound: what is wrong with it, or how far it reaches.

    >>> from steadyrank.optim import ClippyAdam
    >>> print(lines(ClippyAdam([nn.Parameter(Tensor([0.1] * 9))], lr=0.022))[0])
    in reach: a step of the rate's size is cut 2.0 times in the median tensor, and is 2.0 times a typical bound
    """
    return [found.message if isinstance(found, Advice) else found for _, found in _look(optimizer, model)]


def _look(optimizer: Optimizer, model: nn.Module | None) -> list[tuple[int, Advice | str]]:
    names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    bounded = [
        (index, group)
        for index, group in enumerate(optimizer.param_groups)
        if "absolute_threshold" in group and group["params"]
    ]
    return [(index, _check_group(optimizer, group, index, names)) for index, group in bounded]


def _check_group(optimizer: Optimizer, group: dict[str, Any], index: int, names: dict[int, str]) -> Advice | str:
    lr, absolute = float(group["lr"]), float(group["absolute_threshold"])
    reach = _reach(optimizer, group)
    decays = lr * group.get("weight_decay", 0.0) > group["variable_relative_threshold"]
    if group.get("calibration_steps"):
        return f"calibrating: the bound is known after {group['calibration_steps']} steps; raise the rate then"
    if lr * reach <= absolute and not decays:
        return Advice(
            "inert",
            index,
            f"inert: no update can exceed the bound at this rate: lr {lr:g} * {reach:.3g} <= absolute_threshold "
            f"{absolute:g}, so this is the base optimizer unchanged; set lr above {absolute / reach:.2g}, or "
            "absolute_threshold below it",
            {"lr": lr, "reach": reach, "absolute_threshold": absolute},
        )
    cuts, typical = _cuts(optimizer, group)
    if not cuts:
        return "in reach: there is nothing to clip"
    cut, usual = statistics.median(cuts), statistics.median(typical)
    worst = max(range(len(cuts)), key=cuts.__getitem__)
    param = [p for p in group["params"] if p.numel()][worst]
    name = names.get(id(param)) or _name(group, param)
    numbers = {"lr": lr, "median_cut": cut, "largest_cut": cuts[worst], "typical_ratio": usual}
    if usual >= OUT_OF_REACH:
        message = (
            f"out of reach: this rate is above the bound's reach: lr {lr:g} is {usual:,.0f} times the bound of a "
            f"typical coordinate, so the bound sets every step and the rate none; set lr to {lr / usual:.2g} to "
            f"{lr * OUT_OF_REACH / usual:.2g}, or larger thresholds"
        )
        return Advice("out_of_reach", index, message, numbers)
    if cut >= STRANGLED:
        message = (
            f"strangling: the median tensor's rate would be cut {cut:,.0f} times ('{name}' {cuts[worst]:,.0f} times) "
            f"by its smallest weights, whose bound is {lr / cut:.2g}; set absolute_threshold to about {lr / 10:.1g}, "
            "or overlook a share of the coordinates with quantile=0.001"
        )
        return Advice("strangling", index, message, numbers)
    return (
        f"in reach: a step of the rate's size is cut {cut:.1f} times in the median tensor, and is {usual:.1f} times a "
        "typical bound"
    )


def _reach(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Return the largest |delta| / lr that the base can give, without its weight decay; infinite where unknown."""
    base = innermost(optimizer)
    if isinstance(base, ClippyAdagrad):
        return 1.0 if group["accumulator"] == "standard" else math.inf
    if isinstance(base, torch.optim.Adagrad):
        return 1.0
    if isinstance(base, ClippyAdam | torch.optim.Adam):
        beta1, beta2 = (float(beta) for beta in group["betas"])
        return max(1.0, (1 - beta1) / math.sqrt(1 - beta2))
    return math.inf


def _cuts(optimizer: Optimizer, group: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return of each tensor how many times its rate is cut, and lr over the bound of its median coordinate."""
    cuts, typical = [], []
    states = [optimizer.state, innermost(optimizer).state]
    for param in group["params"]:
        if param.numel() == 0:
            continue
        bounds = _sample(param).abs() * group["variable_relative_threshold"] + group["absolute_threshold"]
        least = bounds.quantile(group.get("quantile", 0.0)).item() if group.get("quantile") else bounds.amin().item()
        lr = float(group["lr"])
        typical.append(lr / max(bounds.median().item(), 1e-300))
        factor = next((float(each[param][CLIP_FACTOR]) for each in states if CLIP_FACTOR in each.get(param, {})), None)
        cuts.append(1.0 / factor if factor else max(1.0, lr / max(least, 1e-300)))
    return cuts, typical


def _sample(param: Tensor) -> Tensor:
    flat = kernels.local(param.detach()).reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)].double()


def _name(group: dict[str, Any], param: Tensor) -> str:
    index = next(i for i, p in enumerate(group["params"]) if p is param)
    return str(group["param_names"][index]) if "param_names" in group else f"parameter {index}"
