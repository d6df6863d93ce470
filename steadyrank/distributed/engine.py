"""One model on several ranks: DDP or FSDP2 for its dense parameters, and its tables replicated or sharded.

Each rank has its rows of a batch and its part of the loss, times the number of ranks; gradients are averaged: by DDP,
by FSDP2, by TorchRec and, for tables that every rank has, here. What comes out is the gradient of the whole batch.

Shapes: N ranks, R touched rows of a table, D width.
"""

import importlib.util
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..models.embeddings import NumberInputs
from ..models.ranker import Ranker
from ..native.rows import coalesce
from ..ranks import Ranks
from ..ranks.pace import Pace
from ..schema import Batch
from ..settings import Settings
from ..shards import Rows, RowShards
from .borrowed import blank_of, borrow
from .unfused import empty_gradient


class DistributedConfig(Settings):
    """How several processes, started by torchrun, train one model; one process alone passes over it."""

    dense: Literal["ddp", "fsdp2"] = "ddp"
    """Dense parameters: `ddp` (each rank has all) or `fsdp2` (each rank has its shard of every tensor)."""
    tables: Literal["auto", "replicated", "torchrec"] = "auto"
    """Embedding tables: `replicated` (each rank has all, and the rows of their gradients are summed), `torchrec`
    (sharded over the ranks as its planner says), or `auto`: by TorchRec where it is installed."""
    timeout_s: float = Field(default=900.0, gt=0)
    """Seconds that a rank waits for the others before the run ends; more than `train.wait_for_disk_s`."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Gigabytes that the tables may take of each rank; what its GPU or its share of the machine has when left out."""

    @property
    def shards_tables(self) -> bool:
        """Whether TorchRec spreads the tables over the ranks.

        Raises:
            ConfigError: It is asked for and not installed.
        """
        found = all(importlib.util.find_spec(name) is not None for name in ("torchrec", "fbgemm_gpu"))
        if self.tables == "torchrec" and not found:
            raise ConfigError(
                "distributed.tables = 'torchrec': TorchRec is not installed; install steadyrank[torchrec], or set "
                "distributed.tables = 'replicated' where every rank has memory for all tables"
            )
        return found and self.tables != "replicated"


_SPELT = {"ddp": "DDP", "fsdp2": "FSDP2"}


class Engine:
    """Trains one model together with the other ranks; its parameters keep their names.

    Args:
        model: On its device. Its number features are standardised over the rows of all ranks from here on.
        ranks: Who trains together.
        dense: Who holds dense parameters: `DistributedConfig.dense`.
        rows: Of sharded tables, by the parameter's name: which rows are held here.
    """

    def __init__(
        self,
        model: Ranker,
        ranks: Ranks,
        dense: Literal["ddp", "fsdp2"] = "ddp",
        rows: Mapping[str, tuple[Rows, ...]] | None = None,
    ) -> None:
        self.model, self.ranks, self.dense, self.rows = model, ranks, dense, dict(rows or {})
        self.has_whole_model = dense == "ddp" and not self.rows
        """Whether this rank can call the model by itself."""
        self.pace = Pace(ranks, next(model.parameters()).device)
        names = _table_names(model)
        held = dict(model.named_parameters())
        self.tables = [held[name] for name in names]
        self._replicated = [held[name] for name in names if name not in self.rows]
        self._blank = blank_of(model) if ranks.is_first else None
        for module in model.modules():
            if isinstance(module, NumberInputs):
                module.ranks = ranks
        both = _Both(model)
        if dense == "ddp":
            self._forward: nn.Module = _replicate(both, [f"model.{name}" for name in names])
        else:
            _shard(model, set(self.tables), ranks)
            self._forward = both

    def borrow(self, batches: Sequence[Batch]) -> nn.Module | None:
        """Return a whole model on the first rank, to examine such batches (on the CPU) with; a collective.

        It is another one, that knows no rank but its own; elsewhere None.
        """
        return borrow(self.model, self._blank, self.rows, batches, self.ranks)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (serving, training) logits of this rank's rows."""
        # Otherwise it waits in there for the others' rows and weights.
        with self.pace.working() if self.has_whole_model else nullcontext():
            serving, training = self._forward(batch)
        return serving, training

    def backward(self, total: Tensor) -> None:
        """Leave the gradient of the whole batch's loss, of which `total` is this rank's part."""
        (total * self.ranks.size).backward()
        for table in self.tables:
            if table.grad is None:  # no row of it here: the others wait to hear so
                table.grad = empty_gradient(table)
        average_rows(self._replicated, self.ranks)

    def merge(self, row: dict[str, float]) -> dict[str, float]:
        """Return readings of a step in which the factor of a sharded table is the least of all ranks; a collective."""
        names = [f"clip_factor/{name}" for name in self.rows if f"clip_factor/{name}" in row]
        if names:
            least = self.ranks.gather(torch.tensor([row[name] for name in names], dtype=torch.float64)).amin(0)
            row |= dict(zip(names, least.tolist(), strict=True))
        return row

    def held_rows(self) -> dict[str, tuple[int, int]] | None:
        """Return of every sharded table which rows are held here: the first, and how many; None where none is."""
        found = {each.table: (each.first, each.count) for rows in self.rows.values() for each in rows}
        return found or None

    def pack(self, state: Mapping[str, Any], optimizers: Mapping[str, Optimizer]) -> dict[str, Any]:
        """Mark in a state what is this rank's part of a table, for a checkpoint; a collective."""
        packed = self._change(state, optimizers, self._mark)
        if self.rows and packed["instruments"]:
            packed["instruments"]["kept_update"] = self._join_update(packed["instruments"]["kept_update"])
        return packed

    def _join_update(self, kept: list[list[Any]]) -> list[list[Any]]:
        """Return on the first rank what a step touched, of sharded tables the rows of all ranks; a collective."""
        here = {name: (values.cpu(), rows.cpu()) for name, values, rows in kept if name in self.rows}
        every = self.ranks.collect(here)
        joined = {name: map(torch.cat, zip(*(each[name] for each in every), strict=True)) for name in here if every}
        return [[name, *joined.get(name, (values, rows))] for name, values, rows in kept]

    def unpack(self, state: Mapping[str, Any], optimizers: Mapping[str, Optimizer]) -> dict[str, Any]:
        """Return a state of model and optimizers as this rank holds it, from one with whole tensors, or its own."""
        held = dict(self.model.named_parameters())

        def part(name: str, x: Tensor) -> Tensor:
            return self._part_of(name, held[name], x) if name in held else x

        return self._change(state, optimizers, part)

    def _change(
        self, state: Mapping[str, Any], optimizers: Mapping[str, Optimizer], change: Callable[[str, Tensor], Any]
    ) -> dict[str, Any]:
        """Return a state of model and optimizers with every tensor changed; `change` gets its parameter's name."""
        model = {name: change(name, x) for name, x in state["model"].items()}
        names = {p: name for name, p in self.model.named_parameters()}
        changed = {}
        for name, optimizer in optimizers.items():
            ordered = [names[p] for group in optimizer.param_groups for p in group["params"]]
            saved = state["optimizers"][name]
            of = {
                index: {key: change(ordered[int(index)], x) if isinstance(x, Tensor) else x for key, x in each.items()}
                for index, each in saved["state"].items()
            }
            changed[name] = {**saved, "state": of}
        watched = _change_named(state.get("instruments", {}), set(names.values()), change)
        if "kept_update" in watched:  # of tables it has some rows, by their numbers in the whole
            watched["kept_update"] = [
                [name, x if rows is not None else change(name, x), rows] for name, x, rows in watched["kept_update"]
            ]
        return {**state, "model": model, "optimizers": changed, "instruments": watched}

    def _mark(self, name: str, x: Tensor) -> Any:
        rows = self.rows.get(name)
        if rows is None or not x.dim() or len(x) != sum(each.count for each in rows):
            return x
        return RowShards(x, rows)

    def _part_of(self, name: str, parameter: Tensor, x: Tensor) -> Tensor:
        rows = self.rows.get(name)
        if rows is not None and x.dim() and len(x) == sum(each.rows for each in rows) != len(parameter):
            return torch.cat([x[r.start + r.first : r.start + r.first + r.count] for r in rows])
        if not hasattr(parameter, "placements") or x.shape != parameter.shape or hasattr(x, "placements"):
            return x
        from torch.distributed.tensor import DTensor, distribute_tensor  # loaded already, by whoever sharded it

        assert isinstance(parameter, DTensor)
        return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements)


def _change_named(value: Any, names: set[str], change: Callable[[str, Tensor], Any]) -> Any:
    """Return a nested state in which every tensor that stands under a parameter's name is changed."""
    if isinstance(value, dict):
        return {
            key: change(key, x) if key in names and isinstance(x, Tensor) else _change_named(x, names, change)
            for key, x in value.items()
        }
    return [_change_named(each, names, change) for each in value] if isinstance(value, list) else value


def make_engine(model: Ranker, ranks: Ranks, config: DistributedConfig) -> Engine | None:
    """Return what trains `model`, on its device, on several ranks; None in one process."""
    if ranks.is_alone:
        return None
    rows: Mapping[str, tuple[Rows, ...]] = getattr(model.tables, "rows", {})
    return Engine(model, ranks, config.dense, {f"tables.{name}": held for name, held in rows.items()})


def describe_ranks(engine: Engine, idle: int = 0) -> dict[str, Any]:
    """Return how a model is spread over ranks, as JSON takes it; `words` is for people.

    Args:
        engine: Trains it.
        idle: Ranks that decode nothing of the log.
    """
    plan = getattr(getattr(engine.model, "tables", None), "plan", None)
    found: dict[str, Any] = {"size": engine.ranks.size, "dense": engine.dense}
    words = f"{engine.ranks.size} ranks: dense parameters by {_SPELT[engine.dense]}"
    if plan is not None:
        from .planning import describe

        found |= {"tables": "torchrec", "plan": describe(plan)}
        kinds = Counter(table["sharding"].replace("_", "-") for table in found["plan"]["tables"])
        words += f", tables by TorchRec ({', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))})"
    elif engine.tables:
        found["tables"] = "replicated"
        words += ", tables on every rank"
    if idle:
        some = "one of them decodes" if idle == 1 else f"{idle} of them decode"
        words += f"; {some} nothing, since the log has fewer row groups than ranks: write more and smaller ones"
    return {**found, "words": words}


def average_rows(tables: Sequence[Tensor], ranks: Ranks) -> None:
    """Average the sparse gradients of tables that every rank has: a sparse all-reduce, after which a row comes up once.

    Ranks touch different numbers of rows, which they tell one another first: one wait for the device a step.
    """
    grads = [coalesce(table.grad) for table in tables if table.grad is not None]
    if not grads:
        return
    counts_NT = ranks.gather(torch.tensor([len(grad.indices()[0]) for grad in grads])).tolist()
    for t, (table, grad) in enumerate(zip(tables, grads, strict=True)):
        counts_N = [counts_T[t] for counts_T in counts_NT]
        rows_R, values_RD = grad.indices()[0], grad.values()
        missing = max(counts_N) - len(rows_R)
        rows_NR = ranks.gather(torch.cat([rows_R, rows_R.new_zeros(missing)]))
        values_NRD = ranks.gather(torch.cat([values_RD, values_RD.new_zeros(missing, *grad.shape[1:])]))
        rows_R = torch.cat([rows_NR[n, :count] for n, count in enumerate(counts_N)])
        values_RD = torch.cat([values_NRD[n, :count] for n, count in enumerate(counts_N)]) / ranks.size
        table.grad = coalesce(torch.sparse_coo_tensor(rows_R[None], values_RD, grad.shape, check_invariants=False))


class _Both(nn.Module):
    """A ranker whose forward pass gives serving and training logits: what DDP can wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        serving, training = self.model.forward_both(batch)  # type: ignore[operator]  # a method
        return serving, training


def _replicate(both: nn.Module, left_out: list[str]) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    # What has sparse gradients, or lies on other ranks, DDP is told to leave alone; it has no public word for that.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(both, left_out)
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the older name
    options: dict[str, Any] = {option: False}  # statistics are the same on all ranks already
    return DistributedDataParallel(both, **options)


def _shard(model: nn.Module, tables: set[nn.Parameter], ranks: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.size,))
    for child in _blocks(model):
        fully_shard(child, mesh=mesh)
    # Else the outermost keeps its weights as a forward pass without backward saw them, whatever is changed since.
    fully_shard(model, mesh=mesh, ignored_params=tables, reshard_after_forward=True)
    register_fsdp_forward_method(model, "forward_both")


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts of a ranker that are worth being gathered one at a time."""
    for name, child in model.named_children():
        if name in ("cross", "trunk") and any(True for _ in child.parameters()):
            yield child


def _table_names(model: nn.Module) -> list[str]:
    names = getattr(model, "table_names", list)
    return list(names())
