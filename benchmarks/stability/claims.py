"""What the numbers support, in sentences and verdicts that are made from them."""

import math
from collections.abc import Iterable, Sequence
from statistics import geometric_mean
from typing import NamedTuple

from results import BASES, LOGS, PAPER, SIZES, Result, Study, best_of, method

from steadyrank.ladder.numbers import Estimate, mean_interval
from steadyrank.ladder.scores import SLACK, Ratio, Score, Tolerance, quality_gap, stable_ratio
from steadyrank.ladder.tables import plain, short, signed

AIM_BASE, AIM_RIVAL, AIM_MODEL = 8.0, 4.0, "large_dcn"
NOT_KNOWN = "not known"


class Duel(NamedTuple):
    """A form of Clippy against its plain base and against two of the rivals on that base, on one model."""

    model: str
    base: Score
    ours: Score
    learns: Score | None
    """The rival of the best validation quality."""
    lasts: Score | None
    """The rival with the largest stable rate."""


def duels(study: Study) -> list[Duel]:
    """Return all of them, the largest model first; those whose ladder has not been run are left out."""
    found = []
    for model, base, name in ((m, b, n) for m in SIZES for b in BASES for n in b.ours):
        ours, plain_one = study.of_model(model, name), study.of_model(model, base.name)
        if ours is None or plain_one is None or ours.best is None:
            continue
        rivals = [score for rival in base.rivals if (score := study.of_model(model, rival))]
        found.append(Duel(model, plain_one, ours, best_of(rivals), _lasting(rivals)))
    return found


def _lasting(rivals: Sequence[Score]) -> Score | None:
    known = [score for score in rivals if not math.isnan(score.stable_rate.mean)]
    return max(known, key=lambda score: score.stable_rate.mean, default=None)


def judge(ratio: Ratio, aim: float) -> str:
    """Say whether a ratio of stable rates reaches an aim: with its whole interval, or else not, or it is not shown.

    >>> judge(Ratio(16.0, 12.0, 21.0, 5, at_least=True, at_most=False), 8.0)
    'reached'
    >>> judge(Ratio(4.0, 3.0, 5.0, 5, at_least=True, at_most=False), 8.0)
    'not shown: the ladder ended'
    """
    if math.isnan(ratio.factor):
        return NOT_KNOWN
    if ratio.low >= aim and not ratio.at_most:
        return "reached"
    if ratio.high < aim and not ratio.at_least:
        return "not reached"
    return "not shown: the ladder ended" if ratio.at_least or ratio.at_most else "not shown"


def between_rungs(ours: Score, theirs: Score) -> tuple[float, float]:
    """Return the least and the largest ratio that the ladders' gaps allow, the geometric means over seeds.

    A stable rate is the last rung before an unstable one: the true bound lies anywhere up to the next rung.
    """
    pairs = [(ours.stable[s].rate, theirs.stable[s].rate) for s in ours.stable.keys() & theirs.stable.keys()]
    known = [(a, b) for a, b in pairs if not math.isnan(a) and not math.isnan(b)]
    least, most = [a / _next(theirs, b) for a, b in known], [_next(ours, a) / b for a, b in known]
    if not known:
        return math.nan, math.nan
    return geometric_mean(least) if all(least) else 0.0, geometric_mean(most)


def _next(score: Score, rate: float) -> float:
    above = [rung.rate for rung in score.rungs if rung.rate > rate * (1 + 1e-9)]
    return above[0] if above else math.inf


def tell_ratio(ratio: Ratio) -> str:
    """Write a ratio of stable rates with its interval.

    >>> tell_ratio(Ratio(16.0, 12.0, 21.3, 5, at_least=True, at_most=False))
    '≥16× (12 to 21.3)'
    """
    if math.isnan(ratio.factor):
        return "–"
    if ratio.at_least and ratio.at_most:
        return "? (both ladders end)"
    sign = "≥" if ratio.at_least else "≤" if ratio.at_most else ""
    bounds = f" ({factor(ratio.low)} to {factor(ratio.high)})" if ratio.low < ratio.high else ""
    return f"{sign}{factor(ratio.factor)}×{bounds}"


def factor(value: float) -> str:
    """Write a factor to three digits, one above 100 as a whole number.

    >>> factor(1234.5), factor(3.14159)
    ('1,234', '3.14')
    """
    return f"{value:,.0f}" if value >= 100 else plain(value)


def tell_room(score: Score | None) -> str:
    """Write how many times its best rate a method stays stable, the geometric mean over seeds."""
    if score is None or score.best is None or math.isnan(score.stable_rate.mean):
        return "–"
    bad = f", {score.unstable_at_best} of {len(score.stable)} unstable at 1×" if score.unstable_at_best else ""
    return f"{'≥' * score.stable_rate_censored}{factor(score.stable_rate.mean / score.best.rate)}×{bad}"


def tell_range(score: Score | None) -> str:
    """Write the rates within the slack of the best one, and by which factor the rate may be missed."""
    found = score.tolerance() if score else None
    if found is None:
        return "–"
    low, high = ("≤" * found.low_censored) + plain(found.low), ("≥" * found.high_censored) + plain(found.high)
    return f"{low} to {high} ({'≥' * found.censored}{factor(found.factor)}×)"


def tell_gap(gap: Estimate, seeds: int, rival: str) -> str:
    """Say what a paired difference in quality shows.

    >>> tell_gap(Estimate(0.004, 0.003, 0.005), 5, "AGC"), tell_gap(Estimate(0.004, -0.003, 0.011), 5, "AGC")
    ('better than AGC by .0040 (.0030 to .0050)', '+.0040±.0070 against AGC, no difference that 5 seeds can show')
    """
    if math.isnan(gap.low):
        return f"no interval yet against {rival}"
    if not gap.excludes(0):
        return f"{signed(gap)} against {rival}, no difference that {seeds} seeds can show"
    low, high = sorted(abs(bound) for bound in (gap.low, gap.high))
    word = "better" if gap.mean > 0 else "worse"
    return f"{word} than {rival} by {short(abs(gap.mean))} ({short(low)} to {short(high)})"


def aims(study: Study) -> list[str]:
    """Say for each form of Clippy whether it reaches the aims, which are set for one model."""
    found = []
    for duel in duels(study):
        if duel.model != AIM_MODEL:
            continue
        over_base = stable_ratio(duel.ours, duel.base)
        parts = [_tell_aim(over_base, method(duel.base.optimizer), AIM_BASE, _left_out(duel.base))]
        for rival, what in ((duel.learns, "the rival that learns best"), (duel.lasts, "the rival that lasts longest")):
            if rival is not None and (what.endswith("best") or rival is not duel.learns):
                ratio = stable_ratio(duel.ours, rival)
                parts.append(_tell_aim(ratio, f"{method(rival.optimizer)}, {what}", AIM_RIVAL, _left_out(rival)))
        beside = {s.optimizer: s for s in (duel.ours, duel.base, duel.learns, duel.lasts) if s is not None}
        listed = ", ".join(f"{method(name)} {tell_room(score)}" for name, score in beside.items())
        parts.append(f"in multiples of each one's own best rate: {listed}")
        found.append(f"**{method(duel.ours.optimizer)}:** {'; '.join(parts)}.")
    return found


def _tell_aim(ratio: Ratio, over: str, aim: float, note: str) -> str:
    return f"{tell_ratio(ratio)} the rate of {over}{note}: {aim:g}× is {judge(ratio, aim)}"


def _left_out(score: Score) -> str:
    bad = score.unstable_at_best
    return f" (unstable even at its best rate in {bad} of {len(score.stable)} seeds, which are left out)" if bad else ""


def qualities(study: Study) -> list[str]:
    """Say of each model how Clippy's quality at its best rate stands to its base, its rivals and the best of all."""
    found = []
    for duel in duels(study):
        result = study.get(PAPER[duel.model])
        others = [s for s in result.scores if s.optimizer != duel.ours.optimizer] if result else []
        best = best_of(others)
        parts = []
        for rival in dict.fromkeys((duel.base.optimizer, duel.learns and duel.learns.optimizer)):
            score = study.of_model(duel.model, rival) if rival else None
            if score is not None:
                parts.append(tell_gap(*quality_gap(duel.ours, score), method(score.optimizer)))
        if best is not None and best not in (duel.base, duel.learns):
            parts.append(tell_gap(*quality_gap(duel.ours, best), f"the best other of all ({method(best.optimizer)})"))
        found.append(f"**{SIZES[duel.model]}, {method(duel.ours.optimizer)}:** {'; '.join(parts)}.")
    return found


def places(study: Study) -> list[tuple[str, Result, str]]:
    """Return where Adam was tried with and without Clippy: what it is called, the ladder, and its model."""
    found = [(title, PAPER[model], model) for model, title in SIZES.items()]
    found += [(title, "bound", model) for model, title in BOUND.items()]
    found += [(title, log, "") for log, title in LOGS.items()]
    known = ((title, study.get(name), model) for title, name, model in found)
    return [(title, result, model) for title, result, model in known if result and model in result.models()]


BOUND = {
    "batch_64": "Large+DCN, batch 64",
    "batch_512": "Large+DCN, batch 512",
    "long": "Large+DCN, four times as long",
}


def common_range(scores: Iterable[Score]) -> Tolerance | None:
    """Return the rates that lie within the slack of the best one on every ladder; None where there are none."""
    found = [tolerance for score in scores if (tolerance := score.tolerance())]
    if not found:
        return None
    low, high = max(found, key=lambda t: t.low), min(found, key=lambda t: t.high)
    if low.low > high.high:
        return None
    return Tolerance(low.low, high.high, low.low_censored, high.high_censored)


def tell_one_rate(study: Study, optimizer: str) -> str:
    """Say whether one rate of an optimizer does everywhere."""
    scores = [score for _, result, model in places(study) if (score := result.find(optimizer, model)) and score.best]
    where = f"all {len(scores)} places (models, streams, logs) where it was tried"
    shared, slack = common_range(scores), short(SLACK, 2)
    if shared is None:
        return f"{method(optimizer)}: no one rate is within {slack} of its best one in {where}."
    found = f"any rate from {plain(shared.low)} to {plain(shared.high)}" if shared.factor > 1 else plain(shared.low)
    return f"{method(optimizer)}: {found} is within {slack} of its best one in {where}."


def across_rates(ours: Score, theirs: Score) -> tuple[Estimate, list[float]]:
    """Return our quality minus theirs, averaged over the rates that both have, paired by seed; and those rates."""
    pairs = [(a, b) for a in ours.rungs for b in theirs.rungs if math.isclose(a.rate, b.rate)]
    seeds = [s for s in ours.rungs[0].ending if all({s} <= a.test.keys() & b.test.keys() for a, b in pairs)]
    leads = [sum(a.test[s] - b.test[s] for a, b in pairs) / len(pairs) for s in seeds if pairs]
    return mean_interval(leads), [a.rate for a, _ in pairs]


class Candidate(NamedTuple):
    """A method over all of the paper's models."""

    name: str
    worst: float
    """Its quality minus that of the best method of a model, where it is furthest behind."""
    factor: float
    """By which factor its rate may be missed, where it is least."""


def candidates(study: Study) -> list[Candidate]:
    """Return every method that has results on all of the paper's models that were run."""
    results = [result for name in PAPER.values() if (result := study.get(name))]
    found = []
    for name in results[0].scores if results else []:
        scores = [score for result in results if (score := result.find(name.optimizer)) and score.tolerance()]
        if len(scores) < len(results):
            continue
        gaps = [_behind(score, best_of(result.scores)) for score, result in zip(scores, results, strict=True)]
        ranges = [tolerance for score in scores if (tolerance := score.tolerance())]
        found.append(Candidate(name.optimizer, min(gaps), min(tolerance.factor for tolerance in ranges)))
    return found


def _behind(score: Score, best: Score | None) -> float:
    return 0.0 if best is None or score is best else quality_gap(score, best)[0].mean


def choose_default(study: Study) -> Candidate | None:
    """Return the method whose rate may be missed furthest, of those never more than the slack behind the best one."""
    found = candidates(study)
    close = [each for each in found if each.worst >= -SLACK]
    if close:
        return max(close, key=lambda each: each.factor)
    return max(found, key=lambda each: each.worst, default=None)


def recommend(study: Study) -> list[str]:
    """Say which optimizer, thresholds, rate and warm-up the numbers speak for, and which numbers."""
    chosen = choose_default(study)
    if chosen is None:
        return []
    *most, last = [SIZES[model] for model, name in PAPER.items() if study.get(name)]
    models = f"{', '.join(most)} and {last}" if most else last
    slack = short(SLACK, 2)
    worst = f"nowhere more than {short(-chosen.worst)} AUC behind the method that validation prefers"
    if chosen.worst >= 0:
        worst = "nowhere behind the method that validation prefers"
    elif chosen.worst < -SLACK:
        worst = (
            f"no method is within {slack} of the best one on all; this one is {short(-chosen.worst)} behind at worst"
        )
    more = {"Rate": tell_one_rate(study, chosen.name)}
    more |= {"Thresholds": tell_thresholds(study), "Warm-up": tell_warm_up(study)}
    return [
        f"**Optimizer:** {method(chosen.name)}. Of the methods within {slack} AUC of the best one at their best rates, "
        f"it is the one whose rate may be missed furthest: on {models} it is {worst}, and the rates within {slack} of "
        f"its own best span a factor of at least {factor(chosen.factor)}.",
        *(f"**{what}:** {words}" for what, words in more.items() if words),
    ]


def tell_thresholds(study: Study) -> str:
    """Say what other thresholds than the default ones do on Adam; empty where it was not run."""
    tried, usual = study.get("thresholds"), study.of_model(AIM_MODEL, "clippy_adam")
    if tried is None or usual is None:
        return ""
    told = [(score.optimizer, across_rates(score, usual)) for score in tried.scores]
    rates = ", ".join(map(plain, told[0][1][1]))
    listed = ", ".join(f"{name} {signed(gap)}" for name, (gap, _) in told)
    better = [name for name, (gap, _) in told if gap.low > 0]
    shown = f"{' and '.join(better)} shown to be better" if better else "none is shown to be better"
    return f"0.1 and 0.001. Others beside them, mean AUC over the rates {rates}: {listed}; {shown}."


def tell_warm_up(study: Study) -> str:
    """Say what a warm-up does for plain Adam; empty where it was not run."""
    both = study.joined(PAPER[AIM_MODEL], "modern")
    adam = both.find("adam", AIM_MODEL) if both else None
    if both is None or adam is None:
        return ""
    told = []
    for steps in (50, 200):
        score = both.find(f"adam_warmup_{steps}", AIM_MODEL)
        if score is not None:
            gap, rates = across_rates(score, adam)
            words = tell_gap(gap, len(score.rungs[0].test), "none")
            told.append(f"{steps} steps of it on plain Adam at {' and '.join(map(plain, rates))}: {words}")
    return f"none was used with Clippy. {'; '.join(told)}."
