"""What users did since the bundle was made, in a Redis that several hosts share."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from fullrank.extras import needs
from fullrank.funnel.recent_events import Event
from fullrank.serving.store import RECENT, Feedback, digest

Result = TypeVar("Result")

log = logging.getLogger(__name__)

# Seconds that an answer waits for what Redis knows of its user, and a sender for what it writes.
READ_SECONDS, WRITE_SECONDS = 0.25, 2.0
# Seconds after a failure in which Redis is not asked again: while it hangs, requests do not all wait for it.
PAUSE = 1.0
# Writes on their way at the same time, which wait for one disk together.
WRITERS = 8
VERSION = "1"
# All keys begin so.
PREFIX = "fullrank:"
_IDS, _NUMBER, _FORGOTTEN, _EVENTS = (PREFIX + name for name in ("event_ids", "number", "forgotten", "events:"))

# A user's events are a sorted set by time, of texts that begin with their number, by which equal times are sorted.
# KEYS: ids, number, then that of each event's user. ARGV: for each event id, time, text.
_APPEND = """
local new = {}
for place = 1, #KEYS - 2 do
  local id, time, text = unpack(ARGV, 3 * place - 2, 3 * place)
  if id ~= '' and redis.call('HSETNX', KEYS[1], id, 1) == 0 then
    new[place] = 0
  else
    redis.call('ZADD', KEYS[place + 2], time, string.format('%016d ', redis.call('INCR', KEYS[2])) .. text)
    new[place] = 1
  end
end
return new
"""
# KEYS: the user's, ids, forgotten. ARGV: the user's digest.
_FORGET = """
local texts = redis.call('ZRANGE', KEYS[1], 0, -1)
for _, text in ipairs(texts) do
  local id = cjson.decode(string.sub(text, 18))[1]
  if id ~= cjson.null then redis.call('HDEL', KEYS[2], id) end
end
redis.call('DEL', KEYS[1])
redis.call('SADD', KEYS[3], ARGV[1])
return #texts
"""


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
        parts = urlsplit(url)
        self.place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
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
        self._down_until = 0.0

    def asked(self, ask: Callable[[], Result]) -> Result:
        """Raises:
        OSError: if Redis does not answer, refuses, or failed a moment ago.
        """
        if time.monotonic() < self._down_until:
            raise OSError(f"{self.place} did not answer a moment ago")
        try:
            return ask()
        except self._fault as error:
            self._down_until = time.monotonic() + PAUSE
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


class RedisStore:
    """What `EventStore` does, for servers of several hosts: one Redis with its replicas, no cluster.

    An event is acknowledged once Redis has answered, which is once its disk has the event if it runs with
    `appendonly yes` and `appendfsync always`; a warning says if it does not. If Redis is down, every call raises
    `OSError` soon: reads wait for it at most `READ_SECONDS`, writes `WRITE_SECONDS`.

    Args:
        url: see `Server`.

    Raises:
        ValueError: see `Server`.
    """

    def __init__(self, url: str) -> None:
        self._server = Server(url)
        self._server.warn_if_forgetful()
        self._append = self._server.writes.register_script(_APPEND)
        self._forget = self._server.writes.register_script(_FORGET)
        self._threads = ThreadPoolExecutor(WRITERS, thread_name_prefix="events")

    def append(self, feedbacks: Sequence[Feedback]) -> Future[list[bool]]:
        """Keep events, all or none. The result, which of them are new, is there when Redis has them; else an `OSError`,
        after which they may be there or not: those with an `event_id` can be sent again."""
        keys, values = [_IDS, _NUMBER], list[str | int]()
        for feedback in feedbacks:
            event = feedback.event
            keys.append(_key(feedback.user_id))
            said = [
                feedback.event_id,
                str(event.item_id),
                dict(event.labels),
                dict(event.features),
                feedback.impression,
            ]
            values += [feedback.event_id or "", event.time, json.dumps(said, separators=(",", ":"))]
        return self._threads.submit(self._server.asked, lambda: [new == 1 for new in self._append(keys, values)])

    def recent(self, user: int | str, since: int | None = None, limit: int = RECENT) -> list[Event]:
        """The last events of a user after a time, oldest first; of equal times in the order in which they came."""
        after = "-inf" if since is None else f"({since}"
        found = self._server.asked(
            lambda: self._server.reads.zrevrangebyscore(_key(user), "+inf", after, 0, limit, withscores=True)
        )
        events = []
        for text, when in reversed(found):
            _, item, labels, features, _ = json.loads(text[17:])
            events.append(Event(item, int(when), labels, features))
        return events

    def forget(self, user: int | str) -> int:
        """Delete a user's events, and remember, by a digest, that the user is to be left out of later trainings.

        Redis is asked to write its append-only file anew, without them; it does so in the background.

        Returns:
            how many events there were.
        """
        count = self._server.asked(lambda: self._forget([_key(user), _IDS, _FORGOTTEN], [digest(user)]))
        try:
            self._server.asked(self._server.writes.bgrewriteaof)
        except OSError as error:
            log.warning("what was deleted may stay in Redis's append-only file: %s", error)
        return int(count)

    def forgotten(self) -> set[str]:
        """Digests of the users that were deleted."""
        return set(self._server.asked(lambda: self._server.writes.smembers(_FORGOTTEN)))

    def events(self) -> Iterator[dict[str, Any]]:
        """Every event as a row of a log, in order of time; all are held in memory to be sorted."""
        server, found = self._server, list[tuple[int, str, str]]()
        for key in server.asked(lambda: set(server.writes.scan_iter(f"{_EVENTS}*", count=1000))):
            texts = server.asked(partial(server.writes.zrange, key, 0, -1, withscores=True))
            found += [(int(when), text, key.removeprefix(_EVENTS)) for text, when in texts]
        for when, text, user in sorted(found):
            event_id, item, labels, features, impression = json.loads(text[17:])
            row = {"user_id": user, "item_id": item, "timestamp": when, **features, **labels}
            yield {**row, "event_id": event_id, "impression_id": impression}

    def close(self) -> None:
        """Write what was given."""
        self._threads.shutdown()
        self._server.close()


def _key(user: int | str) -> str:
    return f"{_EVENTS}{user}"
