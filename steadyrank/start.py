"""A starting run.toml for a log: guessed from its columns, commented, made to train as it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from .config import RunConfig, open_source
from .data.guess import guess_schema
from .data.logs import LogsConfig, ReaderConfig
from .errors import ConfigError
from .schema import Schema
from .sequential import TrainConfig

_HEAD = """\
# A first configuration, guessed from the columns of the log. It trains as it is:
#     steadyrank train {file}
# Read it once: is every label a label, and does no feature know the answer (a count made afterwards, say)?
# Any setting can be overridden: --set optimizer.dense.lr=0.2
"""
_SCHEMA = """\
# What the columns mean. kind = "id" (hashed into rows), "ids" (a list, or a text as a bag of words),
# "number" (transform = "log1p" for heavy tails) or "position" (place on the page: never used in serving).
"""
_TASKS = """\
# What is learned. kind = "binary" or "regression" (transform = "log1p", scale). Optional: mask, weight, only_where.
"""
_OPTIMIZER = """\
# Clippy bounds how far each tensor's step goes, so that the rate hardly matters: rates of 0.002 to 0.032 were alike
# in the study of docs/stability.md. Will it stand twice the rate? `steadyrank ladder` with this file tells.
[optimizer.dense]
name = "clippy_adam"
lr = 0.016

[optimizer.tables]
name = "rowwise_adagrad"
lr = 0.05
initial_accumulator_value = 0.0
"""


def start_config(log: str, target: Path, *, overwrite: bool = False) -> RunConfig:
    """Write a commented configuration for a log, and return it as it will be read.

    Args:
        log: Path of the log.
        target: The TOML file to write.
        overwrite: Replace an existing file.

    Raises:
        ConfigError: The target exists or cannot be written.
        DataError: The log has no time or no label that a name gives away.
    """
    if target.exists() and not overwrite:
        raise ConfigError(f"'{target}' exists; give --overwrite to replace it, or another --out")
    source = open_source(log)
    schema, notes = guess_schema(source)
    reader, train = _sizes(source.rows)
    data = {
        "name": _name(log),
        "data": LogsConfig(path=str(Path(log).absolute()) if "://" not in log else log),
        "reader": reader,
        "train": train,
    }
    text = _HEAD.format(file=target) + _body(data, schema, notes)
    config = RunConfig.from_toml(text, where=str(target))
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"'{target}' cannot be written: {error.strerror}; choose another --out") from error
    return config


def _sizes(rows: int) -> tuple[ReaderConfig, TrainConfig]:
    """Choose batches so that a short log still gets some hundred steps, and windows so that there are about twenty."""
    batch = 32
    while batch < 1024 and rows > 400 * batch:
        batch *= 2
    steps = max(1, rows // batch)
    window = max(1, min(200, steps // 20))
    # Rows of one order or session share their fate: shuffled, a row would be scored after its siblings were learned.
    return ReaderConfig(batch_size=batch, shuffle=False), TrainConfig(window_steps=window, log_every=min(20, window))


def _name(log: str) -> str:
    stem = Path(log.rstrip("/*")).stem
    kept = "".join(c if c.isalnum() and c.isascii() else "-" for c in stem).strip("-")
    return kept or "run"


def _body(data: Mapping[str, Any], schema: Schema, notes: Mapping[str, str]) -> str:
    """Write the settings as TOML, a comment at each guess."""
    lines = [f'name = "{data["name"]}"', "seed = 0", "", "[data]", f"path = {_value(data['data'].path)}", ""]
    for part in ("reader", "train"):
        lines += [f"[{part}]", *_fields(data[part].model_dump(exclude_unset=True)), ""]
    lines += [_OPTIMIZER, _SCHEMA.rstrip(), "[schema]"]
    top = schema.model_dump(mode="json", exclude={"features", "tasks"}, exclude_none=True)
    lines += [*_fields(top), ""]
    for name, feature in schema.features.items():
        lines.append(f"[schema.features.{_key(name)}]  # {notes[name]}")
        lines += [*_fields(_chosen(feature.model_dump(mode="json", exclude_defaults=True), feature.kind, name)), ""]
    left_out = [f"# {name}: {note}" for name, note in notes.items() if note.startswith("left out")]
    lines += [*left_out, "", _TASKS.rstrip()]
    for name, task in schema.tasks.items():
        lines.append(f"[schema.tasks.{_key(name)}]")
        lines += [*_fields(_chosen(task.model_dump(mode="json", exclude_defaults=True), task.kind, name)), ""]
    return "\n".join(lines)


def _chosen(fields: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    """Put the kind first, and leave out what the name already says."""
    rest = {key: value for key, value in fields.items() if key != "kind" and value != name}
    return {"kind": kind, **rest}


def _fields(fields: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_value(value)}" for key, value in fields.items()]


def _value(value: Any) -> str:
    return tomli_w.dumps({"v": value}).removeprefix("v = ").replace("\n    ", "").replace(",\n]", "]").strip()


def _key(name: str) -> str:
    return tomli_w.dumps({name: 0}).rpartition(" = ")[0]
