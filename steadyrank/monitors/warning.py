"""Early warning: signs in the dynamics, not in the loss, that a run is about to diverge.

Four signs, each with a physical meaning:

- **update** (alarm): in half of the weight matrices, the step moves some coordinate further than Clippy would let it
  (0.5 |w| + 0.01), look after look. Such steps leave the region in which the gradient means anything (Tang et al.,
  section 4). Of eleven statistics of updates that were tried this one told runs apart best (docs/log.md). A run under
  Clippy cannot show it.
- **gradient** and **logit** (alarm): the largest coordinate of a dense gradient, or the largest logit of a task, leaves
  the band in which it lay, by a large factor. This is what poisoned data look like before the weights have followed.
- **dead units** (notice): units fall silent quickly. What is dead at a divergence no clip brings back; but some die in
  healthy runs too.

Shapes: T steps of a flush, K tasks, P parameters, S signals.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float64
from pydantic import Field

from ..settings import Settings

Level = Literal["notice", "alarm"]


class WarningConfig(Settings):
    """When the dynamics call for a warning. Chosen on the runs that `benchmarks/early_warning.md` names."""

    update_over_bound: float = Field(default=1.1, gt=0)
    """How many times Clippy's bound the furthest coordinate goes, in the median weight matrix and the median look."""
    update_looks: int = Field(default=3, ge=1)
    """Looks at the dynamics of which that median is taken."""
    update_warm_up: int = Field(default=100, ge=0)
    """Steps at the start in which large updates are no sign: accumulators fill."""
    band_sigmas: float = Field(default=7.0, gt=0)
    """Robust standard deviations above its own median, in logarithms, from which a gradient or logit is out."""
    band_factor: float = Field(default=10.0, gt=1)
    """And how many times that median it must be, so that a narrow band does not make everything a sign."""
    band_steps: int = Field(default=100, ge=10)
    """Steps that the band remembers."""
    dead_rise_frac: float = Field(default=0.3, gt=0, le=1)
    """Share of all live units that fall silent within `dead_looks` looks."""
    dead_looks: int = Field(default=10, ge=1)
    """Looks over which that rise is measured."""
    quiet_steps: int = Field(default=200, ge=1)
    """Steps for which a sign, once reported, is not reported again."""


class Alert(NamedTuple):
    """A warning."""

    step: int
    """The first step that shows the sign."""
    level: Level
    """`notice`: one to know of. `alarm`: a run with this sign mostly diverges."""
    sign: str
    """`update`, `gradient`, `logit` or `dead_units`."""
    task: str
    """The task that it concerns; "" where it cannot be told."""
    layer: str
    """The parameter or module that it concerns; ""  where there is none."""
    reason: str
    """What was seen, in words."""
    quantities: dict[str, float]
    """The readings that raised it, by name."""


_LEAST_HISTORY = 40
_FLOOR = 0.02  # in decades: a band is never narrower, so that a flat history does not make everything a sign
_LOST = 30.0  # decades: what an infinite value counts as


class EarlyWarning:
    """Watches the signs, on the host, as flushes bring them.

    A NaN is a value that is not there; an infinite gradient is a sign at once. Neither enters a band.

    Args:
        tasks: Names of the tasks.
        parameters: Names of the parameters, in the order of the gradients.
        matrices: Those of them whose updates are judged: weight matrices; all when left out.
        config: Thresholds.

    >>> early = EarlyWarning(["click"], ["weight"])
    >>> calm, spike = np.full((40, 1), 0.1), np.full((2, 1), 5.0)
    >>> early.add_steps(1, np.ones((40, 1)), calm)
    []
    >>> [(alert.step, alert.sign, alert.layer) for alert in early.add_steps(41, np.ones((2, 1)), spike)]
    [(41, 'gradient', 'weight')]
    """

    def __init__(
        self,
        tasks: Sequence[str],
        parameters: Sequence[str],
        config: WarningConfig | None = None,
        matrices: Sequence[str] | None = None,
    ) -> None:
        self.config = config or WarningConfig()
        self._names = [*tasks, *parameters]
        self._tasks = len(tasks)
        self._history = np.empty((0, len(self._names)))
        self._matrices = frozenset(parameters if matrices is None else matrices)
        self._updates: list[float] = []
        self._dead: list[float] = []
        self._last: dict[str, int] = {}

    def add_steps(
        self,
        first: int,
        logits_TK: Float64[np.ndarray, "steps tasks"],
        gradients_TP: Float64[np.ndarray, "steps params"],
    ) -> list[Alert]:
        """Take in the largest |logit| of each task and the largest |gradient| of each parameter, step by step.

        Args:
            first: Number of the first of these steps.
            logits_TK: NaN where it is not known.
            gradients_TP: Infinite where a gradient is not finite, NaN where there is none.
        """
        with np.errstate(divide="ignore"):
            log_TS = np.log10(np.abs(np.hstack([logits_TK, gradients_TP])))
        log_TS = np.where(np.isneginf(log_TS), np.nan, np.minimum(log_TS, _LOST))
        found = self._compare(first, log_TS) if len(self._history) >= _LEAST_HISTORY else self._lost(first, log_TS)
        kept = np.where(log_TS < _LOST, log_TS, np.nan)
        self._history = np.vstack([self._history, kept])[-self.config.band_steps :]
        return self._report(found)

    def add_dynamics(self, step: int, row: Mapping[str, float]) -> list[Alert]:
        """Take in a row of the table `dynamics`: `update_over_bound/` by parameter, and `dead_frac/all`."""
        found: list[Alert] = []
        updates = {name: v for name, v in _area(row, "update_over_bound").items() if name in self._matrices}
        if updates:
            self._updates = [*self._updates, float(np.median(list(updates.values())))][-self.config.update_looks :]
            found += self._judge_updates(step, max(updates, key=lambda name: updates[name]))
        dead = row.get("dead_frac/all")
        if dead is not None:
            self._dead = [*self._dead, dead][-self.config.dead_looks - 1 :]
            found += self._judge_dead(step)
        return self._report(found)

    def _compare(self, first: int, log_TS: np.ndarray) -> list[Alert]:
        """Return the first step of each signal's that is out of its band, the furthest signal of a kind only."""
        median_S, spread_S = robust_band(self._history)
        with np.errstate(invalid="ignore"):
            over_TS = log_TS - median_S
            out_TS = (over_TS > self.config.band_sigmas * np.maximum(spread_S, _FLOOR)) & (
                over_TS > np.log10(self.config.band_factor)
            )
        return self._first_out(first, log_TS, over_TS, out_TS)

    def _lost(self, first: int, log_TS: np.ndarray) -> list[Alert]:
        """Without a band yet, only what is not finite is a sign."""
        return self._first_out(first, log_TS, log_TS, log_TS >= _LOST)

    def _first_out(self, first: int, log_TS: np.ndarray, over_TS: np.ndarray, out_TS: np.ndarray) -> list[Alert]:
        found = []
        for sign, columns in (("logit", slice(0, self._tasks)), ("gradient", slice(self._tasks, None))):
            out = out_TS[:, columns]
            if out.any():
                t = int(out.any(1).argmax())
                s = int(np.where(out[t], over_TS[t, columns], -np.inf).argmax()) + (columns.start or 0)
                value, times = float(10 ** log_TS[t, s]), float(10 ** over_TS[t, s])
                found.append(self._out_of_band(first + t, sign, s, value, times))
        return found

    def _out_of_band(self, step: int, sign: str, s: int, value: float, times: float) -> Alert:
        name, lost = self._names[s], value >= 10**_LOST
        shown = "is not finite" if lost else f"is {times:,.0f} times its usual level"
        what = f"the largest logit of {name}" if sign == "logit" else f"the largest gradient of {name}"
        task, layer = (name, "") if sign == "logit" else ("", name)
        area = "logit_max" if sign == "logit" else "gradient_max"
        quantities = {f"{area}/{name}": float("inf") if lost else value, "times": float("inf") if lost else times}
        return Alert(step, "alarm", sign, task, layer, f"{what} {shown}", quantities)

    def _judge_updates(self, step: int, layer: str) -> list[Alert]:
        """Warn when half of the matrices go too far, look after look."""
        config = self.config
        middle = float(np.median(self._updates))
        if len(self._updates) < config.update_looks or step <= config.update_warm_up:
            return []
        if not middle > config.update_over_bound:
            return []
        reason = (
            f"steps are too large: in half of the weight matrices some weight moves by {middle:.1f} times what Clippy "
            f"would allow (0.5 |w| + 0.01) or more, furthest in {layer}"
        )
        return [Alert(step, "alarm", "update", "", layer, reason, {"update_over_bound": middle})]

    def _judge_dead(self, step: int) -> list[Alert]:
        """Give notice when many units fall silent quickly."""
        before, now = self._dead[0], self._dead[-1]
        if len(self._dead) <= self.config.dead_looks or not before < 1 or step <= self.config.update_warm_up:
            return []
        lost = (now - before) / (1 - before)
        if not lost > self.config.dead_rise_frac:
            return []
        reason = f"{lost:.0%} of the live units fell silent within {self.config.dead_looks} looks; {now:.0%} are dead"
        return [Alert(step, "notice", "dead_units", "", "", reason, {"dead_frac/all": now})]

    def _report(self, found: list[Alert]) -> list[Alert]:
        """Leave out what was reported a short while ago."""
        new = [a for a in found if a.step - self._last.get(a.sign, -(10**9)) > self.config.quiet_steps]
        self._last.update({alert.sign: alert.step for alert in new})
        return new

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, as plain values."""
        return {
            "history": self._history.tolist(),
            "updates": list(self._updates),
            "dead": list(self._dead),
            "last": dict(self._last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._history = np.array(state["history"], dtype=np.float64).reshape(-1, len(self._names))
        self._updates, self._dead = list(state["updates"]), list(state["dead"])
        self._last = dict(state["last"])


def robust_band(
    values_TS: Float64[np.ndarray, "steps signals"],
) -> tuple[Float64[np.ndarray, " signals"], Float64[np.ndarray, " signals"]]:
    """Return median and 1.4826 times the median absolute deviation of each column; NaN counts as absent.

    >>> robust_band(np.array([[1.0], [2.0], [np.nan], [3.0]]))
    (array([2.]), array([1.4826]))
    """
    median_S = _median(values_TS)
    return median_S, 1.4826 * _median(np.abs(values_TS - median_S))


def _median(values_TS: np.ndarray) -> np.ndarray:
    """Return the median of each column's values that are not NaN: by one sort, which puts NaN last."""
    count_S = (~np.isnan(values_TS)).sum(0)
    ordered, columns = np.sort(values_TS, axis=0), np.arange(values_TS.shape[1])
    low, high = np.maximum(count_S - 1, 0) // 2, count_S // 2
    high = np.minimum(high, np.maximum(count_S - 1, 0))
    return np.where(count_S > 0, (ordered[low, columns] + ordered[high, columns]) / 2, np.nan)


def _area(row: Mapping[str, float], area: str) -> dict[str, float]:
    return {name[len(area) + 1 :]: v for name, v in row.items() if name.startswith(area + "/") and not np.isnan(v)}
