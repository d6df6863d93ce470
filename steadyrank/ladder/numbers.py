"""Stability in numbers: exact intervals and the scores of single curves, as pure functions of plain numbers."""

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
"""Of every interval, unless told otherwise."""
SIGMAS, MEMORY, LEAST = 7.0, 1000, 100
_CHUNK = 256  # windows of 1000 points judged at a time: 2 MB, which stays in a cache


class Estimate(NamedTuple):
    """A mean and its interval; the bounds are NaN where they are not known."""

    mean: float
    low: float
    high: float

    def excludes(self, value: float | int) -> bool:
        """Return whether the interval is known and lies on one side of a value."""
        return self.low > value or self.high < value


NOTHING = Estimate(math.nan, math.nan, math.nan)


@lru_cache(4096)
def binomial_interval(hits: int, tried: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the exact interval of a chance of which `tried` independent draws hit `hits` times.

    The quantiles `(1 - level) / 2` of Beta(hits, tried - hits + 1) and `(1 + level) / 2` of Beta(hits + 1, tried -
    hits). It covers the true chance at least that often, whatever the chance.

    Returns:
        Low and high, 0 to 1; all of it where nothing was tried.

    Raises:
        ValueError: Fewer were tried than hit, or a number is out of its range.

    >>> [round(bound, 3) for bound in binomial_interval(9, 35)]
    [0.125, 0.433]
    >>> binomial_interval(0, 0)
    (0.0, 1.0)

    Source: Clopper and Pearson, "The use of confidence or fiducial limits", Biometrika 26, 1934.
    """
    _check_level(level)
    if not 0 <= hits <= tried:
        raise ValueError(f"hits must lie between 0 and the {tried} tried, not at {hits}")
    low = _beta_quantile((1 - level) / 2, hits, tried - hits + 1) if hits else 0.0
    high = _beta_quantile((1 + level) / 2, hits + 1, tried - hits) if hits < tried else 1.0
    return low, high


@lru_cache(4096)
def poisson_interval(events: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the exact interval of the number of events to be expected where `events` came.

    `P(N >= events | low) = P(N <= events | high) = (1 - level) / 2` of a Poisson count N. Events that come in flocks
    vary more than that.

    Returns:
        Low and high, 0 or more.

    Raises:
        ValueError: A number is out of its range.

    >>> [round(bound, 3) for bound in poisson_interval(3)]
    [0.619, 8.767]
    >>> round(poisson_interval(0)[1], 3)
    3.689

    Source: Garwood, "Fiducial limits for the Poisson distribution", Biometrika 28, 1936.
    """
    _check_level(level)
    if events < 0:
        raise ValueError(f"events must be 0 or more, not {events}")
    below = _poisson_mean(events - 1, (1 + level) / 2) if events else 0.0
    return below, _poisson_mean(events, (1 - level) / 2)


def rate_per_million(events: int, rows: int, level: float = LEVEL) -> Estimate:
    """Return events per million rows, with `poisson_interval`'s bounds; NaN without rows.

    >>> [round(value, 2) for value in rate_per_million(3, 2_000_000)]
    [1.5, 0.31, 4.38]
    """
    if not rows:
        return NOTHING
    low, high = poisson_interval(events, level)
    return Estimate(*(1e6 * count / rows for count in (events, low, high)))


def mean_interval(values: Iterable[float], level: float = LEVEL) -> Estimate:
    """Return the mean of independent draws and Student's interval, `mean -+ t_(n-1) s / sqrt(n)`.

    Args:
        values: The n draws; a NaN stands for one that is not known, and is left out.
        level: Of the interval, between 0 and 1.

    Returns:
        NaN bounds with fewer than two draws, or an infinite one; NaN throughout without any.

    Raises:
        ValueError: The level is out of its range.

    >>> [round(value, 3) for value in mean_interval([0.61, 0.62, 0.66])]
    [0.63, 0.564, 0.696]
    >>> mean_interval([0.61])
    Estimate(mean=0.61, low=nan, high=nan)

    Source: Student, "The probable error of a mean", Biometrika 6, 1908.
    """
    _check_level(level)
    known = [float(value) for value in values if not math.isnan(value)]
    count = len(known)
    if count < 2 or not all(map(math.isfinite, known)):
        return Estimate(sum(known) / count, math.nan, math.nan) if known else NOTHING
    # The quotient of equal values may be a rounding beside them, which would pass for a spread.
    mean = min(max(math.fsum(known) / count, min(known)), max(known))
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (count - 1) / count)
    reach = student_quantile(level, count - 1) * spread
    return Estimate(mean, mean - reach, mean + reach)


def paired_interval(ours: Iterable[float], theirs: Iterable[float], level: float = LEVEL) -> Estimate:
    """Return `mean_interval` of ours - theirs, pair by pair; a pair with a NaN is left out.

    What both of a pair share (a seed, its data) cancels, so that the interval is narrower than that of two means.

    Raises:
        ValueError: They are not equally many, or the level is out of its range.

    >>> [round(value, 3) for value in paired_interval([0.61, 0.65, 0.63], [0.60, 0.64, 0.60])]
    [0.017, -0.012, 0.045]
    """
    return mean_interval((our - their for our, their in zip(ours, theirs, strict=True)), level)


def spike_share(
    losses: Float[np.ndarray, " points"], sigmas: float = SIGMAS, memory: int = MEMORY, least: int = LEAST
) -> float:
    """Return the share of points that lie more than `sigmas` standard deviations above the mean of those before them.

    `loss_t > mean + sigmas * std` of the last `memory` finite points before t. What is not finite is a spike, and is
    not remembered; a finite spike is, as in the source. Above a flat history every rise is a spike.

    Args:
        losses: In the order of the steps.
        sigmas: More than 0.
        memory: Points, 1 or more.
        least: Points that must be remembered before a finite one is judged: the first ones of a run are not, and do
            not count among the points of which this is a share.

    Returns:
        0 to 1; NaN where no point could be judged.

    >>> curve = np.full(300, 0.5) + 0.01 * np.sin(np.arange(300))
    >>> curve[[200, 250]] = 3.0, np.nan
    >>> spike_share(curve)
    0.01

    Source: the spike score of OLMo 2, arXiv 2501.00656, which counts falls as well as rises, and includes the start.
    """
    finite = np.isfinite(losses)
    kept = losses[finite].astype(np.float64)
    least = max(min(least, memory), 1)
    spikes = len(losses) - len(kept)
    judged = max(len(kept) - least, 0) + spikes
    with np.errstate(over="ignore", invalid="ignore"):  # squares past 1e308: the spread is inf, and nothing stands out
        for now in range(least, min(memory, len(kept))):
            past = kept[:now]
            spikes += int(kept[now] > past.mean() + sigmas * past.std())
        if len(kept) > memory:
            pasts = np.lib.stride_tricks.sliding_window_view(kept, memory)[:-1]
            for first in range(0, len(pasts), _CHUNK):  # no running sums: one spike of 1e10 would spoil all after it
                past = pasts[first : first + _CHUNK]
                now = kept[memory + first : memory + first + len(past)]
                spikes += int((now > past.mean(1) + sigmas * past.std(1)).sum())
    return spikes / judged if judged else math.nan


def sensitivity(losses_by_rate: Iterable[float], init: float = 1.0) -> float:
    """Return how much is lost on average by a rate drawn from the ladder in place of its best one.

    `mean_i min(loss_i, init) - min_i min(loss_i, init)`. It compares methods on one and the same ladder of equal
    factors only; a method that never learns has 0, as one that learns at every rate.

    Args:
        losses_by_rate: Of the runs of one seed, a rate each; what is not finite counts as `init`.
        init: Loss of a model that has learned nothing; 1 for normalised entropy.

    Returns:
        0 or more; NaN without rates.

    >>> round(sensitivity([0.9, 0.8, math.nan]), 3)
    0.1

    Source: Wortsman et al., arXiv 2309.14322, section 2.2.
    """
    capped = [min(loss, init) if math.isfinite(loss) else init for loss in losses_by_rate]
    return math.fsum(capped) / len(capped) - min(capped) if capped else math.nan


@lru_cache(4096)
def student_quantile(level: float, freedom: int) -> float:
    """Return t such that Student's variable of so many degrees of freedom lies in -t to t with chance `level`.

    `t = sqrt(freedom * y / (1 - y))`, y that quantile of Beta(1/2, freedom/2).

    >>> round(student_quantile(0.95, 4), 3)
    2.776
    """
    y = _beta_quantile(level, 0.5, freedom / 2)
    return math.sqrt(freedom * y / (1 - y))


def incomplete_beta(x: float, a: float | int, b: float | int) -> float:
    """Return the regularised incomplete beta function `I_x(a, b)`: the chance that a Beta(a, b) variable is below x.

    >>> round(incomplete_beta(0.25, 2.0, 1.0), 12)
    0.0625

    Source: DLMF 8.17.22, a continued fraction, evaluated as by Lentz, Applied Optics 15, 1976.
    """
    if not 0 < x < 1:
        return float(x >= 1)
    flipped = x > (a + 1) / (a + b + 2)  # where the fraction converges slowly: I_x(a, b) = 1 - I_(1-x)(b, a)
    if flipped:
        x, a, b = 1 - x, b, a
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    upper, lower, fraction, change, m = 1.0, 0.0, 1.0, 0.0, 0
    while abs(change - 1) > 1e-15 and m < 10_000:
        at = a + 2 * m
        for term in (-(a + m) * (a + b + m) / (at * (at + 1)), (m + 1) * (b - m - 1) / ((at + 1) * (at + 2))):
            lower = 1 / (1 + term * x * lower)
            upper = 1 + term * x / upper
            change = upper * lower
            fraction *= change
        m += 1
    value = math.exp(log_front) / (a * fraction)
    return 1 - value if flipped else value


def _beta_quantile(chance: float, a: float | int, b: float | int) -> float:
    return _bisect(lambda x: incomplete_beta(x, a, b) < chance, 0.0, 1.0)


def _poisson_mean(most: int, chance: float) -> float:
    """Return the mean at which a Poisson count is at most `most` with that chance."""
    counts = np.arange(most + 1, dtype=np.float64)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(counts[1:]))])

    def is_too_small(mean: float) -> bool:
        with np.errstate(under="ignore"):
            return float(np.exp(counts * math.log(mean) - mean - log_factorials).sum()) > chance

    high = most + 1.0
    while is_too_small(high):
        high *= 2
    return _bisect(is_too_small, 0.0, high)


def _bisect(is_too_small: Callable[[float], bool], low: float, high: float) -> float:
    """Return where a function of one number turns, to the last bit."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if is_too_small(middle) else (low, middle)
    return middle


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval lies between 0 and 1, not at {level}")
