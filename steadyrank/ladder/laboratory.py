"""A ladder from its beginning, or from where it was stopped, to its tables and page."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import tomli_w
from filelock import FileLock, Timeout

from ..errors import CheckpointError, ConfigError
from ..files import replace, writing
from ..parts import find_device
from ..runs import RunFolder
from .grid import Cell, Ladder
from .live import Board, tell, tell_start
from .outcomes import Outcome, read_outcome, write_outcomes
from .pool import News, Pool, has_ended

CELLS, LADDER, OUTCOMES = "cells", "ladder.toml", "outcomes.csv"
_LOCK = ".lock"
_BEGUN = (_LOCK, f".{LADDER}.tmp")
"""What a folder may hold and still become a ladder's: one was killed before it had made it."""


class Found(NamedTuple):
    """What a ladder has found so far."""

    outcomes: list[Outcome]
    failed: dict[str, str]
    """By cell: why there is no outcome of it."""
    whole: bool
    """Every cell was tried; else it was stopped."""


def climb(
    ladder: Ladder, out: Path, *, overwrite: bool = False, board: Board | None = None, cells_in: Path | None = None
) -> Found:
    """Train every cell of a ladder that has not ended yet, and write outcomes.csv.

    A ladder that grows (more seeds, rates, optimizers) is gone on with in the same folder: what was trained with the
    same settings is taken as it is.

    Args:
        ladder: What to train.
        out: The ladder's folder: ladder.toml, outcomes.csv, and a run folder for each cell below `cells/`.
        overwrite: Delete what an earlier ladder left there.
        board: Is told what happens.
        cells_in: Where the run folders are, if not below `out`: two ladders that share cells train them once.

    Raises:
        ConfigError: A cell's settings cannot be, a cell in `out` has other settings, or another process is at it.
        DataError: The log cannot be opened.
    """
    board = board or Board()
    cells = ladder.cells()
    named = {cell.name: cell for cell in cells}
    _check_logs(cells)
    with _locked(out, overwrite) as folder:
        runs = cells_in or folder / CELLS
        before = [outcome for cell in cells if (outcome := _find(runs, cell, ladder)) is not None]
        settings = ladder.config.model_dump(mode="json", by_alias=True, exclude_none=True)
        with writing(folder / LADDER, ConfigError, "choose another --out"):
            replace(folder / LADDER, tomli_w.dumps({**ladder.raw, "ladder": settings}))
            runs.mkdir(parents=True, exist_ok=True)
        board.begin(cells, ladder.workers(), before)
        tell_start(board, folder)

        def hear(news: News) -> None:
            news, outcome = _look(news, runs, named[news.cell], ladder)
            board.hear(news, outcome)
            tell(board, news, outcome)

        pool = Pool(runs, ladder.workers(), ladder.config.keep_checkpoints, hear)
        try:
            whole = pool.train([cell for cell in cells if cell.name not in board.outcomes])
        finally:
            found = [board.outcomes[cell.name] for cell in cells if cell.name in board.outcomes]
            write_outcomes(folder / OUTCOMES, found)
    return Found(found, board.failed, whole)


def _find(runs: Path, cell: Cell, ladder: Ladder) -> Outcome | None:
    """Return what came of a cell that ended before; None where it has not, or is damaged: it is trained (again)."""
    try:
        return _read(runs, cell, ladder) if has_ended(runs, cell) else None
    except CheckpointError:
        return None


def _look(news: News, runs: Path, cell: Cell, ladder: Ladder) -> tuple[News, Outcome | None]:
    """Return the news of a cell with its outcome; one that cannot be read has failed."""
    if news.kind != "ended":
        return news, None
    try:
        return news, _read(runs, cell, ladder)
    except CheckpointError as error:
        return News("failed", cell.name, words=str(error)), None


def _read(runs: Path, cell: Cell, ladder: Ladder) -> Outcome:
    return read_outcome(RunFolder.open(runs / cell.name), cell, ladder.config)


def _check_logs(cells: Sequence[Cell]) -> None:
    """Open each log once, so that a wrong path, column or device is one error and not one for each cell."""
    seen = set()
    for device in {cell.config.train.device for cell in cells}:
        find_device(device)
    for cell in cells:
        config = cell.config
        key = (
            config.data.model_copy(update={"seed": 0}) if hasattr(config.data, "seed") else config.data
        ).model_dump_json()
        if (key := key + config.schema_.model_dump_json() + config.reader.model_dump_json()) not in seen:
            seen.add(key)
            config.build_reader()


@contextmanager
def _locked(out: Path, overwrite: bool) -> Iterator[Path]:
    """Make or take up the ladder's folder, and keep every other ladder out of it."""
    with writing(out, ConfigError, "choose another --out"):
        if out.is_dir() and not (out / LADDER).exists() and any(path.name not in _BEGUN for path in out.iterdir()):
            raise ConfigError(f"{out} is not empty and is no ladder's folder; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"another process trains the ladder in {out}; wait for it, or choose another --out"
            ) from error
    try:
        if overwrite and (out / CELLS).is_dir() and not (out / CELLS).is_symlink():
            with writing(out / CELLS, ConfigError, "choose another --out"):
                shutil.rmtree(out / CELLS)
        yield out
    finally:
        lock.release()
