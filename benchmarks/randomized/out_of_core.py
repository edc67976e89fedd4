"""A Parquet table larger than memory: rows per second of a fit, as a share of what reading and decoding alone reaches.

    python -m benchmarks.randomized.out_of_core generate --folder DIR            # 1e8 rows x 20, about 17 GB
    python -m benchmarks.randomized.out_of_core measure --folder DIR

The table: 20 correlated float64 features of condition about 1e6, one target; row groups of 2^18 rows, plain encoding,
no compression, so that decoding is as fast as it can be. `measure` runs each job in a process of its own and reports
its peak memory (`ru_maxrss`), CPU and wall seconds: reading with PyArrow alone, what the source yields, and the fits.
One BLAS thread; PyArrow decodes with the threads it has by default, and CPU seconds count them all.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.randomized.cpu_seconds import merge, seconds, table
from fullrank.randomized import ParquetSource, QuantileRegressor, RandomizedLinearRegression, sketch

FILE_ROWS, GROUP_ROWS = 1_000_000, 2**18


def generate(folder: Path, rows: int, columns: int, seed: int) -> None:
    """Files that exist already are left alone, so an interrupted run can go on."""
    folder.mkdir(parents=True, exist_ok=True)
    fixed = np.random.default_rng(seed)
    left, right = (np.linalg.qr(fixed.standard_normal((columns, columns)))[0] for _ in range(2))
    mix, truth = (left * np.logspace(0, -6, columns)) @ right, fixed.standard_normal(columns)
    for part in range(rows // FILE_ROWS):
        path = folder / f"{part:04d}.parquet"
        if path.exists():
            continue
        draws = np.random.Generator(np.random.SFC64([seed, part]))
        Z = draws.standard_normal((FILE_ROWS, columns))
        X = (Z @ mix).T
        y = Z @ truth + draws.standard_normal(FILE_ROWS)
        made = pa.table({f"x{j}": X[j] for j in range(columns)} | {"y": y})
        partial = path.with_suffix(".partial")
        pq.write_table(made, partial, GROUP_ROWS, compression="none", use_dictionary=False, write_statistics=False)
        partial.rename(path)


def decode(folder: Path) -> None:
    """What a reader with PyArrow alone costs: every value decoded, nothing done with it."""
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for _ in file.iter_batches(2**15):
                pass


def read(folder: Path) -> None:
    """Blocks of the source: decoded, checked, as one matrix."""
    source = ParquetSource(folder, target="y")
    for fragment in range(source.n_fragments):
        for _ in source.iter_blocks(fragment):
            pass


def fit(folder: Path, method: str) -> dict[str, Any]:
    fitted = RandomizedLinearRegression(method=method, random_state=0).fit(ParquetSource(folder, target="y"))
    return {"passes": fitted.n_passes_, "chosen": fitted.method_, "residual": float(fitted.residual_norm_)}


def fit_quantile(folder: Path) -> dict[str, Any]:
    fitted = QuantileRegressor(0.9, random_state=0).fit(ParquetSource(folder, target="y"))
    return {"passes": fitted.n_passes_, "chosen": fitted.solver_used_, "proved_gap": fitted.dual_gap_}


JOBS: dict[str, Callable[[Path], Any]] = {
    "PyArrow alone": decode,
    "blocks of the source": read,
    "sketch": lambda folder: sketch(ParquetSource(folder, target="y"), 400, random_state=0) is None,
    "fit, auto": lambda folder: fit(folder, "auto"),
    "fit, gram": lambda folder: fit(folder, "gram"),
    "fit, quantile 0.9": fit_quantile,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("generate", "measure", "job"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--columns", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.action == "generate":
        generate(args.folder, args.rows, args.columns, args.seed)
        return
    if args.action == "job":
        known, cpu, wall = seconds(lambda: JOBS[args.only[0]](args.folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            json.dumps({"cpu_s": cpu, "wall_s": wall, "peak_gib": peak, **(known if isinstance(known, dict) else {})})
        )
        return
    source = ParquetSource(args.folder, target="y")
    size = {"n": source.n_rows, "d": source.n_cols}
    size["gb"] = round(sum(path.stat().st_size for path in source.paths) / 1e9, 1)
    rows = []
    for name in args.only:
        command = [
            sys.executable,
            "-m",
            "benchmarks.randomized.out_of_core",
            "job",
            "--folder",
            str(args.folder),
            "--only",
            name,
        ]
        done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        passes = done.get("passes", 1)
        rate = {"million_rows_per_s": source.n_rows * passes / done["wall_s"] / 1e6}
        rate["million_rows_per_cpu_s"] = source.n_rows * passes / done["cpu_s"] / 1e6
        rows.append({**size, "job": name, **done, "passes": passes, **rate})
    for row in rows:
        if rows[0]["job"] == "PyArrow alone":
            row["share_of_decoding"] = row["million_rows_per_s"] / rows[0]["million_rows_per_s"]
            row["share_of_decoding_cpu"] = row["million_rows_per_cpu_s"] / rows[0]["million_rows_per_cpu_s"]
    columns = ["n", "d", "gb", "job", "passes", "cpu_s", "wall_s", "peak_gib", "million_rows_per_s"]
    table(rows, [*columns, "share_of_decoding", "share_of_decoding_cpu"])
    merge("out_of_core", {"seed": args.seed}, rows, ["n", "d", "job"], ["numpy", "scipy", "pyarrow"])


if __name__ == "__main__":
    main()
