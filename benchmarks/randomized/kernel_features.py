"""Fourier features of the Gaussian kernel: error at equal size, error of refined frequencies, time to a given error.

    python -m benchmarks.randomized.kernel_features --only error refined time

Columns are standardised, gamma = 1 / d. "error": ||ZZ' - K|| / ||K|| (Frobenius) over 400 rows, mean of the seeds; s
frequencies make 2s features, and scikit-learn's RBFSampler is given 2s components. "refined": frequencies that look
at the data, fitted on half of the rows and judged on the other half. "time": CPU seconds of fit and transform of
20,000 rows, with the fewest features of a power of two whose error on 20,000 random pairs is at most the target on
average of the seeds; for Nystroem features are landmarks. One thread. Sets of --data are left out where they are
missing; those of scikit-learn are always there.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_svmlight_file
from sklearn.kernel_approximation import Nystroem, RBFSampler
from sklearn.metrics.pairwise import rbf_kernel

from benchmarks.randomized.cpu_seconds import interleaved, merge, table
from fullrank.randomized import QMCFeatures, kernel_error

SEQUENCES = ("mc", "orthogonal", "lattice", "halton", "digital_net", "sobol", "auto")
TARGETS = (0.1, 0.05, 0.03)
ROWS = 400


def sets(data: Path, rows: int) -> dict[str, np.ndarray]:
    """Standardised tables of at most `rows` rows, constant columns dropped."""
    tables = {
        "diabetes": load_diabetes().data,
        "breast cancer": load_breast_cancer().data,
        "digits": load_digits().data,
    }
    for name, path in {"forest": "forest-binary/train", "kin40k": "uci-regression/kin40k"}.items():
        file = data / f"{path}.parquet"
        if file.exists():
            frame = pl.read_parquet(file)
            numbers = [column for column in frame.columns if column.startswith("x")]
            tables[name] = frame.select(numbers[:10]).to_numpy().astype(np.float64)
            if name == "forest":
                tables["forest, with indicators"] = frame.select(numbers).to_numpy().astype(np.float64)
    census = data / "a9a" / "a9a.svm.gz"
    if census.exists():
        with gzip.open(census) as file:
            tables["a9a"] = load_svmlight_file(file, n_features=123)[0].toarray()
    drawn = {}
    for name, X in tables.items():
        X = X[np.random.default_rng(0).permutation(len(X))[:rows]]
        X = X[:, X.std(axis=0) > 0]
        drawn[name] = (X - X.mean(axis=0)) / X.std(axis=0)
    return drawn


def error(Z: np.ndarray, K: np.ndarray) -> float:
    return float(np.linalg.norm(Z @ Z.T - K) / np.linalg.norm(K))


def errors(tables: dict[str, np.ndarray], sizes: list[int], seeds: int) -> list[dict[str, Any]]:
    rows = []
    for (name, X), s in itertools.product(tables.items(), sizes):
        gamma = 1 / X.shape[1]
        K = rbf_kernel(X, gamma=gamma)
        row: dict[str, Any] = {"part": "error", "set": name, "d": X.shape[1], "s": s}
        sampler = RBFSampler(gamma=gamma, n_components=2 * s)
        row["RBFSampler"] = np.mean(
            [error(sampler.set_params(random_state=k).fit_transform(X), K) for k in range(seeds)]
        )
        for sequence in SEQUENCES:
            features = QMCFeatures(gamma=gamma, n_components=2 * s, sequence=sequence)
            found = [error(features.set_params(random_state=k).fit_transform(X), K) for k in range(seeds)]
            row[sequence] = float(np.mean(found))
        row["auto / mc"] = row["auto"] / row["mc"]
        row["auto / best"] = row["auto"] / min(row["sobol"], row["orthogonal"])
        rows.append(row)
        print(".", end="", flush=True)
    print()
    return rows


def refit(features: Any, seed: int, train: np.ndarray, X: np.ndarray) -> np.ndarray:
    return features.set_params(random_state=seed).fit(train).transform(X)


def refined(tables: dict[str, np.ndarray], seeds: int) -> list[dict[str, Any]]:
    rows = []
    for (name, X), s in itertools.product(tables.items(), (128, 256)):
        gamma, train, test = 1 / X.shape[1], X[::2], X[1::2]
        K = rbf_kernel(test, gamma=gamma)
        row: dict[str, Any] = {"part": "refined", "set": name, "d": X.shape[1], "s": s}
        for sequence in ("mc", "auto", "adaptive", "empirical"):
            features = QMCFeatures(gamma=gamma, n_components=2 * s, sequence=sequence)
            fits = {k: partial(refit, features, k, train, test) for k in range(seeds)}
            done = interleaved(fits, 1)
            row[sequence] = float(np.mean([error(Z, K) for Z, _, _ in done.values()]))
            row[f"{sequence} CPU s"] = float(np.mean([cpu for _, cpu, _ in done.values()]))
        for sequence in ("adaptive", "empirical"):
            row[f"{sequence} / mc"] = row[sequence] / row["mc"]
        rows.append(row)
        print(".", end="", flush=True)
    print()
    return rows


def times(tables: dict[str, np.ndarray], seeds: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, X in tables.items():
        gamma = 1 / X.shape[1]
        methods = {"QMCFeatures": QMCFeatures(), "RBFSampler": RBFSampler(), "Nystroem": Nystroem()}
        part = X[:4000]
        reached: dict[str, dict[float, tuple[int, float]]] = {method: {} for method in methods}
        for method, features in methods.items():
            open_targets = list(TARGETS)
            for m in 2 ** np.arange(6, 11 if method == "Nystroem" else 13):
                features.set_params(gamma=gamma, n_components=int(m))
                # Rows not fitted on: Nystroem's own landmarks have no error.
                rest = X[4000:8000]
                made = [refit(features, seed, part, rest) for seed in range(seeds)]
                found = np.mean([kernel_error(rest, Z, gamma=gamma, pairs=20_000, random_state=0).value for Z in made])
                while open_targets and found <= open_targets[0]:
                    reached[method][open_targets.pop(0)] = int(m), float(found)
                if not open_targets:
                    break
        for target in TARGETS:
            calls = {
                method: partial(refit, clone(features).set_params(n_components=reached[method][target][0]), 0, part, X)
                for method, features in methods.items()
                if target in reached[method]
            }
            for method, (_, cpu, wall) in interleaved(calls, repeats).items():
                size, found = reached[method][target]
                rows.append(
                    {"part": "time", "set": name, "d": X.shape[1], "target": target, "method": method}
                    | {"features": size, "error": found, "CPU s": cpu, "wall s": wall}
                )
            for method in methods.keys() - calls.keys():
                rows.append({"part": "time", "set": name, "d": X.shape[1], "target": target, "method": method})
        print(".", end="", flush=True)
    print()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--only", nargs="+", choices=("error", "refined", "time"), default=["error", "refined", "time"])
    parser.add_argument("--sets", nargs="+", help="names of sets; all when omitted")
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="sequence .* keeps its start")

    def chosen(rows: int) -> dict[str, np.ndarray]:
        return {name: X for name, X in sets(args.data, rows).items() if not args.sets or name in args.sets}

    if "error" in args.only:
        done = errors(chosen(ROWS), args.sizes, args.seeds)
        table(done, ["set", "d", "s", "RBFSampler", *SEQUENCES, "auto / mc", "auto / best"])
        save(args, done)
    if "refined" in args.only:
        done = refined(chosen(2 * ROWS), min(args.seeds, 3))
        table(done, [column for column in done[0] if column != "part"])
        save(args, done)
    if "time" in args.only:
        large = {name: X for name, X in chosen(20_000).items() if len(X) == 20_000}
        done = times(large, min(args.seeds, 3), args.repeats)
        table(done, ["set", "d", "target", "method", "features", "error", "CPU s", "wall s"])
        save(args, done)


def save(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    settings = {"rows": ROWS, "seeds": args.seeds, "repeats": args.repeats, "gamma": "1/d"}
    merge("kernel_features", settings, rows, ["part", "set", "s", "target", "method"], ["scikit-learn", "scipy"])


if __name__ == "__main__":
    main()
