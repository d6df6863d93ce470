"""The ranker: a Batch in, one logit for each row and task out.

Shapes: B rows, P position features, K tasks, D width of the input, H width of a trunk's output.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own convention
from jaxtyping import Float, Int64
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ..errors import ConfigError, check_known
from ..precision import computing_in
from ..schema import Batch, PositionFeature, Schema
from ..settings import Settings
from .cross import CrossConfig, CrossNet
from .embeddings import EmbeddingTables, MakeTables, NumberInputs
from .layers import MLP, Activation, ExactLinear, Style, make_linear, module_keys
from .trunks import SharedBottomConfig, TrunkConfig, build_trunk


class PositionConfig(Settings):
    """The position tower, which exists when the schema has position features."""

    tasks: tuple[str, ...] | None = None
    """Tasks whose logit gets a position bias; all when left out."""


class ModelConfig(Settings):
    """A ranker's layers between the features and the logits."""

    embedding_std: float = Field(default=0.01, gt=0)
    """Standard deviation of the embeddings at the start; `EmbeddingTables` says why it is small."""
    trunk: TrunkConfig = SharedBottomConfig()
    """What the tasks share: `shared_bottom`, `mmoe` or `ple`."""
    cross: CrossConfig | None = None
    """DCN-v2 between the input and the trunk; none when left out."""
    tower: tuple[PositiveInt, ...] = ()
    """Widths of the hidden layers of each task's tower; with none it is a linear layer."""
    activation: Activation = "relu"
    """After every hidden layer: `relu`, `silu` or `gelu`."""
    layer_norm: bool = False
    """LayerNorm in every hidden layer of trunk and towers, before the activation."""
    position: PositionConfig = Field(default=PositionConfig())
    """The position tower."""


def paper_model(name: Literal["small", "large", "large_dcn"], divide: int = 1) -> ModelConfig:
    """Return one of the paper's models: a shared bottom of 512x2, 4096x4, or DCN-v2, LayerNorm and 4096x4.

    The paper does not say how many cross layers there were; here it is the default of two, of full rank.

    Args:
        name: Which one.
        divide: Divides the widths of the hidden layers, a power of 2 up to 512; 8 is for a CPU.

    Raises:
        ConfigError: `divide` does not divide 512.

    >>> paper_model("large_dcn", divide=8).trunk.widths
    (512, 512, 512, 512)

    Source: Tang et al., arXiv 2302.09178, section 5.1.
    """
    if divide < 1 or 512 % divide:
        raise ConfigError(f"paper_model: divide must be a power of 2 from 1 to 512, not {divide}")
    width, layers = (512, 2) if name == "small" else (4096, 4)
    cross = CrossConfig(layer_norm=True) if name == "large_dcn" else None
    return ModelConfig(trunk=SharedBottomConfig(widths=(width // divide,) * layers), cross=cross)


class ModelSummary(NamedTuple):
    """How large a model is, in numbers of parameters."""

    dense: int
    """All but the embedding tables."""
    embedding: int
    """The embedding tables."""
    input_width: int
    """Width of what the first layer sees."""
    parts: dict[str, int]
    """By part: tables, cross, trunk, towers, position; parts without parameters are left out."""


class BothLogits(NamedTuple):
    """The two answers of one forward pass."""

    serving: Tensor
    """Without the position logit."""
    training: Tensor
    """With it; the same tensor where there is no position tower."""


class PositionTower(nn.Module):
    """A shallow tower that learns the bias of the place on the page: one number for each place and task, from zero.

    bias_k = sum over position features p of table_p[place, k]. Places past the last count as the last; a missing one
    (negative) has a row of its own. The logit learns what the place explains, so that the rest of the model need not;
    serving leaves it out, since the place is not known there. We leave out the source's device features and dropout.

    Source: Zhao et al., Recommending What Video to Watch Next, RecSys 2019, section 4.3.
    """

    last: Tensor
    start: Tensor
    chosen: Tensor

    def __init__(
        self, features: Sequence[PositionFeature], chosen: Sequence[bool], device: torch.device | None = None
    ) -> None:
        super().__init__()
        rows = [feature.rows + 1 for feature in features]
        starts = [sum(rows[:p]) for p in range(len(rows))]
        self.register_buffer("last", torch.tensor([n - 1 for n in rows], device=device), persistent=False)
        self.register_buffer("start", torch.tensor(starts, device=device), persistent=False)
        self.register_buffer("chosen", torch.tensor(chosen, device=device), persistent=False)
        self.weight = nn.Parameter(torch.zeros(sum(rows), len(chosen), device=device))

    def forward(self, positions_BP: Int64[Tensor, "batch positions"]) -> Float[Tensor, "batch tasks"]:
        """Return the bias of each row and task."""
        # Clamped before the 1 is added, which the largest int64 would not survive.
        rows_BP = torch.minimum(positions_BP.clamp(min=-1), self.last - 1) + 1 + self.start
        bias_BK = F.embedding(rows_BP, self.weight).sum(1)
        return torch.where(self.chosen, bias_BK, 0.0)


class Ranker(nn.Module):
    """A multitask ranking model: embeddings and numbers, cross layers, a shared trunk, a tower for each task.

    Without dropout and batch norm it is the same function in training and evaluation, but for two things: the position
    logit is part of the training answer only, and the running statistics of number features grow in training mode.

    Args:
        schema: Features and tasks.
        config: The layers.
        generator: Draws all weights, in a fixed order: one seed makes one model, bit for bit. The model lives on its
            device.
        tables: Makes the embedding tables, which draw their weights first.

    Raises:
        ConfigError: The schema has position features only, or `position.tasks` names an unknown task.

    >>> features = {"item": {"kind": "id", "rows": 50}, "age": {"kind": "number"}, "place": {"kind": "position"}}
    >>> schema = Schema(features=features, tasks={"click": {"kind": "binary"}, "like": {"kind": "binary"}})
    >>> config = ModelConfig(trunk={"kind": "mmoe", "experts": 2, "widths": [8]}, tower=[4])
    >>> Ranker(schema, config, torch.Generator().manual_seed(0)).summary()
    ModelSummary(dense=660, embedding=816, input_width=18, parts={'tables': 816, 'trunk': 376, ...})
    """

    def __init__(
        self, schema: Schema, config: ModelConfig, generator: torch.Generator, tables: MakeTables = EmbeddingTables
    ) -> None:
        super().__init__()
        names = list(schema.tasks)
        style = Style(config.activation, config.layer_norm)
        self.tables = tables(schema, config.embedding_std, generator)
        self.numbers = NumberInputs(list(schema.number_features.values()), generator.device)
        self.input_width = self.tables.width_out + self.numbers.width_out
        if self.input_width == 0:
            raise ConfigError(
                "the model needs at least one feature of kind 'id', 'ids' or 'number'; the schema has only "
                f"{sorted(schema.features)} (position). Add one under [schema.features]"
            )
        self.cross = None if config.cross is None else CrossNet(self.input_width, config.cross, generator)
        self.trunk = build_trunk(self.input_width, config.trunk, names, style, generator)
        self.towers = nn.ModuleDict(
            {
                key: _make_tower(self.trunk.width_out, config.tower, style, generator, task.start_logit)
                for key, task in zip(module_keys(names), schema.tasks.values(), strict=True)
            }
        )
        self.position = _make_position(schema, config.position, generator.device)
        self.precision: torch.dtype = torch.float32
        """In which the layers compute: float32, or bfloat16 by autocast. Weights stay in float32."""

    def forward(self, batch: Batch) -> Float[Tensor, "batch tasks"]:
        """Return the logits: with the position logit in training mode, without it in evaluation mode (serving)."""
        if self.training:
            return self.forward_both(batch).training
        return self.score(batch)

    def forward_both(self, batch: Batch) -> BothLogits:
        """Return the serving and the training logits of one forward pass."""
        serving_BK = self.score(batch)
        if self.position is None:
            return BothLogits(serving_BK, serving_BK)
        return BothLogits(serving_BK, serving_BK + self.position(batch.positions))

    def score(self, batch: Batch) -> Float[Tensor, "batch tasks"]:
        """Return the logits without the position logit, in float32 in whatever precision the layers compute."""
        with computing_in(self.precision, batch.time.device):
            x_BD = self.embed(batch)
            if self.cross is not None:
                x_BD = self.cross(x_BD)
            shared = self.trunk(x_BD)
            return torch.cat([tower(h_BH) for tower, h_BH in zip(self.towers.values(), shared, strict=True)], 1)

    def embed(self, batch: Batch) -> Float[Tensor, "batch width"]:
        """Return the model's input: embeddings, then numbers, then their flags."""
        blocks = []
        if self.tables.width_out:
            blocks.append(self.tables(batch))
        if self.numbers.width_out:
            blocks.append(self.numbers(batch.numbers))
        return cast(Tensor, blocks[0]) if len(blocks) == 1 else torch.cat(blocks, 1)

    def table_names(self) -> list[str]:
        """Return the names of the parameters whose gradients are sparse: the embedding tables."""
        return [f"tables.{name}" for name in self.tables.table_names()]

    def summary(self) -> ModelSummary:
        """Count the parameters."""
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}
        parts = {name: count for name, count in counts.items() if count}
        embedding = counts["tables"]
        return ModelSummary(sum(parts.values()) - embedding, embedding, self.input_width, parts)


def _make_tower(
    width_in: int, widths: Sequence[int], style: Style, generator: torch.Generator, start: float
) -> nn.Sequential:
    hidden = MLP(width_in, widths, style, generator)
    output = make_linear(hidden.width_out, 1, generator, kind=ExactLinear)
    nn.init.constant_(output.bias, start)
    hidden.add_module("output", output)
    return hidden


def _make_position(schema: Schema, config: PositionConfig, device: torch.device) -> PositionTower | None:
    names = list(schema.tasks)
    for name in config.tasks or ():
        check_known(name, names, "task for model.position.tasks")
    chosen = [config.tasks is None or name in config.tasks for name in names]
    features = list(schema.position_features.values())
    return PositionTower(features, chosen, device) if features and any(chosen) else None
