"""A small whole model on the first rank, of one that lies on several: to examine some batches with it alone.

Its dense weights are all that there are; of the tables it has the rows that those batches look up, and no others, from
the ranks that hold them. On these batches it says what the whole model would say, and so do its gradients; what is done
to it is not done to the run.

What that takes, in bytes: for the U different rows of width D that the batches look up each rank hears 8 U, and those
that hold them send 8 + 4 D each, to the first rank, which keeps these. With FSDP2 every rank hears all P dense weights,
4 P, one tensor after the other, and the first one keeps them.

Shapes: B rows, U different rows of the tables of one width, H of them held here, D width.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..models.embeddings import Plan, Tables, look_up
from ..models.ranker import Ranker
from ..ranks import Ranks
from ..schema import Batch, Ragged
from ..shards import Rows, is_dtensor


class SomeRows(nn.Module):
    """Some rows of embedding tables, for batches that look up no others; the ids are those of the whole tables.

    Args:
        like: Says what is looked up.
        ids: For each width, which rows are here: rising [U].
        rows: By `width_D`, these rows [U, D].
    """

    def __init__(self, like: Tables, ids: Sequence[Tensor], rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.plans, self.width_out, self.ids = like.plans, like.width_out, ids
        self.weights = nn.ParameterDict()
        for key, rows_UD in rows.items():  # one by one: of a dict it would sort the keys
            self.weights[key] = nn.Parameter(rows_UD)

    def forward(self, batch: Batch) -> Float[Tensor, "batch width_out"]:
        """Return the embeddings as `EmbeddingTables` does."""
        blocks: list[Tensor] = []
        for plan, ids_U, rows_UD in zip(self.plans, self.ids, self.weights.values(), strict=True):
            lists = [batch.lists[i] for i in plan.lists]
            found = [Ragged(torch.searchsorted(ids_U, each.values), each.offsets) for each in lists]
            ids_BF = torch.searchsorted(ids_U, plan.pick_ids(batch.ids).contiguous())
            blocks += look_up(rows_UD, ids_BF, found, plan.means)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def blank_of(model: Ranker) -> Ranker:
    """Return a copy of a model without weights and without tables: to be made before it is spread over ranks."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(model.tables): nn.Module()})


def borrow(
    model: Ranker,
    blank: Ranker | None,
    held: Mapping[str, tuple[Rows, ...]],
    batches: Sequence[Batch],
    ranks: Ranks,
) -> nn.Module | None:
    """Return a whole model for some batches on the first rank; elsewhere None. A collective.

    Args:
        model: What this rank has of the model.
        blank: Its `blank_of`, on the first rank.
        held: Of sharded tables, by the parameter's name: which rows are held here.
        batches: What will be looked up; on the CPU, on the first rank.
        ranks: Who trains together.
    """
    dense = gather_whole({n: x for n, x in model.state_dict().items() if not n.startswith("tables.")}, ranks)
    tables = _borrow_tables(model.tables, held, batches, ranks)
    if blank is None:
        return None
    whole = copy.deepcopy(blank)
    whole.load_state_dict(dense, assign=True)
    whole.add_module("tables", tables)
    return whole.train(model.training)


def _borrow_tables(
    tables: Tables, held: Mapping[str, tuple[Rows, ...]], batches: Sequence[Batch], ranks: Ranks
) -> SomeRows:
    found, all_ids = dict[str, Tensor](), list[Tensor]()
    for plan, (key, weight) in zip(tables.plans, tables.weights.items(), strict=True):
        ids_U = find_ids(batches, plan)
        of = held.get(f"tables.weights.{key}")
        here = ids_U.to(weight.device)
        found[key] = weight.detach()[here] if of is None else fetch_rows(weight.detach(), of, ids_U, ranks)
        all_ids.append(here)
    return SomeRows(tables, all_ids, found)


def gather_whole(state: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return tensors whole on the first rank, of which each may have a shard; elsewhere nothing. A collective."""
    found = {}
    for name, x in state.items():
        whole = x.full_tensor() if is_dtensor(x) else x  # type: ignore[attr-defined]  # a DTensor's
        if ranks.is_first:
            found[name] = whole
    return found


def find_ids(batches: Sequence[Batch], plan: Plan) -> Int64[Tensor, " distinct"]:
    """Return which rows of the tables of one width some batches look up: each once, rising."""
    asked = [plan.pick_ids(batch.ids).reshape(-1) for batch in batches]
    asked += [batch.lists[i].values for batch in batches for i in plan.lists]
    return torch.cat(asked).unique() if asked else torch.empty(0, dtype=torch.int64)


def fetch_rows(
    weight: Tensor, held: Sequence[Rows], ids_U: Int64[Tensor, " distinct"], ranks: Ranks
) -> Float[Tensor, "_ width"]:
    """Return rows of sharded tables on the first rank, in the order of the ids; elsewhere none. A collective.

    Args:
        weight: What is held here of the tables of one width, one below the other.
        held: Which rows these are.
        ids_U: On the first rank, the rows that it wants: rising, counted in the whole matrix; looked at there alone.
        ranks: Who holds the tables together.

    >>> from steadyrank.ranks import ALONE
    >>> held = [Rows("user", 0, 4, first=2, count=2), Rows("item", 4, 3, first=0, count=3)]
    >>> fetch_rows(torch.tensor([[2.0], [3.0], [4.0], [5.0], [6.0]]), held, torch.tensor([2, 4, 6]), ALONE)
    tensor([[2.],
            [4.],
            [6.]])
    """
    ids_U = ranks.broadcast(ids_U)
    places, rows, start = [ids_U[:0]], [ids_U[:0]], 0
    for each in held:
        first = each.start + each.first
        low, high = torch.searchsorted(ids_U, torch.tensor([first, first + each.count])).tolist()
        places.append(torch.arange(low, high))
        rows.append(ids_U[low:high] - first + start)
        start += each.count
    found_HD = weight[torch.cat(rows).to(weight.device)].cpu()
    order, come = _bring(torch.cat(places), ranks), _bring(found_HD, ranks)
    return torch.empty_like(come).index_copy_(0, order, come).to(weight.device)


def _bring(x: Tensor, ranks: Ranks) -> Tensor:
    """Return the rows of all ranks one below the other on the first; elsewhere none. A collective."""
    counts = ranks.gather(torch.tensor(len(x))).tolist()
    return ranks.swap(x, [len(x)] + [0] * (ranks.size - 1), counts if ranks.is_first else [0] * ranks.size)
