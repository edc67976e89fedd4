"""What was known of a key at a time: the last events before it, of one version, that had arrived."""

# Shapes: n stored events, Q queries, N events found, L most events of a query, C bytes of a code, D width.

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fullrank.transfer.codec import unpack

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

SECOND = 1_000_000
# Events looked at in one go: some 200 MB of intermediate arrays.
EVENTS_AT_ONCE = 1 << 21
# No event is excluded, in a column of those that are.
NO_EVENT = np.iinfo(np.int64).min


@dataclass(frozen=True)
class HistorySequence:
    """Events of each query, oldest first.

    Attributes:
        codes: shape (N, C), those of query q at `offsets[q]:offsets[q + 1]`.
        offsets: shape (Q + 1,).
        age: microseconds from each event to its query's time, shape (N,).
        event_ids: shape (N,).
        versions: place of each event's version in `known_versions`, shape (N,).
        known_versions: names.
        dim, bits, prefix: of the codes, and how much of them `values` shows.
    """

    codes: Bytes
    offsets: Ints
    age: Ints
    event_ids: Ints
    versions: npt.NDArray[np.int16]
    known_versions: tuple[str, ...]
    dim: int
    bits: int
    prefix: int

    @property
    def lengths(self) -> Ints:
        """Shape (Q,)."""
        return np.diff(self.offsets)

    @cached_property
    def values(self) -> Floats:
        """z of the events, shape (N, prefix)."""
        return unpack(self.codes, self.dim, self.bits)[:, : self.prefix]

    def padded(self, length: int) -> tuple[Bytes, Floats]:
        """Codes_QLC and ages_QL in seconds of the last `length` events, the last in the last place; where there is no
        event 0 and NaN."""
        queries = len(self.offsets) - 1
        codes_QLC = np.zeros((queries, length, self.codes.shape[1]), np.uint8)
        age_QL = np.full((queries, length), np.nan, np.float32)
        query = np.repeat(np.arange(queries), self.lengths)
        place = length - (np.repeat(self.offsets[1:], self.lengths) - np.arange(len(query)))
        kept = place >= 0
        codes_QLC[query[kept], place[kept]] = self.codes[kept]
        age_QL[query[kept], place[kept]] = self.age[kept] / SECOND
        return codes_QLC, age_QL


class Block:
    """Events in memory, sorted by key, time, id and version: the index is their order and where each key begins.

    An event that is there twice is the one that arrived first.
    """

    def __init__(
        self,
        key: Ints,
        event_id: Ints,
        time: Ints,
        available: Ints,
        version: npt.NDArray[np.int16],
        codes: Bytes,
    ) -> None:
        order = np.lexsort((available, version, event_id, time, key))
        columns = [column[order] for column in (key, time, event_id, version, available)]
        same = np.ones(max(len(order) - 1, 0), bool)
        for column in columns[:-1]:
            same &= column[1:] == column[:-1]
        if (same & (columns[-1][1:] == columns[-1][:-1])).any():
            # Two codes of one event that arrived at once: the order in which they were written decides nothing.
            by_code = np.unique(np.ascontiguousarray(codes).view(f"V{codes.shape[1]}").ravel(), return_inverse=True)[1]
            order = np.lexsort((by_code, available, version, event_id, time, key))
        order = order[np.concatenate([[True], ~same])] if len(order) else order
        self.event_id, self.time, self.available = event_id[order], time[order], available[order]
        self.version, self.codes = version[order], codes[order]
        self.keys, begin = np.unique(key[order], return_index=True)
        self.begin = np.append(begin, len(order))

    @property
    def nbytes(self) -> int:
        columns = (self.event_id, self.time, self.available, self.version, self.codes, self.keys, self.begin)
        return sum(column.nbytes for column in columns)

    def find(self, keys: Ints, as_of: Ints, since: Ints, exclude: Ints | None, limit: int) -> tuple[Ints, Ints]:
        """Places of the events of each query, oldest first, and how many each has.

        Args:
            keys, as_of, since, exclude: shape (Q,); events with since <= time < as_of that had arrived at as_of.
        """
        queries = len(keys)
        if not len(self.time) or limit == 0:
            return np.empty(0, np.int64), np.zeros(queries, np.int64)
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        known = self.keys[place] == keys
        first = np.where(known, self.begin[place], 0)
        low = self._first_not_before(first, np.where(known, self.begin[place + 1], 0), since)
        high = self._first_not_before(low, np.where(known, self.begin[place + 1], 0), as_of)
        lengths = np.zeros(queries, np.int64)
        found: list[tuple[Ints, Ints]] = []
        asked, reach = np.flatnonzero(high > low), limit + 2
        while len(asked):
            short = []
            for part in _parts(asked, np.minimum(high[asked] - low[asked], reach)):
                places, counts = self._last(low[part], high[part], as_of[part], exclude, part, reach, limit)
                more = (counts < limit) & (high[part] - low[part] > reach)
                short.append(part[more])
                done = ~np.repeat(more, counts)
                lengths[part[~more]] = counts[~more]
                found.append((part[~more], places[done]))
            asked, reach = np.concatenate(short), 4 * reach
        offsets = np.cumsum(lengths) - lengths
        result = np.empty(int(lengths.sum()), np.int64)
        for part, places in found:
            result[spread(offsets[part], lengths[part])] = places
        return result, lengths

    def _last(
        self, low: Ints, high: Ints, as_of: Ints, exclude: Ints | None, part: Ints, reach: int, limit: int
    ) -> tuple[Ints, Ints]:
        """Of the last `reach` events of each query those that count, at most `limit`."""
        low = np.maximum(low, high - reach)
        counts = high - low
        places = spread(low, counts)
        counted = self.available[places] <= np.repeat(as_of, counts)
        if exclude is not None:
            counted &= self.event_id[places] != np.repeat(exclude[part], counts)
        running = np.concatenate([[0], np.cumsum(counted)])
        ends = np.cumsum(counts)
        total = running[ends] - running[ends - counts]
        # How many that count come after this one in its query.
        after = np.repeat(running[ends], counts) - running[1:]
        counted &= after < limit
        return places[counted], np.minimum(total, limit)

    def _first_not_before(self, low: Ints, high: Ints, time: Ints) -> Ints:
        """First place in [low, high) of an event that is not before a time; `high` if there is none."""
        low, high = low.copy(), high.copy()
        last = len(self.time) - 1
        while (searching := low < high).any():
            middle = (low + high) >> 1
            before = searching & (self.time[np.minimum(middle, last)] < time)
            high = np.where(searching & ~before, middle, high)
            low = np.where(before, middle + 1, low)
        return low


def spread(begin: Ints, counts: Ints) -> Ints:
    """begin[0], begin[0] + 1, ... (counts[0] of them), begin[1], ..."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(begin - ends + counts, counts)


def _parts(asked: Ints, counts: Ints) -> list[Ints]:
    """Queries in runs of at most `EVENTS_AT_ONCE` events, or of one query."""
    number = np.cumsum(counts) // EVENTS_AT_ONCE
    return np.split(asked, np.flatnonzero(np.diff(number)) + 1)
