"""Estimators on a cluster: the coefficients of the fit in memory, also after a worker has died."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fullrank.randomized import (
    LADRegressor,
    ParquetSource,
    PreconditionedSGDRegressor,
    QMCFeatures,
    QuantileRegressor,
    RandomizedLinearRegression,
    RandomizedRidge,
    RowSource,
    SubsampledNewtonClassifier,
    SubsampledNewtonRegressor,
    TensorMachineClassifier,
    TensorMachineRegressor,
)
from fullrank.randomized.blocks import Block

da = pytest.importorskip("dask.array")
distributed = pytest.importorskip("distributed")

ROWS, COLUMNS = 4000, 4
FEATURES = [f"x{j}" for j in range(COLUMNS)]
MACHINE = {"degree": 2, "rank": 2, "max_iter": 3, "warm_start_linear": False, "early_stopping": False}

ESTIMATORS = {
    "least squares, three passes": partial(RandomizedLinearRegression, method="gram", refine=True),
    "least squares of a sketch": partial(RandomizedLinearRegression, precision="low"),
    "ridge": partial(RandomizedRidge, 2.0),
    "quantile": partial(QuantileRegressor, 0.9, solver="passes"),
    "quantile of a sample": partial(QuantileRegressor, 0.9, solver="sketch", sketch_size=1000),
    "least absolute deviations": partial(LADRegressor, solver="passes", alpha=0.01),
    "newton, logistic": partial(SubsampledNewtonClassifier, sample_size=500),
    "newton, poisson": partial(SubsampledNewtonRegressor, "poisson", sample_size=500),
    "pwSGD, squared": PreconditionedSGDRegressor,
    "pwSGD, absolute": partial(PreconditionedSGDRegressor, "absolute"),
    "tensor machine, squared": partial(TensorMachineRegressor, **MACHINE),
    "tensor machine, logistic": partial(TensorMachineClassifier, **MACHINE),
    "frequencies": partial(QMCFeatures, n_components=32),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("workers")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50, local_directory=folder
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray, Path]:
    """X, targets by name, weights, and a folder of two files of two row groups that holds them."""
    draws = np.random.default_rng(0)
    X = draws.standard_normal((ROWS, COLUMNS)) * [1.0, 0.3, 3.0, 1.0]
    margin = X @ [0.5, -1.0, 0.1, 0.2] + 0.3 * X[:, 0] * X[:, 3]
    targets = {
        "price": margin + draws.standard_t(3, ROWS),
        "click": (draws.random(ROWS) < 1 / (1 + np.exp(-margin))).astype(float),
        "count": draws.poisson(np.exp(margin.clip(max=3))).astype(float),
    }
    weight = draws.uniform(0.5, 2, ROWS)
    folder = tmp_path_factory.mktemp("table")
    columns = dict(zip(FEATURES, X.T, strict=True)) | targets | {"weight": weight}
    for part, rows in enumerate((slice(0, 1500), slice(1500, None))):
        pq.write_table(pa.table({name: x[rows] for name, x in columns.items()}), folder / f"{part}.parquet", 1300)
    return X, targets, weight, folder


def target_of(name: str) -> str:
    return "click" if "logistic" in name else "count" if "poisson" in name else "price"


def stored(name: str, folder: Path) -> ParquetSource:
    if name == "frequencies":
        return ParquetSource(folder, FEATURES)
    return ParquetSource(folder, FEATURES, target_of(name), "weight", block_rows=500)


def learned(model: Any) -> list[np.ndarray]:
    names = ("coef_", "intercept_", "coef_linear_", "factors_", "frequencies_")
    return [np.asarray(part) for name in names if hasattr(model, name) for part in np.atleast_1d(getattr(model, name))]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.filterwarnings("ignore:L-BFGS took max_iter")
def test_a_cluster_learns_from_parquet_and_dask_what_is_learned_in_memory(name: str, table: Any, client: Any) -> None:
    X, targets, weight, folder = table
    make = ESTIMATORS[name]
    chunks = da.from_array(X, (1700, 3))
    if name == "frequencies":
        arguments, collections = (X,), (chunks,)
    else:
        y = targets[target_of(name)]
        arguments, collections = (X, y, weight), (chunks, da.from_array(y, 1700), da.from_array(weight, 900))
    in_memory = learned(make(random_state=0).fit(*arguments))
    assert in_memory
    on_cluster = make(random_state=0, executor=client)
    for data in ((stored(name, folder),), collections):
        for ours, theirs in zip(learned(on_cluster.fit(*data)), in_memory, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


class FatalSource(RowSource):
    """Another source, one fragment of which kills the process that reads it: once, in the pass of the given number."""

    def __init__(self, source: RowSource, mark: Path, fatal_pass: int) -> None:
        self.source, self.mark, self.fatal_pass = source, mark, fatal_pass
        self.n_cols, self.n_targets, self.single_target = source.n_cols, source.n_targets, source.single_target
        self.starts, self.feature_names = source.starts, source.feature_names

    def task(self, fragment: int) -> tuple[Callable[..., Iterator[Block]], tuple[Any, ...]]:
        read, arguments = self.source.task(fragment)
        fatal = self.n_passes == self.fatal_pass and fragment == self.n_fragments - 2
        return (partial(_die_once, read, self.mark), arguments) if fatal else (read, arguments)


def _die_once(read: Callable[..., Iterator[Block]], mark: Path, *arguments: Any) -> Iterator[Block]:
    for block in read(*arguments):
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield block


@pytest.mark.parametrize(("name", "fatal_pass"), [("least squares of a sketch", 1), ("quantile", 3)])
def test_a_worker_killed_during_a_fit_changes_no_bit(
    name: str, fatal_pass: int, table: Any, client: Any, tmp_path: Path
) -> None:
    model = ESTIMATORS[name](random_state=0, executor=client)
    undisturbed = learned(model.fit(stored(name, table[3])))
    source = FatalSource(stored(name, table[3]), tmp_path / "killed", fatal_pass)
    disturbed = learned(model.fit(source))
    assert (tmp_path / "killed").exists()
    assert source.n_passes == model.n_passes_
    for ours, theirs in zip(disturbed, undisturbed, strict=True):
        np.testing.assert_array_equal(ours, theirs)
