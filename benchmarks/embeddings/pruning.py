"""Rows of rare ids, or of small ones, dropped after training, alone and with 4 bits: what a trained ranker loses.

    python -m benchmarks.tables --data DIR --out tables --tables ml1m_ctr
    python -m benchmarks.embeddings.pruning --tables tables

MovieLens-1M as binary CTR (users and items), DCN-V2 with vectors of 16, one epoch, three seeds: the training of
`benchmarks.embeddings.quantization`. Change of the test NE against the same model in float32. Nothing is chosen by test
rows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import table, write
from fullrank.compression import prune_ranker, quantize_ranker
from fullrank.data.dataset import Dataset
from fullrank.data.importing import import_dataset
from fullrank.data.loader import Loader
from fullrank.embeddings import EmbeddingCollection, EmbeddingOptimizer
from fullrank.embeddings.memory import table_memory
from fullrank.models import Ranker
from fullrank.schema import Schema
from fullrank.training import TrainerConfig, evaluate
from fullrank.training.run import train_ranker

RECIPES = Path(__file__).parents[2] / "recipes"
SEEDS = (0, 1, 2)
SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9)


def table_bytes(model: Ranker) -> int:
    collections = [module for module in model.modules() if isinstance(module, EmbeddingCollection)]
    return sum(memory.bytes for collection in collections for memory in table_memory(collection).values())


def quality(dataset: Dataset) -> list[dict[str, Any]]:
    """NE on test rows by variant and seed."""
    counts = {name: torch.from_numpy(known.id_counts) for name, known in dataset.encoders.vocabularies.items()}
    runs = []
    for seed in SEEDS:
        training = TrainerConfig(seed=seed, epochs=1, batch_size=4096)
        model, _ = train_ranker({"name": "dcn_v2", "hidden": [128, 64]}, dataset, training, EmbeddingOptimizer())
        variants = {"float32": model}
        for by in ("count", "norm"):
            for share in SHARES:
                variants[f"{share:.0%} dropped by {by}"] = prune_ranker(model, counts, by=by, share=share)[0]  # type: ignore[arg-type]
        variants |= {f"{name}, 4 bits": quantize_ranker(each)[0] for name, each in variants.items()}
        for name, each in variants.items():
            ne = evaluate(each, Loader(dataset, "test", 8192))["label"]["ne"]
            runs.append({"variant": name, "seed": seed, "bytes": table_bytes(each), "ne": ne})
        print(seed, runs[-len(variants)]["ne"], flush=True)
    return runs


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, least and largest change of NE over the seeds, in per cent."""
    full = {run["seed"]: run for run in runs if run["variant"] == "float32"}
    found = []
    for variant in dict.fromkeys(run["variant"] for run in runs):
        of = [run for run in runs if run["variant"] == variant]
        change = [100 * (run["ne"] / full[run["seed"]]["ne"] - 1) for run in of]
        row = {"variant": variant, "share": of[0]["bytes"] / full[0]["bytes"]}
        row |= {"NE": statistics.mean(run["ne"] for run in of), "change %": statistics.mean(change)}
        found.append(row | {"least %": min(change), "largest %": max(change)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, help="of benchmarks.tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        schema = Schema.read(RECIPES / "movielens-1m.schema.json")
        dataset = import_dataset("csv", args.tables / "ml1m_ctr", Path(scratch) / "dataset", schema=schema)
        runs = quality(dataset)
    found = summary(runs)
    table(found, ["variant", "share", "NE", "change %", "least %", "largest %"])
    write("embedding_pruning", {"quality": found, "runs": runs})


if __name__ == "__main__":
    main()
