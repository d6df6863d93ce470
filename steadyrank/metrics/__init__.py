"""AUC, GAUC, log loss, normalised entropy, calibration, RMSE, MAE: pure functions, and sums by task over a stream."""

from .functions import TaskKind as TaskKind
from .functions import as_scores as as_scores
from .functions import auc as auc
from .functions import calibration as calibration
from .functions import gauc as gauc
from .functions import iso_day as iso_day
from .functions import log_loss as log_loss
from .functions import mae as mae
from .functions import normalised_entropy as normalised_entropy
from .functions import normalised_rmse as normalised_rmse
from .functions import rmse as rmse
from .functions import share_attainable as share_attainable
from .streams import CAPACITY as CAPACITY
from .streams import DAY_US as DAY_US
from .streams import Metrics as Metrics
from .streams import ProgressiveMetrics as ProgressiveMetrics
from .streams import ScoredRows as ScoredRows
from .streams import TaskMetrics as TaskMetrics
from .streams import Whole as Whole
from .streams import compute_all as compute_all
from .streams import deal_states as deal_states
from .streams import rank_of as rank_of
