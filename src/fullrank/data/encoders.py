"""From the raw values of a log to the numbers and ids that a model reads.

Encoders are fitted on the training part of a log and encode requests with the same code. They are stored as data:
`encoders.json`, and one Parquet file for each vocabulary.
"""

# Shapes: n rows of a frame, u distinct values of a column.

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from fullrank.data import atomic
from fullrank.data.checks import Chunk, Coded, Integers, as_text, check
from fullrank.data.formats.base import RawChunk, as_series
from fullrank.data.hashing import hash_series, hash_text, splitmix
from fullrank.schema import (
    FIRST_VOCABULARY_ID,
    MISSING_ID,
    OUT_OF_VOCABULARY_ID,
    Categorical,
    EventId,
    EventNumber,
    MultiCategorical,
    Numeric,
    Schema,
    describe_errors,
)

FORMAT_VERSION = 1
KEY_COLUMNS = {
    "request_id": "__request_id",
    "user_id": "__user_id",
    "item_id": "__item_id",
    "timestamp": "__timestamp",
    "weight": "__weight",
    "bid": "__bid",
}

Embedded = Categorical | MultiCategorical | EventId

# Buckets of a `quantile` id feature when the schema does not say; as many as fit a percent each.
DEFAULT_QUANTILE_BUCKETS = 100
# Points of the fitted distribution of a `quantile` number.
QUANTILE_POINTS = 1001
# A quantile is exact up to so many training rows, and estimated from a uniform sample of them beyond.
SAMPLE_SIZE = 1 << 18
# Counts at or below this keep a bucket of their own in `log2_bucket`; lower numbers share the lowest.
LOWEST_COUNT = -8
# Distinct values, over all tables, whose counts are held in memory.
MOST_VALUES = 1 << 22
_COUNT_PARTS_BITS = 4
_NO_COUNTS = pl.DataFrame(schema={"value": pl.String, "count": pl.Int64})


def stable_hash(values: pl.Series) -> pl.Series:
    """64-bit hash (UInt64) of each value's text; null stays null. Equal on every machine, version and process.

    Integers hash like their decimal text, and integral floats like integers, so that 42, 42.0 and "42" agree.
    """
    text = as_text(values)
    hashes = pl.Series(values.name, hash_series(text), dtype=pl.UInt64)
    return hashes.zip_with(text.is_not_null(), pl.Series([None], dtype=pl.UInt64)) if text.null_count() else hashes


class Vocabulary:
    """The values of an id table and their row ids: value i has id `FIRST_VOCABULARY_ID + i`.

    Values are found by their 64-bit hash in a sorted array: 12 bytes per value beside the text, no set-up per call.
    Two of a million values share a hash with probability 3e-8; they would share a row.

    Attributes:
        values: text, most frequent first, equals in order of text.
        counts: how often each was seen in training, int64.
    """

    def __init__(self, values: pl.Series, counts: pl.Series) -> None:
        self.values = values
        self.counts = counts
        hashes = hash_series(values)
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._ids = (order + FIRST_VOCABULARY_ID).astype(np.int32)

    def __len__(self) -> int:
        """Rows of the table, reserved ids included."""
        return len(self.values) + FIRST_VOCABULARY_ID

    def ids(self, values: pl.Series) -> Integers:
        """Ids of text values; null is missing, an unknown value is out of vocabulary."""
        if len(values) <= 4:
            return np.array([self.id_of(value) for value in values.to_list()], dtype=np.int32)
        ids = np.full(len(values), OUT_OF_VOCABULARY_ID, dtype=np.int32)
        if len(self._hashes):
            hashes = hash_series(values)
            at = np.searchsorted(self._hashes, hashes)
            np.minimum(at, len(self._hashes) - 1, out=at)
            ids = np.where(self._hashes[at] == hashes, self._ids[at], ids)
        if values.null_count():
            ids[values.is_null().to_numpy()] = MISSING_ID
        return ids

    def id_of(self, value: str | None) -> int:
        """Id of one text value."""
        if value is None:
            return MISSING_ID
        wanted = np.uint64(hash_text(value))
        at = int(self._hashes.searchsorted(wanted))
        if at < len(self._hashes) and self._hashes[at] == wanted:
            return int(self._ids[at])
        return OUT_OF_VOCABULARY_ID


class ValueCounts:
    """How often each value of a table occurs, over chunks.

    When the distinct values become many, their counts so far are put aside in files, cut into parts by the hash of the
    value; the parts are merged one at a time in the end. So memory grows with the values that stay in the vocabulary,
    not with those that are too rare for it.

    Args:
        directory: where files may go; made when needed.
        most_values: distinct values to hold in memory.
    """

    def __init__(self, directory: Path, most_values: int = MOST_VALUES) -> None:
        self._directory = directory
        self._most_values = most_values
        self._merged = _NO_COUNTS
        self._pending: list[pl.DataFrame] = []
        self._pending_values = 0
        self._runs = 0

    def add(self, values: pl.Series, counts: npt.NDArray[np.int64]) -> None:
        """Add counts of distinct (or not) text values; null and zero counts are ignored."""
        frame = pl.DataFrame({"value": values, "count": counts}, schema=_NO_COUNTS.schema)
        self._pending.append(frame.filter((pl.col("count") > 0) & pl.col("value").is_not_null()))
        self._pending_values += self._pending[-1].height
        # Merging only when the new values are as many as the old keeps the total work near-linear.
        if self._pending_values > max(self._merged.height, self._most_values // 8):
            self._merge()

    def _merge(self) -> None:
        self._merged = _summed([self._merged, *self._pending])
        self._pending, self._pending_values = [], 0
        if self._merged.height > self._most_values:
            self._directory.mkdir(parents=True, exist_ok=True)
            parts = pl.Series(hash_series(self._merged["value"]) >> np.uint64(64 - _COUNT_PARTS_BITS))
            for part in range(1 << _COUNT_PARTS_BITS):
                self._merged.filter(parts == part).write_ipc(self._directory / f"{self._runs}-{part}.arrow")
            self._runs += 1
            self._merged = _NO_COUNTS

    def vocabulary(self, min_count: int) -> Vocabulary:
        self._merge()
        kept = []
        for part in range(1 << _COUNT_PARTS_BITS) if self._runs else ():
            files = [self._directory / f"{run}-{part}.arrow" for run in range(self._runs)]
            rest = pl.Series(hash_series(self._merged["value"]) >> np.uint64(64 - _COUNT_PARTS_BITS)) == part
            runs = [pl.read_ipc(file) for file in files]
            kept.append(_summed([self._merged.filter(rest), *runs]).filter(pl.col("count") >= min_count))
        if not self._runs:
            kept.append(self._merged.filter(pl.col("count") >= min_count))
        shutil.rmtree(self._directory, ignore_errors=True)
        values = pl.concat(kept).sort(["count", "value"], descending=[True, False])
        return Vocabulary(values["value"], values["count"])


def _summed(frames: list[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(frames).group_by("value").agg(pl.col("count").sum())


class Sample:
    """A uniform sample of at most `SAMPLE_SIZE` numbers of a stream, the same for the same stream.

    Each number has the hash of its position as a priority; the smallest priorities are kept.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._numbers = np.zeros(0)
        self._priorities = np.zeros(0, dtype=np.uint64)

    def add(self, numbers: npt.NDArray[np.float64]) -> None:
        numbers = numbers[~np.isnan(numbers)]
        position = np.arange(self._seen, self._seen + len(numbers), dtype=np.uint64)
        self._seen += len(numbers)
        self._numbers = np.concatenate([self._numbers, numbers])
        self._priorities = np.concatenate([self._priorities, splitmix(position)])
        if len(self._numbers) > SAMPLE_SIZE:
            keep = np.sort(np.argpartition(self._priorities, SAMPLE_SIZE)[:SAMPLE_SIZE])
            self._numbers, self._priorities = (self._numbers[keep], self._priorities[keep])

    def quantiles(self, points: npt.NDArray[np.float64]) -> list[float]:
        if not len(self._numbers):
            return []
        return [float(q) for q in np.quantile(self._numbers, points)]


class _State(BaseModel):
    """Fitted numbers as they are stored; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NumberState(_State):
    """What a `Numeric` feature needs.

    Attributes:
        fill: raw number that stands for a missing one: the training mean.
        mean, deviation: of the training numbers, for `standard`.
        quantiles: evenly spaced quantiles of the training numbers, lowest and highest included, for `quantile`.
    """

    fill: float = 0.0
    mean: float = 0.0
    deviation: float = 1.0
    quantiles: tuple[float, ...] = ()


class BucketState(_State):
    """What a table with encoding `log2_bucket` (low, high) or `quantile` (edges) needs."""

    low: int = 0
    high: int = 0
    edges: tuple[float, ...] = ()


class _Stored(_State):
    version: Literal[1]
    table_schema: Schema
    numbers: dict[str, NumberState]
    buckets: dict[str, BucketState]
    vocabularies: dict[str, str]


class _Moments:
    """Mean and variance of a stream (Chan et al. 1979: pairwise update)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, numbers: npt.NDArray[np.float64]) -> None:
        numbers = numbers[~np.isnan(numbers)]
        if not len(numbers):
            return
        mean = float(numbers.mean())
        squares = float(((numbers - mean) ** 2).sum())
        total = self.count + len(numbers)
        shift = mean - self.mean
        self.squares += squares + shift * shift * self.count * len(numbers) / total
        self.mean += shift * len(numbers) / total
        self.count = total

    @property
    def deviation(self) -> float:
        return float(np.sqrt(self.squares / self.count)) if self.count else 0.0


def log2_buckets(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Bucket of each count x: floor(log2(x)^2) + 2 for x > 2, else floor(x), not below `LOWEST_COUNT`.

    Source: the squared logarithm is the winning recipe of the Criteo challenge (3 Idiots, 2014); there the counts up
    to 2 are kept as they are, as here, and the logarithm is natural. The base follows `Schema`.
    """
    safe = np.where(np.isnan(numbers), 0.0, numbers)
    squared = np.floor(np.log2(np.maximum(safe, 2.0)) ** 2) + 2
    return np.where(safe > 2, squared, np.maximum(np.floor(safe), LOWEST_COUNT)).astype(np.int64)


class _Fitting:
    """Everything that one pass over the training rows accumulates."""

    def __init__(self, schema: Schema, directory: Path) -> None:
        self.schema = schema
        self.features = schema.embedded()
        tables = {feature.table_name for feature in self.features.values()}
        most_values = max(MOST_VALUES // max(len(tables), 1), 1 << 16)
        self.counts: dict[str, ValueCounts] = {}
        self.samples: dict[str, Sample] = {}
        self.ranges: dict[str, tuple[int, int]] = {}
        self.moments = {feature.name: _Moments() for feature in schema.numeric}
        rules: dict[str, tuple[str, tuple[Any, ...]]] = {}
        for name, feature in self.features.items():
            rule = (feature.encoding, feature.min_count)
            first, expected = rules.setdefault(feature.table_name, (name, rule))
            if rule != expected:
                raise ValueError(
                    f'features "{first}" and "{name}" share table "{feature.table_name}" but differ in encoding or '
                    f"min_count: {expected} and {rule}"
                )
            if feature.encoding == "vocabulary":
                place = directory / f"counts-{len(self.counts)}"
                self.counts.setdefault(feature.table_name, ValueCounts(place, most_values))
            elif feature.encoding == "quantile":
                self.samples.setdefault(feature.table_name, Sample())
            elif feature.encoding == "hash" and cast(int, feature.num_embeddings) <= FIRST_VOCABULARY_ID:
                raise ValueError(f'feature "{name}": encoding "hash" needs num_embeddings >= {FIRST_VOCABULARY_ID + 1}')
        for numeric in schema.numeric:
            if numeric.transform == "quantile":
                self.samples[f"number {numeric.name}"] = Sample()

    def add(self, chunk: Chunk) -> None:
        for name, numbers in chunk.numbers.items():
            self.moments[name].add(numbers)
            if f"number {name}" in self.samples:
                self.samples[f"number {name}"].add(numbers)
        for name, column in chunk.ids.items():
            self._add_values(self.features[name], column.codes, column.values, None)
        for name, bag in chunk.bags.items():
            weights = None
            if len(bag.lists) != len(bag.list_lengths) or not np.array_equal(bag.lists, np.arange(len(bag.lists))):
                uses = np.bincount(bag.lists, minlength=len(bag.list_lengths))[: len(bag.list_lengths)]
                weights = np.repeat(uses, bag.list_lengths)
            self._add_values(self.features[name], bag.elements.codes, bag.elements.values, weights)

    def _add_values(
        self, feature: Embedded, codes: Integers, values: pl.Series, weights: npt.NDArray[np.int64] | None
    ) -> None:
        table = feature.table_name
        if feature.encoding in ("hash", "identity") or not len(values):
            return
        if feature.encoding == "quantile":
            numbers = values.cast(pl.Float64).fill_null(float("nan")).to_numpy()[codes]
            self.samples[table].add(numbers if weights is None else np.repeat(numbers, weights))
            return
        counts = np.bincount(codes, weights=weights, minlength=len(values)).astype(np.int64)
        if feature.encoding == "vocabulary":
            self.counts[table].add(values, counts)
            return
        seen = values.cast(pl.Float64).fill_null(float("nan")).to_numpy()[counts > 0]
        buckets = log2_buckets(seen[~np.isnan(seen)])
        if len(buckets):
            low, high = self.ranges.get(table, (int(buckets[0]), int(buckets[0])))
            self.ranges[table] = (min(low, int(buckets.min())), max(high, int(buckets.max())))

    def finish(self) -> Encoders:
        vocabularies: dict[str, Vocabulary] = {}
        buckets: dict[str, BucketState] = {}
        sizes: dict[str, int] = {}
        for feature in self.features.values():
            table = feature.table_name
            if table in sizes:
                continue
            if feature.encoding == "vocabulary":
                vocabularies[table] = self.counts.pop(table).vocabulary(feature.min_count)
                sizes[table] = len(vocabularies[table])
            elif feature.encoding == "log2_bucket":
                low, high = self.ranges.get(table, (0, 0))
                buckets[table] = BucketState(low=low, high=high)
                sizes[table] = FIRST_VOCABULARY_ID + high - low + 1
            elif feature.encoding == "quantile":
                wanted = (
                    feature.num_embeddings or DEFAULT_QUANTILE_BUCKETS + FIRST_VOCABULARY_ID
                ) - FIRST_VOCABULARY_ID
                edges = self.samples[table].quantiles(np.linspace(0, 1, max(wanted, 1) + 1)[1:-1])
                buckets[table] = BucketState(edges=tuple(sorted(set(edges))))
                sizes[table] = FIRST_VOCABULARY_ID + len(buckets[table].edges) + 1
            else:
                sizes[table] = cast(int, feature.num_embeddings)
        numbers = {}
        for numeric in self.schema.numeric:
            moments = self.moments[numeric.name]
            points: list[float] = []
            if numeric.transform == "quantile":
                points = self.samples[f"number {numeric.name}"].quantiles(np.linspace(0, 1, QUANTILE_POINTS))
            # A constant column has no spread to divide by.
            deviation = moments.deviation if moments.deviation > 0 else 1.0
            numbers[numeric.name] = NumberState(
                fill=moments.mean, mean=moments.mean, deviation=deviation, quantiles=tuple(points)
            )
        return Encoders(self.schema.with_table_sizes(sizes), numbers, buckets, vocabularies)


class Encoders:
    """All fitted encoders of a schema; the same object encodes training data and requests.

    Attributes:
        schema: fitted.
        numbers: state of each `Numeric` feature.
        buckets: state of each table with encoding `log2_bucket` or `quantile`.
        vocabularies: of each table with encoding `vocabulary`.
    """

    def __init__(
        self,
        schema: Schema,
        numbers: Mapping[str, NumberState],
        buckets: Mapping[str, BucketState],
        vocabularies: Mapping[str, Vocabulary],
    ) -> None:
        self.schema = schema
        self.numbers = dict(numbers)
        self.buckets = dict(buckets)
        self.vocabularies = dict(vocabularies)
        self._features = schema.embedded()

    @classmethod
    def fit(cls, schema: Schema, chunks: Iterable[pl.DataFrame]) -> Encoders:
        """Fit on the raw columns of the training part, read once.

        Raises:
            ValueError: if a row is bad; the importer sorts bad rows out before.
        """

        def checked() -> Iterator[Chunk]:
            first_row = 1
            for frame in chunks:
                yield _clean(schema, frame, first_row, allow_missing=False)
                first_row += frame.height

        with tempfile.TemporaryDirectory(prefix="fullrank-") as directory:
            return cls.fit_checked(schema, checked(), Path(directory))

    @classmethod
    def fit_checked(cls, schema: Schema, chunks: Iterable[Chunk], directory: Path) -> Encoders:
        """`fit` on rows that are checked already; counts of very many values go through files in `directory`."""
        fitting = _Fitting(schema, directory)
        for chunk in chunks:
            fitting.add(chunk)
        return fitting.finish()

    @classmethod
    def without_fitting(cls, schema: Schema) -> Encoders:
        """Encoders of a schema that needs no training data.

        Raises:
            ValueError: if an id feature is not hashed or identical, or a number needs fitted state.
        """
        for name, feature in schema.embedded().items():
            if feature.encoding not in ("hash", "identity"):
                raise ValueError(f'feature "{name}": encoding "{feature.encoding}" needs training data to be fitted')
        for numeric in schema.numeric:
            if numeric.transform not in ("none", "log1p"):
                raise ValueError(f'feature "{numeric.name}": transform "{numeric.transform}" needs training data')
        return _Fitting(schema, Path()).finish()

    def transform(self, frame: pl.DataFrame, *, allow_missing: bool = False) -> pl.DataFrame:
        """Encoded columns (features, labels, and keys under their fixed names) of a raw frame.

        Args:
            frame: raw columns, as in `RawChunk.frame`.
            allow_missing: a feature's column that is absent counts as missing in every row, and labels and keys may
                be absent.

        Raises:
            ValueError: if a column is absent or does not hold what the schema says.
        """
        return self.encode(_clean(self.schema, frame, 1, allow_missing=allow_missing))

    def encode(self, chunk: Chunk) -> pl.DataFrame:
        """Encoded columns of checked rows."""
        columns: list[pl.Series] = []
        for numeric in self.schema.numeric:
            raw = chunk.numbers[numeric.name]
            columns.append(_series(numeric.name, self._number(numeric, raw)))
            if numeric.missing_indicator:
                columns.append(_series(f"{numeric.name}__missing", np.isnan(raw).astype(np.float32)))
        for name, column in chunk.ids.items():
            columns.append(_series(name, self._ids(self._features[name], column)))
        for name in self.schema.jagged_keys:
            bag = chunk.bags[name]
            columns.append(_lists(name, bag.lists, bag.offsets, self._ids(self._features[name], bag.elements)))
        for sequence in self.schema.sequences:
            for part in sequence.number_fields:
                name = sequence.column(part)
                events = chunk.event_numbers[name]
                columns.append(_lists(name, events.lists, events.offsets, _event_number(part, events.numbers)))
        columns.extend(_series(name, labels) for name, labels in chunk.labels.items())
        columns.extend(values.alias(KEY_COLUMNS[key]) for key, values in chunk.keys.items())
        columns.extend(_series(name, values) for name, values in chunk.extra.items())
        return pl.DataFrame(columns)

    def _number(self, feature: Numeric, raw: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        state = self.numbers[feature.name]
        numbers = np.where(np.isnan(raw), state.fill, raw)
        if feature.transform == "log1p":
            numbers = np.sign(numbers) * np.log1p(np.abs(numbers))
        elif feature.transform == "standard":
            numbers = (numbers - state.mean) / state.deviation
        elif feature.transform == "quantile":
            numbers = _rank(numbers, np.asarray(state.quantiles))
        return numbers.astype(np.float32)

    def _ids(self, feature: Embedded, column: Coded) -> Integers:
        ids = self._value_ids(feature, column.values)
        return ids[column.codes]

    def _value_ids(self, feature: Embedded, values: pl.Series) -> Integers:
        table = feature.table_name
        if feature.encoding == "vocabulary":
            return self.vocabularies[table].ids(values)
        if feature.encoding in ("log2_bucket", "quantile"):
            numbers = values.cast(pl.Float64).fill_null(float("nan")).to_numpy()
            state = self.buckets[table]
            if feature.encoding == "log2_bucket":
                places = np.clip(log2_buckets(numbers), state.low, state.high) - state.low
            else:
                places = np.searchsorted(np.asarray(state.edges), np.nan_to_num(numbers), side="right")
            return np.where(np.isnan(numbers), MISSING_ID, places + FIRST_VOCABULARY_ID).astype(np.int32)
        size = cast(int, feature.num_embeddings)
        if feature.encoding == "identity":
            return values.cast(pl.Int32).fill_null(MISSING_ID).to_numpy()
        return self._hashed(values, size)

    def _hashed(self, values: pl.Series, size: int) -> Integers:
        room = size - FIRST_VOCABULARY_ID
        if len(values) <= 4:
            return np.array(
                [MISSING_ID if v is None else FIRST_VOCABULARY_ID + hash_text(v) % room for v in values.to_list()],
                dtype=np.int32,
            )
        ids = (hash_series(values) % np.uint64(room)).astype(np.int32) + np.int32(FIRST_VOCABULARY_ID)
        if values.null_count():
            ids[values.is_null().to_numpy()] = MISSING_ID
        return ids

    def save(self, directory: Path) -> None:
        """Write `encoders.json` and the vocabularies into a directory, made if needed; `encoders.json` comes last."""
        directory.mkdir(parents=True, exist_ok=True)
        files: dict[str, str] = {}
        for place, (table, vocabulary) in enumerate(self.vocabularies.items()):
            files[table] = f"vocabulary-{place:03d}.parquet"
            frame = pl.DataFrame({"value": vocabulary.values, "count": vocabulary.counts})
            partial = directory / f".{files[table]}.partial"
            frame.write_parquet(partial, compression="zstd", compression_level=1)
            atomic.replace(partial, directory / files[table])
        stored = _Stored(
            version=1, table_schema=self.schema, numbers=self.numbers, buckets=self.buckets, vocabularies=files
        )
        atomic.write_text(directory / "encoders.json", stored.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Encoders:
        """Read what `save` wrote. Runs no code from the files.

        Raises:
            ValueError: if a file is missing, damaged, of another version, or does not fit the schema.
        """
        path = directory / "encoders.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing: {directory} holds no encoders")
        try:
            text = path.read_text(encoding="utf-8")
            version = json.loads(text).get("version")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        if version != FORMAT_VERSION:
            raise ValueError(f"{path}: version is {version!r}, this release reads {FORMAT_VERSION}")
        try:
            stored = _Stored.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(describe_errors(error, str(path)).splitlines()[0]) from None
        vocabularies = {}
        for table, name in stored.vocabularies.items():
            if Path(name).name != name:
                raise ValueError(f'{path}: vocabulary file "{name}" lies outside the directory')
            vocabularies[table] = _read_vocabulary(directory / name)
        sizes = stored.table_schema.tables()
        for table, vocabulary in vocabularies.items():
            if sizes.get(table) != len(vocabulary):
                raise ValueError(f'{path}: table "{table}" has {sizes.get(table)} rows, its file {len(vocabulary)}')
        encoders = cls(stored.table_schema, stored.numbers, stored.buckets, vocabularies)
        for name, feature in encoders._features.items():
            if feature.encoding in ("hash", "identity"):
                continue
            known = encoders.vocabularies if feature.encoding == "vocabulary" else encoders.buckets
            if feature.table_name not in known:
                raise ValueError(f'{path}: no {feature.encoding} state for feature "{name}"')
        missing = {numeric.name for numeric in encoders.schema.numeric} - set(encoders.numbers)
        if missing:
            raise ValueError(f'{path}: no state for number "{min(missing)}"')
        return encoders


def _read_vocabulary(path: Path) -> Vocabulary:
    try:
        frame = pl.read_parquet(path)
        return Vocabulary(frame["value"].cast(pl.String), frame["count"].cast(pl.Int64))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path} is not a readable vocabulary: {str(error).splitlines()[0]}") from None


def _clean(schema: Schema, frame: pl.DataFrame, first_row: int, *, allow_missing: bool) -> Chunk:
    chunk, bad = check(schema, RawChunk(frame, first_line=first_row), allow_missing=allow_missing)
    if bad.height:
        line, column, reason, value = bad.row(0)
        raise ValueError(f'row {line}: column "{column}" is "{value}": {reason}')
    return chunk


def _rank(numbers: npt.NDArray[np.float64], quantiles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Where each number stands in the training distribution, in [0, 1]; ties take the middle of their range."""
    if not len(quantiles):
        return np.full(len(numbers), 0.5)
    points = np.linspace(0, 1, len(quantiles))
    rising = np.interp(numbers, quantiles, points)
    falling = 1 - np.interp(-numbers, -quantiles[::-1], points)
    return (rising + falling) / 2


def _event_number(part: EventNumber, raw: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    # A missing event number is 0: events have no training mean of their own.
    numbers = np.nan_to_num(raw)
    if part.transform == "log1p":
        numbers = np.sign(numbers) * np.log1p(np.abs(numbers))
    return numbers.astype(np.float32)


def _series(name: str, values: npt.NDArray[Any]) -> pl.Series:
    return pl.Series(name, values)


def _lists(name: str, rows: Integers, offsets: Integers, elements: npt.NDArray[Any]) -> pl.Series:
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(elements))
    if len(rows) != len(lists) or not np.array_equal(rows, np.arange(len(rows))):
        lists = lists.take(pa.array(rows))
    return as_series(lists, name)
