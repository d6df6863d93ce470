"""A file of JSON lines that only grows, can be cut back to a mark, and is bounded by dropping its oldest part.

NAME.jsonl, NAME.1.jsonl, NAME.2.jsonl, ...: its parts, oldest first; rows go to the last one. A mark is how long each
part was, in bytes: a run that resumes from a checkpoint cuts its journals back to the marks in it.
"""

import os
import re
from pathlib import Path
from typing import Any

from .files import append_lines, read_lines, refuse_link, writing

Mark = list[list[int]]
"""Part and length in bytes, of each part."""


class Journal:
    """One such file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     journal = Journal(Path(folder), "events")
    ...     journal.append(['{"a": 1}'])
    ...     mark = journal.mark()
    ...     journal.append(['{"a": 2}'])
    ...     journal.rewind(mark)
    ...     journal.rows()
    [{'a': 1}]
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._last: int | None = None

    def parts(self) -> list[int]:
        """Return the numbers of the parts that there are, oldest first."""
        pattern = re.compile(re.escape(self.name) + r"(?:\.([1-9]\d{0,8}))?\.jsonl")
        found = [pattern.fullmatch(path.name) for path in self.folder.glob("*.jsonl")]
        return sorted(int(match[1] or 0) for match in found if match)

    def path(self, part: int) -> Path:
        """Return a part's file."""
        return self.folder / (f"{self.name}.{part}.jsonl" if part else f"{self.name}.jsonl")

    def append(self, lines: list[str]) -> None:
        """Append whole lines to the last part."""
        append_lines(self.path(self._newest()), lines)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of all parts, first to last; a torn last line is left out."""
        return [row for part in self.parts() for row in read_lines(self.path(part))]

    def mark(self) -> Mark:
        """Hand what was written to the disk itself, and return how long each part is."""
        marks = []
        for part in self.parts():
            with writing(self.path(part)), self.path(part).open("rb") as file:
                os.fsync(file.fileno())
                marks.append([part, file.seek(0, os.SEEK_END)])
        return marks

    def tail(self, mark: Mark) -> list[dict[str, Any]]:
        """Return the rows that were written after the mark."""
        lengths = {int(part): int(length) for part, length in mark}
        found = []
        for part in self.parts():
            with self.path(part).open("rb") as file:
                before = file.read(lengths.get(part, 0)).count(b"\n")
            found += read_lines(self.path(part))[before:]
        return found

    def rewind(self, mark: Mark) -> None:
        """Cut off everything that was written after the mark."""
        lengths = {int(part): int(length) for part, length in mark}
        for part in self.parts():
            path = self.path(part)
            with writing(path):
                if part not in lengths:
                    path.unlink()
                elif path.stat().st_size > lengths[part]:
                    refuse_link(path)
                    os.truncate(path, lengths[part])
        self._last = None

    def turn_over(self, most_bytes: int | float) -> bool:
        """Begin a new part if the last one has half of `most_bytes`; says whether it did."""
        newest = self._newest()
        path = self.path(newest)
        if not path.exists() or path.stat().st_size < most_bytes / 2:
            return False
        self._last = newest + 1
        return True

    def drop_old(self) -> None:
        """Delete all parts but the last and the one before it, once no checkpoint needs them."""
        for part in self.parts():
            if part < self._newest() - 1:
                with writing(self.path(part)):
                    self.path(part).unlink()

    def _newest(self) -> int:
        if self._last is None:
            self._last = max(self.parts(), default=0)
        return self._last
