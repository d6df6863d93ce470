"""What is read of a cell's run folder, on folders written by hand; and the table of outcomes, there and back."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from steadyrank.errors import CheckpointError, ConfigError
from steadyrank.ladder.grid import Cell, LadderConfig
from steadyrank.ladder.outcomes import Outcome, find_learnable, read_outcome, read_outcomes, write_outcomes
from steadyrank.runs import RunFolder

from .tiny import tiny

NAN, INF = math.nan, math.inf
ROWS, WINDOW = 1000, 100
"""Of the log and of a window; a step has 20 rows."""
FULL, NEVER, MICRO = "full_divergence", "never_learned", "micro_divergence"


def cell(**changes: Any) -> Cell:
    config = tiny("train.window_steps=5", "reader.batch_size=20")
    plain = {"optimizer": "adam", "family": "adam", "model": "m", "incident": "i", "rate": 0.1, "seed": 3}
    return Cell(**plain | changes, config=config)  # type: ignore[arg-type]


def write_run(
    path: Path,
    windows: Sequence[Mapping[str, float]],
    *,
    status: str = "finished",
    rows: int | None = None,
    tables: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
    tasks: Mapping[str, Any] | None = None,
    **summary: Any,
) -> RunFolder:
    """Write a run of so many windows of 5 steps; `tables` has a row for each step."""
    run = RunFolder.create(path)
    learned = len(windows) * WINDOW if rows is None else rows
    for place, window in enumerate(windows, start=1):
        run.append("windows", 5 * place, {**window, "log/rows": float(min(place * WINDOW, learned))})
    for table, of in (tables or {}).items():
        for step, values in enumerate(of, start=1):
            run.append(table, step, values)
    kinds = {"click": {"kind": "binary"}, "watch": {"kind": "regression"}}
    facts = {"status": status, "steps": learned // 20, "rows": learned, "log_rows": ROWS, "seconds": 2.5}
    run.write_summary({**facts, "precision": "float32: as it was asked for", "tasks": tasks or kinds, **summary})
    run.flush()
    return run


def scores(auc: float, nrmse: float = 0.9, **more: float) -> dict[str, float]:
    """Return a window's readings; with labels, and finite scores."""
    names = {"auc": "auc/click", "entropy": "normalised_entropy/click", "plain": "log_loss/click"}
    plain = {"auc/click": auc, "normalised_entropy/click": 0.95, "log_loss/click": 0.3, "rows/click": 100.0}
    plain |= {"normalised_rmse/watch": nrmse, "rmse/watch": nrmse, "rows/watch": 100.0}
    return plain | {names.get(name, name): value for name, value in more.items()}


def read(run: RunFolder, **config: Any) -> Outcome:
    return read_outcome(run, cell(), LadderConfig(**config))


# Stretches of the log.


def test_a_stretch_has_the_windows_that_end_in_it(tmp_path: Path) -> None:
    """Windows end at 100, ..., 1000 rows: (600, 800] holds the 7th and 8th, (800, 1000] the last two."""
    run = write_run(tmp_path / "run", [scores(i / 100, i / 10) for i in range(1, 11)])
    found = read(run)
    assert found.valid == {"click": pytest.approx(0.075), "watch": pytest.approx(0.75)}
    assert found.test == {"click": pytest.approx(0.095), "watch": pytest.approx(0.95)}
    assert found.quality() == found.test["click"]
    assert found.quality("valid") == found.valid["click"]
    assert found.nrmse() == found.test["watch"]
    other = read(run, valid=(0.0, 0.1), test=(0.05, 0.35))
    assert (other.valid["click"], other.test["click"]) == (pytest.approx(0.01), pytest.approx(0.02))
    assert math.isnan(read(run, valid=(0.61, 0.69)).quality("valid"))


def test_what_a_cell_is_and_how_it_ended_is_kept(tmp_path: Path) -> None:
    found = read(write_run(tmp_path / "run", [scores(0.6)] * 10))
    assert (found.cell, found.optimizer, found.model, found.incident) == ("tiny", "adam", "m", "i")
    assert (found.rate, found.seed, found.status, found.steps, found.rows) == (0.1, 3, "finished", 50, 1000)
    assert (found.seconds, found.precision) == (2.5, "float32")
    assert found.kinds == {"click": "binary", "watch": "regression"}
    assert found.verdicts == {"click": "no_verdict", "watch": "no_verdict"}
    assert found.episodes == 0
    assert all(math.isnan(value) for value in (found.spikes, found.headroom, found.moved, found.factor))


@pytest.mark.parametrize(("windows", "valid", "test"), [(9, 0.7, 0.6), (8, 0.7, 0.5), (7, 0.6, 0.5), (3, 0.5, 0.5)])
def test_windows_that_a_run_never_reached_count_as_a_constants(
    tmp_path: Path, windows: int, valid: float, test: float
) -> None:
    run = write_run(tmp_path / "run", [scores(0.7, 0.8)] * windows, status="diverged")
    found = read(run)
    assert found.valid["click"] == pytest.approx(valid)
    assert found.test["click"] == pytest.approx(test)
    assert found.valid["watch"] == pytest.approx(1 - (valid - 0.5))
    assert found.test["watch"] == pytest.approx(1 - (test - 0.5))


def test_a_run_that_ended_within_a_window_or_before_the_first(tmp_path: Path) -> None:
    """It ended after 740 rows: windows that end at 840 and 940 rows are missing, and the last one, at 1000."""
    found = read(write_run(tmp_path / "a", [scores(0.8)] * 8, rows=740, status="diverged"), test=(0.7, 1.0))
    assert found.test["click"] == pytest.approx((0.8 + 3 * 0.5) / 4)
    nothing = read(write_run(tmp_path / "b", [], rows=0, status="diverged"))
    assert (nothing.valid, nothing.test) == ({"click": 0.5, "watch": 1.0}, {"click": 0.5, "watch": 1.0})
    assert (nothing.loss, nothing.steps) == (1.0, 0)


def test_a_finished_run_that_left_rows_out_misses_no_window(tmp_path: Path) -> None:
    """Its recovery did: it learned 900 of 1000 rows."""
    assert read(write_run(tmp_path / "run", [scores(0.7)] * 9)).test["click"] == pytest.approx(0.7)


def test_a_window_of_one_class_or_without_labels_is_left_out(tmp_path: Path) -> None:
    one_class, none = scores(NAN, entropy=NAN), scores(NAN, NAN, entropy=NAN, plain=NAN)
    none |= {"rows/click": 0.0, "rows/watch": 0.0, "rmse/watch": NAN}
    found = read(write_run(tmp_path / "run", [scores(0.6)] * 6 + [one_class, scores(0.7), none, scores(0.8, 0.7)]))
    assert (found.valid["click"], found.test["click"]) == (pytest.approx(0.7), pytest.approx(0.8))
    assert (found.valid["watch"], found.test["watch"]) == (pytest.approx(0.9), pytest.approx(0.7))
    empty = read(write_run(tmp_path / "empty", [scores(0.6)] * 6 + [none] * 4))
    assert math.isnan(empty.quality())
    assert math.isnan(empty.nrmse())
    assert math.isnan(empty.loss)


def test_a_window_with_a_score_that_is_nan_counts_as_a_constants(tmp_path: Path) -> None:
    """It says nothing of the ranking either, but for another reason."""
    lost = scores(NAN, NAN, entropy=NAN, plain=NAN) | {"rmse/watch": NAN}
    found = read(write_run(tmp_path / "run", [scores(0.7, 0.8)] * 9 + [lost]))
    assert found.test == {"click": pytest.approx(0.6), "watch": pytest.approx(0.9)}
    assert found.loss == pytest.approx(((0.95 + 1) / 2 + ((0.8 + 1) / 2) ** 2) / 2)


def test_a_task_without_readings_has_no_score(tmp_path: Path) -> None:
    tasks = {"click": {"kind": "binary"}, "rare": {"kind": "binary"}}
    found = read(write_run(tmp_path / "run", [scores(0.6)] * 10, tasks=tasks))
    assert math.isnan(found.test["rare"])
    assert found.quality() == pytest.approx(0.6)


# Readings.


def test_the_loss_is_relative_and_a_constants_at_most(tmp_path: Path) -> None:
    found = read(write_run(tmp_path / "a", [scores(0.6, 0.8, entropy=0.9)] * 10))
    assert found.loss == pytest.approx((0.9 + 0.64) / 2)
    bad = read(write_run(tmp_path / "b", [scores(0.6, INF, entropy=7.0)] * 10))
    assert bad.loss == 1.0
    assert bad.nrmse() == INF


def test_readings_are_medians_of_the_second_half(tmp_path: Path) -> None:
    steps = range(1, 51)
    tables = {
        "steps": [{"loss/total": 0.5 + 0.001 * (s % 3), "clip_factor/a": 0.1 if s <= 25 else 0.4, "clip_factor/b": 1.0}
                  for s in steps],
        "dynamics": [{"update_over_weight/a": float(s), "update_over_weight/b": float(s), "other": 1e9} for s in steps],
        "curvature": [{"headroom/total": INF if s <= 25 else (NAN if s % 2 else 3.0)} for s in steps],
    }  # fmt: skip
    found = read(write_run(tmp_path / "run", [scores(0.6)] * 10, tables=tables))
    assert found.headroom == 3.0
    assert found.moved == 38.0  # of 26 to 50
    assert found.factor == pytest.approx(0.7)
    assert found.spikes == 0


def test_spikes_are_counted_over_the_run(tmp_path: Path) -> None:
    losses = [0.5 + 0.01 * math.sin(i) for i in range(300)]
    losses[200] = losses[250] = 9.0
    tables = {"steps": [{"loss/total": loss} for loss in losses]}
    found = read(write_run(tmp_path / "run", [scores(0.6)] * 10, tables=tables))
    assert found.spikes == pytest.approx(2 / 225)  # a quarter is the history


def test_micro_divergences_of_several_tasks_at_one_time_are_one(tmp_path: Path) -> None:
    def verdict(*spans: tuple[int, int | None]) -> dict[str, Any]:
        return {"verdict": MICRO, "episodes": [{"first": first, "last": last} for first, last in spans]}

    tasks = {
        "click": {"kind": "binary", "verdict": verdict((10, 20), (50, 60))},
        "watch": {"kind": "regression", "verdict": verdict((15, 30), (31, 35), (55, None))},
        "like": {"kind": "binary", "verdict": verdict((30, 31))},
    }
    found = read(write_run(tmp_path / "run", [scores(0.6)] * 10, tasks=tasks))
    assert found.episodes == 2  # 10 to 35, 50 to 60; the open one is no micro-divergence
    assert found.verdicts == {"click": MICRO, "watch": MICRO, "like": MICRO}


# Folders that are damaged.


def test_a_run_that_has_not_ended_has_no_outcome(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the run has not ended; go on with the ladder"):
        read(RunFolder.create(tmp_path / "run"))


@pytest.mark.parametrize("change", ["no_log_rows", "no_tasks", "odd_tasks", "odd_kind", "odd_rows"])
def test_a_summary_of_something_else_is_told(tmp_path: Path, change: str) -> None:
    run = write_run(tmp_path / "run", [scores(0.6)] * 10)
    summary = dict(run.summary() or {})
    if change.startswith("no_"):
        del summary[change.removeprefix("no_")]
    else:
        summary |= {"odd_tasks": {"tasks": ["click"]}, "odd_kind": {"tasks": {"click": {"kind": "odd"}}},
                    "odd_rows": {"rows": "many"}}[change]  # fmt: skip
    run.write_summary(summary)
    with pytest.raises(CheckpointError, match=r"run: summary\.json or a table .* is none that a run writes .*; delete"):
        read(run)


def test_damaged_readings_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [scores(0.6)] * 10)
    (run.path / "readings" / "windows.jsonl").write_text('{"names": ["a"]}\n{"values": [1], "step": "x"}\n')
    with pytest.raises(CheckpointError, match="the table of readings 'windows' is damaged"):
        read(RunFolder.open(run.path))


# Verdicts.


def outcome(verdicts: Mapping[str, str] | None = None, **changes: Any) -> Outcome:
    verdicts = verdicts or {"click": "healthy", "watch": "healthy"}
    kinds = {task: "regression" if task in ("watch", "rating") else "binary" for task in verdicts}
    plain = {"cell": "c", "optimizer": "adam", "family": "adam", "model": "", "incident": "", "rate": 0.1, "seed": 0}
    plain |= {"status": "finished", "steps": 10, "rows": 100, "seconds": 1.5, "kinds": kinds, "verdicts": verdicts}
    plain |= {part: dict.fromkeys(verdicts, 0.5) for part in ("valid", "test")}
    return Outcome(**plain | changes)


@pytest.mark.parametrize(
    ("verdicts", "learnable", "ending"),
    [
        (("healthy", "healthy"), "ab", "healthy"),
        (("healthy", MICRO), "ab", MICRO),
        ((MICRO, FULL), "ab", FULL),
        ((NEVER, "healthy"), "ab", NEVER),  # half of them
        ((NEVER, "healthy"), "b", "healthy"),  # nothing learned a
        ((NEVER, MICRO), "b", MICRO),
        ((NEVER, FULL), "ab", FULL),
        ((NEVER, NEVER), "", NEVER),  # nobody learned anything: all count
        ((NEVER, "healthy", "healthy"), "abc", "healthy"),
        ((NEVER, NEVER, "healthy"), "abc", NEVER),
        ((NEVER, NEVER, "healthy"), "ac", NEVER),
        (("no_verdict", "healthy"), "b", "healthy"),
    ],
)
def test_an_ending_is_the_worst_of_the_tasks(verdicts: tuple[str, ...], learnable: str, ending: str) -> None:
    found = outcome(dict(zip("abc", verdicts, strict=False)))
    assert found.ending(list(learnable)) == ending
    assert replace(found, status="diverged").ending(list(learnable)) == FULL


def test_a_task_that_still_ranks_is_miscalibrated_and_not_lost() -> None:
    tasks = {"click": FULL, "watch": "healthy"}
    ranks = outcome(tasks, test={"click": 0.62, "watch": 0.9})
    assert ranks.ending(["click", "watch"]) == "miscalibrated"
    assert replace(ranks, test={"click": 0.54, "watch": 0.9}).ending(["click"]) == FULL
    assert replace(ranks, test={"click": NAN, "watch": 0.9}).ending(["click"]) == FULL
    assert replace(ranks, status="diverged").ending(["click"]) == FULL
    assert outcome({"watch": FULL}, test={"watch": 0.9}).ending(["watch"]) == FULL  # a regression has no ranking
    assert replace(ranks, verdicts={"click": FULL, "watch": NEVER}).ending(["click", "watch"]) == NEVER


def test_a_task_can_be_learned_where_some_cell_did() -> None:
    found = [outcome({"a": NEVER, "b": "no_verdict", "c": NEVER}), outcome({"a": NEVER, "b": NEVER, "c": FULL})]
    assert find_learnable(found) == ["c"]
    assert find_learnable([*found, outcome({"a": MICRO, "d": "healthy"})]) == ["a", "c", "d"]
    assert find_learnable([]) == []


def test_quality_is_the_mean_auc_or_what_a_regression_gains() -> None:
    both = outcome({"a": "healthy", "b": "healthy", "watch": "healthy"}, test={"a": 0.6, "b": 0.7, "watch": 0.2})
    assert (both.quality(), both.nrmse()) == (pytest.approx(0.65), 0.2)
    assert replace(both, test={"a": NAN, "b": 0.7, "watch": NAN}).quality() == 0.7
    alone = outcome({"watch": "healthy", "rating": "healthy"}, test={"watch": 0.8, "rating": 0.6})
    assert alone.quality() == pytest.approx(0.3)
    assert math.isnan(outcome({"a": "healthy"}).nrmse())


# The table.


def to_six_digits(found: Outcome) -> str:
    """Spell an outcome out, tasks by name: a NaN is not equal to itself."""

    def cut(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) else value

    flat = {spec.name: getattr(found, spec.name) for spec in fields(found)}
    parts = {name: {task: cut(of[task]) for task in sorted(of)} for name, of in flat.items() if isinstance(of, dict)}
    return repr({name: cut(value) for name, value in flat.items()} | parts)


def make_outcomes(draw: random.Random) -> list[Outcome]:
    """Outcomes of models whose tasks differ, with odd names and numbers."""
    found = []
    for place in range(20):
        tasks = draw.sample(
            ["click", "a/b", "watch", "rating", "x,y", 'say "no"', "nan", "λ\nline"], draw.randint(1, 5)
        )
        numbers = {task: draw.choice([draw.random(), NAN, INF, 1e-12, 123456789.125]) for task in tasks}
        readings = {name: draw.choice([draw.random() * 1e-5, NAN, INF]) for name in ("loss", "spikes", "headroom")}
        made = outcome({task: draw.choice(["healthy", FULL, NEVER]) for task in tasks}, valid=numbers, test=numbers)
        found.append(replace(made, cell=f"c{place}", rate=draw.random(), seed=2**32 - 1, episodes=place, **readings))
    return found


def test_outcomes_are_read_as_they_were_written(tmp_path: Path) -> None:
    outcomes = make_outcomes(random.Random(0))
    write_outcomes(tmp_path / "outcomes.csv", outcomes)
    back = read_outcomes(tmp_path / "outcomes.csv")
    assert list(map(to_six_digits, back)) == list(map(to_six_digits, outcomes))


def test_the_table_is_one_that_a_spreadsheet_reads(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.csv"
    write_outcomes(path, [outcome({"click": FULL}), outcome({"watch": "healthy"}, test={"watch": 0.25})])
    header, first, second = path.read_text().splitlines()
    assert header.startswith("cell,optimizer,family,model,incident,rate,seed,status,steps,rows,seconds,precision,loss,")
    assert header.endswith(
        "kinds/click,verdicts/click,valid/click,test/click,kinds/watch,verdicts/watch,valid/watch,test/watch"
    )
    assert first.endswith(",binary,full_divergence,0.5,0.5,,,,")
    assert second.endswith(",,,,,regression,healthy,0.5,0.25")


def test_a_table_without_outcomes_is_one(tmp_path: Path) -> None:
    write_outcomes(tmp_path / "outcomes.csv", [])
    assert read_outcomes(tmp_path / "outcomes.csv") == []


def test_another_file_is_no_table_of_outcomes(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.csv"
    with pytest.raises(ConfigError, match=r"there is no file '.*outcomes\.csv'; steadyrank ladder writes it"):
        read_outcomes(path)
    write_outcomes(path, [outcome()])
    whole = path.read_text()
    header, line = whole.splitlines()
    damaged = {
        "a,b\n1,2\n": "'cell'",
        whole.replace(",0.1,", ",x,", 1): "could not convert string to float: 'x'",
        f"{header}\n{line},7\n": "not as many values as there are columns",
        f"{header}\n{line[:40]}\n": "not as many values as there are columns",
        f"{header},odd/click\n{line},1\n": "'odd'",
        whole.replace("verdicts/click", "cell/click"): "",
    }
    for text, message in damaged.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"outcomes\.csv' is no table of outcomes: .*" + message):
            read_outcomes(path)
    path.write_bytes(b"\xff\xfe\x00c")
    with pytest.raises(ConfigError, match="is no table of outcomes"):
        read_outcomes(path)
    with pytest.raises(ConfigError, match="is no table of outcomes"):
        read_outcomes(tmp_path)


def test_a_table_cut_anywhere_is_refused_or_has_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.csv"
    write_outcomes(path, outcomes := [outcome(seed=seed) for seed in range(3)])
    data = path.read_bytes()
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        try:
            found = read_outcomes(path)
        except ConfigError:
            continue
        assert len(found) <= len(outcomes)
        for one, other in zip(found[:-1], outcomes, strict=False):
            assert repr(one) == repr(other)


def test_where_it_cannot_be_written_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write .*/nowhere/outcomes\.csv: .*; choose another --out"):
        write_outcomes(tmp_path / "nowhere" / "outcomes.csv", [outcome()])
