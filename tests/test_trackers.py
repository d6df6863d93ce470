"""The names that trackers give to readings, and that what they show is what was read; with what is installed.

Weights & Biases (offline) and MLflow (a database file) are tried themselves where they are installed, which the default
environment does not have; elsewhere a stand-in notes what it is told.
"""

import importlib.util
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from steadyrank import trackers
from steadyrank.errors import ConfigError
from steadyrank.runs import RunFolder
from steadyrank.trackers import (
    MlflowConfig,
    MlflowTracker,
    TensorBoardTracker,
    Tracker,
    Trackers,
    TrackersConfig,
    WandbConfig,
    WandbTracker,
    open_trackers,
    tracker_name,
)

LAYER = "trunk.layers.linear_0.weight"
ROWS = {
    "steps": ["loss/click", "loss/watch_time", "loss/total", "loss_max/click", "logit_max/click",
              f"gradient_max/{LAYER}", f"clip_factor/{LAYER}", "bad_steps/total", "speed/rows_per_s"],
    "windows": ["auc/click", "gauc/click", "log_loss/click", "normalised_entropy/click", "rmse/watch_time",
                "normalised_rmse/watch_time", "mae/watch_time", "calibration/click", "baseline_auc/click",
                "attainable_auc/click", "positives/click", "log/rows", "log/time_s"],
    "dynamics": [f"{area}/{LAYER}" for area in (
        "gradient_norm", "weight_norm", "update_norm", "gradient_over_weight", "update_over_weight", "update_max",
        "update_over_weight_max", "direction_max", "accumulator_q01", "accumulator_q50", "factor_gc", "factor_lamb")]
    + ["dead_frac/trunk.layers.relu_0", "expert_load_frac/gates.click.0", "saturated_frac/click", "rows_touched/users"],
    "tasks": ["task_gradient_norm/click", "task_share_frac/click", "task_cosine/click|watch_time"],
    "curvature": ["headroom/total", "headroom/click", "headroom_next/total", "critical_sharpness/total"],
}  # fmt: skip
NAMES = {
    ("dynamics", f"gradient_norm/{LAYER}"): f"l2_norm/grad/{LAYER}",
    ("dynamics", f"weight_norm/{LAYER}"): f"l2_norm/param/{LAYER}",
    ("dynamics", f"update_norm/{LAYER}"): f"l2_norm/update/{LAYER}",
    ("dynamics", f"update_over_weight/{LAYER}"): f"l2_norm_ratio/update_param/{LAYER}",
    ("windows", "auc/click"): "metric/auc_click",
    ("windows", "gauc/click"): "metric/grouped_auc_click",
    ("windows", "normalised_entropy/click"): "metric/normalized_entropy_click",
    ("windows", "mae/watch_time"): "metric/mean_absolute_error_watch_time",
    ("windows", "rmse/watch_time"): "metric/root_mean_squared_error_watch_time",
    ("steps", "speed/rows_per_s"): "throughput/samples_per_sec",
    ("tasks", "task_cosine/click|watch_time"): "task_cosine/click/watch_time",
}


def test_known_readings_have_the_names_of_others_and_the_rest_their_own() -> None:
    found = {(table, reading): tracker_name(table, reading) for table, row in ROWS.items() for reading in row}
    assert found == {key: NAMES.get(key, key[1]) for key in found}
    assert set(NAMES) <= set(found)


def test_no_two_readings_share_a_name() -> None:
    names = [tracker_name(table, reading) for table, row in ROWS.items() for reading in row]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("reading", "expected"),
    [("loss/watch time", "loss/watch_time"), ("loss/a:b", "loss/a_b"), ("loss/größe", "loss/größe"), ("auc", "auc"),
     ("task_cosine/a|b c", "task_cosine/a/b_c"), ("loss/", "loss/"), ("", "")],
)  # fmt: skip
def test_a_name_has_no_character_that_any_of_the_three_refuses(reading: str, expected: str) -> None:
    assert tracker_name("windows", reading) == expected


def curve(path: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(path))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_what_was_read(tmp_path: Path) -> None:
    board = TensorBoardTracker(tmp_path)
    board.log("steps", 20, {"loss/click": 0.5, "loss/total": math.nan})
    board.log("windows", 20, {"auc/click": 0.75})
    board.log("steps", 40, {"loss/click": 0.25, "loss/total": -math.inf})
    board.close()
    assert curve(tmp_path, "loss/click") == [(20, 0.5), (40, 0.25)]
    assert curve(tmp_path, "metric/auc_click") == [(20, 0.75)]
    assert [(step, str(value)) for step, value in curve(tmp_path, "loss/total")] == [(20, "nan"), (40, "-inf")]


def test_tensorboard_hides_what_a_killed_process_wrote_after_the_checkpoint(tmp_path: Path) -> None:
    killed = TensorBoardTracker(tmp_path)
    for step in (1, 2, 3):
        killed.log("steps", step, {"loss/total": 9.0})
    killed.close()
    os.rename(next(tmp_path.iterdir()), tmp_path / "events.out.tfevents.1.first")  # files are read in order of name
    resumed = TensorBoardTracker(tmp_path, resumed_at=1)
    resumed.log("steps", 2, {"loss/total": 5.0})
    resumed.close()
    assert curve(tmp_path, "loss/total") == [(1, 9.0), (2, 5.0)]


class Noting:
    """A tracker that notes what it is told, and fails when it is told to."""

    def __init__(self, fails_from: int = 10**9, fails_to_close: bool = False) -> None:
        self.rows: list[tuple[str, int, dict[str, float]]] = []
        self.closed: list[bool] = []
        self.calls = 0
        self.fails_from, self.fails_to_close = fails_from, fails_to_close

    def log(self, table: str, step: int, row: Mapping[str, float]) -> None:
        self.calls += 1
        if step >= self.fails_from:
            raise ConnectionError("network is unreachable")
        self.rows.append((table, step, dict(row)))

    def close(self, ok: bool = True) -> None:
        if self.fails_to_close:
            raise TimeoutError("no answer")
        self.closed.append(ok)


def test_a_tracker_that_fails_is_left_out_with_one_warning_and_the_others_go_on() -> None:
    lost, kept = Noting(fails_from=2), Noting()
    both = Trackers([lost, kept])
    both.log("steps", 1, {"loss/total": 1.0})
    with pytest.warns(RuntimeWarning, match=r"Noting stopped at step 2: ConnectionError: network is unreachable"):
        both.log("steps", 2, {"loss/total": 1.0})
    for step in (3, 4):  # a second warning would be an error here
        both.log("steps", step, {"loss/total": 1.0})
    both.close(ok=False)
    assert lost.calls == 2
    assert lost.closed == []
    assert [step for _, step, _ in kept.rows] == [1, 2, 3, 4]
    assert kept.closed == [False]


def test_a_tracker_that_cannot_be_closed_warns_and_the_others_are_closed_once() -> None:
    stuck, kept = Noting(fails_to_close=True), Noting()
    both = Trackers([stuck, kept])
    with pytest.warns(RuntimeWarning, match="TimeoutError: no answer"):
        both.close()
    both.close()
    assert kept.closed == [True]


def test_an_interrupt_is_no_failure_of_a_tracker() -> None:
    class Interrupted(Noting):
        def log(self, table: str, step: int, row: Mapping[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers([Interrupted()]).log("steps", 1, {})


SETTINGS = {"name": "demo", "train": {"log_every": 20, "device": "cpu"}, "reader": {"windows": [1, 2]}}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "demo")


def test_by_default_only_tensorboard_is_written(folder: RunFolder) -> None:
    opened = open_trackers(TrackersConfig(), folder, "demo", SETTINGS)
    opened.log("steps", 1, {"loss/total": 0.5})
    opened.close()
    assert curve(folder.tensorboard_path(), "loss/total") == [(1, 0.5)]


def test_nothing_is_written_when_nothing_is_asked_for(folder: RunFolder) -> None:
    opened = open_trackers(TrackersConfig(tensorboard=False), folder, "demo", SETTINGS)
    opened.log("steps", 1, {"loss/total": 0.5})
    opened.close()
    assert not folder.tensorboard_path().exists()


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
@pytest.mark.parametrize("how", ["absent", "a mere folder"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    package: str, how: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None if how == "absent" else namespace(package))
    closed = []
    monkeypatch.setattr(TensorBoardTracker, "close", lambda self, ok=True: closed.append(ok))
    config = TrackersConfig.model_validate({package: {}})
    with pytest.raises(ConfigError, match=rf"'steadyrank\[{package}\]', or leave trackers.{package} out"):
        open_trackers(config, folder, "demo", SETTINGS)
    assert closed == [False]


def namespace(name: str) -> ModuleType:
    """Return what Python makes of a folder without `__init__.py`."""
    module = ModuleType(name)
    module.__file__ = None
    return module


class Calls:
    """A stand-in for an object of a package: it notes each call and answers what it was given."""

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            self.calls.append((name, args, named))
            answer = self._answers.get(name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


@pytest.fixture
def wandb_stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    run = Calls()
    stub = SimpleNamespace(__file__="wandb", run=run, package=Calls(init=run), Settings=dict)
    stub.init = stub.package.init
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_wandb_is_told_of_the_run_its_rows_and_its_end(wandb_stub: SimpleNamespace, folder: RunFolder) -> None:
    config = TrackersConfig(tensorboard=False, wandb=WandbConfig(project="ranker", entity="team", mode="offline"))
    opened = open_trackers(config, folder, "demo", SETTINGS)
    opened.log("windows", 7, {"auc/click": 0.75, "loss/click": math.inf})
    opened.close(ok=False)
    (_, _, start), = wandb_stub.package.calls  # fmt: skip
    assert (start["project"], start["entity"], start["mode"], start["name"]) == ("ranker", "team", "offline", "demo")
    assert start["config"] == SETTINGS
    assert start["dir"] == str(folder.path.resolve())
    assert wandb_stub.run.calls == [
        ("define_metric", ("*",), {"step_metric": "step"}),
        ("log", ({"metric/auc_click": 0.75, "loss/click": math.inf, "step": 7},), {}),
        ("finish", (), {"exit_code": 1}),
    ]


def test_a_wandb_that_does_not_start_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = SimpleNamespace(__file__="wandb", init=Calls(init=ValueError("no API key")).init, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    with pytest.raises(ConfigError, match=r"project 'ranker': no API key; run `wandb login` first, or set mode"):
        WandbTracker("ranker", "demo", {})


def mlflow_stub(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> Calls:
    client = Calls(create_run=SimpleNamespace(info=SimpleNamespace(run_id="r1")), **answers)
    entities = SimpleNamespace(Metric=lambda *args: args, Param=lambda *args: args)
    stub = SimpleNamespace(__file__="mlflow", entities=entities, MlflowClient=lambda tracking_uri: client)
    monkeypatch.setitem(sys.modules, "mlflow", stub)
    return client


def test_mlflow_is_told_of_the_run_its_rows_and_its_end(monkeypatch: pytest.MonkeyPatch, folder: RunFolder) -> None:
    client = mlflow_stub(monkeypatch, get_experiment_by_name=None, create_experiment="e1")
    monkeypatch.setattr(trackers.time, "time_ns", lambda: 5_000_000)
    config = TrackersConfig(tensorboard=False, mlflow=MlflowConfig(experiment="ranker"))
    opened = open_trackers(config, folder, "demo", SETTINGS)
    opened.log("windows", 7, {"auc/click": 0.75})
    opened.close()
    assert client.calls == [
        ("get_experiment_by_name", ("ranker",), {}),
        ("create_experiment", ("ranker",), {}),
        ("create_run", ("e1",), {"run_name": "demo"}),
        ("log_batch", ("r1",), {"params": [("name", "demo"), ("train.log_every", "20"), ("train.device", "cpu"),
                                           ("reader.windows", "[1, 2]")]}),
        ("log_batch", ("r1",), {"metrics": [("metric/auc_click", 0.75, 5, 7)]}),
        ("set_terminated", ("r1", "FINISHED"), {}),
    ]  # fmt: skip


def test_an_mlflow_that_does_not_start_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow_stub(monkeypatch, get_experiment_by_name=None, create_experiment=OSError("connection refused"))
    with pytest.raises(ConfigError, match=r"'ranker' at http://there: connection refused; check tracking_uri"):
        MlflowTracker("ranker", "demo", {}, tracking_uri="http://there")


def test_an_experiment_that_another_process_has_just_made_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    client = mlflow_stub(monkeypatch, create_experiment=OSError("it exists"))
    answers = iter([None, SimpleNamespace(experiment_id="e2")])
    client.get_experiment_by_name = lambda name: next(answers)
    MlflowTracker("ranker", "demo", {})
    assert ("create_run", ("e2",), {"run_name": "demo"}) in client.calls


def installed(package: str) -> pytest.MarkDecorator:
    spec = importlib.util.find_spec(package)
    return pytest.mark.skipif(spec is None or spec.origin is None, reason=f"needs steadyrank[{package}]")


@installed("wandb")
def test_wandb_itself_takes_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    import wandb

    tracker: Tracker = WandbTracker("ranker", "demo", SETTINGS, mode="offline", path=tmp_path)
    tracker.log("windows", 7, {"auc/click": 0.75, "loss/click": math.nan})
    tracker.log("steps", 5, {"loss/total": math.inf})
    tracker.close()
    wandb.teardown()
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    written = record.read_bytes()
    assert all(name in written for name in (b"metric/auc_click", b"0.75", b"NaN", b"loss/total", b"Infinity"))
    assert b"log_every" in written


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # SQLAlchemy 2.1's, of MLflow 3.17 itself
@installed("mlflow")
def test_mlflow_itself_gives_back_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for _ in range(2):  # the second finds the experiment
        tracker: Tracker = MlflowTracker("ranker", "demo", SETTINGS, tracking_uri=uri)
        tracker.log("windows", 7, {"auc/click": 0.75, "loss/click": math.nan, "loss/total": math.inf})
        tracker.log("dynamics", 8, {f"gradient_norm/layer_{i}": float(i) for i in range(1500)})
        tracker.close()
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("ranker")
    run, _ = client.search_runs([experiment.experiment_id])
    (metric,) = client.get_metric_history(run.info.run_id, "metric/auc_click")
    assert (metric.value, metric.step) == (0.75, 7)
    assert run.data.metrics["l2_norm/grad/layer_1499"] == 1499.0
    assert math.isnan(run.data.metrics["loss/click"])
    assert run.data.metrics["loss/total"] == pytest.approx(sys.float_info.max)
    assert run.data.params["train.log_every"] == "20"
    assert run.info.status == "FINISHED"
