"""Small datasets for the tests of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from fullrank.data.dataset import Dataset, write_dataset
from fullrank.schema import Categorical, Keys, Label, MultiCategorical, Numeric, Schema

SCHEMA = Schema(
    features=(
        Numeric(name="price", encoding="scalar"),
        Categorical(name="user", encoding="identity", num_embeddings=40),
        Categorical(name="item", encoding="identity", num_embeddings=60),
        MultiCategorical(name="tags", encoding="identity", num_embeddings=10),
    ),
    labels=(Label(name="click"),),
    keys=Keys(user_id="user_key"),
)


def frame(rows: int, seed: int) -> pl.DataFrame:
    """Clicks whose log-odds are a sum over user, item and price."""
    taste = np.random.default_rng(0).normal(size=100)
    random = np.random.default_rng(seed)
    user, item = random.integers(0, 40, rows), random.integers(0, 60, rows)
    price = random.normal(size=rows)
    logit = taste[user] + taste[40 + item] + 0.5 * price
    return pl.DataFrame(
        {
            "price": price.astype(np.float32),
            "user": user.astype(np.int32),
            "item": item.astype(np.int32),
            "tags": [[int(i) % 10] * (int(i) % 3) for i in item],
            "click": (random.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.float32),
            "__user_id": user.astype(np.int64),
        },
        schema_overrides={"tags": pl.List(pl.Int32)},
    )


def clicks(path: Path, train: int = 600, valid: int = 200, test: int = 200) -> Dataset:
    """A dataset of clicks."""
    parts = {"train": [frame(train, 1)], "valid": [frame(valid, 2)], "test": [frame(test, 3)]}
    return write_dataset(path, SCHEMA, parts, encoded=True)
