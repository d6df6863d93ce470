"""The base of every config class: frozen, nothing unknown accepted, a sentence under each field."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen group of settings. Unknown keys are refused; the string under a field gives meaning, unit and range."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        populate_by_name=True,
    )


def merge(
    base: Mapping[str, Any],
    more: Mapping[str, Any],
    is_whole: Callable[[Mapping[str, Any]], bool] = lambda table: False,
) -> dict[str, Any]:
    """Return nested settings with others merged in, table by table; neither is changed.

    Args:
        base: Settings as TOML has them.
        more: What takes their place.
        is_whole: Says of a table in `more` whether it replaces the one that stood there instead of changing it.

    >>> merge({"a": {"x": 1, "y": 2}, "b": 0}, {"a": {"y": 3}})
    {'a': {'x': 1, 'y': 3}, 'b': 0}
    """
    merged = dict(base)
    for key, value in more.items():
        there = base.get(key)
        joins = isinstance(value, Mapping) and isinstance(there, Mapping) and not is_whole(value)
        merged[key] = merge(there, value, is_whole) if joins else value  # type: ignore[arg-type]  # `joins` has looked
    return merged


def flatten(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested settings by their full path.

    >>> flatten({"train": {"threads": 2}, "name": "run"})
    {'train.threads': 2, 'name': 'run'}
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{above}{name}.") if isinstance(value, Mapping) else {above + name: value}
    return flat
