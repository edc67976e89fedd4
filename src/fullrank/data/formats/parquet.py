"""Logs in Parquet."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet

from fullrank.data.arrow import as_frame
from fullrank.data.formats.base import file_rows, part_files, split_files, training_file
from fullrank.data.inference import infer_schema
from fullrank.data.plain import check_readable, plain_frame, plain_names, with_known_types
from fullrank.data.raw import RawChunk, stored_columns
from fullrank.schema import Schema

_SUFFIXES = (".parquet", ".pq")
# Rows are read so many at a time, fewer where they are wide: about so many bytes.
_BATCH_ROWS, _BATCH_BYTES = 131_072, 64 << 20
_SAMPLE_ROWS = 50_000
_SAMPLE_FILES = 4
_UNREADABLE = (
    pa.ArrowException,
    pl.exceptions.PolarsError,
    pl.exceptions.PanicException,
    OSError,
    NotImplementedError,
    UnicodeDecodeError,
)


class ParquetLog:
    """A Parquet file, a directory with `train.parquet` and so on, or a directory of files at any depth.

    In a directory of files, `day=1` in the path of a file is a column `day` of its rows.
    """

    name = "parquet"

    def default_schema(self, path: Path) -> Schema:
        return infer_schema(self.sample(path))

    def sample(self, path: Path) -> pl.DataFrame:
        """The first rows of the training part; several files give some rows each."""
        path = training_file(self, path)
        files = part_files(path, _SUFFIXES)
        some = files[:: max(len(files) // _SAMPLE_FILES, 1)][:_SAMPLE_FILES]
        frames: list[pl.DataFrame] = []
        for file in some:

            def rows(known: Collection[str], file: Path = file) -> Iterator[RawChunk]:
                opened = open_parquet(file)
                return _batches(file, opened, opened.schema_arrow.names, _SAMPLE_ROWS // len(some))

            chunk = next(file_rows(path, file, rows, several=False), None)
            frames += [chunk.frame] if chunk is not None else []
        if not any(frame.height for frame in frames):
            raise ValueError(f"{path} has no rows")
        return pl.concat(frames, how="diagonal_relaxed")

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        files = part_files(path, _SUFFIXES)
        for file in files:

            def rows(known: Collection[str], file: Path = file) -> Iterator[RawChunk]:
                opened = open_parquet(file)
                names = plain_names(opened.schema_arrow)
                wanted = stored_columns(file, schema, [*names, *known], extra)
                stored = dict.fromkeys(names[name] for name in wanted if name in names)
                for chunk in _batches(file, opened, list(stored), _BATCH_ROWS):
                    frame = chunk.frame.select(name for name in wanted if name in names)
                    check_readable(file, frame)
                    yield RawChunk(frame, first_line=chunk.first_line)

            yield from file_rows(path, file, rows, several=len(files) > 1)

    def parts(self, path: Path) -> dict[str, Path] | None:
        return split_files(path, _SUFFIXES, pieces=True)


def _batches(path: Path, file: pyarrow.parquet.ParquetFile, columns: list[str], rows: int) -> Iterator[RawChunk]:
    """Columns of a file, some rows at a time."""
    size = sum(file.metadata.row_group(place).total_byte_size for place in range(file.metadata.num_row_groups))
    per_row = size // max(file.metadata.num_rows, 1) + 1
    batches: Iterator[Any] = file.iter_batches(batch_size=max(min(rows, _BATCH_BYTES // per_row), 64), columns=columns)
    row = 1
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            frame = plain_frame(as_frame(with_known_types(batch)))
        except _UNREADABLE as error:
            raise ValueError(f"{path}: not readable from row {row} on: {_brief(error)}") from None
        yield RawChunk(frame, first_line=row)
        row += frame.height


def parquet_rows(path: Path) -> Iterator[RawChunk]:
    """All columns of a file.

    Raises:
        ValueError: if it is not readable.
    """
    file = open_parquet(path)
    return _batches(path, file, file.schema_arrow.names, _BATCH_ROWS)


def open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """A file whose footer is read.

    Raises:
        ValueError: if it is not Parquet, or has two columns of one name.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
    except (pa.ArrowException, OSError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {_brief(error)}") from None
    if any("\0" in name for name in names):
        raise ValueError(f"{path} is not a readable Parquet file: a name holds a NUL character")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'{path}: the column "{twice}" appears twice')
    return file


def _brief(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
