"""Row-wise Adagrad, for embedding tables."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..errors import ConfigError
from ..native.rows import can_step, coalesce, step_rowwise_adagrad
from . import kernels
from .guarded import BAD_STEPS, SUM, Asking, GuardedOptimizer, Touched, parameter_label, take_in, wide_dtype


class RowWiseAdagrad(GuardedOptimizer):
    """Adagrad with one accumulator for each row: an embedding table's state costs 1 / width of full Adagrad's.

        G_r <- G_r + mean_j g_rj^2
        w_r <- w_r - eta * g_r / (sqrt(G_r) + eps)

    A row is the first dimension. With sparse gradients, duplicates of a row are summed first and only the batch's
    rows are read and written. This is the exact row-wise Adagrad of FBGEMM and TorchRec (`EXACT_ROWWISE_ADAGRAD`),
    epsilon outside the root. Full Adagrad for tables is `torch.optim.Adagrad`.

    Args:
        params: parameters of one dimension or more, groups, or (name, parameter) pairs.
        lr: learning rate eta, 0 or more; a number or a tensor of one element.
        initial_accumulator_value: G before the first step, 0 or more.
        eps: added to the root, 0 or more.
        maximize: go up the gradient instead of down.

    Raises:
        ConfigError: an option is out of range, or a parameter has no rows.

    >>> table = torch.nn.Embedding(1000, 8, sparse=True)
    >>> optimizer = RowWiseAdagrad(table.parameters(), lr=0.1)
    >>> table(torch.tensor([3, 5, 3])).square().sum().backward()
    >>> optimizer.step()
    >>> optimizer.state[table.weight]["sum"].shape
    torch.Size([1000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        *,
        initial_accumulator_value: float = 0.1,
        eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for index, param in enumerate(group["params"]):
            if param.dim() == 0:
                raise ConfigError(f"{parameter_label(group, index)} is a scalar; row-wise Adagrad needs rows")

    def _fresh_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        start = group["initial_accumulator_value"]
        dtype = wide_dtype(param.dtype)
        if type(param) in (Tensor, torch.nn.Parameter):
            total = torch.full(param.shape[:1], start, dtype=dtype, device=param.device)
        else:  # in shards, and in the right place then
            total = torch.full_like(kernels.row_mean_square(param.detach().to(dtype)), start)
        return {**super()._fresh_state(param, group), SUM: total}

    def _touch(self, param: Tensor, index: int, group: dict[str, Any]) -> Touched:
        """Leave the rows where they are if they can be stepped there: gathering them costs more than the step."""
        grad = param.grad
        if grad is not None and grad.is_sparse and grad.is_cpu and grad.sparse_dim() == 1:
            state = self.state[param]
            if not state:
                state.update(self._fresh_state(param, group))
            if can_step(param, state[SUM], grad) and math.isfinite(group["lr"]):
                return Touched(param, param, coalesce(grad), state)
        return super()._touch(param, index, group)

    def _takes_shards(self, dim: int, group: dict[str, Any]) -> bool:
        return dim == 0  # a row has to lie on one rank

    def _update(self, each: Touched, group: dict[str, Any]) -> Asking[None]:
        weight, grad, total, eps = each.weight, each.grad, each.state[SUM], group["eps"]
        # (sqrt(G) + eps)^2 is never below G + eps^2.
        floor = group["initial_accumulator_value"] + eps**2
        if grad.is_sparse:
            rate = float(group["lr"])
            limit = kernels.gradient_limit(total.dtype, rate, floor) / math.sqrt(max(1, weight[:1].numel()))
            taken = step_rowwise_adagrad(weight, total, grad, -rate if group["maximize"] else rate, eps, float(limit))
            each.state[BAD_STEPS].add_(not taken)
            return
        grad, lr, _ = yield from take_in(each, total, group, floor)
        total.add_(kernels.row_mean_square(grad))
        weight.sub_(kernels.rowwise_delta(grad, total, lr, eps))
