"""Metrics against scikit-learn, slow loops, and themselves over streams."""

import io
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk

from steadyrank.errors import CheckpointError, ConfigError
from steadyrank.metrics import (
    DAY_US,
    ProgressiveMetrics,
    TaskMetrics,
    as_scores,
    auc,
    calibration,
    gauc,
    iso_day,
    log_loss,
    mae,
    normalised_entropy,
    normalised_rmse,
    rmse,
    share_attainable,
)
from steadyrank.metrics.functions import SUMS, merge_sums, task_sums

KINDS = {"click": "binary", "watch": "regression", "like": "binary"}
NAN = float("nan")


@st.composite
def rows(draw: Any, dtype: Any = np.float32) -> tuple[Any, Any, Any, Any]:
    """Scores with many ties, labels of 0 and 1, weights with zeros, and groups."""
    count = draw(st.integers(1, 60))
    width = 32 if dtype == np.float32 else 64
    few = st.sampled_from([-3.0, -0.0, 0.0, 0.5, 2.0]) | st.floats(-30, 30, width=width)
    scores = draw(hnp.arrays(dtype, count, elements=few))
    labels = draw(hnp.arrays(np.float32, count, elements=st.sampled_from([0.0, 1.0])))
    weights = draw(hnp.arrays(np.float32, count, elements=st.sampled_from([0.0, 1.0, 0.25, 7.0])))
    groups = draw(hnp.arrays(np.int64, count, elements=st.sampled_from([-5, 0, 3, 2**40])))
    return scores, labels, weights, groups


def slow_auc(scores: Any, labels: Any, weights: Any) -> float:
    keep = weights > 0
    if len(set(labels[keep])) < 2:
        return NAN
    return float(sk.roc_auc_score(labels[keep], scores[keep], sample_weight=weights[keep].astype(np.float64)))


def slow_gauc(scores: Any, labels: Any, weights: Any, groups: Any) -> float:
    total, weight = 0.0, 0.0
    for group in set(groups.tolist()):
        own = groups == group
        value = slow_auc(scores[own], labels[own], weights[own])
        if not math.isnan(value):
            total += value * float(weights[own].astype(np.float64).sum())
            weight += float(weights[own].astype(np.float64).sum())
    return total / weight if weight else NAN


def close(a: float, b: float, tolerance: float = 1e-9) -> bool:
    return (math.isnan(a) and math.isnan(b)) or abs(a - b) <= tolerance * max(1.0, abs(b))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_auc_and_gauc_equal_scikit_learn(dtype: Any) -> None:
    @settings(max_examples=60, deadline=None)
    @given(rows(dtype))
    def check(drawn: tuple[Any, Any, Any, Any]) -> None:
        scores, labels, weights, groups = drawn
        assert close(auc(scores, labels, weights), slow_auc(scores, labels, weights))
        assert close(auc(scores, labels), slow_auc(scores, labels, np.ones_like(labels)))
        assert close(gauc(scores, labels, weights, groups), slow_gauc(scores, labels, weights, groups))

    check()


@settings(max_examples=60, deadline=None)
@given(rows())
def test_log_loss_and_entropy_equal_scikit_learn(drawn: tuple[Any, Any, Any, Any]) -> None:
    _, labels, weights, _ = drawn
    logits = drawn[0] / 2  # scikit-learn takes probabilities, in which logits beyond 15 lose digits
    keep = weights > 0
    if not keep.any():
        assert math.isnan(log_loss(logits, labels, weights))
        return
    logits, labels, w = (column[keep].astype(np.float64) for column in (logits, labels, weights))
    probability = 1 / (1 + np.exp(-logits))
    expected = sk.log_loss(labels, probability, sample_weight=w, labels=[0, 1])
    assert close(log_loss(drawn[0] / 2, *drawn[1:3]), expected, 1e-6)
    rate = np.average(labels, weights=w)
    entropy = sk.log_loss(labels, np.full(len(labels), rate), sample_weight=w, labels=[0, 1])
    assert close(normalised_entropy(drawn[0] / 2, *drawn[1:3]), expected / entropy if 0 < rate < 1 else NAN, 1e-6)


@settings(max_examples=60, deadline=None)
@given(rows(), st.sampled_from([0.0, 1000.0]))
def test_regression_metrics_equal_scikit_learn(drawn: tuple[Any, Any, Any, Any], shift: float) -> None:
    predicted, _, weights, groups = drawn
    labels = (np.sin(predicted * 3) + groups % 7 + shift).astype(np.float32)
    keep = weights > 0
    found = [f(predicted, labels, weights) for f in (rmse, mae, normalised_rmse, calibration)]
    if not keep.any():
        assert all(math.isnan(value) for value in found)
        return
    p, y, w = (column[keep].astype(np.float64) for column in (predicted, labels, weights))
    squared = sk.mean_squared_error(y, p, sample_weight=w)
    assert close(found[0], squared**0.5)
    assert close(found[1], sk.mean_absolute_error(y, p, sample_weight=w))
    spread = np.average((y - np.average(y, weights=w)) ** 2, weights=w)
    assert close(found[2], math.sqrt(squared / spread) if len(set(y)) > 1 else NAN, 1e-6)
    assert close(found[3], float((w * p).sum() / (w * y).sum()) if (w * y).sum() else NAN)


def test_calibration_of_a_binary_task_is_predicted_over_observed() -> None:
    logits, labels = torch.tensor([[0.0], [1.0], [-2.0]]), torch.tensor([[1.0], [0.0], [1.0]])
    weights = torch.tensor([[1.0], [2.0], [0.5]])
    metrics = TaskMetrics({"click": "binary"})
    metrics.update(logits, labels, weights, torch.zeros(3, dtype=torch.int64))
    expected = (torch.sigmoid(logits) * weights).sum() / (labels * weights).sum()
    assert metrics.compute()["click"]["calibration"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_leaves_order_and_entropy_undefined(label: float) -> None:
    scores, labels = np.array([1.0, -1.0, 3.0]), np.full(3, label)
    assert math.isnan(auc(scores, labels))
    assert math.isnan(gauc(scores, labels, None, np.zeros(3, np.int64)))
    assert math.isnan(normalised_entropy(scores, labels))
    assert log_loss(scores, labels) == pytest.approx(sk.log_loss(labels, 1 / (1 + np.exp(-scores)), labels=[0, 1]))


@pytest.mark.parametrize("masked", [False, True])
def test_no_rows_and_all_masked_give_nan_and_count_zero(masked: bool) -> None:
    metrics = TaskMetrics(KINDS)
    if masked:
        scores = torch.tensor([[1.0, NAN, 2.0], [0.0, 1.0, NAN]])
        metrics.update(scores, torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    for values in metrics.compute().values():
        assert values.pop("rows") == values.pop("weight") == values.pop("positives", 0) == 0


def test_large_logits_lose_no_digits() -> None:
    logits, labels = np.array([50.0, -800.0, 800.0]), np.array([0, 0, 1])
    assert log_loss(logits, labels) == pytest.approx(50 / 3, rel=1e-12)
    assert log_loss(np.array([np.inf, -np.inf]), np.array([1, 0])) == 0
    assert log_loss(np.array([np.inf]), np.array([0])) == np.inf


@pytest.mark.parametrize("capacity", [2**20, 3])
def test_non_finite_scores_are_answered_without_raising(capacity: int) -> None:
    scores = torch.tensor([[NAN, NAN, math.inf], [1.0, 2.0, -math.inf], [0.0, 1.0, 0.0], [-1.0, 0.0, 3e38]])
    labels = torch.tensor([[0.0, 1.0, 1.0], [1.0, 2.0, 0.0], [0.0, 3.0, 0.0], [1.0, 1.0, 1.0]])
    metrics = TaskMetrics(KINDS, capacity=capacity)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.update(scores, labels, torch.ones(4, 3), torch.tensor([1, 1, 2, 2]))
        metrics.update(scores[1:], labels[1:], torch.ones(3, 3), torch.tensor([1, 2, 2]))
        found = metrics.compute()
    assert all(math.isnan(found["click"][name]) for name in ("auc", "gauc", "log_loss", "calibration"))
    assert all(math.isnan(found["watch"][name]) for name in ("rmse", "mae", "normalised_rmse", "calibration"))
    assert found["like"]["auc"] == 1.0  # infinities have their place in the order
    assert found["like"]["rows"] == 7


def test_equal_labels_have_no_constant_to_beat() -> None:
    labels = np.full(1000, 0.1, np.float32)
    assert math.isnan(normalised_rmse(np.zeros(1000, np.float32), labels))
    assert normalised_rmse(np.zeros(1001), np.append(labels, np.float32(0.1000001))) > 1


@settings(max_examples=30, deadline=None)
@given(rows(), st.integers(0, 60), st.sampled_from(["binary", "regression"]))
def test_merged_sums_are_the_sums_of_all(drawn: tuple[Any, Any, Any, Any], cut: int, kind: Any) -> None:
    scores, labels, weights, _ = drawn
    labels = labels + (1000 if kind == "regression" else 0)
    parts = [task_sums(kind, scores[part], labels[part], weights[part]) for part in (slice(cut), slice(cut, None))]
    whole = task_sums(kind, scores, labels, weights)
    np.testing.assert_allclose(merge_sums(*parts), whole, rtol=1e-9, atol=1e-9)
    assert len(whole) == len(SUMS)


def make(count: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """A click task with a skewed base rate, a regression, a rare task; masks, weights and groups."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(count, 3, generator=generator) - torch.tensor([1.5, 0.0, 4.0])
    labels = (torch.rand(count, 3, generator=generator) < torch.sigmoid(truth)).float()
    labels[:, 1] = truth[:, 1] + torch.randn(count, generator=generator)
    scores = truth + torch.randn(count, 3, generator=generator)
    weights = torch.randint(0, 3, (count, 3), generator=generator).float() / 2
    groups = torch.randint(0, max(count // 20, 1), (count,), generator=generator)
    return scores, labels, weights, groups


def expected_of(columns: tuple[torch.Tensor, ...]) -> dict[str, dict[str, float]]:
    """The same metrics from scikit-learn and NumPy, on all rows at once."""
    scores, labels, weights = (part.double().numpy() for part in columns[:3])
    found: dict[str, dict[str, float]] = {}
    for k, (name, kind) in enumerate(KINDS.items()):
        keep = weights[:, k] > 0
        x, y, w = scores[keep, k], labels[keep, k], weights[keep, k]
        if kind == "binary":
            p = 1 / (1 + np.exp(-x))
            found[name] = {
                "auc": sk.roc_auc_score(y, x, sample_weight=w),
                "log_loss": sk.log_loss(y, p, sample_weight=w),
                "calibration": (w * p).sum() / (w * y).sum(),
            }
        else:
            found[name] = {
                "rmse": sk.mean_squared_error(y, x, sample_weight=w) ** 0.5,
                "mae": sk.mean_absolute_error(y, x, sample_weight=w),
                "normalised_rmse": (1 - sk.r2_score(y, x, sample_weight=w)) ** 0.5,
            }
        found[name] |= {"rows": keep.sum(), "weight": w.sum()}
    return found


def feed(metrics: Any, columns: tuple[torch.Tensor, ...], size: int) -> None:
    for start in range(0, len(columns[0]), size):
        metrics.update(*(part[start : start + size] for part in columns))


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, NaN being equal to NaN."""
    return repr(a) == repr(b)


def test_below_the_capacity_everything_is_exact() -> None:
    columns = make(20_000)
    metrics = TaskMetrics(KINDS)
    feed(metrics, columns, 777)
    found = metrics.compute()
    for task, values in expected_of(columns).items():
        for name, value in values.items():
            assert found[task][name] == pytest.approx(value, rel=1e-9), (task, name)
    scores, labels, weights, groups = (part.numpy() for part in columns)
    assert found["click"]["gauc"] == pytest.approx(gauc(scores[:, 0], labels[:, 0], weights[:, 0], groups), rel=1e-12)


def test_beyond_the_capacity_the_histogram_agrees_to_1e_6() -> None:
    columns = make(1_500_000)
    metrics = TaskMetrics(KINDS, grouped=False, capacity=400_000)
    feed(metrics, columns, 100_000)
    found = metrics.compute()
    for task, values in expected_of(columns).items():
        for name, value in values.items():
            assert found[task][name] == pytest.approx(value, rel=0 if name == "auc" else 1e-9, abs=1e-6), (task, name)


def test_beyond_the_capacity_gauc_is_the_weighted_mean_of_the_folds() -> None:
    columns = make(3000)
    metrics = TaskMetrics(KINDS, capacity=1000)
    feed(metrics, columns, 1000)
    scores, labels, weights, groups = (part.numpy() for part in columns)
    shifted = groups + np.arange(3000) // 1000 * 10_000  # a group of each fold by itself
    assert metrics.compute()["like"]["gauc"] == pytest.approx(
        slow_gauc(scores[:, 2], labels[:, 2], weights[:, 2], shifted), rel=1e-9
    )


@pytest.mark.parametrize("capacity", [2**20, 700])
def test_merging_equals_seeing_all_rows(capacity: int) -> None:
    columns = make(2000)
    parts = [TaskMetrics(KINDS, grouped=False, capacity=capacity) for _ in range(3)]
    for part, rows_of in zip(parts, (slice(1100), slice(1100, None), slice(None)), strict=True):
        feed(part, tuple(column[rows_of] for column in columns), 250)
    parts[0].merge(parts[1])
    # Ties within a bin move AUC by less than 1e-4 on 2000 rows.
    for task, values in parts[2].compute().items():
        assert parts[0].compute()[task] == pytest.approx(values, rel=1e-9 if capacity > 2000 else 1e-4), task
    with pytest.raises(ConfigError, match="merge those of one schema"):
        parts[0].merge(TaskMetrics({"click": "binary"}))


@pytest.mark.parametrize("capacity", [2**20, 300])
def test_a_resumed_run_equals_the_uninterrupted_one(capacity: int) -> None:
    columns = (*make(1000), torch.arange(1000) * (DAY_US // 400))
    unbroken, first, second = (ProgressiveMetrics(KINDS, capacity=capacity) for _ in range(3))
    head, tail = tuple(c[:500] for c in columns), tuple(c[500:] for c in columns)
    feed(unbroken, head, 70)
    feed(first, head, 70)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    feed(first, tail, 70)  # the saved state must not be written to by what follows
    second.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    for part in (unbroken, second):
        feed(part, tail, 70)
    for reading in ("run", "last_day", "window", "window"):
        assert same(getattr(second, reading)(), getattr(unbroken, reading)()), reading
    assert second.day == unbroken.day == iso_day(2)


def test_a_state_of_other_tasks_is_refused() -> None:
    state = TaskMetrics(KINDS).state_dict()
    with pytest.raises(CheckpointError, match=r"click \(binary, grouped\).*resume with the schema"):
        TaskMetrics({"like": "binary", "watch": "regression", "click": "binary"}).load_state_dict(state)


def test_window_run_and_day() -> None:
    columns = make(900)
    # Days 0, 1 and 2 with stragglers: rows of day 1 among those of day 2, and a batch that straddles midnight.
    day = torch.cat([torch.zeros(250), torch.ones(350), torch.arange(300) % 3 != 0]).long()
    day[600:] += 1
    time = day * DAY_US + torch.arange(900)
    progress = ProgressiveMetrics(KINDS)
    assert progress.day is None
    feed(progress, (*(c[:400] for c in columns), time[:400]), 100)

    def alone(index: torch.Tensor) -> Any:
        metrics = TaskMetrics(KINDS)
        metrics.update(*(c[index] for c in columns))
        return metrics.compute()

    every = torch.arange(900)
    assert same(progress.window(), alone(every[:400]))
    assert same(progress.last_day(), alone(every[250:400]))
    assert progress.day == "1970-01-02"
    feed(progress, (*(c[400:] for c in columns), time[400:]), 100)
    assert same(progress.window(), alone(every[400:]))
    assert same(progress.run(), alone(every))
    assert same(progress.last_day(), alone(every[day == 2]))
    assert progress.day == "1970-01-03"
    assert progress.window()["click"]["rows"] == 0


def test_updates_keep_a_copy() -> None:
    scores, labels, weights, groups = make(50)
    metrics = TaskMetrics(KINDS)
    metrics.update(scores.requires_grad_(), labels, weights, groups)
    before = metrics.compute()
    with torch.no_grad():
        scores.zero_()
    labels.fill_(1)
    assert same(metrics.compute(), before)


def test_a_perfect_model_attains_what_the_truth_does() -> None:
    truth = torch.tensor([[0.0, 2.5], [1.0, -1.0], [0.25, 0.0]])
    scores = as_scores(truth, ["binary", "regression"])
    assert scores[:, 0].tolist() == [-math.inf, math.inf, pytest.approx(math.log(1 / 3))]
    assert scores[:, 1].tolist() == [2.5, -1.0, 0.0]


def test_misshapen_input_is_named() -> None:
    one = torch.ones(4, 1)
    with pytest.raises(ConfigError, match=r"expected scores, labels and weights of shape \[rows, 3\]"):
        TaskMetrics(KINDS).update(one, one, one, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="capacity of 1 row or more, got 0"):
        TaskMetrics(KINDS, capacity=0)


def test_share_of_the_attainable() -> None:
    assert share_attainable("auc", 0.5, 0.7) == 0
    assert share_attainable("auc", 0.7, 0.7) == share_attainable("normalised_rmse", 0.6, 0.6) == 1
    assert share_attainable("normalised_rmse", 1.0, 0.6) == 0
    assert share_attainable("normalised_rmse", 1.1, 0.6) < 0
    assert share_attainable("normalised_entropy", 0.9, 0.8) == pytest.approx(0.5)
    assert math.isnan(share_attainable("auc", 0.6, 0.5))
    assert math.isnan(share_attainable("normalised_rmse", 0.9, 1.0))
    assert math.isnan(share_attainable("rmse", 0.9, 0.5))
