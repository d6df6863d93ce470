"""Cells trained several at once, each in a process of its own that trains one after the other."""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..config import RunConfig
from ..errors import CheckpointError, ConfigError, SteadyRankError
from ..parts import Progress
from ..runs import RunFolder
from ..sequential import run
from ..stopping import stop_on_signals
from .grid import Cell

_LOOK_S = 0.25
_NEWS_S = 0.5
_PATIENCE_S = 60.0
"""Seconds that a cell is given to stop with a checkpoint."""


class News(NamedTuple):
    """What a cell's process tells."""

    kind: Literal["began", "progress", "ended", "failed"]
    cell: str
    done: float = 0.0
    """Share of its rows that are learned."""
    words: str = ""
    """How it ended, or what failed."""


OnNews = Callable[[News], None]


@dataclass
class _Worker:
    """A process that trains cells."""

    process: Any
    link: Connection
    cell: Cell | None = None


@dataclass
class Pool:
    """Trains cells, so many at once.

    Args:
        folder: Where each cell has its run folder.
        workers: How many processes.
        keep_checkpoints: Keep the weights of cells that have ended.
        on_news: Called with what happens.
    """

    folder: Path
    workers: int
    keep_checkpoints: bool
    on_news: OnNews

    def train(self, cells: Sequence[Cell]) -> bool:
        """Train the cells that have not ended yet; says whether all were tried: a signal ends it early.

        Every cell that is under way when a signal comes leaves a checkpoint, from which it goes on the next time.
        """
        waiting = deque(cells)
        with stop_on_signals() as stop:
            pool = [self._start() for _ in range(min(self.workers, len(waiting)))]
            try:
                for worker in pool:
                    self._hand_out(worker, waiting)
                while any(worker.cell for worker in pool) and not stop.is_set():
                    for link in wait([worker.link for worker in pool if worker.cell], timeout=_LOOK_S):
                        place = next(i for i, worker in enumerate(pool) if worker.link is link)
                        pool[place] = self._listen(pool[place], waiting)
            finally:
                for worker in pool:
                    self._end(worker)
        return not stop.is_set()

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, str(self.folder), self.keep_checkpoints), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _hand_out(self, worker: _Worker, waiting: deque[Cell]) -> None:
        worker.cell = waiting.popleft() if waiting else None
        if worker.cell is not None:
            worker.link.send((worker.cell.name, worker.cell.config.to_toml()))
            self.on_news(News("began", worker.cell.name))

    def _listen(self, worker: _Worker, waiting: deque[Cell]) -> _Worker:
        """Take in what a worker says; one that has died is replaced."""
        assert worker.cell is not None
        try:
            news = worker.link.recv()
        except (EOFError, ConnectionError):
            worker.process.join()
            code = worker.process.exitcode
            reason = f"killed by signal {-code}, perhaps for lack of memory" if code < 0 else f"exit code {code}"
            news = News("failed", worker.cell.name, words=f"its process ended: {reason}")
            fresh = self._start()
            worker = _Worker(fresh.process, fresh.link, worker.cell)
        self.on_news(news)
        if news.kind in ("ended", "failed"):
            self._hand_out(worker, waiting)
        return worker

    def _end(self, worker: _Worker) -> None:
        """Let a worker stop: one that trains does so with a checkpoint, one that waits for a cell finds none."""
        if worker.cell is not None:
            worker.process.terminate()
        worker.link.close()
        worker.process.join(_PATIENCE_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def has_ended(folder: Path, cell: Cell) -> bool:
    """Say whether a cell's run has ended.

    Raises:
        ConfigError: What stands there is of a run with other settings.
    """
    path = folder / cell.name
    if not (path / "environment.json").exists():
        return False
    there = RunFolder.open(path)
    try:
        same = RunConfig.from_toml(there.config_text()) == cell.config
    except (CheckpointError, ConfigError):
        same = not (path / "config.toml").exists()  # killed before it was written
    if not same:
        raise ConfigError(
            f"{path} was trained with other settings; choose another --out, or --overwrite to train the ladder anew"
        )
    summary = there.summary()
    return summary is not None and summary["status"] in ("finished", "diverged")


def _work(link: Connection, folder: str, keep_checkpoints: bool) -> None:
    """Train what comes over the link until nothing more comes; the life of a worker."""
    with suppress(OSError):
        os.setsid()  # Ctrl-C reaches the parent alone, which then ends its workers one by one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            task = link.recv()
        except (EOFError, ConnectionError):  # the parent has no more cells, or has died
            return
        name, text = task
        try:
            words = _train(link, Path(folder) / name, name, text, keep_checkpoints)
            link.send(News("ended", name, 1.0, words))
        except SteadyRankError as error:
            link.send(News("failed", name, words=str(error)))
        except MemoryError:
            link.send(News("failed", name, words="no memory was left; set ladder.workers = 1"))


def _train(link: Connection, path: Path, name: str, text: str, keep_checkpoints: bool) -> str:
    """Train one cell, from its beginning or from where it was stopped; says how it ended."""
    config = RunConfig.from_toml(text, where=name)
    begun = (path / "environment.json").exists() and (path / "config.toml").exists()
    parts = config.build(resume=begun)
    last = 0.0

    def tell(now: Progress) -> None:
        nonlocal last
        if time.monotonic() - last > _NEWS_S:
            last = time.monotonic()
            link.send(News("progress", name, now.rows / max(now.total_rows, 1)))

    with RunFolder.open(path) if begun else RunFolder.create(path, overwrite=path.exists()) as folder:
        if not begun:
            folder.write_config(text)
        try:
            status = run(parts, folder, on_progress=tell, resume=begun)["status"]
        except SteadyRankError:
            if (folder.summary() or {}).get("status") != "diverged":
                raise
            status = "diverged"
        if status == "interrupted":
            raise SystemExit(0)
        if not keep_checkpoints:
            folder.checkpoints.prune(0)
    return str(status)
