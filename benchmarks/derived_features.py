"""What a history and counters derived from a plain log add: test AUC with and without them, on two logs.

    python -m benchmarks.derived_features --movielens movielens-latest-small --grocery amazon-grocery

`movielens`: the 100,004 ratings of MovieLens latest-small, liked from 4 stars on, with the film's first genre; split by
time, so most users of the test rows are new. `grocery`: the 121,892 reviews of Amazon Grocery as purchases, and beside
each one item of another review drawn with a fixed seed, label 0 (so that popular items are drawn as often as they are
bought); split by time. Both go through `Dataset.from_frame` as any table does. A small run: ten epochs at most, stopped
early by validation, narrow networks, one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.machine import table, write

HISTORY = {"kind": "sequence", "name": "history", "of": ["item_id", "category"], "where": "label", "length": 30}
COUNTERS = [
    {"kind": "numeric", "name": "user_rate", "of": ["user_id"], "statistic": "rate", "label": "label"},
    {"kind": "numeric", "name": "item_rate", "of": ["item_id"], "statistic": "rate", "label": "label"},
    {"kind": "numeric", "name": "user_category_rate", "of": ["user_id", "category"], "statistic": "rate",
     "label": "label", "smoothing": 5},
    {"kind": "numeric", "name": "item_rows", "of": ["item_id"], "statistic": "count"},
]  # fmt: skip
FEATURES: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "history": [HISTORY],
    "counters": COUNTERS,
    "history and counters": [HISTORY, *COUNTERS],
}
# DIN without a history is no DIN: on the plain log there is only the other network.
RUNS = {"dcn_v2": tuple(FEATURES), "din": ("history", "history and counters")}
COLUMNS = ("user_id", "item_id", "category", "time", "label")


def movielens(directory: Path) -> pl.DataFrame:
    genre = pl.read_parquet(directory / "movies.parquet").select(
        "movieId", pl.col("genres").cast(pl.String).str.split("|").list.first().alias("category")
    )
    ratings = pl.read_parquet(directory / "ratings.parquet").join(
        genre, on="movieId", how="left", maintain_order="left"
    )
    liked = (pl.col("rating") >= 4).cast(pl.Int8).alias("label")
    return ratings.rename({"userId": "user_id", "movieId": "item_id", "timestamp": "time"}).select(*COLUMNS[:-1], liked)


def grocery(directory: Path) -> pl.DataFrame:
    bought = pl.read_parquet(directory / "interactions.parquet")
    category = pl.read_parquet(directory / "items.parquet").select("item_id", pl.col("i_category").alias("category"))
    drawn = np.random.default_rng(0).integers(0, bought.height, bought.height)
    other = bought.with_columns(bought["item_id"][drawn].alias("item_id"))
    other = other.filter((other["item_id"] != bought["item_id"]).to_numpy())
    rows = pl.concat([bought.with_columns(label=pl.lit(1)), other.with_columns(label=pl.lit(0))])
    return rows.join(category, on="item_id", how="left", maintain_order="left").select(COLUMNS)


LOGS = {"movielens": movielens, "grocery": grocery}


def schema(features: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "features": [
            {"kind": "categorical", "name": "user_id", "role": "user"},
            {"kind": "categorical", "name": "item_id", "role": "item"},
            {"kind": "categorical", "name": "category", "role": "item"},
            *features,
        ],
        "labels": [{"name": "label"}],
        "keys": {"user_id": "user_id", "item_id": "item_id", "timestamp": "time"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in LOGS:
        parser.add_argument(f"--{name}", type=Path, help="directory of the log")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()

    import torch

    from fullrank.data.dataset import Dataset
    from fullrank.data.loader import Loader
    from fullrank.embeddings import EmbeddingOptimizer
    from fullrank.models import RankerSpec
    from fullrank.schema import Schema
    from fullrank.training import TrainerConfig, evaluate
    from fullrank.training.run import train_ranker

    torch.set_num_threads(1)
    records = []
    for name, read in LOGS.items():
        directory = getattr(args, name)
        log = None if directory is None else read(directory)
        for kind, features in () if log is None else FEATURES.items():
            begin = time.perf_counter()
            dataset = Dataset.from_frame(log, Schema.model_validate(schema(features)))
            seconds = time.perf_counter() - begin
            for model in (model for model, kinds in RUNS.items() if kind in kinds):
                spec = RankerSpec.of({"name": model, "hidden": (64, 32), "embedding_dim": 8})
                found = []
                for seed in args.seeds:
                    training = TrainerConfig(batch_size=512, epochs=10, patience=1, monitor="auc", seed=seed)
                    ranker, _ = train_ranker(spec, dataset, training, EmbeddingOptimizer())
                    found.append(evaluate(ranker, Loader(dataset, "test", 8192))["label"])
                records.append({
                    "log": name, "model": model, "derived": kind, "rows": sum(map(dataset.rows, dataset.splits)),
                    "test_auc": round(statistics.mean(each["auc"] for each in found), 4),
                    "test_ne": round(statistics.mean(each["ne"] for each in found), 4),
                    "auc_by_seed": [round(each["auc"], 4) for each in found],
                    "import_seconds": round(seconds, 2),
                })  # fmt: skip
                print(json.dumps(records[-1]), flush=True)
    table(records, ["log", "model", "derived", "test_auc", "test_ne", "import_seconds"])
    write("derived_features", {"seeds": args.seeds, "threads": 1, "results": records})


if __name__ == "__main__":
    main()
