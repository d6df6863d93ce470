"""The command line as a new user meets it: what it prints, what it leaves, and how it refuses."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steadyrank.cli import main
from steadyrank.runs import RunFolder

Call = Callable[..., tuple[int, str, str]]
FAST = ["--set", "trackers.tensorboard=false", "--set", "model.trunk={kind='shared_bottom', widths=[8]}"]
LEAN = [*FAST, "--set", "train.report=false"]


@pytest.fixture
def steadyrank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Call the command line in an empty folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["steadyrank", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def write_log(path: Path, rows: int = 600, **changes: object) -> None:
    rng = np.random.default_rng(0)
    columns: dict[str, object] = {
        "time": 1_700_000_000 + np.arange(rows) * 400,
        "user_id": rng.integers(0, 40, rows),
        "item_id": rng.integers(0, 60, rows),
        "price": rng.lognormal(size=rows),
        "click": rng.integers(0, 2, rows),
    }
    pq.write_table(pa.table({**columns, **changes}), path)


def test_from_csv_to_a_compared_run(steadyrank: Call, tmp_path: Path) -> None:
    """The whole of a user's first hour: convert, init, train, report, evaluate, predict, compare."""
    write_log(tmp_path / "first.parquet")
    import pyarrow.csv as pacsv

    pacsv.write_csv(pq.read_table("first.parquet"), "log.csv")
    code, out, _ = steadyrank("convert", "log.csv", "log.parquet")
    assert (code, "600 rows" in out, "steadyrank init log.parquet" in out) == (0, True, True)
    code, out, _ = steadyrank("init", "log.parquet")
    assert code == 0
    assert "steadyrank train run.toml" in out
    assert "# " in Path("run.toml").read_text()
    code, out, _ = steadyrank("train", "run.toml", *FAST)
    assert code == 0, out
    assert "click" in out
    assert "baseline" in out
    assert "runs/log-1/report.html" in out
    code, out, _ = steadyrank("train", "run.toml", *FAST, "--set", "seed=1")
    assert (code, "runs/log-2/report.html" in out) == (0, True)
    code, out, _ = steadyrank("report", "runs/log-1")
    assert (code, out.strip()) == (0, "report: runs/log-1/report.html")
    code, out, _ = steadyrank("evaluate", "runs/log-1", "log.parquet", "--slice-by", "user_id")
    assert code == 0
    assert re.search(r"600 rows, binary tasks", out)
    assert "2023-11-14" in out
    assert "by user_id" in out
    code, out, _ = steadyrank("predict", "runs/log-1", "log.parquet", "scores.parquet", "--keys", "user_id,price")
    scores = pq.read_table("scores.parquet")
    assert scores.column_names == ["user_id", "price", "click"]
    assert scores.num_rows == 600
    assert scores["price"].equals(pq.read_table("log.parquet")["price"])
    assert 0 < min(scores["click"].to_pylist()) <= max(scores["click"].to_pylist()) < 1
    code, out, _ = steadyrank("compare", "runs/log-1", "runs/log-2")
    assert (code, "AUC click" in out, "log-2" in out) == (0, True, True)


def test_demo_ends_with_a_table_a_report_and_the_next_command(steadyrank: Call) -> None:
    code, out, _ = steadyrank("demo", *FAST, "--set", "data.rows=3000", "--set", "data.users=100", "--out", "runs/d")
    assert code == 0
    assert "attainable" in out
    assert Path("runs/d/report.html").exists()
    assert "steadyrank compare runs/d runs/d-adam" in out


def test_predictions_are_those_of_the_trained_model_and_ignore_labels(steadyrank: Call, tmp_path: Path) -> None:
    write_log(tmp_path / "log.parquet")
    steadyrank("init", "log.parquet")
    assert steadyrank("train", "run.toml", *LEAN, "--out", "r")[0] == 0
    table = pq.read_table("log.parquet")
    pq.write_table(table.drop_columns(["click"]), "unlabelled.parquet")
    assert steadyrank("predict", "r", "log.parquet", "a.parquet")[0] == 0
    assert steadyrank("predict", "r", "unlabelled.parquet", "b.parquet")[0] == 0
    assert pq.read_table("a.parquet").equals(pq.read_table("b.parquet"))
    assert pq.read_table("a.parquet").column_names == ["time", "user_id", "item_id", "click"]


@pytest.mark.parametrize(
    "command", ["demo", "init", "convert", "train", "evaluate", "predict", "report", "compare", "prepare"]
)
def test_help_shows_an_example(steadyrank: Call, command: str) -> None:
    code, out, _ = steadyrank(command, "--help")
    assert code == 0
    assert f"Example: steadyrank {command}" in out


def test_what_one_process_does_several_refuse(steadyrank: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    check_refused(steadyrank("report", "runs/a"), "report runs in one process, and 2 were started")


def test_version(steadyrank: Call) -> None:
    assert re.fullmatch(r"steadyrank \d+\.\d+\.\d+", steadyrank("--version")[1].strip())


@pytest.fixture
def trained(steadyrank: Call, tmp_path: Path) -> Path:
    write_log(tmp_path / "log.parquet")
    steadyrank("init", "log.parquet")
    assert steadyrank("train", "run.toml", *LEAN, "--out", "run")[0] == 0
    return tmp_path / "run"


def check_refused(result: tuple[int, str, str], pattern: str) -> None:
    code, _, err = result
    assert code == 2
    assert err.startswith("error: ")
    assert re.search(pattern, err), err
    assert "Traceback" not in err


def test_wrong_input_is_refused_and_leaves_nothing(steadyrank: Call, tmp_path: Path) -> None:
    write_log(tmp_path / "log.parquet")
    steadyrank("init", "log.parquet")
    check_refused(steadyrank("init", "log.parquet"), "'run.toml' exists; give --overwrite")
    check_refused(
        steadyrank("init", "lag.parquet", "--out", "x.toml"),
        r"no file or folder 'lag\.parquet'; did you mean 'log\.parquet'",
    )
    check_refused(steadyrank("train", "rn.toml"), r"no configuration file 'rn\.toml'; did you mean 'run\.toml'")
    check_refused(steadyrank("train", "run.toml", "--set", "train.lgo_every=1"), "did you mean 'log_every'")
    check_refused(
        steadyrank("train", "run.toml", "--set", "data.path=nowhere.parquet"), "no file or folder 'nowhere.parquet'"
    )
    check_refused(
        steadyrank("train", "run.toml", "--set", "schema.tasks.click.column=clik"),
        "no column .* 'clik'; did you mean 'click'",
    )
    check_refused(steadyrank("train", "run.toml", "--set", "train.device=tpu9"), "train.device = 'tpu9'")
    check_refused(steadyrank("report", "nothing"), "nothing")
    check_refused(steadyrank("compare", "nothing"), "nothing")
    check_refused(steadyrank("evaluate", "nothing", "log.parquet"), "nothing")
    check_refused(steadyrank("prepare", "kuairnd", "."), "no data set 'kuairnd'; did you mean 'kuairand'")
    check_refused(steadyrank("convert", "log.xyz", "x.parquet"), "no file 'log.xyz'")
    assert not Path("runs").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.parquet", "run.toml"]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("click", [2] + [0, 1] * 299 + [1], r"column 'click': expected a binary label"),
        ("time", [None, *range(599)], r"column 'time': the time is null"),
        ("price", ["cheap"] * 600, r"column 'price': expected a number, found (large_)?string"),
        ("user_id", [0.5] * 600, r"column 'user_id': expected an id"),
        ("price", [float("nan")] * 600, r"column 'price': 100% of .* values are NaN or infinite"),
    ],
)
def test_wrong_values_are_named(steadyrank: Call, trained: Path, column: str, values: list, message: str) -> None:
    write_log(Path("bad.parquet"), **{column: values})
    result = steadyrank("train", "run.toml", *LEAN, "--set", "data.path=bad.parquet", "--out", "bad")
    check_refused(result, r"bad\.parquet.*" + message)


def test_a_run_is_never_overwritten_without_being_told(steadyrank: Call, trained: Path) -> None:
    before = (trained / "summary.json").read_bytes()
    check_refused(steadyrank("train", "run.toml", "--out", trained), "--overwrite")
    assert (trained / "summary.json").read_bytes() == before
    assert steadyrank("train", "run.toml", *LEAN, "--out", trained, "--overwrite", "--set", "seed=3")[0] == 0
    assert (trained / "summary.json").read_bytes() != before
    Path("precious").mkdir()
    Path("precious/thesis.txt").write_text("years of work")
    check_refused(steadyrank("train", "run.toml", "--out", "precious", "--overwrite"), "precious")
    assert Path("precious/thesis.txt").read_text() == "years of work"
    check_refused(steadyrank("predict", trained, "log.parquet", "log.parquet"), "exists; give --overwrite")


def test_resume_goes_on_with_a_run(steadyrank: Call, trained: Path) -> None:
    assert steadyrank("train", "--resume", trained)[0] == 0  # nothing is left to learn, and that is no error
    assert RunFolder.open(trained).summary()["rows"] == 600
    assert steadyrank("train", "--resume", trained, "run.toml")[0] == 2
    assert steadyrank("train")[0] == 2


def test_a_run_folder_from_another_version_is_refused(steadyrank: Call, trained: Path) -> None:
    text = (trained / "environment.json").read_text()
    (trained / "environment.json").write_text(re.sub(r'"format": \d+', '"format": 99', text))
    for command in (
        ("report", trained),
        ("evaluate", trained, "log.parquet"),
        ("predict", trained, "log.parquet", "x"),
    ):
        check_refused(steadyrank(*command), "format 99")
