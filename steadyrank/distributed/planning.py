"""Where the embedding tables go: TorchRec's planner, asked for a number of ranks and a memory that need not exist yet.

A table is cut by rows or lies whole on one rank. Never by columns: one clip factor and one accumulator of row-wise
Adagrad belong to all of a row.
"""

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import ConfigError, check_known
from ..schema import IdsFeature, Schema, TableSlot
from ..shards import Rows

StateBytes = Callable[[int], float]
"""Bytes that an optimizer keeps for a row of a table, by the table's width."""

KINDS = ("table_wise", "row_wise", "table_row_wise")
"""How a table may lie: whole on a rank, cut by rows over all ranks, or over those of one machine."""
WEIGHT_BYTES = 4
"""Of a weight."""
LIST_LENGTH = 20
"""How many elements a list is taken to have that says no `max_length`."""
SHARE = 0.9
"""Of a device's memory that is planned for: the rest is for what nobody counts."""


class Piece(NamedTuple):
    """What one rank holds of a table, and what the planner expects of it."""

    rank: int
    first: int
    """Its first row in the table."""
    rows: int
    size: int
    """Bytes: weights, the optimizer's state, and the planner's estimate of what is sent and received."""
    time_ms: float
    """The planner's estimate of a step's lookups, exchanges and gradients, in milliseconds."""


class TablePlan(NamedTuple):
    """Where a table lies."""

    table: str
    slot: TableSlot
    kind: str
    """`table_wise`, `row_wise` or `table_row_wise`."""
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class TablesPlan:
    """Where all tables lie."""

    ranks: int
    budget: int
    """Bytes of a rank that tables may take."""
    tables: tuple[TablePlan, ...]
    """In the order of `Schema.tables`."""
    sharding: Any = field(repr=False, compare=False)
    """TorchRec's own plan."""

    def rows_of(self, rank: int, width: int) -> tuple[Rows, ...]:
        """Return what a rank holds of the tables of one width."""
        found = []
        for plan in self.tables:
            if plan.slot.width == width:
                mine = [piece for piece in plan.pieces if piece.rank == rank and piece.rows]
                first, count = (mine[0].first, mine[0].rows) if mine else (0, 0)
                found.append(Rows(plan.table, plan.slot.start, plan.slot.rows, first, count))
        return tuple(found)


def describe(plan: TablesPlan) -> dict[str, Any]:
    """Return a plan in plain numbers and words, as JSON takes them.

    Returns:
        `ranks`, `budget_bytes`, `bytes` and `time_ms` of each rank (the planner's estimates), and `tables`, of each
        its name, rows, width, sharding, and by piece the ranks, rows, bytes and milliseconds.
    """
    pieces = [piece for table in plan.tables for piece in table.pieces]
    return {
        "ranks": plan.ranks,
        "budget_bytes": plan.budget,
        "bytes": [sum(piece.size for piece in pieces if piece.rank == rank) for rank in range(plan.ranks)],
        "time_ms": [sum(piece.time_ms for piece in pieces if piece.rank == rank) for rank in range(plan.ranks)],
        "tables": [
            {
                "table": table.table,
                "rows": table.slot.rows,
                "width": table.slot.width,
                "sharding": table.kind,
                "ranks": [piece.rank for piece in table.pieces],
                "rows_per_rank": [piece.rows for piece in table.pieces],
                "bytes": [piece.size for piece in table.pieces],
                "time_ms": [piece.time_ms for piece in table.pieces],
            }
            for table in plan.tables
        ],
    }


def plan_for(
    schema: Schema,
    ranks: int,
    budget_bytes: int,
    *,
    device: str = "cuda",
    ranks_per_host: int | None = None,
    batch_rows: int = 512,
    dense_bytes: int = 0,
    state_bytes: StateBytes | None = None,
    sharding: Mapping[str, Sequence[str]] | None = None,
) -> TablesPlan:
    """Plan the tables for a world that need not exist: no process is started, and no table made.

    Args:
        schema: Has the tables.
        ranks: How many processes.
        budget_bytes: Memory of each.
        device: `cuda` or `cpu`.
        ranks_per_host: How many of them share a machine; all when None.
        batch_rows: Rows of a batch that one rank learns.
        dense_bytes: What the rest of the model takes of the memory.
        state_bytes: What the tables' optimizer keeps for a row; nothing when None.
        sharding: For some tables, the kinds that are allowed: `table_wise`, `row_wise`, `table_row_wise`.

    Raises:
        ConfigError: They do not fit, with the arithmetic; or TorchRec is not installed.
    """
    load_torchrec()
    planner_module = import_module("torchrec.distributed.planner")
    errors = import_module("torchrec.distributed.planner.types")
    for kinds in (sharding or {}).values():
        for kind in kinds:
            check_known(kind, KINDS, "way to shard a table")
    local = min(ranks, ranks_per_host or ranks)
    budget = budget_bytes - dense_bytes
    shown = _Arithmetic(schema, ranks, budget_bytes, dense_bytes, state_bytes)
    if budget <= 0:
        raise ConfigError(shown.refuse())
    topology = _topology(ranks, local, device, budget)
    constraints = _constraints(schema, ranks > local, sharding or {})
    planner = planner_module.EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_rows,
        enumerator=_enumerator(topology, batch_rows, constraints, state_bytes),
        storage_reservation=import_module(
            "torchrec.distributed.planner.storage_reservations"
        ).FixedPercentageStorageReservation(0.0),
        stats=[import_module("torchrec.distributed.planner.stats").NoopEmbeddingStats()],
        constraints=constraints,
        debug=False,
    )
    try:
        sharding_plan = planner.plan(bags_of(schema), [sharder()])
    except errors.PlannerError as error:
        if error.error_type not in (errors.PlannerErrorType.INSUFFICIENT_STORAGE, errors.PlannerErrorType.PARTITION):
            raise ConfigError(f"TorchRec's planner finds no place for the embedding tables: {error}") from error
        raise ConfigError(shown.refuse()) from error
    found = {option.name: option for option in planner.get_selected_options()}
    tables = []
    for i, (name, slot) in enumerate(schema.tables.items()):
        option = found[f"table_{i}"]
        pieces = [
            Piece(each.rank, each.offset[0], each.size[0], each.storage.hbm + each.storage.ddr, each.perf.total)
            for each in option.shards
        ]
        tables.append(TablePlan(name, slot, option.sharding_type, tuple(pieces)))
    return TablesPlan(ranks, budget, tuple(tables), sharding_plan)


def load_torchrec() -> None:
    """Import TorchRec, which warns about parts of it that are not ours.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module("torchrec.distributed")
            import_module("torchrec.distributed.planner")
        # What it warns of in its log is its own affair: an environment variable, how torch traces it.
        for name in ("torchrec", "torch.fx._symbolic_trace"):
            logging.getLogger(name).setLevel(logging.ERROR)
    except ImportError as error:
        raise ConfigError(
            f"sharded tables need TorchRec, which cannot be imported ({error}): pip install 'steadyrank[torchrec]', or "
            "let every process hold all tables (tables = 'replicated')"
        ) from error


def bags_of(schema: Schema) -> nn.ModuleDict:
    """Return what is to be sharded, by `width_D`: an EmbeddingBagCollection of its tables, without their memory.

    Table i of the schema is called `table_i` there, and a feature as `feature_keys` says: names may have dots in them,
    which those of torch's modules may not.
    """
    configs, modules = import_module("torchrec.modules.embedding_configs"), import_module("torchrec.modules")
    keys, found = feature_keys(schema), nn.ModuleDict()
    weighted = {schema.slot(name).width for name, each in schema.list_features.items() if each.pooling == "mean"}
    for width in dict.fromkeys(slot.width for slot in schema.tables.values()):
        tables = [
            configs.EmbeddingBagConfig(
                name=f"table_{i}",
                num_embeddings=slot.rows,
                embedding_dim=width,
                feature_names=[keys[feature] for feature in _features_of(schema, name)],
                pooling=configs.PoolingType.SUM,
            )
            for i, (name, slot) in enumerate(schema.tables.items())
            if slot.width == width
        ]
        found[f"width_{width}"] = modules.embedding_modules.EmbeddingBagCollection(
            tables=tables, is_weighted=width in weighted, device=torch.device("meta")
        )
    return found


def feature_keys(schema: Schema) -> dict[str, str]:
    """Return what a feature is called in TorchRec.

    >>> features = {"item.id": {"kind": "id", "rows": 9}, "history": {"kind": "ids", "rows": 9}}
    >>> feature_keys(Schema(features=features, tasks={"click": {"kind": "binary"}}))
    {'item.id': 'feature_0', 'history': 'feature_1'}
    """
    return {name: f"feature_{i}" for i, name in enumerate((*schema.id_features, *schema.list_features))}


def sharder() -> Any:
    """Return what shards an EmbeddingBagCollection: TorchRec's own, which cuts by rows on CPUs too."""
    base = import_module("torchrec.distributed.embeddingbag").EmbeddingBagCollectionSharder

    class Sharder(base):  # type: ignore[misc,valid-type]  # imported when asked for
        def sharding_types(self, compute_device_type: str) -> list[str]:
            return list(KINDS)

    return Sharder()


def memory_of(device: torch.device) -> int:
    """Return the bytes of a rank's memory: of its GPU, or its part of the memory that this machine has available."""
    if device.type != "cpu":
        return int(torch.cuda.get_device_properties(device).total_memory * SHARE)
    found = [
        int(line.split()[1]) * 1024
        for line in (Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else [])
        if line.startswith("MemAvailable")
    ]
    machine = found[0] if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(machine * SHARE / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _features_of(schema: Schema, table: str) -> list[str]:
    embedded = {**schema.id_features, **schema.list_features}
    return [name for name, feature in embedded.items() if feature.table == table]


def _topology(ranks: int, local: int, device: str, budget: int) -> Any:
    types = import_module("torchrec.distributed.planner.types")
    on_host = device == "cpu"
    return types.TopologyFactory.create_topology(
        trainer_config=types.TrainerConfig(
            world_size=ranks,
            local_world_size=local,
            hbm_cap_bytes=0 if on_host else budget,
            ddr_cap_bytes=budget if on_host else 0,
        ),
        kernel_config=types.KernelConfig(compute_device=device),
    )


def _constraints(schema: Schema, several_hosts: bool, sharding: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    types = import_module("torchrec.distributed.planner.types")
    kinds = KINDS if several_hosts else KINDS[:2]
    found = {}
    for i, name in enumerate(schema.tables):
        features = [schema.features[feature] for feature in _features_of(schema, name)]
        lengths = [float(f.max_length or LIST_LENGTH) if isinstance(f, IdsFeature) else 1.0 for f in features]
        found[f"table_{i}"] = types.ParameterConstraints(
            sharding_types=list(sharding.get(name, kinds)), compute_kernels=["fused"], pooling_factors=lengths
        )
    return found


def _enumerator(topology: Any, batch_rows: int, constraints: dict[str, Any], state_bytes: StateBytes | None) -> Any:
    estimators = import_module("torchrec.distributed.planner.shard_estimators")
    storage_of = import_module("torchrec.distributed.planner.types").Storage

    class WithState(estimators.EmbeddingStorageEstimator):  # type: ignore[name-defined,misc]  # imported when asked for
        """TorchRec knows the state of its own optimizers only."""

        def estimate(self, sharding_options: Any, *args: Any, **named: Any) -> None:
            super().estimate(sharding_options, *args, **named)
            for option in sharding_options:
                each = state_bytes(option.tensor.shape[1]) if state_bytes else 0.0
                for shard in option.shards:
                    size = int(each * shard.size[0])
                    on_host = topology.compute_device == "cpu"
                    shard.storage += storage_of(hbm=0 if on_host else size, ddr=size if on_host else 0)

    return import_module("torchrec.distributed.planner.enumerators").EmbeddingEnumerator(
        topology=topology,
        batch_size=batch_rows,
        constraints=constraints,
        estimator=[
            estimators.EmbeddingPerfEstimator(topology=topology, constraints=constraints),
            WithState(topology=topology, constraints=constraints),
        ],
    )


class _Arithmetic(NamedTuple):
    """Why tables do not fit."""

    schema: Schema
    ranks: int
    budget: int
    dense: int
    state_bytes: StateBytes | None

    def refuse(self) -> str:
        sizes = {name: self._size(slot) for name, slot in self.schema.tables.items()}
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        lines = [f"'{name}' {self._line(self.schema.tables[name])} = {show(sizes[name])}" for name in largest]
        rest = len(sizes) - len(largest)
        total, held = sum(sizes.values()), max(0, self.budget - self.dense) * self.ranks
        dense = f" less {show(self.dense)} for the dense layers" if self.dense else ""
        missing = (
            f"{show(total - held)} are missing"
            if total > held
            else "it would just fit, but not with what is sent and received, or not in pieces this large"
        )
        enough = -(-total * 5 // (4 * max(1, self.budget - self.dense)))  # a fifth is left for what is exchanged
        more = f"at least {max(self.ranks + 1, enough):,} ranks" if self.budget > self.dense else "ranks of more memory"
        lighter = any(self._state(slot) > 4 for slot in self.schema.tables.values())
        state = ", or choose 'rowwise_adagrad' for optimizer.tables, which keeps 4 bytes a row" if lighter else ""
        return (
            f"the embedding tables do not fit on {self.ranks:,} ranks. They take {show(total)}: {'; '.join(lines)}"
            f"{f'; and {rest:,} smaller ones' if rest else ''}. There are {self.ranks:,} x ({show(self.budget)}{dense})"
            f" = {show(held)}; {missing}. Take {more}, or give the largest tables fewer rows or a smaller width"
            f"{state}"
        )

    def _state(self, slot: TableSlot) -> float:
        return self.state_bytes(slot.width) if self.state_bytes else 0.0

    def _size(self, slot: TableSlot) -> int:
        return int(slot.rows * (slot.width * WEIGHT_BYTES + self._state(slot)))

    def _line(self, slot: TableSlot) -> str:
        state = self._state(slot)
        weights = f"{slot.width:,} x {WEIGHT_BYTES} bytes"
        return f"{slot.rows:,} rows x " + (f"({weights} + {state:g} for the optimizer)" if state else weights)


def show(size: int) -> str:
    """Return a number of bytes for people.

    >>> show(68_000_000_000), show(1_500_000), show(1_500)
    ('68.0 GB', '1.5 MB', '1,500 bytes')
    """
    if size < 1e6:
        return f"{size:,} bytes"
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
