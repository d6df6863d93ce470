"""torchrun's processes go wrong in every way that they can: a run ends soon, says why once, and can go on.

Each test starts processes, which takes seconds: but for two runs they are marked slow.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from steadyrank.runs import RunFolder

from .tiny import tiny

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch has no gloo here"
)


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sets = ["data.rows=3840", "data.item_life_days=10000.0", "distributed.tables='replicated'", "train.threads=1"]
    path = tmp_path_factory.mktemp("toml") / "run.toml"
    path.write_text(tiny(*sets, "train.checkpoint_every=6", "watch.enabled=false").to_toml())
    return path


def environment(fault: dict[str, Any]) -> dict[str, str]:
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "FAULT"}
    kept = {key: value for key, value in os.environ.items() if key not in launched}
    return {**kept, "FAULT": json.dumps(fault), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(*options: str, ranks: int = 2) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *options]
    return [*run, "-m", "tests.rank_fault_processes", "train"]


def start(command: Sequence[str], fault: dict[str, Any], prefix: Sequence[str] = ()) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*prefix, *command],
        env=environment(fault),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: "subprocess.Popen[str]", seconds: float = 120.0) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()


def train(command: Sequence[str], fault: dict[str, Any], expected: int = 1) -> str:
    """Run a command, and return what it printed, on one line."""
    process = start(command, fault)
    words = " ".join(finish(process).split())
    assert process.returncode == expected, words[-3000:]
    return words


def errors(words: str) -> list[str]:
    """Return what our processes complained of."""
    return [found.strip() for found in re.findall(r"error: (.*?)(?= error: | [EW]\d{4} |$)", words)]


def differing(one: Path, other: Path) -> list[str]:
    """Return the tensors that differ between the last states of two runs; torch's own generator is not used."""
    a, b = (load_file(max((p / "checkpoints").glob("step_*"), key=_step) / "tensors.safetensors") for p in (one, other))
    assert a.keys() == b.keys()
    return [key for key in a if key != "generators/torch" and not torch.equal(a[key].nan_to_num(), b[key].nan_to_num())]


def seconds_to_notice(path: Path) -> float:
    """Return the seconds between the last reading and the loss of a rank."""
    folder = RunFolder.open(path)
    (lost,) = (event["time"] for event in folder.events() if event["kind"] == "rank_lost")
    return float(lost - folder.readings("steps")["time"][-1])


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def readings(path: Path) -> dict[str, str]:
    folder = RunFolder.open(path)
    tables = {table: folder.readings(table) for table in ("steps", "windows")}
    return {
        f"{table}/{name}": str(values.tolist())
        for table, columns in tables.items()
        for name, values in columns.items()
        if name != "time" and not name.startswith("speed/")
    }


@pytest.fixture(scope="module")
def whole(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing befell."""
    path = tmp_path_factory.mktemp("whole") / "run"
    train([*torchrun(), str(toml), "--out", str(path)], {}, expected=0)
    return path


def test_a_killed_rank_is_named_and_torchrun_goes_on(toml: Path, whole: Path, tmp_path: Path) -> None:
    fault = {"do": "kill", "rank": 1, "step": 16, "attempt": 0}
    path = tmp_path / "run"
    words = train([*torchrun("--max-restarts", "1"), str(toml), "--out", str(path)], fault, expected=0)
    (error,) = errors(words.partition("memory:")[2].partition("memory:")[0])
    assert re.match(r"rank 1 of 2 \(\S+, process \d+\) is gone: no sign of life for \d+ s; it was killed", error)
    assert f"kept in {path}. Go on from its newest checkpoint with steadyrank train --resume {path}" in error
    kinds = [(event["kind"], event["step"]) for event in RunFolder.open(path).events()]
    assert [each for each in kinds if each[0] in ("rank_lost", "resumed")] == [("rank_lost", 16), ("resumed", 12)]
    assert differing(path, whole) == []
    assert readings(path) == readings(whole)

    summary = RunFolder.open(whole).summary() or {}
    assert summary["steps"] == 32
    assert summary["status"] == "finished"
    columns = RunFolder.open(whole).readings("steps")
    assert (columns["speed/rank_s_max"] >= columns["speed/rank_s_median"]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("do", "first", "second"),
    [
        ("disk", "rank 1: cannot write there: the disk is broken", "failed: cannot write there: the disk is broken."),
        ("bug", "rank 1: Traceback (most recent call last)", "failed: RuntimeError: mat1 and mat2 cannot be"),
        ("type_error", "rank 1: Traceback (most recent call last)", "failed: TypeError: a bug of another kind."),
    ],
)
def test_the_error_of_one_rank_ends_all(do: str, first: str, second: str, toml: Path, tmp_path: Path) -> None:
    words = train([*torchrun(), str(toml), "--out", str(tmp_path / "run")], {"do": do, "rank": 1, "step": 16})
    assert seconds_to_notice(tmp_path / "run") < 10
    found = errors(words)
    assert sum(first in error for error in found) == 1, words
    assert sum("rank 1 of 2 (" in error and second in error for error in found) == 1
    assert RunFolder.open(tmp_path / "run").events()[-1]["kind"] == "rank_lost"


@pytest.mark.slow
def test_the_first_rank_may_be_the_one_that_dies(toml: Path, tmp_path: Path) -> None:
    words = train([*torchrun(), str(toml), "--out", str(tmp_path / "run")], {"do": "kill", "rank": 0, "step": 16})
    (error,) = errors(words)
    assert error.startswith("rank 1: rank 0 of 2 (")
    assert "is gone" in error


@pytest.mark.slow
def test_what_befalls_all_alike_is_said_once(toml: Path, tmp_path: Path) -> None:
    command = [*torchrun(), str(toml), "--out", str(tmp_path / "run")]
    words = train(command, {"do": "bug", "step": 16})
    assert words.count("Traceback (most recent call last): File") == 2  # ours, and torchrun's own
    (error,) = errors(words)
    assert error.startswith("Traceback")
    assert "RuntimeError: mat1 and mat2 cannot be multiplied" in error
    assert not (tmp_path / "other").exists()
    for change, expected in {
        "schema.tasks.click.column=nix": "no column of the generated stream 'nix'",
        "train.device=cuda:7": "train.device = 'cuda:7' is not to be had here",
        "train.nix=1": "nix",
    }.items():
        words = train([*torchrun(), str(toml), "--set", change, "--out", str(tmp_path / "other")], {})
        (error,) = errors(words)
        assert expected in error
        assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_ranks_that_are_unlike_do_not_begin(toml: Path, tmp_path: Path) -> None:
    fault = {"rank": 1, "rank_toml": ["--set", "optimizer.dense.lr=0.7"]}
    (error,) = errors(train([*torchrun(), str(toml), "--out", str(tmp_path / "run")], fault))
    assert "rank 1 was started unlike rank 0: optimizer.dense.lr = 0.7, not 0.1" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_may_die_before_the_first_step(toml: Path, tmp_path: Path) -> None:
    words = train([*torchrun(), str(toml), "--out", str(tmp_path / "run")], {"do": "kill", "rank": 1, "step": 0})
    (error,) = errors(words)
    assert "rank 1 of 2 (" in error
    assert "is gone" in error
    assert error.endswith("Start the same command again")


@pytest.mark.slow
def test_a_rank_that_is_stuck_ends_the_run_at_the_timeout(toml: Path, tmp_path: Path) -> None:
    sets = ["--set", "distributed.timeout_s=6", "--set", "train.wait_for_disk_s=1"]
    command = [*torchrun("--shutdown-timeout", "3"), str(toml), "--out", str(tmp_path / "run"), *sets]
    (error,) = errors(train(command, {"do": "hang", "rank": 1, "step": 16}))
    assert seconds_to_notice(tmp_path / "run") < 6 + 15
    assert "rank 1 of 2 (" in error
    assert "lives, but did not come to what all do together" in error


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named(toml: Path, tmp_path: Path) -> None:
    """Started by hand, three of them but for the second."""
    sets = ["--set", "distributed.timeout_s=8", "--set", "train.wait_for_disk_s=1", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "tests.rank_fault_processes", "train", str(toml), *sets]
    port = str(20_000 + os.getpid() % 10_000)
    names = ["MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port}", "WORLD_SIZE=3"]
    both = [start(command, {}, ["env", f"RANK={rank}", *names]) for rank in (0, 2)]
    for words in [" ".join(finish(process).split()) for process in both]:
        (error,) = errors(words)
        assert error.startswith("2 of 3 ranks came within 8 s, not rank 1")
    assert [process.returncode for process in both] == [2, 2]


@pytest.mark.slow
def test_a_slow_rank_is_named_and_equals_are_not(toml: Path, whole: Path, tmp_path: Path) -> None:
    fault = {"do": "nap", "rank": 1, "step": 1, "seconds": 0.05}
    words = train([*torchrun(), str(toml), "--out", str(tmp_path / "run")], fault, expected=0)
    told = "times as long as the median rank in 100 % of the readings"
    assert told in words
    assert (RunFolder.open(tmp_path / "run").summary() or {})["slow_rank"].startswith("rank 1 took ")
    assert set(RunFolder.open(tmp_path / "run").readings("steps")["speed/slowest_rank"]) == {1.0}
    assert "slow_rank" not in (RunFolder.open(whole).summary() or {})


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_and_any_number_goes_on(signum: int, toml: Path, whole: Path, tmp_path: Path) -> None:
    path, mark = tmp_path / "run", tmp_path / "mark"
    fault = {"do": "touch", "rank": 0, "step": 13, "file": str(mark)}
    process = start([*torchrun(), str(toml), "--out", str(path)], fault)
    wait_for(mark, process)
    process.send_signal(signum)
    begun = time.monotonic()
    words = finish(process)
    assert time.monotonic() - begun < 10
    assert "interrupted: stopped by the user at step 15" in words
    assert "\nstopped\n" in words
    assert "error:" not in words
    assert "step_15" in os.listdir(path / "checkpoints")
    train([*torchrun(ranks=2 if signum == signal.SIGINT else 1), "--resume", str(path)], {}, expected=0)
    if signum == signal.SIGINT:
        assert differing(path, whole) == []
        assert readings(path) == readings(whole)
    else:  # the sums are made in another order
        compare(path, whole)


def compare(one: Path, other: Path) -> None:
    """Compare the readings of runs of other numbers of ranks."""
    a, b = (RunFolder.open(path).readings("steps") for path in (one, other))
    for name in ("loss/total", "loss/click", "clip_factor/cross.layers.0.weight"):
        torch.testing.assert_close(torch.from_numpy(a[name]), torch.from_numpy(b[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_one_process_that_was_stopped_goes_on_as_two(toml: Path, whole: Path, tmp_path: Path) -> None:
    path, mark = tmp_path / "run", tmp_path / "mark"
    command = [sys.executable, "-m", "tests.rank_fault_processes", "train", str(toml), "--out", str(path)]
    process = start(command, {"do": "touch", "rank": 0, "step": 13, "file": str(mark)}, ["env", "RANK=0"])
    wait_for(mark, process)
    process.terminate()
    finish(process)
    train([*torchrun(), "--resume", str(path)], {}, expected=0)
    compare(path, whole)


@pytest.mark.slow
def test_a_signal_during_the_start_ends_all(toml: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    fault = {"do": "touch_and_hang", "step": 0, "file": str(mark)}
    process = start([*torchrun(), str(toml), "--out", str(tmp_path / "run")], fault)
    wait_for(mark, process)
    time.sleep(2.0)  # until the other rank is there too
    process.terminate()
    begun = time.monotonic()
    words = finish(process)
    assert time.monotonic() - begun < 8
    assert "\nstopped\n" in words
    assert "error:" not in words
    assert not (tmp_path / "run").exists()


@pytest.fixture
def cable() -> Iterator[list[list[str]]]:
    """Two machines of this one, each with its own network; yields what to put before a command on each."""
    names = [f"rank{os.getpid() % 10000}{end}" for end in "ab"]
    ends = [["ip", "netns", "exec", name] for name in names]

    def do(*command: str, prefix: Sequence[str] = ()) -> None:
        subprocess.run([*prefix, *command], check=True, capture_output=True)

    try:
        for name in names:
            do("ip", "netns", "add", name)
        do("ip", "link", "add", "c0", "netns", names[0], "type", "veth", "peer", "name", "c1", "netns", names[1])
        for i, end in enumerate(ends):
            do("ip", "addr", "add", f"10.77.0.{i + 1}/24", "dev", f"c{i}", prefix=end)
            do("ip", "link", "set", f"c{i}", "up", prefix=end)
            do("ip", "link", "set", "lo", "up", prefix=end)
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(
                ["ip", "netns", "del", name], check=False, capture_output=True
            ) if os.geteuid() == 0 else None
        pytest.skip(f"no network namespaces can be made here: {error}")
    yield ends
    for name in names:
        do("ip", "netns", "del", name)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 1])
def test_a_network_that_is_cut_ends_both_ends(cut: int, cable: list[list[str]], toml: Path, tmp_path: Path) -> None:
    timeout_s, mark = 8.0, tmp_path / "mark"
    fault = {"do": "touch", "rank": 0, "step": 13, "file": str(mark)}
    sets = ["--set", f"distributed.timeout_s={timeout_s}", "--set", "train.wait_for_disk_s=1"]
    processes = []
    for i, end in enumerate(cable):
        where = ["--nnodes", "2", "--node-rank", str(i), "--master-addr", "10.77.0.1", "--master-port", "29777"]
        command = [*torchrun(*where, ranks=1), str(toml), "--out", str(tmp_path / "run"), *sets]
        processes.append(start(command, fault, [*end, "env", f"GLOO_SOCKET_IFNAME=c{i}"]))
    wait_for(mark, processes[0])
    subprocess.run([*cable[cut], "ip", "link", "set", f"c{cut}", "down"], check=True)
    begun = time.monotonic()
    first, second = (" ".join(finish(process).split()) for process in processes)
    assert time.monotonic() - begun < timeout_s + 15
    (error,) = errors(first)
    assert "rank 1 of 2 (" in error
    assert "is gone: no sign of life" in error
    (error,) = errors(second)
    assert "the machine of rank 0 of 2 (" in error
    assert "or the network to it, is gone" in error
    assert [process.returncode for process in processes] == [1, 1]
