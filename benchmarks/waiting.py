"""What it costs how torch's threads wait for one another: alone on the machine, and beside other processes.

    python benchmarks/waiting.py [--spins 0 500 ...] [--steps N] [--write]

OpenMP's threads wait in a loop before they sleep, by itself practically for ever; `GOMP_SPINCOUNT` says how often it
goes round. Each setting is a process of its own that makes training steps of the common job (see growth.py): with the
machine to itself, while another process computes in one thread, and while another trains as it does itself. `--write`
puts the table into a results file beside this script, named after the hardware.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path

DEFAULT = "torch's own"
OTHERS = ("alone", "beside a busy thread", "beside another training")


@contextmanager
def beside(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[None]:
    """Let another process run."""
    process = subprocess.Popen(command, env=dict(environment), stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(steps: int) -> float:
    """Return milliseconds of a step, the median, in this process."""
    import growth
    import torch

    from steadyrank.train import fit

    job = growth.Trained(growth.BASE, torch.device("cpu"))
    stream = [job.batches[i % len(job.batches)] for i in range(steps + growth.WARM_UP)]
    spent, last = [], time.perf_counter()
    for _ in fit(job.model, job.optimizers, stream, job.schema.tasks):
        now = time.perf_counter()
        spent.append(now - last)
        last = now
    return 1e3 * statistics.median(spent[growth.WARM_UP :])


def run(setting: str, steps: int, other: str) -> float:
    """Measure in a process that waits as `setting` says, beside `other`."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    if setting != DEFAULT:
        environment["GOMP_SPINCOUNT"] = setting
    training = [sys.executable, __file__, "--child", "--steps"]
    others = {
        OTHERS[0]: nullcontext(),
        OTHERS[1]: beside([sys.executable, "-c", "while True: pass"], environment),
        OTHERS[2]: beside([*training, "1000000"], environment),
    }
    with others[other]:
        done = subprocess.run([*training, str(steps)], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--spins", nargs="*", default=["0", "500", "2000", "8000", "100000", DEFAULT])
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--write", action="store_true", help="write the results file")
    options.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args(argv)
    if arguments.child:
        print(measure(arguments.steps))
        return
    found: dict[tuple[str, str], list[float]] = {(s, other): [] for s in arguments.spins for other in OTHERS}
    for _ in range(arguments.rounds):
        for (setting, other), spent in found.items():
            spent.append(run(setting, arguments.steps, other))
    lines = [f"| rounds of the loop | ms a step, {' | '.join(OTHERS)} |", "|---|---|---|---|"]
    for setting in arguments.spins:
        lines.append(f"| {setting} | {' | '.join(_spread(found[setting, other]) for other in OTHERS)} |")
    print("\n".join(lines))
    if arguments.write:
        import growth
        import torch

        from steadyrank import __version__

        hardware = growth.hardware(torch.device("cpu"))
        path = Path(__file__).parent / f"waiting_{hardware.lower().replace(' ', '_')}_{date.today().isoformat()}.md"
        title = f"# How threads wait, {hardware}, {torch.get_num_threads()} threads, {date.today().isoformat()}"
        ran = f"`python benchmarks/waiting.py --write`, steadyrank {__version__}, torch {torch.__version__}."
        said = f"Median of {arguments.rounds} processes (lowest to highest), each the median of its steps."
        path.write_text("\n".join([title, "", ran, said, "", *lines]) + "\n", encoding="utf-8")
        print(f"written: {path}")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
