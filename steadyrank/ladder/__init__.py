"""The laboratory: how stable is a model, and what makes it stable?"""

from .grid import Cell as Cell
from .grid import Ladder as Ladder
from .grid import LadderConfig as LadderConfig
from .grid import load_ladder as load_ladder
from .laboratory import Found as Found
from .laboratory import climb as climb
from .live import Board as Board
from .live import showing as showing
from .outcomes import Outcome as Outcome
from .outcomes import read_outcomes as read_outcomes
from .page import write_page as write_page
from .tables import print_found as print_found
