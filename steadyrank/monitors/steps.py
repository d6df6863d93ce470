"""The instruments around one optimizer's steps, for `Watch`."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim import kernels
from .dynamics import Dynamics
from .readings import Reading
from .tables import Field, Tables


class StepWatch:
    """What is read of one optimizer's steps: gradients of each, dynamics and tables of some.

    Args:
        optimizer: As it is stepped.
        named: Parameters by name, those of other optimizers too.
        fields: Tables within the weight matrices.
    """

    def __init__(self, optimizer: Optimizer, named: Mapping[str, nn.Parameter], fields: Sequence[Field]) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        mine = {id(p) for p in self.parameters}
        own = [(name, p) for name, p in named.items() if id(p) in mine]
        self.dynamics, self.tables = Dynamics(own, [optimizer]), Tables(own, fields)
        self.sparse = [False] * len(self.parameters)
        """Which gradients are sparse."""
        self.done = False
        """The step of the losses that came last has been made."""
        self._unseen = list(range(len(self.parameters)))  # those that have had no gradient yet
        self._largest: Tensor | None = None

    def note_sparse(self) -> None:
        """Remember which gradients are sparse."""
        for i in self._unseen:
            grad = self.parameters[i].grad
            self.sparse[i] = grad is not None and grad.is_sparse
        self._unseen = [i for i in self._unseen if self.parameters[i].grad is None]

    def note_gradients(self) -> None:
        """Remember the largest |g| of each parameter: infinite where it is not finite, NaN where there is none."""
        held = [None if p.grad is None else p.grad._values() if p.grad.is_sparse else p.grad for p in self.parameters]
        found = [g.detach() for g in held if g is not None]
        if found:
            tops = iter(kernels.largest(found).float().unbind())
            nan = torch.full((), torch.nan, device=found[0].device)
            self._largest = torch.stack([nan if g is None else next(tops) for g in held])

    def take_gradients(self, like: Tensor) -> Float[Tensor, " parameters"]:
        """Return what was remembered of this step, NaN where the optimizer made none."""
        largest, self._largest = self._largest, None
        return like.new_full((len(self.parameters),), torch.nan) if largest is None else largest.to(like)

    def before(self, full: bool) -> None:
        """Keep what the step will change: for a full look or a quick one."""
        self.dynamics.before(matrices=not full)
        if full:
            self.tables.before()

    def after(self, full: bool, step: int, rank: bool) -> list[Reading]:
        """Return what the step did; with `rank`, keep a sample of rows too."""
        return self.dynamics.after() + self.tables.after(step, rank) if full else self.dynamics.look()
