"""From a sketch to a basis: R such that the columns of A R^-1, never stored, are well conditioned, in l2 or in l1.

    SA = sketch(A, 20 * d, random_state=0)
    N = preconditioner(np.linalg.qr(SA, mode="r")).N    # A @ N has condition about 1.6
    R = l1_conditioner(ArraySource(A), "spc3", seed=0)

Sources: Meng, Saunders and Mahoney, LSRN, 2014 (preconditioner by singular values); Yang, Meng and Mahoney, Quantile
Regression for Large-scale Applications, arXiv 1305.0087 (spc1, spc2, spc3, ellipsoidal rounding).
"""

# Shapes: n rows, q columns, r rank, m rows of a sketch.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import ceil, log, sqrt
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse as sp

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.engine import Executor, map_reduce
from fullrank.randomized.sampling import sample_rows
from fullrank.randomized.sketches import Sketch, sketch_blocks
from fullrank.randomized.sources import RowSource

L1_KINDS = ("spc1", "spc2", "spc3", "cauchy", "none")
_TINY = np.finfo(float).tiny
_DRAWS = 4  # a Cauchy variable can hide a rare column; so often is a sketch drawn before the column counts as dependent


class RankDeficientError(np.linalg.LinAlgError):
    """Columns of a table are linear combinations of others."""


class Preconditioner(NamedTuple):
    """N, shape (q, r), with A N well conditioned; null, (q, q - r), with A null = 0; condition of R."""

    N: Array
    null: Array
    condition: float


def preconditioner(R: Array, rcond: float | None = None) -> Preconditioner:
    """Inverse of R on its range, by singular values, after its columns are scaled to norm 1.

    Args:
        R: shape (m, q), usually the triangular factor of a sketch.
        rcond: singular values below rcond * the largest count as zero; max(m, 20 q) * machine epsilon when omitted.

    Raises:
        ValueError: R is not finite.
    """
    if not np.isfinite(R).all():
        raise ValueError("the sketch is not finite: the table's values overflow")
    scale = np.linalg.norm(R, axis=0)
    scale[scale == 0] = 1
    _, singular, rows = np.linalg.svd(R / scale, full_matrices=True)
    if rcond is None:
        rcond = max(R.shape[0], 20 * R.shape[1]) * np.finfo(float).eps
    rank = int((singular > rcond * singular[0]).sum()) if singular.any() else 0
    unscaled = np.linalg.svd(R, compute_uv=False)
    full = rank == R.shape[1] and unscaled[-1] > 0
    condition = float(unscaled[0] / unscaled[-1]) if full else np.inf
    return Preconditioner((rows[:rank].T / singular[:rank]) / scale[:, None], rows[rank:].T / scale[:, None], condition)


def triangular(rows: Array) -> Array:
    """R of rows = QR, shape (min(rows, columns), columns)."""
    return np.asarray(np.linalg.qr(rows, mode="r"))


def sparse_triangular(A: sp.csr_array) -> Array:
    """R with R'R = A'A, shape (q, q), upper triangular; rows of zero for columns that those before them span.

    It comes from A'A: rows that are not sparse in R are never formed. A column that A'A takes for a combination of
    others is held against them itself, and one that only comes near to it makes the rows dense.
    """
    q = A.shape[1]
    gram = np.asarray((A.T @ A).toarray())
    scale = np.sqrt(np.maximum(np.diag(gram), 0))
    left = gram / np.outer(scale, scale + (scale == 0)).clip(_TINY)
    R, kept, spanned = np.zeros((q, q)), [], []
    for j in range(q):
        pivot = left[j, j]
        if scale[j] > 0 and pivot > 1e-9:
            R[j, j:] = left[j, j:] / sqrt(pivot)
            left[j + 1 :, j + 1 :] -= np.outer(R[j, j + 1 :], R[j, j + 1 :])
            kept.append(j)
        else:
            spanned.append(j)
    if spanned:
        K = R[np.ix_(kept, kept)]
        rest = A[:, spanned].toarray()
        for _ in range(3):
            projected = A[:, kept].T @ rest / scale[kept, None]
            coef = scipy.linalg.solve_triangular(K, scipy.linalg.solve_triangular(K, projected, trans="T"))
            rest = rest - A[:, kept] @ (coef / scale[kept, None])
        if (np.linalg.norm(rest, axis=0) > 1e-12 * scale[spanned]).any():
            return triangular(np.vstack([A.toarray(), np.zeros((q, q))]))
    return R * scale


def qr_blocks(blocks: Iterator[Block], intercept: bool, target: bool, weight_power: float = 0.5) -> Array:
    """Triangular factor of the rows of a fragment; for `map_reduce` with `join_factors`."""
    R: Array | None = None
    for block in blocks:
        columns = block.columns(intercept=intercept, target=target, weight_power=weight_power)
        R = triangular(columns if R is None else np.vstack([R, columns]))
    assert R is not None, "a fragment has rows"
    return R


def join_factors(first: Array, second: Array) -> Array:
    return triangular(np.vstack([first, second]))


def exact_factor(
    source: RowSource,
    *,
    intercept: bool = False,
    target: bool = False,
    weight_power: float = 0.5,
    executor: Executor = "serial",
) -> Array:
    """R of the QR factorisation of [1 | X | y] in one pass, by blocks; rows times weight ** weight_power."""
    factor = partial(qr_blocks, intercept=intercept, target=target, weight_power=weight_power)
    R: Array = map_reduce(source, factor, join_factors, executor)
    return R


def dependent_columns(R: Array, rcond: float = 1e-12) -> list[int]:
    """Columns that a pivoted QR of R finds to depend on the others; empty at full rank."""
    scale = np.linalg.norm(R, axis=0)
    triangle, pivots = scipy.linalg.qr(R / np.where(scale > 0, scale, 1), mode="r", pivoting=True)
    diagonal = np.zeros(R.shape[1])
    diagonal[: min(triangle.shape)] = np.abs(np.diag(triangle))
    return sorted(int(j) for j in pivots[diagonal <= rcond * max(diagonal.max(), np.finfo(float).tiny)])


def check_rank(R: Array, names: Sequence[str], rcond: float = 1e-12) -> None:
    """Raises RankDeficientError, which names the dependent columns, unless R has full column rank."""
    if dependent := dependent_columns(R, rcond):
        listed = ", ".join(f'"{names[j]}"' for j in dependent[:10]) + (", ..." if len(dependent) > 10 else "")
        raise RankDeficientError(f"rank {R.shape[1] - len(dependent)} of {R.shape[1]} columns; dependent: {listed}")


def l1_conditioner(
    source: RowSource,
    kind: str = "spc3",
    *,
    sketch_size: int | None = None,
    sample_size: int | None = None,
    intercept: bool = False,
    target: bool = True,
    seed: int = 0,
    executor: Executor = "serial",
) -> Array:
    """R such that [1 | X | y] R^-1 is a well-conditioned basis in l1; rows count weight times.

    Args:
        source: the table.
        kind: "spc1": QR of a sparse Cauchy sketch, one pass. "spc3": QR of a sample of rows drawn by their l1 norm in
            the basis of spc1, three passes. "spc2": ellipsoidal rounding of that sample. "cauchy": QR of a dense Cauchy
            sketch. "none": the identity.
        sketch_size: rows of the sketch; 20 q when omitted (2 q log q for "cauchy").
        sample_size: rows of the sample of spc2 and spc3; 100 q when omitted.
        intercept, target: columns of the basis beside X. The residual must lie in the space, hence the target.
        seed: of sketch and sample.
        executor: as in `map_reduce`.

    Returns:
        shape (q, q).

    Raises:
        RankDeficientError: columns depend on others, after four draws.
        ValueError: unknown kind.

    Source: arXiv 1305.0087, section 3.
    Deviation: the authors' code sketches to 2 q^2 log(q)^2 rows and samples 2 q^3 log(q)^2, which at q = 50 is no
    reduction at all; 20 q and 100 q gave the same error in practice. A draw that lost a column is drawn again.
    """
    if kind not in L1_KINDS:
        raise ValueError(f'conditioner is "{kind}", expected one of {", ".join(L1_KINDS)}')
    names = ["intercept"] * intercept + source.feature_names + [f"target {j}" for j in range(source.n_targets * target)]
    q = len(names)
    if kind == "none":
        return np.eye(q)
    sketch_kind = "cauchy" if kind == "cauchy" else "sparse_cauchy"
    if sketch_size is None:
        sketch_size = max(q, ceil(2 * q * log(q + 1))) if kind == "cauchy" else 20 * q
    columns: dict[str, Any] = {"intercept": intercept, "target": target}
    for stream in range(_DRAWS):
        S = Sketch(sketch_kind, sketch_size, seed, stream=stream)
        sketched = map_reduce(source, partial(sketch_blocks, S=S, **columns, weight_power=1.0), executor=executor)
        R = triangular(sketched)
        if kind in ("spc2", "spc3") and not dependent_columns(R):
            N = scipy.linalg.solve_triangular(R, np.eye(q))
            size = 100 * q if sample_size is None else sample_size
            rows = sample_rows(source, size, N, p=1, seed=seed, stream=100 + stream, executor=executor, **columns)
            R = triangular(rows)
            if kind == "spc2" and not dependent_columns(R):
                R = ellipsoidal_rounding(rows)
        if not dependent_columns(R):
            return R
    check_rank(R, names)
    return R


def ellipsoidal_rounding(A: Array) -> Array:
    """R such that A R^-1 is well conditioned in l1, by rounding the ball {x: |A x|_1 <= 1}.

    Args:
        A: shape (n, q), full column rank; cost O(n q^2) for each of up to 1.6 q log n cuts, so for samples.

    Returns:
        shape (q, q): |A x|_1 <= 2 sqrt(q) |R x|_2 and |R x|_2 <= sqrt(q) |A x|_1 for every x.

    Raises:
        RankDeficientError: A has dependent columns.

    Source: arXiv 1305.0087, section 3.1, and Clarkson et al., The Fast Cauchy Transform, 2013, section 3.
    """
    n, q = A.shape
    R0 = triangular(A)
    check_rank(R0, [f"x{j}" for j in range(q)])
    # |U x|_2 <= |U x|_1 <= sqrt(n) |U x|_2: a short table is round already.
    if q == 1 or sqrt(n) <= 2 * q:
        return R0
    B = scipy.linalg.solve_triangular(R0, A.T, trans="T").T
    E = np.eye(q)
    for _ in range(ceil(1.6 * q * log(n)) + 1):
        lengths, directions = np.linalg.eigh(E)
        axes = directions * np.sqrt(lengths)
        images = B @ axes
        norms = np.abs(images).sum(axis=0)
        worst = int(norms.argmax())
        if norms[worst] <= 2 * sqrt(q):
            break
        # The ball lies in the slab |g'x| <= 1; the smallest ellipsoid around slab and E together replaces E.
        g = B.T @ np.sign(images[:, worst])
        Eg = E @ g
        a2 = 1 / float(g @ Eg)
        if a2 >= 1 / q:
            break
        sigma, delta = (1 - q * a2) / (1 - a2), q * (1 - a2) / (q - 1)
        E = delta * (E - sigma * a2 * np.outer(Eg, Eg))
        E = (E + E.T) / 2
    lengths, directions = np.linalg.eigh(E)
    return triangular((directions / np.sqrt(lengths)).T @ R0)
