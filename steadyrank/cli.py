"""The command line: parse, call, print.

What a command needs is imported when it is called: torch alone takes a second, which no help page need wait for.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import __version__
from .errors import ConfigError, SteadyRankError, check_known
from .terminal import bar, complain, errors, say, say_event

if TYPE_CHECKING:
    from .config import RunConfig
    from .parts import Parts
    from .ranks import Ranks
    from .runs import RunFolder

_TOGETHER = ("train", "demo")
"""Commands that several processes do together."""
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Train multitask ranking models that do not blow up.",
)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Answer the options that need no command."""
    if version:
        say(f"steadyrank {__version__}")
        raise typer.Exit


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder to write; runs/NAME-N when left out.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override one setting: part.field=value.")]
Run = Annotated[Path, typer.Argument(help="A run folder.")]
Log = Annotated[str, typer.Argument(help="A log: a Parquet file, a folder or a glob; local, s3:// or gs://.")]


@app.command(epilog="Example: steadyrank demo --out runs/demo")
def demo(out: Out = None, overwrite: Overwrite = False, sets: Sets = None) -> None:
    """Train on the generated stream: the whole of steadyrank in two minutes."""
    from .config import demo as demo_config

    folder = _train(demo_config(sets or []), out, overwrite)
    other = f"{folder}-adam"
    say("Next, the same without Clippy, and both side by side:")
    say(f"  steadyrank demo --set optimizer.dense.name=adam --out {other}")
    say(f"  steadyrank compare {folder} {other}")


@app.command(epilog="Example: steadyrank init log.parquet --out run.toml && steadyrank train run.toml")
def init(
    log: Log,
    out: Annotated[Path, typer.Option("--out", help="The configuration to write.")] = Path("run.toml"),
    overwrite: Overwrite = False,
) -> None:
    """Look at a log's columns and write a commented starting configuration."""
    from .start import start_config

    schema = start_config(log, out, overwrite=overwrite).schema_
    say(f"{out}: {len(schema.features)} features; tasks {', '.join(schema.tasks)}; in the order of '{schema.time}'")
    say(f"Read it, correct what was guessed wrongly, then: steadyrank train {out}")


@app.command(epilog="Example: steadyrank convert log.csv.gz log.parquet --sort time")
def convert(
    source: Annotated[Path, typer.Argument(help="A .csv, .tsv, .jsonl or .parquet file, perhaps compressed.")],
    target: Annotated[Path, typer.Argument(help="The Parquet file to write.")],
    sort: Annotated[str | None, typer.Option("--sort", help="Sort by this column, in memory.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make Parquet from CSV or JSON lines."""
    from .data.convert import convert as convert_file

    with bar(f"{source.name} to {target.name}", "bytes") as progress:
        rows = convert_file(source, target, sort=sort, overwrite=overwrite, progress=progress)
    say(f"{target}: {rows:,} rows. Next: steadyrank init {target}")


@app.command(epilog="Example: steadyrank train run.toml --set optimizer.dense.lr=0.2 --out runs/faster")
def train(
    config: Annotated[Path | None, typer.Argument(help="A run's TOML file.")] = None,
    sets: Sets = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on with this run folder instead.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="At the end of the log, wait for new files.")] = False,
) -> None:
    """Train in time order, every row scored before it is learned."""
    from .config import load

    if resume is not None:
        if config is not None or out is not None or sets:
            raise typer.BadParameter("--resume takes its settings from the run folder; give --follow at most with it")
        _go_on(resume, follow)
    elif config is None:
        raise typer.BadParameter("give a TOML file (steadyrank init writes one), or --resume RUN")
    else:
        _train(load(config, [*(sets or []), *(["train.follow=true"] if follow else [])]), out, overwrite)


@app.command(epilog="Example: steadyrank evaluate runs/demo-1 tomorrow.parquet")
def evaluate(
    run: Run,
    log: Log,
    slice_by: Annotated[str | None, typer.Option("--slice-by", help="Also by the values of this id feature.")] = None,
) -> None:
    """Score a log with a run's model: metrics by task and day."""
    from . import native
    from .config import open_source, trained
    from .console import print_evaluation, print_slices
    from .evaluate import evaluate as evaluate_model

    native.prepare()
    config, model = trained(run)
    reader = config.build_reader(open_source(log, config.schema_))
    with bar("evaluating", "rows") as progress:
        found = evaluate_model(model, reader.in_order(progress), config.schema_, slice_by=slice_by)
    kinds = {name: task.kind for name, task in config.schema_.tasks.items()}
    print_evaluation(found.tasks, found.days, kinds, found.rows)
    if found.slices:
        print_slices(found.slices, kinds, str(slice_by))


@app.command(epilog="Example: steadyrank predict runs/demo-1 tomorrow.parquet scores.parquet --keys user,item")
def predict(
    run: Run,
    log: Log,
    target: Annotated[Path, typer.Argument(help="The Parquet file to write.")],
    keys: Annotated[str | None, typer.Option("--keys", help="Columns to copy, with commas.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a prediction for every row: one column a task, and the row's keys."""
    from . import native
    from .config import open_source, trained
    from .predict import predict as predict_log

    native.prepare()
    config, model = trained(run)
    with bar("predicting", "rows") as progress:
        rows = predict_log(
            model,
            config.schema_,
            open_source(log, config.schema_),
            target,
            keys=keys.split(",") if keys else None,
            overwrite=overwrite,
            progress=progress,
        )
    say(f"{target}: {rows:,} rows")


@app.command(epilog="Example: steadyrank report runs/demo-1")
def report(
    run: Run,
    png: Annotated[Path | None, typer.Option("--png", help="Also write each figure as a PNG into this folder.")] = None,
) -> None:
    """Write a run's report anew: one self-contained HTML page."""
    from .report import write_pngs, write_report
    from .runs import RunFolder

    folder = RunFolder.open(run)
    say(f"report: {write_report(folder)}")
    if png is not None:
        say(f"{len(write_pngs(folder, png))} figures: {png}")


@app.command(epilog="Example: steadyrank replay runs/demo-1 --step 840")
def replay(
    run: Run,
    step: Annotated[int, typer.Option("--step", help="The step, counted from 1.")],
) -> None:
    """Do one step of a run again, exactly, and say what stood behind it: task, layer, rows and features."""
    from .console import print_cause
    from .replay import replay as replay_step
    from .report import write_report
    from .runs import RunFolder

    with bar(f"to step {step:,}", "steps") as progress:
        found = replay_step(run, step, progress)
    print_cause(found.cause)
    say(str(found))
    say(f"report: {write_report(RunFolder.open(run))}")


@app.command(epilog="Example: steadyrank compare runs/clippy runs/adagrad --out compare.html")
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path | None, typer.Option("--out", help="Also write a page with their curves in one.")] = None,
) -> None:
    """Put several runs side by side, and their curves over one another."""
    from .console import print_columns
    from .report import compare as compare_runs
    from .report import write_comparison

    print_columns(compare_runs(runs), "progressive AUC, and RMSE over that of a constant (NRMSE)")
    if out is not None:
        say(f"page: {write_comparison(runs, out)}")


@app.command(epilog="Example: steadyrank ladder run.toml --set ladder.seeds=5")
def ladder(
    config: Annotated[Path, typer.Argument(help="A run's TOML file, perhaps with a table [ladder].")],
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; runs/NAME-ladder when left out.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Will it stand twice the rate? Train rates x seeds x optimizers x models x incidents, and score their stability.

    Stopped or killed, the same command goes on where it was. Exit code 1: some cells failed.
    """
    from .ladder import Board, climb, load_ladder, print_found, showing, write_page

    made, board = load_ladder(config, sets or []), Board()
    folder = out or Path("runs") / f"{made.name}-ladder"
    with showing(board):
        found = climb(made, folder, overwrite=overwrite, board=board)
    print_found(found, folder)
    say(f"page: {write_page(made, found, folder)}")
    if not found.whole:
        say("Go on with the same command")
        raise KeyboardInterrupt
    if found.failed:
        say("The same command tries the failed ones again")
        raise typer.Exit(1)


@app.command(epilog="Example: steadyrank prepare kuairand KuaiRand-1K kuairand.parquet")
def prepare(
    dataset: Annotated[str, typer.Argument(help="One of: kuairand.")],
    folder: Annotated[Path, typer.Argument(help="The folder with the files that the data set's own site gives.")],
    target: Annotated[Path | None, typer.Argument(help="The Parquet file to write; DATASET.parquet here.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make our Parquet from a public data set's own files."""
    from .data.catalog import DATASETS, prepare_dataset

    check_known(dataset, DATASETS, "data set")
    target = target or Path(f"{dataset}.parquet")
    with bar(dataset, "rows") as progress:
        rows = prepare_dataset(dataset, folder, target, overwrite=overwrite, progress=progress)
    say(f"{target}: {rows:,} rows. Next: steadyrank train recipes/{dataset}.toml --set data.path={target}")


def main() -> None:
    """Run the command line: exit code 2 for a wrong input, 1 for cells that failed, 130 for Ctrl-C."""
    _wait_politely()
    try:
        _refuse_several(next((word for word in sys.argv[1:] if not word.startswith("-")), ""))
        app()
    except SteadyRankError as error:
        if _speaks(error):
            complain(error)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # how typer answers Ctrl-C, without a word
            errors.print("stopped")
        raise


def _refuse_several(command: str) -> None:
    """Raise ConfigError where several processes were started for what one does."""
    processes = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if processes > 1 and command and command not in _TOGETHER:
        raise ConfigError(
            f"steadyrank {command} runs in one process, and {processes} were started; start it without torchrun, which "
            f"is for {' and '.join(_TOGETHER)}"
        )


def _speaks(error: SteadyRankError) -> bool:
    """Say whether this process is to print the error: of several that torchrun started here, one does."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    from .ranks.roster import is_first_to_say

    return is_first_to_say(str(error))


def _wait_politely() -> None:
    """Let torch's threads wait for one another a moment and then sleep, unless the user says how; before torch loads.

    By itself OpenMP waits in a loop that takes the core from whoever it waits for: beside another training a step took
    50 times as long. Sleeping at once is slow, too. docs/performance.md has the figures.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "2000"


def _spare_compiler() -> None:
    """Keep torch's optimizers from loading torch's compiler, a second's work.

    They load it at the first call of these methods, only to have it pass them over, and keep here what they then call
    instead. Where another version of torch keeps nothing here, they load it.
    """
    from torch.optim import Optimizer

    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if method is not None:
            vars(method).setdefault("__dynamo_disable", method)


def _train(config: "RunConfig", out: Path | None, overwrite: bool) -> Path:
    """Train in a new run folder and print what came out."""
    from .launch import begun_before, create_folder, meeting

    _spare_compiler()
    with meeting(config) as ranks:
        begun = begun_before(config, out, ranks)
        if begun is not None:
            return _resume(config, begun, ranks)
        parts = config.build(announce=say, ranks=ranks)  # before the folder: a wrong path or column leaves none behind
        with create_folder(config, out, ranks, overwrite=overwrite) as folder:
            return _finish(parts, folder)


def _go_on(path: Path, follow: bool) -> Path:
    """Resume a run from its newest checkpoint."""
    from .config import RunConfig
    from .launch import meeting
    from .runs import RunFolder

    text, sets = RunFolder.open(path).config_text(), ["train.follow=true"] if follow else []
    config = RunConfig.from_toml(text, sets, where=str(path))
    _spare_compiler()
    with meeting(config) as ranks:
        return _resume(config, path, ranks)


def _resume(config: "RunConfig", path: Path, ranks: "Ranks") -> Path:
    from .launch import open_folder

    with open_folder(path, ranks) as folder:
        return _finish(config.build(resume=True, announce=say, ranks=ranks), folder, resume=True)


def _finish(parts: "Parts", folder: "RunFolder", resume: bool = False) -> Path:
    from .console import print_summary, start_line, training_bar
    from .sequential import run as run_sequentially

    say(start_line(parts))
    try:
        with training_bar(parts.reader.rows) as show:
            summary = run_sequentially(parts, folder, on_progress=show, on_event=say_event, resume=resume)
    except SteadyRankError:
        say(f"the run up to there: {folder.path}")
        raise
    print_summary(summary)
    if folder.report_path().exists():
        say(f"report: {folder.report_path()}")
    if summary["status"] == "interrupted":
        say(f"Go on with: steadyrank train --resume {folder.path}")
        raise KeyboardInterrupt
    return folder.path
