"""Default logistic fits at click rates from 1e-1 to 1e-5, dense and sparse: how far each seed is from the optimum.

    python -m benchmarks.randomized.rare_events

Five columns, of which one tells of clicks; sparse rows have half of them zero. Tables of a million rows at rate 1e-5
have about ten clicks. `excess` is the objective over that of full Newton stopped at rounding, less one; `worst` is the
largest of the seeds. `steps` and CPU seconds are medians.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.exceptions import ConvergenceWarning

from benchmarks.randomized.cpu_seconds import merge, seconds, table
from fullrank.randomized import SubsampledNewtonClassifier

RATES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
COLUMNS = ["rate", "table", "rows", "seeds", "worst", "within_1e_8", "warned", "steps", "cpu_s"]


def made(rate: float, sparse: bool, n: int, seed: int) -> tuple[Any, np.ndarray]:
    draws = np.random.default_rng([seed, int(1 / rate), sparse])
    X: Any = draws.standard_normal((n, 5))
    if sparse:
        X *= draws.random((n, 5)) < 0.5
    y = (draws.random(n) < 1 / (1 + np.exp(-(X[:, 0] + np.log(rate) - 0.5)))).astype(float)
    y[0] = 1.0
    return sp.csr_array(X) if sparse else X, y


def objective(model: SubsampledNewtonClassifier, X: Any, y: np.ndarray) -> np.longdouble:
    w = model.coef_[0]
    z = (X @ w + model.intercept_[0]).astype(np.longdouble)
    return np.logaddexp(0, z).sum() - (y * z).sum() + np.longdouble(w @ w) / 2


def measure(rate: float, sparse: bool, seeds: int) -> dict[str, Any]:
    n = 1_000_000 if rate < 1e-4 else 200_000
    excess, steps, cpu, warned = [], [], [], 0
    for seed in range(seeds):
        X, y = made(rate, sparse, n, seed)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", ConvergenceWarning)
            model, used, _ = seconds(
                lambda X=X, y=y, seed=seed: SubsampledNewtonClassifier(random_state=seed).fit(X, y)
            )
        warned += bool(told)
        best = SubsampledNewtonClassifier(sampling="none", tol=1e-13).fit(X, y)
        least = objective(best, X, y)
        excess.append(float(objective(model, X, y) / least - 1))
        steps.append(model.n_iter_)
        cpu.append(used)
    return {
        "rate": rate,
        "table": "sparse" if sparse else "dense",
        "rows": n,
        "seeds": seeds,
        "worst": f"{max(max(excess), 0.0):.1e}",
        "within_1e_8": sum(value <= 1e-8 for value in excess),
        "warned": warned,
        "steps": statistics.median(steps),
        "cpu_s": statistics.median(cpu),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [measure(rate, sparse, args.seeds) for rate in RATES for sparse in (False, True)]
    table(rows, COLUMNS)
    merge("rare_events", {"seeds": args.seeds}, rows, ["rate", "table"], ["numpy", "scipy", "scikit-learn"])


if __name__ == "__main__":
    main()
