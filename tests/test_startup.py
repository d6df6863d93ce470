"""What a command loads: no torch for a help page, no compiler and no drawing for a step."""

import subprocess
import sys
from pathlib import Path

import pytest

import steadyrank
from steadyrank.data.catalog import DATASETS


def loaded_by(code: str, *names: str) -> list[str]:
    """Run code in a fresh interpreter; return which of the modules it has then loaded."""
    asked = f"import sys\n{code}\nprint('loaded', *[name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", asked], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["train", "--help"], ["trian"]])
def test_a_help_page_needs_neither_torch_nor_arrow(arguments: list[str]) -> None:
    code = (
        f"import contextlib, steadyrank_main; sys.argv = ['steadyrank', *{arguments}]\n"
        "with contextlib.suppress(SystemExit): steadyrank_main.main()"
    )
    assert loaded_by(code, "torch", "pyarrow", "numpy", "plotly") == []


def test_the_help_names_every_data_set() -> None:
    command = [sys.executable, "-m", "steadyrank", "prepare", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert all(name in done.stdout for name in DATASETS)


def test_a_public_name_is_there_when_it_is_asked_for() -> None:
    """Also one that is in a module of its own name, which Python would put in its place."""
    code = (
        "import steadyrank; assert 'torch' not in sys.modules\n"
        "import steadyrank.evaluate, steadyrank.guard, steadyrank.data.logs\n"
        "from steadyrank import Schema, evaluate, guard, data\n"
        "assert [each.__module__ for each in (Schema, steadyrank.evaluate, evaluate, guard)] == [\n"
        "    'steadyrank.schema', 'steadyrank.evaluate', 'steadyrank.evaluate', 'steadyrank.guard']\n"
        "assert data is sys.modules['steadyrank.data'] and steadyrank.optim is sys.modules['steadyrank.optim']"
    )
    assert loaded_by(code, "torch") == ["torch"]
    assert {"evaluate", "guard", "Schema", "__version__"} <= {*dir(steadyrank)}
    assert not hasattr(steadyrank, "no_such_name")
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        exec("from steadyrank import no_such_name")


@pytest.mark.slow
def test_a_step_loads_neither_torch_compiler_nor_what_draws(tmp_path: Path) -> None:
    code = f"""
import os, steadyrank.cli
from steadyrank import session

def note(self, batch, outcome):
    names = ("torch._dynamo", "sympy", "plotly", "jinja2", "scipy", "pandas", "matplotlib")
    print("loaded", *[name for name in names if name in sys.modules], flush=True)
    os._exit(0)

session.Session._note = note
sys.argv = ["steadyrank", "demo", "--out", {str(tmp_path / "run")!r}, "--set", "data.rows=2000"]
steadyrank.cli.main()
"""
    assert loaded_by(code) == []
