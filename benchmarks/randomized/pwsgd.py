"""pwSGD against plain SGD and randomised Kaczmarz: error over the minimum after two draws per row.

    python -m benchmarks.randomized.pwsgd

n rows of lognormal length, correlated columns of the given condition. Errors are relative, medians of the seeds. "auto"
is the estimator as it comes; "tuned" is the best first step of a grid of 15 (a factor of 10 from each to the next, the
decay as it comes), chosen by the error itself, which favours it. CPU seconds of one fit with its sketch and passes, one
thread, compiled before.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.machine import RESULTS, table, write
from fullrank.randomized import PreconditionedSGDRegressor, QuantileRegressor

METHODS = {
    "SGD, tuned": ("none", "uniform", True),
    "Kaczmarz, tuned": ("none", "row_norm", True),
    "pwSGD, tuned": ("full", "leverage", True),
    "pwSGD, auto": ("full", "leverage", False),
}


def rows(n: int, d: int, condition: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) * np.logspace(0, -np.log10(condition), d)
    X = X @ np.linalg.qr(rng.standard_normal((d, d)))[0] * rng.lognormal(size=(n, 1))
    return X, np.linalg.qr(X)[0] @ rng.standard_normal(d) * np.sqrt(n) + 0.5 * rng.standard_normal(n)


def errors(settings: dict[str, Any], loss: str, X: np.ndarray, y: np.ndarray, best: float, seeds: int) -> list[float]:
    found = []
    for seed in range(seeds):
        model = PreconditionedSGDRegressor(loss, fit_intercept=False, random_state=seed, **settings).fit(X, y)
        with np.errstate(over="ignore", invalid="ignore"):
            residual = X @ model.coef_ - y
            value = residual @ residual if loss == "squared" else np.abs(residual).sum()
        found.append(float(np.nan_to_num(value / best - 1, nan=np.inf)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--columns", type=int, default=20)
    parser.add_argument("--conditions", nargs="+", type=float, default=[10.0, 1e3, 1e6])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=11, help="of the table")
    args = parser.parse_args()
    threadpool_limits(1)
    results = []
    for condition in args.conditions:
        X, y = rows(args.rows, args.columns, condition, args.seed)
        median = QuantileRegressor(0.5, fit_intercept=False).fit(X, y).coef_
        residual = y - X @ np.linalg.lstsq(X, y, rcond=None)[0]
        for loss, best in (("squared", residual @ residual), ("absolute", np.abs(y - X @ median).sum())):
            PreconditionedSGDRegressor(loss).fit(X[:100], y[:100])  # compiles
            for label, (preconditioner, sampling, tuned) in METHODS.items():
                settings: dict[str, Any] = {"preconditioner": preconditioner, "sampling": sampling}
                if tuned:
                    # From far below to far above every stable step, in any coordinates.
                    unit = 1.0 if preconditioner == "full" else 1 / np.square(X).sum()
                    unit = unit if loss == "squared" else np.sqrt(unit) / args.rows
                    grid = [unit * 10.0**power for power in range(-7, 8)]
                    settings["eta0"] = min(
                        grid, key=lambda eta: errors(settings | {"eta0": eta}, loss, X, y, best, 1)[0]
                    )
                begin = time.process_time()
                error = statistics.median(errors(settings, loss, X, y, best, args.seeds))
                seconds = (time.process_time() - begin) / args.seeds
                results.append(
                    {
                        "condition": f"{condition:.0e}",
                        "loss": loss,
                        "method": label,
                        "error": f"{error:.1e}",
                        "cpu_s": seconds,
                    }
                )
    table(results, list(results[0]))
    (RESULTS / "randomized").mkdir(parents=True, exist_ok=True)
    settings = vars(args) | {"threads": 1}
    write("randomized/pwsgd", {"settings": settings, "command": "benchmarks.randomized.pwsgd", "results": results})


if __name__ == "__main__":
    sys.exit(main())
