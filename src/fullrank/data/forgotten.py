"""Users who asked to be forgotten: a server's store knows them by digests, and imports leave their rows out."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import polars as pl

from fullrank.extras import needs

# The file of a store, and of one in a Redis the set of digests.
EVENTS, REDIS_KEY = "events.sqlite", "fullrank:forgotten"


class NobodyLeft(ValueError):
    """All rows of a log, so many, are of users who are to be forgotten."""

    def __init__(self, path: Path, rows: int) -> None:
        super().__init__(f"{path}: all {rows:,} rows are of users who are to be forgotten")
        self.rows = rows


def digest(user: int | str) -> str:
    """What stands for a user of whom nothing else may be kept; 7 and "7" are the same."""
    return hashlib.sha256(str(user).encode()).hexdigest()


def is_url(store: Path | str) -> bool:
    """Whether a store is a Redis, and no directory.

    Raises:
        ValueError: if it is the URL of something else.
    """
    scheme, separator, _ = str(store).partition("://")
    if separator and scheme not in ("redis", "rediss"):
        raise ValueError(f"{address_of(str(store))} is no store: expected a directory or redis://host:port/database")
    return bool(separator)


def address_of(url: str) -> str:
    """The URL for people, without a password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def forgotten_users(store: Path | str) -> frozenset[str]:
    """Digests of the users that a server's store was told to forget.

    Args:
        store: the directory of `fullrank serve --store`, or the URL of its Redis.

    Raises:
        ValueError: if it holds no store.
    """
    if is_url(store):
        return _in_redis(str(store))
    file = Path(store) / EVENTS
    if not file.is_file():
        raise ValueError(f"{store} is no store of `fullrank serve --store`: it has no {EVENTS}")
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            return frozenset(found for (found,) in connection.execute("SELECT digest FROM forgotten"))
    except sqlite3.Error as error:
        raise ValueError(f"{file} cannot be read as a store of events: {error}") from None


def _in_redis(url: str) -> frozenset[str]:
    with needs("redis", "a store at redis://"):
        import redis
    try:
        with redis.Redis.from_url(url, decode_responses=True, socket_timeout=10, socket_connect_timeout=10) as asked:
            return frozenset(map(str, asked.smembers(REDIS_KEY)))
    except (ValueError, redis.RedisError) as error:
        raise ValueError(f"{address_of(url)} cannot be read as a store: {error}") from None


def is_forgotten(users: pl.Series, forgotten: Collection[str]) -> npt.NDArray[np.bool_]:
    """Which rows are of users whose digest is among these; a row without a user is of none."""
    known = users.drop_nulls().unique()
    gone = known.filter(pl.Series([digest(user) in forgotten for user in known.to_list()], dtype=pl.Boolean))
    return users.is_in(gone.implode()).fill_null(False).to_numpy()
