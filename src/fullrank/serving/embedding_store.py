"""The log of embeddings where a server reads it: the same lookup, of a few users, from an SQLite file."""

# Shapes: n events, Q queries, C bytes of a code.

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fullrank.serving.sqlite import connected, failing, prepare, transaction
from fullrank.transfer.codec import check_prefix, code_bytes
from fullrank.transfer.embedding_log import EmbeddingLog, asked
from fullrank.transfer.lookup import NO_EVENT, HistorySequence

VERSION = 2
_TABLES = """
CREATE TABLE IF NOT EXISTS codes (
    key INTEGER NOT NULL, version TEXT NOT NULL, time INTEGER NOT NULL, event INTEGER NOT NULL,
    available INTEGER NOT NULL, code BLOB NOT NULL, PRIMARY KEY (key, version, time, event)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS versions (name TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS forgotten (key INTEGER PRIMARY KEY);
"""
# An event that is there twice is the one that arrived first; of two that arrived at once the smaller code.
_KEEP = """
INSERT INTO codes SELECT ?1, ?2, ?3, ?4, ?5, ?6 WHERE NOT EXISTS (SELECT 1 FROM forgotten WHERE key = ?1)
ON CONFLICT DO UPDATE SET available = excluded.available, code = excluded.code
WHERE (excluded.available, excluded.code) < (available, code)
"""
_LAST = """
SELECT time, event, code FROM codes WHERE key = ? AND version = ? AND time < ? AND time >= ? AND available <= ?
AND event <> ? ORDER BY time DESC, event DESC LIMIT ?
"""


class EmbeddingStore:
    """Codes of events by user in an SQLite file of a directory, which several processes may use.

    Args:
        directory: made if it is not there.
        dim, bits, prefix_dims: of the codes, as in the log; default those of the store that is there.

    Raises:
        ValueError: if the file is no such store, or holds other codes; or there is none, and `dim` is not given.
    """

    def __init__(self, directory: Path, dim: int | None = None, bits: int = 4, prefix_dims: Iterable[int] = ()) -> None:
        self.path = directory / "embeddings.sqlite"
        if dim is None and not self.path.is_file():
            raise ValueError(f"{directory} is no store of embeddings: make one by `fullrank transfer store`")
        directory.mkdir(parents=True, exist_ok=True)
        self._local = threading.local()
        try:
            with closing(connected(self.path)) as connection:
                prepare(connection, self.path, _TABLES, VERSION)
                if dim is not None:
                    connection.executemany("INSERT OR IGNORE INTO about VALUES (?, ?)", [("dim", dim), ("bits", bits)])
                found = dict(connection.execute("SELECT name, value FROM about"))
        except sqlite3.Error as error:
            raise ValueError(f"{self.path} cannot be used as a store of embeddings: {error}") from None
        if found.keys() != {"dim", "bits"}:
            raise ValueError(f"{self.path} is no store of embeddings")
        if dim is not None and found != {"dim": dim, "bits": bits}:
            raise ValueError(
                f"{self.path} has codes of dim {found['dim']} in {found['bits']} bits, not of {dim} in {bits}"
            )
        self.dim, self.bits = int(found["dim"]), int(found["bits"])
        self.prefix_dims = tuple(sorted({*prefix_dims, self.dim}))

    @classmethod
    def of(cls, directory: Path, log: EmbeddingLog, fm_version: str) -> EmbeddingStore:
        """A store with what a log has of a version; once more, it adds what is new."""
        store = cls(directory, log.dim, log.bits, log.prefix_dims)
        for key, event, time, available, codes in log.events(fm_version):
            store.append(key, event, time, codes, available, fm_version)
        return store

    @property
    def versions(self) -> set[str]:
        """Those that it has events of."""
        with closing(connected(self.path)) as connection:
            return {name for (name,) in connection.execute("SELECT name FROM versions")}

    def __len__(self) -> int:
        """Events of all versions."""
        with closing(connected(self.path)) as connection:
            return int(connection.execute("SELECT count(*) FROM codes").fetchone()[0])

    def append(
        self,
        keys: npt.ArrayLike,
        event_ids: npt.ArrayLike,
        event_times: npt.ArrayLike,
        codes: npt.NDArray[np.uint8],
        available_at: npt.ArrayLike,
        fm_version: str,
    ) -> None:
        """Keep events, all or none, but those of forgotten users; the log, which comes first, has checked them.

        Raises:
            ValueError: if a code has another length.
        """
        if codes.shape[1:] != (code_bytes(self.dim, self.bits),):
            raise ValueError(f"codes have shape {codes.shape}, expected (n, {code_bytes(self.dim, self.bits)})")
        columns: list[list[Any]] = [np.asarray(column).tolist() for column in (keys, event_times, event_ids)]
        columns.append(np.asarray(available_at).tolist())
        rows = zip(*columns, (code.tobytes() for code in codes), strict=True)
        with closing(connected(self.path)) as connection, transaction(connection):
            connection.execute("INSERT OR IGNORE INTO versions VALUES (?)", (fm_version,))
            connection.executemany(
                _KEEP, ((key, fm_version, time, event, available, code) for key, time, event, available, code in rows)
            )

    def lookup(
        self,
        keys: npt.ArrayLike,
        as_of: npt.ArrayLike,
        max_len: int,
        window: str | int | None = None,
        *,
        exclude_event_ids: npt.ArrayLike | None = None,
        fm_version: str,
        prefix: int | None = None,
    ) -> HistorySequence:
        """What `EmbeddingLog.lookup` gives of the same events, bit for bit.

        Raises:
            ValueError: as there. A version that is not there has no events.
            OSError: if the file cannot be read.
        """
        key, time, since, exclude = asked(keys, as_of, max_len, window, exclude_event_ids)
        own = np.full(len(key), NO_EVENT) if exclude is None else exclude
        width = check_prefix(prefix, self.dim, self.prefix_dims)
        found: list[tuple[int, int, bytes]] = []
        lengths = []
        with failing(self.path, "read"):
            if not hasattr(self._local, "reader"):
                self._local.reader = connected(self.path)
            for k, t, s, e in zip(key.tolist(), time.tolist(), since.tolist(), own.tolist(), strict=True):
                rows = self._local.reader.execute(_LAST, (k, fm_version, t, s, t, e, max_len)).fetchall()
                found += [(t - at, event, code) for at, event, code in reversed(rows)]
                lengths.append(len(rows))
        size = code_bytes(self.dim, self.bits)
        codes = np.frombuffer(b"".join(code for _, _, code in found), np.uint8).reshape(-1, size)
        age, events = (np.array([row[place] for row in found], np.int64) for place in (0, 1))
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        versions = np.zeros(len(found), np.int16)
        return HistorySequence(codes, offsets, age, events, versions, (fm_version,), self.dim, self.bits, width)

    def forget(self, key: int) -> int:
        """Delete a user's events, and keep none that come later; how many there were.

        Raises:
            OSError: if the file cannot be written.
        """
        with failing(self.path, "written"), closing(connected(self.path)) as connection:
            with transaction(connection):
                connection.execute("INSERT OR IGNORE INTO forgotten VALUES (?)", (int(key),))
                count = connection.execute("DELETE FROM codes WHERE key = ?", (int(key),)).rowcount
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return int(count)
