"""Facts about generalised linear models beyond two classes and an l2 penalty, against scikit-learn's optimum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import GammaRegressor, LogisticRegression, PoissonRegressor, Ridge, TweedieRegressor
from sklearn.utils.estimator_checks import parametrize_with_checks

from fullrank.randomized import (
    ArraySource,
    DaskSource,
    ParquetSource,
    QuantileRegressor,
    SubsampledNewtonClassifier,
    SubsampledNewtonRegressor,
    curvature,
    generalized_linear,
    newton,
)
from fullrank.randomized.losses import LOSSES, Softmax, Tweedie

N, D = 4000, 6
RNG = np.random.default_rng(0)
X = RNG.standard_normal((N, D)) * [1, 1, 1, 0.1, 1, 1]
SIGNAL = X @ [1.0, -0.5, 0.0, 3.0, 0.0, 0.01]
CLICKS = (RNG.random(N) < 1 / (1 + np.exp(1 - SIGNAL))).astype(float)
OFFSET = RNG.standard_normal(N)
MEAN = np.exp(0.5 * SIGNAL)
COUNTS = RNG.poisson(MEAN * np.exp(OFFSET)).astype(float)
CLASSES = (X @ RNG.standard_normal((D, 4)) + RNG.gumbel(size=(N, 4))).argmax(axis=1)
WEIGHT = RNG.integers(0, 3, N).astype(float)


@parametrize_with_checks(
    [
        SubsampledNewtonClassifier(l1_ratio=0.5),
        SubsampledNewtonRegressor(l1_ratio=1.0),
        SubsampledNewtonRegressor("gamma"),
        SubsampledNewtonRegressor("tweedie", power=1.3),
    ]
)
def test_scikit_learn_contract(estimator: Any, check: Any) -> None:
    check(estimator)


def penalty(coef: np.ndarray, C: float, l1_ratio: float) -> float:
    return (l1_ratio * np.abs(coef).sum() + (1 - l1_ratio) / 2 * np.square(coef).sum()) / C


def cross_entropy(model: Any, y: np.ndarray, weight: np.ndarray | float = 1.0) -> float:
    """Objective of a classifier, from its coefficients alone; y holds class numbers."""
    margin = X @ model.coef_.T + model.intercept_
    margin = np.column_stack([0 * margin, margin]) if margin.shape[1] == 1 else margin
    return float(-(weight * log_softmax(margin, axis=1)[np.arange(N), y.astype(int)]).sum())


def least_subgradient(model: Any, slope: np.ndarray, alpha: float, rows: Any = X) -> float:
    """Largest entry of the smallest subgradient at the coefficients, given the slopes of the loss in the margins."""
    w, g = model.coef_, rows.T @ slope + alpha * (1 - model.l1_ratio) * model.coef_
    a = alpha * model.l1_ratio
    inner = np.where(w != 0, np.abs(g + a * np.sign(w)), np.maximum(np.abs(g) - a, 0))
    return max(float(inner.max()), abs(float(slope.sum())))


@pytest.mark.parametrize("sampling", ["leverage", "row_norm", "none"])
@pytest.mark.parametrize(("C", "l1_ratio"), [(1.0, 0.5), (0.01, 0.5), (0.05, 1.0)])
def test_elastic_net_finds_the_minimum_that_scikit_learn_finds(sampling: str, C: float, l1_ratio: float) -> None:
    settings = {"C": C, "l1_ratio": l1_ratio, "tol": 1e-9}
    theirs = LogisticRegression(solver="saga", max_iter=3000, random_state=0, **settings).fit(X, CLICKS, WEIGHT)
    for rows in (X, sp.csr_array(X)):
        ours = SubsampledNewtonClassifier(sampling=sampling, random_state=0, **settings).fit(rows, CLICKS, WEIGHT)
        found, best = (cross_entropy(m, CLICKS, WEIGHT) + penalty(m.coef_, C, l1_ratio) for m in (ours, theirs))
        assert found <= best * (1 + 1e-9)
        np.testing.assert_array_equal(ours.coef_ == 0, theirs.coef_ == 0)
    assert ours.history_[-1].value == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("loss", ["squared", "poisson", "gamma", "tweedie"])
def test_the_last_step_tells_the_subgradient_at_the_returned_weights(loss: str) -> None:
    y = COUNTS if loss in ("poisson", "tweedie") else MEAN
    model = SubsampledNewtonRegressor(loss, alpha=200.0, l1_ratio=0.7, tol=1e-8, random_state=0).fit(X, y)
    slope = LOSSES[loss](X @ model.coef_ + model.intercept_, y).slope
    told = least_subgradient(model, slope, 200.0)
    assert model.history_[-1].gradient == pytest.approx(told, rel=1e-3, abs=1e-9) and told < 1e-3
    assert 0 < np.count_nonzero(model.coef_) < D


def test_an_absolute_penalty_and_more_weights_than_a_matrix_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (curvature, newton, generalized_linear):
        monkeypatch.setattr(module, "LARGEST_DENSE", 20)
    rng = np.random.default_rng(1)
    ids = (rng.integers(0, 40, (3000, 2)) + np.array([0, 40])).astype(np.int32)
    rows = sp.csr_array((np.ones(6000), ids.ravel(), np.arange(0, 6001, 2, dtype=np.int32)), shape=(3000, 80))
    y = rng.poisson(np.exp(rows @ (rng.standard_normal(80) * (rng.random(80) < 0.3)))).astype(float)
    for sampling, alpha in (("none", 10.0), ("row_norm", 20.0)):
        model = SubsampledNewtonRegressor("poisson", alpha=alpha, l1_ratio=1.0, sampling=sampling, random_state=0)
        model.set_params(tol=1e-8).fit(rows, y)
        slope = np.exp(rows @ model.coef_ + model.intercept_) - y
        assert least_subgradient(model, slope, alpha, rows) < 1e-4 and 10 < np.count_nonzero(model.coef_) < 60


def test_gamma_and_tweedie_are_those_of_scikit_learn() -> None:
    gamma, tweedie = RNG.gamma(2.0, MEAN / 2), RNG.poisson(MEAN) * RNG.gamma(2.0, 1.0, N)
    settings = {"alpha": 3.0 / WEIGHT.sum(), "solver": "newton-cholesky", "tol": 1e-12, "max_iter": 1000}
    for sampling in ("leverage", "none"):
        ours = {"alpha": 3.0, "sampling": sampling, "tol": 1e-10, "random_state": 0}
        found = SubsampledNewtonRegressor("gamma", **ours).fit(X, gamma, WEIGHT)
        best = GammaRegressor(**settings).fit(X, gamma, WEIGHT)
        np.testing.assert_allclose(found.coef_, best.coef_, rtol=1e-6, atol=1e-8)
        found = SubsampledNewtonRegressor("tweedie", power=1.3, **ours).fit(X, tweedie, WEIGHT)
        best = TweedieRegressor(power=1.3, link="log", **settings).fit(X, tweedie, WEIGHT)
        np.testing.assert_allclose(found.coef_, best.coef_, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(found.predict(X), best.predict(X), rtol=1e-6)


def test_tweedie_near_its_ends_is_poisson_and_gamma() -> None:
    margin, y = np.linspace(-2, 2, 9), np.full(9, 1.5)
    for power, loss in ((1 + 1e-7, "poisson"), (2 - 1e-7, "gamma")):
        near, end = Tweedie(power)(margin, y), LOSSES[loss](margin, y)
        np.testing.assert_allclose(near.slope, end.slope, atol=1e-5)
        np.testing.assert_allclose(near.curvature, end.curvature, atol=1e-5)


def test_an_offset_is_a_column_whose_weight_is_one() -> None:
    settings = {"alpha": 2.0, "tol": 1e-10, "random_state": 0}
    ours = SubsampledNewtonRegressor("poisson", **settings).fit(X, COUNTS, exposure=np.exp(OFFSET))
    rate = PoissonRegressor(alpha=2.0 / np.exp(OFFSET).sum(), solver="newton-cholesky", tol=1e-12, max_iter=1000)
    rate.fit(X, COUNTS / np.exp(OFFSET), np.exp(OFFSET))
    np.testing.assert_allclose(ours.coef_, rate.coef_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(ours.predict(X), rate.predict(X), rtol=1e-6)
    np.testing.assert_allclose(ours.predict(X, OFFSET), ours.predict(X) * np.exp(OFFSET))
    twice = SubsampledNewtonRegressor("poisson", **settings).fit(
        X, COUNTS, offset=OFFSET / 2, exposure=np.exp(OFFSET / 2)
    )
    np.testing.assert_allclose(twice.coef_, ours.coef_, rtol=1e-9)
    plain = SubsampledNewtonRegressor(**settings).fit(X, COUNTS, offset=OFFSET)
    np.testing.assert_allclose(plain.coef_, Ridge(2.0).fit(X, COUNTS - OFFSET).coef_, rtol=1e-7)
    # Of clicks kept beside one of ten others, log-odds are too high by log(10); taken as the offset, they are not.
    shifted = SubsampledNewtonClassifier(tol=1e-10).fit(X, CLICKS, offset=np.full(N, np.log(10.0)))
    bare = SubsampledNewtonClassifier(tol=1e-10).fit(X, CLICKS)
    np.testing.assert_allclose(shifted.intercept_, bare.intercept_ - np.log(10.0), rtol=1e-6)
    np.testing.assert_allclose(shifted.predict_proba(X, np.full(N, np.log(10.0))), bare.predict_proba(X), rtol=1e-6)


def test_offsets_come_with_any_table_and_go_into_its_predictions(tmp_path: Path) -> None:
    import dask.array as da
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {f"x{j}": X[:, j] for j in range(D)} | {"n": COUNTS, "o": OFFSET / 2, "e": np.exp(OFFSET / 2)}
    pq.write_table(pa.table(columns), tmp_path / "log.parquet", row_group_size=900)
    stored = ParquetSource(tmp_path, target="n", offset="o", exposure="e", block_rows=256)
    assert stored.feature_names == [f"x{j}" for j in range(D)]
    model = SubsampledNewtonRegressor("poisson", random_state=0)
    reference = model.fit(X, COUNTS, offset=OFFSET)
    coef, mean = reference.coef_.copy(), reference.predict(X, OFFSET)
    lazy, parts = da.from_array(X, (700, D)), da.from_array(OFFSET, 700)
    for source in (
        stored,
        DaskSource(lazy, da.from_array(COUNTS, 700), offset=parts),
        ArraySource(X, COUNTS, offset=OFFSET),
    ):
        np.testing.assert_allclose(model.fit(source).coef_, coef, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(model.predict(source), mean, rtol=1e-8)
    np.testing.assert_allclose(
        model.fit(lazy, da.from_array(COUNTS, 700), exposure=da.exp(parts)).coef_, coef, rtol=1e-8
    )
    np.testing.assert_allclose(model.predict(lazy, parts), mean, rtol=1e-8)
    with pytest.raises(ValueError, match="a source brings its own offset"):
        model.fit(stored, offset=OFFSET)
    with pytest.raises(ValueError, match="the source has an offset, which only generalised linear models take"):
        QuantileRegressor().fit(stored)
    with pytest.raises(ValueError, match=r"log.parquet: the exposure of row \d+ is -?\d.*, expected > 0"):
        model.fit(ParquetSource(tmp_path, target="n", exposure="o"))


@pytest.mark.parametrize("l1_ratio", [0.0, 0.6])
def test_several_classes_are_those_of_scikit_learn(l1_ratio: float) -> None:
    solver = "saga" if l1_ratio else "newton-cholesky"
    labels = np.array(list("dacb"))[CLASSES]
    theirs = LogisticRegression(C=0.05, l1_ratio=l1_ratio, solver=solver, tol=1e-9, max_iter=3000, random_state=0)
    theirs.fit(X, labels, WEIGHT)
    codes = np.searchsorted(theirs.classes_, labels)
    best = cross_entropy(theirs, codes, WEIGHT) + penalty(theirs.coef_, 0.05, l1_ratio)
    for sampling, rows in (("row_norm", X), ("none", X), ("auto", sp.csr_array(X))):
        ours = SubsampledNewtonClassifier(0.05, l1_ratio=l1_ratio, sampling=sampling, tol=1e-9, random_state=0)
        ours.fit(rows, labels, WEIGHT)
        assert cross_entropy(ours, codes, WEIGHT) + penalty(ours.coef_, 0.05, l1_ratio) <= best * (1 + 1e-9)
        np.testing.assert_allclose(ours.predict_proba(rows), theirs.predict_proba(X), atol=1e-5)
        assert ours.coef_.shape == (4, D) and ours.intercept_.sum() == pytest.approx(0, abs=1e-12)
        assert (ours.predict(rows) == theirs.predict(X)).mean() > 0.999
    warm = ours.set_params(warm_start=True, tol=1e-4).fit(sp.csr_array(X), labels, WEIGHT)
    assert warm.n_iter_ == 0


def test_several_classes_without_forming_a_hessian_and_from_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import polars as pl

    whole = SubsampledNewtonClassifier(tol=1e-9, random_state=0).fit(X, CLASSES)
    pl.from_numpy(X).with_columns(y=CLASSES).write_parquet(tmp_path / "a.parquet", row_group_size=1100)
    stored = SubsampledNewtonClassifier(tol=1e-9, random_state=0).fit(ParquetSource(tmp_path, target="y"))
    np.testing.assert_allclose(stored.coef_, whole.coef_, rtol=1e-7, atol=1e-9)
    for module in (curvature, newton, generalized_linear):
        monkeypatch.setattr(module, "LARGEST_DENSE", 10)
    for sampling in ("row_norm", "none"):
        products = SubsampledNewtonClassifier(tol=1e-9, sampling=sampling, random_state=0).fit(X, CLASSES)
        np.testing.assert_allclose(products.coef_, whole.coef_, rtol=1e-4, atol=1e-5)


def test_softmax_of_two_classes_is_the_logistic_loss() -> None:
    z, y = np.linspace(-800, 800, 33), np.arange(33.0) % 2
    two = Softmax(2)(np.column_stack([0 * z, z]), y)
    one = LOSSES["logistic"](z, y)
    np.testing.assert_allclose(two.value, one.value, atol=1e-12)
    np.testing.assert_allclose(two.slope[:, 1], one.slope, atol=1e-12)
    np.testing.assert_allclose(two.curvature, 2 * one.curvature, atol=1e-12)


def test_what_no_model_fits_is_refused_in_one_line() -> None:
    rows, three = X[:6], np.array([0.0, 1, 2, 0, 1, 2])
    regressor, classifier = SubsampledNewtonRegressor, SubsampledNewtonClassifier
    for model, arguments, message in (
        (regressor("gamma"), {"y": three}, "target of row 0 is 0.0, expected above 0"),
        (regressor("tweedie"), {"y": -three}, "target of row 1 is -1.0, expected 0 or more"),
        (regressor("tweedie", power=2.0), {"y": three}, r"power is 2.0, expected a number in \(1, 2\)"),
        (regressor(l1_ratio=1.5), {"y": three}, r"l1_ratio is 1.5, expected a number in \[0, 1\]"),
        (
            regressor(),
            {"y": three, "exposure": np.ones(6)},
            'exposure is for the losses poisson, gamma, tweedie, not for "squared"',
        ),
        (regressor("poisson"), {"y": three, "exposure": three}, "the exposure of row 0 is 0.0, expected > 0"),
        (regressor(), {"y": three, "offset": np.ones(5)}, r"offset has shape \(5,\), expected \(6,\)"),
        (regressor(), {"y": three, "offset": np.array([0, 0, np.nan, 0, 0, 0])}, "the offset of row 2 is nan"),
        (classifier(), {"y": three, "offset": np.ones(6)}, "an offset is for two classes, the target has 3"),
        (classifier(sampling="leverage"), {"y": three}, '"leverage" for 3 classes; use "row_norm"'),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(rows, **arguments)
    for targets, message in (
        ([0.0, 1, 3, 0, 1, 3], "the source has no target 2, expected all classes from 0 to 3"),
        ([0, 1, 2.5, 0, 1, 2], "target of row 2 is 2.5, expected a class, 0 to 3"),
        ([0, 1, 1e9, 0, 1, 2], r"a target of 1e\+09, expected classes from 0 to 999"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier().fit(ArraySource(rows, np.array(targets)))


def test_a_penalised_fit_that_stops_early_says_how_far_it_is_from_the_minimum() -> None:
    settings = {"alpha": 5.0, "l1_ratio": 1.0, "sampling": "none"}
    best = SubsampledNewtonRegressor("poisson", tol=1e-10, **settings).fit(X, COUNTS).history_[-1].value
    with pytest.warns(ConvergenceWarning, match="of the objective left") as told:
        early = SubsampledNewtonRegressor("poisson", max_iter=3, **settings).fit(X, COUNTS).history_[-1].value
    stated = float(str(told[0].message).split("about ")[1].split(" of")[0])
    assert 0.1 * abs(early / best - 1) < stated < 10 * abs(early / best - 1)
