"""Signs of a divergence that is coming: each is seen where it is, and none where all is calm."""

import copy
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steadyrank import CheckpointError
from steadyrank.monitors.warning import Alert, EarlyWarning, WarningConfig

TASKS, PARAMETERS = ["click", "like"], ["trunk.weight", "trunk.bias", "head.weight"]
SIGNALS = len(TASKS) + len(PARAMETERS)


def calm(steps: int, seed: int = 0) -> np.ndarray:
    """Return signals of several sizes that vary by a fifth."""
    drawn = np.random.default_rng(seed).normal(size=(steps, SIGNALS))
    return 10.0 ** -np.arange(SIGNALS) * np.exp(0.2 * drawn)


def watch(signals_TS: np.ndarray, flush: int = 20, early: EarlyWarning | None = None, first: int = 1) -> list[Alert]:
    early = early or EarlyWarning(TASKS, PARAMETERS)
    k, found = len(TASKS), []
    for t in range(0, len(signals_TS), flush):
        part = signals_TS[t : t + flush]
        found += early.add_steps(first + t, part[:, :k], part[:, k:])
    return found


def kinds(alerts: list[Alert]) -> list[tuple[int, str, str, str]]:
    return [(alert.step, alert.sign, alert.task, alert.layer) for alert in alerts]


def test_calm_signals_are_no_sign() -> None:
    assert watch(calm(1000)) == []
    assert watch(np.repeat(calm(1), 300, axis=0)) == []  # flat: a band of no width
    assert watch(np.zeros((300, SIGNALS))) == []


@pytest.mark.parametrize(
    ("column", "sign", "task", "layer"),
    [
        (0, "logit", "click", ""),
        (1, "logit", "like", ""),
        (2, "gradient", "", "trunk.weight"),
        (4, "gradient", "", "head.weight"),
    ],
)
def test_a_leap_names_its_first_step_and_what_leapt(column: int, sign: str, task: str, layer: str) -> None:
    signals = calm(200)
    signals[150:155, column] *= 40
    [alert] = watch(signals)
    assert (alert.step, alert.level, alert.sign, alert.task, alert.layer) == (151, "alarm", sign, task, layer)
    [(name, value)] = [pair for pair in alert.quantities.items() if pair[0] != "times"]
    assert name == f"{sign}_max/{task or layer}"
    assert value == pytest.approx(signals[150, column], rel=1e-6)
    # The 100 steps before the flush at step 160, in decades.
    times = signals[150, column] / 10 ** np.median(np.log10(signals[40:140, column]))
    assert alert.quantities["times"] == pytest.approx(times, rel=1e-6)
    assert alert.reason == f"the largest {sign} of {task or layer} is {times:,.0f} times its usual level"


def test_the_furthest_of_several_is_named_and_a_small_factor_is_none() -> None:
    signals = calm(200)
    signals[150, 2] *= 40
    signals[150, 4] *= 4000
    assert kinds(watch(signals)) == [(151, "gradient", "", "head.weight")]
    signals = calm(200)
    signals[150:, 2:] *= 5  # out of the band by far, but not ten times
    assert watch(signals) == []
    noisy = 10.0 ** np.random.default_rng(0).normal(size=(200, SIGNALS))
    noisy[150] = 100.0  # a hundred times, but within seven deviations of such signals
    assert watch(noisy) == []


@pytest.mark.parametrize("steps", [0, 1, 20, 38])
def test_with_a_short_history_only_what_is_not_finite_is_a_sign(steps: int) -> None:
    early = EarlyWarning(TASKS, PARAMETERS)
    assert watch(calm(steps), early=early) == []
    leap = calm(1) * 1e6
    assert watch(leap, early=early, first=steps + 1) == []
    leap[0, 3] = math.inf
    [alert] = watch(leap, early=early, first=steps + 2)
    assert (alert.sign, alert.layer) == ("gradient", "trunk.bias")
    assert alert.quantities == {"gradient_max/trunk.bias": math.inf, "times": math.inf}
    assert alert.reason == "the largest gradient of trunk.bias is not finite"


def test_a_signal_that_comes_late_needs_a_history_of_its_own() -> None:
    signals = calm(300)
    signals[:150, 4] = math.nan
    signals[170, 4] *= 100  # after 20 values
    signals[250, 4] *= 100  # after 99
    assert kinds(watch(signals)) == [(251, "gradient", "", "head.weight")]
    signals[170, 4] = math.inf
    assert kinds(watch(signals)) == [(171, "gradient", "", "head.weight")]


def test_a_short_memory_has_a_band_too() -> None:
    early = EarlyWarning(TASKS, PARAMETERS, WarningConfig(band_steps=10))
    signals = calm(60)
    signals[50, 2] *= 100
    assert kinds(watch(signals, flush=10, early=early)) == [(51, "gradient", "", "trunk.weight")]


def test_nan_and_infinity_do_not_blind() -> None:
    signals = calm(400)
    signals[100:115] = math.nan  # a stretch without readings
    signals[115:120, 2:] = math.inf
    signals[330, 2] *= 40
    found = watch(signals)
    assert kinds(found) == [(116, "gradient", "", "trunk.weight"), (331, "gradient", "", "trunk.weight")]
    assert watch(np.full((300, SIGNALS), math.nan)) == []


def test_the_largest_numbers_of_float32_are_finite() -> None:
    signals = calm(100)
    signals[60, 2] = 3.4e38
    [alert] = watch(signals)
    assert alert.quantities["gradient_max/trunk.weight"] == pytest.approx(3.4e38)


def test_a_sign_is_reported_once_in_so_many_steps_and_then_again() -> None:
    signals = calm(500)
    for step in (150, 200, 280, 352, 451):
        signals[step - 1, 2] *= 60
    early = EarlyWarning(TASKS, PARAMETERS, WarningConfig(quiet_steps=100))
    assert [alert.step for alert in watch(signals, flush=10, early=early)] == [150, 280, 451]
    # Each sign has its own silence.
    signals[154, 0] *= 60
    early = EarlyWarning(TASKS, PARAMETERS, WarningConfig(quiet_steps=100))
    assert [(a.step, a.sign) for a in watch(signals, flush=10, early=early)][:2] == [(150, "gradient"), (155, "logit")]


def look(early: EarlyWarning, step: int, *updates: float) -> list[Alert]:
    names = ("trunk.weight", "head.weight", "cross.weight")
    return early.add_dynamics(step, {f"update_over_bound/{n}": v for n, v in zip(names, updates, strict=False)})


def matrices() -> EarlyWarning:
    return EarlyWarning(TASKS, PARAMETERS, matrices=["trunk.weight", "head.weight", "cross.weight"])


def test_large_updates_in_half_of_the_matrices_look_after_look_are_an_alarm() -> None:
    early = matrices()
    assert [look(early, step, 1.5, 3.0, 0.2) for step in (200, 210)] == [[], []]
    [alert] = look(early, 220, 1.5, 3.0, 0.2)
    assert (alert.step, alert.level, alert.sign, alert.layer) == (220, "alarm", "update", "head.weight")
    assert alert.quantities == {"update_over_bound": 1.5}
    assert "1.5 times what Clippy would allow" in alert.reason
    assert look(early, 230, 1.5, 3.0, 0.2) == []  # reported


@pytest.mark.parametrize("updates", [(0.9, 5.0, 0.2), (1.0, 1.0, 1.0), (1.0, 1.0), (), (math.nan, 0.5, 0.5)])
def test_updates_within_the_bound_or_in_a_few_matrices_are_no_sign(updates: tuple[float, ...]) -> None:
    early = matrices()
    assert [alert for step in range(200, 400, 10) for alert in look(early, step, *updates)] == []


def test_one_wild_look_a_warm_up_and_what_is_no_matrix_are_no_sign() -> None:
    early = matrices()
    assert [a for step in (200, 210, 220, 230) for a in look(early, step, *[9.0 if step == 210 else 0.5] * 3)] == []
    early = matrices()
    assert [alert for step in range(10, 101, 10) for alert in look(early, step, 9.0, 9.0)] == []
    assert kinds(look(early, 110, 9.0, 9.0)) == [(110, "update", "", "trunk.weight")]
    assert early.add_dynamics(400, {"update_over_bound/trunk.bias": 99.0}) == []


def test_a_refused_step_is_no_look_and_an_infinite_one_is() -> None:
    early = matrices()
    for step in (200, 210):
        look(early, step, 2.0, 2.0)
    assert look(early, 220, 0.0, 0.0) == []
    assert kinds(look(early, 230, 2.0, 2.0)) == [(230, "update", "", "trunk.weight")]
    early = matrices()
    for step in (200, 210):
        look(early, step, math.inf, math.inf)
    [alert] = look(early, 220, math.inf, math.inf)
    assert alert.quantities == {"update_over_bound": math.inf}


def dead(early: EarlyWarning, *shares: float, first: int = 200) -> list[Alert]:
    return [a for i, share in enumerate(shares) for a in early.add_dynamics(first + 10 * i, {"dead_frac/all": share})]


def test_units_that_fall_silent_quickly_are_a_notice() -> None:
    config = WarningConfig(dead_looks=3)
    [alert] = dead(EarlyWarning(TASKS, PARAMETERS, config), 0.2, 0.2, 0.3, 0.4, 0.52, 0.6)
    # 0.2 to 0.52 is four tenths of those that were alive.
    assert (alert.step, alert.level, alert.sign) == (240, "notice", "dead_units")
    assert alert.reason == "40% of the live units fell silent within 3 looks; 52% are dead"
    assert alert.quantities == {"dead_frac/all": 0.52}


@pytest.mark.parametrize("shares", [
    (0.5,) * 20, tuple(np.linspace(0.0, 0.5, 40)), (0.9, 0.5, 0.1, 0.0), (1.0,) * 20, (math.nan,) * 20, (0.0, 0.9, 0.9),
])  # fmt: skip
def test_units_that_are_dead_wake_up_or_fade_slowly_are_none(shares: tuple[float, ...]) -> None:
    assert dead(EarlyWarning(TASKS, PARAMETERS, WarningConfig(dead_looks=3)), *map(float, shares)) == []


def test_shares_that_are_lost_are_passed_over() -> None:
    config = WarningConfig(dead_looks=3)
    shares = (0.2, math.nan, 0.2, 0.3, math.nan, 0.4, 0.5)
    found = dead(EarlyWarning(TASKS, PARAMETERS, config), *shares)
    assert [alert.quantities for alert in found] == [{"dead_frac/all": 0.5}]


def trace(seed: int) -> tuple[np.ndarray, list[dict[str, float]]]:
    """Return signals of 400 steps, and a look after every 20th, with every sign in them."""
    signals = calm(400, seed)
    signals[130:135, 2] *= 50
    signals[211, 1] *= 90
    signals[300:310] = math.nan
    signals[331, 3] = math.inf
    shares = np.concatenate([np.full(12, 0.1), np.linspace(0.1, 0.9, 8)])
    bounds = np.concatenate([np.full(8, 0.4), np.full(12, 2.0)])
    looks = [
        {
            "update_over_bound/trunk.weight": float(b),
            "update_over_bound/head.weight": float(b),
            "dead_frac/all": float(d),
        }
        for b, d in zip(bounds, shares, strict=True)
    ]
    return signals, looks


def run(stops: set[int], seed: int = 0) -> list[Alert]:
    signals, looks = trace(seed)
    config = WarningConfig(quiet_steps=50, dead_looks=3)
    early, found = EarlyWarning(TASKS, PARAMETERS, config), []
    for i, row in enumerate(looks):
        if i in stops:
            state, early = copy.deepcopy(early.state_dict()), EarlyWarning(TASKS, PARAMETERS, config)
            early.load_state_dict(state)
        found += watch(signals[20 * i : 20 * i + 20], early=early, first=20 * i + 1)
        found += early.add_dynamics(20 * i + 20, row)
    return found


def test_a_resume_at_any_flush_sees_what_a_straight_run_sees() -> None:
    straight = run(set())
    assert {alert.sign for alert in straight} == {"gradient", "logit", "update", "dead_units"}
    for stop in range(20):
        assert run({stop}) == straight
    assert run(set(range(20))) == straight


def test_the_state_is_plain() -> None:
    early = EarlyWarning(TASKS, PARAMETERS)
    watch(calm(50), early=early)
    early.add_dynamics(200, {"update_over_bound/trunk.weight": np.float64(2.0), "dead_frac/all": np.float64(0.5)})

    def types_of(value: Any) -> set[type]:
        if isinstance(value, dict | list):
            values = value.values() if isinstance(value, dict) else value
            return set().union(*(types_of(each) for each in values)) if value else set()
        return {type(value)}

    assert {each.__name__ for each in types_of(early.state_dict())} <= {"Tensor", "float", "int", "str"}


def test_a_state_of_other_signals_is_refused() -> None:
    state = EarlyWarning(TASKS, PARAMETERS).state_dict()
    with pytest.raises(CheckpointError, match="resume with the configuration"):
        EarlyWarning(TASKS, PARAMETERS[:1]).load_state_dict(state)


@given(order=st.permutations(range(len(PARAMETERS))), seed=st.integers(0, 20), flush=st.sampled_from([5, 20, 33]))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_parameters_is_irrelevant(order: list[int], seed: int, flush: int) -> None:
    signals, looks = trace(seed)
    k = len(TASKS)
    found = []
    for places in (list(range(len(PARAMETERS))), order):
        columns = [*range(k), *(k + place for place in places)]
        early = EarlyWarning(TASKS, [PARAMETERS[place] for place in places], WarningConfig(quiet_steps=50))
        found.append(watch(signals[:, columns], flush=flush, early=early))
        found[-1] += [a for i, row in enumerate(looks) for a in early.add_dynamics(20 * i, dict(sorted(row.items())))]
    assert found[0] == found[1]
    assert found[0]
