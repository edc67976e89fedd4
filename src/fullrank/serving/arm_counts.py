"""How often each arm of an experiment answered and was rewarded, counted by all processes of a server together."""

from __future__ import annotations

import fcntl
import logging
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from fullrank.serving.sqlite import connected, failing, transaction

log = logging.getLogger(__name__)

# Random groups of users, by whose differences rates are judged; lists whose feedback is waited for; users counted.
GROUPS, LISTS, USERS = 200, 100_000, 100_000
# Older lists are removed so many at a time.
STALE = 64

# A cell is an arm and a group of users, arm * GROUPS + group. The process that writes may be killed, and then what it
# was writing is not there; the machine may not go down, since the counts do not outlive the server.
_TABLES = """
PRAGMA journal_mode=WAL;
PRAGMA synchronous=OFF;
PRAGMA secure_delete=OFF;
CREATE TABLE IF NOT EXISTS counts (cell INTEGER PRIMARY KEY, lists INTEGER NOT NULL, rewarded INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS lists (number INTEGER PRIMARY KEY, request INTEGER NOT NULL UNIQUE, cell INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS users (number INTEGER PRIMARY KEY, user INTEGER NOT NULL UNIQUE, arm INTEGER NOT NULL);
"""


class CountedList(NamedTuple):
    """A list that was answered.

    Attributes:
        request: digest of its id, 64 bits with a sign.
        arm: number of the one that answered.
        group: of the user.
        user: digest likewise; None of somebody without an id.
    """

    request: int
    arm: int
    group: int
    user: int | None


class Totals(NamedTuple):
    """What came of an arm: lists and rewarded ones by group of users, and distinct users."""

    lists: list[int]
    rewarded: list[int]
    users: int


class ArmCounts:
    """Counts in an SQLite file that the processes of a server share, or in memory. Threads may use it.

    A count that cannot be written is lost, and the log says so once; nobody waits for it in vain.

    Args:
        arms: how many there are.
        place: the file; None keeps the counts in memory.
    """

    def __init__(self, arms: int, place: Path | None = None) -> None:
        self._arms, self._place = arms, place
        self._lock, self._failed = threading.Lock(), False
        with failing(place or "the counts of arms", "written"):
            self._connection = connected(":memory:" if place is None else place, any_thread=True)
            self._connection.executescript(_TABLES)
        # Waiting for SQLite's own lock is sleeping for a millisecond at least. This one ends with its process too.
        self._turns = None if place is None else place.with_suffix(".lock").open("w")

    def answered(self, lists: Sequence[CountedList]) -> None:
        """Count lists, and wait for what comes of the last 100,000."""
        number: int | None = None
        with self._writing() as connection:
            for each in lists:
                cell = each.arm * GROUPS + each.group
                connection.execute(
                    "INSERT INTO counts VALUES (?, 1, 0) ON CONFLICT (cell) DO UPDATE SET lists = lists + 1", (cell,)
                )
                waiting = each.request, cell
                number = connection.execute(
                    "INSERT OR REPLACE INTO lists (request, cell) VALUES (?, ?)", waiting
                ).lastrowid
                if each.user is not None:
                    connection.execute(
                        "INSERT OR IGNORE INTO users (user, arm) "
                        "SELECT ?, ? WHERE COALESCE((SELECT MAX(number) FROM users), 0) < ?",
                        (each.user, each.arm, USERS),
                    )
            if number is not None and number % STALE < len(lists):
                connection.execute("DELETE FROM lists WHERE number <= ?", (number - LISTS,))

    def rewarded(self, requests: Sequence[int]) -> list[int]:
        """Count rewards of lists that are waited for, the first of each: their arms."""
        arms = list[int]()
        with self._writing() as connection:
            for request in requests:
                row = connection.execute(
                    "SELECT number, cell FROM lists WHERE request = ? AND number > (SELECT MAX(number) FROM lists) - ?",
                    (request, LISTS),
                ).fetchone()
                if row is not None:
                    number, cell = row
                    connection.execute("DELETE FROM lists WHERE number = ?", (number,))
                    connection.execute("UPDATE counts SET rewarded = rewarded + 1 WHERE cell = ?", (cell,))
                    arms.append(cell // GROUPS)
        return arms

    def totals(self) -> list[Totals]:
        """What came of each arm.

        Raises:
            OSError: if the file cannot be read.
        """
        found = [Totals([0] * GROUPS, [0] * GROUPS, 0) for _ in range(self._arms)]
        with self._lock, failing(self._place or "the counts of arms", "read"):
            # One statement, so that all is of one moment.
            rows = self._connection.execute(
                "SELECT cell, lists, rewarded, NULL FROM counts "
                "UNION ALL SELECT arm, NULL, NULL, COUNT(*) FROM users GROUP BY arm"
            ).fetchall()
        for place, lists, rewarded, users in rows:
            if users is not None:
                found[place] = found[place]._replace(users=users)
            else:
                own, group = found[place // GROUPS], place % GROUPS
                own.lists[group], own.rewarded[group] = lists, rewarded
        return found

    def close(self) -> None:
        with self._lock:
            self._connection.close()
            if self._turns is not None:
                self._turns.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction."""
        with ExitStack() as stack:
            stack.enter_context(self._lock)
            if self._turns is not None:
                fcntl.flock(self._turns, fcntl.LOCK_EX)
                stack.callback(fcntl.flock, self._turns, fcntl.LOCK_UN)
            try:
                with transaction(self._connection):
                    yield self._connection
            except sqlite3.Error as error:
                if not self._failed:
                    log.error("what comes of the arms cannot be counted: %s", error)
                self._failed = True
            else:
                self._failed = False
