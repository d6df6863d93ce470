"""The run folder: nothing half-written, nothing lost but a torn line, nothing executed on load."""

import json
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steadyrank.errors import CheckpointError, ConfigError
from steadyrank.runs import FORMAT, RunFolder, next_folder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let writes past `size` bytes of a file fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_create_makes_the_folder_and_its_parents(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "a" / "b")
    assert files(run.path) == {"environment.json", "readings", "checkpoints"}
    environment = RunFolder.open(run.path).environment()
    assert environment["format"] == FORMAT
    assert environment["torch"] == torch.__version__
    assert environment["cpu_count"] == os.cpu_count()


def test_create_refuses_a_folder_that_is_not_empty(run: RunFolder) -> None:
    run.write_config("a = 1\n")
    with pytest.raises(ConfigError, match=r"is not empty; give another --out, or --overwrite"):
        RunFolder.create(run.path)
    assert run.config_text() == "a = 1\n"


def test_overwrite_deletes_what_a_run_wrote_and_no_more(run: RunFolder) -> None:
    run.append("steps", 1, {"loss/total": 1.0})
    run.event(1, "skip", "a bad step")
    run.write_summary({"name": "old"})
    run.checkpoints.save(1, {"a": 1})
    run.write_report("old")
    (run.path / "notes.txt").write_text("mine")
    run.close()
    new = RunFolder.create(run.path, overwrite=True)
    assert files(new.path) == {".lock", "environment.json", "readings", "checkpoints", "notes.txt"}


def test_the_next_folder_is_free(tmp_path: Path) -> None:
    for n in (1, 2):
        assert next_folder("a", tmp_path) == tmp_path / f"a-{n}"
        RunFolder.create(tmp_path / f"a-{n}")


@pytest.mark.parametrize("environment", [None, "{}", '{"format": 1}', "not json", "[1]"])
def test_overwrite_leaves_other_folders_alone(tmp_path: Path, environment: str | None) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "thesis.txt").write_text("years of work")
    if environment is not None:
        (tmp_path / "environment.json").write_text(environment)
    before = files(tmp_path)
    with pytest.raises(ConfigError, match="not written by a run"):
        RunFolder.create(tmp_path, overwrite=True)
    assert files(tmp_path) == before


def test_a_path_that_cannot_be_a_folder_is_refused_with_nothing_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "new" / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"cannot write .*; choose another --out"):
            RunFolder.create(path)
    assert files(tmp_path) <= {"file", "new"}
    assert (tmp_path / "file").read_text() == "x"


def test_create_leaves_nothing_behind_when_the_disk_is_full(tmp_path: Path) -> None:
    with small_disk(10), pytest.raises(ConfigError, match="cannot write"):
        RunFolder.create(tmp_path / "a" / "b")
    assert files(tmp_path) == set()


def test_open_refuses_what_is_no_run_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"is no run folder: environment\.json was expected"):
            RunFolder.open(path)


def test_open_refuses_another_format(run: RunFolder) -> None:
    path = run.path / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 9, "steadyrank": "9.0"}))
    with pytest.raises(CheckpointError, match=r"format 3 was expected.*format 9 \(written by steadyrank 9\.0.*upgrade"):
        RunFolder.open(run.path)


def test_readings_are_columns_with_nan_where_a_row_lacks_one(run: RunFolder) -> None:
    run.append("steps", 10, {"loss/total": 1.5, "loss/a": 2})
    run.append("steps", 20, {"loss/total": 0.5, "loss/b": -math.inf})
    run.append("windows", 20, {"auc/a": 0.7})
    run.close()
    found = RunFolder.open(run.path).readings("steps")
    assert list(found) == ["step", "time", "loss/total", "loss/a", "loss/b"]
    np.testing.assert_array_equal(found["step"], [10, 20])
    assert found["step"].dtype == np.int64
    np.testing.assert_array_equal(found["loss/total"], [1.5, 0.5])
    np.testing.assert_array_equal(found["loss/a"], [2, math.nan])
    np.testing.assert_array_equal(found["loss/b"], [math.nan, -math.inf])
    assert (np.diff(found["time"]) >= 0).all()
    assert len(run.readings("never")["step"]) == 0
    with pytest.raises(ValueError, match="may not be called"):
        run.append("steps", 30, {"time": 1.0})


def test_rows_are_written_at_the_flush(run: RunFolder) -> None:
    run.append("steps", 1, {"a": 1.0})
    assert not (run.path / "readings" / "steps.jsonl").exists()
    run.flush()
    run.flush()
    assert len((run.path / "readings" / "steps.jsonl").read_text().splitlines()) == 2  # the names, and the row


@settings(deadline=None, max_examples=30)
@given(
    values=st.lists(st.floats(), min_size=1, max_size=20), name=st.text(min_size=1).filter(lambda s: s.isprintable())
)
def test_every_number_and_name_comes_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], name: str
) -> None:
    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "run")
    for step, value in enumerate(values):
        run.append("t", step, {f"loss/{name}\u2028": value})
    np.testing.assert_array_equal(run.readings("t")[f"loss/{name}\u2028"], np.array(values))


def test_readings_on_disk_are_strict_json(run: RunFolder) -> None:
    run.append("t", 1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    run.flush()
    lines = (run.path / "readings" / "t.jsonl").read_text().splitlines()
    names, row = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert names == {"names": ["a", "b", "c"]}
    assert row["values"] == ["nan", "inf", "-inf"]


def test_rows_of_several_names_and_of_the_first_format_are_read(run: RunFolder) -> None:
    run.append("t", 1, {"a": 1.0})
    run.append("t", 2, {"b": 2.0, "a": 3.0})
    run.append("t", 3, {"a": 4.0})
    run.flush()
    with (run.path / "readings" / "t.jsonl").open("a") as file:
        file.write('{"step": 4, "time": 0.0, "values": {"a": "inf"}}\n')
    RunFolder.open(run.path).append("t", 5, {"a": 5.0})  # one that is never flushed leaves nothing
    found = RunFolder.open(run.path).readings("t")
    np.testing.assert_array_equal(found["a"], [1.0, 3.0, 4.0, math.inf])
    np.testing.assert_array_equal(found["b"], [math.nan, 2.0, math.nan, math.nan])
    run.truncate_readings(2)
    np.testing.assert_array_equal(RunFolder.open(run.path).readings("t")["a"], [1.0, 3.0])


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_left_out_and_does_not_spoil_the_next(run: RunFolder, cut: int) -> None:
    for step in (1, 2):
        run.append("t", step, {"a": 0.5})
    run.flush()
    path = run.path / "readings" / "t.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    again = RunFolder.open(run.path)
    np.testing.assert_array_equal(again.readings("t")["step"], [1])
    again.append("t", 3, {"a": 1.0})
    np.testing.assert_array_equal(again.readings("t")["step"], [1, 3])


def test_a_broken_line_elsewhere_is_named(run: RunFolder) -> None:
    (run.path / "events.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"events\.jsonl, line 2"):
        run.events()


def test_truncate_drops_the_rows_after_the_step(run: RunFolder) -> None:
    for step in (1, 2, 3, 4):
        run.append("a", step, {"x": math.inf if step == 2 else step})
        run.append("b", step, {"y": step})
    run.truncate_readings(2)
    run.append("a", 3, {"x": 33})
    np.testing.assert_array_equal(run.readings("a")["x"], [1, math.inf, 33])
    np.testing.assert_array_equal(run.readings("b")["step"], [1, 2])
    assert files(run.path / "readings") == {"a.jsonl", "b.jsonl"}


def test_a_full_disk_leaves_readings_as_they_were(run: RunFolder) -> None:
    run.append("t", 1, {"a": 1.0})
    run.flush()
    run.append("t", 2, {"long name " * 30: 1.0})
    with small_disk(200), pytest.raises(CheckpointError, match=r"cannot write .*t\.jsonl"):
        run.flush()
    np.testing.assert_array_equal(RunFolder.open(run.path).readings("t")["step"], [1])
    run.flush()  # there is space again: the row was kept
    np.testing.assert_array_equal(RunFolder.open(run.path).readings("t")["step"], [1, 2])


def test_events_are_there_after_a_flush(run: RunFolder) -> None:
    run.event(
        7,
        "skip",
        "inf",
        task="nan</script>",
        file="\udcff.parquet",
        loss=math.nan,
        where=Path("x"),
        factor=np.float32(0.5),
    )
    assert RunFolder.open(run.path).events() == []
    run.flush()
    (found,) = RunFolder.open(run.path).events()
    assert (found["step"], found["kind"], found["message"], found["where"]) == (7, "skip", "inf", "x")
    assert found["task"] == "nan</script>"
    assert found["file"] == "\udcff.parquet"
    assert found["factor"] == 0.5
    assert found["loss"] == "nan"


def test_summary_round_trips_with_non_finite_numbers(run: RunFolder) -> None:
    assert run.summary() is None
    summary = {"name": "nan", "rows": 10, "tasks": {"a": {"kind": "binary", "run": {"auc": math.inf, "rmse": None}}}}
    run.write_summary(summary)
    assert RunFolder.open(run.path).summary() == summary
    run.write_summary({"tasks": {"a": {"auc": torch.tensor(math.nan)}}})
    found = run.summary()
    assert found is not None
    assert math.isnan(found["tasks"]["a"]["auc"])


def test_cause_reports_are_read_in_the_order_of_their_steps(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    assert run.causes() == []
    run.write_cause(120, {"task": "like", "ratio": float("inf")})
    run.write_cause(30, {"task": "click"})
    run.write_cause(30, {"task": "share"})
    assert run.causes() == [{"task": "share", "step": 30}, {"task": "like", "ratio": float("inf"), "step": 120}]
    RunFolder.create(tmp_path / "run", overwrite=True)
    assert RunFolder.open(tmp_path / "run").causes() == []
