"""Samples for quantile regression on rare features: error of the coefficients and of the objective by sample size.

    python -m benchmarks.randomized.quantile_sampling --rows 200000 --trials 25

Rows are unit vectors: column j is the feature of a block of rows, and blocks shrink geometrically to 161 rows. Laplace
noise of a fifth of the signal, one response of a thousand replaced by 500 times its noise. Each trial draws a new
sample for each conditioning; errors are relative to the exact solution: of the objective, of the coefficients in l2,
and of the worst coefficient. `failed` counts samples that lost a column; the medians leave those trials out.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import numpy as np
from scipy.optimize import brentq

from benchmarks.randomized.cpu_seconds import merge, seconds, table
from fullrank.randomized import QuantileRegressor
from fullrank.randomized.conditioning import RankDeficientError

COLUMNS = ["quantile", "size", "conditioning", "failed", "objective_error", "l2_error", "worst_error", "cpu_s"]


def skewed(n: int, d: int, seed: int, smallest: int = 161) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    ratio = brentq(lambda q: smallest * (1 - q**d) / (1 - q) - n, 1.0001, 10)
    sizes = (smallest * ratio ** np.arange(d)).astype(int)
    sizes[-1] += n - sizes.sum()
    column = draws.permutation(np.repeat(np.arange(d), sizes))
    A = np.zeros((n, d))
    A[np.arange(n), column] = 1
    x = draws.standard_normal(d)
    signal, noise = x[column], draws.laplace(size=n)
    noise *= 0.2 * np.linalg.norm(signal) / np.linalg.norm(noise)
    return A, np.where(draws.random(n) < 0.001, 500 * noise, signal + noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--columns", type=int, default=20)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000, 5000])
    parser.add_argument("--quantiles", nargs="+", type=float, default=[0.5, 0.95])
    parser.add_argument("--conditionings", nargs="+", default=["uniform", "none", "spc1", "spc3"])
    parser.add_argument("--trials", type=int, default=15)
    parser.add_argument("--seed", type=int, default=14)
    args = parser.parse_args()
    A, y = skewed(args.rows, args.columns, args.seed)
    exact = QuantileRegressor(args.quantiles, fit_intercept=False, random_state=0).fit(A, y)
    results: list[dict[str, Any]] = []
    for size in args.sizes:
        for kind in args.conditionings:
            failed, spent, errors = 0, [], []
            for trial in range(args.trials):
                model = QuantileRegressor(
                    args.quantiles,
                    fit_intercept=False,
                    solver="sketch",
                    conditioning=kind,
                    sketch_size=size,
                    rank_policy="raise",
                    random_state=trial,
                )
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        _, cpu, _ = seconds(lambda model=model: model.fit(A, y))
                    except RankDeficientError:
                        failed += 1
                        continue
                spent.append(cpu)
                away = model.coef_ - exact.coef_
                errors.append(
                    [
                        model.objective_ / exact.objective_ - 1,
                        np.linalg.norm(away, axis=1) / np.linalg.norm(exact.coef_, axis=1),
                        np.abs(away).max(axis=1) / np.abs(exact.coef_).max(axis=1),
                    ]
                )
            middle = np.median(errors, axis=0) if errors else np.full((3, len(args.quantiles)), np.nan)
            for k, t in enumerate(args.quantiles):
                row = {"rows": args.rows, "columns": args.columns, "quantile": t, "size": size, "conditioning": kind}
                row |= {"trials": args.trials, "failed": failed, "cpu_s": float(np.median(spent)) if spent else None}
                names = ("objective_error", "l2_error", "worst_error")
                row |= {name: float(middle[i, k]) if errors else None for i, name in enumerate(names)}
                results.append(row)
    table(results, COLUMNS)
    keys = ["rows", "columns", "quantile", "size", "conditioning"]
    merge("quantile_sampling", {"seed": args.seed}, results, keys, ["numpy", "scipy", "scikit-learn"])


if __name__ == "__main__":
    main()
