"""A run that is killed anywhere and resumed equals, bit for bit, the run that was not."""

import itertools
import random
import time
from pathlib import Path
from typing import Any

import pytest

from steadyrank.config import RunConfig
from steadyrank.runs import RunFolder

from .days import follow, log, write_day
from .faults import Server, assert_same, counts_of, start_server
from .tiny import tiny

WATCHED = (
    "watch.look_every=2",
    "watch.dynamics_every=4",
    "watch.tasks_every=5",
    "watch.rank_every=6",
    "watch.curvature_every=5",
    "watch.snapshot_every=4",
    "watch.verdict.least_steps=6",
    "watch.verdict.steps=20",
    "watch.warning.band_steps=20",
    "watch.warning.update_warm_up=5",
)
RECOVERS = (
    "recovery.mode=on",
    "recovery.ladder=['rollback', 'damp', 'stop']",
    "recovery.snapshot_every=3",
    "recovery.margin_steps=1",
    "recovery.patience_steps=6",
    "recovery.skips=0",
    "recovery.tries=1",
    "recovery.damp={steps=4, restore_steps=6}",
)
UNITS = "data.incidents=[{kind='units', at=0.4, length=0.2, target='watch_time', strength=1e9}]"
SCENARIOS = {
    "watched": tiny("train.checkpoint_every=7", *WATCHED),
    "recovers": tiny(
        "data.rows=5_000",
        "reader.window_rows=512",
        "train.checkpoint_every=7",
        "recovery.rollback_then=both",
        UNITS,
        *WATCHED,
        *RECOVERS,
    ),
    "no checkpoint": tiny("train.checkpoint_every=0", "watch.enabled=false"),
    "bad steps": log(
        "train.checkpoint_every=4",
        "train.on_bad_step=skip",
        "train.quarantine_rows=true",
        "optimizer.dense={name='adamw', lr=0.01}",
        *WATCHED,
    ),
    "days": log("train.checkpoint_every=5", "train.keep_days=2", "reader.window_per_file=true", *WATCHED),
    "follows": follow("train.checkpoint_every=5", *WATCHED),
}
QUICK = ("recovers", "follows")


@pytest.fixture
def server() -> Server:
    return start_server()


def prepare(config: RunConfig, folder: Path, feed: bool) -> tuple[RunConfig, dict[str, Any]]:
    """Write the log that the run reads; return its configuration, and the days that come while it waits."""
    if config.data.source == "stream":
        return config, {}
    spoilt = 60 if config.train.on_bad_step == "skip" else 0
    days = [write_day(folder / "log", day, spoilt_every=spoilt * (day % 2)) for day in range(4)]
    coming = folder / "coming"
    coming.mkdir()
    moved = [(path.rename(coming / path.name), path) for path in days[1:]] if feed else []
    return log_in(config, folder / "log"), {"feed": [[str(source), str(target)] for source, target in moved]}


def log_in(config: RunConfig, path: Path) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"path": str(path)})})


def kill_and_compare(server: Server, name: str, folder: Path, kills: int, seed: int) -> int:
    config, _ = prepare(SCENARIOS[name], folder, feed=False)
    start = time.perf_counter()
    whole = server.finish(config, folder / "whole")
    seconds = time.perf_counter() - start
    server.finish(config, folder / "counted", count=True)
    (calls, _), draw, hits = counts_of(folder / "counted"), random.Random(seed), 0
    for trial in itertools.count():
        if hits >= kills:
            break
        other = folder / f"killed_{trial}"
        other.mkdir()
        here, options = prepare(SCENARIOS[name], other, feed=name == "follows")
        hits += server.run_killed(here, other / "run", draw, calls, seconds, **options)
        assert_same(whole, RunFolder.open(other / "run"))
    return hits


@pytest.mark.parametrize("name", QUICK)
def test_killed_anywhere_and_resumed_it_is_the_same_run(server: Server, tmp_path: Path, name: str) -> None:
    assert kill_and_compare(server, name, tmp_path, kills=2, seed=1) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_many_places(server: Server, tmp_path: Path, name: str) -> None:
    assert kill_and_compare(server, name, tmp_path, kills=40, seed=2) >= 40
