"""What our optimizers share: state, groups, refused gradients, sparse rows, loading (`GuardedOptimizer`)."""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim import Optimizer

from ..errors import CheckpointError, ConfigError
from ..native.rows import coalesce, gather, put_back
from ..ranks import Ranks
from . import kernels

STEP = "step"
"""State key: how many steps the parameter was offered, refused ones too; 0-d, float32, on the CPU, as in torch."""
SUM = "sum"
"""State key: the accumulator; float32 for bfloat16 and float16 parameters, whose own sums would soon stop growing."""
BAD_STEPS = "bad_steps"
"""State key: how many of the steps were refused because of the gradient; 0-d, int64, on the parameter's device."""
CHUNK = 1 << 18
"""Coordinates worked on at a time on a CPU: what several operations read and write should stay in its cache."""


def check_not_negative(option: str, value: Any, infinite: bool = False) -> None:
    """Raise ConfigError unless `value` is a number, 0 or more, and finite unless `infinite` is allowed.

    >>> check_not_negative("eps", -1.0)
    Traceback (most recent call last):
    ...
    steadyrank.errors.ConfigError: eps: expected a finite number, 0 or more, came -1.0
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not value >= 0 or (math.isinf(value) and not infinite):
        shown = value if number else repr(value)
        raise ConfigError(f"{option}: expected a {'' if infinite else 'finite '}number, 0 or more, came {shown}")


def innermost(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that others are wrapped around; of a plain one, itself."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]  # looked up in the line above
    return optimizer


def parameter_label(group: dict[str, Any], index: int) -> str:
    """Return what a message calls the parameter at `index` of a group: by its name where it has one."""
    if "param_names" in group:
        return f"parameter '{group['param_names'][index]}'"
    return f"parameter {index} of its group, of shape {tuple(group['params'][index].shape)},"


@dataclass
class Touched:
    """What a step reads and writes of one parameter: all of it, or with a sparse gradient the rows that it touches.

    Of a DTensor in shards it is this rank's part: `weight`, `grad` and the states are then the plain tensors within.
    """

    param: Tensor
    weight: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    rows: Tensor | None = None
    """The touched rows; `weight`, `grad` and the row states are then gathered copies of them."""
    shards: Ranks | None = None
    """Who holds the other parts of the parameter; None where this is all of it."""


class Ask(NamedTuple):
    """Numbers of what lies here of a tensor, as its step asks what they are of the whole: it is answered in one row."""

    norms: tuple[Tensor, ...]
    """L2 norms, 0-d."""
    sums: tuple[Tensor, ...] = ()
    """Sums, 0-d."""


T = TypeVar("T")
Asking = Generator[Ask, tuple[Tensor, ...], T]
"""A computation that asks now and then; `step_alone` or `step_together` answers."""


class GuardedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that never takes in a gradient which is not usable (`kernels.are_usable`).

    A step looks at each tensor alone. Where the gradient is bad, the weights and the accumulator of that tensor stay
    exactly as they were, `state["bad_steps"]` grows by one, and the other tensors step as usual. Nothing crosses to
    the host in a step.

    A subclass gives `_fresh_state`, and `_update` for one tensor or `_update_all` for all of a group. Sparse gradients
    reach both as their touched rows; DTensors as this rank's shards, where `_takes_shards` says so. A `state_dict` of
    the torch optimizer that a subclass stands for loads too.
    """

    joins_parts: ClassVar[bool] = False
    """Whether the parts of a table that lies on several ranks (`sharded_over`) step as one tensor; else row by row."""
    row_states: ClassVar[tuple[str, ...]] = (SUM,)
    """The states with one entry for each row of the parameter: what a sparse step gathers and puts back."""
    own_option: ClassVar[str] = ""
    """A group's key by which a saved state is known to be of this class; without it only `shared_options` are taken."""
    shared_options: ClassVar[tuple[str, ...]] = ("lr", "maximize", "initial_accumulator_value")
    """Options that mean the same in the torch optimizer of which a saved state may come."""
    decoupled_decay: ClassVar[bool] = False
    """Whether the weight decay is that of `torch.optim.AdamW`."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, and refuse options and parameters that cannot work.

        Raises:
            ConfigError: an option is out of range, a parameter is not of a real floating-point type, or it is in two
                groups.
        """
        before = {id(p) for group in self.param_groups for p in group["params"]}
        try:
            super().add_param_group(param_group)
        except ValueError as error:
            _check_in_one_group(param_group, before, error)
            raise
        try:
            self._check_group(self.param_groups[-1])
        except ConfigError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step, and return what `closure`, which computes loss and gradients anew, returned.

        Raises:
            ConfigError: a gradient has a layout that is neither dense nor sparse rows.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            touched = [self._touch(p, i, group) for i, p in enumerate(group["params"]) if p.grad is not None]
            if touched:
                torch._foreach_add_([each.state[STEP] for each in touched], 1)
                self._update_all(touched, group)
                for each in touched:
                    self._put_back(each)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, and besides:

        - give each state the dtype of a fresh one: torch would cast a float32 accumulator to bfloat16;
        - refuse before anything is changed;
        - take the state of the torch optimizer of the same kind; what it does not have starts fresh, and of its
          options only those are taken that mean the same here.

        Raises:
            CheckpointError: the state is of another model or of another optimizer; the parameter is named.
        """
        ready: list[tuple[Tensor, dict[str, Any]]] = []

        def prepare(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            # All of it before torch changes anything: what is refused leaves the optimizer as it was.
            own = self.param_groups
            groups = self._with_own_options(final["param_groups"], own)
            if [len(group["params"]) for group in groups] == [len(group["params"]) for group in own]:
                for saved, group in zip(groups, own, strict=True):
                    named = {**saved, "params": group["params"]}
                    for index, (key, param) in enumerate(zip(saved["params"], group["params"], strict=True)):
                        if final["state"].get(key):
                            ready.append((param, self._restored(param, index, named, final["state"][key])))
            return {**final, "param_groups": groups}

        def restore(_: Optimizer) -> None:
            for param, state in ready:
                self.state[param] = state

        # Hooks, so that ours sees what the user's own hooks made of the state, and theirs sees ours.
        handles = (
            self.register_load_state_dict_pre_hook(prepare),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _with_own_options(self, saved: list[Any], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Fill in what a saved group lacks; of a foreign one, only take what means the same."""
        if len(saved) != len(own):
            return saved  # torch says so
        taken = []
        for theirs, ours in zip(saved, own, strict=True):
            foreign = bool(self.own_option) and self.own_option not in theirs
            keep = {"params", "param_names", *self.shared_options} if foreign else set(theirs)
            if foreign and self.decoupled_decay and theirs.get("decoupled_weight_decay"):
                keep.add("weight_decay")
            taken.append({**ours, **{k: v for k, v in theirs.items() if k in keep}})
        return taken

    def _restored(self, param: Tensor, index: int, group: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return a parameter's state from a saved one."""
        fresh = self._fresh_state(param, group)
        missing = [key for key in self.row_states if key in fresh and key not in given]
        if missing:
            raise CheckpointError(
                f"{parameter_label(group, index)} has the state of another optimizer: expected '{missing[0]}' for "
                f"{type(self).__name__}, came {', '.join(map(repr, given))}"
            )
        state: dict[str, Any] = {**fresh, **{k: v for k, v in given.items() if isinstance(v, Tensor)}}
        for key, value in state.items():
            if key in fresh and value.shape != fresh[key].shape:
                raise CheckpointError(
                    f"{parameter_label(group, index)} is of another model: expected '{key}' of shape "
                    f"{tuple(fresh[key].shape)}, came {tuple(value.shape)}"
                )
            if key == STEP:
                state[key] = value.to("cpu", torch.float32)
            else:
                state[key] = value.to(param.device, fresh[key].dtype if key in fresh else value.dtype)
        return state

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ConfigError(f"lr: expected a number or a tensor of one element, came shape {tuple(lr.shape)}")
        check_not_negative("lr", float(lr) if isinstance(lr, Tensor) else lr)
        if lr > torch.finfo(torch.float32).max:
            raise ConfigError(f"lr: expected a number that float32 can hold, came {lr}")
        for option in ("initial_accumulator_value", "eps", "weight_decay"):
            if option in group:
                check_not_negative(option, group[option])
        if group.get("initial_accumulator_value", 1) + group["eps"] == 0:
            raise ConfigError("initial_accumulator_value and eps: one must be above 0, or the first step is 0 / 0")
        for index, param in enumerate(group["params"]):
            if not param.is_floating_point():
                label = parameter_label(group, index)
                raise ConfigError(f"{label} has dtype {param.dtype}; expected a real floating-point dtype")

    def _fresh_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {
            STEP: torch.zeros((), dtype=torch.float32, device="cpu"),
            BAD_STEPS: torch.zeros((), dtype=torch.int64, device=param.device),
        }

    def _update_all(self, touched: list[Touched], group: dict[str, Any]) -> None:
        """Change the weights and states in place."""
        kinds: dict[Any, list[Asking[None]]] = {}
        for each in touched:
            step = self._update(each, group)
            if each.shards is None:
                step_alone(step)
            else:
                kinds.setdefault((each.shards, each.weight.device, each.weight.dtype), []).append(step)
        for (shards, *_), steps in kinds.items():
            step_together(steps, shards)

    def _update(self, each: Touched, group: dict[str, Any]) -> Asking[None]:
        """Change the weight and the tensors of the state in place."""
        raise NotImplementedError(f"{type(self).__name__} gives no _update")

    def _takes_shards(self, dim: int, group: dict[str, Any]) -> bool:
        """Say whether each rank can step its own part of what is cut along a dimension; if not, DTensor does it."""
        return True

    def _touch(self, param: Tensor, index: int, group: dict[str, Any]) -> Touched:
        grad = param.grad
        assert grad is not None
        state = self.state[param]
        if not state:
            state.update(self._fresh_state(param, group))
        joined = getattr(param, "sharded_over", None) if self.joins_parts else None
        if grad.layout == torch.strided:
            parts = kernels.parts_of([param, grad, *state.values()]) if hasattr(param, "device_mesh") else None
            if parts is None or (parts.ranks is not None and not self._takes_shards(parts.dim, group)):
                return Touched(param, param, grad, state, shards=joined)
            weight, grad, *states = parts.tensors
            return Touched(param, weight, grad, dict(zip(state, states, strict=True)), shards=parts.ranks)
        if grad.layout != torch.sparse_coo or grad.sparse_dim() != 1:
            raise ConfigError(
                f"{parameter_label(group, index)} has a gradient of layout {grad.layout}; expected a dense one, or a "
                "sparse COO one over the first dimension only, as an embedding with sparse=True gives"
            )
        grad = coalesce(grad)
        rows = grad.indices()[0]
        gathered = {key: gather(state[key], rows) for key in self.row_states if key in state}
        return Touched(param, gather(param, rows), grad.values(), {**state, **gathered}, rows, joined)

    def _put_back(self, touched: Touched) -> None:
        if touched.rows is None:
            if touched.weight is not touched.param:
                torch.autograd.graph.increment_version([touched.param])  # so that autograd notices
            return
        put_back(touched.param, touched.rows, touched.weight)
        state = self.state[touched.param]
        for key in self.row_states:
            if key in state:
                put_back(state[key], touched.rows, touched.state[key])


def _check_in_one_group(group: dict[str, Any], before: set[int], error: ValueError) -> None:
    """Raise ConfigError, naming the parameter, if torch refused a group because of one that is in another."""
    params = group["params"]  # torch has made a list of tensors of it, and put their names beside them
    for index, param in enumerate(params if isinstance(params, list) else []):
        if id(param) in before:
            label = parameter_label(group, index)
            raise ConfigError(f"{label} is in another group already; give each parameter to one group only") from error


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a parameter's accumulator, and of its update's arithmetic: its own, but at least float32.

    >>> wide_dtype(torch.bfloat16), wide_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def step_alone(step: Asking[None]) -> None:
    """Make the step of a whole tensor, which is its own answer."""
    try:
        ask = next(step)
        while True:
            ask = step.send(ask.norms + ask.sums)
    except StopIteration:
        return


def step_together(steps: Sequence[Asking[None]], shards: Ranks) -> None:
    """Make the steps of tensors of which `shards` hold parts; what all ask at once costs one collective.

    They ask equally often, and as much.
    """
    answers: list[Any] = [None] * len(steps)
    while True:
        asked = []
        for step, answer in zip(steps, answers, strict=True):
            with suppress(StopIteration):
                asked.append(step.send(answer))
        if not asked:
            return
        found_PX = torch.stack([torch.stack(ask.norms + ask.sums) for ask in asked])
        reduce = partial(_of_the_whole, norms=len(asked[0].norms))
        answers = [row_X.unbind() for row_X in kernels.over_shards(found_PX, [shards] * len(asked), reduce)]


def _of_the_whole(found_NPX: Tensor, norms: int) -> Tensor:
    return torch.cat([kernels.joint_norm(found_NPX[..., :norms]), found_NPX[..., norms:].sum(0)], -1)


def take_in(
    each: Touched, total: Float[Tensor, "*states"], group: dict[str, Any], floor: float
) -> Asking[tuple[Float[Tensor, "*shape"], Float[Tensor, ""], Bool[Tensor, ""]]]:
    """Decide on a gradient, and count it if it is refused.

    Args:
        each: Whose gradient.
        total: G, the accumulator.
        group: Its options.
        floor: As in `kernels.is_usable`.

    Returns:
        The gradient to descend and the learning rate, both in the accumulator's dtype and both zero if refused; and
        whether it is usable.
    """
    grad, lr = each.grad, group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.to(total.device, total.dtype, non_blocking=True).reshape(())
    else:
        lr = torch.full((), lr, dtype=total.dtype, device=total.device)
    norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, total.dtype))
    norm, start = yield Ask((kernels.whole(norm),), (kernels.whole(total.sum()),))
    usable = kernels.is_usable(norm, start, lr, floor)
    each.state[BAD_STEPS].add_(~usable)
    grad = grad.to(total.dtype)
    grad = kernels.keep_where(usable, -grad if group["maximize"] else grad)
    return grad, kernels.keep_where(usable, lr), usable
