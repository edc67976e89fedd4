"""The last state of each item that was changed while it was served."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from fullrank.funnel.item_changes import ItemState
from fullrank.serving.sqlite import connected, failing, prepare, transaction

VERSION = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS items (item TEXT PRIMARY KEY, number INTEGER NOT NULL, state TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS items_by_number ON items (number);
"""


class ItemStore:
    """States by item in an SQLite file, which several processes may use, or in memory, numbered as they come.

    Args:
        directory: None keeps them in memory.

    Raises:
        ValueError: if the file is no store.
    """

    def __init__(self, directory: Path | None = None) -> None:
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        self._place = place = ":memory:" if directory is None else directory / "items.sqlite"
        self._lock = threading.Lock()
        try:
            self._connection = connected(place, any_thread=True)
            prepare(self._connection, place, _TABLES, VERSION)
        except sqlite3.Error as error:
            raise ValueError(f"{place} cannot be used as a store of items: {error}") from None

    def change(self, names: Iterable[str], of: Callable[[Mapping[str, ItemState]], Mapping[str, ItemState]]) -> int:
        """Replace states by what `of` makes of the present ones, at once. Once this returns they are on disk.

        Returns:
            the number of the last state there is.

        Raises:
            OSError: if the disk does not take them.
        """
        with self._lock, failing(self._place, "written"), transaction(self._connection):
            last = self._last()
            for name, state in of(self._of(names)).items():
                last += 1
                row = name, last, state.model_dump_json()
                self._connection.execute("INSERT OR REPLACE INTO items VALUES (?, ?, ?)", row)
        return last

    def since(self, number: int) -> tuple[int, dict[str, ItemState]]:
        """States that came after the one of a number, in their order, and the number of the last.

        Raises:
            OSError: if the file cannot be read.
        """
        with self._lock, failing(self._place, "read"):
            rows = self._connection.execute(
                "SELECT item, number, state FROM items WHERE number > ? ORDER BY number", (number,)
            ).fetchall()
        last = rows[-1][1] if rows else number
        return last, {name: ItemState.model_validate_json(state) for name, _, state in rows}

    def of(self, names: Iterable[str]) -> dict[str, ItemState]:
        """The states of some items, of those that have one.

        Raises:
            OSError: if the file cannot be read.
        """
        with self._lock, failing(self._place, "read"):
            return self._of(names)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _last(self) -> int:
        (last,) = self._connection.execute("SELECT COALESCE(MAX(number), 0) FROM items").fetchone()
        return int(last)

    def _of(self, names: Iterable[str]) -> dict[str, ItemState]:
        found = {}
        for name in names:
            row = self._connection.execute("SELECT state FROM items WHERE item = ?", (name,)).fetchone()
            if row is not None:
                found[name] = ItemState.model_validate_json(row[0])
        return found
