"""Readings of several ranks as one: each sees its own rows of a batch, and of a sharded table what it holds."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product

from ..ranks import Ranks

Write = Callable[[str, int, Mapping[str, float]], None]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


_OF_ROWS: dict[str, Callable[[Sequence[float]], float]] = {
    "logit_low": min,
    "logit_high": max,
    "saturated_frac": _mean,
    "expert_load_frac": _mean,
    "gate_entropy_frac": _mean,
}
_OF_TABLES: dict[str, Callable[[Sequence[float]], float]] = {"rows_touched": sum, "row_update_max": max}
_NORM, _SHARE, _COSINE = "task_gradient_norm/", "task_share_frac/", "task_cosine/"
_LONGEST = "row_norm_max"
_OF_THE_LONGEST = (_LONGEST, "row_norm_max_row", "row_norm_max_age_steps")


def merge_rows(rows: Sequence[Mapping[str, float]], sharded: bool) -> dict[str, float]:
    """Return one row of readings for those that the ranks made of one step.

    Extremes and the tasks' gradients are exact. Shares are means over ranks, whose rows are alike many. An effective
    rank is that of one rank's sample. What is of the whole batch already, as dead units are, is the same on all ranks:
    the first one's stands.

    Args:
        rows: By rank; what one lacks the others may have.
        sharded: Whether each rank has other rows of the tables.

    >>> merge_rows([{"logit_high/click": 1.0, "rows_touched/item": 3.0}, {"logit_high/click": 2.0}], sharded=True)
    {'logit_high/click': 2.0, 'rows_touched/item': 3.0}
    """
    merged = {name: value for row in reversed(rows) for name, value in row.items()}
    order = {name: None for row in rows for name in row}
    rules = {**_OF_ROWS, **(_OF_TABLES if sharded else {})}
    for name in order:
        area, _, of = name.partition("/")
        if area in rules:
            given = [row[name] for row in rows if name in row]
            known = [value for value in given if not math.isnan(value)]
            # Of a table a NaN says that there was no row; of anything else that something is wrong.
            merged[name] = rules[area](known if area in _OF_TABLES else given) if known else math.nan
        elif sharded and area == _LONGEST:
            there = [row for row in rows if not math.isnan(row.get(name, math.nan))]
            longest: Mapping[str, float] = max(there, key=lambda row: row[name], default={})
            merged |= {f"{each}/{of}": longest.get(f"{each}/{of}", math.nan) for each in _OF_THE_LONGEST}
    merged |= _merge_tasks(rows)
    return {name: merged[name] for name in order}


def _merge_tasks(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return norms, shares and cosines of the tasks' gradients at what they share, each rank having some of its rows.

    Their products add up over rows: g_i . g_j = sum_r cos_ij |g_i| |g_j|; the rest is made of them.
    """
    tasks = [name.removeprefix(_NORM) for name in rows[0] if name.startswith(_NORM)]
    products = dict.fromkeys(product(tasks, tasks), 0.0)
    for row in rows if tasks else ():
        norms = {task: row.get(_NORM + task, 0.0) for task in tasks}
        for i, j in products:
            cosine = 1.0 if i == j else row.get(f"{_COSINE}{i}|{j}", row.get(f"{_COSINE}{j}|{i}", math.nan))
            products[i, j] += cosine * norms[i] * norms[j] if norms[i] and norms[j] else 0.0  # NaN where either is 0
    total = sum(products.values())
    norms = {task: math.sqrt(products[task, task]) for task in tasks}
    merged = {_NORM + task: norm for task, norm in norms.items()}
    for i in tasks:
        merged[_SHARE + i] = sum(products[i, j] for j in tasks) / total if total else math.nan
    for i, j in products:
        size = norms[i] * norms[j]
        merged[f"{_COSINE}{i}|{j}"] = products[i, j] / size if size else math.nan
    return merged


class Merger:
    """Takes the readings of each rank's instruments, and writes them as one on the first.

    Args:
        write: Takes a table, a step and a row of readings.
        ranks: Who trains together; all read at the same steps.
        sharded: Whether each rank has other rows of the tables.
    """

    def __init__(self, write: Write, ranks: Ranks, sharded: bool) -> None:
        self._write, self._ranks, self._sharded = write, ranks, sharded
        self._held: list[tuple[str, int, dict[str, float]]] = []

    def add(self, table: str, step: int, row: Mapping[str, float]) -> None:
        """Take a row of this rank."""
        self._held.append((table, step, dict(row)))

    def flush(self) -> None:
        """Write what was taken; a collective."""
        held, self._held = self._held, []
        of: dict[tuple[str, int], list[dict[str, float]]] = {}
        for each in self._ranks.collect(held):
            for table, step, row in each:
                of.setdefault((table, step), []).append(row)
        for (table, step), rows in of.items():
            self._write(table, step, merge_rows(rows, self._sharded))
