"""Pictures of the layers: how far each was moved, how much it was held back, and what died in it."""

from dataclasses import replace

import numpy as np

from .plots import GREY, SYMBOLS, WIDE_SCALE, Heat, Panel, Readings, heat_map, line, new_figure, skip

CLIPPED = "#B85C0A"
# What is as it should be is nearly the page's own colour, so that only trouble is seen.
_ORANGE = (("#7a1f05", "#d55e00", "#f3c38b", "#eceff3"), ("#ffd9a8", "#f58a2c", "#7a3d10", "#232932"))
_BLUE = (("#eceff3", "#9ecae8", "#2c7fb8", "#08306b"), ("#232932", "#1f5f8f", "#4fa8de", "#d6efff"))
_VIOLET = (("#eceff3", "#c9b3ea", "#8353c4", "#3c1078"), ("#232932", "#56398a", "#9d74dd", "#ecdcff"))
_BALANCE = (("#b3261e", "#eceff3", "#0060a8"), ("#ff8f85", "#232932", "#7cc0f5"))

CLIP_HEAT = Heat(*_ORANGE, unit="factor", least=True, ends=(0.0, 1.0), scale="auto")
UPDATE_HEAT = Heat(*_BLUE, unit="update over weight", ends=(1e-4, 1.0), scale="log", relative=True)
SHARE_HEAT = Heat(*_VIOLET, unit="share", ends=(0.0, 1.0))
SIZE_HEAT = Heat(*_BLUE, unit="size", scale="log", floor=1e-9, relative=True)
COSINE_HEAT = Heat(*_BALANCE, unit="cosine", least=True, ends=(-1.0, 1.0))

_INERT = "the optimizer clips nothing"


def update_map_panel(readings: Readings) -> Panel:
    """Update over weight of every parameter, as a heat map."""
    panel = Panel(
        "update_map",
        "Update over weight by layer",
        "How far one step moved each parameter, relative to its size; rows in the order of the model, the greatest of "
        "each stretch. Steady training lies around 0.001; a dark streak is a layer being thrown about, "
        "and where the streak begins is where the trouble entered.",
    )
    return heat_map(panel, readings, "dynamics", "update_over_weight", UPDATE_HEAT)


def clip_panel(readings: Readings) -> Panel:
    """Median and minimum of the clip factors over the parameters."""
    panel = Panel(
        "clip",
        "Clip factors",
        "What share of its step a parameter was allowed: 1 is unclipped. A minimum that dives while the median stays "
        "says that few layers are held back; both low says that the setting strangles the run.",
    )
    series = readings.series("steps", "clip_factor")
    if not series:
        return skip(panel, readings.table("steps"), "steps", "clip_factor", _INERT)
    factor_PT = np.stack([np.where(np.isfinite(values), values, np.nan) for values in series.values()])
    kept_T = np.isfinite(factor_PT).any(axis=0)
    steps, factor_PT = readings.table("steps")["step"][kept_T], factor_PT[:, kept_T]
    log = bool(factor_PT[factor_PT >= 0].min(initial=1.0) < 1 / WIDE_SCALE)
    floor = CLIP_HEAT.floor if log else 0.0
    figure = new_figure()
    for name, values, colour, symbol in (
        ("median", np.nanmedian(factor_PT, axis=0), GREY, SYMBOLS[0]),
        ("minimum", np.nanmin(factor_PT, axis=0), CLIPPED, SYMBOLS[1]),
    ):
        figure.add_trace(line(readings, steps, np.maximum(values, floor), [name], colour, symbol=symbol))
    figure.update_yaxes(range=[0, 1.05])
    if log:
        figure.update_yaxes(
            type="log", tickformat="~g", dtick="D2" if np.nanmin(factor_PT) > 1 / 300 else 1, range=None
        )
    return replace(panel, figure=figure)


def clip_map_panel(readings: Readings) -> Panel:
    """Clip factors of every parameter as a heat map; what Clippy would have given where nothing was clipped."""
    panel = Panel(
        "clip_map",
        "Clip factors by layer",
        "The stronger the colour, the more a layer was clipped; each cell holds the least factor of a stretch of "
        "steps, and without colour it is 1.",
    )
    if not readings.series("steps", "clip_factor") and readings.series("dynamics", "factor_clippy"):
        panel = replace(panel, title="The factor that Clippy would have given, by layer")
        panel = replace(panel, how="This optimizer clips nothing. " + panel.how)
        return heat_map(panel, readings, "dynamics", "factor_clippy", CLIP_HEAT)
    return heat_map(panel, readings, "steps", "clip_factor", CLIP_HEAT, _INERT)


def dead_map_panel(readings: Readings) -> Panel:
    """Share of dead units of every activation, as a heat map."""
    panel = Panel(
        "dead_map",
        "Dead units by layer",
        "Share of units that gave zero for every row of a window. A step to the right that stays is what a divergence "
        "leaves behind: dead units get no gradient and seldom come back.",
    )
    return heat_map(panel, readings, "dynamics", "dead_frac", SHARE_HEAT, "no activation that can die was watched")
