"""Steadiness for any torch optimizer: bound its updates as Clippy does, or clip its gradients by a rule."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from ..errors import CheckpointError, ConfigError, check_known
from . import kernels
from .bounded import CLIP_FACTOR, BoundedOptimizer, Granularity, worst_of
from .guarded import BAD_STEPS, GuardedOptimizer, check_not_negative, wide_dtype
from .rules import Gradient, Rule, row_counts
from .wrapped import Held, WrappedOptimizer, split_alike, usable_norms

GRAD_FACTOR = "grad_factor"
"""State key of `ClipGradients`: the smallest factor of the last step; 0-d, in [0, 1]; 0 if refused or skipped."""
GRAD_BAD_STEPS = "grad_bad_steps"
"""State key of `ClipGradients`: how many gradients could not be taken in; 0-d, int64."""


class ClipUpdates(WrappedOptimizer):
    """Bound the update of any torch optimizer, without knowing it: Clippy around SGD, Adam, Shampoo or your own.

        w'    what the inner optimizer makes of w, weight decay inside
        delta = w - w'
        bound = lambda_rel * |w| + lambda_abs
        sigma = min(1, min_i bound_i / |delta_i|)
        w     <- w - sigma * delta                          where sigma is 1: exactly w'

    The inner's own state takes in what it always does: momentum and accumulators know nothing of sigma.

    With `guard`, a parameter whose gradient is not usable (NaN, infinite, or of a norm above 1.8e16 in float32), or
    whose update is not finite, keeps its weights and the tensors of its inner state as they were, and its `bad_steps`
    grows; the others step as usual. The inner is shown zeros instead of such a gradient, so that state which it makes
    in that very step is finite. Its `step` counters, and what it keeps elsewhere (python numbers, tensors on another
    device, tensors within lists or objects), go on. Without `guard` only the weights are looked after: an update that
    is not finite is undone and counted, which does for a loop that guards its gradients, at lower cost.

    Our own optimizers guard themselves: around one of them, it refuses bad gradients and counts them in its own state
    (and `clip_factor` is then 1, since nothing moved).

    A step costs a copy of the weights, with `guard` also of gradients and inner state, and some passes over them. Of a
    sparse gradient, only the touched rows are copied and measured; one factor holds for all of them, unless
    `granularity="row"`. The inner has to leave all other rows alone: `momentum` and `weight_decay` are refused.

    Args:
        optimizer: the inner optimizer.
        variable_relative_threshold: lambda_rel, 0 or more; 0.5 in the paper.
        absolute_threshold: lambda_abs, 0 or more, may be infinite; 0.01 in the paper.
        granularity: what shares one sigma: "tensor"; "row", an index of the first dimension; "unit", an index of the
            first dimension of what has two or more dimensions.
        guard: also look after gradients and inner state; see above.

    All but the first are kept in each group, where they may differ.

    Raises:
        ConfigError: an option is out of range, a parameter is not of a real floating-point type, or the inner optimizer
            bounds its updates itself.

    Source: the bound of Tang et al., KDD 2023, arXiv 2302.09178, Algorithm 1. Around `torch.optim.Adagrad` with eps 0
    it is `ClippyAdagrad` with eps 0, up to rounding. Measured in the parameter's dtype: in bfloat16 a bound finer than
    2^-8 of the weight is not resolved.

    >>> layer = torch.nn.Linear(4, 1)
    >>> optimizer = ClipUpdates(torch.optim.SGD(layer.parameters(), lr=100.0, momentum=0.9))
    >>> layer(torch.ones(2, 4)).sum().backward()
    >>> optimizer.step()
    >>> bool(optimizer.state[layer.weight]["clip_factor"] < 0.01)
    True
    """

    own_options: ClassVar[tuple[str, ...]] = (
        "variable_relative_threshold",
        "absolute_threshold",
        "granularity",
        "guard",
    )

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        variable_relative_threshold: float = 0.5,
        absolute_threshold: float = 0.01,
        granularity: Granularity = "tensor",
        guard: bool = True,
    ) -> None:
        options = {
            "variable_relative_threshold": variable_relative_threshold,
            "absolute_threshold": absolute_threshold,
            "granularity": granularity,
            "guard": guard,
        }
        super().__init__(optimizer, options)

    def _check_inner(self) -> None:
        super()._check_inner()
        for inner in self._inner_ones():
            if isinstance(inner, BoundedOptimizer | ClipUpdates):
                raise ConfigError(
                    f"ClipUpdates: {type(inner).__name__} bounds its updates already; use it as it is, or wrap an "
                    "optimizer that does not"
                )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_known(group["granularity"], get_args(Granularity), "granularity")
        check_not_negative("variable_relative_threshold", group["variable_relative_threshold"])
        check_not_negative("absolute_threshold", group["absolute_threshold"], infinite=True)

    def own_states(self) -> tuple[str, ...]:
        """Return the keys of this wrapper's states; our own optimizers do the counting themselves."""
        return (CLIP_FACTOR,) if isinstance(self.innermost, GuardedOptimizer) else (CLIP_FACTOR, BAD_STEPS)

    def _takes_shards(self, param: Tensor, dim: int, group: dict[str, Any]) -> bool:
        return bool(dim == 0 or group["granularity"] == "tensor")  # a row has to lie on one rank

    def _guards(self, group: dict[str, Any]) -> bool:
        return bool(group["guard"]) and not isinstance(self.innermost, GuardedOptimizer)

    def _fresh_state(self, held: Held) -> dict[str, Tensor]:
        one = torch.ones((), dtype=wide_dtype(held.param.dtype), device=held.param.device)
        fresh = {CLIP_FACTOR: one, BAD_STEPS: torch.zeros_like(one, dtype=torch.int64)}
        return {key: fresh[key] for key in self.own_states()}

    def _step(self, held: list[Held]) -> None:
        guarded = [each for each in held if self._guards(each.group)]
        verdicts = iter(usable_norms(guarded)[1])
        usable = [next(verdicts) if self._guards(each.group) else None for each in held]
        for each, ok in zip(held, usable, strict=True):
            self._remember(each, states=ok is not None)
        with _shown(held, usable):
            self._step_inner(held)
        bunches: dict[Any, list[tuple[Held, Tensor | None]]] = {}
        for each, ok in zip(held, usable, strict=True):
            kind = (id(each.group), each.param.device, each.param.dtype, hasattr(each.here, "to_local"))
            bunches.setdefault(kind, []).append((each, ok))
        for bunch in bunches.values():
            self._bound(bunch)

    def _bound(self, bunch: list[tuple[Held, Tensor | None]]) -> None:
        """Scale the steps that the inner made of tensors of one group and kind, and undo those that are bad."""
        pairs = [(each.weight.to(wide_dtype(each.param.dtype)), each.weight_now()) for each, _ in bunch]
        pieces = [split_alike(*pair) for pair in pairs]
        group = bunch[0][0].group
        if all(len(each) == 1 for each in pieces):
            found = [[one] for one in _measure([each[0] for each in pieces], group)]
        else:
            found = [[_measure([piece], group)[0] for piece in each] for each in pieces]
        here_PX = torch.stack([_worst_of(measured) for measured in found])
        worst_PX = kernels.over_shards(here_PX, [each.shards for each, _ in bunch])
        for (each, usable), pair, parts, measured, worst_X in zip(bunch, pairs, pieces, found, worst_PX, strict=True):
            size, most = worst_X.unbind()
            finite = torch.isfinite(size)
            ok = finite if usable is None else usable & finite
            for (old, new), (_, worst) in zip(parts, measured, strict=True):
                factor = kernels.factor_of(worst if worst.dim() else most)
                # Where the factor is 1, lerp gives the second exactly (but for the sign of a zero).
                new.copy_(torch.where(ok, torch.lerp(old, new.to(old.dtype), factor), old))
            if each.rows is not None:  # what was written into is a copy of the rows
                each.param.index_copy_(0, each.rows, pair[1])
            each.note_written()
            each.keep_states_where(ok)
            state = self.state[each.param]
            state[CLIP_FACTOR].copy_(kernels.keep_where(ok, kernels.factor_of(most)))
            if BAD_STEPS in state:
                state[BAD_STEPS].add_(~ok)


def _worst_of(measured: list[tuple[Tensor, Tensor]]) -> Float[Tensor, "two"]:
    """Return the largest coordinate and the worst ratio of a tensor from those of its pieces."""
    sizes, worsts = zip(*measured, strict=True)
    return torch.stack([kernels.largest([torch.stack(sizes)])[0], kernels.largest(list(worsts)).amax()])


def _least(found: Tensor) -> Tensor:
    return found.amin(0)


def _measure(pieces: list[tuple[Tensor, Tensor]], group: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Return of each step its largest coordinate, and the worst ratio to its bound: one, or one for each row."""
    olds = [old for old, _ in pieces]
    deltas = list(torch._foreach_sub(olds, [new.to(old.dtype) for old, new in pieces]))
    relative, absolute = group["variable_relative_threshold"], group["absolute_threshold"]
    bounds = kernels.update_bounds(olds, relative, absolute, 0.0, [], 0.0)
    ratios = kernels.bound_ratios(deltas, bounds, kernels.surely_positive(absolute))
    if group["granularity"] == "tensor":
        worst = list(kernels.largest(ratios).unbind())
    else:
        worst = [worst_of(ratio, group["granularity"]) for ratio in ratios]
    return list(zip(kernels.largest(deltas).unbind(), worst, strict=True))


@contextmanager
def _shown(held: list[Held], usable: list[Tensor | None]) -> Iterator[None]:
    """Let the parameters have zeros for gradients that are not usable, and their own gradients back afterwards."""
    own = [each.param.grad for each in held]
    try:
        for each, ok in zip(held, usable, strict=True):
            if ok is not None or each.rows is not None:
                each.param.grad = each.as_grad(each.grad if ok is None else kernels.keep_where(ok, each.grad))
        yield
    finally:
        for each, grad in zip(held, own, strict=True):
            each.param.grad = grad


class ClipGradients(WrappedOptimizer):
    """Clip gradients by a rule before any torch optimizer's step.

    What the rule makes of a gradient is left in the parameter's `.grad`, as `torch.nn.utils.clip_grad_norm_` does:
    dense ones are changed in place, sparse ones replaced, with duplicates summed.

    A gradient that is not usable (NaN, infinite, or of a norm above 1.8e16 in float32) is refused: its parameter keeps
    weights and inner state, `grad_bad_steps` grows, `.grad` is left as zeros, and the rule does not learn of it. With a
    rule that judges all gradients together, the whole step is refused then. A step that the rule itself skips
    (`SkipSpikes`) changes nothing either, but for what the rule remembers.

    What "keeps its inner state" means, and what it costs, is as in `ClipUpdates` with `guard`: `step` counters go on.
    Without `guard`, weights and inner state go through the inner's step with a gradient of zeros; plain SGD and Adagrad
    then stay where they are, momentum and weight decay go on. Our own optimizers refuse bad gradients by themselves.

    To leave parameters out (AGC: the last layer), give them an optimizer of their own.

    Args:
        optimizer: the inner optimizer.
        rule: what is done to the gradients; `rules` and `spikes` have them.
        guard: look after weights and inner state; kept in each group as `grad_guard`, where it may differ.

    The rule's options, and what it remembers of all parameters together, are saved under the key "rule" of
    `state_dict`. As with all options of an optimizer, loaded ones overrule those given.

    Raises:
        ConfigError: a parameter is not of a real floating-point type, or the inner optimizer has a rule already.

    >>> from steadyrank.optim.rules import ClipGlobalNorm
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = ClipGradients(torch.optim.SGD([weight], lr=1.0), ClipGlobalNorm(1.0))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> optimizer.step()
    >>> weight.grad, optimizer.state[weight]["grad_factor"]
    (tensor([0.6000, 0.8000]), tensor(0.2000))
    """

    own_options: ClassVar[tuple[str, ...]] = ("grad_guard",)

    def __init__(self, optimizer: Optimizer, rule: Rule, *, guard: bool = True) -> None:
        self.rule = rule
        self.shared: dict[str, Tensor] = {}
        super().__init__(optimizer, {"grad_guard": guard})

    def _check_inner(self) -> None:
        super()._check_inner()
        if any(isinstance(inner, ClipGradients) for inner in self._inner_ones()):
            raise ConfigError("ClipGradients: the inner optimizer has a rule already; use one rule")

    def _takes_shards(self, param: Tensor, dim: int, group: dict[str, Any]) -> bool:
        return dim == 0 and param.dim() >= self.rule.parts_from

    def _take_rows(self, held: Held, grad: Tensor) -> None:
        super()._take_rows(held, grad)
        if self.rule.counts_rows:
            held.counts = row_counts(grad)

    def own_states(self) -> tuple[str, ...]:
        """Return the keys of this wrapper's states, and of the rule's."""
        return (GRAD_FACTOR, GRAD_BAD_STEPS, *self.rule.states)

    def _fresh_state(self, held: Held) -> dict[str, Tensor]:
        one = torch.ones((), dtype=wide_dtype(held.param.dtype), device=held.param.device)
        bad = torch.zeros_like(one, dtype=torch.int64)
        return {GRAD_FACTOR: one, GRAD_BAD_STEPS: bad, **self.rule.fresh(held.param, held.rows is not None)}

    def _step(self, held: list[Held]) -> None:
        if not held:
            self._step_inner(held)
            return
        taken = self._clip(held)
        for each in held:
            if each.group["grad_guard"]:
                self._remember(each, states=True)
        self._step_inner(held)
        for each, ok in zip(held, taken, strict=True):
            if each.group["grad_guard"]:
                each.keep_where(ok)

    def _clip(self, held: list[Held]) -> list[Tensor]:
        """Replace the gradients by what the rule makes of them; return of each parameter whether it is to step."""
        norms, usable = usable_norms(held)
        judged = usable
        if self.rule.joint:
            device = norms[0].device
            every = torch.stack([ok.to(device) for ok in usable]).all()
            judged = [every.to(ok.device) for ok in usable]
            like = torch.stack([norm.to(device) for norm in norms])
            self.shared = {key: value.to(device) for key, value in self.shared.items()} or self.rule.fresh_shared(like)
        gradients = [self._as_seen(*each) for each in zip(held, norms, usable, strict=True)]
        clipped = self.rule.clip(gradients, self.shared)
        for key, value in clipped.shared.items():
            self.shared[key] = torch.where(judged[0], value, self.shared[key]).to(self.shared[key].dtype)
        taken = []
        factors = kernels.each_over_shards(clipped.factors, [each.shards for each in held], _least)
        for i, each in enumerate(held):
            if clipped.states is not None:
                self._write_state(each, clipped.states[i], judged[i])
            goes = judged[i] if clipped.goes is None else judged[i] & clipped.goes.to(judged[i].device)
            self._write_grad(each, kernels.keep_where(goes, clipped.values[i]))
            self.state[each.param][GRAD_FACTOR].copy_(kernels.keep_where(goes, factors[i]))
            self.state[each.param][GRAD_BAD_STEPS].add_(~usable[i])
            taken.append(goes)
        return taken

    def _as_seen(self, held: Held, norm: Float[Tensor, ""], usable: Tensor) -> Gradient:
        values = kernels.keep_where(usable, held.grad.to(wide_dtype(held.grad.dtype)))
        state = {key: self._part_of(held, key) for key in self.rule.states}
        if held.rows is not None:
            for key in self.rule.row_states:
                if state[key].dim():
                    state[key] = state[key].index_select(0, held.rows)
        norm = kernels.keep_where(usable, norm)
        return Gradient(values, held.weight, norm, state, held.rows is not None, held.counts)

    def _part_of(self, held: Held, key: str) -> Tensor:
        state = self.state[held.param][key]
        return state if held.here is held.param else kernels.local(state)

    def _write_state(self, held: Held, new: dict[str, Tensor], ok: Tensor) -> None:
        for key, value in new.items():
            old = self._part_of(held, key)
            if held.rows is None or key not in self.rule.row_states or not old.dim():
                old.copy_(torch.where(ok, value, old))
            else:
                old.index_copy_(0, held.rows, torch.where(ok, value, old.index_select(0, held.rows)))

    def _write_grad(self, held: Held, values: Tensor) -> None:
        if held.rows is None and 0 in held.grad.stride():
            held.param.grad = held.as_grad(values.to(held.grad.dtype))  # an expanded gradient cannot be written to
        elif held.rows is None:
            held.grad.copy_(values)
        else:
            held.param.grad = held.as_grad(values.to(held.grad.dtype))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rule": self.rule, "shared": self.shared}

    def _shared_state(self) -> dict[str, Any]:
        options = {each.name: getattr(self.rule, each.name) for each in fields(self.rule)}
        return {"rule": {"name": type(self.rule).__name__, "options": options, "state": dict(self.shared)}}

    def _load_shared_state(self, state_dict: dict[str, Any]) -> None:
        saved, name = state_dict.get("rule"), type(self.rule).__name__
        if saved is None:  # of the plain inner optimizer
            self.shared = {}
            return
        if saved["name"] != name:
            raise CheckpointError(f"the state was saved with the rule {saved['name']}; expected {name}")
        for option in saved["options"]:
            check_known(option, [each.name for each in fields(self.rule)], f"option of {name}", CheckpointError)
        self.rule = replace(self.rule, **saved["options"])
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        self.shared = {key: value.clone().to(device) for key, value in saved["state"].items()}
