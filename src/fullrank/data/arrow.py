"""Between Arrow, polars and NumPy, without a copy where the types allow it."""

# Shapes: n lists, m elements of all of them.

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa


def as_series(array: pa.Array, name: str) -> pl.Series:
    """An Arrow array as a polars column."""
    series = pl.from_arrow(array)
    assert isinstance(series, pl.Series)
    return series.alias(name)


def as_frame(table: pa.Table | pa.RecordBatch) -> pl.DataFrame:
    """An Arrow table as a polars frame.

    What its schema says beside names and types is left out: polars panics, aloud, where that is not UTF-8.
    """
    frame = pl.from_arrow(type(table).from_arrays(table.columns, names=table.schema.names))
    assert isinstance(frame, pl.DataFrame)
    return frame


def as_numpy(array: pa.Array) -> npt.NDArray[Any]:
    """An Arrow array of numbers or truth values, or of lists of them of fixed size; nulls among floats are NaN.

    Through polars, because Arrow's own way imports pandas wherever it is installed (50 MB).
    """
    return as_series(array, "").to_numpy()


def as_array(values: pl.Series | npt.NDArray[Any]) -> pa.Array:
    """A column in one piece, as Arrow has it; a matrix is lists of fixed size.

    Numbers are not handed to `pyarrow.array`, which imports pandas wherever it is installed (a sixth of a second).
    """
    if isinstance(values, pl.Series):
        return values.rechunk().to_arrow()
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(as_array(values.ravel()), values.shape[1])
    if values.dtype == bool:
        return pl.Series(values).to_arrow()
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def as_one_array(column: pa.ChunkedArray) -> pa.Array:
    """A column of a table in one piece."""
    if column.num_chunks == 1:
        return column.chunk(0)
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of dictionary codes, Arrow gives chunks again
        array = array.chunk(0) if array.num_chunks else pa.array([], type=column.type)
    return array


def list_array(offsets: npt.NDArray[np.integer[Any]], elements: pl.Series | npt.NDArray[Any]) -> pa.ListArray:
    """Lists: the i-th holds elements[offsets[i]:offsets[i + 1]].

    Args:
        offsets: shape (n + 1,), below 2^31.
        elements: shape (m,).
    """
    # 32-bit offsets: releases of polars before 2 crash on lists of text with 64-bit ones.
    return pa.ListArray.from_arrays(as_array(offsets.astype(np.int32, copy=False)), as_array(elements))
