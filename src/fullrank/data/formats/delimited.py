"""Rows of text with separated fields: a block at a time, whatever is odd in it record by record."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.csv

from fullrank.data.arrow import as_one_array, as_series
from fullrank.data.formats.layout import Layout, text_layout
from fullrank.data.formats.lines import BLOCK_BYTES, MOST_QUOTED_BYTES, read_blocks
from fullrank.data.lookahead import mapped
from fullrank.data.raw import LINE_COLUMN, RawChunk, check_columns, raw_columns, rejected_table
from fullrank.schema import Schema

_OPEN_QUOTE = "quote is not closed, or field is too long"
# Where texts are usually quoted, a stray quote is a mistake; elsewhere it is a character.
_QUOTING = ",;"
# Characters that stand for a separator of several, for a parser that knows one.
_STAND_INS = ("\x1f", "\x1e", "\x1d", "\x1c", "\x02", "\x03")
# Lines after which a quote that should join lines is judged by what it joins.
_JOINED_LINES = 16
_SHOWN = 200


def delimited_chunks(
    path: Path,
    layout: Layout,
    wanted: Sequence[str],
    *,
    plain: frozenset[str] = frozenset(),
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[RawChunk]:
    """Rows of a text file with separated fields.

    Args:
        wanted: the columns to read.
        plain: columns whose values are mostly distinct: read as text, the others as codes into their distinct texts.

    Raises:
        ValueError: if the file is empty or its packed stream is damaged. Lines with a wrong number of fields, or that
            are not UTF-8, are reported in the chunks.
    """

    def parsed(block: _Block) -> RawChunk:
        return _parse_block(block, layout, wanted, plain)

    blocks = read_blocks(path, block_bytes, quote=layout.quote.encode(), encoding=layout.encoding)
    return mapped(parsed, _numbered(blocks, layout.skipped))


class _Block(NamedTuple):
    """Whole lines, the number of the first, and how many there are."""

    data: bytes
    first_line: int
    lines: int


def _numbered(blocks: Iterable[bytes], skipped: int) -> Iterator[_Block]:
    """Blocks with their line numbers, without the lines before the first row."""
    line = 1
    for block in blocks:
        begin = 0
        while line <= skipped and begin < len(block):
            begin = block.find(b"\n", begin) + 1 or len(block)
            line += 1
        data = block[begin:] if begin else block
        if data:
            lines = data.count(b"\n") + (not data.endswith(b"\n"))
            yield _Block(data, line, lines)
            line += lines


def _parse_block(block: _Block, layout: Layout, wanted: Sequence[str], plain: frozenset[str]) -> RawChunk:
    data, lines, separator = block.data, block.lines, layout.separator
    if data.endswith((b"\n\n", b"\n\r\n")):
        # Blank lines at the end are common, and no reason to leave the fast path.
        data = data.rstrip(b"\r\n") + b"\n"
        lines = data.count(b"\n")
    if len(separator.encode()) > 1:
        separator = next((each for each in _STAND_INS if each.encode() not in data), "")
        if not separator:
            raise ValueError(f"line {block.first_line}: too many control characters for a separator {layout.separator}")
        data = data.replace(layout.separator.encode(), separator.encode())
    quoted = bool(layout.quote) and layout.quote.encode() in data
    if layout.trimmed and not quoted:
        mark = re.escape(separator.encode())
        data = re.sub(rb"[ \t]*(" + mark + rb"|\n)[ \t]*", rb"\1", data).strip(b" ")
    if not (layout.trimmed and quoted):
        try:
            table = _parse(data, layout, wanted, separator, plain)
            if table.num_rows == lines:
                frame, dictionaries = _frame(table)
                return RawChunk(frame, first_line=block.first_line, dictionaries=dictionaries)
        except (pa.ArrowInvalid, UnicodeDecodeError):
            pass  # reading record by record finds out where
    return _parse_exactly(data, block.first_line, layout, wanted, separator)


def _parse(data: bytes, layout: Layout, wanted: Sequence[str], separator: str, plain: frozenset[str]) -> pa.Table:
    coded = pa.dictionary(pa.int32(), pa.string())
    return pyarrow.csv.read_csv(
        pa.BufferReader(data),
        read_options=pyarrow.csv.ReadOptions(
            column_names=list(layout.names), use_threads=False, block_size=max(len(data), 1) + 1
        ),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=separator,
            quote_char=layout.quote or False,
            newlines_in_values=bool(layout.quote) and layout.quote.encode() in data,
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


def _parse_exactly(data: bytes, line: int, layout: Layout, wanted: Sequence[str], separator: str) -> RawChunk:
    """`_parse_block` for a block with something odd in it: one record at a time, each with its line number."""
    names = layout.names
    rejected: list[tuple[int, str, str, str]] = []
    texts: list[str] = []
    for place, piece in enumerate(data.split(b"\n")):
        try:
            texts.append(piece.decode("utf-8").removesuffix("\r"))
        except UnicodeDecodeError:
            column = _undecodable_column(piece, names, separator)
            rejected.append((line + place, column, "not UTF-8", piece[:_SHOWN].decode("utf-8", "backslashreplace")))
            texts.append("")
    bad_lines = {entry[0] for entry in rejected}
    places = {name: place for place, name in enumerate(names)}
    indices = [places[name] for name in wanted]
    rows: list[list[str]] = []
    lines: list[int] = []

    def shown(text: str) -> str:
        return text.replace(separator, layout.separator)[:_SHOWN]

    for place, height, record in _records(texts, separator, layout.quote, len(names), trimmed=layout.trimmed):
        number = line + place
        # Blank lines carry nothing; where they stand is kept by counting lines.
        if number in bad_lines or not record or (len(record) == 1 and not record[0].strip()):
            continue
        broken = height > 1 and any(each in bad_lines for each in range(number, number + height))
        if len(record) == len(names) and not broken:
            rows.append([record[index] for index in indices])
            lines.append(number)
            continue
        if layout.comments and record[0].startswith("#"):
            continue
        reason = f"{len(record)} fields, expected {len(names)}" if height else _OPEN_QUOTE
        # Every line of a record is counted, so that none is lost.
        for each in range(place, place + max(height, 1)):
            if line + each not in bad_lines:
                rejected.append(
                    (line + each, "", reason, shown(separator.join(record) if each == place else texts[each]))
                )
    columns: list[Sequence[str]] = [*zip(*rows, strict=True)] if rows else [[] for _ in wanted]
    frame = pl.DataFrame(
        [pl.Series(name, values, dtype=pl.String) for name, values in zip(wanted, columns, strict=True)]
    )
    frame = frame.with_columns(pl.Series(LINE_COLUMN, lines, dtype=pl.Int64))
    return RawChunk(frame, rejected_table(rejected))


def _records(
    texts: list[str], separator: str, quote: str, width: int, *, trimmed: bool
) -> Iterator[tuple[int, int, list[str]]]:
    """Records of some lines: index of the first line, number of lines, fields.

    A quote that is not closed within the longest field that `csv` reads, or that would join lines of which most are
    rows of their own, concerns its own line alone: where texts are usually quoted it gives a record of no height, and
    elsewhere it is a character of its line.
    """
    start = 0
    while start < len(texts):
        text, height = texts[start], 1
        if not quote or quote not in text:
            record = text.split(separator) if text else []
        else:
            record, height = _quoted_record(texts, start, separator, quote, width)
            if not height:
                record = text.split(separator)
                if separator in _QUOTING or len(record) != width:
                    record = [text]
                else:
                    height = 1
        yield start, height, [field.strip() for field in record] if trimmed else record
        start += max(height, 1)


def _quoted_record(texts: list[str], start: int, separator: str, quote: str, width: int) -> tuple[list[str], int]:
    """Fields and number of lines of the record that begins in a line; no lines if its quote is a stray one."""
    is_open = False

    def feed() -> Iterator[str]:
        nonlocal is_open
        size = alone = 0
        for joined, place in enumerate(range(start, len(texts)), start=1):
            yield texts[place] + "\n"
            # The reader wants more: a quote is open.
            size += len(texts[place])
            alone += texts[place].count(separator) + 1 == width
            if size > MOST_QUOTED_BYTES or (width > 1 and joined >= _JOINED_LINES and 4 * alone > 3 * joined):
                break
        is_open = True

    reader = csv.reader(feed(), delimiter=separator, quotechar=quote, skipinitialspace=separator != " ")
    try:
        record = next(reader, [])
    except csv.Error:
        return [], 0
    height = reader.line_num
    if is_open:
        return [], 0
    if height > 1 and width > 1:
        alone = sum(text.count(separator) + 1 == width for text in texts[start : start + height])
        if 2 * alone > height:
            return [], 0
    return record, height


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
    layout = text_layout(path)
    wanted = {name: stored.get(name, name) for name in (*raw_columns(schema), *extra)}
    check_columns(path, wanted.values(), layout.named)
    for chunk in delimited_chunks(path, layout, list(dict.fromkeys(wanted.values()))):
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
