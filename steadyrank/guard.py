"""The guard: one verdict on a step before it is made; a step that is bad leaves everything as it was.

Shapes: K tasks, P parameters that have a gradient, R touched rows of a table, S sparse gradients among the P.
"""

import math
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.optim import Optimizer

from .monitors.dynamics import with_inner
from .monitors.tables import whole_rows
from .native.rows import coalesce
from .optim import kernels
from .optim.guarded import STEP, GuardedOptimizer, innermost
from .optim.wrap import ClipGradients
from .ranks import ALONE, Ranks

NAMED_ROWS = 3
"""Rows of a table that are named where some are left out."""
_NO_ROW = 1 << 53
"""More than the number of any row, and exact in float64."""
LARGE_BUFFER = 1 << 20
"""Numbers from which on a buffer is taken for a constant of the model, and is not copied at each step."""


class Verdict(NamedTuple):
    """What the guard found, on the device."""

    ok: Bool[Tensor, ""]
    """True when every loss and statistic is finite, and every gradient within its `gradient_limit`."""
    bad_tasks: Bool[Tensor, " tasks"]
    """Tasks whose loss is not finite."""
    bad_parameters: Bool[Tensor, " parameters"]
    """Parameters whose gradient is not finite or too large, in the order of those that have one."""
    largest: Float[Tensor, " parameters"]
    """The largest coordinate of each gradient, in the same order; infinite where it is not finite."""
    quarantined: Int64[Tensor, "sparse named"] | None = None
    """With quarantine, of each sparse gradient: its place in that order, how many rows were left out, and the numbers
    of the first `NAMED_ROWS` of them, -1 where there are fewer. Of a table that lies on several ranks those of all."""
    bad_statistics: Bool[Tensor, ""] | None = None
    """Whether the forward pass made a running statistic of the model infinite or NaN that was finite before."""


@cache
def gradient_limit(dtype: torch.dtype) -> float:
    """Return the largest coordinate of a gradient that an optimizer can be given.

        limit = sqrt(max) / 2^20,        max the largest number of the dtype

    A finite gradient can break an accumulator: its square overflows float32 from 1.8e19 on. With this limit (1.8e13)
    a row may come up a million times in a batch, or a coordinate stand there for a million steps, and the sum of the
    squares is still finite. In float16, whose squares overflow at 256, only what is not finite is refused.

    >>> f"{gradient_limit(torch.float32):.1e}", gradient_limit(torch.float16)
    ('1.8e+13', 65504.0)
    """
    top = torch.finfo(dtype).max
    return math.sqrt(top) * 2.0**-20 if top > 1e30 else top


def may_ask(device: torch.device) -> bool:
    """Say whether a verdict can be asked for without waiting: on a CPU."""
    return device.type == "cpu"


class Rows(NamedTuple):
    """The touched rows of a sparse gradient, and which of them can be learned."""

    rows_R: Int64[Tensor, " rows"]
    good_R: Bool[Tensor, " rows"]


def quarantine(parameters: Iterable[Tensor], ask: bool = True) -> dict[Tensor, Rows]:
    """Take the rows out of sparse gradients that are not finite or too large, so that the rest can be learned.

    Gradients are coalesced. With `ask` such rows are gone from them; without it, which waits for no device, they are
    zeros, and `Before` puts the rows back after the step.
    """
    found = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is None or not grad.is_sparse:
            continue
        grad = coalesce(grad)
        rows_R, values = grad.indices()[0], grad.values()
        sizes_R = values.abs().flatten(1).amax(1) if values.numel() else values.new_zeros(len(rows_R))
        good_R = sizes_R <= gradient_limit(values.dtype)  # false for NaN
        found[parameter] = Rows(rows_R, good_R)
        if not ask:
            values = torch.where(_like_rows(good_R, values), values, 0.0)
        elif not bool(good_R.all()):
            rows_R, values = rows_R[good_R], values[good_R]
        # Nothing to check: rows and values come from a gradient that torch made.
        parameter.grad = torch.sparse_coo_tensor(
            rows_R[None], values, grad.shape, is_coalesced=True, check_invariants=False
        )
    return found


def judge(
    parameters: Iterable[Tensor],
    losses_K: Float[Tensor, " tasks"],
    quarantined: Mapping[Tensor, Rows] | None = None,
    statistics: Sequence[tuple[Tensor, Tensor]] = (),
) -> Verdict:
    """Form one verdict on losses, gradients and statistics, without changing any. There is no host sync.

    Args:
        parameters: Those that a step would change.
        losses_K: The mean loss of each task.
        quarantined: What `quarantine` found, if it was asked.
        statistics: Buffers that the forward pass may have changed, as they are and as they were (`Before.statistics`).
    """
    held = [p for p in parameters if p.grad is not None]
    values = [_values(p) for p in held]
    limits = [gradient_limit(value.dtype) for value in values]
    if may_ask(losses_K.device) and all(type(value) is Tensor for value in values):  # not in shards
        found = _judge_here(losses_K, values, limits, statistics)
    else:
        found = _judge_there(losses_K, values, limits, statistics)
    if quarantined is None:
        return found
    return found._replace(quarantined=_tell_rows(_count_rows(held, quarantined), found.ok))


class Totals(NamedTuple):
    """What one rank's rows of a batch say; over all ranks, the whole batch."""

    total: Float[Tensor, ""]
    """Its part of the weighted sum of the losses."""
    losses: Float[Tensor, " tasks"]
    """Its part of the mean loss of each task."""
    logits: Float[Tensor, " tasks"]
    """The largest |logit| of each task."""


def judge_together(
    ranks: Ranks,
    parameters: Iterable[Tensor],
    totals: Totals,
    quarantined: Mapping[Tensor, Rows] | None = None,
    statistics: Sequence[tuple[Tensor, Tensor]] = (),
) -> tuple[Verdict, Totals]:
    """Form the verdict of several ranks, the same on all, from one reduction; it brings the losses with it.

    Args:
        ranks: Who trains together; each has its rows of the batch, and of the tables that are sharded.
        parameters: As in `judge`; on all ranks the same ones have a gradient.
        totals: What this rank's rows say.
        quarantined: As in `judge`.
        statistics: As in `judge`.

    Returns:
        The verdict, and what the whole batch says.
    """
    held = [p for p in parameters if p.grad is not None]
    values = [kernels.local(_values(p)) for p in held]
    limits = [gradient_limit(value.dtype) for value in values]
    here = _judge_there(totals.losses, values, limits, statistics)
    assert here.bad_statistics is not None
    sums = [totals.total[None], totals.losses, here.bad_parameters, here.bad_statistics[None]]
    tops = [totals.logits, here.largest]
    sizes = [len(x) for x in sums + tops]
    numbers = torch.cat([x.to(totals.losses) for x in sums + tops])
    if quarantined is not None:  # float64 holds the numbers of rows
        numbers = torch.cat([numbers.double(), _count_rows(held, quarantined, ranks).flatten().double()])
    numbers, lines = ranks.gather(numbers).split([sum(sizes), len(numbers) - sum(sizes)], 1)
    every = numbers.to(totals.losses).split(sizes, 1)
    total, losses_K, bad_P, broken = (x.sum(0) for x in every[: len(sums)])  # on all ranks the same bits
    logits_K, largest_P = (x.amax(0) for x in every[len(sums) :])
    bad_tasks_K, bad_parameters_P, bad_statistics = ~torch.isfinite(losses_K), bad_P > 0, broken[0] > 0
    ok = ~(bad_tasks_K.any() | bad_parameters_P.any() | bad_statistics)
    verdict = Verdict(ok, bad_tasks_K, bad_parameters_P, largest_P, bad_statistics=bad_statistics)
    if quarantined is not None:
        lines = lines.long().view(ranks.size, len(quarantined), 2 + NAMED_ROWS)
        verdict = verdict._replace(quarantined=_tell_rows(_join_rows(lines), ok))
    return verdict, Totals(total[0], losses_K, logits_K)


def _judge_here(
    losses_K: Tensor, values: list[Tensor], limits: list[float], statistics: Sequence[tuple[Tensor, Tensor]]
) -> Verdict:
    """Judge in Python's numbers: after a backward pass, each operation of torch takes longer than all of that."""
    sizes = [_largest_here(value) for value in values]
    tasks = [not math.isfinite(loss) for loss in losses_K.tolist()]
    # Written so that a NaN is bad.
    parameters = [not size <= limit for size, limit in zip(sizes, limits, strict=True)]
    broken = any(not _is_finite(now) and _is_finite(before) for now, before in statistics)
    return Verdict(
        torch.tensor(not (broken or any(tasks) or any(parameters))),
        torch.tensor(tasks, dtype=torch.bool),
        torch.tensor(parameters, dtype=torch.bool),
        torch.tensor([math.inf if math.isnan(size) else size for size in sizes], dtype=losses_K.dtype),
        bad_statistics=torch.tensor(broken),
    )


def _largest_here(value: Tensor) -> float:
    if not value.numel():
        return 0.0
    low, high = value.aminmax()  # in one pass that makes no copy
    return max(-float(low), float(high))


def _is_finite(value: Tensor) -> bool:
    return math.isfinite(_largest_here(value))


def _judge_there(
    losses_K: Tensor, values: list[Tensor], limits: list[float], statistics: Sequence[tuple[Tensor, Tensor]]
) -> Verdict:
    """Judge on the device; no host sync."""
    largest_P = kernels.largest(values) if values else losses_K.new_zeros(0)
    limit: float | Tensor = limits[0] if len(set(limits)) == 1 else torch.tensor(limits, dtype=torch.float64)
    if isinstance(limit, Tensor):
        limit = limit.to(losses_K.device, non_blocking=True)
    bad_tasks_K, bad_parameters_P = ~torch.isfinite(losses_K), ~(largest_P <= limit)
    broken = torch.zeros((), dtype=torch.bool, device=losses_K.device)
    if statistics:
        now_S, before_S = (torch.isfinite(kernels.largest(list(each))) for each in zip(*statistics, strict=True))
        broken = (before_S & ~now_S).any()
    ok = ~(bad_tasks_K.any() | bad_parameters_P.any() | broken)
    return Verdict(ok, bad_tasks_K, bad_parameters_P, largest_P.to(losses_K.dtype), bad_statistics=broken)


def guard(parameters: Iterable[Tensor], losses_K: Float[Tensor, " tasks"]) -> Verdict:
    """Form one verdict on losses and gradients; where it is bad, put zeros in place of every gradient.

    Gradients are selected, never multiplied: 0 * inf is NaN. There is no host sync. Zeros leave SGD and Adagrad where
    they are; momentum, weight decay and Adam's moments go on, for which `train_step` does more.
    """
    parameters = list(parameters)
    verdict = judge(parameters, losses_K)
    if verdict.ok.device.type != "cpu" or not bool(verdict.ok):
        _fill(parameters, verdict.ok, 0.0)
    return verdict


def _values(parameter: Tensor) -> Tensor:
    grad = parameter.grad
    assert grad is not None
    return grad._values() if grad.is_sparse else grad


def _count_rows(
    held: Sequence[Tensor], found: Mapping[Tensor, Rows], ranks: Ranks = ALONE
) -> Int64[Tensor, "sparse named"]:
    """Return what `Verdict.quarantined` says, as this rank sees it, with `_NO_ROW` for no row."""
    lines = torch.full((len(found), 2 + NAMED_ROWS), _NO_ROW, device=held[0].device if held else None)
    lines[:, 1] = 0
    for line, index in zip(lines, (i for i, p in enumerate(held) if p in found), strict=True):
        rows_R, good_R = found[held[index]]
        line[0] = index
        if ranks.is_first or hasattr(held[index], "sharded_over"):  # else the first rank's are the same rows
            bad_R = torch.where(good_R, _NO_ROW, whole_rows(held[index], rows_R))
            first = bad_R.topk(min(NAMED_ROWS, len(bad_R)), largest=False).values
            line[1], line[2 : 2 + len(first)] = (~good_R).sum(), first
    return lines


def _join_rows(lines: Int64[Tensor, "ranks sparse named"]) -> Int64[Tensor, "sparse named"]:
    """Return what the ranks have counted as one process counts it."""
    firsts = lines[:, :, 2:].transpose(0, 1).flatten(1).sort(1).values[:, :NAMED_ROWS]
    return torch.cat([lines[0, :, :1], lines[:, :, 1:2].sum(0), firsts], 1)


def _tell_rows(lines: Int64[Tensor, "sparse named"], ok: Bool[Tensor, ""]) -> Int64[Tensor, "sparse named"]:
    """Return what was counted in a step that is made; where it is not, nothing was left out."""
    lines[:, 1] = torch.where(ok, lines[:, 1], 0)
    return lines.masked_fill_(lines == _NO_ROW, -1)


def _fill(parameters: Iterable[Tensor], ok: Bool[Tensor, ""], value: float) -> None:
    """Put `value` in place of every coordinate of every gradient, unless `ok`."""
    for parameter in parameters:
        if parameter.grad is not None:
            grad = kernels.local(_values(parameter))
            grad.copy_(torch.where(ok, grad, value))


def _like_rows(x_R: Tensor, values: Tensor) -> Tensor:
    return x_R.view(-1, *[1] * (values.dim() - 1))


@dataclass
class _Kept:
    """A tensor in its place, and what it held; of a table the touched rows."""

    place: MutableMapping[str, Any]
    """The dictionary that holds it, where another may stand in its place after the step."""
    key: str
    tensor: Tensor
    before: Tensor
    parameter: Tensor | None = None
    """Whose rows they are."""


class Before:
    """What tensors held before a step, to be put back where the step was bad."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._rows: dict[Tensor, Rows] = {}
        self._rules: list[tuple[ClipGradients, dict[str, Tensor]]] = []

    def keep_statistics(self, model: nn.Module) -> None:
        """Keep the buffers that a forward pass in training mode may change: all but flags and large constants."""
        for room, name in _buffers(model):
            buffer = room[name]
            if buffer is not None:
                self._kept.append(_Kept(room, name, buffer, buffer.detach().clone()))

    def statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Return the kept floating-point buffers, as they are and as they were.

        All of them: batch norm changes its own without counting that in a tensor's version.
        """
        now = [(kept.place.get(kept.key), kept.before) for kept in self._kept if kept.before.is_floating_point()]
        return [(buffer, before) for buffer, before in now if isinstance(buffer, Tensor)]

    def keep_optimizer(self, optimizer: Optimizer, quarantined: Mapping[Tensor, Rows]) -> None:
        """Keep the weights and states that a step may change; of what `refuses` only the rows in quarantine."""
        ones = with_inner(optimizer)
        for parameter in _with_gradient([optimizer]):
            rows = quarantined.get(parameter)
            if rows is None and refuses(optimizer):
                continue
            if rows is None and parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = coalesce(parameter.grad)  # as the optimizer does
                rows_R = parameter.grad.indices()[0]
                rows = Rows(rows_R, torch.ones_like(rows_R, dtype=torch.bool))
            if rows is not None:
                self._rows[parameter] = rows
            self._keep({"weight": parameter.detach()}, parameter)
            for one in ones:
                self._keep(one.state.get(parameter, {}), parameter, rows_only=refuses(optimizer))
        for one in ones:
            if isinstance(one, ClipGradients):  # what its rule remembers of all gradients together
                self._rules.append((one, {key: value.clone() for key, value in one.shared.items()}))

    def _keep(self, place: MutableMapping[str, Any], parameter: Tensor, rows_only: bool = False) -> None:
        for key, tensor in place.items():
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                continue
            if tensor.device != parameter.device:
                continue  # a counter on the host: `forget_step`
            if parameter in self._rows and tensor.dim() > 0 and len(tensor) == len(parameter):
                before = tensor.index_select(0, self._rows[parameter].rows_R)
                self._kept.append(_Kept(place, key, tensor, before, parameter))
            elif not rows_only:
                self._kept.append(_Kept(place, key, tensor, tensor.clone()))

    @torch.no_grad()
    def put_back(self, ok: Bool[Tensor, ""]) -> None:
        """Put back what was there, unless `ok`; the rows in quarantine in any case."""
        for kept in self._kept:
            now = kept.place.get(kept.key)
            if not isinstance(now, Tensor) or now.shape != kept.tensor.shape:
                continue  # thrown away, or made something else of
            if kept.parameter is not None:
                rows_R, good_R = self._rows[kept.parameter]
                taken = _like_rows(ok & good_R, kept.before)
                now.index_copy_(0, rows_R, torch.where(taken, now.index_select(0, rows_R), kept.before))
            elif now is kept.tensor:
                _take_where(ok, now, kept.before)
            else:  # a new tensor, which may be shared with others: not written into
                kept.place[kept.key] = _take_where(ok, now.clone(), kept.before)
        for optimizer, before in self._rules:
            optimizer.shared = {k: torch.where(ok, now, before.get(k, now)) for k, now in optimizer.shared.items()}


def _take_where(ok: Bool[Tensor, ""], now: Tensor, before: Tensor) -> Tensor:
    """Put what was before in the place of `now`, unless `ok`; of a DTensor in the part that lies here."""
    here = kernels.local(now)
    here.copy_(torch.where(ok, here, kernels.local(before)))
    return now


_Room = dict[str, Tensor | None]
_BUFFERS: WeakKeyDictionary[nn.Module, list[tuple[_Room, str]]] = WeakKeyDictionary()


def _buffers(model: nn.Module) -> list[tuple[_Room, str]]:
    """Return where a model's buffers lie, but for flags and large ones.

    Looked up once for each model: going through all modules takes as long as the copies. A buffer that is registered
    after the first step is not seen.
    """
    if model not in _BUFFERS:
        found = [(module._buffers, *item) for module in model.modules() for item in module._buffers.items()]
        _BUFFERS[model] = [(room, name) for room, name, buffer in found if buffer is None or _may_change(buffer)]
    return _BUFFERS[model]


def _may_change(buffer: Tensor) -> bool:
    return buffer.dtype != torch.bool and 0 < buffer.numel() <= LARGE_BUFFER


def refuses(optimizer: Optimizer) -> bool:
    """Say whether an optimizer leaves everything as it was when it is given NaN, and counts that by itself."""
    return isinstance(optimizer, GuardedOptimizer)


def step_where_ok(
    optimizers: Sequence[Optimizer],
    verdict: Verdict,
    before: Before,
    quarantined: Mapping[Tensor, Rows] | None = None,
    ask: bool = True,
) -> bool:
    """Make the optimizers' step; where the verdict is bad, weights, states and statistics stay as they were.

    Returns whether the verdict was asked for.

    Args:
        optimizers: All take the step, or none does.
        verdict: On the gradients as they are.
        before: Has kept the model's statistics.
        quarantined: What `quarantine` found.
        ask: Ask the verdict, and make no step at all where it is bad: on a CPU asking is free. On a GPU it would be a
            host sync; without it the step is made in any case, and selected away. Our own optimizers are given NaN
            then, which they refuse; of others weights and states are copied first, and they are given zeros. But the
            step in which a parameter's state is made is asked for: what was not there cannot be put back.
    """
    if (ask or _make_states(optimizers)) and not bool(verdict.ok):
        _fill(_with_gradient(optimizers), verdict.ok, 0.0)
        before.put_back(verdict.ok)
        return True
    for optimizer in () if ask else optimizers:
        before.keep_optimizer(optimizer, quarantined or {})
        _fill(_with_gradient([optimizer]), verdict.ok, math.nan if refuses(optimizer) else 0.0)
    for optimizer in optimizers:
        optimizer.step()
    if ask:
        return True
    before.put_back(verdict.ok)
    for optimizer in optimizers:
        _STEPPED.setdefault(optimizer, set()).update(map(id, _with_gradient([optimizer])))
    return False


_STEPPED: WeakKeyDictionary[Optimizer, set[int]] = WeakKeyDictionary()
"""Parameters that took a step, by their ids: SGD without momentum has no state to know it by."""


def _make_states(optimizers: Iterable[Optimizer]) -> bool:
    """Say whether a step would make the first state of a parameter."""
    return any(
        not innermost(optimizer).state.get(parameter) and id(parameter) not in _STEPPED.get(optimizer, ())
        for optimizer in optimizers
        if not refuses(optimizer)
        for parameter in _with_gradient([optimizer])
    )


def forget_step(optimizers: Iterable[Optimizer], parameters: Collection[Tensor]) -> None:
    """Take a bad step out of the counters that torch's optimizers keep on the host, once the host knows of it.

    Until then Adam's bias correction counts it. Counters on the device (`capturable`, `fused`) are exact at once, and
    so are our own optimizers.

    Args:
        optimizers: They made a step that was selected away.
        parameters: Those that had a gradient in it.
    """
    for one in (one for optimizer in optimizers if not refuses(optimizer) for one in with_inner(optimizer)):
        for parameter in parameters:
            state = one.state.get(parameter, {})
            step = state.get(STEP)
            if isinstance(step, int | float):
                state[STEP] = step - 1
            elif isinstance(step, Tensor) and step.device != parameter.device:
                step.sub_(1)


def _with_gradient(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    return [p for o in optimizers for group in o.param_groups for p in group["params"] if p.grad is not None]
