"""The paper's ablation: in how many runs of each arm plain Adagrad is unstable, against the model as it is."""

import math
from typing import NamedTuple

from results import Result

from steadyrank.ladder.numbers import binomial_interval
from steadyrank.ladder.scores import UNSTABLE, Rung, Score

PAPERS = {
    "as_is": ("as it is", 5, 5),
    "smaller": ("smaller (128 × 2)", 1, 3),
    "without_dcn": ("without DCN", 2, 3),
    "fewer_features": ("half the features", 2, 3),
    "one_task_fewer": ("one task fewer", 2, 3),
    "two_tasks_fewer": ("two tasks fewer", 0, 3),
}
"""What each arm is called, and how many of how many runs diverged in the paper."""


class Arm(NamedTuple):
    """One arm: its unstable runs by kind, and those of Clippy at the same rate and seeds."""

    name: str
    tried: int
    diverged: int
    never_learned: int
    collapsed: int
    clippy: int
    """Runs of Clippy that diverged or never learned."""

    @property
    def unstable(self) -> int:
        """Return how many runs of Adagrad are unstable."""
        return self.diverged + self.never_learned + self.collapsed


def read_arms(result: Result) -> list[Arm]:
    """Return the arms of an ablation, each of one rate, in the ladder's order."""
    found = []
    for model in result.models():
        plain, clippy = result.find("adagrad", model), result.find("clippy", model)
        if plain is not None and clippy is not None:
            found.append(_read_arm(model, plain, plain.rungs[0], clippy.rungs[0]))
    return found


def _read_arm(model: str, score: Score, rung: Rung, clippy: Rung) -> Arm:
    constant = 0.5 if score.measure == "AUC" else 0.0
    collapsed = sum(
        2 * (rung.test[seed] - constant) < clippy.test[seed] - constant
        for seed, ending in rung.ending.items()
        if ending not in UNSTABLE and {seed} <= rung.test.keys() & clippy.test.keys()
    )
    bad = sum(ending in UNSTABLE for ending in clippy.endings)
    counts = rung.counts["full_divergence"], rung.counts["never_learned"]
    return Arm(model, rung.tried, *counts, collapsed, bad)


def fisher_exact(hits: int, tried: int, other_hits: int, other_tried: int) -> float:
    """Return the chance of two counts at least as unlikely as these, if both had the same chance (two-sided).

    >>> round(fisher_exact(10, 10, 3, 10), 5)
    0.0031

    Source: Fisher, "The logic of inductive inference", J. Royal Statistical Society 98, 1935.
    """
    total = hits + other_hits
    whole = math.comb(tried + other_tried, total)

    def chance(k: int) -> float:
        return math.comb(tried, k) * math.comb(other_tried, total - k) / whole

    limit = chance(hits) * (1 + 1e-9)
    possible = range(max(0, total - other_tried), min(tried, total) + 1)
    return min(sum(p for p in map(chance, possible) if p <= limit), 1.0)


def arm_rows(arms: list[Arm]) -> list[list[str]]:
    """Return a row of the table for each arm."""
    first, rows = arms[0], []
    for arm in arms:
        title, hits, tried = PAPERS.get(arm.name, (arm.name.replace("_", " "), 0, 0))
        low, high = (100 * bound for bound in binomial_interval(arm.unstable, arm.tried))
        apart = fisher_exact(arm.unstable, arm.tried, first.unstable, first.tried)
        rows.append(
            [
                title,
                f"{arm.unstable} of {arm.tried}",
                f"{low:.0f} to {high:.0f} %",
                f"{arm.diverged} / {arm.never_learned} / {arm.collapsed}",
                "" if arm is first else f"{apart:.2g}",
                f"{hits} of {tried}" if tried else "",
                f"{arm.clippy} of {arm.tried}",
            ]
        )
    return rows


def tell_arms(arms: list[Arm]) -> str:
    """Say which arms are shown to be more stable than the model as it is."""
    first = arms[0]
    better, others = [], []
    for arm in arms[1:]:
        apart = fisher_exact(arm.unstable, arm.tried, first.unstable, first.tried)
        shown = apart < 0.05 and arm.unstable * first.tried < first.unstable * arm.tried
        (better if shown else others).append(PAPERS.get(arm.name, (arm.name,))[0])
    told = f"Shown to be more stable than the model as it is (p below .05): {', '.join(better) or 'none'}."
    return f"{told} Not shown: {', '.join(others)}." if others else told
