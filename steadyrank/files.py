"""Files written whole or not at all, lines appended whole, and JSON for numbers that are not finite."""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .errors import CheckpointError, SteadyRankError

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# Words, never numbers, under these keys: a run that is called "nan" keeps its name.
_WORDS = frozenset({"name", "status", "message", "kind", "feature"})
# Half a surrogate, as in a file name that is no UTF-8, becomes an escape that JSON reads back.
_ODD = "backslashreplace"


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


def append_lines(path: Path, lines: list[str]) -> None:
    """Append whole lines in one write; where that fails, the file is as long as before."""
    data = "".join(line + "\n" for line in lines).encode(errors=_ODD)
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
    # Only "\n" ends a row: str.splitlines would also break at U+2028, which a task's name may hold.
    lines = read_text(path, errors="replace").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise CheckpointError(
                f"{path}, line {number}: a JSON object was expected ({error}); delete that line to read the rest"
            ) from error
    return rows


def read_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file."""
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: JSON was expected ({error}); the file is damaged") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, not a {type(found).__name__}; the file is damaged")
    return found


def read_text(path: Path, errors: str = "strict") -> str:
    """Return a text file, or say why it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; check the path and its permissions") from error


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with draft.open("w", encoding="utf-8", errors=_ODD, newline="") as file:
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
