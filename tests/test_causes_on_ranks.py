"""Causes of alarms on several ranks: the same reports as in one process, and nothing of the run is changed."""

import hashlib
import json
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steadyrank.config import RunConfig
from steadyrank.data.deal import share_of
from steadyrank.distributed.borrowed import blank_of, borrow, find_ids
from steadyrank.losses import multitask_loss
from steadyrank.models.ranker import ModelConfig, Ranker
from steadyrank.monitors import row_gradients
from steadyrank.monitors.row_gradients import RowReadings, read_rows
from steadyrank.monitors.unusual import thin
from steadyrank.ranks import ALONE
from steadyrank.runs import RunFolder
from steadyrank.schema import Batch, Share

from .batches import TASKS, make_batch, make_schema
from .test_distributed import spread, start, train_in_part
from .tiny import tiny, train
from .together import needs_gloo

UNITS = "data.incidents=[{kind='units', at=0.8, length=0.15, target='rating'}]"
OFTEN = ("watch.snapshot_every=10", "train.checkpoint_every=25", UNITS)
ALARM = tiny("data.rows=3_840", "reader.batch_size=64", "reader.window_rows=640", *OFTEN)
LARGE = tiny(
    "data.rows=42_240", "data.rows_per_day=11_000", "reader.batch_size=704", "reader.window_rows=7_040", *OFTEN
)
"""Its batches are larger than what is remembered of a usual one."""
WAYS = [("ddp", "replicated"), ("fsdp2", "replicated"), ("ddp", "torchrec"), ("fsdp2", "torchrec")]
NAMES = [*map(" ".join, WAYS)]


def without_causes(config: RunConfig) -> RunConfig:
    return RunConfig.from_toml(config.to_toml(), ["watch.causes=0"])


def assert_same_report(a: Any, b: Any, where: str = "") -> None:
    """Assert that two reports say the same, numbers to float32 rounding; the sentence has them in words."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"sentence"}:
            assert_same_report(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_report(x, y, f"{where}[{i}]")
    elif isinstance(a, float):
        assert math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6), f"{where}: {a} and {b}"
    else:
        assert a == b, f"{where}: {a} and {b}"


def assert_same_cause(one: RunFolder, many: RunFolder) -> None:
    [a], [b] = one.causes(), many.causes()
    assert (a["task"], a["feature"], a["state_or_data"]) == ("rating", "label of rating", "data")
    assert len(a["rows"]) == 10
    assert_same_report(a, b)
    told = [
        [{**event, "time": 0, "message": ""} for event in folder.events() if event["kind"] == "cause"]
        for folder in (one, many)
    ]
    assert told[0] == told[1]


def assert_same_memory(one: RunFolder, many: RunFolder) -> None:
    """Assert that two runs remember the same rows of the same usual batches."""
    a, b = ([*folder.checkpoints.load()["instruments"]["reference"]["kept"]] for folder in (one, many))
    assert [step for step, _ in a] == [step for step, _ in b] != []
    for (_, x), (_, y) in zip(a, b, strict=True):
        assert all(torch.equal(x[key], y[key]) for key in ("ids", "row", "time", "labels"))
        for (values, offsets), (others, ends) in zip(x["lists"], y["lists"], strict=True):
            assert torch.equal(values, others)
            assert torch.equal(offsets, ends)


# --- in one process ---------------------------------------------------------------------------------------------------


def test_a_borrowed_model_says_of_its_batches_what_the_whole_one_says() -> None:
    schema = make_schema()
    config = ModelConfig(trunk={"kind": "mmoe", "experts": 2, "widths": [8]}, tower=(4,))
    model = Ranker(schema, config, torch.Generator().manual_seed(0))
    blank, batches = blank_of(model), [make_batch(schema, 20, seed) for seed in range(3)]
    model(batches[2])  # running statistics have begun
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = borrow(model, blank, {}, batches[:2], ALONE)
    assert all(p.is_meta for p in blank.parameters())
    tasks = list(schema.tasks.values())
    for batch in batches[:2]:
        one, other = (read_rows(each, batch, tasks, multitask_loss) for each in (model, found))
        assert torch.equal(one.row_gradients_BK, other.row_gradients_BK)
        assert torch.equal(one.row_losses_BK, other.row_losses_BK)
        assert bool(one.row_gradients_BK.any())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    held, whole = ([len(rows) for rows in each.tables.weights.values()] for each in (found, model))
    assert held == [len(find_ids(batches[:2], plan)) for plan in model.tables.plans]
    assert len(held) == 2
    assert sum(held) < sum(whole)


def test_a_large_batch_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    schema, tasks = make_schema(), list(make_schema().tasks.values())
    model = Ranker(
        schema, ModelConfig(trunk={"kind": "shared_bottom", "widths": [8]}), torch.Generator().manual_seed(0)
    )
    batch = make_batch(schema, 50)
    model(batch)  # running statistics have begun
    batch.weights[:7, 1] = batch.weights[:, 2] = 0.0  # of a task that a piece, or the batch, has no label of
    batch.labels[9, 0], batch.weights[9, 0] = torch.nan, 1.0
    whole = read_rows(model, batch, tasks, multitask_loss)
    monkeypatch.setattr(row_gradients, "ROWS", 7)
    pieces = read_rows(model, batch, tasks, multitask_loss)
    for field in fields(RowReadings):
        torch.testing.assert_close(getattr(pieces, field.name), getattr(whole, field.name), equal_nan=True,
                                   rtol=1e-5, atol=1e-9)  # fmt: skip
    assert whole.row_gradients_BK[9, 0].isnan()
    assert whole.row_gradients_BK[10:].isfinite().all()


@pytest.mark.parametrize(("rows", "keep"), [(50, 20), (50, 64), (2, 20), (50, 2)])
def test_ranks_remember_the_rows_that_one_process_remembers(rows: int, keep: int) -> None:
    schema = make_schema()
    batch, parts = make_batch(schema, rows), []
    for rank in range(3):
        low, high = share_of(rows, rank, 3)
        share = replace(batch.take(torch.arange(low, high)), share=Share(rows, 0, 0, torch.ones(len(TASKS))))
        parts.append(thin(share, keep, low))
    assert all(part.share is None for part in parts)
    assert Batch.cat(parts).row.tolist() == thin(batch, keep).row.tolist()


# --- in several -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(ALARM, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that one process has begun, gone on with by two, which are started once for all of them."""
    folder = tmp_path_factory.mktemp("two")
    begun = train_in_part(ALARM, folder / "begun", 33).path
    jobs = [{"config": spread(ALARM, *way), "folder": folder / " ".join(way), "resume": True} for way in WAYS]
    jobs.append({**jobs[-1], "config": without_causes(jobs[-1]["config"]), "folder": folder / "quiet"})
    for job in jobs:
        shutil.copytree(begun, job["folder"])
    assert start(2, jobs, folder) == [["finished"] * len(jobs)] * 2
    return folder


@needs_gloo
@pytest.mark.parametrize("name", NAMES)
def test_ranks_find_the_cause_that_one_process_finds(name: str, one: RunFolder, two: Path) -> None:
    many = RunFolder.open(two / name)
    assert_same_cause(one, many)
    assert_same_memory(one, many)


@needs_gloo
def test_looking_for_a_cause_changes_nothing_of_the_run(one: RunFolder, two: Path) -> None:
    looked, quiet = (RunFolder.open(two / name) for name in (NAMES[-1], "quiet"))
    assert quiet.causes() == []
    last = one.causes()[0]["step"]
    assert looked.checkpoints.steps()[-1] > last + 10
    a, b = (folder.checkpoints.load() for folder in (looked, quiet))
    for part in ("model", "optimizers", "generators", "rescue"):
        assert_same_report(*(json.loads(json.dumps(each[part], default=digest)) for each in (a, b)))
    x, y = (folder.readings("steps") for folder in (looked, quiet))
    for name in x.keys() - {"time"}:
        if name.partition("/")[0] not in ("speed", "pace"):
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_more_ranks_and_larger_batches(size: int, tmp_path: Path) -> None:
    """From the first step on; with three ranks no rank has as many rows as another."""
    one = train(LARGE, tmp_path / "one")
    jobs = [{"config": spread(LARGE, *way), "folder": tmp_path / " ".join(way)} for way in WAYS]
    assert start(size, jobs, tmp_path) == [["finished"] * len(jobs)] * size
    for name in NAMES:
        many = RunFolder.open(tmp_path / name)
        assert_same_cause(one, many)
        assert_same_memory(one, many)
