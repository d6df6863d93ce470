"""A run that follows its log: however files come, and however often it is killed, it is the same run."""

import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steadyrank.config import RunConfig
from steadyrank.runs import RunFolder

from .days import follow, write_day
from .faults import Server, assert_same, error_of, kinds, start_server
from .test_survival import WATCHED, log_in

CONFIG = follow("train.checkpoint_every=5", "watch.enabled=false")


@pytest.fixture
def server() -> Server:
    return start_server()


def lay_out(folder: Path, days: int, there: int, config: RunConfig = CONFIG) -> tuple[RunConfig, list[list[str]]]:
    """Write the first days into the log, the others beside it; return the run's configuration, and what is to come."""
    feed = []
    for day in range(days):
        path = write_day(folder / ("log" if day < there else "coming"), day)
        if day >= there:
            feed.append([str(path), str(folder / "log" / path.name)])
    return log_in(config, folder / "log"), feed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a run over four days that were all there when it began."""
    folder = tmp_path_factory.mktemp("whole")
    config, _ = lay_out(folder, days=4, there=4)
    return start_server().finish(config, folder / "run")


def files_of(run: RunFolder) -> list[tuple[str, str]]:
    """Return what was said of files: kind and name."""
    found = [event for event in run.events() if event["kind"] == "file"]
    return [(event["message"].split()[0], Path(event["file"]).stem) for event in found]


def test_files_that_come_while_it_runs_make_the_same_run(server: Server, whole: RunFolder, tmp_path: Path) -> None:
    config, feed = lay_out(tmp_path, days=4, there=1)
    run = server.finish(config, tmp_path / "run", feed=feed)
    assert_same(whole, run)
    assert files_of(run) == [("new", f"day_{day}") for day in (1, 2, 3)]
    assert run.summary()["rows"] == 4 * 150


def test_appended_between_kill_and_resume(server: Server, whole: RunFolder, tmp_path: Path) -> None:
    """Killed in the middle of the second of three days; meanwhile a fourth one comes."""
    config, feed = lay_out(tmp_path, days=4, there=3)
    assert server.run(config, tmp_path / "run", kill_at_step=8) == -9
    shutil.copyfile(*feed[0])
    run = server.finish(config, tmp_path / "run")
    assert_same(whole, run)
    assert files_of(run) == [("new", "day_3")]
    steps = {event["kind"]: event["step"] for event in run.events()}
    assert steps["file"] == steps["resumed"] > 0


@pytest.mark.parametrize("per_file", [pytest.param(False, marks=pytest.mark.slow), True])
def test_appended_to_a_log_that_is_not_followed(server: Server, tmp_path: Path, per_file: bool) -> None:
    """Where the end of the log has cut no window, it does not matter when the last day came."""
    config, feed = lay_out(
        tmp_path, 4, 3, CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"follow": False})})
    )
    reader = config.reader.model_copy(update={"window_per_file": per_file, "window_rows": 100 if per_file else 75})
    config = config.model_copy(update={"reader": reader})
    assert server.run(config, tmp_path / "run", kill_at_step=8) == -9
    shutil.copyfile(*feed[0])
    run = server.finish(config, tmp_path / "run")
    assert_same(server.finish(config, tmp_path / "whole"), run)
    assert run.summary()["rows"] == 4 * 150


def test_files_that_do_not_fit_are_reported_once_and_others_go_on(
    server: Server, whole: RunFolder, tmp_path: Path
) -> None:
    config, feed = lay_out(tmp_path, days=4, there=1)
    odd = tmp_path / "odd"
    late = write_day(odd, 0, rows=20, name="late")
    misfit = write_day(odd, 3, name="misfit")
    pq.write_table(pq.read_table(misfit).drop_columns(["click"]), misfit)
    broken = odd / "broken.parquet"
    broken.write_bytes(late.read_bytes()[:-50])
    twin = odd / "twin.parquet"
    shutil.copyfile(feed[0][0], twin)
    for path in (broken, misfit, late, twin):
        feed.insert(1, [str(path), str(tmp_path / "log" / path.name)])
    run = server.finish(config, tmp_path / "run", feed=feed)
    assert_same(whole, run, lambda where: where.startswith("/state/reader/source/left_out"))
    told = files_of(run)
    assert sorted(told) == sorted(set(told))
    assert set(told) == {
        *(("new", f"day_{day}") for day in (1, 2, 3)),
        ("duplicate", "twin"),
        ("late", "late"),
        ("misfit", "misfit"),
        ("unreadable", "broken"),
    }


def test_killed_while_it_waits(server: Server, whole: RunFolder, tmp_path: Path) -> None:
    config, feed = lay_out(tmp_path, days=4, there=2)
    for _ in range(2):
        assert server.run(config, tmp_path / "run", kill_at_wait=True) == -9
    assert RunFolder.open(tmp_path / "run").checkpoints.facts(12)["kind"] == "aside"
    run = server.finish(config, tmp_path / "run", feed=feed)
    assert_same(whole, run)


def test_a_signal_while_it_waits_ends_it(server: Server, whole: RunFolder, tmp_path: Path) -> None:
    config, feed = lay_out(tmp_path, days=4, there=2)
    endless = config.model_copy(update={"train": config.train.model_copy(update={"follow_idle_s": None})})
    assert server.run(endless, tmp_path / "run", signal_at="waiting") == 130
    assert_same(whole, server.finish(config, tmp_path / "run", feed=feed))


def test_learned_files_may_go(server: Server, whole: RunFolder, tmp_path: Path) -> None:
    """Rotation: what was learned is deleted while it runs, and before a resume."""
    config, feed = lay_out(tmp_path, days=4, there=2)
    assert server.run(config, tmp_path / "run", kill_at_wait=True) == -9
    (tmp_path / "log" / "day_0.parquet").unlink()
    run = server.finish(config, tmp_path / "run", feed=feed)
    assert_same(whole, run)
    (tmp_path / "log" / "day_3.parquet").unlink()
    (tmp_path / "log" / "day_2.parquet").unlink()
    write_day(tmp_path / "log", 4)
    run = server.finish(config, tmp_path / "run")
    assert run.summary()["rows"] == 5 * 150


def test_a_file_that_is_needed_and_gone_is_named(server: Server, tmp_path: Path) -> None:
    config, _ = lay_out(tmp_path, days=2, there=2)
    assert server.run(config, tmp_path / "run", kill_at_step=9) == -9
    (tmp_path / "log" / "day_1.parquet").unlink()
    assert server.run(config, tmp_path / "run") == 2
    assert error_of(tmp_path / "run").startswith("DataError: ")
    assert "day_1.parquet: is gone" in error_of(tmp_path / "run")


@pytest.mark.parametrize("aligned", [pytest.param(True, marks=pytest.mark.slow), False])
def test_each_day_has_its_checkpoint(server: Server, tmp_path: Path, aligned: bool) -> None:
    """Also where no window ends at midnight: then with the first window that ends after it."""
    config = follow("train.checkpoint_every=4", "train.keep_checkpoints=1", "train.keep_days=2", *WATCHED)
    config = log_in(config, tmp_path / "log")
    if aligned:
        for day in range(5):
            write_day(tmp_path / "log", day)
    else:
        write_day(tmp_path / "log", 0, rows=5 * 150, name="all", t=times(5))
    run = server.finish(config, tmp_path / "run")
    facts = [run.checkpoints.facts(step) for step in run.checkpoints.steps()]
    assert [of["day"] for of in facts if of["day"]] == ["1970-01-03", "1970-01-04"]
    killed = tmp_path / "killed"
    draw = random.Random(int(aligned))
    while server.run(config, killed, kill_at_step=draw.randrange(2, 9)) == -9:
        pass
    assert_same(run, RunFolder.open(killed))


def times(days: int) -> pa.Array:
    """Return the times of days without a gap, of which no window ends with one."""
    return pa.array(np.linspace(0, days * 86_400 - 1, days * 150).astype("datetime64[s]"))


def test_a_folder_that_cannot_be_read_for_a_moment_ends_nothing(
    server: Server, whole: RunFolder, tmp_path: Path
) -> None:
    config, feed = lay_out(tmp_path, days=4, there=2)
    run = server.finish(config, tmp_path / "run", feed=feed, hide=str(tmp_path / "log"))
    assert_same(whole, run)
    assert kinds(run).count("file") == 2
