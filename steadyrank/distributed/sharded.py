"""Embedding tables of which every rank holds a part: TorchRec exchanges ids and embeddings, our optimizers step.

TorchRec's fused kernels apply the optimizer inside of backward. That leaves no place for what this package is about: a
verdict on all gradients before any weight is changed, and a clip factor that needs all touched rows of a table. Their
optimizers are theirs, too, and none of them is Clippy. TorchRec's dense kernel leaves a gradient, but one as large as
the table, which has to be gone through in every step.

So TorchRec plans, cuts the tables, and sends ids to where the rows are and embeddings back, but the lookup itself is
made here: `_kernel` takes the fused kernel's place while the tables are sharded. Its gradient is sparse, the touched
rows only, in one weight matrix for each width, as in one process; the optimizer steps after backward. What that costs
against a fused kernel is that the gradient of the touched rows is written to memory and read again; what is exchanged
is the same.

Shapes: B rows of this rank's slice, S rows as they are sent, F features, N ids, D width, R rows of tables held here.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own convention
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..models.embeddings import LookUp, Plan, Tables, draw_blocks, share_of
from ..models.layers import fill_uniform
from ..precision import compute_dtype
from ..ranks import Ranks
from ..schema import Batch, Schema
from ..shards import Rows
from .planning import StateBytes, TablesPlan, bags_of, feature_keys, load_torchrec, memory_of, plan_for, sharder
from .unfused import mute_renamings, own_kernel, rows_first


class ShardedTables(Tables):
    """Embedding tables cut over ranks, which look up and learn as `EmbeddingTables` would with all batches together.

    `weights` has, for each width, what this rank holds of its tables, one below the other; `rows` says which rows these
    are. The weights are those that `EmbeddingTables` would draw, for any number of ranks. Each parameter has the
    attributes `sharded_over`, the ranks, and `sharded_rows`, by which an optimizer names a row.

    After backward, gradients are the mean over ranks of what each rank's own loss gives, as DDP has it.

    Every rank makes it, and calls it, at the same time.

    Args:
        schema: Features and tables.
        std: Standard deviation of the weights at the start.
        generator: Draws the weights; in the same state on every rank, and left as `EmbeddingTables` would leave it.
        ranks: Who trains together; with a process group, even if there is one rank only.
        device: Where the weights live.
        batch_rows: Rows of the largest slice, for the plan.
        dense_bytes: What the rest of the model takes of a rank's memory.
        state_bytes: What the tables' optimizer keeps for a row, by the table's width; nothing when None.
        budget_bytes: Memory of a rank; what the device has when None.
        sharding: For some tables, the kinds that are allowed: `table_wise`, `row_wise`, `table_row_wise`.

    Raises:
        ConfigError: The tables do not fit, or TorchRec is not installed.
    """

    def __init__(
        self,
        schema: Schema,
        std: float,
        generator: torch.Generator,
        *,
        ranks: Ranks,
        device: torch.device,
        batch_rows: int,
        dense_bytes: int = 0,
        state_bytes: StateBytes | None = None,
        budget_bytes: int | None = None,
        sharding: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(schema)
        load_torchrec()
        mute_renamings()
        self.ranks = ranks
        self.plan = self._agree_on_plan(schema, device, batch_rows, dense_bytes, state_bytes, budget_bytes, sharding)
        self.rows: dict[str, tuple[Rows, ...]] = {}
        """By `weights.width_D`: for every table of the width, which of its rows are held here."""
        starts: dict[str, int] = {}
        for width in self.widths:
            rows = self.plan.rows_of(ranks.rank, width)
            self.rows[f"weights.width_{width}"] = rows
            weight = nn.Parameter(_draw(rows, width, std, generator, device))
            weight.sharded_over = ranks  # type: ignore[attr-defined]  # what our optimizers look for
            weight.sharded_rows = _row_numbers(rows, device)  # type: ignore[attr-defined]  # likewise
            self.weights[f"width_{width}"] = weight
            ends = torch.tensor([each.count for each in rows]).cumsum(0).tolist()
            starts |= {each.table: end - each.count for each, end in zip(rows, ends, strict=True)}
        self._lookups = _list_lookups(schema, self.plans, device)
        places = {f"table_{i}": starts[name] for i, name in enumerate(schema.tables)}
        # In a list, where torch does not look: the parameters are those above, under the names that they have there.
        self._sharded = [self._shard(schema, device, places)]

    def forward(self, batch: Batch) -> Float[Tensor, "batch width_out"]:
        """Return the embeddings of this rank's rows: width by width, one-valued features before lists."""
        # All ranks send alike many rows, some of them empty: where they differ, fewer ways to exchange are open.
        rows = max(1, len(batch), -(-batch.whole_rows // self.ranks.size))
        bags = self._sharded[0].module
        asked = [
            bags[key](each.ask(batch, plan, rows))
            for key, each, plan in zip(self.weights, self._lookups, self.plans, strict=True)
        ]
        blocks: list[Tensor] = []
        for each, answer, weight in zip(self._lookups, asked, self.weights.values(), strict=True):
            found = answer.wait().to_dict()
            blocks += [found[key][: len(batch)].to(compute_dtype(weight)) for key in each.keys]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)

    def _agree_on_plan(self, schema: Schema, device: torch.device, batch_rows: int, dense_bytes: int,
                       state_bytes: StateBytes | None, budget_bytes: int | None,
                       sharding: Mapping[str, Sequence[str]] | None) -> TablesPlan:  # fmt: skip
        """Plan for the smallest memory that a rank has; the first rank's plan holds for all."""
        budget = min(self.ranks.gather_objects(memory_of(device) if budget_bytes is None else budget_bytes))
        return self.ranks.on_first(
            lambda: plan_for(
                schema,
                self.ranks.size,
                budget,
                device=device.type,
                ranks_per_host=int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks.size)),
                batch_rows=batch_rows,
                dense_bytes=dense_bytes,
                state_bytes=state_bytes,
                sharding=sharding,
            )
        )

    def _shard(self, schema: Schema, device: torch.device, places: dict[str, int]) -> Any:
        with_lists = {schema.slot(name).width for name in schema.list_features}
        types, parallel = import_module("torchrec.distributed.types"), import_module("torchrec.distributed")
        with own_kernel(_kernel(dict(self.weights), places, with_lists)):
            return parallel.DistributedModelParallel(
                bags_of(schema),
                env=types.ShardingEnv.from_process_group(self.ranks.group),
                device=device,
                plan=self.plan.sharding,
                sharders=[sharder()],
                init_data_parallel=False,
                init_parameters=False,
            )


class _LookUps(NamedTuple):
    """What is looked up of one width."""

    keys: list[str]
    """What TorchRec calls its features, one-valued ones before lists."""
    starts_F: Tensor
    """First rows of the tables of one-valued features, in the matrix that a Batch's ids mean."""
    list_starts: list[int]
    """Likewise of list features."""

    def ask(self, batch: Batch, plan: Plan, rows: int) -> Any:
        """Return the ids as TorchRec sends them, so many rows of them, the last ones empty."""
        ids_BF = plan.pick_ids(batch.ids) - self.starts_F
        lists = [batch.lists[i] for i in plan.lists]
        empty = rows - len(batch)
        one_FS = F.pad(torch.ones_like(ids_BF.t()), (0, empty))
        lengths = [one_FS.reshape(-1), *(F.pad(ragged.offsets.diff(), (0, empty)) for ragged in lists)]
        values = [ids_BF.t().reshape(-1)]
        values += [ragged.values - start for ragged, start in zip(lists, self.list_starts, strict=True)]
        weights = None
        if any(plan.means):
            shares = [torch.ones(ids_BF.numel(), device=ids_BF.device)]
            shares += [share_of(ragged, mean, torch.float32) for ragged, mean in zip(lists, plan.means, strict=True)]
            weights = torch.cat(shares)
        jagged = import_module("torchrec.sparse.jagged_tensor")
        return jagged.KeyedJaggedTensor(self.keys, torch.cat(values), weights, lengths=torch.cat(lengths), stride=rows)


def _list_lookups(schema: Schema, plans: Sequence[Plan], device: torch.device) -> list[_LookUps]:
    keys, found = feature_keys(schema), []
    names, list_names = list(schema.id_features), list(schema.list_features)
    for plan in plans:
        ids, lists = [names[j] for j in plan.columns], [list_names[i] for i in plan.lists]
        starts = torch.tensor([schema.slot(name).start for name in ids], dtype=torch.int64, device=device)
        list_starts = [schema.slot(name).start for name in lists]
        found.append(_LookUps([keys[name] for name in (*ids, *lists)], starts, list_starts))
    return found


def _draw(rows: Sequence[Rows], width: int, std: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return the weights of the rows held here: the blocks that they lie in are drawn, and these rows are kept."""
    held = torch.empty(sum(each.count for each in rows), width, device=device)
    pieces = [(each.start + each.first, each.start + each.first + each.count) for each in rows]
    for start, end, source in draw_blocks(sum(each.rows for each in rows), width, generator, pieces):
        block = torch.empty(end - start, width, device=generator.device)
        fill_uniform(block, std, source)
        place = 0
        for first, last in pieces:
            low, high = max(start, first), min(end, last)
            if low < high:
                held[place + low - first : place + high - first] = block[low - start : high - start]
            place += last - first
    return held


def _row_numbers(rows: Sequence[Rows], device: torch.device) -> Int64[Tensor, "2 tables"]:
    """Return where each table's rows end here, and what makes a row here one of the whole matrix when it is added."""
    counts = torch.tensor([each.count for each in rows])
    ends = counts.cumsum(0)
    firsts = torch.tensor([each.start + each.first for each in rows])
    return torch.stack([ends, firsts - (ends - counts)]).to(device)


def _kernel(
    weights: Mapping[str, Tensor], places: Mapping[str, int], with_lists: Collection[int]
) -> Callable[..., Any]:
    """Return what makes a lookup in the tables of one width that are cut alike.

    Args:
        weights: By `width_D`, all that is held here.
        places: By `table_i`, where its rows begin there.
        with_lists: The widths in which bags may have more than one id.
    """
    base = import_module("torchrec.distributed.batched_embedding_kernel").BaseBatchedEmbeddingBag

    class Bags(base):  # type: ignore[misc,valid-type]  # imported when asked for
        """A lookup with a sparse gradient, in part of a weight matrix that belongs to `ShardedTables`."""

        def __init__(self, config: Any, pg: Any, device: Any, sharding_type: Any, env: Any = None) -> None:
            super().__init__(config, pg, device, sharding_type)
            tables = config.embedding_tables
            self.width = tables[0].embedding_dim
            self.held = [weights[f"width_{self.width}"]]  # in a list, where torch does not look
            self.pieces = [(places[table.name], table.local_rows) for table in tables]
            starts = [self.pieces[table][0] for table in self._feature_table_map]
            self.starts_F = torch.tensor(starts, dtype=torch.int64, device=device)

        @property
        def emb_module(self) -> Any:
            return self

        def split_embedding_weights(self) -> list[Tensor]:
            return [self.held[0].detach()[start : start + rows] for start, rows in self.pieces]

        def forward(self, features: Any, *unused: Any) -> Tensor:
            weight_RD, count = self.held[0], len(self.starts_F)
            values_N, lengths = features.values().long(), features.lengths()
            counts_F = lengths.view(count, -1).sum(1)
            ids_N = values_N + self.starts_F.repeat_interleave(counts_F, output_size=len(values_N))
            if self.width in with_lists:
                shares_N = features.weights_or_none()
                pooled = F.embedding_bag(
                    *(ids_N, weight_RD, features.offsets().long()),
                    mode="sum", sparse=True, per_sample_weights=shares_N, include_last_offset=True,
                )  # fmt: skip
            else:
                bags_N = torch.arange(len(lengths), device=ids_N.device).repeat_interleave(
                    lengths, output_size=len(ids_N)
                )
                found = LookUp.apply(weight_RD, ids_N, weight_RD.dtype)
                pooled = found.new_zeros(len(lengths), self.width).index_copy(0, bags_N, found)
            return rows_first(pooled, count)

    return Bags
