"""The minimum of a quadratic model plus an absolute penalty, by coordinate descent: a Newton step with an l1 part.

The model of the objective around w is g'(u - w) + (u - w)' H (u - w) / 2 + a |u|_1 for new weights u. Free unknowns
are eliminated, scikit-learn's coordinate descent finds which weights are zero and the signs of the others, and these
solve a linear system, which is exact whatever the condition of H.

Sources: Friedman, Hastie and Tibshirani, Regularization Paths for Generalized Linear Models via Coordinate Descent,
2010; Lee, Sun and Saunders, Proximal Newton-type methods for minimizing composite functions, 2014.
"""

# Shapes: P unknowns, the last of them free of the penalty.

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, solve_triangular
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lasso_path

from fullrank.randomized.blocks import Array

_SWEEPS = 1000
_EXACT = 1e-9  # of the penalty: how far a zero weight's gradient may exceed it


def minimiser(matrix: Array, gradient: Array, coef: Array, absolute: float, n_free: int) -> Array:
    """u that minimises the model, shape (P,).

    Args:
        matrix: H, positive definite, (P, P).
        gradient: g, of all but the absolute penalty, (P,).
        coef: w, (P,).
        absolute: a.
        n_free: how many unknowns at the end are not penalised.
    """
    d = len(coef) - n_free
    linear = matrix @ coef - gradient
    Q, q = matrix[:d, :d], linear[:d]
    if n_free:
        corner, side = cho_factor(matrix[d:, d:]), matrix[d:, :d]
        Q, q = Q - side.T @ cho_solve(corner, side), q - side.T @ cho_solve(corner, linear[d:])
    weights = _penalised(Q, q, coef[:d], absolute) if d else coef[:0]
    if not n_free:
        return weights
    return np.append(weights, cho_solve(corner, linear[d:] - side @ weights))


def _penalised(Q: Array, q: Array, start: Array, absolute: float) -> Array:
    """Minimiser of u'Qu / 2 - q'u + absolute |u|_1."""
    found = _with_signs(Q, q, np.sign(start), absolute)
    if found is not None:
        return found
    root = _root(Q)
    image = solve_triangular(root, q, lower=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what the sweeps leave is seen by the next Newton step
        weights = lasso_path(
            np.asfortranarray(root.T),
            image,
            alphas=[absolute / len(q)],
            precompute=np.ascontiguousarray(root @ root.T),
            Xy=root @ image,
            coef_init=start.copy(),
            tol=1e-10,
            max_iter=_SWEEPS,
        )[1][:, 0]
    found = _with_signs(Q, q, np.sign(weights), absolute)
    return weights if found is None else found


def _with_signs(Q: Array, q: Array, signs: Array, absolute: float) -> Array | None:
    """The minimiser if these are its signs, else None."""
    kept = np.flatnonzero(signs)
    weights = np.zeros(len(q))
    if len(kept):
        try:
            factor = cho_factor(Q[np.ix_(kept, kept)])
        except LinAlgError:
            return None
        weights[kept] = cho_solve(factor, q[kept] - absolute * signs[kept])
        if (np.sign(weights[kept]) != signs[kept]).any():
            return None
    rest = np.delete(q - Q @ weights, kept)
    return weights if np.abs(rest).max(initial=0.0) <= absolute * (1 + _EXACT) else None


def _root(Q: Array) -> Array:
    """Lower triangular factor of Q, which elimination may have made singular by rounding."""
    extra = 0.0
    while True:
        try:
            return np.tril(cho_factor(Q + extra * np.eye(len(Q)), lower=True)[0])
        except LinAlgError:
            extra = max(100 * extra, 1e-14 * float(Q.diagonal().max()), np.finfo(float).tiny)


def with_steps(matrix: Array, pairs: Iterable[tuple[Array, Array]]) -> Array:
    """The matrix after BFGS updates: by steps, and the changes of the gradient that they brought."""
    for step, change in pairs:
        image = matrix @ step
        curved, bent = float(step @ image), float(step @ change)
        if curved > 0 and bent > 0:
            matrix = matrix - np.outer(image, image) / curved + np.outer(change, change) / bent
    return matrix
