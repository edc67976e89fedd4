"""Seconds and memory of bootstrap intervals of NE, AUC and calibration against the number of rows.

    python -m benchmarks.resampling_speed

Logits are float32 and normal, clicks are drawn from them; users have ten rows each on average, with equal odds, or each
row is its own cluster. Preparing is the one sort and the sums of each user; resampling is all resamples. Memory is what
is allocated at the peak beside the rows themselves.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from typing import Any

import torch

from benchmarks.machine import table, write
from fullrank.metrics import BinaryRows, bootstrap


def measure(rows: int, by_user: bool, rate: float, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    logits_n = torch.randn(rows, generator=generator) + rate
    labels_n = (torch.rand(rows, generator=generator) < torch.sigmoid(logits_n)).float()
    users_n = torch.randint(rows // 10, (rows,), generator=generator) if by_user else None
    begin = time.perf_counter()
    prepared = BinaryRows(logits_n, labels_n, None, users_n)
    ready = time.perf_counter()
    drawn = bootstrap(prepared, seed=seed)
    done = time.perf_counter()
    tracemalloc.start()
    bootstrap(BinaryRows(logits_n, labels_n, None, users_n), replicates=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    low, high = drawn.interval("auc")
    return {
        "rows": rows,
        "resampled": "users" if by_user else "rows",
        "positives": drawn.estimate["rate"],
        "resamples": len(drawn.resampled["auc"]),
        "prepare_s": ready - begin,
        "resample_s": done - ready,
        "bytes_per_row": peak / rows,
        "auc_width": high - low,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 4_000_000])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = [measure(rows, by_user, -3.0, args.seed) for rows in args.rows for by_user in (True, False)]
    results.append(measure(1_000_000, True, 0.0, args.seed))
    table(results, list(results[0]))
    settings = {"seed": args.seed, "threads": torch.get_num_threads()}
    write("resampling_speed", {"settings": settings, "command": "benchmarks.resampling_speed", "results": results})


if __name__ == "__main__":
    main()
