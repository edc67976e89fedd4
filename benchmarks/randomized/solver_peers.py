"""Linear fits of quantiles, means, clicks, classes and values beside others' solvers, as they come and tuned.

    python -m benchmarks.randomized.solver_peers --only logistic least-squares
    python -m benchmarks.randomized.solver_peers --only quantile --tasks 500,000 --peers-python VENV/bin/python

Every side gets the same arrays and one BLAS thread; sides take turns, round after round, and the medians are of CPU and
wall seconds; a side that takes more than --once CPU seconds has one run. `excess` is the objective over the smallest
that any side reached (for quantiles over the bound that our certificate proves), less one: sides that stop early are
told by it. A "default" is a call without any setting but the penalty; a "tuned" one has the tolerance or the iterations
that bring it as close as it gets, or the faster algorithm. A side whose package is not installed is left out, and told.
Large tasks leave out sides that would take minutes: HiGHS is at 20,000 rows only.

glum, skglm, pyfixest and statsmodels run in a process of an environment of their own (`linear_peers.py` says how it is
made), take their turns with the others, and say the CPU seconds of their fit; objectives are computed here.
`blas` is the kernels that OpenBLAS chose, or was told to by OPENBLAS_CORETYPE, which both processes see.

Data: for quantiles that of `quantile_regression`; for logistic regression that of `logistic_newton`, with columns of
condition 1e3 or 1; for least squares that of `least_squares`; of the others, normal columns, of which a third matter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from scipy.special import log_softmax, xlogy
from sklearn.linear_model import GammaRegressor, LinearRegression, LogisticRegression, PoissonRegressor
from threadpoolctl import threadpool_info

from benchmarks.randomized import least_squares, quantile_regression
from benchmarks.randomized.cpu_seconds import Elsewhere, interleaved, merge, table
from benchmarks.randomized.logistic_newton import dense
from fullrank.randomized import RandomizedLinearRegression, SubsampledNewtonClassifier, SubsampledNewtonRegressor

Side = Callable[[], np.ndarray | Elsewhere]
PEER = Path(__file__).parent.parent / "peers" / "linear_peers.py"
COLUMNS = ["task", "side", "call", "cpu_s", "wall_s", "times_ours", "excess"]
PACKAGES = ["numpy", "scipy", "scikit-learn", "statsmodels"]


class Task(NamedTuple):
    """Sides that fit X (n, d) and y (n,), and what they minimise; `bound` is below its minimum where that is proved.

    `problem` is what `linear_peers.py` is told; None where its packages have nothing for it.
    """

    X: np.ndarray
    y: np.ndarray
    sides: dict[str, Side]
    objective: Callable[[np.ndarray], Any]
    bound: float | None = None
    problem: dict[str, Any] | None = None


def with_intercept(model: Any) -> np.ndarray:
    return np.append(model.intercept_, model.coef_)


def quantile(rows: int, columns: int, seed: int) -> Task:
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
    return Task(X, y, sides, objective, objective(coef) * (1 - float(gap or 0.0)), {"quantile": 0.5})


def logistic(rows: int, columns: int, condition: float, seed: int) -> Task:
    X, y, _ = dense(rows, columns, condition, 1.0, seed)

    def objective(coef: np.ndarray) -> float:
        z = X @ coef[1:] + coef[0]
        return float(np.logaddexp(0, z).sum() - y @ z + coef[1:] @ coef[1:] / 2)

    def scikit(**settings: Any) -> Side:
        return lambda: with_intercept(LogisticRegression(**settings).fit(X, y))

    def ours(**settings: Any) -> Side:
        return lambda: with_intercept(SubsampledNewtonClassifier(random_state=0, **settings).fit(X, y))

    sides: dict[str, Side] = {
        "fullrank, default": ours(),
        "fullrank, tuned (tol 1e-10)": ours(tol=1e-10),
        "newton-cholesky, default": scikit(solver="newton-cholesky"),
        "newton-cholesky, tuned (tol 1e-8)": scikit(solver="newton-cholesky", tol=1e-8),
        "lbfgs, default": scikit(),
        "lbfgs, tuned (tol 1e-8, 400 iterations)": scikit(tol=1e-8, max_iter=400),
    }
    return Task(X, y, sides, objective, None, {"family": "binomial", "alpha": 1 / rows, "l1_ratio": 0.0})


def means(kind: str, seed: int) -> Task:
    """Counts or positive values whose logarithm is linear in 50 columns, 500,000 rows."""
    draws = np.random.default_rng(seed)
    n, d = 500_000, 50
    X = draws.standard_normal((n, d))
    margin = X @ (draws.standard_normal(d) * (draws.random(d) < 1 / 3)) / np.sqrt(d / 3)
    y = draws.gamma(2.0, np.exp(margin) / 2) if kind == "gamma" else draws.poisson(np.exp(margin)).astype(float)

    def deviance(coef: np.ndarray) -> float:
        z = X @ coef[1:] + coef[0]
        rows = z + y * np.exp(-z) - 1 - np.log(y) if kind == "gamma" else np.exp(z) - y * z + xlogy(y, y) - y
        return float(rows.sum() + coef[1:] @ coef[1:] / 2)

    def scikit(**settings: Any) -> Side:
        regressor = GammaRegressor if kind == "gamma" else PoissonRegressor
        return lambda: with_intercept(regressor(alpha=1 / n, **settings).fit(X, y))

    sides: dict[str, Side] = {
        "fullrank, default": lambda: with_intercept(SubsampledNewtonRegressor(kind, random_state=0).fit(X, y)),
        "lbfgs, default": scikit(),
        "newton-cholesky, tuned": scikit(solver="newton-cholesky"),
    }
    return Task(X, y, sides, deviance, None, {"family": kind, "alpha": 1 / n, "l1_ratio": 0.0})


def classes(kind: str, seed: int) -> Task:
    """An elastic net on 200,000 x 50, or ten classes on 100,000 x 30."""
    draws = np.random.default_rng(seed)
    n, d, K = {"elastic net": (200_000, 50, 1), "classes": (100_000, 30, 10)}[kind]
    X = draws.standard_normal((n, d))
    W = draws.standard_normal((d, K)) * (draws.random((d, 1)) < 1 / 3)
    margin = X @ W / np.sqrt(d / 3)
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
    sides: dict[str, Side] = {"fullrank, default": lambda: with_intercept(ours.fit(X, y))}
    problem = None
    if kind == "elastic net":
        problem = {"family": "binomial", "alpha": 1 / settings["C"] / n, "l1_ratio": settings["l1_ratio"]}
        sides |= {"saga, default": scikit(solver="saga"), "saga, tuned": scikit(solver="saga", tol=1e-8, max_iter=1000)}
    else:
        sides |= {"lbfgs, default": scikit(), "newton-cholesky, tuned": scikit(solver="newton-cholesky")}
    return Task(X, y, sides, objective, None, problem)


def squares(rows: int, columns: int, condition: float, seed: int) -> Task:
    A, b = least_squares.problem(rows, columns, condition, seed)

    def lapack(driver: str) -> Side:
        return lambda: scipy.linalg.lstsq(A, b, lapack_driver=driver, check_finite=False)[0]

    sides: dict[str, Side] = {
        "fullrank, default": lambda: RandomizedLinearRegression(fit_intercept=False, random_state=0).fit(A, b).coef_,
        "plain Cholesky, tuned": lambda: least_squares.normal_equations(A, b),
        "LAPACK gelsy, tuned": lapack("gelsy"),
        "LAPACK gelsd, default": lapack("gelsd"),
        "scikit-learn, default": lambda: LinearRegression(fit_intercept=False).fit(A, b).coef_,
    }
    return Task(A, b, sides, lambda x: least_squares.squares(A, b, x))


@contextmanager
def peers(python: str | None, task: Task) -> Iterator[tuple[dict[str, Side], dict[str, str]]]:
    """Sides of `linear_peers.py`, which run in one process of that Python, and the version of each."""
    if python is None or task.problem is None:
        yield {}, {}
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "X.npy", task.X)
        np.save(folder / "y.npy", task.y.astype(float))
        (folder / "problem.json").write_text(json.dumps(task.problem))
        command = [python, str(PEER), name]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert process.stdin and process.stdout
        questions, replies = process.stdin, process.stdout

        def reply() -> dict[str, Any]:
            if not (line := replies.readline()):
                raise SystemExit(f"{python} {PEER.name} ended early: see above")
            return dict(json.loads(line))

        def side(label: str) -> Side:
            def fit() -> Elsewhere:
                print(label, file=questions, flush=True)
                spent = reply()
                return Elsewhere(np.load(folder / "coef.npy"), spent["cpu"], spent["wall"])

            return fit

        try:
            versions = reply()
            yield {label: side(label) for label in versions}, versions
        finally:
            questions.close()
            process.wait()


TASKS: dict[str, dict[str, Callable[[int], Task]]] = {
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
        "elastic net, 200,000 x 50": lambda seed: classes("elastic net", seed),
        "ten classes, 100,000 x 30": lambda seed: classes("classes", seed),
        "gamma, 500,000 x 50": lambda seed: means("gamma", seed),
        "Poisson, 500,000 x 50": lambda seed: means("poisson", seed),
    },
    "least-squares": {
        "least squares, 1,000,000 x 100, condition 1e2": lambda seed: squares(1_000_000, 100, 1e2, seed),
        "least squares, 1,000,000 x 100, condition 1e9": lambda seed: squares(1_000_000, 100, 1e9, seed),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument(
        "--tasks", nargs="+", metavar="WORDS", help="of these, tasks that have one of WORDS in their name"
    )
    parser.add_argument("--peers-python", metavar="PYTHON", help="of an environment with glum, skglm and pyfixest")
    parser.add_argument("--once", type=float, default=10.0, help="sides that take more CPU seconds are run once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    kernels = sorted({str(library.get("architecture")) for library in threadpool_info()} - {"None"})
    packages = [package for package in PACKAGES if find_spec(package.replace("scikit-learn", "sklearn"))]
    print("left out, not installed:", *(set(PACKAGES) - set(packages) or ["none"]))
    wanted = [(name, make) for kind in args.only for name, make in TASKS[kind].items()]
    for name, make in wanted:
        if args.tasks and not any(words in name for words in args.tasks):
            continue
        task = make(args.seed)
        with peers(args.peers_python, task) as (elsewhere, versions):
            measured = interleaved(task.sides | elsewhere, args.rounds, args.once)
        values = {side: task.objective(found[0]) for side, found in measured.items() if found[0] is not None}
        least = min(values.values()) if task.bound is None else task.bound
        rows = []
        for side, (_, cpu, wall) in measured.items():
            label, call = side.split(", ", 1)
            row = {"task": name, "side": label, "call": call, "cpu_s": cpu, "wall_s": wall, "blas": kernels}
            row["runs"] = 1 if cpu > args.once else args.rounds
            row["times_ours"] = cpu / measured["fullrank, default"][1]
            row["excess"] = f"{max(float(values[side] / least - 1), 0.0):.1e}" if side in values else None
            if side in versions:
                row["version"] = versions[side]
            rows.append(row)
        table(rows, COLUMNS)
        print()
        settings = {"seed": args.seed}
        merge("solver_peers", settings, rows, ["task", "side", "call"], packages)


if __name__ == "__main__":
    main()
