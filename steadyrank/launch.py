"""Starting a run: alone, or as one of the processes that torchrun started."""

import hashlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from .config import RunConfig
from .errors import RankError, SteadyRankError
from .ranks import ALONE, Ranks, join, leave, started_together
from .ranks.rollcall import RollCall, calling, current, watched
from .ranks.roster import forget, recall, remember
from .runs import OthersFolder, RunFolder, next_folder
from .sequential import find_device
from .terminal import complain, console, errors

_FOLDER = "steadyrank/folder/"
_STOPPED = "stopped"


class _StoppedError(KeyboardInterrupt):
    """A signal came where no run catches it."""


@contextmanager
def meeting(config: RunConfig) -> Iterator[Ranks]:
    """Meet the other processes, if torchrun started some; all but the first are silent from here on.

    What goes wrong in one process ends the block in all of them, within seconds and with one message on each machine.
    The process then ends here: gloo's and NCCL's threads can keep an interpreter from doing so, or abort it.

    Raises:
        ConfigError: They do not meet.
    """
    if not started_together():
        yield ALONE
        return
    timeout_s = config.distributed.timeout_s
    with _signals_raise() as ignore_signals:
        ranks = join(find_device(config.train.device), timeout_s)
        console.quiet = not ranks.is_first
        with calling(ranks, timeout_s, _end_hanging) as call:
            try:
                with watched():
                    yield ranks
            except BaseException as error:  # of whatever it is, the others must hear
                ignore_signals()
                if type(error) is KeyboardInterrupt and ranks.is_first:  # as agreed; a resume is asked for by hand
                    forget(_key(config))
                _end_together(call, error)
            if ranks.is_first:
                forget(_key(config))
            call.tell("left", "")
        leave()


@contextmanager
def _signals_raise() -> Iterator[Callable[[], None]]:
    """Let SIGTERM and Ctrl-C raise where no run catches them, until the function that is yielded is called."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    deaf = False

    def handle(signum: int, frame: FrameType | None) -> None:
        call = current()
        if not deaf and not (call is not None and call.closing):
            raise _StoppedError(signal.Signals(signum).name)

    def ignore() -> None:
        nonlocal deaf
        deaf = True

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ignore
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _end_hanging(found: RankError) -> NoReturn:
    """End the process from the thread of the roll call."""
    call = current()
    assert call is not None
    _end(2, "" if call.is_told_by_another(found) else _words(call.rank, found))


def _end_together(call: RollCall, error: BaseException) -> NoReturn:
    """End the process after an error: the others hear of it, and one on each machine tells it."""
    call.closing = True
    found: BaseException | None = error
    if isinstance(error, _StoppedError):  # by the user, or by torchrun, which lost another rank
        call.tell("stopped", str(error))
        found = call.ask(error)
    elif isinstance(error, SystemExit) or type(error) is KeyboardInterrupt:
        call.tell("left", "")
        found = None
    elif not isinstance(error, RankError):
        call.tell("failed", str(error) if isinstance(error, SteadyRankError) else f"{type(error).__name__}: {error}")
    call.linger()
    text = ""
    if found is not None and not call.is_told_by_another(found):
        is_ours = isinstance(found, SteadyRankError)
        text = str(found) if is_ours else "".join(traceback.format_exception(found))
    if isinstance(error, SystemExit):
        _end(error.code if isinstance(error.code, int) else 1, "")
    if found is None:
        _end(130, _STOPPED if call.rank == 0 else "")
    _end(2 if isinstance(found, SteadyRankError) else 1, _words(call.rank, text) if text else "")


def _words(rank: int, found: object) -> str:
    return f"rank {rank}: {found}" if rank else str(found)


def _end(code: int, text: str) -> NoReturn:
    """End the process at once."""
    if text == _STOPPED:
        errors.print(text)
    elif text:
        complain(RankError(text))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _key(config: RunConfig) -> str:
    return _FOLDER + hashlib.sha256(config.to_toml().encode()).hexdigest()


def begun_before(config: RunConfig, out: Path | None, ranks: Ranks) -> Path | None:
    """Return the run folder that the same command made before torchrun started its processes anew; None if none did.

    The launcher's memory knows: what is not in it was made by another job. A run that came to its end is forgotten.
    """
    if ranks.is_alone:
        return None
    found = ranks.on_first(lambda: recall(_key(config)))
    given, path = json.loads(found or '["", ""]')
    return Path(path) if path and given == str(out) and (Path(path) / "config.toml").exists() else None


def create_folder(config: RunConfig, out: Path | None, ranks: Ranks, *, overwrite: bool = False) -> RunFolder:
    """Make a run folder, with the configuration in it; the other ranks see it and write nothing.

    Raises:
        ConfigError: There is one, or it cannot be written.
    """

    def create() -> Path:
        folder = RunFolder.create(out or next_folder(config.name), overwrite=overwrite)
        folder.write_config(config.to_toml())
        if not ranks.is_alone:
            remember(_key(config), json.dumps([str(out), str(folder.path.absolute())]))
        return folder.path

    path = ranks.on_first(create)
    return RunFolder(path) if ranks.is_first else OthersFolder(path)


def open_folder(path: Path, ranks: Ranks) -> RunFolder:
    """Open a run folder to go on with it; the other ranks see it and write nothing."""
    return RunFolder.open(path) if ranks.is_first else OthersFolder.open(path)
