"""Kinds of tables chosen in a recipe: trained, interrupted, resumed, saved and loaded like plain ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from tables import SCHEMA
from torch import Tensor

from fullrank.data.dataset import Dataset
from fullrank.data.loader import Loader
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.models import Ranker, RankerSpec
from fullrank.training import Callback, Trainer, TrainerConfig, load_model
from fullrank.training.run import run

TABLES: dict[str, Any] = {
    "user": {"kind": "quotient_remainder", "collisions": 3},
    "item": {"kind": "mixed_dimension", "dims": [4, 2], "shares": [0.5]},
    "tags": {"kind": "prefix", "levels": 2, "codebook_size": 4},
}
MODEL = {"name": "dcn_v2", "hidden": [8], "embedding_dim": 4, "embedding_init": 0.05, "tables": TABLES}


class Stop(Callback):
    def after_step(self, step: int, loss: Tensor) -> None:
        if step == 13:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["dense", "row_wise_adagrad"])
def test_an_interrupted_run_ends_in_the_same_weights(dataset: Dataset, tmp_path: Path, kind: Any) -> None:
    config = TrainerConfig(epochs=2, learning_rate=0.02, checkpoint_every=3)

    def fit(out: Path, *callbacks: Callback, resume: bool = False) -> Ranker:
        torch.manual_seed(0)
        model = RankerSpec.of(MODEL).build(SCHEMA)
        trainer = Trainer(config, EmbeddingOptimizer(kind=kind), callbacks)
        trainer.fit(model, Loader(dataset, "train", 60, shuffle=True), run_directory=out, resume=resume)
        return model

    whole = fit(tmp_path / "whole").state_dict()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", Stop())
    resumed = fit(tmp_path / "cut", resume=True).state_dict()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_recipe_chooses_kinds_by_table_and_the_bundle_brings_them(dataset: Dataset, tmp_path: Path) -> None:
    recipe = {
        "data": {"dataset": str(dataset.path)},
        "model": MODEL,
        "training": {"batch_size": 60, "epochs": 3, "learning_rate": 0.02},
    }
    report = run(recipe, tmp_path / "run")
    plain = run({**recipe, "model": {**MODEL, "tables": {}}})
    assert report.bundle is not None and plain.bundle is None
    # 14 + 3 and 30 + 30 x 2 rows and a 2 x 4 projection against 40 and 60 rows of 4.
    assert report.content.num_parameters().embedding < 0.7 * plain.content.num_parameters().embedding
    assert report.metrics["test"]["click"]["auc"] > 0.6
    loaded = load_model(report.bundle)
    batch = next(iter(Loader(dataset, "test", 50)))
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits_BT, report.content(batch).logits_BT)
    manifest = json.loads((report.bundle / "manifest.json").read_text())
    assert manifest["stages"][0]["config"]["tables"]["user"]["collisions"] == 3


def test_a_bundle_has_the_buckets_that_a_recipe_names_a_file_of(dataset: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "buckets.parquet"
    pl.DataFrame({"make": [i // 8 for i in range(60)], "year": [i % 8 for i in range(60)]}).write_parquet(file)
    tables = {
        "item": {"kind": "custom_partitions", "buckets": str(file)},
        "user": {"kind": "quotient_remainder", "operation": "path", "path_hidden": 4},
    }
    recipe = {
        "data": {"dataset": str(dataset.path)},
        "model": {**MODEL, "tables": tables},
        "training": {"batch_size": 60, "epochs": 2, "learning_rate": 0.02},
    }
    report = run(recipe, tmp_path / "run")
    file.unlink()
    assert report.bundle is not None
    loaded = load_model(report.bundle)
    batch = next(iter(Loader(dataset, "test", 50)))
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits_BT, report.content(batch).logits_BT)
    with pytest.raises(ValueError, match=r"buckets.parquet: expected a Parquet file of buckets"):
        run(recipe)


def test_a_table_that_is_not_there_is_named(dataset: Dataset) -> None:
    recipe = {"data": {"dataset": str(dataset.path)}, "model": {"name": "lr", "tables": {"usr": "full"}}}
    with pytest.raises(ValueError, match='there is no table "usr"; the schema has user, item, tags'):
        run(recipe)
