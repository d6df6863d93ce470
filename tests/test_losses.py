import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from steadyrank.errors import ConfigError
from steadyrank.losses import loss_kind, multitask_loss
from steadyrank.schema import Task

CLICK = Task(kind="binary")
LIKE = Task(kind="binary", loss_weight=0.25)
WATCH = Task(kind="regression", loss_weight=2.0)
RATING = Task(kind="regression", loss="huber", huber_delta=0.7)
# The same kinds apart and beside each other, so that runs of neighbours are told from tasks of one kind.
MIXED = (CLICK, WATCH, LIKE, RATING, RATING, CLICK)


def draw(rows: int, tasks: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, tasks, dtype=torch.float64, generator=generator)
    labels = torch.randint(2, (rows, tasks), generator=generator).double()
    weights = 2 * torch.rand(rows, tasks, dtype=torch.float64, generator=generator)
    weights[torch.rand(rows, tasks, generator=generator) < 0.3] = 0
    return logits, labels, weights


def torch_part(task: Task, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute one task's part from its labelled rows alone."""
    rows = weights > 0
    x, y, w = logits[rows], labels[rows], weights[rows]
    if loss_kind(task) == "bce":
        return F.binary_cross_entropy_with_logits(x, y, weight=w, reduction="sum") / w.sum()
    losses = F.mse_loss(x, y, reduction="none")
    if loss_kind(task) == "huber":
        losses = F.huber_loss(x, y, reduction="none", delta=task.huber_delta)
    return (w * losses).sum() / w.sum()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.permutations(MIXED))
def test_parts_and_gradients_equal_pytorchs_own_losses(seed: int, tasks: list[Task]) -> None:
    logits, labels, weights = draw(20, len(tasks), seed)
    logits.requires_grad_()
    total, parts = multitask_loss(logits, labels, weights, tasks)
    (got,) = torch.autograd.grad(total, logits)
    expected = torch.stack([torch_part(t, logits[:, k], labels[:, k], weights[:, k]) for k, t in enumerate(tasks)])
    whole = sum(task.loss_weight * part for task, part in zip(tasks, expected, strict=True))
    (wanted,) = torch.autograd.grad(whole, logits)
    torch.testing.assert_close(parts, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_weights_count_as_repetitions_do() -> None:
    logits, labels, _ = draw(3, 2, 0)
    weights = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    repeated = torch.tensor([0, 1, 1])
    ones = torch.ones(3, 2, dtype=torch.float64)
    got = multitask_loss(logits, labels, weights, (CLICK, WATCH)).parts
    wanted = multitask_loss(logits[repeated], labels[repeated], ones, (CLICK, WATCH)).parts
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e300])
@pytest.mark.parametrize("where", ["logits", "labels"])
def test_nothing_leaks_from_a_masked_row(poison: float, where: str) -> None:
    logits, labels, weights = draw(8, len(MIXED), 1)
    weights[3] = 0
    clean = multitask_loss(logits, labels, weights, MIXED)
    (logits if where == "logits" else labels)[3] = poison
    logits.requires_grad_()
    total, parts = multitask_loss(logits, labels, weights, MIXED)
    total.backward()
    assert torch.equal(parts, clean.parts)
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert bool((logits.grad[weights == 0] == 0).all())
    assert bool((logits.grad[weights != 0] != 0).any())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_labelled_row_that_is_not_finite_shows_in_its_task_alone(poison: float) -> None:
    logits, labels, weights = draw(8, 4, 2)
    weights[5, 1] = 1.0
    logits[5, 1] = poison
    for tasks in ((CLICK,) * 4, (WATCH,) * 4, (RATING,) * 4):
        total, parts = multitask_loss(logits, labels, weights, tasks)
        # A binary loss at +inf is 0 or inf by its label, through 0 * inf: never a finite number.
        assert not total.isfinite()
        assert parts.isfinite().tolist() == [True, False, True, True]


def test_a_task_without_labels_costs_nothing() -> None:
    logits, labels, weights = draw(6, 3, 3)
    weights[:, 1] = 0
    logits.requires_grad_()
    total, parts = multitask_loss(logits, labels, weights, (CLICK, LIKE, WATCH))
    total.backward()
    assert logits.grad is not None
    assert parts[1] == 0
    assert bool((logits.grad[:, 1] == 0).all())
    assert bool(logits.grad.isfinite().all())
    empty = multitask_loss(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, 2), (CLICK, WATCH))
    assert empty.parts.tolist() == [0.0, 0.0]


def test_auto_is_resolved_by_kind() -> None:
    assert [loss_kind(task) for task in (CLICK, WATCH, RATING)] == ["bce", "mse", "huber"]


def test_as_many_tasks_as_columns() -> None:
    with pytest.raises(ConfigError, match="2 tasks for logits of 3 columns"):
        multitask_loss(*draw(4, 3, 0), (CLICK, WATCH))


def test_scales_damp_the_total_alone_and_a_task_of_scale_0_gets_no_gradient() -> None:
    logits, labels, weights = draw(12, len(MIXED), 4)
    logits.requires_grad_()
    scales = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.25, 1.0], dtype=torch.float64)
    plain = multitask_loss(logits, labels, weights, MIXED)
    damped = multitask_loss(logits, labels, weights, MIXED, scales)
    assert torch.equal(damped.parts, plain.parts)
    wanted = sum(s * t.loss_weight * part for s, t, part in zip(scales, MIXED, plain.parts, strict=True))
    torch.testing.assert_close(damped.total, wanted, rtol=1e-12, atol=1e-12)
    (whole,) = torch.autograd.grad(plain.total, logits, retain_graph=True)
    (got,) = torch.autograd.grad(damped.total, logits)
    torch.testing.assert_close(got, whole * scales, rtol=1e-12, atol=1e-12)
    ones = multitask_loss(logits, labels, weights, MIXED, torch.ones_like(scales))
    assert torch.equal(ones.total, plain.total)
