"""A step done again is the same step, whatever it begins from, and leaves the run as it was."""

import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steadyrank import replay as module
from steadyrank.config import RunConfig
from steadyrank.errors import CheckpointError, ConfigError, DataError
from steadyrank.replay import replay
from steadyrank.runs import RunFolder

from .tiny import tiny, train

INCIDENT = "data.incidents=[{kind='units', at=0.6, length=0.2, target='rating'}]"
LONGER = (
    "data.rows=7_680",
    "reader.batch_size=64",
    "reader.window_rows=640",
    "reader.shuffle=false",
    "train.log_every=1",
)
FIRST_STRUCK = 73  # of 120 steps


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a run in which ratings are a thousand times too large for some steps; every step is read."""
    config = tiny(*LONGER, INCIDENT, "train.checkpoint_every=30", "train.keep_checkpoints=9")
    return train(config, tmp_path_factory.mktemp("runs") / "struck")


def contents(folder: RunFolder) -> dict[str, bytes]:
    files = {p.relative_to(folder.path).as_posix(): p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    return {name: data for name, data in files.items() if not name.startswith("causes/")}


@pytest.mark.parametrize(("step", "start"), [(1, 0), (30, 0), (31, 0), (75, 30), (91, 60), (120, 90)])
def test_a_step_is_replayed_to_the_bit_from_any_checkpoint(
    struck: RunFolder, monkeypatch: pytest.MonkeyPatch, step: int, start: int
) -> None:
    monkeypatch.setattr(module, "EARLIER", 20)
    seen: list[tuple[int, int]] = []
    before = contents(struck)
    found = replay(struck.path, step, lambda done, total: seen.append((done, total)))
    assert found.exact
    assert (found.start, found.difference) == (start, 0.0)
    tasks = list(tiny().schema_.tasks)
    assert found.compared == (step - start) * (len(tasks) + 1)
    assert "exactly" in str(found)
    assert seen[-1] == (step - start, step - start)
    # What is examined is the step itself: its losses are those that training met.
    recorded = struck.readings("steps")
    for task in tasks:
        assert found.cause.tasks[task].loss == recorded[f"loss/{task}"][step - 1]
    assert found.cause.earlier_steps == (20 if step - start > 20 else step - 1 - start or None)
    assert contents(struck) == before
    (written,) = [cause for cause in struck.causes() if cause["step"] == step]
    assert written["replayed"]["exact"] is True
    assert written["sentence"] == found.cause.sentence


def test_the_incident_is_found(struck: RunFolder) -> None:
    struck.write_cause(FIRST_STRUCK, {"why": "rating: the loss rose", "mine": 1})
    cause = replay(struck.path, FIRST_STRUCK).cause
    assert (cause.task, cause.feature) == ("rating", "label of rating")
    assert cause.layer is not None
    assert cause.layer.step == FIRST_STRUCK
    start, end = 0.6 * 7680, 0.8 * 7680
    assert all(start <= row.row < end for row in cause.rows[:3])
    first = cause.rows[0]
    assert abs(first.columns["rating"]) > 100
    assert {"user", "item", "time", "truth/rating"} <= set(first.columns)
    (written,) = [one for one in struck.causes() if one["step"] == FIRST_STRUCK]
    assert (written["why"], written["mine"]) == ("rating: the loss rose", 1)
    assert cause.why == written["why"]


def test_a_long_way_for_the_older_state_is_not_taken(struck: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST", 40)
    found = replay(struck.path, 110)
    assert (found.start, found.exact) == (90, True)
    assert found.cause.earlier_steps == 19


def test_a_replay_between_two_readings_goes_on_to_the_next(tmp_path: Path) -> None:
    folder = train(tiny("train.log_every=7", "train.window_steps=50"), tmp_path / "run")
    found = replay(folder.path, 10)
    assert found.exact
    assert found.compared == 2 * 7  # the rows of steps 7 and 14, six tasks and the total


def test_steps_of_a_warm_up_are_replayed_at_the_rates_they_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the beginning, from a checkpoint within the warm-up, and beyond its end."""
    monkeypatch.setattr(module, "EARLIER", 2)
    warm = ("train.warmup_steps=12", "train.log_every=1", "train.checkpoint_every=6", "train.keep_checkpoints=9")
    folder = train(tiny(*warm), tmp_path / "run")
    for step, start in ((4, 0), (10, 6), (15, 12)):
        found = replay(folder.path, step)
        assert (found.exact, found.difference, found.start) == (True, 0.0, start), str(found)


@pytest.mark.slow
def test_a_run_that_went_another_way_is_told(struck: RunFolder, tmp_path: Path) -> None:
    other = RunConfig.from_toml(struck.config_text(), ["optimizer.dense.lr=0.05"])
    changed = train(other, tmp_path / "run")
    changed.write_config(struck.config_text())
    found = replay(changed.path, 20)
    assert not found.exact
    assert 0 < found.difference < math.inf
    assert "but not exactly: a loss differs by" in str(found)
    path = changed.path / "readings" / "steps.jsonl"
    path.write_text("")
    silent = replay(changed.path, 20)
    assert not silent.exact
    assert "left no reading" in str(silent)


@pytest.mark.parametrize("step", [0, -1, 121, 1000])
def test_a_step_that_was_never_made_is_refused(struck: RunFolder, step: int) -> None:
    with pytest.raises(CheckpointError, match=rf"expected a step from 1 to 120, got step {step}"):
        replay(struck.path, step)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no run folder"):
        replay(tmp_path, 1)
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"config\.toml cannot be read"):
        replay(folder.path, 1)
    folder.write_config(tiny().to_toml())
    with pytest.raises(CheckpointError, match="expected a run that has made a step, got step 1"):
        replay(folder.path, 1)


LOG = """
[data]
path = "{path}"
[reader]
batch_size = 50
window_rows = 100
[model]
trunk = {{ kind = "shared_bottom", widths = [4] }}
[trackers]
tensorboard = false
[schema]
time = "t"
[schema.features.u]
kind = "id"
[schema.tasks.click]
kind = "binary"
"""


def test_a_log_that_is_gone_or_shorter_is_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {"t": np.arange(1000), "u": rng.integers(0, 9, 1000), "click": rng.integers(0, 2, 1000)}
    table = pa.table({**columns, "key": [f"request {i}" for i in range(1000)]})
    path = tmp_path / "log.parquet"
    pq.write_table(table, path)
    folder = train(RunConfig.from_toml(LOG.format(path=path)), tmp_path / "run")
    cause = replay(folder.path, 3).cause
    for row in cause.rows:
        assert row.columns["key"] == f"request {row.row}"
    pq.write_table(table.slice(0, 420), path)
    with pytest.raises(DataError, match="has changed since the run read it"):
        replay(folder.path, 15)
    path.unlink()
    with pytest.raises(ConfigError, match="there is no file or folder"):
        replay(folder.path, 15)


def test_a_bad_step_is_replayed(tmp_path: Path) -> None:
    """Its update was left out, in the run and in the replay."""
    config = tiny("optimizer.dense={name='sgd', lr=1e18}", "model.cross={layers=3}", "train.on_bad_step=skip")
    folder = train(config, tmp_path / "run")
    bad = int(folder.readings("steps")["step"][-1])
    found = replay(folder.path, bad)
    assert found.exact
    assert not all(math.isfinite(reading.loss) for reading in found.cause.tasks.values())
    assert "its loss was not finite" in found.cause.sentence


@pytest.mark.slow
def test_steps_are_replayed_through_a_damping_and_from_after_a_return(tmp_path: Path) -> None:
    """The run is damped, goes back to an earlier state, and leaves data out."""
    incident = "data.incidents=[{kind='units', at=0.4, length=0.2, target='watch_time', strength=1e9}]"
    recovery = (
        "recovery={mode='on', ladder=['damp', 'rollback', 'stop'], tries=1, patience_steps=12, rollback_then='both', "
        "margin_steps=1, damp={steps=4, restore_steps=30}}"
    )
    kept = ("train.checkpoint_every=10", "train.keep_checkpoints=99", "watch.verdict={least_steps=6, steps=20}")
    folder = train(tiny(*LONGER, incident, recovery, *kept), tmp_path / "run")
    events = {kind: [e["step"] for e in folder.events() if e["kind"] == kind] for kind in ("damped", "returned")}
    first, back = events["damped"][0], events["returned"][0]
    assert first < back
    for step in (first + 3, back, back + 5):
        found = replay(folder.path, step)
        assert found.exact, str(found)
        assert found.start >= (back if step > back else 0)
    for step in folder.checkpoints.steps():
        if step >= back:
            shutil.rmtree(folder.checkpoints.folder(step))
    with pytest.raises(
        CheckpointError, match=rf"at step {back} the run went back to an earlier state, and no checkpoint"
    ):
        replay(folder.path, back + 5)
