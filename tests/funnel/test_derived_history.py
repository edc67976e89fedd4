"""A funnel on a plain log: the catalogue of users keeps the history that was derived from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from fullrank.data.dataset import Dataset
from fullrank.funnel import FunnelConfig, train_funnel
from fullrank.funnel.catalogue import all_rows
from fullrank.funnel.requests import Request
from fullrank.funnel.training import EarlyConfig, FinalConfig
from fullrank.retrieval import TwoTower
from fullrank.schema import Schema
from fullrank.training import TrainerConfig

TRAINING = TrainerConfig(batch_size=64, epochs=1)
CONFIG = FunnelConfig(
    retrieval=TwoTower.Config(batch_size=64, epochs=1),
    early=EarlyConfig(training=TRAINING),
    final=FinalConfig(model={"name": "din", "hidden": [8], "embedding_dim": 4}, training=TRAINING),
)


def schema(*further: dict[str, Any]) -> Schema:
    return Schema.model_validate(
        {
            "features": [
                {"kind": "categorical", "name": "user", "role": "user"},
                {"kind": "categorical", "name": "item", "role": "item"},
                *further,
            ],
            "labels": [{"name": "click"}],
            "keys": {"user_id": "user", "item_id": "item", "timestamp": "time"},
        }
    )


HISTORY = {"kind": "sequence", "name": "history", "of": ["item"], "where": "click", "length": 3, "age": True}


def log(rows: int = 600) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "user": [f"u{number}" for number in rng.integers(0, 12, rows)],
            "item": rng.integers(0, 20, rows),
            "time": rng.integers(0, 1000, rows),
            "click": rng.integers(0, 2, rows),
        }
    )


def test_a_known_user_is_served_with_the_last_clicks_of_the_log() -> None:
    frame = log()
    counter = {"kind": "numeric", "name": "rate", "of": ["user"], "statistic": "rate", "label": "click"}
    dataset = Dataset.from_frame(frame, schema(HISTORY, counter))
    users = all_rows(dataset, "user")
    ids = dataset.encoders.vocabularies["item"]
    for row in users.iter_rows(named=True):
        clicks = frame.filter((pl.col("user") == row["__user_id"]) & (pl.col("click") == 1))
        last = clicks.sort("time", maintain_order=True).tail(3)
        assert row["history.item"] == ids.ids(last["item"].cast(pl.String)).tolist()
        ages = np.log1p(int(frame["time"].max()) - last["time"].to_numpy())  # type: ignore[call-overload]
        assert row["history.age"] == pytest.approx(ages.tolist(), rel=1e-6)
    funnel, _ = train_funnel(dataset, CONFIG)
    known, other = (
        funnel.encode([Request("u3")]),
        funnel.encode([Request("u3", {"history.item": [], "history.age": []})]),
    )
    assert (
        known.jagged("history.item")[0].tolist()
        == users.filter(pl.col("__user_id") == "u3")["history.item"][0].to_list()
    )
    assert other.jagged("history.item")[0].numel() == 0
    assert not torch.equal(funnel.rank(known, 10).value_UK, funnel.rank(other, 10).value_UK)


def test_a_counter_of_user_and_item_together_is_refused() -> None:
    counter = {"kind": "numeric", "name": "seen", "of": ["user", "item"], "statistic": "count"}
    dataset = Dataset.from_frame(log(), schema(HISTORY, counter))
    with pytest.raises(ValueError, match='"seen" counts a user and an item together'):
        train_funnel(dataset, CONFIG)


def test_a_final_stage_that_reads_histories_says_how_to_get_one() -> None:
    dataset = Dataset.from_frame(log(), schema())
    with pytest.warns(UserWarning, match='"of": \\["item"\\], "where": "click"'):
        CONFIG.final.model.build(dataset.schema)
