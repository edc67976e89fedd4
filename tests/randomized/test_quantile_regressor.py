"""Quantile regression: the exact cores, passes over a table, samples by scores, certificates."""

from __future__ import annotations

import pickle
import tracemalloc
import warnings
from functools import partial

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import linprog
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import QuantileRegressor as HighsRegressor
from sklearn.metrics import d2_pinball_score
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from fullrank.randomized import ArraySource, LADRegressor, ParquetSource, QuantileRegressor
from fullrank.randomized.conditioning import RankDeficientError, sparse_triangular, triangular
from fullrank.randomized.engine import map_reduce
from fullrank.randomized.interior_point import frisch_newton
from fullrank.randomized.pinball import Objective, Rows, objective_blocks, rho
from fullrank.randomized.subsampling import (
    conditioned_start,
    conditioner,
    score_sample,
    spanned_columns,
    uniform_start,
)


@parametrize_with_checks(
    [
        QuantileRegressor(),
        LADRegressor(),
        QuantileRegressor(solver="passes", random_state=0),
        QuantileRegressor(alpha=0.1, l1_ratio=0.5),
    ]
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def linear(n, d, seed, noise="laplace"):
    """X, y with a linear median; the noise is Laplace, or skewed and growing with the first feature."""
    draws = np.random.default_rng(seed)
    X = draws.standard_normal((n, d))
    error = draws.laplace(size=n) if noise == "laplace" else draws.exponential(size=n) * (0.2 + np.abs(X[:, 0]))
    return X, X @ draws.standard_normal(d) + 1 + error


def rare(n, seed):
    """One-hot rows whose blocks shrink geometrically to 60 rows, and a few outliers of the response."""
    draws = np.random.default_rng(seed)
    sizes = np.geomspace(60, n, 12).astype(int)
    column = np.repeat(np.arange(12), sizes)
    A = np.eye(12)[draws.permutation(column)]
    y = A @ draws.standard_normal(12) + 0.1 * draws.laplace(size=len(A))
    y[draws.random(len(A)) < 0.001] *= 500
    return A, y


def mean_loss(model, X, y, t, weight=None):
    return np.average(rho(y - X @ model.coef_ - model.intercept_, t), weights=weight)


@pytest.mark.parametrize("seed", range(20))
def test_exact_solvers_reach_the_optimum_of_highs(seed):
    draws = np.random.default_rng(seed)
    n, d = int(draws.integers(300, 3000)), int(draws.integers(2, 12))
    t = float(draws.choice([0.01, 0.1, 0.25, 0.5, 0.75, 0.95, 0.99]))
    X, y = linear(n, d, seed, "skewed")
    A = np.column_stack([np.ones(n), X])
    columns = sp.hstack([sp.csr_array(A), sp.eye_array(n), -sp.eye_array(n)])
    costs = np.r_[np.zeros(d + 1), np.full(n, t), np.full(n, 1 - t)]
    bounds = [(None, None)] * (d + 1) + [(0, None)] * (2 * n)
    optimum = linprog(costs, A_eq=columns, b_eq=y, bounds=bounds, method="highs").fun / n
    for solver in ("interior_point", "passes"):
        model = QuantileRegressor(t, solver=solver, random_state=seed).fit(X, y)
        assert model.objective_ == pytest.approx(optimum, rel=1e-9)
        assert model.objective_ == pytest.approx(mean_loss(model, X, y, t), rel=1e-12)
        assert -1e-12 <= model.dual_gap_ <= 1e-8
        # With an intercept, t n lies between the residuals below and not above zero.
        r = y - model.predict(X)
        assert (r < -1e-7).sum() <= t * n + 1e-9 and t * n - 1e-9 <= (r <= 1e-7).sum()


@pytest.mark.parametrize("l1_ratio", [0.0, 0.3, 1.0])
def test_penalties_are_those_of_scikit_learn_and_of_the_smooth_optimum(l1_ratio):
    X, y = linear(4000, 8, 0)
    t, alpha = 0.7, 0.05
    models = [
        QuantileRegressor(t, alpha=alpha, l1_ratio=l1_ratio, solver=s).fit(X, y) for s in ("interior_point", "passes")
    ]

    def penalised(coef, intercept):
        penalty = l1_ratio * np.abs(coef).sum() + (1 - l1_ratio) / 2 * coef @ coef
        return rho(y - X @ coef - intercept, t).mean() + alpha * penalty

    for model in models:
        assert model.objective_ == pytest.approx(penalised(model.coef_, model.intercept_), rel=1e-12)
        assert 0 <= model.dual_gap_ <= 1e-8
        for step in 1e-3 * np.random.default_rng(1).standard_normal((20, 9)):
            assert penalised(model.coef_ + step[1:], model.intercept_ + step[0]) >= model.objective_ * (1 - 1e-9)
    if l1_ratio == 1:
        peer = HighsRegressor(quantile=t, alpha=alpha).fit(X, y)
        assert models[0].objective_ == pytest.approx(penalised(peer.coef_, peer.intercept_), rel=1e-9)
        np.testing.assert_allclose(models[1].coef_, peer.coef_, atol=1e-5)


def test_intercept_alone_is_a_weighted_sample_quantile():
    draws = np.random.default_rng(3)
    y, weight = draws.standard_normal(101), draws.integers(1, 6, 101)
    order = np.argsort(y)
    crossing = y[order][np.searchsorted(np.cumsum(weight[order]), 0.3 * weight.sum())]
    with pytest.warns(UserWarning, match='"x0"'):
        model = QuantileRegressor(0.3).fit(np.zeros((101, 1)), y, weight)
    assert model.intercept_ == pytest.approx(crossing) and model.coef_ == 0


def test_equivariance():
    X, y = linear(6000, 5, 4, "skewed")
    draws = np.random.default_rng(0)
    fit = partial(QuantileRegressor, random_state=0)
    base = fit(0.8).fit(X, y)
    np.testing.assert_allclose(fit(0.8).fit(X, 3 * y).coef_, 3 * base.coef_, rtol=1e-5)
    np.testing.assert_allclose(fit(0.2).fit(X, -y).coef_, -base.coef_, rtol=1e-5)
    shift = draws.standard_normal(5)
    np.testing.assert_allclose(fit(0.8).fit(X, y + X @ shift).coef_, base.coef_ + shift, rtol=1e-5, atol=1e-6)
    M = draws.standard_normal((5, 5)) * np.geomspace(1e-3, 1e3, 5)
    moved = fit(0.8).fit(X @ M, y)
    assert moved.objective_ == pytest.approx(base.objective_, rel=1e-8)
    np.testing.assert_allclose(M @ moved.coef_, base.coef_, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", ["interior_point", "passes"])
def test_integer_weights_are_repetitions_and_zero_weights_are_absences(solver):
    X, y = linear(4000, 4, 5)
    weight = np.random.default_rng(5).integers(0, 4, 4000)
    fit = partial(QuantileRegressor, 0.6, solver=solver, random_state=0)
    weighted = fit().fit(X, y, weight)
    repeated = fit().fit(np.repeat(X, weight, axis=0), np.repeat(y, weight))
    assert weighted.objective_ == pytest.approx(repeated.objective_, rel=1e-10)
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, atol=1e-6)


def test_ties_of_the_median_are_broken_alike():
    X, y = np.ones((4, 1)), np.array([0.0, 1.0, 5.0, 9.0])
    lone = QuantileRegressor(fit_intercept=False).fit(X, y)
    pairs = QuantileRegressor(fit_intercept=False).fit(np.repeat(X, 2, axis=0), np.repeat(y, 2))
    assert lone.coef_ == pytest.approx(5.0) and pairs.coef_ == pytest.approx(5.0)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("case", ["laplace", "skewed", "integers", "one value", "rare", "heavy rows"])
def test_passes_equal_the_interior_point_method(case, t):
    draws = np.random.default_rng(6)
    if case == "rare":
        X, y = rare(2000, 0)
    else:
        X, y = linear(8000, 6, 6, "laplace" if case == "laplace" else "skewed")
    if case == "integers":
        X, y = np.round(X), np.round(y)
    if case == "one value":
        y[draws.random(8000) < 0.6] = 0
    if case == "heavy rows":
        scale = np.abs(draws.standard_cauchy(8000))
        X, y = X * scale[:, None], y * scale
    intercept = case != "rare"
    fit = partial(QuantileRegressor, t, fit_intercept=intercept, random_state=0)
    whole, passes = fit(solver="interior_point").fit(X, y), fit(solver="passes").fit(X, y)
    assert passes.objective_ == pytest.approx(whole.objective_, rel=2e-8)
    assert passes.dual_gap_ <= 1e-8 and whole.dual_gap_ <= 1e-8


def test_certificates_are_never_wrong():
    """However early a solver is stopped, the optimum is not below the bound; 300 small problems, many degenerate."""
    for seed in range(300):
        draws = np.random.default_rng([7, seed])
        n, d = int(draws.integers(8, 60)), int(draws.integers(1, 5))
        X = draws.standard_normal((n, d)) if seed % 3 else np.round(2 * draws.standard_cauchy((n, d)))
        y = np.round(draws.standard_cauchy(n), int(draws.integers(0, 4)))
        t = float(draws.uniform(0.02, 0.98))
        rows = Rows(np.column_stack([np.ones(n), X]), y, np.ones(n), np.zeros(n), np.arange(n))
        objective = Objective(t, True)
        R = objective.triangular(rows)
        if np.abs(np.diag(R)).min() < 1e-9:
            continue
        best = objective.solve(rows, tol=1e-12, pivots=100).coef
        optimum = rho(y - rows.A @ best, t).sum()
        for iterations in (1, 3, 6, 50):
            small = objective.solve(rows, max_iter=iterations)
            loss = rho(y - rows.A @ small.coef, t).sum()
            certificate = objective.certificate(
                small.coef, loss, 0.0, rows, small, np.zeros(d + 1), np.eye(d + 1), R, False
            )
            assert certificate.lower_bound <= optimum * (1 + 1e-10) + 1e-12


def test_a_poor_dual_is_not_a_proof():
    X, y = linear(500, 3, 8)
    n = len(y)
    rows = Rows(np.column_stack([np.ones(n), X]), y, np.ones(n), np.zeros(n), np.arange(n))
    objective = Objective(0.5, True)
    small = objective.solve(rows)
    wrong = type(small)(small.coef, np.zeros(n), 0.0, 1, True)
    loss = rho(y - rows.A @ small.coef, 0.5).sum()
    certificate = objective.certificate(
        wrong.coef, loss, 0.0, rows, wrong, np.zeros(4), np.eye(4), objective.triangular(rows), False
    )
    assert certificate.relative_gap == pytest.approx(1.0)


@pytest.mark.parametrize("condition", [1e4, 1e7, 1e10])
def test_condition_does_not_matter(condition):
    draws = np.random.default_rng(21)
    Z = draws.standard_normal((8000, 6))
    left, right = (np.linalg.qr(draws.standard_normal((6, 6)))[0] for _ in range(2))
    y = Z @ draws.standard_normal(6) + draws.laplace(size=8000)
    A = Z @ (left * np.geomspace(1, 1 / condition, 6)) @ right
    best = QuantileRegressor(0.6, fit_intercept=False).fit(Z, y).objective_
    for solver in ("interior_point", "passes"):
        model = QuantileRegressor(0.6, fit_intercept=False, solver=solver, random_state=0).fit(A, y)
        # Rounding A moves the optimum itself by about eps times the condition.
        assert model.objective_ == pytest.approx(best, rel=1e-9 + 1e-15 * condition)
        assert model.dual_gap_ <= 1e-8


def test_several_quantiles_and_their_order():
    X, y = linear(5000, 3, 9, "skewed")
    quantiles = [0.1, 0.5, 0.52, 0.9]
    model = QuantileRegressor(quantiles, random_state=0).fit(X, y)
    for k, t in enumerate(quantiles):
        assert model.objective_[k] == pytest.approx(QuantileRegressor(t).fit(X, y).objective_, rel=1e-8)
    far = 50 * X
    crossing = model.predict(far)
    assert (np.diff(crossing, axis=1) < 0).any()
    ordered = model.set_params(non_crossing=True).predict(far)
    np.testing.assert_array_equal(ordered, np.sort(crossing, axis=1))


@pytest.mark.parametrize("case", ["skewed", "weights", "absolute", "no intercept", "ties"])
def test_several_quantiles_share_their_passes_and_have_the_optima_of_separate_fits(case):
    X, y = linear(12000, 4, 31, "skewed")
    weight = np.random.default_rng(1).exponential(size=len(y)) ** 3 if case == "weights" else None
    if case == "ties":
        y = np.maximum(y, 0)
    fit = partial(
        QuantileRegressor,
        alpha=0.02 if case == "absolute" else 0.0,
        fit_intercept=case != "no intercept",
        solver="passes",
        random_state=0,
    )
    quantiles = [0.01, 0.3, 0.5, 0.95]
    together = fit(quantiles).fit(X, y, weight)
    apart = [fit(t).fit(X, y, weight) for t in quantiles]
    np.testing.assert_allclose(together.objective_, [model.objective_ for model in apart], rtol=1e-8)
    assert together.dual_gap_.max() <= 1e-8
    assert together.n_passes_ == max(model.n_passes_ for model in apart)


def test_sorted_quantiles_never_cross_and_have_no_more_pinball_loss():
    X, y = linear(400, 6, 3, "skewed")
    grid = np.arange(1, 20) / 20
    crossing = QuantileRegressor(grid, random_state=0).fit(X, y)
    ordered = QuantileRegressor(grid, non_crossing=True, random_state=0).fit(X, y)
    assert (np.diff(crossing.predict(X), axis=1) < 0).any()
    assert (np.diff(ordered.predict(X), axis=1) >= 0).all()
    before, after = (rho(y[:, None] - model.predict(X), grid).sum() for model in (crossing, ordered))
    assert after < before


def test_dense_sparse_float32_parquet_threads_and_dask_give_one_solution(tmp_path):
    import dask.array as da
    import pyarrow as pa
    import pyarrow.parquet as pq

    X, y = linear(9000, 5, 10)
    X = np.where(np.abs(X) < 1, 0, X).astype(np.float32).astype(np.float64)
    weight = np.random.default_rng(0).uniform(0.5, 2, 9000)
    columns = {f"x{j}": X[:, j] for j in range(5)} | {"y": y, "w": weight}
    for part in range(3):
        rows = slice(3000 * part, 3000 * (part + 1))
        table = pa.table({name: values[rows] for name, values in columns.items()})
        pq.write_table(table, tmp_path / f"{part}.parquet", row_group_size=1000)
    fit = partial(QuantileRegressor, [0.5, 0.9], random_state=0)
    dense = fit().fit(X, y, weight)
    others = [
        fit().fit(sp.csr_array(X), y, weight),
        fit().fit(X.astype(np.float32), y, weight),
        fit().fit(ParquetSource(tmp_path, target="y", weight="w")),
        fit(executor="threads").fit(ParquetSource(tmp_path, target="y", weight="w", block_rows=300)),
        fit(executor="dask").fit(ArraySource(X, y, weight, fragment_rows=2000)),
        fit(executor="dask").fit(*(da.from_array(part, 2000) for part in (X, y, weight))),
    ]
    for other in others:
        assert other.solver_used_ == "passes"
        np.testing.assert_allclose(other.coef_, dense.coef_, rtol=1e-7, atol=1e-9)
    for streamed in (others[2], others[-1]):
        assert streamed.n_passes_ == dense.n_passes_


def test_one_quantile_takes_five_passes_and_a_sample_by_scores_three():
    X, y = linear(20000, 5, 11)
    assert QuantileRegressor(0.5, random_state=0).fit(X, y).n_passes_ == 5
    model = QuantileRegressor(0.5, solver="sketch", conditioning="spc1", random_state=0).fit(X, y)
    assert model.n_passes_ == 3 and model.dual_gap_ is None


def test_a_uniform_sample_loses_rare_features_and_scores_do_not():
    A, y = rare(20000, 1)
    source = ArraySource(A, y)
    objective = Objective(0.5, False)
    exact = QuantileRegressor(0.5, fit_intercept=False, random_state=0).fit(A, y)
    lost, excess = 0, []
    for seed in range(10):
        uniform = uniform_start(source, objective, 300, seed, "serial")
        lost += np.abs(np.diag(uniform.R)).min() < 1e-9
        R = conditioner(source, "spc3", False, None, seed, "serial")
        start = conditioned_start(source, objective, R, 1000, seed, "serial")
        coef = objective.solve(start.rows).coef
        excess.append(rho(y - A @ coef, 0.5).mean() / exact.objective_ - 1)
    assert lost >= 1
    assert np.median(excess) <= 2e-2 and max(excess) <= 0.1


def test_passes_find_the_optimum_of_features_with_few_rows():
    """Some columns have three rows only: no uniform sample has them all, and a narrow band has none of some."""
    draws = np.random.default_rng(22)
    A = np.column_stack([np.zeros((12000, 6)), draws.standard_normal((12000, 3))])
    for j in range(6):
        A[draws.choice(12000, 3, replace=False), j] = 1
    y = A @ draws.standard_normal(9) + draws.standard_t(2, 12000)
    fit = partial(QuantileRegressor, 0.4, random_state=0)
    passes, whole = fit(solver="passes").fit(A, y), fit(solver="interior_point").fit(A, y)
    assert passes.objective_ == pytest.approx(whole.objective_, rel=1e-8)
    assert passes.dual_gap_ <= 1e-8


def test_scores_embed_the_loss_where_a_uniform_sample_does_not():
    """rho(S A x) / rho(A x) near one for directions x along rare features too."""
    A, y = rare(20000, 2)
    source, t = ArraySource(A, y), 0.7
    R = conditioner(source, "spc3", False, None, 0, "serial")
    rows, inverse = score_sample(source, R, 3000, False, 0, 5, "serial")
    uniform = uniform_start(source, Objective(t, False), 3000, 0, "serial")
    draws = np.random.default_rng(0)
    directions = np.vstack([np.eye(12), draws.standard_normal((188, 12))])
    mine, theirs = [], []
    for x in directions:
        whole = rho(A @ x, t).sum()
        mine.append((inverse @ rho(rows.A @ x, t)) / whole - 1)
        theirs.append(rho(uniform.rows.A @ x, t).sum() / uniform.share / whole - 1)
    assert np.abs(mine).max() <= 0.35
    assert np.abs(theirs).max() > 0.35


def test_sampling_by_scores_is_the_coin_of_every_row():
    """The one-pass draw equals an independent two-pass draw with the same coins."""
    from fullrank.randomized.sketches import row_uniforms

    A, y = rare(2000, 3)
    source = ArraySource(A, y, block_rows=500, fragment_rows=1500)
    R = conditioner(source, "spc1", False, None, 0, "serial")
    rows, inverse = score_sample(source, R, 400, False, 9, 5, "serial")
    q = np.abs(np.column_stack([A, y]) @ np.linalg.inv(R)).sum(axis=1)
    p = np.minimum(1, 400 * q / q.sum())
    np.testing.assert_array_equal(rows.index, np.flatnonzero(row_uniforms(9, 0, len(y), 5) < p))
    np.testing.assert_allclose(inverse, 1 / p[rows.index])


@pytest.mark.parametrize("kind", ["spc1", "spc2", "spc3", "cauchy", "none", "uniform"])
def test_sketched_objective_is_near_the_optimum(kind):
    X, y = linear(30000, 6, 12, "skewed")
    exact = QuantileRegressor([0.25, 0.75], random_state=0).fit(X, y)
    for norms in ("exact", "estimated"):
        model = QuantileRegressor(
            [0.25, 0.75], solver="sketch", conditioning=kind, row_norms=norms, sketch_size=5000, random_state=0
        ).fit(X, y)
        assert (model.objective_ >= exact.objective_ * (1 - 1e-8)).all()
        assert (model.objective_ <= exact.objective_ * (1 + 5e-3)).all()
        if kind == "uniform":
            break


def test_epsilon_is_reached():
    X, y = linear(100000, 6, 13)
    exact = QuantileRegressor([0.5, 0.9], random_state=0).fit(X, y)
    for seed in range(3):
        model = QuantileRegressor([0.5, 0.9], solver="sketch", sketch_size=500, epsilon=1e-3, random_state=seed).fit(
            X, y
        )
        assert (model.objective_ / exact.objective_ - 1 <= 1e-3).all()
        assert model.n_sampled_[0] < 100000


def test_response_inside_the_span_is_fitted_exactly():
    X = np.random.default_rng(0).standard_normal((6000, 4))
    y = X @ [1.0, 2.0, 3.0, 4.0] - 1
    for solver in ("interior_point", "passes", "sketch"):
        model = QuantileRegressor(0.4, solver=solver, random_state=0).fit(X, y)
        np.testing.assert_allclose(model.coef_, [1, 2, 3, 4], atol=1e-6)


@pytest.mark.parametrize("solver", ["interior_point", "passes", "sketch"])
def test_dependent_columns(solver):
    X, y = linear(6000, 3, 14)
    wide = np.column_stack([X, X[:, 0] - X[:, 2], np.full(6000, 2.0)])
    fit = partial(QuantileRegressor, 0.5, solver=solver, random_state=0)
    with pytest.raises(RankDeficientError, match='"x3", "x4"'):
        fit(rank_policy="raise").fit(wide, y)
    with pytest.warns(UserWarning, match='"x3", "x4"'):
        model = fit().fit(wide, y)
    assert (model.coef_[3:] == 0).all()
    if solver != "sketch":
        assert model.objective_ == pytest.approx(QuantileRegressor(0.5).fit(X, y).objective_, rel=1e-8)


def test_fewer_rows_than_columns():
    X, y = linear(5, 12, 15)
    with pytest.warns(UserWarning, match="rank 5 of 13"):
        model = QuantileRegressor().fit(X, y)
    np.testing.assert_allclose(model.predict(X), y, atol=1e-6)
    ridge = QuantileRegressor(alpha=0.1, l1_ratio=0).fit(X, y)
    assert (ridge.coef_ != 0).all() and ridge.dual_gap_ <= 1e-8


def test_zero_rows_and_repeated_rows_are_harmless():
    X, y = linear(5000, 3, 16)
    X[:2000] = 0
    X[2000:3000], y[2000:3000] = X[2000], y[2000]
    fit = partial(QuantileRegressor, 0.3, fit_intercept=False, random_state=0)
    assert fit(solver="passes").fit(X, y).objective_ == pytest.approx(
        fit(solver="interior_point").fit(X, y).objective_, rel=2e-8
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"quantile": 0.0}, "quantile"),
        ({"quantile": float("nan")}, "quantile"),
        ({"quantile": []}, "quantile"),
        ({"quantile": [0.5, 0.1], "non_crossing": True}, "ascending"),
        ({"solver": "simplex"}, "interior_point"),
        ({"conditioning": "spc4"}, "spc3"),
        ({"rank_policy": "ignore"}, "drop"),
        ({"alpha": -1}, "alpha"),
        ({"l1_ratio": 2}, "l1_ratio"),
        ({"tol": 0}, "tol"),
        ({"max_iter": 0}, "max_iter"),
    ],
)
def test_parameters_out_of_range_are_named(parameters, message):
    with pytest.raises(ValueError, match=message):
        QuantileRegressor(**parameters).fit(*linear(50, 2, 0))


def test_bad_rows_are_refused():
    X, y = linear(50, 2, 0)
    for weight in (np.zeros(50), -np.ones(50)):
        with pytest.raises(ValueError):
            QuantileRegressor().fit(X, y, weight)
    with pytest.raises(ValueError, match="leave y"):
        QuantileRegressor().fit(ArraySource(X, y), y)
    with pytest.raises(ValueError, match="target"):
        QuantileRegressor().fit(ArraySource(X))


def test_stopping_early_warns():
    X, y = linear(500, 4, 17)
    with pytest.warns(Warning, match="raise max_iter"):
        QuantileRegressor(0.9, max_iter=1, alpha=0.1, l1_ratio=0).fit(X, y)


def test_per_row_quantiles_and_the_linear_term_of_the_core():
    """Rows of known sign may be replaced by their sum."""
    X, y = linear(300, 3, 18)
    t = np.random.default_rng(0).uniform(0.2, 0.8, 300)
    whole = frisch_newton(X, y, t, tol=1e-12)
    r = y - X @ whole.coef
    near = np.abs(r) < np.quantile(np.abs(r), 0.5)
    z = np.where(r < 0, t - 1, t)
    part = frisch_newton(X[near], y[near], t[near], linear=-X[~near].T @ z[~near], scale=100.0, tol=1e-13)
    np.testing.assert_allclose(part.coef, whole.coef, atol=1e-7)
    sparse = frisch_newton(sp.csr_array(X), y, t, tol=1e-12)
    np.testing.assert_allclose(sparse.coef, whole.coef, atol=1e-8)


def test_losses_at_several_points():
    X, y = linear(1000, 3, 19)
    points = [[np.zeros(4), np.ones(4)], [np.ones(4), np.zeros(4)]]
    objectives = [Objective(0.2, True), Objective(0.9, True)]
    source = ArraySource(X, y, block_rows=100)
    values = map_reduce(source, partial(objective_blocks, points=points, objectives=objectives))
    assert values[1, 0] == pytest.approx(rho(y - X.sum(axis=1) - 1, 0.9).sum())


def test_lad_is_the_median_and_survives_pickle():
    X, y = linear(2000, 3, 20)
    lad = LADRegressor().fit(X, y)
    median = QuantileRegressor(0.5).fit(X, y)
    np.testing.assert_allclose(lad.coef_, median.coef_, atol=1e-9)
    assert lad.objective_ == pytest.approx(np.abs(y - lad.predict(X)).mean() / 2, rel=1e-9)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(lad)).predict(X), lad.predict(X))


def test_a_sum_without_minimum_stops_before_numbers_overflow() -> None:
    # As in a band whose few rows cannot hold what all other rows pull.
    draws = np.random.default_rng(0)
    A = np.column_stack([np.ones(14), draws.standard_normal(14)])
    result = frisch_newton(A, draws.standard_normal(14).round(1), 0.6, linear=np.array([-8.0, 0.3]), max_iter=500)
    assert not result.converged
    assert result.n_iter < 20
    assert np.isfinite(result.coef).all()


def test_an_extreme_quantile_takes_hardly_more_steps_than_the_median() -> None:
    draws = np.random.default_rng(3)
    X = draws.standard_normal((10_000, 49))
    y = X.sum(axis=1) + draws.laplace(size=len(X))
    for t in (0.5, 0.01, 0.975):
        model = QuantileRegressor(t, random_state=1, solver="passes").fit(X, y)
        assert model.dual_gap_ <= 1e-8
        assert model.n_passes_ <= 6
        assert model.n_iter_ < 40


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("solver", ["interior_point", "passes", "sketch"])
@pytest.mark.parametrize("settings", [{}, {"alpha": 0.1}, {"alpha": 0.1, "l1_ratio": 0.0}, {"fit_intercept": False}])
def test_a_response_without_noise_is_fitted_exactly(solver, settings):
    X = np.tile(np.random.default_rng(0).standard_normal((500, 3)), (8, 1))
    weight = np.where(np.arange(4000) % 9 == 0, 0.0, 1.0)
    for y, w in ((np.zeros(4000), None), (np.where(weight > 0, 0.0, 5.0), weight)):
        model = QuantileRegressor([0.3, 0.9], solver=solver, random_state=0, **settings).fit(X, y, w)
        assert not model.coef_.any() and not np.any(model.intercept_) and not model.objective_.any()
        assert solver == "sketch" or not model.dual_gap_.any()
    if settings.get("fit_intercept", True):
        model = QuantileRegressor(0.3, solver=solver, random_state=0, **settings).fit(X, np.full(4000, 7.0))
        np.testing.assert_allclose(model.predict(X), 7.0, rtol=1e-9)


TIED = {
    "zeros": lambda draws, X: np.where(draws.random(len(X)) < 0.7, 0.0, draws.lognormal(size=len(X)) * np.exp(X[:, 0])),
    "counts": lambda draws, X: draws.poisson(np.exp(0.3 * X[:, 0] - 1)).astype(float),
    "clicks": lambda draws, X: (draws.random(len(X)) < 0.02).astype(float),
    "rounded": lambda draws, X: np.round(X.sum(axis=1) + draws.standard_normal(len(X))),
}


@pytest.mark.parametrize("case", TIED)
def test_ties_are_solved_and_proved_in_bounded_memory(case, monkeypatch):
    """However many rows tie, the band holds no more rows than it may, and the optimum is the one of all rows."""
    monkeypatch.setattr("fullrank.randomized.preprocessing.BAND_CELLS", 10_000)
    draws = np.random.default_rng(3)
    X = draws.standard_normal((20_000, 4))
    y = TIED[case](draws, X)
    weight = draws.integers(0, 3, 20_000).astype(float)
    for t, w in ((0.3, None), (0.5, weight), (0.7, None), (0.9, weight)):
        model = QuantileRegressor(t, solver="passes", random_state=0).fit(X, y, w)
        best = QuantileRegressor(t, solver="interior_point").fit(X, y, w)
        assert model.dual_gap_ <= 1e-8 and model.n_band_ <= 2000
        np.testing.assert_allclose(model.objective_, best.objective_, rtol=2e-8)


def test_memory_does_not_grow_with_the_rows_that_tie(monkeypatch):
    monkeypatch.setattr("fullrank.randomized.preprocessing.BAND_CELLS", 30_000)
    X = np.random.default_rng(4).standard_normal((200_000, 2))
    y = np.where(X[:, 0] > 1, X[:, 1] ** 2, 0.0)
    tracemalloc.start()
    try:
        model = QuantileRegressor(0.6, random_state=0).fit(ArraySource(X, y, block_rows=10_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert model.dual_gap_ <= 1e-8
    assert peak < 12e6  # all rows and what a solver makes of them take ten times that


@pytest.mark.parametrize("seed", range(8))
def test_a_certificate_is_of_the_coefficients_that_are_returned(seed):
    """Evaluated in long double, the objective of coef_ is no more above the bound than is proved, and not below it."""
    draws = np.random.default_rng([9, seed])
    n, d, t = int(draws.integers(300, 3000)), int(draws.integers(2, 9)), float(draws.choice([0.05, 0.5, 0.9]))
    Z = draws.standard_normal((n, d))
    U, V = (np.linalg.qr(draws.standard_normal((d, d)))[0] for _ in range(2))
    y = Z @ draws.standard_normal(d) + draws.laplace(size=n) + (1e8 if seed == 3 else 0.0)
    for condition in (1e3, 1e6, 1e9, 1e11, 1e12):
        X = Z @ (U * np.logspace(0, -np.log10(condition), d)) @ V
        for solver in ("interior_point", "passes"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # rounding of coef_ may cost more than tol
                model = QuantileRegressor(t, solver=solver, random_state=0).fit(X, y)
            left = y.astype(np.longdouble) - np.longdouble(model.intercept_)
            for j in range(d):
                left -= X[:, j].astype(np.longdouble) * np.longdouble(model.coef_[j])
            true = rho(left, t).mean()
            bound = np.longdouble(model.objective_) * (1 - np.longdouble(model.dual_gap_))
            assert -1e-13 <= (true - bound) / true <= max(1.01 * model.dual_gap_, 1e-13)


def one_hot(n: int, sizes: tuple[int, ...], seed: int) -> tuple[sp.csr_array, np.ndarray]:
    draws = np.random.default_rng(seed)
    ids = np.column_stack([(draws.zipf(1.3, n) - 1) % size for size in sizes]) + np.cumsum([0, *sizes[:-1]])
    X = sp.csr_array((np.ones(ids.size), ids.ravel(), np.arange(0, ids.size + 1, len(sizes))), shape=(n, sum(sizes)))
    return X, X @ draws.standard_normal(sum(sizes)) + draws.lognormal(0, 1, n)


@pytest.mark.filterwarnings("ignore:rank")
@pytest.mark.parametrize("settings", [{}, {"alpha": 1e-3}, {"alpha": 1e-3, "l1_ratio": 0.5}, {"fit_intercept": False}])
@pytest.mark.parametrize("pairs", [0, 2**23])
def test_sparse_rows_have_the_optimum_of_dense_ones(settings, pairs, monkeypatch):
    monkeypatch.setattr("fullrank.randomized.interior_point.MOST_PAIRS", pairs)
    for seed in range(3):
        X, y = one_hot(1500, (10, 25), seed)
        weight = np.random.default_rng(seed).integers(0, 3, 1500).astype(float) if seed else None
        for t in (0.2, 0.5):
            ours = QuantileRegressor(t, solver="interior_point", **settings).fit(X, y, weight)
            dense = QuantileRegressor(t, solver="interior_point", **settings).fit(X.toarray(), y, weight)
            assert ours.dual_gap_ <= 1e-8
            np.testing.assert_allclose(ours.objective_, dense.objective_, rtol=2e-8)


@pytest.mark.filterwarnings("ignore:rank")
def test_wide_sparse_rows_are_never_made_dense():
    X, y = one_hot(20_000, (30, 200, 170), 5)
    tracemalloc.start()
    try:
        model = QuantileRegressor(0.5).fit(X, y)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert model.solver_used_ == "interior_point" and model.dual_gap_ <= 1e-8
    assert peak < 0.7 * 8 * X.shape[0] * X.shape[1]
    best = linprog(-y, A_eq=X.T, b_eq=np.zeros(400), bounds=(-0.5, 0.5), method="highs")  # a level each holds a one
    np.testing.assert_allclose(model.objective_ * len(y), -best.fun, rtol=2e-8)


def test_a_sparse_factor_is_that_of_dense_rows():
    X = one_hot(400, (5, 9), 6)[0]
    for A in (X, sp.csr_array(sp.hstack([X, X[:, [3]] * 2, 1e-6 * X[:, [1]] + X[:, [2]]]))):
        R = sparse_triangular(A)
        np.testing.assert_allclose(R.T @ R, (A.T @ A).toarray(), atol=1e-9)
        truth = triangular(A.toarray())
        np.testing.assert_array_equal(spanned_columns(R), spanned_columns(truth))


@pytest.mark.parametrize("seed", range(20))
def test_the_vertex_is_optimal_where_the_interior_solution_is_not_unique(seed):
    X, y = one_hot(300, (4, 8), seed)
    y = np.round(y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        assert QuantileRegressor(0.5, solver="interior_point").fit(X.toarray(), y).dual_gap_ <= 1e-12


def test_the_score_is_the_pinball_loss_saved_and_a_grid_search_maximises_it(tmp_path):
    X, y = linear(400, 3, 12)
    weight = np.random.default_rng(0).random(400)
    model = QuantileRegressor([0.2, 0.9]).fit(X, y)
    expected = [
        d2_pinball_score(y, model.predict(X)[:, j], sample_weight=weight, alpha=t) for j, t in ((0, 0.2), (1, 0.9))
    ]
    np.testing.assert_allclose(model.score(X, y, weight), np.mean(expected))
    np.testing.assert_allclose(model.score(ArraySource(X, y, weight, fragment_rows=90)), np.mean(expected))
    noise = np.random.default_rng(1).standard_normal((400, 60))
    wide = np.column_stack([X, noise])
    search = GridSearchCV(QuantileRegressor(0.7), {"alpha": [0.0, 0.03, 100.0]}, cv=3).fit(wide, y)
    losses = {}
    for alpha in (0.0, 0.03, 100.0):
        folds = [(np.delete(np.arange(400), part), part) for part in np.array_split(np.arange(400), 3)]
        fits = [(QuantileRegressor(0.7, alpha=alpha).fit(wide[train], y[train]), part) for train, part in folds]
        losses[alpha] = np.mean([rho(y[part] - fit.predict(wide[part]), 0.7).mean() for fit, part in fits])
    assert search.best_params_["alpha"] == min(losses, key=losses.get) == 0.03
