"""Training on raw ids: the same after an interruption, evicted ids written down, served and continued next day."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import fullrank as fr
from fullrank.data.dataset import Dataset, write_dataset
from fullrank.data.importing import import_dataset
from fullrank.data.loader import Loader
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.models import MODELS
from fullrank.schema import Categorical, Label, Schema
from fullrank.training import Callback, Trainer, TrainerConfig
from fullrank.training.evicted import admitted_tables, id_counts
from fullrank.training.run import run

SCHEMA = Schema(
    features=(
        Categorical(name="item", encoding="raw"),
        Categorical(name="city", encoding="identity", num_embeddings=5),
    ),
    labels=(Label(name="y"),),
)
TABLES = {"item": {"kind": "admitted", "capacity": 20, "half_life": 7, "dropout": 0.1}}


@pytest.fixture(scope="module")
def drifting(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    random = np.random.default_rng(0)
    item = (random.geometric(0.1, 1200) + np.arange(1200) // 20) * 10**15 + 2
    frame = pl.DataFrame(
        {
            "item": item,
            "city": random.integers(0, 5, 1200).astype(np.int32),
            "y": random.integers(0, 2, 1200).astype(np.float32),
        }
    )
    return write_dataset(tmp_path_factory.mktemp("drift") / "data", SCHEMA, {"train": [frame]}, encoded=True)


@pytest.mark.parametrize("kind", ["dense", "row_wise_adagrad"])
def test_a_run_that_was_cut_short_goes_on_to_the_same_rows_and_reports(
    drifting: Dataset, tmp_path: Path, kind: Any
) -> None:
    config = TrainerConfig(batch_size=16, checkpoint_every=10, shuffle=False)
    embedding = EmbeddingOptimizer(kind=kind)

    class Stop(Callback):
        def after_step(self, step: int, loss: torch.Tensor) -> None:
            if step == 37:
                raise KeyboardInterrupt

    def fit(out: Path, *, resume: bool = False, callbacks: Sequence[Callback] = ()) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = MODELS["dlrm"].from_config(SCHEMA, {"embedding_dim": 4, "hidden": [8], "tables": TABLES})
        loader = Loader(drifting, "train", 16)
        Trainer(config, embedding, callbacks).fit(model, loader, run_directory=out, resume=resume)
        counts = id_counts(model)["item"]
        assert counts["live"] == 20 and counts["admitted"] - counts["evicted"] == 20
        return dict(model.state_dict())

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", callbacks=[Stop()])
    # As if it had been killed between the report and the checkpoint.
    (tmp_path / "cut/evicted/step-0000000035.parquet").write_bytes(
        (tmp_path / "cut/evicted/step-0000000030.parquet").read_bytes()
    )
    resumed = fit(tmp_path / "cut", resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    reports = [pl.read_parquet(tmp_path / name / "evicted/*.parquet") for name in ("whole", "cut")]
    assert reports[0].equals(reports[1]) and reports[0].height == int(whole["embeddings.kind_modules.0.totals"][3]) > 20
    assert reports[0]["value"].min() % 10**15 == 0  # as the log has them
    live = set((whole["embeddings.kind_modules.0.ids_R"] - 2).tolist())
    last_gone = reports[0].filter(pl.col("step") == pl.col("step").max())["value"]
    assert not live & set(last_gone.to_list())


def test_raw_ids_from_a_log_to_a_bundle_and_the_next_day(tmp_path: Path) -> None:
    random = np.random.default_rng(1)

    def day(path: Path, first: int, rows: int) -> None:
        item = first + random.geometric(0.05, rows)
        good = (item % 3 == 0) * 0.8 + 0.1
        pl.DataFrame(
            {
                "time": 1_700_000_000 + 10 * np.arange(rows) + 86_400 * (first > 0),
                "user": [f"u{n}" for n in random.integers(0, 9, rows)],
                "item": [f"item-{n}" if n % 2 else str(10**17 + n) for n in item.tolist()],
                "click": (random.random(rows) < good).astype(int),
            }
        ).write_csv(path)

    schema = {
        "features": [
            {"kind": "categorical", "name": "user", "role": "user"},
            {"kind": "categorical", "name": "item", "role": "item", "encoding": "raw"},
            {"kind": "sequence", "name": "liked", "of": ["item"], "where": "click", "max_length": 4},
        ],
        "labels": [{"name": "click"}],
        "keys": {"user_id": "user", "item_id": "item", "timestamp": "time"},
    }
    day(tmp_path / "one.csv", 0, 900)
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    source = {"format": "csv", "path": str(tmp_path / "one.csv"), "schema_file": str(tmp_path / "schema.json")}
    recipe: dict[str, Any] = {
        "data": {"dataset": str(tmp_path / "one"), "source": source},
        "model": {"name": "din", "hidden": [8], "attention_hidden": [4], "embedding_dim": 4,
                  "tables": {"item": {"kind": "admitted", "capacity": 30, "admit_after": 3}}},
        "training": {"batch_size": 32, "shuffle": False, "learning_rate": 0.01},
    }  # fmt: skip
    report = run(recipe, tmp_path / "run")
    assert report.details["ids"]["item"]["live"] == 30
    assert any('table "item": 30 ids have a row' in note for note in report.notes)
    dataset = Dataset.open(tmp_path / "one")
    assert dataset.scan("train").collect_schema()["item"] == pl.Int64
    assert dataset.scan("train").collect_schema()["liked.item"] == pl.List(pl.Int64)
    bundle = fr.load(tmp_path / "run/model")
    rows = pl.read_csv(tmp_path / "one.csv", schema_overrides={"item": pl.String}).tail(50)
    predicted = bundle.predict(rows.with_columns(pl.lit("").alias("liked.item")))
    unknown = bundle.predict(rows.with_columns(pl.lit("never seen").alias("item"), pl.lit("").alias("liked.item")))
    assert len(set(predicted.tolist())) > len(set(unknown.tolist()))
    vectors = bundle.embeddings()["item"]
    assert vectors.height == 30 and vectors["value"].max() < 2**62
    assert 10**17 < vectors.filter(pl.col("value") < 2 * 10**17)["value"].min() < 10**17 + 100

    # The next day needs no new vocabulary for items; who comes is admitted, who does not come any more goes.
    day(tmp_path / "two.csv", 40, 900)
    import_dataset("csv", tmp_path / "two.csv", tmp_path / "two", like=tmp_path / "run/model", extend=True)
    recipe["data"] = {"dataset": str(tmp_path / "two")}
    second = run(recipe, tmp_path / "second", start=tmp_path / "run/model")
    counts = second.details["ids"]["item"]
    assert counts["live"] == 30 and counts["evicted"] > report.details["ids"]["item"]["evicted"]
    before, after = (
        set(next(iter(admitted_tables(one).values())).live_ids().tolist())
        for one in (fr.load(tmp_path / "run/model").ranker, second.content)
    )
    assert before & after and after - before
