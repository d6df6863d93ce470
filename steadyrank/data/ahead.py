"""What is made ahead of its use, in a thread of its own."""

import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def make_ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """Yield `items`, up to `count` of them being made by another thread while the caller works; 0 is no thread.

    An error comes where its item would have come. The thread ends when there is no item left, or when this iterator is
    closed or dropped, after the item that it is at.

    >>> list(make_ahead(iter("abc"), 2))
    ['a', 'b', 'c']
    """
    return _make_ahead(items, count) if count else items


def _make_ahead(items: Iterator[T], count: int) -> Iterator[T]:
    end = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="read_ahead")
    maker = _start(pool)
    waiting: deque[Future[T | object]] = deque([pool.submit(next, items, end)])
    try:
        while (item := waiting.popleft().result()) is not end:
            for _ in range(min(2, count - len(waiting))):  # a few items are not asked for a thousand
                waiting.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]  # it is not the end
            del item  # one item less in memory while the next is waited for
    finally:
        # Dropped in a cycle, this may be collected by any thread, the maker too, which cannot wait for itself.
        pool.shutdown(wait=threading.get_ident() != maker, cancel_futures=True)


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
