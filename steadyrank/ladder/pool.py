"""Cells trained several at once, each in a process of its own that trains one after the other."""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..config import RunConfig
from ..errors import CheckpointError, ConfigError, SteadyRankError
from ..parts import Progress
from ..runs import RunFolder
from ..sequential import run
from ..settings import flatten
from ..stopping import stop_on_signals
from .grid import Cell

_START = "spawn"  # torch's threads do not survive a fork
_LOOK_S = 0.25
_NEWS_S = 0.5
_PATIENCE_S = 60.0
"""Seconds that cells are given to stop with a checkpoint."""
TRACEBACK = "traceback.txt"
"""What a cell's folder holds after an error that is not one of ours."""


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
                self._end(pool)
        return not stop.is_set()

    def _start(self) -> _Worker:
        context: Any = multiprocessing.get_context(_START)  # typed by a literal name alone
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, str(self.folder), self.keep_checkpoints), daemon=True)
        try:
            with _ctrl_c_held():
                process.start()
        except OSError as error:
            raise ConfigError(f"no process could be started for a cell: {error}; set ladder.workers lower") from error
        theirs.close()
        return _Worker(process, ours)

    def _hand_out(self, worker: _Worker, waiting: deque[Cell]) -> None:
        worker.cell = waiting.popleft() if waiting else None
        if worker.cell is not None:
            with suppress(OSError):  # it has died: `_listen` will hear of it
                worker.link.send((worker.cell.name, worker.cell.config.to_toml()))
            self.on_news(News("began", worker.cell.name))

    def _listen(self, worker: _Worker, waiting: deque[Cell]) -> _Worker:
        """Take in what a worker says; one that has died is replaced."""
        assert worker.cell is not None
        try:
            news = worker.link.recv()
        except (EOFError, OSError):
            worker.process.join()
            code = worker.process.exitcode
            reason = f"killed by signal {-code}, perhaps for lack of memory" if code < 0 else f"exit code {code}"
            news = News("failed", worker.cell.name, words=f"its process ended: {reason}")
            worker.link.close()
            fresh = self._start()
            worker = _Worker(fresh.process, fresh.link, worker.cell)
        self.on_news(news)
        if news.kind in ("ended", "failed"):
            self._hand_out(worker, waiting)
        return worker

    def _end(self, pool: Sequence[_Worker]) -> None:
        """Let all workers stop: one that trains does so with a checkpoint, one that waits is told of no more cells."""
        for worker in pool:
            if worker.cell is not None:
                worker.process.terminate()
            with suppress(OSError):
                worker.link.send(None)
        end = time.monotonic() + _PATIENCE_S
        for worker in pool:
            worker.process.join(max(end - time.monotonic(), 0))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            with suppress(EOFError, OSError):
                while worker.link.poll():  # a cell that ended in the meantime
                    self.on_news(worker.link.recv())
            worker.link.close()


@contextmanager
def _ctrl_c_held() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends; a process that is started in it never gets one, not even as it begins."""
    resource_tracker.ensure_running()  # else it is started in the block, and lets Ctrl-C in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
        text = there.config_text()
        other = "" if text == cell.config.to_toml() else _difference(RunConfig.from_toml(text), cell.config)
    except (CheckpointError, ConfigError) as error:
        other = str(error) if (path / "config.toml").exists() else ""  # killed before it was written
    if other:
        raise ConfigError(
            f"{path} was trained with other settings ({other}); choose another --out, or --overwrite to train the "
            "ladder anew"
        )
    summary = there.summary()
    return summary is not None and summary["status"] in ("finished", "diverged")


def _difference(there: RunConfig, here: RunConfig) -> str:
    """Say where two configurations first differ; empty where only threads do, which another machine has more of."""
    one, other = (flatten(config.model_dump(mode="json", by_alias=True)) for config in (there, here))
    names = [name for name in {**one, **other} if name != "train.threads" and one.get(name) != other.get(name)]
    return f"{names[0]} = {one.get(names[0])} there, {other.get(names[0])} here" if names else ""


def _work(link: Connection, folder: str, keep_checkpoints: bool) -> None:
    """Train what comes over the link until nothing more comes; the life of a worker."""
    with suppress(OSError):
        os.setsid()  # Ctrl-C reaches the parent alone, which then ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_outlive_no_parent, daemon=True).start()
    with suppress(EOFError, OSError):  # the parent has died
        while (task := link.recv()) is not None:
            name, text = task
            link.send(_try(link, Path(folder) / name, name, text, keep_checkpoints))


def _outlive_no_parent() -> None:
    """Stop this process, with a checkpoint, once its parent is gone: the next ladder will want its cell."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _try(link: Connection, path: Path, name: str, text: str, keep_checkpoints: bool) -> News:
    """Train one cell, and return how it went; an error of ours ends it, and no other cell."""
    try:
        return News("ended", name, 1.0, _train(link, path, name, text, keep_checkpoints))
    except SteadyRankError as error:
        return News("failed", name, words=str(error))
    except MemoryError:
        return News("failed", name, words="no memory was left; set ladder.workers = 1")
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        with suppress(OSError):
            (path / TRACEBACK).write_text(traceback.format_exc())
            words += f" (more in {path / TRACEBACK})"
        return News("failed", name, words=words)


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
            with suppress(OSError):  # nobody listens any more; `_outlive_no_parent` ends it
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
