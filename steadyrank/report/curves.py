"""Pictures of what was learned: the metrics of each window, the training loss, and the speed."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from .plots import GREY, PALETTE, Panel, Readings, curves, line, new_figure, skip


def auc_panel(readings: Readings) -> Panel:
    """AUC by window of each binary task, with the baseline dashed and what is attainable dotted."""
    panel = Panel(
        "auc",
        "AUC, scored before learning",
        "Each window is scored first and learned from afterwards. 0.5 is chance; higher is better. "
        "A fall to 0.5 that stays is a full divergence, a dip that recovers a micro-divergence.",
    )
    return _window_panel(panel, readings, "auc")


def error_panel(readings: Readings) -> Panel:
    """RMSE of each regression over that of a constant (or RMSE as it is), with baseline and attainable."""
    panel = Panel(
        "error",
        "Normalised RMSE, scored before learning",
        "RMSE divided by that of the window's own mean: 1 is no better than a constant, lower is better.",
    )
    if readings.series("windows", "normalised_rmse"):
        return _window_panel(panel, readings, "normalised_rmse", rule=1.0)
    plain = replace(panel, title="RMSE, scored before learning", how="In the unit that is learned; lower is better.")
    return _window_panel(plain, readings, "rmse")


def entropy_panel(readings: Readings) -> Panel:
    """Normalised entropy by window of each binary task."""
    panel = Panel(
        "entropy",
        "Normalised entropy",
        "Log loss divided by that of the window's own rate: 1 is no better than a constant, lower is better. "
        "It shows over-confidence, which AUC does not see.",
    )
    return _window_panel(panel, readings, "normalised_entropy", rule=1.0, twins=False)


def calibration_panel(readings: Readings) -> Panel:
    """Calibration by window of each binary task."""
    panel = Panel(
        "calibration",
        "Calibration",
        "Sum of predictions over sum of labels: 1 is right, above 1 predicts too much.",
    )
    return _window_panel(panel, readings, "calibration", rule=1.0, twins=False)


def loss_panel(readings: Readings) -> Panel:
    """Loss of each task over the steps, its largest between two readings, and steps whose loss was not finite."""
    panel = Panel(
        "loss",
        "Training loss",
        "Loss of each batch before its update, weighted by task in the total. A jump shows where a disturbance began; "
        "the dotted line is the largest since the reading before, which a mean would hide.",
    )
    if not readings.series("steps", "loss_max"):
        panel = replace(panel, how=panel.how.partition("; the dotted")[0] + ".")
    panel = curves(panel, readings, "steps", "loss", companions={"largest": readings.series("steps", "loss_max")})
    series = readings.series("steps", "loss")
    if panel.figure is None:
        return panel
    broken = ~np.all([np.isfinite(values) for values in series.values()], axis=0)
    if broken.any():
        at = np.flatnonzero(broken)
        top = np.nanmax([values[np.isfinite(values)].max() for values in series.values()])
        steps = readings.table("steps")["step"][at]
        marks = line(readings, steps, np.full(len(at), top), ["not finite"], PALETTE[5], symbol="x")
        panel.figure.add_trace(marks.update(mode="markers", marker_size=9))
    return panel


def speed_panel(readings: Readings) -> Panel:
    """Rows per second over the steps."""
    panel = Panel("speed", "Rows per second", "Rows trained on per second of wall time, from one reading to the next.")
    steps, name = readings.table("steps"), "speed/rows_per_s"
    if name not in steps or not np.isfinite(steps[name]).any():
        return skip(panel, steps, "steps", name)
    figure = new_figure()
    figure.add_trace(line(readings, steps["step"], steps[name], ["rows per second"], GREY))
    figure.update_layout(showlegend=False)
    figure.update_yaxes(rangemode="tozero")
    return replace(panel, figure=figure)


def _window_panel(
    panel: Panel, readings: Readings, metric: str, *, rule: float | None = None, twins: bool = True
) -> Panel:
    """Draw one metric of every task over the windows; `rule` is where it is no better than nothing."""
    companions = {kind: _twins(readings, kind, metric) for kind in ("baseline", "attainable") if twins}
    reason = "no task of that kind, or no window was finished"
    return curves(panel, readings, "windows", metric, companions=companions, rule=rule, reason=reason)


def _twins(readings: Readings, kind: str, metric: str) -> dict[str, np.ndarray]:
    """Return the baseline's or attainable metric of each task; a normalised RMSE is had from the plain ones."""
    if metric != "normalised_rmse":
        return readings.series("windows", f"{kind}_{metric}")
    rmse, normalised = readings.series("windows", "rmse"), readings.series("windows", metric)
    others = readings.series("windows", f"{kind}_rmse")
    return {n: _rescale(v, rmse[n], normalised[n]) for n, v in others.items() if n in rmse and n in normalised}


def _rescale(
    other: Float[np.ndarray, " rows"], rmse: Float[np.ndarray, " rows"], normalised: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """Return `other * normalised / rmse`: another RMSE over that of the same constant; NaN where rmse is 0."""
    rescaled: np.ndarray = other * normalised / np.where(rmse > 0, rmse, np.nan)
    return rescaled
