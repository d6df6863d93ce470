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
from .band import RobustBand

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
    band_steps: int = Field(default=100, ge=10, le=100_000)
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


_LEAST = 40  # values of a signal, or as many as are remembered, from which it has a band
_FLOOR = 0.02
_LOST = 39.0  # decades: what an infinite value counts as, above all that float32 holds


class EarlyWarning:
    """Watches the signs, on the host, as flushes bring them.

    A NaN is a value that is not there, and so is a 0; an infinite one is a sign at once. None of them enters a band. A
    look at which half of the matrices did not move is none: the optimizer refused that step.

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
        # In decades; never narrower than the floor, so that a flat history does not make everything a sign.
        self._band = RobustBand(
            len(self._names),
            self.config.band_steps,
            least=min(_LEAST, self.config.band_steps),
            floor_frac=0.0,
            floor=_FLOOR,
        )
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
        found = self._compare(first, log_TS)
        self._band.add(np.where(log_TS < _LOST, log_TS, np.nan))
        return self._report(found)

    def add_dynamics(self, step: int, row: Mapping[str, float]) -> list[Alert]:
        """Take in a row of the table `dynamics`: `update_over_bound/` by parameter, and `dead_frac/all`."""
        found: list[Alert] = []
        updates = {name: v for name, v in _area(row, "update_over_bound").items() if name in self._matrices}
        middle = float(np.median(list(updates.values()))) if updates else 0.0
        if middle > 0:
            self._updates = [*self._updates, middle][-self.config.update_looks :]
            found += self._judge_updates(step, max(updates, key=lambda name: updates[name]))
        dead = float(row.get("dead_frac/all", np.nan))
        if not np.isnan(dead):
            self._dead = [*self._dead, dead][-self.config.dead_looks - 1 :]
            found += self._judge_dead(step)
        return self._report(found)

    def _compare(self, first: int, log_TS: np.ndarray) -> list[Alert]:
        """Return the first step of each kind at which a signal is out of its band: the one that is furthest out."""
        enough_S, median_S, spread_S = self._band.count() >= self._band.least, self._band.median(), self._band.spread()
        width_S = np.maximum(self.config.band_sigmas * spread_S, np.log10(self.config.band_factor))
        lost_TS = log_TS >= _LOST  # a sign with or without a band
        over_TS = np.where(lost_TS, np.inf, log_TS - median_S)
        return self._first_out(first, log_TS, over_TS, lost_TS | (enough_S & (over_TS > width_S)))

    def _first_out(self, first: int, log_TS: np.ndarray, over_TS: np.ndarray, out_TS: np.ndarray) -> list[Alert]:
        found = []
        for sign, columns in (("logit", slice(0, self._tasks)), ("gradient", slice(self._tasks, None))):
            out = out_TS[:, columns]
            if out.any():
                t = int(out.any(1).argmax())
                s = int(np.where(out[t], over_TS[t, columns], -np.inf).argmax()) + (columns.start or 0)
                found.append(self._out_of_band(first + t, sign, s, float(log_TS[t, s]), float(over_TS[t, s])))
        return found

    def _out_of_band(self, step: int, sign: str, s: int, log: float, over: float) -> Alert:
        value, times = (np.inf, np.inf) if log >= _LOST else (10.0**log, 10.0**over)
        name, of_logits = self._names[s], sign == "logit"
        what = f"the largest {sign} of {name}"
        shown = f"is {times:,.0f} times its usual level" if times < np.inf else "is not finite"
        quantities = {f"{'logit' if of_logits else 'gradient'}_max/{name}": value, "times": times}
        task, layer = (name, "") if of_logits else ("", name)
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
        """Return what is remembered, as tensors and plain values."""
        return {
            "band": self._band.state_dict(),
            "updates": list(self._updates),
            "dead": list(self._dead),
            "last": dict(self._last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            CheckpointError: It is of other signals, or of a memory of another length.
        """
        self._band.load_state_dict(state["band"])
        self._updates, self._dead = list(state["updates"]), list(state["dead"])
        self._last = dict(state["last"])


def _area(row: Mapping[str, float], area: str) -> dict[str, float]:
    return {name[len(area) + 1 :]: v for name, v in row.items() if name.startswith(area + "/") and not np.isnan(v)}
