"""Recovery: what the damper changes comes back to the bit."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steadyrank.optim import ClipGlobalNorm, ClipGradients, ClippyAdagrad, ClipUpdates
from steadyrank.optim.configs import OPTIMIZERS
from steadyrank.recovery import LEAST_SCALE, DampConfig, Damper
from steadyrank.snapshots import copy_state

Make = Callable[[list[nn.Parameter]], Optimizer]
MAKES: dict[str, Make] = {
    **{name: lambda params, made=made: made(params, lr=0.1) for name, made in OPTIMIZERS.items()},  # type: ignore[misc]
    "tensor_lr": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.1), foreach=False),
    "clippy_tensor_lr": lambda params: ClippyAdagrad(params, lr=torch.tensor(0.1)),
    "clip_updates": lambda params: ClipUpdates(torch.optim.SGD(params, lr=0.1, momentum=0.9)),
    "clip_gradients": lambda params: ClipGradients(torch.optim.SGD(params, lr=0.1), ClipGlobalNorm(1.0)),
    "two_groups": lambda params: torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.03}]),
}
WHATS = ("step", "rate", "threshold")
DAMP = DampConfig(factor=0.2, steps=4, restore_steps=7)


def as_json(state: Any) -> str:
    return json.dumps(state, sort_keys=True, default=lambda tensor: tensor.tolist())  # to the last bit


class Run:
    """A tiny model that is trained and damped."""

    def __init__(
        self, make: Make, config: DampConfig = DAMP, tasks: tuple[str, ...] = ("click",), warmup_steps: int = 0
    ) -> None:
        self.weights = [nn.Parameter(torch.linspace(0.2, 1, 6)), nn.Parameter(torch.ones(2, 3))]
        self.optimizer = make(self.weights)
        self.damper = Damper(config, {"dense": self.optimizer}, tasks, warmup_steps=warmup_steps)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            self.damper.apply(self.step)
            generator = torch.Generator().manual_seed(self.step)
            for weight in self.weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            self.optimizer.step()

    def save(self) -> dict[str, Any]:
        with self.damper.undamped():
            optimizer = copy_state(self.optimizer.state_dict())
        weights = [weight.detach().clone() for weight in self.weights]
        damper = json.loads(json.dumps(self.damper.state_dict()))
        return {"weights": weights, "optimizer": optimizer, "damper": damper, "step": self.step}

    def load(self, state: dict[str, Any]) -> None:
        with self.damper.undamped(), torch.no_grad():
            self.optimizer.load_state_dict(copy_state(state["optimizer"]))
            for weight, saved in zip(self.weights, state["weights"], strict=True):
                weight.copy_(saved)
        self.damper.load_state_dict(state["damper"])
        self.step = state["step"]

    def options(self) -> list[dict[str, Any]]:
        return [
            {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
            for group in ({k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups)
        ]


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_what_is_damped_comes_back_to_the_bit(make: Make, what: Any) -> None:
    run = Run(make, DampConfig(what=what, factor=0.3, steps=4, restore_steps=7))
    before = run.options()
    kept = run.optimizer.param_groups[0]["lr"]
    run.train(2)
    run.damper.begin(2)
    run.train(1)
    bounded = "absolute_threshold" in before[0]
    damped = run.options()
    assert damped != before
    for old, new in zip(before, damped, strict=True):
        rate = 0.3 if what != "threshold" or not bounded else 1.0
        assert new["lr"] == pytest.approx(rate * old["lr"])
        if bounded:
            bound = 0.3 if what != "rate" else 1.0
            assert new["absolute_threshold"] == pytest.approx(bound * old["absolute_threshold"])
            assert new["variable_relative_threshold"] == pytest.approx(bound * old["variable_relative_threshold"])
    run.train(3)
    assert run.options() == damped
    rates = []
    for _ in range(7):
        run.train(1)
        rates.append(run.options()[0])
    assert rates[-1] == before[0]
    for key in ("lr", "absolute_threshold") if bounded else ("lr",):
        ratios = [after[key] / earlier[key] for earlier, after in zip([damped[0], *rates], rates, strict=False)]
        assert ratios == pytest.approx([ratios[0]] * 7)
        assert all(type(each[key]) is float for each in rates)
    assert run.options() == before
    assert run.damper.state_dict() == {}
    if isinstance(kept, Tensor):
        assert run.optimizer.param_groups[0]["lr"] is kept


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("saved_at", [3, 8, 16])  # in full, coming back, over
def test_a_resume_in_the_middle_of_a_damping_changes_no_bit(make: Make, saved_at: int) -> None:
    whole = Run(make)
    whole.train(2)
    whole.damper.begin(2)
    whole.train(18)
    cut = Run(make)
    cut.train(2)
    cut.damper.begin(2)
    cut.train(saved_at - 2)
    resumed = Run(make)
    resumed.load(cut.save())
    resumed.train(20 - saved_at)
    cut.train(20 - saved_at)  # to save changes nothing either
    for other in (resumed, cut):
        assert other.step == whole.step == 20
        assert as_json(other.save()) == as_json(whole.save())
        for one, two in zip(other.weights, whole.weights, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_saved_state_holds_no_damped_rate(make: Make) -> None:
    run = Run(make)
    never = run.options()
    run.damper.begin(0)
    run.train(3)
    damped = run.options()
    state = run.save()
    assert run.options() == damped
    other = Run(make)  # of another run, that knows nothing of the damping
    other.optimizer.load_state_dict(copy_state(state["optimizer"]))
    assert other.options() == never


def test_a_rollback_keeps_the_damping_and_another_one_comes_on_top() -> None:
    run = Run(MAKES["adam"])
    state = run.save()
    run.train(5)
    run.damper.begin(5)
    run.train(1)
    with run.damper.undamped():
        run.optimizer.load_state_dict(copy_state(state["optimizer"]))
    assert run.options()[0]["lr"] == pytest.approx(0.2 * 0.1)
    run.damper.begin(6)
    run.train(1)
    assert run.options()[0]["lr"] == pytest.approx(0.04 * 0.1)
    for _ in range(9):
        run.damper.begin(run.step)
        run.train(1)
    assert run.options()[0]["lr"] == pytest.approx(LEAST_SCALE * 0.1)
    run.train(DAMP.steps + DAMP.restore_steps)
    assert run.options()[0]["lr"] == 0.1


def test_a_scheduler_in_the_undamped_block_reaches_the_rate_behind_the_damping() -> None:
    run = Run(MAKES["sgd"])
    run.damper.begin(0)
    run.train(1)
    with run.damper.undamped():
        assert run.optimizer.param_groups[0]["lr"] == 0.1
        run.optimizer.param_groups[0]["lr"] = 0.05
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 0.05)
    run.train(12)
    assert run.optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("name", ["clippy_adagrad", "clip_updates"])
@pytest.mark.parametrize(("what", "shrinks"), [("step", True), ("threshold", True), ("rate", False)])
def test_a_clipped_step_feels_the_bound_and_not_the_rate(name: str, what: Any, shrinks: bool) -> None:
    moved = []
    for damp in (False, True):
        run = Run(MAKES[name], DampConfig(what=what, factor=0.5))
        with torch.no_grad():
            run.weights[1].fill_(1e-3)  # so small that even half the rate is far beyond the bound
        if damp:
            run.damper.begin(0)
        before = run.weights[1].detach().clone()
        run.train(1)
        assert run.optimizer.state[run.weights[1]]["clip_factor"] < 0.5
        moved.append((run.weights[1] - before).abs().sum().item())
    assert moved[1] / moved[0] == pytest.approx(0.5 if shrinks else 1.0, rel=1e-4)


def test_a_task_is_damped_alone_and_comes_back() -> None:
    run = Run(MAKES["sgd"], DampConfig(what="task", factor=0.25, steps=2, restore_steps=2), ("click", "like", "buy"))
    scales_K = run.damper.scales_K
    assert run.damper.begin(0, "like").startswith("the loss of 'like' x 0.25")
    run.train(1)
    assert scales_K.tolist() == [1.0, 0.25, 1.0]
    run.damper.begin(1, "buy")
    assert run.damper.begin(1, "").startswith("steps x 0.25")
    run.train(2)
    assert scales_K.tolist() == [1.0, 0.5, 0.25]
    assert run.optimizer.param_groups[0]["lr"] == 0.025
    resumed = Run(MAKES["sgd"], run.damper.config, ("click", "like", "buy"))
    resumed.load(run.save())
    for each in (run, resumed):
        each.train(1)
        assert each.damper.scales_K.tolist() == [1.0, 1.0, 0.5]
        each.train(1)
        assert each.damper.scales_K.tolist() == [1.0, 1.0, 1.0]
        assert each.optimizer.param_groups[0]["lr"] == 0.1
    assert run.damper.scales_K is scales_K


def test_the_words_name_what_has_no_bound_and_a_single_task_is_damped_as_a_whole() -> None:
    optimizers = {"dense": Run(MAKES["clippy_adam"]).optimizer, "tables": Run(MAKES["adagrad"]).optimizer}
    damper = Damper(DampConfig(what="threshold"), optimizers, ["click"])
    assert damper.begin(0) == "bounds (the rate of 'tables', which has none) x 0.2 for 500 steps, then back over 1000"
    assert Run(MAKES["sgd"], DampConfig(what="task")).damper.begin(0, "click").startswith("steps")
    infinite = Run(lambda params: ClippyAdagrad(params, absolute_threshold=float("inf")), DampConfig(what="threshold"))
    assert "rate of 'dense'" in infinite.damper.begin(0)
    infinite.train(1)
    assert infinite.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 0.1)
    sudden = Run(MAKES["sgd"], DampConfig(steps=1, restore_steps=0))
    sudden.damper.begin(0)
    sudden.train(2)
    assert sudden.optimizer.param_groups[0]["lr"] == 0.1


# The warm-up.


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_rates_rise_by_the_step_and_nothing_else_changes(make: Make) -> None:
    run, steps = Run(make, warmup_steps=5), 8
    before = run.options()
    kept = run.optimizer.param_groups[0]["lr"]
    for step in range(1, steps + 1):
        run.train(1)
        for old, new in zip(before, run.options(), strict=True):
            assert new["lr"] == pytest.approx(old["lr"] * min(1, step / 5), rel=1e-6)  # a tensor's is float32
            assert {**new, "lr": 0} == {**old, "lr": 0}
    assert run.options() == before
    if isinstance(kept, Tensor):
        assert run.optimizer.param_groups[0]["lr"] is kept


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("name", ["clippy_adagrad", "adam", "clippy_tensor_lr", "two_groups"])
def test_warm_up_and_damping_multiply_and_a_bound_feels_the_damping_alone(name: str, what: Any) -> None:
    run = Run(MAKES[name], DampConfig(what=what, factor=0.5, steps=3, restore_steps=0), warmup_steps=8)
    before = run.options()
    bounded = "absolute_threshold" in before[0]
    run.train(2)
    run.damper.begin(2)
    for step in range(3, 12):
        run.train(1)
        damped = 0.5 if step <= 5 else 1.0
        for old, new in zip(before, run.options(), strict=True):
            rate = min(1, step / 8) * (damped if what != "threshold" or not bounded else 1.0)
            assert new["lr"] == pytest.approx(rate * old["lr"], rel=1e-6)
            if bounded:
                bound = damped if what != "rate" else 1.0
                assert new["absolute_threshold"] == pytest.approx(bound * old["absolute_threshold"])
    assert run.options() == before


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("damped_at", [None, 4])
def test_a_resume_in_the_middle_of_a_warm_up_changes_no_bit(make: Make, damped_at: int | None) -> None:
    runs = [Run(make, warmup_steps=12) for _ in range(3)]
    whole, cut, resumed = runs
    never = whole.options()
    for run in (whole, cut):
        run.train(4)
        if damped_at:
            run.damper.begin(damped_at)
    whole.train(14)
    cut.train(3)
    warm, state = cut.options(), cut.save()
    assert cut.options() == warm != never
    other = Run(make)  # of another run, that does not warm up
    other.optimizer.load_state_dict(copy_state(state["optimizer"]))
    assert other.options() == never
    resumed.load(state)
    for run in (resumed, cut):  # to save changes nothing either
        run.train(11)
        assert as_json(run.save()) == as_json(whole.save())


def test_a_rollback_warms_nothing_up_again() -> None:
    run = Run(MAKES["adam"], warmup_steps=10)
    run.train(1)
    state = run.save()
    run.train(5)
    with run.damper.undamped():
        run.optimizer.load_state_dict(copy_state(state["optimizer"]))
    assert run.options()[0]["lr"] == pytest.approx(0.6 * 0.1)
    run.train(1)
    assert run.options()[0]["lr"] == pytest.approx(0.7 * 0.1)


# The ladder.
