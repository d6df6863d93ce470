"""What optimizers around another one share: groups, states, what the inner must not change, loading."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError
from ..ranks import Ranks
from . import kernels
from .guarded import CHUNK, STEP, GuardedOptimizer, innermost, parameter_label, wide_dtype


@dataclass
class Kept:
    """A tensor of the inner's state, and what it held before the step: of a sparse gradient's rows, if it has rows."""

    state: dict[str, Any]
    key: str
    tensor: Tensor
    before: Tensor
    """Of a DTensor, what lies here."""
    by_row: bool


@dataclass
class Held:
    """A parameter that has a gradient, as it was before the inner's step."""

    param: Tensor
    group: dict[str, Any]
    label: str
    here: Tensor
    """The parameter; of a DTensor in shards, this rank's part, and so are `grad` and `weight`."""
    shards: Ranks | None
    """Who holds the other parts of the parameter; None where this is all of it."""
    grad: Tensor
    """The gradient; of a sparse one the values of the touched rows, duplicates summed."""
    weight: Tensor
    """The weights, or those of the touched rows: a copy once they are remembered, so that it stays as it was."""
    rows: Tensor | None = None
    """The rows that a sparse gradient touches."""
    counts: Tensor | None = None
    """How often each of them came up, if somebody asked."""
    states: list[Kept] = field(default_factory=list)

    def weight_now(self) -> Tensor:
        """Return the weights as they are now, or those of the touched rows."""
        return self.here if self.rows is None else self.param.index_select(0, self.rows)

    def as_grad(self, values: Tensor) -> Tensor:
        """Return a gradient of this parameter's layout with these values."""
        if self.rows is None:
            return values if self.here is self.param else kernels.as_part(values, self.param)
        size = (len(self.param), *values.shape[1:])
        # Nothing to check: rows and values come from a gradient that torch made.
        return torch.sparse_coo_tensor(self.rows[None], values, size, is_coalesced=True, check_invariants=False)

    def keep_where(self, ok: Bool[Tensor, ""]) -> None:
        """Undo the inner's step, in weights and kept states, unless `ok`."""
        if self.rows is None:
            _put_back(self.here, self.weight, ok)
            self.note_written()
        else:
            self.param.index_copy_(0, self.rows, torch.where(ok, self.weight_now(), self.weight))
        self.keep_states_where(ok)

    def note_written(self) -> None:
        """Let autograd know that the weights were changed: of a DTensor it does not see that."""
        if hasattr(self.param, "to_local"):
            torch.autograd.graph.increment_version([self.param])

    def keep_states_where(self, ok: Bool[Tensor, ""]) -> None:
        """Put the kept states back unless `ok`."""
        for kept in self.states:
            now = kept.state.get(kept.key)
            if not isinstance(now, Tensor) or now.shape != kept.tensor.shape:
                continue  # the inner threw it away or made something else of it
            if kept.by_row:
                assert self.rows is not None
                now.index_copy_(0, self.rows, torch.where(ok, now.index_select(0, self.rows), kept.before))
            elif now is kept.tensor:
                _put_back(now, kept.before, ok)
            else:  # a new tensor, which may be shared with a gradient or a weight: not written into
                kept.state[kept.key] = now.clone()
                _put_back(kept.state[kept.key], kept.before, ok)


class WrappedOptimizer(Optimizer):
    """An optimizer around another one, `self.optimizer`, which makes the step; a plain torch Optimizer to its users.

    - `param_groups` is the inner's own list, so that a scheduler on either of them reaches both. The wrapper's options
      stand in the groups beside the inner's, and may differ from group to group.
    - `state` holds what the wrapper keeps of each parameter; what the inner keeps is in `self.optimizer.state`.
    - `state_dict()` has both together, in torch's own format: what the plain inner optimizer saved loads here (what is
      the wrapper's own starts fresh), and what is saved here loads into the plain inner optimizer.

    A subclass gives `_fresh_state`, `_step`, `_check_group`, and the names of its options and states.
    """

    own_options: ClassVar[tuple[str, ...]] = ()
    """The keys that the wrapper adds to each group."""
    optimizer: Optimizer
    """The inner optimizer."""

    def __init__(self, optimizer: Optimizer, options: dict[str, Any]) -> None:
        self.optimizer = optimizer
        self._check_inner()
        for group in optimizer.param_groups:
            if len(self.own_options) > 1 and all(option in group for option in self.own_options):
                group.update(options)  # left there by an earlier wrapper: a group of its own sets some of them
            self._check_group({**options, **group})
        # What torch does when it restores an optimizer: it makes the hooks and asks for no parameters.
        self.__setstate__({"state": defaultdict(dict), "defaults": {**optimizer.defaults, **options}})
        self._complete_groups()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    def own_states(self) -> tuple[str, ...]:
        """Return the state keys that are the wrapper's own; all others in a saved state are the inner's."""
        raise NotImplementedError

    def _fresh_state(self, held: Held) -> dict[str, Tensor]:
        raise NotImplementedError

    def _step(self, held: list[Held]) -> None:
        """Make the inner's step, and whatever belongs before and after it."""
        raise NotImplementedError

    def _takes_shards(self, param: Tensor, dim: int, group: dict[str, Any]) -> bool:
        """Say whether each rank can see to its own part of what is cut along a dimension; if not, DTensor does it."""
        return False

    def _check_inner(self) -> None:
        if isinstance(self.innermost, torch.optim.LBFGS):
            raise ConfigError(
                "LBFGS makes several steps in one, and asks for the loss in between; it cannot be wrapped"
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        for index, param in enumerate(group["params"]):
            if not param.is_floating_point():
                label = parameter_label(group, index)
                raise ConfigError(f"{label} has dtype {param.dtype}; expected a real floating-point dtype")

    def _complete_groups(self) -> None:
        for group in self.param_groups:
            for option in self.own_options:
                group.setdefault(option, self.defaults[option])

    def _inner_ones(self) -> Iterator[Optimizer]:
        """Yield the optimizers inside this one, from the outside in."""
        optimizer: Any = self.optimizer
        while isinstance(optimizer, WrappedOptimizer):
            yield optimizer
            optimizer = optimizer.optimizer
        yield optimizer

    @property
    def innermost(self) -> Optimizer:
        """The optimizer that is inside all wrappers."""
        return innermost(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer, with the wrapper's options in it.

        Raises:
            ConfigError: an option is out of range, or a parameter is not of a real floating-point type.
        """
        self.optimizer.add_param_group(param_group)
        try:
            self._complete_groups()
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
            ConfigError: a gradient has a layout that is neither dense nor sparse rows, or is sparse and the inner
                optimizer does not take it or moves other rows too.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._complete_groups()  # the inner may have been given a group, or have loaded a plain state
        self._step(
            [
                self._hold(param, index, group)
                for group in self.param_groups
                for index, param in enumerate(group["params"])
                if param.grad is not None
            ]
        )
        return loss

    def _hold(self, param: Tensor, index: int, group: dict[str, Any]) -> Held:
        grad = param.grad
        assert grad is not None
        parts = kernels.parts_of([param, grad])
        label, shards = parameter_label(group, index), getattr(param, "sharded_over", None)
        if parts is None or (parts.ranks is not None and not self._takes_shards(param, parts.dim, group)):
            held = Held(param, group, label, param, shards, grad, param)
        else:
            weight, part = parts.tensors
            held = Held(param, group, label, weight, parts.ranks, part, weight)
        if grad.layout != torch.strided:
            self._take_rows(held, grad)
        state = self.state[param]
        if any(key not in state for key in self.own_states()):
            state.update({**self._fresh_state(held), **state})
        return held

    def _take_rows(self, held: Held, grad: Tensor) -> None:
        if grad.layout != torch.sparse_coo or grad.sparse_dim() != 1:
            raise ConfigError(
                f"{held.label} has a gradient of layout {grad.layout}; expected a dense one, or a sparse COO one over "
                "the first dimension only, as an embedding with sparse=True gives"
            )
        inner = self.innermost
        for option in ("momentum", "weight_decay"):
            if held.group.get(option) and not isinstance(inner, GuardedOptimizer):
                raise ConfigError(
                    f"{held.label} has a sparse gradient, and {type(inner).__name__} with {option} "
                    f"{held.group[option]} moves other rows than those it touches, unseen by {type(self).__name__}; "
                    f"set {option} to 0 for it, or use ClippyAdagrad, RowWiseAdagrad or torch.optim.SparseAdam"
                )
        summed = grad.coalesce()
        held.grad, held.rows = summed.values(), summed.indices()[0]
        held.weight = held.weight_now()

    def _remember(self, held: Held, states: bool) -> None:
        """Remember the weights before the step, and if asked the tensors of the inner's state.

        Left out are `step`, so that counting is the same wherever the inner keeps its counters, and what is not a dense
        tensor on the parameter's device, which could not be selected, or not without waiting for the device.
        """
        if held.rows is None:
            held.weight = held.weight.clone()
        for optimizer in self._inner_ones() if states else ():
            state = optimizer.state.get(held.param, {})
            for key, value in state.items():
                here = isinstance(value, Tensor) and value.device == held.param.device
                if key == STEP or not here or value.layout != torch.strided:
                    continue
                if held.rows is not None and value.dim() > 0 and len(value) == len(held.param):
                    held.states.append(Kept(state, key, value, value.index_select(0, held.rows), True))
                else:
                    held.states.append(Kept(state, key, value, kernels.local(value).clone(), False))

    def _step_inner(self, held: list[Held]) -> None:
        try:
            self.optimizer.step()
        except RuntimeError as error:
            sparse = [each.label for each in held if each.rows is not None]
            if sparse and "sparse" in str(error).lower():
                raise ConfigError(
                    f"{sparse[0]} has a sparse gradient, which {type(self.innermost).__name__} does not take; give it "
                    "an optimizer of its own that does (ClippyAdagrad, RowWiseAdagrad, torch.optim.Adagrad or "
                    "torch.optim.SparseAdam), or set sparse=False in its embedding"
                ) from error
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "state": self.state, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The groups are the inner's, wherever torch hands them in.
        super().__setstate__({key: value for key, value in state.items() if key != "param_groups"})

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimizers as one, in torch's format."""

        def add_inner(_: Optimizer, own: dict[str, Any]) -> dict[str, Any]:
            inner = self.optimizer.state_dict()
            keys = [*inner["state"], *(key for key in own["state"] if key not in inner["state"])]
            both = {key: {**inner["state"].get(key, {}), **own["state"].get(key, {})} for key in keys}
            return {**inner, "state": both, **self._shared_state()}

        # A hook, so that the user's own hooks see all of it.
        handle = self.register_state_dict_post_hook(add_inner, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both optimizers, or of the plain inner one; what it lacks is as in a fresh wrapper.

        The wrapper's own states keep the dtype in which they were saved.
        """
        own: dict[Any, dict[str, Any]] = {}
        order: list[Any] = []
        options = [{key: group[key] for key in self.own_options if key in group} for group in self.param_groups]

        def load_inner(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            self._load_shared_state(final)
            mine, inner = self.own_states(), {}
            for key, state in final["state"].items():
                own[key] = {name: value for name, value in state.items() if name in mine}
                inner[key] = {name: value for name, value in state.items() if name not in mine}
            groups = [{**ours, **theirs} for ours, theirs in zip(options, final["param_groups"], strict=False)]
            groups += final["param_groups"][len(groups) :]  # more than there are: torch says so
            order.extend(chain.from_iterable(group["params"] for group in groups))
            inner = {key: state for key, state in inner.items() if state}
            self.optimizer.load_state_dict({**final, "state": inner, "param_groups": groups})
            return {"state": {}, "param_groups": groups}

        def restore_own(_: Optimizer) -> None:
            for param in chain.from_iterable(group["params"] for group in self.param_groups):
                state = own.get(order.pop(0))
                if state:
                    self.state[param] = {name: value.clone().to(param.device) for name, value in state.items()}

        # Hooks, so that ours sees what the user's own hooks made of the state, and theirs sees ours.
        handles = (
            self.register_load_state_dict_pre_hook(load_inner),
            self.register_load_state_dict_post_hook(restore_own, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _shared_state(self) -> dict[str, Any]:
        """Return what is saved beside the states of parameters, under keys that torch does not use."""
        return {}  # a subclass may have some

    def _load_shared_state(self, state_dict: dict[str, Any]) -> None:
        """Load what `_shared_state` gave, if it is there; refuse before anything is changed."""


def split_alike(first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return two tensors of one shape as they are, or if they are large and on a CPU in pieces of a few rows."""
    if first.device.type != "cpu" or first.numel() <= 2 * CHUNK or hasattr(first, "to_local"):
        return [(first, second)]
    rows = max(1, CHUNK * len(first) // first.numel())
    return list(zip(first.split(rows), second.split(rows), strict=True))


def _put_back(now: Tensor, before: Tensor, ok: Bool[Tensor, ""]) -> None:
    """Write what was there before, unless `ok`."""
    for piece, held in split_alike(kernels.local(now), kernels.local(before)):
        piece.copy_(torch.where(ok, piece, held))


def usable_norms(held: list[Held]) -> tuple[list[Float[Tensor, ""]], list[Bool[Tensor, ""]]]:
    """Return the L2 norm of each gradient, over all its shards, and whether it can be taken in.

        usable = ||g|| <= 2^-10 * sqrt(largest number)               1.8e16 in float32; false for NaN and infinity

    Then neither the square of a coordinate, as accumulators hold it, nor a sum of squares over a million tensors
    overflows.
    """
    dtypes = [wide_dtype(each.grad.dtype) for each in held]
    found = [kernels.whole(torch.linalg.vector_norm(each.grad, dtype=d)) for each, d in zip(held, dtypes, strict=True)]
    norms = kernels.each_over_shards(found, [each.shards for each in held], kernels.joint_norm)
    limits = [math.sqrt(torch.finfo(dtype).max) * 2.0**-10 for dtype in dtypes]
    return norms, [norm <= limit for norm, limit in zip(norms, limits, strict=True)]
