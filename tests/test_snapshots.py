"""Snapshots in memory: within their budget, safe from later changes, the newest before a step."""

import json
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from steadyrank.snapshots import SnapshotRing, copy_state, size_of


def as_json(state: Any) -> str:
    return json.dumps(state, sort_keys=True, default=lambda tensor: tensor.tolist())  # to the last bit


def state_of(step: int, width: int = 100) -> dict[str, Any]:
    return {"weight": torch.full((width,), float(step)), "step": step}


def test_a_snapshot_does_not_change_with_what_it_was_taken_of_or_given_to() -> None:
    layer = nn.Linear(3, 2)
    adam = torch.optim.Adam(layer.parameters(), lr=torch.tensor(0.1), foreach=False)

    def train(steps: int) -> None:
        for _ in range(steps):
            adam.zero_grad()
            layer(torch.ones(4, 3)).square().sum().backward()
            adam.step()

    def now() -> dict[str, Any]:
        return {"model": layer.state_dict(), "optimizer": adam.state_dict()}

    ring = SnapshotRing(10**6)
    train(2)
    assert ring.add(2, now()) == ""
    reference = copy_state(now())
    ends = []
    for _ in range(2):  # what was loaded once must still be there unchanged
        train(3)
        found = ring.newest_before(3)
        assert found is not None
        assert found[0] == 2
        assert as_json(found[1]) == as_json(reference)
        layer.load_state_dict(found[1]["model"])
        adam.load_state_dict(found[1]["optimizer"])
        train(3)
        ends.append(copy_state(now()))
    assert as_json(ends[0]) == as_json(ends[1])
    assert as_json(ends[0]) != as_json(reference)


@given(st.lists(st.integers(0, 400), max_size=20), st.integers(0, 5000))
def test_the_newest_are_kept_within_the_budget(widths: list[int], budget: int) -> None:
    ring = SnapshotRing(budget)
    sizes = [size_of(state_of(step, width)) for step, width in enumerate(widths)]
    refused = []
    kept: list[int] = []
    for step, width in enumerate(widths):
        message = ring.add(step, state_of(step, width))
        refused += [message] if message else []
        if sizes[step] <= budget:
            kept.append(step)
            while sum(sizes[each] for each in kept) > budget:
                kept.pop(0)
            found = ring.newest_before(step + 1)
            assert found is not None
            assert found[0] == step
            assert torch.equal(found[1]["weight"], state_of(step, width)["weight"])
        assert ring.steps == kept
        assert ring.bytes == sum(sizes[each] for each in kept)
    assert len(refused) == any(size > budget for size in sizes)
    assert all("recovery.snapshot_budget_mb" in message for message in refused)


def test_the_newest_before_a_step_and_what_a_rollback_drops() -> None:
    ring = SnapshotRing(10**5)
    assert ring.newest_before(100) is None
    for step in (10, 20, 30):
        ring.add(step, state_of(step))
    assert [found and found[0] for found in map(ring.newest_before, (10, 11, 20, 31, 999))] == [None, 10, 10, 30, 30]
    ring.drop_after(20)
    assert ring.steps == [10, 20]
    ring.add(15, state_of(15))  # a run that went back to 10 has not made step 20 yet
    assert ring.steps == [10, 15]
    ring.clear()
    assert ring.steps == []
    assert ring.bytes == 0


def test_a_state_is_copied_with_all_that_is_in_it() -> None:
    grown = (torch.ones(2, requires_grad=True) * 3)[1:]
    state = OrderedDict(a=(1, grown), b=[None, {"c": torch.arange(3)}], d=True, e=b"x")
    copied = copy_state(state)
    assert str(copied) == "{'a': (1, tensor([3.])), 'b': [None, {'c': tensor([0, 1, 2])}], 'd': True, 'e': b'x'}"
    assert copied["b"] is not state["b"]
    assert copied["b"][1]["c"].data_ptr() != state["b"][1]["c"].data_ptr()


class Holder:
    def __init__(self) -> None:
        self.rows = torch.zeros(1000)


def test_what_an_object_holds_is_counted() -> None:
    assert size_of({"board": Holder()}) > 4000


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu_lies_on_the_cpu() -> None:
    ring = SnapshotRing(10**5)
    ring.add(1, {"weight": torch.ones(3, device="cuda")})
    found = ring.newest_before(2)
    assert found is not None
    assert found[1]["weight"].device.type == "cpu"
