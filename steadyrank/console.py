"""What a person sees of a run in the terminal: how far it is, and tables."""

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from .metrics import Metrics, share_attainable
from .monitors.cause import Cause
from .parts import OnProgress, Parts
from .parts import Progress as RunProgress
from .terminal import console, escape, say

_FEW_POSITIVES = 1_000
_FEATURES, _COLUMNS = 5, 5


def start_line(parts: Parts) -> str:
    """Say what is about to be trained, and whether the optimizers' bounds do anything."""
    sizes, optimizers = parts.facts["parameters"], parts.facts["optimizer"]
    return "\n".join(
        [
            f"{parts.name}: {parts.reader.rows:,} rows, {len(parts.schema.features)} features, "
            f"{len(parts.schema.tasks)} tasks; {sizes['dense']:,} dense parameters by {optimizers['dense']}"
            + (f", {sizes['embedding']:,} in tables by {optimizers['tables']}" if "tables" in optimizers else ""),
            *([parts.facts["ranks"]["words"]] if "ranks" in parts.facts else []),
            *([parts.facts["precision"]] if "precision" in parts.facts else []),
            *(f"bound of optimizer.{part}: {line}" for part, line in parts.facts.get("bound", {}).items()),
        ]
    )


@contextmanager
def training_bar(rows: int) -> Iterator[OnProgress]:
    """Show how far a run is, the time left, its rate, and loss and AUC so far of as many tasks as fit."""
    columns = (
        TextColumn("[bold]training"),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    shown = max(1, (console.width - 56) // 28)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=rows, now="")

        def show(now: RunProgress) -> None:
            parts = [f"{now.rows_per_s:,.0f} rows/s"]
            for name in list(now.losses)[:shown]:
                auc = f" AUC {now.auc[name]:.3f}" if name in now.auc else ""
                parts.append(f"{escape(name)} loss {now.losses[name]:.3f}{auc}")
            progress.update(task, completed=now.rows, now=", ".join(parts))

        yield show


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print a run's final table: every row was scored before it was learned."""
    tasks = summary["tasks"]
    attainable = any("attainable" in task for task in tasks.values())
    table = Table(
        title=f"{escape(summary['name'])}: {summary['status']}, {summary['rows']:,} rows, each scored before learned",
        box=box.SIMPLE_HEAD,
    )
    for column in ("task", "", "run", "last day", "baseline", "better by"):
        table.add_column(column, justify="left" if column in ("task", "", "baseline") else "right", no_wrap=True)
    if attainable:
        table.add_column("of attainable", justify="right")
    for name, task in tasks.items():
        metric = "auc" if task["kind"] == "binary" else "rmse"
        cells = [_number(task["run"][metric]), _number(task["last_day"][metric])]
        cells += [f"{_number(task['baseline'][metric])} {escape(task['baseline']['feature'])}", _better(gain(task))]
        if attainable:
            cells.append(_attainable(task, metric))
        table.add_row(escape(name), metric.upper(), *cells)
    console.print(table)
    for name, task in tasks.items():
        if not gain(task) > 0:
            console.print(f"[yellow]{escape(name)}[/]: {why_not(task)}")
    for line in (survival(summary), summary.get("slow_rank")):
        if line:
            say(line)


def survival(summary: Mapping[str, Any]) -> str:
    """Say what the guard and the recovery did in a run; "" where there was nothing to do."""
    recovery = summary.get("recovery", {})
    done = [f"{count} bad steps left out"] if (count := summary.get("bad_steps", 0)) else []
    done += [f"{count} x {rung}" for rung, count in recovery.get("actions", {}).items() if rung != "skip"]
    if rows := recovery.get("rows_skipped"):
        done.append(f"{rows:,} rows neither learned nor scored")
    return f"survived: {', '.join(done)}" if done else ""


def gain(task: Mapping[str, Any], part: str = "run", baseline: str = "baseline") -> float:
    """Return by how much a task beats its baseline: AUC gained, or RMSE saved."""
    if task["kind"] == "binary":
        return float(task[part]["auc"] - task[baseline]["auc"])
    return float(task[baseline]["rmse"] - task[part]["rmse"])


def why_not(task: Mapping[str, Any]) -> str:
    """Say by how much a task does not beat its baseline, and what in the log explains it."""
    short, run = gain(task), task["run"]
    if math.isnan(short):
        return "no verdict: its label never varies, or is always masked, so that nothing can be ranked"
    text = f"does not beat the running mean of {escape(task['baseline']['feature'])}, by {-short:.4f}"
    last = gain(task, "last_day", "baseline_last_day")
    if last > 0:
        return f"{text}; it does on the last day, by {last:.4f}: the model learns more slowly than a mean counts"
    if task["kind"] == "binary" and run["positives"] < _FEW_POSITIVES:
        return f"{text}; with {run['positives']:,.0f} positive labels in one pass there is little to learn from"
    return f"{text}, nor on the last day; try another rate, or a loss weight above 1"


def print_evaluation(tasks: Metrics, days: Mapping[str, Metrics], kinds: Mapping[str, str], rows: int) -> None:
    """Print the metrics of a log by task, then by day."""
    for kind, metrics in (
        ("binary", ("auc", "gauc", "log_loss", "normalised_entropy", "calibration")),
        ("regression", ("rmse", "mae", "normalised_rmse")),
    ):
        names = [name for name in tasks if kinds[name] == kind]
        if names:
            table = Table(title=f"{rows:,} rows, {kind} tasks", box=box.SIMPLE_HEAD)
            table.add_column("task")
            for metric in metrics:
                table.add_column(metric, justify="right")
            for name in names:
                table.add_row(escape(name), *(_number(tasks[name].get(metric, math.nan)) for metric in metrics))
            console.print(table)
    if len(days) > 1:
        table = Table(title="by day (AUC, or RMSE of a regression)", box=box.SIMPLE_HEAD)
        table.add_column("day")
        for name in tasks:
            table.add_column(escape(name), justify="right")
        for day, of in days.items():
            table.add_row(day, *(_number(of[name]["auc" if kinds[name] == "binary" else "rmse"]) for name in tasks))
        console.print(table)


def print_slices(slices: Mapping[int, Metrics], kinds: Mapping[str, str], feature: str) -> None:
    """Print the metrics of each value of an id feature: its row in the feature's table, 0 for null."""
    print_rows(
        [
            {feature: value, **{t: m["auc" if kinds[t] == "binary" else "rmse"] for t, m in of.items()}}
            for value, of in slices.items()
        ],
        f"by {feature} (AUC, or RMSE of a regression)",
    )


def print_rows(rows: list[dict[str, Any]], title: str) -> None:
    """Print dictionaries of one shape as a table, each a row."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in rows[0]:
        table.add_column(escape(column), justify="right" if isinstance(rows[0][column], int | float) else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def print_cause(cause: Cause) -> None:
    """Print what stood behind a step: a sentence, the unusual features, and the rows that push hardest."""
    say(f"step {cause.step}: {cause.sentence}")
    if cause.features:
        table = Table(title="what is unusual about the batch", box=box.SIMPLE_HEAD)
        for column in ("feature", "value", "now", "usual", "score", "rows that hold it"):
            table.add_column(column, justify="left" if column in ("feature", "value") else "right")
        for feature in cause.features[:_FEATURES]:
            value = "" if feature.value is None else _cell(feature.value)
            numbers = [_number(number) for number in (feature.now, feature.usual, feature.score)]
            name = escape(f"{feature.feature} ({feature.view})")
            table.add_row(name, value, *numbers, f"{feature.held_frac:.0%}")
        console.print(table)
    rows = [
        {"row": row.row, "loss": row.loss, "gradient": row.gradient, "task": row.task, **_few(row.columns)}
        for row in cause.rows
    ]
    if rows:
        print_rows(rows, "the rows that push the weights hardest")


def _few(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first plain columns of a row of the log: a terminal holds no more, and no lists."""
    plain = {name: value for name, value in columns.items() if isinstance(value, str | int | float)}
    return dict(itertools.islice(plain.items(), _COLUMNS))


def print_columns(rows: list[dict[str, Any]], title: str) -> None:
    """Print dictionaries of one shape side by side, each a column: many facts about few things."""
    first, *others = rows[0]
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("")
    for row in rows:
        table.add_column(_cell(row[first]), justify="right", overflow="fold")
    for name in others:
        table.add_row(escape(name), *(_cell(row[name]) for row in rows))
    console.print(table)


def _cell(value: Any) -> str:
    return (
        _number(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else escape(str(value))
    )


def _attainable(task: Mapping[str, Any], metric: str) -> str:
    measure = "auc" if metric == "auc" else "normalised_rmse"
    share = share_attainable(measure, task["run"][measure], task["attainable"][measure])
    return "-" if math.isnan(share) else f"{share:.0%}"


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"


def _better(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"[{'green' if value > 0 else 'yellow'}]{value:+.4f}[/]"
