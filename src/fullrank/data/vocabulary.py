"""The values of an id table: counting them over a log of any size, and finding their ids."""

# Shapes: u distinct values.

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from fullrank.data.chunk import Integers
from fullrank.data.hashing import hash_series, hash_text
from fullrank.schema import FIRST_VOCABULARY_ID, MISSING_ID, OUT_OF_VOCABULARY_ID

# Values, over all tables, whose counts are held in memory while a log is read.
MOST_VALUES = 1 << 22
# Parts into which counts in files are cut, to be merged one at a time.
_PARTS_BITS = 5
# Hashes in order, the id of each, and where the hashes with the same highest bits begin.
_Index = tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32], npt.NDArray[np.int32]]
_NO_COUNTS = pl.DataFrame(schema={"value": pl.String, "count": pl.Int64})


class Vocabulary:
    """The values of an id table and their row ids: value i has id `FIRST_VOCABULARY_ID + i`.

    Values are found by their 64-bit hash in a sorted array: 16 to 20 bytes per value beside the text, no set-up per
    call.
    Two of a million values share a hash with probability 3e-8; they would share a row.

    Args:
        index: of another vocabulary of the same values; default: it is made.

    Attributes:
        values: text, most frequent first, equals in order of text; behind them, likewise, those that a later log added.
        counts: how often each was seen in training, int64, of the log that it came with.
    """

    def __init__(self, values: pl.Series, counts: pl.Series, index: _Index | None = None) -> None:
        self.values = values
        self.counts = counts
        self._shift = np.uint64(64 - max(len(values).bit_length(), 1))
        self._hashes, self._ids, self._first = self._made_index() if index is None else index

    def _made_index(self) -> _Index:
        hashes = hash_series(self.values)
        order = np.argsort(hashes, kind="stable")
        # One more of the highest hash, so that looking for any hash ends.
        hashes = np.append(hashes[order], np.uint64(2**64 - 1))
        ids = np.append(order + FIRST_VOCABULARY_ID, OUT_OF_VOCABULARY_ID).astype(np.int32)
        # Where the hashes with the same highest bits begin; there is less than one value for each such beginning.
        beginnings = np.arange(1 << (64 - int(self._shift)), dtype=np.uint64) << self._shift
        return hashes, ids, np.searchsorted(hashes, beginnings).astype(np.int32)

    @property
    def index(self) -> _Index:
        """What values are found by, for a vocabulary of the same values."""
        return self._hashes, self._ids, self._first

    def __len__(self) -> int:
        """Rows of the table, reserved ids included."""
        return len(self.values) + FIRST_VOCABULARY_ID

    @property
    def id_counts(self) -> npt.NDArray[np.int64]:
        """How often each id was seen, shape (rows,); 0 of the reserved ids, which are no values."""
        return np.concatenate([np.zeros(FIRST_VOCABULARY_ID, np.int64), self.counts.to_numpy()])

    def extended(self, new: Vocabulary) -> Vocabulary:
        """The same ids, and behind them those of values that are not in it yet."""
        if not len(new.values):
            return self
        return Vocabulary(pl.concat([self.values, new.values]), pl.concat([self.counts, new.counts]))

    def begins(self, other: Vocabulary) -> bool:
        """Whether the other is this one, or this one extended."""
        return self.values.equals(other.values.head(len(self.values)))

    def ids(self, values: pl.Series) -> Integers:
        """Ids of text values; null is missing, an unknown value is out of vocabulary."""
        if len(values) <= 4:
            return np.array([self.id_of(value) for value in values.to_list()], dtype=np.int32)
        hashes = hash_series(values)
        at = self._first[hashes >> self._shift]
        behind = np.flatnonzero(self._hashes[at] < hashes)
        while len(behind):
            at[behind] += 1
            behind = behind[self._hashes[at[behind]] < hashes[behind]]
        ids = np.where(self._hashes[at] == hashes, self._ids[at], np.int32(OUT_OF_VOCABULARY_ID))
        if values.null_count():
            ids[values.is_null().to_numpy()] = MISSING_ID
        return ids

    def id_of(self, value: str | None) -> int:
        """Id of one text value."""
        if value is None:
            return MISSING_ID
        wanted = np.uint64(hash_text(value))
        at = int(self._hashes.searchsorted(wanted))
        return int(self._ids[at]) if self._hashes[at] == wanted else OUT_OF_VOCABULARY_ID


class ValueCounts:
    """How often each value of each table occurs, over chunks.

    When the distinct values become many, those of the fullest table are put aside in a file, cut into parts by a hash
    of the value; the parts are merged one at a time in the end. So memory grows with the values that stay in a
    vocabulary, not with those that are too rare for it.

    Args:
        directory: where files may go; made when needed.
        most_values: values to hold in memory, over all tables.
    """

    def __init__(self, directory: Path, most_values: int = MOST_VALUES) -> None:
        self._directory = directory
        self._most_values = most_values
        self._held: dict[str, list[pl.DataFrame]] = {}
        self._sizes: dict[str, int] = {}
        self._files: dict[str, list[Path]] = {}

    def add(self, table: str, values: pl.Series, counts: npt.NDArray[np.int64]) -> None:
        """Add counts of distinct (or not) text values; null and zero counts are ignored."""
        frame = pl.DataFrame({"value": values, "count": counts}, schema=_NO_COUNTS.schema)
        frame = frame.filter((pl.col("count") > 0) & pl.col("value").is_not_null())
        self._held.setdefault(table, []).append(frame)
        self._sizes[table] = self._sizes.get(table, 0) + frame.height
        while sum(self._sizes.values()) > self._most_values:
            self._shrink(max(self._sizes, key=self._sizes.__getitem__))

    def _shrink(self, table: str) -> None:
        """Add up equal values; put all aside unless that leaves less than half of them."""
        summed = _summed(self._held[table])
        if 2 * summed.height < self._sizes[table]:
            self._held[table], self._sizes[table] = [summed], summed.height
            return
        self._held[table], self._sizes[table] = [_NO_COUNTS], 0
        self._directory.mkdir(parents=True, exist_ok=True)
        files = self._files.setdefault(table, [])
        files.append(self._directory / f"{list(self._files).index(table)}-{len(files)}.arrow")
        parts = _parts(summed)
        with pa.OSFile(str(files[-1]), "wb") as sink, pa.ipc.new_file(sink, _batch(_NO_COUNTS).schema) as file:
            for part in range(1 << _PARTS_BITS):
                file.write_batch(_batch(summed.filter(parts == part)))

    def vocabulary(self, table: str, min_count: int) -> Vocabulary:
        """The values of a table that occur often enough. Lets go of the table's counts."""
        frequent = pl.col("count") >= min_count
        held = _summed(self._held.pop(table, [_NO_COUNTS]))
        self._sizes.pop(table, None)
        files = self._files.pop(table, [])
        if files:
            parts = _parts(held)
            kept = []
            for part in range(1 << _PARTS_BITS):
                aside = [_read_part(file, part) for file in files]
                kept.append(_summed([held.filter(parts == part), *aside]).filter(frequent))
            held = pl.concat(kept)
            for file in files:
                file.unlink()
        ordered = held.filter(frequent).sort(["count", "value"], descending=[True, False])
        return Vocabulary(ordered["value"], ordered["count"])


def _summed(frames: list[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(frames).group_by("value").agg(pl.col("count").sum())


def _parts(frame: pl.DataFrame) -> pl.Series:
    return frame["value"].hash() // (1 << (64 - _PARTS_BITS))


def _batch(frame: pl.DataFrame) -> pa.RecordBatch:
    return pa.record_batch([frame[name].rechunk().to_arrow() for name in frame.columns], names=frame.columns)


def _read_part(path: Path, part: int) -> pl.DataFrame:
    with pa.OSFile(str(path), "rb") as source:
        frame = pl.from_arrow(pa.ipc.open_file(source).get_batch(part))
    assert isinstance(frame, pl.DataFrame)
    return frame
