"""The monitors against twins in numpy, and the promises that all of them keep: no sync, no change, no memory of NaN."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steadyrank import ClippyAdagrad, ClipUpdates, ConfigError, RowWiseAdagrad, Watch, WatchConfig
from steadyrank.monitors.dynamics import Dynamics
from steadyrank.monitors.readings import Reading, fetch
from steadyrank.monitors.tables import Field, Tables, effective_rank
from steadyrank.monitors.tasks import TaskConflict
from steadyrank.monitors.warning import Alert, EarlyWarning, WarningConfig
from steadyrank.report import write_report
from steadyrank.runs import RunFolder
from steadyrank.testing import forbid_host_sync

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]
OFTEN = WatchConfig(look_every=2, dynamics_every=4, tasks_every=4, rank_every=4, curvature_every=8)


class Model(nn.Module):
    """A sparse table, a shared trunk and two heads."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 4, sparse=sparse)
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(2))

    def forward(self, rows: Tensor) -> Tensor:
        h = self.trunk(self.table(rows))
        return torch.cat([head(h) for head in self.heads], 1)

    def losses(self, step: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(step)
        rows, labels = torch.randint(0, 20, (16,), generator=draw), torch.randn(16, 2, generator=draw)
        logits = self(rows)
        return (logits - labels).square().mean(0), logits


def make_optimizers(model: Model, make: Make) -> list[torch.optim.Optimizer]:
    dense = [(n, p) for n, p in model.named_parameters() if not n.startswith("table")]
    return [make(dense), RowWiseAdagrad([("table.weight", model.table.weight)], lr=0.1)]


def train(
    model: Model, optimizers: list[torch.optim.Optimizer], steps: range, watch: Watch | None = None, bad: int = -1
) -> None:
    for step in steps:
        losses, logits = model.losses(step)
        if watch is not None:
            watch.losses(losses, logits=logits)
        losses.sum().backward()
        if step == bad:
            for p in model.trunk.parameters():
                p.grad.fill_(torch.nan)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def adam(named: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.Adam(named, lr=0.01)


def clippy(named: Iterable[Any]) -> torch.optim.Optimizer:
    return ClippyAdagrad(named, lr=0.5)


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda named: torch.optim.SGD(named, lr=0.1),
    "adagrad": lambda named: torch.optim.Adagrad(named, lr=0.1),
    "adam": adam,
    "clippy": clippy,
    "updates": lambda named: ClipUpdates(torch.optim.Adam(named, lr=torch.tensor(0.1))),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_dynamics_read_what_a_twin_in_float64_reads(make: Make) -> None:
    model = Model()
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith("table")]
    optimizer = make(named)
    train(model, [optimizer], range(5))
    dynamics = Dynamics(named, [optimizer])
    losses, _ = model.losses(5)
    losses.sum().backward()
    before = {n: p.detach().double().numpy().copy() for n, p in named}
    gradients = {n: p.grad.double().numpy().copy() for n, p in named}
    dynamics.before()
    optimizer.step()
    found = fetch(dynamics.after())
    inner = getattr(optimizer, "optimizer", optimizer)
    for name, p in named:
        w, g = before[name], gradients[name]
        u = w - p.detach().double().numpy()
        sigma = float(optimizer.state[p].get("clip_factor", inner.state[p].get("clip_factor", torch.ones(()))))
        r = u / (float(optimizer.param_groups[0]["lr"]) * sigma)
        over = (abs(u) / (0.5 * abs(w) + 0.01)).max()
        units = (g, w) if g.ndim > 1 else (g[None], w[None])
        expected = {
            "gradient_norm": np.linalg.norm(g),
            "weight_norm": np.linalg.norm(w),
            "update_norm": np.linalg.norm(u),
            "gradient_over_weight": np.linalg.norm(g) / np.linalg.norm(w),
            "update_over_weight": np.linalg.norm(u) / np.linalg.norm(w),
            "update_max": abs(u).max(),
            "update_over_weight_max": (abs(u) / np.maximum(abs(w), 1e-3)).max(),
            "update_over_bound": over,
            "direction_max": abs(r).max(),
            "factor_gc": min(1, 0.1 / np.linalg.norm(g)),
            "factor_agc": min(
                1,
                min(
                    0.01 * max(np.linalg.norm(w_u), 1e-3) / np.linalg.norm(g_u)
                    for g_u, w_u in zip(*units, strict=True)
                    if np.linalg.norm(g_u) > 0
                ),
            ),
            "factor_lamb": np.linalg.norm(w) / np.linalg.norm(r),
            "factor_clippy": min(1, sigma / over),
        }
        for area, value in expected.items():
            # u is a difference of float32 weights: good for a few digits where the step is small.
            assert found[f"{area}/{name}"] == pytest.approx(value, rel=2e-3), area


def test_the_hypothetical_factor_of_clippy_is_the_one_that_clippy_used() -> None:
    model = Model()
    optimizers = make_optimizers(model, clippy)
    rows: list[tuple[str, int, dict[str, float]]] = []
    watch = Watch(model, optimizers, ("a", "b"), config=OFTEN, write=lambda t, s, row: rows.append((t, s, dict(row))))
    train(model, optimizers, range(4), watch)
    watch.flush()
    [full] = [row for table, step, row in rows if table == "dynamics" and step == 4]
    factors = {n: float(optimizers[0].state[p]["clip_factor"]) for n, p in model.named_parameters() if "table" not in n}
    assert min(factors.values()) < 1
    for name, factor in factors.items():
        assert full[f"factor_clippy/{name}"] == pytest.approx(factor, rel=1e-3)


@pytest.mark.parametrize("make", [adam, clippy], ids=["adam", "clippy"])
def test_training_is_the_same_to_the_bit_and_nothing_waits_for_the_device(make: Make) -> None:
    plain, watched = Model(), Model()
    optimizers = make_optimizers(plain, make)
    train(plain, optimizers, range(24))
    held = make_optimizers(watched, make)
    watch = Watch(watched, held, ("a", "b"), config=OFTEN, flush_every=0)
    for step in range(24):
        losses, logits = watched.losses(step)
        with forbid_host_sync():
            watch.losses(losses, logits=logits)
        losses.sum().backward()
        for part in watch._parts:
            with forbid_host_sync():
                watch._before(part)
        for optimizer in held:
            optimizer.step()
            optimizer.zero_grad()
        if watch.headroom_is_due:
            with forbid_host_sync():
                watch.headroom(lambda step=step: watched.losses(step)[0].detach())
    watch.flush()
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_nan_shows_at_its_own_step_and_is_not_remembered() -> None:
    def watched(bad: int) -> list[tuple[str, int, dict[str, float]]]:
        model, rows = Model(), []
        optimizers = make_optimizers(model, clippy)
        watch = Watch(model, optimizers, ("a", "b"), config=OFTEN, write=lambda t, s, r: rows.append((t, s, dict(r))))
        train(model, optimizers, range(12), watch, bad)
        watch.flush()
        # Clippy refuses the step for the trunk only, so what is compared are the verdicts and the warning's memory.
        assert watch.warning._band.count()[:-1].min() >= 11  # but the table, whose gradients are not judged
        return rows

    rows = watched(bad=7)
    at = {step: row for table, step, row in rows if table == "dynamics"}
    assert np.isnan(at[8]["gradient_norm/trunk.0.weight"])
    assert np.isfinite(at[12]["gradient_norm/trunk.0.weight"])
    assert at[8]["update_norm/trunk.0.weight"] == 0


def test_the_gradient_that_is_not_finite_raises_an_alarm_that_names_it() -> None:
    model = Model()
    optimizers = make_optimizers(model, clippy)
    watch = Watch(model, optimizers, ("a", "b"), config=OFTEN)
    train(model, optimizers, range(12), watch, bad=7)
    watch.flush()
    [alert] = watch.alerts
    assert (alert.step, alert.level, alert.sign) == (8, "alarm", "gradient")
    assert alert.layer.startswith("trunk.0")
    assert "not finite" in alert.reason


def test_several_flushes_and_a_resume_see_the_same(tmp_path: Path) -> None:
    def rows_of(stop: int | None) -> list[tuple[str, int, str]]:
        rows: list[tuple[str, int, str]] = []
        write = lambda t, s, r: rows.append((t, s, str(dict(r))))  # noqa: E731
        model = Model()
        optimizers = make_optimizers(model, adam)
        watch = Watch(model, optimizers, ("a", "b"), config=OFTEN, flush_every=8, write=write)
        train(model, optimizers, range(stop or 32), watch)
        watch.flush()
        if stop:
            run = RunFolder.create(tmp_path / "run")
            run.checkpoints.save(stop, {"watch": watch.state_dict()})
            fresh = Watch(model, optimizers, ("a", "b"), config=OFTEN, flush_every=8, write=write)
            for handle in watch._handles:
                handle.remove()
            fresh.load_state_dict(run.checkpoints.load()["watch"])
            train(model, optimizers, range(stop, 32), fresh)
            fresh.flush()
        return rows

    assert rows_of(16) == rows_of(None)


def test_conflict_is_the_gradient_at_the_representation() -> None:
    torch.manual_seed(1)
    trunk, heads = nn.Linear(3, 5), nn.Linear(5, 3)
    conflict = TaskConflict(trunk, ["a", "b", "c"], loss_weights=[1.0, 2.0, 0.5])
    conflict.active = True
    h = trunk(torch.randn(7, 3))
    losses = heads(h).square().mean(0)
    found = fetch(conflict.read(losses))
    g = np.stack(
        [
            w * torch.autograd.grad(losses[k], h, retain_graph=True)[0].numpy().ravel()
            for k, w in enumerate((1.0, 2.0, 0.5))
        ]
    )
    total = g.sum(0)
    for k, name in enumerate("abc"):
        assert found[f"task_gradient_norm/{name}"] == pytest.approx(np.linalg.norm(g[k]), rel=1e-5)
        assert found[f"task_share_frac/{name}"] == pytest.approx(g[k] @ total / (total @ total), rel=1e-4)
    cosine = g[0] @ g[2] / np.linalg.norm(g[0]) / np.linalg.norm(g[2])
    assert found["task_cosine/a|c"] == pytest.approx(cosine, rel=1e-4)
    losses.sum().backward()  # the graph is still whole


def test_tables_read_what_numpy_reads_over_duplicates_and_fields() -> None:
    rng = np.random.default_rng(0)
    table = nn.Parameter(torch.from_numpy(rng.normal(size=(30, 3)).astype(np.float32)))
    tables = Tables([("t", table)], [Field("user", "t", 0, 10), Field("item", "t", 10, 15), Field("rare", "t", 25, 5)])
    first: dict[int, int] = {}
    for step in (10, 20, 30):
        rows = rng.integers(0, 25, size=12)
        values = torch.from_numpy(rng.normal(size=(12, 3)).astype(np.float32))
        table.grad = torch.sparse_coo_tensor(rows[None], values, (30, 3), check_invariants=True)
        before = table.detach().numpy().copy()
        tables.before()
        torch.optim.SGD([table], lr=0.5).step()
        found = fetch(tables.after(step, rank=step == 30))
        for row in rows.tolist():
            first.setdefault(row, step)
        for name, low, high in (("user", 0, 10), ("item", 10, 25)):
            touched = np.unique(rows[(rows >= low) & (rows < high)])
            moved = np.linalg.norm(before - table.detach().numpy(), axis=1)[touched]
            norms = np.linalg.norm(table.detach().numpy(), axis=1)[touched]
            worst = int(touched[norms.argmax()])
            assert found[f"rows_touched/{name}"] == len(touched)
            assert found[f"row_update_max/{name}"] == pytest.approx(moved.max(), rel=1e-5)
            assert found[f"row_norm_max/{name}"] == pytest.approx(norms.max(), rel=1e-5)
            assert found[f"row_norm_max_row/{name}"] == worst - low
            assert found[f"row_norm_max_age_steps/{name}"] == step - first[worst]
        assert found["rows_touched/rare"] == 0
        assert np.isnan(found["row_norm_max/rare"])
    ranks = fetch(tables.read_rank())
    assert 1 <= ranks["effective_rank/user"] <= 3
    assert np.isnan(ranks["effective_rank/rare"])


def test_effective_rank_is_that_of_numpys_singular_values() -> None:
    x = np.random.default_rng(0).normal(size=(40, 6)) * np.array([5.0, 3.0, 1.0, 0.5, 0.1, 0.0])
    s = np.linalg.svd(x, compute_uv=False)
    p = s[s > 1e-9] / s.sum()
    assert effective_rank(torch.from_numpy(x).float()).item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert effective_rank(torch.full((3, 2), torch.nan)).isnan()


def calm(steps: int, signals: int = 2) -> np.ndarray:
    return 0.1 * np.exp(0.2 * np.random.default_rng(0).normal(size=(steps, signals)))


def test_warnings_keep_silent_where_all_is_calm() -> None:
    early = EarlyWarning(["a"], ["w"])
    assert early.add_steps(1, calm(400, 1), calm(400, 1)) == []
    for step in range(10, 400, 10):
        assert early.add_dynamics(step, {"update_over_bound/w": 0.9, "dead_frac/all": 0.3}) == []


def test_updates_beyond_the_bound_are_an_alarm_only_where_half_of_the_matrices_show_them() -> None:
    def alarms(values: dict[str, float]) -> list[Alert]:
        early = EarlyWarning(["a"], ["w1", "w2", "w3", "b"], matrices=["w1", "w2", "w3"])
        rows = [{f"update_over_bound/{name}": v for name, v in values.items()}] * 3
        return [alert for i, row in enumerate(rows) for alert in early.add_dynamics(200 + 10 * i, row)]

    assert alarms({"w1": 9.0, "w2": 0.1, "w3": 0.2, "b": 9.0}) == []
    [alert] = alarms({"w1": 9.0, "w2": 1.5, "w3": 0.2, "b": 0.0})
    assert (alert.level, alert.sign, alert.layer, alert.step) == ("alarm", "update", "w1", 220)
    assert alert.quantities == {"update_over_bound": 1.5}
    assert EarlyWarning(["a"], ["w"]).add_dynamics(50, {"update_over_bound/w": 9.0}) == []


def test_a_leap_out_of_the_band_is_an_alarm_once_and_nan_does_not_blind() -> None:
    early = EarlyWarning(["a"], ["w"], WarningConfig(quiet_steps=100))
    gradients = calm(300, 1)
    gradients[60:80] = np.nan
    gradients[200:220] *= 40
    found = []
    for first in range(0, 300, 20):
        found += early.add_steps(first + 1, calm(20, 1), gradients[first : first + 20])
    assert [(alert.step, alert.sign, alert.layer) for alert in found] == [(201, "gradient", "w")]
    assert early.add_steps(302, calm(1, 1), np.array([[np.inf]]))[0].quantities["times"] == np.inf


def test_dead_units_give_a_notice() -> None:
    early = EarlyWarning(["a"], ["w"], WarningConfig(dead_looks=3))
    found = []
    for i, dead in enumerate((0.2, 0.2, 0.3, 0.4, 0.7, 0.9)):
        found += early.add_dynamics(200 + 10 * i, {"dead_frac/all": dead})
    assert [(alert.level, alert.sign) for alert in found] == [("notice", "dead_units")]


@pytest.mark.parametrize("cut", range(20, 300, 60))
def test_warnings_resume_as_if_never_stopped(cut: int) -> None:
    gradients = calm(300, 2)
    gradients[210:230] *= 50

    def go(stop: int | None) -> list[Alert]:
        early, found = EarlyWarning(["a"], ["w"]), []
        for first in range(0, 300, 20):
            if first == stop:
                state = early.state_dict()
                early = EarlyWarning(["a"], ["w"])
                early.load_state_dict(copy.deepcopy(state))
            part = gradients[first : first + 20]
            found += early.add_steps(first + 1, part[:, :1], part[:, 1:])
            found += early.add_dynamics(first + 20, {"update_over_bound/w": 2.0 if first > 150 else 0.5})
        return found

    assert go(cut) == go(None)
    assert len(go(None)) >= 2


def test_a_loop_of_ones_own_leaves_a_run_that_can_be_reported(tmp_path: Path) -> None:
    model = Model()
    optimizers = make_optimizers(model, adam)
    watch = Watch(model, optimizers, {"a": "regression", "b": "regression"}, config=OFTEN, out=tmp_path / "run")
    train(model, optimizers, range(60), watch)
    said = watch.close()
    assert said.splitlines()[0] == "60 steps, no warning"
    run = RunFolder.open(tmp_path / "run")
    assert run.readings("steps")["step"].tolist() == [20, 40, 60]
    assert np.isfinite(run.readings("steps")["loss/a"]).all()
    assert run.readings("tasks")["step"].tolist() == list(range(4, 61, 4))
    assert run.summary()["tasks"]["a"]["verdict"]["verdict"] == "healthy"
    assert "healthy" in write_report(run).read_text()
    handles = len(model.trunk[1]._forward_hooks)
    assert handles == 0


def test_the_step_behind_a_closure_is_seen_as_any_other() -> None:
    def rows_of(closure: bool) -> list[tuple[str, int, str]]:
        model, rows = Model(), []
        dense = [(n, p) for n, p in model.named_parameters() if not n.startswith("table")]
        optimizer = torch.optim.Adagrad(dense, lr=0.1)
        watch = Watch(
            model, optimizer, ("a", "b"), config=OFTEN, write=lambda t, s, r: rows.append((t, s, str(dict(r))))
        )

        def run(step: int) -> Tensor:
            optimizer.zero_grad()
            losses, _ = model.losses(step)
            watch.losses(losses)
            losses.sum().backward()
            return losses.sum()

        for step in range(8):
            if closure:
                optimizer.step(lambda step=step: run(step))
            else:
                run(step)
                optimizer.step()
        watch.flush()
        return rows

    assert rows_of(True) == rows_of(False)
    assert [step for table, step, _ in rows_of(False) if table == "dynamics"] == [2, 4, 6, 8]


def test_what_cannot_be_watched_is_refused_in_plain_words() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.heads.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="at least one task"):
        Watch(model, optimizer, ())
    with pytest.raises(ConfigError, match="no module 'trunc'; did you mean 'trunk'"):
        Watch(model, optimizer, ("a",), shared="trunc")
    watch = Watch(model, optimizer, ("a", "b", "c"))
    with pytest.raises(ConfigError, match=r"3 tasks, found a tensor of shape \[2\]"):
        watch.losses(torch.ones(2))


def test_readings_come_in_one_copy_by_name() -> None:
    readings = [Reading("a", ["x", "y"], torch.tensor([1.0, 2.0])), Reading("b", [], torch.zeros(0))]
    assert fetch(readings) == {"a/x": 1.0, "a/y": 2.0}
    assert fetch([]) == {}
