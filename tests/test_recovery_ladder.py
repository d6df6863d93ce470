"""What the ladder of recovery decides: bounded, patient, and the same after a resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from steadyrank.checkpoints import Checkpoints
from steadyrank.recovery import Action, Ladder, RecoveryConfig, Trouble
from steadyrank.rescue import Rescue

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
