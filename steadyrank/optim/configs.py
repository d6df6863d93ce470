"""Settings of the optimizers and of what clips their gradients or updates; each default is that of the class."""

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch.optim import Optimizer

from ..settings import Settings
from .baselines import RowWiseAdagrad
from .bounded import Granularity
from .clippy import PRESETS, AccumulatorForm, ClippyAdagrad, ClippyAdam, ClippyAdamW
from .rivals import Lamb, LambAdagrad, StableAdamW
from .rules import AGC, ClipGlobalNorm, ClipTensorNorm, ClipValue, CowClip, Rule
from .spikes import AdaGC, SkipSpikes, SpikeClip, ZClip
from .wrap import ClipUpdates


def _default(made: type[Optimizer | Rule], option: str) -> Any:
    """Return the default that the class's own signature gives, so that it is written there only."""
    return inspect.signature(made).parameters[option].default


class ClipValueConfig(Settings):
    """Clip each coordinate of the gradient (`ClipValue`)."""

    name: Literal["value"] = "value"
    limit: float = Field(gt=0)
    """The largest coordinate that a gradient keeps, above 0."""


class ClipGlobalNormConfig(Settings):
    """Clip the norm of all gradients together (`ClipGlobalNorm`)."""

    name: Literal["global_norm"] = "global_norm"
    max_norm: float = Field(gt=0)
    """The largest L2 norm that all gradients keep together, above 0."""


class ClipTensorNormConfig(Settings):
    """Clip the norm of each tensor's gradient, the paper's GC (`ClipTensorNorm`)."""

    name: Literal["tensor_norm"] = "tensor_norm"
    max_norm: float = Field(gt=0)
    """The largest L2 norm that a tensor's gradient keeps, above 0; the paper searched 0.1, 0.01 and 0.001."""


class AGCConfig(Settings):
    """Clip the gradient's norm relative to the weight's, by output unit (`AGC`)."""

    name: Literal["agc"] = "agc"
    clipping: float = Field(default=_default(AGC, "clipping"), ge=0)
    """The largest norm of a unit's gradient, as a share of the norm of its weights."""
    floor: float = Field(default=_default(AGC, "floor"), ge=0)
    """The norm by which a unit is measured whose weights are smaller."""


class CowClipConfig(Settings):
    """Clip a row's gradient relative to the row and to how often it came up, for tables (`CowClip`)."""

    name: Literal["cow_clip"] = "cow_clip"
    ratio: float = Field(default=_default(CowClip, "ratio"), ge=0)
    """The largest norm of a row's gradient for each time it came up, as a share of the row's norm."""
    floor: float = Field(default=_default(CowClip, "floor"), ge=0)
    """The norm by which a row is measured that is smaller."""


class AdaGCConfig(Settings):
    """Clip each tensor's gradient norm relative to its own past (`AdaGC`)."""

    name: Literal["ada_gc"] = "ada_gc"
    relative: float = Field(default=_default(AdaGC, "relative"), gt=0)
    """How many times its running level a norm may be."""
    decay: float = Field(default=_default(AdaGC, "decay"), ge=0, lt=1)
    """How much of the level is kept from step to step."""
    warmup: int = Field(default=_default(AdaGC, "warmup"), ge=0)
    """Steps in which the joint norm is clipped instead."""
    max_norm: float = Field(default=_default(AdaGC, "max_norm"), gt=0)
    """The limit of the joint norm in the warm-up."""


class ZClipConfig(Settings):
    """Clip the norm of all gradients where it is an outlier of its own past (`ZClip`)."""

    name: Literal["z_clip"] = "z_clip"
    threshold: float = Field(default=_default(ZClip, "threshold"), gt=0)
    """How many standard deviations above the mean a norm may be."""
    decay: float = Field(default=_default(ZClip, "decay"), ge=0, lt=1)
    """How much of mean and variance is kept from step to step."""
    warmup: int = Field(default=_default(ZClip, "warmup"), ge=1)
    """Steps from which mean and variance start."""
    max_norm: float | None = Field(default=None, gt=0)
    """A limit that always holds; none when left out."""


class SpikeClipConfig(Settings):
    """Clip each coordinate of the gradient where it is an outlier of its own past, SPAM's clip (`SpikeClip`)."""

    name: Literal["spike_clip"] = "spike_clip"
    threshold: float = Field(default=_default(SpikeClip, "threshold"), gt=0)
    """How many times its running mean a squared coordinate may be."""
    decay: float = Field(default=_default(SpikeClip, "decay"), ge=0, lt=1)
    """How much of the mean is kept from step to step."""
    warmup: int = Field(default=_default(SpikeClip, "warmup"), ge=0)
    """Steps in which nothing is clipped."""


class SkipSpikesConfig(Settings):
    """Skip a step whose gradient norm is an outlier of the last ones (`SkipSpikes`)."""

    name: Literal["skip_spikes"] = "skip_spikes"
    sigmas: float = Field(default=_default(SkipSpikes, "sigmas"), gt=0)
    """How many standard deviations above the mean is too far."""
    window: int = Field(default=_default(SkipSpikes, "window"), ge=2)
    """How many norms are remembered."""


class ClipUpdatesConfig(Settings):
    """Bound the update of an optimizer that has no Clippy of its own (`ClipUpdates`)."""

    name: Literal["updates"] = "updates"
    variable_relative_threshold: float = Field(default=_default(ClipUpdates, "variable_relative_threshold"), ge=0)
    """How far a weight may move in one step, as a fraction of its own size."""
    absolute_threshold: float = Field(default=_default(ClipUpdates, "absolute_threshold"), ge=0)
    """How far any weight may move in one step, added to the relative part."""
    granularity: Granularity = _default(ClipUpdates, "granularity")
    """What shares one factor: a tensor, a row, or an output unit."""


ClipConfig = Annotated[
    ClipValueConfig
    | ClipGlobalNormConfig
    | ClipTensorNormConfig
    | AGCConfig
    | CowClipConfig
    | AdaGCConfig
    | ZClipConfig
    | SpikeClipConfig
    | SkipSpikesConfig
    | ClipUpdatesConfig,
    Field(discriminator="name"),
]
"""What is done to gradients before an optimizer's step, or to the step; told apart by `name`."""

RULES: dict[str, type[Rule]] = {
    "value": ClipValue,
    "global_norm": ClipGlobalNorm,
    "tensor_norm": ClipTensorNorm,
    "agc": AGC,
    "cow_clip": CowClip,
    "ada_gc": AdaGC,
    "z_clip": ZClip,
    "spike_clip": SpikeClip,
    "skip_spikes": SkipSpikes,
}


class _Base(Settings):
    """What every optimizer has."""

    clip: ClipConfig | None = None
    """What is done to its gradients before the step, or to the step; nothing when left out."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class _Clippy(_Base):
    """What Clippy has on every base."""

    granularity: Granularity = _default(ClippyAdagrad, "granularity")
    """What shares one factor: `tensor` (the paper), `row` (for tables), or `unit` (an output unit of a layer)."""
    weight_decay: float = Field(default=_default(ClippyAdagrad, "weight_decay"), ge=0)
    """A weight shrinks by this fraction times the learning rate in each step, inside the bound."""
    quantile: float = Field(default=_default(ClippyAdagrad, "quantile"), ge=0, lt=1)
    """Share of the coordinates that the factor overlooks; they stop at their own bound. For very wide layers."""
    calibration_steps: int = Field(default=_default(ClippyAdagrad, "calibration_steps"), ge=0)
    """After so many steps the bound is scaled to what they needed; 0 for never. Start at a low rate then."""
    calibration_headroom: float = Field(default=_default(ClippyAdagrad, "calibration_headroom"), gt=0)
    """How far above a typical step of the calibration the bound then lies."""

    @model_validator(mode="before")
    @classmethod
    def _take_preset(cls, data: Any) -> Any:
        """A preset sets what is not given."""
        name = data.get("preset") if isinstance(data, Mapping) else None
        return {**PRESETS.get(name, {}), **data} if isinstance(name, str) else data


class ClippyAdagradConfig(_Clippy):
    """Settings of `ClippyAdagrad`, the default for dense parameters."""

    name: Literal["clippy_adagrad"] = "clippy_adagrad"
    preset: Literal["paper", "authors_code"] | None = None
    """Sets what is not given: the paper's thresholds (the default), or all defaults of the authors' code."""
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
    half_life: float | None = Field(default=None, gt=0)
    """Steps in which the accumulator fades to a half, but not below its start; never when left out."""
    decay_every: int = Field(default=_default(ClippyAdagrad, "decay_every"), ge=0)
    """Multiply the accumulator by `decay_factor` every so many steps; 0 for never. Instead of `half_life`."""
    decay_factor: float = Field(default=_default(ClippyAdagrad, "decay_factor"), gt=0, le=1)
    """See `decay_every`."""


class ClippyAdamConfig(_Clippy):
    """Settings of `ClippyAdam`, for dense parameters and, on the touched rows, for tables."""

    name: Literal["clippy_adam"] = "clippy_adam"
    preset: Literal["adam", "paper"] | None = None
    """Sets what is not given: the thresholds for Adam (the default), or the paper's."""
    lr: float = Field(default=_default(ClippyAdam, "lr"), ge=0)
    """Learning rate."""
    betas: tuple[Beta, Beta] = _default(ClippyAdam, "betas")
    """How much of the running mean of g, and of g^2, is kept from step to step; each in [0, 1)."""
    eps: float = Field(default=_default(ClippyAdam, "eps"), gt=0)
    """Added to the root of the second moment, above 0."""
    variable_relative_threshold: float = Field(default=_default(ClippyAdam, "variable_relative_threshold"), ge=0)
    """How far a weight may move in one step, as a fraction of its own size."""
    absolute_threshold: float = Field(default=_default(ClippyAdam, "absolute_threshold"), ge=0)
    """How far any weight may move in one step, added to the relative part; in units of the weight."""
    clip_moments: bool = _default(ClippyAdam, "clip_moments")
    """Let the moments take in the gradient clipped like the step."""


class ClippyAdamWConfig(ClippyAdamConfig):
    """Settings of `ClippyAdamW`: Clippy on Adam with a weight decay by default."""

    name: Literal["clippy_adamw"] = "clippy_adamw"  # type: ignore[assignment]  # another member of the union
    weight_decay: float = Field(default=_default(ClippyAdamW, "weight_decay"), ge=0)
    """A weight shrinks by this fraction times the learning rate in each step, inside the bound."""


class AdagradConfig(_Base):
    """Settings of `torch.optim.Adagrad`, for dense parameters and for tables."""

    name: Literal["adagrad"] = "adagrad"
    lr: float = Field(default=_default(torch.optim.Adagrad, "lr"), ge=0)
    """Learning rate."""
    initial_accumulator_value: float = Field(default=_default(ClippyAdagrad, "initial_accumulator_value"), ge=0)
    """The sum of squared gradients before the first step: the paper's 0.1, where torch starts from 0."""
    eps: float = Field(default=_default(torch.optim.Adagrad, "eps"), gt=0)
    """Added to the root of the accumulator, above 0."""


class RowWiseAdagradConfig(_Base):
    """Settings of `RowWiseAdagrad`, for tables: one accumulator for each row."""

    name: Literal["rowwise_adagrad"] = "rowwise_adagrad"
    lr: float = Field(default=_default(RowWiseAdagrad, "lr"), ge=0)
    """Learning rate."""
    initial_accumulator_value: float = Field(default=_default(RowWiseAdagrad, "initial_accumulator_value"), ge=0)
    """The sum of a row's mean squared gradients before the first step."""
    eps: float = Field(default=_default(RowWiseAdagrad, "eps"), gt=0)
    """Added to the root of the accumulator, above 0."""


class AdamConfig(_Base):
    """Settings of `torch.optim.Adam`, for dense parameters."""

    name: Literal["adam"] = "adam"
    lr: float = Field(default=_default(torch.optim.Adam, "lr"), ge=0)
    """Learning rate."""
    betas: tuple[Beta, Beta] = _default(torch.optim.Adam, "betas")
    """How much of the running mean of g, and of g^2, is kept from step to step; each in [0, 1)."""
    eps: float = Field(default=_default(torch.optim.Adam, "eps"), gt=0)
    """Added to the root of the second moment, above 0."""


class AdamWConfig(_Base):
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


class SGDConfig(_Base):
    """Settings of `torch.optim.SGD`, for dense parameters and, without momentum, for tables."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(default=_default(torch.optim.SGD, "lr"), ge=0)
    """Learning rate."""
    momentum: Beta = _default(torch.optim.SGD, "momentum")
    """How much of the last update is kept, in [0, 1)."""


class LambAdagradConfig(_Base):
    """Settings of `LambAdagrad`: Adagrad whose step has the norm of the weights, times the rate."""

    name: Literal["lamb_adagrad"] = "lamb_adagrad"
    lr: float = Field(default=0.01, ge=0)
    """Learning rate: the step's norm as a share of the weights' norm. The paper searched 0.1, 0.01 and 0.001."""
    initial_accumulator_value: float = Field(default=_default(LambAdagrad, "initial_accumulator_value"), ge=0)
    """The sum of squared gradients before the first step."""
    eps: float = Field(default=_default(LambAdagrad, "eps"), gt=0)
    """Added to the accumulator under the root, above 0."""
    weight_decay: float = Field(default=_default(LambAdagrad, "weight_decay"), ge=0)
    """Added to the step as a fraction of the weight, before the step is scaled."""


class LambConfig(_Base):
    """Settings of `Lamb`: Adam whose step has the norm of the weights, times the rate."""

    name: Literal["lamb"] = "lamb"
    lr: float = Field(default=_default(Lamb, "lr"), ge=0)
    """Learning rate: the step's norm as a share of the weights' norm."""
    betas: tuple[Beta, Beta] = _default(Lamb, "betas")
    """How much of the running mean of g, and of g^2, is kept from step to step; each in [0, 1)."""
    eps: float = Field(default=_default(Lamb, "eps"), gt=0)
    """Added to the root of the second moment, above 0."""
    weight_decay: float = Field(default=_default(Lamb, "weight_decay"), ge=0)
    """Added to the step as a fraction of the weight, before the step is scaled."""


class StableAdamWConfig(_Base):
    """Settings of `StableAdamW`: AdamW whose rate falls where squared gradients exceed their running mean."""

    name: Literal["stable_adamw"] = "stable_adamw"
    lr: float = Field(default=_default(StableAdamW, "lr"), ge=0)
    """Learning rate."""
    betas: tuple[Beta, Beta] = _default(StableAdamW, "betas")
    """How much of the running mean of g, and of g^2, is kept from step to step; each in [0, 1)."""
    eps: float = Field(default=_default(StableAdamW, "eps"), gt=0)
    """Added to the root of the second moment, above 0."""
    weight_decay: float = Field(default=_default(StableAdamW, "weight_decay"), ge=0)
    """A weight shrinks by this fraction times the learning rate in each step."""


OptimizerConfig = Annotated[
    ClippyAdagradConfig
    | ClippyAdamConfig
    | ClippyAdamWConfig
    | AdagradConfig
    | RowWiseAdagradConfig
    | AdamConfig
    | AdamWConfig
    | SGDConfig
    | LambAdagradConfig
    | LambConfig
    | StableAdamWConfig,
    Field(discriminator="name"),
]
"""The settings of one optimizer, told apart by `name`; an option that this optimizer does not have is refused."""

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "clippy_adagrad": ClippyAdagrad,
    "clippy_adam": ClippyAdam,
    "clippy_adamw": ClippyAdamW,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "lamb_adagrad": LambAdagrad,
    "lamb": Lamb,
    "stable_adamw": StableAdamW,
}
