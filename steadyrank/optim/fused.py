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
# Without the promises about errno and traps the compiler would not compute in parallel lanes. Not -ffast-math: it
# switches a whole process to flushing subnormal numbers, takes NaN for impossible, and its reciprocals were slower.
# The bits of floats are read as integers, hence no strict aliasing.
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"]


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
    """Say whether the C kernel can be used here; it is built by the first call, and a failure is remembered.

    Raises:
        ConfigError: it cannot, and `must` is set.
    """
    found = _library()
    if isinstance(found, ConfigError) and must:
        raise found
    return not isinstance(found, ConfigError)


def takes(each: Touched, row_states: Sequence[str]) -> bool:
    """Say whether the C kernel takes this parameter: float32, contiguous, on the CPU, and plain tensors only.

    It writes through pointers, hence the shapes: weights may have been given another one since their state was made.
    (A state that is loaded gets the dtypes of a fresh one.)
    """
    state, shape = each.state, each.weight.shape
    for x in (each.weight, each.grad, *[state[key] for key in row_states if key in state]):
        plain = type(x) is Tensor or type(x) is nn.Parameter
        if not (plain and x.dtype is torch.float32 and x.is_cpu and x.is_contiguous() and x.shape == shape):
            return False
    return not (each.grad.is_neg() or each.grad._is_zerotensor())  # whose memory does not hold its values yet


def step(touched: Sequence[Touched], row_states: Sequence[str], options: Options) -> None:
    """Step float32 tensors on the CPU in place, as `BoundedOptimizer` does; counts and factors go into their states."""
    rows = []
    written: list[Tensor] = []
    for each in touched:
        state = each.state
        moments = [state[key] for key in row_states if key in state]
        written += [each.weight, *moments]
        first, second = (*[moment.data_ptr() for moment in moments], 0)[:2]
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
    torch.autograd.graph.increment_version(written)  # so that autograd notices, as it does after torch's own


@functools.lru_cache(maxsize=8)
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled by torch, the same one for the same function."""
    return torch.compile(function)


@functools.cache
def _library() -> Any:
    """Build the C kernel and return its function, or the ConfigError that says why there is none."""
    if platform.system() == "Windows":
        return ConfigError("fused: the C kernel is not built on Windows; leave fused None")
    named = [os.environ.get("CC"), "gcc", "cc"]
    compilers = list(dict.fromkeys(found for name in named if name and (found := shutil.which(name))))
    failure = "there is no C compiler here (gcc, cc or $CC); install one"
    for compiler in compilers:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "fused.so"
            done = subprocess.run(_command(compiler, library), capture_output=True, text=True, check=False)
            if done.returncode:
                failure = f"{compiler} failed: {done.stderr.strip()[:500]}"
                continue
            try:
                function = ctypes.CDLL(str(library)).steadyrank_clippy_step
            except OSError as error:
                failure = f"the C kernel cannot be loaded: {error}"
                continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        function.restype = ctypes.c_int
        return function
    return ConfigError(f"fused: {failure}; or leave fused None")


def _command(compiler: str, library: Path) -> list[str]:
    """Return how fused.c is compiled.

    It is built anew for each process: half a second costs less than a cache that somebody else could write.
    """
    return [compiler, *_FLAGS, "-fopenmp", "-fPIC", "-shared", str(_SOURCE), "-o", str(library), *_openmp(), "-lm"]


def _openmp() -> list[str]:
    """Return what to link with: the OpenMP that torch brings and has loaded; two pools of threads would compete."""
    torchs = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return [str(torchs[0])] if torchs else []
