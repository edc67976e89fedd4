"""Test AUC of our rankers and of FuxiCTR's own, same split, same tuning grid, several seeds.

    python -m benchmarks.tables --data DIR --out tables
    python -m benchmarks.ctr_quality --tables tables --fuxictr-python P --fuxictr-zoo CHECKOUT/model_zoo

Protocol, both sides: one epoch, batch 4096, dim 16, hidden 256-128-64, no dropout, no regularisation, Adam, tables
from N(0, 1e-4²), gradient norm clipped at 10. Grid of two settings: batch norm off and on at 1e-3; for LR and FM, which
have no MLP, learning rates 1e-3 and 1e-2. The setting with the higher mean validation AUC over the seeds is the one
whose test AUC is reported. With `--own` a third row per model gives our recipe's settings.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import table, write

HERE = Path(__file__).parent
FLOORS = {"ml1m_ctr": 0.8611, "globo_seq": 0.571}
SCHEMAS = {"ml1m_ctr": "movielens-1m", "globo_seq": "globo"}
Done = set[tuple[str, str, str, bool, float, int]]
HIDDEN = (256, 128, 64)
# Batch norm and learning rate.
WITH_MLP, WITHOUT = ((False, 0.001), (True, 0.001)), ((False, 0.001), (False, 0.01))
# our name -> FuxiCTR's name, our configuration, whether there is batch norm to tune
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "lr": ("LR", {}, False),
    "fm": ("FM", {}, False),
    "deepfm": ("DeepFM", {"hidden": HIDDEN}, True),
    "dcn_v2": ("DCNv2", {"hidden": HIDDEN}, True),
    "dlrm": ("DLRM", {"hidden": HIDDEN}, True),
    "autoint": ("AutoInt", {"hidden": HIDDEN}, True),
    "finalmlp": ("FinalMLP", {"context1": ("user_id",), "context2": ("item_id",)}, True),
    "din": ("DIN", {"hidden": HIDDEN}, True),
}
TABLES = {
    "ml1m_ctr": ["lr", "fm", "deepfm", "dcn_v2", "dlrm", "autoint", "finalmlp"],
    "globo_seq": ["lr", "fm", "deepfm", "dcn_v2", "dlrm", "autoint", "din"],
}


def ours(name: str, folder: Path, models: list[str], seeds: list[int], own: bool, done: Done) -> list[dict[str, Any]]:
    """Import the table once and train every job on it."""
    from fullrank.data.importing import import_dataset
    from fullrank.data.loader import Loader
    from fullrank.embeddings import EmbeddingOptimizer
    from fullrank.models import RankerSpec
    from fullrank.schema import Schema
    from fullrank.training import TrainerConfig, evaluate
    from fullrank.training.recipe import read_recipe
    from fullrank.training.run import train_ranker

    recipes = HERE.parent / "recipes"
    schema = Schema.read(recipes / f"{SCHEMAS[name]}.schema.json")
    records = []
    with tempfile.TemporaryDirectory() as scratch:
        dataset = import_dataset("csv", folder, Path(scratch) / "dataset", schema=schema)
        test = Loader(dataset, "test", 16384)
        for model_name in models:
            _, config, tunable = MODELS[model_name]
            jobs: list[tuple[str, RankerSpec, TrainerConfig, EmbeddingOptimizer]] = [
                (
                    "same",
                    RankerSpec.of({"name": model_name, **config, **({"batch_norm": norm} if tunable else {})}),
                    TrainerConfig(learning_rate=rate),
                    EmbeddingOptimizer(),
                )
                for norm, rate in (WITH_MLP if tunable else WITHOUT)
            ]
            recipe_file = recipes / f"{SCHEMAS[name]}-{model_name}.yaml"
            if own and recipe_file.exists():
                recipe = read_recipe(recipe_file)
                assert recipe.model is not None
                jobs.append(("own", recipe.model, recipe.training, recipe.embedding))
            for protocol, spec, training, embedding in jobs:
                program = "fullrank" if protocol == "same" else "fullrank, own recipe"
                norm, rate = bool(getattr(spec.config, "batch_norm", False)), training.learning_rate
                for seed in seeds:
                    if (program, name, model_name, norm, rate, seed) in done:
                        continue
                    settings = training.model_copy(update={"seed": seed})
                    model, result = train_ranker(spec, dataset, settings, embedding)
                    checked, tested = (
                        next(iter(found.values())) for found in (result.best_tasks, evaluate(model, test))
                    )
                    records.append({
                        "program": program, "table": name,
                        "model": model_name, "batch_norm": norm, "learning_rate": rate, "seed": seed,
                        "valid_auc": checked["auc"], "test_auc": tested["auc"], "test_logloss": tested["logloss"],
                        "parameters": model.num_parameters().total,
                    })  # fmt: skip
                    print(json.dumps(records[-1]), flush=True)
    return records


def theirs(
    name: str, folder: Path, models: list[str], seeds: list[int], args: argparse.Namespace, done: Done
) -> list[dict[str, Any]]:
    """Run FuxiCTR's jobs, after one preprocessing for the models that pool the history and one for DIN."""
    names = {fuxictr: ours for ours, (fuxictr, _, _) in MODELS.items()}
    records = []
    for attends in (False, True):
        chosen = [model for model in models if (model == "din") == attends]
        jobs = [
            f"{MODELS[model][0]}:{rate}:{int(norm)}:{seed}"
            for model in chosen
            for norm, rate in (WITH_MLP if MODELS[model][2] else WITHOUT)
            for seed in seeds
            if ("fuxictr", name, model, norm, rate, seed) not in done
        ]
        if not jobs:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            # A history that shares the item table leaves FuxiCTR's linear terms uninitialised: own table there.
            share = ["--no-share"] if name == "globo_seq" and not attends else []
            command = [args.fuxictr_python, str(HERE / "peers/fuxictr_peer.py"), "--jobs", *jobs]
            command += ["--data", str(folder), "--zoo", args.fuxictr_zoo, "--work", scratch]
            command += ["--threads", str(args.threads), *share]
            finished = subprocess.run(command, capture_output=True, text=True, check=False)
            if finished.returncode:
                raise RuntimeError(finished.stderr[-3000:])
        for line in finished.stdout.splitlines():
            if line.startswith("{"):
                record = json.loads(line)
                kept = {key: record[key] for key in ("table", "batch_norm", "learning_rate", "seed", "valid_auc",
                                                     "test_auc", "test_logloss", "parameters")}  # fmt: skip
                records.append({"program": "fuxictr", "model": names[record["model"]], **kept})
                print(json.dumps(records[-1]), flush=True)
    return records


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name, model, program in dict.fromkeys((r["table"], r["model"], r["program"]) for r in records):
        mine = [r for r in records if (r["table"], r["model"], r["program"]) == (name, model, program)]
        settings: dict[tuple[bool, float], list[dict[str, Any]]] = {}
        for record in mine:
            settings.setdefault((record["batch_norm"], record["learning_rate"]), []).append(record)
        best, chosen = max(settings.items(), key=lambda item: statistics.mean(r["valid_auc"] for r in item[1]))
        tests = [r["test_auc"] for r in chosen]
        error = statistics.stdev(tests) / math.sqrt(len(tests)) if len(tests) > 1 else math.nan
        rows.append({
            "table": name, "model": model, "program": program, "batch_norm": best[0], "learning_rate": best[1],
            "seeds": len(tests), "valid_auc": statistics.mean(r["valid_auc"] for r in chosen),
            "test_auc": statistics.mean(tests), "standard_error": error, "floor": FLOORS[name],
            "parameters": chosen[0]["parameters"],
        })  # fmt: skip
    for row in rows:
        peer = [r for r in rows if (r["table"], r["model"], r["program"]) == (row["table"], row["model"], "fuxictr")]
        row["minus_fuxictr"] = row["test_auc"] - peer[0]["test_auc"] if peer else None
    return sorted(rows, key=lambda row: (row["table"], row["model"], row["program"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reuse", type=Path, help="output of an interrupted run: its jobs are not run again")
    parser.add_argument("--own", action="store_true", help="also our recipes' settings")
    parser.add_argument("--fuxictr-python")
    parser.add_argument("--fuxictr-zoo")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    records: list[dict[str, Any]] = []
    if args.reuse is not None:
        records = [json.loads(line) for line in args.reuse.read_text().splitlines() if line.startswith('{"program"')]
    done = {(r["program"], r["table"], r["model"], r["batch_norm"], r["learning_rate"], r["seed"]) for r in records}
    for name in args.only:
        models = [model for model in TABLES[name] if model in args.models]
        folder = (args.tables / name).resolve()
        records += ours(name, folder, models, args.seeds, args.own, done)
        if args.fuxictr_python:
            records += theirs(name, folder, models, args.seeds, args, done)
    rows = summarise(records)
    print()
    table(rows, ["table", "model", "program", "batch_norm", "learning_rate", "valid_auc", "test_auc", "standard_error",
                 "minus_fuxictr", "parameters"])  # fmt: skip
    write("ctr_quality", {"settings": {"seeds": args.seeds, "threads": args.threads}, "summary": rows, "runs": records})


if __name__ == "__main__":
    main()
