"""From numbers to what a model reads: transforms and buckets, and the statistics that they are fitted on."""

# Shapes: n numbers of a column.

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, FiniteFloat, model_validator

from fullrank.data.chunk import Floats, Integers
from fullrank.data.hashing import splitmix
from fullrank.schema import FIRST_VOCABULARY_ID, MISSING_ID, EventNumber, Numeric

# Points of the fitted distribution of a `quantile` number.
QUANTILE_POINTS = 1001
# A quantile is exact up to so many training rows, and estimated from a uniform sample of them beyond.
SAMPLE_SIZE = 1 << 18
# Bins of `piecewise_linear` numbers are found in so many rows.
KNOT_SAMPLE_SIZE = 1 << 16
# Place among its bins of a `piecewise_linear` number that is missing.
MISSING_PLACE = -1.0
# Counts at or below this keep a bucket of their own in `log2_bucket`; lower numbers share the lowest.
LOWEST_COUNT = -8


class State(BaseModel):
    """Fitted numbers as they are stored; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NumberState(State):
    """What a `Numeric` feature needs.

    Attributes:
        fill: raw number that stands for a missing one: the training mean.
        mean, deviation: of the training numbers, for `standard`.
        quantiles: evenly spaced quantiles of the training numbers, lowest and highest included, for `quantile`.
        knots: raw numbers where bins of `piecewise_linear` begin and end, increasing.
        misses: whether training rows miss the number, so that a model of `piecewise_linear` knows what that means.
    """

    fill: float = 0.0
    mean: float = 0.0
    deviation: float = 1.0
    quantiles: tuple[float, ...] = ()
    knots: tuple[FiniteFloat, ...] = ()
    misses: bool = False

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if any(low >= high for low, high in itertools.pairwise(self.knots)):
            raise ValueError("knots do not increase")
        return self


class BucketState(State):
    """What a table with encoding `log2_bucket` (low, high) or `quantile` (edges) needs."""

    low: int = 0
    high: int = 0
    edges: tuple[float, ...] = ()


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
        priorities = splitmix(np.arange(self._seen, self._seen + len(numbers), dtype=np.uint64))
        self._seen += len(numbers)
        if len(self._numbers) == SAMPLE_SIZE:
            chosen = priorities < self._priorities.max()
            numbers, priorities = numbers[chosen], priorities[chosen]
        self._numbers = np.concatenate([self._numbers, numbers])
        self._priorities = np.concatenate([self._priorities, priorities])
        if len(self._numbers) > SAMPLE_SIZE:
            keep = np.sort(np.argpartition(self._priorities, SAMPLE_SIZE)[:SAMPLE_SIZE])
            self._numbers, self._priorities = (self._numbers[keep], self._priorities[keep])

    def quantiles(self, points: npt.NDArray[np.float64]) -> list[float]:
        if not len(self._numbers):
            return []
        return [float(q) for q in np.quantile(self._numbers, points)]


class RowSample:
    """Some columns of a uniform sample of at most `KNOT_SAMPLE_SIZE` rows of a stream, the same for the same stream.

    Rows have priorities as in `Sample`; all columns share them, so that many columns cost little more than one.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._seen = 0
        self._priorities = np.zeros(0, dtype=np.uint64)
        self.columns = {name: np.zeros(0) for name in names}

    def add(self, columns: Mapping[str, Floats]) -> None:
        if not self.columns:
            return
        rows = len(next(iter(columns.values())))
        priorities = splitmix(np.arange(self._seen, self._seen + rows, dtype=np.uint64))
        self._seen += rows
        full = len(self._priorities) == KNOT_SAMPLE_SIZE
        chosen = np.flatnonzero(priorities < self._priorities.max()) if full else np.arange(rows)
        joined = np.concatenate([self._priorities, priorities[chosen]])
        keep = np.arange(len(joined))
        if len(joined) > KNOT_SAMPLE_SIZE:
            keep = np.sort(np.argpartition(joined, KNOT_SAMPLE_SIZE)[:KNOT_SAMPLE_SIZE])
        self._priorities = joined[keep]
        for name, numbers in self.columns.items():
            self.columns[name] = np.concatenate([numbers, columns[name][chosen]])[keep]


def knots_of(numbers: Floats, bins: int) -> list[float]:
    """Where at most `bins` bins of training numbers begin and end; NaN is missing.

    These are the values themselves if there are few enough. Otherwise both ends; every value with more than a
    bin's share of the rows and, for the commonest of them, the values next to it, so that its code is shared with
    no other value; and quantiles of the rest.

    Deviation: the paper's bins are quantiles only, which fall together on the zeros of a zero-inflated number.
    """
    numbers = numbers[~np.isnan(numbers)]
    values, counts = np.unique(numbers, return_counts=True)
    room = bins + 1
    if len(values) <= room:
        return [float(value) for value in values]
    atoms = np.flatnonzero(counts * bins > len(numbers))
    atoms = atoms[np.argsort(-counts[atoms], kind="stable")]
    chosen = {0, len(values) - 1, *atoms[: room - 2].tolist()}
    for atom in atoms.tolist():
        if len(chosen) + 2 <= (room + len(atoms)) // 2 + 1:
            chosen |= {max(atom - 1, 0), min(atom + 1, len(values) - 1)}
    rest = np.delete(np.arange(len(values)), atoms)
    if len(rest) and len(chosen) < room:
        share = (np.cumsum(counts[rest]) - counts[rest] / 2) / counts[rest].sum()
        points = np.linspace(0, 1, room - len(chosen) + 2)[1:-1]
        chosen |= set(rest[np.searchsorted(share, points).clip(max=len(rest) - 1)].tolist())
    return [float(value) for value in values[sorted(chosen)]]


class Moments:
    """Mean and variance of a stream (Chan et al. 1979: pairwise update), and how many are missing."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.missing = 0

    def add(self, numbers: npt.NDArray[np.float64]) -> None:
        rows = len(numbers)
        numbers = numbers[~np.isnan(numbers)]
        self.missing += rows - len(numbers)
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


def transformed(feature: Numeric, state: NumberState, raw: Floats) -> npt.NDArray[np.float32]:
    """Numbers as they are in a batch, bent by the feature's transform; NaN is missing.

    A piecewise linear number becomes its place among the knots: bins that it has filled, and the share that it fills
    of the next. Missing is -1 if the training rows miss some; otherwise, and without bins, it is the training mean.
    """
    missing = np.isnan(raw)
    numbers = _bent(feature, state, np.where(missing, state.fill, raw))
    if feature.encoding == "piecewise_linear":
        if not state.knots:
            return np.where(missing & state.misses, MISSING_PLACE, 0.0).astype(np.float32)
        knots = _bent(feature, state, np.asarray(state.knots))
        numbers = np.interp(numbers, knots, np.arange(len(knots)))
        if state.misses:
            numbers[missing] = MISSING_PLACE
    return numbers.astype(np.float32)


def untransformed(feature: Numeric, state: NumberState, numbers: Floats) -> Floats:
    """The raw numbers that `transformed` made these of, NaN for missing ones that are told from others.

    Numbers beyond the training data's lowest and highest are those, if the transform is `quantile` or the encoding
    piecewise linear.
    """
    missing = np.zeros(len(numbers), dtype=bool)
    if feature.encoding == "piecewise_linear":
        missing = numbers == MISSING_PLACE
        if not state.knots:
            return np.where(missing, np.nan, state.fill)
        knots = np.asarray(state.knots)
        numbers = np.interp(numbers, np.arange(len(knots)), _bent(feature, state, knots))
    if feature.transform == "log1p":
        numbers = np.sign(numbers) * np.expm1(np.abs(numbers))
    elif feature.transform == "standard":
        numbers = numbers * state.deviation + state.mean
    elif feature.transform == "quantile" and state.quantiles:
        numbers = np.interp(numbers, np.linspace(0, 1, len(state.quantiles)), state.quantiles)
    return np.where(missing, np.nan, numbers)


def transformed_events(field: EventNumber, raw: Floats) -> npt.NDArray[np.float32]:
    """Numbers of events; NaN is missing and becomes 0, as events have no training mean of their own."""
    numbers = np.nan_to_num(raw)
    return (_signed_log1p(numbers) if field.transform == "log1p" else numbers).astype(np.float32)


def bucket_ids(encoding: str, state: BucketState, numbers: Floats) -> Integers:
    """Ids of numbers under the encoding `log2_bucket` or `quantile`; NaN is missing."""
    if encoding == "log2_bucket":
        places = np.clip(log2_buckets(numbers), state.low, state.high) - state.low
    else:
        places = np.searchsorted(np.asarray(state.edges), np.nan_to_num(numbers), side="right")
    return np.where(np.isnan(numbers), MISSING_ID, places + FIRST_VOCABULARY_ID).astype(np.int32)


def _bent(feature: Numeric, state: NumberState, numbers: Floats) -> Floats:
    if feature.transform == "log1p":
        return _signed_log1p(numbers)
    if feature.transform == "standard":
        return (numbers - state.mean) / state.deviation
    if feature.transform == "quantile":
        return _rank(numbers, np.asarray(state.quantiles))
    return numbers


def _signed_log1p(numbers: Floats) -> Floats:
    return np.sign(numbers) * np.log1p(np.abs(numbers))


def _rank(numbers: npt.NDArray[np.float64], quantiles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Where each number stands in the training distribution, in [0, 1]; ties take the middle of their range."""
    if not len(quantiles):
        return np.full(len(numbers), 0.5)
    points = np.linspace(0, 1, len(quantiles))
    rising = np.interp(numbers, quantiles, points)
    falling = 1 - np.interp(-numbers, -quantiles[::-1], points)
    return (rising + falling) / 2
