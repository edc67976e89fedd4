"""One pass over the training rows, and all that encoders learn from it."""

# Shapes: n rows of a chunk, u distinct values of a column.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import polars as pl

from fullrank.data.chunk import Chunk, Integers
from fullrank.data.transforms import (
    QUANTILE_POINTS,
    BucketState,
    Moments,
    NumberState,
    RowSample,
    Sample,
    knots_of,
    log2_buckets,
)
from fullrank.data.vocabulary import ValueCounts, Vocabulary
from fullrank.schema import (
    FIRST_VOCABULARY_ID,
    OUT_OF_VOCABULARY_ID,
    Categorical,
    EventId,
    MultiCategorical,
    Schema,
)

Embedded = Categorical | MultiCategorical | EventId

# Buckets of a `quantile` id feature when the schema does not say; as many as fit a percent each.
DEFAULT_QUANTILE_BUCKETS = 100


class Fitted(NamedTuple):
    """What a pass over the training rows gives; see `Encoders`."""

    schema: Schema
    numbers: dict[str, NumberState]
    buckets: dict[str, BucketState]
    vocabularies: dict[str, Vocabulary]


class Uses(NamedTuple):
    """What an id column of a chunk holds: the value `values[codes[i]]`, `weights[i]` times (once if None)."""

    codes: Integers
    values: pl.Series
    weights: npt.NDArray[np.int64] | None

    def counts(self) -> npt.NDArray[np.int64]:
        """Shape (u,): how often each of `values` is there."""
        return np.bincount(self.codes, weights=self.weights, minlength=len(self.values)).astype(np.int64)


def uses(chunk: Chunk) -> Iterator[tuple[str, Uses]]:
    """Every id column of a chunk."""
    for name, column in chunk.ids.items():
        yield name, Uses(column.codes, column.values, None)
    for name, bag in chunk.bags.items():
        weights = None
        if len(bag.lists) != len(bag.list_lengths) or not np.array_equal(bag.lists, np.arange(len(bag.lists))):
            times = np.bincount(bag.lists, minlength=len(bag.list_lengths))[: len(bag.list_lengths)]
            weights = np.repeat(times, bag.list_lengths)
        yield name, Uses(bag.elements.codes, bag.elements.values, weights)


def new_values(
    schema: Schema, known: Mapping[str, Vocabulary], chunks: Iterable[Chunk], directory: Path
) -> dict[str, Vocabulary]:
    """By table: the values that its vocabulary lacks and that occur at least `min_count` times in the chunks."""
    counts = ValueCounts(directory / "counts")
    features = schema.embedded()
    for chunk in chunks:
        for name, used in uses(chunk):
            table = features[name].table_name
            if table in known and len(used.values):
                is_new = known[table].ids(used.values) == OUT_OF_VOCABULARY_ID
                counts.add(table, used.values.filter(pl.Series(is_new)), used.counts()[is_new])
    least = {feature.table_name: feature.min_count for feature in features.values()}
    return {table: counts.vocabulary(table, least[table]) for table in known}


class Fitting:
    """Everything that one pass over the training rows accumulates."""

    def __init__(self, schema: Schema, directory: Path) -> None:
        self.schema = schema
        self.features = schema.embedded()
        self.counts = ValueCounts(directory / "counts")
        self.samples: dict[str, Sample] = {}
        self.ranges: dict[str, tuple[int, int]] = {}
        self.moments = {feature.name: Moments() for feature in schema.numeric}
        rules: dict[str, tuple[str, tuple[Any, ...]]] = {}
        for name, feature in self.features.items():
            rule = (feature.encoding, feature.min_count)
            first, expected = rules.setdefault(feature.table_name, (name, rule))
            if rule != expected:
                raise ValueError(
                    f'features "{first}" and "{name}" share table "{feature.table_name}" but differ in encoding or '
                    f"min_count: {expected} and {rule}"
                )
            if feature.encoding == "quantile":
                self.samples.setdefault(feature.table_name, Sample())
            elif feature.encoding == "hash" and cast(int, feature.num_embeddings) <= FIRST_VOCABULARY_ID:
                raise ValueError(f'feature "{name}": encoding "hash" needs num_embeddings >= {FIRST_VOCABULARY_ID + 1}')
        for numeric in schema.numeric:
            if numeric.transform == "quantile":
                self.samples[f"number {numeric.name}"] = Sample()
        self.rows = RowSample(numeric.name for numeric in schema.numeric if numeric.encoding == "piecewise_linear")

    def add(self, chunk: Chunk) -> None:
        self.rows.add(chunk.numbers)
        for name, numbers in chunk.numbers.items():
            self.moments[name].add(numbers)
            if f"number {name}" in self.samples:
                self.samples[f"number {name}"].add(numbers)
        for name, used in uses(chunk):
            self._add_values(self.features[name], used)

    def _add_values(self, feature: Embedded, used: Uses) -> None:
        table, (codes, values, weights) = feature.table_name, used
        if feature.encoding in ("hash", "identity", "raw") or not len(values):
            return
        if feature.encoding == "quantile":
            numbers = values.cast(pl.Float64).fill_null(float("nan")).to_numpy()[codes]
            self.samples[table].add(numbers if weights is None else np.repeat(numbers, weights))
            return
        counts = used.counts()
        if feature.encoding == "vocabulary":
            self.counts.add(table, values, counts)
            return
        seen = values.cast(pl.Float64).fill_null(float("nan")).to_numpy()[counts > 0]
        buckets = log2_buckets(seen[~np.isnan(seen)])
        if len(buckets):
            low, high = self.ranges.get(table, (int(buckets[0]), int(buckets[0])))
            self.ranges[table] = (min(low, int(buckets.min())), max(high, int(buckets.max())))

    def finish(self) -> Fitted:
        vocabularies: dict[str, Vocabulary] = {}
        buckets: dict[str, BucketState] = {}
        sizes: dict[str, int] = {}
        for feature in self.features.values():
            table = feature.table_name
            if table in sizes:
                continue
            if feature.encoding == "vocabulary":
                vocabularies[table] = self.counts.vocabulary(table, feature.min_count)
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
            knots: list[float] = []
            if numeric.encoding == "piecewise_linear":
                knots = knots_of(self.rows.columns[numeric.name], numeric.bins)
            numbers[numeric.name] = NumberState(
                fill=moments.mean,
                mean=moments.mean,
                deviation=deviation,
                quantiles=tuple(points),
                knots=tuple(knots),
                misses=moments.missing > 0,
            )
        return Fitted(self.schema.with_table_sizes(sizes), numbers, buckets, vocabularies)
