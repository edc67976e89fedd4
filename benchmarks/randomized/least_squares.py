"""Least squares at condition 1e2 to 1e10: ours, LAPACK's gelsd, scikit-learn, plain normal equations; and from Parquet.

    python -m benchmarks.randomized.least_squares --conditions 1e2 1e9

A = Z W: rows of Z are normal times Student's t with 3 degrees of freedom, W has singular values 1 to 1 / condition.
b = Z g + noise of the same size, so that every direction of A matters, the weak ones as much as the strong. "excess" is
|b - A x|^2, in extended precision, over the smallest that any of the methods reached, minus one. Nobody fits an
intercept.
Medians of the repeats, one thread, methods one after another in each round. `--parquet` writes A to a folder and solves
from there in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.linalg
from sklearn.linear_model import LinearRegression

from benchmarks.randomized.cpu_seconds import interleaved, merge, table
from fullrank.randomized import lstsq

FROM_PARQUET = """
import json, sys
from benchmarks.randomized.cpu_seconds import seconds
from fullrank.randomized import ParquetSource, lstsq
source = ParquetSource(sys.argv[1], target="y")
result, cpu, wall = seconds(lambda: lstsq(source, method=sys.argv[2], random_state=0))
print(json.dumps({"x": result.x.tolist(), "cpu": cpu, "wall": wall, "passes": result.n_passes}))
"""


def problem(n: int, d: int, condition: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    Z = draws.standard_normal((n, d))
    Z *= draws.standard_t(3, (n, 1))
    left, right = (np.linalg.qr(draws.standard_normal((d, d)))[0] for _ in range(2))
    b = Z @ draws.standard_normal(d)
    noise = draws.standard_normal(n)
    b += np.linalg.norm(b) / np.linalg.norm(noise) * noise
    return Z @ (left * np.logspace(0, -np.log10(condition), d)) @ right, b


def squares(A: np.ndarray, b: np.ndarray, x: np.ndarray | None) -> np.longdouble:
    """|b - A x|^2 in extended precision: rounding A x in double would hide the differences."""
    if x is None:
        return np.longdouble(np.inf)
    total = np.longdouble(0)
    for low in range(0, len(b), 2**14):
        rows = slice(low, low + 2**14)
        total += np.square(b[rows] - A[rows].astype(np.longdouble) @ x.astype(np.longdouble)).sum()
    return total


def normal_equations(A: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    try:
        return scipy.linalg.cho_solve(scipy.linalg.cho_factor(A.T @ A), A.T @ b)
    except np.linalg.LinAlgError:
        return None


def methods(A: np.ndarray, b: np.ndarray) -> dict[str, Callable[[], Any]]:
    return {
        "fullrank auto": lambda: lstsq(A, b, random_state=0).x,
        "fullrank gram": lambda: lstsq(A, b, method="gram", random_state=0).x,
        "fullrank low precision": lambda: lstsq(A, b, precision="low", random_state=0).x,
        "LAPACK gelsd": lambda: scipy.linalg.lstsq(A, b, lapack_driver="gelsd", check_finite=False)[0],
        "scikit-learn": lambda: LinearRegression(fit_intercept=False).fit(A, b).coef_,
        "normal equations": lambda: normal_equations(A, b),
    }


def from_parquet(A: np.ndarray, b: np.ndarray, method: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        for part, rows in enumerate(np.array_split(np.arange(len(b)), 8)):
            columns = {f"x{j}": A[rows, j] for j in range(A.shape[1])} | {"y": b[rows]}
            pq.write_table(
                pa.table(columns), Path(folder) / f"{part}.parquet", 2**16, compression="none", use_dictionary=False
            )
        command = [sys.executable, "-c", FROM_PARQUET, folder, method]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--conditions", type=float, nargs="+", default=[1e2, 1e5, 1e9, 1e10])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parquet", action="store_true", help="also from a Parquet folder, out of core")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=scipy.linalg.LinAlgWarning)
    rows: list[dict[str, Any]] = []
    for condition in args.conditions:
        A, b = problem(args.rows, args.columns, condition, args.seed)
        size = {"n": args.rows, "d": args.columns, "condition": f"{condition:.0e}"}
        measured = interleaved(methods(A, b), args.repeats)
        found: list[tuple[dict[str, Any], np.longdouble]] = []
        gelsd = measured["LAPACK gelsd"][1]
        for name, (x, cpu, wall) in measured.items():
            known = {"cpu_s": cpu, "wall_s": wall, "gelsd_over": gelsd / cpu}
            found.append(({**size, "method": name, **known}, squares(A, b, x)))
        if args.parquet:
            for method in ("auto", "gram"):
                done = from_parquet(A, b, method)
                known = {"cpu_s": done["cpu"], "wall_s": done["wall"], "gelsd_over": gelsd / done["cpu"]}
                known |= {"passes": done["passes"]}
                row = {**size, "method": f"fullrank {method}, Parquet", **known}
                found.append((row, squares(A, b, np.array(done["x"]))))
        best = min(value for _, value in found)
        rows += [{**row, "excess": float(value / best - 1) if np.isfinite(value) else None} for row, value in found]
    shown = [{**row, "excess": None if row["excess"] is None else f"{row['excess']:.1e}"} for row in rows]
    table(shown, ["n", "d", "condition", "method", "cpu_s", "wall_s", "gelsd_over", "excess", "passes"])
    settings = {"repeats": args.repeats, "seed": args.seed}
    merge(
        "least_squares",
        settings,
        rows,
        ["n", "d", "condition", "method"],
        ["numpy", "scipy", "scikit-learn", "pyarrow"],
    )


if __name__ == "__main__":
    main()
