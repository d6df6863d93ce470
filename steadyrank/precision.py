"""In which precision a model's layers compute; weights, optimizers, losses, logits and metrics stay in float32."""

import platform
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError

PrecisionName = Literal["auto", "float32", "tf32", "bfloat16"]
PAYS_FROM = 100_000_000
"""Weights times rows of a batch from which another engine than torch's first choice pays on a CPU. Below it, calls and
casts cost what the products save: at 182,000 weights a step in bfloat16 took 0.99 of float32's time in batches of 256,
and 0.76 in batches of 1,024."""
_FLOAT32_ERROR = 1e-5  # of a product: 4e-7 in float32, 4e-3 in bfloat16


class Precision(NamedTuple):
    """How a run computes."""

    name: str
    dtype: torch.dtype
    """In which the layers compute."""
    reason: str
    """For people."""
    products: Literal["highest", "high", "medium"] = "highest"
    """Of float32, for `torch.set_float32_matmul_precision`."""

    def apply(self) -> None:
        """Set how this process multiplies float32; `dtype` is the model's to follow."""
        torch.set_float32_matmul_precision(self.products)

    def __str__(self) -> str:
        return f"layers compute in {self.name}: {self.reason}"


def choose_precision(setting: PrecisionName, device: torch.device, weights: int, batch_rows: int) -> Precision:
    """Decide how a run computes; the same machine and configuration always give the same answer.

    Args:
        setting: `auto` takes bfloat16 where the processor multiplies in it by itself and where it pays, else float32.
        device: Where the model lives.
        weights: Dense weights of the model.
        batch_rows: Rows of a batch.

    Raises:
        ConfigError: TF32 was asked for without a GPU that has it.

    >>> print(choose_precision("bfloat16", torch.device("cpu"), weights=1_000, batch_rows=64))
    layers compute in bfloat16: train.precision says so
    """
    pays = device.type != "cpu" or weights * batch_rows >= PAYS_FROM
    if setting == "tf32":
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            raise ConfigError(
                "train.precision = 'tf32': expected a GPU that has it (Ampere or newer), and this run is on "
                f"'{device}'; 'auto' takes what there is"
            )
        return Precision("tf32", torch.float32, "train.precision says so", "high")
    if setting == "bfloat16":
        return Precision("bfloat16", torch.bfloat16, "train.precision says so")
    reason = "train.precision says so"
    if setting == "auto":
        if has_bfloat16(device) and pays:
            here = "processor" if device.type == "cpu" else "GPU"
            off = "weights and metrics stay in float32; train.precision = 'float32' turns it off"
            return Precision("bfloat16", torch.bfloat16, f"this {here} has it; {off}")
        reason = "the model is too small to gain from less" if has_bfloat16(device) else "there is no bfloat16 here"
    onednn = pays and device.type == "cpu" and prefers_onednn()
    return Precision("float32", torch.float32, reason, "medium" if onednn else "highest")


@cache
def has_bfloat16(device: torch.device) -> bool:
    """Say whether a device multiplies in bfloat16 by itself; where it only emulates that, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every torch
    return device.type == "cpu" and any(bool(getattr(torch.cpu, name, bool)()) for name in asked)


@cache
def prefers_onednn() -> bool:
    """Say whether oneDNN multiplies float32 faster than MKL, torch's first choice, and as exactly.

    MKL is slow on processors that are not Intel's. "medium" sends products to oneDNN, which may then compute in
    bfloat16 where it sees fit: a product is tried, and nothing assumed.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()) or _is_intel():
        return False
    before = torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(512, 256, generator=generator), torch.randn(256, 256, generator=generator)
    try:
        torch.set_float32_matmul_precision("medium")
        error = (a @ b - a.double() @ b.double()).abs().max() / 256**0.5
    finally:
        torch.set_float32_matmul_precision(before)
    return bool(error < _FLOAT32_ERROR)


def _is_intel() -> bool:
    try:
        said = Path("/proc/cpuinfo").read_text()
    except OSError:
        said = platform.processor()
    return "GenuineIntel" in said


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
