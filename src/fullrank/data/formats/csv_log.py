"""Logs in text with separated fields (CSV, TSV)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import polars as pl

from fullrank.data.formats.base import file_rows, part_files, split_files, training_file
from fullrank.data.formats.delimited import delimited_chunks, mostly_distinct
from fullrank.data.formats.layout import Layout, check_header, text_layout, without_header
from fullrank.data.formats.options import ReadOptions
from fullrank.data.inference import infer_schema
from fullrank.data.raw import LINE_COLUMN, RawChunk, check_columns, raw_columns, rejected_text
from fullrank.schema import Schema

_SAMPLE_BYTES = 4 << 20
_SAMPLE_FILES = 4


class Csv:
    """Text with a header line, in one file, in a directory of parts, or in files for each part of the split.

    The separator (comma, tab, semicolon, bar, `::`, control-A, spaces) is what divides the first lines evenly; `sep=;`
    lines and comments (#) above the header are understood; columns without a name are left out. Files may be packed
    (gzip, bzip2, zstd, xz, zip). In a directory of parts, `day=1` in the path of a file is a column `day` of its rows.
    """

    name = "csv"
    suffixes = (".csv", ".tsv", ".txt")

    def __init__(self, options: ReadOptions | None = None) -> None:
        self._options = options or ReadOptions()

    def with_options(self, options: ReadOptions) -> Csv:
        return Csv(options)

    def default_schema(self, path: Path) -> Schema:
        return infer_schema(self.sample(path))

    def sample(self, path: Path) -> pl.DataFrame:
        """The first rows of the training part, as text."""
        return self._first_rows(path)[0]

    def notes(self, path: Path) -> list[str]:
        """What was guessed of the layout, and how many of the first rows do not have it."""
        sample, rejected, layout = self._first_rows(path)
        found = list(layout.notes)
        if rejected.height:
            line, column, reason, value = rejected.row(0)
            seen = rejected.height + sample.height
            text = rejected_text(column, reason, value[:60])
            found.append(f"{rejected.height:,} of {seen:,} rows would be rejected: line {line}: {text}")
        return found

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        files = part_files(path, self.suffixes)
        for file, layout in zip(files, self._layouts(files), strict=True):

            def rows(known: Collection[str], file: Path = file, layout: Layout = layout) -> Iterator[RawChunk]:
                available = [*layout.named, *known]
                wanted = dict.fromkeys([*raw_columns(schema, available).values(), *extra])
                if layout.values and not set(wanted) <= set(available):
                    check_header(file, layout)
                check_columns(file, wanted, available)
                in_file = set(layout.names)
                stored = [name for name in wanted if name in in_file]
                return delimited_chunks(file, layout, stored, plain=mostly_distinct(schema))

            yield from file_rows(path, file, rows, several=len(files) > 1)

    def parts(self, path: Path) -> dict[str, Path] | None:
        return split_files(path, self.suffixes, pieces=True)

    def _layouts(self, files: list[Path]) -> list[Layout]:
        first = text_layout(files[0], self._options)
        return [first, *(without_header(first, text_layout(file, self._options)) for file in files[1:])]

    def _first_rows(self, path: Path) -> tuple[pl.DataFrame, pl.DataFrame, Layout]:
        """Rows, rejected lines, and the layout of the first file; several files give some rows each."""
        path = training_file(self, path)
        files = part_files(path, self.suffixes)
        some = files[:: max(len(files) // _SAMPLE_FILES, 1)][:_SAMPLE_FILES]
        layouts = self._layouts(some)
        check_header(some[0], layouts[0])
        chunks: list[RawChunk] = []
        for file, layout in zip(some, layouts, strict=True):
            size = _SAMPLE_BYTES // len(some)

            def rows(
                known: Collection[str], file: Path = file, layout: Layout = layout, size: int = size
            ) -> Iterator[RawChunk]:
                texts = frozenset(layout.named)
                return delimited_chunks(file, layout, layout.named, plain=texts, block_bytes=size)

            chunks += [next(file_rows(path, file, rows, several=len(files) > 1), RawChunk(pl.DataFrame()))]
        frame = pl.concat([chunk.frame.drop(LINE_COLUMN, strict=False) for chunk in chunks], how="diagonal")
        rejected = pl.concat(chunk.rejected for chunk in chunks)
        if not frame.height and not rejected.height:
            raise ValueError(f"{path} has a header and no rows")
        return frame, rejected, layouts[0]
