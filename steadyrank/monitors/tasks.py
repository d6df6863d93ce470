"""Tasks against each other: what each task's loss asks of the representation that all of them share.

Shapes: K tasks; h the shared representation, of any shape.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import check_known
from .readings import Reading


class TaskConflict:
    """Each task's gradient at the shared representation: its norm, its cosine with the others, its share of the sum.

        g_k = lambda_k dL_k / dh,    share_k = g_k . sum_j g_j / ||sum_j g_j||^2

    lambda_k is the task's loss weight. The shares sum to 1; below 0, a task is overruled by the others. A backward pass
    for each task, from its loss down to h only: with a shared bottom, the towers and no more.

    h is the output of `shared`, where that is one tensor, or the same for every task (a shared bottom); where each task
    has its own (MMoE, PLE), it is the input.

    A task whose loss does not depend on h (no label in the batch) has norm and share 0, and no cosine (NaN). Where
    nothing pulls at h at all, the shares are NaN too. What is not finite in one task makes its norm, its cosines and
    all shares NaN or infinite, and those of the others too where their gradients pass through it (0 times infinity).

    Args:
        shared: The module that the tasks share.
        tasks: Their names.
        loss_weights: lambda of each; 1 when left out.

    >>> shared = nn.Linear(2, 2)
    >>> conflict = TaskConflict(shared, ["click", "like"])
    >>> conflict.active = True
    >>> h = shared(torch.ones(1, 2))
    >>> losses = torch.stack([h.sum(), -2 * h[0, 0]])
    >>> {reading.area: reading.values.tolist() for reading in conflict.read(losses)}
    {'task_gradient_norm': [1.41..., 2.0], 'task_share_frac': [0.0, 1.0], 'task_cosine': [-0.70...]}
    """

    def __init__(self, shared: nn.Module, tasks: Sequence[str], loss_weights: Sequence[float] | None = None) -> None:
        self.active = False
        """Whether forward passes are watched at the moment."""
        self._tasks = list(tasks)
        self._weights = [1.0] * len(self._tasks) if loss_weights is None else list(loss_weights)
        self._h: Tensor | None = None
        self.handles = [shared.register_forward_hook(self._look)]

    def _look(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # A graph that is compiled keeps the representation to itself; asked first, this costs no second compiling.
        if torch.compiler.is_compiling():
            return
        if self.active and module.training and torch.is_grad_enabled():
            outputs = list(output) if isinstance(output, list | tuple) else [output]
            same = isinstance(outputs[0], Tensor) and all(each is outputs[0] for each in outputs)
            self._h = outputs[0] if same else next((x for x in inputs if isinstance(x, Tensor)), None)

    def read(self, losses_K: Float[Tensor, " tasks"]) -> list[Reading]:
        """Return the readings; to be called between forward and backward, whose graph stays as it is.

        Empty when no forward pass was watched (none is in evaluation mode, or under `torch.compile`), nothing below the
        representation is trained, or no loss depends on it.
        """
        h, self._h = self._h, None
        if h is None or not h.requires_grad or not losses_K.requires_grad:
            return []
        gradients = [
            torch.autograd.grad(losses_K[k], h, retain_graph=True, allow_unused=True)[0] for k in range(len(losses_K))
        ]
        if all(g is None for g in gradients):
            return []
        flat_KH = torch.stack(
            [
                w * (torch.zeros_like(h) if g is None else g).flatten()
                for g, w in zip(gradients, self._weights, strict=True)
            ]
        ).float()
        return compare_gradients(flat_KH, self._tasks)


def compare_gradients(gradients_KH: Float[Tensor, "tasks size"], tasks: Sequence[str]) -> list[Reading]:
    """Return norms, shares of the sum, and cosines of each pair (`a|b`; NaN where a gradient is zero).

    >>> found = compare_gradients(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), ["a", "b"])
    >>> [(reading.area, reading.values.tolist()) for reading in found]
    [('task_gradient_norm', [3.0, 4.0]), ('task_share_frac', [0.36..., 0.63...]), ('task_cosine', [0.0])]
    """
    products_KK = gradients_KH @ gradients_KH.T
    norm_K = torch.linalg.vector_norm(gradients_KH, dim=1)
    with_sum_K = products_KK.sum(1)
    found = [
        Reading("task_gradient_norm", list(tasks), norm_K),
        Reading("task_share_frac", list(tasks), with_sum_K / with_sum_K.sum()),
    ]
    pairs = list(combinations(range(len(tasks)), 2))
    if pairs:
        cosines = torch.stack([products_KK[i, j] / (norm_K[i] * norm_K[j]) for i, j in pairs])
        found.append(Reading("task_cosine", [f"{tasks[i]}|{tasks[j]}" for i, j in pairs], cosines))
    return found


def find_conflict(
    model: nn.Module, shared: str | None, tasks: Sequence[str], loss_weights: Sequence[float]
) -> TaskConflict | None:
    """Return the comparison of the tasks at the module that they share, if there is one.

    Args:
        model: Holds the module.
        shared: Its name; "" for none; None for the one called `trunk`, where there is one.
        tasks: Their names.
        loss_weights: Weight of each task's loss.

    Raises:
        ConfigError: There is no module of that name.

    >>> model = nn.ModuleDict({"trunk": nn.Linear(2, 2)})
    >>> find_conflict(model, None, ["click"], [1.0]) is None, find_conflict(model, "", ["click"], [1.0]) is None
    (False, True)
    """
    modules = dict(model.named_modules())
    if shared is None:
        shared = min((n for n in modules if n.rpartition(".")[2] == "trunk"), key=len, default="")
    if not shared:
        return None
    check_known(shared, [name for name in modules if name], "module")
    return TaskConflict(modules[shared], tasks, loss_weights)
