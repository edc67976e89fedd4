"""Exact quantile regression in a few passes over a table of any size, by solving small problems only.

At the solution all but D residuals have a sign, and a row whose sign is known enters the problem only through the sum
of such rows. So:

1. a sample of rows is solved; its solution misses by about sqrt(D / sample);
2. Newton steps on all rows, for the loss smoothed over a window that shrinks with the miss, make the miss small;
3. rows with a residual near zero, the band, are collected, and all others are summed up with the sign they have now;
4. the band plus the sum is solved exactly, and
5. one more pass checks the signs. Where they hold, band and signs are a dual solution, which proves the optimum
   (`certificate`); rows whose sign was wrong join the band, and 4 and 5 are repeated.

Everything but the small problems is a sum over blocks of rows, so the table may be an array, Parquet files or a Dask
collection, and memory holds a sample and a band.

Source: Portnoy and Koenker, The Gaussian hare and the Laplacian tortoise, Statistical Science 1997, section 5.
Deviation: they go from the sample to the band at once, which needs samples and bands of n ** (2/3) rows. Step 2, the
one-step estimator of Bickel 1975 with a uniform kernel, costs two passes and makes both many times smaller.
"""

# Shapes: n rows, D coefficients (intercept first where there is one), m rows of a small problem, J projections.

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, solve, solve_triangular

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.certificate import Certificate
from fullrank.randomized.engine import Executor, map_reduce
from fullrank.randomized.pinball import Objective, Rows, rho, take
from fullrank.randomized.sources import RowSource

WIDENINGS = 8  # bands tried before all rows are taken
PROJECTIONS = 6  # Gaussian columns that estimate the length of a row: a band needs a rough length only


@dataclass(frozen=True)
class Start:
    """Where a solution in passes starts from.

    Attributes:
        rows: a sample of the table; weights include the inverse of a row's probability where that is not `share`.
        share: what part of the table's loss the rows stand for.
        R: shape (D, D), triangular factor of distinct weighted rows, for the certificate.
        spread: shape (D, D), triangular; spread' spread is about A'A / n.
    """

    rows: Rows
    share: float
    R: Array
    spread: Array

    def basis(self, objective: Objective) -> Array:
        """Columns in which the small problems are well-conditioned, (D, D); as they are where a penalty counts them."""
        eye = np.eye(len(self.R))
        return eye if objective.absolute or objective.ridge else solve_triangular(self.spread, eye)


@dataclass(frozen=True)
class ExactResult:
    """The solution of a whole problem.

    Attributes:
        coef: shape (D,), intercept first where there is one.
        certificate: of the penalised loss over all rows.
        n_iter: Newton systems of the interior point method, over all small problems.
        n_sampled, n_band: rows of the sample and of the last band.
        converged: whether the gap of the certificate fell to the tolerance.
    """

    coef: Array
    certificate: Certificate
    n_iter: int
    n_sampled: int
    n_band: int
    converged: bool


@dataclass(frozen=True)
class Band:
    """Which rows are in: |b - a' center| <= width * |a' projection|, and those that were released into it.

    Attributes:
        center: shape (D,).
        projection: shape (D, J).
        width: non-negative; infinite for all rows.
        released: numbers of rows, ascending.
    """

    center: Array
    projection: Array
    width: float
    released: NDArray[np.int64]

    def split(self, block: Block, objective: Objective, coef: Array | None = None) -> tuple[Any, Array, Array]:
        """Mask of the block's rows in the band, z of all of them as if outside, and their residuals at `coef`."""
        points = [self.center] if coef is None else [self.center, coef]
        fit = block.fitted(np.column_stack([*points, self.projection]), intercept=objective.intercept)
        ahead = fit[:, len(points) :]
        r = block.target - fit[:, 0]
        z = np.where(r < 0, objective.quantile - 1, objective.quantile)
        if np.isinf(self.width):
            inside = np.ones(len(r), dtype=bool)
        else:
            inside = r**2 <= self.width**2 * np.einsum("kj,kj->k", ahead, ahead)
        low, high = np.searchsorted(self.released, [block.start, block.stop])
        inside[self.released[low:high] - block.start] = True
        if block.weight is not None:
            z = z * block.weight
            inside &= block.weight > 0
        return inside, z, r if coef is None else block.target - fit[:, 1]


def newton_blocks(
    blocks: Iterator[Block], coef: Array, window: float, objective: Objective, basis: Array
) -> tuple[Array, Array, float, int]:
    """Gradient (D,) and Hessian (D, D) of the smoothed loss in a basis, the loss itself, and the rows in the window."""
    D, t = len(coef), objective.quantile
    gradient, hessian, loss, count = np.zeros(D), np.zeros((D, D)), 0.0, 0
    for block in blocks:
        r = block.target - block.fitted(coef, intercept=objective.intercept)
        z = np.clip(r * (0.5 / window), -0.5, 0.5) + (t - 0.5)
        near = take(block, np.flatnonzero(np.abs(r) < window), objective.intercept)
        if block.weight is None:
            loss += float(rho(r, t).sum())
        else:
            z *= block.weight
            loss += float(rho(r, t) @ block.weight)
        gradient -= block.transposed(z, intercept=objective.intercept)
        A = near.A @ basis
        hessian += A.T @ (A * (near.weight * (0.5 / window))[:, None])
        count += len(near)
    return basis.T @ gradient, hessian, loss, count


def band_blocks(blocks: Iterator[Block], band: Band, objective: Objective, basis: Array) -> tuple[Rows, Array, float]:
    """The rows in the band, A'z of all others (D,), and the loss at the band's center."""
    parts, total, loss = [], np.zeros(len(band.center)), 0.0
    # A sum of ill-conditioned columns loses digits that a basis applied to the sum cannot bring back.
    apart = np.linalg.cond(basis) > 1e5
    for block in blocks:
        inside, z, r = band.split(block, objective)
        parts.append(take(block, np.flatnonzero(inside), objective.intercept))
        loss += float(z @ r)
        z[inside] = 0
        if apart:
            total += block.fitted(basis, intercept=objective.intercept).T @ z
        else:
            total += basis.T @ block.transposed(z, intercept=objective.intercept)
    return Rows.gather(parts, len(total)), total, loss


def verify_blocks(
    blocks: Iterator[Block], band: Band, coef: Array, objective: Objective, limit: int
) -> tuple[Array, Rows]:
    """Loss, loss - z'r of the rows outside the band, and how many of those changed their sign, (3,); those rows, with
    their z, about `limit` of them at most."""
    sums, parts, kept = np.zeros(3), [], 0
    for block in blocks:
        inside, z, r = band.split(block, objective, coef)
        value = rho(r, objective.quantile)
        if block.weight is not None:
            value *= block.weight
        missing = value - z * r
        missing[inside] = 0
        wrong = np.flatnonzero(missing > 0)
        sums += value.sum(), missing.sum(), len(wrong)
        if kept < limit:
            parts.append(take(block, wrong, objective.intercept, z[wrong]))
            kept += len(wrong)
    return sums, Rows.gather(parts, len(coef))


def solve_rows(start: Start, objective: Objective, *, tol: float = 1e-8, max_iter: int = 50) -> ExactResult:
    """Minimise the objective over the rows of a start that holds all of them."""
    basis = start.basis(objective)
    rows = start.rows.in_basis(basis)
    m, D = rows.A.shape
    small = objective.solve(rows, tol=0.1 * tol, max_iter=max_iter, pivots=20 * D if m * D < 10**6 else 0)
    loss = float(rho((rows.b - rows.A @ small.coef) * rows.weight, objective.quantile).sum())
    certificate = objective.certificate(loss, 0.0, rows, small, np.zeros(D), start.R @ basis)
    converged = certificate.relative_gap <= tol or certificate.objective <= nothing(start)
    return ExactResult(basis @ small.coef, certificate, small.n_iter, m, m, converged)


def nothing(start: Start) -> float:
    """A loss that is zero up to rounding: the response is a combination of the columns, and there is no ratio to it."""
    return 1e-12 * float(np.abs(start.rows.b) @ start.rows.weight) / start.share


def solve_in_passes(
    source: RowSource,
    objective: Objective,
    start: Start,
    *,
    tol: float = 1e-8,
    max_iter: int = 50,
    seed: int = 0,
    executor: Executor = "serial",
) -> ExactResult:
    """Minimise the objective over all rows of a source: four passes where the first band holds the optimum.

    Args:
        source: with one target.
        objective: quantile, intercept and penalties.
        start: from `uniform_start` or `conditioned_start`.
        tol: relative gap to certify.
        max_iter: most Newton systems of a small problem.
        seed: of the projection.
        executor: as in `map_reduce`.
    """
    basis = start.basis(objective)
    first = objective.solve(start.rows.in_basis(basis), share=start.share, tol=1e-3, max_iter=max_iter)
    n_iter = first.n_iter
    D = len(first.coef)
    center, previous, width = _newton_steps(source, objective, start, basis @ first.coef, basis, executor)
    draws = np.random.default_rng(seed).standard_normal((D, PROJECTIONS)) / np.sqrt(PROJECTIONS)
    projection = solve_triangular(start.spread, draws)
    best: ExactResult | None = None
    for attempt in itertools.count():
        if attempt == WIDENINGS:
            width = np.inf
        band = Band(center, projection, width, np.empty(0, dtype=np.int64))
        collect = partial(band_blocks, band=band, objective=objective, basis=basis)
        rows, outside, loss = map_reduce(source, collect, executor=executor)
        everything = bool(np.isinf(width))
        loss += objective.penalty(center)
        if best is None and loss > previous[1] and not everything:
            # The last Newton step was too long, and so are the widths that came from it and led to it.
            center, previous, width = previous[0], (previous[0], np.inf, previous[2]), previous[2] / 4
            continue
        if len(rows) < 5 * D and not everything:
            width *= 4
            continue
        if len(rows) > source.n_rows / 2 and not everything:
            width = np.inf
            continue
        rows = rows.in_basis(basis)
        near: Array | None = np.asarray(np.linalg.solve(basis, center), dtype=np.float64)
        for _ in range(4):
            try:
                small = objective.solve(
                    rows, linear=outside, start=near, tol=0.1 * tol, scale=loss, max_iter=max_iter, pivots=2 * D
                )
            except LinAlgError:
                # No row of some feature is in the band.
                if everything:
                    raise
                break
            n_iter += small.n_iter
            coef = basis @ small.coef
            verify = partial(verify_blocks, band=band, coef=coef, objective=objective, limit=len(rows))
            sums, wrong = map_reduce(source, verify, executor=executor)
            certificate = objective.certificate(sums[0], sums[1], rows, small, outside, start.R @ basis)
            if best is None or certificate.objective < best.certificate.objective:
                converged = certificate.relative_gap <= tol or certificate.objective <= nothing(start)
                best = ExactResult(coef, certificate, n_iter, len(start.rows), len(rows), converged)
            if best.converged or everything:
                return best
            if sums[2] > len(rows) or sums[2] == 0:
                break
            wrong = wrong.in_basis(basis)
            outside = outside - wrong.A.T @ wrong.dual
            rows = Rows.gather([rows, wrong], D)
            band = Band(center, projection, width, np.union1d(band.released, wrong.index))
        if best is not None and best.certificate.objective < loss:
            center = best.coef
        width *= 4
    raise AssertionError("a band of all rows is the last one")


def _newton_steps(
    source: RowSource, objective: Objective, start: Start, coef: Array, basis: Array, executor: Executor
) -> tuple[Array, tuple[Array, float, float], float]:
    """Coefficients after two steps; those before the last step with their loss and width; the width after."""
    D, t = len(coef), objective.quantile
    rows = start.rows
    r = np.abs(rows.b - rows.A @ coef)
    # A step sees rows whose sign the miss leaves open, and no more than the smaller tail holds.
    inside = min(4 * np.sqrt(D * t * (1 - t) / len(r)), t, 1 - t)
    window = float(np.quantile(r, min(1.0, inside + D / len(r)))) + 1e-300
    mask = objective.penalised(D)
    points: list[tuple[Array, float, float]] = []
    for _ in range(2):
        step = partial(newton_blocks, coef=coef, window=window, objective=objective, basis=basis)
        gradient, hessian, loss, count = map_reduce(source, step, executor=executor)
        loss += objective.penalty(coef)
        if points and loss > points[-1][1]:
            return points[-1][0], points[-1], 2 * points[-1][2]
        # A column without rows in the window has no curvature of its own: it is lent a little of the mean one.
        mean = max(count, 1) / (2 * window)
        spread = start.spread @ basis
        hessian += 0.02 * mean * spread.T @ spread + np.diag(objective.ridge * mask)
        gradient += objective.ridge * mask * coef + objective.absolute * mask * np.sign(coef)
        free = np.ones(D, dtype=bool)
        if objective.absolute:
            free = (mask == 0) | (np.abs(coef) * np.linalg.norm(start.spread, axis=0) > 1e-6 * window)
        move = np.zeros(D)
        move[free] = -solve(hessian[np.ix_(free, free)], gradient[free], assume_a="pos")
        # Three times the step, spread over D directions; at least what holds some 20 D rows.
        miss = max(3 * float(np.linalg.norm(spread @ move)), 20 * D / mean / 2) / np.sqrt(D)
        points.append((coef, loss, miss))
        coef = coef + basis @ move
        if count > 80 * D:
            window /= 4
    return coef, points[-1], points[-1][2]
