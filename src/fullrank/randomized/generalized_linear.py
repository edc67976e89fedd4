"""Generalised linear models fitted by sub-sampled Newton: logistic, ridge, Poisson, gamma and Tweedie; elastic net."""

# Shapes: n rows, d features, K classes.

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
from scipy.special import log_softmax
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import compute_sample_weight
from sklearn.utils.validation import check_is_fitted, validate_data

from fullrank.randomized.blocks import BLOCK_ROWS, Array, Block, log_exposure
from fullrank.randomized.curvature import LARGEST_DENSE, Problem
from fullrank.randomized.engine import map_reduce
from fullrank.randomized.inputs import (
    FLOATS,
    TableEstimator,
    array_source,
    class_codes,
    given_source,
    linear_values,
    on_rows,
    training_source,
)
from fullrank.randomized.losses import LOG_LINK, LOSSES, Loss, Softmax, Tweedie
from fullrank.randomized.newton import subsampled_newton
from fullrank.randomized.parameters import (
    FLAG,
    NONE,
    Rule,
    check_parameters,
    integer,
    number,
    one_of,
    random_seed,
    wrong,
)
from fullrank.randomized.sources import ArraySource, RowSource

_CACHED = 2**18  # cells: 2 MiB
_RULES = {
    "sampling": one_of("auto", "leverage", "row_norm", "uniform", "none"),
    "sample_size": integer(1) | NONE,
    "refresh": integer(1),
    "tol": number(above=0),
    "max_iter": integer(1),
    "fit_intercept": FLAG,
    "warm_start": FLAG,
    "l1_ratio": number(least=0, most=1),
}
_LOSS = one_of("squared", *LOG_LINK)
_MOST_CLASSES = 1000
_TWO = np.array([0.0, 1.0])
_CLASS_WEIGHT = NONE | one_of("balanced") | Rule("a dict of weights by class", lambda value: isinstance(value, Mapping))


def _block_rows(X: Any) -> int:
    """A pass over dense rows multiplies each block twice: the second time it should still be in the cache."""
    return BLOCK_ROWS if sp.issparse(X) else max(256, _CACHED // X.shape[1])


class _SubsampledNewton(TableEstimator):
    """What the estimators share: the fit and the margin."""

    takes_offset = True
    l1_ratio: float
    fit_intercept: bool
    sample_size: int | None
    refresh: int
    tol: float
    max_iter: int
    warm_start: bool
    random_state: Any
    coef_: Array
    intercept_: Array | float

    def _minimise(self, source: RowSource, loss: Loss, penalty: float) -> Array:
        """Fit and set the attributes that all estimators share; weights (p,) or (p, K), the intercept last."""
        absolute, ridge = penalty * self.l1_ratio, penalty * (1 - self.l1_ratio)
        problem = Problem(source, loss, ridge, self.fit_intercept, self.executor, absolute)
        size, least = self.sample_size, problem.size // problem.outputs
        if size is not None and size < least:
            raise wrong("sample_size", size, f"an integer >= {least}, the number of weights")
        sampling = self.sampling
        if sampling == "auto":
            sparse = isinstance(source, ArraySource) and sp.issparse(source.X)
            many = problem.size > LARGEST_DENSE or problem.outputs > 1
            sampling = "row_norm" if sparse or many else "leverage"
        elif sampling == "leverage" and problem.outputs > 1:
            raise ValueError(f'sampling is "leverage" for {problem.outputs} classes; use "row_norm"')
        elif sampling == "leverage" and problem.size > LARGEST_DENSE:
            raise ValueError(
                f'sampling is "leverage" for {problem.size} weights, expected at most {LARGEST_DENSE}; use "row_norm"'
            )
        start = None
        if self.warm_start and hasattr(self, "coef_"):
            rows = [np.atleast_2d(self.coef_).T, *([np.atleast_2d(self.intercept_)] if self.fit_intercept else [])]
            start = np.vstack(rows).ravel()
            if len(start) != problem.size:
                raise ValueError(f"warm_start: X has {source.n_cols} features, the fit before had {self.coef_.size}")
        result = subsampled_newton(
            problem,
            start,
            sampling=sampling,
            sample_size=size,
            refresh=self.refresh,
            tol=self.tol,
            max_iter=self.max_iter,
            seed=random_seed(self.random_state),
        )
        if not result.converged:
            warnings.warn(
                f"{type(self).__name__} stopped after {len(result.history) - 1} steps, with about "
                f"{result.excess:.1e} of the objective left to gain and a gradient of "
                f"{result.history[-1].gradient:.3g}: raise max_iter or the penalty, or check that an optimum exists",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.n_iter_ = len(result.history) - 1
        self.n_passes_ = result.history[-1].passes
        self.history_ = result.history
        return problem.shaped(result.coef)

    def _margin(self, X: Any, offset: Any) -> Array:
        """Shape (n,), or (n, K) for more than two classes."""
        check_is_fitted(self)
        coef = self.coef_.T if np.ndim(self.coef_) == 2 and len(self.coef_) > 1 else np.ravel(self.coef_)
        margin = partial(linear_values, coef=coef, intercept=self.intercept_)
        return np.asarray(on_rows(self, X, margin, offset=offset), dtype=np.float64)


class SubsampledNewtonClassifier(ClassifierMixin, _SubsampledNewton):  # type: ignore[misc]
    """Logistic regression of two or more classes, for many rows and up to a few thousand columns.

    Minimises sum_i w_i log(1 + exp(-y_i (x_i'w + b))) + ((1 - l1_ratio) / 2 ||w||^2 + l1_ratio |w|_1) / C, the
    objective of scikit-learn's `LogisticRegression`; of K > 2 classes, the cross-entropy of the softmax of K margins.
    Without an l1 part nothing needs to be scaled: Newton's steps do not depend on the units of the columns.

    Args:
        C: one over the penalty; larger fits closer.
        l1_ratio: share of the absolute penalty, which makes weights zero.
        sampling: what makes a row likely to be drawn for the Hessian: "leverage" (it points where few others do),
            "row_norm" (it is long; cheaper), "uniform" (nothing); "none" takes all rows: Newton's method. "auto" is
            "row_norm" for sparse rows or more than two classes, else "leverage", and "none" where the sample would be
            half the table.
        sample_size: expected rows of the Hessian; 50 per weight of a class when omitted.
        refresh: steps that share one draw of rows; 1 draws for every step, as the paper does.
        tol: stop when the largest entry of the gradient, with an l1 part of the smallest subgradient, has fallen to tol
            (relative to its first value if that is above 1) and the objective is within tol of its minimum, relatively,
            by the quadratic model.
        max_iter: most steps.
        fit_intercept: whether to add b, which is not penalised.
        class_weight: None, "balanced", or a dict of weights by class.
        warm_start: start from the last fit.
        verbose: whether to tell of steps and slow passes on standard error.
        executor: where passes over the table run; see `map_reduce`.
        random_state: seed of the draws.

    Attributes:
        classes_: shape (K,); a `RowSource` must have targets 0 ... K - 1, or between 0 and 1.
        coef_, intercept_: shapes (1, d) and (1,); (K, d) and (K,), the intercepts of mean 0, for K > 2.
        n_iter_, n_passes_: steps, and passes over the table.
        history_: a `Step` for every point: objective, gradient, rows, passes, CPU seconds. The last is that of `coef_`.

    Raises:
        ValueError: a parameter out of range, one class, an offset for more than two, NaN or infinity, negative weights.

    Source: Xu, Yang, Roosta, Ré and Mahoney, arXiv 1607.00559. Deviations are listed in `fullrank.randomized.newton`.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        l1_ratio: float = 0.0,
        sampling: str = "auto",
        sample_size: int | None = None,
        refresh: int = 3,
        tol: float = 1e-6,
        max_iter: int = 100,
        fit_intercept: bool = True,
        class_weight: Any = None,
        warm_start: bool = False,
        verbose: bool | int = False,
        executor: Any = "serial",
        random_state: Any = None,
    ) -> None:
        self.C = C
        self.l1_ratio = l1_ratio
        self.sampling = sampling
        self.sample_size = sample_size
        self.refresh = refresh
        self.tol = tol
        self.max_iter = max_iter
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.warm_start = warm_start
        self.verbose = verbose
        self.executor = executor
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, *, offset: Any = None) -> Self:
        """Fit.

        Args:
            X: shape (n, d), dense or sparse; a `RowSource` with targets, and then no y; or a Dask collection.
            y: shape (n,), two or more classes; 0, 1, ... with a source or a Dask collection.
            sample_weight: shape (n,), at least 0.
            offset: shape (n,), added to the log-odds of two classes; a source brings its own.
        """
        check_parameters(self, _RULES | {"C": number(above=0), "class_weight": _CLASS_WEIGHT})
        source = given_source(self, X, y, sample_weight, offset=offset)
        if source is not None:
            if self.class_weight is not None:
                raise ValueError("class_weight needs arrays: give a source a column of weights")
            self.classes_ = np.arange(_count_classes(source, self.executor))
        else:
            X, y = validate_data(self, X, y, accept_sparse="csr", dtype=FLOATS)
            self.classes_, codes = class_codes(self, y)
            if self.class_weight is not None:
                by_class = compute_sample_weight(self.class_weight, y)
                sample_weight = by_class if sample_weight is None else by_class * np.asarray(sample_weight)
            source = array_source(self, X, codes, sample_weight, block_rows=_block_rows, offset=offset)
        several = len(self.classes_) > 2
        if several and source.has_offset:
            raise ValueError(f"an offset is for two classes, the target has {len(self.classes_)}")
        coef = self._minimise(source, Softmax(len(self.classes_)) if several else LOSSES["logistic"], 1 / self.C)
        self.coef_ = np.atleast_2d(coef[: source.n_cols].T)
        self.intercept_ = np.atleast_1d(coef[source.n_cols]) if self.fit_intercept else np.zeros(len(self.coef_))
        if several:
            self.intercept_ -= self.intercept_.mean()
        return self

    def decision_function(self, X: Any, offset: Any = None) -> Array:
        """Log-odds of the second class, shape (n,), or the margins of K > 2 classes, shape (n, K).

        This and the methods below take whatever `fit` takes as X.
        """
        return self._margin(X, offset)

    def predict_proba(self, X: Any, offset: Any = None) -> Array:
        """Probabilities of the classes, shape (n, K)."""
        return np.exp(self.predict_log_proba(X, offset))

    def predict_log_proba(self, X: Any, offset: Any = None) -> Array:
        """Logarithms of the probabilities, exact where these underflow, shape (n, K)."""
        margin = self._margin(X, offset)
        if margin.ndim == 2:
            return np.asarray(log_softmax(margin, axis=1))
        return -np.logaddexp(0.0, np.column_stack([margin, -margin]))

    def predict(self, X: Any, offset: Any = None) -> Array:
        """The likeliest class, shape (n,)."""
        margin = self._margin(X, offset)
        return np.asarray(self.classes_[margin.argmax(axis=1) if margin.ndim == 2 else (margin > 0).astype(int)])


def _count_classes(source: RowSource, executor: Any) -> int:
    """Two where all targets are between 0 and 1, else as many as there are."""
    found = map_reduce(source.without_features(), _classes_seen, np.union1d, executor)
    if found[-1] <= 1:
        return 2
    count = int(np.ceil(found[-1])) + 1
    if count > _MOST_CLASSES:
        raise ValueError(f"the source has a target of {found[-1]:g}, expected classes from 0 to {_MOST_CLASSES - 1}")
    missing = np.setdiff1d(np.arange(count), found)
    if len(missing) and not (found % 1).any():
        raise ValueError(f"the source has no target {missing[0]}, expected all classes from 0 to {count - 1}")
    return count


def _classes_seen(blocks: Iterator[Block]) -> Array:
    parts = [np.unique(y) if y.max(initial=0.0) > 1 else _TWO for y in (block.target for block in blocks)]
    return np.unique(np.concatenate([[], *parts]))


class SubsampledNewtonRegressor(RegressorMixin, _SubsampledNewton):  # type: ignore[misc]
    """Ridge, Poisson, gamma or Tweedie regression, for many rows and up to a few thousand columns.

    Minimises sum_i w_i loss(x_i'w + b, y_i) + alpha ((1 - l1_ratio) / 2 ||w||^2 + l1_ratio |w|_1). The mean is x'w + b
    with the loss (z - y)^2 / 2 ("squared": scikit-learn's `Ridge(alpha)`), else its exponential, with exp(z) - y z
    ("poisson": its `PoissonRegressor(alpha / sum of weights)`) or half the deviance ("gamma" and "tweedie":
    `GammaRegressor` and `TweedieRegressor(power, link="log")` likewise).

    Args:
        loss: "squared", "poisson" (counts), "gamma" (positive values) or "tweedie" (values that are often 0).
        power: of "tweedie", between 1 and 2: the variance is proportional to this power of the mean.
        alpha: penalty, at least 0.
        l1_ratio: share of the absolute penalty, which makes weights zero.
        sampling, sample_size, refresh, tol, max_iter, fit_intercept, warm_start, verbose, executor, random_state: as
            in `SubsampledNewtonClassifier`.

    Attributes:
        coef_, intercept_: shape (d,), and a number.
        n_iter_, n_passes_, history_: as in `SubsampledNewtonClassifier`.

    Raises:
        ValueError: a parameter out of range, a target without a value of the loss, NaN or infinity, negative weights.

    Source: Xu, Yang, Roosta, Ré and Mahoney, arXiv 1607.00559. Deviations are listed in `fullrank.randomized.newton`.
    """

    def __init__(
        self,
        loss: str = "squared",
        *,
        power: float = 1.5,
        alpha: float = 1.0,
        l1_ratio: float = 0.0,
        sampling: str = "auto",
        sample_size: int | None = None,
        refresh: int = 3,
        tol: float = 1e-6,
        max_iter: int = 100,
        fit_intercept: bool = True,
        warm_start: bool = False,
        verbose: bool | int = False,
        executor: Any = "serial",
        random_state: Any = None,
    ) -> None:
        self.loss = loss
        self.power = power
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.sampling = sampling
        self.sample_size = sample_size
        self.refresh = refresh
        self.tol = tol
        self.max_iter = max_iter
        self.fit_intercept = fit_intercept
        self.warm_start = warm_start
        self.verbose = verbose
        self.executor = executor
        self.random_state = random_state

    def fit(
        self, X: Any, y: Any = None, sample_weight: Any = None, *, offset: Any = None, exposure: Any = None
    ) -> Self:
        """Fit.

        Args:
            X: shape (n, d), dense or sparse; a `RowSource` with targets, and then no y; or a Dask collection.
            y: shape (n,); at least 0 with "poisson" and "tweedie", above 0 with "gamma".
            sample_weight: shape (n,), at least 0.
            offset: shape (n,), added to x'w + b; a source brings its own.
            exposure: shape (n,), above 0, what the mean is a multiple of: its logarithm is added to the offset.
        """
        rules = {"loss": _LOSS, "power": number(above=1, below=2), "alpha": number(least=0)}
        check_parameters(self, _RULES | rules)
        offset = self._with_exposure(offset, exposure)
        source = training_source(self, X, y, sample_weight, block_rows=_block_rows, offset=offset)
        loss = Tweedie(float(self.power)) if self.loss == "tweedie" else LOSSES[self.loss]
        coef = self._minimise(source, loss, float(self.alpha))
        self.coef_ = coef[: source.n_cols]
        self.intercept_ = float(coef[source.n_cols]) if self.fit_intercept else 0.0
        return self

    def predict(self, X: Any, offset: Any = None, exposure: Any = None) -> Array:
        """Expected target, shape (n,), for whatever `fit` takes as X."""
        margin = self._margin(X, self._with_exposure(offset, exposure))
        return np.exp(margin) if self.loss in LOG_LINK else margin

    def _with_exposure(self, offset: Any, exposure: Any) -> Any:
        if exposure is None:
            return offset
        if self.loss not in LOG_LINK:
            raise ValueError(f'exposure is for the losses {", ".join(LOG_LINK)}, not for "{self.loss}"')
        lazy = hasattr(exposure, "__dask_graph__")  # its numbers are looked at when they are read
        logarithm = np.log(exposure) if lazy else log_exposure(np.asarray(exposure, dtype=np.float64), 0, "X")
        return logarithm if offset is None else offset + logarithm

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = self.loss in LOG_LINK
        return tags
