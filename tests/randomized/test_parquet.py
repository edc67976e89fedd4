"""Parquet logs as they are: folders by day, categories, missing values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fullrank.randomized import (
    DaskSource,
    ParquetSource,
    QuantileRegressor,
    RandomizedLinearRegression,
    SubsampledNewtonClassifier,
)
from fullrank.randomized.sources import RowSource

COUNTRIES = ["DE", "NL", "US"]


@pytest.fixture(scope="module")
def log() -> pd.DataFrame:
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"x": draw.standard_normal(400), "country": draw.choice(COUNTRIES, 400)})
    frame["hour"] = np.repeat([0, 3, 7, 20], 100)
    frame["y"] = frame["x"] + frame["country"].map({"DE": 0.0, "NL": 1.0, "US": 5.0}) + 0.1 * draw.standard_normal(400)
    return frame


def rows(source: RowSource) -> np.ndarray:
    blocks = [block for i in range(source.n_fragments) for block in source.iter_blocks(i)]
    assert [block.start for block in blocks] == np.cumsum([0, *map(len, blocks)])[:-1].tolist()
    return np.vstack([np.hstack([np.asarray(b.columns()), b.y[:, None]]) for b in blocks])


def test_folders_of_hive_are_read_to_the_bottom_and_are_columns(log: pd.DataFrame, tmp_path: Path) -> None:
    log.to_parquet(tmp_path, partition_cols=["country", "hour"])
    (tmp_path / "_temporary").mkdir()
    log.to_parquet(tmp_path / "_temporary" / "half.parquet")
    with pytest.raises(ValueError, match='"country" is "DE", expected numbers: name it in categories'):
        ParquetSource(tmp_path, target="y")
    source = ParquetSource(tmp_path, target="y", categories=["country"])
    assert source.feature_names == ["x", "country=DE", "country=NL", "country=US", "hour"]
    dummies = pd.get_dummies(log, columns=["country"], prefix_sep="=")
    expected = dummies[[*source.feature_names, "y"]].to_numpy(dtype=float)
    np.testing.assert_array_equal(np.sort(rows(source), axis=0), np.sort(expected, axis=0))
    assert ParquetSource(tmp_path, ["x"], "y").n_rows == 400
    part = next(tmp_path.glob("country=NL/hour=3/*.parquet"))
    assert ParquetSource(part, target="y").feature_names == ["x"]


def test_categories_are_columns_of_zeros_and_ones_by_name(log: pd.DataFrame, tmp_path: Path) -> None:
    log.astype({"country": "category"}).to_parquet(tmp_path / "log.parquet", row_group_size=90)
    source = ParquetSource(tmp_path / "log.parquet", ["country", "x"], "y", categories=["country"], block_rows=50)
    assert source.categories == {"country": COUNTRIES}
    model = RandomizedLinearRegression(fit_intercept=False).fit(source)
    np.testing.assert_allclose(model.coef_, [0, 1, 5, 1], atol=0.05)
    dense = pd.get_dummies(log[["country", "x"]], prefix_sep="=", dtype=float)[source.feature_names]
    np.testing.assert_allclose(model.predict(dense), model.predict(source))
    for other in (QuantileRegressor(fit_intercept=False), SubsampledNewtonClassifier()):
        y = log["y"] if isinstance(other, QuantileRegressor) else (log["y"] > 2).astype(int)
        target = "y" if isinstance(other, QuantileRegressor) else "late"
        log.assign(late=y).to_parquet(tmp_path / "late.parquet")
        clicks = ParquetSource(tmp_path / "late.parquet", ["country", "x"], target, categories=source.categories)
        values = other.fit(clicks).predict(clicks)
        np.testing.assert_allclose(values, other.fit(dense, y).predict(dense), atol=1e-5)
    with pytest.raises(ValueError, match='log.parquet: column "country" has "US", none of its 2 values'):
        rows(ParquetSource(tmp_path / "log.parquet", ["country"], "y", categories={"country": ["NL", "DE"]}))
    with pytest.raises(ValueError, match='category "city" is not among the features'):
        ParquetSource(tmp_path / "log.parquet", ["x"], "y", categories=["city"])
    with pytest.raises(ValueError, match='column "country" is string, expected numbers: list features without it'):
        pytest.importorskip("dask.dataframe")
        import dask.dataframe as dd

        DaskSource(dd.from_pandas(log, npartitions=2), "y")


def test_rows_with_missing_values_are_refused_or_left_out_and_counted(log: pd.DataFrame, tmp_path: Path) -> None:
    holes = log.astype({"hour": "Int64"})
    for column, step in (("x", 7), ("country", 11), ("hour", 13), ("y", 17)):
        holes.loc[::step, column] = None
    holes.loc[100:199, "x"] = None  # no row of a row group is left
    holes.to_parquet(tmp_path / "log.parquet", row_group_size=100)
    settings = {"target": "y", "categories": ["country"]}
    with pytest.raises(ValueError, match='log.parquet: column "x" has [0-9]+ nulls'):
        rows(ParquetSource(tmp_path, **settings))
    source = ParquetSource(tmp_path, missing="drop", block_rows=30, **settings)
    whole = log[holes.notna().all(axis=1)]
    assert source.n_rows == len(whole) and source.n_dropped == 400 - len(whole)
    dummies = pd.get_dummies(whole, columns=["country"], prefix_sep="=")[[*source.feature_names, "y"]]
    np.testing.assert_array_equal(rows(source), dummies.to_numpy(dtype=float))
    model, other = QuantileRegressor(0.4, fit_intercept=False), QuantileRegressor(0.4, fit_intercept=False)
    dense = dummies.drop(columns="y").astype(float)
    np.testing.assert_allclose(model.fit(source).coef_, other.fit(dense, dummies["y"]).coef_, atol=1e-7)
    with pytest.raises(ValueError, match='missing is "mean", expected one of error, drop'):
        ParquetSource(tmp_path, missing="mean", **settings)
    holes.assign(x=None).astype({"x": float}).to_parquet(tmp_path / "log.parquet")
    with pytest.raises(ValueError, match="no rows"):
        ParquetSource(tmp_path, missing="drop", **settings)
