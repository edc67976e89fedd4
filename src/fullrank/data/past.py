"""Which earlier rows each row of a log may know of, in memory that does not grow with the log."""

# Shapes: N rows of the log, n rows of a group of keys.

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

# Rows that are sorted at once, and that are read at once.
GROUP_ROWS = 1 << 22
BLOCK_ROWS = 1 << 20


class RowNumbers:
    """One number per row of a log, in a file: written from the first row to the last, then read anywhere."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._path = path
        self._dtype = np.dtype(dtype)
        self._file: BinaryIO | None = path.open("wb")
        self._numbers: npt.NDArray[Any] | None = None
        self.rows = 0

    @classmethod
    def full(cls, path: Path, rows: int, fill: float, dtype: npt.DTypeLike) -> RowNumbers:
        """The same number in every row, to be changed through `numbers`."""
        column = cls(path, dtype)
        for start in range(0, rows, BLOCK_ROWS):
            column.append(np.full(min(BLOCK_ROWS, rows - start), fill, dtype))
        return column

    def append(self, values: npt.NDArray[Any]) -> None:
        assert self._file is not None, "numbers are not appended once they are read"
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self.rows += len(values)

    @property
    def numbers(self) -> npt.NDArray[Any]:
        """Shape (N,): of all rows; what is written to it goes to the file."""
        if self._numbers is None:
            assert self._file is not None
            self._file.close()
            self._file = None
            # An empty file cannot be mapped.
            self._numbers = (
                np.memmap(self._path, dtype=self._dtype, mode="r+") if self.rows else np.zeros(0, self._dtype)
            )
        return self._numbers


class Past(NamedTuple):
    """What the rows of some keys may know of each other.

    Attributes:
        order: shape (n,): places of the rows, by key, then by time; rows of equal time stay in the log's order.
        starts, ends: shape (n,): the i-th row of that order knows the rows starts[i]:ends[i] of it, and no other.
        lasts: shape (n,): where the rows of its key end in that order.
    """

    order: Rows
    starts: Rows
    ends: Rows

    def total(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Shape (n,): for each row of the order, the sum of the numbers (given in that order) that it knows."""
        before = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        total: npt.NDArray[np.float64] = before[self.ends] - before[self.starts]
        return total


def past(keys: Hashes, times: Rows, delay_seconds: float = 0.0) -> Past:
    """A row knows the rows of its own key of which time plus delay lies strictly before its own time.

    So it knows neither itself, nor what happened in the same second, nor what comes later, in whatever order the log
    has its rows.

    Args:
        keys: shape (n,).
        times: shape (n,), seconds.
        delay_seconds: until what happened is known.
    """
    order = np.lexsort((times, keys))
    rows = len(order)
    if not rows:
        return Past(order, order, order)
    keys, times = keys[order], times[order]
    is_first = np.ones(rows, dtype=bool)
    is_first[1:] = keys[1:] != keys[:-1]
    places = np.arange(rows)
    starts = np.maximum.accumulate(np.where(is_first, places, 0))
    delay = whole_seconds(delay_seconds)
    if delay == 0:
        is_later = is_first.copy()
        is_later[1:] |= times[1:] != times[:-1]
        return Past(order, starts, np.maximum.accumulate(np.where(is_later, places, 0)))
    # Keys and times as one sorted integer: below 2^25 keys and 2^38 seconds, so that the product cannot overflow.
    since = times - times.min()
    base = (np.cumsum(is_first) - 1) * (since.max() + 1)
    ends = np.searchsorted(base + since, base + np.maximum(since - delay, 0))
    return Past(order, starts, ends)


def whole_seconds(delay: float) -> int:
    """The delay as it counts between times that are whole seconds: t + 1.5 < u just when t + 1 < u.

    No log is longer than the longest.
    """
    return int(min(np.floor(delay), 1 << 40))


def groups(keys: npt.NDArray[Any], present: npt.NDArray[Any]) -> Iterator[Rows]:
    """Rows of the log, some millions at a time, so that all rows of a key come together; absent rows in none.

    Args:
        keys: shape (N,), uint64 hashes.
        present: shape (N,), 0 or 1.
    """
    count = np.uint64(len(keys) // GROUP_ROWS + 1)
    for group in range(int(count)):
        found = []
        for start in range(0, len(keys), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            mine = present[block].astype(bool)
            if count > 1:
                mine &= keys[block] % count == np.uint64(group)
            found.append(np.flatnonzero(mine) + start)
        yield np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
