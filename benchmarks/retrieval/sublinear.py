"""What a search of 10,000 to 10,000,000 items costs by a network and an index of two levels: FLOPs, time, memory.

    python -m benchmarks.retrieval.sublinear

One network is trained on the world of `benchmarks.retrieval.teacher` with 20,000 items. Then, for every size, items
are drawn from the world and encoded, codewords of two levels found by k-means of 65,536 of them, about 64 items to a
leaf. Beams are doubled until recall@100 against brute force with the same scorer, of the same users, reaches .8. CPU
time is of one thread and one user at a time. The exponent is the slope of log cost against log items, by least
squares.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import table, write
from benchmarks.retrieval.index_quality import BATCH, STEPS, recall, trained, with_tails
from benchmarks.retrieval.teacher import World
from fullrank.retrieval.hierarchy import HierarchicalIndex
from fullrank.retrieval.hierarchy.hsnn import NetworkScorer
from fullrank.retrieval.hierarchy.learning_to_index import LearningToIndex
from fullrank.retrieval.hierarchy.network import Users

TRAINED_ON, K, LEAF, SAMPLE = 20_000, 100, 64, 1 << 16
BEAMS = ((8, 16), (16, 32), (32, 64), (64, 128), (128, 256), (256, 512))
ENOUGH = 0.8
CHUNK = 1 << 16


class OneNodeNetwork(NetworkScorer):
    """The network of the one level that was trained, for the nodes of any level; items by theirs alone."""

    ensembles = False

    def node_scores(self, level: int, users: Users, nodes_MV: Tensor) -> Tensor:
        return super().node_scores(0, users, nodes_MV)

    def flops(self, level: int | None) -> int | None:
        return super().flops(None if level is None else 0)


def scorer_of(seed: int) -> OneNodeNetwork:
    world = World.of(TRAINED_ON, seed)
    retriever, trainer = trained(world.log(BATCH * STEPS // 3), seed, "em")
    with_tails(retriever, trainer)
    scorer = OneNodeNetwork(retriever.network, retriever.scorer.weights_T, None)
    scorer.ensembles = False
    return scorer


def index_of(scorer: OneNodeNetwork, items: int, seed: int) -> tuple[HierarchicalIndex, World]:
    world = World.of(items, seed)
    stored = torch.empty(items, scorer.network.stored_width)
    for begin in range(0, items, CHUNK):
        part = World(world.items_VD[begin : begin + CHUNK], world.kind_V[begin : begin + CHUNK], world.generator)
        stored[begin : begin + CHUNK] = scorer.network.stored(part.features())
    each = max(2, round(math.sqrt(items / LEAF)))
    nodes = LearningToIndex(stored.shape[1], LearningToIndex.Config(num_nodes=(each, each)), mode="separate")
    nodes.fit(stored[torch.randperm(items, generator=world.generator)[:SAMPLE]], seed=seed)
    books = [book.detach() for book in nodes.codebooks]
    index = HierarchicalIndex((each, each), books, stored.shape[1])
    index.add(torch.arange(items), stored, nodes.assign(stored))
    return index, world


def measured(scorer: OneNodeNetwork, items: int, seed: int, users: int) -> list[dict[str, Any]]:
    begun = time.process_time()
    index, world = index_of(scorer, items, seed)
    built = time.process_time() - begun
    encoded = scorer.network.encode_users(world.user_features(world.users(users)))
    begun = time.process_time()
    wanted_BK = index.search_exact(scorer, encoded, K).item_keys_BK
    whole = (time.process_time() - begun) / users
    held = sum(part.numel() * part.element_size() for part in index.state().values())
    rows = []
    for beam in BEAMS:
        found = index.search(scorer, encoded, K, beam)
        assert found.stats.flops is not None
        begun = time.process_time()
        for user in range(users):
            index.search(scorer, encoded.take(torch.tensor([user])), K, beam)
        rows.append(
            {
                "items": items,
                "nodes": index.num_nodes[0],
                "beam": "x".join(map(str, beam)),
                "recall": recall(found.item_keys_BK, wanted_BK),
                "scored_items": float(found.cost_B.float().mean()),
                "mflops": found.stats.flops / users / 1e6,
                "cpu_ms": 1000 * (time.process_time() - begun) / users,
                "exact_mflops": items * (scorer.flops(None) or 0) / 1e6,
                "exact_cpu_ms": 1000 * whole,
                "bytes_per_item": held / items,
                "build_cpu_s": built,
            }
        )
        print(rows[-1], flush=True)
        if rows[-1]["recall"] >= ENOUGH:
            break
    return rows


def exponent(rows: list[dict[str, Any]], name: str) -> float:
    x = torch.tensor([math.log(row["items"]) for row in rows])
    y = torch.tensor([math.log(row[name]) for row in rows])
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    with torch.enable_grad():
        scorer = scorer_of(args.seed)
    rows = []
    for items in args.items:
        rows += measured(scorer, items, args.seed, 50 if items <= 1_000_000 else 10)
    last = [row for row in rows if row["recall"] >= ENOUGH]
    exponents = {name: exponent(last, name) for name in ("mflops", "cpu_ms")} if len(last) > 1 else {}
    table(rows, list(rows[0]))
    print("exponents", exponents)
    write(
        "sublinear_retrieval",
        {
            "seed": args.seed,
            "k": K,
            "enough": ENOUGH,
            "cpu_seconds": time.process_time() - begun,
            "exponents": exponents,
            "results": rows,
        },
    )


if __name__ == "__main__":
    main()
