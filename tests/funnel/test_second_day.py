"""A later log with new items, and a funnel that does not know them."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from fullrank.data.dataset import Dataset
from fullrank.funnel import Funnel, FunnelConfig, evaluate_funnel, load_bundle, save_bundle, train_funnel
from fullrank.funnel.training import EarlyConfig, FinalConfig
from fullrank.retrieval import TwoTower
from fullrank.schema import Schema
from fullrank.training import TrainerConfig
from fullrank.training.run import defined, run

TRAINING = TrainerConfig(batch_size=64, epochs=1)
CONFIG = FunnelConfig(
    retrieval=TwoTower.Config(batch_size=64, epochs=1),
    early=EarlyConfig(training=TRAINING),
    final=FinalConfig(model={"name": "din", "hidden": [8], "embedding_dim": 4}, training=TRAINING),
)
SCHEMA = Schema.model_validate(
    {
        "features": [
            {"kind": "categorical", "name": "user", "role": "user"},
            {"kind": "categorical", "name": "item", "role": "item"},
            {"kind": "sequence", "name": "history", "of": ["item"], "where": "click", "length": 3},
        ],
        "labels": [{"name": "click"}],
        "keys": {"user_id": "user", "item_id": "item", "timestamp": "time"},
    }
)


def log(items: int) -> pl.DataFrame:
    rows = 600
    return pl.DataFrame(
        {
            "user": [f"u{k % 13}" for k in range(rows)],
            "item": [f"i{k % items}" for k in range(rows)],
            "time": [1_700_000_000 + 60 * k for k in range(rows)],
            "click": [int(k * 7919 % 10 < 4) for k in range(rows)],
        }
    )


def test_a_funnel_is_evaluated_on_a_log_with_new_items_and_is_no_start_of_a_training(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    save_bundle(train_funnel(Dataset.from_frame(log(20), SCHEMA), CONFIG)[0], bundle)
    funnel = load_bundle(bundle)
    assert isinstance(funnel, Funnel)
    reports = []
    for extend in (True, False):
        later = Dataset.from_frame(log(30), like=bundle, extend=extend, path=tmp_path / str(extend))
        reports.append(evaluate_funnel(funnel, later, "test", requests=50))
        for part in (*reports[-1]["cascade"]["stages"].values(), reports[-1]["cascade"]["total"]):
            del part["milliseconds"]
    assert later.schema == funnel.schema and Dataset.open(tmp_path / "True").new_ids == {"item": 10}
    assert json.dumps(defined(reports[0])) == json.dumps(defined(reports[1]))
    assert 0 < reports[0]["recall"]["retrievable"] < 1

    data = {"dataset": str(tmp_path / "True")}
    with pytest.raises(ValueError, match="only a single ranker can go on from a bundle: leave out --from"):
        run({"data": data, "funnel": {}}, start=bundle)
    with pytest.raises(ValueError, match="is a funnel, not a single ranker, which alone can be trained on"):
        run({"data": data, "model": {"name": "din"}}, start=bundle)
