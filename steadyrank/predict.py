"""Score a log with a trained run's model and write Parquet: one column a task, beside the keys of each row."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from .data.ahead import make_ahead
from .data.columns import Encoder
from .data.logs import Source
from .errors import ConfigError, DataError
from .evaluate import score
from .schema import Schema


def predict(
    model: nn.Module,
    schema: Schema,
    source: Source,
    target: str | Path,
    *,
    keys: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the model's predictions for every row of a log, in the log's order, and return their number.

    A binary task's column is its probability; a regression's is in the label's own unit. Labels are not read. The file
    appears only when it is complete.

    Args:
        model: Maps a Batch to logits [B, K]; it is called in eval mode.
        schema: What the columns mean.
        source: The log.
        target: The Parquet file to write.
        keys: Columns of the log to copy; by default the time, the group and the baseline's ids.
        overwrite: Replace an existing target.
        progress: Called with the rows done and in all.

    Raises:
        ConfigError: The target exists, or a key has the name of a task.
        DataError: The log lacks a column, or cannot be read.
    """
    target = Path(target)
    if target.exists() and not overwrite:
        raise ConfigError(f"'{target}' exists; give --overwrite to replace it, or another name")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder '{target.parent}' to write '{target.name}' into")
    if keys is None:
        ids = [schema.features[name].column for name in schema.baseline]
        keys = [column for column in [schema.time, schema.group, *ids] if column is not None]
    keys = list(dict.fromkeys(keys))
    if clash := sorted(set(keys) & set(schema.tasks)):
        raise ConfigError(f"the key '{clash[0]}' has the name of a task; choose other --keys")
    encoder = Encoder(schema, labels=False)
    columns = list(dict.fromkeys([*encoder.columns, *keys]))
    source.check(columns)
    part = target.with_name(f".{target.name}.part")
    try:
        rows = _write(model, schema, source, encoder, columns, keys, part, progress)
        os.replace(part, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return rows


def _write(
    model: nn.Module,
    schema: Schema,
    source: Source,
    encoder: Encoder,
    columns: list[str],
    keys: list[str],
    part: Path,
    progress: Callable[[int, int], None] | None,
) -> int:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    pieces = ((table, encoder.encode(table, place)[0]) for table, place in source.pieces(0, columns))
    rows, writer = 0, None
    try:
        for table, batch in make_ahead(pieces, 1):
            logits_BK = score(model, batch, len(schema.tasks), device)
            out = table.select(keys)
            for k, (name, task) in enumerate(schema.tasks.items()):
                out = out.append_column(name, pa.array(task.decode(logits_BK[:, k]).numpy()))
            if writer is None:
                writer = pq.ParquetWriter(part, out.schema, compression="zstd", write_page_checksum=True)
            writer.write_table(out)
            rows += len(table)
            if progress is not None:
                progress(rows, source.rows)
    finally:
        if writer is not None:
            writer.close()
    return rows
