"""One step, guarded: any module, any optimizer, and nothing that is not finite ever reaches a weight."""

import copy

import pytest
import torch
from torch import nn

from steadyrank.models.ranker import ModelConfig, Ranker
from steadyrank.schema import Batch, NumberFeature, Schema, Task
from steadyrank.train import Readings, fit, guard, train_step

from .batches import make_batch, make_schema


class Linear(nn.Module):
    """Not a Ranker: logits [B, K] from the numbers alone, with dropout."""

    def __init__(self, schema: Schema, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(len(schema.number_features), len(schema.tasks))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.linear(self.dropout(torch.nan_to_num(batch.numbers)))


@pytest.fixture
def schema() -> Schema:
    return Schema(
        features={"x": NumberFeature(), "y": NumberFeature()},
        tasks={"click": Task(kind="binary"), "watch": Task(kind="regression")},
    )


def test_a_step_is_that_of_plain_pytorch(schema: Schema) -> None:
    torch.manual_seed(0)
    model = Linear(schema)
    twin = copy.deepcopy(model)
    batch = make_batch(schema, 32, seed=1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    step = train_step(model, [sgd], batch, list(schema.tasks.values()))
    logits = twin(batch)
    w = batch.weights
    click = nn.functional.binary_cross_entropy_with_logits(
        logits[:, 0], batch.labels[:, 0], weight=w[:, 0], reduction="sum"
    )
    watch = (w[:, 1] * (logits[:, 1] - batch.labels[:, 1]) ** 2).sum()
    loss = click / w[:, 0].sum() + watch / w[:, 1].sum()
    loss.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad)
    torch.testing.assert_close(step.total, loss.detach())
    torch.testing.assert_close(step.scores, logits.detach())


def test_scores_are_those_of_serving_before_the_step(schema: Schema) -> None:
    torch.manual_seed(0)
    model = Linear(schema, dropout=0.5)
    batch = make_batch(schema, 64, seed=2)
    model.train()
    before = copy.deepcopy(model).eval()(batch)
    step = train_step(model, [torch.optim.SGD(model.parameters(), lr=1.0)], batch, list(schema.tasks.values()))
    torch.testing.assert_close(step.scores, before.detach())
    assert model.training


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["Adagrad", "Adam", "SGD"])
def test_a_bad_label_changes_nothing_and_is_named(schema: Schema, bad: float, name: str) -> None:
    torch.manual_seed(0)
    model = Linear(schema)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    tasks = list(schema.tasks.values())
    readings = Readings(list(schema.tasks), model.named_parameters(), [optimizer])
    readings.add(1, train_step(model, [optimizer], make_batch(schema, 16, seed=0), tasks))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    batch = make_batch(schema, 16, seed=3)
    batch.labels[5, 1], batch.weights[5, 1] = bad, 1.0
    step = train_step(model, [optimizer], batch, tasks)
    readings.add(2, step)
    assert not bool(step.verdict.ok)
    assert step.verdict.bad_tasks.tolist() == [False, True]
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])
    for index, of in optimizer.state_dict()["state"].items():
        for key, value in of.items():
            if torch.is_tensor(value):
                assert torch.equal(value, state["state"][index][key])
    row = readings.fetch()
    assert row["bad_steps/total"] == 1
    assert torch.isfinite(torch.tensor(row["loss/total"]))
    assert readings.first_bad is not None
    assert str(readings.first_bad).startswith("step 2: not finite: loss of watch and gradient of linear.weight")


def test_guard_selects_and_does_not_multiply() -> None:
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    sparse = nn.Parameter(torch.ones(4, 2))
    good.grad, bad.grad = torch.ones(3), torch.tensor([1.0, float("inf"), float("nan")])
    sparse.grad = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.ones(2, 2), (4, 2), check_invariants=True)
    verdict = guard([good, bad, sparse], torch.ones(2))
    assert not bool(verdict.ok)
    assert verdict.bad_parameters.tolist() == [False, True, False]
    for parameter in (good, bad, sparse):
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        assert torch.equal(gradient, torch.zeros_like(parameter))


def test_guard_lets_large_gradients_pass_but_not_those_whose_squares_overflow() -> None:
    parameter, empty = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(0))
    parameter.grad, empty.grad = torch.full((4,), 1e13), torch.ones(0)
    assert bool(guard([parameter, empty], torch.ones(1)).ok)
    assert torch.equal(parameter.grad, torch.full((4,), 1e13))
    parameter.grad[2] = -3e38
    verdict = guard([parameter, empty], torch.ones(1))
    assert verdict.bad_parameters.tolist() == [True, False]
    torch.testing.assert_close(verdict.largest, torch.tensor([3e38, 0.0]))
    assert torch.equal(parameter.grad, torch.zeros(4))


def test_guard_judges_each_gradient_by_the_range_of_its_dtype() -> None:
    double, half = nn.Parameter(torch.ones(2, dtype=torch.float64)), nn.Parameter(torch.ones(2, dtype=torch.float16))
    double.grad = torch.full((2,), 1e20, dtype=torch.float64)
    half.grad = torch.full((2,), 6e4, dtype=torch.float16)
    assert bool(guard([double, half], torch.ones(1)).ok)
    half.grad[0] = torch.inf
    assert guard([double, half], torch.ones(1)).bad_parameters.tolist() == [False, True]


def test_fit_learns_with_a_ranker_and_two_optimizers() -> None:
    schema = make_schema("id", "ids", "number")
    model = Ranker(schema, ModelConfig(), torch.Generator().manual_seed(0))
    tables = set(model.table_names())
    dense = [p for name, p in model.named_parameters() if name not in tables]
    sparse = [p for name, p in model.named_parameters() if name in tables]
    optimizers = {"dense": torch.optim.Adam(dense, lr=0.01), "tables": torch.optim.SGD(sparse, lr=0.1)}
    batch = make_batch(schema, 64, seed=0)
    losses = [step.total.item() for _, step in fit(model, optimizers, [batch] * 40, schema.tasks)]
    assert losses[-1] < 0.8 * losses[0]
