"""Ridge logistic regression: CPU time to a relative suboptimality, sub-sampled Newton against scikit-learn's solvers.

    python -m benchmarks.randomized.logistic_newton --only tall wide

Every solver minimises sum log-loss + lambda / 2 ||w||^2 and stops after a given number of iterations. For each it is
first found how many reach 1e-6 and 1e-10 of the minimum, which full Newton finds to machine precision; then that call
is timed, all solvers in turn, medians of the rounds. A solver that is not there within the budget of one run gets a
dash and what it reached. One BLAS thread.

The synthetic sets have columns of condition 1e3 (`mixed`: 1e2, and rotated, so that columns are correlated) and rows of
lognormal length; `one-hot` has 20 categories a row by Zipf's law, sparse; `a9a` is the census of the LIBSVM pages with
columns of norm 1, the paper's Adult, read from --data if it is there, and `adult` counts steps of the paper's own
iteration on it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import sklearn
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from benchmarks.machine import RESULTS, table, write
from fullrank.randomized import ArraySource, SubsampledNewtonClassifier
from fullrank.randomized.curvature import Problem
from fullrank.randomized.losses import LOSSES
from fullrank.randomized.newton import subsampled_newton


class Task(NamedTuple):
    X: Any
    y: np.ndarray
    penalty: float


def dense(n: int, d: int, condition: float, penalty: float, seed: int, mixed: bool = False) -> Task:
    rng = np.random.default_rng(seed)
    scale_d = np.logspace(0, -np.log10(condition), d)
    X = rng.standard_normal((n, d)) * scale_d
    w = rng.standard_normal(d) / scale_d / np.sqrt(d)
    if mixed:
        rotation = np.linalg.qr(rng.standard_normal((d, d)))[0]
        X, w = X @ rotation, rotation.T @ w
    X *= rng.lognormal(size=(n, 1))
    return Task(X, (rng.random(n) < 1 / (1 + np.exp(-X @ w))).astype(float), penalty)


def one_hot(n: int, fields: int, penalty: float, seed: int) -> Task:
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(3, 100, fields).astype(int)
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    ids = (np.column_stack([(rng.zipf(1.3, n) - 1) % size for size in sizes]) + offsets).astype(np.int32)
    indptr = np.arange(0, ids.size + 1, fields, dtype=np.int32)
    X = sp.csr_array((np.ones(ids.size), ids.ravel(), indptr), shape=(n, sizes.sum()))
    margin = X @ rng.normal(0, 0.5, sizes.sum()) - 2.0
    return Task(X, (rng.random(n) < 1 / (1 + np.exp(-margin))).astype(float), penalty)


def a9a(folder: Path) -> Task | None:
    path = folder / "a9a" / "a9a.svm.gz"
    if not path.is_file():
        return None
    with gzip.open(path, "rt") as file:
        rows = [line.split() for line in file]
    ids = [[int(pair.split(":")[0]) - 1 for pair in row[1:]] + [123] for row in rows]
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int32)
    flat = np.concatenate(ids).astype(np.int32)
    X = sp.csr_array((np.ones(len(flat)), flat, indptr), shape=(len(rows), 124))
    norms = np.sqrt(X.multiply(X).sum(axis=0))
    X = sp.csr_array(X @ sp.diags_array(1 / np.where(norms > 0, norms, 1)))
    return Task(X, np.array([row[0] == "+1" for row in rows], float), 0.01)


SETS: dict[str, Callable[[Path], Task | None]] = {
    "small": lambda _: dense(100_000, 100, 1e3, 1.0, 0),
    "tall": lambda _: dense(500_000, 100, 1e3, 1.0, 0),
    "wide": lambda _: dense(150_000, 300, 1e3, 1.0, 0),
    "mixed": lambda _: dense(200_000, 150, 1e2, 10.0, 7, mixed=True),
    "one-hot": lambda _: one_hot(200_000, 20, 1.0, 0),
    "a9a": a9a,
}

Solver = Callable[[Task, int], np.ndarray]


def ours(sampling: str, refresh: int = 3) -> Solver:
    def fit(task: Task, iterations: int) -> np.ndarray:
        model = SubsampledNewtonClassifier(
            1 / task.penalty,
            sampling=sampling,
            refresh=refresh,
            max_iter=iterations,
            tol=1e-16,
            fit_intercept=False,
            random_state=0,
        )
        return model.fit(task.X, task.y).coef_.ravel()

    return fit


def scikit(solver: str) -> Solver:
    def fit(task: Task, iterations: int) -> np.ndarray:
        model = LogisticRegression(
            C=1 / task.penalty, solver=solver, tol=1e-14, max_iter=iterations, fit_intercept=False, random_state=0
        )
        # saga and lbfgs want SciPy's older matrix class.
        X = sp.csr_matrix(task.X) if sp.issparse(task.X) else task.X
        return model.fit(X, task.y).coef_.ravel()

    return fit


SOLVERS: dict[str, tuple[Solver, int]] = {  # with the iterations to try first
    "ours, auto": (ours("auto"), 4),
    "ours, leverage": (ours("leverage"), 4),
    "ours, row norm": (ours("row_norm"), 4),
    "ours, uniform": (ours("uniform"), 8),
    "ours, leverage, a draw a step": (ours("leverage", refresh=1), 4),
    "ours, full Newton": (ours("none"), 4),
    "newton-cholesky": (scikit("newton-cholesky"), 5),
    "newton-cg": (scikit("newton-cg"), 6),
    "lbfgs": (scikit("lbfgs"), 100),
    "saga": (scikit("saga"), 10),
}


def objective(task: Task, w: np.ndarray) -> float:
    return float(LOSSES["logistic"].value(task.X @ w, task.y).sum() + task.penalty / 2 * (w @ w))


def iterations_needed(
    fit: Solver, first: int, task: Task, best: float, goal: float, budget: float
) -> tuple[int, float]:
    """Fewest iterations that reach the goal, to a tenth, and the error there; 0 if none within the budget does."""

    def error(iterations: int) -> float:
        return (objective(task, fit(task, iterations)) - best) / best

    low, high, reached = 0, first, np.inf
    while True:
        begin = time.process_time()
        reached = error(high)
        seconds = time.process_time() - begin
        if reached <= goal:
            break
        if 2 * seconds > budget:
            return 0, reached
        low, high = high, 2 * high
    while high - low > max(1, high // 10):
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= goal else (middle, high)
    return high, error(high)


def measure(name: str, task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    problem = Problem(ArraySource(task.X, task.y), LOSSES["logistic"], task.penalty, False)
    w = subsampled_newton(problem, sampling="none", tol=1e-13).coef
    best = objective(task, w)
    rows = []
    for label in args.solvers:
        fit, first = SOLVERS[label]
        for goal in args.goals:
            needed, reached = iterations_needed(fit, first, task, best, goal, args.budget)
            row: dict[str, Any] = {"set": name, "solver": label, "goal": f"{goal:.0e}", "iterations": needed or None}
            rows.append(row | {"reached": f"{reached:.1e}"})
            print(f"  {label}: {goal:.0e} in {needed or '-'} iterations", flush=True)
            first = needed or first
            if not needed:
                break
    for row in rows:
        row["cpu"], row["wall"] = [], []
    for _ in range(args.rounds):
        for row in rows:
            if row["iterations"]:
                wall, cpu = time.perf_counter(), time.process_time()
                SOLVERS[row["solver"]][0](task, row["iterations"])
                row["cpu"].append(time.process_time() - cpu)
                row["wall"].append(time.perf_counter() - wall)
    for row in rows:
        row["cpu_s"] = statistics.median(row.pop("cpu")) if row["cpu"] else row.pop("cpu") or None
        row["wall_s"] = statistics.median(row.pop("wall")) if row["wall"] else row.pop("wall") or None
    for row in rows:
        reference = next(r["cpu_s"] for r in rows if r["goal"] == row["goal"])
        row["times_first"] = row["cpu_s"] / reference if row["cpu_s"] and reference else None
    return rows


def adult(task: Task, seeds: int) -> list[dict[str, Any]]:
    """Steps of the paper's iteration (fresh rows for every step of length 1, start at 0) to 1e-6 in the weights."""
    problem = Problem(ArraySource(task.X.toarray(), task.y), LOSSES["logistic"], task.penalty, False)
    best = subsampled_newton(problem, sampling="none", tol=1e-14).coef
    rows = []
    for sampling, size in (
        ("none", 0),
        ("leverage", 20),
        ("leverage", 50),
        ("row_norm", 20),
        ("uniform", 20),
        ("uniform", 100),
    ):
        steps = []
        for seed in range(seeds if size else 1):
            errors: list[float] = []
            subsampled_newton(
                problem,
                np.zeros(problem.size),
                sampling=sampling,
                sample_size=size * problem.size or None,
                refresh=1,
                memory=0,
                line_search=False,
                max_iter=25,
                tol=1e-16,
                seed=seed,
                callback=lambda w, errors=errors: errors.append(float(np.linalg.norm(w - best) / np.linalg.norm(best))),
            )
            steps.append(next((i for i, error in enumerate(errors) if error <= 1e-6), 99))
        rows.append(
            {
                "set": "adult",
                "solver": f"{sampling}, s = {size} d" if size else "full Newton",
                "seeds": len(steps),
                "there in 25": sum(step <= 25 for step in steps),
                "median steps": statistics.median(steps),
                "most steps": max(steps),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*SETS, "adult"], default=[*SETS, "adult"])
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--goals", nargs="+", type=float, default=[1e-6, 1e-10])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=8.0, help="CPU seconds of one run of a solver")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder that holds a9a/a9a.svm.gz")
    parser.add_argument("--seeds", type=int, default=20, help="of the steps on Adult")
    args = parser.parse_args()
    threadpool_limits(1)
    warnings.simplefilter("ignore")
    results: list[dict[str, Any]] = []
    (RESULTS / "randomized").mkdir(parents=True, exist_ok=True)
    file = RESULTS / "randomized" / "logistic_newton.json"
    if file.is_file():
        results = json.loads(file.read_text())["results"]
    for name in args.only:
        task = SETS["a9a" if name == "adult" else name](args.data)
        if task is None:
            print(f"{name}: not in {args.data}")
            continue
        n, d = task.X.shape
        print(f"{name}: {n:,} x {d}, lambda {task.penalty}")
        rows = adult(task, args.seeds) if name == "adult" else measure(name, task, args)
        table(rows, list(rows[0]))
        results = [row for row in results if row["set"] != name] + rows
        settings = {"rounds": args.rounds, "budget_s": args.budget, "threads": 1, "scikit-learn": sklearn.__version__}
        write(
            "randomized/logistic_newton",
            {"settings": settings, "command": "benchmarks.randomized.logistic_newton", "results": results},
        )


if __name__ == "__main__":
    sys.exit(main())
