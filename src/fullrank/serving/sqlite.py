"""What the server's SQLite files have in common: a commit waits for the disk, and a file says what wrote it."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

# Seconds to wait for another process that writes.
PATIENCE = 30.0


def connected(place: Path | str, *, any_thread: bool = False) -> sqlite3.Connection:
    """A connection whose commits wait until the disk has them, and whose deletions overwrite.

    Args:
        any_thread: whether threads other than this one use it, one at a time.
    """
    connection = sqlite3.connect(place, timeout=PATIENCE, isolation_level=None, check_same_thread=not any_thread)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA secure_delete=ON")
    return connection


def prepare(connection: sqlite3.Connection, place: Path | str, tables: str, version: int) -> None:
    """Make the tables of a new file; read an old one's version.

    Raises:
        ValueError: if it is another version's.
        sqlite3.Error: if it is no database.
    """
    connection.execute("PRAGMA journal_mode=WAL")
    connection.executescript(tables)
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found not in (0, version):
        raise ValueError(f"{place}: version is {found}, this release reads {version}")
    connection.execute(f"PRAGMA user_version={version}")


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All that is written inside, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


@contextmanager
def failing(place: Path | str, what: str) -> Iterator[None]:
    """Errors of SQLite are logged, and raised as `OSError`s that say that `place` cannot be `what`."""
    try:
        yield
    except sqlite3.Error as error:
        log.error("%s cannot be %s: %s", place, what, error)
        raise OSError(f"{place} cannot be {what}: {error}") from None
