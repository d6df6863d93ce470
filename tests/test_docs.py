"""Documents are programs: examples run, pages match the code, every public name is described."""

import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import steadyrank

ROOT = Path(__file__).resolve().parents[1]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_has_an_entry() -> None:
    source = (ROOT / "steadyrank" / "public.py").read_text()
    names = set(re.findall(r"^from \.\S+ import \w+ as (\w+)$", source, re.M))
    assert names
    assert all(hasattr(steadyrank, name) for name in names)
    described = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "api.md").read_text()))
    assert names <= described, f"docs/api.md lacks {sorted(names - described)}"


def test_the_configuration_page_matches_the_code() -> None:
    page = load(ROOT / "docs" / "configuration.py").write_page()
    assert (ROOT / "docs" / "configuration.md").read_text() == page, "run: python docs/configuration.py"


def test_the_example_of_an_own_loop_runs_and_shows_what_it_says() -> None:
    example = load(ROOT / "examples" / "own_loop.py")
    plain, no_factor = example.train(torch.optim.Adagrad)
    clippy, factor = example.train(steadyrank.ClippyAdagrad)
    assert no_factor == 1.0
    assert 0 < factor < 1
    assert clippy < 1 < plain  # 1 is the loss of a constant


def test_the_snippet_of_the_readme_runs() -> None:
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert snippet is not None
    model = torch.nn.Linear(2, 1)
    names: dict[str, object] = {"model": model}
    exec(snippet[1], names)
    assert isinstance(names["optimizer"], steadyrank.ClippyAdagrad)


def test_the_examples_of_the_optimizers_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "optimizers.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(snippets) >= 8
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for snippet in snippets:  # each goes on from those above it
        exec(snippet, names)
    assert "inert: no update can exceed the bound at this rate" in capsys.readouterr().out


def test_the_example_of_the_instruments_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "instruments.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.S)
    assert snippets
    torch.manual_seed(0)
    for snippet in snippets:
        exec(snippet, {})
    assert "60 steps, no warning" in capsys.readouterr().out


def test_the_examples_of_the_survival_page_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "survival.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(snippets) == 2
    torch.manual_seed(0)
    for snippet in snippets:
        exec(snippet, {"torch": torch, "where": tmp_path})
    shape, rolled_back, loss = capsys.readouterr().out.splitlines()
    assert shape == "100 torch.Size([2, 3])"
    assert rolled_back.startswith("step 60: click: a loss of")
    assert float(loss) < 0.01
    tables = re.findall(r"```toml\n(.*?)```", page, re.S)
    assert tables
    for table in tables:
        steadyrank.RecoveryConfig.model_validate(tomllib.loads(table)["recovery"])


def test_the_instruments_page_names_every_period() -> None:
    page = (ROOT / "docs" / "instruments.md").read_text()
    for name, field in steadyrank.WatchConfig.model_fields.items():
        if name.endswith("_every") and name not in ("snapshot_every", "rank_every"):
            assert f"`watch.{name}` = {field.default}" in page


def test_the_optimizers_page_names_every_option_and_rule() -> None:
    page = (ROOT / "docs" / "optimizers.md").read_text()
    options = set(inspect.signature(steadyrank.ClippyAdagrad).parameters) - {"params", "maximize"}
    options |= {rule.__name__ for rule in steadyrank.optim.configs.RULES.values()}
    missing = {name for name in options if name not in page}
    assert not missing, f"docs/optimizers.md lacks {sorted(missing)}"


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "recipes/README.md",
        *(f"docs/{p}" for p in ("data.md", "instruments.md", "log.md", "optimizers.md", "scale.md", "survival.md")),
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), f"{page}: {link}"


def test_the_commands_of_the_pages_exist() -> None:
    from steadyrank.cli import app

    known = {command.callback.__name__ for command in app.registered_commands}
    pages = (
        "README.md",
        "docs/data.md",
        "docs/instruments.md",
        "docs/scale.md",
        "docs/survival.md",
        "recipes/README.md",
    )
    text = "".join((ROOT / page).read_text() for page in pages)
    used = set(re.findall(r"^steadyrank (\w+)", text, re.M)) | set(re.findall(r"`steadyrank (\w+)", text))
    assert used <= known
    make = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, re.M):
        assert re.search(rf"^{target}:", make, re.M)


def test_the_packages_metadata_is_easy_to_install() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch_line = next(line for line in project["dependencies"] if line.startswith("torch"))
    assert torch_line == "torch>=2.6"
    assert project["license"] == "Apache-2.0"
    done = subprocess.run([sys.executable, "-m", "steadyrank", "--version"], capture_output=True, text=True, check=True)
    assert steadyrank.__version__ in done.stdout
