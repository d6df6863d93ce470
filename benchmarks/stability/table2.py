"""The paper's table 2, ours beside it: what it says of each method and model, and which parts of that we see."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from notes import NOTES
from results import SIZES, Study, count_unstable, method, rung_at
from tables import NONE, endings, markdown, quality

from steadyrank.ladder.scores import SLACK, Rung, Score, quality_gap
from steadyrank.ladder.tables import plain, short, signed

PAPERS: Mapping[str, Mapping[str, str]] = {
    "adagrad": dict.fromkeys(SIZES, "diverged"),
    "gc": {"small": "2x fine", "large": "2x fine", "large_dcn": "only 1x, AUC 72.27"},
    "agc": {"small": "1x fine, 2x worse", "large": "1x fine, 2x worse", "large_dcn": "very high variance"},
    "lamb": dict.fromkeys(SIZES, "1x stable, worse"),
    "clippy": {"small": "2x, as good as GC", "large": "2x, as good as GC", "large_dcn": "2x, AUC 72.37, the best"},
}
"""The paper's words, by method and model."""
SHOWN = (*PAPERS, "clippy_tight", "clippy_delayed", "adam", "agc_adam", "clippy_adam")


class Check(NamedTuple):
    """One part of what the paper says, and whether it is so here."""

    words: str
    holds: bool | None
    """None where our ladder cannot say."""


Scores = Mapping[str, Score]


def check(name: str, model: str, scores: Scores) -> list[Check]:
    """Return the parts of what the paper says of a method on a model, each held against our runs."""
    return CHECKS[name](scores, model) if name in CHECKS and name in scores and "clippy" in scores else []


def _check_adagrad(scores: Scores, model: str) -> list[Check]:
    best, score = scores["clippy"].best, scores["adagrad"]
    rung = rung_at(score, best.rate) if best else None
    if rung is None:
        return []
    bad = sum(count_unstable(score, rung))
    where = f"unstable at {plain(rung.rate)}, as near as its ladder comes to Clippy's best rate: {bad} of {rung.tried}"
    return [Check(where, 2 * bad >= rung.tried)]


def _check_gc(scores: Scores, model: str) -> list[Check]:
    fine = _fine_at_double(scores["gc"])
    if model != "large_dcn":
        return [fine]
    behind = quality_gap(scores["gc"], scores["clippy"])[0]
    not_fine = Check(f"not {fine.words}", None if fine.holds is None else not fine.holds)
    return [not_fine, Check(f"below Clippy ({signed(behind)})", behind.high < 0)]


def _check_agc(scores: Scores, model: str) -> list[Check]:
    score = scores["agc"]
    if model == "large_dcn":
        ours, theirs = _spread(score), _spread(scores["clippy"])
        return [
            Check(f"at least twice Clippy's spread over seeds ({short(ours)}, {short(theirs)})", ours >= 2 * theirs)
        ]
    double = double_of(score)
    fall = score.best.lead(double) if score.best and double else None
    worse = Check("worse at 2x", None) if fall is None else Check(f"worse at 2x ({signed(fall)} lost)", fall.low > 0)
    return [Check("fine at 1x", _fine_at_best(score)), worse]


def _check_lamb(scores: Scores, model: str) -> list[Check]:
    behind = quality_gap(scores["lamb"], scores["clippy"])[0]
    return [
        Check("fine at 1x", _fine_at_best(scores["lamb"])),
        Check(f"below Clippy ({signed(behind)})", behind.high < 0),
    ]


def _check_clippy(scores: Scores, model: str) -> list[Check]:
    score, checks = scores["clippy"], []
    for rival in ("adagrad", "gc", "agc", "lamb") if model == "large_dcn" else ("gc",):
        if rival in scores:
            gap = quality_gap(score, scores[rival])[0]
            if model == "large_dcn":
                checks.append(Check(f"better than {method(rival)} ({signed(gap)})", gap.low > 0))
            else:
                checks.append(Check(f"as good as GC ({signed(gap)})", not gap.high < 0 and not math.isnan(gap.mean)))
    return [_fine_at_double(score), *checks]


CHECKS: Mapping[str, Callable[[Scores, str], list[Check]]] = {
    "adagrad": _check_adagrad,
    "gc": _check_gc,
    "agc": _check_agc,
    "lamb": _check_lamb,
    "clippy": _check_clippy,
}


def _fine_at_best(score: Score) -> bool:
    return score.best is not None and not any(count_unstable(score, score.best))


def _fine_at_double(score: Score) -> Check:
    """Say whether no run at twice the best rate is unstable, nor the mean quality more than the slack below."""
    double = double_of(score)
    if score.best is None or double is None:
        return Check("fine at 2x", None)
    return Check("fine at 2x", not any(count_unstable(score, double)) and score.best.lead(double).mean <= SLACK)


def double_of(score: Score) -> Rung | None:
    """Return the cells at twice the best rate; None where the ladder's next rate is further up."""
    double = score.double
    return double if double and score.best and double.rate < 2.1 * score.best.rate else None


def _spread(score: Score) -> float:
    return score.best.quality_sd if score.best else math.nan


def tell_checks(checks: list[Check]) -> str:
    """Say whether what the paper says is seen here: yes, no, or which part of it.

    >>> tell_checks([Check("fine at 2x", True), Check("as good as GC", False)])
    'in part; seen: fine at 2x; not seen: as good as GC'
    """
    if not checks:
        return NONE
    found = {holds: "; ".join(c.words for c in checks if c.holds is holds) for holds in (True, False, None)}
    parts = {"seen": found[True], "not seen": found[False], "our ladder cannot say": found[None]}
    told = "; ".join(f"{words}: {of}" for words, of in parts.items() if of)
    if not found[True]:
        return f"**no**; {told}" if found[False] else told
    return f"in part; {told}" if found[False] or found[None] else f"**yes**; {told}"


def model_table(study: Study, model: str) -> str:
    """Return one model's part of the table."""
    scores = {name: score for name in SHOWN if (score := study.of_model(model, name))}
    rows = []
    for name, score in scores.items():
        best, double = score.best, score.double
        row = [method(name), plain(best.rate) if best else NONE, quality(score, best)]
        row += [short(best.mean(lambda o: o.nrmse("test")), 3) if best else NONE, endings(score, best)]
        times = f"{plain(double.rate)} ({double.rate / best.rate:.2g}x)" if double and best else NONE
        row += [times.replace(" (2x)", ""), quality(score, double), endings(score, double)]
        rows.append(
            [
                *row,
                PAPERS.get(name, {}).get(model, ""),
                tell_checks(check(name, model, scores)) if name in PAPERS else "",
            ]
        )
    titles = ["", "1x", "AUC", "NRMSE", "unstable", "2x", "AUC", "unstable", "the paper", "seen here?"]
    return markdown(titles, rows)


def notes_on(study: Study, model: str) -> list[str]:
    """Return what we think of the rows that do not come out as in the paper, where there is a note."""
    scores = {name: score for name in SHOWN if (score := study.of_model(model, name))}
    told = []
    for name in PAPERS:
        checks = check(name, model, scores)
        note = NOTES.get((name, model), "")
        if note and any(each.holds is False for each in checks):
            told.append(f"{method(name)} on {SIZES[model]}: {note}")
    return told
