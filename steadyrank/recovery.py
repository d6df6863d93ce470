"""What to do when the verdict is bad: skip the step, damp, roll back, stop; a ladder that the config orders and bounds.

`Ladder` decides and `Damper` damps; who trains carries out the rest. Neither reads a file or looks at a model.

    at each flush         action = ladder.decide(step, troubles, suspected, can_roll_back)
    before each step      damper.apply(step)
    to save or load       with damper.undamped(): ...

A rollback takes back model, optimizers, generators, the data's cursor and the windows of metrics and monitors, but
neither ladder nor damper: what was tried stays tried, and a second damping comes on top of the first.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.optim import Optimizer

from .settings import Settings

Rung = Literal["skip", "damp", "rollback", "stop"]
Trigger = Literal["bad_steps", "verdict", "alarm"]
_SKIPS_ALONE = 3
LEAST_SCALE = 1e-3
"""Damping again and again ends here: below it a model does not learn at all."""
_BOUND = ("variable_relative_threshold", "absolute_threshold", "accumulator_relative_threshold")  # of a group


class DampConfig(Settings):
    """How a run is damped: made smaller for a while, then gradually brought back."""

    what: Literal["step", "rate", "threshold", "task"] = "step"
    """`step`: the learning rate, and with it the bound where an optimizer has one, so that its steps shrink by the
    factor whether they are clipped or not. `rate`: the learning rate alone, which a clipped step does not feel.
    `threshold`: the bound alone; the rate where there is none (a limit of gradients is no bound: Adam and Adagrad
    divide it out). `task`: the guilty task's share of the loss; the step where no single task is guilty."""
    factor: float = Field(default=0.2, ge=LEAST_SCALE, lt=1)
    """What it is multiplied by, in [0.001, 1). Damped again meanwhile, it is multiplied again, down to 0.001."""
    steps: int = Field(default=500, ge=1)
    """Steps in which it is damped in full."""
    restore_steps: int = Field(default=1000, ge=0)
    """Steps after that in which it comes back, by the same ratio in each."""


class RecoveryConfig(Settings):
    """What a run does about bad steps, verdicts and alarms: a ladder, climbed while what is done does not help."""

    mode: Literal["off", "advise", "on"] = "advise"
    """`on`: act. `advise`: only say what would be done, each rung once between two calms. `off`: neither."""
    ladder: tuple[Rung, ...] = ("skip", "rollback", "damp", "stop")
    """The rungs in their order, each at most once, `stop` last. One that does not fit is passed over: `skip` fits bad
    steps only, which are left out already; `rollback` needs a snapshot or checkpoint from before the trouble."""
    triggers: tuple[Trigger, ...] = ("bad_steps", "verdict")
    """What calls for an answer: steps whose loss or gradient is not finite, a task that is suspected to diverge, an
    alarm of the early warning."""
    skips: int = Field(default=10, ge=0)
    """With `skip` in the ladder: bad steps within `calm_steps`, and since the last action, that are simply gone on
    from. One more calls for the next rung."""
    tries: int = Field(default=5, ge=1)
    """How often `damp`, and `rollback`, are tried before the next rung."""
    patience_steps: int = Field(default=200, ge=1)
    """Steps that an action is given to work; a task that is suspected after them calls for the next try or rung."""
    calm_steps: int = Field(default=2000, ge=1)
    """After so many steps without a trigger the ladder begins at its foot again. At least as many as damping lasts."""
    max_actions: int = Field(default=10, ge=1)
    """Dampings and rollbacks of a whole run; what would be one more is a stop."""
    damp: DampConfig = DampConfig()
    """How a run is damped."""
    rollback_then: Literal["damp", "skip_data", "both", "in_turn"] = "in_turn"
    """How a run goes on after a rollback. `damp`: smaller steps. `skip_data`: what came before the trouble is learned
    again, and the windows of the log from that in which it began to that in which it was seen are left out (from the
    fourth time in a row on 1 more, then 3, ...). `both`. `in_turn`: `skip_data` three times, then `both`: it is not the
    data alone."""
    snapshot_every: int = Field(default=100, ge=1)
    """Steps between two snapshots in memory; none is taken while a task is suspected."""
    snapshot_budget_mb: float = Field(default=1024.0, ge=0)
    """What all snapshots may take together, in MB of 10^6 bytes; the oldest go first. 0 for none."""
    margin_steps: int = Field(default=100, ge=0)
    """A rollback goes back to more than so many steps before the trouble was seen to begin."""

    @model_validator(mode="after")
    def _check(self) -> "RecoveryConfig":
        if len(set(self.ladder)) < len(self.ladder) or self.ladder[-1:] != ("stop",):
            raise ValueError(
                f"ladder: expected each rung at most once and 'stop' last, since nothing comes after it; came "
                f"{list(self.ladder)}"
            )
        lasts = self.damp.steps + self.damp.restore_steps
        if self.calm_steps < max(lasts, self.patience_steps):
            raise ValueError(
                f"calm_steps: expected at least patience_steps ({self.patience_steps}) and the {lasts} steps that "
                f"damping lasts (damp.steps + damp.restore_steps), came {self.calm_steps}: what comes back with the "
                "full rate must still find the ladder where it was left; raise calm_steps"
            )
        return self


class Trouble(NamedTuple):
    """What was found at a flush."""

    kind: Trigger
    step: int
    """When it was seen."""
    since: int
    """The first step that shows it."""
    task: str
    """The task that it concerns; "" where it concerns all, or it cannot be told."""
    reason: str
    """What was seen, in words."""
    steps: int = 1
    """Of bad steps: how many there were since the last flush."""


class Action(NamedTuple):
    """What is to be done now; in the mode `advise`, what would be."""

    rung: Rung
    task: str
    """The guilty task; "" where it is not a single one."""
    since: int
    """The step at which the trouble began. A rollback goes to a state of more than `margin_steps` before it."""
    reason: str
    """What was found, and why this is the answer: a sentence."""
    times: int = 1
    """How often this rung was taken since the last calm."""
    damp: bool = False
    """Go on damped."""
    windows_to_skip: int = 0
    """After a rollback, how many windows of data to leave out, from the one on that was being read."""


class _Found(NamedTuple):
    """What calls for an answer now."""

    bad: list[Trouble]
    others: list[Trouble]
    borne: bool
    """There are few enough bad steps to go on from."""
    since: int


class Ladder:
    """Decides what is done about trouble: the lowest rung that fits, and the next one while that does not hold.

    - A rung is tried `tries` times; `skip` bears `skips` bad steps. What does not fit is passed over.
    - After an action nothing but further bad steps is answered for `patience_steps` (after a rollback also trouble that
      begins then); then a task that is suspected, a new one or still the old, calls for the next try or rung.
    - It never goes down, until `calm_steps` after the last trouble, borne bad steps aside, it is at its foot again.

    So each trouble ends in calm or in `stop`, at which the caller stops, and so does each run after `max_actions`.

    Where the mode is `advise` nothing was carried out, so no try is used up: each rung is named once between two calms.

    >>> ladder = Ladder(RecoveryConfig(mode="on", ladder=("skip", "damp", "rollback", "stop"), tries=2))
    >>> ladder.decide(120, [Trouble("bad_steps", 120, 113, "click", "the loss is not finite")], {}).rung
    'skip'
    >>> begun = Trouble("verdict", 140, 131, "click", "loss 9.1, usual 0.3")
    >>> ladder.decide(140, [begun], {"click": 131}).reason
    'click: loss 9.1, usual 0.3 (since step 131): damp, try 1 of 2'
    >>> ladder.decide(320, [], {"click": 131})
    >>> ladder.decide(340, [], {"click": 131}).reason
    'click: suspected to diverge (since step 131): damp, try 2 of 2, since 1 x damp did not hold'
    >>> ladder.decide(540, [], {"click": 131}, lambda since: since > 100).reason
    'click: suspected to diverge (since step 131): rollback, try 1 of 2, then leave out the windows of data ...'
    """

    def __init__(self, config: RecoveryConfig) -> None:
        self.config = config
        self._actions = 0
        self._bad: list[tuple[int, int]] = []
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._position = 0
        self._tried: dict[Rung, int] = {}
        self._acted: int | None = None
        self._troubled: int | None = None

    def decide(
        self,
        step: int,
        troubles: Sequence[Trouble],
        suspected: Mapping[str, int],
        can_roll_back: Callable[[int], bool] = lambda since: False,
    ) -> Action | None:
        """Return what is to be done at a flush; most often nothing.

        Args:
            step: Steps done; may be smaller than before after a rollback.
            troubles: What was found since the last flush.
            suspected: The tasks that are suspected now, with the step at which it began.
            can_roll_back: Says whether there is a state from well before the step at which the trouble began.
        """
        config = self.config
        if config.mode == "off":
            return None
        found = [trouble for trouble in troubles if trouble.kind in config.triggers]
        suspected = suspected if "verdict" in config.triggers else {}
        bad = [trouble for trouble in found if trouble.kind == "bad_steps"]
        others = [trouble for trouble in found if trouble.kind != "bad_steps"]
        self._bad = [(at, steps) for at, steps in self._bad if step - at < config.calm_steps]
        self._bad += [(trouble.step, trouble.steps) for trouble in bad]
        borne = "skip" in config.ladder and self._bad_steps() <= config.skips
        if others or suspected or (bad and not borne):
            self._troubled = max(step, self._troubled or 0)  # calm lies beyond the place, if steps are made again
        elif self._troubled is not None and step - self._troubled >= config.calm_steps:
            self._begin_anew()
        named = {trouble.task for trouble in others}
        others += [
            Trouble("verdict", step, since, task, "suspected to diverge")
            for task, since in suspected.items()
            if task not in named
        ]
        if self._waits(step):
            # A rollback has left nothing that needs patience: what begins after it is new.
            rolled, acted = config.ladder[self._position] == "rollback", self._acted or 0
            others = [trouble for trouble in others if rolled and trouble.since > acted]
        if not bad + others or (borne and not others and self._position > config.ladder.index("skip")):
            return None
        since = min([call.since for call in bad + others] + list(suspected.values()))
        return self._answer(step, _Found(bad, others, borne, since), can_roll_back)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to decide the same; plain values."""
        return {
            "rung": self.config.ladder[self._position],
            "tried": dict(self._tried),
            "acted": self._acted,
            "troubled": self._troubled,
            "actions": self._actions,
            "bad": [list(entry) for entry in self._bad],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; where its rung is no longer in the ladder, from the foot."""
        rungs = self.config.ladder
        self._position = rungs.index(state["rung"]) if state["rung"] in rungs else 0
        self._tried = dict(state["tried"])
        self._acted, self._troubled, self._actions = state["acted"], state["troubled"], state["actions"]
        self._bad = [(at, count) for at, count in state["bad"]]

    def _waits(self, step: int) -> bool:
        """Say whether the last action is still given time to work."""
        if self._acted is None:
            return False
        self._acted = min(self._acted, step)  # the steps before it may be made again after a rollback
        return step - self._acted < self.config.patience_steps

    def _bad_steps(self) -> int:
        """Return how many bad steps there were lately, since the last action."""
        return sum(steps for _, steps in self._bad)

    def _answer(self, step: int, found: _Found, can_roll_back: Callable[[int], bool]) -> Action | None:
        """Find the rung, and say why."""
        config, why = self.config, self._what_was_tried()
        if not found.borne and not found.others and "skip" in config.ladder:
            why.append(f"there were more than {config.skips} bad steps (recovery.skips)")
        position = self._position
        while not self._fits(config.ladder[position], found, can_roll_back):
            if config.ladder[position] == "rollback" and not can_roll_back(found.since):
                why.append(f"no state from more than {config.margin_steps} steps before it is kept to roll back to")
            position += 1
        rung, spent = config.ladder[position], self._actions >= config.max_actions
        if config.mode == "advise" and rung != "skip" and (spent or rung in self._tried):
            return None
        if spent and rung in ("damp", "rollback"):
            why = [f"all {config.max_actions} actions of this run (recovery.max_actions) are used up"]
            position = len(config.ladder) - 1
        return self._note(step, position, found, why)

    def _fits(self, rung: Rung, found: _Found, can_roll_back: Callable[[int], bool]) -> bool:
        if rung in ("skip", "stop"):
            return rung == "stop" or (found.borne and not found.others)
        if self.config.mode == "on" and self._tried.get(rung, 0) >= self.config.tries:
            return False
        return rung == "damp" or can_roll_back(found.since)

    def _note(self, step: int, position: int, found: _Found, why: list[str]) -> Action:
        """Remember that this rung is taken, and return it in words."""
        config, rung = self.config, self.config.ladder[position]
        self._position = position
        self._tried[rung] = times = self._tried.get(rung, 0) + 1
        answer: str = rung
        windows = 0
        if rung == "skip":
            answer += f", {self._bad_steps()} of {config.skips} bad steps that are borne"
        else:
            self._acted, self._bad = step, []
            self._actions += 1
        if rung in ("damp", "rollback"):
            answer += f", try {times} of {config.tries}"
        if rung == "rollback" and config.rollback_then != "damp":
            windows = 2 ** max(times - _SKIPS_ALONE, 0)
            further = f" and {windows - 1} more" if windows > 1 else ""
            answer += f", then leave out the windows of data in which it lay{further}"
        calls = [*found.bad, *found.others]
        tasks = {call.task for call in calls}
        first = min(calls, key=lambda call: call.since)
        what = f"{first.task}: {first.reason}" if first.task else first.reason
        more = f", and {len(calls) - 1} more" if len(calls) > 1 else ""
        because = f", since {' and '.join(why)}" if why else ""
        return Action(
            rung,
            task=tasks.pop() if len(tasks) == 1 else "",
            since=found.since,
            reason=f"{what} (since step {first.since}{more}): {answer}{because}",
            times=times,
            damp=rung == "damp" or (rung == "rollback" and self._damps(times)),
            windows_to_skip=windows,
        )

    def _damps(self, times: int) -> bool:
        then = self.config.rollback_then
        return then in ("damp", "both") or (then == "in_turn" and times > _SKIPS_ALONE)

    def _what_was_tried(self) -> list[str]:
        if self.config.mode == "advise":
            return []
        tried = [f"{times} x {rung}" for rung, times in self._tried.items() if rung in ("damp", "rollback")]
        return [f"{' and '.join(tried)} did not hold"] if tried else []


class _Damped(NamedTuple):
    factor: float
    since: int

    def scale(self, step: int, config: DampConfig) -> float:
        """Return the factor at a step: in full for `steps`, then back to exactly 1 by the same ratio in each step.

        >>> config = DampConfig(factor=0.25, steps=10, restore_steps=2)
        >>> [_Damped(0.25, 100).scale(step, config) for step in (101, 110, 111, 112)]
        [0.25, 0.25, 0.5, 1.0]
        """
        past = step - self.since - config.steps
        if past <= 0:
            return self.factor
        return self.factor ** (1 - past / config.restore_steps) if past < config.restore_steps else 1.0


def warm_up(step: int, steps: int) -> float:
    """Return the share of the learning rate that a step has while a run warms up: min(1, step / steps).

    >>> [warm_up(step, 4) for step in (1, 2, 4, 5)], warm_up(1, 0)
    ([0.25, 0.5, 1.0, 1.0], 1.0)
    """
    return step / steps if step < steps else 1.0


class _Changed(NamedTuple):
    """An option of a group that is changed for now."""

    group: dict[str, Any]
    option: str
    base: Any
    """Its own value."""
    damped: bool
    """It is damped, where something is."""


class Damper:
    """Makes the steps of all optimizers, or a task's share of the loss, smaller for a while.

    While the run warms up that is the learning rate; damped is what the configuration says. Both multiply.

    What it changes are options of the optimizers' groups, or `scales_K`, which the loss takes. Put back, they are what
    they were, bit for bit. Optimizers are saved and loaded inside `undamped()`, so that a state dict never holds
    a smaller rate: another run that starts from it is not damped for ever. A scheduler steps in there as well.

    Args:
        config: What is damped, how far and how long.
        optimizers: All of them, by name.
        tasks: Their names, in the order of the losses.
        device: Where the losses lie.
        warmup_steps: Steps over which the learning rates rise (`warm_up`); the bounds do not.

    >>> layer = torch.nn.Linear(2, 1)
    >>> sgd = torch.optim.SGD(layer.parameters(), lr=0.4)
    >>> damper = Damper(DampConfig(factor=0.25, steps=10, restore_steps=2), {"dense": sgd}, ["click"])
    >>> damper.begin(100)
    'steps x 0.25 for 10 steps, then back over 2'
    >>> for step in (101, 111, 112):
    ...     damper.apply(step)
    ...     print(sgd.param_groups[0]["lr"])
    0.1
    0.2
    0.4
    """

    def __init__(
        self,
        config: DampConfig,
        optimizers: Mapping[str, Optimizer],
        tasks: Sequence[str],
        device: torch.device | str = "cpu",
        warmup_steps: int = 0,
    ) -> None:
        self.config, self.optimizers, self.tasks = config, optimizers, list(tasks)
        self.warmup_steps = warmup_steps
        self.scales_K = torch.ones(len(self.tasks), device=device)
        """By what each task's loss is multiplied; changed in place."""
        self._damped: dict[str, _Damped] = {}
        self._scale = self._warm = 1.0  # what holds now
        self._changed: list[_Changed] = []

    def begin(self, step: int, task: str = "") -> str:
        """Damp from the next step on, and return what is done, in words.

        Args:
            step: Steps done.
            task: The guilty one; "" where it is not a single one.
        """
        config = self.config
        key = task if config.what == "task" and task in self.tasks and len(self.tasks) > 1 else ""
        now = self._damped[key].scale(step, config) if key in self._damped else 1.0
        factor = max(now * config.factor, LEAST_SCALE)
        self._damped[key] = _Damped(factor, step)
        return f"{self._describe(key)} x {factor:.3g} for {config.steps} steps, then back over {config.restore_steps}"

    def apply(self, step: int) -> None:
        """Set what holds for the step that is about to be made. Waits for no device; most often nothing is to do."""
        whole = self._scale
        for key, damped in list(self._damped.items()):
            scale = damped.scale(step, self.config)
            if scale == 1.0:
                del self._damped[key]
            if key:
                self.scales_K[self.tasks.index(key)] = scale
            else:
                whole = scale
        self._set(whole, warm_up(step, self.warmup_steps))

    @contextmanager
    def undamped(self) -> Iterator[None]:
        """Let the optimizers have their own options in the block, to be saved, loaded or changed."""
        scale, warm = self._scale, self._warm
        self._set(1.0, 1.0)
        try:
            yield
        finally:
            self._set(scale, warm)

    def state_dict(self) -> dict[str, Any]:
        """Return what is damped since when; plain values. The options themselves are saved with the optimizers.

        Of the warm-up there is nothing to remember: the number of the step tells.
        """
        return {key: list(damped) for key, damped in self._damped.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; `apply` then sets what holds."""
        self._set(1.0, 1.0)
        self.scales_K.fill_(1.0)
        known = {"", *self.tasks}
        self._damped = {key: _Damped(*damped) for key, damped in state.items() if key in known}

    def _set(self, scale: float, warm: float) -> None:
        """Multiply what is damped of all groups by `scale`, the rates by `warm`; 1 and 1 put all back exactly."""
        if (scale, warm) == (self._scale, self._warm):
            return
        if self._scale == self._warm == 1.0:
            self._changed = [
                _Changed(group, option, value.clone() if isinstance(value := group[option], Tensor) else value, damped)
                for optimizer in self.optimizers.values()
                for group in optimizer.param_groups
                for option, damped in self._options(group).items()
            ]
        for group, option, base, damped in self._changed:
            factor = (scale if damped else 1.0) * (warm if option == "lr" else 1.0)
            value = base if factor == 1.0 else base * factor
            if isinstance(value, Tensor):  # in place: a captured or compiled step has this very tensor
                group[option].copy_(value)
            else:
                group[option] = value
        self._scale, self._warm = scale, warm

    def _options(self, group: Mapping[str, Any]) -> dict[str, bool]:
        """Return the options of a group that may change, and whether they are damped."""
        bound = [option for option in _BOUND if option in group] if _has_bound(group) else []
        what = self.config.what if bound else "rate"
        return {"lr": what != "threshold", **dict.fromkeys(bound, what != "rate")}

    def _describe(self, key: str) -> str:
        if key:
            return f"the loss of '{key}'"
        what = {"rate": "learning rates", "threshold": "bounds"}.get(self.config.what, "steps")
        without = [f"'{name}'" for name, each in self.optimizers.items() if not all(map(_has_bound, each.param_groups))]
        if self.config.what == "threshold" and without:
            what += f" (the rate of {', '.join(without)}, which has none)"
        return what


def _has_bound(group: Mapping[str, Any]) -> bool:
    """Say whether the updates of a group are bounded; an infinite bound times a factor is no tighter."""
    return math.isfinite(group.get("absolute_threshold", math.inf))
