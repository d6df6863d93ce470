"""Real ladders, very small: what comes of their cells, of stopping them, of killed workers, and of wrong folders."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from steadyrank.config import RunConfig
from steadyrank.errors import ConfigError, DataError
from steadyrank.ladder import Board, Found, Ladder, climb, load_ladder, read_outcomes
from steadyrank.ladder import pool as module
from steadyrank.ladder.laboratory import CELLS, LADDER, OUTCOMES
from steadyrank.ladder.outcomes import Outcome, read_outcome
from steadyrank.ladder.pool import News, Pool
from steadyrank.runs import RunFolder

from .days import write_day
from .faults import assert_same
from .tiny import TINY, train

ROOT = Path(__file__).resolve().parents[1]
TEXT = TINY.replace("rows = 2_560", "rows = 5_120").replace("[train]", "[train]\nthreads = 1")
"""43 steps; in one thread, since the last bit hangs on how many there are."""
LADDER_TEXT = """
[ladder]
rates = [0.05, 0.4]
seeds = [1]
workers = 2
keep_checkpoints = true
[ladder.optimizers.adagrad]
set.optimizer.dense = { name = "adagrad" }
[ladder.optimizers.clippy]
set.optimizer.dense = { name = "clippy_adagrad" }
"""


def start_quickly(patch: pytest.MonkeyPatch) -> None:
    """Let workers be forked off a server that has imported everything, and not begin with a new interpreter."""
    patch.setattr(module, "_START", "forkserver")
    patch.chdir(ROOT)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.ladder_worker"])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    start_quickly(monkeypatch)


def make(tmp_path: Path, *overrides: str, text: str = TEXT + LADDER_TEXT) -> Ladder:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return load_ladder(path, overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    """Return the folder of a ladder that nothing disturbed, and what it found."""
    folder = tmp_path_factory.mktemp("ladder")
    with pytest.MonkeyPatch.context() as patch:
        start_quickly(patch)
        found = climb(make(folder), folder / "whole")
    return folder / "whole", found


class Watcher(Board):
    """A board that does something once, at the first news of a kind that fits."""

    def __init__(self, act: Callable[[News], None], fits: Callable[[News], bool]) -> None:
        super().__init__()
        self.act, self.fits, self.acted = act, fits, False
        self.news: list[News] = []

    def hear(self, news: News, outcome: Outcome | None) -> None:
        super().hear(news, outcome)
        self.news.append(news)
        if not self.acted and self.fits(news):
            self.acted = True
            self.act(news)


def in_training(news: News) -> bool:
    return news.kind == "progress" and news.done < 1


def timeless(outcome: Outcome) -> str:
    """Spell an outcome out, without the time it took: a NaN is not equal to itself."""
    return repr(replace(outcome, seconds=0.0))


def check_same(one: Found, other: Found) -> None:
    assert list(map(timeless, one.outcomes)) == list(map(timeless, other.outcomes))


def refuse_to_start(*_: Any) -> None:
    raise AssertionError("a worker was started")


def test_a_ladder_leaves_a_run_folder_for_each_cell_and_a_table(whole: tuple[Path, Found], tmp_path: Path) -> None:
    folder, found = whole
    names = ["adagrad-0.05-s1", "adagrad-0.4-s1", "clippy-0.05-s1", "clippy-0.4-s1"]
    assert [outcome.cell for outcome in found.outcomes] == names
    assert (found.failed, found.whole) == ({}, True)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", CELLS, LADDER, OUTCOMES]
    assert sorted(path.name for path in (folder / CELLS).iterdir()) == names
    assert [outcome.cell for outcome in read_outcomes(folder / OUTCOMES)] == names
    again = load_ladder(folder / LADDER)
    assert again.cells() == make(tmp_path).cells()
    assert again.config == make(tmp_path).config


def test_a_cell_is_to_the_bit_the_run_that_is_trained_alone(whole: tuple[Path, Found], tmp_path: Path) -> None:
    """Also one that its worker trained after another."""
    folder, found = whole
    sets = ["optimizer.dense={name='clippy_adagrad', lr=0.4}", "seed=1", "data.seed=1"]
    alone = train(RunConfig.from_toml(TEXT, sets), tmp_path / "run")
    ladder = make(tmp_path)
    (cell,) = [cell for cell in ladder.cells() if cell.name == "clippy-0.4-s1"]
    # From torch's generator only modules draw first weights, which ours replace: it has moved by the cells before.
    beside = ("/state/generators/torch", "/summary/name")
    assert_same(alone, RunFolder.open(folder / CELLS / cell.name), lambda where: where.startswith(beside))
    (outcome,) = [outcome for outcome in found.outcomes if outcome.cell == cell.name]
    assert timeless(outcome) == timeless(read_outcome(alone, cell, ladder.config))


def test_a_second_call_trains_nothing(
    whole: tuple[Path, Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = whole
    monkeypatch.setattr(Pool, "_start", refuse_to_start)
    before = (folder / OUTCOMES).read_bytes()
    again = climb(make(tmp_path), folder)
    assert repr(again) == repr(found)
    assert (folder / OUTCOMES).read_bytes() == before
    more_threads = climb(make(tmp_path, "train.threads=3"), folder)  # as on a machine with more cores
    assert repr(more_threads) == repr(found)


def test_a_ladder_that_is_stopped_leaves_checkpoints_and_ends_as_one_that_was_not(
    whole: tuple[Path, Found], tmp_path: Path
) -> None:
    board = Watcher(lambda news: os.kill(os.getpid(), signal.SIGTERM), in_training)
    handler = signal.getsignal(signal.SIGTERM)
    stopped = climb(make(tmp_path), tmp_path / "ladder", board=board)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (stopped.whole, stopped.failed) == (False, {})
    assert len(stopped.outcomes) < 4
    assert [o.cell for o in read_outcomes(tmp_path / "ladder" / OUTCOMES)] == [o.cell for o in stopped.outcomes]
    # One that was begun may have been stopped before it had a folder.
    trained = dict.fromkeys(news.cell for news in board.news if news.kind == "progress")
    runs = [RunFolder.open(tmp_path / "ladder" / CELLS / name) for name in trained]
    left = [run for run in runs if (run.summary() or {}).get("status") == "interrupted"]
    assert left
    assert all(run.checkpoints.steps() for run in left)
    assert multiprocessing.active_children() == []
    found = climb(make(tmp_path), tmp_path / "ladder")
    assert found.whole
    check_same(found, whole[1])
    beside = ("/state/generators/torch",)
    whole_run = RunFolder.open(whole[0] / CELLS / left[0].path.name)
    assert_same(RunFolder.open(left[0].path), whole_run, lambda where: where.startswith(beside))


def test_a_worker_that_is_killed_is_reported_and_replaced_and_its_cell_trained_the_next_time(
    whole: tuple[Path, Found], tmp_path: Path
) -> None:
    def kill(news: News) -> None:
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)

    ladder = make(tmp_path, "ladder.workers=1")
    found = climb(ladder, tmp_path / "ladder", board=Watcher(kill, in_training))
    assert found.failed == {
        "adagrad-0.05-s1": "its process ended: killed by signal 9, perhaps for lack of memory",
    }
    assert found.whole
    assert [outcome.cell for outcome in found.outcomes] == ["adagrad-0.4-s1", "clippy-0.05-s1", "clippy-0.4-s1"]
    assert len(read_outcomes(tmp_path / "ladder" / OUTCOMES)) == 3
    check_same(climb(ladder, tmp_path / "ladder"), whole[1])


def copied(whole: tuple[Path, Found], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole[0], tmp_path / "ladder"))


def test_two_ladders_in_one_folder_train_only_what_the_other_lacks(whole: tuple[Path, Found], tmp_path: Path) -> None:
    folder, board = copied(whole, tmp_path), Watcher(lambda news: None, in_training)
    more = make(tmp_path, "ladder.optimizers.clippy.rates=[0.05, 0.1]", "ladder.workers=1")
    found = climb(more, folder, board=board)
    names = ["adagrad-0.05-s1", "adagrad-0.4-s1", "clippy-0.05-s1", "clippy-0.1-s1"]
    assert [outcome.cell for outcome in found.outcomes] == names
    assert {news.cell for news in board.news} == {"clippy-0.1-s1"}
    assert [timeless(o) for o in found.outcomes[:3]] == [timeless(o) for o in whole[1].outcomes[:3]]
    assert (folder / CELLS / "clippy-0.4-s1").is_dir()


def test_cells_can_be_shared_with_another_ladder(
    whole: tuple[Path, Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "_start", refuse_to_start)
    part = make(tmp_path, "ladder.rates=[0.4]")
    found = climb(part, tmp_path / "other", cells_in=whole[0] / CELLS)
    assert [outcome.cell for outcome in found.outcomes] == ["adagrad-0.4-s1", "clippy-0.4-s1"]
    assert not (tmp_path / "other" / CELLS).exists()


def test_a_cell_with_other_settings_is_refused_and_nothing_is_touched(
    whole: tuple[Path, Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "_start", refuse_to_start)
    folder = whole[0]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError) as refused:
        climb(make(tmp_path, "model.cross.layers=2"), folder)
    assert str(refused.value) == (
        f"{folder / CELLS / 'adagrad-0.05-s1'} was trained with other settings (model.cross.layers = 1 there, 2 here); "
        "choose another --out, or --overwrite to train the ladder anew"
    )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


ONE = ("ladder.rates=[0.4]", "ladder.optimizers={}", "ladder.workers=1", "data.rows=1_280")


def test_overwrite_trains_anew_and_deletes_cells_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_START", "spawn")  # as users have it
    folder = tmp_path / "ladder"
    (folder / CELLS / "old").mkdir(parents=True)
    (folder / LADDER).write_text("")
    (folder / "notes.txt").write_text("mine")
    found = climb(make(tmp_path, *ONE), folder, overwrite=True)
    assert sorted(path.name for path in (folder / CELLS).iterdir()) == [found.outcomes[0].cell]
    assert (folder / "notes.txt").read_text() == "mine"
    assert found.whole


def test_a_folder_that_is_no_ladders_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "_start", refuse_to_start)
    ladder = make(tmp_path, *ONE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cells").mkdir()
    run = RunFolder.create(tmp_path / "run").path
    (run / ".lock").touch()
    for folder in (tmp_path / "mine", run):
        before = sorted(folder.rglob("*"))
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match=r"is not empty and is no ladder's folder; choose another --out"):
                climb(ladder, folder, overwrite=overwrite)
        assert sorted(folder.rglob("*")) == before
    with pytest.raises(ConfigError, match=r"cannot write .*run\.toml: .*; choose another --out"):
        climb(ladder, tmp_path / "run.toml")
    with pytest.raises(ConfigError, match=r"cannot write .*: .*; choose another --out"):
        climb(ladder, tmp_path / "run.toml" / "below")


def test_one_folder_takes_one_ladder_at_a_time(
    whole: tuple[Path, Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "_start", refuse_to_start)
    with (
        FileLock(whole[0] / ".lock"),
        pytest.raises(ConfigError, match=r"another process trains the ladder in .*; wait for it, or choose another"),
    ):
        climb(make(tmp_path), whole[0])
    assert climb(make(tmp_path), whole[0]).whole


@pytest.mark.parametrize("spoilt", ["summary.json", "readings/windows.jsonl"])
def test_a_cell_whose_folder_is_damaged_is_trained_again(
    whole: tuple[Path, Found], tmp_path: Path, spoilt: str
) -> None:
    folder = copied(whole, tmp_path)
    shutil.rmtree(folder / CELLS / "clippy-0.05-s1" / "checkpoints")  # of a ladder that keeps none
    (folder / CELLS / "clippy-0.05-s1" / "checkpoints").mkdir()
    (folder / CELLS / "clippy-0.05-s1" / spoilt).write_text('{"a": [\n')
    check_same(climb(make(tmp_path, "ladder.workers=1"), folder), whole[1])


DAYS = """
[data]
path = "{folder}/good"
[reader]
batch_size = 32
window_rows = 64
[model]
trunk = {{ kind = "shared_bottom", widths = [8] }}
[train]
threads = 1
window_steps = 3
log_every = 2
[optimizer.dense]
name = "adagrad"
[schema]
time = "t"
[schema.features.u]
kind = "id"
[schema.features.x]
kind = "number"
[schema.tasks.click]
kind = "binary"
[ladder]
rates = [0.1]
seeds = 1
workers = 1
[ladder.models.good]
[ladder.models.bad]
set.data.path = "{folder}/bad"
[ladder.optimizers.lost]
rates = [1e30]
set.optimizer.dense = {{ name = "sgd" }}
[ladder.optimizers.adagrad]
set.optimizer.dense = {{ name = "adagrad" }}
"""


def test_a_cell_that_fails_is_told_and_one_that_diverges_is_an_outcome(tmp_path: Path) -> None:
    """The bad log is damaged in its second day, which only who reads it finds."""
    for name in ("good", "bad"):
        for day in range(3):
            write_day(tmp_path / name, day)
    spoilt = tmp_path / "bad" / "day_1.parquet"
    data = bytearray(spoilt.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    spoilt.write_bytes(data)
    ladder = make(tmp_path, text=DAYS.format(folder=tmp_path))
    found = climb(ladder, tmp_path / "ladder")
    endings = {outcome.cell: (outcome.status, outcome.ending(["click"])) for outcome in found.outcomes}
    assert endings["good-lost-1e_30-s0"] == ("diverged", "full_divergence")
    assert endings["good-adagrad-0.1-s0"][0] == "finished"
    assert "bad-adagrad-0.1-s0" in found.failed
    assert "day_1.parquet" in found.failed["bad-adagrad-0.1-s0"]
    assert found.whole
    assert {*endings, *found.failed} == {cell.name for cell in ladder.cells()}
    assert list((tmp_path / "ladder" / CELLS / "good-adagrad-0.1-s0" / "checkpoints").iterdir()) == []
    write_day(tmp_path / "bad", 1)
    board = Watcher(lambda news: None, in_training)
    mended = climb(ladder, tmp_path / "ladder", board=board)  # the same command tries what failed again
    assert mended.failed == {}
    assert len(mended.outcomes) == 4
    assert {news.cell for news in board.news} == set(found.failed)


def test_a_wrong_log_column_or_device_is_one_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "_start", refuse_to_start)
    write_day(tmp_path / "good", 0)
    text = DAYS.format(folder=tmp_path)
    with pytest.raises(ConfigError, match=r"no file or folder '.*/bad'"):
        climb(make(tmp_path, text=text), tmp_path / "ladder")
    bad = "ladder.models={bad={set={schema={tasks={like={kind='binary', column='clik'}}}}}}"
    with pytest.raises(DataError, match=r"'clik'; did you mean 'click'"):
        climb(make(tmp_path, bad, text=text), tmp_path / "ladder")
    with pytest.raises(ConfigError, match=r"train\.device = 'tpu'"):
        climb(make(tmp_path, "train.device=tpu", text=text), tmp_path / "ladder")
    assert not (tmp_path / "ladder").exists()


# A worker by itself.


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DataError("a label is 2"), "a label is 2"),
        (MemoryError(), "no memory was left; set ladder.workers = 1"),
        (ZeroDivisionError("float division"), "ZeroDivisionError: float division (more in {path}/traceback.txt)"),
    ],
)
def test_an_error_ends_its_cell_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(*_: Any) -> str:
        raise error

    monkeypatch.setattr(module, "_train", fail)
    news = module._try(multiprocessing.Pipe()[0], tmp_path, "cell", "", False)
    assert news == News("failed", "cell", words=words.format(path=tmp_path))
    assert (tmp_path / "traceback.txt").exists() == ("traceback" in words)
    if "traceback" in words:
        assert "ZeroDivisionError: float division" in (tmp_path / "traceback.txt").read_text()
