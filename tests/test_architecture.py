"""The house's shape: imports run down, importing does nothing, files and functions stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "steadyrank"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the top down: a module may import what stands in a lower row, and its own folder.
LAYERS = [
    ["__main__"],
    ["public", "cli"],
    ["console", "start", "replay", "lightning", "ladder", "launch"],
    ["config"],
    ["sequential", "predict"],
    ["session"],
    ["parts", "rescue"],
    ["instruments", "trackers", "train", "scoreboard"],
    ["distributed"],
    ["data", "models", "losses", "guard", "evaluate", "baselines", "report"],
    ["monitors", "recovery", "snapshots"],
    ["optim", "schema", "metrics", "runs"],
    ["checkpoints", "journal"],
    ["shards"],
    ["files", "stopping", "native", "precision", "terminal"],
    ["ranks"],
    ["errors", "settings"],
]
RANK = {room: depth for depth, row in enumerate(LAYERS) for room in row}
FREE = {"testing"}  # imports what it tests; nothing imports it


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Return the rooms of this package that a file imports, wherever in the file."""
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("steadyrank.")}
        if isinstance(node, ast.ImportFrom):
            if node.level == 0 and (node.module or "").startswith("steadyrank"):
                found.add((node.module or "").split(".")[1])
            elif node.level == depth:  # relative to the package itself
                names = [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
                found |= {name for name in names if name != "__version__"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_down(path: Path) -> None:
    room = room_of(path)
    if room in {"__init__", *FREE}:
        return
    assert room in RANK, f"give '{room}' a place in LAYERS"
    for other in imported_rooms(path) - {room}:
        assert other not in FREE, f"{room} imports {other}"
        assert RANK[other] > RANK[room], f"{room} imports {other}, which does not lie below it"


def test_importing_the_package_is_light_and_silent() -> None:
    code = (
        "import logging, sys, warnings; import steadyrank; "
        "heavy = {'matplotlib', 'pyarrow', 'plotly', 'tensorboard', 'typer', 'rich', 'pandas', 'sklearn'}; "
        "heavy |= {'torch', 'keras', 'optax', 'jax'}; "
        "print(sorted(heavy & set(sys.modules)), len(logging.getLogger().handlers))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] 0"
    assert done.stderr == ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_postponed_annotations(path: Path) -> None:
    assert "from __future__ import annotations" not in path.read_text(), "shapes are checked at run time in tests"
