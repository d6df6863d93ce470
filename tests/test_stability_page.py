"""docs/stability.md: its tables and judgments from made-up results, and the page itself from the committed ones."""

import doctest
import importlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from steadyrank.ladder.outcomes import Outcome, write_outcomes
from steadyrank.ladder.scores import Ratio, Score, score_ladder

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "stability"
FULL, NEVER = "full_divergence", "never_learned"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def cell(optimizer: str, rate: float, seed: int, auc: float, verdict: str = "healthy", **more: Any) -> Outcome:
    scores = {"click": auc + 0.001 * seed, "watch": 0.95}
    plain = {"family": optimizer, "model": "large_dcn", "incident": "", "status": "finished", "moved": 0.01}
    plain |= {"steps": 500, "rows": 128_000, "seconds": 10.0, "cell": f"{optimizer}-{rate:g}-s{seed}", "loss": 0.9}
    plain |= {"kinds": {"click": "binary", "watch": "regression"}, "valid": scores, "test": scores}
    verdicts = {"click": verdict, "watch": verdict}
    return Outcome(optimizer=optimizer, rate=rate, seed=seed, verdicts=verdicts, **plain | more)


def climb(optimizer: str, aucs: dict[float, float], seeds: int = 3, worst: str = FULL, **more: Any) -> list[Outcome]:
    """One setting's ladder; an AUC of .5 stands for a run with the worst verdict."""
    return [
        cell(optimizer, rate, seed, auc, worst if auc <= 0.5 else "healthy", **more)
        for rate, auc in aucs.items()
        for seed in range(seeds)
    ]


MADE_UP = [
    *climb("adagrad", {0.0125: 0.62, 0.025: 0.60, 0.05: 0.5}),
    *climb("gc", {0.1: 0.63, 0.2: 0.64, 0.4: 0.5}),
    *climb("agc", {0.1: 0.62, 0.2: 0.635, 0.4: 0.60}),
    *climb("lamb", {0.01: 0.61, 0.02: 0.5}),
    *climb("clippy", {0.2: 0.645, 0.4: 0.65, 0.8: 0.648, 1.6: 0.5}),
    *climb("clippy_tight", {0.2: 0.645, 0.4: 0.65, 0.8: 0.649, 1.6: 0.647}),
    *climb("adam", {0.001: 0.64, 0.002: 0.655, 0.004: 0.65, 0.008: 0.5}, worst=NEVER),
    *climb("agc_adam", {0.001: 0.64, 0.002: 0.655, 0.004: 0.5}),
    *climb("clippy_adam", {0.002: 0.655, 0.008: 0.66, 0.032: 0.659, 0.128: 0.655}),
]


def write(folder: Path, name: str, outcomes: Iterable[Outcome]) -> None:
    write_outcomes(folder / f"{name}.csv", list(outcomes))
    facts = {"machine": "x86_64, 2 cores", "date": "2026-11-26", "torch": "2.9", "commit": "0123456789abcdef"}
    (folder / f"{name}.json").write_text(json.dumps(facts | {"cells": 99, "overrides": ["ladder.seeds=3"]}))


@pytest.fixture
def study(load: Any, tmp_path: Path) -> Any:
    write(tmp_path, "paper_large_dcn", MADE_UP)
    return load("results").Study(tmp_path)


def one(outcomes: list[Outcome]) -> Score:
    (found,) = score_ladder(outcomes)
    return found


@pytest.mark.parametrize("name", ["ablation", "claims", "dynamics", "pictures", "results", "table2", "tables"])
def test_the_examples_run(load: Any, name: str) -> None:
    assert doctest.testmod(load(name)).failed == 0


def test_fishers_test_is_scipys(load: Any) -> None:
    fisher = load("ablation").fisher_exact
    for hits, tried, other, other_tried in (
        (10, 10, 3, 10),
        (0, 10, 10, 10),
        (5, 10, 5, 10),
        (7, 10, 9, 10),
        (1, 3, 5, 5),
    ):
        table = [[hits, tried - hits], [other, other_tried - other]]
        assert fisher(hits, tried, other, other_tried) == pytest.approx(stats.fisher_exact(table).pvalue, abs=1e-12)


def test_an_arm_collapses_against_clippy_on_its_own_seed(load: Any) -> None:
    plain = [cell("adagrad", 0.05, s, auc, model="as_is") for s, auc in enumerate((0.54, 0.56, 0.5))]
    plain[2] = cell("adagrad", 0.05, 2, 0.5, FULL, model="as_is")
    clippy = [cell("clippy", 0.05, s, 0.6 + (s == 1) * 0.01, model="as_is") for s in range(3)]
    result = load("results").Result("ablation", [*plain, *clippy], {})
    (arm,) = load("ablation").read_arms(result)
    # .54 keeps .04 of .1, less than half; .561 keeps .061 of .111
    assert (arm.unstable, arm.diverged, arm.never_learned, arm.collapsed, arm.clippy) == (2, 1, 0, 1, 0)
    (row,) = load("ablation").arm_rows([arm])
    assert row[:4] == ["as it is", "2 of 3", "9 to 99 %", "1 / 0 / 1"]


def test_an_aim_is_judged_by_the_whole_interval(load: Any) -> None:
    judge = load("claims").judge
    known = {"seeds": 5, "at_least": False, "at_most": False}
    assert judge(Ratio(16.0, 9.0, 25.0, **known), 8.0) == "reached"
    assert judge(Ratio(4.0, 3.0, 6.0, **known), 8.0) == "not reached"
    assert judge(Ratio(9.0, 6.0, 13.0, **known), 8.0) == "not shown"
    assert judge(Ratio(4.0, 3.0, 6.0, **known | {"at_least": True}), 8.0) == "not shown: the ladder ended"
    assert judge(Ratio(16.0, 9.0, 25.0, **known | {"at_most": True}), 8.0) == "not shown: the ladder ended"
    assert judge(Ratio(16.0, math.nan, math.nan, **known), 8.0) == "not shown"
    assert judge(Ratio(math.nan, math.nan, math.nan, **known), 8.0) == "not known"


def test_rungs_bound_a_ratio_from_both_sides(load: Any) -> None:
    ours, theirs = one(climb("clippy", {0.4: 0.65, 1.6: 0.64, 6.4: 0.5})), one(climb("adagrad", {0.1: 0.6, 0.2: 0.5}))
    assert load("claims").between_rungs(ours, theirs) == pytest.approx((1.6 / 0.2, 6.4 / 0.1))
    endless = one(climb("clippy", {0.4: 0.65, 1.6: 0.64}))
    assert load("claims").between_rungs(endless, theirs)[1] == math.inf
    assert load("claims").between_rungs(ours, endless) == (0.0, pytest.approx(6.4 / 1.6))


def test_what_is_said_in_short_follows_from_the_numbers(load: Any, study: Any) -> None:
    claims = load("claims")
    paper, tight, adam = claims.aims(study)
    assert paper.startswith("**Clippy (0.5, 0.01):** 32× the rate of Adagrad: 8× is reached; 4× the rate of GC")
    assert "the rival that learns best: 4× is reached" in paper
    assert tight.startswith("**Clippy (0.1, 0.001):** ≥64× the rate of Adagrad: 8× is reached; ≥8× the rate of GC")
    assert adam.startswith("**Clippy on Adam (0.1, 0.001):** ≥32× the rate of Adam: 8× is reached")
    assert "? (both ladders end) the rate of AGC, the rival that lasts longest" in tight
    told = "\n".join(claims.qualities(study))
    assert "Clippy (0.5, 0.01):** better than Adagrad by .0300" in told
    assert claims.choose_default(study).name == "clippy_adam"
    advice = claims.recommend(study)
    assert "on Large+DCN it is nowhere behind" in advice[0]
    assert "span a factor of at least 64." in advice[0]
    assert "any rate from 0.002 to 0.128" in advice[1]
    assert len(advice) == 2  # no thresholds and no warm-up were run


def test_a_worse_result_turns_the_claims_around(load: Any, tmp_path: Path) -> None:
    weak = [o for o in MADE_UP if o.optimizer not in ("clippy", "clippy_adam")]
    weak += climb("clippy", {0.0125: 0.58, 0.025: 0.5}) + climb("clippy_adam", {0.001: 0.6, 0.002: 0.5})
    write(tmp_path, "paper_large_dcn", weak)
    study = load("results").Study(tmp_path)
    paper, *_ = load("claims").aims(study)
    assert "0.5× the rate of Adagrad: 8× is not reached" in paper
    assert "worse than Adagrad by .0400" in "\n".join(load("claims").qualities(study))
    assert load("claims").choose_default(study).name == "clippy_tight"


def test_the_papers_words_are_held_against_the_runs(load: Any, study: Any) -> None:
    table2 = load("table2")
    scores = {name: study.of_model("large_dcn", name) for name in table2.SHOWN if study.of_model("large_dcn", name)}
    found = {name: [c.holds for c in table2.check(name, "large_dcn", scores)] for name in table2.PAPERS}
    assert found == {
        "adagrad": [True],  # all diverge at .05, the rung next to Clippy's .4
        "gc": [True, True],
        "agc": [False],  # its spread is Clippy's
        "lamb": [True, True],
        "clippy": [True, True, True, True, True],
    }
    assert [c.holds for c in table2.check("agc", "large", scores)] == [True, True]
    assert [c.holds for c in table2.check("clippy", "small", scores)] == [True, True]
    assert table2.check("adam", "large", scores) == []
    rows = table2.model_table(study, "large_dcn").splitlines()
    assert rows[2].startswith("| Adagrad | 0.0125 | .6210 ± .0010 | .950 | 0 / 0 / 0 of 3 | 0.025 | .6010 ± .0010 |")
    assert "| diverged | **yes**; seen: unstable at 0.05" in rows[2]
    coarse = {**scores, "gc": one(climb("gc", {0.2: 0.65, 0.8: 0.5}))}
    (at_double,) = table2.check("gc", "large", coarse)
    assert at_double == ("fine at 2x", None)  # the next rate is four times as high
    assert table2.tell_checks([at_double]) == "our ladder cannot say: fine at 2x"


def test_notes_are_shown_only_where_the_papers_words_do_not_hold(
    load: Any, study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    table2 = load("table2")
    monkeypatch.setitem(table2.NOTES, ("agc", "large_dcn"), "because.")
    monkeypatch.setitem(table2.NOTES, ("gc", "large_dcn"), "stale.")
    assert table2.notes_on(study, "large_dcn") == ["AGC on Large+DCN: because."]


def test_settings_are_compared_at_the_rates_that_both_have(load: Any) -> None:
    ours = one(climb("adam_layer_norm", {0.004: 0.66, 0.016: 0.64, 0.064: 0.6}))
    base = one(climb("adam", {0.002: 0.65, 0.004: 0.65, 0.016: 0.6}, seeds=2))
    gap, rates = load("claims").across_rates(ours, base)
    assert rates == [0.004, 0.016]
    assert gap == pytest.approx((0.025, 0.025, 0.025))  # the mean of .01 and .04, alike in both seeds
    row = load("tables")._modern_row(ours, base)
    assert row[1:6] == [".6610 ± .0010 at 0.004", "+.0100±.0000", "0.004, 0.016", "+.0250±.0000", "0 of 4, 0 of 4"]


def test_one_rate_for_all_is_the_overlap_of_the_ranges(load: Any) -> None:
    common = load("claims").common_range
    wide, narrow = one(climb("a", {1.0: 0.65, 2.0: 0.65, 4.0: 0.65})), one(climb("b", {2.0: 0.65, 8.0: 0.6}))
    found = common([wide, narrow])
    assert (found.low, found.high, found.high_censored) == (2.0, 2.0, False)
    assert common([one(climb("c", {1.0: 0.65, 2.0: 0.6})), narrow]) is None
    assert common([]) is None


def test_a_page_of_nothing_says_what_to_run(load: Any, tmp_path: Path) -> None:
    text, pictures = load("page").make_page(load("results").Study(tmp_path))
    assert pictures == []
    for name in load("results").LADDERS:
        assert f"paper.py --only {name}" in text
    assert "nan" not in text


def test_a_whole_page_has_every_section(load: Any, tmp_path: Path) -> None:
    few = [o for o in MADE_UP if "adam" in o.optimizer]
    write(tmp_path, "paper_large_dcn", MADE_UP)
    for model in ("large", "small"):
        write(tmp_path, f"paper_{model}", [_moved_to(o, model) for o in few])
    write(tmp_path, "modern", [*climb("adam_warmup_50", {0.004: 0.66}), *climb("ada_gc", {0.002: 0.65, 0.008: 0.5})])
    write(tmp_path, "thresholds", climb("abs 0.01", {0.008: 0.6, 0.032: 0.5}))
    write(tmp_path, "tune", climb("gc 0.1", {0.1: 0.6}) + climb("gc 0.01", {1.0: 0.61}))
    write(tmp_path, "incidents", [_moved_to(o, "large_dcn", "shift") for o in few])
    write(
        tmp_path, "bound", climb("adam", {0.002: 0.6}, model="long") + climb("clippy_adam", {0.002: 0.61}, model="long")
    )
    write(
        tmp_path, "ablation", climb("adagrad", {0.05: 0.5}, model="as_is") + climb("clippy", {0.05: 0.6}, model="as_is")
    )
    for log in load("results").LOGS:
        write(tmp_path, log, [_moved_to(o, "") for o in few])
    figures(tmp_path)
    text, pictures = load("page").make_page(load("results").Study(tmp_path))
    assert "Not run yet" not in text
    assert " nan" not in text.replace("nan of", "")
    assert "99 cells" in text
    assert "commit 0123456789; set by the tuning: `ladder.seeds=3`" in text
    assert "| Adam, no incident | 0.001 | click, long_view |  |  |  |" in text
    assert "most clipped first: `trunk.0` 0.38, `trunk.1` 1." in text
    assert "50 steps of it on plain Adam at 0.004: better than none by .0100" in text
    assert [picture.name for picture in pictures] == [
        *("large_dcn_adagrad", "large_dcn_adam", "large_dcn_moved"),
        *("large_adam", "large_moved", "small_adam", "small_moved"),
        *("runs", "layer", "factors", "kuairand", "online_retail", "flights"),
    ]
    for picture in pictures:
        assert f"](stability/{picture.name}.png)" in text
    assert all(picture.draw() is not None for picture in pictures if picture.name in ("runs", "layer", "factors"))
    named = [trace.name for trace in pictures[1].draw().data]
    assert "Clippy on Adam (0.1, 0.001)" in named


def _moved_to(outcome: Outcome, model: str, incident: str = "") -> Outcome:
    return Outcome(**{**vars(outcome), "model": model, "incident": incident})


def figures(folder: Path) -> None:
    """Write the series of single runs, a few points each."""
    runs = ("healthy", "micro", "full", "clippy")
    for name in ("loss", "auc"):
        lines = [f"{run},{step},0.{step}" for run in runs for step in (20, 40)]
        (folder / f"figure_{name}.csv").write_text("\n".join([f"run,step,{name}", *lines]))
    head = "run,optimizer,rate,healthy,micro_divergence,full_divergence,never_learned"
    (folder / "figure_runs.csv").write_text(
        f"{head}\nhealthy,adam,0.001,click long_view,,,\nfull,adam,0.008,,click,rating,\n"
    )
    areas = "gradient_norm,gradient_over_weight,direction_max,factor_gc,factor_agc,factor_lamb,factor_clippy"
    (folder / "figure_layer.csv").write_text(f"run,step,{areas}\nfull,5,1,2,3,1,1,1,0.5\nfull,10,9,9,,1,1,1,0.1\n")
    (folder / "figure_factors.csv").write_text("layer,step,factor\ntrunk.0,50,0.5\ntrunk.0,100,0.25\ntrunk.1,50,1\n")


def test_series_of_single_runs(load: Any, tmp_path: Path) -> None:
    dynamics, pictures = load("dynamics"), load("pictures")
    steps = {
        "step": np.arange(5, 105, 5),
        "loss/click": np.arange(20.0),
        "clip_factor/trunk.layers.linear_1.weight": np.ones(20),
    }
    points = list(dynamics.loss_points(steps))
    assert points[0] == (20, 1.5)  # the mean of 0, 1, 2, 3
    assert len(points) == 5
    halves = {f"clip_factor/towers.{task}.output.weight": np.full(20, of) for task, of in (("a", 0.2), ("b", 0.4))}
    found = list(dynamics.factor_points({**steps, **halves}))
    assert found[:2] == [("trunk 1", 50, 1.0), ("trunk 1", 100, 1.0)]
    assert found[2:] == [("towers", 50, pytest.approx(0.3)), ("towers", 100, pytest.approx(0.3))]
    looks = {"step": np.array([5, 10, 15]), "weight_norm/trunk.a.weight": np.ones(3)}
    looks |= {f"{area}/trunk.a.weight": np.array([1.0, math.nan, 3.0]) for area in dynamics.AREAS}
    layer = list(dynamics.layer_points(looks))
    assert layer == [(5, *[1.0] * 7), (15, *[3.0] * 7)]
    (tmp_path / "layer.csv").write_text(
        dynamics.to_text(["run", "step", *dynamics.AREAS], [("full", *p) for p in layer])
    )
    read = pictures.read_series(tmp_path / "layer.csv", "run")
    assert read["full"]["factor_lamb"].tolist() == [1.0, 3.0]
    assert pictures.read_series(tmp_path / "none.csv", "run") == {}


def test_the_page_is_what_the_committed_results_make(load: Any) -> None:
    results = load("results")
    if not any((FOLDER / f"{name}.csv").exists() for name in results.LADDERS):
        pytest.skip("no results are committed yet: python benchmarks/stability/paper.py --write")
    text, pictures = load("page").make_page(results.Study(FOLDER))
    assert (ROOT / "docs" / "stability.md").read_text() == text, "run: python benchmarks/stability/page.py"
    missing = [
        picture.name for picture in pictures if not (ROOT / "docs" / "stability" / f"{picture.name}.png").exists()
    ]
    assert not missing, f"no pictures of {missing}; run: python benchmarks/stability/page.py"
