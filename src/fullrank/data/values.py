"""Reading raw values: texts and the codes of distinct ones, numbers, times, lists joined in one text."""

# Shapes: n values of a column, u distinct ones.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from fullrank.data.arrow import as_array, as_numpy, as_series
from fullrank.data.chunk import Floats, Integers, Mask

# Looking for distinct values among fewer rows than this costs more than it saves.
_FEW_ROWS = 64
_LARGEST = float(np.finfo(np.float32).max)


def text_bytes(values: pl.Series) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The bytes of a String column one after the other, and where each text begins, shape (n + 1,)."""
    array = as_array(values)
    _, starts, data = array.buffers()
    offsets = np.frombuffer(starts, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    if len(array) == 0 or data is None:
        return np.zeros(0, dtype=np.uint8), np.zeros(len(array) + 1, dtype=np.int64)
    return np.frombuffer(data, dtype=np.uint8)[offsets[0] : offsets[-1]], offsets - offsets[0]


def is_value(dtype: pl.DataType) -> bool:
    """Whether a column of this type has a text, a number, a truth value or a time in each row."""
    if dtype.is_numeric() or dtype.is_temporal():
        return dtype != pl.Duration
    return dtype in (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null)


def factorise(column: pl.Series) -> tuple[Integers, pl.Series]:
    """Codes (int32, no nulls) and values of a column; the values are distinct unless there are only a few rows."""
    if not is_value(column.dtype):
        raise ValueError(f'column "{column.name}" holds {column.dtype}, expected one text or number per row')
    if column.dtype in (pl.Categorical, pl.Enum) or column.dtype.is_temporal():
        column = column.cast(pl.String)
    if column.dtype == pl.Null:
        return np.zeros(len(column), np.int32), pl.Series(column.name, [None], dtype=pl.String)
    if len(column) <= _FEW_ROWS:
        return np.arange(len(column), dtype=np.int32), column
    if column.dtype == pl.Boolean:
        column = column.cast(pl.String)
    return dictionary_codes(as_array(column), column.name)


def dictionary_codes(array: pa.Array, name: str) -> tuple[Integers, pl.Series]:
    """Codes (int32, no nulls) and distinct values of texts or numbers."""
    coded = array.dictionary_encode("encode")
    return as_numpy(coded.indices), as_series(coded.dictionary, name)


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
    # What float32 cannot hold would be infinite in the dataset.
    finite = parsed.abs() <= _LARGEST
    infinite = none if finite.all() else (~finite).fill_null(False).to_numpy()
    numbers = parsed.fill_null(float("nan")).to_numpy()
    if infinite.any():
        numbers = np.where(infinite, np.nan, numbers)
    return numbers, wrong, infinite


def parsed_times(column: pl.Series) -> pl.Series:
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


@dataclass(frozen=True)
class Lists:
    """A column of lists, flat.

    Attributes:
        offsets: int32, shape (n + 1,): list i holds elements offsets[i]:offsets[i + 1].
        elements: of all lists, one after the other.
    """

    offsets: Integers
    elements: pa.Array

    @property
    def lengths(self) -> Integers:
        return np.diff(self.offsets)

    def cut(self, most: int, *, newest: bool) -> Lists:
        """The first elements of each list, or the last."""
        lengths = self.lengths
        if not (lengths > most).any():
            return self
        kept = np.minimum(lengths, most)
        starts = self.offsets[1:] - kept if newest else self.offsets[:-1]
        offsets = _offsets(kept)
        places = np.repeat(starts - offsets[:-1], kept) + np.arange(offsets[-1], dtype=np.int32)
        return Lists(offsets, self.elements.take(pa.array(places)))

    def without_empty_texts(self) -> Lists:
        if not (pa.types.is_large_string(self.elements.type) or pa.types.is_string(self.elements.type)):
            return self
        empty = (as_series(self.elements, "") == "").fill_null(False).to_numpy()
        if not empty.any():
            return self
        before = np.concatenate([[0], np.cumsum(empty)])
        return Lists((self.offsets - before[self.offsets]).astype(np.int32), self.elements.filter(pa.array(~empty)))


def lists_of(column: pl.Series, separator: str) -> Lists:
    """Lists of a column of lists, or of text joined with a separator; null and the empty text are empty lists."""
    if isinstance(column.dtype, (pl.List, pl.Array)):
        array = as_array(column.cast(pl.List(column.dtype.inner)))
        return Lists(_offsets(as_numpy(array.value_lengths().fill_null(0))), array.flatten())
    text = column if column.dtype == pl.String else as_text(column)
    text = text.fill_null("") if text.null_count() else text
    if len(separator) == 1 and separator.isascii():
        return _split(text, ord(separator))
    array = as_array(text.str.split(separator))
    filled = (text != "").to_numpy()
    return Lists(_offsets(as_numpy(array.value_lengths()) * filled), array.filter(pa.array(filled)).flatten())


def _offsets(lengths: npt.NDArray[np.integer]) -> Integers:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _split(text: pl.Series, separator: int) -> Lists:
    """Cut texts at a byte: the bytes of all of them without the separators, and where each piece ends."""
    data, begins_N1 = text_bytes(text)
    is_separator = data == separator
    places = np.flatnonzero(is_separator)
    separators_before = np.searchsorted(places, begins_N1)
    filled = np.diff(begins_N1) > 0
    offsets = _offsets(np.diff(separators_before) + filled)
    # A piece ends at a separator or, the last of its text, with the text.
    last = np.zeros(offsets[-1], dtype=bool)
    last[offsets[1:][filled] - 1] = True
    bounds = np.zeros(offsets[-1] + 1, dtype=np.int64)
    ends = bounds[1:]
    ends[last] = (begins_N1 - separators_before)[1:][filled]
    ends[~last] = places - np.arange(len(places))
    pieces = pa.LargeStringArray.from_buffers(len(ends), pa.py_buffer(bounds), pa.py_buffer(data[~is_separator]))
    return Lists(offsets, pieces)
