"""Public data sets: from the files that their own sites give to one Parquet log in time order.

KuaiRand (https://kuairand.com, CC BY-SA 4.0; Gao et al., CIKM 2022) comes as KuaiRand-1K, -27K and -Pure: folders of
CSV files with the same columns. A row of the result is one impression: the columns of the log, those of its user, and
the basic ones of its video. Two kinds of file are left out:

log_random_*                its videos were drawn at random, not ranked, so that models can be judged without the
                            ranker's bias; a model that has learned these rows can no longer be judged on them;
video_features_statistic_*  averages over the whole month, which on any day but the last know the future.
"""

import csv
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import ConfigError, DataError, check_known, near_path, nearest

DATASETS = {
    "kuairand": "KuaiRand-1K, -27K or -Pure: impressions of short videos with twelve kinds of feedback; CC BY-SA 4.0; "
    "https://kuairand.com (Gao et al., CIKM 2022)",
}
"""The data sets that `prepare_dataset` knows, each with its licence and source in one line."""

Progress = Callable[[int, int], None]
"""Called with the rows done and in all: once through while reading (in all: an estimate), once more while writing."""

ROW_GROUP = 262_144
_BLOCK_BYTES = 16 << 20
_MS_PER_DAY = 86_400_000
_NULLS = ["", "NULL", "null", "NA", "NaN", "nan", "None"]

Types = dict[str, pa.DataType]
_WORDS = pa.dictionary(pa.int32(), pa.string())
_LABELS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view")
_LOG: Types = {
    **dict.fromkeys(("user_id", "video_id"), pa.int64()),
    **dict.fromkeys(("date", "hourmin"), pa.int32()),
    "time_ms": pa.int64(),
    **dict.fromkeys(_LABELS, pa.int8()),
    **dict.fromkeys(("play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time"), pa.int64()),
    **dict.fromkeys(("is_profile_enter", "is_rand"), pa.int8()),
    "tab": pa.int32(),
}
_COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
_USERS: Types = {
    "user_id": pa.int64(),
    "user_active_degree": _WORDS,
    **dict.fromkeys(("is_lowactive_period", "is_live_streamer", "is_video_author"), pa.int32()),
    **{name: kind for count in _COUNTS for name, kind in ((count, pa.int32()), (f"{count}_range", _WORDS))},
    **{f"onehot_feat{i}": pa.int32() for i in range(18)},
}
_VIDEOS: Types = {
    **dict.fromkeys(("video_id", "author_id"), pa.int64()),
    **dict.fromkeys(("video_type", "upload_dt", "upload_type"), _WORDS),
    "visible_status": pa.int32(),
    "video_duration": pa.float64(),
    **dict.fromkeys(("server_width", "server_height"), pa.int32()),
    "music_id": pa.int64(),
    "music_type": pa.int32(),
    "tag": pa.list_(pa.int32()),
}


def prepare_dataset(
    name: str, folder: str | Path, target: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> int:
    """Write a data set's log as one Parquet file sorted by time, and return its rows.

    The target appears only when it is complete. Until then a hidden folder beside it holds the log a second time.

    Args:
        name: One of `DATASETS`.
        folder: What the data set's site gives, unpacked (for KuaiRand, the folder or its `data`).
        target: The Parquet file to write.
        overwrite: Replace an existing target.
        progress: Called after each block.

    Raises:
        ConfigError: An unknown name, a path that is wrong, or a target that exists.
        DataError: A file or a column is missing, or a value is not what its column holds; the message names them.
    """
    folder, target = Path(folder), Path(target)
    check_known(name, DATASETS, "data set")
    if target.exists() and not overwrite:
        raise ConfigError(f"'{target}' exists; give --overwrite to replace it, or another name")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder '{target.parent}' to write '{target.name}' into")
    if not folder.is_dir():
        raise ConfigError(f"there is no folder '{folder}'{near_path(folder)}; unpack what the site gives, and name it")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            part = Path(scratch) / "whole.parquet"
            rows = _prepare_kuairand(folder, Path(scratch) / "days", part, progress or (lambda done, total: None))
            os.replace(part, target)
    except OSError as error:
        raise DataError(f"{folder} to {target}: {error.strerror or error}") from error
    return rows


def _prepare_kuairand(folder: Path, days: Path, part: Path, progress: Progress) -> int:
    """Deal the logs out by day, then sort day by day and join: no more than a day's log is held at once.

    The two parts of each of 27K's logs cover the same days, so that one cannot be read after the other.
    """
    folder = folder / "data" if (folder / "data").is_dir() else folder
    logs = _find(folder, "log_standard_*.csv")
    user_file, video_file = _find_one(folder, "user_features*.csv"), _find_one(folder, "video_features_basic*.csv")
    for file, types in (*((log, _LOG) for log in logs), (user_file, _USERS), (video_file, _VIDEOS)):
        _check_columns(file, types)
    total = _deal_by_day(logs, days, progress)
    users, videos = _read_side(user_file, "user_id", _USERS), _read_side(video_file, "video_id", _VIDEOS)
    kinds = {**_LOG, **_USERS, **_VIDEOS}
    schema = pa.schema([(name, pa.string() if kind == _WORDS else kind) for name, kind in kinds.items()])
    rows = 0
    with pq.ParquetWriter(part, schema, compression="zstd", write_page_checksum=True) as writer:
        for day in sorted(days.iterdir(), key=lambda path: int(path.name)):
            # Rows of one millisecond are in the order of their ids, not of the files: one log has one result.
            log = (
                ds.dataset(day).to_table().sort_by([(name, "ascending") for name in ("time_ms", "user_id", "video_id")])
            )
            for start in range(0, len(log), ROW_GROUP):
                piece = log.slice(start, ROW_GROUP)
                columns = [piece, users.look_up(piece["user_id"]), videos.look_up(piece["video_id"])]
                writer.write_table(_beside(columns).cast(schema), row_group_size=ROW_GROUP)
                rows += len(piece)
                progress(rows, total)
    return rows


class _Side(NamedTuple):
    """A side table, sorted by its key."""

    keys: NDArray[np.int64]
    table: pa.Table

    def look_up(self, ids: pa.ChunkedArray) -> pa.Table:
        """Return the row of each id, nulls where there is none; of several rows the file's first."""
        wanted = ids.fill_null(-1).to_numpy()
        at = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return self.table.take(pa.array(at, mask=self.keys[at] != wanted))


def _read_side(file: Path, key: str, types: Types) -> _Side:
    table = (
        pa.Table.from_batches([block for block, _ in _blocks(file, types)], _schema(types))
        .unify_dictionaries()
        .combine_chunks()
    )
    keys = table[key].fill_null(-1).to_numpy()
    if not len(keys):
        raise DataError(f"{file}: the file holds no row")
    order = np.argsort(keys, kind="stable")
    return _Side(keys[order], table.drop_columns([key]).take(order))


def _beside(tables: Sequence[pa.Table]) -> pa.Table:
    columns = {name: table[name] for table in tables for name in table.column_names}
    return pa.table(columns)


def _find(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a pattern, or say what is there instead."""
    found = sorted(folder.glob(pattern))
    if not found:
        there = sorted(path.name for path in folder.iterdir())
        shown = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
        raise DataError(
            f"{folder}: expected a file '{pattern}'{nearest(pattern, there)}; found {shown or 'nothing'}. "
            "Unpack the whole archive, and give its folder"
        )
    return found


def _find_one(folder: Path, pattern: str) -> Path:
    file, *others = _find(folder, pattern)
    if others:
        raise DataError(f"{folder}: expected one file '{pattern}', found {file.name} and {others[0].name}; keep one")
    return file


def _check_columns(file: Path, types: Types) -> None:
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        header = next(csv.reader(lines), [])
    for name in types:
        check_known(name, header, f"column in {file}, where KuaiRand has", DataError)


def _deal_by_day(logs: Sequence[Path], days: Path, progress: Progress) -> int:
    """Write the rows of all logs into one folder for each day (UTC), and return how many there are."""
    rows, done, size = 0, 0, sum(log.stat().st_size for log in logs)

    def dealt() -> Iterator[pa.RecordBatch]:
        nonlocal rows, done
        for log in logs:
            for batch, end in _blocks(log, _LOG):
                if batch["time_ms"].null_count:
                    raise DataError(
                        f"{log}, column 'time_ms': {batch['time_ms'].null_count} null; every row needs a time"
                    )
                rows += len(batch)
                yield batch.append_column("day", pc.divide(batch["time_ms"], _MS_PER_DAY).cast(pa.int32()))
                progress(rows, rows * size // (done + end))
            done += log.stat().st_size

    day = pa.field("day", pa.int32())
    ds.write_dataset(
        dealt(),
        days,
        schema=_schema(_LOG).append(day),
        format="parquet",
        partitioning=ds.partitioning(pa.schema([day])),
        min_rows_per_group=65_536,
    )
    if not rows:
        raise DataError(f"{', '.join(str(log) for log in logs)}: there is no row")
    return rows


def _schema(types: Types) -> pa.Schema:
    return pa.schema(list(types.items()))


def _blocks(file: Path, types: Types) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Yield a CSV file's columns of `types` block by block, each with the place in the file, in bytes, read up to.

    Whole numbers are read as float64 (exact up to 2**53), since a column with nulls may have been written as 720.0.
    """
    options = pacsv.ConvertOptions(
        column_types={name: _read_as(kind) for name, kind in types.items()},
        include_columns=list(types),
        null_values=_NULLS,
        strings_can_be_null=True,
    )
    try:
        with file.open("rb") as raw:
            for block in pacsv.open_csv(raw, pacsv.ReadOptions(block_size=_BLOCK_BYTES), convert_options=options):
                columns = [_as_type(block[name], kind, f"{file}, column '{name}'") for name, kind in types.items()]
                yield pa.RecordBatch.from_arrays(columns, schema=_schema(types)), raw.tell()
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: {str(error).splitlines()[0]}") from error


def _read_as(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_integer(kind):
        return pa.float64()
    return pa.string() if pa.types.is_list(kind) else kind


def _as_type(column: pa.Array, kind: pa.DataType, where: str) -> pa.Array:
    try:
        # A list is written as "12,65".
        return (pc.split_pattern(column, ",") if pa.types.is_list(kind) else column).cast(kind)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: expected {kind}: {str(error).splitlines()[0]}") from error
