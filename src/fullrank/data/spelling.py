"""One text for each value, however a file or a request spells it.

The same value gets the same id within a log, between logs, and at the server. This is the whole rule:

1. Blanks at both ends do not count.
2. The empty text and the schema's missing markers (`NULL`, `NA`, ...) are missing, and so is a number that is NaN.
3. An integer written as a float is the integer: a text of an optional minus sign, digits without a leading zero, a
   point and zeros, below 2^53 in size; likewise a float without a fraction below 2^53. So `3`, ` 3`, `3.0`, `3.00`,
   and the JSON number 3.0 agree. A float of 2^53 or more may stand for several integers and stays a float.
4. Truth values are `true` and `false`, whether written `True` or `TRUE`.

Every other text stays as it is: `007`, `1e5`, `+3`, `1.50`, `9007199254740993` and `v1.0` name what they name.
"""

# Shapes: n values of a column.

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import polars as pl

from fullrank.data.arrow import as_array

_BLANKS = " \t\r\n\v\f\xa0"
_LEAST_INEXACT = 2**53
_INTEGER_AS_FLOAT = r"^(-?(?:0|[1-9][0-9]{0,15}))\.0+$"
_TRUTHS = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false", "-0": "0"}


_PLAIN = re.compile("[A-Za-z0-9_:-]+")


def is_plain(text: str) -> bool:
    """Whether a text surely stays as it is, unless a schema says that it is missing."""
    return _PLAIN.fullmatch(text) is not None and text not in _TRUTHS


def text_bytes(values: pl.Series) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The bytes of a String column one after the other, and where each text begins, shape (n + 1,)."""
    array = as_array(values)
    _, starts, data = array.buffers()
    offsets = np.frombuffer(starts, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    if len(array) == 0 or data is None:
        return np.zeros(0, dtype=np.uint8), np.zeros(len(array) + 1, dtype=np.int64)
    return np.frombuffer(data, dtype=np.uint8)[offsets[0] : offsets[-1]], offsets - offsets[0]


def as_text(values: pl.Series, missing: Collection[str] = ()) -> pl.Series:
    """The text that stands for each value in vocabularies, hashes and keys; null is missing. See the module.

    Args:
        missing: texts that mean that there is no value; the empty one always does.
    """
    if values.dtype == pl.String:
        return _spelled(values, missing)
    if values.dtype.is_float():
        whole = values.is_finite() & (values == values.floor()) & (values.abs() < _LEAST_INEXACT)
        text = values.fill_nan(None).cast(pl.String)
        if whole.any():
            integers = values.cast(pl.Int64, strict=False).cast(pl.String)
            text = text.to_frame("text").select(pl.when(whole).then(integers).otherwise(pl.col("text"))).to_series()
    elif values.dtype.is_decimal():
        text = _spelled(values.cast(pl.String), missing)
    else:
        text = values.cast(pl.String)
    marks = [mark for mark in missing if mark[-1:].isdigit()]
    return text.replace(marks, [None] * len(marks)) if marks else text


def _spelled(values: pl.Series, missing: Collection[str]) -> pl.Series:
    """Only texts that may have to change are looked at closely; mostly there are none."""
    if not len(values):
        return values
    data, offsets = text_bytes(values)
    if not len(data):
        return pl.Series(values.name, [None], dtype=pl.String).new_from_index(0, len(values))
    first, last = data[np.minimum(offsets[:-1], len(data) - 1)], data[np.maximum(offsets[1:], 1) - 1]
    marks = [text.encode() for text in (*_TRUTHS, *missing) if text]
    begins = np.zeros(256, dtype=bool)
    begins[[mark[0] for mark in marks]] = True
    odd = begins[first] & (np.diff(offsets) <= max(map(len, marks)))
    odd |= (first <= 32) | (last <= 32) | (first == 0xC2) | (last == 0xA0) | (offsets[1:] == offsets[:-1])
    if (data == ord(".")).any():
        odd |= last == ord("0")
    if values.null_count():
        odd &= values.is_not_null().to_numpy()
    places = np.flatnonzero(odd)
    if not len(places):
        return values
    before = values.gather(places)
    after = before.str.strip_chars(_BLANKS)
    integers = after.str.extract(_INTEGER_AS_FLOAT)
    if integers.null_count() < len(integers):
        exact = (integers.cast(pl.Int64).abs() < _LEAST_INEXACT).fill_null(False)
        after = integers.zip_with(exact, after)
    truths = after.is_in(list(_TRUTHS))
    if truths.any():
        after = after.replace(_TRUTHS)
    after = after.to_frame("text").select(
        pl.when(~pl.col("text").is_in(["", *missing])).then(pl.col("text"))
    ).to_series()  # fmt: skip
    if after.equals(before):
        return values
    sources = np.arange(len(values))
    sources[places] = len(values) + np.arange(len(places))
    return pl.concat([values, after.alias(values.name)]).gather(sources)
