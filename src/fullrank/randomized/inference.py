"""Standard errors and confidence intervals of quantile regression, in two passes over a table of any size.

    model = QuantileRegressor([0.1, 0.5, 0.9]).fit(X, y)
    errors = standard_errors(model, X, y)
    errors.standard_error, errors.intervals(0.95)

| method | covariance of the coefficients | holds where |
| --- | --- | --- |
| iid | t (1 - t) / f(0)^2 (X'X)^-1 | all residuals have one density f |
| robust | (X'X)^-1 X'DX (X'X)^-1, D_i = (t or 1 - t, by sign)^2 / f(0)^2 | shares of signs vary (Greene 2008) |
| sandwich | t (1 - t) H^-1 X'X H^-1, H = sum of K(r / h) / h x x' | densities vary from row to row (Powell 1991) |
| bootstrap | of fits to rows with exponential weights | the same, and few rows (Bose and Chatterjee 2003) |

"iid" and "robust" are those of statsmodels, with its defaults: Epanechnikov's kernel K and the bandwidth h of Hall and
Sheather. A weight counts as so many rows.
"""

# Shapes: n rows, D coefficients (intercept first where there is one), T quantiles.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy import stats
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted, validate_data

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.engine import add, concatenate, map_reduce
from fullrank.randomized.inputs import FLOATS, array_source, check_columns
from fullrank.randomized.parameters import check, integer, one_of, random_generator, random_seed
from fullrank.randomized.quantile import QuantileRegressor
from fullrank.randomized.sketches import row_uniforms
from fullrank.randomized.sources import ArraySource, RowSource, as_source

METHODS = ("iid", "robust", "sandwich", "bootstrap")
SAMPLE = 10**6  # rows whose residuals tell the spread
_STREAM = 17


@dataclass(frozen=True)
class StandardErrors:
    """What is known of coefficients; for several quantiles all but `names` have a leading T.

    Attributes:
        coef: shape (D,), the intercept first where there is one.
        covariance: shape (D, D).
        names: of the coefficients.
    """

    coef: Array
    covariance: Array
    names: list[str]

    @property
    def standard_error(self) -> Array:
        """Shape (D,)."""
        return np.asarray(np.sqrt(np.diagonal(self.covariance, axis1=-2, axis2=-1)))

    def intervals(self, level: float = 0.95) -> Array:
        """Ends of the normal confidence intervals, shape (D, 2)."""
        reach = stats.norm.ppf(0.5 + level / 2) * self.standard_error
        return np.stack([self.coef - reach, self.coef + reach], axis=-1)


def standard_errors(
    model: QuantileRegressor,
    X: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    method: str = "robust",
    n_bootstrap: int = 200,
    random_state: Any = None,
) -> StandardErrors:
    """Standard errors of a fitted model without penalty, from the rows that it was fitted to.

    Args:
        model: a fitted `QuantileRegressor` or `LADRegressor`.
        X, y, sample_weight: as in its `fit`.
        method: see the table above; "bootstrap" needs arrays, the others take any table.
        n_bootstrap: fits of the bootstrap.
        random_state: seed of its weights, and of the sample of residuals of a table beyond a million rows.

    Raises:
        ValueError: an argument out of its range; a model with a penalty, whose coefficients are biased.
    """
    check_is_fitted(model)
    check("method", method, one_of(*METHODS))
    check("n_bootstrap", n_bootstrap, integer(2))
    if model.alpha:
        raise ValueError(f"alpha is {model.alpha}, expected 0: a penalty biases the coefficients")
    quantiles = np.atleast_1d(np.asarray(model.quantile, dtype=np.float64))
    coef = np.atleast_2d(model.coef_)
    if model.fit_intercept:
        coef = np.column_stack([np.atleast_1d(model.intercept_), coef])
    if method == "bootstrap":
        covariances = _bootstrap(model, X, y, sample_weight, n_bootstrap, random_generator(random_state))
        source = as_source(X, y, sample_weight)
    else:
        source = as_source(X, y, sample_weight)
        if source is None:
            X, y = validate_data(model, X, y, accept_sparse="csr", dtype=FLOATS, y_numeric=True, reset=False)
            source = array_source(model, X, y, sample_weight)
        check_columns(model, source)
        seed = random_seed(random_state)
        covariances = _covariances(source, coef, quantiles, model.fit_intercept, method, seed, model.executor)
    known = getattr(model, "feature_names_in_", [f"x{j}" for j in range(model.n_features_in_)])
    names = ["intercept"] * model.fit_intercept + [str(name) for name in known]
    scalar = np.ndim(model.quantile) == 0
    return StandardErrors(coef[0] if scalar else coef, covariances[0] if scalar else covariances, names)


def hall_sheather(n: float, quantile: float, level: float = 0.95) -> float:
    """Bandwidth in probability: how far around the quantile the density is looked at.

    Source: Hall and Sheather, On the distribution of a studentized quantile, JRSS B 1988.
    """
    z = stats.norm.ppf(quantile)
    share = 1.5 * stats.norm.pdf(z) ** 2 / (2 * z**2 + 1)
    return float(n ** (-1 / 3) * stats.norm.ppf(0.5 + level / 2) ** (2 / 3) * share ** (1 / 3))


def _covariances(
    source: RowSource, coef: Array, quantiles: Array, intercept: bool, method: str, seed: int, executor: Any
) -> Array:
    """Shape (T, D, D)."""
    share = min(1.0, SAMPLE / source.n_rows)
    look = partial(_spread_blocks, coef=coef.T, intercept=intercept, share=share, seed=seed)
    sums, sample = map_reduce(source, look, _join_spread, executor)
    n, mean = sums[0], sums[1] / sums[0]
    deviation = np.sqrt(max(sums[2] / n - mean**2, 0.0)) if method != "sandwich" else np.inf
    widths = np.empty(len(quantiles))
    for j, t in enumerate(quantiles):
        h = min(hall_sheather(n, t), 0.99 * t, 0.99 * (1 - t))
        low, high = np.quantile(sample[:, j], [0.25, 0.75], weights=sample[:, -1], method="inverted_cdf")
        spread = min(deviation, (high - low) / 1.34)
        widths[j] = max(spread, 1e-300) * (stats.norm.ppf(t + h) - stats.norm.ppf(t - h))
    gather = partial(_moment_blocks, coef=coef.T, quantiles=quantiles, widths=widths, intercept=intercept)
    gram, signed, near, density = map_reduce(source, gather, executor=executor)
    inverse = np.linalg.pinv(gram, hermitian=True)
    found = []
    for j, t in enumerate(quantiles):
        f = density[j] / (n * widths[j])
        if method == "iid":
            found.append(t * (1 - t) / f**2 * inverse)
        elif method == "robust":
            found.append(inverse @ signed[j] @ inverse / f**2)
        else:
            H = np.linalg.pinv(near[j] / widths[j], hermitian=True)
            found.append(t * (1 - t) * H @ gram @ H)
    return np.array(found)


def _spread_blocks(
    blocks: Iterator[Block], coef: Array, intercept: bool, share: float, seed: int
) -> tuple[Array, Array]:
    """Sums of 1, y and y^2; residuals of a sample of rows, and their weight, (rows, T + 1)."""
    sums, parts = np.zeros(3), []
    for block in blocks:
        w, y = block.weights(), block.target
        sums += w.sum(), w @ y, w @ y**2
        kept = np.flatnonzero((row_uniforms(seed, block.start, block.stop, _STREAM) < share) & (w > 0))
        left = y[kept, None] - Block(block.X[kept], None, None, 0).fitted(coef, intercept=intercept)
        parts.append(np.column_stack([left, w[kept]]))
    return sums, np.concatenate(parts)


def _join_spread(first: Any, second: Any) -> Any:
    return add(first[0], second[0]), concatenate(first[1], second[1])


def _moment_blocks(
    blocks: Iterator[Block], coef: Array, quantiles: Array, widths: Array, intercept: bool
) -> tuple[Array, Array, Array, Array]:
    """X'X (D, D); for each quantile X'X by squared slope and by kernel (T, D, D); sums of the kernel (T,)."""
    D, T = len(coef), len(quantiles)
    gram, signed, near, density = np.zeros((D, D)), np.zeros((T, D, D)), np.zeros((T, D, D)), np.zeros(T)
    for block in blocks:
        A = block.columns(intercept=intercept, weight_power=0)
        w, left = block.weights(), block.target[:, None] - A @ coef
        gram += A.T @ (A * w[:, None])
        for j, t in enumerate(quantiles):
            r = left[:, j]
            kernel = w * np.maximum(0.75 * (1 - (r / widths[j]) ** 2), 0)
            signed[j] += A.T @ (A * (w * np.where(r > 0, t, 1 - t) ** 2)[:, None])
            near[j] += A.T @ (A * kernel[:, None])
            density[j] += kernel.sum()
    return gram, signed, near, density


def _bootstrap(model: QuantileRegressor, X: Any, y: Any, sample_weight: Any, count: int, draws: Any) -> Array:
    """Covariance over fits to rows whose weight is an exponential variable, (T, D, D)."""
    source = as_source(X, y, sample_weight)
    if isinstance(source, ArraySource):
        X, y, sample_weight = source.X, source.y, source.sample_weight
    elif source is not None:
        raise ValueError('method "bootstrap" needs arrays: take "sandwich" for a source')
    weight = np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    points = []
    for _ in range(count):
        fit = clone(model).set_params(tol=max(model.tol, 1e-6)).fit(X, y, weight * draws.exponential(size=len(y)))
        coef = np.atleast_2d(fit.coef_)
        points.append(np.column_stack([np.atleast_1d(fit.intercept_), coef]) if model.fit_intercept else coef)
    found = np.array(points)
    centred = found - found.mean(axis=0)
    return np.asarray(np.einsum("btd,bte->tde", centred, centred) / (count - 1))
