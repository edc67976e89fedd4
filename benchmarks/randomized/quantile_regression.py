"""Quantile regression: CPU seconds and objective of ours, scikit-learn, statsmodels and pyfixest.

    python -m benchmarks.randomized.quantile_regression --sizes 100000x20 1000000x20
    python -m benchmarks.randomized.quantile_regression --sizes protein --data FOLDER
    python -m benchmarks.randomized.quantile_regression --sizes 100000x20 --sides "scikit-learn highs" --limit 100

A size is ROWSxCOLUMNS, or the name of a table of FOLDER/uci-regression, whose columns are standardised. Otherwise
responses are linear in standard normal columns plus Laplace noise of a fifth of the signal's norm; in one row of a
thousand the response is replaced by 500 times its noise. Every side gets the same arrays, contiguous, and one BLAS
thread. Times are CPU seconds of the whole call, and of pyfixest's solver alone as well: its call also parses a formula
and computes standard errors, as statsmodels' call does. Sides are interleaved; medians. A side that would take longer
than --limit runs in a process of its own, once, and is stopped there. `excess` is the objective over the lower bound
that our certificate proves, less one.

Results of several runs are joined in one file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.randomized.cpu_seconds import merge, seconds, table
from fullrank.randomized import QuantileRegressor

PACKAGES = ["numpy", "scipy", "scikit-learn", "statsmodels", "pyfixest"]
KEYS = ["data", "rows", "columns", "quantile", "side"]
COLUMNS = [*KEYS, "cpu_s", "wall_s", "runs", "excess", "proved_gap", "times_ours"]


def gaussian_with_outliers(n: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """X (n, d - 1) and y; with the intercept the problem has d coefficients."""
    draws = np.random.default_rng(seed)
    X = draws.standard_normal((n, d - 1))
    x = draws.standard_normal(d)
    signal = x[0] + X @ x[1:]
    noise = draws.laplace(size=n)
    noise *= 0.2 * np.linalg.norm(signal) / np.linalg.norm(noise)
    hit = draws.random(n) < 0.001
    return X, np.where(hit, 500 * noise, signal + noise)


def real_table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    frame = pq.read_table(path)
    X = np.column_stack([frame[name].to_numpy() for name in frame.column_names if name.startswith("x")])
    X = X[:, X.std(0) > 0]
    return (X - X.mean(0)) / X.std(0), frame["y"].to_numpy()


def table_of(size: str, args: argparse.Namespace) -> tuple[str, np.ndarray, np.ndarray]:
    """What the table is called, X and y."""
    if not size[0].isdigit():
        if args.data is None:
            raise SystemExit(f'"{size}" is a table of a folder: name that with --data')
        return size, *real_table(args.data / "uci-regression" / f"{size}.parquet")
    n, d = (int(part) for part in size.split("x"))
    return "synthetic", *gaussian_with_outliers(n, d, args.seed)


def ours(X: np.ndarray, y: np.ndarray, t: float, **options: Any) -> tuple[np.ndarray, float | None]:
    model = QuantileRegressor(t, random_state=1, **options).fit(X, y)
    return np.append(model.intercept_, model.coef_), model.dual_gap_


def three(X: np.ndarray, y: np.ndarray, t: float) -> tuple[np.ndarray, float]:
    """Quantile t and those half as far from both ends in one fit; what is returned is of quantile t."""
    model = QuantileRegressor([t / 2, t, (1 + t) / 2], random_state=1).fit(X, y)
    return np.append(model.intercept_[1], model.coef_[1]), float(model.dual_gap_[1])


def highs(X: np.ndarray, y: np.ndarray, t: float, solver: str = "highs") -> tuple[np.ndarray, None]:
    from sklearn.linear_model import QuantileRegressor as Peer

    model = Peer(quantile=t, alpha=0, solver=solver).fit(X, y)
    return np.append(model.intercept_, model.coef_), None


def statsmodels(X: np.ndarray, y: np.ndarray, t: float) -> tuple[np.ndarray, None]:
    from statsmodels.regression.quantile_regression import QuantReg

    return np.asarray(QuantReg(y, np.column_stack([np.ones(len(y)), X])).fit(q=t).params), None


def pyfixest(X: np.ndarray, y: np.ndarray, t: float, method: str) -> tuple[np.ndarray, None]:
    import pandas
    import pyfixest as pf

    names = [f"x{j}" for j in range(X.shape[1])]
    frame = pandas.DataFrame(X, columns=names, copy=False)
    frame["y"] = y
    fit = pf.quantreg("y ~ " + " + ".join(names), frame, quantile=t, method=method, vcov="iid", seed=1)
    return np.asarray(fit.coef()), None


def pyfixest_solver(X: np.ndarray, y: np.ndarray, t: float, intercept: bool = True) -> tuple[np.ndarray, None]:
    from pyfixest.estimation.quantreg.frisch_newton_ip import frisch_newton_solver
    from scipy.linalg import cho_factor, solve_triangular

    A = np.column_stack([np.ones(len(y)), X]) if intercept else X
    chol = cho_factor(A.T @ A, lower=True)[0]
    P = solve_triangular(chol, A.T, lower=True)
    ones = np.ones(len(y))
    options = {"tol": 1e-6, "max_iter": len(y), "backoff": 0.9995, "chol": chol, "P": P}
    return np.asarray(frisch_newton_solver(A=A.T, b=(1 - t) * A.T @ ones, c=-y, u=ones, q=t, **options)[0]), None


SIDES: dict[str, Callable[..., tuple[np.ndarray, float | None]]] = {
    "fullrank": ours,
    "fullrank, three quantiles": three,
    "fullrank interior_point": lambda X, y, t: ours(X, y, t, solver="interior_point"),
    "fullrank sketch spc3": lambda X, y, t: ours(X, y, t, solver="sketch"),
    "fullrank sketch spc1": lambda X, y, t: ours(X, y, t, solver="sketch", conditioning="spc1"),
    "fullrank sketch uniform": lambda X, y, t: ours(X, y, t, solver="sketch", conditioning="uniform"),
    "statsmodels": statsmodels,
    "pyfixest fn": lambda X, y, t: pyfixest(X, y, t, "fn"),
    "pyfixest pfn": lambda X, y, t: pyfixest(X, y, t, "pfn"),
    "pyfixest fn, solver alone": pyfixest_solver,
    "scikit-learn highs": highs,
    "scikit-learn highs-ipm": lambda X, y, t: highs(X, y, t, "highs-ipm"),
}
# CPU seconds for a row and a squared column, roughly: what decides whether a side runs in a process of its own.
HEAVY = {"scikit-learn highs": 1e-6, "scikit-learn highs-ipm": 6e-7}


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Value, CPU seconds and wall seconds of one call, warnings left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return seconds(call)


def apart(call: Callable[[], Any], limit: float) -> tuple[Any, float, float]:
    """As `timed`, in a process that is stopped after `limit` CPU seconds; value None if it was."""

    def child(pipe: Any) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 1))
        pipe.send(timed(call))

    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = context.Process(target=child, args=(send,))
    process.start()
    send.close()
    try:
        result = receive.recv()
    except EOFError:
        result = None
    process.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result or (None, used, time.perf_counter() - wall)


def measure(data: str, X: np.ndarray, y: np.ndarray, t: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    def objective(coef: np.ndarray) -> float:
        r = y - X @ coef[1:] - coef[0]
        return float(np.maximum(t * r, (t - 1) * r).mean())

    runs: dict[str, list[tuple[Any, float, float]]] = {side: [] for side in args.sides}
    for repeat in range(args.repeats):
        for side in args.sides:
            call = lambda side=side: SIDES[side](X, y, t)  # noqa: E731
            if side in HEAVY or side in args.apart:
                if repeat == 0:
                    runs[side].append(apart(call, args.limit))
            elif repeat < args.peer_repeats or side.startswith("fullrank"):
                runs[side].append(timed(call))
    value = runs["fullrank"][0][0]
    bound = objective(value[0]) * (1 - value[1])
    ours_s = statistics.median(run[1] for run in runs["fullrank"])
    rows = []
    for side, measured in runs.items():
        cpu = statistics.median(run[1] for run in measured)
        done = measured[-1][0]
        rows.append(
            {
                "data": data,
                "rows": X.shape[0],
                "columns": X.shape[1] + 1,
                "quantile": t,
                "side": side,
                "cpu_s": cpu,
                "wall_s": statistics.median(run[2] for run in measured),
                "runs": len(measured),
                "stopped": done is None,
                "excess": None if done is None else f"{objective(done[0]) / bound - 1:.1e}",
                "proved_gap": None if done is None or done[1] is None else f"{done[1]:.1e}",
                "times_ours": cpu / ours_s,
                "seed": args.seed,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=["10000x20"], help="ROWSxCOLUMNS, the intercept counted, or a table's name"
    )
    parser.add_argument("--data", type=Path, help="folder that holds uci-regression")
    parser.add_argument("--quantiles", nargs="+", type=float, default=[0.5, 0.95])
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--apart", nargs="*", default=[], help="sides to run once, in a process of their own")
    parser.add_argument("--limit", type=float, default=100, help="CPU seconds of a side that runs apart")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    if "fullrank" not in args.sides:
        args.sides = ["fullrank", *args.sides]
    small = gaussian_with_outliers(5000, 4, 0)
    for side in args.sides:
        if side not in HEAVY:
            timed(lambda side=side: SIDES[side](*small, 0.5))
    for size in args.sizes:
        name, X, y = table_of(size, args)
        for t in args.quantiles:
            rows = measure(name, X, y, t, args)
            table(rows, COLUMNS)
            print()
            merge("quantile_regression", {"seed": args.seed}, rows, KEYS, PACKAGES)


if __name__ == "__main__":
    main()
