"""Processes that train together, for tests: python -m tests.MODULE RANK SIZE PORT ..."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch has no gloo here"
)


def run_together(module: str, size: int, *arguments: object) -> list[str]:
    """Run so many processes to their end, which has to be a good one; return what each wrote to its error stream."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rest = [str(size), port, *map(str, arguments)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", f"tests.{module}", str(rank), *rest], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, "\n".join(said)[-6000:]
    return said
