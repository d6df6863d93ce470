"""What every monitor returns: values that lie on the device until all of them are fetched together, in one copy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


class Reading(NamedTuple):
    """Values of one area, one for each label: `area/label` in the run folder."""

    area: str
    labels: Sequence[str]
    values: Float[Tensor, " labels"]


def fetch(readings: Sequence[Reading]) -> dict[str, float]:
    """Return all readings by name, in one copy to the host from each device.

    >>> fetch([Reading("weight_norm", ["a", "b"], torch.tensor([1.0, 2.0])), Reading("headroom", ["a"], torch.ones(1))])
    {'weight_norm/a': 1.0, 'weight_norm/b': 2.0, 'headroom/a': 1.0}
    """
    values = to_host([reading.values for reading in readings])
    return {
        f"{area}/{label}": value
        for (area, labels, _), found in zip(readings, values, strict=True)
        for label, value in zip(labels, found.tolist(), strict=True)
    }


def join_rows(
    held: Sequence[tuple[str, int, Sequence[Reading]]], arrays: Sequence[np.ndarray]
) -> dict[tuple[str, int], dict[str, float]]:
    """Return readings as rows by table and step, each by name.

    Args:
        held: Table, step and readings.
        arrays: The values of all these readings, in their order.

    >>> a, b = (Reading(area, ["x"], torch.ones(1)) for area in "ab")
    >>> held = [("dynamics", 10, [a]), ("dynamics", 10, [b])]
    >>> join_rows(held, [np.array([1 / 3]), np.array([1234567.0])])
    {('dynamics', 10): {'a/x': 0.333333, 'b/x': 1234567.0}}
    """
    rows: dict[tuple[str, int], dict[str, float]] = {}
    found = iter(arrays)
    for table, step, readings in held:
        row = rows.setdefault((table, step), {})
        for area, labels, _ in readings:
            # Six digits: these are float32, and there are many. But counts and the numbers of rows are whole.
            numbers = zip(labels, next(found).tolist(), strict=True)
            row.update({f"{area}/{label}": v if v.is_integer() else float(f"{v:.6g}") for label, v in numbers})
    return rows


def to_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Return tensors as arrays of float64, in one copy from each device.

    >>> to_host([torch.ones(2), torch.zeros(1, 1)])
    [array([1., 1.]), array([[0.]])]
    """
    found: dict[int, np.ndarray] = {}
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        here = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        packed = torch.cat([tensors[i].detach().double().reshape(-1) for i in here]).cpu().numpy()
        ends = np.cumsum([tensors[i].numel() for i in here])
        for i, part in zip(here, np.split(packed, ends[:-1]), strict=True):
            found[i] = part.reshape(tuple(tensors[i].shape))
    return [found[i] for i in range(len(tensors))]
