"""Least absolute deviations at condition 1e2 to 1e9: ours, linear programming, iteratively reweighted least squares.

    python -m benchmarks.randomized.l1_regression --sizes 100000x50 --conditions 1e2 1e6 1e9

A = Z W: Z is normal, W has singular values 1 to 1 / condition; b = Z g + Laplace noise of the same size, and one
response of a thousand is replaced by 500 times its noise. No intercept. LP is scikit-learn's HiGHS interior point, run
once, in a process of its own, and stopped after --limit CPU seconds; IRLS is statsmodels' QuantReg; pyfixest's interior
point solver stands alone, without formula and standard errors. `excess` is the objective over the lower bound that our
certificate proves, less one. Medians, one thread, interleaved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import LinAlgError

from benchmarks.randomized.cpu_seconds import interleaved, merge, table
from benchmarks.randomized.quantile_regression import apart, pyfixest_solver, timed
from fullrank.randomized import LADRegressor

PACKAGES = ["numpy", "scipy", "scikit-learn", "statsmodels", "pyfixest"]
COLUMNS = ["rows", "columns", "condition", "side", "cpu_s", "wall_s", "excess", "proved_gap", "times_ours"]


def problem(n: int, d: int, condition: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    Z = draws.standard_normal((n, d))
    left, right = (np.linalg.qr(draws.standard_normal((d, d)))[0] for _ in range(2))
    b = Z @ draws.standard_normal(d)
    noise = draws.laplace(size=n)
    noise *= np.linalg.norm(b) / np.linalg.norm(noise)
    b = np.where(draws.random(n) < 0.001, 500 * noise, b + noise)
    return Z @ (left * np.logspace(0, -np.log10(condition), d)) @ right, b


def ours(A: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, float]:
    model = LADRegressor(fit_intercept=False, random_state=1).fit(A, b)
    return model.coef_, float(model.dual_gap_)


def reweighted(A: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, None]:
    from statsmodels.regression.quantile_regression import QuantReg

    return np.asarray(QuantReg(b, A).fit(q=0.5).params), None


def interior_point(A: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, None] | None:
    try:
        return pyfixest_solver(A, b, 0.5, intercept=False)
    except LinAlgError:
        return None


def program(A: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, None]:
    from sklearn.linear_model import QuantileRegressor

    model = QuantileRegressor(quantile=0.5, alpha=0, fit_intercept=False, solver="highs-ipm").fit(A, b)
    return model.coef_, None


def measure(n: int, d: int, condition: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    A, b = problem(n, d, condition, args.seed)

    def objective(x: np.ndarray) -> float:
        return float(np.abs(b - A @ x).mean())

    sides = {"fullrank": ours, "statsmodels (IRLS)": reweighted, "pyfixest fn, solver alone": interior_point}
    calls: dict[str, Callable[[], Any]] = {
        side: lambda side=side: timed(lambda: sides[side](A, b))[0] for side in sides
    }
    done = interleaved(calls, args.repeats)
    if args.limit:
        done["scikit-learn highs-ipm (LP)"] = apart(lambda: program(A, b), args.limit)
    (coef, gap), ours_s, _ = done["fullrank"]
    bound = objective(coef) * (1 - gap)
    return [
        {
            "rows": n,
            "columns": d,
            "condition": f"{condition:.0e}",
            "side": side,
            "cpu_s": cpu,
            "wall_s": wall,
            "excess": None if value is None else f"{objective(value[0]) / bound - 1:.1e}",
            "proved_gap": None if value is None or value[1] is None else f"{value[1]:.1e}",
            "times_ours": cpu / ours_s,
        }
        for side, (value, cpu, wall) in done.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["100000x20"], help="ROWSxCOLUMNS")
    parser.add_argument("--conditions", nargs="+", type=float, default=[1e2, 1e6, 1e9])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=30, help="CPU seconds of the linear program; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=12)
    args = parser.parse_args()
    for size in args.sizes:
        n, d = (int(part) for part in size.split("x"))
        for condition in args.conditions:
            rows = measure(n, d, condition, args)
            table(rows, COLUMNS)
            print()
            merge("l1_regression", {"seed": args.seed}, rows, ["rows", "columns", "condition", "side"], PACKAGES)


if __name__ == "__main__":
    main()
