"""From the interior of a small quantile regression to one of its vertices, the same one whatever led there.

A vertex passes through D rows, its basis; every other row has a side. It is optimal where the dual of the basis is
inside its bounds, and then it solves the problem up to rounding. Where several vertices are optimal (the median of an
even number of values), the one is taken that stays optimal if the quantile rises a little, so that repeated rows and
their weighted counterpart give the same coefficients.

Source: Barrodale and Roberts, An improved algorithm for discrete l1 linear approximation, SIAM J. Numerical Analysis
1973; Koenker and d'Orey, Algorithm AS 229, Applied Statistics 1987, for quantiles.
"""

# Names: A (m, D) and b (m,) weighted rows, t (m,) their quantiles, N rows outside the basis B.

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import LinAlgError, lu_factor, lu_solve, qr

from fullrank.randomized.blocks import Array, squared

TIE = 1e-9


def vertex(
    A: Any, b: Array, t: Array, linear: Array, coef: Array, rising: Array, max_pivots: int
) -> tuple[Array, Array] | None:
    """The optimal vertex next to `coef`.

    Args:
        A: shape (m, D), dense or CSR, of rank D; rows of weight zero left out.
        b: shape (m,).
        t: shape (m,), in (0, 1).
        linear: shape (D,), what A'z must be.
        coef: shape (D,), a solution to some digits.
        rising: shape (m,), 1 where the quantile rises to break ties, 0 for penalties.
        max_pivots: most exchanges of a row of the basis.

    Returns:
        Coefficients (D,) and dual z (m,); None where rounding or `max_pivots` ends the search.
    """
    m, D = A.shape
    norms = np.sqrt(np.asarray(squared(A).sum(axis=1)).ravel())
    if m < D or not norms.all():
        return None
    away = np.abs(b - A @ coef) / norms
    basis = _independent(A, norms, away)
    if basis is None:
        return None
    side = np.where(b - A @ coef < 0, t - 1, t)
    rounding = 1e-12 * (np.abs(b) + abs(A) @ np.abs(coef))
    for _ in range(max_pivots + 1):
        try:
            factors = lu_factor(_dense(A[basis]))
        except (LinAlgError, ValueError):
            return None
        coef = lu_solve(factors, b[basis])
        outside = np.ones(m, dtype=bool)
        outside[basis] = False
        residual = b - A @ coef
        # On the way from the interior to the first vertex a row near zero may have been crossed.
        crossed = outside & (np.abs(residual) > rounding) & (residual * side < 0)
        side[crossed] = np.where(side[crossed] > 0, t[crossed] - 1, t[crossed])
        z = np.where(outside, side, 0.0)
        z[basis] = lu_solve(factors, linear - A.T @ z, trans=1)
        drift = lu_solve(factors, -(A.T @ (rising * outside)), trans=1)
        leaving, up = _leaving(z[basis], drift, t[basis], rising[basis])
        if leaving is None:
            return (coef, z) if np.isfinite(coef).all() else None
        unit = np.zeros(D)
        unit[leaving] = -1.0 if up else 1.0
        change = -(A @ lu_solve(factors, unit))
        change[basis] = 0
        # A row is crossed where its residual runs against its side.
        facing = outside & (np.where(side > 0, change < 0, change > 0)) & (np.abs(change) > 1e-11 * norms)
        rows = np.flatnonzero(facing)
        if len(rows) == 0:
            return None
        steps = np.maximum(-residual[rows] / change[rows], 0)
        order = np.argsort(steps, kind="stable")
        excess = z[basis[leaving]] - t[basis[leaving]] if up else t[basis[leaving]] - 1 - z[basis[leaving]]
        climbed = np.cumsum(np.abs(change[rows[order]]))
        stop = int(np.searchsorted(climbed, max(excess, 0.0) + TIE))
        if stop == len(rows):
            return None
        passed = rows[order[:stop]]
        side[passed] = np.where(side[passed] > 0, t[passed] - 1, t[passed])
        row = basis[leaving]
        side[row] = t[row] if up else t[row] - 1
        basis[leaving] = rows[order[stop]]
    return None


def _dense(rows: Any) -> Array:
    return np.asarray(rows.toarray() if sparse.issparse(rows) else rows)


def _independent(A: Any, norms: Array, away: Array) -> NDArray[np.intp] | None:
    """D independent rows, near ones first."""
    m, D = A.shape
    for count in (2 * D, m):
        near = np.argsort(away, kind="stable")[:count]
        rows = _dense(A[near]) / norms[near, None]
        weights = 1 / (away[near] + 1e-12 * away.max() + 1e-300)
        _, R, pivots = qr((rows * (weights / weights.max())[:, None]).T, mode="economic", pivoting=True)
        picked = pivots[:D]
        if len(picked) == D and abs(R[D - 1, D - 1]) > 0 and np.linalg.cond(rows[picked]) < 1e10:
            return np.asarray(near[picked])
    return None


def _leaving(z: Array, drift: Array, t: Array, rising: Array) -> tuple[int | None, bool]:
    """Position of the row whose dual is out of bounds by most, or would be for a higher quantile; whether upwards."""
    above, below = z - t, t - 1 - z
    worst = np.maximum(above, below)
    position = int(np.argmax(worst))
    if worst[position] > TIE:
        return position, bool(above[position] > below[position])
    leaves = np.where(above > -TIE, drift - rising, np.where(below > -TIE, rising - drift, 0.0))
    position = int(np.argmax(leaves))
    if leaves[position] > TIE:
        return position, bool(above[position] > below[position])
    return None, False
