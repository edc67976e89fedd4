"""How a table is cut does not matter: fragments of one row or none, blocks that keep nothing, files, chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from fullrank.randomized import (
    ArraySource,
    DaskSource,
    LADRegressor,
    ParquetSource,
    PreconditionedSGDRegressor,
    QMCFeatures,
    QuantileRegressor,
    RandomizedLinearRegression,
    RandomizedRidge,
    SubsampledNewtonClassifier,
    SubsampledNewtonRegressor,
    TensorMachineClassifier,
    TensorMachineRegressor,
    leverage_scores,
)
from fullrank.randomized.sources import RowSource

SIZES = [1, 1, 0, 7, 300, 0, 1, 2, 1000, 40, 0]
ROWS = sum(SIZES)
SAMPLED = {"sketch_size": 200, "random_state": 0}

MODELS: dict[str, Callable[[], Any]] = {
    "exact": lambda: QuantileRegressor(0.7, random_state=0),
    "passes": lambda: QuantileRegressor(0.7, solver="passes", random_state=0),
    "sketch": lambda: QuantileRegressor(0.7, solver="sketch", **SAMPLED),
    "uniform": lambda: LADRegressor(solver="sketch", conditioning="uniform", **SAMPLED),
    **{
        method: lambda method=method: RandomizedLinearRegression(method=method, random_state=0)
        for method in ("auto", "gram", "lsqr", "sketch")
    },
    "drawn by leverage": lambda: RandomizedLinearRegression(method="sketch", sketch="leverage", **SAMPLED),
    "drawn uniformly": lambda: RandomizedLinearRegression(method="sketch", sketch="uniform", **SAMPLED),
    "ridge": lambda: RandomizedRidge(random_state=0),
    "leverage": lambda: SubsampledNewtonClassifier(sample_size=60, random_state=0),
    "row norms": lambda: SubsampledNewtonRegressor(sampling="row_norm", sample_size=60, random_state=0),
    "squared SGD": lambda: PreconditionedSGDRegressor(random_state=0),
    "quantile SGD": lambda: PreconditionedSGDRegressor("quantile", quantile=0.7, n_steps=200, random_state=0),
    "tensor machine": lambda: TensorMachineRegressor(max_iter=3, random_state=0),
    "tensor classifier": lambda: TensorMachineClassifier(max_iter=3, random_state=0),
    "features": lambda: QMCFeatures(random_state=0),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, RowSource]]:
    """The same rows with a number (False) or a click (True) as the target, cut in five ways."""
    da = pytest.importorskip("dask.array")
    draw = np.random.default_rng(0)
    X = draw.standard_normal((ROWS, 3))
    values = X @ [1.0, 2.0, 3.0] + draw.standard_normal(ROWS)
    weight = draw.random(ROWS) * (draw.random(ROWS) < 0.9)
    chunks = (tuple(SIZES),)
    made: dict[bool, dict[str, RowSource]] = {}
    for clicks in (False, True):
        folder, y = tmp_path_factory.mktemp("files"), (values > 0).astype(float) if clicks else values
        table = pa.table({**{f"x{j}": X[:, j] for j in range(3)}, "y": y, "w": weight})
        for part, (start, size) in enumerate(zip(np.cumsum([0, *SIZES]), SIZES, strict=False)):
            pq.write_table(table.slice(start, size), folder / f"{part:02d}.parquet")
        made[clicks] = {
            "whole": ArraySource(X, y, weight),
            "fragments of 9 rows": ArraySource(X, y, weight, fragment_rows=9),
            "sparse, blocks of 2 rows": ArraySource(sp.csr_array(X), y, weight, fragment_rows=70, block_rows=2),
            "files": ParquetSource(folder, target="y", weight="w", block_rows=64),
            "chunks": DaskSource(da.from_array(X, chunks=(*chunks, (3,))), y, weight),
        }
    return made


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", MODELS)
def test_every_cut_of_a_table_gives_one_fit(name: str, sources: dict[bool, dict[str, RowSource]]) -> None:
    tables = sources[name in ("leverage", "tensor classifier")]
    found = {}
    for cut, source in tables.items():
        model = MODELS[name]().fit(source)
        found[cut] = model.transform(source) if name == "features" else model.predict(source)
    whole = found.pop("whole")
    assert np.isfinite(whole).all() and len(whole) == ROWS
    for cut, values in found.items():
        np.testing.assert_allclose(values, whole, rtol=1e-6, atol=1e-6, err_msg=cut)


@pytest.mark.parametrize("p", [1, 2])
def test_every_cut_of_a_table_gives_the_same_scores(p: int, sources: dict[bool, dict[str, RowSource]]) -> None:
    for method in ("exact", "approx"):
        whole, *others = (leverage_scores(source, p, method, random_state=0) for source in sources[False].values())
        for scores in others:
            np.testing.assert_allclose(scores, whole, rtol=1e-9)


def test_a_rare_feature_and_blocks_that_keep_no_row() -> None:
    draw = np.random.default_rng(0)
    X = draw.standard_normal((30_000, 3))
    X[15:, 2] = 0
    y = X @ np.ones(3) + draw.standard_normal(30_000)
    for solver in ("passes", "sketch"):
        model = QuantileRegressor(solver=solver, sketch_size=400, random_state=0)
        model.fit(ArraySource(X, y, block_rows=100))
        np.testing.assert_allclose(model.coef_[:2], 1, atol=0.2)
    for sketch in ("leverage", "uniform"):
        drawn = RandomizedLinearRegression(method="sketch", sketch=sketch, random_state=0)
        np.testing.assert_allclose(drawn.fit(ArraySource(X[:, :2], y, block_rows=10)).coef_, 1, atol=0.2)
