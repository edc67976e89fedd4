"""From the raw columns of a log to checked, dictionary-coded columns, and the list of rows that would not fit.

Values are looked at once per distinct value where that is possible: a column of 10^5 rows and 10^3 distinct texts is
parsed 10^3 times.
"""

# Shapes: n rows of a chunk, u distinct values of a column.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from fullrank.data.formats.base import LINE_COLUMN, REJECTED_SCHEMA, RawChunk, as_series
from fullrank.data.splits import by_name
from fullrank.schema import Categorical, EventId, MultiCategorical, Schema, Sequence

Integers = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

TRUE_PREFIX = "__true_"
# Seconds since 1970 beyond this are the year 5138: surely milliseconds.
LATEST_TIMESTAMP = 100_000_000_000
_FEW_ROWS = 64


@dataclass(frozen=True)
class Coded:
    """A column as codes into its distinct values.

    Attributes:
        codes: int32, shape (n,), no nulls.
        values: shape (u,), distinct; text, or float64 for features that bucket numbers; null is the missing value.
    """

    codes: Integers
    values: pl.Series

    def take(self, rows: npt.NDArray[Any]) -> Coded:
        return Coded(self.codes[rows], self.values)


@dataclass(frozen=True)
class Jagged:
    """Lists of coded values, possibly shared between rows.

    Attributes:
        lists: int32, shape (n,): which list each row has.
        offsets: int32: list i holds elements offsets[i]:offsets[i + 1].
        elements: codes and distinct values of the elements of all lists.
    """

    lists: Integers
    offsets: Integers
    elements: Coded

    def take(self, rows: npt.NDArray[Any]) -> Jagged:
        return replace(self, lists=self.lists[rows])

    @property
    def list_lengths(self) -> Integers:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class JaggedNumbers:
    """Lists of numbers: `lists` and `offsets` as in `Jagged`; NaN is missing."""

    lists: Integers
    offsets: Integers
    numbers: Floats

    def take(self, rows: npt.NDArray[Any]) -> JaggedNumbers:
        return replace(self, lists=self.lists[rows])

    @property
    def list_lengths(self) -> Integers:
        return np.diff(self.offsets)


@dataclass
class Chunk:
    """Checked rows.

    Attributes:
        numbers: of `Numeric` features; NaN is missing.
        ids: of `Categorical` features.
        bags: of bags and of the id fields of sequences (`<sequence>.<field>`).
        event_numbers: of the number fields of sequences.
        labels: float32; NaN is unobserved.
        keys: by the key's name in `Keys`.
        extra: further float columns that are carried through (`__true_<label>`).
        parts: int8, the split that the source names for each row, when it was asked for.
        first_line: line of the first row, when `lines` is None.
        lines: int64, line of each row.
    """

    rows: int
    numbers: dict[str, Floats] = field(default_factory=dict)
    ids: dict[str, Coded] = field(default_factory=dict)
    bags: dict[str, Jagged] = field(default_factory=dict)
    event_numbers: dict[str, JaggedNumbers] = field(default_factory=dict)
    labels: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    keys: dict[str, pl.Series] = field(default_factory=dict)
    extra: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    parts: npt.NDArray[np.int8] | None = None
    first_line: int = 1
    lines: npt.NDArray[np.int64] | None = None

    def line(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        return self.lines[rows] if self.lines is not None else (rows + self.first_line).astype(np.int64)

    def take(self, rows: npt.NDArray[np.int64]) -> Chunk:
        return Chunk(
            rows=len(rows),
            numbers={name: values[rows] for name, values in self.numbers.items()},
            ids={name: column.take(rows) for name, column in self.ids.items()},
            bags={name: column.take(rows) for name, column in self.bags.items()},
            event_numbers={name: column.take(rows) for name, column in self.event_numbers.items()},
            labels={name: values[rows] for name, values in self.labels.items()},
            keys={name: values.gather(rows) for name, values in self.keys.items()},
            extra={name: values[rows] for name, values in self.extra.items()},
            parts=None if self.parts is None else self.parts[rows],
            lines=self.line(rows),
        )


def raw_columns(schema: Schema, available: list[str] | None = None) -> dict[str, str]:
    """Names of the columns that a schema reads, each with the name under which the source has it.

    They differ in one case: a sequence of a single field may be stored under the sequence's name alone.
    """
    names = [feature.name for feature in schema.features if not isinstance(feature, Sequence)]
    columns = {name: name for name in names}
    for sequence in schema.sequences:
        for part in sequence.fields:
            name = sequence.column(part)
            alone = len(sequence.fields) == 1 and available is not None
            columns[name] = sequence.name if alone and name not in (available or ()) else name
    columns.update({label.name: label.name for label in schema.labels})
    columns.update({name: name for name in schema.keys.model_dump().values() if name is not None})
    return columns


class _Source:
    """Raw columns of a chunk, plain or dictionary-coded, and the bad rows found so far."""

    def __init__(self, raw: RawChunk) -> None:
        self.frame = raw.frame
        self.dictionaries: Mapping[str, pl.Series] = raw.dictionaries
        self.rows = raw.frame.height
        self.bad: list[tuple[npt.NDArray[np.int64], str, str, pl.Series]] = []

    def series(self, name: str) -> pl.Series:
        """The column, decoded."""
        column = self.frame[name]
        return self.dictionaries[name].gather(column) if name in self.dictionaries else column

    def coded(self, name: str) -> tuple[Integers, pl.Series]:
        """Codes and distinct raw values."""
        column = self.frame[name]
        if name in self.dictionaries:
            return column.to_numpy(), self.dictionaries[name]
        return factorise(column)

    def reject(self, rows: Mask, column: str, reason: str, values: Callable[[], pl.Series]) -> None:
        """Note the rows of a mask, with their values as text."""
        if rows.any():
            where = np.flatnonzero(rows)
            self.bad.append((where, column, reason, values().gather(where).cast(pl.String, strict=False)))

    def reject_codes(self, codes: Integers, values: pl.Series, wrong: Mask, column: str, reason: str) -> None:
        """Note the rows whose distinct value is wrong."""
        if wrong.any():
            self.reject(wrong[codes], column, reason, lambda: values.gather(codes))


def check(
    schema: Schema, raw: RawChunk, *, allow_missing: bool = False, split_column: str | None = None
) -> tuple[Chunk, pl.DataFrame]:
    """Checked columns of the good rows, and the bad rows as a table like `RawChunk.rejected` (one entry per row).

    Args:
        allow_missing: an absent feature column counts as missing in each row, and labels and keys may be absent.
        split_column: raw column that names the split of each row.

    Raises:
        ValueError: if a column is absent, or has a type that cannot hold what the schema says.
    """
    source = _Source(raw)
    names = raw_columns(schema, raw.frame.columns)
    absent = {name for name, stored in names.items() if stored not in raw.frame.columns}
    if absent and not allow_missing:
        first = next(name for name in names if name in absent)
        raise ValueError(f'column "{first}" of the schema is missing; the data has {", ".join(raw.frame.columns)}')
    chunk = Chunk(rows=source.rows, first_line=raw.first_line)
    if LINE_COLUMN in raw.frame.columns:
        chunk.lines = raw.frame[LINE_COLUMN].to_numpy()
    for numeric in schema.numeric:
        chunk.numbers[numeric.name] = (
            np.full(source.rows, np.nan) if numeric.name in absent else _numbers(source, numeric.name)
        )
    for feature in schema.categorical:
        chunk.ids[feature.name] = (
            Coded(np.zeros(source.rows, np.int32), pl.Series([None], dtype=pl.String))
            if feature.name in absent
            else _ids(source, feature)
        )
    for bag in schema.bags:
        chunk.bags[bag.name] = _empty_lists(source.rows) if bag.name in absent else _bag(source, bag)
    for sequence in schema.sequences:
        _sequence(source, chunk, sequence, names, absent)
    for label in schema.labels:
        if label.name not in absent:
            chunk.labels[label.name] = _label(source, label.name, binary=label.kind == "binary")
    if schema.labels and not allow_missing:
        first_label = schema.labels[0].name
        unobserved = np.logical_and.reduce([np.isnan(values) for values in chunk.labels.values()])
        source.reject(unobserved, first_label, "no label", lambda: source.series(first_label))
    _keys(source, chunk, schema, absent)
    if split_column is not None:
        if split_column not in raw.frame.columns:
            raise ValueError(f'split column "{split_column}" is missing; the data has {", ".join(raw.frame.columns)}')
        codes, values = source.coded(split_column)
        parts = by_name(values)
        source.reject_codes(codes, values, parts < 0, split_column, "split is not train, valid or test")
        chunk.parts = parts[codes]
    for name in raw.frame.columns:
        if name.startswith(TRUE_PREFIX):
            chunk.extra[name] = raw.frame[name].cast(pl.Float32).to_numpy()
    return _without_bad_rows(source, chunk)


def _without_bad_rows(source: _Source, chunk: Chunk) -> tuple[Chunk, pl.DataFrame]:
    if not source.bad:
        return chunk, pl.DataFrame(schema=REJECTED_SCHEMA)
    table = pl.concat(
        pl.DataFrame(
            {
                "row": rows,
                "line": chunk.line(rows),
                "column": [column] * len(rows),
                "reason": [reason] * len(rows),
                "value": values,
            },
            schema_overrides={"value": pl.String},
        )
        for rows, column, reason, values in source.bad
    ).unique("row", keep="first", maintain_order=True)
    good = np.ones(chunk.rows, dtype=bool)
    good[table["row"].to_numpy()] = False
    return chunk.take(np.flatnonzero(good)), table.sort("row").drop("row").cast(REJECTED_SCHEMA)  # type: ignore[arg-type]


def factorise(column: pl.Series) -> tuple[Integers, pl.Series]:
    """Codes (int32, no nulls) and values of a column; the values are distinct unless there are only a few rows."""
    if column.dtype in (pl.Categorical, pl.Enum) or column.dtype.is_temporal():
        column = column.cast(pl.String)
    if column.dtype.is_nested() or column.dtype == pl.Binary or column.dtype == pl.Object:
        raise ValueError(f'column "{column.name}" holds {column.dtype}, expected one text or number per row')
    if column.dtype == pl.Null:
        return np.zeros(len(column), np.int32), pl.Series(column.name, [None], dtype=pl.String)
    if len(column) <= _FEW_ROWS:
        return np.arange(len(column), dtype=np.int32), column
    if column.dtype == pl.Boolean:
        column = column.cast(pl.String)
    coded = column.rechunk().to_arrow().dictionary_encode("encode")
    return coded.indices.to_numpy(), as_series(coded.dictionary, column.name)


def as_text(values: pl.Series) -> pl.Series:
    """The text that stands for each value in vocabularies and hashes: integral floats read like integers, and the
    empty text is missing."""
    if values.dtype == pl.String:
        return values.replace("", None) if (values == "").any() else values
    if values.dtype.is_float():
        whole = values.is_finite() & (values == values.floor()) & (values.abs() < 2**53)
        text = values.fill_nan(None).cast(pl.String)
        if whole.any():
            integers = values.cast(pl.Int64, strict=False).cast(pl.String)
            text = text.to_frame("text").select(pl.when(whole).then(integers).otherwise(pl.col("text"))).to_series()
        return text
    return values.cast(pl.String)


def as_numbers(values: pl.Series) -> tuple[Floats, Mask, Mask]:
    """Numbers (NaN where missing or wrong), which values are no numbers, and which are no finite numbers."""
    blank = as_text(values) if values.dtype == pl.String else values
    if values.dtype.is_nested() or values.dtype == pl.Binary or values.dtype.is_temporal():
        raise ValueError(f'column "{values.name}" holds {values.dtype}, expected a number per row')
    parsed = blank.cast(pl.Float64, strict=False)
    none = np.zeros(len(values), dtype=bool)
    wrong = (parsed.is_null() & blank.is_not_null()).to_numpy() if parsed.null_count() > blank.null_count() else none
    finite = parsed.is_finite()
    infinite = none if finite.all() else (~finite).fill_null(False).to_numpy()
    numbers = parsed.fill_null(float("nan")).to_numpy()
    if infinite.any():
        numbers = np.where(infinite, np.nan, numbers)
    return numbers, wrong, infinite


def _numbers(source: _Source, name: str) -> Floats:
    column = source.series(name)
    numbers, wrong, infinite = as_numbers(column)
    source.reject(wrong, name, "not a number", lambda: column)
    source.reject(infinite, name, "not a finite number", lambda: column)
    return numbers


def _label(source: _Source, name: str, *, binary: bool) -> npt.NDArray[np.float32]:
    codes, values = source.coded(name)
    numbers, wrong, infinite = as_numbers(values)
    source.reject_codes(codes, values, wrong, name, "label is not a number")
    source.reject_codes(codes, values, infinite, name, "label is not a finite number")
    if binary:
        outside = ~(np.isnan(numbers) | (numbers == 0) | (numbers == 1))
        source.reject_codes(codes, values, outside, name, "label is not 0 or 1")
    return numbers.astype(np.float32)[codes]


def _checked_values(
    values: pl.Series, feature: Categorical | MultiCategorical | EventId
) -> tuple[pl.Series, Mask | None, str]:
    """Values as the feature's encoder takes them, which are wrong (None: none), and why."""
    if feature.encoding in ("log2_bucket", "quantile"):
        numbers, wrong, infinite = as_numbers(values)
        return (pl.Series(numbers).fill_nan(None), wrong | infinite, "not a finite number")
    text = as_text(values)
    if feature.encoding == "identity":
        ids = text.cast(pl.Int64, strict=False)
        assert feature.num_embeddings is not None
        inside = ids.is_between(0, feature.num_embeddings - 1)
        wrong = (text.is_not_null() & ~inside.fill_null(False)).to_numpy()
        return (text, wrong, f"id is not an integer from 0 to {feature.num_embeddings - 1}")
    return text, None, ""


def _ids(source: _Source, feature: Categorical) -> Coded:
    codes, values = source.coded(feature.name)
    checked, wrong, reason = _checked_values(values, feature)
    if wrong is not None:
        source.reject_codes(codes, values, wrong, feature.name, reason)
    return Coded(codes, checked)


def _empty_lists(rows: int) -> Jagged:
    zeros = np.zeros(rows, np.int32)
    return Jagged(zeros, np.zeros(2, np.int32), Coded(np.zeros(0, np.int32), pl.Series([], dtype=pl.String)))


def _split(column: pl.Series, separator: str) -> pl.Series:
    """Lists of a column of lists, or of text joined with a separator; the empty text is the empty list."""
    if isinstance(column.dtype, (pl.List, pl.Array)):
        return column.cast(pl.List(column.dtype.inner)) if isinstance(column.dtype, pl.Array) else column
    if column.dtype != pl.String:
        column = as_text(column)
    lists = column.str.split(separator)
    empty = column.is_null() | (column == "")
    if empty.any():
        nothing = pl.Series([[]], dtype=pl.List(pl.String))
        lists = lists.to_frame("lists").select(pl.when(~empty).then(pl.col("lists")).otherwise(nothing)).to_series()
    return lists


def _list_parts(lists: pl.Series) -> tuple[Integers, pl.Series]:
    """Offsets and elements of a column of lists; a null list is empty."""
    array = lists.rechunk().to_arrow()
    lengths = array.value_lengths()
    offsets = np.zeros(len(lists) + 1, np.int32)
    np.cumsum(lengths.fill_null(0).to_numpy(), out=offsets[1:])
    return offsets, as_series(array.flatten(), lists.name)


def _cut(lists: pl.Series, max_length: int, *, newest: bool) -> pl.Series:
    if (lists.list.len().max() or 0) <= max_length:  # type: ignore[operator]
        return lists
    return lists.list.tail(max_length) if newest else lists.list.head(max_length)


def _elements(
    source: _Source,
    column: str,
    rows: Integers,
    offsets: Integers,
    values: pl.Series,
    feature: MultiCategorical | EventId,
) -> Coded:
    codes, distinct = factorise(values)
    checked, wrong, reason = _checked_values(distinct, feature)
    if wrong is not None:
        _reject_lists(source, column, rows, offsets, values, wrong[codes], reason)
    return Coded(codes, checked)


def _reject_lists(
    source: _Source, column: str, rows: Integers, offsets: Integers, values: pl.Series, wrong: Mask, reason: str
) -> None:
    """Note the rows whose list has a wrong element; the first one is the value in the report."""
    if wrong.any():
        before = np.concatenate([[0], np.cumsum(wrong)])
        bad_lists = before[offsets[1:]] > before[offsets[:-1]]
        first = np.searchsorted(before, before[offsets[:-1]] + 1) - 1
        shown = values.cast(pl.String, strict=False).gather(np.minimum(first, len(values) - 1))
        source.reject(bad_lists[rows], column, reason, lambda: shown.gather(rows))


def _bag(source: _Source, bag: MultiCategorical) -> Jagged:
    column = source.frame[bag.name]
    if bag.name in source.dictionaries:
        rows, distinct = column.to_numpy(), source.dictionaries[bag.name]
    elif isinstance(column.dtype, (pl.List, pl.Array)):
        rows, distinct = np.arange(source.rows, dtype=np.int32), column
    else:
        rows, distinct = factorise(column)
    lists = _split(distinct, bag.separator)
    if lists.list.eval(pl.element().cast(pl.String) == "").list.any().any() if _is_text_list(lists) else False:
        lists = lists.list.eval(pl.element().filter(pl.element() != ""))
    offsets, values = _list_parts(_cut(lists, bag.max_length, newest=False))
    return Jagged(rows, offsets, _elements(source, bag.name, rows, offsets, values, bag))


def _is_text_list(lists: pl.Series) -> bool:
    return isinstance(lists.dtype, pl.List) and lists.dtype.inner == pl.String


def _sequence(source: _Source, chunk: Chunk, sequence: Sequence, names: Mapping[str, str], absent: set[str]) -> None:
    present = [part for part in sequence.fields if sequence.column(part) not in absent]
    lengths: dict[str, Integers] = {}
    for part in sequence.fields:
        name = sequence.column(part)
        if part not in present:
            if present:
                raise ValueError(f'column "{name}" is missing though other fields of the sequence are there')
            if isinstance(part, EventId):
                chunk.bags[name] = _empty_lists(source.rows)
            else:
                nothing = _empty_lists(source.rows)
                chunk.event_numbers[name] = JaggedNumbers(nothing.lists, nothing.offsets, np.zeros(0))
            continue
        stored = names[name]
        rows: Integers
        if stored in source.dictionaries:
            rows, distinct = (source.frame[stored].to_numpy(), source.dictionaries[stored])
        else:
            rows, distinct = (np.arange(source.rows, dtype=np.int32), source.frame[stored])
        lists = _split(distinct, sequence.separator)
        lengths[name] = lists.list.len().fill_null(0).to_numpy().astype(np.int32)[rows]
        offsets, values = _list_parts(_cut(lists, sequence.max_length, newest=True))
        if isinstance(part, EventId):
            chunk.bags[name] = Jagged(rows, offsets, _elements(source, name, rows, offsets, values, part))
        else:
            numbers, wrong, infinite = as_numbers(values)
            for mask, reason in ((wrong, "not a number"), (infinite, "not a finite number")):
                _reject_lists(source, name, rows, offsets, values, mask, reason)
            chunk.event_numbers[name] = JaggedNumbers(rows, offsets, numbers)
    for name, each in lengths.items():
        first, expected = next(iter(lengths.items()))
        differ = each != expected
        source.reject(differ, name, f"as many events as {first} expected", partial(pl.Series, values=each))


def _keys(source: _Source, chunk: Chunk, schema: Schema, absent: set[str]) -> None:
    for key, name in schema.keys.model_dump().items():
        if name is None or name in absent:
            continue
        if key == "timestamp":
            chunk.keys[key] = _timestamps(source, name)
        elif key in ("weight", "bid"):
            numbers = _numbers(source, name)
            if key == "weight":
                source.reject(numbers < 0, name, "negative weight", partial(source.series, name))
            chunk.keys[key] = pl.Series(numbers).cast(pl.Float32)
        else:
            codes, values = source.coded(name)
            if values.dtype.is_integer():
                values = values.cast(pl.Int64)
            else:
                values = as_text(values)
                integers = values.cast(pl.Int64, strict=False)
                # Text such as "007" is not an integer: it could not be written back.
                if integers.null_count() == values.null_count() and integers.cast(pl.String).equals(values):
                    values = integers
            if key == "request_id" and values.null_count():
                missing = values.is_null().to_numpy()
                source.reject_codes(codes, values, missing, name, "no request id")
            chunk.keys[key] = values.gather(codes)


def _timestamps(source: _Source, name: str) -> pl.Series:
    codes, values = source.coded(name)
    raw = source.frame[name]
    if raw.dtype.is_temporal():
        codes, values = np.arange(source.rows, dtype=np.int32), raw
    seconds: pl.Series
    if values.dtype.is_temporal():
        seconds = values.cast(pl.Datetime("ms")).dt.epoch("s")
    elif values.dtype == pl.String:
        seconds = values.cast(pl.Int64, strict=False)
        if seconds.null_count():
            seconds = seconds.zip_with(seconds.is_not_null(), _parsed_times(values))
    else:
        numbers = values.cast(pl.Float64, strict=False)
        seconds = numbers.fill_nan(None).floor().cast(pl.Int64, strict=False)
    source.reject_codes(codes, values, seconds.is_null().to_numpy(), name, "not a timestamp")
    late = (seconds.abs() >= LATEST_TIMESTAMP).fill_null(False).to_numpy()
    source.reject_codes(codes, values, late, name, "timestamp is not in seconds since 1970")
    return seconds.gather(codes)


def _parsed_times(column: pl.Series) -> pl.Series:
    """Seconds since 1970 of texts such as `2014-10-21 05:00:00`, `2014-10-21T05:00:00Z`, `2014-10-21` or `12.5`;
    null where none fits."""
    text = column.str.strip_chars().str.strip_suffix("Z").str.replace("T", " ", literal=True)
    result = column.cast(pl.Float64, strict=False)
    result = result.zip_with(result.is_finite().fill_null(False), pl.Series([None] * len(text), dtype=pl.Float64))
    seconds = result.floor().cast(pl.Int64, strict=False)
    for layout in ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d"):
        if not seconds.null_count():
            break
        if layout == "%Y-%m-%d":
            parsed = text.str.to_date(layout, strict=False).cast(pl.Datetime("ms"))
        else:
            parsed = text.str.to_datetime(layout, time_unit="ms", strict=False)
        seconds = seconds.zip_with(seconds.is_not_null(), parsed.dt.epoch("s"))
    return seconds
