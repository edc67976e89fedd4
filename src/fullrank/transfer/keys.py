"""The numbers that events and users of a log are filed under."""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
import polars as pl

from fullrank.data.encoders import KEY_COLUMNS
from fullrank.data.hashing import stable_hash
from fullrank.transfer.lookup import SECOND, Ints

# What ids of a log are: whole numbers, or texts, whose hashes are filed.
IdKind = Literal["number", "text"]
_WHOLE = re.compile(r"-?\d{1,18}")


def event_columns(rows: pl.DataFrame) -> tuple[Ints, Ints, Ints]:
    """Number of each event, number of its user, and its time in microseconds."""
    event, user = (_numbers(rows[KEY_COLUMNS[key]]) for key in ("request_id", "user_id"))
    return event, user, rows[KEY_COLUMNS["timestamp"]].to_numpy().astype(np.int64) * SECOND


def kind_of(column: pl.DataType) -> IdKind:
    """Of the ids in a column of a dataset."""
    return "number" if column.is_integer() else "text"


def key_of(value: float | str, kind: IdKind) -> int | None:
    """The number of one id as a request says it, 7, 7.0 or "7"; None of what is no id of this kind."""
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    if kind == "text":
        return int(_numbers(pl.Series([text]))[0])
    return int(text) if _WHOLE.fullmatch(text) else None


def _numbers(column: pl.Series) -> Ints:
    """One whole number for each value: itself, or a hash of its text."""
    if column.dtype.is_integer():
        return column.to_numpy().astype(np.int64)
    hashes = stable_hash(column)
    if hashes.null_count():
        raise ValueError(
            f'column "{column.name}" has {hashes.null_count()} missing values, expected one for each event'
        )
    return np.asarray(hashes.to_numpy().view(np.int64))
