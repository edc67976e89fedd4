"""Tensor machines against polynomial sketches, Nystroem features and kernel ridge: test error, size, training time.

    python -m benchmarks.randomized.tensor_machines --data FOLDER --sets forest a9a kin40k

Every method sees the training rows only. A tenth of them chooses its hyper-parameters, by the highest AUC or the lowest
error; that candidate is then judged on the test rows, once. (The tensor machine stops by another tenth of the rest.)
Rows are normalised as the tensor machine does it, with the scale of the training columns, for all methods. "CPU s" is
the training of the chosen candidate, "all CPU s" of all; "numbers" are those computed from a row for a prediction: dot
products, sketched features, kernel values. Kernel ridge is exact and takes 4,000 rows, so its time is not the others'.
One thread.

Candidates: tensor machine, degree 2 to 4 (rank 5) by ridge 1e-5, 1e-4, 1e-3, and one that is stopped after 150 steps,
ridge 1e-5; degree 2 and 4 of PolynomialCountSketch and gamma .5, 2 of Nystroem, 500 features each, and no features, all
with logistic regression of C 1, 100, 1e4 (this library's Newton, to the optimum) or ridge regression of 1e-6, 1e-3,
1e-1; kernel ridge, gamma .5, 2 by ridge 1e-3, 1e-1.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from scipy import sparse
from sklearn.datasets import load_svmlight_file
from sklearn.kernel_approximation import Nystroem, PolynomialCountSketch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

from benchmarks.randomized.cpu_seconds import merge, seconds, table
from fullrank.randomized import SubsampledNewtonClassifier, TensorMachineClassifier, TensorMachineRegressor
from fullrank.randomized.polynomial import Scaling

REGRESSIONS = ("kin40k", "protein", "elevators", "bike")
FEATURES, KERNEL_ROWS = 500, 4000


class Rows(NamedTuple):
    X: Any
    y: np.ndarray


def load(data: Path, name: str) -> tuple[Rows, Rows]:
    """Training and test rows, raw."""
    if name == "forest":
        frames = [pl.read_parquet(data / "forest-binary" / f"{part}.parquet") for part in ("train", "test")]
        pairs = [Rows(f.drop("y").to_numpy().astype(np.float64), f["y"].to_numpy() > 0) for f in frames]
    elif name == "a9a":
        pairs = []
        for part in ("a9a.svm.gz", "a9a.t.svm.gz"):
            with gzip.open(data / "a9a" / part) as file:
                X, y = load_svmlight_file(file, n_features=123)
            pairs.append(Rows(sparse.csr_array(X), y > 0))
    else:
        frame = pl.read_parquet(data / "uci-regression" / f"{name}.parquet")
        parts = [frame.filter(~pl.col("test_split0")), frame.filter("test_split0")]
        pairs = [Rows(f.select(pl.col("^x.*$")).to_numpy(), f["y"].to_numpy()) for f in parts]
    return pairs[0], pairs[1]


def scaling(X: Any, homogeneous: bool) -> Scaling:
    squares = np.asarray((X.multiply(X) if sparse.issparse(X) else X**2).mean(axis=0)).ravel()
    return Scaling(1 / np.sqrt(np.where(squares > 0, squares, 1.0)), unit_rows=True, constant=homogeneous)


class Candidate(NamedTuple):
    method: str
    setting: str
    train: Callable[[], Any]
    parameters: int
    numbers: int


def candidates(train: Rows, classes: bool, seed: int, d: int) -> Iterator[Candidate]:
    machine = TensorMachineClassifier if classes else TensorMachineRegressor
    for name, steps in (("tensor machine", 500), ("tensor machine, 150 steps", 150)):
        for degree, alpha in itertools.product((2, 3, 4), (1e-5,) if steps == 150 else (1e-5, 1e-4, 1e-3)):
            vectors = 1 + 5 * (degree * (degree + 1) // 2 - 1)
            fit = machine(
                degree, 5, alpha=alpha, normalize=None, max_iter=steps, random_state=seed, early_stopping=True
            )
            yield Candidate(
                name,
                f"degree {degree}, ridge {alpha:g}",
                lambda fit=fit: fit.fit(*train),
                1 + vectors * d,
                vectors,
            )

    def linear() -> Iterator[tuple[str, Any]]:
        for strength in (1, 100, 1e4) if classes else (1e-1, 1e-3, 1e-6):
            yield (
                (f"C {strength:g}", SubsampledNewtonClassifier(C=strength, random_state=seed))
                if classes
                else (f"ridge {strength:g}", Ridge(alpha=strength))
            )

    maps = {f"degree {q}": PolynomialCountSketch(degree=q, n_components=FEATURES, random_state=seed) for q in (2, 4)}
    maps |= {f"gamma {g}": Nystroem(gamma=g, n_components=FEATURES, random_state=seed) for g in (0.5, 2.0)}
    for setting, features in maps.items():
        for strength, model in linear():
            name = "count sketch + linear" if setting.startswith("degree") else "Nystroem + linear"
            pipeline = make_pipeline(features, model)
            yield Candidate(
                name,
                f"{setting}, {strength}",
                lambda pipeline=pipeline: pipeline.fit(*train),
                FEATURES + 1 + (FEATURES * d if name.startswith("Ny") else 0),
                FEATURES,
            )
    for strength, model in linear():
        yield Candidate("linear", strength, lambda model=model: model.fit(*train), d + 1, 1)
    some = np.random.default_rng(seed).permutation(len(train.y))[:KERNEL_ROWS]
    for gamma in (0.5, 2.0):
        for ridge in (1e-3, 1e-1):
            model = KernelRidge(kernel="rbf", gamma=gamma, alpha=ridge)
            target = 2.0 * train.y[some] - 1 if classes else train.y[some] - train.y.mean()
            yield Candidate(
                f"kernel ridge, {len(some)} rows",
                f"gamma {gamma:g}, ridge {ridge:g}",
                lambda model=model, target=target: model.fit(train.X[some], target),
                len(some) * (d + 1),
                len(some),
            )


def scores(model: Any, X: Any, offset: float) -> np.ndarray:
    if hasattr(model, "decision_function"):
        return model.decision_function(X)
    return model.predict(X) + (offset if isinstance(model, KernelRidge) else 0.0)


def error(score: np.ndarray, y: np.ndarray) -> float:
    """Share of wrong classes, or root mean square error over the deviation of the target."""
    if y.dtype == bool:
        return float(np.mean((score > 0) != y))
    return float(np.sqrt(np.mean((score - y) ** 2)) / y.std())


def measure(data: Path, name: str, seed: int) -> list[dict[str, Any]]:
    train, test = load(data, name)
    scale = scaling(train.X, homogeneous=name in REGRESSIONS)
    train, test = Rows(scale.apply(train.X), train.y), Rows(scale.apply(test.X), test.y)
    order = np.random.default_rng(seed).permutation(len(train.y))
    held_out, rest = order[: len(order) // 10], order[len(order) // 10 :]
    fitted, judged = Rows(train.X[rest], train.y[rest]), Rows(train.X[held_out], train.y[held_out])
    classes = train.y.dtype == bool
    offset = 0.0 if classes else float(fitted.y.mean())
    rows: dict[str, dict[str, Any]] = {}
    for candidate in candidates(fitted, classes, seed, train.X.shape[1]):
        model, cpu, wall = seconds(candidate.train)
        score = scores(model, judged.X, offset)
        # Ranks, because a few thousand coins say little of two error rates.
        found = 1 - float(roc_auc_score(judged.y, score)) if classes else error(score, judged.y)
        row = rows.setdefault(candidate.method, {"set": name, "method": candidate.method, "all CPU s": 0.0})
        row["all CPU s"] += cpu
        if found < row.get("validation", np.inf):
            score = scores(model, test.X, offset)
            row |= {"chosen": candidate.setting, "validation": found, "error": error(score, test.y)}
            row |= {"AUC": float(roc_auc_score(test.y, score)) if classes else None, "CPU s": cpu, "wall s": wall}
            row |= {"parameters": candidate.parameters, "numbers": candidate.numbers}
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of forest-binary, a9a and uci-regression")
    parser.add_argument("--sets", nargs="+", default=["forest", "a9a", *REGRESSIONS])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="L-BFGS took|SubsampledNewtonClassifier stopped")
    warnings.filterwarnings("ignore", module="sklearn")
    for name in args.sets:
        rows = measure(args.data, name, args.seed)
        table(rows, ["set", "method", "chosen", "error", "AUC", "CPU s", "all CPU s", "parameters", "numbers"])
        settings = {"seed": args.seed, "features": FEATURES, "kernel_rows": KERNEL_ROWS, "rank": 5}
        merge("tensor_machines", settings, rows, ["set", "method"], ["scikit-learn", "scipy"])


if __name__ == "__main__":
    main()
