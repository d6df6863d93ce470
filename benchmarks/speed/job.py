"""The job that all contestants do: a log with a signal in it, the shapes of the model, and how time is taken.

    python benchmarks/speed/job.py FOLDER [--rows N] [--table-rows N] [--seed N]

26 id features and 13 numbers, two binary tasks; an MMoE of 4 experts of 256 and 128, a tower of 64 for each task,
batches of 1024, Adagrad. The log is drawn from a seed: popular ids as logs have them, effects of some ids and numbers
planted. The same files serve every contestant.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

IDS, NUMBERS, WIDTH = 26, 13, 16
ID_NAMES = [f"id_{i}" for i in range(IDS)]
NUMBER_NAMES = [f"number_{i}" for i in range(NUMBERS)]
TASKS = ("click", "like")
EXPERTS, EXPERT, TOWER = 4, (256, 128), 64
INPUT = IDS * WIDTH + NUMBERS
BATCH = 1024
RATE = 0.02
"""Adagrad's rate, on tables and layers; its accumulators start from 0, as torch has it, and not all peers let one say
otherwise."""
WARM_UP = 20
"""Steps before the clock starts."""
VALID_ROWS = 50_000
INFORMATIVE = 8  # id features that have an effect
BIAS = np.array([-1.4, -2.4])


class Rows(NamedTuple):
    """Rows of the log, in memory."""

    ids: np.ndarray
    """[N, 26], int64; each from 0 to the rows of its own table."""
    numbers: np.ndarray
    """[N, 13], float32, of mean 0 and deviation 1."""
    labels: np.ndarray
    """[N, 2], float32."""


@dataclass(frozen=True)
class Job:
    """Where the log lies, and how large the tables are."""

    folder: Path
    table_rows: int
    """Of all tables together."""

    @property
    def rows_each(self) -> int:
        """Rows of one table."""
        return self.table_rows // IDS

    def path(self, part: str) -> Path:
        """The file of a part, "train" or "valid"."""
        return self.folder / f"{part}.parquet"

    def load(self, part: str) -> Rows:
        """Read a part into memory."""
        table = pq.read_table(self.path(part))

        def stack(names: Iterable[str], kind: type) -> np.ndarray:
            return np.stack([table[name].to_numpy().astype(kind) for name in names], 1)

        return Rows(stack(ID_NAMES, np.int64), stack(NUMBER_NAMES, np.float32), stack(TASKS, np.float32))


@dataclass(frozen=True)
class Outcome:
    """What a contestant did."""

    rows: int
    """Learned while the clock ran."""
    seconds: float
    predict: Callable[[], np.ndarray] | None
    """Returns scores [N, 2] of the validation part; None where nothing was learned."""


class Clock:
    """Runs from the end of the warm-up to the end of training, by the batches that training asks for."""

    def __init__(self) -> None:
        self.start = self.end = 0.0

    def over(self, batches: Iterable[Any]) -> "Clocked":
        """Return the batches, whose reading starts and stops the clock."""
        return Clocked(batches, self)

    def stop(self) -> None:
        """Stop, unless it did."""
        self.end = self.end or time.perf_counter()

    def outcome(self, rows: int, predict: Callable[[], np.ndarray]) -> Outcome:
        """Return what was measured, of a part of so many rows."""
        return Outcome(rows - WARM_UP * BATCH, self.end - self.start, predict)


class Clocked:
    """Batches that start and stop a clock; as long as they are."""

    def __init__(self, batches: Iterable[Any], clock: Clock) -> None:
        self._batches, self._clock = batches, clock

    def __iter__(self) -> Iterator[Any]:
        number, batches = 0, iter(self._batches)
        while True:
            if number == WARM_UP:
                self._clock.start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                break
            yield batch
            number += 1
        self._clock.stop()

    def __len__(self) -> int:
        assert isinstance(self._batches, Sized)
        return len(self._batches)


def draw(rows: int, table_rows: int, seed: int) -> Rows:
    """Draw rows of the log.

    The share of an id in its feature falls as a power of its number: a hundredth of the ids has a fifth of the rows.
    The logit of each task is the sum of its bias, of an effect of each of eight ids, of a line in the numbers, and of a
    product of two of them; the tasks' effects go together in part.
    """
    rng = np.random.default_rng(seed)
    each = table_rows // IDS
    ids = (rng.random((rows, IDS)) ** 3 * each).astype(np.int64)
    numbers = rng.standard_normal((rows, NUMBERS), np.float32)
    logits = np.tile(BIAS, (rows, 1))
    for i in range(INFORMATIVE):
        logits += 0.5 * _two(rng, each)[ids[:, i]]
    logits += numbers @ (0.2 * _two(rng, NUMBERS)) + (0.3 * numbers[:, 0] * numbers[:, 1])[:, None]
    labels = (rng.random((rows, len(TASKS))) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    return Rows(ids, numbers, labels)


def _two(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw effects of deviation 1 for both tasks, correlated at 0.6."""
    click, own = rng.standard_normal((2, count))
    return np.stack([click, 0.6 * click + 0.8 * own], 1)


def write(folder: Path, rows: int, table_rows: int, seed: int = 0) -> None:
    """Draw the log and write both parts, in the order of time."""
    drawn = draw(rows + VALID_ROWS, table_rows, seed)
    columns = {"time": np.arange(len(drawn.ids)) // 10}
    columns |= {name: drawn.ids[:, i].astype(np.int32) for i, name in enumerate(ID_NAMES)}
    columns |= {name: drawn.numbers[:, i] for i, name in enumerate(NUMBER_NAMES)}
    columns |= {name: drawn.labels[:, i].astype(np.int8) for i, name in enumerate(TASKS)}
    table = pa.table(columns)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.slice(0, rows), folder / "train.parquet")
    pq.write_table(table.slice(rows), folder / "valid.parquet")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--rows", type=int, default=400_000)
    options.add_argument("--table-rows", type=int, default=1_000_000)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    write(arguments.folder, arguments.rows, arguments.table_rows, arguments.seed)


if __name__ == "__main__":
    main()
