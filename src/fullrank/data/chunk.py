"""Checked rows, column by column, with every repeated text held once."""

# Shapes: n rows of a chunk, u distinct values of a column.

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import polars as pl

Integers = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Coded:
    """A column as codes into its distinct values.

    Attributes:
        codes: int32, shape (n,), no nulls.
        values: shape (u,), distinct; text, or float64 for features that bucket numbers; null is the missing value.
    """

    codes: Integers
    values: pl.Series

    def take(self, rows: npt.NDArray[Any]) -> Coded:
        return Coded(self.codes[rows], self.values)


@dataclass(frozen=True)
class SharedLists:
    """Where the lists of some rows begin and end; rows may have the same list.

    Attributes:
        lists: int32, shape (n,): which list each row has.
        offsets: int32: list i holds elements offsets[i]:offsets[i + 1].
    """

    lists: Integers
    offsets: Integers

    def take(self, rows: npt.NDArray[Any]) -> Self:
        return replace(self, lists=self.lists[rows])

    @property
    def list_lengths(self) -> Integers:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Jagged(SharedLists):
    """Lists of coded values.

    Attributes:
        elements: codes and distinct values of the elements of all lists.
    """

    elements: Coded


@dataclass(frozen=True)
class JaggedNumbers(SharedLists):
    """Lists of numbers; NaN is missing."""

    numbers: Floats


@dataclass
class Chunk:
    """Checked rows.

    Attributes:
        numbers: of `Numeric` features; NaN is missing.
        ids: of `Categorical` features.
        bags: of bags and of the id fields of sequences (`<sequence>.<field>`).
        event_numbers: of the number fields of sequences.
        labels: float32; NaN is unobserved.
        keys: by the key's name in `Keys`.
        extra: further columns that are carried through, float32 or int64, shape (n,) or (n, width).
        parts: int8, the split that the source names for each row, when it was asked for.
        first_line: line of the first row, when `lines` is None.
        lines: int64, line of each row.
    """

    rows: int
    numbers: dict[str, Floats] = field(default_factory=dict)
    ids: dict[str, Coded] = field(default_factory=dict)
    bags: dict[str, Jagged] = field(default_factory=dict)
    event_numbers: dict[str, JaggedNumbers] = field(default_factory=dict)
    labels: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    keys: dict[str, pl.Series] = field(default_factory=dict)
    extra: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    parts: npt.NDArray[np.int8] | None = None
    first_line: int = 1
    lines: npt.NDArray[np.int64] | None = None

    def line(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        return self.lines[rows] if self.lines is not None else (rows + self.first_line).astype(np.int64)

    def take(self, rows: npt.NDArray[np.int64]) -> Chunk:
        return Chunk(
            rows=len(rows),
            numbers={name: values[rows] for name, values in self.numbers.items()},
            ids={name: column.take(rows) for name, column in self.ids.items()},
            bags={name: column.take(rows) for name, column in self.bags.items()},
            event_numbers={name: column.take(rows) for name, column in self.event_numbers.items()},
            labels={name: values[rows] for name, values in self.labels.items()},
            keys={name: values.gather(rows) for name, values in self.keys.items()},
            extra={name: values[rows] for name, values in self.extra.items()},
            parts=None if self.parts is None else self.parts[rows],
            lines=self.line(rows),
        )
