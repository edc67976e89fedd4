"""Sparse text `label index:value ...` (libFM, LIBSVM), and the CSV form in which benchmarks pass Frappe and
MovieLens-tag around.

Rows with one entry per field (Frappe has 10, MovieLens-tag 3) become one categorical feature for each place; rows of
varying length become a single bag. Only entries of value 1 are ids; a log with other values is refused row by row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl

from fullrank.data.formats.base import training_file
from fullrank.data.formats.delimited import delimited_chunks
from fullrank.data.formats.layout import Layout, text_layout
from fullrank.data.formats.letor import Letor
from fullrank.data.formats.lines import bare_name, first_line, read_blocks
from fullrank.data.raw import LINE_COLUMN, RawChunk, check_columns, raw_columns, rejected_table
from fullrank.data.splits import PARTS
from fullrank.schema import Categorical, Keys, Label, MultiCategorical, Schema

_SAMPLE_BYTES = 1 << 20
# Share of the rows that must have the same number of entries to be read as fields.
_MOST_ROWS = 0.99
# A character that no text of this format holds: lines are read whole.
_NEVER = "\x01"
_QUERY = re.compile(r"\S+\s+qid:")
_ENDINGS = (".libfm", ".svm", ".libsvm", ".txt", ".csv")


class LibFM:
    """See the module."""

    name = "libfm"

    def default_schema(self, path: Path) -> Schema:
        file = training_file(self, path)
        if _is_ranking(file):
            return Letor().default_schema(file)
        if _is_csv(file):
            names = text_layout(file).named
            keys = Keys(
                user_id=next((name for name in ("user_id", "user") if name in names), None),
                item_id=next((name for name in ("item_id", "item") if name in names), None),
            )
            roles = {keys.user_id: "user", keys.item_id: "item"}
            features = [Categorical(name=n, role=roles.get(n, "context")) for n in names[1:]]  # type: ignore[arg-type]
            return Schema(features=tuple(features), labels=(Label(name=names[0]),), keys=keys)
        labels = (Label(name="label"),)
        fields = _fields(file)
        if fields is None:
            bag = MultiCategorical(name="features", separator=" ", max_length=1024, pooling="sum")
            return Schema(features=(bag,), labels=labels)
        return Schema(features=tuple(Categorical(name=f"field_{n}") for n in range(1, fields + 1)), labels=labels)

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        if _is_ranking(path):
            return Letor().chunks(path, schema, extra)
        named = list(dict.fromkeys([*raw_columns(schema), *extra]))
        if _is_csv(path):
            layout = text_layout(path)
            check_columns(path, named, layout.named)
            rows = delimited_chunks(path, layout, named)
            return (_labels_from_zero(chunk, schema) for chunk in rows)
        if "features" in named:
            check_columns(path, named, ["label", "features"])
            layout = Layout(("line",), _NEVER, quote="", skipped=0)
            lines = delimited_chunks(path, layout, ["line"], plain=frozenset({"line"}))
            return (_labels_from_zero(_bag_rows(chunk), schema) for chunk in lines)
        names = ["label", *(f"field_{n}" for n in range(1, (_fields(path) or len(schema.features)) + 1))]
        check_columns(path, named, names)
        layout = Layout(tuple(names), _separator(path), quote="", skipped=0)
        rows = delimited_chunks(path, layout, named)
        return (_labels_from_zero(_field_rows(chunk), schema) for chunk in rows)

    def parts(self, path: Path) -> dict[str, Path] | None:
        """Files of a directory whose names hold train, valid and test, such as `frappe.train.libfm`."""
        if not path.is_dir():
            return None
        found: dict[str, Path] = {}
        for file in sorted(path.iterdir()):
            name = bare_name(file)
            part = next((part for part in PARTS if part in name), None)
            if part is not None and name.endswith(_ENDINGS):
                if part in found:
                    raise ValueError(f"{path} has two {part} files: {found[part].name} and {file.name}")
                found[part] = file
        if "train" not in found:
            raise ValueError(f"{path} is a directory without a train file ({', '.join(_ENDINGS)})")
        return {part: found[part] for part in PARTS if part in found}


def _is_ranking(path: Path) -> bool:
    """Whether lines name a query (`qid:`), so that they are the format letor's."""
    return _QUERY.match(first_line(path)) is not None


def _is_csv(path: Path) -> bool:
    line = first_line(path)
    if ":" not in line and "," in line:
        return True
    if ":" not in line.split(" ", 2)[-1]:
        raise ValueError(f'{path} line 1: expected "label index:value ..." or a CSV header, got "{line[:60]}"')
    return False


def _separator(path: Path) -> str:
    return "\t" if "\t" in first_line(path) else " "


def _fields(path: Path) -> int | None:
    """Number of entries per row when the rows of a sample have the same, but for a few bad ones."""
    block = next(read_blocks(path, _SAMPLE_BYTES))
    counts = Counter(line.count(b":") for line in block.splitlines() if line.strip())
    fields, rows = counts.most_common(1)[0]
    trailing = block.split(b"\n", 1)[0].rstrip(b"\r").endswith(b" ")
    return fields if rows >= _MOST_ROWS * counts.total() and not trailing else None


def _over_values(chunk: RawChunk, column: str, change: pl.Expr) -> RawChunk:
    """Change a column once per distinct value; `change` reads the column `value`."""
    if column in chunk.dictionaries:
        changed = chunk.dictionaries[column].alias("value").to_frame().select(change).to_series()
        return replace(chunk, dictionaries={**chunk.dictionaries, column: changed})
    changed = chunk.frame[column].alias("value").to_frame().select(change).to_series().alias(column)
    return replace(chunk, frame=chunk.frame.with_columns(changed))


def _labels_from_zero(chunk: RawChunk, schema: Schema) -> RawChunk:
    """Labels -1 and +1 are 0 and 1."""
    value = pl.col("value")
    change = pl.when(value.cast(pl.Float64, strict=False) == -1).then(pl.lit("0")).otherwise(value)
    for label in schema.labels:
        chunk = _over_values(chunk, label.name, change)
    return chunk


def _field_rows(chunk: RawChunk) -> RawChunk:
    """Entries without their `:1`; others are rejected."""
    rejected: list[tuple[int, str, str, str]] = []
    bad = pl.Series([False]).new_from_index(0, chunk.frame.height)
    entry = r"^\d+:1(\.0+)?$"
    for column in chunk.frame.columns:
        if not column.startswith("field_"):
            continue
        values = chunk.dictionaries.get(column, chunk.frame[column])
        wrong = ~values.str.contains(entry)
        if wrong.any():
            rows = wrong.gather(chunk.frame[column]) if column in chunk.dictionaries else wrong
            for row in (rows & ~bad).arg_true().to_list():
                text = values[chunk.frame[column][row]] if column in chunk.dictionaries else values[row]
                rejected.append((_line(chunk, row), column, "not an entry index:1", text))
            bad = bad | rows
        chunk = _over_values(chunk, column, pl.col("value").str.extract(r"^(\d+):"))
    return _without(chunk, bad, rejected)


def _bag_rows(chunk: RawChunk) -> RawChunk:
    """Label and bag of whole lines."""
    lines = chunk.frame["line"].str.strip_chars().str.replace_all("\t", " ", literal=True)
    cut = lines.str.splitn(" ", 2).struct
    entries = cut.field("field_1").fill_null("").str.split(" ").list.eval(pl.element().filter(pl.element() != ""))
    wrong = ~entries.list.eval(pl.element().str.contains(r"^\d+:1(\.0+)?$")).list.all()
    first = entries.list.eval(pl.element().filter(~pl.element().str.contains(r"^\d+:1(\.0+)?$"))).list.first()
    rejected = [
        (_line(chunk, row), "features", "not an entry index:1", first[row]) for row in wrong.arg_true().to_list()
    ]
    ids = entries.list.eval(pl.element().str.extract(r"^(\d+):"))
    columns = {"features": ids, "label": cut.field("field_0")}
    if LINE_COLUMN in chunk.frame.columns:
        columns[LINE_COLUMN] = chunk.frame[LINE_COLUMN]
    return _without(replace(chunk, frame=pl.DataFrame(columns)), wrong, rejected)


def _line(chunk: RawChunk, row: int) -> int:
    return int(chunk.frame[LINE_COLUMN][row]) if LINE_COLUMN in chunk.frame.columns else chunk.first_line + row


def _without(chunk: RawChunk, bad: pl.Series, rejected: list[tuple[int, str, str, str]]) -> RawChunk:
    if not rejected:
        return chunk
    table = pl.concat([chunk.rejected, rejected_table(rejected)])
    return replace(chunk, frame=chunk.numbered().filter(~bad), rejected=table)
