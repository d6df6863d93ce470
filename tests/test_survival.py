"""A run that is killed anywhere and resumed equals, bit for bit, the run that was not."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from steadyrank.config import RunConfig
from steadyrank.runs import RunFolder

from .faults import Server, assert_same, timed
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
SCENARIOS = {
    "plain": tiny("train.checkpoint_every=7", *WATCHED),
    "recovers": tiny(
        "data.rows=5_000",
        "reader.window_rows=512",
        "train.checkpoint_every=7",
        "data.incidents=[{kind='units', at=0.4, length=0.2, target='watch_time', strength=1e9}]",
        "recovery.rollback_then=both",
        *WATCHED,
        *RECOVERS,
    ),
    "no checkpoint": tiny("train.checkpoint_every=0", "train.max_readings_mb=0.01"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


def kill_and_compare(server: Server, config: RunConfig, folder: Path, kills: int, seed: int) -> int:
    whole = folder / "whole"
    seconds = timed(server, config, whole)
    assert server.run(config, folder / "counted", count=True) == 0
    calls, draw, hits = int((folder / "calls").read_text()), random.Random(seed), 0
    while hits < kills:
        other = folder / f"killed_{hits}"
        hits += server.run_killed(config, other, draw, calls, seconds)
        assert_same(RunFolder.open(whole), RunFolder.open(other))
    return hits


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_anywhere_and_resumed_it_is_the_same_run(server: Server, tmp_path: Path, name: str) -> None:
    assert kill_and_compare(server, SCENARIOS[name], tmp_path, kills=4, seed=1) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_a_hundred_places(server: Server, tmp_path: Path, name: str) -> None:
    assert kill_and_compare(server, SCENARIOS[name], tmp_path, kills=100, seed=2) >= 100
