"""Sequential training with progressive validation: every row is scored as in serving before it is learned."""

from contextlib import ExitStack
from functools import partial
from typing import Any

from .errors import DataError, DivergenceError, SteadyRankError
from .parts import OnEvent as OnEvent
from .parts import OnProgress as OnProgress
from .parts import Parts as Parts
from .parts import Progress as Progress
from .parts import TrainConfig as TrainConfig
from .parts import find_device as find_device
from .ranks.rollcall import fail_alike, watched
from .runs import RunFolder
from .session import Session
from .stopping import stop_on_signals


def run(
    parts: Parts,
    folder: RunFolder,
    *,
    on_progress: OnProgress | None = None,
    on_event: OnEvent | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train over the whole log in time order and leave everything in the run folder.

    Ctrl-C and SIGTERM end after the steps up to the next reading, or after two seconds, with a checkpoint. Whatever
    ends the run early, the run up to there is kept. A run that is killed at any moment and resumed is, bit for bit on
    CPU, the run that was never killed: weights, optimizer states, metrics, readings and events.

    Args:
        parts: What to train, on what.
        folder: An open run folder with its configuration written; no other process may write there.
        on_progress: Called at each reading.
        on_event: Called with what a user should see at once: bad steps, what the recovery does, files, damage.
        resume: Go on from the newest checkpoint that is whole, or from the beginning where there is none.

    Returns:
        The summary, as in summary.json.

    Raises:
        DataError: The log cannot be read to its end, or is not the one that was read before.
        DivergenceError: A step was not finite and `on_bad_step` is "stop", the run has fully diverged
            (`train.give_up_windows`), or the recovery gave up.
        CheckpointError: The run folder cannot be written, or its checkpoint belongs to another model.
        ConfigError: Another process is training in the folder.
    """
    parts.set_up()
    with ExitStack() as held:
        parts.ranks.together(lambda: held.enter_context(folder.locked()))
        stop = held.enter_context(stop_on_signals())
        session = Session(parts, folder, stop, on_progress, on_event)
        held.enter_context(watched(folder.path, partial(_note_loss, session)))
        if resume:
            session.resume()
        if not session.step:
            if "ranks" in parts.facts:
                folder.event(0, "ranks", parts.facts["ranks"]["words"], process=True)
            if parts.precision is not None:
                folder.event(0, "precision", str(parts.precision))
            for part, line in parts.facts.get("bound", {}).items():
                folder.event(0, "bound", f"optimizer.{part}: {line}")
        status, message = "finished", ""
        failure: SteadyRankError | None = None
        try:
            try:
                session.loop()
            except DataError as error:
                fail_alike(error)
                status, message, failure = "data_error", str(error), error
            except DivergenceError as error:
                fail_alike(error)
                status, message, failure = "diverged", str(error), error
            if session.stop.is_set() and failure is None:
                status, message = "interrupted", f"stopped by the user at step {session.step}"
            summary = session.finish(status, message)
        finally:
            session.trackers.close(ok=False)  # where the disk, or a second Ctrl-C, ends it at once
    if failure is not None:
        raise failure
    return summary


def _note_loss(session: Session, words: str) -> None:
    session.folder.event(session.step, "rank_lost", words, process=True)
