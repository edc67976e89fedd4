"""The estimators: scikit-learn's contract, its answers, and fits from files."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from fullrank.randomized import ArraySource, RandomizedLinearRegression, RandomizedRidge


@parametrize_with_checks(
    [
        RandomizedLinearRegression(),
        RandomizedLinearRegression(method="gram", fit_intercept=False),
        RandomizedRidge(),
        RandomizedRidge(0.1, method="lsqr"),
    ]
)
@pytest.mark.filterwarnings("ignore:rank")
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("targets", [(), (3,)])
def test_answers_are_those_of_scikit_learn(sparse, targets):
    draws = np.random.default_rng(0)
    X, y, w = draws.standard_normal((500, 7)) + 2, draws.standard_normal((500, *targets)), draws.random(500)
    form = sp.csr_matrix(X) if sparse else X
    for ours, theirs in (
        (RandomizedLinearRegression(), LinearRegression()),
        (RandomizedLinearRegression(fit_intercept=False, method="gram"), LinearRegression(fit_intercept=False)),
        (RandomizedRidge(3.0), Ridge(3.0)),
        (RandomizedRidge(3.0, method="lsqr"), Ridge(3.0)),
    ):
        ours.fit(form, y, w)
        theirs.fit(X, y, w)
        np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-10)
        np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-10)
        np.testing.assert_allclose(ours.predict(form), theirs.predict(X), atol=1e-10)


def test_the_fit_is_right_where_a_rank_cut_off_is_wrong():
    """Columns of condition 1e9: scikit-learn 1.9 drops directions below 1e-6 and its residual is far from optimal."""
    draws = np.random.default_rng(0)
    left, right = (np.linalg.qr(draws.standard_normal((20, 20)))[0] for _ in range(2))
    X = draws.standard_normal((4000, 20)) @ (left * np.logspace(0, -9, 20)) @ right
    y = X @ (right.T @ (1 / np.logspace(0, -9, 20))) + draws.standard_normal(4000)
    best = np.linalg.norm(y - X @ np.linalg.lstsq(X, y, rcond=None)[0])
    ours = RandomizedLinearRegression(fit_intercept=False, random_state=0).fit(X, y)
    assert ours.residual_norm_ / best - 1 < 1e-9
    assert ours.method_ == "gram" and ours.rank_ == 20


def test_sources_and_dask_collections_are_fitted_and_predicted_as_arrays_are():
    da = pytest.importorskip("dask.array")
    draws = np.random.default_rng(0)
    X, y, w = draws.standard_normal((900, 4)), draws.standard_normal(900), draws.random(900)
    expected = RandomizedRidge(2.0).fit(X, y, w)
    names = ["a", "b", "c", "d"]
    from_source = RandomizedRidge(2.0).fit(ArraySource(X, y, w, fragment_rows=100, feature_names=names))
    assert list(from_source.feature_names_in_) == names
    chunked = da.from_array(X, chunks=(200, 4))
    from_dask = RandomizedRidge(2.0, executor="threads").fit(chunked, da.from_array(y), da.from_array(w))
    for fitted in (from_source, from_dask):
        np.testing.assert_allclose(fitted.coef_, expected.coef_, rtol=1e-12)
        np.testing.assert_allclose(fitted.predict(chunked), expected.predict(X), rtol=1e-10)
    with pytest.raises(ValueError, match="brings its own target"):
        RandomizedRidge().fit(ArraySource(X, y), y)


def test_random_state_repeats_a_fit_bit_for_bit_and_the_global_generator_is_left_alone():
    draws = np.random.default_rng(0)
    X, y = draws.standard_normal((3000, 5)), draws.standard_normal(3000)
    state = np.random.get_state()[1].copy()
    first, again, other = (
        RandomizedLinearRegression(precision="low", random_state=seed).fit(X, y).coef_ for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_names_of_a_data_frame_are_kept():
    pl, pd = pytest.importorskip("polars"), pytest.importorskip("pandas")
    X = np.random.default_rng(0).standard_normal((50, 2))
    for frame in (pd.DataFrame(X, columns=["bid", "age"]), pl.DataFrame(X, schema=["bid", "age"])):
        fitted = RandomizedLinearRegression().fit(frame, X[:, 0])
        assert list(fitted.feature_names_in_) == ["bid", "age"]
        np.testing.assert_allclose(fitted.predict(frame), X[:, 0], atol=1e-12)
