"""Whole runs on several ranks: the same losses, metrics, weights and readings as in one process."""

import json
import signal
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steadyrank.config import RunConfig, trained
from steadyrank.parts import Progress
from steadyrank.runs import RunFolder
from steadyrank.sequential import run

from .days import follow, log, write_day
from .faults import assert_same
from .ranks_of_runs import spoil_rows
from .test_survival import RECOVERS, UNITS
from .tiny import tiny, train
from .together import needs_gloo, run_together

pytestmark = needs_gloo
TORCHREC = find_spec("torchrec") is not None
WATCHED = (
    "watch.look_every=2",
    "watch.dynamics_every=4",
    "watch.tasks_every=3",
    "watch.rank_every=4",
    "watch.curvature_every=5",
    "watch.snapshot_every=4",
)
UNEVEN = "reader.window_rows=515"  # the last batch of a window has three rows: fewer than four ranks
TABLES = {
    "rowwise": "optimizer.tables={name='rowwise_adagrad'}",
    "clippy by row": "optimizer.tables={name='clippy_adagrad', lr=0.5, granularity='row'}",
    "clippy by tensor": "optimizer.tables={name='clippy_adagrad', lr=0.5}",
    "clippy adam": "optimizer.tables={name='clippy_adam', lr=0.05}",
}

SAVES = "train.checkpoint_every=4"
GOES_BACK = tiny(
    "data.rows=5_000",
    "reader.window_rows=512",
    "train.checkpoint_every=7",
    "recovery.rollback_then=both",
    "watch.verdict.least_steps=6",
    "watch.verdict.steps=20",
    UNITS,
    *RECOVERS,
)


def job(tables: str, *overrides: str) -> RunConfig:
    return tiny("data.rows=1_600", UNEVEN, TABLES[tables], *WATCHED, *overrides)


BAD_ROWS = job(
    "clippy by tensor",
    "train.quarantine_rows=true",
    "model.trunk.widths=[64]",
    "watch.dead_batches=1",  # some are silent on three rows, and more on two of these
)


def spread(config: RunConfig, dense: str, tables: str) -> RunConfig:
    """Return the same run for several ranks; without TorchRec, tables are replicated."""
    tables = tables if TORCHREC else "replicated"
    return config.model_copy(
        update={"distributed": config.distributed.model_copy(update={"dense": dense, "tables": tables})}
    )


def start(size: int, jobs: Sequence[Mapping[str, Any]], folder: Path) -> list[list[str]]:
    """Do the jobs in so many processes; return what each process says of each job."""
    path = folder / "jobs.json"
    path.write_text(json.dumps([{**job, "folder": str(job["folder"]), "toml": job["config"].to_toml()} | {"config": ""}
                                for job in jobs]))  # fmt: skip
    run_together("ranks_of_runs", size, path)
    return [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(size)]


def assert_alike(one: Path, many: Path, steps_only: bool = False) -> None:
    """Assert that two runs have the same readings to float32 rounding, and the same weights."""
    a, b = RunFolder.open(one), RunFolder.open(many)
    for table in ("steps",) if steps_only else ("steps", "windows", "dynamics", "tasks", "curvature"):
        x, y = ({k: v for k, v in f.readings(table).items() if not k.startswith("speed/")} for f in (a, b))
        assert x.keys() == y.keys(), table
        for name in x.keys() - {"step", "time"}:
            area = name.partition("/")[0]
            if area not in NOT_ALIKE:
                rtol, atol = LOOSE.get(area, (2e-5, 1e-6) if table in ("steps", "windows") else (3e-4, 1e-6))
                np.testing.assert_allclose(y[name], x[name], rtol=rtol, atol=atol, err_msg=f"{table}: {name}")
    (_, left), (_, right) = trained(one), trained(many)
    for (name, p), q in zip(left.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


NOT_ALIKE = {
    "effective_rank",  # of a sample of one rank's rows
    "gradient_max",  # of a table's gradient before its rows are summed, and after
}
LOOSE = {
    "task_cosine": (1e-3, 1e-4),
    "task_share_frac": (1e-3, 1e-4),
    "headroom": (1e-2, 1e-3),  # a search, which may stop one step sooner
    "headroom_next": (1e-2, 1e-3),
    "critical_sharpness": (1e-2, 1e-3),
    "saturated_frac": (0.1, 0.02),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("one")
    for _, _, tables in CASES.values():
        train(job(tables), folder / tables)
    train(job("clippy by tensor", SAVES), folder / "saves")
    train(GOES_BACK, folder / "goes back")
    for day in range(4):
        write_day(folder / "log", day, spoilt_every=60 * (day % 2))
    train(bad_steps(folder), folder / "bad steps")
    left = RunFolder.create(folder / "bad rows")
    left.write_config(BAD_ROWS.to_toml())
    parts = BAD_ROWS.build()
    spoil_rows(parts.model)
    run(parts, left)
    for day in range(4):
        write_day(folder / "days", day)
    train(follows(folder / "days"), folder / "follows")
    return folder


CASES = {
    "ddp, replicated": ("ddp", "replicated", "rowwise"),
    "ddp, torchrec, tensor": ("ddp", "torchrec", "clippy by tensor"),
    "fsdp2, torchrec, row": ("fsdp2", "torchrec", "clippy by row"),
}
MORE = {
    "fsdp2, replicated": ("fsdp2", "replicated", "clippy by tensor"),
    "ddp, torchrec, adam": ("ddp", "torchrec", "clippy adam"),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, one: Path) -> Path:
    """The runs of two processes, which are started once for all of them."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [(name, {"config": spread(job(of), *how)}) for name, (*how, of) in CASES.items()]
    cut = spread(job("clippy by tensor", SAVES), "fsdp2", "torchrec")
    alone = train_in_part(job("clippy by tensor", SAVES), folder / "begun alone", 10)
    coming, feed = prepare_days(folder)
    jobs += [
        ("whole", {"config": cut}),
        ("cut", {"config": cut, "signal_at": 10}),
        ("cut", {"config": cut, "resume": True, "beside": True}),
        ("cut for one", {"config": cut, "signal_at": 9}),
        ("begun alone", {"config": RunConfig.from_toml(alone.config_text()), "resume": True}),
        ("unlike", {"config": cut, "sets_of_last": ["optimizer.dense.lr=0.3"]}),
        ("few", {"config": RunConfig.from_toml(cut.to_toml(), ["reader.batch_size=1"])}),
        ("goes back", {"config": spread(GOES_BACK, "fsdp2", "torchrec"), "beside": True}),
        ("follows", {"config": follows(coming), "feed": feed}),
        ("bad steps", {"config": spread(bad_steps(one), "ddp", "torchrec")}),
        ("bad rows", {"config": spread(BAD_ROWS, "ddp", "torchrec"), "spoils": True}),
        ("other model", {"config": RunConfig.from_toml(cut.to_toml(), ["model.trunk.widths=[8]"]), "resume": True}),
    ]
    folders = {"other model": "whole"}
    said = start(2, [{**job, "folder": folder / folders.get(name, name)} for name, job in jobs], folder)
    by_name = [{name: [w for (n, _), w in zip(jobs, words, strict=True) if n == name] for name, _ in jobs}
               for words in said]  # fmt: skip
    (folder / "said.json").write_text(json.dumps(by_name))
    return folder


def prepare_days(folder: Path) -> tuple[Path, list[list[str]]]:
    """Write a log of one day, and three more that come while it is followed."""
    days = [write_day(folder / "days", day) for day in range(4)]
    (folder / "aside").mkdir()
    return folder / "days", [[str(path.rename(folder / "aside" / path.name)), str(path)] for path in days[1:]]


def follows(path: Path) -> RunConfig:
    return follow(f"data.path={path}", "train.checkpoint_every=5", "distributed.tables=replicated")


def bad_steps(one: Path) -> RunConfig:
    """Return a run over a log in which labels of some rows make the loss infinite."""
    return log(f"data.path={one / 'log'}", "train.on_bad_step=skip", "optimizer.dense={name='adamw', lr=0.01}")


def train_in_part(config: RunConfig, path: Path, steps: int) -> RunFolder:
    """Begin a run in this process, to be gone on with elsewhere."""

    def stop(now: Progress) -> None:
        if now.step >= steps:
            signal.raise_signal(signal.SIGTERM)

    folder = RunFolder.create(path)
    folder.write_config(config.to_toml())
    assert run(config.build(), folder, on_progress=stop)["status"] == "interrupted"
    folder.flush()
    return folder


def said_of(two: Path, name: str, last: bool = True) -> list[str]:
    """Return what each process said of the job with that folder."""
    found = json.loads((two / "said.json").read_text())
    return [words[name][-1 if last else 0] for words in found]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process(name: str, one: Path, two: Path) -> None:
    assert said_of(two, name) == ["finished", "finished"]
    assert_alike(one / CASES[name][2], two / name)
    if "torchrec" in name and TORCHREC:
        newest = max((two / name / "checkpoints").glob("step_*"))
        assert len(list(newest.glob("shard-*.safetensors"))) == 2
    clipped = RunFolder.open(one / CASES[name][2]).readings("steps")
    factors = [name for name in clipped if name.startswith("clip_factor/tables")]
    assert not factors or min(np.nanmin(clipped[name]) for name in factors) < 0.9  # the bound of the tables binds


def test_the_same_number_of_ranks_goes_on_bit_for_bit(two: Path) -> None:
    assert said_of(two, "cut", last=False) == ["interrupted"] * 2
    assert said_of(two, "cut") == ["finished"] * 2
    other = ("/speed/", "/pace/", "budget_bytes")  # seconds; memory
    runs = RunFolder.open(two / "whole"), RunFolder.open(two / "cut")
    assert_same(*runs, ignore=lambda where: any(part in where for part in other))


def test_another_number_of_ranks_goes_on(one: Path, two: Path) -> None:
    assert said_of(two, "begun alone") == ["finished"] * 2
    assert_alike(one / "saves", two / "begun alone", steps_only=True)
    for task in ("click", "long_view"):  # of the others the whole is clamped
        ahead = [RunFolder.open(path).readings("curvature")[f"headroom_next/{task}"]
                 for path in (one / "saves", two / "begun alone")]  # fmt: skip
        np.testing.assert_allclose(ahead[1], ahead[0], *LOOSE["headroom_next"])
    folder = RunFolder.open(two / "cut for one")
    assert said_of(two, "cut for one") == ["interrupted"] * 2
    config = RunConfig.from_toml(folder.config_text())
    assert run(config.build(resume=True), folder, resume=True)["status"] == "finished"
    folder.flush()
    assert_alike(one / "saves", folder.path, steps_only=True)


def test_ranks_that_do_not_fit_are_told_so(two: Path) -> None:
    for words in said_of(two, "unlike"):
        assert words.startswith("ConfigError: rank 1 was started unlike rank 0: optimizer.dense.lr = 0.3, not 0.1")
    for words in said_of(two, "few"):
        assert words.startswith("ConfigError")
        assert "1" in words
        assert "2" in words
    for words in said_of(two, "other model"):
        assert words.startswith("CheckpointError")
        assert "another model" in words


def test_all_ranks_go_back_together(two: Path, one: Path) -> None:
    assert said_of(two, "goes back") == ["finished"] * 2
    kinds, alone = ([(e["kind"], e["step"]) for e in RunFolder.open(path).events() if not e.get("process")]
                    for path in (two / "goes back", one / "goes back"))  # fmt: skip
    assert "returned" in dict(kinds)
    assert kinds == alone
    assert_alike(one / "goes back", two / "goes back")
    causes, alone = (
        [
            (cause["step"], cause["task"], [row["row"] for row in cause["rows"]])
            for cause in RunFolder.open(path).causes()
        ]
        for path in (two / "goes back", one / "goes back")
    )
    assert causes == alone != []


def test_a_bad_step_is_left_out_on_all_ranks(two: Path, one: Path) -> None:
    assert said_of(two, "bad steps") == ["finished"] * 2
    a, b = (RunFolder.open(path / "bad steps") for path in (one, two))
    assert a.summary()["bad_steps"] == b.summary()["bad_steps"] > 0  # type: ignore[index]
    messages = [[e["message"] for e in folder.events() if e["kind"] == "bad_step"] for folder in (a, b)]
    assert messages[0] == messages[1]
    assert_alike(one / "bad steps", two / "bad steps")


def test_a_bad_row_of_a_table_is_left_out_wherever_it_lies(two: Path, one: Path) -> None:
    assert said_of(two, "bad rows") == ["finished"] * 2
    assert_alike(one / "bad rows", two / "bad rows")
    a, b = (RunFolder.open(path / "bad rows") for path in (one, two))
    total = a.readings("steps")["quarantined_rows/total"]
    assert total[-1] > 50
    np.testing.assert_array_equal(b.readings("steps")["quarantined_rows/total"], total)
    messages = [[e["message"] for e in folder.events() if e["kind"] == "quarantine"] for folder in (a, b)]
    assert messages[0] == messages[1] != []
    assert 0.1 < a.readings("dynamics")["dead_frac/all"].max() < 0.9


def test_all_ranks_follow_a_growing_log(two: Path, one: Path) -> None:
    assert said_of(two, "follows") == ["finished"] * 2
    files = [event["file"] for event in RunFolder.open(two / "follows").events() if event["kind"] == "file"]
    assert [Path(file).name for file in files] == [f"day_{day}.parquet" for day in (1, 2, 3)]
    assert_alike(one / "follows", two / "follows", steps_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_more_ranks_and_ways_train_as_one_process(size: int, one: Path, tmp_path: Path) -> None:
    """Some batches have fewer rows than there are ranks."""
    cases = {**CASES, **MORE} if size > 2 else MORE
    train(job("clippy adam"), tmp_path / "clippy adam")
    jobs = [
        {"config": spread(job(of), dense, tables), "folder": tmp_path / name}
        for name, (dense, tables, of) in cases.items()
    ]
    said = start(size, jobs, tmp_path)
    assert said == [["finished"] * len(jobs)] * size
    for name, (_, _, of) in cases.items():
        assert_alike((tmp_path if of == "clippy adam" else one) / of, tmp_path / name)
