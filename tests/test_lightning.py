"""Watching a LightningModule: it sees what it would see in a plain loop, and changes nothing.

Skipped where Lightning is not installed; the default environment does not have it.
"""

import importlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from steadyrank.errors import ConfigError
from steadyrank.monitors.watch import Watch, WatchConfig
from steadyrank.runs import RunFolder
from steadyrank.trackers import tracker_name

lightning = pytest.importorskip("lightning.pytorch")

Logger = importlib.import_module("lightning.pytorch.loggers.logger").Logger
WatchCallback = importlib.import_module("steadyrank.lightning").WatchCallback

pytestmark = [  # of Lightning itself: advice on speed and logging, and what it uses of torch
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning"),
]
TASKS = ("click", "watch_time")
OFTEN = WatchConfig(dynamics_every=5, tasks_every=10)
STEPS = 30


class Net(nn.Module):
    """A shared bottom and two heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.heads = nn.Linear(8, 2)

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.heads(self.trunk(x_BF))


def task_losses(net: nn.Module, x_BF: Tensor, y_BK: Tensor) -> tuple[Tensor, Tensor]:
    logits_BK = net(x_BF)
    return (logits_BK - y_BK).square().mean(0), logits_BK


def batches(count: int = STEPS, skip: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * 16, 4, generator=generator)
    y = torch.stack([x.sum(1), x[:, 0] * x[:, 1]], 1)
    return DataLoader(TensorDataset(x[skip * 16 :], y[skip * 16 :]), batch_size=16)


class Module(lightning.LightningModule):
    """Trains the net as Lightning would have it; `leave` says how it hands its losses over."""

    def __init__(self, leave: str = "tensor") -> None:
        super().__init__()
        self.net = Net()
        self.leave = leave

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        losses_K, logits_BK = task_losses(self.net, *batch)
        if self.leave == "tensor":
            self.task_losses, self.task_logits = losses_K, logits_BK
        elif self.leave == "mapping":
            self.task_losses, self.task_logits = dict(zip(reversed(TASKS), losses_K.flip(0), strict=True)), logits_BK
        elif self.leave == "other tasks":
            self.task_losses = {"click": losses_K[0], "like": losses_K[1]}
        elif self.leave == "total":
            self.task_losses = losses_K.sum()
        return losses_K.sum()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        task_losses(self.net, *batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(self.parameters(), lr=0.1)


class Manual(Module):
    """The same with an optimizer for the trunk and one for the heads, both stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        total = super().training_step(batch, batch_idx)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(total)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return two_optimizers(self.net)


def two_optimizers(net: Net) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adagrad(part.parameters(), lr=0.1) for part in (net.trunk, net.heads)]


class Memory(Logger):
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name = "memory"
    version = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))

    def log_hyperparams(self, *args: Any, **named: Any) -> None:
        pass


def fit(
    module: Module, callback: WatchCallback | None, path: Path, resume: Path | None = None, **options: Any
) -> Memory:
    memory = Memory()
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False, **options}
    trainer = lightning.Trainer(
        callbacks=[callback] if callback else [], logger=memory, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=path, **options,
    )  # fmt: skip
    trainer.fit(module, batches(skip=10 if resume else 0), ckpt_path=resume)  # Lightning skips no data when it resumes
    return memory


def plain(net: Net, optimizers: list[torch.optim.Optimizer], **options: Any) -> list[tuple[int, dict[str, float]]]:
    """Return what a Watch reads in a plain loop, under the names that loggers are given."""
    rows: list[tuple[int, dict[str, float]]] = []

    def write(table: str, step: int, row: Mapping[str, float]) -> None:
        named = {name.replace("/", "/net.") if is_layer(name) else name: value for name, value in row.items()}
        rows.append((step, {tracker_name(table, name): value for name, value in named.items()}))

    watch = Watch(net, optimizers, TASKS, write=write, config=OFTEN, **options)
    for x, y in batches():
        losses_K, logits_BK = task_losses(net, x, y)
        watch.losses(losses_K, logits=logits_BK)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses_K.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    watch.close()
    return rows


def is_layer(reading: str) -> bool:
    return reading.split("/", 1)[1].startswith(("trunk.", "heads."))


def as_text(rows: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, str]]]:
    """Rows whose NaN equal each other."""
    return [(step, {name: repr(value) for name, value in row.items()}) for step, row in rows]


def layers(rows: list[tuple[int, dict[str, float]]]) -> dict[tuple[int, str], float]:
    """Return the norms of layers, by step and name."""
    return {(step, name): value for step, row in rows for name, value in row.items() if name.startswith("l2_norm/")}


@pytest.mark.parametrize("leave", ["tensor", "mapping"])
def test_it_sees_what_a_plain_loop_sees(leave: str, tmp_path: Path) -> None:
    net = Net()
    expected = plain(net, [torch.optim.Adagrad(net.parameters(), lr=0.1)], shared="trunk")
    module = Module(leave)
    found = fit(module, WatchCallback(TASKS, config=OFTEN, shared="net.trunk"), tmp_path)
    assert as_text(found.rows) == as_text(expected)
    assert {step for step, _ in layers(found.rows)} == {5, 10, 15, 20, 25, 30}
    assert {step for step, row in found.rows if "task_cosine/click/watch_time" in row} == {10, 20, 30}
    assert torch.equal(module.net.heads.weight, net.heads.weight)


def test_it_changes_nothing(tmp_path: Path) -> None:
    watched, alone = Module(), Module()
    fit(watched, WatchCallback(TASKS, config=OFTEN, shared="net.trunk"), tmp_path)
    fit(alone, None, tmp_path)
    for one, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


def test_manual_optimisation_with_two_optimizers(tmp_path: Path) -> None:
    net = Net()
    expected = plain(net, two_optimizers(net), shared="trunk")
    found = fit(Manual(), WatchCallback(TASKS, config=OFTEN, shared="net.trunk"), tmp_path)
    assert as_text(found.rows) == as_text(expected)
    assert len({name for _, name in layers(found.rows)}) == 3 * 4


def test_validation_in_between_is_not_watched(tmp_path: Path) -> None:
    def run(**options: Any) -> Memory:
        module = Module()
        module.val_dataloader = lambda: batches(3)
        return fit(module, WatchCallback(TASKS, config=OFTEN, shared="net.trunk"), tmp_path, **options)

    assert as_text(run(val_check_interval=4).rows) == as_text(run(limit_val_batches=0).rows)


def test_of_accumulated_batches_a_step_is_told_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[list[float], bool]] = []
    losses = Watch.losses

    def note(watch: Watch, losses_K: Tensor, **named: Any) -> None:
        told.append((losses_K.tolist(), losses_K.requires_grad))
        losses(watch, losses_K, **named)

    monkeypatch.setattr(Watch, "losses", note)
    module = Module()
    net = Net()  # never trained: with a rate of 0 neither is the module
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    fit(module, WatchCallback(TASKS), tmp_path, accumulate_grad_batches=4)
    each_SK = torch.stack([task_losses(net, *batch)[0].detach() for batch in batches()])
    parts = each_SK.split(4)
    assert len(parts[-1]) == 2  # the last step comes early
    torch.testing.assert_close(torch.tensor([k for k, _ in told]), torch.stack([part.mean(0) for part in parts]))
    assert all(has_graph for _, has_graph in told)


class Overflowing(Module):
    """The total of the fifth batch is too large for the scaler."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1e36 if batch_idx == 4 else 1.0)


@pytest.mark.parametrize("dtype", ["bf16", "16"])
def test_mixed_precision_shows_gradients_before_scaling(dtype: str, tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if dtype == "16" else None
    mixed = lightning.plugins.MixedPrecision(f"{dtype}-mixed", device="cpu", scaler=scaler)
    exact, found = (
        layers(fit(Module(), WatchCallback(TASKS, config=OFTEN), tmp_path, **options).rows)
        for options in ({}, {"plugins": [mixed]})
    )
    assert exact.keys() == found.keys()
    # 8 bits of bfloat16 are up to 1.75-fold after 30 steps; a scale that is left in would be 1024-fold.
    assert [found[key] for key in exact] == pytest.approx(list(exact.values()), rel=1.0)


def test_a_step_that_the_scaler_leaves_out_has_no_readings_of_weights(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    mixed = lightning.plugins.MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    callback = WatchCallback(TASKS, config=OFTEN)
    found = fit(Overflowing(), callback, tmp_path, plugins=[mixed])
    assert {step for step, _ in layers(found.rows)} == {10, 15, 20, 25, 30}
    assert callback.summary.startswith("30 steps")


@pytest.mark.parametrize(
    ("leave", "message"),
    [("nothing", r"write self.task_losses = losses, one for each of \['click', 'watch_time'\]"),
     ("other tasks", r"expected a loss of each of \['click', 'watch_time'\], found \['click', 'like'\]"),
     ("total", r"expected one loss for each of .* found a tensor of shape \[\]")],
)  # fmt: skip
def test_losses_that_cannot_be_used_are_refused(leave: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(Module(leave), WatchCallback(TASKS), tmp_path)


def test_manual_optimisation_that_never_leaves_its_losses_is_refused(tmp_path: Path) -> None:
    module = Manual()
    module.leave = "nothing"
    with pytest.raises(ConfigError, match=r"write self\.task_losses"):
        fit(module, WatchCallback(TASKS), tmp_path)


class Failing(Module):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 12:
            raise ValueError("no such row")
        return super().training_step(batch, batch_idx)


def test_a_run_that_fails_keeps_what_was_read_and_loses_its_hooks(tmp_path: Path) -> None:
    callback, module = WatchCallback(TASKS, config=OFTEN, out=tmp_path / "run"), Failing()
    optimizer = torch.optim.Adagrad(module.parameters(), lr=0.1)
    module.configure_optimizers = lambda: optimizer
    with pytest.raises(ValueError, match="no such row"):
        fit(module, callback, tmp_path)
    assert RunFolder.open(tmp_path / "run").readings("dynamics")["step"].tolist() == [5, 10]
    assert callback.summary.startswith("12 steps, no warning")
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


class Saving(Module):
    """Saves a checkpoint after its tenth step."""

    def on_train_batch_end(self, outputs: Any, batch: list[Tensor], batch_idx: int) -> None:
        if batch_idx == 9:
            self.trainer.save_checkpoint(self.trainer.default_root_dir + "/ten.ckpt")


def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    def callback(name: str) -> WatchCallback:
        return WatchCallback(TASKS, config=OFTEN, shared="net.trunk", out=tmp_path / name)

    whole, first, second = callback("whole"), callback("cut"), callback("cut")
    fit(Module(), whole, tmp_path, max_steps=20)
    fit(Saving(), first, tmp_path, max_steps=13)
    fit(Module(), second, tmp_path, max_steps=20, resume=tmp_path / "ten.ckpt")
    one, other = (RunFolder.open(tmp_path / name).readings("dynamics") for name in ("whole", "cut"))
    assert set(one) == set(other)
    for name in set(one) - {"time"}:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert whole.summary == second.summary


def test_the_message_without_lightning_names_the_extra() -> None:
    code = "import sys; sys.modules['lightning'] = None; import steadyrank.lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'steadyrank[lightning]'" in done.stderr
