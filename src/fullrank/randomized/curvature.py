"""Sums over a table that Newton's method needs: objective, gradient, Hessian, and rows that stand in for the Hessian.

One pass gives the objective, the gradient and the rows of the next Hessian, in memory and out of core. A row is kept by
a coin of its own, with odds that follow how much it adds to the Hessian, and is weighted by one over its odds.

Source: Xu, Yang, Roosta, Ré and Mahoney, Sub-sampled Newton Methods with Non-uniform Sampling, arXiv 1607.00559.

Deviation: the paper's leverage scores come from a sketch of the weighted table, renewed every ten iterations; here from
the last sampled Hessian, renewed with every draw inside the pass for the gradient. Scores against a sample are enough
(Cohen et al., Uniform Sampling for Matrix Approximation, 2015), and the sketch would be one more pass.
"""

# Shapes: d columns, p = d + 1 with an intercept (its entry is last) else d, K margins of a row, P = p K unknowns.

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, solve_triangular
from scipy.sparse.linalg import LinearOperator, cg

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.draws import Draw, Sample
from fullrank.randomized.engine import Executor, map_reduce
from fullrank.randomized.hessian import hessian, hessian_diagonal, hessian_product, margins, transposed
from fullrank.randomized.losses import Loss, Softmax
from fullrank.randomized.sources import RowSource

# Beyond this many unknowns the Hessian is not formed: conjugate gradients multiply by its rows instead.
LARGEST_DENSE = 2000
HALVINGS = 0.5 ** np.arange(1, 11)  # of a step, tried in one pass


@dataclass(frozen=True)
class Problem:
    """Minimise the sum of w_i loss(x_i'w + b, y_i) over the rows, plus penalty / 2 ||w||^2 + absolute |w|_1; the
    intercept b is free. Where the loss is `Softmax`, a row has K margins; the unknowns are then a matrix (p, K), row
    after row."""

    source: RowSource
    loss: Loss
    penalty: float
    fit_intercept: bool = True
    executor: Executor = "serial"
    absolute: float = 0.0

    @property
    def outputs(self) -> int:
        """K, margins of a row."""
        return self.loss.classes if isinstance(self.loss, Softmax) else 1

    @property
    def n_penalised(self) -> int:
        """d K: unknowns that are not intercepts."""
        return self.source.n_cols * self.outputs

    @property
    def size(self) -> int:
        """P, the number of unknowns."""
        return self.n_penalised + int(self.fit_intercept) * self.outputs

    def shaped(self, coef: Array) -> Array:
        """Unknowns (P,) as margins take them: (p,), or (p, K)."""
        return coef.reshape(-1, self.outputs) if self.outputs > 1 else coef

    def ridge(self) -> Array:
        """Diagonal of the penalty's Hessian, shape (P,)."""
        diagonal = np.full(self.size, self.penalty)
        diagonal[self.n_penalised :] = 0.0
        return diagonal

    def penalties(self, coef: Array) -> float:
        """Both penalties at `coef`."""
        w = coef[: self.n_penalised]
        return float(0.5 * self.penalty * (w @ w) + self.absolute * np.abs(w).sum())

    def subgradient(self, coef: Array, gradient: Array) -> Array:
        """The smallest subgradient at `coef`, given the gradient of all but the absolute penalty."""
        if not self.absolute:
            return gradient
        smallest, n = gradient.copy(), self.n_penalised
        w, g = coef[:n], gradient[:n]
        at_zero = np.sign(g) * np.maximum(np.abs(g) - self.absolute, 0.0)
        smallest[:n] = np.where(w != 0, g + self.absolute * np.sign(w), at_zero)
        return smallest

    def total(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """Sum over all blocks of `function`; one pass."""
        bound = partial(function, loss=self.loss, free=self.fit_intercept, **arguments)
        return map_reduce(self.source, partial(_summed, function=bound), executor=self.executor)


class Constant(NamedTuple):
    """The best model without features, or, without an intercept, the one whose margins are 0.

    Attributes:
        weight: of all rows.
        mean: of the targets; of `Softmax`, shares of the classes.
        margin: of every row, its offset left out; of `Softmax`, (K,). With offsets it is near the best, no more.
        deviation: mean of |target - mean|.
        value: the objective.
    """

    weight: float
    mean: Any
    margin: Any
    deviation: float
    value: float

    @staticmethod
    def of(problem: Problem) -> Constant:
        """Two passes over targets and weights alone. Raises ValueError at a target that the loss has no value for."""
        bare = replace(problem, source=problem.source.without_features())
        weight, offset, *total = bare.total(_target_sums)
        mean = np.array(total) / weight if problem.outputs > 1 else total[0] / weight
        margin = problem.loss.margin_of(mean) - offset / weight if problem.fit_intercept else 0.0 * mean
        deviation, value = bare.total(_deviation_sums, mean=mean, margin=margin)
        return Constant(weight, mean, margin, deviation / weight, value)

    def shares(self, target: Array) -> Array:
        """How far from common targets are, as numbers whose mean over the rows is 1; shape (k,)."""
        if np.ndim(self.mean):
            share = np.maximum(self.mean, np.finfo(float).tiny)[target.astype(np.intp)]
            return np.asarray(1.0 / (len(self.mean) * share))
        return np.abs(target - self.mean) / self.deviation if self.deviation > 0 else np.ones(len(target))


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
    """Sums of weights, and of weighted offsets and targets, or the weights of the classes."""
    y = block.target
    loss.check_target(y, block.start)
    offset = 0.0 if block.offset is None else _weighted(block.offset, block).sum()
    if isinstance(loss, Softmax):
        return np.array([block.weights().sum(), offset, *np.bincount(y.astype(np.intp), block.weights(), loss.classes)])
    return np.array([block.weights().sum(), offset, _weighted(y, block).sum()])


def _deviation_sums(block: Block, *, loss: Loss, free: bool, mean: Any, margin: Any) -> Array:
    y = block.target
    constant = np.full((len(y), *np.shape(margin)), margin)
    value = loss.value(constant if block.offset is None else constant + block.offset, y)
    away = np.zeros(len(y)) if np.ndim(mean) else np.abs(y - mean)
    return np.array([_weighted(away, block).sum(), _weighted(value, block).sum()])


def evaluate(block: Block, *, loss: Loss, free: bool, coef: Array, draw: Draw | None) -> Sums:
    """Objective and gradient at `coef`, and rows drawn by their curvature there."""
    derivatives = loss(margins(block.X, coef, block.offset), block.target)
    gradient = transposed(block.X, _weighted(derivatives.slope, block), free).ravel()
    value = float(_weighted(derivatives.value, block).sum())
    if draw is None:
        return Sums(value, gradient, 0.0, [])
    score = draw.scores(block.X, free, _weighted(derivatives.curvature, block))
    sample = draw.sample(block, free, score)
    return Sums(value, gradient, float(np.minimum(score, draw.certain).sum()), [] if sample is None else [sample])


def draw_by_target(block: Block, *, loss: Loss, free: bool, draw: Draw, constant: Constant) -> list[Sample]:
    """Rows drawn by their weight, half of them times how far the target is from the mean: of clicks and rows without
    one this half has as many, however rare clicks are. Nothing of the other rows is read."""
    sample = draw.sample(block, free, 0.5 * block.weights() * (1.0 + constant.shares(block.target)))
    return [] if sample is None else [sample]


def _hessian(block: Block, *, loss: Loss, free: bool, coef: Array, features: NDArray[np.intp] | None) -> Array:
    X = block.X if features is None else block.X[:, features]
    return hessian(loss, X, margins(block.X, coef, block.offset), block.target, block.weights(), free)


def _hessian_product(block: Block, *, loss: Loss, free: bool, coef: Array, vector: Array) -> Array:
    margin = margins(block.X, coef, block.offset)
    return hessian_product(loss, block.X, margin, block.target, block.weights(), free)(vector)


def _hessian_diagonal(block: Block, *, loss: Loss, free: bool, coef: Array) -> Array:
    return hessian_diagonal(loss, block.X, margins(block.X, coef, block.offset), block.target, block.weights(), free)


def values_along(block: Block, *, loss: Loss, free: bool, coef: Array, direction: Array, lengths: Array) -> Array:
    """Objective at coef + h direction for every length h."""
    margin, change = margins(block.X, coef, block.offset), margins(block.X, direction)
    return np.array([_weighted(loss.value(margin + h * change, block.target), block).sum() for h in lengths])


def _weighted(values: Array, block: Block) -> Array:
    if block.weight is None:
        return values
    return block.weight[:, None] * values if values.ndim == 2 else block.weight * values


class Curvature(Protocol):
    """An invertible stand-in for the Hessian of the whole objective."""

    n_rows: int

    def solve(self, vector: Array, tolerance: float) -> Array: ...


class Cholesky:
    """A Hessian (P, P), factorised; with too little of a ridge it gets what rounding asks for."""

    def __init__(self, matrix: Array, ridge: Array, n_rows: int) -> None:
        self.n_rows, self.matrix = n_rows, matrix
        matrix[np.diag_indices_from(matrix)] += ridge
        largest = max(float(matrix.diagonal().max(initial=0.0)), np.finfo(float).tiny)
        extra = 0.0
        while True:
            try:
                self.factor = cho_factor(matrix + extra * np.eye(len(ridge)) if extra else matrix, lower=True)
                return
            except LinAlgError:
                extra = max(100 * extra, 1e-14 * largest)

    def solve(self, vector: Array, tolerance: float) -> Array:
        return np.asarray(cho_solve(self.factor, vector, check_finite=False))

    def basis(self, directions: int, rng: np.random.Generator) -> Array:
        """Square root of the inverse, (P, directions): ||x'basis||^2 estimates x'H^-1 x, and equals it with a square
        basis, where directions >= P."""
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


def full_curvature(problem: Problem, coef: Array, features: NDArray[np.intp] | None = None) -> Curvature:
    """The Hessian of all rows at `coef`: one pass, or one for every product with it if there are many unknowns.

    With `features` it is that of their weights and the intercepts, as a matrix.
    """
    n, at = problem.source.n_rows, problem.shaped(coef)
    if problem.size <= LARGEST_DENSE or features is not None:
        return _cholesky(problem, problem.total(_hessian, coef=at, features=features), n)
    diagonal = problem.total(_hessian_diagonal, coef=at).ravel()

    def product(v: Array) -> Array:
        return np.ravel(problem.total(_hessian_product, coef=at, vector=problem.shaped(v)))

    return Products(product, diagonal, problem.ridge(), n)


def sampled_curvature(
    problem: Problem, sample: Sample, coef: Array, features: NDArray[np.intp] | None = None
) -> Curvature:
    """The Hessian at `coef` as estimated from drawn rows."""
    rows, n, loss = sample.rows, len(sample.target), problem.loss
    at = (sample.margin(problem.shaped(coef)), sample.target, sample.weight)
    if features is not None:
        d = problem.source.n_cols
        rows = rows[:, np.append(features, np.arange(d, d + problem.fit_intercept))]
    if problem.size <= LARGEST_DENSE or features is not None:
        return _cholesky(problem, hessian(loss, rows, *at), n)
    product = hessian_product(loss, rows, *at)
    diagonal = hessian_diagonal(loss, rows, *at).ravel()
    return Products(lambda v: np.ravel(product(problem.shaped(v))), diagonal, problem.ridge(), n)


def _cholesky(problem: Problem, matrix: Array, n_rows: int) -> Cholesky:
    free = problem.size - problem.n_penalised
    ridge = np.full(len(matrix), problem.penalty)
    ridge[len(matrix) - free :] = 0.0
    if free > 1:
        # Intercepts of all classes can rise together: the loss does not tell how far, so they do not.
        corner = matrix[-free:, -free:]
        corner += max(float(np.trace(corner)) / free**2, np.finfo(float).tiny)
    return Cholesky(matrix, ridge, n_rows)
