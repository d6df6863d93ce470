"""On a GPU: the step of the CPU, without a host sync, by lists of tensors and compiled. Run with `pytest -m gpu`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from steadyrank.optim import AGC, ClipGradients, ClippyAdagrad, ClippyAdam, ClipUpdates, Lamb, LambAdagrad, StableAdamW
from steadyrank.testing import TinyProblem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

MADE: dict[str, Any] = {
    "adagrad": lambda params: ClippyAdagrad(params, lr=0.3),
    "adagrad_one_by_one": lambda params: ClippyAdagrad(params, lr=0.3, foreach=False),
    "adagrad_row": lambda params: ClippyAdagrad(params, lr=0.3, granularity="row", telemetry=True),
    "adagrad_quantile": lambda params: ClippyAdagrad(params, lr=0.3, quantile=0.1, weight_decay=0.1),
    "adagrad_fading": lambda params: ClippyAdagrad(params, lr=0.3, half_life=4.0, calibration_steps=2),
    "adam": lambda params: ClippyAdam(params, lr=0.05),
    "adam_clip_moments": lambda params: ClippyAdam(params, lr=0.05, clip_moments=True),
    "lamb": lambda params: Lamb(params, lr=0.05),
    "lamb_adagrad": lambda params: LambAdagrad(params, lr=0.05),
    "stable_adamw": lambda params: StableAdamW(params, lr=0.05),
    "clip_updates": lambda params: ClipUpdates(torch.optim.SGD(params, lr=0.3)),
    "clip_gradients": lambda params: ClipGradients(torch.optim.Adagrad(params, lr=0.3), AGC()),
}


@contextmanager
def sync_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def moved(name: str, device: str) -> tuple[TinyProblem, torch.optim.Optimizer]:
    problem = TinyProblem().to(device)
    return problem, MADE[name](problem.named_parameters())


@pytest.mark.parametrize("name", MADE)
def test_the_gpu_takes_the_step_of_the_cpu_without_waiting(name: str) -> None:
    (here, on_cpu), (there, on_gpu) = moved(name, "cpu"), moved(name, "cuda")
    for step in range(6):
        here.backward(step)
        if step == 3:
            here.table.grad[0, 0] = torch.nan
        for p, q in zip(here.parameters(), there.parameters(), strict=True):
            q.grad = p.grad.to("cuda")
        on_cpu.step()
        if step < 2:  # states are made, and kernels loaded
            on_gpu.step()
            continue
        with sync_is_an_error():
            on_gpu.step()
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [ClippyAdagrad, ClippyAdam])
def test_compiled_by_torch_it_is_the_same_step_in_fewer_launches(make: Any) -> None:
    models = [[nn.Parameter(torch.linspace(-1, 1, 40, device="cuda").view(8, 5)) for _ in range(6)] for _ in range(2)]
    made = [make(models[0], lr=torch.tensor(0.1)), make(models[1], lr=torch.tensor(0.1), fused=True)]

    def step(number: int, optimizer: Any, model: list[nn.Parameter]) -> None:
        for i, p in enumerate(model):
            p.grad = torch.sin(torch.arange(40.0, device="cuda") * (number + i + 1)).view(8, 5)
        optimizer.step()

    for number in range(4):
        for optimizer, model in zip(made, models, strict=True):
            step(number, optimizer, model)
    for p, q in zip(*models, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)
    launches = []
    for optimizer, model in zip(made, models, strict=True):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        launches.append(sum(event.count for event in profile.key_averages() if "Memcpy" not in event.key))
        assert model[0].is_cuda
    assert launches[1] < launches[0]


def test_tables_on_a_gpu_move_their_touched_rows_only() -> None:
    table = nn.Parameter(torch.ones(1000, 4, device="cuda"))
    optimizer = ClippyAdagrad([table], lr=0.3, granularity="row")
    rows = torch.tensor([[3, 7, 3]], device="cuda")
    table.grad = torch.sparse_coo_tensor(rows, torch.ones(3, 4, device="cuda"), table.shape)
    optimizer.step()
    assert (table != 1).any(1).nonzero().flatten().tolist() == [3, 7]
