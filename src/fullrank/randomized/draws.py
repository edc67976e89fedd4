"""Rows drawn from a table to stand in for its Hessian: each by a coin of its own, with odds by how much it matters.

Source: Xu, Yang, Roosta, Ré and Mahoney, Sub-sampled Newton Methods with Non-uniform Sampling, arXiv 1607.00559.
"""

# Shapes: d columns, p = d + 1 with an intercept (its column is last) else d, s sampled rows, k rows of a block.

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.sketches import poisson_sample

Sampling = Literal["leverage", "row_norm", "uniform", "none"]


class Sample(NamedTuple):
    """Drawn rows.

    Attributes:
        rows: (s, p), with the intercept's ones.
        target, offset: of the rows, (s,); the offset may be None.
        weight: of the rows over the odds of being drawn, (s,).
        odds: (s,).
    """

    rows: Any
    target: Array
    weight: Array
    odds: Array
    offset: Array | None = None

    @staticmethod
    def joined(parts: list[Sample]) -> Sample:
        stack = sp.vstack if sp.issparse(parts[0].rows) else np.vstack
        offsets = [part.offset for part in parts if part.offset is not None]
        target, weight, odds = (np.concatenate([part[i] for part in parts]) for i in (1, 2, 3))
        offset = np.concatenate(offsets) if offsets else None
        return Sample(stack([part.rows for part in parts]), target, weight, odds, offset)

    def margin(self, coef: Array) -> Array:
        """Of every row, for coef of shape (p,) or (p, K)."""
        margin: Array = self.rows @ coef
        return margin if self.offset is None else margin + self.offset


class Draw(NamedTuple):
    """How rows are drawn: row i is kept with probability min(1, score_i / certain), independently of the others, where
    certain = mass / size.

    The score is 1 ("uniform"), w_i loss'' ||x_i||^2 ("row_norm"), or min(1, w_i loss'' ||x_i' basis||^2) ("leverage",
    with a basis (p, directions) that is a square root of the inverse Hessian, perhaps times a random projection).

    Attributes:
        size: expected number of rows.
        mass: sum over all rows of min(score, certain), as known from the pass before; then `size` rows are expected.
        stream: of the random numbers; a new one for every pass.
    """

    sampling: Sampling
    size: int
    mass: float
    seed: int
    stream: int
    basis: Array | None = None

    @property
    def certain(self) -> float:
        """Rows with this score or a larger one are kept for sure."""
        return max(self.mass / self.size, np.finfo(float).tiny)

    def scores(self, X: Any, free: bool, curvature: Array) -> Array:
        """Scores of the rows of X, given w_i loss''; all of shape (k,)."""
        if self.sampling == "uniform":
            return np.ones(len(curvature))
        if self.sampling == "row_norm":
            return curvature * (row_squares(X) + float(free))
        assert self.basis is not None
        projected = X @ self.basis[: X.shape[1]]
        if free:
            projected += self.basis[-1]
        return np.minimum(1.0, curvature * row_squares(projected))

    def sample(self, block: Block, free: bool, score: Array) -> Sample | None:
        """The rows of a block that are kept, given their scores."""
        kept, importance = poisson_sample(score / self.certain, self.seed, block.start, self.stream)
        if not len(kept):
            return None
        weight = importance if block.weight is None else importance * block.weight[kept]
        offset = None if block.offset is None else block.offset[kept]
        return Sample(with_ones(block.X[kept], free), block.target[kept], weight, 1 / importance, offset)


def row_squares(X: Any) -> Array:
    """Squared lengths of rows, dense or CSR, shape (k,)."""
    if not sp.issparse(X):
        return np.asarray(np.einsum("ij,ij->i", X, X))
    squares = sp.csr_array((np.square(X.data), X.indices, X.indptr), shape=X.shape)
    return np.asarray(squares @ np.ones(X.shape[1]))


def with_ones(X: Any, free: bool) -> Any:
    """X, with a last column of ones if `free`."""
    if not free:
        return X
    if sp.issparse(X):
        return sp.csr_array(sp.hstack([X, np.ones((X.shape[0], 1))]))
    return np.column_stack([X, np.ones(X.shape[0])])
