"""CPU time of searches for the 1,000 largest inner products, as a funnel wants: FAISS at a recall of .95.

python -m benchmarks.retrieval.many_results [--items 1000000 100000]

"unit" and "raw" are the vectors of `benchmarks.retrieval.dot_products`. "towers" are like those of two towers with a
popularity: items of 32 numbers of norm 10 and a bias that is large for a thousand of them, users of norm 1 that mostly
lie in 8 directions, and a 1. How it is measured is said there; an index learns from 300 of the queries that its effort
is chosen by. `faiss_ivf_sq8` is left out beyond 100,000 items: where it has to search half of its cells, choosing that
takes minutes.

Written to benchmarks/results/retrieval_many_results.json.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from benchmarks.machine import table, write
from benchmarks.retrieval.dot_products import QUERIES, TUNING, WIDTH, measured, vectors

RESULTS, SLOW, FEW = 1000, "faiss_ivf_sq8", 100_000
NAMES = ("exact", "faiss_ivf_sq8", "faiss_4bit", "faiss_ivf_4bit", "auto")
COLUMNS = ("set", "items", "index", "build_s", "bytes", "effort", "recall", "single_ms", "batch_ms")
DIRECTIONS, POPULAR = 8, 1000


def towers(items: int) -> tuple[Any, Any]:
    """Vectors of items and of queries, 33 numbers each."""
    import torch
    from torch.nn.functional import normalize

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    popular = (torch.rand(items, 1, generator=generator) < POPULAR / items) * normal(items, 1).abs() * 5
    items_ID = torch.cat([10 * normalize(normal(items, 32), dim=1), 0.3 * normal(items, 1) + popular], 1)
    count = TUNING + QUERIES
    users_BD = normalize(normal(count, DIRECTIONS) @ normal(DIRECTIONS, 32) + 0.3 * normal(count, 32), dim=1)
    return items_ID, torch.cat([users_BD, torch.ones(count, 1)], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[1_000_000, 100_000])
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    lines: list[dict[str, Any]] = []
    for items in args.items:
        for kind in ("towers", "raw", "unit"):
            drawn = towers(items) if kind == "towers" else vectors(items, unit=kind == "unit")
            names = [name for name in NAMES if name != SLOW or items <= FEW]
            lines += measured(tuple(names), kind, drawn, RESULTS)
            table(lines, list(COLUMNS))
            setting = {"threads": 1, "width": {"towers": 33, "raw": WIDTH, "unit": WIDTH}, "k": RESULTS}
            write("retrieval_many_results", {**setting, "recall_asked_for": 0.95, "result": lines})


if __name__ == "__main__":
    main()
