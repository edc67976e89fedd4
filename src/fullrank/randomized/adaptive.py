"""Frequencies that are moved to where they represent a kernel better on the differences that the data has."""

# Shapes: s frequencies, d dimensions, P pairs of rows.

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.optimize import minimize

from fullrank.randomized.blocks import Array
from fullrank.randomized.discrepancy import box_discrepancy_gradient, pair_products, target_products
from fullrank.randomized.spectral import PAIR_BLOCK, mean_cosines


def minimise_discrepancy(W: Array, box: Array, scale: Array, iterations: int) -> Array:
    """Move all frequencies at once to lower their box discrepancy, by L-BFGS.

    Args:
        W: start, shape (d, s).
        box, scale: shape (d,); see `box_discrepancy`.

    Source: arXiv 1412.8293, global adaptive sequences.
    """
    shape, factor = W.shape, scale[:, None]
    first = box_discrepancy_gradient(W, box, scale)[0]

    def objective(flat: Array) -> tuple[float, Array]:
        value, gradient = box_discrepancy_gradient(flat.reshape(shape), box / scale, 1.0)
        return value / first, gradient.ravel() / first

    found = minimize(objective, (W * factor).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": iterations})
    return np.asarray(found.x.reshape(shape) / factor)


def greedy_frequencies(candidates: Array, s: int, box: Array, scale: Array) -> Array:
    """A sequence: each frequency lowers the box discrepancy of those before it the most, so any prefix is usable.

    Args:
        candidates: starts of the search, shape (d, m); all are tried for each frequency, and the best one descends.
        s: length of the sequence.
        box, scale: shape (d,).

    Returns:
        Shape (d, s).

    Source: arXiv 1412.8293, greedy adaptive sequences.
    """
    box, pool = box / scale, candidates * scale[:, None]
    credit = target_products(pool, box, gradient=False)[0]
    crowd = np.zeros(pool.shape[1])
    chosen = np.empty((len(box), s))
    for n in range(s):
        before = chosen[:, :n]

        def objective(w: Array, before: Array = before) -> tuple[float, Array]:
            w = w[:, None]
            target, target_slope = target_products(w, box, gradient=True)
            value, slope = -float(target[0]), -target_slope[:, 0]
            if before.shape[1]:
                product, pair_slope = pair_products(w, before, box)
                value += float(product.sum()) / (before.shape[1] + 1)
                slope = slope + pair_slope[:, 0] / (before.shape[1] + 1)
            return value, slope

        start = pool[:, int(np.argmin(crowd / (n + 1) - credit))]
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 15})
        chosen[:, n] = found.x
        crowd += np.prod(np.sinc(box[:, None] / np.pi * (pool - found.x[:, None])), axis=0)
    return chosen / scale[:, None]


def minimise_pair_error(W: Array, U: Array | sparse.csr_array, kernel: Array, iterations: int) -> Array:
    """Move all frequencies to lower the mean of (mean_l cos(u'w_l) - k(u))^2 over given differences, by L-BFGS.

    Args:
        W: start, shape (d, s).
        U: differences of pairs of rows, shape (P, d), dense or CSR.
        kernel: k(u) of each, shape (P,).

    Deviation: not in the paper, whose adaptive sequences see the data only as a box.
    """
    shape, pairs = W.shape, len(kernel)
    deviation = W.std(axis=1, keepdims=True)
    deviation[deviation == 0] = 1.0
    first = float(np.mean((mean_cosines(U, W) - kernel) ** 2)) or 1.0

    def objective(flat: Array) -> tuple[float, Array]:
        W = flat.reshape(shape) * deviation
        value, gradient = 0.0, np.zeros(shape)
        for start in range(0, pairs, PAIR_BLOCK):
            block = U[start : start + PAIR_BLOCK]
            phase = block @ W
            error = np.cos(phase).mean(axis=1) - kernel[start : start + PAIR_BLOCK]
            value += float(error @ error)
            gradient -= block.T @ (np.sin(phase, out=phase) * error[:, None])
        gradient *= 2 / (pairs * shape[1] * first) * deviation
        return value / (pairs * first), gradient.ravel()

    found = minimize(objective, (W / deviation).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": iterations})
    return np.asarray(found.x.reshape(shape) * deviation)
