"""The compiled kernels: a C one for the CPU, built by the machine's own compiler on first use, and torch.compile's.

Why C beside `torch.compile`: on a CPU, inductor puts the step and the reduction into two loops, which takes twice the
time (docs/log.md has the figures), and its first call takes twenty seconds where this takes one. Without a compiler
everything works, more slowly.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import native
from .guarded import BAD_STEPS, STEP, Touched

ADAGRAD_KINDS = {"standard": 0, "delayed": 1, "delayed_clipped": 2}
ADAM = 3
ADAM_CLIPPED = 4


class Options(ctypes.Structure):
    """The options of a group, as clippy.c has them."""

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


def takes(each: Touched, row_states: Sequence[str]) -> bool:
    """Say whether the C kernel takes this parameter: float32, contiguous, on the CPU, and plain tensors only.

    It writes through pointers, hence the shapes: weights may have been given another one since their state was made.
    (A state that is loaded gets the dtypes of a fresh one.)
    """
    state, shape = each.state, each.weight.shape
    for x in (each.weight, each.grad, *[state[key] for key in row_states if key in state]):
        if x.shape != shape or not native.is_plain(x, torch.float32):
            return False
    return True


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
    table = np.array(rows, dtype=np.int64)  # the struct Tensor of clippy.c: nine pointers and a size
    code = native.function("steadyrank_clippy_step")(
        ctypes.byref(options), table.ctypes.data, len(rows), torch.get_num_threads()
    )
    if code:
        raise MemoryError("no memory for the bookkeeping of an optimizer step; nothing was changed")
    torch.autograd.graph.increment_version(written)  # so that autograd notices, as it does after torch's own


@functools.lru_cache(maxsize=8)
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled by torch, the same one for the same function."""
    return torch.compile(function)
