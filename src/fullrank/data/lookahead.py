"""Work done ahead of its use by threads, in the order of its use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# More threads than this are kept waiting by the one that reads and the one that uses.
_MOST_THREADS = 4


def prefetched(items: Iterable[Item], ahead: int = 2) -> Iterator[Item]:
    """The same items, made by a thread of its own a few ahead; none may be None."""
    iterator = iter(items)
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = deque(pool.submit(next, iterator, None) for _ in range(ahead))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, iterator, None))
            yield item


def mapped(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each item, computed by as many threads as there are cores, up to a few; in order."""
    threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    pool = ThreadPoolExecutor(max_workers=threads)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
