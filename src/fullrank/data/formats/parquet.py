"""Logs in Parquet."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet

from fullrank.data.arrow import as_frame
from fullrank.data.formats.base import split_files, training_file
from fullrank.data.inference import infer_schema
from fullrank.data.raw import RawChunk, stored_columns
from fullrank.schema import Schema


class ParquetLog:
    """One Parquet file, or a directory with `train.parquet` and so on."""

    name = "parquet"

    def default_schema(self, path: Path) -> Schema:
        return infer_schema(self.sample(path))

    def sample(self, path: Path) -> pl.DataFrame:
        """The first rows of the training part."""
        path = training_file(self, path)
        for batch in _open_parquet(path).iter_batches(batch_size=50_000):
            return as_frame(batch)
        raise ValueError(f"{path} has no rows")

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        file = _open_parquet(path)
        return self._batches(file, stored_columns(path, schema, file.schema_arrow.names, extra))

    def _batches(self, file: pyarrow.parquet.ParquetFile, wanted: list[str]) -> Iterator[RawChunk]:
        row = 1
        for batch in file.iter_batches(batch_size=131_072, columns=wanted):
            frame = as_frame(batch)
            yield RawChunk(frame, first_line=row)
            row += frame.height

    def parts(self, path: Path) -> dict[str, Path] | None:
        return split_files(path, (".parquet",))


def _open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    if not path.is_file():
        raise ValueError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from None
