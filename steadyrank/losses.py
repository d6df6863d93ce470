"""Losses of many tasks at once: weighted, with labels that may be missing.

Shapes: B rows, K tasks.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own convention
from jaxtyping import Float
from torch import Tensor

from .errors import ConfigError
from .schema import Task

LossKind = Literal["bce", "mse", "huber"]


class MultitaskLoss(NamedTuple):
    """The loss of a batch."""

    total: Tensor
    """What is trained: sum_k scales[k] * loss_weight_k * parts[k]."""
    parts: Tensor
    """The loss of each task [K], without its loss weight; 0 where no row is labelled."""


def loss_kind(task: Task) -> LossKind:
    """Return the loss of a task, with `auto` resolved: bce for binary tasks and mse for regressions.

    >>> loss_kind(Task(kind="regression"))
    'mse'
    """
    if task.loss == "auto":
        return "bce" if task.kind == "binary" else "mse"
    return task.loss


def multitask_loss(
    logits_BK: Float[Tensor, "batch tasks"],
    labels_BK: Float[Tensor, "batch tasks"],
    weights_BK: Float[Tensor, "batch tasks"],
    tasks: Sequence[Task],
    scales_K: Float[Tensor, " tasks"] | None = None,
    sums_K: Float[Tensor, " tasks"] | None = None,
) -> MultitaskLoss:
    """Return the total loss and each task's part.

    part_k = sum_b w_bk l_k(logit_bk, label_bk) / sum_b w_bk, total = sum_k scale_k loss_weight_k part_k.

    A row of weight 0 is masked: whatever its logit and label are, even NaN, it changes neither the loss nor any
    gradient. A logit that is not finite in a row that counts makes the loss so too, for the guard to see. A task
    without a labelled row has a loss and a gradient of 0.

    Args:
        logits_BK: What the model says; a regression's is the label as the model learns it (`Task.encode`).
        labels_BK: What it should say.
        weights_BK: 0 or more; 0 masks the row for that task.
        tasks: The tasks, in the order of the columns (`tuple(schema.tasks.values())`).
        scales_K: By how much each task is damped for now; 1 for all when left out.
        sums_K: Sum of the weights over a larger batch of which these rows are a part (`Share.weights`): the losses of
            all its parts then add up to its loss.

    Raises:
        ConfigError: There are not as many tasks as columns.

    >>> tasks = (Task(kind="binary"), Task(kind="regression"))
    >>> logits, labels = torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    >>> multitask_loss(logits, labels, torch.tensor([[1.0, 1.0], [1.0, 0.0]]), tasks)
    MultitaskLoss(total=tensor(4.6931), parts=tensor([0.6931, 4.0000]))
    """
    if len(tasks) != logits_BK.shape[1]:
        raise ConfigError(
            f"multitask_loss: {len(tasks)} tasks for logits of {logits_BK.shape[1]} columns; pass one each"
        )
    counts_BK = weights_BK != 0
    logits_BK, labels_BK = torch.where(counts_BK, logits_BK, 0.0), torch.where(counts_BK, labels_BK, 0.0)
    total, parts, start = logits_BK.new_zeros(()), [], 0
    # Neighbours of one kind are one slice: an index made of a Python list would wait for the GPU.
    for (kind, delta, loss_weight), run in groupby(tasks, key=_settings):
        columns = slice(start, start := start + len(list(run)))
        weights = weights_BK[:, columns]
        losses = weights * _elementwise(kind, logits_BK[:, columns], labels_BK[:, columns], delta)
        sums = weights.sum(0) if sums_K is None else sums_K[columns]
        part = losses.sum(0) / torch.where(sums == 0, 1.0, sums)
        total = total + loss_weight * (part if scales_K is None else part * scales_K[columns]).sum()
        parts.append(part)
    return MultitaskLoss(total, torch.cat(parts))


def _settings(task: Task) -> tuple[LossKind, float, float]:
    return loss_kind(task), task.huber_delta, task.loss_weight


def _elementwise(kind: LossKind, logits: Tensor, labels: Tensor, huber_delta: float) -> Tensor:
    match kind:
        case "bce":
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        case "mse":
            return F.mse_loss(logits, labels, reduction="none")
        case "huber":
            return F.huber_loss(logits, labels, reduction="none", delta=huber_delta)
