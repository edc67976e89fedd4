"""Point-in-time histories: nothing of the present or the future, all of the recent past."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.data.histories import point_in_time

# Few users and few seconds, so that ties are the rule.
logs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=30)


def table(log: list[tuple[int, int]]) -> pl.DataFrame:
    frame = pl.DataFrame(log, schema={"user": pl.Int64, "time": pl.Int64}, orient="row")
    return frame.with_row_index("event").cast({"event": pl.Int64})


@settings(max_examples=150, deadline=None)
@given(log=logs, max_length=st.integers(1, 5), delay=st.integers(0, 3))
def test_a_history_is_the_latest_events_strictly_before_the_row(
    log: list[tuple[int, int]], max_length: int, delay: int
) -> None:
    rows = table(log)
    joined = point_in_time(
        rows,
        rows,
        user="user",
        timestamp="time",
        fields={"event": "past", "time": "past_time"},
        max_length=max_length,
        delay_seconds=delay,
        age="past_age",
    )
    assert joined.select("event", "user", "time").equals(rows.select("event", "user", "time"))
    for row in joined.iter_rows(named=True):
        earlier = [
            (time, event)
            for event, (user, time) in enumerate(log)
            if user == row["user"] and time + delay < row["time"]
        ]
        expected = sorted(earlier)[-max_length:]
        assert row["past"] == [event for _, event in expected]
        assert row["past_time"] == [time for time, _ in expected]
        assert row["past_age"] == [row["time"] - time for time, _ in expected]
        assert row["event"] not in row["past"]
        assert all(time < row["time"] for time in row["past_time"])


@settings(max_examples=50, deadline=None)
@given(log=logs, cut=st.integers(0, 7))
def test_what_happens_later_does_not_change_a_history(log: list[tuple[int, int]], cut: int) -> None:
    rows = table(log)
    past = rows.filter(pl.col("time") < cut)

    def histories(events: pl.DataFrame) -> pl.DataFrame:
        return point_in_time(past, events, user="user", timestamp="time", fields={"event": "past"}, max_length=4)

    assert histories(rows).equals(histories(past))


def test_text_users_unknown_users_and_null_users() -> None:
    events = pl.DataFrame({"user": ["b", "a", None, "b"], "time": [2, 1, 1, 1], "item": ["x", "y", "z", "w"]})
    rows = pl.DataFrame({"user": ["b", "c", None, "a"], "time": [9, 9, 9, 1]})
    joined = point_in_time(rows, events, user="user", timestamp="time", fields={"item": "history.item"}, max_length=5)
    assert joined["history.item"].to_list() == [["w", "x"], [], [], []]


def test_a_negative_delay_would_show_the_future() -> None:
    rows = table([(0, 1)])
    with pytest.raises(ValueError, match="a history holds no future"):
        point_in_time(
            rows, rows, user="user", timestamp="time", fields={"event": "past"}, max_length=5, delay_seconds=-1
        )


def test_a_row_without_time_is_an_error() -> None:
    rows = pl.DataFrame({"user": [1, 1], "time": [1, None]})
    with pytest.raises(ValueError, match=r'rows: column "time" has 1 nulls'):
        point_in_time(rows, rows, user="user", timestamp="time", fields={"time": "past"}, max_length=5)
