"""Histories and counters against a row-by-row search among strictly earlier rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fullrank.data import frames, past
from fullrank.data.dataset import Dataset, write_dataset
from fullrank.data.importing import import_dataset
from fullrank.schema import Schema

LENGTH = 3
SMOOTHING = 2.0
DELAY = 2.5
RAW = {"encoding": "scalar", "transform": "none"}
SCHEMA = Schema.model_validate(
    {
        "features": [
            {"kind": "categorical", "name": "item", "role": "item", "encoding": "identity", "num_embeddings": 5},
            {"kind": "categorical", "name": "genre", "role": "item", "encoding": "identity", "num_embeddings": 3},
            {"kind": "sequence", "name": "seen", "of": ["item"], "length": LENGTH},
            {"kind": "sequence", "name": "taken", "of": ["item", "genre"], "where": "bought", "length": LENGTH,
             "age": True},
            {"kind": "numeric", "name": "rows", "of": ["user"], "statistic": "count", **RAW},
            {"kind": "numeric", "name": "clicks", "of": ["genre"], "statistic": "count", "label": "clicked",
             **RAW},
            {"kind": "numeric", "name": "rate", "of": ["user", "genre"], "statistic": "rate", "label": "bought",
             "smoothing": SMOOTHING, **RAW, "missing_indicator": True},
        ],
        "labels": [{"name": "clicked"}, {"name": "bought", "delay_seconds": DELAY}],
        "keys": {"user_id": "user", "timestamp": "time"},
    }
)  # fmt: skip


@dataclass(frozen=True)
class Event:
    user: str | None
    time: int
    item: int
    genre: int | None
    clicked: int
    bought: int | None


LOGS = st.lists(
    st.builds(
        Event,
        user=st.sampled_from(["ann", "bob", None]),
        time=st.integers(0, 6),
        item=st.integers(0, 4),
        genre=st.sampled_from([0, 1, 2, None]),
        clicked=st.integers(0, 1),
        bought=st.sampled_from([0, 1, None]),
    ),
    min_size=1,
    max_size=30,
)
slow = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def table(log: list[Event]) -> pl.DataFrame:
    types = {"user": pl.String, "genre": pl.Int64, "bought": pl.Int64}
    return pl.DataFrame([vars(event) for event in log], schema_overrides=types)


def derived(log: list[Event]) -> list[dict[str, Any]]:
    dataset = Dataset.from_frame(table(log), SCHEMA, split="none")
    return dataset.scan("train").drop("bought").collect().to_dicts()


def searched(log: list[Event], row: Event) -> dict[str, Any]:
    """What `row` may know, by looking at every other row."""
    in_order = sorted(log, key=lambda event: event.time)
    known = [event for event in in_order if event.time < row.time]
    outcomes = [event for event in in_order if event.time + DELAY < row.time]
    mine = [event for event in known if event.user == row.user is not None][-LENGTH:]
    bought = [event for event in outcomes if event.user == row.user is not None and event.bought == 1][-LENGTH:]
    observed = [event.bought for event in outcomes if event.bought is not None]
    same = [
        event.bought
        for event in outcomes
        if event.bought is not None and row.user is not None and row.genre is not None
        if (event.user, event.genre) == (row.user, row.genre)
    ]
    prior = sum(observed) / len(observed) if observed else math.nan
    return {
        "seen.item": [event.item for event in mine],
        "taken.item": [event.item for event in bought],
        "taken.genre": [event.genre or 0 for event in bought],
        "taken.age": [math.log1p(row.time - event.time) for event in bought],
        "rows": len([event for event in known if event.user == row.user is not None]),
        "clicks": sum(event.clicked for event in known if event.genre == row.genre is not None),
        "rate": (sum(same) + SMOOTHING * prior) / (len(same) + SMOOTHING),
    }


@slow
@given(log=LOGS)
def test_derived_features_are_what_a_search_among_strictly_earlier_rows_finds(log: list[Event]) -> None:
    for row, found in zip(log, derived(log), strict=True):
        expected = searched(log, row)
        if math.isnan(expected["rate"]):
            assert found["rate__missing"] == 1
            del expected["rate"]
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-6), name


@slow
@given(log=LOGS, data=st.data())
def test_the_future_of_a_row_does_not_change_it(log: list[Event], data: st.DataObject) -> None:
    now = data.draw(st.integers(0, 6))
    past_rows = [event for event in log if event.time <= now]
    future = data.draw(st.permutations([event for event in log if event.time > now]))
    names = ["seen.item", "taken.item", "taken.genre", "taken.age", "rows", "clicks"]
    if past_rows:
        alone, together = derived(past_rows), derived(past_rows + future)
        for before, after in zip(alone, together, strict=False):
            assert [before[name] for name in names] == [after[name] for name in names]
            # The number of a row that knows no outcome at all is the mean of training, which the future belongs to.
            assert before["rate__missing"] == after["rate__missing"]
            assert before["rate__missing"] or before["rate"] == after["rate"]


@slow
@given(log=LOGS, rows=st.integers(1, 7))
def test_neither_chunks_nor_groups_of_keys_change_what_is_derived(log: list[Event], rows: int) -> None:
    whole = derived(log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "CHUNK_ROWS", rows)
        patch.setattr(past, "GROUP_ROWS", rows)
        patch.setattr(past, "BLOCK_ROWS", rows)
        patch.setattr("fullrank.data.derived.BLOCK_ROWS", rows)
        patch.setattr("fullrank.data.derived.BLOCK_EVENTS", rows)
        assert derived(log) == whole


def some_log(rows: int = 300) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "user": [f"u{number}" for number in rng.integers(0, 9, rows)],
            "item": rng.integers(0, 5, rows),
            "genre": rng.integers(0, 3, rows),
            "time": rng.integers(0, 200, rows),
            "clicked": rng.integers(0, 2, rows),
            "bought": rng.integers(0, 2, rows),
        }
    )


def test_csv_parquet_and_tables_give_the_same(tmp_path: Path) -> None:
    log = some_log()
    log.write_csv(tmp_path / "log.csv")
    log.write_parquet(tmp_path / "log.parquet")
    expected = Dataset.from_frame(log, SCHEMA, split="time")
    for kind in ("csv", "parquet"):
        found = import_dataset(kind, tmp_path / f"log.{kind}", tmp_path / kind, schema=SCHEMA)
        for split in ("train", "valid", "test"):
            assert found.scan(split).collect().equals(expected.scan(split).collect())
    assert expected.scan("test").collect()["seen.item"].list.len().min() == LENGTH  # of training rows


def test_a_repeated_request_is_nobodys_past() -> None:
    schema = SCHEMA.model_copy(update={"keys": SCHEMA.keys.model_copy(update={"request_id": "id"})})
    log = pl.DataFrame(
        {"id": [1, 1, 2], "user": ["ann"] * 3, "item": [1, 2, 3], "genre": [0, 0, 0], "time": [1, 2, 3],
         "clicked": [1, 1, 0], "bought": [0, 0, 0]}
    )  # fmt: skip
    dataset = Dataset.from_frame(log, schema, split="none", max_bad=0.5)
    frame = dataset.scan("train").collect()
    assert frame["seen.item"].to_list() == [[], [1]]
    assert frame["clicks"].to_list() == [0, 1]


def test_events_share_the_table_and_the_ids_of_the_candidate() -> None:
    schema = Schema.model_validate(
        {
            "features": [
                {"kind": "categorical", "name": "item", "role": "item", "table": "things", "min_count": 2},
                {"kind": "sequence", "name": "history", "of": ["item"], "where": "clicked"},
            ],
            "labels": [{"name": "clicked"}],
            "keys": {"user_id": "user", "timestamp": "time"},
        }
    )
    log = pl.DataFrame({"user": [1] * 5, "time": range(5), "item": list("abbac"), "clicked": [1, 1, 0, 1, 1]})
    dataset = Dataset.from_frame(log, schema, split="none")
    a, b, _, _, rare = dataset.scan("train").collect()["item"].to_list()
    assert dataset.scan("train").collect()["history.item"].to_list() == [[], [a], [a, b], [a, b], [a, b, a]]
    # A value that is too rare as a candidate does not become known by being remembered.
    assert rare == 1
    assert dataset.schema.tables() == {"things": 4}
    assert dataset.schema == Schema.read(dataset.path / "schema.json")
    again = write_dataset(dataset.path.parent / "again", dataset.schema, {"train": [log]})
    assert again.scan("train").collect()["history.item"].to_list()[-1] == [a, b, a]


@pytest.mark.parametrize(
    ("feature", "keys", "message"),
    [
        ({"kind": "sequence", "name": "h", "of": ["item"]}, {"timestamp": "t"}, 'feature "h".*needs the key user_id'),
        ({"kind": "sequence", "name": "h", "of": ["item"]}, {"user_id": "u"}, 'feature "h".*needs the key timestamp'),
        ({"kind": "sequence", "name": "h", "of": ["u"]}, {"user_id": "u", "timestamp": "t"}, "not a categorical"),
        ({"kind": "sequence", "name": "h", "of": ["item"], "where": "x"}, {"user_id": "u", "timestamp": "t"},
         "no label"),
        ({"kind": "sequence", "name": "h"}, {}, 'needs "fields", or "of"'),
        ({"kind": "numeric", "name": "n", "of": ["x"], "statistic": "count"}, {"timestamp": "t"}, '"x" is neither'),
        ({"kind": "numeric", "name": "n", "of": ["item"], "statistic": "rate"}, {"timestamp": "t"}, "needs the label"),
        ({"kind": "numeric", "name": "n", "of": ["item"]}, {"timestamp": "t"}, "statistic"),
    ],
)  # fmt: skip
def test_what_cannot_be_derived_is_one_clear_line(feature: dict[str, Any], keys: dict[str, str], message: str) -> None:
    item = {"kind": "categorical", "name": "item"}
    with pytest.raises(ValueError, match=message):
        Schema.model_validate({"features": [item, feature], "labels": [{"name": "click"}], "keys": keys})


def test_a_counter_describes_what_its_columns_describe() -> None:
    def role(*of: str) -> str:
        counter = {"kind": "numeric", "name": "n", "of": of, "statistic": "count"}
        features = [*SCHEMA.model_dump()["features"], counter]
        return Schema.model_validate({**SCHEMA.model_dump(), "features": features}).features[-1].role

    assert role("user") == "user"
    assert role("item", "genre") == "item"
    assert role("user", "genre") == "context"
