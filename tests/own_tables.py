"""Tables of a model that its owner shards with TorchRec and trains in a loop of their own; for sharded_processes.py.

Every check goes in each of two processes, beside the same tables as torch's EmbeddingBag in one process.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from steadyrank.distributed import sparse_gradients, table_parameters
from steadyrank.distributed.planning import load_torchrec, sharder
from steadyrank.errors import ConfigError
from steadyrank.optim import ClipGlobalNorm, ClipGradients, ClippyAdagrad, ClippyAdam, RowWiseAdagrad
from steadyrank.ranks import Ranks


def adagrad(params: Any) -> torch.optim.Optimizer:
    """Torch's; not from an empty accumulator, from where a first step is as large for rounding as for a gradient."""
    return torch.optim.Adagrad(params, lr=0.5, initial_accumulator_value=0.1)


def gap(one: torch.Tensor, many: torch.Tensor) -> float:
    return (one - many).abs().nan_to_num(nan=torch.inf).amax().item()


def scalars(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return all states of one number: counts, factors and what a calibration found."""
    return {
        f"{index}/{key}": value.item()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.dim() == 0
    }


# Tables in a loop of one's own: rows, width, features, pooling, how it lies, and on which rank if whole.
TABLES: dict[str, tuple[int, int, list[str], str, str, int]] = {
    "user": (11, 4, ["user"], "sum", "row_wise", 0),
    "item": (7, 4, ["item", "history"], "sum", "table_wise", 0),
    "tag": (5, 8, ["tags"], "sum", "table_wise", 0),
    "city": (6, 4, ["city", "home"], "mean", "table_wise", 1),
    "place": (3, 4, ["place"], "sum", "row_wise", 0),
    "one": (1, 4, ["one"], "sum", "row_wise", 0),
}
FEATURES = [name for table in TABLES.values() for name in table[2]]
CASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "row": lambda params: ClippyAdagrad(params, lr=0.5, granularity="row"),
    "tensor": lambda params: ClippyAdagrad(params, lr=0.5, granularity="tensor", telemetry=True),
    "rowwise": lambda params: RowWiseAdagrad(params, lr=0.5),
    "torch": lambda params: adagrad([weight for _, weight in params]),
    "norm": lambda params: ClipGradients(ClippyAdam(params, lr=0.05), ClipGlobalNorm(0.5)),
}


class Model(nn.Module):
    """A model as its owner wrote it: TorchRec's tables, or torch's in one process, and a dense layer."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables
        self.over = nn.Linear(sum(table[1] * len(table[2]) for table in TABLES.values()), 1)

    def forward(self, bags: Any) -> torch.Tensor:
        found = self.tables(bags)
        x = torch.cat([found[name] for name in FEATURES], 1)
        return self.over(x)[:, 0] + x.square().sum(1)


class OneProcessTables(nn.Module):
    """The same tables as torch has them, called with ids and offsets by feature."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleDict(
            {name: nn.EmbeddingBag(rows, width, mode=pooling, sparse=True, include_last_offset=True)
             for name, (rows, width, _, pooling, _, _) in TABLES.items()}
        )  # fmt: skip

    def forward(self, bags: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {feature: self.bags[name](*bags[feature]) for name, table in TABLES.items() for feature in table[2]}


def make_bags(seed: int, first: int, rows: int) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Ids and offsets of some rows of a batch of 8, by feature; rows may have no id; and labels."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, table in TABLES.items():
        for feature in table[2]:
            lengths = torch.randint(0, 3, (8,), generator=generator)
            ids = (torch.rand(int(lengths.sum()), generator=generator).square() * TABLES[name][0]).long()
            ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            own = ends[first : first + rows + 1]
            found[feature] = ids[own[0] : own[-1]], own - own[0]
    return found, torch.randn(8, generator=generator)[first : first + rows]


def as_torchrec(bags: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Any:
    jagged = import_module("torchrec.sparse.jagged_tensor").KeyedJaggedTensor
    values, lengths = torch.cat([ids for ids, _ in bags.values()]), [ends.diff() for _, ends in bags.values()]
    return jagged(list(bags), values, lengths=torch.cat(lengths))


def make_collection(place: str = "sum", **changed: Any) -> Any:
    """The tables as their owner has them for TorchRec, without memory; `place` is how that table pools."""
    configs, modules = import_module("torchrec.modules.embedding_configs"), import_module("torchrec.modules")
    pooling = {"sum": configs.PoolingType.SUM, "mean": configs.PoolingType.MEAN}
    tables = [
        configs.EmbeddingBagConfig(
            name=name,
            num_embeddings=rows,
            embedding_dim=width,
            feature_names=features,
            **changed,
            pooling=pooling[place if name == "place" else how],
        )
        for name, (rows, width, features, how, _, _) in TABLES.items()
    ]
    return modules.embedding_modules.EmbeddingBagCollection(tables=tables, device=torch.device("meta"))


def make_parallel(model: nn.Module, ranks: Ranks, kernel: str = "fused", **how: str) -> Any:
    """Shard a model as its owner does, by a plan of its own; `how` changes the way a table lies."""
    load_torchrec()
    parallel, plans = import_module("torchrec.distributed"), import_module("torchrec.distributed.sharding_plan")
    kinds = {name: how.get(name, table[4]) for name, table in TABLES.items()}
    ways = {
        name: plans.data_parallel() if kind == "data_parallel"
        else plans.table_wise(TABLES[name][5], compute_kernel=kernel) if kind == "table_wise"
        else plans.row_wise(compute_kernel=kernel) if kind == "row_wise"
        else plans.column_wise(ranks=[0, 1], compute_kernel=kernel)
        for name, kind in kinds.items()
    }  # fmt: skip
    base = import_module("torchrec.distributed.embeddingbag").EmbeddingBagCollectionSharder
    tables = plans.construct_module_sharding_plan(
        model.tables, ways, sharder=sharder() if "column_wise" not in kinds.values() else base(),
        local_size=ranks.size, world_size=ranks.size, device_type="cpu",
    )  # fmt: skip
    plan = import_module("torchrec.distributed.types").ShardingPlan({"tables": tables})
    return parallel.DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder()])


def gap_of(one: nn.Module, many: Any) -> float:
    """The largest difference of this rank's rows of all tables, and of the dense layer."""
    found = [gap(one.over.weight, dict(many.named_parameters())["over.weight"])]
    for name, part in table_parameters(many):
        table = one.tables.bags[name.split(".")[-2]].weight
        first = int(part.sharded_rows[1, 0])
        assert part.shape[1] == table.shape[1]
        if len(part):
            found.append(gap(table[first : first + len(part)], part))
    return max(found)


def whole_tables(one: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the model in one process, under the names that the sharded one has for it."""
    renamed = {key.replace("tables.bags", "tables.embedding_bags"): w for key, w in one.state_dict().items()}
    return {key: w.detach().clone() for key, w in renamed.items()}


def train(name: str, ranks: Ranks) -> dict[str, Any]:
    """Six steps of a model that TorchRec has sharded, beside torch's tables in one process."""
    torch.manual_seed(3)
    one = Model(OneProcessTables())
    start = [w.detach().clone() for w in one.parameters()]
    with sparse_gradients():
        many = make_parallel(Model(make_collection()), ranks)
    many.load_state_dict(whole_tables(one))
    loaded = gap_of(one, many)
    params = table_parameters(many)
    names = {key.split(".")[-2] for key, _ in params}
    tables = [(f"bags.{key}", bag.weight) for key, bag in one.tables.bags.items() if key in names]
    made = CASES[name](tables), CASES[name](params)
    rest = [[w for key, w in one.named_parameters() if key.split(".")[-2] not in names],
            [w for key, w in many.named_parameters() if key not in dict(params)]]  # fmt: skip
    dense = [torch.optim.SGD(weights, lr=0.01) for weights in rest]
    sparse = True
    for step in range(6):
        for model, optimizer, other, (first, rows) in (
            (one, made[0], dense[0], (0, 8)), (many, made[1], dense[1], (4 * ranks.rank, 4)),
        ):  # fmt: skip
            optimizer.zero_grad()
            other.zero_grad()
            bags, labels = make_bags(step, first, rows)
            y = model(bags if model is one else as_torchrec(bags))
            (y - labels).square().mean().backward()
            optimizer.step()
            other.step()
        sparse &= all(weight.grad.is_sparse for _, weight in params)
    scores = scalars(made[1])
    if name == "row":  # needs no communication: a rank has the least of its own rows
        each = ranks.gather_objects(scores)
        scores = {key: min(of[key] for of in each) for key in scores}
    again = resume(many, ranks)
    return {
        "names": [key for key, _ in params],
        "rows": ranks.gather_objects([len(weight) for _, weight in params]),
        "rest": [len(weights) for weights in rest],
        "loaded": loaded,
        "gap": max(ranks.gather_objects(gap_of(one, many))),
        "moved": max(gap(w, before) for w, before in zip(one.parameters(), start, strict=True)),
        "scalars": [scalars(made[0]), scores],
        "alike": len({json.dumps(each) for each in ranks.gather_objects(scores)}) == 1,
        "sparse": sparse,
        "again": max(ranks.gather_objects(again)),
    }


def resume(many: Any, ranks: Ranks) -> float:
    """How far the outputs of a fresh model are from those of one whose state it was given."""
    with sparse_gradients():
        fresh = make_parallel(Model(make_collection()), ranks)
    bags = as_torchrec(make_bags(99, 4 * ranks.rank, 4)[0])
    with torch.no_grad():
        assert gap(fresh(bags), many(bags)) > 0.01
        fresh.load_state_dict(many.state_dict())
        return gap(fresh(bags), many(bags))


def begin(ranks: Ranks) -> dict[str, Any]:
    """What the weights are before the first step, how weighted bags look up, and what is left of it afterwards."""
    lookups = import_module("torchrec.distributed.embedding_lookup")
    theirs = lookups.BatchedFusedEmbeddingBag
    with sparse_gradients():
        plain = make_parallel(Model(make_collection(place="mean")), ranks)
        asked = make_parallel(Model(make_collection(init_fn=lambda w: nn.init.constant_(w, 0.25))), ranks)
        beside = make_parallel(Model(make_collection()), ranks, tag="data_parallel")
    fused = make_parallel(Model(make_collection(place="mean")), ranks)
    fused.load_state_dict(plain.state_dict())
    bags = as_torchrec(make_bags(7, 4 * ranks.rank, 4)[0])
    with torch.no_grad():
        return {
            "bounds": all(
                weight.abs().max() <= TABLES[name.split(".")[-2]][0] ** -0.5 and weight.std() > 0.01
                for name, weight in table_parameters(plain)
                if weight.numel() > 2
            ),
            "asked": all((weight == 0.25).all().item() for _, weight in table_parameters(asked)),
            "as_fused": gap(fused(bags), plain(bags)),
            "beside": [key for key, _ in table_parameters(beside)],
            "keys": list(fused.state_dict()) == list(plain.state_dict()),
            "put_back": lookups.BatchedFusedEmbeddingBag is theirs,
        }


def refusals(ranks: Ranks) -> dict[str, str]:
    """What is said of tables that cannot have sparse gradients, and of models that have none."""
    configs, modules = import_module("torchrec.modules.embedding_configs"), import_module("torchrec.modules")

    def with_optimizer() -> None:
        collection = make_collection()
        import_module("torchrec.optim.apply_optimizer_in_backward").apply_optimizer_in_backward(
            torch.optim.SGD, collection.parameters(), {"lr": 0.1}
        )
        make_parallel(Model(collection), ranks)

    def sequence() -> None:
        config = configs.EmbeddingConfig(name="t", num_embeddings=4, embedding_dim=4, feature_names=["t"])
        collection = modules.embedding_modules.EmbeddingCollection(tables=[config], device=torch.device("meta"))
        import_module("torchrec.distributed").DistributedModelParallel(
            nn.Sequential(collection), device=torch.device("cpu")
        )

    found = {}
    for name, do in {
        "columns": lambda: make_parallel(Model(make_collection()), ranks, tag="column_wise"),
        "dense": lambda: make_parallel(Model(make_collection()), ranks, kernel="dense"),
        "half": lambda: make_parallel(Model(make_collection(data_type=configs.DataType.FP16)), ranks),
        "optimizer": with_optimizer,
        "sequence": sequence,
        "none": lambda: table_parameters(nn.Linear(1, 1)),
    }.items():
        try:
            with sparse_gradients():
                do()
            found[name] = ""
        except ConfigError as error:
            found[name] = str(error)
    assert len(set(map(str, ranks.gather_objects(found)))) == 1, "ranks differ in what they refuse"
    return found


def example() -> dict[str, tuple[float, float]]:
    """Loss and least clip factor of examples/torchrec_tables.py at its high rate."""
    spec = importlib.util.spec_from_file_location("torchrec_tables", "examples/torchrec_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    by_row = partial(ClippyAdagrad, granularity="row")
    return {"fused": module.train(5.0), "row": module.train(5.0, by_row)}


def check(ranks: Ranks) -> dict[str, Any]:
    """All of it, by name."""
    found: dict[str, Any] = {f"own/{name}": train(name, ranks) for name in CASES}
    return {**found, "own/begin": begin(ranks), "own/refused": refusals(ranks), "own/example": example()}
