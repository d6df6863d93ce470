"""The paper's figure: one layer when things went wrong, and what each clipping method would have done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from plotly.subplots import make_subplots

from .causes import layer_name
from .plots import GREY, PALETTE, Panel, Readings, choose_scale, line, new_figure, skip, text

LEAST_FACTOR = 1e-6
BEFORE, AFTER = 60, 30
"""So many readings before and after the moment are drawn."""
_METHODS = {"GC": PALETTE[0], "AGC": PALETTE[2], "LAMB": PALETTE[3], "Clippy": PALETTE[1]}
_NORMS = {
    "gradient_norm": "norm of the gradient",
    "gradient_over_weight": "gradient over weight",
    "direction_max": "largest coordinate of the step's direction, ‖r‖∞",
}
_FACTOR = "factor that each method would have given"


@dataclass(frozen=True)
class Moment:
    """Where to look closely: a step, a layer and a task; None or "" where nothing names one."""

    step: int | None = None
    layer: str = ""
    task: str = ""


def find_moment(
    events: Sequence[Mapping[str, Any]], causes: Sequence[Mapping[str, Any]], readings: Readings
) -> Moment | None:
    """Return the step and layer that the run itself points at, None where it has no readings of any layer.

    The first that names a layer decides: cause reports, then alarms, then notices. Where none does, it is the layer to
    which Clippy would have given the least factor, at that step; the step of the first verdict goes before that one.
    """
    layers = readings.series("dynamics", "gradient_norm")
    if not layers:
        return None
    warnings = [event for event in events if event.get("kind") == "warning"]
    alarms = [event for event in warnings if event.get("level") == "alarm"]
    for one in (*causes, *alarms, *warnings):
        if (layer := layer_name(one)) in layers:
            tasks = [str(each["task"]) for each in (one, *causes) if each.get("task") and each["step"] == one["step"]]
            return Moment(int(one["step"]), layer, tasks[0] if tasks else "")
    bad = [e for e in events if e.get("kind") == "verdict" and e.get("verdict") != "recovered"]
    bad.sort(key=lambda event: event.get("verdict") != "full_divergence")
    task, step = (str(bad[0].get("task") or ""), int(bad[0].get("since", bad[0]["step"]))) if bad else ("", None)
    factors = {name: v for name, v in readings.series("dynamics", "factor_clippy").items() if name in layers}
    if not factors:
        return Moment(step, next(iter(layers)), task)
    layer = min(factors, key=lambda name: np.nanmin(factors[name]))
    lowest = int(readings.table("dynamics")["step"][np.nanargmin(factors[layer])])
    return Moment(lowest if step is None else step, layer, task)


def moment_panel(readings: Readings, moment: Moment | None) -> Panel:
    """Loss, norms and the factor of each method, one above the other, around the moment."""
    panel = Panel("moment", "One layer around the moment", _HOW, wide=True)
    dynamics = readings.table("dynamics")
    if moment is None:
        return skip(panel, dynamics, "dynamics", "gradient_norm")
    where = f"{moment.layer} around step {moment.step:,}" if moment.step is not None else moment.layer
    first, last = _window(dynamics["step"], moment.step)
    rows = [(label, {label: _column(readings, name, moment.layer)}) for name, label in _NORMS.items()]
    rows = [_loss(readings, moment.task), *rows, (_FACTOR, _factors(readings, moment.layer))]
    rows = [(label, lines) for label, lines in rows if any(len(steps) for steps, _ in lines.values())]
    figure = make_subplots(
        len(rows), 1, shared_xaxes=True, vertical_spacing=0.055, subplot_titles=[text(label) for label, _ in rows]
    )
    new_figure(figure, height=130 * len(rows) + 90)
    for place, (label, lines) in enumerate(rows, start=1):
        drawn = []
        for name, (steps, values) in lines.items():
            near = (steps >= first) & (steps <= last)
            if np.isfinite(values[near]).any():
                dash = "dash" if name == "in use" else "solid"
                colour = _METHODS.get(name, GREY if label == _FACTOR else PALETTE[7])
                trace = line(readings, steps[near], values[near], [name], colour, dash=dash).update(mode="lines")
                if label != _FACTOR:
                    trace.update(showlegend=False, meta=None)
                figure.add_trace(trace, row=place, col=1)
                drawn.append(values[near])
        if drawn:
            choose_scale(figure, np.concatenate(drawn), row=place, col=1)
    figure.for_each_yaxis(lambda axis: axis.update(dtick=1 if axis.type == "log" else None, nticks=4))
    figure.update_xaxes(title_text="", showgrid=True)
    figure.update_xaxes(title_text="step", row=len(rows), col=1)
    figure.update_annotations(font_size=12, x=0, xanchor="left")
    figure.update_xaxes(range=[first, last])
    figure.update_layout(margin_t=26, legend={"y": -0.08, "yanchor": "top"})
    return replace(panel, title=f"One layer around the moment: {where}", figure=figure)


_HOW = (
    "The paper's figure, for the layer that was blamed first (or clipped most): its gradient, gradient over weight and "
    "largest coordinate, and the factor by which each method would have shrunk this very step: 1 leaves it as it is. "
    "A method that is late, or that shrinks all steps alike, does not see the one that hurts."
)


def _window(steps: np.ndarray, step: int | None) -> tuple[int, int]:
    """Return the first and last step to draw: so many readings around the moment, or all of them."""
    if step is None:
        return int(steps[0]), int(steps[-1])
    place = int(np.searchsorted(steps, step))
    return int(steps[max(place - BEFORE, 0)]), int(steps[min(place + AFTER, len(steps) - 1)])


def _column(readings: Readings, reading: str, layer: str) -> tuple[np.ndarray, np.ndarray]:
    columns = readings.table("dynamics")
    name = f"{reading}/{layer}"
    return (columns["step"], columns[name]) if name in columns else (np.zeros(0, np.int64), np.zeros(0))


def _loss(readings: Readings, task: str) -> tuple[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return the loss of the blamed task, of all together where none is blamed."""
    losses = readings.series("steps", "loss")
    name = task if task in losses else "total"
    label = f"loss of {name}" if name != "total" else "loss, all tasks"
    return label, {label: (readings.table("steps")["step"], losses[name])} if name in losses else {}


def _factors(readings: Readings, layer: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the factor that each method would have given, and that of the optimizer in use."""
    found = {}
    for method in _METHODS:
        steps, factors = _column(readings, f"factor_{method.lower()}", layer)
        found[method] = (steps, np.maximum(factors, LEAST_FACTOR))  # none is 0 on a logarithmic scale
    used = readings.series("steps", "clip_factor")
    if layer in used:
        found["in use"] = (readings.table("steps")["step"], used[layer])
    return found
