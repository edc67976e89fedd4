"""Fourier features of shift-invariant kernels whose frequencies are spread evenly instead of drawn."""

# Shapes: n rows, d columns, s frequencies, P pairs of rows.

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted, validate_data

from fullrank.randomized.adaptive import greedy_frequencies, minimise_discrepancy, minimise_pair_error
from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.discrepancy import box_discrepancy
from fullrank.randomized.engine import Executor, map_reduce
from fullrank.randomized.inputs import FLOATS, TableEstimator, array_source, given_source, on_rows
from fullrank.randomized.parameters import (
    FLAG,
    POSITIVE,
    check_parameters,
    integer,
    number,
    one_of,
    per_column,
    random_seed,
)
from fullrank.randomized.sequences import BASE_2, SOBOL_DIMENSIONS, UNIFORM
from fullrank.randomized.sketches import row_uniforms
from fullrank.randomized.spectral import KERNELS, kernel_values, mean_cosines, spectral_frequencies

REFINED = ("adaptive", "greedy", "empirical")
SEQUENCES = ("auto", *UNIFORM, "orthogonal", *REFINED)
SAMPLE_ROWS = 20_000
CHOICE_PAIRS, FIT_PAIRS, BOX_PAIRS = 5_000, 4_000, 20_000
BOX_QUANTILE = 0.75
# Phases of this many numbers stay in a core's cache between the product and the cosines.
BLOCK = 1 << 17
_RULES = {
    "kernel": one_of(*KERNELS),
    "gamma": one_of("scale") | POSITIVE,
    "nu": number(above=0),
    "n_components": integer(1),
    "sequence": one_of(*SEQUENCES),
    "scramble": FLAG,
    "box": one_of("quantile") | POSITIVE,
    "refine_iter": integer(1),
}


class KernelError(NamedTuple):
    """Relative error of an approximated kernel, and its standard error where pairs were sampled (0 otherwise)."""

    value: float
    standard_error: float


def kernel_error(
    X: ArrayLike | sparse.csr_array,
    Z: Array,
    kernel: str = "rbf",
    *,
    gamma: float | ArrayLike = 1.0,
    nu: float = 1.5,
    pairs: int | None = None,
    random_state: int | np.random.RandomState | None = None,
) -> KernelError:
    """||ZZ' - K|| / ||K|| in the Frobenius norm, K the kernel matrix of X.

    Args:
        X: rows, shape (n, d), dense or sparse.
        Z: their features, shape (n, m).
        kernel, gamma, nu: see `QMCFeatures`; `gamma` a number or one per column.
        pairs: estimate it from this many random pairs of different rows; all pairs, and each row with itself, when
            omitted, at O(n^2 (d + m)) cost.

    Raises:
        ValueError: if X and Z differ in rows, or no pair exists.
    """
    X = check_array(X, accept_sparse="csr", dtype=np.float64)
    if X.shape[0] != len(Z):
        raise ValueError(f"X has {X.shape[0]} rows, Z has {len(Z)}")
    gamma = per_column("gamma", gamma, X.shape[1])
    if pairs is not None:
        rng = np.random.default_rng(random_seed(random_state))
        left, right = _pairs(np.arange(len(Z)), pairs, rng)
        k = kernel_values(X[left] - X[right], kernel, gamma, nu)
        return _relative_error(np.einsum("pm,pm->p", Z[left], Z[right]) - k, k)
    wrong = total = 0.0
    for row in range(len(Z)):
        k = kernel_values(X[row:] - X[[row] * (len(Z) - row)], kernel, gamma, nu)
        squares = (Z[row:] @ Z[row] - k) ** 2
        wrong += 2 * float(squares.sum()) - float(squares[0])
        total += 2 * float(k @ k) - float(k[0] ** 2)
    return KernelError(float(np.sqrt(wrong / total)), 0.0)


class QMCFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, TableEstimator):  # type: ignore[misc]
    """Features z(x) with z(x)'z(y) ~ k(x - y): cosines and sines of s projections, s^(-1/2) [cos x'w_l, sin x'w_l].

    Every z(x) has norm 1. Fewer features than of drawn frequencies give the same kernel error; that says nothing about
    the accuracy of a model on top, which the kernel's own fit to the data decides.

    Args:
        kernel: "rbf", exp(-gamma |u|^2); "laplacian", exp(-gamma |u|_1); "matern", of smoothness `nu` and length scale
            1/sqrt(2 gamma), whose limit for large `nu` is "rbf".
        gamma: positive number, one per column (shape (d,)), or "scale": 1 / (d Var X).
        nu: smoothness of "matern", positive.
        n_components: number of features, two for each frequency. An odd number is rounded up, and for base-2 sequences
            ("auto" is one) any that is no power of two, with a warning.
        sequence: where frequencies come from.

            * "auto": "sobol" or "orthogonal", whichever has the lower kernel error on 5,000 pairs of training rows
              (Sobol is better in few dimensions and with many frequencies, also where many columns hardly vary);
              "sobol" for "laplacian", whose kernel is not isotropic.
            * "sobol", "halton", "lattice", "digital_net", "mc": see `uniform_points`. "orthogonal": orthogonal
              directions within blocks of d.
            * "adaptive", "greedy": start at "auto" and lower the box discrepancy, all frequencies at once or one after
              the other; "rbf" only. "empirical": start at "auto" and lower the error on 4,000 pairs of training rows.
              All three keep the start, with a warning, where they do not lower the error on pairs of rows held out.
        scramble: randomise the sequence, so that z(x)'z(y) is unbiased; without it high dimensions suffer.
        box: half-widths of the box of differences: "quantile", the 75% quantile of |x_j - x'_j| over pairs of rows, or
            positive numbers, one or shape (d,).
        refine_iter: steps of L-BFGS of "adaptive" and "empirical".
        verbose: whether to tell of the refinement and slow passes on standard error.
        executor: where the pass of `fit` runs; see `map_reduce`.
        random_state: seed.

    Attributes:
        frequencies_: shape (d, s).
        gamma_: number or shape (d,).
        sequence_: the sequence that was taken.
        box_: shape (d,); None unless "adaptive" or "greedy" was asked for, and so
        discrepancy_: box discrepancy of the frequencies.
        kernel_error_: relative error on pairs of rows (held out ones after refinement) with its standard error; None
            where frequencies were made without a look at the data.

    Raises:
        ValueError: in `fit`, for any argument outside what is said here.

    Source: Avron, Sindhwani, Yang, Mahoney, Quasi-Monte Carlo Feature Maps for Shift-Invariant Kernels, 1412.8293.
    Deviation: the paper's box bounds all differences; its far corners, where the kernel is 0, then decide, and the
    kernel error of real rows grows. "empirical" and "auto" are not in the paper.
    """

    def __init__(
        self,
        kernel: str = "rbf",
        *,
        gamma: float | ArrayLike | str = "scale",
        nu: float = 1.5,
        n_components: int = 256,
        sequence: str = "auto",
        scramble: bool = True,
        box: float | ArrayLike | str = "quantile",
        refine_iter: int = 30,
        verbose: bool | int = False,
        executor: Executor = "serial",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.kernel = kernel
        self.gamma = gamma
        self.nu = nu
        self.n_components = n_components
        self.sequence = sequence
        self.scramble = scramble
        self.box = box
        self.refine_iter = refine_iter
        self.verbose = verbose
        self.executor = executor
        self.random_state = random_state

    def fit(self, X: Any, y: None = None) -> Self:
        """Make the frequencies. Only "auto" and the refined sequences look at more of X than its width and variance.

        Args:
            X: shape (n, d), dense or sparse; or a `RowSource` or Dask collection, read once. Of more than 20,000 rows,
                the pairs come from about as many.
        """
        check_parameters(self, _RULES)
        if self.sequence in ("adaptive", "greedy") and self.kernel != "rbf":
            raise ValueError(f'sequence "{self.sequence}" has a closed form for kernel "rbf" only, got "{self.kernel}"')
        source = given_source(self, X, targets=None)
        if source is None:
            source = array_source(self, validate_data(self, X, accept_sparse="csr", dtype=FLOATS))
        d = source.n_cols
        seed = random_seed(self.random_state)
        odds = SAMPLE_ROWS / source.n_rows
        total, squares, rows = map_reduce(source, partial(_sample, odds=odds, seed=seed), executor=self.executor)
        X = sparse.vstack(rows, format="csr") if sparse.issparse(rows[0]) else np.concatenate(rows)
        rng = np.random.default_rng(seed)
        if isinstance(self.gamma, str):
            mean = total / (source.n_rows * d)
            variance = squares / (source.n_rows * d) - mean**2
            self.gamma_ = 1 / (d * variance) if variance > 1e-12 * mean**2 else 1.0
        else:
            gamma = per_column("gamma", self.gamma, d)
            self.gamma_ = gamma if gamma.ndim else float(gamma)
        self.box_: Array | None = None
        self.discrepancy_: float | None = None
        self.kernel_error_: KernelError | None = None
        self.sequence_ = self.sequence
        if self.sequence in UNIFORM or self.sequence == "orthogonal":
            self.frequencies_ = self._draw(self.sequence, d, rng)
        elif self.sequence == "auto":
            self._choose(X, np.arange(X.shape[0]), rng)
        else:
            source.tell(f"{self.sequence}: frequencies of {X.shape[0]} rows are refined")
            self._refine(X, rng)
        if self.kernel_error_ is not None:
            source.tell(f"{self.sequence_}: kernel error {self.kernel_error_.value:.3g}")
        self._n_features_out = 2 * self.frequencies_.shape[1]
        return self

    def transform(self, X: Any) -> NDArray[np.floating]:
        """Features of X (n, d), shape (n, 2s), cosines first, in the precision of X; those of a source are float64."""
        check_is_fitted(self)
        return on_rows(self, X, partial(_features, self.frequencies_))

    def _frequency_count(self, sequence: str) -> int:
        s = (self.n_components + 1) // 2
        if sequence in BASE_2:
            s = 1 << (s - 1).bit_length()
        if 2 * s != self.n_components:
            rule = "a power of two" if sequence in BASE_2 else "an even number"
            warnings.warn(
                f'n_components is {self.n_components}, sequence "{sequence}" needs {rule}: {2 * s} features are made',
                UserWarning,
                stacklevel=4,
            )
        return s

    def _draw(self, sequence: str, d: int, rng: np.random.Generator, s: int | None = None) -> Array:
        s = s or self._frequency_count(sequence)
        return spectral_frequencies(self.kernel, self.gamma_, self.nu, sequence, s, d, rng, scramble=self.scramble)

    def _choose(self, X: Any, rows: NDArray[np.intp], rng: np.random.Generator) -> None:
        """Set frequencies, error and name of the better of Sobol and orthogonal on pairs of these rows."""
        d = X.shape[1]
        s = self._frequency_count("sobol")
        names = ["sobol"] if self.kernel == "laplacian" else ["sobol", "orthogonal"]
        if d + (self.kernel == "matern") > SOBOL_DIMENSIONS:
            names = [name if name != "sobol" else "mc" for name in names]
        if len(rows) < 2:
            self.sequence_ = names[0] if s >= d**2 else names[-1]
            self.frequencies_ = self._draw(self.sequence_, d, rng, s)
            return
        U, k = self._differences(X, rows, CHOICE_PAIRS, rng)
        drawn = {name: self._draw(name, d, rng, s) for name in names}
        errors = {name: _relative_error(mean_cosines(U, W) - k, k) for name, W in drawn.items()}
        self.sequence_ = min(errors, key=lambda name: errors[name].value)
        self.frequencies_, self.kernel_error_ = drawn[self.sequence_], errors[self.sequence_]

    def _refine(self, X: Any, rng: np.random.Generator) -> None:
        d = X.shape[1]
        order = rng.permutation(X.shape[0])
        held_out, rows = (order[: len(order) // 5], order[len(order) // 5 :]) if len(order) >= 20 else (order, order)
        self._choose(X, rows, rng)
        if len(order) < 2:
            self._keep_start("one row has no pairs")
            return
        start, start_name = self.frequencies_, self.sequence_
        U, k = self._differences(X, rows, FIT_PAIRS, rng)
        if self.sequence == "empirical":
            moved = minimise_pair_error(start, U, k, self.refine_iter)
        else:
            scale = np.broadcast_to(1 / np.sqrt(2 * np.asarray(self.gamma_)), (d,))
            self.box_ = self._box(X, rows, scale, rng)
            if self.sequence == "adaptive":
                moved = minimise_discrepancy(start, self.box_, scale, self.refine_iter)
            else:
                moved = greedy_frequencies(start, start.shape[1], self.box_, scale)
        U, k = self._differences(X, held_out, CHOICE_PAIRS, rng)
        before, after = (_relative_error(mean_cosines(U, W) - k, k) for W in (start, moved))
        self.frequencies_, self.kernel_error_, self.sequence_ = moved, after, self.sequence
        if not after.value < before.value:
            self.frequencies_, self.kernel_error_, self.sequence_ = start, before, start_name
            self._keep_start("it did not lower the kernel error on rows held out")
        if self.box_ is not None:
            self.discrepancy_ = box_discrepancy(self.frequencies_, self.box_, scale)

    def _keep_start(self, why: str) -> None:
        warnings.warn(f'sequence "{self.sequence}" keeps its start: {why}', UserWarning, stacklevel=4)

    def _differences(self, X: Any, rows: NDArray[np.intp], pairs: int, rng: np.random.Generator) -> tuple[Any, Array]:
        left, right = _pairs(rows, pairs, rng)
        U = (X[left] - X[right]).astype(np.float64)
        return U, kernel_values(U, self.kernel, self.gamma_, self.nu)

    def _box(self, X: Any, rows: NDArray[np.intp], scale: Array, rng: np.random.Generator) -> Array:
        if not isinstance(self.box, str):
            return np.broadcast_to(per_column("box", self.box, X.shape[1]), (X.shape[1],))
        left, right = _pairs(rows, BOX_PAIRS, rng)
        widths = abs(X[left] - X[right])
        if sparse.issparse(widths):
            columns = widths.tocsc()
            dense = (columns[:, [j]].toarray()[:, 0] for j in range(X.shape[1]))
            quantiles = np.array([np.quantile(column, BOX_QUANTILE) for column in dense])
        else:
            quantiles = np.quantile(widths, BOX_QUANTILE, axis=0)
        # A column in which most pairs agree asks nothing of its frequencies: the limit of an empty interval.
        return np.asarray(np.maximum(quantiles, 1e-6 * scale))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _features(frequencies: Array, X: Any) -> NDArray[np.floating]:
    """Cosines and sines of the projections of rows X (k, d), shape (k, 2s)."""
    W = frequencies.astype(X.dtype, copy=False)
    s = W.shape[1]
    Z = np.empty((X.shape[0], 2 * s), dtype=X.dtype)
    rows = max(1, BLOCK // s)
    for start in range(0, len(Z), rows):
        phase, out = X[start : start + rows] @ W, Z[start : start + rows]
        np.cos(phase, out=out[:, :s])
        np.sin(phase, out=out[:, s:])
        out *= s**-0.5
    return Z


def _sample(blocks: Iterator[Block], *, odds: float, seed: int) -> tuple[float, float, list[Any]]:
    """Sum and sum of squares of all numbers, and rows kept by a coin of each."""
    total, squares, kept = 0.0, 0.0, []
    for block in blocks:
        X = block.X
        total += float(X.sum())
        squares += float(X.multiply(X).sum() if sparse.issparse(X) else np.vdot(X, X))
        kept.append(X if odds >= 1 else X[row_uniforms(seed, block.start, block.stop) < odds])
    return total, squares, kept


def _pairs(rows: NDArray[np.intp], pairs: int, rng: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Both sides of random pairs of different rows."""
    if len(rows) < 2:
        raise ValueError(f"a pair needs two rows, got {len(rows)}")
    left = rng.integers(len(rows), size=pairs)
    return rows[left], rows[(left + rng.integers(1, len(rows), size=pairs)) % len(rows)]


def _relative_error(error: Array, kernel: Array) -> KernelError:
    """Root of the ratio of mean squares; its standard error by the delta method."""
    wrong, total = error**2, kernel**2
    # A kernel of differences so large that it vanishes: the error is absolute then.
    mean = float(total.mean()) or 1.0
    ratio = float(wrong.mean()) / mean
    deviation = float(np.std(wrong - ratio * total)) / (mean * np.sqrt(len(error)))
    value = float(np.sqrt(ratio))
    return KernelError(value, deviation / (2 * value) if value else 0.0)
