"""The guard: after a bad step everything is as it was, on a CPU and as on a GPU; a bad row is left out alone."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steadyrank.guard import Totals, forget_step, gradient_limit, judge, judge_together, quarantine
from steadyrank.optim import ClipGradients, ClippyAdagrad, ClippyAdam, ClipUpdates, RowWiseAdagrad, SkipSpikes, ZClip
from steadyrank.optim.configs import OPTIMIZERS
from steadyrank.ranks import Ranks
from steadyrank.schema import Batch, Task
from steadyrank.train import Readings, train_step

from .threads import run_in_threads

training = import_module("steadyrank.train")
guarding = import_module("steadyrank.guard")  # `steadyrank.guard` itself is the function
TASKS = [Task(kind="binary"), Task(kind="regression", loss="huber")]
SETTINGS: dict[str, dict[str, Any]] = {"lamb_adagrad": {"lr": 0.01}}
Make = Callable[[list[nn.Parameter]], Optimizer]


def by_name(name: str) -> Make:
    return lambda params: OPTIMIZERS[name](params, **SETTINGS.get(name, {}))  # type: ignore[call-arg]


DENSE: dict[str, Make] = {
    **{name: by_name(name) for name in OPTIMIZERS},
    "sgd, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adagrad, lr_decay": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1, weight_decay=0.1),
    "clippy_adagrad, fading": lambda p: ClippyAdagrad(p, half_life=3.0, weight_decay=0.1),
    "clippy_adam, calibrated": lambda p: ClippyAdam(p, lr=0.1, calibration_steps=2, telemetry=True),
    "adamw, z_clip": lambda p: ClipGradients(torch.optim.AdamW(p, lr=0.1), ZClip(warmup=2)),
    "sgd, skip_spikes": lambda p: ClipGradients(torch.optim.SGD(p, lr=0.1), SkipSpikes(window=2)),
    "clippy_adam, z_clip": lambda p: ClipGradients(ClippyAdam(p, lr=0.1), ZClip(warmup=2)),
    "adamw, updates": lambda p: ClipUpdates(torch.optim.AdamW(p, lr=0.1)),
    "sgd, updates, not guarded": lambda p: ClipUpdates(torch.optim.SGD(p, lr=0.1, momentum=0.9), guard=False),
}
SPARSE: dict[str, Make] = {
    **{name: by_name(name) for name in OPTIMIZERS if name not in ("adam", "adamw")},
    "sparse_adam": lambda p: torch.optim.SparseAdam(p, lr=0.1),
    "clippy_adagrad, fading": lambda p: ClippyAdagrad(p, half_life=3.0, weight_decay=0.1, granularity="row"),
    "sgd, z_clip": lambda p: ClipGradients(torch.optim.SGD(p, lr=0.1), ZClip(warmup=2)),
    "adagrad, updates": lambda p: ClipUpdates(torch.optim.Adagrad(p, lr=0.1)),
}
BOTH = [pytest.param(make, False, id=name) for name, make in DENSE.items()]
BOTH += [pytest.param(make, True, id=f"{name}, sparse") for name, make in SPARSE.items()]
torch.sparse.check_sparse_tensor_invariants.disable()  # torch's Adagrad warns unless somebody has said no
COUNTERS = ("step", "bad_steps")


class Small(nn.Module):
    """A table, a running statistic of each kind, and a layer."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 3, sparse=sparse)
        self.norm = nn.BatchNorm1d(5)
        self.layer = nn.Linear(5, 2)

    def forward(self, batch: Batch) -> Tensor:
        return self.layer(self.norm(torch.cat([self.table(batch.ids[:, 0]), batch.numbers], 1)))


def draw(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    none = torch.zeros(12, 0, dtype=torch.int64)
    labels = torch.randint(2, (12, 2), generator=generator).float()
    zero = torch.zeros(12, dtype=torch.int64)
    ids = torch.randint(20, (12, 1), generator=generator)
    return Batch(ids, (), torch.randn(12, 2, generator=generator), none, labels, torch.ones(12, 2), zero, zero)


def build(make: Make, sparse: bool) -> tuple[Small, list[Optimizer]]:
    """The table has `make`'s optimizer if it is sparse, and all the rest otherwise."""
    model = Small(sparse)
    if not sparse:
        return model.train(), [make(list(model.parameters()))]
    rest = [*model.norm.parameters(), *model.layer.parameters()]
    return model.train(), [make([model.table.weight]), torch.optim.SGD(rest, lr=0.1)]


def snapshot(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    """Return all tensors of the model and of the optimizers' states, by name."""
    found: dict[str, Any] = dict(model.state_dict())
    for number, optimizer in enumerate(optimizers):
        saved = optimizer.state_dict()
        for index, state in saved["state"].items():
            found |= {f"{number}.{index}.{key}": value for key, value in state.items() if value is not None}
        for index, (_, inner) in enumerate((key, one) for key, one in saved.items() if key == "rule"):
            found |= {f"{number}.rule.{index}.{key}": value for key, value in inner.items()}
    return copy.deepcopy(found)


def differing(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    def differ(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return not torch.equal(a, b)
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() != b.keys() or any(differ(a[key], b[key]) for key in a)
        return bool(a != b)

    names = first.keys() | second.keys()
    return {name for name in names if name not in first or name not in second or differ(first[name], second[name])}


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for room in (training, guarding):
            patch.setattr(room, "may_ask", lambda device: False)
        yield


def spoil(model: Small, batch: Batch, kind: str) -> Callable[[], None]:
    """Make a step bad; the result undoes it."""
    if kind == "label":
        batch.labels[3, 1] = torch.nan
        return lambda: None
    bad = {"nan": torch.nan, "inf": torch.inf, "large": 1e15}[kind]

    def poison(parameter: Tensor) -> None:
        assert parameter.grad is not None
        values = parameter.grad._values() if parameter.grad.is_sparse else parameter.grad
        values[1, 0] = bad

    return model.table.weight.register_post_accumulate_grad_hook(poison).remove


@pytest.mark.parametrize(("make", "sparse"), BOTH)
@pytest.mark.parametrize("gpu", [False, True], ids=["asked", "selected"])
def test_a_run_with_bad_steps_is_the_run_that_never_saw_them(
    make: Make, sparse: bool, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for bad_at in ({0: "label", 2: "nan", 3: "large", 5: "inf"}, {}):
        model, optimizers = build(make, sparse)
        for number in range(7):
            batch = draw(number)
            undo = spoil(model, batch, bad_at[number]) if number in bad_at else None
            if not bad_at and number in (0, 2, 3, 5):
                continue
            with as_on_a_gpu(monkeypatch) if gpu else monkeypatch.context():
                step = train_step(model, optimizers, batch, TASKS)
            assert bool(step.verdict.ok) is (undo is None)
            if undo is not None:
                undo()
                if not step.asked:  # SparseAdam counts on the host, in a Python number
                    forget_step(optimizers, list(model.parameters()))
        runs.append(snapshot(model, optimizers))
    odd = differing(*runs)
    assert {name for name in odd if not name.endswith(COUNTERS)} == set()
    # Ours count a step that they refuse as offered and as refused: what they took in is the same.
    for name in odd:
        stem = name.removesuffix("bad_steps").removesuffix("step")
        taken = [run[f"{stem}step"] - run[f"{stem}bad_steps"] for run in runs]
        assert taken[0] == taken[1] == 3


@pytest.mark.parametrize("name", SPARSE)
def test_a_bad_row_is_left_out_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {}
    for way in ("asked", "selected", "never there"):
        model, optimizers = build(SPARSE[name], sparse=True)
        train_step(model, optimizers, draw(0), TASKS)
        before = snapshot(model, optimizers)
        batch = draw(1)
        bad = batch.ids[:, 0].unique()[[1, 3]]

        def poison(p: Tensor, bad: Tensor = bad, way: str = way) -> None:
            grad = p.grad.coalesce()
            rows, values = grad.indices()[0], grad.values()
            mine = torch.isin(rows, bad)
            if way == "never there":
                rows, values = rows[~mine], values[~mine]
            else:
                values[mine, 1] = torch.nan
            p.grad = torch.sparse_coo_tensor(rows[None], values, p.shape, is_coalesced=True, check_invariants=True)

        model.table.weight.register_post_accumulate_grad_hook(poison)
        with as_on_a_gpu(monkeypatch) if way == "selected" else monkeypatch.context():
            step = train_step(model, optimizers, batch, TASKS, quarantine_rows=True)
        assert bool(step.verdict.ok)
        found = 0 if way == "never there" else 2
        assert step.verdict.quarantined[:, 1].tolist() == [found]
        assert bool(step.verdict.largest.isfinite().all())
        runs[way] = after = snapshot(model, optimizers)
        for key, value in after.items():
            if isinstance(value, Tensor) and value.dim() and len(value) == 20:  # weights, and states by row
                assert torch.equal(value[bad], before[key][bad])
        others = batch.ids[~torch.isin(batch.ids, bad)].unique()
        moved = after["table.weight"][others] != before["table.weight"][others]
        assert bool(moved.any(1).all())
    assert differing(runs["asked"], runs["never there"]) == set()
    if name not in ("lamb", "lamb_adagrad", "stable_adamw"):  # whose factor for the whole table counts the rows
        for key, value in runs["selected"].items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(value, runs["asked"][key])


@pytest.mark.parametrize("gpu", [False, True], ids=["asked", "selected"])
def test_rows_are_named_and_counted_and_only_in_steps_that_were_made(
    gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizers = build(RowWiseAdagrad, sparse=True)
    readings = Readings(["a", "b"], model.named_parameters(), optimizers)
    bad_rows: list[int] = []

    def poison(p: Tensor) -> None:
        grad = p.grad.coalesce()
        grad.values()[torch.isin(grad.indices()[0], torch.tensor(bad_rows)), 2] = -torch.inf
        p.grad = grad

    model.table.weight.register_post_accumulate_grad_hook(poison)
    every = sorted(set(draw(0).ids[:, 0].tolist()))
    for number, bad in enumerate([[], every[:1], every[2:6], every, every[:2]], start=1):
        bad_rows[:] = bad
        batch = draw(0)
        if number == 5:
            batch.labels[0, 0] = torch.nan
        with as_on_a_gpu(monkeypatch) if gpu else monkeypatch.context():
            readings.add(number, train_step(model, optimizers, batch, TASKS, quarantine_rows=True))
    row = readings.fetch()
    assert row["quarantined_rows/total"] == readings.quarantined_rows == 1 + 4 + len(every)
    assert row["bad_steps/total"] == 1
    assert [(found.step, found.count, found.rows) for found in readings.quarantined] == [
        (2, 1, tuple(every[:1])),
        (3, 4, tuple(every[2:5])),
        (4, len(every), tuple(every[:3])),
    ]
    first, second = map(str, readings.quarantined[:2])
    assert first == f"step 2: gradient not finite: row of table.weight left out ({every[0]})"
    assert second.endswith(f"4 rows of table.weight left out ({every[2]}, {every[3]}, {every[4]}, ...)")
    assert readings.first_bad.tasks == ("a",)
    assert "table.weight" not in readings.first_bad.parameters  # rows are no reason for a bad step
    bad_rows.clear()
    readings.add(6, train_step(model, optimizers, draw(6), TASKS, quarantine_rows=True))
    assert readings.fetch()["quarantined_rows/total"] == 5 + len(every)
    assert readings.quarantined == []


@pytest.mark.parametrize("loss", [1.0, torch.nan])
def test_what_ranks_leave_out_is_counted_and_named_by_its_place_in_the_whole_table(loss: float) -> None:
    def hold(bad: list[int]) -> nn.Parameter:
        table = nn.Parameter(torch.ones(4, 2))
        values = torch.ones(3, 2)
        values[[[0, 1, 3].index(row) for row in bad], 1] = torch.nan
        table.grad = torch.sparse_coo_tensor([[0, 1, 3]], values, (4, 2), is_coalesced=True, check_invariants=True)
        return table

    def judge_one(ranks: Ranks) -> list[list[int]]:
        shared, none, part = hold([1]), hold([]), hold([[1], [0, 3]][ranks.rank])
        part.sharded_over = ranks  # type: ignore[attr-defined]
        first = [5_000_000_000, 3][ranks.rank]
        part.sharded_rows = torch.tensor([[4], [first]])  # type: ignore[attr-defined]
        tables = [shared, none, part]
        totals = Totals(torch.tensor(0.5), torch.tensor([0.5, loss]), torch.ones(2))
        verdict, whole = judge_together(ranks, tables, totals, quarantine(tables))
        assert whole.total == 1.0
        assert whole.losses.dtype == torch.float32
        assert bool(verdict.ok) == (loss == 1.0)
        assert verdict.quarantined is not None
        found: list[list[int]] = verdict.quarantined.tolist()
        return found

    counts = [1, 0, 3] if loss == 1.0 else [0, 0, 0]  # in a step that is not made
    rows = [[1, -1, -1], [-1, -1, -1], [3, 6, 5_000_000_001]]  # the last one is no float32
    expected = [[place, count, *named] for place, (count, named) in enumerate(zip(counts, rows, strict=True))]
    assert run_in_threads(2, judge_one) == [expected] * 2


def test_without_quarantine_a_bad_row_is_a_bad_step() -> None:
    model, optimizers = build(RowWiseAdagrad, sparse=True)
    readings = Readings(["a", "b"], model.named_parameters(), optimizers)
    spoil(model, draw(0), "large")
    readings.add(1, train_step(model, optimizers, draw(0), TASKS))
    row = readings.fetch()
    assert "quarantined_rows/total" not in row
    assert row["bad_steps/total"] == 1
    assert str(readings.first_bad) == "step 1: too large to be squared: gradient of table.weight"


@pytest.mark.parametrize(("make", "sparse"), BOTH)
def test_nothing_that_is_not_finite_ever_stays(make: Make, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizers = build(make, sparse)
    dice = random.Random(int(sparse))
    bad_steps = 0
    for number in range(10):
        batch = draw(number)
        value = dice.choice([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 1e19, 3e38])
        where = dice.choice(["numbers", "labels", "weights", "gradient", "nowhere", "nowhere"])
        parameter = dice.choice(list(model.parameters()))
        undo = None
        if where == "gradient":
            undo = parameter.register_post_accumulate_grad_hook(lambda p, value=value: set_one(p, value))
        elif where != "nowhere":
            getattr(batch, where)[dice.randrange(12), dice.randrange(2)] = value
        before = snapshot(model, optimizers)
        with as_on_a_gpu(monkeypatch) if number % 4 else monkeypatch.context():
            step = train_step(model, optimizers, batch, TASKS)
        if undo is not None:
            undo.remove()
        after = snapshot(model, optimizers)
        if not bool(step.verdict.ok):
            bad_steps += 1
            noted = (*COUNTERS, "clip_factor", "trust_ratio", "bind_frac", "binding")
            # Ours make their states in a step that they refuse.
            odd = differing(before, {key: after[key] for key in before})
            assert {name for name in odd if not name.endswith(noted)} == set()
        else:
            assert where != "gradient"
        for name, state in after.items():
            if isinstance(state, Tensor):
                assert bool(state.isfinite().all()), (number, name, where, value)
    assert 0 < bad_steps < 10


def set_one(parameter: Tensor, value: float) -> None:
    grad = parameter.grad
    assert grad is not None
    (grad._values() if grad.is_sparse else grad).view(-1)[0] = value


@pytest.mark.parametrize(("make", "sparse"), BOTH)
def test_the_largest_gradients_that_pass_break_no_state(make: Make, sparse: bool) -> None:
    model, optimizers = build(make, sparse)
    largest = gradient_limit(torch.float32)
    train_step(model, optimizers, draw(0), TASKS)
    for number in range(8):
        for parameter in model.parameters():
            grad = parameter.grad
            (grad._values() if grad.is_sparse else grad).fill_(largest if number % 3 else -largest)
        assert bool(judge(model.parameters(), torch.ones(2)).ok)
        for optimizer in optimizers:
            optimizer.step()
    for name, state in snapshot(model, optimizers).items():
        if isinstance(state, Tensor):
            assert bool(state.isfinite().all()), name
    set_one(next(model.parameters()), 1.01 * largest)
    assert not bool(judge(model.parameters(), torch.ones(2)).ok)


def test_statistics_are_as_before_and_watched_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizers = build(by_name("sgd"), sparse=False)
    readings = Readings(["a", "b"], model.named_parameters(), optimizers)
    readings.add(1, train_step(model, optimizers, draw(0), TASKS))
    before = snapshot(model, optimizers)
    batch = draw(1)
    batch.numbers[0, 0] = 1e30  # the normalised value is finite, and so are losses and gradients; the variance is not
    step = train_step(model, optimizers, batch, TASKS)
    assert bool(step.losses.isfinite().all())
    assert bool(step.verdict.largest.isfinite().all())
    readings.add(2, step)
    readings.fetch()
    assert str(readings.first_bad) == "step 2: not finite: running statistics of the model"
    assert differing(before, snapshot(model, optimizers)) == set()
    assert model.norm.num_batches_tracked == 1


@pytest.mark.parametrize("gpu", [False, True], ids=["asked", "selected"])
def test_buffers_that_are_infinite_on_purpose_are_no_reason_to_refuse(
    gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizers = build(by_name("sgd"), sparse=False)
    model.register_buffer("mask", torch.full((3,), -torch.inf))
    model.register_buffer("least", torch.tensor([torch.inf, torch.inf]))  # a running minimum starts there
    model.register_buffer("seen", torch.zeros(2))
    model.register_buffer("constant", torch.zeros(guarding.LARGE_BUFFER + 1))

    def look(module: nn.Module, args: tuple[Batch]) -> None:
        if module.training:
            module.least = torch.minimum(module.least, torch.tensor([1.0, torch.inf]))  # in place of the old one
            module.seen += args[0].numbers[0]

    model.register_forward_pre_hook(look)
    with as_on_a_gpu(monkeypatch) if gpu else monkeypatch.context():
        assert bool(train_step(model, optimizers, draw(0), TASKS).verdict.ok)
        assert model.least.tolist() == [1.0, torch.inf]
        before = snapshot(model, optimizers)
        for column, bad in ((0, torch.inf), (1, torch.nan)):
            batch = draw(1)
            batch.numbers[0, column] = bad
            assert not bool(train_step(model, optimizers, batch, TASKS).verdict.ok)
            assert differing(before, snapshot(model, optimizers)) == set()


def test_judged_on_a_device_it_is_the_same_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float32]
    parameters = [nn.Parameter(torch.zeros(size, dtype=d)) for size, d in zip((3, 2, 2, 4, 0), dtypes, strict=True)]
    values = [1.0, -2.0, torch.nan, torch.inf, 2e13, -3e38, 6e4]
    dice = random.Random(0)
    for _ in range(40):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
            if parameter.numel() and dice.random() < 0.4:
                parameter.grad[-1] = dice.choice(values)
        losses = torch.tensor([1.0, dice.choice([1.0, 3e38, torch.nan, -torch.inf])])
        now = dice.choice([1.0, torch.nan])
        statistics = [
            (torch.tensor([now]), torch.ones(1)),
            (torch.tensor([torch.inf]).double(), torch.tensor([torch.inf])),
        ]
        here = judge(parameters, losses, None, statistics)
        with as_on_a_gpu(monkeypatch):
            there = judge(parameters, losses, None, statistics)
        for name in ("ok", "bad_tasks", "bad_parameters", "largest", "bad_statistics"):
            assert torch.equal(getattr(here, name), getattr(there, name)), name
    for empty in (judge([], torch.ones(0)), judge([], torch.ones(2))):
        assert bool(empty.ok)


def test_readings_count_bad_steps_in_a_row_and_go_on_from_saved_counts() -> None:
    model, optimizers = build(RowWiseAdagrad, sparse=True)
    readings = Readings(["a", "b"], model.named_parameters(), optimizers)
    seen = []
    for number, bad in enumerate([1, 0, 1, 1, 1, 1, 0, 0], start=1):
        batch = draw(number)
        if bad:
            batch.labels[0, 0] = torch.nan
        readings.add(number, train_step(model, optimizers, batch, TASKS))
        if number % 4 == 0 or number == 6:
            if number == 6:  # as a resume does, at a fetch
                other = Readings(["a", "b"], model.named_parameters(), optimizers)
                other.load_state_dict(readings.state_dict())
                other._marks, other._losses, other._verdicts = readings._marks, readings._losses, readings._verdicts
                readings = other
            readings.fetch()
            first = readings.first_bad.step if readings.first_bad else None
            seen.append((readings.bad_steps, readings.bad_since, readings.in_a_row, first))
    assert seen == [(3, 3, 2, 1), (5, 2, 4, 5), (5, 0, 0, None)]
    assert readings.state_dict() == {"bad_steps": 5, "in_a_row": 0, "quarantined_rows": 0}


def test_counters_on_the_host_forget_a_step_that_was_selected_away() -> None:
    weight = nn.Parameter(torch.ones(2, device="meta"))  # stands for a device that is not the host
    adam = torch.optim.Adam([weight])
    adam.state[weight] = {"step": torch.tensor(7.0)}
    ours = ClippyAdam([weight])
    ours.state[weight] = {"step": torch.tensor(7.0)}
    wrapped = ClipUpdates(torch.optim.SparseAdam([weight]))
    wrapped.optimizer.state[weight] = {"step": 7}
    forget_step([adam, ours, wrapped], [weight])
    counters = [adam.state[weight], ours.state[weight], wrapped.optimizer.state[weight]]
    assert [float(state["step"]) for state in counters] == [6, 7, 6]


def test_a_task_that_is_damped_weighs_less_and_scales_may_change_between_steps() -> None:
    scales = torch.ones(2)
    model, optimizers = build(by_name("sgd"), sparse=False)
    twin, others = build(by_name("sgd"), sparse=False)
    damped = [Task(kind="binary"), Task(kind="regression", loss="huber", loss_weight=0.25)]
    for number, tasks in enumerate([TASKS, damped, TASKS]):
        scales[1] = tasks[1].loss_weight
        one = train_step(model, optimizers, draw(number), TASKS, scales_K=scales)
        other = train_step(twin, others, draw(number), tasks)
        assert torch.equal(one.losses, other.losses)
        torch.testing.assert_close(one.total, other.total)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("make", "sparse"), BOTH)
def test_on_a_gpu_nothing_waits_and_bad_steps_leave_all_as_it_was(make: Make, sparse: bool) -> None:
    model = Small(sparse).to("cuda").train()
    rest = [*model.norm.parameters(), *model.layer.parameters()]
    optimizers = [make([model.table.weight]), torch.optim.Adam(rest)] if sparse else [make(list(model.parameters()))]
    batches = [draw(number).to("cuda") for number in range(6)]
    readings = Readings(["a", "b"], model.named_parameters(), optimizers)
    before: dict[str, Any] = {}
    for number, batch in enumerate(batches):
        bad = number in (0, 3, 4)
        if bad:
            spoil(model, batch, "label")
            before = snapshot(model, optimizers)
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")  # states are made, and kernels loaded
        try:
            step = train_step(model, optimizers, batch, TASKS, quarantine_rows=number > 4)
            readings.add(number, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bool(step.verdict.ok) is not bad
        if bad:
            readings.fetch()  # from here on the host's counters know
            noted = (*COUNTERS, "clip_factor", "trust_ratio", "grad_factor", "grad_bad_steps")
            after = snapshot(model, optimizers)
            odd = differing(before, {key: after[key] for key in before})
            assert {name for name in odd if not name.endswith(noted)} == set()
