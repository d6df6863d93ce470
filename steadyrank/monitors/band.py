"""What is usual of a signal: the median and a robust standard deviation of its last finite values.

Shapes: T steps, S signals, N values remembered.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64

from ..errors import CheckpointError

_ENOUGH = 20  # values from which their spread is trusted


@dataclass(frozen=True)
class Usual:
    """What one signal usually does."""

    limit: float = math.inf
    """A value above it is outside; infinite while there are too few values to say."""
    share: float = 0.5
    """How often values are outside: (outside + 1) / (values + 2), Laplace's estimate."""
    median: float = math.nan
    spread: float = math.nan

    def describe(self, name: str, value: float) -> str:
        """Say how far a value lies above what is usual.

        >>> Usual(median=0.5, spread=0.01).describe("loss", 0.75)
        'loss 0.75, 25 robust standard deviations above its trailing median 0.5'
        """
        sigmas = (value - self.median) / self.spread
        return (
            f"{name} {value:.4g}, {sigmas:.3g} robust standard deviations above its trailing median {self.median:.4g}"
        )


class RobustBand:
    """Median and robust standard deviation of the last finite values of some signals.

        spread = max(1.4826 * median |x - median|, floor_frac * |median|, floor)

    which is the standard deviation for normal values. What is not finite never enters, and up to half of the values
    may be wild. Each signal remembers its own last N finite values.

    Args:
        signals: S.
        memory: N, 1 or more.
        least: Values that a signal must have before one can be outside.
        floor_frac: The spread's floor as a share of the median, so that a flat history leaves room for rounding.
        floor: The same, absolute.

    >>> band = RobustBand(1, memory=100, least=3)
    >>> band.add(np.array([[1.0], [2.0], [3.0], [np.nan], [np.inf]]))
    >>> band.median(), band.spread()
    (array([2.]), array([1.4826]))
    >>> round(band.usual(sigmas=7.0)[0].limit, 2)
    71.19
    """

    def __init__(
        self, signals: int, memory: int, least: int = 1, floor_frac: float = 1e-3, floor: float = 1e-9
    ) -> None:
        self.least, self.floor_frac, self.floor = least, floor_frac, floor
        self._values_NS = np.full((memory, signals), np.nan)
        self._seen_S = np.zeros(signals, np.int64)

    def add(self, values_TS: Float[np.ndarray, "steps signals"]) -> None:
        """Remember values, oldest first; those that are not finite are left out."""
        finite_TS = np.isfinite(values_TS)
        place_TS = (self._seen_S + np.cumsum(finite_TS, axis=0) - 1) % len(self._values_NS)
        steps, signals = np.nonzero(finite_TS)  # in the order of the steps: of two in one place the later one stays
        self._values_NS[place_TS[steps, signals], signals] = values_TS[steps, signals]
        self._seen_S += finite_TS.sum(0)

    def count(self) -> Int64[np.ndarray, " signals"]:
        """Return how many values each signal remembers."""
        return np.minimum(self._seen_S, len(self._values_NS))

    def median(self) -> Float64[np.ndarray, " signals"]:
        """Return the medians; NaN before the first finite value."""
        return _median(self._values_NS)

    def spread(self) -> Float64[np.ndarray, " signals"]:
        """Return the robust standard deviations; NaN before the first finite value."""
        median_S = self.median()
        with np.errstate(over="ignore"):
            robust_S = 1.4826 * _median(np.abs(self._values_NS - median_S))
        spread_S: np.ndarray = np.maximum(robust_S, np.maximum(self.floor_frac * np.abs(median_S), self.floor))
        return spread_S

    def usual(self, sigmas: float, count_from: float | None = None) -> list[Usual]:
        """Return what is usual of each signal: outside is what lies above `limit`, or is not finite.

        limit = median + sigmas * max(1, 20 / values) * spread

        From few values the spread may be far too small by chance: of normal values 7 in 1000 would lie outside 7 sigmas
        of the 6 before them. Hence the factor, with which it is 1 in 4000.

        Args:
            sigmas: Robust standard deviations.
            count_from: `share` is that of values from here on, instead of values outside.
        """
        median_S, spread_S, count_S = self.median(), self.spread(), self.count()
        with np.errstate(over="ignore", invalid="ignore"):
            width_S = sigmas * np.maximum(1.0, _ENOUGH / np.maximum(count_S, 1))
            limit_S = np.where(count_S >= self.least, median_S + width_S * spread_S, np.inf)
        many_NS = self._values_NS > limit_S if count_from is None else self._values_NS >= count_from
        share_S = (many_NS.sum(0) + 1) / (count_S + 2)
        columns = (column.tolist() for column in (limit_S, share_S, median_S, spread_S))
        return [Usual(*values) for values in zip(*columns, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, as tensors."""
        return {"values": torch.from_numpy(self._values_NS.copy()), "seen": torch.from_numpy(self._seen_S.copy())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            CheckpointError: It remembers other signals, or another number of values.
        """
        values_NS = state["values"].numpy()
        if values_NS.shape != self._values_NS.shape:
            raise CheckpointError(
                f"expected a saved band of {self._values_NS.shape} values and signals, found {values_NS.shape}; "
                "resume with the configuration that the run was started with"
            )
        self._values_NS, self._seen_S = values_NS.copy(), state["seen"].numpy().copy()


def _median(values_NS: Float64[np.ndarray, "values signals"]) -> Float64[np.ndarray, " signals"]:
    """Return the median of each column's values, NaN left out; NaN of a column without any."""
    sorted_NS = np.sort(values_NS, axis=0)  # NaN last
    count_S = len(values_NS) - np.isnan(values_NS).sum(0)
    columns = np.arange(values_NS.shape[1])
    low_S, high_S = sorted_NS[np.maximum(count_S - 1, 0) // 2, columns], sorted_NS[count_S // 2, columns]
    median_S: np.ndarray = low_S / 2 + high_S / 2  # the sum might overflow
    return median_S
