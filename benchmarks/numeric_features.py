"""Test AUC of rankers whose numbers are declared numeric, beside gradient-boosted trees on the same rows.

    python -m benchmarks.numeric_features --data DIR

Two tables: Census-Income (KDD), 7 numbers among 40 features; and the covertype rows of the Tensor Machines paper, 10
numbers, the forest's area and its soil. A tenth of the training rows, drawn once, chooses everything: the epoch whose
weights stay, and with the first seed each model's configuration; the test rows are scored by what it chose. Trees stop
early by the same rows. LightGBM
and CatBoost are no requirements of the package: without them their rows are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.machine import RESULTS, table, write

CENSUS_NUMBERS = (
    "age", "wage_per_hour", "capital_gains", "capital_losses", "stock_dividends", "num_emp", "weeks_worked"
)  # fmt: skip
FOREST_NUMBERS = tuple(f"x{place}" for place in range(10))
HIDDEN = (256, 128, 64)
NORMED = {"hidden": HIDDEN, "batch_norm": True}
# Rows of a batch and width of tables; of each model the learning rate, the epochs over which it falls to 0, and the
# configurations that validation chooses from.
Grid = dict[str, tuple[float, int, list[dict[str, Any]]]]
GRIDS: dict[str, tuple[int, int, Grid]] = {
    "census": (
        512, 8,
        {
            "lr": (1e-2, 8, [{}]),
            "dcn_v2": (1e-3, 3, [{"hidden": HIDDEN}, NORMED]),
            "dlrm": (1e-3, 3, [NORMED, {**NORMED, "interaction": "cat"}]),
            "wukong": (1e-3, 3, [{"hidden": HIDDEN, "number_tokens": tokens} for tokens in (0, 1)]),
        },
    ),
    "forest": (
        256, 16,
        {
            "lr": (3e-2, 30, [{}]),
            "dcn_v2": (2e-3, 30, [NORMED]),
            "dlrm": (2e-3, 30, [NORMED, {**NORMED, "interaction": "cat"}]),
            "wukong": (1e-3, 15, [{"hidden": HIDDEN, "number_tokens": 0}]),
        },
    ),
}  # fmt: skip
MODELS = ("lr", "dcn_v2", "dlrm", "wukong")
TRIALS = {
    "lightgbm": [{"learning_rate": 0.1 if leaves == 255 else 0.05, "num_leaves": leaves} for leaves in (31, 255)],
    "catboost": [{"learning_rate": 0.1, "depth": 6}],
}


def census(data: Path) -> tuple[pl.DataFrame, pl.DataFrame, tuple[str, ...]]:
    def rows(part: str) -> pl.DataFrame:
        frame = pl.read_parquet(data / "census-income-kdd" / f"{part}.parquet")
        label = pl.col("income_50k").cast(pl.String).str.contains("+", literal=True).cast(pl.Int8).alias("label")
        return frame.with_columns(label).drop("income_50k", "instance_weight")

    return rows("train"), rows("test"), CENSUS_NUMBERS


def forest(data: Path) -> tuple[pl.DataFrame, pl.DataFrame, tuple[str, ...]]:
    def rows(part: str) -> pl.DataFrame:
        frame = pl.read_parquet(data / "forest-binary" / f"{part}.parquet")
        # The forest's area and soil are stored one-hot.
        area, soil = (
            pl.concat_list(pl.col(f"x{place}") for place in places).list.arg_max().alias(name)
            for name, places in (("area", range(10, 14)), ("soil", range(14, 54)))
        )
        return frame.select(*FOREST_NUMBERS, area, soil, (pl.col("y") > 0).cast(pl.Int8).alias("label"))

    return rows("train"), rows("test"), FOREST_NUMBERS


TABLES = {"census": census, "forest": forest}


def parts_of(name: str, data: Path) -> tuple[dict[str, pl.DataFrame], tuple[str, ...]]:
    train, test, numbers = TABLES[name](data)
    held_out = np.random.default_rng(2024).random(train.height) < 0.1
    return {"train": train.filter(~held_out), "valid": train.filter(held_out), "test": test}, numbers


def networks(
    name: str, parts: dict[str, pl.DataFrame], numbers: tuple[str, ...], args: argparse.Namespace
) -> list[dict[str, Any]]:
    from fullrank.data.dataset import Dataset
    from fullrank.data.importing import import_dataset
    from fullrank.data.loader import Loader
    from fullrank.embeddings import EmbeddingOptimizer
    from fullrank.models import Ranker
    from fullrank.schema import Categorical, Label, Numeric, Schema
    from fullrank.training import TrainerConfig, evaluate
    from fullrank.training.run import train_ranker

    records = []
    batch, width, grid = GRIDS[name]
    for encoding in args.encodings:
        features = tuple(
            Numeric(
                name=column,
                transform="standard",
                encoding=encoding,
            )
            if column in numbers
            else Categorical(name=column)
            for column in parts["train"].columns
            if column != "label"
        )
        schema = Schema(features=features, labels=(Label(name="label"),))
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "raw"
            folder.mkdir()
            for part, rows in parts.items():
                rows.write_parquet(folder / f"{part}.parquet")
            dataset = import_dataset("parquet", folder, Path(scratch) / "dataset", schema=schema)
            test = Loader(dataset, "test", 16384)
            for model_name in args.models:
                rate, epochs, configs = grid[model_name]

                def fitted(
                    setting: int, seed: int, name: str = model_name, rate: float = rate, epochs: int = epochs,
                    configs: list[dict[str, Any]] = configs, dataset: Dataset = dataset,
                ) -> tuple[float, int, Ranker, float]:  # fmt: skip
                    training = TrainerConfig(
                        learning_rate=rate, batch_size=batch, epochs=epochs, schedule="linear", patience=0, seed=seed
                    )
                    begin = time.perf_counter()
                    spec = {"name": name, "embedding_dim": width, **configs[setting]}
                    model, result = train_ranker(spec, dataset, training, EmbeddingOptimizer(learning_rate=rate))
                    auc = next(iter(result.best_tasks.values()))["auc"]
                    return auc, setting, model, time.perf_counter() - begin

                first = args.seeds[0]
                best = max((fitted(setting, first) for setting in range(len(configs))), key=lambda found: found[0])
                for seed in args.seeds:
                    valid, setting, model, seconds = best if seed == first else fitted(best[1], seed)
                    records.append({
                        "table": name, "model": model_name, "numbers": encoding, "setting": setting, "seed": seed,
                        "valid_auc": valid, "test_auc": next(iter(evaluate(model, test).values()))["auc"],
                        "seconds": seconds,
                    })  # fmt: skip
                    print(json.dumps(records[-1]), flush=True)
    return records


def trees(
    name: str, parts: dict[str, pl.DataFrame], numbers: tuple[str, ...], args: argparse.Namespace
) -> list[dict[str, Any]]:
    from sklearn.metrics import roc_auc_score

    columns = [column for column in parts["train"].columns if column != "label"]
    names = [column for column in columns if column not in numbers]
    codes = {
        column: pl.Enum(
            pl.concat([rows[column].cast(pl.String) for rows in parts.values()]).drop_nulls().unique().sort()
        )
        for column in names
    }
    frames = {
        part: rows.with_columns(*(pl.col(column).cast(pl.String).cast(codes[column]) for column in names)).to_pandas()
        for part, rows in parts.items()
    }
    labels = {part: rows["label"].to_numpy() for part, rows in parts.items()}
    records = []
    for program, settings in TRIALS.items():
        try:
            fit = {"lightgbm": lightgbm_scores, "catboost": catboost_scores}[program]
            first = args.seeds[0]
            tried = [fit(frames, labels, columns, names, trial, first, args.threads) for trial in settings]
            aucs = [float(roc_auc_score(labels["valid"], scores["valid"])) for scores in tried]
            setting = int(np.argmax(aucs))
            for seed in args.seeds:
                begin = time.perf_counter()
                scores = tried[setting]
                if seed != first:
                    scores = fit(frames, labels, columns, names, settings[setting], seed, args.threads)
                records.append({
                    "table": name, "model": program, "numbers": "trees", "setting": setting, "seed": seed,
                    "valid_auc": float(roc_auc_score(labels["valid"], scores["valid"])),
                    "test_auc": float(roc_auc_score(labels["test"], scores["test"])),
                    "seconds": time.perf_counter() - begin if seed != first else None,
                })  # fmt: skip
                print(json.dumps(records[-1]), flush=True)
        except ImportError as error:
            print(f"{program} is left out: {error}")
    return records


def lightgbm_scores(
    frames: Any, labels: Any, columns: list[str], names: list[str], trial: Any, seed: int, threads: int
) -> Any:
    import lightgbm

    model = lightgbm.LGBMClassifier(n_estimators=3000, random_state=seed, n_jobs=threads, verbose=-1, **trial)
    model.fit(
        frames["train"][columns], labels["train"], eval_set=[(frames["valid"][columns], labels["valid"])],
        eval_metric="auc", callbacks=[lightgbm.early_stopping(50, verbose=False)],
    )  # fmt: skip
    return {part: model.predict_proba(frames[part][columns])[:, 1] for part in ("valid", "test")}


def catboost_scores(
    frames: Any, labels: Any, columns: list[str], names: list[str], trial: Any, seed: int, threads: int
) -> Any:
    import catboost

    def pool(part: str) -> Any:
        frame = frames[part][columns].copy()
        frame[names] = frame[names].astype(object).fillna("missing")
        return catboost.Pool(frame, labels[part], cat_features=names)

    model = catboost.CatBoostClassifier(
        iterations=2000, eval_metric="AUC", random_seed=seed, thread_count=threads, verbose=False,
        allow_writing_files=False, **trial,
    )  # fmt: skip
    model.fit(pool("train"), eval_set=pool("valid"), early_stopping_rounds=50)
    return {part: model.predict_proba(pool(part))[:, 1] for part in ("valid", "test")}


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for key in dict.fromkeys((r["table"], r["model"], r["numbers"]) for r in records):
        mine = [r for r in records if (r["table"], r["model"], r["numbers"]) == key]
        tests, seconds = [r["test_auc"] for r in mine], [r["seconds"] for r in mine if r["seconds"] is not None]
        rows.append({
            "table": key[0], "model": key[1], "numbers": key[2], "setting": mine[0]["setting"], "seeds": len(mine),
            "valid_auc": statistics.mean(r["valid_auc"] for r in mine),
            "test_auc": statistics.mean(tests), "spread": max(tests) - min(tests),
            "seconds": statistics.mean(seconds) if seconds else None,
        })  # fmt: skip
    for row in rows:
        peer = [r["test_auc"] for r in rows if (r["table"], r["model"]) == (row["table"], "lightgbm")]
        row["minus_lightgbm"] = row["test_auc"] - peer[0] if peer else None
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--encodings", nargs="+", default=["scalar", "piecewise_linear", "periodic"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-trees", dest="trees", action="store_false")
    parser.add_argument("--keep", action="store_true", help="rows of other tables and encodings stay in the result")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    records: list[dict[str, Any]] = []
    for name in args.only:
        parts, numbers = parts_of(name, args.data)
        if args.trees:
            records += trees(name, parts, numbers, args)
        if args.models:
            records += networks(name, parts, numbers, args)
    kept: list[dict[str, Any]] = []
    if args.keep and (RESULTS / "numeric_features.json").is_file():
        kept = json.loads((RESULTS / "numeric_features.json").read_text())["runs"]
    new = {(r["table"], r["model"], r["numbers"]) for r in records}
    records += [r for r in kept if (r["table"], r["model"], r["numbers"]) not in new]
    records.sort(key=lambda r: (r["table"], r["numbers"] != "trees", r["numbers"], r["model"]))
    rows = summarise(records)
    print()
    table(rows, ["table", "numbers", "model", "seeds", "valid_auc", "test_auc", "spread", "minus_lightgbm", "seconds"])
    write("numeric_features", {"settings": {"threads": args.threads}, "summary": rows, "runs": records})


if __name__ == "__main__":
    main()
