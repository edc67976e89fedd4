"""Reading raw values: the codes of distinct ones, numbers, lists joined in one text."""

# Shapes: n values of a column, u distinct ones.

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from fullrank.data.arrow import as_array, as_numpy, as_series
from fullrank.data.chunk import Floats, Integers, Mask
from fullrank.data.spelling import as_text, text_bytes

# Looking for distinct values among fewer rows than this costs more than it saves.
_FEW_ROWS = 64
_LARGEST = float(np.finfo(np.float32).max)
_TRUTHS = {"true": "1", "false": "0"}


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


def as_numbers(values: pl.Series, missing: Collection[str] = ()) -> tuple[Floats, Mask, Mask]:
    """Numbers (NaN where missing or wrong), which values are no numbers, and which are no finite numbers.

    Texts are read as `spelling` says; truth values are 0 and 1.
    """
    if values.dtype.is_nested() or values.dtype == pl.Binary or values.dtype.is_temporal():
        raise ValueError(f'column "{values.name}" holds {values.dtype}, expected a number per row')
    parsed = values.cast(pl.Float64, strict=False)
    if values.dtype.is_float():
        parsed = parsed.fill_nan(None)
    numbers = parsed.fill_null(float("nan")).to_numpy()
    # What float32 cannot hold would be infinite in the dataset.
    infinite = np.abs(numbers) > _LARGEST
    wrong = np.zeros(len(values), dtype=bool)
    if values.dtype == pl.String:
        # What does not read as a number at once may be blank, a marker, or a truth value.
        odd = np.flatnonzero((infinite | np.isnan(numbers)) & values.is_not_null().to_numpy())
        if len(odd):
            text = as_text(values.gather(odd), missing)
            again = text.replace(_TRUTHS).cast(pl.Float64, strict=False)
            numbers = numbers.copy()
            numbers[odd] = again.fill_null(float("nan")).to_numpy()
            wrong[odd] = (again.is_null() & text.is_not_null()).to_numpy()
            infinite[odd] = (again.is_nan() | (again.abs() > _LARGEST)).fill_null(False).to_numpy()
    marks = as_text(pl.Series(list(missing), dtype=pl.String)).cast(pl.Float64, strict=False).drop_nulls()
    marks = marks.filter(marks.is_finite())
    if len(marks):
        numbers = np.where(np.isin(numbers, marks.to_numpy()), np.nan, numbers)
    if infinite.any():
        numbers = np.where(infinite, np.nan, numbers)
    return numbers, wrong, infinite


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
        return Lists(offsets, self.elements.take(as_array(places)))

    def without_missing(self, missing: Collection[str] = ()) -> Lists:
        """Without elements that are empty texts or markers of missing values."""
        if not (pa.types.is_large_string(self.elements.type) or pa.types.is_string(self.elements.type)):
            return self
        texts = as_series(self.elements, "")
        empty = (as_text(texts, missing).is_null() & texts.is_not_null()).to_numpy()
        if not empty.any():
            return self
        before = np.concatenate([[0], np.cumsum(empty)])
        return Lists((self.offsets - before[self.offsets]).astype(np.int32), self.elements.filter(as_array(~empty)))


def lists_of(column: pl.Series, separator: str, missing: Collection[str] = ()) -> Lists:
    """Lists of a column of lists, or of text joined with a separator; null, the empty text and markers of missing
    values are empty lists.

    Texts may stand in square brackets, as JSON and NumPy print lists: then commas separate too, and quotes around
    elements do not count.
    """
    if isinstance(column.dtype, (pl.List, pl.Array)):
        array = as_array(column.cast(pl.List(column.dtype.inner)))
        return Lists(_offsets(as_numpy(array.value_lengths().fill_null(0))), array.flatten())
    text = _unwrapped(as_text(column, missing), separator)
    text = text.fill_null("") if text.null_count() else text
    if len(separator) == 1 and separator.isascii():
        return _split(text, ord(separator))
    array = as_array(text.str.split(separator))
    filled = (text != "").to_numpy()
    return Lists(_offsets(as_numpy(array.value_lengths()) * filled), array.filter(as_array(filled)).flatten())


def _unwrapped(text: pl.Series, separator: str) -> pl.Series:
    """Texts in square brackets as texts joined with the separator; several blanks that separate are one."""
    data, _ = text_bytes(text)
    if (data == ord("[")).any():
        inner = pl.col("text").str.slice(1, pl.col("text").str.len_chars() - 2).str.strip_chars()
        for quote in ('"', "'"):
            inner = (
                pl.when(inner.str.starts_with(quote))
                .then(inner.str.replace_all(quote, "", literal=True))
                .otherwise(inner)
            )
        if separator != ",":
            joined = inner.str.replace_all(r"\s*,\s*", separator.replace("$", "$$"))
            own = inner.str.contains(separator, literal=True) if separator.strip() else pl.lit(False)
            inner = pl.when(own).then(inner).otherwise(joined)
        wrapped = pl.col("text").str.contains(r"^(?s)\[.*\]$")
        text = text.to_frame("text").select(pl.when(wrapped).then(inner).otherwise(pl.col("text"))).to_series()
    if separator == " ":
        text = text.str.strip_chars(" ").str.replace_all("  +", " ")
    return text


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
