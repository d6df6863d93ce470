"""Evaluation of a frozen model, and the running means that a model has to beat."""

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steadyrank.baselines import GLOBAL, RunningMean, best
from steadyrank.errors import CheckpointError, ConfigError
from steadyrank.evaluate import SCORE_ROWS, evaluate, score
from steadyrank.metrics import DAY_US, TaskMetrics
from steadyrank.schema import Batch, Schema

SCHEMA = Schema.model_validate(
    {
        "group": "user",
        "baseline": ["user", "item"],
        "features": {
            "country": {"kind": "id", "rows": 4},
            "user": {"kind": "id", "rows": 9},
            "item": {"kind": "id", "rows": 20, "width": 8},
        },
        "tasks": {"click": {"kind": "binary"}, "watch": {"kind": "regression"}},
    }
)


def make(count: int, seed: int = 0, first_day: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    own = [torch.randint(0, SCHEMA.slot(name).rows, (count,), generator=generator) for name in SCHEMA.id_features]
    ids = torch.stack([row + SCHEMA.slot(name).start for row, name in zip(own, SCHEMA.id_features, strict=True)], 1)
    labels = torch.randint(0, 2, (count, 2), generator=generator).float()
    labels[:, 1] = torch.randn(count, generator=generator) + own[2] / 10
    weights = torch.randint(0, 3, (count, 2), generator=generator) / 2
    return Batch(
        ids=ids,
        lists=(),
        numbers=torch.zeros(count, 0),
        positions=torch.zeros(count, 0, dtype=torch.int64),
        labels=torch.where(weights > 0, labels, 0),
        weights=weights,
        time=first_day * DAY_US + torch.arange(count) * (2 * DAY_US // max(count, 1)),
        group=own[1],
    )


class Fixed(nn.Module):
    """Scores that depend on the row alone, and on the mode, so that a wrong mode shows."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.frozen = nn.Dropout()
        self.outputs = outputs

    def forward(self, batch: Batch) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        steps = (batch.ids[:, 2:] * 7 % 11).float() * torch.tensor([1.0, 0.1])
        return (steps - 3 + 100 * self.training)[:, : self.outputs]


def same(a: Any, b: Any) -> bool:
    return repr(a) == repr(b)


def alone(batch: Batch) -> dict[str, dict[str, float]]:
    metrics = TaskMetrics({"click": "binary", "watch": "regression"})
    metrics.update(
        (batch.ids[:, 2:] * 7 % 11).float() * torch.tensor([1.0, 0.1]) - 3, batch.labels, batch.weights, batch.group
    )
    return metrics.compute()


def test_evaluate_by_task_day_and_slice() -> None:
    whole = make(400, first_day=19_000)
    model = Fixed().train()
    model.frozen.eval()
    parts = [whole.take(torch.arange(start, min(start + 90, 400))) for start in range(0, 400, 90)]
    found = evaluate(model, iter(parts), SCHEMA, slice_by="country")
    assert found.rows == 400
    assert same(found.tasks, alone(whole))
    assert list(found.days) == ["2022-01-08", "2022-01-09"]
    for offset, metrics in enumerate(found.days.values()):
        assert same(metrics, alone(whole.take(torch.nonzero(whole.time // DAY_US == 19_000 + offset)[:, 0])))
    assert list(found.slices) == [0, 1, 2, 3, 4]
    for value, metrics in found.slices.items():
        assert same(metrics, alone(whole.take(torch.nonzero(whole.ids[:, 0] == value)[:, 0])))
    assert (model.training, model.frozen.training) == (True, False)
    assert found.attainable is None


def test_evaluate_without_rows() -> None:
    found = evaluate(Fixed(), [], SCHEMA)
    assert (found.rows, found.days, found.slices) == (0, {}, {})
    assert math.isnan(found.tasks["click"]["auc"])
    assert evaluate(Fixed(), [make(0)], SCHEMA).rows == 0


def test_evaluate_gives_the_attainable_metrics_of_a_generated_stream() -> None:
    batch = make(50)
    truth = torch.stack([batch.labels[:, 0] * 0.8 + 0.1, batch.labels[:, 1]], 1)
    found = evaluate(Fixed(), [replace(batch, truth=truth)], SCHEMA)
    assert found.attainable is not None
    assert found.attainable["click"]["auc"] == 1.0
    assert found.attainable["click"]["log_loss"] == pytest.approx(-math.log(0.9), rel=1e-6)
    assert found.attainable["watch"]["rmse"] == 0.0
    assert same(found.tasks, alone(batch))


def test_evaluate_restores_the_mode_after_an_error() -> None:
    model = Fixed(outputs=1).train()
    with pytest.raises(ConfigError, match=r"expected outputs of shape \[5, 2\] .* from Fixed, got \[5, 1\]"):
        evaluate(model, [make(5)], SCHEMA)
    assert model.training


def test_slices_need_a_small_id_feature() -> None:
    with pytest.raises(ConfigError, match="did you mean 'country'"):
        evaluate(Fixed(), [], SCHEMA, slice_by="contry")
    large = Schema.model_validate(
        {"features": {"user": {"kind": "id", "rows": 10**6}}, "tasks": {"t": {"kind": "binary"}}}
    )
    with pytest.raises(ConfigError, match="'user' has 1,000,000; choose one with fewer"):
        evaluate(Fixed(), [], large, slice_by="user")


def test_running_means_equal_a_slow_loop() -> None:
    baseline, prior = RunningMean(SCHEMA, prior=3.0), 3.0
    seen: list[tuple[list[int], list[float], list[float]]] = []
    for step in range(6):
        batch = make(40, seed=step)
        found = baseline.score(baseline.labelled(batch))
        assert list(found) == [GLOBAL, "user", "item"]
        for name, column in (("user", 1), ("item", 2)):
            for i in range(0, 40, 7):
                for k, start in enumerate((0.5, 0.0)):
                    total = sum(w[k] * y[k] for _, y, w in seen)
                    mean = (total + start) / (sum(w[k] for _, _, w in seen) + 1)
                    own = [(y, w) for ids, y, w in seen if ids[column] == int(batch.ids[i, column])]
                    value = sum(w[k] * y[k] for y, w in own) + prior * mean
                    value /= sum(w[k] for _, w in own) + prior
                    pair = [mean, value] if k else [math.log(p / (1 - p)) for p in (mean, value)]
                    assert [found[GLOBAL][i, k].item(), found[name][i, k].item()] == pytest.approx(pair, abs=1e-6)
        baseline.learn(baseline.labelled(batch))
        seen += zip(batch.ids.tolist(), batch.labels.tolist(), batch.weights.tolist(), strict=True)


def test_running_means_ignore_masked_labels_and_stay_finite() -> None:
    baseline = RunningMean(SCHEMA)
    batch = make(30)
    before = baseline.score(baseline.labelled(batch))
    baseline.learn(
        baseline.labelled(replace(batch, weights=torch.zeros(30, 2), labels=torch.full((30, 2), float("nan"))))
    )
    assert all(torch.equal(scores, before[name]) for name, scores in baseline.score(baseline.labelled(batch)).items())
    for _ in range(50):
        baseline.learn(baseline.labelled(replace(batch, labels=torch.ones(30, 2), weights=torch.full((30, 2), 1e6))))
    assert all(scores.isfinite().all() for scores in baseline.score(baseline.labelled(batch)).values())
    assert baseline.score(baseline.labelled(batch))["user"][0, 1].item() == pytest.approx(1.0, rel=1e-6)


def test_running_means_resume_exactly() -> None:
    first, second = RunningMean(SCHEMA), RunningMean(SCHEMA)
    first.learn(first.labelled(make(30, 1)))
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    second.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    for baseline in (first, second):
        baseline.learn(baseline.labelled(make(30, 2)))
    batch = make(30, 3)
    for name, scores in first.score(first.labelled(batch)).items():
        assert torch.equal(scores, second.score(second.labelled(batch))[name])
    with pytest.raises(CheckpointError, match="expected running means of"):
        RunningMean(SCHEMA, ["country"]).load_state_dict(first.state_dict())


def test_running_means_refuse_what_they_cannot_use() -> None:
    with pytest.raises(ConfigError, match="no id feature 'usr'; did you mean 'user'"):
        RunningMean(SCHEMA, ["usr"])
    with pytest.raises(ConfigError, match="above 0 pseudo-rows, got 0"):
        RunningMean(SCHEMA, prior=0.0)
    named = Schema.model_validate({"features": {"global": {"kind": "id"}}, "tasks": {"t": {"kind": "binary"}}})
    with pytest.raises(ConfigError, match="rename that feature"):
        RunningMean(named, ["global"])


def test_best_takes_the_higher_auc_and_the_lower_rmse() -> None:
    nan = float("nan")
    values = {
        "global": {"click": {"auc": 0.5}, "watch": {"rmse": nan}, "like": {"auc": nan}},
        "user": {"click": {"auc": 0.6}, "watch": {"rmse": 0.9}, "like": {"auc": nan}},
        "item": {"click": {"auc": 0.7}, "watch": {"rmse": 1.1}, "like": {"auc": nan}},
    }
    assert best(values) == {"click": "item", "watch": "user", "like": "global"}
    assert best({}) == {}


def test_a_cpu_scores_few_rows_at_once_and_every_row_once() -> None:
    sizes: list[int] = []

    class Ids(nn.Module):
        def forward(self, batch: Batch) -> Tensor:
            sizes.append(len(batch))
            return batch.time[:, None].float().expand(-1, 2)

    batch = replace(make(2 * SCORE_ROWS + 10), time=torch.arange(2 * SCORE_ROWS + 10))
    model = Ids()
    assert torch.equal(score(model, batch, tasks=2)[:, 1], batch.time.float())
    assert (sizes, model.training) == ([SCORE_ROWS, SCORE_ROWS, 10], True)
    assert score(model, make(0), tasks=2).shape == (0, 2)
