"""What a run does about trouble, and what it leaves: the ladder carried out, rows counted once, files bounded."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steadyrank.report import write_report
from steadyrank.runs import RunFolder

from .days import log, write_day
from .faults import Server, assert_same, differences, error_of, kinds, left_by, start_server
from .test_survival import RECOVERS, UNITS, WATCHED, log_in
from .tiny import tiny

BASE = ("data.rows=5_000", "reader.window_rows=512", "train.checkpoint_every=7", UNITS, *WATCHED)
DISK = "recovery.snapshot_budget_mb=0"
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture
def server() -> Server:
    return start_server()


@pytest.fixture(scope="module")
def off(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return start_server().finish(tiny(*BASE, "recovery.mode=off"), tmp_path_factory.mktemp("off") / "run")


def events_of(run: RunFolder, *wanted: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["kind"] in wanted]


def test_advice_changes_nothing_and_is_said(server: Server, off: RunFolder, tmp_path: Path) -> None:
    advised = server.finish(tiny(*BASE, *RECOVERS, "recovery.mode=advise"), tmp_path / "run")
    one, other = left_by(off), left_by(advised)
    for part in ("model", "optimizers", "board", "generators", "instruments"):
        assert differences(one["state"][part], other["state"][part]) == []
    assert differences(one["readings"], other["readings"]) == []
    (said,) = events_of(advised, "recovery")
    assert said["message"].startswith("advice only (recovery.mode = 'advise'): watch_time: loss ")
    assert said["done"] is False
    assert not events_of(off, "recovery")
    assert not events_of(advised, "returned", "damped")


@pytest.mark.parametrize(
    ("sets", "done", "skips"),
    [
        (["recovery.ladder=['damp', 'stop']"], ["recovery", "damped"], False),
        SLOW(["recovery.rollback_then=damp"], ["recovery", "returned", "damped"], False),
        SLOW(["recovery.rollback_then=skip_data"], ["recovery", "returned"], True),
        (["recovery.rollback_then=both"], ["recovery", "returned", "damped"], True),
        (["recovery.rollback_then=skip_data", DISK], ["recovery", "returned"], True),
    ],
)
def test_what_is_decided_is_carried_out_and_rows_are_counted_once(
    server: Server, tmp_path: Path, sets: list[str], done: list[str], skips: bool
) -> None:
    config = tiny(*BASE, *RECOVERS, "recovery.patience_steps=50", "recovery.calm_steps=50", *sets)
    run = server.finish(config, tmp_path / "run")
    found = events_of(run, "recovery", "returned", "damped")
    refused = [event for event in found if "snapshot takes" in event["message"]]
    assert len(refused) == (DISK in sets)
    assert [event["kind"] for event in found if event not in refused][: len(done)] == done
    assert all(event["done"] for event in found if "done" in event)
    summary = run.summary()
    assert summary is not None
    assert (summary["recovery"]["rows_skipped"] > 0) == skips
    assert summary["rows"] + summary["recovery"]["rows_skipped"] == 5_000
    assert summary["tasks"]["click"]["run"]["rows"] == summary["rows"]
    for returned in events_of(run, "returned"):
        assert returned["then"] < returned["step"] - 1
        assert returned["step"] in run.readings("steps")["step"]
    windows, steps = run.readings("windows"), run.readings("steps")
    assert (np.diff(windows["step"]) > 0).all()
    assert (np.diff(steps["step"]) > 0).all()
    assert windows["log/rows"][-1] == steps["log/rows"][-1] == summary["rows"]
    assert "watch_time" in summary["tasks"]


def test_the_ladder_ends_in_a_stop_and_the_run_is_kept(server: Server, tmp_path: Path) -> None:
    config = tiny(*BASE, "recovery.mode=on", "recovery.ladder=['stop']")
    run = tmp_path / "run"
    assert server.run(config, run) == 2
    assert error_of(run).startswith("DivergenceError: watch_time: loss ")
    assert "The run up to there is kept in" in error_of(run)
    kept = RunFolder.open(run)
    summary = kept.summary()
    assert summary is not None
    assert (summary["status"], summary["recovery"]["actions"]) == ("diverged", {"stop": 1})
    assert kept.checkpoints.steps()[-1] == summary["steps"]
    assert kinds(kept)[-1] == "verdict"


@pytest.mark.parametrize("watched", [SLOW(True), False])
def test_bad_steps_climb_the_ladder(server: Server, tmp_path: Path, watched: bool) -> None:
    """Also in a run that is not watched."""
    for day in range(3):
        write_day(tmp_path / "log", day, spoilt_every=32 * (day > 0))
    sets = ("recovery.mode=on", "recovery.skips=2", "recovery.ladder=['skip', 'damp', 'stop']", "recovery.tries=1")
    config = log_in(
        log(*sets, f"watch.enabled={str(watched).lower()}", "recovery.triggers=['bad_steps']"), tmp_path / "log"
    )
    assert server.run(config, tmp_path / "run") == 2
    run = RunFolder.open(tmp_path / "run")
    assert [event["action"] for event in events_of(run, "recovery")] == ["skip", "damp", "stop"]
    summary = run.summary()
    assert summary is not None
    assert summary["bad_steps"] > 2
    assert "not finite: loss of dwell" in error_of(run.path)
    assert "stop" in error_of(run.path)


def test_so_many_bad_steps_in_a_row_end_any_run(server: Server, tmp_path: Path) -> None:
    for day in range(3):
        write_day(tmp_path / "log", day, spoilt_every=int(day == 1))
    config = log_in(log("train.on_bad_step=skip", "train.max_bad_steps=4"), tmp_path / "log")
    assert server.run(config, tmp_path / "run") == 2
    assert "DivergenceError: 4 steps in a row were bad" in error_of(tmp_path / "run")


def test_readings_are_bounded_and_a_run_resumes_over_the_cut(server: Server, tmp_path: Path) -> None:
    """What is left is the end of what there was; which rows that are depends on how long their times are written."""
    sets = ("train.checkpoint_every=2", "train.log_every=1", "watch.enabled=false")
    whole = server.finish(tiny(*sets), tmp_path / "whole")
    config = tiny(*sets, "train.max_readings_mb=0.01")
    assert server.run(config, tmp_path / "run", kill_at_step=17) == -9
    run = server.finish(config, tmp_path / "run", report=True)
    sizes = [path.stat().st_size for path in (run.path / "readings").glob("steps*.jsonl")]
    assert 0 < sum(sizes) < 15_000
    ended, all_of_it = left_by(run)["readings"]["steps"], left_by(whole)["readings"]["steps"]
    count = len(ended["step"])
    assert 0 < count < len(all_of_it["step"])
    assert differences(ended, {name: column[-count:] for name, column in all_of_it.items()}) == []
    assert run.report_path().stat().st_size > 10_000
    assert write_report(run) == run.report_path()


@pytest.mark.parametrize("kill_at_step", [SLOW(4), 12])
def test_tensorboard_shows_each_reading_once_after_a_resume(server: Server, tmp_path: Path, kill_at_step: int) -> None:
    """Killed before its first checkpoint, and after one."""
    config = tiny("trackers.tensorboard=true", "train.checkpoint_every=5", "watch.enabled=false")
    whole = server.finish(config, tmp_path / "whole")
    assert server.run(config, tmp_path / "run", kill_at_step=kill_at_step) == -9
    run = server.finish(config, tmp_path / "run")
    assert_same(whole, run)
    assert scalars(whole) == scalars(run)


def scalars(run: RunFolder) -> dict[str, str]:
    """Return what TensorBoard shows, but for speeds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run.tensorboard_path()), size_guidance={"scalars": 0})
    shown.Reload()
    tags = [tag for tag in shown.Tags()["scalars"] if not tag.startswith("throughput")]
    return {tag: repr([(event.step, event.value) for event in shown.Scalars(tag)]) for tag in tags}


def test_a_run_that_was_resumed_and_killed_has_no_summary_of_an_earlier_end(server: Server, tmp_path: Path) -> None:
    """While a resumed run goes on there is no summary that tells of an earlier end."""
    config = tiny("watch.enabled=false")
    assert server.run(config, tmp_path / "run", signal_at=4) == 130
    assert RunFolder.open(tmp_path / "run").summary() is not None
    assert server.run(config, tmp_path / "run", kill_at_step=4) == -9
    assert RunFolder.open(tmp_path / "run").summary() is None
