"""`steadyrank` in a process that test_rank_faults.py lets go wrong: torchrun -m tests.rank_fault_processes train ...

FAULT in the environment is JSON: what to `do`, on which `rank` (all when left out), after which `step` (before the
model is built when it is 0), and in which `attempt` alone.
"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steadyrank import cli, errors, launch, session
from steadyrank.distributed import engine

FAULT: dict[str, Any] = json.loads(os.environ.get("FAULT", "{}"))


def fail_on_disk() -> None:
    try:
        raise OSError(errno.EIO, "Input/output error")
    except OSError as error:
        raise errors.CheckpointError("cannot write there: the disk is broken") from error


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raise_bug() -> None:
    raise RuntimeError("mat1 and mat2 cannot be multiplied")


def raise_type_error() -> None:
    raise TypeError("a bug of another kind")


def hang() -> None:
    time.sleep(600)


def nap() -> None:
    time.sleep(FAULT["seconds"])


def touch() -> None:
    """Tell the test that the step is reached, which then does something, and go on slowly."""
    Path(FAULT["file"]).touch()
    time.sleep(0.2)


def touch_and_hang() -> None:
    touch()
    hang()


DEEDS: dict[str, Callable[[], None]] = {
    "disk": fail_on_disk,
    "kill": kill,
    "bug": raise_bug,
    "type_error": raise_type_error,
    "hang": hang,
    "nap": nap,
    "touch": touch,
    "touch_and_hang": touch_and_hang,
}


def is_meant() -> bool:
    rank, attempt = os.environ["RANK"], os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return rank == str(FAULT.get("rank", rank)) and attempt == str(FAULT.get("attempt", attempt))


def go_wrong() -> None:
    note, begun_before = session.Session._note, launch.begun_before

    def noted(self: session.Session, *args: Any) -> None:
        note(self, *args)
        if self.step == FAULT["step"] or (self.step > FAULT["step"] and FAULT["do"] == "touch"):
            DEEDS[FAULT["do"]]()

    def begun(*args: Any) -> Any:
        DEEDS[FAULT["do"]]()
        return begun_before(*args)

    if FAULT["do"] == "nap":  # it is slow in computing, not between the steps
        model_forward = engine._Both.forward
        engine._Both.forward = lambda self, batch: DEEDS["nap"]() or model_forward(self, batch)  # type: ignore
    elif FAULT["step"]:
        session.Session._note = noted  # type: ignore[method-assign]
    else:
        launch.begun_before = begun


if __name__ == "__main__":
    if "rank_toml" in FAULT and is_meant():  # another configuration than the other ranks
        sys.argv += FAULT["rank_toml"]
    if "do" in FAULT and is_meant():
        go_wrong()
    cli.main()
