"""What happened when: bands, marks and events of the page."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steadyrank.report.causes import cause_block, layer_name
from steadyrank.report.timeline import (
    BINS,
    EVERYTHING,
    Episode,
    draw_timeline,
    find_episodes,
    lead_sentence,
    notable_steps,
)
from steadyrank.report.words import fold_events, headline, tell_event

from .report_runs import TASKS, make_causes, make_events, make_summary

EVENTS = make_events(TASKS, 6000)
VERDICTS = {name: task["verdict"] for name, task in make_summary("run", TASKS, 6000, True, "adam")["tasks"].items()}
TOLD = [tell_event(event) for event in EVENTS]


def verdict(step: int, verdict: str, since: int, task: str = "a") -> dict[str, Any]:
    return {"step": step, "kind": "verdict", "task": task, "verdict": verdict, "since": since, "message": ""}


def warning(step: int, level: str = "notice", **what: Any) -> dict[str, Any]:
    return {"step": step, "kind": "warning", "level": level, "message": "it grows", **what}


def test_episodes_come_from_the_verdicts() -> None:
    assert find_episodes(TASKS, VERDICTS, EVENTS) == [
        Episode("click", 4560, None, "full_divergence", "normalised entropy 2.1, worse than a constant"),
        Episode("like", 2400, 2800, "micro_divergence", "a window 11 deviations above those before"),
    ]


def test_of_a_full_divergence_what_came_back_before_was_micro() -> None:
    told = {
        "verdict": "full_divergence",
        "since": 50,
        "episodes": [{"first": 5, "last": 9}, {"first": 50, "last": None}],
    }
    assert [(e.first, e.verdict) for e in find_episodes(["a"], {"a": told}, [])] == [
        (5, "micro_divergence"),
        (50, "full_divergence"),
    ]


@pytest.mark.parametrize("since", [0, 50])
def test_a_verdict_without_episodes_lasts_from_its_step(since: int) -> None:
    told = {"verdict": "full_divergence", "since": since, "episodes": []}
    assert find_episodes(["a"], {"a": told}, []) == [Episode("a", since, None, "full_divergence")]


def test_a_run_that_was_cut_short_has_episodes_from_its_events() -> None:
    events = [
        verdict(60, "micro_divergence", 50),
        verdict(90, "recovered", 50),
        verdict(95, "micro_divergence", 94, task="b"),
        verdict(120, "micro_divergence", 110),
        verdict(150, "full_divergence", 110),
    ]
    assert find_episodes(["a"], {}, events) == [
        Episode("a", 50, 90, "micro_divergence"),
        Episode("a", 110, None, "full_divergence"),
    ]
    assert find_episodes(["a"], {"a": {"verdict": "healthy"}}, events) == []


def test_bands_lie_where_things_happened() -> None:
    line = draw_timeline(TASKS, VERDICTS, find_episodes(TASKS, VERDICTS, EVENTS), TOLD, 6000)
    assert [band.name for band in line.bands] == [EVERYTHING, *TASKS]
    run, click, like, watch = line.bands
    assert (run.mark, click.mark, like.mark, watch.mark) == ("", "good", "good", "good")
    ((part,),) = [click.segments]
    assert (part.left, part.width, part.mark) == (76.0, 24.0, "bad")
    assert part.title == "full divergence, step 4,560 to the end: normalised entropy 2.1, worse than a constant"
    ((part,),) = [like.segments]
    assert (part.left, part.mark) == (40.0, "warn")
    assert part.width == pytest.approx(100 * 400 / 6000, abs=1e-3)
    assert [(m.kind, m.left) for m in click.marks] == [("cause", 76.0)]
    assert [m.kind for m in run.marks] == ["alarm", "bad step", "other"]
    assert watch.marks == []
    assert line.kinds == ["notice", "alarm", "bad step", "cause", "other"]
    assert line.judged
    assert line.ticks[0] == (0.0, "0")
    assert line.ticks[-1] == (100.0, "6,000")


def test_marks_that_would_cover_each_other_are_one() -> None:
    events = [tell_event(warning(step, task="a")) for step in range(0, 1000)]
    (band,) = draw_timeline(["a"], {}, [], events, 1000).bands
    assert len(band.marks) == BINS
    assert band.marks[1].title.startswith("11 times from step 12 to 22; first: it grows")


def test_a_run_without_verdicts_is_neither_healthy_nor_ill() -> None:
    line = draw_timeline(["a", "b"], {"b": {"verdict": "never_learned"}}, [], [], 10)
    assert [band.mark for band in line.bands] == ["", "warn"]
    assert not draw_timeline(["a"], {}, [], [], 0).judged
    assert draw_timeline([], {}, [], [], 0).bands == []


@given(st.integers(0, 10**9), st.lists(st.integers(0, 10**9), max_size=20))
def test_everything_lies_on_the_band(last: int, steps: list[int]) -> None:
    events = [tell_event(warning(step, task="a")) for step in sorted(steps)]
    episodes = [Episode("a", step, None, "full_divergence") for step in steps]
    line = draw_timeline(["a"], {}, episodes, events, last)
    for band in line.bands:
        assert all(0 <= mark.left <= 100 for mark in band.marks)
        assert all(0 <= part.left <= part.left + part.width <= 100.01 for part in band.segments)
        assert len(band.marks) <= BINS + 1
    assert 1 <= len(line.ticks) <= 7
    assert all(0 <= left <= 100 for left, _ in line.ticks)


def test_the_lead_of_the_first_warning() -> None:
    fall = [Episode("click", 960, None, "full_divergence")]
    assert "60 steps before click" in lead_sentence(fall, [warning(900)])
    assert "40 steps after click" in lead_sentence(fall, [warning(1000)])
    assert "just when click" in lead_sentence(fall, [warning(960)])
    assert lead_sentence([], [warning(900)]) == ""
    assert lead_sentence(fall, [verdict(1000, "full_divergence", 960)]) == ""


def test_what_repeats_is_counted_until_the_next_verdict() -> None:
    events = [warning(1, layer="x"), warning(2, layer="y"), warning(3, layer="x"), warning(4, level="alarm", layer="x")]
    folded = fold_events([tell_event(event) for event in [*events, verdict(5, "recovered", 1), warning(6, layer="x")]])
    assert [(e.step, e.last, e.count, e.kind) for e in folded] == [
        (1, 3, 2, "notice"),
        (2, 2, 1, "notice"),
        (4, 4, 1, "alarm"),
        (5, 5, 1, "recovered"),
        (6, 6, 1, "notice"),
    ]


def test_an_event_is_told_with_its_details() -> None:
    told = tell_event(
        {"step": 7, "time": 1.0, "kind": "bad_step", "message": "inf", "task": "a", "loss": "inf", "share": 0.25}
    )
    assert (told.step, told.kind, told.symbol, told.task) == (7, "bad step", "bad step", "a")
    assert told.detail == "task = a, loss = inf, share = 0.2500"
    assert tell_event(warning(1, reason="12 deviations")).message == "it grows: 12 deviations"
    assert tell_event({"step": 1, "kind": "warning", "reason": "12 deviations"}).message == "12 deviations"
    assert tell_event(warning(1, quantities={"x": math.nan, "y": "nan"})).detail == "x = nan, y = nan"
    assert tell_event({"step": 1, "kind": "rollback", "message": "back"}).symbol == "other"


def test_lines_stand_at_what_is_notable() -> None:
    assert notable_steps(TOLD) == sorted({e["step"] for e in EVENTS if e.get("level") != "notice"})
    many = [warning(step, level="alarm") for step in range(100)] + [verdict(500, "full_divergence", 400)]
    steps = notable_steps([tell_event(event) for event in many])
    assert len(steps) == 25
    assert 500 in steps


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([], ("", "")),
        (["healthy"], ("The task was healthy.", "good")),
        (["healthy"] * 3, ("All 3 tasks were healthy.", "good")),
        (["never_learned", "healthy"], ("Of 2 tasks 1 never learned, 1 was healthy.", "warn")),
        (["no_verdict"], ("Of 1 task 1 had too few readings for a verdict.", "")),
        (["micro_divergence", "full_divergence"], ("Of 2 tasks 1 diverged for good, 1 diverged and came back.", "bad")),
    ],
)
def test_the_headline(kinds: list[str], expected: tuple[str, str]) -> None:
    assert headline([{"verdict": kind} for kind in kinds]) == expected


def test_a_cause_in_tables() -> None:
    block = cause_block(make_causes(TASKS, 6000)[0])
    tables = dict(block["tables"])
    titles, rows = tables["What is unusual about the batch"]
    assert titles[:6] == ["Feature", "What is unusual", "Value", "Now", "Usually", "In the batch's rows"]
    assert rows[0][:6] == ["item", "a value came up", "4711", "42%", "0.14%", "44%"]
    assert rows[1][3:5] == ["3.000", "14.00"]  # a median is no share
    assert len(tables["Rows with the largest gradient"][1]) == 10
    assert tables["The tasks at this step"][1][0] == ["click", "3.400", "0.3600", "22.00", "90%", "31.00"]


def test_a_cause_that_says_little() -> None:
    block = cause_block({"step": 3, "layer": None, "rows": [], "features": [], "tasks": {}, "state_or_data": "unknown"})
    assert block["names"] == []
    assert block["tables"] == []
    assert layer_name({"layer": "w"}) == layer_name({"layer": {"name": "w"}}) == "w"
    assert layer_name({}) == layer_name({"layer": None}) == ""


def test_columns_of_the_log_do_not_hide_what_was_read() -> None:
    row = {"row": 1, "loss": math.inf, "columns": {"loss": 7, "tags": [1, 2, 3, 4, 5, 6, 7], "flag": True}}
    ((_, (titles, cells)),) = cause_block({"rows": [row]})["tables"]
    assert titles == ["Row in the log", "Loss", "loss in the log", "tags", "flag"]
    assert cells == [["1", "not finite", "7", "1, 2, 3, 4, 5, 6, …", "True"]]
