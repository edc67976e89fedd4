"""A log in which users click on items of their own parity."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset, write_dataset
from fullrank.data.loader import partial_batch
from fullrank.retrieval import Items, item_keys
from fullrank.schema import Categorical, EventId, EventNumber, Keys, Label, MultiCategorical, Numeric, Schema, Sequence


def log_schema() -> Schema:
    return Schema(
        features=(
            Categorical(name="user_id", role="user"),
            Categorical(name="item_id", role="item"),
            Numeric(name="price", role="item", missing_indicator=True),
            MultiCategorical(name="tags", role="item"),
            Categorical(name="hour", role="context"),
            Numeric(name="age", role="user"),
            Sequence(name="history", fields=(EventId(name="item", table="item_id"), EventNumber(name="age"))),
        ),
        labels=(Label(name="click"),),
        keys=Keys(user_id="user_id", item_id="item_id", timestamp="time", bid="bid"),
    )


def log_frame(rows: int, seed: int, users: int = 12, items: int = 30) -> pl.DataFrame:
    """Users click on items of their own parity, and see three of each parity."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, users, rows), rng.integers(0, items, rows)
    lengths = rng.integers(0, 4, rows)
    return pl.DataFrame(
        {
            "user_id": [f"u{i}" for i in user],
            "item_id": item,
            "price": [None if i % 7 == 0 else float(i) for i in item],
            "tags": [[f"t{i % 2}", f"t{i % 5}"] if i % 3 else [] for i in item],
            "hour": rng.integers(0, 24, rows),
            "age": user.astype(float),
            "history.item": [list(rng.integers(0, items, n)) for n in lengths],
            "history.age": [list(rng.random(n)) for n in lengths],
            "click": ((user % 2) == (item % 2)).astype(int),
            "time": np.arange(rows),
            "bid": 1.0 + item % 3,
        },
        schema_overrides={"history.item": pl.List(pl.Int64), "history.age": pl.List(pl.Float64)},
    )


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("log") / "dataset"
    return write_dataset(out, log_schema(), {"train": [log_frame(3000, 0)], "test": [log_frame(200, 1)]})


@pytest.fixture(scope="session")
def items(dataset: Dataset) -> Items:
    catalogue = dataset.catalogue("item")
    return Items(item_keys(catalogue["__item_id"]), partial_batch(catalogue, dataset.schema))


@pytest.fixture(scope="session")
def users(dataset: Dataset) -> Batch:
    return partial_batch(dataset.catalogue("user"), dataset.schema)
