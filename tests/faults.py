"""Runs in processes of their own, killed anywhere, and what two runs left compared to the bit.

`python -m tests.faults` is a server: it imports everything once and forks a child for each run, so that a run costs a
fork and not an import. It reads one job a line, as JSON, and answers with the child's status.
"""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch

from steadyrank import session
from steadyrank.config import RunConfig
from steadyrank.errors import SteadyRankError
from steadyrank.runs import RunFolder
from steadyrank.sequential import run

WRITERS = ("files.py", "checkpoints.py", "journal.py", "runs.py")
"""The modules that write: a kill before the n-th call that they make into C hits every place between two writes."""


class Killer:
    """Kills its own process before the n-th call into C from the modules that write."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if (
            event == "c_call"
            and frame.f_code.co_filename.endswith(WRITERS)
            and "steadyrank" in frame.f_code.co_filename
        ):
            self.calls += 1
            if self.calls == self.at:
                os.kill(os.getpid(), signal.SIGKILL)


def train_once(job: Mapping[str, Any]) -> int:
    """Train, or resume; return the exit code: 0, or 2 with the message on stderr."""
    config = RunConfig.from_toml(job["toml"])
    killer = Killer(job.get("kill_at", 0))
    path = Path(job["folder"])
    resume = (path / "config.toml").exists()
    try:
        folder = RunFolder.open(path) if resume else RunFolder.create(path, overwrite=path.exists())
        if not resume:
            folder.write_config(config.to_toml())
        if job.get("kill_at") or job.get("count"):
            sys.setprofile(killer)
        with folder:
            run(config.build(resume=resume), folder, resume=resume)
    except SteadyRankError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        sys.setprofile(None)
    if job.get("count"):
        (path.parent / "calls").write_text(str(killer.calls))
    return 0


def serve() -> None:
    """Fork a child for each job that comes in, kill it when its time is up, and answer with its status."""
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # which every child would else import for itself
    # Drawing takes three times as long as such a run, and the report is made anew from what is compared here.
    session.write_report = lambda folder: folder.write_report("")  # type: ignore[assignment,return-value]
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os.close(0)
            os._exit(train_once(job))
        timer = threading.Timer(job.get("seconds", 120.0), os.kill, (child, job.get("signal", signal.SIGKILL)))
        timer.start()
        _, status = os.waitpid(child, 0)
        timer.cancel()
        print(os.waitstatus_to_exitcode(status), flush=True)


class Server:
    """The server, as a context."""

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.faults"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(self, config: RunConfig, folder: Path, **options: Any) -> int:
        """Run a job; return 0, 2 for one of our errors, or minus the signal that killed it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"toml": config.to_toml(), "folder": str(folder), **options}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def run_killed(self, config: RunConfig, folder: Path, draw: random.Random, calls: int, seconds: float) -> int:
        """Run to the end with kills at random: at a call of the writers, or at a time; return how many hit."""
        kills = 0
        while True:
            if draw.random() < 0.5:
                code = self.run(config, folder, kill_at=draw.randrange(1, calls))
            else:
                code = self.run(config, folder, seconds=draw.uniform(0, seconds))
            assert code in (0, -signal.SIGKILL), f"a resumed run failed with {code}"
            if code == 0:
                return kills
            kills += 1
            if draw.random() < 0.3:
                assert self.run(config, folder) == 0
                return kills


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return where two states differ, bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        same = same and one.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8))
        return [] if same else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{where}: {sorted(map(str, one.keys() ^ other.keys()))} in one only"]
        return [found for key in one for found in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)}"]
        pairs = enumerate(zip(one, other, strict=True))
        return [found for i, (a, b) in pairs for found in differences(a, b, f"{where}/{i}")]
    return [] if repr(one) == repr(other) else [f"{where}: {one!r} and {other!r}"]


def left_by(folder: RunFolder) -> dict[str, Any]:
    """Return all that a run leaves, but for wall-clock times and what tells of processes."""
    state = folder.checkpoints.load()
    for key in ("seconds", "marks"):
        state.pop(key)
    tables = sorted({path.name.partition(".")[0] for path in (folder.path / "readings").glob("*.jsonl")})
    readings = {table: folder.readings(table) for table in tables}
    for columns in readings.values():
        for name in ("time", "speed/rows_per_s"):
            columns.pop(name, None)
    events = [{k: v for k, v in event.items() if k != "time"} for event in folder.events() if not event.get("process")]
    summary = folder.summary()
    assert summary is not None
    for key in ("seconds", "rows_per_s"):
        summary.pop(key)
    plain = {t: {n: np.asarray(v).tolist() for n, v in columns.items()} for t, columns in readings.items()}
    return {
        "checkpoints": folder.checkpoints.steps(),
        "state": state,
        "readings": plain,
        "events": events,
        "causes": folder.causes(),
        "summary": summary,
    }


def assert_same(one: RunFolder, other: RunFolder) -> None:
    """Check that two runs left the same, bit for bit."""
    found = differences(left_by(one), left_by(other))
    assert not found, "\n".join(found[:20])


def timed(server: Server, config: RunConfig, folder: Path) -> float:
    """Return the seconds that a whole run takes."""
    start = time.perf_counter()
    assert server.run(config, folder) == 0
    return time.perf_counter() - start


if __name__ == "__main__":
    serve()
