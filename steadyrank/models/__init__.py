"""Ranking models: features to logits."""

from .cross import CrossConfig as CrossConfig
from .ranker import BothLogits as BothLogits
from .ranker import ModelConfig as ModelConfig
from .ranker import ModelSummary as ModelSummary
from .ranker import PositionConfig as PositionConfig
from .ranker import Ranker as Ranker
from .ranker import paper_model as paper_model
from .trunks import MMoEConfig as MMoEConfig
from .trunks import PLEConfig as PLEConfig
from .trunks import SharedBottomConfig as SharedBottomConfig
