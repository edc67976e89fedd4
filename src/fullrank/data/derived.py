"""Features that a log's own earlier rows give: counters and histories, as they were known when each row happened."""

# Shapes: N rows of the log, n rows of a group of keys or of a chunk, E events of all rows.

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from fullrank.data.arrow import as_series, list_array
from fullrank.data.chunk import Chunk, Mask
from fullrank.data.encoders import Encoders
from fullrank.data.hashing import Hashes, splitmix, stable_hash
from fullrank.data.past import BLOCK_ROWS, Past, RowNumbers, groups, past, whole_seconds
from fullrank.data.tallies import Tally, TallyWriter, rate_towards
from fullrank.data.transforms import transformed_events
from fullrank.schema import EventNumber, Numeric, Schema, Sequence

# Events of the rows that are put together at once.
BLOCK_EVENTS = 1 << 23


def suggested_history(schema: Schema) -> str | None:
    """The feature, as JSON, that a log with users, items, times and an outcome could have in addition."""
    item = schema.keys.item_id
    outcome = next((label.name for label in schema.labels if label.kind == "binary"), None)
    known = schema.keys.user_id is not None and schema.keys.timestamp is not None and outcome is not None
    if not known or schema.sequences or item not in {feature.name for feature in schema.categorical}:
        return None
    return json.dumps({"kind": "sequence", "name": "history", "of": [item], "where": outcome, "length": 50})


class Derived:
    """The counters and derived histories of a schema, over all rows of a log.

    A row knows the rows of which the time lies strictly before its own: not itself, not what happened in the same
    second, not the future; an outcome only once its label's delay is over. The order of rows in the log does not
    matter, but for events of one second, which a later history has in that order. Rows of all splits count: a
    validation row knows earlier training rows, as at serving.

    Numbers of rows lie in files; memory holds some millions of rows, and the distinct seconds of the log.

    Use: `read` all rows, then `with_counters` of each chunk gives what encoders are fitted on; `read_ids` with the
    fitted encoders, then `with_histories` of each encoded chunk.

    Args:
        schema: unfitted, or fitted.
        directory: for the files; made if needed.
        tallies: the file of what rows after the log would know of it; see `TallyWriter`.

    Raises:
        ValueError: if a column that a feature is derived of is not there.
    """

    def __init__(self, schema: Schema, directory: Path, tallies: Path) -> None:
        self._schema = schema
        self._directory = directory
        self._tallies = tallies
        directory.mkdir(parents=True, exist_ok=True)
        self._starts = [0]
        self._files = 0
        self._counters: dict[str, RowNumbers] = {}
        self._events: dict[str, _Events] = {}
        self.rows_in_ties = 0
        features = {feature.name for feature in schema.categorical}
        known = features | {schema.keys.user_id, schema.keys.item_id}
        derived: list[tuple[Numeric | Sequence, set[Any]]] = [(counter, known) for counter in schema.counters]
        derived += [(sequence, features) for sequence in schema.histories]
        for feature, there in derived:
            for name in feature.of:
                if name not in there:
                    raise ValueError(
                        f'feature "{feature.name}": there is no column "{name}" to derive it of; '
                        f"there is {', '.join(sorted(column for column in there if column is not None))}"
                    )

    def read(self, chunks: Iterable[tuple[Chunk, Mask]]) -> None:
        """Take in the log and derive.

        Args:
            chunks: rows in order, and which of them count, shape (n,); the others are nobody's past.
        """
        schema = self._schema
        user = () if schema.keys.user_id is None else (schema.keys.user_id,)
        of = dict.fromkeys([*(counter.of for counter in schema.counters), *([user] if schema.histories else [])])
        names = [feature.label for feature in schema.counters] + [feature.where for feature in schema.histories]
        self._times = self._new(np.int64)
        self._counts = self._new(np.int8)
        self._keys = {columns: (self._new(np.uint64), self._new(np.int8)) for columns in of}
        self._labels = {name: self._new(np.float32) for name in names if name is not None}
        rates = {counter.label: _RateSoFar() for counter in schema.counters if counter.statistic == "rate"}
        end = 0
        for chunk, counts in chunks:
            self._starts.append(self._starts[-1] + chunk.rows)
            times = chunk.keys["timestamp"].to_numpy()
            end = max(end, int(times[counts].max(initial=end)))
            self._times.append(times)
            self._counts.append(counts)
            for columns, (keys, present) in self._keys.items():
                hashes, there = _hashed(chunk, schema, columns)
                keys.append(hashes)
                present.append(there & counts)
            for name, labels in self._labels.items():
                labels.append(chunk.labels[name])
            for label, rate in rates.items():
                assert label is not None
                rate.add(times[counts], chunk.labels[label][counts])
        if schema.counters:
            with TallyWriter(self._tallies, schema, end) as kept:
                for label, rate in rates.items():
                    found = rate.by_time()
                    kept.add(
                        Tally((), "rate", label), *(found[name].to_numpy() for name in ("key", "time", "rows", "label"))
                    )
                for counter in schema.counters:
                    self._counters[counter.name] = self._counted(counter, rates.get(counter.label), kept)
        for sequence in schema.histories:
            self._events[sequence.name] = self._past_events(sequence, user)

    def with_counters(self, chunk: Chunk, place: int) -> Chunk:
        """The chunk at this place of the log with its counters."""
        rows = slice(self._starts[place], self._starts[place + 1])
        numbers = {name: np.array(counter.numbers[rows]) for name, counter in self._counters.items()}
        return replace(chunk, numbers={**chunk.numbers, **numbers})

    def read_ids(self, encoders: Encoders, chunks: Iterable[Chunk]) -> None:
        """Take in what the events of histories are, as the fitted encoders have it."""
        names = dict.fromkeys(name for sequence in self._schema.histories for name in sequence.of)
        if not names:
            return
        features = self._schema.embedded()
        ids = {name: self._new(np.int64 if features[name].is_wide else np.int32) for name in names}
        for chunk in chunks:
            for name, column in ids.items():
                column.append(encoders.ids(name, chunk.ids[name]))
        for sequence in self._schema.histories:
            events = self._events[sequence.name]
            for name in sequence.of:
                events.ids[name] = self._gathered(ids[name].numbers, events.rows.numbers)

    def with_histories(self, frame: pl.DataFrame, place: int) -> Iterator[tuple[slice, pl.DataFrame]]:
        """The encoded chunk at this place with its histories, in pieces of so many events as memory may hold, and the
        rows of the chunk that each is."""
        first = 0
        rows = slice(self._starts[place], self._starts[place + 1])
        lengths = [np.asarray(events.lengths.numbers[rows], dtype=np.int64) for events in self._events.values()]
        total = np.cumsum(np.maximum.reduce(lengths)) if lengths else np.zeros(frame.height, np.int64)
        while first < frame.height:
            before = 0 if first == 0 else total[first - 1]
            last = max(first + 1, int(np.searchsorted(total, before + BLOCK_EVENTS, side="right")))
            piece = slice(first, min(last, frame.height))
            columns = [
                column
                for sequence in self._schema.histories
                for column in self._columns(sequence, slice(rows.start + piece.start, rows.start + piece.stop))
            ]
            yield piece, frame[piece].with_columns(columns)
            first = piece.stop

    def about(self) -> dict[str, Any]:
        """What was derived, for the dataset's record."""
        found: dict[str, Any] = {}
        for name, events in self._events.items():
            lengths = events.lengths.numbers
            found[name] = {
                "events": int(lengths.sum(dtype=np.int64)),
                "rows_with_events": int(np.count_nonzero(lengths)),
                "rows_in_ties": self.rows_in_ties,
            }
        return found

    def _new(self, dtype: npt.DTypeLike) -> RowNumbers:
        return RowNumbers(self._path(), dtype)

    def _path(self) -> Path:
        self._files += 1
        return self._directory / f"{self._files:03d}.numbers"

    def _pasts(self, columns: tuple[str, ...], delay_seconds: float) -> Iterator[tuple[npt.NDArray[np.int64], Past]]:
        """Rows of the log, in order of key and time, and what they know, a group of keys at a time."""
        keys, present = self._keys[columns]
        for rows in groups(keys.numbers, present.numbers):
            found = past(keys.numbers[rows], self._times.numbers[rows], delay_seconds)
            yield rows[found.order], found

    def _counted(self, counter: Numeric, rate: _RateSoFar | None, kept: TallyWriter) -> RowNumbers:
        delay, tally = self._delay(counter.label), Tally.of_counter(counter)
        is_new = kept.wants(tally)
        result = RowNumbers.full(self._path(), self._times.rows, 0.0, np.float64)
        numbers = result.numbers
        if counter.statistic == "rate":
            assert rate is not None
            for start in range(0, len(numbers), BLOCK_ROWS):
                block = slice(start, start + BLOCK_ROWS)
                numbers[block] = rate(self._times.numbers[block] - whole_seconds(delay))
        for rows, known in self._pasts(counter.of, delay):
            labels = None if counter.label is None else self._labels[counter.label].numbers[rows]
            weights, sums = tally.parts(labels, len(rows))
            if is_new:
                kept.add(tally, self._keys[counter.of][0].numbers[rows], self._times.numbers[rows], weights, sums)
            seen = known.total(weights)
            if counter.statistic == "count":
                numbers[rows] = seen
                continue
            numbers[rows] = rate_towards(numbers[rows], seen, known.total(sums), counter.smoothing)
        return result

    def _past_events(self, sequence: Sequence, user: tuple[str, ...]) -> _Events:
        rows_in_log = self._times.rows
        events = _Events(
            self._new(np.int64),
            RowNumbers.full(self._path(), rows_in_log, 0, np.int64),
            RowNumbers.full(self._path(), rows_in_log, 0, np.int32),
        )
        self.rows_in_ties = 0
        before_group = 0
        for rows, known in self._pasts(user, self._delay(sequence.where)):
            if sequence.where is None:
                happened = np.ones(len(rows), dtype=bool)
            else:
                happened = self._labels[sequence.where].numbers[rows] == 1
            before = np.concatenate([[0], np.cumsum(happened)])
            ends = before[known.ends]
            starts = np.maximum(before[known.starts], ends - sequence.max_length)
            events.rows.append(rows[happened])
            events.starts.numbers[rows] = starts + before_group
            events.lengths.numbers[rows] = ends - starts
            before_group += int(before[-1])
            self.rows_in_ties += _in_ties(known, self._times.numbers[rows])
        return events

    def _delay(self, label: str | None) -> float:
        return next((each.delay_seconds for each in self._schema.labels if each.name == label), 0.0)

    def _gathered(self, values: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """The values of these rows of the log, in a file."""
        result = self._new(values.dtype)
        for start in range(0, len(rows), BLOCK_ROWS):
            result.append(values[rows[start : start + BLOCK_ROWS]])
        return result.numbers

    def _columns(self, sequence: Sequence, rows: slice) -> Iterator[pl.Series]:
        events = self._events[sequence.name]
        starts, lengths = events.starts.numbers[rows], events.lengths.numbers[rows].astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        for field in sequence.fields:
            if isinstance(field, EventNumber):
                then = self._times.numbers[events.rows.numbers[places]]
                ages = np.repeat(self._times.numbers[rows], lengths) - then
                elements = transformed_events(field, ages.astype(np.float64))
            else:
                elements = events.ids[field.name][places]
            yield as_series(list_array(offsets, elements), sequence.column(field))


class _Events:
    """The events of all rows' histories: user by user, oldest first.

    Attributes:
        rows: shape (E,): the row of the log that each event is.
        starts, lengths: shape (N,): the history of a row is the events starts:starts + lengths.
        ids: by column, shape (E,): encoded.
    """

    def __init__(self, rows: RowNumbers, starts: RowNumbers, lengths: RowNumbers) -> None:
        self.rows, self.starts, self.lengths = rows, starts, lengths
        self.ids: dict[str, npt.NDArray[Any]] = {}


class _RateSoFar:
    """The mean of a label over all rows before a time."""

    def __init__(self) -> None:
        self._pending: list[pl.DataFrame] = []
        self._merged: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None

    def add(self, times: npt.NDArray[np.int64], labels: npt.NDArray[np.float32]) -> None:
        observed = ~np.isnan(labels)
        self._pending.append(
            pl.DataFrame({"time": times[observed], "label": labels[observed].astype(np.float64)})
            .group_by("time", maintain_order=True)
            .agg(pl.len().cast(pl.Int64).alias("rows"), pl.col("label").sum())
        )
        if sum(frame.height for frame in self._pending[1:]) > max(BLOCK_ROWS, self._pending[0].height):
            self._pending = [self._in_one()]

    def _in_one(self) -> pl.DataFrame:
        return (
            pl.concat(self._pending)
            .group_by("time", maintain_order=True)
            .agg(pl.col("rows").sum(), pl.col("label").sum())
        )

    def by_time(self) -> pl.DataFrame:
        """Each `time` with its `rows` and the sum of their `label`, in order, under one `key` for all."""
        return self._in_one().sort("time").with_columns(pl.lit(0, pl.UInt64).alias("key"))

    def __call__(self, times: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The mean over rows of a time strictly before each of these; NaN where there is none."""
        if self._merged is None:
            found = self.by_time()
            rows, total = np.cumsum(found["rows"].to_numpy()), np.cumsum(found["label"].to_numpy())
            self._merged = found["time"].to_numpy(), np.concatenate([[np.nan], total / rows])
        moments, means = self._merged
        mean: npt.NDArray[np.float64] = means[np.searchsorted(moments, times)]
        return mean


def _in_ties(known: Past, times: npt.NDArray[np.int64]) -> int:
    """Rows that share user and second with another row."""
    if len(times) < 2:
        return 0
    same = (times[1:] == times[:-1]) & (known.starts[1:] == known.starts[:-1])
    return int((np.concatenate([[False], same]) | np.concatenate([same, [False]])).sum())


def _hashed(chunk: Chunk, schema: Schema, columns: tuple[str, ...]) -> tuple[Hashes, Mask]:
    """One hash per row of what these columns hold together, and where none of them is missing."""
    key_names = {schema.keys.user_id: "user_id", schema.keys.item_id: "item_id"}
    state = np.zeros(chunk.rows, dtype=np.uint64)
    there = np.ones(chunk.rows, dtype=bool)
    for name in columns:
        if name in chunk.ids:
            values = stable_hash(chunk.ids[name].values)
            present = values.is_not_null().to_numpy()[chunk.ids[name].codes]
            hashes = values.fill_null(0).to_numpy()[chunk.ids[name].codes]
        else:
            values = stable_hash(chunk.keys[key_names[name]])
            present = values.is_not_null().to_numpy()
            hashes = values.fill_null(0).to_numpy()
        state = splitmix(state ^ hashes)
        there &= present
    return state, there
