from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import lsq_linear, minimize
from sklearn.linear_model import QuantileRegressor as LinearProgram
from sklearn.utils.estimator_checks import parametrize_with_checks

from fullrank.randomized import ArraySource, ParquetSource, PreconditionedSGDRegressor
from fullrank.randomized.pwsgd import DrawnRows, _drawn, _mass, row_scores
from fullrank.randomized.stochastic_steps import SQUARED, _project_on_ball, _project_on_box, descend


def table(n: int, d: int, condition: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated columns of the given condition, rows of lognormal length, noise of standard deviation 1/2."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) * np.logspace(0, -np.log10(condition), d)
    X = X @ np.linalg.qr(rng.standard_normal((d, d)))[0] * rng.lognormal(size=(n, 1))
    round_X = np.linalg.qr(X)[0] * np.sqrt(n)
    return X, round_X @ rng.standard_normal(d) + 0.5 * rng.standard_normal(n)


def excess(model: PreconditionedSGDRegressor, X: np.ndarray, y: np.ndarray) -> float:
    """Squared error over its minimum, minus one."""
    columns = np.column_stack([X, np.ones(len(X))]) if model.fit_intercept else X
    best = y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
    return float(np.square(y - model.predict(X)).sum() / (best @ best) - 1)


@parametrize_with_checks(
    [
        PreconditionedSGDRegressor(),
        PreconditionedSGDRegressor("absolute"),
        PreconditionedSGDRegressor(preconditioner="diag", constraint=("box", -100.0, 100.0)),
    ],
    expected_failed_checks=lambda _: {
        name: "which rows are drawn depends on their number, so a weight of 2 is two rows in the mean only"
        for name in (
            "check_sample_weight_equivalence_on_dense_data",
            "check_sample_weight_equivalence_on_sparse_data",
        )
    },
)
def test_scikit_learn_contract(estimator: Any, check: Any) -> None:
    check(estimator)


def test_without_preconditioner_it_is_randomised_kaczmarz_step_for_step() -> None:
    X, y = table(200, 4, 10, 0)
    settings = {"basis": np.eye(4), "power": 2, "intercept": False, "mass": np.square(X).sum()}
    drawn = _drawn(ArraySource(X, y).iter_blocks(0), **settings, steps=400, seed=0)
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(len(drawn.count)), drawn.count))
    point = np.zeros(4)
    steepest = (drawn.importance * np.square(drawn.rows).sum(1)).max()
    lengths = (SQUARED, 0.5, 0.5 / steepest, 1e300, 0, len(order))
    descend(drawn.rows, drawn.target, drawn.importance, order, point, *lengths)
    w = np.zeros(4)
    for i in order:
        a = drawn.rows[i]
        w = w + (drawn.target[i] - a @ w) / (a @ a) * a
    np.testing.assert_allclose(point, w, rtol=1e-10)


def test_a_step_is_the_gradient_in_the_mean() -> None:
    X, y = table(300, 3, 10, 1)
    weight = np.random.default_rng(2).random(300)
    source = ArraySource(X, y, weight)
    for power, basis in ((2, np.eye(3)), (1, np.linalg.inv(np.linalg.qr(X, mode="r"))), (2, None)):
        block = next(source.iter_blocks(0))
        odds = row_scores(block, basis, power, False)
        odds = odds / odds.sum()
        settings = {"basis": basis, "power": power, "intercept": False}
        mass = _mass(source.iter_blocks(0), **settings)
        total = np.zeros(3)
        for seed in range(300):
            drawn: DrawnRows = _drawn(source.iter_blocks(0), **settings, mass=mass, steps=50, seed=seed)
            residual = drawn.rows @ np.ones(3) - drawn.target
            total += (drawn.count * drawn.importance * residual) @ drawn.rows / 50
        exact = (weight * (X @ np.ones(3) - y)) @ X
        noise = np.sqrt(((weight * (X @ np.ones(3) - y))[:, None] ** 2 * X**2 / odds[:, None]).sum(0) / (50 * 300))
        assert (np.abs(total / 300 - exact) < 5 * noise).all()


def test_the_answer_does_not_depend_on_the_coordinates_of_the_columns() -> None:
    X, y = table(2000, 5, 10, 3)
    M = np.random.default_rng(4).standard_normal((5, 5)) * [1e4, 1, 1, 1e-3, 1]
    settings = {"fit_intercept": False, "random_state": 0}
    plain = PreconditionedSGDRegressor(**settings).fit(X, y).predict(X)
    mixed = PreconditionedSGDRegressor(**settings).fit(X @ M, y).predict(X @ M)
    np.testing.assert_allclose(mixed, plain, rtol=0, atol=1e-8 * np.abs(plain).max())


def test_the_error_does_not_grow_with_the_condition() -> None:
    errors = []
    for condition in (10.0, 1e3, 1e6):
        X, y = table(20_000, 10, condition, 5)
        errors.append(max(excess(PreconditionedSGDRegressor(random_state=s).fit(X, y), X, y) for s in range(5)))
    assert max(errors) < 2e-3 and max(errors) < 2 * min(errors)


def test_the_sketchs_coordinates_are_worth_more_than_any_step_size() -> None:
    X, y = table(20_000, 10, 1e3, 6)
    ours = excess(PreconditionedSGDRegressor(fit_intercept=False, random_state=0).fit(X, y), X, y)
    plain = {"preconditioner": "none", "fit_intercept": False, "random_state": 0}
    rows = np.square(X).sum(1)
    best = np.inf
    for sampling, largest in (("row_norm", rows.sum()), ("uniform", len(X) * rows.max())):
        for factor in 10.0 ** np.arange(0, 4):
            model = PreconditionedSGDRegressor(sampling=sampling, eta0=factor / (2 * largest), **plain).fit(X, y)
            with np.errstate(over="ignore", invalid="ignore"):
                best = min(best, np.nan_to_num(excess(model, X, y), nan=np.inf))
    assert best > 20 * ours


@pytest.mark.parametrize("tau", [0.2, 0.5])
def test_quantile_loss_comes_close_to_the_linear_program(tau: float) -> None:
    X, y = table(2000, 4, 100, 7)

    def loss(prediction: np.ndarray) -> float:
        return float(np.where(y > prediction, tau * (y - prediction), (1 - tau) * (prediction - y)).sum())

    best = loss(LinearProgram(quantile=tau, alpha=0, solver="highs").fit(X, y).predict(X))
    model = PreconditionedSGDRegressor("quantile", quantile=tau, n_steps=100_000, random_state=0).fit(X, y)
    assert loss(model.predict(X)) < 1.001 * best
    if tau == 0.5:
        absolute = PreconditionedSGDRegressor("absolute", n_steps=100_000, random_state=0).fit(X, y)
        np.testing.assert_array_equal(absolute.coef_, model.coef_)


@pytest.mark.parametrize("preconditioner", ["full", "diag", "none"])
@pytest.mark.parametrize("constraint", ["nonneg", ("box", -0.3, 0.2), ("l2", 0.5)])
def test_constraints_hold_and_the_constrained_minimum_is_found(constraint: Any, preconditioner: str) -> None:
    rng = np.random.default_rng(8)
    X = rng.standard_normal((5000, 4)) @ (np.eye(4) + 0.5)
    y = X @ [1.0, -0.5, 0.1, 0.4] + 3 + 0.1 * rng.standard_normal(5000)
    model = PreconditionedSGDRegressor(
        constraint=constraint, preconditioner=preconditioner, n_steps=50_000, random_state=0
    ).fit(X, y)
    centred, target = X - X.mean(0), y - y.mean()
    if constraint == ("l2", 0.5):
        assert np.linalg.norm(model.coef_) <= 0.5 * (1 + 1e-12)
        ball = {"type": "ineq", "fun": lambda w: 0.25 - w @ w}
        best = minimize(lambda w: np.square(centred @ w - target).mean(), np.zeros(4), constraints=ball, tol=1e-12).x
    else:
        low, high = (0.0, np.inf) if constraint == "nonneg" else constraint[1:]
        assert low <= model.coef_.min() and model.coef_.max() <= high
        best = lsq_linear(centred, target, (low, high)).x
    error = np.square(y - model.predict(X)).mean() / np.square(centred @ best - target).mean() - 1
    assert -1e-9 < error < (1e-3 if preconditioner != "none" else 1e-2)


def test_projections_in_a_metric_meet_the_optimality_conditions() -> None:
    rng = np.random.default_rng(9)
    root = rng.standard_normal((5, 5))
    metric = root @ root.T + np.eye(5)
    wish = rng.standard_normal(5) * 3
    found = wish.copy()
    _project_on_box(metric, wish, found, -1.0, 0.5)
    slope = metric @ (found - wish)
    assert (np.abs(slope[(found > -1) & (found < 0.5)]) < 1e-9).all()
    assert (slope[found == -1.0] >= -1e-9).all() and (slope[found == 0.5] <= 1e-9).all()
    ball = wish.copy()
    _project_on_ball(*np.linalg.eigh(metric), ball, 0.7)
    assert np.linalg.norm(ball) == pytest.approx(0.7, rel=1e-12)
    slope = metric @ (wish - ball)
    np.testing.assert_allclose(slope / np.linalg.norm(slope), ball / 0.7, atol=1e-9)


def test_zero_rows_and_rows_of_weight_zero_are_never_drawn() -> None:
    X, y = table(500, 3, 10, 10)
    X[:100] = 0
    weight = np.where(np.arange(500) < 200, 0.0, 1.0)
    for basis in (np.eye(3), None):
        settings = {"basis": basis, "power": 2, "intercept": False}
        blocks = ArraySource(X if basis is not None else X + 1, y, weight)
        mass = _mass(blocks.iter_blocks(0), **settings)
        drawn = _drawn(blocks.iter_blocks(0), **settings, mass=mass, steps=5000, seed=0)
        assert np.isin(drawn.target, y[200:]).all() and drawn.count.sum() == pytest.approx(5000, abs=300)


def test_batches_of_partial_fit_reach_what_one_fit_reaches() -> None:
    X, y = table(20_000, 6, 1e3, 11)
    model = PreconditionedSGDRegressor(random_state=0)
    for begin in range(0, 20_000, 2000):
        model.partial_fit(X[begin : begin + 2000], y[begin : begin + 2000])
    assert model.n_steps_ == pytest.approx(40_000, rel=0.01)
    assert excess(model, X, y) < 5e-3
    assert not hasattr(PreconditionedSGDRegressor("absolute"), "partial_fit")


def test_results_do_not_depend_on_how_the_table_is_cut_or_stored(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    X, y = table(5000, 4, 10, 12)
    rows = pa.table({**{f"x{j}": X[:, j] for j in range(4)}, "y": y})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=900)
    for loss in ("squared", "absolute"):
        model = PreconditionedSGDRegressor(loss, random_state=0)
        expected = model.fit(X, y).coef_.copy()
        np.testing.assert_allclose(model.fit(sp.csr_array(X), y).coef_, expected, rtol=1e-8)
        for executor in ("serial", "dask"):
            model.set_params(executor=executor).fit(ParquetSource(tmp_path, target="y", block_rows=400))
            np.testing.assert_allclose(model.coef_, expected, rtol=1e-8)


def test_dependent_and_constant_columns_are_no_obstacle() -> None:
    X, y = table(5000, 3, 10, 13)
    doubled = np.column_stack([X, X[:, 0], np.zeros(5000), np.ones(5000)])
    for loss in ("squared", "absolute"):
        model = PreconditionedSGDRegressor(loss, n_steps=50_000, random_state=0)
        assert excess(model.fit(doubled, y), doubled, y) < 5e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge"}, 'loss is "hinge", expected one of squared, absolute, quantile'),
        ({"quantile": 1.0}, "quantile is 1.0"),
        ({"eta0": 0}, "eta0 is 0"),
        ({"n_steps": 0}, "n_steps is 0"),
        ({"constraint": ("box", 1, 0)}, "constraint is"),
        ({"constraint": ("l2", 0)}, "constraint is"),
        ({"preconditioner": "newton"}, "preconditioner is"),
    ],
)
def test_parameters_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreconditionedSGDRegressor(**settings).fit(np.eye(3), [1.0, 2.0, 3.0])


def test_a_source_with_other_than_one_target_is_refused() -> None:
    for targets, number in ((None, 0), (np.ones((5, 2)), 2)):
        with pytest.raises(ValueError, match=f"{number} targets, expected 1"):
            PreconditionedSGDRegressor().fit(ArraySource(np.ones((5, 2)), targets))


def test_a_table_of_zeros_is_refused() -> None:
    with pytest.raises(ValueError, match="all rows are zero"):
        PreconditionedSGDRegressor(fit_intercept=False).fit(np.zeros((5, 2)), np.ones(5))
