"""Training on a GPU: the same as on a CPU, also with batches that are copied beside the work before."""

import pytest
import torch

from steadyrank.models.ranker import ModelConfig, Ranker
from steadyrank.optim import ClippyAdagrad, RowWiseAdagrad, split_parameters
from steadyrank.precision import choose_precision
from steadyrank.scoreboard import Pending, Scoreboard
from steadyrank.train import fit

from .batches import make_batch, make_schema

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def learn(device: str, dtype: torch.dtype, pin: bool = False) -> tuple[list[float], torch.Tensor]:
    """Return the losses of some steps, and the tables after them."""
    schema = make_schema()
    config = ModelConfig(trunk={"kind": "mmoe", "experts": 2, "widths": [16]}, tower=[8])
    model = Ranker(schema, config, torch.Generator().manual_seed(0)).to(device)
    model.precision = dtype
    dense, tables = split_parameters(model, model.table_names())
    optimizers = [ClippyAdagrad(dense, lr=0.1), RowWiseAdagrad(tables, lr=0.1)]
    batches = [make_batch(schema, 256, seed) for seed in range(8)]
    if pin:
        batches = [batch._map(lambda part: part.pin_memory()) for batch in batches]
    totals = [step.total for _, step in fit(model, optimizers, batches, schema.tasks, device=device)]
    return torch.stack(totals).tolist(), next(
        p.detach().cpu() for name, p in model.named_parameters() if "tables" in name
    )


@pytest.mark.parametrize("pin", [False, True])
def test_a_gpu_learns_what_a_cpu_does(pin: bool) -> None:
    losses, tables = learn("cpu", torch.float32)
    on_gpu, tables_there = learn("cuda", torch.float32, pin)
    assert on_gpu == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(tables_there, tables, rtol=1e-3, atol=1e-4)


def test_bfloat16_on_a_gpu_learns_nearly_the_same() -> None:
    assert learn("cuda", torch.bfloat16)[0] == pytest.approx(learn("cpu", torch.float32)[0], rel=0.02)


def test_a_gpu_with_bfloat16_takes_it_for_any_model() -> None:
    chosen = choose_precision("auto", torch.device("cuda"), weights=10, batch_rows=10)
    assert chosen.name == ("bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32")


def test_metrics_of_scores_on_a_gpu_are_counted_in_a_thread() -> None:
    schema = make_schema()
    board, held = Scoreboard(schema), Pending(schema, device=torch.device("cuda"))
    for seed in range(6):
        batch = make_batch(schema, 64, seed)
        scores = torch.randn(64, len(schema.tasks), generator=torch.Generator().manual_seed(seed))
        board.add(batch, scores)
        held.add(batch, scores.cuda())
        held.flush()
    assert held.settle().close_window() == pytest.approx(board.close_window(), nan_ok=True)
    held.close()
