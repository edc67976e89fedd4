"""The threads that score, and how many requests may wait for one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from prometheus_client import Counter

Result = TypeVar("Result")


class Overloaded(Exception):
    """Too many requests wait."""


class Pool:
    """Runs work in threads. It is for one event loop, whose thread alone counts what is in it.

    Args:
        workers: pieces of work done at the same time.
        waiting: further pieces that may wait.
        refused: counts those that were not let in.

    Attributes:
        ready: between `start` and `stop`.
    """

    def __init__(self, workers: int, waiting: int, refused: Counter) -> None:
        self.ready = False
        self.workers = workers
        self.capacity = workers + waiting
        self.refused = refused
        self._inside = 0
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="scoring")

    async def start(self, first: Callable[[], object]) -> None:
        """Do work of the common kind once for each worker: what it allocates, no request has to wait for."""
        for _worker in range(self.workers):
            await asyncio.get_running_loop().run_in_executor(self._threads, first)
        self.ready = True

    def stop(self) -> None:
        """Finish what was let in."""
        self.ready = False
        self._threads.shutdown(wait=True)

    async def run(self, work: Callable[[], Result]) -> Result:
        """What the work returns.

        Raises:
            Overloaded: at once, if too much waits.
        """
        if self._inside >= self.capacity:
            self.refused.inc()
            raise Overloaded
        self._inside += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._inside -= 1
