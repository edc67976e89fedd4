"""Tables in memory as logs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from fullrank.data.inference import infer_schema
from fullrank.data.plain import check_readable, plain_frame, with_known_types
from fullrank.data.raw import RawChunk, stored_columns
from fullrank.schema import Schema

CHUNK_ROWS = 131_072
SAMPLE_ROWS = 50_000


class FrameLog:
    """A table in memory, read like a Parquet file; the path that the other formats read stands for it in messages."""

    name = "frame"

    def __init__(self, frame: pl.DataFrame) -> None:
        self._frame = plain_frame(frame)

    def default_schema(self, path: Path) -> Schema:
        return infer_schema(self.sample(path))

    def sample(self, path: Path) -> pl.DataFrame:
        """The first rows."""
        if not self._frame.height:
            raise ValueError(f"the {path} has no rows")
        return self._frame.head(SAMPLE_ROWS)

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        wanted = self._frame.select(stored_columns(path, schema, self._frame.columns, extra))
        check_readable(path, wanted)
        row = 1
        for frame in wanted.iter_slices(CHUNK_ROWS):
            yield RawChunk(frame, first_line=row)
            row += frame.height

    def parts(self, path: Path) -> dict[str, Path] | None:
        return None


def polars_frame(table: object) -> pl.DataFrame:
    """A table of polars (lazy too), pandas or Arrow, or a mapping from names to columns, as polars has it.

    Only a table of pandas needs pandas. Its index is left out; a column of objects of several types becomes text.

    Raises:
        ValueError: if it is none of these, or two columns have the same name.
    """
    if isinstance(table, pl.DataFrame):
        return table
    if isinstance(table, pl.LazyFrame):
        return table.collect()
    if any(kind.__module__.partition(".")[0] == "pandas" for kind in type(table).__mro__):
        return _from_pandas(table)
    try:
        if isinstance(table, Mapping):
            return pl.DataFrame(dict(table))
        if isinstance(table, pa.RecordBatchReader):
            table = table.read_all()
        if isinstance(table, (pa.Table, pa.RecordBatch)) or hasattr(table, "__arrow_c_stream__"):
            return pl.DataFrame(with_known_types(table) if isinstance(table, (pa.Table, pa.RecordBatch)) else table)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException, TypeError) as error:
        raise ValueError(f"not a table: {str(error).splitlines()[0]}") from None
    raise ValueError(f"expected a path or a table of pandas, polars or Arrow, got {type(table).__name__}")


def _from_pandas(table: Any) -> pl.DataFrame:
    names = [str(name) for name in table.columns]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'the column "{name}" appears twice')
    return pl.DataFrame([_pandas_column(name, table.iloc[:, place]) for place, name in enumerate(names)])


def _pandas_column(name: str, column: Any) -> pl.Series:
    try:
        return pl.Series(name, column)
    except (pl.exceptions.PolarsError, pa.ArrowException, TypeError):
        missing = column.isna()
        values = [None if gone else str(value) for value, gone in zip(column, missing, strict=True)]
        return pl.Series(name, values, dtype=pl.String)
