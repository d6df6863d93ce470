"""The blocks that every model is made of: linear layers whose weights come from a generator, and stacks of them.

Shapes: B rows, D width in, H width out.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

Activation = Literal["relu", "silu", "gelu"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}

HE_GAIN = math.sqrt(2.0)
"""Keeps the mean square of a signal through a ReLU: half of the units pass nothing on."""


class Style(NamedTuple):
    """How hidden layers are built."""

    activation: Activation = "relu"
    layer_norm: bool = False


def fill_uniform(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill `weight` in place with numbers drawn uniformly around 0, their standard deviation `std`."""
    bound = std * math.sqrt(3.0)
    with torch.no_grad():
        weight.uniform_(-bound, bound, generator=generator)


class ExactLinear(nn.Linear):
    """A linear layer that computes in its weights' own precision, also under autocast: what makes logits."""

    def forward(self, input: Float[Tensor, "batch width_in"]) -> Float[Tensor, "batch width_out"]:
        """Return the output, in the weights' dtype."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


def make_linear(
    width_in: int,
    width_out: int,
    generator: torch.Generator,
    bias: bool = True,
    gain: float = 1.0,
    kind: type[nn.Linear] = nn.Linear,
) -> nn.Linear:
    """Make a linear layer, its bias zero and its weights drawn uniformly with variance `gain**2 / width_in`.

    A gain of sqrt(2) is He's rule (a ReLU follows), 1 is LeCun's (nothing follows). The layer lives where the
    generator does, and the global random state is not touched.

    >>> layer = make_linear(300, 200, torch.Generator().manual_seed(0))
    >>> round(layer.weight.var().item() * 300, 1), layer.bias.abs().sum().item()
    (1.0, 0.0)

    Source: LeCun et al., Efficient BackProp, 1998; He et al., arXiv 1502.01852, equation 10.
    """
    layer = kind(width_in, width_out, bias=bias, device="meta")  # torch's own skip_init loads sympy
    layer.weight = nn.Parameter(torch.empty(width_out, width_in, device=generator.device))
    fill_uniform(layer.weight, gain / math.sqrt(width_in), generator)
    if bias:
        layer.bias = nn.Parameter(torch.zeros(width_out, device=generator.device))
    return layer


class MLP(nn.Sequential):
    """Hidden layers one after the other: linear, then LayerNorm where asked, then the activation.

    No widths make the identity. The parts are called `linear_0`, `norm_0`, `act_0`, `linear_1` and so on.

    >>> mlp = MLP(3, (8, 4), Style("silu", layer_norm=True), torch.Generator().manual_seed(0))
    >>> mlp(torch.zeros(2, 3)).shape, mlp.width_out
    (torch.Size([2, 4]), 4)
    """

    def __init__(self, width_in: int, widths: Sequence[int], style: Style, generator: torch.Generator) -> None:
        super().__init__()
        for i, width in enumerate(widths):
            self.add_module(f"linear_{i}", make_linear(width_in, width, generator, gain=HE_GAIN))
            if style.layer_norm:
                self.add_module(f"norm_{i}", nn.LayerNorm(width, device=generator.device))
            self.add_module(f"act_{i}", ACTIVATIONS[style.activation]())
            width_in = width
        self.width_out = width_in

    def forward(self, input: Float[Tensor, "batch width_in"]) -> Float[Tensor, "batch width_out"]:
        """Return the last layer's output."""
        return cast(Tensor, super().forward(input))


def module_keys(names: Iterable[str]) -> list[str]:
    """Turn names of tasks into keys that `nn.ModuleDict` accepts, all different, unchanged wherever possible.

    >>> module_keys(["click", "watch.time", "watch_time", "keys"])
    ['click', 'watch_time', 'watch_time_', 'keys_']
    """
    taken = nn.ModuleDict()
    keys: list[str] = []
    for name in names:
        key = name.replace(".", "_")
        while hasattr(taken, key) or key in keys:
            key += "_"
        keys.append(key)
    return keys
