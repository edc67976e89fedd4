"""The first guess at a schema."""

from __future__ import annotations

import numpy as np
import polars as pl

from fullrank.data.inference import infer_schema, profile
from fullrank.schema import Categorical, EventId, EventNumber, Keys, Label, MultiCategorical, Numeric, Sequence


def sample() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    rows = 2000
    users, items = rng.integers(0, 50, rows), rng.integers(0, 40, rows)
    return pl.DataFrame(
        {
            "click": rng.integers(0, 2, rows),
            "user_id": users,
            "movie_id": items,
            "city": (users * 7) % 5,
            "year": 1990 + items % 9,
            "slot": rng.integers(0, 3, rows),
            "genres": ["|".join(f"g{n}" for n in {item % 4, item % 3}) for item in items],
            "history": ["^".join(str(n) for n in rng.integers(0, 40, 3)) for _ in range(rows)],
            "past.item": [[1, 2]] * rows,
            "past.age": [[0.5, 1.5]] * rows,
            "price": [None if n % 10 == 0 else n / 7 for n in range(rows)],
            "views": rng.permutation(rows) * 3,
            "note": [f"comment {n}" for n in range(rows)],
            "timestamp": rng.integers(0, 10**9, rows),
        }
    )


def test_each_column_is_taken_for_what_it_is() -> None:
    schema, profiles = profile(sample())
    assert schema.labels == (Label(name="click"),)
    assert schema.keys == Keys(user_id="user_id", item_id="movie_id", timestamp="timestamp")
    assert schema.features == (
        Categorical(name="user_id", role="user"),
        Categorical(name="movie_id", role="item"),
        Categorical(name="city", role="user"),
        Categorical(name="year", role="item"),
        Categorical(name="slot"),
        MultiCategorical(name="genres", role="item", separator="|"),
        Sequence(name="history", fields=(EventId(name="movie_id", table="movie_id"),), separator="^"),
        Numeric(name="price", transform="standard", missing_indicator=True),
        Numeric(name="views", transform="log1p"),
        Sequence(name="past", fields=(EventId(name="item"), EventNumber(name="age"))),
    )
    by_name = {column.name: column for column in profiles}
    assert by_name["note"].use == "left out: every value is different"
    assert by_name["price"].missing == 0.1
    assert by_name["slot"].distinct == 3
    assert list(by_name) == sample().columns


def test_text_and_typed_columns_are_judged_alike() -> None:
    flat = sample().drop("past.item", "past.age")
    assert infer_schema(flat.cast(pl.String)) == infer_schema(flat)


def test_a_few_bad_values_do_not_change_what_a_column_is() -> None:
    frame = sample().drop("past.item", "past.age").cast(pl.String)
    spoilt = frame.with_columns(
        pl.when(pl.int_range(pl.len()) == 17).then(pl.lit("oops")).otherwise(pl.col(name)).alias(name)
        for name in ("click", "price", "views", "timestamp")
    )
    assert infer_schema(spoilt) == infer_schema(frame)


def test_of_several_binary_columns_none_is_guessed_to_be_the_label() -> None:
    frame = pl.DataFrame({"a": [0, 1, 1], "b": [1, 0, 1], "c": ["x", "y", "x"]})
    assert infer_schema(frame).labels == ()
    assert infer_schema(frame.drop("b")).labels == (Label(name="a"),)


def test_columns_that_hold_neither_text_nor_numbers_are_left_out_and_shown() -> None:
    frame = sample().with_columns(
        raw=pl.lit(b"x"),
        both=pl.struct("user_id", "price"),
        wait=pl.duration(seconds=3),
        pieces=pl.concat_list(pl.lit(b"y")),
    )
    schema, columns = profile(frame)
    assert schema == infer_schema(sample())
    left_out = {column.name for column in columns if column.use == "left out: neither text nor numbers"}
    assert left_out == {"raw", "both", "wait", "pieces"}


def test_true_probabilities_of_a_simulated_log_are_no_features() -> None:
    frame = sample().with_columns(__true_click=pl.lit(0.5))
    schema, columns = profile(frame)
    assert schema == infer_schema(sample())
    assert columns[-1].use == "left out: a true probability"
