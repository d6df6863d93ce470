"""Rules that remember what was normal, and clip or skip what is far above it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import ConfigError
from . import kernels
from .guarded import wide_dtype
from .rules import Clipped, Gradient, Rule, check_above_zero, factor_within, joint_norm, scaled

NORM_LEVEL = "grad_norm_level"
"""State key of AdaGC: what a tensor's gradient norm usually is; 0-d, infinite before the first."""
NORM_COUNT = "grad_norm_count"
"""State key of AdaGC: how many norms it has taken in; 0-d."""
SQUARE_MEAN = "grad_square_mean"
"""State key of SpikeClip: running mean of the squared gradient, of the parameter's shape."""
SQUARE_COUNT = "grad_square_count"
"""State key of SpikeClip: how many gradients it has taken in; 0-d, or for a table one for each row."""


def check_decay(option: str, value: float) -> None:
    """Raise ConfigError unless a decay lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"{option}: expected a number in [0, 1), came {value}")


def check_count(option: str, value: int, least: int = 0) -> None:
    """Raise ConfigError unless a count is a whole number and large enough."""
    if isinstance(value, bool) or value != int(value) or value < least:
        raise ConfigError(f"{option}: expected a whole number, {least} or more, came {value}")


@dataclass(frozen=True)
class AdaGC(Rule):
    """Clip each tensor's gradient norm relative to what it usually is.

        after the warm-up   h = min(1, relative * level / ||g||)
                            level <- decay * level + (1 - decay) * ||h * g||
        in the warm-up      h = min(1, max_norm / ||all gradients||)
                            level <- min(level, ||h * g||)
        g <- h * g

    The level takes in clipped norms only, so that a spike hardly raises it.

    Args:
        relative: lambda_rel, above 0.
        decay: beta, in [0, 1).
        warmup: length of the warm-up in steps, 0 or more.
        max_norm: lambda_abs, the limit of the joint norm in the warm-up; above 0, may be infinite.

    Raises:
        ConfigError: an option is out of range.

    Source: Wang et al., arXiv 2502.11034, Algorithm 1; the defaults are those of a public port (pytorch_optimizer). We
    depart from it where it would fail on sparse data: a gradient that is 0 everywhere is not taken in (one would set
    the level to 0, and the tensor would never move again), and the warm-up is counted for each tensor, not for the run.
    In the warm-up, the joint norm is that of the gradients that can be taken in.

    >>> rule, g = AdaGC(relative=1.5, warmup=1), torch.tensor([3.0, 4.0])
    >>> state = {"grad_norm_level": torch.tensor(1.0), "grad_norm_count": torch.tensor(1.0)}
    >>> clipped = rule.clip([Gradient(g, g, g.norm(), state)], {})
    >>> clipped.values, clipped.states[0]["grad_norm_level"]
    ([tensor([0.9000, 1.2000])], tensor(1.0100))
    """

    parts_from: ClassVar[float] = 0
    states: ClassVar[tuple[str, ...]] = (NORM_LEVEL, NORM_COUNT)
    relative: float = 1.05
    decay: float = 0.98
    warmup: int = 100
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        check_above_zero("relative", self.relative)
        check_decay("decay", self.decay)
        check_count("warmup", self.warmup)
        check_above_zero("max_norm", self.max_norm)

    def fresh(self, param: Tensor, by_row: bool) -> dict[str, Tensor]:
        """Return an infinite level, which nothing is above."""
        dtype = wide_dtype(param.dtype)
        level = torch.full((), torch.inf, dtype=dtype, device=param.device)
        return {NORM_LEVEL: level, NORM_COUNT: torch.zeros((), dtype=dtype, device=param.device)}

    def clip(self, gradients: Sequence[Gradient], shared: dict[str, Tensor]) -> Clipped:
        """Return the gradients, each scaled by its own factor."""
        joint = joint_norm(gradients)
        at_first = factor_within(joint, torch.full_like(joint, self.max_norm))
        factors, states = [], []
        for each in gradients:
            level, count = each.state[NORM_LEVEL], each.state[NORM_COUNT]
            warm = count < self.warmup
            later = factor_within(each.norm, level * self.relative)
            factor = torch.where(warm, at_first.to(level.device, level.dtype), later)
            clipped = factor * each.norm
            mean = self.decay * level + (1 - self.decay) * clipped
            now = torch.where(warm | torch.isinf(level), torch.minimum(level, clipped), mean)
            seen = each.norm > 0
            states.append({NORM_LEVEL: torch.where(seen, now, level), NORM_COUNT: count + seen})
            factors.append(factor)
        result = scaled(gradients, factors)
        result.states = states
        return result


@dataclass(frozen=True)
class ZClip(Rule):
    """Clip the joint norm of all gradients where it is unlike those before, the more the further it is out.

        z     = (n - mean) / (sqrt(var) + 1e-6),                n = ||all gradients||
        limit = mean + threshold^2 * sqrt(var) / z              where z > threshold; elsewhere n
        g     <- g * min(1, min(limit, max_norm) / n)
        mean  <- decay * mean + (1 - decay) * limit
        var   <- decay * var + (1 - decay) * (limit - mean)^2   with the new mean

    In the warm-up only `max_norm` clips, and mean and variance are those of the norms so far. Where a gradient cannot
    be taken in, the whole step is refused.

    Args:
        threshold: how many standard deviations above the mean a norm may be, above 0.
        decay: alpha, in [0, 1).
        warmup: length of the warm-up in steps, 1 or more.
        max_norm: a limit that always holds, above 0. Infinite, as in the paper; the official code has 1.0, for language
            models.

    Raises:
        ConfigError: an option is out of range.

    Source: Kumar et al., arXiv 2504.02507, section 3, reciprocal clipping, and its code, bluorion-com/ZClip, mode
    "zscore" with "adaptive_scaling". The code divides by n + 1e-6, we by n.

    >>> rule, g = ZClip(threshold=2.0), torch.tensor([3.0, 4.0])
    >>> shared = {"mean": torch.tensor(1.0), "var": torch.tensor(1.0), "count": torch.tensor(25.0)}
    >>> clipped = rule.clip([Gradient(g, g, g.norm())], shared)  # z = 4, so that the limit is 1 + 4 / 4
    >>> clipped.values
    [tensor([1.2000, 1.6000])]
    """

    parts_from: ClassVar[float] = 0
    joint: ClassVar[bool] = True
    threshold: float = 2.5
    decay: float = 0.97
    warmup: int = 25
    max_norm: float = float("inf")

    def __post_init__(self) -> None:
        check_above_zero("threshold", self.threshold)
        check_decay("decay", self.decay)
        check_count("warmup", self.warmup, least=1)
        check_above_zero("max_norm", self.max_norm)

    def fresh_shared(self, like: Tensor) -> dict[str, Tensor]:
        """Return mean and variance of no norms at all."""
        return {name: torch.zeros((), dtype=like.dtype, device=like.device) for name in ("mean", "var", "count")}

    def clip(self, gradients: Sequence[Gradient], shared: dict[str, Tensor]) -> Clipped:
        """Return the gradients scaled by one factor."""
        norm, mean, var, count = joint_norm(gradients), shared["mean"], shared["var"], shared["count"]
        warm = count < self.warmup
        spread = var.sqrt()
        z = (norm - mean) / (spread + 1e-6)
        spike = ~warm & (z > self.threshold)
        taken = torch.where(spike, mean + self.threshold**2 * spread / torch.where(spike, z, 1.0), norm)
        factor = factor_within(norm, taken.clamp(max=self.max_norm))
        # In the warm-up the mean and variance of n + 1 numbers, from those of n: Welford's recurrence.
        share = torch.where(warm, 1 / (count + 1), 1 - self.decay)
        new_mean = mean + share * (taken - mean)
        around = torch.where(warm, taken - mean, taken - new_mean)
        result = scaled(gradients, [factor] * len(gradients))
        result.shared = {
            "mean": new_mean,
            "var": var + share * (around * (taken - new_mean) - var),
            "count": count + 1,
        }
        return result


@dataclass(frozen=True)
class SpikeClip(Rule):
    """Cut each coordinate that is far above its own running mean square down to it.

        g_i <- sign(g_i) * sqrt(threshold * v_i)                where g_i^2 > threshold * v_i
        v_i <- decay * v_i + (1 - decay) * g_i^2                with the clipped g

    v is the rule's own, not the inner's: so it works on any optimizer, at the cost of one more number for each weight.
    On an Adam whose second beta is `decay` the two are the same. It grows from 0 without correction, as there, so that
    the threshold in standard deviations is sqrt(threshold * (1 - decay^t)): 10 after the warm-up, 70 in the end.

    Of a sparse gradient, v and the warm-up of touched rows only are looked at and changed.

    Args:
        threshold: theta, above 0; 5000 in the paper.
        decay: beta_2, in [0, 1).
        warmup: for how many steps nothing is clipped, 0 or more.

    Raises:
        ConfigError: an option is out of range.

    Source: the spike-aware clip of SPAM, Huang et al., arXiv 2501.06842, and its code,
    TianjinYellow/SPAM-Optimizer. Its momentum reset is not part of this. We depart where v_i is 0: nothing is clipped
    there. In theirs such a coordinate, of a unit that was dead or a row that was not there in the warm-up, has its
    gradients cut to 0 for ever.

    >>> state = {"grad_square_mean": torch.tensor([1.0, 1.0]), "grad_square_count": torch.tensor(20.0)}
    >>> g = torch.tensor([-300.0, 3.0])
    >>> SpikeClip(threshold=100.0).clip([Gradient(g, g, g.norm(), state)], {}).values
    [tensor([-10.,   3.])]
    """

    parts_from: ClassVar[float] = 0
    states: ClassVar[tuple[str, ...]] = (SQUARE_MEAN, SQUARE_COUNT)
    row_states: ClassVar[tuple[str, ...]] = (SQUARE_MEAN, SQUARE_COUNT)
    threshold: float = 5000.0
    decay: float = 0.999
    warmup: int = 20

    def __post_init__(self) -> None:
        check_above_zero("threshold", self.threshold)
        check_decay("decay", self.decay)
        check_count("warmup", self.warmup)

    def fresh(self, param: Tensor, by_row: bool) -> dict[str, Tensor]:
        """Return mean squares of no gradients at all."""
        dtype = wide_dtype(param.dtype)
        count = torch.zeros(len(param) if by_row else (), dtype=dtype, device=param.device)
        return {SQUARE_MEAN: torch.zeros_like(param, dtype=dtype), SQUARE_COUNT: count}

    def clip(self, gradients: Sequence[Gradient], shared: dict[str, Tensor]) -> Clipped:
        """Return the gradients without their spikes."""
        values, factors, states = [], [], []
        for each in gradients:
            square, count = each.state[SQUARE_MEAN], each.state[SQUARE_COUNT]
            over = count >= self.warmup
            if over.dim():
                over = over.view(-1, *[1] * (square.dim() - 1))
            cap = torch.sqrt(square * self.threshold)
            spike = over & (square > 0) & (each.values.abs() > cap)
            clipped = torch.where(spike, torch.copysign(cap, each.values), each.values)
            worst = kernels.largest([torch.where(spike, each.values / cap, 1.0)])[0]
            values.append(clipped)
            factors.append(kernels.factor_of(worst))
            mean = self.decay * square + (1 - self.decay) * clipped.square()
            states.append({SQUARE_MEAN: mean, SQUARE_COUNT: count + 1})
        return Clipped(values, factors, states)


@dataclass(frozen=True)
class SkipSpikes(Rule):
    """Make no step where the joint norm of all gradients is far above those of the last steps.

        skip where n > mean + sigmas * std,                     n = ||all gradients||

    Mean and standard deviation (of a sample) are those of the last `window` norms, skipped ones among them: a lasting
    rise is skipped until the window knows it, not for ever. Nothing is skipped before max(20, window / 2) norms are
    known, or the whole window if it is shorter. A flat history counts as having a spread of 1e-6 of its mean. Where a
    gradient cannot be taken in, the step is refused and its norm is not remembered. `optimizer.shared["skipped"]`
    counts the skipped steps.

    Args:
        sigmas: how many standard deviations above the mean is too far, above 0.
        window: how many norms are remembered, 2 or more.

    Raises:
        ConfigError: an option is out of range.

    Source: `SkipStepOptimizer` of allenai/OLMo-core, which looks at the loss too, and skips what is far *below* the
    mean as well. There, one NaN in the window skips every step until it has left it.

    >>> g, ring = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])
    >>> shared = {"norms": ring, "count": torch.tensor(2), "skipped": torch.tensor(0)}
    >>> clipped = SkipSpikes(sigmas=3.0, window=2).clip([Gradient(g, g, g.norm())], shared)
    >>> clipped.goes, clipped.shared["norms"], clipped.shared["skipped"]
    (tensor(False), tensor([5., 2.]), tensor(1))
    """

    parts_from: ClassVar[float] = 0
    joint: ClassVar[bool] = True
    sigmas: float = 6.0
    window: int = 128

    def __post_init__(self) -> None:
        check_above_zero("sigmas", self.sigmas)
        check_count("window", self.window, least=2)

    def fresh_shared(self, like: Tensor) -> dict[str, Tensor]:
        """Return an empty window."""
        count = torch.zeros((), dtype=torch.int64, device=like.device)
        norms = torch.zeros(self.window, dtype=like.dtype, device=like.device)
        return {"norms": norms, "count": count, "skipped": count.clone()}

    def clip(self, gradients: Sequence[Gradient], shared: dict[str, Tensor]) -> Clipped:
        """Return the gradients as they are, and whether the step is to be made."""
        norm, norms, count = joint_norm(gradients), shared["norms"], shared["count"]
        place = torch.arange(self.window, device=norms.device)
        mean, spread = mean_and_spread(norms, place < count)
        spread = torch.maximum(spread, mean * 1e-6)
        known = count >= min(self.window, max(20, self.window // 2))
        goes = ~(known & (norm > mean + self.sigmas * spread))
        result = Clipped([each.values for each in gradients], [torch.ones_like(each.norm) for each in gradients])
        result.goes = goes
        result.shared = {
            "norms": torch.where(place == count % self.window, norm, norms),
            "count": count + 1,
            "skipped": shared["skipped"] + ~goes,
        }
        return result


def mean_and_spread(
    x: Float[Tensor, " window"], known: Bool[Tensor, " window"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return mean and standard deviation (of a sample) of the known entries; 0 where there are too few of them.

    >>> mean_and_spread(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    (tensor(2.), tensor(1.4142))
    """
    count = known.sum()
    mean = torch.where(known, x, 0.0).sum() / count.clamp(min=1)
    around = torch.where(known, x - mean, 0.0)
    return mean, torch.sqrt(around.square().sum() / (count - 1).clamp(min=1))
