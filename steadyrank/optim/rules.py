"""Rules that clip gradients by themselves or by the weights they belong to: what Clippy is compared with.

A rule is a frozen dataclass of options, to be given to `ClipGradients`. Its `clip` is a pure function: from the
gradients of all parameters, and from what the rule remembers, it makes clipped gradients and what is to be remembered.
Whoever calls it does the rest: it shows a rule finite numbers only, writes the states, and undoes refused steps.
The rules that remember what was normal are in `spikes`.

Symbols: g gradient, w weight, ||.|| the L2 norm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError
from . import kernels
from .guarded import check_not_negative, wide_dtype


@dataclass
class Gradient:
    """What a rule sees of one parameter: all of it, or with a sparse gradient the rows that it touches."""

    values: Tensor
    """g, finite, in float32 or wider; of a sparse gradient [touched rows, *width], duplicates summed."""
    weight: Tensor
    """w, of the same shape, in the parameter's dtype."""
    norm: Tensor
    """||values||, over all shards; 0-d."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """What the rule remembers of this parameter."""
    by_row: bool = False
    """Whether these are touched rows."""
    counts: Tensor | None = None
    """How often each touched row came up in the batch, for a rule that `counts_rows`: [touched rows]."""


@dataclass
class Clipped:
    """What a rule makes of the gradients: each list has one entry for each of them."""

    values: list[Tensor]
    factors: list[Tensor]
    """The smallest factor by which a coordinate was multiplied; 0-d, in [0, 1]."""
    states: list[dict[str, Tensor]] | None = None
    """What to remember of each parameter, if anything changed."""
    shared: dict[str, Tensor] = field(default_factory=dict)
    """What to remember of all together."""
    goes: Tensor | None = None
    """Whether the step is to be made at all; 0-d; None always makes it."""


@dataclass(frozen=True)
class Rule:
    """The base of gradient rules; a subclass is a frozen dataclass that gives `clip`, and if it remembers, `fresh`."""

    states: ClassVar[tuple[str, ...]] = ()
    """The state keys that the rule keeps of each parameter."""
    row_states: ClassVar[tuple[str, ...]] = ()
    """Those of them with one entry for each row of a table: a sparse gradient shows and changes its rows only."""
    joint: ClassVar[bool] = False
    """Whether all gradients are judged together, so that one that cannot be taken in refuses the whole step."""
    counts_rows: ClassVar[bool] = False
    """Whether the rule needs `Gradient.counts`."""
    parts_from: ClassVar[float] = math.inf
    """From how many dimensions on a rule may be shown the rows of a DTensor that lie on this rank, in place of all of
    it: where it looks at coordinates, at rows and at `Gradient.norm` only. What is the same in all is then taken care
    of: the least factor."""

    def fresh(self, param: Tensor, by_row: bool) -> dict[str, Tensor]:
        """Return what the rule remembers of a parameter before its first step."""
        return {}

    def fresh_shared(self, like: Tensor) -> dict[str, Tensor]:
        """Return what the rule remembers of all parameters together, of the dtype and on the device of `like`."""
        return {}

    def clip(self, gradients: Sequence[Gradient], shared: dict[str, Tensor]) -> Clipped:
        """Return clipped gradients, without changing what was given."""
        raise NotImplementedError(f"{type(self).__name__} gives no clip")


def factor_within(norm: Float[Tensor, "*shape"], limit: Float[Tensor, "*#shape"]) -> Float[Tensor, "*shape"]:
    """Return min(1, limit / norm), by which a norm is brought down to its limit: 1 for a norm of 0, whatever the limit.

    >>> factor_within(torch.tensor([0.0, 2.0, 0.0, 3.0]), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    tensor([1.0000, 0.5000, 1.0000, 0.0000])
    """
    return kernels.factor_of(kernels.bound_ratios([norm], [limit], positive=False)[0])


def unit_norms(x: Float[Tensor, "*shape"], by_row: bool) -> Float[Tensor, "*reduced"]:
    """Return ||x|| of each index of the first dimension, in a shape that broadcasts over x; or of all of x, 0-d.

    In float32 or wider.

    >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), True)
    tensor([[5.],
            [2.]])
    """
    dtype = wide_dtype(x.dtype)
    if not by_row:
        return kernels.whole(torch.linalg.vector_norm(x, dtype=dtype))
    rest = tuple(range(1, x.dim()))
    return torch.linalg.vector_norm(x, dim=rest, keepdim=True, dtype=dtype) if rest else x.abs().to(dtype)


def joint_norm(gradients: Sequence[Gradient]) -> Float[Tensor, ""]:
    """Return the norm of all gradients as one vector, on the device of the first.

    >>> joint_norm([Gradient(torch.ones(9), torch.ones(9), torch.tensor(n)) for n in (3.0, 4.0)])
    tensor(5.)
    """
    device = gradients[0].norm.device
    norms = torch.stack([each.norm.to(device) for each in gradients])
    return cast(Tensor, torch.linalg.vector_norm(norms))


def smallest(factor: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Return the smallest factor, over all shards; 1 for an empty tensor.

    >>> smallest(torch.tensor([0.5, 1.0])), smallest(torch.ones(0))
    (tensor(0.5000), tensor(1.))
    """
    if hasattr(factor, "to_local"):  # whose part here may be empty, where amin has no answer
        return kernels.factor_of(kernels.largest([factor.reciprocal()])[0])
    return factor.amin() if factor.numel() else factor.new_ones(())


def scaled(gradients: Sequence[Gradient], factors: Sequence[Tensor]) -> Clipped:
    """Return gradients multiplied by factors, which are 0-d or broadcast over them. A factor of 1 changes no bit.

    >>> clipped = scaled([Gradient(torch.ones(2), torch.ones(2), torch.tensor(2**0.5))], [torch.tensor([1.0, 0.5])])
    >>> clipped.values, clipped.factors
    ([tensor([1.0000, 0.5000])], [tensor(0.5000)])
    """
    factors = [f.to(each.values.device) for each, f in zip(gradients, factors, strict=True)]
    values = [each.values * factor for each, factor in zip(gradients, factors, strict=True)]
    return Clipped(values, [smallest(factor) for factor in factors])


def row_counts(grad: Tensor) -> Float[Tensor, " rows"]:
    """Return how often each touched row comes up in a sparse gradient, in the order in which they are coalesced.

    >>> grad = torch.sparse_coo_tensor([[5, 2, 5]], torch.zeros(3, 4), (9, 4), check_invariants=True)
    >>> row_counts(grad)
    tensor([1., 2.])
    """
    rows = grad._indices()
    ones = torch.ones_like(rows[0], dtype=wide_dtype(grad.dtype))
    return torch.sparse_coo_tensor(rows, ones, grad.shape[:1], check_invariants=False).coalesce().values()


def check_above_zero(option: str, value: float) -> None:
    """Raise ConfigError unless a number is above 0; it may be infinite.

    >>> check_above_zero("limit", 0.0)
    Traceback (most recent call last):
    ...
    steadyrank.errors.ConfigError: limit: expected a number above 0, came 0.0
    """
    if not value > 0:
        raise ConfigError(f"{option}: expected a number above 0, came {value}")


@dataclass(frozen=True)
class ClipValue(Rule):
    """Clip each coordinate by itself.

        g_i <- max(-limit, min(limit, g_i))

    Args:
        limit: the largest coordinate that a gradient keeps, above 0.

    Raises:
        ConfigError: the limit is not above 0.

    Source: as `torch.nn.utils.clip_grad_value_`, which takes no sparse gradients and lets NaN through.

    >>> g = torch.tensor([3.0, -0.5])
    >>> ClipValue(1.0).clip([Gradient(g, torch.zeros(2), g.norm())], {}).values
    [tensor([ 1.0000, -0.5000])]
    """

    parts_from: ClassVar[float] = 0
    limit: float

    def __post_init__(self) -> None:
        check_above_zero("limit", self.limit)

    def clip(self, gradients: Sequence[Gradient], shared: dict[str, Tensor]) -> Clipped:
        """Return the gradients with each coordinate within the limit."""
        largest = [kernels.largest([each.values])[0] for each in gradients]
        return Clipped(
            [each.values.clamp(-self.limit, self.limit) for each in gradients],
            [factor_within(x, torch.full_like(x, self.limit)) for x in largest],
        )


@dataclass(frozen=True)
class ClipGlobalNorm(Rule):
    """Scale all gradients together, so that their norm as one vector stays within a limit.

        g <- g * min(1, max_norm / (||g|| + 1e-6)),              g all gradients as one vector

    Where a gradient cannot be taken in, the whole step is refused: there is no norm to go by.

    Args:
        max_norm: the limit, above 0; may be infinite.

    Raises:
        ConfigError: the limit is not above 0.

    Source: as `torch.nn.utils.clip_grad_norm_` with the L2 norm, its 1e-6 included. Torch's takes no sparse gradients
    (its norm has no kernel for them), makes every gradient NaN where one is, and rounds the norms of bfloat16 gradients
    to bfloat16.

    >>> g = torch.tensor([3.0, 4.0])
    >>> ClipGlobalNorm(1.0).clip([Gradient(g, torch.zeros(2), g.norm())], {}).values
    [tensor([0.6000, 0.8000])]
    """

    parts_from: ClassVar[float] = 0
    joint: ClassVar[bool] = True
    max_norm: float

    def __post_init__(self) -> None:
        check_above_zero("max_norm", self.max_norm)

    def clip(self, gradients: Sequence[Gradient], shared: dict[str, Tensor]) -> Clipped:
        """Return the gradients scaled by one factor."""
        factor = (self.max_norm / (joint_norm(gradients) + 1e-6)).clamp(max=1.0)
        return scaled(gradients, [factor] * len(gradients))


@dataclass(frozen=True)
class ClipTensorNorm(Rule):
    """Scale each tensor's gradient by itself, so that its norm stays within a limit.

        g <- g * min(1, max_norm / ||g||)

    Args:
        max_norm: lambda, above 0; the paper searched 0.1, 0.01 and 0.001.

    Raises:
        ConfigError: the limit is not above 0.

    Source: "GC" (per layer) in Tang et al., KDD 2023, arXiv 2302.09178. It has nothing to do with LayerNorm.

    >>> g = torch.tensor([3.0, 4.0])
    >>> ClipTensorNorm(1.0).clip([Gradient(g, torch.zeros(2), g.norm())], {}).values
    [tensor([0.6000, 0.8000])]
    """

    parts_from: ClassVar[float] = 0
    max_norm: float

    def __post_init__(self) -> None:
        check_above_zero("max_norm", self.max_norm)

    def clip(self, gradients: Sequence[Gradient], shared: dict[str, Tensor]) -> Clipped:
        """Return the gradients, each scaled by its own factor."""
        return scaled(
            gradients, [factor_within(each.norm, torch.full_like(each.norm, self.max_norm)) for each in gradients]
        )


@dataclass(frozen=True)
class AGC(Rule):
    """Adaptive gradient clipping: each output unit's gradient stays within a share of its weights' norm.

        g_u <- g_u * min(1, clipping * max(||w_u||, floor) / ||g_u||)

    A unit u is an index of the first dimension (a row of a linear layer's weight, a filter, a row of a table); a vector
    or a scalar is one unit as a whole. Of a sparse gradient, each touched row is a unit.

    Args:
        clipping: lambda, 0 or more; 0.01 in the NFNets paper.
        floor: epsilon, 0 or more: what a unit whose weights are 0 is measured by, so that it can leave 0.

    Raises:
        ConfigError: an option is out of range.

    Source: Brock et al., arXiv 2102.06171, section 4, and its code, deepmind-research/nfnets/agc_optax.py. There a
    matrix with one row or column counts as a vector, and the paper leaves out the last layer: give that one to an
    optimizer of its own.

    >>> g = torch.tensor([[3.0, 4.0], [0.0, 0.001]])
    >>> AGC(clipping=0.5).clip([Gradient(g, torch.tensor([[2.0, 0.0], [1.0, 0.0]]), g.norm())], {}).values
    [tensor([[0.6000, 0.8000],
            [0.0000, 0.0010]])]
    """

    parts_from: ClassVar[float] = 2  # a vector is one unit
    clipping: float = 0.01
    floor: float = 1e-3

    def __post_init__(self) -> None:
        check_not_negative("clipping", self.clipping)
        check_not_negative("floor", self.floor)

    def clip(self, gradients: Sequence[Gradient], shared: dict[str, Tensor]) -> Clipped:
        """Return the gradients, each unit scaled by its own factor."""
        factors = []
        for each in gradients:
            by_row = each.by_row or each.values.dim() > 1
            limit = unit_norms(each.weight, by_row).clamp(min=self.floor) * self.clipping
            factors.append(factor_within(unit_norms(each.values, by_row), limit))
        return scaled(gradients, factors)


@dataclass(frozen=True)
class CowClip(Rule):
    """Clip each row of an embedding table by its weights' norm and by how often its id is in the batch.

        g_r <- g_r * min(1, n_r * max(ratio * ||w_r||, floor) / ||g_r||)

    n_r is how often row r came up: a sparse gradient has one entry for each occurrence before its duplicates are
    summed. In a dense gradient, and in a sparse one that was summed before it came here, n_r is 1.

    Args:
        ratio: r, 0 or more; 1 in the paper.
        floor: zeta, 0 or more: what a row whose weights are near 0 is measured by; the authors took 1e-5 on Criteo and
            1e-4 on Avazu. (Their code multiplies it by sqrt(width), and by the square of the ratio.)

    Raises:
        ConfigError: an option is out of range.

    Source: Zheng et al., arXiv 2204.06240, Algorithm 1, and its code, bytedance/LargeBatchCTR/clip.py. They have one
    table for each feature and clip tables only: a bias that starts at 0 would hardly move.

    >>> g = torch.tensor([[3.0, 4.0]])
    >>> row = Gradient(g, torch.tensor([[0.5, 0.0]]), g.norm(), by_row=True, counts=torch.tensor([2.0]))
    >>> CowClip().clip([row], {}).values
    [tensor([[0.6000, 0.8000]])]
    """

    parts_from: ClassVar[float] = 0
    counts_rows: ClassVar[bool] = True
    ratio: float = 1.0
    floor: float = 1e-5

    def __post_init__(self) -> None:
        check_not_negative("ratio", self.ratio)
        check_not_negative("floor", self.floor)

    def clip(self, gradients: Sequence[Gradient], shared: dict[str, Tensor]) -> Clipped:
        """Return the gradients, each row scaled by its own factor."""
        factors = []
        for each in gradients:
            by_row = each.values.dim() > 0
            limit = (unit_norms(each.weight, by_row) * self.ratio).clamp(min=self.floor)
            if each.counts is not None:
                limit = limit * each.counts.view(-1, *[1] * (limit.dim() - 1))
            factors.append(factor_within(unit_norms(each.values, by_row), limit))
        return scaled(gradients, factors)
