"""LoopFM and distillation on a real log with times: MovieLens' latest-small, by recipes/movielens-latest-transfer.yaml.

    python -m benchmarks.tables --data DIR_WITH_movielens-latest-small --out tables --tables movielens_latest
    python -m benchmarks.transfer.real_log
    python -m benchmarks.transfer.real_log --rates

With --rates: the students without a history, one as it is and one that is given the user's rate and count as well.

The teacher knows the user's id, rate and count and the film's genres, beside film, year, the film's rate and the raw
history; students have the latter three and what an arm says. 21 years in windows of 90 days, each predicted before it
is learnt in one pass; those after the first 48 count. Three seeds of the weights; the log is the same, so the intervals
are of users, of the first seed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import table, write
from benchmarks.transfer.loopfm import one
from fullrank.training.recipe import parse_recipe, read_values
from fullrank.training.run import open_dataset

RECIPE = Path("recipes/movielens-latest-transfer.yaml")


def summed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds."""
    summary = []
    for name in found[0]["models"]:
        rows = [row["models"][name] for row in found]
        ratios = [row.get("transfer_ratio") for row in rows]
        summary.append(
            {
                "model": name,
                "ne": statistics.mean(row["ne"][0] for row in rows),
                "auc": statistics.mean(row["auc"][0] for row in rows),
                "ne_minus_vm": statistics.mean(row.get("ne_minus_baseline", [0.0])[0] for row in rows),
                "worst_minus_vm": max(row.get("ne_minus_baseline", [0.0])[0] for row in rows),
                "transfer_ratio": statistics.mean(ratio[0] for ratio in ratios) if all(ratios) else None,
            }
        )
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", action="store_true", help="what the user's rate and count themselves are worth")
    asked = parser.parse_args()
    seeds, name = asked.seeds, "transfer_movielens_rates" if asked.rates else "transfer_movielens"
    began, values = time.process_time(), read_values(RECIPE)
    if asked.rates:
        rates = ["user_rate", "user_count"]
        transfer = values["transfer"]
        transfer["private"] = [feature for feature in transfer["private"] if feature not in rates]
        transfer["students"] = {"vm": {"without": ["history", *rates]}, "vm with rates": {"without": ["history"]}}
        transfer["gain"] = None
    data = open_dataset(parse_recipe(values).data).path
    found: list[dict[str, Any]] = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as scratch:
            report, scored = one(values, data, Path(scratch) / "out", seed)
        part = report["labels"]["label"]
        models = {
            model: {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}
            for model, row in part["models"].items()
        }
        terms = part["gain"] or {}
        gain = {term: {unit: list(value) for unit, value in row.items()} for term, row in terms.items()}
        found.append(
            {"seed": seed, "rows": part["rows"], "models": models, "gain": gain, "inferences": scored["inferences"]}
        )
        # After each seed, so that a run that is cut short has what it came to.
        summary = summed(found)
        table(summary, list(summary[0]))
        write(name, {"seeds": found, "summary": summary, "cpu_seconds": time.process_time() - began})
    print({term: row["ne"] for term, row in found[0]["gain"].items()})


if __name__ == "__main__":
    main()
