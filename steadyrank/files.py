"""Files written whole or not at all, lines appended whole, and JSON for numbers that are not finite."""

import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from torch import Tensor

from .errors import CheckpointError, SteadyRankError

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# Words, never numbers, under these keys: a run that is called "nan" keeps its name.
_WORDS = frozenset({"name", "status", "message", "kind", "feature"})
# Half a surrogate, as in a file name that is no UTF-8, becomes an escape that JSON reads back.
_ODD = "backslashreplace"
# What we write stays far below; a file from elsewhere that goes beyond would only fill the memory.
MOST_BYTES = 64 << 20
"""Of a file that is read as a whole."""
MOST_LINE_BYTES = 16 << 20
"""Of one line."""
MOST_LINES_BYTES = 2 << 30
"""Of a file of JSON lines."""
_MOST_DIGITS = 40  # a generator's state has 128 bits; every such number is also a finite float
_DEEPEST = 64


@contextmanager
def writing(
    path: Path, error: type[SteadyRankError] = CheckpointError, advice: str = "check space and permissions"
) -> Iterator[None]:
    """Turn the operating system's refusals into ours."""
    try:
        yield
    except OSError as refusal:
        where = f" ({refusal.filename})" if refusal.filename not in (None, str(path), path) else ""
        raise error(f"cannot write {path}: {refusal.strerror or refusal}{where}; {advice}") from refusal


def refuse_link(path: Path) -> None:
    """Refuse to write or delete through a link, which leads wherever the maker of a run folder wanted it to lead.

    Raises:
        CheckpointError: The path is a link.
    """
    if path.is_symlink():
        raise CheckpointError(
            f"{path} is a link to {os.readlink(path)}; nothing in a run folder is written or deleted through a link: "
            "remove it, or put what it leads to in its place"
        )


def append_lines(path: Path, lines: list[str]) -> None:
    """Append whole lines in one write; where that fails, the file is as long as before."""
    data = "".join(line + "\n" for line in lines).encode(errors=_ODD)
    refuse_link(path)
    with writing(path), path.open("a+b", buffering=0) as file:
        size = _whole_lines(path)
        file.truncate(size)  # a line that a crash tore would spoil the next one
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def _whole_lines(path: Path) -> int:
    """Return the length of the file in bytes up to its last line break."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(end - 65536, 0)
            file.seek(start)
            if (found := file.read(end - start).rfind(b"\n")) >= 0:
                return start + found + 1
            end = start
    return 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, none when it is absent; a torn last line is left out."""
    if not path.exists():
        return []
    rows = []
    with _reading(path, MOST_LINES_BYTES) as file:
        # Only "\n" ends a row: str.splitlines would also break at U+2028, which a task's name may hold.
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES), b""), start=1):
            try:
                if len(line) == MOST_LINE_BYTES:
                    raise ValueError(f"it has {MOST_LINE_BYTES >> 20} MB and more")
                if line.endswith(b"\n"):
                    rows.append(_parse_object(line.decode(errors="replace")))
            except (ValueError, RecursionError) as error:
                raise CheckpointError(
                    f"{path}, line {number}: a JSON object was expected ({error}); delete that line to read the rest"
                ) from error
    return rows


def read_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file."""
    try:
        return _parse_object(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: a JSON object was expected ({error}); the file is damaged") from error


def read_text(path: Path, errors: str = "strict", most_bytes: int = MOST_BYTES) -> str:
    """Return a text file, or say why it cannot be read."""
    with _reading(path, most_bytes) as file:
        return file.read(most_bytes).decode(errors=errors)


@contextmanager
def _reading(path: Path, most_bytes: int) -> Iterator[BinaryIO]:
    """Open a regular file, not too large: from a pipe or a device a reader may wait for ever."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise OSError("it is no regular file")
            if facts.st_size > most_bytes:
                raise OSError(f"it has {facts.st_size:,} bytes, more than the {most_bytes:,} that are read")
            yield cast(BinaryIO, file)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; check the path and its permissions") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _whole_number(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


_DECODER = json.JSONDecoder(parse_int=_whole_number)


def _parse_object(text: str) -> dict[str, Any]:
    """Return the object that a JSON text holds, if nothing in it would be too much for whoever walks through it."""
    found = _DECODER.decode(text)
    if not isinstance(found, dict):
        raise ValueError(f"not a {type(found).__name__}")
    if text.count("[") + text.count("{") > _DEEPEST:
        level: list[Any] = [found]
        for _ in range(_DEEPEST):
            inner = (each for one in level for each in (one.values() if isinstance(one, dict) else one))
            level = [each for each in inner if isinstance(each, dict | list)]
        if level:
            raise ValueError(f"nested more than {_DEEPEST} deep")
    return found


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all; a link in its place is replaced, not followed."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.unlink(missing_ok=True)  # of a run that was killed here; a link would lead elsewhere
    try:
        with draft.open("x", encoding="utf-8", errors=_ODD, newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def swap(draft: Path, final: Path) -> None:
    """Rename a folder, in the place of an older one if there is one."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    try:
        draft.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(folder: Path) -> None:
    """Make a rename in the folder survive a power cut, where the system can do that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def to_json(value: Any, indent: int | None = 2) -> str:
    """Return JSON text; what is not finite becomes a word, numpy and torch values plain ones."""
    return json.dumps(_encode(value), indent=indent, allow_nan=False, ensure_ascii=False, default=str)


def _encode(value: Any) -> Any:
    """Return what JSON can hold: non-finite numbers as words, numpy's and torch's scalars as Python's."""
    if isinstance(value, Mapping):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return _encode(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def decode(value: Any) -> Any:
    """Turn the words that stand for non-finite numbers back into them."""
    if isinstance(value, dict):
        return {k: v if k in _WORDS and isinstance(v, str) else decode(v) for k, v in value.items()}
    if isinstance(value, list):
        return [decode(v) for v in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
