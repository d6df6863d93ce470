"""Which rows of a batch push the weights most: loss and gradient of each row, by task, in one forward pass.

Shapes: B rows, K tasks, T times that a layer is used on a row, I and O its widths in and out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from ..schema import Batch, Task

LossFunction = Callable[[Tensor, Tensor, Tensor, Sequence[Task]], tuple[Tensor, Tensor]]
"""`losses.multitask_loss`, or one like it: logits, labels and weights [B, K] and the tasks give the total, and the loss
of each task [K], a weighted mean over rows, without its loss weight. It lies above and is handed in."""
ROWS = 8192
"""Rows read at a time: a batch of many ranks is more than one of them has memory for."""


@dataclass(frozen=True)
class RowReadings:
    """What one forward pass and K backward passes say about a batch."""

    losses_K: Float64[Tensor, " tasks"]
    """The loss of each task, as training sees it."""
    gradients_K: Float64[Tensor, " tasks"]
    """The norm over rows of `row_gradients_BK`."""
    row_losses_BK: Float64[Tensor, "batch tasks"]
    """loss_weight_k * w_bk * l_bk / sum_b w_bk: they sum to the total loss."""
    row_gradients_BK: Float64[Tensor, "batch tasks"]
    """L2 norm of the gradient of each of these, over the weights."""

    def push(self) -> Float64[Tensor, " batch"]:
        """How hard each row pushes: the root of the sum of squares over tasks."""
        return self.row_gradients_BK.square().sum(1).sqrt()


def read_rows(
    model: nn.Module,
    batch: Batch,
    tasks: Sequence[Task],
    loss: LossFunction,
    state: Mapping[str, Tensor] | None = None,
) -> RowReadings:
    """Return loss and gradient norm of each row and task, as the training step would meet them; 8,192 rows at a time.

    A linear layer y = W x + b turns row b's gradient delta_b at its output into delta_b x_b^T at W, and so

        |g_b|^2 = |delta_b|^2 (|x_b|^2 + 1),

    without a gradient for each row (a layer used T times on a row: sum over pairs of uses of (delta.delta')(x.x' + 1)).
    For any other module with weights it is |delta_b|^2, as if the output were the weight: exact for the embedding of
    one id and for a bias. Neither the model, nor its gradients, running statistics or the generators are changed.

    Args:
        model: Maps a Batch to logits [B, K]; in the mode in which it is.
        batch: On the model's device; at least one row.
        tasks: In the order of the logits' columns.
        loss: The loss that is trained.
        state: Other weights and buffers than the model's own, by name; the model's own fill in.

    Returns:
        The readings in float64, on the device. What is not finite shows as such in its own row, in its task's loss
        and in its task's gradient norm.

    Source: Goodfellow, Efficient per-example gradient computations, arXiv 1510.01799.
    """
    pieces = [batch]
    if len(batch) > ROWS:
        pieces = [batch.take(index) for index in torch.arange(len(batch), device=batch.time.device).split(ROWS)]
    return _join([_read(model, piece, tasks, loss, state or {}) for piece in pieces], pieces)


def _join(found: Sequence[RowReadings], pieces: Sequence[Batch]) -> RowReadings:
    """Return the readings of a batch from those of its pieces, each of which has its share of a task's weights."""
    if len(found) == 1:
        return found[0]
    sums_CK = torch.stack([piece.weights.double().sum(0) for piece in pieces])
    total_K = sums_CK.sum(0)
    each = list(zip(found, sums_CK / torch.where(total_K == 0, 1.0, total_K), strict=True))
    row_gradients_BK = torch.cat([readings.row_gradients_BK * share_K for readings, share_K in each])
    return RowReadings(
        torch.stack([readings.losses_K * share_K for readings, share_K in each]).sum(0),
        row_gradients_BK.square().sum(0).sqrt(),
        torch.cat([readings.row_losses_BK * share_K for readings, share_K in each]),
        row_gradients_BK,
    )


def _read(
    model: nn.Module, batch: Batch, tasks: Sequence[Task], loss: LossFunction, state: Mapping[str, Tensor]
) -> RowReadings:
    """Return the readings of rows that are one batch."""
    values = {
        name: state.get(name, p).detach().to(p).requires_grad_(p.requires_grad) for name, p in model.named_parameters()
    }
    values |= {name: state.get(name, b).detach().to(b, copy=True) for name, b in model.named_buffers()}
    devices = [batch.time.device] if batch.time.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), _watched(model) as uses:
        logits_BK = torch.func.functional_call(model, values, (batch,))
        _, parts_K = loss(logits_BK, batch.labels, batch.weights, tasks)
    weights_K = torch.tensor([task.loss_weight for task in tasks], dtype=torch.float64, device=parts_K.device)
    outputs = [output for each in uses for output in each.outputs]
    squares = []
    for k, part in enumerate(parts_K):
        (push_BK,) = torch.autograd.grad(part, logits_BK, retain_graph=True)
        # What reaches other columns is 0, or 0 times what is not finite there.
        own_BK = torch.zeros_like(push_BK)
        own_BK[:, k] = push_BK[:, k]
        deltas = iter(torch.autograd.grad(logits_BK, outputs, own_BK, retain_graph=True, allow_unused=True))
        norms = [each.squared_norms([next(deltas) for _ in each.outputs], len(batch)) for each in uses]
        squares.append(torch.stack([norm_B.to(part.device) for norm_B in norms]).sum(0))
    row_gradients_BK = torch.stack(squares, 1).sqrt() * weights_K
    with torch.no_grad():
        row_losses_BK = _row_losses(logits_BK.detach(), batch, tasks, loss) * weights_K
    return RowReadings(
        parts_K.detach().double(), row_gradients_BK.square().sum(0).sqrt(), row_losses_BK, row_gradients_BK
    )


class _Uses:
    """How one module with weights was used in a forward pass: its inputs (None: not a linear layer) and outputs."""

    def __init__(self, module: nn.Module) -> None:
        self.linear = isinstance(module, nn.Linear)
        self.bias = not isinstance(module, nn.Linear) or module.bias is not None
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep one use; a forward hook."""
        if isinstance(output, Tensor) and output.requires_grad:
            self.outputs.append(output)
            self.inputs.append(args[0].detach() if self.linear else output.new_zeros(len(output), 1))

    def squared_norms(self, deltas: Sequence[Tensor | None], rows: int) -> Float64[Tensor, " batch"]:
        """Return the squared norm of each row's gradient at the module's weights."""
        used = [(x, d) for x, d in zip(self.inputs, deltas, strict=True) if d is not None and d.numel()]
        if not used:
            return torch.zeros((), dtype=torch.float64).expand(rows)
        x_BTI, delta_BTO = (
            torch.cat([_by_row(t, rows, self.linear) for t in part], 1) for part in zip(*used, strict=True)
        )
        if x_BTI.shape[1] == 1:
            return delta_BTO.square().sum((1, 2)) * (x_BTI.square().sum((1, 2)) + self.bias)
        return (delta_BTO @ delta_BTO.mT * (x_BTI @ x_BTI.mT + self.bias)).sum((1, 2))


def _by_row(value: Tensor, rows: int, linear: bool) -> Tensor:
    return value.detach().double().reshape(rows, -1, value.shape[-1] if linear else value.numel() // rows)


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[_Uses]]:
    """Note every use of a module that holds weights itself, or in a list or dict of them."""
    holders = (nn.ParameterDict, nn.ParameterList)
    found, handles = [], []
    for module in model.modules():
        owns = any(True for _ in module.parameters(recurse=False)) or any(
            isinstance(c, holders) for c in module.children()
        )
        if owns and not isinstance(module, holders):
            found.append(_Uses(module))
            handles.append(module.register_forward_hook(found[-1].note))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _row_losses(logits_BK: Tensor, batch: Batch, tasks: Sequence[Task], loss: LossFunction) -> Tensor:
    """Return each row's part of each task's mean: w_bk l_bk / sum_b w_bk, l from the loss of a batch of one row."""

    def one_row(logits_K: Tensor, labels_K: Tensor, weights_K: Tensor) -> Tensor:
        return loss(logits_K[None], labels_K[None], weights_K[None], tasks)[1]

    losses_BK = torch.func.vmap(one_row)(logits_BK, batch.labels, batch.weights).double()
    weights_BK = batch.weights.double()
    sums_K = weights_BK.sum(0)
    return torch.where(weights_BK != 0, losses_BK * weights_BK / torch.where(sums_K == 0, 1.0, sums_K), 0.0)
