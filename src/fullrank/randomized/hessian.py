"""The Hessian of a loss over rows: as a matrix, by its products with vectors, and its diagonal.

With one margin a row the Hessian is X' diag(w loss'') X. With K of them, `Softmax`, coefficients are a matrix (p, K),
and entry (i, k), (j, l) is the sum of w x_i x_j (p_k [k = l] - p_k p_l).
"""

# Shapes: k rows, d columns of X, p = d + 1 with a last column of ones (`free`) else d, K classes.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp

from fullrank.randomized.blocks import Array, squared
from fullrank.randomized.draws import with_ones
from fullrank.randomized.losses import Loss, Softmax


def margins(X: Any, coef: Array, offset: Array | None = None) -> Array:
    """X coef, plus the intercept where coef has one row more than X has columns, plus the offset; (k,) or (k, K)."""
    d = X.shape[1]
    margin: Array = X @ coef[:d]
    if len(coef) > d:
        margin = margin + coef[d]
    return margin if offset is None else margin + offset


def transposed(X: Any, slope: Array, free: bool) -> Array:
    """X' slope, with a last row for the column of ones; shape (p,) or (p, K)."""
    product: Array = X.T @ slope
    return np.concatenate([product, slope.sum(axis=0, keepdims=True)]) if free else product


def gram(X: Any, weight: Array, free: bool = False) -> Array:
    """X' diag(weight) X, with a last column of ones if `free`; dense, for weights that are not negative."""
    root = np.sqrt(weight)
    if sp.issparse(X) and X.nnz > 0.1 * X.shape[0] * X.shape[1]:
        X = X.toarray()  # a dense product is then the faster one
    if sp.issparse(X):
        X = with_ones(X, free)
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


def hessian(loss: Loss, X: Any, margin: Array, target: Array, weight: Array, free: bool = False) -> Array:
    """The whole matrix, (p, p) or (p K, p K)."""
    if not isinstance(loss, Softmax):
        return gram(X, weight * loss(margin, target).curvature, free)
    if sp.issparse(X) and X.nnz > 0.1 * X.shape[0] * X.shape[1]:
        X = X.toarray()
    probability, classes, p = loss.probability(margin), loss.classes, X.shape[1] + free
    whole = np.zeros((p, classes, p, classes))
    for k in range(classes):
        for other in range(k):
            part = gram(X, weight * probability[:, k] * probability[:, other], free)
            whole[:, k, :, other] = whole[:, other, :, k] = -part
            # A row's second derivatives sum to 0.
            whole[:, k, :, k] += part
            whole[:, other, :, other] += part
    return whole.reshape(p * classes, p * classes)


def hessian_product(
    loss: Loss, X: Any, margin: Array, target: Array, weight: Array, free: bool = False
) -> Callable[[Array], Array]:
    """The function that multiplies by it: coefficients, (p,) or (p, K), to as many numbers."""
    if not isinstance(loss, Softmax):
        curvature = weight * loss(margin, target).curvature
        return lambda vector: transposed(X, curvature * margins(X, vector), free)
    probability = loss.probability(margin)
    weighted = weight[:, None] * probability

    def product(vector: Array) -> Array:
        change = margins(X, vector)
        mean = np.einsum("ij,ij->i", probability, change)
        return transposed(X, weighted * (change - mean[:, None]), free)

    return product


def hessian_diagonal(loss: Loss, X: Any, margin: Array, target: Array, weight: Array, free: bool = False) -> Array:
    """Diagonal of the matrix, in the shape of coef."""
    if isinstance(loss, Softmax):
        probability = loss.probability(margin)
        return transposed(squared(X), weight[:, None] * probability * (1 - probability), free)
    return transposed(squared(X), weight * loss(margin, target).curvature, free)
