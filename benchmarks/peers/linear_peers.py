"""Linear models by glum, skglm, pyfixest and statsmodels, which live in an environment of their own.

    python -m venv VENV && VENV/bin/pip install glum==3.4.1 skglm==0.5 pyfixest==0.60.0 statsmodels==0.15.0
    VENV/bin/python benchmarks/peers/linear_peers.py FOLDER

FOLDER holds X.npy, y.npy and problem.json: {"quantile": 0.5}, or {"family", "alpha", "l1_ratio"} of the mean loss plus
the penalty. The first line printed has the version of each side; then each line read names a side, is answered with
the CPU and wall seconds of its fit, and leaves [intercept, *coefficients] in FOLDER/coef.npy. Every side was fitted
to a few rows before, so that nothing is compiled while it is timed. "F order" is a table whose columns lie together,
which these packages work on: it is made outside the timing, as pyfixest's data frame is.
"""

import json
import os
import sys
import time
import warnings
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np


def glum(X, y, problem, **settings):
    from glum import GeneralizedLinearRegressor

    penalty = {"alpha": problem["alpha"], "l1_ratio": problem["l1_ratio"]}
    link = "logit" if problem["family"] == "binomial" else "log"
    model = GeneralizedLinearRegressor(family=problem["family"], link=link, **penalty, **settings)
    return lambda: model.fit(X, y)


def skglm(X, y, problem, **settings):
    from skglm import GeneralizedLinearEstimator, SparseLogisticRegression
    from skglm.datafits import Gamma, Poisson
    from skglm.penalties import L1_plus_L2
    from skglm.solvers import ProxNewton

    alpha, ratio = problem["alpha"], problem["l1_ratio"]
    if problem["family"] == "binomial":
        model = SparseLogisticRegression(alpha, ratio, **settings)
    else:
        loss = {"gamma": Gamma, "poisson": Poisson}[problem["family"]]()
        model = GeneralizedLinearEstimator(loss, L1_plus_L2(alpha, ratio), ProxNewton(**settings))
    return lambda: model.fit(X, y)


def pyfixest(X, y, problem, **settings):
    import pandas
    import pyfixest

    names = [f"x{j}" for j in range(X.shape[1])]
    frame = pandas.DataFrame(X, columns=names).assign(y=y)
    formula = "y ~ " + " + ".join(names)
    return lambda: pyfixest.quantreg(formula, frame, quantile=problem["quantile"], **settings)


def pyfixest_solver(X, y, problem):
    """What `fit_qreg_fn` does, without the formula and the standard errors."""
    from pyfixest.estimation.quantreg.frisch_newton_ip import frisch_newton_solver
    from scipy.linalg import cho_factor, solve_triangular

    q = problem["quantile"]

    def fit():
        A = np.column_stack([np.ones(len(y)), X])
        chol = cho_factor(A.T @ A, lower=True, check_finite=False)[0]
        P = solve_triangular(chol, A.T, lower=True, check_finite=False)
        ones = np.ones(len(y))
        options = {"tol": 1e-6, "max_iter": len(y), "backoff": 0.9995, "chol": chol, "P": P}
        return frisch_newton_solver(A=A.T, b=(1 - q) * A.T @ ones, c=-y, u=ones, q=q, **options)[0]

    return fit


def statsmodels(X, y, problem):
    from statsmodels.regression.quantile_regression import QuantReg

    q = problem["quantile"]
    return lambda: np.asarray(QuantReg(y, np.column_stack([np.ones(len(y)), X])).fit(q=q).params)


def sides(X, y, problem):
    """Side -> a fit that is ready to be timed."""
    if "quantile" in problem:
        found = {
            "pyfixest fn, default": lambda: pyfixest(X, y, problem),
            "pyfixest fn, tuned (vcov iid)": lambda: pyfixest(X, y, problem, vcov="iid"),
            "pyfixest pfn, tuned (vcov iid)": lambda: pyfixest(X, y, problem, method="pfn", vcov="iid", seed=1),
            "pyfixest fn, tuned (solver alone)": lambda: pyfixest_solver(X, y, problem),
            "statsmodels, default": lambda: statsmodels(X, y, problem),
        }
    else:
        F = np.asfortranarray(X)
        found = {
            "glum, default": lambda: glum(X, y, problem),
            "glum, tuned (gradient_tol 1e-8, F order)": lambda: glum(F, y, problem, gradient_tol=1e-8),
            "skglm, default": lambda: skglm(X, y, problem),
            "skglm, tuned (tol 1e-8, F order)": lambda: skglm(F, y, problem, tol=1e-8, max_iter=100),
        }
    return {side: make() for side, make in found.items() if find_spec(side.split()[0].strip(","))}


def coefficients(fitted):
    if isinstance(fitted, np.ndarray):
        return fitted
    if hasattr(fitted, "coef_"):
        return np.append(fitted.intercept_, fitted.coef_)
    return np.asarray(fitted.coef())


def main():
    folder = Path(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # What the packages print is none of the replies.
    warnings.simplefilter("ignore")
    X, y = np.load(folder / "X.npy"), np.load(folder / "y.npy")
    problem = json.loads((folder / "problem.json").read_text())
    for fit in sides(X[:3000], y[:3000], problem).values():
        fit()
    ready = sides(X, y, problem)
    replies.write(json.dumps({side: metadata.version(side.split()[0].strip(",")) for side in ready}) + "\n")
    for line in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        fitted = ready[line.strip()]()
        spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        np.save(folder / "coef.npy", coefficients(fitted))
        replies.write(json.dumps(spent) + "\n")


if __name__ == "__main__":
    main()
