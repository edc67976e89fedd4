"""Passes of quantile regression over blocks: the smoothed loss, rows near a solution, the signs of all others.

What one quantile asks of a pass is a `Request`. Those of several quantiles are answered together: each block is
multiplied once by the points of all of them, and once, transposed, by what they want summed.
"""

# Shapes: D coefficients (intercept first where there is one), J points, P projections, k rows of a block.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.engine import Executor, map_reduce
from fullrank.randomized.pinball import Objective, fitted, rho, take, transposed
from fullrank.randomized.sketches import row_uniforms
from fullrank.randomized.sources import RowSource

_TIES = 13  # stream of random numbers


class Request(Protocol):
    """What one quantile asks of a pass.

    Attributes:
        points: shape (D, J), coefficients at which it wants the fit of all rows.
        projection: shape (D, P), the same for all requests of a pass: it wants the squared lengths of rows there.
    """

    @property
    def points(self) -> Array: ...

    @property
    def projection(self) -> Array | None: ...

    def of_block(self, block: Block, fit: Array, lengths: Array | None) -> tuple[Any, Array | None]:
        """Its own sums for a block, and z (k,) whose A'z it wants beside them.

        Args:
            block: k rows.
            fit: shape (J, k).
            lengths: shape (k,).
        """

    def joined(self, first: Any, second: Any) -> Any:
        """Own sums of earlier and of later rows together."""


def answers(
    source: RowSource, requests: Sequence[Request], basis: Array, intercept: bool, executor: Executor
) -> list[tuple[Any, Array]]:
    """Own sums of each request and A'z in the basis, (D,); one pass for all of them."""
    apart = ill_conditioned(basis)
    function = partial(request_blocks, requests=requests, basis=basis if apart else None, intercept=intercept)
    own, sums = map_reduce(source, function, partial(_joined, requests=requests), executor)
    return list(zip(own, sums if apart else sums @ basis, strict=True))


def ill_conditioned(basis: Array) -> bool:
    """Whether a sum over columns of the table loses digits that a basis applied to the sum cannot bring back."""
    return bool(np.linalg.cond(basis) > 1e5)


def request_blocks(
    blocks: Iterator[Block], requests: Sequence[Request], basis: Array | None, intercept: bool
) -> tuple[list[Any], Array]:
    """Own sums of each request, and A'z, (requests, D), in a basis or in the columns of the table."""
    own: list[Any] = [None] * len(requests)
    points = [request.points for request in requests]
    projection = next((request.projection for request in requests if request.projection is not None), None)
    columns = np.hstack([*points, *([] if projection is None else [projection])])
    ends = np.cumsum([part.shape[1] for part in points])
    sums = np.zeros((len(requests), len(columns)))
    for block in blocks:
        fit = _fitted(block, columns, intercept)
        lengths = None if projection is None else np.einsum("jk,jk->k", fit[ends[-1] :], fit[ends[-1] :])
        wanted, wants = np.zeros((len(requests), len(block))), False
        for i, (request, end) in enumerate(zip(requests, ends, strict=True)):
            part, z = request.of_block(block, fit[end - points[i].shape[1] : end], lengths)
            own[i] = part if own[i] is None else request.joined(own[i], part)
            if z is not None:
                wanted[i], wants = z, True
        if basis is not None:
            sums += wanted @ block.fitted(basis, intercept=intercept)
        elif wants:
            sums[:, int(intercept) :] += np.stack([z @ block.X for z in wanted])
            if intercept:
                sums[:, 0] += wanted.sum(axis=1)
    return own, sums


def _fitted(block: Block, columns: Array, intercept: bool) -> Array:
    """[1 | X] columns, transposed: (columns, k), each row on its own stretch of memory."""
    if sp.issparse(block.X):
        return np.ascontiguousarray(block.fitted(columns, intercept=intercept).T)
    if not intercept:
        return np.asarray(columns.T @ block.X.T)
    fit: Array = columns[1:].T @ block.X.T
    fit += columns[0][:, None]
    return fit


def _joined(first: Any, second: Any, requests: Sequence[Request]) -> Any:
    """Sum of two results of `request_blocks`, of which a fragment without rows has none of its own."""
    own = [
        b if a is None else a if b is None else request.joined(a, b)
        for request, a, b in zip(requests, first[0], second[0], strict=True)
    ]
    return own, first[1] + second[1]


def smooth_slope(r: Array, window: float, quantile: float) -> Array:
    """Slope of the loss smoothed over +-window, in [t - 1, t]."""
    return np.asarray(np.clip(r * (0.5 / window), -0.5, 0.5) + (quantile - 0.5))


@dataclass(frozen=True)
class Smoothed:
    """Of the loss smoothed over a window: its gradient, as A'z, and own sums: its Hessian (D, D), in a basis or in the
    columns of the table, the loss itself, and the rows in the window."""

    coef: Array
    window: float
    objective: Objective
    basis: Array | None = None
    projection = None

    @property
    def points(self) -> Array:
        return self.coef[:, None]

    def of_block(self, block: Block, fit: Array, lengths: Array | None) -> tuple[Any, Array]:
        r = block.target - fit[0]
        near = np.flatnonzero(np.abs(r) < self.window)
        z = -smooth_slope(r, self.window, self.objective.quantile)
        if block.weight is not None:
            z *= block.weight
        return (self._hessian(block, near), self.objective.loss(r, block.weight), len(near)), z

    def joined(self, first: Any, second: Any) -> Any:
        return tuple(a + b for a, b in zip(first, second, strict=True))

    def _hessian(self, block: Block, near: NDArray[np.intp]) -> Array:
        weight = None if block.weight is None else block.weight[near]
        A = Block(block.X[near], None, weight, 0).columns(intercept=self.objective.intercept)
        if self.basis is not None:
            A = A @ self.basis
        return np.asarray(A.T @ A * (0.5 / self.window))


@dataclass(frozen=True)
class Band:
    """Which rows are in: |b - a' center| <= width * |a' projection|, and those that were released into it.

    Attributes:
        center: shape (D,).
        projection: shape (D, P).
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

    def split(
        self, block: Block, r: Array, lengths: Array | None, quantile: float
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Array]:
        """Masks of the block's rows in the band and of those that have a sign; z of all as if outside, without weights.

        Args:
            block: k rows.
            r: shape (k,), residuals at the center.
            lengths: shape (k,), |a' projection| ** 2 of each row; not needed with a window.
            quantile: t.
        """
        z = np.where(r < 0, quantile - 1, quantile)
        if self.window:
            near = np.abs(r) < self.window
            inside = near & (row_uniforms(self.seed, block.start, block.stop, _TIES) < self.share)
            z = np.where(near, smooth_slope(r, self.window, quantile), z)
        else:
            near = inside = self._near(r, lengths)
        low, high = np.searchsorted(self.released, [block.start, block.stop])
        inside[self.released[low:high] - block.start] = True
        if block.weight is not None:
            inside &= block.weight > 0
        return inside, ~(near | inside), z

    def _near(self, r: Array, lengths: Array | None) -> NDArray[np.bool_]:
        if np.isinf(self.width):
            return np.ones(len(r), dtype=bool)
        assert lengths is not None
        return np.asarray(r * r <= self.width**2 * lengths)

    def turned(self, block: Block, r: Array, index: NDArray[np.intp], intercept: bool) -> NDArray[np.intp]:
        """Those of some rows of a block, by position, that are not in the band; only without a window."""
        if np.isinf(self.width):
            return index[:0]
        ahead = Block(block.X[index], None, None, 0).fitted(self.projection, intercept=intercept)
        outside = ~self._near(r[index], np.einsum("kj,kj->k", ahead, ahead))
        outside &= ~np.isin(block.start + index, self.released)
        return index[outside]


@dataclass(frozen=True)
class Collected:
    """The rows in a band, and A'z of all others. Own: these rows, a list of `Rows`; the loss at the center, and the
    number of rows in the band; of more than `limit` none are kept."""

    band: Band
    objective: Objective
    limit: int

    @property
    def points(self) -> Array:
        return self.band.center[:, None]

    @property
    def projection(self) -> Array | None:
        return None if self.band.window else self.band.projection

    def of_block(self, block: Block, fit: Array, lengths: Array | None) -> tuple[Any, Array]:
        r = block.target - fit[0]
        inside, _, z = self.band.split(block, r, lengths, self.objective.quantile)
        z[inside] = 0
        if block.weight is not None:
            z *= block.weight
        index = np.flatnonzero(inside)
        kept = [take(block, index, self.objective.intercept)] if 0 < len(index) <= self.limit else []
        return (kept, self.objective.loss(r, block.weight), len(index)), z

    def joined(self, first: Any, second: Any) -> Any:
        count = first[2] + second[2]
        return first[0] + second[0] if count <= self.limit else [], first[1] + second[1], count


@dataclass(frozen=True)
class Verified:
    """What all rows say of coefficients: own sums are loss, loss - z'r of the rows outside the band, and how many of
    those changed their sign, (3,); A'z of the rows outside (D,) in long doubles if `precise`; and rows that changed
    their sign, with their z, a list of `Rows` with about `limit` of them at most."""

    band: Band
    coef: Array
    objective: Objective
    limit: int
    precise: bool

    @property
    def points(self) -> Array:
        return np.column_stack([self.coef, self.band.center])

    @property
    def projection(self) -> Array | None:
        return self.band.projection if self.precise and not self.band.window else None

    def of_block(self, block: Block, fit: Array, lengths: Array | None) -> tuple[Any, None]:
        t, intercept = self.objective.quantile, self.objective.intercept
        before = block.target - fit[1]
        if self.precise or self.band.window:
            return self._all_rows(block, fit[0], before, lengths), None
        r = block.target - fit[0]
        # Where the sign is what it was, loss and z r are the same.
        turned = self.band.turned(block, before, np.flatnonzero((r < 0) != (before < 0)), intercept)
        z = np.where(before[turned] < 0, t - 1, t)
        missing = rho(r[turned], t) - z * r[turned]
        if block.weight is not None:
            missing, z = missing * block.weight[turned], z * block.weight[turned]
        wrong = missing > 0
        rows = take(block, turned[wrong], intercept, z[wrong])
        sums = np.array([self.objective.loss(r, block.weight), missing.sum(), len(rows)])
        return (sums, 0.0, [rows] if len(rows) else []), None

    def _all_rows(self, block: Block, fit: Array, before: Array, lengths: Array | None) -> Any:
        t, intercept = self.objective.quantile, self.objective.intercept
        inside, signed, z = self.band.split(block, before, lengths, t)
        if block.weight is not None:
            z *= block.weight
        outside: Any = 0.0
        if self.precise:
            A = block.columns(intercept=intercept, weight_power=0)
            r = block.target - fitted(A, self.coef, np.longdouble)
            outside = transposed(A, np.where(inside, 0.0, z), np.longdouble)
        else:
            r = block.target - fit
        value = rho(r, t)
        if block.weight is not None:
            value *= block.weight
        missing = value - z * r
        missing[inside] = 0
        wrong = np.flatnonzero(signed & (missing > 0))
        rows = take(block, wrong, intercept, z[wrong])
        return np.array([value.sum(), missing.sum(), len(wrong)]), outside, [rows] if len(rows) else []

    def joined(self, first: Any, second: Any) -> Any:
        sums, rows = first[0] + second[0], first[2]
        if sum(len(part) for part in rows) < self.limit:
            rows = rows + second[2]
        return sums, first[1] + second[1], rows
