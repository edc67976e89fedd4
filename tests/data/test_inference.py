"""The first guess at a schema."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fullrank.data.dataset import Dataset
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


def shop(rows: int = 2000) -> dict[str, list[object]]:
    """Clicks, and what is known only after one."""
    rng = np.random.default_rng(1)
    clicked = (rng.random(rows) < 0.2).astype(int)
    return {
        "impression_id": [n // 4 for n in range(rows)],
        "user_id": [f"u{n}" for n in rng.integers(0, 900, rows)],
        "click": clicked.tolist(),
        "note": ["late" if c and n % 3 else None for n, c in enumerate(clicked)],
        "paid": [round(2.5 * c * (n % 3), 2) for n, c in enumerate(clicked)],
        "gift": [int(c and n % 2) for n, c in enumerate(clicked)],
        "is_share": rng.integers(0, 2, rows).tolist(),
    }


def test_outcomes_are_labels_or_left_out() -> None:
    schema, columns = profile(pl.DataFrame(shop()))
    assert [label.name for label in schema.labels] == ["click", "is_share", "gift"]
    assert [feature.name for feature in schema.features] == ["user_id"]
    uses = {column.name: column.use for column in columns}
    assert uses["note"] == uses["paid"] == "left out: filled only where click is 1, so known only after"
    assert uses["impression_id"] == "left out: repeats, so it is no key of single rows"
    given = profile(pl.DataFrame(shop()), ["click"])[0]
    assert [label.name for label in given.labels] == ["click"]
    assert [feature.name for feature in given.features] == ["user_id"]


def test_what_only_an_outcome_fills_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as warned:
        dataset = Dataset.from_frame(pl.DataFrame(shop()), label="click", path=tmp_path / "shop")
    told = [str(warning.message) for warning in warned]
    assert [text.split('"')[1] for text in told] == ["note", "paid", "gift", "is_share"]
    assert [feature.name for feature in dataset.schema.features] == ["user_id"]


def test_columns_follow_from_keys_that_hardly_recur() -> None:
    users = np.random.default_rng(2).integers(0, 1500, 2000)
    frame = pl.DataFrame({"click": [0, 1] * 1000, "user_id": users, "town": [f"t{u % 9}" for u in users]})
    spoilt = frame.with_columns(town=pl.when(pl.int_range(2000) == 5).then(pl.lit("t77")).otherwise("town"))
    assert {feature.role for feature in infer_schema(spoilt).features} == {"user"}


@pytest.mark.parametrize(
    ("values", "positive", "negative"),
    [
        (("yes", "no"), "yes", "no"),
        (("-1", "1"), "1", "-1"),
        (("<=50K", ">50K"), ">50K", "<=50K"),
        (("b", "a"), "a", "b"),
    ],
)
def test_labels_in_words(values: tuple[str, str], positive: str, negative: str) -> None:
    frame = pl.DataFrame({"label": [values[0], values[1], values[0]], "x": ["a", "b", "c"]})
    assert infer_schema(frame).labels == (Label(name="label", positive=(positive,), negative=(negative,)),)


@pytest.mark.parametrize(
    ("texts", "separator"),
    [
        (["[3, 5]", "[5]", "[]"], ","),
        (["3 5", "5 7", "3"], " "),
        (["3,5,7", "5,7", "3"], ","),
        (['["a", "b"]', '["b"]', "[]"], ","),
        (["a red shirt", "a blue shirt", "red"], None),
        (["3,5", "7,5", "9,1"], None),
        (["Zara, Inc.", "Nike", "Apple, Inc."], None),
        (["a|b", "c|d", "e"], None),
    ],
)
def test_lists_in_texts(texts: list[str], separator: str | None) -> None:
    feature = infer_schema(pl.DataFrame({"click": [0, 1, 0], "tags": texts})).features[0]
    assert (feature.separator if isinstance(feature, MultiCategorical) else None) == separator


@pytest.mark.parametrize(
    ("times", "unit", "layout"),
    [
        ([1600000000, 1600000060], "s", None),
        ([1600000000000, 1600000060000], "ms", None),
        (["1600000000000000", "1600000060000000"], "us", None),
        ([1600000000000000000, 1600000060000000000], "ns", None),
        ([20200930, 20201001], "s", "%Y%m%d"),
        (["30/09/2020 10:00", "01/10/2020 10:00"], "s", "%d/%m/%Y %H:%M"),
        (["2020-09-30T10:00:00+02:00", "2020-10-01"], "s", None),
    ],
)
def test_times(times: list[object], unit: str, layout: str | None) -> None:
    schema = infer_schema(pl.DataFrame({"click": [0, 1], "x": ["a", "b"], "timestamp": times}))
    assert (schema.keys.timestamp, schema.time_unit, schema.time_format) == ("timestamp", unit, layout)


def test_times_under_other_names() -> None:
    rows = {"click": [0, 1, 0], "uid": ["a", "b", "a"], "bornDate": [1500000000] * 3, "load_time": [3, 4, 90]}
    schema, columns = profile(pl.DataFrame({**rows, "server_ts": [1600000000000, 1600000060000, 1600000070000]}))
    assert (schema.keys.timestamp, schema.time_unit) == ("server_ts", "ms")
    uses = {column.name: column.use for column in columns}
    assert uses["bornDate"] == "left out: a time, and not the key" and uses["load_time"] == "categorical"
    texts = ["2020-09-30T10:00:00+02:00", "2020-10-01", "2020-10-02"]
    assert infer_schema(pl.DataFrame({**rows, "created_at": texts})).keys.timestamp == "created_at"


def test_sessions_are_users_where_there_are_none() -> None:
    rows = {"click": [0, 1, 0], "session_id": ["s1", "s1", "s2"]}
    assert infer_schema(pl.DataFrame(rows)).keys.user_id == "session_id"
    schema = infer_schema(pl.DataFrame({**rows, "user_id": ["a", "b", "a"]}))
    assert schema.keys.user_id == "user_id" and [feature.name for feature in schema.features] == ["user_id"]


def test_what_cannot_be_a_time_is_no_key() -> None:
    frame = pl.DataFrame({"click": [0, 1, 0], "time": ["morning", "noon", "noon"]})
    assert infer_schema(frame).keys.timestamp is None
