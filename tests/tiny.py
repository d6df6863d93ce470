"""A run small enough for a test, on the generated stream."""

from pathlib import Path

from steadyrank.config import RunConfig
from steadyrank.runs import RunFolder
from steadyrank.sequential import OnProgress, run

TINY = """
name = "tiny"

[data]
source = "stream"
rows = 2_560
users = 200
items = 300
features = 12
rows_per_day = 1_000

[reader]
batch_size = 128
window_rows = 600

[model]
trunk = { kind = "shared_bottom", widths = [16] }
cross = { layers = 1, layer_norm = true }

[optimizer.dense]
name = "clippy_adagrad"

[train]
log_every = 3
window_steps = 5
report = false

[trackers]
tensorboard = false
"""


def tiny(*overrides: str) -> RunConfig:
    """Return the tiny run's configuration, with overrides."""
    return RunConfig.from_toml(TINY, overrides)


def train(config: RunConfig, path: Path, on_progress: OnProgress | None = None) -> RunFolder:
    """Train into a new run folder and return it."""
    folder = RunFolder.create(path)
    folder.write_config(config.to_toml())
    run(config.build(), folder, on_progress=on_progress)
    return folder
