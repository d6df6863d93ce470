"""What bfloat16 costs in quality: the same runs in float32 and in bfloat16, by seed.

    python benchmarks/precision.py [CONFIG ...] [--seeds N] [--set part.field=value ...] [--write]

Without a configuration, the generated stream (200,000 rows, all tasks) with a shared bottom of 256x2 and with DCN-v2
before an MMoE, with the optimizers of the demo. Every row is scored before it is learned; given is the metric of the
whole run, AUC of binary tasks and RMSE of regressions, and the difference by seed. `--write` puts the table into a
results file beside this script.
"""

import argparse
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

from steadyrank import __version__
from steadyrank.config import RunConfig, demo, load
from steadyrank.runs import RunFolder
from steadyrank.sequential import run

STREAM = ["data.rows=200000", "reader.batch_size=1024"]
DCN = "model={cross={layers=2,layer_norm=true},trunk={kind='mmoe',experts=4,widths=[256,128]},tower=[64]}"
Make = Callable[[Sequence[str]], RunConfig]


def jobs(paths: Sequence[str]) -> dict[str, Make]:
    """Return what makes a configuration out of overrides, by name."""
    if paths:
        return {Path(path).stem: lambda sets, path=path: load(path, sets) for path in paths}  # type: ignore[misc]
    return {
        "stream, shared bottom 256x2": lambda sets: demo([*STREAM, "model.trunk.widths=[256,256]", *sets]),
        "stream, DCN-v2 and MMoE": lambda sets: demo([*STREAM, DCN, *sets]),
    }


def train(config: RunConfig, folder: Path) -> dict[str, float]:
    """Return each task's metric over the run."""
    with RunFolder.create(folder, overwrite=True) as opened:
        opened.write_config(config.to_toml())
        tasks = run(config.build(), opened)["tasks"]
    return {task: of["run"]["auc" if of["kind"] == "binary" else "rmse"] for task, of in tasks.items()}


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("configs", nargs="*", help="TOML files of runs")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--set", action="append", default=[], dest="sets")
    options.add_argument("--write", action="store_true", help="write the results file")
    arguments = options.parse_args(argv)
    lines = [
        "| job | task | float32, mean over seeds | bfloat16 | bfloat16 less float32, by seed | float32 between seeds |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        for job, make in jobs(arguments.configs).items():
            found = {
                kind: [
                    train(make([*arguments.sets, f"seed={seed}", f"train.precision={kind}"]), Path(name) / "run")
                    for seed in range(arguments.seeds)
                ]
                for kind in ("float32", "bfloat16")
            }
            for task in found["float32"][0]:
                exact, fast = ([run[task] for run in found[kind]] for kind in ("float32", "bfloat16"))
                less = ", ".join(f"{b - a:+.4f}" for a, b in zip(exact, fast, strict=True))
                means = f"{statistics.mean(exact):.4f} | {statistics.mean(fast):.4f}"
                spread = f"{max(exact) - min(exact):.4f}"
                lines.append(f"| {job} | {task} | {means} | {less} | {spread} |")
            print("\n".join(lines), flush=True)
    if arguments.write:
        path = Path(__file__).parent / f"precision_{platform.machine()}_cpu_{date.today().isoformat()}.md"
        title = f"# What bfloat16 costs in quality, {platform.machine()} CPU, {date.today().isoformat()}"
        ran = f"`python benchmarks/precision.py --seeds {arguments.seeds} --write`, steadyrank {__version__}."
        path.write_text("\n".join([title, "", ran, "", *lines]) + "\n", encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
