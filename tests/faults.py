"""Runs in processes of their own, killed anywhere or short of disk, and what two runs left compared to the bit.

`python -m tests.faults` is a server: it imports everything once and forks a child for each run, so that a run costs a
fork and not an import. It reads one job a line, as JSON, and answers with the child's status.

A job is `toml`, `folder`, and perhaps
- `overwrite`, or `report`, which it draws then; `count`: it writes down how many calls and writes there were
- `kill_at` (before that call of the writers), `kill_at_step`, `kill_at_wait`; `seconds`, after which `signal` is sent
- `signal_at` (a step, "waiting" or "checkpoint") and `signals` (how many), `patience_s`; `step_s`: how long one takes
- `full_at` and `full_for`: from that write on so many fail
- `feed`: files to copy when the run waits, up to the next one of a day; `hide`: a folder that is away meanwhile
"""

import atexit
import errno
import functools
import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import safetensors
import torch

from steadyrank import checkpoints, session, shards, stopping
from steadyrank.config import RunConfig
from steadyrank.errors import SteadyRankError
from steadyrank.report import page
from steadyrank.runs import RunFolder
from steadyrank.sequential import run

from .tiny import tiny

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


class FullDisk:
    """Lets some writes of this process fail as on a full disk, each after half of its bytes."""

    def __init__(self, at: int, count: int) -> None:
        self.at, self.count, self.writes = at, count, 0
        self._save, self._open, self._fsync, self._mkdir = shards.save_file, Path.open, os.fsync, Path.mkdir
        shards.save_file, Path.open = self.save_file, lambda path, *a, **k: self.open(path, *a, **k)  # type: ignore
        os.fsync, Path.mkdir = self.fsync, lambda path, *a, **k: self.mkdir(path, *a, **k)  # type: ignore

    def is_full(self) -> bool:
        self.writes += 1
        return self.at <= self.writes < self.at + self.count

    def check(self) -> None:
        if self.is_full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open(self, path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = self._open(path, mode, *args, **options)
        return HalfWriter(file, self) if set(mode) & set("wax+") else file

    def fsync(self, handle: int) -> None:
        self.check()
        self._fsync(handle)

    def mkdir(self, path: Path, *args: Any, **options: Any) -> None:
        self.check()
        self._mkdir(path, *args, **options)

    def save_file(self, tensors: dict[str, torch.Tensor], path: Path, *rest: Any) -> None:
        if self.is_full():
            path.write_bytes(b"\0" * 100)
            raise safetensors.SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
        self._save(tensors, path, *rest)


class HalfWriter:
    """A file whose writes the disk may refuse."""

    def __init__(self, file: io.IOBase, disk: FullDisk) -> None:
        self._file, self._disk = file, disk

    def __enter__(self) -> "HalfWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        full = self._disk.is_full()
        written = self._file.write(data[: len(data) // 2] if full else data)  # type: ignore[attr-defined]
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(written)


def train_once(job: Mapping[str, Any]) -> int:
    """Train, or resume; return the exit code: 0, 2 with the message in FOLDER.error, or 130 when it was stopped."""
    config = RunConfig.from_toml(job["toml"], ["train.report=true"])
    killer = Killer(job.get("kill_at", 0))
    path = Path(job["folder"])
    resume = (path / "config.toml").exists() and not job.get("overwrite")
    path.with_suffix(".error").unlink(missing_ok=True)
    disk = FullDisk(job.get("full_at", 0), job.get("full_for", 0)) if "full_at" in job or "count" in job else None
    if not job.get("report"):  # drawing takes three times as long as such a run; what is written is all that matters
        page.write_report = lambda folder: folder.write_report("")  # type: ignore[assignment,return-value]
    try:
        folder = RunFolder.open(path) if resume else RunFolder.create(path, overwrite=path.exists())
        if not resume:
            folder.write_config(config.to_toml())
        hook_in(job)
        if job.get("kill_at") or job.get("count"):
            sys.setprofile(killer)
        with folder:
            parts = config.build(resume=resume)
            summary = run(parts, folder, on_event=functools.partial(feed, job), resume=resume)
    except SteadyRankError as error:
        with open(path.with_suffix(".error"), "w") as file:  # not a `Path.open`, which the disk may refuse
            file.write(f"{type(error).__name__}: {error}")
        return 2
    finally:
        sys.setprofile(None)
    if job.get("count") and disk is not None:
        path.with_suffix(".count").write_text(f"{killer.calls} {disk.writes}")
    return 130 if summary["status"] == "interrupted" else 0


def hook_in(job: Mapping[str, Any]) -> None:
    """Put what is to happen in the steps, or at a checkpoint, into this process."""
    signal_at = job.get("signal_at")
    if not {"signal_at", "step_s", "kill_at_step"} & job.keys():
        return
    fit, save = session.fit, checkpoints.Checkpoints.save
    stopping.PATIENCE_S = job.get("patience_s", stopping.PATIENCE_S)

    def fit_with_faults(*args: Any, **options: Any) -> Iterator[Any]:
        for step, (batch, outcome) in enumerate(fit(*args, **options), start=1):
            time.sleep(job.get("step_s", 0.0))
            if step == signal_at:
                hit(job)
            if step == job.get("kill_at_step"):
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch, outcome

    def save_with_faults(self: checkpoints.Checkpoints, *args: Any, **options: Any) -> Path:
        if signal_at == "checkpoint":
            hit(job)
        return save(self, *args, **options)

    session.fit = fit_with_faults  # type: ignore[assignment]
    checkpoints.Checkpoints.save = save_with_faults  # type: ignore[method-assign]


def hit(job: Mapping[str, Any]) -> None:
    """Signal this process: SIGTERM and SIGINT in turn."""
    for i in range(job.get("signals", 1)):
        os.kill(os.getpid(), (signal.SIGTERM, signal.SIGINT)[i % 2])


def feed(job: Mapping[str, Any], step: int, kind: str, message: str) -> None:
    """When the run waits for files, give it the next one."""
    if kind != "waiting":
        return
    if job.get("signal_at") == "waiting":
        hit(job)
    if job.get("kill_at_wait"):
        os.kill(os.getpid(), signal.SIGKILL)
    if (hidden := Path(job.get("hide", "/"))).name:  # away at one look, back at the next
        aside = hidden.with_suffix(".aside")
        hidden.rename(aside) if not aside.exists() and "no file or folder" not in message else aside.rename(hidden)
        if "no file or folder" not in message:
            return
    for source, target in job.get("feed", ()):
        if not Path(target).exists():
            shutil.copyfile(source, f"{target}.part")
            os.rename(f"{target}.part", target)
            if Path(target).name.startswith("day_"):
                return


def serve() -> None:
    """Fork a child for each job that comes in, kill it when its time is up, and answer with its status."""
    torch.set_num_threads(1)
    stopping.PAUSE_S = 0.01
    for module in ("torch._dynamo", "tensorboard.compat.proto.event_pb2", "torch.utils.tensorboard"):
        importlib.import_module(module)  # which every child would else import for itself
    with tempfile.TemporaryDirectory() as folder:  # and the first run in a process takes four times as long
        train_once({"toml": tiny().to_toml(), "folder": f"{folder}/run", "report": True})
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os.close(0)
            code = 1
            try:
                code = train_once(job)
            finally:
                os._exit(code)
        timer = threading.Timer(job.get("seconds", 120.0), os.kill, (child, job.get("signal", signal.SIGKILL)))
        timer.start()
        _, status = os.waitpid(child, 0)
        timer.cancel()
        print(os.waitstatus_to_exitcode(status), flush=True)


class Server:
    """The server; started once, and ended with the tests."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.faults"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        atexit.register(self.close)

    def close(self) -> None:
        self.process.communicate()

    def run(self, config: RunConfig, folder: Path, **options: Any) -> int:
        """Run a job; return 0, 2 for one of our errors, 130 if it was stopped, or minus the signal that killed it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"toml": config.to_toml(), "folder": str(folder), **options}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def finish(self, config: RunConfig, folder: Path, **options: Any) -> RunFolder:
        """Run a job to its end, and return its folder."""
        code = self.run(config, folder, **options)
        assert code == 0, f"{code}: {error_of(folder)}"
        return RunFolder.open(folder)

    def run_killed(
        self, config: RunConfig, folder: Path, draw: random.Random, calls: int, seconds: float, **options: Any
    ) -> int:
        """Run to the end with kills at random: at a call of the writers, or at a time; return how many hit."""
        kills = 0
        while True:
            if draw.random() < 0.5:
                code = self.run(config, folder, kill_at=draw.randrange(1, calls), **options)
            else:
                code = self.run(config, folder, seconds=draw.uniform(0, seconds), **options)
            assert code in (0, -signal.SIGKILL), f"a resumed run failed with {code}: {error_of(folder)}"
            if code == 0:
                return kills
            kills += 1
            if draw.random() < 0.3:
                self.finish(config, folder, **options)
                return kills


@functools.cache
def start_server() -> Server:
    return Server()


def error_of(folder: Path) -> str:
    """Return our error, with which the last run there ended; "" for none."""
    path = folder.with_suffix(".error")
    return path.read_text() if path.exists() else ""


def counts_of(folder: Path) -> tuple[int, int]:
    """Return how many calls of the writers, and how many writes, a run with `count` made."""
    calls, writes = folder.with_suffix(".count").read_text().split()
    return int(calls), int(writes)


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


def assert_same(one: RunFolder, other: RunFolder, ignore: Callable[[str], bool] = lambda where: False) -> None:
    """Check that two runs left the same, bit for bit, but for the places to `ignore`."""
    found = [where for where in differences(left_by(one), left_by(other)) if not ignore(where)]
    assert not found, "\n".join(found[:20])


def kinds(folder: RunFolder) -> list[str]:
    """Return the kinds of a run's events."""
    return [event["kind"] for event in folder.events()]


if __name__ == "__main__":
    serve()
