"""Which items may be returned, by what is known of them."""

# Shapes: A items that may be returned.

from __future__ import annotations

from functools import reduce
from operator import and_
from typing import Any

import polars as pl
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from torch import Tensor

from fullrank.data.spelling import as_text
from fullrank.retrieval.base import item_keys
from fullrank.schema import describe_errors

Values = list[str | int | float | bool]


class ItemFilter(BaseModel):
    """Conditions on columns of a table of items, all of which have to hold.

    A column holds a value or a list of values; values are compared by their texts, so that 3, 3.0 and "3" are equal. An
    item without a value meets no `any`, `all` or `range`.

    Attributes:
        any: columns that have at least one of these values.
        all: columns that have every one of them.
        none: columns that have none of them.
        range: columns of numbers from the first to the second, both included, None for no bound.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    any: dict[str, Values] = {}
    all: dict[str, Values] = {}
    none: dict[str, Values] = {}
    range: dict[str, tuple[float | None, float | None]] = {}

    @field_validator("any", "all", "none", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: one if isinstance(one, list | tuple) else [one] for name, one in value.items()}

    @classmethod
    def of(cls, value: Any, place: str = "filter") -> ItemFilter:
        """A filter of a mapping, as from YAML or JSON.

        Raises:
            ValueError: in one line, if it is none.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise ValueError(describe_errors(error, place).splitlines()[0]) from None

    def chosen(self, items: pl.DataFrame) -> pl.Series:
        """Whether each item may be returned.

        Raises:
            ValueError: if there is no such column, or one of a range holds no numbers.
        """
        for name in (*self.any, *self.all, *self.none, *self.range):
            if name not in items.columns:
                raise ValueError(f'filter: there is no column "{name}"; there are {", ".join(items.columns)}')
        conditions = [
            *(_has(items[name], values, every=False) for name, values in self.any.items()),
            *(_has(items[name], values, every=True) for name, values in self.all.items()),
            *(~_has(items[name], values, every=False) for name, values in self.none.items()),
            *(_within(items[name], *bounds) for name, bounds in self.range.items()),
        ]
        return reduce(and_, conditions, pl.repeat(True, items.height, dtype=pl.Boolean, eager=True))

    def keys(self, items: pl.DataFrame, item_id: str = "item_id") -> Tensor:
        """Keys (A,) of the items that may be returned: what `Retriever.search` takes as `allowed`.

        Raises:
            ValueError: see `chosen`.
        """
        return item_keys(items.filter(self.chosen(items))[item_id])


def _has(column: pl.Series, values: Values, *, every: bool) -> pl.Series:
    wanted = as_text(pl.Series([str(value) for value in values], dtype=pl.String)).unique()
    if every and not len(wanted):
        return pl.repeat(True, len(column), dtype=pl.Boolean, eager=True)
    if not isinstance(column.dtype, pl.List | pl.Array):
        found = as_text(column).is_in(wanted.implode()).fill_null(False)
        return found & (len(wanted) <= 1) if every else found
    elements = pl.DataFrame({"row": pl.int_range(len(column), eager=True), "value": column}).explode("value")
    elements = elements.with_columns(as_text(elements["value"]).alias("value"))
    there = elements.filter(pl.col("value").is_in(wanted.implode())).group_by("row").agg(pl.col("value").n_unique())
    rows = there.filter(pl.col("value") >= (len(wanted) if every else 1))["row"]
    return pl.int_range(len(column), eager=True).is_in(rows.implode())


def _within(column: pl.Series, low: float | None, high: float | None) -> pl.Series:
    if not column.dtype.is_numeric():
        raise ValueError(f'filter: column "{column.name}" is {column.dtype}, expected numbers for a range')
    found = column.is_not_null() & column.is_not_nan() if column.dtype.is_float() else column.is_not_null()
    if low is not None:
        found &= (column >= low).fill_null(False)
    if high is not None:
        found &= (column <= high).fill_null(False)
    return found
