"""Quantile, logistic and least-squares fits beside the solvers that others take, as they come and tuned, in one run.

    python -m benchmarks.randomized.solver_peers --only logistic least-squares

Every side gets the same arrays and one BLAS thread; sides take turns, round after round, and the medians are of CPU and
wall seconds. `excess` is the objective over the smallest that any side reached (for quantiles over the bound that our
certificate proves), less one: sides that stop early are told by it. A "default" is a call without any setting but the
penalty; a "tuned" one has the tolerance or the iterations that bring it as close as it gets, or the faster algorithm.
A side whose package is not installed is left out, and told. Large tasks leave out sides that would take minutes: HiGHS
is at 20,000 rows only.

Data: for quantiles that of `quantile_regression`; for logistic regression that of `logistic_newton`, with columns of
condition 1e3 or 1; for least squares that of `least_squares`.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import scipy.linalg
from sklearn.linear_model import LinearRegression, LogisticRegression
from threadpoolctl import threadpool_info

from benchmarks.randomized import least_squares, quantile_regression
from benchmarks.randomized.cpu_seconds import interleaved, merge, table
from benchmarks.randomized.logistic_newton import dense
from fullrank.randomized import RandomizedLinearRegression, SubsampledNewtonClassifier

Side = Callable[[], np.ndarray]
COLUMNS = ["task", "side", "call", "cpu_s", "wall_s", "times_ours", "excess"]
PACKAGES = ["numpy", "scipy", "scikit-learn", "statsmodels"]


def with_intercept(model: Any) -> np.ndarray:
    return np.append(model.intercept_, model.coef_)


def quantile(rows: int, columns: int, seed: int) -> tuple[dict[str, Side], Callable[[np.ndarray], float], float]:
    X, y = quantile_regression.gaussian_with_outliers(rows, columns, seed)

    def objective(coef: np.ndarray) -> float:
        return float(np.abs(y - X @ coef[1:] - coef[0]).mean() / 2)

    coef, gap = quantile_regression.ours(X, y, 0.5)
    sides: dict[str, Side] = {"fullrank, default": lambda: quantile_regression.ours(X, y, 0.5)[0]}
    if find_spec("statsmodels"):
        sides["statsmodels, default"] = lambda: quantile_regression.statsmodels(X, y, 0.5)[0]
    if rows <= 20_000:
        sides["scikit-learn highs, default"] = lambda: quantile_regression.highs(X, y, 0.5)[0]
        sides["scikit-learn highs-ipm, tuned"] = lambda: quantile_regression.highs(X, y, 0.5, "highs-ipm")[0]
    return sides, objective, objective(coef) * (1 - float(gap or 0.0))


def logistic(
    rows: int, columns: int, condition: float, seed: int
) -> tuple[dict[str, Side], Callable[[np.ndarray], float], None]:
    X, y, _ = dense(rows, columns, condition, 1.0, seed)

    def objective(coef: np.ndarray) -> float:
        z = X @ coef[1:] + coef[0]
        return float(np.logaddexp(0, z).sum() - y @ z + coef[1:] @ coef[1:] / 2)

    def scikit(**settings: Any) -> Side:
        return lambda: with_intercept(LogisticRegression(**settings).fit(X, y))

    def ours(**settings: Any) -> Side:
        return lambda: with_intercept(SubsampledNewtonClassifier(random_state=0, **settings).fit(X, y))

    sides = {
        "fullrank, default": ours(),
        "fullrank, tuned (tol 1e-10)": ours(tol=1e-10),
        "newton-cholesky, default": scikit(solver="newton-cholesky"),
        "newton-cholesky, tuned (tol 1e-8)": scikit(solver="newton-cholesky", tol=1e-8),
        "lbfgs, default": scikit(),
        "lbfgs, tuned (tol 1e-8, 400 iterations)": scikit(tol=1e-8, max_iter=400),
    }
    return sides, objective, None


def squares(
    rows: int, columns: int, condition: float, seed: int
) -> tuple[dict[str, Side], Callable[[np.ndarray], Any], None]:
    A, b = least_squares.problem(rows, columns, condition, seed)

    def lapack(driver: str) -> Side:
        return lambda: scipy.linalg.lstsq(A, b, lapack_driver=driver, check_finite=False)[0]

    sides: dict[str, Side] = {
        "fullrank, default": lambda: RandomizedLinearRegression(fit_intercept=False, random_state=0).fit(A, b).coef_,
        "plain Cholesky, tuned": lambda: least_squares.normal_equations(A, b),  # type: ignore
        "LAPACK gelsy, tuned": lapack("gelsy"),
        "LAPACK gelsd, default": lapack("gelsd"),
        "scikit-learn, default": lambda: LinearRegression(fit_intercept=False).fit(A, b).coef_,
    }
    return sides, lambda x: least_squares.squares(A, b, x), None


TASKS: dict[str, dict[str, Callable[[int], tuple[dict[str, Side], Callable[[np.ndarray], Any], float | None]]]] = {
    "quantile": {
        "median, 20,000 x 20": lambda seed: quantile(20_000, 20, seed),
        "median, 500,000 x 20": lambda seed: quantile(500_000, 20, seed),
        "median, 500,000 x 50": lambda seed: quantile(500_000, 50, seed),
    },
    "logistic": {
        "logistic, 500,000 x 100, condition 1e3": lambda seed: logistic(500_000, 100, 1e3, seed),
        "logistic, 500,000 x 100, condition 1": lambda seed: logistic(500_000, 100, 1.0, seed),
    },
    "least-squares": {
        "least squares, 1,000,000 x 100, condition 1e2": lambda seed: squares(1_000_000, 100, 1e2, seed),
        "least squares, 1,000,000 x 100, condition 1e9": lambda seed: squares(1_000_000, 100, 1e9, seed),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    kernels = sorted({str(library.get("architecture")) for library in threadpool_info()} - {"None"})
    packages = [package for package in PACKAGES if find_spec(package.replace("scikit-learn", "sklearn"))]
    print("left out, not installed:", *(set(PACKAGES) - set(packages) or ["none"]))
    for name, make in ((name, make) for kind in args.only for name, make in TASKS[kind].items()):
        sides, objective, bound = make(args.seed)
        measured = interleaved(sides, args.rounds)
        values = {side: objective(found[0]) for side, found in measured.items() if found[0] is not None}
        least = min(values.values()) if bound is None else bound
        rows = []
        for side, (_, cpu, wall) in measured.items():
            label, call = side.split(", ", 1)
            row = {"task": name, "side": label, "call": call, "cpu_s": cpu, "wall_s": wall}
            row["times_ours"] = cpu / measured["fullrank, default"][1]
            row["excess"] = f"{max(float(values[side] / least - 1), 0.0):.1e}" if side in values else None
            rows.append(row)
        table(rows, COLUMNS)
        print()
        settings = {"rounds": args.rounds, "seed": args.seed, "blas": kernels}
        merge("solver_peers", settings, rows, ["task", "side", "call"], packages)


if __name__ == "__main__":
    main()
