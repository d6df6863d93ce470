"""Tasks against each other at what they share, against autograd over the whole ranker."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steadyrank import ConfigError
from steadyrank.losses import multitask_loss
from steadyrank.models.ranker import ModelConfig, Ranker
from steadyrank.monitors.readings import fetch
from steadyrank.monitors.tasks import TaskConflict, compare_gradients, find_conflict
from steadyrank.testing import forbid_host_sync

from .batches import make_batch, make_schema
from .test_activations import TRUNKS

SCHEMA = make_schema("id", "number")
TASKS = list(SCHEMA.tasks)
WEIGHTS = [task.loss_weight for task in SCHEMA.tasks.values()]


def make_ranker(trunk: str) -> Ranker:
    config = ModelConfig(trunk=TRUNKS[trunk], tower=(4,))
    return Ranker(SCHEMA, config, torch.Generator().manual_seed(0)).train()


def losses_of(model: Ranker, seed: int = 0, unlabelled: int | None = None) -> tuple[Tensor, Tensor]:
    batch = make_batch(SCHEMA, 40, seed=seed)
    if unlabelled is not None:
        batch.weights[:, unlabelled] = 0
    return multitask_loss(model(batch), batch.labels, batch.weights, list(SCHEMA.tasks.values()))


def expected_of(gradients: dict[str, np.ndarray]) -> dict[str, float]:
    """Return what is read of each task's gradient, in float64."""
    total = sum(gradients.values())
    found = {f"task_gradient_norm/{name}": np.linalg.norm(g) for name, g in gradients.items()}
    found |= {f"task_share_frac/{name}": (g @ total) / (total @ total) for name, g in gradients.items()}
    for (a, one), (b, other) in itertools.combinations(gradients.items(), 2):
        norms = np.linalg.norm(one) * np.linalg.norm(other)
        found[f"task_cosine/{a}|{b}"] = (one @ other) / norms if norms else math.nan
    return found


@pytest.mark.parametrize("unlabelled", [None, 1])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_what_is_read_is_each_tasks_gradient_at_the_representation(trunk: str, unlabelled: int | None) -> None:
    model = make_ranker(trunk)
    conflict = TaskConflict(model.trunk, TASKS, WEIGHTS)
    conflict.active = True
    held: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor], output: list[Tensor]) -> None:
        # A shared bottom hands the same tensor to all tasks; the others mix anew for each, from the same input.
        held.append(output[0] if trunk == "shared_bottom" else inputs[0])

    model.trunk.register_forward_hook(keep)
    parts_K = losses_of(model, unlabelled=unlabelled).parts
    with forbid_host_sync():
        readings = conflict.read(parts_K)
    gradients = {}
    for k, task in enumerate(TASKS):
        [g] = torch.autograd.grad(WEIGHTS[k] * parts_K[k], held[0], retain_graph=True)
        gradients[task] = g.double().numpy().ravel()
    found = fetch(readings)
    assert found == pytest.approx(expected_of(gradients), rel=1e-4, abs=1e-6, nan_ok=True)
    assert sum(found[f"task_share_frac/{task}"] for task in TASKS) == pytest.approx(1.0, abs=1e-5)
    if unlabelled is not None:
        assert found[f"task_gradient_norm/{TASKS[unlabelled]}"] == 0
        assert math.isnan(found[f"task_cosine/{TASKS[0]}|{TASKS[unlabelled]}"])


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_gradients_that_backward_leaves_are_the_same_to_the_bit(trunk: str) -> None:
    left = []
    for active in (False, True):
        model = make_ranker(trunk)
        conflict = TaskConflict(model.trunk, TASKS, WEIGHTS)
        conflict.active = active
        for seed in range(2):  # accumulated over two batches
            total, parts_K = losses_of(model, seed)
            assert bool(conflict.read(parts_K)) == active
            total.backward()
        left.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert left[0].keys() == left[1].keys()
    for name, grad in left[0].items():
        one, other = (g.coalesce().values() if g.is_sparse else g for g in (grad, left[1][name]))
        assert torch.equal(one, other), name


def test_one_task_alone_has_all_of_the_share_and_no_cosine() -> None:
    shared, head = nn.Linear(3, 4), nn.Linear(4, 1)
    conflict = TaskConflict(shared, ["click"])
    conflict.active = True
    losses_K = head(shared(torch.ones(5, 3))).square().mean(0)
    found = fetch(conflict.read(losses_K))
    assert found.keys() == {"task_gradient_norm/click", "task_share_frac/click"}
    assert found["task_share_frac/click"] == pytest.approx(1.0)


def test_losses_that_do_not_hang_on_what_is_shared_give_nothing() -> None:
    shared, apart = nn.Linear(3, 2), nn.Linear(3, 2)
    conflict = TaskConflict(shared, ["a", "b"])
    conflict.active = True
    x = torch.ones(4, 3)
    shared(x)
    assert conflict.read(apart(x).mean(0)) == []
    assert conflict.read(shared(x).mean(0)) != []
    assert conflict.read(shared(x).detach().mean(0)) == []
    shared.requires_grad_(False)
    assert conflict.read(shared(x).mean(0) + apart(x).mean(0)) == []
    with torch.no_grad():
        shared(x)
    assert conflict.read(apart(x).mean(0)) == []


def test_passes_that_are_not_watched_give_nothing() -> None:
    shared = nn.Linear(3, 2)
    conflict = TaskConflict(shared, ["a", "b"])
    losses_K = shared(torch.ones(4, 3)).mean(0)
    assert conflict.read(losses_K) == []
    conflict.active = True
    shared.eval()
    assert conflict.read(shared(torch.ones(4, 3)).mean(0)) == []
    shared.train()
    for handle in conflict.handles:
        handle.remove()
    assert conflict.read(shared(torch.ones(4, 3)).mean(0)) == []


def test_what_is_not_finite_shows_and_is_gone_with_the_next_batch() -> None:
    shared, heads = nn.Linear(3, 4), nn.Linear(4, 2)
    conflict = TaskConflict(shared, ["a", "b"])
    conflict.active = True
    logits = heads(shared(torch.ones(5, 3)))
    found = fetch(conflict.read((logits * torch.tensor([math.nan, 1.0])).mean(0)))
    assert math.isnan(found["task_gradient_norm/a"])
    assert math.isnan(found["task_share_frac/b"])
    assert math.isnan(found["task_cosine/a|b"])
    after = fetch(conflict.read(heads(shared(torch.ones(5, 3))).mean(0)))
    assert np.isfinite(list(after.values())).all()


def test_gradients_are_compared_as_numpy_compares_them() -> None:
    gradients_KH = torch.randn(4, 30, generator=torch.Generator().manual_seed(3))
    gradients_KH[3] = 0
    found = fetch(compare_gradients(gradients_KH, list("abcd")))
    expected = expected_of({name: g.double().numpy() for name, g in zip("abcd", gradients_KH, strict=True)})
    assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert math.isnan(found["task_cosine/a|d"])
    nothing = fetch(compare_gradients(torch.zeros(2, 3), ["a", "b"]))
    assert nothing["task_gradient_norm/a"] == 0
    assert math.isnan(nothing["task_share_frac/a"])


def test_half_precision_is_compared_in_float32() -> None:
    shared: Any = nn.Linear(3, 4).bfloat16()
    conflict = TaskConflict(shared, ["a", "b"])
    conflict.active = True
    losses_K = shared(torch.ones(5, 3).bfloat16()).float()[:, :2].mean(0)
    readings = conflict.read(losses_K)
    assert {reading.values.dtype for reading in readings} == {torch.float32}
    assert fetch(readings)["task_gradient_norm/a"] == pytest.approx(5**-0.5, rel=1e-2)


def test_what_is_shared_is_found_by_name() -> None:
    model = nn.ModuleDict({"deep": nn.ModuleDict({"trunk": nn.Linear(2, 2)}), "trunk": nn.Linear(2, 2)})
    weights = [1.0]
    assert find_conflict(model, None, ["a"], weights) is not None
    assert len(model["trunk"]._forward_hooks) == 1  # the one that is least deep
    assert find_conflict(model, "deep.trunk", ["a"], weights) is not None
    assert find_conflict(nn.Linear(2, 2), None, ["a"], weights) is None
    with pytest.raises(ConfigError, match=r"no module 'deep\.trunc'; did you mean 'deep\.trunk'"):
        find_conflict(model, "deep.trunc", ["a"], weights)
