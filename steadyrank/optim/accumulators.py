"""Accumulators over months: what to do with them on a warm start, and coordinates that stopped moving."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError, check_known
from .clippy import EXP_AVG, EXP_AVG_SQ, ROW_CLOCK
from .guarded import BAD_STEPS, STEP, SUM, check_not_negative, innermost, parameter_label

WarmStart = Literal["keep", "reset", "decay"]
"""What happens to accumulators when a trained model goes on learning."""

HUGE = 1e12
"""An accumulator above this divides a gradient by a million or more: the coordinate hardly moves any more."""


class Frozen(NamedTuple):
    """Coordinates of one parameter whose accumulator is so large, or no number at all, that they do not move."""

    name: str
    frozen: int
    """How many accumulators: coordinates, or rows where there is one for each row."""
    of: int


def warm_start(optimizer: Optimizer, how: str, factor: float = 0.5) -> None:
    """Prepare the accumulators of an optimizer whose state was loaded to go on learning, in place.

        keep    nothing changes
        reset   Adagrad: G <- G_0. Adam: moments and steps start at zero
        decay   Adagrad: G <- G_0 + factor * (G - G_0). Adam: nothing, since its moments forget by themselves

    Plain Adagrad's rate goes to zero over months, so a model that is to follow a new distribution wants "decay" or
    "reset"; a model that only restarts wants "keep".

    Args:
        optimizer: one with Adagrad's state `sum` or Adam's `exp_avg_sq`, torch's own too.
        how: "keep", "reset" or "decay".
        factor: for "decay", in [0, 1].

    Raises:
        ConfigError: an unknown way, or a factor out of range.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.Adagrad([weight], initial_accumulator_value=0.1)
    >>> optimizer.state[weight]["sum"].fill_(4.1)
    tensor([4.1000])
    >>> warm_start(optimizer, "decay", 0.25)
    >>> optimizer.state[weight]["sum"]
    tensor([1.1000])
    """
    check_known(how, get_args(WarmStart), "way of warm starting")
    if not 0 <= factor <= 1:
        raise ConfigError(f"factor: expected a share in [0, 1], came {factor}")
    if how == "keep":
        return
    for _, group, state in _states(optimizer):
        if SUM in state:
            start = group["initial_accumulator_value"]
            state[SUM].copy_(state[SUM].sub(start).mul_(factor if how == "decay" else 0.0).add_(start))
        elif how == "reset":
            for key in (EXP_AVG, EXP_AVG_SQ, STEP, BAD_STEPS):
                if key in state:
                    state[key].zero_()
        if how == "reset" and ROW_CLOCK in state:
            state[ROW_CLOCK].fill_(float(state[STEP] - state[BAD_STEPS]))


def find_frozen(optimizer: Optimizer, above: float = HUGE) -> list[Frozen]:
    """Count the coordinates that stopped moving, by parameter; only those that have any. One copy to the host.

    Args:
        optimizer: one with Adagrad's state `sum` or Adam's `exp_avg_sq`, torch's own too.
        above: accumulators above it count, and those that are infinite or NaN; 0 or more.

    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = torch.optim.Adagrad([("w", weight)])
    >>> optimizer.state[weight]["sum"] = torch.tensor([1.0, torch.inf, 1e20])
    >>> find_frozen(optimizer)
    [Frozen(name='w', frozen=2, of=3)]
    """
    check_not_negative("above", above)
    found = [(name, state[key], (~_moves(state[key], above)).sum()) for name, key, state in _accumulators(optimizer)]
    counts = torch.stack([count.cpu() for _, _, count in found]).tolist() if found else []
    return [Frozen(name, int(n), total.numel()) for (name, total, _), n in zip(found, counts, strict=True) if n]


def repair_frozen(optimizer: Optimizer, above: float = HUGE) -> list[Frozen]:
    """Let coordinates that stopped moving move again, and return what was found.

    Their accumulator becomes the median of the parameter's others, or the initial value where there is none: they go
    on at the rate of their neighbours, not at the high one of a fresh start. Adam's mean there becomes 0.
    """
    found = find_frozen(optimizer, above)
    starts = {id(state): group.get("initial_accumulator_value", 0.0) for _, group, state in _states(optimizer)}
    for _, key, state in _accumulators(optimizer):
        total = state[key]
        moves = _moves(total, above)
        others = torch.where(moves, total, torch.nan).nanmedian() if total.numel() else total.sum()
        total.copy_(torch.where(moves, total, others.nan_to_num(nan=starts[id(state)])))
        if EXP_AVG in state:
            state[EXP_AVG].copy_(torch.where(moves, state[EXP_AVG], 0.0))
    return found


def _moves(total: Tensor, above: float) -> Tensor:
    return total <= above  # false for NaN and infinity


def _states(optimizer: Optimizer) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Give (label, group, state) of each parameter that has a state."""
    inner = innermost(optimizer)
    for group in inner.param_groups:
        for index, param in enumerate(group["params"]):
            if inner.state.get(param):
                named = group["param_names"][index] if "param_names" in group else parameter_label(group, index)
                yield named, group, inner.state[param]


def _accumulators(optimizer: Optimizer) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Give (label, key of the accumulator, state) of each parameter that has one."""
    for name, _, state in _states(optimizer):
        for key in (SUM, EXP_AVG_SQ):
            if key in state:
                yield name, key, state
