"""How curved the loss is: headroom along the last update by a line search, and the largest eigenvalue on request.

Shapes: M multiples of the update, K tasks, C curves (the total, then the tasks), N coordinates of all parameters.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError
from ..optim import ClippyAdagrad
from ..optim.clippy import EXP_AVG_SQ
from ..optim.guarded import BAD_STEPS, STEP, SUM, innermost
from ..optim.rivals import LambAdagrad
from .tables import rows_here, whole_rows

LOWEST = 1 / 8
"""The smallest headroom that is told apart: below it, or where the loss rises from the first bit on, this is given."""
HIGHEST = 32.0
"""The largest headroom that is told apart: where the loss has not risen at this multiple, this is given."""
_MULTIPLES = (0.0, 0.5, 2.0, 8.0, HIGHEST)  # of the update, counted from before the step
_MARGIN = 0.15  # of a bracket's logarithmic width, which the sixth multiple keeps from both its ends
_NOISE = 8  # machine epsilons by which a mean of a few hundred losses differs from itself


class Update(NamedTuple):
    """What the last step changed in one parameter."""

    parameter: Tensor
    """As it is now, after the step."""
    change: Tensor
    """After minus before; of the touched rows only, where there are `rows`."""
    rows: Int64[Tensor, " rows"] | None = None
    """The touched rows of an embedding table; one that stands there twice has the same change twice."""


class Before(NamedTuple):
    """What a parameter holds before a step, where the step will touch it."""

    parameter: Tensor
    values: Tensor
    """Copies; of the touched rows only, where there are `rows`."""
    rows: Int64[Tensor, " rows"] | None


class Headroom(NamedTuple):
    """How many times larger the last step could have been before the loss had risen above where it was before it.

    Below 1: the step overshot, and left the loss higher than it found it. NaN: there is nothing to tell.
    """

    total: Float[Tensor, ""]
    """Of the sum of the losses."""
    tasks: Float[Tensor, " tasks"]
    """Of each loss alone."""
    critical_sharpness: Float[Tensor, ""]
    """2 / (headroom * learning rate), of the total; NaN where no rate was given. An upper bound where the headroom is
    `HIGHEST`, a lower one where it is `LOWEST`."""


def copy_before(parameters: Iterable[Tensor]) -> list[Before]:
    """Copy what the coming step will touch: parameters with a gradient, of embedding tables the batch's rows alone.

    A table with a sparse gradient is never copied as a whole. No host sync.
    """
    held = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        value, rows = parameter.detach(), None
        if parameter.grad.is_sparse:
            rows = parameter.grad._indices()[0]  # not coalesced: that would be a host sync on a GPU
        held.append(Before(parameter, value.clone() if rows is None else value[rows], rows))
    return held


def find_updates(before: Iterable[Before]) -> list[Update]:
    """Return what the step has changed since `copy_before`.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> weight.grad = torch.tensor([1.0, -1.0])
    >>> before = copy_before([weight])
    >>> torch.optim.SGD([weight], lr=0.5).step()
    >>> find_updates(before)[0].change
    tensor([-0.5000,  0.5000])
    """
    return [Update(each.parameter, _read(each.parameter, each.rows) - each.values, each.rows) for each in before]


def pack_before(before: Iterable[Before], named: Mapping[str, Tensor]) -> list[list[Any]]:
    """Return copies as a checkpoint holds them: each parameter's name, its values, and its rows of the whole table.

    >>> weight = torch.nn.Parameter(torch.ones(2, 1))
    >>> packed = pack_before([Before(weight, torch.zeros(1, 1), torch.tensor([1]))], {"table": weight})
    >>> packed, unpack_before(packed, {"table": weight})[0].parameter is weight
    ([['table', tensor([[0.]]), tensor([1])]], True)
    """
    names = {id(p): name for name, p in named.items()}
    return [[names[id(p)], x, None if rows is None else whole_rows(p, rows)] for p, x, rows in before]


def unpack_before(packed: Iterable[Sequence[Any]], named: Mapping[str, Tensor]) -> list[Before]:
    """Return what `pack_before` was given; of a table of which this rank holds a part, the rows in that part."""
    found = []
    for name, values, rows in packed:
        p = named[name]
        if rows is not None:
            rows, here = rows_here(p, rows.to(p.device))
            values = values.to(p.device)[here]
        found.append(Before(p, values.to(p.device), rows))
    return found


@torch.no_grad()
def measure_headroom(
    losses: Callable[[], Tensor], updates: Sequence[Update], lr: float | Tensor | None = None
) -> Headroom:
    """Measure how many times larger the last step could have been before the loss rises, in six forward passes.

        w(c) = w_before + c * update,    headroom = the smallest c at which L(w(c)) > L(w_before)
        critical sharpness = 2 / (headroom * lr)

    c = 1 is where the weights are now. L is read at c = 0, 1/2, 2, 8 and 32, then once more where the total seems to
    cross; what lies between is found as if L were a parabola there, so that on a quadratic loss the answer is exact. A
    loss that is not finite has risen; the answer is then the geometric middle between the multiples around. It lies in
    [1/8, 32]; what lies outside is given as the end. It is NaN where the loss before the step is not finite, and where
    no multiple changes it beyond rounding: no update, a task without labels.

    The weights are moved in place and put back bit for bit, also when `losses` raises. Nothing crosses to the host:
    the result stays where the losses lie.

    Args:
        losses: Gives the K losses on the held batch with the weights as they are, [K] or one number; no gradient is
            taken. Weighted as in the total, which is their sum. On the batch of the step it tells how large the step
            could have been; on the next window's, before that is learned, what the step does to data to come. There
            one reading is mostly noise, for which no step is a descent: take many rows and many readings. It must give
            the same answer for the same weights: no dropout, no running statistics that grow (use eval mode).
        updates: The last step's, of every parameter that it changed (`find_updates`).
        lr: The learning rate of that step, for the critical sharpness.

    >>> weight = torch.nn.Parameter(torch.tensor([2.0]))  # loss w^2: from 2 a step may reach -2
    >>> before = [Before(weight, weight.detach().clone(), None)]
    >>> with torch.no_grad():
    ...     _ = weight.sub_(0.2)
    >>> headroom = measure_headroom(lambda: weight.square(), find_updates(before), lr=0.05)
    >>> round(headroom.total.item(), 3), round(headroom.critical_sharpness.item(), 3)
    (20.0, 2.0)

    Source: arXiv 2601.16979, where eta_c is found by doubling and bisection; a fixed number of passes needs no host
    sync, and serves all tasks at once.
    """
    now = [_read(each.parameter, each.rows).clone() for each in updates]

    def read_at(multiple: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return the multiple, and the losses there."""
        for each, value in zip(updates, now, strict=True):
            further = multiple - 1.0
            if isinstance(further, Tensor):
                further = further.to(value.device, value.dtype)
            # From what is saved, not from the last place: errors do not add up.
            _write(each, value + each.change * further)
        losses_K = losses().detach().reshape(-1)
        return losses_K.new_zeros((), dtype=torch.float64) + multiple, losses_K

    try:
        read = [read_at(multiple) for multiple in _MULTIPLES]
        read.append(read_at(_probe(_find_crossing(*_in_order(read)))))
    finally:
        for each, value in zip(updates, now, strict=True):
            _write(each, value)
    found_C = _find_crossing(*_in_order(read)).crossing_C
    rate = float("nan") if lr is None else lr
    return Headroom(found_C[0], found_C[1:], 2.0 / (found_C[0] * rate))


def _read(parameter: Tensor, rows: Tensor | None) -> Tensor:
    value = parameter.detach()
    return value if rows is None else value[rows]


def _write(update: Update, value: Tensor) -> None:
    if update.rows is None:
        update.parameter.copy_(value)
    else:
        update.parameter.index_copy_(0, update.rows, value)


class _Bracket(NamedTuple):
    """Between which multiples each curve starts to rise, and where in between."""

    low_C: Tensor
    high_C: Tensor
    crossing_C: Tensor
    """NaN where there is nothing to tell."""


def _in_order(read: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return multiples [M] in ascending order, and the losses [M, K] there."""
    multiples_M, order_M = torch.stack([multiple for multiple, _ in read]).sort()
    return multiples_M, torch.stack([losses_K for _, losses_K in read])[order_M]


def _find_crossing(multiples_M: Float[Tensor, " multiples"], losses_MK: Float[Tensor, "multiples tasks"]) -> _Bracket:
    """Find where the total and each loss first rise above what they are at multiple 0, which comes first.

    With D(c) = L(c) - L(0), D(c) / c is a straight line where L is a parabola, and its zero is where L comes back to
    L(0): the secant through the ends of the bracket gives it, or through the first two multiples where the loss has
    risen at the first already.
    """
    losses_MC = torch.cat([losses_MK.double().sum(1, keepdim=True), losses_MK], 1)
    c_M, rise_MC = multiples_M[1:], losses_MC[1:] - losses_MC[0]
    noise_C = _NOISE * torch.finfo(losses_MK.dtype).eps * losses_MC[0].abs()
    finite_MC = rise_MC.isfinite()
    risen_MC = ~(finite_MC & (rise_MC <= noise_C))
    first_C = risen_MC.int().argmax(0)  # the first of the largest
    end_C = torch.where(risen_MC.any(0), first_C, len(c_M) - 1)  # the upper end of the bracket
    below = c_M.new_full((1,), LOWEST)
    low_C, high_C = torch.cat([below, c_M])[end_C], c_M[end_C]
    # The secant's two multiples: the bracket's ends, or the first two.
    a_C = (end_C - 1).clamp(min=0)[None]
    b_C = a_C + 1
    slope_MC = rise_MC / c_M[:, None]
    c_a, c_b, slope_a, slope_b = c_M[a_C], c_M[b_C], slope_MC.gather(0, a_C), slope_MC.gather(0, b_C)
    secant_C = (c_a - slope_a * (c_b - c_a) / (slope_b - slope_a))[0]
    # A line that does not rise meets zero behind us: the loss rises from the first bit on.
    secant_C = torch.where((slope_b > slope_a)[0], secant_C, LOWEST)
    known_C = (slope_a.isfinite() & slope_b.isfinite())[0]
    crossing_C = torch.where(known_C, secant_C, (low_C * high_C).sqrt()).clamp(low_C, high_C)
    crossing_C = torch.where(risen_MC.any(0), crossing_C, HIGHEST)
    moved_C = (~finite_MC | (rise_MC.abs() > noise_C)).any(0)
    told_C = moved_C & losses_MC[0].isfinite()
    return _Bracket(low_C, high_C, torch.where(told_C, crossing_C, torch.nan))


def _probe(bracket: _Bracket) -> Float[Tensor, ""]:
    """Return where to read next: where the total seems to cross, but well inside its bracket, so that this shrinks."""
    low, high = bracket.low_C[0].log(), bracket.high_C[0].log()
    seems = torch.where(bracket.crossing_C[0].isnan(), (low + high) / 2, bracket.crossing_C[0].log())
    margin = _MARGIN * (high - low)
    return seems.clamp(low + margin, high - margin).exp()


def read_preconditioner(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return what the optimizer divides each coordinate's step by, from its state: P of w <- w - lr * m / P.

        Adagrad  sqrt(G) + eps, or sqrt(G + eps) for those of ours that have it so
        Adam     sqrt(v / (1 - b2^t)) + eps
        others, and parameters without a state: 1

    An accumulator for each row gives one number for each row. Clip factors are not in it.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.Adagrad([weight], initial_accumulator_value=4.0)
    >>> read_preconditioner(optimizer, [weight])
    [tensor([2., 2.])]
    """
    inner = innermost(optimizer)
    groups = {id(p): group for group in inner.param_groups for p in group["params"]}
    return [
        _precondition(inner, parameter, inner.state.get(parameter, {}), groups.get(id(parameter), {}))
        for parameter in parameters
    ]


def _precondition(inner: Optimizer, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    if SUM in state:
        total: Tensor = state[SUM]
        total = total.view(*total.shape, *[1] * (parameter.dim() - total.dim()))
        within = isinstance(inner, ClippyAdagrad | LambAdagrad)
        return total.add(group["eps"]).sqrt() if within else total.sqrt().add(group["eps"])
    if EXP_AVG_SQ in state:
        taken = (torch.as_tensor(state[STEP]) - state.get(BAD_STEPS, 0)).clamp(min=1)
        square = state.get("max_exp_avg_sq", state[EXP_AVG_SQ])
        root = torch.sqrt(square / (1 - group["betas"][1] ** taken.to(square.device)))
        return root.add(group["eps"])
    return torch.ones_like(parameter)


def find_largest_eigenvalue(
    loss: Float[Tensor, ""],
    parameters: Sequence[Tensor],
    preconditioner: Sequence[Tensor] | None = None,
    *,
    tolerance: float = 1e-3,
    restarts: int = 30,
    seed: int = 0,
) -> float:
    """Find the largest eigenvalue of the loss's Hessian H, or of P^-1/2 H P^-1/2, by Lanczos; on request, not by step.

    Gradient descent with a fixed P goes up along an eigenvector whose eigenvalue is above 2 / lr.

    The products with H come from a second backward pass through the graph of `loss`, about twenty for each restart;
    Lanczos (ARPACK, in scipy) holds about twenty vectors as long as all parameters on the host. The answer is NaN if
    the loss's derivatives are not finite, if there are no coordinates, or if Lanczos did not converge. A coordinate
    whose P is 0 or not finite is left out.

    Args:
        loss: With its graph, which is kept.
        parameters: In whose space H lives. Dense ones: torch cannot differentiate `embedding_bag` twice, so of a
            `Ranker` leave out the tables.
        preconditioner: P for each parameter, as `read_preconditioner` gives it; of its shape or one that broadcasts.
        tolerance: Relative accuracy of the eigenvalue.
        restarts: At most so many.
        seed: Of the vector to start from.

    Raises:
        ConfigError: scipy is missing, or a parameter's gradient cannot be differentiated.

    >>> w = torch.nn.Parameter(torch.ones(3))
    >>> loss = (torch.tensor([1.0, 2.0, 3.0]) * w.square()).sum()
    >>> round(find_largest_eigenvalue(loss, [w]), 3)
    6.0
    >>> round(find_largest_eigenvalue(loss, [w], [torch.tensor([1.0, 1.0, 6.0])]), 3)
    4.0
    """
    try:
        from scipy.sparse import linalg
    except ImportError as error:
        raise ConfigError(
            "find_largest_eigenvalue needs scipy, and did not find it; pip install 'steadyrank[curvature]'"
        ) from error
    product = _HessianProduct(loss, parameters, preconditioner)
    start = torch.randn(product.size, generator=torch.Generator().manual_seed(seed)).to(product.dtype)
    first = product(start)
    if not len(start) or not first.isfinite().all():
        return float("nan")
    if len(start) == 1 or not first.any():  # neither is a case for Lanczos
        return float(first[0] / start[0])
    operator = linalg.LinearOperator(
        (product.size, product.size), matvec=lambda v: product(torch.from_numpy(v)).numpy(), dtype=start.numpy().dtype
    )
    try:
        values = linalg.eigsh(
            operator, 1, which="LA", v0=start.numpy(), tol=tolerance, maxiter=restarts, return_eigenvectors=False
        )
    except linalg.ArpackError:  # no convergence, or a product that is not finite
        return float("nan")
    return float(values[0])


class _HessianProduct:
    """The product of P^-1/2 H P^-1/2 with a vector on the host."""

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor], preconditioner: Sequence[Tensor] | None) -> None:
        self.parameters = list(parameters)
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.size = sum(self.sizes)
        double = any(parameter.dtype == torch.float64 for parameter in self.parameters)
        self.dtype = torch.float64 if double else torch.float32
        self.scales = None if preconditioner is None else [_inverse_root(each) for each in preconditioner]
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
        self.gradients = [None if g is None or not g.requires_grad else g for g in gradients]

    def __call__(self, vector: Tensor) -> Tensor:
        pieces = zip(vector.split(self.sizes), self.parameters, strict=True)
        scaled = self._scale([piece.view(parameter.shape).to(parameter) for piece, parameter in pieces])
        # Not grad_outputs: a sparse gradient takes none that is dense.
        dots = [(g * v).sum() for g, v in zip(self.gradients, scaled, strict=True) if g is not None]
        if not dots:  # the loss is a straight line
            return torch.zeros_like(vector)
        try:
            products = torch.autograd.grad(
                torch.stack(dots).sum(), self.parameters, retain_graph=True, materialize_grads=True
            )
        except NotImplementedError as error:
            raise ConfigError(
                f"find_largest_eigenvalue: torch cannot differentiate twice here ({error}); leave the parameters of "
                "embedding tables out"
            ) from error
        scaled = self._scale([product.to_dense() for product in products])
        return torch.cat([each.reshape(-1).to("cpu", self.dtype) for each in scaled])

    def _scale(self, pieces: list[Tensor]) -> list[Tensor]:
        if self.scales is None:
            return pieces
        return [piece * scale for piece, scale in zip(pieces, self.scales, strict=True)]


def _inverse_root(preconditioner: Tensor) -> Tensor:
    return torch.where((preconditioner > 0) & preconditioner.isfinite(), preconditioner.rsqrt(), 0.0)
