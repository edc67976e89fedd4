"""Linear models fitted by sub-sampled Newton: logistic classification, ridge and Poisson regression."""

# Shapes: n rows, d features.

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import compute_sample_weight
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from fullrank.randomized.blocks import BLOCK_ROWS, Array
from fullrank.randomized.curvature import LARGEST_DENSE, Problem
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
from fullrank.randomized.losses import LOSSES, Loss
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
}
_CLASS_WEIGHT = NONE | one_of("balanced") | Rule("a dict of weights by class", lambda value: isinstance(value, Mapping))


def _block_rows(X: Any) -> int:
    """A pass over dense rows multiplies each block twice: the second time it should still be in the cache."""
    return BLOCK_ROWS if sp.issparse(X) else max(256, _CACHED // X.shape[1])


class _SubsampledNewton(TableEstimator):
    """What the estimators share: the fit and the margin."""

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
        """Fit and set the attributes that all estimators share; the weights (d,), then the intercept."""
        problem = Problem(source, loss, penalty, self.fit_intercept, self.executor)
        size = self.sample_size
        if size is not None and size < problem.size:
            raise wrong("sample_size", size, f"an integer >= {problem.size}, the number of weights")
        sampling = self.sampling
        if sampling == "auto":
            sparse = isinstance(source, ArraySource) and sp.issparse(source.X)
            sampling = "row_norm" if sparse or problem.size > LARGEST_DENSE else "leverage"
        elif sampling == "leverage" and problem.size > LARGEST_DENSE:
            raise ValueError(
                f'sampling is "leverage" for {problem.size} weights, expected at most {LARGEST_DENSE}; use "row_norm"'
            )
        start = None
        if self.warm_start and hasattr(self, "coef_"):
            start = np.append(self.coef_.ravel(), self.intercept_) if self.fit_intercept else self.coef_.ravel()
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
        return result.coef

    def _margin(self, X: Any) -> Array:
        check_is_fitted(self)
        margin = partial(linear_values, coef=np.ravel(self.coef_), intercept=self.intercept_)
        return np.asarray(on_rows(self, X, margin), dtype=np.float64)


class SubsampledNewtonClassifier(ClassifierMixin, _SubsampledNewton):  # type: ignore[misc]
    """Logistic regression of two classes with an l2 penalty, for many rows and up to a few thousand columns.

    Minimises sum_i w_i log(1 + exp(-y_i (x_i'w + b))) + ||w||^2 / (2 C), the objective of scikit-learn's
    `LogisticRegression`. Nothing needs to be scaled: Newton's steps do not depend on the units of the columns.

    Args:
        C: one over the penalty; larger fits closer.
        sampling: what makes a row likely to be drawn for the Hessian: "leverage" (it points where few others do),
            "row_norm" (it is long; cheaper), "uniform" (nothing); "none" takes all rows: Newton's method. "auto" is
            "row_norm" for sparse rows, else "leverage", and "none" where the sample would be half the table.
        sample_size: expected rows of the Hessian; 50 per weight when omitted.
        refresh: steps that share one draw of rows; 1 draws for every step, as the paper does.
        tol: stop when the largest entry of the gradient has fallen to tol (relative to its first value if that is above
            1) and the objective is within tol of its minimum, relatively, by the quadratic model.
        max_iter: most steps.
        fit_intercept: whether to add b, which is not penalised.
        class_weight: None, "balanced", or a dict of weights by class.
        warm_start: start from the last fit.
        verbose: whether to tell of steps and slow passes on standard error.
        executor: where passes over the table run; see `map_reduce`.
        random_state: seed of the draws.

    Attributes:
        classes_: shape (2,); a `RowSource` must have targets 0 and 1.
        coef_, intercept_: shapes (1, d) and (1,).
        n_iter_, n_passes_: steps, and passes over the table.
        history_: a `Step` for every point: objective, gradient, rows, passes, CPU seconds.

    Raises:
        ValueError: a parameter out of range, other than two classes, NaN or infinity, negative weights.

    Source: Xu, Yang, Roosta, Ré and Mahoney, arXiv 1607.00559. Deviations are listed in `fullrank.randomized.newton`.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
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

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit.

        Args:
            X: shape (n, d), dense or sparse; a `RowSource` with targets, and then no y; or a Dask collection.
            y: shape (n,), two classes; 0 and 1 with a source or a Dask collection.
            sample_weight: shape (n,), at least 0.
        """
        check_parameters(self, _RULES | {"C": number(above=0), "class_weight": _CLASS_WEIGHT})
        source = given_source(self, X, y, sample_weight)
        if source is not None:
            if self.class_weight is not None:
                raise ValueError("class_weight needs arrays: give a source a column of weights")
            self.classes_ = np.array([0, 1])
        else:
            X, y = validate_data(self, X, y, accept_sparse="csr", dtype=FLOATS)
            self.classes_, codes = class_codes(self, y)
            if len(self.classes_) > 2:
                kind = type_of_target(y)
                raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
            if self.class_weight is not None:
                by_class = compute_sample_weight(self.class_weight, y)
                sample_weight = by_class if sample_weight is None else by_class * np.asarray(sample_weight)
            source = array_source(self, X, codes, sample_weight, block_rows=_block_rows)
        coef = self._minimise(source, LOSSES["logistic"], 1 / self.C)
        self.coef_ = coef[None, : source.n_cols]
        self.intercept_ = coef[source.n_cols :] if self.fit_intercept else np.zeros(1)
        return self

    def decision_function(self, X: Any) -> Array:
        """Log-odds of the second class, shape (n,); this and the methods below take whatever `fit` takes as X."""
        return self._margin(X)

    def predict_proba(self, X: Any) -> Array:
        """Probabilities of both classes, shape (n, 2)."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: Any) -> Array:
        """Logarithms of the probabilities, exact where these underflow, shape (n, 2)."""
        margin = self._margin(X)
        return -np.logaddexp(0.0, np.column_stack([margin, -margin]))

    def predict(self, X: Any) -> Array:
        """The likelier class, shape (n,)."""
        second = self.decision_function(X) > 0
        return np.asarray(self.classes_[second.astype(int)])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class SubsampledNewtonRegressor(RegressorMixin, _SubsampledNewton):  # type: ignore[misc]
    """Ridge or Poisson regression, for many rows and up to a few thousand columns.

    Minimises sum_i w_i loss(x_i'w + b, y_i) + alpha / 2 ||w||^2 with the loss (z - y)^2 / 2 ("squared": scikit-learn's
    `Ridge(alpha)`) or exp(z) - y z ("poisson": its `PoissonRegressor(alpha / sum of weights)`).

    Args:
        loss: "squared" or "poisson".
        alpha: penalty, at least 0.
        sampling, sample_size, refresh, tol, max_iter, fit_intercept, warm_start, verbose, executor, random_state: as
            in
            `SubsampledNewtonClassifier`.

    Attributes:
        coef_, intercept_: shape (d,), and a number.
        n_iter_, n_passes_, history_: as in `SubsampledNewtonClassifier`.

    Raises:
        ValueError: a parameter out of range, a negative target with "poisson", NaN or infinity, negative weights.

    Source: Xu, Yang, Roosta, Ré and Mahoney, arXiv 1607.00559. Deviations are listed in `fullrank.randomized.newton`.
    """

    def __init__(
        self,
        loss: str = "squared",
        *,
        alpha: float = 1.0,
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
        self.alpha = alpha
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

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit.

        Args:
            X: shape (n, d), dense or sparse; a `RowSource` with targets, and then no y; or a Dask collection.
            y: shape (n,); at least 0 with "poisson".
            sample_weight: shape (n,), at least 0.
        """
        check_parameters(self, _RULES | {"loss": one_of("squared", "poisson"), "alpha": number(least=0)})
        source = training_source(self, X, y, sample_weight, block_rows=_block_rows)
        coef = self._minimise(source, LOSSES[self.loss], float(self.alpha))
        self.coef_ = coef[: source.n_cols]
        self.intercept_ = float(coef[source.n_cols]) if self.fit_intercept else 0.0
        return self

    def predict(self, X: Any) -> Array:
        """Expected target, shape (n,), for whatever `fit` takes as X."""
        margin = self._margin(X)
        return np.exp(margin) if self.loss == "poisson" else margin

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = self.loss == "poisson"
        return tags
