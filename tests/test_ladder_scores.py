"""Ladders small enough to be scored by hand: whole, with holes, of one seed or rate, and with nothing stable."""

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from steadyrank.ladder.outcomes import Outcome
from steadyrank.ladder.scores import Score, choose, conclude, quality_gap, rows, score_ladder, stable_ratio

NAN = math.nan
RATES = (0.1, 0.2, 0.4, 0.8)
AUCS = {0.1: 0.60, 0.2: 0.62, 0.4: 0.615, 0.8: 0.57}
SPREAD = (-0.001, 0.0, 0.001)
"""What each of three seeds adds to the AUC."""
FULL, NEVER, MICRO = "full_divergence", "never_learned", "micro_divergence"


def cell(rate: float, seed: int, auc: float, verdict: str = "healthy", **changes: Any) -> Outcome:
    plain = {"optimizer": "clippy", "family": "clippy", "model": "small", "incident": "none", "status": "finished"}
    plain |= {"steps": 100, "rows": 1_000_000, "seconds": 2.0, "cell": f"{rate}/{seed}", "loss": 0.9}
    scores = {"click": auc, "watch": 0.9}
    plain |= {"kinds": {"click": "binary", "watch": "regression"}, "valid": scores, "test": scores}
    watch = FULL if verdict == FULL else "healthy"
    return Outcome(rate=rate, seed=seed, verdicts={"click": verdict, "watch": watch}, **plain | changes)


def ladder(bad: dict[tuple[float, int], str] | None = None, shift: float = 0.0, **changes: Any) -> list[Outcome]:
    """Four rates of three seeds; `bad` names the verdicts that are not healthy."""
    return [
        cell(rate, seed, AUCS[rate] + SPREAD[seed] + shift, (bad or {}).get((rate, seed), "healthy"), **changes)
        for rate in RATES
        for seed in range(3)
    ]


def score(outcomes: list[Outcome]) -> Score:
    (found,) = score_ladder(outcomes)
    return found


def test_a_small_ladder_by_hand() -> None:
    bad = {(0.8, 0): FULL, (0.8, 1): FULL, (0.4, 1): MICRO, (0.4, 2): FULL}
    found = score(ladder(bad))
    assert [rung.rate for rung in found.rungs] == list(RATES)
    assert [(r.tried, r.diverged, r.counts[MICRO], r.counts[NEVER]) for r in found.rungs] == [
        (3, 0, 0, 0),
        (3, 0, 0, 0),
        (3, 1, 1, 0),
        (3, 2, 0, 0),
    ]
    assert (found.cells.tried, found.cells.diverged) == (12, 3)
    assert found.cells.diverged_interval == pytest.approx(tuple(stats.binomtest(3, 12).proportion_ci(0.95)), abs=1e-12)
    assert found.best is found.rungs[1]
    assert found.best.quality.mean == pytest.approx(0.62)
    assert found.best.quality_sd == pytest.approx(0.001)
    assert found.double is found.rungs[2]
    assert {seed: tuple(of) for seed, of in found.stable.items()} == {0: (0.4, False), 1: (0.4, False), 2: (0.2, False)}
    assert found.stable_rate.mean == pytest.approx((0.4 * 0.4 * 0.2) ** (1 / 3))
    known = stats.ttest_1samp(np.log([0.4, 0.4, 0.2]), 0).confidence_interval(0.95)
    assert found.stable_rate[1:] == pytest.approx((math.exp(known.low), math.exp(known.high)))
    assert (found.stable_rate_of_all, found.stable_rate_censored, found.unstable_at_best) == (0.2, False, 0)


def test_a_rate_is_chosen_on_validation_and_reported_on_test() -> None:
    low = [cell(0.1, s, 0.7, valid={"click": 0.60, "watch": 0.9}) for s in range(3)]
    high = [cell(0.2, s, 0.6, valid={"click": 0.61, "watch": 0.9}) for s in range(3)]
    found = score(low + high)
    assert found.best is not None
    assert (found.best.rate, found.best.quality.mean) == (0.2, pytest.approx(0.6))
    tolerant = found.tolerance()  # a rate that is better on test is within the slack
    assert tolerant is not None
    assert tolerant.factor == 2.0


def test_an_even_choice_takes_the_lower_rate() -> None:
    found = score([cell(rate, 0, 0.6) for rate in reversed(RATES)])
    assert found.best is found.rungs[0]


def test_the_double_rate_is_the_first_at_least_twice_the_best() -> None:
    rates = (0.1, 0.15, 0.1 + 0.1 * (1 - 1e-12), 0.4)
    found = score([cell(rate, 0, 0.6 - rate / 10) for rate in rates])
    assert found.double is found.rungs[2]
    assert score([cell(rate, 0, 0.6 + rate / 10) for rate in rates]).double is None


def test_the_climb_ends_at_the_first_unstable_rate_and_ignores_those_below_the_best() -> None:
    found = score(ladder({(0.1, 0): FULL, (0.4, 0): NEVER}))
    assert tuple(found.stable[0]) == (0.2, False)
    assert tuple(found.stable[1]) == (0.8, True)
    assert found.stable_rate_censored
    assert found.stable_rate_of_all == 0.2


def collapse(aucs: dict[tuple[float, int], float]) -> list[Outcome]:
    """Replace the test AUC of some cells; their verdicts stay healthy, and so does what chooses the best rate."""
    return [
        replace(o, test={**o.test, "click": aucs[o.rate, o.seed]}) if (o.rate, o.seed) in aucs else o for o in ladder()
    ]


def test_a_cell_collapsed_that_keeps_less_than_half_of_its_seeds_gain_at_the_best_rate() -> None:
    """Seed 1 has .620 at 0.2, which is .120 over a constant: .560 keeps half of it, and .559 does not."""
    found = score(collapse({(0.4, 1): 0.559, (0.8, 1): 0.62, (0.8, 2): 0.56, (0.1, 0): 0.5}))
    assert [[found.has_collapsed(rung, seed) for seed in range(3)] for rung in found.rungs] == [
        [False, False, False],  # below the best rate a cell is slow, and not unstable
        [False, False, False],
        [False, True, False],
        [False, False, True],  # .121 of seed 2 would need .5605
    ]
    assert {seed: tuple(of) for seed, of in found.stable.items()} == {0: (0.8, True), 1: (0.2, False), 2: (0.4, False)}
    assert found.collapsed == 2
    assert (found.cells.diverged, found.cells.counts[NEVER]) == (0, 0)
    assert "stable up to at least 0.4;" in conclude(found)
    (row,) = rows([found])
    assert (row["collapsed"], row["stable_rate_of_all"]) == (2, 0.2)


def test_a_cell_that_diverged_or_never_learned_is_not_counted_as_collapsed_too() -> None:
    outcomes = [cell(rate, 0, auc) for rate, auc in ((0.1, 0.62), (0.2, 0.5), (0.4, 0.5), (0.8, 0.5))]
    outcomes[1] = replace(outcomes[1], verdicts={"click": "healthy", "watch": FULL})
    outcomes[2] = replace(outcomes[2], verdicts={"click": NEVER, "watch": "healthy"})
    found = score(outcomes)
    assert all(found.has_collapsed(rung, 0) for rung in found.rungs[1:])
    assert found.collapsed == 1


def test_nothing_collapsed_where_there_is_nothing_to_lose_or_to_compare() -> None:
    nothing = score([cell(0.1, 0, 0.499), cell(0.2, 0, 0.49)])
    assert (nothing.best, nothing.collapsed) == (nothing.rungs[0], 0)
    gone = score([o for o in collapse({(0.4, 1): 0.5, (0.8, 1): NAN}) if (o.rate, o.seed) != (0.2, 1)])
    assert gone.collapsed == 0
    assert not gone.has_collapsed(gone.rungs[2], 1)
    unknown = score(collapse({(0.8, 1): NAN}))
    assert unknown.collapsed == 0
    blank = score([cell(rate, 0, NAN, valid={"click": NAN, "watch": NAN}) for rate in RATES])
    assert (blank.best, blank.collapsed, blank.stable) == (None, 0, {})


def test_a_seed_that_is_unstable_at_the_best_rate_is_left_out_and_counted() -> None:
    found = score(ladder({(0.2, 1): FULL, (0.8, 0): FULL, (0.8, 2): FULL}))
    assert math.isnan(found.stable[1].rate)
    assert found.unstable_at_best == 1
    assert found.stable_rate.mean == pytest.approx(0.4)
    assert math.isnan(found.stable_rate_of_all)
    assert "best at 0.2 with AUC .6200, where 1 of 3 seeds was unstable; stable up to 0.4;" in conclude(found)


def test_tolerance_is_the_unbroken_range_about_the_best_rate() -> None:
    found = score(ladder())
    narrow, usual, wide = found.tolerance(0.001), found.tolerance(), found.tolerance(0.1)
    assert narrow is not None
    assert usual is not None
    assert wide is not None
    assert (narrow.low, narrow.high, narrow.factor, narrow.low_censored, narrow.high_censored) == (
        *(0.2, 0.2, 1.0),
        *(False, False),
    )
    assert (usual.low, usual.high, usual.low_censored, usual.high_censored) == (0.2, 0.4, False, False)
    assert (wide.factor, wide.low_censored, wide.high_censored) == (pytest.approx(8.0), True, True)
    assert (usual.censored, wide.censored) == (False, True)
    unknown = score([replace(o, seed=o.seed + 9 * (o.rate == 0.4)) for o in ladder()]).tolerance(0.1)
    assert unknown is not None
    assert (unknown.high, unknown.high_censored) == (0.2, True)  # no seed is shared with what follows
    holed = score([o for o in ladder() if o.rate != 0.4] + [cell(0.4, s, 0.5) for s in range(3)])
    broken = holed.tolerance(0.09)
    assert broken is not None
    assert (broken.low, broken.high) == (0.1, 0.2)


def test_the_slack_itself_is_within_the_slack() -> None:
    tolerant = score([cell(0.1, 0, 0.61), cell(0.2, 0, 0.62)]).tolerance(0.01)
    assert tolerant is not None
    assert tolerant.low == 0.1


def test_a_missing_cell_is_compared_over_the_seeds_that_both_have() -> None:
    """Seed 2 is by far the best; without it a rate must not look worse than it is."""
    spread = (0.0, 0.0, 0.1)
    whole = [cell(rate, seed, AUCS[rate] + spread[seed]) for rate in RATES for seed in range(3)]
    found = score([o for o in whole if (o.rate, o.seed) != (0.4, 2)])
    assert found.best is not None
    assert found.double is not None
    assert found.best.lead(found.double) == pytest.approx((0.005, 0.005, 0.005))
    tolerant = found.tolerance()
    assert tolerant is not None
    assert tolerant.high == 0.4
    assert tuple(found.stable[2]) == (0.2, True)
    assert found.stable_rate_censored


def test_a_rate_with_few_seeds_is_not_the_best() -> None:
    outcomes = [*ladder(), cell(1.6, 2, 0.9)]
    assert score(outcomes).best.rate == 0.2  # type: ignore[union-attr]
    assert score(outcomes[:1]).best.rate == 0.1  # type: ignore[union-attr]


def test_any_part_of_a_ladder_can_be_scored() -> None:
    whole = ladder({(0.8, 0): FULL, (0.4, 2): NEVER}) + ladder(optimizer="adam", family="adam", shift=-0.01)
    random.Random(0).shuffle(whole)
    for count in range(len(whole) + 1):
        scores = score_ladder(whole[:count])
        assert sum(found.cells.tried for found in scores) == count
        assert len(rows(scores, "adam")) == len(choose(scores)) == len(scores)
        for found in scores:
            told = conclude(found, scores, "adam")
            assert told.endswith(".")
            assert "nan" not in told
            assert told.count(".") > 0


def test_scores_do_not_depend_on_the_order_of_cells() -> None:
    outcomes = ladder({(0.8, 0): FULL})
    assert rows([score(outcomes)]) == rows([score(outcomes[::-1])])


def test_of_two_cells_in_one_place_the_later_counts() -> None:
    found = score([cell(0.1, 0, 0.5, FULL), cell(0.1, 0, 0.6)])
    assert (found.cells.tried, found.cells.diverged) == (1, 0)


def test_a_task_that_no_cell_learned_does_not_count_against_one() -> None:
    never = {"click": "healthy", "watch": NEVER}
    alone = [replace(o, verdicts=never) for o in ladder()]
    assert score(alone).cells.counts[NEVER] == 0
    rival = ladder(optimizer="adam", family="adam")  # it learns to watch, so the others could have
    assert score_ladder(alone + rival)[0].cells.counts[NEVER] == 12
    elsewhere = ladder(optimizer="adam", family="adam", incident="burst")
    assert score_ladder(alone + elsewhere)[0].cells.counts[NEVER] == 0


def test_rates_are_compared_by_seed() -> None:
    ours = ladder({(0.8, 0): FULL, (0.8, 1): FULL, (0.4, 1): FULL, (0.8, 2): FULL})
    theirs = ladder({(0.4, s): FULL for s in range(3)}, optimizer="adam", family="adam")
    a, b = score_ladder(ours + theirs)
    ratio = stable_ratio(a, b)  # 0.4, 0.2, 0.4 over 0.2, 0.2, 0.2
    known = stats.ttest_1samp([1.0, 0.0, 1.0], 0).confidence_interval(0.95)
    assert (ratio.factor, ratio.low, ratio.high) == pytest.approx((2 ** (2 / 3), 2**known.low, 2**known.high))
    assert (ratio.seeds, ratio.at_least, ratio.at_most) == (3, False, False)
    back = stable_ratio(b, a)
    assert (back.factor, back.low, back.high) == pytest.approx((1 / ratio.factor, 1 / ratio.high, 1 / ratio.low))
    open_end = score(ladder())
    assert stable_ratio(open_end, b).at_least
    assert stable_ratio(b, open_end).at_most
    nothing = stable_ratio(a, score(ladder({(0.2, s): FULL for s in range(3)})))
    assert nothing.seeds == 0
    assert math.isnan(nothing.factor)


def test_qualities_are_compared_by_seed() -> None:
    ours = ladder()
    gaps = (0.004, 0.005, 0.003)
    theirs = [
        replace(o, optimizer="agc", family="agc", test={**o.test, "click": o.test["click"] - gaps[o.seed]})
        for o in ours
        if o.seed < 2 or o.rate != 0.2
    ]
    a, b = score_ladder(ours + theirs)
    gap, seeds = quality_gap(a, b)
    assert seeds == 2
    assert gap.mean == pytest.approx(0.0045)
    known = stats.ttest_1samp([0.004, 0.005], 0).confidence_interval(0.95)
    assert gap[1:] == pytest.approx((known.low, known.high))


def test_the_best_setting_stands_for_its_family() -> None:
    settings = [("clippy-0.1", 0.0), ("clippy-0.5", 0.01), ("clippy-2", -0.01)]
    outcomes = [o for name, shift in settings for o in ladder(optimizer=name, shift=shift)]
    outcomes += ladder(optimizer="adam", family="adam") + ladder(optimizer="clippy-2", model="large")
    chosen = [(s.model, s.optimizer) for s in choose(score_ladder(outcomes))]
    assert chosen == [("small", "clippy-0.5"), ("small", "adam"), ("large", "clippy-2")]


def test_sensitivity_is_a_mean_over_the_seeds_that_have_every_rate() -> None:
    losses = {(0.1, 0): 0.9, (0.2, 0): 0.8, (0.1, 1): 0.7, (0.2, 1): NAN, (0.1, 2): 0.1}
    found = score([cell(rate, seed, 0.6, loss=loss) for (rate, seed), loss in losses.items()])
    assert found.rate_sensitivity.mean == pytest.approx((0.05 + 0.15) / 2)
    assert math.isnan(score(ladder(loss=NAN)).rate_sensitivity.mean)


def test_a_row_is_flat_and_says_none_where_nothing_is_known() -> None:
    base = [replace(o, optimizer="adam", family="adam", seconds=1.0) for o in ladder()]
    ours = ladder({(0.8, 0): FULL}, spikes=0.25, headroom=3.0, episodes=1)
    row, base_row = rows(score_ladder(ours + base), "adam")
    expected = {
        **{"incident": "none", "model": "small", "optimizer": "clippy", "family": "clippy"},
        **{"cells": 12, "seeds": 3, "rates": 4, "measure": "AUC", "best_rate": 0.2, "nrmse": 0.9},
        **{"diverged": 1, "best_diverged": 0, "double_rate": 0.4, "double_diverged": 0, "stable_rate_censored": True},
        **{"spikes_share": 0.25, "headroom": 3.0, "moved": None, "step_s": 0.02, "step_ratio": 2.0},
        "episodes_per_million_rows": 1.0,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row["diverged_share"] == pytest.approx(1 / 12)
    assert row["double_fall"] == pytest.approx(0.005)
    low, high = row["episodes_low_per_million_rows"], row["episodes_high_per_million_rows"]
    assert (low, high) == pytest.approx(tuple(stats.chi2.ppf([0.025, 0.975], [24, 26]) / 24))
    assert base_row["step_ratio"] == 1.0
    (bare,) = rows([score([cell(0.1, 0, NAN, steps=0, rows=0, valid={"click": NAN}, loss=NAN)])])
    known = {"incident", "model", "optimizer", "family", "cells", "seeds", "rates", "measure"}
    known |= {f"diverged{part}_share" for part in ("", "_low", "_high")}
    known |= {"diverged", "never_learned", "micro_diverged", "miscalibrated", "collapsed"}
    assert {name for name, value in bare.items() if value is not None} == known
    assert list(bare) == list(row)
    assert all(value is None or isinstance(value, (str, int, float)) for value in row.values())


def test_a_conclusion_says_what_the_numbers_support() -> None:
    ours = ladder({(0.8, s): FULL for s in range(3)} | {(0.1, 0): NEVER})
    agc = ladder(optimizer="agc", family="agc", shift=-0.0005, seconds=1.0)
    weak = ladder(optimizer="gc", family="gc", shift=-0.1)
    same = [replace(o, optimizer="agc", family="agc", test={**o.test, "click": 0.62}) for o in ours]
    found, rival, poor = score_ladder(ours + agc + weak)
    assert conclude(found) == (
        "Diverged in 3 of 12 runs (95 % interval 5 to 57 %), never learned in 1; best at 0.2 with AUC .6200; "
        "stable up to 0.4; at twice its best rate AUC falls by .005 (.005 to .005)."
    )
    told = conclude(found, [poor, rival, found], base="agc")
    assert told.endswith("; better than agc by .0005 (.0005 to .0005); 2.00 times the time of agc a step.")
    assert "worse than clippy by .0005" in conclude(rival, [poor, found])
    told = conclude(found, [score(same)])
    assert told.endswith("; no difference from agc that 3 seeds can show.")
    assert conclude(found, [score(ladder(incident="burst", family="agc", optimizer="agc"))]) == conclude(found)


def test_a_fall_that_spread_can_explain_is_no_fall_and_divergence_is_told() -> None:
    outcomes = [o for o in ladder() if o.rate != 0.4]
    outcomes += [cell(0.4, s, 0.5 if s == 1 else 0.62 + SPREAD[s], FULL if s == 1 else "healthy") for s in range(3)]
    told = conclude(score(outcomes))
    assert "at twice its best rate no change of AUC that 3 seeds can show, and 1 of 3 runs diverged" in told
    assert "stable up to at least 0.504;" in told


def test_conclusions_of_short_ladders() -> None:
    single = [cell(rate, 0, AUCS[rate]) for rate in RATES]
    assert conclude(score(single)) == (
        "Diverged in none of 4 runs (95 % interval 0 to 60 %); best at 0.2 with AUC .6200 of one seed; "
        "stable up to 0.8, the highest rate tried; at twice its best rate no change of AUC that 1 seed can show."
    )
    told = conclude(score(single[:1]))
    assert told.startswith("Diverged in none of 1 run (95 % interval 0 to 9")
    assert told.endswith("; tried at 0.1 alone, with AUC .6000 of one seed.")
    steep = [cell(rate, seed, auc + SPREAD[seed]) for rate, auc in ((0.1, 0.62), (0.8, 0.55)) for seed in range(3)]
    assert "at 8 times its best rate AUC falls by .070 (.070 to .070)." in conclude(score(steep))
    blank = [cell(0.1, 0, NAN, valid={"click": NAN, "watch": NAN})]
    assert conclude(score(blank)).endswith("; no quality is known yet.")


def test_conclusions_where_nothing_is_stable() -> None:
    dead = score([replace(o, status="diverged") for o in ladder()])
    assert conclude(dead, [score(ladder(family="adam", optimizer="adam"))]) == (
        "Diverged in all of 12 runs (95 % interval 74 to 100 %); no rate that was tried is stable."
    )
    assert dead.unstable_at_best == 3
    assert all(math.isnan(value) for value in dead.stable_rate)
    (row,) = rows([dead])
    assert row["stable_rate"] is None
    assert row["stable_rate_of_all"] is None


def test_a_model_without_a_binary_task_is_told_by_its_nrmse() -> None:
    errors = {0.1: 0.95, 0.2: 0.90, 0.4: 0.92, 0.8: 1.0}
    outcomes = [
        replace(o, kinds={"watch": "regression"}, valid=scores, test=scores)
        for o in ladder()
        if (scores := {"watch": errors[o.rate] + SPREAD[o.seed]})
    ]
    found = score(outcomes)
    assert found.measure == "NRMSE"
    assert found.best is not None
    assert found.best.quality.mean == pytest.approx(0.1)
    assert [found.has_collapsed(rung, 0) for rung in found.rungs] == [False, False, False, True]  # .92 keeps .08 of .10
    assert found.collapsed == 3
    assert found.stable_rate_of_all == 0.4
    told = conclude(found)
    assert "best at 0.2 with NRMSE .9000;" in told
    assert "at twice its best rate NRMSE rises by .020 (.020 to .020)." in told
