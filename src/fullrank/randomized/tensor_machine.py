"""Tensor machines: polynomials of low rank whose vectors are learnt, in place of random polynomial features."""

# Shapes: n rows, d columns, r rank, q degree, K machines (one per class beyond two, else 1).

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import numpy as np
from scipy.special import expit
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted, validate_data

from fullrank.randomized.blocks import Array, Block, squared
from fullrank.randomized.engine import Executor, map_reduce
from fullrank.randomized.inputs import (
    TableEstimator,
    array_source,
    check_classes,
    class_codes,
    given_source,
    on_rows,
    training_source,
)
from fullrank.randomized.losses import LOSSES
from fullrank.randomized.parameters import FLAG, check_parameters, integer, number, one_of, random_generator
from fullrank.randomized.polynomial import Fit, Polynomial, Scaling
from fullrank.randomized.polynomial_training import Rules, adam, lbfgs
from fullrank.randomized.sources import ArraySource, RowSource

NORMALIZE = ("auto", "l2", "homogeneous", "columns", None)
_RULES = {
    "degree": integer(1),
    "rank": integer(1),
    "alpha": number(least=0),
    "normalize": one_of(*NORMALIZE),
    "init_scale": one_of("auto") | number(above=0),
    "warm_start_linear": FLAG,
    "solver": one_of("lbfgs", "adam"),
    "max_iter": integer(1),
    "tol": number(least=0),
    "early_stopping": FLAG | one_of("auto"),
    "validation_fraction": number(above=0, below=1),
    "n_iter_no_change": integer(1),
}
_LINEAR_ITERATIONS = 100
_HOLD_OUT_FROM = 2_000  # rows; fewer are all trained on unless asked otherwise


class _TensorMachine(TableEstimator):
    """What both estimators share: arguments, preparation of rows, the optimiser."""

    _loss: str
    _normalize: str

    def __init__(
        self,
        degree: int = 3,
        rank: int = 5,
        *,
        alpha: float = 1e-5,
        normalize: str | None = "auto",
        init_scale: float | str = "auto",
        warm_start_linear: bool = True,
        solver: str = "lbfgs",
        max_iter: int = 500,
        tol: float = 1e-6,
        early_stopping: bool | str = "auto",
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 30,
        verbose: bool | int = False,
        executor: Executor = "serial",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.degree = degree
        self.rank = rank
        self.alpha = alpha
        self.normalize = normalize
        self.init_scale = init_scale
        self.warm_start_linear = warm_start_linear
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.verbose = verbose
        self.executor = executor
        self.random_state = random_state

    @property
    def n_parameters_(self) -> int:
        """Learnt numbers of one machine: 1 + d + (q - 1)(q + 2) r d / 2; a constant column counts in d."""
        check_is_fitted(self)
        return self._polynomial.n_parameters

    @property
    def factors_(self) -> list[Array]:
        """Vectors of each degree from 2 on, shape ([K,] r, i, d)."""
        check_is_fitted(self)
        axes = (0, 2, 1, 3)
        by_machine = [list(self._polynomial.products(self._polynomial.vectors(flat))) for flat in self._flat]
        return [self._shaped(np.stack(parts).transpose(axes)) for parts in zip(*by_machine, strict=True)]

    @property
    def coef_linear_(self) -> Array:
        """Vector of degree 1, shape ([K,] d)."""
        check_is_fitted(self)
        vectors: Array = self._shaped(np.stack([self._polynomial.vectors(flat)[0] for flat in self._flat]))
        return vectors

    @property
    def intercept_(self) -> Array | float:
        """Shape ([K,])."""
        check_is_fitted(self)
        constants: Array | float = self._shaped(np.array([flat[0] for flat in self._flat]))
        return constants

    def monomial_coef(self, columns: Sequence[int]) -> Array | float:
        """Coefficient of the monomial prod_k x_{columns[k]} in the polynomial of the normalised columns, shape ([K,]).

        Args:
            columns: column numbers, repeated for powers; their order does not matter.

        Raises:
            ValueError: if there is none, or more than the degree.
        """
        check_is_fitted(self)
        if not 1 <= len(columns) <= self._polynomial.degree:
            raise ValueError(f"a monomial has 1 to {self._polynomial.degree} columns here, got {len(columns)}")
        coef: Array | float
        if len(columns) == 1:
            coef = self.coef_linear_[..., columns[0]]
            return coef
        factors = self.factors_[len(columns) - 2]
        orders = set(itertools.permutations(columns))
        places = np.arange(len(columns))
        coef = sum(np.prod(factors[..., places, list(order)], axis=-1).sum(axis=-1) for order in orders)
        return coef

    def _margins(self, X: Any) -> Array:
        """Values of the K polynomials, shape (n, K)."""
        check_is_fitted(self)
        return on_rows(self, X, partial(_margins, self._scaling, self._polynomial, self._flat), dtype=np.float64)

    def _fit(self, source: RowSource, classes: Sequence[float | None]) -> None:
        """Train one machine for each class (None: targets are numbers)."""
        check_parameters(self, _RULES)
        if self.solver == "adam" and not isinstance(source, ArraySource):
            raise ValueError('solver "adam" shuffles rows and needs them in memory; "lbfgs" reads a source in passes')
        draws = random_generator(self.random_state)
        seed = int(draws.randint(2**31))
        weight, squares, target, target_squares = map_reduce(source, _moments, executor=self.executor)
        if not weight > 0:
            raise ValueError("sample_weight is zero in every row")
        squares = squares / weight
        normalize = self._normalize if self.normalize == "auto" else self.normalize
        if normalize is None:
            self._scaling, row_length = Scaling(), math.sqrt(squares.sum())
        else:
            filled = squares > 0
            unit_rows = normalize != "columns"
            columns = 1 / np.sqrt(np.where(filled, squares, 1.0))
            self._scaling = Scaling(columns, unit_rows, normalize == "homogeneous")
            row_length = 1.0 if unit_rows else math.sqrt(filled.sum())
        scaling = self._scaling
        if isinstance(source, ArraySource):
            # Once, not in every pass.
            told = source.progress
            source = ArraySource(scaling.apply(source.X), source.y, source.sample_weight, check_finite=False)
            source.progress = told
            scaling = Scaling()
        self._polynomial = Polynomial(self.degree, self.rank, self.n_features_in_ + self._scaling.constant)
        held_out = self.validation_fraction if self._holds_out(source.n_rows) else 0.0
        rules = Rules(self.alpha, self.tol, self.n_iter_no_change, self.executor)
        curves = []
        for positive in classes:
            center, spread = target / weight, 1.0
            if positive is None:
                spread = math.sqrt(max(0.0, target_squares / weight - center**2)) or 1.0
            else:
                center = 0.0
            fit = Fit(self._polynomial, LOSSES[self._loss], scaling, positive, held_out, seed)
            start = self._start(draws, center, spread, row_length or 1.0)
            if self.warm_start_linear and self.degree > 1:
                linear = replace(fit, polynomial=Polynomial(1, 1, self._polynomial.d))
                found = lbfgs(source, linear, start[: linear.polynomial.n_parameters], _LINEAR_ITERATIONS, rules)
                start[: len(found.flat)] = found.flat
            optimise = adam if self.solver == "adam" else lbfgs
            curves.append(optimise(source, fit, start, self.max_iter, rules))
        if not all(curve.converged for curve in curves):
            warnings.warn(
                f"L-BFGS took max_iter = {self.max_iter} steps and did not reach tol",
                ConvergenceWarning,
                stacklevel=3,
            )
        self._flat = [curve.flat for curve in curves]
        self.n_iter_ = max(len(curve.objective) for curve in curves)
        self.loss_curve_ = [curve.objective for curve in curves]
        self.validation_curve_ = [curve.held_out for curve in curves] if held_out else None

    def _start(self, draws: np.random.RandomState, center: float, spread: float, row_length: float) -> Array:
        """b at the mean target, w at zero, other vectors normal, so that each product has the target's scale."""
        polynomial = self._polynomial
        flat = np.zeros(polynomial.n_parameters)
        flat[0] = center
        scale = 1 / row_length if isinstance(self.init_scale, str) else self.init_scale
        for factors in polynomial.products(polynomial.vectors(flat)):
            factors[:] = draws.standard_normal(factors.shape) * scale * spread ** (1 / len(factors))
        return flat

    def _holds_out(self, n: int) -> bool:
        return n >= _HOLD_OUT_FROM if isinstance(self.early_stopping, str) else bool(self.early_stopping)


class TensorMachineRegressor(RegressorMixin, _TensorMachine):  # type: ignore[misc]
    """Least squares by a polynomial of low rank: (1/2) mean (y - f(x))^2 + (alpha/2) sum of squares of all vectors.

    Args:
        degree: q; 1 is a linear model.
        rank: r, products of each degree from 2 on.
        alpha: ridge on the vectors, not on the intercept. Choose it by cross-validation: a machine overfits where the
            data is nearly linear.
        normalize: "l2", columns to unit mean square, then rows to unit length, as in the paper; "homogeneous", a column
            of ones is appended before rows are scaled, which then keep their length; "columns", rows are not scaled,
            and high degrees explode on the longest; None; "auto": "homogeneous" for numbers, "l2" for classes.
        init_scale: deviation of the vectors at the start; "auto" is 1 / the root mean square length of a row.
        warm_start_linear: start w at the solution of the linear model.
        solver: "lbfgs", a pass over the rows for each evaluation, or "adam", batches of 512 shuffled rows.
        max_iter: steps of L-BFGS, or passes of Adam.
        tol: L-BFGS stops at a largest gradient entry of tol, or a relative fall of the objective of tol / 1000.
        early_stopping: hold rows out, stop when their loss has not fallen for `n_iter_no_change` steps, and keep the
            best parameters; "auto": from 2,000 rows on.
        validation_fraction: share of rows held out, by a coin of each row.
        verbose: whether to tell of steps and slow passes on standard error.
        executor: "serial", "threads", "dask" or a `distributed.Client`; see `map_reduce`.
        random_state: seed of the start and the rows held out.

    Attributes:
        intercept_, coef_linear_, factors_: the polynomial of the normalised columns. A product's factors are determined
            up to order and scale: compare values, not vectors.
            "homogeneous" has the constant as column d.
        n_parameters_: learnt numbers of one machine.
        n_iter_: steps of the longest fit.
        loss_curve_, validation_curve_: one list for each machine: the objective, and the loss on rows held out (None
            where none are), at each step.

    Raises:
        ValueError: in `fit`, for any argument outside what is said here, and when the loss overflows.

    Source: Yang and Gittens, Tensor machines for learning target-specific polynomial features, arXiv 1504.01697.
    Deviations: the authors start from N(0, 0.01 to 0.1), where a product of many factors is too small to learn from;
    "homogeneous" and the start of w are ours.
    """

    _loss = "squared"
    _normalize = "homogeneous"

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit.

        Args:
            X: shape (n, d), dense or sparse; a `RowSource` with a target, and then no y; or a Dask collection.
            y: shape (n,).
            sample_weight: shape (n,), at least 0.
        """
        source = training_source(self, X, y, sample_weight, dtype=np.float64)
        self._fit(source, [None])
        return self

    def predict(self, X: Any) -> Array:
        """f(x) of each row, shape (n,), for whatever `fit` takes as X."""
        return self._margins(X)[:, 0]

    def _shaped(self, values: Array) -> Any:
        return values[0]


class TensorMachineClassifier(ClassifierMixin, _TensorMachine):  # type: ignore[misc]
    """Logistic regression by a polynomial of low rank: mean log loss of f(x) + (alpha/2) sum of squares of all vectors.

    Two classes are one machine; more are one machine each, against the rest.

    Arguments, attributes and errors are those of `TensorMachineRegressor`, whose attributes here have a first axis for
    the machine.

    Attributes:
        classes_: labels, sorted.

    Raises:
        ValueError: in `fit`, also if there is one class only.

    Source: Yang and Gittens, arXiv 1504.01697.
    """

    _loss = "logistic"
    _normalize = "l2"

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit.

        Args:
            X: shape (n, d), dense or sparse; a `RowSource` with a target, and then no y; or a Dask collection.
            y: shape (n,).
            sample_weight: shape (n,), at least 0.
        """
        source = given_source(self, X, y, sample_weight)
        if source is None:
            X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64)
            self.classes_, codes = class_codes(self, y)
            source = array_source(self, X, codes, sample_weight)
            found = np.arange(len(self.classes_))
        else:
            self.classes_ = found = map_reduce(source, _labels, np.union1d, self.executor)
            check_classes(self, found)
        self._fit(source, [float(label) for label in (found[1:] if len(found) == 2 else found)])
        return self

    def decision_function(self, X: Any) -> Array:
        """Log-odds of the second class, shape (n,), or of each class against the rest, shape (n, K).

        This and what follows takes whatever `fit` takes as X.
        """
        margins = self._margins(X)
        return margins[:, 0] if len(self.classes_) == 2 else margins

    def predict_proba(self, X: Any) -> Array:
        """Probabilities of the classes, shape (n, classes); those of several machines are divided by their sum."""
        p = expit(self._margins(X))
        if len(self.classes_) == 2:
            return np.hstack([1 - p, p])
        total = p.sum(axis=1, keepdims=True)
        shares: Array = np.divide(p, total, out=np.full_like(p, 1 / p.shape[1]), where=total > 0)
        return shares

    def predict(self, X: Any) -> Array:
        """The class with the largest log-odds, shape (n,)."""
        margins = self._margins(X)
        return np.asarray(
            self.classes_[(margins[:, 0] > 0).astype(int) if len(self.classes_) == 2 else margins.argmax(axis=1)]
        )

    def _shaped(self, values: Array) -> Any:
        return values


def _margins(scaling: Scaling, polynomial: Polynomial, flat: Sequence[Array], X: Any) -> Array:
    """Values of the K polynomials at the rows of X, shape (n, K)."""
    X = scaling.apply(X)
    return np.column_stack([polynomial.values(machine, X) for machine in flat])


def _moments(blocks: Iterator[Block]) -> tuple[Any, ...]:
    """Sums over rows of weights, weighted squares of columns, weighted targets and their squares."""
    total = [0.0, 0.0, 0.0, 0.0]
    for block in blocks:
        weight, target = block.weights(), block.target
        squares = squared(block.X)
        for i, part in enumerate((weight.sum(), squares.T @ weight, weight @ target, weight @ target**2)):
            total[i] = total[i] + part
    return tuple(total)


def _labels(blocks: Iterator[Block]) -> Array:
    return np.unique(np.concatenate([block.target for block in blocks]))
