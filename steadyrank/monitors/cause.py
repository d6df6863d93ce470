"""What stood behind a bad step: which task, layer, rows and features, and whether it was the data or the state.

All is found in one batch, a memory of usual ones (`Reference`), and what was read in the steps before. Nothing of the
run is changed.

Shapes: B rows, K tasks, T steps, P parameters.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..errors import DataError
from ..schema import Batch, IdFeature, IdsFeature, Schema
from .row_gradients import LossFunction, RowReadings, read_rows
from .unusual import FEWEST, UNUSUAL, Finding, Reference, find_unusual

OUT_OF_RANGE = 7.0
"""Robust standard deviations from which a loss, a gradient or a layer has left its range."""
WORST = 10
"""Rows named."""
READ = 16
"""Usual batches, the newest, that the model is called with, each in K + 1 passes."""
_FLOOR = 0.1  # a spread of logarithms below it is taken for it: a tenth more is never remarkable
_BEGAN = 10  # steps before the bad one that are not taken for usual where its beginning is not known

StateOrData = Literal["data", "state", "both", "neither", "unknown"]
LookUp = Callable[[list[int]], list[dict[str, Any]]]


class Trail(NamedTuple):
    """What was read of every parameter in the steps up to the bad one."""

    measure: str
    """In words, such as `gradient` or `update over weight`."""
    names: Sequence[str]
    """The parameters."""
    steps_T: Int64[np.ndarray, " steps"]
    """Steps of the rows, rising."""
    values_TP: Float[np.ndarray, "steps parameters"]
    """Sizes, 0 or more; infinite where the reading was not finite, NaN where there was none."""


class Layer(NamedTuple):
    """The first parameter that left its range."""

    name: str
    measure: str
    step: int
    score: float
    """In robust standard deviations of the logarithm."""


class Earlier(NamedTuple):
    """The model some steps earlier."""

    steps: int
    """How many steps earlier."""
    state: Mapping[str, Tensor]
    """Weights and buffers by name; what is left out is taken as it is now."""


@dataclass(frozen=True)
class TaskReading:
    """One task at the bad step, beside what is usual for it; where the state is bad, usual on the earlier one."""

    loss: float
    usual_loss: float
    loss_score: float
    """In robust standard deviations of the logarithm of the usual losses."""
    gradient_frac: float
    """Share of the rows' squared gradients."""
    gradient_score: float
    """As `loss_score`, of the gradient."""

    @property
    def score(self) -> float:
        """The larger of both."""
        return max(self.loss_score, self.gradient_score)


@dataclass(frozen=True)
class RowReading:
    """One row of the bad batch."""

    row: int
    """Its number in the log; in the batch where the log's is not known."""
    loss: float
    """Its part of the total loss."""
    gradient: float
    """Norm of its part of the gradient."""
    task: str
    """The task that has most of that."""
    holds: tuple[str, ...]
    """The unusual features that show in it."""
    columns: dict[str, Any] = field(default_factory=dict)
    """All that the log says in this row."""


@dataclass(frozen=True)
class FeatureReading:
    """One unusual feature; `now` and `usual` as in `Finding`."""

    feature: str
    view: str
    score: float
    value: int | float | str | None
    """The value that rose, as it stands in the log; `table row N` where that is not known."""
    now: float
    usual: float
    held_frac: float
    """Share of the batch's rows in which it shows."""
    held_worst: int
    """How many of the worst rows do."""
    same_as: tuple[str, ...]


@dataclass(frozen=True)
class Cause:
    """What stood behind a bad step, as it goes into the run folder."""

    step: int
    why: str
    """What led to the question: the warning's or verdict's reason."""
    task: str
    """The task that led; empty where none left its usual range."""
    layer: Layer | None
    """The layer that left its range first."""
    state_or_data: StateOrData
    """`data`: the same batch is bad on the earlier state too. `state`: usual batches are bad on this one. `both`: both,
    or it takes this batch on this state. `neither`: not bad by loss or gradient. `unknown`: there is no earlier state,
    or too few usual batches."""
    earlier_steps: int | None
    """How much earlier that state is."""
    usual_batches: int
    """How many usual batches it was compared with; with fewer than four no feature is found unusual."""
    tasks: dict[str, TaskReading]
    rows: list[RowReading]
    """The rows with the largest gradient."""
    odd_rows: list[RowReading]
    """The rows that hold most of what is unusual; of those alike, the ones with the largest gradient."""
    features: list[FeatureReading]
    """What is unusual about the batch, most unusual first."""
    sentence: str

    @property
    def feature(self) -> str:
        """The most unusual feature; empty where none is."""
        return self.features[0].feature if self.features else ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        layer = None if self.layer is None else self.layer._asdict()
        losses = {name: reading.loss for name, reading in self.tasks.items()}
        return {**asdict(self), "layer": layer, "losses": losses, "feature": self.feature}


def find_cause(
    step: int,
    model: nn.Module,
    batch: Batch,
    schema: Schema,
    loss: LossFunction,
    reference: Reference,
    *,
    losses_TK: Float[np.ndarray, "steps tasks"] | None = None,
    trails: Sequence[Trail] = (),
    earlier: Earlier | None = None,
    since: int | None = None,
    why: str = "",
    look_up: LookUp | None = None,
) -> Cause:
    """Find what stood behind a bad step.

    Args:
        step: The step that would learn `batch`, or has just learned it.
        model: Maps a Batch to logits [B, K], in the mode and state in which it is to be examined.
        batch: The step's batch.
        schema: What its columns mean.
        loss: The loss that is trained, `losses.multitask_loss`.
        reference: Usual batches.
        losses_TK: Losses of the steps before, tasks in the schema's order; without them, those of usual batches.
        trails: Readings by parameter up to the step.
        earlier: The state of some steps earlier.
        since: Step at which the trouble began, where that is known.
        why: What led to the question, in words.
        look_up: Reads rows of the log again by their numbers, one dictionary a row.

    Returns:
        The cause. With a short history it says less; what is not finite is out of any range.
    """
    began = step - _BEGAN if since is None else min(since, step)
    usual, tasks, device = reference.before(began), list(schema.tasks.values()), next(model.parameters()).device

    def read(each: Batch, state: Mapping[str, Tensor] | None = None) -> RowReadings:
        return read_rows(model, each.to(device), tasks, loss, state)

    readings = read(batch)
    few = usual[-READ:]
    usual_now = [read(each) for each in few]
    by_task = _read_tasks(schema, readings, usual_now, losses_TK)
    verdict: StateOrData = "unknown"
    if earlier is not None and len(few) >= FEWEST:
        then, usual_then = read(batch, earlier.state), [read(each, earlier.state) for each in few]
        verdict = compare_states(list(by_task).index(_lead(by_task)), readings, then, usual_now, usual_then)
        if verdict == "state":  # on which usual batches are bad too, so that none of them stands out
            by_task = _read_tasks(schema, readings, usual_then, None)
    lead = _lead(by_task)
    here = batch.to("cpu")
    found = [f for f in find_unusual(here, usual, schema) if f.score >= UNUSUAL]
    worst, odd = _pick_rows(readings, found)
    examples = [finding.example for finding in found]
    columns = _look_up(here, [*worst, *odd, *examples], look_up)
    rows = {at: _describe_row(at, here, schema, readings, found, columns) for at in (*worst, *odd)}
    features = [_describe_feature(f, here, schema, worst, columns) for f in found]
    layer = find_layer(trails, began)
    cause = Cause(
        step=step,
        why=why,
        task=lead if by_task[lead].score >= UNUSUAL else "",
        layer=layer,
        state_or_data=verdict,
        earlier_steps=None if earlier is None else earlier.steps,
        usual_batches=len(usual),
        tasks=by_task,
        rows=[rows[at] for at in worst],
        odd_rows=[rows[at] for at in odd],
        features=features,
        sentence="",
    )
    return Cause(**{**cause.__dict__, "sentence": _say(cause, len(batch))})


def score_log(value: float, usual: Sequence[float] | Float[np.ndarray, " usual"]) -> float:
    """Return how far a size lies above the usual ones.

    (log x - median(log u)) / max(0.1, 1.4826 MAD(log u))

    Args:
        value: 0 or more.
        usual: The usual ones; those not finite are left out.

    Returns:
        The score; infinite where `value` is not finite, and else 0 with fewer than four usual ones.

    >>> score_log(math.exp(3.0), [math.exp(x) for x in (0.0, 1.0, 2.0, 1.0, 1.0)])
    20.0
    """
    if not math.isfinite(value):
        return math.inf
    sizes = np.asarray(usual, dtype=np.float64)
    sizes = sizes[np.isfinite(sizes)]
    if len(sizes) < FEWEST:
        return 0.0
    logs = np.log(np.maximum(sizes, 1e-30))
    middle = np.median(logs)
    spread = max(_FLOOR, 1.4826 * float(np.median(np.abs(logs - middle))))
    return float((math.log(max(value, 1e-30)) - middle) / spread)


def find_layer(trails: Sequence[Trail], began: int) -> Layer | None:
    """Return the first parameter that left its range from step `began` on; of several at that step, the furthest.

    The range is 7 robust standard deviations above the median of the logarithms before `began`. None where none left it
    or the steps before are fewer than four.
    """
    found: list[Layer] = []
    for trail in trails:
        before = trail.steps_T < began
        for step, row_P in zip(trail.steps_T[~before], trail.values_TP[~before], strict=True):
            for p, value in enumerate(row_P):
                if not np.isnan(value):
                    score = score_log(float(value), trail.values_TP[before, p])
                    found.append(Layer(trail.names[p], trail.measure, int(step), score))
    out = [each for each in found if each.score > OUT_OF_RANGE]
    return min(out, key=lambda each: (each.step, -each.score), default=None)


def compare_states(
    lead: int, now: RowReadings, then: RowReadings, usual_now: Sequence[RowReadings], usual_then: Sequence[RowReadings]
) -> StateOrData:
    """Say whether the data or the state is bad, by losses and gradients.

    Data: on the earlier state too (`then`) the batch lies out of the range of usual batches in the leading task. State:
    usual batches on the present state lie out of their range on the earlier one, in the middle and in any task. Both:
    both; or only this batch on the present state (`now`) lies out of it. Neither: nothing does.
    """
    sizes: list[Callable[[RowReadings], Tensor]] = [lambda r: r.losses_K, lambda r: r.gradients_K]
    data = state = bad = False
    for size in sizes:
        range_UK = torch.stack([size(each) for each in usual_then]).cpu().numpy()
        present_UK = torch.stack([size(each) for each in usual_now]).nan_to_num(nan=math.inf)
        for k, middle in enumerate(present_UK.median(0).values.tolist()):
            state |= score_log(middle, range_UK[:, k]) > OUT_OF_RANGE
        data |= score_log(float(size(then)[lead]), range_UK[:, lead]) > OUT_OF_RANGE
        bad |= score_log(float(size(now)[lead]), range_UK[:, lead]) > OUT_OF_RANGE
    if data != state:
        return "data" if data else "state"
    return "both" if data or bad else "neither"


def _lead(tasks: Mapping[str, TaskReading]) -> str:
    return max(tasks, key=lambda name: tasks[name].score)


def _read_tasks(
    schema: Schema, now: RowReadings, usual: Sequence[RowReadings], losses_TK: Float[np.ndarray, "steps tasks"] | None
) -> dict[str, TaskReading]:
    squares_K = now.gradients_K.square()
    fractions = (squares_K / squares_K.sum()).tolist()
    found = {}
    for k, name in enumerate(schema.tasks):
        before = np.array([float(each.losses_K[k]) for each in usual])
        if losses_TK is not None and len(losses_TK) >= FEWEST:
            before = losses_TK[:, k]
        known = before[np.isfinite(before)]
        loss, gradient = float(now.losses_K[k]), float(now.gradients_K[k])
        found[name] = TaskReading(
            loss=loss,
            usual_loss=float(np.median(known)) if len(known) else math.nan,
            loss_score=score_log(loss, before),
            gradient_frac=fractions[k],
            gradient_score=score_log(gradient, [float(each.gradients_K[k]) for each in usual]),
        )
    return found


def _pick_rows(readings: RowReadings, found: Sequence[Finding]) -> tuple[list[int], list[int]]:
    """Return the rows with the largest gradient, and those that hold most of what is unusual."""
    gradients_B = readings.push().nan_to_num(nan=math.inf, posinf=math.inf).cpu().numpy()
    by_gradient = np.argsort(-gradients_B, kind="stable")
    held_B = np.zeros(len(gradients_B))
    for finding in found:
        held_B += finding.score * finding.held_B
    odd = by_gradient[np.argsort(-held_B[by_gradient], kind="stable")]
    return by_gradient[:WORST].tolist(), odd[held_B[odd] > 0][:WORST].tolist()


def _look_up(batch: Batch, places: Sequence[int], look_up: LookUp | None) -> dict[int, dict[str, Any]]:
    """Return what the log says in some rows of a batch, by place; nothing where the log cannot be read any more."""
    distinct = list(dict.fromkeys(places))
    if batch.row is None or look_up is None:
        return {}
    try:
        return dict(zip(distinct, look_up(batch.row[distinct].tolist()), strict=True))
    except DataError:
        return {}


def _describe_row(
    at: int,
    batch: Batch,
    schema: Schema,
    readings: RowReadings,
    found: Sequence[Finding],
    columns: Mapping[int, Mapping[str, Any]],
) -> RowReading:
    gradients_K = readings.row_gradients_BK[at]
    return RowReading(
        row=at if batch.row is None else int(batch.row[at]),
        loss=float(readings.row_losses_BK[at].sum()),
        gradient=float(readings.push()[at]),
        task=list(schema.tasks)[int(gradients_K.nan_to_num(nan=math.inf).argmax())],
        holds=tuple(finding.feature for finding in found if finding.held_B[at]),
        columns={name: _plain(value) for name, value in columns.get(at, {}).items()},
    )


def _describe_feature(
    finding: Finding,
    batch: Batch,
    schema: Schema,
    worst: Sequence[int],
    columns: Mapping[int, Mapping[str, Any]],
) -> FeatureReading:
    return FeatureReading(
        feature=finding.feature,
        view=finding.view,
        score=finding.score,
        value=None if finding.value is None else _name_value(finding, batch, schema, columns),
        now=finding.now,
        usual=finding.usual,
        held_frac=float(finding.held_B.mean()),
        held_worst=int(finding.held_B[list(worst)].sum()),
        same_as=finding.same_as,
    )


def _plain(value: Any) -> Any:
    """Return a value of the log as JSON has it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value)


def _name_value(finding: Finding, batch: Batch, schema: Schema, columns: Mapping[int, Mapping[str, Any]]) -> Any:
    """Return a value as it stands in the log, or the row of the feature's table where that is not known."""
    value, feature = int(finding.value or 0), schema.features.get(finding.feature)
    if not isinstance(feature, IdFeature | IdsFeature):
        return value  # a place, or a binary label
    row = value - schema.slot(finding.feature).start
    raw = columns.get(finding.example, {}).get(feature.column)
    if isinstance(feature, IdsFeature) and raw is not None:
        ragged = batch.lists[list(schema.list_features).index(finding.feature)]
        ids = ragged.values[ragged.offsets[finding.example] : ragged.offsets[finding.example + 1]].tolist()
        words = raw.lower().split() if isinstance(raw, str) else raw
        raw = words[ids.index(value) - len(ids)]  # from the end: a long list has lost its beginning
    if row == 0:
        return "null"
    if raw is None:
        return f"table row {row}" if feature.hashed else row - 1
    return _plain(raw)


def _say(cause: Cause, rows: int) -> str:
    """Put the cause into plain words."""
    parts = [_say_task(cause)]
    if cause.layer is not None:
        name, measure, step, score = cause.layer
        parts.append(f"{name} left its range first, at step {step}: its {measure}, by {score:.1f} deviations.")
    parts += [_say_feature(feature, min(WORST, rows)) for feature in cause.features[:3]]
    if cause.usual_batches < FEWEST:
        parts.append("Too few batches came before to tell which feature is unusual.")
    elif not cause.features:
        parts.append("No feature and no label is unusual.")
    if cause.earlier_steps is not None:
        state = f"the state of {cause.earlier_steps} steps earlier"
        words = {
            "data": f"The same batch is bad on {state} too: the data.",
            "state": f"Usual batches are bad on this state, and the same batch is not on {state}: the state.",
            "both": f"Neither alone explains it: compared with {state}, both the data and the state do.",
            "neither": f"Neither on this state nor on {state} is the batch bad by its loss or gradient.",
        }
        parts.append(words.get(cause.state_or_data, ""))
    return " ".join(part for part in parts if part)


def _say_task(cause: Cause) -> str:
    if not cause.task:
        return "No task's loss or gradient left its usual range."
    reading = cause.tasks[cause.task]
    if not math.isfinite(reading.loss):
        return f"{cause.task} led: its loss was not finite."
    if reading.loss_score >= reading.gradient_score and reading.usual_loss > 0:
        return f"{cause.task} led: its loss was {reading.loss / reading.usual_loss:,.3g} times its usual one."
    return f"{cause.task} led: its gradient lay {reading.gradient_score:.1f} deviations above its usual ones."


def _say_feature(feature: FeatureReading, worst: int) -> str:
    name = feature.feature
    where = f"{feature.held_frac:.0%} of the rows, {feature.held_worst} of the {worst} worst"
    match feature.view:
        case "share":
            what = f"{name} {feature.value} has {feature.now:.1%} of the rows, usually {feature.usual:.1%}"
        case "middle":
            what = f"the median of {name} is {feature.now:,.4g}, usually {feature.usual:,.4g}"
        case "extremes":
            what = f"{name} reaches {feature.now:,.4g}, usually at most {feature.usual:,.4g}"
            if feature.now < feature.usual:
                what = f"{name} falls to {feature.now:,.4g}, usually at least {feature.usual:,.4g}"
        case _:
            what = f"{name} is missing in {feature.now:.1%} of the rows, usually in {feature.usual:.1%}"
    same = f"; {', '.join(feature.same_as)} likewise" if feature.same_as else ""
    return f"{what[0].upper()}{what[1:]} ({where}{same})." if not what.startswith(name) else f"{what} ({where}{same})."
