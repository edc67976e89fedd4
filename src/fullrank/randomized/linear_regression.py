"""scikit-learn estimators for least squares and ridge regression on tall tables, in memory or not."""

# Shapes: n rows, d features, t targets.

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from sklearn.base import MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from fullrank.randomized.blocks import Array
from fullrank.randomized.engine import Executor
from fullrank.randomized.inputs import TableEstimator, linear_values, on_rows, training_source
from fullrank.randomized.least_squares import lstsq


class RandomizedLinearRegression(MultiOutputMixin, RegressorMixin, TableEstimator):  # type: ignore[misc]
    """Least squares for tall tables: accurate at any condition number, in one to three passes over arrays or files.

    Args:
        fit_intercept: whether the model has a constant.
        precision, method, sketch, sketch_size, refine, tol, max_iter: as in `lstsq`.
        verbose: whether to tell of steps and slow passes on standard error.
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
        verbose: bool | int = False,
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
        self.verbose = verbose
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
        source = training_source(self, X, y, sample_weight, targets=None)
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
        source.tell(f"method {result.method}, rank {result.rank}, {result.n_passes} passes")
        if self.fit_intercept:
            self.intercept_, self.coef_ = result.x[0], result.x[1:].T
        else:
            self.intercept_, self.coef_ = 0.0, result.x.T
        self.rank_, self.cond_estimate_ = result.rank, result.cond_estimate
        self.n_passes_, self.n_iter_, self.method_ = result.n_passes, result.n_iter, result.method
        self.residual_norm_, self.relative_gradient_ = result.residual_norm, result.relative_gradient
        return self

    def predict(self, X: Any) -> Array:
        """Predictions, shape (n,) or (n, t), for what `fit` takes as X."""
        check_is_fitted(self)
        return on_rows(self, X, partial(linear_values, coef=np.transpose(self.coef_), intercept=self.intercept_))


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
        verbose: bool | int = False,
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
            verbose=verbose,
            executor=executor,
            random_state=random_state,
        )
        self.alpha = alpha

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Fit; arguments as in `RandomizedLinearRegression`."""
        return self._fit(X, y, sample_weight, self.alpha)
