"""steadyrank: train multitask ranking models that do not blow up.

These names are for your own training loop; reading logs is in `steadyrank.data`, whole runs in `steadyrank.config`.
"""

from .checkpoints import Checkpoints as Checkpoints
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import DataError as DataError
from .errors import DivergenceError as DivergenceError
from .errors import SteadyRankError as SteadyRankError
from .evaluate import evaluate as evaluate
from .losses import multitask_loss as multitask_loss
from .metrics import ProgressiveMetrics as ProgressiveMetrics
from .metrics import TaskMetrics as TaskMetrics
from .models.ranker import ModelConfig as ModelConfig
from .models.ranker import Ranker as Ranker
from .models.ranker import paper_model as paper_model
from .monitors.watch import Watch as Watch
from .monitors.watch import WatchConfig as WatchConfig
from .optim.baselines import RowWiseAdagrad as RowWiseAdagrad
from .optim.clippy import PRESETS as PRESETS
from .optim.clippy import ClippyAdagrad as ClippyAdagrad
from .optim.clippy import ClippyAdam as ClippyAdam
from .optim.clippy import ClippyAdamW as ClippyAdamW
from .optim.rivals import Lamb as Lamb
from .optim.rivals import LambAdagrad as LambAdagrad
from .optim.rivals import StableAdamW as StableAdamW
from .optim.wrap import ClipGradients as ClipGradients
from .optim.wrap import ClipUpdates as ClipUpdates
from .recovery import Damper as Damper
from .recovery import Ladder as Ladder
from .recovery import RecoveryConfig as RecoveryConfig
from .runs import RunFolder as RunFolder
from .schema import Batch as Batch
from .schema import IdFeature as IdFeature
from .schema import IdsFeature as IdsFeature
from .schema import NumberFeature as NumberFeature
from .schema import PositionFeature as PositionFeature
from .schema import Schema as Schema
from .schema import Task as Task
from .snapshots import SnapshotRing as SnapshotRing
from .train import fit as fit
from .train import guard as guard
from .train import train_step as train_step

__version__ = "0.1.0"
