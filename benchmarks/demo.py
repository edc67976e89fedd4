"""`fullrank demo` as a user runs it: seconds, how near the final stage comes to the oracle, and recall.

    python -m benchmarks.demo [--seeds 0 1 2] [--impressions 1000000] [--keep]

Each seed is one run of the command in a process of its own, and before it one run of `fullrank data simulate` for the
speed of the simulator alone. `gap_closed` is the share of the way from predicting the mean (NE 1) to the NE of the true
probabilities. With --keep, runs of other seeds stay in the result, so that a long measurement can be cut into parts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine, table, write

MOST_DEMO_SECONDS, MOST_SIMULATION_SECONDS, LEAST_GAP = 180.0, 20.0, 0.6


def command(*arguments: str) -> tuple[dict[str, Any], float, float]:
    """What one command prints with --json, its wall seconds from start to end of the process, and its CPU seconds."""
    program = [sys.executable, "-c", "from fullrank.cli.main import main; main()", *arguments, "--json"]
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    printed = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True).stdout
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return json.loads(printed), wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(seed: int, impressions: int) -> dict[str, Any]:
    options = ["--impressions", str(impressions), "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as scratch:
        simulated, simulate_wall, simulate_cpu = command("data", "simulate", f"{scratch}/world", *options)
        demo, wall, cpu = command("demo", "--out", f"{scratch}/demo", *options)
        report = json.loads((Path(scratch) / "demo" / "metrics.json").read_text())
    final = demo["final"]
    return {
        "seed": seed,
        "seconds": wall,
        "cpu_seconds": cpu,
        "simulate_seconds": simulated["seconds"],
        "simulate_process_seconds": simulate_wall,
        "simulate_cpu_seconds": simulate_cpu,
        "ne": final["ne"],
        "oracle_ne": final["oracle_ne"],
        "gap_closed": (1 - final["ne"]) / (1 - final["oracle_ne"]),
        "auc": final["auc"],
        "oracle_auc": next(iter(report["stages"]["final"].values()))["oracle_auc"],
        "recall_at_100": demo["retrieval"]["recall_at_100"],
        "popularity_at_100": report["recall"]["popularity_at_100"],
        "share_of_best_value": report["true_value"]["share_of_best"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--impressions", type=int, default=1_000_000)
    parser.add_argument("--keep", action="store_true", help="keep the runs of other seeds in the result")
    args = parser.parse_args()
    runs: dict[int, dict[str, Any]] = {}
    path = RESULTS / "demo.json"
    if args.keep and path.exists():
        earlier = json.loads(path.read_text())
        here = machine()
        if earlier["impressions"] != args.impressions or any(earlier["machine"][key] != here[key] for key in here):
            raise SystemExit("the earlier runs are of another day, machine, version or size: run without --keep")
        runs = {run["seed"]: run for run in earlier["runs"]}
    load = os.getloadavg()[0]
    for seed in args.seeds:
        runs[seed] = {**measure(seed, args.impressions), "load_before": load}
    results = [runs[seed] for seed in sorted(runs)]
    columns = ["seed", "seconds", "simulate_seconds", "ne", "oracle_ne", "gap_closed", "auc", "oracle_auc"]
    table(results, [*columns, "recall_at_100", "popularity_at_100", "share_of_best_value"])
    goals = {
        "most_seconds": MOST_DEMO_SECONDS,
        "most_simulate_seconds": MOST_SIMULATION_SECONDS,
        "least_gap_closed": LEAST_GAP,
        "met": all(
            run["seconds"] < MOST_DEMO_SECONDS
            and run["simulate_seconds"] <= MOST_SIMULATION_SECONDS
            and run["gap_closed"] >= LEAST_GAP
            for run in results
        ),
    }
    write("demo", {"impressions": args.impressions, "goals": goals, "runs": results})


if __name__ == "__main__":
    main()
