"""Cause reports as the page shows them: the sentence, the tasks, the features that are unusual, and the worst rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from .records import shorten_name
from .words import format_number, is_number

SHOWN = 10
"""At most so many rows of each table."""
_LIES_IN = {"data": "the data", "state": "the state of the model", "both": "data and state together"}
_FEATURES = {
    "feature": "Feature",
    "view": "What is unusual",
    "value": "Value",
    "now": "Now",
    "usual": "Usually",
    "share_frac": "Of the worst rows",
    "usual_frac": "Of all rows",
    "held_frac": "In the batch's rows",
    "held_worst": "Of the worst rows",
    "score": "Deviations",
    "same_as": "Alike",
}
_VIEWS = {
    "share": "a value came up",
    "middle": "the middle moved",
    "extremes": "values out of range",
    "missing": "values missing",
}
_ROWS = {
    "row": "Row in the log",
    "loss": "Loss",
    "gradient": "Gradient",
    "task": "Task",
    "holds": "Unusual in it",
}
_TASKS = {
    "task": "Task",
    "loss": "Loss",
    "usual_loss": "Usually",
    "loss_score": "Deviations",
    "gradient_frac": "Of the gradient",
    "gradient_score": "Deviations of the gradient",
}
Table = tuple[list[str], list[list[str]]]
"""Headings, and rows of cells."""


def cause_block(cause: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page says of one cause report; what the report lacks is left out.

    >>> block = cause_block({"step": 7, "task": "click", "features": [{"feature": "item", "share_frac": 0.625}]})
    >>> block["names"], block["tables"]
    ([('task', 'click')],
     [('What is unusual about the batch', (['Feature', 'Of the worst rows'], [['item', '62%']]))])
    """
    readings = [{"task": name, **reading} for name, reading in (cause.get("tasks") or {}).items()]
    parts = (
        ("What is unusual about the batch", [_plain_feature(one) for one in cause.get("features") or []], _FEATURES),
        ("Rows that hold most of it", cause.get("odd_rows") or [], _ROWS),
        ("Rows with the largest gradient", cause.get("rows") or [], _ROWS),
        ("The tasks at this step", readings, _TASKS),
    )
    lies_in = _LIES_IN.get(str(cause.get("state_or_data")), "")
    names = (("task", str(cause.get("task") or "")), ("layer", layer_name(cause)), ("lies in", lies_in))
    return {
        "step": int(cause.get("step", 0)),
        "sentence": str(cause.get("sentence") or ""),
        "why": str(cause.get("why") or ""),
        "names": [(title, name) for title, name in names if name],
        "tables": [(title, _table(rows, titles)) for title, rows, titles in parts if rows],
    }


def layer_name(record: Mapping[str, Any]) -> str:
    """Return the layer that a cause report or a warning names, "" where it names none."""
    layer = record.get("layer")
    return str((layer.get("name") if isinstance(layer, Mapping) else layer) or "")


def _plain_feature(feature: Mapping[str, Any]) -> dict[str, Any]:
    """Return a feature's reading with its view in words; of a view that counts rows, shares as such."""
    plain = {**feature}
    if "view" in plain:
        plain["view"] = _VIEWS.get(str(plain["view"]), plain["view"])
    if feature.get("view") in ("share", "missing"):
        plain |= {name: _cell("_frac", feature[name]) for name in ("now", "usual") if name in feature}
    return plain


def _table(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> Table:
    """Return headings and cells; a mapping within a row, such as the columns of the log, gives one column for each."""
    flat = [_flatten(row) for row in rows[:SHOWN]]
    names = dict.fromkeys([*(n for n in titles if any(n in row for row in flat)), *(n for row in flat for n in row)])
    named = [name for name in names if any(row.get(name) not in (None, "", []) for row in flat)]
    return [titles.get(n, shorten_name(n)) for n in named], [
        [_cell(name, row.get(name)) for name in named] for row in flat
    ]


def _flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {name: value for name, value in row.items() if not isinstance(value, Mapping)}
    for columns in (value for value in row.values() if isinstance(value, Mapping)):
        flat |= {name if name not in flat else f"{name} in the log": value for name, value in columns.items()}
    return flat


def _cell(name: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        shown = ", ".join(_cell("", one) for one in value[:6])
        return shown + (", …" if len(value) > 6 else "")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else shorten_name(str(value))
    if name.endswith("_frac") and is_number(value):
        return f"{value:.0%}" if value >= 0.095 or value == 0 else f"{100 * value:.2g}%"
    # Whole numbers are mostly keys of the log, which a person copies.
    return str(value) if isinstance(value, int) else format_number(value)
