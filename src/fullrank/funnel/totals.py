"""Sums that counters are made of: those at a log's end, and what events after it add."""

# Shapes: K keys of a tally, P rows that are not known yet at the log's end, n keys that are asked for.

from __future__ import annotations

import heapq
import threading
from bisect import insort
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from fullrank.data.tallies import Floats, delay_of, tallies_of
from fullrank.schema import Schema

Hashes = npt.NDArray[np.uint64]
# When all is known.
FOREVER = 1 << 62
_NAMES = ("keys", "rows", "totals", "pending_places", "pending_times", "pending_rows", "pending_totals")


class AtEnd:
    """A tally at the end of the log.

    Args:
        keys, rows, totals: shape (K,), in order of key.
        places, times, more_rows, more_totals: shape (P,), of rows that are not known yet: whose they are among the
            keys, and when they happened, in order of both.
    """

    def __init__(
        self,
        delay: int,
        keys: Hashes,
        rows: npt.NDArray[np.int64],
        totals: Floats,
        places: npt.NDArray[np.int64],
        times: npt.NDArray[np.int64],
        more_rows: npt.NDArray[np.int64],
        more_totals: Floats,
    ) -> None:
        self._delay, self._keys, self._rows, self._totals = delay, keys, rows, totals
        self._places, self._times = places, times
        self._rows_before = np.concatenate([[0], np.cumsum(more_rows)])
        self._totals_before = np.concatenate([[0.0], np.cumsum(more_totals)])
        self._pending = more_rows, more_totals

    def of(self, key: int, now: int) -> tuple[int, float]:
        """Rows of a key and their sum, as they are known to a row of this time."""
        wanted = np.uint64(key)
        place = int(self._keys.searchsorted(wanted))
        if place == len(self._keys) or self._keys[place] != wanted:
            return 0, 0.0
        rows, total = int(self._rows[place]), float(self._totals[place])
        if len(self._places):
            first, end = self._places.searchsorted([place, place + 1])
            last = first + self._times[first:end].searchsorted(now - self._delay)
            rows += int(self._rows_before[last] - self._rows_before[first])
            total += float(self._totals_before[last] - self._totals_before[first])
        return rows, total

    def of_all(self, keys: Hashes, now: int) -> tuple[Floats, Floats]:
        """The same of many keys, shape (n,)."""
        if not len(self._keys):
            return np.zeros(len(keys)), np.zeros(len(keys))
        places = np.minimum(self._keys.searchsorted(keys), len(self._keys) - 1)
        there = self._keys[places] == keys
        rows, totals = self._rows[places].astype(np.float64), self._totals[places].copy()
        if len(self._places):
            known = self._times + self._delay < now
            for sums, more in zip((rows, totals), self._pending, strict=True):
                sums += np.bincount(self._places[known], more[known], len(self._keys))[places]
        return np.where(there, rows, 0), np.where(there, totals, 0)


class _Since:
    """What was added to a key of a tally: what is known to all, and what is not, from a place on, in order of time."""

    __slots__ = ("first", "pending", "rows", "total")

    def __init__(self) -> None:
        self.rows, self.total = 0, 0.0
        self.pending: list[tuple[int, float]] = []
        self.first = 0

    def sum_up(self) -> None:
        """The first that is pending is known."""
        _, value = self.pending[self.first]
        self.rows, self.total = self.rows + 1, self.total + value
        self.first += 1
        if 2 * self.first >= len(self.pending):
            del self.pending[: self.first]
            self.first = 0


class Totals:
    """What events after the log's end add to the tallies; threads read it while one writes.

    Args:
        delays: seconds of each tally until a label is known.

    Attributes:
        lock: to be held by who reads several numbers that belong together.
        number: of the store: all events up to it were added.
        deletions: of the store, when they were.
        time: what was known to a row of this time is summed up; None while nobody adds what happens.
    """

    def __init__(self, delays: Sequence[int]) -> None:
        self.lock = threading.Lock()
        self.number, self.deletions, self.time = 0, 0, None
        self._delays = delays
        self._since: list[dict[int, _Since]] = [{} for _ in delays]
        self._waiting: list[tuple[int, int, int]] = []

    time: int | None

    def add(self, place: int, key: int, time: int, value: float) -> None:
        """Add a row of a key to the tally at a place."""
        since = self._since[place].setdefault(key, _Since())
        known = time + self._delays[place]
        if self.time is not None and known < self.time:
            since.rows, since.total = since.rows + 1, since.total + value
        else:
            insort(since.pending, (known, value), since.first)
            heapq.heappush(self._waiting, (known, place, key))

    def advance(self, now: int) -> bool:
        """Sum up what is known to a row of this time; whether that is more than before."""
        before = len(self._waiting)
        self.time = now if self.time is None else max(now, self.time)
        while self._waiting and self._waiting[0][0] < self.time:
            _, place, key = heapq.heappop(self._waiting)
            self._since[place][key].sum_up()
        return len(self._waiting) < before

    def of(self, place: int, key: int, now: int) -> tuple[int, float]:
        """Rows of a key and their sum, as they are known to a row of this time, or of `time` if that is later."""
        since = self._since[place].get(key)
        if since is None:
            return 0, 0.0
        rows, total = since.rows, since.total
        for known, value in islice(since.pending, since.first, None):
            if known >= now:
                break
            rows, total = rows + 1, total + value
        return rows, total

    def of_all(self, place: int) -> tuple[Hashes, Floats, Floats]:
        """All keys, in order, with what is summed up of them."""
        since = self._since[place]
        keys = np.fromiter(since, np.uint64, len(since))
        order = np.argsort(keys)
        found = [
            np.fromiter((getattr(each, name) for each in since.values()), np.float64) for name in ("rows", "total")
        ]
        return keys[order], found[0][order], found[1][order]

    def become(self, other: Totals) -> None:
        """Take over what another one has come to, at once."""
        with self.lock:
            self.number, self.deletions, self.time = other.number, other.deletions, other.time
            self._since, self._waiting = other._since, other._waiting


class CounterState:
    """The tallies of a log at its end.

    Args:
        tensors: by tally and part, see `of`: of each key, as int64, the rows and their sum, then the same of rows that
            are not known yet.
        end: time of the log's last row.

    Attributes:
        at_end: by place of the tally.
        last_known: when the last label of the log is known.

    Raises:
        ValueError: if a part is missing or does not fit.
    """

    def __init__(self, schema: Schema, tensors: Mapping[str, Tensor], end: int) -> None:
        self.tallies, self.tensors, self.end = tallies_of(schema), dict(tensors), end
        self.delays = [delay_of(schema, tally) for tally in self.tallies]
        self.at_end: list[AtEnd] = []
        self.last_known = end
        wanted = {f"{place}.{name}" for place in range(len(self.tallies)) for name in _NAMES}
        if wanted != tensors.keys():
            raise ValueError(f"expected the tensors {', '.join(sorted(wanted))}")
        for place, delay in enumerate(self.delays):
            parts = [tensors[f"{place}.{name}"] for name in _NAMES]
            floats = [part.dtype == torch.float64 for part in parts]
            if floats != [name.endswith("totals") for name in _NAMES] or any(part.dim() != 1 for part in parts):
                raise ValueError(f"{place}: expected lists of 64-bit numbers")
            keys, rows, totals, places, times, more_rows, more_totals = (part.numpy() for part in parts)
            keys = keys.view(np.uint64)
            alike = [len({len(part) for part in parts[:3]}), len({len(part) for part in parts[3:]})] == [1, 1]
            if not alike or (keys[1:] <= keys[:-1]).any() or (np.diff(places) < 0).any():
                raise ValueError(f"{place}: keys are not in order, or lists differ in length")
            if len(places) and (places[0] < 0 or places[-1] >= len(keys)):
                raise ValueError(f"{place}: a row belongs to no key")
            self.last_known = max(self.last_known, int(times.max(initial=end)) + delay)
            self.at_end.append(AtEnd(delay, keys, rows, totals, places, times, more_rows, more_totals))

    @classmethod
    def read(cls, path: Path, schema: Schema, end: int) -> Self:
        """That of a dataset.

        Raises:
            ValueError: if the file is damaged.
        """
        tensors: dict[str, Tensor] = {}
        for place in range(len(tallies_of(schema))):
            try:
                found = pl.scan_parquet(path, glob=False).filter(pl.col("tally") == place).collect()
            except (pl.exceptions.PolarsError, OSError) as error:
                raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
            keys = found["key"].unique().sort().to_numpy()
            known, pending = found.filter(pl.col("time").is_null()), found.filter(pl.col("time").is_not_null())
            at = np.searchsorted(keys, known["key"].to_numpy())
            rows, totals = np.zeros(len(keys), np.int64), np.zeros(len(keys))
            rows[at], totals[at] = known["rows"].to_numpy(), known["total"].to_numpy()
            pending = pending.sort("key", "time", maintain_order=True)
            parts = [
                *(keys.view(np.int64), rows, totals, np.searchsorted(keys, pending["key"].to_numpy())),
                *(pending[name].to_numpy() for name in ("time", "rows", "total")),
            ]
            for name, part in zip(_NAMES, parts, strict=True):
                tensors[f"{place}.{name}"] = torch.from_numpy(np.array(part))
        return cls(schema, tensors, end)
