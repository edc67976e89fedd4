"""scikit-learn estimators for least squares and ridge regression on tall tables, in memory or not."""

# Shapes: n rows, d features, t targets.

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils import Tags
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from fullrank.randomized.blocks import Block
from fullrank.randomized.engine import Executor, concatenate, map_reduce
from fullrank.randomized.least_squares import lstsq
from fullrank.randomized.sources import ArraySource, as_source


class RandomizedLinearRegression(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Least squares for tall tables: accurate at any condition number, in one to three passes over arrays or files.

    Args:
        fit_intercept: whether the model has a constant.
        precision, method, sketch, sketch_size, refine, tol, max_iter: as in `lstsq`.
        executor: as in `map_reduce`; of use for sources and Dask collections.
        random_state: seed of the sketch.

    Attributes:
        coef_: shape (d,), or (t, d) where y has two dimensions.
        intercept_: number, or shape (t,).
        rank_, cond_estimate_, n_passes_, n_iter_, residual_norm_, relative_gradient_, method_: as in `LstsqResult`.
        n_features_in_, feature_names_in_: of X.

    Raises:
        ValueError: while fitting, an argument out of its range, NaN or infinity in the table.

    Source: Yang, Meng and Mahoney, Implementing Randomized Matrix Algorithms in Parallel and Distributed Environments,
        arXiv 1502.03032.
    """

    def __init__(
        self,
        *,
        fit_intercept: bool = True,
        precision: str = "high",
        method: str = "auto",
        sketch: str = "sparse_sign",
        sketch_size: int | None = None,
        refine: bool = False,
        tol: float = 1e-13,
        max_iter: int = 100,
        executor: Executor = "serial",
        random_state: Any = None,
    ) -> None:
        self.fit_intercept = fit_intercept
        self.precision = precision
        self.method = method
        self.sketch = sketch
        self.sketch_size = sketch_size
        self.refine = refine
        self.tol = tol
        self.max_iter = max_iter
        self.executor = executor
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Fit.

        Args:
            X: shape (n, d), array, CSR or data frame; a Dask collection; or a `RowSource`, which brings y and weights.
            y: shape (n,) or (n, t).
            sample_weight: shape (n,), non-negative.

        Returns:
            The estimator.
        """
        return self._fit(X, y, sample_weight, 0.0)

    def _fit(self, X: Any, y: Any, sample_weight: Any, alpha: float) -> Any:
        source = as_source(X, y, sample_weight)
        if source is None:
            X, y = validate_data(
                self,
                X,
                y,
                accept_sparse="csr",
                dtype=[np.float64, np.float32],
                multi_output=True,
                y_numeric=True,
            )
            if sample_weight is not None:
                sample_weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
            source = ArraySource(X, y, sample_weight, check_finite=False)
        else:
            self.n_features_in_ = source.n_cols
            self.feature_names_in_ = np.array(source.feature_names, dtype=object)
        result = lstsq(
            source,
            precision=self.precision,
            method=self.method,
            sketch=self.sketch,
            sketch_size=self.sketch_size,
            alpha=alpha,
            fit_intercept=self.fit_intercept,
            refine=self.refine,
            tol=self.tol,
            max_iter=self.max_iter,
            executor=self.executor,
            random_state=self.random_state,
        )
        if self.fit_intercept:
            self.intercept_, self.coef_ = result.x[0], result.x[1:].T
        else:
            self.intercept_, self.coef_ = 0.0, result.x.T
        self.rank_, self.cond_estimate_ = result.rank, result.cond_estimate
        self.n_passes_, self.n_iter_, self.method_ = result.n_passes, result.n_iter, result.method
        self.residual_norm_, self.relative_gradient_ = result.residual_norm, result.relative_gradient
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predictions, shape (n,) or (n, t), for what `fit` takes as X."""
        check_is_fitted(self)
        source = as_source(X)
        if source is not None:
            predict = partial(_predictions, coef=self.coef_.T, intercept=self.intercept_)
            return map_reduce(source, predict, concatenate, self.executor)
        X = validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32], reset=False)
        return X @ self.coef_.T + self.intercept_

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class RandomizedRidge(RandomizedLinearRegression):
    """Ridge regression for tall tables: sum of weighted squared errors + alpha |coef|^2, without the intercept's.

    Args:
        alpha: penalty, of the scale of scikit-learn's `Ridge`.
        others: as in `RandomizedLinearRegression`, as are the attributes.

    Raises:
        ValueError: alpha < 0, and what `RandomizedLinearRegression` raises.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        fit_intercept: bool = True,
        precision: str = "high",
        method: str = "auto",
        sketch: str = "sparse_sign",
        sketch_size: int | None = None,
        refine: bool = False,
        tol: float = 1e-13,
        max_iter: int = 100,
        executor: Executor = "serial",
        random_state: Any = None,
    ) -> None:
        super().__init__(
            fit_intercept=fit_intercept,
            precision=precision,
            method=method,
            sketch=sketch,
            sketch_size=sketch_size,
            refine=refine,
            tol=tol,
            max_iter=max_iter,
            executor=executor,
            random_state=random_state,
        )
        self.alpha = alpha

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Fit; arguments as in `RandomizedLinearRegression`."""
        return self._fit(X, y, sample_weight, self.alpha)


def _predictions(blocks: Iterator[Block], coef: np.ndarray, intercept: Any) -> np.ndarray:
    return np.concatenate([block.X @ coef + intercept for block in blocks])
