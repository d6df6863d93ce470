"""The formulas of the optimizers: tensors in, tensors out; no state, no defaults, no host sync.

Symbols: w weight, g gradient, G accumulator (a sum of squared gradients), eta learning rate, sigma clip factor. A
factor is one scalar for the whole tensor; one for each row will be the same reduction over fewer dimensions.

What comes out of bad numbers is decided once, by `is_usable`: a gradient that fails it is replaced by zeros, and the
learning rate by 0 (`keep_where`), before anything is computed from them. The other kernels then only see finite
numbers.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def is_usable(
    grad: Float[Tensor, "*shape"], accumulator: Float[Tensor, "*states"], lr: Float[Tensor, ""], floor: float
) -> Bool[Tensor, ""]:
    """Say whether a gradient can be taken in without any number leaving the finite range.

        finite(sum G + ||g||^2)  and  finite(eta * ||g|| / sqrt(floor)),      ||g|| the L2 norm

    The first is false for NaN and infinity, and for a finite gradient so large that its squares overflow the
    accumulator (in float32 from a norm of 1.8e19 on): such a coordinate would never move again. The second bounds the
    update. Sums stand in for the largest coordinate, which costs less and errs on the safe side: a gradient at the
    very edge of the range is refused too early, never too late.

    Args:
        grad: g, in any floating-point dtype.
        accumulator: G before the step, 0 or more; its dtype sets the range.
        lr: eta.
        floor: a number above 0 that G plus epsilon never goes below.

    Returns:
        One truth value on the device. True for an empty tensor and a finite rate.

    >>> big = torch.tensor([1e20, 0.0])
    >>> [bool(is_usable(g, torch.ones(2), torch.tensor(0.1), 1e-7)) for g in (big, big / 100, big * torch.nan)]
    [False, True, False]
    """
    norm = torch.linalg.vector_norm(grad, dtype=accumulator.dtype)
    return torch.isfinite(accumulator.sum() + norm.square()) & torch.isfinite(norm * lr / math.sqrt(floor))


def keep_where(usable: Bool[Tensor, ""], x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `x`, or zeros where it is not usable: selected, since 0 * inf would be NaN.

    >>> keep_where(torch.tensor(False), torch.tensor([1.0, float("nan")]))
    tensor([0., 0.])
    """
    return torch.where(usable, x, 0.0)


def adagrad_delta(
    grad: Float[Tensor, "*shape"], accumulator: Float[Tensor, "*shape"], lr: Float[Tensor, ""], eps: float
) -> Float[Tensor, "*shape"]:
    """Return eta * g / sqrt(G + eps), what Adagrad subtracts from the weight.

    >>> adagrad_delta(torch.tensor([2.0, -4.0]), torch.tensor([3.0, 15.0]), torch.tensor(0.1), 1.0)
    tensor([ 0.1000, -0.1000])
    """
    return torch.add(accumulator, eps).rsqrt_().mul_(grad).mul_(lr)


def rowwise_delta(
    grad: Float[Tensor, "rows *width"], accumulator: Float[Tensor, " rows"], lr: Float[Tensor, ""], eps: float
) -> Float[Tensor, "rows *width"]:
    """Return eta * g / (sqrt(G_row) + eps), what row-wise Adagrad subtracts from the weight.

    >>> rowwise_delta(torch.tensor([[2.0, -4.0]]), torch.tensor([4.0]), torch.tensor(0.1), 0.0)
    tensor([[ 0.1000, -0.2000]])
    """
    scale = lr / torch.sqrt(accumulator).add_(eps)
    return grad * scale.view(-1, *[1] * (grad.dim() - 1))


def update_bound(
    weight: Float[Tensor, "*shape"],
    accumulator: Float[Tensor, "*shape"],
    variable_relative: float,
    accumulator_relative: float,
    absolute: float,
    eps: float,
) -> Float[Tensor, "*shape"]:
    """Return how far each coordinate may move: lambda_rel * |w| + lambda_acc / sqrt(G + eps) + lambda_abs.

    The middle term is the authors' extension; the paper has only the other two. All three thresholds are 0 or more.

    >>> update_bound(torch.tensor([0.0, -2.0]), torch.ones(2), 0.5, 0.0, 0.01, 1e-7)
    tensor([0.0100, 1.0100])
    """
    bound = torch.abs(weight).mul_(variable_relative)
    if accumulator_relative > 0:
        bound.add_(torch.add(accumulator, eps).rsqrt_(), alpha=accumulator_relative)
    return bound.add_(absolute)


def clip_factor(delta: Float[Tensor, "*shape"], bound: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Return the largest sigma in [0, 1] that keeps sigma * |delta| within `bound` everywhere.

        sigma = min(1, min_i bound_i / |delta_i|)

    A zero delta sets no limit, be its bound zero or not; a zero bound with a non-zero delta gives 0, and so does an
    infinite delta. A NaN sets no limit: it is for `is_usable` to keep it out. 1 for an empty tensor.

    Source: Tang et al., KDD 2023, arXiv 2302.09178, Algorithm 1.

    >>> clip_factor(torch.tensor([0.4, 0.0]), torch.tensor([0.1, 0.0]))
    tensor(0.2500)
    """
    if delta.numel() == 0:
        return delta.new_ones(())
    ratio = torch.abs(delta)
    # In place, since a fresh tensor costs more than the division; 0 / 0 is the only NaN of finite numbers.
    torch.div(bound, ratio, out=ratio).nan_to_num_(nan=1.0)
    return ratio.amin().clamp_(max=1.0)


def row_mean_square(grad: Float[Tensor, "rows *width"]) -> Float[Tensor, " rows"]:
    """Return the mean of g^2 over each row; 0 for rows of width 0.

    >>> row_mean_square(torch.tensor([[1.0, 3.0], [0.0, 2.0]]))
    tensor([5., 2.])
    """
    squares = grad.square().unsqueeze(-1).flatten(1)
    return squares.sum(1).div_(max(1, squares.shape[1]))
