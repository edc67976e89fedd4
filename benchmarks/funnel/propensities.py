"""Whether the propensities that a funnel logs are those that items are drawn with.

Requests of users with long histories are filled again and again, and the frequencies of the pairs in the two uppermost
slots are held against the products of their logged propensities by Pearson's chi-square, summed over requests; pairs
that are expected fewer than five times are one cell.

    python -m benchmarks.funnel.propensities
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.funnel.off_policy import trained, variant
from benchmarks.machine import table, write
from fullrank.data.simulate import DAY, START, Histories, Requests, World
from fullrank.funnel import Funnel
from fullrank.funnel.rollout import FunnelPolicy, begin_of, histories_before

POLICIES = (
    {"name": "softmax", "temperature": 0.2},
    {"name": "epsilon", "epsilon": 0.2},
    {"name": "thompson", "pseudo_counts": 100},
)


def chi_square(
    funnel: Funnel, world: World, histories: Histories, user: int, draws: int, random: np.random.Generator
) -> tuple[float, int]:
    """Statistic and degrees of freedom of the lists of one user's request."""
    users = np.full(draws, user)
    when = np.full(draws, START + int(begin_of(world) * DAY), np.int64)
    requests = Requests(users, when, np.zeros(draws, np.int64), *histories.read(users))
    shown = FunnelPolicy(funnel, world, 2)(requests, random)
    assert shown.propensity is not None
    pairs = [*map(tuple, shown.items.tolist())]
    seen, expected = Counter(pairs), dict(zip(pairs, shown.propensity.prod(1) * draws, strict=True))
    likely = [pair for pair, count in expected.items() if count >= 5]
    observed, wanted = [np.array([count[pair] for pair in likely]) for count in (seen, expected)]
    observed, wanted = np.append(observed, draws - observed.sum()), np.append(wanted, draws - wanted.sum())
    there = wanted > 1e-6 * draws
    return float((((observed - wanted) ** 2)[there] / wanted[there]).sum()), int(there.sum()) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--draws", type=int, default=10_000, help="of each request")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        funnel, log = trained(Path(directory))
        world = World.load(log.path / "world.npz")
        histories = histories_before(log, world)
        users = np.argsort(-histories.counts, kind="stable")[: args.requests]
        for policy in POLICIES:
            random = np.random.default_rng(args.seed)
            explorer = variant(funnel, policy)
            found = [chi_square(explorer, world, histories, int(user), args.draws, random) for user in users]
            statistic, degrees = (sum(part) for part in zip(*found, strict=True))
            p_value = float(stats.chi2.sf(statistic, degrees))
            name = " ".join(map(str, policy.values()))
            rows.append({"policy": name, "chi_square": statistic, "degrees": degrees, "p_value": p_value})
            print(rows[-1], flush=True)
    table(rows, ["policy", "chi_square", "degrees", "p_value"])
    write("propensities", {"settings": {**vars(args), "threads": 1}, "policies": rows})


if __name__ == "__main__":
    main()
