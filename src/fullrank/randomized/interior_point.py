"""The Frisch-Newton interior point method for quantile regression: the exact core that every path of the room ends in.

It minimises, over beta in R^d,

    sum_i rho_{t_i}(b_i - a_i' beta) + c' beta + 1/2 sum_j l_j beta_j ** 2,      rho_t(r) = max(t r, (t - 1) r),

for dense or sparse rows a_i, a quantile t_i for each row, a linear term c (rows whose sign is already known add up to
one) and a ridge l. Weights and absolute penalties need no code of their own: w rho_t(r) = rho_t(w r), and
w |beta_j| = 2 w rho_{1/2}(0 - beta_j) is a row.

Its dual has one number z_i in [t_i - 1, t_i] for each row, with A'z = c + l beta.

Source: Portnoy and Koenker, The Gaussian hare and the Laplacian tortoise, Statistical Science 1997; Mehrotra, On the
implementation of a primal-dual interior point method, SIAM J. Optimization 1992.
"""

# Names: n rows, d columns. u, v positive and negative part of the residual; x = z + 1 - t in (0, 1), s = 1 - x.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from fullrank.randomized.blocks import Array

CHUNK = 2048  # rows of a weighted copy that stays in cache
MOST_PAIRS = 2**23  # products of two entries of a sparse row that are kept, 160 MiB


@dataclass(frozen=True)
class InteriorPointResult:
    """The solution of one small problem.

    Attributes:
        coef: shape (d,).
        dual: shape (n,), z; in [t - 1, t].
        gap: complementarity u's + v'x at the end: objective minus dual objective, up to the dual's own residual.
        n_iter: Newton systems factorised.
        converged: whether the gap fell to the tolerance.
    """

    coef: Array
    dual: Array
    gap: float
    n_iter: int
    converged: bool


def weighted_gram(A: Array | sparse.csr_array, q: Array) -> Array:
    """A' diag(q) A for q >= 0, without a weighted copy of all of A."""
    return Gram(A)(q)


class Gram:
    """A' diag(q) A as a function of q >= 0, for rows (n, d), dense or CSR.

    Of sparse rows the pairs of entries are laid out once: a product is then a sum by position.
    """

    def __init__(self, A: Any) -> None:
        self.A = A
        if not sparse.issparse(A):
            return
        counts = np.diff(A.indptr)
        self.pairs = np.square(counts).sum()
        if self.pairs > MOST_PAIRS:
            return
        d = A.shape[1]
        wide = np.repeat(counts, counts)  # each entry meets all entries of its row
        self.row = np.repeat(np.repeat(np.arange(len(counts)), counts), wide)
        first = np.repeat(np.arange(A.nnz), wide)
        begin = np.repeat(np.repeat(A.indptr[:-1], counts), wide)
        second = begin + np.arange(len(first)) - np.repeat(np.cumsum(wide) - wide, wide)
        self.place = A.indices[first].astype(np.int64) * d + A.indices[second]
        self.product = A.data[first] * A.data[second]

    def __call__(self, q: Array) -> Array:
        A, d = self.A, self.A.shape[1]
        if sparse.issparse(A):
            if self.pairs <= MOST_PAIRS:
                found = np.bincount(self.place, self.product * q[self.row], minlength=d * d)
                return np.asarray(found.reshape(d, d), dtype=np.float64)
            weighted = sparse.csr_array((A.data * np.repeat(q, np.diff(A.indptr)), A.indices, A.indptr), shape=A.shape)
            return np.asarray((A.T @ weighted).toarray())
        gram = np.zeros((d, d))
        root = np.sqrt(q)
        for low in range(0, len(A), CHUNK):
            part = A[low : low + CHUNK] * root[low : low + CHUNK, None]
            gram += part.T @ part
        return gram


def factor(gram: Array) -> tuple[Array, bool]:
    """Cholesky factor of a Gram matrix; where it is singular to rounding, as near a solution, of a larger one."""
    diagonal = np.diag(np.diag(gram))
    for jitter in (0.0, 1e-15, 1e-13, 1e-11, 1e-9):
        try:
            found: tuple[Array, bool] = cho_factor(gram + jitter * diagonal, lower=True)
            return found
        except LinAlgError:
            continue
    raise LinAlgError("the rows of the problem do not span its columns")


def frisch_newton(
    A: Array | sparse.csr_array,
    b: Array,
    quantile: float | Array,
    *,
    linear: Array | None = None,
    ridge: Array | None = None,
    start: Array | None = None,
    tol: float = 1e-8,
    scale: float | None = None,
    max_iter: int = 50,
) -> InteriorPointResult:
    """Minimise the sum above.

    Args:
        A: shape (n, d), float64, of rank d unless `ridge` makes up for it.
        b: shape (n,).
        quantile: t, in (0, 1): one for all rows or shape (n,).
        linear: c, shape (d,); zero when omitted.
        ridge: l, shape (d,), non-negative; zero when omitted.
        start: coefficients to start from; least squares when omitted.
        tol: stop when the gap is at most `tol` times `scale`.
        scale: the objective by default; of a part of a problem, the objective of the whole.
        max_iter: most Newton systems.

    Raises:
        scipy.linalg.LinAlgError: if the rows do not span the columns.
    """
    n, d = A.shape
    t = np.broadcast_to(np.asarray(quantile, dtype=np.float64), (n,))
    c = np.zeros(d) if linear is None else linear
    l2 = np.zeros(d) if ridge is None else ridge
    target = A.T @ (1 - t) + c
    gram = Gram(A)
    if start is None:
        beta = cho_solve(factor(gram(np.ones(n)) + np.diag(l2)), A.T @ b)
    else:
        beta = np.array(start, dtype=np.float64)
    residual = b - A @ beta
    size = np.abs(residual)
    largest = float(np.abs(b).max(initial=0.0))
    if linear is None and not largest:
        return InteriorPointResult(np.zeros(d), np.zeros(n), 0.0, 0, True)
    # Deviation: Portnoy and Koenker start on the boundary; here each part of a residual is at least a hundredth of the
    # median one, because the first steps are then longer and a residual of zero needs no case of its own.
    typical = float(np.median(size)) or float(size.mean()) or (scale or 1.0) / n
    floor = 0.01 * typical + 1e-12 * largest
    u, v = np.maximum(residual, 0) + floor, np.maximum(-residual, 0) + floor
    # 1 - t is feasible where c is zero. With c most entries end far from it, and an extreme t is near the boundary.
    x = 1 - t if linear is None else np.full(n, 0.5)
    s = 1 - x
    reach = np.asarray(abs(A).sum(axis=0)).ravel() + np.abs(c)
    converged = False
    iteration = 0
    limit = 1e12 * float(u @ s + v @ x)
    for iteration in range(max_iter + 1):
        gap = float(u @ s + v @ x)
        short = target + l2 * beta - A.T @ x
        whole = scale
        if whole is None:
            whole = float(t @ u + (1 - t) @ v + c @ beta + 0.5 * l2 @ beta**2)
        converged = gap <= tol * max(abs(whole), 1e-300) and bool((np.abs(short) <= 1e-6 * reach).all())
        # A gap that only grows: with this `linear` term the sum has no minimum.
        if converged or iteration == max_iter or not gap <= limit:
            break
        q = 1 / (u / s + v / x)
        lower = factor(gram(q) + np.diag(l2))
        residual = u - v
        plain = A.T @ (q * residual) - short
        d_beta = cho_solve(lower, plain)
        d_x = q * (residual - A @ d_beta)
        d_u, d_v = u * (d_x / s - 1), -v * (d_x / x + 1)
        primal, dual = _step(x, d_x, s, -d_x), _step(u, d_u, v, d_v)
        if min(primal, dual) < 1:
            moved_u, moved_v = u + dual * d_u, v + dual * d_v
            ahead = float((s - primal * d_x) @ moved_u + (x + primal * d_x) @ moved_v)
            mu = gap / (2 * n) * (ahead / gap) ** 3
            up, down = (mu + d_u * d_x) / s, (mu - d_v * d_x) / x
            shift = up - down
            d_beta = cho_solve(lower, plain - A.T @ (q * shift))
            d_x = q * (residual - shift - A @ d_beta)
            d_u, d_v = up + u * (d_x / s - 1), down - v * (d_x / x + 1)
            primal, dual = _step(x, d_x, s, -d_x), _step(u, d_u, v, d_v)
        x, s = x + primal * d_x, s - primal * d_x
        u, v, beta = u + dual * d_u, v + dual * d_v, beta + dual * d_beta
    z = np.clip(x, 0, 1) - (1 - t)
    for _ in range(2):
        z = balanced(A, z, t, c + l2 * beta - A.T @ z)
    return InteriorPointResult(beta, z, gap, iteration, converged)


def balanced(A: Array | sparse.csr_array, z: Array, quantile: float | Array, short: Array) -> Array:
    """z in [t - 1, t] moved as little as its distance from the bounds tells, so that A'z rises by `short`, (d,)."""
    room = (quantile - z) * (z - (quantile - 1))
    try:
        step = cho_solve(factor(weighted_gram(A, np.maximum(room, 0))), short)
    except LinAlgError:
        return z
    return np.asarray(np.clip(z + room * (A @ step), quantile - 1, quantile), dtype=np.float64)


def _step(first: Array, d_first: Array, second: Array, d_second: Array) -> float:
    """The longest step in [0, 1] that keeps both positive."""
    ratio = min(float(np.min(d_first / first)), float(np.min(d_second / second)))
    return 1.0 if ratio >= 0 else min(1.0, -0.99995 / ratio)
