"""Conditioners and leverage scores: bounds of the theorems, totals, ranks, invariances."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from fullrank.randomized import ArraySource, leverage_scores, sketch
from fullrank.randomized.conditioning import (
    RankDeficientError,
    check_rank,
    dependent_columns,
    ellipsoidal_rounding,
    exact_factor,
    l1_conditioner,
    preconditioner,
)
from fullrank.randomized.sampling import sample_rows


def skewed(n: int, d: int, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed)
    return draws.standard_normal((n, d)) @ np.diag(10.0 ** np.linspace(0, -6, d)) * draws.lognormal(0, 2, (n, 1))


def test_preconditioned_columns_are_near_orthonormal_at_any_condition():
    A = skewed(5000, 20)
    N = preconditioner(np.linalg.qr(sketch(A, 400, random_state=0), mode="r")).N
    assert np.linalg.cond(A @ N) < 2


def test_lsrn_bound_holds_for_a_gaussian_sketch_of_2_d_rows():
    """sigma(A N) lies in [1 / (1 + e), 1 / (1 - e)] with e = sqrt(d / m), up to the deviation of a Gaussian matrix."""
    A, d = skewed(3000, 60), 60
    for seed in range(5):
        N = preconditioner(np.linalg.qr(sketch(A, 4 * d, "gaussian", random_state=seed), mode="r")).N
        singular = np.linalg.svd(A @ N, compute_uv=False)
        e = np.sqrt(1 / 4) + 3 / np.sqrt(4 * d)
        assert 1 / (1 + e) < singular.min() and singular.max() < 1 / (1 - e)


def test_null_space_is_what_the_columns_say():
    A = np.random.default_rng(0).standard_normal((200, 4))
    A = np.column_stack([A, A[:, 0] - A[:, 1], np.zeros(200)])
    basis = preconditioner(np.linalg.qr(A, mode="r"))
    assert basis.N.shape == (6, 4) and basis.condition > 1e14
    assert np.abs(A @ basis.null).max() < 1e-13
    assert len(dependent_columns(A)) == 2
    with pytest.raises(RankDeficientError, match='rank 4 of 6 columns; dependent: .*"f"'):
        check_rank(A, list("abcdef"))


def test_factor_by_blocks_equals_lapack():
    A = skewed(1000, 5)
    w = np.random.default_rng(1).random(1000)
    R = exact_factor(ArraySource(A, sample_weight=w, fragment_rows=90, block_rows=3), intercept=True)
    expected = np.linalg.qr(np.column_stack([np.ones(1000), A]) * np.sqrt(w)[:, None], mode="r")
    np.testing.assert_allclose(np.abs(R), np.abs(expected), rtol=1e-9, atol=1e-12)


def test_ellipsoid_rounds_the_l1_ball_within_its_bounds():
    draws = np.random.default_rng(0)
    for d in (2, 5):
        A = draws.standard_cauchy((600, d)) @ draws.standard_normal((d, d))
        R = ellipsoidal_rounding(A)
        x = draws.standard_normal((d, 4000))
        l1, l2 = np.abs(A @ x).sum(axis=0), np.linalg.norm(R @ x, axis=0)
        assert (l2 <= l1 * (1 + 1e-9)).all()
        assert (l1 <= 2 * d * l2 * (1 + 1e-9)).all()


@pytest.mark.parametrize("kind", ["spc1", "spc2", "spc3", "cauchy"])
def test_l1_bases_are_well_conditioned_where_the_table_is_not(kind):
    """alpha beta of A R^-1 in l1, by its definition with random and axis directions, against that of A scaled."""
    A = skewed(4000, 6)
    b = A @ np.ones(6) + np.random.default_rng(1).standard_cauchy(4000)
    Ab = np.column_stack([A, b])
    R = l1_conditioner(ArraySource(A, b, fragment_rows=1000), kind, seed=1)

    def condition(U: np.ndarray) -> float:
        z = np.hstack([np.eye(7), np.random.default_rng(2).standard_normal((7, 2000))])
        return np.abs(U).sum() * (np.abs(z).max(axis=0) / np.abs(U @ z).sum(axis=0)).max()

    assert condition(Ab @ np.linalg.inv(R)) < 2 * 7**2 < condition(Ab)


def test_a_dependent_column_is_named_after_all_draws():
    A = skewed(2000, 4)
    source = ArraySource(np.column_stack([A, A[:, 0]]), A[:, 1] ** 2)
    with pytest.raises(RankDeficientError, match="rank 5 of 6 columns"):
        l1_conditioner(source, "spc3")
    with pytest.raises(ValueError, match='conditioner is "qr"'):
        l1_conditioner(source, "qr")


def test_leverage_scores_are_those_of_the_hat_matrix_and_sum_to_the_rank():
    A = np.random.default_rng(0).standard_normal((400, 6)) * np.random.default_rng(1).lognormal(0, 2, (400, 1))
    scores = leverage_scores(A)
    np.testing.assert_allclose(scores, np.diag(A @ np.linalg.pinv(A)), atol=1e-12)
    deficient = np.column_stack([A, A @ np.ones(6), np.zeros(400)])
    for table, rank in ((A, 6), (sp.csr_array(A), 6), (deficient, 6), (A[:3], 3)):
        scores = leverage_scores(table)
        assert abs(scores.sum() - rank) < 1e-8
        assert scores.min() >= 0 and scores.max() <= 1 + 1e-12


def test_leverage_scores_do_not_change_with_the_basis_and_count_degrees_of_freedom():
    draws = np.random.default_rng(0)
    A, M = draws.standard_normal((300, 5)), draws.standard_normal((5, 5))
    np.testing.assert_allclose(leverage_scores(A @ M), leverage_scores(A), atol=1e-10)
    freedom = np.trace(A @ np.linalg.solve(A.T @ A + 30 * np.eye(5), A.T))
    assert abs(leverage_scores(A, ridge=30).sum() - freedom) < 1e-10
    repeated = leverage_scores(np.vstack([A, A[:100]]))
    weighted = leverage_scores(ArraySource(A, sample_weight=np.r_[np.full(100, 2.0), np.ones(200)]))
    np.testing.assert_allclose(weighted[:100] / 2, repeated[:100], atol=1e-12)
    np.testing.assert_allclose(weighted[100:], repeated[100:300], atol=1e-12)


def test_approximate_scores_take_two_passes_and_are_within_a_factor():
    A = skewed(6000, 100)
    exact = leverage_scores(A)
    source = ArraySource(A)
    scores = leverage_scores(source, method="approx", random_state=0)
    assert source.n_passes == 2
    ratio = scores / exact
    assert ((ratio > 0.4) & (ratio < 2.2)).mean() > 0.99
    short = leverage_scores(A[:, :10], method="approx", random_state=0)
    within = short / leverage_scores(A[:, :10])
    assert within.min() > 1 / 1.7 and within.max() < 1.7


def test_l1_scores_are_row_norms_of_a_conditioned_basis():
    A = skewed(1000, 4)
    R = np.linalg.qr(A, mode="r")
    # The basis is fixed up to a rotation, so only the scale of a score is.
    ratio = leverage_scores(A, p=1) / np.linalg.norm(A @ np.linalg.inv(R), axis=1)
    assert ratio.min() > 1 - 1e-9 and ratio.max() < 2 + 1e-9
    wide = np.random.default_rng(0).standard_normal((3000, 200))
    medians = leverage_scores(wide, p=1, method="approx", random_state=0)
    assert medians.std() / medians.mean() < 0.5


def test_samples_by_leverage_keep_the_norms_of_the_column_space():
    draws = np.random.default_rng(0)
    A = draws.standard_normal((20000, 8)) @ draws.standard_normal((8, 8)) * draws.lognormal(0, 0.5, (20000, 1))
    N = preconditioner(np.linalg.qr(A, mode="r")).N
    rows = sample_rows(ArraySource(A), 2000, N, seed=3)
    assert abs(len(rows) - 2000) < 500
    singular = np.linalg.svd(rows @ N, compute_uv=False)
    assert singular.min() > 0.8 and singular.max() < 1.2
    with pytest.raises(ValueError, match="every row has score zero"):
        sample_rows(ArraySource(np.zeros((5, 2))), 3, np.eye(2))


def test_wrong_arguments_are_refused():
    A = np.ones((3, 1))
    for arguments, message in (
        ({"p": 3}, "p is 3"),
        ({"method": "fast"}, 'method is "fast"'),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"ridge": 1.0, "p": 1}, "ridge is 1.0 with p = 1"),
    ):
        with pytest.raises(ValueError, match=message):
            leverage_scores(A, **arguments)
