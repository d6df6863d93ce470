"""The job by steadyrank: a whole run with everything that is on by default, and the bare step."""

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import tomli_w
import torch
from job import BATCH, EXPERT, EXPERTS, ID_NAMES, NUMBER_NAMES, RATE, TASKS, TOWER, WARM_UP, WIDTH, Clock, Job, Outcome

from steadyrank.config import RunConfig, open_source
from steadyrank.runs import RunFolder
from steadyrank.sequential import run
from steadyrank.train import fit

ADAGRAD = {"name": "adagrad", "lr": RATE, "initial_accumulator_value": 0.0}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "init": {  # as `steadyrank init` writes them
        "dense": {"name": "clippy_adagrad", "lr": 0.02, "initial_accumulator_value": 1e-5},
        "tables": {"name": "rowwise_adagrad", "lr": 0.05, "initial_accumulator_value": 0.0},
    },
    "adagrad": {"dense": ADAGRAD, "tables": ADAGRAD},
}


def configure(job: Job, optimizers: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Say the job as a user says it, in TOML; with `overrides` as of `--set`."""
    features: dict[str, Any] = {name: {"kind": "id", "rows": job.rows_each, "hashed": False} for name in ID_NAMES}
    features |= {name: {"kind": "number"} for name in NUMBER_NAMES}
    config = {
        "data": {"path": str(job.path("train"))},
        "reader": {"batch_size": BATCH},
        "schema": {
            "embedding_width": WIDTH,
            "features": features,
            "tasks": {name: {"kind": "binary"} for name in TASKS},
        },
        "model": {"trunk": {"kind": "mmoe", "experts": EXPERTS, "widths": EXPERT}, "tower": [TOWER]},
        "optimizer": OPTIMIZERS[optimizers],
        "train": {"device": "cpu"},
    }
    return RunConfig.from_toml(tomli_w.dumps(config), overrides)


def train_whole(job: Job, optimizers: str = "init", overrides: Sequence[str] = ()) -> Outcome:
    """Train from Parquet in a run folder.

    The clock is the run's own: from before the first row is read, with metrics, instruments, guard and readings.
    """
    _warm_up(configure(job, optimizers, [*overrides, f"data.max_rows={WARM_UP * BATCH}"]))
    config = configure(job, optimizers, overrides)
    parts = config.build()
    with RunFolder.create(job.folder / "run", overwrite=True) as folder:
        folder.write_config(config.to_toml())
        summary = run(parts, folder)
    return Outcome(summary["rows"], summary["seconds"], lambda: _predict(config, parts.model, job))


def train_step(job: Job, optimizers: str = "init", overrides: Sequence[str] = ()) -> Outcome:
    """Learn batches that lie in memory, without metrics and instruments; with the guard."""
    config = configure(job, optimizers, overrides)
    parts = config.build()
    parts.set_up()
    batches, clock = [batch for batch, _ in parts.reader.batches()], Clock()
    for _ in fit(parts.model, parts.optimizers, clock.over(batches), parts.schema.tasks):
        pass
    return clock.outcome(sum(map(len, batches)), lambda: _predict(config, parts.model, job))


def _warm_up(config: RunConfig) -> None:
    """Train a model that is then forgotten."""
    parts = config.build()
    parts.set_up()
    for _ in fit(parts.model, parts.optimizers, (batch for batch, _ in parts.reader.batches()), parts.schema.tasks):
        pass
    del parts
    gc.collect()  # it would count as memory of the run that follows


def _predict(config: RunConfig, model: torch.nn.Module, job: Job) -> np.ndarray:
    model.eval()
    reader = config.build_reader(open_source(str(job.path("valid")), config.schema_))
    with torch.no_grad():
        return torch.cat([model(batch) for batch in reader.in_order()]).numpy()
