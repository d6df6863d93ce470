"""Dead units, gates and logits, as the rankers show them, against numpy."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steadyrank.models.ranker import ModelConfig, Ranker
from steadyrank.monitors.activations import DeadUnits, Gates, mean_entropy, read_logits
from steadyrank.monitors.readings import fetch
from steadyrank.ranks import Ranks
from steadyrank.testing import forbid_host_sync

from .batches import make_batch, make_schema
from .threads import run_in_threads

SCHEMA = make_schema("id", "number")
TRUNKS: dict[str, dict[str, Any]] = {
    "shared_bottom": {"kind": "shared_bottom", "widths": [16, 8]},
    "mmoe": {"kind": "mmoe", "experts": 3, "widths": [8]},
    "ple": {"kind": "ple", "levels": 2, "shared_experts": 1, "task_experts": 2, "widths": [8]},
}


def make_ranker(trunk: str, **options: Any) -> Ranker:
    config = ModelConfig(trunk=TRUNKS[trunk], tower=(4,), **options)
    return Ranker(SCHEMA, config, torch.Generator().manual_seed(0)).train()


def outputs_of(model: nn.Module, kind: type[nn.Module]) -> dict[str, np.ndarray]:
    """Return a place where the outputs of all modules of a kind will be after each forward pass."""
    found: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if isinstance(module, kind):
            module.register_forward_hook(
                lambda m, i, out, name=name: found.__setitem__(name, out.detach().numpy().copy())
            )
    return found


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_dead_units_of_a_ranker_are_those_that_numpy_counts(trunk: str, activation: str) -> None:
    model = make_ranker(trunk, activation=activation)
    with torch.no_grad():  # some units that never speak, and some that do so rarely
        for name, p in model.named_parameters():
            if name.endswith("bias") and "output" not in name:
                p[::3] = -50.0
                p[1::3] = -0.5
    units = DeadUnits(model, batches=3)
    outputs = outputs_of(model, nn.ReLU if activation == "relu" else nn.GELU)
    units.active = True
    silent: dict[str, np.ndarray] = {}
    for look in range(1, 7):
        model(make_batch(SCHEMA, 6, seed=look))
        with forbid_host_sync():
            readings = units.read()
        found = fetch(readings)
        for name, output_BH in outputs.items():
            spoke_H = abs(output_BH).max(0) > 1e-6
            silent[name] = np.where(spoke_H, 0, silent.get(name, np.zeros(len(spoke_H))) + 1)
        dead = {name: count >= min(3, look) for name, count in silent.items()}
        expected = {f"dead_frac/{name}": each.mean() for name, each in dead.items()}
        expected["dead_frac/all"] = np.concatenate(list(dead.values())).mean()
        assert found == pytest.approx(expected)
    assert 0.3 < found["dead_frac/all"] < 1
    assert len(found) > 4


@pytest.mark.parametrize("trunk", ["mmoe", "ple"])
def test_gates_of_a_ranker_are_read_as_numpy_reads_them(trunk: str) -> None:
    model = make_ranker(trunk)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate" in name:
                p.mul_(30.0)
    gates, outputs = Gates(model), outputs_of(model, type(next(m for m in model.modules() if hasattr(m, "is_gate"))))
    gates.active = True
    model(make_batch(SCHEMA, 50))
    with forbid_host_sync():
        readings = gates.read()
    found = fetch(readings)
    expected: dict[str, float] = {}
    for name, shares_BE in outputs.items():
        expected |= {f"expert_load_frac/{name}.{e}": load for e, load in enumerate(shares_BE.mean(0))}
        logs = np.log(np.where(shares_BE > 0, shares_BE, 1.0))
        entropy = -(shares_BE * logs).sum(1).mean()
        expected[f"gate_entropy_frac/{name}"] = entropy / math.log(shares_BE.shape[1])
    assert found == pytest.approx(expected, rel=1e-5)
    gates_there = 3 if trunk == "mmoe" else 3 + 1 + 3
    entropies = [value for name, value in found.items() if name.startswith("gate_entropy")]
    assert len(entropies) == gates_there
    assert all(0 < value < 1 for value in entropies)
    assert sum(v for name, v in found.items() if name.startswith("expert_load")) == pytest.approx(gates_there)


def test_a_shared_bottom_has_no_gates() -> None:
    model = make_ranker("shared_bottom")
    gates = Gates(model)
    gates.active = True
    model(make_batch(SCHEMA, 5))
    assert gates.handles == gates.read() == []


@pytest.mark.parametrize("monitor", [DeadUnits, Gates])
def test_evaluation_and_unwatched_passes_are_not_counted(monitor: Any) -> None:
    model = make_ranker("mmoe")
    watching = monitor(model)
    model(make_batch(SCHEMA, 5))  # not active yet
    assert watching.read() == []
    watching.active = True
    model.eval()
    model(make_batch(SCHEMA, 5))
    assert watching.read() == []
    model.train()
    state = copy.deepcopy(model.state_dict())  # running statistics of the numbers grow with each pass
    model(make_batch(SCHEMA, 5, seed=1))
    alone = fetch(watching.read())
    model.load_state_dict(state)
    model(make_batch(SCHEMA, 5, seed=1))
    model.eval()
    model(make_batch(SCHEMA, 5, seed=2))
    assert fetch(watching.read()) == alone
    for handle in watching.handles:
        handle.remove()
    model.train()
    model(make_batch(SCHEMA, 5))
    assert watching.read() == []


class Said(nn.Module):
    """Puts out through a ReLU what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x_BH: Tensor) -> Tensor:
        return self.act(x_BH)


def dead_of(units: DeadUnits, model: nn.Module, values: Any) -> float:
    model(torch.tensor(values))
    return fetch(units.read()).get("dead_frac/all", -1.0)


def test_a_unit_is_dead_after_so_many_silent_looks_and_alive_with_the_first_sound() -> None:
    model = Said()
    units = DeadUnits(model, batches=2)
    units.active = True
    assert dead_of(units, model, [[1.0, 0.0], [0.0, -1.0]]) == 0.5  # of all looks that there were
    assert dead_of(units, model, [[0.0, 0.0]]) == 0.5
    assert dead_of(units, model, [[0.0, 0.0]]) == 1.0
    assert dead_of(units, model, [[0.0, 2.0]]) == 0.5


def test_a_nan_shows_and_is_then_as_if_it_had_not_been() -> None:
    model, nan = Said(), math.nan
    units, without = DeadUnits(model, batches=2), DeadUnits(model, batches=2)
    units.active = True
    assert math.isnan(dead_of(units, model, [[nan, 0.0]]))
    lost, one, none = [[nan, nan]], [[1.0, 0.0]], [[0.0, 0.0]]
    for values in (one, none, lost, one, lost, none, lost, none):
        units.active, without.active = True, False
        seen = dead_of(units, model, values)
        units.active, without.active = False, True
        if math.isnan(values[0][0]):
            assert math.isnan(seen)
        else:
            assert dead_of(without, model, values) == seen
    assert seen == 1.0


def test_a_nan_in_one_module_leaves_the_others_readable() -> None:
    model = nn.ModuleDict({"a": nn.ReLU(), "b": nn.ReLU()})
    units = DeadUnits(model)
    units.active = True
    model["a"](torch.tensor([[math.nan, 1.0]]))
    model["b"](torch.tensor([[0.0, 1.0]]))
    found = fetch(units.read())
    assert math.isnan(found["dead_frac/a"])
    assert math.isnan(found["dead_frac/all"])
    assert found["dead_frac/b"] == 0.5


def test_batches_without_rows_are_not_watched_and_an_infinite_unit_speaks() -> None:
    model = Said()
    units = DeadUnits(model)
    units.active = True
    assert dead_of(units, model, torch.zeros(0, 2).tolist() or [[]]) == -1.0
    assert dead_of(units, model, [[math.inf, 0.0]]) == 0.5


def test_on_several_ranks_a_unit_is_dead_that_is_silent_on_the_rows_of_all() -> None:
    looks = [torch.tensor([[0.0, 0.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0]]), torch.zeros(2, 4), torch.ones(2, 4)]

    def look(ranks: Ranks) -> list[dict[str, float]]:
        model = Said()
        units, found = DeadUnits(model, batches=2), []
        units.active = True
        for rows in looks:
            model(rows[ranks.rank : ranks.rank + 1])  # the last rank has none
            found.append(fetch(units.read(ranks)))
        return found

    expected = [{"dead_frac/act": share, "dead_frac/all": share} for share in (0.5, 0.5, 0.0)]
    assert run_in_threads(3, look) == [expected] * 3


def test_another_layout_begins_anew() -> None:
    model = nn.ModuleDict({"a": nn.ReLU(), "b": nn.ReLU()})
    units = DeadUnits(model, batches=2)
    units.active = True
    for _ in range(3):
        model["a"](torch.ones(1, 2))
        units.read()
    model["b"](torch.zeros(1, 2))  # as many units, but others
    assert fetch(units.read()) == {"dead_frac/b": 1.0, "dead_frac/all": 1.0}


def test_dead_units_resume() -> None:
    draw = np.random.default_rng(0)
    looks = [np.where(draw.random((1, 8)) < 0.5, 0.0, 1.0).astype(np.float32).tolist() for _ in range(12)]
    through = DeadUnits(model := Said(), batches=3)
    through.active = True
    straight = [dead_of(through, model, look) for look in looks]
    assert len(set(straight)) > 2
    for stop in range(12):
        model = Said()
        first = DeadUnits(model, batches=3)
        first.active = True
        found = [dead_of(first, model, look) for look in looks[:stop]]
        model = Said()
        second = DeadUnits(model, batches=3)
        second.active = True
        second.load_state_dict(first.state_dict())
        assert found + [dead_of(second, model, look) for look in looks[stop:]] == straight


def test_entropy_lies_between_0_and_1_and_says_when_there_is_nothing() -> None:
    assert mean_entropy(torch.eye(4)) == 0
    assert mean_entropy(torch.full((3, 4), 0.25)) == pytest.approx(1.0)
    assert mean_entropy(torch.ones(3, 1)) == 1
    assert mean_entropy(torch.zeros(0, 4)).isnan()
    assert mean_entropy(torch.tensor([[math.nan, 1.0]])).isnan()
    assert mean_entropy(torch.full((3, 4), 0.25, dtype=torch.bfloat16)) == pytest.approx(1.0)


def test_logits_show_range_and_saturation_of_binary_tasks_only() -> None:
    logits_BK = 20 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    with forbid_host_sync():
        readings = read_logits(logits_BK, ["a", "b", "c"], [True, False, True])
    found, values = fetch(readings), logits_BK.numpy()
    assert [found[f"logit_low/{name}"] for name in "abc"] == values.min(0).tolist()
    assert [found[f"logit_high/{name}"] for name in "abc"] == values.max(0).tolist()
    assert [found[f"saturated_frac/{name}"] for name in "ac"] == pytest.approx((abs(values) > 10).mean(0)[::2].tolist())
    assert "saturated_frac/b" not in found


def test_logits_that_are_lost_show_and_no_rows_give_nothing() -> None:
    found = fetch(read_logits(torch.tensor([[math.nan, math.inf], [11.0, 0.0]]), ["a", "b"], [True, True]))
    assert all(math.isnan(found[f"{area}/a"]) for area in ("logit_low", "logit_high", "saturated_frac"))
    assert (found["logit_low/b"], found["logit_high/b"], found["saturated_frac/b"]) == (0.0, math.inf, 0.5)
    assert read_logits(torch.zeros(0, 2), ["a", "b"], [True, True]) == []
    assert [reading.area for reading in read_logits(torch.zeros(1, 1), ["a"], [False])] == ["logit_low", "logit_high"]
