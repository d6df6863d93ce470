"""In which precision a model's layers compute; weights, optimizers, losses, logits and metrics stay in float32."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError

PrecisionName = Literal["auto", "float32", "tf32", "bfloat16"]
PAYS_FROM = 100_000_000
"""Weights times rows of a batch from which bfloat16 pays on a CPU. Below it, the casts cost what the products save: at
182,000 weights a step took 0.99 of float32's time in batches of 256, and 0.76 in batches of 1,024."""


class Precision(NamedTuple):
    """How a run computes."""

    dtype: torch.dtype
    """In which the layers compute."""
    name: str
    reason: str
    """For people: why."""


def choose_precision(setting: PrecisionName, device: torch.device, weights: int, batch_rows: int) -> Precision:
    """Decide how a run computes; the same machine and configuration always give the same answer.

    Args:
        setting: What was asked for; `auto` takes bfloat16 where the processor multiplies in it by itself and where it
            pays, else float32.
        device: Where the model lives.
        weights: Dense weights of the model.
        batch_rows: Rows of a batch.

    Raises:
        ConfigError: TF32 was asked for without a GPU that has it.

    >>> choose_precision("float32", torch.device("cpu"), 1_000, 1_000).name
    'float32'
    """
    if setting == "tf32" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise ConfigError(
            "train.precision = 'tf32' needs a GPU that has it (Ampere or newer); 'auto' takes what there is"
        )
    if setting == "auto":
        native = has_bfloat16(device)
        if native and (device.type != "cpu" or weights * batch_rows >= PAYS_FROM):
            where = "this processor multiplies in bfloat16" if device.type == "cpu" else "this GPU has bfloat16"
            return Precision(torch.bfloat16, "bfloat16", f"{where}; train.precision = 'float32' turns it off")
        why = "the model is small" if native else "there is no bfloat16 here"
        return Precision(torch.float32, "float32", why)
    dtype = torch.bfloat16 if setting == "bfloat16" else torch.float32
    return Precision(dtype, setting, "train.precision says so")


@cache
def has_bfloat16(device: torch.device) -> bool:
    """Say whether a device multiplies in bfloat16 by itself; where it only emulates that, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return any(
            bool(getattr(torch.cpu, name, bool)()) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    return False


def computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which layers compute in `dtype`; float32 leaves an autocast of the caller's as it is."""
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which layers compute with `x` where this is called: autocast's where it is on, else its own.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     compute_dtype(torch.zeros(1))
    torch.bfloat16
    """
    kind = x.device.type
    if x.dtype is torch.float32 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
