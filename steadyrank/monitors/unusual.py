"""What a batch holds that batches usually do not: values that came up, medians that moved, extremes, gaps.

Every feature and every label is compared with the same feature of earlier batches, in up to three views, each a number
that has about a standard normal distribution while nothing happens. Streams drift, so each earlier batch is compared
in the same way with those before it, and that is what a view's number is measured by: a feature that always changes
(the hour) has to change more than it does anyway.

Shapes: B rows, R usual batches, N values of one feature in one batch, V different values.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray

from ..ranks import Ranks
from ..schema import Batch, Ragged, Schema

LABEL = "label of "
"""Prefix under which a task's label stands among the features."""
UNUSUAL = 4.0
"""Score from which a feature is reported; without an incident the largest of twenty features mostly lies below 3."""
FEWEST = 4
"""Usual batches below which nothing is said."""
_RISEN = 2.5  # a value's own z from which it counts as risen
_SAME = 0.9  # two features that are odd in so nearly the same rows tell of one thing

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Reference:
    """A memory of what batches usually hold: every so many steps one batch, the newest ones.

    Feed it the batch as the reader gives it, on the CPU: to thin out lists on a GPU would wait for it.

    Args:
        every: Steps between two batches that are kept.
        keep: Batches kept.
        rows: Rows kept of each, evenly spread.
    """

    def __init__(self, every: int = 10, keep: int = 48, rows: int = 512) -> None:
        self.every, self.rows = every, rows
        self._kept: deque[tuple[int, Batch]] = deque(maxlen=keep)
        self._joined = 0  # the last step of which the rows of all ranks are here

    def add(self, step: int, batch: Batch, first: int = 0) -> None:
        """Look at the batch of a step; keep it when its turn has come.

        Args:
            step: Which one.
            batch: The batch, or this rank's share of it.
            first: The share's first row in the whole batch.
        """
        if step % self.every == 0:
            self._kept.append((step, thin(batch, self.rows, first)))

    def join(self, ranks: Ranks) -> None:
        """Let the first rank have the rows of all; the others forget theirs. A collective."""
        if ranks.is_alone:
            return
        new = [(step, batch) for step, batch in self._kept if step > self._joined]
        parts = ranks.collect([batch for _, batch in new])
        known = [each for each in self._kept if each[0] <= self._joined]
        whole = [(step, Batch.cat(each)) for (step, _), *each in zip(new, *parts, strict=True)] if parts else []
        self._joined = new[-1][0] if new else self._joined
        self._kept.clear()
        self._kept.extend(known + whole if ranks.is_first else [])

    def before(self, step: int) -> list[Batch]:
        """Return the batches of the steps before `step`, oldest first."""
        return [batch for kept, batch in self._kept if kept < step]

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values for a checkpoint."""
        return {"kept": [(step, _pack(batch)) for step, batch in self._kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self._kept.clear()
        self._kept.extend((step, _unpack(packed)) for step, packed in state["kept"])
        self._joined = self._kept[-1][0] if self._kept else 0


def thin(batch: Batch, rows: int, first: int = 0) -> Batch:
    """Return at most `rows` rows of a batch, evenly spread; of a share, which begins at row `first`, those in it."""
    if batch.whole_rows <= rows:
        return batch if batch.share is None else replace(batch, share=None)
    chosen = torch.arange(rows, device=batch.time.device) * batch.whole_rows // rows - first
    return batch.take(chosen[(chosen >= 0) & (chosen < len(batch))])


@dataclass(frozen=True)
class Finding:
    """What is unusual about one feature of a batch."""

    feature: str
    """Its name; `label of <task>` for a label."""
    view: str
    """`share`: values came up. `middle`: the median moved. `extremes`: values outside the usual range. `missing`:
    values that are not finite."""
    score: float
    """How unusual, in robust standard deviations of what is usual."""
    value: int | None
    """`share` only: the value that rose most, a row of the weight matrix (ids), a place, or a binary label."""
    now: float
    """In this batch: share of rows with that value; median; the value furthest outside; share missing."""
    usual: float
    """The same in usual batches; of `extremes` the bound that was passed."""
    held_B: Bool[np.ndarray, " batch"]
    """The rows in which it shows."""
    example: int
    """One of them: of `share` one with that value, of `extremes` the one furthest outside."""
    same_as: tuple[str, ...] = ()
    """Other features that are odd in the same rows, such as a hash of this one."""


class Column(NamedTuple):
    """One feature of a batch, its missing values included."""

    values: NDArray[Any]
    """As a person knows them: numbers and labels in the log's own unit; ids as rows of the weight matrix."""
    learned: NDArray[Any]
    """As the model sees them, transformed."""
    rows: Ints
    """The row of the batch that each lies in."""
    size: int
    """Rows that could have a value; a list has several in one."""


class _View(NamedTuple):
    """One view of R usual batches and then the one in question."""

    name: str
    scores: Floats
    """[R + 1]: how much each differs from all before it, about standard normal; the first differs from nothing."""
    value: int | None
    now: float
    usual: float
    held_N: NDArray[np.bool_]
    example: int


def find_unusual(batch: Batch, usual: Sequence[Batch], schema: Schema) -> list[Finding]:
    """Return what is unusual about each feature of a batch, the most unusual first, one finding a feature.

    score = (D - median(D_r)) / max(1, 1.4826 MAD(D_r)), where D compares the batch with all R usual ones and D_r the
    r-th usual one with those before it, for r from R/4 on. D grows with the root of the rows compared; for a batch
    larger than the usual ones it is taken as it would be for one of their size.

    Args:
        batch: On the CPU.
        usual: Earlier batches in order, on the CPU; with fewer than four nothing is found.
        schema: What the columns mean.

    Returns:
        The findings with a score above 0. Values that are not finite count in the view `missing` alone.
    """
    if len(usual) < FEWEST or not len(batch):
        return []
    shrink = min(1.0, float(np.median([len(each) for each in usual])) / len(batch)) ** 0.5
    now, before = columns_of(batch, schema), [columns_of(each, schema) for each in usual]
    found = []
    for feature, column in now.items():
        parts = [*(each[feature] for each in before), column]
        views = _number_views(parts) if column.values.dtype.kind == "f" else [_shares(parts)]
        scored = [(_standardise(view.scores, shrink), view) for view in views]
        score, best = max(scored, key=lambda pair: pair[0])
        if score > 0:
            held_B = np.zeros(len(batch), bool)
            held_B[column.rows[best.held_N]] = True
            example = int(column.rows[best.example])
            found.append(Finding(feature, best.name, score, best.value, best.now, best.usual, held_B, example))
    return _join_same(found)


def columns_of(batch: Batch, schema: Schema) -> dict[str, Column]:
    """Return every feature and label of a batch by name; a label only where it counts."""
    rows, columns = np.arange(len(batch)), {}
    for j, name in enumerate(schema.id_features):
        columns[name] = Column(ids := batch.ids[:, j].numpy(), ids, rows, len(batch))
    for ragged, name in zip(batch.lists, schema.list_features, strict=True):
        owner = rows.repeat(ragged.offsets.diff().numpy())
        # A value that a list holds twice is still one row's.
        ids, first = _distinct_pairs(owner, ragged.values.numpy())
        columns[name] = Column(ids, ids, owner[first], len(batch))
    for j, name in enumerate(schema.position_features):
        columns[name] = Column(places := batch.positions[:, j].numpy(), places, rows, len(batch))
    for j, (name, feature) in enumerate(schema.number_features.items()):
        raw = batch.numbers[:, j].double().numpy()
        log1p = feature.transform == "log1p"
        columns[name] = Column(raw, np.sign(raw) * np.log1p(np.abs(raw)) if log1p else raw, rows, len(batch))
    for k, (name, task) in enumerate(schema.tasks.items()):
        at = np.flatnonzero(batch.weights[:, k].numpy())
        label = batch.labels[torch.from_numpy(at), k].double()
        if task.kind == "binary":
            columns[LABEL + name] = Column(binary := label.long().numpy(), binary, at, len(at))
        else:
            columns[LABEL + name] = Column(task.decode(label).numpy(), label.numpy(), at, len(at))
    return columns


def _distinct_pairs(owner: Ints, values: Ints) -> tuple[Ints, Ints]:
    """Return the values and the places of the first of each (owner, value)."""
    if not len(values):
        return values, np.zeros(0, np.int64)
    order = np.lexsort((values, owner))
    new = np.ones(len(values), bool)
    new[1:] = (np.diff(owner[order]) != 0) | (np.diff(values[order]) != 0)
    return values[order][new], order[new]


def _standardise(scores: Floats, shrink: float) -> float:
    """Return the last score, shrunk, measured by those of the usual batches that have some before them."""
    usual = scores[max(1, len(scores) // 4) : -1]
    spread = 1.4826 * np.median(np.abs(usual - np.median(usual)))
    return float((shrink * scores[-1] - np.quantile(usual, 0.9)) / max(1.0, spread))


def _excess(count: Any, expected: Any) -> Any:
    """Return how far a count lies above what was expected, about standard normal (Freeman and Tukey, 1950).

    sqrt(n) + sqrt(n + 1) - sqrt(4 e + 1)
    """
    return np.sqrt(count) + np.sqrt(count + 1.0) - np.sqrt(4.0 * expected + 1.0)


def _shares(parts: Sequence[Column]) -> _View:
    """See which values came up: the root of the sum of squares of the excesses above 2.5."""
    codes = np.concatenate([part.values for part in parts])
    sizes = np.array([len(part.values) for part in parts])
    values, code = np.unique(codes, return_inverse=True)
    counts_RV = np.zeros((len(parts), len(values)))
    np.add.at(counts_RV, (np.arange(len(parts)).repeat(sizes), code), 1.0)
    before_RV = np.cumsum(counts_RV, axis=0) - counts_RV
    before_R = np.cumsum(sizes) - sizes
    share_RV = before_RV / np.maximum(before_R, 1)[:, None]
    z_RV = _excess(counts_RV, share_RV * sizes[:, None])
    last = parts[-1]
    per_row = max(1.0, sum(sizes) / max(1, sum(part.size for part in parts)))  # values of one row come together
    scores = np.sqrt(np.square(np.where(z_RV > _RISEN, z_RV, 0.0)).sum(1) / per_row)
    if not len(last.values) or not before_R[-1]:
        return _View("share", np.zeros(len(parts)), None, 0.0, 0.0, np.zeros(len(last.values), bool), 0)
    top = int(z_RV[-1].argmax())
    last_code = code[len(codes) - len(last.values) :]
    risen = (z_RV[-1] > _RISEN) | (np.arange(len(values)) == top)
    usual_rows = max(1, sum(part.size for part in parts[:-1]))
    return _View(
        "share",
        scores,
        int(values[top]),
        float(counts_RV[-1, top] / last.size),
        float(before_RV[-1, top] / usual_rows),
        np.asarray(risen[last_code]),
        int((last_code == top).argmax()),
    )


def _number_views(parts: Sequence[Column]) -> list[_View]:
    finite = [np.isfinite(part.learned) for part in parts]
    known = [part.learned[ok] for part, ok in zip(parts, finite, strict=True)]
    middle, extremes, missing = (np.zeros(len(parts)) for _ in range(3))
    for r in range(1, len(parts)):
        before, now = np.sort(np.concatenate(known[:r])), known[r]
        if len(before) and len(now):
            middle[r] = abs(_shift(now, before))
            extremes[r] = _outside(now, before)
        gaps = sum(int((~ok).sum()) for ok in finite[:r]) / max(1, sum(len(ok) for ok in finite[:r]))
        missing[r] = _excess((~finite[r]).sum(), gaps * len(finite[r]))
    last, ok = parts[-1], finite[-1]
    usual = np.concatenate([part.values[good] for part, good in zip(parts[:-1], finite[:-1], strict=True)])
    gap = _View(
        "missing",
        missing,
        None,
        float((~ok).mean()) if len(ok) else 0.0,
        float(gaps),
        ~ok,
        int((~ok).argmax()) if len(ok) else 0,
    )
    if not len(usual) or not ok.any():
        return [gap]
    low, high = np.quantile(usual, [0.01, 0.99])
    median, usual_median = float(np.median(last.values[ok])), float(np.median(usual))
    beyond = ok & (last.values > high if median > usual_median else last.values < low)
    least, most = float(usual.min()), float(usual.max())
    outside = ok & ((last.values < least) | (last.values > most))
    far = np.where(ok, np.maximum(least - last.values, last.values - most), -np.inf)
    furthest = int(far.argmax())
    bound = most if last.values[furthest] > usual_median else least
    return [
        _View("middle", middle, None, median, usual_median, beyond, int(beyond.argmax())),
        _View("extremes", extremes, None, float(last.values[furthest]), bound, outside, furthest),
        gap,
    ]


def _shift(now: Floats, before: Floats) -> float:
    """Return how far values lie from the middle of the (sorted) earlier ones: Mann and Whitney's z.

    (mean rank share - 1/2) sqrt(12 / (1/n + 1/m))
    """
    rank = np.searchsorted(before, now, "left") + np.searchsorted(before, now, "right")
    return float((rank.mean() / 2 / len(before) - 0.5) * np.sqrt(12.0 / (1 / len(now) + 1 / len(before))))


def _outside(now: Floats, before: Floats) -> float:
    """Return the excess of values outside the range of the (sorted) earlier ones, of which 2 n / (m + 1) are expected.

    A value counts 1 + log(1 + its distance from the range, in robust standard deviations): two labels a thousand times
    too large weigh more than two that are a little so.
    """
    far = np.maximum(before[0] - now, now - before[-1])
    far = far[far > 0]
    low, high = np.quantile(before, [0.25, 0.75])
    spread = (high - low) / 1.349 or before.std() or max(1.0, abs(before[0]))
    return float(_excess((1 + np.log1p(far / spread)).sum(), 2 * len(now) / (len(before) + 1)))


def _join_same(found: list[Finding]) -> list[Finding]:
    """Sort by score; let features that are odd in the same rows follow the first of them under one name.

    Of near equals (within a fifth) the first in the schema gives the name.
    """
    left, joined = sorted(found, key=lambda each: -each.score), []
    while left:
        first = left[0]
        same = [each for each in left if each is first or _overlap(first.held_B, each.held_B) >= _SAME]
        names = [each for each in found if each in same and each.score >= 0.8 * first.score]
        head = names[0]
        others = tuple(each.feature for each in same if each is not head and each.score >= UNUSUAL)
        joined.append(Finding(**{**_as_fields(head), "same_as": others}))
        left = [each for each in left if each not in same]
    return joined


def _overlap(one_B: NDArray[np.bool_], other_B: NDArray[np.bool_]) -> float:
    either = (one_B | other_B).sum()
    return float((one_B & other_B).sum() / either) if either else 0.0


def _as_fields(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}


def _pack(batch: Batch) -> dict[str, Any]:
    return {**_as_fields(batch), "lists": [(ragged.values, ragged.offsets) for ragged in batch.lists]}


def _unpack(packed: dict[str, Any]) -> Batch:
    return Batch(**{**packed, "lists": tuple(Ragged(values, offsets) for values, offsets in packed["lists"])})
