"""From the raw columns of a log to checked, dictionary-coded columns, and the list of rows that would not fit.

Values are looked at once per distinct value where that is possible: a column of 10^5 rows and 10^3 distinct texts is
parsed 10^3 times.
"""

# Shapes: n rows of a chunk, u distinct values of a column.

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from fullrank.data.arrow import as_series
from fullrank.data.chunk import Chunk, Coded, Floats, Integers, Jagged, JaggedNumbers, Mask
from fullrank.data.raw import LINE_COLUMN, REJECTED_SCHEMA, TRUE_PREFIX, RawChunk, raw_columns
from fullrank.data.spelling import as_text
from fullrank.data.splits import by_name
from fullrank.data.times import LATEST_TIMESTAMP, UNITS, date_layout, seconds_of
from fullrank.data.values import Lists, as_numbers, dictionary_codes, factorise, lists_of
from fullrank.schema import Categorical, EventId, Label, MultiCategorical, Schema, Sequence, TimeUnit

_LARGEST_RAW = 2.0**64


class _Source:
    """Raw columns of a chunk, plain or dictionary-coded, and the bad rows found so far."""

    def __init__(self, raw: RawChunk, missing: Collection[str]) -> None:
        self.frame = raw.frame
        self.missing = missing
        self.dictionaries: Mapping[str, pl.Series] = raw.dictionaries
        self.rows = raw.frame.height
        self.bad: list[tuple[npt.NDArray[np.int64], str, str, pl.Series]] = []

    def series(self, name: str) -> pl.Series:
        """The column, decoded."""
        column = self.frame[name]
        return self.dictionaries[name].gather(column) if name in self.dictionaries else column

    def coded(self, name: str, *, numeric: bool = False) -> tuple[Integers, pl.Series]:
        """Codes and distinct raw values; truth values are 0 and 1 where numbers are expected, else texts."""
        column = self.frame[name]
        if name in self.dictionaries:
            return column.to_numpy(), self.dictionaries[name]
        return factorise(column.cast(pl.Int8) if numeric and column.dtype == pl.Boolean else column)

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
    schema: Schema,
    raw: RawChunk,
    *,
    allow_missing: bool = False,
    split_column: str | None = None,
    keep: Iterable[str] = (),
) -> tuple[Chunk, pl.DataFrame]:
    """Checked columns of the good rows, and the bad rows as a table like `RawChunk.rejected` (one entry per row).

    Args:
        allow_missing: an absent feature column counts as missing in each row, and labels and keys may be absent.
        split_column: raw column that names the split of each row.
        keep: further raw columns to carry through: numbers, or lists of equally many numbers. Whole numbers of which
            none is missing become int64, all others float32, a missing one NaN.

    Raises:
        ValueError: if a column is absent, or has a type that cannot hold what the schema says.
    """
    source = _Source(raw, schema.missing)
    columns = raw.frame.columns
    names = raw_columns(schema, columns)
    present = set(columns)
    absent = {name for name, stored in names.items() if stored not in present}
    if absent and not allow_missing:
        first = next(name for name in names if name in absent)
        raise ValueError(f'column "{first}" of the schema is missing; the data has {", ".join(columns)}')
    chunk = Chunk(rows=source.rows, first_line=raw.first_line)
    if LINE_COLUMN in raw.frame.columns:
        chunk.lines = raw.frame[LINE_COLUMN].to_numpy()
    for numeric in schema.numeric:
        chunk.numbers[numeric.name] = (
            np.full(source.rows, np.nan) if numeric.name in absent else _numbers(source, numeric.name)
        )
        if numeric.transform == "none":
            # A model squares what it reads as it is, and float32 ends at 2^128.
            large = np.abs(chunk.numbers[numeric.name]) > _LARGEST_RAW
            source.reject(large, numeric.name, "number is beyond 2^64", partial(source.series, numeric.name))
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
            chunk.labels[label.name] = _label(source, label)
    if schema.labels and not allow_missing:
        first_label = schema.labels[0].name
        unobserved = np.logical_and.reduce([np.isnan(values) for values in chunk.labels.values()])
        source.reject(unobserved, first_label, "no label", lambda: source.series(first_label))
    _keys(source, chunk, schema, absent, allow_missing=allow_missing)
    if split_column is not None:
        _check_there(split_column, "split column", raw)
        codes, values = source.coded(split_column)
        parts = by_name(values)
        source.reject_codes(codes, values, parts < 0, split_column, "split is not train, valid or test")
        chunk.parts = parts[codes]
    for name in raw.frame.columns:
        if name.startswith(TRUE_PREFIX):
            chunk.extra[name] = raw.frame[name].cast(pl.Float32).to_numpy()
    for name in keep:
        _check_there(name, "column to keep", raw)
        nested = isinstance(source.series(name).dtype, (pl.List, pl.Array))
        chunk.extra[name] = _kept_lists(source, name) if nested else _kept_numbers(source, name)
    return _without_bad_rows(source, chunk)


def _check_there(name: str, what: str, raw: RawChunk) -> None:
    if name not in raw.frame.columns:
        raise ValueError(f'{what} "{name}" is missing; the data has {", ".join(raw.frame.columns)}')


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


def _numbers(source: _Source, name: str) -> Floats:
    column = source.series(name)
    numbers, wrong, infinite = as_numbers(column, source.missing)
    source.reject(wrong, name, "not a number", lambda: column)
    source.reject(infinite, name, "not a finite number", lambda: column)
    return numbers


def _label(source: _Source, label: Label) -> npt.NDArray[np.float32]:
    name = label.name
    codes, values = source.coded(name, numeric=not label.positive)
    if label.positive:
        numbers, wrong = _mapped(as_text(values, source.missing), label)
        source.reject_codes(codes, values, wrong, name, "label is none of the schema's positive and negative values")
        return numbers.astype(np.float32)[codes]
    numbers, wrong, infinite = as_numbers(values, source.missing)
    source.reject_codes(codes, values, wrong, name, "label is not a number")
    source.reject_codes(codes, values, infinite, name, "label is not a finite number")
    if label.kind == "binary":
        outside = ~(np.isnan(numbers) | (numbers == 0) | (numbers == 1))
        source.reject_codes(codes, values, outside, name, "label is not 0 or 1")
    return numbers.astype(np.float32)[codes]


def _mapped(text: pl.Series, label: Label) -> tuple[Floats, Mask]:
    """0 and 1 of the label's own texts (NaN where missing), and which are neither."""
    positive, negative = (
        text.is_in(as_text(pl.Series(each, dtype=pl.String)).to_list()).fill_null(False).to_numpy()
        for each in (label.positive, label.negative)
    )
    there = text.is_not_null().to_numpy()
    wrong = there & ~positive & ~negative if label.negative else np.zeros(len(text), dtype=bool)
    return np.where(there & ~wrong, positive.astype(np.float64), np.nan), wrong


def _kept_numbers(source: _Source, name: str) -> npt.NDArray[Any]:
    codes, values = source.coded(name, numeric=True)
    integers = _integers(values)
    if integers is not None:
        return integers[codes]
    numbers, wrong, infinite = as_numbers(values, source.missing)
    source.reject_codes(codes, values, wrong, name, "not a number")
    source.reject_codes(codes, values, infinite, name, "not a finite number")
    return numbers.astype(np.float32)[codes]


def _kept_lists(source: _Source, name: str) -> npt.NDArray[Any]:
    """Shape (n, width), where width is the length of most lists."""
    lists = lists_of(source.series(name), "")
    lengths = lists.lengths
    width = int(np.bincount(lengths[lengths > 0], minlength=1).argmax())
    whole = (lengths == width) & (width > 0)
    source.reject(~whole, name, f"a list of {width} numbers expected", partial(pl.Series, values=lengths))
    elements = as_series(lists.elements, name)
    values = _integers(elements)
    if values is None:
        numbers, wrong, infinite = as_numbers(elements, source.missing)
        rows = np.arange(source.rows, dtype=np.int32)
        for mask, reason in ((wrong, "not a number"), (infinite, "not a finite number")):
            _reject_lists(source, name, rows, lists, mask, reason)
        values = numbers.astype(np.float32)
    matrix = np.zeros((source.rows, width), dtype=values.dtype)
    matrix[whole] = values[np.repeat(whole, lengths)].reshape(-1, width)
    return matrix


def _integers(values: pl.Series) -> npt.NDArray[np.int64] | None:
    """Numbers, or texts of them, as integers, if they all are."""
    if not (values.dtype.is_integer() or values.dtype == pl.String):
        return None
    integers = values.cast(pl.Int64, strict=False)
    return None if integers.null_count() else integers.to_numpy()


def _checked_values(
    source: _Source, values: pl.Series, feature: Categorical | MultiCategorical | EventId
) -> tuple[pl.Series, Mask | None, str]:
    """Values as the feature's encoder takes them, which are wrong (None: none), and why."""
    if feature.encoding in ("log2_bucket", "quantile"):
        numbers, wrong, infinite = as_numbers(values, source.missing)
        return (pl.Series(numbers).fill_nan(None), wrong | infinite, "not a finite number")
    text = as_text(values, source.missing)
    if feature.encoding == "identity":
        ids = text.cast(pl.Int64, strict=False)
        assert feature.num_embeddings is not None
        inside = ids.is_between(0, feature.num_embeddings - 1)
        wrong = (text.is_not_null() & ~inside.fill_null(False)).to_numpy()
        return (text, wrong, f"id is not an integer from 0 to {feature.num_embeddings - 1}")
    return text, None, ""


def _ids(source: _Source, feature: Categorical) -> Coded:
    codes, values = source.coded(feature.name)
    checked, wrong, reason = _checked_values(source, values, feature)
    if wrong is not None:
        source.reject_codes(codes, values, wrong, feature.name, reason)
    return Coded(codes, checked)


def _empty_lists(rows: int) -> Jagged:
    zeros = np.zeros(rows, np.int32)
    return Jagged(zeros, np.zeros(2, np.int32), Coded(np.zeros(0, np.int32), pl.Series([], dtype=pl.String)))


def _elements(source: _Source, column: str, rows: Integers, lists: Lists, feature: MultiCategorical | EventId) -> Coded:
    codes, distinct = dictionary_codes(lists.elements, column)
    checked, wrong, reason = _checked_values(source, distinct, feature)
    if wrong is not None and wrong.any():
        _reject_lists(source, column, rows, lists, wrong[codes], reason)
    return Coded(codes, checked)


def _reject_lists(source: _Source, column: str, rows: Integers, lists: Lists, wrong: Mask, reason: str) -> None:
    """Note the rows whose list has a wrong element; the first one is the value in the report."""
    if wrong.any():
        offsets = lists.offsets
        before = np.concatenate([[0], np.cumsum(wrong)])
        bad_lists = before[offsets[1:]] > before[offsets[:-1]]
        first = np.searchsorted(before, before[offsets[:-1]] + 1) - 1
        texts = as_series(lists.elements, column).cast(pl.String, strict=False)
        shown = texts.gather(np.minimum(first, len(texts) - 1))
        source.reject(bad_lists[rows], column, reason, lambda: shown.gather(rows))


def _bag(source: _Source, bag: MultiCategorical) -> Jagged:
    column = source.frame[bag.name]
    if isinstance(column.dtype, (pl.List, pl.Array)):
        rows, distinct = np.arange(source.rows, dtype=np.int32), column
    else:
        rows, distinct = source.coded(bag.name)
    lists = (
        lists_of(distinct, bag.separator, source.missing)
        .without_missing(source.missing)
        .cut(bag.max_length, newest=False)
    )
    return Jagged(rows, lists.offsets, _elements(source, bag.name, rows, lists, bag))


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
        whole = lists_of(distinct, sequence.separator, source.missing)
        lengths[name] = whole.lengths[rows]
        lists = whole.cut(sequence.max_length, newest=True)
        if isinstance(part, EventId):
            chunk.bags[name] = Jagged(rows, lists.offsets, _elements(source, name, rows, lists, part))
        else:
            numbers, wrong, infinite = as_numbers(as_series(lists.elements, name), source.missing)
            for mask, reason in ((wrong, "not a number"), (infinite, "not a finite number")):
                _reject_lists(source, name, rows, lists, mask, reason)
            chunk.event_numbers[name] = JaggedNumbers(rows, lists.offsets, numbers)
    for name, each in lengths.items():
        first, expected = next(iter(lengths.items()))
        differ = each != expected
        source.reject(differ, name, f"as many events as {first} expected", partial(pl.Series, values=each))


def _keys(source: _Source, chunk: Chunk, schema: Schema, absent: set[str], *, allow_missing: bool) -> None:
    for key, name in schema.keys.model_dump().items():
        if name is None or name in absent:
            continue
        if key == "timestamp":
            chunk.keys[key] = _timestamps(source, name, schema.time_unit, schema.time_format)
        elif key in ("weight", "bid"):
            numbers = _numbers(source, name)
            if not allow_missing:
                source.reject(np.isnan(numbers), name, f"no {key}", partial(source.series, name))
            source.reject(numbers < 0, name, f"negative {key}", partial(source.series, name))
            chunk.keys[key] = pl.Series(numbers).cast(pl.Float32)
        else:
            codes, values = source.coded(name)
            if values.dtype.is_integer():
                values = values.cast(pl.Int64)
            else:
                values = as_text(values, source.missing)
                integers = values.cast(pl.Int64, strict=False)
                # Text such as "007" is not an integer: it could not be written back.
                if integers.null_count() == values.null_count() and integers.cast(pl.String).equals(values):
                    values = integers
            if key == "request_id" and values.null_count():
                missing = values.is_null().to_numpy()
                source.reject_codes(codes, values, missing, name, "no request id")
            chunk.keys[key] = values.gather(codes)


def _timestamps(source: _Source, name: str, unit: TimeUnit, layout: str | None) -> pl.Series:
    codes, values = source.coded(name)
    raw = source.frame[name]
    if raw.dtype.is_temporal():
        codes, values = np.arange(source.rows, dtype=np.int32), raw
    seconds = seconds_of(values, unit, layout, source.missing)
    source.reject_codes(codes, values, seconds.is_null().to_numpy(), name, "not a timestamp")
    if layout is None and unit == "s" and not values.dtype.is_temporal():
        date = date_layout(values)
        if date is not None:
            reason = f'timestamp is a date written as a number: set time_format in the schema to "{date}"'
            source.reject_codes(codes, values, np.ones(len(values), dtype=bool), name, reason)
        for finer in ("ms", "us", "ns"):
            most = LATEST_TIMESTAMP * UNITS[finer]
            late = seconds.is_between(most // 1000, min(most, 2**63) - 1).fill_null(False).to_numpy()
            reason = f'timestamp is not in seconds since 1970: set time_unit in the schema to "{finer}"'
            source.reject_codes(codes, values, late, name, reason)
    late = (seconds.abs() >= LATEST_TIMESTAMP).fill_null(False).to_numpy()
    source.reject_codes(codes, values, late, name, "timestamp is not in seconds since 1970")
    return seconds.gather(codes)
