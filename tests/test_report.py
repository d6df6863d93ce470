"""The report: one page that needs no network, trusts no name, and says what it does not draw."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steadyrank.errors import CheckpointError
from steadyrank.report import compare, write_report
from steadyrank.report.figures import PALETTE, Panel, Readings, draw, find_tasks, thin
from steadyrank.report.page import task_sentence
from steadyrank.runs import RunFolder

SCRIPT = "<script>alert(1)</script>"
IMAGE = '<img src=x onerror="document.documentElement.dataset.pwned=1">'
HOSTILE = (SCRIPT, IMAGE, "</script><!--", "{{ 7 * 7 }} %{x} \u2028 '\"`")


def fill(run: RunFolder, binary: str = "click", regression: str = "watch", parameter: str = "cross.weight") -> None:
    """Write a small run with everything in it: 30 steps, 6 windows."""
    for step in range(1, 31):
        loss = math.inf if step == 12 else 1 / step
        factor = 0.001 if step == 12 else 1 - 0.01 * step
        row = {"loss/total": 2 * loss, f"loss/{binary}": loss, f"loss/{regression}": loss, "speed/rows_per_s": 1000.0}
        run.append("steps", step, row | {f"clip_factor/{parameter}": factor, "clip_factor/tower.bias": 1.0})
        if step % 5 == 0:
            row = {f"auc/{binary}": 0.6 + step / 300, f"baseline_auc/{binary}": 0.61, f"attainable_auc/{binary}": 0.75}
            row |= {f"normalised_entropy/{binary}": 0.9, f"calibration/{binary}": 1.1}
            row |= {
                f"rmse/{regression}": 2.0,
                f"normalised_rmse/{regression}": 0.8,
                f"baseline_rmse/{regression}": 2.25,
            }
            run.append("windows", step, row | {"log/rows": 100.0 * step, "log/time_s": 1.7e9 + step})


def summary(binary: str = "click", regression: str = "watch", name: str = "demo") -> dict[str, Any]:
    return {
        "name": name,
        "status": "diverged",
        "message": f"the loss of {binary} is inf",
        "steps": 30,
        "rows": 3000,
        "seconds": 4000.0,
        "rows_per_s": 1000.0,
        "parameters": {"dense": 12345, "embedding": 10},
        "optimizer": {"dense": "clippy", "tables": "adagrad"},
        "first_time_s": 0.0,
        "last_time_s": 86400.0,
        "missing": {binary: {"null": 3, "non_finite": 1}},
        "tasks": {
            binary: {
                "kind": "binary",
                "run": {"auc": 0.7, "normalised_entropy": 0.9, "gauc": math.nan},
                "last_day": {"auc": 0.72},
                "baseline": {"feature": "item", "auc": 0.65},
                "attainable": {"auc": 0.75},
            },
            regression: {
                "kind": "regression",
                "run": {"rmse": 2.5, "normalised_rmse": 1.1},
                "last_day": {"rmse": 2.0},
                "baseline": {"feature": "global", "rmse": 2.25},
            },
        },
    }


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder.create(tmp_path / "run")
    fill(run)
    run.write_summary(summary())
    run.write_config("[optimizer]\nname = 'clippy'\n")
    run.event(12, "bad_step", "the loss was inf", task="click", loss=math.inf)
    return run


class Page(HTMLParser):
    """The page as a browser reads it: its tags with attributes, and its visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = False
        self.feed(path.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")
        self.text += " " if tag == "br" else ""

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else data


def panels(run: RunFolder) -> dict[str, Panel]:
    steps, windows = run.readings("steps"), run.readings("windows")
    return {p.key: p for p in draw(Readings(steps, windows, find_tasks(steps, windows)))}


def test_the_page_is_self_contained(run: RunFolder) -> None:
    path = write_report(run)
    assert path == run.path / "report.html"
    page = Page(path)
    links = [v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href", "srcset", "data")]
    assert links == []
    assert not re.search(r"@import|url\(", path.read_text())
    assert path.stat().st_size < 3_000_000


def test_the_page_says_what_came_out(run: RunFolder) -> None:
    text = Page(write_report(run)).text
    for expected in (
        "demo",
        "Diverged: training left the finite numbers.",
        "the loss of click is inf",
        "AUC 0.7000 over the run; ✓ beats the running mean by item by 0.0500.",
        "RMSE 2.500 over the run, 1.100 of a constant's; ✗ does not beat the running mean of all rows, by 0.2500.",
        "1 h 6 min",
        "1970-01-02 00:00 UTC",
        "12,345",
        "80%",  # (0.7 - 0.5) / (0.75 - 0.5)
        "not finite",
        "the loss was inf task = click, loss = inf",
        "0.13%",  # 4 missing of 3000 rows
        "name = 'clippy'",
        "cpu_count",
    ):
        assert expected in text


def test_columns_that_no_task_fills_are_left_out(run: RunFolder) -> None:
    found = summary()
    del found["tasks"]["click"]["attainable"]
    run.write_summary(found)
    text = Page(write_report(run)).text
    assert "Attainable" not in text
    assert "Baseline" in text


def test_a_run_that_was_killed_has_a_report_too(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "killed")
    text = Page(write_report(tmp_path / "killed")).text
    assert "No summary yet" in text
    assert "Not drawn" in text
    fill(run)
    run.flush()
    text = Page(write_report(tmp_path / "killed")).text
    assert "Training loss" in text
    assert "Not drawn" not in text


def test_no_report_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def hostile_run(path: Path) -> RunFolder:
    """A run in which every name and message tries to break out of its place."""
    run = RunFolder.create(path)
    everything = "".join(HOSTILE)
    fill(run, binary=everything, regression=f"b{everything}", parameter=f"a{everything}")
    run.write_summary(summary(everything, f"b{everything}", everything))
    run.write_config(f"name = '{everything}'\n")
    run.event(3, everything, everything, **{everything: everything})
    return run


def test_names_are_escaped(tmp_path: Path) -> None:
    path = write_report(hostile_run(tmp_path / "run"))
    page = Page(path)
    own = [tag for tag, _ in page.tags if tag == "script"]
    assert len(own) == 4
    assert "img" not in {tag for tag, _ in page.tags}
    assert SCRIPT in page.text
    assert "{{ 7 * 7 }}" in page.text
    source = path.read_text(encoding="utf-8")
    assert SCRIPT not in source
    assert "<img" not in source
    data = re.search(r'id="figure-data">(.*?)</script>', source, re.DOTALL)
    assert data is not None
    names = [trace.get("name") for trace in json.loads(data[1])["auc"]["data"]]
    # plotly reads tags in its texts, so its JSON holds entities, and no tag of ours
    assert any("&lt;script&gt;alert(1)&lt;/script&gt;" in name for name in names)


def test_a_figure_without_readings_skips_itself_and_says_so(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.append("steps", 1, {"loss/total": 1.0, "loss/click": 1.0})
    run.append("steps", 2, {"loss/total": math.nan, "loss/click": math.nan})
    found = panels(run)
    assert {key for key, panel in found.items() if panel.figure is not None} == {"loss"}
    assert found["auc"].missing.startswith("the table windows has no rows")
    assert found["clip"].missing.startswith("no reading clip_factor in the table steps")
    text = Page(write_report(run)).text
    assert "Clip factors: no reading clip_factor in the table steps (the optimizer clips nothing)." in text


def test_a_column_without_a_finite_value_is_no_figure(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    everything = ("auc/a", "rmse/b", "normalised_rmse/b", "normalised_entropy/a", "calibration/a")
    run.append("windows", 1, dict.fromkeys(everything, math.nan))
    run.append("steps", 1, dict.fromkeys(("loss/total", "loss/a", "clip_factor/w", "speed/rows_per_s"), math.inf))
    assert all(panel.figure is None and panel.missing for panel in panels(run).values())


def test_auc_is_drawn_with_baseline_and_attainable(run: RunFolder) -> None:
    figure = panels(run)["auc"].figure
    assert figure is not None
    lines = {trace.name: trace for trace in figure.data}
    np.testing.assert_allclose(lines["click"].y, 0.6 + np.arange(5, 31, 5) / 300)
    np.testing.assert_array_equal(lines["click"].x, np.arange(5, 31, 5))
    assert lines["click, baseline"].line.dash == "dash"
    assert lines["click, attainable"].line.dash == "dot"
    assert set(lines["click, attainable"].y) == {0.75}
    assert "500 rows, log time 2023-11-14 22:13" in lines["click"].customdata[0]


def test_the_baseline_of_a_regression_is_normalised_alike(run: RunFolder) -> None:
    figure = panels(run)["error"].figure
    assert figure is not None
    lines = {trace.name: trace for trace in figure.data}
    np.testing.assert_allclose(lines["watch"].y, 0.8)
    np.testing.assert_allclose(lines["watch, baseline"].y, 2.25 / (2.0 / 0.8))  # over the constant's RMSE, 2 / 0.8


def test_a_task_keeps_its_colour(run: RunFolder) -> None:
    found = panels(run)
    colours: dict[str, set[str]] = {"click": set(), "watch": set()}
    for key in ("auc", "error", "loss", "entropy", "calibration"):
        figure = found[key].figure
        assert figure is not None
        for trace in figure.data:
            if trace.name in colours:
                colours[trace.name].add(trace.line.color)
    assert colours == {"click": {PALETTE[0]}, "watch": {PALETTE[1]}}


def test_a_loss_that_is_not_finite_is_marked(run: RunFolder) -> None:
    figure = panels(run)["loss"].figure
    assert figure is not None
    lines = {trace.name: trace for trace in figure.data}
    np.testing.assert_array_equal(lines["not finite"].x, [12])
    assert math.isnan(lines["total"].y[11])
    assert figure.layout.yaxis.type == "log"  # from 2 to 1/30


def test_clip_factors_by_step_and_by_parameter(run: RunFolder) -> None:
    found = panels(run)
    figure = found["clip"].figure
    assert figure is not None
    lines = {trace.name: trace for trace in figure.data}
    np.testing.assert_allclose(lines["minimum"].y[[0, 11]], [0.99, 0.001])
    np.testing.assert_allclose(lines["median"].y[0], (0.99 + 1) / 2)
    figure = found["clip_map"].figure
    assert figure is not None
    (cells,) = figure.data
    assert list(cells.y) == ["cross.weight", "tower.bias"]
    np.testing.assert_allclose(cells.z[0][11], -3)  # on a log scale, as it spans a factor of 1000
    np.testing.assert_allclose(cells.z[1], 0)


def test_events_stand_as_lines_in_every_figure(run: RunFolder) -> None:
    steps, windows = run.readings("steps"), run.readings("windows")
    for panel in draw(Readings(steps, windows, ["click", "watch"]), events=[12, 12, 20]):
        assert panel.figure is not None
        assert [s.x0 for s in panel.figure.layout.shapes if s.yref == "paper"] == [12, 20]


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


def test_sentences_of_what_cannot_be_said() -> None:
    nothing = {"kind": "binary", "run": {"auc": math.nan}, "baseline": {"feature": "item", "auc": 0.6}}
    assert task_sentence("a", nothing).mark == "bad"
    assert task_sentence("a", {"kind": "binary", "run": {"auc": 0.6}}).verdict == "no baseline to compare with"


def test_compare_puts_runs_in_rows_with_the_same_columns(run: RunFolder, tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "killed")
    first, second = compare([run, tmp_path / "killed"])
    assert first == {
        "run": "run",
        "optimizer": "clippy",
        "status": "diverged",
        "rows": 3000,
        "AUC click": 0.7,
        "NRMSE watch": 1.1,
        "rows per second": 1000.0,
    }
    assert list(second) == list(first)
    assert (second["run"], second["status"], second["AUC click"]) == ("killed", "unfinished", None)


def browse(path: Path, profile: Path) -> str:
    """Open a page in headless Chromium and return the document as it stands then."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium on PATH")
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage"]
    flags = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    done = subprocess.run(
        [chromium, *flags, f"--user-data-dir={profile}", "--virtual-time-budget=8000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_the_page_draws_in_a_browser_without_a_script_error(tmp_path: Path) -> None:
    """And no name in it is executed, in the tables or in plotly's own texts."""
    document = browse(write_report(hostile_run(tmp_path / "run")), tmp_path / "profile")
    root = re.search(r"<html[^>]*>", document)
    assert root is not None
    assert "data-script-error" not in root[0]
    assert 'data-figures-drawn="true"' in root[0]
    assert "data-pwned" not in root[0]
    assert document.count('<svg class="main-svg"') >= 8
    assert 'class="js-line"' in document
    assert "alert(1)" in document
