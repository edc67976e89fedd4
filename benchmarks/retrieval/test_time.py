"""What training on the nodes of recent items is worth when tastes move: against none, random nodes and the raw items.

    python -m benchmarks.retrieval.test_time

An HSNN learns the world of `benchmarks.retrieval.teacher`. Then all tastes turn by one rotation of 45 degrees in half
of the planes, while the features of users stay as they were: the drift of a season that features do not know. Each of
2,000 users has 20 interactions since, 15 before the cut and 5 after it. What is before the cut is learnt from, in as
many steps and with as many rows by each entry:

`nodes`: `TestTimeTrainer`, nodes with at least a tenth of the user's items; `nodes_unguarded`: the same without the
guard; `random_nodes`: nodes drawn in place of the positive ones; `raw_items`: the interactions themselves against
items drawn, with the item tower, tables and codewords frozen as well. All are judged by the five later items of 500
of the users: NE against as many items drawn (lower is better; what is learnt from has one positive in five, which
moves the logits of all entries but `none`), recall@100 by a beam of a tenth of the nodes, and by scoring all.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import table, write
from benchmarks.retrieval.index_quality import BATCH, ITEMS, NODES, STEPS, trained, with_tails
from benchmarks.retrieval.teacher import KINDS, SHARPNESS, SHOWN, WIDTH, World
from fullrank.retrieval import Items
from fullrank.retrieval.hierarchy.hsnn import HSNN
from fullrank.retrieval.hierarchy.test_time import BATCH as PAIRS
from fullrank.retrieval.hierarchy.test_time import Events, Pairs, TestTimeTrainer

USERS, JUDGED, EVENTS, BEFORE, K = 2000, 500, 20, 15, 100
ANGLE = math.pi / 4
LR_SCALE = 0.1


def turned(tastes_UHD: Tensor) -> Tensor:
    """Tastes after the drift: the first half of the planes (0, 1), (2, 3), .. turned."""
    half = WIDTH // 2
    cosine, sine = math.cos(ANGLE), math.sin(ANGLE)
    even, odd = tastes_UHD[..., 0:half:2], tastes_UHD[..., 1:half:2]
    found = tastes_UHD.clone()
    found[..., 0:half:2], found[..., 1:half:2] = cosine * even - sine * odd, sine * even + cosine * odd
    return found


def chosen(world: World, tastes_UHD: Tensor, each: int) -> Tensor:
    """Items that users choose of those shown, (U, each)."""
    found = []
    for _ in range(each):
        shown = torch.randint(0, ITEMS, (len(tastes_UHD), SHOWN), generator=world.generator)
        taste_USD = tastes_UHD.gather(1, world.kind_V[shown][:, :, None].expand(-1, -1, WIDTH))
        affinity = (taste_USD * world.items_VD[shown]).sum(2)
        found.append(torch.multinomial(torch.softmax(SHARPNESS * affinity, 1), 1, generator=world.generator))
        found[-1] = shown.gather(1, found[-1])
    return torch.cat(found, 1)


@torch.no_grad()
def judged(retriever: HSNN, users: Any, later_UE: Tensor, other_UE: Tensor) -> dict[str, float]:
    assert retriever.hierarchy is not None
    some = torch.arange(JUDGED)
    encoded, later_UE, other_UE = retriever.network.encode_users(users.take(some)), later_UE[:JUDGED], other_UE[:JUDGED]
    scorer = retriever.scorer
    beam = retriever.hierarchy.search(scorer, encoded, K, (NODES,), max_items=ITEMS // 10)
    everything = retriever.hierarchy.search_exact(scorer, encoded, ITEMS)
    scores_UV = torch.empty(JUDGED, ITEMS).scatter_(1, everything.item_keys_BK, everything.scores_BK)
    logits = torch.cat([scores_UV.gather(1, later_UE), scores_UV.gather(1, other_UE)], 1)
    labels = torch.cat([torch.ones(later_UE.shape), torch.zeros(other_UE.shape)], 1)

    def hit(found_BK: Tensor) -> float:
        return float((later_UE[:, :, None] == found_BK[:, None]).any(2).float().mean())

    ne = float(F.binary_cross_entropy_with_logits(logits, labels)) / math.log(2)
    return {"ne": ne, "recall_beam": hit(beam.item_keys_BK), "recall_exact": hit(everything.item_keys_BK[:, :K])}


def raw_items(retriever: HSNN, stored_IS: Tensor, users: Any, before: Tensor, pairs: int, seed: int) -> None:
    """As many rows as there are pairs: a fifth are interactions, the others items that were drawn."""
    network = retriever.network
    generator = torch.Generator().manual_seed(seed)
    names = ("node_networks", "item_network.user_tower", "item_network.over_arch")
    parameters = [p for name, p in network.named_parameters() if name.startswith(names)]
    optimizer = torch.optim.Adam(parameters, lr=LR_SCALE * retriever.config.training.learning_rate)
    codes_IN = retriever.codes(stored_IS)
    for begin in range(0, pairs, PAIRS):
        rows = min(PAIRS, pairs - begin)
        user = torch.randint(0, len(before), (rows,), generator=generator)
        own = before[user, torch.randint(0, before.shape[1], (rows,), generator=generator)]
        drawn = torch.randint(0, ITEMS, (rows,), generator=generator)
        label = (torch.arange(rows) % 5 == 0).float()
        item = torch.where(label == 1, own, drawn)
        encoded = network.encode_users(users.take(user))
        nodes = [network.node_logits(0, encoded, retriever.nodes.node_vectors(codes_IN[item])[:, None])]
        nodes.append(network.stored_logits(encoded, stored_IS[item][:, None]))
        loss = torch.zeros(())
        for level in range(2):
            logit = network.ensemble(level, nodes[: level + 1])[:, 0, 0]
            loss = loss + F.binary_cross_entropy_with_logits(logit, label)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


def entries(seed: int) -> list[dict[str, Any]]:
    world = World.of(ITEMS, seed)
    retriever, trainer = trained(world.log(BATCH * STEPS // 3), seed, "joint", ensemble=True)
    with_tails(retriever, trainer)
    retriever.index(Items(torch.arange(ITEMS), world.features()))
    stored_IS = retriever.network.stored(world.features())
    tastes = world.users(USERS)
    users, moved = world.user_features(tastes), turned(tastes)
    items_UE = chosen(world, moved, EVENTS)
    other_UE = torch.randint(0, ITEMS, (USERS, EVENTS - BEFORE), generator=world.generator)
    later_UE = items_UE[:, BEFORE:]
    time_UE = torch.arange(EVENTS).expand(USERS, -1)
    user_UE = torch.arange(USERS)[:, None].expand(-1, EVENTS)
    events = Events(user_UE.flatten(), items_UE.flatten(), time_UE.flatten())
    start = copy.deepcopy(retriever.network.state_dict())
    rows: list[dict[str, Any]] = []

    def add(entry: str, **more: Any) -> None:
        rows.append({"seed": seed, "entry": entry, **more, **judged(retriever, users, later_UE, other_UE)})
        print(rows[-1], flush=True)
        retriever.network.load_state_dict(start)

    still = judged(retriever, users, chosen(world, tastes, EVENTS - BEFORE), other_UE)
    rows.append({"seed": seed, "entry": "before_drift", "pairs": 0, "kept": True, **still})
    add("none", pairs=0, kept=True)
    options: dict[str, Any] = {"interest_rate": (0.1,), "lr_scale": LR_SCALE, "seed": seed}
    trainer = TestTimeTrainer(retriever, **options)
    learn, judge = trainer.build_pairs(users, events, BEFORE)
    report = trainer.adapt((learn, judge))
    add("nodes", pairs=report.pairs, kept=report.kept)
    free = TestTimeTrainer(retriever, **options, guard=False)
    every, nothing = free.build_pairs(users, events, BEFORE)
    report = free.adapt((every, nothing))
    add("nodes_unguarded", pairs=report.pairs, kept=report.kept)
    drawn = torch.randint(0, NODES, every.codes_PN.shape, generator=world.generator)
    random_PN = torch.where(every.label_P[:, None] == 1, drawn, every.codes_PN)
    report = free.adapt((Pairs(every.users, every.level_P, every.user_P, random_PN, every.label_P), nothing))
    add("random_nodes", pairs=report.pairs, kept=report.kept)
    raw_items(retriever, stored_IS, users, items_UE[:, :BEFORE], len(every), seed)
    add("raw_items", pairs=len(every), kept=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    rows = [row for seed in args.seeds for row in entries(seed)]
    names = list(dict.fromkeys(row["entry"] for row in rows))
    numbers = ("pairs", "ne", "recall_beam", "recall_exact")
    results = []
    for name in names:
        own = [row for row in rows if row["entry"] == name]
        means = {number: sum(row[number] for row in own) / len(own) for number in numbers}
        results.append({"entry": name, **means, "kept": sum(row["kept"] for row in own)})
    table(results, list(results[0]))
    write(
        "test_time_training",
        {
            "seeds": args.seeds,
            "users": USERS,
            "judged": JUDGED,
            "events": EVENTS,
            "kinds": KINDS,
            "cpu_seconds": time.process_time() - begun,
            "results": results,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
