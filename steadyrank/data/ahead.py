"""What is made ahead of its use, in a thread of its own."""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Worker:
    """A thread that does one job after another beside the training steps, and gives way to them.

    It is made by the thread of the steps, of whose number of torch's threads it must know.

    Args:
        name: The thread's.

    >>> worker = Worker()
    >>> worker.begin(lambda: "done")(), worker.close()
    ('done', None)
    """

    def __init__(self, name: str = "read_ahead") -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._thread = _start(self._pool)
        self._last: Future[Any] | None = None

    def begin(self, job: Callable[[], T]) -> Callable[[], T]:
        """Begin a job once those before it are done, and return what waits for its result."""
        self._last = self._pool.submit(job)
        return self._last.result

    def submit(self, job: Callable[..., T], *given: Any) -> "Future[T]":
        """Begin a job, and return its result to come."""
        return self._pool.submit(job, *given)

    def settle(self) -> None:
        """Wait until the job that was begun last is done, and drop what it made, be it an error."""
        if self._last is not None:
            wait([self._last])
            self._last = None

    def close(self) -> None:
        """End the thread after the job that it is at; those that wait are dropped."""
        self._last = None
        # Dropped in a cycle, this may be collected by any thread, this one too, which cannot wait for itself.
        self._pool.shutdown(wait=threading.get_ident() != self._thread, cancel_futures=True)


def make_ahead(items: Iterator[T], count: int, worker: Worker | None = None) -> Iterator[T]:
    """Yield `items`, up to `count` of them being made by another thread while the caller works; 0 is no thread.

    An error comes where its item would have come. The thread ends when there is no item left, or when this iterator is
    closed or dropped, after the item that it is at.

    Args:
        items: What is made.
        count: How many.
        worker: The thread, which this ends; without one it is started with the first item.

    >>> list(make_ahead(iter("abc"), 2))
    ['a', 'b', 'c']
    """
    return _make_ahead(items, count, worker) if count else items


def _make_ahead(items: Iterator[T], count: int, worker: Worker | None) -> Iterator[T]:
    end = object()
    worker = worker or Worker()
    waiting: deque[Future[T | object]] = deque([worker.submit(next, items, end)])
    try:
        while (item := waiting.popleft().result()) is not end:
            for _ in range(min(2, count - len(waiting))):  # a few items are not asked for a thousand
                waiting.append(worker.submit(next, items, end))
            yield item  # type: ignore[misc]  # it is not the end
            del item  # one item less in memory while the next is waited for
    finally:
        worker.close()


def _start(pool: ThreadPoolExecutor) -> int:
    """Start the thread and return its number.

    It works alone: torch would else split its operations among as many threads as the training step has, and the step,
    which splits its own in equal parts, would wait for whichever of its threads lost its core to them.
    """

    def be_alone() -> int:
        torch.get_num_threads()  # a thread takes over the number of all at its first look, and now has had that
        torch.set_num_threads(1)  # for this thread ...
        if sys.platform == "linux":  # where each thread has a priority of its own: steps come first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        return threading.get_ident()

    threads = torch.get_num_threads()
    number = pool.submit(be_alone).result()
    torch.set_num_threads(threads)  # ... and for those to come, which take what was set last
    return number
