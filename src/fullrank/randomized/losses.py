"""Losses of generalised linear models: value, slope and curvature in the margin, and what a target must look like."""

# Shapes: n rows. A margin is x'w + intercept.

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fullrank.randomized.blocks import Array


class Derivatives(NamedTuple):
    """A loss row by row: value, first and second derivative in the margin, each of shape (n,)."""

    value: Array
    slope: Array
    curvature: Array


class Loss(Protocol):
    """A loss that is convex and twice differentiable in the margin."""

    def __call__(self, margin: Array, target: Array) -> Derivatives: ...

    def value(self, margin: Array, target: Array) -> Array: ...

    def margin_of(self, mean: float) -> float:
        """The margin that all rows have under the best model without features, whose targets have this mean; 0 if no
        margin is the best."""

    def check_target(self, target: Array, first_row: int = 0) -> None:
        """Raises:
        ValueError: if a target is impossible under this loss; names its row, counted from `first_row`.
        """


class Logistic:
    """log(1 + exp(z)) - y z, for y in [0, 1]: cross-entropy of the probability 1 / (1 + exp(-z))."""

    def __call__(self, margin: Array, target: Array) -> Derivatives:
        small = np.exp(-np.abs(margin))  # one exponential that cannot overflow serves all three
        larger = 1.0 / (1.0 + small)
        probability = np.where(margin >= 0, larger, small * larger)
        value = np.maximum(margin, 0.0) + np.log1p(small) - target * margin
        return Derivatives(value, probability - target, small * larger * larger)

    def value(self, margin: Array, target: Array) -> Array:
        return np.maximum(margin, 0.0) + np.log1p(np.exp(-np.abs(margin))) - target * margin

    def margin_of(self, mean: float) -> float:
        return float(np.log(mean) - np.log1p(-mean)) if 0 < mean < 1 else 0.0

    def check_target(self, target: Array, first_row: int = 0) -> None:
        _require((target >= 0) & (target <= 1), target, first_row, "between 0 and 1")


class Squared:
    """(z - y)^2 / 2."""

    def __call__(self, margin: Array, target: Array) -> Derivatives:
        residual = margin - target
        return Derivatives(0.5 * residual * residual, residual, np.ones_like(residual))

    def value(self, margin: Array, target: Array) -> Array:
        return 0.5 * np.square(margin - target)

    def margin_of(self, mean: float) -> float:
        return mean

    def check_target(self, target: Array, first_row: int = 0) -> None:
        """Every number will do."""


class Poisson:
    """exp(z) - y z, for y >= 0: negative log-likelihood of a count with mean exp(z), without log(y!)."""

    def __call__(self, margin: Array, target: Array) -> Derivatives:
        # Overflow to infinity is meant: the line search turns such a step down.
        with np.errstate(over="ignore"):
            mean = np.exp(margin)
        return Derivatives(mean - target * margin, mean - target, mean)

    def value(self, margin: Array, target: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.exp(margin) - target * margin

    def margin_of(self, mean: float) -> float:
        return float(np.log(mean)) if mean > 0 else 0.0

    def check_target(self, target: Array, first_row: int = 0) -> None:
        _require(target >= 0, target, first_row, "0 or more")


LOSSES: dict[str, Loss] = {"logistic": Logistic(), "squared": Squared(), "poisson": Poisson()}


def _require(holds: NDArray[np.bool_], target: Array, first_row: int, expected: str) -> None:
    if not holds.all():
        row = int(np.argmin(holds))
        raise ValueError(f"target of row {first_row + row} is {target[row]}, expected {expected}")
