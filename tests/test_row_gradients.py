"""Each row's loss and gradient against a gradient computed for that row alone."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from steadyrank.losses import multitask_loss
from steadyrank.models.ranker import ModelConfig, Ranker
from steadyrank.monitors.row_gradients import read_rows
from steadyrank.schema import Batch, Schema, Task

from .batches import make_batch, make_schema

TRUNKS = [
    {"kind": "shared_bottom", "widths": [8, 8]},
    {"kind": "mmoe", "widths": [8], "experts": 2},
    {"kind": "ple", "widths": [6], "levels": 2},
]


def doubled(batch: Batch) -> Batch:
    return replace(batch, numbers=batch.numbers.double(), labels=batch.labels.double(), weights=batch.weights.double())


def make_model(schema: Schema, trunk: dict[str, object] = TRUNKS[0], **options: object) -> Ranker:
    config = ModelConfig(trunk=trunk, tower=[4], **options)
    model = Ranker(schema, config, torch.Generator().manual_seed(0)).double()
    model(doubled(make_batch(schema, 50, seed=9)))  # so that numbers have running statistics
    return model


def slow_twin(model: nn.Module, batch: Batch, tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
    """Return each row's loss and gradient norm by task, one backward pass each."""
    losses = torch.zeros(len(batch), len(tasks), dtype=torch.float64)
    norms = torch.zeros_like(losses)
    for k in range(len(tasks)):
        for b in range(len(batch)):
            weights = torch.zeros_like(batch.weights)
            weights[b, k] = batch.weights[b, k]
            share = batch.weights[b, k] / batch.weights[:, k].sum()
            model.zero_grad()
            loss = multitask_loss(model.forward_both(batch).training, batch.labels, weights, tasks).total * share
            loss.backward()
            grads = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
            losses[b, k] = loss.detach()
            norms[b, k] = sum(float(g.square().sum()) for g in grads) ** 0.5
    model.zero_grad()
    return losses, norms


@pytest.mark.parametrize("trunk", TRUNKS, ids=lambda t: t["kind"])
@pytest.mark.parametrize("cross", [None, {"layers": 2}, {"layers": 2, "rank": 2}])
def test_every_row_has_the_gradient_that_it_would_have_alone(trunk: dict[str, object], cross: object) -> None:
    schema = make_schema("id", "number", "position")
    model, batch = make_model(schema, trunk, cross=cross), doubled(make_batch(schema, 7))
    model.eval()  # the running statistics stand still while the twin goes through the model
    tasks = list(schema.tasks.values())
    expected_losses, expected_norms = slow_twin(model, batch, tasks)
    model.train()
    found = read_rows(model, batch, tasks, multitask_loss)
    torch.testing.assert_close(found.row_losses_BK, expected_losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.row_gradients_BK, expected_norms, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.gradients_K, expected_norms.square().sum(0).sqrt(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.push(), expected_norms.square().sum(1).sqrt(), rtol=1e-9, atol=1e-12)


class Odd(nn.Module):
    """Uses one layer twice, and on three dimensions; has dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 1, bias=False)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(2, affine=False)

    def forward(self, batch: Batch) -> Tensor:
        x_BTI = batch.numbers.nan_to_num()[:, None] * torch.tensor([[[1.0], [2.0], [-1.0]]]).to(batch.numbers)
        h_BTI = torch.tanh(self.first(torch.tanh(self.first(x_BTI))))
        if self.training:
            h_BTI = self.drop(h_BTI)
            self.norm(h_BTI[:, 0])
        return self.last(h_BTI).sum(1).expand(-1, batch.labels.shape[1])

    def forward_both(self, batch: Batch) -> "Odd.Both":
        return self.Both(self(batch))

    class Both:
        def __init__(self, training: Tensor) -> None:
            self.training = training


def test_a_layer_used_several_times_on_a_row_has_the_gradient_of_all_uses() -> None:
    schema = make_schema("number")
    torch.manual_seed(0)
    model, batch, tasks = Odd().double().eval(), doubled(make_batch(schema, 6)), list(schema.tasks.values())
    _, expected = slow_twin(model, batch, tasks)
    found = read_rows(model, batch, tasks, multitask_loss)
    torch.testing.assert_close(found.row_gradients_BK, expected, rtol=1e-9, atol=1e-12)


def test_losses_are_those_of_training_to_the_bit_and_nothing_changes() -> None:
    schema = make_schema()
    model = Ranker(schema, ModelConfig(cross={"layers": 1, "layer_norm": True}), torch.Generator().manual_seed(0))
    model(make_batch(schema, 50, seed=9))
    batch, tasks = make_batch(schema, 20), list(schema.tasks.values())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = read_rows(model, batch, tasks, multitask_loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    expected = multitask_loss(model.forward_both(batch).training, batch.labels, batch.weights, tasks)
    assert torch.equal(found.losses_K.float(), expected.parts.detach())
    torch.testing.assert_close(found.row_losses_BK.sum().float(), expected.total.detach())


def test_dropout_and_batch_norm_leave_no_trace() -> None:
    schema, model = make_schema("number"), Odd()
    model.norm.num_batches_tracked += 3
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    read_rows(model, make_batch(schema, 6), list(schema.tasks.values()), multitask_loss)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_another_state_is_read_as_if_the_model_had_it() -> None:
    schema = make_schema()
    model, other = make_model(schema), make_model(schema)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1
    batch, tasks = doubled(make_batch(schema, 9)), list(schema.tasks.values())
    found, expected = (
        read_rows(model, batch, tasks, multitask_loss, other.state_dict()),
        read_rows(other, batch, tasks, multitask_loss),
    )
    assert torch.equal(found.row_gradients_BK, expected.row_gradients_BK)
    dense = {name: value for name, value in other.state_dict().items() if name.startswith("trunk")}
    partly = read_rows(model, batch, tasks, multitask_loss, dense)
    assert not torch.equal(partly.row_gradients_BK, expected.row_gradients_BK)
    assert not torch.equal(partly.losses_K, read_rows(model, batch, tasks, multitask_loss).losses_K)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_own_row(value: float) -> None:
    schema = make_schema()
    model, batch, tasks = make_model(schema), doubled(make_batch(schema, 8)), list(schema.tasks.values())
    labels, weights = batch.labels.clone(), torch.ones_like(batch.weights)
    labels[3, 2] = value
    found = read_rows(model, replace(batch, labels=labels, weights=weights), tasks, multitask_loss)
    assert (~found.row_losses_BK.isfinite()).nonzero().tolist() == [[3, 2]]
    assert (~found.losses_K.isfinite()).tolist() == [False, False, True]
    # Huber's gradient at an infinite label is finite, at NaN it is not.
    assert (~found.row_gradients_BK.isfinite()).nonzero().tolist() == ([[3, 2]] if value != value else [])
    weights[3, 2] = 0
    masked = read_rows(model, replace(batch, labels=labels, weights=weights), tasks, multitask_loss)
    assert masked.row_losses_BK.isfinite().all()
    assert masked.row_gradients_BK.isfinite().all()
    assert masked.row_gradients_BK[3, 2] == 0


def test_a_task_without_labels_and_a_batch_of_one_row() -> None:
    schema = make_schema()
    model, batch, tasks = make_model(schema), doubled(make_batch(schema, 1)), list(schema.tasks.values())
    found = read_rows(model, replace(batch, weights=torch.zeros_like(batch.weights)), tasks, multitask_loss)
    assert found.losses_K.tolist() == [0.0, 0.0, 0.0]
    assert found.row_gradients_BK.tolist() == [[0.0, 0.0, 0.0]]
