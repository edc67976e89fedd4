"""Recall@100 of the first stage by time: two towers with and without the popularity of items, against popularity.

python -m benchmarks.retrieval.first_stage [--data ml-latest-small] [--seeds 1 2 3]

"shop" is a small plain log: 30,000 impressions by 1,500 users of 2,500 items, of which two fifths come during the log
and all fade, some 3,000 clicks; a log for each seed. "simulated" has 50,000 impressions of `fullrank.data.simulate`.
With --data, MovieLens-latest-small, likes as clicks, with the settings of recipes/movielens-latest-funnel.yaml; seeds
are then those of the towers. All items of the log are searched for each click of the test part, what a user clicked
before included.

popularity             the most clicked items of the training part
towers before          two towers, popularity: false, learning_rate: 0.002 (the default before)
towers, no popularity  two towers, popularity: false
towers                 two towers; the weight of popularity is chosen by the last tenth of the training clicks

Written to benchmarks/results/retrieval_first_stage.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import table, write

ROWS, USERS, ITEMS, CATEGORIES = 30_000, 1_500, 2_500, 12
RESULTS = 100
RECIPE = {"batch_size": 256, "epochs": 10}
ARMS: dict[str, dict[str, Any]] = {
    "popularity": {},
    "towers before": {"popularity": False, "learning_rate": 0.002},
    "towers, no popularity": {"popularity": False},
    "towers": {},
}


def shop(path: Path, seed: int) -> Any:
    """A dataset of what a shop has shown, split by time."""
    import numpy as np
    import polars as pl

    from fullrank.data.importing import import_dataset
    from fullrank.schema import Categorical, Keys, Label, Numeric, Schema

    rng = np.random.default_rng(seed)
    category = rng.integers(0, CATEGORIES, ITEMS)
    born = np.where(rng.random(ITEMS) < 0.6, 0, rng.random(ITEMS))
    popularity = (rng.permutation(ITEMS) + 1.0) ** -0.8
    price = np.exp(rng.normal(3, 1, ITEMS)).round(2)
    taste = rng.dirichlet(np.full(CATEGORIES, 0.3), USERS)
    activity = (rng.permutation(USERS) + 1.0) ** -0.6
    moments = np.sort(rng.random(ROWS))
    users = rng.choice(USERS, ROWS, p=activity / activity.sum())
    items = np.empty(ROWS, dtype=np.int64)
    for row, (now, user) in enumerate(zip(moments, users, strict=True)):
        # What is there and popular, fading from the middle of the log on; every other time by the user's taste as well.
        weight = popularity * (born <= now) * np.exp(-3 * np.maximum(0, now - born - 0.5))
        if rng.random() < 0.5:
            weight = weight * taste[user][category]
        items[row] = rng.choice(ITEMS, p=weight / weight.sum())
    clicked = rng.random(ROWS) < 0.04 + 0.35 * taste[users, category[items]]
    frame = pl.DataFrame(
        {
            "user_id": users,
            "item_id": items,
            "category": [f"c{number}" for number in category[items]],
            "price": price[items],
            "clicked": clicked.astype(np.int8),
            "time": (1_700_000_000 + 3_000_000 * moments).astype(np.int64),
        }
    )
    frame.write_csv(path / "shop.csv")
    schema = Schema(
        features=(
            Categorical(name="user_id", role="user"),
            Categorical(name="item_id", role="item"),
            Categorical(name="category", role="item"),
            Numeric(name="price", role="item"),
        ),
        labels=(Label(name="clicked"),),
        keys=Keys(user_id="user_id", item_id="item_id", timestamp="time"),
    )
    return import_dataset("csv", path / "shop.csv", path / "shop", schema=schema)


def recall(retriever: Any, dataset: Any) -> float:
    """Share of the clicks of the test part whose item is among the results."""
    from fullrank.funnel.catalogue import Catalogue, all_rows
    from fullrank.retrieval import Items
    from fullrank.retrieval.two_tower import positive_rows

    catalogue = Catalogue.of(all_rows(dataset, "item"), dataset.schema)
    retriever.index(Items(catalogue.keys_I, catalogue.rows.batch))
    users, keys_P = positive_rows(dataset, "test")
    found_PK = retriever.search(users, RESULTS).item_keys_BK
    return float((found_PK == keys_P[:, None]).any(1).double().mean())


def measured(dataset: Any, seed: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each arm."""
    from fullrank.retrieval import Popularity, TwoTower

    lines = []
    for arm, changes in ARMS.items():
        begin = time.process_time()
        if arm == "popularity":
            retriever: Any = Popularity(dataset.schema)
        else:
            retriever = TwoTower(dataset.schema, TwoTower.Config.model_validate({**settings, "seed": seed, **changes}))
        retriever.fit(dataset)
        taken = time.process_time() - begin
        lines.append({"arm": arm, "seed": seed, "recall": recall(retriever, dataset), "seconds": taken})
        print(lines[-1], flush=True)
    return lines


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds by log and arm, and of the differences to popularity, with their standard error."""
    summed = []
    for log in dict.fromkeys(line["log"] for line in lines):
        of = {arm: [line for line in lines if (line["log"], line["arm"]) == (log, arm)] for arm in ARMS}
        for arm, runs in of.items():
            more = [run["recall"] - other["recall"] for run, other in zip(runs, of["popularity"], strict=True)]
            summed.append(
                {
                    "log": log,
                    "arm": arm,
                    "recall": statistics.fmean(run["recall"] for run in runs),
                    "over_popularity": statistics.fmean(more),
                    "standard_error": statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else 0.0,
                    "least": min(more),
                    "seconds": statistics.fmean(run["seconds"] for run in runs),
                }
            )
    return summed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="MovieLens-latest-small, unpacked")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from fullrank.data.dataset import Dataset
    from fullrank.data.importing import import_dataset
    from fullrank.data.simulate import simulate_dataset

    torch.set_num_threads(1)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            place = Path(folder) / str(seed)
            place.mkdir()
            shop(place, seed)
            lines += [{"log": "shop", **line} for line in measured(Dataset.open(place / "shop"), seed, {})]
            simulate_dataset(place / "simulated", 50_000, seed=seed)
            lines += [{"log": "simulated", **line} for line in measured(Dataset.open(place / "simulated"), seed, {})]
        if args.data is not None:
            import_dataset("movielens", args.data, Path(folder) / "movielens")
            dataset = Dataset.open(Path(folder) / "movielens")
            for seed in args.seeds:
                lines += [{"log": "movielens-latest-small", **line} for line in measured(dataset, seed, RECIPE)]
    table(summary(lines), ["log", "arm", "recall", "over_popularity", "standard_error", "least", "seconds"])
    setting = {"threads": 1, "seeds": args.seeds, "k": RESULTS, "movielens_settings": RECIPE}
    write("retrieval_first_stage", {**setting, "result": summary(lines), "runs": lines})


if __name__ == "__main__":
    main()
