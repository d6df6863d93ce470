"""Several runs side by side: in one table, and on one page."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import replace, writing
from ..runs import RunFolder
from ..settings import flatten
from . import markup
from .overlay import draw_runs
from .plots import look
from .records import read_summary
from .words import VERDICTS, format_number, is_number, verdict_words

MAIN_METRIC = {"binary": "auc", "regression": "normalised_rmse"}
"""The one metric by which a task of each kind is compared: higher is better for AUC, lower for normalised RMSE."""
_SHOWN = {"auc": "AUC", "normalised_rmse": "NRMSE"}
_DIFFERENCES_SHOWN = 40


def compare(runs: Sequence[RunFolder | str | Path]) -> list[dict[str, Any]]:
    """Return one row for each run, all with the same columns in the same order.

    Args:
        runs: Run folders, or their paths.

    Returns:
        Rows with "run", "optimizer", "status", "verdict" (the worst of its tasks) and "rows"; for each task of any of
        the runs "AUC <task>" or "NRMSE <task>" over the whole run; and "rows per second". None where a run does not
        have it; a run that goes on or was killed has the status "unfinished".

    Raises:
        CheckpointError: A path is no run folder.
    """
    found = []
    for folder in map(_open, runs):
        summary = read_summary(folder) or {"status": "unfinished"}
        found.append(
            {
                "run": folder.path.name,
                "optimizer": summary.get("optimizer", {}).get("dense"),
                "status": summary.get("status"),
                "verdict": _worst(summary.get("tasks", {})),
                "rows": summary.get("rows"),
                **_scores(summary.get("tasks", {})),
                "rows per second": summary.get("rows_per_s"),
            }
        )
    columns = dict.fromkeys(name for row in found for name in row if name != "rows per second")
    return [{name: row.get(name) for name in (*columns, "rows per second")} for row in found]


def write_comparison(runs: Sequence[RunFolder | str | Path], target: str | Path) -> Path:
    """Write one self-contained HTML page with the curves of several runs over one another.

    Args:
        runs: Run folders, or their paths; up to ten have colours of their own, further ones are dashed.
        target: The page to write; one that is there is replaced.

    Returns:
        The page's path.

    Raises:
        CheckpointError: A path is no run folder, or is damaged.
        ConfigError: There is no run, or the page cannot be written.
    """
    folders, target = [_open(run) for run in runs], Path(target)
    if not folders:
        raise ConfigError("give at least one run folder to compare")
    names = _names(folders)
    summaries = [read_summary(folder) for folder in folders]
    page = markup.fill(
        "compare.html.j2",
        draw_runs(dict(zip(names, folders, strict=True))),
        runs=[(name, look(place)[0]) for place, name in enumerate(names)],
        facts=[(title, [_fact(summary, title) for summary in summaries]) for title in ("Optimizer", "Status", "Steps")],
        tasks=_task_rows(summaries),
        differences=_differences(folders)[:_DIFFERENCES_SHOWN],
    )
    with writing(target, ConfigError, "choose another --out"):
        replace(target, page)
    return target


def _open(run: RunFolder | str | Path) -> RunFolder:
    return run if isinstance(run, RunFolder) else RunFolder.open(run)


def _scores(tasks: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{_SHOWN[MAIN_METRIC[of['kind']]]} {name}": _score(of) for name, of in tasks.items()}


def _score(task: Mapping[str, Any]) -> Any:
    return task.get("run", {}).get(MAIN_METRIC[task["kind"]])


def _worst(tasks: Mapping[str, Any]) -> str | None:
    """Return the worst verdict of a run's tasks in words, with the task's name; None where it kept none."""
    kinds = {name: task["verdict"].get("verdict") for name, task in tasks.items() if task.get("verdict")}
    worst = next((kind for kind in VERDICTS if kind in kinds.values()), None)
    if worst is None:
        return None
    named = [name for name, kind in kinds.items() if kind == worst]
    return VERDICTS[worst][1].lower() + ("" if worst == "healthy" else f": {', '.join(named)}")


def _names(folders: Sequence[RunFolder]) -> list[str]:
    """Return the folders' names, with as many parents as it takes to tell them apart.

    >>> _names([RunFolder("a/run"), RunFolder("b/run")])
    ['a/run', 'b/run']
    """
    parts = [folder.path.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i}: {folder.path.name}" for i, folder in enumerate(folders, start=1)]


def _fact(summary: Mapping[str, Any], title: str) -> str:
    if title == "Optimizer":
        return str(summary.get("optimizer", {}).get("dense", "–"))
    if title == "Status":
        return str(summary.get("status", "unfinished"))
    return f"{summary['steps']:,}" if is_number(summary.get("steps")) else "–"


def _task_rows(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each task: in each run its score, whether that is the best, and its verdict."""
    rows = []
    for name in dict.fromkeys(task for summary in summaries for task in summary.get("tasks", {})):
        outcomes = [summary.get("tasks", {}).get(name) for summary in summaries]
        metric = next(MAIN_METRIC[outcome["kind"]] for outcome in outcomes if outcome)
        scores = [_score(outcome) if outcome else None for outcome in outcomes]
        known = [score for score in scores if is_number(score)]
        best = (max if metric == "auc" else min)(known, default=None)
        cells = [
            {"score": format_number(score), "best": score == best is not None and len(known) > 1}
            | dict(zip(("verdict", "mark"), verdict_words((outcome or {}).get("verdict")), strict=True))
            for score, outcome in zip(scores, outcomes, strict=True)
        ]
        rows.append({"name": name, "metric": _SHOWN[metric], "cells": cells})
    return rows


def _differences(folders: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """Return the settings in which the runs' configurations differ: the name, and each run's value."""
    configs = []
    for folder in folders:
        try:
            configs.append(
                flatten(tomllib.loads(folder.config_text())) if (folder.path / "config.toml").exists() else {}
            )
        except tomllib.TOMLDecodeError:
            configs.append({})
    names = dict.fromkeys(name for config in configs for name in config if name != "name")
    rows = [(name, [str(config.get(name, "–")) for config in configs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
