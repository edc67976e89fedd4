"""Logs in text with separated fields (CSV, TSV)."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.csv

from fullrank.data.arrow import as_one_array, as_series
from fullrank.data.formats.base import split_files, training_file
from fullrank.data.formats.lines import BLOCK_BYTES, first_line, read_blocks
from fullrank.data.inference import infer_schema
from fullrank.data.lookahead import mapped
from fullrank.data.raw import LINE_COLUMN, RawChunk, check_columns, raw_columns, rejected_table
from fullrank.schema import Schema

_OPEN_QUOTE = "quote is not closed, or field is too long"
_SEPARATORS = (",", "\t", ";", "|")
_SHOWN = 200


def read_header(path: Path) -> tuple[list[str], str]:
    """Column names in the first line of a text file, and the separator, guessed from it.

    Raises:
        ValueError: if the file is empty, not UTF-8, or names a column twice.
    """
    line = first_line(path)
    separator = max(_SEPARATORS, key=line.count)
    names = next(csv.reader([line], delimiter=separator), [])
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'{path} line 1: the column "{name}" appears twice (is the header line missing?)')
        if not name:
            raise ValueError(f"{path} line 1: column {names.index(name) + 1} has no name")
    return names, separator


def delimited_chunks(
    path: Path,
    names: Sequence[str],
    wanted: Sequence[str],
    *,
    separator: str,
    header: bool,
    plain: frozenset[str] = frozenset(),
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[RawChunk]:
    """Rows of a text file with separated fields.

    Args:
        names: every column, in the file's order.
        wanted: the columns to read.
        separator: between fields.
        header: the first line holds names, not values.
        plain: columns whose values are mostly distinct: read as text, the others as codes into their distinct texts.

    Raises:
        ValueError: if the file is empty or its gzip stream is damaged. Lines with a wrong number of fields, or that
            are not UTF-8, are reported in the chunks.
    """

    def parsed(block: _Block) -> RawChunk:
        return _parse_block(block, names, wanted, separator, plain)

    return mapped(parsed, _numbered(read_blocks(path, block_bytes), header=header))


class _Block(NamedTuple):
    """Whole lines, the number of the first, and how many there are."""

    data: bytes
    first_line: int
    lines: int


def _numbered(blocks: Iterable[bytes], *, header: bool) -> Iterator[_Block]:
    """Blocks with their line numbers, without a byte order mark and the header line."""
    line, first = 1, True
    for block in blocks:
        data = block
        if first:
            data = data.removeprefix(b"\xef\xbb\xbf")
            if header:
                # The header is a single line: names with line ends in them are not supported.
                data, line = data.partition(b"\n")[2], 2
            first = False
        if data:
            lines = data.count(b"\n") + (not data.endswith(b"\n"))
            yield _Block(data, line, lines)
            line += lines


def _parse_block(
    block: _Block, names: Sequence[str], wanted: Sequence[str], separator: str, plain: frozenset[str]
) -> RawChunk:
    data, lines = block.data, block.lines
    if data.endswith((b"\n\n", b"\n\r\n")):
        # Blank lines at the end are common, and no reason to leave the fast path.
        data = data.rstrip(b"\r\n") + b"\n"
        lines = data.count(b"\n")
    skipped: list[Any] = []
    try:
        table = _parse(data, names, wanted, separator, plain, skipped)
        if not skipped and table.num_rows == lines:
            frame, dictionaries = _frame(table)
            return RawChunk(frame, first_line=block.first_line, dictionaries=dictionaries)
    except pa.ArrowInvalid:
        pass  # reading record by record finds out where
    return _parse_exactly(data, block.first_line, names, wanted, separator)


def _parse(
    data: bytes, names: Sequence[str], wanted: Sequence[str], separator: str, plain: frozenset[str], skipped: list[Any]
) -> pa.Table:
    def skip(row: Any) -> str:
        skipped.append(row)
        return "skip"

    coded = pa.dictionary(pa.int32(), pa.string())
    return pyarrow.csv.read_csv(
        pa.BufferReader(data),
        read_options=pyarrow.csv.ReadOptions(
            column_names=list(names), use_threads=False, block_size=max(len(data), 1) + 1
        ),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=separator, newlines_in_values=b'"' in data, invalid_row_handler=skip
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() if name in plain else coded for name in wanted},
            include_columns=list(wanted),
            strings_can_be_null=False,
            check_utf8=False,
        ),
    )


def _frame(table: pa.Table) -> tuple[pl.DataFrame, dict[str, pl.Series]]:
    """Columns, coded ones apart from their dictionaries.

    Raises:
        ArrowInvalid: if a text is not UTF-8. The parser does not look, so that a repeated text is checked once.
    """
    columns: list[pl.Series] = []
    dictionaries: dict[str, pl.Series] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        array = as_one_array(column)
        if pa.types.is_dictionary(array.type):
            array.dictionary.validate(full=True)
            dictionaries[name] = as_series(array.dictionary, name)
            columns.append(as_series(array.indices, name))
        else:
            array.validate(full=True)
            columns.append(as_series(array, name))
    return pl.DataFrame(columns), dictionaries


def _parse_exactly(data: bytes, line: int, names: Sequence[str], wanted: Sequence[str], separator: str) -> RawChunk:
    """`_parse_block` for a block with something odd in it: one record at a time, each with its line number."""
    rejected: list[tuple[int, str, str, str]] = []
    texts: list[str] = []
    for place, piece in enumerate(data.split(b"\n")):
        try:
            texts.append(piece.decode("utf-8"))
        except UnicodeDecodeError:
            column = _undecodable_column(piece, names, separator)
            rejected.append((line + place, column, "not UTF-8", piece[:_SHOWN].decode("utf-8", "backslashreplace")))
            texts.append("")
    bad_lines = {entry[0] for entry in rejected}
    indices = [names.index(name) for name in wanted]
    rows: list[list[str]] = []
    lines: list[int] = []
    for place, height, record in _records(texts, separator):
        number = line + place
        # Blank lines carry nothing; where they stand is kept by counting lines.
        if number in bad_lines or not record or (len(record) == 1 and not record[0].strip()):
            continue
        if len(record) != len(names) or (height > 1 and number + height - 1 in bad_lines):
            reason = f"{len(record)} fields, expected {len(names)}" if height else _OPEN_QUOTE
            rejected.append((number, "", reason, separator.join(record)[:_SHOWN]))
            continue
        rows.append([record[index] for index in indices])
        lines.append(number)
    frame = pl.DataFrame(rows, schema={name: pl.String for name in wanted}, orient="row")
    frame = frame.with_columns(pl.Series(LINE_COLUMN, lines, dtype=pl.Int64))
    return RawChunk(frame, rejected_table(rejected))


def _records(texts: list[str], separator: str) -> Iterator[tuple[int, int, list[str]]]:
    """Records of some lines: index of the first line, number of lines, fields. A quote that is not closed within
    the longest field that `csv` reads spoils its own line alone: it gives a record of no height, and reading goes on
    after it."""
    start = 0
    while start < len(texts):
        reader = csv.reader((text + "\n" for text in texts[start:]), delimiter=separator)
        begun = start
        try:
            for record in reader:
                end = begun + reader.line_num
                if end == len(texts) and record and record[-1].endswith("\n"):
                    break
                yield start, end - start, record
                start = end
            else:
                return
        except csv.Error:
            pass
        yield start, 0, [texts[start]]
        start += 1


def _undecodable_column(line: bytes, names: Sequence[str], separator: str) -> str:
    for name, piece in zip(names, line.split(separator.encode()), strict=False):
        try:
            piece.decode("utf-8")
        except UnicodeDecodeError:
            return name
    return ""


def named_chunks(
    path: Path, schema: Schema, stored: Mapping[str, str], extra: Collection[str] = ()
) -> Iterator[RawChunk]:
    """The columns that a schema reads from a text file with a header.

    Args:
        stored: the file's name for a column of the schema, where the two differ.
        extra: further columns.

    Raises:
        ValueError: if the file lacks one of the columns.
    """
    names, separator = read_header(path)
    wanted = {name: stored.get(name, name) for name in (*raw_columns(schema), *extra)}
    check_columns(path, wanted.values(), names)
    chunks = delimited_chunks(path, names, list(dict.fromkeys(wanted.values())), separator=separator, header=True)
    for chunk in chunks:
        lines = [LINE_COLUMN] if LINE_COLUMN in chunk.frame.columns else []
        frame = chunk.frame.select(*(pl.col(old).alias(new) for new, old in wanted.items()), *lines)
        coded = {new: chunk.dictionaries[old] for new, old in wanted.items() if old in chunk.dictionaries}
        yield replace(chunk, frame=frame, dictionaries=coded)


def mostly_distinct(schema: Schema) -> frozenset[str]:
    """Columns for which looking for distinct values is a waste: numbers, sequences, request ids, timestamps."""
    names = {feature.name for feature in schema.numeric}
    for sequence in schema.sequences:
        names.add(sequence.name)
        names.update(sequence.column(part) for part in sequence.fields)
    keys = schema.keys
    names.update(name for name in (keys.request_id, keys.weight, keys.bid) if name is not None)
    return frozenset(names - set(schema.embedded()) | ({keys.request_id} if keys.request_id else set()))


class Csv:
    """Text with a header line; the separator (comma, tab, semicolon, bar) is read off the header; `.gz` is unpacked."""

    name = "csv"
    suffixes = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")

    def default_schema(self, path: Path) -> Schema:
        return infer_schema(self.sample(path))

    def sample(self, path: Path) -> pl.DataFrame:
        """The first rows of the training part, as text."""
        path = training_file(self, path)
        names, separator = read_header(path)
        for raw in delimited_chunks(
            path, names, names, separator=separator, header=True, plain=frozenset(names), block_bytes=4 << 20
        ):
            return raw.frame.drop(LINE_COLUMN, strict=False)
        raise ValueError(f"{path} has a header and no rows")

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        names, separator = read_header(path)
        wanted = list(dict.fromkeys([*raw_columns(schema, names).values(), *extra]))
        check_columns(path, wanted, names)
        return delimited_chunks(path, names, wanted, separator=separator, header=True, plain=mostly_distinct(schema))

    def parts(self, path: Path) -> dict[str, Path] | None:
        return split_files(path, self.suffixes)
