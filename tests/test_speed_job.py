"""The training-speed benchmark's own logic: its log, its clock, its table. No peer is needed."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks" / "speed"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_a_seed_makes_one_log(module: Any) -> None:
    job = module("job")
    first, again, other = (job.draw(500, 2_600, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.ids, other.ids)


def test_the_log_has_a_signal_and_popular_ids(module: Any) -> None:
    job = module("job")
    drawn = job.draw(60_000, 2_600, seed=0)
    assert drawn.ids.min() == 0
    assert drawn.ids.max() == 99
    assert 0.19 < np.mean(drawn.ids == 0) < 0.24  # (1 / 100) ** (1 / 3)

    def rates(rows: slice, feature: int) -> np.ndarray:
        ids, clicks = drawn.ids[rows, feature], drawn.labels[rows, 0]
        return np.bincount(ids, clicks, 100) / np.bincount(ids, minlength=100)

    halves = slice(0, 30_000), slice(30_000, None)
    informative, other = (np.corrcoef([rates(half, i) for half in halves])[0, 1] for i in (0, job.INFORMATIVE))
    assert informative > 0.8
    assert abs(other) < 0.4


def test_a_written_log_is_read_back(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = module("job")
    monkeypatch.setattr(job, "VALID_ROWS", 50)
    job.write(tmp_path, rows=200, table_rows=2_600, seed=1)
    there, drawn = job.Job(tmp_path, 2_600), job.draw(250, 2_600, seed=1)
    parts = there.load("train"), there.load("valid")
    assert [len(part.ids) for part in parts] == [200, 50]
    for read, of in zip(zip(*parts, strict=True), drawn, strict=True):
        assert np.array_equal(np.concatenate(read), of)


def test_the_clock_runs_from_the_warm_up_to_the_end(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = module("job")
    now = [0.0]
    monkeypatch.setattr(job.time, "perf_counter", lambda: now[0])
    clock = job.Clock()
    batches = clock.over(list(range(job.WARM_UP + 3)))
    assert len(batches) == job.WARM_UP + 3
    for _ in batches:
        now[0] += 1.0
    now[0] += 5.0
    outcome = clock.outcome((job.WARM_UP + 3) * job.BATCH, None)
    assert (outcome.rows, outcome.seconds) == (3 * job.BATCH, 3.0)


def test_the_table_pairs_rounds_and_says_who_is_absent(module: Any) -> None:
    contest = module("contest")

    def run(number: int, rate: float) -> dict[str, Any]:
        return {"round": number, "rows_per_s": rate, "version": "1", "peak_mb": 10.0, "process_s": 1.0}

    runs = {"steadyrank": [run(0, 10.0), run(1, 30.0)], "sparse": [run(0, 5.0), run(1, 10.0)], "fuxictr": []}
    lines = contest.tabulate(runs, {"fuxictr": "not installed"}, "steadyrank")
    assert "| 20 (10 to 30) |  |" in lines[2]
    assert "| 8 (5 to 10) | 2.50 (2.00 to 3.00) |" in lines[3]
    assert "not installed" in lines[4]
