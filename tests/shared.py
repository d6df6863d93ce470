"""The reference files that lie beside the checkout on developers' machines, and nowhere else."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared"


def shared(name: str) -> Path:
    """Return the path of a shared reference file, or skip the test, saying which file is absent."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"shared/{name} is not beside this checkout")
    return path
