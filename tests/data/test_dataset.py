"""A dataset directory is checked when it is opened, and written whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from fullrank.data.dataset import Dataset, write_dataset
from fullrank.schema import Categorical, EventId, EventNumber, Keys, Label, MultiCategorical, Numeric, Schema, Sequence

SCHEMA = Schema(
    features=(
        Categorical(name="item", role="item"),
        MultiCategorical(name="topics", role="item"),
        Numeric(name="price", role="item", encoding="scalar"),
        Categorical(name="age", role="user"),
        Categorical(name="slot"),
    ),
    labels=(Label(name="click"),),
    keys=Keys(item_id="item", user_id="user", timestamp="time"),
)


def frame() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item": [7, 9, 7, 8],
            "topics": [["x"], ["y", "x"], ["z"], []],
            "price": [1.0, 2.0, 3.0, 4.0],
            "user": ["a", "b", "a", None],
            "age": ["young", "old", "old", "old"],
            "slot": [1, 2, 3, 4],
            "time": [20, 10, 5, 30],
            "click": [0, 1, 1, 0],
        }
    )


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_dataset(tmp_path / "data", SCHEMA, {"train": [frame()], "test": [frame().head(1)]}, source="by hand")


def test_what_is_written_is_read(dataset: Dataset) -> None:
    again = Dataset.open(dataset.path)
    assert again.splits == ("train", "test")
    assert (again.rows("train"), again.rows("test")) == (4, 1)
    assert again.source == "by hand"
    train = again.scan("train").collect()
    assert train.equals(again.encoders.transform(frame()))
    assert sum(pl.read_parquet(path).height for path in again.shards("train")) == 4


def test_a_catalogue_has_each_item_once_with_its_latest_features(dataset: Dataset) -> None:
    train = dataset.scan("train").collect()
    catalogue = dataset.catalogue("item")
    assert catalogue.columns == ["__item_id", "price", "item", "topics"]
    # Item 7 was seen last at time 20, in the first row, not in the last row that shows it.
    assert catalogue["__item_id"].to_list() == [7, 8, 9]
    assert catalogue["price"].to_list() == [1.0, 4.0, 2.0]
    assert catalogue["topics"].to_list() == [train["topics"][row].to_list() for row in (0, 3, 1)]
    users = dataset.catalogue("user")
    assert users["__user_id"].to_list() == ["a", "b"]
    assert users["age"].to_list() == [train["age"][0], train["age"][1]]


def test_a_catalogue_needs_a_key(tmp_path: Path) -> None:
    schema = Schema(features=(Categorical(name="item"),), labels=(Label(name="click"),))
    dataset = write_dataset(tmp_path / "data", schema, {"train": [frame()]})
    with pytest.raises(ValueError, match="names no item_id"):
        dataset.catalogue("item")


def edit(dataset: Dataset, **changes: object) -> None:
    path = dataset.path / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_datasets_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    def refused(message: str, path: Path = dataset.path) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            Dataset.open(path)
        assert "\n" not in str(caught.value)

    refused("is not a dataset: it has no dataset.json", tmp_path)
    shard = dataset.shards("train")[0]
    whole = shard.read_bytes()
    good = pl.read_parquet(shard)
    good.drop("price").write_parquet(shard)
    refused('column "price" of schema.json is missing')
    good.cast({"item": pl.Int64}).write_parquet(shard)
    refused('column "item" is Int64, expected Int32')
    good.head(3).write_parquet(shard)
    refused("split train has 3 rows, dataset.json says 4")
    shard.write_bytes(whole[:100])
    refused("is not a readable Parquet file")
    shard.unlink()
    refused("shard train/part-00000.parquet is missing")
    edit(dataset, shards={"train": ["../elsewhere.parquet"]})
    refused('shard "../elsewhere.parquet" lies outside the dataset')
    edit(dataset, format_version=99)
    refused("format_version is 99, this release reads 1")
    (dataset.path / "dataset.json").write_text("{")
    refused("dataset.json is damaged")


def test_an_unknown_split_is_named(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match='has no split "valid"; it has train, test'):
        dataset.rows("valid")


def test_write_dataset_refuses_bad_rows_and_leaves_nothing(tmp_path: Path) -> None:
    bad = frame().with_columns(click=pl.Series([0, 1, 2, 0]))
    with pytest.raises(ValueError, match='part train row 7: column "click" is "2": label is not 0 or 1'):
        write_dataset(tmp_path / "data", SCHEMA, {"train": [frame(), bad]})
    with pytest.raises(ValueError, match='no part "train"'):
        write_dataset(tmp_path / "data", SCHEMA, {"test": [frame()]})
    with pytest.raises(ValueError, match='unknown part "dev"'):
        write_dataset(tmp_path / "data", SCHEMA, {"train": [frame()], "dev": [frame()]})
    with pytest.raises(ValueError, match='column "age" of the schema is missing'):
        write_dataset(tmp_path / "data", SCHEMA, {"train": [frame().drop("age")]})
    assert list(tmp_path.iterdir()) == []


def test_parts_may_be_generators_and_carry_true_probabilities(tmp_path: Path) -> None:
    def frames() -> Iterator[pl.DataFrame]:
        for _ in range(3):
            yield frame().with_columns(__true_click=pl.Series([0.1, 0.2, 0.3, 0.4]))

    dataset = write_dataset(tmp_path / "data", SCHEMA, {"train": frames()})
    assert dataset.scan("train").collect()["__true_click"].to_list() == pytest.approx([0.1, 0.2, 0.3, 0.4] * 3)


ENCODED = Schema(
    features=(
        Categorical(name="item", encoding="identity", num_embeddings=10),
        Sequence(
            name="past",
            fields=(
                EventId(name="item", table="item", encoding="identity", num_embeddings=10),
                EventNumber(name="age"),
            ),
        ),
        Numeric(name="price", transform="log1p"),
    ),
    labels=(Label(name="click"),),
)


def encoded() -> pl.DataFrame:
    columns = {"price": [0.5], "item": [9], "past.item": [[1, 2]], "past.age": [[3.0, 1.0]], "click": [1.0]}
    types = {
        "price": pl.Float32, "item": pl.Int32, "past.item": pl.List(pl.Int32), "past.age": pl.List(pl.Float32),
        "click": pl.Float32,
    }  # fmt: skip
    return pl.DataFrame(columns, schema=types)


def test_encoded_frames_are_stored_as_they_are(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data", ENCODED, {"train": [encoded()]}, encoded=True)
    assert dataset.scan("train").collect().equals(encoded())
    raw = pl.DataFrame({"price": [1.0], "item": [9], "past.item": [[1, 2]], "past.age": [[3, 1]]})
    served = dataset.encoders.transform(raw, allow_missing=True)
    assert served.row(0)[1:] == (9, [1, 2], [3.0, 1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item": pl.Series([10], dtype=pl.Int32)}, 'column "item" has ids outside 0 to 9'),
        ({"past.item": pl.Series([[-1]], dtype=pl.List(pl.Int32))}, 'column "past.item" has ids outside 0 to 9'),
        ({"item": pl.Series([1])}, 'encoded column "item" is Int64, expected Int32'),
    ],
)
def test_encoded_frames_must_fit_the_schema(tmp_path: Path, change: dict[str, pl.Series], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "data", ENCODED, {"train": [encoded().with_columns(**change)]}, encoded=True)
    with pytest.raises(ValueError, match='feature "item": encoding "vocabulary" needs training data'):
        write_dataset(tmp_path / "data", SCHEMA, {"train": [encoded()]}, encoded=True)


def test_an_existing_dataset_is_replaced_only_on_request(dataset: Dataset) -> None:
    parts = {"train": [frame().head(2)]}
    with pytest.raises(ValueError, match="exists already"):
        write_dataset(dataset.path, SCHEMA, parts)
    assert write_dataset(dataset.path, SCHEMA, parts, overwrite=True).rows("train") == 2
