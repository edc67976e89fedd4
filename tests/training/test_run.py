"""Facts about a whole run as a function."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from torch import Tensor

from fullrank.batch import Batch
from fullrank.models import RANKERS, RankerOutput, register
from fullrank.models.lr import LR
from fullrank.training.run import run

SCHEMA = {
    "features": [{"kind": "categorical", "name": "item", "role": "item"}],
    "labels": [{"name": "click"}],
    "keys": {"timestamp": "time"},
}


@pytest.fixture
def seen() -> Iterator[list[Tensor]]:
    """What a ranker, whose loss asks for it, found in a column beside the features."""
    columns: list[Tensor] = []

    class Weighted(LR):
        name = "weighted"

        def loss(self, output: RankerOutput, batch: Batch) -> Tensor:
            columns.append(batch.extra["propensity"] - batch.labels_BT[:, 0])
            return super().loss(output, batch)

    register(Weighted)
    yield columns
    RANKERS.unregister("weighted")


def test_further_columns_of_the_log_reach_the_loss(tmp_path: Path, seen: list[Tensor]) -> None:
    random = np.random.default_rng(0)
    click = random.integers(0, 2, 400)
    frame = pl.DataFrame(
        {"item": random.integers(0, 9, 400), "click": click, "time": np.arange(400), "propensity": click + 0.25}
    )
    frame.write_csv(tmp_path / "log.csv")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    source = {"format": "csv", "path": tmp_path / "log.csv", "schema_file": tmp_path / "schema.json"}
    data = {"dataset": tmp_path / "data", "source": source, "extra": ["propensity", "click"]}
    recipe = {"data": data, "model": "weighted", "training": {"batch_size": 64, "epochs": 1}}
    report = run(recipe)
    assert report.dataset.extra == {"propensity": pl.Float32}
    assert sum(len(column) for column in seen) >= report.dataset.rows("train")
    assert all(bool((column == 0.25).all()) for column in seen)
    # The dataset is there now, and has no other column.
    data["extra"] = ["propensty"]
    with pytest.raises(ValueError, match=r'data\.extra: .*no column "propensty"; .* that were kept: propensity'):
        run(recipe)
