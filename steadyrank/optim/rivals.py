"""Rivals that scale the step itself by a norm: LAMB on Adagrad and on Adam, and AdamW with AdaFactor's update clipping.

All are told apart from Clippy by what they look at: an L2 norm over the whole tensor, not its worst coordinate.
"""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..errors import ConfigError
from . import kernels
from .bounded import CLIP_FACTOR
from .clippy import EXP_AVG, EXP_AVG_SQ
from .guarded import (
    BAD_STEPS,
    STEP,
    SUM,
    Ask,
    Asking,
    GuardedOptimizer,
    Touched,
    take_in,
    wide_dtype,
)

TRUST_RATIO = "trust_ratio"
"""State key: sigma of the last step, by which LAMB scales the step; 0-d, 0 or more, on the device. 0 if refused."""


def overall_norm(x: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Return the L2 norm of a tensor, over all its shards; 0 for an empty one.

    >>> overall_norm(torch.tensor([[3.0], [4.0]]))
    tensor(5.)
    """
    # By rows first: on a CPU, torch sums one after another, and a float32 norm over 4096 x 4096 is off by 1e-3.
    rows = torch.linalg.vector_norm(x, dim=-1) if x.dim() > 1 else x
    return kernels.whole(torch.linalg.vector_norm(rows))


def trust_ratio(w_norm: Float[Tensor, ""], u_norm: Float[Tensor, ""], ceiling: float) -> Float[Tensor, ""]:
    """Return sigma, by which LAMB scales an update, so that its norm becomes that of the weights.

        sigma = min(ceiling, ||w|| / ||u||)        1 in place of the quotient where ||w|| or ||u|| is 0

    1 too where the quotient is no finite number: weights that are not finite themselves, or norms whose squares leave
    the range (in float32 above 1.8e19). So one lost coordinate does not take its whole tensor along.

    Args:
        w_norm: ||w||, of the weights.
        u_norm: ||u||, of the step before the learning rate.
        ceiling: the largest sigma, above 0; may be infinite.

    >>> five, two = torch.tensor(5.0), torch.tensor(2.0)
    >>> trust_ratio(five, two, 10.0), trust_ratio(five, two, 2.0), trust_ratio(0 * five, two, 10.0)
    (tensor(2.5000), tensor(2.), tensor(1.))
    """
    ratio = w_norm / u_norm  # infinite or NaN where ||u|| is 0
    return torch.where((w_norm > 0) & torch.isfinite(ratio), ratio, 1.0).clamp(max=ceiling)


def moments_after(
    mean: Float[Tensor, "*shape"],
    square: Float[Tensor, "*shape"],
    grad: Float[Tensor, "*shape"],
    betas: tuple[float, float],
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return `kernels.adam_moments` of one tensor."""
    means, squares = kernels.adam_moments([mean], [square], [grad], betas)
    return means[0], squares[0]


def adam_direction(
    mean: Float[Tensor, "*shape"],
    square: Float[Tensor, "*shape"],
    step: Float[Tensor, ""],
    betas: tuple[float, float],
    eps: float,
) -> Float[Tensor, "*shape"]:
    """Return `kernels.adam_deltas` of one tensor at a learning rate of 1."""
    return kernels.adam_deltas([mean], [square], [step], torch.ones_like(step), betas, eps)[0]


def over_roots(grad: Float[Tensor, "*shape"], square: Float[Tensor, "*shape"], eps: float) -> Float[Tensor, "*shape"]:
    """Return g / max(sqrt(v), eps); the root of its mean square says how far the second moment lags behind.

        RMS = sqrt(mean_i(g_i^2 / max(v_i, eps^2)))        above 1 where v is too small for what came

    The squares of these quotients neither vanish nor overflow; 0 / 0 counts as 0.

    Args:
        grad: g.
        square: v, the mean of g^2, corrected for its start at zero and with this g already in it.
        eps: what sqrt(v) counts as at least, 0 or more.

    >>> over_roots(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 0.0]), 0.0)
    tensor([1., 0.])
    """
    return grad / torch.sqrt(square).clamp(min=max(eps, torch.finfo(square.dtype).tiny))


def _check_ceiling(group: dict[str, Any]) -> None:
    if not group["trust_clip"] > 0:
        raise ConfigError(f"trust_clip: expected a number above 0, or infinity, came {group['trust_clip']}")


def _fresh_scalar(param: Tensor) -> Float[Tensor, ""]:
    return torch.ones((), dtype=wide_dtype(param.dtype), device=param.device)


def _apply_lamb(
    each: Touched, update: Tensor, lr: Float[Tensor, ""], usable: Bool[Tensor, ""], group: dict[str, Any]
) -> Asking[None]:
    """Add weight decay to an update, scale it by the trust ratio, and make the step; none if it is not usable."""
    wide = each.weight.to(update.dtype)
    update = update + group["weight_decay"] * wide if group["weight_decay"] else update
    w_norm, u_norm = yield Ask((overall_norm(wide), overall_norm(update)))
    ratio = trust_ratio(w_norm, u_norm, group["trust_clip"])
    each.state[TRUST_RATIO].copy_(kernels.keep_where(usable, ratio))
    # The ratio first: with the rate before it, their product could leave the range where the step does not.
    each.weight.sub_(kernels.keep_where(usable, update * ratio * lr))


class LambAdagrad(GuardedOptimizer):
    """LAMB's layer-wise scale on Adagrad: each step has the norm of the weights, times the learning rate.

        G     <- G + g^2
        u     = g / sqrt(G + eps) + decay * w
        sigma = min(trust_clip, ||w|| / ||u||)       one scalar for each tensor; 1 if ||w|| = 0 or ||u|| = 0
        w     <- w - eta * sigma * u

    However small or large a gradient is, the tensor moves by eta * ||w||: a relative rate, of 1e-3 to 1e-1 (the paper's
    multiplier mu is part of it). Tensors that start at zero make one plain step, and grow from there in proportion to
    themselves: give biases a group of their own with another optimizer if they should move faster.

    Sparse gradients: duplicates of a row are summed; accumulators, both norms and weight decay see the touched rows
    only.

    A gradient that is not finite, or whose squares leave the accumulator's range, changes nothing but the counts.

    Args:
        params: parameters, groups, or (name, parameter) pairs.
        lr: learning rate eta, 0 or more; a number or a tensor of one element.
        initial_accumulator_value: G before the first step, 0 or more.
        eps: added to G under the root, 0 or more.
        weight_decay: decay, 0 or more.
        trust_clip: the largest sigma, above 0; infinite for none, 1 for a step never larger than Adagrad's.
        maximize: go up the gradient instead of down.

    Raises:
        ConfigError: an option is out of range, or a parameter is not of a real floating-point type.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = LambAdagrad([weight], lr=0.01)
    >>> weight.grad = torch.tensor([0.0, 1e6])
    >>> optimizer.step()
    >>> weight.data, optimizer.state[weight]["trust_ratio"]  # it moved by 0.01 * ||w||, a hundredth of its norm
    (tensor([3.0000, 3.9500]), tensor(5.))

    Source: what Tang et al., KDD 2023, arXiv 2302.09178, compare Clippy with: You et al., arXiv 1904.00962,
    Algorithm 2, with phi(x) = x, on Adagrad. They have no epsilon. The rules for norms of 0 are those of optax and
    timm; the ceiling on sigma is that of Fong et al., arXiv 2011.13584.
    """

    own_option: ClassVar[str] = "trust_clip"
    joins_parts: ClassVar[bool] = True
    shared_options: ClassVar[tuple[str, ...]] = ("initial_accumulator_value", "maximize")  # Adagrad's rate is another

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        initial_accumulator_value: float = 0.1,
        eps: float = 1e-7,
        weight_decay: float = 0.0,
        trust_clip: float = math.inf,
        maximize: bool = False,
    ) -> None:
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _check_ceiling(group)

    def _fresh_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        total = torch.full_like(param, group["initial_accumulator_value"], dtype=wide_dtype(param.dtype))
        return {**super()._fresh_state(param, group), SUM: total, TRUST_RATIO: _fresh_scalar(param)}

    def _update(self, each: Touched, group: dict[str, Any]) -> Asking[None]:
        total = each.state[SUM]
        grad, lr, usable = yield from take_in(each, total, group, 1.0)  # |g| / sqrt(G) is at most 1: this g is in G
        total.addcmul_(grad, grad)
        update = kernels.adagrad_deltas([grad], [total], torch.ones_like(lr), group["eps"])[0]
        yield from _apply_lamb(each, update, lr, usable, group)


class _OnMoments(GuardedOptimizer):
    """What optimizers on Adam's moments share: the moments, which a refused gradient leaves as they were."""

    joins_parts: ClassVar[bool] = True
    row_states: ClassVar[tuple[str, ...]] = (EXP_AVG, EXP_AVG_SQ)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        betas = group["betas"]
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas: expected two numbers in [0, 1), came {betas}")

    def _fresh_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        moments = {k: torch.zeros_like(param, dtype=wide_dtype(param.dtype)) for k in (EXP_AVG, EXP_AVG_SQ)}
        return {**super()._fresh_state(param, group), **moments}

    def _take_in(
        self, each: Touched, group: dict[str, Any]
    ) -> Asking[tuple[Tensor, Float[Tensor, ""], Bool[Tensor, ""], Float[Tensor, ""]]]:
        """Let the moments take in a gradient, and return it as `take_in` does, with the number of steps taken in."""
        state = each.state
        mean, square = state[EXP_AVG], state[EXP_AVG_SQ]
        # v is the accumulator here, and |m| / sqrt(v) is bounded by the betas alone.
        grad, lr, usable = yield from take_in(each, square, group, 1.0)
        # Selected: a zero in the place of a refused gradient would still make the moments decay.
        for old, new in zip((mean, square), moments_after(mean, square, grad, group["betas"]), strict=True):
            old.copy_(torch.where(usable, new, old))
        # 0 in a refused first step, whose update is then 0 / 0; it is selected away like that of any refused step.
        return grad, lr, usable, (state[STEP] - state[BAD_STEPS]).to(square.dtype)


class Lamb(_OnMoments):
    """LAMB: Adam whose step has the norm of the weights, times the learning rate.

        m     <- b1 * m + (1 - b1) * g,    v <- b2 * v + (1 - b2) * g^2
        u     = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay * w
        sigma = min(trust_clip, ||w|| / ||u||)       one scalar for each tensor; 1 if ||w|| = 0 or ||u|| = 0
        w     <- w - eta * sigma * u

    t counts the steps that were taken in.

    Sparse gradients: moments, both norms and weight decay see the touched rows only (moments as in
    `torch.optim.SparseAdam`).

    A gradient that is not finite, or whose squares leave the range of v, changes nothing but the counts.

    Args:
        params: parameters, groups, or (name, parameter) pairs.
        lr: learning rate eta, 0 or more; a number or a tensor of one element.
        betas: b1 and b2, each in [0, 1).
        eps: added to the root of v, 0 or more.
        weight_decay: decay, 0 or more; added to the update, and so inside the scaled step.
        trust_clip: the largest sigma, above 0; infinite for none.
        maximize: go up the gradient instead of down.

    Raises:
        ConfigError: an option is out of range, or a parameter is not of a real floating-point type.

    >>> layer = torch.nn.Linear(4, 1, bias=False)
    >>> optimizer, before = Lamb(layer.parameters(), lr=0.25), layer.weight.detach().clone()
    >>> layer(torch.ones(2, 4)).sum().backward()
    >>> optimizer.step()
    >>> (layer.weight - before).norm() / before.norm()
    tensor(0.2500, grad_fn=<DivBackward0>)

    Source: You et al., ICLR 2020, arXiv 1904.00962, Algorithm 2, with phi(x) = x and with bias correction, which
    version 3 of the paper and libraries after it leave out; the same numbers as `optax.lamb`. Every tensor is scaled,
    also one without weight decay (timm's `Lamb` leaves those to Adam), and no gradient is clipped first. The ceiling on
    sigma is that of Fong et al., arXiv 2011.13584.
    """

    own_option: ClassVar[str] = "trust_clip"
    shared_options: ClassVar[tuple[str, ...]] = ("betas", "eps", "maximize")  # Adam's rate is another

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        trust_clip: float = math.inf,
        maximize: bool = False,
    ) -> None:
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _check_ceiling(group)

    def _fresh_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {**super()._fresh_state(param, group), TRUST_RATIO: _fresh_scalar(param)}

    def _update(self, each: Touched, group: dict[str, Any]) -> Asking[None]:
        _, lr, usable, steps = yield from self._take_in(each, group)
        update = adam_direction(each.state[EXP_AVG], each.state[EXP_AVG_SQ], steps, group["betas"], group["eps"])
        yield from _apply_lamb(each, update, lr, usable, group)


class StableAdamW(_OnMoments):
    """AdamW with AdaFactor's update clipping: a lower rate while the second moment lags behind the gradient.

        m     <- b1' * m + (1 - b1') * g,    v <- b2' * v + (1 - b2') * g^2
        b'    = b * (1 - b^(t-1)) / (1 - b^t)                                  the betas, bias-corrected
        RMS   = sqrt(mean_i(g_i^2 / max(v_i, eps^2)))                          one scalar for each tensor
        eta'  = eta / max(1, RMS)
        w     <- w - eta' * decay * w - eta' * m / (sqrt(v) + eps)

    t counts the steps that were taken in. 1 / max(1, RMS) is in the state as `clip_factor`, 0 if refused. Where no
    gradient is larger than v expects, it is `torch.optim.AdamW`.

    Sparse gradients: moments, the mean in RMS and weight decay see the touched rows only (moments as in
    `torch.optim.SparseAdam`).

    A gradient that is not finite, or whose squares leave the range of v, changes nothing but the counts.

    Args:
        params: parameters, groups, or (name, parameter) pairs.
        lr: learning rate eta, 0 or more; a number or a tensor of one element.
        betas: b1 and b2, each in [0, 1).
        eps: added to the root of v, and what that root counts as at least in RMS; 0 or more.
        weight_decay: decay, 0 or more; decoupled from the gradient as in AdamW.
        maximize: go up the gradient instead of down.

    Raises:
        ConfigError: an option is out of range, or a parameter is not of a real floating-point type.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = StableAdamW([weight], lr=0.1)
    >>> for size in (1.0, 100.0):
    ...     weight.grad = torch.full((2,), size)
    ...     optimizer.step()
    >>> optimizer.state[weight]["clip_factor"]  # near 1 / sqrt(2): v, with two gradients in it, is near 100^2 / 2
    tensor(0.7089)

    Source: Wortsman et al., NeurIPS 2023, arXiv 2304.13013, Algorithm 2. The moments in the state are torch's, before
    bias correction (m as above is `exp_avg` / (1 - b1^t), which is the same recursion), so that a state of
    `torch.optim.AdamW` can be loaded to go on from. Decay uses eta', as in the paper; the authors' script uses eta.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    def _fresh_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {**super()._fresh_state(param, group), CLIP_FACTOR: _fresh_scalar(param)}

    def _update(self, each: Touched, group: dict[str, Any]) -> Asking[None]:
        grad, lr, usable, steps = yield from self._take_in(each, group)
        weight, square, betas, eps = each.weight, each.state[EXP_AVG_SQ], group["betas"], group["eps"]
        update = adam_direction(each.state[EXP_AVG], square, steps, betas, eps)
        if group["weight_decay"]:
            update = update + group["weight_decay"] * weight.to(update.dtype)
        norm = overall_norm(over_roots(grad, square / kernels.debias(betas[1], steps), eps))
        norm, count = yield Ask((norm,), (torch.full_like(norm, grad.numel()),))
        factor = kernels.factor_of(norm / count.clamp(min=1).sqrt())
        each.state[CLIP_FACTOR].copy_(kernels.keep_where(usable, factor))
        weight.sub_(kernels.keep_where(usable, update * (lr * factor)))
