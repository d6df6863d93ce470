"""The compiled kernels: a C one for the CPU, built by the machine's own compiler on first use, and torch.compile's.

Why C beside `torch.compile`: on a CPU, inductor puts the step and the reduction into two loops, which takes twice the
time (docs/log.md has the figures), and its first call takes twenty seconds where this takes one. Without a compiler
everything works, more slowly.
"""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .guarded import BAD_STEPS, STEP, Touched

ADAGRAD_KINDS = {"standard": 0, "delayed": 1, "delayed_clipped": 2}
ADAM = 3
ADAM_CLIPPED = 4

_SOURCE = Path(__file__).with_name("fused.c")
# Without these promises about NaN, signs of zero and traps the compiler would not compute in parallel lanes. Not
# -ffast-math: it switches a whole process to flushing subnormal numbers, and its fast reciprocals were slower here.
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only", "-fno-signed-zeros"]
_FLAGS += ["-fno-strict-aliasing"]  # the bits of floats are read as integers


class Options(ctypes.Structure):
    """The options of a group, as fused.c has them."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        *(
            (name, ctypes.c_float)
            for name in (
                *("sign", "lr", "relative", "accumulator_relative", "absolute"),
                *("eps", "decay", "limit", "keep1", "new1", "keep2", "new2"),
            )
        ),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
    )


def available(must: bool = False) -> bool:
    """Say whether the C kernel can be used here; it is built by the first call.

    Raises:
        ConfigError: it cannot, and `must` is set.
    """
    try:
        _library()
    except ConfigError:
        if must:
            raise
        return False
    return True


def takes(each: Touched, row_states: Sequence[str]) -> bool:
    """Say whether the C kernel takes this parameter: float32, contiguous, on the CPU, and plain tensors only."""
    state = each.state
    for x in (each.weight, each.grad, *[state[key] for key in row_states if key in state]):
        plain = type(x) is Tensor or type(x) is nn.Parameter
        if not (plain and x.dtype is torch.float32 and x.is_cpu and x.is_contiguous()):
            return False
    return True


def step(touched: Sequence[Touched], row_states: Sequence[str], options: Options) -> None:
    """Step float32 tensors on the CPU in place, as `BoundedOptimizer` does; counts and factors go into their states."""
    rows = []
    for each in touched:
        state = each.state
        moments = [state[key].data_ptr() for key in row_states if key in state]
        first, second = (*moments, 0)[:2]
        telemetry = (state["bind_frac"].data_ptr(), state["binding"].data_ptr()) if "binding" in state else (0, 0)
        rows.append(
            (
                *(each.weight.data_ptr(), first, second, each.grad.data_ptr()),
                *(state["clip_factor"].data_ptr(), state[BAD_STEPS].data_ptr(), state[STEP].data_ptr()),
                *(*telemetry, each.weight.numel()),
            )
        )
    table = np.array(rows, dtype=np.int64)  # the struct Tensor of fused.c: nine pointers and a size
    code = _library()(ctypes.byref(options), table.ctypes.data, len(rows), torch.get_num_threads())
    if code:
        raise MemoryError("no memory for the bookkeeping of an optimizer step; nothing was changed")


@functools.lru_cache(maxsize=8)
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled by torch, the same one for the same function."""
    return torch.compile(function)


@functools.cache
def _library() -> Any:
    """Build the C kernel, or find it built, and return its function.

    Raises:
        ConfigError: there is no compiler, or it failed.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "gcc", "gcc", "cc"))), None)
    if compiler is None:
        raise ConfigError("fused: there is no C compiler here (gcc, cc or $CC); install one or leave fused None")
    if platform.system() == "Windows":
        raise ConfigError("fused: the C kernel is not built on Windows; leave fused None")
    try:
        with tempfile.TemporaryDirectory() as folder:
            function = ctypes.CDLL(str(_built(compiler, Path(folder)))).steadyrank_clippy_step
    except OSError as error:
        raise ConfigError(f"fused: the C kernel cannot be loaded: {error}; leave fused None") from error
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


def _built(compiler: str, folder: Path) -> Path:
    """Compile fused.c into `folder` and return the library.

    It is built anew for each process: a second costs less than a cache that another user of the machine could write.
    """
    library = folder / "fused.so"
    command = [compiler, *_FLAGS, "-fopenmp", "-fPIC", "-shared", str(_SOURCE), "-o", str(library), *_openmp(), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"fused: {compiler} failed: {done.stderr.strip()[:500]}; leave fused None")
    return library


def _openmp() -> list[str]:
    """Return what to link with: the OpenMP that torch brings and has loaded; two pools of threads would compete."""
    torchs = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return [str(torchs[0])] if torchs else []
