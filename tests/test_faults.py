"""Full disks, damaged files, signals and locks: a clear error or a good run, and what comes after is the same run."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from steadyrank.runs import RunFolder

from .faults import Server, assert_same, counts_of, error_of, kinds, left_by, start_server
from .tiny import tiny

CONFIG = tiny("train.checkpoint_every=5", "train.wait_for_disk_s=0", "watch.look_every=4", "data.rows=1_500")


@pytest.fixture
def server() -> Server:
    return start_server()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return start_server().finish(CONFIG, tmp_path_factory.mktemp("whole") / "run", count=True)


def check_nothing_is_half(folder: Path) -> None:
    """Check that every file that is written as a whole is whole, and no draft is left."""
    for path in folder.rglob("*"):
        assert not path.name.endswith(".tmp"), path
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".jsonl":
            assert path.read_bytes()[-1:] in (b"", b"\n"), path


def fill_the_disk(server: Server, whole: RunFolder, folder: Path, at: int) -> None:
    """From one write on the disk is full: the run ends with our error, and goes on once there is space."""
    code = server.run(CONFIG, folder, full_at=at, full_for=10**9)
    assert code == 2, f"write {at}: {code}"
    assert "No space left" in error_of(folder), f"write {at}: {error_of(folder)}"
    assert error_of(folder).startswith(("CheckpointError", "ConfigError"))
    if folder.exists():
        check_nothing_is_half(folder)
    assert_same(whole, server.finish(CONFIG, folder))


def fill_it_for_a_while(server: Server, whole: RunFolder, folder: Path, at: int) -> None:
    """A run that may wait for space does, and ends as if nothing had been."""
    config = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"wait_for_disk_s": 600.0})})
    patient = server.finish(config, folder, full_at=at, full_for=3)
    assert_same(whole, patient)


def fill_it_at_a_resume(server: Server, whole: RunFolder, folder: Path, at: int) -> None:
    """A run that was killed is resumed on a disk that is full from one write on, and then once more."""
    killed(server, folder)
    assert server.run(CONFIG, folder, full_at=at, full_for=10**9) in (0, 2)
    assert_same(whole, server.finish(CONFIG, folder))


FIRST = 10
"""Writes of the making of a run folder, which does not wait for space."""


def test_a_full_disk_ends_the_run_with_an_error_and_spoils_nothing(
    server: Server, whole: RunFolder, tmp_path: Path
) -> None:
    _, writes = counts_of(whole.path)
    for at in random.Random(0).sample(range(1, writes + 1), 3):
        fill_the_disk(server, whole, tmp_path / f"run_{at}", at)


def test_with_patience_a_full_disk_changes_nothing(server: Server, whole: RunFolder, tmp_path: Path) -> None:
    _, writes = counts_of(whole.path)
    for at in random.Random(1).sample(range(FIRST, writes - 3), 2):
        fill_it_for_a_while(server, whole, tmp_path / f"run_{at}", at)


@pytest.mark.slow
@pytest.mark.parametrize("fill", [fill_the_disk, fill_it_for_a_while, fill_it_at_a_resume])
def test_a_disk_that_is_full_at_each_write(
    server: Server, whole: RunFolder, tmp_path: Path, fill: Callable[[Server, RunFolder, Path, int], None]
) -> None:
    _, writes = counts_of(whole.path)
    for at in range(FIRST if fill is fill_it_for_a_while else 1, writes + 1):
        fill(server, whole, tmp_path / f"run_{at}", at)


def killed(server: Server, folder: Path) -> RunFolder:
    """Return a run that was killed some steps after its second checkpoint."""
    assert server.run(CONFIG, folder, kill_at_step=12) == -9
    run = RunFolder.open(folder)
    assert run.checkpoints.steps() == [5, 10]
    return run


def spoil(path: Path, draw: random.Random) -> None:
    """Cut a file short, or flip a bit in it."""
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    if draw.random() < 0.5:
        del data[at:]
    else:
        data[at] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 40))])
def test_the_checkpoint_before_a_damaged_one_is_used_and_it_is_said(
    server: Server, whole: RunFolder, tmp_path: Path, seed: int
) -> None:
    run, draw = killed(server, tmp_path / "run"), random.Random(seed)
    spoilt = draw.choice(sorted(run.checkpoints.folder(10).iterdir()))
    spoil(spoilt, draw)
    server.finish(CONFIG, run.path)
    assert_same(whole, run)
    if "goes on at step 10" in (event["message"] for event in run.events()):
        assert spoilt.name == "manifest.json"  # what it says besides, such as the time
        return
    said = [event for event in run.events() if event["kind"] == "damaged_checkpoint"]
    assert len(said) == 1
    assert "step_10" in said[0]["message"]
    assert "the one before was used" in said[0]["message"]
    assert "goes on at step 5" in [event["message"] for event in run.events()]


def test_where_all_checkpoints_are_damaged_it_is_said_and_nothing_is_touched(server: Server, tmp_path: Path) -> None:
    run = killed(server, tmp_path / "run")
    for step in (5, 10):
        (run.checkpoints.folder(step) / "state.json").write_text("{")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert server.run(CONFIG, run.path) == 2
    assert "no checkpoint can be used" in error_of(run.path)
    assert "is damaged" in error_of(run.path)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


FILES = ("readings/steps.jsonl", "readings/windows.jsonl", "events.jsonl", "config.toml", "environment.json")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", FILES)
def test_any_other_damage_is_a_clear_error_or_a_good_run(server: Server, tmp_path: Path, name: str, seed: int) -> None:
    run = killed(server, tmp_path / "run")
    spoil(run.path / name, random.Random(seed))
    code = server.run(CONFIG, run.path, report=True)
    assert code in (0, 2), f"{code}"
    assert (code == 2) == bool(error_of(run.path))


def test_a_spoiled_summary_or_lock_is_made_anew(server: Server, whole: RunFolder, tmp_path: Path) -> None:
    run = killed(server, tmp_path / "run")
    for name in ("summary.json", ".lock", "report.html"):
        (run.path / name).write_text("\0{")
    assert_same(whole, server.finish(CONFIG, run.path))


def test_what_a_kill_left_between_two_renames_is_put_back(server: Server, whole: RunFolder, tmp_path: Path) -> None:
    run = killed(server, tmp_path / "run")
    newest = run.checkpoints.folder(10)
    newest.rename(newest.with_name(".step_10.old"))
    run.checkpoints.folder(5).rename(newest.with_name(".step_5.gone"))
    (newest.with_name(".step_12.tmp")).mkdir()
    server.finish(CONFIG, run.path)
    assert "goes on at step 10" in [event["message"] for event in run.events()]
    assert not list(run.checkpoints.path.glob(".*"))
    assert_same(whole, run)


@pytest.mark.parametrize("slow", [False, True])
def test_a_signal_leaves_a_checkpoint_at_once_and_what_follows_is_the_same(
    server: Server, whole: RunFolder, tmp_path: Path, slow: bool
) -> None:
    """With steps so slow that the next reading is far, it stops where it is, and only readings are cut otherwise."""
    options = {"step_s": 0.1, "signal_at": 7} if slow else {"signal_at": 4}
    config = CONFIG
    if slow:
        settings = {"log_every": 50, "window_steps": 50, "checkpoint_every": 0}
        config = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update=settings)})
        whole = server.finish(config, tmp_path / "whole")
    folder, start = tmp_path / "run", time.perf_counter()
    assert server.run(config, folder, **options, patience_s=0.15) == 130
    assert time.perf_counter() - start < 30
    run = RunFolder.open(folder)
    assert run.checkpoints.steps()[-1] in ((8, 9, 10) if slow else (5, 6))
    assert run.summary()["status"] == "interrupted"
    server.finish(config, folder)
    cut = ("/readings/steps", "/state/instruments/watch/verdicts/newest")  # where the last reading began
    assert_same(whole, run, lambda where: slow and where.startswith(cut))
    assert kinds(run)[-2:] == ["interrupted", "resumed"]


@pytest.mark.parametrize("signals", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_second_signal_ends_it_at_once(server: Server, whole: RunFolder, tmp_path: Path, signals: int) -> None:
    folder = tmp_path / "run"
    assert server.run(CONFIG, folder, signal_at=7, signals=signals) in (1, -2, -15)
    assert_same(whole, server.finish(CONFIG, folder))


def test_a_signal_during_a_checkpoint_lets_it_be_finished(server: Server, whole: RunFolder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert server.run(CONFIG, folder, signal_at="checkpoint") == 130
    assert RunFolder.open(folder).checkpoints.steps() == [5]
    assert_same(whole, server.finish(CONFIG, folder))


def test_one_folder_takes_one_process(server: Server, whole: RunFolder, tmp_path: Path) -> None:
    run = killed(server, tmp_path / "run")
    before = left_by_files(run.path)
    with run.locked():
        for options in ({}, {"overwrite": True}):
            assert server.run(CONFIG, run.path, **options) == 2
            assert error_of(run.path).startswith(f"ConfigError: another process is training in {run.path}")
        assert left_by_files(run.path) == before
    assert_same(whole, server.finish(CONFIG, run.path))  # the one that was killed holds no lock


def left_by_files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_runs_that_differ_are_told_apart(whole: RunFolder, server: Server, tmp_path: Path) -> None:
    """Else none of the above would show anything."""
    other = server.finish(CONFIG.model_copy(update={"seed": 1}), tmp_path / "run")
    with pytest.raises(AssertionError, match="/state/board"):
        assert_same(whole, other)
    assert {"checkpoints", "state", "readings", "events", "causes", "summary"} == left_by(whole).keys()
