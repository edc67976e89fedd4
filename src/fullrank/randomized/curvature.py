"""Sums over a table that Newton's method needs: objective, gradient, Hessian, and rows that stand in for the Hessian.

One pass gives the objective, the gradient and the rows of the next Hessian, in memory and out of core. A row is kept by
a coin of its own, with odds that follow how much it adds to the Hessian, and is weighted by one over its odds.

Source: Xu, Yang, Roosta, Ré and Mahoney, Sub-sampled Newton Methods with Non-uniform Sampling, arXiv 1607.00559.

Deviation: the paper's leverage scores come from a sketch of the weighted table, renewed every ten iterations; here from
the last sampled Hessian, renewed with every draw inside the pass for the gradient. Scores against a sample are enough
(Cohen et al., Uniform Sampling for Matrix Approximation, 2015), and the sketch would be one more pass.
"""

# Shapes: n rows, d columns, p = d + 1 with an intercept (its column is last) else d, s sampled rows, k rows of a block.

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import scipy.sparse as sp
from scipy.linalg import LinAlgError, cho_factor, cho_solve, solve_triangular
from scipy.sparse.linalg import LinearOperator, cg

from fullrank.randomized.blocks import Array, Block, squared
from fullrank.randomized.engine import Executor, map_reduce
from fullrank.randomized.losses import Loss
from fullrank.randomized.sketches import poisson_sample
from fullrank.randomized.sources import RowSource

Sampling = Literal["leverage", "row_norm", "uniform", "none"]
# Beyond this many unknowns the Hessian is not formed: conjugate gradients multiply by its rows instead.
LARGEST_DENSE = 2000
HALVINGS = 0.5 ** np.arange(1, 11)  # of a step, tried in one pass


@dataclass(frozen=True)
class Problem:
    """Minimise the sum of w_i loss(x_i'w + b, y_i) over the rows, plus penalty / 2 ||w||^2; the intercept b is free."""

    source: RowSource
    loss: Loss
    penalty: float
    fit_intercept: bool = True
    executor: Executor = "serial"

    @property
    def size(self) -> int:
        """p, the number of unknowns."""
        return self.source.n_cols + int(self.fit_intercept)

    def ridge(self) -> Array:
        """Diagonal of the penalty's Hessian, shape (p,)."""
        diagonal = np.full(self.size, self.penalty)
        diagonal[self.source.n_cols :] = 0.0
        return diagonal

    def total(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """Sum over all blocks of `function`; one pass."""
        bound = partial(function, loss=self.loss, free=self.fit_intercept, **arguments)
        return map_reduce(self.source, partial(_summed, function=bound), executor=self.executor)


class Sample(NamedTuple):
    """Drawn rows (s, p) with the intercept's ones, their targets, their weights over the odds of being drawn, and those
    odds."""

    rows: Any
    target: Array
    weight: Array
    odds: Array

    @staticmethod
    def joined(parts: list[Sample]) -> Sample:
        stack = sp.vstack if sp.issparse(parts[0].rows) else np.vstack
        return Sample(stack([part.rows for part in parts]), *(np.concatenate([p[i] for p in parts]) for i in (1, 2, 3)))


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
            return curvature * (_row_squares(X) + float(free))
        assert self.basis is not None
        projected = X @ self.basis[: X.shape[1]]
        if free:
            projected += self.basis[-1]
        return np.minimum(1.0, curvature * _row_squares(projected))

    def sample(self, block: Block, free: bool, score: Array) -> Sample | None:
        """The rows of a block that are kept, given their scores."""
        kept, importance = poisson_sample(score / self.certain, self.seed, block.start, self.stream)
        if not len(kept):
            return None
        weight = importance if block.weight is None else importance * block.weight[kept]
        return Sample(_with_ones(block.X[kept], free), block.target[kept], weight, 1 / importance)


class Constant(NamedTuple):
    """The best model without features, or, without an intercept, the one whose margins are 0.

    Attributes:
        weight: of all rows.
        mean: of the targets.
        margin: of every row.
        deviation: mean of |target - mean|.
        value: the objective.
    """

    weight: float
    mean: float
    margin: float
    deviation: float
    value: float

    @staticmethod
    def of(problem: Problem) -> Constant:
        """Two passes over targets and weights alone. Raises ValueError at a target that the loss has no value for."""
        bare = replace(problem, source=problem.source.without_features())
        weight, total = bare.total(_target_sums)
        mean = total / weight
        margin = problem.loss.margin_of(mean) if problem.fit_intercept else 0.0
        deviation, value = bare.total(_deviation_sums, mean=mean, margin=margin)
        return Constant(weight, mean, margin, deviation / weight, value)


@dataclass
class Sums:
    """Objective and gradient, without the penalty; mass of the draw, and what was drawn."""

    value: float
    gradient: Array
    mass: float
    sample: list[Sample]

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.value + other.value,
            self.gradient + other.gradient,
            self.mass + other.mass,
            self.sample + other.sample,
        )


def _summed(blocks: Iterator[Block], function: Callable[[Block], Any]) -> Any:
    total = None
    with np.errstate(over="ignore", invalid="ignore"):  # of a step that the line search will turn down
        for block in blocks:
            part = function(block)
            total = part if total is None else total + part
    return total


def _target_sums(block: Block, *, loss: Loss, free: bool) -> Array:
    """Sums of weights and of weighted targets."""
    loss.check_target(block.target, block.start)
    return np.array([block.weights().sum(), _weighted(block.target, block).sum()])


def _deviation_sums(block: Block, *, loss: Loss, free: bool, mean: float, margin: float) -> Array:
    y = block.target
    value = loss.value(np.full(len(y), margin), y)
    return np.array([_weighted(np.abs(y - mean), block).sum(), _weighted(value, block).sum()])


def evaluate(block: Block, *, loss: Loss, free: bool, coef: Array, draw: Draw | None) -> Sums:
    """Objective and gradient at `coef`, and rows drawn by their curvature there."""
    derivatives = loss(_margin(block.X, coef), block.target)
    slope = _weighted(derivatives.slope, block)
    gradient = block.X.T @ slope
    if free:
        gradient = np.append(gradient, slope.sum())
    value = float(_weighted(derivatives.value, block).sum())
    if draw is None:
        return Sums(value, gradient, 0.0, [])
    score = draw.scores(block.X, free, _weighted(derivatives.curvature, block))
    sample = draw.sample(block, free, score)
    return Sums(value, gradient, float(np.minimum(score, draw.certain).sum()), [] if sample is None else [sample])


def draw_by_target(block: Block, *, loss: Loss, free: bool, draw: Draw, constant: Constant) -> list[Sample]:
    """Rows drawn by their weight, half of them times how far the target is from the mean: of clicks and rows without
    one this half has as many, however rare clicks are. Nothing of the other rows is read."""
    share = np.abs(block.target - constant.mean) / constant.deviation if constant.deviation > 0 else 1.0
    sample = draw.sample(block, free, 0.5 * block.weights() * (1.0 + share))
    return [] if sample is None else [sample]


def _hessian(block: Block, *, loss: Loss, free: bool, coef: Array) -> Array:
    curvature = _weighted(loss(_margin(block.X, coef), block.target).curvature, block)
    return gram(block.X, curvature, free)


def _hessian_product(block: Block, *, loss: Loss, free: bool, coef: Array, vector: Array) -> Array:
    curvature = _weighted(loss(_margin(block.X, coef), block.target).curvature, block)
    slope = curvature * _margin(block.X, vector)
    product = block.X.T @ slope
    return np.append(product, slope.sum()) if free else product


def _hessian_diagonal(block: Block, *, loss: Loss, free: bool, coef: Array) -> Array:
    curvature = _weighted(loss(_margin(block.X, coef), block.target).curvature, block)
    diagonal = squared(block.X).T @ curvature
    return np.append(diagonal, curvature.sum()) if free else diagonal


def values_along(block: Block, *, loss: Loss, free: bool, coef: Array, direction: Array, lengths: Array) -> Array:
    """Objective at coef + h direction for every length h."""
    margin, change = _margin(block.X, coef), _margin(block.X, direction)
    return np.array([_weighted(loss.value(margin + h * change, block.target), block).sum() for h in lengths])


def gram(X: Any, weight: Array, free: bool = False) -> Array:
    """X' diag(weight) X, with a last column of ones if `free`; dense, for weights that are not negative."""
    root = np.sqrt(weight)
    if sp.issparse(X) and X.nnz > 0.1 * X.shape[0] * X.shape[1]:
        X = X.toarray()  # a dense product is then the faster one
    if sp.issparse(X):
        X = _with_ones(X, free)
        X = sp.diags_array(root) @ X
        return np.asarray((X.T @ X).toarray())
    scaled: Array = X * root[:, None]
    if not free:
        return scaled.T @ scaled
    d = X.shape[1]
    full = np.empty((d + 1, d + 1))
    full[:d, :d] = scaled.T @ scaled
    full[d, :d] = full[:d, d] = scaled.T @ root
    full[d, d] = weight.sum()
    return full


def _margin(X: Any, coef: Array) -> Array:
    d = X.shape[1]
    margin: Array = X @ coef[:d]
    return margin + coef[d] if len(coef) > d else margin


def _weighted(values: Array, block: Block) -> Array:
    return values if block.weight is None else block.weight * values


def _row_squares(X: Any) -> Array:
    if not sp.issparse(X):
        return np.asarray(np.einsum("ij,ij->i", X, X))
    squares = sp.csr_array((np.square(X.data), X.indices, X.indptr), shape=X.shape)
    return np.asarray(squares @ np.ones(X.shape[1]))


def _with_ones(X: Any, free: bool) -> Any:
    if not free:
        return X
    if sp.issparse(X):
        return sp.csr_array(sp.hstack([X, np.ones((X.shape[0], 1))]))
    return np.column_stack([X, np.ones(X.shape[0])])


class Curvature(Protocol):
    """An invertible stand-in for the Hessian of the whole objective."""

    n_rows: int

    def solve(self, vector: Array, tolerance: float) -> Array: ...


class Cholesky:
    """A Hessian (p, p), factorised; with too little of a ridge it gets what rounding asks for."""

    def __init__(self, hessian: Array, ridge: Array, n_rows: int) -> None:
        self.n_rows = n_rows
        hessian[np.diag_indices_from(hessian)] += ridge
        largest = max(float(hessian.diagonal().max(initial=0.0)), np.finfo(float).tiny)
        extra = 0.0
        while True:
            try:
                self.factor = cho_factor(hessian + extra * np.eye(len(ridge)) if extra else hessian, lower=True)
                return
            except LinAlgError:
                extra = max(100 * extra, 1e-14 * largest)

    def solve(self, vector: Array, tolerance: float) -> Array:
        return np.asarray(cho_solve(self.factor, vector, check_finite=False))

    def basis(self, directions: int, rng: np.random.Generator) -> Array:
        """Square root of the inverse, (p, directions): ||x'basis||^2 estimates x'H^-1 x, and equals it with a square
        basis, where directions >= p."""
        p = len(self.factor[0])
        eye = np.eye(p) if directions >= p else rng.standard_normal((p, directions)) / np.sqrt(directions)
        return np.asarray(solve_triangular(self.factor[0], eye, lower=True, trans="T", check_finite=False))


class Products:
    """A Hessian known by its products with vectors, for conjugate gradients scaled by the diagonal."""

    def __init__(self, product: Callable[[Array], Array], diagonal: Array, ridge: Array, n_rows: int) -> None:
        self.n_rows, p = n_rows, len(ridge)
        scale = diagonal + ridge
        scale[scale <= 0] = 1.0
        self.operator = LinearOperator((p, p), matvec=lambda v: product(v.ravel()) + ridge * v.ravel())
        self.scaling = LinearOperator((p, p), matvec=lambda v: v.ravel() / scale)

    def solve(self, vector: Array, tolerance: float) -> Array:
        return np.asarray(cg(self.operator, vector, rtol=tolerance, maxiter=1000, M=self.scaling)[0])


def full_curvature(problem: Problem, coef: Array) -> Curvature:
    """The Hessian of all rows at `coef`: one pass, or one for every product with it if there are many unknowns."""
    n = problem.source.n_rows
    if problem.size <= LARGEST_DENSE:
        return Cholesky(problem.total(_hessian, coef=coef), problem.ridge(), n)
    diagonal = problem.total(_hessian_diagonal, coef=coef)
    return Products(lambda v: problem.total(_hessian_product, coef=coef, vector=v), diagonal, problem.ridge(), n)


def sampled_curvature(problem: Problem, sample: Sample, coef: Array) -> Curvature:
    """The Hessian at `coef` as estimated from drawn rows."""
    rows, target, weight, _ = sample
    curvature = weight * problem.loss(rows @ coef, target).curvature
    if problem.size <= LARGEST_DENSE:
        return Cholesky(gram(rows, curvature), problem.ridge(), len(target))
    diagonal = squared(rows).T @ curvature
    return Products(lambda v: rows.T @ (curvature * (rows @ v)), diagonal, problem.ridge(), len(target))
