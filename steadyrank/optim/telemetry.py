"""What a bounded optimizer did in its last step, brought to the host only when somebody asks."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .bounded import BIND_FRAC, BINDING, CLIP_FACTOR
from .guarded import innermost, parameter_label


class Binding(NamedTuple):
    """How the bound acted on one parameter in its last step."""

    name: str
    clip_factor: float
    """sigma, the smallest where there are several."""
    bind_frac: float
    """Share of the (touched) coordinates whose step was above their bound before it was scaled."""
    place: tuple[int, ...] | None
    """Where the coordinate stands that was furthest above its bound: (row, column) in a matrix; None if none was."""


def read_binding(optimizer: Optimizer) -> list[Binding]:
    """Return how the bound acted in the last step, the most clipped parameter first; one copy to the host a device.

    Only parameters whose optimizer was made with `telemetry=True` and that took a step.

    >>> from steadyrank.optim import ClippyAdagrad
    >>> table = torch.nn.Parameter(torch.ones(3, 2))
    >>> optimizer = ClippyAdagrad([("table", table)], lr=10.0, telemetry=True)
    >>> table.grad = torch.tensor([[0.0, 0.1], [0.0, 5.0], [0.0, 0.0]])
    >>> optimizer.step()
    >>> [binding] = read_binding(optimizer)
    >>> binding.name, round(binding.clip_factor, 3), round(binding.bind_frac, 3), binding.place
    ('table', 0.051, 0.333, (1, 1))
    """
    held: list[tuple[str, Tensor, Tensor]] = []
    optimizer = innermost(optimizer)
    for group in optimizer.param_groups:
        for index, param in enumerate(group["params"]):
            state = optimizer.state.get(param, {})
            if BINDING in state:
                name = group["param_names"][index] if "param_names" in group else parameter_label(group, index)
                packed = torch.stack([state[key].double() for key in (CLIP_FACTOR, BIND_FRAC, BINDING)])
                held.append((name, param, packed))
    read = []
    for device in {packed.device for _, _, packed in held}:
        here = [each for each in held if each[2].device == device]
        values = torch.stack([packed for _, _, packed in here]).tolist()
        for (name, param, _), (factor, share, flat) in zip(here, values, strict=True):
            place = None if flat < 0 else _place(int(flat), tuple(param.shape))
            read.append(Binding(name, factor, share, place))
    return sorted(read, key=lambda binding: binding.clip_factor)


def _place(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    place = []
    for size in reversed(shape[1:]):
        flat, rest = divmod(flat, size)
        place.append(rest)
    if shape:  # the first dimension has no end: of a table that lies on several ranks not all rows are here
        place.append(flat)
    return tuple(reversed(place))
