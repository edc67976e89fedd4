"""Facts about polynomials of low rank and their training."""

from __future__ import annotations

import itertools
from pathlib import Path

import dask.array as da
import numpy as np
import polars as pl
import pytest
from scipy import sparse
from scipy.optimize import check_grad
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from fullrank.randomized import ParquetSource, TensorMachineClassifier, TensorMachineRegressor
from fullrank.randomized.blocks import Block
from fullrank.randomized.losses import LOSSES
from fullrank.randomized.polynomial import Fit, Polynomial, Scaling
from fullrank.randomized.sources import ArraySource

pytestmark = pytest.mark.filterwarnings("ignore:L-BFGS took max_iter")


@pytest.fixture
def crosses() -> tuple[np.ndarray, np.ndarray]:
    """A target whose signal is a product of two columns and a third one."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((4000, 6))
    return X, 2 * X[:, 0] * X[:, 1] + X[:, 2] + 0.1 * rng.standard_normal(4000)


@parametrize_with_checks(
    [
        # A dozen separable rows have no finite optimum without a ridge, and rounding then decides where L-BFGS stops.
        TensorMachineClassifier(degree=2, rank=2, max_iter=30, alpha=0.1, random_state=0),
        TensorMachineRegressor(degree=2, rank=2, max_iter=30, random_state=0),
    ]
)
def test_scikit_learn(estimator, check) -> None:  # type: ignore[no-untyped-def]
    check(estimator)


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_number_of_parameters(degree: int) -> None:
    rank, d = 4, 7
    polynomial = Polynomial(degree, rank, d)
    assert polynomial.n_parameters == 1 + d + (degree - 1) * (degree + 2) * rank * d // 2
    assert polynomial.n_vectors == 1 + sum(i * rank for i in range(2, degree + 1))


def test_values_are_sums_of_products() -> None:
    rng = np.random.default_rng(0)
    polynomial = Polynomial(4, 3, 5)
    flat, X = rng.standard_normal(polynomial.n_parameters), rng.standard_normal((50, 5))
    expected = flat[0] + X @ flat[1:6]
    for degree, factors in enumerate(polynomial.products(polynomial.vectors(flat)), start=2):
        for j in range(3):
            term = np.ones(50)
            for k in range(degree):
                term *= X @ factors[k, j]
            expected += term
    np.testing.assert_allclose(polynomial.values(flat, X), expected, rtol=1e-12)
    np.testing.assert_allclose(polynomial.values(flat, sparse.csr_array(X)), expected, rtol=1e-12)


@pytest.mark.parametrize("loss", ["logistic", "squared"])
@pytest.mark.parametrize("as_sparse", [False, True])
def test_gradient_where_dot_products_are_zero(loss: str, as_sparse: bool) -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((30, 6)) * (rng.random((30, 6)) < 0.3)
    X[:3] = 0
    y = rng.integers(2, size=30).astype(float)
    weight = rng.random(30)
    fit = Fit(Polynomial(4, 2, 6), LOSSES[loss], Scaling(), None, 0.0, 0)
    block = Block(sparse.csr_array(X) if as_sparse else X, y, weight, 0)
    flat = rng.standard_normal(fit.polynomial.n_parameters)
    fit.polynomial.vectors(flat)[4, 2:] = 0  # a factor that is zero in more rows
    assert (X @ fit.polynomial.vectors(flat).T == 0).sum() > 50
    error = check_grad(
        lambda w: fit.sums(iter([block]), flat=w)[1], lambda w: fit.sums(iter([block]), flat=w)[2], flat, epsilon=1e-6
    )
    assert error < 1e-5 * np.linalg.norm(fit.sums(iter([block]), flat=flat)[2])


def test_degree_1_is_ridge_and_logistic_regression(crosses: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = crosses
    weight = np.random.default_rng(1).random(len(y))
    settings = {"degree": 1, "alpha": 0.1, "normalize": None, "early_stopping": False, "tol": 1e-12}
    ours = TensorMachineRegressor(**settings).fit(X, y, weight)
    ridge = Ridge(alpha=0.1 * weight.sum()).fit(X, y, weight)
    np.testing.assert_allclose(ours.coef_linear_, ridge.coef_, atol=1e-8)
    assert ours.intercept_ == pytest.approx(ridge.intercept_, abs=1e-8)
    ours = TensorMachineClassifier(**settings).fit(X, y > 0.3, weight)
    logistic = LogisticRegression(C=1 / (0.1 * weight.sum()), tol=1e-10, max_iter=1000).fit(X, y > 0.3, weight)
    np.testing.assert_allclose(ours.coef_linear_, logistic.coef_, atol=1e-7)
    np.testing.assert_allclose(ours.decision_function(X), logistic.decision_function(X), atol=1e-6)


def test_tied_vectors_without_squares_are_a_factorization_machine() -> None:
    """sum_j <v_j, x>^2 - sum_j sum_a v_ja^2 x_a^2 = 2 sum_{a<b} <v_a, v_b> x_a x_b."""
    rng = np.random.default_rng(0)
    polynomial = Polynomial(2, 3, 5)
    V, X = rng.standard_normal((3, 5)), rng.standard_normal((20, 5))
    flat = np.zeros(polynomial.n_parameters)
    next(iter(polynomial.products(polynomial.vectors(flat))))[:] = V
    machine = sum(2 * (V[:, a] @ V[:, b]) * X[:, a] * X[:, b] for a, b in itertools.combinations(range(5), 2))
    np.testing.assert_allclose(polynomial.values(flat, X) - (X**2 @ (V**2).T).sum(axis=1), machine, rtol=1e-10)


def test_monomial_coefficients_are_the_polynomial(crosses: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = crosses
    machine = TensorMachineRegressor(degree=3, rank=2, normalize=None, max_iter=30, random_state=0).fit(X, y)
    expected = np.full(20, float(machine.intercept_))
    for degree in (1, 2, 3):
        for columns in itertools.combinations_with_replacement(range(6), degree):
            expected += machine.monomial_coef(columns) * np.prod(X[:20, columns], axis=1)
    np.testing.assert_allclose(machine.predict(X[:20]), expected, rtol=1e-8)
    assert machine.monomial_coef((0, 1)) == pytest.approx(machine.monomial_coef((1, 0)))
    assert machine.monomial_coef((0, 1)) == pytest.approx(2, abs=0.1)
    with pytest.raises(ValueError, match="a monomial has 1 to 3 columns here, got 4"):
        machine.monomial_coef((0, 1, 2, 3))


def test_order_and_scale_of_factors_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    polynomial = Polynomial(3, 2, 4)
    flat, X = rng.standard_normal(polynomial.n_parameters), rng.standard_normal((30, 4))
    before = polynomial.values(flat, X)
    cubic = list(polynomial.products(polynomial.vectors(flat)))[1]
    cubic[:] = cubic[[2, 0, 1]][:, ::-1]
    cubic[0, 1] *= 8
    cubic[2, 1] /= 8
    np.testing.assert_allclose(polynomial.values(flat, X), before, rtol=1e-12)


def test_products_are_found_where_a_linear_model_sees_nothing(crosses: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = crosses
    machine = TensorMachineRegressor(degree=2, rank=3, normalize="columns", random_state=0).fit(X[:3000], y[:3000])
    assert machine.score(X[3000:], y[3000:]) > 0.99
    assert Ridge().fit(X[:3000], y[:3000]).score(X[3000:], y[3000:]) < 0.3
    y = y > 0
    machine = TensorMachineClassifier(degree=2, rank=3, random_state=0).fit(X[:3000], y[:3000])
    assert machine.score(X[3000:], y[3000:]) > 0.93


def test_recovers_a_sparse_polynomial_of_degree_6() -> None:
    """The paper's synthetic target x_1^6 - 10 x_2 x_3 x_20."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((12_000, 20)) / np.sqrt(20) + 0.5
    y = X[:, 0] ** 6 - 10 * X[:, 1] * X[:, 2] * X[:, 19]
    machine = TensorMachineRegressor(
        degree=6, rank=2, normalize=None, alpha=1e-6, max_iter=150, early_stopping=False, random_state=0
    )
    machine.fit(X[:8000], y[:8000])
    error = np.linalg.norm(machine.predict(X[8000:]) - y[8000:]) / np.linalg.norm(y[8000:])
    assert error < 0.1


@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
def test_objective_falls(crosses: tuple[np.ndarray, np.ndarray], solver: str) -> None:
    X, y = crosses
    machine = TensorMachineRegressor(
        degree=3, normalize="columns", early_stopping=False, solver=solver, max_iter=25, random_state=0
    ).fit(X, y)
    curve = machine.loss_curve_[0]
    assert curve[-1] < 0.1 * np.var(y)
    if solver == "lbfgs":
        assert (np.diff(curve) <= 0).all()


def test_early_stopping_keeps_the_best_parameters() -> None:
    """Labels are noise but for one column: a machine trained to the end learns the noise."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((3000, 30))
    y = X[:, 0] + 2 * rng.standard_normal(3000) > 0
    settings = {"degree": 3, "rank": 4, "random_state": 0, "alpha": 0.0}
    stopped = TensorMachineClassifier(**settings).fit(X[:2000], y[:2000])
    curve = stopped.validation_curve_[0]
    assert len(curve) == int(np.argmin(curve)) + 1 + 30
    to_the_end = TensorMachineClassifier(early_stopping=False, **settings).fit(X[:2000], y[:2000])
    assert to_the_end.validation_curve_ is None
    assert to_the_end.score(X[:2000], y[:2000]) > 0.8
    assert stopped.score(X[2000:], y[2000:]) > to_the_end.score(X[2000:], y[2000:]) + 0.03


def test_weights_are_repetitions(crosses: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = crosses[0][:400], crosses[1][:400]
    weight = np.random.default_rng(0).integers(3, size=400)
    settings = {"degree": 2, "rank": 2, "early_stopping": False, "max_iter": 20, "random_state": 0}
    weighted = TensorMachineRegressor(**settings).fit(X, y, weight)
    repeated = TensorMachineRegressor(**settings).fit(np.repeat(X, weight, axis=0), np.repeat(y, weight))
    np.testing.assert_allclose(weighted.predict(X), repeated.predict(X), atol=1e-5)
    np.testing.assert_allclose(weighted.loss_curve_[0], repeated.loss_curve_[0], rtol=1e-6)


def test_dense_sparse_parquet_and_threads_agree(crosses: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    X, y = crosses[0] * (np.abs(crosses[0]) > 0.5), (crosses[1] > 0).astype(float)
    frame = pl.DataFrame({f"x{j}": X[:, j] for j in range(6)} | {"click": y})
    frame.write_parquet(tmp_path / "rows.parquet", row_group_size=700)
    settings = {"degree": 2, "rank": 2, "max_iter": 15, "random_state": 0}
    dense = TensorMachineClassifier(**settings).fit(X, y)
    others = [
        TensorMachineClassifier(**settings).fit(sparse.csr_array(X), y),
        TensorMachineClassifier(**settings).fit(ParquetSource(tmp_path, target="click")),
        TensorMachineClassifier(executor="threads", **settings).fit(ArraySource(X, y, fragment_rows=900)),
        TensorMachineClassifier(executor="dask", **settings).fit(
            da.from_array(X, chunks=(1500, 6)), da.from_array(y, chunks=1500)
        ),
    ]
    assert dense.validation_curve_ is not None
    for other in others:
        np.testing.assert_allclose(other.predict_proba(X), dense.predict_proba(X), atol=1e-5)
        np.testing.assert_allclose(other.validation_curve_, dense.validation_curve_, rtol=1e-6)


def test_passes_over_a_source(crosses: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    """One for the scales, then one for each evaluation of the objective."""
    source = ParquetSource(_written(crosses, tmp_path), target="y")
    machine = TensorMachineRegressor(degree=2, rank=1, warm_start_linear=False, max_iter=5, random_state=0).fit(source)
    assert machine.n_iter_ == 5
    assert 1 + 6 <= source.n_passes <= 1 + 2 * 6


def _written(crosses: tuple[np.ndarray, np.ndarray], folder: Path) -> Path:
    frame = pl.DataFrame({f"x{j}": crosses[0][:, j] for j in range(6)} | {"y": crosses[1]})
    frame.write_parquet(folder / "rows.parquet", row_group_size=1000)
    return folder


def test_more_than_two_classes() -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((1500, 4))
    names = np.array(["both", "cross", "none"])
    y = names[np.where(X[:, 0] * X[:, 1] > 0.3, 1, np.where(X[:, 2] > 0, 0, 2))]
    machine = TensorMachineClassifier(degree=2, rank=3, random_state=0).fit(X[:1000], y[:1000])
    assert machine.score(X[1000:], y[1000:]) > 0.85
    assert machine.coef_linear_.shape == (3, 4) and machine.factors_[0].shape == (3, 3, 2, 4)
    np.testing.assert_allclose(machine.predict_proba(X).sum(axis=1), 1)


def test_normalised_rows_do_not_know_their_length(crosses: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = crosses
    machine = TensorMachineClassifier(degree=2, max_iter=10, random_state=0).fit(X, y > 0)
    lengths = np.random.default_rng(0).uniform(0.1, 10, (len(X), 1))
    np.testing.assert_allclose(machine.decision_function(X * lengths), machine.decision_function(X), rtol=1e-9)
    columns = np.array([1e-3, 1, 1e3, 2, 5, 1e6])
    scaled = TensorMachineClassifier(degree=2, max_iter=10, random_state=0).fit(X * columns, y > 0)
    np.testing.assert_allclose(scaled.decision_function(X * columns), machine.decision_function(X), atol=1e-5)


def test_zero_rows_and_constant_columns_are_taken(crosses: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = crosses[0].copy(), crosses[1]
    X[:5], X[:, 5] = 0, 0
    machine = TensorMachineRegressor(degree=2, max_iter=10, random_state=0).fit(X, y)
    assert np.ptp(machine.predict(X[:5])) == 0
    plain = TensorMachineRegressor(degree=2, max_iter=10, normalize="l2", random_state=0).fit(X, y)
    np.testing.assert_allclose(plain.predict(X[:5]), plain.intercept_)


def test_homogeneous_rows_keep_their_length() -> None:
    """y = |x|^2 cannot be seen in the directions of rows."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((3000, 4))
    y = np.sum(X**2, axis=1)
    settings = {"degree": 4, "rank": 3, "random_state": 0}
    keeps, loses = (TensorMachineRegressor(normalize=name, **settings).fit(X, y) for name in ("homogeneous", "l2"))
    assert keeps.score(X, y) > 0.95 and loses.score(X, y) < 0.3
    assert keeps.coef_linear_.shape == (5,)
    thin = TensorMachineRegressor(max_iter=20, **settings).fit(sparse.csr_array(X), y).predict(sparse.csr_array(X))
    np.testing.assert_allclose(TensorMachineRegressor(max_iter=20, **settings).fit(X, y).predict(X), thin, atol=1e-4)


def test_overflow_is_explained(crosses: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = crosses
    machine = TensorMachineRegressor(degree=6, normalize=None, init_scale=1e60, warm_start_linear=False)
    with pytest.raises(ValueError, match="the loss overflows"), np.errstate(all="ignore"):
        machine.fit(X, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"degree": 0}, "degree is 0, expected an integer >= 1"),
        ({"rank": 0}, "rank is 0, expected an integer >= 1"),
        ({"alpha": -1.0}, "alpha is -1.0, expected a number >= 0"),
        ({"init_scale": 0.0}, 'init_scale is 0.0, expected "auto" or a number > 0'),
        ({"normalize": "max"}, 'normalize is "max"'),
        ({"solver": "sgd"}, 'solver is "sgd"'),
        ({"early_stopping": "yes"}, 'early_stopping is "yes", expected True'),
        ({"validation_fraction": 1.0}, r"validation_fraction is 1.0, expected a number in \(0, 1\)"),
    ],
)
def test_rejects(crosses: tuple[np.ndarray, np.ndarray], arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorMachineRegressor(**arguments).fit(*crosses)


def test_rejects_targets(crosses: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    X, y = crosses
    with pytest.raises(ValueError, match="needs two classes"):
        TensorMachineClassifier().fit(X, np.ones(len(y)))
    source = ParquetSource(_written(crosses, tmp_path), target="y")
    with pytest.raises(ValueError, match="leave y and sample_weight out"):
        TensorMachineRegressor().fit(source, y)
    with pytest.raises(ValueError, match='"adam" shuffles rows'):
        TensorMachineRegressor(solver="adam").fit(source)
    with pytest.raises(ValueError, match="0 targets"):
        TensorMachineRegressor().fit(ArraySource(X))
