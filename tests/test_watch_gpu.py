"""On a GPU: whole steps are watched without a host sync. Run with `pytest -m gpu`."""

import pytest
import torch
from torch import nn

from steadyrank import ClippyAdagrad, Watch, WatchConfig
from steadyrank.monitors.readings import fetch
from steadyrank.monitors.tables import Field, Tables

from .test_optim_gpu import sync_is_an_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ALWAYS = WatchConfig(look_every=1, dynamics_every=2, tasks_every=1, curvature_every=2)


@pytest.mark.parametrize("rate", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_a_step_is_watched_without_waiting(rate: float | torch.Tensor) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"trunk": nn.Sequential(nn.Linear(4, 8), nn.ReLU()), "heads": nn.Linear(8, 2)}).to("cuda")
    optimizer = ClippyAdagrad(net.named_parameters(), lr=rate)
    rows: list[tuple[str, int]] = []
    watch = Watch(
        net,
        optimizer,
        ("a", "b"),
        config=ALWAYS,
        flush_every=0,
        write=lambda table, step, row: rows.append((table, step)),
    )
    x = torch.randn(32, 4, device="cuda")

    def losses() -> torch.Tensor:
        return net["heads"](net["trunk"](x)).square().mean(0)

    def step() -> None:
        logits = net["heads"](net["trunk"](x))
        losses_K = logits.square().mean(0)
        watch.losses(losses_K, logits=logits)
        losses_K.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if watch.headroom_is_due:
            watch.headroom(losses)

    for number in range(8):
        if number < 4:  # states are made, and kernels loaded
            step()
            continue
        with sync_is_an_error():
            step()
    watch.close()
    assert tables == {"dynamics", "tasks", "curvature"}


def test_tables_are_read_without_waiting_as_on_the_cpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        table = nn.Parameter(torch.linspace(-1, 1, 60).view(20, 3).to(device))
        tables = Tables([("t", table)], [Field("user", "t", 0, 8), Field("item", "t", 8, 12)])
        for step in range(3):
            at = torch.tensor([[3, 9, 3, 15 + step]], device=device)
            table.grad = torch.sparse_coo_tensor(at, torch.ones(4, 3, device=device), (20, 3), check_invariants=True)
            if device == "cpu" or not step:
                tables.before()
            else:
                with sync_is_an_error():
                    tables.before()
            with torch.no_grad():
                table[3] += 0.5
            if device == "cpu" or not step:
                readings = tables.after(step, rank=True)
            else:
                with sync_is_an_error():
                    readings = tables.after(step, rank=True)
            found.append(fetch(readings) | fetch(tables.read_rank()))
    assert found[3:] == [pytest.approx(row, rel=1e-4) for row in found[:3]]
