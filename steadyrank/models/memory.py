"""How much memory a run would take, from its configuration alone: said before anything is made.

Shapes: D width of the input, K tasks.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import ConfigError
from ..schema import Schema
from .ranker import ModelConfig
from .trunks import MMoEConfig, PLEConfig, SharedBottomConfig

TABLE_BYTES = 4
"""Of a weight of an embedding table."""
DENSE_BYTES = 12
"""Of any other weight: itself, its gradient and one accumulator."""
LAYER_BYTES = 10_000
"""Of a layer, however small: Python's objects."""
COLUMN_BYTES = 8
"""Of a value of the log in a window."""
UNIT_BYTES = 8
"""Of the output of a unit for one row of a batch: itself and its gradient."""


class Layer(NamedTuple):
    """So many alike linear layers; `vectors` are the parameters of each unit besides: bias, LayerNorm."""

    copies: int
    width_in: int
    width_out: int
    vectors: int = 1

    @property
    def weights(self) -> int:
        """Number of parameters."""
        return self.copies * self.width_out * (self.width_in + self.vectors)


def list_layers(schema: Schema, config: ModelConfig) -> dict[str, list[Layer]]:
    """Return the linear layers of the model that `Ranker` would make, by part.

    >>> schema = Schema(features={"item": {"kind": "id", "rows": 50}}, tasks={"click": {"kind": "binary"}})
    >>> list_layers(schema, ModelConfig(trunk={"kind": "shared_bottom", "widths": [8]}))
    {'cross': [], 'trunk': [Layer(copies=1, width_in=16, width_out=8, vectors=1)],
     'tower': [Layer(copies=1, width_in=8, width_out=1, vectors=1)]}
    """
    width, tasks = _input_width(schema), len(schema.tasks)
    trunk = list(_trunk(width, config, tasks))
    width_out = config.trunk.widths[-1]
    hidden = _mlp(tasks, width_out, config.tower, config.layer_norm)
    output = Layer(tasks, (width_out, *config.tower)[-1], 1)
    return {"cross": list(_cross(width, config)), "trunk": trunk, "tower": [*hidden, output]}


def dense_bytes(schema: Schema, config: ModelConfig) -> int:
    """Return about what the linear layers take, with gradients and accumulators."""
    parts = list_layers(schema, config).values()
    return sum(layer.weights for layers in parts for layer in layers) * DENSE_BYTES


class Need(NamedTuple):
    """Something that takes memory."""

    part: Literal["tables", "their optimizer", "layers", "the log", "a batch"]
    size: int
    """Bytes."""
    what: str
    """With the arithmetic."""
    advice: str


StateBytes = Callable[[int], float]
"""Bytes that an optimizer keeps for a row of a table, by the table's width."""


def check_memory(
    schema: Schema,
    config: ModelConfig,
    *,
    window_rows: int = 0,
    batch_rows: int = 0,
    state_bytes: StateBytes | None = None,
    machine_bytes: int | None = None,
    processes: int = 1,
    shards: int = 1,
) -> str:
    """Refuse what this machine has no memory for: the system would else stop the process in the midst of it.

    Counted is the least that is needed, so that nothing is refused that might do.

    Args:
        schema: Features and tasks.
        config: The layers.
        window_rows: Rows of the log that are held at once, at most those of the log.
        batch_rows: Rows of a batch, at most those of a window.
        state_bytes: What the tables' optimizer keeps; nothing when None.
        machine_bytes: The memory; the machine's own, or what its container may use, when None.
        processes: How many like this one share the machine.
        shards: Over how many processes the tables are spread.

    Returns:
        What it takes, for people.

    Raises:
        ConfigError: It does not fit; with the arithmetic of the largest part.

    >>> schema = Schema(features={"item": {"kind": "id", "rows": 10**9}}, tasks={"click": {"kind": "binary"}})
    >>> check_memory(schema, ModelConfig(), machine_bytes=100 * 10**9, state_bytes=lambda width: 4.0)
    'memory: at least 68.0 GB of 100.0 GB: tables 64.0 GB, their optimizer 4.0 GB, layers 0.9 MB'
    >>> check_memory(schema, ModelConfig(), machine_bytes=24 * 10**9)
    Traceback (most recent call last):
    ...
    steadyrank.errors.ConfigError: this run needs at least 64.0 GB of memory, and this machine has 24.0 GB. Most takes
    the table 'item': 1,000,000,001 rows x 16 x 4 bytes = 64.0 GB; give it fewer rows or a smaller width
    """
    machine = _machine_bytes() if machine_bytes is None else machine_bytes
    machine = None if machine is None else machine // processes
    needs = list(_needs(schema, config, window_rows, batch_rows, state_bytes, shards))
    total = sum(need.size for need in needs)
    if machine is None or total <= machine:
        parts: dict[str, int] = {}
        for need in needs:
            parts[need.part] = parts.get(need.part, 0) + need.size
        listed = ", ".join(f"{part} {_show(size)}" for part, size in parts.items() if size)
        return f"memory: at least {_show(total)}{f' of {_show(machine)}' if machine else ''}: {listed}"
    largest = max(needs, key=lambda need: need.size)
    has = "this machine has" if processes == 1 else f"each of the {processes} processes on this machine has"
    raise ConfigError(
        f"this run needs at least {_show(total)} of memory, and {has} {_show(machine)}. Most "
        f"takes {largest.what} = {_show(largest.size)}; {largest.advice}"
    )


def _needs(
    schema: Schema, config: ModelConfig, window_rows: int, batch_rows: int, state_bytes: StateBytes | None, shards: int
) -> Iterator[Need]:
    """Yield what takes memory."""
    tasks = len(schema.tasks)
    over = f" / {shards} ranks" if shards > 1 else ""
    for name, slot in schema.tables.items():
        what = f"the table '{name}': {slot.rows:,} rows x {slot.width:,} x {TABLE_BYTES} bytes{over}"
        yield Need(
            "tables", slot.rows * slot.width * TABLE_BYTES // shards, what, "give it fewer rows or a smaller width"
        )
    for width in {slot.width for slot in schema.tables.values()}:
        if state_bytes is None:
            break
        rows, each = sum(slot.rows for slot in schema.tables.values() if slot.width == width), state_bytes(width)
        what = f"the optimizer of tables of width {width}: {rows:,} rows x {each:g} bytes{over}"
        yield Need("their optimizer", int(rows * each) // shards, what, "choose 'rowwise_adagrad' for optimizer.tables")
    for name, feature in schema.position_features.items():
        size = (feature.rows + 1) * tasks * DENSE_BYTES
        what = f"the position feature '{name}': {feature.rows + 1:,} rows x {tasks} tasks x {DENSE_BYTES} bytes"
        yield Need("layers", size, what, "give it fewer rows")
    parts = list_layers(schema, config)
    for part, layers in parts.items():
        weights, count = sum(layer.weights for layer in layers), sum(layer.copies for layer in layers)
        what = f"model.{part}: {weights:,} weights x {DENSE_BYTES} bytes + {count:,} layers x {LAYER_BYTES:,}"
        yield Need("layers", weights * DENSE_BYTES + count * LAYER_BYTES, what, "make its layers fewer or narrower")
    columns = len(schema.features) + 2 * tasks
    what = f"a window: {window_rows:,} rows x {columns} columns x {COLUMN_BYTES} bytes"
    yield Need("the log", window_rows * columns * COLUMN_BYTES, what, "make reader.window_rows smaller")
    units = _input_width(schema) + sum(layer.copies * layer.width_out for layers in parts.values() for layer in layers)
    what = f"a batch: {batch_rows:,} rows x {units:,} units x {UNIT_BYTES} bytes"
    yield Need("a batch", batch_rows * units * UNIT_BYTES, what, "make reader.batch_size smaller")


def _input_width(schema: Schema) -> int:
    tables = schema.tables
    embedded = [*schema.id_features.values(), *schema.list_features.values()]
    return sum(tables[feature.table].width for feature in embedded) + 2 * len(schema.number_features)


def _cross(width: int, config: ModelConfig) -> Iterator[Layer]:
    if config.cross is None:
        return
    rank, last = config.cross.rank, 2 * config.cross.layer_norm
    if rank is None:
        yield Layer(config.cross.layers, width, width)
    else:
        yield Layer(config.cross.layers, width, rank, 0)
        yield Layer(config.cross.layers, rank, width)
    if last:
        yield Layer(1, 0, width, last)


def _trunk(width: int, config: ModelConfig, tasks: int) -> Iterator[Layer]:
    match config.trunk:
        case SharedBottomConfig(widths=widths):
            yield from _mlp(1, width, widths, config.layer_norm)
        case MMoEConfig(experts=experts, widths=widths):
            yield from _mlp(experts, width, widths, config.layer_norm)
            yield Layer(tasks, width, experts, 0)
        case PLEConfig(levels=levels, shared_experts=shared, task_experts=own, widths=widths):
            for count, width_in in ((1, width), (levels - 1, widths[-1])):
                yield from _mlp(count * (shared + own * tasks), width_in, widths, config.layer_norm)
                yield Layer(count * tasks, width_in, own + shared, 0)
            for count, width_in in ((min(levels - 1, 1), width), (max(levels - 2, 0), widths[-1])):
                yield Layer(count, width_in, own * tasks + shared, 0)  # the last level has no shared gate


def _mlp(count: int, width_in: int, widths: Sequence[int], layer_norm: bool) -> Iterator[Layer]:
    for width in widths:
        yield Layer(count, width_in, width, 3 if layer_norm else 1)
        width_in = width


def _machine_bytes() -> int | None:
    """Return the memory of this machine, or of the container where it may use less; None where nothing says."""
    found = []
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            said = Path(path).read_text().strip()
        except OSError:
            continue
        if said.isdecimal():
            found.append(int(said))
    return min((size for size in found if size > 0), default=None)


def _show(size: int) -> str:
    if size < 1e9:
        return f"{size / 1e6:,.1f} MB"
    return f"{size / 1e9:,.1f} GB" if size < 1e15 else f"{size:.1e} bytes"
