"""The cells of a ladder that belong together: all of one setting, or those of one of its rates."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import median, stdev

from .numbers import Estimate, binomial_interval, mean_interval, paired_interval, rate_per_million
from .outcomes import Ending, Outcome


@dataclass(frozen=True)
class Cells:
    """Cells that share their data, model and optimizer, and what came of them."""

    outcomes: tuple[Outcome, ...]
    learnable: tuple[str, ...]
    """The tasks that some cell on the same data learned."""

    @property
    def tried(self) -> int:
        """Return how many cells there are."""
        return len(self.outcomes)

    @cached_property
    def endings(self) -> tuple[Ending, ...]:
        """Return each cell's verdict."""
        return tuple(o.ending(self.learnable) for o in self.outcomes)

    @cached_property
    def counts(self) -> Mapping[Ending, int]:
        """Return how many cells came to each ending; 0 for the others."""
        return Counter(self.endings)

    @property
    def diverged(self) -> int:
        """Return how many cells diverged for good."""
        return self.counts["full_divergence"]

    @property
    def diverged_interval(self) -> tuple[float, float]:
        """Return the exact interval of the chance to diverge; over several rates, of a run at one of them by lot."""
        return binomial_interval(self.diverged, self.tried)

    @property
    def episodes(self) -> Estimate:
        """Return the micro-divergences per million rows; they come in flocks, so that the interval is rather narrow."""
        return rate_per_million(sum(o.episodes for o in self.outcomes), sum(o.rows for o in self.outcomes))

    @property
    def step_seconds(self) -> float:
        """Return the median over cells of the seconds that a step took."""
        return _median(o.seconds / o.steps for o in self.outcomes if o.steps)

    def mean(self, reading: Callable[[Outcome], float]) -> float:
        """Return the mean over the cells where a reading is known."""
        return mean_interval(map(reading, self.outcomes)).mean

    def median(self, reading: Callable[[Outcome], float]) -> float:
        """Return the median over the cells where a reading is known."""
        return _median(map(reading, self.outcomes))


@dataclass(frozen=True)
class Rung(Cells):
    """The cells of one rate, one for each seed."""

    @property
    def rate(self) -> float:
        """Return the learning rate."""
        return self.outcomes[0].rate

    @cached_property
    def ending(self) -> Mapping[int, Ending]:
        """Return the ending by seed."""
        return {o.seed: ending for o, ending in zip(self.outcomes, self.endings, strict=True)}

    @cached_property
    def valid(self) -> float:
        """Return the mean quality of the validation windows, by which a rate is chosen."""
        return self.mean(lambda o: o.quality("valid"))

    @cached_property
    def test(self) -> Mapping[int, float]:
        """Return the quality of the test windows by seed, where it is known."""
        found = {o.seed: o.quality("test") for o in self.outcomes}
        return {seed: quality for seed, quality in found.items() if not math.isnan(quality)}

    @cached_property
    def quality(self) -> Estimate:
        """Return the mean quality of the test windows, which is what is reported."""
        return mean_interval(self.test.values())

    @cached_property
    def quality_sd(self) -> float:
        """Return the standard deviation of the test windows' quality over seeds; NaN with fewer than two."""
        return stdev(self.test.values()) if len(self.test) > 1 else math.nan

    def lead(self, other: "Rung") -> Estimate:
        """Return the test quality minus that of another rung, paired by seed over those that both have."""
        seeds = [seed for seed in self.test if seed in other.test]
        return paired_interval([self.test[seed] for seed in seeds], [other.test[seed] for seed in seeds])


def _median(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan
