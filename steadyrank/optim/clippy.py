"""Clippy: Adagrad whose step is scaled down, tensor by tensor, until no coordinate changes by more than its bound."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..errors import check_known
from . import kernels
from .guarded import SUM, GuardedOptimizer, check_not_negative, take_in, wide_dtype

CLIP_FACTOR = "clip_factor"
"""State key: sigma of the last step; 0-d, in [0, 1], on the device. 0 if refused, 1 if nothing was clipped."""

AccumulatorForm = Literal["standard", "delayed", "delayed_clipped"]
"""When the accumulator takes in the gradient: before the step, after it, or after it with the gradient times sigma."""


class ClippyAdagrad(GuardedOptimizer):
    """Clippy on Adagrad: each coordinate of the *actual update* stays within a bound relative to its weight.

        standard          G <- G + g^2, then the step                              (the paper)
        delayed           the step, then G <- G + g^2                              (the authors' default)
        delayed_clipped   the step, then G <- G + (sigma * g)^2                    (a spike leaves the rate as it was)

        p     = 1 / sqrt(G + eps)
        bound = lambda_rel * |w| + lambda_acc * p + lambda_abs
        sigma = min(1, min_i bound_i / (eta * |g_i| * p_i))                        one scalar for each tensor
        w     <- w - sigma * eta * g * p

    In the standard form |g| * p is below 1, so nothing is ever clipped while lr is at most `absolute_threshold`.

    Sparse gradients: duplicates of a row are summed, only the touched rows count, and one sigma holds for the whole
    table.

    A gradient with a NaN or an infinity, or so large that the accumulator would overflow (float32: from 1.8e19 on),
    changes nothing but the counts: weights and accumulator of that tensor stay as they were, `state["bad_steps"]`
    grows, `state["clip_factor"]` is 0.

    Args:
        params: parameters, groups, or (name, parameter) pairs.
        lr: learning rate eta, 0 or more; a number or a tensor of one element.
        variable_relative_threshold: lambda_rel, 0 or more; 0.5 in the paper, 0.1 in the authors' code.
        absolute_threshold: lambda_abs, 0 or more, may be infinite; 0.01 in the paper, 1e-7 in the authors' code.
        accumulator_relative_threshold: lambda_acc, 0 or more; not in the paper.
        initial_accumulator_value: G before the first step, 0 or more.
        eps: added to G under the root, 0 or more.
        accumulator: when the accumulator takes in the gradient.
        maximize: go up the gradient instead of down.

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
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "variable_relative_threshold": variable_relative_threshold,
            "absolute_threshold": absolute_threshold,
            "accumulator_relative_threshold": accumulator_relative_threshold,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "accumulator": accumulator,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_known(group["accumulator"], get_args(AccumulatorForm), "accumulator form")
        for option in ("variable_relative_threshold", "accumulator_relative_threshold"):
            check_not_negative(option, group[option])
        check_not_negative("absolute_threshold", group["absolute_threshold"], infinite=True)

    def _fresh_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        dtype = wide_dtype(param.dtype)
        return {
            **super()._fresh_state(param, group),
            SUM: torch.full_like(param, group["initial_accumulator_value"], dtype=dtype),
            CLIP_FACTOR: torch.ones((), dtype=dtype, device=param.device),
        }

    def _update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        total, eps, form = state[SUM], group["eps"], group["accumulator"]
        grad, lr, usable = take_in(grad, state, group, group["initial_accumulator_value"] + eps)
        if form == "standard":
            total.addcmul_(grad, grad)
        delta = kernels.adagrad_delta(grad, total, lr, eps)
        bound = kernels.update_bound(
            weight.to(total.dtype),
            total,
            group["variable_relative_threshold"],
            group["accumulator_relative_threshold"],
            group["absolute_threshold"],
            eps,
        )
        factor = kernels.clip_factor(delta, bound)
        weight.addcmul_(delta, factor, value=-1)
        if form == "delayed":
            total.addcmul_(grad, grad)
        elif form == "delayed_clipped":
            grad.mul_(factor)
            total.addcmul_(grad, grad)
        state[CLIP_FACTOR].copy_(kernels.keep_where(usable, factor))
