"""Columns of Parquet files and tables in memory, in the few types that the importer reads."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import polars as pl
import pyarrow as pa

from fullrank.data.values import is_value

Table = TypeVar("Table", pa.Table, pa.RecordBatch)


def plain_frame(frame: pl.DataFrame) -> pl.DataFrame:
    """A frame with the columns' values as text, numbers, truth values, times, or lists of these.

    Unsigned 64-bit and decimal numbers become integers where they are, a duration its seconds, bytes their text (or
    hexadecimal digits). A struct gives a column per field (`user.id`); a list of structs, or a map, gives a column of
    lists per field (`history.item`). What is left (lists of lists) stays as it is.
    """
    columns: list[pl.Series] = []
    for column in frame.get_columns():
        columns += [column] if _is_plain(column.dtype) else _plain(column)
    return pl.DataFrame(columns)


def with_known_types(table: Table) -> Table:
    """A table of Arrow without the numbers that polars does not have: their texts instead."""
    for place, field in enumerate(table.schema):
        if pa.types.is_decimal256(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(pa.string()))
    return table


def is_readable(dtype: pl.DataType) -> bool:
    """Whether a column of this type has one value, or one list of values, in each row."""
    return is_value(dtype.inner if isinstance(dtype, (pl.List, pl.Array)) else dtype)  # type: ignore[arg-type]


def check_readable(place: Path, frame: pl.DataFrame) -> None:
    """That each column can be read.

    Raises:
        ValueError: names the first that cannot.
    """
    for name, dtype in frame.schema.items():
        if not is_readable(dtype):
            raise ValueError(f'{place}: column "{name}" holds {dtype}, expected a value, or a list of values, per row')


def plain_names(schema: pa.Schema) -> dict[str, str]:
    """Names of the columns that `plain_frame` makes of a table, each with the table's column that it comes from."""
    names: dict[str, str] = {}
    for field in schema:
        kind = field.type
        if pa.types.is_map(kind):
            inside = ["key", "value"]
        else:
            kind = kind.value_type if _is_list(kind) else kind
            inside = [kind.field(place).name for place in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        names.update({f"{field.name}.{part}": field.name for part in inside} if inside else {field.name: field.name})
    return names


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_plain(dtype: pl.DataType) -> bool:
    if isinstance(dtype, pl.List):
        return _is_plain(dtype.inner)  # type: ignore[arg-type]
    return dtype in _PLAIN or (dtype.is_temporal() and dtype not in (pl.Duration, pl.Time))


_PLAIN = (
    pl.String, pl.Boolean, pl.Float32, pl.Float64, pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16,
    pl.UInt32, pl.Null,
)  # fmt: skip


def _plain(column: pl.Series) -> list[pl.Series]:
    dtype = column.dtype
    if isinstance(dtype, pl.Array):
        inner = _plain_values(column.explode()) if column.dtype.inner in _ODD else None  # type: ignore[attr-defined]
        return [column if inner is None else column.cast(pl.List(inner.dtype))]
    if _MAP is not None and isinstance(dtype, _MAP):
        return _plain(column.cast(pl.List(pl.Struct({"key": dtype.key, "value": dtype.value}))))
    if isinstance(dtype, pl.Struct):
        # A struct that is missing has no field.
        fields = [column.struct.field(field.name).alias(f"{column.name}.{field.name}") for field in dtype.fields]
        return [each for field in fields for each in (_plain(field) if not _is_plain(field.dtype) else [field])]
    if not isinstance(dtype, pl.List):
        return [_plain_values(column)]
    if isinstance(dtype.inner, pl.Struct):
        found = []
        for field in dtype.inner.fields:
            name = f"{column.name}.{field.name}"
            lists = column.to_frame("lists").select(
                pl.col("lists").list.eval(pl.element().struct.field(field.name)).alias(name)
            )
            found += [lists[name]] if _is_plain(lists[name].dtype) else _plain(lists[name])
        return found
    if isinstance(dtype.inner, pl.Duration):
        seconds = pl.element().cast(pl.Int64) / _TICKS[dtype.inner.time_unit or "us"]
        return [column.to_frame("lists").select(pl.col("lists").list.eval(seconds)).to_series().alias(column.name)]
    if dtype.inner in _ODD or isinstance(dtype.inner, pl.Decimal):
        return [column.cast(pl.List(_plain_values(column.explode()).dtype))]
    return [column]


_TICKS = {"ms": 10**3, "us": 10**6, "ns": 10**9}
# Releases of polars before 2 have maps as lists of structs.
_MAP = getattr(pl, "Map", None)
_ODD = (pl.UInt64, pl.Int128, pl.UInt128, pl.Float16, pl.Decimal, pl.Binary, pl.Time)


def _plain_values(column: pl.Series) -> pl.Series:
    dtype = column.dtype
    if isinstance(dtype, pl.Duration):
        return column.cast(pl.Int64) / _TICKS[dtype.time_unit or "us"]
    if dtype == pl.Time:
        return column.cast(pl.String)
    if dtype == pl.Float16:
        return column.cast(pl.Float32)
    if dtype == pl.Binary:
        try:
            return column.cast(pl.String)
        except pl.exceptions.PolarsError:
            return column.bin.encode("hex")
    if isinstance(dtype, pl.Decimal) and dtype.scale:
        return column.cast(pl.Float64)
    if dtype in (pl.UInt64, pl.Int128, pl.UInt128) or isinstance(dtype, pl.Decimal):
        integers = column.cast(pl.Int64, strict=False)
        return integers if integers.null_count() == column.null_count() else column.cast(pl.String)
    return column
