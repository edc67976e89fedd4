"""Criteo display advertising: a label, 13 counts, 26 hashed categories.

The original files are tab-separated without a header; the benchmark splits that circulate as CSV have one
(`label,I1,...,I13,C1,...,C26`). Both are read. In one of these splits (Criteo_x1) the counts are scaled to numbers
with a fraction; where the first rows have such, they are read as numbers, and every category has a row of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from fullrank.data.formats.base import split_files, training_file
from fullrank.data.formats.delimited import delimited_chunks
from fullrank.data.formats.layout import Layout, text_layout
from fullrank.data.formats.lines import first_line, read_blocks
from fullrank.data.raw import RawChunk, check_columns, raw_columns
from fullrank.schema import Categorical, Feature, Label, Numeric, Schema

COUNTS = tuple(f"I{place}" for place in range(1, 14))
CATEGORIES = tuple(f"C{place}" for place in range(1, 27))
COLUMNS = ("label", *COUNTS, *CATEGORIES)
# As in the public benchmark's first Criteo setting: rarer categories share the out-of-vocabulary row.
MIN_COUNT = 10
_SAMPLE_BYTES = 1 << 18


class Criteo:
    """See the module."""

    name = "criteo"

    def default_schema(self, path: Path) -> Schema:
        file = training_file(self, path)
        scaled = self._scaled(file)
        counts: list[Feature] = [
            Numeric(name=name, encoding="scalar") if scaled else Categorical(name=name, encoding="log2_bucket")
            for name in COUNTS
        ]
        categories = [Categorical(name=name, min_count=1 if scaled else MIN_COUNT) for name in CATEGORIES]
        return Schema(features=(*counts, *categories), labels=(Label(name="label"),))

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        layout = self._layout(path)
        wanted = list(dict.fromkeys([*raw_columns(schema), *extra]))
        check_columns(path, wanted, layout.names, " of Criteo's format")
        return delimited_chunks(path, layout, wanted)

    def parts(self, path: Path) -> dict[str, Path] | None:
        return split_files(path, (".txt", ".csv", ".tsv"))

    def _scaled(self, path: Path) -> bool:
        """Whether the counts have fractions, by the first rows; counts written as 260.0 have none."""
        layout = self._layout(path)
        lines = next(read_blocks(path, _SAMPLE_BYTES)).decode("utf-8", "replace").split("\n")[layout.skipped :]
        places = [layout.names.index(name) for name in COUNTS]
        rows = (line.split(layout.separator) for line in lines)
        return any(
            row[place].partition(".")[2].strip("0 ")
            for row in rows
            if len(row) == len(layout.names)
            for place in places
        )

    def _layout(self, path: Path) -> Layout:
        line = first_line(path)
        if line.lower().startswith("label"):
            layout = text_layout(path)
            names = ("label", *layout.names[1:])
            if sorted(names) != sorted(COLUMNS):
                raise ValueError(f"{path} line 1: expected the columns label, I1 to I13, C1 to C26")
            return replace(layout, names=names)
        fields = line.count("\t") + 1
        if fields != len(COLUMNS):
            raise ValueError(
                f"{path} line 1: {fields} tab-separated fields, expected {len(COLUMNS)} (the label, 13 counts, 26 "
                "categories): this is not Criteo's format"
            )
        return Layout(COLUMNS, "\t", skipped=0)
