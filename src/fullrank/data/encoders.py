"""From the raw values of a log to the numbers and ids that a model reads.

Encoders are fitted on the training part of a log and encode requests with the same code. They are stored as data:
`encoders.json`, and one Parquet file for each vocabulary.
"""

# Shapes: n rows of a frame, u distinct values of a column.

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import ValidationError

from fullrank.data import atomic
from fullrank.data.arrow import as_array, as_series, list_array
from fullrank.data.checks import check
from fullrank.data.chunk import Chunk, Coded, Integers, Longs
from fullrank.data.fitting import Embedded, Fitting, new_values
from fullrank.data.hashing import hash_series, hash_text, raw_ids
from fullrank.data.raw import RawChunk, rejected_text
from fullrank.data.scratch import Scratch
from fullrank.data.transforms import BucketState, NumberState, State, bucket_ids, transformed, transformed_events
from fullrank.data.vocabulary import Vocabulary
from fullrank.schema import FIRST_VOCABULARY_ID, MISSING_ID, Feature, Numeric, Schema, describe_errors

FORMAT_VERSION = 1
KEY_COLUMNS = {
    "request_id": "__request_id",
    "user_id": "__user_id",
    "item_id": "__item_id",
    "timestamp": "__timestamp",
    "weight": "__weight",
    "bid": "__bid",
}


class _Stored(State):
    version: Literal[1]
    table_schema: Schema
    numbers: dict[str, NumberState]
    buckets: dict[str, BucketState]
    vocabularies: dict[str, str]


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

        with Scratch() as directory:
            return cls.fit_checked(schema, checked(), directory)

    @classmethod
    def fit_checked(cls, schema: Schema, chunks: Iterable[Chunk], directory: Path) -> Encoders:
        """`fit` on rows that are checked already; counts of very many values go through files in `directory`."""
        fitting = Fitting(schema, directory)
        for chunk in chunks:
            fitting.add(chunk)
        return cls(*fitting.finish())

    @classmethod
    def without_fitting(cls, schema: Schema) -> Encoders:
        """Encoders of a schema that needs no training data; numbers whose encoding it does not say are scalars.

        Raises:
            ValueError: if an id feature is not hashed or identical, or a number needs fitted state.
        """
        for name, feature in schema.embedded().items():
            if feature.encoding not in ("hash", "identity", "raw"):
                raise ValueError(f'feature "{name}": encoding "{feature.encoding}" needs training data to be fitted')
        for numeric in schema.numeric:
            if numeric.transform not in ("none", "log1p"):
                raise ValueError(f'feature "{numeric.name}": transform "{numeric.transform}" needs training data')
            if numeric.encoding == "piecewise_linear" and "encoding" in numeric.model_fields_set:
                raise ValueError(f'feature "{numeric.name}": encoding "piecewise_linear" needs training data')
        return cls(*Fitting(_scalar_by_default(schema), Path()).finish())

    def extended(self, chunks: Iterable[Chunk], directory: Path) -> Encoders:
        """These encoders with the new values of a later log's training rows at the end of the vocabularies.

        What was known keeps its id, and numbers, bins and hashes mean what they meant.

        Args:
            chunks: checked rows.
            directory: where counts of very many values may go.
        """
        new = new_values(self.schema, self.vocabularies, chunks, directory)
        vocabularies = {table: known.extended(new[table]) for table, known in self.vocabularies.items()}
        return Encoders(_sized(self.schema, vocabularies), self.numbers, self.buckets, vocabularies)

    def with_values(self, table: str, values: pl.Series) -> Encoders:
        """These encoders with further values, texts that it lacks, at the end of a table's vocabulary."""
        new = Vocabulary(values, pl.zeros(len(values), pl.Int64, eager=True))
        vocabularies = {**self.vocabularies, table: self.vocabularies[table].extended(new)}
        return Encoders(_sized(self.schema, vocabularies), self.numbers, self.buckets, vocabularies)

    def without(self, names: Collection[str]) -> Encoders:
        """The same encoders without the features of these names."""
        return Encoders(self.schema.without(names), self.numbers, self.buckets, self.vocabularies)

    def agrees_with(self, other: Encoders) -> bool:
        """Whether what either encodes means the same to both."""
        return self.schema == other.schema and self.extends(other)

    def extends(self, other: Encoders) -> bool:
        """Whether all that the other encodes means the same to both; these may have further ids behind its own."""
        return (
            self.vocabularies.keys() == other.vocabularies.keys()
            and all(theirs.begins(self.vocabularies[name]) for name, theirs in other.vocabularies.items())
            and _sized(self.schema, other.vocabularies) == other.schema
            and self.numbers == other.numbers
            and self.buckets == other.buckets
        )

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
            columns.append(_series(numeric.name, transformed(numeric, self.numbers[numeric.name], raw)))
            if numeric.missing_column is not None:
                columns.append(_series(numeric.missing_column, np.isnan(raw).astype(np.float32)))
        for name, column in chunk.ids.items():
            columns.append(_series(name, self._ids(self._features[name], column)))
        for name in self.schema.jagged_keys:
            bag = chunk.bags[name]
            columns.append(_lists(name, bag.lists, bag.offsets, self._ids(self._features[name], bag.elements)))
        for sequence in self.schema.sequences:
            for part in sequence.number_fields:
                name = sequence.column(part)
                events = chunk.event_numbers[name]
                columns.append(_lists(name, events.lists, events.offsets, transformed_events(part, events.numbers)))
        columns.extend(_series(name, labels) for name, labels in chunk.labels.items())
        columns.extend(values.alias(KEY_COLUMNS[key]) for key, values in chunk.keys.items())
        columns.extend(_series(name, values) for name, values in chunk.extra.items())
        return pl.DataFrame(columns)

    def ids(self, name: str, column: Coded) -> Integers | Longs:
        """Encoded ids of a column of this name, shape (n,)."""
        return self._ids(self._features[name], column)

    def _ids(self, feature: Embedded, column: Coded) -> Integers | Longs:
        ids: Integers | Longs = self._value_ids(feature, column.values)
        return ids[column.codes]

    def _value_ids(self, feature: Embedded, values: pl.Series) -> Integers | Longs:
        table = feature.table_name
        if feature.encoding == "vocabulary":
            return self.vocabularies[table].ids(values)
        if feature.encoding in ("log2_bucket", "quantile"):
            numbers = values.cast(pl.Float64).fill_null(float("nan")).to_numpy()
            return bucket_ids(feature.encoding, self.buckets[table], numbers)
        if feature.encoding == "raw":
            return raw_ids(values)
        size = cast(int, feature.num_embeddings)
        if feature.encoding == "identity":
            return values.cast(pl.Int64 if feature.is_wide else pl.Int32).fill_null(MISSING_ID).to_numpy()
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
        """Write the vocabularies and `encoders.json` into a directory, made if needed, that nobody reads yet."""
        directory.mkdir(parents=True, exist_ok=True)
        files: dict[str, str] = {}
        for place, (table, vocabulary) in enumerate(self.vocabularies.items()):
            files[table] = f"vocabulary-{place:03d}.parquet"
            frame = pl.DataFrame({"value": vocabulary.values, "count": vocabulary.counts})
            frame.write_parquet(directory / files[table], compression="zstd", compression_level=1)
        stored = _Stored(
            version=1, table_schema=self.schema, numbers=self.numbers, buckets=self.buckets, vocabularies=files
        )
        atomic.write_text(directory / "encoders.json", stored.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path, vocabularies: Mapping[str, Vocabulary] | None = None) -> Encoders:
        """Read what `save` wrote. Runs no code from the files.

        Args:
            vocabularies: all of them, if they were read before.

        Raises:
            ValueError: if a file is missing, damaged, of another version, or does not fit the schema.
        """
        path = directory / "encoders.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing: {directory} holds no encoders")
        try:
            text = path.read_text(encoding="utf-8")
            version = json.loads(text).get("version")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        if version != FORMAT_VERSION:
            raise ValueError(f"{path}: version is {version!r}, this release reads {FORMAT_VERSION}")
        try:
            stored = _Stored.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(describe_errors(error, str(path)).splitlines()[0]) from None
        for name in stored.vocabularies.values():
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f'{path}: vocabulary file "{name}" lies outside the directory')
        if vocabularies is None:
            vocabularies = {table: _read_vocabulary(directory / name) for table, name in stored.vocabularies.items()}
        sizes = stored.table_schema.tables()
        for table, vocabulary in vocabularies.items():
            if sizes.get(table) != len(vocabulary):
                raise ValueError(f'{path}: table "{table}" has {sizes.get(table)} rows, its file {len(vocabulary)}')
        encoders = cls(stored.table_schema, stored.numbers, stored.buckets, vocabularies)
        for name, feature in encoders._features.items():
            if feature.encoding in ("hash", "identity", "raw"):
                continue
            known = encoders.vocabularies if feature.encoding == "vocabulary" else encoders.buckets
            if feature.table_name not in known:
                raise ValueError(f'{path}: no {feature.encoding} state for feature "{name}"')
        missing = {numeric.name for numeric in encoders.schema.numeric} - set(encoders.numbers)
        if missing:
            raise ValueError(f'{path}: no state for number "{min(missing)}"')
        for numeric in encoders.schema.numeric:
            if len(encoders.numbers[numeric.name].knots) > numeric.bins + 1:
                raise ValueError(f'{path}: number "{numeric.name}" has more than {numeric.bins} bins')
        return encoders


def _sized(schema: Schema, vocabularies: Mapping[str, Vocabulary]) -> Schema:
    return schema.with_table_sizes({table: len(vocabulary) for table, vocabulary in vocabularies.items()})


def _scalar_by_default(schema: Schema) -> Schema:
    def said(feature: Feature) -> Feature:
        if not isinstance(feature, Numeric) or "encoding" in feature.model_fields_set:
            return feature
        return feature.model_copy(update={"encoding": "scalar"})

    return schema.model_copy(update={"features": tuple(said(feature) for feature in schema.features)})


def _read_vocabulary(path: Path) -> Vocabulary:
    try:
        frame = pl.read_parquet(path, glob=False)
        values, counts = frame["value"], frame["count"]
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path} is not a readable vocabulary: {str(error).splitlines()[0]}") from None
    for column, kind in ((values, pl.String), (counts, pl.Int64)):
        if column.dtype != kind:
            raise ValueError(f'{path}: column "{column.name}" is {column.dtype}, expected {kind}')
        if column.null_count():
            raise ValueError(f'{path}: column "{column.name}" has no value in row {column.to_list().index(None) + 1}')
    again = values.filter(values.is_duplicated())
    if len(again):
        raise ValueError(f'{path}: the value "{again[0]}" stands there twice')
    if (counts < 0).any():
        raise ValueError(f"{path}: a count is negative")
    return Vocabulary(values, counts)


def _clean(schema: Schema, frame: pl.DataFrame, first_row: int, *, allow_missing: bool) -> Chunk:
    chunk, bad = check(schema, RawChunk(frame, first_line=first_row), allow_missing=allow_missing)
    if bad.height:
        line, *what = bad.row(0)
        raise ValueError(f"row {line}: {rejected_text(*what)}")
    return chunk


def _series(name: str, values: npt.NDArray[Any]) -> pl.Series:
    return pl.Series(name, values)


def _lists(name: str, rows: Integers, offsets: Integers, elements: npt.NDArray[Any]) -> pl.Series:
    lists = list_array(offsets, elements)
    if len(rows) != len(lists) or not np.array_equal(rows, np.arange(len(rows))):
        lists = lists.take(as_array(rows))
    return as_series(lists, name)
