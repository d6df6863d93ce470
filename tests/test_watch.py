"""`Watch` in loops of one's own: it sees what happens, changes nothing, waits for nothing, and leaves a run folder."""

import inspect
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steadyrank import ClippyAdagrad, ClipUpdates, ConfigError, RowWiseAdagrad, RunFolder, Watch, WatchConfig
from steadyrank.monitors.curvature import copy_before, find_updates, measure_headroom
from steadyrank.monitors.tables import Field
from steadyrank.monitors.verdict import find_kinds
from steadyrank.report import write_report
from steadyrank.testing import forbid_host_sync

TASKS = ("click", "like")
OFTEN = WatchConfig(look_every=2, dynamics_every=4, tasks_every=4, rank_every=8, curvature_every=6)
Rows = list[tuple[str, int, dict[str, float]]]
Make = Callable[[Iterable[Any]], Optimizer]


class Net(nn.Module):
    """A table with a sparse gradient, a shared trunk and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table = nn.Embedding(30, 4, sparse=True)
            self.trunk = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
            self.heads = nn.Linear(8, 2)

    def forward(self, rows: Tensor) -> Tensor:
        return self.heads(self.trunk(self.table(rows)))

    def dense(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if not name.startswith("table")]


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return torch.randint(0, 30, (16,), generator=draw), torch.randn(16, 2, generator=draw)


def losses_of(net: nn.Module, step: int) -> tuple[Tensor, Tensor]:
    rows, labels = batch_of(step)
    logits_BK = net(rows)
    return (logits_BK - labels).square().mean(0), logits_BK


def adam(named: Iterable[Any]) -> Optimizer:
    return torch.optim.Adam(named, lr=0.01)


def clippy(named: Iterable[Any]) -> Optimizer:
    return ClippyAdagrad(named, lr=0.5)


def optimizers_of(net: Net, make: Make = clippy) -> list[Optimizer]:
    return [make(net.dense()), RowWiseAdagrad([("table.weight", net.table.weight)], lr=0.1)]


def train(
    net: nn.Module,
    optimizers: list[Optimizer],
    steps: Iterable[int],
    watch: Watch | None = None,
    spoil: float = math.nan,
    bad: Iterable[int] = (),
) -> None:
    """Train as the docstring of Watch shows; the losses of the steps `bad` are spoilt."""
    for step in steps:
        losses_K, logits_BK = losses_of(net, step)
        if step in bad:
            losses_K = losses_K * spoil
        if watch is not None:
            watch.losses(losses_K, logits=logits_BK)
        losses_K.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def watched(net: nn.Module, optimizers: Any, **options: Any) -> tuple[Watch, Rows]:
    rows: Rows = []
    options = {"config": OFTEN, "write": lambda table, step, row: rows.append((table, step, dict(row))), **options}
    return Watch(net, optimizers, options.pop("tasks", TASKS), **options), rows


def columns_of(rows: Rows, table: str) -> dict[int, dict[str, float]]:
    return {step: row for name, step, row in rows if name == table}


def as_text(rows: Rows) -> list[str]:
    return [repr(row) for row in rows]


LOOPS: dict[str, Callable[[Net], list[Optimizer]]] = {
    "one": lambda net: [ClippyAdagrad(net.parameters(), lr=0.1)],
    "several": optimizers_of,
    "wrapped": lambda net: optimizers_of(net, lambda named: ClipUpdates(torch.optim.Adam(named, lr=0.1))),
}


@pytest.mark.parametrize("make", LOOPS.values(), ids=LOOPS)
def test_a_loop_of_ones_own_is_read_on_schedule(make: Callable[[Net], list[Optimizer]]) -> None:
    net = Net()
    optimizers = make(net)
    watch, rows = watched(net, optimizers if len(optimizers) > 1 else optimizers[0], flush_every=4)
    train(net, optimizers, range(40), watch)
    said = watch.close().splitlines()
    assert said == ["40 steps, no warning", "click: healthy", "like: healthy"]
    dynamics = columns_of(rows, "dynamics")
    assert list(dynamics) == list(range(2, 41, 2))
    assert list(columns_of(rows, "tasks")) == list(range(4, 41, 4))
    assert list(columns_of(rows, "steps")) == list(range(4, 41, 4))
    names = {name.split("/")[0] for name in dynamics[2]}
    assert names == {"update_over_bound", "dead_frac", "logit_low", "logit_high", "saturated_frac"}
    assert {"gradient_norm", "factor_gc", "accumulator_q50", "rows_touched", *names} <= {
        name.split("/")[0] for name in dynamics[4]
    }
    ranks = [step for step, row in dynamics.items() if any(name.startswith("effective_rank") for name in row)]
    assert ranks == [8, 16, 24, 32, 40]
    labels = {name.split("/")[1] for name in dynamics[4] if name.startswith("update_norm")}
    assert labels == {name for name, _ in net.dense()}
    for row in dynamics.values():
        assert np.isfinite(list(row.values())).all()


@pytest.mark.parametrize("make", [adam, clippy])
def test_weights_are_the_same_to_the_bit_with_it_and_without(make: Make) -> None:
    states = []
    for seen in (False, True):
        net = Net()
        optimizers = optimizers_of(net, make)
        watch, _ = watched(net, optimizers) if seen else (None, [])
        for step in range(60):
            train(net, optimizers, [step], watch)
            if watch is not None and watch.headroom_is_due:
                watch.headroom(lambda net=net, step=step: losses_of(net, step)[0])
        if watch is not None:
            watch.close()
        states.append([*net.state_dict().values(), *(v for o in optimizers for v in tensors_of(o.state_dict()))])
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)


def tensors_of(state: dict[str, Any]) -> list[Tensor]:
    return [value for each in state["state"].values() for value in each.values() if isinstance(value, Tensor)]


def test_nothing_waits_for_the_device_between_two_flushes() -> None:
    net = Net()
    # Not RowWiseAdagrad, which coalesces; what is tried is the Watch.
    optimizers = [clippy(net.dense()), torch.optim.SGD(net.table.parameters(), lr=0.1)]
    config = WatchConfig(look_every=1, dynamics_every=2, tasks_every=1, rank_every=2, curvature_every=2)
    watch, rows = watched(net, optimizers, config=config, flush_every=0)
    for step in range(12):
        with forbid_host_sync():
            train(net, optimizers, [step], watch)
            if watch.headroom_is_due:
                watch.headroom(lambda step=step: losses_of(net, step)[0])
    assert rows == []
    watch.flush()
    assert {table for table, *_ in rows} == {"dynamics", "tasks", "curvature"}
    assert len(columns_of(rows, "dynamics")) == 12


def test_the_row_of_steps_has_means_and_extremes_of_all_steps_since_the_last() -> None:
    net = Net()
    optimizers = optimizers_of(net)
    watch, rows = watched(net, optimizers, flush_every=5, loss_weights=[1.0, 0.5])
    seen = []
    for step in range(10):
        losses_K, logits_BK = losses_of(net, step)
        watch.losses(losses_K, logits=logits_BK)
        losses_K.sum().backward()
        gradients = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in net.parameters()]
        seen.append((losses_K.tolist(), logits_BK.abs().amax(0).tolist(), [float(g.abs().max()) for g in gradients]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    watch.flush()
    steps = columns_of(rows, "steps")
    assert list(steps) == [5, 10]
    losses_TK, logits_TK, gradients_TP = (np.array(part[5:]) for part in zip(*seen, strict=True))
    mean_K = losses_TK.mean(0)
    expected = {f"loss/{task}": mean for task, mean in zip(TASKS, mean_K, strict=True)}
    expected["loss/total"] = mean_K[0] + 0.5 * mean_K[1]
    for area, values in (("loss_max", losses_TK), ("logit_max", logits_TK)):
        expected |= {f"{area}/{task}": top for task, top in zip(TASKS, values.max(0), strict=True)}
    # The sparse gradient is read as it comes, duplicates side by side.
    names = [name for name, _ in net.named_parameters()]
    tops = dict(zip(names, gradients_TP.max(0), strict=True))
    expected |= {f"gradient_max/{name}": top for name, top in tops.items() if name != "table.weight"}
    expected |= {f"clip_factor/{n}": float(optimizers[0].state[p]["clip_factor"]) for n, p in net.dense()}
    assert steps[10].pop("gradient_max/table.weight") <= 16 * tops["table.weight"]
    assert steps[10] == pytest.approx(expected, rel=1e-5)


def test_losses_that_are_not_finite_are_left_out_of_the_mean_and_shown_as_the_largest() -> None:
    net = Net()
    optimizers = optimizers_of(net)
    watch, rows = watched(net, optimizers, flush_every=4)
    train(net, optimizers, range(4), watch, bad=[1])
    train(net, optimizers, range(4, 8), watch, spoil=math.inf, bad=range(4, 8))
    watch.flush()
    first, second = columns_of(rows, "steps").values()
    assert all(math.isfinite(first[f"{area}/click"]) for area in ("loss", "loss_max"))
    assert first["gradient_max/heads.weight"] == math.inf
    assert math.isnan(second["loss/click"])
    assert math.isnan(second["loss/total"])
    assert second["loss_max/click"] == math.inf


def test_gradients_that_the_loop_gives_are_those_that_it_would_have_read() -> None:
    found = []
    for given in (False, True):
        net = Net()
        optimizers = optimizers_of(net)
        watch, rows = watched(net, optimizers)
        for step in range(8):
            losses_K, _ = losses_of(net, step)
            watch.losses(losses_K)
            losses_K.sum().backward()
            net.trunk[0].bias.grad = None
            held = [p.grad for o in optimizers for group in o.param_groups for p in group["params"]]
            values = [g._values() if g.is_sparse else g for g in held if g is not None]
            if given:
                watch.gradients(torch.stack([value.abs().max() for value in values]))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        watch.close()
        assert "gradient_max/trunk.0.bias" not in columns_of(rows, "steps")[8]
        found.append(as_text(rows))
    assert found[0] == found[1]


def test_a_step_that_a_scaler_leaves_out_has_no_readings_of_weights() -> None:
    net = Net()
    optimizer = torch.optim.SGD([p for _, p in net.dense()], lr=0.01)
    watch, rows = watched(net, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(1, 9):
        losses_K, _ = losses_of(net, step)
        if step == 4:
            losses_K = losses_K * math.inf
        watch.losses(losses_K)
        scaler.scale(losses_K.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    watch.close()
    dynamics = columns_of(rows, "dynamics")
    assert [step for step, row in dynamics.items() if "update_over_bound/heads.weight" in row] == [2, 6, 8]
    twin = Net()
    losses_K, _ = losses_of(twin, 1)
    losses_K.sum().backward()
    assert float(twin.heads.weight.grad.abs().max()) <= columns_of(rows, "steps")[8]["gradient_max/heads.weight"] < 64


def test_accumulated_gradients_are_one_step_of_the_batch_that_ends_in_it() -> None:
    net = Net()
    optimizers = optimizers_of(net)
    watch, rows = watched(net, optimizers, flush_every=4)
    for step in range(16):
        losses_K, _ = losses_of(net, step)
        if step % 4 == 3:
            watch.losses(losses_K)
        (losses_K.sum() / 4).backward()
        if step % 4 == 3:
            expected = {n: float(p.grad.abs().max()) for n, p in net.dense()}
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert watch.step == 4
    watch.flush()
    assert columns_of(rows, "tasks").keys() == {4}
    row = columns_of(rows, "steps")[4]
    assert all(row[f"gradient_max/{name}"] >= top for name, top in expected.items())


def test_a_step_without_losses_and_losses_without_a_step_do_no_harm() -> None:
    net = Net()
    optimizers = optimizers_of(net)
    watch, rows = watched(net, optimizers, flush_every=4)
    train(net, optimizers, range(3))
    assert (watch.step, watch.flush()) == (0, {})
    for step in range(4):
        watch.losses(losses_of(net, step)[0])  # of a batch that is then left out
    train(net, optimizers, range(4), watch)
    train(net, optimizers, range(2))
    watch.close()
    dynamics = columns_of(rows, "dynamics")
    assert not any(name.startswith("update") for step in (2, 4) for name in dynamics[step])
    assert any(name.startswith("update_norm") for name in dynamics[8])
    assert "gradient_max/heads.weight" not in columns_of(rows, "steps")[4]
    assert "gradient_max/heads.weight" in columns_of(rows, "steps")[8]


def test_of_several_steps_after_one_loss_the_first_is_read() -> None:
    found = []
    for more in (0, 2):
        net = Net()
        optimizers = optimizers_of(net)
        watch, rows = watched(net, optimizers)
        for _ in range(3):
            watch.losses(losses_of(net, 1)[0])
        losses_of(net, 1)[0].sum().backward()
        watch.losses(losses_of(net, 1)[0])
        for _ in range(1 + more):
            for optimizer in optimizers:
                optimizer.step()
        held = len(watch._moved)
        watch.flush()
        dynamics = columns_of(rows, "dynamics")[4]
        found.append(({k: v for k, v in dynamics.items() if not k.startswith("accumulator")}, held))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_a_compiled_model_is_watched_but_for_its_tasks_conflict() -> None:
    found = []
    for compiled in (False, True):
        net = Net()
        optimizers = optimizers_of(net)
        watch, rows = watched(net, optimizers)
        torch.compiler.reset()
        model = torch.compile(net, backend="aot_eager") if compiled else net
        train(model, optimizers, range(8), watch)
        watch.close()
        found.append(rows)
    torch.compiler.reset()
    plain, traced = found
    assert columns_of(traced, "tasks") == {}
    for step, row in columns_of(plain, "dynamics").items():
        assert columns_of(traced, "dynamics")[step] == pytest.approx(row, rel=1e-4, abs=1e-6)


def test_headroom_is_that_of_the_step_just_made() -> None:
    net, twin = Net(), Net()
    optimizers, others = optimizers_of(net), optimizers_of(twin)
    watch, rows = watched(net, optimizers)
    due = []
    for step in range(8):
        watch.keep_update = step == 2
        train(net, optimizers, [step], watch)
        losses_K, _ = losses_of(twin, step)
        losses_K.sum().backward()
        before = copy_before(twin.parameters())
        for optimizer in others:
            optimizer.step()
            optimizer.zero_grad()
        if watch.headroom_is_due:
            due.append(step + 1)
            area = "headroom_next" if step == 2 else "headroom"
            watch.headroom(lambda step=step: losses_of(net, step)[0], area)
            expected = measure_headroom(lambda step=step: losses_of(twin, step)[0], find_updates(before), lr=0.5)
            watch.flush()
            row = columns_of(rows, "curvature")[step + 1]
            assert [row[f"{area}/{name}"] for name in ("total", *TASKS)] == pytest.approx(
                [float(expected.total), *expected.tasks.tolist()], rel=1e-5
            )
            assert ("critical_sharpness/total" in row) == (area == "headroom")
    assert due == [3, 6]


def test_what_somebody_else_asks_of_the_model_meanwhile_is_not_seen() -> None:
    found = []
    for asked in (False, True):
        net = Net()
        optimizers = optimizers_of(net)
        watch, rows = watched(net, optimizers)
        for step in range(8):
            rows_B, labels_BK = batch_of(step)
            losses_K = (net(rows_B) - labels_BK).square().mean(0)
            if asked:
                with watch.paused():
                    net(torch.zeros(5, dtype=torch.int64))
                net.eval()
                net(torch.ones(5, dtype=torch.int64))
                net.train()
            watch.losses(losses_K)
            losses_K.sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        watch.close()
        found.append(as_text(rows))
    assert found[0] == found[1]


def test_the_hooks_are_gone_after_close_and_training_goes_on_unseen() -> None:
    net = Net()
    optimizers = optimizers_of(net)
    watch, rows = watched(net, optimizers)
    hooks = lambda: sum(  # noqa: E731
        len(each)
        for each in [
            *(module._forward_hooks for module in net.modules()),
            *(o._optimizer_step_pre_hooks for o in optimizers),
            *(o._optimizer_step_post_hooks for o in optimizers),
        ]
    )
    assert hooks() == 2 + 1 + 4
    train(net, optimizers, range(4), watch)
    watch.close()
    assert hooks() == 0
    seen = len(rows)
    train(net, optimizers, range(4, 8))
    assert len(rows) == seen


@pytest.mark.parametrize("stop", [7, 20, 33])
def test_a_run_that_is_resumed_sees_what_a_straight_one_sees(tmp_path: Path, stop: int) -> None:
    def run(cut: bool) -> tuple[list[str], Watch]:
        net = Net()
        optimizers = optimizers_of(net, adam)
        watch, rows = watched(net, optimizers, flush_every=8)
        train(net, optimizers, range(stop), watch, bad=[3])
        folder = RunFolder.create(tmp_path / str(cut))
        folder.checkpoints.save(stop, {"watch": watch.state_dict()})  # refuses what it could not load
        if cut:
            watch.close()
            rows_so_far = rows
            watch, rows = watched(net, optimizers, flush_every=8)
            watch.load_state_dict(folder.checkpoints.load()["watch"])
            rows[:0] = rows_so_far
        train(net, optimizers, range(stop, 48), watch)
        watch.close()
        return as_text(rows), watch

    (one, straight), (other, resumed) = run(False), run(True)
    assert one == other
    assert straight.alerts == resumed.alerts != []
    assert straight.changes[: len(resumed.changes)] == resumed.changes
    assert straight.verdicts.summary() == resumed.verdicts.summary()
    for a, b in zip(straight.recent(), resumed.recent(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_rate_that_is_far_too_high_raises_the_alarm_before_the_loss_is_lost(tmp_path: Path) -> None:
    net = Net()
    optimizers = optimizers_of(net, lambda named: torch.optim.Adam(named, lr=0.3))
    config = WatchConfig(look_every=2, dynamics_every=10, warning={"update_warm_up": 5})
    watch = Watch(net, optimizers, dict.fromkeys(TASKS, "regression"), config=config, out=tmp_path / "run")
    train(net, optimizers, range(40), watch)
    said = watch.close()
    first = next(alert for alert in watch.alerts if alert.level == "alarm")
    assert first.sign == "update"
    assert first.step == 6
    assert f"step {first.step}: alarm: steps are too large" in said
    [event] = [event for event in RunFolder.open(tmp_path / "run").events() if event.get("sign") == "update"]
    assert (event["kind"], event["step"], event["level"]) == ("warning", first.step, "alarm")
    assert event["quantities"]["update_over_bound"] > 1.1


def test_a_poisoned_batch_is_named_with_its_step_and_layer() -> None:
    net = Net()
    optimizers = optimizers_of(net)
    watch, _ = watched(net, optimizers)
    train(net, optimizers, range(60), watch, spoil=1e4, bad=[55])
    watch.close()
    [alert] = watch.alerts
    assert (alert.step, alert.sign) == (56, "gradient")
    assert alert.layer in {name for name, _ in net.dense()}  # a table's largest gradient is a lottery
    assert [change.verdict for change in watch.changes] == []


def test_a_table_that_gets_its_first_gradient_late_is_still_a_table() -> None:
    net = Net()
    optimizers = optimizers_of(net)
    watch, _ = watched(net, optimizers)
    for step in range(80):
        losses_K, _ = losses_of(net, step)
        watch.losses(losses_K)
        losses_K.sum().backward()
        if step == 0:
            net.table.weight.grad = None
        elif step == 70:
            net.table.weight.grad = net.table.weight.grad * 1e4
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    watch.close()
    assert watch.alerts == []


def test_recent_steps_are_those_that_were_flushed() -> None:
    net = Net()
    optimizers = optimizers_of(net)
    watch, _ = watched(net, optimizers, flush_every=0)
    train(net, optimizers, range(6), watch)
    watch.flush()
    assert watch.recent()[0].tolist() == [1, 2, 3, 4, 5, 6]
    train(net, optimizers, range(6, 9), watch)  # of which the last is still open
    steps_T, losses_TK, gradients_TP = watch.recent()
    assert steps_T.tolist() == [1, 2, 3, 4, 5, 6]
    assert losses_TK.shape == (6, 2)
    assert gradients_TP.shape == (6, 7)


def test_the_numbers_of_rows_are_exact() -> None:
    table = nn.Embedding(3_000_001, 1, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    fields = [Field("user", "weight", 0, 1_000_000), Field("item", "weight", 1_000_000, 2_000_001)]
    watch, rows = watched(table, optimizer, tasks=("click",), fields=fields, config=WatchConfig(dynamics_every=1))
    with torch.no_grad():
        table.weight[2_234_567] = 9.0
    loss = table(torch.tensor([2_234_567, 999_999, 5])).sum()
    watch.losses(loss[None])
    loss.backward()
    optimizer.step()
    watch.flush()
    row = columns_of(rows, "dynamics")[1]
    assert row["row_norm_max_row/item"] == 1_234_567.0
    assert row["rows_touched/user"] == 2


def test_a_loop_of_ones_own_leaves_a_run_folder_that_tells_its_story(tmp_path: Path) -> None:
    net = Net()
    optimizers = optimizers_of(net, adam)
    watch = Watch(net, optimizers, {"click": "binary", "like": "regression"}, config=OFTEN, out=tmp_path / "run")
    train(net, optimizers, range(70), watch, spoil=200.0, bad=range(61, 66))
    assert RunFolder.open(tmp_path / "run").readings("dynamics")["step"][-1] == 60  # a crash loses one flush
    watch.close()
    run = RunFolder.open(tmp_path / "run")
    summary = run.summary()
    assert {task: summary["tasks"][task]["kind"] for task in TASKS} == {"click": "binary", "like": "regression"}
    assert summary["steps"] == 70
    verdict = summary["tasks"]["click"]["verdict"]
    assert verdict["verdict"] in ("micro_divergence", "full_divergence")
    assert verdict["since"] == 62
    kinds = [(event["kind"], event["step"]) for event in run.events()]
    assert ("warning", 62) in kinds
    assert "verdict" in {kind for kind, _ in kinds}
    assert run.readings("steps")["step"].tolist() == [20, 40, 60, 70]
    assert run.readings("tasks")["step"].tolist() == list(range(4, 71, 4))
    page = write_report(run).read_text()
    assert "divergence" in page
    assert "task_cosine" in page or "cosine" in page
    json.dumps(summary)


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ((), {}, "expected at least one task"),
        ("click", {}, "expected at least one task, found 'click'; name the losses"),
        (("click", "click"), {}, "expected tasks of different names"),
        (TASKS, {"shared": "trunc"}, "no module 'trunc'; did you mean 'trunk'"),
        (TASKS, {"fields": [Field("user", "table.weight", 0, 3)]}, "table.weight has 30 rows, and its fields have 3"),
    ],
)
def test_what_cannot_be_watched_is_refused_and_leaves_no_folder(
    tmp_path: Path, tasks: Any, options: dict[str, Any], message: str
) -> None:
    net = Net()
    with pytest.raises(ConfigError, match=message):
        Watch(net, optimizers_of(net), tasks, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_kind_of_task_that_there_is_not_is_refused() -> None:
    find = inspect.unwrap(find_kinds)  # without the tests' own check of types
    with pytest.raises(ConfigError, match="no kind of task 'binery'; did you mean 'binary'"):
        find({"click": "binery"})


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (16, 2)])
def test_losses_of_another_number_are_refused(shape: tuple[int, ...]) -> None:
    net = Net()
    watch, _ = watched(net, optimizers_of(net))
    losses = inspect.unwrap(Watch.losses)  # without the tests' own check of shapes
    with pytest.raises(ConfigError, match=r"2 tasks, found a tensor of shape .*; give the mean over the rows of each"):
        losses(watch, torch.ones(shape))
    with pytest.raises(ConfigError, match=r"expected logits \[rows, 2\]"):
        losses(watch, torch.ones(2), logits=torch.ones(16))
    assert watch.step == 0


def test_without_a_module_that_is_shared_the_rest_is_read() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watch, rows = watched(net, optimizer)
    for _ in range(4):
        losses_K = net(torch.ones(5, 3)).square().mean(0)
        watch.losses(losses_K)
        losses_K.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    assert columns_of(rows, "tasks") == {}
    assert columns_of(rows, "dynamics").keys() == {2, 4}


def test_a_batch_without_rows_is_seen_without_harm() -> None:
    net = Net()
    optimizers = optimizers_of(net)
    watch, rows = watched(net, optimizers)
    train(net, optimizers, range(3), watch)
    logits_BK = net(torch.zeros(0, dtype=torch.int64))
    watch.losses(logits_BK.sum(0), logits=logits_BK)
    logits_BK.sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    train(net, optimizers, range(4, 8), watch)
    watch.close()
    row = columns_of(rows, "dynamics")[4]
    assert row["gradient_norm/heads.weight"] == 0
    assert not any(name.startswith(("logit", "dead", "rows")) for name in row)
    assert watch.alerts == []
