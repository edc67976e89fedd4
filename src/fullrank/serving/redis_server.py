"""A Redis that servers of several hosts share: how long it is waited for, and what it promises."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from fullrank.data.forgotten import address_of
from fullrank.extras import needs

Result = TypeVar("Result")

log = logging.getLogger(__name__)

# All keys begin so.
PREFIX = "fullrank:"
# Seconds that an answer waits for what Redis knows of its user, and a sender for what it writes.
READ_SECONDS, WRITE_SECONDS = 0.25, 2.0
# Seconds after a failure in which Redis is not asked again: while it hangs, requests do not all wait for it.
PAUSE = 1.0
VERSION = "1"


class Server:
    """A Redis that is asked for a bounded time, and after a failure is left alone for a moment.

    Args:
        url: as the package redis takes it: `redis://[user:password@]host:port/database`, `rediss://` by TLS.

    Attributes:
        place: the address for people, without a password.
        reads, writes: clients, which differ in how long they wait.

    Raises:
        ValueError: if it does not answer, or another release's data is there.
        MissingExtra: if the package redis is not installed.
    """

    def __init__(self, url: str) -> None:
        with needs("redis", "--store redis://"):
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        self._fault = redis.RedisError
        self.place = address_of(url)
        # A write whose answer was lost may have been done: who sent it decides whether it is sent again.
        how: dict[str, Any] = {"decode_responses": True, "retry": Retry(NoBackoff(), 0)}
        try:
            # The types of the package say what a client answers, decoded or not, at once or not, all in one.
            self.reads, self.writes = [
                cast(Any, redis.Redis.from_url(url, socket_timeout=wait, socket_connect_timeout=wait, **how))
                for wait in (READ_SECONDS, WRITE_SECONDS)
            ]
            self.writes.set(f"{PREFIX}version", VERSION, nx=True)
            found = self.writes.get(f"{PREFIX}version")
        except (ValueError, redis.RedisError) as error:
            raise ValueError(f"{self.place} cannot be used as a store: {error}") from None
        if found != VERSION:
            raise ValueError(f"{self.place}: version is {found}, this release reads {VERSION}")
        # Apart, because a read is waited for a far shorter time.
        self._down_until = {"reads": 0.0, "writes": 0.0}

    def read(self, ask: Callable[[], Result]) -> Result:
        """What `reads` answers.

        Raises:
            OSError: if Redis does not answer, refuses, or failed a moment ago.
        """
        return self._asked("reads", ask)

    def write(self, ask: Callable[[], Result]) -> Result:
        """What `writes` answers, likewise."""
        return self._asked("writes", ask)

    def _asked(self, which: str, ask: Callable[[], Result]) -> Result:
        if time.monotonic() < self._down_until[which]:
            raise OSError(f"{self.place} failed a moment ago")
        try:
            return ask()
        except self._fault as error:
            self._down_until[which] = time.monotonic() + PAUSE
            log.error("%s failed: %s", self.place, error)
            raise OSError(f"{self.place} failed: {error}") from None

    def warn_if_forgetful(self) -> None:
        """Log what an acknowledgement does not mean here."""
        try:
            found: dict[str, str] = self.writes.config_get("append*", "maxmemory-policy")
        except self._fault as error:
            log.warning("%s does not say whether it keeps what it acknowledges: %s", self.place, error)
            return
        if (found.get("appendonly"), found.get("appendfsync")) != ("yes", "always"):
            log.warning(
                "%s may lose what it acknowledged when it is killed: appendonly is %s and appendfsync %s, "
                "expected yes and always",
                self.place,
                found.get("appendonly"),
                found.get("appendfsync"),
            )
        if found.get("maxmemory-policy", "").startswith("allkeys"):
            log.warning(
                "%s drops events when it is full: maxmemory-policy is %s", self.place, found["maxmemory-policy"]
            )

    def close(self) -> None:
        self.reads.close()
        self.writes.close()
