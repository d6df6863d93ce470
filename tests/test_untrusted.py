"""A run folder or a configuration from elsewhere executes nothing, writes nowhere else, and fills no memory."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from steadyrank.cli import main
from steadyrank.config import RunConfig, demo
from steadyrank.errors import CheckpointError, ConfigError, SteadyRankError
from steadyrank.files import MOST_BYTES, MOST_LINE_BYTES, append_lines, read_lines, read_object, read_text
from steadyrank.report import compare, write_comparison, write_report
from steadyrank.report.plots import shorten
from steadyrank.runs import RunFolder
from steadyrank.trackers import TrackersConfig, WandbConfig, open_trackers

from .report_pages import Page, browse
from .report_runs import BLAMED, make_tables, write_run

PACKAGE = Path(__file__).resolve().parents[1] / "steadyrank"
RUN = 'document.documentElement.dataset.pwned="1"'
HOSTILE = (
    f"</script><img src=x onerror='{RUN}'>",
    f'" onmouseover=\'{RUN}\' style="position:fixed;inset:0"',
    f"<a href='javascript:{RUN}'>x</a><b>y</b>\u2028\u2029",
    f"&lt;img src=x onerror={RUN}&gt; {{{{7*7}}}} %{{x}} ${{1}}",
    "--></style><svg/onload=alert(1)>\x00\x1b]0;x\x07",
    "half \ud800 a surrogate, 'quoted'`",
)
# Words that our own code writes and looks for; everything else in a run folder is somebody's text.
OURS = re.compile(
    r"warning|verdict|bad_step|cause|rollback|notice|alarm|micro_divergence|full_divergence|recovered|healthy|binary"
    r"|regression|finished|share|middle|data|unknown|item"
)


def poison(value: Any, hostile: str) -> Any:
    """Put a hostile text after every text in a JSON value, and beside every key of mappings that name things."""
    if isinstance(value, dict):
        found = {key: poison(each, hostile) for key, each in value.items()}
        named = [key for key in ("missing", "quantities", "columns", "parameters") if isinstance(found.get(key), dict)]
        for key in named:
            found[key] |= {hostile: next(iter(found[key].values()), 1)}
        return found
    if isinstance(value, list):
        return [poison(each, hostile) for each in value]
    if not isinstance(value, str) or OURS.fullmatch(value):
        return value
    return hostile if value == BLAMED else value if hostile in value else value + hostile


def make_run(path: Path, texts: tuple[str, ...]) -> RunFolder:
    """Write an eventful run in which these texts stand wherever a run folder holds somebody's text."""
    tasks, parameters = [f"{i}{text}" for i, text in enumerate(texts[:3])], [*texts, "a.weight"]
    run = write_run(path, make_tables(tasks, parameters, steps=400))
    for place, file in enumerate(sorted([*path.glob("*.json*"), *path.glob("causes/*.json")])):
        docs = [poison(json.loads(line), texts[place % len(texts)]) for line in _documents(file)]
        if file.name == "environment.json":
            docs[0] |= {text: [text] for text in texts}
            docs[0]["format"] = 3
        file.write_text("\n".join(map(json.dumps, docs)) + "\n")
    lines = [f"{json.dumps(text)} = {json.dumps(text + path.name)}" for text in texts if "\ud800" not in text]
    run.write_config("\n".join(line.replace("\\u001b", "\\u001B").replace("\x7f", "") for line in lines) + "\n")
    return run


def _documents(file: Path) -> list[str]:
    return file.read_text().split("\n")[:-1] if file.suffix == ".jsonl" else [file.read_text()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """A harmless run with texts of the same lengths, and the hostile one."""
    folder = tmp_path_factory.mktemp("runs")
    harmless = tuple(f"{chr(ord('p') + i)}" * len(text) for i, text in enumerate(HOSTILE))
    return [make_run(folder / "harmless", harmless), make_run(folder / "hostile", HOSTILE)]


def shape(path: Path) -> list[tuple[str, list[str]]]:
    """Every tag of a page with the names of its attributes."""
    return [(tag, list(attributes)) for tag, attributes in Page(path).tags if tag != "wbr"]


def test_no_text_makes_a_tag_or_an_attribute(runs: list[RunFolder]) -> None:
    harmless, hostile = (shape(write_report(run)) for run in runs)
    assert hostile == harmless
    pages = [write_comparison([run, run], run.path / "compare.html") for run in runs]
    assert shape(pages[1]) == shape(pages[0])


def test_plotly_is_given_no_tag(runs: list[RunFolder]) -> None:
    """It reads some in every text; a name's own must have become entities, the entities in it too."""
    figures = Page(write_report(runs[1])).figures()
    for figure in figures.values():
        for trace in figure["data"]:
            trace.pop("meta", None)  # the page's own legends show these as text
        figure["layout"].pop("meta", None)
    plain = json.dumps(figures)
    found = set(re.findall(r"<[^>]*>", plain))
    assert found <= {"<br>", "<extra>", "</extra>"}
    assert "&amp;lt;img" in plain


@pytest.mark.slow
@pytest.mark.parametrize("page", ["report", "compare"])
def test_a_browser_executes_nothing(runs: list[RunFolder], tmp_path: Path, page: str) -> None:
    path = write_report(runs[1]) if page == "report" else write_comparison(runs, tmp_path / "compare.html")
    hover = """<script>(async () => {
      while (!document.documentElement.dataset.figuresDrawn) await new Promise((go) => setTimeout(go, 20));
      let links = 0, hovers = 0;
      for (const plot of document.querySelectorAll("[data-figure]")) {
        Plotly.Fx.hover(plot, [{ curveNumber: 0, pointNumber: 1 }]);
        hovers += plot.querySelectorAll(".hoverlayer text").length;
        links += plot.querySelectorAll("a, img, b, [onmouseover]").length;
      }
      Object.assign(document.documentElement.dataset, { links, hovers: hovers > 9 });
    })();</script>"""
    target = tmp_path / "hovered.html"
    target.write_text(path.read_text().replace("</body>", hover + "</body>"))
    root = re.search(r"<html[^>]*>", browse(target, tmp_path / "profile"))
    assert root is not None
    assert 'data-figures-drawn="true"' in root[0]
    assert 'data-links="0"' in root[0]
    assert 'data-hovers="true"' in root[0]
    assert "data-pwned" not in root[0]
    assert "data-script-error" not in root[0]


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_terminal_is_told_nothing_that_it_obeys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    order = "\x1b]0;x\x07\udcff"
    run = RunFolder.create(tmp_path / "run")
    run.write_summary({"status": order, "optimizer": {"dense": f"[bold]{order}"}})
    path = run.path if command == "compare" else tmp_path / order
    monkeypatch.setattr(sys, "argv", ["steadyrank", command, str(path)])
    with pytest.raises(SystemExit):
        main()
    told = "".join(capsys.readouterr())
    assert "\\x1b]0;x\\x07\\udcff" in told
    assert "\x1b" not in told


@contextmanager
def suppress_ours(path: Path) -> Iterator[None]:
    """Let through that something is said to be damaged, in few words and with its place; any other error is one."""
    said = ""
    try:
        yield
    except SteadyRankError as error:
        said = str(error)
    assert said == "" or (str(path) in said and len(said) < 1000)


def nest(depth: int) -> str:
    return '{"step": 1, "a": ' + "[" * depth + "]" * depth + "}"


WRONG = (None, True, 10**38, 1e308, "nan", [], [[1]], {"a": {"b": [1]}})


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("summary.json", ("tasks",)),
        ("summary.json", ("steps",)),
        ("summary.json", ("rows",)),
        ("summary.json", ("first_time_s",)),
        ("summary.json", ("optimizer",)),
        ("summary.json", ("missing", "item")),
        ("summary.json", ("tasks", "click")),
        ("summary.json", ("tasks", "click", "kind")),
        ("summary.json", ("tasks", "click", "run", "auc")),
        ("summary.json", ("tasks", "click", "verdict")),
        ("summary.json", ("tasks", "click", "verdict", "episodes")),
        ("causes/step_456.json", ("step",)),
        ("causes/step_456.json", ("layer",)),
        ("causes/step_456.json", ("features", 0, "now")),
        ("causes/step_456.json", ("rows",)),
        ("causes/step_456.json", ("rows", 0)),
        ("events.jsonl", ("step",)),
        ("events.jsonl", ("quantities",)),
        ("events.jsonl", ("layer",)),
        ("readings/curvature.jsonl", ("step",)),
        ("readings/curvature.jsonl", ("values",)),
        ("readings/curvature.jsonl", ("values", 0)),
        ("readings/curvature.jsonl", ("time",)),
    ],
)
def test_a_wrong_type_is_refused_or_shown(
    small: RunFolder, monkeypatch: pytest.MonkeyPatch, file: str, keys: tuple[Any, ...]
) -> None:
    """Everything but the drawing, which takes a while and is held by the test below, and the figures' own."""
    monkeypatch.setattr("steadyrank.report.page.draw", lambda *_, **__: [])
    path = small.path / file
    before = path.read_text()
    try:
        for value in WRONG:
            path.write_text(spoil(before, keys, value))
            for look in (write_report, lambda run: compare([run])) if "summary" in file else (write_report,):
                with suppress_ours(small.path):
                    look(small)
    finally:
        path.write_text(before)


def spoil(text: str, keys: tuple[Any, ...], value: Any) -> str:
    """Put a value somewhere into the last line of JSON lines, or into one JSON text."""
    *lines, last = text.rstrip("\n").split("\n") if not text.startswith("{\n") else [text]
    document = place = json.loads(last)
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return "\n".join([*lines, json.dumps(document)]) + "\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    tables = make_tables(parameters=[BLAMED], steps=600)
    return write_run(tmp_path_factory.mktemp("small") / "run", {name: tables[name] for name in ("steps", "curvature")})


def test_values_that_no_figure_can_show_are_left_out(small: RunFolder, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    for step, value in enumerate((1e300, -1e300, 1e-300, float("inf"), 1.0)):
        run.append("steps", step * 2**50, {"loss/total": value, "clip_factor/a": value, "speed/rows_per_s": value})
        run.append("windows", step, {"auc/a": value, "log/rows": value, "log/time_s": value})
        run.append("dynamics", step, {f"{name}/a": value for name in ("update_over_weight", "effective_rank")})
    run.event(-5, "warning", "before it all")
    assert "before it all" in Page(write_report(run)).text
    assert write_comparison([run, small], tmp_path / "compare.html").exists()


def test_a_long_name_makes_no_long_page(tmp_path: Path) -> None:
    name = "ab." * 100_000
    run = write_run(tmp_path / "run", make_tables([name, "other"], [name], steps=600))
    assert write_report(run).stat().st_size < 5_000_000
    assert len(shorten(name, 42)) == 42


def test_many_names_make_no_endless_page(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.append("windows", 1, {f"auc/{i}": 0.5 for i in range(3000)})
    page = Page(write_report(run))
    assert "Shown are the first 100 of 3000." in page.text
    assert len(page.figures()["auc"]["data"]) == 100


def test_a_small_table_asks_for_no_large_memory(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    for step in range(3000):
        run.append("steps", step, {f"loss/{step}": 1.0})
    with pytest.raises(CheckpointError, match="3000 names in 3000 rows, but 3000 values"):
        run.readings("steps")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (nest(100), "nested more than 64 deep"),
        (nest(100_000), "recursion"),
        ('{"step": ' + "9" * 10_000 + "}", "a whole number of 10000 digits"),
        ('{"step": ' + "9" * 100 + "}", "a whole number of 100 digits"),
        ("[1, 2]", "not a list"),
        ("null", "not a NoneType"),
        ("\x00\x01\ufffd", "Expecting value"),
        ('{"a": 1} {"b": 2}', "Extra data"),
    ],
)
def test_json_that_is_too_much(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "file"
    path.write_text(text + "\n")
    with pytest.raises(CheckpointError, match=expected):
        read_object(path)
    path.write_text('{"step": 0}\n' + text + "\n")
    with pytest.raises(CheckpointError, match=f"line 2: .*{expected}"):
        read_lines(path)


def test_what_json_leaves_open_is_settled(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"a": 1, "a": NaN}')
    assert str(read_object(path)) == "{'a': nan}"  # the last one counts


def test_only_plain_files_of_a_sane_size_are_read(tmp_path: Path) -> None:
    """A pipe would keep the reader waiting for ever, a device would never end."""
    pipe, large, line = tmp_path / "pipe", tmp_path / "large", tmp_path / "line"
    os.mkfifo(pipe)
    for path, size in ((large, 3 << 30), (line, MOST_LINE_BYTES + 1)):
        path.touch()
        os.truncate(path, size)  # takes no space
    for path in (pipe, Path("/dev/zero"), tmp_path, large):
        for read in (read_text, read_object, read_lines):
            with pytest.raises(CheckpointError, match=r"cannot be read: .*(regular file|directory|bytes)"):
                read(path)
    assert large.stat().st_size > MOST_BYTES
    with pytest.raises(CheckpointError, match=r"line 1: .*16 MB and more"):
        read_lines(line)
    with pytest.raises(CheckpointError, match="cannot write"):
        append_lines(pipe, ["{}"])


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious" / "file"
    path.parent.mkdir()
    path.write_text("not ours\n")
    return path


def test_nothing_is_written_through_a_link(tmp_path: Path, precious: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    for link in (run.path / ".report.html.tmp", run.report_path(), run.path / "events.jsonl"):
        link.symlink_to(precious)
    assert not run.write_report("<p>").is_symlink()
    with pytest.raises(CheckpointError, match=r"events.jsonl is a link to .*precious"):
        append_lines(run.path / "events.jsonl", ["{}"])
    assert precious.read_text() == "not ours\n"


@pytest.mark.parametrize("name", ["readings", "checkpoints", "causes", "tensorboard"])
def test_a_folder_of_a_run_is_no_link(tmp_path: Path, precious: Path, name: str) -> None:
    run = RunFolder.create(tmp_path / "run")
    if (run.path / name).exists():
        (run.path / name).rmdir()
    (run.path / name).symlink_to(precious.parent)
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*precious"):
        RunFolder.open(run.path)
    RunFolder.create(run.path, overwrite=True)  # deletes the link, not what it leads to
    assert not (run.path / name).is_symlink()
    assert precious.read_text() == "not ours\n"


def test_no_checkpoint_is_deleted_through_a_link(tmp_path: Path) -> None:
    run, other = RunFolder.create(tmp_path / "run"), RunFolder.create(tmp_path / "other")
    for step in (1, 2):
        other.checkpoints.save(step, {"a": step})
        (run.path / "checkpoints" / f"step_{step}").symlink_to(other.checkpoints.folder(step))
    assert run.checkpoints.load(2) == {"a": 2}  # reading is one thing
    with pytest.raises(CheckpointError, match="cannot write"):
        run.checkpoints.prune(keep=1)
    run.checkpoints.save(2, {"a": 3})
    assert [other.checkpoints.load(step) for step in other.checkpoints.steps()] == [{"a": 1}, {"a": 2}]


def test_a_resumed_run_cuts_and_locks_no_link(tmp_path: Path, precious: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.append("steps", 1, {"a": 1.0})
    marks = run.mark()
    table = run.path / "readings" / "steps.jsonl"
    precious.write_text("x" * 10_000)
    table.unlink()
    for link in (table, run.path / ".lock"):
        link.symlink_to(precious)
    with pytest.raises(CheckpointError, match=r"steps.jsonl is a link"):
        RunFolder.open(run.path).rewind(marks)
    with pytest.raises(CheckpointError, match=r"\.lock is a link"), run.locked():
        pass
    assert precious.read_text() == "x" * 10_000


def test_a_tracker_writes_into_no_link(tmp_path: Path, precious: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    for name, config in (("tensorboard", TrackersConfig()), ("wandb", TrackersConfig(wandb=WandbConfig()))):
        (run.path / name).symlink_to(precious.parent)
        with pytest.raises(CheckpointError, match=f"{name} is a link"):
            open_trackers(config, run, "run", {})
        (run.path / name).unlink()
    assert [path.name for path in precious.parent.iterdir()] == ["file"]


LARGE = (
    *(("train", "threads"), ("reader", "window_hours"), ("watch.warning", "band_steps")),
    *(("watch.verdict", "windows"), ("watch.verdict", "steps")),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = " + "[" * 100_000, "not TOML: "),
        ("a = " + "9" * 10_000, "not TOML: "),
        ("[" + ".".join("a" * 5_000) + "]", "unknown key 'a'"),
        ("\n".join(f"a{i} = 1" for i in range(10_000)), r"and \d+ more"),
        (f"{'x' * 100_000} = 1", "unknown key 'x"),
        (f"name = '{'x' * 100_000}'", "'name': "),
        (f"name = '{'x' * 10_000_000}'", "it has 10,000,009 letters, and at most 1,048,576 are read"),
        *(
            (f"[{part}]\n{field} = 1_000_000_000_000", f"'{part}.{field}': input should be less")
            for part, field in LARGE
        ),
    ],
)
def test_a_configuration_that_is_too_much(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as refused:
        RunConfig.from_toml(text)
    assert len(str(refused.value)) < 5000


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("data.rows=3_000_000_000_000", "Most takes a window: 3,000,000,000,000 rows"),
        ("model.cross.layers=1_000_000_000", "Most takes model.cross"),
        ("model.cross.rank=1_000_000_000_000", "Most takes model.cross"),
        ("model.trunk={kind='mmoe', experts=1_000_000_000}", "Most takes model.trunk"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_anything_is_made(setting: str, expected: str) -> None:
    large = ["data.rows_per_day=1_000_000_000_000", "reader.window_rows=1_000_000_000_000_000"]
    with pytest.raises(ConfigError, match=f"needs at least .* of memory, and this machine has .*{expected}"):
        demo([*large, setting]).build()


FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "numpy.load", "np.load"}


def find_dangers(source: str) -> list[str]:
    """Return what in a source text could execute what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.partition(".")[0] in FORBIDDEN_IMPORTS]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""
            if name in FORBIDDEN_CALLS or any(each.arg == "shell" for each in node.keywords):
                found.append(f"{name}(...)")
            if name == "torch.load" and "weights_only=True" not in ast.unparse(node):
                found.append("torch.load without weights_only=True")
    return found


def test_nothing_in_the_package_executes_what_a_file_holds() -> None:
    # What an optimizer promises includes that it can be pickled; what is unpickled there was pickled one line before.
    exempt = {("testing/optimizers.py", "import pickle")}
    files = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    found = {(file, danger) for file, text in files.items() for danger in find_dangers(text)}
    assert found == exempt
    dangerous = "import pickle\neval(x)\nsubprocess.run(x, shell=True)\ntorch.load(f)\nfrom yaml import load"
    assert len(find_dangers(dangerous)) == 5
    assert find_dangers("model.eval()\nre.compile(x)\ntorch.load(f, weights_only=True)") == []


INTERRUPTED = """
import os, signal, sys
class Impatient:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Impatient())
sys.argv = ["steadyrank", "report", "nowhere"]
from steadyrank_main import main  # as the console script does
main()
"""


@pytest.mark.parametrize(
    "module", ["torch", "steadyrank.cli", pytest.param("steadyrank.report.page", marks=pytest.mark.slow)]
)
def test_ctrl_c_while_everything_loads_ends_in_one_word(module: str) -> None:
    code = INTERRUPTED.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


MUTATIONS: dict[str, Callable[[bytes, int], bytes]] = {
    "flip": lambda data, at: data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :],
    "cut": lambda data, at: data[:at],
    "twice": lambda data, at: data[:at] + data,
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_a_spoiled_run_folder_has_a_page_or_a_clear_error(small: RunFolder, seed: int) -> None:
    files = sorted(path for path in small.path.rglob("*") if path.suffix in (".json", ".jsonl", ".toml"))
    path = files[seed % len(files)]
    before = path.read_bytes()
    try:
        for i, mutate in enumerate(MUTATIONS.values()):
            path.write_bytes(mutate(before, (seed * 7919 + i * 104_729) % len(before)))
            with suppress_ours(small.path):
                write_report(RunFolder.open(small.path))
    finally:
        path.write_bytes(before)
