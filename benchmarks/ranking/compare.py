"""All rankers under one protocol: quality, size, operations and speed on real and planted tables.

    python benchmarks/tables.py --data DIR --out tables
    python benchmarks/ranking/compare.py --set ml1m_ctr --tables tables
    python benchmarks/ranking/compare.py --set census --data DIR
    python benchmarks/ranking/compare.py --set globo_seq --tables tables
    python benchmarks/ranking/compare.py --set order-3

Protocol: `--epochs` epochs (1 on ml1m_ctr and globo_seq, where a second overfits; 3 elsewhere), batch 4096 (1024 below
400,000 training rows), dim 16, heads 256-128-64, Adam 1e-3, no dropout, no regularisation. Tuning budget, the same for
every model that has an MLP: batch norm off and on. The setting with the higher mean validation AUC over seeds is the
one whose test metrics are shown. On planted tables the oracle's row is what the true probabilities score.

Finished runs are kept in `--work` and not repeated, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import table, write

HIDDEN = (256, 128, 64)
RECIPES = Path(__file__).parents[2] / "recipes"
# label -> model, configuration
TABULAR: dict[str, tuple[str, dict[str, Any]]] = {
    "lr": ("lr", {}),
    "fm": ("fm", {}),
    "deepfm": ("deepfm", {"hidden": HIDDEN}),
    "dcn_v2": ("dcn_v2", {"hidden": HIDDEN}),
    "dlrm": ("dlrm", {"hidden": HIDDEN}),
    "autoint": ("autoint", {"hidden": HIDDEN}),
    "finalmlp": ("finalmlp", {"hidden1": HIDDEN, "hidden2": HIDDEN}),
    "mmoe": ("mmoe", {}),
    "ple": ("ple", {}),
    "wukong": ("wukong", {}),
    "dhen dlrm+linear x3": ("dhen", {"layers": [["dlrm", "linear"]] * 3}),
    "dhen dlrm x3": ("dhen", {"layers": [["dlrm"]] * 3}),
    "dhen linear x3": ("dhen", {"layers": [["linear"]] * 3}),
    "interformer": ("interformer", {"hidden": HIDDEN}),
    "kunlun": ("kunlun", {"hidden": HIDDEN}),
    "hilomoe narrow dcn_v2": ("hilomoe", {"backbone": {"name": "dcn_v2", "hidden": (192, 96, 48)}}),
    "hilomoe flat": (
        "hilomoe",
        {"backbone": {"name": "dcn_v2", "hidden": (192, 96, 48)}, "hierarchical": False},
    ),
    "cetnet dcn_v2+dlrm": (
        "cetnet",
        {"members": [{"name": "dcn_v2", "hidden": HIDDEN}, {"name": "dlrm", "hidden": HIDDEN}], "intercept": True},
    ),
    "dcn_v2 dim 32": ("dcn_v2", {"hidden": HIDDEN, "embedding_dim": 32}),
    "multi_embedding dcn_v2 x2": ("multi_embedding", {"backbone": {"name": "dcn_v2", "hidden": HIDDEN}}),
}
SEQUENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "dcn_v2": ("dcn_v2", {"hidden": HIDDEN}),
    "din": ("din", {"hidden": HIDDEN}),
    "bst": ("bst", {"hidden": HIDDEN}),
    "dien": ("dien", {"hidden": HIDDEN}),
    "transact": ("transact", {"hidden": HIDDEN}),
    "interformer": ("interformer", {"hidden": HIDDEN}),
    "interformer n2s": ("interformer", {"hidden": HIDDEN, "flow": "n2s"}),
    "interformer s2n": ("interformer", {"hidden": HIDDEN, "flow": "s2n"}),
    "interformer sep": ("interformer", {"hidden": HIDDEN, "flow": "sep"}),
    "interformer sole": ("interformer", {"hidden": HIDDEN, "flow": "sole"}),
    "kunlun": ("kunlun", {"hidden": HIDDEN, "num_layers": 3}),
    "kunlun without times": ("kunlun", {"hidden": HIDDEN, "num_layers": 3, "rote": False}),
}
REAL = {"ml1m_ctr": ("movielens-1m", TABULAR), "globo_seq": ("globo", SEQUENCES), "census": ("census", TABULAR)}
PLANTED = {f"order-{order}": TABULAR for order in (1, 2, 3, 4)} | {"segments": TABULAR} | {
    name: SEQUENCES for name in ("heterogeneous", "timed")
}  # fmt: skip
CENSUS_CODES = {"det_ind_code", "det_occ_code", "own_or_self", "vet_benefits", "year"}


def census(data: Path, out: Path) -> Any:
    """Census-Income as a dataset of two tasks: income above 50,000, and never married."""
    import polars as pl

    from fullrank.data.importing import import_dataset
    from fullrank.schema import Categorical, Label, Numeric, Schema

    parts = {part: pl.read_parquet(data / "census-income-kdd" / f"{part}.parquet") for part in ("train", "test")}
    held = parts["train"].sample(fraction=1.0, shuffle=True, seed=0)
    parts["valid"], parts["train"] = held[:20_000], held[20_000:]
    left_out = {"income_50k", "marital_stat", "instance_weight"}
    features: list[Any] = []
    for name, kind in parts["train"].schema.items():
        if name in left_out:
            continue
        number = kind == pl.Int64 and name not in CENSUS_CODES
        features.append(Numeric(name=name, transform="standard") if number else Categorical(name=name))
    schema = Schema(features=tuple(features), labels=(Label(name="income"), Label(name="never_married")))
    folder = out.parent / "census-parts"
    folder.mkdir(parents=True)
    for part, frame in parts.items():
        labelled = frame.with_columns(
            income=pl.col("income_50k").str.starts_with("50000").cast(pl.Int8),
            never_married=(pl.col("marital_stat") == "Never married").cast(pl.Int8),
        )
        labelled.drop(left_out).write_parquet(folder / f"{part}.parquet")
    return import_dataset("parquet", folder, out, schema=schema)


def dataset_of(name: str, args: argparse.Namespace, scratch: Path) -> Any:
    if name in PLANTED:
        from fullrank.data.planted import planted_dataset

        return planted_dataset(scratch / "dataset", name)
    if name == "census":
        return census(args.data, scratch / "dataset")
    from fullrank.data.importing import import_dataset
    from fullrank.schema import Schema

    schema = Schema.read(RECIPES / f"{REAL[name][0]}.schema.json")
    return import_dataset("csv", args.tables / name, scratch / "dataset", schema=schema)


def with_batch_norm(model: str, config: dict[str, Any], norm: bool) -> dict[str, Any]:
    """The configuration with batch norm in every MLP, members' included."""
    if model == "hilomoe" or model == "multi_embedding":
        return {**config, "backbone": {**config["backbone"], "batch_norm": norm}}
    if model == "cetnet":
        # As alone: batch norm helps one of these members and hurts the other.
        members = [{**member, "batch_norm": norm and member["name"] != "dlrm"} for member in config["members"]]
        return {**config, "members": members}
    return {**config, "batch_norm": norm}


def tunable(model: str) -> bool:
    from fullrank.models import MODELS

    return model in ("hilomoe", "multi_embedding", "cetnet") or "batch_norm" in MODELS[model].Config.model_fields


def run(dataset: Any, model_name: str, config: dict[str, Any], seed: int, epochs: int) -> dict[str, Any]:
    import torch

    from fullrank.data.loader import Loader
    from fullrank.models import MODELS
    from fullrank.training import Trainer, TrainerConfig, evaluate

    torch.manual_seed(seed)
    model = MODELS[model_name].from_config(dataset.schema, config)
    rows = dataset.rows("train")
    train = Loader(dataset, "train", 4096 if rows >= 400_000 else 1024, shuffle=True, seed=seed)
    result = Trainer(TrainerConfig(seed=seed, epochs=epochs)).fit(model, train)
    record: dict[str, Any] = {
        "samples_per_s": result.samples_per_second,
        "parameters": model.num_parameters().total,
        "dense_parameters": model.num_parameters().dense,
        "flops_per_example": model.flops_per_example(),
    }
    for part in ("valid", "test"):
        for label, metrics in evaluate(model, Loader(dataset, part, 8192)).items():
            prefix = f"{part}_{label}_" if len(dataset.schema.labels) > 1 else f"{part}_"
            record |= {prefix + key: metrics[key] for key in ("auc", "ne", "gauc", "calibration") if key in metrics}
    if len(dataset.schema.labels) > 1:
        for part in ("valid", "test"):
            for key in ("auc", "ne"):
                values = [record[f"{part}_{label.name}_{key}"] for label in dataset.schema.labels]
                record[f"{part}_{key}"] = statistics.mean(values)
    return record


def oracle(dataset: Any) -> dict[str, float]:
    """What the true probabilities score on the test part."""
    import torch

    from fullrank.metrics import BinaryMetrics

    label = dataset.schema.labels[0].name
    frame = dataset.scan("test").collect()
    metrics = BinaryMetrics()
    logits = torch.logit(torch.from_numpy(frame[f"__true_{label}"].to_numpy().copy()).double())
    metrics.update(logits, torch.from_numpy(frame[label].to_numpy().copy()).double())
    found = metrics.compute()
    return {"test_auc": found["auc"], "test_ne": found["ne"]}


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for label in dict.fromkeys(record["label"] for record in records):
        mine = [record for record in records if record["label"] == label]
        norms = {norm: [r for r in mine if r["batch_norm"] == norm] for norm in {r["batch_norm"] for r in mine}}
        best = max(norms, key=lambda norm: statistics.mean(r["valid_auc"] for r in norms[norm]))
        chosen = norms[best]
        row: dict[str, Any] = {"label": label, "batch_norm": best, "seeds": len(chosen)}
        for key in chosen[0]:
            if isinstance(chosen[0][key], (int, float)) and key not in ("seed", "batch_norm"):
                row[key] = statistics.mean(r[key] for r in chosen)
        tests = [r["test_auc"] for r in chosen]
        row["standard_error"] = statistics.stdev(tests) / math.sqrt(len(tests)) if len(tests) > 1 else math.nan
        rows.append(row)
    return sorted(rows, key=lambda row: -row["test_auc"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", dest="name", required=True, choices=[*REAL, *PLANTED])
    parser.add_argument("--models", nargs="+", help="labels of the table; default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", type=Path, default=Path("tables"))
    parser.add_argument("--data", type=Path, help="folder with census-income-kdd")
    parser.add_argument("--work", type=Path, default=Path("runs/ranking"))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    entries = REAL[args.name][1] if args.name in REAL else PLANTED[args.name]
    chosen = args.models or list(entries)
    unknown = [label for label in chosen if label not in entries]
    if unknown:
        parser.error(f"--models: no {unknown[0]!r} among {', '.join(entries)}")
    epochs = args.epochs or (1 if args.name in ("ml1m_ctr", "globo_seq") else 3)
    args.work.mkdir(parents=True, exist_ok=True)
    journal = args.work / f"{args.name}.jsonl"
    records = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    done = {(r["label"], r["batch_norm"], r["seed"], r["epochs"]) for r in records}
    with tempfile.TemporaryDirectory() as folder:
        dataset = dataset_of(args.name, args, Path(folder))
        best = oracle(dataset) if args.name in PLANTED else None
        for seed in args.seeds:
            for label in chosen:
                model, config = entries[label]
                for norm in (False, True) if tunable(model) else (False,):
                    if (label, norm, seed, epochs) in done:
                        continue
                    values = with_batch_norm(model, config, norm) if tunable(model) else config
                    record = {"label": label, "batch_norm": norm, "seed": seed, "epochs": epochs}
                    record |= run(dataset, model, values, seed, epochs)
                    records.append(record)
                    with journal.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                    print(json.dumps({key: record[key] for key in ("label", "batch_norm", "seed", "valid_auc")}))
    records = [r for r in records if r["epochs"] == epochs and r["label"] in entries]
    rows = summarise(records)
    if best is not None:
        rows.insert(0, {"label": "oracle", **best})
    columns = ["label", "batch_norm", "seeds", "valid_auc", "test_auc", "standard_error", "test_ne", "test_gauc"]
    print()
    table(rows, [*columns, "parameters", "flops_per_example", "samples_per_s"])
    settings = {"epochs": epochs, "seeds": args.seeds, "threads": args.threads}
    write(f"ranking_{args.name}", {"settings": settings, "summary": rows, "runs": records})


if __name__ == "__main__":
    main()
