"""DCN-v2: explicit products of features, one degree more with each layer.

Shapes: B rows, D width of the input, r rank.
"""

from typing import cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..settings import Settings
from .layers import make_linear


class CrossConfig(Settings):
    """Cross layers between the input and the trunk."""

    layers: int = Field(default=2, ge=1)
    """Number of cross layers."""
    rank: int | None = Field(default=None, ge=1)
    """Rank of each layer's matrix; full when left out. It saves work below half of the input's width."""
    layer_norm: bool = False
    """LayerNorm on the output of the last cross layer."""


class CrossNet(nn.Module):
    """DCN-v2, full or low rank.

    x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, with W_l = U_l V_l^T (U, V of shape [D, r]) in the low-rank form.

    Args:
        width: D, of input and output.
        config: Layers, rank and LayerNorm.
        generator: Draws the weights with variance 1/D (U: 1/r).

    >>> net = CrossNet(6, CrossConfig(layers=3, rank=2), torch.Generator().manual_seed(0))
    >>> net(torch.ones(4, 6)).shape
    torch.Size([4, 6])

    Source: Wang et al., DCN V2, arXiv 2008.13535, equations 1 and 2.
    """

    def __init__(self, width: int, config: CrossConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_make_product(width, config.rank, generator) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, device=generator.device) if config.layer_norm else nn.Identity()

    def forward(self, x0_BD: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """Return the crossed input."""
        x_BD = x0_BD
        for layer in self.layers:
            x_BD = torch.addcmul(x_BD, x0_BD, layer(x_BD))
        return cast(Tensor, self.norm(x_BD))


def _make_product(width: int, rank: int | None, generator: torch.Generator) -> nn.Module:
    if rank is None:
        return make_linear(width, width, generator)
    down = make_linear(width, rank, generator, bias=False)
    return nn.Sequential(down, make_linear(rank, width, generator))
