"""The tables of docs/stability.md, each from the scores of a ladder."""

import math
from collections.abc import Callable, Iterable, Sequence

from claims import (
    AIM_BASE,
    AIM_MODEL,
    AIM_RIVAL,
    across_rates,
    between_rungs,
    duels,
    factor,
    judge,
    places,
    tell_range,
    tell_ratio,
)
from results import METHODS, PAPER, SIZES, Result, Study, best_of, count_unstable, method, rung_at

from steadyrank.ladder.scores import UNSTABLE, Rung, Score, choose, quality_gap, stable_ratio
from steadyrank.ladder.tables import COLUMNS, compare_scores, level, plain, short, signed

NONE = "–"
SHOWN = (
    *("best rate", "quality at best", "NRMSE at best", "quality at 2x", "diverged", "never learned", "stable up to"),
    *("within .01 of best", "vs best rival", "effective rate", "cost"),
)


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the first column is to the left, the others to the right.

    >>> print(markdown(["a", "b"], [["x", "1"]]))
    | a | b |
    |---|--:|
    | x | 1 |
    """
    lines = [[*titles], ["---", *["--:"] * (len(titles) - 1)], *rows]
    told = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    return "\n".join([told[0], told[1].replace(" ", ""), *told[2:]])


def scores_table(scores: Sequence[Score], titles: Sequence[str] = SHOWN) -> str:
    """Return the laboratory's own table of scores on one model and incident."""
    columns = [column for title in titles for column in COLUMNS if column.heading == title]
    rows = [
        [method(line.score.optimizer), *(column.tell_widely(line) for column in columns)]
        for line in compare_scores(scores)
    ]
    return markdown(["", *(column.heading for column in columns)], rows)


def quality(score: Score, rung: Rung | None) -> str:
    """Return mean quality ± its standard deviation over seeds."""
    if rung is None:
        return NONE
    told = short(level(score, rung))
    return told if len(rung.test) < 2 else f"{told} ± {short(rung.quality_sd)}"


def endings(score: Score, rung: Rung | None) -> str:
    """Return how many cells are unstable, and how, as "diverged / never learned / collapsed of all"."""
    if rung is None:
        return NONE
    return f"{' / '.join(map(str, count_unstable(score, rung)))} of {rung.tried}"


def stable_table(study: Study) -> str:
    """Return the ratios of the largest stable rates."""
    titles = [
        *("model, method", "stable up to", "AUC there", "over its base", "the rungs allow"),
        *("over the rival that learns best", "over the rival that lasts longest", "8× its base", "4× its rivals"),
    ]
    rows = []
    for duel in duels(study):
        over_base = stable_ratio(duel.ours, duel.base)
        low, high = between_rungs(duel.ours, duel.base)
        allowed = f"{factor(low)} to {factor(high)}×" if math.isfinite(high) else f"≥{factor(low)}×" if low else NONE
        last = rung_at(duel.ours, duel.ours.stable_rate_of_all)
        row = [f"{SIZES[duel.model]}, {method(duel.ours.optimizer)}", stable(duel.ours), quality(duel.ours, last)]
        row += [f"{tell_ratio(over_base)} {method(duel.base.optimizer)}", allowed]
        verdicts = []
        for rival in (duel.learns, duel.lasts):
            ratio = stable_ratio(duel.ours, rival) if rival else None
            row.append(f"{tell_ratio(ratio)} {method(rival.optimizer)}" if rival and ratio else NONE)
            verdicts += [judge(ratio, AIM_RIVAL)] if ratio else []
        verdicts = [judge(over_base, AIM_BASE), "; ".join(dict.fromkeys(verdicts))]
        rows.append([*row, *(verdicts if duel.model == AIM_MODEL else ["", ""])])
    return markdown(titles, rows)


def stable(score: Score) -> str:
    """Return the largest stable rate, with ≥ where the ladder ended first."""
    return ("≥" if score.stable_rate_censored else "") + plain(score.stable_rate.mean)


def methods_table(study: Study, tell: Callable[[Score | None], str]) -> str:
    """Return something of every method on each of the paper's models."""
    models = [model for model, name in PAPER.items() if study.get(name)]
    rows = [
        [method(name), *(tell(study.of_model(model, name)) for model in models)]
        for name in METHODS
        if any(study.of_model(model, name) for model in models)
    ]
    return markdown(["", *(SIZES[model] for model in models)], rows)


def one_rate_table(study: Study) -> str:
    """Return the same for Adam, with and without clipping, wherever it was tried."""
    names = ("adam", "agc_adam", "clippy_adam")
    rows = [
        [title, *(tell_range(result.find(name, model)) for name in names)] for title, result, model in places(study)
    ]
    return markdown(["", *map(method, names)], rows)


def tuning_table(result: Result) -> str:
    """Return what was tried for each family, the chosen setting in bold."""
    chosen = choose(result.scores)
    rows = []
    for score in result.scores:
        name = f"{SIZES.get(score.model, score.model)}, {score.optimizer.replace('_', ' ')}"
        best = score.best
        row = [name, ", ".join(plain(rung.rate) for rung in score.rungs), plain(best.rate) if best else NONE]
        row.append(short(best.valid) if best else NONE)
        rows.append([f"**{cell}**" for cell in row] if any(score is one for one in chosen) else row)
    return markdown(["model, setting", "rates tried", "best rate", "validation AUC"], rows)


def by_rate_table(scores: Sequence[Score]) -> str:
    """Return quality and unstable runs of settings at each rate."""
    rates = sorted({rung.rate for score in scores for rung in score.rungs})
    rows = []
    for score in scores:
        by_rate = {rung.rate: rung for rung in score.rungs}
        rows.append([method(score.optimizer), *(_at(score, by_rate.get(rate)) for rate in rates)])
    return markdown(["", *map(plain, rates)], rows)


def _at(score: Score, rung: Rung | None) -> str:
    if rung is None:
        return ""
    bad = sum(count_unstable(score, rung))
    return quality(score, rung) + (f", {bad} of {rung.tried} unstable" if bad else "")


def thresholds_table(result: Result, usual: Score | None) -> str:
    """Return quality at each rate under other thresholds, and the difference from the default ones."""
    shown = [*([usual] if usual else []), *result.scores]
    rates = [rung.rate for rung in result.scores[0].rungs]
    rows = []
    for score in shown:
        by_rate = {rung.rate: rung for rung in score.rungs}
        name = (
            method(score.optimizer)
            if score is usual
            else score.optimizer.replace("abs", "absolute").replace("rel ", "relative ")
        )
        gap = signed(across_rates(score, usual)[0]) if usual and score is not usual else ""
        rows.append([name, *(_at(score, by_rate.get(rate)) for rate in rates), gap])
    return markdown(["", *map(plain, rates), "mean, against the default"], rows)


GROUPS = {
    "Clips and optimizers that came after the paper, on Adam": (
        "adam",
        ("stable_adamw", "ada_gc", "z_clip", "spam_clip", "skip_spikes", "agc_adam", "clippy_adam"),
    ),
    "Other forms of Clippy on Adam": (
        "clippy_adam",
        ("clippy_adam_unit", "clippy_adam_quantile", "clippy_adam_moments"),
    ),
    "Other forms of Clippy on Adagrad": (
        "clippy",
        ("clippy_delayed", "clippy_clipped_accumulator", "clippy_half_life"),
    ),
    "Tables clipped, too, a factor for each row": ("clippy_adam", ("clippy_adam_tables",)),
    "Beside the optimizer, with plain Adam": (
        "adam",
        (
            *("adam_layer_norm", "adam_warmup_50", "adam_warmup_200", "adam_huber"),
            *("adam_without_regressions", "adam_regressions_damped"),
        ),
    ),
}
"""By heading: the plain setting, and what is compared with it at the same rates."""


def modern_tables(both: Result) -> list[str]:
    """Return a table for each group."""
    told = []
    for title, (base_name, names) in GROUPS.items():
        base = both.find(base_name, AIM_MODEL)
        found = [score for name in names if (score := both.find(name, AIM_MODEL))]
        if base is None or not found:
            continue
        rows = [_modern_row(score, base) for score in found]
        plain_row = [method(base.optimizer), _best(base), "", "", "", "", tell_range(base)]
        titles = ["", "AUC at best rate", "against plain at its best", "rates of both", "there, on average"]
        titles += ["unstable there, and plain", "within .01"]
        told.append(f"### {title}\n\n" + markdown(titles, [plain_row, *rows]))
    return told


def _modern_row(score: Score, base: Score) -> list[str]:
    gap, rates = across_rates(score, base)
    seeds = set(score.rungs[0].ending) & set(base.rungs[0].ending)
    counts = [_count_at(each, rates, seeds) for each in (score, base)]
    row = [method(score.optimizer), _best(score), signed(quality_gap(score, base)[0])]
    row += [", ".join(map(plain, rates)), signed(gap)]
    return [*row, ", ".join(f"{bad} of {tried}" for bad, tried in counts), tell_range(score)]


def _count_at(score: Score, rates: Sequence[float], seeds: set[int]) -> tuple[int, int]:
    """Return how many cells at these rates and seeds are unstable, and how many there are."""
    cells = [
        ending in UNSTABLE or score.has_collapsed(rung, seed)
        for rung in score.rungs
        for seed, ending in rung.ending.items()
        if seed in seeds and any(math.isclose(rung.rate, rate) for rate in rates)
    ]
    return sum(cells), len(cells)


def _best(score: Score) -> str:
    return f"{quality(score, score.best)} at {plain(score.best.rate)}" if score.best else NONE


def incident_table(result: Result, incident: str) -> str:
    """Return quality at the best rate under an incident, and what the incident costs there."""
    scores = [score for score in result.scores if score.incident == incident]
    undisturbed = [score for score in result.scores if score.incident == "none"]
    rival = best_of(scores)
    rows = []
    for score in scores:
        best, cost = score.best, NONE
        usual = next((s for s in undisturbed if (s.optimizer, s.model) == (score.optimizer, score.model)), None)
        same = [r for r in usual.rungs if best and abs(r.rate / best.rate - 1) < 1e-9] if usual else []
        if best and same:
            cost = signed(best.lead(same[0]))
        gap = signed(quality_gap(score, rival)[0]) if rival and score is not rival else ""
        nrmse = short(best.mean(lambda o: o.nrmse("test")), 3) if best else NONE
        total = score.cells
        bad = sum(sum(count_unstable(score, rung)) for rung in score.rungs)
        row = [method(score.optimizer), plain(best.rate) if best else NONE, quality(score, best), nrmse]
        rows.append([*row, cost, gap, endings(score, best), f"{bad} of {total.tried}", tell_range(score)])
    titles = ["", "best rate", "AUC", "NRMSE", "against no incident", "against the best", "unstable at best"]
    return markdown([*titles, "unstable in all", "within .01"], rows)
