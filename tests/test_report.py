"""The report: one page that needs no network, trusts no name, and says what it does not draw."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from steadyrank.errors import CheckpointError
from steadyrank.report import write_report
from steadyrank.report.words import task_sentence, verdict_words
from steadyrank.runs import RunFolder

from .report_pages import Page, browse
from .report_runs import BLAMED, Tables, make_events, make_summary, make_tables, old_summary, write_old_run, write_run

SCRIPT = "<script>alert(1)</script>"
IMAGE = '<img src=x onerror="document.documentElement.dataset.pwned=1">'
HOSTILE = "".join((SCRIPT, IMAGE, "</script><!--", "{{ 7 * 7 }} %{x} \u2028 '\"`"))


@pytest.fixture
def old(tmp_path: Path) -> RunFolder:
    run = write_old_run(tmp_path / "run")
    run.write_summary(old_summary())
    run.write_config("[optimizer]\nname = 'clippy'\n")
    run.event(12, "bad_step", "the loss was inf", task="click", loss=math.inf)
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(write_run(tmp_path_factory.mktemp("runs") / "eventful", make_tables())))


def test_the_page_is_self_contained(page: Page) -> None:
    assert page.links() == []
    assert not re.search(r"@import|url\(", page.source)


def test_at_the_top_stand_the_verdicts_and_what_happened(page: Page) -> None:
    top = page.text.partition("What was learned")[0]
    for expected in (
        "Of 3 tasks 1 diverged for good, 1 diverged and came back, 1 was healthy.",
        "click Full divergence since step 4,560: normalised entropy 2.1, worse than a constant. AUC 0.7000 over",
        "like Micro-divergence from step 2,400 to 2,800: a window 11 deviations above those before.",
        "watch_time Healthy throughout. RMSE 1.200 over the run, 0.820 of a constant's;",
        "The first warning came at step 2,220, 180 steps before like was first disturbed.",
        "updates grow faster than weights 14 times, the last at step 2,480",
        "step 4560: the gradient of trunk.layers.linear_1.weight is not finite",
        "back to the checkpoint of step 4,000 at half the rate",
    ):
        assert expected in top


def test_causes_are_told_in_words_and_tables(page: Page) -> None:
    told = page.text.partition("What stood behind it")[2].partition("What was learned")[0]
    for expected in (
        "Step 4,560: the largest update left its usual range",
        f"layer: {BLAMED}",
        "lies in: the data",
        "click led: its loss was 38 times its usual one.",
        "a value came up",
        "42% 0.14% 44%",  # now, usually, in the batch's rows
        "Row in the log Loss Gradient Task Unusual in it user item",
        "4600000 41.50 3.200 click item 90 4711",
        "steadyrank replay eventful --step 4560",
        "1 more",
        "Step 4,600: its loss is not finite",
    ):
        assert expected in told
    assert "4600070" not in told  # ten rows of twelve
    assert "note" not in told  # a column without any value


def test_every_figure_says_how_to_read_it(page: Page) -> None:
    figures = page.figures()
    assert len(figures) == 22
    assert "Not drawn" not in page.text
    labels = {a["data-figure"]: a["aria-label"] for tag, a in page.tags if "data-figure" in a}
    assert labels.keys() == figures.keys()
    for label in labels.values():
        title, _, how = (label or "").partition(". ")
        assert title
        assert len(how) > 30


def test_the_page_of_a_run_recorded_before_there_were_instruments(old: RunFolder) -> None:
    path = write_report(old)
    assert path == old.path / "report.html"
    text = Page(path).text
    for expected in (
        "demo",
        "Diverged: training left the finite numbers.",
        "the loss of click is inf",
        "AUC 0.7000 over the run; ✓ beats the running mean by item by 0.0500.",
        "RMSE 2.500 over the run, 1.100 of a constant's; ✗ does not beat the running mean of all rows, by 0.2500.",
        "no verdict",
        "1 h 6 min",
        "1970-01-02 00:00 UTC",
        "12,345",
        "80%",  # (0.7 - 0.5) / (0.75 - 0.5)
        "not finite",
        "the loss was inf task = click, loss = inf",
        "0.13%",  # 4 missing of 3000 rows
        "name = 'clippy'",
        "cpu_count",
        "Update over weight by layer: the table dynamics has no rows.",
        "Headroom: the table curvature has no rows.",
        "One layer around the moment: the table dynamics has no rows.",
    ):
        assert expected in text
    assert "healthy" not in text


def test_columns_that_no_task_fills_are_left_out(old: RunFolder) -> None:
    found = old_summary()
    del found["tasks"]["click"]["attainable"]
    old.write_summary(found)
    text = Page(write_report(old)).text
    assert "Attainable" not in text
    assert "Baseline" in text


def test_a_run_that_was_killed_has_a_report_too(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "empty")
    text = Page(write_report(tmp_path / "empty")).text
    assert "No summary yet" in text
    assert "Not drawn: 22 figures without readings" in text
    assert "No events" in text
    write_old_run(tmp_path / "killed")
    text = Page(write_report(tmp_path / "killed")).text
    assert "Training loss" in text
    assert "Not drawn: 14 figures" in text


def test_a_run_that_was_killed_shows_the_verdicts_of_its_events(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_tables(steps=1000))
    (run.path / "summary.json").unlink()
    page = Page(write_report(run))
    titles = [a.get("title") or "" for tag, a in page.tags if tag == "i"]
    assert titles == ["full divergence, step 760 to the end", "micro-divergence, step 400 to 800"]


def test_many_healthy_tasks_are_folded_away(tmp_path: Path) -> None:
    tasks = tuple(f"task_{i}" for i in range(12))
    run = write_run(tmp_path / "run", make_tables(tasks, steps=400))
    page = Page(write_report(run))
    assert "10 healthy tasks" in page.text
    assert len(page.with_class("results")) == 2
    assert len(page.with_class("band")) == 12 + 2  # the run's own, and the axis


def test_no_report_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def hostile_run(path: Path) -> RunFolder:
    """A run in which every name, message and value tries to break out of its place."""
    tasks = [f"{letter}{HOSTILE}" for letter in "abc"]
    run = write_run(path, make_tables(tasks, [f"{HOSTILE}.weight", f"{HOSTILE}.bias"], steps=600), optimizer="adam")
    run.write_summary(make_summary(HOSTILE, tasks, 600, True, HOSTILE))
    run.write_config(f"name = '{HOSTILE}'\n")
    run.event(3, HOSTILE, HOSTILE, **{HOSTILE: HOSTILE})
    run.event(4, "warning", HOSTILE, level=HOSTILE, task=HOSTILE, layer=HOSTILE, quantities={HOSTILE: HOSTILE})
    cause = {"task": HOSTILE, "layer": {"name": HOSTILE}, "why": HOSTILE, "sentence": HOSTILE, "state_or_data": HOSTILE}
    run.write_cause(1, cause | {"rows": [{HOSTILE: HOSTILE, "columns": {HOSTILE: [HOSTILE]}}]})
    return run


def test_names_are_escaped(tmp_path: Path) -> None:
    page = Page(write_report(hostile_run(tmp_path / "run")))
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert "img" not in {tag for tag, _ in page.tags}
    assert SCRIPT in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert SCRIPT not in page.source
    assert "<img" not in page.source
    # plotly reads tags in its texts, so its JSON holds entities, and no tag of ours
    names = [trace.get("name") for trace in page.figures()["auc"]["data"]]
    assert any("&lt;script&gt;alert(1)&lt;/script&gt;" in name for name in names)
    labels = page.figures()["update_map"]["layout"]["yaxis"]["ticktext"]
    assert not any("<" in label for label in labels)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), pytest.param(500, True, marks=pytest.mark.slow)])
def test_the_page_draws_in_a_browser_without_a_script_error(tmp_path: Path, width: int, dark: bool) -> None:
    """And no name in it is executed, in the tables or in plotly's own texts."""
    document = browse(write_report(hostile_run(tmp_path / "run")), tmp_path / "profile", width=width, dark=dark)
    root = re.search(r"<html[^>]*>", document)
    assert root is not None
    assert "data-script-error" not in root[0]
    assert 'data-figures-drawn="true"' in root[0]
    assert "data-pwned" not in root[0]
    assert document.count('<svg class="main-svg"') >= 22
    assert 'class="js-line"' in document
    assert "alert(1)" in document
    assert document.count('aria-pressed="true"') > 20  # the page's own legends


class Recorded(RunFolder):
    """A run whose readings lie in memory: writing 20,000 rows of 5,000 columns takes longer than reading them."""

    tables: Tables

    def readings(self, table: str) -> dict[str, np.ndarray]:
        return self.tables.get(table, {"step": np.zeros(0, np.int64), "time": np.zeros(0)})


@pytest.mark.slow
def test_a_large_run_makes_a_page_below_5_mb(tmp_path: Path) -> None:
    tasks = tuple(f"task_number_{i}" for i in range(20))
    parts = ("weight", "bias")
    parameters = [f"trunk.experts.{e}.linear_{i}.{part}" for e in range(25) for i in range(4) for part in parts]
    RunFolder.create(tmp_path / "run")
    run = Recorded(tmp_path / "run")
    run.tables = make_tables(tasks, parameters, steps=400_000, dynamics_every=100)
    assert len(run.tables["steps"]["step"]) == 20_000
    for event in make_events(tasks, 400_000):
        run.event(**event)
    run.write_summary(make_summary("large", tasks, 400_000, True, "clippy_adagrad"))
    path = write_report(run)
    assert path.stat().st_size < 5_000_000
    assert len(Page(path).figures()) == 22


def test_sentences_of_what_cannot_be_said() -> None:
    nothing = {"kind": "binary", "run": {"auc": math.nan}, "baseline": {"feature": "item", "auc": 0.6}}
    assert task_sentence("a", nothing).mark == "bad"
    assert task_sentence("a", {"kind": "binary", "run": {"auc": 0.6}}).verdict == "no baseline to compare with"
    assert task_sentence("a", {"kind": "binary", "run": {"auc": 0.6}}).state == ""


@pytest.mark.parametrize(
    ("verdict", "words", "mark"),
    [
        (None, "", ""),
        ({"verdict": "healthy", "since": None, "episodes": []}, "Healthy throughout", "good"),
        ({"verdict": "never_learned"}, "Never learned: never better than a constant", "warn"),
        ({"verdict": "no_verdict"}, "No verdict", ""),
        ({"verdict": "full_divergence", "since": 0}, "Full divergence since step 0", "bad"),
        ({"verdict": "micro_divergence", "since": 5}, "Micro-divergence", "warn"),
        (
            {"verdict": "micro_divergence", "episodes": [{"first": 5, "last": None}]},
            "Micro-divergence from step 5",
            "warn",
        ),
        (
            {"verdict": "micro_divergence", "episodes": [{"first": 1200, "last": 1300}, {"first": 5000, "last": 5100}]},
            "2 micro-divergences, the first at step 1,200",
            "warn",
        ),
        ({"verdict": "something new"}, "something new", ""),
    ],
)
def test_verdicts_in_words(verdict: dict[str, object] | None, words: str, mark: str) -> None:
    assert verdict_words(verdict) == (words, mark)
