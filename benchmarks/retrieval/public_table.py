"""Recall@20 and NDCG@20 of all items ranked on Gowalla, beside the published figures for the same split.

    python -m benchmarks.retrieval.public_table --data DIR [--rows graph_blend lightgcn ...]

DIR has `train.txt` and `test.txt` of NGCF and LightGCN (29,858 users, 40,981 items, 810,128 + 217,242 pairs), also
packed. Each row is a recipe of this name, with one seed and on one thread; seconds are of the processor, without the
import. Rows that are not run again stay as they were. Values of hyper-parameters come from a tenth of the training
pairs that was set aside, or are first guesses, never from test pairs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, table, write
from fullrank.data.dataset import Dataset
from fullrank.data.importing import import_dataset
from fullrank.retrieval import RetrieverSpec
from fullrank.retrieval.all_ranking import evaluate_all_ranking, training_items
from fullrank.training.recipe import read_values

RECIPES = Path(__file__).parents[2] / "recipes"
NAME = "retrieval_public_table"
# Recall@20 and NDCG@20: the tables of the papers on SimpleX and LightGCN.
PUBLISHED = {
    "mf_bpr": (0.1291, 0.1109),
    "two_tower": (0.1754, 0.1473),
    "simplex": (0.1872, 0.1557),
    "lightgcn": (0.1830, 0.1554),
    "best published": (0.1917, 0.1617),
}
ROWS: dict[str, Any] = {
    "popularity": "popularity",
    "two_tower": {
        "name": "two_tower",
        "embedding_dim": 64,
        "hidden": [],
        "output_dim": 64,
        "batch_size": 2048,
        "epochs": 5,
        "learning_rate": 0.01,
    },
    **{name: f"gowalla-{name}" for name in ("mf_bpr", "simplex", "lightgcn", "graph_filter", "graph_blend")},
}


def spec(row: str) -> RetrieverSpec:
    said = ROWS[row]
    if isinstance(said, str) and said.startswith("gowalla-"):
        said = read_values(RECIPES / f"{said}.yaml")["retrieval"]
    return RetrieverSpec.of(said)


def measured(row: str, dataset: Dataset) -> dict[str, Any]:
    begin = time.process_time()
    wanted = spec(row)
    retriever = wanted.build(dataset.schema).fit(dataset)
    fitted = time.process_time()
    retriever.index(training_items(dataset))
    found = evaluate_all_ranking(retriever, dataset, ks=(20, 100))
    return {
        "row": row,
        "config": wanted.model_dump(mode="json"),
        **found,
        "fit CPU-s": fitted - begin,
        "evaluate CPU-s": time.process_time() - fitted,
    }


def show(rows: list[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        published = PUBLISHED.get(row["row"], (None, None))
        lines.append(
            {
                "row": row["row"],
                "recall@20": row["recall_at_20"],
                "NDCG@20": row["ndcg_at_20"],
                "recall@100": row["recall_at_100"],
                "fit CPU-s": round(row["fit CPU-s"], 1),
                "evaluate CPU-s": round(row["evaluate CPU-s"], 1),
                "published recall@20": published[0],
                "published NDCG@20": published[1],
            }
        )
    best = PUBLISHED["best published"]
    lines.append({"row": "best published", "published recall@20": best[0], "published NDCG@20": best[1]})
    table(lines, list(lines[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with train.txt and test.txt")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}.json"
    known = {row["row"]: row for row in json.loads(path.read_text())["rows"]} if path.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        dataset = import_dataset("interactions", args.data, Path(scratch) / "gowalla")
        for row in args.rows:
            known[row] = measured(row, dataset)
            kept = [known[name] for name in ROWS if name in known]
            write(NAME, {"published": PUBLISHED, "threads": 1, "rows": kept})
            show(kept)


if __name__ == "__main__":
    main()
