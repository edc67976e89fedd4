"""Linear fits of quantiles, means, clicks, classes and values beside others' solvers, as they come and tuned.

    python -m benchmarks.randomized.solver_peers --only logistic least-squares

Every side gets the same arrays and one BLAS thread; sides take turns, round after round, and the medians are of CPU and
wall seconds. `excess` is the objective over the smallest that any side reached (for quantiles over the bound that our
certificate proves), less one: sides that stop early are told by it. A "default" is a call without any setting but the
penalty; a "tuned" one has the tolerance or the iterations that bring it as close as it gets, or the faster algorithm.
A side whose package is not installed is left out, and told. Large tasks leave out sides that would take minutes: HiGHS
is at 20,000 rows only.

Data: for quantiles that of `quantile_regression`; for logistic regression that of `logistic_newton`, with columns of
condition 1e3 or 1; for least squares that of `least_squares`; of `glm`, normal columns, of which a third matter.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import scipy.linalg
from scipy.special import log_softmax
from sklearn.linear_model import GammaRegressor, LinearRegression, LogisticRegression
from threadpoolctl import threadpool_info

from benchmarks.randomized import least_squares, quantile_regression
from benchmarks.randomized.cpu_seconds import interleaved, merge, table
from benchmarks.randomized.logistic_newton import dense
from fullrank.randomized import RandomizedLinearRegression, SubsampledNewtonClassifier, SubsampledNewtonRegressor

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
    sides: dict[str, Side] = {
        "fullrank, default": lambda: quantile_regression.ours(X, y, 0.5)[0],
        "fullrank, three quantiles": lambda: quantile_regression.three(X, y, 0.5)[0],
    }
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


def glm(kind: str, seed: int) -> tuple[dict[str, Side], Callable[[np.ndarray], float], None]:
    """An elastic net on 200,000 x 50, ten classes on 100,000 x 30, and gamma regression on 500,000 x 50."""
    draws = np.random.default_rng(seed)
    n, d, K = {"elastic net": (200_000, 50, 1), "classes": (100_000, 30, 10), "gamma": (500_000, 50, 1)}[kind]
    X = draws.standard_normal((n, d))
    W = draws.standard_normal((d, K)) * (draws.random((d, 1)) < 1 / 3)
    margin = X @ W / np.sqrt(d / 3)
    if kind == "gamma":
        y = draws.gamma(2.0, np.exp(margin[:, 0]) / 2)

        def deviance(coef: np.ndarray) -> float:
            z = X @ coef[1:] + coef[0]
            return float((z + y * np.exp(-z) - 1 - np.log(y)).sum() + coef[1:] @ coef[1:] / 2)

        def peer(**settings: Any) -> Side:
            return lambda: with_intercept(GammaRegressor(alpha=1 / n, **settings).fit(X, y))

        sides = {
            "fullrank, default": lambda: with_intercept(SubsampledNewtonRegressor("gamma", random_state=0).fit(X, y)),
            "lbfgs, default": peer(),
            "newton-cholesky, tuned": peer(solver="newton-cholesky"),
        }
        return sides, deviance, None
    y = (
        (margin + draws.gumbel(size=(n, K))).argmax(axis=1)
        if K > 1
        else draws.random(n) < 1 / (1 + np.exp(-margin[:, 0]))
    )
    settings = {"C": 0.01, "l1_ratio": 0.5} if kind == "elastic net" else {}

    def objective(coef: np.ndarray) -> float:
        b, w = coef[:K], coef[K:].reshape(K, d)
        z = X @ w.T + b
        z = z if K > 1 else np.column_stack([np.zeros(n), z])
        loss = -log_softmax(z, axis=1)[np.arange(n), y.astype(int)].sum()
        ratio = settings.get("l1_ratio", 0.0)
        return float(loss + (ratio * np.abs(w).sum() + (1 - ratio) / 2 * np.square(w).sum()) / settings.get("C", 1.0))

    def scikit(**more: Any) -> Side:
        return lambda: with_intercept(LogisticRegression(**settings, **more).fit(X, y))

    ours = SubsampledNewtonClassifier(**settings, random_state=0)
    sides = {"fullrank, default": lambda: with_intercept(ours.fit(X, y))}
    if kind == "elastic net":
        sides |= {"saga, default": scikit(solver="saga"), "saga, tuned": scikit(solver="saga", tol=1e-8, max_iter=1000)}
    else:
        sides |= {"lbfgs, default": scikit(), "newton-cholesky, tuned": scikit(solver="newton-cholesky")}
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
    "glm": {
        "elastic net, 200,000 x 50": lambda seed: glm("elastic net", seed),
        "ten classes, 100,000 x 30": lambda seed: glm("classes", seed),
        "gamma, 500,000 x 50": lambda seed: glm("gamma", seed),
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
