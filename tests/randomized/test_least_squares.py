"""Least squares: LAPACK's answer at any condition, the guarantees of the sketches, and what is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from fullrank.randomized import ArraySource, ParquetSource, RandomizedLinearRegression, lstsq
from fullrank.randomized.conditioning import preconditioner


def table(
    n: int, d: int, condition: float, rows: str = "gaussian", noise: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A = rows @ mix, where the mix has singular values from 1 to 1 / condition; b = A x + noise of |A x|."""
    draws = np.random.default_rng(seed)
    Z = draws.standard_normal((n, d))
    if rows == "student":
        Z *= draws.standard_t(3, (n, 1))
    left, right = (np.linalg.qr(draws.standard_normal((d, d)))[0] for _ in range(2))
    A = Z @ (left * np.logspace(0, -np.log10(condition), d)) @ right
    signal, e = A @ draws.standard_normal(d), draws.standard_normal(n)
    return A, signal + noise * np.linalg.norm(signal) / np.linalg.norm(e) * e


def nb(n: int, d: int, repeats: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The paper's NB: d / 2 rows of leverage one at the end, under a block with columns of very different size."""
    half, draws = d // 2, np.random.default_rng(0)
    top = [50 * draws.standard_normal((n - half, half)), 1e-8 * draws.standard_normal((n - half, half))]
    A = np.vstack([np.tile(np.hstack(top), (repeats, 1)), np.hstack([np.zeros((half, half)), np.eye(half)])])
    signal, e = A @ draws.standard_normal(d), draws.standard_normal(len(A))
    return A, signal + 0.25 * np.linalg.norm(signal) / np.linalg.norm(e) * e


def excess(A: np.ndarray, b: np.ndarray, x: np.ndarray) -> float:
    """Objective over the optimum, minus one; the optimum by QR of [A b]."""
    best = abs(np.linalg.qr(np.column_stack([A, b]), mode="r")[-1, -1])
    return (np.linalg.norm(b - A @ x) / best) ** 2 - 1


@pytest.mark.parametrize("condition", [1e1, 1e5, 1e9])
@pytest.mark.parametrize("rows", ["gaussian", "student"])
def test_high_precision_at_any_condition(condition, rows):
    A, b = table(20000, 25, condition, rows)
    for method in ("auto", "gram", "lsqr"):
        result = lstsq(A, b, method=method, random_state=0)
        r = b - A @ result.x
        assert excess(A, b, result.x) < 1e-10
        # The second term is what rounding x to double precision can leave of the gradient.
        size, x_norm = np.linalg.norm(A, 2), np.linalg.norm(result.x)
        assert np.linalg.norm(A.T @ r) < size * (1e-12 * np.linalg.norm(r) + 1e-15 * size * x_norm)
        assert abs(result.residual_norm / np.linalg.norm(r) - 1) < 1e-7
        assert 0.4 < result.cond_estimate / np.linalg.cond(A) < 2.5
        assert result.rank == 25


def test_nb_is_solved_where_uniform_sampling_fails_and_leverage_sampling_does_not():
    A, b = nb(10000, 30)
    for seed in range(3):
        assert excess(A, b, lstsq(A, b, method="gram", random_state=seed).x) < 1e-10
    lost = lstsq(A, b, method="sketch", sketch="uniform", sketch_size=1200, random_state=0)
    assert excess(A, b, lost.x) > 1e3
    kept = lstsq(A, b, method="sketch", sketch="leverage", sketch_size=1200, random_state=0)
    assert kept.rank == 30 and kept.n_passes == 2
    assert excess(A, b, kept.x) < 0.1


def test_sketch_and_solve_is_within_the_bound_on_every_kind_of_table():
    for A, b in (table(20000, 20, 5), table(20000, 20, 1e6), table(20000, 20, 1e6, "student"), nb(10000, 20)):
        for kind in ("sparse_sign", "srht", "gaussian"):
            low = lstsq(A, b, precision="low", sketch=kind, random_state=1)
            assert low.n_passes == 1 and low.method == "sketch" and low.residual_norm is None
            assert 0 <= excess(A, b, low.x) < 0.15


def test_methods_agree_with_lapack_on_x():
    A, b = table(10000, 20, 1e6, noise=1e-3)
    expected = np.linalg.lstsq(A, b, rcond=None)[0]
    for method in ("auto", "gram", "lsqr"):
        x = lstsq(A, b, method=method, random_state=2).x
        assert np.linalg.norm(x - expected) < 1e-8 * np.linalg.norm(expected)
    x = lstsq(A, b, method="chebyshev", sketch="gaussian", random_state=2).x
    assert np.linalg.norm(x - expected) < 1e-8 * np.linalg.norm(expected)


def test_passes_are_what_the_table_of_methods_says():
    def passes(condition: float, method: str) -> tuple[int, str]:
        A, b = table(5000, 10, condition)
        source = ArraySource(A, b)
        result = lstsq(source, method=method, random_state=0)
        assert result.n_passes == source.n_passes
        return result.n_passes, result.method

    assert passes(1e2, "auto") == (1, "normal")
    assert passes(1e5, "auto") == (2, "cholesky")
    assert passes(1e9, "auto") == (3, "gram")
    assert passes(1e9, "gram") == (2, "gram")
    assert passes(1e2, "normal") == (1, "normal")


def test_iterations_do_not_grow_with_the_condition():
    steps = [lstsq(*table(10000, 20, condition), method="lsqr", random_state=0).n_iter for condition in (1e2, 1e6, 1e9)]
    assert max(steps) - min(steps) <= 2 and max(steps) < 30


def test_a_bad_sketch_is_noticed_and_repaired():
    """A countsketch of d rows has a condition of hundreds; one that drops a direction is drawn again."""
    A, b = table(20000, 25, 1e7, "student")
    for seed in range(5):
        assert (
            excess(A, b, lstsq(A, b, method="gram", sketch="countsketch", sketch_size=30, random_state=seed).x) < 1e-10
        )
    A, b = nb(10000, 30)
    results = [lstsq(A, b, method="gram", sketch="countsketch", sketch_size=60, random_state=s) for s in range(10)]
    assert max(result.n_passes for result in results) > 2
    for result in results:
        assert result.rank == 30
        assert excess(A, b, result.x) < 1e-9


def test_refinement_measures_the_gradient():
    A, b = table(10000, 20, 1e3)
    for method in ("gram", "normal"):
        result = lstsq(A, b, method=method, refine=True, random_state=0)
        assert result.relative_gradient < 1e-13
        assert lstsq(A, b, method=method, random_state=0).relative_gradient is None


@pytest.mark.parametrize("method", ["auto", "gram", "lsqr"])
def test_ridge_intercept_weights_and_several_targets_are_the_augmented_problem(method):
    A, _ = table(3000, 8, 1e5)
    draws = np.random.default_rng(1)
    B, w = A @ draws.standard_normal((8, 3)) + draws.standard_normal((3000, 3)) + 5, draws.random(3000)
    w[::7] = 0
    root = np.sqrt(w)[:, None]
    rows = np.vstack([np.hstack([np.ones((3000, 1)), A]) * root, 0.1 * np.eye(9)[1:]])
    expected = np.linalg.lstsq(rows, np.vstack([B * root, np.zeros((8, 3))]), rcond=None)[0]
    for form in (A, sp.csr_array(A)):
        result = lstsq(form, B, method=method, alpha=0.01, fit_intercept=True, sample_weight=w, random_state=0)
        np.testing.assert_allclose(result.x, expected, rtol=1e-8, atol=1e-9)
        norms = np.linalg.norm(root * (B - expected[0] - A @ expected[1:]), axis=0)
        np.testing.assert_allclose(result.residual_norm, norms, rtol=1e-9)


def test_rank_deficient_tables_give_the_smallest_solution_and_say_so():
    A, b = table(2000, 6, 10)
    A = np.column_stack([A, A[:, 0] + A[:, 1], np.zeros(2000), np.full(2000, 3.0)])
    expected = np.linalg.lstsq(A, b, rcond=None)[0]
    for method in ("auto", "gram", "lsqr"):
        with pytest.warns(RuntimeWarning, match="rank 7 of 9 columns"):
            result = lstsq(A, b, method=method, random_state=0)
        np.testing.assert_allclose(result.x, expected, atol=1e-9)
        assert result.rank == 7 and result.cond_estimate > 1e12
    with pytest.raises(np.linalg.LinAlgError, match="use method auto"):
        lstsq(A, b, method="normal")


def test_short_tables_are_solved_exactly_whatever_the_seed():
    draws = np.random.default_rng(0)
    for n in (1, 3, 30):
        A, b = draws.standard_normal((n, 8)), draws.standard_normal(n)
        expected = np.linalg.lstsq(A, b, rcond=None)[0]
        for method in ("auto", "gram", "lsqr", "sketch"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                result = lstsq(A, b, method=method)
            np.testing.assert_allclose(result.x, expected, atol=1e-12)


def test_equivariances():
    A, b = table(5000, 10, 1e4)
    draws = np.random.default_rng(1)
    M, g = draws.standard_normal((10, 10)), draws.standard_normal(10)
    x = lstsq(A, b, method="gram", random_state=0).x
    np.testing.assert_allclose(lstsq(A, 7 * b, method="gram", random_state=0).x, 7 * x, rtol=1e-9)
    np.testing.assert_allclose(lstsq(A, b + A @ g, method="gram", random_state=0).x, x + g, rtol=1e-7)
    np.testing.assert_allclose(M @ lstsq(A @ M, b, method="gram", random_state=0).x, x, rtol=1e-6)
    scale = 10.0 ** np.arange(-150, 150, 30)
    np.testing.assert_allclose(scale * lstsq(A * scale, b, random_state=0).x, x, rtol=1e-7)
    zeros, twice = np.vstack([A, np.zeros((99, 10))]), np.vstack([A, A])
    np.testing.assert_allclose(lstsq(zeros, np.r_[b, np.zeros(99)], method="gram", random_state=0).x, x, rtol=1e-8)
    np.testing.assert_allclose(lstsq(twice, np.r_[b, b], method="gram", random_state=0).x, x, rtol=1e-8)
    permuted = draws.permutation(5000)
    np.testing.assert_allclose(lstsq(A[permuted], b[permuted], method="gram", random_state=0).x, x, rtol=1e-8)


def test_arrays_parquet_and_dask_agree_for_one_seed(tmp_path):
    da = pytest.importorskip("dask.array")
    from fullrank.randomized import DaskSource

    A, b = table(6000, 10, 1e7)
    columns = pa.table({**{f"x{j}": A[:, j] for j in range(10)}, "y": b})
    pq.write_table(columns.slice(0, 3500), tmp_path / "0.parquet", 999)
    pq.write_table(columns.slice(3500), tmp_path / "1.parquet", 700)
    dask = DaskSource(da.from_array(A, chunks=(1234, 5)), da.from_array(b, chunks=777))
    sources = [ArraySource(A, b), ParquetSource(tmp_path, target="y"), dask]
    for arguments in ({"method": "gram"}, {"method": "lsqr"}, {"precision": "low"}, {"method": "auto"}):
        first, *others = (lstsq(source, random_state=5, fit_intercept=True, **arguments) for source in sources)
        for other in others:
            # One seed is one sketch, so even the low-precision answers agree, up to rounding times the condition.
            np.testing.assert_allclose(other.x, first.x, rtol=1e-6, atol=1e-8)
    threads, in_dask = (lstsq(sources[1], method="gram", random_state=5, executor=e) for e in ("threads", "dask"))
    serial = lstsq(sources[1], method="gram", random_state=5)
    np.testing.assert_array_equal(serial.x, threads.x)
    np.testing.assert_array_equal(serial.x, in_dask.x)


def test_float32_tables_of_many_rows_keep_their_digits():
    """scikit-learn issue 33032: a sum over 600,000 float32 rows must not be taken in float32."""
    draws = np.random.default_rng(0)
    X = draws.standard_normal((600_000, 3), dtype=np.float32) + np.float32(10)
    y = (X @ np.array([1, 2, 3], np.float32)).astype(np.float64) + draws.standard_normal(600_000)
    expected = np.linalg.lstsq(np.column_stack([np.ones(len(X)), X.astype(float)]), y, rcond=None)[0]
    np.testing.assert_allclose(lstsq(X, y, fit_intercept=True).x, expected, rtol=1e-8)


def test_wrong_arguments_are_refused():
    A, b = np.ones((5, 2)), np.ones(5)
    for arguments, message in (
        ({"method": "qr"}, 'method is "qr"'),
        ({"precision": "medium"}, 'precision is "medium"'),
        ({"sketch": "uniform"}, 'sketch is "uniform"'),
        ({"sketch_size": 1}, "sketch_size is 1, expected at least the 2 columns"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"tol": np.nan}, "tol is nan"),
        ({"max_iter": 0}, "max_iter is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            lstsq(A, b, **arguments)
    with pytest.raises(ValueError, match="no target"):
        lstsq(A)
    tall, target = np.random.default_rng(0).standard_normal((500, 2)), np.ones(500)
    for method in ("auto", "gram", "lsqr", "sketch"):
        for rows in (5, 500):
            wrong, at = tall[:rows].copy(), target[:rows].copy()
            at[2] = np.inf
            with pytest.raises(ValueError, match="target, first in row 2"):
                lstsq(wrong, at, method=method)
            wrong[4, 1] = np.nan
            with pytest.raises(ValueError, match='column "x1", first in row 4'):
                lstsq(wrong, target[:rows], method=method)
    with pytest.raises(ValueError, match="weight of row 3 is -1.0"):
        lstsq(tall, target, sample_weight=np.r_[1, 1, 1, -1, np.ones(496)])
    with pytest.raises(ValueError, match="overflow"):
        lstsq(np.full((100, 2), 1e308), np.ones(100), method="gram")


def test_condition_of_a_preconditioned_table_is_small_for_many_seeds():
    A, _ = nb(3000, 20)
    from fullrank.randomized import sketch

    for seed in range(100):
        N = preconditioner(np.linalg.qr(sketch(A, 400, random_state=seed), mode="r")).N
        assert np.linalg.cond(A @ N) <= 5


@pytest.mark.parametrize("method", ["auto", "normal", "gram", "lsqr", "chebyshev"])
@pytest.mark.parametrize("shift, noise", [(1e8, 1.0), (0.0, 1e-8), (1e5, 1e-3), (-1e10, 1.0)])
def test_the_residual_norm_is_that_of_the_solution(method, shift, noise):
    draw = np.random.default_rng(3)
    X = draw.standard_normal((4000, 6))
    y = X @ np.ones((6, 2)) + noise * draw.standard_normal((4000, 2)) + [shift, 0.0]
    weight = draw.random(4000)
    for w in (None, weight):
        kind = {"sketch": "gaussian"} if method == "chebyshev" else {}
        model = RandomizedLinearRegression(method=method, random_state=0, **kind).fit(X, y, w)
        left = (y - model.predict(X)) * (1 if w is None else np.sqrt(w)[:, None])
        np.testing.assert_allclose(model.residual_norm_, np.linalg.norm(left, axis=0), rtol=1e-2)
