"""What a funnel's list is worth for the FLOPs of a request: tuned candidate counts against counts in fixed proportion.

    python -m benchmarks.funnel.cascade

A simulated log of 200,000 impressions with 3,000 ads, a seed of its own for world, log and weights. Counts are tuned
on the validation part by `fullrank.funnel.tuning`, once for all budgets, and judged on 200 requests of the test part
that nothing was chosen by. `fixed` hands on 5 items from retrieval for each that the early stage does, the proportion
of the defaults (1,000 and 200), as many as the budget allows. `share` is the value of the list's best 10 by the final
stage, of what it would find among all active ads; `true_value` that of the four slots by the world, of which the best
possible list has `best`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import table, write
from fullrank.data.simulate import simulate_dataset
from fullrank.funnel import train_funnel
from fullrank.funnel.cascade import total
from fullrank.funnel.cost import flops_of
from fullrank.funnel.demonstration import demo_config
from fullrank.funnel.outcomes import Setting, draw, outcomes, point_of
from fullrank.funnel.true_value import world_of
from fullrank.funnel.tuning import tune

IMPRESSIONS, ITEMS, REQUESTS = 200_000, 3_000, 200
BUDGETS = (4e6, 6e6, 1e7, 2e7, 4e7, 8e7)
DEFAULT: Setting = (1000, 200)


def measured(seed: int, directory: Path) -> list[dict[str, Any]]:
    """Rows of a seed."""
    dataset = simulate_dataset(directory / f"data-{seed}", IMPRESSIONS, seed, items=ITEMS)
    world = world_of(dataset)
    funnel, _ = train_funnel(dataset, demo_config(dataset.rows("train"), seed))
    front = tune(funnel, dataset, flops=1e12, requests=REQUESTS, seed=seed, world=world)["front"]
    asked = draw(dataset, "test", REQUESTS, seed, world)
    catalogue, lines = funnel.items.active_I.numel(), flops_of(funnel, asked.users[:1])

    def cost(setting: Setting) -> float:
        return total(lines, setting, catalogue)

    proportional = [(5 * keep, keep) for keep in range(10, catalogue)]
    chosen: dict[tuple[str, float], Setting] = {("default", cost(DEFAULT)): DEFAULT}
    for budget in BUDGETS:
        within = [tuple(point["sizes"]) for point in front if point["flops"] <= budget]
        fixed = [setting for setting in proportional if cost(setting) <= budget]
        for by, found in (("tuned", within), ("fixed", fixed)):
            if found:
                chosen[by, budget] = found[-1]
    judged = outcomes(funnel, asked, list(dict.fromkeys(chosen.values())))
    assert judged.true_best_R is not None
    best = float(judged.true_best_R.mean())
    return [
        {
            "seed": seed,
            "by": by,
            "budget": budget,
            "retrieve": setting[0],
            "keep": setting[1],
            **{
                key: value
                for key, value in point_of(judged, setting, {"flops": cost(setting)}).items()
                if key != "sizes"
            },
            "best": best,
            "active": catalogue,
        }
        for (by, budget), setting in chosen.items()
    ]


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds, and of tuned less fixed also the difference of each seed."""
    result = []
    for by, budget in dict.fromkeys((row["by"], row["budget"] if row["by"] != "default" else 0.0) for row in rows):
        mine = [row for row in rows if row["by"] == by and (by == "default" or row["budget"] == budget)]
        row = {"by": by, "budget": budget or float(np.mean([one["budget"] for one in mine])), "seeds": len(mine)}
        row |= {
            name: float(np.mean([one[name] for one in mine])) for name in ("flops", "share", "recall", "true_value")
        }
        rivals = {one["seed"]: one for one in rows if one["by"] == "fixed" and one["budget"] == budget}
        if by == "tuned" and rivals:
            row["gains"] = [one["share"] - rivals[one["seed"]]["share"] for one in mine if one["seed"] in rivals]
        result.append(row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    begin = time.process_time()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(arguments.seeds):
            rows += measured(seed, Path(directory))
            print(f"seed {seed}: {time.process_time() - begin:.0f} CPU seconds", flush=True)
    found = means(rows)
    table(found, ["by", "budget", "seeds", "flops", "share", "recall", "true_value"])
    settings = {"impressions": IMPRESSIONS, "items": ITEMS, "requests": REQUESTS, "seeds": arguments.seeds}
    seconds = round(time.process_time() - begin)
    write("funnel_cascade", {"settings": settings, "cpu_seconds": seconds, "means": found, "rows": rows})


if __name__ == "__main__":
    main()
