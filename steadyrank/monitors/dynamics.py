"""Training dynamics by parameter, read from the optimizer's own state without a host sync."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

CLIP_FACTOR = "clip_factor"  # the state key under which an optimizer keeps the factor of its last step


class ClipFactors:
    """The clip factors of the last step, of every named parameter whose optimizer keeps one.

    Args:
        named_parameters: Names and parameters, as `module.named_parameters()` gives them.
        optimizers: Any optimizers; those without the state key are passed over.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], optimizers: Iterable[torch.optim.Optimizer]
    ) -> None:
        self._parameters = list(named_parameters)
        self._optimizers = [inner for optimizer in optimizers for inner in _with_inner(optimizer)]

    def read(self) -> dict[str, Float[Tensor, ""]]:
        """Return each parameter's factor as a 0-d tensor where it lies, by the parameter's name.

        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight])
        >>> optimizer.state[weight]["clip_factor"] = torch.tensor(0.5)
        >>> ClipFactors([("weight", weight)], [optimizer]).read()
        {'weight': tensor(0.5000)}
        """
        found = {}
        for name, parameter in self._parameters:
            for optimizer in self._optimizers:
                factor = optimizer.state.get(parameter, {}).get(CLIP_FACTOR)
                if factor is not None:
                    found[name] = factor
        return found


def _with_inner(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return an optimizer and those that it is wrapped around."""
    inner = getattr(optimizer, "optimizer", None)
    return [optimizer, *(_with_inner(inner) if isinstance(inner, torch.optim.Optimizer) else [])]
