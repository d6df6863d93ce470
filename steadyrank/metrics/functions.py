"""Metrics of one task as pure functions of NumPy columns.

A row counts with its weight; a weight of 0 (or NaN) masks it. Binary tasks are scored by logits, regressions in the
units that the model learns (`Batch.labels`: transformed and scaled). What is undefined (no rows, one class only, a
constant label) is NaN, and so is what a NaN score leaves undefined; nothing here raises or warns on non-finite numbers.

Shapes: B rows, K tasks, S sums (see `SUMS`), T runs of tied scores, G groups.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Integer, Shaped
from torch import Tensor

TaskKind = Literal["binary", "regression"]
SUMS = ("rows", "weight", "label", "label_spread", "predicted", "loss", "absolute")
"""The S sums of a task. All are weighted but `rows`; `label_spread` is taken about the mean label; `loss` sums the log
losses or the squared errors. `absolute` is of a regression alone."""

# A bin holds 2**11 neighbouring float32 values, so 4096 bins lie between a magnitude and its double. With 32 doublings
# from 2**-12 to 2**20 and two signs that makes 2**18 bins; smaller magnitudes tie, and so do larger ones.
BINS = 2**18
_BITS_PER_BIN = 11
_LOWEST, _HIGHEST = (127 - 12) << 23, ((127 + 20) << 23) - 1  # bit patterns of 2**-12 and of the last below 2**20


def auc(
    scores: Float[np.ndarray, " rows"],
    labels: Shaped[np.ndarray, " rows"],
    weights: Shaped[np.ndarray, " rows"] | None = None,
) -> float:
    """Return the area under the ROC curve: the chance that a positive row outranks a negative one, a tie being half.

    `sum_pn w_p w_n ([s_p > s_n] + [s_p = s_n] / 2) / (sum_p w_p * sum_n w_n)`, exactly, by sorting.

    Args:
        scores: logits, probabilities, or anything of the same order; infinities are allowed.
        labels: 0 or 1.
        weights: 0 or more; 1 for each row when left out.

    Returns:
        0 to 1; NaN without rows of both classes, or with a NaN among the scores that count.

    >>> auc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1]))
    0.875
    """
    return ratio(*auc_sums(scores, labels, weights))


def gauc(
    scores: Float[np.ndarray, " rows"],
    labels: Shaped[np.ndarray, " rows"],
    weights: Shaped[np.ndarray, " rows"] | None,
    groups: Integer[np.ndarray, " rows"],
) -> float:
    """Return the mean AUC within groups (users, requests), each group counting with the total weight of its rows.

    `sum_g W_g AUC_g / sum_g W_g` over the groups that hold both classes; the others say nothing about order.

    Args:
        scores, labels, weights: as for `auc`.
        groups: the group's key.

    Returns:
        0 to 1; NaN when no group holds both classes, or with a NaN among the scores that count.

    >>> gauc(np.array([0.1, 0.4, 0.9, 0.8]), np.array([0, 1, 0, 1]), None, np.array([7, 7, 8, 8]))
    0.5

    Source: Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017; Zhou et al., "Deep Interest
    Network", KDD 2018, where a group's weight is its number of impressions.
    """
    return ratio(*auc_sums(scores, labels, weights, groups))


def log_loss(
    logits: Float[np.ndarray, " rows"],
    labels: Shaped[np.ndarray, " rows"],
    weights: Shaped[np.ndarray, " rows"] | None = None,
) -> float:
    """Return the mean of `-ln P(label)` in nats, `P(1) = sigmoid(logit)`, without loss of digits at large logits.

    >>> round(log_loss(np.array([0.0, 2.0, -1000.0]), np.array([1, 1, 0])), 6)
    0.273358
    """
    return binary_values(task_sums("binary", logits, labels, weights))["log_loss"]


def normalised_entropy(
    logits: Float[np.ndarray, " rows"],
    labels: Shaped[np.ndarray, " rows"],
    weights: Shaped[np.ndarray, " rows"] | None = None,
) -> float:
    """Return the log loss over the entropy of the same rows' base rate: 1 or more is worse than a constant.

    `log_loss / -(q ln q + (1 - q) ln(1 - q))`, `q` the weighted share of positives. NaN when one class is absent.

    >>> normalised_entropy(np.zeros(4), np.array([0, 1, 0, 1]))
    1.0

    Source: He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014, section 2.2.
    """
    return binary_values(task_sums("binary", logits, labels, weights))["normalised_entropy"]


def calibration(
    predicted: Float[np.ndarray, " rows"],
    observed: Shaped[np.ndarray, " rows"],
    weights: Shaped[np.ndarray, " rows"] | None = None,
) -> float:
    """Return the sum of what was predicted (probabilities, not logits) over that of what was observed; 1 is best.

    NaN when the observed sum is 0.

    >>> calibration(np.array([0.5, 0.25, 0.75]), np.array([0, 0, 1]))
    1.5
    """
    return regression_values(task_sums("regression", predicted, observed, weights))["calibration"]


def rmse(
    predicted: Float[np.ndarray, " rows"],
    labels: Shaped[np.ndarray, " rows"],
    weights: Shaped[np.ndarray, " rows"] | None = None,
) -> float:
    """Return the root of the mean squared error.

    >>> rmse(np.array([1.0, 2.0]), np.array([1.0, 4.0]), np.array([1.0, 1.0]))
    1.4142135623730951
    """
    return regression_values(task_sums("regression", predicted, labels, weights))["rmse"]


def normalised_rmse(
    predicted: Float[np.ndarray, " rows"],
    labels: Shaped[np.ndarray, " rows"],
    weights: Shaped[np.ndarray, " rows"] | None = None,
) -> float:
    """Return the RMSE over that of the same rows' constant mean: 1 or more is worse than a constant.

    NaN when the labels are all the same.

    >>> normalised_rmse(np.array([2.0, 2.0]), np.array([1.0, 3.0]))
    1.0
    """
    return regression_values(task_sums("regression", predicted, labels, weights))["normalised_rmse"]


def mae(
    predicted: Float[np.ndarray, " rows"],
    labels: Shaped[np.ndarray, " rows"],
    weights: Shaped[np.ndarray, " rows"] | None = None,
) -> float:
    """Return the mean absolute error.

    >>> mae(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    1.0
    """
    return regression_values(task_sums("regression", predicted, labels, weights))["mae"]


def task_sums(
    kind: TaskKind,
    scores: Float[np.ndarray, " rows"],
    labels: Shaped[np.ndarray, " rows"],
    weights: Shaped[np.ndarray, " rows"] | None = None,
) -> Float64[np.ndarray, " sums"]:
    """Return the sums (`SUMS`) of one task's rows, from which `binary_values` and `regression_values` follow."""
    w, x, y = _unmasked(weights, scores, labels)
    x = x.astype(np.float64)
    even = bool((w == 1).all())

    def total(column: Any) -> float:
        return float((column if even else w * column).sum())

    with np.errstate(all="ignore"):
        if kind == "binary":
            y = (y > 0.5).astype(np.float64)
            wrong = np.where(y > 0, -x, x)  # ln(1 + exp(wrong)), three times as fast as by logaddexp
            loss = np.maximum(wrong, 0) + np.log1p(np.exp(-np.abs(wrong)))
            weight, label = w.sum(), total(y)
            spread = label * (1 - label / weight) if weight else 0.0
            return np.array([len(w), weight, label, spread, total(1 / (1 + np.exp(-x))), total(loss), 0.0])
        y = y.astype(np.float64)
        weight, label = w.sum(), total(y)
        spread, squares = np.square(y - label / weight), np.square(x - y)
        columns = (spread, x, squares, np.abs(x - y))
        return np.array([len(w), weight, label, *map(total, columns)])


def merge_sums(
    a_SK: Float64[np.ndarray, "sums *tasks"], b_SK: Float64[np.ndarray, "sums *tasks"]
) -> Float64[np.ndarray, "sums *tasks"]:
    """Return the sums of the rows of both; the label's spread about the joint mean follows from the two means.

    Source: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """
    weight, label, spread = (SUMS.index(name) for name in ("weight", "label", "label_spread"))
    merged = np.where(a_SK[weight] > 0, np.where(b_SK[weight] > 0, a_SK + b_SK, a_SK), b_SK)
    with np.errstate(all="ignore"):
        apart = np.square(a_SK[label] / a_SK[weight] - b_SK[label] / b_SK[weight])
        apart *= a_SK[weight] * b_SK[weight] / merged[weight]
    merged[spread] += np.where((a_SK[weight] > 0) & (b_SK[weight] > 0), apart, 0.0)
    return merged


def binary_values(sums_S: Float64[np.ndarray, " sums"]) -> dict[str, float]:
    """Return log loss, normalised entropy, calibration, positives, rows and weight of a binary task from its sums."""
    s = dict(zip(SUMS, sums_S.tolist(), strict=True))
    loss, rate = ratio(s["loss"], s["weight"]), ratio(s["label"], s["weight"])
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)) if 0 < rate < 1 else 0.0
    return {
        "log_loss": loss,
        "normalised_entropy": ratio(loss, float(entropy)),
        "calibration": ratio(s["predicted"], s["label"]),
        "positives": s["label"],
        "rows": s["rows"],
        "weight": s["weight"],
    }


def regression_values(sums_S: Float64[np.ndarray, " sums"]) -> dict[str, float]:
    """Return RMSE, its share of the constant mean's, MAE, calibration, rows and weight of a regression."""
    s = dict(zip(SUMS, sums_S.tolist(), strict=True))
    # Equal labels leave a spread of a few roundings, which would pass for a constant that is easy to lose against.
    trace = 1e-12 * s["label"]
    constant = s["label_spread"] * s["weight"] <= trace * trace
    return {
        "rmse": ratio(s["loss"], s["weight"]) ** 0.5,
        "normalised_rmse": ratio(s["loss"], 0.0 if constant else s["label_spread"]) ** 0.5,
        "mae": ratio(s["absolute"], s["weight"]),
        "calibration": ratio(s["predicted"], s["label"]),
        "rows": s["rows"],
        "weight": s["weight"],
    }


def as_scores(truth_BK: Float[Tensor, "batch tasks"], kinds: Sequence[TaskKind]) -> Float[Tensor, "batch tasks"]:
    """Return true values (`Batch.truth`) as a perfect model's scores: logits of probabilities, regressions as they are.

    The metrics of these scores are the attainable ones.

    >>> as_scores(torch.tensor([[0.5, 3.0]]), ["binary", "regression"])
    tensor([[0., 3.]])
    """
    binary_K = torch.tensor([kind == "binary" for kind in kinds], device=truth_BK.device)
    return torch.where(binary_K, torch.logit(truth_BK), truth_BK)


def iso_day(day: int) -> str:
    """Return the date of a day counted from 1970-01-01 (UTC).

    >>> iso_day(19_000)
    '2022-01-08'
    """
    return str(np.datetime64(day, "D"))


def ratio(a: float, b: float) -> float:
    """Return a / b; NaN when b is 0."""
    return a / b if b else float("nan")


def _unmasked(weights: Any, *columns: Any) -> tuple[Any, ...]:
    """Return the weights (float64) and the columns without masked rows."""
    w = np.ones(len(columns[0])) if weights is None else weights.astype(np.float64)
    keep = w > 0
    return (w, *columns) if keep.all() else (w[keep], *(column[keep] for column in columns))


def _order_codes(scores: Any) -> Any:
    """Return integers of 32 bits in the order of the scores, equal where these are equal; NaN excluded."""
    if scores.dtype != np.float32:
        return np.unique(scores, return_inverse=True)[1].astype(np.int32)
    bits = (scores + np.float32(0)).view(np.int32)  # adding 0 makes -0 equal to 0
    return np.where(bits >= 0, bits, np.int32(-(2**31)) - bits)


def _sort(key: Any) -> tuple[Any, Any]:
    """Return integers in rising order and where they were; torch's radix sort takes a quarter of NumPy's time."""
    values, order = torch.sort(torch.from_numpy(key), stable=True)
    return values.numpy(), order.numpy()


def number_groups(groups: Any) -> Any:
    """Return numbers from 0 to 2**31 - 1 in the order of the groups' keys: these themselves where they are such."""
    if not len(groups) or (groups.min() >= 0 and groups.max() < 2**31):
        return groups
    key, order = _sort(groups)
    numbers = np.empty(len(key), np.int64)
    numbers[order] = np.cumsum(np.diff(key, prepend=key[:1]) != 0)
    return numbers


def auc_sums(scores: Any, labels: Any, weights: Any, groups: Any = None) -> tuple[float, float]:
    """Return `sum_g W_g AUC_g` and `sum_g W_g` over the groups with both classes; without groups all rows are one."""
    w, scores, labels, *rest = _unmasked(weights, scores, labels, *([] if groups is None else [groups]))
    if not len(w):
        return 0.0, 0.0
    if np.isnan(scores).any():
        return float("nan"), float(w.sum())
    key = _order_codes(scores)
    if groups is not None:
        # One sort of packed integers: three times as fast as a lexsort of two columns.
        key = number_groups(*rest).astype(np.int64) * 2**32 + (key.astype(np.int64) + 2**31)
    key, order = _sort(key)
    ties_T = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
    pos = w * (labels > 0.5)
    pos_T, neg_T = (np.add.reduceat(side[order], ties_T) for side in (pos, w - pos))
    if groups is None:
        return areas(pos_T, neg_T, np.array([0]))
    group_T = key[ties_T] >> 32
    return areas(pos_T, neg_T, np.flatnonzero(np.r_[True, group_T[1:] != group_T[:-1]]))


def areas(pos_T: Any, neg_T: Any, starts_G: Any) -> tuple[float, float]:
    """Return the sums of `auc_sums` from the weights of both classes at each score, in rising order by group."""
    pos_G, neg_G = np.add.reduceat(pos_T, starts_G), np.add.reduceat(neg_T, starts_G)
    below_T = np.cumsum(neg_T) - neg_T
    below_T -= np.repeat(below_T[starts_G], np.diff(starts_G, append=len(pos_T)))
    area_G = np.add.reduceat(pos_T * (below_T + neg_T / 2), starts_G)
    both_G = ~((pos_G <= 0) | (neg_G <= 0))  # a NaN (see `histogram`) stays in
    weight_G = (pos_G + neg_G)[both_G]
    share_G = area_G[both_G] / (pos_G[both_G] * neg_G[both_G])
    return float((weight_G * share_G).sum()), float(weight_G.sum())


def add_to_bins(bins_2N: Any, scores: Any, labels: Any, weights: Any) -> None:
    """Add the weights of both classes to the bin of each score, in place; NaN throughout AUC after a NaN score."""
    w, scores, labels = _unmasked(weights, scores, labels)
    nan = np.isnan(scores)
    if nan.any():
        scores = np.where(nan, np.float32(0), scores)
        bins_2N[:, 0] = np.nan
    codes = _order_codes(scores)
    away = (np.clip(np.abs(codes), _LOWEST, _HIGHEST) - _LOWEST) >> _BITS_PER_BIN
    bins = np.where(codes < 0, BINS // 2 - 1 - away, BINS // 2 + away)
    positive = labels > 0.5
    if (w == 1).all():  # the bins are many more than the rows: only those that are met are touched
        np.add.at(bins_2N.reshape(-1), np.where(positive, bins, bins + BINS), 1.0)
        return
    pos = w * positive
    for side_N, side in zip(bins_2N, (pos, w - pos), strict=True):
        side_N += np.bincount(bins, side, BINS)


def auc_of_bins(bins_2N: Any) -> float:
    """Return the AUC of the rows whose weights lie in the bins."""
    pos_N, neg_N = bins_2N[:, (bins_2N != 0).any(axis=0)]
    return ratio(*areas(pos_N, neg_N, np.array([0]))) if len(pos_N) else math.nan


def share_attainable(metric: str, value: float, attainable: float) -> float:
    """Return how much of what can be learned was learned: 0 for a constant, 1 for the truth itself.

    AUC and GAUC: (value - 0.5) / (attainable - 0.5). Normalised entropy: (1 - value) / (1 - attainable). Normalised
    RMSE: the share of the explainable variance, (1 - value^2) / (1 - attainable^2). NaN for any other metric, and where
    there is nothing to learn.

    Args:
        metric: name of the metric, as `TaskMetrics.compute` gives it.
        value: the model's.
        attainable: that of the true values on the same rows.

    >>> round(share_attainable("auc", 0.65, 0.70), 3), round(share_attainable("normalised_rmse", 0.8, 0.6), 4)
    (0.75, 0.5625)
    """
    known = {"auc": (1, 0.5), "gauc": (1, 0.5), "normalised_entropy": (1, 1.0), "normalised_rmse": (2, 1.0)}
    if metric not in known:
        return math.nan
    power, nothing = known[metric]
    gained, gainable = (nothing - x**power for x in (value, attainable))
    return gained / gainable if gainable else math.nan
