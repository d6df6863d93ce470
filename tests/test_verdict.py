"""Verdicts: traces of every kind, and what may not matter."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steadyrank.errors import CheckpointError, ConfigError
from steadyrank.monitors.verdict import Change, VerdictConfig, Verdicts, judge
from steadyrank.runs import RunFolder

WINDOW = 20


def noise(n: int, level: float = 0.8, spread: float = 0.01, seed: int = 0) -> np.ndarray:
    return level + spread * np.random.default_rng(seed).standard_normal(n)


def windows(*traces: Any, kind: Any = "binary") -> tuple[dict[str, Any], list[tuple[str, int, int]]]:
    """Return the one task's summary and its changes (verdict, step, since), with windows of 20 steps and no losses."""
    area = {"binary": "normalised_entropy", "regression": "normalised_rmse"}[kind]
    verdicts, changes, trace = Verdicts({"task": kind}), [], np.concatenate([np.atleast_1d(t) for t in traces])
    for i, value in enumerate(trace, start=1):
        changes += verdicts.add_window(WINDOW * i, {f"{area}/task": float(value)})
    changes += verdicts.final(WINDOW * len(trace))
    return verdicts.summary()["task"], [(c.verdict, c.step, c.since) for c in changes]


def losses(
    *traces: Any, metric: Any = None, stopped: bool = False
) -> tuple[dict[str, Any], list[tuple[str, int, int]]]:
    """The same with losses, and where `metric` (one for each 20 steps) is given with windows."""
    verdicts, changes, trace = Verdicts({"task": "binary"}), [], np.concatenate([np.atleast_1d(t) for t in traces])
    for i, start in enumerate(range(0, len(trace), WINDOW)):
        part = trace[start : start + WINDOW]
        changes += verdicts.add_losses(start + 1, part[:, None])
        if metric is not None:
            changes += verdicts.add_window(start + len(part), {"normalised_entropy/task": float(metric[i])})
    changes += verdicts.final(len(trace), stopped=stopped)
    return verdicts.summary()["task"], [(c.verdict, c.step, c.since) for c in changes]


# Windows


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_a_healthy_run_with_noise_is_healthy(kind: Any) -> None:
    assert windows([3.0, 1.1, 1.01], noise(500), kind=kind) == (
        {"verdict": "healthy", "since": None, "episodes": []},
        [],
    )


@pytest.mark.parametrize("peak", [0.95, 1.3, 50.0])
def test_a_window_far_above_the_others_that_recovers_is_a_micro_divergence(peak: float) -> None:
    summary, changes = windows(noise(30), peak, noise(10, seed=1))
    assert summary["verdict"] == "micro_divergence"
    assert summary["since"] == 601
    assert [(e["first"], e["last"]) for e in summary["episodes"]] == [(601, 620)]
    assert changes[0] == ("suspected", 620, 601)
    assert changes[1][0] == "recovered"
    assert changes[1][1] <= 680


def test_the_reason_says_what_was_seen() -> None:
    summary, _ = windows(np.full(30, 0.8), 1.2)
    assert summary["episodes"][0]["reason"] == (
        "normalised entropy 1.2, 500 robust standard deviations above its trailing median 0.8"
    )


@pytest.mark.parametrize("level", [1.05, 1.3, 50.0])
def test_a_metric_that_goes_above_1_and_stays_is_a_full_divergence(level: float) -> None:
    summary, changes = windows(noise(30), noise(15, level, 0.02))
    assert summary["verdict"] == "full_divergence"
    assert summary["since"] == 601
    assert [(e["first"], e["last"]) for e in summary["episodes"]] == [(601, None)]
    assert changes == [("suspected", 620, 601), ("full_divergence", 900, 601)]


def test_an_explosion_in_the_last_window_is_a_full_divergence() -> None:
    assert windows(noise(30), 50.0)[0]["verdict"] == "full_divergence"


def test_an_explosion_after_six_windows_is_seen() -> None:
    assert windows(noise(6), 3.0, noise(10))[1][0] == ("suspected", 140, 121)


@pytest.mark.parametrize(("history", "needed"), [(6, 5), (10, 4), (20, 3), (60, 3)])
def test_a_quiet_collapse_needs_as_many_windows_as_chance_does_not_make(history: int, needed: int) -> None:
    healthy, dead = 0.985 + 0.006 * np.sin(np.arange(history)), 1.0 + 0.0001 * np.arange(1, 11)
    share = 1 / (min(history, 20) + 2)
    assert share**needed < 1e-4 <= share ** (needed - 1)
    summary, changes = windows(healthy, dead)
    assert changes[0] == ("suspected", WINDOW * (history + needed), WINDOW * history + 1)
    assert summary["verdict"] == "full_divergence"
    assert "at 1 or above for" in summary["episodes"][0]["reason"]


def test_windows_from_before_the_first_below_1_are_not_remembered() -> None:
    _, changes = windows(np.full(8, 1.5), 0.985 + 0.006 * np.sin(np.arange(10)), np.full(6, 1.001))
    assert changes[0] == ("suspected", WINDOW * 22, WINDOW * 18 + 1)


@pytest.mark.parametrize("good", [3, 4])
def test_a_collapse_after_only_a_few_windows_is_seen(good: int) -> None:
    # Three windows below 1 in a row have learned: (1/5)^6 < 1e-4, and (1/6)^6.
    summary, changes = windows(np.full(good, 0.98), np.full(20, 1.001))
    assert changes[0] == ("suspected", WINDOW * (good + 6), WINDOW * good + 1)
    assert summary["verdict"] == "full_divergence"


def test_a_lucky_window_of_a_dead_model_is_no_recovery() -> None:
    dead = np.full(20, 1.001)
    dead[[7, 8, 14]] = 0.9998
    assert windows(noise(30, 0.985, 0.003), dead)[0]["verdict"] == "full_divergence"


def test_a_collapse_that_comes_back_below_1_at_a_worse_level_has_recovered() -> None:
    summary, changes = windows(noise(30, 0.9), noise(10, 1.05), noise(10, 0.96, 0.001))
    assert summary["verdict"] == "micro_divergence"
    assert [(e["first"], e["last"]) for e in summary["episodes"]] == [(601, 800)]
    assert changes[1] == ("recovered", 860, 601)
    cut_short = windows(noise(30, 0.9), noise(10, 1.05), 0.96)
    assert cut_short[0] == summary
    assert cut_short[1][-1] == ("recovered", 820, 601)


def test_a_lasting_change_of_level_below_1_is_no_divergence() -> None:
    summary, changes = windows(noise(30), noise(40, 0.9, 0.005))
    assert summary == {"verdict": "healthy", "since": None, "episodes": []}
    assert [change[0] for change in changes] == ["suspected", "dismissed"]


def test_after_a_change_of_level_a_spike_is_seen_again() -> None:
    summary, _ = windows(noise(30), noise(40, 0.9, 0.005), 1.2, noise(10, 0.9, 0.005))
    assert [e["first"] for e in summary["episodes"]] == [1401]


def test_a_run_that_ends_in_an_excursion_below_1_had_a_micro_divergence() -> None:
    summary, changes = windows(noise(30), 0.95)
    assert summary["verdict"] == "micro_divergence"
    assert summary["episodes"][0]["last"] is None
    assert changes[-1] == ("micro_divergence", 620, 601)


def test_a_task_that_never_lay_below_1_is_reported_apart() -> None:
    hopeless = noise(300, 1.02, 0.01)
    assert (hopeless < 1).any()
    assert windows(hopeless) == ({"verdict": "never_learned", "since": None, "episodes": []}, [])
    assert windows(noise(10, 1.0, 0.0), np.full(10, 50.0))[0]["verdict"] == "never_learned"


def test_a_rare_task_that_hovers_at_1_hardly_ever_seems_to_diverge() -> None:
    level_K = np.repeat([0.985, 0.99, 0.995, 1.0, 1.005], 20)
    metric_WK = np.vstack([np.full((3, 100), [[1.1], [1.03], [1.01]]), level_K + noise(20_000, 0.0).reshape(200, 100)])
    verdicts, changes = Verdicts({str(k): "binary" for k in range(100)}), []
    for i, row in enumerate(metric_WK.tolist(), start=1):
        changes += verdicts.add_window(WINDOW * i, {f"normalised_entropy/{k}": value for k, value in enumerate(row)})
    changes += verdicts.final(4060)
    assert sum(change.verdict == "suspected" for change in changes) <= 10
    assert "full_divergence" not in verdicts.current().values()


def test_a_window_cut_short_by_the_end_says_nothing() -> None:
    verdicts = Verdicts({"task": "binary"})
    for i, value in enumerate(noise(30), start=1):
        verdicts.add_window(WINDOW * i, {"normalised_entropy/task": float(value)})
    assert verdicts.add_window(609, {"normalised_entropy/task": 1.5}) == []
    assert len(verdicts.add_window(620, {"normalised_entropy/task": math.inf})) == 1


@pytest.mark.parametrize(("metric", "plain"), [("normalised_entropy", "log_loss"), ("normalised_rmse", "rmse")])
def test_windows_without_a_label_or_with_one_class_give_no_verdict(metric: str, plain: str) -> None:
    kind: Any = "binary" if plain == "log_loss" else "regression"
    verdicts = Verdicts({"masked": kind, "constant": kind, "unheard": kind})
    for step in range(20, 200, 20):
        verdicts.add_losses(step - 19, np.zeros((20, 3)), np.array([[False, True, False]] * 20))
        row = {f"{metric}/masked": math.nan, f"{plain}/masked": math.nan, "rows/masked": 0.0}
        row |= {f"{metric}/constant": math.nan, f"{plain}/constant": 0.01, "rows/constant": 100.0}
        assert verdicts.add_window(step, row) == []
    assert verdicts.final(180) == []
    assert set(verdicts.current().values()) == {"no_verdict"}


@pytest.mark.parametrize("plain", [math.nan, math.inf])
def test_scores_that_are_not_finite_count_at_once_and_are_forgotten(plain: float) -> None:
    verdicts = Verdicts({"task": "binary"})
    bad = {"normalised_entropy/task": math.nan, "log_loss/task": plain, "rows/task": 5.0}
    for i in range(1, 60):
        row = {"normalised_entropy/task": 0.8 + 0.001 * (i % 3), "log_loss/task": 0.5, "rows/task": 5.0}
        changes = verdicts.add_window(WINDOW * i, bad if i % 3 == 0 else row)
        assert [c.verdict for c in changes][-1:] == [["recovered"], [], ["suspected"]][i % 3 - 1] or i < 6
    first = verdicts.summary()["task"]["episodes"][0]
    assert first == {"first": 41, "last": 60, "reason": "scores are not finite"}
    spike = verdicts.add_window(WINDOW * 60, {"normalised_entropy/task": 1.1})
    assert [c.since for c in spike] == [1181]


def test_a_run_that_ends_with_scores_that_are_not_finite_has_diverged() -> None:
    summary, _ = windows(noise(3, 1.2), math.inf)  # even one that had not learned yet
    assert (summary["verdict"], summary["since"]) == ("full_divergence", 61)


# Losses


def test_what_is_over_between_two_windows_is_caught() -> None:
    trace = noise(400, 0.6)
    trace[205:211] = [3.0, 9.0, 4.0, 2.0, 1.5, 1.0]
    summary, changes = losses(trace, metric=noise(20))
    assert summary["episodes"][0]["first"] == 206
    assert summary["episodes"][0]["last"] == 211
    assert changes == [("suspected", 208, 206), ("recovered", 221, 206)] or changes[1][1] == 240
    assert summary["verdict"] == "micro_divergence"
    assert losses(trace)[0] == summary


def test_an_odd_batch_or_two_are_no_divergence() -> None:
    trace = noise(400, 0.6)
    trace[[150, 151, 200, 300, 301]] = 1e6
    assert losses(trace, metric=noise(20)) == ({"verdict": "healthy", "since": None, "episodes": []}, [])


def test_rare_and_heavy_tailed_losses_are_no_divergence() -> None:
    rng = np.random.default_rng(0)
    rare = 0.008 + 0.02 * rng.poisson(0.05, 6000) + 1e-4 * rng.standard_normal(6000)
    less_rare = 0.008 + 0.02 * rng.poisson(0.4, 6000) + 1e-4 * rng.standard_normal(6000)
    heavy = np.mean(rng.standard_t(2, (6000, 16)) ** 2, axis=1)
    for trace in (rare, less_rare, heavy):
        outside = (trace > np.median(trace) + 7 * 1.4826 * np.median(np.abs(trace - np.median(trace)))).mean()
        assert outside > 0.01  # so that 7 sigmas alone would not do
        assert losses(trace)[1] == []


def test_a_level_of_the_loss_that_lasts_is_dismissed_where_windows_lie_below_1() -> None:
    trace = np.concatenate([noise(300, 0.6), noise(400, 0.9)])
    summary, changes = losses(trace, metric=noise(35))
    assert summary == {"verdict": "healthy", "since": None, "episodes": []}
    assert changes == [("suspected", 303, 301), ("dismissed", 420, 301)]
    assert losses(trace)[0]["verdict"] == "full_divergence"  # nothing else is known there


def test_after_a_change_of_level_a_divergence_is_seen_again() -> None:
    trace = np.concatenate([noise(300, 0.6), noise(400, 0.9)])
    trace[600:610] = 5.0
    assert [e["first"] for e in losses(trace, metric=noise(35))[0]["episodes"]] == [601]


def test_a_loss_that_comes_back_while_the_metric_does_not_is_a_full_divergence() -> None:
    trace = noise(600, 0.6, 0.02)  # the loss of a constant lies within the noise of the healthy one
    trace[300:320] = 8.0
    metric = np.concatenate([noise(15, 0.98, 0.002), [14.0], np.full(14, 1.0005)])
    summary, changes = losses(trace, metric=metric)
    assert changes == [("suspected", 303, 301), ("full_divergence", 600, 301)]
    assert summary["since"] == 301


def test_a_loss_that_comes_back_at_the_end_is_judged_by_the_windows_that_follow() -> None:
    metric = 0.98 + 0.015 * np.sin(np.arange(30.0))  # so wide that 1.02 is not far
    trace = noise(600, 0.6)
    trace[560:566] = 8.0
    metric[28:] = [1.02, 1.02]
    changes = losses(trace, metric=metric)[1]
    assert changes == [("suspected", 563, 561), ("full_divergence", 600, 561)]
    trace[560:586] = np.where(np.arange(26) < 20, trace[:26], 8.0)
    metric[28] = 0.98  # the last window at 1 or above is the one that holds the excursion
    assert losses(trace, metric=metric)[1] == [("suspected", 583, 581), ("recovered", 600, 581)]


def test_a_loss_that_never_comes_back_says_little_of_a_task_with_one_class() -> None:
    verdicts = Verdicts({"task": "binary"})
    for i, level in enumerate([0.1] * 10 + [0.2] * 20, start=1):
        verdicts.add_losses(WINDOW * i - 19, noise(20, level, 0.001)[:, None])
        verdicts.add_window(WINDOW * i, {"normalised_entropy/task": math.nan, "log_loss/task": level, "rows/task": 9.0})
    verdicts.final(600)
    assert verdicts.current() == {"task": "no_verdict"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_seen_at_once(bad: float) -> None:
    skipped = losses(noise(5), bad, noise(200))
    assert skipped[1] == [("suspected", 6, 6), ("recovered", 16, 6)]
    assert skipped[0]["verdict"] == "micro_divergence"
    assert skipped[0]["episodes"] == [{"first": 6, "last": 6, "reason": "the loss is not finite"}]
    for metric in (np.full(16, math.nan), np.full(16, 1.2), noise(16)):
        stays = losses(noise(5), np.full(300, bad), metric=metric)
        assert stays[1] == [("suspected", 6, 6), ("full_divergence", 305, 6)]
    stopped = losses(noise(150), bad, noise(6), stopped=True)
    assert (stopped[0]["verdict"], stopped[0]["since"]) == ("full_divergence", 151)
    came_back = losses(noise(140), bad, noise(19), stopped=True)  # in the steps that ran before the host knew
    assert (came_back[0]["verdict"], came_back[0]["since"]) == ("full_divergence", 141)
    assert came_back[0]["episodes"][0]["last"] is None


def test_a_stop_for_a_gradient_blames_no_task_that_had_come_back() -> None:
    assert losses(noise(50), math.nan, noise(100), stopped=True)[0]["verdict"] == "micro_divergence"
    assert losses(noise(50), stopped=True)[0]["verdict"] == "healthy"
    assert windows(noise(10))[0]["verdict"] == "healthy"


def test_a_window_in_which_a_loss_was_not_finite_opens_no_second_episode() -> None:
    trace = noise(400, 0.6)
    trace[205] = math.nan
    metric = noise(20)
    metric[10] = math.inf
    summary, changes = losses(trace, metric=metric)
    assert changes == [("suspected", 206, 206), ("recovered", 240, 206)]
    assert summary["verdict"] == "micro_divergence"


def test_a_loss_without_a_label_says_nothing() -> None:
    verdicts = Verdicts({"task": "binary"})
    values, labelled = noise(300, 0.6), np.ones(300, bool)
    values[::3], labelled[::3] = math.nan, False
    values[240:260] = np.where(labelled[240:260], 5.0, 0.0)
    changes = verdicts.add_losses(1, values[:, None], labelled[:, None])
    assert [(c.verdict, c.since) for c in changes] == [("suspected", 242), ("recovered", 242)]


def test_no_steps_and_no_tasks_are_no_trouble() -> None:
    verdicts = Verdicts({"task": "binary"})
    assert verdicts.add_losses(1, np.zeros((0, 1))) == []
    assert verdicts.add_window(1, {}) == []
    assert verdicts.final(1, stopped=True) == []
    assert verdicts.current() == {"task": "no_verdict"}
    assert Verdicts({}).add_losses(1, np.zeros((3, 0))) == []
    with pytest.raises(ConfigError, match="2 columns for 1 tasks"):
        verdicts.add_losses(1, np.zeros((3, 2)))


# What may not matter


def traces(seed: int, steps: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return losses [T, K], which are labelled, and metrics [W, K] of four tasks with troubles at random places."""
    rng = np.random.default_rng(seed)
    losses_TK = 0.6 + 0.02 * rng.standard_normal((steps, 4))
    metric_WK = 0.97 + 0.01 * rng.standard_normal((steps // WINDOW, 4))
    metric_WK[:2] = 1.05
    for k in range(4):
        start, length = int(rng.integers(40, steps)), int(rng.choice([1, 4, 15, 120, steps]))
        losses_TK[start : start + length, k] += rng.choice([0.0, 0.3, 5.0, math.nan])
        metric_WK[start // WINDOW : (start + length) // WINDOW + 1, k] += rng.choice([0.0, 0.03, 0.3, math.inf])
    return losses_TK, rng.random(losses_TK.shape) < 0.9, metric_WK


def run(
    columns: list[int], seed: int, cut: int = WINDOW, resume_at: int | None = None, names: str = "abcdefgh"
) -> tuple[dict[str, Any], list[Change]]:
    """Judge some columns of the traces, their losses cut into flushes of `cut` steps."""
    losses_TK, labelled_TK, metric_WK = traces(seed)
    kinds: Any = {names[k]: "binary" for k in columns}
    config = VerdictConfig(steps=60, least_steps=20)
    verdicts, changes = Verdicts(kinds, config), []
    marks = sorted({*range(cut, len(losses_TK), cut), *range(WINDOW, len(losses_TK) + 1, WINDOW), resume_at or WINDOW})
    for start, stop in zip([0, *marks[:-1]], marks, strict=True):
        changes += verdicts.add_losses(start + 1, losses_TK[start:stop, columns], labelled_TK[start:stop, columns])
        if stop % WINDOW == 0:
            row = {f"normalised_entropy/{names[k]}": metric_WK[stop // WINDOW - 1, k] for k in columns}
            changes += verdicts.add_window(stop, row)
        if stop == resume_at:
            saved, verdicts = verdicts.state_dict(), Verdicts(kinds, config)
            verdicts.load_state_dict(saved)
    changes += verdicts.final(len(losses_TK))
    return verdicts.summary(), changes


@given(st.integers(0, 10**6), st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_the_order_of_the_tasks_does_not_matter(seed: int, order: list[int]) -> None:
    summary, changes = run([0, 1, 2, 3], seed)
    assert run(order, seed)[0] == summary
    assert sorted(run(order, seed)[1]) == sorted(changes)


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_another_task_changes_nothing_for_the_others(seed: int) -> None:
    summary, changes = run([0, 1], seed)
    more, more_changes = run([0, 1, 2], seed)
    assert {name: more[name] for name in summary} == summary
    assert [c for c in more_changes if c.task != "c"] == changes


@given(st.integers(0, 10**6), st.integers(1, 60))
@settings(max_examples=10, deadline=None)
def test_how_the_losses_are_cut_into_flushes_does_not_matter(seed: int, cut: int) -> None:
    assert run([0, 1, 2, 3], seed, cut) == run([0, 1, 2, 3], seed)


@pytest.mark.parametrize("seed", range(2))
def test_a_run_resumed_at_any_step_equals_the_straight_one(seed: int) -> None:
    straight = run([0, 1, 2, 3], seed)
    assert straight[1]
    for step in range(1, 400, 11):
        assert run([0, 1, 2, 3], seed, resume_at=step) == straight


@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from([math.nan, math.inf, -math.inf]))
@settings(max_examples=10, deadline=None)
def test_what_is_not_finite_never_blinds(seed: int, every: int, bad: float) -> None:
    """However much of the past was not finite, a divergence of the finite rest is seen."""
    trace = noise(900, 0.6, seed=seed)
    for block in range(0, 700, 30 + every):
        trace[block : block + every] = bad
    trace[800:806] = 5.0
    assert 801 in [e["first"] for e in losses(trace)[0]["episodes"]]
    metric = noise(200, seed=seed)
    metric[: 150 : every + 1] = bad
    metric[180] = 1.5
    assert 181 * WINDOW - WINDOW + 1 in [e["first"] for e in windows(metric)[0]["episodes"]]


def test_the_state_is_plain_and_belongs_to_its_tasks(tmp_path: Path) -> None:
    verdicts = Verdicts({"a": "binary", "b": "regression"})
    verdicts.add_losses(1, np.array([[0.5, math.nan]]))
    verdicts.add_window(20, {"normalised_entropy/a": 0.9})
    folder = RunFolder.create(tmp_path / "run")
    folder.checkpoints.save(1, {"verdicts": verdicts.state_dict()})  # refuses all but plain values and tensors
    other = Verdicts({"a": "binary", "b": "regression"})
    other.load_state_dict(folder.checkpoints.load()["verdicts"])
    assert other.summary() == verdicts.summary()
    with pytest.raises(CheckpointError, match="schema"):
        Verdicts({"b": "binary"}).load_state_dict(verdicts.state_dict())


def test_a_run_that_goes_on_after_its_end_is_judged_anew() -> None:
    verdicts = Verdicts({"task": "binary"})
    for i, value in enumerate([*noise(30), 1.5], start=1):
        verdicts.add_window(WINDOW * i, {"normalised_entropy/task": value})
    verdicts.final(620)
    assert verdicts.current() == {"task": "full_divergence"}
    assert [c.verdict for c in verdicts.add_window(640, {"normalised_entropy/task": 0.7})] == ["recovered"]
    assert verdicts.current() == {"task": "micro_divergence"}


def test_current_says_how_it_stands() -> None:
    verdicts, seen = Verdicts({"task": "binary"}), []
    for i, value in enumerate([1.2, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 2.0, 0.8], start=1):
        verdicts.add_window(WINDOW * i, {"normalised_entropy/task": value})
        seen.append(verdicts.current()["task"])
    assert seen == ["never_learned"] * 3 + ["healthy"] * 4 + ["suspected", "micro_divergence"]


def test_a_finished_run_is_judged_as_it_was_online(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    online = Verdicts({"a": "binary", "b": "regression"})
    for i, (a, b) in enumerate(zip(noise(40), [*noise(30), *noise(10, 1.3)], strict=True), start=1):
        row = {"normalised_entropy/a": a, "normalised_rmse/b": b, "auc/a": 0.7}
        folder.append("windows", WINDOW * i, row)
        online.add_window(WINDOW * i, row)
    online.final(800)
    judged = judge(folder.readings("windows"))
    assert judged.summary() == online.summary()
    assert judged.current() == {"a": "healthy", "b": "full_divergence"}
    assert judge(RunFolder.create(tmp_path / "empty").readings("windows")).summary() == {}
