"""All rankers under one protocol: quality, size, operations and speed on real and planted tables.

    python -m benchmarks.tables --data DIR --out tables
    python -m benchmarks.ranking.compare --set ml1m_ctr --tables tables
    python -m benchmarks.tables --data DIR --out tables --tables census globo_time amazon_beauty
    python -m benchmarks.ranking.compare --set globo_seq --tables tables
    python -m benchmarks.ranking.compare --set order-3

Protocol: at most `--epochs` epochs (see EPOCHS), the one with the best validation AUC is kept; batch 4096 (1024 below
400,000 training rows), dim 16, heads 256-128-64, Adam 1e-3, no dropout, no regularisation. Tuning budget, the same for
every model that has an MLP: batch norm off and on with the first seed; the setting with the higher validation AUC runs
the other seeds, and its test metrics are shown. On sets with histories batch norm is on (without it every model was
worse on validation where we looked). On planted tables the oracle is the true probabilities.

Finished runs are kept in `--work` and not repeated, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import table, write

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
    "dcn_v2 wide": ("dcn_v2", {"hidden": (512, 256, 128)}),
    "hilomoe dcn_v2": ("hilomoe", {"backbone": {"name": "dcn_v2", "hidden": HIDDEN}}),
    "hilomoe flat": (
        "hilomoe",
        {"backbone": {"name": "dcn_v2", "hidden": HIDDEN}, "hierarchical": False},
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
    "kunlun": ("kunlun", {"hidden": HIDDEN}),
}
# Ages turn attention, or nothing: no model reads them as a number.
AGES_TURN_ATTENTION = {
    f"kunlun {kind}": ("kunlun", {"hidden": HIDDEN, "rote": rote, "ages_as_input": False})
    for kind, rote in (("ages in attention alone", True), ("places alone", False))
}
FLOWS = {
    f"interformer {flow}": ("interformer", {"hidden": HIDDEN, "flow": flow}) for flow in ("n2s", "s2n", "sep", "sole")
}
ONE_OUTPUT = ("fm", "deepfm", "autoint", "finalmlp")  # census has two labels
AMAZON = ("amazon_beauty", "amazon_toys", "amazon_grocery")
SCHEMAS = {
    "ml1m_ctr": "movielens-1m",
    "census": "census-income",
    "globo_seq": "globo",
    "globo_time": "globo-time",
} | dict.fromkeys(AMAZON, "amazon-leave-last-out")
TASKS = ("order-1", "order-2", "order-3", "order-4", "segments", "heterogeneous", "timed")
SETS = (*SCHEMAS, *TASKS)
ENTRIES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = (
    dict.fromkeys(SETS, TABULAR)
    | dict.fromkeys(("globo_seq", "globo_time", *AMAZON), SEQUENCES)
    | {"heterogeneous": SEQUENCES | FLOWS, "timed": SEQUENCES | AGES_TURN_ATTENTION}
    | {"census": {label: entry for label, entry in TABULAR.items() if label not in ONE_OUTPUT}}
)
# One where a second epoch overfits on validation.
EPOCHS = dict.fromkeys(SETS, 3) | {"order-4": 8, "census": 2}
EPOCHS |= dict.fromkeys(("ml1m_ctr", "globo_seq", "globo_time"), 1) | dict.fromkeys(AMAZON, 2)


def dataset_of(name: str, args: argparse.Namespace, scratch: Path) -> Any:
    if name in TASKS:
        from fullrank.data.planted import planted_dataset

        return planted_dataset(scratch / "dataset", name)
    from fullrank.data.importing import import_dataset
    from fullrank.schema import EventNumber, Keys, Schema

    schema = Schema.read(RECIPES / f"{SCHEMAS[name]}.schema.json")
    if name == "globo_seq":  # the recipes' schema has no user: its tables may come without
        schema = schema.model_copy(update={"keys": Keys(user_id="user_id")})
    if name == "amazon_grocery":  # the only one with times
        *features, history = schema.features
        fields = (*history.fields, EventNumber(name="age", transform="log1p"))
        schema = schema.model_copy(update={"features": (*features, history.model_copy(update={"fields": fields}))})
    return import_dataset("csv", args.tables / name, scratch / "dataset", schema=schema)


def with_batch_norm(model: str, config: dict[str, Any], norm: bool) -> dict[str, Any]:
    """The configuration with batch norm in every MLP, members' included."""
    if model == "hilomoe" or model == "multi_embedding":
        return {**config, "backbone": {**config["backbone"], "batch_norm": norm}}
    if model == "cetnet":
        return {**config, "members": [{**member, "batch_norm": norm} for member in config["members"]]}
    return {**config, "batch_norm": norm}


def tunable(model: str) -> bool:
    from fullrank.models import RANKERS

    return model in ("hilomoe", "multi_embedding", "cetnet") or "batch_norm" in RANKERS[model].Config.model_fields


def training_config(dataset: Any, seed: int, epochs: int) -> Any:
    """Of the protocol: Adam 1e-3, small batches for small tables."""
    from fullrank.training import TrainerConfig

    return TrainerConfig(seed=seed, epochs=epochs, batch_size=4096 if dataset.rows("train") >= 400_000 else 1024)


def run(dataset: Any, model_name: str, config: dict[str, Any], seed: int, epochs: int) -> dict[str, Any]:
    import torch

    from fullrank.data.loader import Loader
    from fullrank.models import RANKERS
    from fullrank.training import evaluate
    from fullrank.training.run import fit_ranker

    torch.manual_seed(seed)
    ages_as_input = config.get("ages_as_input", True)
    config = {key: value for key, value in config.items() if key != "ages_as_input"}
    model = RANKERS[model_name].from_config(dataset.schema, config)
    if not ages_as_input:  # the age is the only number of an event
        for vector_ND in model.features.event_numbers.values():
            vector_ND.requires_grad_(False).zero_()
    result = fit_ranker(model, dataset, training_config(dataset, seed, epochs))
    record: dict[str, Any] = {
        "best_epoch": 1 + max(range(len(result.history)), key=lambda epoch: result.history[epoch]["auc"]),
        "samples_per_s": result.samples_per_second,
        "parameters": model.num_parameters().total,
        "dense_parameters": model.num_parameters().dense,
        "flops_per_example": model.flops_per_example(),
    }
    for part, found in (("valid", result.best_tasks), ("test", evaluate(model, Loader(dataset, "test", 8192)))):
        for label, metrics in found.items():
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


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Records of finished runs; none without the file, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_journal(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def standard_error(values: list[float]) -> float:
    """Of the mean; NaN for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def chosen_norm(records: list[dict[str, Any]], label: str) -> bool:
    """The setting with the higher validation AUC at the first seed."""
    mine = [record for record in records if record["label"] == label]
    first = min(record["seed"] for record in mine)
    best: dict[str, Any] = max((r for r in mine if r["seed"] == first), key=lambda r: r["valid_auc"])
    return bool(best["batch_norm"])


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for label in dict.fromkeys(record["label"] for record in records):
        best = chosen_norm(records, label)
        chosen = [record for record in records if (record["label"], record["batch_norm"]) == (label, best)]
        row: dict[str, Any] = {"label": label, "batch_norm": best, "seeds": len(chosen)}
        for key in chosen[0]:
            if isinstance(chosen[0][key], (int, float)) and key not in ("seed", "batch_norm"):
                row[key] = statistics.mean(r[key] for r in chosen)
        row["standard_error"] = standard_error([r["test_auc"] for r in chosen])
        rows.append(row)
    return sorted(rows, key=lambda row: -row["test_auc"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", dest="name", required=True, choices=SETS)
    parser.add_argument("--models", nargs="+", help="labels of the table; default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", type=Path, default=Path("tables"))
    parser.add_argument("--work", type=Path, default=Path("runs/ranking"))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    entries = ENTRIES[args.name]
    chosen = args.models or list(entries)
    unknown = [label for label in chosen if label not in entries]
    if unknown:
        parser.error(f"--models: no {unknown[0]!r} among {', '.join(entries)}")
    epochs = args.epochs or EPOCHS[args.name]
    journal = args.work / f"{args.name}.jsonl"
    records = read_journal(journal)
    with tempfile.TemporaryDirectory() as folder:
        dataset = dataset_of(args.name, args, Path(folder))
        best = oracle(dataset) if args.name in TASKS else None
        for seed in args.seeds:
            for label in chosen:
                model, config = entries[label]
                norms: tuple[bool, ...] = (False, True) if tunable(model) else (False,)
                mine = [r for r in records if r["epochs"] == epochs]
                if tunable(model) and entries is not TABULAR:
                    norms = (True,)
                elif seed != args.seeds[0]:
                    norms = (chosen_norm(mine, label),)
                for norm in norms:
                    if (label, norm, seed) in {(r["label"], r["batch_norm"], r["seed"]) for r in mine}:
                        continue
                    values = with_batch_norm(model, config, norm) if tunable(model) else config
                    record = {"label": label, "batch_norm": norm, "seed": seed, "epochs": epochs}
                    record |= run(dataset, model, values, seed, epochs)
                    records.append(record)
                    append_journal(journal, [record])
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
