"""Whether a certificate is ever wrong, and how often an exact solver cannot give one: random problems against HiGHS.

    python -m benchmarks.randomized.quantile_certificates --problems 1000

Problem i has 60 to 400 rows and 1 to 8 columns of one of five kinds (normal; rows times Cauchy variables; one-hot
columns down to two rows; integers, with ties and repeated rows; Student's t responses rounded to one digit), weights
in every other problem, penalties in every fifth, and a quantile in (0.02, 0.98). It is solved by both exact solvers,
and by an interior point method stopped after one to six steps. A certificate is wrong where HiGHS finds an objective
below the lower bound by more than 1e-9 of it.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linprog

from benchmarks.randomized.cpu_seconds import merge, seconds, table
from fullrank.randomized import QuantileRegressor

KINDS = ("normal", "heavy rows", "rare features", "integers", "rounded responses")


def problem(number: int, seed: int) -> tuple[str, np.ndarray, np.ndarray, np.ndarray, float, float]:
    draws = np.random.default_rng([seed, number])
    kind = KINDS[number % len(KINDS)]
    n, d = int(draws.integers(60, 400)), int(draws.integers(1, 9))
    X = draws.standard_normal((n, d))
    y = X @ draws.standard_normal(d) + draws.standard_t(2, n)
    if kind == "heavy rows":
        scale = draws.standard_cauchy(n)
        X, y = X * scale[:, None], y * scale
    if kind == "rare features":
        sizes = np.minimum(np.maximum(2, n // 3 ** np.arange(1, d + 1)), n)
        X = np.zeros((n, d))
        for j, size in enumerate(sizes):
            X[draws.choice(n, size, replace=False), j] = 1
        y = X @ draws.standard_normal(d) + draws.laplace(size=n)
    if kind == "integers":
        X, y = np.round(X), np.round(y)
    if kind == "rounded responses":
        y = np.round(y, 1)
    weight = draws.uniform(0, 3, n) * (draws.random(n) < 0.9) if number % 2 else np.ones(n)
    alpha = 0.05 if number % 5 == 4 else 0.0
    return kind, X, y, weight, float(draws.uniform(0.02, 0.98)), alpha


def optimum(X: np.ndarray, y: np.ndarray, weight: np.ndarray, t: float, alpha: float) -> float:
    """Of the weighted mean loss plus alpha |w|_1."""
    n, d = X.shape
    w = weight / weight.sum()
    ones = np.ones((n, 1))
    rows = sp.hstack([ones, -ones, X, -X, sp.eye_array(n), -sp.eye_array(n)])
    costs = np.r_[0, 0, np.full(2 * d, alpha), t * w, (1 - t) * w]
    return float(linprog(costs, A_eq=rows, b_eq=y, method="highs").fun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=13)
    args = parser.parse_args()
    settings = {"interior_point": {}, "passes": {}, "stopped early": {}}
    rows = {
        (kind, solver): {
            "kind": kind,
            "solver": solver,
            "problems": 0,
            "wrong": 0,
            "unproved": 0,
            "largest_excess": 0.0,
        }
        for kind in KINDS
        for solver in settings
    }

    def run() -> None:
        for number in range(args.problems):
            kind, X, y, weight, t, alpha = problem(number, args.seed)
            best = optimum(X, y, weight, t, alpha)
            for solver in settings:
                options = {"solver": "interior_point", "max_iter": 1 + number % 6} if solver == "stopped early" else {}
                model = QuantileRegressor(t, alpha=alpha, random_state=number, **{"solver": solver, **options})
                model.fit(X, y, weight)
                row = rows[kind, solver]
                row["problems"] += 1
                row["wrong"] += int(model.objective_ * (1 - model.dual_gap_) > best * (1 + 1e-9) + 1e-14)
                row["unproved"] += int(model.dual_gap_ > 1e-8)
                row["largest_excess"] = max(row["largest_excess"], float(model.objective_ / best - 1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds(run)
    result = list(rows.values())
    table(result, ["kind", "solver", "problems", "wrong", "unproved", "largest_excess"])
    packages = ["numpy", "scipy", "scikit-learn"]
    merge("quantile_certificates", {"seed": args.seed}, result, ["kind", "solver"], packages)


if __name__ == "__main__":
    main()
