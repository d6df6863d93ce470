"""The readings of a run in TensorBoard, Weights & Biases and MLflow, under the names that their users know.

The run folder is what counts; a tracker shows the same readings elsewhere, and a run goes on when one fails.
"""

import importlib
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from .errors import ConfigError
from .files import refuse_link
from .runs import RunFolder
from .settings import Settings

_COMMON_NAMES = {
    "dynamics": {
        "gradient_norm": "l2_norm/grad/",
        "weight_norm": "l2_norm/param/",
        "update_norm": "l2_norm/update/",
        "update_over_weight": "l2_norm_ratio/update_param/",
    },
    "windows": {
        "auc": "metric/auc_",
        "gauc": "metric/grouped_auc_",
        "normalised_entropy": "metric/normalized_entropy_",
        "mae": "metric/mean_absolute_error_",
        "rmse": "metric/root_mean_squared_error_",
    },
}
"""By table and area: what stands before the rest of the name elsewhere."""
_SPEED = {"speed/rows_per_s": "throughput/samples_per_sec"}
_STRANGE = re.compile(r"[^-/\w.]")  # what MLflow refuses, and TensorBoard replaces


class WandbConfig(Settings):
    """Weights & Biases; needs the extra `wandb`. An empty table is enough to turn it on."""

    project: str = Field(default="steadyrank", min_length=1)
    """The project that the run is shown in."""
    entity: str | None = None
    """The user or team that owns the project; the account's default when left out."""
    mode: Literal["online", "offline"] | None = None
    """`offline` writes into the run folder, for `wandb sync`; what WANDB_MODE says, else `online`, when left out."""


class MlflowConfig(Settings):
    """MLflow; needs the extra `mlflow`. An empty table is enough to turn it on."""

    experiment: str = Field(default="steadyrank", min_length=1)
    """The experiment that the run belongs to; made when there is none."""
    tracking_uri: str | None = None
    """The server or database; what MLFLOW_TRACKING_URI says, else MLflow's own default, when left out."""


class TrackersConfig(Settings):
    """Where readings are shown, besides the run folder."""

    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases; not at all when left out."""
    mlflow: MlflowConfig | None = None
    """Log to MLflow; not at all when left out."""


@runtime_checkable
class Tracker(Protocol):
    """Shows the readings of one run."""

    def log(self, table: str, step: int, row: Mapping[str, float]) -> None:
        """Show a row of readings by their names in the run folder, NaN and infinite ones too."""

    def close(self, ok: bool = True) -> None:
        """Send what is left; `ok` says whether the run ended as it should."""


@lru_cache(maxsize=65_536)  # the same names come at every reading
def tracker_name(table: str, reading: str) -> str:
    """Return the name of a reading in TensorBoard, Weights & Biases and MLflow.

    A reading that Composer, TorchEasyRec or EasyRec shows too has their name, every other its own. A character that one
    of the three places refuses becomes `_`, the bar between two tasks `/`.

    Args:
        table: The table of the run folder: "steps", "windows", "dynamics", "tasks", "curvature".
        reading: `area/name`.

    Example:
        >>> tracker_name("dynamics", "update_over_weight/trunk.layers.linear_0.weight")
        'l2_norm_ratio/update_param/trunk.layers.linear_0.weight'
        >>> tracker_name("windows", "gauc/click"), tracker_name("steps", "loss/total")
        ('metric/grouped_auc_click', 'loss/total')
        >>> tracker_name("tasks", "task_cosine/click|watch time")
        'task_cosine/click/watch_time'

    Sources, as read in their repositories:
        Composer: `l2_norm/grad/LAYER`, `l2_norm/param/LAYER`, `l2_norm/update/LAYER` (composer/callbacks/
        optimizer_monitor.py, composer/optim/decoupled_weight_decay.py), `l2_norm_ratio/update_param/LAYER` (there in
        earlier versions), `throughput/samples_per_sec` (composer/callbacks/speed_monitor.py). Its `cosine/...` are
        between gradient, moment and update; we read none of these.
        TorchEasyRec: `loss/LOSS_TASK`, `loss/total`, `metric/METRIC_TASK` with METRIC one of `auc`, `grouped_auc`,
        `mean_absolute_error` (tzrec/main.py, tzrec/models/rank_model.py), and normalised entropy spelt as its module
        is (tzrec/metrics/normalized_entropy.py). LOSS, such as `binary_cross_entropy`, is left out here.
        EasyRec: `root_mean_squared_error_TASK` (easy_rec/python/model/rank_model.py), which TorchEasyRec lacks; its
        other names for the same things (`gauc_TASK`, `loss/loss/total_loss`) give way to TorchEasyRec's.
    """
    area, _, rest = reading.partition("/")
    prefix = _COMMON_NAMES.get(table, {}).get(area)
    name = prefix + rest if prefix is not None and rest else _SPEED.get(reading, reading)
    return _STRANGE.sub("_", name.replace("|", "/"))


class TensorBoardTracker:
    """Writes TensorBoard event files.

    A row is one event, not one for each reading: on 850 readings that takes 3 ms and not 55.

    Args:
        path: The folder for the files; made if need be.
        resumed_at: The step that a resumed run goes on from: later ones, of the process that was killed, are hidden.
    """

    def __init__(self, path: str | Path, *, resumed_at: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # heavy: loads protobuf
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import FileWriter

        self._summary = Summary
        self._writer = FileWriter(str(path))
        if resumed_at is not None:
            self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step=resumed_at + 1)

    def log(self, table: str, step: int, row: Mapping[str, float]) -> None:
        """Show a row of readings, as float32; NaN and infinite ones are markers on the curve."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in _named(table, row)]
        self._writer.add_summary(self._summary(value=values), step)

    def close(self, ok: bool = True) -> None:
        """Write what is left."""
        self._writer.close()


class WandbTracker:
    """Logs to Weights & Biases, which sends in the background and keeps what it cannot send.

    Every reading is drawn over `step`, which is logged with it, so that rows may come in any order.

    Args:
        project: The project that the run is shown in.
        name: The run's name.
        config: The run's configuration.
        entity: The user or team that owns the project; the account's default for None.
        mode: "online" or "offline"; the environment's WANDB_MODE for None.
        path: The folder in which `wandb/` is made; the current one for None.

    Raises:
        ConfigError: The package is missing, or the run cannot be started.
    """

    def __init__(
        self,
        project: str,
        name: str,
        config: Mapping[str, Any],
        *,
        entity: str | None = None,
        mode: Literal["online", "offline"] | None = None,
        path: str | Path | None = None,
    ) -> None:
        wandb = _load("wandb")
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                config=dict(config),
                entity=entity,
                mode=mode,
                dir=None if path is None else str(path),
                reinit="create_new",  # a run that the user's own code has open stays open
                settings=wandb.Settings(silent=True, console="off"),
            )
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # any of its own many kinds
            raise ConfigError(
                f"Weights & Biases cannot start a run in project '{project}': {error}; run `wandb login` first, or set "
                "mode = 'offline'"
            ) from error

    def log(self, table: str, step: int, row: Mapping[str, float]) -> None:
        """Show a row of readings; NaN and infinite ones are kept as they are."""
        self._run.log({**dict(_named(table, row)), "step": step})

    def close(self, ok: bool = True) -> None:
        """Send what is left and end the run, as failed if it is not `ok`."""
        self._run.finish(exit_code=0 if ok else 1)


class MlflowTracker:
    """Logs to MLflow, each row in one request, or in several of 1000 readings.

    Args:
        experiment: The experiment that the run belongs to; made when there is none.
        name: The run's name.
        config: The run's configuration; its values become the run's parameters, `train.log_every` and so on.
        tracking_uri: The server or database; the environment's MLFLOW_TRACKING_URI for None.

    Raises:
        ConfigError: The package is missing, or the run cannot be started.
    """

    def __init__(
        self, experiment: str, name: str, config: Mapping[str, Any], *, tracking_uri: str | None = None
    ) -> None:
        mlflow = _load("mlflow")
        entities = mlflow.entities
        self._metric = entities.Metric
        try:
            # A client of its own: the process's active run and default server, which a user may have set, stay.
            self._client = mlflow.MlflowClient(tracking_uri=tracking_uri)
            found = self._experiment(experiment)
            self._run_id = self._client.create_run(found, run_name=name).info.run_id
            parameters = [entities.Param(_STRANGE.sub("_", key), str(value)) for key, value in _flat(config)]
            self._client.log_batch(self._run_id, params=parameters)
        except Exception as error:  # of MLflow, of the network or of the database below
            raise ConfigError(
                f"MLflow cannot start a run in experiment '{experiment}' at "
                f"{tracking_uri or 'its default tracking URI'}: {error}; check tracking_uri and that its server is up"
            ) from error

    def log(self, table: str, step: int, row: Mapping[str, float]) -> None:
        """Show a row of readings; NaN is kept, and a database gives the largest float64 back for an infinite one."""
        now = time.time_ns() // 1_000_000
        metrics = [self._metric(name, value, now, step) for name, value in _named(table, row)]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, ok: bool = True) -> None:
        """End the run, as failed if it is not `ok`."""
        self._client.set_terminated(self._run_id, "FINISHED" if ok else "FAILED")

    def _experiment(self, name: str) -> Any:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name)
            except Exception:  # another process has just made it
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id


class Trackers:
    """Several trackers as one. One that fails is left out from then on, with one warning, and the run goes on.

    It is not tried again: a client that has given up has itself retried, some for minutes, and the training waited.

    >>> class Broken(Tracker):
    ...     def log(self, table, step, row):
    ...         raise OSError("network is unreachable")
    >>> trackers = Trackers([Broken()])
    >>> with warnings.catch_warnings(record=True, action="always") as caught:
    ...     trackers.log("steps", 20, {"loss/total": 0.7})
    ...     trackers.log("steps", 40, {"loss/total": 0.6})
    >>> [str(warning.message) for warning in caught]
    ['Broken stopped at step 20: OSError: network is unreachable; the run goes on, and its folder has every reading']
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)
        self._step = 0

    def log(self, table: str, step: int, row: Mapping[str, float]) -> None:
        """Show a row of readings everywhere."""
        self._step = step
        for tracker in list(self._trackers):
            try:
                tracker.log(table, step, row)
            except Exception as error:  # whatever it is, training is worth more
                self._leave_out(tracker, error)

    def close(self, ok: bool = True) -> None:
        """Close every tracker that is left; once only."""
        for tracker in list(self._trackers):
            try:
                tracker.close(ok)
            except Exception as error:  # as above
                self._leave_out(tracker, error)
        self._trackers.clear()

    def _leave_out(self, tracker: Tracker, error: Exception) -> None:
        self._trackers.remove(tracker)
        warnings.warn(
            f"{type(tracker).__name__} stopped at step {self._step}: {type(error).__name__}: {error}; the run goes on, "
            "and its folder has every reading",
            RuntimeWarning,
            stacklevel=3,
        )


def open_trackers(
    config: TrackersConfig,
    folder: RunFolder,
    name: str,
    settings: Mapping[str, Any],
    *,
    resumed_at: int | None = None,
) -> Trackers:
    """Start the trackers that the configuration asks for.

    A resumed run goes on in its TensorBoard files; in Weights & Biases and MLflow it is a new run of the same name.

    Args:
        config: Which.
        folder: The run folder.
        name: The run's name.
        settings: The run's configuration, as the table that config.toml holds.
        resumed_at: The step that a resumed run goes on from.

    Raises:
        ConfigError: A package is missing, or a tracker cannot be started; those that were are closed again.
        CheckpointError: A link stands where a tracker would write.
    """
    for path in (folder.tensorboard_path(), folder.path / "wandb"):
        refuse_link(path)
    opened: list[Tracker] = []
    try:
        if config.tensorboard:
            opened.append(TensorBoardTracker(folder.tensorboard_path(), resumed_at=resumed_at))
        if (wandb := config.wandb) is not None:
            opened.append(
                WandbTracker(
                    wandb.project, name, settings, entity=wandb.entity, mode=wandb.mode, path=folder.path.resolve()
                )
            )
        if (mlflow := config.mlflow) is not None:
            opened.append(MlflowTracker(mlflow.experiment, name, settings, tracking_uri=mlflow.tracking_uri))
    except ConfigError:
        Trackers(opened).close(ok=False)
        raise
    return Trackers(opened)


def _named(table: str, row: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    for reading, value in row.items():
        yield tracker_name(table, reading), float(value)


def _load(package: str) -> Any:
    """Import an optional package."""
    try:
        module = importlib.import_module(package)
        if module.__file__ is None:  # a mere folder of that name, such as the one that wandb writes
            raise ModuleNotFoundError(f"no module '{package}'", name=package)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"logging to {package} needs a package that is not installed ({error.name}); pip install "
            f"'steadyrank[{package}]', or leave trackers.{package} out"
        ) from error
    return module


def _flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a nested table with its path: `train.log_every`."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
