"""What the terminal says of a task that does not beat its baseline: by how much, and why."""

import pytest

from steadyrank.console import gain, why_not


def task(kind: str, run: float, base: float, last: float, last_base: float, positives: float = 5000.0) -> dict:
    metric = "auc" if kind == "binary" else "rmse"
    return {
        "kind": kind,
        "run": {metric: run, "positives": positives},
        "last_day": {metric: last},
        "baseline": {"feature": "item", metric: base},
        "baseline_last_day": {metric: last_base},
    }


def test_gain_is_auc_won_or_rmse_saved() -> None:
    assert gain(task("binary", 0.7, 0.6, 0.7, 0.6)) == pytest.approx(0.1)
    assert gain(task("regression", 0.8, 1.0, 0.8, 1.0)) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (task("binary", 0.60, 0.65, 0.7, 0.6), "by 0.0500; it does on the last day, by 0.1000"),
        (task("binary", 0.60, 0.65, 0.6, 0.6, positives=42), "by 0.0500; with 42 positive labels in one pass"),
        (task("binary", 0.60, 0.65, 0.6, 0.6), "by 0.0500, nor on the last day"),
        (task("regression", 1.1, 1.0, 1.2, 1.1), "by 0.1000, nor on the last day"),
        (task("binary", float("nan"), float("nan"), 0.5, 0.5), "its label never varies"),
    ],
)
def test_the_reason_comes_from_the_log(found: dict, expected: str) -> None:
    assert expected in why_not(found)
