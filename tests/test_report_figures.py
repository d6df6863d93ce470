"""The pictures of a run: what is drawn is what was read, and what cannot be drawn says why."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steadyrank.report import write_report
from steadyrank.report.figures import draw, find_tasks, read_tables
from steadyrank.report.layers import CLIP_HEAT, UPDATE_HEAT
from steadyrank.report.moment import Moment, find_moment
from steadyrank.report.plots import (
    CELLS,
    PALETTE,
    ROWS,
    Columns,
    Panel,
    Readings,
    heat_map,
    merge_steps,
    shorten,
    thin,
)
from steadyrank.report.tables import last_of_tables
from steadyrank.report.timeline import Episode
from steadyrank.runs import RunFolder

from .report_pages import Page
from .report_runs import BLAMED, EMBEDDINGS, PARAMETERS, TASKS, make_causes, make_events, make_tables, write_old_run

PANEL = Panel("map", "A map", "How to read it.")


def panels(readings: Readings, **what: Any) -> dict[str, Panel]:
    return {panel.key: panel for section in draw(readings, **what) for panel in section.panels}


def lines(panel: Panel) -> dict[str, Any]:
    assert panel.figure is not None, panel.missing
    return {trace.name: trace for trace in panel.figure.data}


def table(step: Any, **columns: Any) -> Columns:
    """A table whose columns are called `area__name` here."""
    found = {name.replace("__", "/"): np.asarray(values, dtype=float) for name, values in columns.items()}
    return {"step": np.asarray(step), "time": np.zeros(len(step)), **found}


@pytest.fixture
def old(tmp_path: Path) -> Readings:
    tables = read_tables(write_old_run(tmp_path / "run"))
    return Readings(tables, find_tasks(tables["steps"], tables["windows"]))


@pytest.fixture(scope="module")
def full() -> Readings:
    return Readings(make_tables(), TASKS)


def test_a_figure_without_readings_skips_itself_and_says_so(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.append("steps", 1, {"loss/total": 1.0, "loss/click": 1.0})
    run.append("steps", 2, {"loss/total": math.nan, "loss/click": math.nan})
    found = panels(Readings(read_tables(run), ["click"]))
    assert {key for key, panel in found.items() if panel.figure is not None} == {"loss"}
    assert found["auc"].missing.startswith("the table windows has no rows")
    assert found["clip"].missing.startswith("no reading clip_factor in the table steps")
    text = Page(write_report(run)).text
    assert "Clip factors: no reading clip_factor in the table steps (the optimizer clips nothing)." in text


def test_a_column_without_a_finite_value_is_no_figure() -> None:
    tables = {
        name: {column: np.full(len(values), np.nan) if "/" in column else values for column, values in columns.items()}
        for name, columns in make_tables(steps=400).items()
    }
    assert all(panel.figure is None and panel.missing for panel in panels(Readings(tables, TASKS)).values())


def test_every_instrument_is_drawn(full: Readings) -> None:
    found = panels(full, moment=Moment(4560, BLAMED, "click"))
    assert all(panel.figure is not None for panel in found.values())
    for key, names in {
        "task_share": set(TASKS),
        "task_gradient": set(TASKS),
        "saturation": set(TASKS),
        "logits": {*TASKS, *(f"{task}, lowest" for task in TASKS), "lowest"},
        "headroom": {"total", "total, next window", *TASKS, *(f"{t}, next window" for t in TASKS), "next window"},
        "sharpness": {"total"},
        "gates": set(TASKS),
        "ranks": set(EMBEDDINGS),
    }.items():
        assert lines(found[key]).keys() == names
    for key, rows in {"update_map": PARAMETERS, "clip_map": PARAMETERS, "row_updates": EMBEDDINGS}.items():
        figure = found[key].figure
        assert figure is not None
        assert tuple(figure.data[0].y) == rows
    np.testing.assert_allclose(
        lines(found["headroom"])["click"].y, full.tables["curvature"]["headroom/click"], rtol=1e-6
    )
    np.testing.assert_array_equal(lines(found["headroom"])["click"].x, np.arange(200, 6001, 200))


def test_auc_is_drawn_with_baseline_and_attainable(old: Readings) -> None:
    found = lines(panels(old)["auc"])
    np.testing.assert_allclose(found["click"].y, 0.6 + np.arange(5, 31, 5) / 300, rtol=1e-6)
    np.testing.assert_array_equal(found["click"].x, np.arange(5, 31, 5))
    assert found["click, baseline"].line.dash == "dash"
    assert found["click, attainable"].line.dash == "dot"
    assert set(found["click, attainable"].y) == {0.75}
    assert "500 rows, log time 2023-11-14 22:13" in found["click"].customdata[0]


def test_the_baseline_of_a_regression_is_normalised_alike(old: Readings) -> None:
    found = lines(panels(old)["error"])
    np.testing.assert_allclose(found["watch"].y, 0.8, rtol=1e-6)
    # over the constant's RMSE, 2 / 0.8
    np.testing.assert_allclose(found["watch, baseline"].y, 2.25 / (2.0 / 0.8), rtol=1e-6)


def test_a_task_keeps_its_colour(full: Readings) -> None:
    found = panels(full)
    colours: dict[str, set[str]] = {task: set() for task in TASKS}
    for key in ("auc", "error", "loss", "entropy", "task_share", "headroom", "logits"):
        for name, trace in lines(found[key]).items():
            if name in colours:
                colours[name].add(trace.line.color)
    assert colours == {task: {PALETTE[k]} for k, task in enumerate(TASKS)}


def test_of_many_tasks_the_companions_wait_until_asked_for() -> None:
    tasks = [f"task_{i}" for i in range(8)]
    found = lines(panels(Readings(make_tables(tasks, steps=400), tasks))["auc"])
    assert found["task_0, baseline"].visible == "legendonly"
    assert found["task_0"].visible is None


def test_a_loss_that_is_not_finite_is_marked(old: Readings) -> None:
    panel = panels(old)["loss"]
    found = lines(panel)
    np.testing.assert_array_equal(found["not finite"].x, [12])
    assert math.isnan(found["total"].y[11])
    assert panel.figure is not None
    assert panel.figure.layout.yaxis.type == "log"  # from 2 to 1/30
    assert "largest" not in panel.how  # not read by this run


def test_the_largest_loss_between_two_readings_is_drawn(full: Readings) -> None:
    panel = panels(full)["loss"]
    np.testing.assert_allclose(
        lines(panel)["like, largest"].y, full.tables["steps"]["loss_max/like"].astype(np.float32)
    )
    assert "largest since the reading before" in panel.how


def test_clip_factors_by_step_and_by_parameter(old: Readings) -> None:
    found = panels(old)
    curves = lines(found["clip"])
    np.testing.assert_allclose(curves["minimum"].y[[0, 11]], [0.99, 0.001], rtol=1e-6)
    np.testing.assert_allclose(curves["median"].y[0], (0.99 + 1) / 2, rtol=1e-6)
    figure = found["clip_map"].figure
    assert figure is not None
    (cells,) = figure.data
    assert list(cells.y) == ["cross.weight", "tower.bias"]
    np.testing.assert_allclose(cells.z[0][11], -3)  # on a log scale, as it spans a factor of 1000
    np.testing.assert_allclose(cells.z[1], 0)
    assert figure.layout.coloraxis.cmin == -3
    assert figure.layout.coloraxis.colorbar.ticktext == ("0.001", "0.01", "0.1", "1")


def test_without_clipping_the_map_shows_what_clippy_would_have_done() -> None:
    readings = Readings(make_tables(steps=400, clips=False), TASKS)
    found = panels(readings)
    assert found["clip"].missing.endswith("(the optimizer clips nothing)")
    assert found["clip_map"].title == "The factor that Clippy would have given, by layer"
    figure = found["clip_map"].figure
    assert figure is not None
    expected = readings.tables["dynamics"][f"factor_clippy/{PARAMETERS[0]}"]
    np.testing.assert_allclose(figure.data[0].customdata[0], expected, rtol=1e-6)


def test_events_and_disturbances_stand_in_every_figure(full: Readings) -> None:
    episodes = [Episode("click", 4000, None, "full_divergence"), Episode("like", 4000, None, "full_divergence")]
    for panel in panels(full, marks=[12, 12, 20], episodes=episodes, moment=Moment()).values():
        assert panel.figure is not None or panel.key == "moment"
        if panel.figure is not None:
            shapes = [shape for shape in panel.figure.layout.shapes if shape.yref == "paper"]
            assert [s.x0 for s in shapes if s.type == "line"] == [12, 20]
            assert [(s.x0, s.x1) for s in shapes if s.type == "rect"] == [(4000, 6000)]


def test_the_moment_shows_what_each_method_would_have_done(full: Readings) -> None:
    panel = panels(full, moment=Moment(4560, BLAMED, "click"))["moment"]
    found = lines(panel)
    assert panel.title == f"One layer around the moment: {BLAMED} around step 4,560"
    steps = full.tables["dynamics"]["step"]
    near = (steps >= 4560 - 60 * 20) & (steps <= 4560 + 30 * 20)
    for name, column in {
        "norm of the gradient": "gradient_norm",
        "gradient over weight": "gradient_over_weight",
        "largest coordinate of the step's direction, ‖r‖∞": "direction_max",
        "GC": "factor_gc",
        "AGC": "factor_agc",
        "LAMB": "factor_lamb",
        "Clippy": "factor_clippy",
    }.items():
        np.testing.assert_array_equal(found[name].x, steps[near])
        values = full.tables["dynamics"][f"{column}/{BLAMED}"][near]
        np.testing.assert_allclose(found[name].y, np.maximum(values, 1e-6), rtol=1e-6)
    np.testing.assert_allclose(
        found["in use"].y, full.tables["steps"][f"clip_factor/{BLAMED}"][near].astype(np.float32)
    )
    assert found["loss of click"].y.max() > 3


def test_where_to_look_closely(full: Readings) -> None:
    events, causes = make_events(TASKS, 6000), make_causes(TASKS, 6000)
    assert find_moment(events, causes, full) == Moment(4560, BLAMED, "click")
    assert find_moment(events, [], full) == Moment(2340, BLAMED, "like")  # the first alarm
    unnamed = [{"step": 2340, "task": "rating", "layer": None}]  # a cause report that names the task alone
    alarm = [{"step": 2340, "kind": "warning", "level": "alarm", "task": "", "layer": BLAMED}]
    assert find_moment(alarm, unnamed, full) == Moment(2340, BLAMED, "rating")
    notices = [event for event in events if event.get("level") != "alarm"]
    assert find_moment(notices, [], full) == Moment(2220, BLAMED, "like")
    verdicts = [event for event in events if event["kind"] == "verdict"]
    found = find_moment(verdicts, [], full)
    assert found is not None
    assert (found.step, found.task) == (4560, "click")  # the full divergence, not the dip before
    factors = {name: full.tables["dynamics"][f"factor_clippy/{name}"].min() for name in PARAMETERS}
    assert factors[found.layer] == min(factors.values())
    calm = find_moment([], [], full)
    assert calm is not None
    assert calm.layer == found.layer
    assert calm.step == full.tables["dynamics"]["step"][full.tables["dynamics"][f"factor_clippy/{calm.layer}"].argmin()]
    assert find_moment(events, causes, Readings({}, TASKS)) is None


def test_a_layer_without_all_readings_has_a_moment_too() -> None:
    dynamics = table([20, 40], **{"gradient_norm__w": [1.0, 2.0]})
    readings = Readings({"dynamics": dynamics}, [])
    moment = find_moment([], [], readings)
    assert moment == Moment(None, "w", "")
    assert lines(panels(readings, moment=moment)["moment"]).keys() == {"norm of the gradient"}


def test_what_is_not_finite_in_a_map() -> None:
    dynamics = table([1, 2, 3], update_over_weight__a=[0.1, np.inf, 0.001], update_over_weight__b=[np.nan, 0.0, 0.01])
    panel = heat_map(PANEL, Readings({"dynamics": dynamics}, []), "dynamics", "update_over_weight", UPDATE_HEAT)
    assert panel.figure is not None
    (cells,) = panel.figure.data
    # infinite is the strongest colour, NaN is a gap, 0 counts as the scale's lower end of 1e-4
    np.testing.assert_allclose(cells.z, [[-1, -1, -3], [np.nan, -3, -2]])
    assert (panel.figure.layout.coloraxis.cmin, panel.figure.layout.coloraxis.cmax) == (-4, 0)
    nothing = table([1, 2], clip_factor__a=[np.inf, np.nan])
    assert heat_map(PANEL, Readings({"steps": nothing}, []), "steps", "clip_factor", CLIP_HEAT).figure is None


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_flat_map_has_a_scale(value: float) -> None:
    steps = table([7], clip_factor__a=[value])
    panel = heat_map(PANEL, Readings({"steps": steps}, []), "steps", "clip_factor", CLIP_HEAT)
    assert panel.figure is not None
    assert panel.figure.layout.coloraxis.cmin < panel.figure.layout.coloraxis.cmax
    assert list(panel.figure.data[0].x) == [7, 8]


def test_a_map_of_many_steps_keeps_the_extremes() -> None:
    factors = np.ones(5000)
    factors[3333] = 0.25
    steps = table(np.arange(5000), clip_factor__a=factors)
    panel = heat_map(PANEL, Readings({"steps": steps}, []), "steps", "clip_factor", CLIP_HEAT)
    assert panel.figure is not None
    (cells,) = panel.figure.data
    assert cells.z.shape == (1, CELLS)
    assert len(cells.x) == CELLS + 1
    place = int(cells.z[0].argmin())
    assert cells.z[0][place] == 0.25
    assert cells.x[place] <= 3333 < cells.x[place + 1]


def test_a_map_of_many_layers_shows_those_that_went_furthest_in_order() -> None:
    count = ROWS + 30
    factors = {f"clip_factor__layer_{i}": [1.0, 1.0 if i % 2 else 0.001 + i / count] for i in range(count)}
    readings = Readings({"steps": table([1, 2], **factors)}, [])
    panel = heat_map(PANEL, readings, "steps", "clip_factor", CLIP_HEAT)
    assert panel.figure is not None
    shown = [int(name.partition("_")[2]) for name in panel.figure.data[0].y]
    assert len(shown) == ROWS
    assert shown == sorted(shown)
    assert set(shown) >= set(range(0, count, 2))
    assert panel.how.endswith(f"Shown are the {ROWS} of {count} that went furthest; no other went below 1.")


def test_of_many_updates_those_are_shown_that_left_their_own_level() -> None:
    """Not the biases, whose updates are large beside their weights throughout."""
    count = ROWS + 30
    moved = {f"update_over_weight__layer_{i}.bias": np.full(40, 0.1) for i in range(count - 1)}
    moved["update_over_weight__top.weight"] = np.where(np.arange(40) == 30, 0.02, 0.001)
    panel = heat_map(
        PANEL, Readings({"dynamics": table(np.arange(40), **moved)}, []), "dynamics", "update_over_weight", UPDATE_HEAT
    )
    assert panel.figure is not None
    assert "top.weight" in panel.figure.data[0].y
    assert "no other went above 1 times its own median." in panel.how


def test_readings_that_are_rarer_than_their_table_are_joined() -> None:
    ranks = np.full(40, np.nan)
    ranks[::10] = [9.0, 8.0, 7.0, 6.0]
    dynamics = table(
        np.arange(40), effective_rank__item=ranks, saturated_frac__click=np.where(np.arange(40) == 7, np.nan, 1)
    )
    found = panels(Readings({"dynamics": dynamics}, ["click"]))
    np.testing.assert_array_equal(lines(found["ranks"])["item"].y, [9, 8, 7, 6])
    np.testing.assert_array_equal(lines(found["ranks"])["item"].x, [0, 10, 20, 30])
    assert np.isnan(lines(found["saturation"])["click"].y[7])  # a gap stays a gap


def test_rows_of_one_step_are_merged() -> None:
    merged = merge_steps(table([10, 10, 20], a__x=[1, np.nan, 3], a__y=[np.nan, np.inf, np.nan]))
    np.testing.assert_array_equal(merged["step"], [10, 20])
    np.testing.assert_array_equal(merged["a/x"], [1, 3])
    np.testing.assert_array_equal(merged["a/y"], [np.inf, np.nan])


def test_the_last_readings_of_the_tables() -> None:
    found = {row["name"]: row for row in last_of_tables(Readings(make_tables(steps=400), TASKS))}
    assert list(found) == list(EMBEDDINGS)
    assert found["user"]["row_norm_max"] == pytest.approx(2.5)
    assert found["user"]["row_norm_max_age_steps"] == 40
    assert last_of_tables(Readings({}, TASKS)) == []


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(width=32), min_size=1, max_size=300), st.integers(2, 50))
def test_thinning_keeps_the_extremes(values: list[float], limit: int) -> None:
    numbers = np.array(values)
    kept = thin(numbers, limit)
    assert len(kept) <= max(limit, 1)
    assert (np.diff(kept) > 0).all()
    finite = numbers[np.isfinite(numbers)]
    if len(finite):
        shown = numbers[kept][np.isfinite(numbers[kept])]
        assert shown.min() == finite.min()
        assert shown.max() == finite.max()


@given(st.text(min_size=1, max_size=80), st.integers(2, 40))
def test_a_shortened_name_fits(name: str, limit: int) -> None:
    assert len(shorten(name, limit)) <= limit
