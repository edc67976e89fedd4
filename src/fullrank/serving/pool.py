"""The threads that score, and how much work may wait for one."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from fullrank.serving.instruments import Instruments

Result = TypeVar("Result")

# Seconds before a request that finds no room is refused: what clients who hung up had asked for is found out meanwhile.
PAUSES = (0.005, 0.02, 0.05)
# Seconds of work over which the measured speed forgets.
MEMORY = 10.0


class Overloaded(Exception):
    """Too much work waits, in all or of this client.

    Attributes:
        retry_after: seconds in which what waits now should be done.
    """

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after


class TooLate(Exception):
    """The request's deadline passed before its work was done."""


class Stopping(Exception):
    """The server takes no more work."""


class Work:
    """What one request has the pool do, piece by piece."""

    def __init__(self, pool: Pool, deadline: float) -> None:
        self._pool = pool
        self.deadline = deadline

    async def piece(self, work: Callable[[], Result], rows: int) -> Result:
        """What a piece of work returns. Pieces of all requests take turns, one of each request at a time.

        Raises:
            TooLate: if the deadline passed before it began.
        """

        def timed() -> Result:
            begin = time.perf_counter()
            if begin > self.deadline:
                raise TooLate
            result = work()
            self._pool.worked(rows, time.perf_counter() - begin)
            return result

        # A piece whose request was cancelled before it began is never begun.
        return await asyncio.get_running_loop().run_in_executor(self._pool.threads, timed)


class Pool:
    """Runs work in threads, and admits it by rows to be scored, not by requests. It is for one event loop.

    Args:
        workers: pieces of work done at the same time.
        rows: rows that may be admitted and not yet done; a single request may be larger if nothing else waits.
        share: of these rows that one client may hold.
        seconds: the longest that a request may take.

    Attributes:
        ready: between `start` and `stop`.
    """

    def __init__(self, workers: int, rows: int, share: float, seconds: float, instruments: Instruments) -> None:
        self.ready = False
        self.workers = workers
        self.most = rows
        self.share = share
        self.seconds = seconds
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix="scoring")
        self._instruments = instruments
        self._rows = 0
        self._by_client: Counter[str] = Counter()
        self._speed_rows, self._speed_seconds = 0.0, 0.0

    async def start(self, first: Callable[[], object]) -> None:
        """Do work of the common kind once for each worker: what it allocates, no request has to wait for."""
        for _worker in range(self.workers):
            await asyncio.get_running_loop().run_in_executor(self.threads, first)
        self.ready = True

    def stop(self) -> None:
        """Finish the pieces that were begun, and no other."""
        self.ready = False
        self.threads.shutdown(wait=True, cancel_futures=True)

    def worked(self, rows: int, seconds: float) -> None:
        """Keep the speed of one worker, over the last seconds of work."""
        kept = math.exp(-seconds / MEMORY)
        self._speed_rows = kept * self._speed_rows + rows
        self._speed_seconds = kept * self._speed_seconds + seconds

    @asynccontextmanager
    async def admitted(self, rows: int, client: str, seconds: float | None = None) -> AsyncIterator[Work]:
        """Let a request do work of so many rows.

        Args:
            client: who asks.
            seconds: that the request may take; at most what the pool allows.

        Raises:
            Overloaded: soon, if too much waits.
            Stopping: if the pool was stopped.
        """
        if not self.ready:
            raise Stopping
        for pause in PAUSES:
            if self._has_room(rows, client):
                break
            await asyncio.sleep(pause)
        else:
            self._instruments.refused.inc()
            raise Overloaded(self._drained_in())
        self._add(rows, client)
        try:
            yield Work(self, time.perf_counter() + min(self.seconds, seconds or self.seconds))
        finally:
            self._add(-rows, client)

    def _has_room(self, rows: int, client: str) -> bool:
        others, own = self._rows, self._by_client[client]
        return (not others or others + rows <= self.most) and (not own or own + rows <= self.share * self.most)

    def _add(self, rows: int, client: str) -> None:
        self._rows += rows
        self._instruments.rows.set(self._rows)
        self._by_client[client] += rows
        if not self._by_client[client]:
            del self._by_client[client]

    def _drained_in(self) -> int:
        """Seconds in which all that was admitted should be done, 1 to 60."""
        if not self._speed_rows:
            return 1
        seconds = self._rows * self._speed_seconds / self._speed_rows / self.workers
        return min(60, max(1, math.ceil(seconds)))
