"""Ranks that are threads of one process, for tests of what they tell one another in tensors."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from steadyrank.ranks import Ranks

T = TypeVar("T")


def run_in_threads(size: int, do: Callable[[Ranks], T]) -> list[T]:
    """Let so many ranks do something at once, which may gather tensors; return what each returned."""
    met, sent = Barrier(size, timeout=20), dict[int, Tensor]()

    def gather(ranks: Ranks, x: Tensor) -> Tensor:
        sent[ranks.rank] = x
        met.wait()
        found = torch.stack([sent[rank] for rank in range(size)])
        met.wait()
        return found

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(size) as pool:
        patch.setattr(Ranks, "gather", gather)
        return list(pool.map(do, [Ranks(rank, size, group="threads") for rank in range(size)]))
