"""Several runs side by side: one table, and one page with their curves over one another."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steadyrank.errors import CheckpointError, ConfigError
from steadyrank.report import compare, write_comparison
from steadyrank.report.overlay import draw_runs
from steadyrank.report.plots import PALETTE
from steadyrank.runs import RunFolder

from .report_pages import Page, browse
from .report_runs import TASKS, make_tables, old_summary, write_old_run, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """One that diverges, one that does not, and one without clipping."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / "eventful", make_tables(steps=2000)),
        write_run(folder / "calm", make_tables(steps=2000, eventful=False, seed=1), eventful=False),
        write_run(folder / "adagrad", make_tables(steps=2000, clips=False, seed=2), optimizer="adagrad"),
    ]


def figures(page: Page) -> dict[str, Any]:
    """The figures by what their page calls them."""
    labels = {a["data-figure"]: (a["aria-label"] or "").partition(". ")[0] for _, a in page.tags if "data-figure" in a}
    return {labels[key]: figure for key, figure in page.figures().items()}


def test_runs_stand_in_rows_with_the_same_columns(tmp_path: Path) -> None:
    run = write_old_run(tmp_path / "run")
    run.write_summary(old_summary())
    RunFolder.create(tmp_path / "killed")
    first, second = compare([run, tmp_path / "killed"])
    assert first == {
        "run": "run",
        "optimizer": "clippy",
        "status": "diverged",
        "verdict": None,
        "rows": 3000,
        "AUC click": 0.7,
        "NRMSE watch": 1.1,
        "rows per second": 1000.0,
    }
    assert list(second) == list(first)
    assert (second["run"], second["status"], second["AUC click"]) == ("killed", "unfinished", None)


def test_the_worst_verdict_stands_for_the_run(runs: list[RunFolder]) -> None:
    assert [row["verdict"] for row in compare(runs)] == ["full divergence: click", "healthy", "full divergence: click"]


def test_the_page_of_several_runs(runs: list[RunFolder], tmp_path: Path) -> None:
    path = write_comparison(runs, tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    assert path.stat().st_size < 5_000_000
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    page = Page(path)
    assert page.links() == []
    for expected in (
        "3 runs compared",
        "eventful calm adagrad",
        "Full divergence since step 1,520",
        "Healthy throughout",
        "What differs between them",
        "optimizer.dense.name clippy_adagrad clippy_adagrad adagrad",
        "optimizer.dense.lr 0.1 0.02 0.1",
    ):
        assert expected in page.text
    assert figures(page).keys() == {
        "AUC of click",
        "AUC of like",
        "Normalised entropy of click",
        "Normalised entropy of like",
        "Normalised RMSE of watch_time",
        "Training loss, all tasks",
        "Least clip factor",
        "Update over weight, worst layer",
        "Headroom",
    }


def test_a_run_has_one_colour_in_every_figure(runs: list[RunFolder], tmp_path: Path) -> None:
    page = Page(write_comparison(runs, tmp_path / "page.html"))
    for name, figure in figures(page).items():
        colours = {trace["name"]: trace["line"]["color"] for trace in figure["data"]}
        expected = dict(zip(["eventful", "calm", "adagrad"], PALETTE, strict=False))
        if name == "Least clip factor":
            del expected["adagrad"]  # it clips nothing
        assert colours == expected
    marks = [a["style"] for a in page.with_class("run")]
    assert marks[:3] == [f"background:{colour}" for colour in PALETTE[:3]]


def drawn(runs: dict[str, RunFolder]) -> dict[str, Any]:
    panels = [panel for section in draw_runs(runs) for panel in section.panels]
    return {panel.title: panel.figure for panel in panels if panel.figure is not None}


def test_the_curves_are_those_of_the_runs(runs: list[RunFolder]) -> None:
    found = drawn({"a": runs[0]})
    dynamics, steps = runs[0].readings("dynamics"), runs[0].readings("steps")
    worst = np.max([v for n, v in dynamics.items() if n.startswith("update_over_weight/")], axis=0)
    np.testing.assert_allclose(found["Update over weight, worst layer"].data[0].y, worst, rtol=1e-6)
    least = np.min([v for n, v in steps.items() if n.startswith("clip_factor/")], axis=0)
    np.testing.assert_allclose(found["Least clip factor"].data[0].y, least, rtol=1e-6)
    np.testing.assert_allclose(found["AUC of click"].data[0].y, runs[0].readings("windows")["auc/click"], rtol=1e-6)
    for figure in found.values():
        assert figure.layout.xaxis.range == pytest.approx((0.2, 2019.8))  # from 20 to 2000, and a hundredth of it


def test_runs_with_other_batches_are_compared_by_rows(tmp_path: Path) -> None:
    runs = {}
    for name, batch in (("small", 100.0), ("large", 400.0)):
        runs[name] = RunFolder.create(tmp_path / name)
        for step in (10, 20):
            runs[name].append("windows", step, {"auc/click": 0.6, "log/rows": batch * step})
            runs[name].append("steps", step, {"loss/total": 0.5, "loss/click": 0.5})
    found = drawn(runs)
    assert [list(trace.x) for trace in found["Training loss, all tasks"].data] == [[1000, 2000], [4000, 8000]]
    assert found["AUC of click"].layout.xaxis.title.text == "rows"
    assert list(drawn({"small": runs["small"]})["AUC of click"].data[0].x) == [10, 20]


def test_twelve_runs_can_be_told_apart(runs: list[RunFolder]) -> None:
    traces = drawn({f"run {i}": runs[i % 2] for i in range(12)})["AUC of click"].data
    assert len({(trace.line.color, trace.line.dash) for trace in traces}) == 12


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    paths = [tmp_path / parent / "run" for parent in "ab"]
    for path in paths:
        write_old_run(path)
    text = Page(write_comparison(paths, tmp_path / "page.html")).text
    assert "a/run b/run" in text
    same = Page(write_comparison([paths[0], paths[0]], tmp_path / "page.html")).text
    assert "1: run 2: run" in same


def test_runs_without_readings_have_a_page_too(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "empty")
    text = Page(write_comparison([tmp_path / "empty"], tmp_path / "page.html")).text
    assert "1 run compared" in text
    assert "Training loss, all tasks: no run has readings of it." in text


def test_a_damaged_configuration_hides_no_page(tmp_path: Path) -> None:
    run = write_old_run(tmp_path / "run")
    run.write_config("[optimizer\n")
    assert "What differs" not in Page(write_comparison([run], tmp_path / "page.html")).text


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    run = write_old_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="is no run folder"):
        write_comparison([tmp_path], tmp_path / "page.html")
    with pytest.raises(ConfigError, match="at least one run"):
        write_comparison([], tmp_path / "page.html")
    with pytest.raises(ConfigError, match="choose another --out"):
        write_comparison([run], tmp_path / "nowhere" / "page.html")


def test_the_page_draws_in_a_browser_and_trusts_no_name(tmp_path: Path) -> None:
    hostile = '<img src=x onerror="document.documentElement.dataset.pwned=1">'
    tasks = [*(f"{hostile}{task}" for task in TASKS)]
    run = write_run(tmp_path / "a&b<i>", make_tables(tasks, steps=400))
    run.write_config(f"'{hostile}' = 1\n")
    other = write_old_run(tmp_path / "other")
    path = write_comparison([run, other], tmp_path / "page.html")
    assert "img" not in {tag for tag, _ in Page(path).tags}
    root = re.search(r"<html[^>]*>", browse(path, tmp_path / "profile"))
    assert root is not None
    assert 'data-figures-drawn="true"' in root[0]
    assert "data-script-error" not in root[0]
    assert "data-pwned" not in root[0]
