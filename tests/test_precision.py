"""In which precision a model computes, and that what must stay in float32 does."""

import copy
from typing import Any

import pytest
import torch

from steadyrank import precision
from steadyrank.config import demo
from steadyrank.errors import ConfigError
from steadyrank.losses import multitask_loss
from steadyrank.models.ranker import ModelConfig, Ranker
from steadyrank.optim import ClippyAdagrad, RowWiseAdagrad, split_parameters
from steadyrank.precision import PAYS_FROM, choose_precision, prefers_onednn
from steadyrank.train import train_step

from .batches import make_batch, make_schema

CPU = torch.device("cpu")
TRUNKS: dict[str, dict[str, Any]] = {
    "shared_bottom": {"kind": "shared_bottom", "widths": [16]},
    "mmoe": {"kind": "mmoe", "experts": 2, "widths": [16]},
    "ple": {"kind": "ple", "widths": [16]},
}


def make_model(trunk: str, dtype: torch.dtype, kinds: tuple[str, ...] = ()) -> Ranker:
    config = ModelConfig(trunk=TRUNKS[trunk], cross={"layers": 1}, tower=[8], layer_norm=True)
    model = Ranker(make_schema(*kinds), config, torch.Generator().manual_seed(0))
    model.precision = dtype
    return model.train()


@pytest.mark.parametrize(
    ("setting", "native", "weights", "name"),
    [
        ("auto", True, PAYS_FROM, "bfloat16"),
        ("auto", True, PAYS_FROM // 10, "float32"),
        ("auto", False, PAYS_FROM, "float32"),
        ("float32", True, PAYS_FROM, "float32"),
        ("bfloat16", False, 1, "bfloat16"),
    ],
)
def test_bfloat16_is_taken_where_the_processor_has_it_and_it_pays(
    setting: Any, native: bool, weights: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: native)
    chosen = choose_precision(setting, CPU, weights, 1)
    assert chosen.name == name
    assert chosen.dtype is getattr(torch, name)
    if setting == "auto" and name == "bfloat16":
        assert "train.precision = 'float32' turns it off" in str(chosen)


@pytest.mark.parametrize(("error", "intel", "takes"), [(0.0, False, True), (0.0, True, False), (0.01, False, False)])
def test_onednn_is_tried_and_not_assumed_to_be_exact(
    error: float, intel: bool, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_is_intel", lambda: intel)
    if not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL to choose against")
    product = torch.Tensor.__matmul__

    def rough(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        medium = torch.get_float32_matmul_precision() == "medium" and a.dtype is torch.float32
        return product(a, b) + error * medium * 256**0.5

    monkeypatch.setattr(torch.Tensor, "__matmul__", rough)
    prefers_onednn.cache_clear()
    try:
        assert prefers_onednn() is takes
        assert torch.get_float32_matmul_precision() == "highest"  # as it was
    finally:
        prefers_onednn.cache_clear()


def test_tf32_without_a_gpu_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"train.precision = 'tf32': expected a GPU that has it .*'auto'"):
        choose_precision("tf32", CPU, 1, 1)


@pytest.mark.parametrize("trunk", list(TRUNKS))
@pytest.mark.parametrize("kinds", [(), ("id", "number")], ids=["all kinds", "no lists"])
def test_a_model_in_bfloat16_says_nearly_the_same_and_learns_in_float32(trunk: str, kinds: tuple[str, ...]) -> None:
    schema = make_schema(*kinds)
    exact, fast = (make_model(trunk, dtype, kinds) for dtype in (torch.float32, torch.bfloat16))
    batch, tasks, seen = make_batch(schema, 64), list(schema.tasks.values()), []
    for module in fast.trunk.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    for model in (exact, fast):
        logits_BK = model(batch)
        assert logits_BK.dtype is torch.float32
        multitask_loss(logits_BK, batch.labels, batch.weights, tasks).total.backward()
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}  # no layer is given anything to cast
    both: list[list[torch.Tensor]] = [[], []]
    for gradients, model in zip(both, (exact, fast), strict=True):
        for parameter in model.parameters():
            assert parameter.grad is not None
            assert parameter.grad.dtype is parameter.dtype is torch.float32
            gradients.append(parameter.grad.to_dense().flatten())
    theirs, mine = (torch.cat(gradients) for gradients in both)
    assert (mine - theirs).norm() < 0.1 * theirs.norm()  # a rounding turns some units of a ReLU on or off
    exact.eval()
    fast.eval()
    torch.testing.assert_close(fast(batch), exact(batch), rtol=0.02, atol=0.01)


def test_logits_are_finer_than_bfloat16() -> None:
    model = make_model("mmoe", torch.bfloat16)
    logits = model(make_batch(make_schema(), 500))
    assert (logits != logits.bfloat16()).float().mean() > 0.9


def test_a_step_keeps_optimizers_and_losses_in_float32() -> None:
    schema = make_schema()
    model = make_model("mmoe", torch.bfloat16)
    dense, tables = split_parameters(model, model.table_names())
    optimizers = [ClippyAdagrad(dense, lr=0.1), RowWiseAdagrad(tables, lr=0.1)]
    before = copy.deepcopy(model.state_dict())
    step = train_step(model, optimizers, make_batch(schema, 64), list(schema.tasks.values()))
    assert step.scores.dtype is step.losses.dtype is step.total.dtype is torch.float32
    for optimizer in optimizers:
        for state in optimizer.state.values():
            assert state["sum"].dtype is torch.float32
    changed = {name for name, now in model.state_dict().items() if not torch.equal(now, before[name])}
    assert {name for name, _ in model.named_parameters() if "position" not in name} <= changed


def test_a_callers_autocast_is_left_on() -> None:
    model, batch = make_model("shared_bottom", torch.float32), make_batch(make_schema(), 8)
    seen: list[torch.dtype] = []
    model.trunk.register_forward_hook(lambda _, args, out: seen.append(out[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(batch)
    model(batch)
    assert seen == [torch.bfloat16, torch.float32]


def test_a_run_is_told_its_precision_and_says_it() -> None:
    parts = demo(["train.precision=bfloat16", "data.rows=2000"]).build()
    assert parts.model.precision is torch.bfloat16
    assert parts.facts["precision"] == "layers compute in bfloat16: train.precision says so"
    small = demo(["data.rows=2000"]).build()
    assert small.model.precision is torch.float32
