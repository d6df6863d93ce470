"""Reading ahead: the same batches, states and errors as without, in the same places; and a thread that ends."""

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steadyrank.data import reader as reading
from steadyrank.data.ahead import make_ahead
from steadyrank.data.logs import Cursor, Reader
from steadyrank.errors import DataError

from .test_logs import bits, change, make_table, read, write


def makers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


@pytest.fixture(autouse=True, scope="module")
def small_heap() -> Iterator[None]:
    """Keep what was there before these tests out of each collection, which would take longer than the test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_thread_is_left(small_heap: None) -> Iterator[None]:
    yield
    gc.collect()
    assert makers() == []


class Items:
    """Numbers from 0, and how many of them were made; perhaps an error in the place of one."""

    def __init__(self, count: int, bad: int | None = None) -> None:
        self.count, self.bad, self.made = count, bad, 0

    def __iter__(self) -> Iterator[int]:
        for i in range(self.count):
            if i == self.bad:
                raise DataError("no such row")
            self.made += 1
            yield i

    def wait_for(self, made: int) -> None:
        until = time.monotonic() + 5
        while self.made < made and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.02)  # for one too many
        assert self.made == made


@pytest.mark.parametrize("ahead", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("count", [0, 1, 5, 50])
def test_everything_comes_once_and_in_order(count: int, ahead: int) -> None:
    assert list(make_ahead(iter(range(count)), ahead)) == list(range(count))


def test_so_many_are_made_ahead_and_no_more() -> None:
    items = Items(100)
    ahead = make_ahead(iter(items), 8)
    assert [next(ahead) for _ in range(20)] == list(range(20))
    items.wait_for(28)
    assert list(ahead) == list(range(20, 100))


@pytest.mark.parametrize("ahead", [1, 5, 50])
def test_an_error_comes_where_its_item_would_have_come(ahead: int) -> None:
    items = make_ahead(iter(Items(20, bad=13)), ahead)
    assert [next(items) for _ in range(13)] == list(range(13))
    with pytest.raises(DataError, match="no such row"):
        next(items)
    assert makers() == []


def test_the_thread_ends_when_the_iterator_is_closed_or_dropped() -> None:
    for end in ("close", "drop", "interrupt"):
        ahead = make_ahead(iter(Items(1000)), 4)
        assert (next(ahead), len(makers())) == (0, 1)
        if end == "close":
            ahead.close()  # type: ignore[attr-defined]
        elif end == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                ahead.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
        del ahead
        assert makers() == [], end


def test_an_iterator_that_its_own_thread_collects_does_not_wait_for_itself() -> None:
    """It lies in a cycle that only the collector finds, and this runs in whatever thread allocates."""
    cycle: list[Any] = []

    def items() -> Iterator[int]:
        yield 0
        yield 1
        gc.collect()
        yield 2

    gc.disable()
    try:
        release = threading.Event()

        def held() -> Iterator[int]:
            for item in items():
                if item == 1:
                    release.wait(5)
                yield item

        ahead = make_ahead(held(), 2)
        cycle += [ahead, cycle]
        assert next(ahead) == 0
        (thread,) = makers()
        cycle = ahead = None  # type: ignore[assignment]
        release.set()
        thread.join(5)
        assert not thread.is_alive()
    finally:
        gc.enable()


def test_torch_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    torch.set_num_threads(2)
    try:
        assert list(make_ahead((torch.get_num_threads() for _ in range(2)), 1)) == [1, 1]
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert (torch.get_num_threads(), seen) == (2, [2])
    finally:
        torch.set_num_threads(before)


def test_a_process_ends_though_it_reads_ahead() -> None:
    code = (
        "import itertools; from steadyrank.data.ahead import make_ahead; "
        "ahead = make_ahead(itertools.count(), 3); print(next(ahead))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def told(reader: Reader, cursor: Cursor | None = None) -> list[Any]:
    """Return each batch with all that the reader knows when it was given, and the error at the end."""
    found: list[Any] = []
    try:
        for batch, at in reader.batches(cursor):
            found.append((bits(batch), at, reader.left, reader.file_ends, reader.state_dict()))
    except DataError as error:
        found.append((str(error), reader.state_dict()))
    return found


@pytest.mark.parametrize(
    "config",
    [
        {"window_rows": 12},
        {"window_rows": 30, "window_per_file": True},
        {"window_hours": 0.15},
        {"window_rows": 500},
        {"window_rows": 9, "shuffle": False},
    ],
)
@pytest.mark.parametrize("spoilt", [False, True])
def test_a_reader_that_reads_ahead_tells_the_same(tmp_path: Path, config: dict[str, Any], spoilt: bool) -> None:
    for day in range(3):
        table = change(make_table(40, start=40 * day), "x", [None, float("nan")] * 20)
        if spoilt and day == 2:
            table = change(table, "click", [0] * 21 + [2] + [1] * 18)
        write(tmp_path / f"{day}.parquet", table, group=7)

    def reader(ahead: int) -> Reader:
        return read(tmp_path, batch_size=5, seed=5, max_missing_frac=1.0, read_ahead=ahead, **config)

    plain = told(reader(0))
    assert isinstance(plain[-1][0], str) == spoilt
    for ahead in (5, 20, 65_536):
        assert told(reader(ahead)) == plain
    if not spoilt:
        middle = plain[len(plain) // 2][1]
        assert told(reader(65_536), middle) == told(reader(0), middle)


def test_an_abandoned_reading_leaves_the_next_one_alone(tmp_path: Path) -> None:
    """As where a run goes back to an earlier state: the old iterator is dropped after the new one's cursor is known."""
    reader = read(write(tmp_path / "log.parquet", make_table(200), group=30), window_rows=40, batch_size=8)
    plain = list(read(tmp_path, window_rows=40, batch_size=8, read_ahead=0).batches())
    old = reader.batches()
    _, cursor = [next(old) for _ in range(4)][-1]
    next(old)
    new = reader.batches(cursor)
    first = next(new)
    del old
    again = [first, *new]
    assert [(bits(batch), at) for batch, at in again] == [(bits(batch), at) for batch, at in plain[4:]]


def test_scoring_reads_the_same_ahead(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", make_table(50), group=9)
    with_thread, without = ([bits(batch) for batch in read(path, read_ahead=ahead).in_order()] for ahead in (65_536, 0))
    assert with_thread == without
    assert len(without) == 6


def test_batches_for_a_gpu_are_pinned_where_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU nothing can be pinned: here only that every part is, and in the thread that reads."""
    pinned: list[str] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(threading.current_thread().name)
        return tensor

    monkeypatch.setattr(reading, "_pin", pin)
    plain = read(write(tmp_path / "log.parquet", make_table(20)), batch_size=10)
    reader = Reader(plain.source, plain.schema, plain.config, pin_memory=True)
    batches = [batch for batch, _ in reader.batches()]
    assert [bits(batch) for batch in batches] == [bits(batch) for batch, _ in plain.batches()]
    assert len(pinned) == 2 * 10  # eight tensors and a list's two
    assert all(name.startswith("read_ahead") for name in pinned)
