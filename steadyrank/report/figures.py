"""All pictures of a run in the order in which a person wants them; each skips itself, saying so, without readings.

Every figure has the step on its x axis, so that a dip in one can be looked up in the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..runs import RunFolder
from .curves import auc_panel, calibration_panel, entropy_panel, error_panel, loss_panel, speed_panel
from .layers import clip_map_panel, clip_panel, dead_map_panel, update_map_panel
from .moment import Moment, moment_panel
from .plots import Columns, Panel, Readings, merge_steps, share_axis
from .records import read_readings
from .tables import rank_panel, row_update_panel
from .tasks import (
    cosine_panel,
    gate_panel,
    gradient_panel,
    headroom_panel,
    load_panel,
    logit_panel,
    saturation_panel,
    share_panel,
    sharpness_panel,
)
from .timeline import Episode

TABLES = ("steps", "windows", "dynamics", "tasks", "curvature")
"""The tables of readings that are drawn."""

SECTIONS: dict[str, tuple[Callable[[Readings], Panel], ...]] = {
    "What was learned": (auc_panel, error_panel, loss_panel, entropy_panel, calibration_panel),
    "Around the moment": (),
    "Layer by layer": (clip_panel, update_map_panel, clip_map_panel, dead_map_panel),
    "Task against task": (share_panel, gradient_panel, cosine_panel, logit_panel, saturation_panel),
    "How near the edge": (headroom_panel, sharpness_panel),
    "Experts": (gate_panel, load_panel),
    "Embedding tables": (rank_panel, row_update_panel),
    "Speed": (speed_panel,),
}
_SHADES = {"full_divergence": "rgba(190,45,40,0.13)", "micro_divergence": "rgba(200,130,20,0.16)"}


def read_tables(folder: RunFolder) -> dict[str, Columns]:
    """Return a run's tables of readings, with one row for each step."""
    return {name: merge_steps(read_readings(folder, name)) for name in TABLES}


@dataclass(frozen=True)
class Section:
    """Figures under one heading."""

    title: str
    panels: Sequence[Panel]


def find_tasks(steps: Columns, windows: Columns) -> list[str]:
    """Return the tasks that the readings name, in the order of their first reading.

    >>> import numpy as np
    >>> find_tasks({"loss/total": np.ones(1), "loss/like": np.ones(1)}, {"auc/click": np.ones(1)})
    ['like', 'click']
    """
    prefixes = ("loss/", "auc/", "rmse/", "log_loss/", "calibration/")
    names = [n.partition("/")[2] for table in (steps, windows) for n in table if n.startswith(prefixes)]
    return [name for name in dict.fromkeys(names) if name != "total"]


def draw(
    readings: Readings,
    *,
    marks: Sequence[int] = (),
    episodes: Sequence[Episode] = (),
    moment: Moment | None = None,
) -> list[Section]:
    """Return every panel by section, on one common x range.

    Args:
        readings: What the run wrote down.
        marks: Steps at which a thin line stands in every figure.
        episodes: Stretches that are shaded in every figure.
        moment: Where the paper's figure looks.
    """
    sections = [Section(title, [make(readings) for make in makers]) for title, makers in SECTIONS.items()]
    sections[1] = Section(sections[1].title, [moment_panel(readings, moment)])
    panels = [panel for section in sections for panel in section.panels]
    share_axis([panel for panel in panels if panel.key != "moment"], list(readings.tables.values()))
    shapes = [*_shade(episodes, readings.last_step()), *_rules(marks)]
    for figure in (panel.figure for panel in panels if panel.figure is not None):
        figure.update_layout(shapes=[*figure.layout.shapes, *shapes])
    return sections


def _rules(steps: Sequence[int]) -> list[dict[str, Any]]:
    line = {"width": 1, "dash": "dot"}
    return [
        {"type": "line", "x0": step, "x1": step, "yref": "paper", "y0": 0, "y1": 1, "line": line}
        for step in dict.fromkeys(steps)
    ]


def _shade(episodes: Sequence[Episode], end: int) -> list[dict[str, Any]]:
    """Return one rectangle for each stretch, even where several tasks share it."""
    stretches = dict.fromkeys((e.first, end if e.last is None else e.last, e.verdict) for e in episodes)
    return [
        {
            **{"type": "rect", "x0": first, "x1": last, "yref": "paper", "y0": 0, "y1": 1, "layer": "below"},
            **{"fillcolor": _SHADES[verdict], "line": {"width": 0}},
        }
        for first, last, verdict in stretches
    ]
