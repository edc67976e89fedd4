"""Histories as they were known when each row happened."""

# Shapes: n rows, m events, L maximum length.

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

from fullrank.data.arrow import as_series, list_array


def point_in_time(
    rows: pl.DataFrame,
    events: pl.DataFrame,
    *,
    user: str,
    timestamp: str,
    fields: Mapping[str, str],
    max_length: int,
    delay_seconds: int = 0,
    age: str | None = None,
) -> pl.DataFrame:
    """Add to each row the latest events of its user that lie strictly before its timestamp, oldest first.

    An event at the row's own second is left out, so a row never sees itself, nor what happened beside it. Events of
    equal time keep the order in which they are given. Neither table needs to be sorted.

    Args:
        rows: n rows with columns `user` and `timestamp` (integer seconds).
        events: m events with the same two columns and the fields; may be the rows themselves, or the clicked ones.
        fields: column of `events` -> name of the list column to add, such as `{"item_id": "history.item_id"}`.
        max_length: L; longer histories keep their latest events.
        delay_seconds: how long an event takes to become known; an event is seen when its time plus this lies strictly
            before the row.
        age: name of one more list column: seconds from each event to the row.

    Returns:
        `rows` with the list columns; rows of an unknown or null user have empty lists.

    Raises:
        ValueError: if a timestamp is null, or `max_length` is below 1, or `delay_seconds` is negative, or the histories
            hold 2^31 events or more.
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}, expected at least 1")
    if delay_seconds < 0:
        raise ValueError(f"delay_seconds is {delay_seconds}, expected at least 0: a history holds no future")
    for name, frame in (("rows", rows), ("events", events)):
        if frame[timestamp].null_count():
            raise ValueError(f'{name}: column "{timestamp}" has {frame[timestamp].null_count()} nulls, expected none')
    known = events.filter(pl.col(user).is_not_null()).sort(user, timestamp, maintain_order=True)
    codes = known.select(pl.col(user).unique(maintain_order=True)).with_row_index("code")
    row_codes = rows.select(user).join(codes, on=user, how="left", maintain_order="left")["code"]
    row_users = row_codes.cast(pl.Int64).fill_null(-1).to_numpy()
    event_users = known.select(pl.col(user).rle_id())[user].cast(pl.Int64).to_numpy()
    event_times = known[timestamp].cast(pl.Int64).to_numpy() + delay_seconds
    row_times = rows[timestamp].cast(pl.Int64).to_numpy()
    # Users and times as one sorted integer key: times become ranks, so that the product cannot overflow.
    moments = np.unique(event_times)
    event_keys = event_users * (len(moments) + 1) + np.searchsorted(moments, event_times)
    row_keys = row_users * (len(moments) + 1) + np.searchsorted(moments, row_times, side="left")
    ends = np.searchsorted(event_keys, row_keys, side="left")
    firsts = np.searchsorted(event_users, row_users, side="left")
    ends = np.where(row_users < 0, firsts, ends)
    starts = np.maximum(firsts, ends - max_length)
    lengths = ends - starts
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"the histories hold {offsets[-1]:,} events, at most 2^31 - 1 fit: join fewer rows at a time")
    places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    columns = []
    for column, name in fields.items():
        columns.append(as_series(list_array(offsets, known[column].gather(places)), name))
    if age is not None:
        ages = np.repeat(row_times, lengths) - (event_times - delay_seconds)[places]
        columns.append(as_series(list_array(offsets, ages), age))
    return rows.with_columns(columns)
