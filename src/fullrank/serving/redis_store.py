"""What users were shown and what they did, in a Redis that several hosts share."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from fullrank.data.forgotten import EVENTS, REDIS_KEY, digest
from fullrank.funnel.recent_events import Event
from fullrank.serving.redis_server import PREFIX, Server
from fullrank.serving.sqlite import connected, transaction
from fullrank.serving.store import RECENT, Deleted, EventStore, Feedback, Impression

log = logging.getLogger(__name__)

# Writes on their way at the same time, which wait for one disk together.
WRITERS = 8
_EVENT_IDS, _EVENT_NUMBER = f"{PREFIX}event_ids", f"{PREFIX}event_number"
_LIST_IDS, _LIST_NUMBER = f"{PREFIX}list_ids", f"{PREFIX}list_number"
# The last events by number, for servers that follow what all users do, and about how many there are.
_EVENT_LOG, LOGGED = f"{PREFIX}event_log", 100_000
_DELETIONS = f"{PREFIX}deletions"
# Of each user; lists of nobody have the second name alone.
_EVENTS_OF, _LISTS = f"{PREFIX}events:", f"{PREFIX}lists"

# A user's events, and lists, are a sorted set by time, of texts that begin with their number, by which equal times are
# sorted. KEYS: ids, number, forgotten, then that of each row's user. ARGV: the log, its length, then for each row id,
# time, text, and the digest of a user who must not be forgotten for it to be kept.
_APPEND = """
local new = {}
for place = 1, #KEYS - 3 do
  local id, time, text, user = unpack(ARGV, 4 * place - 1, 4 * place + 2)
  if user ~= '' and redis.call('SISMEMBER', KEYS[3], user) == 1 then
    new[place] = 0
  elseif id ~= '' and redis.call('HSETNX', KEYS[1], id, 1) == 0 then
    new[place] = 0
  else
    local number = redis.call('INCR', KEYS[2])
    redis.call('ZADD', KEYS[place + 3], time, string.format('%016d ', number) .. text)
    if ARGV[1] ~= '' then
      local entry = string.format('%d-0', number)
      redis.call('XADD', ARGV[1], 'MAXLEN', '~', ARGV[2], entry, 'key', KEYS[place + 3], 'time', time, 'said', text)
    end
    new[place] = 1
  end
end
return new
"""
# KEYS: the user's events and their ids, lists and their ids, forgotten, the log, how often. ARGV: the user's digest.
_FORGET = """
local counts = {}
for place = 1, 3, 2 do
  local texts = redis.call('ZRANGE', KEYS[place], 0, -1)
  for _, text in ipairs(texts) do
    local id = cjson.decode(string.sub(text, 18))[1]
    if id ~= cjson.null then redis.call('HDEL', KEYS[place + 1], id) end
    if place == 1 then redis.call('XDEL', KEYS[6], string.format('%d-0', tonumber(string.sub(text, 1, 16)))) end
  end
  redis.call('DEL', KEYS[place])
  counts[#counts + 1] = #texts
end
redis.call('SADD', KEYS[5], ARGV[1])
redis.call('INCR', KEYS[7])
return counts
"""


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
        self.server = Server(url)
        self._append = self.server.writes.register_script(_APPEND)
        self._forget = self.server.writes.register_script(_FORGET)
        self._threads = ThreadPoolExecutor(WRITERS, thread_name_prefix="events")

    def append(self, rows: Sequence[Feedback] | Sequence[Impression]) -> Future[list[bool]]:
        """Keep events, or impressions, all or none. The result, which of them are new, is there when Redis has them;
        else an `OSError`, after which they may be there or not: those with an id can be sent again. Impressions of a
        user who was forgotten are not kept."""
        are_lists = bool(rows) and isinstance(rows[0], Impression)
        keys = [_LIST_IDS, _LIST_NUMBER, REDIS_KEY] if are_lists else [_EVENT_IDS, _EVENT_NUMBER, REDIS_KEY]
        values: list[str | int] = ["" if are_lists else _EVENT_LOG, LOGGED]
        for row in rows:
            key, written = _event(row) if isinstance(row, Feedback) else _list(row)
            keys.append(key)
            values += written
        return self._threads.submit(self.server.write, lambda: [new == 1 for new in self._append(keys, values)])

    def recent(self, user: int | str, since: int | None = None, limit: int = RECENT) -> list[Event]:
        """The last events of a user after a time, oldest first; of equal times in the order in which they came.

        Raises:
            OSError: if Redis does not answer.
        """
        after = "-inf" if since is None else f"({since}"
        found = self.server.read(
            lambda: self.server.reads.zrevrangebyscore(f"{_EVENTS_OF}{user}", "+inf", after, 0, limit, withscores=True)
        )
        events = []
        for text, when in reversed(found):
            _, item, labels, features, _ = json.loads(text[17:])
            events.append(Event(item, int(when), labels, features, int(text[:16])))
        return events

    def deletions(self) -> int:
        """How often `forget` was called.

        Raises:
            OSError: if Redis does not answer.
        """
        return int(self.server.write(lambda: self.server.writes.get(_DELETIONS)) or 0)

    def after(self, number: int, since: int) -> tuple[int, Iterator[tuple[str, Event]]] | None:
        """Everybody's events that came after the one of a number and happened after a time, and the number of the last
        event that there is.

        Returns:
            that number, and users with their events, in order of number but for all from 0 on; None if some that came
            in between are not known by number any more, so that all have to be read.

        Raises:
            OSError: if Redis does not answer, also later.
        """
        redis = self.server.writes
        if not number:
            last = int(self.server.write(lambda: redis.get(_EVENT_NUMBER)) or 0)
            return last, self._all_events(last, since)
        found = self.server.write(lambda: redis.xrange(_EVENT_LOG, f"({number}-0", "+", LOGGED))
        last = number + len(found)
        numbers = [int(entry.partition("-")[0]) for entry, _ in found]
        newest = int(self.server.write(lambda: redis.get(_EVENT_NUMBER)) or 0) if not found else last
        if newest != last or numbers != list(range(number + 1, last + 1)):
            return None
        told = (
            (number, said["key"], int(said["time"]), json.loads(said["said"]))
            for number, (_, said) in zip(numbers, found, strict=True)
        )
        return last, (
            (key.removeprefix(_EVENTS_OF), Event(item, when, labels, features, number))
            for number, key, when, (_, item, labels, features, _) in told
            if when > since
        )

    def _all_events(self, last: int, since: int) -> Iterator[tuple[str, Event]]:
        seen: set[int] = set()
        for user, number, when, (_, item, labels, features, _) in self._rows(_EVENTS_OF, last):
            if user is not None and when > since and number not in seen:
                seen.add(number)
                yield user, Event(item, when, labels, features, number)

    def forget(self, user: int | str) -> Deleted:
        """Delete a user's events and impressions, and remember, by a digest, that the user is to be left out of later
        trainings. Redis is asked to write its append-only file anew, without them; it does so in the background.

        Returns:
            how many events and impressions there were.

        Raises:
            OSError: if Redis does not answer.
        """
        keys = [f"{_EVENTS_OF}{user}", _EVENT_IDS, f"{_LISTS}:{user}", _LIST_IDS, REDIS_KEY]
        keys += [_EVENT_LOG, _DELETIONS]
        counts = self.server.write(lambda: self._forget(keys, [digest(user)]))
        try:
            self.server.write(self.server.writes.bgrewriteaof)
        except OSError as error:
            log.warning("what was deleted may stay in Redis's append-only file: %s", error)
        return Deleted(*map(int, counts))

    def copy(self, directory: Path) -> None:
        """Make a store of a directory with what is here now. What comes meanwhile is left out, so that an export of a
        later copy can go on from one of this.

        Raises:
            OSError: if Redis fails.
        """
        EventStore(directory).close()
        with closing(connected(directory / EVENTS)) as connection, transaction(connection):
            numbers = self.server.write(lambda: self.server.writes.mget(_LIST_NUMBER, _EVENT_NUMBER))
            last_list, last_event = (int(number or 0) for number in numbers)
            for user, number, when, row in self._rows(_LISTS, last_list):
                request_id, version, features, items = row
                shown = (number, request_id, user, when, version, json.dumps(features), json.dumps(items))
                connection.execute("INSERT OR IGNORE INTO impressions VALUES (?, ?, ?, ?, ?, ?, ?)", shown)
            for user, number, when, row in self._rows(_EVENTS_OF, last_event):
                event_id, item, labels, features, impression = row
                event = (number, event_id, user, item, when, json.dumps(labels), json.dumps(features), impression)
                connection.execute("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)", event)
            for gone in self.server.write(lambda: self.server.writes.smembers(REDIS_KEY)):
                connection.execute("INSERT OR IGNORE INTO forgotten VALUES (?)", (gone,))

    def close(self) -> None:
        """Write what was given."""
        self._threads.shutdown()
        self.server.close()

    def _rows(self, prefix: str, last: int) -> Iterator[tuple[str | None, int, int, list[Any]]]:
        """User, number, time and content of what is under the keys of a prefix, up to a number, some of it twice."""
        redis = self.server.writes
        keys = self.server.write(lambda: set(redis.scan_iter(f"{prefix}*", count=1000)))
        for key in keys:
            _, named, user = key.removeprefix(PREFIX).partition(":")
            cursor, begun = 0, False
            while cursor or not begun:
                cursor, found = self.server.write(partial(redis.zscan, key, cursor, count=1000))
                begun = True
                for text, when in found:
                    if (number := int(text[:16])) <= last:
                        yield (user if named else None), number, int(when), json.loads(text[17:])


def _event(feedback: Feedback) -> tuple[str, list[str | int]]:
    """Key, id, time and text of an event, which is kept whoever the user is."""
    event = feedback.event
    said = [feedback.event_id, str(event.item_id), dict(event.labels), dict(event.features), feedback.impression]
    return f"{_EVENTS_OF}{feedback.user_id}", [feedback.event_id or "", event.time, _text(said), ""]


def _list(shown: Impression) -> tuple[str, list[str | int]]:
    """Likewise of a list, with the digest of its user."""
    items = [(str(item), propensity, dict(features)) for item, propensity, features in shown.items]
    user = shown.user_id
    key, gone = (_LISTS, "") if user is None else (f"{_LISTS}:{user}", digest(user))
    said = [shown.request_id, shown.version, dict(shown.features), items]
    return key, [shown.request_id, shown.time, _text(said), gone]


def _text(said: list[Any]) -> str:
    return json.dumps(said, separators=(",", ":"))
