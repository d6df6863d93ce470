"""Optimizers by name: their settings, how they are built, and which parameters are tables."""

import inspect
from collections.abc import Collection, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError, check_known
from ..settings import Settings
from .baselines import RowWiseAdagrad
from .clippy import AccumulatorForm, ClippyAdagrad

NamedParameters = list[tuple[str, nn.Parameter]]


def _default(optimizer: type[Optimizer], option: str) -> Any:
    """Return the default that the optimizer's own signature gives, so that it is written there only."""
    return inspect.signature(optimizer).parameters[option].default


class ClippyAdagradConfig(Settings):
    """Settings of `ClippyAdagrad`, the default for dense parameters."""

    name: Literal["clippy_adagrad"] = "clippy_adagrad"
    lr: float = Field(default=_default(ClippyAdagrad, "lr"), ge=0)
    """Learning rate. In the standard form nothing is clipped while it is at most `absolute_threshold`."""
    variable_relative_threshold: float = Field(default=_default(ClippyAdagrad, "variable_relative_threshold"), ge=0)
    """How far a weight may move in one step, as a fraction of its own size."""
    absolute_threshold: float = Field(default=_default(ClippyAdagrad, "absolute_threshold"), ge=0)
    """How far any weight may move in one step, added to the relative part; in units of the weight."""
    accumulator_relative_threshold: float = Field(
        default=_default(ClippyAdagrad, "accumulator_relative_threshold"), ge=0
    )
    """Added to the bound after division by the root of the accumulator; 0 in the paper."""
    initial_accumulator_value: float = Field(default=_default(ClippyAdagrad, "initial_accumulator_value"), ge=0)
    """The sum of squared gradients before the first step."""
    eps: float = Field(default=_default(ClippyAdagrad, "eps"), gt=0)
    """Added to the accumulator under the root, above 0."""
    accumulator: AccumulatorForm = _default(ClippyAdagrad, "accumulator")
    """When the accumulator takes in the gradient: before the step, after it, or after it and clipped like the step."""


class AdagradConfig(Settings):
    """Settings of `torch.optim.Adagrad`, for dense parameters and for tables."""

    name: Literal["adagrad"] = "adagrad"
    lr: float = Field(default=_default(torch.optim.Adagrad, "lr"), ge=0)
    """Learning rate."""
    initial_accumulator_value: float = Field(default=_default(ClippyAdagrad, "initial_accumulator_value"), ge=0)
    """The sum of squared gradients before the first step: the paper's 0.1, where torch starts from 0."""
    eps: float = Field(default=_default(torch.optim.Adagrad, "eps"), gt=0)
    """Added to the root of the accumulator, above 0."""


class RowWiseAdagradConfig(Settings):
    """Settings of `RowWiseAdagrad`, for tables: one accumulator for each row."""

    name: Literal["rowwise_adagrad"] = "rowwise_adagrad"
    lr: float = Field(default=_default(RowWiseAdagrad, "lr"), ge=0)
    """Learning rate."""
    initial_accumulator_value: float = Field(default=_default(RowWiseAdagrad, "initial_accumulator_value"), ge=0)
    """The sum of a row's mean squared gradients before the first step."""
    eps: float = Field(default=_default(RowWiseAdagrad, "eps"), gt=0)
    """Added to the root of the accumulator, above 0."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamConfig(Settings):
    """Settings of `torch.optim.Adam`, for dense parameters."""

    name: Literal["adam"] = "adam"
    lr: float = Field(default=_default(torch.optim.Adam, "lr"), ge=0)
    """Learning rate."""
    betas: tuple[Beta, Beta] = _default(torch.optim.Adam, "betas")
    """How much of the running mean of g, and of g^2, is kept from step to step; each in [0, 1)."""
    eps: float = Field(default=_default(torch.optim.Adam, "eps"), gt=0)
    """Added to the root of the second moment, above 0."""


class AdamWConfig(Settings):
    """Settings of `torch.optim.AdamW`, for dense parameters."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(default=_default(torch.optim.AdamW, "lr"), ge=0)
    """Learning rate."""
    betas: tuple[Beta, Beta] = _default(torch.optim.AdamW, "betas")
    """How much of the running mean of g, and of g^2, is kept from step to step; each in [0, 1)."""
    eps: float = Field(default=_default(torch.optim.AdamW, "eps"), gt=0)
    """Added to the root of the second moment, above 0."""
    weight_decay: float = Field(default=_default(torch.optim.AdamW, "weight_decay"), ge=0)
    """A weight shrinks by this fraction times the learning rate in each step."""


class SGDConfig(Settings):
    """Settings of `torch.optim.SGD`, for dense parameters and, without momentum, for tables."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(default=_default(torch.optim.SGD, "lr"), ge=0)
    """Learning rate."""
    momentum: Beta = _default(torch.optim.SGD, "momentum")
    """How much of the last update is kept, in [0, 1)."""


OptimizerConfig = Annotated[
    ClippyAdagradConfig | AdagradConfig | RowWiseAdagradConfig | AdamConfig | AdamWConfig | SGDConfig,
    Field(discriminator="name"),
]
"""The settings of one optimizer, told apart by `name`; an option that this optimizer does not have is refused."""

_CLASSES: dict[str, type[Optimizer]] = {
    "clippy_adagrad": ClippyAdagrad,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


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
    options = config.model_dump(exclude={"name"})
    build: Any = _CLASSES[config.name]  # each class has its own options
    built: Optimizer = build(named, **options)
    return built


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
    choices = (
        "choose 'rowwise_adagrad', 'adagrad', 'clippy_adagrad', or 'sgd' without momentum, or make the gradients dense"
    )
    if isinstance(config, AdamConfig | AdamWConfig):
        raise ConfigError(f"optimizer '{config.name}' takes no sparse gradients, which '{first}' has; {choices}")
    if isinstance(config, SGDConfig) and config.momentum:
        raise ConfigError(
            f"optimizer 'sgd' with momentum {config.momentum} takes no sparse gradients, which '{first}' has; {choices}"
        )
