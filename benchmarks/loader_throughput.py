"""Rows per second of the loader on Criteo-shaped data: 39 categorical columns and a label, from the page cache.

    python -m benchmarks.loader_throughput [--rows 2000000] [--workers 1]

The ids follow a power law over tables of 10 to 1,000,000 rows, as Criteo's do. Each case is timed over whole epochs:
the first of a fresh loader decodes Parquet, later ones of a split that is held in memory only put batches together.
A plain pyarrow read of the same columns, without batches or shuffling, is the yardstick for decoding.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from benchmarks.machine import table, write
from fullrank.data.dataset import Dataset, write_dataset
from fullrank.data.loader import Loader
from fullrank.schema import Categorical, Label, Schema

COLUMNS = 39
BATCH_SIZE = 4096
CHUNK = 262_144


def criteo_shaped(path: Path, rows: int, seed: int) -> Dataset:
    """A dataset of random ids."""
    sizes = [10 ** (1 + column % 6) for column in range(COLUMNS)]
    schema = Schema(
        features=tuple(
            Categorical(name=f"C{column}", encoding="identity", num_embeddings=size)
            for column, size in enumerate(sizes)
        ),
        labels=(Label(name="label"),),
    )
    random = np.random.default_rng(seed)

    def frames() -> Iterator[pl.DataFrame]:
        for begin in range(0, rows, CHUNK):
            count = min(CHUNK, rows - begin)
            ids = {f"C{c}": (random.zipf(1.2, count) % size).astype(np.int32) for c, size in enumerate(sizes)}
            yield pl.DataFrame({**ids, "label": (random.random(count) < 0.25).astype(np.float32)})

    return write_dataset(path, schema, {"train": frames()}, encoded=True)


def epoch(loader: Loader) -> tuple[float, float]:
    """Wall and CPU seconds of one epoch."""
    wall, cpu, rows = time.perf_counter(), time.process_time(), 0
    for batch in loader:
        rows += len(batch)
    assert rows == loader.rows
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(dataset: Dataset, workers: int, repeats: int) -> list[dict[str, Any]]:
    rows = dataset.rows("train")
    begin = time.perf_counter()
    for shard in dataset.shards("train"):
        pq.read_table(shard, use_threads=False)
    results = [_row("pyarrow read, one thread, no batches", rows, [(time.perf_counter() - begin, None)])]
    begin = time.perf_counter()
    for shard in dataset.shards("train"):
        pq.read_table(shard, use_threads=True)
    results.append(_row("pyarrow read, all threads, no batches", rows, [(time.perf_counter() - begin, None)]))
    cases: list[tuple[str, dict[str, Any], bool]] = [
        ("streamed, shuffled in windows", {"shuffle": True, "memory_limit": 256 << 20}, False),
        ("streamed, stored order", {"shuffle": False, "memory_limit": 1}, False),
        ("held, shuffled as a whole: first epoch", {"shuffle": True, "memory_limit": 4 << 30}, False),
        ("held, shuffled as a whole: later epochs", {"shuffle": True, "memory_limit": 4 << 30}, True),
    ]
    for name, options, later in cases:
        seconds = []
        for _ in range(repeats):
            loader = Loader(dataset, "train", BATCH_SIZE, workers=workers, **options)
            if later:
                epoch(loader)
            seconds.append(epoch(loader))
        results.append(_row(name, rows, seconds))
    return results


def _row(name: str, rows: int, seconds: list[tuple[float, float | None]]) -> dict[str, Any]:
    wall, cpu = sorted(seconds)[len(seconds) // 2]
    return {
        "case": name,
        "rows_per_s": rows / wall,
        "rows_per_cpu_s": None if cpu is None else rows / cpu,
        "ms_per_batch": 1000 * wall * BATCH_SIZE / rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--workers", type=int, default=1, help="threads that put batches together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        dataset = criteo_shaped(Path(scratch) / "criteo", args.rows, args.seed)
        load = os.getloadavg()[0]
        results = measure(dataset, args.workers, args.repeats)
    table(results, ["case", "rows_per_s", "rows_per_cpu_s", "ms_per_batch"])
    settings = {"rows": args.rows, "columns": COLUMNS, "batch_size": BATCH_SIZE, "workers": args.workers}
    write("loader_throughput", {**settings, "seed": args.seed, "load_before": load, "results": results})


if __name__ == "__main__":
    main()
