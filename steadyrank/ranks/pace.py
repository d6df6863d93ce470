"""How fast each rank works, apart from its waiting for the others: all ranks of a run are as slow as the slowest."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .group import ALONE, Ranks

SLOW = 1.5
"""Times as long as the median rank from which on a rank is slow."""
_OFTEN, _LEAST = 0.8, 5
"""Share of the readings, and how many at least, in which one rank is slow before it is named."""


class Pace:
    """The time that this rank takes for its own part of a step, and how it compares.

    Args:
        ranks: Who trains together.
        device: Where the model is. On a GPU the time between two marks in its queue counts; no step waits for it.
    """

    def __init__(self, ranks: Ranks = ALONE, device: torch.device | str = "cpu") -> None:
        self._ranks, self._on_gpu = ranks, torch.device(device).type == "cuda"
        self._seconds, self._steps = 0.0, 0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._slow: Counter[int] = Counter()
        self._factors: Counter[int] = Counter()
        self._readings = 0

    @contextmanager
    def working(self, *, ends_step: bool = False) -> Iterator[None]:
        """Count the time until the end of the block, less the waiting for others in it (`Ranks.waits`)."""
        self._steps += ends_step
        if self._on_gpu:
            mark = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            mark[0].record()
            yield
            mark[1].record()
            self._marks.append(mark)
            return
        begun, waited = time.perf_counter(), self._ranks.waits.seconds
        yield
        self._seconds += time.perf_counter() - begun - (self._ranks.waits.seconds - waited)

    def read(self) -> dict[str, float]:
        """Return the seconds a step of the slowest and the median rank, and which is slowest. A collective.

        Of an even number of ranks the median is the lower one of the two in the middle.
        """
        if self._ranks.is_alone or not self._steps:
            return {}
        for first, last in self._marks:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1e3
        mine = torch.tensor(self._seconds / self._steps, dtype=torch.float64)
        self._seconds, self._steps = 0.0, 0
        self._marks.clear()
        return self.compare(self._ranks.gather(mine).tolist())

    def compare(self, seconds: list[float]) -> dict[str, float]:
        """Take in one reading of all ranks, and return it as `read` does.

        >>> Pace().compare([0.25, 0.5])
        {'speed/rank_s_max': 0.5, 'speed/rank_s_median': 0.25, 'speed/slowest_rank': 1.0}
        """
        most, median = max(seconds), sorted(seconds)[(len(seconds) - 1) // 2]
        slowest = seconds.index(most)
        self._readings += 1
        if most > SLOW * median:
            self._slow[slowest] += 1
            self._factors[slowest] += most / median if median else 0.0  # type: ignore[assignment]  # a sum
        return {"speed/rank_s_max": most, "speed/rank_s_median": median, "speed/slowest_rank": float(slowest)}

    def summary(self) -> dict[str, str]:
        """Return a sentence on a rank that is slow again and again; nothing where none is.

        >>> pace = Pace()
        >>> for _ in range(10):
        ...     _ = pace.compare([1.0, 1.0, 2.5])
        >>> pace.summary()["slow_rank"]
        'rank 2 took 2.5 times as long as the median rank in 100 % of the readings: all ranks wait for it'
        """
        for rank, times in self._slow.most_common(1):
            if times >= max(_LEAST, _OFTEN * self._readings):
                often, factor = 100 * times // self._readings, self._factors[rank] / times
                return {
                    "slow_rank": f"rank {rank} took {factor:.1f} times as long as the median rank in {often} % of the "
                    "readings: all ranks wait for it"
                }
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted, as plain values."""
        slow = [[rank, times, self._factors[rank]] for rank, times in sorted(self._slow.items())]
        return {"slow": slow, "readings": self._readings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._readings = state["readings"]
        self._slow = Counter({rank: times for rank, times, _ in state["slow"]})
        self._factors = Counter({rank: factor for rank, _, factor in state["slow"]})
