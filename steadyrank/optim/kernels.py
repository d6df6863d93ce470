"""The formulas of the optimizers: tensors in, tensors out; no state, no defaults, no host sync.

Symbols: w weight, g gradient, G accumulator (a sum of squared gradients), m and v Adam's moments, eta learning rate,
delta the step that would be taken unbounded, sigma clip factor; P tensors.

What is done alike for many tensors takes lists of them, so that on a GPU one launch serves a whole model (torch's
`_foreach_` functions, which its own optimizers are made of). All of it also takes DTensors: what is reduced over a
tensor is reduced over its shards. A plain tensor that is one rank's part of a table (its parameter is `sharded_over`
ranks), or of a DTensor (`parts_of`), has its numbers reduced by `over_shards`.

What comes out of bad numbers is decided once, by `is_usable` or `are_usable`: a gradient that fails is replaced by
zeros (`keep_where`) before anything is computed from it. The other kernels then only see finite numbers.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..ranks import Ranks

Tensors = list[Tensor]


def is_usable(
    norm: Float[Tensor, ""], total: Float[Tensor, ""], lr: Float[Tensor, ""], floor: float
) -> Bool[Tensor, ""]:
    """Say whether a gradient can be taken in without any number leaving the finite range.

        finite(sum G + ||g||^2)  and  finite(eta * ||g|| / sqrt(floor)),      ||g|| the L2 norm

    The first is false for NaN and infinity, and for a finite gradient so large that its squares overflow the
    accumulator (in float32 from a norm of 1.8e19 on): such a coordinate would never move again. The second bounds the
    update. Sums stand in for the largest coordinate, which costs less and errs on the safe side: a gradient at the
    very edge of the range is refused too early, never too late.

    Args:
        norm: ||g||, of the whole tensor, in the accumulator's dtype or a wider one, which sets the range.
        total: sum G, of the whole accumulator before the step, 0 or more.
        lr: eta.
        floor: a number above 0 that G plus epsilon never goes below.

    Returns:
        One truth value on the device. True for an empty tensor and a finite rate.

    >>> one, big = torch.tensor(1.0), torch.tensor(1e20)
    >>> [bool(is_usable(norm, one, 0.1 * one, 1e-7)) for norm in (big, big / 100, big * torch.nan)]
    [False, True, False]
    """
    # Of single numbers torch.isfinite takes twice as long, as it is made of more operations.
    return ((total + norm.square()).abs() < math.inf) & ((norm * lr / math.sqrt(floor)).abs() < math.inf)


def keep_where(usable: Bool[Tensor, ""], x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `x`, or zeros where it is not usable: selected, since 0 * inf would be NaN.

    >>> keep_where(torch.tensor(False), torch.tensor([1.0, float("nan")]))
    tensor([0., 0.])
    """
    return torch.where(usable, x, 0.0)


def whole(x: Tensor) -> Tensor:
    """Return a reduced value as a plain tensor: of a DTensor, the value over all shards.

    >>> whole(torch.tensor(2.0))
    tensor(2.)
    """
    return cast(Tensor, x.full_tensor()) if hasattr(x, "full_tensor") else x


def largest(xs: Tensors) -> Float[Tensor, " tensors"]:
    """Return the largest |x| of each tensor, over all its shards: [P]; a NaN counts as infinity, an empty tensor as 0.

    Shards cost one collective for all tensors of one mesh together.

    >>> largest([torch.tensor([1.0, -3.0]), torch.zeros(0)])
    tensor([3., 0.])
    """
    plain = [local(x) for x in xs]
    filled = [x for x in plain if x.numel()]
    if filled and filled[0].device.type == "cpu":  # where the norm takes twenty times as long
        sizes = iter([x.abs().amax() for x in filled])
    else:
        sizes = iter(torch._foreach_norm(filled, ord=math.inf) if filled else ())
    found = torch.stack([next(sizes) if x.numel() else x.new_zeros(()) for x in plain])
    found = found.nan_to_num(nan=math.inf, posinf=math.inf)  # some collectives' maximum loses a NaN
    # In the order of the tensors: every process has to reduce over the same mesh at the same time.
    meshes = list(dict.fromkeys(x.device_mesh for x in xs if hasattr(x, "device_mesh")))
    if not meshes:
        return found
    from torch.distributed.tensor import DTensor, Partial  # heavy, and loaded already by whoever made the shards

    for mesh in meshes:
        # The largest of a replicated tensor over its copies is its own: the same reduction serves every placement.
        over_shards = DTensor.from_local(found, mesh, [Partial("max")] * mesh.ndim).full_tensor()
        here = [getattr(x, "device_mesh", None) == mesh for x in xs]
        found = torch.stack([(over_shards if mine else found)[i] for i, mine in enumerate(here)])
    return found


def over_shards(
    found: Float[Tensor, "tensors *shape"],
    shards: Sequence[Ranks | None],
    reduce: Callable[[Tensor], Tensor] = lambda each: each.amax(0),
) -> Float[Tensor, "tensors *shape"]:
    """Reduce what each rank found of its part of some tensors; one collective for all of them.

    Args:
        found: Of each tensor.
        shards: Of each tensor, the ranks that hold parts of it; None where it is whole.
        reduce: From what all ranks found, one below the other, to what holds for all of them; the largest by default.

    >>> over_shards(torch.tensor([3.0, 1.0]), [None, None])
    tensor([3., 1.])
    """
    for ranks in dict.fromkeys(each for each in shards if each is not None):
        if ranks.is_alone:
            continue
        mine = [i for i, each in enumerate(shards) if each == ranks]
        here = found if len(mine) == len(shards) else torch.stack([found[i] for i in mine])
        places = dict(zip(mine, reduce(ranks.gather(here)).unbind(), strict=True))
        found = torch.stack([places.get(i, x) for i, x in enumerate(found.unbind())])
    return found


def each_over_shards(
    found: Sequence[Float[Tensor, "*shape"]], shards: Sequence[Ranks | None], reduce: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Reduce as `over_shards` does, of tensors on any device and of any dtype; one collective for each kind.

    >>> each_over_shards([torch.tensor(3.0), torch.tensor(1.0).double()], [None, None], joint_norm)
    [tensor(3.), tensor(1., dtype=torch.float64)]
    """
    reduced = list(found)
    kinds = [None if ranks is None else (ranks, x.device, x.dtype) for x, ranks in zip(found, shards, strict=True)]
    for kind in dict.fromkeys(kinds):  # in the order of the tensors, which is that of all ranks
        if kind is not None:
            mine = [i for i, each in enumerate(kinds) if each == kind]
            those = over_shards(torch.stack([found[i] for i in mine]), [kind[0]] * len(mine), reduce)
            for i, x in zip(mine, those.unbind(), strict=True):
                reduced[i] = x
    return reduced


def local(x: Tensor) -> Tensor:
    """Return the part of a DTensor that lies here, out of autograd's sight; of a plain tensor, itself."""
    if not hasattr(x, "to_local"):
        return x
    with torch.no_grad():  # with gradients on, torch makes a node of its graph
        return cast(Tensor, x.to_local())


def joint_norm(norms: Float[Tensor, "ranks *shape"]) -> Float[Tensor, "*shape"]:
    """Return the L2 norm of what is in parts from those of the parts; for `over_shards`.

    >>> joint_norm(torch.tensor([[3.0], [4.0]]))
    tensor([5.])
    """
    return cast(Tensor, torch.linalg.vector_norm(norms, dim=0))


class Parts(NamedTuple):
    """What lies on this rank of some DTensors that are cut alike over one row of ranks."""

    tensors: Tensors
    """The plain tensors within, where all that is written into them is seen."""
    ranks: Ranks | None
    """Who holds the other parts; None where each rank has all of it."""
    dim: int
    """The dimension that is cut."""


def parts_of(tensors: Sequence[Tensor]) -> Parts | None:
    """Return the parts of DTensors that lie here, for plain operations on them; None where DTensor has to do it.

    It dispatches every operation in Python, which on small tensors takes ten times as long as the operation, and
    reduces every tensor by itself. Left to it is what lies on a mesh of more than one dimension, in another way than in
    shards or copies, or not as the others do.

    Args:
        tensors: A parameter and what belongs to it: DTensors that lie as it does, and plain tensors; out of autograd's
            sight.
    """
    mesh = getattr(tensors[0], "device_mesh", None)
    if mesh is None or mesh.ndim != 1 or mesh.get_coordinate() is None or torch.compiler.is_compiling():
        return None
    from torch.distributed.tensor import DTensor, Replicate, Shard  # heavy, and loaded already by whoever made it

    [placement] = tensors[0].placements  # type: ignore[attr-defined]  # a DTensor
    kind, here = type(placement), []
    for x in tensors:
        if isinstance(x, DTensor):
            if x.placements != (placement,) or x.device_mesh != mesh:
                return None
            x = x.to_local()
            if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != mesh.device_type:
                return None
        here.append(x)
    if kind is Shard:
        return Parts(here, _ranks_of(mesh.get_group()) if mesh.size() > 1 else None, placement.dim)
    return Parts(here, None, 0) if kind is Replicate else None


def as_part(x: Tensor, like: Tensor) -> Tensor:
    """Return the DTensor of which this rank has a part, that lies as another one does."""
    from torch.distributed.tensor import DTensor  # loaded already

    assert isinstance(like, DTensor)
    mesh, places = like.device_mesh, like.placements
    return DTensor.from_local(x, mesh, places, run_check=False, shape=like.shape, stride=like.stride())


@lru_cache(maxsize=16)
def _ranks_of(group: Any) -> Ranks:
    return Ranks(torch.distributed.get_rank(group), torch.distributed.get_world_size(group), group, group)


HEADROOM = 0.75
"""How near to the ends of a dtype's range squares and steps may come."""


def gradient_limit(dtype: torch.dtype, lr: float | Tensor, floor: float) -> float | Tensor:
    """Return the largest coordinate that a gradient may have: its square and its step stay far from infinity.

        limit = 3/4 * min(sqrt(max), max * sqrt(floor) / eta),        max the largest number of the dtype

    Args:
        dtype: of the accumulator.
        lr: eta; a tensor gives a tensor.
        floor: what the accumulator plus epsilon never goes below, above 0.

    >>> f"{gradient_limit(torch.float32, 0.1, 1e-7):.2e}"
    '1.38e+19'
    """
    top = torch.finfo(dtype).max
    square, step = math.sqrt(top) * HEADROOM, top * HEADROOM * math.sqrt(floor)
    if isinstance(lr, Tensor):
        return (step / lr).clamp(max=square)
    return min(square, step / lr) if lr > 0 else square


def are_usable(
    grads: Tensors, limit: float | Tensor, lr: float | Float[Tensor, ""], shards: Sequence[Ranks | None] = ()
) -> Bool[Tensor, " tensors"]:
    """Say of each gradient whether it can be taken in: no coordinate above the limit, none NaN, a finite rate.

    Where a tensor is cut over ranks (`shards`), the same is said on each of them.

    >>> are_usable([torch.tensor([1.0]), torch.tensor([torch.nan, 1.0]), torch.tensor([1e20])], 1e16, 0.1)
    tensor([ True, False, False])
    """
    sizes = over_shards(largest(grads), shards)
    return (sizes <= limit) & torch.isfinite(torch.as_tensor(lr, device=sizes.device))


def accumulate_squares(totals: Tensors, grads: Tensors) -> None:
    """Add g^2 to each accumulator in place, which stops at the largest number instead of at infinity."""
    torch._foreach_addcmul_(totals, grads, grads)
    torch._foreach_clamp_max_(totals, torch.finfo(totals[0].dtype).max)


def adagrad_deltas(grads: Tensors, totals: Tensors, lr: Float[Tensor, ""], eps: float) -> list[Tensor]:
    """Return eta * g / sqrt(G + eps), what Adagrad subtracts from each weight.

    >>> adagrad_deltas([torch.tensor([2.0, -4.0])], [torch.tensor([3.0, 15.0])], torch.tensor(0.1), 1.0)
    [tensor([ 0.1000, -0.1000])]
    """
    roots = torch._foreach_add(totals, eps)
    torch._foreach_sqrt_(roots)
    if eps == 0:  # only then can it be 0 / 0: where nothing was ever accumulated
        torch._foreach_clamp_min_(roots, torch.finfo(roots[0].dtype).tiny)
    deltas = torch._foreach_div(grads, roots)
    torch._foreach_mul_(deltas, lr)
    return list(deltas)


def debias(beta: float, step: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return 1 - beta^t, by which a running mean that began at zero is too small after t steps.

    By expm1: the plain difference would lose half the digits of float32 at the first steps of a beta near 1.

    >>> debias(0.999, torch.tensor(1.0))
    tensor(0.0010)
    """
    return -torch.expm1(step * math.log(beta)) if beta > 0 else torch.ones_like(step)


def adam_moments(
    means: Tensors, squares: Tensors, grads: Tensors, betas: tuple[float, float]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return Adam's moments after one more gradient: m + (1 - b1) * (g - m), and b2 * v + (1 - b2) * g^2.

    >>> adam_moments([torch.zeros(1)], [torch.zeros(1)], [torch.tensor([2.0])], (0.5, 0.75))
    ([tensor([1.])], [tensor([1.])])
    """
    new_means = list(torch._foreach_lerp(means, grads, 1 - betas[0]))
    new_squares = list(torch._foreach_mul(squares, betas[1]))
    torch._foreach_addcmul_(new_squares, grads, grads, value=1 - betas[1])
    return new_means, new_squares


def adam_deltas(
    means: Tensors, squares: Tensors, steps: Tensors, lr: Float[Tensor, ""], betas: tuple[float, float], eps: float
) -> list[Tensor]:
    """Return eta * m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), what Adam subtracts from each weight.

    Args:
        means: m, after this step's gradient.
        squares: v, likewise.
        steps: t of each, 1 or more, 0-d.
        lr: eta.
        betas: b1 and b2.
        eps: added to the root.

    Source: Kingma and Ba, arXiv 1412.6980, Algorithm 1.

    >>> one = torch.ones(())
    >>> adam_deltas([torch.tensor([0.1])], [torch.tensor([0.004])], [one], one, (0.9, 0.999), 0.0)[0].round(decimals=3)
    tensor([0.5000])
    """
    roots = [torch.sqrt(v / debias(betas[1], t)) for v, t in zip(squares, steps, strict=True)]
    torch._foreach_add_(roots, max(eps, torch.finfo(roots[0].dtype).tiny))
    rates = [lr / debias(betas[0], t) for t in steps]
    return [m * rate / root for m, rate, root in zip(means, rates, roots, strict=True)]


def update_bounds(
    weights: Tensors, relative: float, absolute: float, accumulator_relative: float, totals: Tensors, eps: float
) -> list[Tensor]:
    """Return how far each coordinate may move: lambda_rel * |w| + lambda_acc / sqrt(G + eps) + lambda_abs.

    The middle term is the authors' extension; the paper has only the other two. All three thresholds are 0 or more.

    >>> update_bounds([torch.tensor([0.0, -2.0])], 0.5, 0.01, 0.0, [], 0.0)
    [tensor([0.0100, 1.0100])]
    """
    bounds = list(torch._foreach_abs(weights))
    torch._foreach_mul_(bounds, relative)
    if accumulator_relative > 0:
        roots = torch._foreach_add(totals, eps)
        torch._foreach_sqrt_(roots)
        torch._foreach_reciprocal_(roots)
        torch._foreach_add_(bounds, roots, alpha=accumulator_relative)
    torch._foreach_add_(bounds, absolute)
    return bounds


def surely_positive(absolute: float) -> bool:
    """Say whether every bound with this absolute threshold is above 0 in float32 too, and finite.

    >>> surely_positive(0.01), surely_positive(0.0), surely_positive(1e-46), surely_positive(math.inf)
    (True, False, False, False)
    """
    return torch.finfo(torch.float32).tiny <= absolute < math.inf


def bound_ratios(deltas: Tensors, bounds: Tensors, positive: bool) -> list[Tensor]:
    """Return |delta| / bound: above 1 where a coordinate would go too far.

    A zero delta gives 0, be its bound zero or not; a zero bound with a non-zero delta gives infinity.

    Args:
        deltas: the steps.
        bounds: how far each coordinate may move, 0 or more.
        positive: whether every bound is known to be above 0, which saves a pass.

    >>> bound_ratios([torch.tensor([-4.0, 0.0, 1.0])], [torch.tensor([2.0, 0.0, 0.0])], False)
    [tensor([2., 0., inf])]
    """
    ratios = list(torch._foreach_abs(deltas))
    torch._foreach_div_(ratios, bounds)
    if not positive:
        ratios = [torch.nan_to_num(ratio, nan=0.0, posinf=math.inf) for ratio in ratios]
    return ratios


def factor_of(worst: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return sigma = min(1, 1 / worst), the largest factor in [0, 1] that brings the worst ratio down to 1.

    Source: Tang et al., KDD 2023, arXiv 2302.09178, Algorithm 1, where it stands as min(1, min_i bound_i / |delta_i|).

    >>> factor_of(torch.tensor([4.0, 0.0, torch.inf]))
    tensor([0.2500, 1.0000, 0.0000])
    """
    return worst.clamp(min=1.0).reciprocal_()


def worst_by_row(ratio: Float[Tensor, "rows *width"]) -> Float[Tensor, "rows *ones"]:
    """Return the largest ratio of each row (index of the first dimension), in a shape that broadcasts over it.

    >>> worst_by_row(torch.tensor([[1.0, 3.0], [0.0, 2.0]]))
    tensor([[3.],
            [2.]])
    """
    rest = tuple(range(1, ratio.dim()))
    return ratio.amax(rest, keepdim=True) if rest and ratio.numel() else ratio


def worst_but_for(ratio: Float[Tensor, "*shape"], share: float, by_row: bool) -> Float[Tensor, "*reduced"]:
    """Return the ratio that only a share of the coordinates exceeds: the k-th largest, k = floor(share * n) + 1.

    Args:
        ratio: |delta| / bound.
        share: of the coordinates, at least 0 and below 1; 0 gives the largest.
        by_row: one for each index of the first dimension, in a shape that broadcasts, instead of one for all.

    >>> worst_but_for(torch.tensor([5.0, 1.0, 2.0, 3.0]), 0.25, False)
    tensor(3.)
    """
    if ratio.numel() == 0:
        return worst_by_row(ratio) if by_row else ratio.new_zeros(())
    flat = ratio.flatten(1) if by_row and ratio.dim() > 1 else ratio.reshape(1, -1)
    if by_row and ratio.dim() <= 1:
        return ratio
    count = flat.shape[1]
    found = flat.kthvalue(count - math.floor(share * count), dim=1).values
    return found.view(-1, *[1] * (ratio.dim() - 1)) if by_row else found.reshape(())


def clip_factor(delta: Float[Tensor, "*shape"], bound: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Return the largest sigma in [0, 1] that keeps sigma * |delta| within `bound` everywhere.

        sigma = min(1, min_i bound_i / |delta_i|)

    A zero delta sets no limit, be its bound zero or not; a zero bound with a non-zero delta gives 0, and so does an
    infinite delta. A NaN sets no limit: it is for `are_usable` to keep it out. 1 for an empty tensor.

    >>> clip_factor(torch.tensor([0.4, 0.0]), torch.tensor([0.1, 0.0]))
    tensor(0.2500)
    """
    return factor_of(largest(bound_ratios([delta], [bound], positive=False))[0])


def rowwise_delta(
    grad: Float[Tensor, "rows *width"], accumulator: Float[Tensor, " rows"], lr: Float[Tensor, ""], eps: float
) -> Float[Tensor, "rows *width"]:
    """Return eta * g / (sqrt(G_row) + eps), what row-wise Adagrad subtracts from the weight.

    >>> rowwise_delta(torch.tensor([[2.0, -4.0]]), torch.tensor([4.0]), torch.tensor(0.1), 0.0)
    tensor([[ 0.1000, -0.2000]])
    """
    scale = lr / torch.sqrt(accumulator).add_(eps)
    return grad * scale.view(-1, *[1] * (grad.dim() - 1))


def row_mean_square(grad: Float[Tensor, "rows *width"]) -> Float[Tensor, " rows"]:
    """Return the mean of g^2 over each row; 0 for rows of width 0.

    >>> row_mean_square(torch.tensor([[1.0, 3.0], [0.0, 2.0]]))
    tensor([5., 2.])
    """
    squares = grad.square().unsqueeze(-1).flatten(1)
    return squares.sum(1).div_(max(1, squares.shape[1]))
