"""What our optimizers share: state, groups, refused gradients, sparse rows, loading (`GuardedOptimizer`)."""

import math
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError
from . import kernels

STEP = "step"
"""State key: how many steps the parameter was offered, refused ones too; 0-d, float32, on the CPU, as in torch."""
SUM = "sum"
"""State key: the accumulator; float32 for bfloat16 and float16 parameters, whose own sums would soon stop growing."""
BAD_STEPS = "bad_steps"
"""State key: how many of the steps were refused because of the gradient; 0-d, int64, on the parameter's device."""


def check_not_negative(option: str, value: float, infinite: bool = False) -> None:
    """Raise ConfigError unless `value` is 0 or more, and finite unless `infinite` is allowed.

    >>> check_not_negative("eps", -1.0)
    Traceback (most recent call last):
    ...
    steadyrank.errors.ConfigError: eps: expected a finite number, 0 or more, came -1.0
    """
    if not value >= 0 or (math.isinf(value) and not infinite):
        raise ConfigError(f"{option}: expected a {'' if infinite else 'finite '}number, 0 or more, came {value}")


def parameter_label(group: dict[str, Any], index: int) -> str:
    """Return what a message calls the parameter at `index` of a group: by its name where it has one."""
    if "param_names" in group:
        return f"parameter '{group['param_names'][index]}'"
    return f"parameter {index} of its group, of shape {tuple(group['params'][index].shape)},"


class GuardedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that never takes in a gradient which is not usable (`kernels.is_usable`).

    A step looks at each tensor alone. Where the gradient is bad, the weights and the accumulator of that tensor stay
    exactly as they were, `state["bad_steps"]` grows by one, and the other tensors step as usual. Nothing crosses to
    the host in a step.

    A subclass gives `_fresh_state` and `_update`; dense gradients are passed on as they are, sparse ones as their
    touched rows.
    """

    row_states: ClassVar[tuple[str, ...]] = (SUM,)
    """The states with one entry for each row of the parameter: what a sparse step gathers and puts back."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, and refuse options and parameters that cannot work.

        Raises:
            ConfigError: an option is out of range or a parameter is not of a real floating-point type.
        """
        super().add_param_group(param_group)
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
            for index, param in enumerate(group["params"]):
                if param.grad is not None:
                    self._step_one(param, index, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep each state's dtype: torch would cast a float32 accumulator to bfloat16."""
        loaded: dict[str, Any] = {}

        def remember(_: Optimizer, final: dict[str, Any]) -> None:
            loaded.update(final)

        def restore(_: Optimizer) -> None:
            saved = chain.from_iterable(group["params"] for group in loaded["param_groups"])
            here = chain.from_iterable(group["params"] for group in self.param_groups)
            for key, param in zip(saved, here, strict=True):
                for name, value in loaded["state"].get(key, {}).items():
                    self.state[param][name] = value if name == STEP else value.to(param.device)

        # Hooks, so that ours sees what the user's own hooks made of the state, and theirs sees ours.
        handles = (
            self.register_load_state_dict_pre_hook(remember),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ConfigError(f"lr: expected a number or a tensor of one element, came shape {tuple(lr.shape)}")
        for option in ("lr", "initial_accumulator_value", "eps"):
            check_not_negative(option, float(group[option]))
        if group["initial_accumulator_value"] + group["eps"] == 0:
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

    def _update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Change `weight` and the tensors of `state` in place."""
        raise NotImplementedError(f"{type(self).__name__} gives no _update")

    def _step_one(self, param: Tensor, index: int, group: dict[str, Any]) -> None:
        grad = param.grad
        assert grad is not None
        rows_only = grad.layout == torch.sparse_coo and grad.sparse_dim() == 1
        if grad.layout != torch.strided and not rows_only:
            raise ConfigError(
                f"{parameter_label(group, index)} has a gradient of layout {grad.layout}; expected a dense one, or a "
                "sparse COO one over the first dimension only, as an embedding with sparse=True gives"
            )
        state = self.state[param]
        if not state:
            state.update(self._fresh_state(param, group))
        state[STEP] += 1
        if rows_only:
            self._update_rows(param, grad.coalesce(), state, group)
        else:
            self._update(param, grad, state, group)

    def _update_rows(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        rows = grad.indices()[0]
        touched = {key: state[key].index_select(0, rows) for key in self.row_states}
        weight = param.index_select(0, rows)
        self._update(weight, grad.values(), {**state, **touched}, group)
        param.index_copy_(0, rows, weight)
        for key, value in touched.items():
            state[key].index_copy_(0, rows, value)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a parameter's accumulator, and of its update's arithmetic: its own, but at least float32.

    >>> wide_dtype(torch.bfloat16), wide_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def take_in(
    grad: Float[Tensor, "*shape"], state: dict[str, Tensor], group: dict[str, Any], floor: float
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, ""], Bool[Tensor, ""]]:
    """Decide on a gradient, and count it in `state` if it is refused.

    Returns:
        The gradient to descend and the learning rate, both in the accumulator's dtype and both zero if refused; and
        whether it is usable.
    """
    total, lr = state[SUM], group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.to(total.device, total.dtype, non_blocking=True).reshape(())
    else:
        lr = torch.full((), lr, dtype=total.dtype, device=total.device)
    usable = kernels.is_usable(grad, total, lr, floor)
    state[BAD_STEPS].add_(~usable)
    grad = grad.to(total.dtype)
    grad = kernels.keep_where(usable, -grad if group["maximize"] else grad)
    return grad, kernels.keep_where(usable, lr), usable
