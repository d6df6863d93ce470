"""The processes of a run: who they are, what they tell one another, which one is missing and which one is slow."""

from .group import ALONE as ALONE
from .group import Ranks as Ranks
from .group import join as join
from .group import leave as leave
from .group import local_rank as local_rank
from .group import local_size as local_size
from .group import started_together as started_together
