"""Clippy, what it is compared with, and how optimizers are built by name."""

from .baselines import RowWiseAdagrad as RowWiseAdagrad
from .bounded import CLIP_FACTOR as CLIP_FACTOR
from .bounded import BoundedOptimizer as BoundedOptimizer
from .build import AdagradConfig as AdagradConfig
from .build import AdamConfig as AdamConfig
from .build import AdamWConfig as AdamWConfig
from .build import ClippyAdagradConfig as ClippyAdagradConfig
from .build import OptimizerConfig as OptimizerConfig
from .build import RowWiseAdagradConfig as RowWiseAdagradConfig
from .build import SGDConfig as SGDConfig
from .build import build_optimizer as build_optimizer
from .build import split_parameters as split_parameters
from .clippy import PRESETS as PRESETS
from .clippy import ClippyAdagrad as ClippyAdagrad
from .clippy import ClippyAdam as ClippyAdam
from .clippy import ClippyAdamW as ClippyAdamW
from .guarded import BAD_STEPS as BAD_STEPS
from .guarded import STEP as STEP
from .guarded import SUM as SUM
from .guarded import GuardedOptimizer as GuardedOptimizer
