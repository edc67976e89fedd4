"""Logs with a JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from fullrank.data.formats.base import file_rows, part_files, split_files, training_file
from fullrank.data.formats.lines import first_line, read_blocks
from fullrank.data.formats.options import ReadOptions
from fullrank.data.inference import infer_schema
from fullrank.data.raw import LINE_COLUMN, RawChunk, check_columns, raw_columns, rejected_table
from fullrank.schema import Schema

_SUFFIXES = (".jsonl", ".ndjson", ".json")
_BLOCK_BYTES = 4 << 20
_LONGEST_LINE = 1 << 22
# A sample has so many values at most.
_SAMPLE_VALUES = 4 << 20
_DEEPEST = 8
_SHOWN = 200


class JsonLog:
    """A file, a directory of files, or files for each part of the split, of a JSON object per line.

    An object inside gives a column for each of its fields (`user.id`); a list of objects gives a list for each field
    (`history.item`), as the fields of a sequence are named. Lists of lists are left out. Keys that are missing in a
    line are missing values.
    """

    name = "jsonl"

    def __init__(self, options: ReadOptions | None = None) -> None:
        self._options = options or ReadOptions()

    def with_options(self, options: ReadOptions) -> JsonLog:
        other = sorted(options.model_fields_set - {"encoding"})
        if other:
            raise ValueError(f"JSON lines have no --{other[0]}: their fields carry their names")
        return JsonLog(options)

    def default_schema(self, path: Path) -> Schema:
        return infer_schema(self.sample(path))

    def sample(self, path: Path) -> pl.DataFrame:
        """The first rows of the training part."""
        path = training_file(self, path)
        file = part_files(path, _SUFFIXES)[0]

        def rows(known: Collection[str]) -> Iterator[RawChunk]:
            return self._rows(file, None)

        chunk = next(file_rows(path, file, rows, several=False))
        if not chunk.frame.height:
            bad = chunk.rejected
            told = f"line {bad['line'][0]}: {bad['reason'][0]}: {bad['value'][0][:60]}" if bad.height else "it has none"
            raise ValueError(f"{file}: expected a JSON object per line; {told}")
        return chunk.frame.drop(LINE_COLUMN)

    def notes(self, path: Path) -> list[str]:
        """How many of the first lines are no objects."""
        bad = next(self._rows(part_files(training_file(self, path), _SUFFIXES)[0], None)).rejected
        return [f"{bad.height:,} of the first lines would be rejected: {bad['reason'][0]}"] if bad.height else []

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        files = part_files(path, _SUFFIXES)
        for file in files:

            def rows(known: Collection[str], file: Path = file) -> Iterator[RawChunk]:
                available = [*self.sample(file).columns, *known]
                wanted = list(dict.fromkeys([*raw_columns(schema, available).values(), *extra]))
                seen = set(available)
                for chunk in self._rows(file, [name for name in wanted if name not in known]):
                    # A key may be rare.
                    seen.update(name for name in chunk.frame.columns if chunk.frame[name].dtype != pl.Null)
                    yield chunk
                check_columns(file, wanted, [*available, *(seen - set(available))])

            yield from file_rows(path, file, rows, several=len(files) > 1)

    def parts(self, path: Path) -> dict[str, Path] | None:
        return split_files(path, _SUFFIXES, pieces=True)

    def _rows(self, path: Path, wanted: list[str] | None) -> Iterator[RawChunk]:
        """Columns of a file; without names, a first chunk with all that its lines have."""
        encoding = self._options.encoding
        if first_line(path, encoding).lstrip().startswith("["):
            raise ValueError(f"{path} is one JSON array: write one object per line, as `jq -c '.[]'` does")
        line = 1
        for block in read_blocks(path, _BLOCK_BYTES, quote=b"", encoding=encoding):
            rows: list[dict[str, Any]] = []
            lines: list[int] = []
            names: dict[str, None] = dict.fromkeys(wanted or ())
            rejected: list[tuple[int, str, str, str]] = []
            for number, text in enumerate(block.split(b"\n"), start=line):
                if not text.strip():
                    continue
                try:
                    row = _flat(_object(text))
                except ValueError as error:
                    rejected.append((number, "", str(error), text[:_SHOWN].decode("utf-8", "backslashreplace")))
                    continue
                if wanted is None:
                    names.update(dict.fromkeys(row))
                    if rows and len(names) * len(rows) > _SAMPLE_VALUES:
                        break
                rows.append(row)
                lines.append(number)
            if wanted is None:
                # An empty list of objects has no fields to be known by.
                inside = {name.rpartition(".")[0] for name in names}
                empty = [name for name in inside & set(names) if not any(row.get(name) for row in rows)]
                names = dict.fromkeys(name for name in names if name not in empty)
            frame = pl.DataFrame([_column(name, [row.get(name) for row in rows]) for name in names])
            frame = frame.with_columns(pl.Series(LINE_COLUMN, lines, dtype=pl.Int64))
            yield RawChunk(frame, rejected_table(rejected))
            line += block.count(b"\n")


def _object(text: bytes) -> dict[str, Any]:
    if len(text) > _LONGEST_LINE:
        raise ValueError(f"longer than {_LONGEST_LINE:,} bytes")
    try:
        # Half a character (\ud800) is text to JSON and to nobody else.
        values = json.loads(text.decode("utf-8"))
        if b"\\u" in text:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("not a JSON object") from None
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return values


def _flat(values: dict[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """Scalars and lists of scalars by their dotted names."""
    found: dict[str, Any] = {}
    if depth > _DEEPEST:
        raise ValueError(f"objects more than {_DEEPEST} deep")
    for key, value in values.items():
        name = prefix + key
        if "\0" in name:
            raise ValueError("a name holds a NUL character")
        if isinstance(value, dict):
            found.update(_flat(value, f"{name}.", depth + 1))
        elif isinstance(value, list) and any(isinstance(element, dict) for element in value):
            events = [_flat(element, f"{name}.", depth + 1) if isinstance(element, dict) else {} for element in value]
            parts = dict.fromkeys(part for event in events for part in event)
            if len(parts) * len(events) > _SAMPLE_VALUES:
                raise ValueError("a list of objects with too many fields")
            found.update({part: [event.get(part) for event in events] for part in parts})
        else:
            found[name] = value
    return found


def _column(name: str, values: list[Any]) -> pl.Series:
    """A column of numbers, truth values or text, or of lists of these, whichever holds all of its values."""
    if not any(isinstance(value, list) for value in values):
        return _scalars(name, values)
    lists = [value if isinstance(value, list) or value is None else [value] for value in values]
    elements = [element for value in lists if value is not None for element in value]
    if any(isinstance(element, list) for element in elements):
        return pl.Series(name, [None] * len(values), dtype=pl.List(pl.List(pl.String)))
    flat = _scalars(name, elements)
    if flat.dtype == pl.String:
        lists = [None if value is None else [_text(element) for element in value] for value in lists]
    return pl.Series(name, lists, dtype=pl.List(flat.dtype if flat.dtype != pl.Null else pl.String), strict=False)


def _scalars(name: str, values: list[Any]) -> pl.Series:
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return pl.Series(name, [None] * len(values), dtype=pl.Null)
    if kinds == {bool}:
        return pl.Series(name, values, dtype=pl.Boolean)
    if kinds <= {int, float}:
        largest = max((abs(value) for value in values if isinstance(value, int)), default=0)
        if kinds == {int} and largest < 2**63:
            return pl.Series(name, values, dtype=pl.Int64)
        if largest < 2**53:
            return pl.Series(name, values, dtype=pl.Float64, strict=False)
    return pl.Series(name, [_text(value) for value in values], dtype=pl.String)


def _text(value: Any) -> str | None:
    """One text per value, however JSON spells it: 3.0 reads like 3."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isfinite(value) and value == math.floor(value) and abs(value) < 2**53:
        return str(int(value))
    return str(value)
