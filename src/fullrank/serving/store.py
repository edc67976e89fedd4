"""What users were shown and what they did, on disk: acknowledged events survive a kill."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from fullrank.data.forgotten import EVENTS, digest
from fullrank.funnel.recent_events import Event
from fullrank.serving.sqlite import connected, failing, prepare, transaction

# Events of a user that a request looks at.
RECENT = 1000
# Writes that share a transaction, which waits for the disk once.
TOGETHER = 256
VERSION = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT UNIQUE,
    user TEXT NOT NULL,
    item TEXT NOT NULL,
    time INTEGER NOT NULL,
    labels TEXT NOT NULL,
    features TEXT NOT NULL,
    impression TEXT
);
CREATE INDEX IF NOT EXISTS events_of_user ON events (user, time, number);
CREATE INDEX IF NOT EXISTS events_of_impression ON events (impression);
CREATE TABLE IF NOT EXISTS impressions (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    request_id TEXT UNIQUE NOT NULL,
    user TEXT,
    time INTEGER NOT NULL,
    version TEXT NOT NULL,
    features TEXT NOT NULL,
    items TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS impressions_of_user ON impressions (user);
CREATE INDEX IF NOT EXISTS impressions_by_time ON impressions (time);
CREATE TABLE IF NOT EXISTS forgotten (digest TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS deletions (number INTEGER PRIMARY KEY AUTOINCREMENT);
"""


@dataclass(frozen=True)
class Feedback:
    """An event as it was sent.

    Attributes:
        user_id: as in the log; 7 and "7" are the same.
        event: what happened.
        event_id: the sender's name for it: a repeat is not counted again.
        impression: the answer that showed the item.
    """

    user_id: int | str
    event: Event
    event_id: str | None = None
    impression: str | None = None


class ShownItem(NamedTuple):
    """An item of a list.

    Attributes:
        propensity: what it was drawn with, given those above.
        features: raw values by column of the log.
    """

    item_id: int | str
    propensity: float
    features: Mapping[str, Any]


@dataclass(frozen=True)
class Impression:
    """A list that was answered.

    Attributes:
        request_id: of its answer: another one with the same is not kept.
        user_id: None if nobody was named.
        time: in seconds since 1970.
        version: of the bundle.
        features: raw values of the user and the context, by column of the log.
        items: from above.
    """

    request_id: str
    user_id: int | str | None
    time: int
    version: str
    features: Mapping[str, Any]
    items: Sequence[ShownItem]


class _Write(NamedTuple):
    rows: Sequence[Feedback] | Sequence[Impression]
    result: Future[list[bool]]


class Deleted(NamedTuple):
    """How much there was of a user who was forgotten."""

    events: int
    impressions: int


class EventStore:
    """Events and impressions in an SQLite file of a directory, which several processes may use.

    Writes of requests at the same time share a transaction and one wait for the disk. Reads are those of what was
    acknowledged. What is deleted is overwritten.

    Raises:
        ValueError: if the file is no store.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / EVENTS
        self._local = threading.local()
        self._writes: SimpleQueue[_Write | None] = SimpleQueue()
        try:
            with closing(connected(self.path)) as connection:
                prepare(connection, self.path, _TABLES, VERSION)
        except sqlite3.Error as error:
            raise ValueError(f"{self.path} cannot be used as a store of events: {error}") from None
        self._thread = threading.Thread(target=self._write, name="events", daemon=True)
        self._thread.start()

    def append(self, rows: Sequence[Feedback] | Sequence[Impression]) -> Future[list[bool]]:
        """Keep events, or impressions. The result, which of them are new, is there when the disk has them; else an
        `OSError`. Impressions of a user who was forgotten are not kept."""
        result: Future[list[bool]] = Future()
        self._writes.put(_Write(rows, result))
        return result

    def recent(self, user: int | str, since: int | None = None, limit: int = RECENT) -> list[Event]:
        """The last events of a user after a time, oldest first; of equal times in the order in which they came.

        Raises:
            OSError: if the file cannot be read.
        """
        with failing(self.path, "read"):
            if not hasattr(self._local, "reader"):
                self._local.reader = connected(self.path)
            rows = self._local.reader.execute(
                "SELECT item, time, labels, features, number FROM events WHERE user = ? AND time > ? "
                "ORDER BY time DESC, number DESC LIMIT ?",
                (str(user), -(2**62) if since is None else since, limit),
            ).fetchall()
        return [_event(*row) for row in reversed(rows)]

    def deletions(self) -> int:
        """How often `forget` was called.

        Raises:
            OSError: if the file cannot be read.
        """
        (number,) = self._follower("SELECT MAX(number) FROM deletions").fetchone()
        return number or 0

    def after(self, number: int, since: int) -> tuple[int, Iterator[tuple[str, Event]]]:
        """Everybody's events that came after the one of a number and happened after a time, and the number of the last
        event that there is.

        Returns:
            that number, and users with their events in order of number, to be read by the thread that asked.

        Raises:
            OSError: if the file cannot be read, also later.
        """
        (last,) = self._follower("SELECT MAX(number) FROM events").fetchone()
        last = max(number, last or 0)
        return last, self._between(number, last, since) if last > number else iter(())

    def _between(self, first: int, last: int, since: int) -> Iterator[tuple[str, Event]]:
        found = self._follower(
            "SELECT user, item, time, labels, features, number FROM events "
            "WHERE number > ? AND number <= ? AND time > ? ORDER BY number",
            (first, last, since),
        )
        with failing(self.path, "read"):
            for user, *row in found:
                yield user, _event(*row)

    def _follower(self, sql: str, values: Sequence[int] = ()) -> sqlite3.Cursor:
        """Ask by a connection of this thread."""
        with failing(self.path, "read"):
            if not hasattr(self._local, "follower"):
                self._local.follower = connected(self.path)
            found: sqlite3.Cursor = self._local.follower.execute(sql, values)
        return found

    def forget(self, user: int | str) -> Deleted:
        """Delete a user's events and impressions, and remember, by a digest, that the user is to be left out of later
        trainings.

        Returns:
            how many events and impressions there were.

        Raises:
            OSError: if the file cannot be written.
        """
        with failing(self.path, "written"), closing(connected(self.path)) as connection:
            with transaction(connection):
                count = connection.execute("DELETE FROM events WHERE user = ?", (str(user),)).rowcount
                lists = connection.execute("DELETE FROM impressions WHERE user = ?", (str(user),)).rowcount
                connection.execute("INSERT OR IGNORE INTO forgotten VALUES (?)", (digest(user),))
                connection.execute("INSERT INTO deletions DEFAULT VALUES")
            # What was written before would else stay in the journal for a while.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return Deleted(int(count), int(lists))

    def close(self) -> None:
        """Write what was given."""
        self._writes.put(None)
        self._thread.join()

    def _write(self) -> None:
        with closing(connected(self.path)) as connection:
            while True:
                writes = [self._writes.get()]
                while len(writes) < TOGETHER and writes[-1] is not None:
                    try:
                        writes.append(self._writes.get_nowait())
                    except Empty:
                        break
                self._commit(connection, [write for write in writes if write is not None])
                if writes[-1] is None:
                    return

    def _commit(self, connection: sqlite3.Connection, writes: Sequence[_Write]) -> None:
        try:
            with transaction(connection):
                found = [[_insert(connection, row) for row in write.rows] for write in writes]
        except sqlite3.Error as error:
            for write in writes:
                write.result.set_exception(OSError(f"{self.path} cannot be written: {error}"))
            return
        for write, new in zip(writes, found, strict=True):
            write.result.set_result(new)


def _event(item: str, time: int, labels: str, features: str, number: int) -> Event:
    return Event(item, time, json.loads(labels), json.loads(features), number)


def _insert(connection: sqlite3.Connection, new: Feedback | Impression) -> bool:
    """Whether it is new."""
    if isinstance(new, Impression):
        return _insert_impression(connection, new)
    feedback, event = new, new.event
    row = (
        feedback.event_id,
        str(feedback.user_id),
        str(event.item_id),
        event.time,
        json.dumps(dict(event.labels)),
        json.dumps(dict(event.features), ensure_ascii=False),
        feedback.impression,
    )
    columns = "event_id, user, item, time, labels, features, impression"
    sql = f"INSERT OR IGNORE INTO events ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)"
    return connection.execute(sql, row).rowcount == 1


def _insert_impression(connection: sqlite3.Connection, impression: Impression) -> bool:
    user = impression.user_id
    row = (
        impression.request_id,
        None if user is None else str(user),
        impression.time,
        impression.version,
        json.dumps(dict(impression.features), ensure_ascii=False),
        json.dumps(
            [(str(item), propensity, dict(features)) for item, propensity, features in impression.items],
            ensure_ascii=False,
        ),
        None if user is None else digest(user),
    )
    columns = "request_id, user, time, version, features, items"
    # A list of a user may still wait here when the user is forgotten.
    sql = (
        f"INSERT OR IGNORE INTO impressions ({columns}) SELECT ?1, ?2, ?3, ?4, ?5, ?6 "
        "WHERE NOT EXISTS (SELECT 1 FROM forgotten WHERE digest = ?7)"
    )
    return connection.execute(sql, row).rowcount == 1
