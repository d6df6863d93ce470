"""How fast steadyrank trains beside its peers: one job, each contestant in a process of its own, in turn, over rounds.

    python benchmarks/speed/contest.py [--short] [--rows N] [--rounds N] [--contestants NAME ...]
                                       [--table-rows N ...] [--ours NAME] [--write]

The job is in `job.py`, who takes part in `contestants.py`. Timed is the loop over the log alone, after a warm-up of 20
steps: not imports, building, reading into memory, validation or saving. What a peer's own loop does is in it: its
loader, its losses. Only steadyrank's whole runs read their rows from Parquet within the time, from the first one on,
and have metrics, instruments, guard and readings in it; the others hold the log in memory. All run with torch's own
number of threads, which wait for one another: on a machine that is busy with something else, rates fall to a fraction,
and not all by the same. Where other processes took more than a tenth of a core, a run is made again, up to three times.

A ratio is ours over theirs in the same round: the median over rounds, with the lowest and the highest. Over a bound it
is the share of it that we reach. `--short` is what `make bench` runs. `--write` puts the table into a results file
beside this script, and each run's figures into a CSV file.
"""

import argparse
import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from contestants import CONTESTANTS

HERE = Path(__file__).parent
SHORT = [
    "steadyrank",
    "step",
    "torch-rechub",
    "deepctr-torch",
    "fuxictr",
    "torchrec",
    "dense-fused",
    "sparse",
    "bound-float32",
    "bound-bf16",
]
SHORT_ROWS, ROWS = 80_000, 400_000
SHORT_ROUNDS, ROUNDS = 3, 5
OTHERS, TRIES = 0.1, 3
"""Cores that other processes may take during a run, and how often it is made until they do not."""
FIELDS = ["table_rows", "round", "contestant", "version", "rows_per_s", "rows", "seconds", "peak_mb", "process_s"]
FIELDS += ["others_cores", "auc_click", "auc_like"]
Runs = dict[str, list[dict[str, Any]]]
"""What each contestant did, by round."""


def run_one(name: str, folder: Path, table_rows: int, limit_s: float) -> dict[str, Any] | str:
    """Let a contestant run; returns what it found, or why there is nothing."""
    if CONTESTANTS[name].version() is None:
        return "not installed"
    command = [sys.executable, str(HERE / "contestants.py"), name, str(folder), "--table-rows", str(table_rows)]
    start, busy, own = time.perf_counter(), _busy_s(), _own_s()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:,.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return f"failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}"
    took = time.perf_counter() - start
    others = max(_busy_s() - busy - (_own_s() - own), 0.0) / took
    return {**json.loads(lines[-1]), "process_s": took, "others_cores": others, "table_rows": table_rows}


def _busy_s() -> float:
    """Return the seconds that all cores have worked; 0 where the system does not say."""
    about = Path("/proc/stat")
    if not about.exists():
        return 0.0
    user, nice, system, _, _, *interrupts = map(int, about.read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    """Return the seconds of processor time of this process and of those that it has run."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def run_undisturbed(name: str, folder: Path, table_rows: int, limit_s: float) -> dict[str, Any] | str:
    """Let a contestant run, again where other work disturbed it; the last try counts as it is."""
    for _ in range(TRIES):
        found = run_one(name, folder, table_rows, limit_s)
        if isinstance(found, str):
            say(f"{name}: {found}")
            break
        disturbed = found["others_cores"] > OTHERS
        note = f" (disturbed: others took {found['others_cores']:.1f} cores)" if disturbed else ""
        say(f"{name}: {found['rows_per_s']:,.0f} rows/s{note}")
        if not disturbed:
            break
    return found


def say(words: str) -> None:
    """Show how far the contest is."""
    print(words, file=sys.stderr, flush=True)


def hold(names: Sequence[str], rows: int, table_rows: int, rounds: int, limit_s: float) -> tuple[Runs, dict[str, str]]:
    """Run all contestants in turn, over rounds; returns what they found, and why some found nothing."""
    runs: Runs = {name: [] for name in names}
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        drawing = [sys.executable, str(HERE / "job.py"), made, "--rows", str(rows), "--table-rows", str(table_rows)]
        subprocess.run(drawing, check=True)
        for number in range(rounds):
            say(f"{table_rows:,} table rows, round {number + 1} of {rounds}")
            turn = number % len(names)
            for name in [*names[turn:], *names[:turn]]:
                if name in absent:
                    continue
                found = run_undisturbed(name, folder, table_rows, limit_s)
                if isinstance(found, str):
                    absent[name] = found
                else:
                    runs[name].append({**found, "round": number})
    return runs, absent


def tabulate(runs: Runs, absent: Mapping[str, str], ours: str) -> list[str]:
    """Return the table of one contest."""
    lines = [
        "| contestant | version | rows a second: median (lowest to highest) | ours over it (lowest to highest) "
        "| AUC, click | AUC, like | peak MB | whole process, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        words = f"{CONTESTANTS[name].words} (`{name}`)"
        if name in absent:
            lines.append(f"| {words} | {CONTESTANTS[name].version() or ''} | {absent[name]} | | | | | |")
            continue
        cells = [words, str(found[0]["version"]), _spread([run["rows_per_s"] for run in found], ",.0f")]
        cells.append("" if name == ours else _spread(_ratios(runs[ours], found), ".2f"))
        for key, form in (("auc_click", ".4f"), ("auc_like", ".4f"), ("peak_mb", ",.0f"), ("process_s", ".1f")):
            values = [run[key] for run in found if key in run]
            cells.append(format(statistics.median(values), form) if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ratios(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return our rate over theirs, for each round in which both ran."""
    by_round = {run["round"]: run["rows_per_s"] for run in theirs}
    return [run["rows_per_s"] / by_round[run["round"]] for run in ours if run["round"] in by_round]


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    low, middle, high = (format(value, form) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def _processor() -> str:
    """Return how many cores there are, and of what processor, where Linux says so."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def head(rows: int, rounds: int, argv: Sequence[str]) -> list[str]:
    """Return what stands above the tables."""
    asked = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(asked, cwd=HERE, capture_output=True, text=True).stdout.strip()
    versions, load = (CONTESTANTS["steadyrank"].version(), CONTESTANTS["sparse"].version()), os.getloadavg()[0]
    return [
        f"# Training beside peers, {_processor()}, {date.today().isoformat()}",
        "",
        f"`python benchmarks/speed/contest.py {' '.join(argv)}`, steadyrank {versions[0]} at {commit or 'no commit'}, "
        f"torch {versions[1]}, Python {platform.python_version()}. Load at the start: {load:.1f}.",
        "",
        f"{rows:,} rows, {rounds} rounds. {' '.join((__doc__ or '').split('[--write]')[1].split())}",
        "",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--short", action="store_true", help="fewer rows, rounds and contestants")
    options.add_argument("--rows", type=int, help=f"rows to learn; {ROWS:,}, or {SHORT_ROWS:,} where short")
    options.add_argument("--rounds", type=int, help=f"{ROUNDS}, or {SHORT_ROUNDS} where short")
    options.add_argument(
        "--contestants", nargs="+", choices=list(CONTESTANTS), help="all, or the main ones where short"
    )
    options.add_argument("--table-rows", nargs="+", type=int, default=[1_000_000], help="of all tables together")
    options.add_argument("--ours", default="steadyrank", choices=list(CONTESTANTS), help="what the ratios are of")
    options.add_argument("--limit-s", type=float, default=1800.0, help="after which a contestant is stopped")
    options.add_argument("--write", action="store_true", help="write the results files")
    arguments = options.parse_args(argv)
    rows = arguments.rows or (SHORT_ROWS if arguments.short else ROWS)
    rounds = arguments.rounds or (SHORT_ROUNDS if arguments.short else ROUNDS)
    names = list(arguments.contestants or (SHORT if arguments.short else CONTESTANTS))
    names = names if arguments.ours in names else [arguments.ours, *names]
    lines, everything = head(rows, rounds, sys.argv[1:] if argv is None else argv), list[dict[str, Any]]()
    print("\n".join(lines), flush=True)
    for table_rows in arguments.table_rows:
        runs, absent = hold(names, rows, table_rows, rounds, arguments.limit_s)
        done = [run for found in runs.values() for run in found]
        disturbed = sum(run["others_cores"] > OTHERS for run in done)
        part = [f"## {table_rows:,} table rows", "", *tabulate(runs, absent, arguments.ours), ""]
        if disturbed:
            part += [f"{disturbed} of {len(done)} runs were disturbed by other work in all {TRIES} tries.", ""]
        print("\n".join(part), flush=True)
        lines += part
        everything += done
    if arguments.write:
        path = HERE / f"training_{platform.machine()}_cpu_{date.today().isoformat()}.md"
        path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
        with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(everything)
        print(f"written: {path} and {path.with_suffix('.csv').name}")


if __name__ == "__main__":
    main()
