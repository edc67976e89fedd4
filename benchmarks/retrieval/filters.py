"""Filtered search of a hierarchical index: a beam among what is allowed against a scan of it, by share allowed.

python -m benchmarks.retrieval.filters [--seeds 1 2 3]

1,000,000 vectors of 64 numbers in 20,000 clusters of Zipf sizes, norms log-normal; one level of 1,024 leaves by
k-means, of which the beam keeps 64. Items are allowed at random. Recall of the 100 best inner products among them, 200
queries; milliseconds of process CPU time a query, alone (median of 20) and in batches of 50 (median of 3),
with a prepared `Selection`, and what preparing and copying it costs once. `ratio` is the allowed items over those that
the beam would score if leaves were alike; where it is below `SCAN_BELOW`, the index scans.

Written to benchmarks/results/index_filters.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.machine import table, write

ITEMS, WIDTH, CLUSTERS, LEAVES, BEAM, K = 1_000_000, 64, 20_000, 1024, 64, 100
QUERIES, BATCH = 200, 50
SHARES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001)


def vectors_and_queries(seed: int) -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, WIDTH + 1).float() ** -0.5
    centres = torch.randn(CLUSTERS, WIDTH, generator=generator) * scale
    popularity = torch.arange(1, CLUSTERS + 1).float() ** -0.8
    of = torch.multinomial(popularity, ITEMS + QUERIES, replacement=True, generator=generator)
    x = centres[of] + 0.5 * torch.randn(ITEMS + QUERIES, WIDTH, generator=generator) * scale
    x *= torch.exp(0.24 * torch.randn(ITEMS + QUERIES, 1, generator=generator))
    return x[:ITEMS].contiguous(), torch.nn.functional.normalize(x[ITEMS:])


def milliseconds(run: Callable[[int], Any], times: int) -> float:
    taken = []
    for number in range(times):
        begin = time.process_time()
        run(number)
        taken.append(time.process_time() - begin)
    return 1e3 * statistics.median(taken)


def measure(seed: int) -> list[dict[str, Any]]:
    import torch

    from fullrank.retrieval.hierarchy import DotProduct, IVFIndex, Selection, searching
    from fullrank.retrieval.hierarchy.health import recall

    vectors, queries = vectors_and_queries(seed)
    index = IVFIndex.build(torch.arange(ITEMS), vectors, LEAVES, seed=seed, iterations=8).index
    scorer, generator, chosen = DotProduct(WIDTH), torch.Generator().manual_seed(seed), searching.SCAN_BELOW
    lines = []
    for share in SHARES:
        allowed = torch.arange(ITEMS)[torch.rand(ITEMS, generator=generator) < share]
        exact = index.search_exact(scorer, queries, K, allowed=allowed).item_keys_BK
        line: dict[str, Any] = {"share": share, "ratio": allowed.numel() / (ITEMS * BEAM / LEAVES)}
        for name, below in (("beam", 0.0), ("scan", float("inf"))):
            searching.SCAN_BELOW = below
            selection = Selection(allowed)

            def search(some: slice, selection: Any = selection) -> Any:
                return index.search(scorer, queries[some], K, (BEAM,), allowed=selection)

            line[f"prepare_{name}"] = milliseconds(lambda _: search(slice(0, 1)), 1)
            line[f"recall_{name}"] = recall(search(slice(0, QUERIES)).item_keys_BK, exact)
            line[f"single_{name}"] = milliseconds(lambda at: search(slice(at, at + 1)), 20)
            line[f"batch_{name}"] = milliseconds(lambda at: search(slice(at * BATCH, (at + 1) * BATCH)), 3) / BATCH
        searching.SCAN_BELOW = chosen
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    runs = [measure(seed) for seed in args.seeds]
    means = [
        {name: statistics.fmean(run[at][name] for run in runs) for name in line} for at, line in enumerate(runs[0])
    ]
    table(means, list(means[0]))
    setting = {"items": ITEMS, "width": WIDTH, "leaves": LEAVES, "beam": BEAM, "k": K}
    write("index_filters", {"threads": args.threads, "seeds": args.seeds, **setting, "mean": means, "runs": runs})


if __name__ == "__main__":
    main()
