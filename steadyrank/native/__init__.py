"""C for the CPU, where PyTorch has no fast way: built by the machine's own compiler on first use.

Everything that calls it also works without a compiler, more slowly.
"""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError

_SOURCES = [Path(__file__).with_name(name) for name in ("clippy.c", "rows.c")]
# Without the promises about errno and traps the compiler would not compute in parallel lanes. Not -ffast-math: it
# switches a whole process to flushing subnormal numbers, takes NaN for impossible, and its reciprocals were slower.
# The bits of floats are read as integers, hence no strict aliasing.
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"]
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "steadyrank_clippy_step": (_INT, [_POINTER, _POINTER, _LONG, _INT]),
    "steadyrank_look_up": (_INT, [_POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _INT, _INT]),
    "steadyrank_put_back": (None, [_POINTER, _LONG, _POINTER, _LONG, _POINTER, _INT]),
    "steadyrank_sum_rows": (_LONG, [_POINTER, _LONG, _LONG, _POINTER, _INT, _LONG, _POINTER, _POINTER, _INT]),
    "steadyrank_rowwise_adagrad": (
        _INT,
        [_POINTER, _POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _FLOAT, _FLOAT, _FLOAT, _INT],
    ),
}
_building = threading.Lock()


def available(must: bool = False) -> bool:
    """Say whether the C code can be used here; it is built by the first call, and a failure is remembered.

    Raises:
        ConfigError: It cannot, and `must` is set.
    """
    found = _found()
    if isinstance(found, ConfigError) and must:
        raise found
    return not isinstance(found, ConfigError)


def function(name: str) -> Callable[..., Any]:
    """Return one function of the C code, where it is `available`."""
    found: Callable[..., Any] = getattr(_found(), name)
    return found


def prepare() -> None:
    """Build the C code beside other work, if it is not there yet: the compiler is a process of its own."""
    if not _library.cache_info().currsize:
        threading.Thread(target=_found, name="steadyrank-native").start()


def is_plain(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Say whether C can read a tensor through its pointer: on the CPU, contiguous, no subclass, its values there."""
    plain = type(x) is Tensor or type(x) is nn.Parameter
    if not (plain and x.dtype in dtypes and x.is_cpu and x.layout is torch.strided and x.is_contiguous()):
        return False
    return not (x.is_neg() or x._is_zerotensor() or torch._C._functorch.is_functorch_wrapped_tensor(x))


def _found() -> Any:
    with _building:  # so that a second thread waits for the first one's, instead of building it again
        return _library()


@functools.cache
def _library() -> Any:
    """Build and load the C code, or return the ConfigError that says why there is none."""
    if platform.system() == "Windows":
        return ConfigError("fused: the C kernel is not built on Windows; leave fused None")
    named = [os.environ.get("CC"), "gcc", "cc"]
    compilers = list(dict.fromkeys(found for name in named if name and (found := shutil.which(name))))
    failure = "there is no C compiler here (gcc, cc or $CC); install one"
    for compiler in compilers:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "steadyrank.so"
            done = subprocess.run(_command(compiler, library), capture_output=True, text=True, check=False)
            if done.returncode:
                failure = f"{compiler} failed: {done.stderr.strip()[:500]}"
                continue
            try:
                loaded = ctypes.CDLL(str(library))
            except OSError as error:
                failure = f"the C kernel cannot be loaded: {error}"
                continue
        for name, (result, arguments) in _FUNCTIONS.items():
            found = getattr(loaded, name)
            found.restype, found.argtypes = result, arguments
        return loaded
    return ConfigError(f"fused: {failure}; or leave fused None")


def _command(compiler: str, library: Path) -> list[str]:
    """Return how the C code is compiled.

    It is built anew for each process: half a second costs less than a cache that somebody else could write.
    """
    sources = [str(source) for source in _SOURCES]
    return [compiler, *_FLAGS, "-fopenmp", "-fPIC", "-shared", *sources, "-o", str(library), *_openmp(), "-lm"]


def _openmp() -> list[str]:
    """Return what to link with: the OpenMP that torch brings and has loaded; two pools of threads would compete."""
    torchs = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return [str(torchs[0])] if torchs else []
