"""Optimizers by name: how they are built from their settings, and which parameters are tables."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError, check_known
from .configs import (
    OPTIMIZERS,
    RULES,
    AdamConfig,
    AdamWConfig,
    ClipConfig,
    ClipUpdatesConfig,
    OptimizerConfig,
    SGDConfig,
)
from .guarded import GuardedOptimizer, innermost
from .wrap import ClipGradients, ClipUpdates

NamedParameters = list[tuple[str, nn.Parameter]]


def build_optimizer(
    config: OptimizerConfig, named_params: Iterable[tuple[str, nn.Parameter]], *, sparse: bool = False
) -> Optimizer:
    """Build the optimizer that `config` names, over parameters that it will know by name.

    Args:
        config: which optimizer, and its options.
        named_params: (name, parameter) pairs, at least one.
        sparse: whether the gradients of these parameters are sparse, as those of tables are.

    Returns:
        A plain `torch.optim.Optimizer` with one group.

    Raises:
        ConfigError: there is no parameter, or the optimizer takes no sparse gradients.

    >>> from steadyrank.optim import ClippyAdagradConfig
    >>> optimizer = build_optimizer(ClippyAdagradConfig(lr=0.2), torch.nn.Linear(2, 1).named_parameters())
    >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["param_names"]
    (0.2, ['weight', 'bias'])
    """
    named = list(named_params)
    if not named:
        raise ConfigError(
            f"optimizer '{config.name}': expected at least one parameter, came none; leave it out instead"
        )
    if sparse:
        _check_takes_sparse(config, named[0][0])
        if config.name == "adagrad" and not torch.sparse.check_sparse_tensor_invariants.is_enabled():
            # torch's Adagrad builds sparse tensors, and warns unless somebody has said no to checking them.
            torch.sparse.check_sparse_tensor_invariants.disable()
    # What is left out of a configuration has its own word for it in the class: infinity, which TOML lacks.
    options = config.model_dump(exclude={"name", "preset", "clip"}, exclude_none=True)
    build: Any = OPTIMIZERS[config.name]  # each class has its own options
    built: Optimizer = build(named, **options)
    return built if config.clip is None else _clipped(built, config.clip)


def state_bytes_per_row(config: OptimizerConfig, width: int) -> float:
    """Return how many bytes an optimizer keeps for each row of a table of that width, found on two small tables.

    >>> from steadyrank.optim import AdagradConfig, RowWiseAdagradConfig
    >>> state_bytes_per_row(RowWiseAdagradConfig(), width=16), state_bytes_per_row(AdagradConfig(), width=16)
    (4.0, 64.0)
    """
    narrow, wide = (_state_bytes(config, nn.Parameter(torch.zeros(64, width))) / 64 for width in (1, 2))
    return narrow + (wide - narrow) * (width - 1)


def _state_bytes(config: OptimizerConfig, table: nn.Parameter) -> int:
    optimizer = innermost(build_optimizer(config, [("table", table)], sparse=True))
    state: dict[str, Any] = optimizer.state.get(table, {})  # torch's own Adagrad has it from the start
    if isinstance(optimizer, GuardedOptimizer):
        state = optimizer._fresh_state(table, optimizer.param_groups[0])
    kept = [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]
    return sum(value.numel() * value.element_size() for value in kept)


def _clipped(optimizer: Optimizer, config: ClipConfig) -> Optimizer:
    options = config.model_dump(exclude={"name"}, exclude_none=True)
    if isinstance(config, ClipUpdatesConfig):
        return ClipUpdates(optimizer, **options)
    return ClipGradients(optimizer, RULES[config.name](**options))


def split_parameters(module: nn.Module, table_names: Collection[str]) -> tuple[NamedParameters, NamedParameters]:
    """Split a module's parameters into dense ones and embedding tables, each in the module's order.

    Args:
        module: what is trained.
        table_names: names of the tables' parameters, or of submodules that hold nothing but tables.

    Returns:
        (name, parameter) pairs of the dense parameters, and of the tables.

    Raises:
        ConfigError: a name is neither a parameter nor a submodule with parameters.

    >>> model = torch.nn.ModuleDict({"table": torch.nn.Embedding(9, 2), "top": torch.nn.Linear(2, 1)})
    >>> dense, tables = split_parameters(model, ["table"])
    >>> [name for name, _ in dense], [name for name, _ in tables]
    (['top.weight', 'top.bias'], ['table.weight'])
    """
    dense: NamedParameters = []
    tables: NamedParameters = []
    known: set[str] = set()
    for name, param in module.named_parameters():
        parts = name.split(".")
        prefixes = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        known |= prefixes
        (dense if prefixes.isdisjoint(table_names) else tables).append((name, param))
    for name in table_names:
        check_known(name, sorted(known), "parameter or submodule")
    return dense, tables


def _check_takes_sparse(config: OptimizerConfig, first: str) -> None:
    choices = "choose 'rowwise_adagrad', 'adagrad', a clippy, or 'sgd' without momentum, or make the gradients dense"
    if isinstance(config, AdamConfig | AdamWConfig):
        raise ConfigError(f"optimizer '{config.name}' takes no sparse gradients, which '{first}' has; {choices}")
    if isinstance(config, SGDConfig) and config.momentum:
        raise ConfigError(
            f"optimizer 'sgd' with momentum {config.momentum} takes no sparse gradients, which '{first}' has; {choices}"
        )
