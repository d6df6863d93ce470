"""A run that this machine has no memory for is refused before anything is made, and nothing else is."""

import time
from itertools import islice
from typing import Any

import pytest
import torch

from steadyrank.config import RunConfig, demo
from steadyrank.errors import ConfigError
from steadyrank.models import memory
from steadyrank.models.memory import _machine_bytes, check_memory, list_layers
from steadyrank.models.ranker import ModelConfig, Ranker
from steadyrank.optim import state_bytes_per_row
from steadyrank.optim.guarded import innermost
from steadyrank.parts import Parts
from steadyrank.schema import Schema
from steadyrank.train import fit

SCHEMA = Schema.model_validate(
    {
        "features": {
            "item": {"kind": "id", "rows": 50},
            "history": {"kind": "ids", "rows": 50, "table": "item"},
            "user": {"kind": "id", "rows": 70, "width": 6},
            "age": {"kind": "number"},
            "place": {"kind": "position", "rows": 9},
        },
        "tasks": {"click": {"kind": "binary"}, "like": {"kind": "binary"}, "watch": {"kind": "regression"}},
    }
)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"layer_norm": True, "tower": [7, 5], "trunk": {"kind": "shared_bottom", "widths": [8, 4]}},
        {"cross": {"layers": 3}, "trunk": {"kind": "mmoe", "experts": 5, "widths": [8, 4]}},
        {"cross": {"layers": 3, "rank": 2, "layer_norm": True}, "trunk": {"kind": "ple", "widths": [8]}},
        {"trunk": {"kind": "ple", "levels": 2, "shared_experts": 3, "task_experts": 1, "widths": [8, 6]}},
        {"layer_norm": True, "trunk": {"kind": "ple", "levels": 4, "shared_experts": 1, "widths": [5]}},
    ],
)
def test_the_arithmetic_is_that_of_the_model(model: dict[str, Any]) -> None:
    config = ModelConfig.model_validate(model)
    made = Ranker(SCHEMA, config, torch.Generator().manual_seed(0)).summary()
    counted = {part: sum(layer.weights for layer in layers) for part, layers in list_layers(SCHEMA, config).items()}
    assert {name: made.parts.get(name, 0) for name in ("cross", "trunk")} | {"tower": made.parts["towers"]} == counted
    assert sum(slot.rows * slot.width for slot in SCHEMA.tables.values()) == made.embedding


def bare(rows: int = 50) -> dict[str, Any]:
    return {"features": {"item": {"kind": "id", "rows": rows}}, "tasks": {"click": {"kind": "binary"}}}


@pytest.mark.parametrize(
    ("schema", "model", "asked", "expected"),
    [
        (bare(10**9), {}, {}, "the table 'item': 1,000,000,001 rows x 16 x 4 bytes = 64.0 GB; give it fewer rows"),
        (bare(10**30), {}, {}, "the table 'item'"),
        (bare() | {"embedding_width": 10**12}, {}, {}, "model.trunk"),
        (
            bare(),
            {"trunk": {"kind": "shared_bottom", "widths": [10**9]}},
            {},
            "model.trunk: 17,000,000,000 weights x 12 bytes + 1 layers",
        ),
        (bare(), {"trunk": {"kind": "mmoe", "experts": 10**6}}, {}, "model.trunk"),
        (bare(), {"trunk": {"kind": "mmoe", "experts": 10**7, "widths": [1]}}, {}, "+ 10,000,001 layers x 10,000 = "),
        (bare(), {"trunk": {"kind": "ple", "levels": 10**7}}, {}, "model.trunk"),
        (bare(), {"cross": {"layers": 10**7}}, {}, "model.cross"),
        (bare(), {"tower": [10**6, 10**6]}, {}, "model.tower"),
        (bare(), {}, {"window_rows": 10**12}, "a window: 1,000,000,000,000 rows x 3 columns x 8 bytes"),
        (bare(), {}, {"batch_rows": 10**9}, "make reader.batch_size smaller"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_arithmetic(
    schema: dict[str, Any], model: dict[str, Any], asked: dict[str, int], expected: str
) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError) as refused:
        check_memory(
            Schema.model_validate(schema), ModelConfig.model_validate(model), machine_bytes=24 * 10**9, **asked
        )
    assert expected in str(refused.value)
    assert "this machine has 24.0 GB" in str(refused.value)
    assert time.perf_counter() - start < 1  # asked, not tried


def test_what_fits_is_not_refused() -> None:
    check_memory(SCHEMA, ModelConfig(), window_rows=65_536, batch_rows=1024)
    assert (_machine_bytes() or 0) > 10**8


@pytest.mark.parametrize("name", ["rowwise_adagrad", "adagrad", "clippy_adagrad", "clippy_adam", "sgd"])
def test_what_a_tables_optimizer_keeps_is_counted(name: str) -> None:
    config = demo([f"optimizer.tables={{name='{name}'}}", "data.rows=2000"])
    parts = config.build()
    for batch, _ in fit_batches(parts):
        assert len(batch)
    table = next(p for n, p in parts.model.named_parameters() if n.startswith("tables."))
    state = innermost(parts.optimizers["tables"]).state[table]
    kept = sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, torch.Tensor) and t.dim())
    assert state_bytes_per_row(config.optimizer.tables, table.shape[1]) * len(table) == kept


def fit_batches(parts: Parts) -> Any:
    batches = (batch for batch, _ in islice(parts.reader.batches(), 2))
    return fit(parts.model, parts.optimizers, batches, parts.schema.tasks)


def test_a_run_says_what_it_takes_before_anything_large_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(RunConfig, "build_model", lambda self, *_: pytest.fail("made first") if not said else stop())
    with pytest.raises(InterruptedError):
        demo(["optimizer.tables.name=adagrad"]).build(announce=said.append)
    assert said[0].startswith("memory: at least ")
    assert all(part in said[0] for part in ("tables ", "their optimizer ", "layers ", "the log ", "a batch "))


def stop() -> None:
    raise InterruptedError


def test_an_optimizer_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_machine_bytes", lambda: 10**9)
    sets = ["schema.features={item={kind='id',rows=9000000}}", "schema.tasks={click={kind='binary'}}"]
    with pytest.raises(ConfigError, match=r"optimizer of tables of width 16: 9,000,001 rows x 128 bytes = 1\.2 GB"):
        demo([*sets, "schema.baseline=[]", "optimizer.tables={name='clippy_adam'}"]).build()
