"""The inner loops of pwSGD, one row at a time: compiled where Numba is installed, else plain Python."""

# Shapes: m drawn rows, T steps, r coordinates.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fullrank.randomized.blocks import Array

try:
    import numba
except ImportError:
    numba = None  # type: ignore[assignment]

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[Function], Function]:
    """Numba's `njit`; without Numba the function as it is, slow and right."""
    if numba is None:
        return lambda function: function
    decorate: Callable[[Function], Function] = numba.njit(cache=True, **options)
    return decorate


SQUARED, PINBALL = 0, 1
FREE, BOX, BALL = 0, 1, 2


@compiled()
def descend(
    U: Array,
    target: Array,
    importance: Array,
    order: NDArray[np.int64],
    point: Array,
    kind: int,
    tau: float,
    eta: float,
    half_life: float,
    first: int,
    averaged_from: int,
) -> Array:
    """Steps from `point`, which is changed, and the mean of the points from step `averaged_from` on.

    Args:
        U: rows in the coordinates of the steps, shape (m, r).
        target, importance: shape (m,); weight of a row over its odds of being drawn.
        order: rows of the steps, shape (T,).
        kind: SQUARED: (u'z - y)^2, steps eta / (1 + t / half_life). PINBALL: (1 - tau) |u'z - y| above the target,
            tau |u'z - y| below, steps eta / sqrt(t).
        first: steps taken before.
    """
    mean = np.zeros_like(point)
    for t in range(len(order)):
        i = order[t]
        residual = -target[i]
        for j in range(len(point)):
            residual += U[i, j] * point[j]
        scale = importance[i] * _slope(residual, kind, tau) * _length(eta, half_life, first + t, kind)
        for j in range(len(point)):
            point[j] -= scale * U[i, j]
        if t >= averaged_from:
            for j in range(len(point)):
                mean[j] += (point[j] - mean[j]) / (t - averaged_from + 1)
    return mean


@compiled()
def descend_constrained(
    rows: Array,
    target: Array,
    importance: Array,
    order: NDArray[np.int64],
    point: Array,
    kind: int,
    tau: float,
    eta: float,
    half_life: float,
    first: int,
    averaged_from: int,
    metric: Array,
    inverse: Array,
    free: int,
    constraint: int,
    low: float,
    high: float,
) -> Array:
    """`descend` in the coordinates of the weights, with every step projected in the norm of `metric`, shape (r, r).

    Args:
        inverse: of the metric.
        free: leading weights, the intercept, that are not constrained (0 or 1).
        constraint: BOX: low <= weight <= high. BALL: norm of the weights at most high.
    """
    mean = np.zeros_like(point)
    r = len(point)
    # With the free weight at its best, the others see the Schur complement.
    inner = metric[free:, free:].copy()
    pull = np.zeros(r - free)
    if free:
        pull = metric[0, 1:] / metric[0, 0]
        for j in range(r - 1):
            for k in range(r - 1):
                inner[j, k] -= metric[0, j + 1] * pull[k]
    lengths, axes = np.linalg.eigh(inner)
    for t in range(len(order)):
        i = order[t]
        residual = -target[i]
        for j in range(r):
            residual += rows[i, j] * point[j]
        scale = importance[i] * _slope(residual, kind, tau) * _length(eta, half_life, first + t, kind)
        wish = point - scale * (inverse @ rows[i])
        found = wish[free:].copy()
        if constraint == BOX:
            _project_on_box(inner, wish[free:], found, low, high)
        else:
            _project_on_ball(lengths, axes, found, high)
        if free:
            wish[0] -= pull @ (found - wish[free:])
        wish[free:] = found
        point[:] = wish
        if t >= averaged_from:
            mean += (point - mean) / (t - averaged_from + 1)
    return mean


@compiled(inline="always")
def _slope(residual: float, kind: int, tau: float) -> float:
    if kind == SQUARED:
        return 2.0 * residual
    if residual > 0.0:
        return 1.0 - tau
    if residual < 0.0:
        return -tau
    return 0.0


@compiled(inline="always")
def _length(eta: float, half_life: float, t: int, kind: int) -> float:
    if kind == SQUARED:
        return eta / (1.0 + t / half_life)
    return float(eta / np.sqrt(t + 1.0))


@compiled()
def _project_on_box(metric: Array, wish: Array, found: Array, low: float, high: float) -> None:
    """Minimise (found - wish)' metric (found - wish) over the box, coordinate by coordinate."""
    inside = True
    for j in range(len(found)):
        if found[j] < low or found[j] > high:
            inside = False
        found[j] = min(max(found[j], low), high)
    if inside:
        return
    for _ in range(100):
        moved = 0.0
        largest = 0.0
        for j in range(len(found)):
            slope = 0.0
            for k in range(len(found)):
                slope += metric[j, k] * (found[k] - wish[k])
            value = min(max(found[j] - slope / metric[j, j], low), high)
            moved = max(moved, abs(value - found[j]))
            largest = max(largest, abs(value))
            found[j] = value
        if moved <= 1e-12 * largest:
            return


@compiled()
def _project_on_ball(lengths: Array, axes: Array, found: Array, radius: float) -> None:
    """Minimise (x - found)' metric (x - found) over ||x|| <= radius; the metric is axes diag(lengths) axes'."""
    if np.sqrt(found @ found) <= radius:
        return
    image = lengths * (axes.T @ found)
    # x = (metric + mu)^-1 metric found; its norm falls in mu, and one over it is concave: Newton's method is safe.
    mu = 0.0
    for _ in range(100):
        share = image / (lengths + mu)
        norm = float(np.sqrt(share @ share))
        if norm <= radius * (1.0 + 1e-14):
            break
        mu += (norm / radius - 1.0) * norm * norm / float((share * share) @ (1.0 / (lengths + mu)))
    share = image / (lengths + mu)
    norm = float(np.sqrt(share @ share))
    found[:] = axes @ (share * min(1.0, radius / norm))
