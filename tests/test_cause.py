"""Cause reports: each part against an analytic answer, and whole ones of planted troubles."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steadyrank.errors import DataError
from steadyrank.losses import multitask_loss
from steadyrank.models.ranker import ModelConfig, Ranker
from steadyrank.monitors.cause import (
    Cause,
    Earlier,
    Layer,
    Trail,
    compare_states,
    find_cause,
    find_layer,
    score_log,
)
from steadyrank.monitors.row_gradients import RowReadings
from steadyrank.monitors.unusual import LABEL, Reference
from steadyrank.runs import RunFolder
from steadyrank.schema import Batch, Schema

from .batches import FEATURES, TASKS, make_batch

# Huber's gradient would stop growing with the label.
SCHEMA = Schema(features=FEATURES, tasks={**TASKS, "watch": {"kind": "regression"}}, embedding_width=4)
ROWS = 100
STEP = 300


# --- parts ------------------------------------------------------------------------------------------------------------


def test_a_score_is_robust_standard_deviations_of_the_logarithm() -> None:
    rng = np.random.default_rng(0)
    usual = np.exp(rng.normal(1.0, 0.5, 10_000))
    assert score_log(math.exp(3.0), usual) == pytest.approx((3 - 1) / 0.5, rel=0.03)
    assert score_log(math.exp(-1.0), usual) == pytest.approx((-1 - 1) / 0.5, rel=0.03)
    blinded = [*usual[:4000], *[math.nan, math.inf, 1e30] * 50]
    assert score_log(math.exp(3.0), blinded) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(
    ("value", "usual", "score"),
    [
        (math.nan, [1.0] * 9, math.inf),
        (math.inf, [], math.inf),
        (5.0, [], 0.0),
        (5.0, [1.0, 1.0, math.nan, math.inf, 1.0], 0.0),
        (1.0, [1.0] * 9, 0.0),
        (math.e, [1.0] * 9, 10.0),  # a flat history: a tenth counts as one deviation
        (0.0, [0.0] * 9, 0.0),
    ],
)
def test_a_score_of_what_is_short_flat_or_not_finite(value: float, usual: list[float], score: float) -> None:
    assert score_log(value, usual) == pytest.approx(score)


def trail(values: np.ndarray, measure: str = "gradient") -> Trail:
    return Trail(measure, ["a", "b", "c"], np.arange(len(values)), values)


def test_the_layer_is_the_first_that_left_its_range_and_of_several_the_furthest() -> None:
    values = np.exp(np.random.default_rng(0).normal(0, 0.2, (40, 3)))
    assert find_layer([trail(values)], 30) is None
    values[32, 1] = math.exp(2.4)
    values[32, 2] = math.exp(4.0)
    values[35, 0] = math.exp(40.0)
    layer = find_layer([trail(values)], 30)
    assert (layer.name, layer.step) == ("c", 32)
    assert layer.score == pytest.approx(score_log(values[32, 2], values[:30, 2]))
    later = values.copy()
    later[30, 0] = math.inf
    assert find_layer([trail(values), trail(later, "update over weight")], 30) == Layer(
        "a", "update over weight", 30, math.inf
    )


def test_a_layer_is_not_named_from_a_short_history_or_where_nothing_was_read() -> None:
    values = np.ones((10, 3))
    values[8] = [100.0, math.nan, math.nan]
    assert find_layer([], 5) is None
    assert find_layer([trail(values)], 3) is None
    assert find_layer([trail(values)], 0) is None
    assert find_layer([trail(np.zeros((0, 3)))], 5) is None
    assert find_layer([trail(values)], 5).name == "a"


def readings(loss: float, gradient: float = 1.0) -> RowReadings:
    one = torch.ones(1, 1, dtype=torch.float64)
    return RowReadings(loss * one[0], gradient * one[0], loss * one, gradient * one)


USUAL = [readings(x) for x in (0.9, 1.0, 1.1, 1.0, 0.95, 1.05)]
HIGH = [readings(x.losses_K.item() * 50) for x in USUAL]


@pytest.mark.parametrize(
    ("now", "then", "usual_now", "expected"),
    [
        (80.0, 90.0, USUAL, "data"),
        (80.0, 1.0, HIGH, "state"),
        (80.0, 90.0, HIGH, "both"),
        (80.0, 1.0, USUAL, "both"),
        (1.1, 1.0, USUAL, "neither"),
        (math.nan, math.nan, USUAL, "data"),
        (math.nan, 1.0, [readings(math.nan)] * 6, "state"),
    ],
)
def test_data_or_state(now: float, then: float, usual_now: Sequence[RowReadings], expected: str) -> None:
    assert compare_states(0, readings(now), readings(then), usual_now, USUAL) == expected


def test_a_state_that_is_bad_in_another_task_than_the_leading_one_is_bad() -> None:
    def two(first: float, second: float) -> RowReadings:
        one, other = readings(first), readings(second)
        parts = zip(one.__dict__.values(), other.__dict__.values(), strict=True)
        return RowReadings(*(torch.cat(pair, -1) for pair in parts))

    usual, drifted = [two(x, x) for x in (0.9, 1.0, 1.1, 1.0)], [two(x, 50 * x) for x in (0.9, 1.0, 1.1, 1.0)]
    assert compare_states(0, two(1.0, 50.0), two(1.0, 1.0), drifted, usual) == "state"
    assert compare_states(0, two(1.0, 50.0), two(1.0, 50.0), usual, usual) == "neither"
    assert compare_states(1, two(1.0, 50.0), two(1.0, 50.0), usual, usual) == "data"


def test_the_gradient_alone_can_tell_data_from_state() -> None:
    assert compare_states(0, readings(1.0, 1e3), readings(1.0, 1e3), USUAL, USUAL) == "data"


# --- whole reports ----------------------------------------------------------------------------------------------------


def make_model(schema: Schema = SCHEMA) -> Ranker:
    config = ModelConfig(trunk={"kind": "shared_bottom", "widths": [16]}, tower=[8])
    model = Ranker(schema, config, torch.Generator().manual_seed(0))
    for seed in range(5):
        model(make_batch(schema, ROWS, seed=seed))
    return model


def make_reference(schema: Schema = SCHEMA, count: int = 16) -> Reference:
    reference = Reference()
    for i in range(count):
        reference.add(10 * i, make_batch(schema, ROWS, seed=i))
    return reference


def look_up(rows: list[int]) -> list[dict[str, Any]]:
    return [{"user": f"user of row {row}", "key": row} for row in rows]


def examine(model: Ranker, batch: Batch, **options: Any) -> Cause:
    return find_cause(STEP, model, batch, SCHEMA, multitask_loss, make_reference(), **options)


STRUCK = torch.arange(ROWS) < 12


def wrong_unit() -> Batch:
    """Return a batch with a dozen labels of `watch` a thousand times too large."""
    batch = make_batch(SCHEMA, ROWS, seed=99)
    labels, weights = batch.labels.clone(), batch.weights.clone()
    weights[STRUCK, 2] = 1.0
    labels[STRUCK, 2] = 1000.0 + torch.arange(12.0)
    return replace(batch, labels=labels, weights=weights)


def test_labels_in_a_wrong_unit_are_named_with_task_rows_and_keys() -> None:
    model = make_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    cause = examine(model, wrong_unit(), earlier=Earlier(100, state), look_up=look_up, why="the loss rose")
    assert (cause.task, cause.feature, cause.state_or_data) == ("watch", LABEL + "watch", "data")
    assert cause.why == "the loss rose"
    assert cause.tasks["watch"].loss > 10 * cause.tasks["watch"].usual_loss
    assert cause.tasks["watch"].gradient_frac > 0.9
    assert sum(reading.gradient_frac for reading in cause.tasks.values()) == pytest.approx(1.0)
    assert {row.row - 99_000 for row in cause.rows} <= set(range(12))
    assert [row.gradient for row in cause.rows] == sorted((row.gradient for row in cause.rows), reverse=True)
    assert {row.row - 99_000 for row in cause.odd_rows} <= set(range(12))
    first = cause.rows[0]
    assert first.columns == {"user": f"user of row {first.row}", "key": first.row}
    assert (first.task, first.holds) == ("watch", (LABEL + "watch",))
    feature = cause.features[0]
    assert (feature.view, feature.now, feature.held_worst) == ("extremes", 1011.0, 10)
    assert 12 / ROWS <= feature.held_frac <= 14 / ROWS
    for words in ("watch led: its loss was", "label of watch reaches 1,011", "10 of the 10 worst", "100 steps earlier"):
        assert words in cause.sentence
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_state_that_broke_is_told_from_the_data() -> None:
    model = make_model()
    earlier = Earlier(100, {name: value.clone() for name, value in model.state_dict().items()})
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            parameter *= 300
    batch = make_batch(SCHEMA, ROWS, seed=99)
    losses = np.random.default_rng(0).uniform(0.6, 0.8, (30, 3))
    cause = examine(model, batch, earlier=earlier, losses_TK=losses)
    assert cause.state_or_data == "state"
    assert cause.task != ""
    assert cause.tasks[cause.task].loss > 2 * cause.tasks[cause.task].usual_loss
    assert cause.features == []
    assert "No feature and no label is unusual." in cause.sentence
    # Weights that are left out of the earlier state are taken as they are now.
    dense = Earlier(100, {n: v for n, v in earlier.state.items() if not n.startswith("tables")})
    assert examine(model, batch, earlier=dense, losses_TK=losses).state_or_data == "state"


def test_an_ordinary_batch_is_blamed_for_nothing() -> None:
    model = make_model()
    cause = examine(model, make_batch(SCHEMA, ROWS, seed=99), earlier=Earlier(100, model.state_dict()))
    assert (cause.task, cause.layer, cause.feature, cause.state_or_data) == ("", None, "", "neither")
    assert cause.odd_rows == []
    assert len(cause.rows) == 10
    assert "No task's loss or gradient left its usual range." in cause.sentence


def test_a_loss_that_is_not_finite_leads() -> None:
    batch = wrong_unit()
    labels = batch.labels.clone()
    labels[3, 2] = math.nan
    cause = examine(make_model(), replace(batch, labels=labels))
    assert cause.task == "watch"
    assert cause.rows[0].row == 99_003
    assert "its loss was not finite" in cause.sentence
    assert (cause.state_or_data, cause.earlier_steps) == ("unknown", None)


def test_a_short_history_says_so() -> None:
    model, batch = make_model(), wrong_unit()
    cause = find_cause(STEP, model, batch, SCHEMA, multitask_loss, Reference(), earlier=Earlier(9, model.state_dict()))
    assert (cause.task, cause.features, cause.state_or_data, cause.usual_batches) == ("", [], "unknown", 0)
    assert math.isnan(cause.tasks["watch"].usual_loss)
    assert "Too few batches came before" in cause.sentence
    assert len(cause.rows) == 10
    few = find_cause(5, model, batch.take(torch.arange(2)), SCHEMA, multitask_loss, Reference())
    assert len(few.rows) == 2


def test_losses_of_the_steps_before_are_what_is_usual() -> None:
    losses = np.tile(np.array([[0.7, 0.7, 1e6]]), (20, 1))
    cause = examine(make_model(), wrong_unit(), losses_TK=losses)
    assert cause.tasks["watch"].loss_score < 0
    assert cause.tasks["watch"].usual_loss == 1e6


def test_what_came_after_the_beginning_is_not_usual() -> None:
    reference, batch = make_reference(), wrong_unit()
    for step in range(STEP - 100, STEP, 10):
        reference.add(step, batch)
    model = make_model()
    late = find_cause(STEP, model, batch, SCHEMA, multitask_loss, reference)
    early = find_cause(STEP, model, batch, SCHEMA, multitask_loss, reference, since=STEP - 100)
    assert early.feature == LABEL + "watch"
    assert early.usual_batches < late.usual_batches
    assert early.features[0].score > 2 * (late.features[0].score if late.features else 0)


def test_the_first_layer_is_in_the_report() -> None:
    values = np.exp(np.random.default_rng(0).normal(0, 0.2, (60, 3)))
    values[58:, 1] = 1e3
    steps = np.arange(STEP - 59, STEP + 1)
    cause = examine(make_model(), wrong_unit(), trails=[Trail("gradient", ["a", "b", "c"], steps, values)])
    assert (cause.layer.name, cause.layer.step) == ("b", STEP - 1)
    assert f"b left its range first, at step {STEP - 1}: its gradient, by" in cause.sentence


def test_a_log_that_is_gone_leaves_the_row_numbers() -> None:
    def gone(rows: list[int]) -> list[dict[str, Any]]:
        raise DataError("the log is gone")

    cause = examine(make_model(), wrong_unit(), look_up=gone)
    assert cause.rows[0].columns == {}
    assert cause.rows[0].row >= 99_000
    unnumbered = examine(make_model(), replace(wrong_unit(), row=None), look_up=gone)
    assert {row.row for row in unnumbered.rows} <= set(range(12))


# --- names of values --------------------------------------------------------------------------------------------------


def with_id(name: str, row: int) -> Batch:
    """Return a batch half of whose rows hold one id, given by its row in the feature's table."""
    batch = make_batch(SCHEMA, ROWS, seed=99)
    ids = batch.ids.clone()
    ids[: ROWS // 2, list(SCHEMA.id_features).index(name)] = SCHEMA.slot(name).start + row
    return replace(batch, ids=ids)


@pytest.mark.parametrize(
    ("name", "row", "known", "value"),
    [
        ("item", 8, True, "item of the log"),
        ("item", 8, False, "table row 8"),
        ("item", 0, True, "null"),
        ("item", 0, False, "null"),
        ("hour", 8, False, 7),  # not hashed: the row is the id
    ],
)
def test_an_id_is_named_as_the_log_has_it(name: str, row: int, known: bool, value: Any) -> None:
    def read(rows: list[int]) -> list[dict[str, Any]]:
        return [{name: "item of the log" if 99_000 <= each < 99_000 + ROWS // 2 else "another"} for each in rows]

    cause = examine(make_model(), with_id(name, row), look_up=read if known else None)
    feature = next(f for f in cause.features if f.feature == name)
    assert (feature.view, feature.value) == ("share", value)


@pytest.mark.parametrize("raw", [["old", "x", "wanted", "y"], "Old x WANTED y"])
def test_an_element_of_a_list_is_named_from_the_end(raw: Any) -> None:
    """A list that is cut to its last elements has lost its beginning, and a text is its words in lower case."""
    batch = make_batch(SCHEMA, ROWS, seed=99)
    start = SCHEMA.slot("tags").start
    at = list(SCHEMA.list_features).index("tags")
    row = torch.tensor([start + 1, start + 5, start + 2])
    values = torch.cat([row.repeat(ROWS // 2), torch.full((ROWS // 2,), start + 9)])
    offsets = torch.cat([torch.arange(ROWS // 2 + 1) * 3, ROWS // 2 * 3 + torch.arange(1, ROWS // 2 + 1)])
    lists = list(batch.lists)
    lists[at] = lists[at]._replace(values=values, offsets=offsets)
    usual = Reference()
    for i in range(16):  # rows 1, 2 and 9 are common, so that 5 alone comes up
        common = list(make_batch(SCHEMA, ROWS, seed=i).lists)
        common[at] = common[at]._replace(
            values=torch.tensor([start + 1, start + 2, start + 9]).repeat(ROWS), offsets=torch.arange(ROWS + 1) * 3
        )
        usual.add(10 * i, replace(make_batch(SCHEMA, ROWS, seed=i), lists=tuple(common)))
    cause = find_cause(
        STEP, make_model(), replace(batch, lists=tuple(lists)), SCHEMA, multitask_loss, usual,
        look_up=lambda rows: [{"tags": raw} for _ in rows],
    )  # fmt: skip
    feature = next(f for f in cause.features if f.feature == "tags")
    assert feature.value == "wanted"


def test_places_and_labels_are_named_as_they_are() -> None:
    batch = make_batch(SCHEMA, ROWS, seed=99)
    half = torch.arange(ROWS)[:, None] < ROWS // 2
    cause = examine(make_model(), replace(batch, positions=torch.where(half, 3, batch.positions)))
    assert next(f for f in cause.features if f.feature == "place").value == 3


def test_a_report_goes_into_a_run_folder_and_back(tmp_path: Path) -> None:
    import datetime

    def read(rows: list[int]) -> list[dict[str, Any]]:
        return [{"time": datetime.datetime(2026, 1, 1), "x": math.inf, "bag": [1, None]} for _ in rows]

    labels = wrong_unit().labels.clone()
    labels[0, 2] = math.inf
    cause = examine(make_model(), replace(wrong_unit(), labels=labels), look_up=read)
    folder = RunFolder.create(tmp_path / "run")
    folder.write_cause(STEP, cause.as_dict())
    (back,) = folder.causes()
    assert back["task"] == "watch"
    assert back["losses"]["watch"] == math.inf
    assert back["rows"][0]["columns"] == {"time": "2026-01-01 00:00:00", "x": math.inf, "bag": [1, None]}
    assert back["features"][0]["feature"] == back["feature"] == LABEL + "watch"
    assert json.dumps(back["rows"][1]) == json.dumps(cause.as_dict()["rows"][1]).replace('"holds": ()', '"holds": []')
