"""`steadyrank ladder` as a user meets it: its lines, its board, its exit codes, and how it is stopped."""

import errno
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steadyrank import ladder as package
from steadyrank import terminal
from steadyrank.cli import main
from steadyrank.ladder import laboratory, live
from steadyrank.ladder.grid import Cell
from steadyrank.ladder.live import Board, draw, showing, tell, tell_start
from steadyrank.ladder.outcomes import Outcome
from steadyrank.ladder.pool import News, Pool

from .days import write_day
from .test_ladder_outcomes import outcome
from .test_ladder_pool import DAYS, LADDER_TEXT, TEXT, Watcher, in_training, refuse_to_start, start_quickly
from .tiny import tiny

Call = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def steadyrank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Call the command in an empty folder; returns exit code, output and errors."""
    start_quickly(monkeypatch)
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["steadyrank", "ladder", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(TEXT + LADDER_TEXT)
    return path


# The command.


def test_stopped_by_ctrl_c_it_shows_what_is_there_and_the_same_command_goes_on(
    steadyrank: Call, run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--set", "ladder.rates=[0.4]", "--out", tmp_path / "ladder")
    press = Watcher(lambda news: os.kill(os.getpid(), signal.SIGINT), in_training)
    monkeypatch.setattr(package, "Board", lambda: press)
    code, out, err = steadyrank(run_toml, *few)
    assert (code, err.strip()) == (130, "stopped")
    lines = out.splitlines()
    assert lines[0] == f"2 cells in {tmp_path / 'ladder'}; 2 at once"
    assert lines[-2:] == [f"page: {tmp_path / 'ladder' / 'report.html'}", "Go on with the same command"]
    assert "stopped early" in (tmp_path / "ladder" / "report.html").read_text().lower()
    monkeypatch.setattr(package, "Board", Board)
    code, out, err = steadyrank(run_toml, *few)
    assert (code, err) == (0, "")
    assert re.search(r"\n2/2 \w+-0\.4-s1: [a-z ]+, quality 0\.\d{4}\n", out)
    assert "quality: AUC" in out
    assert "clippy: Diverged in none of 1 run" in out
    assert out.splitlines()[-1] == f"page: {tmp_path / 'ladder' / 'report.html'}"
    monkeypatch.setattr(Pool, "_start", refuse_to_start)
    code, out, err = steadyrank(run_toml, *few)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"2 cells in {tmp_path / 'ladder'}: all have ended before"


def test_where_cells_failed_it_says_which_and_why_and_how_to_go_on(steadyrank: Call, tmp_path: Path) -> None:
    """The label of one row is 2, which only who reads that far finds."""
    for day in range(2):
        write_day(tmp_path / "good", day)
        write_day(tmp_path / "bad", day, **({"click": [2] + [0, 1] * 74 + [1]} if day else {}))
    (tmp_path / "run.toml").write_text(DAYS.format(folder=tmp_path))
    few = ("--set", "ladder.optimizers={}", "--out", tmp_path / "ladder")
    code, out, err = steadyrank(tmp_path / "run.toml", *few)
    assert (code, err) == (1, "")
    reason = r"bad-adagrad-0\.1-s0: (failed: )?.*/bad/day_1\.parquet.*column 'click': expected a binary label"
    assert re.search(rf"\n2/2 {reason}", out)
    assert re.search(rf"\n1 of 2 cells failed:\n  {reason}", out)
    assert out.splitlines()[-1] == "The same command tries the failed ones again"
    write_day(tmp_path / "bad", 1)
    code, out, err = steadyrank(tmp_path / "run.toml", *few)
    assert (code, err) == (0, "")
    assert "cells failed" not in out
    assert "The same command" not in out


def check_refused(result: tuple[int, str, str], pattern: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert re.search(pattern, err), err


def test_wrong_input_is_refused_and_leaves_nothing(
    steadyrank: Call, run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "_start", refuse_to_start)
    monkeypatch.chdir(tmp_path)
    check_refused(steadyrank("rum.toml"), r"no configuration file 'rum\.toml'; did you mean 'run\.toml'")
    check_refused(steadyrank("run.toml", "--set", "ladder.sedes=2"), "unknown key 'ladder.sedes'; did you mean 'seeds'")
    check_refused(steadyrank("run.toml", "--set", "train.lgo_every=1"), "'train.lgo_every'; did you mean 'log_every'")
    (tmp_path / "days.toml").write_text(DAYS.format(folder="nowhere"))
    check_refused(steadyrank("days.toml"), r"no file or folder 'nowhere/good'")
    write_day(tmp_path / "day", 0)
    column = ("--set", "schema.tasks.click.column=clik", "--set", "ladder.models={}", "--set", "data.path=day")
    check_refused(steadyrank("days.toml", *column), "no column .*'clik'; did you mean 'click'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["day", "days.toml", "run.toml"]


def test_a_full_disk_is_told(steadyrank: Call, run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Pool, "_start", refuse_to_start)
    monkeypatch.setattr(laboratory, "replace", refuse)
    result = steadyrank(run_toml, "--out", tmp_path / "ladder")
    check_refused(result, r"cannot write .*ladder\.toml: No space left on device; choose another --out")


def test_help_shows_an_example(steadyrank: Call) -> None:
    code, out, _ = steadyrank("--help")
    assert code == 0
    assert "Example: steadyrank ladder" in out
    assert "the same command goes on" in out


def press_ctrl_c(command: Sequence[str], at: str, presses: int, cwd: Path) -> tuple[int, str]:
    """Run a command in a pseudo-terminal, and press Ctrl-C once it has shown a text; returns exit code and output."""
    ours, theirs = pty.openpty()
    settings = {"COLUMNS": "80", "LINES": "40", "TERM": "xterm", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env={**os.environ, **settings},
        start_new_session=True, preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
    )  # fmt: skip
    os.close(theirs)
    shown, pressed, end = "", 0, time.monotonic() + 300
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            shown += data.decode(errors="replace")
        if at in shown and pressed < presses:
            os.write(ours, b"\x03")
            pressed += 1
            time.sleep(0.2)
    os.close(ours)
    return process.wait(60), shown


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_in_a_terminal(run_toml: Path, tmp_path: Path, presses: int) -> None:
    """With workers of their own interpreter, which Ctrl-C does not reach."""
    command = [sys.executable, "-m", "steadyrank", "ladder", "run.toml", "--set", "data.rows=25_600"]
    code, shown = press_ctrl_c(command, "▸", presses, tmp_path)
    assert code == 130, shown
    assert shown.rstrip().endswith("stopped")
    assert "Traceback" not in shown
    assert "KeyboardInterrupt" not in shown
    if presses == 1:
        assert "Go on with the same command" in shown
    done = subprocess.run([*command[:-1], "data.rows=25_600"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "4 cells in runs/tiny-ladder" in done.stdout


@pytest.mark.slow
def test_workers_end_with_a_checkpoint_when_their_parent_is_killed(run_toml: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "steadyrank", "ladder", "run.toml", "--set", "data.rows=25_600"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    errors = tmp_path / "errors.txt"
    with errors.open("w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, env=settings, stdout=subprocess.DEVNULL, stderr=file)
    cells = tmp_path / "runs" / "tiny-ladder" / "cells"
    end = time.monotonic() + 200
    while len([*cells.glob("*/readings/steps.jsonl")]) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    process.kill()
    process.wait()
    while len([*cells.glob("*/summary.json")]) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    summaries = [path.read_text() for path in cells.glob("*/summary.json")]
    assert len(summaries) == 2
    assert all('"interrupted"' in text or '"finished"' in text for text in summaries)
    assert errors.read_text() == ""


# The board.


def make_cells(
    optimizers: Sequence[str] = ("adam", "clippy"), rates: Sequence[float] = (0.1, 0.2), seeds: int = 2
) -> list[Cell]:
    return [
        Cell(name, name, "", "", rate, seed, tiny().model_copy(update={"name": f"{name}-{rate:g}-s{seed}"}))
        for seed in range(seeds)
        for name in optimizers
        for rate in rates
    ]


def ended(cell: Cell, verdict: str = "healthy", **changes: Any) -> Outcome:
    place = {"cell": cell.name, "optimizer": cell.optimizer, "rate": cell.rate, "seed": cell.seed}
    return outcome({"click": verdict, "like": "healthy"}, **place | changes)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time, as a list of one number that can be set."""
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    return now


def show(board: Board, monkeypatch: pytest.MonkeyPatch, width: int = 80) -> str:
    screen = Console(file=io.StringIO(), width=width, force_terminal=False)
    monkeypatch.setattr(live, "console", screen)
    screen.print(draw(board))
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_time_left_is_what_cells_of_the_model_cost_so_far(clock: list[float]) -> None:
    board, cells = Board(), make_cells()  # 8 cells
    board.begin(cells, 2, [ended(cells[0])])
    assert board.seconds_left() is None
    for cell in cells[1:3]:
        board.hear(News("began", cell.name), None)
    clock[0] += 10
    board.hear(News("ended", cells[1].name, 1.0, "finished"), ended(cells[1]))
    assert board.seconds_left() == 6 * 10 / 2
    board.hear(News("progress", cells[2].name, 0.5), None)
    assert board.seconds_left() == 5.5 * 10 / 2
    clock[0] += 20
    board.hear(News("failed", cells[2].name, words="why"), None)  # cost 30, on average 20
    assert board.seconds_left() == 5 * 20 / 2
    assert (board.tried(), board.failed) == (3, {cells[2].name: "why"})
    for cell in cells[3:]:
        board.hear(News("began", cell.name), None)
        board.hear(News("ended", cell.name), ended(cell))
    assert board.seconds_left() == 0


def test_each_cell_has_its_mark(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    board, cells = Board(), make_cells()
    assert show(board, monkeypatch).strip() == "looking at what is there"
    board.begin(cells, 2, [])
    shown = show(board, monkeypatch)
    assert re.search(r"adam +·· +··", shown)
    assert "· waiting" in shown
    assert "healthy" not in shown
    assert "0 of 8 cells, 2 at once" in shown
    verdicts = ("healthy", "micro_divergence", "full_divergence", "never_learned")
    for cell, verdict in zip(cells, verdicts, strict=False):  # the first seed
        board.hear(News("began", cell.name), None)
        clock[0] += 60
        board.hear(News("ended", cell.name), ended(cell, verdict))
    board.hear(News("failed", cells[4].name, words="why"), None)
    board.hear(News("began", cells[5].name), None)
    shown = show(board, monkeypatch)
    assert re.search(r"\n +0\.1 +0\.2 *\n", shown)
    assert re.search(r"adam +●! +◐▸ *\n", shown)
    assert re.search(r"clippy +×· +○· *\n", shown)
    assert re.search(r"5 of 8 cells, 2 at once, \d+ s left", shown)
    for words in ("healthy", "micro divergence", "never learned", "full divergence", "failed", "training"):
        assert f" {words}" in shown


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_board_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Each optimizer has its own rates: where they are too many to stand beside one another, an arm is one line."""
    board = Board()
    cells = make_cells(["adam"], [0.001 * 2**i for i in range(8)]) + make_cells(
        ["clippy"], [0.1 * 2**i for i in range(6)]
    )
    board.begin(cells, 2, [ended(cell) for cell in cells if cell.rate == 0.8])
    shown = show(board, monkeypatch, width)
    assert max(map(len, shown.splitlines())) <= width
    if width == 80:
        assert re.search(r"adam +0\.001–0\.128 +·· ·· ·· ·· ·· ·· ·· ··", shown)
        assert re.search(r"clippy +0\.1–3\.2 +·· ·· ·· ●● ·· ··", shown)
    if width == 120:
        assert re.search(r"0\.001 +0\.002 +0\.004", shown)


def test_of_very_many_arms_those_under_way_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    board, cells = Board(), make_cells([f"method_{i:03d}" for i in range(100)], [0.1], 1)
    board.begin(cells, 2, [])
    board.hear(News("began", cells[70].name), None)
    shown = show(board, monkeypatch)
    assert re.search(r"method_070 +▸", shown)
    assert shown.count("method_") == 35
    assert "method_010" not in shown


def test_where_nobody_looks_lines_are_said_and_nothing_moves(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    screen = Console(file=io.StringIO(), width=120, force_terminal=False)
    for place in (live, terminal):
        monkeypatch.setattr(place, "console", screen)
    board, cells = Board(), make_cells(seeds=1)
    with showing(board):
        board.begin(cells, 8, [ended(cells[0])])
        tell_start(board, Path("runs/x"))
        for cell in cells[1:3]:
            board.hear(news := News("began", cell.name), None)
            tell(board, news, None)
        clock[0] += 200
        board.hear(news := News("ended", cells[1].name), found := ended(cells[1], "never_learned"))
        tell(board, news, found)
        board.hear(news := News("failed", cells[2].name, words="a label is 2"), None)
        tell(board, news, None)
        board.hear(news := News("ended", cells[3].name), found := ended(cells[3]))
        tell(board, news, found)
    assert isinstance(screen.file, io.StringIO)
    assert screen.file.getvalue().splitlines() == [
        "4 cells in runs/x, of which 1 has ended before; 3 at once",
        "2/4 adam-0.2-s0: never learned, quality 0.5000, 3 min left",
        "3/4 clippy-0.1-s0: failed: a label is 2, 3 min left",
        "4/4 clippy-0.2-s0: healthy, quality 0.5000",
    ]


def test_a_verdict_that_is_said_is_of_the_same_model_and_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model learned what this one did not; on its own data nobody did."""
    screen = Console(file=io.StringIO(), width=120, force_terminal=False)
    for place in (live, terminal):
        monkeypatch.setattr(place, "console", screen)
    board, cells = Board(), make_cells(seeds=1)
    board.begin(cells, 1, [ended(cells[0], model="large")])
    board.hear(news := News("ended", cells[1].name), found := ended(cells[1], "never_learned"))
    tell(board, news, found)
    assert isinstance(screen.file, io.StringIO)
    assert ": healthy, quality" in screen.file.getvalue()


def test_in_a_terminal_the_board_stands_below_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    for place in (live, terminal):
        monkeypatch.setattr(place, "console", screen)
    board, cells = Board(), make_cells(seeds=1)
    with showing(board):
        board.begin(cells, 1, [])
        tell_start(board, Path("runs/x"))
        board.hear(news := News("ended", cells[1].name), found := ended(cells[1]))
        tell(board, news, found)
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    assert shown.index("4 cells in runs/x; 1 at once") < shown.rindex("1 of 4 cells, 1 at once")
    assert "1/4" not in shown
