"""Stochastic gradient steps on rows drawn by importance, in coordinates that a sketch has made round.

Source: Yang, Chow, Ré and Mahoney, Weighted SGD for lp Regression with Randomized Preconditioning, arXiv 1502.03571.
"""

# Shapes: n rows, d features, p = d + 1 with an intercept (its entry is first) else d, r coordinates, m drawn rows.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from numbers import Real
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import RegressorMixin
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.conditioning import l1_conditioner, preconditioner, triangular
from fullrank.randomized.engine import Executor, map_reduce
from fullrank.randomized.inputs import TableEstimator, linear_values, on_rows, training_source
from fullrank.randomized.parameters import FLAG, NONE, Rule, check_parameters, integer, number, one_of, random_seed
from fullrank.randomized.sketches import Sketch, row_uniforms, sketch_blocks
from fullrank.randomized.sources import RowSource
from fullrank.randomized.stochastic_steps import (
    BALL,
    BOX,
    PINBALL,
    SQUARED,
    descend,
    descend_constrained,
)

_RULES = {
    "loss": one_of("squared", "absolute", "quantile"),
    "quantile": number(above=0, below=1),
    "preconditioner": one_of("full", "diag", "none"),
    "sampling": one_of("leverage", "row_norm", "uniform"),
    "eta0": one_of("auto") | number(above=0),
    "n_steps": integer(1) | NONE,
    "constraint": Rule(
        'None, "nonneg", ("box", low, high) with low <= high, or ("l2", radius) with radius > 0',
        lambda value: _is_constraint(value),
    ),
    "fit_intercept": FLAG,
}


@dataclass(frozen=True)
class DrawnRows:
    """Rows [1 | X] drawn at least once, (m, p); and, each (m,), targets, weights over odds, and numbers of draws."""

    rows: Array
    target: Array
    importance: Array
    count: NDArray[np.int64]

    def __add__(self, below: DrawnRows) -> DrawnRows:
        """These rows with others under them; for `map_reduce`."""
        return DrawnRows.gather([self, below])

    @classmethod
    def gather(cls, parts: Sequence[DrawnRows]) -> DrawnRows:
        """All rows of the parts, in order."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def row_scores(block: Block, basis: Array | None, power: int, intercept: bool) -> Array:
    """Weight times the `power`-norm, to that power, of [1 | X] basis, row by row; 1 without a basis."""
    if basis is None:
        return np.ones(len(block)) if block.weight is None else (block.weight > 0).astype(float)
    image = block.product(basis, intercept=intercept, weight_power=1 / power)
    scores: Array = np.einsum("ij,ij->i", image, image) if power == 2 else np.abs(image).sum(axis=1)
    return scores


def _mass(blocks: Iterator[Block], *, basis: Array | None, power: int, intercept: bool) -> float:
    return sum(float(row_scores(block, basis, power, intercept).sum()) for block in blocks)


def _drawn(
    blocks: Iterator[Block],
    *,
    basis: Array | None,
    power: int,
    intercept: bool,
    mass: float,
    steps: int,
    seed: int,
) -> DrawnRows:
    """Each row as often as it is due: steps times its share of the mass, rounded up or down at random."""
    parts = []
    for block in blocks:
        share = row_scores(block, basis, power, intercept) / mass
        uniform = row_uniforms(seed, block.start, block.stop, stream=1)
        count = np.floor(steps * share + uniform).astype(np.int64)
        kept = np.flatnonzero(count)
        rows = Block(block.X[kept], None, None, block.start).columns(intercept=intercept)
        weight = 1.0 if block.weight is None else block.weight[kept]
        parts.append(DrawnRows(rows, block.target[kept], weight / share[kept], count[kept]))
    return DrawnRows.gather(parts)


def _continues(model: PreconditionedSGDRegressor) -> bool:
    if model.loss != "squared":
        raise AttributeError(f'partial_fit needs loss "squared", got "{model.loss}"')
    return True


class PreconditionedSGDRegressor(RegressorMixin, TableEstimator):  # type: ignore[misc]
    """Linear regression by pwSGD: squared, absolute or quantile loss, constraints, no step size to tune.

    Minimises sum_i w_i loss(x_i'w + b, y_i), unpenalised. Good for answers to two or three digits in the time of a few
    passes, for constrained weights, and for rows that arrive in batches (`partial_fit`); for many digits use
    `RandomizedLinearRegression` or `QuantileRegressor`.

    Args:
        loss: "squared" ((z - y)^2), "absolute", or "quantile".
        quantile: of the quantile loss, in (0, 1).
        preconditioner: coordinates of the steps: "full" (R of a sketch), "diag" (its column norms), "none".
        sampling: what makes a row likely to be drawn: "leverage" (its norm in the basis A R^-1), "row_norm", "uniform".
            No preconditioner with "row_norm" is randomised Kaczmarz, with "uniform" plain SGD.
        eta0: first step; "auto" is the paper's for the absolute loss, and a projection onto the first row's solutions
            for the squared loss, then falls like 1 / t at the rate that the sketch's smallest singular value sets.
        n_steps: expected steps; 2 n when omitted. That many rows are held in memory.
        constraint: None, "nonneg", ("box", low, high) or ("l2", radius), on the weights but not the intercept.
        fit_intercept: whether to add b.
        verbose: whether to tell of steps and slow passes on standard error.
        executor: where passes over the table run; see `map_reduce`.
        random_state: seed of sketch and rows.

    Attributes:
        coef_, intercept_: shape (d,), and a number.
        n_steps_: steps so far.
        n_iter_: passes over the table.

    Raises:
        ValueError: a parameter out of range, rows that are all zero, NaN or infinity, negative weights.

    Source: arXiv 1502.03571.
    Deviations: the paper draws rows with replacement; here a row with T p_i expected draws has this number of steps,
    rounded at random, in random order: the same mean, less noise. The steps' lengths are ours: the paper's need
    constants of the unknown answer. The last point is returned for the squared loss, the mean of the second half for
    the others.
    """

    _factor: Array | None

    def __init__(
        self,
        loss: str = "squared",
        *,
        quantile: float = 0.5,
        preconditioner: str = "full",
        sampling: str = "leverage",
        eta0: Any = "auto",
        n_steps: int | None = None,
        constraint: Any = None,
        fit_intercept: bool = True,
        verbose: bool | int = False,
        executor: Executor = "serial",
        random_state: Any = None,
    ) -> None:
        self.loss = loss
        self.quantile = quantile
        self.preconditioner = preconditioner
        self.sampling = sampling
        self.eta0 = eta0
        self.n_steps = n_steps
        self.constraint = constraint
        self.fit_intercept = fit_intercept
        self.verbose = verbose
        self.executor = executor
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit.

        Args:
            X: shape (n, d), dense or sparse; a `RowSource` with a target, and then no y; or a Dask collection.
            y: shape (n,).
            sample_weight: shape (n,), at least 0.
        """
        check_parameters(self, _RULES)
        source = training_source(self, X, y, sample_weight)
        self._factor, self.n_steps_, self.n_iter_ = None, 0, 0
        self._descend(source, np.zeros(source.n_cols + int(self.fit_intercept)))
        return self

    @available_if(_continues)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Steps on a batch of rows, from where the last call ended; coordinates come from all rows seen so far.

        Raises:
            AttributeError: with a loss other than the squared one, whose steps fall too slowly to be continued.
            ValueError: as `fit`.
        """
        check_parameters(self, _RULES)
        first = not hasattr(self, "coef_")
        source = training_source(self, X, y, sample_weight, reset=first)
        if first:
            self._factor, self.n_steps_, self.n_iter_ = None, 0, 0
            point = np.zeros(source.n_cols + int(self.fit_intercept))
        else:
            point = np.append(self.intercept_, self.coef_) if self.fit_intercept else self.coef_.copy()
        self._descend(source, point)
        return self

    def predict(self, X: Any) -> Array:
        """Mean, median or quantile of the target, shape (n,), for whatever `fit` takes as X."""
        check_is_fitted(self)
        return on_rows(self, X, partial(linear_values, coef=self.coef_, intercept=self.intercept_))

    def _descend(self, source: RowSource, point: Array) -> None:
        passes = source.n_passes
        seed = random_seed(self.random_state)
        power = 2 if self.loss == "squared" else 1
        factor, sketch_rows = self._sketched(source, power, seed)
        p = len(point)
        R, solution = factor[:p, :p], preconditioner(factor[:p, :p]).N
        if not solution.size:
            raise ValueError("all rows are zero: there is nothing to fit")
        bases = {"leverage": solution, "row_norm": np.eye(p), "uniform": None}
        basis, intercept = bases[self.sampling], self.fit_intercept
        weigh = partial(_mass, basis=basis, power=power, intercept=intercept)
        mass = map_reduce(source, weigh, executor=self.executor)
        if not mass > 0:
            raise ValueError("all rows are zero: there is nothing to draw from")
        steps = 2 * source.n_rows if self.n_steps is None else int(self.n_steps)
        collect = partial(_drawn, basis=basis, power=power, intercept=intercept, mass=mass, steps=steps, seed=seed)
        drawn = map_reduce(source, collect, executor=self.executor)
        order = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(drawn.count)), drawn.count))
        if self.preconditioner == "full":
            N = solution
        else:
            norms = np.linalg.norm(R, axis=0) if self.preconditioner == "diag" else np.ones(p)
            N = np.diag(1 / np.where(norms > 0, norms, 1))
        U = drawn.rows @ N
        squares = np.einsum("ij,ij->i", U, U)
        if power == 2:
            steepest = float((drawn.importance * squares).max(initial=0.0))
            # The sketch's singular values are off by sqrt(p / rows) at most, usually.
            smallest = np.linalg.svd(R @ N, compute_uv=False)[N.shape[1] - 1] / (1 + np.sqrt(p / sketch_rows))
            half_life = 2 * steepest / smallest**2 if smallest > 0 else np.inf
            eta = 1 / (2 * steepest)  # onto the solutions of the heaviest row, and no row is overshot
        else:
            nearest = np.linalg.lstsq(N, solution @ (solution.T @ (R.T @ factor[:p, p])), rcond=None)[0]
            eta = float(np.linalg.norm(nearest)) / float((drawn.importance * np.sqrt(squares)).max(initial=0.0))
            half_life = 1.0
        if self.eta0 != "auto":
            eta = float(self.eta0)
        kind, tau = (SQUARED, 0.5) if power == 2 else (PINBALL, self.quantile if self.loss == "quantile" else 0.5)
        taken, averaged_from = self.n_steps_, len(order) if power == 2 else len(order) // 2
        drawn_rows = (drawn.target, drawn.importance, order)
        if self.constraint is None:
            # The part of the point that no row of this table sees is left as it is.
            inner: Array = np.asarray(np.linalg.lstsq(N, point, rcond=None)[0], dtype=np.float64)
            hidden = point - N @ inner
            U = np.ascontiguousarray(U)
            mean = descend(U, *drawn_rows, inner, kind, tau, eta, half_life, taken, averaged_from)
            point = N @ (inner if power == 2 else mean) + hidden
        else:
            inverse = N @ N.T
            metric = np.asarray(np.linalg.pinv(inverse, hermitian=True), dtype=np.float64)
            mean = descend_constrained(
                np.ascontiguousarray(drawn.rows),
                *drawn_rows,
                point,
                kind,
                tau,
                eta,
                half_life,
                taken,
                averaged_from,
                metric,
                inverse,
                int(self.fit_intercept),
                *self._limits(),
            )
            point = point if power == 2 else mean
        self.intercept_ = float(point[0]) if self.fit_intercept else 0.0
        self.coef_ = point[1:] if self.fit_intercept else point
        self.n_steps_ += len(order)
        source.tell(f"{self.n_steps_} steps on {len(drawn.count)} rows")
        self.n_iter_ += source.n_passes - passes

    def _sketched(self, source: RowSource, power: int, seed: int) -> tuple[Array, int]:
        """Triangular factor of [1 | X | y], (p + 1, p + 1), from a sketch of all rows so far, and the sketch's rows."""
        q = source.n_cols + int(self.fit_intercept) + 1
        intercept = self.fit_intercept
        if power == 1:
            try:
                R = l1_conditioner(source, "spc3", intercept=intercept, target=True, seed=seed, executor=self.executor)
                return R, 20 * q
            except np.linalg.LinAlgError:
                pass  # dependent columns: the l2 sketch below does not mind
        size = 20 * q
        S = Sketch("sparse_sign", size, seed, min(4, size), source.n_rows)
        sketched = map_reduce(
            source, partial(sketch_blocks, S=S, intercept=intercept, target=True), executor=self.executor
        )
        if self._factor is not None:
            sketched = np.vstack([self._factor, sketched])
        R = triangular(np.vstack([sketched, np.zeros((q, q))]))
        self._factor = R
        return R, size

    def _limits(self) -> tuple[int, float, float]:
        if self.constraint == "nonneg":
            return BOX, 0.0, np.inf
        if self.constraint[0] == "box":
            return BOX, float(self.constraint[1]), float(self.constraint[2])
        return BALL, 0.0, float(self.constraint[1])


def _is_constraint(value: Any) -> bool:
    match value:
        case None:
            return True
        case str():
            return value == "nonneg"
        case ("box", Real() as low, Real() as high):
            return float(low) <= float(high)
        case ("l2", Real() as radius):
            return float(radius) > 0
    return False
