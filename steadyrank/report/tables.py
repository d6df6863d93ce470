"""Pictures of the embedding tables: their largest update, and how many directions their rows still use."""

from typing import Any

import numpy as np

from .layers import SIZE_HEAT
from .plots import Panel, Readings, curves, heat_map

_LAST = (
    "rows_touched",
    "row_update_max",
    "effective_rank",
    "row_norm_max",
    "row_norm_max_row",
    "row_norm_max_age_steps",
)


def row_update_panel(readings: Readings) -> Panel:
    """The largest update of any row of each table, as a heat map."""
    panel = Panel(
        "row_updates",
        "Largest update of a row, by table",
        "How far the row went that went furthest in each table. A dark cell is a row that was thrown: "
        "a rare id, or a burst of one.",
    )
    return heat_map(panel, readings, "dynamics", "row_update_max", SIZE_HEAT)


def rank_panel(readings: Readings) -> Panel:
    """The effective rank of a sample of rows of each table."""
    panel = Panel(
        "ranks",
        "Effective rank of the tables",
        "How many directions a sample of a table's rows makes use of. A fall says that rows grow alike.",
    )
    return curves(panel, readings, "dynamics", "effective_rank")


def last_of_tables(readings: Readings) -> list[dict[str, Any]]:
    """Return, for each embedding table, its last finite reading of each kind; None where it has none.

    >>> dynamics = {"step": np.array([20, 40]), "rows_touched/item": np.array([7.0, np.nan])}
    >>> last_of_tables(Readings({"dynamics": dynamics}, ["click"]))[0]["rows_touched"]
    7.0
    """
    found = {reading: readings.series("dynamics", reading) for reading in _LAST}
    names = dict.fromkeys(name for series in found.values() for name in series)
    return [{"name": name} | {reading: _last(series.get(name)) for reading, series in found.items()} for name in names]


def _last(values: np.ndarray | None) -> float | None:
    return None if values is None else float(values[np.isfinite(values)][-1])
