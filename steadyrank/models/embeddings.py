"""From a Batch to the model's input: embeddings of ids, pooled embeddings of lists, and numbers with flags.

Shapes: B rows, F one-valued id features, N looked-up ids, D width of an embedding, X number features.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own convention
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..native.rows import gather, sparse_gradient
from ..precision import compute_dtype
from ..ranks import ALONE
from ..schema import Batch, NumberFeature, Ragged, Schema
from .layers import fill_uniform

BLOCK = 1 << 24
"""Weights that one generator draws: part of what a seed means for a matrix of more."""


class Tables(nn.Module):
    """The face of embedding tables: a weight matrix for each width, and what is looked up in it.

    Args:
        schema: Its id and list features say which rows are looked up, `Schema.tables` how many there are.
    """

    weights: nn.ParameterDict
    """By `width_D`: all tables of that width, one below the other, or what is held of them here."""

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        id_widths = [schema.slot(name).width for name in schema.id_features]
        list_widths = [schema.slot(name).width for name in schema.list_features]
        is_mean = [feature.pooling == "mean" for feature in schema.list_features.values()]
        self.plans: list[Plan] = []
        self.widths = list(dict.fromkeys(slot.width for slot in schema.tables.values()))
        for width in self.widths:
            columns = [j for j, found in enumerate(id_widths) if found == width]
            lists = [i for i, found in enumerate(list_widths) if found == width]
            self.plans.append(Plan(columns, lists, [is_mean[i] for i in lists]))
        self.weights = nn.ParameterDict()
        self.width_out = sum(id_widths) + sum(list_widths)

    def table_names(self) -> list[str]:
        """Return the names of the weight matrices, whose gradients are sparse."""
        return [name for name, _ in self.named_parameters()]


class EmbeddingTables(Tables):
    """All embedding tables of one width in one weight matrix: one lookup, and one sparse gradient.

    A lookup is one `embedding_bag` over the ids of all features of the width: a one-valued feature is a bag of one, a
    list is a bag of its elements, weighted by 1 (sum) or 1/length (mean). An empty list gives zeros.

    Weights are drawn uniformly around 0, in place. They start small because most rows are seen a few times only, and
    until then their weights are noise: on KuaiRand's id features, one pass, the click AUC of the second half was
    .725, .687 and .645 with a standard deviation of 0.01, 0.03 and 0.14 (128x2, Adagrad at 0.05 on the tables, Adam at
    0.001 on the rest, batches of 128, means of 4 seeds with a spread of .01).

    Args:
        schema: Its id and list features say which rows are looked up, `Schema.tables` how many there are.
        std: Standard deviation of the weights at the start.
        generator: Draws the weights, which live on its device.

    >>> features = {"item": {"kind": "id", "rows": 9}, "history": {"kind": "ids", "rows": 9, "table": "item"}}
    >>> schema = Schema(features=features, tasks={"click": {"kind": "binary"}}, embedding_width=4)
    >>> tables = EmbeddingTables(schema, 0.01, torch.Generator().manual_seed(0))
    >>> tables.weights["width_4"].shape, tables.width_out
    (torch.Size([10, 4]), 8)
    """

    def __init__(self, schema: Schema, std: float, generator: torch.Generator) -> None:
        super().__init__(schema)
        for width in self.widths:
            rows = sum(slot.rows for slot in schema.tables.values() if slot.width == width)
            weight_RD = torch.empty(rows, width, device=generator.device)
            for start, end, source in draw_blocks(rows, width, generator, [(0, rows)]):
                fill_uniform(weight_RD[start:end], std, source)
            self.weights[f"width_{width}"] = nn.Parameter(weight_RD)

    def forward(self, batch: Batch) -> Float[Tensor, "batch width_out"]:
        """Return the embeddings side by side: width by width, one-valued features before lists."""
        blocks: list[Tensor] = []
        for plan, weight_RD in zip(self.plans, self.weights.values(), strict=True):
            blocks += look_up(weight_RD, plan.pick_ids(batch.ids), [batch.lists[i] for i in plan.lists], plan.means)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


MakeTables = Callable[[Schema, float, torch.Generator], Tables]
"""What makes a ranker's tables, from the schema, the standard deviation of the weights and what draws them."""


def draw_blocks(
    rows: int, width: int, generator: torch.Generator, held: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, torch.Generator]]:
    """Yield the blocks of a weight matrix that someone must draw who holds some of its rows, in their order.

    A matrix of one block is drawn by `generator` itself, by everyone. For a larger one `generator` draws a seed only,
    and each block has a generator of its own, made from that seed and the block's number. So a row has the same weights
    whoever draws it, and `generator` is left in the same state.

    On CPUs the numbers are the same everywhere; a run draws there. A GPU's generator gives others, which torch's source
    deals out by the number of multiprocessors: the same on GPUs of one model. That was not tried.

    Args:
        rows: Of the whole matrix.
        width: Its columns.
        generator: In the same state for all who hold rows of the matrix.
        held: First and end row of each piece that is held; those of an empty piece are equal.

    Yields:
        The block's first and end row, and what draws all of it.

    >>> generator = torch.Generator().manual_seed(0)
    >>> [block[:2] for block in draw_blocks(3_000_000, 8, generator, [(0, 3_000_000)])]
    [(0, 2097152), (2097152, 3000000)]
    >>> [block[:2] for block in draw_blocks(3_000_000, 8, generator, [(2_500_000, 2_600_000)])]
    [(2097152, 3000000)]
    """
    step = max(1, BLOCK // width)
    if rows <= step:
        yield 0, rows, generator
        return
    seed = int(torch.randint(1 << 32, (), generator=generator, device=generator.device))
    for number, start in enumerate(range(0, rows, step)):
        end = min(start + step, rows)
        if any(max(start, first) < min(end, last) for first, last in held):
            yield start, end, torch.Generator(generator.device).manual_seed(_mix(seed + number))


def _mix(number: int) -> int:
    """Return another number of 32 bits for each number of 32 bits, far from those of its neighbours.

    torch's generator on a CPU looks at 32 bits of a seed: of 40,000 seeds drawn at random two would be alike in one run
    of six.

    Source: the last step of MurmurHash3, fmix32.
    """
    x = number & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


class Plan(NamedTuple):
    """What belongs to one width."""

    columns: list[int]
    """Columns of `Batch.ids`."""
    lists: list[int]
    """Places in `Batch.lists`."""
    means: list[bool]
    """For each of these lists, whether it is pooled by the mean."""

    def pick_ids(self, ids_BF: Tensor) -> Tensor:
        """Return the columns of `Batch.ids` that belong to the width."""
        if len(self.columns) == ids_BF.shape[1]:
            return ids_BF
        # Columns one by one: an index made of a Python list would wait for the GPU.
        return torch.stack([ids_BF[:, j] for j in self.columns], 1) if self.columns else ids_BF[:, :0]


class LookUp(torch.autograd.Function):
    """`weight_RD[ids_N]` in a given dtype, with a sparse gradient in which, on a CPU, each row comes up once."""

    @staticmethod
    def forward(ctx: Any, weight_RD: Tensor, ids_N: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows [N, D]."""
        ctx.save_for_backward(ids_N)
        ctx.size, ctx.dtype = weight_RD.shape, weight_RD.dtype
        return gather(weight_RD, ids_N, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the weights."""
        (ids_N,) = ctx.saved_tensors
        return sparse_gradient(ids_N, grad_ND.contiguous(), ctx.size).to(ctx.dtype), None, None


def look_up(
    weight_RD: Float[Tensor, "rows width"],
    ids_BF: Int64[Tensor, "batch features"],
    lists: Sequence[Ragged],
    means: Sequence[bool],
) -> list[Float[Tensor, "batch _"]]:
    """Look up all ids of one width at once, with a sparse gradient.

    Args:
        weight_RD: The tables, one below the other.
        ids_BF: Rows of one-valued features.
        lists: Rows of list features.
        means: For each list feature, True for the mean and False for the sum of its elements.

    Returns:
        One block [B, F * D] for the one-valued features (absent when F is 0), then one [B, D] for each list feature.

    >>> weight = torch.tensor([[1.0], [2.0], [4.0]])
    >>> bag = Ragged(torch.tensor([0, 1, 2]), torch.tensor([0, 3, 3]))
    >>> look_up(weight, torch.tensor([[0, 2], [1, 1]]), [bag], [False])
    [tensor([[1., 4.],
            [2., 2.]]), tensor([[7.],
            [0.]])]
    """
    (rows, features), width = ids_BF.shape, weight_RD.shape[1]
    if not lists:
        found: Tensor = LookUp.apply(weight_RD, ids_BF.reshape(-1), compute_dtype(weight_RD))
        return [found.view(rows, features * width)]
    ids_N, starts, shares_N = _join_bags(ids_BF, lists, means, weight_RD.dtype)
    pooled = F.embedding_bag(ids_N, weight_RD, starts, mode="sum", sparse=True, per_sample_weights=shares_N)
    pooled = pooled.to(compute_dtype(weight_RD))
    first, *rest = pooled.split([rows * features] + [rows] * len(lists))
    return [first.view(rows, features * width), *rest] if features else rest


def _join_bags(
    ids_BF: Tensor, lists: Sequence[Ragged], means: Sequence[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return all ids, where each bag starts, and each id's weight in its bag (None: all are 1)."""
    end = ids_BF.numel()
    starts = [torch.arange(end, device=ids_BF.device)]
    shares = [torch.ones(end, dtype=dtype, device=ids_BF.device)]
    for ragged, mean in zip(lists, means, strict=True):
        starts.append(ragged.offsets[:-1] + end)
        end += len(ragged.values)
        shares.append(share_of(ragged, mean, dtype))
    ids_N = torch.cat([ids_BF.reshape(-1), *(ragged.values for ragged in lists)])
    return ids_N, torch.cat(starts), torch.cat(shares) if any(means) else None


def share_of(ragged: Ragged, mean: bool, dtype: torch.dtype) -> Float[Tensor, " elements"]:
    """Return the weight of each element in its list: 1, or for the mean 1 / length.

    >>> share_of(Ragged(torch.tensor([5, 6, 7]), torch.tensor([0, 2, 2, 3])), True, torch.float32)
    tensor([0.5000, 0.5000, 1.0000])
    """
    if not mean:
        return torch.ones(len(ragged.values), dtype=dtype, device=ragged.values.device)
    lengths = ragged.offsets.diff()
    share = lengths.clamp(min=1).to(dtype).reciprocal()
    return share.repeat_interleave(lengths, output_size=len(ragged.values))


class Moments(NamedTuple):
    """Running statistics of number features, in float64."""

    n: Float64[Tensor, " numbers"]
    """How many values there were."""
    mean: Float64[Tensor, " numbers"]
    """Their mean; 0 when there were none."""
    m2: Float64[Tensor, " numbers"]
    """Sum of squared distances from the mean."""


def measure_moments(x_BX: Float64[Tensor, "batch numbers"], present_BX: Bool[Tensor, "batch numbers"]) -> Moments:
    """Return the moments of the present values of each column; an empty column has none (0, 0, 0).

    >>> measure_moments(torch.tensor([[1.0], [3.0], [9.0]]).double(), torch.tensor([[True], [True], [False]]))
    Moments(n=tensor([2.], ...), mean=tensor([2.], ...), m2=tensor([2.], ...))
    """
    n = present_BX.sum(0).double()
    mean = torch.where(present_BX, x_BX, 0.0).sum(0) / n.clamp(min=1.0)
    m2 = torch.where(present_BX, x_BX - mean, 0.0).square().sum(0)
    return Moments(n, mean, m2)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Return the moments of both sets of values together.

    n = n_a + n_b, delta = mean_b - mean_a, mean = mean_a + delta n_b/n, M2 = M2_a + M2_b + delta^2 n_a n_b/n.

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    n = a.n + b.n
    share = b.n / n.clamp(min=1.0)
    delta = b.mean - a.mean
    return Moments(n, a.mean + delta * share, a.m2 + b.m2 + delta.square() * a.n * share)


class NumberInputs(nn.Module):
    """Number features made ready for a network: transformed, filled, standardised, with a flag for what was missing.

    x' = (x - mean) / std with the statistics of all training batches *before* this one, so that training and serving
    are the same function of a row; this batch's own serve as long as there are no earlier ones. A missing value (NaN
    or infinite) becomes the mean and sets its flag. Where the spread is 0 or below the mean's float64 noise, the
    feature is constant so far, and is not divided.

    In training mode each forward pass adds its batch to the statistics: whoever evaluates a batch twice within a step
    does so in evaluation mode.

    Args:
        features: The number features, in the order of `Batch.numbers`' columns.
        device: Where the statistics live.

    >>> inputs = NumberInputs([NumberFeature(column="age")])
    >>> inputs(torch.tensor([[20.0], [40.0], [torch.nan]]))
    tensor([[-1.,  0.],
            [ 1.,  0.],
            [ 0.,  1.]])
    """

    n: Tensor
    mean: Tensor
    m2: Tensor
    log1p: Tensor
    standardise: Tensor

    def __init__(self, features: Sequence[NumberFeature], device: torch.device | None = None) -> None:
        super().__init__()
        for name in Moments._fields:
            self.register_buffer(name, torch.zeros(len(features), dtype=torch.float64, device=device))
        for name, flags in (
            ("log1p", [f.transform == "log1p" for f in features]),
            ("standardise", [f.standardise for f in features]),
        ):
            self.register_buffer(name, torch.tensor(flags, dtype=torch.bool, device=device), persistent=False)
        # Known to the host, so that what no feature asks for is not computed.
        self.some_log1p = any(f.transform == "log1p" for f in features)
        self.all_standardise = all(f.standardise for f in features)
        self.width_out = 2 * len(features)
        self.ranks = ALONE
        """Who trains together, each with its rows of a batch: the statistics are those of all rows."""

    def _of_all_ranks(self, here: Moments) -> Moments:
        """Return the moments of a whole batch, from those of this rank's rows."""
        if self.ranks.is_alone:
            return here
        each = [Moments(*found.unbind()) for found in self.ranks.gather(torch.stack(here)).unbind()]
        return reduce(merge_moments, each)

    def forward(self, numbers_BX: Float[Tensor, "batch numbers"]) -> Float[Tensor, "batch width_out"]:
        """Return the values, then the flags (1 where missing)."""
        present_BX = numbers_BX.isfinite()
        x_BX = torch.where(present_BX, numbers_BX, 0.0).double()
        if self.some_log1p:
            x_BX = torch.where(self.log1p, x_BX.sign() * x_BX.abs().log1p(), x_BX)
        with torch.no_grad():
            batch, before = measure_moments(x_BX, present_BX), Moments(self.n, self.mean, self.m2)
            if self.training:
                batch = self._of_all_ranks(batch)
            n, mean, m2 = (torch.where(self.n > 0, old, new) for old, new in zip(before, batch, strict=True))
            std = (m2 / n.clamp(min=1.0)).sqrt()
            std = torch.where(std > 1e-9 * mean.abs(), std, 1.0)
            if self.training:
                for old, new in zip(before, merge_moments(before, batch), strict=True):
                    old.copy_(new)
        x_BX = torch.where(present_BX, x_BX, mean)
        scaled_BX = (x_BX - mean) / std
        x_BX = scaled_BX if self.all_standardise else torch.where(self.standardise, scaled_BX, x_BX)
        dtype = compute_dtype(numbers_BX)
        return torch.cat([x_BX.to(dtype), (~present_BX).to(dtype)], 1)
