"""From values as JSON has them to columns as the encoders take them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from fullrank.data.arrow import as_series
from fullrank.data.spelling import as_text
from fullrank.data.values import lists_of
from fullrank.schema import MultiCategorical
from fullrank.schema import Sequence as Events

LONGEST_BAG = 10_000
_LARGEST_INTEGER = 2**63 - 1


def scalar_column(name: str, values: Sequence[Any], *, numeric: bool) -> pl.Series:
    """A column of one value per row; null is missing.

    Integers and floats in one column are fine, and so are text and numbers: a category may be 7 in one row and "7" in
    the next.

    Raises:
        ValueError: if a value is not text, a number or null; names the column and, of several rows, the row.
    """
    for row, value in enumerate(values):
        if not isinstance(value, str | int | float | None):
            place = f"row {row + 1}: " if len(values) > 1 else ""
            expected = "one number" if numeric else "one text or number"
            raise ValueError(f'{place}feature "{name}" is {shown(value)}, expected {expected}')
    dtype, change = _type_of(values, numeric=numeric)
    return pl.Series(name, [change(value) for value in values], dtype=dtype)


def list_column(name: str, values: Sequence[Any], feature: MultiCategorical | Events, *, numeric: bool) -> pl.Series:
    """A column of one list per row; null is the empty list, and text is split at the separator as in the log.

    Of a longer history only the newest events are looked at, of a longer bag its beginning, so that a list costs no
    more than one of the length that the model reads.

    Raises:
        ValueError: if a value is no such list.
    """
    lists: list[list[Any]] = []
    for row, value in enumerate(values):
        place = f"row {row + 1}: " if len(values) > 1 else ""
        if value is not None and not isinstance(value, list | str):
            raise ValueError(f'{place}feature "{name}" is {shown(value)}, expected a list')
        elements = value if isinstance(value, list) else _elements(value or "", feature.separator)
        # Of a bag missing values are left out first, so that more than its length are needed.
        newest = isinstance(feature, Events)
        elements = elements[-feature.max_length :] if newest else elements[: max(LONGEST_BAG, feature.max_length)]
        for element in elements:
            if not isinstance(element, str | int | float | None):
                raise ValueError(f'{place}feature "{name}" has {shown(element)} in its list, expected text or numbers')
        lists.append(elements)
    dtype, change = _type_of([element for elements in lists for element in elements], numeric=numeric)
    return pl.Series(name, [[change(element) for element in elements] for elements in lists], dtype=pl.List(dtype))


def check_alike(sequence: Events, columns: Mapping[str, Sequence[Any]]) -> None:
    """Refuse the fields of a sequence where their whole lists differ in length: once they are cut, nobody sees it.

    Args:
        columns: the lists of each field, row by row.

    Raises:
        ValueError: names the field and, of several rows, the row.
    """
    (first, expected), *others = columns.items()
    for name, values in others:
        for row, (one, other) in enumerate(zip(expected, values, strict=True)):
            lengths = [_length(value, sequence.separator) for value in (one, other)]
            if lengths[0] != lengths[1] and min(lengths) > sequence.max_length:
                place = f"row {row + 1}: " if len(values) > 1 else ""
                raise ValueError(f'{place}"{name}" has {lengths[1]:,} events, "{first}" has {lengths[0]:,}')


def _length(value: Any, separator: str) -> int:
    if isinstance(value, str):
        value = _elements(value, separator)
    return len(value) if isinstance(value, list) else 0


def _elements(text: str, separator: str) -> list[Any]:
    if text[:1] != "[" and separator != " ":
        return text.split(separator) if text else []
    return as_series(lists_of(pl.Series([text]), separator).elements, "").to_list()


def shown(value: Any) -> str:
    """A value as an error message quotes it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _type_of(values: Iterable[Any], *, numeric: bool) -> tuple[Any, Any]:
    """The narrowest type that holds all values, and what turns each into it."""
    kinds: set[type] = set()
    for value in values:
        kinds.add(str if isinstance(value, int) and abs(value) > _LARGEST_INTEGER else type(value))
    kinds.discard(type(None))
    if bool in kinds:
        return (
            (pl.Float64, lambda value: None if value is None else float(value))
            if numeric and str not in kinds
            else (pl.String, _text)
        )
    if kinds <= {int}:
        return pl.Int64, lambda value: value
    if kinds <= {float} or (numeric and kinds <= {int, float}):
        return pl.Float64, lambda value: None if value is None else float(value)
    return pl.String, _text


def _text(value: Any) -> str | None:
    if isinstance(value, float):
        text: str | None = as_text(pl.Series([value]))[0]
        return text
    if isinstance(value, bool):
        return "true" if value else "false"
    return None if value is None else str(value)
