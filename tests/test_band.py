"""What is usual of a signal, compared with plain statistics of its last finite values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steadyrank.errors import CheckpointError
from steadyrank.monitors.band import RobustBand, Usual

VALUES = st.lists(
    st.one_of(st.floats(-100, 100), st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308])), max_size=40
)


@given(VALUES, VALUES, st.integers(1, 12), st.integers(1, 5))
def test_the_band_equals_the_statistics_of_the_last_finite_values(
    one: list[float], other: list[float], memory: int, cut: int
) -> None:
    n = min(len(one), len(other))
    values_TS = np.array([one[:n], other[:n]]).T.reshape(n, 2)
    band = RobustBand(2, memory=memory, floor_frac=0.0)
    for start in range(0, n, cut):
        band.add(values_TS[start : start + cut])
    for s in range(2):
        finite = values_TS[np.isfinite(values_TS[:, s]), s][-memory:]
        kept = finite / 1e3  # so that the twin does not overflow
        usual = band.usual(7.0, count_from=0.0)[s]
        assert band.count()[s] == len(kept)
        if not len(kept):
            assert usual.limit == math.inf
            assert math.isnan(usual.median)
            assert math.isnan(usual.spread)
            continue
        median = np.median(kept)
        spread = 1.4826 * np.median(np.abs(kept - median))
        assert usual.median == pytest.approx(1e3 * median, rel=1e-12, abs=1e-12)
        if spread < 1e304:
            assert usual.spread == pytest.approx(max(1e3 * spread, 1e-9), rel=1e-12)
            assert usual.limit == pytest.approx(usual.median + 7 * max(1, 20 / len(kept)) * usual.spread, rel=1e-9)
        assert usual.share == ((finite >= 0).sum() + 1) / (len(finite) + 2)


def test_the_spread_of_normal_values_is_their_standard_deviation() -> None:
    band = RobustBand(1, memory=100_000)
    band.add(3.0 * np.random.default_rng(0).standard_normal((100_000, 1)))
    assert band.spread()[0] == pytest.approx(3.0, rel=0.01)


def test_a_short_history_has_nothing_outside_and_a_flat_one_leaves_room() -> None:
    band = RobustBand(2, memory=30, least=3)
    band.add(np.zeros((0, 2)))
    band.add(np.array([[5.0, 0.0], [5.0, 0.0]]))
    assert [usual.limit for usual in band.usual(7.0)] == [math.inf, math.inf]
    band.add(np.array([[5.0, 0.0]] * 28))
    five, zero = band.usual(7.0)
    assert five == Usual(limit=5.0 + 7.0 * 0.005, share=1 / 32, median=5.0, spread=0.005)
    assert zero == Usual(limit=7.0 * 1e-9, share=1 / 32, median=0.0, spread=1e-9)


def test_almost_half_of_the_values_may_be_wild() -> None:
    band = RobustBand(1, memory=41)
    calm = 1.0 + 0.01 * np.random.default_rng(0).standard_normal(21)
    band.add(np.concatenate([calm, np.full(20, 1e30)])[:, None])
    assert calm.min() <= band.median()[0] <= calm.max()
    assert band.spread()[0] < 0.1


def test_the_band_with_few_values_is_rarely_too_narrow() -> None:
    rng = np.random.default_rng(0)
    for values in (6, 10, 20):
        band = RobustBand(20_000, memory=20)
        band.add(rng.standard_normal((values, 20_000)))
        limits = np.array([usual.limit for usual in band.usual(7.0)])
        assert (rng.standard_normal(20_000) > limits).mean() < 1 / 1000


def test_a_band_is_saved_whole_and_only_into_its_like() -> None:
    band, other = RobustBand(2, memory=5), RobustBand(2, memory=5)
    band.add(np.arange(14.0).reshape(7, 2))
    other.load_state_dict(band.state_dict())
    band.add(np.array([[1.0, math.nan]]))
    other.add(np.array([[1.0, math.nan]]))
    assert band.usual(7.0) == other.usual(7.0)
    with pytest.raises(CheckpointError, match=r"\(6, 2\).*\(5, 2\)"):
        RobustBand(2, memory=6).load_state_dict(band.state_dict())
