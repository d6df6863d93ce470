import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steadyrank.errors import ConfigError
from steadyrank.losses import multitask_loss
from steadyrank.models import CrossConfig, ModelConfig, Ranker, SharedBottomConfig
from steadyrank.monitors.curvature import (
    HIGHEST,
    LOWEST,
    Before,
    Update,
    copy_before,
    find_largest_eigenvalue,
    find_updates,
    measure_headroom,
    read_preconditioner,
)
from steadyrank.optim import ClippyAdagrad, ClippyAdam, ClipUpdates, LambAdagrad, RowWiseAdagrad
from steadyrank.testing import forbid_host_sync

from .batches import make_batch, make_schema

INF, NAN = float("inf"), float("nan")


def along(*curves: Callable[[Tensor], Tensor]) -> tuple[Callable[[], Tensor], list[Update], Tensor]:
    """Return losses, an update and its weight, such that at the multiple c the losses are `curves` of c."""
    weight = nn.Parameter(torch.ones((), dtype=torch.float64))  # before the step it was 0
    return lambda: torch.stack([curve(weight) for curve in curves]), [Update(weight, torch.ones_like(weight))], weight


def parabola(zero: float) -> Callable[[Tensor], Tensor]:
    """Return a loss that falls from 3, and is back at it at `zero`."""
    return lambda c: 3.0 + c * (c - zero)


@pytest.mark.parametrize("zero", [0.13, 0.3, 0.5, 0.99, 1.0, 1.01, 2.5, 4.0, 8.0, 30.0, 31.9])
def test_headroom_on_a_parabola_is_exact(zero: float) -> None:
    losses, updates, _ = along(parabola(zero))
    headroom = measure_headroom(losses, updates, lr=0.5)
    np.testing.assert_allclose(headroom.total.item(), zero, rtol=1e-5)
    np.testing.assert_allclose(headroom.critical_sharpness.item(), 4.0 / zero, rtol=1e-5)


def test_headroom_by_task_and_in_total() -> None:
    losses, updates, _ = along(parabola(3.0), parabola(11.0), lambda c: 1.0 + 0.1 * c)
    headroom = measure_headroom(losses, updates)
    # The sum's rise is 2 c^2 - 13.9 c.
    np.testing.assert_allclose(headroom.total.item(), 6.95, rtol=1e-9)
    np.testing.assert_allclose(headroom.tasks.numpy(), [3.0, 11.0, LOWEST], rtol=1e-9)
    assert headroom.critical_sharpness.isnan()


def test_gradient_descent_on_a_quadratic_gives_the_curvature_along_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    hessian = root @ root.T
    weight = nn.Parameter(torch.randn(5, dtype=torch.float64, generator=generator))
    lr = 0.02

    def loss() -> Tensor:
        return 0.5 * weight @ hessian @ weight

    loss().backward()
    before = copy_before([weight])
    torch.optim.SGD([weight], lr=lr).step()
    gradient = weight.grad
    sharpness = (gradient @ hessian @ gradient / (gradient @ gradient)).item()
    headroom = measure_headroom(loss, find_updates(before), lr=torch.tensor(lr))
    np.testing.assert_allclose(headroom.critical_sharpness.item(), sharpness, rtol=1e-6)
    np.testing.assert_allclose(headroom.total.item(), 2.0 / (lr * sharpness), rtol=1e-6)


def test_what_lies_outside_the_range_is_given_as_its_end() -> None:
    losses, updates, _ = along(parabola(1000.0), lambda c: -c, parabola(0.01), lambda c: c.exp())
    assert measure_headroom(losses, updates).tasks.tolist() == [HIGHEST, HIGHEST, LOWEST, LOWEST]


def test_a_loss_between_the_multiples_is_refined_for_the_total() -> None:
    losses, updates, _ = along(lambda c: (c - 5.0).abs() ** 3)  # symmetric: back at the start at 10
    np.testing.assert_allclose(measure_headroom(losses, updates).total.item(), 10.0, rtol=0.1)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_has_risen(bad: float) -> None:
    broken = along(lambda c: torch.where(c > 5.0, bad, -c))
    assert 4.0 <= measure_headroom(*broken[:2]).total <= 6.0
    beside = along(lambda c: torch.where(c > 5.0, bad, -c), parabola(1.8))
    headroom = measure_headroom(*beside[:2])
    np.testing.assert_allclose(headroom.total.item(), 2.8)  # the sum's rise is c^2 - 2.8 c
    np.testing.assert_allclose(headroom.tasks.numpy(), [32**0.5, 1.8])  # the sixth was read at 4
    at_once = along(lambda c: torch.where(c != 0.0, bad, 1.0))
    assert LOWEST < measure_headroom(*at_once[:2]).total < 0.5


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nothing_is_told_where_the_loss_before_the_step_is_not_finite(bad: float) -> None:
    losses, updates, _ = along(lambda c: torch.where(c == 0.0, bad, c), parabola(2.0))
    headroom = measure_headroom(losses, updates, lr=0.1)
    assert headroom.total.isnan()
    assert headroom.critical_sharpness.isnan()
    np.testing.assert_allclose(headroom.tasks.numpy(), [NAN, 2.0])


def test_nothing_is_told_where_nothing_changes() -> None:
    losses, updates, weight = along(parabola(2.0), lambda c: 0.0 * c)
    assert measure_headroom(losses, updates).tasks.isnan().tolist() == [False, True]
    assert measure_headroom(losses, []).total.isnan()
    assert measure_headroom(losses, [Update(weight, torch.zeros_like(weight))]).total.isnan()
    float32 = nn.Parameter(torch.ones(()))
    noise = [Update(float32, torch.tensor(1e-9))]
    assert measure_headroom(lambda: 1.0 + float32, noise).total.isnan()


@pytest.mark.parametrize("value", [NAN, INF, -0.0, 1e-45, 3e38])
def test_weights_are_put_back_bit_for_bit(value: float) -> None:
    weight = nn.Parameter(torch.tensor([value, 0.1, -2.0]))
    table = nn.Parameter(torch.tensor([[value], [0.3], [0.7]]))
    rows = torch.tensor([0, 2, 0])
    changes = [torch.tensor([0.3, value, 1e30]), torch.tensor([[value], [0.1], [value]])]
    updates = [Update(weight, changes[0]), Update(table, changes[1], rows)]
    held = [p.detach().clone().view(torch.int32) for p in (weight, table)]
    calls = []

    def losses() -> Tensor:
        calls.append(weight.tolist())
        if len(calls) == stop_at:
            raise RuntimeError("stopped")
        return weight.sum() + table.sum()

    for stop_at in (0, 1, 4):
        calls.clear()
        if stop_at:
            with pytest.raises(RuntimeError, match="stopped"):
                measure_headroom(losses, updates)
        else:
            measure_headroom(losses, updates)
            assert len(calls) == 6
        for p, bits in zip((weight, table), held, strict=True):
            assert torch.equal(p.detach().view(torch.int32), bits)


def test_of_a_table_only_the_touched_rows_are_copied() -> None:
    table, dense = nn.Embedding(1000, 3, sparse=True), nn.Linear(3, 1)
    ids = torch.tensor([5, 7, 5, 9])

    def losses() -> Tensor:
        return (dense(table(ids)) - 1.0).square().mean()

    losses().backward()
    parameters = [*table.parameters(), *dense.parameters(), nn.Parameter(torch.ones(1))]
    before = copy_before(parameters)
    assert [each.values.shape for each in before] == [(4, 3), (1, 3), (1,)]
    whole = [Before(p, p.detach().clone(), None) for p in parameters]
    torch.optim.SGD(parameters, lr=0.05).step()
    updates = find_updates(before)
    assert updates[0].rows.tolist() == ids.tolist()
    as_dense = measure_headroom(losses, find_updates(whole)).total
    assert LOWEST < as_dense < HIGHEST
    torch.testing.assert_close(measure_headroom(losses, updates).total, as_dense)


def make_ranker(dtype: torch.dtype = torch.float32) -> tuple[Ranker, list[torch.optim.Optimizer], Callable[[], Tensor]]:
    """Return a small ranker with lists and positions, after one step, its optimizers, and its losses on a batch."""
    schema = make_schema("ids", "position")
    config = ModelConfig(cross=CrossConfig(layers=1, rank=1), tower=(), trunk=SharedBottomConfig(widths=(4,)))
    model = Ranker(schema, config, torch.Generator().manual_seed(0)).to(dtype)
    batch = make_batch(schema, 64)
    names = model.table_names()
    dense = [p for name, p in model.named_parameters() if name not in names]
    tables = [p for name, p in model.named_parameters() if name in names]
    optimizers = [torch.optim.Adagrad(dense, lr=0.05), RowWiseAdagrad(tables, lr=0.05)]

    def losses() -> Tensor:
        logits_BK = model.forward_both(batch).training
        return multitask_loss(logits_BK, batch.labels.to(dtype), batch.weights.to(dtype), list(schema.tasks.values()))[
            1
        ]

    losses()
    model.eval()  # the running statistics grow no more
    return model, optimizers, losses


def test_headroom_of_a_ranker_is_that_of_a_fine_scan() -> None:
    model, optimizers, losses = make_ranker()
    losses().sum().backward()
    before = copy_before(model.parameters())
    for optimizer in optimizers:
        optimizer.step()
    updates = find_updates(before)
    buffers = [buffer.clone() for buffer in model.buffers()]
    with forbid_host_sync():
        headroom = measure_headroom(losses, updates)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))

    now = [each.parameter.detach().clone() for each in updates]
    multiples = np.geomspace(LOWEST, HIGHEST, 100)
    scanned = []
    with torch.no_grad():
        for multiple in (0.0, *multiples):
            for each, value in zip(updates, now, strict=True):
                each.parameter.copy_(value)
                if each.rows is None:
                    each.parameter.add_((multiple - 1) * each.change)
                else:
                    each.parameter[each.rows] += (multiple - 1) * each.change  # indexing sets a row once
            losses_K = losses()
            scanned.append([losses_K.sum().item(), *losses_K.tolist()])
    risen = np.array(scanned[1:]) > np.array(scanned[0]) * (1 + 1e-6)
    expected = np.where(risen.any(0), multiples[risen.argmax(0)], HIGHEST)
    found = [headroom.total.item(), *headroom.tasks.tolist()]
    assert 1 < expected[0] < 30
    np.testing.assert_allclose(found[0], expected[0], rtol=0.05)
    np.testing.assert_allclose(found[1:], expected[1:], rtol=0.25)  # read at fixed multiples, a factor of 4 apart


def dense_hessian(loss: Tensor, parameters: list[Tensor]) -> np.ndarray:
    """Return H column by column, through dense gradients."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.to_dense().reshape(-1) for g in gradients])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in flat]
    return np.stack([torch.cat([h.to_dense().reshape(-1) for h in row]).numpy() for row in rows])


def make_network(sparse: bool) -> tuple[list[Tensor], Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        table = nn.Embedding(6, 3, sparse=sparse)
        network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        both = nn.ModuleList([table, network]).double()
        ids = torch.tensor([0, 2, 2, 5, 1, 0])
        labels = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
        loss = nn.functional.binary_cross_entropy_with_logits(network(table(ids))[:, 0], labels)
    return list(both.parameters()), loss


@pytest.mark.parametrize("sparse", [False, True])
def test_the_eigenvalue_is_that_of_the_dense_hessian(sparse: bool) -> None:
    parameters, loss = make_network(sparse)
    plain, plain_loss = make_network(sparse=False)
    hessian = dense_hessian(plain_loss, plain)
    found = find_largest_eigenvalue(loss, parameters, tolerance=1e-8)
    np.testing.assert_allclose(found, np.linalg.eigvalsh(hessian)[-1], rtol=1e-7)

    generator = torch.Generator().manual_seed(1)
    scales = [0.1 + torch.rand(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    flat = np.concatenate([scale.numpy().reshape(-1) for scale in scales])
    expected = np.linalg.eigvalsh(hessian / np.sqrt(np.outer(flat, flat)))[-1]
    np.testing.assert_allclose(find_largest_eigenvalue(loss, parameters, scales, tolerance=1e-8), expected, rtol=1e-7)


def test_the_eigenvalue_of_a_ranker_over_its_dense_parameters() -> None:
    model, optimizers, losses = make_ranker(torch.float64)
    losses().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    dense = list(optimizers[0].param_groups[0]["params"])
    loss = losses().sum()
    hessian = dense_hessian(loss, dense)
    np.testing.assert_allclose(find_largest_eigenvalue(loss, dense), np.linalg.eigvalsh(hessian)[-1], rtol=1e-3)
    scales = read_preconditioner(optimizers[0], dense)
    flat = np.concatenate([scale.numpy().reshape(-1) for scale in scales])
    expected = np.linalg.eigvalsh(hessian / np.sqrt(np.outer(flat, flat)))[-1]
    np.testing.assert_allclose(find_largest_eigenvalue(loss, dense, scales), expected, rtol=1e-3)
    with pytest.raises(ConfigError, match="leave the parameters of embedding tables out"):
        find_largest_eigenvalue(loss, list(model.parameters()))


def test_the_largest_eigenvalue_may_be_negative_and_not_the_largest_in_size() -> None:
    weight = nn.Parameter(torch.ones(3))
    loss = (torch.tensor([-1.0, -2.0, -9.0]) * weight.square()).sum()
    np.testing.assert_allclose(find_largest_eigenvalue(loss, [weight]), -2.0, rtol=1e-3)


def test_small_flat_and_broken_losses_have_an_answer() -> None:
    weight, unused, none = (nn.Parameter(torch.ones(n)) for n in (1, 2, 0))
    assert find_largest_eigenvalue((3.0 * weight.square()).sum(), [weight]) == pytest.approx(6.0)
    assert find_largest_eigenvalue((3.0 * weight.square()).sum(), [weight, unused]) == pytest.approx(6.0)
    assert find_largest_eigenvalue((3.0 * unused).sum(), [unused]) == 0.0
    assert find_largest_eigenvalue((0.0 * unused.square()).sum(), [unused]) == 0.0
    assert np.isnan(find_largest_eigenvalue(none.square().sum(), [none]))
    for bad in (NAN, INF):
        assert np.isnan(find_largest_eigenvalue((bad * unused.pow(3)).sum(), [unused]))
    # A coordinate whose accumulator is dead or was never touched has no part in it.
    loss = (torch.tensor([1.0, 5.0]) * unused.square()).sum()
    for dead in (0.0, INF, NAN):
        assert find_largest_eigenvalue(loss, [unused], [torch.tensor([4.0, dead])]) == pytest.approx(0.5)


def test_an_eigenvalue_that_is_not_found_is_nan() -> None:
    weight = nn.Parameter(torch.ones(400, dtype=torch.float64))
    loss = (torch.linspace(1.0, 1.0001, 400, dtype=torch.float64) * weight.square()).sum()
    assert np.isnan(find_largest_eigenvalue(loss, [weight], tolerance=1e-14, restarts=1))


def test_without_scipy_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match=r"needs scipy.*pip install 'steadyrank\[curvature\]'"):
        find_largest_eigenvalue(weight.square().sum(), [weight])


MAKERS = {
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.01, eps=0.01),
    "clippy_adagrad": lambda p: ClippyAdagrad(p, lr=0.1, absolute_threshold=INF, eps=0.01),
    "rowwise_adagrad": lambda p: RowWiseAdagrad(p, lr=0.1, eps=0.01),
    "wrapped_adagrad": lambda p: ClipUpdates(torch.optim.Adagrad(p, lr=0.1, eps=0.01), absolute_threshold=INF),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.9), eps=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.9), eps=0.01, amsgrad=True),
    "clippy_adam": lambda p: ClippyAdam(p, lr=0.1, betas=(0.0, 0.9), absolute_threshold=INF, eps=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_is_the_gradient_over_the_preconditioner(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64, generator=generator))
    optimizer = MAKERS[name]([weight])
    for scale in (3.0, 1.0, 2.0):
        weight.grad = scale * torch.randn(3, 2, dtype=torch.float64, generator=generator)
        held = weight.detach().clone()
        optimizer.step()
    preconditioner = read_preconditioner(optimizer, [weight])[0]
    torch.testing.assert_close(weight.detach() - held, -0.1 * weight.grad / preconditioner)


def test_preconditioners_without_a_step_to_compare_with() -> None:
    weight, fresh = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = LambAdagrad([weight], lr=0.1, eps=1.0, initial_accumulator_value=8.0)  # its factor scales the step
    weight.grad = torch.zeros(2)
    optimizer.step()
    assert [p.tolist() for p in read_preconditioner(optimizer, [weight, fresh])] == [[3.0, 3.0], [1.0, 1.0, 1.0]]


def test_a_refused_step_does_not_count_in_the_preconditioner_of_adam() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = ClippyAdam([weight], betas=(0.0, 0.5), eps=0.0)
    for value in (2.0, NAN, NAN):
        weight.grad = torch.full((2,), value)
        optimizer.step()
    assert read_preconditioner(optimizer, [weight])[0].tolist() == [2.0, 2.0]


@pytest.mark.gpu
def test_on_a_gpu_headroom_waits_for_nothing_and_is_that_of_the_cpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        table = nn.Parameter(torch.linspace(-1, 1, 12, device=device).view(6, 2))
        rows = torch.tensor([1, 4], device=device)
        updates = [Update(table, torch.full((2, 2), 0.05, device=device), rows)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            headroom = measure_headroom(lambda table=table: (table - 1.0).square().sum(0), updates, lr=0.1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append([headroom.total.item(), *headroom.tasks.tolist(), headroom.critical_sharpness.item()])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)
