"""What a learnt index finds of what its network would find by scoring everything, against indexes made apart.

    python -m benchmarks.retrieval.index_quality

The world of `benchmarks.retrieval.teacher`: 20,000 items, 128 nodes, 1,200 steps of 1,024 rows for every entry, a
seed of its own for world, networks and order. Recall@100 of 300 new users is against brute force with the same
scorer, at a share of the items that may be scored.

Modes: `joint`, `em` and `separate` as in `LearningToIndex`, the last two with k-means begun again from the last nodes
every 50 steps, so that `separate` is as fresh as an index made apart can be. `separate_once` is k-means once, when
the index begins, as an index that is built offline. Items are scored by their own network alone (`linear_ensemble:
false`): with the ensemble the reference leans on the scores of nodes itself, and recall is higher for that.

Every entry is measured twice: after those steps, in which nodes learn the losses of items (`bce`), and after 300 more,
in which they learn their best members (`both`). Of `em` also without its parts, one at a time: `own network`, nodes
scored by their network alone and not by the items' too; `unweighted`, all nodes alike in those 300 steps.

The frontier is of one network's item scores (`em`, `both`): its own index (`hsnn`); k-means of its item vectors
probed by its item network (`ivf`); a balanced binary tree whose node vectors learn to tell the positives under them
from other nodes of their level (`tdm`); and two towers of the same rows, searched by an IVF of their vectors, whose
first M are scored (`two_tower`). FLOPs are those of all scores, of nodes too.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import table, write
from benchmarks.retrieval.teacher import KINDS, WIDTH, World, schema
from fullrank.retrieval import Items
from fullrank.retrieval.hierarchy import DotProduct, HierarchicalIndex, IVFIndex, Scorer
from fullrank.retrieval.hierarchy import training as hierarchical_training
from fullrank.retrieval.hierarchy.hsnn import HSNN, MoNNRetriever
from fullrank.retrieval.hierarchy.learning_to_index import LearningToIndex
from fullrank.retrieval.hierarchy.losses import tail_loss
from fullrank.retrieval.hierarchy.monn import MoNN
from fullrank.retrieval.hierarchy.network import Users
from fullrank.retrieval.hierarchy.training import HierarchicalTrainer, Training, TrainingData
from fullrank.retrieval.hierarchy.tree import balanced_leaves

ITEMS, NODES, USERS, K = 20_000, 128, 300, 100
STEPS, BATCH = 1200, 1024
BUDGETS = (0.02, 0.05, 0.1, 0.2)
ITEM_NETWORK = MoNN.Config(user_vectors=8, vector_dim=16, hidden=(64,), over_arch_hidden=(32, 16))
NODE_NETWORK = MoNN.Config(user_vectors=16, vector_dim=16, hidden=(128,), over_arch_hidden=(64, 32))
LEVELS = 7  # of the binary tree, which has as many leaves as there are nodes


def training(seed: int, **more: Any) -> Training:
    return Training(
        softmax=0.0,
        impressions=1.0,
        batch_size=BATCH,
        epochs=3,
        learning_rate=0.005,
        seed=seed,
        **more,
    )


def trained(
    data: TrainingData, seed: int, mode: str, *, ensemble: bool = False, alone: bool = False
) -> tuple[HSNN, HierarchicalTrainer]:
    """After the steps in which items learn.

    Args:
        ensemble: items are scored by all levels.
        alone: nodes are scored by their own network only.
    """
    once = mode == "separate_once"
    config = HSNN.Config(
        items=ITEM_NETWORK,
        nodes=(NODE_NETWORK,),
        tree=LearningToIndex.Config(num_nodes=(NODES,)),
        exact_below=0,
        linear_ensemble=ensemble,
        training=training(seed, mode="separate" if once else mode, node_objective="bce"),
    )
    retriever = HSNN(schema(), config)
    network = retriever.network
    if alone:

        def node_logits(level: int, users: Users, nodes: Tensor) -> Tensor:
            return network.networks()[level].score_grid(users.vectors[level], nodes)

        network.node_logits = node_logits  # type: ignore[method-assign]
        network._flops[0] = network.networks()[0].flops_per_pair()
    trainer = HierarchicalTrainer(network, data, schema(), config.training)
    if once:
        found = retriever.nodes.fit

        def first_alone(items: Tensor, *, seed: int | None = None, iterations: int = 10) -> None:
            if seed is not None:
                found(items, seed=seed)

        retriever.nodes.fit = first_alone  # type: ignore[method-assign]
    trainer.fit()
    retriever.trained()
    return retriever, trainer


def with_tails(retriever: HSNN, trainer: HierarchicalTrainer, loss: Callable[..., Tensor] = tail_loss) -> None:
    """The further steps, in which nodes learn their best members."""
    with patch.object(hierarchical_training, "tail_loss", loss):
        trainer.learn_tails()
    retriever.trained()


def recall(found_BK: Tensor, wanted_BK: Tensor) -> float:
    return float((wanted_BK[:, :, None] == found_BK[:, None]).any(2).float().mean())


def at_budgets(
    index: HierarchicalIndex, scorer: Scorer, users: Any, wanted_BK: Tensor, beam: Sequence[int]
) -> list[dict[str, Any]]:
    """Recall and cost at each budget of items."""
    rows = []
    for budget in BUDGETS:
        found = index.search(scorer, users, K, beam, max_items=int(budget * ITEMS))
        assert found.stats.flops is not None
        rows.append(
            {
                "budget": budget,
                "recall": recall(found.item_keys_BK, wanted_BK),
                "scored": float(found.cost_B.float().mean()) / ITEMS,
                "mflops": found.stats.flops / USERS / 1e6,
            }
        )
    return rows


def searched(retriever: HSNN, world: World, tastes: Tensor) -> list[dict[str, Any]]:
    """Recall at each budget against brute force with the same scorer, and of that against the teacher."""
    retriever.index(Items(torch.arange(ITEMS), world.features()))
    assert retriever.hierarchy is not None
    users = retriever.network.encode_users(world.user_features(tastes))
    wanted_BK = retriever.hierarchy.search_exact(retriever.scorer, users, K).item_keys_BK
    teacher = recall(wanted_BK, world.affinity(tastes).topk(K).indices)
    codes_IN = retriever.codes(retriever.network.stored(world.features()))
    occupancy = retriever.nodes.occupancy(codes_IN)[0]
    rows = at_budgets(retriever.hierarchy, retriever.scorer, users, wanted_BK, (NODES,))
    return [{**row, "teacher": teacher, "effective_nodes": occupancy["effective"]} for row in rows]


def measured(
    mode: str, objective: str, seed: int, retriever: HSNN, world: World, tastes: Tensor
) -> list[dict[str, Any]]:
    """Rows of one entry and seed, one for each budget."""
    named = {"mode": mode, "objective": objective, "seed": seed}
    rows = [{**named, **row} for row in searched(retriever, world, tastes)]
    print(rows[1], flush=True)
    return rows


class TreeScorer(Scorer):
    """TDM: a network of the size of the items' on a learnt vector for each node, and at the leaves' items theirs."""

    def __init__(self, items: Scorer, users: Users, network: MoNN, inputs: Tensor) -> None:
        self.items, self.users, self.network = items, users, network
        self.vectors = network.encode_users(inputs)
        self.pairs = network.flops_per_pair()

    def node_scores(self, level: int, users: Tensor, nodes_MV: Tensor) -> Tensor:
        return self.network.score_grid(self.vectors[users], nodes_MV)[..., 0]

    def item_scores(self, users: Tensor, vectors_ID: Tensor) -> Tensor:
        return self.items.item_scores(self.users.take(users), vectors_ID)

    def flops(self, level: int | None) -> int | None:
        return self.items.flops(None) if level is None else self.pairs


def tdm(retriever: HSNN, data: TrainingData, world: World, seed: int) -> tuple[HierarchicalIndex, MoNN]:
    """A balanced tree of item vectors; nodes learn from the positives under them against others of their level."""
    stored_IS = retriever.network.stored(world.features())
    leaf_I = balanced_leaves(stored_IS, LEVELS, seed)
    torch.manual_seed(seed)
    books = [torch.nn.Parameter(0.3 * torch.randn(2 ** (level + 1), ITEM_NETWORK.item_dim)) for level in range(LEVELS)]
    for level, book in enumerate(books):  # from the means of their items
        node_I = leaf_I >> (LEVELS - 1 - level)
        count_M = torch.bincount(node_I, minlength=len(book)).clamp_min(1)
        book.data = torch.zeros_like(book).index_add_(0, node_I, stored_IS) / count_M[:, None]
    network = MoNN(data.rows.batch.numeric_BN.shape[1], None, config=ITEM_NETWORK)
    positive_P = (data.rows.batch.labels_BT[:, 0] == 1).nonzero().squeeze(1)
    optimizer = torch.optim.Adam([*network.parameters(), *books], lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        rows = positive_P[torch.randint(0, len(positive_P), (BATCH // 4,), generator=generator)]
        inputs = data.rows.batch.numeric_BN[rows].clone()
        inputs[:, KINDS * WIDTH :] = 0  # a user's columns alone
        users = network.encode_users(inputs)
        loss = torch.zeros(())
        for level, book in enumerate(books):
            own = leaf_I[data.item_P[rows]] >> (LEVELS - 1 - level)
            other = torch.randint(0, len(book), (len(rows), min(8, len(book) - 1)), generator=generator)
            nodes = torch.cat([own[:, None], other], 1)
            logits = network.score_grid(users, book[nodes])[..., 0]
            label = (nodes == own[:, None]).float()
            loss = loss + F.binary_cross_entropy_with_logits(logits, label)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    codes_IN = torch.stack([(leaf_I >> (LEVELS - 1 - level)) & 1 for level in range(LEVELS)], 1)
    index = HierarchicalIndex((2,) * LEVELS, [book.detach() for book in books], stored_IS.shape[1])
    index.add(torch.arange(ITEMS), stored_IS, codes_IN)
    return index, network.eval()


def two_towers(data: TrainingData, seed: int) -> MoNNRetriever:
    """A dot product of one vector each, trained on the same rows."""
    sizes = MoNN.Config(user_vectors=1, vector_dim=32, hidden=(128, 64), over_arch="dot")
    config = MoNNRetriever.Config(items=sizes, training=training(seed))
    retriever = MoNNRetriever(schema(), config)
    HierarchicalTrainer(retriever.network, data, schema(), config.training).fit()
    retriever.trained()
    return retriever


def frontier(retriever: HSNN, data: TrainingData, world: World, tastes: Tensor, seed: int) -> list[dict[str, Any]]:
    """Recall against FLOPs of four ways to the same item scores."""
    keys, features, user_rows = torch.arange(ITEMS), world.features(), world.user_features(tastes)
    tree, network = tdm(retriever, data, world, seed)
    towers = two_towers(data, seed)
    with torch.no_grad():
        retriever.index(Items(keys, features))
        assert retriever.hierarchy is not None
        users, scorer = retriever.network.encode_users(user_rows), retriever.scorer
        wanted_BK = retriever.hierarchy.search_exact(scorer, users, K).item_keys_BK
        rows = [{"way": "hsnn", **row} for row in at_budgets(retriever.hierarchy, scorer, users, wanted_BK, (NODES,))]
        stored_IS = retriever.network.stored(features)
        ivf = IVFIndex.build(keys, stored_IS, NODES, seed=seed).index
        own = _ItemsOnly(scorer)
        rows += [{"way": "ivf", **row} for row in at_budgets(ivf, own, users, wanted_BK, (NODES,))]
        nodes = TreeScorer(scorer, users, network, user_rows.numeric_BN)
        beam = [2 ** min(level + 1, LEVELS) for level in range(LEVELS)]
        for budget in BUDGETS:
            leaves = max(1, int(budget * NODES))
            widths = [min(wide, 2 * leaves) for wide in beam[:-1]] + [leaves]
            found = tree.search(nodes, torch.arange(USERS), K, widths)
            assert found.stats.flops is not None
            rows.append(
                {
                    "way": "tdm",
                    "budget": budget,
                    "recall": recall(found.item_keys_BK, wanted_BK),
                    "scored": float(found.cost_B.float().mean()) / ITEMS,
                    "mflops": found.stats.flops / USERS / 1e6,
                }
            )
        vectors_IE, queries_BE = (
            towers.network.stored(features),
            towers.network.encode_users(user_rows).vectors[-1][:, 0],
        )
        first = IVFIndex.build(keys, vectors_IE, NODES, seed=seed)
        each = scorer.flops(None)
        assert each is not None
        scores_BV = torch.cat(
            [scorer.item_scores(users.take(some), stored_IS) for some in torch.arange(USERS).split(50)]
        )
        for budget in BUDGETS:
            size = int(budget * ITEMS)
            found = first.index.search(DotProduct(vectors_IE.shape[1]), queries_BE, size, (NODES // 2,))
            assert found.stats.flops is not None
            again = scores_BV.gather(1, found.item_keys_BK).topk(K, dim=1).indices
            rows.append(
                {
                    "way": "two_tower",
                    "budget": budget,
                    "recall": recall(found.item_keys_BK.gather(1, again), wanted_BK),
                    "scored": budget,
                    "mflops": (found.stats.flops / USERS + each * size) / 1e6,
                }
            )
    return rows


class _ItemsOnly(Scorer):
    """Centres of item vectors scored as if they were items."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def node_scores(self, level: int, users: Users, nodes_MV: Tensor) -> Tensor:
        return self.scorer.item_scores(users, nodes_MV)

    def item_scores(self, users: Users, vectors_ID: Tensor) -> Tensor:
        return self.scorer.item_scores(users, vectors_ID)

    def take(self, users: Users, rows_U: Tensor) -> Users:
        return users.take(rows_U)

    def count(self, users: Users) -> int:
        return self.scorer.count(users)

    def flops(self, level: int | None) -> int | None:
        return self.scorer.flops(None)


def mean(rows: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of one entry and budget as one, with the mean of each number and the recall of each seed."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    found = []
    for key, group in groups.items():
        numbers = [name for name in group[0] if name not in (*names, "seed")]
        means = {name: sum(row[name] for row in group) / len(group) for name in numbers}
        found.append({**dict(zip(names, key, strict=True)), **means, "by_seed": [row["recall"] for row in group]})
    return found


def of_seed(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], float]:
    """Rows of all entries, rows of the frontier, and CPU seconds."""
    torch.set_num_threads(1)
    begun = time.process_time()
    world = World.of(ITEMS, seed)
    data = world.log(BATCH * STEPS // 3)
    tastes = world.users(USERS)
    quality: list[dict[str, Any]] = []
    ways: list[dict[str, Any]] = []
    for mode in ("em", "joint", "separate", "separate_once"):
        retriever, trainer = trained(data, seed, mode)
        quality += measured(mode, "bce", seed, retriever, world, tastes)
        if mode == "em":
            before = copy.deepcopy(retriever.network.state_dict())
            with_tails(retriever, trainer, F.smooth_l1_loss)
            quality += measured("em, unweighted", "both", seed, retriever, world, tastes)
            retriever.network.load_state_dict(before)
        with_tails(retriever, trainer)
        quality += measured(mode, "both", seed, retriever, world, tastes)
        if mode == "em":
            ways = [{"seed": seed, **row} for row in frontier(retriever, data, world, tastes, seed)]
            print(*ways[1::4], sep="\n", flush=True)
    retriever, trainer = trained(data, seed, "em", alone=True)
    quality += measured("em, own network", "bce", seed, retriever, world, tastes)
    with_tails(retriever, trainer)
    quality += measured("em, own network", "both", seed, retriever, world, tastes)
    return quality, ways, time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once, a process each")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(of_seed, args.seeds))
    quality = [row for rows, _, _ in found for row in rows]
    ways = [row for _, rows, _ in found for row in rows]
    results, curve = mean(quality, ("mode", "objective", "budget")), mean(ways, ("way", "budget"))
    table(results, [name for name in results[0] if name != "by_seed"])
    table(curve, [name for name in curve[0] if name != "by_seed"])
    write(
        "index_quality",
        {
            "seeds": args.seeds,
            "items": ITEMS,
            "nodes": NODES,
            "steps": STEPS,
            "k": K,
            "cpu_seconds": sum(seconds for _, _, seconds in found),
            "brute_force_mflops": ITEMS * MoNN(1, 1, config=ITEM_NETWORK).flops_per_pair() / 1e6,
            "quality": results,
            "frontier": curve,
        },
    )


if __name__ == "__main__":
    main()
