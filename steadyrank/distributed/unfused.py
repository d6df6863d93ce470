"""TorchRec's tables in a loop of one's own: gradients that are left for an optimizer, not a step inside of backward.

A fused kernel applies its own optimizer while gradients are made. It can take no other, cannot wait for a verdict on
all gradients, and cannot know a factor that rests on all touched rows of a table. Here TorchRec still plans, cuts and
exchanges; what it makes in the fused kernel's place is a lookup that leaves a sparse gradient of the touched rows.

Shapes: B rows of a batch, F features of one table, N ids, D width, R rows of a table held here.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - PyTorch's own convention
from torch import Tensor, nn

from ..errors import ConfigError
from ..ranks import Ranks
from .planning import KINDS, load_torchrec

_GRAD: Any = torch.Tensor.grad
"""What reads and writes a tensor's gradient."""


class TablePart(nn.Parameter):
    """The rows of one table that this rank holds [R, D]; with no rows, too.

    A missing gradient reads as one that touches no row. A rank without rows of a table never gets one from backward;
    if it left the table out, the others would wait for it in an optimizer that asks all ranks.
    """

    sharded_over: Ranks
    """Who hold the table together."""
    sharded_rows: Tensor
    """Where its rows end here, and what makes a row here one of the table [2, 1]."""

    @property
    def grad(self) -> Tensor:
        """What backward left; for an optimizer."""
        found: Tensor | None = _GRAD.__get__(self)
        return empty_gradient(self) if found is None else found

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        _GRAD.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        _GRAD.__set__(self, None)


@contextmanager
def sparse_gradients() -> Iterator[None]:
    """Have the tables that TorchRec shards meanwhile leave sparse gradients, for any optimizer that takes them.

        with sparse_gradients():
            model = DistributedModelParallel(my_model, plan=plan, sharders=sharders)
        optimizer = ClippyAdagrad(table_parameters(model), granularity="row", lr=0.5)

    From then on `backward()` leaves gradients, the mean over ranks of what each one's loss gives, as DDP has it, and
    `optimizer.step()` steps. Weights start as TorchRec starts them (`init_fn` of each EmbeddingBagConfig), and its
    `state_dict` and `load_state_dict` of the sharded model are as before. Every rank steps at the same time.

    *What a tensor is.* Each table is one parameter: with `granularity="tensor"` a factor is that of one whole table,
    over all ranks, and those that hold none of its rows have an empty part of it and step along. TorchRec's own groups
    of tables could not serve: which there are differs from rank to rank and from plan to plan, and ranks that asked
    about different groups would wait for one another for ever. With `granularity="row"` no rank asks another.

    *What is replaced.* Tables of `EmbeddingBagCollection`s that lie whole on a rank or are cut by rows, in float32,
    with the compute kernel "fused". Tables that are "data_parallel" are left alone: they are not in
    `table_parameters`, but plain parameters with gradients as large as they are, the same on all ranks. Everything else
    is refused, on all ranks alike: what is cut by columns (a row's factor would be torn apart), kernels that keep
    tables elsewhere or replace ids, `EmbeddingCollection`, plain `nn.EmbeddingBag`, and an optimizer that was named
    for the fused kernel, for it would never step.

    Where a kernel has several tables, their ids are told apart on the host: one wait for the GPU in each forward.

    Raises:
        ConfigError: TorchRec is not installed; or, inside, something is asked for that is refused.
    """
    load_torchrec()
    mute_renamings()
    bags, sequences = (import_module(f"torchrec.distributed.{name}") for name in ("embeddingbag", "embedding"))
    collection = bags.ShardedEmbeddingBagCollection
    with (
        own_kernel(_kernel()),
        _replaced(collection, "_initialize_torch_state", _checked(collection._initialize_torch_state)),
        _replaced(sequences.ShardedEmbeddingCollection, "__init__", _refuse("an EmbeddingCollection")),
        _replaced(bags.ShardedEmbeddingBag, "__init__", _refuse("a plain nn.EmbeddingBag")),
    ):
        yield


def table_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the tables' parameters with their names, the same names in the same order on every rank.

    The rest of the model is what `model.named_parameters()` has besides.

    Args:
        model: Was sharded within `sparse_gradients`.

    Raises:
        ConfigError: It has none.
    """
    found = [(name, param) for name, param in model.named_parameters() if isinstance(param, TablePart)]
    if not found:
        raise ConfigError(
            "the model has no tables with sparse gradients: make its DistributedModelParallel inside of "
            "`with sparse_gradients():`"
        )
    return found  # type: ignore[return-value]  # each is a TablePart, which is a Parameter


def empty_gradient(weight: Tensor) -> Tensor:
    """Return a gradient that touches no row.

    >>> empty_gradient(torch.ones(3, 2)).to_dense().sum(), empty_gradient(torch.ones(0, 2)).shape
    (tensor(0.), torch.Size([0, 2]))
    """
    rows = torch.empty(1, 0, dtype=torch.int64, device=weight.device)
    values = weight.new_empty(0, *weight.shape[1:])
    return torch.sparse_coo_tensor(rows, values, weight.shape, is_coalesced=True, check_invariants=False)


def rows_first(pooled: Tensor, features: int) -> Tensor:
    """Return [F * B, D] as [B, F * D], as TorchRec expects what was looked up.

    >>> rows_first(torch.tensor([[1], [2], [3], [4]]), 2)
    tensor([[1, 3],
            [2, 4]])
    """
    rows, width = len(pooled) // features, pooled.shape[1]
    return pooled.view(features, rows, width).transpose(0, 1).reshape(rows, features * width)


def mute_renamings() -> None:
    """TorchRec calls collectives by names that newer torch has others for: nothing that a user could change."""
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)


@contextmanager
def own_kernel(make: Callable[..., Any]) -> Iterator[None]:
    """Let TorchRec make our lookup in place of its fused kernel."""
    with _replaced(import_module("torchrec.distributed.embedding_lookup"), "BatchedFusedEmbeddingBag", make):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    theirs = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, theirs)


def _kernel() -> Callable[..., Any]:
    """Return what makes a lookup in the tables that TorchRec puts together on this rank."""
    base = import_module("torchrec.distributed.batched_embedding_kernel").BaseBatchedEmbeddingBag

    class Bags(base):  # type: ignore[misc,valid-type]  # imported when asked for
        """A lookup with a sparse gradient for each table."""

        def __init__(self, config: Any, pg: Any, device: Any, sharding_type: Any, env: Any = None) -> None:
            super().__init__(config, pg, device, sharding_type)
            features = [table.num_features() for table in config.embedding_tables]
            takes_mean = self._pooling.name == "MEAN"  # cut by rows it is a sum, which TorchRec divides afterwards
            weights = [
                _part_of(torch.empty(rows, columns, device=device), first, pg)
                for rows, columns, first in zip(self._local_rows, self._local_cols, self._row_offset, strict=True)
            ]
            self._tables = _Tables(weights, features, takes_mean)
            self.init_parameters()

        @property
        def emb_module(self) -> Any:
            return self._tables

        def forward(self, features: Any, *unused: Any, **unused_too: Any) -> Tensor:
            if features.variable_stride_per_key():
                raise ConfigError("tables with sparse gradients need batches of as many rows for every feature")
            return super().forward(features)  # type: ignore[no-any-return]  # asks `emb_module`

        def named_parameters(self, prefix: str = "", *unused: Any, **unused_too: Any) -> Iterator[tuple[str, Tensor]]:
            for name, weight in self.named_parameters_by_table():
                yield f"{prefix}.{name}.weight".removeprefix("."), weight

        def named_buffers(self, *unused: Any, **unused_too: Any) -> Iterator[tuple[str, Tensor]]:
            yield from ()

        def named_parameters_by_table(self) -> Iterator[tuple[str, Any]]:
            names = [table.name for table in self._config.embedding_tables]
            yield from zip(names, self._tables.weights, strict=True)

    return Bags


class _Tables(nn.Module):
    """Some tables, and how many features each has; called as TorchRec calls a kernel of its own."""

    def __init__(self, weights: Sequence[TablePart], features: Sequence[int], takes_mean: bool) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self.features, self.takes_mean = list(features), takes_mean
        self.ends = list(accumulate(features))

    def split_embedding_weights(self) -> list[Tensor]:
        return [weight.detach() for weight in self.weights]

    def forward(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None) -> Tensor:
        """Return the pooled embeddings, feature by feature [B, sum over tables of F * D]."""
        rows = (len(offsets) - 1) // self.ends[-1]
        ends = [end * rows for end in self.ends]
        cuts = [0, *(offsets[ends[:-1]].tolist() if len(ends) > 1 else []), len(indices)]
        found = []
        for i, weight in enumerate(self.weights):
            own, first = slice(cuts[i], cuts[i + 1]), ends[i] - self.features[i] * rows
            starts = offsets[first : ends[i] + 1] - cuts[i]
            pooled = F.embedding_bag(
                *(indices[own].long(), weight, starts.long()),
                mode="sum", sparse=True, include_last_offset=True,
                per_sample_weights=None if per_sample_weights is None else per_sample_weights[own],
            )  # fmt: skip
            if self.takes_mean:
                pooled = pooled / starts.diff().clamp(min=1)[:, None]
            found.append(rows_first(pooled, self.features[i]))
        return found[0] if len(found) == 1 else torch.cat(found, 1)


def _part_of(weight: Tensor, first: int, group: Any) -> TablePart:
    """Return a parameter of the rows of a table from `first` on."""
    part = TablePart(weight)
    part.sharded_over = Ranks(dist.get_rank(group), dist.get_world_size(group), group, group)
    part.sharded_rows = torch.tensor([[len(weight)], [first]], device=weight.device)
    return part


def _checked(theirs: Callable[..., None]) -> Callable[..., None]:
    """Return what gives a sharded collection its parameters, after a look at what is asked for."""

    def initialize(self: Any, *args: Any, **named: Any) -> None:
        # What is looked at is the same on every rank, so that they refuse together.
        infos = {
            info.embedding_config.name: info for each in self.sharding_type_to_sharding_infos.values() for info in each
        }
        ours = [config for config in self._embedding_bag_configs if _is_ours(config, infos[config.name], self._env)]
        theirs(self, *args, **named)
        for config in ours:
            holder = self.embedding_bags[config.name]
            if isinstance(holder.weight, TablePart):
                continue
            none = torch.empty(0, config.embedding_dim, device=self._device)
            holder.weight = _part_of(none, 0, self._env.process_group)
            holder.register_load_state_dict_pre_hook(_keep_width)

    return initialize


def _keep_width(module: Any, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """A rank that holds no rows of a table is given a tensor without a width by TorchRec."""
    key = f"{prefix}weight"
    if key in state_dict and state_dict[key].numel() == 0:
        state_dict[key] = state_dict[key].reshape(module.weight.shape)


def _is_ours(config: Any, info: Any, env: Any) -> bool:
    """Say whether a table gets our lookup.

    Raises:
        ConfigError: It can have neither ours nor be left alone.
    """
    kind, kernel = info.param_sharding.sharding_type, info.param_sharding.compute_kernel
    if kind == "data_parallel":
        return False
    where = f"table '{config.name}'"
    if kind not in KINDS or kernel != "fused":
        raise ConfigError(
            f"{where} is planned as '{kind}' with the kernel '{kernel}': a table with sparse gradients lies whole on a "
            f"rank or is cut by rows; give the planner ParameterConstraints(sharding_types={list(KINDS)}, "
            "compute_kernels=['fused']) for it"
        )
    if config.data_type.name != "FP32":
        raise ConfigError(f"{where} has weights in {config.data_type.name}: with sparse gradients they are FP32")
    if "optimizer" in (info.fused_params or {}):
        raise ConfigError(
            f"{where} was given the optimizer {info.fused_params['optimizer']} for the fused kernel, which would never "
            "step: leave it out of fused_params and apply_optimizer_in_backward, and step table_parameters(model)"
        )
    if hasattr(env, "sharding_pg"):
        raise ConfigError(f"{where} is sharded within groups of ranks (DMPCollection): use DistributedModelParallel")
    return True


def _refuse(what: str) -> Callable[..., None]:
    def make(self: Any, *args: Any, **named: Any) -> None:
        raise ConfigError(
            f"{what} cannot be sharded with sparse gradients: put its tables into an EmbeddingBagCollection, or leave "
            "it out of the sharders and plan"
        )

    return make
