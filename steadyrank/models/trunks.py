"""What the tasks share between the input and their towers: a shared bottom, MMoE or PLE.

Every trunk turns x_BD into a list of K tensors [B, H], one for each task in order, and says H in `width_out`.
Experts are separate layers and not one stacked tensor, so that each has a clip factor of its own.

Shapes: B rows, D width of the input, K tasks, E experts, H width of the output.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ..settings import Settings
from .layers import MLP, Style, make_linear, module_keys

Widths = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class SharedBottomConfig(Settings):
    """One stack of hidden layers for all tasks."""

    kind: Literal["shared_bottom"] = "shared_bottom"
    widths: Widths = (256, 256)
    """Widths of the hidden layers."""


class MMoEConfig(Settings):
    """Experts that all tasks share, mixed anew for each task by its own gate."""

    kind: Literal["mmoe"] = "mmoe"
    experts: int = Field(default=4, ge=1)
    """Number of experts."""
    widths: Widths = (256, 256)
    """Widths of the hidden layers of each expert."""


class PLEConfig(Settings):
    """Shared experts and experts of each task, in one or more levels."""

    kind: Literal["ple"] = "ple"
    levels: int = Field(default=1, ge=1)
    """Number of levels; 1 is customised gate control."""
    shared_experts: int = Field(default=2, ge=1)
    """Number of experts at each level that all tasks use."""
    task_experts: int = Field(default=2, ge=1)
    """Number of experts at each level that one task has for itself."""
    widths: Widths = (256,)
    """Widths of the hidden layers of each expert, the same at every level."""


TrunkConfig = Annotated[SharedBottomConfig | MMoEConfig | PLEConfig, Field(discriminator="kind")]


class SharedBottom(nn.Module):
    """A hard shared bottom: every task sees the same hidden layers.

    Source: Caruana, Multitask Learning, 1997.
    """

    def __init__(
        self, width_in: int, config: SharedBottomConfig, tasks: Sequence[str], style: Style, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.tasks = len(tasks)
        self.layers = MLP(width_in, config.widths, style, generator)
        self.width_out = self.layers.width_out

    def forward(self, x_BD: Float[Tensor, "batch width_in"]) -> list[Float[Tensor, "batch width_out"]]:
        """Return the last hidden layer, once for each task."""
        return [self.layers(x_BD)] * self.tasks


class MMoE(nn.Module):
    """Multi-gate mixture of experts: task k sees sum_e softmax(W_k x)_e f_e(x).

    >>> style, generator = Style(), torch.Generator().manual_seed(0)
    >>> trunk = MMoE(3, MMoEConfig(experts=2, widths=(8,)), ["click", "like"], style, generator)
    >>> [tuple(h.shape) for h in trunk(torch.zeros(5, 3))]
    [(5, 8), (5, 8)]

    Source: Ma et al., KDD 2018, equations 5 to 7.
    """

    def __init__(
        self, width_in: int, config: MMoEConfig, tasks: Sequence[str], style: Style, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(MLP(width_in, config.widths, style, generator) for _ in range(config.experts))
        self.gates = nn.ModuleDict({key: Gate(width_in, config.experts, generator) for key in module_keys(tasks)})
        self.width_out = config.widths[-1]

    def forward(self, x_BD: Float[Tensor, "batch width_in"]) -> list[Float[Tensor, "batch width_out"]]:
        """Return each task's mixture of the experts."""
        outputs = [expert(x_BD) for expert in self.experts]
        return [mix_experts(gate(x_BD), outputs) for gate in self.gates.values()]


class PLE(nn.Module):
    """Progressive layered extraction: levels of customised gate control, one after the other.

    At each level, task k's gate mixes its own experts with the shared ones, and the shared gate mixes all; the
    mixtures are the next level's inputs. The last level has no shared gate.

    Source: Tang et al., RecSys 2020, equations 1 to 6.
    """

    def __init__(
        self, width_in: int, config: PLEConfig, tasks: Sequence[str], style: Style, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.tasks = len(tasks)
        self.levels = nn.ModuleList()
        for level in range(config.levels):
            last = level == config.levels - 1
            self.levels.append(PLELevel(width_in, config, tasks, style, generator, with_shared=not last))
            width_in = config.widths[-1]
        self.width_out = width_in

    def forward(self, x_BD: Float[Tensor, "batch width_in"]) -> list[Float[Tensor, "batch width_out"]]:
        """Return the last level's mixture for each task."""
        tasks, shared = [x_BD] * self.tasks, x_BD
        for level in self.levels:
            tasks, shared = level(tasks, shared)
        return tasks


class LevelOutput(NamedTuple):
    """What one level of PLE hands to the next."""

    tasks: list[Tensor]
    """One tensor [B, H] for each task."""
    shared: Tensor
    """The shared gate's mixture [B, H]; after the last level, the shared input as it came."""


class PLELevel(nn.Module):
    """One level of PLE: experts of the tasks, shared experts, and the gates over them."""

    def __init__(
        self,
        width_in: int,
        config: PLEConfig,
        tasks: Sequence[str],
        style: Style,
        generator: torch.Generator,
        with_shared: bool,
    ) -> None:
        super().__init__()

        def make_experts(count: int) -> nn.ModuleList:
            return nn.ModuleList(MLP(width_in, config.widths, style, generator) for _ in range(count))

        keys, own, shared = module_keys(tasks), config.task_experts, config.shared_experts
        self.shared_experts = make_experts(shared)
        self.task_experts = nn.ModuleDict({key: make_experts(own) for key in keys})
        self.gates = nn.ModuleDict({key: Gate(width_in, own + shared, generator) for key in keys})
        self.shared_gate = Gate(width_in, own * len(keys) + shared, generator) if with_shared else None

    def forward(
        self, tasks: Sequence[Float[Tensor, "batch width_in"]], shared_BD: Float[Tensor, "batch width_in"]
    ) -> LevelOutput:
        """Return the gates' mixtures: one for each task, and the shared one (see LevelOutput)."""
        shared = [expert(shared_BD) for expert in self.shared_experts]
        own: list[Tensor] = []
        mixed: list[Tensor] = []
        for x_BD, experts, gate in zip(tasks, self.task_experts.values(), self.gates.values(), strict=True):
            # ModuleDict's values are typed as plain modules.
            outputs = [expert(x_BD) for expert in experts]  # type: ignore[attr-defined]
            mixed.append(mix_experts(gate(x_BD), outputs + shared))
            own += outputs
        if self.shared_gate is not None:
            shared_BD = mix_experts(self.shared_gate(shared_BD), own + shared)
        return LevelOutput(mixed, shared_BD)


class Gate(nn.Module):
    """The weights of a mixture: softmax(W x), without a bias."""

    is_gate = True
    """Puts out the shares of experts, which instruments read."""

    def __init__(self, width_in: int, experts: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = make_linear(width_in, experts, generator, bias=False)

    def forward(self, x_BD: Float[Tensor, "batch width_in"]) -> Float[Tensor, "batch experts"]:
        """Return the experts' shares, which sum to 1."""
        return torch.softmax(self.linear(x_BD), 1)


def mix_experts(
    shares_BE: Float[Tensor, "batch experts"], outputs: Sequence[Float[Tensor, "batch width"]]
) -> Float[Tensor, "batch width"]:
    """Return sum_e shares_BE[:, e] * outputs[e].

    >>> mix_experts(torch.tensor([[0.25, 0.75]]), [torch.tensor([[4.0]]), torch.tensor([[8.0]])])
    tensor([[7.]])
    """
    shares_BE = shares_BE.to(outputs[0].dtype)  # under autocast the softmax is in float32, what it mixes is not
    # A loop over so few experts is twice as fast on a CPU as a batched product of tiny matrices.
    mixed = shares_BE[:, :1] * outputs[0]
    for e, output_BH in enumerate(outputs[1:], start=1):
        mixed = torch.addcmul(mixed, shares_BE[:, e : e + 1], output_BH)
    return mixed


def build_trunk(
    width_in: int, config: TrunkConfig, tasks: Sequence[str], style: Style, generator: torch.Generator
) -> SharedBottom | MMoE | PLE:
    """Build the trunk that `config` describes, for the named tasks."""
    match config:
        case SharedBottomConfig():
            return SharedBottom(width_in, config, tasks, style, generator)
        case MMoEConfig():
            return MMoE(width_in, config, tasks, style, generator)
        case PLEConfig():
            return PLE(width_in, config, tasks, style, generator)
