"""A small log with one Parquet file a day, and runs over it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from steadyrank.config import RunConfig

DAY_S = 86_400
LOG = """
name = "days"
[data]
path = "log"
[reader]
batch_size = 32
window_rows = 100
[model]
trunk = { kind = "shared_bottom", widths = [8] }
[train]
window_steps = 3
log_every = 2
report = false
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
[schema.tasks.dwell]
kind = "regression"
"""


def log(*overrides: str) -> RunConfig:
    """Return a run over such a log."""
    return RunConfig.from_toml(LOG, overrides)


def follow(*overrides: str) -> RunConfig:
    """Return a run that follows it, and ends when no file has come for a moment."""
    return log("train.follow=true", "train.follow_every_s=0.01", "train.follow_idle_s=0.03", *overrides)


def write_day(
    folder: Path, day: int, rows: int = 150, name: str = "", spoilt_every: int = 0, **columns: object
) -> Path:
    """Write the file of a day, whole or not at all; where a row is spoilt, the loss is not finite."""
    draw = np.random.default_rng(day)
    x = draw.normal(size=rows)
    table = {
        "t": pa.array((day * DAY_S + np.linspace(0, DAY_S - 1, rows)).astype("datetime64[s]")),
        "u": draw.integers(0, 9, rows),
        "x": x,
        "click": (x + draw.normal(size=rows) > 0).astype(np.int64),
        "dwell": np.abs(x) + draw.random(rows),
    }
    if spoilt_every:
        table["dwell"][::spoilt_every] = 1e25
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name or f'day_{day}'}.parquet"
    pq.write_table(pa.table({**table, **columns}), path.with_suffix(".part"), row_group_size=64)
    return path.with_suffix(".part").rename(path)
