"""Standard errors of quantile regression: the textbook's, the truth over many tables, every kind of table."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fullrank.randomized import ArraySource, LADRegressor, QuantileRegressor, standard_errors


def table(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise that grows with the first column."""
    draws = np.random.default_rng(seed)
    X = draws.standard_normal((n, 2))
    return X, 1 + X @ [2.0, -1.0] + draws.standard_normal(n) * np.exp(0.8 * X[:, 0])


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_iid_and_robust_errors_are_the_formulas_of_greene(t: float) -> None:
    X, y = table(800, 0)
    A = np.column_stack([np.ones(800), X])
    model = QuantileRegressor(t, tol=1e-10).fit(X, y)
    r = y - model.predict(X)
    z = stats.norm.ppf(t)
    share = 1.5 * stats.norm.pdf(z) ** 2 / (2 * z**2 + 1)
    h = 800 ** (-1 / 3) * stats.norm.ppf(0.975) ** (2 / 3) * share ** (1 / 3)
    width = min(y.std(), stats.iqr(r) / 1.34) * (stats.norm.ppf(t + h) - stats.norm.ppf(t - h))
    f = np.mean(np.where(np.abs(r) < width, 0.75 * (1 - (r / width) ** 2), 0)) / width
    inverse = np.linalg.inv(A.T @ A)
    D = np.where(r > 0, t / f, (1 - t) / f) ** 2
    for method, truth in (("iid", t * (1 - t) / f**2 * inverse), ("robust", inverse @ (A.T * D) @ A @ inverse)):
        ours = standard_errors(model, X, y, method=method)
        # Where three residuals of zero are on one side by rounding, and where the quartiles are, may differ by a row.
        np.testing.assert_allclose(ours.standard_error, np.sqrt(np.diag(truth)), rtol=1e-2)
        np.testing.assert_allclose(ours.intervals(0.95)[:, 1] - ours.coef, 1.96 * ours.standard_error, rtol=1e-3)


def test_errors_are_the_spread_over_many_tables() -> None:
    fits = [QuantileRegressor(0.5, tol=1e-6).fit(*table(400, seed)) for seed in range(200)]
    truth = np.std([np.append(fit.intercept_, fit.coef_) for fit in fits], axis=0)

    def mean_error(method: str, count: int) -> np.ndarray:
        found = (
            standard_errors(fits[seed], *table(400, seed), method=method, n_bootstrap=50, random_state=0)
            for seed in range(count)
        )
        return np.mean([errors.standard_error for errors in found], axis=0)

    np.testing.assert_allclose(mean_error("sandwich", 40), truth, rtol=0.2)
    np.testing.assert_allclose(mean_error("bootstrap", 4), truth, rtol=0.25)
    assert mean_error("iid", 40)[1] < 0.9 * truth[1]  # blind to noise that grows with the column


def test_a_source_and_repeated_rows_give_the_same_errors() -> None:
    X, y = table(600, 1)
    weight = np.random.default_rng(2).integers(0, 4, 600)
    model = LADRegressor().fit(X, y, weight)
    for method in ("iid", "robust", "sandwich"):
        arrays = standard_errors(model, X, y, weight, method=method)
        source = ArraySource(X, y, weight, fragment_rows=70)
        np.testing.assert_allclose(standard_errors(model, source, method=method).covariance, arrays.covariance)
        repeated = standard_errors(model, X.repeat(weight, 0), y.repeat(weight), method=method)
        np.testing.assert_allclose(repeated.standard_error, arrays.standard_error, rtol=0.02)
    assert arrays.names == ["intercept", "x0", "x1"]


def test_what_has_no_errors_is_refused() -> None:
    X, y = table(300, 3)
    with pytest.raises(ValueError, match="alpha is 0.1, expected 0: a penalty biases the coefficients"):
        standard_errors(QuantileRegressor(alpha=0.1).fit(X, y), X, y)
    with pytest.raises(ValueError, match="method is .*, expected one of iid, robust, sandwich, bootstrap"):
        standard_errors(QuantileRegressor().fit(X, y), X, y, method="kernel")
    with pytest.raises(ValueError, match="X has 1 features"):
        standard_errors(QuantileRegressor().fit(X, y), X[:, :1], y)
