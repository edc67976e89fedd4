"""Facts about quasi-random Fourier features."""

from __future__ import annotations

import warnings
from pathlib import Path

import dask.array as da
import numpy as np
import polars as pl
import pytest
from scipy import sparse
from scipy.stats import norm
from sklearn.gaussian_process.kernels import Matern
from sklearn.metrics.pairwise import laplacian_kernel, rbf_kernel
from sklearn.utils.estimator_checks import parametrize_with_checks

from fullrank.randomized import ParquetSource, QMCFeatures, box_discrepancy
from fullrank.randomized.adaptive import greedy_frequencies
from fullrank.randomized.discrepancy import box_discrepancy_gradient
from fullrank.randomized.qmc import kernel_error
from fullrank.randomized.sequences import UNIFORM, lattice_generator, uniform_points
from fullrank.randomized.spectral import kernel_values, spectral_frequencies

SEQUENCES = (*UNIFORM, "orthogonal")


@pytest.fixture
def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((300, 6)) @ (np.eye(6) + 0.3 * rng.standard_normal((6, 6)))


@parametrize_with_checks([QMCFeatures(), QMCFeatures(sequence="empirical", n_components=16, refine_iter=2)])
def test_scikit_learn(estimator: QMCFeatures, check) -> None:  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="sequence .* keeps its start|.* features are made")
        check(estimator)


@pytest.mark.parametrize("sequence", [*SEQUENCES, "auto", "adaptive", "greedy", "empirical"])
@pytest.mark.filterwarnings("ignore:sequence .* keeps its start")
def test_every_feature_vector_has_norm_1(rows: np.ndarray, sequence: str) -> None:
    Z = QMCFeatures(sequence=sequence, n_components=64, random_state=0).fit_transform(rows)
    assert Z.shape == (300, 64)
    np.testing.assert_allclose(np.sum(Z**2, axis=1), 1, rtol=1e-13)


def test_features_are_cosines_and_sines_of_the_projections(rows: np.ndarray) -> None:
    features = QMCFeatures(gamma=0.3, sequence="mc", n_components=20, random_state=3).fit(rows)
    phase = rows @ features.frequencies_
    by_hand = np.hstack([np.cos(phase), np.sin(phase)]) / np.sqrt(10)
    np.testing.assert_allclose(features.transform(rows), by_hand, atol=1e-15)


@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "matern"])
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_scrambled_features_are_unbiased(kernel: str, sequence: str) -> None:
    """Within 5 standard errors over 300 scrambles; a bandwidth off by sqrt 2 is dozens of them away."""
    if (kernel, sequence) == ("laplacian", "orthogonal"):
        pytest.skip("not isotropic")
    X = np.array([[0.0, 0.0, 0.0], [0.5, -0.3, 0.2], [-1.0, 0.8, 0.4]])
    gamma = np.array([0.4, 0.9, 0.2])
    features = QMCFeatures(kernel, gamma=gamma, n_components=32, sequence=sequence)
    draws = []
    for seed in range(300):
        Z = features.set_params(random_state=seed).fit_transform(X)
        draws.append((Z @ Z.T)[np.triu_indices(3, 1)])
    U = (X[:, None] - X)[np.triu_indices(3, 1)]
    exact = kernel_values(U, kernel, gamma, 1.5)
    error = np.std(draws, axis=0) / np.sqrt(len(draws))
    assert (np.abs(np.mean(draws, axis=0) - exact) < 5 * error).all()
    assert (5 * error < 0.1).all()


def test_kernels_equal_scikit_learn(rows: np.ndarray) -> None:
    U = (rows[:40, None] - rows[:40]).reshape(-1, 6)
    for nu in (0.5, 1.5, 2.5, 4.2):
        expected = Matern(length_scale=1 / np.sqrt(0.6), nu=nu)(rows[:40])
        np.testing.assert_allclose(kernel_values(U, "matern", 0.3, nu).reshape(40, 40), expected, rtol=1e-10)
    for kernel, theirs in (("rbf", rbf_kernel), ("laplacian", laplacian_kernel)):
        ours = kernel_values(sparse.csr_array(U), kernel, 0.3, 1.0).reshape(40, 40)
        np.testing.assert_allclose(ours, theirs(rows[:40], gamma=0.3), rtol=1e-10)


def test_one_gamma_for_each_column_is_a_rescaling(rows: np.ndarray) -> None:
    gamma = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 2.0])
    for kernel, scale in (("rbf", np.sqrt(gamma)), ("matern", np.sqrt(gamma)), ("laplacian", gamma)):
        by_column = QMCFeatures(kernel, gamma=gamma, sequence="sobol", random_state=1).fit_transform(rows)
        rescaled = QMCFeatures(kernel, gamma=1.0, sequence="sobol", random_state=1).fit_transform(rows * scale)
        np.testing.assert_allclose(by_column, rescaled, atol=1e-12)


def test_error_falls_faster_than_of_drawn_frequencies() -> None:
    X = np.random.default_rng(1).standard_normal((150, 4))
    sizes = 2 ** np.arange(4, 11)
    slopes = {}
    for sequence in ("sobol", "mc"):
        features = QMCFeatures(gamma=0.25, sequence=sequence)
        errors = []
        for s in sizes:
            Z = [features.set_params(n_components=int(2 * s), random_state=k).fit_transform(X) for k in range(6)]
            errors.append(np.mean([kernel_error(X, z, gamma=0.25).value for z in Z]))
        slopes[sequence] = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slopes["sobol"] <= -0.75
    assert abs(slopes["mc"] + 0.5) < 0.1


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_even_sequences_beat_drawn_ones(sequence: str, rows: np.ndarray) -> None:
    def error(name: str) -> float:
        features = QMCFeatures(gamma=1 / 12, n_components=256, sequence=name)
        Z = [features.set_params(random_state=k).fit_transform(rows) for k in range(5)]
        return float(np.mean([kernel_error(rows, z, gamma=1 / 12).value for z in Z]))

    assert sequence == "mc" or error(sequence) < 0.9 * error("mc")


def test_sampled_kernel_error_agrees_with_all_pairs(rows: np.ndarray) -> None:
    Z = QMCFeatures(gamma=0.1, n_components=32, sequence="mc", random_state=0).fit_transform(rows)
    K = rbf_kernel(rows, gamma=0.1)
    exact = kernel_error(rows, Z, gamma=0.1)
    assert exact.value == pytest.approx(np.linalg.norm(Z @ Z.T - K) / np.linalg.norm(K), rel=1e-10)
    sampled = kernel_error(rows, Z, gamma=0.1, pairs=20_000, random_state=0)
    # Sampled pairs leave the diagonal out, which has no error.
    off = ~np.eye(300, dtype=bool)
    expected = np.linalg.norm((Z @ Z.T - K)[off]) / np.linalg.norm(K[off])
    assert abs(sampled.value - expected) < 5 * sampled.standard_error
    assert sampled.standard_error < 0.05 * expected


def test_points_of_base_2_fill_every_interval_once() -> None:
    for sequence in ("sobol", "digital_net", "lattice"):
        for scramble in (True, False):
            points = uniform_points(sequence, 64, 10, np.random.default_rng(0), scramble=scramble)
            # A lattice's common shift moves all points of a coordinate within their intervals.
            offset = points.min(axis=0) if sequence == "lattice" else 0
            cells = np.floor((points - offset) * 64 + 1e-9).astype(int)
            assert (np.sort(cells, axis=0) == np.arange(64)[:, None]).all()


def test_points_stay_off_the_faces_and_unscrambled_ones_are_fixed() -> None:
    for sequence in UNIFORM:
        first, second = (uniform_points(sequence, 128, 7, np.random.default_rng(k), scramble=False) for k in range(2))
        assert (first > 0).all() and (first < 1).all()
        assert np.array_equal(first, second) == (sequence != "mc")
        assert np.isfinite(norm.ppf(first)).all()


def test_lattice_generator_equals_the_search_over_all_candidates() -> None:
    s, d = 64, 6
    product = np.ones(s)
    used: set[int] = set()
    ours = lattice_generator(s, d)
    for j in range(d):
        errors = {}
        for z in range(1, s, 2):
            if min(z, s - z) not in used:
                x = np.arange(s) * z % s / s
                errors[z] = float(product @ (1 + 2 * np.pi**2 * (x**2 - x + 1 / 6) / (j + 1) ** 2))
        assert errors[int(ours[j])] == pytest.approx(min(errors.values()), abs=1e-8)
        x = np.arange(s) * ours[j] % s / s
        product *= 1 + 2 * np.pi**2 * (x**2 - x + 1 / 6) / (j + 1) ** 2
        used.add(min(ours[j], s - ours[j]))
    assert len({min(z, 256 - z) for z in lattice_generator(256, 64).tolist()}) == 64


def test_orthogonal_directions() -> None:
    W = spectral_frequencies("rbf", 0.5, 1.0, "orthogonal", 20, 8, np.random.default_rng(0))
    for block in (W[:, :8], W[:, 8:16]):
        gram = block.T @ block
        np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=1e-12)


def test_auto_takes_the_better_of_its_candidates(rows: np.ndarray) -> None:
    errors = {}
    for name in ("auto", "sobol", "orthogonal"):
        features = QMCFeatures(gamma=0.1, sequence=name, n_components=128)
        Z = [features.set_params(random_state=k).fit_transform(rows) for k in range(6)]
        errors[name] = np.mean([kernel_error(rows, z, gamma=0.1).value for z in Z])
    assert errors["auto"] <= 1.03 * min(errors["sobol"], errors["orthogonal"])
    assert features.set_params(sequence="auto").fit(rows).sequence_ in ("sobol", "orthogonal")


@pytest.mark.parametrize(("sequence", "ratio"), [("empirical", 0.7), ("adaptive", 0.97)])
@pytest.mark.filterwarnings("ignore:sequence .* keeps its start")
def test_refined_frequencies_are_better_on_new_rows(rows: np.ndarray, sequence: str, ratio: float) -> None:
    train, test = rows[:200], rows[200:]
    errors = {}
    for name in ("auto", sequence):
        features = QMCFeatures(gamma=0.1, sequence=name, n_components=64)
        fits = [features.set_params(random_state=k).fit(train).transform(test) for k in range(3)]
        errors[name] = np.mean([kernel_error(test, Z, gamma=0.1).value for Z in fits])
    assert errors[sequence] <= ratio * errors["auto"]


def test_refinement_that_does_not_help_keeps_its_start(rows: np.ndarray) -> None:
    """A box far wider than the differences spends all frequencies where the kernel is zero."""
    features = QMCFeatures(gamma=0.1, sequence="adaptive", n_components=64, box=12.0, random_state=0)
    with pytest.warns(UserWarning, match="keeps its start"):
        features.fit(rows)
    assert features.sequence_ in ("sobol", "orthogonal")


def test_box_discrepancy_is_the_mean_square_error_over_the_box() -> None:
    rng = np.random.default_rng(0)
    W, box, scale = rng.standard_normal((3, 20)) * 1.3, np.array([0.8, 1.5, 2.0]), np.array([1.0, 0.7, 1.4])
    U = rng.uniform(-1, 1, (100_000, 3)) * box
    error = np.exp(-np.sum(U**2 / (2 * scale**2), axis=1)) - np.exp(-1j * U @ W).mean(axis=1)
    assert box_discrepancy(W, box, scale) == pytest.approx(np.mean(np.abs(error) ** 2), rel=0.01)


def test_box_discrepancy_gradient_equals_finite_differences() -> None:
    rng = np.random.default_rng(1)
    W, box, scale = rng.standard_normal((4, 9)), rng.uniform(0.5, 3, 4), rng.uniform(0.5, 2, 4)
    W[:, 3] = W[:, 2]  # differences of exactly zero
    W[0, 4] = W[0, 2] + 1e-6  # and nearly so
    value, gradient = box_discrepancy_gradient(W, box, scale)
    assert value == pytest.approx(box_discrepancy(W, box, scale), rel=1e-12)
    for index in np.ndindex(W.shape):
        step = np.zeros_like(W)
        step[index] = 1e-5
        slope = (box_discrepancy(W + step, box, scale) - box_discrepancy(W - step, box, scale)) / 2e-5
        assert gradient[index] == pytest.approx(slope, abs=1e-8)


def test_box_discrepancy_invariances_and_limits() -> None:
    rng = np.random.default_rng(2)
    W, box = rng.standard_normal((5, 30)), rng.uniform(0.5, 2, 5)
    value = box_discrepancy(W, box, 1.0)
    assert box_discrepancy(W[:, ::-1], box, 1.0) == pytest.approx(value, rel=1e-12)
    assert box_discrepancy(-W, box, 1.0) == pytest.approx(value, rel=1e-12)
    assert box_discrepancy(W / 3, box * 3, 3.0) == pytest.approx(value, rel=1e-12)
    assert abs(box_discrepancy(np.zeros((5, 1)), 1e-3, 1.0)) < 1e-5
    far = box_discrepancy(np.full((5, 1), 1e3), box, 1.0)  # overflows in the complex error function as it is written
    assert np.isfinite(far) and far > 0
    for s in (64, 1024):
        wide = spectral_frequencies("rbf", 0.5, 1.0, "sobol", s, 40, np.random.default_rng(0))
        assert box_discrepancy(wide, 1.5, 1.0) > -1e-12


def test_greedy_frequencies_are_a_sequence() -> None:
    rng = np.random.default_rng(0)
    pool, box, scale = rng.standard_normal((3, 64)), np.full(3, 1.5), np.ones(3)
    long, short = (greedy_frequencies(pool, s, box, scale) for s in (24, 10))
    assert np.array_equal(long[:, :10], short)
    drawn = np.mean([box_discrepancy(rng.standard_normal((3, 24)), box, scale) for _ in range(20)])
    assert box_discrepancy(long, box, scale) < 0.2 * drawn


def test_sparse_and_dense_rows_have_the_same_features() -> None:
    X = sparse.random_array((200, 30), density=0.1, rng=np.random.default_rng(0), format="csr")
    for sequence in ("auto", "adaptive", "empirical"):
        features = QMCFeatures(sequence=sequence, n_components=32, random_state=0, refine_iter=3)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="sequence .* keeps its start")
            dense, thin = (features.fit(A).transform(A) for A in (X.toarray(), X))
        np.testing.assert_allclose(dense, thin, atol=1e-7)


def test_frequencies_are_the_same_from_memory_parquet_and_dask(tmp_path: Path) -> None:
    X = np.random.default_rng(0).standard_normal((25_000, 4))
    frame = pl.DataFrame({f"x{j}": X[:, j] for j in range(4)})
    frame.write_parquet(tmp_path / "rows.parquet", row_group_size=4000)
    for sequence in ("auto", "empirical"):
        features = QMCFeatures(sequence=sequence, n_components=32, refine_iter=3, random_state=0)
        W = features.fit(X).frequencies_
        source = ParquetSource(tmp_path)
        np.testing.assert_allclose(features.fit(source).frequencies_, W, rtol=1e-8)
        assert source.n_passes == 1
        by_dask = features.set_params(executor="dask").fit(da.from_array(X, chunks=(7000, 4)))
        np.testing.assert_allclose(by_dask.frequencies_, W, rtol=1e-8)


@pytest.mark.parametrize(
    ("sequence", "asked", "made"), [("sobol", 200, 256), ("auto", 258, 512), ("halton", 199, 200), ("mc", 200, 200)]
)
def test_features_beyond_those_asked_for_are_said(rows: np.ndarray, sequence: str, asked: int, made: int) -> None:
    features = QMCFeatures(sequence=sequence, n_components=asked)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert features.fit_transform(rows).shape == (300, made)
    assert [f"{made} features are made" in str(warning.message) for warning in said] == [True] * (asked != made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_components": 0}, "n_components is 0, expected an integer >= 1"),
        ({"refine_iter": 1.5}, "refine_iter is 1.5, expected an integer"),
        ({"gamma": 0.0}, 'gamma is 0.0, expected "scale" or positive, finite numbers'),
        ({"gamma": [1.0, 2.0]}, r"gamma has shape \(2,\), expected a number or one for each of 6 columns"),
        ({"gamma": "auto"}, 'gamma is "auto"'),
        ({"sequence": "random"}, 'sequence is "random", expected one of auto, sobol'),
        ({"kernel": "cosine"}, 'kernel is "cosine"'),
        ({"kernel": "matern", "nu": 0}, "nu is 0, expected a number > 0"),
        ({"kernel": "laplacian", "sequence": "orthogonal"}, "needs an isotropic kernel"),
        ({"kernel": "laplacian", "sequence": "adaptive"}, 'kernel "rbf" only'),
        ({"sequence": "adaptive", "box": -1.0}, 'box is -1.0, expected "quantile" or positive, finite numbers'),
    ],
)
def test_rejects(rows: np.ndarray, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QMCFeatures(**arguments).fit(rows)


def test_rejects_more_dimensions_than_a_sobol_sequence_has() -> None:
    X = sparse.csr_array((3, 21_202))
    with pytest.raises(ValueError, match="at most 21201 dimensions"):
        QMCFeatures(sequence="sobol", n_components=2).fit(X)


def test_rejects_arguments_of_the_discrepancy() -> None:
    with pytest.raises(ValueError, match=r"box has shape \(2,\)"):
        box_discrepancy(np.zeros((3, 4)), [1.0, 1.0], 1.0)
    with pytest.raises(ValueError, match="scale is 0.0, expected positive, finite numbers"):
        box_discrepancy(np.zeros((3, 4)), 1.0, 0.0)
    with pytest.raises(ValueError, match="power of two"):
        uniform_points("lattice", 100, 3, np.random.default_rng(0))
