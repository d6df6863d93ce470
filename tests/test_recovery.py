"""Recovery: what the ladder decides is bounded, and what the damper changes comes back to the bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from steadyrank.checkpoints import Checkpoints
from steadyrank.optim import ClipGlobalNorm, ClipGradients, ClippyAdagrad, ClipUpdates
from steadyrank.optim.configs import OPTIMIZERS
from steadyrank.recovery import LEAST_SCALE, Action, DampConfig, Damper, Ladder, RecoveryConfig, Trouble
from steadyrank.rescue import Rescue
from steadyrank.snapshots import copy_state

Make = Callable[[list[nn.Parameter]], Optimizer]
MAKES: dict[str, Make] = {
    **{name: lambda params, made=made: made(params, lr=0.1) for name, made in OPTIMIZERS.items()},  # type: ignore[misc]
    "tensor_lr": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.1), foreach=False),
    "clippy_tensor_lr": lambda params: ClippyAdagrad(params, lr=torch.tensor(0.1)),
    "clip_updates": lambda params: ClipUpdates(torch.optim.SGD(params, lr=0.1, momentum=0.9)),
    "clip_gradients": lambda params: ClipGradients(torch.optim.SGD(params, lr=0.1), ClipGlobalNorm(1.0)),
    "two_groups": lambda params: torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.03}]),
}
WHATS = ("step", "rate", "threshold")
DAMP = DampConfig(factor=0.2, steps=4, restore_steps=7)


def as_json(state: Any) -> str:
    return json.dumps(state, sort_keys=True, default=lambda tensor: tensor.tolist())  # to the last bit


class Run:
    """A tiny model that is trained and damped."""

    def __init__(
        self, make: Make, config: DampConfig = DAMP, tasks: tuple[str, ...] = ("click",), warmup_steps: int = 0
    ) -> None:
        self.weights = [nn.Parameter(torch.linspace(0.2, 1, 6)), nn.Parameter(torch.ones(2, 3))]
        self.optimizer = make(self.weights)
        self.damper = Damper(config, {"dense": self.optimizer}, tasks, warmup_steps=warmup_steps)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            self.damper.apply(self.step)
            generator = torch.Generator().manual_seed(self.step)
            for weight in self.weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            self.optimizer.step()

    def save(self) -> dict[str, Any]:
        with self.damper.undamped():
            optimizer = copy_state(self.optimizer.state_dict())
        weights = [weight.detach().clone() for weight in self.weights]
        damper = json.loads(json.dumps(self.damper.state_dict()))
        return {"weights": weights, "optimizer": optimizer, "damper": damper, "step": self.step}

    def load(self, state: dict[str, Any]) -> None:
        with self.damper.undamped(), torch.no_grad():
            self.optimizer.load_state_dict(copy_state(state["optimizer"]))
            for weight, saved in zip(self.weights, state["weights"], strict=True):
                weight.copy_(saved)
        self.damper.load_state_dict(state["damper"])
        self.step = state["step"]

    def options(self) -> list[dict[str, Any]]:
        return [
            {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
            for group in ({k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups)
        ]


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_what_is_damped_comes_back_to_the_bit(make: Make, what: Any) -> None:
    run = Run(make, DampConfig(what=what, factor=0.3, steps=4, restore_steps=7))
    before = run.options()
    kept = run.optimizer.param_groups[0]["lr"]
    run.train(2)
    run.damper.begin(2)
    run.train(1)
    bounded = "absolute_threshold" in before[0]
    damped = run.options()
    assert damped != before
    for old, new in zip(before, damped, strict=True):
        rate = 0.3 if what != "threshold" or not bounded else 1.0
        assert new["lr"] == pytest.approx(rate * old["lr"])
        if bounded:
            bound = 0.3 if what != "rate" else 1.0
            assert new["absolute_threshold"] == pytest.approx(bound * old["absolute_threshold"])
            assert new["variable_relative_threshold"] == pytest.approx(bound * old["variable_relative_threshold"])
    run.train(3)
    assert run.options() == damped
    rates = []
    for _ in range(7):
        run.train(1)
        rates.append(run.options()[0])
    assert rates[-1] == before[0]
    for key in ("lr", "absolute_threshold") if bounded else ("lr",):
        ratios = [after[key] / earlier[key] for earlier, after in zip([damped[0], *rates], rates, strict=False)]
        assert ratios == pytest.approx([ratios[0]] * 7)
        assert all(type(each[key]) is float for each in rates)
    assert run.options() == before
    assert run.damper.state_dict() == {}
    if isinstance(kept, Tensor):
        assert run.optimizer.param_groups[0]["lr"] is kept


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("saved_at", [3, 8, 16])  # in full, coming back, over
def test_a_resume_in_the_middle_of_a_damping_changes_no_bit(make: Make, saved_at: int) -> None:
    whole = Run(make)
    whole.train(2)
    whole.damper.begin(2)
    whole.train(18)
    cut = Run(make)
    cut.train(2)
    cut.damper.begin(2)
    cut.train(saved_at - 2)
    resumed = Run(make)
    resumed.load(cut.save())
    resumed.train(20 - saved_at)
    cut.train(20 - saved_at)  # to save changes nothing either
    for other in (resumed, cut):
        assert other.step == whole.step == 20
        assert as_json(other.save()) == as_json(whole.save())
        for one, two in zip(other.weights, whole.weights, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_saved_state_holds_no_damped_rate(make: Make) -> None:
    run = Run(make)
    never = run.options()
    run.damper.begin(0)
    run.train(3)
    damped = run.options()
    state = run.save()
    assert run.options() == damped
    other = Run(make)  # of another run, that knows nothing of the damping
    other.optimizer.load_state_dict(copy_state(state["optimizer"]))
    assert other.options() == never


def test_a_rollback_keeps_the_damping_and_another_one_comes_on_top() -> None:
    run = Run(MAKES["adam"])
    state = run.save()
    run.train(5)
    run.damper.begin(5)
    run.train(1)
    with run.damper.undamped():
        run.optimizer.load_state_dict(copy_state(state["optimizer"]))
    assert run.options()[0]["lr"] == pytest.approx(0.2 * 0.1)
    run.damper.begin(6)
    run.train(1)
    assert run.options()[0]["lr"] == pytest.approx(0.04 * 0.1)
    for _ in range(9):
        run.damper.begin(run.step)
        run.train(1)
    assert run.options()[0]["lr"] == pytest.approx(LEAST_SCALE * 0.1)
    run.train(DAMP.steps + DAMP.restore_steps)
    assert run.options()[0]["lr"] == 0.1


def test_a_scheduler_in_the_undamped_block_reaches_the_rate_behind_the_damping() -> None:
    run = Run(MAKES["sgd"])
    run.damper.begin(0)
    run.train(1)
    with run.damper.undamped():
        assert run.optimizer.param_groups[0]["lr"] == 0.1
        run.optimizer.param_groups[0]["lr"] = 0.05
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 0.05)
    run.train(12)
    assert run.optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("name", ["clippy_adagrad", "clip_updates"])
@pytest.mark.parametrize(("what", "shrinks"), [("step", True), ("threshold", True), ("rate", False)])
def test_a_clipped_step_feels_the_bound_and_not_the_rate(name: str, what: Any, shrinks: bool) -> None:
    moved = []
    for damp in (False, True):
        run = Run(MAKES[name], DampConfig(what=what, factor=0.5))
        with torch.no_grad():
            run.weights[1].fill_(1e-3)  # so small that even half the rate is far beyond the bound
        if damp:
            run.damper.begin(0)
        before = run.weights[1].detach().clone()
        run.train(1)
        assert run.optimizer.state[run.weights[1]]["clip_factor"] < 0.5
        moved.append((run.weights[1] - before).abs().sum().item())
    assert moved[1] / moved[0] == pytest.approx(0.5 if shrinks else 1.0, rel=1e-4)


def test_a_task_is_damped_alone_and_comes_back() -> None:
    run = Run(MAKES["sgd"], DampConfig(what="task", factor=0.25, steps=2, restore_steps=2), ("click", "like", "buy"))
    scales_K = run.damper.scales_K
    assert run.damper.begin(0, "like").startswith("the loss of 'like' x 0.25")
    run.train(1)
    assert scales_K.tolist() == [1.0, 0.25, 1.0]
    run.damper.begin(1, "buy")
    assert run.damper.begin(1, "").startswith("steps x 0.25")
    run.train(2)
    assert scales_K.tolist() == [1.0, 0.5, 0.25]
    assert run.optimizer.param_groups[0]["lr"] == 0.025
    resumed = Run(MAKES["sgd"], run.damper.config, ("click", "like", "buy"))
    resumed.load(run.save())
    for each in (run, resumed):
        each.train(1)
        assert each.damper.scales_K.tolist() == [1.0, 1.0, 0.5]
        each.train(1)
        assert each.damper.scales_K.tolist() == [1.0, 1.0, 1.0]
        assert each.optimizer.param_groups[0]["lr"] == 0.1
    assert run.damper.scales_K is scales_K


def test_the_words_name_what_has_no_bound_and_a_single_task_is_damped_as_a_whole() -> None:
    optimizers = {"dense": Run(MAKES["clippy_adam"]).optimizer, "tables": Run(MAKES["adagrad"]).optimizer}
    damper = Damper(DampConfig(what="threshold"), optimizers, ["click"])
    assert damper.begin(0) == "bounds (the rate of 'tables', which has none) x 0.2 for 500 steps, then back over 1000"
    assert Run(MAKES["sgd"], DampConfig(what="task")).damper.begin(0, "click").startswith("steps")
    infinite = Run(lambda params: ClippyAdagrad(params, absolute_threshold=float("inf")), DampConfig(what="threshold"))
    assert "rate of 'dense'" in infinite.damper.begin(0)
    infinite.train(1)
    assert infinite.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 0.1)
    sudden = Run(MAKES["sgd"], DampConfig(steps=1, restore_steps=0))
    sudden.damper.begin(0)
    sudden.train(2)
    assert sudden.optimizer.param_groups[0]["lr"] == 0.1


# The warm-up.


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_rates_rise_by_the_step_and_nothing_else_changes(make: Make) -> None:
    run, steps = Run(make, warmup_steps=5), 8
    before = run.options()
    kept = run.optimizer.param_groups[0]["lr"]
    for step in range(1, steps + 1):
        run.train(1)
        for old, new in zip(before, run.options(), strict=True):
            assert new["lr"] == pytest.approx(old["lr"] * min(1, step / 5), rel=1e-6)  # a tensor's is float32
            assert {**new, "lr": 0} == {**old, "lr": 0}
    assert run.options() == before
    if isinstance(kept, Tensor):
        assert run.optimizer.param_groups[0]["lr"] is kept


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("name", ["clippy_adagrad", "adam", "clippy_tensor_lr", "two_groups"])
def test_warm_up_and_damping_multiply_and_a_bound_feels_the_damping_alone(name: str, what: Any) -> None:
    run = Run(MAKES[name], DampConfig(what=what, factor=0.5, steps=3, restore_steps=0), warmup_steps=8)
    before = run.options()
    bounded = "absolute_threshold" in before[0]
    run.train(2)
    run.damper.begin(2)
    for step in range(3, 12):
        run.train(1)
        damped = 0.5 if step <= 5 else 1.0
        for old, new in zip(before, run.options(), strict=True):
            rate = min(1, step / 8) * (damped if what != "threshold" or not bounded else 1.0)
            assert new["lr"] == pytest.approx(rate * old["lr"], rel=1e-6)
            if bounded:
                bound = damped if what != "rate" else 1.0
                assert new["absolute_threshold"] == pytest.approx(bound * old["absolute_threshold"])
    assert run.options() == before


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("damped_at", [None, 4])
def test_a_resume_in_the_middle_of_a_warm_up_changes_no_bit(make: Make, damped_at: int | None) -> None:
    runs = [Run(make, warmup_steps=12) for _ in range(3)]
    whole, cut, resumed = runs
    never = whole.options()
    for run in (whole, cut):
        run.train(4)
        if damped_at:
            run.damper.begin(damped_at)
    whole.train(14)
    cut.train(3)
    warm, state = cut.options(), cut.save()
    assert cut.options() == warm != never
    other = Run(make)  # of another run, that does not warm up
    other.optimizer.load_state_dict(copy_state(state["optimizer"]))
    assert other.options() == never
    resumed.load(state)
    for run in (resumed, cut):  # to save changes nothing either
        run.train(11)
        assert as_json(run.save()) == as_json(whole.save())


def test_a_rollback_warms_nothing_up_again() -> None:
    run = Run(MAKES["adam"], warmup_steps=10)
    run.train(1)
    state = run.save()
    run.train(5)
    with run.damper.undamped():
        run.optimizer.load_state_dict(copy_state(state["optimizer"]))
    assert run.options()[0]["lr"] == pytest.approx(0.6 * 0.1)
    run.train(1)
    assert run.options()[0]["lr"] == pytest.approx(0.7 * 0.1)


# The ladder.

ALWAYS: Callable[[int], bool] = lambda since: True  # noqa: E731 - an argument
QUICK = {
    "ladder": ("skip", "damp", "rollback", "stop"),
    "tries": 2,
    "rollback_then": "damp",
    "patience_steps": 100,
    "calm_steps": 400,
    "damp": {"steps": 100, "restore_steps": 100},
    "margin_steps": 50,
}


def quick(**options: Any) -> RecoveryConfig:
    return RecoveryConfig.model_validate({"mode": "on", **QUICK, **options})


def bad(step: int, steps: int = 1) -> Trouble:
    return Trouble("bad_steps", step, step, "", "a loss is not finite", steps)


def verdict(step: int, task: str = "click") -> Trouble:
    return Trouble("verdict", step, step - 5, task, "loss 9, usual 0.3")


def explode(config: RecoveryConfig, roll: Callable[[int], bool] = ALWAYS, until: int = 20_000) -> list[Action]:
    """Return what is done about a task that is suspected from step 20 on and never comes back."""
    ladder, actions = Ladder(config), []
    for step in range(20, until, 20):
        action = ladder.decide(step, [verdict(step)] if step == 20 else [], {"click": 15}, roll)
        actions += [action] if action else []
        if action and action.rung == "stop" and config.mode == "on":
            break
    return actions


def test_a_task_that_never_comes_back_climbs_to_the_end_with_patience() -> None:
    actions = explode(quick())
    assert [action.rung for action in actions] == ["damp", "damp", "rollback", "rollback", "stop"]
    assert [action.times for action in actions] == [1, 2, 1, 2, 1]
    assert [action.damp for action in actions] == [True, True, True, True, False]
    assert [action.windows_to_skip for action in actions] == [0] * 5
    assert {action.task for action in actions} == {"click"}
    assert {action.since for action in actions} == {15}
    assert actions[-1].reason == (
        "click: suspected to diverge (since step 15): stop, since 2 x damp and 2 x rollback did not hold"
    )


def test_what_cannot_be_rolled_back_is_passed_over_with_a_word() -> None:
    asked = []
    actions = explode(quick(tries=1), lambda since: bool(asked.append(since)))
    assert [action.rung for action in actions] == ["damp", "stop"]
    assert set(asked) == {15}
    assert "1 x damp did not hold and no state from more than 50 steps before it is kept" in actions[-1].reason


def test_repeated_rollbacks_leave_out_more_data() -> None:
    never, always, later = [False] * 5, [True] * 5, [False, False, False, True, True]
    for then, damp in (("skip_data", never), ("both", always), ("in_turn", later)):
        actions = explode(quick(ladder=["rollback", "stop"], tries=5, rollback_then=then))
        assert [action.windows_to_skip for action in actions] == [1, 1, 1, 2, 4, 0]
        assert [action.damp for action in actions] == [*damp, False]
        assert "then leave out the windows of data in which it lay" in actions[0].reason
        assert "in which it lay and 3 more" in actions[4].reason


def test_what_begins_after_a_rollback_is_answered_at_once_and_what_goes_on_with_patience() -> None:
    ladder = Ladder(quick(ladder=["rollback", "damp", "stop"], tries=2))
    rungs = []
    for step, since in ((100, 95), (120, 118), (140, 118), (160, 155)):
        trouble = Trouble("verdict", step, since, "click", "loss 9, usual 0.3")
        action = ladder.decide(step, [trouble], {"click": since}, ALWAYS)
        rungs.append(action.rung if action else None)
    assert rungs == ["rollback", "rollback", None, "damp"]
    later = Trouble("verdict", 180, 175, "click", "loss 9, usual 0.3")
    assert ladder.decide(180, [later], {"click": 175}, ALWAYS) is None  # damping needs its time


def test_all_actions_of_a_run_are_bounded() -> None:
    actions = explode(quick(max_actions=3))
    assert [action.rung for action in actions] == ["damp", "damp", "rollback", "stop"]
    assert "all 3 actions of this run (recovery.max_actions) are used up" in actions[-1].reason


def test_few_bad_steps_are_borne_and_many_climb() -> None:
    ladder = Ladder(quick(skips=3))
    first = ladder.decide(20, [bad(20, 2)], {})
    assert first is not None
    assert first.reason == "a loss is not finite (since step 20): skip, 2 of 3 bad steps that are borne"
    assert ladder.decide(40, [], {}) is None
    second = ladder.decide(440, [bad(440, 3)], {})  # those of step 20 are forgotten
    assert second is not None
    assert second.rung == "skip"
    many = ladder.decide(460, [bad(460)], {})
    assert many is not None
    assert many.rung == "damp"
    assert "since there were more than 3 bad steps (recovery.skips)" in many.reason
    assert ladder.decide(480, [bad(480, 3)], {}) is None  # borne again, and never down
    more = ladder.decide(500, [bad(500)], {}, ALWAYS)  # not even patience holds them
    assert more is not None
    assert (more.rung, more.times) == ("damp", 2)


def test_borne_bad_steps_do_not_keep_the_ladder_from_calm() -> None:
    ladder = Ladder(quick())
    assert ladder.decide(20, [verdict(20)], {}) is not None
    rungs = [ladder.decide(step, [bad(step)] if step % 200 == 0 else [], {}) for step in range(40, 1000, 20)]
    assert [action.rung for action in rungs if action] == ["skip"] * 2  # once calm is back
    again = ladder.decide(1000, [verdict(1000)], {})
    assert again is not None
    assert (again.rung, again.times) == ("damp", 1)


def test_without_skip_the_first_bad_step_calls_for_the_first_rung() -> None:
    action = Ladder(quick(ladder=["stop"])).decide(20, [bad(20)], {})
    assert action is not None
    assert action.reason == "a loss is not finite (since step 20): stop"


def test_a_second_task_waits_for_the_first_ones_action_and_is_then_answered() -> None:
    ladder = Ladder(quick())
    assert ladder.decide(20, [verdict(20)], {"click": 15}) is not None
    assert ladder.decide(40, [verdict(40, "like")], {"click": 15, "like": 35}) is None
    late = ladder.decide(120, [], {"like": 35, "click": 15}, ALWAYS)
    assert late is not None
    assert (late.rung, late.task, late.since) == ("damp", "", 15)
    assert "click: suspected to diverge (since step 15, and 1 more)" in late.reason
    recovered = Ladder(quick())
    assert recovered.decide(20, [verdict(20)], {"click": 15}) is not None
    assert recovered.decide(40, [], {"click": 15}) is None
    assert all(recovered.decide(step, [], {}) is None for step in range(60, 400, 20))
    again = recovered.decide(400, [verdict(400)], {"click": 395})  # 360 steps since it was open last: no calm yet
    assert again is not None
    assert (again.rung, again.times) == ("damp", 2)


def test_after_a_rollback_that_sets_the_steps_back_the_same_trouble_is_a_new_one() -> None:
    ladder = Ladder(quick(ladder=["rollback", "stop"]))
    action = ladder.decide(1000, [verdict(1000)], {"click": 995}, ALWAYS)
    assert action is not None
    assert (action.rung, action.since) == ("rollback", 995)
    assert ladder.decide(920, [], {}, ALWAYS) is None
    again = ladder.decide(1000, [verdict(1000)], {"click": 995}, ALWAYS)
    assert again is not None
    assert (again.rung, again.times) == ("rollback", 2)


@pytest.mark.parametrize(
    ("triggers", "answered"), [(["bad_steps"], [True, False, False]), (["alarm"], [False, False, True])]
)
def test_only_triggers_are_answered(triggers: list[str], answered: list[bool]) -> None:
    alarm = Trouble("alarm", 20, 20, "", "the gradient of 'top' is 30 times what is usual")
    for trouble, calls in zip([bad(20), verdict(20), alarm], answered, strict=True):
        suspected = {"click": 15} if trouble.kind == "verdict" else {}
        found = Ladder(quick(triggers=triggers)).decide(20, [trouble], suspected)
        assert (found is not None) == calls
        assert Ladder(quick(mode="off")).decide(20, [trouble], suspected) is None


def test_advice_is_given_once_for_each_rung_between_two_calms() -> None:
    assert [action.rung for action in explode(quick(mode="advise"))] == ["damp"]
    ladder, given = Ladder(quick(mode="advise", max_actions=3)), []
    for step in range(20, 20_000, 20):
        found = [bad(step, 20)] if step % 1000 < 100 else []
        action = ladder.decide(step, found, {})
        given += [(step, action.rung)] if action else []
    assert given == [(20, "damp"), (1000, "damp"), (2000, "damp")]


CONFIGS = st.builds(
    lambda rungs, mode, skips, tries, patience, most, then: quick(
        ladder=[*rungs, "stop"],
        mode=mode,
        skips=skips,
        tries=tries,
        patience_steps=patience,
        max_actions=most,
        rollback_then=then,
        triggers=["bad_steps", "verdict", "alarm"],
    ),
    st.lists(st.sampled_from(["skip", "damp", "rollback"]), unique=True),
    st.sampled_from(["on", "advise"]),
    st.integers(0, 4),
    st.integers(1, 3),
    st.integers(1, 400),
    st.integers(1, 5),
    st.sampled_from(["damp", "skip_data", "both"]),
)
FLUSHES = st.lists(
    st.tuples(
        st.sampled_from([20, 20, 20, 100, 450]),
        st.lists(st.sampled_from([bad(0), bad(0, 5), verdict(0), verdict(0, "like"), Trouble("alarm", 0, 0, "", "a")])),
        st.sets(st.sampled_from(["click", "like"])),
        st.booleans(),
    ),
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(CONFIGS, FLUSHES)
def test_whatever_comes_is_bounded_climbs_and_resumes(config: RecoveryConfig, flushes: list[Any]) -> None:
    ladder, resumed = Ladder(config), Ladder(config)
    step, actions, last, position = 0, 0, 0, 0
    advised: list[str] = []
    for apart, kinds, names, can in flushes:
        step += apart
        troubles = [trouble._replace(step=step, since=step - 5) for trouble in kinds]
        suspected = dict.fromkeys(sorted(names), step - 10)
        saved = json.loads(json.dumps(resumed.state_dict()))
        resumed = Ladder(config)
        resumed.load_state_dict(saved)
        action = ladder.decide(step, troubles, suspected, lambda since, can=can: can)
        assert resumed.decide(step, troubles, suspected, lambda since, can=can: can) == action
        if action is None:
            assert not (
                config.mode == "on" and "skip" not in config.ladder and any(t.kind == "bad_steps" for t in troubles)
            )
            continue
        assert action.rung in config.ladder
        assert action.rung != "rollback" or can
        assert action.since <= step - 5
        if step - last >= config.calm_steps:
            position, advised = 0, []  # there may have been a calm
        assert config.ladder.index(action.rung) >= position
        if action.rung == "skip":
            assert action.times == 1 or position <= config.ladder.index("skip")
            continue
        position, last = config.ladder.index(action.rung), step
        actions += 1
        if config.mode == "advise":
            assert action.rung not in advised
            assert actions <= config.max_actions
            advised.append(action.rung)
        elif action.rung == "stop":
            break
        else:
            assert actions <= config.max_actions
            assert action.times <= config.tries


@settings(max_examples=30, deadline=None)
@given(CONFIGS.filter(lambda config: config.mode == "on"), st.booleans(), st.booleans())
def test_what_does_not_end_ends_in_a_stop(config: RecoveryConfig, can: bool, verdicts: bool) -> None:
    ladder, taken = Ladder(config), []
    for step in range(20, 20 + (config.patience_steps + 20) * 2 * (config.max_actions + 1), 20):
        troubles, suspected = ([], {"click": 15}) if verdicts else ([bad(step, 20)], {})
        action = ladder.decide(step, troubles, suspected, lambda since: can)
        taken += [action.rung] if action else []
        if "stop" in taken:
            break
    assert taken[-1] == "stop"
    assert taken == sorted(taken, key=config.ladder.index)


def test_a_ladder_that_lost_its_rung_begins_at_the_foot() -> None:
    ladder = Ladder(quick())
    assert ladder.decide(20, [verdict(20)], {}) is not None
    other = Ladder(quick(ladder=["rollback", "stop"]))
    other.load_state_dict(ladder.state_dict())
    action = other.decide(200, [verdict(200)], {}, ALWAYS)
    assert action is not None
    assert action.rung == "rollback"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ladder": []}, "'stop' last"),
        ({"ladder": ["damp"]}, "'stop' last"),
        ({"ladder": ["damp", "damp", "stop"]}, "at most once"),
        ({"calm_steps": 1499}, "the 1500 steps that damping lasts"),
        ({"patience_steps": 3000}, "patience_steps (3000)"),
        ({"damp": {"factor": 1.0}}, "less than 1"),
        ({"damp": {"factor": 1e-4}}, "greater than or equal to 0.001"),
        ({"rollback_then": "retry"}, "'skip_data', 'both' or 'in_turn'"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as error:
        RecoveryConfig.model_validate(options)
    assert words in str(error.value)


def make_rescue(tmp_path: Path) -> Rescue:
    model = torch.nn.Linear(2, 1)
    optimizers = {"dense": torch.optim.SGD(model.parameters(), lr=0.1)}
    return Rescue(quick(), optimizers, ["click"], torch.device("cpu"), Checkpoints(tmp_path))


def test_the_windows_of_a_trouble_are_left_out_and_their_rows_counted_once(tmp_path: Path) -> None:
    rescue = make_rescue(tmp_path)
    for step in range(1, 101):
        rescue.note_window(step, step // 10)
    rescue.leave_out(since=35, last=5, windows=1)  # it began in window 3 and was seen in window 5
    read = [(window, batch) for window in range(10) for batch in range(1, 11)]
    left_out = [window for window, batch in read if rescue.leaves_out(window, batch, rows=7)]
    assert sorted(set(left_out)) == [3, 4, 5]
    assert rescue.rows_skipped == 3 * 10 * 7
    again = make_rescue(tmp_path)
    again.load_state_dict(rescue.state_dict())
    again.leave_out(since=60, last=6, windows=2)  # what was left out before stays so
    assert sorted({window for window, batch in read if again.leaves_out(window, batch, rows=7)}) == [3, 4, 5, 6, 7]
    assert again.rows_skipped == 5 * 10 * 7
    again.leave_out(since=15, last=1, windows=1)  # an earlier one, that was learned the first time
    assert sum(again.leaves_out(window, batch, rows=7) for window, batch in read) == 6 * 10
    assert again.rows_skipped == 6 * 10 * 7


def test_a_trouble_that_began_in_a_window_that_is_left_behind_takes_the_oldest_that_is_known(tmp_path: Path) -> None:
    rescue = make_rescue(tmp_path)
    rescue.leave_out(since=5, last=2, windows=1)
    assert [w for w in range(5) if rescue.leaves_out(w, 1, 1)] == [2]
