"""What the study's files say: the outcomes of each ladder, what they are of, and their scores."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from steadyrank.ladder.outcomes import Outcome, read_outcomes
from steadyrank.ladder.scores import UNSTABLE, Rung, Score, score_ladder

HERE = Path(__file__).resolve().parent
SIZES = {"large_dcn": "Large+DCN", "large": "Large", "small": "Small"}
PAPER = {model: f"paper_{model}" for model in SIZES}
"""The ladder of each of the paper's models, the largest first."""
LOGS = {"kuairand": "KuaiRand", "online_retail": "Online Retail", "flights": "Flights"}
LADDERS = ("tune", *PAPER.values(), "ablation", "modern", "bound", "thresholds", "incidents", *LOGS)
METHODS = {
    "adagrad": "Adagrad",
    "gc": "GC",
    "agc": "AGC",
    "lamb": "LAMB on Adagrad",
    "clippy": "Clippy (0.5, 0.01)",
    "clippy_delayed": "Clippy (0.5, 0.01), delayed accumulator",
    "clippy_tight": "Clippy (0.1, 0.001)",
    "adam": "Adam",
    "agc_adam": "AGC on Adam",
    "clippy_adam": "Clippy on Adam (0.1, 0.001)",
}

"""The methods of the paper's models, in the order of the page's tables."""
NAMES = {
    "stable_adamw": "StableAdamW",
    "ada_gc": "AdaGC",
    "z_clip": "ZClip",
    "spam_clip": "SPAM's clip of spikes",
    "skip_spikes": "steps with a spike left out",
    "clippy_adam_unit": "a factor for each output unit",
    "clippy_adam_quantile": "one coordinate in a thousand overlooked",
    "clippy_adam_moments": "moments clipped, too",
    "clippy_clipped_accumulator": "accumulator clipped, too",
    "clippy_half_life": "accumulator with a half-life of 100 steps",
    "clippy_adam_tables": "tables clipped, too",
    "adam_layer_norm": "layer norm in the trunk",
    "adam_warmup_50": "warm-up of 50 steps",
    "adam_warmup_200": "warm-up of 200 steps",
    "adam_huber": "Huber loss for the regressions",
    "adam_without_regressions": "without the two regressions",
    "adam_regressions_damped": "the two regressions at a fifth of their weight",
}
"""What the settings of modern.toml are called."""


@dataclass(frozen=True)
class Base:
    """A plain optimizer, the forms of Clippy on it, and the rivals that clip its gradients or updates otherwise."""

    name: str
    ours: tuple[str, ...]
    rivals: tuple[str, ...]


BASES = (
    Base("adagrad", ("clippy", "clippy_tight"), ("gc", "agc", "lamb")),
    Base("adam", ("clippy_adam",), ("agc_adam",)),
)


@dataclass(frozen=True)
class Result:
    """One ladder of the study."""

    name: str
    outcomes: Sequence[Outcome]
    facts: Mapping[str, Any]
    """Its commit, machine, ...; empty where they were not written down."""

    @cached_property
    def scores(self) -> list[Score]:
        """Return the scores of all settings."""
        return score_ladder(self.outcomes)

    def find(self, optimizer: str, model: str | None = None, incident: str | None = None) -> Score | None:
        """Return a setting's score; on the first model and incident where none is named."""
        for score in self.scores:
            if score.optimizer == optimizer and model in (None, score.model) and incident in (None, score.incident):
                return score
        return None

    def models(self) -> list[str]:
        """Return the models in the ladder's order."""
        return list(dict.fromkeys(score.model for score in self.scores))


class Study:
    """All ladders that have results in a folder."""

    def __init__(self, folder: Path = HERE) -> None:
        self.folder = folder
        self._results = {name: read_result(folder, name) for name in (*LADDERS, "figures")}

    def get(self, name: str) -> Result | None:
        """Return a ladder; None where it was not run yet."""
        return self._results[name]

    def of_model(self, model: str, optimizer: str) -> Score | None:
        """Return a method's score on one of the paper's models."""
        result = self.get(PAPER[model])
        return result.find(optimizer) if result else None

    def joined(self, *names: str) -> Result | None:
        """Return several ladders on the same data as one; None where one of them was not run yet."""
        results = [result for name in names if (result := self.get(name))]
        if len(results) < len(names):
            return None
        return Result("+".join(names), [o for result in results for o in result.outcomes], {})


def read_result(folder: Path, name: str) -> Result | None:
    """Return a ladder's results; None where there are none."""
    path = folder / f"{name}.csv"
    if not path.exists():
        return None
    facts = path.with_suffix(".json")
    return Result(name, read_outcomes(path), json.loads(facts.read_text()) if facts.exists() else {})


def method(name: str) -> str:
    """Return what a method is called."""
    return METHODS.get(name) or NAMES.get(name) or name.replace("_", " ")


def tell_command(name: str) -> str:
    """Return the command that makes a ladder's results."""
    return f"`python benchmarks/stability/paper.py --only {name}{' --data FOLDER' if name in LOGS else ''} --write`"


def tell_source(result: Result | None, name: str) -> str:
    """Return the line under a heading: how its results are made, and what those that are here are of."""
    if result is None:
        return f"Not run yet: {tell_command(name)}."
    facts, ended = result.facts, len(result.outcomes)
    told = [tell_command(name), f"{ended} of {facts.get('cells', ended)} cells"]
    told.append(f"{sum(outcome.seconds for outcome in result.outcomes):,.0f} s of training, summed over them")
    told += [str(facts[key]) for key in ("machine", "date") if key in facts]
    told += [f"{key} {str(facts[key])[:10]}" for key in ("torch", "commit") if facts.get(key)]
    shortened = [
        re.sub(r"ladder\.optimizers\.|set\.optimizer\.dense\.clip\.", "", each) for each in facts.get("overrides", [])
    ]
    overrides = ", ".join(f"`{each}`" for each in shortened)
    return f"*{'; '.join(told)}{f'; set by the tuning: {overrides}' if overrides else ''}.*"


def count_unstable(score: Score, rung: Rung) -> tuple[int, int, int]:
    """Return how many cells of a rate diverged, never learned, and collapsed without either."""
    collapsed = sum(ending not in UNSTABLE and score.has_collapsed(rung, seed) for seed, ending in rung.ending.items())
    return rung.counts["full_divergence"], rung.counts["never_learned"], collapsed


def rung_at(score: Score, rate: float) -> Rung | None:
    """Return the cells at the highest rate of a ladder that is not above one given."""
    below = [rung for rung in score.rungs if rung.rate <= rate * (1 + 1e-9)]
    return below[-1] if below else None


def best_of(scores: Iterable[Score | None]) -> Score | None:
    """Return the setting with the best validation quality at its best rate."""
    known = [score for score in scores if score is not None and score.best is not None]
    return max(known, key=lambda score: score.best.valid if score.best else -math.inf, default=None)
