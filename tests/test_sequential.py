"""Progressive validation, exactness of a run, and what is left when one ends early."""

import json
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from steadyrank.config import RunConfig
from steadyrank.errors import DataError, DivergenceError
from steadyrank.runs import RunFolder
from steadyrank.sequential import Progress, run

from .tiny import tiny, train


def weights_of(folder: RunFolder) -> dict[str, torch.Tensor]:
    return folder.checkpoints.load()["model"]


def check_same_run(one: RunFolder, other: RunFolder) -> None:
    """Check that two runs left the same weights, optimizer states, readings and summary, bit for bit."""
    left, right = one.checkpoints.load(), other.checkpoints.load()
    for key in left["model"]:
        assert torch.equal(left["model"][key], right["model"][key]), key
    for part in left["optimizers"]:
        for index, state in left["optimizers"][part]["state"].items():
            for key, value in state.items():
                assert torch.equal(value, right["optimizers"][part]["state"][index][key])
    for table in ("steps", "windows"):
        a, b = one.readings(table), other.readings(table)
        assert set(a) == set(b)
        for name in set(a) - {"time", "speed/rows_per_s"}:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    a, b = one.summary(), other.summary()
    assert json.dumps(a["tasks"]) == json.dumps(b["tasks"])


def test_two_runs_are_bitwise_the_same(tmp_path: Path) -> None:
    check_same_run(train(tiny(), tmp_path / "a"), train(tiny(), tmp_path / "b"))


@pytest.mark.slow
def test_another_seed_is_another_run(tmp_path: Path) -> None:
    a, b = train(tiny(), tmp_path / "a"), train(tiny("seed=1"), tmp_path / "b")
    assert any(not torch.equal(weights_of(a)[key], weights_of(b)[key]) for key in weights_of(a))


class KilledError(Exception):
    """Kills a run in the middle, as a crash would."""


def test_a_run_resumed_from_a_checkpoint_equals_the_run_that_went_through(tmp_path: Path) -> None:
    config = tiny("train.checkpoint_every=7")
    whole = train(config, tmp_path / "whole")

    def crash(progress: Progress) -> None:
        if progress.step >= 12:
            raise KilledError

    with pytest.raises(KilledError):
        train(config, tmp_path / "killed", on_progress=crash)
    killed = RunFolder.open(tmp_path / "killed")
    assert killed.checkpoints.steps() == [7]
    run(config.build(), killed, resume=True)
    check_same_run(whole, killed)
    assert whole.summary()["missing"] == killed.summary()["missing"]


def test_progressive_scores_come_from_before_the_batch_was_learned(tmp_path: Path) -> None:
    config = tiny("optimizer.dense={name='sgd', lr=0.0}", "optimizer.tables={name='sgd', lr=0.0}")
    frozen = train(config, tmp_path / "frozen")
    learning = train(tiny(), tmp_path / "learning")
    # The first batch is scored by the same untrained weights in both.
    first = [folder.readings("steps")["loss/total"][0] for folder in (frozen, learning)]
    assert first[0] != first[1]  # a mean over three steps, of which the last two differ
    one = [train(c, tmp_path / n) for c, n in ((tiny("data.rows=128"), "a"), (config_one_batch(), "b"))]
    assert one[0].summary()["tasks"] == one[1].summary()["tasks"]


def config_one_batch() -> RunConfig:
    return tiny("data.rows=128", "optimizer.dense={name='sgd', lr=0.0}", "optimizer.tables={name='sgd', lr=0.0}")


def test_what_a_run_leaves(tmp_path: Path) -> None:
    seen: list[Progress] = []
    config = tiny("trackers.tensorboard=true", "train.report=true")
    folder = train(config, tmp_path / "run", on_progress=seen.append)
    summary = folder.summary()
    assert summary["status"] == "finished"
    assert summary["rows"] == 2560
    assert summary["steps"] == sum(-(-rows // 128) for rows in (600, 600, 600, 600, 160))
    assert set(summary["tasks"]) == set(tiny().schema_.tasks)
    for task in summary["tasks"].values():
        assert {"kind", "run", "last_day", "baseline", "attainable"} <= set(task)
    assert seen[-1].rows == 2560
    assert folder.report_path().read_text().lstrip().lower().startswith("<!doctype html>")
    assert list(folder.tensorboard_path().glob("events.*"))
    windows = folder.readings("windows")
    assert {"auc/click", "baseline_auc/click", "attainable_auc/click", "rmse/watch_time"} <= set(windows)
    factors = [name for name in folder.readings("steps") if name.startswith("clip_factor/")]
    assert factors
    for name in factors:
        assert np.all((folder.readings("steps")[name] >= 0) & (folder.readings("steps")[name] <= 1))
    assert RunConfig.from_toml(folder.config_text()) == config


def test_ctrl_c_ends_cleanly_with_a_checkpoint_to_resume(tmp_path: Path) -> None:
    def press(progress: Progress) -> None:
        if progress.step == 6:
            signal.raise_signal(signal.SIGINT)

    folder = train(tiny(), tmp_path / "run", on_progress=press)
    assert folder.summary()["status"] == "interrupted"
    assert folder.checkpoints.steps() == [6]
    assert folder.events()[-1]["kind"] == "interrupted"
    whole = train(tiny(), tmp_path / "whole")
    run(tiny().build(), folder, resume=True)
    for key, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(folder)[key])
    for name, values in whole.readings("windows").items():
        if name != "time":
            np.testing.assert_array_equal(values, folder.readings("windows")[name], err_msg=name)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


LOG = """
name = "log"
[data]
path = "{path}"
[reader]
batch_size = 50
window_rows = 100
[model]
trunk = {{ kind = "shared_bottom", widths = [4] }}
[train]
window_steps = 2
log_every = 2
[trackers]
tensorboard = false
[schema]
time = "t"
baseline = ["u"]
[schema.features.u]
kind = "id"
[schema.features.x]
kind = "number"
[schema.tasks.click]
kind = "binary"
"""


def write_log(path: Path, **changes: object) -> RunConfig:
    rows = 1000
    rng = np.random.default_rng(0)
    columns = {"t": np.arange(rows), "u": rng.integers(0, 9, rows), "x": rng.normal(size=rows)}
    columns |= {"click": rng.integers(0, 2, rows)}
    columns |= {name: value(rows) if callable(value) else value for name, value in changes.items()}
    pq.write_table(pa.table(columns), path, row_group_size=250)
    return RunConfig.from_toml(LOG.format(path=path))


def test_a_bad_label_halfway_keeps_the_run_up_to_there(tmp_path: Path) -> None:
    labels = np.zeros(1000, dtype=np.int64)
    labels[::3] = 1
    labels[777] = 2
    config = write_log(tmp_path / "log.parquet", click=labels)
    with pytest.raises(DataError, match=r"log\.parquet, row group 3, row 777, column 'click': expected a binary label"):
        train(config, tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    assert folder.summary()["status"] == "data_error"
    assert folder.summary()["rows"] > 0
    assert folder.checkpoints.steps()
    assert folder.report_path().exists()


def test_a_corrupt_row_group_keeps_the_run_up_to_there(tmp_path: Path) -> None:
    config = write_log(tmp_path / "log.parquet")
    raw = bytearray((tmp_path / "log.parquet").read_bytes())
    offset = pq.read_metadata(tmp_path / "log.parquet").row_group(3).column(0).data_page_offset
    raw[offset : offset + 40] = b"\x00" * 40
    (tmp_path / "log.parquet").write_bytes(raw)
    with pytest.raises(DataError, match=r"log\.parquet, row group 3: not readable as Parquet"):
        train(config, tmp_path / "run")
    assert RunFolder.open(tmp_path / "run").summary()["rows"] > 0


@pytest.mark.parametrize("rows", [1, 2, 51])
def test_tiny_logs_train(tmp_path: Path, rows: int) -> None:
    config = write_log(tmp_path / "log.parquet")
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_rows": rows})})
    summary = train(config, tmp_path / "run").summary()
    assert (summary["status"], summary["rows"]) == ("finished", rows)


def test_a_label_that_never_varies_gives_no_verdict_and_no_crash(tmp_path: Path) -> None:
    config = write_log(tmp_path / "log.parquet", click=np.zeros(1000, dtype=np.int64))
    summary = train(config, tmp_path / "run").summary()
    assert np.isnan(summary["tasks"]["click"]["run"]["auc"])


def test_a_step_that_is_not_finite_stops_and_is_named(tmp_path: Path) -> None:
    config = tiny("optimizer.dense={name='sgd', lr=1e18}", "model.cross={layers=3}")
    with pytest.raises(DivergenceError, match=r"step \d+: not finite: .*train.on_bad_step = 'skip'"):
        train(config, tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    assert folder.summary()["status"] == "diverged"
    assert [event for event in folder.events() if event["kind"] == "bad_step"]
    for value in weights_of(folder).values():
        assert torch.isfinite(value).all()


def test_bad_steps_can_be_counted_and_passed_over(tmp_path: Path) -> None:
    config = tiny("optimizer.dense={name='sgd', lr=1e18}", "model.cross={layers=3}", "train.on_bad_step=skip")
    summary = train(config, tmp_path / "run").summary()
    assert summary["status"] == "finished"
    assert summary["bad_steps"] > 0
