"""Pictures of the tasks against each other, of the distance to the edge, and of the experts."""

from .layers import COSINE_HEAT, SHARE_HEAT
from .plots import Panel, Readings, curves, heat_map

_ONE_TASK = "a run with one task, or one whose tasks were not watched"


def share_panel(readings: Readings) -> Panel:
    """The share of the shared update that each task causes."""
    panel = Panel(
        "task_share",
        "Who moves the shared layers",
        "Share of the update of the shared layers that each task causes. One task that takes nearly all of it "
        "drags the others along.",
    )
    return curves(panel, readings, "tasks", "task_share_frac", reason=_ONE_TASK)


def gradient_panel(readings: Readings) -> Panel:
    """Each task's gradient norm at the shared representation."""
    panel = Panel(
        "task_gradient",
        "Gradient of each task at the shared layers",
        "Norm of each task's own gradient where the tasks part. The line that jumps first is the task that leads.",
    )
    return curves(panel, readings, "tasks", "task_gradient_norm", reason=_ONE_TASK)


def cosine_panel(readings: Readings) -> Panel:
    """The cosine between the gradients of each pair of tasks, as a heat map."""
    panel = Panel(
        "task_cosine",
        "Conflict between tasks",
        "Cosine between two tasks' gradients: blue pulls together, red against each other, no colour is indifferent; "
        "the least of each stretch.",
    )
    return heat_map(panel, readings, "tasks", "task_cosine", COSINE_HEAT, _ONE_TASK)


def saturation_panel(readings: Readings) -> Panel:
    """The share of rows whose logit lies where the sigmoid is flat."""
    panel = Panel(
        "saturation",
        "Saturated logits",
        "Share of rows whose logit lies where the sigmoid is flat. A rise says that a task grows over-confident.",
    )
    return curves(panel, readings, "dynamics", "saturated_frac")


def logit_panel(readings: Readings) -> Panel:
    """The lowest and the highest logit of each task."""
    panel = Panel(
        "logits",
        "Range of the logits",
        "Highest and lowest output of each task before the sigmoid. A range that widens in a few steps comes before "
        "a loss that is not finite.",
    )
    lowest = readings.series("dynamics", "logit_low")
    return curves(panel, readings, "dynamics", "logit_high", companions={"lowest": lowest})


def headroom_panel(readings: Readings) -> Panel:
    """How many times larger the step could be before the loss rises."""
    panel = Panel(
        "headroom",
        "Headroom",
        "How many times larger the step could have been before the loss rises. Below 1 the steps already overshoot; "
        "dashed is the same on the next window before it is trained on. A gap: no end was found.",
    )
    following = readings.series("curvature", "headroom_next")
    return curves(panel, readings, "curvature", "headroom", companions={"next window": following}, rule=1.0)


def sharpness_panel(readings: Readings) -> Panel:
    """Critical sharpness along the update."""
    panel = Panel(
        "sharpness",
        "Critical sharpness",
        "How curved the loss is along the step that was taken: 2 over the smallest step that would raise it. "
        "A climb is the edge coming closer.",
    )
    return curves(panel, readings, "curvature", "critical_sharpness")


def load_panel(readings: Readings) -> Panel:
    """The share of each gate that goes to each expert, as a heat map."""
    panel = Panel(
        "experts",
        "Load of the experts",
        "Share of each gate's weight that goes to each expert; one dark row beside empty ones is a gate that has "
        "collapsed onto one expert.",
    )
    return heat_map(panel, readings, "dynamics", "expert_load_frac", SHARE_HEAT, "the model has no gates")


def gate_panel(readings: Readings) -> Panel:
    """The entropy of each gate."""
    panel = Panel(
        "gates",
        "Entropy of the gates",
        "1: the gate weighs all experts alike; 0: it has chosen one.",
    )
    return curves(panel, readings, "dynamics", "gate_entropy_frac", reason="the model has no gates")
