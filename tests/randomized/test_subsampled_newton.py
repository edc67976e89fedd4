from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from fullrank.randomized import (
    ArraySource,
    ParquetSource,
    SubsampledNewtonClassifier,
    SubsampledNewtonRegressor,
)
from fullrank.randomized.curvature import (
    Constant,
    Problem,
    draw_by_target,
    evaluate,
    full_curvature,
    sampled_curvature,
)
from fullrank.randomized.draws import Draw, Sample
from fullrank.randomized.hessian import gram
from fullrank.randomized.losses import LOSSES
from fullrank.randomized.newton import subsampled_newton


def logistic_table(n: int, d: int, seed: int, condition: float = 1e3) -> tuple[np.ndarray, np.ndarray]:
    """Columns of very different scale, rows of lognormal length, clicks from a true model."""
    rng = np.random.default_rng(seed)
    scale_d = np.logspace(0, -np.log10(condition), d)
    X = rng.standard_normal((n, d)) * scale_d * rng.lognormal(size=(n, 1))
    margin = X @ (rng.standard_normal(d) / scale_d / np.sqrt(d)) - 0.5
    return X, (rng.random(n) < 1 / (1 + np.exp(-margin))).astype(float)


def problem(X: Any, y: np.ndarray, penalty: float = 1.0, loss: str = "logistic", intercept: bool = False) -> Problem:
    return Problem(ArraySource(X, y), LOSSES[loss], penalty, intercept)


@parametrize_with_checks(
    [
        SubsampledNewtonClassifier(),
        SubsampledNewtonClassifier(sampling="row_norm", sample_size=100, C=0.1),
        SubsampledNewtonRegressor(),
        SubsampledNewtonRegressor("poisson"),
    ]
)
def test_scikit_learn_contract(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_derivatives_are_those_of_the_value(loss: str) -> None:
    margin, target = np.linspace(-6, 6, 41), np.tile([0.0 if loss != "gamma" else 2.0, 1.0, 0.3], 14)[:41]
    value, slope, curvature = LOSSES[loss](margin, target)
    above, below = (LOSSES[loss](margin + h, target) for h in (1e-5, -1e-5))
    np.testing.assert_allclose(value, LOSSES[loss].value(margin, target))
    np.testing.assert_allclose(slope, (above.value - below.value) / 2e-5, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(curvature, (above.slope - below.slope) / 2e-5, rtol=1e-6, atol=1e-8)


def test_logistic_loss_is_exact_at_margins_that_overflow_an_exponential() -> None:
    value, slope, curvature = LOSSES["logistic"](np.array([-1000.0, 1000.0]), np.array([1.0, 1.0]))
    assert value.tolist() == [1000.0, 0.0] and slope.tolist() == [-1.0, 0.0] and curvature.tolist() == [0.0, 0.0]


def test_all_rows_give_newtons_iterates() -> None:
    X, y = logistic_table(500, 6, 0, condition=10)
    points: list[np.ndarray] = []
    subsampled_newton(problem(X, y), sampling="none", line_search=False, tol=1e-12, callback=points.append)
    w = np.zeros(6)
    for point in points:
        np.testing.assert_allclose(point, w, rtol=1e-10, atol=1e-12)
        p = 1 / (1 + np.exp(-X @ w))
        H = X.T @ np.diag(p * (1 - p)) @ X + np.eye(6)
        w = w - np.linalg.inv(H) @ (X.T @ (p - y) + w)


@pytest.mark.parametrize("sampling", ["none", "leverage", "row_norm", "uniform"])
@pytest.mark.parametrize("sparse", [False, True])
def test_classifier_finds_the_minimum_that_scikit_learn_finds(sampling: str, sparse: bool) -> None:
    X, y = logistic_table(4000, 8, 1)
    weight = np.random.default_rng(2).integers(0, 3, 4000).astype(float)
    theirs = LogisticRegression(C=2.0, solver="newton-cholesky", tol=1e-12).fit(X, y, weight)
    ours = SubsampledNewtonClassifier(2.0, sampling=sampling, tol=1e-9, random_state=0)
    ours.fit(sp.csr_array(X) if sparse else X, y, weight)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-6)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-6)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), rtol=1e-5, atol=1e-9)
    assert (ours.history_[-1].rows == 4000) == (sampling == "none")


@pytest.mark.parametrize("sampling", ["none", "leverage", "row_norm"])
def test_regressors_find_the_minima_that_scikit_learn_finds(sampling: str) -> None:
    rng = np.random.default_rng(3)
    X = rng.standard_normal((5000, 5)) * [1, 1, 0.1, 10, 1]
    y = X @ [1, -1, 3, 0.1, 0] + rng.standard_normal(5000) + 7
    ours = SubsampledNewtonRegressor(alpha=3.0, sampling=sampling, tol=1e-9, random_state=0).fit(X, y)
    theirs = Ridge(3.0).fit(X, y)
    np.testing.assert_allclose(np.append(ours.coef_, ours.intercept_), np.append(theirs.coef_, theirs.intercept_), 1e-7)
    counts = rng.poisson(np.exp(0.02 * y))
    ours = SubsampledNewtonRegressor("poisson", alpha=3.0, sampling=sampling, tol=1e-9, random_state=0).fit(X, counts)
    theirs = PoissonRegressor(alpha=3.0 / 5000, tol=1e-12, max_iter=1000, solver="newton-cholesky").fit(X, counts)
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-6)


def test_squared_loss_and_all_rows_are_solved_in_one_step() -> None:
    X, y = np.random.default_rng(4).standard_normal((200, 3)), np.arange(200.0)
    result = subsampled_newton(problem(X, y, loss="squared"), sampling="none")
    assert len(result.history) == 2
    np.testing.assert_allclose(result.coef, np.linalg.solve(X.T @ X + np.eye(3), X.T @ y))


@pytest.mark.parametrize("sampling", ["uniform", "row_norm", "leverage"])
def test_the_sampled_hessian_is_right_in_the_mean(sampling: Any) -> None:
    X, y = logistic_table(400, 3, 5, condition=10)
    weight = np.random.default_rng(6).random(400)
    whole = Problem(ArraySource(X, y, weight), LOSSES["logistic"], 0.5, True)
    coef = np.array([0.3, -0.2, 0.1, 0.4])
    exact = full_curvature(whole, coef)
    p = 1 / (1 + np.exp(-(X @ coef[:3] + coef[3])))
    curvature = weight * p * (1 - p)
    ones = np.column_stack([X, np.ones(400)])
    hessian = ones.T @ (curvature[:, None] * ones)
    np.testing.assert_allclose(np.tril(exact.factor[0]) @ np.tril(exact.factor[0]).T, hessian + np.diag(whole.ridge()))
    basis = exact.basis(9, np.random.default_rng(0))
    draws = []
    for stream in range(500):
        draw = Draw(sampling, 60, 1.0, 0, stream, basis)
        draw = draw._replace(mass=float(draw.scores(X, True, curvature).sum()))
        sample = Sample.joined(whole.total(evaluate, coef=coef, draw=draw).sample)
        slope = LOSSES["logistic"](sample.rows @ coef, sample.target).curvature
        draws.append(gram(sample.rows, sample.weight * slope))
    error = np.mean(draws, axis=0) - hessian
    assert (np.abs(error) <= 5 * np.std(draws, axis=0) / np.sqrt(500) + 1e-12).all()


def test_leverage_scores_sum_to_the_effective_dimension_and_become_row_norms_under_a_large_penalty() -> None:
    X, y = logistic_table(2000, 6, 7, condition=10)
    curvature = LOSSES["logistic"](X @ np.ones(6), y).curvature

    def scores(penalty: float) -> np.ndarray:
        basis = full_curvature(problem(X, y, penalty), np.ones(6)).basis(6, np.random.default_rng(0))
        return Draw("leverage", 1, 1.0, 0, 0, basis).scores(X, False, curvature)

    hessian = gram(X, curvature)
    effective = np.trace(hessian @ np.linalg.inv(hessian + 5 * np.eye(6)))
    assert scores(5.0).sum() == pytest.approx(effective) and effective < 6
    norms = Draw("row_norm", 1, 1.0, 0, 0).scores(X, False, curvature)
    np.testing.assert_allclose(scores(1e9) * 1e9, norms, rtol=1e-5)


def test_projected_leverage_scores_are_within_a_factor_of_two_for_99_rows_in_100() -> None:
    X, y = logistic_table(20_000, 40, 8)
    whole = problem(X, y)
    draw = Draw("uniform", 2000, 20_000, 0, 0)
    sample = Sample.joined(whole.total(draw_by_target, draw=draw, constant=Constant.of(whole)))
    curvature = LOSSES["logistic"](np.zeros(len(y)), y).curvature
    exact = full_curvature(whole, np.zeros(40)).basis(40, np.random.default_rng(0))
    sampled = sampled_curvature(whole, sample, np.zeros(40))
    sketched = sampled.basis(39, np.random.default_rng(1))
    truth, estimate = (Draw("leverage", 1, 1.0, 0, 0, basis).scores(X, False, curvature) for basis in (exact, sketched))
    ratio = estimate / truth
    assert np.mean((ratio > 0.5) & (ratio < 2)) > 0.98


def test_a_few_huge_rows_defeat_uniform_sampling_and_no_other() -> None:
    rng = np.random.default_rng(9)
    X = rng.standard_normal((20_000, 20))
    X[:50] *= 1e3
    y = X @ rng.standard_normal(20) + rng.standard_normal(20_000)
    whole = problem(X, y, loss="squared")
    best = subsampled_newton(whole, sampling="none").history[-1].value

    def passes(sampling: Any) -> int:
        settings = {"sample_size": 400, "refresh": 1, "memory": 0, "seed": 1, "max_iter": 60}
        history = subsampled_newton(whole, np.zeros(20), sampling=sampling, **settings).history
        return next(step.passes for step in history if step.value < best * (1 + 1e-6))

    assert passes("uniform") > 2 * max(passes("leverage"), passes("row_norm"))


def test_about_as_many_rows_are_drawn_as_asked_for_though_a_few_hold_most_of_the_mass() -> None:
    rng = np.random.default_rng(18)
    X = rng.standard_normal((20_000, 5))
    X[:50] *= 1e3
    whole = problem(X, X @ np.ones(5) + rng.standard_normal(20_000), loss="squared")
    history = subsampled_newton(whole, np.zeros(5), sampling="row_norm", sample_size=500, refresh=1, memory=0).history
    for step in history[1:]:
        assert 400 < step.rows < 600


@pytest.mark.parametrize("loss", ["logistic", "poisson"])
def test_the_objective_never_rises(loss: str) -> None:
    X, y = logistic_table(10_000, 15, 10)
    values = [step.value for step in subsampled_newton(problem(X, y, 1e-3, loss), seed=2, tol=1e-10).history]
    assert (np.diff(values) <= 1e-12 * np.abs(values[0])).all()


def test_without_a_draw_a_step_costs_one_pass() -> None:
    X, y = logistic_table(20_000, 10, 11, condition=1)
    source = ArraySource(X, y, fragment_rows=3000)
    result = subsampled_newton(Problem(source, LOSSES["logistic"], 1.0), seed=0)
    assert source.n_passes == result.history[-1].passes == 1 + len(result.history)


def test_results_do_not_depend_on_how_the_table_is_cut_or_stored(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    X, y = logistic_table(20_000, 8, 12)
    table = pa.table({**{f"x{j}": X[:, j] for j in range(8)}, "click": y})
    pq.write_table(table, tmp_path / "part.parquet", row_group_size=3000)
    in_memory = SubsampledNewtonClassifier(random_state=0).fit(X, y)
    stored = ParquetSource(tmp_path, target="click", block_rows=700)
    for executor in ("serial", "threads", "dask"):
        from_disk = SubsampledNewtonClassifier(random_state=0, executor=executor).fit(stored)
        assert [step.rows for step in from_disk.history_] == [step.rows for step in in_memory.history_]
        np.testing.assert_allclose(from_disk.coef_, in_memory.coef_, rtol=1e-9)
        np.testing.assert_allclose(from_disk.intercept_, in_memory.intercept_, rtol=1e-9)
    import dask.array as da

    chunked = SubsampledNewtonClassifier(random_state=0).fit(da.from_array(X, (4000, 8)), da.from_array(y, 4000))
    np.testing.assert_allclose(chunked.coef_, in_memory.coef_, rtol=1e-9)
    exact = SubsampledNewtonClassifier(sampling="none")
    coef = exact.fit(X, y).coef_.copy()
    np.testing.assert_allclose(exact.fit(stored).coef_, coef, rtol=1e-8)


def test_many_sparse_columns_are_fitted_without_forming_a_hessian() -> None:
    rng = np.random.default_rng(13)
    ids = rng.integers(0, 1100, (6000, 2)) + np.array([0, 1100])
    X = sp.csr_array((np.ones(12_000), ids.ravel(), np.arange(0, 12_001, 2)), shape=(6000, 2200))
    y = (rng.random(6000) < 1 / (1 + np.exp(-X @ rng.standard_normal(2200)))).astype(float)
    theirs = LogisticRegression(solver="newton-cg", tol=1e-10).fit(X, y)
    for sampling, size in (("none", None), ("row_norm", 2500)):
        ours = SubsampledNewtonClassifier(sampling=sampling, sample_size=size, tol=1e-9, random_state=0).fit(X, y)
        np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='use "row_norm"'):
        SubsampledNewtonClassifier(sampling="leverage").fit(X, y)


def test_whole_weights_are_repetitions_and_units_of_columns_do_not_matter() -> None:
    X, y = logistic_table(300, 4, 14, condition=10)
    weight = np.random.default_rng(15).integers(0, 4, 300)
    weighted = SubsampledNewtonClassifier(C=1e6, tol=1e-10).fit(X, y, weight)
    repeated = SubsampledNewtonClassifier(C=1e6, tol=1e-10).fit(np.repeat(X, weight, 0), np.repeat(y, weight))
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-6)
    units = np.array([1e6, 1.0, 1e-6, 1e3])
    scaled = subsampled_newton(problem(X * units, y, 0.0), sampling="none").coef * units
    np.testing.assert_allclose(scaled, subsampled_newton(problem(X, y, 0.0), sampling="none").coef, rtol=1e-6)


def test_columns_that_repeat_or_never_change_are_no_obstacle() -> None:
    X, y = logistic_table(3000, 3, 16, condition=10)
    doubled = np.column_stack([X, X, np.zeros(3000), np.ones(3000)])
    plain = SubsampledNewtonRegressor(alpha=0.0, tol=1e-10).fit(X, y).predict(X)
    found = SubsampledNewtonRegressor(alpha=0.0, tol=1e-10).fit(doubled, y).predict(doubled)
    np.testing.assert_allclose(found, plain, atol=1e-5)


def test_separable_classes_without_a_penalty_to_speak_of_converge_or_warn() -> None:
    X = np.linspace(-1, 1, 100)[:, None]
    with pytest.warns(ConvergenceWarning, match="raise max_iter or the penalty"):
        SubsampledNewtonClassifier(C=1e12, max_iter=5).fit(X, X[:, 0] > 0)
    assert SubsampledNewtonClassifier(C=1e4).fit(X, X[:, 0] > 0).score(X, X[:, 0] > 0) == 1.0


def test_a_warm_start_from_the_answer_takes_no_step() -> None:
    X, y = logistic_table(5000, 5, 17)
    model = SubsampledNewtonClassifier(warm_start=True, tol=1e-8, random_state=0).fit(X, y)
    assert model.set_params(tol=1e-3).fit(X, y).n_iter_ == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (SubsampledNewtonClassifier(C=0), "C is 0, expected a number > 0"),
        (SubsampledNewtonClassifier(sampling="best"), 'sampling is "best", expected one of auto, leverage'),
        (SubsampledNewtonClassifier(sample_size=2), "sample_size is 2, expected an integer >= 3"),
        (SubsampledNewtonClassifier(tol=0), "tol is 0"),
        (SubsampledNewtonClassifier(max_iter=0), "max_iter is 0"),
        (SubsampledNewtonRegressor(alpha=-1), "alpha is -1"),
        (SubsampledNewtonRegressor("cauchy"), 'loss is "cauchy"'),
    ],
)
def test_parameters_out_of_range_are_named(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.fit(np.eye(2)[[0, 1, 0, 1]], [0, 1, 1, 0])


def test_targets_and_rows_that_no_model_fits_are_refused() -> None:
    X = np.arange(12.0).reshape(6, 2)
    with pytest.raises(ValueError, match="one class"):
        SubsampledNewtonClassifier().fit(X, [1] * 6)
    with pytest.raises(ValueError, match="target of row 3 is -1.0, expected 0 or more"):
        SubsampledNewtonRegressor("poisson").fit(X, [0, 1, 2, -1, 0, 1])
    with pytest.raises(ValueError, match="target of row 1 is -1.0, expected between 0 and 1"):
        SubsampledNewtonClassifier().fit(ArraySource(X, np.array([1, -1, 0, 0, 0, 0])))
    with pytest.raises(ValueError, match="0 targets"):
        SubsampledNewtonClassifier().fit(ArraySource(X))
    with pytest.raises(ValueError, match="NaN"):
        SubsampledNewtonRegressor().fit(np.where(X == 3, np.nan, X), np.arange(6))
    with pytest.raises(ValueError, match=r"[Nn]egative"):
        SubsampledNewtonRegressor().fit(X, np.arange(6), [1, 1, 1, 1, 1, -1])
    with pytest.raises(ValueError, match="brings its own target"):
        SubsampledNewtonClassifier().fit(ArraySource(X, np.arange(6)), np.arange(6))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("rate", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_rare_clicks_are_fitted_to_the_minimum_for_every_seed(rate: float, sparse: bool) -> None:
    for seed in range(2):
        rng = np.random.default_rng(seed)
        n = 10_000 if rate > 1e-4 else 40_000
        X = rng.standard_normal((n, 5)) * (rng.random((n, 5)) < 0.5 if sparse else 1)
        y = (rng.random(n) < 1 / (1 + np.exp(-(X[:, 0] + np.log(rate) - 0.5)))).astype(float)
        y[0] = 1
        rows = sp.csr_array(X) if sparse else X
        ours = SubsampledNewtonClassifier(random_state=seed).fit(rows, y)
        theirs = LogisticRegression(solver="newton-cholesky", tol=1e-9).fit(rows, y)
        found, best = (
            np.logaddexp(0, m.decision_function(rows)) @ np.ones(n)
            - y @ m.decision_function(rows)
            + m.coef_[0] @ m.coef_[0] / 2
            for m in (ours, theirs)
        )
        assert found <= best * (1 + 1e-8)
        assert ours.history_[0].value < n  # the start knows how rare clicks are


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("mean", [1e-3, 1e4, 1e9])
def test_counts_of_any_size_are_fitted(mean: float, free: bool) -> None:
    rng = np.random.default_rng(21)
    X = np.column_stack([rng.standard_normal((4000, 2)), np.ones(4000)])
    y = rng.poisson(mean * np.exp(0.5 * X[:, 0])).astype(float)
    for sampling in ("leverage", "none"):
        model = SubsampledNewtonRegressor("poisson", alpha=1e-3, sampling=sampling, fit_intercept=free, random_state=0)
        slope = np.exp(X @ model.fit(X, y).coef_ + model.intercept_) - y
        assert np.abs(X.T @ slope + 1e-3 * model.coef_).max() <= 1e-6 * max(len(y), np.abs(X.T @ y).max())


def test_a_fit_that_stops_early_says_how_far_it_is_from_the_minimum() -> None:
    X, y = logistic_table(5000, 5, 22)
    best = SubsampledNewtonClassifier().fit(X, y).history_[-1].value
    with pytest.warns(ConvergenceWarning, match=r"1 steps, with about [0-9.e+-]+ of the objective left") as told:
        early = SubsampledNewtonClassifier(sampling="none", max_iter=1).fit(X, y)
    stated = float(str(told[0].message).split("about ")[1].split(" of")[0])
    true = early.history_[-1].value / best - 1
    assert 0.1 * true < stated < 10 * true
