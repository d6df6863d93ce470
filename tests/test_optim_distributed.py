"""Two processes with sharded or replicated parameters take the step of one process with whole ones."""

import json
from typing import Any

import pytest

from .together import needs_gloo, run_together

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("two") / "found.json"
    run_together("two_processes", 2, path)
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def test_shards_take_the_step_of_the_whole(found: dict[str, Any]) -> None:
    cases = {name: case for name, case in found.items() if name.startswith("shards")}
    assert len(cases) > 15
    for name, case in cases.items():
        assert case["gap"] <= 1e-6, f"{name}: {case['gap']}"
        # A NaN in one process's shard is refused by both.
        assert case["bad"] == [1, 1, 1, 1], name
        one, many = case["factors"]
        assert many == pytest.approx(one, rel=1e-6), name
    assert min(cases["shards_0/adagrad"]["factors"][0]) < 0.9


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_a_module_trained_by_two_processes_is_that_of_one(how: str, found: dict[str, Any]) -> None:
    cases = {name: case for name, case in found.items() if name.startswith(how)}
    assert cases
    for name, case in cases.items():
        assert case["gap"] <= 1e-6, f"{name}: {case['gap']}"


def test_a_bad_step_that_is_not_asked_for_leaves_shards_as_they_were(found: dict[str, Any]) -> None:
    cases = {name: case for name, case in found.items() if name.startswith("unasked")}
    assert len(cases) == 3
    for name, case in cases.items():
        assert case["bad"] == 1, name
        assert case["gap"] <= 1e-7, f"{name}: {case['gap']}"
