"""What "auto" of the quantile regression costs against the best of our exact solvers and HiGHS, on 30 shapes.

    python -m benchmarks.randomized.auto_grid

A shape is dense (normal columns), one-hot (categories by Zipf's law, CSR) or either with an absolute penalty; the
response is linear plus Laplace noise. All of ours take turns, and what is told is the smallest of the rounds, as most
fits take milliseconds; one of more than a second is not repeated, but auto's once. HiGHS is scikit-learn's
`QuantileRegressor(solver="highs")`, once, in a process of its own that is stopped after one and a half times what the
best of ours took and half a second, in whole seconds: it is then slower. `over_best` is auto's time over the smallest
of all. One BLAS thread.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from sklearn.linear_model import QuantileRegressor as Peer

from benchmarks.randomized.cpu_seconds import merge, seconds, table
from benchmarks.randomized.quantile_regression import apart
from fullrank.randomized import QuantileRegressor

COLUMNS = ["kind", "rows", "columns", "alpha", "auto", "auto_s", "interior_point_s", "passes_s", "highs_s", "over_best"]


class Shape(NamedTuple):
    """Rows, columns, and fields of one-hot rows or 0 for dense ones."""

    rows: int
    columns: int
    fields: int = 0
    alpha: float = 0.0


DENSE = [
    (300, 3), (300, 30), (1000, 5), (1000, 50), (3000, 5), (3000, 20), (3000, 100), (10_000, 5), (10_000, 20),
    (10_000, 100), (10_000, 200), (30_000, 10), (30_000, 50), (100_000, 5), (100_000, 20), (100_000, 100),
]  # fmt: skip
ONE_HOT = [
    (2000, 20, 2), (2000, 200, 4), (10_000, 30, 3), (10_000, 400, 3), (10_000, 100, 1), (50_000, 50, 3),
    (50_000, 400, 4), (50_000, 1000, 2), (20_000, 200, 10),
]  # fmt: skip
PENALISED = [(3000, 20, 0), (10_000, 50, 0), (30_000, 20, 0), (10_000, 400, 3), (50_000, 400, 3)]
SHAPES = {
    "dense": [Shape(*each) for each in DENSE],
    "one-hot": [Shape(*each) for each in ONE_HOT],
    "penalised": [Shape(*each, alpha=1e-3) for each in PENALISED],
}


def made(shape: Shape, seed: int) -> tuple[Any, np.ndarray]:
    draws = np.random.default_rng([seed, *shape[:3]])
    n, d = shape.rows, shape.columns
    if shape.fields:
        size = d // shape.fields
        levels = (draws.zipf(1.3, (n, shape.fields)) - 1) % size
        places = (levels + size * np.arange(shape.fields)).astype(np.int32)
        ends = np.arange(0, places.size + 1, shape.fields, dtype=np.int32)
        X: Any = sp.csr_array((np.ones(places.size), places.ravel(), ends), shape=(n, d))
        # The first level of every field is left out, as its columns would sum to the intercept.
        X = sp.csr_array(X[:, np.flatnonzero((np.arange(d) % size > 0) & (np.asarray(X.sum(axis=0)) > 0))])
        X = sp.csr_array((X.data, X.indices.astype(np.int32), X.indptr.astype(np.int32)), shape=X.shape)
    else:
        X = draws.standard_normal((n, d))
    return X, X @ draws.standard_normal(X.shape[1]) + draws.laplace(size=n)


def measure(shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    X, y = made(shape, args.seed)

    def ours(solver: str) -> QuantileRegressor:
        return QuantileRegressor(args.quantile, alpha=shape.alpha, solver=solver, random_state=0).fit(X, y)

    spent: dict[str, list[float]] = {solver: [] for solver in ("auto", "interior_point", "passes")}
    chosen = ours("auto").solver_used_
    for _ in range(args.rounds):
        for solver, times in spent.items():
            if times and times[0] > 1.0 and (solver != "auto" or len(times) > 1):
                continue
            times.append(seconds(lambda solver=solver: ours(solver))[1])
    best = {solver: min(times) for solver, times in spent.items()}
    matrix = sp.csr_matrix(X) if shape.fields else X
    limit = 1.5 * min(best.values()) + 0.5
    peer = Peer(quantile=args.quantile, alpha=shape.alpha, solver="highs")
    done, highs, _ = apart(lambda: bool(peer.fit(matrix, y)), np.ceil(limit))
    others = [best["interior_point"], best["passes"], *([highs] if done else [])]
    return {
        "kind": "one-hot" if shape.fields else "dense",
        "rows": shape.rows,
        "columns": X.shape[1],
        "alpha": shape.alpha,
        "auto": chosen,
        **{f"{solver}_s": value for solver, value in best.items()},
        "highs_s": highs if done else None,
        "over_best": best["auto"] / min(best["auto"], *others),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--quantile", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    settings = {"quantile": args.quantile, "rounds": args.rounds, "seed": args.seed}
    for group in args.only:
        rows = [measure(shape, args) for shape in SHAPES[group]]
        table(rows, COLUMNS)
        over = [row["over_best"] for row in rows]
        print(f"{sum(value <= 1.3 for value in over)} of {len(over)} within 1.3 of the best, worst {max(over):.2f}")
        keys = ["kind", "rows", "columns", "alpha"]
        merge("auto_grid", settings, rows, keys, ["numpy", "scipy", "scikit-learn", "numba"])


if __name__ == "__main__":
    main()
