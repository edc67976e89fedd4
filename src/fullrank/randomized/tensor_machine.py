"""Tensor machines: polynomials of low rank whose vectors are learnt, in place of random polynomial features."""

# Shapes: n rows, d columns, r rank, q degree, K machines (one per class beyond two, else 1).

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from fullrank.randomized.blocks import Block
from fullrank.randomized.engine import Executor, map_reduce
from fullrank.randomized.losses import LOSSES, Vector
from fullrank.randomized.polynomial import Fit, Polynomial, Scaling
from fullrank.randomized.polynomial_training import Rules, adam, lbfgs
from fullrank.randomized.sources import ArraySource, RowSource, as_source

NORMALIZE = ("auto", "l2", "homogeneous", "columns", None)
_LINEAR_ITERATIONS = 100
_HOLD_OUT_FROM = 2_000  # rows; fewer are all trained on unless asked otherwise


class _TensorMachine(BaseEstimator):
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
        self.executor = executor
        self.random_state = random_state

    @property
    def n_parameters_(self) -> int:
        """Learnt numbers of one machine: 1 + d + (q - 1)(q + 2) r d / 2; a constant column counts in d."""
        check_is_fitted(self)
        return self._polynomial.n_parameters

    @property
    def factors_(self) -> list[np.ndarray]:
        """Vectors of each degree from 2 on, shape ([K,] r, i, d)."""
        check_is_fitted(self)
        axes = (0, 2, 1, 3)
        by_machine = [list(self._polynomial.products(self._polynomial.vectors(flat))) for flat in self._flat]
        return [self._shaped(np.stack(parts).transpose(axes)) for parts in zip(*by_machine, strict=True)]

    @property
    def coef_linear_(self) -> np.ndarray:
        """Vector of degree 1, shape ([K,] d)."""
        check_is_fitted(self)
        return self._shaped(np.stack([self._polynomial.vectors(flat)[0] for flat in self._flat]))

    @property
    def intercept_(self) -> np.ndarray | float:
        """Shape ([K,])."""
        check_is_fitted(self)
        return self._shaped(np.array([flat[0] for flat in self._flat]))

    def monomial_coef(self, columns: Sequence[int]) -> np.ndarray | float:
        """Coefficient of the monomial prod_k x_{columns[k]} in the polynomial of the normalised columns, shape ([K,]).

        Args:
            columns: column numbers, repeated for powers; their order does not matter.

        Raises:
            ValueError: if there is none, or more than the degree.
        """
        check_is_fitted(self)
        if not 1 <= len(columns) <= self._polynomial.degree:
            raise ValueError(f"a monomial has 1 to {self._polynomial.degree} columns here, got {len(columns)}")
        if len(columns) == 1:
            return self.coef_linear_[..., columns[0]]
        factors = self.factors_[len(columns) - 2]
        orders = set(itertools.permutations(columns))
        places = np.arange(len(columns))
        return sum(np.prod(factors[..., places, list(order)], axis=-1).sum(axis=-1) for order in orders)

    def _margins(self, X: Any) -> np.ndarray:
        """Values of the K polynomials, shape (n, K)."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=np.float64, reset=False)
        X = self._scaling.apply(X)
        return np.column_stack([self._polynomial.values(flat, X) for flat in self._flat])

    def _given_source(self, X: Any, y: Any, sample_weight: Any) -> RowSource | None:
        """X as a source if it is one or a Dask collection, else None."""
        source = as_source(X, y, sample_weight)
        if source is not None:
            if source.n_targets != 1:
                raise ValueError(f"the source has {source.n_targets} targets, expected 1")
            self.n_features_in_ = source.n_cols
        return source

    def _array_source(self, X: Any, y: np.ndarray, sample_weight: Any) -> ArraySource:
        """Validated arrays as a source."""
        weight = None if sample_weight is None else _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        return ArraySource(X, y, weight, check_finite=False)

    def _fit(self, source: RowSource, classes: Sequence[float | None]) -> None:
        """Train one machine for each class (None: targets are numbers)."""
        self._check_parameters(source)
        draws = check_random_state(self.random_state)
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
            source = ArraySource(scaling.apply(source.X), source.y, source.sample_weight, check_finite=False)
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

    def _start(self, draws: np.random.RandomState, center: float, spread: float, row_length: float) -> Vector:
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

    def _check_parameters(self, source: RowSource) -> None:
        for name in ("degree", "rank", "max_iter", "n_iter_no_change"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("alpha", "tol"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {value!r}")
        if self.init_scale != "auto" and not (isinstance(self.init_scale, Real) and 0 < self.init_scale < math.inf):
            raise ValueError(f'init_scale must be positive or "auto", got {self.init_scale!r}')
        if self.early_stopping not in (True, False, "auto"):
            raise ValueError(f'early_stopping must be True, False or "auto", got {self.early_stopping!r}')
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction!r}")
        for name, allowed in (("normalize", NORMALIZE), ("solver", ("lbfgs", "adam"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {allowed}")
        if self.solver == "adam" and not isinstance(source, ArraySource):
            raise ValueError('solver "adam" shuffles rows and needs them in memory; "lbfgs" reads a source in passes')

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class TensorMachineRegressor(RegressorMixin, _TensorMachine):
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
        source = self._given_source(X, y, sample_weight)
        if source is None:
            X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64, y_numeric=True)
            source = self._array_source(X, y, sample_weight)
        self._fit(source, [None])
        return self

    def predict(self, X: Any) -> np.ndarray:
        """f(x) of each row, shape (n,)."""
        return self._margins(X)[:, 0]

    def _shaped(self, values: np.ndarray) -> Any:
        return values[0]


class TensorMachineClassifier(ClassifierMixin, _TensorMachine):
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
        source = self._given_source(X, y, sample_weight)
        if source is None:
            X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64)
            check_classification_targets(y)
            self.classes_, codes = np.unique(y, return_inverse=True)
            source = self._array_source(X, codes.astype(np.float64), sample_weight)
            found = np.arange(len(self.classes_))
        else:
            self.classes_ = found = map_reduce(source, _labels, np.union1d, self.executor)
        if len(found) < 2:
            raise ValueError(f"{type(self).__name__} needs two classes, the target has one class: {self.classes_[0]!r}")
        self._fit(source, [float(label) for label in (found[1:] if len(found) == 2 else found)])
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Log-odds of the second class, shape (n,), or of each class against the rest, shape (n, K)."""
        margins = self._margins(X)
        return margins[:, 0] if len(self.classes_) == 2 else margins

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, shape (n, classes); those of several machines are divided by their sum."""
        p = expit(self._margins(X))
        if len(self.classes_) == 2:
            return np.hstack([1 - p, p])
        total = p.sum(axis=1, keepdims=True)
        return np.divide(p, total, out=np.full_like(p, 1 / p.shape[1]), where=total > 0)

    def predict(self, X: Any) -> np.ndarray:
        """The class with the largest log-odds, shape (n,)."""
        margins = self._margins(X)
        return self.classes_[(margins[:, 0] > 0).astype(int) if len(self.classes_) == 2 else margins.argmax(axis=1)]

    def _shaped(self, values: np.ndarray) -> Any:
        return values


def _moments(blocks: Iterator[Block]) -> tuple[Any, ...]:
    """Sums over rows of weights, weighted squares of columns, weighted targets and their squares."""
    total = [0.0, 0.0, 0.0, 0.0]
    for block in blocks:
        weight = np.ones(block.X.shape[0]) if block.weight is None else block.weight
        squares = block.X.multiply(block.X) if sp.issparse(block.X) else np.square(block.X)
        assert block.y is not None
        for i, part in enumerate((weight.sum(), squares.T @ weight, weight @ block.y, weight @ block.y**2)):
            total[i] = total[i] + part
    return tuple(total)


def _labels(blocks: Iterator[Block]) -> np.ndarray:
    return np.unique(np.concatenate([block.y for block in blocks if block.y is not None]))
