"""For tests, users' own too: promises that parts must hold, slow float64 twins, a tiny problem.

Nothing in the package imports this.
"""

from .monitors import Monitor as Monitor
from .monitors import TinyTasks as TinyTasks
from .monitors import check_monitor as check_monitor
from .optimizers import ClippyAdamTwin as ClippyAdamTwin
from .optimizers import ClippyTwin as ClippyTwin
from .optimizers import TinyProblem as TinyProblem
from .optimizers import check_optimizer as check_optimizer
from .optimizers import find_factor_twin as find_factor_twin
from .optimizers import forbid_host_sync as forbid_host_sync
from .optimizers import step_clippy_adam_twin as step_clippy_adam_twin
from .optimizers import step_clippy_twin as step_clippy_twin
from .optimizers import step_rowwise_twin as step_rowwise_twin
