"""A schema says what it means, exactly once, and refuses what it cannot mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from fullrank.schema import (
    Categorical,
    EventId,
    EventNumber,
    Keys,
    Label,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
)

FULL = Schema(
    features=(
        Numeric(name="price", role="item", transform="standard", missing_indicator=True),
        MultiCategorical(name="genres", role="item", table="genre"),
        Categorical(name="user", role="user"),
        Sequence(
            name="history",
            fields=(EventId(name="item", table="item"), EventNumber(name="age"), EventId(name="genre", table="genre")),
        ),
        Categorical(name="item", role="item"),
        Numeric(name="hour"),
    ),
    labels=(Label(name="click"), Label(name="stay", kind="regression")),
    keys=Keys(user_id="user", timestamp="time"),
)


def test_columns_of_a_batch_follow_the_order_of_features_within_each_kind() -> None:
    assert FULL.numeric_columns == ("price", "price__missing", "hour")
    assert tuple(FULL.embedded()) == ("user", "item", "genres", "history.item", "history.genre")
    assert FULL.jagged_keys == ("genres", "history.item", "history.genre")
    assert FULL.event_number_keys == ("history.age",)


def test_every_column_of_a_batch_has_the_role_of_its_feature() -> None:
    assert FULL.roles() == {
        "price": "item", "price__missing": "item", "genres": "item", "item": "item",
        "user": "user", "history.item": "user", "history.age": "user", "history.genre": "user",
        "hour": "context",
    }  # fmt: skip
    assert set(FULL.roles()) == {*FULL.numeric_columns, *FULL.embedded(), *FULL.event_number_keys}


def test_shared_tables_are_counted_once_and_sized_together() -> None:
    fitted = FULL.with_table_sizes({"user": 10, "item": 20, "genre": 5})
    assert fitted.tables() == {"user": 10, "item": 20, "genre": 5}
    assert fitted.sequences[0].id_fields[0].num_embeddings == 20
    assert fitted.bags[0].num_embeddings == fitted.sequences[0].id_fields[1].num_embeddings == 5


def test_an_unfitted_schema_has_no_table_sizes() -> None:
    with pytest.raises(ValueError, match='feature "user" has no num_embeddings yet'):
        FULL.tables()


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(FULL.to_json())
    assert Schema.read(path) == FULL


def test_select_keeps_labels_and_keys() -> None:
    chosen = FULL.select({"user"})
    assert [feature.name for feature in chosen.features] == ["user", "history"]
    assert (chosen.labels, chosen.keys) == (FULL.labels, FULL.keys)


def test_features_that_share_a_table_must_agree_on_its_size() -> None:
    with pytest.raises(ValidationError, match='features "a" and "b" share table "t" but differ'):
        Schema(
            features=(
                Categorical(name="a", table="t", encoding="hash", num_embeddings=10),
                Categorical(name="b", table="t", encoding="hash", num_embeddings=11),
            )
        )


def test_a_name_is_used_once() -> None:
    with pytest.raises(ValidationError, match='the name "a" is used twice'):
        Schema(features=(Categorical(name="a"),), labels=(Label(name="a"),))


@pytest.mark.parametrize("encoding", ["hash", "identity"])
def test_sizes_that_cannot_be_fitted_must_be_given(encoding: str) -> None:
    with pytest.raises(ValidationError, match="needs num_embeddings"):
        Categorical(name="a", encoding=encoding)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"feature": []}', "here: feature: unknown key"),
        ('{"labels": [{"name": "y", "weight": "two"}]}', "here: labels.0.weight: .*, got 'two'"),
        ('{"labels": [{"name": "y", "weight": 0}]}', "here: labels.0.weight: .*greater than 0, got 0"),
        ('{"features": [{"kind": "categorical", "name": "a", "min_cuont": 2}]}', "min_cuont: unknown key"),
        ('{"version": 2}', "here: version: "),
        ("{", "here: "),
    ],
)
def test_a_wrong_schema_is_one_line_per_field(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Schema.from_json(text, "here")
    assert "\n" not in str(caught.value)
