"""The instruments in a run of ours: what they leave in its folder, that they change nothing, and that they resume."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steadyrank import instruments as module
from steadyrank.config import RunConfig
from steadyrank.instruments import Instruments, find_fields
from steadyrank.losses import multitask_loss
from steadyrank.runs import RunFolder
from steadyrank.schema import Batch
from steadyrank.sequential import Parts, Progress, run
from steadyrank.train import train_step

from .tiny import tiny, train

OFTEN = (
    "data.rows=5_120",
    "watch.look_every=2",
    "watch.dynamics_every=4",
    "watch.tasks_every=5",
    "watch.rank_every=8",
    "watch.curvature_every=6",
    "watch.snapshot_every=10",
)
WATCHED = ("dynamics", "tasks", "curvature")
LONGER = (*OFTEN, "data.rows=7_680", "reader.batch_size=64", "reader.window_rows=640", "reader.shuffle=false")
UNITS = "{kind='units', at=%s, length=0.08, target='rating'}"


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(tiny(*OFTEN), tmp_path_factory.mktemp("runs") / "watched")


def parts_of(*overrides: str) -> Parts:
    return tiny(*OFTEN, *overrides).build()


def make_instruments(parts: Parts, path: Path) -> tuple[Instruments, list[tuple[str, int, dict[str, float]]]]:
    rows: list[tuple[str, int, dict[str, float]]] = []
    write = lambda table, step, row: rows.append((table, step, dict(row)))  # noqa: E731
    optimizers = list(parts.optimizers.values())
    return Instruments(parts.model, optimizers, parts.reader, parts.watch, RunFolder.create(path), write), rows


def batches_of(parts: Parts) -> Iterator[tuple[Batch, bool]]:
    """Yield the batches, and whether each is the last of its window."""
    for batch, _ in parts.reader.batches():
        yield batch, parts.reader.left == 0


def test_a_run_leaves_every_reading_under_its_name(watched: RunFolder) -> None:
    schema, tables = tiny(*OFTEN).schema_, {name: watched.readings(name) for name in ("steps", "windows", *WATCHED)}
    last = int(tables["steps"]["step"][-1])
    assert tables["dynamics"]["step"].tolist() == list(range(2, last + 1, 2))
    assert tables["tasks"]["step"].tolist() == list(range(5, last + 1, 5))
    found: dict[str, set[str]] = {}
    for columns in tables.values():
        for name in set(columns) - {"step", "time"}:
            area, _, label = name.partition("/")
            assert area, name
            assert label, name
            found.setdefault(area, set()).add(label)
    dense = {name for name, _ in parts_of().model.named_parameters() if not name.startswith("tables.")}
    for area in ("gradient_norm", "update_over_weight_max", "factor_clippy", "accumulator_q50", "direction_max"):
        assert found[area] == dense, area
    for area in ("rows_touched", "row_update_max", "effective_rank", "row_norm_max_age_steps"):
        assert found[area] == set(schema.tables), area
    assert found["logit_low"] == found["task_share_frac"] == set(schema.tasks)
    assert found["saturated_frac"] == {name for name, task in schema.tasks.items() if task.kind == "binary"}
    assert found["headroom"] == found["headroom_next"] == {"total", *schema.tasks}
    assert "all" in found["dead_frac"]
    verdicts = {name: task["verdict"]["verdict"] for name, task in watched.summary()["tasks"].items()}
    assert verdicts.keys() == set(schema.tasks)


def test_the_trunks_with_gates_show_them(tmp_path: Path) -> None:
    gated = "model.trunk={kind='ple', levels=1, shared_experts=1, task_experts=1, widths=[8]}"
    folder = train(tiny(gated, "data.rows=640", "watch.look_every=2"), tmp_path / "run")
    columns = folder.readings("dynamics")
    tasks = set(tiny().schema_.tasks)
    entropies = {name: values for name, values in columns.items() if name.startswith("gate_entropy_frac/")}
    assert {name.rpartition(".")[2] for name in entropies} == tasks
    for values in entropies.values():
        assert ((values > 0) & (values <= 1 + 1e-6)).all()
    for task in tasks:
        loads = [v for name, v in columns.items() if name.startswith("expert_load_frac/") and f".{task}." in name]
        np.testing.assert_allclose(sum(loads), 1.0, atol=1e-4)


def test_a_run_is_the_same_to_the_bit_without_them(watched: RunFolder, tmp_path: Path) -> None:
    alone = train(tiny(*OFTEN, "watch.enabled=false"), tmp_path / "alone")
    one, other = (folder.checkpoints.load() for folder in (watched, alone))
    for key, value in one["model"].items():
        assert torch.equal(value, other["model"][key]), key
    for part, saved in one["optimizers"].items():
        for index, state in saved["state"].items():
            for key, value in state.items():
                assert torch.equal(value, other["optimizers"][part]["state"][index][key]), key
    assert alone.readings("dynamics")["step"].size == 0
    losses = {name: values for name, values in alone.readings("steps").items() if name.startswith("loss/")}
    for name, values in losses.items():
        np.testing.assert_array_equal(values, watched.readings("steps")[name])


class KilledError(Exception):
    pass


def events_of(folder: RunFolder) -> list[str]:
    told = [event for event in folder.events() if not event.get("process")]
    return [json.dumps({k: v for k, v in e.items() if k not in ("time", "file")}) for e in told]


@pytest.mark.slow
def test_a_resumed_run_reads_and_warns_as_the_run_that_went_through(tmp_path: Path) -> None:
    incident = f"data.incidents=[{UNITS % 0.6}]"
    config = tiny(*LONGER, incident, "train.checkpoint_every=33", "watch.snapshot_every=1000")

    def crash(progress: Progress) -> None:
        if progress.step > 70:
            raise KilledError

    whole = train(config, tmp_path / "whole")
    with pytest.raises(KilledError):
        train(config, tmp_path / "killed", on_progress=crash)
    killed = RunFolder.open(tmp_path / "killed")
    assert killed.checkpoints.steps()[-1] == 66
    run(config.build(), killed, resume=True)
    for table in ("steps", *WATCHED):
        one, other = whole.readings(table), killed.readings(table)
        assert set(one) == set(other)
        for name in set(one) - {"time", "speed/rows_per_s"}:
            np.testing.assert_array_equal(one[name], other[name], err_msg=f"{table} {name}")
    assert {event["kind"] for event in whole.events()} >= {"warning", "cause"}
    assert events_of(whole) == events_of(killed)
    assert whole.summary()["tasks"] == killed.summary()["tasks"]


@pytest.mark.slow
def test_an_incident_is_warned_of_and_explained(tmp_path: Path) -> None:
    folder = train(tiny(*LONGER, f"data.incidents=[{UNITS % 0.6}]"), tmp_path / "run")
    struck = range(73, 83)  # of 120 steps
    alarms = [event for event in folder.events() if event["kind"] == "warning" and event["level"] == "alarm"]
    assert alarms[0]["step"] in struck
    [cause] = folder.causes()
    [event] = [event for event in folder.events() if event["kind"] == "cause"]
    assert event["file"] == f"causes/step_{cause['step']}.json"
    assert (folder.path / event["file"]).exists()
    assert (event["task"], event["feature"]) == ("rating", "label of rating")
    assert event["step"] == cause["step"] == alarms[0]["step"]
    assert cause["earlier_steps"] >= 10


@pytest.mark.slow
def test_causes_are_few_and_far_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    incidents = ", ".join(UNITS % at for at in (0.55, 0.8))
    again = (*LONGER, "data.rows=5_120", "watch.warning.quiet_steps=1", f"data.incidents=[{incidents}]")

    def steps_of(name: str, most: int, apart: int) -> list[int]:
        monkeypatch.setattr(module, "_CAUSES_APART", apart)
        return [cause["step"] for cause in train(tiny(*again, f"watch.causes={most}"), tmp_path / name).causes()]

    many = steps_of("many", 9, 3)
    assert len(many) >= 2
    assert steps_of("few", 1, 3) == many[:1]
    assert steps_of("apart", 9, 1000) == many[:1]
    assert steps_of("none", 0, 3) == []


def test_headroom_on_the_next_window_is_measured_before_any_of_it_is_learned(tmp_path: Path) -> None:
    parts = parts_of("reader.window_rows=512")
    instruments, rows = make_instruments(parts, tmp_path / "run")
    tasks, before = list(parts.schema.tasks.values()), {}
    ends, first = [], True
    parts.model.train()
    for batch, last in batches_of(parts):
        if first and instruments.watch.headroom_is_due:
            ends.append(instruments.watch.step)
            before = {n: p.detach().clone() for n, p in parts.model.named_parameters()}
        if first:
            instruments.begin_window(batch)
        for name, value in before.items():  # put back to the bit
            assert torch.equal(value, dict(parts.model.named_parameters())[name])
        before = {}
        instruments.expect(last_of_window=last)
        train_step(parts.model, list(parts.optimizers.values()), batch, tasks, instruments.watch)
        instruments.note(batch)
        first = last
    instruments.flush()
    curvature = {step: row for table, step, row in rows if table == "curvature"}
    measured = [step for step, row in curvature.items() if "headroom_next/total" in row]
    assert measured == ends
    # Windows end every fourth step; of these 8 is the first that is six steps from the last one measured, and 12 is one
    # at which headroom is measured anyway.
    assert measured == [8, 12, 20, 24, 32, 36]
    assert set(range(6, 41, 6)) <= {step for step, row in curvature.items() if "headroom/total" in row}
    for step in measured:
        assert np.isfinite(curvature[step]["headroom_next/total"])


def test_losses_of_a_batch_are_those_of_training_and_nothing_is_learned(tmp_path: Path) -> None:
    parts = parts_of()
    instruments, _ = make_instruments(parts, tmp_path / "run")
    model, tasks = parts.model.train(), list(parts.schema.tasks.values())
    with torch.no_grad():
        model.position.weight.normal_(generator=torch.Generator().manual_seed(0))
    batch, _ = next(batches_of(parts))
    model(batch)  # running statistics have begun
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        found = instruments._losses_of(batch)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    model.eval()
    logits_BK = model.forward_both(batch).training
    parts_K = multitask_loss(logits_BK, batch.labels, batch.weights, tasks).parts
    weights = torch.tensor([task.loss_weight for task in tasks])
    torch.testing.assert_close(found, (weights * parts_K).detach())
    assert not torch.equal(logits_BK, model(batch))  # the position's part is in it


def test_copies_of_earlier_weights_are_dense_few_and_old_enough(tmp_path: Path) -> None:
    parts = parts_of("watch.snapshot_every=5")
    instruments, _ = make_instruments(parts, tmp_path / "run")
    tasks, kept = list(parts.schema.tasks.values()), {}
    parts.model.train()
    for step, (batch, _) in enumerate(batches_of(parts), start=1):
        train_step(parts.model, list(parts.optimizers.values()), batch, tasks, instruments.watch)
        instruments.note(batch)
        kept[step] = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
        earlier = instruments._earlier(step)
        if step < 10:
            assert earlier is None
            continue
        assert 5 <= earlier.steps <= 9
        assert earlier.state.keys() == {name for name in kept[step] if not name.startswith("tables.")}
        for name, value in earlier.state.items():
            assert torch.equal(value, kept[step - earlier.steps][name])
    assert len(instruments._snapshots) == 3
    assert instruments._earlier(18) is None or instruments._earlier(18).steps >= 5


def test_fields_are_the_schemas_tables_one_below_the_other() -> None:
    parts = parts_of()
    fields, named = find_fields(parts.model, parts.schema), dict(parts.model.named_parameters())
    assert [field.name for field in fields] == list(parts.schema.tables)
    for parameter in {field.parameter for field in fields}:
        mine = sorted((f for f in fields if f.parameter == parameter), key=lambda f: f.start)
        assert [f.start for f in mine] == [sum(f.rows for f in mine[:i]) for i in range(len(mine))]
        assert sum(f.rows for f in mine) == len(named[parameter])
    assert find_fields(torch.nn.Linear(2, 2), parts.schema) == []


def test_rows_touched_are_those_of_the_batch(tmp_path: Path) -> None:
    parts = parts_of("watch.dynamics_every=1")
    instruments, rows = make_instruments(parts, tmp_path / "run")
    batch, _ = next(batches_of(parts))
    tasks = list(parts.schema.tasks.values())
    train_step(parts.model.train(), list(parts.optimizers.values()), batch, tasks, instruments.watch)
    instruments.note(batch)
    instruments.flush()
    [row] = [row for table, _, row in rows if table == "dynamics"]
    ids = [*batch.ids.unbind(1), *(ragged.values for ragged in batch.lists)]
    held: dict[str, set[int]] = {}
    names = [name for name, feature in parts.schema.features.items() if feature.kind in ("id", "ids")]
    by_kind = [n for k in ("id", "ids") for n in names if parts.schema.features[n].kind == k]
    for name, values in zip(by_kind, ids, strict=True):
        table = parts.schema.features[name].table or name
        held.setdefault(table, set()).update(values.tolist())
    assert {f"rows_touched/{table}": float(len(found)) for table, found in held.items()} == {
        name: value for name, value in row.items() if name.startswith("rows_touched/")
    }


def test_the_settings_of_the_watch_are_a_section_of_the_run() -> None:
    config = tiny("watch.look_every=3", "watch.warning.band_steps=50", "watch.verdict.sigmas=8")
    assert config.watch.look_every == 3
    assert RunConfig.from_toml(config.to_toml()) == config
    parts: Any = config.build()
    assert parts.watch.warning.band_steps == 50
