"""The promises of `check_monitor`: every monitor of ours keeps them, and one that breaks any of them is found out."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steadyrank import Watch, WatchConfig
from steadyrank.monitors.activations import DeadUnits, Gates
from steadyrank.monitors.dynamics import Dynamics
from steadyrank.monitors.readings import Reading, fetch
from steadyrank.monitors.tables import Field, Tables
from steadyrank.monitors.tasks import TaskConflict
from steadyrank.testing import TinyTasks, check_monitor

TASKS = ("click", "like")
Write = Callable[[str, int, Mapping[str, float]], None]


class Alone:
    """One monitor without a Watch around it: what it reads between forward and backward, and around the step."""

    def __init__(
        self,
        optimizer: Optimizer,
        write: Write,
        part: Any,
        *,
        losses: Callable[[Tensor], list[Reading]] | None = None,
        after: Callable[[int], list[Reading]] | None = None,
        at_flush: Callable[[], list[Reading]] | None = None,
    ) -> None:
        self.part, self.write, self.step = part, write, 0
        self.losses_of, self.after, self.at_flush = losses, after, at_flush
        self.read: list[tuple[int, list[Reading]]] = []
        self.handles = list(getattr(part, "handles", ()))
        if after is not None:
            self.handles.append(optimizer.register_step_pre_hook(lambda *_: part.before()))
            self.handles.append(optimizer.register_step_post_hook(self.stepped))
        if hasattr(part, "active"):
            part.active = True

    def losses(self, losses_K: Tensor) -> None:
        self.step += 1
        if self.losses_of is not None:
            self.read.append((self.step, self.losses_of(losses_K)))

    def stepped(self, *_: Any) -> None:
        self.read.append((self.step, self.after(self.step)))

    def flush(self) -> None:
        if self.at_flush is not None:
            self.read.append((self.step, self.at_flush()))
        for step, readings in self.read:
            assert all(reading.values.shape == (len(reading.labels),) for reading in readings)
            assert not any(reading.values.requires_grad for reading in readings)
            if readings:
                self.write("alone", step, fetch(readings))
        self.read.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "part": self.part.state_dict() if hasattr(self.part, "state_dict") else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        if state["part"] is not None:
            self.part.load_state_dict(state["part"])

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def watch(**options: Any) -> Any:
    return lambda model, optimizer, write: Watch(
        model, optimizer, TASKS, flush_every=0, write=write, config=WatchConfig(**options)
    )


def dynamics(model: nn.Module, optimizer: Optimizer, write: Write) -> Alone:
    part = Dynamics(model.named_parameters(), [optimizer])
    return Alone(optimizer, write, part, after=lambda step: part.after())


def tables(model: nn.Module, optimizer: Optimizer, write: Write) -> Alone:
    fields = [Field("user", "table.weight", 0, 5), Field("item", "table.weight", 5, 7)]
    part = Tables(model.named_parameters(), fields)
    return Alone(optimizer, write, part, after=lambda step: part.after(step, rank=True), at_flush=part.read_rank)


def dead_units(model: nn.Module, optimizer: Optimizer, write: Write) -> Alone:
    part = DeadUnits(model)
    return Alone(optimizer, write, part, losses=lambda losses_K: part.read())


def gates(model: nn.Module, optimizer: Optimizer, write: Write) -> Alone:
    part = Gates(model)
    return Alone(optimizer, write, part, losses=lambda losses_K: part.read())


def conflict(model: TinyTasks, optimizer: Optimizer, write: Write) -> Alone:
    part = TaskConflict(model.trunk, TASKS)
    return Alone(optimizer, write, part, losses=part.read)


MONITORS = {
    "watch": watch(),
    "watch_often": watch(look_every=2, dynamics_every=3, tasks_every=4, rank_every=5, curvature_every=6),
    "watch_always": watch(look_every=1, dynamics_every=1, tasks_every=1, rank_every=1, curvature_every=1),
    "dynamics": dynamics,
    "tables": tables,
    "dead_units": dead_units,
    "gates": gates,
    "conflict": conflict,
}


@pytest.mark.parametrize("make", MONITORS.values(), ids=MONITORS)
def test_every_monitor_keeps_its_promises(make: Any) -> None:
    check_monitor(make)


class Honest:
    """A monitor that keeps every promise: the mean loss since the last flush."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, write: Write) -> None:
        self.model, self.optimizer, self.write = model, optimizer, write
        self.step, self.held = 0, []

    def losses(self, losses_K: Tensor) -> None:
        self.step += 1
        self.held.append(losses_K.detach())

    def flush(self) -> None:
        if self.held:
            self.write("mine", self.step, self.row(torch.stack(self.held).mean().item()))
        self.held = []

    def row(self, mean: float) -> dict[str, Any]:
        return {"loss/mean": mean}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def close(self) -> None:
        pass


class Silent(Honest):
    def flush(self) -> None:
        pass


class Harmful(Honest):
    def losses(self, losses_K: Tensor) -> None:
        super().losses(losses_K)
        self.model.trunk[0].weight.data.mul_(1 + 1e-6)


class Gradients(Honest):
    """Leaves the gradients of its own backward pass behind."""

    def losses(self, losses_K: Tensor) -> None:
        super().losses(losses_K)
        losses_K[0].backward(retain_graph=True)


class Nameless(Honest):
    def row(self, mean: float) -> dict[str, Any]:
        return {"loss": mean}


class Wordy(Honest):
    def row(self, mean: float) -> dict[str, Any]:
        return {"loss/mean": f"{mean:.3f}"}


class Moody(Honest):
    count = 0

    def row(self, mean: float) -> dict[str, Any]:
        Moody.count += 1
        return {"loss/mean": mean, "rows/count": float(Moody.count)}


class Forgetful(Honest):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Blinded(Honest):
    """Its running mean never gets rid of a NaN."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.mean = torch.zeros(())

    def losses(self, losses_K: Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * losses_K.detach().sum()
        super().losses(losses_K)

    def row(self, mean: float) -> dict[str, Any]:
        return {"loss/running": self.mean.item()}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.mean = state["step"], state["mean"]


class Waiting(Honest):
    def losses(self, losses_K: Tensor) -> None:
        super().losses(losses_K)
        losses_K.sum().item()


class WaitingInTheStep(Honest):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.handle = self.optimizer.register_step_post_hook(lambda *_: self.model.heads.weight.sum().item())

    def close(self) -> None:
        self.handle.remove()


class Clinging(WaitingInTheStep):
    def close(self) -> None:
        pass


BROKEN = [
    (Silent, "reads"),
    (Harmful, "changes nothing"),
    (Gradients, "changes nothing"),
    (Nameless, "names"),
    (Wordy, "names"),
    (Moody, "deterministic"),
    (Forgetful, "resumes"),
    (Blinded, "forgets NaN"),
    (Waiting, "host sync"),
    (WaitingInTheStep, "host sync"),
    (Clinging, "goes"),
]


def test_the_monitor_that_the_broken_ones_are_made_of_keeps_its_promises() -> None:
    check_monitor(Honest)


@pytest.mark.parametrize(("monitor", "promise"), BROKEN, ids=[monitor.__name__ for monitor, _ in BROKEN])
def test_a_broken_promise_is_found_and_named(monitor: type[Honest], promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_monitor(monitor)


def test_a_state_that_no_checkpoint_could_hold_is_found() -> None:
    class Rich(Honest):
        def state_dict(self) -> dict[str, Any]:
            return {"step": self.step, "model": self.model}

    with pytest.raises(Exception, match="weights_only"):
        check_monitor(Rich)
