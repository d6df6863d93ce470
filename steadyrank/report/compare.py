"""Several runs in one table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runs import RunFolder

MAIN_METRIC = {"binary": "auc", "regression": "normalised_rmse"}
"""The one metric by which a task of each kind is compared: higher is better for AUC, lower for normalised RMSE."""
_SHOWN = {"auc": "AUC", "normalised_rmse": "NRMSE"}


def compare(runs: Sequence[RunFolder | str | Path]) -> list[dict[str, Any]]:
    """Return one row for each run, all with the same columns in the same order.

    Args:
        runs: Run folders, or their paths.

    Returns:
        Rows with "run", "optimizer", "status" and "rows"; for each task of any of the runs "AUC <task>" or
        "NRMSE <task>" over the whole run; and "rows per second". None where a run does not have it; a run that goes
        on or was killed has the status "unfinished".

    Raises:
        CheckpointError: A path is no run folder.
    """
    found = []
    for run in runs:
        folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
        summary = folder.summary() or {"status": "unfinished"}
        found.append(
            {
                "run": folder.path.name,
                "optimizer": summary.get("optimizer", {}).get("dense"),
                "status": summary.get("status"),
                "rows": summary.get("rows"),
                **_scores(summary.get("tasks", {})),
                "rows per second": summary.get("rows_per_s"),
            }
        )
    columns = dict.fromkeys(name for row in found for name in row if name != "rows per second")
    return [{name: row.get(name) for name in (*columns, "rows per second")} for row in found]


def _scores(tasks: dict[str, Any]) -> dict[str, Any]:
    scores = {}
    for name, task in tasks.items():
        metric = MAIN_METRIC[task["kind"]]
        scores[f"{_SHOWN[metric]} {name}"] = task.get("run", {}).get(metric)
    return scores
