"""The laboratory's intervals against SciPy, its curve scores against slow loops and hand-worked numbers."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import special, stats

from steadyrank.ladder.numbers import (
    Estimate,
    binomial_interval,
    incomplete_beta,
    mean_interval,
    paired_interval,
    poisson_interval,
    rate_per_million,
    sensitivity,
    spike_share,
    student_quantile,
)

NAN, INF = math.nan, math.inf


@settings(max_examples=200, deadline=None)
@given(st.floats(-1, 3.7), st.floats(-1, 3.7), st.floats(0, 1))
@example(0.0, 0.0, 0.0)
@example(0.0, 0.0, 1.0)
def test_the_incomplete_beta_function_equals_scipy(log_a: float, log_b: float, x: float) -> None:
    a, b = 10**log_a, 10**log_b
    # Its logarithm is of the size of a + b, and so is the rounding that its exponential multiplies.
    assert incomplete_beta(x, a, b) == pytest.approx(special.betainc(a, b, x), abs=1e-15 * (a + b) + 1e-14)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(
    ("hits", "tried"), [(0, 1), (1, 1), (2, 3), (0, 35), (9, 35), (35, 35), (7, 2000), (1999, 2000)]
)
def test_the_binomial_interval_equals_scipy(hits: int, tried: int, level: float) -> None:
    exact = stats.binomtest(hits, tried).proportion_ci(level, method="exact")
    assert binomial_interval(hits, tried, level) == pytest.approx((exact.low, exact.high), abs=1e-11)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("events", [0, 1, 3, 40, 2000])
def test_the_poisson_interval_equals_scipy(events: int, level: float) -> None:
    low, high = poisson_interval(events, level)
    assert high == pytest.approx(stats.chi2.ppf((1 + level) / 2, 2 * events + 2) / 2, rel=1e-9)
    assert low == pytest.approx(stats.chi2.ppf((1 - level) / 2, 2 * events) / 2 if events else 0.0, rel=1e-9)


@pytest.mark.parametrize("level", [0.1, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("freedom", [1, 2, 4, 29, 1000])
def test_student_quantiles_equal_scipy(freedom: int, level: float) -> None:
    assert student_quantile(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-10)


def test_the_intervals_of_means_equal_scipy() -> None:
    ours, theirs = np.random.default_rng(0).normal(0.6, 0.01, (2, 5))
    for found, known in (
        (mean_interval(ours, 0.9), stats.ttest_1samp(ours, 0).confidence_interval(0.9)),
        (paired_interval(ours, theirs), stats.ttest_rel(ours, theirs).confidence_interval(0.95)),
    ):
        assert found[1:] == pytest.approx((known.low, known.high), rel=1e-10)
    assert mean_interval(ours).mean == pytest.approx(ours.mean(), rel=1e-15)


def test_a_binomial_interval_covers_as_often_as_it_says() -> None:
    """For any chance, the draws whose interval holds it are together at least as likely as the level."""
    bounds = [binomial_interval(hits, 12, 0.9) for hits in range(13)]
    for chance in np.linspace(0.01, 0.99, 49):
        likely = stats.binom.pmf(np.arange(13), 12, chance)
        assert sum(p for p, (low, high) in zip(likely, bounds, strict=True) if low <= chance <= high) >= 0.9


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 60), st.sampled_from([0.5, 0.9, 0.99]))
def test_counts_have_intervals_that_hold_them_and_rise_with_them(hits: int, more: int, level: float) -> None:
    tried = hits + more
    low, high = binomial_interval(hits, tried, level)
    assert 0 <= low <= hits / tried <= high <= 1
    assert all(b > a for a, b in zip((low, high), binomial_interval(hits + 1, tried, level), strict=True))
    mirrored = binomial_interval(tried - hits, tried, level)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)
    low, high = poisson_interval(hits, level)
    assert low <= hits <= high
    assert all(b > a for a, b in zip((low, high), poisson_interval(hits + 1, level), strict=True))
    wider = poisson_interval(hits, 0.999)
    assert wider[0] <= low
    assert wider[1] > high


def test_what_is_missing_makes_no_bounds() -> None:
    assert binomial_interval(0, 0) == (0.0, 1.0)
    assert mean_interval([NAN, 0.5])[0] == 0.5
    assert str(mean_interval([])) == str(Estimate(NAN, NAN, NAN))
    assert mean_interval([1.0, NAN, 3.0]) == mean_interval([1.0, 3.0])
    for value in np.log([0.1, 0.2, 0.3, 0.7]).tolist():  # equal values have no spread, not even one of roundings
        assert all(mean_interval([value] * count) == (value, value, value) for count in range(2, 12))
    mean, low, high = mean_interval([1.0, INF])
    assert mean == INF
    assert math.isnan(low)
    assert math.isnan(high)
    assert math.isnan(mean_interval([INF, -INF]).mean)
    assert paired_interval([1.0, NAN, 5.0], [0.0, 7.0, 4.0]) == (1.0, 1.0, 1.0)
    assert math.isnan(rate_per_million(0, 0).high)
    assert rate_per_million(2, 4_000_000).mean == 0.5


def test_an_interval_excludes_only_what_lies_outside() -> None:
    assert Estimate(1.0, 0.5, 2.0).excludes(0)
    assert Estimate(-1.0, -2.0, -0.5).excludes(0)
    assert not Estimate(1.0, -0.5, 2.0).excludes(0)
    assert not Estimate(1.0, NAN, NAN).excludes(0)


def test_numbers_out_of_range_are_refused() -> None:
    for hits, tried in ((-1, 3), (4, 3), (0, -1)):
        with pytest.raises(ValueError, match="hits must lie between 0 and"):
            binomial_interval(hits, tried)
    with pytest.raises(ValueError, match="events must be 0 or more, not -1"):
        poisson_interval(-1)
    for level in (0.0, 1.0, 95.0, NAN):
        with pytest.raises(ValueError, match="between 0 and 1, not at"):
            mean_interval([1.0, 2.0], level)
    with pytest.raises(ValueError, match="shorter"):
        paired_interval([1.0, 2.0], [1.0])


def slow_spike_share(losses: np.ndarray, sigmas: float, memory: int, least: int) -> float:
    past: list[float] = []
    judged = spikes = 0
    for loss in losses.tolist():
        if not math.isfinite(loss):
            judged, spikes = judged + 1, spikes + 1
            continue
        if len(past) >= least:
            judged += 1
            spikes += loss > np.mean(past[-memory:]) + sigmas * np.std(past[-memory:])
        past.append(loss)
    return spikes / judged if judged else NAN


@pytest.mark.parametrize(("count", "memory", "least"), [(700, 50, 20), (700, 300, 100), (90, 100, 10), (30, 50, 40)])
def test_spikes_equal_a_slow_loop(count: int, memory: int, least: int) -> None:
    rng = np.random.default_rng(count + memory)
    losses = 0.7 + 0.3 * np.exp(-np.arange(count) / 100) + rng.normal(0, 0.02, count)
    losses[rng.integers(0, count, 12)] += rng.choice([0.05, 1.0, 1e10, -1e10], 12)  # a large one hides those after it
    losses[rng.integers(0, count, 6)] = rng.choice([NAN, INF, -INF], 6)
    for sigmas in (2.0, 4.0):
        expected = slow_spike_share(losses, sigmas, memory, least)
        assert spike_share(losses, sigmas, memory, least) == expected
        assert expected > 0


def test_spikes_of_odd_curves() -> None:
    assert math.isnan(spike_share(np.zeros(0)))
    assert math.isnan(spike_share(np.full(100, 0.7)))  # none of them could be judged
    assert spike_share(np.full(9, NAN)) == 1.0
    assert spike_share(np.full(3000, 0.7)) == 0.0
    assert spike_share(np.append(np.full(100, 0.7), [0.7, 0.8])) == 0.5
    assert spike_share(np.append(np.full(100, 0.7), [0.7, 0.6])) == 0.0  # a fall is none
    assert spike_share(np.random.default_rng(0).normal(0, 1e300, 3000)) == 0.0
    assert spike_share(np.full(300, 0.7, np.float32)) == 0.0


def test_sensitivity_by_hand() -> None:
    assert sensitivity([0.9, 0.8, 0.7, 5.0]) == pytest.approx((0.9 + 0.8 + 0.7 + 1.0) / 4 - 0.7)
    assert sensitivity([0.9, INF, NAN, -INF], init=1.5) == pytest.approx((0.9 + 3 * 1.5) / 4 - 0.9)
    assert sensitivity([0.8]) == 0.0
    assert sensitivity([2.0, 3.0]) == 0.0
    assert math.isnan(sensitivity([]))
