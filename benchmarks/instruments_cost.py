"""What watching a run costs: training with all instruments at their defaults over training without, and by part.

    python benchmarks/instruments_cost.py [--steps N] [--rounds N] [--models demo wide mmoe] [--write]

Two models that are the same learn the same batches in this process, step by step in turn, through the trainer's own
parts; one of them is watched. Time is the process's own (CPU), and the clock's beside it; one thread of torch, so that
other work on the machine does not count. On a GPU the clock waits for the device after each part. `--write` puts the
tables into a results file beside this script, named after the hardware.
"""

import argparse
import gc
import platform
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from steadyrank import __version__
from steadyrank.config import demo
from steadyrank.data.logs import Cursor
from steadyrank.instruments import Instruments
from steadyrank.monitors.watch import WatchConfig
from steadyrank.runs import RunFolder
from steadyrank.schema import Batch
from steadyrank.scoreboard import Scoreboard
from steadyrank.sequential import Parts
from steadyrank.train import Readings, train_step

ON_GPU = torch.cuda.is_available()
MODELS: dict[str, tuple[str, list[str]]] = {
    "demo": ("the demo's model, batch 256", []),
    "wide": (
        "trunk and towers 4 times as wide, batch 1024",
        ["reader.batch_size=1024", "model.trunk.widths=[1024, 512]", "model.tower=[128]"],
    ),
    "mmoe": ("MMoE of 4 experts, batch 256", ["model.trunk={kind='mmoe', experts=4, widths=[256, 128]}"]),
}
STEP, OTHER = "step", "metrics and readings"
NOTE, FLUSH, WINDOW = "remember the batch", "flush", "verdict on a window"
HEADROOM, NEXT = "headroom", "headroom on the next window"
WATCHING = (NOTE, FLUSH, WINDOW, HEADROOM, NEXT)
"""What only a watched run does; the rest of the cost lies within its steps."""


@dataclass
class Clock:
    """Seconds by part and step: of the process and of the clock."""

    cpu: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    wall: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))

    @contextmanager
    def time(self, part: str, step: int) -> Iterator[None]:
        start = time.perf_counter(), time.process_time()
        yield
        if ON_GPU:
            torch.cuda.synchronize()
        self.cpu[part][step] += time.process_time() - start[1]
        self.wall[part][step] += time.perf_counter() - start[0]


class Twin:
    """One of two runs: what the trainer does with a batch, timed part by part."""

    def __init__(self, parts: Parts, folder: RunFolder, watched: bool) -> None:
        self.parts, self.folder, self.clock = parts, folder, Clock()
        parts.model.to(parts.device).train()
        self.optimizers, self.tasks = list(parts.optimizers.values()), list(parts.schema.tasks.values())
        self.readings = Readings(list(parts.schema.tasks), parts.model.named_parameters(), self.optimizers)
        self.board = Scoreboard(parts.schema, truth=parts.reader.encoder.truth)
        self.pending: list[tuple[Batch, Tensor]] = []
        self.instruments: Instruments | None = None
        if watched:
            args = parts.model, self.optimizers, parts.reader, WatchConfig(), folder, folder.append
            self.instruments = Instruments(*args)

    def learn(self, step: int, batch: Batch, new_window: bool, last_of_window: bool) -> None:
        clock, instruments = self.clock, self.instruments
        if instruments is not None:
            with clock.time(NEXT if new_window and instruments.watch.headroom_is_due else NOTE, step):
                if new_window:
                    instruments.begin_window(batch)
                instruments.expect(last_of_window)
        with clock.time(STEP, step):
            here = batch.to(self.parts.device, non_blocking=True)
            watch = instruments.watch if instruments is not None else None
            outcome = train_step(self.parts.model, self.optimizers, here, self.tasks, watch)
        with clock.time(OTHER, step):
            self.readings.add(step, outcome)
            self.pending.append((batch, outcome.scores))
        if instruments is not None:
            with clock.time(HEADROOM if instruments.watch.headroom_is_due else NOTE, step):
                instruments.note(batch)
        if step % self.parts.config.log_every == 0:
            self.flush(step)
        if step % self.parts.config.window_steps == 0:
            self.close_window(step)

    def flush(self, step: int) -> None:
        with self.clock.time(OTHER, step):
            row = self.readings.fetch()
            for batch, scores_BK in self.pending:
                self.board.add(batch, scores_BK.float().cpu())
            self.pending.clear()
        if self.instruments is not None:
            with self.clock.time(FLUSH, step):
                row |= self.instruments.flush()
        with self.clock.time(OTHER, step):
            self.folder.append("steps", step, row)

    def close_window(self, step: int) -> None:
        with self.clock.time(OTHER, step):
            row = self.board.close_window()
            self.folder.append("windows", step, row)
        if self.instruments is not None:
            with self.clock.time(WINDOW, step):
                self.instruments.watch.window(row)
        with self.clock.time(FLUSH if self.instruments is not None else OTHER, step):
            self.folder.flush()


@dataclass
class Round:
    """The two runs of one measurement, and the seconds in which their batches were read (CPU, clock)."""

    plain: Twin
    watched: Twin
    reading: tuple[float, float]


def measure(extra: Sequence[str], steps: int, folder: Path) -> Round:
    """Let both learn the same stream, whichever comes first changing from step to step."""
    batch_size = demo(list(extra)).reader.batch_size
    changes = [*extra, f"data.rows={(steps + WARM_UP) * batch_size}"]
    twins = [
        Twin(demo(changes).build(), RunFolder.create(folder / name), watched=name == "watched")
        for name in ("plain", "watched")
    ]
    reader = twins[1].parts.reader
    batches, window, clock = reader.batches(Cursor()), 0, Clock()
    for step in range(1, steps + WARM_UP + 1):
        with clock.time("reading", step):
            batch, cursor = next(batches)
        if step == WARM_UP:
            # A full collection of what the imports have made takes 0.16 s, and would hit one of the two by chance.
            gc.collect()
            gc.freeze()
        for twin in twins if step % 2 else reversed(twins):
            twin.learn(step, batch, cursor.window != window, reader.left == 0)
        window = cursor.window
    seconds = [sum(v for s, v in kind["reading"].items() if s > WARM_UP) for kind in (clock.cpu, clock.wall)]
    return Round(twins[0], twins[1], (seconds[0], seconds[1]))


WARM_UP = 24  # steps that are not counted


def total(clock: dict[str, dict[int, float]], *parts: str) -> float:
    return sum(v for part in parts for step, v in clock[part].items() if step > WARM_UP)


def ratios(one: Round) -> dict[str, float]:
    """Return 1 + what watching adds, over the bare steps or over all that training does, in CPU or clock time."""
    found = {}
    for kind, reading in zip(("CPU", "clock"), one.reading, strict=True):
        plain, watched = (getattr(twin.clock, "cpu" if kind == "CPU" else "wall") for twin in (one.plain, one.watched))
        added = total(watched, STEP, *WATCHING) - total(plain, STEP)
        found[f"bare steps, {kind}"] = 1 + added / total(plain, STEP)
        found[f"all of training, {kind}"] = 1 + added / (total(plain, STEP, OTHER) + reading)
    return found


def find_parts(rounds: Sequence[Round]) -> list[tuple[str, list[float]]]:
    """Return what each part costs each time, in CPU seconds: of those within a step, above the plain step beside it."""
    config, found = WatchConfig(), defaultdict[str, list[float]](list)
    for one in rounds:
        plain, watched = one.plain.clock.cpu, one.watched.clock.cpu
        for step in sorted(s for s in watched[STEP] if s > WARM_UP):
            more = watched[STEP][step] - plain[STEP][step]
            if step % config.curvature_every == 0:
                kind = ""  # with a copy of the update: few, and within the sums
            elif step % config.tasks_every == 0:
                kind = "tasks, with a full look"
            elif step % config.dynamics_every == 0:
                kind = "full look"
            else:
                kind = "quick look" if step % config.look_every == 0 else "signals of a plain step"
            if kind:
                found[kind].append(more)
        for part in WATCHING:
            for step, seconds in watched[part].items():
                ranked = part == FLUSH and step % config.rank_every == 0
                if step > WARM_UP:
                    found[f"{part}, with effective ranks" if ranked else part].append(seconds)
    return [
        ("plain step, for comparison", [v for r in rounds for v in _counted(r.plain.clock.cpu[STEP])]),
        *found.items(),
    ]


def _counted(seconds: dict[int, float]) -> list[float]:
    return [v for step, v in seconds.items() if step > WARM_UP]


def report(title: str, rounds: Sequence[Round]) -> list[str]:
    all_ratios = [ratios(one) for one in rounds]
    lines = [f"## {title}", "", "| ratio, with over without | median | lowest | highest |", "|---|---|---|---|"]
    for name in all_ratios[0]:
        values = [each[name] for each in all_ratios]
        lines.append(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    lines += [
        "",
        "| part | times in 1,000 steps | ms: median (quartiles) | of a bare step's time |",
        "|---|---|---|---|",
    ]
    parts = find_parts(rounds)
    steps, plain = len(parts[0][1]), statistics.fmean(parts[0][1])
    for name, seconds in parts:
        low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        share = statistics.median(seconds) * len(seconds) / (steps * plain)
        cells = f"{1e3 * middle:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})"
        lines.append(f"| {name} | {1e3 * len(seconds) / steps:.1f} | {cells} | {share:.2%} |")
    alerts = sum(len(one.watched.instruments.watch.alerts) for one in rounds if one.watched.instruments)
    lines += ["", f"Warnings in these runs: {alerts}."]
    print("\n".join(lines), flush=True)
    return [*lines, ""]


def hardware() -> str:
    return torch.cuda.get_device_name() if ON_GPU else f"{platform.machine()} CPU"


def head(arguments: argparse.Namespace) -> list[str]:
    asked = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return [
        f"# Cost of the instruments, {hardware()}, {date.today().isoformat()}",
        "",
        f"`python benchmarks/instruments_cost.py --steps {arguments.steps} --rounds {arguments.rounds} --write`, "
        f"steadyrank {__version__} at {commit or 'no commit'}, torch {torch.__version__}, 1 thread, Python "
        f"{platform.python_version()}. The demo's stream and optimizers, seed 0, `[watch]` at its defaults.",
        "",
        f"{arguments.rounds} rounds of {arguments.steps} steps; two models that are the same learn the same batches in "
        "turn, step by step, and one is watched. **Bare steps**: what watching adds, over the time of `train_step` "
        "alone. **All of training**: over that with reading, metrics and readings, as a run has them. A part within a "
        "step is the difference to the plain step on the same batch. The last column: its median times how often it "
        "comes, over the time of the bare steps. A warning adds a cause report of some seconds, five a run at most.",
        "",
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=1000, help="counted steps of a round")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    options.add_argument("--write", action="store_true", help="write the results file")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    lines = head(arguments)
    for name in arguments.models:
        title, extra = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            rounds = [measure(extra, arguments.steps, Path(folder) / str(i)) for i in range(arguments.rounds)]
            lines += report(title[0].upper() + title[1:], rounds)
    if arguments.write:
        named = hardware().lower().replace(" ", "_")
        path = Path(__file__).parent / f"instruments_cost_{named}_{date.today().isoformat()}.md"
        path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
