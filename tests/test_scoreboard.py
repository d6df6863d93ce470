"""Metrics that three processes count, each its rows, beside those of one process that counts all."""

import json
import math
from typing import Any

import pytest
import torch

from steadyrank import scoreboard
from steadyrank.errors import ConfigError
from steadyrank.ranks import ALONE
from steadyrank.scoreboard import Pending, Scoreboard

from .scoreboard_processes import CASES, STEPS, make_schema, make_steps, read
from .together import needs_gloo, run_together


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("boards") / "found.json"
    run_together("scoreboard_processes", 3, path)
    return dict(json.loads(path.read_text()))


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, each in value.items() for k, v in flat(each, f"{name}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, each in enumerate(value) for k, v in flat(each, f"{name}/{i}").items()}
    return {name: value}


def compare(found: Any, expected: Any, exact: str = "") -> int:
    """Hold readings to others; those whose name holds `exact` to the bit. Returns how many numbers there were."""
    found, expected = flat(found), flat(expected)
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, str) or (exact and exact in name and "gauc" not in name and not math.isnan(value)):
            assert found[name] == value, name
        else:
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name
    return sum(isinstance(value, float) and not math.isnan(value) for value in expected.values())


@needs_gloo
@pytest.mark.parametrize("name", CASES)
def test_three_ranks_read_what_one_reads(name: str, told: dict[str, Any]) -> None:
    found = told["found"][name]
    one, three = found["one"], found["three"]
    assert compare(three, one, "" if CASES[name][3] else "auc") > 100  # 0 and 1 add up exactly in any order
    assert three[-1]["click"]["run"]["rows"] > 800
    assert math.isnan(three[-1]["click"]["run"]["auc"]) == (name == "not a number")
    assert 0.6 < three[-1]["like"]["run"]["auc"] < three[-1]["like"]["attainable"]["auc"] < 1
    assert 0.5 < three[-1]["like"]["baseline"]["auc"] < three[-1]["like"]["attainable"]["auc"]
    assert told["alike"]  # on all ranks


@needs_gloo
@pytest.mark.parametrize("name", CASES)
def test_a_board_goes_on_with_any_number_of_ranks(name: str, told: dict[str, Any]) -> None:
    found = told["found"][name]
    assert json.dumps(found["resumed"]) == json.dumps(found["unbroken"])  # to the bit
    for way in ("unbroken", "one to three", "three to two to one"):
        assert compare(found[way], found["one on"]) > 50, way


@needs_gloo
def test_each_rank_keeps_its_own_rows(told: dict[str, Any]) -> None:
    whole = sum(len(batch) for batch, _ in make_steps(make_schema(True), True, False)[: STEPS // 2 + 2])
    kept = told["found"]["kept"]["kept"]
    assert sum(kept) == whole
    assert max(kept) < 0.6 * whole


@pytest.mark.parametrize("beside", [False, True])
def test_one_process_counts_step_by_step_or_flush_by_flush(beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoreboard, "CAPACITY", 500)
    schema = make_schema(True)
    steps = make_steps(schema, True, False)
    monkeypatch.setattr(scoreboard, "counts_beside", lambda device: beside)
    single, held = Scoreboard(schema, truth=True), Pending(schema, truth=True)
    for batch, scores in steps:
        single.add(batch, scores)
        held.add(batch, scores)
        if len(batch) % 7 == 0:
            held.flush()
    held.flush()
    held.flush()  # of nothing
    counted = held.settle()
    assert json.dumps(single.close_window()) == json.dumps(counted.close_window())
    assert json.dumps(single.summary()) == json.dumps(counted.summary())
    held.close()


def test_what_goes_wrong_while_counting_is_raised_where_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoreboard, "counts_beside", lambda device: True)
    schema = make_schema(True)
    (batch, scores), *_ = make_steps(schema, True, False)
    held = Pending(schema)
    held.add(batch, scores[:, :2])
    held.flush()
    with pytest.raises(ConfigError, match=r"expected scores, labels and weights of shape \[rows, 3\]"):
        held.settle()
    held.settle()  # is said once
    held.close()


def test_a_board_of_one_process_is_saved_as_it_was() -> None:
    schema = make_schema(True)
    steps, board, again = make_steps(schema, False, False), Scoreboard(schema), Scoreboard(schema)
    read(board, steps[:20], ALONE)
    state = board.state_dict()
    assert set(state) == {"metrics", "baseline", "rows", "sums"}
    for part in state["metrics"].values():
        for each in ("run", "window", "last_day"):
            del part[each]["kept"]  # which older ones lack
    again.load_state_dict(state)
    assert json.dumps(read(again, steps[20:], ALONE)) == json.dumps(read(board, steps[20:], ALONE))
    assert torch.equal(again.state_dict()["baseline"]["user"], board.state_dict()["baseline"]["user"])
