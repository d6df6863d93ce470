"""What a run needs that is one of many: no report, an end once nothing is left to see, and a warm-up."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steadyrank.config import RunConfig
from steadyrank.errors import ConfigError, DivergenceError
from steadyrank.monitors.verdict import Verdicts
from steadyrank.runs import RunFolder
from steadyrank.sequential import Progress, run

from .days import log, write_day
from .test_sequential import KilledError, check_same_run
from .test_survival import log_in
from .tiny import tiny

CELL = ("train.report=false", "watch.causes=0", "train.give_up_windows=3")


# When a run is hopeless, on made-up windows.

GOOD = [0.8, 0.81, 0.79, 0.8, 0.82, 0.78, 0.8, 0.81, 0.79, 0.8]
DEAD = [3.0, 1.5, 1.2, 1.1, 1.01]


def hopeless(windows: int, **traces: list[float]) -> list[str]:
    """Return what is said after each window, by a state that is saved and loaded before each."""
    verdicts, said = Verdicts(dict.fromkeys(traces, "binary")), list[str]()
    for step, values in enumerate(zip(*traces.values(), strict=True), start=1):
        state = json.loads(json.dumps(verdicts.state_dict(), default=lambda tensor: tensor.tolist()))
        for band in ("loss_band", "window_band"):
            state[band] = verdicts.state_dict()[band]
        verdicts = Verdicts(dict.fromkeys(traces, "binary"))
        verdicts.load_state_dict(state)
        row = {f"normalised_entropy/{task}": value for task, value in zip(traces, values, strict=True)}
        verdicts.add_window(step * 10, {name: value for name, value in row.items() if not math.isnan(value)})
        said.append(verdicts.hopeless(windows))
    return said


def first_of(said: list[str]) -> int | None:
    """Return the window, counted from 1, after which a run is hopeless."""
    return next((i for i, reason in enumerate(said, start=1) if reason), None)


def test_a_run_is_hopeless_after_so_many_windows_of_a_divergence_and_not_before() -> None:
    for windows in range(1, 6):
        assert first_of(hopeless(windows, click=GOOD + DEAD)) == len(GOOD) + windows
    assert first_of(hopeless(6, click=GOOD + DEAD)) is None
    assert hopeless(5, click=GOOD + DEAD)[-1] == (
        "every task that had learned (click) has diverged: normalised entropy, or RMSE over that of the running mean, "
        "at 1 or above, or not finite, in each of the last 5 windows"
    )


def test_what_comes_back_begins_anew_and_a_window_without_a_label_says_nothing() -> None:
    assert first_of(hopeless(3, click=[*GOOD, 3.0, 3.0, 0.7, 3.0, 3.0])) is None
    assert first_of(hopeless(3, click=[*GOOD, 3.0, 3.0, 0.7, 3.0, 3.0, 3.0])) == 16
    assert first_of(hopeless(3, click=[*GOOD, 3.0, math.nan, 3.0, math.nan, 3.0])) == 15


def test_windows_at_1_count_once_the_episode_is_open() -> None:
    said = hopeless(2, click=GOOD + [1.02] * 8)
    opened = 11  # far above the others: at once
    assert first_of(said) == opened + 1
    noisy = [0.9, 1.1, 0.95, 0.8, 0.9, 1.05] * 3 + [0.9, 0.8, 0.9, 0.8]
    found = first_of(hopeless(2, click=noisy + [1.04] * 12))
    assert found is not None
    assert found > len(noisy) + 4  # a task that is often above 1 needs more of them


def test_all_tasks_that_had_learned_must_be_lost_and_the_others_have_no_say() -> None:
    never, good = [1.05] * 15, GOOD + [0.8] * 5
    assert first_of(hopeless(3, click=GOOD + DEAD, like=good)) is None
    assert first_of(hopeless(3, click=GOOD + DEAD, like=never)) == 13
    assert first_of(hopeless(3, click=GOOD + DEAD, like=[math.nan] * 15)) == 13
    assert first_of(hopeless(3, click=GOOD + DEAD, like=[*GOOD, 0.8, *DEAD[:4]])) == 14
    assert "(click, like)" in hopeless(3, click=GOOD + DEAD, like=[*GOOD, 0.8, *DEAD[:4]])[-1]


def test_where_no_task_has_learned_only_losses_far_above_a_constant_are_hopeless() -> None:
    far = [30.0, 5.0, 2.0, 1.3, 1.2, 1.11, 1.2, 4.0, 1.5]
    assert first_of(hopeless(3, click=far)) == 9
    assert hopeless(3, click=far)[-1] == (
        "no task has learned (click): normalised entropy, or RMSE over that of the running mean, above 1.1, or not "
        "finite, in each of the last 9 windows"
    )
    assert first_of(hopeless(3, click=[*far[:8], 1.09, *far[:8]])) is None
    assert first_of(hopeless(1, click=[1.02] * 50)) is None  # slow learning
    assert first_of(hopeless(3, click=far, like=[1.05] * 9)) is None
    assert first_of(hopeless(1, click=[math.nan] * 50)) is None
    assert Verdicts({}).hopeless(1) == ""


@pytest.mark.parametrize(("last_is_bad", "windows"), [(False, None), (True, 3)])
def test_a_window_with_a_loss_that_is_not_finite_counts_where_the_newest_one_is_not_either(
    last_is_bad: bool, windows: int | None
) -> None:
    """One odd batch in each window is the data; a model whose last loss of each window is not finite is lost."""
    verdicts = Verdicts({"click": "binary"})
    said = []
    for i in range(20):
        losses = np.full((10, 1), 0.5)
        bad = i >= 10
        if bad:
            losses[9 if last_is_bad else 3] = math.inf
        verdicts.add_losses(10 * i + 1, losses)
        entropy = {"rows/click": 100.0, "log_loss/click": math.inf} if bad else {"normalised_entropy/click": 0.8}
        verdicts.add_window(10 * i + 10, entropy)
        said.append(verdicts.hopeless(3))
    assert first_of(said) == (None if windows is None else 10 + windows)


def test_a_state_from_before_there_was_such_a_count_is_taken_up() -> None:
    verdicts = Verdicts({"click": "binary"})
    for step, value in enumerate([*GOOD, 3.0, 3.0], start=1):
        verdicts.add_window(step, {"normalised_entropy/click": value})
    state = verdicts.state_dict()
    del state["tasks"]["click"]["windows"]["lost"], state["tasks"]["click"]["windows"]["far"]
    other = Verdicts({"click": "binary"})
    other.load_state_dict(state)
    assert (verdicts.hopeless(2) != "", other.hopeless(2)) == (True, "")


TRACE = st.lists(st.sampled_from([0.7, 0.8, 0.9, 1.05, 1.2, 5.0, math.nan]), min_size=40, max_size=40)


@settings(max_examples=40, deadline=None)
@given(TRACE, TRACE)
def test_hopeless_for_longer_is_hopeless_and_every_window_was_bad(click: list[float], like: list[float]) -> None:
    verdicts, known = Verdicts({"click": "binary", "like": "binary"}), {"click": list[float](), "like": list[float]()}
    for step, values in enumerate(zip(click, like, strict=True), start=1):
        row = dict(zip(known, values, strict=True))
        for task, value in row.items():
            known[task] += [] if math.isnan(value) else [value]
        verdicts.add_window(step, {f"normalised_entropy/{task}": value for task, value in row.items()})
        said = [bool(verdicts.hopeless(windows)) for windows in range(1, 20)]
        assert said == sorted(said, reverse=True)
        judged = verdicts.current()
        learned = [task for task, verdict in judged.items() if verdict not in ("never_learned", "no_verdict")]
        for windows, hopeless in enumerate(said, start=1):
            if hopeless and learned:
                assert all(min(known[task][-windows:]) >= 1 and judged[task] == "suspected" for task in learned)
            elif hopeless:
                assert all(min(of[-3 * windows :]) > 1.1 for of in known.values() if of)


# Real runs that are given up, and one that is not.

SMALL = ("train.window_steps=4", "train.checkpoint_every=9", *CELL)


def rising(tmp_path: Path, days: int, *overrides: str) -> RunConfig:
    """Return a run of six steps a day whose rate rises."""
    for day in range(days):
        write_day(tmp_path / "log", day)
    return log_in(log(*SMALL, "optimizer.dense.name=adam", *overrides), tmp_path / "log")


def end_of(config: RunConfig, folder: RunFolder, **how: Any) -> str:
    with pytest.raises(DivergenceError) as caught:
        run(config.build(), folder, **how)
    return str(caught.value)


def begun(config: RunConfig, path: Path) -> RunFolder:
    folder = RunFolder.create(path)
    folder.write_config(config.to_toml())
    return folder


def test_a_run_that_has_diverged_is_given_up_and_resumes_to_the_same_end(tmp_path: Path) -> None:
    fewer = ("train.log_every=8", "train.checkpoint_every=24", "watch.look_every=50")
    config = rising(tmp_path, 30, "optimizer.dense.lr=3", "train.warmup_steps=120", *fewer)
    whole = begun(config, tmp_path / "whole")
    words = end_of(config, whole)
    assert words.startswith("every task that had learned (click, dwell) has diverged: ")
    assert "Lower the learning rate or use Clippy" in words
    summary = whole.summary()
    assert (summary["status"], summary["message"]) == ("diverged", words)
    assert {task["verdict"]["verdict"] for task in summary["tasks"].values()} == {"full_divergence"}
    assert summary["steps"] < 150  # of 180
    windows = whole.readings("windows")
    for name in ("normalised_entropy/click", "normalised_rmse/dwell"):
        assert windows[name][:10].min() < 0.9
        assert windows[name][-3:].min() >= 1
    assert [event["verdict"] for event in whole.events() if event["kind"] == "verdict"][-1] == "full_divergence"
    shutil.copytree(whole.path, tmp_path / "killed")
    killed = RunFolder.open(tmp_path / "killed")
    *_, before, end = killed.checkpoints.steps()
    assert (before % 24, end) == (0, summary["steps"])
    shutil.rmtree(killed.checkpoints.folder(end))
    # Then killed between the checkpoint of the end and the summary: it makes no step more.
    for _ in range(2):
        said = end_of(config, killed, resume=True)
        assert said.partition(" is kept in ")[0] == words.partition(" is kept in ")[0]
        check_same_run(whole, killed)


def test_a_stream_under_adagrad_that_explodes_at_once_is_given_up(tmp_path: Path) -> None:
    config = tiny(
        *SMALL,
        "data.tasks=['click', 'watch_time']",
        "reader.batch_size=32",
        "model.trunk={kind='shared_bottom', widths=[64, 64]}",
        "model.cross={layers=2}",
        "optimizer.dense={name='adagrad', lr=1}",
        "optimizer.tables={name='adagrad', lr=1}",
    )
    folder = begun(config, tmp_path / "run")
    assert end_of(config, folder).startswith("no task has learned (click, watch_time): ")
    summary = folder.summary()
    assert (summary["status"], summary["steps"]) == ("diverged", 4 * 9)
    assert {task["verdict"]["verdict"] for task in summary["tasks"].values()} == {"never_learned"}


def test_a_run_resumed_in_its_warm_up_equals_the_one_that_went_through(tmp_path: Path) -> None:
    """It is healthy, and not given up."""
    config = rising(tmp_path, 8, "optimizer.dense.lr=0.03", "train.warmup_steps=30")
    whole, killed = begun(config, tmp_path / "whole"), begun(config, tmp_path / "killed")
    parts, rates = config.build(), dict[int, float]()

    def note(progress: Progress) -> None:
        rates[progress.step] = parts.optimizers["dense"].param_groups[0]["lr"]

    run(parts, whole, on_progress=note)
    assert len(rates) > 20
    assert rates == {step: 0.03 if step >= 30 else 0.03 * (step / 30) for step in rates}

    def crash(progress: Progress) -> None:
        if progress.step >= 14:
            raise KilledError

    with pytest.raises(KilledError):
        run(config.build(), killed, on_progress=crash)
    assert killed.checkpoints.steps() == [9]
    state = killed.checkpoints.load()["optimizers"]
    kept = {part: {group["lr"] for group in state[part]["param_groups"]} for part in state}
    assert kept == {"dense": {0.03}, "tables": {config.optimizer.tables.lr}}
    run(config.build(), killed, resume=True)
    check_same_run(whole, killed)
    assert (whole.summary()["status"], whole.summary()["steps"]) == ("finished", 8 * 6)
    assert not whole.report_path().exists()


def test_only_a_run_that_is_watched_can_be_given_up() -> None:
    with pytest.raises(ConfigError, match=r"train\.give_up_windows: .*set watch\.enabled = true"):
        tiny("train.give_up_windows=3", "watch.enabled=false")
    with pytest.raises(ConfigError, match=r"'train\.give_up_windows': .*found 0"):
        tiny("train.give_up_windows=0")
