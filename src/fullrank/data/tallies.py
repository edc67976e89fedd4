"""What counters are sums of, and the sums at the end of a log: what rows after it know."""

# Shapes: n rows in order of key, K distinct keys, P rows whose label is not known yet at the log's end.

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from fullrank.data.chunk import Chunk
from fullrank.data.hashing import stable_hash
from fullrank.data.past import whole_seconds
from fullrank.schema import Numeric, Role, Schema

Floats = npt.NDArray[np.float64]

# The file of a dataset: of each tally and key the rows and their sum, `time` being null where they are known at the
# log's end.
TALLIES = "tallies.parquet"
_COLUMNS = pa.schema(
    {"tally": pa.int16(), "key": pa.uint64(), "time": pa.int64(), "rows": pa.int64(), "total": pa.float64()}
)
# Columns of a dataset: the hash of the raw value of an id feature by which counters tell users or items apart.
_HASH = "__hash."


class Tally(NamedTuple):
    """How many rows with the same values count, and the sum of what they say.

    Attributes:
        of: columns; none for all rows, whose mean rates are drawn towards.
        statistic, label: of a counter; a count counts rows with a label of 1, a rate those that have the label.
    """

    of: tuple[str, ...]
    statistic: str
    label: str | None

    @classmethod
    def of_counter(cls, counter: Numeric) -> Self:
        assert counter.statistic is not None
        return cls(counter.of, counter.statistic, counter.label)

    @property
    def prior(self) -> Tally | None:
        """Of all rows, where a rate is drawn towards their mean."""
        return Tally((), self.statistic, self.label) if self.statistic == "rate" else None

    def parts(self, labels: npt.NDArray[np.float32] | None, rows: int) -> tuple[npt.NDArray[np.bool_], Floats]:
        """Which rows count, shape (n,), and what each of these adds to the sum, 0 of the others."""
        if self.statistic == "count":
            return np.ones(rows, dtype=bool) if labels is None else labels == 1, np.zeros(rows)
        assert labels is not None
        observed = ~np.isnan(labels)
        return observed, np.where(observed, labels, 0).astype(np.float64)


def tallies_of(schema: Schema) -> list[Tally]:
    """All that the counters of a schema need, each once."""
    found = [Tally.of_counter(counter) for counter in schema.counters]
    priors = [tally.prior for tally in found if tally.prior is not None]
    return list(dict.fromkeys([*priors, *found]))


def delay_of(schema: Schema, tally: Tally) -> int:
    """Seconds until the label of a row is known."""
    return next((whole_seconds(each.delay_seconds) for each in schema.labels if each.name == tally.label), 0)


def rate_towards(prior: Floats, rows: Floats, total: Floats, smoothing: float) -> Floats:
    """The mean of a label over the rows of a key, drawn towards the mean of all rows.

    Nothing known of the key is the mean of all rows; nothing known at all, NaN, stays missing.
    """
    with np.errstate(invalid="ignore"):
        drawn = (total + smoothing * prior) / (rows + smoothing)
    return np.where(rows > 0, drawn, prior)


class TallyWriter:
    """Writes the sums at the end of a log to a Parquet file, some millions of rows at a time.

    Args:
        end: time of the log's last row. What is known at any time after it is summed up for each key, other rows are
            kept one by one.
    """

    def __init__(self, path: Path, schema: Schema, end: int) -> None:
        self._file = pq.ParquetWriter(path, _COLUMNS, compression="zstd")
        self._schema, self._end = schema, end
        self._places = {tally: place for place, tally in enumerate(tallies_of(schema))}
        self._written: set[Tally] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def wants(self, tally: Tally) -> bool:
        """Whether it is asked for the first time."""
        is_new = tally not in self._written
        self._written.add(tally)
        return is_new

    def add(
        self,
        tally: Tally,
        keys: npt.NDArray[np.uint64],
        times: npt.NDArray[np.int64],
        rows: npt.NDArray[Any],
        totals: Floats,
    ) -> None:
        """Add rows in order of key, shape (n,), all there are of each: how many rows each stands for, and their sum."""
        if not len(keys):
            return
        pending = (times + delay_of(self._schema, tally) > self._end) & (rows > 0)
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        known = np.add.reduceat(np.where(pending, 0, rows.astype(np.int64)), first)
        total = np.add.reduceat(np.where(pending, 0.0, totals), first)
        some = known > 0
        self._write(tally, keys[first][some], None, known[some], total[some])
        self._write(tally, keys[pending], times[pending], rows[pending].astype(np.int64), totals[pending])

    def _write(
        self,
        tally: Tally,
        keys: npt.NDArray[np.uint64],
        times: npt.NDArray[np.int64] | None,
        rows: npt.NDArray[np.int64],
        totals: Floats,
    ) -> None:
        place = pa.array(np.full(len(keys), self._places[tally], dtype=np.int16))
        time = pa.nulls(len(keys), pa.int64()) if times is None else pa.array(times)
        self._file.write_batch(
            pa.RecordBatch.from_arrays([place, pa.array(keys), time, pa.array(rows), pa.array(totals)], schema=_COLUMNS)
        )


def hash_column(name: str) -> str:
    """Column of a dataset and of catalogues: `stable_hash` of the raw value of an id feature, null where it is
    missing."""
    return f"{_HASH}{name}"


def is_hash_column(name: str) -> bool:
    return name.startswith(_HASH)


def hashed_features(schema: Schema) -> dict[str, Role]:
    """The features of users and items, beside their ids, by whose values counters of users or items count."""
    roles, keys = schema.counted_roles(), {schema.keys.user_id, schema.keys.item_id}
    pairs = {counter.name for counter in schema.pair_counters}
    names = dict.fromkeys(name for counter in schema.counters if counter.name not in pairs for name in counter.of)
    return {name: roles[name] for name in names if name not in keys and roles[name] != "context"}


def value_hashes(chunk: Chunk, names: Iterable[str]) -> list[pl.Series]:
    """Hash columns of some id features of a chunk."""
    return [
        stable_hash(chunk.ids[name].values).gather(chunk.ids[name].codes).alias(hash_column(name)) for name in names
    ]
