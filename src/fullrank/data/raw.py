"""A log as its source has it: raw columns, rows at a time, and the rows that could not be read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from fullrank.schema import Schema, Sequence

LINE_COLUMN = "__line"
# Columns with the true probability of a label, which a simulated log may have.
TRUE_PREFIX = "__true_"

REJECTED_SCHEMA = {"line": pl.Int64, "column": pl.String, "reason": pl.String, "value": pl.String}


def no_rejected() -> pl.DataFrame:
    """An empty table of rejected rows."""
    return pl.DataFrame(schema=REJECTED_SCHEMA)


def rejected_table(rows: list[tuple[int, str, str, str]]) -> pl.DataFrame:
    """A table of rejected rows (line, column, reason, value), in order of lines."""
    return pl.DataFrame(sorted(rows), schema=REJECTED_SCHEMA, orient="row")


def rejected_text(column: str, reason: str, value: str) -> str:
    """What is wrong with a rejected row, for a message that begins with its place."""
    return f'column "{column}" is "{value}": {reason}' if column else f"{reason}: {value}"


@dataclass(frozen=True)
class RawChunk:
    """Some consecutive rows of a log as the source has them, not yet encoded.

    Attributes:
        frame: one column per feature, label and key of the schema, under the schema's names; the fields of a sequence
            are named `<sequence>.<field>`. Text is allowed everywhere: the importer parses and checks numbers, labels
            and timestamps and reports the rows that do not parse. Null and "" mean missing. Bags and sequences are
            lists, or text joined with the feature's separator. Timestamps are integer seconds since 1970 UTC,
            datetimes, or text of either (`2014-10-21 05:00:00`). Further columns are ignored.
            Optional column `__line` (int64): where each row stands in the source, for reports.
        rejected: rows that could not even be cut into fields: columns line (int64), column, reason, value (text).
        first_line: line (or row) number of the frame's first row, when there is no `__line`; the others follow it.
        dictionaries: for columns that the frame holds as int32 codes, the text behind each code. A reader that has
            dictionary codes anyway saves the importer from finding the distinct values again.
    """

    frame: pl.DataFrame
    rejected: pl.DataFrame = field(default_factory=no_rejected)
    first_line: int = 1
    dictionaries: Mapping[str, pl.Series] = field(default_factory=dict)

    def numbered(self) -> pl.DataFrame:
        """The frame with the column `__line`."""
        if LINE_COLUMN in self.frame.columns:
            return self.frame
        lines = pl.int_range(self.first_line, self.first_line + self.frame.height, dtype=pl.Int64, eager=True)
        return self.frame.with_columns(lines.alias(LINE_COLUMN))


def only_rejected(columns: Iterable[str], rejected: pl.DataFrame) -> RawChunk:
    """A chunk of no rows but bad ones, with the columns that the importer looks for."""
    return RawChunk(pl.DataFrame(schema={**dict.fromkeys(columns, pl.String), LINE_COLUMN: pl.Int64}), rejected)


def check_columns(place: Path, wanted: Iterable[str], available: Collection[str], of: str = "") -> None:
    """That a source has the wanted columns.

    Raises:
        ValueError: names the first column that it lacks; `of` says whose the column is.
    """
    there = set(available)
    for name in wanted:
        if name not in there:
            raise ValueError(f'{place}: column "{name}"{of} is missing; the file has {", ".join(available)}')


def stored_columns(place: Path, schema: Schema, available: Collection[str], extra: Iterable[str]) -> list[str]:
    """Columns to read of a source whose columns have types: those of the schema, further ones, true probabilities.

    Raises:
        ValueError: names the first column that the source lacks.
    """
    wanted = list(dict.fromkeys([*raw_columns(schema, available).values(), *extra]))
    check_columns(place, wanted, available)
    return wanted + [name for name in available if name.startswith(TRUE_PREFIX)]


def raw_columns(schema: Schema, available: Collection[str] | None = None) -> dict[str, str]:
    """Names of the columns that a schema reads, each with the name under which the source has it.

    They differ in one case: a sequence of a single field may be stored under the sequence's name alone.
    """
    names = [feature.name for feature in schema.features if not isinstance(feature, Sequence)]
    columns = {name: name for name in names}
    for sequence in schema.sequences:
        for part in sequence.fields:
            name = sequence.column(part)
            alone = len(sequence.fields) == 1 and available is not None
            columns[name] = sequence.name if alone and name not in (available or ()) else name
    columns.update({label.name: label.name for label in schema.labels})
    columns.update({name: name for name in schema.keys.model_dump().values() if name is not None})
    return columns
