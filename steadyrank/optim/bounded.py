"""The bound that makes an optimizer a Clippy: found from weights and proposed steps, the same on every base."""

import math
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from .. import native
from ..errors import ConfigError, check_known
from ..ranks import Ranks
from . import fused, kernels
from .guarded import BAD_STEPS, CHUNK, GuardedOptimizer, Touched, check_not_negative, parameter_label, wide_dtype

CLIP_FACTOR = "clip_factor"
"""State key: sigma of the last step; 0-d, in [0, 1], on the device. 0 if refused, 1 if nothing was clipped; where a
tensor has several factors, the smallest."""
BIND_FRAC = "bind_frac"
"""State key, with `telemetry`: the share of coordinates whose step was above their bound before it was scaled; 0-d."""
BINDING = "binding"
"""State key, with `telemetry`: flat index of the coordinate furthest above its bound; 0-d int64, -1 if none was."""
PRESSURE = "pressure_log_mean"
"""State key, with `calibration_steps`: mean of ln(worst ratio of step to bound) over the calibration so far; 0-d."""
PRESSURE_STEPS = "pressure_steps"
"""State key, with `calibration_steps`: steps that the calibration has taken in; 0-d."""

Granularity = Literal["tensor", "row", "unit"]
"""What shares one factor: a tensor (the paper), an index of the first dimension (rows of a table), or an output unit
(an index of the first dimension of a matrix; vectors and scalars have one factor as a whole)."""


class BoundedOptimizer(GuardedOptimizer):
    """An optimizer whose step is scaled down until no coordinate changes by more than its bound.

        bound = s * (lambda_rel * |w| + lambda_abs [+ lambda_acc / sqrt(G + eps) on Adagrad])
        ratio = |delta| / bound,         delta the whole step that the base would take, weight decay inside
        sigma = min(1, 1 / max_i ratio_i)
        w     <- w - sigma * delta

    The maximum is taken over what shares a factor (`granularity`). With `quantile` q > 0 the ratio that only the share
    q of the coordinates exceeds takes the place of the maximum, and those coordinates stop at their own bound. s is 1,
    or after `calibration_steps` what the calibration found.

    A DTensor in shards on a mesh of one dimension is stepped in its parts, by plain operations; all else of DTensors by
    DTensor's own.

    A parameter that is one rank's part of a table has the attributes `sharded_over`, the `Ranks` that hold all of it,
    and `sharded_rows` (ends of its pieces, and what makes a row here one of the whole table). What holds for a tensor
    then holds for all parts together: the verdict, the factor, the calibration, the telemetry. With granularity "row"
    there is none that would: no rank asks another (but for the calibration), a gradient is refused where it lies, and
    `state["clip_factor"]` is the least of the rows here.

    A subclass says what the base does: `_before` (states that change before the step), `_deltas` and `_after` (states
    that change after it), each for a list of tensors.
    """

    own_option: ClassVar[str] = "absolute_threshold"
    joins_parts: ClassVar[bool] = True
    rests_on_zero: ClassVar[bool] = True
    """Whether the base's step is zero where the gradient is."""

    def _kind(self, group: dict[str, Any]) -> int:
        """Return the base's number in clippy.c."""
        raise NotImplementedError

    def _before(self, touched: list[Touched], grads: list[Tensor], usable: list[Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _deltas(
        self, touched: list[Touched], grads: list[Tensor], group: dict[str, Any], lr: Float[Tensor, ""]
    ) -> list[Tensor]:
        raise NotImplementedError

    def _bounds(self, touched: list[Touched], weights: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        relative, absolute = group["variable_relative_threshold"], group["absolute_threshold"]
        return kernels.update_bounds(weights, relative, absolute, 0.0, [], 0.0)

    def _after(
        self,
        touched: list[Touched],
        grads: list[Tensor],
        factors: list[Tensor],
        usable: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        raise NotImplementedError

    def _floor(self, group: dict[str, Any]) -> float:
        """Return what the base's denominator never goes below, squared."""
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_known(group["granularity"], get_args(Granularity), "granularity")
        check_not_negative("variable_relative_threshold", group["variable_relative_threshold"])
        check_not_negative("absolute_threshold", group["absolute_threshold"], infinite=True)
        check_not_negative("calibration_steps", group["calibration_steps"])
        check_not_negative("quantile", group["quantile"])
        check_not_negative("calibration_headroom", group["calibration_headroom"])
        if not group["quantile"] < 1:
            raise ConfigError(f"quantile: expected a share of coordinates in [0, 1), came {group['quantile']}")
        if not group["calibration_headroom"] > 0:
            raise ConfigError(f"calibration_headroom: expected above 0, came {group['calibration_headroom']}")
        if group["foreach"] and group["fused"]:
            raise ConfigError("foreach and fused: at most one of them can be True")

    def _takes_shards(self, dim: int, group: dict[str, Any]) -> bool:
        # The k-th largest of shards is not that of the whole; and a row has to lie on one rank to be judged there.
        return not group["quantile"] and (dim == 0 or (group["granularity"] == "tensor" and not group["telemetry"]))

    def _fresh_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        dtype = wide_dtype(param.dtype)
        one = torch.ones((), dtype=dtype, device=param.device)
        state = {**super()._fresh_state(param, group), CLIP_FACTOR: one}
        if group["telemetry"]:
            state |= {BIND_FRAC: torch.zeros_like(one), BINDING: torch.full_like(one, -1, dtype=torch.int64)}
        if group["calibration_steps"]:
            state |= {PRESSURE: torch.zeros_like(one), PRESSURE_STEPS: torch.zeros_like(one)}
        return state

    def _update_all(self, touched: list[Touched], group: dict[str, Any]) -> None:
        rest = touched
        if group["fused"] is not False and not torch.compiler.is_compiling():
            rest = self._step_fused(touched, group)
        # In the order of the parameters, not of a set: with shards, all processes have to go through them alike.
        for kind in dict.fromkeys(_kind_of(each) for each in rest):
            alike = [each for each in rest if _kind_of(each) == kind]
            device, shards = kind[0], alike[0].shards
            if shards is not None:  # not by their size, which differs from rank to rank
                self._check_shards(alike, group)
                self._step_lists(alike, group)
                continue
            if group["fused"] and device.type != "cpu" and not torch.compiler.is_compiling():
                fused.compiled(type(self)._step_lists)(self, alike, group)
                continue
            for bunch in _bunches(alike, group["foreach"]):
                self._step_lists(bunch, group)

    def _step_fused(self, touched: list[Touched], group: dict[str, Any]) -> list[Touched]:
        """Step what the C kernel takes, and return the rest."""
        must = group["fused"] is True
        taken: list[Touched] = []
        rest: list[Touched] = []
        for each in touched:
            # The kernel knows of no other rank.
            (taken if each.shards is None and fused.takes(each, self.row_states) else rest).append(each)
        if must:
            self._check_fused(rest, group)
        if not taken or not self._plain(group) or not native.available(must) or not math.isfinite(float(group["lr"])):
            return touched
        fused.step(taken, self.row_states, self._fused_options(group))
        for each in taken:
            self._name_binding(each)
        return rest

    def _check_fused(self, rest: list[Touched], group: dict[str, Any]) -> None:
        """Raise ConfigError unless what the C kernel does not take is on a GPU, where torch.compile serves."""
        odd = next((each for each in rest if each.weight.device.type == "cpu"), None)
        if odd is not None:
            index = next(i for i, p in enumerate(group["params"]) if p is odd.param)
            raise ConfigError(
                f"{parameter_label(group, index)} cannot be stepped by the fused kernel: on the CPU it takes "
                "contiguous float32 tensors that no other rank has a part of; leave fused None, and what fits is taken"
            )
        if not self._plain(group) and not rest:
            raise ConfigError(
                "fused: on the CPU it takes neither granularity, quantile, calibration nor a fading accumulator; "
                "leave it None"
            )

    def _check_shards(self, touched: list[Touched], group: dict[str, Any]) -> None:
        """Raise ConfigError where what one factor rests on would have to be gathered from all ranks."""
        if group["quantile"] and not has_rows(touched[0].weight, group["granularity"]):
            index = next(i for i, p in enumerate(group["params"]) if p is touched[0].param)
            raise ConfigError(
                f"{parameter_label(group, index)} is cut over ranks: quantile {group['quantile']} of all of it would "
                "need the ratios of all ranks in one place; set quantile to 0, or granularity to 'row', whose quantile "
                "is within a row"
            )

    def _plain(self, group: dict[str, Any]) -> bool:
        """Say whether the options are those that the fused kernels know."""
        return group["granularity"] == "tensor" and not group["quantile"] and not group["calibration_steps"]

    def _fused_options(self, group: dict[str, Any]) -> fused.Options:
        lr = float(group["lr"])
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        return fused.Options(
            kind=self._kind(group),
            sign=-1.0 if group["maximize"] else 1.0,
            lr=lr,
            relative=group["variable_relative_threshold"],
            accumulator_relative=group.get("accumulator_relative_threshold", 0.0),
            absolute=min(group["absolute_threshold"], 1e30),
            eps=group["eps"],
            decay=lr * group["weight_decay"],
            limit=kernels.gradient_limit(torch.float32, lr, self._floor(group)),
            keep1=beta1,
            new1=1 - beta1,
            keep2=beta2,
            new2=1 - beta2,
            beta1=beta1,
            beta2=beta2,
        )

    def _step_lists(self, touched: list[Touched], group: dict[str, Any]) -> None:
        """Step tensors of one device and dtype together."""
        dtype = torch.promote_types(touched[0].weight.dtype, torch.float32)
        device = touched[0].weight.device
        lr = group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.to(device, dtype, non_blocking=True).reshape(())
        else:
            lr = torch.full((), lr, dtype=dtype, device=device)
        limit = kernels.gradient_limit(dtype, lr, self._floor(group))
        usable_P = kernels.are_usable([each.grad for each in touched], limit, lr, _shards(touched, group))
        lr = kernels.keep_where(torch.isfinite(lr), lr)
        usable = list(usable_P.unbind())
        if self._in_chunks(touched, group):
            self._step_chunks(touched[0], usable, group, lr)
            return
        grads = self._grads(touched, usable, group)
        self._before(touched, grads, usable, group)
        deltas, bounds = self._propose(touched, grads, usable, group, lr)
        ratios = kernels.bound_ratios(deltas, bounds, kernels.surely_positive(group["absolute_threshold"]))
        factors = self._factors(touched, ratios, usable, group)
        self._apply(touched, deltas, bounds, factors, group)
        self._after(touched, grads, factors, usable, group)

    def _in_chunks(self, touched: list[Touched], group: dict[str, Any]) -> bool:
        first = touched[0]
        large = len(touched) == 1 and first.weight.device.type == "cpu" and first.weight.numel() > 2 * CHUNK
        return large and self._plain(group) and not group["telemetry"] and not hasattr(first.weight, "to_local")

    def _step_chunks(self, each: Touched, usable: list[Tensor], group: dict[str, Any], lr: Float[Tensor, ""]) -> None:
        """Step one large tensor on a CPU, twice through memory but with everything between in the cache."""
        rows = max(1, CHUNK * len(each.weight) // each.weight.numel())
        split = {key: each.state[key].split(rows) for key in self.row_states if key in each.state}
        parts = zip(each.weight.split(rows), each.grad.split(rows), strict=True)
        chunks = [
            [Touched(each.param, w, g, {**each.state, **{key: split[key][i] for key in split}}, each.rows)]
            for i, (w, g) in enumerate(parts)
        ]
        worst = []
        positive = kernels.surely_positive(group["absolute_threshold"])
        for chunk in chunks:
            grads = self._grads(chunk, usable, group)
            self._before(chunk, grads, usable, group)
            deltas, bounds = self._propose(chunk, grads, usable, group, lr)
            worst.append(kernels.bound_ratios(deltas, bounds, positive)[0].amax())
        factors = self._factors([each], [torch.stack(worst)], usable, group)
        for chunk in chunks:
            grads = self._grads(chunk, usable, group)
            self._apply(chunk, self._whole_deltas(chunk, grads, usable, group, lr), [], factors, group)
            self._after(chunk, grads, factors, usable, group)

    def _grads(self, touched: list[Touched], usable: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Return the gradients to descend, in the accumulators' dtype; zeros where they are not usable."""
        grads = [each.grad.to(wide_dtype(each.weight.dtype)) for each in touched]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        return [kernels.keep_where(ok, grad) for ok, grad in zip(usable, grads, strict=True)]

    def _propose(
        self,
        touched: list[Touched],
        grads: list[Tensor],
        usable: list[Tensor],
        group: dict[str, Any],
        lr: Float[Tensor, ""],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the whole steps that would be taken unbounded, and their bounds."""
        bounds = self._bounds(touched, _weights(touched), group)
        if group["calibration_steps"]:
            torch._foreach_mul_(bounds, [self._scale(each, group) for each in touched])
        return self._whole_deltas(touched, grads, usable, group, lr), bounds

    def _whole_deltas(
        self,
        touched: list[Touched],
        grads: list[Tensor],
        usable: list[Tensor],
        group: dict[str, Any],
        lr: Float[Tensor, ""],
    ) -> list[Tensor]:
        """Return the base's steps with weight decay; zeros where the gradient is not usable."""
        deltas = self._deltas(touched, grads, group, lr)
        if group["weight_decay"]:
            torch._foreach_add_(deltas, torch._foreach_mul(_weights(touched), lr * group["weight_decay"]))
        if group["weight_decay"] or not self.rests_on_zero:
            deltas = [kernels.keep_where(ok, delta) for ok, delta in zip(usable, deltas, strict=True)]
        return deltas

    def _factors(
        self, touched: list[Touched], ratios: list[Tensor], usable: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        """Return each tensor's factors, in shapes that broadcast over it, and note them in the states."""
        if self._plain(group):
            most_P = kernels.over_shards(kernels.largest(ratios), _shards(touched, group))
            factors = list(kernels.factor_of(most_P).unbind())
        else:
            worst = [self._worst(ratio, group) for ratio in ratios]
            most_P = kernels.over_shards(kernels.largest(worst), _shards(touched, group))
            by_row = [has_rows(ratio, group["granularity"]) for ratio in ratios]
            shared = zip(by_row, worst, most_P.unbind(), strict=True)
            factors = [kernels.factor_of(w if rows else most) for rows, w, most in shared]
        usable_P = torch.stack(usable)
        least = torch.where(usable_P, kernels.factor_of(most_P), 0.0).unbind()
        torch._foreach_copy_([each.state[CLIP_FACTOR] for each in touched], list(least))
        torch._foreach_add_([each.state[BAD_STEPS] for each in touched], list((~usable_P).long().unbind()))
        for each, ratio, most, ok in zip(touched, ratios, most_P.unbind(), usable, strict=True):
            if PRESSURE in each.state:
                self._calibrate(each, most, ok, group)
            if BINDING in each.state:
                self._note_binding(each, ratio)
                self._name_binding(each)
        self._share_bindings([pair for pair in zip(touched, ratios, strict=True) if BINDING in pair[0].state])
        return factors

    def _worst(self, ratio: Tensor, group: dict[str, Any]) -> Tensor:
        if not group["quantile"]:
            return worst_of(ratio, group["granularity"])
        by_row = has_rows(ratio, group["granularity"])
        gathered = ratio if by_row else kernels.whole(ratio)  # the k-th largest of shards is not that of the whole
        return kernels.worst_but_for(gathered, group["quantile"], by_row)

    def _calibrate(
        self, each: Touched, worst: Float[Tensor, ""], usable: Bool[Tensor, ""], group: dict[str, Any]
    ) -> None:
        """Take in one step of the calibration, unless it is over."""
        mean, count = each.state[PRESSURE], each.state[PRESSURE_STEPS]
        takes = usable & (count < group["calibration_steps"]) & (worst > 0) & torch.isfinite(worst)
        count.add_(takes)
        step = (torch.where(takes, worst, 1.0).log() - mean) / count.clamp(min=1)
        mean.add_(torch.where(takes, step, 0.0))

    def _scale(self, each: Touched, group: dict[str, Any]) -> Float[Tensor, ""]:
        """Return s, by which a tensor's bound is scaled: 1 until the calibration is over.

            s = headroom * exp(mean over the calibration of ln(worst ratio))

        The geometric mean, so that one spike among a hundred steps moves it by a few per cent and not to its own size.
        """
        if PRESSURE not in each.state:  # it was asked for later
            return torch.ones_like(each.state[CLIP_FACTOR])
        over = each.state[PRESSURE_STEPS] >= group["calibration_steps"]
        return torch.where(over, group["calibration_headroom"] * each.state[PRESSURE].exp(), 1.0)

    def _note_binding(self, each: Touched, ratio: Tensor) -> None:
        """Note which coordinates are above their bound."""
        ratio = kernels.whole(ratio)
        if ratio.numel() == 0:
            each.state[BIND_FRAC].zero_()
            each.state[BINDING].fill_(-1)
            return
        exceeding = (ratio > 1).to(each.state[BIND_FRAC].dtype).mean()
        each.state[BIND_FRAC].copy_(exceeding)
        each.state[BINDING].copy_(torch.where(exceeding > 0, ratio.argmax(), -1))

    def _name_binding(self, each: Touched) -> None:
        """Turn an index into gathered rows into one into the table."""
        binding = each.state.get(BINDING)
        if binding is None or each.rows is None or each.rows.numel() == 0:
            return
        width = max(1, each.weight[0].numel())
        place = binding.clamp(min=0)
        row = each.rows.index_select(0, (place // width).reshape(1)).reshape(())
        binding.copy_(torch.where(binding < 0, binding, row * width + place % width))

    def _share_bindings(self, told: list[tuple[Touched, Tensor]]) -> None:
        """Of tensors cut over ranks: take the coordinate of the rank that has the worst, and the share over all."""
        ranks = told[0][0].shards if told else None
        if ranks is None or ranks.is_alone:
            return
        touched, ratios = [each for each, _ in told], [ratio for _, ratio in told]
        shares_P = torch.stack([each.state[BIND_FRAC] for each in touched])
        counts_P = torch.stack([torch.full_like(share, r.numel()) for share, r in zip(shares_P, ratios, strict=True)])
        found_NPX = ranks.gather(torch.stack([kernels.largest(ratios), counts_P, shares_P * counts_P], 1))
        worst_NP, counts_NP, above_NP = found_NPX.unbind(2)
        places_NP, sizes_NP = ranks.gather(torch.stack([_place_here(each) for each in touched], 1)).unbind(1)
        before_NP = sizes_NP.cumsum(0) - sizes_NP
        places_NP = torch.where(places_NP < 0, places_NP, places_NP + before_NP)
        places_P = places_NP.gather(0, worst_NP.argmax(0, keepdim=True))[0]
        shares_P = above_NP.sum(0) / counts_NP.sum(0).clamp(min=1)
        torch._foreach_copy_([each.state[BINDING] for each in touched], list(places_P.unbind()))
        torch._foreach_copy_([each.state[BIND_FRAC] for each in touched], list(shares_P.unbind()))

    def _apply(
        self,
        touched: list[Touched],
        deltas: list[Tensor],
        bounds: list[Tensor],
        factors: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        # Selected: where the factor is 0, the step may be infinite.
        deltas = [torch.where(factor > 0, delta * factor, 0.0) for delta, factor in zip(deltas, factors, strict=True)]
        if group["quantile"]:  # the coordinates that the factor leaves above their bound
            torch._foreach_minimum_(deltas, bounds)
            torch._foreach_maximum_(deltas, torch._foreach_neg(bounds))
        torch._foreach_sub_([each.weight for each in touched], deltas)


def has_rows(x: Tensor, granularity: str) -> bool:
    """Say whether a tensor has a factor for each index of its first dimension, and not one for all."""
    return bool(x.dim() > {"tensor": math.inf, "row": 0, "unit": 1}[granularity])


def worst_of(ratio: Tensor, granularity: str) -> Tensor:
    """Return the largest ratio of what shares a factor: 0-d, or one for each row in a shape that broadcasts."""
    return kernels.worst_by_row(ratio) if has_rows(ratio, granularity) else kernels.largest([ratio])[0]


def _kind_of(each: Touched) -> tuple[torch.device, torch.dtype, Ranks | None, bool]:
    return each.weight.device, each.weight.dtype, each.shards, hasattr(each.weight, "to_local")


def _shards(touched: list[Touched], group: dict[str, Any]) -> list[Ranks | None]:
    """Return of each tensor the ranks that have to be asked; none for tables of which every row is judged by itself."""
    if group["granularity"] == "row" and not group["calibration_steps"]:
        return [None if hasattr(each.param, "sharded_over") else each.shards for each in touched]
    return [each.shards for each in touched]


def _place_here(each: Touched) -> Int64[Tensor, "two"]:
    """Return where the coordinate noted in BINDING stands, and how many come between one rank's first and the next's.

    Of a table the first is its place in the whole of it, and the second 0.
    """
    binding = each.state[BINDING]
    if not hasattr(each.param, "sharded_over"):
        return torch.stack([binding, torch.full_like(binding, each.weight.numel())])
    ends, shifts = each.param.sharded_rows  # type: ignore[attr-defined]  # beside `sharded_over`
    width = max(1, each.weight.shape[1:].numel())
    piece = torch.searchsorted(ends, binding.clamp(min=0) // width, right=True).clamp(max=len(ends) - 1)
    shift = shifts.index_select(0, piece.reshape(1)).reshape(())  # indexing would wait for the GPU
    place = torch.where(binding < 0, binding, binding + shift * width)
    return torch.stack([place, torch.zeros_like(place)])


def _weights(touched: list[Touched]) -> list[Tensor]:
    return [each.weight.to(wide_dtype(each.weight.dtype)) for each in touched]


def _bunches(touched: list[Touched], foreach: bool | None) -> list[list[Touched]]:
    """Say which tensors of a device step together: all, none, or where it is left open, what saves time.

    On a GPU that is all of them, for fewer launches. On a CPU it is the small ones, whose cost is that of the calls;
    large ones are better gone through one after the other, in pieces.
    """
    if foreach or (foreach is None and touched[0].weight.device.type != "cpu"):
        return [touched]
    small = [each for each in touched if foreach is None and each.weight.numel() <= CHUNK]
    alone = [[each] for each in touched if foreach is False or each.weight.numel() > CHUNK]
    return [small, *alone] if small else alone
