"""The scores of a ladder in words and figures: the columns of every table, and the table in the terminal."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from ..terminal import console, escape, say
from .laboratory import OUTCOMES, Found
from .numbers import Estimate
from .scores import Rung, Score, choose, conclude, quality_gap, score_ladder

SCORES = "scores.csv"
_LONGEST = 18
_FAILED_SHOWN = 20
_NONE = "–"


@dataclass(frozen=True)
class Line:
    """A row of the table: a score, and what it is compared with."""

    score: Score
    rival: Score | None
    """The best other family on the same model and data, by the validation windows."""
    base: Score | None
    """The ladder's first optimizer on the same model and data."""


@dataclass(frozen=True)
class Column:
    """A column of a table of scores."""

    title: str
    """Where a line break helps it stands as such."""
    tell: Callable[[Line], str]
    how: str
    """What the score is, and where it comes from."""
    files: str
    """Its columns in scores.csv; empty where it has none."""
    rank: int | None = None
    """In the terminal the columns of the highest ranks go first where it is narrow; None is never shown there."""
    wide: Callable[[Line], str] | None = None
    """What the page has room for instead of `tell`."""

    @property
    def heading(self) -> str:
        """Return the title in one line."""
        return self.title.replace("\n", " ")

    def tell_widely(self, line: Line) -> str:
        """Return a cell of the page."""
        return (self.wide or self.tell)(line)


def compare_scores(scores: Sequence[Score]) -> list[Line]:
    """Return each score with its best rival, and with the ladder's first optimizer, on the same model and data."""
    lines = []
    for score in scores:
        beside = [s for s in scores if (s.incident, s.model) == (score.incident, score.model)]
        rivals = [s for s in beside if s.family != score.family and s.best is not None]
        rival = max(rivals, key=lambda s: s.best.valid if s.best else -math.inf, default=None)
        base = next((s for s in beside if s.optimizer == scores[0].optimizer), None)
        lines.append(Line(score, rival, base))
    return lines


def place_of(score: Score) -> str:
    """Return model and incident as a title; empty where the ladder varies neither."""
    return ", ".join(part for part in (score.model, score.incident) if part)


def conclusions(scores: Sequence[Score]) -> list[tuple[Score, str]]:
    """Return what can be said of each family's best setting."""
    base = scores[0].optimizer if scores else ""
    return [(score, conclude(score, scores, base)) for score in choose(scores)]


def print_found(found: Found, folder: Path) -> None:
    """Print a ladder's scores, what they say, the cells that failed, and where all of it was written."""
    scores = score_ladder(found.outcomes)
    lines = compare_scores(scores)
    for place in dict.fromkeys(place_of(score) for score in scores):
        _print_table(place, [line for line in lines if place_of(line.score) == place])
    for score, words in conclusions(scores):
        place = place_of(score)
        say(f"{score.optimizer}{f' ({place})' if place else ''}: {words}")
    if found.failed:
        say(f"{len(found.failed)} of {len(found.failed) + len(found.outcomes)} cells failed:")
        for name, reason in list(found.failed.items())[:_FAILED_SHOWN]:
            say(f"  {name}: {reason}")
        if len(found.failed) > _FAILED_SHOWN:
            say(f"  and {len(found.failed) - _FAILED_SHOWN} more")
    say(f"outcomes: {folder / OUTCOMES}")
    say(f"scores: {folder / SCORES}")


def _print_table(title: str, lines: Sequence[Line]) -> None:
    """Print the scores of one model and incident; a narrow terminal shows the columns that matter most."""
    names = [line.score.optimizer for line in lines]
    shown = [column for column in COLUMNS if column.rank is not None]
    cells = {column.title: [column.tell(line) for line in lines] for column in shown}
    width = min(max(map(len, [*names, "optimizer"])), _LONGEST) + 3  # with the space at both ends
    widths = {title: max(map(len, [*title.split("\n"), *of])) + 2 for title, of in cells.items()}
    ranks = {column.title: column.rank or 0 for column in shown}
    left_out = []
    while len(cells) > 1 and width + sum(widths[title] for title in cells) > console.width:
        least = max(cells, key=lambda name: ranks[name])
        left_out.append(least.replace("\n", " "))
        del cells[least]
    heading = f"{title}: {lines[0].score.measure}" if title else f"quality: {lines[0].score.measure}"
    table = Table(title=escape(heading), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("optimizer", max_width=_LONGEST, overflow="fold")
    for name in cells:
        table.add_column(name, justify="right", no_wrap=True)
    for place, name in enumerate(names):
        table.add_row(escape(name), *(of[place] for of in cells.values()))
    console.print(table)
    if left_out:
        say(f"({', '.join(left_out)}: in {SCORES}, and on the page)")


def short(value: float, digits: int = 4) -> str:
    """Return a share without the 0 before the point; a dash for NaN.

    >>> short(0.64213), short(-0.0031), short(1.0), short(math.nan)
    ('.6421', '-.0031', '1.0000', '–')
    """
    if math.isnan(value):
        return _NONE
    told = f"{value:.{digits}f}"
    return told.replace("0.", ".", 1) if abs(value) < 1 and told.lstrip("-").startswith("0.") else told


def plain(value: float) -> str:
    """Return a number to three digits; a dash for NaN."""
    return _NONE if math.isnan(value) else f"{value:.3g}"


def signed(estimate: Estimate) -> str:
    """Return a difference of shares with half of its interval.

    >>> signed(Estimate(0.0042, 0.0031, 0.0053)), signed(Estimate(-0.01, math.nan, math.nan))
    ('+.0042±.0011', '-.0100')
    """
    if math.isnan(estimate.mean):
        return _NONE
    sign = "-" if estimate.mean < 0 else "+"
    reach = (estimate.high - estimate.low) / 2
    return sign + short(abs(estimate.mean)) + ("" if math.isnan(reach) else f"±{short(reach)}")


def level(score: Score, rung: Rung | None) -> float:
    """Return the mean AUC at a rate, or where there is none the mean NRMSE; NaN without a rate."""
    if rung is None:
        return math.nan
    return rung.quality.mean if score.measure == "AUC" else 1 - rung.quality.mean


def _tell_cells(line: Line) -> str:
    score = line.score
    return f"{score.cells.tried} ({len(score.rungs)} × {len({o.seed for o in score.cells.outcomes})})"


def _tell_diverged(line: Line) -> str:
    cells = line.score.cells
    low, high = cells.diverged_interval
    return f"{cells.diverged}/{cells.tried} {100 * low:.0f}–{100 * high:.0f}%"


def _tell_episodes(line: Line) -> str:
    return plain(line.score.cells.episodes.mean)


def _tell_episodes_widely(line: Line) -> str:
    mean, low, high = line.score.cells.episodes
    return _NONE if math.isnan(mean) else f"{mean:.3g} ({low:.2g}–{high:.2g})"


def _tell_best(line: Line) -> str:
    return plain(line.score.best.rate) if line.score.best else _NONE


def _tell_quality(line: Line) -> str:
    best = line.score.best
    told = short(level(line.score, best))
    return told if best is None or math.isnan(best.quality_sd) else f"{told}±{short(best.quality_sd)}"


def _tell_nrmse(line: Line) -> str:
    best = line.score.best
    return short(best.mean(lambda o: o.nrmse("test")), 3) if best else _NONE


def _tell_double(line: Line) -> str:
    return short(level(line.score, line.score.double))


def _tell_fall(line: Line) -> str:
    best, double = line.score.best, line.score.double
    return signed(double.lead(best)) if best and double else _NONE


def _tell_stable(line: Line) -> str:
    score = line.score
    found = score.stable_rate.mean
    if math.isnan(found):
        return _NONE
    return ("≥" if score.stable_rate_censored else "") + plain(found)


def _tell_stable_widely(line: Line) -> str:
    score, told = line.score, _tell_stable(line)
    _, low, high = score.stable_rate
    if not score.stable_rate_censored and low < high:
        told += f" ({plain(low)}–{plain(high)})"
    bad = f"{score.unstable_at_best} of {len(score.stable)} unstable at best"
    return f"{told}; {bad}" if score.unstable_at_best else told


def _tell_all_stable(line: Line) -> str:
    return plain(line.score.stable_rate_of_all)


def _tell_tolerance(line: Line) -> str:
    found = line.score.tolerance()
    if found is None:
        return _NONE
    low, high = ("≤" * found.low_censored) + plain(found.low), ("≥" * found.high_censored) + plain(found.high)
    return low if found.low == found.high and not found.censored else f"{low}–{high}"


def _tell_gap(line: Line) -> str:
    return signed(quality_gap(line.score, line.rival)[0]) if line.rival else _NONE


def _tell_gap_widely(line: Line) -> str:
    told = _tell_gap(line)
    return f"{told} vs {line.rival.optimizer}" if line.rival and told != _NONE else told


def _tell_sensitivity(line: Line) -> str:
    mean, low, high = line.score.rate_sensitivity
    return short(mean) + ("" if math.isnan(low) else f" ({short(low)}–{short(high)})")


def _tell_spikes(line: Line) -> str:
    share = line.score.cells.mean(lambda o: o.spikes)
    return _NONE if math.isnan(share) else f"{100 * share:.2g}%"


def _tell_cost(line: Line) -> str:
    if line.base is None:
        return _NONE
    ratio = line.score.cells.step_seconds / line.base.cells.step_seconds
    return _NONE if math.isnan(ratio) else f"{ratio:.2f}"


def _tell_seconds(line: Line) -> str:
    found = line.score.cells.step_seconds
    return _NONE if math.isnan(found) else f"{1000 * found:.3g}"


def _at_best(reading: str) -> Callable[[Line], str]:
    return lambda line: plain(line.score.best.median(lambda o: getattr(o, reading))) if line.score.best else _NONE


def csv_rows(found: Iterable[dict[str, object]]) -> list[list[str]]:
    """Return flat rows as the cells of a CSV file, its header first; what is not known is empty."""
    listed = list(found)
    names = list(dict.fromkeys(name for row in listed for name in row))
    return [names, *([_plain_cell(row.get(name)) for name in names] for row in listed)]


def _plain_cell(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


COLUMNS = (
    Column(
        "diverged",
        _tell_diverged,
        "Runs that left the finite numbers, or one of whose tasks diverged and did not come back; with the exact 95 % "
        "interval of the chance that a run of this ladder does (Clopper and Pearson, 1934).",
        "diverged, diverged_share",
        rank=0,
    ),
    Column(
        "never\nlearned",
        lambda line: str(line.score.cells.counts["never_learned"]),
        "Runs in which half of the tasks that another run on the same data learned were never better than a constant.",
        "never_learned",
        rank=8,
    ),
    Column(
        "micro per\nM rows",
        _tell_episodes,
        "Micro-divergences (a task is disturbed and comes back) per million rows, those of several tasks at one time "
        "counted once; with the 95 % interval of a Poisson count (Garwood, 1936).",
        "episodes_per_million_rows",
        rank=9,
        wide=_tell_episodes_widely,
    ),
    Column(
        "best\nrate",
        _tell_best,
        "The rate of the highest quality in the validation stretch of the log, the mean over seeds.",
        "best_rate",
        rank=2,
    ),
    Column(
        "quality\nat best",
        _tell_quality,
        "Mean AUC of the binary tasks, or where there are none mean NRMSE, over the windows of the test stretch, each "
        "scored before it was learned from; ± its standard deviation over seeds. Windows that a run never reached "
        "count as a constant's.",
        "quality, quality_sd",
        rank=1,
    ),
    Column(
        "quality\nat 2x",
        _tell_double,
        "The same at the first rate that is at least twice the best one: what a rate that is set too high costs.",
        "double_rate, double_quality",
        rank=6,
    ),
    Column(
        "stable\nup to",
        _tell_stable,
        "The largest rate up to which, from the best one, a seed did not diverge, collapse or never learn: geometric "
        "mean over seeds, with its 95 % interval. ≥ where the ladder ended first.",
        "stable_rate, stable_rate_censored, unstable_at_best",
        rank=3,
        wide=_tell_stable_widely,
    ),
    Column(
        "within .01\nof best",
        _tell_tolerance,
        "The rates around the best one whose quality stays within .01 of its own: how far the rate may be missed. "
        "≤ and ≥ where the ladder ended first.",
        "tolerance_low_rate, tolerance_high_rate, tolerance_factor",
        rank=4,
    ),
    Column(
        "vs best\nrival",
        _tell_gap,
        "Quality at its best rate minus that of the best other method at its own, paired by seed, with half of "
        "Student's 95 % interval: no difference is shown while the interval is wider than the difference.",
        "",
        rank=5,
        wide=_tell_gap_widely,
    ),
    Column(
        "cost",
        _tell_cost,
        "Time of a step over that of the ladder's first optimizer.",
        "step_ratio",
        rank=7,
    ),
    Column(
        "change\nat 2x",
        _tell_fall,
        "Quality there minus that at the best rate, paired by seed, with half of Student's 95 % interval: below 0 is "
        "a loss.",
        "double_fall (its sign turned)",
    ),
    Column(
        "all seeds\nup to",
        _tell_all_stable,
        "The largest rate up to which, from the best one, no seed was unstable.",
        "stable_rate_of_all",
    ),
    Column(
        "NRMSE\nat best",
        _tell_nrmse,
        "Mean RMSE of the regressions over that of a constant in the test stretch: lower is better.",
        "nrmse",
    ),
    Column(
        "rate\nsensitivity",
        _tell_sensitivity,
        "What a rate drawn from the ladder loses on average beside the best one: mean over rates of the loss (a "
        "constant has 1, and counts so at most) minus the least; only on one and the same ladder may it be compared "
        "(Wortsman et al., arXiv 2309.14322).",
        "rate_sensitivity",
    ),
    Column(
        "spikes",
        _tell_spikes,
        "Steps whose loss lies more than 7 standard deviations above the mean of the last 1000 (after OLMo 2, arXiv "
        "2501.00656).",
        "spikes_share",
    ),
    Column(
        "effective\nrate",
        _at_best("moved"),
        "How far a step moved a weight matrix, relative to its size, in the second half of the run; the median, at the "
        "best rate.",
        "moved",
    ),
    Column(
        "headroom",
        _at_best("headroom"),
        "How many times larger a step could have been before the loss rises, in the second half; the median, at the "
        "best rate. Below 1 it already overshoots.",
        "headroom",
    ),
    Column(
        "ms a\nstep",
        _tell_seconds,
        "Median over its runs; they were trained beside one another, so that only the ratio means much.",
        "step_s",
    ),
    Column(
        "cells",
        _tell_cells,
        "Runs that have ended: rates × seeds.",
        "cells, rates, seeds",
    ),
)
"""The columns of every table of scores."""
