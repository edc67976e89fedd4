"""Polynomials as sums of products of a few dot products, and the sums over a table that training them needs."""

# Shapes: n rows, k rows of a block, d columns, p vectors, r rank, q degree.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.losses import Loss
from fullrank.randomized.sketches import row_uniforms

# Projections of a block and their products stay in a core's cache.
_CELLS = 2**16
_HELD_OUT = 17  # stream of the coins that hold rows out


@dataclass(frozen=True)
class Polynomial:
    """f(x) = b + w'x + sum_{i=2..q} sum_{j=1..r} prod_{k=1..i} w_ijk'x.

    Parameters are one flat array: b, then the p = 1 + r (q (q + 1) / 2 - 1) vectors, w first, then degree by degree,
    factor by factor, term by term: factors of a degree are contiguous arrays (r, d).
    """

    degree: int
    rank: int
    d: int

    @property
    def n_vectors(self) -> int:
        return 1 + self.rank * (self.degree * (self.degree + 1) // 2 - 1)

    @property
    def n_parameters(self) -> int:
        return 1 + self.n_vectors * self.d

    def vectors(self, flat: Array) -> Array:
        """Shape (p, d); a view."""
        return flat[1:].reshape(self.n_vectors, self.d)

    def products(self, projections: Array) -> Iterator[Array]:
        """Of an array whose first axis is p, the part of each degree from 2 on, its first axes (i, r); views."""
        start = 1
        for i in range(2, self.degree + 1):
            stop = start + i * self.rank
            yield projections[start:stop].reshape(i, self.rank, *projections.shape[1:])
            start = stop

    def values(self, flat: Array, X: Any) -> Array:
        """f of each row of X (n, d), dense or CSR."""
        W, out = self.vectors(flat), np.empty(X.shape[0])
        for rows in _pieces(X.shape[0], self.n_vectors):
            P = _project(X[rows], W)
            out[rows] = flat[0] + P[0]
            for factors in self.products(P):
                out[rows] += np.multiply.reduce(factors, axis=0).sum(axis=0)
        return out

    def value_and_slopes(self, flat: Array, X: Any) -> tuple[Array, Array]:
        """f of each row, shape (k,), and its derivatives by the projections w'x, shape (p, k).

        Deviation: the authors' code divides a product by its factor, which is 0/0 where a projection is zero, as in
        sparse rows; here partial products from both ends.
        """
        P = _project(X, self.vectors(flat))
        slopes = np.empty_like(P)
        slopes[0] = 1
        value = flat[0] + P[0]
        for factors, others in zip(self.products(P), self.products(slopes), strict=True):
            others[0] = 1
            for i in range(1, len(factors)):
                np.multiply(others[i - 1], factors[i - 1], out=others[i])
            after = factors[-1]
            for i in range(len(factors) - 2, -1, -1):
                others[i] *= after
                after = after * factors[i]
            value += after.sum(axis=0)
        return value, slopes


@dataclass(frozen=True)
class Scaling:
    """Columns times numbers, then rows to unit length; rows of zeros stay.

    Attributes:
        columns: shape (d,), or None for no scaling.
        unit_rows: whether rows are scaled.
        constant: whether a column of ones is appended before they are.
    """

    columns: Array | None = None
    unit_rows: bool = False
    constant: bool = False

    def apply(self, X: Any) -> Any:
        """Of X (n, d), shape (n, d) or (n, d + 1)."""
        if self.columns is None:
            return X
        thin = sp.issparse(X)
        X = sp.csr_array(X.multiply(self.columns)) if thin else X * self.columns
        if self.constant:
            ones = np.ones((X.shape[0], 1))
            X = sp.hstack([X, sp.csr_array(ones)], format="csr") if thin else np.hstack([X, ones])
        if self.unit_rows:
            squares = X.multiply(X).sum(axis=1) if thin else np.einsum("kd,kd->k", X, X)
            inverse = 1 / np.sqrt(np.where(squares > 0, squares, 1.0))
            X = sp.diags_array(inverse).tocsr() @ X if thin else X * inverse[:, None]
        return X


class Sums(NamedTuple):
    """Over rows: weights, weighted losses and their gradient, and both numbers of the rows held out."""

    weight: float
    loss: float
    gradient: Array
    held_out_weight: float
    held_out_loss: float


@dataclass(frozen=True)
class Fit:
    """What stays the same during a fit.

    Attributes:
        positive: label that counts as 1, all others as 0; None where targets are numbers.
        held_out: share of rows that are validated on instead of trained on, by a coin of each row.
        seed: of the coins.
    """

    polynomial: Polynomial
    loss: Loss
    scaling: Scaling
    positive: float | None
    held_out: float
    seed: int

    def sums(self, blocks: Iterator[Block], *, flat: Array) -> tuple[Any, ...]:
        """`Sums` over blocks of rows, as a plain tuple that adds up."""
        total = [0.0, 0.0, np.zeros(self.polynomial.n_parameters), 0.0, 0.0]
        for block in blocks:
            weight = block.weights()
            target = block.target if self.positive is None else (block.target == self.positive).astype(np.float64)
            train = np.where(self.trains_on(block.start, block.stop), weight, 0.0) if self.held_out else weight
            X = self.scaling.apply(block.X)
            for rows in _pieces(X.shape[0], self.polynomial.n_vectors):
                self._add(total, flat, X[rows], target[rows], train[rows], weight[rows] - train[rows])
        return tuple(total)

    def trains_on(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Whether each of the rows is trained on, not held out."""
        if not self.held_out:
            return np.ones(stop - start, dtype=bool)
        return row_uniforms(self.seed, start, stop, _HELD_OUT) >= self.held_out

    def _add(self, total: list[Any], flat: Array, X: Any, y: Array, train: Array, held_out: Array) -> None:
        value, slopes = self.polynomial.value_and_slopes(flat, X)
        loss, slope, _ = self.loss(value, y)
        slope = slope * train
        slopes *= slope
        total[0] += float(train.sum())
        total[1] += float(train @ loss)
        total[2][0] += slope.sum()
        self.polynomial.vectors(total[2])[:] += (X.T @ slopes.T).T if sp.issparse(X) else slopes @ X
        total[3] += float(held_out.sum())
        total[4] += float(held_out @ loss)


def _project(X: Any, W: Array) -> Array:
    """Shape (p, k), a projection contiguous."""
    return np.ascontiguousarray((X @ W.T).T) if sp.issparse(X) else W @ X.T


def _pieces(n: int, vectors: int) -> Iterator[slice]:
    rows = max(64, _CELLS // vectors)
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))
