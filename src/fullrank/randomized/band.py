"""Passes of quantile regression over blocks: the smoothed loss, rows near a solution, the signs of all others."""

# Shapes: D coefficients (intercept first where there is one), J projections, k rows of a block.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.pinball import Objective, Rows, fitted, rho, take, transposed
from fullrank.randomized.sketches import row_uniforms

_TIES = 13  # stream of random numbers


@dataclass(frozen=True)
class Band:
    """Which rows are in: |b - a' center| <= width * |a' projection|, and those that were released into it.

    Attributes:
        center: shape (D,).
        projection: shape (D, J).
        width: non-negative; infinite for all rows.
        released: numbers of rows, ascending.
        window, share, seed: where too many rows tie, the band is a share of those with |b - a' center| < window, drawn
            by coins of their own, and the z of the others there is the slope of the smoothed loss; 0 for no window.
    """

    center: Array
    projection: Array
    width: float
    released: NDArray[np.int64]
    window: float = 0.0
    share: float = 1.0
    seed: int = 0

    def split(self, block: Block, objective: Objective) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Array, Array]:
        """Masks of the block's rows in the band and of those that have a sign; z of all as if outside; residuals."""
        projections = [] if self.window else [self.projection]
        fit = block.fitted(np.column_stack([self.center, *projections]), intercept=objective.intercept)
        ahead = fit[:, 1:]
        r = block.target - fit[:, 0]
        z = np.where(r < 0, objective.quantile - 1, objective.quantile)
        if self.window:
            near = np.abs(r) < self.window
            inside = near & (row_uniforms(self.seed, block.start, block.stop, _TIES) < self.share)
            z = np.where(near, smooth_slope(r, self.window, objective.quantile), z)
        elif np.isinf(self.width):
            near = inside = np.ones(len(r), dtype=bool)
        else:
            near = inside = r**2 <= self.width**2 * np.einsum("kj,kj->k", ahead, ahead)
        low, high = np.searchsorted(self.released, [block.start, block.stop])
        inside[self.released[low:high] - block.start] = True
        if block.weight is not None:
            z = z * block.weight
            inside &= block.weight > 0
        return inside, ~(near | inside), z, r


def smooth_slope(r: Array, window: float, quantile: float) -> Array:
    """Slope of the loss smoothed over +-window, in [t - 1, t]."""
    return np.asarray(np.clip(r * (0.5 / window), -0.5, 0.5) + (quantile - 0.5))


def newton_blocks(
    blocks: Iterator[Block], coef: Array, window: float, objective: Objective, basis: Array
) -> tuple[Array, Array, float, int]:
    """Gradient (D,) and Hessian (D, D) of the smoothed loss in a basis, the loss itself, and the rows in the window."""
    D, t = len(coef), objective.quantile
    gradient, hessian, loss, count = np.zeros(D), np.zeros((D, D)), 0.0, 0
    for block in blocks:
        r = block.target - block.fitted(coef, intercept=objective.intercept)
        z = smooth_slope(r, window, t)
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


def band_blocks(
    blocks: Iterator[Block], band: Band, objective: Objective, basis: Array, limit: int
) -> tuple[Rows, Array, float, int]:
    """The rows in the band, A'z of all others in the basis (D,), the loss at the center, and the number of rows in the
    band; of more than `limit` none are kept."""
    D, t = len(band.center), objective.quantile
    parts, total, loss, count = [], np.zeros(D), 0.0, 0
    # A sum of ill-conditioned columns loses digits that a basis applied to the sum cannot bring back.
    apart = np.linalg.cond(basis) > 1e5
    for block in blocks:
        inside, _, z, r = band.split(block, objective)
        loss += float(rho(r, t).sum()) if block.weight is None else float(rho(r, t) @ block.weight)
        z[inside] = 0
        if apart:
            total += block.fitted(basis, intercept=objective.intercept).T @ z
        else:
            total += basis.T @ block.transposed(z, intercept=objective.intercept)
        count += int(inside.sum())
        if count <= limit:
            parts.append(take(block, np.flatnonzero(inside), objective.intercept))
        else:
            parts = []
    return Rows.gather(parts, D), total, loss, count


def join_bands(first: Any, second: Any, limit: int) -> Any:
    """Sum of two results of `band_blocks`."""
    rows, count = first[0], first[3] + second[3]
    rows = rows.pick(slice(0)) if count > limit else rows + second[0]
    return rows, first[1] + second[1], first[2] + second[2], count


def verify_blocks(
    blocks: Iterator[Block], band: Band, coef: Array, objective: Objective, limit: int, precise: bool
) -> tuple[Array, Array, Rows]:
    """Loss, loss - z'r of the rows outside the band, and how many of those changed their sign, (3,); A'z of the rows
    outside (D,) if `precise`; and rows that changed their sign, with their z, about `limit` of them at most."""
    wide: Any = np.longdouble if precise else np.float64
    sums: Any = np.zeros(3, dtype=wide)
    outside: Any = np.zeros(len(coef), dtype=wide)
    parts, kept = [], 0
    for block in blocks:
        inside, signed, z, _ = band.split(block, objective)
        if precise:
            A = block.columns(intercept=objective.intercept, weight_power=0)
            r = block.target - fitted(A, coef, wide)
            outside += transposed(A, np.where(inside, 0.0, z), wide)
        else:
            r = block.target - block.fitted(coef, intercept=objective.intercept)
        value = rho(r, objective.quantile)
        if block.weight is not None:
            value *= block.weight
        missing = value - z * r
        missing[inside] = 0
        wrong = np.flatnonzero(signed & (missing > 0))
        sums += value.sum(), missing.sum(), len(wrong)
        if kept < limit:
            parts.append(take(block, wrong, objective.intercept, z[wrong]))
            kept += len(wrong)
    return sums, outside, Rows.gather(parts, len(coef))


def join_verified(first: Any, second: Any, limit: int) -> Any:
    """Sum of two results of `verify_blocks`, whose rows nobody needs where they are too many."""
    rows = first[2] + second[2]
    return first[0] + second[0], first[1] + second[1], rows if len(rows) <= limit else first[2].pick(slice(0))
