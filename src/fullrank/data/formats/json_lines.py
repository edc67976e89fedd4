"""Some fields of a file with one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.json

from fullrank.data.arrow import as_frame
from fullrank.data.formats.lines import read_blocks
from fullrank.data.raw import LINE_COLUMN, RawChunk, no_rejected, rejected_table

# Takes a field's value as JSON has it, gives the column's value, or raises ValueError with the reason.
Convert = Callable[[Any], Any]

_LONGEST_LINE = 1 << 22
_SHOWN = 200


def json_text(value: Any) -> str:
    """Text, or a whole number's digits."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError("expected text")


def json_integer(value: Any) -> int:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63 and value == int(value):
        return int(value)
    raise ValueError("expected an integer")


def json_chunks(
    path: Path,
    fields: Mapping[str, tuple[pa.DataType, Convert]],
    *,
    parse: Callable[[bytes], Any] = json.loads,
    wanted: Callable[[bytes], bool] | None = None,
) -> Iterator[RawChunk]:
    """Columns with the fields' values, in order of lines; a line without one of the fields, or with a value that does
    not convert, is rejected.

    Args:
        fields: Arrow type of each, and what to do with a value that Arrow does not read as that type.
        parse: of a line; lines that are not JSON need their own, which raises ValueError or SyntaxError on a bad one.
        wanted: lines to look at at all.

    Raises:
        ValueError: if the file is empty or its gzip stream is damaged.
    """
    plain = parse is json.loads and wanted is None
    line = 1
    for block in read_blocks(path, quote=b""):
        data = block
        chunk = _parse_block(data, fields) if plain else None
        if chunk is None:
            yield _parse_exactly(data, line, fields, parse, wanted)
        else:
            yield RawChunk(RawChunk(chunk, first_line=line).numbered())
        line += block.count(b"\n")


def _parse_block(data: bytes, fields: Mapping[str, tuple[pa.DataType, Convert]]) -> pl.DataFrame | None:
    """All lines at once; None if there is anything odd in one of them."""
    try:
        data.decode("utf-8")
        table = pyarrow.json.read_json(
            pa.BufferReader(data),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=pa.schema([(name, kind) for name, (kind, _) in fields.items()]),
                unexpected_field_behavior="ignore",
            ),
        )
    except (UnicodeDecodeError, pa.ArrowException):
        return None
    frame = as_frame(table)
    lines = data.count(b"\n") + (not data.endswith(b"\n"))
    texts = [name for name, dtype in frame.schema.items() if dtype == pl.String]
    whole = frame.height == lines and not any(frame[name].null_count() for name in fields)
    return frame if whole and not any((frame[name] == "").any() for name in texts) else None


def _parse_exactly(
    data: bytes,
    line: int,
    fields: Mapping[str, tuple[pa.DataType, Convert]],
    parse: Callable[[bytes], Any],
    wanted: Callable[[bytes], bool] | None,
) -> RawChunk:
    columns: dict[str, list[Any]] = {name: [] for name in fields}
    lines: list[int] = []
    rejected: list[tuple[int, str, str, str]] = []
    for number, text in enumerate(data.split(b"\n"), start=line):
        if not text.strip() or (wanted is not None and not wanted(text)):
            continue
        column = ""
        try:
            if len(text) > _LONGEST_LINE:
                raise ValueError(f"longer than {_LONGEST_LINE:,} bytes")
            values = _object(parse, text)
            row = []
            for name, (_, convert) in fields.items():
                column = name
                if values.get(name) is None:
                    raise ValueError("missing")
                row.append(convert(values[name]))
                if isinstance(row[-1], str):
                    # JSON may hold halves of characters (\ud800), which are no text.
                    row[-1].encode("utf-8")
        except ValueError as error:
            reason = "not text" if isinstance(error, UnicodeEncodeError) else str(error)
            shown = text if not column else str(values.get(column, "")).encode("utf-8", "backslashreplace")
            rejected.append((number, column, reason, shown[:_SHOWN].decode("utf-8", "backslashreplace")))
            continue
        for name, value in zip(fields, row, strict=True):
            columns[name].append(value)
        lines.append(number)
    table = pa.table({name: pa.array(columns[name], type=kind) for name, (kind, _) in fields.items()})
    frame = as_frame(table).with_columns(pl.Series(LINE_COLUMN, lines, dtype=pl.Int64))
    return RawChunk(frame, rejected_table(rejected) if rejected else no_rejected())


def _object(parse: Callable[[bytes], Any], text: bytes) -> dict[str, Any]:
    try:
        text.decode("utf-8")
        values = parse(text)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError("not a JSON object") from None
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return values
