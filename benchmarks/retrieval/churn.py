"""Recall@100 of a hierarchical index while a tenth of its items is replaced every day, against daily rebuilds.

python -m benchmarks.retrieval.churn [--seeds 1 2 3]

100,000 vectors of 64 numbers in 2,000 clusters of Zipf sizes. On each of 7 days a tenth of the items, chosen at random,
expires and as many come from the clusters as they are that day: every centre has moved by a tenth of its spread, every
popularity by a random factor of e^0.3. 200 queries a day from the same clusters; recall of the 100 best inner products
among the day's items with a fixed budget of items scored. All arms start from the same index:

changed     items are added and removed; new ones get their codes from the codebooks of the first day
nearest     the same, but new items go to the nearest leaf that there is
reassigned  the same, and every day each item moves to the nearest leaf
balanced    as changed, and every day leaves of more than four times the first day's mean are split
rebuilt     codebooks and index are made anew every day
frozen      nothing happens: expired items are still returned, new ones never

Vectors of nodes are those of the codebooks, or the mean of the items that a node has at the time.

Written to benchmarks/results/index_churn.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

from benchmarks.machine import table, write

ITEMS, WIDTH, CLUSTERS = 100_000, 64, 2_000
DAYS, REPLACED, MOVE, FADE = 7, 0.1, 0.1, 0.3
QUERIES, K, SHARE = 200, 100, 0.1
NUM_NODES = {"one level": (512,), "two levels": (32, 32)}
ARMS = ("changed", "nearest", "reassigned", "balanced", "rebuilt", "frozen")


class Market:
    """Clusters that move and fade, and items and queries of a day."""

    def __init__(self, seed: int) -> None:
        import torch

        self.generator = torch.Generator().manual_seed(seed)
        self.scale = torch.arange(1, WIDTH + 1).float() ** -0.5
        self.centres = self.noise(CLUSTERS) * self.scale
        self.popularity = -0.8 * torch.arange(1, CLUSTERS + 1).log()

    def noise(self, rows: int) -> Any:
        import torch

        return torch.randn(rows, WIDTH, generator=self.generator)

    def draw(self, count: int) -> Any:
        import torch

        of = torch.multinomial(self.popularity.softmax(0), count, replacement=True, generator=self.generator)
        return self.centres[of] + 0.5 * self.noise(count) * self.scale

    def next_day(self) -> None:
        import torch

        self.centres = self.centres + MOVE * self.noise(CLUSTERS) * self.scale
        self.popularity = self.popularity + FADE * torch.randn(CLUSTERS, generator=self.generator)


def quantizer(vectors: Any, sizes: tuple[int, ...], seed: int) -> Any:
    from fullrank.embeddings.semantic_id import RQKMeans

    return RQKMeans(len(sizes), sizes, max_points_per_centroid=64, seed=seed).fit(vectors)


def built(keys: Any, vectors: Any, codebook: Any, nodes: str) -> Any:
    from fullrank.retrieval.hierarchy import HierarchicalIndex

    return HierarchicalIndex.build(
        keys,
        vectors,
        codebook.encode(vectors),
        num_nodes=codebook.codebook_sizes,
        node_vectors=codebook.codebooks if nodes == "codebooks" else None,
    )


def week(sizes: tuple[int, ...], nodes: str, seed: int) -> list[dict[str, Any]]:
    """A line for each day and arm."""
    import torch

    from fullrank.retrieval.hierarchy import DotProduct
    from fullrank.retrieval.hierarchy.health import recall

    market, scorer = Market(seed), DotProduct(WIDTH)
    keys, vectors = torch.arange(ITEMS), market.draw(ITEMS)
    first = quantizer(vectors, sizes, seed)
    indexes = {arm: built(keys, vectors, first, nodes) for arm in ARMS}
    largest = int(4 * indexes["changed"].health().mean_leaf)
    lines = []
    for day in range(DAYS + 1):
        seconds = dict.fromkeys(ARMS, 0.0)
        if day:
            market.next_day()
            order = torch.randperm(ITEMS, generator=market.generator)
            gone, stay = order[: int(REPLACED * ITEMS)], order[int(REPLACED * ITEMS) :]
            fresh = market.draw(len(gone))
            fresh_keys = torch.arange(day * ITEMS, day * ITEMS + len(gone))
            expired = keys[gone]
            keys, vectors = torch.cat([keys[stay], fresh_keys]), torch.cat([vectors[stay], fresh])
            for arm in ("changed", "nearest", "reassigned", "balanced"):
                begin, index = time.process_time(), indexes[arm]
                index.remove(expired)
                near = arm in ("nearest", "reassigned")
                index.add(fresh_keys, fresh, index.nearest(fresh) if near else first.encode(fresh))
                if arm == "reassigned":
                    index.reassign()
                if arm == "balanced":
                    index.rebalance(largest)
                seconds[arm] = time.process_time() - begin
            begin = time.process_time()
            indexes["rebuilt"] = built(keys, vectors, quantizer(vectors, sizes, seed + day), nodes)
            seconds["rebuilt"] = time.process_time() - begin
        queries = market.draw(QUERIES)
        exact = indexes["rebuilt"].search_exact(scorer, queries, K, scan=True).item_keys_BK
        for arm, index in indexes.items():
            found = index.search(scorer, queries, K, index.occupied, max_items=int(SHARE * ITEMS))
            health = index.health()
            lines.append(
                {
                    "day": day,
                    "arm": arm,
                    "recall": recall(found.item_keys_BK, exact),
                    "items_share": float(found.cost_B.double().mean()) / ITEMS,
                    "seconds": seconds[arm],
                    "quantization_error": health.quantization_error,
                    "max_leaf": health.max_leaf,
                    "leaves": health.nodes[-1],
                    "tail_share": health.tail_share,
                    "dead_share": health.dead_share,
                }
            )
    return lines


def summary(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Means over seeds of the last day, and of its difference to the daily rebuild, with the standard error."""
    lines = []
    for arm in ARMS:
        last = [next(line for line in run if line["arm"] == arm and line["day"] == DAYS) for run in runs]
        rebuilt = [next(line for line in run if line["arm"] == "rebuilt" and line["day"] == DAYS) for run in runs]
        less = [line["recall"] - other["recall"] for line, other in zip(last, rebuilt, strict=True)]
        first = statistics.fmean(
            next(line for line in run if line["arm"] == arm and line["day"] == 0)["recall"] for run in runs
        )
        lines.append(
            {
                "arm": arm,
                "recall_day_0": first,
                **{
                    name: statistics.fmean(line[name] for line in last)
                    for name in ("recall", "items_share", "seconds", "quantization_error", "max_leaf", "tail_share")
                },
                "less_rebuilt": statistics.fmean(less),
                "standard_error": statistics.stdev(less) / len(less) ** 0.5 if len(less) > 1 else 0.0,
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {}
    columns = ["arm", "recall_day_0", "recall", "less_rebuilt", "standard_error", "items_share", "seconds", "max_leaf"]
    for name, sizes in NUM_NODES.items():
        for nodes in ("codebooks", "means"):
            runs = [week(sizes, nodes, seed) for seed in args.seeds]
            result[f"{name}, {nodes}"] = {"num_nodes": list(sizes), "summary": summary(runs), "runs": runs}
            print(f"{name}, vectors of nodes: {nodes}")
            table(result[f"{name}, {nodes}"]["summary"], columns)
    setting = {"items": ITEMS, "width": WIDTH, "days": DAYS, "replaced": REPLACED, "k": K, "share": SHARE}
    write("index_churn", {"threads": args.threads, "seeds": args.seeds, **setting, "result": result})


if __name__ == "__main__":
    main()
