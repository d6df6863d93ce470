"""A ladder's outcomes scored: how well each setting learns at its best rate, and how far from it it stays stable.

A rate is chosen on the validation windows and reported on the test windows. Everything works on a ladder that still
runs: a cell that is missing is left out of its rate, and a comparison takes the seeds that both sides have.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal, NamedTuple

from .numbers import NOTHING, Estimate, mean_interval, paired_interval, sensitivity
from .outcomes import Ending, Outcome, find_learnable
from .rungs import Cells as Cells
from .rungs import Rung as Rung

UNSTABLE: tuple[Ending, ...] = ("full_divergence", "never_learned")
SLACK = 0.01
_SAME, _TRACE = 1 - 1e-9, 1e-12  # rates of a ladder are products of roundings; so are differences of qualities


class Stable(NamedTuple):
    """How far up from its best rate a seed stays stable; `rate` is NaN where not even there."""

    rate: float
    censored: bool
    """No unstable cell ended the climb, but the ladder, or a cell that is missing."""


@dataclass(frozen=True)
class Tolerance:
    """The rates about the best one at which the quality stays within `slack` of its own."""

    low: float
    high: float
    low_censored: bool
    """The ladder's lowest rate is among them, so that they may go on below it."""
    high_censored: bool

    @property
    def factor(self) -> float:
        """Return high / low: by which factor the rate may be missed; 1 where only the best rate will do."""
        return self.high / self.low

    @property
    def censored(self) -> bool:
        """Return whether the factor is a lower bound."""
        return self.low_censored or self.high_censored


@dataclass(frozen=True)
class Ratio:
    """The largest stable rate of one setting over that of another: the geometric mean over `seeds`, paired by seed."""

    factor: float
    low: float
    high: float
    seeds: int
    at_least: bool
    """A ladder ended before ours was unstable; with `at_most` too, the ladder says nothing."""
    at_most: bool


@dataclass(frozen=True)
class Score:
    """One setting of an optimizer on one model and stream, over a ladder of rates.

    What depends on a best rate is None or NaN where no cell has a quality yet.
    """

    incident: str
    model: str
    optimizer: str
    family: str
    cells: Cells
    rungs: tuple[Rung, ...]
    """By rate, upwards."""

    @property
    def measure(self) -> Literal["AUC", "NRMSE"]:
        """Return what `quality` is made of: the AUC, or without a binary task 1 - NRMSE."""
        return "AUC" if any("binary" in o.kinds.values() for o in self.cells.outcomes) else "NRMSE"

    @cached_property
    def best(self) -> Rung | None:
        """Return the rate of the highest mean validation quality, the lower one of two alike.

        A rate with fewer than half the cells of the fullest is not chosen: it would win by a lucky seed.
        """
        fullest = max((rung.tried for rung in self.rungs), default=0)
        known = [rung for rung in self.rungs if not math.isnan(rung.valid) and 2 * rung.tried >= fullest]
        return max(known, key=lambda rung: rung.valid, default=None)

    @property
    def double(self) -> Rung | None:
        """Return the first rate at least twice the best one; None where the ladder ends before."""
        above = [rung for rung in self.rungs if self.best and rung.rate >= 2 * self.best.rate * _SAME]
        return above[0] if above else None

    @cached_property
    def stable(self) -> Mapping[int, Stable]:
        """Return, for each seed that has the best rate, the largest rate up to which it is stable from there.

        Unstable is to diverge for good, never to have learned, or to have collapsed (`has_collapsed`). The true
        bound lies up to one rung above the rate.
        """
        return {seed: self._climb(self.best, seed) for seed in self.best.ending} if self.best else {}

    def has_collapsed(self, rung: Rung, seed: int) -> bool:
        """Say whether a cell above the best rate keeps less than half of what its seed gains there over a constant.

        Its losses are no worse than a constant's, so that it has not diverged; but little of what it knew is left.
        A seed that gains nothing at the best rate has nothing to lose.
        """
        if self.best is None or rung.rate <= self.best.rate or not {seed} <= rung.test.keys() & self.best.test.keys():
            return False
        constant = 0.5 if self.measure == "AUC" else 0.0
        gain = self.best.test[seed] - constant
        return gain > 0 and 2 * (rung.test[seed] - constant) < gain

    @cached_property
    def collapsed(self) -> int:
        """Return how many cells have collapsed that neither diverged nor never learned."""
        return sum(
            self.has_collapsed(rung, seed)
            for rung in self.rungs
            for seed, ending in rung.ending.items()
            if ending not in UNSTABLE
        )

    def _climb(self, best: Rung, seed: int) -> Stable:
        rate = math.nan
        for rung in self.rungs[self.rungs.index(best) :]:
            if seed not in rung.ending:
                return Stable(rate, True)
            if rung.ending[seed] in UNSTABLE or self.has_collapsed(rung, seed):
                return Stable(rate, False)
            rate = rung.rate
        return Stable(rate, True)

    @cached_property
    def stable_rate(self) -> Estimate:
        """Return the geometric mean of `stable` over seeds, with Student's interval of the logarithm.

        Seeds that are unstable even at the best rate have no such rate: they are left out here, which flatters the
        mean, and are counted by `unstable_at_best`. The interval is of the spread over seeds: it knows neither of the
        ladder's coarseness nor of its end.
        """
        logs = mean_interval(math.log(found.rate) for found in self.stable.values())
        return Estimate(*map(math.exp, logs))

    @property
    def stable_rate_censored(self) -> bool:
        """Return whether the ladder, or a missing cell, ended any seed's climb: `stable_rate` is then a lower bound."""
        return any(found.censored for found in self.stable.values())

    @property
    def unstable_at_best(self) -> int:
        """Return how many seeds are unstable even at the best rate."""
        return sum(math.isnan(found.rate) for found in self.stable.values())

    @property
    def stable_rate_of_all(self) -> float:
        """Return the largest rate up to which, from the best one, no seed was unstable; NaN where there is none."""
        rates = [found.rate for found in self.stable.values()]
        return min(rates) if rates and not self.unstable_at_best else math.nan

    def tolerance(self, slack: float = SLACK) -> Tolerance | None:
        """Return the range of rates about the best one with a mean test quality of at least the best one's - slack.

        A rate is compared over the seeds that it shares with the best one; where there are none yet, the range ends as
        at the ladder's end.
        """
        if self.best is None or not self.best.test:
            return None
        low, low_censored = self._reach(self.best, -1, slack)
        high, high_censored = self._reach(self.best, 1, slack)
        return Tolerance(low, high, low_censored, high_censored)

    def _reach(self, best: Rung, step: int, slack: float) -> tuple[float, bool]:
        """Return the last rate that way within the slack of the best, and whether no worse one ended the way."""
        index = self.rungs.index(best)
        while 0 <= index + step < len(self.rungs):
            loss = best.lead(self.rungs[index + step]).mean
            if not loss <= slack + _TRACE:
                return self.rungs[index].rate, math.isnan(loss)
            index += step
        return self.rungs[index].rate, True

    @cached_property
    def rate_sensitivity(self) -> Estimate:
        """Return the learning-rate sensitivity of each seed, averaged; seeds that lack a rate are left out."""
        losses = defaultdict(list)
        for outcome in self.cells.outcomes:
            losses[outcome.seed].append(outcome.loss)
        whole = [of for of in losses.values() if len(of) == len(self.rungs) and not all(map(math.isnan, of))]
        return mean_interval(map(sensitivity, whole))


def score_ladder(outcomes: Iterable[Outcome]) -> list[Score]:
    """Return a score for each incident, model and optimizer, in the order in which they come.

    Args:
        outcomes: In any order, some perhaps missing. Of two with the same place on the ladder the later one counts.

    >>> cell = {"optimizer": "adam", "family": "adam", "model": "small", "incident": "none", "status": "finished"}
    >>> click = {"kinds": {"click": "binary"}, "verdicts": {"click": "healthy"}}
    >>> cell |= {"steps": 10, "rows": 100, "seconds": 1.0, "cell": "c"} | click
    >>> aucs = {0.1: 0.61, 0.2: 0.62, 0.4: 0.5}
    >>> ladder = [Outcome(rate=r, seed=0, valid={"click": a}, test={"click": a}, **cell) for r, a in aucs.items()]
    >>> score, = score_ladder(ladder)
    >>> score.best.rate, score.best.quality.mean, score.double.rate, score.tolerance().factor
    (0.2, 0.62, 0.4, 2.0)
    """
    data: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        data[outcome.incident, outcome.model].append(outcome)
    scores: list[Score] = []
    for (incident, model), of in data.items():
        learnable = tuple(find_learnable(of))
        settings: dict[str, dict[tuple[float, int], Outcome]] = defaultdict(dict)
        for outcome in of:
            settings[outcome.optimizer][outcome.rate, outcome.seed] = outcome
        for optimizer, places in settings.items():
            ladder = [places[place] for place in sorted(places)]
            rungs = [Rung(tuple(of_rate), learnable) for _, of_rate in groupby(ladder, key=lambda o: o.rate)]
            cells = Cells(tuple(ladder), learnable)
            scores.append(Score(incident, model, optimizer, ladder[0].family, cells, tuple(rungs)))
    return scores


def choose(scores: Iterable[Score]) -> list[Score]:
    """Return, for each incident, model and family, the setting with the best validation quality at its best rate."""
    chosen: dict[tuple[str, str, str], Score] = {}
    for score in scores:
        key = score.incident, score.model, score.family
        if key not in chosen or _valid(score) > _valid(chosen[key]):
            chosen[key] = score
    return list(chosen.values())


def stable_ratio(ours: Score, theirs: Score) -> Ratio:
    """Return our largest stable rate over theirs, `2 ** mean_s(log2 a_s - log2 b_s)`, with Student's interval.

    Over the seeds s for which both have one. Between optimizers whose updates differ in size (Adam's and Adagrad's) the
    factor says little: compare settings of one base.
    """
    seeds = [s for s in ours.stable if s in theirs.stable]
    seeds = [s for s in seeds if not math.isnan(ours.stable[s].rate) and not math.isnan(theirs.stable[s].rate)]
    a, b = ([score.stable[s] for s in seeds] for score in (ours, theirs))
    apart = paired_interval([math.log2(one.rate) for one in a], [math.log2(one.rate) for one in b])
    factor, low, high = (2.0**value for value in apart)
    return Ratio(factor, low, high, len(seeds), any(one.censored for one in a), any(one.censored for one in b))


def quality_gap(ours: Score, theirs: Score) -> tuple[Estimate, int]:
    """Return our test quality minus theirs, each at its own best rate and paired by seed, and the count of seeds."""
    if ours.best is None or theirs.best is None:
        return NOTHING, 0
    return ours.best.lead(theirs.best), len(ours.best.test.keys() & theirs.best.test.keys())


def conclude(score: Score, rivals: Iterable[Score] = (), base: str = "") -> str:
    """Say in a sentence what the numbers support about a setting.

    Args:
        score: The setting.
        rivals: It is compared with the best of them (by validation) on the same incident and model of another family.
        base: The optimizer among them with whose time a step its own is compared.
    """
    others = [r for r in rivals if (r.incident, r.model) == (score.incident, score.model)]
    parts = [_tell_endings(score.cells)]
    best = score.best
    if best is None or not best.test:
        return "; ".join([*parts, "no quality is known yet"]) + "."
    if all(ending in UNSTABLE for ending in score.cells.endings):
        return "; ".join([*parts, "no rate that was tried is stable"]) + "."
    parts += [_tell_best(score, best), _tell_stable(score), _tell_double(score, best)]
    families = [r for r in others if r.family != score.family and r.best]
    parts.append(_tell_rival(score, max(families, key=_valid)) if families else "")
    parts += [_tell_time(score, r) for r in others if r.optimizer == base != score.optimizer]
    return "; ".join(part for part in parts if part) + "."


def rows(scores: Iterable[Score], base: str = "") -> list[dict[str, object]]:
    """Return a flat row for each score; None is what is not known.

    Args:
        scores: Of `score_ladder`, or a choice of them.
        base: The optimizer among them whose time a step is 1 in `step_ratio`, on the same incident and model.
    """
    listed = list(scores)
    bases = {(s.incident, s.model): s.cells.step_seconds for s in listed if s.optimizer == base}
    return [_row(score, bases.get((score.incident, score.model), math.nan)) for score in listed]


def _row(score: Score, base_seconds: float) -> dict[str, object]:
    cells, best, double, tolerance = score.cells, score.best, score.double, score.tolerance()
    row: dict[str, object] = {
        "incident": score.incident,
        "model": score.model,
        "optimizer": score.optimizer,
        "family": score.family,
        "cells": cells.tried,
        "seeds": len({o.seed for o in cells.outcomes}),
        "rates": len(score.rungs),
        "measure": score.measure,
        "best_rate": best and best.rate,
        **_columns("quality", best.quality if best else NOTHING),
        "quality_sd": best and best.quality_sd,
        "nrmse": best and best.mean(lambda o: o.nrmse("test")),
        **_count_columns("", cells),
        "collapsed": score.collapsed,
        **_count_columns("best_", best),
        "double_rate": double and double.rate,
        "double_quality": double and double.quality.mean,
        **_columns("double_fall", best.lead(double) if best and double else NOTHING),
        **_count_columns("double_", double),
        **_columns("stable_rate", score.stable_rate),
        "stable_rate_censored": score.stable_rate_censored if score.stable else None,
        "stable_rate_of_all": score.stable_rate_of_all,
        "unstable_at_best": score.unstable_at_best if score.stable else None,
        "tolerance_factor": tolerance and tolerance.factor,
        "tolerance_low_rate": tolerance and tolerance.low,
        "tolerance_high_rate": tolerance and tolerance.high,
        "tolerance_low_censored": tolerance and tolerance.low_censored,
        "tolerance_high_censored": tolerance and tolerance.high_censored,
        **_columns("rate_sensitivity", score.rate_sensitivity),
        "spikes_share": cells.mean(lambda o: o.spikes),
        "headroom": best and best.median(lambda o: o.headroom),
        "moved": best and best.median(lambda o: o.moved),
        **_columns("episodes", cells.episodes, "_per_million_rows"),
        "step_s": cells.step_seconds,
        "step_ratio": cells.step_seconds / base_seconds if base_seconds else math.nan,
    }
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}


def _columns(name: str, estimate: Estimate, unit: str = "") -> dict[str, float]:
    return {f"{name}{part}{unit}": value for part, value in zip(("", "_low", "_high"), estimate, strict=True)}


def _count_columns(prefix: str, cells: Cells | None) -> dict[str, object]:
    endings = {"diverged": "full_divergence", "never_learned": "never_learned", "micro_diverged": "micro_divergence"}
    endings |= {"miscalibrated": "miscalibrated"}
    counts = {prefix + name: cells and cells.endings.count(ending) for name, ending in endings.items()}
    share = Estimate(cells.diverged / cells.tried, *cells.diverged_interval) if cells else NOTHING
    return {**counts, **_columns(f"{prefix}diverged", share, "_share")}


def _tell_endings(cells: Cells) -> str:
    low, high = (100 * bound for bound in cells.diverged_interval)
    hits = {0: "none", cells.tried: "all"}.get(cells.diverged, str(cells.diverged))
    told = f"Diverged in {hits} of {_count(cells.tried, 'run')} (95 % interval {low:.0f} to {high:.0f} %)"
    never = cells.counts["never_learned"]
    return told + (f", never learned in {never}" if never else "")


def _tell_best(score: Score, best: Rung) -> str:
    where = f"best at {best.rate:.3g}" if len(score.rungs) > 1 else f"tried at {best.rate:.3g} alone,"
    value = best.quality.mean if score.measure == "AUC" else 1 - best.quality.mean
    told = f"{where} with {score.measure} {_short(value, 4)}" + (" of one seed" if len(best.test) == 1 else "")
    bad = score.unstable_at_best
    return told + (
        f", where {bad} of {_count(best.tried, 'seed')} {'was' if bad == 1 else 'were'} unstable" if bad else ""
    )


def _tell_stable(score: Score) -> str:
    rate, low, high = score.stable_rate
    if math.isnan(rate) or len(score.rungs) == 1:
        return ""
    if score.stable_rate_of_all == score.rungs[-1].rate:
        return f"stable up to {rate:.3g}, the highest rate tried"
    if score.stable_rate_censored:  # an interval of values that were cut off would be too narrow, and too low
        return f"stable up to at least {rate:.3g}"
    bounds = f" ({low:.3g} to {high:.3g})" if low < high else ""
    return f"stable up to {rate:.3g}{bounds}"


def _tell_double(score: Score, best: Rung) -> str:
    double = score.double
    if double is None:
        return ""
    fall, seeds = best.lead(double), len(best.test.keys() & double.test.keys())
    times = double.rate / best.rate
    where = f"at {'twice' if times < 2.05 else f'{times:.2g} times'} its best rate"
    bad = f", and {double.diverged} of {_count(double.tried, 'run')} diverged" if double.diverged else ""
    if not fall.excludes(0):
        return f"{where} no change of {score.measure} that {_count(seeds, 'seed')} can show{bad}" if seeds else ""
    verb = "falls" if (fall.mean > 0) == (score.measure == "AUC") else "rises"
    return f"{where} {score.measure} {verb} by {_tell_size(fall)}{bad}"


def _tell_rival(score: Score, rival: Score) -> str:
    gap, seeds = quality_gap(score, rival)
    if not gap.excludes(0):
        return f"no difference from {rival.optimizer} that {_count(seeds, 'seed')} can show" if seeds else ""
    return f"{'better' if gap.mean > 0 else 'worse'} than {rival.optimizer} by {_tell_size(gap)}"


def _tell_time(score: Score, base: Score) -> str:
    ours, theirs = score.cells.step_seconds, base.cells.step_seconds
    return f"{ours / theirs:.2f} times the time of {base.optimizer} a step" if ours > 0 and theirs > 0 else ""


def _tell_size(estimate: Estimate) -> str:
    """Write a difference and its interval, which lie on one side of 0, without their sign: ".004 (.001 to .007)"."""
    size, *bounds = (abs(value) for value in estimate)
    digits = min(max(3, math.ceil(-math.log10(min(bounds)))), 6)
    low, high = sorted(bounds)
    return f"{_short(size, digits)} ({_short(low, digits)} to {_short(high, digits)})"


def _short(value: float, digits: int) -> str:
    """Write a share as tables of AUC do, without the 0 before the point."""
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _valid(score: Score) -> float:
    return score.best.valid if score.best else -math.inf
