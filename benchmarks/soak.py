"""Does an endless run grow? `train --follow` over files that come and go: memory, disk and speed as steps go by.

    python benchmarks/soak.py --steps 1000000 --write

A thread puts one file after another into a folder, each with the hours after the last one, and deletes those that were
learned; the run follows them with its defaults, the instruments included, and ends when no file comes any more.
"""

import argparse
import gc
import os
import platform
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import steadyrank
from steadyrank.config import RunConfig
from steadyrank.parts import Progress
from steadyrank.runs import RunFolder
from steadyrank.sequential import run

BATCH, FILE_STEPS = 16, 5_000
TOML = """
name = "soak"
[data]
path = "{path}"
[reader]
batch_size = 16
[model]
trunk = {{ kind = "shared_bottom", widths = [8] }}
[train]
threads = 1
follow = true
follow_every_s = 0.2
follow_idle_s = 20.0
max_readings_mb = 20.0
[trackers]
tensorboard = false
[recovery]
mode = "on"
snapshot_every = 1000
[schema]
time = "t"
baseline = ["user"]
[schema.features.user]
kind = "id"
rows = 1000
[schema.features.x]
kind = "number"
[schema.tasks.click]
kind = "binary"
[schema.tasks.watch]
kind = "regression"
"""


def write_file(path: Path, number: int) -> None:
    """Write the rows of some six hours: a file appears when it is whole."""
    rng, rows = np.random.default_rng(number), BATCH * FILE_STEPS
    user, x = rng.integers(0, 1000, rows), rng.normal(size=rows)
    logit = x + np.sin(user) - 1
    columns = {
        "t": pa.array(((number + np.arange(rows) / rows) * 6 * 3600 * 1e6).astype(np.int64)).cast(pa.timestamp("us")),
        "user": user,
        "x": x,
        "click": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int64),
        "watch": x * 0.5 + rng.normal(size=rows),
    }
    draft = path / f".{number:06}.tmp"
    pq.write_table(pa.table(columns), draft)
    draft.rename(path / f"{number:06}.parquet")


def feed(path: Path, files: int, done: list[int]) -> None:
    """Keep two files ahead of the run, and delete what lies more than two behind."""
    for number in range(files):
        while number - done[0] // FILE_STEPS > 2:
            time.sleep(0.05)
        write_file(path, number)
        for old in range(max(done[0] // FILE_STEPS - 2, 0)):
            (path / f"{old:06}.parquet").unlink(missing_ok=True)


def rss_mb() -> float:
    """Return what this process holds in memory, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def disk_mb(path: Path) -> float:
    """Return what a folder takes, in MB."""
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file()) / 1e6


def soak(steps: int, every: int, where: Path) -> list[tuple[int, float, int, float, float]]:
    """Follow so many steps; return at some of them: step, memory, objects, disk, microseconds a step since."""
    log, folder = where / "log", RunFolder.create(where / "run")
    log.mkdir()
    write_file(log, 0)
    done, found, clock = [0], [], [time.perf_counter(), 0.0]
    thread = threading.Thread(target=feed, args=(log, steps // FILE_STEPS, done), daemon=True)
    thread.start()

    def look(now: Progress) -> None:
        done[0] = now.step
        if now.step % every == 0:
            gc.collect()
            each_us = 1e6 * (time.perf_counter() - clock[0]) / (now.step - clock[1])
            clock[:] = [time.perf_counter(), now.step]
            found.append((now.step, rss_mb(), len(gc.get_objects()), disk_mb(folder.path), each_us))
            print(
                "{:>10,} {:8.1f} MB {:10,} objects {:8.1f} MB on disk {:8.0f} us a step".format(*found[-1]), flush=True
            )

    config = RunConfig.from_toml(TOML.format(path=log))
    folder.write_config(config.to_toml())
    run(config.build(), folder, on_progress=look)
    return found


def page(found: list[tuple[int, float, int, float, float]]) -> str:
    """Return the results as a page."""
    half = found[len(found) // 2 :]
    steps, rss = np.array([row[0] for row in half]), np.array([row[1] for row in half])
    slope = np.polyfit(steps, rss, 1)[0] * 1e6
    shown = found[:: max(1, len(found) // 20)]
    lines = [f"| {s:,} | {m:.1f} | {o:,} | {d:.1f} | {u:.0f} |" for s, m, o, d, u in shown]
    return "\n".join(
        [
            "# Does an endless run grow?",
            "",
            f"`python benchmarks/soak.py --steps {found[-1][0]}`, steadyrank {steadyrank.__version__}, torch "
            f"{torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread. "
            "`train --follow` over files that come and go, instruments and recovery on, readings bounded at 20 MB.",
            "",
            "| step | memory, MB | Python objects | run folder, MB | microseconds a step |",
            "|---|---|---|---|---|",
            *lines,
            "",
            f"In the second half memory grew by {slope:+.2f} MB a million steps (a straight line through it).",
            "",
        ]
    )


def main() -> None:
    """Soak, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=5_000)
    parser.add_argument("--write", action="store_true", help="write the results file beside this script")
    arguments = parser.parse_args()
    where = Path(tempfile.mkdtemp())
    try:
        text = page(soak(arguments.steps, arguments.every, where))
    finally:
        shutil.rmtree(where, ignore_errors=True)
    print(text)
    if arguments.write:
        stamp = f"{platform.machine()}_cpu_{time.strftime('%Y-%m-%d')}"
        (Path(__file__).parent / f"soak_{stamp}.md").write_text(text)


if __name__ == "__main__":
    main()
