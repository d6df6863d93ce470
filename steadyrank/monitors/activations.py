"""Dead units and gates, read off the forward passes of the steps that are watched.

Shapes: B rows, H units, E experts.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from ..ranks import ALONE, Ranks
from .readings import Reading

IS_GATE = "is_gate"
"""A module with this attribute set puts out the shares of its experts [B, E], which sum to 1 in each row."""
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU)
_ZERO = 1e-6  # GELU and SiLU never quite reach zero


class DeadUnits:
    """Share of units of each activation that gave zero for every row of the last watched batches.

    Forward passes in evaluation mode, and batches without a row, are not watched. A unit whose output is NaN makes the
    share NaN, and is afterwards as if that batch had not been. Of a module that is called repeatedly in a forward pass,
    the last call counts.

    Args:
        model: Its activation modules are watched (ReLU, ReLU6, LeakyReLU, ELU, GELU, SiLU).
        batches: How many watched batches a unit must be silent in to count as dead, 1 or more. At the start as many as
            there were.

    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
    >>> nn.init.zeros_(model[0].weight)[0, 0], nn.init.constant_(model[0].bias, -1.0)[0]
    (tensor(0., ...), tensor(-1., ...))
    >>> units = DeadUnits(model, batches=1)
    >>> units.active = True
    >>> _ = model(torch.ones(3, 2))
    >>> units.read()
    [Reading(area='dead_frac', labels=['1', 'all'], values=tensor([1., 1.]))]
    """

    def __init__(self, model: nn.Module, batches: int = 3) -> None:
        self.active = False
        """Whether forward passes are watched at the moment."""
        self._batches = batches
        self._seen: dict[str, tuple[int, Float[Tensor, " units"]]] = {}  # rows, and the largest output of each unit
        self._layout: list[tuple[str, int]] = []  # names and numbers of units, in the order of `_silent`
        self._silent: Int32[Tensor, " all_units"] | None = None
        named = [(name, module) for name, module in model.named_modules() if isinstance(module, ACTIVATIONS)]
        self.handles = [module.register_forward_hook(self._hook(name)) for name, module in named]

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.active and module.training and isinstance(output, Tensor) and output.dim() > 1 and output.shape[-1]:
                x_BH = output.detach().abs().flatten(0, -2)
                self._seen[name] = len(x_BH), x_BH.amax(0) if len(x_BH) else x_BH.new_zeros(x_BH.shape[1])

        return look

    @torch.no_grad()
    def read(self, ranks: Ranks = ALONE) -> list[Reading]:
        """Return `dead_frac` by module and of all, and end the watched batch.

        Args:
            ranks: Who has rows of that batch, and reads too; some may have none.
        """
        seen, self._seen = self._seen, {}
        tops = {name: top_H for name, (rows, top_H) in seen.items() if rows or not ranks.is_alone}
        if not tops:
            return []
        top_H = ranks.gather(torch.cat([top.float() for top in tops.values()])).amax(0)
        layout = [(name, len(top)) for name, top in tops.items()]
        if self._silent is None or self._layout != layout:
            # As if silent before: what gave zero in all batches so far is dead.
            self._layout, self._silent = layout, torch.full_like(top_H, self._batches - 1, dtype=torch.int32)
        lost_H, silent_H = top_H.isnan(), self._silent.to(top_H.device)
        self._silent = torch.where(lost_H, silent_H, torch.where(top_H > _ZERO, 0, silent_H + 1))
        dead_H = torch.where(lost_H, torch.nan, (self._silent >= self._batches).float())
        parts = dead_H.split([units for _, units in layout])
        return [Reading("dead_frac", [*tops, "all"], torch.stack([part.mean() for part in [*parts, dead_H]]))]

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, as tensors and plain values."""
        return {"layout": [list(each) for each in self._layout], "silent": self._silent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._layout, self._silent = [(name, units) for name, units in state["layout"]], state["silent"]


class Gates:
    """How evenly gates use their experts: the mean share of each, and the mean entropy of a row's shares.

        gate_entropy_frac = - mean_b sum_e p_be log p_be / log E       0: one expert a row, 1: all alike

    Forward passes in evaluation mode are not watched. A batch without rows, and shares that are NaN, give NaN.

    Args:
        model: Its modules with the attribute `is_gate` are watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.active = False
        """Whether forward passes are watched at the moment."""
        self._shares: dict[str, Float[Tensor, "batch experts"]] = {}
        named = [(name, module) for name, module in model.named_modules() if getattr(module, IS_GATE, False)]
        self.handles = [module.register_forward_hook(self._hook(name)) for name, module in named]

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.active and module.training:
                self._shares[name] = output.detach()

        return look

    def read(self) -> list[Reading]:
        """Return `expert_load_frac` by gate and expert, and `gate_entropy_frac` by gate."""
        held, self._shares = self._shares, {}
        if not held:
            return []
        loads = [shares_BE.float().mean(0) for shares_BE in held.values()]
        labels = [f"{name}.{e}" for name, load_E in zip(held, loads, strict=True) for e in range(len(load_E))]
        entropies = torch.stack([mean_entropy(shares_BE) for shares_BE in held.values()])
        return [
            Reading("expert_load_frac", labels, torch.cat(loads)),
            Reading("gate_entropy_frac", list(held), entropies),
        ]


def mean_entropy(shares_BE: Float[Tensor, "batch experts"]) -> Float[Tensor, ""]:
    """Return the mean entropy of the rows over that of even shares: 0 to 1; 1 for a single expert, NaN for no rows.

    >>> mean_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor(0.5000)
    """
    experts = shares_BE.shape[1]
    if experts < 2:
        return shares_BE.new_ones((), dtype=torch.float32)
    entropy_B: Tensor = torch.special.entr(shares_BE.float()).sum(1)
    return entropy_B.mean() / math.log(experts)


def read_logits(
    logits_BK: Float[Tensor, "batch tasks"], tasks: list[str], binary: list[bool], saturated: float = 10.0
) -> list[Reading]:
    """Return `logit_low`, `logit_high` by task, and `saturated_frac` of the binary tasks; nothing for no rows.

    A NaN makes all three NaN for its task; an infinite logit is saturated.

    Args:
        logits_BK: What the model says.
        tasks: Names of the columns.
        binary: Whether a column goes through a sigmoid.
        saturated: |logit| from which a sigmoid counts as saturated: its slope at 10 is 4.5e-5.

    >>> [r.values.tolist() for r in read_logits(torch.tensor([[12.0], [-1.0]]), ["click"], [True])]
    [[-1.0], [12.0], [0.5]]
    """
    if not len(logits_BK):
        return []
    low_K, high_K = logits_BK.detach().float().aminmax(dim=0)
    found = [Reading("logit_low", tasks, low_K), Reading("logit_high", tasks, high_K)]
    named = [name for name, yes in zip(tasks, binary, strict=True) if yes]
    if named:
        over_K = (logits_BK.detach().abs() > saturated).float().mean(0)
        over_K = torch.where(low_K.isnan(), torch.nan, over_K)
        chosen = torch.stack([over_K[k] for k, yes in enumerate(binary) if yes])
        found.append(Reading("saturated_frac", named, chosen))
    return found
