"""What a format of logs has to provide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy.typing as npt
import polars as pl
import pyarrow as pa

from fullrank.schema import Schema

LINE_COLUMN = "__line"

REJECTED_SCHEMA = {"line": pl.Int64, "column": pl.String, "reason": pl.String, "value": pl.String}


def no_rejected() -> pl.DataFrame:
    """An empty table of rejected rows."""
    return pl.DataFrame(schema=REJECTED_SCHEMA)


def as_series(array: pa.Array, name: str) -> pl.Series:
    """An Arrow array as a polars column, without a copy where the types allow it."""
    series = pl.from_arrow(array)
    assert isinstance(series, pl.Series)
    return series.alias(name)


def as_numpy(array: pa.Array) -> npt.NDArray[Any]:
    """An Arrow array of numbers or truth values; nulls among floats are NaN.

    Through polars, because Arrow's own way imports pandas wherever it is installed (50 MB).
    """
    return as_series(array, "").to_numpy()


def only_rejected(columns: Iterable[str], rejected: pl.DataFrame) -> RawChunk:
    """A chunk of no rows but bad ones, with the columns that the importer looks for."""
    return RawChunk(pl.DataFrame(schema={**dict.fromkeys(columns, pl.String), LINE_COLUMN: pl.Int64}), rejected)


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


class Format(Protocol):
    """A way in which logs are stored.

    A format that comes as a directory of several files takes the directory as `path`.
    """

    name: str

    def default_schema(self, path: Path) -> Schema:
        """The unfitted schema to use when the user gives none.

        Raises:
            ValueError: if `path` is not in this format.
        """
        ...

    def chunks(self, path: Path, schema: Schema) -> Iterator[RawChunk]:
        """The rows of `path` in order, about 10^5 at a time, in bounded memory. Called once per import and part.

        Raises:
            ValueError: if `path` is not in this format at all; single bad rows are reported in the chunk.
        """
        ...

    def parts(self, path: Path) -> dict[str, Path] | None:
        """The files of each split (`train`, `valid`, `test`) when the source comes already split, else None."""
        ...


@runtime_checkable
class SplitsRows(Protocol):
    """A format whose rows name their part, as the data's users usually split it.

    Attributes:
        split_column: column of its chunks with train, valid or test; used unless the caller asks for another split.
    """

    split_column: str


@runtime_checkable
class HoldsOut(Protocol):
    """A format that may come as a train and a test file, without a validation file.

    Attributes:
        held_out: what to set aside of the train file: all rows of some users drawn at random, or its last rows.
    """

    held_out: Literal["users", "rows"]
